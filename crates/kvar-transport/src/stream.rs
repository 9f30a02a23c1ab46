//! A link over an ordered stream of bytes: TCP, or a simulated one.
//!
//! One `poll` turns the crank until something happened that the caller must know. What can be
//! answered from bytes already here is answered before the next read; what is queued is sent when
//! nothing more can be received, when [`SEND_EARLY_BYTES`] are queued, or at the end of the turn:
//! answers to a batch leave together, and a large answer does not wait for the small ones behind.

use crate::inbox::{Inbox, Next};
use crate::link::{
    Armed, DownReason, Event, FencedPush, FrameLengths, Framing, Link, LinkOptions, Owned,
    PullRefused, PushRefused, Readiness, SendRefused,
};
use crate::outbox::Outbox;
use crate::pieces::{Sink, Source};
use kvar_io::{Ready, Watcher};
use mio::Token;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};

/// With this much queued, sending does not wait for the end of the batch: the peer can begin to
/// copy while we look at the next request.
const SEND_EARLY_BYTES: usize = 128 << 10;

/// What is placed before the heads of what was placed leave: a block of the usual size, so that its
/// reader begins while the next one is copied.
const PLACE_BYTES: usize = 64 << 10;

/// A connection of bytes that never blocks.
pub trait Stream {
    /// Whether an outgoing connection stands by now.
    ///
    /// # Errors
    /// It never will.
    fn connected(&mut self) -> io::Result<bool>;

    /// Reads what is there; 0 is the end.
    ///
    /// # Errors
    /// `WouldBlock`, or the connection is broken.
    fn read(&mut self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize>;

    /// Writes what there is room for.
    ///
    /// # Errors
    /// `WouldBlock`, or the connection is broken.
    fn write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Bytes of memory beside the stream in which places can be written for the peer.
    fn places_bytes(&self) -> usize {
        0
    }

    /// Writes bytes to a place there; whoever reads what is written to the stream afterwards finds them.
    ///
    /// # Panics
    /// They would not lie inside.
    fn place(&mut self, _at: usize, _bytes: &[u8]) {
        unreachable!("what lies inside of nothing is never placed");
    }

    /// Tells the peer that nothing more will come.
    fn finish(&mut self);

    /// Before the thread sleeps: what of `wants` is possible after all. What is not will be
    /// announced. (Streams that the operating system watches have nothing to add.)
    fn arm(&mut self, _wants: Readiness) -> Readiness {
        Readiness::NOTHING
    }

    /// Whether [`arm`](Self::arm) must be called before the thread sleeps.
    fn needs_arming(&self) -> bool {
        false
    }

    /// All that was queued has been written; whether that changes what is possible.
    fn on_drained(&mut self) -> bool {
        false
    }
}

/// A stream whose descriptors are watched for its thread: by a `mio::Registry`, or by a node's reactor.
pub trait Watched: Stream {
    /// Has it watched, edge-triggered.
    ///
    /// # Errors
    /// When the operating system refuses.
    fn register(&mut self, watcher: &dyn Watcher, token: Token) -> io::Result<()>;

    /// Ends that.
    ///
    /// # Errors
    /// When it was not watched.
    fn deregister(&mut self, watcher: &dyn Watcher) -> io::Result<()>;

    /// What an event of its token makes possible.
    fn on_event(&mut self, event: Ready) -> Readiness;
}

/// [`Link`] over a [`Stream`].
pub struct StreamLink<T, S, D> {
    stream: T,
    framing: Framing,
    bounds: FrameLengths,
    outgoing_bytes_max: usize,
    outbox: Outbox<S>,
    inbox: Inbox<D>,
    readiness: Readiness,
    phase: Phase,
    paused: bool,
    /// Nothing to do until something is said to this link.
    idle: bool,
    /// What left or came back and has not been told yet.
    back: VecDeque<Back<S, D>>,
}

enum Phase {
    Connecting,
    Open,
    /// Sending is over by this error, but the peer's last words may still be there to read.
    Mute(DownReason),
    /// Sends what is queued, then waits for the peer to close.
    Finishing {
        said: bool,
    },
    Down(Option<DownReason>),
}

enum Back<S, D> {
    Sent(u64, S),
    Returned(Owned<S, D>),
}

/// What one turn of the crank came to; an `Event` without its borrows.
enum Step<S, D> {
    Up,
    Frame(usize),
    Received(u64, D),
    Back(Back<S, D>),
    Down(DownReason),
    Yield,
    Idle,
}

impl<T: Stream, S: Source, D: Sink> StreamLink<T, S, D> {
    /// A link over a stream that stands (`connecting` false) or is about to.
    pub fn new(stream: T, framing: Framing, options: LinkOptions, connecting: bool) -> Self {
        Self {
            stream,
            framing,
            bounds: FrameLengths {
                message: options.message_bytes_max,
                payload: options.payload_bytes_max,
            },
            outgoing_bytes_max: options.outgoing_bytes_max,
            outbox: Outbox::new(),
            inbox: Inbox::new(),
            readiness: Readiness {
                readable: !connecting,
                writable: !connecting,
                closed: false,
            },
            phase: if connecting {
                Phase::Connecting
            } else {
                Phase::Open
            },
            paused: false,
            idle: false,
            back: VecDeque::new(),
        }
    }

