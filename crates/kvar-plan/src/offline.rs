//! Offline replay: hit rate against capacity, with the production policy and no node.
//!
//! ```text
//!   for each request of the trace, in order
//!     look up the ids its input covers, up to the first that is missing    -> hits
//!     put the rest of its ids                                              -> writes
//! ```
//!
//! [`Model::Blocks`] asks what the order of eviction is worth by itself: one
//! [`TailFirstLru`] over blocks of equal size, all of a request's blocks going in at its arrival.
//! [`Model::Engine`] asks what a node would do: see the engine model's own story.
//!
//! What must always be true: the same trace and options give the same report; hits and token
//! hits never exceed the ceiling of the pure model with unlimited room.

use crate::engine_model::{EngineModel, FlashShape};
use crate::learned_model::{LearnedModel, TwoTiers};
use crate::optimum::Optimum;
use crate::trace::Trace;
use kvar_policy::{RecentlyUsed, ReclaimPolicy, TailFirstLru};
use serde::Serialize;
use std::collections::HashMap;
use std::ops::Range;
use std::str::FromStr;

/// Which store is replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// The pure policy over unit blocks: the anchor.
    Blocks,
    /// DRAM tier, segments, reserve and rewriting, as the engine does.
    Engine,
}

/// Who decides what stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// What a node runs: for unit blocks LRU with tails first, for the engine worth learned from
    /// what comes back.
    #[default]
    Production,
    /// The engine with LRU with tails first in DRAM and what was used recently on flash: what worth
    /// is measured against.
    Recent,
    /// Who knows the future (unit blocks): the bound of all policies.
    Optimum,
}

/// When a block is written to flash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Admit {
    /// At its put: what a node does while its write budget has room.
    All,
    /// When it leaves memory, if it is worth a place then: while the budget is short.
    #[default]
    ByWorth,
}

/// A capacity to test: a number of blocks, or a share of the trace's distinct blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Capacity {
    /// So many blocks.
    Blocks(u64),
    /// So many per cent of the distinct blocks, rounded down, at least one block.
    Percent(f64),
}

/// A text that is no capacity.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is not a capacity: write a number of blocks of at least 1, such as 9139, or a share of \
     the distinct blocks above 0%, such as 5%"
)]
pub struct CapacityError(String);

impl FromStr for Capacity {
    type Err = CapacityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || CapacityError(text.to_owned());
        let capacity = match text.trim().strip_suffix('%') {
            Some(percent) => Self::Percent(percent.trim().parse().map_err(|_| wrong())?),
            None => Self::Blocks(text.trim().replace('_', "").parse().map_err(|_| wrong())?),
        };
        if capacity.is_valid() {
            Ok(capacity)
        } else {
            Err(wrong())
        }
    }
}

impl Capacity {
    /// More than the whole is allowed (and is like the whole), but not without bound.
    fn is_valid(self) -> bool {
        match self {
            Self::Blocks(blocks) => blocks > 0,
            Self::Percent(percent) => percent > 0.0 && percent <= 1e6,
        }
    }

    /// In blocks, of a trace with so many distinct ones.
    #[must_use]
    pub fn blocks(self, distinct_blocks: u64) -> u64 {
        match self {
            Self::Blocks(blocks) => blocks,
            // The tiny addend keeps 29 % of 100 from becoming 28.
            Self::Percent(percent) => {
                ((percent * distinct_blocks as f64 / 100.0 + 1e-9) as u64).max(1)
            }
        }
    }
}

/// What to replay.
#[derive(Clone, Debug)]
pub struct OfflineOptions {
    /// Which store.
    pub model: Model,
    /// One row of the report each.
    pub capacities: Vec<Capacity>,
    /// Engine model: DRAM as a share (0..=1) of the distinct blocks; never more than half of
    /// the capacity under test.
    pub dram_share: f64,
    /// Engine model: bytes of a block, padding included.
    pub block_bytes: u64,
    /// Who decides.
    pub policy: Policy,
    /// Engine model, production: when a block is written.
    pub admit: Admit,
    /// The share (0 to below 1) of the requests that warm the store up and are not counted.
    pub warmup_share: f64,
    /// Engine model, production: big tiers to test below each capacity, flash of their own; none: one
    /// tier. A row each.
    pub big: Vec<Capacity>,
}

