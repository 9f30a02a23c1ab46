//! Memory that two processes share and neither trusts.
//!
//! ```text
//!   SharedMemory::create ── sealed memfd ── descriptor over a socket ──> SharedMemory::received
//!          │ map                                                               │ map
//!          ▼                                                                   ▼
//!        Carver ── words(n) ──> Words (atomics)                             the same
//!               └─ bytes(n) ──> SharedBytes (copied in and out)
//! ```
//!
//! What must always be true:
//! * its size never changes while it lives (seals), and all of it is reserved before it is mapped,
//!   so no access can fault, whatever the other process does;
//! * no reference to bytes of it exists: they are copied in and out through raw pointers, and only
//!   private copies are looked at; words are read and written as atomics alone;
//! * parts carved out of one mapping do not overlap.
//!
//! What is absent: what words and bytes mean, and whether a value found there makes sense.
#![allow(unsafe_code)] // raw copies and atomics over a shared mapping; each block says why it holds

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Bytes of a word.
const WORD_BYTES: usize = size_of::<u64>();

/// What keeps the size as it is, and these seals on.
fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

/// A piece of memory with a descriptor that can be given to another process.
#[derive(Debug)]
pub struct SharedMemory {
    file: OwnedFd,
    bytes: usize,
}

impl SharedMemory {
    /// Makes `bytes` of zeros, reserved in full and sealed against resizing.
    ///
    /// # Errors
    /// The system has not so much memory, or no descriptor left.
    pub fn create(bytes: usize) -> io::Result<Self> {
        let memory = Self::begin(bytes)?;
        memory.reserve(0, bytes)?;
        Ok(memory)
    }

    /// The same without the reserving, which takes its time (0.15 ms a MiB: zeros are written). Nobody
    /// may touch, or be given, what is not [reserved](Self::reserve).
    ///
    /// # Errors
    /// No descriptor left.
    pub fn begin(bytes: usize) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("kvar-link", flags)?;
        rustix::fs::ftruncate(&file, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&file, seals())?;
        Ok(Self { file, bytes })
    }

    /// Reserves a part.
    ///
    /// # Errors
    /// The system has not so much memory.
    pub fn reserve(&self, from: usize, len: usize) -> io::Result<()> {
        let flags = FallocateFlags::empty();
        rustix::fs::fallocate(&self.file, flags, from as u64, len as u64)?;
        Ok(())
    }

    /// Takes a descriptor that another process has sent.
    ///
    /// # Errors
    /// It is no memory of exactly `bytes`, reserved and sealed as `create` does it: to touch it
    /// could end this process.
    pub fn received(file: OwnedFd, bytes: usize) -> io::Result<Self> {
        let wrong = |text: String| Err(io::Error::new(io::ErrorKind::InvalidData, text));
        let Ok(found) = rustix::fs::fcntl_get_seals(&file) else {
            return wrong("what was sent is no shared memory".to_owned());
        };
        if !found.contains(seals()) {
            return wrong("the shared memory is not sealed against resizing".to_owned());
        }
        let stat = rustix::fs::fstat(&file)?;
        if stat.st_size != bytes as i64 {
            return wrong(format!(
                "the shared memory has {} bytes, not {bytes}",
                stat.st_size
            ));
        }
        // Reserves what the maker left out; free where it did not.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes as u64)?;
        Ok(Self { file, bytes })
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Maps it into this process.
    ///
    /// # Errors
    /// When the system refuses the mapping.
    pub fn map(&self) -> io::Result<Carver> {
        Ok(Carver {
            map: Arc::new(self.map_whole()?),
            carved: 0,
        })
    }

    /// Maps it, populated: the first bytes to travel should not pay for the page tables.
    pub(crate) fn map_whole(&self) -> io::Result<MmapRaw> {
        MmapOptions::new()
            .len(self.bytes)
            .populate()
            .map_raw(self.file.as_raw_fd())
    }

    /// Maps it without touching it: for memory that is reserved, and
    /// [populated](Carver::populate), part by part.
    ///
    /// # Errors
    /// When the system refuses the mapping.
    pub fn map_untouched(&self) -> io::Result<Carver> {
        let map = MmapOptions::new()
            .len(self.bytes)
            .map_raw(self.file.as_raw_fd())?;
        Ok(Carver {
            map: Arc::new(map),
            carved: 0,
        })
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Hands out the parts of a mapping, front to back, each once.
pub struct Carver {
    map: Arc<MmapRaw>,
    carved: usize,
}

impl Carver {
    /// The next `count` words, each of them at the start of its own `stride_bytes`.
    ///
    /// # Panics
    /// If so much is not left, or a word would not be aligned: the layout is this process's own.
    #[must_use]
    pub fn words(&mut self, count: usize, stride_bytes: usize) -> Words {
        assert!(stride_bytes.is_multiple_of(WORD_BYTES) && stride_bytes > 0);
        let start = self.carve(count * stride_bytes);
        assert!(start.is_multiple_of(WORD_BYTES));
        Words {
            map: Arc::clone(&self.map),
            start,
            stride_bytes,
            count,
        }
    }

    /// The next `len` bytes.
    ///
    /// # Panics
    /// If so many are not left.
    #[must_use]
    pub fn bytes(&mut self, len: usize) -> SharedBytes {
        let start = self.carve(len);
        SharedBytes {
            map: Arc::clone(&self.map),
            start,
            len,
        }
    }

    /// Makes the page tables of a part that is reserved.
    pub fn populate(&self, from: usize, len: usize) {
        // A kernel that cannot do it does so when the part is first touched.
        let _ = self
            .map
            .advise_range(memmap2::Advice::PopulateWrite, from, len);
    }

    /// Leaves out what lies before `at`.
    ///
    /// # Panics
    /// If some of it was handed out.
    pub fn skip_to(&mut self, at: usize) {
        assert!(at >= self.carved && at <= self.map.len());
        self.carved = at;
    }

    fn carve(&mut self, len: usize) -> usize {
        let start = self.carved;
        assert!(
            len <= self.map.len() - start,
            "the mapping has no {len} bytes left"
        );
        self.carved = start + len;
        start
    }
}

/// Words that both processes read and write as atomics.
pub struct Words {
    map: Arc<MmapRaw>,
    start: usize,
    stride_bytes: usize,
    count: usize,
}

impl Words {
    /// A word. What is in it may be anything, and something else at the next look.
    ///
    /// # Panics
    /// If there is none of this number.
    #[must_use]
    pub fn word(&self, number: usize) -> &AtomicU64 {
        assert!(number < self.count);
        let at = self.start + number * self.stride_bytes;
        // SAFETY: `at` lies inside the mapping and is aligned (`Carver::words`; mappings begin on a
        // page), the mapping lives as long as `self` and cannot shrink (seals), and this process
        // reaches these bytes as atomics alone (parts do not overlap). Any bits are a u64.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(at).cast()) }
    }
}

impl std::fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SharedBytes({})", self.len)
    }
}

