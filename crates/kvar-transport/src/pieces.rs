//! Memory in pieces: what payload is sent from and received into, without a copy in between.
//!
//! Sources and sinks hand out their pieces to a visitor, all of them borrowed at once, so that one
//! vectored call of the operating system can move them; `unsafe` is left to whoever holds foreign
//! memory (the Python bindings), if anyone.

use kvar_io::{Buffer, Shared};
use smallvec::SmallVec;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

/// Pieces in one call. The kernel allows 1,024; at 64 the list is one KiB of stack and a call of
/// 64 sections moves more than a socket's buffer holds.
const PIECES_A_CALL: usize = 64;

/// Bytes to send, in pieces. Pieces must stay the same for as long as a link owns the source.
pub trait Source {
    /// Calls `visit` with each piece in order.
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8]));

    /// Length of all pieces.
    fn len(&self) -> usize {
        let mut len = 0;
        self.visit(&mut |piece| len += piece.len());
        len
    }

    /// Whether there is nothing to send.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Memory to receive into, in pieces. Lengths must stay the same for as long as a link owns it.
pub trait Sink {
    /// Calls `visit` with each piece in order.
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(&'a mut [u8]));

    /// Length of all pieces.
    fn len(&self) -> usize;

    /// Whether there is no room at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T: Source + ?Sized> Source for Box<T> {
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
        (**self).visit(visit);
    }
    fn len(&self) -> usize {
        (**self).len()
    }
}

impl<T: Sink + ?Sized> Sink for Box<T> {
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(&'a mut [u8])) {
        (**self).visit_mut(visit);
    }
    fn len(&self) -> usize {
        (**self).len()
    }
}

impl Source for Vec<u8> {
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
        visit(self);
    }
}

impl Sink for Vec<u8> {
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(&'a mut [u8])) {
        visit(self);
    }
    fn len(&self) -> usize {
        Vec::len(self)
    }
}

impl Source for Vec<Vec<u8>> {
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
        self.iter().for_each(|piece| visit(piece));
    }
}

impl Sink for Vec<Vec<u8>> {
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(&'a mut [u8])) {
        self.iter_mut().for_each(|piece| visit(piece));
    }
    fn len(&self) -> usize {
        self.iter().map(Vec::len).sum()
    }
}

impl Source for Shared {
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
        visit(self.as_slice());
    }
}

impl Sink for Buffer {
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(&'a mut [u8])) {
        visit(self.as_mut_slice());
    }
    fn len(&self) -> usize {
        Buffer::len(self)
    }
}

/// Ranges of a shared buffer: sections of a block whose stored form has padding between them.
#[derive(Clone, Debug)]
pub struct SharedPieces {
    /// The buffer.
    pub bytes: Shared,
    /// What of it, in order. Ranges outside the buffer are a bug of the caller and panic.
    pub ranges: SmallVec<[Range<usize>; 2]>,
}

impl Source for SharedPieces {
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
        let bytes = self.bytes.padded();
        self.ranges
            .iter()
            .for_each(|range| visit(&bytes[range.clone()]));
    }
}

/// A list of pieces to send in one call.
pub(crate) struct Gather<'a> {
    pub(crate) list: SmallVec<[IoSlice<'a>; PIECES_A_CALL]>,
    pub(crate) bytes: usize,
}

impl<'a> Gather<'a> {
    pub(crate) fn new() -> Self {
        Self {
            list: SmallVec::new(),
            bytes: 0,
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.list.len() == PIECES_A_CALL
    }

    /// Adds a piece less its first `skip` bytes, and takes off `skip` what was skipped.
    pub(crate) fn add(&mut self, piece: &'a [u8], skip: &mut usize) {
        let skipped = piece.len().min(*skip);
        *skip -= skipped;
        if skipped < piece.len() && !self.is_full() {
            self.list.push(IoSlice::new(&piece[skipped..]));
            self.bytes += piece.len() - skipped;
        }
    }
}

/// A list of pieces to receive into in one call.
pub(crate) struct Scatter<'a> {
    pub(crate) list: SmallVec<[IoSliceMut<'a>; PIECES_A_CALL]>,
    pub(crate) bytes: usize,
}

impl<'a> Scatter<'a> {
    pub(crate) fn new() -> Self {
        Self {
            list: SmallVec::new(),
            bytes: 0,
        }
    }

    /// The sink's bytes from `skip` on; at most `PIECES_A_CALL - 1` pieces, so that one more fits.
    pub(crate) fn of<D: Sink>(sink: &'a mut D, mut skip: usize) -> Self {
        let mut scatter = Self::new();
        sink.visit_mut(&mut |piece| {
            let skipped = piece.len().min(skip);
            skip -= skipped;
            if skipped < piece.len() && scatter.list.len() < PIECES_A_CALL - 1 {
                scatter.add(&mut piece[skipped..]);
            }
        });
        scatter
    }

    pub(crate) fn add(&mut self, piece: &'a mut [u8]) {
        self.bytes += piece.len();
        self.list.push(IoSliceMut::new(piece));
    }

    /// Copies from `bytes` until either side is used up; returns how much.
    pub(crate) fn copy_from(mut self, bytes: &[u8]) -> usize {
        let mut left = bytes;
        for piece in &mut self.list {
            let (now, later) = left.split_at(left.len().min(piece.len()));
            piece[..now.len()].copy_from_slice(now);
            left = later;
        }
        bytes.len() - left.len()
    }
}
