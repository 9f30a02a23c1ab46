//! `kvar bench engine`: one shard on one file, against fio on the same file.
//!
//! The file is formatted and filled to the brim with random blocks of 64 KiB. The append runs first,
//! over that full store: reclaim works all the time and drops everything, since nothing was
//! touched. fio writes to a file of the same size beside it. Then blocks are read at random with a
//! DRAM tier too small to matter, every byte passes its check, and fio reads the same file. On a
//! block device kvar has the first half and fio writes to the second.

use super::fio::{self, Job};
use super::load::Random;
use super::stats::{Cpu, CpuUs, idle_cpu, latencies};
use super::{BLOCK_BYTES, Outcome, Row, abba, bar};
use crate::failure::Failure;
use kvar_base::{BlockId, ByteSize, Clock, ContentCheck, Moment, SystemClock, check::crc64};
use kvar_engine::{
    Engine, EngineConfig, Event, FormatOptions, GetRequest, PutHints, PutRequest, ReadHints, Touch,
};
use kvar_io::{Arena, DeviceOptions, IoEngine, Target, Wanted, open_device};
use std::path::PathBuf;
use std::time::Duration;

/// Enough for the reads under way, little against the file: a hit in memory would be a lie here.
const DRAM_BYTES: u64 = 32 << 20;
/// Different payloads; each is stored under many ids.
const POOL_BLOCKS: usize = 512;
/// How long to sleep at most where a completion should wake us.
const NAP: Duration = Duration::from_millis(5);

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Data file or block device; made if missing, its content is lost.
    pub(crate) path: PathBuf,
    pub(crate) size: ByteSize,
    pub(crate) pairs: usize,
    pub(crate) seconds: f64,
    pub(crate) io_engine: IoEngine,
    /// Leave the files there.
    pub(crate) keep: bool,
}

struct Bench {
    engine: Engine,
    clock: SystemClock,
    /// Random payloads with their CRC.
    pool: Vec<(Vec<u8>, u64)>,
    next_block: u64,
    random: Random,
}

struct Reads {
    bytes_per_s: f64,
    p50_us: f64,
    cpu_us: CpuUs,
}

struct Appends {
    bytes_per_s: f64,
    cpu_us: CpuUs,
}

pub(crate) fn run(settings: &Settings) -> Result<Outcome, Failure> {
    fio::check()?;
    let made = !settings.path.exists();
    let beside = Beside::of(settings)?;
    let result = run_inner(settings, &beside);
    if !settings.keep {
        if beside.is_file {
            let _ = std::fs::remove_file(&beside.path);
        }
        if made {
            let _ = std::fs::remove_file(&settings.path);
        }
    }
    result
}

/// Where fio writes: a file beside ours, or the second half of the device that we have the first of.
struct Beside {
    path: PathBuf,
    offset: u64,
    is_file: bool,
}

impl Beside {
    fn of(settings: &Settings) -> Result<Self, Failure> {
        use std::io::{Seek, SeekFrom};
        use std::os::unix::fs::FileTypeExt;
        let path = &settings.path;
        let is_device =
            std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
        if !is_device {
            return Ok(Self {
                path: path.with_extension("fio"),
                offset: 0,
                is_file: true,
            });
        }
        let bytes = std::fs::File::open(path)
            .and_then(|mut file| file.seek(SeekFrom::End(0)))
            .map_err(|error| Failure::failed(format!("cannot open {}: {error}", path.display())))?;
        if bytes < settings.size.0 * 2 {
            return Err(Failure::failed(format!(
                "{} has {}: kvar takes --size ({}) of it and fio as much again; say a --size of at most half",
                path.display(),
                ByteSize(bytes),
                settings.size
            )));
        }
        Ok(Self {
            path: path.clone(),
            offset: settings.size.0,
            is_file: false,
        })
    }
}