impl Default for OfflineOptions {
    fn default() -> Self {
        Self {
            model: Model::Blocks,
            capacities: [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
                .map(Capacity::Percent)
                .to_vec(),
            // A node has some fifty times as much flash as DRAM.
            dram_share: 0.02,
            block_bytes: 64 << 10,
            policy: Policy::default(),
            admit: Admit::default(),
            warmup_share: 0.0,
            big: Vec::new(),
        }
    }
}

/// Options that cannot be replayed.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum OfflineError {
    /// Zero, negative or not a number.
    #[error("a capacity of {0:?} holds no block: give at least 1 block or more than 0%")]
    Capacity(Capacity),
    /// Not a share.
    #[error("the DRAM share {0} must lie between 0 and 1")]
    DramShare(f64),
    /// Zero, or larger than the largest block.
    #[error("a block of {0} bytes does not fit a segment: give 1 byte to {max} bytes", max = FlashShape::BLOCK_BYTES_MAX)]
    BlockBytes(u64),
    /// Not a share that leaves something to count.
    #[error("the warm-up share {0} must lie between 0 and 1, and below 1")]
    WarmupShare(f64),
    /// A policy that this model cannot run.
    #[error(
        "the policy {policy} is for --model {model}: the optimum is a bound for unit blocks, and \
         recent is for flash"
    )]
    PolicyModel {
        /// As the command line spells it.
        policy: &'static str,
        /// The model it is for.
        model: &'static str,
    },
    /// A big tier where there is no engine, or not its policy.
    #[error(
        "a big tier is for --model engine and its own policy: add --model engine, and leave --policy out"
    )]
    BigModel,
    /// Too small to be a ring of segments.
    #[error(
        "a big tier of {blocks} blocks of {block_bytes} bytes has no room for two segments: give at \
         least {min} blocks"
    )]
    BigTooSmall {
        /// What was given.
        blocks: u64,
        /// Bytes of each.
        block_bytes: u64,
        /// What would do.
        min: u64,
    },
    /// None, or more than a store has tenants.
    #[error("{0} traces cannot share a store: give 1 to {max}", max = kvar_policy::TENANTS)]
    Traces(usize),
    /// More blocks than the model numbers.
    #[error("the trace names more than {max} blocks: replay a part of it", max = u32::MAX)]
    TooManyBlocks,
}

/// What one capacity reaches.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OfflineRow {
    /// Blocks the store could hold (the fast tier, and all memory, where there is a big one).
    pub capacity_blocks: u64,
    /// The same as a share of the distinct blocks.
    pub capacity_share: f64,
    /// Hits per block looked up.
    pub block_hit_rate: f64,
    /// Tokens saved per input token.
    pub token_hit_rate: f64,
    /// Blocks written to flash (of the fast tier), rewritten ones included (for unit blocks: blocks
    /// put in).
    pub flash_write_blocks: u64,
    /// Blocks written per block put in; 1 for unit blocks.
    pub write_amplification: f64,
    /// What the big tier has in this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub big: Option<BigRow>,
}

/// What a big tier brings to a row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BigRow {
    /// Blocks that its flash could hold, beside the row's `capacity_blocks`.
    pub capacity_blocks: u64,
    /// The same as a share of the distinct blocks.
    pub capacity_share: f64,
    /// Hits per block looked up that the fast tier had.
    pub fast_block_hit_rate: f64,
    /// Hits per block looked up that the fast tier lacked: together the row's.
    pub block_hit_rate: f64,
    /// Blocks that the fast tier offered: what reclaim did not keep, and what memory let go unwritten.
    pub offered_blocks: u64,
    /// Of these, those that the big tier had then.
    pub taken_blocks: u64,
    /// Blocks written to its flash, rewritten ones included.
    pub flash_write_blocks: u64,
    /// Blocks written per block that came down.
    pub write_amplification: f64,
}

/// What a trace reaches at each capacity, and at best.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OfflineReport {
    /// In the order of the capacities asked for.
    pub rows: Vec<OfflineRow>,
    /// Different ids in the trace.
    pub distinct_blocks: u64,
    /// Requests in the trace.
    pub requests: u64,
    /// Hits per block looked up if nothing ever left.
    pub ceiling_block_hit_rate: f64,
    /// Tokens saved per input token if nothing ever left.
    pub ceiling_token_hit_rate: f64,
    /// Tokens of one block.
    pub block_tokens: u64,
}

/// Replays `trace` with the production reclaim policy.
///
/// # Errors
/// Options that mean nothing (see [`OfflineError`]).
pub fn replay_offline(
    trace: &Trace,
    options: &OfflineOptions,
) -> Result<OfflineReport, OfflineError> {
    replay_offline_with(trace, options, RecentlyUsed::new)
}

