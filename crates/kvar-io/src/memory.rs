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
//! The count of a frozen buffer's handles stands in a table of the arena, one place a page (4 bytes
//! for 4 KiB, used is that of the first page): freezing takes no memory, and a block's read none but
//! the block's own. The places of pages that nobody has tell where a free run begins and ends.
//!
//! Memory is taken from the system when first touched, or before by whoever calls
//! [`ArenaWatch::prefault`]; an untouched arena costs address space.
#![allow(unsafe_code)] // slices into the mapping; each block says why it holds

use kvar_base::PAGE_BYTES;
use memmap2::MmapMut;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, Weak};

const PAGE: usize = PAGE_BYTES as usize;

/// What [`ArenaWatch::prefault`] takes from the system at once: a huge page. Others who map or unmap
/// memory of this process wait for it.
const PREFAULT_BYTES: usize = 2 << 20;

/// A piece of device-ready memory. Clones are handles to the same piece.
#[derive(Clone)]
pub struct Arena(Arc<Inner>);

struct Inner {
    base: *mut u8,
    len: usize,
    free: Mutex<FreeRuns>,
    /// Handles of the frozen buffer that starts at a page; of a free run, see [`FREE`].
    handles: Box<[AtomicU32]>,
    // Keeps `base` mapped; its bytes are never touched through this field.
    map: MmapMut,
}

// SAFETY: `base` points into `map`, which lives as long as `Inner`. Bytes are reached only
// through `Buffer`s, whose page runs never overlap (FreeRuns hands a page out once), so threads
// never share a byte that one of them can write.
unsafe impl Send for Inner {}
// SAFETY: as above; the only shared mutable state is behind the mutex.
unsafe impl Sync for Inner {}

