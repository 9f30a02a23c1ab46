//! One link's conversation: frames in, asks out; answers in, frames out.
//!
//! ```text
//!   Handshake ── Welcome ──> Serving ── Failure sent ──> Closing ── a second, or the peer ──> gone
//!       └── wrong, or too slow ──────────────────────────────┘
//! ```
//!
//! What must always be true:
//! * a peer gets nothing before it has proved that it holds the namespace's key;
//! * what one link may have open (requests, payload bytes on the way out, announced puts) is
//!   bounded; beyond it the answer is Overloaded or Busy, and reads wait;
//! * every request is answered once, or cancelled, or its link is gone; a put's memory always
//!   goes back to its owner as commit or abort.
//!
//! What is absent: the engine (see [`Desk`]) and the socket's readiness (see `links`).

use super::attach::Seat;
use super::desk::{Desk, LINK_TIMER, LinkKey, Operation, To};
use super::filling::Filling;
use super::request::{Get, Item, ItemState, Kind, Open, Put, PutState};
use crate::mail::{Ask, Ticket};
use crate::report::NodeFacts;
use kvar_base::{BLOCK_BYTES_MAX, MissReason, Moment, PutOutcome, Refusal};
use kvar_engine::{Copy, GetRequest, Tenant, Touch};
use kvar_transport::{AnyLink, Link as _, SharedPieces};
use kvar_wire::{
    Body, Failure, FailureCode, GetAnswer, GetOutcome, Header, Message, NodeHandshake, NodeStep,
    PutAnswer, Section,
};
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

/// A link as a node uses it: sends from blocks in memory, receives into tickets.
pub(crate) type NodeLink = AnyLink<SharedPieces, Filling>;

/// How long a link that is told to go may take to read why.
const CLOSING: Duration = Duration::from_secs(1);

/// Reads under way while the link has not seen a block yet and nobody knows how large they are.
const FIRST_READS: u32 = 8;

/// Where the conversation is.
pub(super) enum Phase {
    Handshake(Box<NodeHandshake>),
    Serving,
    Closing,
}

/// What the payload behind the last frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    Nothing,
    /// An eager put's payload waits until the owner has said where it goes.
    AtTheDoor {
        request: u64,
    },
    /// It is being received.
    Filling {
        request: u64,
        token: u64,
    },
}

/// One link.
pub(crate) struct Conversation {
    pub(super) link: NodeLink,
    pub(super) key: LinkKey,
    pub(super) peer: SocketAddr,
    pub(super) phase: Phase,
    /// The namespace it works in, once it is serving.
    pub(super) tenant: Tenant,
    pub(super) open: HashMap<u64, Open>,
    /// Sum of the open requests' weights.
    pub(super) open_weight: u32,
    waiting_gets: VecDeque<(u64, u64, u16)>,
    reading_bytes: u64,
    pub(super) announced_bytes: u64,
    reads: u32,
    /// The largest block this link was sent; none yet at first.
    block_bytes_seen: Option<u64>,
    pub(super) incoming: Incoming,
    /// Whether it stands in the list of links to be polled.
    pub(super) is_listed: bool,
    /// Whether it stands in the list of links to be armed.
    pub(super) is_unarmed: bool,
    /// How often it was looked at in vain since it last moved something.
    pub(super) looks: u32,
    /// Its place among the links that share memory.
    pub(super) seat: Option<Seat>,
}

impl Conversation {
    pub(super) fn new(link: NodeLink, key: LinkKey, peer: SocketAddr, desk: &mut Desk) -> Self {
        let mut nonce = [0; 32];
        // Without randomness a replayed proof would pass; a machine without it cannot serve.
        getrandom::fill(&mut nonce).expect("the operating system gives randomness");
        let limit = Duration::from_secs(kvar_wire::HANDSHAKE_SECONDS_MAX);
        desk.timers.insert((desk.now.after(limit), key, LINK_TIMER));
        Self {
            link,
            key,
            peer,
            phase: Phase::Handshake(Box::new(NodeHandshake::new(nonce))),
            tenant: Tenant::DEFAULT,
            open: HashMap::new(),
            open_weight: 0,
            waiting_gets: VecDeque::new(),
            reading_bytes: 0,
            announced_bytes: 0,
            reads: 0,
            block_bytes_seen: None,
            incoming: Incoming::Nothing,
            is_listed: false,
            is_unarmed: false,
            looks: 0,
            seat: None,
        }
    }

