//! A device that refuses writes.
//!
//! ```text
//!  well ── refused ──> left alone for a while ── tried again, refused ──> given up
//!    ▲                        │ answers                                      │ answers
//!    └────────────────────────┴────────── what was given up is queued again ─┘
//! ```
//!
//! What a device refuses stays in memory: the blocks are queued again, and when the trouble lasts
//! they become Volatile (readable, evictable, lost with the process) until the device answers.
//!
//! What must always be true: when it lasts, nobody waits for this device (who waits is told why),
//! and memory does not fill up with blocks that cannot leave.
//!
//! Left to others: reads, which go on; what a failed payload write (`write`), sync (`sync`) or
//! header (`prepare`) puts back.

use super::Shard;
use super::types::Event;
use super::write::Source;
use crate::dram::State;
use kvar_base::{Moment, PutOutcome, Refusal};
use kvar_io::DeviceError;
use std::time::Duration;

/// How long the device is left alone after it refused writes.
const TROUBLE_PAUSE: Duration = Duration::from_secs(5);
/// Refusals in a row after which what is dirty may leave memory unwritten.
const TROUBLE_MAX: u32 = 3;

/// What the device refused lately.
#[derive(Default)]
pub(super) struct Trouble {
    failures_in_a_row: u32,
    /// It refused records: that it takes payload meanwhile is no end of it, or who waits for a flush would
    /// wait for ever.
    pub(super) of_records: bool,
    pub(super) until: Option<Moment>,
    reason: Option<String>,
}

impl Trouble {
    /// Whether it lasted so long that blocks were given up.
    pub(super) fn gave_up(&self) -> bool {
        self.failures_in_a_row >= TROUBLE_MAX
    }

    /// Whether the device took the last write.
    pub(super) fn is_over(&self) -> bool {
        self.failures_in_a_row == 0
    }

    pub(super) fn reason(&self) -> Option<String> {
        self.reason.clone()
    }
}

impl Shard {
    /// The device took payload, or a header.
    pub(super) fn device_takes(&mut self) {
        if !self.trouble.of_records {
            self.device_answers();
        }
    }

    /// The device took records and flushed them.
    pub(super) fn device_answers(&mut self) {
        self.retry_given_up |= self.trouble.gave_up();
        self.trouble = Trouble::default();
    }

    pub(crate) fn device_refused(&mut self, now: Moment, error: &DeviceError) {
        self.counters.device_write_errors += 1;
        self.trouble.failures_in_a_row += 1;
        self.trouble.until = Some(now.after(TROUBLE_PAUSE));
        self.trouble.reason = Some(error.to_string());
        if self.trouble.failures_in_a_row < TROUBLE_MAX {
            return;
        }
        // It lasts: nothing may wait for this device, and memory must not fill up with blocks that
        // cannot leave.
        for item in std::mem::take(&mut self.dirty) {
            if let Source::Put { number, .. } = item.source
                && self
                    .dram
                    .get(&item.id)
                    .is_some_and(|resident| resident.number == number)
            {
                self.dram.set_state(&item.id, State::Volatile);
            }
            if let Source::Put { number, .. } = item.source {
                self.give_up_put(number);
            }
        }
        self.dirty_bytes = 0;
        for control in std::mem::take(&mut self.controls) {
            self.fail_control(control.token);
        }
        let reason = error.to_string();
        for waiter in std::mem::take(&mut self.flush_waiters) {
            self.events.push(Event::Done {
                token: waiter.token,
                result: Err(reason.clone()),
            });
        }
    }

    /// A put that will not be flushed.
    pub(super) fn give_up_put(&mut self, number: u64) {
        if let Some(token) = self.unflushed.end(number) {
            self.events.push(Event::Put {
                token,
                outcome: PutOutcome::Refused(Refusal::Busy),
            });
        }
    }

    pub(super) fn fail_control(&mut self, token: u64) {
        if self.control_counts.remove(&token).is_some() {
            let reason = self
                .trouble
                .reason
                .clone()
                .unwrap_or_else(|| "the device refused the write".into());
            self.events.push(Event::Done {
                token,
                result: Err(reason),
            });
        }
    }

    /// What is in memory alone, decided about or not, is queued.
    pub(super) fn queue_memory_alone(&mut self, now: Moment) {
        if !self.dram.has_alone() {
            return;
        }
        let alone = self.dram.in_order(|_, resident| resident.is_alone());
        self.counters.admitted_asked += alone.len() as u64;
        for id in alone {
            self.queue_resident(now, &id);
        }
    }

    /// What is in memory alone, because it waits to be decided about, or reclaim, the index or a
    /// device in trouble gave it up, is queued.
    pub(super) fn queue_given_up(&mut self, now: Moment) {
        let index = &self.index;
        // What waits for one reader is written when somebody wants everything to be, not before.
        let is_asked = self.shutdown.is_some() || !self.flush_waiters.is_empty();
        let volatile = self.dram.in_order(|id, resident| {
            let may_leave = match resident.state {
                State::Volatile | State::Held | State::Clean => true,
                State::Awaited => is_asked,
                State::Spent => is_asked && resident.is_unread(),
                State::Dirty | State::Writing => false,
            };
            let is_safe = resident.ephemeral || resident.is_below;
            may_leave && !is_safe && index.find(id).is_none()
        });
        for id in volatile {
            let decided = self.dram.get(&id).map(|resident| resident.state);
            match decided {
                // Nobody asked: it is decided about as before the trouble.
                Some(State::Volatile) if !is_asked => self.dram.set_state(&id, State::Held),
                Some(State::Held) if !is_asked => {}
                _ => self.queue_resident(now, &id),
            }
        }
    }
}
