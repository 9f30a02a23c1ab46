//! Memory that another process fills, handed out in parts: the reader's side of a staging region.
//!
//! ```text
//!   Region::received ── take(len) ──> Slot ── the other process fills it ──> read in place
//!                          ^            │ └─ dropped, and all that is lent of it ─┐
//!                          └─ room again ─────────────────────────────────────────┘
//!                                       └──> Lender ── lend(from, len) ──> Slot, as often as it is asked
//! ```
//!
//! A *lender* is for whoever gives out raw pointers to its memory (a binding's buffer) and has parts of it
//! filled again and again. It has no way to the bytes itself.
//!
//! What must always be true:
//! * two slots never overlap, lent ones included, and a part is given out again only when its slot or its
//!   lender is gone, and everything that was lent of it; what was lent and given up is lent no more;
//! * the memory stays mapped as long as anything of it is held.
//!
//! What is left to the caller: not to give a slot up, nor look into it, while the other process may
//! still write there. Whoever asks it to holds the slot until it has said that it is done, or is gone;
//! then the slot goes down with the region.
#![allow(unsafe_code)] // slices of a shared mapping; each block says why it holds

use crate::shared::SharedMemory;
use memmap2::MmapRaw;
use std::collections::BTreeMap;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Parts begin on a page, as blocks do where they come from.
const ALIGN_BYTES: usize = 4096;

/// See the module.
pub struct Region {
    map: MmapRaw,
    free: Mutex<Free>,
    is_gone: AtomicBool,
}

struct Free {
    /// Length by start; no two touch.
    spans: BTreeMap<usize, usize>,
    bytes: usize,
}

impl Region {
    /// Maps what another process has made and sent.
    ///
    /// # Errors
    /// When the system refuses the mapping.
    pub fn received(memory: &SharedMemory) -> io::Result<Arc<Self>> {
        let map = memory.map_whole()?;
        let bytes = map.len();
        Ok(Arc::new(Self {
            map,
            free: Mutex::new(Free {
                spans: BTreeMap::from([(0, bytes)]),
                bytes,
            }),
            is_gone: AtomicBool::new(false),
        }))
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// Bytes that are not given out.
    #[must_use]
    pub fn free_bytes(&self) -> usize {
        self.lock().bytes
    }

    /// The other process is asked to write here no more: the memory stays, for who holds parts of it.
    pub fn retire(&self) {
        self.is_gone.store(true, Ordering::Relaxed);
    }

    /// A part of `len` bytes; what is in it means nothing. `None`: there is no room, or nothing is
    /// asked for.
    #[must_use]
    pub fn take(self: &Arc<Self>, len: usize) -> Option<Slot> {
        let room = len.checked_next_multiple_of(ALIGN_BYTES)?;
        if room == 0 {
            return None;
        }
        let mut free = self.lock();
        let found = free.spans.iter().find(|(_, span)| **span >= room);
        let (at, span) = found.map(|(at, span)| (*at, *span))?;
        free.spans.remove(&at);
        if span > room {
            free.spans.insert(at + room, span - room);
        }
        free.bytes -= room;
        drop(free);
        let part = Part {
            region: Arc::clone(self),
            at,
            room,
        };
        Some(Slot {
            loan: None,
            part: Arc::new(part),
            at,
            len,
        })
    }

    /// Where this place of it is mapped.
    fn start(&self, at: usize) -> *mut u8 {
        self.map.as_mut_ptr().wrapping_add(at)
    }

    fn give_back(&self, at: usize, room: usize) {
        let mut free = self.lock();
        free.bytes += room;
        let (mut start, mut len) = (at, room);
        if let Some((before, span)) = free.spans.range(..at).next_back()
            && before + span == at
        {
            (start, len) = (*before, span + len);
        }
        if let Some(behind) = free.spans.remove(&(at + room)) {
            len += behind;
        }
        free.spans.insert(start, len);
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Region({} bytes)", self.bytes())
    }
}

/// What a slot, or a lender and the slots that it lent, hold together.
struct Part {
    region: Arc<Region>,
    at: usize,
    room: usize,
}

impl Drop for Part {
    fn drop(&mut self) {
        self.region.give_back(self.at, self.room);
    }
}

/// A part of a region; reads and writes as plain bytes.
pub struct Slot {
    /// Before what it is lent from: the range is free while its memory is still held.
    loan: Option<Loan>,
    part: Arc<Part>,
    /// Where it begins in the region.
    at: usize,
    len: usize,
}

impl Slot {
    /// Where it begins in its region.
    #[must_use]
    pub fn at(&self) -> usize {
        self.at
    }

