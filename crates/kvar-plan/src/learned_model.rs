//! The engine, with the policy that learns: what [`EngineModel`](crate::engine_model) is for the
//! policy that nodes run.
//!
//! ```text
//!                    ┌──────────────── DRAM, D blocks ────────────────┐
//!   put ───────────> │ unwritten, by worth  ·  on flash, too, by worth │ <── read from flash
//!                    └───────┬──────────────────────────┬─────────────┘
//!        worth a place? ── no ─> gone, or below         └─> gone from DRAM; flash has it
//!                    │ yes, and its whole prompt with it
//!                    v
//!   flash:  | sealed | sealed | ... | open |  + 1 free, the reserve
//!            oldest: what is worth a further turnover is written again, by worth, heads first
//! ```
//!
//! * DRAM is part of the capacity, so a block need not be in both: a copy of what flash holds
//!   leaves first, and a kept block that DRAM holds unwritten costs nothing.
//! * A block is written when it leaves DRAM ([`Admit::ByWorth`], what a node does while its write
//!   budget is short) or at its put ([`Admit::All`], while there is room).
//!
//! * Where several tenants share it, memory makes room and reclaim keeps as in the engine: the tenant
//!   furthest beyond its part first, and what is within a part stays.
//!
//! * With a big tier `below` it, what reclaim does not keep and what leaves DRAM unwritten is offered
//!   there (see [`tiers`]).
//!
//! What it leaves out: as the engine model, and the write budget itself.

mod tiers;

pub(crate) use tiers::TwoTiers;

use crate::engine_model::FlashShape;
use crate::offline::{Admit, Store, Writes};
use kvar_policy::{
    Asking, BlockClass, Candidate, Holdings, Keep, Kind, Losses, Said, Shares, StoreShape, Tenant,
    TenantSet, WorthOrder,
};
use std::cmp::Reverse;
use std::collections::{HashSet, VecDeque};

#[derive(Clone, Copy)]
struct Block {
    /// The number of its segment, counted up for ever; [`NOWHERE`] if it is not on flash, [`BELOW`] if
    /// it is in DRAM and on the flash of the tier below.
    segment: u64,
    used_at: u64,
    request: u64,
    depth: u32,
    class: BlockClass,
    in_dram: bool,
}

const NOWHERE: u64 = u64::MAX;
/// The copy in DRAM may go at any time, and is not written here again.
const BELOW: u64 = u64::MAX - 1;

impl Block {
    fn is_here(&self) -> bool {
        self.in_dram || is_on_flash(self.segment)
    }
}

fn is_on_flash(segment: u64) -> bool {
    segment < BELOW
}

struct Segment {
    /// Demand when it was opened.
    opened_at: u64,
    blocks: Vec<u32>,
}

/// A tenant's blocks in DRAM.
#[derive(Default)]
struct Orders {
    unwritten: WorthOrder<u32>,
    copies: WorthOrder<u32>,
}

impl Orders {
    fn of(&mut self, segment: u64) -> &mut WorthOrder<u32> {
        if segment == NOWHERE {
            &mut self.unwritten
        } else {
            &mut self.copies
        }
    }

    fn is_empty(&self) -> bool {
        self.unwritten.is_empty() && self.copies.is_empty()
    }
}

/// The store under replay.
pub(crate) struct LearnedModel {
    admit: Admit,
    dram_blocks: u64,
    shape: FlashShape,
    blocks: Vec<Block>,
    /// By tenant.
    orders: Vec<Orders>,
    shares: Shares,
    /// Whose each block is; none: all are of one tenant.
    tenants: Vec<Tenant>,
    /// Blocks in DRAM and on flash, by tenant.
    in_dram: Holdings,
    on_flash: Holdings,
    /// Requests of which something was written: the rest follows.
    written: HashSet<u64>,
    segments: VecDeque<Segment>,
    oldest: u64,
    looked_up: usize,
    /// Blocks of the request under way that were found here.
    found: usize,
    /// Of the request under way.
    kind: Kind,
    /// Whose request this is.
    asking: Tenant,
    keep: Keep,
    writes: Writes,
    /// The big tier.
    below: Option<Box<Self>>,
    /// Blocks offered to it, and such as it had after that.
    offered: u64,
    taken: u64,
}

