//! `kvar bench index`: what an entry of the index costs in memory, how long a hit takes, and how
//! long recovery takes with that many blocks.
//!
//! *Entries*: the engine's own table at the load its format plans with, random ids. Memory is what
//! the process grew by. A hit is timed twice: as one of a chain of ids, which is how engines ask,
//! and alone, where the id looked up next depends on what the last lookup found, so that none is
//! overlapped by the next.
//!
//! *Recovery*: a real shard takes that many puts of 64 KiB on a sparse file. Payload writes are
//! left out (recovery reads none: ten million blocks of zeros and of anything else are the same to
//! it); directories, footers, headers and checkpoints are written and flushed as ever. The process
//! that does this is then killed, and another opens the device: once as it was left, once with both
//! checkpoints made unreadable, so that every footer is read.

use super::stats::idle_cpu;
use super::{BLOCK_BYTES, Outcome, Row, bar};
use crate::failure::Failure;
use kvar_base::check::crc64;
use kvar_base::{BlockId, ByteSize, Clock, ContentCheck, Moment, SystemClock};
use kvar_engine::{
    Engine, EngineConfig, Entry, FormatOptions, Index, Inserted, PutHints, PutRequest, Superblock,
};
use kvar_io::{
    Arena, Completion, Device, DeviceError, DeviceOptions, Op, Target, Wanted, open_device,
};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Lookups that are timed together: enough that reading the clock does not count.
const CHAIN: usize = 256;
/// Chains that are timed; the median of them is the figure.
const CHAINS: usize = 4096;
/// Memory for blocks on their way: the engine's tiers are not what is looked at.
const DRAM_BYTES: u64 = 64 << 20;

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) entries: u64,
    /// A folder on a file system with sparse files; the file is removed afterwards.
    pub(crate) folder: PathBuf,
    /// Leave recovery out.
    pub(crate) no_recovery: bool,
}

pub(crate) fn run(settings: &Settings) -> Result<Outcome, Failure> {
    let idle = [idle_cpu()];
    let mut rows = table(settings.entries);
    if !settings.no_recovery {
        let path = settings
            .folder
            .join(format!("kvar-bench-index-{}.data", std::process::id()));
        let result = recovery(&path, settings.entries);
        let _ = std::fs::remove_file(&path);
        rows.extend(result?);
    }
    Ok(Outcome::new(rows, &idle))
}

