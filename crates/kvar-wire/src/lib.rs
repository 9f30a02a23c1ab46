//! The protocol between clients and nodes, as code: `docs/internals/wire.md` is its page.
//!
//! ```text
//!   struct ── encode ──> header (40 B) + message ──> a link moves it, the payload behind it
//!                                                     │
//!   Message <── decode ── header + message <──────────┘
//!
//!   ClientHandshake  <── Hello, Challenge, Proof, Welcome | Failure ──>  NodeHandshake
//! ```
//!
//! What must always be true:
//! * bytes from outside never panic, and never make us reserve more than the bounds named here;
//! * a frame of an older version is read the same way for ever (`golden/wire`);
//! * payload bytes are never looked at: their `content_check` travels in the message.
//!
//! What is absent: sockets, clocks, randomness (nonces are given by the caller), and what a
//! message makes a node do.
#![forbid(unsafe_code)]

mod attach;
mod bounded;
mod frame;
mod handshake;
mod lease;
mod message;
mod mode;
mod put;
mod read;

pub use attach::{Attach, AttachAnswer, AttachDeclined, Stage, StageAnswer};
pub use frame::{HEADER_BYTES, Header, MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX, WireError};
pub use frame::{decode, encode, frame_lengths};
pub use handshake::{ClientHandshake, ClientStep, HandshakeError, NodeHandshake, NodeStep, Peer};
pub use lease::{Lease, LeaseAnswer, Release, ReleaseAnswer, Renew, RenewAnswer};
pub use message::*;
pub use mode::{Switch, Welcome};
pub use put::{Announce, Commit, MoreHints, Payload, Pull, Put, PutAnswer, PutHints, Sections};
pub use read::{
    Bitmap, Get, GetAnswer, GetHints, GetItem, GetOutcome, GetSlot, Lengths, Lookup, LookupAnswer,
    Section,
};

/// Versions of the protocol that this build speaks. Version 2 added leases (kinds 31 to 36),
/// version 3 the hints of a put that stand behind its deadline, version 4 shared memory (kinds 37
/// and 38), version 5 modes (kind 45, and the tail of Welcome) and what goes layer by layer: the hints of
/// a get, and kinds 39 to 41, version 6 staging regions: kinds 42 and 43, the places of a get behind its
/// hints, and the outcome Placed of its answer.
pub const VERSIONS: VersionRange = VersionRange {
    oldest: 1,
    newest: 6,
};

/// The version from which on leases are understood; to an older peer they are not sent.
pub const VERSION_WITH_LEASES: u16 = 2;

/// The version from which on a put has all hints; an older peer gets those it knows.
pub const VERSION_WITH_HINTS: u16 = 3;

/// The version from which on a client on the node's host may ask to share memory.
pub const VERSION_WITH_SHARED_MEMORY: u16 = 4;

/// The version from which on a get has hints and a put may come section by section.
pub const VERSION_WITH_LAYERS: u16 = 5;

/// The version from which on a client is told the mode of its namespace.
pub const VERSION_WITH_MODES: u16 = 5;

/// The version from which on a client may ask for a staging region, and read into it.
pub const VERSION_WITH_STAGING: u16 = 6;

/// The request number of frames that belong to no request: handshake, failures, pings.
pub const LINK_REQUEST: u64 = 0;

/// Longest message that is read before Welcome. A Hello is under 400 bytes; a stranger gets no
/// more of our memory than this.
pub const HANDSHAKE_MESSAGE_BYTES_MAX: usize = 2048;

/// A peer that takes longer than this for its part of the handshake is dropped, in seconds.
pub const HANDSHAKE_SECONDS_MAX: u64 = 5;

/// The largest block that travels inside its Put, by default: below it a round trip costs more
/// than the bytes of a put that is turned away.
pub const EAGER_BYTES_MAX: u32 = 64 << 10;