impl Arena {
    /// Maps `bytes` (rounded up to a page, at least one).
    ///
    /// # Errors
    /// When the system refuses the mapping, or it is beyond what the table of pages can count (8 TiB).
    pub fn new(bytes: usize) -> std::io::Result<Self> {
        let pages = bytes.div_ceil(PAGE).max(1);
        if pages >= FREE as usize {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        let len = pages * PAGE;
        let mut map = MmapMut::map_anon(len)?;
        // Blocks are read and written whole; larger pages mean fewer misses of the address cache.
        // A system without transparent huge pages says no, which costs nothing.
        let _ = map.advise(memmap2::Advice::HugePage);
        let base = map.as_mut_ptr();
        let handles = zeroes(pages);
        let free = Mutex::new(FreeRuns::new(pages, &handles));
        Ok(Self(Arc::new(Inner {
            base,
            len,
            free,
            handles,
            map,
        })))
    }

    /// A buffer of `len` bytes, page-aligned; `None` when no run is long enough. Its bytes are
    /// whatever was there before, its padding to the page is zero.
    #[must_use]
    pub fn allocate(&self, len: usize) -> Option<Buffer> {
        self.allocate_beside(len, 0)
    }

    /// The same, if at least so many bytes stay free beside it.
    #[must_use]
    pub fn allocate_beside(&self, len: usize, free_bytes: usize) -> Option<Buffer> {
        let pages = len.div_ceil(PAGE).max(1);
        let first = {
            let mut free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
            let left = free.pages.checked_sub(pages)?;
            if left < free_bytes.div_ceil(PAGE) {
                return None;
            }
            free.take(&self.0.handles, pages)?
        };
        let mut buffer = Buffer {
            arena: self.clone(),
            offset: first * PAGE,
            pages,
            len,
            owner: Owner::Alone,
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

    /// A handle that does not keep the memory.
    #[must_use]
    pub fn watch(&self) -> ArenaWatch {
        ArenaWatch(Arc::downgrade(&self.0))
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

/// A handle to an arena that somebody else keeps.
pub struct ArenaWatch(Weak<Inner>);

impl ArenaWatch {
    /// Takes the memory from the system before it is needed: clearing a fresh page costs whoever
    /// touches it first more than filling it (0.1 to 3.5 s a GiB). Changes no byte. Returns when all
    /// is there, or when the arena is gone.
    ///
    /// # Errors
    /// What the system says: `EINVAL` before Linux 5.14, which does not know the question; memory that
    /// is short. What was not taken is taken by its first user, or refused to it.
    pub fn prefault(&self) -> std::io::Result<()> {
        for from in (0..).step_by(PREFAULT_BYTES) {
            let Some(arena) = self.0.upgrade() else {
                break;
            };
            if from >= arena.len {
                break;
            }
            let len = PREFAULT_BYTES.min(arena.len - from);
            let map = &arena.map;
            map.advise_range(memmap2::Advice::PopulateWrite, from, len)?;
        }
        Ok(())
    }
}

/// A run of pages with one owner.
pub struct Buffer {
    arena: Arena,
    offset: usize,
    pages: usize,
    len: usize,
    owner: Owner,
}

/// Who gives the pages back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// This buffer.
    Alone,
    /// The last of the handles that the arena counts.
    Handles,
    /// Another handle: this one was let go of already.
    Other,
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
    pub fn freeze(mut self) -> Shared {
        self.handles().store(1, Ordering::Relaxed);
        self.owner = Owner::Handles;
        Shared(self)
    }

    fn handles(&self) -> &AtomicU32 {
        &self.arena.0.handles[self.offset / PAGE]
    }

    /// Lets go of one handle; whether it was the last.
    fn let_go(&self) -> bool {
        // As in std's Arc: whoever is last has to see everything the others did before.
        if self.handles().fetch_sub(1, Ordering::Release) != 1 {
            return false;
        }
        fence(Ordering::Acquire);
        true
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
        if self.owner == Owner::Other || self.owner == Owner::Handles && !self.let_go() {
            return;
        }
        let mut free = self
            .arena
            .0
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        free.give(&self.arena.0.handles, self.offset / PAGE, self.pages);
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes at {})", self.len, self.offset)
    }
}

/// A frozen [`Buffer`]: read by many, freed by the last.
#[derive(Debug)]
pub struct Shared(Buffer);

/// Most handles to one piece: readers of one block come to thousands, never to this.
const HANDLES_MAX: u32 = u32::MAX / 2;

impl Clone for Shared {
    fn clone(&self) -> Self {
        // As in std's Arc: who has a handle keeps the count above zero, so no order is needed; a
        // count that ran over would free memory that is in use.
        let before = self.0.handles().fetch_add(1, Ordering::Relaxed);
        assert!(before < HANDLES_MAX, "too many handles to one buffer");
        Self(Buffer {
            arena: self.0.arena.clone(),
            ..self.0
        })
    }
}

impl Shared {
    /// Whether this is the only handle.
    #[must_use]
    pub fn is_unique(&self) -> bool {
        self.0.handles().load(Ordering::Acquire) == 1
    }

    /// The buffer back, if this was the only handle.
    #[must_use]
    pub fn try_thaw(self) -> Option<Buffer> {
        let mut buffer = self.0;
        let is_last = buffer.let_go();
        buffer.owner = if is_last { Owner::Alone } else { Owner::Other };
        is_last.then_some(buffer)
    }
}

impl Deref for Shared {
    type Target = Buffer;
    fn deref(&self) -> &Buffer {
        &self.0
    }
}

/// Zeroes that take memory when first touched.
fn zeroes(count: usize) -> Box<[AtomicU32]> {
    // The system hands zeroed pages out, and `vec!` of a constant zero asks for them.
    let plain = vec![0_u32; count].into_boxed_slice();
    // SAFETY: AtomicU32 has the size, alignment and bit validity of u32, and the box owns its slice
    // alone.
    unsafe { Box::from_raw(Box::into_raw(plain) as *mut [AtomicU32]) }
}

/// In the arena's table of pages: here a free run begins or ends, and this is its length. What is in
/// use has a count of handles there, which stays below.
const FREE: u32 = 1 << 31;
const _: () = assert!(HANDLES_MAX < FREE);

/// Which pages are free: by length, to find the best fit. Where a run begins and ends says the arena's
/// table, so that one that comes back finds its free neighbours without a search.
struct FreeRuns {
    by_length: BTreeSet<(usize, usize)>,
    pages: usize,
}

impl FreeRuns {
    fn new(pages: usize, table: &[AtomicU32]) -> Self {
        let mut runs = Self {
            by_length: BTreeSet::new(),
            pages,
        };
        runs.insert(table, 0, pages);
        runs
    }

    fn mark(table: &[AtomicU32], first: usize, pages: usize, mark: u32) {
        table[first].store(mark, Ordering::Relaxed);
        table[first + pages - 1].store(mark, Ordering::Relaxed);
    }

    fn insert(&mut self, table: &[AtomicU32], first: usize, pages: usize) {
        Self::mark(table, first, pages, FREE | pages as u32);
        self.by_length.insert((pages, first));
    }

    fn remove(&mut self, table: &[AtomicU32], first: usize, pages: usize) {
        Self::mark(table, first, pages, 0);
        self.by_length.remove(&(pages, first));
    }

    /// The length of the free run that begins or ends at a page.
    fn at(table: &[AtomicU32], page: usize) -> Option<usize> {
        let mark = table.get(page)?.load(Ordering::Relaxed);
        (mark & FREE != 0).then_some((mark & !FREE) as usize)
    }

    fn take(&mut self, table: &[AtomicU32], pages: usize) -> Option<usize> {
        let &(found, first) = self.by_length.range((pages, 0)..).next()?;
        self.remove(table, first, found);
        if found > pages {
            self.insert(table, first + pages, found - pages);
        }
        self.pages -= pages;
        Some(first)
    }

    fn give(&mut self, table: &[AtomicU32], first: usize, pages: usize) {
        self.pages += pages;
        let (mut start, mut len) = (first, pages);
        let before = first.checked_sub(1).and_then(|page| Self::at(table, page));
        if let Some(before) = before {
            start -= before;
            len += before;
            self.remove(table, start, before);
        }
        if let Some(after) = Self::at(table, first + pages) {
            self.remove(table, first + pages, after);
            len += after;
        }
        self.insert(table, start, len);
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

    #[test]
    fn prefaulting_takes_all_memory_and_changes_none() {
        let arena = Arena::new(3 * PREFAULT_BYTES / 2).unwrap();
        let mut buffer = arena.allocate(PAGE).unwrap();
        buffer.as_mut_slice().fill(7);
        assert!(resident_bytes(&arena) < arena.bytes());
        let watch = arena.watch();
        watch.prefault().unwrap();
        assert_eq!(resident_bytes(&arena), arena.bytes());
        assert!(buffer.as_slice().iter().all(|byte| *byte == 7));
        drop((arena, buffer));
        watch.prefault().unwrap();
    }

    /// Bytes of the arena that are in memory, by the kernel's map of this process.
    fn resident_bytes(arena: &Arena) -> usize {
        let from = arena.as_ptr() as u64;
        let until = from + arena.bytes() as u64;
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let is_there = |page: &u64| {
            let mut entry = [0; 8];
            let place = page / PAGE as u64 * 8;
            std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entry, place).unwrap();
            u64::from_le_bytes(entry) >> 63 == 1
        };
        (from..until).step_by(PAGE).filter(is_there).count() * PAGE
    }

    /// Whoever lets go last gives the pages back, once, on whichever thread that is; and of those
    /// who try to thaw at the same time one gets the buffer at most.
    #[test]
    fn the_last_handle_gives_the_pages_back_whichever_it_is() {
        let arena = Arena::new(4 * PAGE).unwrap();
        for round in 0..2000_u32 {
            let mut buffer = arena.allocate(PAGE + 1).unwrap();
            buffer.as_mut_slice().fill(round as u8);
            let shared = buffer.freeze();
            let thawed = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..3)
                    .map(|number| {
                        let mine = shared.clone();
                        scope.spawn(move || {
                            let again = mine.clone();
                            assert!(again.as_slice().iter().all(|byte| *byte == round as u8));
                            drop(again);
                            (number < 2).then(|| mine.try_thaw()).flatten()
                        })
                    })
                    .collect();
                let mine = shared.try_thaw();
                let found = threads
                    .into_iter()
                    .filter_map(|thread| thread.join().unwrap())
                    .count();
                found + usize::from(mine.is_some())
            });
            assert!(thawed <= 1, "{thawed} got the buffer");
            assert_eq!(arena.allocated_bytes(), 0, "round {round}");
        }
    }

