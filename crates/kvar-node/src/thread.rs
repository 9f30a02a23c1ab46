//! One thread of the node: links, mailbox and engines in one loop.
//!
//! A thread has one shard of every device, so that a node uses as many cores as it has shards,
//! however many devices there are.
//!
//! ```text
//!   loop
//!     sleep, unless something can move                 reactor: listener, links, mailbox, devices
//!     mail      -> asks for my engines, answers for my links, connections, devices in and out
//!     timers    -> deadlines
//!     links     -> frames in, asks out; answers out
//!     asks      -> my engines, or another thread's mailbox
//!     engines   -> completions in, operations out; answers to my links, or to another thread
//! ```
//!
//! ```text
//!   Serving ── Stop ──> LinksClosing ── links gone, and every thread's links ──> Flushing ──> Over
//! ```
//!
//! What must always be true: nothing here blocks except the one sleep (and the opening of a device,
//! before anything of it is served); after all threads have closed their links nothing is committed
//! any more, so what a shutdown writes is everything that was acknowledged.
//!
//! What is absent: which devices there are (`devices`), what is served (`links`).

use crate::devices;
use crate::links::{LinkSettings, Links, Outgoing, To};
use crate::loading::{LoadFailed, OpenShard};
use crate::mail::{Answer, Ask, EngineKey, KEEPER, Mail, Mailbox, Origin, Post};
use crate::node::AroundHook;
use crate::owner::{Owner, away};
use crate::report::{SleepReport, ThreadReport};
use crossbeam_channel::Sender;
use kvar_base::{Clock as _, MissReason, Moment, SystemClock};
use kvar_engine::{Demoted, Loaded, ShutdownReport};
use kvar_io::{IoEngine, Reactor, Ready, Watcher, calls};
use kvar_transport::Listener;
use kvar_wire::{Failure, FailureCode};
use mio::{Interest, Token};
use slab::Slab;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Tokens of what is watched; links follow, and devices come from above by their engines' serials.
const BELL: Token = Token(0);
const LISTENER: Token = Token(1);
const FIRST_LINK: usize = 2;
const FIRST_DEVICE: usize = usize::MAX / 2;

/// Mail taken in one turn, so that a flood of asks does not starve the thread's own links.
const MAIL_A_TURN: usize = 1024;

/// Links that a stop gives this long to take their good-bye.
const LINKS_CLOSING: Duration = Duration::from_millis(1500);

/// How long a stop waits for a cancelled load: reads under way end within a few milliseconds, and a
/// device that does not answer must not hold the process up.
const LOAD_CANCEL: Duration = Duration::from_secs(5);

/// Connections beyond `connections_max` that are told so at one time; more are just closed.
const REFUSALS_AT_ONCE: usize = 64;

/// How long accepting pauses when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Numbers of operations that are offers to the tier below; smaller ones are the links'.
const OFFERS_FROM: u64 = 1 << 40;

/// What a thread is given.
pub(crate) struct ThreadParts {
    pub(crate) number: u32,
    /// How devices are opened, and with that what the thread sleeps over.
    pub(crate) io_engine: IoEngine,
    pub(crate) mailbox: Mailbox,
    pub(crate) post: Post,
    pub(crate) keeper: Sender<devices::Event>,
    /// The thread that has it accepts for all.
    pub(crate) listener: Option<Listener>,
    pub(crate) settings: LinkSettings,
    pub(crate) spin: Duration,
    pub(crate) connections_max: usize,
    /// Links open over all threads.
    pub(crate) connections: Arc<AtomicUsize>,
    pub(crate) clock: SystemClock,
    /// Called around each turn and its sleep.
    pub(crate) around: Option<AroundHook>,
}

enum Stage {
    Serving,
    LinksClosing { until: Moment, said: bool },
    Flushing { loads_until: Moment },
    Over(ShutdownReport),
}