fn run_inner(settings: &Settings, beside: &Beside) -> Result<Outcome, Failure> {
    let mut bench = Bench::open(settings)?;
    let steps = (settings.pairs * 4) as u64;
    bench.fill(settings.size.0)?;
    write_random(beside, settings.size.0)?;
    let progress = bar(steps, "pairs against fio");
    let mut idle = Vec::new();
    let job = |rw, block_bytes, depth| Job {
        rw,
        block_bytes,
        depth,
        seconds: settings.seconds,
    };
    let mut figures = Figures::default();
    let before = bench.engine.counters().clone();
    for pair in 0..settings.pairs {
        idle.push(idle_cpu());
        let write_fio = || {
            fio::run(
                &beside.path,
                beside.offset,
                settings.size.0,
                job("write", 1 << 20, 4),
            )
        };
        let (theirs, ours) = abba(pair, write_fio, || bench.append(settings.seconds))?;
        figures.append.push(ours.bytes_per_s / theirs.bytes_per_s);
        figures.append_rate.push(ours.bytes_per_s);
        figures.append_cpu.push(ours.cpu_us);
        figures.append_fio_rate.push(theirs.bytes_per_s);
        progress.inc(2);
    }
    let after = bench.engine.counters().clone();
    for pair in 0..settings.pairs {
        for depth in [16_u32, 1] {
            idle.push(idle_cpu());
            let read = job(RANDREAD, BLOCK_BYTES as u64, depth);
            let read_fio = || fio::run(&settings.path, 0, settings.size.0, read);
            let (theirs, ours) = abba(pair, read_fio, || {
                bench.read(depth as usize, settings.seconds)
            })?;
            progress.inc(1);
            figures.add_reads(depth, &ours, &theirs);
        }
    }
    progress.finish_and_clear();
    let written = |counters: &kvar_engine::Counters| {
        counters.block_write_bytes + counters.moved_write_bytes + counters.meta_write_bytes
    };
    let amplification = (written(&after) - written(&before)) as f64
        / (after.payload_written_bytes - before.payload_written_bytes).max(1) as f64;
    let corrupt = bench.engine.counters().corrupt;
    if corrupt > 0 {
        return Err(Failure::failed(format!(
            "{corrupt} blocks failed their check: the device or kvar is broken"
        )));
    }
    Ok(Outcome::new(figures.rows(amplification), &idle))
}

/// What the pairs gave, one value a pair.
#[derive(Default)]
struct Figures {
    append: Vec<f64>,
    append_rate: Vec<f64>,
    append_fio_rate: Vec<f64>,
    append_cpu: Vec<CpuUs>,
    qd16: Vec<f64>,
    qd16_rate: Vec<f64>,
    qd16_fio_rate: Vec<f64>,
    p50: Vec<f64>,
    cpu: Vec<CpuUs>,
    qd1: Vec<f64>,
    qd1_cpu: Vec<CpuUs>,
    qd1_p50: Vec<f64>,
    qd1_fio_p50: Vec<f64>,
}

impl Figures {
    fn add_reads(&mut self, depth: u32, ours: &Reads, theirs: &fio::FioResult) {
        let ratio = ours.bytes_per_s / theirs.bytes_per_s;
        if depth == 1 {
            self.qd1.push(ratio);
            self.qd1_cpu.push(ours.cpu_us);
            self.qd1_p50.push(ours.p50_us);
            self.qd1_fio_p50.push(theirs.p50_us);
            return;
        }
        self.qd16.push(ratio);
        self.qd16_rate.push(ours.bytes_per_s);
        self.qd16_fio_rate.push(theirs.bytes_per_s);
        self.p50.push(ours.p50_us / theirs.p50_us);
        self.cpu.push(ours.cpu_us);
    }

