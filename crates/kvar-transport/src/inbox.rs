//! What comes in: the state machine that finds frames in a stream.
//!
//! ```text
//!   Header ── 40 bytes ──> Message ── complete ──> (event Frame) ── no payload ──> Header
//!                                                       │
//!                                                    Offered
//!                                          pull(sink)   │   discard()
//!                                     Receiving <───────┴──────> Draining ──> Header
//!                                          │  └── fence_pull ──────^
//!                                          └── complete ──> (event Received) ──> Header
//! ```
//!
//! Every call of the operating system also reads ahead into a small buffer: the head of a small
//! frame costs no call of its own, and behind a payload the next frame's head comes along. Reading
//! ahead is kept short, since what it takes of a payload is copied once more.

use crate::link::{FrameLengths, Framing, HEADER_BYTES};
use crate::pieces::{Scatter, Sink};
use crate::stream::Stream;
use std::io;
use std::ops::Range;

/// How far one call reads ahead: dozens of small requests, 0.1 us to copy.
const AHEAD_BYTES: usize = 4096;

/// What late payload is drained to, a piece at a time.
const SCRATCH_BYTES: usize = 64 << 10;

/// A message buffer above this is given back after its message: links are many, long messages few.
const MESSAGE_KEEP_BYTES: usize = 64 << 10;

pub(crate) struct Inbox<D> {
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
    pub(crate) header: [u8; HEADER_BYTES],
    /// A message that is longer than `ahead`; `filled` bytes of it are there.
    long: Vec<u8>,
    filled: usize,
    at: MessageAt,
    state: State<D>,
    scratch: Vec<u8>,
}

enum MessageAt {
    Ahead(Range<usize>),
    Long,
}

enum State<D> {
    Header,
    Message(FrameLengths),
    Offered {
        payload: usize,
    },
    Receiving {
        token: u64,
        sink: D,
        len: usize,
        done: usize,
    },
    Draining {
        left: usize,
    },
}

/// What `next` found.
pub(crate) enum Next<D> {
    /// A frame is complete up to its payload, which is of this length.
    Frame(usize),
    /// A payload is complete.
    Received(u64, D),
    /// Call `read`.
    Need,
    /// The caller has to say something first.
    Wait,
    /// This is no frame.
    Bad(String),
}

impl<D: Sink> Inbox<D> {
    pub(crate) fn new() -> Self {
        Self {
            ahead: vec![0; AHEAD_BYTES].into(),
            start: 0,
            end: 0,
            header: [0; HEADER_BYTES],
            long: Vec::new(),
            filled: 0,
            at: MessageAt::Ahead(0..0),
            state: State::Header,
            scratch: Vec::new(),
        }
    }

    /// The message of the frame last found; valid until `next` or `read`.
    pub(crate) fn message(&self) -> &[u8] {
        match &self.at {
            MessageAt::Ahead(range) => &self.ahead[range.clone()],
            MessageAt::Long => &self.long,
        }
    }

    /// Whether the stream may end here.
    pub(crate) fn at_frame_border(&self) -> bool {
        matches!(self.state, State::Header) && self.start == self.end
    }

    /// Takes the next thing out of what has been read.
    pub(crate) fn next(&mut self, framing: Framing, bounds: FrameLengths, paused: bool) -> Next<D> {
        loop {
            let there = self.end - self.start;
            match &mut self.state {
                State::Header => {
                    if paused {
                        return Next::Wait;
                    }
                    if self.long.capacity() > MESSAGE_KEEP_BYTES {
                        self.long = Vec::new();
                    }
                    let Some(header) = self.ahead[self.start..self.end].first_chunk() else {
                        return Next::Need;
                    };
                    self.header = *header;
                    self.start += HEADER_BYTES;
                    let lengths = match framing(&self.header) {
                        Ok(lengths) => lengths,
                        Err(why) => return Next::Bad(why),
                    };
                    if let Some(why) = over_bounds(lengths, bounds) {
                        return Next::Bad(why);
                    }
                    self.filled = 0;
                    self.long.clear();
                    self.state = State::Message(lengths);
                }
                State::Message(lengths) => {
                    let FrameLengths { message, payload } = *lengths;
                    if message <= self.ahead.len() {
                        if there < message {
                            return Next::Need;
                        }
                        self.at = MessageAt::Ahead(self.start..self.start + message);
                        self.start += message;
                    } else {
                        self.long.resize(message, 0);
                        let now = there.min(message - self.filled);
                        self.long[self.filled..self.filled + now]
                            .copy_from_slice(&self.ahead[self.start..self.start + now]);
                        self.start += now;
                        self.filled += now;
                        if self.filled < message {
                            return Next::Need;
                        }
                        self.at = MessageAt::Long;
                    }
                    self.state = if payload == 0 {
                        State::Header
                    } else {
                        State::Offered { payload }
                    };
                    return Next::Frame(payload);
                }
                State::Offered { .. } => return Next::Wait,
                State::Receiving {
                    sink, len, done, ..
                } => {
                    let now = there.min(*len - *done);
                    if now > 0 {
                        let bytes = &self.ahead[self.start..self.start + now];
                        let copied = Scatter::of(sink, *done).copy_from(bytes);
                        *done += copied;
                        self.start += copied;
                        if copied < now {
                            continue; // more pieces than one list holds
                        }
                    }
                    if *done < *len {
                        return Next::Need;
                    }
                    let State::Receiving { token, sink, .. } =
                        std::mem::replace(&mut self.state, State::Header)
                    else {
                        unreachable!("the state was matched above");
                    };
                    return Next::Received(token, sink);
                }
                State::Draining { left } => {
                    let now = there.min(*left);
                    self.start += now;
                    *left -= now;
                    if *left > 0 {
                        return Next::Need;
                    }
                    self.scratch = Vec::new();
                    self.state = State::Header;
                }
            }
        }
    }

