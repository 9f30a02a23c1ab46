//! The links of one thread: who is connected, who has something to do, whose time is up.
//!
//! | file | question |
//! |---|---|
//! | `conversation` | how does one link go from Hello to its end? |
//! | `serve` | what does each request, and each answer, make a link do? |
//! | `lookup`, `lease` | which blocks are there, and which are promised? |
//! | `get`, `put` | how does a block go out, and come in? |
//! | `finish`, `stat` | what is asked of all engines, and what of one block or the node? |
//! | `parts` | which engine is asked for which blocks? |
//! | `attach` | may a link share memory with its client? |
//! | `staging` | which parts of a client's memory are read into, by whom? |
//! | `request` | what is open on a link? |
//! | `desk` | what do all links of the thread share? |
//! | `overdue` | what does nobody wait for any more? |
//! | `filling` | how is a payload received straight to where it is stored? |
//!
//! What must always be true: a link is polled while it can move something and sleeps otherwise;
//! one turn moves a bounded number of bytes a link, and takes a bounded number of operations, so that no
//! link starves the others; nothing is asked of a device, or sent, that nobody waits for any more.

mod attach;
mod conversation;
mod desk;
mod filling;
mod finish;
mod get;
mod lease;
mod lookup;
mod overdue;
mod parts;
mod put;
mod request;
mod sections;
mod serve;
mod staging;
mod stat;
mod timers;

pub use attach::Sharing;
pub(crate) use attach::SharingSettings;
pub(crate) use desk::{Describe, LinkSettings, Outgoing, To};
pub(crate) use staging::StagingSettings;

use crate::devices::Routes;
use crate::mail::{Answer, Ticket};
use crate::report::{CLIENTS_REPORTED_MAX, ClientReport};
use conversation::{Conversation, Incoming, NodeLink, Phase, abort};
use crossbeam_channel::Sender;
use desk::{Desk, LINK_TIMER, LinkKey};
use kvar_base::{Moment, SystemClock};
use kvar_io::{Ready, Watcher};
use kvar_transport::{
    Armed, DownReason, Event, FrameLengths, HEADER_BYTES, Link as _, LinkKind, LinkOptions, Owned,
    Readiness, TURN_BYTES, TcpStream,
};
use kvar_wire::{Failure, FailureCode, Header, Message, WireError};
use slab::Slab;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;

/// Room for answers without payload. What a link has queued is bounded before this: no frame is
/// taken while more than its budget is queued, and what is open then is bounded in number. A link
/// that comes beyond all that has a defect and is given up.
const OUTGOING_HEADS_BYTES: usize = 8 << 20;

/// An operation counts as so many bytes of its link's turn, and an id of a lookup as so many: a turn is
/// at most 256 blocks asked for, or 16,384 ids, and takes about as long as moving its bytes would.
const OPERATION_COST_BYTES: usize = TURN_BYTES / 256;
const ID_COST_BYTES: usize = TURN_BYTES / kvar_wire::IDS_MAX;

/// A link that shares memory is looked at this often in vain while its thread does not sleep, and
/// then its peer must ring: some hundred microseconds of looking, about what a look costs a thread
/// that works all the time for others.
const LOOKS_MAX: u32 = 4096;

/// See the module.
pub(crate) struct Links {
    slots: Slab<Conversation>,
    desk: Desk,
    listed: VecDeque<LinkKey>,
    /// Links that announce nothing before they are armed, and are not.
    unarmed: Vec<LinkKey>,
}

/// What a poll of a link said, free of its borrow.
enum Happened {
    Frame(Result<(Header, Message), WireError>, usize),
    Received(Ticket),
    Sent(u64),
    Returned(Option<Ticket>),
    Nothing,
    Down(DownReason),
    Rest,
}

fn framing(header: &[u8; HEADER_BYTES]) -> Result<FrameLengths, String> {
    let (message, payload) = kvar_wire::frame_lengths(header).map_err(|error| error.to_string())?;
    Ok(FrameLengths {
        message: message as usize,
        payload: payload as usize,
    })
}

