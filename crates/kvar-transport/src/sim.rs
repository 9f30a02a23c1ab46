//! A simulated connection: two streams in memory that chop, stall and break by seed.
//!
//! Same seed and same calls, same behaviour: a failing test prints its seed and is replayed. Used
//! by the contract suite here and by simulations of more than one link.

use crate::stream::Stream;
use kvar_io::shared::SharedBytes;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::rc::Rc;

/// How the connection behaves.
#[derive(Clone, Copy, Debug)]
pub struct SimOptions {
    /// Most bytes that one call moves; each call draws how many.
    pub chunk_bytes_max: usize,
    /// One call in so many finds nothing to do though there is; 0 for never.
    pub stall_one_in: u64,
    /// Bytes that fit between the two ends.
    pub capacity_bytes: usize,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            chunk_bytes_max: 1 << 20,
            stall_one_in: 8,
            capacity_bytes: 256 << 10,
        }
    }
}

/// One end of a simulated connection.
pub struct SimStream {
    wire: Rc<RefCell<Wire>>,
    end: usize,
    places: Option<SharedBytes>,
}

/// Both ends' shared fate: break it, silence it, look at it.
pub struct SimControl(Rc<RefCell<Wire>>);

struct Wire {
    options: SimOptions,
    random: u64,
    /// `pipes[e]` holds what end `e` has sent and the other not received.
    pipes: [Pipe; 2],
    silent: bool,
    cut: bool,
}

#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    finished: bool,
}

/// Two ends of a new connection.
#[must_use]
pub fn pair(seed: u64, options: SimOptions) -> (SimStream, SimStream, SimControl) {
    let wire = Rc::new(RefCell::new(Wire {
        options,
        random: seed,
        pipes: [Pipe::default(), Pipe::default()],
        silent: false,
        cut: false,
    }));
    let end = |end| SimStream {
        wire: Rc::clone(&wire),
        end,
        places: None,
    };
    (end(0), end(1), SimControl(Rc::clone(&wire)))
}

impl SimStream {
    /// The same with places beside the stream.
    #[must_use]
    pub fn with_places(mut self, places: SharedBytes) -> Self {
        self.places = Some(places);
        self
    }
}

impl SimControl {
    /// Breaks the connection: what is under way is lost, both ends get an error.
    pub fn cut(&self) {
        self.0.borrow_mut().cut = true;
    }

    /// From here on nothing arrives and nobody is told (a half-open connection), or again.
    pub fn silence(&self, silent: bool) {
        self.0.borrow_mut().silent = silent;
    }

    /// Bytes that one end has sent and the other has not received.
    #[must_use]
    pub fn bytes_under_way(&self) -> usize {
        self.0
            .borrow()
            .pipes
            .iter()
            .map(|pipe| pipe.bytes.len())
            .sum()
    }
}

impl Wire {
    /// SplitMix64: tiny, and good enough to choose chunk sizes.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// How much this call may move of `possible` bytes.
    fn chunk(&mut self, possible: usize) -> io::Result<usize> {
        if self.cut {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let stalls =
            self.options.stall_one_in > 0 && self.draw().is_multiple_of(self.options.stall_one_in);
        if possible == 0 || stalls {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let most = possible.min(self.options.chunk_bytes_max);
        Ok(1 + (self.draw() % most as u64) as usize)
    }
}

impl Stream for SimStream {
    fn connected(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    fn read(&mut self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut wire = self.wire.borrow_mut();
        if wire.silent && !wire.cut {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let from = 1 - self.end;
        let room: usize = pieces.iter().map(|piece| piece.len()).sum();
        if wire.pipes[from].bytes.is_empty() && wire.pipes[from].finished && !wire.cut {
            return Ok(0);
        }
        let possible = wire.pipes[from].bytes.len().min(room);
        let mut left = wire.chunk(possible)?;
        let moved = left;
        for piece in pieces {
            let now = left.min(piece.len());
            for (to, byte) in piece.iter_mut().zip(wire.pipes[from].bytes.drain(..now)) {
                *to = byte;
            }
            left -= now;
        }
        Ok(moved)
    }

    fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut wire = self.wire.borrow_mut();
        if wire.pipes[self.end].finished {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let wanted: usize = pieces.iter().map(|piece| piece.len()).sum();
        let room = wire
            .options
            .capacity_bytes
            .saturating_sub(wire.pipes[self.end].bytes.len());
        let mut left = wire.chunk(wanted.min(room))?;
        let moved = left;
        for piece in pieces {
            let now = left.min(piece.len());
            wire.pipes[self.end].bytes.extend(&piece[..now]);
            left -= now;
        }
        Ok(moved)
    }

    fn places_bytes(&self) -> usize {
        self.places.as_ref().map_or(0, SharedBytes::len)
    }

    fn place(&mut self, at: usize, bytes: &[u8]) {
        if let Some(places) = &mut self.places {
            places.copy_in(at, bytes);
        }
    }

    fn finish(&mut self) {
        self.wire.borrow_mut().pipes[self.end].finished = true;
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        self.finish();
    }
}
