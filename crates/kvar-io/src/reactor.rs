//! What a thread sleeps over: its sockets, its mailbox, its devices and the next timer, all at once.
//!
//! ```text
//!                 Reactor::turn(timeout) ── the thread's one sleep
//!                  │                  │
//!        one ring for all       epoll (mio), and of each device its own
//!        io_uring_enter:        epoll_wait: what is ready
//!          operations out       each device: its ring or its threads, and a
//!          answers in             descriptor that says when to look
//!          sockets ready
//! ```
//!
//! | | one ring | epoll |
//! |---|---|---|
//! | when | io_uring of Linux 6.1, and nobody chose threads | else |
//! | a socket | a poll that goes on; an answer an edge | edge-triggered |
//! | a device | shares the ring: [`Device::kick`] queues, `turn` hands over | watched by its descriptor |
//! | system calls of a turn | one; none if nothing is to be handed over or taken and there is no sleep | one, and a device's |
//!
//! What must always be true: whoever uses either cannot tell which it is; an edge is never lost: what is
//! ready when it comes to be watched is said too; a descriptor is given up (`unwatch`) before it is closed.
//!
//! Why one ring: a ring whose work is put off is no good to sleep on through epoll (see the device's
//! module), so that each device needed an eventfd, its own call to hand over and its own call to look.

use crate::ring::hub::Hub;
use crate::{Arena, Device, DeviceError, DeviceOptions, IoEngine, Ring, Target, calls, open};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};
use rustix::event::EventfdFlags;
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

/// Events taken from epoll at once; more come with the next turn.
const EVENTS_A_TURN: usize = 256;

/// What a descriptor may be ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The token under which it is watched.
    pub token: Token,
    /// Something may be there to read.
    pub readable: bool,
    /// There may be room to write.
    pub writable: bool,
    /// The other side writes no more.
    pub read_closed: bool,
    /// The other side reads no more.
    pub write_closed: bool,
    /// Something is wrong; reading or writing says what.
    pub error: bool,
}

impl Ready {
    /// What a poll of the kernel's says.
    pub(crate) fn of_poll(token: Token, events: u32) -> Self {
        let has = |flag: i16| events & flag as u16 as u32 != 0;
        let hup = has(libc::POLLHUP);
        let error = has(libc::POLLERR);
        Self {
            token,
            readable: has(libc::POLLIN) || has(libc::POLLPRI),
            writable: has(libc::POLLOUT),
            read_closed: hup || has(libc::POLLRDHUP),
            write_closed: hup || error && has(libc::POLLOUT),
            error,
        }
    }

    /// It cannot be watched: whoever tries to use it hears why.
    pub(crate) fn broken(token: Token) -> Self {
        Self {
            token,
            readable: true,
            writable: true,
            read_closed: false,
            write_closed: false,
            error: true,
        }
    }
}

impl From<&mio::event::Event> for Ready {
    fn from(event: &mio::event::Event) -> Self {
        Self {
            token: event.token(),
            readable: event.is_readable(),
            writable: event.is_writable(),
            read_closed: event.is_read_closed(),
            write_closed: event.is_write_closed(),
            error: event.is_error(),
        }
    }
}

/// Whoever watches descriptors for a thread. Edge-triggered: what is ready is said once, and again when
/// it has become ready anew.
pub trait Watcher {
    /// Has a descriptor watched; what becomes of it comes with `token`.
    ///
    /// # Errors
    /// When the operating system refuses.
    fn watch(&self, descriptor: RawFd, token: Token, interest: Interest) -> io::Result<()>;

    /// Ends that; before the descriptor is closed.
    ///
    /// # Errors
    /// When it was not watched.
    fn unwatch(&self, descriptor: RawFd) -> io::Result<()>;
}

impl Watcher for Registry {
    fn watch(&self, descriptor: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        self.register(&mut SourceFd(&descriptor), token, interest)
    }

    fn unwatch(&self, descriptor: RawFd) -> io::Result<()> {
        self.deregister(&mut SourceFd(&descriptor))
    }
}

impl Watcher for RefCell<Hub> {
    fn watch(&self, descriptor: RawFd, token: Token, interest: Interest) -> io::Result<()> {
        self.borrow_mut().watch(descriptor, token, interest)
    }

    fn unwatch(&self, descriptor: RawFd) -> io::Result<()> {
        self.borrow_mut().unwatch(descriptor)
    }
}

