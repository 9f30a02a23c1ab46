//! Gets of 64 KiB and 1 MiB through shared memory, against a cold memcpy.
//!
//! The yardstick copies random blocks of a pool of 256 MiB to random places of another: what moving a
//! block once costs when neither side of the copy is in a cache. Ours reads the same way, from a
//! node's memory into places of a pool as large, and checks every byte besides: once through the rings
//! into private memory, and once into a staging region, where the node writes and the client looks.
//! What a GB costs on either side is the time of their cores, of which those that spin use all there
//! is: so it is taken from a run of both that sleep.

use super::load::Random;
use super::net::{Client, DRAM_BLOCKS, NodeProcess, Settings};
use super::stats::{idle_cpu, seconds_of_process};
use super::{BLOCK_BYTES, Row, abba, bar};
use crate::failure::Failure;
use kvar_client::LinkChoice;
use std::path::Path;
use std::time::{Duration, Instant};

/// Copies between two looks at the clock.
const COPIES_A_LOOK: u32 = 64;

/// Bytes of every pool.
const POOL_BYTES: u64 = DRAM_BLOCKS * BLOCK_BYTES as u64;

const LARGE_BYTES: usize = 1 << 20;
const LARGE_BLOCKS: u64 = POOL_BYTES / LARGE_BYTES as u64;
/// 16 MiB under way: as much as a link has at most.
const LARGE_DEPTH: usize = 16;

