//! The messages that bring a block to a node.
//!
//! ```text
//!   version 1   id | sections | depth request ttl ephemeral | durable | deadline
//!   version 3   the same                                    ... and | traffic class | recompute us | handover
//! ```
//!
//! What version 3 added stands behind all else and is left out when it says nothing, so that such a
//! put is the same bytes in every version. To an older node it is never sent
//! ([`PutHints::for_version`]).

use crate::VERSION_WITH_HINTS;
use crate::bounded::List;
use crate::read::Section;
use kvar_base::{BlockId, ContentCheck, PutOutcome, SECTIONS_MAX};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

/// Take this block. With a payload it is eager, without one announced.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Put {
    /// Its id.
    pub id: BlockId,
    /// Its sections, in order.
    #[serde(with = "List::<SECTIONS_MAX>")]
    pub sections: Vec<Section>,
    /// What the writer knows about its use.
    pub hints: PutHints,
    /// Whether the answer waits until it is flushed.
    pub durable: bool,
    /// Time left, in microseconds.
    pub deadline_us: u64,
}

impl Put {
    /// Bytes of payload; more than `u32` can hold when the sections are nonsense.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        self.sections
            .iter()
            .map(|section| u64::from(section.len))
            .sum()
    }
}

/// What a writer knows about a block's use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PutHints {
    /// Depth in its chain.
    pub depth: u32,
    /// The prompt it belongs to.
    pub request: u64,
    /// Time to live in seconds; `None` is without end.
    pub ttl_s: Option<u32>,
    /// Not worth a write to flash.
    pub ephemeral: bool,
    /// The writer's own number for what kind of traffic it is; 0: not said. (Version 3, as are
    /// those that follow.)
    #[serde(skip)]
    pub traffic_class: u8,
    /// What computing it again costs, in microseconds; 0: not known.
    #[serde(skip)]
    pub recompute_us: u32,
    /// Written by one engine to be read once, soon, by another.
    #[serde(skip)]
    pub handover: bool,
}

impl PutHints {
    /// What a peer of this version understands of them.
    #[must_use]
    pub fn for_version(self, version: u16) -> Self {
        if version >= VERSION_WITH_HINTS {
            return self;
        }
        let (traffic_class, recompute_us, handover) = Tail::default();
        Self {
            traffic_class,
            recompute_us,
            handover,
            ..self
        }
    }

    const fn tail(&self) -> Tail {
        (self.traffic_class, self.recompute_us, self.handover)
    }
}

/// Traffic class, recompute cost and handover: what version 3 added, behind everything else.
type Tail = (u8, u32, bool);

impl Serialize for Put {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let tail = Some(self.hints.tail()).filter(|tail| *tail != Tail::default());
        let fields = 5 + usize::from(tail.is_some());
        let mut put = serializer.serialize_struct("Put", fields)?;
        put.serialize_field("id", &self.id)?;
        put.serialize_field("sections", &Listed(&self.sections))?;
        put.serialize_field("hints", &self.hints)?;
        put.serialize_field("durable", &self.durable)?;
        put.serialize_field("deadline_us", &self.deadline_us)?;
        if let Some(tail) = tail {
            put.serialize_field("tail", &tail)?;
        }
        put.end()
    }
}

struct Listed<'a>(&'a [Section]);

impl Serialize for Listed<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        List::<SECTIONS_MAX>::serialize(self.0, serializer)
    }
}

/// Reads a put, which may go on behind what the first version has.
pub(crate) fn take_put(bytes: &[u8]) -> Result<Put, String> {
    let wrong = |error: postcard::Error| error.to_string();
    let (mut put, rest) = postcard::take_from_bytes::<Put>(bytes).map_err(wrong)?;
    if !rest.is_empty() {
        let (tail, rest) = postcard::take_from_bytes::<Tail>(rest).map_err(wrong)?;
        if !rest.is_empty() {
            return Err(format!("{} bytes too many", rest.len()));
        }
        let hints = &mut put.hints;
        (hints.traffic_class, hints.recompute_us, hints.handover) = tail;
    }
    Ok(put)
}

/// How a put ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PutAnswer {
    /// The outcome.
    pub outcome: PutOutcome,
}

/// Send the bytes of the put with this request number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pull {}

/// The bytes of an announced put; its request number says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {}

/// A block is coming whose sections are still being computed: how long each will be. (Version 5.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announce {
    /// Its id.
    pub id: BlockId,
    /// Exact lengths of its sections, in order.
    #[serde(with = "List::<SECTIONS_MAX>")]
    pub lengths: Vec<u32>,
    /// What the writer knows about its use.
    pub hints: PutHints,
    /// What version 3 added to the hints, which stands apart for its sake.
    pub more_hints: MoreHints,
    /// Whether the answer waits until it is flushed.
    pub durable: bool,
    /// Time left until it must be whole, in microseconds.
    pub deadline_us: u64,
}

impl Announce {
    /// Bytes of payload; more than `u32` can hold when the lengths are nonsense.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        self.lengths.iter().map(|len| u64::from(*len)).sum()
    }

    /// All that the writer said.
    #[must_use]
    pub fn all_hints(&self) -> PutHints {
        let MoreHints {
            traffic_class,
            recompute_us,
            handover,
        } = self.more_hints;
        PutHints {
            traffic_class,
            recompute_us,
            handover,
            ..self.hints
        }
    }
}

/// The hints that a put has behind its deadline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoreHints {
    /// As in [`PutHints`].
    pub traffic_class: u8,
    /// As in [`PutHints`].
    pub recompute_us: u32,
    /// As in [`PutHints`].
    pub handover: bool,
}

/// The next sections of a block that was announced, their bytes behind it. (Version 5.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sections {
    /// Index of the first: the one behind the last that was sent.
    pub first: u16,
    /// The writer's check of each.
    #[serde(with = "List::<SECTIONS_MAX>")]
    pub checks: Vec<ContentCheck>,
}

/// All sections were sent: make the block visible. (Version 5.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {}
