//! What a use says of a block, and which blocks get a place on the device.
//!
//! ```text
//!  put ── durable, or the budget has plenty ──> queued: on the device within flush_after
//!   │                         ┌─> Held ── the budget has plenty again ──> queued
//!   └──── the budget is short ┘    └── an eighth of memory is short of what could leave at once
//!                                            └── least worth first ── worth a place? room? ── yes ──> queued
//!                                                                         └── no ──> Volatile    with the Held
//!                                                     (to a tier below: `let_down`)              rest of its prompt
//!  flush, shutdown ── all that memory alone holds ──> queued      handover: not here (`handover`)
//! ```
//!
//! What must always be true: what is Held or Volatile is in memory alone and nobody was promised
//! more; what was asked for is written whatever the budget says; a put never waits for a decision
//! (memory that is full of undecided blocks lets the least of them go, counted).
//!
//! Left to others: the figures (`Keep` and `WriteBudget` of kvar-policy), the order in which
//! memory lets go (`dram`), what reclaim keeps (`reclaim`). A block that was worth no place and is
//! used again becomes Held again.

use super::{Change, PutHints, Shard};
use crate::dram::{Gone, State};
use crate::index::Entry;
use crate::layout::RecordHints;
use kvar_base::{BlockId, Moment, page_round_up};
use kvar_policy::{Asking, BlockClass, Candidate, Kind, SWEEP_TICKS, Said, Tenant, TenantSet};
use std::time::Duration;

/// The part of memory that is kept for what can leave at once: writes on their way and copies of
/// what is on the device.
const AHEAD_SHARE: u64 = 8;
/// Buckets that one step looks at, some 20 us: a tick of a large index is spread over many steps.
const SWEEP_BUCKETS_MAX: usize = 2048;
/// Requests of which something was written, remembered so that the rest follows.
const WRITTEN_KEPT: usize = 256;

/// What the policy calls a block: ids are keyed hashes, so any eight bytes will do.
pub(super) fn short(id: &BlockId) -> u64 {
    u64::from_le_bytes(id.as_bytes()[..8].try_into().expect("eight bytes"))
}

impl Shard {
    /// A tenant's block was used by a request of so many blocks: its class from now on.
    pub(super) fn used(
        &mut self,
        id: &BlockId,
        tenant: Tenant,
        before: BlockClass,
        request_blocks: u32,
    ) -> BlockClass {
        self.keep.used(short(id), tenant, before, request_blocks)
    }

    /// A block came in that was not visible; its class, from its use and from what was said of it.
    pub(super) fn arrived(&mut self, id: &BlockId, told: &PutHints, bytes: u64) -> BlockClass {
        let blocks = self.arrivals.blocks(told.request, told.depth);
        let kind = Kind::of(told.class);
        if told.handover {
            // Its one read, soon, says nothing of the blocks that look like it.
            return BlockClass::new(0, blocks).of_kind(kind);
        }
        let said = Said {
            tenant: told.tenant,
            kind,
            recompute_us: told.recompute_us,
            bytes,
        };
        self.keep.arrived(short(id), &said, blocks)
    }

    /// A block left memory for want of room.
    pub(super) fn evicted(&mut self, gone: &Gone, fragmented: bool) {
        let id = gone.id;
        let its = &mut self.by_tenant[gone.tenant.index()];
        match gone.state {
            _ if gone.is_below => {
                its.left_memory += 1;
                self.counters.dram_evicted_clean += 1;
                self.keep.let_go(short(&id), gone.class);
            }
            State::Clean => {
                its.left_memory += 1;
                self.counters.dram_evicted_clean += 1;
            }
            State::Awaited => {
                its.evicted += 1;
                self.counters.evicted_awaited += 1;
            }
            State::Spent => self.counters.evicted_spent += 1,
            state => {
                its.evicted += 1;
                self.counters.dram_evicted_gone += 1;
                self.counters.evicted_ephemeral += u64::from(gone.ephemeral);
                self.counters.evicted_undecided +=
                    u64::from(state == State::Held && !gone.ephemeral);
                self.keep.let_go(short(&id), gone.class);
            }
        }
        self.note(Change::Uncached { id, fragmented });
    }

    /// The device does not hold a block any more, nor does memory.
    pub(super) fn let_go(&mut self, id: &BlockId, class: BlockClass) {
        self.keep.let_go(short(id), class);
    }

    /// Time for the write budget: since `Moment(0)`.
    pub(super) fn budget_time(now: Moment) -> Duration {
        Duration::from_micros(now.0)
    }

    /// Decides about the Held blocks that are worth least while what cannot leave at once takes
    /// more than its part of memory; and writes them while the budget has plenty.
    pub(super) fn decide_ahead(&mut self, now: Moment) {
        while self.dram.held_bytes() > 0 && self.trouble.is_over() {
            let Some(least) = self.dram.least_held(&self.keep) else {
                break;
            };
            let bytes = self.resident_bytes(&least.key);
            if !self.budget.has_plenty(bytes, Self::budget_time(now)) {
                break;
            }
            self.counters.admitted_budget += 1;
            self.queue_resident(now, &least.key);
        }
        let limit = self.dram.limit_bytes();
        while self.dram.waiting_bytes() > limit - limit / AHEAD_SHARE {
            let Some(least) = self.dram.least_held(&self.keep) else {
                return;
            };
            self.decide_about(now, &least);
        }
    }

