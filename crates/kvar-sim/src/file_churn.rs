//! The same life on a real file, through the real device: written over many times, every byte read
//! back compared, memory and throughput compared between the second and the last time.
//!
//! ```text
//!   dice ──> put, get, remove, time to live ──> Engine ──> io_uring (or threads) ──> file
//!                       │                          │
//!                     slots: which put is there, until when; bytes are a function of block and put
//! ```
//!
//! What must always be true: a hit is the put that was there when it was asked for, or a later one;
//! nothing removed, expired, or of an older format is ever a hit.
//!
//! Left to others: power cuts and faults (the simulated disk has them), kill -9 (`scripts/kill-loop.py`).

use crate::dice::Dice;
use crate::payload;
use kvar_base::{BlockId, Clock, ContentCheck, Moment, PutOutcome, SystemClock};
use kvar_engine::{
    Copy, Engine, EngineConfig, Event, FormatOptions, GetRequest, PutHints, PutRequest, ReadHints,
    Superblock, Touch, arena_bytes, format,
};
use kvar_io::{Arena, DeviceOptions, Target, Wanted, open_device};
use serde::Serialize;
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// Memory of the store: an eighth of the smallest device that makes sense here.
const DRAM_BYTES: u64 = 32 << 20;
const BLOCK_BYTES_MIN: u64 = 2_000;
const BLOCK_BYTES_MAX: u64 = 120_000;
/// Reads under way at most.
const READS_MAX: usize = 16;
/// Blocks there are for every one that fits.
const BLOCKS_A_PLACE: u64 = 3;
/// How long the store may take to answer everything before that is an error.
const PATIENCE: Duration = Duration::from_secs(60);
/// By how much memory of the process may grow after the second turnover: what the allocator keeps.
const GROWTH_BYTES_MAX: u64 = 24 << 20;

/// What a churn on a file found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FileChurn {
    /// How the file was read and written.
    pub io_engine: String,
    /// Size of the file.
    pub file_bytes: u64,
    /// How often it was written over.
    pub turnovers: u64,
    /// Reads that were answered with bytes.
    pub hits: u64,
    /// Reads that were not.
    pub misses: u64,
    /// Of these, because a time to live had passed.
    pub expired: u64,
    /// Puts taken.
    pub puts: u64,
    /// Blocks removed.
    pub removes: u64,
    /// Blocks verified in the background.
    pub scrubbed: u64,
    /// Times the store was closed and opened again.
    pub restarts: u64,
    /// Times the file was formatted again, as a new device.
    pub replaced: u64,
    /// Reads that found other bytes than those that were put.
    pub wrong_bytes: u64,
    /// Reads that found what was removed, had expired, or lay on another device.
    pub back_again: u64,
    /// Payload written a second, for each turnover, in MB.
    pub mb_per_s: Vec<f64>,
    /// Last turnover over the second.
    pub throughput_ratio: f64,
    /// Memory of the process after the second turnover.
    pub rss_bytes_second: u64,
    /// Memory of the process after the last turnover.
    pub rss_bytes_end: u64,
    /// What went wrong, in words; empty if nothing did.
    pub failures: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    nonce: u64,
    len: u32,
    there: bool,
    expires_unix_s: u64,
}

struct Reading {
    number: usize,
    nonce: u64,
    len: u32,
    allowed: bool,
}

struct Churn<'a> {
    target: &'a Target,
    clock: SystemClock,
    superblock: Superblock,
    config: EngineConfig,
    engine: Option<Engine>,
    slots: Vec<Slot>,
    reading: HashMap<u64, Reading>,
    removing: usize,
    next: u64,
    dice: Dice,
    found: FileChurn,
}

type Step<T = ()> = Result<T, String>;

