//! What a store knows of its blocks' worth, in one place: engine and replay ask the same questions.
//!
//! ```text
//!   a block is found ────── used() ──> its class, for DRAM's order and the index entry
//!            or put ──── arrived() ──>   the same, with what its writer said of it
//!                       demanded() <── its bytes: the clock
//!   it leaves memory unwritten ── asks() ──> worth a place on flash? ── no ──> let_go(): remembered
//!   its segment is reclaimed ──── asks() ──> worth a further turnover?
//! ```
//!
//! Time is demand: bytes found and put since the store began. In an index entry it is a stamp of
//! one byte, in ticks of 1/32 of the capacity:
//!
//! ```text
//!   age in ticks    0 .......................... 176 ......... 240 .. 255
//!                   as it is                      sweep() sets back    never
//! ```
//!
//! A stamp would look young again after eight capacities. Who keeps stamps therefore sets those older
//! than [`AGE_TICKS_MAX`] back to it, all of them once in each [`SWEEP_TICKS`].
//!
//! What must always be true: the clock never goes back; memory is bounded (two bytes a ghost, some
//! 4 MiB for what is learned); the same calls give the same answers.
//!
//! Left to others: where blocks lie, how they are written, the budget for it.

use crate::class::{BlockClass, Kind};
use crate::cost::{Cost, CostScale};
use crate::flash::{Asking, FlashKeeper};
use crate::ghost::GhostList;
use crate::reuse::ReuseModel;
use crate::share::Tenant;

/// Ticks of a stamp in one capacity: the model's own resolution at half of that age, and a byte
/// reaches eight capacities. With 16, blocks that are used all the time look idle at each tick.
const TICKS_PER_CAPACITY: u64 = 32;
/// The greatest age, in ticks, that a stamp tells: five and a half capacities. Blocks that nobody
/// asked for in so long are not kept.
const AGE_TICKS_MAX: u8 = 176;
/// Within so many ticks every stamp must have been looked at once.
pub const SWEEP_TICKS: u8 = 64;
/// What the sample of the reuse model takes: an open interval and its places in the order, for
/// each of [`SAMPLE_MAX`](crate::SAMPLE_MAX) ids, in tables that are half full; and 180 KiB of counts and
/// curves a tenant.
const LEARNED_BYTES_MAX: u64 = 18 << 20;
const _: () = assert!(AGE_TICKS_MAX as u16 + SWEEP_TICKS as u16 + 1 < 256);

/// What a store is.
#[derive(Clone, Copy, Debug)]
pub struct StoreShape {
    /// Bytes of blocks that memory and flash can hold together.
    pub capacity_bytes: u64,
    /// Segments that hold blocks.
    pub segments: u64,
    /// Bytes of blocks in one of them.
    pub segment_bytes: u64,
    /// Blocks it can hold, about.
    pub blocks: u64,
}

/// What a writer said of a block that it put; by default nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Whose it is.
    pub tenant: Tenant,
    /// What kind of traffic it is of.
    pub kind: Kind,
    /// What computing it again costs, in microseconds; 0: not said.
    pub recompute_us: u32,
    /// Its bytes, as it is stored.
    pub bytes: u64,
}

/// What was learned, what was let go, and what a place on flash is worth.
#[derive(Clone, Debug)]
pub struct Keep {
    reuse: ReuseModel,
    ghosts: GhostList,
    keeper: FlashKeeper,
    costs: CostScale,
    demand_bytes: u64,
    tick_bytes: u64,
}

impl Keep {
    /// For a store of this shape that has seen nothing.
    #[must_use]
    pub fn new(shape: &StoreShape) -> Self {
        let ghosts = shape.blocks.saturating_mul(GhostList::ENTRIES_PER_BLOCK);
        Self {
            reuse: ReuseModel::new(shape.capacity_bytes),
            ghosts: GhostList::new(ghosts),
            keeper: FlashKeeper::new(shape.segments, shape.segment_bytes),
            costs: CostScale::new(shape.capacity_bytes),
            demand_bytes: 0,
            tick_bytes: (shape.capacity_bytes / TICKS_PER_CAPACITY).max(1),
        }
    }

    /// Memory that this takes for a store of so many blocks, at most.
    #[must_use]
    pub fn memory_bytes(blocks: u64) -> u64 {
        let ghosts = blocks.saturating_mul(GhostList::ENTRIES_PER_BLOCK * 2);
        ghosts.saturating_add(LEARNED_BYTES_MAX)
    }