impl Links {
    /// No links yet; their events will carry tokens from `token_base` on.
    pub(crate) fn new(
        threads: u32,
        settings: LinkSettings,
        clock: SystemClock,
        keeper: Sender<crate::devices::Event>,
        watcher: Rc<dyn Watcher>,
        token_base: usize,
    ) -> Self {
        let desk = Desk::new(threads, settings, clock, keeper, watcher, token_base);
        Self {
            slots: Slab::new(),
            desk,
            listed: VecDeque::new(),
            unarmed: Vec::new(),
        }
    }

    /// Blocks belong to these engines from now on. What is under way stays where it was asked.
    pub(crate) fn set_routes(&mut self, routes: Arc<Routes>) {
        self.desk.routes = routes;
    }

    /// Who owns which block, as far as this thread has heard.
    pub(crate) fn routes(&self) -> Arc<Routes> {
        self.desk.routes.clone()
    }

    /// Notes the time.
    pub(crate) fn tick(&mut self) -> Moment {
        self.desk.tick()
    }

    /// Links open.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// What they did.
    pub(crate) fn counters(&self) -> crate::counters::LinkCounters {
        crate::counters::LinkCounters {
            links_open: self.slots.len() as u64,
            links_shared: self.shared_links() as u64,
            staging_bytes: self
                .slots
                .iter()
                .map(|(_, link)| link.staging.bytes())
                .sum(),
            ..self.desk.counters
        }
    }

    /// What was asked of each namespace, by number.
    pub(crate) fn namespace_counters(&self) -> Vec<crate::counters::NamespaceCounters> {
        self.desk.of_namespace.to_vec()
    }

    /// Who is there, as far as the first [`CLIENTS_REPORTED_MAX`]: this is made on the data plane.
    pub(crate) fn clients(&self) -> Vec<ClientReport> {
        let links = self.slots.iter().filter_map(|(_, link)| link.report());
        links.take(CLIENTS_REPORTED_MAX).collect()
    }

    fn shared_links(&self) -> usize {
        let links = self.slots.iter();
        links
            .filter(|(_, link)| link.link.kind() == LinkKind::SharedMemory)
            .count()
    }

    /// Takes a connection; with `refusal` only to say why not.
    pub(crate) fn accept(
        &mut self,
        stream: TcpStream,
        peer: SocketAddr,
        refusal: Option<&Failure>,
    ) -> std::io::Result<()> {
        let limits = &self.desk.settings.limits;
        let open_bytes_max = u64::from(limits.requests_max) * u64::from(limits.block_bytes_max);
        let options = LinkOptions {
            message_bytes_max: kvar_wire::HANDSHAKE_MESSAGE_BYTES_MAX,
            payload_bytes_max: 0,
            outgoing_bytes_max: usize::try_from(limits.bytes_max.saturating_add(open_bytes_max))
                .unwrap_or(usize::MAX)
                .saturating_add(OUTGOING_HEADS_BYTES),
        };
        let mut link = NodeLink::accepted(stream, framing, options);
        let entry = self.slots.vacant_entry();
        let key = LinkKey {
            index: entry.key(),
            serial: self.desk.number(),
        };
        link.register(&*self.desk.watcher, self.desk.token(key))?;
        entry.insert(Conversation::new(link, key, peer, &mut self.desk));
        match refusal {
            None => self.desk.counters.links_accepted += 1,
            Some(failure) => {
                self.desk.counters.links_refused += 1;
                self.slots[key.index].fail(&mut self.desk, failure);
            }
        }
        self.list(key.index);
        Ok(())
    }

    /// The operating system says something about a link.
    pub(crate) fn on_event(&mut self, event: Ready) {
        let index = self.desk.index(event.token);
        if let Some(link) = self.slots.get_mut(index) {
            link.link.on_event(event);
            self.list(index);
        }
    }

    fn list(&mut self, index: usize) {
        let link = &mut self.slots[index];
        if !link.is_listed {
            link.is_listed = true;
            self.listed.push_back(link.key);
        }
    }

    /// Whether some link can move something without waiting.
    pub(crate) fn is_busy(&self) -> bool {
        !self.listed.is_empty()
    }

    /// Whether some link would have to be armed before the thread sleeps.
    pub(crate) fn has_unarmed(&self) -> bool {
        !self.unarmed.is_empty()
    }