    fn rows(self, amplification: f64) -> Vec<Row> {
        let of = |cpu: &[CpuUs], part: fn(&CpuUs) -> f64| cpu.iter().map(part).collect();
        let cpu = [
            ("read_cpu_us", of(&self.cpu, |cpu| cpu.total), CPU_READ),
            ("read_cpu_user_us", of(&self.cpu, |cpu| cpu.user), CPU_USER),
            (
                "read_cpu_system_us",
                of(&self.cpu, |cpu| cpu.system),
                CPU_SYSTEM,
            ),
            (
                "read_qd1_cpu_us",
                of(&self.qd1_cpu, |cpu| cpu.total),
                "the same with one under way",
            ),
            (
                "append_cpu_us",
                of(&self.append_cpu, |cpu| cpu.total),
                "microseconds a 64 KiB put, copy and check included",
            ),
            (
                "append_cpu_user_us",
                of(&self.append_cpu, |cpu| cpu.user),
                CPU_USER,
            ),
            (
                "append_cpu_system_us",
                of(&self.append_cpu, |cpu| cpu.system),
                CPU_SYSTEM,
            ),
        ];
        let gigabytes = |rates: Vec<f64>| rates.into_iter().map(|rate| rate / 1e9).collect();
        let mut rows = vec![
            Row::of("read_64k_qd16_vs_fio", self.qd16, "every byte checked"),
            Row::of("read_64k_qd16_p50_vs_fio", self.p50, "lower is better"),
            Row::of("read_64k_qd1_vs_fio", self.qd1, ""),
            Row::of("append_vs_fio", self.append, "against 1 MiB writes"),
            Row::of(
                "write_amplification",
                vec![amplification],
                "checkpoints included",
            ),
            Row::of("read_64k_qd16_gb_per_s", gigabytes(self.qd16_rate), "ours"),
            Row::of(
                "fio_64k_qd16_gb_per_s",
                gigabytes(self.qd16_fio_rate),
                "fio",
            ),
            Row::of("read_64k_qd1_p50_us", self.qd1_p50, "ours, microseconds"),
            Row::of("fio_64k_qd1_p50_us", self.qd1_fio_p50, "fio, microseconds"),
            Row::of("append_gb_per_s", gigabytes(self.append_rate), "ours"),
            Row::of(
                "fio_append_gb_per_s",
                gigabytes(self.append_fio_rate),
                "fio",
            ),
        ];
        rows.extend(
            cpu.into_iter()
                .map(|(name, values, note)| Row::of(name, values, note)),
        );
        rows
    }
}

const CPU_READ: &str = "microseconds a 64 KiB read, check included";
const CPU_USER: &str = "of these in kvar";
const CPU_SYSTEM: &str = "of these in the kernel";
const RANDREAD: &str = "randread";

/// Random bytes, so that fio overwrites what is there instead of growing it.
fn write_random(beside: &Beside, bytes: u64) -> Result<(), Failure> {
    use std::io::{Seek, SeekFrom, Write};
    let failed = |error: std::io::Error| {
        Failure::failed(format!("cannot write {}: {error}", beside.path.display()))
    };
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(beside.is_file)
        .truncate(beside.is_file)
        .open(&beside.path)
        .map_err(failed)?;
    file.seek(SeekFrom::Start(beside.offset)).map_err(failed)?;
    let block = Random::new(77).bytes(1 << 20);
    let progress = bar(bytes >> 20, "MiB written beside for fio");
    for _ in 0..bytes >> 20 {
        file.write_all(&block).map_err(failed)?;
        progress.inc(1);
    }
    file.sync_all().map_err(failed)?;
    progress.finish_and_clear();
    Ok(())
}