    /// The clock: bytes found and put so far.
    #[must_use]
    pub fn demand_bytes(&self) -> u64 {
        self.demand_bytes
    }

    /// Takes the clock up where an earlier life of the store left it.
    pub fn resume(&mut self, demand_bytes: u64) {
        self.demand_bytes = self.demand_bytes.max(demand_bytes);
    }

    /// So many bytes were found or put.
    pub fn demanded(&mut self, bytes: u64) {
        self.demand_bytes = self.demand_bytes.saturating_add(bytes);
    }

    /// A block that the store holds was used, by a request of so many blocks: its class from now
    /// on. `before` is what the store knows of it.
    pub fn used(
        &mut self,
        id: u64,
        tenant: Tenant,
        before: BlockClass,
        request_blocks: u32,
    ) -> BlockClass {
        let uses = before.uses().saturating_add(1);
        let class = BlockClass::new(uses, request_blocks)
            .of_kind(before.kind())
            .at_cost(before.cost());
        self.reuse.observe(id, tenant, class, self.demand_bytes);
        class
    }

    /// A block was put that the store did not hold, by a request of so many blocks: its class.
    pub fn arrived(&mut self, id: u64, said: &Said, request_blocks: u32) -> BlockClass {
        self.costs.observe(said.recompute_us, said.bytes);
        let known = self.ghosts.take(id);
        let uses = known.map_or(0, |uses| uses.saturating_add(1));
        let class = BlockClass::new(uses, request_blocks)
            .of_kind(said.kind)
            .at_cost(self.cost(said.recompute_us, said.bytes));
        self.reuse
            .observe(id, said.tenant, class, self.demand_bytes);
        class
    }

    /// What a hit on a block of so many bytes saves, of which its writer said this.
    #[must_use]
    pub fn cost(&self, recompute_us: u32, bytes: u64) -> Cost {
        self.costs.cost(recompute_us, bytes)
    }

    /// What blocks cost that were put before this process began; of no use once it knows of puts.
    pub fn remind_of_costs(&mut self, stored: impl Iterator<Item = (u32, u64)>) {
        if !self.costs.is_known() {
            stored.for_each(|(recompute_us, bytes)| self.costs.observe(recompute_us, bytes));
        }
    }

    /// The store does not hold a block any more, and nobody asked for that.
    pub fn let_go(&mut self, id: u64, class: BlockClass) {
        self.ghosts.insert(id, class.uses());
    }

    /// A block of this class came from another store: what is learned of it begins here.
    pub fn taken_over(&mut self, id: u64, tenant: Tenant, class: BlockClass) {
        self.reuse.restart(id, tenant, class, self.demand_bytes);
    }

    /// A block that this store does not hold was asked for, and another one may have it: a store
    /// that hands blocks on would learn otherwise that nobody wants what it let go.
    pub fn missed(&mut self, id: u64) {
        self.reuse.end(id, self.demand_bytes);
    }

    /// What was learned.
    #[must_use]
    pub fn reuse(&self) -> &ReuseModel {
        &self.reuse
    }

    /// Who gets a place on flash.
    #[must_use]
    pub fn keeper(&self) -> &FlashKeeper {
        &self.keeper
    }

    /// The same, for a reclaim.
    pub fn keeper_mut(&mut self) -> &mut FlashKeeper {
        &mut self.keeper
    }

    /// The oldest segment was opened at this time: places on flash last as long as it did.
    pub fn set_oldest(&mut self, opened_at: u64) {
        let turnover = self.demand_bytes.saturating_sub(opened_at);
        self.keeper.set_turnover(turnover);
    }

    /// What a place on flash is worth to a block, comparable with the threshold.
    #[must_use]
    pub fn worth(&self, block: &Asking) -> f64 {
        self.keeper.worth(&self.reuse, block)
    }

    /// Whether a block that leaves memory is to be written.
    #[must_use]
    pub fn is_worth(&self, block: &Asking) -> bool {
        self.keeper.is_worth(&self.reuse, block, self.demand_bytes)
    }

    /// The last live block of a segment was asked about.
    pub fn end_reclaim(&mut self) {
        self.keeper.end_reclaim(self.demand_bytes);
    }

