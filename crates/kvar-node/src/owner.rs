//! One engine as a thread has it: asks go in, its events become answers, whatever state it is in.
//!
//! ```text
//!   Loading ── loaded ──> Serving ── its device is out, or the node stops ──> Closing ──> gone
//!      └── cannot be loaded ──> Failed                                (what it counted stays)
//!
//!   Ask ──> Owner ── call ──> Engine
//!            │  token -> origin │
//!   Answer <─┴──── Event <──────┘
//! ```
//!
//! | asked for | Loading, Failed | Closing, because its device is out |
//! |---|---|---|
//! | lookup | absent | absent |
//! | get, stat | Miss(loading) | Miss(absent) |
//! | put | Refused(busy) | Refused(busy) |
//! | remove, purge, flush | an error that says to try again | the same |
//! | take | gone | gone |
//!
//! A sealed one (its device leaves, and what is put by now goes to the others) serves everything but
//! puts and takes: those are refused as in the last column, also where room was given before.
//!
//! Answers that are there at once (lookup, stat, a refused put) take the same way as those that
//! come turns later, so nobody above can tell the difference.
//!
//! What must always be true: every ask is answered once, also when the engine goes; a remove is
//! never acknowledged by an owner that did not pass it on.

use crate::loading::{Opened, Progress};
use crate::mail::{Answer, Ask, EngineKey, Origin, Ticket};
use crate::report::ShardReport;
use kvar_base::{FastMap, MissReason, Moment, PutOutcome, Refusal};
use kvar_engine::{Demoted, Demotion, Standing};
use kvar_engine::{
    Engine, Event, LeaseGrant, LeaseRequest, Loaded, ReadHints, RecoveryReport, ShardStatus,
    ShutdownReport,
};
use slab::Slab;
use std::os::fd::RawFd;
use std::sync::Arc;

/// Bytes of finished reads that are checked before their answers leave and links are looked at. A
/// device answers many reads at once; checked and sent in one go, the callers' next ones came all at
/// once too, and the device stood still for half of the time. With less than this a node sends more
/// often than it gains by (64 KiB reads over TCP, 16 under way, node's CPU a read: no bound 0.63
/// GB/s and 35 us, 512 KiB 0.75 and 29, 256 KiB 0.78 and 63, 128 KiB 0.78 and 76).
const READ_BYTES_A_TURN: u64 = 512 << 10;

/// How far it is.
enum State {
    Loading(Opened, Arc<Progress>),
    Failed(String),
    Serving(Engine),
    /// Its device is out. Kept until nothing is under way, since operations own memory.
    Closing(Engine),
    /// It is gone; what it counted stays, so that sums never fall.
    Closed(Box<ShardStatus>),
}

/// One engine, and who waits for what.
pub(crate) struct Owner {
    pub(crate) key: EngineKey,
    pub(crate) device: u32,
    pub(crate) number: u32,
    state: State,
    waiting: Slab<(Origin, Asked)>,
    /// Where those are that may go before they are answered.
    tokens: FastMap<(u32, u64), u64>,
    /// What the engine offers to the tier below, in the order of its events.
    pub(crate) offers: Vec<(u64, Box<Demotion>)>,
    standing: Standing,
    recovery: Option<RecoveryReport>,
    io_engine: &'static str,
    io_notes: Vec<String>,
    arena_bytes: u64,
    /// Whether the engine was asked for something since its last turn.
    pub(crate) has_work: bool,
    is_out: bool,
    is_sealed: bool,
    lost_blocks: u64,
}

/// What somebody waits for, to be answered should the engine go.
#[derive(Clone, Copy)]
enum Asked {
    Get,
    Await,
    Put,
    Finish,
    Take,
}

