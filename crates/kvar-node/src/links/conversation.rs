//! One link's conversation from Hello to its end: the handshake, what is open, and how it ends.
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
//! What is absent: what each request asks (see `serve`), the engine (see [`Desk`]) and the socket's
//! readiness (see `links`).

use super::attach::Seat;
use super::desk::{Desk, LINK_TIMER, LinkKey, Operation};
use super::filling::Filling;
use super::get::is_counted;
use super::overdue::UnsentAnswers;
use super::request::{Get, ItemState, Kind, Open};
use super::staging::Staging;
use crate::mail::{Ask, Ticket};
use crate::report::{ClientReport, NodeFacts};
use kvar_base::{MissReason, Mode, Moment, PutOutcome, Refusal};
use kvar_engine::Tenant;
use kvar_transport::{AnyLink, Link as _, LinkKind, SharedPieces};
use kvar_wire::{
    Body, Failure, FailureCode, Header, LookupAnswer, Message, NodeHandshake, NodeStep, PutAnswer,
    Switch, VERSION_WITH_MODES,
};
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

/// A link as a node uses it: sends from blocks in memory, receives into tickets.
pub(crate) type NodeLink = AnyLink<SharedPieces, Filling>;

/// How long a link that is told to go may take to read why.
const CLOSING: Duration = Duration::from_secs(1);

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
    /// What the client was last told of its namespace's mode; none: it knows no modes.
    told_mode: Option<Mode>,
    /// Who it says it is, once it is serving.
    pub(super) client: String,
    pub(super) open: HashMap<u64, Open>,
    /// Sum of the open requests' weights.
    pub(super) open_weight: u32,
    pub(super) waiting_gets: VecDeque<(u64, u64, u16)>,
    pub(super) reading_bytes: u64,
    pub(super) announced_bytes: u64,
    pub(super) reads: u32,
    /// The largest block this link was sent; none yet at first.
    pub(super) block_bytes_seen: Option<u64>,
    pub(super) incoming: Incoming,
    /// Whether it stands in the list of links to be polled.
    pub(super) is_listed: bool,
    /// Whether it stands in the list of links to be armed.
    pub(super) is_unarmed: bool,
    /// How often it was looked at in vain since it last moved something.
    pub(super) looks: u32,
    /// Answers whose bytes have not left yet.
    pub(super) unsent: UnsentAnswers,
    /// Its place among the links that share memory.
    pub(super) seat: Option<Seat>,
    /// Where its client's reads go, if it has asked for that.
    pub(super) staging: Staging,
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
            phase: Phase::Handshake(Box::new(NodeHandshake::speaking(
                desk.settings.versions,
                nonce,
            ))),
            tenant: Tenant::DEFAULT,
            told_mode: None,
            client: String::new(),
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
            unsent: UnsentAnswers::default(),
            seat: None,
            staging: Staging::None,
        }
    }

    /// Who is there; nothing of one that has not proved itself.
    pub(super) fn report(&self) -> Option<ClientReport> {
        matches!(self.phase, Phase::Serving).then(|| ClientReport {
            name: self.client.clone(),
            peer: self.peer.to_string(),
            namespace: self.tenant.number(),
            link: self.link.kind().word(),
            requests_open: self.open.len() as u64,
        })
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

    /// Tells the client its namespace's mode, if that is not what it was told last.
    pub(super) fn tell_mode(&mut self, desk: &mut Desk) {
        let Some(told) = self.told_mode else {
            return;
        };
        let mode = desk.settings.modes.of(self.tenant);
        // A link that goes over to shared memory says nothing before it is there: see `attach`.
        let changes = self.seat.is_some() && self.link.kind() != LinkKind::SharedMemory;
        if mode == told || changes || !matches!(self.phase, Phase::Serving) {
            return;
        }
        self.told_mode = Some(mode);
        self.send(desk, kvar_wire::LINK_REQUEST, &Switch { mode });
    }

    /// Counts what a lookup found that nothing will be loaded of.
    pub(super) fn note_observed(&self, desk: &mut Desk, answer: &LookupAnswer) {
        if let LookupAnswer::Leading(leading, _) = answer
            && desk.settings.modes.of(self.tenant) != Mode::Load
        {
            let counters = &mut desk.of_namespace[self.tenant.index()];
            counters.observed_lookups += 1;
            counters.observed_blocks += u64::from(*leading);
        }
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
                    NodeStep::Open(mut welcome, peer) => {
                        tracing::debug!(peer = %self.peer, client = %peer.client, "link open");
                        // The handshake found it a moment ago.
                        self.tenant = find(&peer.namespace).map_or(Tenant::DEFAULT, |it| it.0);
                        // Shown on terminals.
                        let shown = peer.client.chars().filter(|it| !it.is_control());
                        self.client = shown.collect();
                        self.phase = Phase::Serving;
                        let knows_modes = peer.version >= VERSION_WITH_MODES;
                        self.told_mode = knows_modes.then(|| settings.modes.of(self.tenant));
                        welcome.mode = self.told_mode;
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
                    use ItemState::{Asked, AskedBelow};
                    if let Asked(reading) | AskedBelow(reading, _) = item.state {
                        self.reading_bytes -= reading.bytes;
                        self.reads -= 1;
                    }
                }
            }
            Kind::Put(put) => self.announced_bytes -= put.payload_bytes,
            _ => {}
        }
        Some(open)
    }

    /// A request is over before its answer: by its deadline (`answer`) or a cancel.
    pub(super) fn cut_short(&mut self, desk: &mut Desk, request: u64, answer: bool) {
        let Some(open) = self.close(desk, request) else {
            return;
        };
        desk.ended_early = true;
        match open.kind {
            Kind::Get(get) => self.cut_get_short(desk, request, &get, answer),
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

    /// Ends the items of a get that are not answered.
    fn cut_get_short(&mut self, desk: &mut Desk, request: u64, get: &Get, answer: bool) {
        for (index, item) in get.items.iter().enumerate() {
            let forget = match item.state {
                ItemState::Answered => continue,
                ItemState::Waiting => None,
                ItemState::Awaiting(operation) => Some((operation, false)),
                ItemState::Asked(reading) => Some((reading.operation, false)),
                ItemState::AskedBelow(reading, _) => Some((reading.operation, true)),
            };
            if answer {
                // An engine knows the deadline as well.
                desk.counters.overdue.line += u64::from(item.state == ItemState::Waiting);
                let is_counted = is_counted(get.hints, &item.wanted);
                let reason = MissReason::Deadline;
                self.staging.free(item.wanted.slot);
                self.send_miss(desk, request, index as u16, reason, is_counted);
                continue;
            }
            // Not asked any more, so nothing comes that could be written there.
            self.staging.free(item.wanted.slot);
            if let Some((operation, is_below)) = forget {
                desk.forget(item.wanted.id, operation, self.key, is_below);
            }
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
