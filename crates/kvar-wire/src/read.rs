//! The messages of a reader.
//!
//! ```text
//!   Lookup ───────────> LookupAnswer     which of these are there, or how many from the first on
//!   Get (n items) ────> n x GetAnswer    in any order, each with its sections behind it, or why not
//!
//!   Get, version 1   items | touch request | deadline
//!        version 5   the same          ... and | by layer | wait for what is announced
//!        version 6   the same          ... and | where each item's bytes go in the staging region
//! ```

use crate::VERSION_WITH_LAYERS;
use crate::bounded::{Bytes, Ids, List};
use crate::message::{IDS_MAX, ITEMS_MAX};
use kvar_base::{BlockId, ContentCheck, MissReason, SECTIONS_MAX};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};
use smallvec::SmallVec;
use std::ops::Range;

/// Are these blocks there?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lookup {
    /// The blocks; for `leading_only` in the order of the chain.
    #[serde(with = "Ids::<IDS_MAX>")]
    pub ids: Vec<BlockId>,
    /// Whether to stop at the first that is not there.
    pub leading_only: bool,
    /// Depth in the chain of the first id.
    pub first_depth: u32,
    /// Recency: the prompt this lookup belongs to.
    pub touch_request: u64,
    /// Time left, in microseconds.
    pub deadline_us: u64,
}

/// The answer to a lookup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LookupAnswer {
    /// How many leading ids are there, and why the next is not (`None`: all are).
    Leading(u32, Option<MissReason>),
    /// One bit an id, in order, lowest bit first; see [`Bitmap`].
    Each(Bitmap),
    /// Not looked up: deadline, overloaded, loading.
    Miss(MissReason),
}

/// One bit an id, lowest bit of the first byte first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bitmap(#[serde(with = "Bytes::<{ IDS_MAX / 8 }>")] Vec<u8>);

impl Bitmap {
    /// A bitmap of these bits.
    #[must_use]
    pub fn of(bits: &[bool]) -> Self {
        let pack = |byte: &[bool]| {
            byte.iter()
                .enumerate()
                .fold(0, |packed, (bit, set)| packed | u8::from(*set) << bit)
        };
        Self(bits.chunks(8).map(pack).collect())
    }

    /// The first `count` bits; bits that did not come are false.
    #[must_use]
    pub fn bits(&self, count: usize) -> Vec<bool> {
        let bit = |n: usize| {
            self.0
                .get(n / 8)
                .is_some_and(|byte| byte >> (n % 8) & 1 == 1)
        };
        (0..count).map(bit).collect()
    }
}

/// Send these blocks.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Get {
    /// The blocks wanted; each is answered by itself. One alone takes no memory of its own.
    #[serde(with = "List::<ITEMS_MAX>")]
    pub items: SmallVec<[GetItem; 1]>,
    /// Recency: the prompt this get belongs to.
    pub touch_request: u64,
    /// Time left, in microseconds.
    pub deadline_us: u64,
    /// What the reader says beyond that. (Version 5.)
    #[serde(skip)]
    pub hints: GetHints,
}

/// What version 5 added to a get, behind all else; left out when it says nothing, so that such a get
/// is the same bytes in every version. To an older node it is never sent
/// ([`GetHints::for_version`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetHints {
    /// The items are some sections of blocks of which the others are asked for next, layer by
    /// layer: read ahead, and count a block once.
    pub by_layer: bool,
    /// A block that a writer has announced is waited for until it is there, its writer gave up, or
    /// the deadline.
    pub wait_announced: bool,
}

impl GetHints {
    /// What a peer of this version understands of them.
    #[must_use]
    pub fn for_version(self, version: u16) -> Self {
        if version >= VERSION_WITH_LAYERS {
            self
        } else {
            Self::default()
        }
    }
}

impl Serialize for Get {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let slots = self.items.iter().any(|item| item.slot.is_some());
        let hints = slots || self.hints != GetHints::default();
        let fields = 3 + usize::from(hints) + usize::from(slots);
        let mut get = serializer.serialize_struct("Get", fields)?;
        get.serialize_field("items", &Items(&self.items))?;
        get.serialize_field("touch_request", &self.touch_request)?;
        get.serialize_field("deadline_us", &self.deadline_us)?;
        if hints {
            get.serialize_field("hints", &self.hints)?;
        }
        if slots {
            let slots = self.items.iter().map(|item| item.slot).collect();
            get.serialize_field("slots", &Slots(slots))?;
        }
        get.end()
    }
}

/// Where each item's bytes go (version 6), behind the hints; left out when all go through the link.
#[derive(Serialize, Deserialize)]
struct Slots(#[serde(with = "List::<ITEMS_MAX>")] Vec<Option<GetSlot>>);

struct Items<'a>(&'a [GetItem]);