    /// Whether it is of this region.
    #[must_use]
    pub fn is_of(&self, region: &Arc<Region>) -> bool {
        Arc::ptr_eq(&self.part.region, region)
    }

    /// Nobody knows whether the other process will write here yet: whoever lent it never gets it back.
    pub fn give_up(mut self) {
        std::mem::forget(self.loan.take());
    }

    /// Gives its memory up to be lent in parts.
    #[must_use]
    pub fn into_lender(self) -> Lender {
        Lender {
            slot: self,
            lent: Arc::default(),
        }
    }
}

/// Ranges that are lent: where each begins in the region, and ends.
type Lent = Mutex<BTreeMap<usize, usize>>;

fn lock(lent: &Lent) -> MutexGuard<'_, BTreeMap<usize, usize>> {
    lent.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Loan {
    lent: Arc<Lent>,
    at: usize,
}

impl Drop for Loan {
    fn drop(&mut self) {
        lock(&self.lent).remove(&self.at);
    }
}

/// Memory of a slot that is lent in parts (see the module).
pub struct Lender {
    /// Not looked into.
    slot: Slot,
    lent: Arc<Lent>,
}

impl Lender {
    /// Where its memory begins. It is valid as long as this lives, for so many [bytes](Self::bytes). Who
    /// reads or writes there keeps to ranges that are not lent.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.slot.part.region.start(self.slot.at)
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.slot.len
    }

    /// Whether the other process may be asked to write here: the region was not [retired](Region::retire).
    #[must_use]
    pub fn is_live(&self) -> bool {
        !self.slot.part.region.is_gone.load(Ordering::Relaxed)
    }

    /// Whether nothing is lent at the moment.
    #[must_use]
    pub fn is_free(&self) -> bool {
        lock(&self.lent).is_empty()
    }

    /// These bytes of it as a slot. `None`: they lie outside, are none, or part of them is lent already.
    #[must_use]
    pub fn lend(&self, first: usize, len: usize) -> Option<Slot> {
        let inside = first.checked_add(len)? <= self.slot.len && len > 0;
        let at = self.slot.at + first;
        let mut lent = lock(&self.lent);
        let below = lent.range(..at.checked_add(len)?).next_back();
        if !inside || below.is_some_and(|(_, end)| *end > at) {
            return None;
        }
        lent.insert(at, at + len);
        drop(lent);
        Some(Slot {
            loan: Some(Loan {
                lent: Arc::clone(&self.lent),
                at,
            }),
            part: Arc::clone(&self.slot.part),
            at,
            len,
        })
    }
}

impl std::fmt::Debug for Lender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lender({} bytes at {})", self.bytes(), self.slot.at)
    }
}

