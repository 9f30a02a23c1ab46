//! One shard's thread: links, mailbox and engine in one loop.
//!
//! ```text
//!   loop
//!     sleep, unless something can move                 epoll: listener, links, mailbox, device
//!     mail      -> asks for my engine, answers for my links, connections
//!     timers    -> deadlines
//!     links     -> frames in, asks out; answers out
//!     asks      -> my engine, or another shard's mailbox
//!     engine    -> completions in, operations out; answers to my links, or to another shard
//! ```
//!
//! ```text
//!   Serving ── Stop ──> LinksClosing ── links gone, and every shard's links ──> Flushing ──> Over
//! ```
//!
//! What must always be true: nothing here blocks except the one sleep; after all shards have
//! closed their links nothing is committed any more, so what a shutdown writes is everything that
//! was acknowledged.
//!
//! What is absent: what is opened and in which order (`start`), what is served (`links`).

use crate::links::{LinkSettings, Links, Outgoing};
use crate::mail::{Answer, Ask, Mail, Mailbox, Origin, Post};
use crate::owner::Owner;
use crate::report::ShardReport;
use kvar_base::{Clock as _, Moment, SystemClock};
use kvar_engine::{Engine, ShutdownReport};
use kvar_transport::Listener;
use kvar_wire::{Failure, FailureCode};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Tokens of the poll; links follow.
pub(crate) const WAKER: Token = Token(0);
const DEVICE: Token = Token(1);
const LISTENER: Token = Token(2);
const FIRST_LINK: usize = 3;

/// Events taken from the kernel at once; more come with the next turn.
const EVENTS_A_TURN: usize = 256;

/// Mail taken in one turn, so that a flood of asks does not starve the shard's own links.
const MAIL_A_TURN: usize = 1024;

/// Links that a stop gives this long to take their good-bye.
const LINKS_CLOSING: Duration = Duration::from_millis(1500);

/// Connections beyond `connections_max` that are told so at one time; more are just closed.
const REFUSALS_AT_ONCE: usize = 64;

/// How long accepting pauses when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a shard thread is given.
pub(crate) struct ShardParts {
    pub(crate) number: u32,
    pub(crate) poll: Poll,
    pub(crate) mailbox: Mailbox,
    pub(crate) post: Post,
    pub(crate) engine: Engine,
    pub(crate) io_notes: Vec<String>,
    pub(crate) arena_bytes: u64,
    /// The shard that has it accepts for all.
    pub(crate) listener: Option<Listener>,
    pub(crate) settings: LinkSettings,
    pub(crate) spin: Duration,
    pub(crate) connections_max: usize,
    /// Links open over all shards.
    pub(crate) connections: Arc<AtomicUsize>,
    pub(crate) clock: SystemClock,
}

enum Stage {
    Serving,
    LinksClosing { until: Moment, said: bool },
    Flushing,
    Over(ShutdownReport),
}

struct Shard {
    number: u32,
    mailbox: Mailbox,
    post: Post,
    owner: Owner,
    links: Links,
    listener: Option<Listener>,
    accept_again: Option<Moment>,
    io_notes: Vec<String>,
    arena_bytes: u64,
    connections: Arc<AtomicUsize>,
    connections_max: usize,
    next_shard: u32,
    stage: Stage,
    shards_closed: u32,
    answers: Vec<(Origin, Answer)>,
    now: Moment,
    /// Whether the engine was asked for something since its last turn.
    engine_has_work: bool,
}

