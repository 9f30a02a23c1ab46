//! Reads of one section after another: the device is asked for a stretch, and the sections behind the
//! first wait in memory until they are asked for.
//!
//! ```text
//!  get section 0 ──> one read of sections 0..4 ──> 0 is answered, 1..4 are held
//!  get section 1 ──> held: checked, answered               held ── the last one was taken ──> gone
//!         while the read is under way: waits for it             └─ too old, removed ────────> gone
//!
//!  image   | directory | 0 | 1 | 2 | 3 | 4 | 5 | ...
//!  reads   |=========================| |=======...
//! ```
//!
//! A reader that takes all blocks layer by layer would otherwise make many small reads of what lies
//! together. (Reading each block whole at its first section would make the first layer wait for all
//! the bytes of all the others.)
//!
//! What must always be true: what is held is served only for the very copy it was read from, and only
//! if the section matches its content check; what is held counts as memory, and is bounded together
//! with what is coming; a stretch that is not taken goes by itself.
//!
//! Left to others: the read itself and its failures (`sections`), whole blocks (`read`).

use super::sections::Known;
use super::{Copy, Moved, Reader, SectionRef, Shard};
use crate::dram::{Evicted, Purpose};
use crate::index::Entry;
use kvar_base::{BlockId, ContentCheck, MissReason, Moment};
use kvar_io::Shared;
use kvar_policy::Tenant;
use smallvec::SmallVec;
use std::collections::{BTreeMap, VecDeque};
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::Duration;

/// Bytes that one read of a stretch takes at least, where the block has as many: what keeps a drive at
/// its full bandwidth however many blocks there are.
pub(super) const STRETCH_BYTES: u64 = 256 << 10;
/// Of the memory for blocks so much may be held; beyond it only what is asked for is read.
const HELD_SHARE: u64 = 4;
/// How long a stretch waits to be taken: a reader that lives comes back within a layer's time.
const HELD_MAX: Duration = Duration::from_secs(2);

/// A stretch in memory.
struct Held {
    known: Arc<Known>,
    tenant: Tenant,
    padded: u64,
    /// Bytes from the start of the image to the start of the stretch.
    from: u64,
    sections: Range<u16>,
    bytes: Shared,
}

/// A stretch that is being read, and who waits for more of it.
struct Coming {
    reach: Range<u16>,
    /// Bytes that are kept free for what it brings.
    set_aside: u64,
    waiters: SmallVec<[Reader; 1]>,
}

/// What is held, and what is coming: by block and number of the read, since a block may have several
/// stretches under way.
#[derive(Default)]
pub(super) struct Ahead {
    held: BTreeMap<(BlockId, u64), Held>,
    /// In the order of their age; some are gone.
    order: VecDeque<(Moment, (BlockId, u64))>,
    bytes: u64,
    /// Bytes kept free for all that is coming.
    set_aside: u64,
    coming: BTreeMap<(BlockId, u64), Coming>,
}

impl Ahead {
    /// Stretches that are being read.
    pub(super) fn coming(&self) -> usize {
        self.coming.len()
    }

    /// Those who wait for each stretch that is being read.
    pub(super) fn waiters_mut(&mut self) -> impl Iterator<Item = &mut SmallVec<[Reader; 1]>> {
        self.coming.values_mut().map(|coming| &mut coming.waiters)
    }

    /// The same of one block's stretches.
    pub(super) fn waiters_of(
        &mut self,
        id: &BlockId,
    ) -> impl Iterator<Item = &mut SmallVec<[Reader; 1]>> {
        let coming = self.coming.range_mut(all_of(id));
        coming.map(|(_, coming)| &mut coming.waiters)
    }

    /// When the oldest stretch goes, if nobody takes it.
    pub(super) fn next_end(&self) -> Option<Moment> {
        self.order.front().map(|(since, _)| since.after(HELD_MAX))
    }
}

/// The keys of a block's stretches.
fn all_of(id: &BlockId) -> RangeInclusive<(BlockId, u64)> {
    (*id, 0)..=(*id, u64::MAX)
}

