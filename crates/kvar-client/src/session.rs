//! The session: calls in, completions out, on one thread; everything in between is here.
//!
//! ```text
//!   submit ─> queues: small | gets | layer puts | puts ─> dispatch (window of the node) ─> connections
//!                 ▲                                                                            │
//!                 └─────────────── deadlines, breaker, reconnect <── exchange.rs <───────── frames
//! ```
//!
//! What the node says is handled in `exchange`; here is what this side does by itself. Order of
//! sending: questions and orders without payload, then reads, then writes. Writes by layers have a
//! queue of their own, since they may wait for their writers, which whole ones need not wait for.

mod attach;
mod dispatch;
mod exchange;
mod links;
mod pieces;

use crate::breaker::{Breaker, BreakerState};
use crate::call::{Board, Lost, Work};
use crate::config::{ClientConfig, ClientError};
use crate::connection::Connection;
use crate::items::{Answer, Request};
use crate::staging::Staging;
use crate::stats::{ClientStats, Counters, add};
use kvar_base::{Clock, Mode, Moment, SystemClock};
use kvar_transport::{Armed, Link, Readiness};
use kvar_wire::{Cancel, Limits, Ping};
use links::{Addresses, Slot};
use mio::{Events, Poll, Token, Waker};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// The mio token of the waker; links have the small ones.
const WAKER: Token = Token(usize::MAX);

/// A deadline shorter than this that passes in silence says nothing about the node.
const SILENCE_MIN: Duration = Duration::from_millis(10);

/// Names a call under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub(crate) u64);

/// A call that has ended.
#[derive(Debug)]
pub struct Completion {
    /// Which one.
    pub ticket: Ticket,
    /// What came back.
    pub answer: Answer,
}

/// One node's client on one thread; never blocks but in [`poll`](Self::poll).
pub struct Session {
    config: ClientConfig,
    clock: SystemClock,
    poll: Poll,
    events: Events,
    waker: Arc<Waker>,
    woken: bool,
    board: Board,
    queues: Queues,
    /// (deadline, call); calls that have ended are skipped.
    deadlines: BinaryHeap<Reverse<(Moment, u64)>>,
    slots: Vec<Slot>,
    addresses: Addresses,
    breaker: Breaker,
    counters: Arc<Counters>,
    next_number: u64,
    /// Connect even if nobody has asked for anything.
    eager: bool,
    /// Why memory that the node sent could not be taken: it is not asked for again.
    unshareable: Option<String>,
    /// A new link is due at once, before anything is waited for.
    relink: bool,
}

#[derive(Default)]
struct Queues {
    small: VecDeque<Unit>,
    gets: VecDeque<Unit>,
    layer_puts: VecDeque<Unit>,
    puts: VecDeque<Unit>,
}

impl Queues {
    fn all(&self) -> [&VecDeque<Unit>; 4] {
        [&self.small, &self.gets, &self.layer_puts, &self.puts]
    }

    fn are_empty(&self) -> bool {
        self.all().into_iter().all(VecDeque::is_empty)
    }
}

/// Parts `next..end` of a call that have not been sent.
struct Unit {
    call: u64,
    next: usize,
    end: usize,
}

impl Session {
    /// A session that connects on first use; an unreachable node is an outcome, not an error.
    ///
    /// # Errors
    /// A wrong setting, or no descriptors left.
    pub fn lazy(config: ClientConfig) -> Result<Self, ClientError> {
        Self::with_clock(config, SystemClock::default())
    }

