//! kvar: one shard on one file, driven by this thread.

use crate::measure::{Reads, Run, next_random};
use crate::{MEMORY_BYTES, Store, VALUE_BYTES, is_value, value};
use anyhow::{Context, Result, bail, ensure};
use kvar_base::{BlockId, Clock, ContentCheck, Moment, SystemClock};
use kvar_engine::{
    Engine, EngineConfig, Event, FormatOptions, GetRequest, PutHints, PutRequest, ReadHints, Touch,
};
use kvar_io::{Arena, DeviceOptions, Target, Wanted, open_device};
use std::path::Path;
use std::time::{Duration, Instant};

const NAP: Duration = Duration::from_millis(5);
/// Longest that a flush, or the last reads of a run, may take on a device that works.
const FLUSH_MAX: Duration = Duration::from_secs(60);

pub(crate) struct Kvar {
    engine: Engine,
    clock: SystemClock,
    random: u64,
}

fn id(number: u64) -> BlockId {
    let mut bytes = [0x6b; 32];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    BlockId::new(bytes)
}

impl Kvar {
    pub(crate) fn open(path: &Path, bytes: usize) -> Result<Self> {
        // Directories, footers and the segment that is always free take a few percent.
        let size = bytes as u64 / 10 * 11 + (64 << 20);
        let wanted = Wanted {
            size: Some(size),
            create: true,
        };
        let target = Target::open(path, wanted)?;
        let arena = Arena::new(1 << 20)?;
        let (mut device, _) = open_device(&target, &arena, DeviceOptions::default())?;
        let clock = SystemClock::default();
        let options = FormatOptions::random(1, VALUE_BYTES as u64, clock.unix_seconds());
        let (superblock, _) = kvar_engine::format_probed(&mut *device, &arena, &options)?;
        drop(device);
        let config = EngineConfig {
            dram_bytes: MEMORY_BYTES as u64,
            // What is measured are the reads alone.
            scrub_bytes_per_s: 0,
            ..EngineConfig::default()
        };
        let arena = Arena::new(kvar_engine::arena_bytes(&config, &superblock))?;
        let (device, _) = open_device(&target, &arena, DeviceOptions::default())?;
        let (engine, _) = Engine::open(device, arena, &superblock, 0, config, clock.now())?;
        let random = 0x1357_9bdf_0246_8ace;
        Ok(Self {
            engine,
            clock,
            random,
        })
    }
}

impl Store for Kvar {
    fn turn(&mut self) {
        self.engine.turn(self.clock.now());
        self.engine.events().for_each(drop);
    }

    fn fill(&mut self, values: u64) -> Result<()> {
        for number in 0..values {
            let bytes = value(number);
            let id = id(number);
            let request = PutRequest {
                id,
                sections: vec![(VALUE_BYTES as u32, ContentCheck::of(&bytes, &id, 0))],
                hints: PutHints::default(),
                durable: false,
                deadline: Moment(u64::MAX),
            };
            let started = Instant::now();
            loop {
                match self.engine.put_begin(self.clock.now(), &request) {
                    Ok(mut ticket) => {
                        ticket.buffer_mut().copy_from_slice(&bytes);
                        self.engine.put_commit(self.clock.now(), 0, ticket);
                        break;
                    }
                    Err(_) if started.elapsed() < Duration::from_secs(30) => {
                        self.engine.turn_and_wait(self.clock.now(), NAP);
                        self.engine.events().for_each(drop);
                    }
                    Err(outcome) => bail!("a put was refused for 30 s: {}", outcome.word()),
                }
            }
        }
        self.engine.flush(u64::MAX);
        let started = Instant::now();
        loop {
            self.engine.turn_and_wait(self.clock.now(), NAP);
            for event in self.engine.events() {
                if let Event::Done {
                    token: u64::MAX,
                    result,
                } = event
                {
                    return match result {
                        Ok(_) => Ok(()),
                        Err(reason) => bail!("the device did not flush: {reason}"),
                    };
                }
            }
            if started.elapsed() > FLUSH_MAX {
                bail!("the device did not flush within {FLUSH_MAX:?}");
            }
        }
    }

    fn read(&mut self, values: u64, depth: usize, seconds: f64) -> Result<Reads> {
        let mut run = Run::begin(seconds);
        let mut begun: Vec<Option<(u64, Instant)>> = vec![None; depth];
        loop {
            let is_over = Instant::now() >= run.end_at();
            if is_over && begun.iter().all(Option::is_none) {
                break;
            }
            for (token, slot) in begun.iter_mut().enumerate() {
                if slot.is_some() || is_over {
                    continue;
                }
                let number = next_random(&mut self.random) % values;
                *slot = Some((number, Instant::now()));
                let request = GetRequest {
                    id: id(number),
                    sections: None,
                    deadline: Moment(u64::MAX),
                    touch: Touch::default(),
                };
                let now = self.clock.now();
                self.engine
                    .get(now, token as u64, request, ReadHints::default());
            }
            ensure!(
                Instant::now() < run.end_at() + FLUSH_MAX,
                "reads were not answered for {FLUSH_MAX:?}"
            );
            self.engine.turn_and_wait(self.clock.now(), NAP);
            for event in self.engine.events() {
                let Event::Get { token, outcome } = event else {
                    continue;
                };
                let (number, since) = begun[token as usize]
                    .take()
                    .context("an answer nobody waits for")?;
                let is_right = outcome
                    .ok()
                    .map(|copy| is_value(copy.section(&copy.sections[0]), number));
                run.tally.count(since.elapsed(), is_right);
            }
        }
        Ok(run.finish())
    }
}
