//! Two shards, one above the other, and the caller between them.
#![allow(dead_code, unreachable_pub, missing_docs)]

use crate::shard::{Shard, config};
use kvar_engine::{Demoted, EngineConfig, Event, PutHints, Standing};
use std::collections::HashMap;
use std::time::Duration;

pub const LEN: usize = 16 << 10;
/// A device that holds some 850 blocks, and one that holds four times as many.
pub const SMALL: u64 = 16 << 20;
pub const LARGE: u64 = 64 << 20;
pub const STEP: Duration = Duration::from_millis(2);

pub fn small() -> EngineConfig {
    EngineConfig {
        dram_bytes: 2 << 20,
        ..config()
    }
}

pub struct Tiers {
    pub above: Shard,
    pub below: Shard,
    /// Tokens below, and whose they are above.
    under_way: HashMap<u64, u64>,
    next_token: u64,
    /// What the caller answers instead of asking the tier below.
    pub instead: Option<Demoted>,
    pub answers: Vec<Demoted>,
}

impl Tiers {
    pub fn new() -> Self {
        Self::of(small())
    }

    pub fn of(above: EngineConfig) -> Self {
        let mut tiers = Self {
            above: Shard::new(SMALL, above),
            below: Shard::new(LARGE, small()),
            under_way: HashMap::new(),
            next_token: 1 << 40,
            instead: None,
            answers: Vec::new(),
        };
        tiers.above.engine.set_standing(Standing::Above);
        tiers.below.engine.set_standing(Standing::Below);
        tiers
    }

    pub fn answer(&mut self, token: u64, outcome: Demoted) {
        self.answers.push(outcome);
        self.above.engine.demoted(self.above.now, token, outcome);
    }

    /// As [`answer`](Self::answer), to all that is on offer.
    pub fn answer_all(&mut self, outcome: Demoted) {
        for (token, _) in std::mem::take(&mut self.above.offers) {
            self.answer(token, outcome);
        }
    }

    /// Puts blocks until the first ones are offered, and leaves the offers lying; how many it put.
    pub fn put_until_offered(&mut self) -> u64 {
        for number in 0..2000 {
            if !self.above.offers.is_empty() {
                return number;
            }
            self.above.put(number, &[LEN], PutHints::default());
            self.above.pass(STEP);
        }
        panic!("nothing is offered: {:?}", self.above.counters());
    }

    /// A moment passes for both.
    pub fn step(&mut self) {
        self.above.pass(STEP);
        self.below.now = self.above.now;
        for (token, block) in std::mem::take(&mut self.above.offers) {
            if let Some(outcome) = self.instead {
                self.answer(token, outcome);
                continue;
            }
            self.next_token += 1;
            let taken = self
                .below
                .engine
                .take(self.below.now, self.next_token, &block);
            match taken {
                Ok(()) => drop(self.under_way.insert(self.next_token, token)),
                Err(outcome) => self.answer(token, outcome),
            }
        }
        self.below.engine.turn(self.below.now);
        for event in self.below.hear() {
            let (token, outcome) = match event {
                Event::Put { token, outcome } => match outcome {
                    kvar_base::PutOutcome::Stored => (token, Demoted::Stored),
                    _ => (token, Demoted::Failed),
                },
                Event::Done { token, result } => match result {
                    Ok(_) => (token, Demoted::Exists),
                    Err(_) => (token, Demoted::Failed),
                },
                _ => continue,
            };
            if let Some(above) = self.under_way.remove(&token) {
                self.answer(above, outcome);
            }
        }
    }

    pub fn put(&mut self, numbers: std::ops::Range<u64>) {
        for number in numbers {
            self.above.put(number, &[LEN], PutHints::default());
            self.step();
        }
    }

    pub fn rest(&mut self) {
        for _ in 0..200 {
            self.step();
        }
    }

    pub fn somewhere(&mut self, number: u64) -> bool {
        if self.above.is_there(number) {
            self.above.get(number, None).unwrap();
            return true;
        }
        self.below.now = self.below.now.max(self.above.now);
        let there = self.below.is_there(number);
        if there {
            self.below.get(number, None).unwrap();
            self.above.now = self.above.now.max(self.below.now);
        }
        there
    }
}
