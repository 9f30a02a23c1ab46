//! A ring of bytes between one writer and one reader that share memory and trust none of it.
//!
//! ```text
//!           head (reader)        tail (writer)
//!              ▼                    ▼
//!   +----------+====================+---------------+
//!   |  free    |  written, untaken  |     free      |     head <= tail <= head + capacity
//!   +----------+====================+---------------+     both count bytes for ever, wrapping
//! ```
//!
//! ```text
//!   writer:  bytes in ── tail ── fence ── reader waits? ── take it back, ring its bell
//!   reader:  reader waits ── fence ── tail moved? yes: go on, no: sleep until the bell
//!   (and the same the other way round for room)
//! ```
//!
//! What must always be true:
//! * a side's own index is private; of the other's it looks at a copy, and a copy that breaks the
//!   picture above, or goes back, is [`Scribbled`]: nothing is read or written by it;
//! * whoever sleeps after [`Reader::arm`] or [`Writer::arm`] said that nothing is possible has its
//!   bell rung when something is. Each side writes one word and then reads the other's, so both must
//!   see one order of these four: hence the full fences, in `raise` and `is_raised`.
//!
//! The memory is a parameter, so that a model checker can put its own in (`tests/ring_model.rs`).

use std::io::{IoSlice, IoSliceMut};

/// What is copied before the other side is told: it can begin on the first 16 KiB of a block while
/// the rest is being copied, and one that sleeps is up by the time the block is there.
const PUBLISH_BYTES: usize = 16 << 10;

/// The words of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Bytes ever written; the writer's.
    Tail = 0,
    /// Bytes ever taken; the reader's.
    Head = 1,
    /// Not 0: the reader sleeps, or is about to.
    ReaderWaits = 2,
    /// Not 0: the writer sleeps for want of room, or is about to.
    WriterWaits = 3,
}

/// The memory of a ring as one side sees it.
pub trait RingMemory {
    /// Bytes of the ring; a power of two.
    fn capacity(&self) -> usize;
    /// Reads a word; what was written before it was stored is there too.
    fn load(&self, word: Word) -> u64;
    /// Writes a word, after everything written before.
    fn store(&self, word: Word, value: u64);
    /// Sets a flag, and then lets nothing be read before that is seen.
    fn raise(&self, flag: Word);
    /// Whether a flag is set, asked after everything written before is seen.
    fn is_raised(&self, flag: Word) -> bool;
    /// Clears a flag; whether it was set. Of two who ask, one is told so.
    fn take(&self, flag: Word) -> bool;
    /// Copies bytes in.
    fn copy_in(&mut self, at: usize, bytes: &[u8]);
    /// Copies bytes out.
    fn copy_out(&self, at: usize, into: &mut [u8]);
}

/// The other side has written where it must not: give the ring up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the peer wrote over its shared memory: {what} stands at {found}, between {least} and {most} is possible"
)]
pub struct Scribbled {
    what: &'static str,
    found: u64,
    least: u64,
    most: u64,
}

/// Looks at an index of the other side, which was last seen at `seen` and may have moved by
/// `room` at most.
fn look(what: &'static str, found: u64, seen: u64, room: u64) -> Result<u64, Scribbled> {
    if found.wrapping_sub(seen) <= room {
        return Ok(found);
    }
    Err(Scribbled {
        what,
        found,
        least: seen,
        most: seen.wrapping_add(room),
    })
}

/// The side that writes.
pub struct Writer<M> {
    memory: M,
    capacity: u64,
    tail: u64,
    head_seen: u64,
}

impl<M: RingMemory> Writer<M> {
    /// The writer of a ring that nobody has used yet.
    ///
    /// # Panics
    /// If the ring's size is no power of two: sizes are checked where memory is taken in.
    pub fn new(memory: M) -> Self {
        assert!(memory.capacity().is_power_of_two());
        Self {
            capacity: memory.capacity() as u64,
            memory,
            tail: 0,
            head_seen: 0,
        }
    }

    fn room(&self) -> usize {
        (self.capacity - self.tail.wrapping_sub(self.head_seen)) as usize
    }

    fn look(&mut self) -> Result<(), Scribbled> {
        let untaken = self.tail.wrapping_sub(self.head_seen);
        let found = self.memory.load(Word::Head);
        self.head_seen = look("head", found, self.head_seen, untaken)?;
        Ok(())
    }

