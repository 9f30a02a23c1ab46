//! What a use says of a block, and which blocks get a place on the device.
//!
//! ```text
//!  put ── durable, or the budget has plenty ──> queued: on the device within flush_after
//!   │                         ┌─> Held ── the budget has plenty again ──> queued
//!   └──── the budget is short ┘    └── an eighth of memory is short of what could leave at once
//!                                            └── least worth first ── worth a place? room? ── yes ──> queued
//!                                                                         └── no ──> Volatile    with the Held
//!                                                                                                rest of its prompt
//!  flush, shutdown ── all that memory alone holds ──> queued
//! ```
//!
//! What must always be true: what is Held or Volatile is in memory alone and nobody was promised
//! more; what was asked for is written whatever the budget says; a put never waits for a decision
//! (memory that is full of undecided blocks lets the least of them go, counted).
//!
//! Left to others: the figures (`Keep` and `WriteBudget` of kvar-policy), the order in which
//! memory lets go (`dram`), what reclaim keeps (`reclaim`). A block that was worth no place and is
//! used again becomes Held again.

use super::{Change, Shard};
use crate::dram::{Gone, State};
use crate::index::Entry;
use kvar_base::{BlockId, Moment, page_round_up};
use kvar_policy::{Asking, BlockClass, Candidate, SWEEP_TICKS};
use std::time::Duration;

/// The part of memory that is kept for what can leave at once: writes on their way and copies of
/// what is on the device.
const AHEAD_SHARE: u64 = 8;
/// Requests of which something was written, remembered so that the rest follows.
const WRITTEN_KEPT: usize = 256;

/// What the policy calls a block: ids are keyed hashes, so any eight bytes will do.
pub(super) fn short(id: &BlockId) -> u64 {
    u64::from_le_bytes(id.as_bytes()[..8].try_into().expect("eight bytes"))
}

impl Shard {
    /// A block was used by a request of so many blocks: its class from now on.
    pub(super) fn used(
        &mut self,
        id: &BlockId,
        before: Option<BlockClass>,
        request_blocks: u32,
    ) -> BlockClass {
        self.keep.used(short(id), before, request_blocks)
    }

    /// A block left memory for want of room.
    pub(super) fn evicted(&mut self, gone: &Gone, fragmented: bool) {
        let id = gone.id;
        if gone.is_below {
            self.counters.dram_evicted_clean += 1;
            self.keep.let_go(short(&id), gone.class);
        } else if gone.state == State::Clean {
            self.counters.dram_evicted_clean += 1;
        } else {
            self.counters.dram_evicted_gone += 1;
            self.counters.evicted_ephemeral += u64::from(gone.ephemeral);
            self.counters.evicted_undecided += u64::from(gone.state == State::Held);
            self.keep.let_go(short(&id), gone.class);
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
        while self.dram.held_bytes() > limit - limit / AHEAD_SHARE {
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
        let asking = Asking {
            class: least.class,
            age: least.age,
            depth: least.depth,
        };
        let is_chain = self.written_requests.contains(&least.request);
        if !is_chain && !self.keep.is_worth(&asking) {
            self.counters.not_admitted += 1;
            return self.dram.set_state(&least.key, State::Volatile);
        }
        let prompt = self.dram.held_of(least.request);
        // The rest of the prompt may put the budget into debt: half a prompt is of no use.
        let bytes = self.resident_bytes(&least.key);
        if self.trouble.gave_up() || !self.budget.has_room(bytes, Self::budget_time(now)) {
            self.counters.not_admitted_limit += 1;
            return self.dram.set_state(&least.key, State::Volatile);
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

    /// Whether what is queued was decided to leave memory, and new blocks need its room.
    pub(super) fn memory_waits(&self) -> bool {
        self.dram.held_bytes() > self.dram.limit_bytes() / 2
    }

    fn resident_bytes(&self, id: &BlockId) -> u64 {
        let resident = self.dram.get(id);
        resident.map_or(0, |resident| resident.image.padded_len() as u64)
    }

    /// What a place on the device is worth to a block whose segment is reclaimed.
    pub(super) fn worth_of(&self, entry: &Entry, depth: u32) -> f64 {
        self.keep.worth(&Asking {
            class: entry.class(),
            age: self.keep.age_bytes(entry.stamp),
            depth,
        })
    }

    /// Keeps old stamps from looking young: every bucket is looked at once in [`SWEEP_TICKS`], a
    /// few as each tick passes.
    pub(super) fn sweep_stamps(&mut self) {
        let stamp = self.keep.stamp();
        let ticks = stamp.wrapping_sub(self.swept_at);
        if ticks == 0 {
            return;
        }
        self.swept_at = stamp;
        let count = self.index.bucket_count();
        let share = count.div_ceil(usize::from(SWEEP_TICKS)) * usize::from(ticks);
        let (begin, end) = (self.sweep_next, self.sweep_next + share.min(count));
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
