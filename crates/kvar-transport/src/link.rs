//! The trait that every kind of link has, and what it says.
//!
//! ```text
//!            connect                       accept
//!               │                            │
//!          Connecting ── Event::Up ──────> Open ── finish() ──> Finishing
//!               └───────────┬───────────────┴───────────────────────┘
//!                           ▼  peer gone, garbage, close()
//!               Returned{…} for all it owned, then Event::Down, then Idle for ever
//! ```

use crate::pieces::{Sink, Source};

/// Length of a frame's header.
pub const HEADER_BYTES: usize = 40;

/// What one link may move in one turn of its thread: sixteen 64 KiB blocks keep the calls large,
/// and a thread with 16 busy links still comes round every few milliseconds.
pub const TURN_BYTES: usize = 1 << 20;

/// Lengths behind a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLengths {
    /// Bytes of the message.
    pub message: usize,
    /// Bytes of the payload.
    pub payload: usize,
}

/// How a link learns the lengths of a frame. An error is text for a person; it ends the link,
/// since nothing says where the next frame starts.
pub type Framing = fn(&[u8; HEADER_BYTES]) -> Result<FrameLengths, String>;

/// Bounds of a link.
#[derive(Clone, Copy, Debug)]
pub struct LinkOptions {
    /// Longest message accepted; raise it with [`Link::set_bounds`] once the peer is known.
    pub message_bytes_max: usize,
    /// Longest payload accepted.
    pub payload_bytes_max: usize,
    /// A link that has this much queued takes no more frames until some of it is sent.
    pub outgoing_bytes_max: usize,
}

impl Default for LinkOptions {
    fn default() -> Self {
        Self {
            message_bytes_max: 1 << 20,
            payload_bytes_max: 16 << 20,
            // Four of the largest blocks: a link is never idle for want of queue.
            outgoing_bytes_max: 64 << 20,
        }
    }
}

/// What happened on a link. Borrowed parts live until the next call.
#[derive(Debug)]
pub enum Event<'a, S, D> {
    /// A connect has succeeded.
    Up,
    /// A frame has come. If `payload_bytes` is not 0, the link receives nothing more until the
    /// caller says [`Link::pull`] or [`Link::discard`], now or turns later.
    Frame {
        /// Its header.
        header: &'a [u8; HEADER_BYTES],
        /// Its message.
        message: &'a [u8],
        /// Length of the payload behind it.
        payload_bytes: usize,
    },
    /// A payload is complete; the sink is the caller's again.
    Received {
        /// As given to `pull`.
        token: u64,
        /// The sink.
        sink: D,
    },
    /// A payload has left; the source is the caller's again. (It has left this process; whether
    /// it arrived only an answer can say.)
    Sent {
        /// As given to `push`.
        token: u64,
        /// The source.
        source: S,
    },
    /// The link is going down and gives this back; not completely moved.
    Returned(Owned<S, D>),
    /// The link is down and owns nothing any more. Said once.
    Down(DownReason),
    /// The turn's budget is used up and there may be more to do.
    Yield,
    /// Nothing can move until the peer or the caller does something.
    Idle,
}

/// A buffer that a link owned.
#[derive(Debug)]
pub enum Owned<S, D> {
    /// By `push`.
    Source {
        /// As given to `push`.
        token: u64,
        /// The source.
        source: S,
    },
    /// By `pull`.
    Sink {
        /// As given to `pull`.
        token: u64,
        /// The sink.
        sink: D,
    },
}

/// Why a link is down.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DownReason {
    /// The connection never came about.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// The peer closed between two frames.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed in the middle of a frame.
    #[error("the peer closed the connection in the middle of a frame")]
    Cut,
    /// The network or the peer's machine broke it.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// What came is no frame.
    #[error("garbage on the connection: {0}")]
    Garbage(String),
    /// This side closed it.
    #[error("closed by this side")]
    Local,
}

/// What a link can do before its thread sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Armed {
    /// Poll it again first.
    Ready,
    /// Readiness will be announced.
    Wait,
}

/// What may be possible again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// Something may be there to receive, or the peer has closed.
    pub readable: bool,
    /// There may be room to send.
    pub writable: bool,
    /// The peer sends no more.
    pub closed: bool,
}

impl Readiness {
    /// Nothing is.
    pub const NOTHING: Self = Self {
        readable: false,
        writable: false,
        closed: false,
    };

    /// Try everything: for spinning without asking the operating system first.
    pub const TRY_ALL: Self = Self {
        readable: true,
        writable: true,
        closed: false,
    };
}