    /// Queues a message without payload. A link whose peer does not read is given up: its queue
    /// holds more answers than it may have requests open.
    pub(super) fn send<B: Body>(&mut self, desk: &mut Desk, request: u64, body: &B) {
        desk.scratch.clear();
        match kvar_wire::encode(&mut desk.scratch, request, NodeFacts::EPOCH, body, 0) {
            Ok(()) => {
                if self.link.send(&desk.scratch).is_err() {
                    self.link.close();
                }
            }
            Err(error) => {
                tracing::error!(peer = %self.peer, %error, "an answer does not fit its bounds");
                self.link.close();
            }
        }
    }

    /// Says why, and goes.
    pub(super) fn fail(&mut self, desk: &mut Desk, failure: &Failure) {
        if matches!(self.phase, Phase::Closing) {
            return;
        }
        self.send(desk, kvar_wire::LINK_REQUEST, failure);
        self.end_requests(desk);
        self.phase = Phase::Closing;
        self.link.finish();
        desk.timers
            .insert((desk.now.after(CLOSING), self.key, LINK_TIMER));
    }

    /// The peer broke the protocol.
    pub(super) fn protocol(&mut self, desk: &mut Desk, text: &str) {
        desk.counters.protocol_errors += 1;
        tracing::warn!(peer = %self.peer, "closing a link: {text}");
        self.fail(desk, &Failure::new(FailureCode::Protocol, text));
    }

    /// Takes a frame.
    pub(super) fn on_frame(
        &mut self,
        desk: &mut Desk,
        header: &Header,
        message: Message,
        payload_bytes: usize,
    ) {
        match &mut self.phase {
            Phase::Closing => {
                self.link.discard();
            }
            Phase::Handshake(handshake) => {
                let settings = &desk.settings;
                let find = |name: &str| settings.namespaces.find(name);
                let key_of = |name: &str| find(name).map(|(_, key)| key);
                match handshake.on_message(message, key_of, &settings.node, settings.limits) {
                    NodeStep::Send(challenge) => self.send(desk, header.request, &challenge),
                    NodeStep::Open(welcome, peer) => {
                        tracing::debug!(peer = %self.peer, client = %peer.client, "link open");
                        // The handshake found it a moment ago.
                        self.tenant = find(&peer.namespace).map_or(Tenant::DEFAULT, |it| it.0);
                        self.phase = Phase::Serving;
                        self.link
                            .set_bounds(kvar_wire::MESSAGE_BYTES_MAX, kvar_wire::PAYLOAD_BYTES_MAX);
                        self.send(desk, header.request, &welcome);
                    }
                    NodeStep::Fail(failure) => {
                        desk.counters.handshakes_failed += 1;
                        tracing::warn!(peer = %self.peer, "turned a link away: {}", failure.text);
                        self.fail(desk, &failure);
                    }
                }
            }
            Phase::Serving => self.on_request(desk, header.request, message, payload_bytes),
        }
    }

    /// Opens a request. `None`: it is over already (no time left, too many open, or its number is
    /// in use, which ends the link).
    pub(super) fn open(
        &mut self,
        desk: &mut Desk,
        request: u64,
        left_us: Option<u64>,
        kind: Kind,
    ) -> Option<Operation> {
        let opening = desk.number();
        let deadline = left_us.map_or(Moment(u64::MAX), |left| desk.deadline(left));
        let open = Open {
            opening,
            deadline,
            kind,
        };
        self.open_weight += open.weight();
        if deadline != Moment(u64::MAX) {
            desk.timers.insert((deadline, self.key, request));
        }
        self.open.insert(request, open);
        Some(Operation {
            link: self.key,
            request,
            opening,
            part: 0,
        })
    }

    /// Takes a request off the books.
    pub(super) fn close(&mut self, desk: &mut Desk, request: u64) -> Option<Open> {
        let open = self.open.remove(&request)?;
        desk.timers.remove(&(open.deadline, self.key, request));
        self.open_weight -= open.weight();
        match &open.kind {
            Kind::Get(get) => {
                for item in &get.items {
                    if let ItemState::Asked(bytes) | ItemState::AskedBelow(bytes, _) = item.state {
                        self.reading_bytes -= bytes;
                        self.reads -= 1;
                    }
                }
            }
            Kind::Put(put) => self.announced_bytes -= put.payload_bytes,
            _ => {}
        }
        Some(open)
    }

