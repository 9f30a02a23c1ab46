//! The messages about leases (version 2).
//!
//! ```text
//!   Lease ──> LeaseAnswer      a lookup that wants what it finds to stay
//!   Renew ──> RenewAnswer      longer
//!   Release ──> ReleaseAnswer  no more
//! ```

use crate::bounded::Ids;
use crate::message::IDS_MAX;
use kvar_base::{BlockId, LeaseToken, MissReason};
use serde::{Deserialize, Serialize};

/// Are these blocks there, and will they stay? A lookup of leading blocks, of which as many are
/// promised as there are and as the budgets allow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The blocks, in the order of the chain.
    #[serde(with = "Ids::<IDS_MAX>")]
    pub ids: Vec<BlockId>,
    /// Depth in the chain of the first id.
    pub first_depth: u32,
    /// Recency: the prompt this lease belongs to.
    pub touch_request: u64,
    /// Names the lease; drawn at random by the client, so that it can end a lease of which the
    /// answer never came. A lease of this name that stands takes these blocks in.
    pub token: LeaseToken,
    /// Whose it is, for the share of the budgets that one client may hold: a number of the
    /// client's choice, the same for all its links.
    pub client: u64,
    /// How long it is to last, in milliseconds; the node may make it shorter.
    pub ttl_ms: u32,
    /// Time left, in microseconds.
    pub deadline_us: u64,
}

/// The answer to a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseAnswer {
    /// How many leading blocks are there and promised.
    pub leading: u32,
    /// Why the next is not: not there, or (overloaded) not promised. `None`: all are.
    pub reason: Option<MissReason>,
    /// How long the promise lasts from now, in milliseconds; 0: there is no lease.
    pub lasts_ms: u32,
}

/// Let a lease last longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    /// Which.
    pub token: LeaseToken,
    /// How long from now, in milliseconds; the node may make it shorter.
    pub ttl_ms: u32,
    /// Time left, in microseconds.
    pub deadline_us: u64,
}

/// The answer to a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewAnswer {
    /// How long it lasts from now, in milliseconds; 0: there is no such lease (any more).
    pub lasts_ms: u32,
}

/// A lease is not needed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Which.
    pub token: LeaseToken,
    /// Time left, in microseconds.
    pub deadline_us: u64,
}

/// The answer to a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseAnswer {
    /// Whether there was such a lease.
    pub released: bool,
}