impl Owner {
    /// An owner whose shard is being loaded.
    pub(crate) fn loading(
        key: EngineKey,
        device: u32,
        number: u32,
        opened: Opened,
        progress: Arc<Progress>,
    ) -> Self {
        Self {
            key,
            device,
            number,
            io_engine: opened.io_engine,
            io_notes: opened.io_notes.clone(),
            arena_bytes: opened.arena_bytes,
            state: State::Loading(opened, progress),
            waiting: Slab::new(),
            tokens: FastMap::default(),
            offers: Vec::new(),
            standing: Standing::Only,
            recovery: None,
            has_work: false,
            is_out: false,
            is_sealed: false,
            lost_blocks: 0,
        }
    }

    /// An owner whose shard could not even begin to load.
    pub(crate) fn failed(key: EngineKey, device: u32, number: u32, why: String) -> Self {
        Self {
            key,
            device,
            number,
            state: State::Failed(why),
            waiting: Slab::new(),
            tokens: FastMap::default(),
            offers: Vec::new(),
            standing: Standing::Only,
            recovery: None,
            io_engine: "none",
            io_notes: Vec::new(),
            arena_bytes: 0,
            has_work: false,
            is_out: false,
            is_sealed: false,
            lost_blocks: 0,
        }
    }

    /// The shard is loaded: drives it from now on. Its readiness is to be watched.
    pub(crate) fn start(&mut self, now: Moment, loaded: Loaded) -> Option<RawFd> {
        let loading = std::mem::replace(&mut self.state, State::Failed(String::new()));
        let State::Loading(Opened { device, .. }, _) = loading else {
            self.state = loading;
            return None;
        };
        self.recovery = Some(loaded.report.clone());
        let mut engine = Engine::start(device, loaded, now);
        engine.set_standing(self.standing);
        let readiness = engine.readiness();
        self.state = State::Serving(engine);
        self.has_work = true;
        readiness
    }

    /// The machine's clock was set.
    pub(crate) fn set_clock(&mut self, now: Moment, unix_at_start_s: u64) {
        if let State::Serving(engine) | State::Closing(engine) = &mut self.state {
            engine.set_wall_clock(now, unix_at_start_s + now.0 / 1_000_000);
        }
    }

    /// Where the engine stands among the tiers, from now on.
    pub(crate) fn set_standing(&mut self, standing: Standing) {
        self.standing = standing;
        if let State::Serving(engine) = &mut self.state {
            engine.set_standing(standing);
            self.has_work = true;
        }
    }

    /// Takes nothing new from now on, or does again.
    pub(crate) fn seal(&mut self, is_sealed: bool) {
        self.is_sealed = is_sealed;
    }

    /// What became of something it offered.
    pub(crate) fn demoted(&mut self, now: Moment, token: u64, outcome: Demoted) {
        if let State::Serving(engine) | State::Closing(engine) = &mut self.state {
            engine.demoted(now, token, outcome);
            self.has_work = true;
        }
    }

    /// The shard cannot be loaded.
    pub(crate) fn fail(&mut self, why: String) {
        self.state = State::Failed(why);
    }

    pub(crate) fn is_serving(&self) -> bool {
        matches!(self.state, State::Serving(_))
    }

    pub(crate) fn is_loading(&self) -> bool {
        matches!(self.state, State::Loading(..))
    }

    /// The load is of no use any more.
    pub(crate) fn cancel_loading(&self) {
        if let State::Loading(_, progress) = &self.state {
            progress.cancel();
        }
    }

    fn engine(&self) -> Option<&Engine> {
        match &self.state {
            State::Serving(engine) | State::Closing(engine) => Some(engine),
            State::Loading(..) | State::Failed(_) | State::Closed(_) => None,
        }
    }

    /// When a turn is due even if nothing happens.
    pub(crate) fn next_timer(&self) -> Option<Moment> {
        self.engine().and_then(Engine::next_timer)
    }

    /// Whether a turn has something to do now.
    pub(crate) fn is_due(&self, now: Moment) -> bool {
        let timer_due = || self.next_timer().is_some_and(|at| at <= now);
        self.has_work || timer_due() || self.engine().is_some_and(|engine| engine.in_flight() > 0)
    }

    /// Writes what is in memory only; the engine says by itself when that is over.
    pub(crate) fn begin_shutdown(&mut self, now: Moment) {
        if let State::Serving(engine) | State::Closing(engine) = &mut self.state {
            engine.begin_shutdown(now);
            self.has_work = true;
        }
    }

