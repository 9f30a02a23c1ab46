//! One large piece of memory that devices know, handed out in whole pages.
//!
//! A shard has one [`Arena`]: its DRAM tier, its read and write buffers, the destination of
//! received payload. A [`Buffer`] is a run of pages with one owner; [`Buffer::freeze`] makes it a
//! [`Shared`] that many may read. Pages return to the arena when the last owner drops them, on
//! whichever thread.
//!
//! Runs are found best-fit, lowest offset first, and merged with free neighbours when they come
//! back: blocks of a shard are mostly of one size, so a run that left fits the next of its kind
//! exactly. (Size-class allocators lose an eighth of the memory on block sizes between classes.)
//!
//! Memory is taken from the system when first touched; an untouched arena costs address space.
#![allow(unsafe_code)] // slices into the mapping; each block says why it holds

use kvar_base::PAGE_BYTES;
use memmap2::MmapMut;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

const PAGE: usize = PAGE_BYTES as usize;

/// A piece of device-ready memory. Clones are handles to the same piece.
#[derive(Clone)]
pub struct Arena(Arc<Inner>);

struct Inner {
    base: *mut u8,
    len: usize,
    free: Mutex<FreeRuns>,
    // Keeps `base` mapped; never touched through this field.
    _map: MmapMut,
}

// SAFETY: `base` points into `_map`, which lives as long as `Inner`. Bytes are reached only
// through `Buffer`s, whose page runs never overlap (FreeRuns hands a page out once), so threads
// never share a byte that one of them can write.
unsafe impl Send for Inner {}
// SAFETY: as above; the only shared mutable state is behind the mutex.
unsafe impl Sync for Inner {}

impl Arena {
    /// Maps `bytes` (rounded up to a page, at least one).
    ///
    /// # Errors
    /// When the system refuses the mapping.
    pub fn new(bytes: usize) -> std::io::Result<Self> {
        let len = bytes.div_ceil(PAGE).max(1) * PAGE;
        let mut map = MmapMut::map_anon(len)?;
        // Blocks are read and written whole; larger pages mean fewer misses of the address cache.
        // A system without transparent huge pages says no, which costs nothing.
        let _ = map.advise(memmap2::Advice::HugePage);
        let base = map.as_mut_ptr();
        let free = Mutex::new(FreeRuns::new(len / PAGE));
        Ok(Self(Arc::new(Inner {
            base,
            len,
            free,
            _map: map,
        })))
    }

    /// A buffer of `len` bytes, page-aligned; `None` when no run is long enough. Its bytes are
    /// whatever was there before, its padding to the page is zero.
    #[must_use]
    pub fn allocate(&self, len: usize) -> Option<Buffer> {
        let pages = len.div_ceil(PAGE).max(1);
        let first = self
            .0
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(pages)?;
        let mut buffer = Buffer {
            arena: self.clone(),
            offset: first * PAGE,
            pages,
            len,
        };
        buffer.zero_padding();
        Some(buffer)
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.len
    }

    /// Bytes handed out at the moment, in whole pages.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        let free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.len - free.pages * PAGE
    }

    /// Where the memory starts; for registering it with a ring.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.base
    }

    /// Whether `other` is a handle to the same memory.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Arena({} of {} bytes)",
            self.allocated_bytes(),
            self.bytes()
        )
    }
}

/// A run of pages with one owner.
pub struct Buffer {
    arena: Arena,
    offset: usize,
    pages: usize,
    len: usize,
}

impl Buffer {
    /// Length in bytes as asked for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it was asked for with no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Length in bytes with the padding to whole pages; what a device moves.
    #[must_use]
    pub fn padded_len(&self) -> usize {
        self.pages * PAGE
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.padded()[..self.len]
    }

    /// The bytes, to write.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let len = self.len;
        &mut self.padded_mut()[..len]
    }

    /// The bytes and their padding.
    #[must_use]
    pub fn padded(&self) -> &[u8] {
        // SAFETY: the run lies inside the mapping (FreeRuns), belongs to this buffer alone, and
        // `&self` forbids a writer for the life of the slice.
        unsafe { std::slice::from_raw_parts(self.arena.0.base.add(self.offset), self.padded_len()) }
    }

    /// The bytes and their padding, to write.
    #[must_use]
    pub fn padded_mut(&mut self) -> &mut [u8] {
        let len = self.padded_len();
        // SAFETY: as in `padded`, and `&mut self` makes this the only slice.
        unsafe { std::slice::from_raw_parts_mut(self.arena.0.base.add(self.offset), len) }
    }

    /// Makes the bytes readable by many and writable by none.
    #[must_use]
    pub fn freeze(self) -> Shared {
        Shared(Arc::new(self))
    }

    /// The arena it came from.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Where it starts, in bytes from the start of the arena.
    #[must_use]
    pub fn arena_offset(&self) -> usize {
        self.offset
    }

    /// Sets the padding after the last byte to zero, as it is stored.
    pub fn zero_padding(&mut self) {
        let len = self.len;
        self.padded_mut()[len..].fill(0);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = self
            .arena
            .0
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        free.give(self.offset / PAGE, self.pages);
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes at {})", self.len, self.offset)
    }
}

