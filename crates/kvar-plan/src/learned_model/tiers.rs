//! Two tiers: a fast one that takes every put, and a big one for what the first does not keep.
//!
//! ```text
//!   lookup ──> fast: used, or missed ── what it lacks ──> big: used, or missed
//!   put ─────> fast ── its oldest segment: not kept ───────────────┬─> offered ── worth a place ──> big, written at once
//!               └──── its memory: let go and not worth a write ───┘
//! ```
//!
//! * Each tier has memory, segments and a `Keep` of its own. What comes down counts from its arrival on,
//!   and displaces nothing in the memory of the big tier.
//! * The big tier is asked for all that the fast one lacks, behind a gap, too, and told how long the
//!   prompt is.
//! * What is found in the big tier is read into its memory, and not written to the fast one.
//!
//! What must always be true: a block that leaves the fast tier is in the big one or refused there;
//! without anything found in the big tier the fast one does what it would do alone.
//!
//! What it leaves out: what is too late for its reclaim, the write limit of the big tier, namespaces.

use super::{Block, LearnedModel, NOWHERE};
use crate::engine_model::FlashShape;
use crate::offline::{Admit, Below, Store, Writes};
use kvar_policy::{Asking, Tenant};

/// Of memory, one part in so many is the big tier's.
const MEMORY_PARTS: u64 = 4;

impl LearnedModel {
    /// Offers a block that reclaim does not keep, or memory lets go unwritten, to the tier below; whether it is there now.
    pub(super) fn goes_down(&mut self, number: u32) -> bool {
        let block = *self.block(number);
        let Some(below) = &mut self.below else {
            return false;
        };
        let is_there = below.take(number, &block);
        self.offered += 1;
        self.taken += u64::from(is_there);
        is_there
    }

    /// A block comes from the tier above; whether it is here now.
    fn take(&mut self, number: u32, block: &Block) -> bool {
        if self.block(number).is_here() {
            self.write_resident(number);
            return true;
        }
        self.set_turnover();
        let tenant = self.tenant(number);
        let asking = Asking {
            tenant,
            class: block.class,
            age: 0,
            depth: block.depth,
        };
        if !self.keep.is_worth(&asking) {
            return false;
        }
        self.keep.taken_over(u64::from(number), tenant, block.class);
        self.blocks[number as usize] = Block {
            segment: NOWHERE,
            used_at: self.keep.demand_bytes(),
            in_dram: false,
            ..*block
        };
        self.keep.demanded(self.shape.block_bytes);
        self.append(number);
        true
    }
}

/// The store under replay.
pub(crate) struct TwoTiers {
    fast: LearnedModel,
    hits_below: u64,
}

impl TwoTiers {
    /// `dram_blocks` is of both.
    pub(crate) fn new(
        distinct: u64,
        dram_blocks: u64,
        fast: FlashShape,
        big: FlashShape,
        admit: Admit,
    ) -> Self {
        let dram_below = dram_blocks / MEMORY_PARTS;
        let below = LearnedModel::new(distinct, dram_below, big, admit);
        let mut fast = LearnedModel::new(distinct, dram_blocks - dram_below, fast, admit);
        fast.below = Some(Box::new(below));
        Self {
            fast,
            hits_below: 0,
        }
    }
}

impl Store for TwoTiers {
    fn set_traffic_class(&mut self, traffic_class: u8) {
        self.fast.set_traffic_class(traffic_class);
    }

    fn lookup(&mut self, blocks: &[u32], request: u64) -> usize {
        let fast = &mut self.fast;
        let Some(mut big) = fast.below.take() else {
            return fast.lookup(blocks, request);
        };
        let is_here = |block: &u32| fast.block(*block).is_here();
        let hits = blocks
            .iter()
            .take_while(|block| is_here(block) || big.block(**block).is_here())
            .count();
        (fast.looked_up, fast.found) = (blocks.len(), 0);
        let mut found_below = 0;
        for (depth, number) in (0..).zip(blocks.iter().copied()) {
            let is_hit = depth < hits;
            if fast.block(number).is_here() {
                // What is behind the gap is used by the put that follows.
                if is_hit {
                    fast.use_block(number, request, depth as u32, blocks.len(), true);
                    fast.found += 1;
                }
                continue;
            }
            fast.keep.missed(u64::from(number));
            if big.block(number).is_here() {
                big.use_block(number, request, depth as u32, blocks.len(), is_hit);
                found_below += 1;
                self.hits_below += u64::from(is_hit);
            } else {
                big.keep.missed(u64::from(number));
            }
        }
        let bytes = big.shape.block_bytes;
        big.keep.demanded(bytes.saturating_mul(found_below));
        big.shrink_dram(Tenant::DEFAULT);
        fast.below = Some(big);
        hits
    }

    fn put(&mut self, blocks: &[u32], depth: usize, request: u64) {
        self.fast.put(blocks, depth, request);
    }

    fn writes(&self) -> Writes {
        self.fast.writes
    }

    fn below(&self) -> Below {
        Below {
            hits: self.hits_below,
            offered: self.fast.offered,
            taken: self.fast.taken,
            writes: self
                .fast
                .below
                .as_ref()
                .map_or_else(Writes::default, |big| big.writes),
        }
    }
}

#[cfg(test)]
mod tests;
