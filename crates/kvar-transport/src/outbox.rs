//! What is queued to be sent: frames in order, each a head and maybe a payload.
//!
//! Several frames leave in one call. Heads live in vectors that are used again. A payload whose
//! source is fenced in the middle is kept as a copy of its unsent rest (`Rest`), so that the
//! source is free at once and the stream stays whole.
//!
//! A payload that is *placed* goes past the stream, into memory that both sides share: its bytes are
//! written there before a byte of its head leaves, so that whoever reads the head finds them.

use crate::link::FencedPush;
use crate::pieces::{Gather, Source};
use std::collections::VecDeque;

/// Bookkeeping per queued frame, charged to the bound: so small frames cannot pile up unseen.
const FRAME_OVERHEAD_BYTES: usize = 128;

/// Heads kept for reuse; a queue is rarely deeper than a batch.
const SPARE_HEADS_MAX: usize = 64;

/// A head longer than this is not kept: it was one large message.
const SPARE_HEAD_BYTES_MAX: usize = 4096;

pub(crate) struct Outbox<S> {
    queue: VecDeque<Outgoing<S>>,
    /// Bytes of the first frame that have left.
    sent: usize,
    bytes: usize,
    /// Frames with bytes that are still to be placed.
    unplaced: usize,
    spare: Vec<Vec<u8>>,
}

struct Outgoing<S> {
    head: Vec<u8>,
    payload: Payload<S>,
    payload_bytes: usize,
}

enum Payload<S> {
    None,
    Source {
        token: u64,
        source: S,
    },
    /// The bytes of the payload from `from` on; what lies before has left.
    Rest {
        from: usize,
        bytes: Vec<u8>,
    },
    /// Written to `at`, up to `done`, and never sent.
    Placed {
        token: u64,
        source: S,
        at: usize,
        done: usize,
    },
}

impl<S: Source> Outbox<S> {
    pub(crate) fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            sent: 0,
            bytes: 0,
            unplaced: 0,
            spare: Vec::new(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(crate) fn add(&mut self, head: &[u8], payload: Option<(u64, S)>) {
        let payload_bytes = payload.as_ref().map_or(0, |(_, source)| source.len());
        let payload = match payload {
            Some((token, source)) => Payload::Source { token, source },
            None => Payload::None,
        };
        self.add_frame(head, payload, payload_bytes);
    }

    /// A frame whose payload goes to `at`, past the stream.
    pub(crate) fn add_placed(&mut self, head: &[u8], token: u64, source: S, at: usize) {
        let payload_bytes = source.len();
        let payload = Payload::Placed {
            token,
            source,
            at,
            done: 0,
        };
        self.unplaced += usize::from(payload_bytes > 0);
        self.add_frame(head, payload, payload_bytes);
    }

    fn add_frame(&mut self, head: &[u8], payload: Payload<S>, payload_bytes: usize) {
        let mut stored = self.spare.pop().unwrap_or_default();
        stored.extend_from_slice(head);
        let frame = Outgoing {
            head: stored,
            payload,
            payload_bytes,
        };
        self.bytes += frame.cost();
        self.queue.push_back(frame);
    }

    /// Places bytes of the first frame that has some to place, up to `bytes_max`; how many.
    pub(crate) fn place(&mut self, bytes_max: usize, mut place: impl FnMut(usize, &[u8])) -> usize {
        if self.unplaced == 0 {
            return 0;
        }
        let is_next = |frame: &&mut Outgoing<S>| !frame.is_placed();
        let Some(frame) = self.queue.iter_mut().find(is_next) else {
            return 0;
        };
        let Payload::Placed {
            source, at, done, ..
        } = &mut frame.payload
        else {
            return 0;
        };
        let (mut skip, mut left, mut next) = (*done, bytes_max, *at + *done);
        source.visit(&mut |piece| {
            let skipped = piece.len().min(skip);
            skip -= skipped;
            let now = (piece.len() - skipped).min(left);
            if now > 0 {
                place(next, &piece[skipped..skipped + now]);
                next += now;
                left -= now;
            }
        });
        let placed = bytes_max - left;
        *done += placed;
        self.unplaced -= usize::from(frame.is_placed());
        placed
    }

    /// The next bytes to send, of as many frames as fit one call.
    pub(crate) fn gather(&self) -> Gather<'_> {
        let mut gather = Gather::new();
        let mut skip = self.sent;
        for frame in &self.queue {
            if gather.is_full() || !frame.is_placed() {
                break;
            }
            gather.add(&frame.head, &mut skip);
            match &frame.payload {
                Payload::None | Payload::Placed { .. } => {}
                Payload::Source { source, .. } => {
                    source.visit(&mut |piece| gather.add(piece, &mut skip));
                }
                Payload::Rest { from, bytes } => {
                    skip -= (*from).min(skip);
                    gather.add(bytes, &mut skip);
                }
            }
        }
        gather
    }