/// Wakes a thread that sleeps in its reactor, from any other.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// Rings nobody yet: the sleeper has it watched, as readable.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(event))
    }

    /// Wakes whoever watches it; once at least after the last call.
    pub fn ring(&self) {
        calls::note();
        // Each write is an edge, whether or not the count is ever read. It cannot come to its end: that
        // is 2^64 calls away.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// See the module. Belongs to the thread that made it.
pub struct Reactor {
    inside: Inside,
    sleeps: u64,
}

enum Inside {
    Ring(Rc<RefCell<Hub>>),
    Epoll {
        poll: Poll,
        events: Events,
        registry: Rc<Registry>,
    },
}

impl Drop for Reactor {
    fn drop(&mut self) {
        if let Inside::Ring(hub) = &self.inside {
            hub.borrow_mut().unwatch_all();
        }
    }
}

impl Reactor {
    /// A reactor for the thread that calls, and why it is not the better one, if so. `engine` is how
    /// the thread's devices are to be opened.
    ///
    /// # Errors
    /// When the operating system has no descriptor left.
    pub fn new(engine: IoEngine) -> io::Result<(Self, Option<String>)> {
        let note = match engine {
            IoEngine::Threads => None,
            IoEngine::Auto | IoEngine::IoUring => match Hub::shared() {
                Ok(hub) => {
                    let inside = Inside::Ring(Rc::new(RefCell::new(hub)));
                    return Ok((Self { inside, sleeps: 0 }, None));
                }
                Err(refused) => Some(format!("{refused}; sockets are watched by epoll")),
            },
        };
        let poll = Poll::new()?;
        let registry = Rc::new(poll.registry().try_clone()?);
        let inside = Inside::Epoll {
            poll,
            events: Events::with_capacity(EVENTS_A_TURN),
            registry,
        };
        Ok((Self { inside, sleeps: 0 }, note))
    }

    /// In one word, for log and status: `io_uring` or `epoll`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self.inside {
            Inside::Ring(_) => "io_uring",
            Inside::Epoll { .. } => "epoll",
        }
    }

    /// How often it has slept, as far as it meant to.
    #[must_use]
    pub fn sleeps(&self) -> u64 {
        self.sleeps
    }

    /// Where descriptors are given to be watched.
    #[must_use]
    pub fn watcher(&self) -> Rc<dyn Watcher> {
        match &self.inside {
            Inside::Ring(hub) => hub.clone(),
            Inside::Epoll { registry, .. } => registry.clone(),
        }
    }

    /// As [`open_device`](crate::open_device), for a device that this thread drives between turns. One
    /// that shares the ring has no [`Device::readiness`]: the thread looks at it after each turn while
    /// something is in flight.
    ///
    /// # Errors
    /// When no engine that the options allow can be had.
    pub fn open_device(
        &self,
        target: &Target,
        arena: &Arena,
        options: DeviceOptions,
    ) -> Result<(Box<dyn Device>, Vec<String>), DeviceError> {
        if let Inside::Ring(hub) = &self.inside
            && options.engine != IoEngine::Threads
        {
            let file = target.try_clone_file()?;
            let opened = Ring::open_in(hub, file, target.bytes(), arena, options.depth);
            if let Ok(ring) = opened {
                let ring = ring.with_streams(target.write_streams());
                let notes = ring.notes().to_vec();
                return Ok((Box::new(ring), notes));
            }
        }
        // Also where the ring has as many devices as it may: one of its own is watched like a socket.
        open::open_device(target, arena, options)
    }

    /// Hands over what devices have queued, sleeps until something is ready, a device has answered or
    /// `timeout` is over (`None`: for as long as it takes), and appends what is ready. It may return early
    /// for nothing.
    ///
    /// # Errors
    /// When the operating system refuses; nothing can be waited for then.
    pub fn turn(&mut self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> io::Result<()> {
        self.sleeps += u64::from(timeout != Some(Duration::ZERO));
        match &mut self.inside {
            Inside::Ring(hub) => hub.borrow_mut().turn(timeout, ready),
            Inside::Epoll { poll, events, .. } => {
                calls::note();
                match poll.poll(events, timeout) {
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                    _ => {}
                }
                ready.extend(events.iter().map(Ready::from));
                Ok(())
            }
        }
    }
}