    /// What became of memory, once a shutdown is over; at once where there was none to write.
    pub(crate) fn shutdown_report(&self) -> Option<ShutdownReport> {
        match &self.state {
            State::Serving(engine) | State::Closing(engine) => engine.shutdown_report(),
            State::Loading(..) => None,
            State::Failed(_) => Some(ShutdownReport::default()),
            State::Closed(_) => None,
        }
    }

    /// The device is out: whoever waits is answered, and the engine ends by itself.
    pub(crate) fn close(
        &mut self,
        now: Moment,
        has_moved: bool,
        answers: &mut Vec<(Origin, Answer)>,
    ) {
        self.is_out = true;
        self.tokens.clear();
        for (origin, asked) in self.waiting.drain() {
            let answer = match asked {
                Asked::Await => Answer::Awaited,
                Asked::Get => Answer::Get(Err(MissReason::Absent)),
                Asked::Put => Answer::Put(PutOutcome::Refused(Refusal::Busy)),
                Asked::Finish => Answer::Done(Err(OUT.to_owned())),
                Asked::Take => Answer::Taken(Demoted::Gone),
            };
            answers.push((origin, answer));
        }
        self.state = match std::mem::replace(&mut self.state, State::Failed(OUT.to_owned())) {
            State::Serving(mut engine) => {
                if !has_moved {
                    self.lost_blocks = engine.status(now).flash_blocks;
                }
                engine.begin_shutdown(now);
                self.has_work = true;
                State::Closing(engine)
            }
            State::Loading(_, progress) => {
                progress.cancel();
                State::Failed(OUT.to_owned())
            }
            state => state,
        };
    }

    /// Drops an engine that was told to close, as soon as that takes no waiting; true once.
    pub(crate) fn is_gone_now(&mut self, now: Moment) -> bool {
        let mut last = match &self.state {
            State::Closing(engine)
                if engine.shutdown_report().is_some() && engine.in_flight() == 0 =>
            {
                engine.status(now)
            }
            State::Failed(_) if self.is_out => ShardStatus::default(),
            _ => return false,
        };
        last = ShardStatus {
            shard: self.number,
            counters: last.counters,
            ..ShardStatus::default()
        };
        self.state = State::Closed(Box::new(last));
        self.arena_bytes = 0;
        true
    }

