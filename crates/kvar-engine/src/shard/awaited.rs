//! Those who wait for a block which a writer has announced.
//!
//! ```text
//!   await ── absent, and being filled ──> waits ── put_commit, put_abort ──> told
//!     │                                     └───── its deadline, it has gone ──> told
//!     └── visible, or nobody fills it, or too many wait ──> told at once
//! ```
//!
//! Who is told looks for itself: nothing is read here. A read at the commit would be for who may have gone
//! meanwhile, of a block that is handed over to be read once, and of bytes for which the reader has no room.
//!
//! What must always be true: whoever waits is told once, and by the end of the put at the latest, however it
//! ends; nobody waits for a block that nobody fills; there are so many of them at most, and one asker
//! leaves as many places as it takes.
//!
//! Left to others: when a put ends (`put`).

use super::{Event, Shard};
use kvar_base::FastMap;
use kvar_base::{BlockId, Moment};

/// Waiting at a time: as many as four links have requests. One more is told at once.
const AWAITING_MAX: usize = 1024;

struct Waiting {
    asker: u64,
    token: u64,
    until: Moment,
}

/// Who waits for which block.
#[derive(Default)]
pub(super) struct Awaited {
    waiting: FastMap<BlockId, Vec<Waiting>>,
    count: usize,
    by_asker: FastMap<u64, usize>,
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
        self.next_end.filter(|_| self.count > 0)
    }

    /// Whether one more of this asker may wait: it leaves free as many places as it has.
    fn has_place(&self, asker: u64) -> bool {
        let own = self.by_asker.get(&asker).copied().unwrap_or_default();
        own < AWAITING_MAX.saturating_sub(self.count)
    }

    fn add(&mut self, id: BlockId, waiting: Waiting) {
        self.count += 1;
        *self.by_asker.entry(waiting.asker).or_default() += 1;
        let end = waiting.until;
        self.next_end = Some(self.next_end.map_or(end, |next| next.min(end)));
        self.waiting.entry(id).or_default().push(waiting);
    }

    /// Takes those who wait for one block, or for any, and are done.
    fn take(&mut self, of: Option<&BlockId>, is_done: impl Fn(&Waiting) -> bool) -> Vec<Waiting> {
        let mut done = Vec::new();
        let mut take = |waiting: &mut Vec<Waiting>| {
            done.extend(waiting.extract_if(.., |one| is_done(one)));
            !waiting.is_empty()
        };
        match of {
            Some(id) => {
                if self.waiting.get_mut(id).is_some_and(|all| !take(all)) {
                    self.waiting.remove(id);
                }
            }
            None => self.waiting.retain(|_, all| take(all)),
        }
        self.count -= done.len();
        for one in &done {
            if let Some(own) = self.by_asker.get_mut(&one.asker) {
                *own -= 1;
                if *own == 0 {
                    self.by_asker.remove(&one.asker);
                }
            }
        }
        done
    }
}

impl Shard {
    /// Has somebody wait for a block that is being filled.
    pub(crate) fn await_put(
        &mut self,
        now: Moment,
        (asker, token): (u64, u64),
        id: &BlockId,
        until: Moment,
    ) {
        let is_filled = self.filling.get(id).is_some_and(|(_, until)| *until > now);
        let waits = is_filled && until > now && self.visible(now, id).is_err();
        if !waits || !self.awaited.has_place(asker) {
            return self.events.push(Event::Awaited { token });
        }
        let waiting = Waiting {
            asker,
            token,
            until,
        };
        self.awaited.add(*id, waiting);
        self.counters.waited_reads += 1;
    }

    /// A put of this block is over: whoever waited for it is told.
    pub(super) fn end_awaited(&mut self, id: &BlockId) {
        let over = self.awaited.take(Some(id), |_| true);
        self.tell_awaited(over);
    }

    /// Frees the places of those whose deadline has passed.
    pub(super) fn tidy_awaited(&mut self, now: Moment) {
        if self.awaited.next_end().is_none_or(|next| next > now) {
            return;
        }
        let mut late = self.awaited.take(None, |one| one.until <= now);
        let left = self.awaited.waiting.values().flatten();
        self.awaited.next_end = left.map(|one| one.until).min();
        // The order of a map is its own affair; that of answers is not.
        late.sort_unstable_by_key(|one| one.token);
        self.tell_awaited(late);
    }

    /// One who waits has gone; whether it was here.
    pub(super) fn forget_awaited(&mut self, id: &BlockId, token: u64) -> bool {
        let gone = self.awaited.take(Some(id), |one| one.token == token);
        let was_here = !gone.is_empty();
        self.tell_awaited(gone);
        was_here
    }

    fn tell_awaited(&mut self, over: Vec<Waiting>) {
        let told = over.into_iter();
        self.events
            .extend(told.map(|Waiting { token, .. }| Event::Awaited { token }));
    }
}