    /// What was asked since the last call, into an empty list that is filled again and again.
    pub(crate) fn take_outgoing(&mut self, outgoing: &mut Vec<Outgoing>) {
        debug_assert!(outgoing.is_empty());
        std::mem::swap(&mut self.desk.outgoing, outgoing);
        self.drop_dead(outgoing);
    }

    /// When the next timer is due.
    pub(crate) fn next_timer(&self) -> Option<Moment> {
        self.desk.timers.first().map(|(at, ..)| at)
    }

    /// Modes were switched: every link is looked at, and its client told if that concerns it.
    pub(crate) fn tell_modes(&mut self) {
        let indexes: Vec<usize> = self.slots.iter().map(|(index, _)| index).collect();
        for index in indexes {
            self.list(index);
        }
    }

    /// Gives every listed link one turn.
    pub(crate) fn pump(&mut self) {
        for _ in 0..self.listed.len() {
            let Some(key) = self.listed.pop_front() else {
                return;
            };
            let Some(link) = self.slots.get_mut(key.index) else {
                continue;
            };
            if link.key != key {
                continue;
            }
            link.is_listed = false;
            let ControlFlow::Continue(moved) = pump_one(link, &mut self.desk) else {
                self.drop_link(key);
                continue;
            };
            if moved {
                link.looks = 0;
            }
            if !link.link.is_idle() || link.is_making_places() {
                self.list(key.index);
            } else if link.link.needs_arming() && !link.is_unarmed {
                link.is_unarmed = true;
                self.unarmed.push(key);
            }
        }
    }

    /// Has links that announce nothing yet looked at with the next pump: for a thread that does not
    /// sleep now. One that was looked at in vain for long is armed, and from then on announces.
    pub(crate) fn look(&mut self) {
        let mut unarmed = std::mem::take(&mut self.unarmed);
        unarmed.retain(|key| {
            let Some(link) = self.slots.get_mut(key.index).filter(|it| it.key == *key) else {
                return false;
            };
            link.looks += 1;
            link.is_unarmed = link.looks < LOOKS_MAX;
            if link.is_unarmed {
                link.link.notify(Readiness::TRY_ALL);
            }
            if link.is_unarmed || link.link.arm() == Armed::Ready {
                self.list(key.index);
            }
            self.slots[key.index].is_unarmed
        });
        self.unarmed = unarmed;
    }

    /// Before the thread sleeps: arms what announces nothing yet; whether it may sleep.
    pub(crate) fn may_sleep(&mut self) -> bool {
        while let Some(key) = self.unarmed.pop() {
            let Some(link) = self.slots.get_mut(key.index).filter(|it| it.key == key) else {
                continue;
            };
            link.is_unarmed = false;
            if link.link.arm() == Armed::Ready {
                self.list(key.index);
            }
        }
        self.listed.is_empty()
    }

    fn drop_link(&mut self, key: LinkKey) {
        let mut link = self.slots.remove(key.index);
        link.end_requests(&mut self.desk);
        // Refused only where it is not watched.
        let _ = link.link.deregister(&*self.desk.watcher);
    }

    /// An owner answers.
    pub(crate) fn on_answer(&mut self, operation: u64, answer: Answer) {
        let Some(operation) = self.desk.operations.try_remove(operation as usize) else {
            debug_assert!(false, "an answer to an operation");
            return serve::orphan(&mut self.desk, answer);
        };
        match self.slots.get_mut(operation.link.index) {
            Some(link) if link.key == operation.link => {
                link.on_answer(&mut self.desk, operation, answer);
                link.start_gets(&mut self.desk);
                self.list(operation.link.index);
            }
            _ => serve::orphan(&mut self.desk, answer),
        }
    }