    #[test]
    fn what_is_to_stay_free_stays_free() {
        let arena = Arena::new(4 * PAGE).unwrap();
        assert!(arena.allocate_beside(2 * PAGE, 2 * PAGE + 1).is_none());
        let two = arena.allocate_beside(2 * PAGE, 2 * PAGE).unwrap();
        assert!(arena.allocate_beside(1, PAGE + 1).is_none());
        assert!(arena.allocate_beside(3 * PAGE, 0).is_none());
        drop(two);
        assert!(arena.allocate_beside(4 * PAGE, 0).is_some());
    }

    /// Marks of free runs stand at their two ends, and nowhere else.
    fn marks_hold(arena: &Arena) -> bool {
        let free = arena.0.free.lock().unwrap();
        let mut marks = vec![0; arena.bytes() / PAGE];
        for (pages, first) in &free.by_length {
            marks[*first] = *pages;
            marks[first + pages - 1] = *pages;
        }
        let found = (0..marks.len()).map(|page| FreeRuns::at(&arena.0.handles, page).unwrap_or(0));
        found.eq(marks.iter().copied())
            && free.by_length.iter().map(|(pages, _)| pages).sum::<usize>() == free.pages
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
                    // What was frozen comes back like the rest.
                    drop(buffer.freeze());
                }
                prop_assert!(marks_hold(&arena), "after step {number}");
            }
            held.clear();
            prop_assert!(marks_hold(&arena));
            prop_assert!(arena.allocate(64 * PAGE).is_some());
        }
    }
}