    // ---- gets -------------------------------------------------------------------------------

    /// Puts a get's items in line.
    pub(super) fn line_up(&mut self, request: u64, opening: u64, items: usize) {
        let items = (0..items).map(|item| (request, opening, item as u16));
        self.waiting_gets.extend(items);
    }

    /// Asks for as many waiting items as the link's budget has room for, and lets the peer feel
    /// it when it takes its answers too slowly.
    pub(super) fn start_gets(&mut self, desk: &mut Desk) {
        let budget = desk.settings.limits.bytes_max;
        let queued = self.link.outgoing_bytes() as u64;
        self.link.pause(queued > budget);
        while let Some((request, opening, index)) = self.waiting_gets.front().copied() {
            // At least one is always under way, else a budget below one block would wait for ever.
            if self.reading_bytes + queued >= budget && self.reading_bytes + queued > 0 {
                return;
            }
            if self.block_bytes_seen.is_none() && self.reads >= FIRST_READS {
                return;
            }
            self.waiting_gets.pop_front();
            let guess = self
                .block_bytes_seen
                .unwrap_or(desk.settings.block_bytes_guess);
            let Some(open) = self.open.get_mut(&request) else {
                continue;
            };
            let Kind::Get(get) = &mut open.kind else {
                continue;
            };
            if open.opening != opening {
                continue;
            }
            let (touch_request, deadline) = (get.touch_request, open.deadline);
            let item = &mut get.items[usize::from(index)];
            let bytes = expected_bytes(&item.wanted)
                .unwrap_or(guess)
                .min(BLOCK_BYTES_MAX);
            item.state = ItemState::Asked(bytes);
            self.reading_bytes += bytes;
            self.reads += 1;
            let id = item.wanted.id;
            let ask = Ask::Get(GetRequest {
                id,
                sections: item.wanted.sections.clone(),
                deadline,
                touch: Touch {
                    request: touch_request,
                    depth: item.wanted.depth,
                },
            });
            let operation = Operation {
                link: self.key,
                request,
                opening,
                part: u32::from(index),
            };
            desk.ask_owner(&id, operation, ask);
        }
    }

