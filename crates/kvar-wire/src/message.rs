//! The messages. Fields stand in wire order (postcard has no names): new ones go to the end, in a
//! new version of the protocol.
//!
//! ```text
//!   client                        node
//!   Lookup ───────────────────────> LookupAnswer
//!   Get (n items) ────────────────> n x GetAnswer, in any order, each with its sections behind it
//!   Put + payload (eager) ────────> PutAnswer
//!   Put (announced) ──────────────> PutAnswer            (turned away: bytes never travel)
//!                                   Pull -> Payload + payload -> PutAnswer
//!   Remove, Flush, Purge ─────────> …Answer, when flushed
//!   Stat, Status, Ping ───────────> …Answer
//!   Lease, Renew, Release ────────> …Answer             (version 2)
//!   Attach ───────────────────────> AttachAnswer        (version 4; first of all)
//!   Stage ────────────────────────> StageAnswer         (version 6)
//!   Announce ─────────────────────> PutAnswer           (version 5; turned away)
//!                                   Pull -> n x Sections + payload -> Commit -> PutAnswer
//!   <───────────────────────── Switch  (version 5; whenever the operator switches)
//!   Cancel                          (no answer)
//!   Failure                         (either side; the link closes after it)
//! ```
//!
//! Those of a reader are in `read`, those of a put in `put`, those about leases in `lease`, those about shared memory in `attach`,
//! those about modes in `mode`.
//!
//! Deadlines are the time left in microseconds; zero has passed already. `request` in a hint is
//! not the frame's request number: it is a number that grows with time and is shared by the blocks
//! that one prompt touches (0: the node takes its own clock), so that among blocks of one prompt
//! the tail is dropped first.

use crate::attach::{Attach, AttachAnswer, Stage, StageAnswer};
use crate::bounded::{Ids, List, Text};
use crate::lease::{Lease, LeaseAnswer, Release, ReleaseAnswer, Renew, RenewAnswer};
use crate::mode::{Switch, Welcome, take_welcome};
use crate::put::{Announce, Commit, Payload, Pull, Put, PutAnswer, Sections, take_put};
use crate::read::{Get, GetAnswer, Lookup, LookupAnswer, take_get};
use kvar_base::{BlockId, MissReason, SECTIONS_MAX};
use serde::{Deserialize, Serialize};

/// Most ids in one Lookup or Remove.
pub const IDS_MAX: usize = 16_384;

/// Most items in one Get.
pub const ITEMS_MAX: usize = 1_024;

/// Longest name (namespace, client, node, key), in bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// Longest text of a failure, in bytes.
pub const TEXT_BYTES_MAX: usize = 1_024;

/// Longest status document, in bytes: what fits a message.
pub const STATUS_BYTES_MAX: usize = crate::MESSAGE_BYTES_MAX - 16;

/// What every message struct can do.
pub trait Body: Serialize + for<'de> Deserialize<'de> + Into<Message> {
    /// Its number on the wire.
    const KIND: Kind;
}