/// Ids that look random and can be made again from their number.
fn id(number: u64) -> BlockId {
    let mut bytes = [0; 32];
    for (part, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        let mut mixed = number.wrapping_mul(4).wrapping_add(part as u64);
        mixed = (mixed ^ mixed >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed = (mixed ^ mixed >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        chunk.copy_from_slice(&(mixed ^ mixed >> 33).to_le_bytes());
    }
    BlockId::new(bytes)
}

fn table(entries: u64) -> Vec<Row> {
    let plan = Superblock::plan(
        entries * BLOCK_BYTES as u64,
        1,
        BLOCK_BYTES as u64,
        kvar_base::DeviceUuid::new([7; 16]),
        [9; 16],
        0,
    );
    let buckets = plan.map_or(16, |superblock| superblock.buckets);
    let before = resident_bytes();
    let mut index = Index::new(buckets, 0x5eed);
    let progress = bar(entries, "entries");
    let mut evicted = 0_u64;
    for number in 0..entries {
        let entry = Entry {
            check64: number,
            position: (number % ((1 << 30) - 1)) as u32 + 1,
            len: BLOCK_BYTES as u32,
            sectioned: false,
            touched: false,
            frequency: 0,
            length: 0,
            kind: 0,
            stamp: number as u8,
            tenant: kvar_engine::Tenant::DEFAULT,
        };
        if let Inserted::Evicted(_) = index.insert(&id(number), &entry, |stamp| stamp) {
            evicted += 1;
        }
        if number % 65536 == 0 {
            progress.set_position(number);
        }
    }
    progress.finish_and_clear();
    let grown = resident_bytes().saturating_sub(before);
    let (chains, hits) = time_chains(&index, entries);
    let alone = time_alone(&index, entries);
    let memory = time_memory(index.bytes());
    let one = |name, value: f64, note| Row::of(name, vec![value], note);
    vec![
        one(
            "index_bytes_per_entry",
            grown as f64 / index.len() as f64,
            "resident memory, at the load that the format plans with",
        ),
        one(
            "index_hit_ns",
            chains,
            "median, in a chain of 256 ids as a lookup of a prompt has",
        ),
        one(
            "index_hit_alone_ns",
            alone,
            "median, where each waits for the one before",
        ),
        one(
            "memory_read_ns",
            memory,
            "median; one word at a random place of as much memory",
        ),
        one(
            "index_evicted_share",
            evicted as f64 / entries as f64,
            "inserts that found both buckets full",
        ),
        one(
            "index_hit_share",
            hits,
            "of lookups of ids that were inserted",
        ),
    ]
}

/// The median nanoseconds of `step`, which does [`CHAIN`] of something.
fn median_ns(mut step: impl FnMut()) -> f64 {
    let mut nanoseconds: Vec<f64> = (0..CHAINS)
        .map(|_| {
            let started = Instant::now();
            step();
            started.elapsed().as_nanos() as f64 / CHAIN as f64
        })
        .collect();
    nanoseconds.sort_by(f64::total_cmp);
    nanoseconds[CHAINS / 2]
}

fn next(at: u64) -> u64 {
    at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1)
}

/// Lookups of whole chains; the share that hits beside it.
fn time_chains(index: &Index, entries: u64) -> (f64, f64) {
    let (mut at, mut hits) = (1, 0);
    let mut ids = Vec::with_capacity(CHAIN);
    let mut found = Vec::with_capacity(CHAIN);
    let nanoseconds = median_ns(|| {
        ids.clear();
        found.clear();
        for _ in 0..CHAIN {
            at = next(at);
            ids.push(id((at >> 24) % entries));
        }
        index.find_all(&ids, &mut found);
        hits += found.iter().flatten().count();
    });
    (nanoseconds, hits as f64 / (CHAIN * CHAINS) as f64)
}

/// Lookups of which each waits for the one before.
fn time_alone(index: &Index, entries: u64) -> f64 {
    let mut at = 1;
    median_ns(|| {
        for _ in 0..CHAIN {
            at = next(at);
            let found = index.find(&id((at >> 24) % entries));
            at ^= found.map_or(0, |(_, entry)| entry.check64);
        }
        std::hint::black_box(at);
    })
}

/// The yardstick: reads of one word each, at random places of as much memory as the index has.
fn time_memory(bytes: usize) -> f64 {
    const LINE_WORDS: usize = 8;
    let Ok(arena) = Arena::new(bytes) else {
        return f64::NAN;
    };
    let Some(mut buffer) = arena.allocate(bytes) else {
        return f64::NAN;
    };
    buffer.as_mut_slice().fill(1);
    let bytes = buffer.as_slice();
    let lines = (bytes.len() / 8 / LINE_WORDS) as u64;
    let mut at = 1;
    median_ns(|| {
        for _ in 0..CHAIN {
            at = next(at);
            at ^= u64::from(bytes[((at >> 24) % lines) as usize * LINE_WORDS * 8]);
        }
        std::hint::black_box(at);
    })
}

/// Resident memory of this process.
fn resident_bytes() -> u64 {
    status_bytes("VmRSS:")
}

fn status_bytes(line: &str) -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .unwrap_or_default()
        .lines()
        .find_map(|found| found.strip_prefix(line))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

/// A device on which payload is not written; see the story above.
struct MetadataOnly {
    device: Box<dyn Device>,
    superblock: Superblock,
    areas: Vec<u32>,
    skipped: Vec<Completion>,
}

impl MetadataOnly {
    fn new(device: Box<dyn Device>, superblock: Superblock) -> Self {
        Self {
            device,
            areas: superblock.areas().collect(),
            superblock,
            skipped: Vec::new(),
        }
    }

    fn is_payload(&self, offset: u64) -> bool {
        let superblock = &self.superblock;
        let Some(inside) = offset.checked_sub(superblock.segments_offset) else {
            return false;
        };
        let segment = inside / superblock.segment_bytes;
        if segment >= u64::from(superblock.segments_per_shard) {
            return false;
        }
        let page = (inside % superblock.segment_bytes / kvar_base::PAGE_BYTES) as u32;
        let in_area = self
            .areas
            .iter()
            .any(|first| (*first..first + superblock.area_pages).contains(&page));
        page != 0 && page < superblock.footer_page() && !in_area
    }
}

impl Device for MetadataOnly {
    fn bytes(&self) -> u64 {
        self.device.bytes()
    }
    fn submit(&mut self, token: u64, op: Op) {
        match op {
            Op::Write { offset, .. } if self.is_payload(offset) => self.skipped.push(Completion {
                token,
                op,
                result: Ok(()),
            }),
            op => self.device.submit(token, op),
        }
    }
    fn kick(&mut self) -> Result<(), DeviceError> {
        self.device.kick()
    }
    fn poll(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.skipped);
        self.device.poll(out);
    }
    fn wait(&mut self, timeout: Duration) {
        if self.skipped.is_empty() {
            self.device.wait(timeout);
        }
    }
    fn readiness(&self) -> Option<RawFd> {
        self.device.readiness()
    }
    fn in_flight(&self) -> usize {
        self.device.in_flight() + self.skipped.len()
    }
    fn engine(&self) -> &'static str {
        self.device.engine()
    }
}