/// Bytes that both processes write: copied, never referred to.
pub struct SharedBytes {
    map: Arc<MmapRaw>,
    start: usize,
    len: usize,
}

impl SharedBytes {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `bytes` to `at`. What the other process finds there is these bytes if it leaves them
    /// alone.
    ///
    /// # Panics
    /// If they do not fit.
    #[inline(never)] // so that nobody reasons about memory that others write, across this border
    pub fn copy_in(&mut self, at: usize, bytes: &[u8]) {
        assert!(at <= self.len && bytes.len() <= self.len - at);
        // SAFETY: the target lies inside this part of the mapping (asserted), which lives as long
        // as `self` and cannot shrink (seals); the source is private memory, so they do not
        // overlap. This process has no other way to these bytes (`&mut self`, parts do not
        // overlap); what the other process does to them meanwhile makes the outcome arbitrary
        // bytes, which nobody here relies on.
        unsafe {
            let to = self.map.as_mut_ptr().add(self.start + at);
            if bytes.len() >= PAST_THE_CACHE_BYTES {
                copy_past_the_cache(bytes, to);
            } else {
                ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            }
        }
        fence(Ordering::Release);
    }

    /// Copies what is at `at` into `into`: from then on it is private, and whatever it is, it stays.
    ///
    /// # Panics
    /// If so much is not there.
    #[inline(never)] // as above: what is read later is the copy, not this memory a second time
    pub fn copy_out(&self, at: usize, into: &mut [u8]) {
        assert!(at <= self.len && into.len() <= self.len - at);
        // SAFETY: the source lies inside this part of the mapping (asserted), as above; the target
        // is private memory with one owner. If the other process writes meanwhile, the copy is some
        // mix of bytes, all of them initialised, and any byte is a u8.
        unsafe {
            let from = self.map.as_ptr().add(self.start + at);
            ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len());
        }
        // Behind this the compiler must take the memory as changed: it cannot read it again in the
        // place of the copy.
        fence(Ordering::Acquire);
    }
}

/// From this length on bytes are written past the cache of the core that writes them. The core that reads
/// them is another one: lines that the one has to take out of the other's cache, and back when
/// the ring comes round, cost more than memory does (2 to 4 GB/s against 7 to 9, between two cores of a
/// virtual machine, rings of 256 KiB and 1 MiB). A head is small, and is read at once.
const PAST_THE_CACHE_BYTES: usize = 4096;