impl Serialize for Items<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        List::<ITEMS_MAX>::serialize(self.0, serializer)
    }
}

/// Reads a get, which may go on behind what the first version has.
pub(crate) fn take_get(bytes: &[u8]) -> Result<Get, String> {
    let wrong = |error: postcard::Error| error.to_string();
    let (mut get, rest) = postcard::take_from_bytes::<Get>(bytes).map_err(wrong)?;
    if !rest.is_empty() {
        let (hints, rest) = postcard::take_from_bytes::<GetHints>(rest).map_err(wrong)?;
        if rest.is_empty() && hints == GetHints::default() {
            return Err("hints that say nothing are left out".to_owned());
        }
        get.hints = hints;
        if !rest.is_empty() {
            take_slots(&mut get.items, rest)?;
        }
    }
    Ok(get)
}

fn take_slots(items: &mut [GetItem], bytes: &[u8]) -> Result<(), String> {
    let (Slots(slots), rest) =
        postcard::take_from_bytes(bytes).map_err(|error| error.to_string())?;
    if !rest.is_empty() {
        return Err(format!("{} bytes too many", rest.len()));
    }
    if slots.len() != items.len() {
        let (slots, items) = (slots.len(), items.len());
        return Err(format!("{slots} places for {items} blocks"));
    }
    if slots.iter().all(Option::is_none) {
        return Err("places that say nothing are left out".to_owned());
    }
    for (item, slot) in items.iter_mut().zip(slots) {
        item.slot = slot;
    }
    Ok(())
}

/// One block of a get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetItem {
    /// The block.
    pub id: BlockId,
    /// Which of its sections; `None` is all.
    pub sections: Option<Range<u16>>,
    /// What lengths the reader has room for.
    pub expected: Lengths,
    /// The version wanted; `None` is any.
    pub version: Option<u64>,
    /// Depth in the chain.
    pub depth: u32,
    /// Where in the link's staging region its bytes are written, instead of being sent. (Version 6;
    /// on the wire it stands behind the hints.)
    #[serde(skip)]
    pub slot: Option<GetSlot>,
}

/// A part of a link's staging region, for the bytes of one block. It belongs to the request until
/// that is answered, or fenced: a Pong to a Ping that followed the request's Cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetSlot {
    /// Where it begins.
    pub at: u64,
    /// Its length, which must be that of what is read.
    pub bytes: u32,
}

impl GetSlot {
    /// Where it ends; `None` beyond all numbers.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        self.at.checked_add(u64::from(self.bytes))
    }
}

/// Lengths of sections that a reader expects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lengths {
    /// Takes what comes.
    Any,
    /// So many sections, all of one length.
    Equal(u16, u32),
    /// Each section's own.
    Each(#[serde(with = "List::<SECTIONS_MAX>")] Vec<u32>),
}

impl Lengths {
    /// The shortest way to say these lengths.
    #[must_use]
    pub fn of(lengths: &[u32]) -> Self {
        match lengths {
            [first, rest @ ..] if rest.iter().all(|len| len == first) => {
                u16::try_from(lengths.len())
                    .map_or_else(|_| Self::Each(lengths.to_vec()), |n| Self::Equal(n, *first))
            }
            _ => Self::Each(lengths.to_vec()),
        }
    }

    /// Whether sections of these lengths, in order, are what the reader expects.
    #[must_use]
    pub fn fit(&self, lengths: impl ExactSizeIterator<Item = u32>) -> bool {
        match self {
            Self::Any => true,
            Self::Equal(count, len) => {
                lengths.len() == usize::from(*count) && { lengths }.all(|found| found == *len)
            }
            Self::Each(expected) => lengths.eq(expected.iter().copied()),
        }
    }
}

/// A section as writer and reader agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// Exact length in bytes.
    pub len: u32,
    /// The writer's check of its bytes.
    pub check: ContentCheck,
}

/// One item's answer. For a hit the sections stand in the payload, in order, without padding; for
/// one that was placed there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetAnswer {
    /// Which item of the get.
    pub item: u16,
    /// How it ended.
    pub outcome: GetOutcome,
}

/// How the read of one block ended, as a node says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GetOutcome {
    /// Here it is.
    Hit {
        /// Of which copy.
        version: u64,
        /// Index of the first section that is sent.
        first_section: u16,
        /// The sections that are sent.
        #[serde(with = "List::<SECTIONS_MAX>")]
        sections: Vec<Section>,
    },
    /// Not, and why.
    Miss(MissReason),
    /// Here it is, in the slot that the item named: no payload follows. (Version 6.)
    Placed {
        /// Of which copy.
        version: u64,
        /// Index of the first section that is there.
        first_section: u16,
        /// The sections that are there, in order, without padding.
        #[serde(with = "List::<SECTIONS_MAX>")]
        sections: Vec<Section>,
    },
}
