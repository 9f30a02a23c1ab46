//! The arena as the ring knows it: registered piece by piece, each when it is first used.
//!
//! Registering a piece saves the kernel a walk over its pages in every operation, but takes all of
//! them from the system at once: for the arena as a whole that is 0.1 to 3.5 s a GiB (a warm and a
//! fresh virtual machine), too long for a start. By pieces it is a few milliseconds, once, on
//! memory that is about to be used anyway.
//!
//! A buffer across two pieces goes by address: the same operation, a little more CPU.
#![allow(unsafe_code)] // the kernel is told addresses; the block says why they hold

use crate::ring::hub::{Hub, PIECES_MAX};
use crate::{Arena, Buffer, Shared};
use io_uring::IoUring;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};
use std::io;

/// Least size of a piece: large against a block (one of 64 KiB in 64 lies across a cut), small
/// enough to be taken from the system in a few milliseconds.
pub(crate) const PIECE_BYTES_MIN: usize = 4 << 20;

/// Most pieces of one device, whose ring may have others' too. Beyond 32 GiB the pieces grow.
const DEVICE_PIECES_MAX: usize = PIECES_MAX / 2;

pub(crate) struct Registered {
    arena: Arena,
    piece_bytes: usize,
    /// The number of the first piece in the ring's table.
    first: Option<u32>,
    pieces: Vec<bool>,
    refused: bool,
}

impl Registered {
    /// Takes room in the ring's table, or says in a sentence why it has none.
    pub(crate) fn new(hub: &mut Hub, arena: &Arena) -> (Self, Option<String>) {
        let per_piece = arena
            .bytes()
            .div_ceil(DEVICE_PIECES_MAX)
            .next_power_of_two();
        let piece_bytes = per_piece.max(PIECE_BYTES_MIN);
        let count = arena.bytes().div_ceil(piece_bytes);
        let first = match over_limit(arena.bytes()) {
            Some(refusal) => Err(refusal),
            None => hub.take_pieces(count),
        };
        let note = first.as_ref().err().map(|refusal| {
            let bytes = arena.bytes();
            format!(
                "io_uring runs without registered memory ({bytes} bytes refused: {refusal}): reads \
                 and writes cost a little more CPU"
            )
        });
        let refused = note.is_some();
        let arena = arena.clone();
        (
            Self {
                arena,
                piece_bytes,
                first: first.ok(),
                pieces: vec![false; count],
                refused,
            },
            note,
        )
    }

    /// The number under which the ring knows the memory of `buffer`; registers it if need be.
    pub(crate) fn number(&mut self, ring: &IoUring, buffer: &Buffer) -> Option<u16> {
        let first = self.first?;
        if self.refused || !buffer.arena().is_same(&self.arena) {
            return None;
        }
        let from = buffer.arena_offset();
        let piece = from / self.piece_bytes;
        if (from + buffer.padded_len() - 1) / self.piece_bytes != piece {
            return None;
        }
        if !self.pieces[piece] {
            if let Err(_limit_of_memory) = self.register(ring, first, piece) {
                // Whatever it is, it is no reason to try again with every operation.
                self.refused = true;
                return None;
            }
            self.pieces[piece] = true;
        }
        u16::try_from(first as usize + piece).ok()
    }

    /// The one number under which the ring knows all of these.
    pub(crate) fn number_of_all(&mut self, ring: &IoUring, buffers: &[Shared]) -> Option<u16> {
        let (first, others) = buffers.split_first()?;
        let number = self.number(ring, first)?;
        others
            .iter()
            .all(|buffer| self.number(ring, buffer) == Some(number))
            .then_some(number)
    }

    fn register(&self, ring: &IoUring, first: u32, piece: usize) -> io::Result<()> {
        let from = piece * self.piece_bytes;
        let memory = libc::iovec {
            iov_base: self.arena.as_ptr().wrapping_add(from).cast(),
            iov_len: self.piece_bytes.min(self.arena.bytes() - from),
        };
        // SAFETY: the piece lies inside the arena's mapping, and this handle keeps it mapped at
        // least as long as the ring lives. Registering reads and writes nothing.
        unsafe {
            ring.submitter()
                .register_buffers_update(first + piece as u32, &[memory], None)
        }
    }

    /// Gives the memory back, to the kernel before the ring is closed (which it does later), and the
    /// room to others.
    pub(crate) fn release(&self, hub: &mut Hub) {
        let Some(first) = self.first else { return };
        for (number, _) in (first..)
            .zip(&self.pieces)
            .filter(|(_, is_there)| **is_there)
        {
            let nothing = libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            };
            let submitter = hub.ring.submitter();
            // SAFETY: an empty place in the table refers to no memory.
            drop(unsafe { submitter.register_buffers_update(number, &[nothing], None) });
        }
        hub.give_pieces(first);
    }
}

/// Whether registering this much would meet RLIMIT_MEMLOCK, which privileged threads are free of.
fn over_limit(bytes: usize) -> Option<String> {
    let limit = getrlimit(Resource::Memlock)
        .current
        .filter(|limit| *limit < bytes as u64)?;
    let free =
        capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    (!free).then(|| {
        format!(
            "the limit of locked memory, RLIMIT_MEMLOCK, is {limit} bytes; raise it (ulimit -l)"
        )
    })
}