/// Runs a shard until it is told to stop; says what became of memory.
///
/// # Errors
/// When the operating system refuses to watch a descriptor.
pub(crate) fn run(mut parts: ShardParts) -> std::io::Result<ShutdownReport> {
    let registry = parts.poll.registry();
    if let Some(fd) = parts.engine.readiness() {
        registry.register(&mut SourceFd(&fd), DEVICE, Interest::READABLE)?;
    }
    if let Some(listener) = &mut parts.listener {
        listener.register(registry, LISTENER)?;
    }
    let registry = registry.try_clone()?;
    let shards = parts.post.shards();
    let links = Links::new(shards, parts.settings, parts.clock, registry, FIRST_LINK);
    let mut shard = Shard {
        number: parts.number,
        mailbox: parts.mailbox,
        post: parts.post,
        owner: Owner::new(parts.engine),
        links,
        accept_again: parts.listener.is_some().then_some(parts.clock.now()),
        listener: parts.listener,
        io_notes: parts.io_notes,
        arena_bytes: parts.arena_bytes,
        connections: parts.connections,
        connections_max: parts.connections_max,
        next_shard: 0,
        stage: Stage::Serving,
        shards_closed: 0,
        answers: Vec::new(),
        now: parts.clock.now(),
        engine_has_work: true,
    };
    let mut poll = parts.poll;
    let mut events = Events::with_capacity(EVENTS_A_TURN);
    let mut last_work = shard.now;
    loop {
        let worked = shard.turn();
        if let Stage::Over(report) = shard.stage {
            return Ok(report);
        }
        if worked {
            last_work = shard.now;
        }
        let spins = shard.now.since(last_work) < parts.spin;
        let timeout = if worked || spins {
            Some(Duration::ZERO)
        } else {
            shard.may_sleep()
        };
        match poll.poll(&mut events, timeout) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        shard.mailbox.awake();
        shard.now = shard.links.tick();
        for event in &events {
            match event.token() {
                WAKER => {}
                DEVICE => shard.engine_has_work = true,
                LISTENER => shard.accept_again = Some(shard.now),
                _ => shard.links.on_event(event),
            }
        }
    }
}

impl Shard {
    /// Everything that can be done now; whether there may be more at once.
    fn turn(&mut self) -> bool {
        let mut worked = self.take_mail();
        if self.accept_again.is_some_and(|at| at <= self.now) {
            self.accept_again = None;
            self.accept();
            worked = true;
        }
        if self.links.next_timer().is_some_and(|at| at <= self.now) {
            self.links.run_timers();
        }
        let before = self.links.len();
        self.links.pump();
        worked |= self.settle();
        let timer_due = self
            .owner
            .engine()
            .next_timer()
            .is_some_and(|at| at <= self.now);
        if self.engine_has_work || timer_due || self.owner.engine().in_flight() > 0 {
            self.engine_has_work = false;
            self.owner.turn(self.now, &mut self.answers);
            worked |= self.settle();
        }
        let after = self.links.len();
        if after < before {
            self.connections
                .fetch_sub(before - after, Ordering::Relaxed);
        }
        self.step_stage();
        worked || self.links.is_busy() || self.engine_has_work
    }

    /// How long it may sleep: until the next timer; not at all if mail has come.
    fn may_sleep(&self) -> Option<Duration> {
        if !self.mailbox.may_sleep() {
            return Some(Duration::ZERO);
        }
        let stage_timer = match self.stage {
            Stage::LinksClosing { until, said: false } => Some(until),
            _ => None,
        };
        [self.links.next_timer(), self.owner.engine().next_timer(), self.accept_again, stage_timer]
            .into_iter()
            .flatten()
            .min()
            // Rounded up to the clock's step, so that the timer is due when the sleep is over.
            .map(|at| at.since(self.now) + Duration::from_micros(1))
    }

    fn take_mail(&mut self) -> bool {
        let mut taken = 0;
        while taken < MAIL_A_TURN {
            let Some(mail) = self.mailbox.take() else {
                break;
            };
            taken += 1;
            match mail {
                Mail::Ask(origin, ask) => self.ask_owner(origin, ask),
                Mail::Answer(operation, answer) => self.links.on_answer(operation, answer),
                Mail::Link(stream, peer) => self.add_link(stream, peer, None),
                Mail::Report(taker) => taker(self.report()),
                Mail::Stop => self.stop(),
                Mail::LinksClosed => self.shards_closed += 1,
            }
        }
        self.settle() || taken > 0
    }

    fn ask_owner(&mut self, origin: Origin, ask: Ask) {
        self.engine_has_work = true;
        let links = self.links.counters();
        let (notes, arena_bytes, now) = (&self.io_notes, self.arena_bytes, self.now);
        let report = |engine: &Engine| report(engine, links, notes, arena_bytes, now);
        self.owner
            .ask(self.now, origin, ask, report, &mut self.answers);
    }