struct Thread {
    number: u32,
    mailbox: Mailbox,
    post: Post,
    keeper: Sender<devices::Event>,
    watcher: Rc<dyn Watcher>,
    /// One a device, so few that a search is as good as a map.
    owners: Vec<Owner>,
    links: Links,
    listener: Option<Listener>,
    accept_again: Option<Moment>,
    connections: Arc<AtomicUsize>,
    connections_max: usize,
    next_thread: u32,
    stage: Stage,
    threads_closed: u32,
    answers: Vec<(Origin, Answer)>,
    /// The lists that `settle` goes through, kept for their memory.
    settled: (Vec<Outgoing>, Vec<(Origin, Answer)>),
    /// What engines of this thread have on offer: whose it is, and under which token.
    offers: Slab<(EngineKey, u64)>,
    now: Moment,
    /// What an engine that is being loaded must hear, if the clock was set since it began.
    unix_at_start_s: Option<u64>,
    // Last: devices and links leave it before it goes.
    reactor: Reactor,
}

/// Runs a thread until it is told to stop; says what became of memory.
///
/// # Errors
/// When the operating system refuses to watch a descriptor.
pub(crate) fn run(mut parts: ThreadParts) -> std::io::Result<ShutdownReport> {
    let (reactor, note) = Reactor::new(parts.io_engine)?;
    // The same for all threads: said once.
    if let Some(note) = note.filter(|_| parts.number == 0) {
        tracing::warn!("{note}");
    }
    let watcher = reactor.watcher();
    watcher.watch(parts.mailbox.bell(), BELL, Interest::READABLE)?;
    if let Some(listener) = &mut parts.listener {
        listener.register(&*watcher, LISTENER)?;
    }
    let threads = parts.post.threads();
    let links = Links::new(
        threads,
        parts.settings,
        parts.clock,
        parts.keeper.clone(),
        watcher.clone(),
        FIRST_LINK,
    );
    let mut thread = Thread {
        number: parts.number,
        mailbox: parts.mailbox,
        post: parts.post,
        keeper: parts.keeper,
        watcher,
        owners: Vec::new(),
        links,
        accept_again: parts.listener.is_some().then_some(parts.clock.now()),
        listener: parts.listener,
        connections: parts.connections,
        connections_max: parts.connections_max,
        next_thread: 0,
        stage: Stage::Serving,
        threads_closed: 0,
        answers: Vec::new(),
        settled: (Vec::new(), Vec::new()),
        offers: Slab::new(),
        now: parts.clock.now(),
        unix_at_start_s: None,
        reactor,
    };
    let mut ready = Vec::new();
    let mut last_work = thread.now;
    loop {
        let mut ended = Ok(None);
        let mut round = || ended = thread.round(parts.spin, &mut last_work, &mut ready);
        match &parts.around {
            None => round(),
            Some(around) => around(&mut round),
        }
        if let Some(report) = ended? {
            return Ok(report);
        }
    }
}