fn failed(path: &Path, error: impl std::fmt::Display) -> Failure {
    Failure::failed(format!("{}: {error}", path.display()))
}

fn target(path: &Path) -> Result<Target, Failure> {
    Target::open(path, Wanted::default()).map_err(|error| failed(path, error))
}

fn config() -> EngineConfig {
    EngineConfig {
        dram_bytes: DRAM_BYTES,
        ..EngineConfig::default()
    }
}

fn recovery(path: &Path, entries: u64) -> Result<Vec<Row>, Failure> {
    // Directories, footers and the segment that is always free take a few percent.
    let bytes = entries * BLOCK_BYTES as u64 / 100 * 104 + (1 << 30);
    std::fs::File::create(path)
        .and_then(|file| file.set_len(bytes))
        .map_err(|error| failed(path, error))?;
    {
        let target = target(path)?;
        let arena = Arena::new(1 << 20).map_err(|error| failed(path, error))?;
        let (mut device, _) = open_device(&target, &arena, DeviceOptions::default())
            .map_err(|error| failed(path, error))?;
        let options =
            FormatOptions::random(1, BLOCK_BYTES as u64, SystemClock::default().unix_seconds());
        kvar_engine::format(&mut *device, &arena, &options).map_err(|error| failed(path, error))?;
    }
    let own = std::env::current_exe().map_err(|error| failed(path, error))?;
    let status = Command::new(own)
        .args(["bench", "index-fill"])
        .arg(path)
        .arg(entries.to_string())
        .stdin(Stdio::null())
        .status()
        .map_err(|error| failed(path, error))?;
    // It ends by killing itself; anything else is a failure it has told about.
    if std::os::unix::process::ExitStatusExt::signal(&status) != Some(9) {
        return Err(Failure::failed(format!(
            "the process that fills ended with {status}"
        )));
    }
    let with = reopen(path)?;
    damage_checkpoints(path)?;
    let without = reopen(path)?;
    let one = |name, value: f64, note| Row::of(name, vec![value], note);
    Ok(vec![
        one(
            "recovery_s",
            with.seconds,
            "after kill -9, from the newest checkpoint",
        ),
        one(
            "recovery_blocks",
            with.blocks as f64,
            "blocks that are there again",
        ),
        one(
            "recovery_records",
            with.records as f64,
            "records replayed on top of the checkpoint",
        ),
        one(
            "recovery_mib",
            with.grown_mib,
            "memory beside the index at its peak",
        ),
        one(
            "recovery_without_checkpoint_s",
            without.seconds,
            "both checkpoints damaged",
        ),
        one(
            "recovery_without_checkpoint_blocks",
            without.blocks as f64,
            "",
        ),
        one("recovery_without_checkpoint_mib", without.grown_mib, ""),
    ])
}

struct Reopened {
    seconds: f64,
    blocks: u64,
    records: u64,
    grown_mib: f64,
}

/// Opens the device in a process of its own, so that its memory can be told.
fn reopen(path: &Path) -> Result<Reopened, Failure> {
    let own = std::env::current_exe().map_err(|error| failed(path, error))?;
    let output = Command::new(own)
        .args(["bench", "index-open"])
        .arg(path)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| failed(path, error))?;
    let value: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| Failure::failed("the process that opens the device failed"))?;
    let number = |name: &str| value[name].as_f64().unwrap_or(f64::NAN);
    Ok(Reopened {
        seconds: number("seconds"),
        blocks: number("blocks") as u64,
        records: number("records") as u64,
        grown_mib: number("grown_mib"),
    })
}

fn damage_checkpoints(path: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::FileExt;
    let superblock = superblock(path)?;
    let file = std::fs::File::options()
        .write(true)
        .open(path)
        .map_err(|error| failed(path, error))?;
    for area in 0..2 {
        file.write_all_at(&[0xff; 4096], superblock.checkpoint_area(0, area))
            .map_err(|error| failed(path, error))?;
    }
    Ok(())
}