macro_rules! messages {
    ($($(#[$doc:meta])* $number:literal $name:ident,)*) => {
        /// The number of a message on the wire.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The kind of this number.
            #[must_use]
            pub const fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }

        /// Any message.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Message { $($(#[$doc])* $name($name),)* }

        impl Message {
            /// Its kind.
            #[must_use]
            pub const fn kind(&self) -> Kind {
                match self { $(Self::$name(_) => Kind::$name,)* }
            }

            /// As [`encode`](crate::encode), for a message of any kind.
            ///
            /// # Errors
            /// A message that breaks a bound.
            pub fn encode(
                &self,
                out: &mut Vec<u8>,
                request: u64,
                epoch: kvar_base::MapEpoch,
                payload_len: usize,
            ) -> Result<(), crate::WireError> {
                match self {
                    $(Self::$name(body) => crate::encode(out, request, epoch, body, payload_len),)*
                }
            }

            pub(crate) fn parse(kind: Kind, bytes: &[u8]) -> Result<Self, String> {
                match kind {
                    Kind::Put => return take_put(bytes).map(Self::Put),
                    Kind::Get => return take_get(bytes).map(Self::Get),
                    _ => {}
                }
                if kind == Kind::Welcome {
                    return take_welcome(bytes).map(Self::Welcome);
                }
                match kind { $(Kind::$name => take::<$name>(bytes).map(Self::$name),)* }
            }
        }

        $(
            impl Body for $name { const KIND: Kind = Kind::$name; }
            impl From<$name> for Message {
                fn from(body: $name) -> Self { Self::$name(body) }
            }
        )*
    };
}

messages! {
    /// The client's first word.
    1 Hello,
    /// The node's answer to it.
    2 Challenge,
    /// The client's proof that it holds the key.
    3 Proof,
    /// The link is open.
    4 Welcome,
    /// The link ends, and why.
    5 Failure,
    /// Are these blocks there?
    10 Lookup,
    /// They are, or not.
    11 LookupAnswer,
    /// Send these blocks.
    12 Get,
    /// One of them.
    13 GetAnswer,
    /// Take this block.
    14 Put,
    /// How that ended.
    15 PutAnswer,
    /// Send the bytes of the block you announced.
    16 Pull,
    /// These are they.
    17 Payload,
    /// Remove these blocks.
    18 Remove,
    /// Removed and flushed.
    19 RemoveAnswer,
    /// Make all that was acknowledged safe against power loss.
    20 Flush,
    /// It is.
    21 FlushAnswer,
    /// Drop every block of the namespace.
    22 Purge,
    /// Dropped and flushed.
    23 PurgeAnswer,
    /// What do you know of this block?
    24 Stat,
    /// This.
    25 StatAnswer,
    /// How are you?
    26 Status,
    /// So.
    27 StatusAnswer,
    /// The request is no longer wanted.
    28 Cancel,
    /// Are you there?
    29 Ping,
    /// Yes.
    30 Pong,
    /// Are these blocks there, and will they stay? (Version 2, as are those that follow.)
    31 Lease,
    /// So many are, and so long.
    32 LeaseAnswer,
    /// Let the lease last longer.
    33 Renew,
    /// It does, or it has ended.
    34 RenewAnswer,
    /// The lease is not needed any more.
    35 Release,
    /// It has ended.
    36 ReleaseAnswer,
    /// Shall we share memory? (Version 4, as is its answer.)
    37 Attach,
    /// Yes, or why not.
    38 AttachAnswer,
    /// A block is coming, section by section. (Version 5, as are those that follow.)
    39 Announce,
    /// The next of its sections.
    40 Sections,
    /// That was all of it.
    41 Commit,
    /// Shall we share a place for what I read? (Version 6, as is its answer.)
    42 Stage,
    /// Yes, or why not.
    43 StageAnswer,
    /// The mode of your namespace is this from now on. (Version 5.)
    45 Switch,
}

impl Kind {
    /// The number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Whether a payload may stand behind it.
    #[must_use]
    pub const fn carries_payload(self) -> bool {
        matches!(
            self,
            Self::GetAnswer | Self::Put | Self::Payload | Self::Sections
        )
    }
}

fn take<B: Body>(bytes: &[u8]) -> Result<B, String> {
    let (body, rest) = postcard::take_from_bytes::<B>(bytes).map_err(|error| error.to_string())?;
    // A newer client may append to its Hello; the version it then agrees to says what follows.
    if !rest.is_empty() && B::KIND != Kind::Hello {
        return Err(format!("{} bytes too many", rest.len()));
    }
    Ok(body)
}

/// Versions of the protocol that a side speaks, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRange {
    /// The oldest.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
}

impl VersionRange {
    /// The newest version that both speak.
    #[must_use]
    pub fn agree(self, other: Self) -> Option<u16> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest.max(other.oldest)).then_some(newest)
    }
}

impl std::fmt::Display for VersionRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.oldest == self.newest {
            write!(f, "{}", self.newest)
        } else {
            write!(f, "{} to {}", self.oldest, self.newest)
        }
    }
}

/// The client's first word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Versions it speaks.
    pub versions: VersionRange,
    /// The namespace it wants.
    #[serde(with = "Text::<NAME_BYTES_MAX>")]
    pub namespace: String,
    /// Its half of what is to be proved; never the same twice.
    pub nonce: [u8; 32],
    /// Its name and version, for logs.
    #[serde(with = "Text::<NAME_BYTES_MAX>")]
    pub client: String,
}

