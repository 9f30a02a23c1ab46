//! Links over TCP, and the listener that accepts them.
//!
//! Sockets are non-blocking and watched edge-triggered by the caller's `mio::Poll` or reactor. Headers leave
//! with their payload in one call, so Nagle's algorithm is off. Buffers of the kernel are left to
//! its own tuning: a fixed size would switch that off.

use crate::link::{Framing, LinkOptions, Readiness};
use crate::pieces::{Sink, Source};
use crate::stream::{Stream, StreamLink, Watched};
use kvar_io::{Ready, Watcher, calls};
use mio::{Interest, Token};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Connections that may wait to be accepted; the kernel's own usual bound.
const BACKLOG: i32 = 1024;

/// How a TCP connection is watched.
#[derive(Clone, Copy, Debug)]
pub struct TcpOptions {
    /// A peer that does not take or acknowledge what was sent for this long is gone. Deadlines of
    /// calls are much shorter; this one only frees what a dead peer holds.
    pub user_timeout: Duration,
    /// A silent peer is asked after this long whether it still is there.
    pub keepalive: Duration,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            user_timeout: Duration::from_secs(20),
            keepalive: Duration::from_secs(10),
        }
    }
}

/// A TCP connection as a [`Stream`].
#[derive(Debug)]
pub struct TcpStream(mio::net::TcpStream);

/// A link over TCP.
pub type TcpLink<S, D> = StreamLink<TcpStream, S, D>;

impl TcpStream {
    /// Begins to connect; [`crate::Event::Up`] or `Down` says how that went.
    ///
    /// # Errors
    /// When it cannot even begin.
    pub fn connect(address: SocketAddr, options: TcpOptions) -> io::Result<Self> {
        let stream = mio::net::TcpStream::connect(address)?;
        configure(&stream, options)?;
        Ok(Self(stream))
    }

    /// Takes over a connection that stands.
    ///
    /// # Errors
    /// When the socket's options cannot be set.
    pub fn from_std(stream: std::net::TcpStream, options: TcpOptions) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let stream = mio::net::TcpStream::from_std(stream);
        configure(&stream, options)?;
        Ok(Self(stream))
    }

    /// Who is at the other end.
    ///
    /// # Errors
    /// When nobody is any more.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.0.peer_addr()
    }

    /// Whether the other end is on this host, as far as addresses tell: loopback, or the very
    /// address that this end has.
    #[must_use]
    pub fn is_same_host(&self) -> bool {
        match (self.0.peer_addr(), self.0.local_addr()) {
            (Ok(peer), Ok(local)) => peer.ip().is_loopback() || peer.ip() == local.ip(),
            _ => false,
        }
    }
}

fn configure(stream: &mio::net::TcpStream, options: TcpOptions) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(options.keepalive);
    socket.set_tcp_keepalive(&keepalive.with_interval(options.keepalive / 2))?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(options.user_timeout))?;
    Ok(())
}

impl Stream for TcpStream {
    fn connected(&mut self) -> io::Result<bool> {
        if let Some(error) = self.0.take_error()? {
            return Err(error);
        }
        match self.0.peer_addr() {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn read(&mut self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        calls::note();
        self.0.read_vectored(pieces)
    }

    fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        calls::note();
        // Sending to a closed socket is to be an error here, not a signal to the process.
        SockRef::from(&self.0).send_vectored_with_flags(pieces, libc::MSG_NOSIGNAL)
    }

    fn finish(&mut self) {
        // An error says that the connection is closed already, which is what was wanted.
        let _ = self.0.shutdown(Shutdown::Write);
    }
}

impl Watched for TcpStream {
    fn register(&mut self, watcher: &dyn Watcher, token: Token) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        watcher.watch(self.0.as_raw_fd(), token, interest)
    }

    fn deregister(&mut self, watcher: &dyn Watcher) -> io::Result<()> {
        watcher.unwatch(self.0.as_raw_fd())
    }

    fn on_event(&mut self, event: Ready) -> Readiness {
        Readiness {
            readable: event.readable,
            writable: event.writable || event.error,
            closed: event.read_closed || event.error,
        }
    }
}

impl<S: Source, D: Sink> TcpLink<S, D> {
    /// A link over an accepted connection.
    #[must_use]
    pub fn accepted(stream: TcpStream, framing: Framing, options: LinkOptions) -> Self {
        Self::new(stream, framing, options, false)
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
        Ok(Self::new(
            TcpStream::connect(address, tcp)?,
            framing,
            options,
            true,
        ))
    }
}

/// Why an address cannot be listened on, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Someone else has it.
    #[error(
        "{address} is taken by another process: stop that one, or listen on another port \
         (port 0 takes any free one)"
    )]
    InUse {
        /// The address.
        address: SocketAddr,
    },
    /// The operating system does not allow it.
    #[error("no permission to listen on {address}: ports below 1024 need privileges, take another")]
    Forbidden {
        /// The address.
        address: SocketAddr,
    },
    /// No interface of this machine has it.
    #[error("{address} is no address of this machine: see its addresses with `ip address`")]
    NotHere {
        /// The address.
        address: SocketAddr,
    },
    /// Something else.
    #[error("cannot listen on {address}: {source}")]
    Other {
        /// The address.
        address: SocketAddr,
        /// What the operating system says.
        source: io::Error,
    },
}

/// Accepts connections.
#[derive(Debug)]
pub struct Listener {
    listener: mio::net::TcpListener,
    address: SocketAddr,
    options: TcpOptions,
}

impl Listener {
    /// Listens on `address`; port 0 takes any free one, [`local_addr`](Self::local_addr) says
    /// which.
    ///
    /// # Errors
    /// Why not, naming the address.
    pub fn bind(address: SocketAddr) -> Result<Self, BindError> {
        Self::try_bind(address).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { address },
            io::ErrorKind::PermissionDenied => BindError::Forbidden { address },
            io::ErrorKind::AddrNotAvailable => BindError::NotHere { address },
            _ => BindError::Other { address, source },
        })
    }

    fn try_bind(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        // A restart must not wait for the connections of the process before it to be forgotten.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = mio::net::TcpListener::from_std(socket.into());
        let address = listener.local_addr()?;
        Ok(Self {
            listener,
            address,
            options: TcpOptions::default(),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Has it watched. Edge-triggered: accept until `None`.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn register(&mut self, watcher: &dyn Watcher, token: Token) -> io::Result<()> {
        watcher.watch(self.listener.as_raw_fd(), token, Interest::READABLE)
    }

    /// Ends that; before it is dropped, or connections would still be taken up.
    ///
    /// # Errors
    /// When it was not watched.
    pub fn deregister(&mut self, watcher: &dyn Watcher) -> io::Result<()> {
        watcher.unwatch(self.listener.as_raw_fd())
    }

    /// The next connection; `None` when there is none at the moment.
    ///
    /// # Errors
    /// When this process has no descriptor or memory left: the connection waits, so try again
    /// after a pause (no new edge will come for it).
    pub fn accept(&mut self) -> io::Result<Option<(TcpStream, SocketAddr)>> {
        loop {
            match self.listener.accept() {
                Ok((stream, peer)) => {
                    // A peer that is gone already is no reason to stop accepting.
                    if configure(&stream, self.options).is_ok() {
                        return Ok(Some((TcpStream(stream), peer)));
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::ConnectionReset => {}
                    _ => return Err(error),
                },
            }
        }
    }
}
