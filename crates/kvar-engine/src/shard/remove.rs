//! Blocks go because somebody says so; and the call that asks for a flush.
//!
//! ```text
//!  remove, purge ── gone from memory and index, reads end ── control queued ── flushed ──> Done
//!  flush ────────── the puts acknowledged before it ──────────────────────── flushed ──> Done
//! ```
//!
//! What must always be true: what is removed is a miss from this call on, and stays one after a
//! crash once the answer is given. Hence every remove is recorded, also of an id nothing is known
//! of: an older record may still stand on the device.
//!
//! Left to others: recording the control (`write`) and answering (`sync`).

use super::Shard;
use super::sync::FlushWaiter;
use super::types::Event;
use super::write::Control;
use crate::layout::{RECORD_PURGE, RECORD_TENANT_PURGE, RECORD_TOMBSTONE};
use kvar_base::{BlockId, MissReason, PutOutcome};
use kvar_policy::Tenant;

impl Shard {
    pub(crate) fn remove(&mut self, token: u64, ids: &[BlockId]) {
        let mut found = 0;
        for id in ids {
            let was_resident = self.forget_resident(id);
            let was_indexed = self.index.remove(id).is_some();
            found += u64::from(was_resident || was_indexed);
            self.end_reads(id, MissReason::Removed);
            self.counters.leased_removed += u64::from(self.lose_lease(id));
            // Also when nothing is known of it: an older record may still stand on the device,
            // and would come back at the next recovery.
            self.controls.push_back(Control {
                kind: RECORD_TOMBSTONE,
                id: *id,
                tenant: Tenant::DEFAULT,
                token,
            });
        }
        self.counters.removed += found;
        self.start_controls(token, ids.len() as u64, found);
    }

    /// Forgets all blocks of a tenant, or of all. Cost: for one of several the whole index.
    pub(crate) fn purge(&mut self, token: u64, whose: Option<Tenant>) {
        let is_concerned = |tenant: Tenant| whose.is_none_or(|whose| whose == tenant);
        let ids = self
            .dram
            .in_order(|_, resident| is_concerned(resident.hints.tenant));
        let in_both = ids.iter().filter(|id| self.index.find(id).is_some());
        let in_memory_alone = (ids.len() - in_both.count()) as u64;
        for id in &ids {
            self.forget_resident(id);
        }
        let holders = self.index.holdings().holders();
        let on_device = match whose {
            Some(tenant) if !holders.without(tenant).is_empty() => {
                self.index.retain(|entry| entry.tenant != tenant)
            }
            _ => {
                let all = self.index.len();
                self.index.clear();
                all
            }
        };
        self.counters.leased_removed += self.lose_purged_leases();
        self.end_reads_of(whose, MissReason::Removed);
        let found = in_memory_alone + on_device as u64;
        self.counters.purged += found;
        self.controls.push_back(Control {
            kind: whose.map_or(RECORD_PURGE, |_| RECORD_TENANT_PURGE),
            id: BlockId::new([0; 32]),
            tenant: whose.unwrap_or_default(),
            token,
        });
        self.start_controls(token, 1, found);
    }

    pub(crate) fn flush(&mut self, token: u64) {
        // What waits to be decided about, and what was worth no place, is asked for now.
        self.flush_waiters.push(FlushWaiter {
            token,
            up_to_put: self.next_put - 1,
        });
        if self.trouble.gave_up() {
            // What was given up is not flushed: it is tried once more, and the answer says how
            // that went.
            self.retry_given_up = true;
        } else {
            self.queue_memory_alone(self.now);
            self.answer_flushes();
        }
    }

    /// Drops a resident and what waits for it to be flushed.
    pub(super) fn forget_resident(&mut self, id: &BlockId) -> bool {
        let Some(gone) = self.dram.remove(id) else {
            return false;
        };
        if let Some(token) = self.unflushed.end(gone.number) {
            self.events.push(Event::Put {
                token,
                outcome: PutOutcome::Stored,
            });
        }
        true
    }
}