    /// Takes asks to their owners and answers to their links until there are no more; whether
    /// there were any.
    fn settle(&mut self) -> bool {
        let mut moved = false;
        loop {
            let asks = self.links.take_outgoing();
            let answers = std::mem::take(&mut self.answers);
            if asks.is_empty() && answers.is_empty() {
                return moved;
            }
            moved = true;
            for Outgoing {
                shard,
                operation,
                ask,
            } in asks
            {
                let origin = Origin {
                    shard: self.number,
                    operation,
                };
                if shard == self.number {
                    self.ask_owner(origin, ask);
                } else {
                    self.post.send(shard, Mail::Ask(origin, ask));
                }
            }
            for (origin, answer) in answers {
                if origin.shard == self.number {
                    self.links.on_answer(origin.operation, answer);
                } else {
                    self.post
                        .send(origin.shard, Mail::Answer(origin.operation, answer));
                }
            }
        }
    }

    fn report(&self) -> ShardReport {
        let links = self.links.counters();
        report(
            self.owner.engine(),
            links,
            &self.io_notes,
            self.arena_bytes,
            self.now,
        )
    }

    // ---- connections ------------------------------------------------------------------------

    /// Takes every connection that waits and deals them out in turn, so that shards share the
    /// work of links as they share blocks.
    fn accept(&mut self) {
        while let Some(listener) = &mut self.listener {
            match listener.accept() {
                Ok(None) => return,
                Ok(Some((stream, peer))) => {
                    let open = self.connections.fetch_add(1, Ordering::Relaxed);
                    if open >= self.connections_max + REFUSALS_AT_ONCE {
                        self.connections.fetch_sub(1, Ordering::Relaxed);
                        continue;
                    }
                    if open >= self.connections_max {
                        let text = format!(
                            "the node has {} links open, as many as it may (connections_max); \
                             close some, or raise it",
                            self.connections_max
                        );
                        let failure = Failure::new(FailureCode::Busy, &text);
                        self.add_link(stream, peer, Some(&failure));
                        continue;
                    }
                    let shard = self.next_shard;
                    self.next_shard = (shard + 1) % self.post.shards();
                    if shard == self.number {
                        self.add_link(stream, peer, None);
                    } else {
                        self.post.send(shard, Mail::Link(stream, peer));
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; trying again shortly");
                    self.accept_again = Some(self.now.after(ACCEPT_PAUSE));
                    return;
                }
            }
        }
    }

    fn add_link(
        &mut self,
        stream: kvar_transport::TcpStream,
        peer: std::net::SocketAddr,
        refusal: Option<&Failure>,
    ) {
        let accepts = matches!(self.stage, Stage::Serving);
        let added = accepts
            && match self.links.accept(stream, peer, refusal) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(%peer, %error, "cannot watch a connection; closing it");
                    false
                }
            };
        if !added {
            self.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }

    // ---- stopping ---------------------------------------------------------------------------

    fn stop(&mut self) {
        if !matches!(self.stage, Stage::Serving) {
            return;
        }
        // A closed listener is what makes clients elsewhere notice first.
        self.listener = None;
        self.accept_again = None;
        self.links.close_all();
        self.stage = Stage::LinksClosing {
            until: self.now.after(LINKS_CLOSING),
            said: false,
        };
    }

    fn step_stage(&mut self) {
        match &mut self.stage {
            Stage::LinksClosing { until, said } => {
                if !*said && (self.links.len() == 0 || *until <= self.now) {
                    *said = true;
                    // Behind everything this shard has asked of the others: see the module.
                    for shard in 0..self.post.shards() {
                        self.post.send(shard, Mail::LinksClosed);
                    }
                }
                if self.shards_closed >= self.post.shards() {
                    self.owner.begin_shutdown(self.now);
                    self.engine_has_work = true;
                    self.stage = Stage::Flushing;
                }
            }
            Stage::Flushing => {
                if let Some(report) = self.owner.engine().shutdown_report() {
                    self.stage = Stage::Over(report);
                }
            }
            Stage::Serving | Stage::Over(_) => {}
        }
    }
}

fn report(
    engine: &Engine,
    links: crate::counters::LinkCounters,
    io_notes: &[String],
    arena_bytes: u64,
    now: Moment,
) -> ShardReport {
    ShardReport {
        links,
        engine: engine.status(now),
        io_engine: engine.io_engine(),
        io_notes: io_notes.to_vec(),
        arena_bytes,
    }
}
