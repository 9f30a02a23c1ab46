//! Readers that wait for a block which a writer has announced.
//!
//! ```text
//!   get, waiting ── absent, and being filled ──> waits ── put_commit ──> read as any other
//!                                                  │ ──── put_abort, or refused ──> Miss(absent)
//!                                                  └ ──── its deadline ──> Miss(deadline)
//! ```
//!
//! What must always be true: whoever waits is woken by the end of the put, however it ends, before
//! anything else is asked of the shard; nobody waits for a block that nobody fills, nor twice; there
//! are so many of them at most.
//!
//! Left to others: when a put ends (`put`), and a reader's deadline as its link keeps it: what is
//! done about it here only frees the place.

use super::types::ReadHints;
use super::{Reader, Shard};
use kvar_base::FastMap;
use kvar_base::{BlockId, MissReason, Moment};

/// Readers that wait at a time: as many as four links have requests. One more is told that the block
/// is not there.
pub(super) const AWAITING_MAX: usize = 1024;

/// Who waits for which block.
#[derive(Default)]
pub(super) struct Awaited {
    readers: FastMap<BlockId, Vec<Reader>>,
    count: usize,
    /// The earliest of their deadlines, or one before it.
    next_end: Option<Moment>,
}

impl Awaited {
    /// How many wait.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// When the first of them has waited long enough, or before.
    pub(super) fn next_end(&self) -> Option<Moment> {
        self.next_end
    }
}

impl Shard {
    /// Has a reader wait for a block that is being filled; whether it does.
    pub(super) fn wait_announced(&mut self, now: Moment, reader: &Reader) -> bool {
        let request = &reader.request;
        let is_filled = self.filling.get(&request.id);
        if is_filled.is_none_or(|(_, until)| *until <= now) || self.awaited.count >= AWAITING_MAX {
            return false;
        }
        let awaited = &mut self.awaited;
        awaited.count += 1;
        let end = request.deadline;
        awaited.next_end = Some(awaited.next_end.map_or(end, |next| next.min(end)));
        let readers = awaited.readers.entry(request.id).or_default();
        readers.push(reader.clone());
        self.counters.waited_reads += 1;
        true
    }

    /// A put of this block is over: whoever waited for it reads, or is told.
    pub(super) fn end_awaited(&mut self, now: Moment, id: &BlockId) {
        if self.awaited.count == 0 {
            return;
        }
        let readers = self.awaited.readers.remove(id).unwrap_or_default();
        self.awaited.count -= readers.len();
        for reader in readers {
            let hints = ReadHints {
                waits: false,
                ..reader.hints
            };
            self.get(now, Reader { hints, ..reader });
        }
    }

    /// Frees the places of those whose deadline has passed.
    pub(super) fn tidy_awaited(&mut self, now: Moment) {
        if self.awaited.next_end.is_none_or(|next| next > now) {
            return;
        }
        let mut late = Vec::new();
        let mut next: Option<Moment> = None;
        self.awaited.readers.retain(|_, readers| {
            readers.retain(|reader| {
                let end = reader.request.deadline;
                if end <= now {
                    late.push(reader.token);
                } else {
                    next = Some(next.map_or(end, |next| next.min(end)));
                }
                end > now
            });
            !readers.is_empty()
        });
        self.awaited.next_end = next;
        self.awaited.count -= late.len();
        for token in late {
            self.miss(token, MissReason::Deadline);
        }
    }
}