impl LearnedModel {
    pub(crate) fn new(distinct: u64, dram_blocks: u64, shape: FlashShape, admit: Admit) -> Self {
        let flash_blocks = shape.segments.saturating_mul(shape.blocks_per_segment);
        let capacity_blocks = dram_blocks.saturating_add(flash_blocks);
        let blank = Block {
            segment: NOWHERE,
            used_at: 0,
            request: 0,
            depth: 0,
            class: BlockClass::new(0, 1),
            in_dram: false,
        };
        Self {
            admit,
            dram_blocks,
            shape,
            blocks: vec![blank; distinct as usize],
            orders: vec![Orders::default()],
            shares: Shares::default(),
            tenants: Vec::new(),
            in_dram: Holdings::default(),
            on_flash: Holdings::default(),
            written: HashSet::new(),
            segments: VecDeque::from([Segment {
                opened_at: 0,
                blocks: Vec::new(),
            }]),
            oldest: 0,
            looked_up: 0,
            found: 0,
            kind: Kind::default(),
            asking: Tenant::DEFAULT,
            keep: Keep::new(&StoreShape {
                capacity_bytes: capacity_blocks.saturating_mul(shape.block_bytes),
                segments: shape.segments,
                segment_bytes: shape.payload_bytes(),
                blocks: capacity_blocks.min(distinct),
            }),
            writes: Writes::default(),
            below: None,
            offered: 0,
            taken: 0,
        }
    }

    fn block(&self, block: u32) -> &Block {
        &self.blocks[block as usize]
    }

    /// The same, shared by tenants: whose each block is, and what they weigh.
    pub(crate) fn shared(mut self, tenants: Vec<Tenant>, shares: Shares) -> Self {
        let count = tenants.iter().map(|tenant| tenant.index() + 1).max();
        self.orders.resize_with(count.unwrap_or(1), Orders::default);
        (self.tenants, self.shares) = (tenants, shares);
        self
    }

    fn tenant(&self, number: u32) -> Tenant {
        let tenant = self.tenants.get(number as usize);
        tenant.copied().unwrap_or_default()
    }

    /// The order in which a tenant's blocks in DRAM leave, of those on flash or of the others.
    fn order_of(&mut self, number: u32, segment: u64) -> &mut WorthOrder<u32> {
        let tenant = self.tenant(number);
        self.orders[tenant.index()].of(segment)
    }

    fn dram_len(&self) -> u64 {
        self.in_dram.total()
    }

    /// A block comes into DRAM, or leaves it.
    fn set_in_dram(&mut self, number: u32, in_dram: bool) {
        let tenant = self.tenant(number);
        let before = std::mem::replace(&mut self.blocks[number as usize].in_dram, in_dram);
        match (before, in_dram) {
            (false, true) => self.in_dram.add(tenant, 1),
            (true, false) => self.in_dram.take(tenant, 1),
            _ => {}
        }
    }

    /// A block comes to flash, or leaves it.
    fn set_segment(&mut self, number: u32, segment: u64) {
        let tenant = self.tenant(number);
        let before = std::mem::replace(&mut self.blocks[number as usize].segment, segment);
        match (is_on_flash(before), is_on_flash(segment)) {
            (false, true) => self.on_flash.add(tenant, 1),
            (true, false) => self.on_flash.take(tenant, 1),
            _ => {}
        }
    }

    /// A request of so many blocks uses this one: found it, or puts it.
    fn use_block(&mut self, number: u32, request: u64, depth: u32, length: usize, found: bool) {
        let before = *self.block(number);
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let class = if before.is_here() {
            let tenant = self.tenant(number);
            self.keep
                .used(u64::from(number), tenant, before.class, length)
        } else {
            let said = Said {
                tenant: self.tenant(number),
                kind: self.kind,
                ..Said::default()
            };
            self.keep.arrived(u64::from(number), &said, length)
        };
        let demand = self.keep.demand_bytes();
        // What is found on flash is read into DRAM; a put of something there is no read.
        let in_dram = before.in_dram || found || before.segment == NOWHERE;
        self.set_in_dram(number, in_dram);
        self.blocks[number as usize] = Block {
            segment: before.segment,
            used_at: demand,
            request,
            depth,
            class,
            in_dram,
        };
        if in_dram {
            let order = self.order_of(number, before.segment);
            order.touch(number, request, depth, class, demand);
        }
    }