impl Shard {
    /// Answers sections from a stretch that is held, or has them wait for one that is coming; whether
    /// it did.
    pub(super) fn get_held(&mut self, reader: &Reader, entry: &Entry) -> bool {
        let (token, id) = (reader.token, &reader.request.id);
        let takes_on = entry.sectioned && reader.hints.goes_on;
        let Some(wanted) = reader.request.sections.as_ref().filter(|_| takes_on) else {
            return false;
        };
        let held = self.ahead.held.range(all_of(id));
        let found = { held }.find(|(_, held)| contains(&held.sections, wanted));
        if let Some((key, held)) = found {
            let is_of = held.known.is_of(entry);
            let copy = || cut(id, &held.known, held.from, &held.bytes, wanted);
            let copy = is_of.then(copy).flatten();
            if copy.is_none() || held.sections.end == wanted.end {
                let key = *key;
                self.drop_held(&key);
            }
            // Without one it is read again, and judged by what that brings.
            if let Some(copy) = copy {
                self.counters.flash_hits += 1;
                self.answer(token, Ok(copy));
                return true;
            }
        }
        let coming = self.ahead.coming.range(all_of(id));
        let coming = { coming }.find(|(_, coming)| contains(&coming.reach, wanted));
        let Some(key) = coming.map(|(key, _)| *key) else {
            return false;
        };
        if !self.may_join() {
            self.miss(token, MissReason::Overloaded);
        } else if let Some(coming) = self.ahead.coming.get_mut(&key) {
            coming.waiters.push(reader.clone());
            self.turns.join();
        }
        true
    }

    /// Whether so many bytes more may be held, when all that is coming has come.
    pub(super) fn may_hold(&mut self, bytes: u64) -> bool {
        self.tidy_held();
        self.ahead.bytes + self.ahead.set_aside + bytes <= self.config.dram_bytes / HELD_SHARE
    }

    /// A stretch is being read.
    pub(super) fn stretch_begun(&mut self, key: (BlockId, u64), reach: Range<u16>) {
        let coming = Coming {
            reach,
            set_aside: 0,
            waiters: SmallVec::new(),
        };
        self.ahead.coming.insert(key, coming);
    }

    /// Keeps so many bytes free for what a stretch brings, instead of what was kept for it before;
    /// none if there is no room for them.
    pub(super) fn set_aside(&mut self, key: &(BlockId, u64), bytes: u64) -> bool {
        let Some(coming) = self.ahead.coming.get_mut(key) else {
            return false;
        };
        self.ahead.set_aside -= std::mem::take(&mut coming.set_aside);
        let fits = self.may_hold(bytes);
        if fits && let Some(coming) = self.ahead.coming.get_mut(key) {
            coming.set_aside = bytes;
            self.ahead.set_aside += bytes;
        }
        fits
    }

    /// Takes those who wait for this stretch.
    pub(super) fn stretch_ended(&mut self, key: &(BlockId, u64)) -> SmallVec<[Reader; 1]> {
        let Some(coming) = self.ahead.coming.remove(key) else {
            return SmallVec::new();
        };
        self.ahead.set_aside -= coming.set_aside;
        self.turns.part(coming.waiters.len());
        coming.waiters
    }

    /// Keeps what a stretch brought beyond what was asked for; whether it does.
    pub(super) fn hold(
        &mut self,
        key: (BlockId, u64),
        tenant: Tenant,
        known: &Arc<Known>,
        (from, padded): (u64, u64),
        next: u16,
        bytes: &Shared,
    ) -> bool {
        let end = known.reach_of(next, from + padded);
        if end <= next || !self.set_aside(&key, padded) {
            return false;
        }
        let mut gone = Evicted::new();
        let (purpose, keep) = (Purpose::Read, &self.keep);
        let fits = self.dram.reserve(tenant, padded, purpose, keep, &mut gone);
        for gone in gone {
            self.evicted(&gone, false);
        }
        self.set_aside(&key, 0);
        if !fits {
            return false;
        }
        self.ahead.bytes += padded;
        self.ahead.order.push_back((self.now, key));
        let held = Held {
            known: known.clone(),
            tenant,
            padded,
            from,
            sections: next..end,
            bytes: bytes.clone(),
        };
        self.ahead.held.insert(key, held);
        true
    }

