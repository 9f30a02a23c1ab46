//! How the memory gets from the node to its client: over a Unix socket of a random name.
//!
//! ```text
//!   client                                          node
//!   Meeting::open(place, secret) ── over the link that is proved ──> offer(place, secret)
//!   Meeting::take  <── secret, ring bytes, descriptor ── connects to the place
//!
//!   Meeting::take_places  <── secret, bytes, descriptor ── offer_places      (later, another meeting)
//! ```
//!
//! What must always be true: the client takes memory only from who knows the secret; the node
//! connects to sockets of this purpose alone, and gives memory to nobody but who listens at the
//! place that a client with the key has named. Nothing here waits.

use super::{SharedEnd, Side, is_ring, memory_bytes};
use kvar_io::SharedMemory;
use kvar_io::region::Region;
use mio::net::UnixStream;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::fmt::Write as _;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream as Socket};
use std::sync::Arc;

/// Bytes of a place's name; random, so that nobody else has it.
pub const PLACE_BYTES: usize = 16;

/// Bytes of what the node must know to be believed.
pub const SECRET_BYTES: usize = 16;

/// What every place's name begins with: the node connects to no other.
const PLACE_PREFIX: &str = "kvar-link-";

/// What travels with the descriptor: the secret and a size, of a ring or of all places.
const GREETING_BYTES: usize = SECRET_BYTES + 8;

/// Strangers that are passed over before the meeting is given up. Names of abstract sockets can be
/// seen by everyone on the host.
const STRANGERS_MAX: usize = 16;

/// Why two sides do not share memory; the text says what was tried.
#[derive(Debug, thiserror::Error)]
pub enum MeetingRefused {
    /// The client's socket cannot be made.
    #[error("cannot listen on a Unix socket: {0}")]
    Listen(io::Error),
    /// The node finds nobody at the place: another host, or another network namespace.
    #[error(
        "the client's Unix socket cannot be reached ({0}): is it on this host, in this network namespace?"
    )]
    Reach(io::Error),
    /// There is no memory for it.
    #[error("no memory to share: {0}")]
    Memory(io::Error),
    /// The descriptor did not get through.
    #[error("the memory's descriptor cannot be sent: {0}")]
    Send(io::Error),
    /// Nobody came who knew the secret.
    #[error("the node says that it sent the memory, but it did not come")]
    NotSent,
    /// What came cannot be used.
    #[error("the memory that the node sent cannot be used: {0}")]
    Unusable(io::Error),
}

fn address(place: &[u8; PLACE_BYTES]) -> io::Result<SocketAddr> {
    let mut name = PLACE_PREFIX.to_owned();
    for byte in place {
        let _ = write!(name, "{byte:02x}");
    }
    SocketAddr::from_abstract_name(name)
}

/// The client's side: open, tell the node, take.
#[derive(Debug)]
pub struct Meeting {
    listener: UnixListener,
    secret: [u8; SECRET_BYTES],
}