impl Bench {
    fn open(settings: &Settings) -> Result<Self, Failure> {
        let wanted = Wanted {
            size: Some(settings.size.0),
            create: true,
        };
        let target = Target::open(&settings.path, wanted)
            .map_err(|error| Failure::failed(error.to_string()))?;
        let options = DeviceOptions {
            engine: settings.io_engine,
            ..DeviceOptions::default()
        };
        let opened = |error: kvar_io::DeviceError| {
            Failure::failed(format!("{}: {error}", settings.path.display()))
        };
        let memory = |error: std::io::Error| Failure::failed(format!("no memory: {error}"));
        let small = Arena::new(1 << 20).map_err(memory)?;
        let format_options =
            FormatOptions::random(1, BLOCK_BYTES as u64, SystemClock::default().unix_seconds());
        let (mut device, _) = open_device(&target, &small, options).map_err(opened)?;
        let (superblock, probe) = kvar_engine::format_probed(&mut *device, &small, &format_options)
            .map_err(|error| Failure::failed(format!("{}: {error}", settings.path.display())))?;
        drop(device);
        if let Some(probe) = probe {
            eprintln!(
                "writes under way: {}, found by trying ({}/s)",
                ByteSize(probe.in_flight_bytes),
                ByteSize(probe.bytes_per_s as u64)
            );
        }
        let config = EngineConfig {
            dram_bytes: DRAM_BYTES,
            // What is measured is the load alone.
            scrub_bytes_per_s: 0,
            ..EngineConfig::default()
        };
        let arena = Arena::new(kvar_engine::arena_bytes(&config, &superblock)).map_err(memory)?;
        let (device, notes) = open_device(&target, &arena, options).map_err(opened)?;
        for note in target.notes().iter().chain(&notes) {
            eprintln!("note: {note}");
        }
        let clock = SystemClock::default();
        let (engine, _) = Engine::open(device, arena, &superblock, 0, config, clock.now())
            .map_err(|error| Failure::failed(format!("{}: {error}", settings.path.display())))?;
        eprintln!(
            "{} on {} through {}",
            ByteSize(superblock.device_bytes),
            settings.path.display(),
            engine.io_engine()
        );
        let mut random = Random::new(0x9e37_79b9_7f4a_7c15);
        let pool = (0..POOL_BLOCKS)
            .map(|_| {
                let bytes = random.bytes(BLOCK_BYTES);
                let crc = crc64(&bytes);
                (bytes, crc)
            })
            .collect();
        Ok(Self {
            engine,
            clock,
            pool,
            next_block: 0,
            random,
        })
    }