    /// Ends what is overdue.
    pub(crate) fn run_timers(&mut self) {
        while let Some((at, key, request)) = self.desk.timers.pop_due(self.desk.now) {
            let Some(link) = self.slots.get_mut(key.index).filter(|link| link.key == key) else {
                continue;
            };
            if request != LINK_TIMER {
                link.cut_short(&mut self.desk, request, true);
                link.start_gets(&mut self.desk);
                self.list(key.index);
                continue;
            }
            match link.phase {
                // Something it has queued is overdue, and its peer may take nothing for long.
                Phase::Serving => {
                    if link.unsent.timer_over(at) {
                        self.list(key.index);
                    }
                }
                Phase::Handshake(_) => {
                    self.desk.counters.handshakes_failed += 1;
                    let text = "the handshake took too long; connect again";
                    link.fail(&mut self.desk, &Failure::new(FailureCode::Protocol, text));
                    self.list(key.index);
                }
                Phase::Closing => {
                    link.link.close();
                    self.list(key.index);
                }
            }
        }
    }

    /// Tells every peer that the node goes, and lets them go.
    pub(crate) fn close_all(&mut self) {
        let failure = Failure::new(
            FailureCode::ShuttingDown,
            "the node is shutting down; connect again later",
        );
        let indexes: Vec<usize> = self.slots.iter().map(|(index, _)| index).collect();
        for index in indexes {
            self.slots[index].fail(&mut self.desk, &failure);
            self.list(index);
        }
    }
}

/// What a frame takes of its link's turn beside its bytes: a turn of many small requests must not be
/// longer than one of large blocks.
fn cost_of(message: &Message) -> usize {
    let ids = match message {
        Message::Get(get) => return get.items.len() * OPERATION_COST_BYTES,
        Message::Lookup(lookup) => lookup.ids.len(),
        Message::Lease(lease) => lease.ids.len(),
        Message::Remove(remove) => remove.ids.len(),
        _ => 0,
    };
    OPERATION_COST_BYTES + ids * ID_COST_BYTES
}

/// Moves what one link can move, and whether there was anything; `Break` when it is down.
fn pump_one(link: &mut Conversation, desk: &mut Desk) -> ControlFlow<(), bool> {
    let mut budget = TURN_BYTES;
    let mut moved = false;
    link.drop_overdue(desk);
    loop {
        let happened = match link.link.poll(&mut budget) {
            Event::Frame {
                header,
                message,
                payload_bytes,
            } => {
                let parsed = Header::decode(header).and_then(|header| {
                    let message = kvar_wire::decode(&header, message)?;
                    Ok((header, message))
                });
                Happened::Frame(parsed, payload_bytes)
            }
            Event::Received { sink, .. } => Happened::Received(sink.0),
            Event::Returned(Owned::Sink { sink, .. }) => Happened::Returned(Some(sink.0)),
            Event::Returned(Owned::Source { .. }) => Happened::Returned(None),
            Event::Sent { token, .. } => Happened::Sent(token),
            Event::Up => Happened::Nothing,
            Event::Down(reason) => Happened::Down(reason),
            Event::Yield | Event::Idle => Happened::Rest,
        };
        moved |= !matches!(happened, Happened::Rest);
        match happened {
            Happened::Frame(Ok((header, message)), payload_bytes) => {
                budget = budget.saturating_sub(cost_of(&message));
                link.on_frame(desk, &header, message, payload_bytes);
                // Whatever did not say where its payload goes does not want it.
                if payload_bytes > 0 && link.incoming == Incoming::Nothing {
                    link.link.discard();
                }
            }
            Happened::Frame(Err(error), _) => {
                if !matches!(link.phase, Phase::Closing) {
                    link.protocol(desk, &error.to_string());
                }
                link.link.discard();
            }
            Happened::Received(ticket) => link.on_received(desk, ticket),
            Happened::Sent(token) => link.on_sent(desk, token),
            Happened::Returned(ticket) => {
                link.incoming = Incoming::Nothing;
                abort(desk, ticket);
            }
            Happened::Nothing => {}
            Happened::Rest => {
                link.tell_mode(desk);
                link.make_places(desk);
                link.start_gets(desk);
                return ControlFlow::Continue(moved || budget < TURN_BYTES);
            }
            Happened::Down(reason) => {
                match reason {
                    DownReason::Garbage(text) => {
                        desk.counters.protocol_errors += 1;
                        tracing::warn!(peer = %link.peer, "garbage on a link: {text}");
                    }
                    reason => tracing::debug!(peer = %link.peer, %reason, "link down"),
                }
                return ControlFlow::Break(());
            }
        }
    }
}
