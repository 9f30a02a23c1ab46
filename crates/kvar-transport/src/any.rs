//! The stream of a client or node: TCP first, and shared memory if both sides agree to it.
//!
//! ```text
//!   Tcp ── share(end) ── all that was queued has left ──> Shared
//! ```
//!
//! What must always be true: the change happens between two frames in both directions, so neither
//! side may have anything under way when they agree to it (the protocol sees to that: `Attach` is
//! the first frame of a link).

use crate::link::{DownReason, Readiness};
use crate::pieces::{Sink, Source};
use crate::shared::{SharedEnd, SharedStream};
use crate::stream::{Stream, StreamLink, Watched};
use crate::tcp::{TcpOptions, TcpStream};
use crate::{Framing, LinkOptions};
use kvar_io::shared::SharedBytes;
use kvar_io::{Ready, Watcher};
use mio::Token;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;

/// What carries a link's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkKind {
    /// A TCP connection.
    Tcp,
    /// Memory that both sides share.
    SharedMemory,
}

impl LinkKind {
    /// The word used in status and metrics.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::SharedMemory => "shm",
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct AnyStream(Inside);

#[derive(Debug)]
enum Inside {
    Tcp(TcpStream, Option<Box<SharedEnd>>),
    Shared(Box<SharedStream>),
    /// Between the two, within one call.
    Changing,
}

/// A link that begins on TCP and may come to share memory.
pub type AnyLink<S, D> = StreamLink<AnyStream, S, D>;

macro_rules! inside {
    ($self:ident, $stream:ident => $do:expr) => {
        match &mut $self.0 {
            Inside::Tcp($stream, _) => $do,
            Inside::Shared($stream) => $do,
            Inside::Changing => unreachable!("a stream is changed within one call"),
        }
    };
}

impl AnyStream {
    /// Begins on TCP.
    #[must_use]
    pub fn tcp(stream: TcpStream) -> Self {
        Self(Inside::Tcp(stream, None))
    }

    fn kind(&self) -> LinkKind {
        match self.0 {
            Inside::Shared(_) => LinkKind::SharedMemory,
            Inside::Tcp(..) | Inside::Changing => LinkKind::Tcp,
        }
    }
}

impl Stream for AnyStream {
    fn connected(&mut self) -> io::Result<bool> {
        inside!(self, stream => stream.connected())
    }

    fn read(&mut self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        inside!(self, stream => stream.read(pieces))
    }

    fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        inside!(self, stream => stream.write(pieces))
    }

    fn places_bytes(&self) -> usize {
        match &self.0 {
            Inside::Shared(stream) => stream.places_bytes(),
            Inside::Tcp(..) | Inside::Changing => 0,
        }
    }

    fn place(&mut self, at: usize, bytes: &[u8]) {
        inside!(self, stream => stream.place(at, bytes));
    }

    fn finish(&mut self) {
        inside!(self, stream => stream.finish());
    }

    fn arm(&mut self, wants: Readiness) -> Readiness {
        inside!(self, stream => stream.arm(wants))
    }

    fn needs_arming(&self) -> bool {
        self.kind() == LinkKind::SharedMemory
    }

    fn on_drained(&mut self) -> bool {
        if !matches!(self.0, Inside::Tcp(_, Some(_))) {
            return false;
        }
        if let Inside::Tcp(tcp, Some(end)) = std::mem::replace(&mut self.0, Inside::Changing) {
            self.0 = Inside::Shared(Box::new(SharedStream::new(*end, tcp)));
        }
        true
    }
}

impl Watched for AnyStream {
    fn register(&mut self, watcher: &dyn Watcher, token: Token) -> io::Result<()> {
        inside!(self, stream => stream.register(watcher, token))
    }

    fn deregister(&mut self, watcher: &dyn Watcher) -> io::Result<()> {
        inside!(self, stream => stream.deregister(watcher))
    }

    fn on_event(&mut self, event: Ready) -> Readiness {
        inside!(self, stream => stream.on_event(event))
    }
}

impl<S: Source, D: Sink> AnyLink<S, D> {
    /// A link over an accepted connection.
    #[must_use]
    pub fn accepted(stream: TcpStream, framing: Framing, options: LinkOptions) -> Self {
        Self::new(AnyStream::tcp(stream), framing, options, false)
    }

    /// A link that is about to stand.
    ///
    /// # Errors
    /// When it cannot even begin.
    pub fn connect(
        address: SocketAddr,
        framing: Framing,
        options: LinkOptions,
        tcp: TcpOptions,
    ) -> io::Result<Self> {
        let stream = AnyStream::tcp(TcpStream::connect(address, tcp)?);
        Ok(Self::new(stream, framing, options, true))
    }

    /// Whether the peer is on this host, as far as the addresses of the connection tell.
    #[must_use]
    pub fn is_same_host(&self) -> bool {
        match &self.stream().0 {
            Inside::Tcp(tcp, _) => tcp.is_same_host(),
            Inside::Shared(_) | Inside::Changing => true,
        }
    }

    /// What carries its bytes now.
    #[must_use]
    pub fn kind(&self) -> LinkKind {
        self.stream().kind()
    }

    /// Goes over to shared memory as soon as what is queued has left through TCP, watched under the
    /// link's own `token`. A link that has it already goes down: the protocol has no such case.
    ///
    /// # Errors
    /// When the operating system refuses to watch the bell; the link stays on TCP.
    pub fn share(&mut self, end: SharedEnd, watcher: &dyn Watcher, token: Token) -> io::Result<()> {
        match &mut self.stream_mut().0 {
            Inside::Tcp(_, next @ None) => {
                watcher.watch(end.bell(), token, mio::Interest::READABLE)?;
                *next = Some(Box::new(end));
                self.after_change();
            }
            _ => self.fail(DownReason::Garbage("memory is shared already".to_owned())),
        }
        Ok(())
    }

    /// From now on bytes can be [placed](crate::Link::push_placed) in `places`, which the peer has
    /// too. Nothing is written there any more when the link is down.
    ///
    /// # Panics
    /// The link does not share memory.
    pub fn stage(&mut self, places: SharedBytes) {
        match &mut self.stream_mut().0 {
            Inside::Shared(stream) => stream.stage(places),
            Inside::Tcp(..) | Inside::Changing => {
                unreachable!("places belong to links that share memory")
            }
        }
    }
}