    fn asking(&self, number: u32) -> Asking {
        let block = self.block(number);
        Asking {
            tenant: self.tenant(number),
            class: block.class,
            age: self.keep.demand_bytes() - block.used_at,
            depth: block.depth,
        }
    }

    /// A block that is neither in DRAM nor on flash any more.
    fn gone(&mut self, number: u32) {
        let class = self.block(number).class;
        self.keep.let_go(u64::from(number), class);
    }

    fn set_turnover(&mut self) {
        if let Some(oldest) = self.segments.front() {
            self.keep.set_oldest(oldest.opened_at);
        }
    }

    /// Whose block leaves DRAM next, as `asking` wants room.
    fn leaves(&self, asking: Tenant) -> Option<Tenant> {
        let candidates = (0..).zip(&self.orders).filter(|(_, it)| !it.is_empty());
        let candidates = candidates
            .filter_map(|(number, _)| Tenant::new(number))
            .fold(TenantSet::default(), TenantSet::with);
        let among = self.in_dram.holders().with(asking);
        let division = self.shares.divide_memory(self.dram_blocks, among);
        let leaves = division.leaves(asking, candidates, |tenant| self.in_dram.of(tenant));
        // Parts that are rounded down may leave all of them within.
        leaves.or_else(|| division.furthest(candidates, |tenant| self.in_dram.of(tenant)))
    }

    /// DRAM lets go until it holds what it may.
    fn shrink_dram(&mut self, asking: Tenant) {
        while self.dram_len() > self.dram_blocks {
            let Some(tenant) = self.leaves(asking) else {
                return;
            };
            let (voice, now) = (self.keep.reuse().of(tenant), self.keep.demand_bytes());
            let orders = &mut self.orders[tenant.index()];
            if let Some(copy) = orders.copies.pop_least(voice, now) {
                self.set_in_dram(copy.key, false);
                if self.block(copy.key).segment == BELOW {
                    self.set_segment(copy.key, NOWHERE);
                    self.gone(copy.key);
                }
                continue;
            }
            let Some(least) = orders.unwritten.pop_least(voice, now) else {
                return;
            };
            self.set_in_dram(least.key, false);
            self.decide_about(tenant, &least);
        }
    }

    /// A block that flash does not hold has left DRAM.
    fn decide_about(&mut self, tenant: Tenant, least: &Candidate<u32>) {
        self.set_turnover();
        let asking = self.asking(least.key);
        let is_chain = self.written.contains(&least.request);
        if is_chain || self.keep.is_worth(&asking) {
            self.written.insert(least.request);
            let unwritten = &self.orders[tenant.index()].unwritten;
            let rest: Vec<u32> = unwritten.of_request(least.request).collect();
            self.append(least.key);
            rest.into_iter()
                .for_each(|block| self.write_resident(block));
        } else {
            self.goes_down(least.key);
            self.gone(least.key);
        }
    }

    /// Writes a block that stays in DRAM, too.
    fn write_resident(&mut self, number: u32) {
        if !self.order_of(number, NOWHERE).remove(&number) {
            return;
        }
        self.append(number);
        let block = *self.block(number);
        let order = self.order_of(number, block.segment);
        order.touch(
            number,
            block.request,
            block.depth,
            block.class,
            block.used_at,
        );
    }

    /// Writes a block that is not on flash. A full open segment is sealed first, the free one
    /// opened, and the oldest reclaimed, which makes it the free one.
    fn append(&mut self, number: u32) {
        while self.open_is_full() {
            self.segments.push_back(Segment {
                opened_at: self.keep.demand_bytes(),
                blocks: Vec::new(),
            });
            if self.segments.len() as u64 > self.shape.segments {
                self.reclaim();
            }
        }
        self.writes.put += 1;
        self.place(number);
    }

    fn open_is_full(&self) -> bool {
        self.segments
            .back()
            .is_none_or(|open| open.blocks.len() as u64 >= self.shape.blocks_per_segment)
    }

    fn place(&mut self, number: u32) {
        let position = self.oldest + self.segments.len() as u64 - 1;
        if let Some(open) = self.segments.back_mut() {
            open.blocks.push(number);
            self.set_segment(number, position);
        }
    }