    /// An owner has answered an item.
    pub(super) fn on_got(
        &mut self,
        desk: &mut Desk,
        request: u64,
        index: u32,
        outcome: Result<Copy, MissReason>,
    ) {
        let Some(Open {
            kind: Kind::Get(get),
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        let item = &mut get.items[index as usize];
        let (bytes, outcome) = match (item.state, outcome) {
            (ItemState::Asked(bytes), Err(reason)) if may_be_below(reason) => {
                if self.ask_below(desk, request, index, bytes, reason) {
                    return;
                }
                (bytes, Err(reason))
            }
            (ItemState::Asked(bytes), outcome) => (bytes, outcome),
            // What the first one said is the reason, unless the other knows more than that.
            (ItemState::AskedBelow(bytes, above), Err(MissReason::Absent)) => (bytes, Err(above)),
            (ItemState::AskedBelow(bytes, _), outcome) => (bytes, outcome),
            (ItemState::Waiting | ItemState::Answered, _) => return,
        };
        let Some(Open {
            kind: Kind::Get(get),
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        let item = &mut get.items[index as usize];
        item.state = ItemState::Answered;
        self.reading_bytes -= bytes;
        self.reads -= 1;
        get.left -= 1;
        self.open_weight -= 1;
        let is_over = get.left == 0;
        let outcome = outcome.and_then(|copy| fits(&item.wanted, copy));
        match outcome {
            Ok(copy) => self.push_copy(desk, request, index as u16, copy),
            Err(reason) => self.send_miss(desk, request, index as u16, reason),
        }
        if is_over {
            self.close(desk, request);
        }
    }

    /// Asks the tier below for an item, if there is one; its budget stays as it is.
    fn ask_below(
        &mut self,
        desk: &mut Desk,
        request: u64,
        index: u32,
        bytes: u64,
        reason: MissReason,
    ) -> bool {
        let Some(open) = self.open.get_mut(&request) else {
            return false;
        };
        let (opening, deadline) = (open.opening, open.deadline);
        let Kind::Get(get) = &mut open.kind else {
            return false;
        };
        let touch_request = get.touch_request;
        let item = &mut get.items[index as usize];
        let Some(engine) = desk.routes.lower_owner(&item.wanted.id) else {
            return false;
        };
        item.state = ItemState::AskedBelow(bytes, reason);
        let ask = Ask::Get(GetRequest {
            id: item.wanted.id,
            sections: item.wanted.sections.clone(),
            deadline,
            touch: Touch {
                request: touch_request,
                depth: item.wanted.depth,
            },
        });
        let operation = Operation {
            link: self.key,
            request,
            opening,
            part: index,
        };
        desk.ask(To::Engine(engine, ask), operation);
        true
    }

    pub(super) fn send_miss(
        &mut self,
        desk: &mut Desk,
        request: u64,
        item: u16,
        reason: MissReason,
    ) {
        desk.counters.get_misses.add(reason);
        desk.of_namespace[self.tenant.index()].misses += 1;
        self.send(
            desk,
            request,
            &GetAnswer {
                item,
                outcome: GetOutcome::Miss(reason),
            },
        );
    }

    fn push_copy(&mut self, desk: &mut Desk, request: u64, item: u16, copy: Copy) {
        let sections: Vec<Section> = copy
            .sections
            .iter()
            .map(|section| Section {
                len: section.len,
                check: section.check,
            })
            .collect();
        let ranges: smallvec::SmallVec<[_; 2]> = copy
            .sections
            .iter()
            .map(|section| {
                let start = section.offset as usize;
                start..start + section.len as usize
            })
            .collect();
        let bytes = ranges.iter().map(ExactSizeIterator::len).sum::<usize>();
        let first_section = copy.sections.first().map_or(0, |section| section.index);
        let outcome = GetOutcome::Hit {
            version: copy.version,
            first_section,
            sections,
        };
        desk.scratch.clear();
        let answer = GetAnswer { item, outcome };
        if let Err(error) =
            kvar_wire::encode(&mut desk.scratch, request, NodeFacts::EPOCH, &answer, bytes)
        {
            tracing::error!(peer = %self.peer, %error, "an answer does not fit its bounds");
            return self.link.close();
        }
        self.block_bytes_seen = self.block_bytes_seen.max(Some(bytes as u64));
        desk.counters.get_hits += 1;
        desk.of_namespace[self.tenant.index()].hits += 1;
        desk.counters.payload_bytes_out += bytes as u64;
        let token = desk.number();
        let source = SharedPieces {
            bytes: copy.bytes,
            ranges,
        };
        if self.link.push(&desk.scratch, token, source).is_err() {
            self.link.close();
        }
    }

    // ---- puts -------------------------------------------------------------------------------

    /// Answers a put and closes it.
    pub(super) fn answer_put(&mut self, desk: &mut Desk, request: u64, outcome: PutOutcome) {
        self.close(desk, request);
        let is_stored = outcome == PutOutcome::Stored;
        desk.of_namespace[self.tenant.index()].stored += u64::from(is_stored);
        desk.counters.puts.add(outcome);
        self.send(desk, request, &PutAnswer { outcome });
    }

    /// The owner has said whether it takes the block.
    pub(super) fn on_put_begun(
        &mut self,
        desk: &mut Desk,
        request: u64,
        begun: Result<Ticket, PutOutcome>,
    ) {
        let Some(Open {
            kind: Kind::Put(put),
            ..
        }) = self.open.get_mut(&request)
        else {
            return abort(desk, begun.ok());
        };
        let PutState::Beginning { eager } = put.state else {
            return abort(desk, begun.ok());
        };
        match begun {
            Ok(ticket) if eager => {
                let token = desk.number();
                match self.link.pull(token, Filling(ticket)) {
                    Ok(()) => {
                        put.state = PutState::Receiving(token);
                        self.incoming = Incoming::Filling { request, token };
                    }
                    Err(refused) => {
                        // The link went down meanwhile; it ends its requests by itself.
                        abort(desk, Some(refused.sink.0));
                    }
                }
            }
            Ok(ticket) => {
                put.state = PutState::Pulling(ticket);
                self.send(desk, request, &kvar_wire::Pull {});
            }
            Err(outcome) => {
                if eager {
                    self.turn_away();
                }
                self.answer_put(desk, request, outcome);
            }
        }
    }

    /// The payload at the door is not wanted.
    pub(super) fn turn_away(&mut self) {
        self.link.discard();
        self.incoming = Incoming::Nothing;
    }

    /// A put's payload is complete: on to its owner.
    pub(super) fn on_received(&mut self, desk: &mut Desk, ticket: Ticket) {
        let Incoming::Filling { request, .. } = self.incoming else {
            return abort(desk, Some(ticket));
        };
        self.incoming = Incoming::Nothing;
        let key = self.key;
        match self.open.get_mut(&request) {
            Some(Open {
                opening,
                kind: Kind::Put(put),
                ..
            }) => {
                desk.counters.payload_bytes_in += put.payload_bytes;
                put.state = PutState::Committing;
                let operation = Operation {
                    link: key,
                    request,
                    opening: *opening,
                    part: 0,
                };
                let Ticket { engine, ticket } = ticket;
                desk.ask(To::Engine(engine, Ask::PutCommit(ticket)), operation);
            }
            _ => abort(desk, Some(ticket)),
        }
    }

    // ---- ends -------------------------------------------------------------------------------

    /// A request is over before its answer: by its deadline (`answer`) or a cancel.
    pub(super) fn cut_short(&mut self, desk: &mut Desk, request: u64, answer: bool) {
        let Some(open) = self.close(desk, request) else {
            return;
        };
        match open.kind {
            Kind::Get(Get { items, .. }) => {
                let unanswered = items
                    .iter()
                    .enumerate()
                    .filter(|(_, Item { state, .. })| *state != ItemState::Answered);
                if answer {
                    for (index, _) in unanswered {
                        self.send_miss(desk, request, index as u16, MissReason::Deadline);
                    }
                }
            }
            Kind::Put(put) => {
                self.drop_put(desk, put);
                if answer {
                    let outcome = PutOutcome::Refused(Refusal::Deadline);
                    desk.counters.puts.add(outcome);
                    self.send(desk, request, &PutAnswer { outcome });
                }
            }
            kind if answer => self.answer_deadline(desk, request, &kind),
            _ => {}
        }
    }

    /// Gives a put's memory back to its owner, wherever it is.
    fn drop_put(&mut self, desk: &mut Desk, put: Put) {
        match put.state {
            PutState::Beginning { eager: true } => self.turn_away(),
            PutState::Pulling(ticket) => abort(desk, Some(ticket)),
            PutState::Receiving(token) => {
                self.incoming = Incoming::Nothing;
                abort(desk, self.link.fence_pull(token).map(|filling| filling.0));
            }
            // The owner has the ticket, or will hand it to nobody.
            PutState::Beginning { eager: false } | PutState::Committing => {}
        }
    }

    /// The link goes: nothing is answered any more, and all memory goes back.
    pub(super) fn end_requests(&mut self, desk: &mut Desk) {
        let requests: Vec<u64> = self.open.keys().copied().collect();
        for request in requests {
            self.cut_short(desk, request, false);
        }
        self.waiting_gets.clear();
    }
}

/// Whether a block that an engine does not serve may be in the tier below.
pub(super) fn may_be_below(reason: MissReason) -> bool {
    matches!(
        reason,
        MissReason::Absent | MissReason::Evicted | MissReason::Corrupt | MissReason::Loading
    )
}

/// Gives a ticket back unused.
pub(super) fn abort(desk: &mut Desk, ticket: Option<Ticket>) {
    if let Some(Ticket { engine, ticket }) = ticket {
        desk.tell(engine, Ask::PutAbort(ticket));
    }
}

/// Bytes a reader says it has room for.
fn expected_bytes(item: &kvar_wire::GetItem) -> Option<u64> {
    match &item.expected {
        kvar_wire::Lengths::Any => None,
        kvar_wire::Lengths::Equal(count, len) => Some(u64::from(*count) * u64::from(*len)),
        kvar_wire::Lengths::Each(lengths) => Some(lengths.iter().map(|len| u64::from(*len)).sum()),
    }
}

/// Whether a copy is what the reader wants and has room for.
fn fits(wanted: &kvar_wire::GetItem, copy: Copy) -> Result<Copy, MissReason> {
    if wanted
        .version
        .is_some_and(|version| version != copy.version)
    {
        return Err(MissReason::Version);
    }
    if !wanted
        .expected
        .fit(copy.sections.iter().map(|section| section.len))
    {
        return Err(MissReason::WrongFormat);
    }
    Ok(copy)
}