/// Copies `bytes` to `to`, past the cache where the processor can do that.
///
/// # Safety
/// `to` must be valid for writes of so many bytes, and `bytes` must not lie there.
#[cfg(target_arch = "x86_64")]
unsafe fn copy_past_the_cache(bytes: &[u8], to: *mut u8) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    /// A cache line, written whole; less than that would be read first.
    const LINE_BYTES: usize = 64;
    const PIECE_BYTES: usize = size_of::<__m128i>();

    let lead = to.align_offset(LINE_BYTES).min(bytes.len());
    let (lead, rest) = bytes.split_at(lead);
    let (lines, tail) = rest.as_chunks::<LINE_BYTES>();
    // SAFETY: `to` is valid for the sum of these lengths (the caller's), each part is written
    // behind the one before, and the streamed part begins on a line, so every piece is aligned as
    // the store wants it; loads need no alignment and stay inside their line.
    unsafe {
        ptr::copy_nonoverlapping(lead.as_ptr(), to, lead.len());
        let mut to = to.add(lead.len());
        for line in lines {
            let pieces: [__m128i; LINE_BYTES / PIECE_BYTES] =
                std::array::from_fn(|n| _mm_loadu_si128(line.as_ptr().add(n * PIECE_BYTES).cast()));
            for (n, piece) in pieces.into_iter().enumerate() {
                _mm_stream_si128(to.add(n * PIECE_BYTES).cast(), piece);
            }
            to = to.add(LINE_BYTES);
        }
        ptr::copy_nonoverlapping(tail.as_ptr(), to, tail.len());
        // Such stores keep no order with those that follow: the index that tells of these bytes must.
        _mm_sfence();
    }
}

/// See above.
///
/// # Safety
/// As above.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy_past_the_cache(bytes: &[u8], to: *mut u8) {
    // SAFETY: the caller's.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    #[test]
    fn two_mappings_of_one_memory_see_each_other() {
        let memory = SharedMemory::create(4 * PAGE).unwrap();
        let sent = memory.as_fd().try_clone_to_owned().unwrap();
        let received = SharedMemory::received(sent, 4 * PAGE).unwrap();
        let (mut ours, mut theirs) = (memory.map().unwrap(), received.map().unwrap());
        let (words, seen) = (ours.words(4, 128), theirs.words(4, 128));
        assert_eq!(seen.word(3).load(Ordering::Relaxed), 0);
        words.word(3).store(77, Ordering::Relaxed);
        assert_eq!(seen.word(3).load(Ordering::Relaxed), 77);
        ours.skip_to(PAGE);
        theirs.skip_to(PAGE);
        let (mut bytes, found) = (ours.bytes(3 * PAGE), theirs.bytes(3 * PAGE));
        bytes.copy_in(PAGE - 3, b"across a page");
        let mut into = [0; 13];
        found.copy_out(PAGE - 3, &mut into);
        assert_eq!(&into, b"across a page");
    }

    /// Every alignment of either side, around the length from which on the cache is passed by: the bytes, and
    /// nothing beside them.
    #[test]
    fn bytes_copied_in_are_there_at_every_alignment() {
        let memory = SharedMemory::create(4 * PAGE).unwrap();
        let (mut ours, mut theirs) = (memory.map().unwrap(), memory.map().unwrap());
        let (mut bytes, found) = (ours.bytes(4 * PAGE), theirs.bytes(4 * PAGE));
        let source: Vec<u8> = (0..3 * PAGE as u32)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let lens = [1, 63, 64, 4095, 4096, 4097, 4160, 2 * PAGE + 77];
        for (round, at) in (0..130).enumerate() {
            for len in lens {
                let from = round * 7 % 67;
                bytes.copy_in(0, &[0xaa; 3 * PAGE]);
                bytes.copy_in(at, &source[from..from + len]);
                let mut into = vec![0; 3 * PAGE];
                found.copy_out(0, &mut into);
                assert_eq!(into[at..at + len], source[from..from + len], "{at} {len}");
                let beside = into[..at].iter().chain(&into[at + len..]);
                assert!(beside.copied().all(|byte| byte == 0xaa), "{at} {len}");
            }
        }
    }

    #[test]
    fn memory_cannot_be_resized_and_what_could_be_is_not_taken() {
        let memory = SharedMemory::create(2 * PAGE).unwrap();
        for bytes in [PAGE as u64, 3 * PAGE as u64] {
            assert!(rustix::fs::ftruncate(&memory, bytes).is_err());
        }
        let loose =
            rustix::fs::memfd_create("loose", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
                .unwrap();
        rustix::fs::ftruncate(&loose, PAGE as u64).unwrap();
        let error = SharedMemory::received(loose, PAGE).unwrap_err();
        assert!(error.to_string().contains("not sealed"), "{error}");
        let file = tempfile::tempfile().unwrap();
        let error = SharedMemory::received(file.into(), PAGE).unwrap_err();
        assert!(error.to_string().contains("no shared memory"), "{error}");
        let sent = memory.as_fd().try_clone_to_owned().unwrap();
        let error = SharedMemory::received(sent, PAGE).unwrap_err();
        assert!(
            error.to_string().contains("8192 bytes, not 4096"),
            "{error}"
        );
    }

    #[test]
    #[should_panic(expected = "no 4097 bytes left")]
    fn nothing_is_carved_beyond_the_end() {
        let memory = SharedMemory::create(PAGE).unwrap();
        let _ = memory.map().unwrap().bytes(PAGE + 1);
    }
}