    fn id(number: u64) -> BlockId {
        let mut bytes = [0xb5; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        BlockId::new(bytes)
    }

    fn sleep(&mut self) {
        self.engine.wait(NAP);
    }

    /// Puts one block as soon as there is room.
    fn put(&mut self) -> Result<(), Failure> {
        let id = Self::id(self.next_block);
        let (_, crc) = self.pool[self.next_block as usize % POOL_BLOCKS];
        let request = PutRequest {
            id,
            sections: vec![(
                BLOCK_BYTES as u32,
                ContentCheck::from_crc(crc, &id, 0, BLOCK_BYTES as u32),
            )],
            hints: PutHints {
                request: self.next_block + 1,
                ..PutHints::default()
            },
            durable: false,
            deadline: Moment(u64::MAX),
        };
        let started = self.clock.now();
        loop {
            let now = self.clock.now();
            match self.engine.put_begin(now, &request) {
                Ok(mut ticket) => {
                    ticket
                        .buffer_mut()
                        .copy_from_slice(&self.pool[self.next_block as usize % POOL_BLOCKS].0);
                    self.engine.put_commit(now, 0, ticket);
                    self.next_block += 1;
                    return Ok(());
                }
                Err(_) if now.since(started) < Duration::from_secs(30) => {
                    self.engine.turn_and_wait(now, NAP);
                    self.engine.events().for_each(drop);
                }
                Err(outcome) => {
                    let trouble = self.engine.status(now).device_trouble.unwrap_or_default();
                    return Err(Failure::failed(format!(
                        "a put was refused for 30 s: {} {trouble}",
                        outcome.word()
                    )));
                }
            }
        }
    }

    fn turn(&mut self) {
        let now = self.clock.now();
        self.engine.turn(now);
    }

    fn fill(&mut self, bytes: u64) -> Result<(), Failure> {
        let blocks = bytes / BLOCK_BYTES as u64;
        let progress = bar(blocks, "blocks filled");
        for number in 0..blocks {
            self.put()?;
            if number % 16 == 0 {
                self.turn();
                self.engine.events().for_each(drop);
                progress.set_position(number);
            }
        }
        self.drain()?;
        progress.finish_and_clear();
        Ok(())
    }

    /// Until everything is flushed.
    fn drain(&mut self) -> Result<(), Failure> {
        self.engine.flush(u64::MAX);
        let started = self.clock.now();
        loop {
            self.turn();
            if self.engine.events().any(|event| {
                matches!(
                    event,
                    Event::Done {
                        token: u64::MAX,
                        ..
                    }
                )
            }) {
                return Ok(());
            }
            if self.clock.now().since(started) > Duration::from_secs(60) {
                return Err(Failure::failed("the device did not flush within 60 s"));
            }
            self.sleep();
        }
    }

    fn read(&mut self, depth: usize, seconds: f64) -> Result<Reads, Failure> {
        self.drain()?;
        let mut latencies = latencies();
        // The youngest blocks are the ones that are there; the very oldest are about to go.
        let live = (self.engine.status(self.clock.now()).flash_blocks * 9 / 10).max(1);
        let flash_before = self.engine.counters().flash_hits;
        let (cpu, started) = (Cpu::of_thread(), self.clock.now());
        let end = started.after(Duration::from_secs_f64(seconds));
        let mut begun = vec![None; depth];
        let (mut done, mut tried) = (0_u64, 0_u64);
        loop {
            let now = self.clock.now();
            if now >= end {
                break;
            }
            for (token, slot) in begun.iter_mut().enumerate() {
                if slot.is_none() {
                    let number = self.next_block - 1 - self.random.number() % live;
                    let id = Self::id(number);
                    tried += 1;
                    *slot = Some(now);
                    let touch = Touch::default();
                    self.engine.get(
                        now,
                        token as u64,
                        GetRequest {
                            id,
                            sections: None,
                            deadline: Moment(u64::MAX),
                            touch,
                        },
                        ReadHints::default(),
                    );
                }
            }
            self.engine.turn_and_wait(now, NAP);
            let after = self.clock.now();
            for event in self.engine.events() {
                let Event::Get { token, outcome } = event else {
                    continue;
                };
                let Some(since) = begun[token as usize].take() else {
                    continue;
                };
                if outcome.is_ok() {
                    done += 1;
                    latencies.saturating_record(after.since(since).as_micros() as u64);
                }
            }
        }
        let elapsed = self.clock.now().since(started).as_secs_f64();
        let cpu_us = Cpu::of_thread().us_since(&cpu, done);
        // What is under way is heard out, uncounted.
        while begun.iter().any(Option::is_some) {
            self.turn();
            for event in self.engine.events() {
                if let Event::Get { token, .. } = event {
                    begun[token as usize] = None;
                }
            }
            self.sleep();
        }
        let from_flash = self.engine.counters().flash_hits - flash_before;
        if done == 0 || done * 10 < tried * 8 || from_flash * 100 < done * 97 {
            return Err(Failure::failed(format!(
                "this was no measurement of the device: {tried} reads, {done} hits, {from_flash} from the device"
            )));
        }
        Ok(Reads {
            bytes_per_s: done as f64 * BLOCK_BYTES as f64 / elapsed,
            p50_us: latencies.value_at_quantile(0.5) as f64,
            cpu_us,
        })
    }

    fn append(&mut self, seconds: f64) -> Result<Appends, Failure> {
        self.drain()?;
        let before = self.engine.counters().payload_written_bytes;
        let (cpu, first) = (Cpu::of_thread(), self.next_block);
        let started = self.clock.now();
        let end = started.after(Duration::from_secs_f64(seconds));
        while self.clock.now() < end {
            for _ in 0..16 {
                self.put()?;
            }
            self.turn();
            self.engine.events().for_each(drop);
        }
        // What memory still holds is not on the device: only what was written counts.
        let written = self.engine.counters().payload_written_bytes - before;
        Ok(Appends {
            bytes_per_s: written as f64 / self.clock.now().since(started).as_secs_f64(),
            cpu_us: Cpu::of_thread().us_since(&cpu, self.next_block - first),
        })
    }
}
