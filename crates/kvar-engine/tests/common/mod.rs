//! A store over a simulated disk with an oracle beside it.
//!
//! Payloads are a function of (id, nonce of the put, section), so that bytes read can be told to be
//! exactly one complete put. The oracle knows, for every id, which puts a read may return: those
//! since the last acknowledged remove. A miss is always allowed here; tests that know that
//! nothing was evicted ask for hits.
#![allow(dead_code, unreachable_pub, missing_docs)]

use kvar_base::{BlockId, ContentCheck, MissReason, Moment, PutOutcome};
use kvar_engine::{
    Engine, EngineConfig, Event, FormatOptions, GetRequest, PutHints, PutRequest, ReadHints,
    RecoveryReport, Superblock, Touch, arena_bytes, format, read_superblock,
};
use kvar_io::Arena;
use kvar_io::sim::{Image, SimDisk, SimOptions};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// Small numbers that repeat by seed.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

pub fn id(number: u64) -> BlockId {
    let mut bytes = [0x5a; 32];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    BlockId::new(bytes)
}

/// The bytes of one section of one put; the nonce stands in front.
pub fn payload(number: u64, nonce: u64, section: usize, len: usize) -> Vec<u8> {
    let mut dice = Dice::new(number ^ nonce << 20 ^ (section as u64) << 50);
    let mut bytes: Vec<u8> = Vec::with_capacity(len + 8);
    bytes.extend_from_slice(&nonce.to_le_bytes());
    while bytes.len() < len {
        bytes.extend_from_slice(&dice.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The section lengths of a put: a function of id and nonce too.
pub fn lengths(number: u64, nonce: u64) -> Vec<usize> {
    let mut dice = Dice::new(number.wrapping_mul(31) ^ nonce);
    let sections = if dice.below(3) == 0 {
        1 + dice.below(5) as usize
    } else {
        1
    };
    (0..sections)
        .map(|_| match dice.below(4) {
            0 => 1 + dice.below(9000) as usize,
            1 => 4096,
            2 => 16384,
            _ => 8 + dice.below(40_000) as usize,
        })
        .collect()
}

pub struct Store {
    pub disk: SimDisk,
    pub engine: Engine,
    pub superblock: Superblock,
    pub now: Moment,
    pub config: EngineConfig,
    pub oracle: Oracle,
    pub recovery: RecoveryReport,
    next_token: u64,
    waiting: HashMap<u64, Waiting>,
}

enum Waiting {
    Get { number: u64 },
    Put,
    Remove { numbers: Vec<u64>, from: u64 },
    Purge { from: u64 },
    Flush { up_to: u64 },
}

/// What reads may return.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    /// Puts that may be visible, by id: (nonce, number of the put, flushed).
    pub allowed: BTreeMap<u64, Vec<Put>>,
    pub next_put: u64,
    pub hits: u64,
    pub misses: HashMap<MissReason, u64>,
}

#[derive(Clone, Copy, Debug)]
pub struct Put {
    pub nonce: u64,
    pub order: u64,
    pub flushed: bool,
    /// A crash came before it was flushed, or a remove is not answered: it may be there or not,
    /// and no later flush is about it.
    pub uncertain: bool,
}

pub fn config() -> EngineConfig {
    EngineConfig {
        dram_bytes: 2 << 20,
        flush_after: Duration::from_millis(100),
        shutdown_flush: Duration::from_secs(30),
        scrub_bytes_per_s: 0,
        ..EngineConfig::default()
    }
}

pub fn options() -> FormatOptions {
    FormatOptions {
        shards: 1,
        expected_block_bytes: 16 << 10,
        created_unix: 0,
        uuid: kvar_base::DeviceUuid::new([7; 16]),
        secret: [9; 16],
    }
}

impl Store {
    /// A new store.
    pub fn format(bytes: u64, sim: SimOptions, config: EngineConfig) -> Self {
        let disk = SimDisk::new(bytes, sim);
        let arena = Arena::new(1 << 20).unwrap();
        format(&mut disk.open(), &arena, &options()).unwrap();
        Self::open(disk, config, Oracle::default())
    }

    /// The store on this disk, with what is known of it.
    pub fn open(disk: SimDisk, config: EngineConfig, oracle: Oracle) -> Self {
        let arena = Arena::new(1 << 20).unwrap();
        let superblock = read_superblock(&mut disk.open(), &arena)
            .unwrap()
            .expect("it is formatted");
        let arena = Arena::new(arena_bytes(&config, &superblock)).unwrap();
        let now = Moment(1);
        let (engine, recovery) = Engine::open(
            Box::new(disk.open()),
            arena,
            &superblock,
            0,
            config.clone(),
            now,
        )
        .unwrap();
        Self {
            disk,
            engine,
            superblock,
            now,
            config,
            oracle,
            recovery,
            next_token: 1,
            waiting: HashMap::new(),
        }
    }

    /// Power cut or kill: the disk keeps `image`, the oracle what it knows.
    pub fn reopen(self, image: Image, sim: SimOptions) -> Self {
        let Self {
            engine,
            config,
            oracle,
            ..
        } = self;
        drop(engine);
        Self::open(SimDisk::with_image(image, sim), config, oracle)
    }

    fn token(&mut self, waiting: Waiting) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.waiting.insert(token, waiting);
        token
    }

    pub fn put(&mut self, number: u64, nonce: u64, durable: bool) -> Option<PutOutcome> {
        self.put_sections(number, nonce, &lengths(number, nonce), durable)
    }

    pub fn put_sections(
        &mut self,
        number: u64,
        nonce: u64,
        lengths: &[usize],
        durable: bool,
    ) -> Option<PutOutcome> {
        let id = id(number);
        let parts: Vec<Vec<u8>> = lengths
            .iter()
            .enumerate()
            .map(|(section, len)| payload(number, nonce, section, *len))
            .collect();
        let request = PutRequest {
            id,
            sections: parts
                .iter()
                .enumerate()
                .map(|(section, bytes)| {
                    (
                        bytes.len() as u32,
                        ContentCheck::of(bytes, &id, section as u16),
                    )
                })
                .collect(),
            hints: PutHints {
                request: number / 8 + 1,
                depth: (number % 8) as u32,
                ..PutHints::default()
            },
            durable,
            deadline: Moment(u64::MAX),
        };
        let mut ticket = match self.engine.put_begin(self.now, &request) {
            Ok(ticket) => ticket,
            Err(outcome) => return Some(outcome),
        };
        for (section, bytes) in parts.iter().enumerate() {
            let range = ticket.section_range(section);
            ticket.buffer_mut()[range].copy_from_slice(bytes);
        }
        let token = self.token(Waiting::Put);
        // From the commit on a read may see it, whether or not the put was answered yet.
        let order = self.oracle.next_put;
        self.oracle.next_put += 1;
        self.oracle.allowed.entry(number).or_default().push(Put {
            nonce,
            order,
            flushed: false,
            uncertain: false,
        });
        self.engine.put_commit(self.now, token, ticket);
        None
    }

    pub fn get(&mut self, number: u64) -> u64 {
        let token = self.token(Waiting::Get { number });
        let request = GetRequest {
            id: id(number),
            sections: None,
            deadline: Moment(u64::MAX),
            touch: Touch {
                request: number / 8 + 1,
                depth: (number % 8) as u32,
            },
        };
        self.engine
            .get(self.now, token, request, ReadHints::default());
        token
    }

    pub fn remove(&mut self, numbers: &[u64]) {
        let from = self.oracle.next_put;
        let token = self.token(Waiting::Remove {
            numbers: numbers.to_vec(),
            from,
        });
        let ids: Vec<_> = numbers.iter().map(|number| id(*number)).collect();
        for number in numbers {
            self.oracle.unsettle(*number);
        }
        self.engine.remove(token, &ids);
    }

    pub fn purge(&mut self) {
        let from = self.oracle.next_put;
        let token = self.token(Waiting::Purge { from });
        let known: Vec<u64> = self.oracle.allowed.keys().copied().collect();
        for number in known {
            self.oracle.unsettle(number);
        }
        self.engine.purge(token, None);
    }

    pub fn flush(&mut self) {
        let up_to = self.oracle.next_put;
        let token = self.token(Waiting::Flush { up_to });
        self.engine.flush(token);
    }

    /// Lets time pass and hears answers; every one is judged.
    pub fn turn(&mut self, time: Duration) {
        self.now = self.now.after(time);
        self.engine.turn(self.now);
        let events: Vec<Event> = self.engine.events().collect();
        for event in events {
            self.judge(event);
        }
    }

    pub fn settle(&mut self) {
        for _ in 0..20_000 {
            self.turn(Duration::from_millis(5));
            if self.waiting.is_empty()
                && self.engine.in_flight() == 0
                && self.engine.status(self.now).unflushed_puts == 0
            {
                return;
            }
        }
        panic!(
            "the store does not come to rest: {} calls wait; {:?}",
            self.waiting.len(),
            self.engine.status(self.now)
        );
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Runs until a call is answered.
    pub fn outcome_of_get(&mut self, number: u64) -> Result<Vec<u8>, MissReason> {
        let token = self.get(number);
        for _ in 0..1000 {
            self.now = self.now.after(Duration::from_millis(1));
            self.engine.turn(self.now);
            let events: Vec<Event> = self.engine.events().collect();
            let mut found = None;
            for event in events {
                if let Event::Get {
                    token: this,
                    outcome,
                } = &event
                    && *this == token
                {
                    found = Some(outcome.as_ref().map_err(|reason| *reason).map(|copy| {
                        copy.sections
                            .iter()
                            .flat_map(|section| copy.section(section).to_vec())
                            .collect()
                    }));
                }
                self.judge(event);
            }
            if let Some(found) = found {
                return found;
            }
        }
        panic!("a read was never answered");
    }

    fn judge(&mut self, event: Event) {
        match event {
            Event::Get { token, outcome } => {
                let Some(Waiting::Get { number }) = self.waiting.remove(&token) else {
                    panic!("answer without a call")
                };
                match outcome {
                    Ok(copy) => {
                        self.oracle.hits += 1;
                        let sections: Vec<&[u8]> = copy
                            .sections
                            .iter()
                            .map(|section| copy.section(section))
                            .collect();
                        self.oracle.judge_read(number, &sections);
                    }
                    Err(reason) => *self.oracle.misses.entry(reason).or_default() += 1,
                }
            }
            Event::Put { token, .. } => {
                // A put that was refused late (the device failed) may be visible all the same, so
                // the oracle keeps it whatever the outcome.
                let known = self.waiting.remove(&token);
                assert!(matches!(known, Some(Waiting::Put)), "answer without a call");
            }
            Event::Done { token, result } => {
                match self.waiting.remove(&token).expect("answer without a call") {
                    Waiting::Remove { numbers, from } => {
                        if result.is_ok() {
                            for number in numbers {
                                if let Some(puts) = self.oracle.allowed.get_mut(&number) {
                                    puts.retain(|put| put.order >= from);
                                }
                            }
                        }
                    }
                    Waiting::Purge { from } => {
                        if result.is_ok() {
                            for puts in self.oracle.allowed.values_mut() {
                                puts.retain(|put| put.order >= from);
                            }
                        }
                    }
                    Waiting::Flush { up_to } => {
                        if result.is_ok() {
                            for put in self.oracle.allowed.values_mut().flatten() {
                                put.flushed |= put.order < up_to && !put.uncertain;
                            }
                        }
                    }
                    Waiting::Get { .. } | Waiting::Put => {
                        panic!("an answer of another kind")
                    }
                }
            }
            Event::Demote { .. } => panic!("nobody told this store of a tier below"),
            Event::Awaited { .. } => panic!("nobody waits for a put"),
        }
    }

    /// After a crash nothing that was under way is answered any more.
    pub fn forget_calls(&mut self) {
        self.waiting.clear();
        for put in self.oracle.allowed.values_mut().flatten() {
            put.uncertain |= !put.flushed;
        }
    }
}

impl Oracle {
    /// A remove was asked for: until its answer the block may be there or not.
    fn unsettle(&mut self, number: u64) {
        for put in self.allowed.entry(number).or_default() {
            (put.flushed, put.uncertain) = (false, true);
        }
    }

    pub fn judge_read(&self, number: u64, sections: &[&[u8]]) {
        let puts = self.allowed.get(&number).map_or(&[][..], Vec::as_slice);
        let fits = puts.iter().any(|put| {
            let lengths = lengths(number, put.nonce);
            lengths.len() == sections.len()
                && sections.iter().enumerate().all(|(section, bytes)| {
                    **bytes == payload(number, put.nonce, section, lengths[section])[..]
                })
        });
        assert!(
            fits,
            "block {number}: the bytes read are of no put that may be seen ({puts:?})"
        );
    }
}