/// As [`replay_offline`], with a reclaim policy of the caller's: a fresh one for each capacity.
///
/// # Errors
/// Options that mean nothing (see [`OfflineError`]).
pub fn replay_offline_with<P: ReclaimPolicy>(
    trace: &Trace,
    options: &OfflineOptions,
    mut policy: impl FnMut() -> P,
) -> Result<OfflineReport, OfflineError> {
    check(options.dram_share, options.block_bytes, &options.capacities)?;
    if !(0.0..1.0).contains(&options.warmup_share) {
        return Err(OfflineError::WarmupShare(options.warmup_share));
    }
    let wrong = match (options.policy, options.model) {
        (Policy::Recent, Model::Blocks) => Some(("recent", "engine")),
        (Policy::Optimum, Model::Engine) => Some(("optimum", "blocks")),
        _ => None,
    };
    if let Some((policy, model)) = wrong {
        return Err(OfflineError::PolicyModel { policy, model });
    }
    let numbered = Numbered::new(trace, options.warmup_share)?;
    let distinct = numbered.distinct;
    let bigs = check_big(options, distinct)?;
    let pairs = options.capacities.iter();
    let pairs = pairs.flat_map(|capacity| bigs.iter().map(move |big| (capacity, *big)));
    let rows = pairs.map(|(capacity, big)| {
        let capacity_blocks = capacity.blocks(distinct);
        let dram = (distinct as f64 * options.dram_share) as u64;
        let dram_blocks = dram.min(capacity_blocks / 2);
        let shape = FlashShape::new(capacity_blocks - dram_blocks, options.block_bytes);
        let tally = match (options.model, options.policy) {
            (Model::Blocks, Policy::Optimum) => {
                numbered.replay(&mut numbered.optimum(capacity_blocks))
            }
            (Model::Blocks, _) => numbered.replay(&mut UnitBlocks::new(capacity_blocks)),
            (Model::Engine, Policy::Recent) => {
                let policy = policy();
                numbered.replay(&mut EngineModel::new(distinct, dram_blocks, shape, policy))
            }
            (Model::Engine, _) => {
                let admit = options.admit;
                if let Some(big) = big {
                    let big = FlashShape::new(big, options.block_bytes);
                    numbered.replay(&mut TwoTiers::new(distinct, dram_blocks, shape, big, admit))
                } else {
                    numbered.replay(&mut LearnedModel::new(distinct, dram_blocks, shape, admit))
                }
            }
        };
        let share_of = |blocks: u64| blocks as f64 / distinct.max(1) as f64;
        OfflineRow {
            capacity_blocks,
            capacity_share: share_of(capacity_blocks),
            block_hit_rate: tally.block_hit_rate(),
            token_hit_rate: tally.token_hit_rate(),
            flash_write_blocks: tally.writes.total(),
            write_amplification: tally.writes.amplification(),
            big: big.map(|blocks| {
                let in_fast = Tally {
                    hit_blocks: tally.hit_blocks - tally.below.hits,
                    ..tally.clone()
                };
                let in_big = Tally {
                    hit_blocks: tally.below.hits,
                    ..tally.clone()
                };
                BigRow {
                    capacity_blocks: blocks,
                    capacity_share: share_of(blocks),
                    fast_block_hit_rate: in_fast.block_hit_rate(),
                    block_hit_rate: in_big.block_hit_rate(),
                    offered_blocks: tally.below.offered,
                    taken_blocks: tally.below.taken,
                    flash_write_blocks: tally.below.writes.total(),
                    write_amplification: tally.below.writes.amplification(),
                }
            }),
        }
    });
    let rows = rows.collect();
    let ceiling = numbered.replay(&mut Unlimited(vec![false; distinct as usize]));
    Ok(OfflineReport {
        rows,
        distinct_blocks: distinct,
        requests: trace.requests.len() as u64,
        ceiling_block_hit_rate: ceiling.block_hit_rate(),
        ceiling_token_hit_rate: ceiling.token_hit_rate(),
        block_tokens: trace.block_tokens,
    })
}

