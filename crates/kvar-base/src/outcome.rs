//! How operations end. Outcomes are words, not errors: a miss is a normal answer of a cache.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Why a read found nothing. Each is counted on its own.
///
/// On the wire the order is the number: new reasons go to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MissReason {
    /// Never stored, as far as this store remembers.
    Absent,
    /// Was here and made room for something else while the read was under way.
    Evicted,
    /// Its time to live has passed.
    Expired,
    /// Was removed.
    Removed,
    /// Bytes were there and did not pass their check; the copy is dropped.
    Corrupt,
    /// Another version than the one asked for is here.
    Version,
    /// The shard is still recovering; ask again.
    Loading,
    /// Another node owns it.
    NotOwner,
    /// The node could not be reached, or the link broke before the answer.
    Unreachable,
    /// The deadline passed first.
    Deadline,
    /// The node has no memory or queue left for this read; ask again later.
    Overloaded,
    /// Its sections are not of the number or length the reader expects.
    WrongFormat,
}

impl MissReason {
    /// All reasons, in wire order.
    pub const ALL: [Self; 12] = [
        Self::Absent,
        Self::Evicted,
        Self::Expired,
        Self::Removed,
        Self::Corrupt,
        Self::Version,
        Self::Loading,
        Self::NotOwner,
        Self::Unreachable,
        Self::Deadline,
        Self::Overloaded,
        Self::WrongFormat,
    ];

    /// The word used in metrics, JSON and Python.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Evicted => "evicted",
            Self::Expired => "expired",
            Self::Removed => "removed",
            Self::Corrupt => "corrupt",
            Self::Version => "version",
            Self::Loading => "loading",
            Self::NotOwner => "not_owner",
            Self::Unreachable => "unreachable",
            Self::Deadline => "deadline",
            Self::Overloaded => "overloaded",
            Self::WrongFormat => "wrong_format",
        }
    }
}

impl fmt::Display for MissReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Why a put was turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No memory free at the moment; a put never waits for it. Try again later or let go.
    Busy,
    /// The writer's map is too old; refresh and try once more.
    Stale,
    /// The namespace's share is used up.
    Quota,
    /// Larger than the largest block of this store; split it.
    TooBig,
    /// Zero bytes, too many sections, or bytes that do not match the writer's own content check.
    WrongFormat,
    /// The deadline passed, or the link broke, before the node said it was stored.
    Deadline,
    /// The node could not be reached.
    Unreachable,
}

impl Refusal {
    /// All reasons, in wire order.
    pub const ALL: [Self; 7] = [
        Self::Busy,
        Self::Stale,
        Self::Quota,
        Self::TooBig,
        Self::WrongFormat,
        Self::Deadline,
        Self::Unreachable,
    ];

    /// The word used in metrics, JSON and Python.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Stale => "stale",
            Self::Quota => "quota",
            Self::TooBig => "too_big",
            Self::WrongFormat => "wrong_format",
            Self::Deadline => "deadline",
            Self::Unreachable => "unreachable",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// How a put ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PutOutcome {
    /// Stored and readable (and on the device, if it was a durable put).
    Stored,
    /// A copy is visible already; these bytes were not taken. The first commit wins.
    Exists,
    /// Another writer is at it.
    InProgress,
    /// Turned away.
    Refused(Refusal),
}

impl PutOutcome {
    /// The word used in metrics, JSON and Python.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Exists => "exists",
            Self::InProgress => "in_progress",
            Self::Refused(refusal) => refusal.word(),
        }
    }
}
