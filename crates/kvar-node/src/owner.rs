//! The owner's side of a shard: asks go to the engine, its events become answers.
//!
//! ```text
//!   Ask ──> Owner ── call ──> Engine
//!            │  token -> origin │
//!   Answer <─┴──── Event <──────┘
//! ```
//!
//! Answers that the engine gives at once (lookup, stat, a refused put) take the same way as those
//! that come turns later, so nobody above can tell the difference.

use crate::mail::{Answer, Ask, Origin};
use crate::report::ShardReport;
use kvar_base::Moment;
use kvar_engine::{Engine, Event};
use slab::Slab;

/// One engine, and who waits for what.
pub(crate) struct Owner {
    engine: Engine,
    waiting: Slab<Origin>,
}

impl Owner {
    pub(crate) fn new(engine: Engine) -> Self {
        Self {
            engine,
            waiting: Slab::new(),
        }
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Writes what is in memory only; the engine says by itself when that is over.
    pub(crate) fn begin_shutdown(&mut self, now: Moment) {
        self.engine.begin_shutdown(now);
    }

    fn token(&mut self, origin: Origin) -> u64 {
        self.waiting.insert(origin) as u64
    }

    /// Begins what is asked; what can be answered at once goes to `answers`.
    pub(crate) fn ask(
        &mut self,
        now: Moment,
        origin: Origin,
        ask: Ask,
        report: impl FnOnce(&Engine) -> ShardReport,
        answers: &mut Vec<(Origin, Answer)>,
    ) {
        match ask {
            Ask::Lookup { ids, touch_request } => {
                let present = self.engine.lookup(&ids, touch_request);
                answers.push((origin, Answer::Lookup(present)));
            }
            Ask::Get(request) => {
                let token = self.token(origin);
                self.engine.get(now, token, request);
            }
            Ask::PutBegin(request) => {
                answers.push((
                    origin,
                    Answer::PutBegun(self.engine.put_begin(now, &request)),
                ));
            }
            Ask::PutCommit(ticket) => {
                let token = self.token(origin);
                self.engine.put_commit(now, token, ticket);
            }
            Ask::PutAbort(ticket) => self.engine.put_abort(ticket),
            Ask::Remove(ids) => {
                let token = self.token(origin);
                self.engine.remove(token, &ids);
            }
            Ask::Flush => {
                let token = self.token(origin);
                self.engine.flush(token);
            }
            Ask::Purge => {
                let token = self.token(origin);
                self.engine.purge(token);
            }
            Ask::Stat(id) => answers.push((origin, Answer::Stat(self.engine.stat(&id)))),
            Ask::Report => {
                answers.push((origin, Answer::Report(Box::new(report(&self.engine)))));
            }
        }
        self.collect(answers);
    }

    /// Lets the engine do what is due.
    pub(crate) fn turn(&mut self, now: Moment, answers: &mut Vec<(Origin, Answer)>) {
        self.engine.turn(now);
        self.collect(answers);
    }

    fn collect(&mut self, answers: &mut Vec<(Origin, Answer)>) {
        for event in self.engine.events() {
            let (token, answer) = match event {
                Event::Get { token, outcome } => (token, Answer::Get(outcome)),
                Event::Put { token, outcome } => (token, Answer::Put(outcome)),
                Event::Done { token, result } => (token, Answer::Done(result)),
            };
            if let Some(origin) = self.waiting.try_remove(token as usize) {
                answers.push((origin, answer));
            } else {
                debug_assert!(false, "an event of a call that was made");
            }
        }
    }
}