/// Whether these can be replayed.
pub(crate) fn check(
    dram_share: f64,
    block_bytes: u64,
    capacities: &[Capacity],
) -> Result<(), OfflineError> {
    if !(0.0..=1.0).contains(&dram_share) {
        return Err(OfflineError::DramShare(dram_share));
    }
    if !(1..=FlashShape::BLOCK_BYTES_MAX).contains(&block_bytes) {
        return Err(OfflineError::BlockBytes(block_bytes));
    }
    match capacities.iter().find(|capacity| !capacity.is_valid()) {
        Some(wrong) => Err(OfflineError::Capacity(*wrong)),
        None => Ok(()),
    }
}

/// The big tiers to test in blocks; `None`: no such tier.
fn check_big(options: &OfflineOptions, distinct: u64) -> Result<Vec<Option<u64>>, OfflineError> {
    if options.big.is_empty() {
        return Ok(vec![None]);
    }
    if options.model != Model::Engine || options.policy != Policy::Production {
        return Err(OfflineError::BigModel);
    }
    let block_bytes = options.block_bytes;
    let min = FlashShape::two_segments(block_bytes);
    let in_blocks = |big: &Capacity| {
        if !big.is_valid() {
            return Err(OfflineError::Capacity(*big));
        }
        match big.blocks(distinct) {
            blocks if blocks >= min => Ok(Some(blocks)),
            blocks => Err(OfflineError::BigTooSmall {
                blocks,
                block_bytes,
                min,
            }),
        }
    };
    options.big.iter().map(in_blocks).collect()
}

/// Writes to flash, counted in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Writes {
    /// Written because they were put.
    pub(crate) put: u64,
    /// Written again by reclaim.
    pub(crate) again: u64,
}

impl Writes {
    fn since(self, before: Self) -> Self {
        Self {
            put: self.put - before.put,
            again: self.again - before.again,
        }
    }

    pub(crate) fn total(self) -> u64 {
        self.put + self.again
    }

    pub(crate) fn amplification(self) -> f64 {
        if self.put == 0 {
            1.0
        } else {
            self.total() as f64 / self.put as f64
        }
    }
}

/// What a tier below did, counted in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Below {
    /// Hits that the tier above lacked.
    pub(crate) hits: u64,
    /// Offered to it.
    pub(crate) offered: u64,
    /// Of these, those that it had then.
    pub(crate) taken: u64,
    pub(crate) writes: Writes,
}

impl Below {
    fn since(self, before: Self) -> Self {
        Self {
            hits: self.hits - before.hits,
            offered: self.offered - before.offered,
            taken: self.taken - before.taken,
            writes: self.writes.since(before.writes),
        }
    }
}

/// A store under replay. Blocks are numbered 0, 1, 2, ... in the order the trace names them.
pub(crate) trait Store {
    /// Looks `blocks` up from the first on, touches the hits, answers how many there are before
    /// the first miss.
    fn lookup(&mut self, blocks: &[u32], request: u64) -> usize;
    /// What kind of traffic the next request is of, as it would tell with its puts (0: it does not).
    fn set_traffic_class(&mut self, _traffic_class: u8) {}
    /// Puts `blocks`, of which the first stands at `depth` in its prompt; those present are
    /// touched.
    fn put(&mut self, blocks: &[u32], depth: usize, request: u64);
    /// What it wrote so far.
    fn writes(&self) -> Writes;
    /// What a tier below did so far.
    fn below(&self) -> Below {
        Below::default()
    }
}

/// The trace with its ids made dense.
pub(crate) struct Numbered<'a> {
    trace: &'a Trace,
    pub(crate) blocks: Vec<u32>,
    /// Where each request's blocks lie.
    pub(crate) ranges: Vec<Range<usize>>,
    pub(crate) distinct: u64,
    /// Requests before the first that is counted.
    warmup_requests: usize,
}

#[derive(Clone, Default)]
pub(crate) struct Tally {
    pub(crate) hit_blocks: u64,
    pub(crate) lookup_blocks: u64,
    hit_tokens: u64,
    input_tokens: u64,
    pub(crate) writes: Writes,
    below: Below,
}

impl<'a> Numbered<'a> {
    pub(crate) fn new(trace: &'a Trace, warmup_share: f64) -> Result<Self, OfflineError> {
        let mut numbers = HashMap::new();
        let (mut blocks, mut ranges) = (Vec::new(), Vec::with_capacity(trace.requests.len()));
        for request in &trace.requests {
            let start = blocks.len();
            for id in &request.hash_ids {
                // One number is kept free to stand for "none".
                let next = u32::try_from(numbers.len())
                    .ok()
                    .filter(|next| *next < u32::MAX);
                let next = next.ok_or(OfflineError::TooManyBlocks)?;
                blocks.push(*numbers.entry(*id).or_insert(next));
            }
            ranges.push(start..blocks.len());
        }
        Ok(Self {
            trace,
            blocks,
            ranges,
            distinct: numbers.len() as u64,
            warmup_requests: (trace.requests.len() as f64 * warmup_share) as usize,
        })
    }