    /// `bytes` of what `gather` gave have left; sources that are through go to `done`.
    pub(crate) fn sent(&mut self, bytes: usize, mut done: impl FnMut(u64, S)) {
        self.sent += bytes;
        while let Some(first) = self.queue.front() {
            let len = first.len();
            if self.sent < len {
                break;
            }
            self.sent -= len;
            let frame = self.queue.pop_front().expect("the queue has a first frame");
            self.bytes -= frame.cost();
            if let Some((token, source)) = self.retire(frame) {
                done(token, source);
            }
        }
    }

    pub(crate) fn fence(&mut self, token: u64) -> Option<FencedPush<S>> {
        let is_it = |frame: &Outgoing<S>| match &frame.payload {
            Payload::Source { token: its, .. } | Payload::Placed { token: its, .. } => {
                *its == token
            }
            Payload::None | Payload::Rest { .. } => false,
        };
        let index = self.queue.iter().position(is_it)?;
        if index > 0 || self.sent == 0 {
            let frame = self.queue.remove(index)?;
            self.bytes -= frame.cost();
            self.unplaced -= usize::from(!frame.is_placed());
            let (_, source) = self.retire(frame)?;
            return Some(FencedPush {
                source,
                unsent: true,
            });
        }
        let frame = self.queue.front_mut()?;
        if let Payload::Placed { .. } = frame.payload {
            // Its head leaves, and what it says is there is there.
            let placed = std::mem::replace(&mut frame.payload, Payload::None);
            let cost = std::mem::take(&mut frame.payload_bytes);
            self.bytes -= cost;
            return match placed {
                Payload::Placed { source, .. } => Some(FencedPush {
                    source,
                    unsent: false,
                }),
                _ => None,
            };
        }
        let from = self.sent.saturating_sub(frame.head.len());
        let mut rest = Vec::with_capacity(frame.payload_bytes - from);
        if let Payload::Source { source, .. } = &frame.payload {
            let mut skip = from;
            source.visit(&mut |piece| {
                let skipped = piece.len().min(skip);
                skip -= skipped;
                rest.extend_from_slice(&piece[skipped..]);
            });
        }
        match std::mem::replace(&mut frame.payload, Payload::Rest { from, bytes: rest }) {
            Payload::Source { source, .. } => Some(FencedPush {
                source,
                unsent: false,
            }),
            _ => None,
        }
    }

    /// Forgets all frames; sources go to `done`.
    pub(crate) fn clear(&mut self, mut done: impl FnMut(u64, S)) {
        self.sent = 0;
        self.bytes = 0;
        self.unplaced = 0;
        for frame in std::mem::take(&mut self.queue) {
            if let Payload::Source { token, source } | Payload::Placed { token, source, .. } =
                frame.payload
            {
                done(token, source);
            }
        }
    }

    fn retire(&mut self, frame: Outgoing<S>) -> Option<(u64, S)> {
        let mut head = frame.head;
        if self.spare.len() < SPARE_HEADS_MAX && head.capacity() <= SPARE_HEAD_BYTES_MAX {
            head.clear();
            self.spare.push(head);
        }
        match frame.payload {
            Payload::Source { token, source } | Payload::Placed { token, source, .. } => {
                Some((token, source))
            }
            Payload::None | Payload::Rest { .. } => None,
        }
    }
}

impl<S> Outgoing<S> {
    /// Bytes of the stream that it takes.
    fn len(&self) -> usize {
        match self.payload {
            Payload::Placed { .. } => self.head.len(),
            _ => self.head.len() + self.payload_bytes,
        }
    }

    /// Whether nothing of it is still to be placed.
    fn is_placed(&self) -> bool {
        !matches!(self.payload, Payload::Placed { done, .. } if done < self.payload_bytes)
    }

    fn cost(&self) -> usize {
        self.head.len() + self.payload_bytes + FRAME_OVERHEAD_BYTES
    }
}
