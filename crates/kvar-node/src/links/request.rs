//! The requests a link has open.
//!
//! ```text
//!   Lookup   asked of every engine concerned ............ answered when all have
//!            with two tiers: of the fast ones, then of the big ones for what those lack
//!   Lease    the same; AboutLease: a renewal or release, asked of all engines
//!   Get      each item: (waiting for a put ->) waiting for budget -> asked (-> asked below) -> answered
//!   Put      Beginning -> (Pulling, announced) -> Receiving -> Committing -> answered
//!            section by section: Pulling -> Receiving -> Pulling ... until Commit
//!   Finish   remove, flush, purge: asked of engines ..... answered when all have
//!            with two tiers: a remove or purge of the fast ones, then of the big ones
//!   Stat, Status
//! ```
//!
//! A request ends once: by its answer, its deadline, a cancel, or with its link.

use super::desk::To;
use crate::devices::{Removal, Routes};
use crate::mail::Ticket;
use crate::report::ThreadReport;
use kvar_base::{BlockId, LeaseToken, MissReason, Moment};
use kvar_wire::{GetHints, GetItem};
use smallvec::SmallVec;
use std::sync::Arc;
use std::time::Duration;

/// One open request.
pub(crate) struct Open {
    /// Which opening of its number.
    pub(crate) opening: u64,
    pub(crate) deadline: Moment,
    pub(crate) kind: Kind,
}

/// What it is, and how far.
pub(crate) enum Kind {
    Lookup(Lookup),
    Lease(Lease),
    AboutLease {
        about: AboutLease,
        left: u32,
        until: Option<Moment>,
    },
    Get(Get),
    Put(Put),
    Finish(Finish),
    Stat(Stat),
    Status {
        left: u32,
        reports: Vec<ThreadReport>,
    },
}

/// A lookup that is being gathered.
pub(crate) struct Lookup {
    pub(crate) leading_only: bool,
    pub(crate) left: u32,
    pub(crate) present: Vec<bool>,
    /// For each engine where its ids stand in the request; empty when one has them all.
    pub(crate) positions: Vec<Vec<u32>>,
    pub(crate) touch_request: u64,
    /// Depth in the chain of the first id.
    pub(crate) first_depth: u32,
    /// What is still to be asked of the tier below; none with one tier, or when it was.
    pub(crate) below: Option<Below>,
}

/// What a second round needs.
pub(crate) struct Below {
    pub(crate) ids: Vec<BlockId>,
    /// Whom the first round was asked of, and the second will be.
    pub(crate) routes: Arc<Routes>,
}

/// A question about one block.
pub(crate) struct Stat {
    pub(crate) id: BlockId,
    /// What the tier above said, once the one below is asked.
    pub(crate) above: Option<MissReason>,
}

/// A lease that is being gathered.
pub(crate) struct Lease {
    pub(crate) token: LeaseToken,
    /// The chain, for what is to be given back; empty when one engine has it all, which stops at
    /// the first gap by itself.
    pub(crate) ids: Vec<BlockId>,
    /// Whom it was asked of.
    pub(crate) routes: Arc<Routes>,
    pub(crate) left: u32,
    /// Who promised each block: the engine's place in the routes.
    pub(crate) granted: Vec<Option<u32>>,
    /// How the tier below is asked, as long as it was not.
    pub(crate) below: Option<LeaseBelow>,
    /// The first block that is not promised, and why.
    pub(crate) refused: Option<(usize, MissReason)>,
    /// Until when all engines promise what they do.
    pub(crate) until: Option<Moment>,
    /// As in [`Lookup`].
    pub(crate) positions: Vec<Vec<u32>>,
}

/// What a second round of a lease needs.
pub(crate) struct LeaseBelow {
    pub(crate) client: u64,
    pub(crate) ttl: Duration,
    pub(crate) touch_request: u64,
    pub(crate) first_depth: u32,
}

/// A call about a lease that stands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AboutLease {
    Renew { token: LeaseToken, ttl_ms: u32 },
    Release { token: LeaseToken },
}

/// A get, item by item.
pub(crate) struct Get {
    /// Most gets are of one block, and take no memory of their own for it.
    pub(crate) items: SmallVec<[Item; 1]>,
    pub(crate) left: u32,
    pub(crate) touch_request: u64,
    pub(crate) hints: GetHints,
}

/// One block of a get.
pub(crate) struct Item {
    pub(crate) wanted: GetItem,
    pub(crate) state: ItemState,
}

/// An item that an owner reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Of the link's budget, set aside for it.
    pub(crate) bytes: u64,
    pub(crate) operation: u64,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ItemState {
    /// For the end of a put, under this operation; of the budget nothing is set aside yet.
    Awaiting(u64),
    /// For room in the link's budget.
    Waiting,
    /// Its owner reads it, under this operation.
    Asked(Reading),
    /// The first owner did not have it, for this reason, and the one below reads it.
    AskedBelow(Reading, MissReason),
    Answered,
}

/// A put.
pub(crate) struct Put {
    pub(crate) payload_bytes: u64,
    pub(crate) state: PutState,
    /// Of one that comes section by section the next to come.
    pub(crate) next_section: Option<u16>,
}

/// How far it is.
pub(crate) enum PutState {
    /// The owner has not said yet whether it takes the block. `eager`: the payload stands at the
    /// door already.
    Beginning { eager: bool },
    /// The client was told to send.
    Pulling(Ticket),
    /// Payload comes in; the link has the ticket under this token.
    Receiving(u64),
    /// The owner verifies it (and flushes it, if durable).
    Committing,
}

/// A remove, flush or purge.
pub(crate) struct Finish {
    pub(crate) which: Which,
    pub(crate) left: u32,
    /// What is asked when all of the first round have answered.
    pub(crate) then: Vec<To>,
    pub(crate) count: u64,
    pub(crate) failure: Option<String>,
    /// Whom it was asked of.
    pub(crate) routes: Arc<Routes>,
    /// Where the keeper must know of it: it is over when this goes.
    pub(crate) removal: Option<Removal>,
}

/// Which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Remove,
    Flush,
    Purge,
}

impl Open {
    /// How much of the link's requests it counts as.
    pub(crate) fn weight(&self) -> u32 {
        match &self.kind {
            Kind::Get(get) => get.left,
            _ => 1,
        }
    }
}
