//! A stream of bytes through memory that client and node share.
//!
//! ```text
//!   writer ring ──>  memfd, made and sealed by the node  ──> reader ring        two of them, crossed
//!   bell: a Unix socket, one byte when the other side sleeps
//!   life: that socket, and the TCP connection on which both agreed to share
//! ```
//!
//! `docs/internals/links.md` tells how the two sides come together, what lies where and what is
//! trusted (nothing). Here are the parts: `meeting` passes the memory, [`crate::ring`] moves the
//! bytes, and [`SharedStream`] makes a [`Stream`] of them, so that frames, fences and bounds are
//! those of every other link.
//!
//! What must always be true: a peer that is gone is told from one that is slow by its sockets
//! alone; whatever it wrote before it went is still read.

mod meeting;

pub use meeting::{Meeting, MeetingRefused, PLACE_BYTES, SECRET_BYTES, offer, offer_places};

pub use kvar_io::region::{Lender, Region, Slot};

use crate::link::Readiness;
use crate::ring::{Reader, RingMemory, Scribbled, Word, Writer};
use crate::stream::{Stream, Watched};
use crate::tcp::TcpStream;
use kvar_io::shared::{SharedBytes, Words};
use kvar_io::{Ready, SharedMemory, Watcher, calls};
use mio::net::UnixStream;
use mio::{Interest, Token};
use socket2::SockRef;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};

/// Smallest ring: below this a block of 64 KiB would be handed over by crumbs.
pub const RING_BYTES_MIN: usize = 64 << 10;

/// Largest ring: four of the largest blocks; more is memory that no cache holds.
pub const RING_BYTES_MAX: usize = 64 << 20;

/// Where the bytes begin: behind one page of words.
const CONTROL_BYTES: usize = 4096;

/// Where the second ring's words begin.
const SECOND_RING_AT: usize = CONTROL_BYTES / 2;

/// Every word alone on two cache lines: processors fetch them in pairs.
const WORD_STRIDE_BYTES: usize = 128;
const WORDS_A_RING: usize = 4;

/// Bytes taken off the bell at once; an honest peer never rings so often unheard.
const BELL_BYTES: usize = 64;

/// Calls that silence a bell at one event: a peer that rings for ever keeps nobody here.
const SILENCE_CALLS_MAX: usize = 8;

/// Bytes of memory that a link with rings of this size takes.
#[must_use]
pub const fn memory_bytes(ring_bytes: usize) -> usize {
    CONTROL_BYTES + 2 * ring_bytes
}

/// The largest rings that fit so much memory a link: a power of two each.
#[must_use]
pub fn ring_bytes(bytes_a_link: u64) -> usize {
    let half = usize::try_from(bytes_a_link / 2).unwrap_or(RING_BYTES_MAX);
    let half = half.clamp(RING_BYTES_MIN, RING_BYTES_MAX);
    1 << half.ilog2()
}

/// Whether this build makes rings of this size.
fn is_ring(ring_bytes: usize) -> bool {
    ring_bytes.is_power_of_two() && (RING_BYTES_MIN..=RING_BYTES_MAX).contains(&ring_bytes)
}

/// Who one is to the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Client,
    Node,
}

/// One ring in shared memory.
struct SharedRing {
    words: Words,
    bytes: SharedBytes,
}

impl RingMemory for SharedRing {
    fn capacity(&self) -> usize {
        self.bytes.len()
    }

    fn load(&self, word: Word) -> u64 {
        self.words.word(word as usize).load(Ordering::Acquire)
    }

    fn store(&self, word: Word, value: u64) {
        self.words
            .word(word as usize)
            .store(value, Ordering::Release);
    }

    fn raise(&self, flag: Word) {
        self.words.word(flag as usize).store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    fn is_raised(&self, flag: Word) -> bool {
        fence(Ordering::SeqCst);
        self.words.word(flag as usize).load(Ordering::Relaxed) != 0
    }

    fn take(&self, flag: Word) -> bool {
        self.words.word(flag as usize).swap(0, Ordering::SeqCst) != 0
    }

    fn copy_in(&mut self, at: usize, bytes: &[u8]) {
        self.bytes.copy_in(at, bytes);
    }

    fn copy_out(&self, at: usize, into: &mut [u8]) {
        self.bytes.copy_out(at, into);
    }
}

/// One side's half of a piece of shared memory, and its bell: what a meeting comes to.
pub struct SharedEnd {
    writer: Writer<SharedRing>,
    reader: Reader<SharedRing>,
    bell: UnixStream,
    ring_bytes: usize,
}

impl std::fmt::Debug for SharedEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SharedEnd(2 rings of {} bytes)", self.ring_bytes)
    }
}

