//! kvar's engine beside the stores a user would otherwise embed: foyer with both of its I/O
//! engines, and fjall with key-value separation. Same values, same folder, same run.
//!
//! ```text
//!   this process                 a child for each store, which has nothing else in it
//!   ────────────                 ────────────────────────────────────────────────────
//!   start ────────────────────>  open, fill with values of 64 KiB, all different
//!   for every round, depth, store (the order turns with every round):
//!     the others are stopped (SIGSTOP): nobody's threads disturb another's run
//!     read so long, so deep ──>  read at random, compare, count
//!          <── rate, latencies, CPU of that process, all its threads and the kernel for it
//! ```
//!
//! A figure is the median over the rounds; a ratio to kvar is that of the same round, with the 90 %
//! interval of the sign test. CPU a read is given as it was, and less what the process uses while
//! nobody reads. Where a thread spins while there is nothing to do, the one overstates what a read
//! takes and the other understates it, since that thread spins less while it works: the truth lies
//! between.
//! Each store checks its values the way it does by default; beyond that every value read is
//! compared with what was put, at both ends.
//!
//! Stores that read through the page cache (fjall) would be served from memory: the cache is
//! dropped before each of their runs, which needs root and is said when it fails.

mod child;
mod fjall_store;
mod foyer_store;
mod kvar_store;
mod measure;
mod parent;
mod report;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use measure::Reads;
use std::path::{Path, PathBuf};

/// Bytes of a value.
pub(crate) const VALUE_BYTES: usize = 64 << 10;
/// Memory each store may keep values in: little against the device.
pub(crate) const MEMORY_BYTES: usize = 32 << 20;
/// Reads under way at once.
pub(crate) const DEPTHS: [usize; 4] = [1, 4, 16, 64];

/// kvar's engine beside foyer and fjall.
#[derive(Debug, Parser)]
pub(crate) struct Arguments {
    /// Where each store gets a folder; removed afterwards.
    #[arg(long, default_value = ".")]
    pub(crate) folder: PathBuf,
    /// Values of 64 KiB.
    #[arg(long, default_value_t = 32_768, value_parser = clap::value_parser!(u64).range(64..))]
    pub(crate) values: u64,
    /// Rounds over all stores.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) rounds: u64,
    /// Seconds of each run.
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Be the child that has this store alone, and do what standard input says.
    #[arg(long, hide = true)]
    child: Option<Which>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give 0.1 to 600 seconds".to_owned()),
    }
}

/// The stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Which {
    Kvar,
    FoyerUring,
    FoyerPsync,
    Fjall,
}

impl Which {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kvar => "kvar",
            Self::FoyerUring => "foyer-uring",
            Self::FoyerPsync => "foyer-psync",
            Self::Fjall => "fjall",
        }
    }

    fn open(self, folder: &Path, values: u64) -> Result<Box<dyn Store>> {
        let bytes = values as usize * VALUE_BYTES;
        let path = folder.join(self.name());
        Ok(match self {
            Self::Kvar => Box::new(kvar_store::Kvar::open(&path, bytes)?),
            Self::FoyerUring => Box::new(foyer_store::Foyer::open(&path, bytes, true)?),
            Self::FoyerPsync => Box::new(foyer_store::Foyer::open(&path, bytes, false)?),
            Self::Fjall => Box::new(fjall_store::Fjall::open(&path)?),
        })
    }
}

/// A store under test.
pub(crate) trait Store {
    /// Puts values `0..values` and waits until they are on the device.
    fn fill(&mut self, values: u64) -> Result<()>;
    /// Reads at random, so many at once.
    fn read(&mut self, values: u64, depth: usize, seconds: f64) -> Result<Reads>;
    /// Whether it reads through the page cache.
    fn is_cached_by_the_system(&self) -> bool {
        false
    }
    /// What it needs to do by itself while nobody reads; called often.
    fn turn(&mut self) {}
}

/// The value under a number: all different, and none compressible.
pub(crate) fn value(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes: Vec<u8> = (0..VALUE_BYTES / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[VALUE_BYTES - 8..].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// Whether a value that was read is the one under this number.
pub(crate) fn is_value(bytes: &[u8], number: u64) -> bool {
    bytes.len() == VALUE_BYTES
        && bytes[..8] == number.to_le_bytes()
        && bytes[VALUE_BYTES - 8..] == number.to_le_bytes()
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(which) = arguments.child {
        let store = which.open(&arguments.folder, arguments.values)?;
        return child::serve(store, arguments.values);
    }
    let folder = arguments
        .folder
        .join(format!("kvar-bench-peers-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let result = parent::run(&arguments, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    result
}
