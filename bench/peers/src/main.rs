//! kvar's engine beside the stores a user would otherwise embed: foyer with both of its I/O
//! engines, and fjall with key-value separation. Same values, same folder, same run.
//!
//! Every store is filled with so many values of 64 KiB, all different. Then each in turn is read
//! at random for a few seconds, at depth 1 and 16; the order turns with every round. A figure is
//! the median over the rounds. CPU is that of the whole process, its helpers and the kernel on its
//! behalf included, divided by the reads. Each store checks its values the way it does by default;
//! beyond that every value read is compared with what was put, at both ends.
//!
//! Stores that read through the page cache (fjall) would be served from memory: the cache is
//! dropped before each of their runs, which needs root and is said when it fails.

mod fjall_store;
mod foyer_store;
mod kvar_store;
mod measure;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use measure::Reads;
use std::path::PathBuf;

/// Bytes of a value.
pub(crate) const VALUE_BYTES: usize = 64 << 10;
/// Memory each store may keep values in: little against the device.
pub(crate) const MEMORY_BYTES: usize = 32 << 20;
const DEPTHS: [usize; 2] = [1, 16];

/// kvar's engine beside foyer and fjall.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where each store gets a folder; removed afterwards.
    #[arg(long, default_value = ".")]
    folder: PathBuf,
    /// Values of 64 KiB.
    #[arg(long, default_value_t = 32_768)]
    values: u64,
    /// Rounds over all stores.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each run.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A store under test.
pub(crate) trait Store {
    /// Its name, and that of its I/O.
    fn name(&self) -> &'static str;
    /// Puts values `0..values` and waits until they are on the device.
    fn fill(&mut self, values: u64) -> Result<()>;
    /// Reads at random, so many at once.
    fn read(&mut self, values: u64, depth: usize, seconds: f64) -> Result<Reads>;
    /// Whether it reads through the page cache.
    fn is_cached_by_the_system(&self) -> bool {
        false
    }
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
    let folder = arguments
        .folder
        .join(format!("kvar-bench-peers-{}", std::process::id()));
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let result = run(&arguments, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    result
}

fn run(arguments: &Arguments, folder: &std::path::Path) -> Result<()> {
    let bytes = arguments.values as usize * VALUE_BYTES;
    let mut stores: Vec<Box<dyn Store>> = vec![
        Box::new(kvar_store::Kvar::open(&folder.join("kvar"), bytes)?),
        Box::new(foyer_store::Foyer::open(
            &folder.join("foyer-uring"),
            bytes,
            true,
        )?),
        Box::new(foyer_store::Foyer::open(
            &folder.join("foyer-psync"),
            bytes,
            false,
        )?),
        Box::new(fjall_store::Fjall::open(&folder.join("fjall"))?),
    ];
    for store in &mut stores {
        eprintln!("filling {}", store.name());
        store.fill(arguments.values)?;
    }
    let count = stores.len();
    let mut found: Vec<Vec<Vec<Reads>>> = vec![vec![Vec::new(); count]; DEPTHS.len()];
    for round in 0..arguments.rounds {
        for (at, depth) in DEPTHS.into_iter().enumerate() {
            for turn in 0..count {
                let number = (turn + round) % count;
                let store = &mut stores[number];
                if store.is_cached_by_the_system() {
                    drop_page_cache();
                }
                let reads = store.read(arguments.values, depth, arguments.seconds)?;
                eprintln!("round {round}, depth {depth}, {}: {reads}", store.name());
                ensure!(
                    reads.wrong == 0,
                    "{} gave {} wrong values",
                    store.name(),
                    reads.wrong
                );
                ensure!(
                    reads.hit_share > 0.9,
                    "{} has lost {:.0} % of its values: this is no measurement",
                    store.name(),
                    (1.0 - reads.hit_share) * 100.0
                );
                found[at][number].push(reads);
            }
        }
    }
    let mut rows = Vec::new();
    for (at, depth) in DEPTHS.into_iter().enumerate() {
        let medians: Vec<Reads> = found[at].iter().map(|runs| Reads::median(runs)).collect();
        for (store, reads) in stores.iter().zip(&medians) {
            rows.push(serde_json::json!({
                "store": store.name(),
                "depth": depth,
                "value_bytes": VALUE_BYTES,
                "bytes_per_s": reads.bytes_per_s,
                "p50_us": reads.p50_us,
                "p99_us": reads.p99_us,
                "cpu_us": reads.cpu_us,
                "bytes_per_s_ratio_to_kvar": reads.bytes_per_s / medians[0].bytes_per_s,
                "cpu_ratio_to_kvar": reads.cpu_us / medians[0].cpu_us,
            }));
        }
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!(
        "{:<14} {:>5} {:>8} {:>9} {:>9} {:>8} {:>12} {:>10}",
        "store", "depth", "GB/s", "p50 us", "p99 us", "CPU us", "GB/s : kvar", "CPU : kvar"
    );
    for row in &rows {
        let number = |name: &str| row[name].as_f64().unwrap_or(f64::NAN);
        println!(
            "{:<14} {:>5} {:>8.3} {:>9.0} {:>9.0} {:>8.1} {:>12.2} {:>10.2}",
            row["store"].as_str().unwrap_or_default(),
            row["depth"],
            number("bytes_per_s") / 1e9,
            number("p50_us"),
            number("p99_us"),
            number("cpu_us"),
            number("bytes_per_s_ratio_to_kvar"),
            number("cpu_ratio_to_kvar"),
        );
    }
    Ok(())
}

fn drop_page_cache() {
    rustix::fs::sync();
    if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "3") {
        eprintln!("the page cache was not dropped ({error}): the next figures are of memory");
    }
}
