//! What all links of a thread share: operations under way, timers, counters, limits.
//!
//! A link never calls an engine. It leaves an ask here, under an operation number; the thread's
//! loop takes asks to their owners and brings the answers back under the same number.

use super::timers::Timers;
use crate::counters::{LinkCounters, NamespaceCounters};
use crate::devices::{Event, Note, Removal, Removed, Routes};
use crate::links::attach::SharingSettings;
use crate::links::staging::StagingSettings;
use crate::mail::{Ask, EngineKey, ForgetAsk};
use crate::modes::Modes;
use crate::namespaces::Namespaces;
use crate::report::ThreadReport;
use crossbeam_channel::Sender;
use kvar_base::{BlockId, Clock as _, Moment, SystemClock};
use kvar_engine::TENANTS;
use kvar_io::Watcher;
use kvar_wire::{Limits, Section, VersionRange};
use mio::Token;
use slab::Slab;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Names a link: its place, and a number that is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkKey {
    pub(crate) index: usize,
    pub(crate) serial: u64,
}

/// The request number under which a link's own timers run; no request has it.
pub(crate) const LINK_TIMER: u64 = kvar_wire::LINK_REQUEST;

/// Something asked of an owner, and whose it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub(crate) link: LinkKey,
    pub(crate) request: u64,
    /// Which opening of that request number, since a client may use a number again.
    pub(crate) opening: u64,
    /// Which part of the request: an item, or an engine.
    pub(crate) part: u32,
}

/// An ask on its way to its owner.
pub(crate) struct Outgoing {
    pub(crate) operation: u64,
    pub(crate) to: To,
}

/// Whom something is asked of.
pub(crate) enum To {
    /// The engine that owns a block.
    Engine(EngineKey, Ask),
    /// A thread, for its report.
    Thread(u32),
    /// The keeper of the devices: it notes that blocks go while a device is away.
    Keeper(Note),
    /// There is no device at the moment.
    Nobody(Ask),
}

/// What links are served under.
#[derive(Clone)]
pub(crate) struct LinkSettings {
    /// What Welcome says.
    pub(crate) limits: Limits,
    /// The node's name towards clients.
    pub(crate) node: String,
    /// Who may connect.
    pub(crate) namespaces: Arc<Namespaces>,
    /// How much of the store engines use.
    pub(crate) modes: Arc<Modes>,
    /// Bytes a read is assumed to bring until its link has seen a block.
    pub(crate) block_bytes_guess: u64,
    /// With whom memory is shared.
    pub(crate) sharing: SharingSettings,
    /// What may be shared beyond that for reads.
    pub(crate) staging: StagingSettings,
    /// What it speaks.
    pub(crate) versions: VersionRange,
    /// Makes the node's status.
    pub(crate) describe: Arc<dyn Describe>,
}

/// Makes the node's status out of its threads' reports.
pub(crate) trait Describe: Send + Sync {
    /// As a JSON document.
    fn json(&self, reports: Vec<ThreadReport>) -> String;
}

/// See the module.
pub(crate) struct Desk {
    pub(crate) threads: u32,
    /// Who owns which block.
    pub(crate) routes: Arc<Routes>,
    pub(crate) operations: Slab<Operation>,
    pub(crate) outgoing: Vec<Outgoing>,
    pub(crate) timers: Timers,
    pub(crate) counters: LinkCounters,
    /// The same of each namespace, by number.
    pub(crate) of_namespace: [NamespaceCounters; TENANTS],
    pub(crate) settings: LinkSettings,
    /// Heads are encoded here, one at a time.
    pub(crate) scratch: Vec<u8>,
    /// What an answer says of its sections, one answer at a time.
    pub(crate) sections: Vec<Section>,
    pub(crate) now: Moment,
    /// A request was over before its answer, since this was last looked at.
    pub(crate) ended_early: bool,
    /// Watches the links' descriptors.
    pub(crate) watcher: Rc<dyn Watcher>,
    token_base: usize,
    clock: SystemClock,
    keeper: Sender<Event>,
    next_number: u64,
}

impl Desk {
    pub(crate) fn new(
        threads: u32,
        settings: LinkSettings,
        clock: SystemClock,
        keeper: Sender<Event>,
        watcher: Rc<dyn Watcher>,
        token_base: usize,
    ) -> Self {
        Self {
            threads,
            routes: Arc::new(Routes::new(Vec::new(), false, &Arc::default())),
            operations: Slab::new(),
            outgoing: Vec::new(),
            timers: Timers::default(),
            counters: LinkCounters::default(),
            of_namespace: [NamespaceCounters::default(); TENANTS],
            settings,
            scratch: Vec::new(),
            sections: Vec::new(),
            now: clock.now(),
            ended_early: false,
            watcher,
            token_base,
            clock,
            keeper,
            next_number: 1,
        }
    }

    /// Notes the time; everything in one turn happens at one moment.
    pub(crate) fn tick(&mut self) -> Moment {
        self.now = self.clock.now();
        self.now
    }

    /// The token under which a link's descriptors are watched.
    pub(crate) fn token(&self, link: LinkKey) -> Token {
        Token(self.token_base + link.index)
    }

    /// The link that a token is of.
    pub(crate) fn index(&self, token: Token) -> usize {
        token.0 - self.token_base
    }

    /// A number not given before.
    pub(crate) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Leaves an ask, to be answered to `operation`; the number it goes under.
    pub(crate) fn ask(&mut self, to: To, operation: Operation) -> u64 {
        let operation = self.operations.insert(operation) as u64;
        self.outgoing.push(Outgoing { operation, to });
        operation
    }

    /// Leaves an ask for the owner of a block.
    pub(crate) fn ask_owner(&mut self, id: &BlockId, operation: Operation, ask: Ask) -> u64 {
        let to = match self.routes.owner(id) {
            Some(engine) => To::Engine(engine, ask),
            None => To::Nobody(ask),
        };
        self.ask(to, operation)
    }

    /// Whoever asked for a block under this operation has gone: the owner, or the one below, need not
    /// read it. Where routes are new since, that is somebody who was not asked, and knows nothing of it.
    pub(crate) fn forget(&mut self, id: BlockId, operation: u64, link: LinkKey, is_below: bool) {
        let engine = match is_below {
            true => self.routes.lower_owner(&id),
            false => self.routes.owner(&id),
        };
        if let Some(engine) = engine {
            let link = link.serial;
            self.tell(
                engine,
                Ask::Forget(ForgetAsk {
                    id,
                    operation,
                    link,
                }),
            );
        }
    }

    /// The keeper hears of a remove at once: before any engine does.
    pub(crate) fn begin_removal(&self, removed: Removed) -> Removal {
        Removal::begin(&self.keeper, removed)
    }

    /// Leaves an ask that has no answer.
    pub(crate) fn tell(&mut self, engine: EngineKey, ask: Ask) {
        debug_assert!(!ask.wants_answer());
        self.outgoing.push(Outgoing {
            operation: u64::MAX,
            to: To::Engine(engine, ask),
        });
    }

    /// When a request that has so much time left must be over. Far enough is for ever, so that no
    /// client makes the sum wrap.
    pub(crate) fn deadline(&self, left_us: u64) -> Moment {
        self.now.after(Duration::from_micros(left_us))
    }
}