impl Deref for Slot {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies inside its part (`take`, `lend`) and the mapping, which lives as long as
        // `self` and cannot shrink (seals, checked where it came in). No other slot overlaps it, so safe
        // code of this process reaches it through `self` alone; who has a lender's pointer keeps away
        // from what is lent. (The slot inside a lender is not looked into.) The other process writes there
        // while it was asked to and has not said that it is done, and as long as that lasts whoever
        // asked holds the slot and does not look (the module); any byte is a u8. One that writes on
        // all the same can change what a reader sees, as whoever shares a mapped file can, and has the
        // key of everything that is read through it anyway.
        unsafe { std::slice::from_raw_parts(self.part.region.start(self.at), self.len) }
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` lends it out once.
        unsafe { std::slice::from_raw_parts_mut(self.part.region.start(self.at), self.len) }
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slot({} bytes at {})", self.len, self.at())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd as _;

    const PAGE: usize = 4096;

    fn region(pages: usize) -> Arc<Region> {
        Region::received(&SharedMemory::create(pages * PAGE).unwrap()).unwrap()
    }

    #[test]
    fn what_the_other_side_writes_is_in_the_slot() {
        let memory = SharedMemory::begin(4 * PAGE).unwrap();
        let mut node = memory.map_untouched().unwrap();
        for page in 0..4 {
            memory.reserve(page * PAGE, PAGE).unwrap();
            node.populate(page * PAGE, PAGE);
        }
        let mut bytes = node.bytes(4 * PAGE);
        let sent = memory.as_fd().try_clone_to_owned().unwrap();
        let received = SharedMemory::received(sent, 4 * PAGE).unwrap();
        let region = Region::received(&received).unwrap();
        let _first = region.take(1).unwrap();
        let mut slot = region.take(PAGE + 5).unwrap();
        assert_eq!((slot.at(), slot.len()), (PAGE, PAGE + 5));
        assert!(slot.iter().all(|byte| *byte == 0));
        bytes.copy_in(PAGE, &vec![7; PAGE + 5]);
        assert!(slot.iter().all(|byte| *byte == 7));
        slot[0] = 9;
        let mut out = [0];
        bytes.copy_out(PAGE, &mut out);
        assert_eq!(out, [9]);
        assert!(slot.is_of(&region) && !slot.is_of(&self::region(1)));
    }

    #[test]
    fn a_part_is_given_out_again_when_nobody_keeps_it() {
        let region = region(3);
        let slots: Vec<Slot> = (0..3).map(|_| region.take(PAGE).unwrap()).collect();
        assert!(region.take(1).is_none());
        let mut slots = slots.into_iter();
        let (first, middle, last) = (slots.next(), slots.next().unwrap(), slots.next());
        drop((first, last));
        let lender = middle.into_lender();
        let lent = lender.lend(5, 10).unwrap();
        drop(lender);
        assert_eq!(region.free_bytes(), 2 * PAGE);
        assert!(
            region.take(2 * PAGE).is_none(),
            "of the middle a part is lent"
        );
        drop(lent);
        assert!(region.take(3 * PAGE).is_some());
        assert!(region.take(0).is_none());
        assert!(region.take(usize::MAX).is_none());
        // Memory outlives its region's last name.
        let mut slot = region.take(PAGE).unwrap();
        drop(region);
        slot.fill(3);
        assert_eq!(slot[PAGE - 1], 3);
    }

    #[test]
    fn no_byte_is_lent_twice_at_a_time() {
        let region = region(3);
        let _first = region.take(1).unwrap();
        let lender = region.take(PAGE + 100).unwrap().into_lender();
        let outside = [
            (PAGE + 100, 1),
            (PAGE, 101),
            (usize::MAX, 2),
            (1, usize::MAX),
        ];
        for (first, len) in outside {
            assert!(lender.lend(first, len).is_none(), "{len} bytes at {first}");
        }
        assert!(lender.lend(0, 0).is_none() && lender.is_free());
        let mut lent = lender.lend(100, 50).unwrap();
        assert_eq!((lent.at(), lent.len()), (PAGE + 100, 50));
        lent.fill(7);
        for (first, len) in [(100, 50), (149, 1), (50, 51), (0, PAGE), (120, 5)] {
            assert!(lender.lend(first, len).is_none(), "{len} bytes at {first}");
        }
        let beside = (
            lender.lend(0, 100).unwrap(),
            lender.lend(150, PAGE - 50).unwrap(),
        );
        assert!(!lender.is_free() && lender.is_live());
        drop((lent, beside));
        assert!(lender.is_free());
        // What was written is where the lender's pointer says.
        let whole = lender.lend(0, lender.bytes()).unwrap();
        assert_eq!(lender.as_ptr().cast_const(), whole.as_ptr());
        assert_eq!(
            (whole[99], whole[100], whole[149], whole[150]),
            (0, 7, 7, 0)
        );
    }

    proptest! {
        /// Any order of taking and giving back: slots lie apart, and in the end all is one piece again.
        #[test]
        fn slots_never_overlap(steps in prop::collection::vec((any::<bool>(), 0..5 * PAGE), 1..120)) {
            let region = region(16);
            let mut held: Vec<Slot> = Vec::new();
            for (takes, number) in steps {
                if takes {
                    held.extend(region.take(number));
                } else if !held.is_empty() {
                    held.swap_remove(number % held.len());
                }
                let mut spans: Vec<_> = held
                    .iter()
                    .map(|slot| (slot.at(), slot.at() + slot.len()))
                    .collect();
                spans.sort_unstable();
                prop_assert!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0));
                prop_assert!(spans.iter().all(|span| span.1 <= 16 * PAGE));
            }
            held.clear();
            prop_assert_eq!(region.free_bytes(), 16 * PAGE);
            prop_assert!(region.take(16 * PAGE).is_some());
        }
    }
}
