//! Memory that another process fills, handed out in parts: the reader's side of a staging region.
//!
//! ```text
//!   Region::received ── take(len) ──> Slot ── the other process fills it ──> read in place
//!                          ^            └─ dropped, and all that keeps it ─┐
//!                          └──────────── room again <──────────────────────┘
//! ```
//!
//! What must always be true:
//! * two slots never overlap, and a part is given out again only when its slot is gone, and everything
//!   that was made to [keep](Slot::keep) it;
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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Parts begin on a page, as blocks do where they come from.
const ALIGN_BYTES: usize = 4096;

/// See the module.
pub struct Region {
    map: MmapRaw,
    free: Mutex<Free>,
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
            part: Arc::new(part),
            len,
        })
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

/// What a slot and its keepers hold together.
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
    part: Arc<Part>,
    len: usize,
}

/// Keeps a slot's memory from being given out again, and mapped; no way to it.
pub struct Kept(#[expect(dead_code, reason = "it is held, not used")] Arc<Part>);

impl Slot {
    /// Where it begins in its region.
    #[must_use]
    pub fn at(&self) -> usize {
        self.part.at
    }

    /// Whether it is of this region.
    #[must_use]
    pub fn is_of(&self, region: &Arc<Region>) -> bool {
        Arc::ptr_eq(&self.part.region, region)
    }

    /// Something that keeps its memory when it is gone: for whoever has a raw pointer there.
    #[must_use]
    pub fn keep(&self) -> Kept {
        Kept(Arc::clone(&self.part))
    }
}

impl Deref for Slot {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the part lies inside the mapping (`take`), which lives as long as `self` and
        // cannot shrink (seals, checked where it came in). No other slot overlaps it, so this process
        // reaches it through `self` alone (a keeper has no way to it). The other process writes there
        // while it was asked to and has not said that it is done, and as long as that lasts whoever
        // asked holds the slot and does not look (the module); any byte is a u8. One that writes on
        // all the same can change what a reader sees, as whoever shares a mapped file can, and has the
        // key of everything that is read through it anyway.
        unsafe {
            std::slice::from_raw_parts(self.part.region.map.as_ptr().add(self.at()), self.len)
        }
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` lends it out once.
        unsafe {
            let start = self.part.region.map.as_mut_ptr().add(self.at());
            std::slice::from_raw_parts_mut(start, self.len)
        }
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
        let kept = slots[1].keep();
        drop(slots);
        assert_eq!(region.free_bytes(), 2 * PAGE);
        assert!(region.take(2 * PAGE).is_none(), "the middle is kept");
        drop(kept);
        assert!(region.take(3 * PAGE).is_some());
        assert!(region.take(0).is_none());
        assert!(region.take(usize::MAX).is_none());
        // Memory outlives its region's last name.
        let mut slot = region.take(PAGE).unwrap();
        drop(region);
        slot.fill(3);
        assert_eq!(slot[PAGE - 1], 3);
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