    /// Whether only its counters are left.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed(_))
    }

    /// Begins what is asked; what can be answered at once goes to `answers`.
    pub(crate) fn ask(
        &mut self,
        now: Moment,
        origin: Origin,
        ask: Ask,
        answers: &mut Vec<(Origin, Answer)>,
    ) {
        let engine = match &mut self.state {
            State::Serving(engine) if self.is_sealed => match ask {
                Ask::PutCommit(ticket) => {
                    engine.put_abort(ticket);
                    self.has_work = true;
                    answers.push((origin, Answer::Put(PutOutcome::Refused(Refusal::Busy))));
                    return;
                }
                Ask::PutBegin(_) | Ask::Take(..) => {
                    answers.extend(away(&ask, MissReason::Absent, OUT).map(|it| (origin, it)));
                    return;
                }
                _ => engine,
            },
            State::Serving(engine) => engine,
            State::Closing(engine) => {
                if let Ask::PutAbort(ticket) = ask {
                    engine.put_abort(ticket);
                } else if let Ask::PutCommit(ticket) = ask {
                    engine.put_abort(ticket);
                    answers.push((origin, Answer::Put(PutOutcome::Refused(Refusal::Busy))));
                } else {
                    answers.extend(away(&ask, MissReason::Absent, OUT).map(|it| (origin, it)));
                }
                return;
            }
            State::Closed(_) => {
                answers.extend(away(&ask, MissReason::Absent, OUT).map(|it| (origin, it)));
                return;
            }
            State::Loading(..) | State::Failed(_) => {
                answers.extend(away(&ask, MissReason::Loading, LOADING).map(|it| (origin, it)));
                return;
            }
        };
        self.has_work = true;
        let waiting = &mut self.waiting;
        let mut wait = |asked| waiting.insert((origin, asked)) as u64;
        match ask {
            Ask::Lookup {
                ids,
                places,
                touch_request,
            } => {
                let present = engine.lookup_of(now, &ids, places.places(), touch_request);
                answers.push((origin, Answer::Lookup(present)));
            }
            Ask::Lease(ask) => {
                let grant = engine.lease(
                    now,
                    &LeaseRequest {
                        ids: &ask.ids,
                        token: ask.token,
                        client: ask.client,
                        ttl: ask.ttl,
                        request: ask.touch_request,
                        places: ask.places.places(),
                        over_gaps: ask.over_gaps,
                    },
                );
                answers.push((origin, Answer::Leased(grant)));
            }
            Ask::Renew(token, ttl) => {
                let until = engine.renew(now, token, ttl);
                answers.push((origin, Answer::AboutLease(until)));
            }
            Ask::Release(token) => {
                let until = engine.release(token).then_some(now);
                answers.push((origin, Answer::AboutLease(until)));
            }
            Ask::ReleaseSome(token, ids) => engine.release_some(token, &ids),
            Ask::Get(request, hints) => {
                let asker = asker(origin, hints.asker);
                let hints = ReadHints { asker, ..hints };
                let token = wait(Asked::Get);
                self.tokens.insert(name(origin), token);
                engine.get(now, token, request, hints);
            }
            Ask::Await(ask) => {
                let token = wait(Asked::Await);
                self.tokens.insert(name(origin), token);
                let asker = asker(origin, ask.link);
                engine.await_put(now, asker, token, &ask.id, ask.until);
            }
            Ask::Forget(ask) => {
                let operation = ask.operation;
                let token = self.tokens.get(&name(Origin {
                    operation,
                    ..origin
                }));
                if let Some(token) = token.copied() {
                    engine.forget(now, asker(origin, ask.link), token, &ask.id);
                }
            }
            Ask::PutBegin(request) => {
                let begun = engine.put_begin(now, &request);
                let key = self.key;
                let begun = begun.map(|ticket| Ticket {
                    engine: key,
                    ticket,
                });
                answers.push((origin, Answer::PutBegun(begun)));
            }
            Ask::PutCommit(ticket) => engine.put_commit(now, wait(Asked::Put), ticket),
            Ask::PutAbort(ticket) => engine.put_abort(ticket),
            Ask::Remove(ids) => engine.remove(wait(Asked::Finish), &ids),
            Ask::Flush => engine.flush(wait(Asked::Finish)),
            Ask::Purge(whose) => engine.purge(wait(Asked::Finish), whose),
            Ask::Stat(id) => {
                let stat = engine.stat(now, &id).ok_or(MissReason::Absent);
                answers.push((origin, Answer::Stat(stat)));
            }
            Ask::Take(_, routes) if !routes.is_latest() => {
                answers.push((origin, Answer::Taken(Demoted::Gone)));
            }
            Ask::Take(block, _) => {
                let token = wait(Asked::Take);
                if let Err(outcome) = engine.take(now, token, &block) {
                    self.waiting.remove(token as usize);
                    answers.push((origin, Answer::Taken(outcome)));
                }
            }
        }
        self.collect(answers);
    }

    /// Lets the engine do what is due.
    pub(crate) fn turn(&mut self, now: Moment, answers: &mut Vec<(Origin, Answer)>) {
        self.has_work = false;
        if let State::Serving(engine) | State::Closing(engine) = &mut self.state {
            self.has_work = engine.turn_some(now, READ_BYTES_A_TURN);
            self.collect(answers);
        }
    }

    fn collect(&mut self, answers: &mut Vec<(Origin, Answer)>) {
        let (State::Serving(engine) | State::Closing(engine)) = &mut self.state else {
            return;
        };
        for event in engine.events() {
            let (token, answer) = match event {
                Event::Demote { token, block } => {
                    self.offers.push((token, block));
                    continue;
                }
                Event::Get { token, outcome } => (token, Answer::Get(outcome)),
                Event::Awaited { token } => (token, Answer::Awaited),
                Event::Put { token, outcome } => (token, Answer::Put(outcome)),
                Event::Done { token, result } => (token, Answer::Done(result)),
            };
            // A closed owner has answered already.
            if let Some((origin, asked)) = self.waiting.try_remove(token as usize) {
                let answer = match asked {
                    Asked::Take => Answer::Taken(taken(&answer)),
                    Asked::Get | Asked::Await => {
                        self.tokens.remove(&name(origin));
                        answer
                    }
                    Asked::Put | Asked::Finish => answer,
                };
                answers.push((origin, answer));
            }
        }
    }

    /// How it is.
    pub(crate) fn report(&self, now: Moment) -> ShardReport {
        let (state, loaded_bytes, failure) = match &self.state {
            State::Loading(_, progress) => ("loading", Some(progress.bytes()), None),
            State::Failed(why) => ("failed", None, Some(why.clone())),
            State::Serving(_) => ("serving", None, None),
            State::Closing(_) => ("closing", None, None),
            State::Closed(_) => ("closed", None, None),
        };
        let engine = match (self.engine(), &self.state) {
            (Some(engine), _) => engine.status(now),
            (None, State::Closed(last)) => ShardStatus::clone(last),
            (None, _) => ShardStatus {
                shard: self.number,
                ..ShardStatus::default()
            },
        };
        ShardReport {
            device: self.device,
            state,
            loaded_bytes,
            failure,
            lost_blocks: self.lost_blocks,
            engine,
            recovery: self.recovery.clone(),
            io_engine: self.io_engine,
            io_notes: self.io_notes.clone(),
            arena_bytes: self.arena_bytes,
        }
    }
}

