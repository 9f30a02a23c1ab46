//! Gets of 64 KiB through shared memory, against a cold memcpy.
//!
//! The yardstick copies random blocks of a pool of 256 MiB to random places of another: what moving a
//! block once costs when neither side of the copy is in a cache. Ours reads the same way, from a
//! node's memory into places of a pool as large, and checks every byte besides.

use super::load::Random;
use super::net::{Client, DRAM_BLOCKS, NodeProcess, Settings};
use super::stats::idle_cpu;
use super::{BLOCK_BYTES, Row, abba, bar};
use crate::failure::Failure;
use kvar_client::LinkChoice;
use std::path::Path;
use std::time::{Duration, Instant};

/// Copies between two looks at the clock.
const COPIES_A_LOOK: u32 = 64;

pub(crate) fn run(
    settings: &Settings,
    folder: &Path,
    rows: &mut Vec<Row>,
    idle: &mut Vec<f64>,
) -> Result<(), Failure> {
    let node = NodeProcess::start(&folder.join("shared.data"), "1GiB", "512MiB", settings.spin)?;
    let mut client = Client::open(&node, settings.spin, LinkChoice::Shm)?;
    client.fill(DRAM_BLOCKS)?;
    client.read_into_places(DRAM_BLOCKS as usize);
    let mut memory = Memory::new();
    let progress = bar((settings.pairs * 2) as u64, "pairs against memcpy");
    let (mut ratios, mut rate, mut copy_rate) = (vec![], vec![], vec![]);
    let (mut p50, mut p99, mut copy_us) = (vec![], vec![], vec![]);
    for number in 0..settings.pairs {
        idle.push(idle_cpu());
        let (ours, theirs) = abba(
            number,
            || client.read(16, settings.seconds, DRAM_BLOCKS),
            || Ok(memory.copy(settings.seconds)),
        )?;
        ratios.push(ours.bytes_per_s / theirs);
        rate.push(ours.bytes_per_s / 1e9);
        copy_rate.push(theirs / 1e9);
        copy_us.push(BLOCK_BYTES as f64 / theirs * 1e6);
        progress.inc(1);
        let alone = client.read(1, settings.seconds / 2.0, DRAM_BLOCKS)?;
        p50.push(alone.p50_us);
        p99.push(client.read(4, settings.seconds / 2.0, DRAM_BLOCKS)?.p99_us);
        progress.inc(1);
    }
    progress.finish_and_clear();
    rows.extend([
        Row::of(
            "shm_get_64k_qd16_vs_memcpy",
            ratios,
            "from memory, through shared memory",
        ),
        Row::of("shm_get_64k_qd16_gb_per_s", rate, "ours"),
        Row::of("memcpy_64k_cold_gb_per_s", copy_rate, "one thread"),
        Row::of(
            "shm_get_64k_qd1_p50_us",
            p50,
            "ours, microseconds; --spin matters",
        ),
        Row::of("shm_get_64k_qd4_p99_us", p99, "microseconds"),
        Row::of("memcpy_64k_cold_us", copy_us, "microseconds"),
    ]);
    Ok(())
}

/// Two pools, larger than any cache.
struct Memory {
    from: Vec<u8>,
    to: Vec<u8>,
    random: Random,
}

impl Memory {
    fn new() -> Self {
        let bytes = DRAM_BLOCKS as usize * BLOCK_BYTES;
        Self {
            // Not zero: pages that were never written are all the same one.
            from: vec![3; bytes],
            to: vec![5; bytes],
            random: Random::new(0x0dd_c0de),
        }
    }

    fn place(&mut self) -> usize {
        (self.random.number() % DRAM_BLOCKS) as usize * BLOCK_BYTES
    }

    /// Bytes a second.
    fn copy(&mut self, seconds: f64) -> f64 {
        let started = Instant::now();
        let end = Duration::from_secs_f64(seconds);
        let mut copies = 0_u64;
        while started.elapsed() < end {
            for _ in 0..COPIES_A_LOOK {
                let (from, to) = (self.place(), self.place());
                let (from, to) = (&self.from[from..], &mut self.to[to..]);
                to[..BLOCK_BYTES].copy_from_slice(&from[..BLOCK_BYTES]);
                std::hint::black_box(&mut to[0]);
            }
            copies += u64::from(COPIES_A_LOOK);
        }
        copies as f64 * BLOCK_BYTES as f64 / started.elapsed().as_secs_f64()
    }
}
