//! What a device can do, whichever it is.

use crate::{Buffer, Lifetime, Shared};
use std::os::fd::RawFd;
use std::time::Duration;

/// One operation on a device. It owns the memory it moves.
///
/// Offsets and lengths are multiples of the page ([`kvar_base::PAGE_BYTES`]).
#[derive(Debug)]
pub enum Op {
    /// Fills the buffer's padded length from `offset`.
    Read {
        /// Byte offset on the device.
        offset: u64,
        /// Destination.
        buffer: Buffer,
    },
    /// Writes the buffers, padding included, one behind the other from `offset`.
    Write {
        /// Byte offset on the device.
        offset: u64,
        /// Sources, in order; at most [`Op::WRITE_BUFFERS_MAX`].
        buffers: Vec<Shared>,
        /// What will become of it: a hint to drives that keep apart what dies apart.
        lifetime: Lifetime,
    },
    /// Makes every write that has *completed* before this was submitted survive a power cut.
    Flush,
    /// Tells the device that a range is not needed; what is read from it afterwards is undefined.
    Discard {
        /// Byte offset on the device.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

impl Op {
    /// Most buffers in one write: what one gather list of the kernel takes with room to spare.
    pub const WRITE_BUFFERS_MAX: usize = 256;
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No space behind a sparse file, or a quota.
    #[error("no space left on the file system behind the data file")]
    NoSpace,
    /// The device moved fewer bytes than asked for and would not move the rest.
    #[error("short I/O: {moved} of {wanted} bytes")]
    Short {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes moved.
        moved: usize,
    },
    /// Outside the device, or not in whole pages: a defect of the caller.
    #[error("offset {offset} with {len} bytes is outside the device or not page-aligned")]
    Range {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Anything else the system said.
    #[error("{message}")]
    Io {
        /// The system's error number, if there was one.
        code: Option<i32>,
        /// The system's words.
        message: String,
    },
}

impl From<std::io::Error> for DeviceError {
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        if matches!(error.kind(), StorageFull | QuotaExceeded) {
            return Self::NoSpace;
        }
        Self::Io {
            code: error.raw_os_error(),
            message: error.to_string(),
        }
    }
}

/// An operation that is over, with its memory.
#[derive(Debug)]
pub struct Completion {
    /// The number it was submitted under.
    pub token: u64,
    /// The operation, its buffers included.
    pub op: Op,
    /// How it went. A read that failed leaves anything in its buffer.
    pub result: Result<(), DeviceError>,
}

/// A device, owned by one shard's thread. Operations complete in any order.
///
/// [`submit`](Self::submit) queues and never blocks; the caller bounds what is in flight.
/// [`kick`](Self::kick) hands the queue over; [`poll`](Self::poll) collects what is over. (In a thread's
/// [`Reactor`](crate::Reactor) the reactor's next turn does both.)
/// Dropping a device waits for what is in flight.
pub trait Device {
    /// Size in bytes, a multiple of the page.
    fn bytes(&self) -> u64;

    /// Queues an operation under a number of the caller's choice.
    fn submit(&mut self, token: u64, op: Op);

    /// Hands queued operations to the device.
    ///
    /// # Errors
    /// When the system refuses the whole queue (which then stays queued).
    fn kick(&mut self) -> Result<(), DeviceError>;

    /// Appends every completion there is; never blocks.
    fn poll(&mut self, out: &mut Vec<Completion>);

    /// Blocks until [`poll`](Self::poll) would find something, nothing is in flight, or `timeout`
    /// has passed; hands queued operations over first. It may return early for nothing.
    fn wait(&mut self, timeout: Duration);

    /// A descriptor that is readable when [`poll`](Self::poll) would find something, and now and
    /// then for nothing; `poll` makes it rest again. Always the same for one device. `None` where
    /// completions need no waiting (a simulated device) or come with the turns of a reactor.
    fn readiness(&self) -> Option<RawFd>;

    /// Operations submitted and not yet polled.
    fn in_flight(&self) -> usize;

    /// How it does I/O, in one word for log and status: `io_uring`, `threads`, `sim`.
    fn engine(&self) -> &'static str;

    /// System calls made on the caller's thread so far, for figures and tests; 0 where nobody counts.
    fn system_calls(&self) -> u64 {
        0
    }
}