    /// Answers those who wait for what a stretch brought, from section `first` on, and what is not held
    /// for them: sections before `held_from`.
    pub(super) fn share(
        &mut self,
        key: &(BlockId, u64),
        known: &Arc<Known>,
        (from, padded): (u64, u64),
        (first, held_from): (u16, u16),
        bytes: &Shared,
    ) {
        let Some(coming) = self.ahead.coming.get_mut(key) else {
            return;
        };
        let brought = first..known.reach_of(first, from + padded);
        let mut here: SmallVec<[Reader; 1]> = SmallVec::new();
        coming.waiters.retain(|reader| {
            let wanted = reader.request.sections.as_ref();
            let is_here = wanted.is_some_and(|it| contains(&brought, it) && it.start < held_from);
            if is_here {
                here.push(reader.clone());
            }
            !is_here
        });
        self.turns.part(here.len());
        // As a rule all of them want the same, which is looked at once.
        let mut last: (Option<Range<u16>>, Option<Copy>) = (None, None);
        for reader in here {
            let wanted = reader.request.sections.clone();
            if wanted != last.0 {
                let copy = wanted
                    .as_ref()
                    .and_then(|it| cut(&key.0, known, from, bytes, it));
                last = (wanted, copy);
            }
            let copy = last.1.clone();
            if reader.request.deadline <= self.now {
                self.overdue_at_device(reader.token);
            } else if let Some(copy) = copy {
                self.counters.flash_hits += 1;
                self.answer(reader.token, Ok(copy));
            } else {
                self.get_again(reader);
            }
        }
    }

    fn drop_held(&mut self, key: &(BlockId, u64)) {
        if let Some(held) = self.ahead.held.remove(key) {
            self.ahead.bytes -= held.padded;
            self.dram.release(held.tenant, held.padded);
        }
    }

    /// Lets go of what nobody came for.
    pub(super) fn tidy_held(&mut self) {
        while let Some((since, key)) = self.ahead.order.front().copied() {
            if self.ahead.held.contains_key(&key) && since.after(HELD_MAX) > self.now {
                return;
            }
            self.ahead.order.pop_front();
            self.drop_held(&key);
        }
    }

    /// A block is gone: so is what is held of it, and whoever waits is told.
    pub(super) fn end_ahead(&mut self, id: &BlockId, reason: MissReason) {
        let held = self.ahead.held.range(all_of(id));
        let held: SmallVec<[_; 2]> = held.map(|(key, _)| *key).collect();
        held.iter().for_each(|key| self.drop_held(key));
        let coming = self.ahead.coming.range(all_of(id));
        let coming: SmallVec<[u64; 2]> = coming.map(|((_, number), _)| *number).collect();
        for number in coming {
            for waiter in self.stretch_ended(&(*id, number)) {
                self.miss(waiter.token, reason);
            }
        }
    }

    /// Blocks of which something is held.
    pub(super) fn ids_held(&self, is_concerned: impl Fn(Tenant) -> bool) -> Vec<BlockId> {
        let held = self.ahead.held.iter();
        let held = held.filter(|(_, held)| is_concerned(held.tenant));
        held.map(|((id, _), _)| *id).collect()
    }
}

fn contains(all: &Range<u16>, wanted: &Range<u16>) -> bool {
    all.start <= wanted.start && wanted.end <= all.end && !wanted.is_empty()
}

/// These sections out of a stretch, if each is what its writer said.
fn cut(
    id: &BlockId,
    known: &Arc<Known>,
    from: u64,
    bytes: &Shared,
    wanted: &Range<u16>,
) -> Option<Copy> {
    let sections = known.sections_at(wanted, from);
    let holds = |section: &SectionRef| {
        let bytes = &bytes.as_slice()[section.offset as usize..][..section.len as usize];
        ContentCheck::of(bytes, id, section.index) == section.check
    };
    sections.iter().all(holds).then(|| Copy {
        version: known.version(),
        sections,
        bytes: bytes.clone(),
        moved: Moved::default(),
    })
}