    pub(crate) fn with_clock(
        config: ClientConfig,
        clock: SystemClock,
    ) -> Result<Self, ClientError> {
        config.check()?;
        let none = |error: io::Error| {
            ClientError::Config(format!(
                "the operating system gives no event queue: {error}; raise the limit of open files"
            ))
        };
        let poll = Poll::new().map_err(none)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).map_err(none)?);
        let counters = Arc::new(Counters::default());
        Ok(Self {
            clock,
            poll,
            events: Events::with_capacity(64),
            waker,
            woken: false,
            board: Board::new(Arc::clone(&counters), clock),
            queues: Queues::default(),
            deadlines: BinaryHeap::new(),
            slots: (0..config.links).map(|_| Slot::empty()).collect(),
            addresses: Addresses::of(&config.endpoint),
            breaker: Breaker::new(),
            counters,
            next_number: 1,
            eager: false,
            unshareable: None,
            relink: false,
            config,
        })
    }

    /// A session whose first link stands, so that a wrong address, key, namespace or version is
    /// an error here.
    ///
    /// # Errors
    /// Why there is no link, after at most `connect_timeout`.
    pub fn connect(config: ClientConfig) -> Result<Self, ClientError> {
        let mut session = Self::lazy(config)?;
        session.wait_open()?;
        Ok(session)
    }

    pub(crate) fn wait_open(&mut self) -> Result<(), ClientError> {
        self.eager = true;
        let end = self.clock.now().after(self.config.connect_timeout);
        while self.limits().is_none() || self.is_staging() {
            if !self.breaker.is_closed() {
                break;
            }
            let now = self.clock.now();
            if now >= end {
                break;
            }
            self.turn(end.since(now));
        }
        self.eager = false;
        if self.limits().is_some() {
            return Ok(());
        }
        Err(self
            .board
            .last_error
            .clone()
            .unwrap_or_else(|| self.no_answer()))
    }

    /// What the node allows; `None` while no link stands.
    #[must_use]
    pub fn limits(&self) -> Option<Limits> {
        self.slots
            .iter()
            .find_map(|slot| slot.connection().and_then(Connection::limits).copied())
    }

    /// The mode that the operator gave the namespace, as the node last said; `load` until it has.
    /// Nothing here obeys it: whoever calls does.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.counters.mode.get()
    }

    /// What the node says of the mode. Of several links one is believed, always the same, since what
    /// comes over another may be older.
    fn note_mode(&mut self) {
        let links = self.slots.iter().filter_map(Slot::connection);
        let Some(first) = links.into_iter().find(|it| it.is_open()) else {
            return;
        };
        if first.mode != self.counters.mode.get() {
            self.counters.mode.set(first.mode);
            add(&self.counters.switches, 1);
        }
    }

    /// Takes a call in. It ends by `deadline` from now, in [`poll`](Self::poll).
    pub fn submit(&mut self, request: Request, deadline: Duration) -> Ticket {
        let deadline = self.clock.now().after(deadline);
        self.submit_until(request, deadline)
    }

    pub(crate) fn submit_until(&mut self, request: Request, deadline: Moment) -> Ticket {
        let (now, ticket) = (self.clock.now(), self.number());
        let parts = self.board.add(ticket, request, now, deadline);
        if parts == 0 {
            return Ticket(ticket);
        }
        if now >= deadline {
            self.board.end_call(ticket, Lost::Deadline);
        } else if !self.breaker.is_closed() {
            self.board.end_call(ticket, Lost::Unreachable);
        } else if let Some(call) = self.board.calls.get(&ticket) {
            let unit = |next, end| Unit {
                call: ticket,
                next,
                end,
            };
            match call.work {
                Work::Small { ref ask, .. } => {
                    let at_once = if ask.is_one_by_one() { 1 } else { parts };
                    self.queues
                        .small
                        .extend((0..at_once).map(|part| unit(part, part + 1)));
                }
                Work::Get { .. } => self.queues.gets.push_back(unit(0, parts)),
                Work::Put {
                    by_layers: Some(_), ..
                } => self.queues.layer_puts.push_back(unit(0, parts)),
                Work::Put { .. } => self.queues.puts.push_back(unit(0, parts)),
            }
            self.deadlines.push(Reverse((deadline, ticket)));
        }
        Ticket(ticket)
    }

    /// Moves what can be moved, and waits up to `timeout` until a call has ended. Appends ended
    /// calls to `done` and returns how many.
    pub fn poll(&mut self, timeout: Duration, done: &mut Vec<Completion>) -> usize {
        let end = self.clock.now().after(timeout);
        loop {
            let left = end.since(self.clock.now());
            self.turn(left);
            let count = self.board.done.len();
            done.append(&mut self.board.done);
            if count > 0 || std::mem::take(&mut self.woken) || self.clock.now() >= end {
                return count;
            }
        }
    }

    /// Makes a [`poll`](Self::poll) on another thread return.
    #[must_use]
    pub fn waker(&self) -> Arc<Waker> {
        Arc::clone(&self.waker)
    }

    /// Calls that have not ended.
    #[must_use]
    pub fn calls_open(&self) -> usize {
        self.board.calls.len()
    }

    /// The breaker.
    #[must_use]
    pub fn breaker(&self) -> BreakerState {
        self.breaker.state()
    }

    /// Memory of so many bytes that gets can go to without a copy on this side, if the client has a
    /// [region](ClientConfig::staging) and there is room; else plain memory for the same gets.
    #[must_use]
    pub fn staging(&self, len: usize) -> Staging {
        self.counters.stock.take(len)
    }

    /// What last kept the node from being reached.
    #[must_use]
    pub fn last_error(&self) -> Option<&ClientError> {
        self.board.last_error.as_ref()
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        self.counters.snapshot()
    }

    pub(crate) fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    fn number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    /// One turn: everything that can be done now, then sleep if nothing came of it.
    fn turn(&mut self, timeout: Duration) {
        let now = self.clock.now();
        self.expire(now);
        self.keep_links(now);
        self.dispatch(now);
        self.drive(now);
        if self.dispatch(now) {
            self.drive(now);
        }
        // Whoever waits for the first link waits for nothing else.
        let is_open = self.limits().is_some() && !self.is_staging();
        let decided = self.eager && (is_open || !self.breaker.is_closed());
        let relink = std::mem::take(&mut self.relink);
        if decided || relink || !self.board.done.is_empty() {
            return;
        }
        self.sleep(timeout);
    }

    fn sleep(&mut self, timeout: Duration) {
        let begun = self.clock.now();
        let mut timeout = self
            .next_timer()
            .map_or(timeout, |next| timeout.min(next.since(begun)));
        let busy = |slot: &Slot| {
            slot.connection()
                .is_some_and(|connection| !connection.link.is_idle())
        };
        if self.slots.iter().any(busy) {
            timeout = Duration::ZERO;
        }
        if !timeout.is_zero() && !self.config.spin.is_zero() && !self.board.calls.is_empty() {
            let spin = self.config.spin.min(timeout);
            while self.clock.now().since(begun) < spin {
                if self.try_links() {
                    return;
                }
                std::hint::spin_loop();
            }
            timeout = timeout.saturating_sub(self.clock.now().since(begun));
        }
        // What links share with the node announces nothing before they have said that they sleep.
        for slot in &mut self.slots {
            if let Slot::Linked(connection) = slot
                && connection.link.arm() == Armed::Ready
            {
                timeout = Duration::ZERO;
            }
        }
        // An interrupted wait is a short one; nothing else can go wrong with a wait.
        if self.poll.poll(&mut self.events, Some(timeout)).is_err() {
            return;
        }
        for event in &self.events {
            if event.token() == WAKER {
                self.woken = true;
            } else if let Some(Slot::Linked(connection)) = self.slots.get_mut(event.token().0) {
                connection.link.on_event(event);
            }
        }
    }

    /// Looks at the sockets without asking which; whether anything came of it.
    fn try_links(&mut self) -> bool {
        let now = self.clock.now();
        for slot in &mut self.slots {
            if let Slot::Linked(connection) = slot {
                connection.link.notify(Readiness::TRY_ALL);
            }
        }
        self.drive(now) || !self.board.done.is_empty()
    }

    fn next_timer(&mut self) -> Option<Moment> {
        while let Some(Reverse((_, call))) = self.deadlines.peek() {
            if self.board.calls.contains_key(call) {
                break;
            }
            self.deadlines.pop();
        }
        let deadline = self
            .deadlines
            .peek()
            .map(|Reverse((deadline, _))| *deadline);
        [deadline, self.breaker.timer(), self.links_timer()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Ends calls whose deadline has passed; their buffers are free when this returns.
    fn expire(&mut self, now: Moment) {
        while let Some(Reverse((deadline, call))) = self.deadlines.peek().copied() {
            if deadline > now {
                return;
            }
            self.deadlines.pop();
            if self.board.calls.contains_key(&call) {
                let silent = self.is_evidence_of_silence(call, now);
                self.note_waited(call, now);
                self.fence(call);
                self.board.end_call(call, Lost::Deadline);
                if silent {
                    self.fell_silent(now);
                }
            }
        }
    }

    /// Whether the node should have said something to this call by now, and has not to any.
    fn is_evidence_of_silence(&self, ticket: u64, now: Moment) -> bool {
        let Some(call) = self.board.calls.get(&ticket) else {
            return false;
        };
        let waits_for_device = match &call.work {
            Work::Small { ask, .. } => ask.may_be_slow(),
            // A node has nothing to say to whoever waits for a writer, nor to a put that its writer
            // has not finished.
            Work::Get { waits, .. } => *waits,
            Work::Put { slots, .. } => slots
                .iter()
                .any(|slot| slot.put.durable || slot.layers.is_some()),
        };
        let connections = || self.slots.iter().filter_map(Slot::connection);
        let mut since = call.sent.unwrap_or(call.begun);
        if matches!(call.work, Work::Get { .. }) {
            // Of gets a node asks for so many at a time: these may stand in line behind others that
            // wait for a writer, or have until a moment ago.
            let of_call = connections().filter(|link| is_over(link, ticket));
            for link in of_call {
                if link.open.values().any(|open| self.board.waits(open.call())) {
                    return false;
                }
                since = since.max(link.waited);
            }
        }
        let heard = connections()
            .filter(|c| c.is_open())
            .any(|c| c.heard > since);
        // With a link that stands and nothing sent on it, the window was full: not silence.
        let told = call.sent.is_some() || !connections().any(Connection::is_open);
        !waits_for_device && !heard && told && now.since(since) >= SILENCE_MIN
    }

    /// A get that waited for a writer ends without a word: those in line behind it have their turn.
    fn note_waited(&mut self, ticket: u64, now: Moment) {
        if !self.board.waits(ticket) {
            return;
        }
        for slot in &mut self.slots {
            if let Slot::Linked(connection) = slot
                && is_over(connection, ticket)
            {
                connection.waited = now;
            }
        }
    }

    /// Takes a call's buffers back from the links and tells the node that it is over.
    fn fence(&mut self, call: u64) {
        let board = &mut self.board;
        for slot in &mut self.slots {
            let Slot::Linked(connection) = slot else {
                continue;
            };
            let mut held = Vec::new();
            let of_call = |(request, open): (&u64, &crate::connection::Open)| {
                (open.call() == call).then_some(*request)
            };
            let requests: Vec<u64> = connection.open.iter().filter_map(of_call).collect();
            let eager_bytes_max = connection
                .limits()
                .map_or(0, |limits| limits.eager_bytes_max);
            for request in requests {
                let fenced = connection.link.fence_push(request);
                // Of an announced put the node has heard, though not of its bytes.
                let is_announced = match connection.open.get(&request) {
                    Some(crate::connection::Open::Put { item, .. }) => {
                        board.put_slot(call, *item).is_some_and(|slot| {
                            slot.layers.is_some() || slot.put.bytes > u64::from(eager_bytes_max)
                        })
                    }
                    _ => false,
                };
                let unsent = fenced.is_some_and(|fenced| fenced.unsent) && !is_announced;
                if let Some(receiving) = connection
                    .receiving
                    .take_if(|receiving| receiving.request == request)
                    && let Some(sink) = connection.link.fence_pull(request)
                    && let Some(slot) = board.get_slot(call, receiving.item)
                {
                    slot.item.into = sink;
                }
                if let Some(open) = connection.open.get(&request) {
                    held.append(&mut exchange::take_placed(board, open));
                }
                connection.forget(request, board);
                // A link that takes no Cancel has worse troubles than a late answer.
                let _ = if unsent {
                    Ok(())
                } else {
                    connection.send(request, &Cancel {})
                };
            }
            if !held.is_empty() {
                // The node takes frames in their order, and has written what it will when it answers.
                let fence = self.next_number;
                self.next_number += 1;
                let _ = connection.send(fence, &Ping {});
                add(&self.counters.staging_held, held.len() as u64);
                add(&self.counters.staging_fenced, held.len() as u64);
                let held = held.into_iter().map(|staging| (fence, staging));
                connection.held.extend(held);
            }
        }
    }

    /// Ends every call that is not on its way.
    fn end_waiting(&mut self, lost: Lost) {
        let queues = std::mem::take(&mut self.queues);
        let units = queues.all().into_iter().flatten();
        let calls: Vec<u64> = units.map(|unit| unit.call).collect();
        for call in calls {
            self.fence(call);
            self.board.end_call(call, lost);
        }
    }

    /// Ends everything; all buffers are free when this returns.
    pub(crate) fn shut_down(&mut self, done: &mut Vec<Completion>) {
        // Before anything that the node may still write goes back to it.
        self.counters.stock.close();
        self.end_waiting(Lost::Unreachable);
        let open: Vec<u64> = self.board.calls.keys().copied().collect();
        for call in open {
            self.fence(call);
            self.board.end_call(call, Lost::Unreachable);
        }
        done.append(&mut self.board.done);
        for slot in self.slots.drain(..) {
            let Slot::Linked(connection) = slot else {
                continue;
            };
            if connection.is_open() {
                self.counters.link_closed(connection.is_shared());
            }
            let held = connection.held.into_iter();
            held.for_each(|(_, staging)| staging.give_up());
        }
    }

    fn trip(&mut self, now: Moment, for_good: bool) {
        if self.breaker.is_closed() {
            add(&self.counters.breaker_opened, 1);
        }
        self.breaker.failed(now, for_good);
        self.counters.set_breaker(self.breaker.state());
        self.end_waiting(Lost::Unreachable);
    }

    fn node_lives(&mut self) {
        if !self.breaker.is_closed() {
            self.breaker.heard();
            self.counters.set_breaker(self.breaker.state());
        }
    }

    fn no_answer(&self) -> ClientError {
        ClientError::Unreachable(format!(
            "{} does not answer within {:?}: is a kvar node running there, and not stopped?",
            self.config.endpoint, self.config.connect_timeout,
        ))
    }
}

/// Whether anything of a call is open on a link.
fn is_over(connection: &Connection, call: u64) -> bool {
    connection.open.values().any(|open| open.call() == call)
}