/// Writes a file over `turnovers` times. The file is created or overwritten, whatever it holds.
///
/// # Errors
/// When the file cannot be used, or the store does not answer.
pub fn churn_file(
    path: &Path,
    file_bytes: u64,
    turnovers: u64,
    seed: u64,
    mut progress: impl FnMut(u64, f64),
) -> Step<FileChurn> {
    let wanted = Wanted {
        size: Some(file_bytes),
        create: true,
    };
    let target = Target::open(path, wanted).map_err(|error| error.to_string())?;
    let clock = SystemClock::default();
    let superblock = format_target(&target, &clock)?;
    let blocks = file_bytes / ((BLOCK_BYTES_MIN + BLOCK_BYTES_MAX) / 2) * BLOCKS_A_PLACE;
    let empty = Slot {
        nonce: 0,
        len: 0,
        there: false,
        expires_unix_s: 0,
    };
    let mut churn = Churn {
        target: &target,
        superblock,
        config: EngineConfig {
            dram_bytes: DRAM_BYTES,
            scrub_bytes_per_s: 64 << 20,
            unix_at_start_s: clock.unix_seconds(),
            flush_after: Duration::from_millis(200),
            ..EngineConfig::default()
        },
        clock,
        engine: None,
        slots: vec![empty; blocks as usize],
        reading: HashMap::new(),
        removing: 0,
        next: 1,
        dice: Dice::new(seed),
        found: FileChurn {
            file_bytes,
            turnovers,
            ..FileChurn::default()
        },
    };
    churn.open()?;
    for turnover in 0..turnovers {
        let (began, put_bytes) = (Instant::now(), churn.turn_over()?);
        let mb_per_s = put_bytes as f64 / 1e6 / began.elapsed().as_secs_f64();
        churn.found.mb_per_s.push((mb_per_s * 10.0).round() / 10.0);
        progress(turnover + 1, mb_per_s);
        // Before the store is closed, every time: its memory is what counts.
        churn.found.rss_bytes_end = rss_bytes();
        if turnover == 1 {
            churn.found.rss_bytes_second = churn.found.rss_bytes_end;
        }
        churn.end_life(turnover)?;
    }
    churn.read_all()?;
    Ok(churn.judge())
}

fn format_target(target: &Target, clock: &SystemClock) -> Step<Superblock> {
    let arena = Arena::new(1 << 20).map_err(|error| format!("no memory: {error}"))?;
    let average = (BLOCK_BYTES_MIN + BLOCK_BYTES_MAX) / 2;
    let options = FormatOptions::random(1, average, clock.unix_seconds());
    let (mut device, _) = open_device(target, &arena, DeviceOptions::default())
        .map_err(|error| format!("{}: {error}", target.path().display()))?;
    format(&mut *device, &arena, &options)
        .map_err(|error| format!("{}: {error}", target.path().display()))
}

/// Memory of this process.
fn rss_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