/// A frame was not taken; nothing of it will be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendRefused {
    /// Enough is queued already: wait for the link to send, or give up.
    #[error("the link has as much queued as it may")]
    Full,
    /// The link is down.
    #[error("the link is down")]
    Down,
}

/// A payload was not taken, and here it is again.
#[derive(Debug)]
pub struct PushRefused<S> {
    /// The source.
    pub source: S,
    /// Why.
    pub why: SendRefused,
}

/// A sink was not taken: no payload is waiting, or the sink is not of its length.
#[derive(Debug)]
pub struct PullRefused<D> {
    /// The sink.
    pub sink: D,
    /// Length of the payload that waits; 0 for none.
    pub payload_bytes: usize,
}

/// A link to one peer. Belongs to one thread; never blocks.
///
/// Tokens name transfers and are the caller's; a token must not be used for two sources, or two
/// sinks, at a time.
pub trait Link {
    /// What payload is sent from.
    type Source: Source;
    /// What payload is received into.
    type Sink: Sink;

    /// Queues a frame without payload: `head` is header and message. Leaves at the next poll.
    ///
    /// # Errors
    /// The queue is full, or the link down.
    fn send(&mut self, head: &[u8]) -> Result<(), SendRefused>;

    /// Queues a frame and its payload, which the header must have announced at exactly the
    /// source's length.
    ///
    /// # Errors
    /// The source back: the queue is full, or the link down.
    fn push(
        &mut self,
        head: &[u8],
        token: u64,
        source: Self::Source,
    ) -> Result<(), PushRefused<Self::Source>>;

    /// Queues a frame without payload, behind bytes that are written to `at` in the
    /// [memory shared for that](crate::AnyLink::stage): whoever reads the frame finds them there. Until
    /// the source comes back, sent or fenced, they may be written.
    ///
    /// # Errors
    /// The source back: the queue is full, or the link down.
    ///
    /// # Panics
    /// The link shares no such memory, or the place lies outside: that is for the caller to know.
    fn push_placed(
        &mut self,
        head: &[u8],
        token: u64,
        source: Self::Source,
        at: usize,
    ) -> Result<(), PushRefused<Self::Source>>;

    /// Says where the payload of the last [`Event::Frame`] goes.
    ///
    /// # Errors
    /// The sink back: its length is not the payload's, or no payload waits.
    fn pull(&mut self, token: u64, sink: Self::Sink) -> Result<(), PullRefused<Self::Sink>>;

    /// Says that the payload of the last [`Event::Frame`] is not wanted; it is drained.
    fn discard(&mut self);

    /// Takes a source back before it is sent. What of its frame has begun to leave is copied
    /// first, so that the stream stays whole (at most one payload a link, on this path alone).
    /// `None`: not here (any more).
    fn fence_push(&mut self, token: u64) -> Option<FencedPush<Self::Source>>;

    /// Takes a sink back before it is full; the rest of its payload is drained to scratch.
    /// `None`: not here (any more).
    fn fence_pull(&mut self, token: u64) -> Option<Self::Sink>;

    /// Moves what can be moved and says what happened first; call it until `Idle` or `Yield`.
    /// Takes the bytes it moves off `budget`.
    fn poll(&mut self, budget: &mut usize) -> Event<'_, Self::Source, Self::Sink>;

    /// Whether it has nothing to do until something is said to it.
    fn is_idle(&self) -> bool;

    /// Whether the thread may sleep as far as this link goes; asked right before it does, since a
    /// link that waits may have to tell its peer so.
    fn arm(&mut self) -> Armed;

    /// Whether `arm` does more than say again what [`is_idle`](Self::is_idle) says; a thread that
    /// spins has to look at such a link itself, since nothing is announced before it was armed.
    fn needs_arming(&self) -> bool;

    /// Notes what may be possible again.
    fn notify(&mut self, readiness: Readiness);

    /// Bytes queued and not yet sent.
    fn outgoing_bytes(&self) -> usize;

    /// While paused the link begins no further frame, so that the peer feels it.
    fn pause(&mut self, paused: bool);

    /// Changes what is accepted from here on.
    fn set_bounds(&mut self, message_bytes_max: usize, payload_bytes_max: usize);

    /// Sends what is queued, then says good-bye; what still comes is drained. Ends with
    /// [`Event::Down`] when the peer closes too: give it a second, then drop the link.
    fn finish(&mut self);

    /// Fences everything at once: the link goes down, and what it owned comes back by events.
    fn close(&mut self);
}

/// A source that was taken back.
#[derive(Debug)]
pub struct FencedPush<S> {
    /// The source, free.
    pub source: S,
    /// Whether nothing of its frame has left or will leave.
    pub unsent: bool,
}