/// The node's answer to Hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// The version that both will speak.
    pub version: u16,
    /// The node's half of what is to be proved.
    pub nonce: [u8; 32],
    /// Short name of the namespace's key.
    #[serde(with = "Text::<NAME_BYTES_MAX>")]
    pub key_name: String,
}

/// Proof that the client holds the namespace's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Keyed hash of versions, both nonces and the namespace.
    pub proof: [u8; 32],
    /// Short name of the client's key, so that a refusal can name both.
    #[serde(with = "Text::<NAME_BYTES_MAX>")]
    pub key_name: String,
}

/// What a client must keep to on one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Largest block, in bytes of payload.
    pub block_bytes_max: u32,
    /// Largest block that may travel inside its Put.
    pub eager_bytes_max: u32,
    /// Most requests open at a time; each item of a Get counts as one.
    pub requests_max: u32,
    /// Most payload bytes asked for or announced at a time.
    pub bytes_max: u64,
}

/// Why a link ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureCode {
    /// No version in common.
    Version,
    /// No such namespace here.
    Namespace,
    /// Not the key of that namespace.
    Key,
    /// The peer broke the protocol.
    Protocol,
    /// Too many links; try later or elsewhere.
    Busy,
    /// The node is on its way down; connect again later.
    ShuttingDown,
}

/// The link ends after this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of end.
    pub code: FailureCode,
    /// What happened and what to do.
    #[serde(with = "Text::<TEXT_BYTES_MAX>")]
    pub text: String,
}

impl Failure {
    /// A failure whose text is cut to what fits.
    #[must_use]
    pub fn new(code: FailureCode, text: &str) -> Self {
        let mut end = text.len().min(TEXT_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self {
            code,
            text: text[..end].to_owned(),
        }
    }
}

/// Remove these blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remove {
    /// The blocks.
    #[serde(with = "Ids::<IDS_MAX>")]
    pub ids: Vec<BlockId>,
    /// Time left, in microseconds.
    pub deadline_us: u64,
}

/// How a remove, flush or purge ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Finished {
    /// Done and flushed; so many blocks were concerned (0 for a flush).
    Done(u64),
    /// The deadline passed first; it may still come to pass.
    Deadline,
    /// Too much under way; not begun. Try again later.
    Overloaded,
    /// The device failed; what to do.
    Failed(#[serde(with = "Text::<TEXT_BYTES_MAX>")] String),
}

/// How a remove ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveAnswer {
    /// The outcome; counts blocks that were there.
    pub finished: Finished,
}

/// Make all that was acknowledged safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flush {
    /// Time left, in microseconds.
    pub deadline_us: u64,
}

/// How a flush ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlushAnswer {
    /// The outcome.
    pub finished: Finished,
}

/// Drop every block of the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purge {
    /// Time left, in microseconds.
    pub deadline_us: u64,
}

/// How a purge ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeAnswer {
    /// The outcome; counts blocks dropped.
    pub finished: Finished,
}

/// What do you know of this block?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// The block.
    pub id: BlockId,
    /// Time left, in microseconds.
    pub deadline_us: u64,
}

/// What the node knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatAnswer {
    /// The block, or why there is none.
    pub stat: Result<BlockStat, MissReason>,
}

/// What is known of a visible block without reading it from its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStat {
    /// Bytes of payload.
    pub bytes: u64,
    /// Lengths of its sections; `None` where only the device knows.
    pub sections: Option<SectionLengths>,
    /// Which copy; `None` where only the device knows.
    pub version: Option<u64>,
    /// Readable from memory.
    pub in_dram: bool,
    /// Written to the device.
    pub on_flash: bool,
    /// Safe against power loss.
    pub flushed: bool,
    /// Seconds since it was last touched; `None` where it is not known.
    pub age_s: Option<u64>,
    /// When it expires, in seconds since 1970.
    pub expires_unix_s: Option<u64>,
}

/// Lengths of a block's sections, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionLengths(#[serde(with = "List::<SECTIONS_MAX>")] pub Vec<u32>);

/// How are you?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {}

/// The node's status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusAnswer {
    /// A JSON document.
    #[serde(with = "Text::<STATUS_BYTES_MAX>")]
    pub json: String,
}

/// The request with this frame's number is no longer wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancel {}

/// Are you there?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {}

/// Yes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {}