    /// The stamp of an entry used now.
    #[must_use]
    pub fn stamp(&self) -> u8 {
        // Keeping the low byte is the wrap that the story above is about.
        (self.demand_bytes / self.tick_bytes) as u8
    }

    /// The stamp of an entry used at an earlier time.
    #[must_use]
    pub fn stamp_at(&self, demand_bytes: u64) -> u8 {
        let ticks = self.demand_bytes / self.tick_bytes;
        let then = demand_bytes.min(self.demand_bytes) / self.tick_bytes;
        ticks.saturating_sub(u64::from(AGE_TICKS_MAX)).max(then) as u8
    }

    /// How long ago a stamp was made, in bytes of demand, half a tick early: one made a moment ago
    /// may be of the tick before.
    #[must_use]
    pub fn age_bytes(&self, stamp: u8) -> u64 {
        let ticks = self.stamp().wrapping_sub(stamp).min(AGE_TICKS_MAX);
        (u64::from(ticks) * self.tick_bytes).saturating_sub(self.tick_bytes / 2)
    }

    /// The stamp to keep in place of one that grows too old to be told from a young one.
    #[must_use]
    pub fn swept(&self, stamp: u8) -> Option<u8> {
        let now = self.stamp();
        (now.wrapping_sub(stamp) > AGE_TICKS_MAX).then(|| now.wrapping_sub(AGE_TICKS_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep() -> Keep {
        Keep::new(&StoreShape {
            capacity_bytes: 1600,
            segments: 4,
            segment_bytes: 400,
            blocks: 16,
        })
    }

    #[test]
    fn a_block_that_returns_is_no_stranger() {
        let mut keep = keep();
        let nothing = Said::default();
        let first = keep.arrived(7, &nothing, 4);
        assert_eq!(first.uses(), 0);
        let again = keep.used(7, Tenant::DEFAULT, first, 8);
        assert_eq!((again.uses(), again.length()), (1, 3));
        keep.let_go(7, again);
        assert_eq!(keep.arrived(7, &nothing, 1).uses(), 2);
        // What is remembered is remembered once.
        assert_eq!(keep.arrived(7, &nothing, 1).uses(), 0);
    }

    #[test]
    fn what_its_writer_said_stays_with_a_block() {
        let mut keep = keep();
        let said = |kind, recompute_us| Said {
            tenant: Tenant::DEFAULT,
            kind: Kind::of(kind),
            recompute_us,
            bytes: 100,
        };
        keep.arrived(1, &said(2, 50), 4);
        let dear = keep.arrived(2, &said(2, 500), 4);
        assert_eq!((dear.kind(), dear.cost().weight()), (Kind::of(2), 2.0));
        let later = keep.used(2, Tenant::DEFAULT, dear, 9);
        assert_eq!((later.kind(), later.cost()), (dear.kind(), dear.cost()));
        assert_eq!((later.uses(), later.length()), (1, 3));
    }

    #[test]
    fn after_a_start_costs_are_known_from_what_is_stored_until_somebody_puts() {
        let mut keep = keep();
        assert_eq!(keep.cost(900, 100).weight(), 1.0);
        keep.remind_of_costs([(0, 100), (100, 100), (100, 100)].into_iter());
        assert_eq!(keep.cost(900, 100).weight(), 4.0);
        let before = keep.cost(100, 100);
        keep.remind_of_costs([(100_000, 100)].into_iter());
        assert_eq!(keep.cost(100, 100), before);
    }

    #[test]
    fn an_entry_nobody_asks_for_never_looks_young_again() {
        let mut keep = keep();
        let mut stamp = keep.stamp();
        let mut age = 0;
        for tick in 0..2000_u64 {
            keep.demanded(50);
            if tick % u64::from(SWEEP_TICKS) == 0
                && let Some(swept) = keep.swept(stamp)
            {
                stamp = swept;
            }
            assert!(keep.age_bytes(stamp) >= age, "at tick {tick}");
            age = keep.age_bytes(stamp);
        }
        assert_eq!(age, u64::from(AGE_TICKS_MAX) * 50 - 25);
    }

    #[test]
    fn the_clock_goes_on_after_a_restart_and_never_back() {
        let mut keep = keep();
        keep.resume(5000);
        keep.resume(10);
        keep.demanded(1);
        assert_eq!(keep.demand_bytes(), 5001);
    }
}