impl Thread {
    /// One turn and one sleep, as long as there is nothing to do; at the end, what became of memory.
    fn round(
        &mut self,
        spin: Duration,
        last_work: &mut Moment,
        ready: &mut Vec<Ready>,
    ) -> std::io::Result<Option<ShutdownReport>> {
        let worked = self.turn();
        if let Stage::Over(report) = &mut self.stage {
            return Ok(Some(std::mem::take(report)));
        }
        if worked {
            *last_work = self.now;
        }
        // What was done is no reason to come again: what it left to do is listed, and what the peers do
        // meanwhile ends the sleep. So what devices were asked for is handed over with the sleep itself.
        // A link that announces nothing before it is armed is worth one more look, and who stops goes on by
        // turns.
        let is_stopping = !matches!(self.stage, Stage::Serving);
        let goes_on = worked && (is_stopping || self.links.has_unarmed());
        let looks = goes_on || self.now.since(*last_work) < spin;
        let timeout = if looks || self.has_more() {
            self.links.look();
            Some(Duration::ZERO)
        } else {
            self.may_sleep()
        };
        self.reactor.turn(timeout, ready)?;
        self.mailbox.awake();
        self.now = self.links.tick();
        for event in ready.drain(..) {
            match event.token {
                BELL => {}
                LISTENER => self.accept_again = Some(self.now),
                Token(token) if token >= FIRST_DEVICE => {
                    let serial = (token - FIRST_DEVICE) as u32;
                    let owner = self.owners.iter_mut().find(|it| it.key.serial == serial);
                    if let Some(owner) = owner {
                        owner.has_work = true;
                    }
                }
                _ => self.links.on_event(event),
            }
        }
        Ok(None)
    }

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
        for at in 0..self.owners.len() {
            if self.owners[at].is_due(self.now) {
                self.owners[at].turn(self.now, &mut self.answers);
            }
        }
        worked |= self.settle();
        self.drop_gone();
        let after = self.links.len();
        if after < before {
            self.connections
                .fetch_sub(before - after, Ordering::Relaxed);
        }
        self.step_stage();
        worked || self.has_more()
    }

    /// Whether something was left to do.
    fn has_more(&self) -> bool {
        self.links.is_busy() || self.owners.iter().any(|owner| owner.has_work)
    }

    /// How long it may sleep: until the next timer; not at all if mail has come.
    fn may_sleep(&mut self) -> Option<Duration> {
        if !self.links.may_sleep() || !self.mailbox.may_sleep() {
            return Some(Duration::ZERO);
        }
        let stage_timer = match self.stage {
            Stage::LinksClosing { until, said: false } => Some(until),
            Stage::Flushing { loads_until } if self.owners.iter().any(Owner::is_loading) => {
                Some(loads_until)
            }
            _ => None,
        };
        let engines = self.owners.iter().filter_map(Owner::next_timer).min();
        [self.links.next_timer(), engines, self.accept_again, stage_timer]
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
                Mail::Ask(origin, engine, ask) => self.ask_owner(origin, engine, ask),
                Mail::Answer(operation, answer) => self.on_answer(operation, answer),
                Mail::AskReport(origin) => {
                    let answer = Answer::Report(Box::new(self.report()));
                    self.answers.push((origin, answer));
                }
                Mail::Link(stream, peer) => self.add_link(stream, peer, None),
                Mail::Report(taker) => taker(self.report()),
                Mail::ClockSet { unix_at_start_s } => {
                    self.unix_at_start_s = Some(unix_at_start_s);
                    let owners = self.owners.iter_mut();
                    owners.for_each(|owner| owner.set_clock(self.now, unix_at_start_s));
                }
                Mail::Routes(routes) => {
                    for owner in &mut self.owners {
                        owner.set_standing(routes.standing(owner.key));
                    }
                    self.links.set_routes(routes);
                }
                Mail::Modes => self.links.tell_modes(),
                Mail::Open(shard) => self.open(*shard),
                Mail::Loaded(key, result) => self.loaded(key, result),
                Mail::Seal(key, is_sealed) => {
                    let owner = self.owners.iter_mut().find(|owner| owner.key == key);
                    owner.into_iter().for_each(|owner| owner.seal(is_sealed));
                }
                Mail::Close(key, has_moved) => self.close(key, has_moved),
                Mail::Stop => self.stop(),
                Mail::LinksClosed => self.threads_closed += 1,
            }
        }
        self.settle() || taken > 0
    }

    fn ask_owner(&mut self, origin: Origin, engine: EngineKey, ask: Ask) {
        match self.owners.iter_mut().find(|owner| owner.key == engine) {
            Some(owner) => owner.ask(self.now, origin, ask, &mut self.answers),
            // It went while this ask was under way.
            None => {
                let text = "the device was taken out of service meanwhile; try again";
                let answer = away(&ask, MissReason::Absent, text);
                self.answers.extend(answer.map(|answer| (origin, answer)));
            }
        }
    }

    fn on_answer(&mut self, operation: u64, answer: Answer) {
        match answer {
            Answer::Taken(outcome) => self.on_taken(operation, outcome),
            answer => self.links.on_answer(operation, answer),
        }
    }

    /// Sends what engines of this thread offer to the engines below.
    fn send_offers(&mut self) {
        for at in 0..self.owners.len() {
            for (token, block) in std::mem::take(&mut self.owners[at].offers) {
                let key = self.owners[at].key;
                let routes = self.links.routes();
                let below = routes.lower_owner(&block.id);
                let Some(engine) = below.filter(|_| self.owners[at].is_serving()) else {
                    self.owners[at].demoted(self.now, token, Demoted::Gone);
                    continue;
                };
                let origin = Origin {
                    thread: self.number,
                    operation: OFFERS_FROM + self.offers.insert((key, token)) as u64,
                };
                let ask = Ask::Take(block, routes);
                if engine.thread == self.number {
                    self.ask_owner(origin, engine, ask);
                } else {
                    self.post
                        .send(engine.thread, Mail::Ask(origin, engine, ask));
                }
            }
        }
    }

    fn on_taken(&mut self, operation: u64, outcome: Demoted) {
        let number = operation.saturating_sub(OFFERS_FROM) as usize;
        let Some((key, token)) = self.offers.try_remove(number) else {
            debug_assert!(false, "an answer to an offer");
            return;
        };
        if let Some(owner) = self.owners.iter_mut().find(|owner| owner.key == key) {
            owner.demoted(self.now, token, outcome);
        }
    }

    /// Takes asks to their owners and answers to their links until there are no more; whether
    /// there were any.
    fn settle(&mut self) -> bool {
        let mut moved = false;
        let (mut asks, mut answers) = std::mem::take(&mut self.settled);
        loop {
            // Before the answers: a remove that is answered finds below what was offered before it.
            self.send_offers();
            self.links.take_outgoing(&mut asks);
            std::mem::swap(&mut self.answers, &mut answers);
            if asks.is_empty() && answers.is_empty() {
                self.settled = (asks, answers);
                return moved;
            }
            moved = true;
            for Outgoing { operation, to } in asks.drain(..) {
                let origin = Origin {
                    thread: self.number,
                    operation,
                };
                match to {
                    To::Engine(engine, ask) if engine.thread == self.number => {
                        self.ask_owner(origin, engine, ask);
                    }
                    To::Engine(engine, ask) => {
                        self.post
                            .send(engine.thread, Mail::Ask(origin, engine, ask));
                    }
                    To::Thread(thread) => self.post.send(thread, Mail::AskReport(origin)),
                    To::Keeper(note) => {
                        let sent = self.keeper.send(devices::Event::Note(origin, note));
                        if sent.is_err() {
                            let text = "the node is stopping; try again later".to_owned();
                            self.answers.push((origin, Answer::Done(Err(text))));
                        }
                    }
                    To::Nobody(ask) => {
                        let text = "no device is in service at the moment; try again";
                        let answer = away(&ask, MissReason::Loading, text);
                        self.answers.extend(answer.map(|answer| (origin, answer)));
                    }
                }
            }
            for (origin, answer) in answers.drain(..) {
                if origin.thread == self.number {
                    self.on_answer(origin.operation, answer);
                } else if origin.thread == KEEPER {
                    let event = devices::Event::Answered(origin.operation, answer);
                    let _ = self.keeper.send(event);
                } else {
                    self.post
                        .send(origin.thread, Mail::Answer(origin.operation, answer));
                }
            }
        }
    }

    fn report(&self) -> ThreadReport {
        let shards = self.owners.iter().map(|owner| owner.report(self.now));
        ThreadReport {
            thread: self.number,
            sleep: SleepReport {
                thread: self.number,
                reactor: self.reactor.kind(),
                sleeps: self.reactor.sleeps(),
                system_calls: calls::so_far(),
            },
            links: self.links.counters(),
            namespaces: self.links.namespace_counters(),
            clients: self.links.clients(),
            shards: shards.collect(),
        }
    }

    // ---- devices ----------------------------------------------------------------------------

    fn open(&mut self, shard: OpenShard) {
        let (key, device, number) = (shard.key, shard.device, shard.number);
        let progress = shard.progress.clone();
        if !matches!(self.stage, Stage::Serving) {
            return self.tell(key, Err(LoadFailed::Cancelled));
        }
        match shard.begin(&self.post, &self.reactor) {
            Ok(opened) => {
                // The same for all shards of a device: said once.
                if number == 0 {
                    opened
                        .io_notes
                        .iter()
                        .for_each(|note| tracing::warn!("{note}"));
                }
                let mut owner = Owner::loading(key, device, number, opened, progress);
                owner.set_standing(self.links.routes().standing(key));
                self.owners.push(owner);
            }
            Err(failure) => {
                let owner = Owner::failed(key, device, number, failure.to_string());
                self.owners.push(owner);
                self.tell(key, Err(failure));
            }
        }
    }

    fn loaded(&mut self, key: EngineKey, result: Result<Box<Loaded>, LoadFailed>) {
        let Some(owner) = self.owners.iter_mut().find(|owner| owner.key == key) else {
            return;
        };
        let result = match result {
            Ok(_) if !matches!(self.stage, Stage::Serving) => Err(LoadFailed::Cancelled),
            result => result,
        };
        let told = match result {
            Ok(loaded) => {
                let fd = owner.start(self.now, *loaded);
                if let Some(unix_at_start_s) = self.unix_at_start_s {
                    owner.set_clock(self.now, unix_at_start_s);
                }
                let token = Token(FIRST_DEVICE + key.serial as usize);
                let watch = |fd| self.watcher.watch(fd, token, Interest::READABLE);
                let watched = fd.map_or(Ok(()), watch);
                watched.map_err(|error| LoadFailed::System(format!("an event queue: {error}")))
            }
            Err(failure) => {
                owner.fail(failure.to_string());
                Err(failure)
            }
        };
        self.tell(key, told);
    }

    fn tell(&self, key: EngineKey, result: Result<(), LoadFailed>) {
        // A keeper that is gone has nothing to decide any more.
        let _ = self.keeper.send(devices::Event::Loaded(key, result));
    }

    fn close(&mut self, key: EngineKey, has_moved: bool) {
        if let Some(owner) = self.owners.iter_mut().find(|owner| owner.key == key) {
            owner.close(self.now, has_moved, &mut self.answers);
        }
        self.drop_gone();
    }

    /// Lets engines go that were closed and have nothing under way. Failed ones stay to be seen
    /// until the keeper closes them.
    fn drop_gone(&mut self) {
        for owner in &mut self.owners {
            if owner.is_gone_now(self.now) {
                let _ = self.keeper.send(devices::Event::Closed(owner.key));
            }
        }
    }

    // ---- connections ------------------------------------------------------------------------

    /// Takes every connection that waits and deals them out in turn, so that threads share the
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
                    let thread = self.next_thread;
                    self.next_thread = (thread + 1) % self.post.threads();
                    if thread == self.number {
                        self.add_link(stream, peer, None);
                    } else {
                        self.post.send(thread, Mail::Link(stream, peer));
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
        if let Some(mut listener) = self.listener.take() {
            // Refused only where it is not watched.
            let _ = listener.deregister(&*self.watcher);
        }
        self.accept_again = None;
        self.links.close_all();
        self.owners.iter().for_each(Owner::cancel_loading);
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
                    // Behind everything this thread has asked of the others: see the module.
                    self.post.send_all(|| Mail::LinksClosed);
                }
                if self.threads_closed >= self.post.threads() {
                    for owner in &mut self.owners {
                        owner.begin_shutdown(self.now);
                    }
                    self.stage = Stage::Flushing {
                        loads_until: self.now.after(LOAD_CANCEL),
                    };
                }
            }
            Stage::Flushing { loads_until } => {
                let gives_up = *loads_until <= self.now;
                let mut sum = ShutdownReport {
                    checkpointed: true,
                    ..ShutdownReport::default()
                };
                for owner in self.owners.iter().filter(|owner| !owner.is_closed()) {
                    match owner.shutdown_report() {
                        Some(report) => {
                            sum.kept_blocks += report.kept_blocks;
                            sum.dropped_blocks += report.dropped_blocks;
                            sum.checkpointed &= report.checkpointed;
                        }
                        None if owner.is_loading() && gives_up => sum.checkpointed = false,
                        None => return,
                    }
                }
                self.stage = Stage::Over(sum);
            }
            Stage::Serving | Stage::Over(_) => {}
        }
    }
}
