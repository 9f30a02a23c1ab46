//! The client's own thread: takes calls from the queue, drives the session, ends calls.
//!
//! ```text
//!   handles ── Command ──> queue ──> session ── done ──> completers
//!               (wakes it if it sleeps)   └─ what it knows ──> Published
//! ```
//!
//! What must always be true: a command that was taken is given to the session before it sleeps; when the last
//! handle is gone every call that waits is ended, and then the thread.

use crate::config::ClientError;
use crate::items::Request;
use crate::layer_put::SectionPart;
use crate::pending::Completer;
use crate::session::{Completion, Session, Ticket};
use crossbeam_channel::{Receiver, TryRecvError};
use kvar_base::{Moment, wake};
use kvar_wire::Limits;
use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The thread looks up at least this often; deadlines and answers wake it anyway.
const SLEEP_MAX: Duration = Duration::from_secs(60);

pub(crate) enum Command {
    Call {
        request: Request,
        deadline: Moment,
        completer: Completer,
    },
    /// To a put by layers that was submitted before.
    Put(u64, PutWord),
}

/// What the writer of a put by layers says after its announcement.
pub(crate) enum PutWord {
    /// The next section of each block that is still wanted.
    Section(Vec<Option<SectionPart>>),
    /// That was all; the call ends by then, if that is sooner than it would anyway.
    Commit(Option<Moment>),
    /// There will be no more.
    Abort,
}

/// What the thread lets others see.
#[derive(Clone, Default)]
pub(crate) struct Published {
    pub(crate) limits: Option<Limits>,
    pub(crate) last_error: Option<ClientError>,
}

/// What runs on the thread.
pub(crate) struct Worker {
    pub(crate) session: Session,
    pub(crate) commands: Receiver<Command>,
    pub(crate) asleep: Arc<AtomicBool>,
    pub(crate) published: Arc<Mutex<Published>>,
    pub(crate) waiting: HashMap<Ticket, Completer>,
}

impl Worker {
    /// Until the last handle is gone.
    pub(crate) fn run(mut self) {
        let mut done = Vec::new();
        loop {
            loop {
                match self.commands.try_recv() {
                    Ok(Command::Put(put, word)) => self.session.on_put_word(put, word),
                    Ok(Command::Call {
                        request,
                        deadline,
                        completer,
                    }) => {
                        let ticket = self.session.submit_until(request, deadline);
                        self.waiting.insert(ticket, completer);
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.session.shut_down(&mut done);
                        self.tell(&mut done);
                        return;
                    }
                }
            }
            let timeout = if wake::may_sleep(&*self.asleep, || self.commands.is_empty()) {
                SLEEP_MAX
            } else {
                Duration::ZERO
            };
            self.session.poll(timeout, &mut done);
            wake::is_up(&*self.asleep);
            publish(&self.session, &self.published);
            self.tell(&mut done);
        }
    }

    fn tell(&mut self, done: &mut Vec<Completion>) {
        for Completion { ticket, answer } in done.drain(..) {
            if let Some(completer) = self.waiting.remove(&ticket) {
                completer.complete(answer);
            }
        }
    }
}

/// Lets others see what has changed.
pub(crate) fn publish(session: &Session, published: &Mutex<Published>) {
    let mut published = published.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(limits) = session.limits() {
        published.limits = Some(limits);
    }
    if published.last_error.as_ref() != session.last_error() {
        published.last_error = session.last_error().cloned();
    }
}