fn superblock(path: &Path) -> Result<Superblock, Failure> {
    let target = target(path)?;
    let arena = Arena::new(1 << 20).map_err(|error| failed(path, error))?;
    let (mut device, _) = open_device(&target, &arena, DeviceOptions::default())
        .map_err(|error| failed(path, error))?;
    kvar_engine::read_superblock(&mut *device, &arena)
        .map_err(|error| failed(path, error))?
        .ok_or_else(|| failed(path, "is not formatted"))
}

/// `kvar bench index-fill PATH ENTRIES`: puts, a flush, and death.
pub(crate) fn fill(path: &Path, entries: u64) -> Result<(), Failure> {
    let superblock = superblock(path)?;
    let target = target(path)?;
    let arena = Arena::new(kvar_engine::arena_bytes(&config(), &superblock))
        .map_err(|error| failed(path, error))?;
    let (device, _) = open_device(&target, &arena, DeviceOptions::default())
        .map_err(|error| failed(path, error))?;
    let device = Box::new(MetadataOnly::new(device, superblock.clone()));
    let clock = SystemClock::default();
    let (mut engine, _) = Engine::open(device, arena, &superblock, 0, config(), clock.now())
        .map_err(|error| failed(path, error))?;
    let payload = vec![0x5a; BLOCK_BYTES];
    let crc = crc64(&payload);
    let progress = bar(entries, "blocks put");
    for number in 0..entries {
        let id = id(number);
        let request = PutRequest {
            id,
            sections: vec![(
                BLOCK_BYTES as u32,
                ContentCheck::from_crc(crc, &id, 0, BLOCK_BYTES as u32),
            )],
            hints: PutHints::default(),
            durable: false,
            deadline: Moment(u64::MAX),
        };
        let started = Instant::now();
        loop {
            let now = clock.now();
            match engine.put_begin(now, &request) {
                Ok(mut ticket) => {
                    ticket.buffer_mut().copy_from_slice(&payload);
                    engine.put_commit(now, 0, ticket);
                    break;
                }
                Err(_) if started.elapsed() < Duration::from_secs(30) => {
                    engine.turn(now);
                    engine.events().for_each(drop);
                    engine.wait(Duration::from_millis(1));
                }
                Err(outcome) => return Err(failed(path, outcome.word())),
            }
        }
        if number % 16 == 0 {
            engine.turn(clock.now());
            engine.events().for_each(drop);
        }
        if number % 65536 == 0 {
            progress.set_position(number);
        }
    }
    engine.flush(1);
    let started = Instant::now();
    let flushed = loop {
        engine.turn(clock.now());
        let done = engine.events().find_map(|event| match event {
            kvar_engine::Event::Done { token: 1, result } => Some(result),
            _ => None,
        });
        if let Some(result) = done {
            break result;
        }
        if started.elapsed() > Duration::from_secs(60) {
            break Err("not within 60 s".to_owned());
        }
        engine.wait(Duration::from_millis(1));
    };
    flushed.map_err(|why| failed(path, format!("the device did not flush: {why}")))?;
    progress.finish_and_clear();
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    Ok(())
}

/// `kvar bench index-open PATH`: recovery, timed, as one JSON object.
pub(crate) fn open(path: &Path) -> Result<serde_json::Value, Failure> {
    let superblock = superblock(path)?;
    let target = target(path)?;
    let arena = Arena::new(kvar_engine::arena_bytes(&config(), &superblock))
        .map_err(|error| failed(path, error))?;
    let (device, _) = open_device(&target, &arena, DeviceOptions::default())
        .map_err(|error| failed(path, error))?;
    let before = resident_bytes();
    let started = Instant::now();
    let clock = SystemClock::default();
    let (engine, report) = Engine::open(device, arena, &superblock, 0, config(), clock.now())
        .map_err(|error| failed(path, error))?;
    let seconds = started.elapsed().as_secs_f64();
    drop(engine);
    let index_bytes = superblock.buckets * 64;
    let grown = status_bytes("VmHWM:").saturating_sub(before + index_bytes);
    Ok(serde_json::json!({
        "seconds": seconds,
        "blocks": report.blocks,
        "records": report.records,
        "grown_mib": grown as f64 / f64::from(1 << 20),
        "device": ByteSize(superblock.device_bytes).to_string(),
    }))
}