    /// Reads once, to where the next bytes belong. Returns (bytes read, bytes there was room for).
    pub(crate) fn read<T: Stream>(&mut self, stream: &mut T) -> io::Result<(usize, usize)> {
        if self.start > 0 {
            self.ahead.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let (mut scatter, wanted) = match &mut self.state {
            State::Header | State::Offered { .. } => (Scatter::new(), 0),
            State::Message(lengths) if lengths.message <= self.ahead.len() => (Scatter::new(), 0),
            State::Message(_) => {
                let mut scatter = Scatter::new();
                let rest = &mut self.long[self.filled..];
                let wanted = rest.len();
                scatter.add(rest);
                (scatter, wanted)
            }
            State::Receiving {
                sink, len, done, ..
            } => (Scatter::of(sink, *done), *len - *done),
            State::Draining { left } => {
                self.scratch.resize(SCRATCH_BYTES, 0);
                let mut scatter = Scatter::new();
                let now = SCRATCH_BYTES.min(*left);
                scatter.add(&mut self.scratch[..now]);
                (scatter, *left)
            }
        };
        // Read ahead only behind all that is wanted, never in the place of a part of it.
        let placed = scatter.bytes;
        if placed == wanted {
            scatter.add(&mut self.ahead[self.end..]);
        }
        let room = scatter.bytes;
        let read = stream.read(&mut scatter.list)?;
        drop(scatter);
        let in_place = read.min(placed);
        match &mut self.state {
            State::Receiving { done, .. } => *done += in_place,
            State::Draining { left } => *left -= in_place,
            _ => self.filled += in_place,
        }
        self.end += read - in_place;
        Ok((read, room))
    }

    pub(crate) fn pull(&mut self, token: u64, sink: D) -> Result<(), (D, usize)> {
        match self.state {
            State::Offered { payload } if sink.len() == payload => {
                self.state = State::Receiving {
                    token,
                    sink,
                    len: payload,
                    done: 0,
                };
                Ok(())
            }
            State::Offered { payload } => Err((sink, payload)),
            _ => Err((sink, 0)),
        }
    }

    pub(crate) fn discard(&mut self) {
        if let State::Offered { payload } = self.state {
            self.state = State::Draining { left: payload };
        }
    }

    pub(crate) fn fence(&mut self, token: u64) -> Option<D> {
        match &self.state {
            State::Receiving {
                token: its,
                len,
                done,
                ..
            } if *its == token => {
                let draining = State::Draining { left: len - done };
                self.take(draining).map(|(_, sink)| sink)
            }
            _ => None,
        }
    }

    /// Forgets what was under way.
    pub(crate) fn clear(&mut self) -> Option<(u64, D)> {
        (self.start, self.end, self.scratch) = (0, 0, Vec::new());
        self.take(State::Header)
    }

    fn take(&mut self, state: State<D>) -> Option<(u64, D)> {
        match std::mem::replace(&mut self.state, state) {
            State::Receiving { token, sink, .. } => Some((token, sink)),
            _ => None,
        }
    }
}

fn over_bounds(found: FrameLengths, bounds: FrameLengths) -> Option<String> {
    let over = |what: &str, found: usize, bound: usize| {
        (found > bound).then(|| format!("a {what} of {found} bytes where at most {bound} may come"))
    };
    over("message", found.message, bounds.message)
        .or_else(|| over("payload", found.payload, bounds.payload))
}