/// A frozen [`Buffer`]: read by many, freed by the last.
#[derive(Clone, Debug)]
pub struct Shared(Arc<Buffer>);

impl Shared {
    /// Whether this is the only handle.
    #[must_use]
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// The buffer back, if this was the only handle.
    #[must_use]
    pub fn try_thaw(self) -> Option<Buffer> {
        Arc::into_inner(self.0)
    }
}

impl Deref for Shared {
    type Target = Buffer;
    fn deref(&self) -> &Buffer {
        &self.0
    }
}

/// Which pages are free: by offset (to merge) and by length (to find the best fit).
struct FreeRuns {
    by_offset: BTreeMap<usize, usize>,
    by_length: BTreeSet<(usize, usize)>,
    pages: usize,
}

impl FreeRuns {
    fn new(pages: usize) -> Self {
        let mut runs = Self {
            by_offset: BTreeMap::new(),
            by_length: BTreeSet::new(),
            pages: 0,
        };
        runs.insert(0, pages);
        runs.pages = pages;
        runs
    }

    fn insert(&mut self, first: usize, pages: usize) {
        self.by_offset.insert(first, pages);
        self.by_length.insert((pages, first));
    }

    fn remove(&mut self, first: usize, pages: usize) {
        self.by_offset.remove(&first);
        self.by_length.remove(&(pages, first));
    }

    fn take(&mut self, pages: usize) -> Option<usize> {
        let &(found, first) = self.by_length.range((pages, 0)..).next()?;
        self.remove(first, found);
        if found > pages {
            self.insert(first + pages, found - pages);
        }
        self.pages -= pages;
        Some(first)
    }

    fn give(&mut self, first: usize, pages: usize) {
        self.pages += pages;
        let (mut start, mut len) = (first, pages);
        if let Some((&before, &before_len)) = self.by_offset.range(..first).next_back()
            && before + before_len == first
        {
            self.remove(before, before_len);
            (start, len) = (before, before_len + len);
        }
        if let Some(&after_len) = self.by_offset.get(&(first + pages)) {
            self.remove(first + pages, after_len);
            len += after_len;
        }
        self.insert(start, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_buffer_is_aligned_padded_with_zero_and_comes_back() {
        let arena = Arena::new(8 * PAGE).unwrap();
        let mut buffer = arena.allocate(PAGE).unwrap();
        buffer.as_mut_slice().fill(0xff);
        drop(buffer);
        let buffer = arena.allocate(100).unwrap();
        assert_eq!(buffer.as_slice().as_ptr().align_offset(PAGE), 0);
        assert!(buffer.padded()[100..].iter().all(|byte| *byte == 0));
        assert_eq!(
            (buffer.len(), buffer.padded_len(), arena.allocated_bytes()),
            (100, PAGE, PAGE)
        );
        let shared = buffer.freeze();
        let other = shared.clone();
        assert!(!shared.is_unique());
        drop(shared);
        assert_eq!(arena.allocated_bytes(), PAGE);
        drop(other.try_thaw().unwrap());
        assert_eq!(arena.allocated_bytes(), 0);
        assert!(arena.allocate(9 * PAGE).is_none());
    }

    proptest! {
        #[test]
        fn runs_never_overlap_and_merge_back(steps in prop::collection::vec((any::<bool>(), 1_usize..9), 1..200)) {
            let arena = Arena::new(64 * PAGE).unwrap();
            let mut held: Vec<(Buffer, u8)> = Vec::new();
            for (number, (take, pages)) in steps.into_iter().enumerate() {
                if take {
                    if let Some(mut buffer) = arena.allocate(pages * PAGE) {
                        let mark = number as u8;
                        buffer.as_mut_slice().fill(mark);
                        held.push((buffer, mark));
                    }
                } else if !held.is_empty() {
                    let (buffer, mark) = held.swap_remove(number % held.len());
                    prop_assert!(buffer.as_slice().iter().all(|byte| *byte == mark));
                }
            }
            held.clear();
            prop_assert!(arena.allocate(64 * PAGE).is_some());
        }
    }
}
