//! The vocabulary every other crate speaks: block ids, sizes, checks, outcomes, time.
//!
//! What must always be true:
//! * a type here means the same thing in memory, on the wire and on the device;
//! * nothing here does I/O (a namespace key is read by whoever owns the file) or reads a clock.
//!
//! What is absent: sockets, devices, policy, tokens of a language model.

pub mod check;
mod fast_map;
mod fingerprint;
mod id;
mod mode;
mod outcome;
mod size;
mod time;
pub mod wake;

pub use check::{ContentCheck, Crc64};
pub use fast_map::FastMap;
pub use fingerprint::ContentFingerprint;
pub use id::{BlockId, DeviceUuid, LeaseToken, NamespaceKey, NamespaceKeyError, ids_hashed};
pub use mode::{Mode, ModeCell};
pub use outcome::{MissReason, PutOutcome, Refusal};
pub use size::{ByteSize, ByteSizeError, PAGE_BYTES, page_round_up};
pub use time::{Clock, Moment, SystemClock};

/// Largest block in bytes of payload, whatever the device (16 MiB). A device whose segments are
/// smaller lowers it to a quarter of a segment.
pub const BLOCK_BYTES_MAX: u64 = 16 << 20;

/// Most sections one block may have: twelve pages of section directory.
pub const SECTIONS_MAX: usize = 1008;

/// Version of the cluster map a message was made under. One node: always [`MapEpoch::SINGLE_NODE`].
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct MapEpoch(pub u64);

impl MapEpoch {
    /// The constant epoch of a node that belongs to no cluster.
    pub const SINGLE_NODE: Self = Self(1);
}
