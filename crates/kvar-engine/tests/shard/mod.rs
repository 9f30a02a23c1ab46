//! One shard over a simulated disk, driven by hand: a test says what is called when, and how much
//! time passes.
#![allow(dead_code, unreachable_pub, missing_docs)]

use kvar_base::{BlockId, ContentCheck, DeviceUuid, MissReason, Moment, PutOutcome};
use kvar_engine::{
    Counters, Demotion, Engine, EngineConfig, Event, FormatOptions, GetRequest, PutHints,
    PutRequest, ReadHints, RecoveryReport, ShardStatus, Superblock, Touch, arena_bytes, format,
    read_superblock,
};
use kvar_io::Arena;
use kvar_io::sim::{Image, SimDisk, SimOptions, Survival};
use std::ops::Range;
use std::time::Duration;

pub fn id(number: u64) -> BlockId {
    let mut bytes = [0x5a; 32];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    BlockId::new(bytes)
}

/// Bytes of one section of one block.
pub fn bytes(number: u64, section: usize, len: usize) -> Vec<u8> {
    let mut state = number << 20 ^ section as u64;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

/// Where the first section of a block lies on the disk.
pub fn place_of(image: &Image, number: u64, len: usize) -> u64 {
    let first = bytes(number, 0, len);
    let mut page = vec![0; 4096];
    (0..image.bytes() / 4096)
        .map(|page| page * 4096)
        .find(|offset| {
            image.read(*offset, &mut page);
            page == first[..4096]
        })
        .expect("the block is on the disk")
}

pub struct Shard {
    pub disk: SimDisk,
    pub engine: Engine,
    pub superblock: Superblock,
    pub config: EngineConfig,
    pub recovery: RecoveryReport,
    pub now: Moment,
    /// What reclaim offered to a tier below, if there is one.
    pub offers: Vec<(u64, Box<Demotion>)>,
    next_token: u64,
}

/// Nothing happens by itself: no scrub, and a clock that begins at second 1,000,000.
pub fn config() -> EngineConfig {
    EngineConfig {
        dram_bytes: 4 << 20,
        flush_after: Duration::from_millis(100),
        scrub_bytes_per_s: 0,
        unix_at_start_s: 1_000_000,
        ..EngineConfig::default()
    }
}

impl Shard {
    pub fn new(device_bytes: u64, config: EngineConfig) -> Self {
        let disk = SimDisk::new(device_bytes, SimOptions::default());
        let arena = Arena::new(1 << 20).unwrap();
        let options = FormatOptions {
            shards: 1,
            expected_block_bytes: 16 << 10,
            created_unix: 0,
            uuid: DeviceUuid::new([7; 16]),
            secret: [9; 16],
        };
        format(&mut disk.open(), &arena, &options).unwrap();
        Self::open(disk, config, Moment(1))
    }

    pub fn open(disk: SimDisk, config: EngineConfig, now: Moment) -> Self {
        let arena = Arena::new(1 << 20).unwrap();
        let superblock = read_superblock(&mut disk.open(), &arena)
            .unwrap()
            .expect("it is formatted");
        let arena = Arena::new(arena_bytes(&config, &superblock)).unwrap();
        let device = Box::new(disk.open());
        let (engine, recovery) =
            Engine::open(device, arena, &superblock, 0, config.clone(), now).unwrap();
        Self {
            disk,
            engine,
            superblock,
            config,
            recovery,
            now,
            offers: Vec::new(),
            next_token: 1,
        }
    }

    /// A power cut, and a start over what was flushed.
    pub fn restart(self) -> Self {
        let image = self.disk.crash(Survival::Flushed);
        self.restart_from(image)
    }

    pub fn restart_from(self, image: Image) -> Self {
        let Self {
            engine,
            config,
            now,
            ..
        } = self;
        drop(engine);
        let disk = SimDisk::with_image(image, SimOptions::default());
        Self::open(disk, config, now)
    }

    /// A stop in good order: everything flushed, and a checkpoint.
    pub fn shut_down(mut self) -> Self {
        self.engine.begin_shutdown(self.now);
        while self.engine.shutdown_report().is_none() {
            self.pass(Duration::from_millis(1));
        }
        assert!(self.engine.shutdown_report().unwrap().checkpointed);
        self.restart()
    }

    /// Time passes, in small steps; what is answered meanwhile is forgotten.
    pub fn pass(&mut self, time: Duration) {
        let end = self.now.after(time);
        while self.now < end {
            self.now = self.now.after(Duration::from_millis(5)).min(end);
            self.engine.turn(self.now);
            self.hear();
        }
    }

    /// Events but for offers, which are kept.
    pub fn hear(&mut self) -> Vec<Event> {
        let mut others = Vec::new();
        for event in self.engine.events() {
            match event {
                Event::Demote { token, block } => self.offers.push((token, block)),
                other => others.push(other),
            }
        }
        others
    }

    /// Time passes at once, without a turn.
    pub fn leap(&mut self, time: Duration) {
        self.now = self.now.after(time);
    }

    pub fn settle(&mut self) {
        for _ in 0..20_000 {
            self.pass(Duration::from_millis(5));
            let status = self.engine.status(self.now);
            if self.engine.in_flight() == 0 && status.unflushed_puts == 0 {
                return;
            }
        }
        panic!("it does not come to rest");
    }

    pub fn try_put(&mut self, number: u64, lengths: &[usize], hints: PutHints) -> PutOutcome {
        let id = id(number);
        let parts: Vec<Vec<u8>> = (0..)
            .zip(lengths)
            .map(|(section, len)| bytes(number, section, *len))
            .collect();
        let check = |(section, bytes): (u16, &Vec<u8>)| {
            (bytes.len() as u32, ContentCheck::of(bytes, &id, section))
        };
        let request = PutRequest {
            id,
            sections: (0..).zip(&parts).map(check).collect(),
            hints,
            durable: false,
            deadline: Moment(u64::MAX),
        };
        let mut ticket = match self.engine.put_begin(self.now, &request) {
            Ok(ticket) => ticket,
            Err(outcome) => return outcome,
        };
        for (section, bytes) in parts.iter().enumerate() {
            let range = ticket.section_range(section);
            ticket.buffer_mut()[range].copy_from_slice(bytes);
        }
        let token = self.token();
        self.engine.put_commit(self.now, token, ticket);
        self.hear()
            .into_iter()
            .find_map(|event| match event {
                Event::Put {
                    token: this,
                    outcome,
                } if this == token => Some(outcome),
                _ => None,
            })
            .expect("a put that is not durable is answered at once")
    }

    /// A put that must be stored, however long memory is full.
    pub fn put(&mut self, number: u64, lengths: &[usize], hints: PutHints) {
        for _ in 0..10_000 {
            match self.try_put(number, lengths, hints) {
                PutOutcome::Stored => return,
                PutOutcome::Refused(kvar_base::Refusal::Busy) => {
                    self.pass(Duration::from_millis(5));
                }
                outcome => panic!("{number}: {outcome:?}"),
            }
        }
        panic!("{number}: memory stays full");
    }

    pub fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    pub fn begin_get(&mut self, number: u64, sections: Option<Range<u16>>) -> u64 {
        let token = self.token();
        let request = GetRequest {
            id: id(number),
            sections,
            deadline: Moment(u64::MAX),
            touch: Touch::default(),
        };
        self.engine
            .get(self.now, token, request, ReadHints::default());
        token
    }

    /// Reads sections of a block; each that comes is compared with what was put.
    pub fn get(
        &mut self,
        number: u64,
        sections: Option<Range<u16>>,
    ) -> Result<Vec<u16>, MissReason> {
        let token = self.begin_get(number, sections);
        self.answer(number, token)
    }

    pub fn answer(&mut self, number: u64, wanted: u64) -> Result<Vec<u16>, MissReason> {
        for _ in 0..1000 {
            let found = self.hear().into_iter().find_map(|event| match event {
                Event::Get { token, outcome } if token == wanted => Some(outcome),
                _ => None,
            });
            if let Some(outcome) = found {
                let copy = outcome?;
                for section in &copy.sections {
                    let at = usize::from(section.index);
                    let expected = bytes(number, at, section.len as usize);
                    assert!(copy.section(section) == expected, "{number}, section {at}");
                }
                return Ok(copy.sections.iter().map(|section| section.index).collect());
            }
            self.now = self.now.after(Duration::from_micros(100));
            self.engine.turn(self.now);
        }
        panic!("{number}: a read was never answered");
    }

    pub fn is_there(&mut self, number: u64) -> bool {
        self.engine.lookup(self.now, &[id(number)], 0) == [true]
    }

    pub fn remove(&mut self, number: u64) {
        let token = self.token();
        self.engine.remove(token, &[id(number)]);
        self.settle();
    }

    pub fn counters(&self) -> Counters {
        self.engine.counters().clone()
    }

    pub fn status(&self) -> ShardStatus {
        self.engine.status(self.now)
    }

    /// Puts other blocks, and uses them so often that nothing is worth more, until what was in
    /// memory is not there any more.
    pub fn push_out_of_memory(&mut self, first: u64) {
        let blocks = self.config.dram_bytes / (16 << 10) + 8;
        for number in (1 << 40) * (first + 1)..(1 << 40) * (first + 1) + 4 * blocks {
            self.put(number, &[16 << 10], PutHints::default());
            (0..3).for_each(|_| assert!(self.is_there(number)));
        }
        self.settle();
    }
}