impl Churn<'_> {
    fn open(&mut self) -> Step {
        let arena = Arena::new(arena_bytes(&self.config, &self.superblock))
            .map_err(|error| format!("no memory: {error}"))?;
        let fails = |error: &dyn std::fmt::Display| format!("the store does not open: {error}");
        let (device, _) = open_device(self.target, &arena, DeviceOptions::default())
            .map_err(|error| fails(&error))?;
        let now = self.clock.now();
        let config = self.config.clone();
        let (engine, _) = Engine::open(device, arena, &self.superblock, 0, config, now)
            .map_err(|error| fails(&error))?;
        self.found.io_engine = engine.io_engine().to_owned();
        self.engine = Some(engine);
        Ok(())
    }

    fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().expect("it is open between lives")
    }

    fn id(number: usize) -> BlockId {
        payload::id(0, number as u64)
    }

    fn is_over(&self, slot: &Slot, now: Moment) -> bool {
        slot.expires_unix_s != 0
            && slot.expires_unix_s <= self.config.unix_at_start_s + now.0 / 1_000_000
    }

    /// Calls until as much was written as the file is large; payload bytes that were put.
    fn turn_over(&mut self) -> Step<u64> {
        let put_before = self.engine().counters().put_bytes;
        let written = |engine: &Engine| {
            let counters = engine.counters();
            counters.block_write_bytes + counters.moved_write_bytes + counters.meta_write_bytes
        };
        let wanted = written(self.engine()) + self.found.file_bytes;
        while written(self.engine()) < wanted {
            let number = self.dice.below(self.slots.len() as u64) as usize;
            match self.dice.below(100) {
                0..60 => self.put(number)?,
                60..97 => {
                    // Mostly of what some writer put lately.
                    let hot = self.dice.below(self.slots.len() as u64 / 8) as usize;
                    let number = if self.dice.once_in(2) { hot } else { number };
                    self.get(number)?;
                }
                _ => self.remove(number)?,
            }
            self.turn()?;
        }
        Ok(self.engine().counters().put_bytes - put_before)
    }

    fn put(&mut self, number: usize) -> Step {
        let nonce = self.next;
        self.next += 1;
        let len = self.dice.between(BLOCK_BYTES_MIN, BLOCK_BYTES_MAX) as u32;
        let ttl_s = self
            .dice
            .once_in(10)
            .then(|| self.dice.between(1, 20) as u32);
        let bytes = payload::section(number as u64, nonce, 0, len);
        let id = Self::id(number);
        let request = PutRequest {
            id,
            sections: vec![(len, ContentCheck::of(&bytes, &id, 0))],
            hints: PutHints {
                ttl_s,
                ..PutHints::default()
            },
            durable: false,
            deadline: Moment(u64::MAX),
        };
        let began = Instant::now();
        loop {
            let now = self.clock.now();
            match self.engine().put_begin(now, &request) {
                Ok(mut ticket) => {
                    let range = ticket.section_range(0);
                    ticket.buffer_mut()[range].copy_from_slice(&bytes);
                    let token = self.next;
                    self.next += 1;
                    let begun = self.config.unix_at_start_s + now.0.div_ceil(1_000_000);
                    self.slots[number] = Slot {
                        nonce,
                        len,
                        there: true,
                        expires_unix_s: ttl_s.map_or(0, |ttl_s| begun + u64::from(ttl_s)),
                    };
                    self.found.puts += 1;
                    self.engine().put_commit(now, token, ticket);
                    return self.hear();
                }
                Err(PutOutcome::Exists) => {
                    let slot = self.slots[number];
                    if !slot.there || self.is_over(&slot, now) {
                        self.found.back_again += 1;
                    }
                    return Ok(());
                }
                // Memory is full of what waits to be written.
                Err(_) if began.elapsed() < PATIENCE => {
                    self.engine().wait(Duration::from_millis(2));
                    self.turn()?;
                }
                Err(outcome) => {
                    return Err(format!("puts are turned away for a minute: {outcome:?}"));
                }
            }
        }
    }

    fn get(&mut self, number: usize) -> Step {
        let began = Instant::now();
        while self.reading.len() >= READS_MAX {
            self.engine().wait(Duration::from_millis(2));
            self.turn()?;
            if began.elapsed() > PATIENCE {
                return Err("reads are not answered for a minute".into());
            }
        }
        let (now, token) = (self.clock.now(), self.next);
        self.next += 1;
        let slot = self.slots[number];
        let reading = Reading {
            number,
            nonce: slot.nonce,
            len: slot.len,
            allowed: slot.there && !self.is_over(&slot, now),
        };
        self.reading.insert(token, reading);
        let request = GetRequest {
            id: Self::id(number),
            sections: None,
            deadline: Moment(u64::MAX),
            touch: Touch::default(),
        };
        self.engine().get(now, token, request, ReadHints::default());
        self.hear()
    }

    fn remove(&mut self, number: usize) -> Step {
        let token = self.next;
        self.next += 1;
        self.slots[number].there = false;
        self.removing += 1;
        self.found.removes += 1;
        self.engine().remove(token, &[Self::id(number)]);
        self.hear()
    }

    fn turn(&mut self) -> Step {
        let now = self.clock.now();
        self.engine().turn(now);
        self.hear()
    }

    fn hear(&mut self) -> Step {
        let events: Vec<Event> = self.engine().events().collect();
        for event in events {
            match event {
                Event::Get { token, outcome } => {
                    let Some(reading) = self.reading.remove(&token) else {
                        return Err(format!("an answer to read {token}, which waits for none"));
                    };
                    match outcome {
                        Ok(copy) => self.compare(&reading, &copy),
                        Err(reason) => {
                            self.found.misses += 1;
                            self.found.expired +=
                                u64::from(reason == kvar_base::MissReason::Expired);
                        }
                    }
                }
                Event::Put { outcome, .. } if outcome != PutOutcome::Stored => {
                    return Err(format!("a put that was welcome ended as {outcome:?}"));
                }
                Event::Put { .. } => {}
                Event::Demote { token, .. } => {
                    return Err(format!("an offer, {token}, and there is nobody below"));
                }
                Event::Awaited { token } => {
                    return Err(format!("{token} need not wait, and nobody does"));
                }
                Event::Done { result, .. } => {
                    self.removing -= 1;
                    result.map_err(|error| format!("a remove failed: {error}"))?;
                }
            }
        }
        Ok(())
    }

    fn compare(&mut self, reading: &Reading, copy: &Copy) {
        self.found.hits += 1;
        let slot = self.slots[reading.number];
        let bytes = copy.section(&copy.sections[0]);
        let is_put = |nonce: u64, len: u32| {
            bytes.len() == len as usize
                && nonce != 0
                && payload::section(reading.number as u64, nonce, 0, len) == bytes
        };
        let now_there = slot.nonce != reading.nonce && is_put(slot.nonce, slot.len);
        let asked_for = is_put(reading.nonce, reading.len);
        if !now_there && !asked_for {
            self.found.wrong_bytes += 1;
        } else if !now_there && !reading.allowed {
            self.found.back_again += 1;
        }
    }

    /// Everything is answered.
    fn settle(&mut self) -> Step {
        let began = Instant::now();
        while !self.reading.is_empty() || self.removing > 0 {
            self.engine().wait(Duration::from_millis(2));
            self.turn()?;
            if began.elapsed() > PATIENCE {
                return Err("calls are not answered for a minute".into());
            }
        }
        Ok(())
    }

    /// The end of the process, clean or not; once in a churn the file becomes another device.
    fn end_life(&mut self, turnover: u64) -> Step {
        self.settle()?;
        self.found.scrubbed += self.engine().counters().scrub_blocks;
        if turnover.is_multiple_of(2) {
            let now = self.clock.now();
            self.engine().begin_shutdown(now);
            let began = Instant::now();
            while self.engine().shutdown_report().is_none() {
                self.engine().wait(Duration::from_millis(2));
                self.turn()?;
                if began.elapsed() > PATIENCE {
                    return Err("the shutdown does not end".into());
                }
            }
        }
        self.engine = None;
        self.found.restarts += 1;
        if turnover == self.found.turnovers / 2 {
            self.superblock = format_target(self.target, &self.clock)?;
            self.slots.iter_mut().for_each(|slot| slot.there = false);
            self.found.replaced += 1;
        }
        self.open()?;
        // Idle for a moment, which the scrub takes.
        let until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < until {
            self.engine().wait(Duration::from_millis(5));
            self.turn()?;
        }
        Ok(())
    }

    fn read_all(&mut self) -> Step {
        for number in 0..self.slots.len() {
            self.get(number)?;
            self.turn()?;
        }
        self.settle()
    }

    fn judge(self) -> FileChurn {
        let mut found = self.found;
        if let (Some(second), Some(last)) = (found.mb_per_s.get(1), found.mb_per_s.last()) {
            found.throughput_ratio = (last / second * 1000.0).round() / 1000.0;
        }
        if found.wrong_bytes > 0 {
            let wrong = found.wrong_bytes;
            found
                .failures
                .push(format!("{wrong} reads found wrong bytes"));
        }
        if found.back_again > 0 {
            let back = found.back_again;
            found
                .failures
                .push(format!("{back} blocks were there that must not be"));
        }
        if found.hits == 0 {
            found.failures.push("nothing was ever a hit".into());
        }
        if found.rss_bytes_end > found.rss_bytes_second + GROWTH_BYTES_MAX && found.turnovers > 2 {
            found.failures.push(format!(
                "the process grew from {} to {} bytes",
                found.rss_bytes_second, found.rss_bytes_end
            ));
        }
        found
    }
}
