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
use kvar_base::{BlockId, MissReason, PutOutcome};

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
                kind: crate::layout::RECORD_TOMBSTONE,
                id: *id,
                token,
            });
        }
        self.counters.removed += found;
        self.start_controls(token, ids.len() as u64, found);
    }

    pub(crate) fn purge(&mut self, token: u64) {
        let on_flash_alone = self.index.len() as u64
            - self
                .dram
                .iter()
                .filter(|(id, _)| self.index.find(id).is_some())
                .count() as u64;
        let ids = self.dram.in_order(|_, _| true);
        let found = on_flash_alone + ids.len() as u64;
        for id in &ids {
            self.forget_resident(id);
        }
        self.dram.clear();
        self.index.clear();
        self.counters.leased_removed += self.leases.lost_all(&self.segments);
        let mut reading: Vec<_> = self
            .reading
            .keys()
            .chain(self.parts.keys().map(|(id, _)| id))
            .copied()
            .collect();
        reading.sort_unstable();
        reading.dedup();
        for id in reading {
            self.end_reads(&id, MissReason::Removed);
        }
        self.counters.purged += found;
        let id = BlockId::new([0; 32]);
        self.controls.push_back(Control {
            kind: crate::layout::RECORD_PURGE,
            id,
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