    /// The stream, to register it or ask its address.
    pub fn stream_mut(&mut self) -> &mut T {
        &mut self.stream
    }

    /// The stream.
    pub fn stream(&self) -> &T {
        &self.stream
    }

    /// Has the stream look whether it may change now, since nothing may be queued.
    pub(crate) fn after_change(&mut self) {
        if self.outbox.is_empty() && self.stream.on_drained() {
            self.notify(Readiness::TRY_ALL);
        }
    }

    /// Goes down for a reason that this side has found.
    pub(crate) fn fail(&mut self, reason: DownReason) {
        self.go_down(reason);
    }

    fn may_send(&self) -> Result<(), SendRefused> {
        match self.phase {
            Phase::Connecting | Phase::Open if self.outbox.bytes() < self.outgoing_bytes_max => {
                Ok(())
            }
            Phase::Connecting | Phase::Open => Err(SendRefused::Full),
            _ => Err(SendRefused::Down),
        }
    }

    fn step(&mut self, budget: &mut usize) -> Step<S, D> {
        loop {
            if let Some(back) = self.back.pop_front() {
                return Step::Back(back);
            }
            match &mut self.phase {
                Phase::Down(reason) => return reason.take().map_or(Step::Idle, Step::Down),
                // Asking takes the socket's error away, so not before there is something to say.
                Phase::Connecting if !self.readiness.writable => return Step::Idle,
                Phase::Connecting => match self.stream.connected() {
                    Ok(true) => {
                        self.phase = Phase::Open;
                        self.readiness.readable = true;
                        return Step::Up;
                    }
                    Ok(false) => {
                        self.readiness.writable = false;
                        return Step::Idle;
                    }
                    Err(error) => {
                        self.go_down(DownReason::Connect(error.to_string()));
                        continue;
                    }
                },
                Phase::Finishing { said } => {
                    if self.outbox.is_empty() && !*said {
                        *said = true;
                        self.stream.finish();
                    }
                    self.inbox.discard();
                }
                Phase::Open | Phase::Mute(_) => {}
            }
            // Where a call costs nothing there is no reason to wait for a batch: the peer begins on the
            // first frame while we look at the next.
            let early = self.outbox.bytes() >= SEND_EARLY_BYTES || self.stream.needs_arming();
            if early && (self.place(budget) | self.write(budget)) {
                continue;
            }
            if *budget == 0 {
                // Small answers leave even when the turn was used up by receiving.
                let mut grace = SEND_EARLY_BYTES;
                if self.write(&mut grace) {
                    continue;
                }
                return Step::Yield;
            }
            match self.inbox.next(self.framing, self.bounds, self.paused) {
                Next::Frame(_) if matches!(self.phase, Phase::Finishing { .. }) => {}
                Next::Frame(payload_bytes) => return Step::Frame(payload_bytes),
                Next::Received(token, sink) => return Step::Received(token, sink),
                Next::Bad(why) => self.go_down(DownReason::Garbage(why)),
                Next::Need if self.readiness.readable => self.read(budget),
                Next::Need | Next::Wait => {
                    if self.place(budget) | self.write(budget) {
                        continue;
                    }
                    if let Phase::Mute(reason) = &self.phase {
                        let reason = reason.clone();
                        self.go_down(reason);
                        continue;
                    }
                    return Step::Idle;
                }
            }
        }
    }