impl SharedEnd {
    fn new(
        memory: &SharedMemory,
        ring_bytes: usize,
        bell: UnixStream,
        side: Side,
    ) -> io::Result<Self> {
        let mut carver = memory.map()?;
        let to_node = carver.words(WORDS_A_RING, WORD_STRIDE_BYTES);
        carver.skip_to(SECOND_RING_AT);
        let to_client = carver.words(WORDS_A_RING, WORD_STRIDE_BYTES);
        carver.skip_to(CONTROL_BYTES);
        let mut ring = |words| SharedRing {
            words,
            bytes: carver.bytes(ring_bytes),
        };
        let (to_node, to_client) = (ring(to_node), ring(to_client));
        let (written, read) = match side {
            Side::Client => (to_node, to_client),
            Side::Node => (to_client, to_node),
        };
        Ok(Self {
            writer: Writer::new(written),
            reader: Reader::new(read),
            bell,
            ring_bytes,
        })
    }

    /// Bytes of memory it takes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        memory_bytes(self.ring_bytes)
    }

    /// What rings when the other side has something to say; to be watched.
    pub(crate) fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}

/// A stream through shared memory; see the module.
#[derive(Debug)]
pub struct SharedStream {
    end: SharedEnd,
    /// The connection on which both agreed: nothing travels on it any more, but when it goes the
    /// peer is gone.
    tcp: TcpStream,
    /// Places for the peer's reads, if it has asked for some.
    places: Option<SharedBytes>,
    /// The peer sends no more.
    closed: bool,
    /// The peer does not read any more either.
    gone: bool,
}

impl SharedStream {
    /// Goes on over `end` where `tcp` leaves off.
    #[must_use]
    pub fn new(end: SharedEnd, tcp: TcpStream) -> Self {
        Self {
            end,
            tcp,
            places: None,
            closed: false,
            gone: false,
        }
    }

    /// Bytes can be placed here from now on.
    pub fn stage(&mut self, places: SharedBytes) {
        self.places = Some(places);
    }

    /// Takes what rang.
    fn silence(&mut self) {
        let mut taken = [0; BELL_BYTES];
        for _ in 0..SILENCE_CALLS_MAX {
            calls::note();
            match self.end.bell.read(&mut taken) {
                Ok(0) => {
                    self.closed = true;
                    return;
                }
                Ok(BELL_BYTES) => {}
                Ok(_) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    (self.closed, self.gone) = (true, true);
                    return;
                }
            }
        }
    }
}

/// Rings. A bell that cannot be rung has rung already (its buffer is full), or nobody is left to
/// hear it, which its socket will say.
fn ring(bell: &UnixStream) {
    calls::note();
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    let _ = SockRef::from(bell).send_with_flags(&[1], flags);
}

fn scribbled(error: Scribbled) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Stream for SharedStream {
    fn connected(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    fn read(&mut self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let SharedEnd { reader, bell, .. } = &mut self.end;
        match reader.read(pieces, || ring(bell)).map_err(scribbled)? {
            0 if self.closed => Ok(0),
            0 => Err(io::ErrorKind::WouldBlock.into()),
            read => Ok(read),
        }
    }

    fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.gone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let SharedEnd { writer, bell, .. } = &mut self.end;
        match writer.write(pieces, || ring(bell)).map_err(scribbled)? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            written => Ok(written),
        }
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
        // An error says that the peer has gone already.
        let _ = self.end.bell.shutdown(Shutdown::Write);
        self.tcp.finish();
    }

    fn arm(&mut self, wants: Readiness) -> Readiness {
        let SharedEnd {
            reader,
            writer,
            bell,
            ..
        } = &mut self.end;
        // What is found wrong here is found again, and told, by the read or write that it leads to.
        let readable = wants.readable && reader.arm().unwrap_or(true);
        let writable = wants.writable && writer.arm().unwrap_or(true);
        let rested = reader.rest(|| ring(bell)).is_ok();
        Readiness {
            readable: readable || !rested,
            writable,
            closed: false,
        }
    }

    fn needs_arming(&self) -> bool {
        true
    }
}

impl Watched for SharedStream {
    fn register(&mut self, watcher: &dyn Watcher, token: Token) -> io::Result<()> {
        watcher.watch(self.end.bell(), token, Interest::READABLE)
    }

    fn deregister(&mut self, watcher: &dyn Watcher) -> io::Result<()> {
        watcher.unwatch(self.end.bell())?;
        self.tcp.deregister(watcher)
    }

    fn on_event(&mut self, event: Ready) -> Readiness {
        self.silence();
        // Of both sockets: when either ends the peer is gone, or about to.
        self.closed |= event.read_closed || event.error;
        self.gone |= event.write_closed || event.error;
        Readiness {
            readable: true,
            writable: true,
            closed: self.closed,
        }
    }
}