    /// Writes as much as there is room for; returns how much. Rings `bell` if the reader waits.
    ///
    /// # Errors
    /// The reader has scribbled.
    pub fn write(
        &mut self,
        pieces: &[IoSlice<'_>],
        mut bell: impl FnMut(),
    ) -> Result<usize, Scribbled> {
        let wanted: usize = pieces.iter().map(|piece| piece.len()).sum();
        if self.room() < wanted {
            self.look()?;
        }
        let written = wanted.min(self.room());
        let (mut left, mut untold) = (written, 0);
        for piece in pieces {
            let mut piece = &piece[..piece.len().min(left)];
            left -= piece.len();
            while !piece.is_empty() {
                let at = (self.tail & (self.capacity - 1)) as usize;
                let end = self.capacity as usize - at;
                let (now, later) = piece.split_at(piece.len().min(end).min(PUBLISH_BYTES - untold));
                self.memory.copy_in(at, now);
                self.tail = self.tail.wrapping_add(now.len() as u64);
                untold += now.len();
                piece = later;
                if untold == PUBLISH_BYTES {
                    self.tell(&mut bell);
                    untold = 0;
                }
            }
        }
        if untold > 0 {
            self.tell(&mut bell);
        }
        Ok(written)
    }

    fn tell(&self, bell: &mut impl FnMut()) {
        self.memory.store(Word::Tail, self.tail);
        if self.memory.is_raised(Word::ReaderWaits) && self.memory.take(Word::ReaderWaits) {
            bell();
        }
    }

    /// Before its thread sleeps for want of room: whether there is some after all. If not, the bell
    /// of this side will ring when there is.
    ///
    /// # Errors
    /// The reader has scribbled.
    pub fn arm(&mut self) -> Result<bool, Scribbled> {
        self.memory.raise(Word::WriterWaits);
        self.look()?;
        Ok(self.room() > 0)
    }
}

/// The side that reads.
pub struct Reader<M> {
    memory: M,
    capacity: u64,
    head: u64,
    tail_seen: u64,
    /// Whether the flag may be set; then it is cleared when reading goes on.
    armed: bool,
}

impl<M: RingMemory> Reader<M> {
    /// The reader of a ring that nobody has used yet.
    ///
    /// # Panics
    /// As [`Writer::new`].
    pub fn new(memory: M) -> Self {
        assert!(memory.capacity().is_power_of_two());
        Self {
            capacity: memory.capacity() as u64,
            memory,
            head: 0,
            tail_seen: 0,
            armed: false,
        }
    }

    fn there(&self) -> usize {
        self.tail_seen.wrapping_sub(self.head) as usize
    }

    fn look(&mut self) -> Result<(), Scribbled> {
        let room = self.capacity - self.there() as u64;
        let found = self.memory.load(Word::Tail);
        self.tail_seen = look("tail", found, self.tail_seen, room)?;
        Ok(())
    }

    /// Takes what is there, up to the room in `pieces`; returns how much, 0 for nothing there.
    /// Rings `bell` if the writer waits for room and half of the ring is free.
    ///
    /// # Errors
    /// The writer has scribbled.
    pub fn read(
        &mut self,
        pieces: &mut [IoSliceMut<'_>],
        mut bell: impl FnMut(),
    ) -> Result<usize, Scribbled> {
        let mut read = 0;
        'pieces: for piece in pieces {
            let mut piece = &mut piece[..];
            while !piece.is_empty() {
                // Looked at again whenever it is used up, since the writer goes on meanwhile.
                if self.there() == 0 {
                    self.look()?;
                }
                if self.there() == 0 {
                    break 'pieces;
                }
                let at = (self.head & (self.capacity - 1)) as usize;
                let end = self.capacity as usize - at;
                let now = piece.len().min(end).min(self.there()).min(PUBLISH_BYTES);
                let (first, rest) = piece.split_at_mut(now);
                self.memory.copy_out(at, first);
                self.head = self.head.wrapping_add(now as u64);
                self.memory.store(Word::Head, self.head);
                read += now;
                piece = rest;
            }
        }
        if read > 0 {
            if std::mem::take(&mut self.armed) {
                self.memory.take(Word::ReaderWaits);
            }
            self.tell(self.capacity / 2, &mut bell);
        }
        Ok(read)
    }

    /// Rings if the writer waits and so much is free.
    fn tell(&self, free: u64, bell: &mut impl FnMut()) {
        let is_free = self.capacity - self.there() as u64 >= free;
        if is_free
            && self.memory.is_raised(Word::WriterWaits)
            && self.memory.take(Word::WriterWaits)
        {
            bell();
        }
    }

    /// Before its thread sleeps for want of bytes: whether there are some after all. If not, the
    /// bell of this side will ring when there are.
    ///
    /// # Errors
    /// The writer has scribbled.
    pub fn arm(&mut self) -> Result<bool, Scribbled> {
        self.memory.raise(Word::ReaderWaits);
        self.armed = true;
        self.look()?;
        Ok(self.there() > 0)
    }

    /// Before its thread sleeps for any reason: a writer that waits for room, and would be told of it
    /// only when half of the ring is free, is told of what there is.
    ///
    /// # Errors
    /// The writer has scribbled.
    pub fn rest(&mut self, mut bell: impl FnMut()) -> Result<(), Scribbled> {
        self.look()?;
        self.tell(1, &mut bell);
        Ok(())
    }
}