    fn read(&mut self, budget: &mut usize) {
        match self.inbox.read(&mut self.stream) {
            Ok((0, _)) => {
                let reason = match &self.phase {
                    Phase::Mute(reason) => reason.clone(),
                    _ if self.inbox.at_frame_border() => DownReason::Closed,
                    _ => DownReason::Cut,
                };
                self.go_down(reason);
            }
            Ok((read, room)) => {
                *budget = budget.saturating_sub(read);
                // A short read has emptied the socket; the next edge will tell. (Not after the
                // peer has closed: that edge has passed, and the end must still be read.)
                self.readiness.readable = read == room || self.readiness.closed;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readiness.readable = false;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => self.go_down(DownReason::Broken(error.to_string())),
        }
    }

    /// Places some of what is to be placed before anything behind it is sent; whether there was any.
    fn place(&mut self, budget: &mut usize) -> bool {
        // What cannot be told need not be there yet.
        if !self.may_write() {
            return false;
        }
        let stream = &mut self.stream;
        let placed = self.outbox.place(PLACE_BYTES.min(*budget), |at, bytes| {
            stream.place(at, bytes);
        });
        *budget -= placed;
        placed > 0
    }

    fn may_write(&self) -> bool {
        let can = matches!(self.phase, Phase::Open | Phase::Finishing { .. });
        can && self.readiness.writable && !self.outbox.is_empty()
    }

    /// Sends once; whether the crank should turn again.
    fn write(&mut self, budget: &mut usize) -> bool {
        if !self.may_write() || *budget == 0 {
            return false;
        }
        let gather = self.outbox.gather();
        let wanted = gather.bytes;
        if wanted == 0 {
            return false; // the first is to be placed before
        }
        let result = self.stream.write(&gather.list);
        drop(gather);
        match result {
            Ok(written) => {
                *budget = budget.saturating_sub(written);
                self.readiness.writable = written == wanted;
                let back = &mut self.back;
                self.outbox.sent(written, |token, source| {
                    back.push_back(Back::Sent(token, source));
                });
                self.after_change();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readiness.writable = false;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                self.give_sources_back();
                // The peer may have said why before it closed: read that first.
                self.readiness.readable = true;
                self.phase = Phase::Mute(DownReason::Broken(error.to_string()));
            }
        }
        true
    }

    fn give_sources_back(&mut self) {
        let back = &mut self.back;
        self.outbox.clear(|token, source| {
            back.push_back(Back::Returned(Owned::Source { token, source }));
        });
    }

    fn go_down(&mut self, reason: DownReason) {
        if matches!(self.phase, Phase::Down(_)) {
            return;
        }
        self.give_sources_back();
        if let Some((token, sink)) = self.inbox.clear() {
            self.back
                .push_back(Back::Returned(Owned::Sink { token, sink }));
        }
        self.stream.finish();
        self.phase = Phase::Down(Some(reason));
        self.idle = false;
    }
}

impl<T: Stream, S: Source, D: Sink> Link for StreamLink<T, S, D> {
    type Source = S;
    type Sink = D;

    fn send(&mut self, head: &[u8]) -> Result<(), SendRefused> {
        self.may_send()?;
        self.outbox.add(head, None);
        self.idle = false;
        Ok(())
    }

    fn push(&mut self, head: &[u8], token: u64, source: S) -> Result<(), PushRefused<S>> {
        if let Err(why) = self.may_send() {
            return Err(PushRefused { source, why });
        }
        debug_assert!(
            head.first_chunk().is_some_and(|header| {
                (self.framing)(header).is_ok_and(|lengths| lengths.payload == source.len())
            }),
            "a frame's header must announce its payload's length",
        );
        self.outbox.add(head, Some((token, source)));
        self.idle = false;
        Ok(())
    }

    fn push_placed(
        &mut self,
        head: &[u8],
        token: u64,
        source: S,
        at: usize,
    ) -> Result<(), PushRefused<S>> {
        if let Err(why) = self.may_send() {
            return Err(PushRefused { source, why });
        }
        let end = at.checked_add(source.len());
        assert!(
            end.is_some_and(|end| end <= self.stream.places_bytes()),
            "a place lies inside the memory that is shared for it"
        );
        self.outbox.add_placed(head, token, source, at);
        self.idle = false;
        Ok(())
    }

    fn pull(&mut self, token: u64, sink: D) -> Result<(), PullRefused<D>> {
        self.idle = false;
        self.inbox
            .pull(token, sink)
            .map_err(|(sink, payload_bytes)| PullRefused {
                sink,
                payload_bytes,
            })
    }

    fn discard(&mut self) {
        self.idle = false;
        self.inbox.discard();
    }

