//! The optimum: what a cache of unit blocks could hit if it knew the future.
//!
//! Of all blocks that it holds or is offered, it keeps those that are asked for again soonest
//! (Belady's rule, with bypass: what is put need not be kept). Ids are chained, so whoever asks for
//! a block asks for all before it: a head is never asked for later than its tail, and among blocks
//! asked for by the same request the tails go first. That is why the rule, which knows nothing of
//! prefixes, is optimal here, too, where a hit counts only behind hits.
//!
//! What must always be true: a block that no later request looks up is held only while there is
//! room for it; no store of the same capacity has more hits.

use crate::offline::{Store, Writes};
use std::collections::BTreeSet;
use std::ops::Range;

/// No later request looks this block up.
const NEVER: u32 = u32::MAX;

/// A block that is held.
#[derive(Clone, Copy)]
struct Held {
    next_use: u32,
    depth: u32,
    /// The request that brought it.
    since: u32,
}

/// The store that knows the future.
pub(crate) struct Optimum<'a> {
    capacity_blocks: u64,
    /// All references of the trace, request by request; where each request's lie.
    ranges: &'a [Range<usize>],
    /// For each reference the next request that looks the block up.
    next_use: Vec<u32>,
    /// What is held, by block.
    held: Vec<Option<Held>>,
    /// (next use, depth, block): the last leaves first.
    order: BTreeSet<(u32, u32, u32)>,
    writes: Writes,
}

impl<'a> Optimum<'a> {
    /// `lookups` says how many leading blocks each request looks up.
    pub(crate) fn new(
        capacity_blocks: u64,
        distinct: u64,
        blocks: &[u32],
        ranges: &'a [Range<usize>],
        lookups: impl DoubleEndedIterator<Item = usize> + ExactSizeIterator,
    ) -> Self {
        let mut next_use = vec![NEVER; blocks.len()];
        let mut coming = vec![NEVER; distinct as usize];
        for (number, (range, looked_up)) in ranges.iter().zip(lookups).enumerate().rev() {
            for at in range.clone() {
                next_use[at] = coming[blocks[at] as usize];
            }
            for at in range.clone().take(looked_up) {
                coming[blocks[at] as usize] = number as u32;
            }
        }
        Self {
            capacity_blocks,
            ranges,
            next_use,
            held: vec![None; distinct as usize],
            order: BTreeSet::new(),
            writes: Writes::default(),
        }
    }

    /// Holds a block, or learns when a held one is used next.
    fn hold(&mut self, block: u32, depth: u32, next_use: u32, request: u32) {
        let slot = &mut self.held[block as usize];
        let since = slot.map_or(request, |before| before.since);
        let now = Held {
            next_use,
            depth,
            since,
        };
        match slot.replace(now) {
            Some(before) => _ = self.order.remove(&(before.next_use, before.depth, block)),
            None => self.writes.put += 1,
        }
        self.order.insert((next_use, depth, block));
    }
}

impl Store for Optimum<'_> {
    fn lookup(&mut self, blocks: &[u32], request: u64) -> usize {
        let start = self.ranges[request as usize].start;
        let hits = blocks
            .iter()
            .take_while(|block| self.held[**block as usize].is_some())
            .count();
        for (depth, block) in blocks[..hits].iter().enumerate() {
            let next_use = self.next_use[start + depth];
            self.hold(*block, depth as u32, next_use, request as u32);
        }
        hits
    }

    fn put(&mut self, blocks: &[u32], depth: usize, request: u64) {
        let start = self.ranges[request as usize].start;
        for (depth, block) in (depth..).zip(blocks) {
            let next_use = self.next_use[start + depth];
            self.hold(*block, depth as u32, next_use, request as u32);
        }
        while self.order.len() as u64 > self.capacity_blocks {
            let Some((_, _, block)) = self.order.pop_last() else {
                return;
            };
            let gone = self.held[block as usize].take();
            // What leaves at the request that brought it was bypassed: never written.
            let bypassed = gone.is_some_and(|held| held.since == request as u32);
            self.writes.put -= u64::from(bypassed);
        }
    }

    fn writes(&self) -> Writes {
        self.writes
    }
}