    fn reclaim(&mut self) {
        self.set_turnover();
        let number = self.oldest;
        let Some(segment) = self.segments.pop_front() else {
            return;
        };
        self.oldest += 1;
        let capacity = self
            .shape
            .segments
            .saturating_mul(self.shape.blocks_per_segment);
        let mut losses = Losses::new(&self.shares, capacity, &self.on_flash);
        let is_shared = self.on_flash.holders().len() > 1;
        let mut live = Vec::new();
        for block in segment.blocks {
            let Block { segment, depth, .. } = *self.block(block);
            if segment != number {
                continue;
            }
            let waits_in_dram = !is_shared && self.below.is_none();
            if waits_in_dram && self.order_of(block, number).remove(&block) {
                // DRAM has it: whether it is written again is decided when it leaves.
                self.set_segment(block, NOWHERE);
                let Block {
                    used_at,
                    request,
                    class,
                    ..
                } = *self.block(block);
                let order = self.order_of(block, NOWHERE);
                order.touch(block, request, depth, class, used_at);
                continue;
            }
            losses.announce(self.tenant(block), 1);
            let worth = self.keep.worth(&self.asking(block));
            live.push((worth, Reverse(depth), Reverse(block)));
        }
        live.sort_by(|a, b| b.0.total_cmp(&a.0).then((b.1, b.2).cmp(&(a.1, a.2))));
        self.keep.keeper_mut().begin_reclaim();
        for (worth, _, Reverse(block)) in live {
            let tenant = self.tenant(block);
            let bytes = self.shape.block_bytes;
            let is_entitled = losses.is_entitled(tenant, 1);
            let was_copy = self.order_of(block, number).remove(&block);
            self.set_segment(block, NOWHERE);
            // A reclaim that frees nothing would never end, as where a block fills a segment. What
            // DRAM has, too, waits there, but for what must stay (and above another tier, which it
            // goes to now, where the write budget has plenty).
            let waits = was_copy && (self.below.is_none() || self.admit == Admit::ByWorth);
            let stays = !self.open_is_full()
                && if is_entitled {
                    self.keep.keeper_mut().keeps_entitled(bytes)
                } else {
                    !waits && self.keep.keeper_mut().keeps(worth, bytes)
                };
            if stays {
                self.writes.again += 1;
                self.place(block);
            } else {
                losses.lost(tenant, 1);
                if self.goes_down(block) && was_copy {
                    self.set_segment(block, BELOW);
                }
            }
            let Block {
                segment,
                used_at,
                request,
                depth,
                class,
                ..
            } = *self.block(block);
            if was_copy {
                let order = self.order_of(block, segment);
                order.touch(block, request, depth, class, used_at);
            } else if !stays {
                self.gone(block);
            }
        }
        self.keep.end_reclaim();
    }
}

impl Store for LearnedModel {
    fn set_traffic_class(&mut self, traffic_class: u8) {
        self.kind = Kind::of(traffic_class);
    }

    fn lookup(&mut self, blocks: &[u32], request: u64) -> usize {
        self.looked_up = blocks.len();
        if let Some(first) = blocks.first() {
            self.asking = self.tenant(*first);
        }
        let hits = blocks
            .iter()
            .take_while(|block| self.block(**block).is_here())
            .count();
        for (depth, block) in blocks[..hits].iter().enumerate() {
            self.use_block(*block, request, depth as u32, blocks.len(), true);
        }
        self.found = hits;
        hits
    }

    fn put(&mut self, blocks: &[u32], depth: usize, request: u64) {
        let length = self.looked_up.max(depth + blocks.len());
        if let Some(first) = blocks.first() {
            self.asking = self.tenant(*first);
        }
        for (depth, block) in (depth as u32..).zip(blocks) {
            self.use_block(*block, request, depth, length, false);
        }
        let used = (self.found + blocks.len()) as u64;
        self.keep
            .demanded(used.saturating_mul(self.shape.block_bytes));
        if self.admit == Admit::All {
            blocks.iter().for_each(|block| self.write_resident(*block));
        }
        self.shrink_dram(self.asking);
    }

    fn writes(&self) -> Writes {
        self.writes
    }
}

#[cfg(test)]
mod tests;