    fn optimum(&self, capacity_blocks: u64) -> Optimum<'_> {
        let lookups = self.trace.requests.iter();
        let lookups = lookups.map(|request| request.lookup_blocks);
        Optimum::new(
            capacity_blocks,
            self.distinct,
            &self.blocks,
            &self.ranges,
            lookups,
        )
    }

    fn replay(&self, store: &mut impl Store) -> Tally {
        let all = self.replay_by(store, 1, |_| 0);
        all.into_iter().next().unwrap_or_default()
    }

    /// Replays, and tallies requests in so many groups; writes are of all, in each.
    pub(crate) fn replay_by(
        &self,
        store: &mut impl Store,
        groups: usize,
        group: impl Fn(usize) -> usize,
    ) -> Vec<Tally> {
        let mut tallies = vec![Tally::default(); groups];
        let mut warm = (Writes::default(), Below::default());
        for (number, (request, range)) in self
            .trace
            .requests
            .iter()
            .zip(self.ranges.clone())
            .enumerate()
        {
            if number == self.warmup_requests {
                warm = (store.writes(), store.below());
            }
            let blocks = &self.blocks[range];
            store.set_traffic_class(request.traffic_class);
            let hits = store.lookup(&blocks[..request.lookup_blocks], number as u64);
            store.put(&blocks[hits..], hits, number as u64);
            if number < self.warmup_requests {
                continue;
            }
            let tally = &mut tallies[group(number)];
            tally.hit_blocks += hits as u64;
            tally.lookup_blocks += request.lookup_blocks as u64;
            tally.hit_tokens += request.hit_tokens(hits, self.trace.block_tokens);
            tally.input_tokens = tally.input_tokens.saturating_add(request.input_length);
        }
        let (writes, below) = (store.writes(), store.below());
        for tally in &mut tallies {
            tally.writes = writes.since(warm.0);
            tally.below = below.since(warm.1);
        }
        tallies
    }
}

impl Tally {
    pub(crate) fn block_hit_rate(&self) -> f64 {
        self.hit_blocks as f64 / self.lookup_blocks.max(1) as f64
    }

    fn token_hit_rate(&self) -> f64 {
        self.hit_tokens as f64 / self.input_tokens.max(1) as f64
    }
}

/// [`Model::Blocks`].
struct UnitBlocks {
    capacity_blocks: u64,
    lru: TailFirstLru<u32>,
    writes: Writes,
}

impl UnitBlocks {
    fn new(capacity_blocks: u64) -> Self {
        Self {
            capacity_blocks,
            lru: TailFirstLru::new(),
            writes: Writes::default(),
        }
    }
}

impl Store for UnitBlocks {
    fn lookup(&mut self, blocks: &[u32], request: u64) -> usize {
        let hits = blocks
            .iter()
            .take_while(|block| self.lru.contains(block))
            .count();
        for (depth, block) in blocks[..hits].iter().enumerate() {
            self.lru.touch(*block, request, depth as u32);
        }
        hits
    }

    fn put(&mut self, blocks: &[u32], depth: usize, request: u64) {
        for (depth, block) in (depth..).zip(blocks) {
            self.writes.put += u64::from(!self.lru.contains(block));
            self.lru.touch(*block, request, depth as u32);
        }
        // Only now does anything leave: all of a request's blocks go in at its arrival.
        while self.lru.len() as u64 > self.capacity_blocks {
            self.lru.pop_coldest();
        }
    }

    fn writes(&self) -> Writes {
        self.writes
    }
}

/// The ceiling: nothing ever leaves.
struct Unlimited(Vec<bool>);

impl Store for Unlimited {
    fn lookup(&mut self, blocks: &[u32], _request: u64) -> usize {
        blocks
            .iter()
            .take_while(|block| self.0[**block as usize])
            .count()
    }

    fn put(&mut self, blocks: &[u32], _depth: usize, _request: u64) {
        for block in blocks {
            self.0[*block as usize] = true;
        }
    }

    fn writes(&self) -> Writes {
        Writes::default()
    }
}