pub(crate) fn run(
    settings: &Settings,
    folder: &Path,
    rows: &mut Vec<Row>,
    idle: &mut Vec<f64>,
) -> Result<(), Failure> {
    let node = NodeProcess::start(&folder.join("shared.data"), "2GiB", "1GiB", settings.spin)?;
    let open = |block_bytes, staging| {
        Client::open_with(&node, settings.spin, LinkChoice::Shm, block_bytes, staging)
    };
    let mut rings = open(BLOCK_BYTES, 0)?;
    rings.fill(DRAM_BLOCKS)?;
    rings.read_into_places(DRAM_BLOCKS as usize);
    let mut slots = open(BLOCK_BYTES, POOL_BYTES)?;
    slots.read_into_staging(DRAM_BLOCKS as usize)?;
    let mut memory = Memory::new();
    let progress = bar((settings.pairs * 3) as u64, "pairs against memcpy");
    let (mut of_rings, mut of_slots) = (Measured::default(), Measured::default());
    let (mut copy_rate, mut copy_us) = (vec![], vec![]);
    for number in 0..settings.pairs {
        for (client, of) in [(&mut rings, &mut of_rings), (&mut slots, &mut of_slots)] {
            idle.push(idle_cpu());
            let (ours, theirs) = abba(
                number,
                || client.read(16, settings.seconds, DRAM_BLOCKS),
                || Ok(memory.copy(settings.seconds, BLOCK_BYTES)),
            )?;
            of.ratio.push(ours.bytes_per_s / theirs);
            of.rate.push(ours.bytes_per_s / 1e9);
            copy_rate.push(theirs / 1e9);
            copy_us.push(BLOCK_BYTES as f64 / theirs * 1e6);
            // Latencies: alone, and with a few.
            let alone = client.read(1, settings.seconds / 2.0, DRAM_BLOCKS)?;
            of.p50.push(alone.p50_us);
            of.p99
                .push(client.read(4, settings.seconds / 2.0, DRAM_BLOCKS)?.p99_us);
            progress.inc(1);
        }
    }
    if slots.hits_placed() == 0 {
        return Err(Failure::failed(
            "nothing was placed: that was no measurement",
        ));
    }
    drop((rings, slots));
    let mut rings = open(LARGE_BYTES, 0)?;
    // Under names of its own: what is there is of another length.
    rings.set_first(1 << 32);
    rings.fill(LARGE_BLOCKS)?;
    rings.read_into_places(LARGE_BLOCKS as usize);
    let mut slots = open(LARGE_BYTES, POOL_BYTES)?;
    slots.set_first(1 << 32);
    slots.read_into_staging(LARGE_BLOCKS as usize)?;
    let (mut large_rings, mut large_slots) = (vec![], vec![]);
    for number in 0..settings.pairs {
        for (client, ratios) in [
            (&mut rings, &mut large_rings),
            (&mut slots, &mut large_slots),
        ] {
            let (ours, theirs) = abba(
                number,
                || client.read(LARGE_DEPTH, settings.seconds / 2.0, LARGE_BLOCKS),
                || Ok(memory.copy(settings.seconds / 2.0, LARGE_BYTES)),
            )?;
            ratios.push(ours.bytes_per_s / theirs);
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    drop((rings, slots, node));
    let names = [
        "shm_get_64k_qd16_vs_memcpy",
        "shm_get_64k_qd16_gb_per_s",
        "shm_get_64k_qd1_p50_us",
        "shm_get_64k_qd4_p99_us",
    ];
    of_rings.rows(names, "from memory, through rings", rows);
    let names = [
        "shm_slots_64k_qd16_vs_memcpy",
        "shm_slots_64k_qd16_gb_per_s",
        "shm_slots_64k_qd1_p50_us",
        "shm_slots_64k_qd4_p99_us",
    ];
    of_slots.rows(names, "from memory, into a staging region", rows);
    rows.extend([
        Row::of("memcpy_64k_cold_gb_per_s", copy_rate, "one thread"),
        Row::of("memcpy_64k_cold_us", copy_us, "microseconds"),
        Row::of("shm_get_1m_qd16_vs_memcpy", large_rings, "through rings"),
        Row::of(
            "shm_slots_1m_qd16_vs_memcpy",
            large_slots,
            "into a staging region",
        ),
    ]);
    core_time(settings, folder, rows)
}

/// Core time a GB of a node and a client that sleep when there is nothing to do.
fn core_time(settings: &Settings, folder: &Path, rows: &mut Vec<Row>) -> Result<(), Failure> {
    let data = folder.join("sleeping.data");
    let node = NodeProcess::start(&data, "1GiB", "512MiB", Duration::ZERO)?;
    let open = |staging| {
        let (link, bytes) = (LinkChoice::Shm, BLOCK_BYTES);
        Client::open_with(&node, Duration::ZERO, link, bytes, staging)
    };
    let mut rings = open(0)?;
    rings.fill(DRAM_BLOCKS)?;
    rings.read_into_places(DRAM_BLOCKS as usize);
    let mut slots = open(POOL_BYTES)?;
    slots.read_into_staging(DRAM_BLOCKS as usize)?;
    let mut columns = [(); 4].map(|()| Vec::new());
    for _ in 0..settings.pairs {
        for (client, at) in [(&mut rings, 0), (&mut slots, 2)] {
            let processes = [std::process::id(), node.child.id()];
            let (before, began) = (processes.map(seconds_of_process), Instant::now());
            let reached = client.read(16, settings.seconds, DRAM_BLOCKS)?;
            let gb = reached.bytes_per_s * began.elapsed().as_secs_f64() / 1e9;
            for (n, before) in before.into_iter().enumerate() {
                columns[at + n].push((seconds_of_process(processes[n]) - before) / gb);
            }
        }
    }
    let names = [
        ("shm_get_64k_qd16_client_s_per_gb", "rings, both sleep"),
        ("shm_get_64k_qd16_node_s_per_gb", "rings, both sleep"),
        ("shm_slots_64k_qd16_client_s_per_gb", "slots, both sleep"),
        ("shm_slots_64k_qd16_node_s_per_gb", "slots, both sleep"),
    ];
    for ((name, note), column) in names.into_iter().zip(columns) {
        rows.push(Row::of(name, column, note));
    }
    Ok(())
}

/// One way of reading 64 KiB.
#[derive(Default)]
struct Measured {
    ratio: Vec<f64>,
    rate: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
}

impl Measured {
    fn rows(self, names: [&'static str; 4], note: &'static str, rows: &mut Vec<Row>) {
        let alone = "ours, microseconds; --spin matters";
        let columns = [
            (self.ratio, note),
            (self.rate, "ours"),
            (self.p50, alone),
            (self.p99, "microseconds"),
        ];
        let named = names.into_iter().zip(columns);
        rows.extend(named.map(|(name, (values, note))| Row::of(name, values, note)));
    }
}

/// Two pools, larger than any cache.
struct Memory {
    from: Vec<u8>,
    to: Vec<u8>,
    random: Random,
}

impl Memory {
    fn new() -> Self {
        let bytes = POOL_BYTES as usize;
        Self {
            // Not zero: pages that were never written are all the same one.
            from: vec![3; bytes],
            to: vec![5; bytes],
            random: Random::new(0x0dd_c0de),
        }
    }

    fn place(&mut self, block_bytes: usize) -> usize {
        (self.random.number() % (POOL_BYTES / block_bytes as u64)) as usize * block_bytes
    }

    /// Bytes a second.
    fn copy(&mut self, seconds: f64, block_bytes: usize) -> f64 {
        let started = Instant::now();
        let end = Duration::from_secs_f64(seconds);
        let mut copies = 0_u64;
        while started.elapsed() < end {
            for _ in 0..COPIES_A_LOOK {
                let (from, to) = (self.place(block_bytes), self.place(block_bytes));
                let (from, to) = (&self.from[from..], &mut self.to[to..]);
                to[..block_bytes].copy_from_slice(&from[..block_bytes]);
                std::hint::black_box(&mut to[0]);
            }
            copies += u64::from(COPIES_A_LOOK);
        }
        copies as f64 * block_bytes as f64 / started.elapsed().as_secs_f64()
    }
}