    fn decide_about(&mut self, now: Moment, least: &Candidate<BlockId>) {
        let oldest = self.segments.sealed.front().copied();
        if let Some(oldest) = oldest {
            let opened_at = self.segments.get(oldest).opened_at;
            self.keep.set_oldest(opened_at);
        }
        let resident = self.dram.get(&least.key);
        let tenant = resident.map_or(Tenant::DEFAULT, |resident| resident.hints.tenant);
        let asking = Asking {
            tenant,
            class: least.class,
            age: least.age,
            depth: least.depth,
        };
        let is_chain = self.written_requests.contains(&least.request);
        if !is_chain && !self.keep.is_worth(&asking) {
            self.counters.not_admitted += 1;
            return self.let_go_of(&least.key);
        }
        let prompt = self.dram.held_of(tenant, least.request);
        // The rest of the prompt may put the budget into debt: half a prompt is of no use.
        let bytes = self.resident_bytes(&least.key);
        if self.trouble.gave_up() || !self.budget.has_room(bytes, Self::budget_time(now)) {
            self.counters.not_admitted_limit += 1;
            return self.let_go_of(&least.key);
        }
        if !is_chain {
            if self.written_requests.len() == WRITTEN_KEPT {
                self.written_requests.pop_front();
            }
            self.written_requests.push_back(least.request);
        }
        for id in prompt {
            if id == least.key && !is_chain {
                self.counters.admitted_worth += 1;
            } else {
                self.counters.admitted_chain += 1;
            }
            self.queue_resident(now, &id);
        }
    }

    /// A block gets no place on this device, and leaves memory before those that may.
    fn let_go_of(&mut self, id: &BlockId) {
        self.dram.set_state(id, State::Volatile);
        self.let_down(id);
    }

    /// Bytes of blocks that the device holds when full.
    pub(super) fn capacity_bytes(&self) -> u64 {
        u64::from(self.superblock.segments_per_shard) * self.superblock.payload_bytes()
    }

    /// Tenants whose blocks another's must not displace; none where there is no other.
    pub(super) fn entitled_on_device(&self, than: Tenant) -> TenantSet {
        let held = self.index.holdings();
        if held.holders().without(than).is_empty() {
            return TenantSet::default();
        }
        let among = held.holders().with(than);
        let shares = &self.config.shares;
        let division = shares.divide_flash(self.capacity_bytes(), among);
        division.within(held).without(than)
    }

    /// Whether what is queued was decided to leave memory, and new blocks need its room.
    pub(super) fn memory_waits(&self) -> bool {
        let is_decided = self.dram.held_bytes() > 0;
        is_decided && self.dram.waiting_bytes() > self.dram.limit_bytes() / 2
    }

    fn resident_bytes(&self, id: &BlockId) -> u64 {
        let resident = self.dram.get(id);
        resident.map_or(0, |resident| resident.image.padded_len() as u64)
    }

    /// What a place on the device is worth to a block whose segment is reclaimed.
    pub(super) fn worth_of(&self, entry: &Entry, hints: &RecordHints) -> f64 {
        let bytes = Self::demand_of(entry);
        self.keep.worth(&Asking {
            tenant: entry.tenant,
            class: entry
                .class()
                .at_cost(self.keep.cost(hints.recompute_us, bytes)),
            age: self.keep.age_bytes(entry.stamp),
            depth: hints.depth,
        })
    }

    /// Keeps old stamps from looking young: every bucket is looked at once in [`SWEEP_TICKS`], a
    /// few as each tick passes.
    pub(super) fn sweep_stamps(&mut self) {
        let stamp = self.keep.stamp();
        let ticks = stamp.wrapping_sub(self.swept_at);
        let count = self.index.bucket_count();
        if ticks != 0 {
            self.swept_at = stamp;
            let share = count.div_ceil(usize::from(SWEEP_TICKS)) * usize::from(ticks);
            self.sweep_left = (self.sweep_left + share).min(count);
        }
        if self.sweep_left == 0 {
            return;
        }
        let share = self.sweep_left.min(SWEEP_BUCKETS_MAX);
        self.sweep_left -= share;
        let (begin, end) = (self.sweep_next, self.sweep_next + share);
        let keep = &self.keep;
        self.index
            .sweep(begin..end.min(count), |stamp| keep.swept(stamp));
        if end > count {
            self.index.sweep(0..end - count, |stamp| keep.swept(stamp));
        }
        self.sweep_next = end % count.max(1);
    }

    /// Bytes that a use of a block counts for on the clock.
    pub(super) fn demand_of(entry: &Entry) -> u64 {
        page_round_up(u64::from(entry.len))
    }
}