impl Meeting {
    /// Waits at `place` for someone who knows `secret`; both must be random.
    ///
    /// # Errors
    /// The system gives no such socket.
    pub fn open(
        place: &[u8; PLACE_BYTES],
        secret: [u8; SECRET_BYTES],
    ) -> Result<Self, MeetingRefused> {
        let listen = || -> io::Result<UnixListener> {
            let listener = UnixListener::bind_addr(&address(place)?)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = listen().map_err(MeetingRefused::Listen)?;
        Ok(Self { listener, secret })
    }

    /// Takes what the node sent, after it has said that it did.
    ///
    /// # Errors
    /// It did not, or what it sent cannot be used.
    pub fn take(self) -> Result<SharedEnd, MeetingRefused> {
        let (stream, ring_bytes, file) = self.accept()?;
        finish(stream, ring_bytes, file).map_err(MeetingRefused::Unusable)
    }

    /// Takes places of so many bytes that the node sent, after it has said that it did.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn take_places(self, bytes: u64) -> Result<Arc<Region>, MeetingRefused> {
        let (_, sent, file) = self.accept()?;
        let region = || {
            if sent as u64 != bytes {
                let text = format!("{sent} bytes were sent where {bytes} were to come");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            Region::received(&SharedMemory::received(file, sent)?)
        };
        region().map_err(MeetingRefused::Unusable)
    }

    fn accept(&self) -> Result<(Socket, usize, OwnedFd), MeetingRefused> {
        for _ in 0..STRANGERS_MAX {
            let Ok((stream, _)) = self.listener.accept() else {
                return Err(MeetingRefused::NotSent);
            };
            // Whoever knows no secret is no node, whatever else it says.
            let Some((bytes, file)) = self.greeting(&stream) else {
                continue;
            };
            return Ok((stream, bytes, file));
        }
        Err(MeetingRefused::NotSent)
    }

    fn greeting(&self, stream: &Socket) -> Option<(usize, OwnedFd)> {
        let mut said = [0; GREETING_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut pieces = [IoSliceMut::new(&mut said)];
        let received = rustix::net::recvmsg(stream, &mut pieces, &mut rights, flags).ok()?;
        let file = rights
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut files) => files.next(),
                _ => None,
            })
            .next();
        if received.bytes != GREETING_BYTES || said[..SECRET_BYTES] != self.secret {
            return None;
        }
        let bytes = u64::from_le_bytes(*said[SECRET_BYTES..].first_chunk()?);
        Some((usize::try_from(bytes).ok()?, file?))
    }
}

fn finish(stream: Socket, ring_bytes: usize, file: OwnedFd) -> io::Result<SharedEnd> {
    if !is_ring(ring_bytes) {
        let text = format!("a ring of {ring_bytes} bytes; update the older of client and node");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    stream.set_nonblocking(true)?;
    let memory = SharedMemory::received(file, memory_bytes(ring_bytes))?;
    SharedEnd::new(
        &memory,
        ring_bytes,
        UnixStream::from_std(stream),
        Side::Client,
    )
}

/// The node's side: makes the memory and sends it to `place`. Making it writes zeros over all of it:
/// about 0.3 ms for 2 MiB, once a link.
///
/// # Errors
/// Why the two cannot share memory; the link stays as it is.
pub fn offer(
    place: &[u8; PLACE_BYTES],
    secret: &[u8; SECRET_BYTES],
    ring_bytes: usize,
) -> Result<SharedEnd, MeetingRefused> {
    // First, since it is what fails for a client that is not on this host.
    let bell = reach(place)?;
    let memory = SharedMemory::create(memory_bytes(ring_bytes)).map_err(MeetingRefused::Memory)?;
    send(&bell, secret, ring_bytes, &memory)?;
    SharedEnd::new(&memory, ring_bytes, bell, Side::Node).map_err(MeetingRefused::Memory)
}

/// The node's side: sends memory for places, which it has made and reserved, to `place`.
///
/// # Errors
/// Why the two cannot share it; the link stays as it is.
pub fn offer_places(
    place: &[u8; PLACE_BYTES],
    secret: &[u8; SECRET_BYTES],
    memory: &SharedMemory,
) -> Result<(), MeetingRefused> {
    send(&reach(place)?, secret, memory.bytes(), memory)
}

fn reach(place: &[u8; PLACE_BYTES]) -> Result<UnixStream, MeetingRefused> {
    address(place)
        .and_then(|address| UnixStream::connect_addr(&address))
        .map_err(MeetingRefused::Reach)
}

fn send(
    socket: &UnixStream,
    secret: &[u8; SECRET_BYTES],
    bytes: usize,
    memory: &SharedMemory,
) -> Result<(), MeetingRefused> {
    let mut greeting = [0; GREETING_BYTES];
    greeting[..SECRET_BYTES].copy_from_slice(secret);
    greeting[SECRET_BYTES..].copy_from_slice(&(bytes as u64).to_le_bytes());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let files = [memory.as_fd()];
    rights.push(SendAncillaryMessage::ScmRights(&files));
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&greeting)], &mut rights, flags);
    match sent {
        Ok(GREETING_BYTES) => Ok(()),
        Ok(_) => Err(MeetingRefused::Send(io::ErrorKind::WriteZero.into())),
        Err(error) => Err(MeetingRefused::Send(error.into())),
    }
}
