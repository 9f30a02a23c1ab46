//! Blocks that one engine writes for another to read once, soon: kept until then, and no longer.
//!
//! ```text
//!   put ──> Awaited ── every section was read ────────────────────────> Spent
//!              │    ── its time is over (`overdue`) ────────────────────^
//!              │    ── half of memory waits (`crowded`), it ends first ──^
//!              │                          another put of the same, a handover ──> Awaited
//!              │                          another request uses it ──> Held, a block like any other
//!              ├── nothing else can leave ──> gone (`lost`)
//!              └── flush, stop ──> queued: from then on a block like any other
//!
//!   a flush and a stop also write what is Spent and was never read: somebody asked for everything
//! ```
//!
//! A reader that is split over several workers reads a block by its sections, some of them twice: it
//! was read when each of them was.
//!
//! What must always be true: an Awaited block leaves before its time only when nothing else can, or
//! when more than [`AWAITED_SHARE`] of memory waits; such blocks never keep a put from coming in.
//!
//! Left to others: the order of leaving (`dram`); what happens when its time to live is over, too: it
//! is a miss then, as any block (`expiry`).

use super::types::PutHints;
use super::{Shard, Touch};
use crate::dram::State;
use kvar_base::{BlockId, Moment};
use smallvec::{SmallVec, smallvec};
use std::ops::Range;
use std::time::Duration;

/// One part in so many of memory may wait for readers: a writer whose readers never come leaves the
/// other half to everybody else.
const AWAITED_SHARE: u64 = 2;

/// What is left of a handover.
#[derive(Clone, Debug)]
pub(crate) struct Handover {
    until: Moment,
    /// A bit for each section that nobody has read yet.
    unread: SmallVec<[u64; 2]>,
}

impl Handover {
    /// Of a block of so many sections, waited for until then.
    pub(crate) fn new(until: Moment, sections: usize) -> Self {
        let mut unread: SmallVec<[u64; 2]> = smallvec![u64::MAX; sections.div_ceil(64)];
        if let (Some(last), 1..) = (unread.last_mut(), sections % 64) {
            *last = (1 << (sections % 64)) - 1;
        }
        Self { until, unread }
    }

    pub(crate) fn until(&self) -> Moment {
        self.until
    }

    /// Sections were read (all of them: `None`); whether that was the rest.
    pub(crate) fn read(&mut self, sections: Option<Range<u16>>) -> bool {
        match sections {
            None => self.unread.clear(),
            Some(sections) => {
                for section in sections.map(usize::from) {
                    if let Some(word) = self.unread.get_mut(section / 64) {
                        *word &= !(1 << (section % 64));
                    }
                }
            }
        }
        self.is_read()
    }

    pub(crate) fn is_read(&self) -> bool {
        self.unread.iter().all(|word| *word == 0)
    }
}

impl Shard {
    /// Until when a handover put now waits for its reader.
    pub(super) fn handover_of(&self, now: Moment, told: &PutHints, sections: usize) -> Handover {
        let wait = told.ttl_s.map_or(self.config.handover_wait, |ttl_s| {
            Duration::from_secs(u64::from(ttl_s))
        });
        Handover::new(now.after(wait), sections)
    }

    /// Sections of an Awaited block were read.
    pub(super) fn note_read(&mut self, id: &BlockId, sections: Option<Range<u16>>) {
        self.counters.handovers_read += u64::from(self.dram.read(id, sections));
    }

    /// An Awaited block is asked for: that says nothing of blocks like it, and changes nothing but
    /// whose request it is.
    pub(super) fn touch_awaited(&mut self, id: &BlockId, touch: Touch) {
        let arrival = self.arrivals.number(touch.request);
        if let Some(resident) = self.dram.get(id) {
            let (class, used_at) = (resident.class, resident.used_at);
            self.dram.touch(id, arrival, touch.depth, class, used_at);
        }
    }

    /// A put of a visible block: one that is handed over once more waits once more.
    pub(super) fn await_again(
        &mut self,
        now: Moment,
        id: &BlockId,
        told: &PutHints,
        before: State,
    ) {
        let is_handover = matches!(before, State::Awaited | State::Spent);
        if told.handover && is_handover {
            let sections = self
                .dram
                .get(id)
                .map_or(1, |resident| resident.sections.len());
            let handover = self.handover_of(now, told, sections);
            self.dram.await_again(id, handover);
        }
    }

    /// Time has passed, or another handover came.
    pub(super) fn end_waits(&mut self, now: Moment) {
        let most = self.dram.limit_bytes() / AWAITED_SHARE;
        while let Some((until, id)) = self.dram.first_awaited() {
            if until <= now {
                self.counters.handovers_overdue += 1;
            } else if self.dram.awaited_bytes() > most {
                self.counters.handovers_crowded += 1;
            } else {
                return;
            }
            self.dram.set_state(&id, State::Spent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_read_when_each_of_its_sections_was() {
        for sections in [1, 2, 63, 64, 65, 128, 1008_u16] {
            let mut handover = Handover::new(Moment(5), usize::from(sections));
            for section in (0..sections).rev() {
                // Twice the same is no more than once; what there is not is nothing.
                assert!(!handover.clone().read(Some(0..0)));
                assert!(!handover.read(Some(sections..sections + 200)), "{sections}");
                let is_read = handover.read(Some(section..section + 1));
                assert_eq!(is_read, section == 0, "{section} of {sections}");
            }
            let mut handover = Handover::new(Moment(5), usize::from(sections));
            assert!(handover.clone().read(Some(0..sections)));
            assert!(handover.read(None));
        }
    }
}