const LOADING: &str = "the node is still loading what it stored before its last stop; try again shortly (kvar status \
     tells how far it is)";
const OUT: &str = "the device was just taken out of service; try again: its blocks are on the other devices from \
     now on";

/// Whom a link's reads are for: serials are a thread's own.
fn asker(origin: Origin, link: u64) -> u64 {
    u64::from(origin.thread) << 40 ^ link
}

/// Under what something is known that may go.
fn name(origin: Origin) -> (u32, u64) {
    (origin.thread, origin.operation)
}

/// How a block that was taken ended.
fn taken(answer: &Answer) -> Demoted {
    match answer {
        Answer::Put(PutOutcome::Stored) => Demoted::Stored,
        // It was there, and everything up to it is flushed.
        Answer::Done(Ok(_)) => Demoted::Exists,
        _ => Demoted::Failed,
    }
}

/// The answer of an owner that has no engine to ask; none to what wants none.
pub(crate) fn away(ask: &Ask, reason: MissReason, text: &str) -> Option<Answer> {
    Some(match ask {
        Ask::Lookup { ids, .. } => Answer::Lookup(vec![false; ids.len()]),
        Ask::Lease(_) => Answer::Leased(LeaseGrant {
            leading: 0,
            gaps: Vec::new(),
            reason: Some(reason),
            until: Moment(0),
        }),
        Ask::Renew(..) | Ask::Release(_) => Answer::AboutLease(None),
        Ask::Get(..) => Answer::Get(Err(reason)),
        Ask::Await(_) => Answer::Awaited,
        Ask::PutBegin(_) => Answer::PutBegun(Err(PutOutcome::Refused(Refusal::Busy))),
        Ask::PutCommit(_) => Answer::Put(PutOutcome::Refused(Refusal::Busy)),
        Ask::PutAbort(_) | Ask::ReleaseSome(..) | Ask::Forget(_) => return None,
        Ask::Remove(_) | Ask::Flush | Ask::Purge(_) => Answer::Done(Err(text.to_owned())),
        Ask::Stat(_) => Answer::Stat(Err(reason)),
        Ask::Take(..) => Answer::Taken(Demoted::Gone),
    })
}