    fn fence_push(&mut self, token: u64) -> Option<FencedPush<S>> {
        if let Some(fenced) = self.outbox.fence(token) {
            self.idle = false;
            return Some(fenced);
        }
        // Sent or returned already, and not told yet: tell it now instead.
        let is_it = |back: &Back<S, D>| match back {
            Back::Sent(its, _) | Back::Returned(Owned::Source { token: its, .. }) => *its == token,
            Back::Returned(Owned::Sink { .. }) => false,
        };
        let index = self.back.iter().position(is_it)?;
        match self.back.remove(index)? {
            Back::Sent(_, source) | Back::Returned(Owned::Source { source, .. }) => {
                Some(FencedPush {
                    source,
                    unsent: false,
                })
            }
            Back::Returned(Owned::Sink { .. }) => None,
        }
    }

    fn fence_pull(&mut self, token: u64) -> Option<D> {
        if let Some(sink) = self.inbox.fence(token) {
            self.idle = false;
            return Some(sink);
        }
        let is_it = |back: &Back<S, D>| matches!(back, Back::Returned(Owned::Sink { token: its, .. }) if *its == token);
        let index = self.back.iter().position(is_it)?;
        match self.back.remove(index)? {
            Back::Returned(Owned::Sink { sink, .. }) => Some(sink),
            _ => None,
        }
    }

    fn poll(&mut self, budget: &mut usize) -> Event<'_, S, D> {
        let step = self.step(budget);
        self.idle = matches!(step, Step::Idle);
        match step {
            Step::Up => Event::Up,
            Step::Frame(payload_bytes) => Event::Frame {
                header: &self.inbox.header,
                message: self.inbox.message(),
                payload_bytes,
            },
            Step::Received(token, sink) => Event::Received { token, sink },
            Step::Back(Back::Sent(token, source)) => Event::Sent { token, source },
            Step::Back(Back::Returned(owned)) => Event::Returned(owned),
            Step::Down(reason) => Event::Down(reason),
            Step::Yield => Event::Yield,
            Step::Idle => Event::Idle,
        }
    }

    fn is_idle(&self) -> bool {
        self.idle
    }

    fn needs_arming(&self) -> bool {
        self.stream.needs_arming()
    }

    fn arm(&mut self) -> Armed {
        if !self.idle {
            return Armed::Ready;
        }
        let is_open = !matches!(self.phase, Phase::Connecting | Phase::Down(_));
        if is_open && self.stream.needs_arming() {
            let found = self.stream.arm(Readiness {
                readable: !self.readiness.readable,
                writable: !self.readiness.writable && !self.outbox.is_empty(),
                closed: false,
            });
            if found.readable || found.writable {
                self.notify(found);
                return Armed::Ready;
            }
        }
        Armed::Wait
    }

    fn notify(&mut self, readiness: Readiness) {
        self.readiness.readable |= readiness.readable | readiness.closed;
        self.readiness.writable |= readiness.writable;
        self.readiness.closed |= readiness.closed;
        self.idle = false;
    }

    fn outgoing_bytes(&self) -> usize {
        self.outbox.bytes()
    }

    fn pause(&mut self, paused: bool) {
        // Saying again what holds already is no news: a loop that says it every turn could never
        // sleep.
        if self.paused != paused {
            self.paused = paused;
            self.idle = false;
        }
    }

    fn set_bounds(&mut self, message_bytes_max: usize, payload_bytes_max: usize) {
        self.bounds = FrameLengths {
            message: message_bytes_max,
            payload: payload_bytes_max,
        };
    }

    fn finish(&mut self) {
        if matches!(self.phase, Phase::Open) {
            self.phase = Phase::Finishing { said: false };
            self.paused = false;
            self.idle = false;
        } else {
            self.close();
        }
    }

    fn close(&mut self) {
        self.go_down(DownReason::Local);
    }
}

impl<T: Watched, S: Source, D: Sink> StreamLink<T, S, D> {
    /// Has the link watched; its events must go to [`on_event`](Self::on_event).
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn register(&mut self, watcher: &dyn Watcher, token: Token) -> io::Result<()> {
        self.stream.register(watcher, token)
    }

    /// Ends that; do so before the link is dropped, or moves to another thread.
    ///
    /// # Errors
    /// When it was not watched.
    pub fn deregister(&mut self, watcher: &dyn Watcher) -> io::Result<()> {
        self.stream.deregister(watcher)
    }

    /// Notes what the operating system says.
    pub fn on_event(&mut self, event: impl Into<Ready>) {
        let readiness = self.stream.on_event(event.into());
        self.notify(readiness);
    }
}
