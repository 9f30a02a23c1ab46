//! What is asked for and what comes back, in the caller's terms.

use crate::check::SectionChecks;
use crate::config::ClientError;
use crate::layer_put::{LayerPutItem, LayerPutRequest};
use crate::layers::LayerRequest;
use crate::staging::Staging;
use kvar_base::{BlockId, LeaseToken, MissReason, PutOutcome, SECTIONS_MAX};
use kvar_transport::{Sink, Source};
use kvar_wire::{BlockStat, Lengths, PutHints, Section};
use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Memory that a block is read into, in any number of pieces: any [`Sink`] that may move to the
/// client's thread. The client owns it until the call has ended.
pub trait Destination: Sink + Send + 'static {}
impl<T: Sink + Send + 'static> Destination for T {}

/// Memory that a block is written from, in any number of pieces. Bytes must not change until the
/// call has ended.
pub trait PutSource: Source + Send + 'static {}
impl<T: Source + Send + 'static> PutSource for T {}

/// A block to read.
#[derive(Debug)]
pub struct GetItem {
    /// Its id.
    pub id: BlockId,
    /// Which sections; `None` is all.
    pub sections: Option<Range<u16>>,
    /// Lengths that the sections read must have; others are a miss (`wrong_format`).
    pub expected: Lengths,
    /// The version it must have; `None` is any.
    pub version: Option<u64>,
    /// Its depth in its chain, for recency.
    pub depth: u32,
    /// Where its bytes go. `Bytes` is made as large as needed when the node has said how large
    /// that is; a place must have exactly the length of what is read.
    pub into: Filled,
}

impl GetItem {
    /// A whole block into memory that the client makes.
    #[must_use]
    pub fn to_vec(id: BlockId) -> Self {
        let (expected, into) = (Lengths::Any, Filled::Bytes(Vec::new()));
        Self {
            id,
            sections: None,
            expected,
            version: None,
            depth: 0,
            into,
        }
    }

    /// A whole block of sections of these lengths into staging memory of exactly as many bytes.
    #[must_use]
    pub fn to_staging(id: BlockId, lengths: &[u32], staging: Staging) -> Self {
        Self {
            expected: Lengths::of(lengths),
            into: Filled::Staged(staging),
            ..Self::to_vec(id)
        }
    }

    /// A whole block of sections of these lengths into memory of the caller.
    #[must_use]
    pub fn to_place(id: BlockId, lengths: &[u32], place: impl Destination) -> Self {
        let (expected, into) = (Lengths::of(lengths), Filled::Place(Box::new(place)));
        Self {
            id,
            sections: None,
            expected,
            version: None,
            depth: 0,
            into,
        }
    }
}

/// Where bytes went.
pub enum Filled {
    /// Into memory that the client made.
    Bytes(Vec<u8>),
    /// Into memory of the caller.
    Place(Box<dyn Destination>),
    /// Into several, one behind the other.
    Pieces(Vec<Filled>),
    /// Into memory that the node can write to itself ([`Client::staging`](crate::Client::staging)).
    Staged(Staging),
    /// Into memory of that kind, which the node may still be writing: the call has ended, and the client
    /// holds the memory until the node is known to be done. It does not come back.
    Held,
}

impl Filled {
    /// An empty destination, in the place of one that a link owns for the moment.
    pub(crate) const NOWHERE: Self = Self::Bytes(Vec::new());
}

impl fmt::Debug for Filled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
            Self::Place(place) => write!(f, "Place({})", Sink::len(place)),
            Self::Pieces(pieces) => f.debug_list().entries(pieces).finish(),
            Self::Staged(staging) => fmt::Debug::fmt(staging, f),
            Self::Held => f.write_str("Held"),
        }
    }
}

impl Sink for Filled {
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(&'a mut [u8])) {
        match self {
            Self::Bytes(bytes) => bytes.visit_mut(visit),
            Self::Place(place) => place.visit_mut(visit),
            Self::Pieces(pieces) => pieces.iter_mut().for_each(|piece| piece.visit_mut(visit)),
            Self::Staged(staging) => staging.visit_mut(visit),
            Self::Held => {}
        }
    }
    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Place(place) => Sink::len(place),
            Self::Pieces(pieces) => pieces.iter().map(Sink::len).sum(),
            Self::Staged(staging) => Sink::len(staging),
            Self::Held => 0,
        }
    }
}

/// How the read of one block ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GetOutcome {
    /// The bytes are there and passed the writer's check.
    Hit {
        /// Which copy.
        version: u64,
        /// Index of the first section read.
        first_section: u16,
        /// Lengths of the sections read.
        lengths: Vec<u32>,
    },
    /// Not, and why. The destination's bytes mean nothing.
    Miss(MissReason),
}

/// A read block and the memory it went to.
#[derive(Debug)]
pub struct GetResult {
    /// Its id.
    pub id: BlockId,
    /// How it ended.
    pub outcome: GetOutcome,
    /// The destination, the caller's again.
    pub into: Filled,
}

impl GetResult {
    /// Whether it is a hit.
    #[must_use]
    pub fn is_hit(&self) -> bool {
        matches!(self.outcome, GetOutcome::Hit { .. })
    }

    /// The bytes of a hit that went into memory which the client made, staging memory included.
    #[must_use]
    pub fn bytes(&self) -> Option<&[u8]> {
        match (&self.outcome, &self.into) {
            (GetOutcome::Hit { .. }, Filled::Bytes(bytes)) => Some(bytes),
            (GetOutcome::Hit { .. }, Filled::Staged(staging)) => Some(staging),
            _ => None,
        }
    }
}

/// A block to write.
pub struct PutItem {
    /// Its id.
    pub id: BlockId,
    /// Lengths of its sections, in order.
    pub lengths: Vec<u32>,
    /// Its bytes.
    pub source: Box<dyn PutSource>,
    /// What the writer knows about its use.
    pub hints: PutHints,
    /// Whether the call waits until it is safe against power loss.
    pub durable: bool,
}

impl PutItem {
    /// A block of one section.
    #[must_use]
    pub fn of_bytes(id: BlockId, bytes: Vec<u8>) -> Self {
        Self::of_pieces(id, bytes)
    }

    /// A block with one section a piece of `source`.
    #[must_use]
    pub fn of_pieces(id: BlockId, source: impl PutSource) -> Self {
        let mut lengths = Vec::new();
        source.visit(&mut |piece| lengths.push(u32::try_from(piece.len()).unwrap_or(u32::MAX)));
        Self {
            id,
            lengths,
            source: Box::new(source),
            hints: PutHints::default(),
            durable: false,
        }
    }

    /// Makes the content checks, which reads every byte once (about 0.1 us a KiB): done on the
    /// thread that submits, so that the client's own thread only moves bytes.
    #[must_use]
    pub fn prepare(self) -> PreparedPut {
        let Self {
            id,
            lengths,
            source,
            hints,
            durable,
        } = self;
        let bytes: u64 = lengths.iter().map(|len| u64::from(*len)).sum();
        let sound = (1..=SECTIONS_MAX).contains(&lengths.len())
            && !lengths.contains(&0)
            && bytes == source.len() as u64;
        let mut sections = Vec::new();
        if sound {
            let mut checks = SectionChecks::new(&id, 0, &lengths);
            source.visit(&mut |piece| checks.feed(piece));
            let checks = checks.finish();
            sections = lengths
                .iter()
                .zip(checks)
                .map(|(len, check)| Section { len: *len, check })
                .collect();
        }
        PreparedPut {
            id,
            sections,
            bytes,
            source: Some(source),
            hints,
            durable,
            sound,
        }
    }
}

impl PutItem {
    /// For a put that will not be sent.
    pub(crate) fn prepare_unread(self) -> PreparedPut {
        let Self {
            id,
            lengths,
            source,
            hints,
            durable,
        } = self;
        let bytes = lengths.iter().map(|len| u64::from(*len)).sum();
        let sections = Vec::new();
        PreparedPut {
            id,
            sections,
            bytes,
            source: Some(source),
            hints,
            durable,
            sound: true,
        }
    }
}

impl fmt::Debug for PutItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PutItem({} in {} sections)", self.id, self.lengths.len())
    }
}

/// A block to write, with its content checks.
pub struct PreparedPut {
    pub(crate) id: BlockId,
    pub(crate) sections: Vec<Section>,
    pub(crate) bytes: u64,
    pub(crate) source: Option<Box<dyn PutSource>>,
    pub(crate) hints: PutHints,
    pub(crate) durable: bool,
    /// Has sections, none of them empty, that add up to the source.
    pub(crate) sound: bool,
}

impl PreparedPut {
    /// What is known of a block before its bytes.
    pub(crate) fn without_bytes(item: &LayerPutItem) -> Self {
        Self {
            id: item.id,
            sections: Vec::new(),
            bytes: item.bytes(),
            source: None,
            hints: item.hints,
            durable: item.durable,
            sound: item.is_sound(),
        }
    }
}

impl fmt::Debug for PreparedPut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PreparedPut({} of {} bytes)", self.id, self.bytes)
    }
}

/// What can be asked of a session.
#[derive(Debug)]
pub enum Request {
    /// How many leading blocks of a chain are there.
    Lookup {
        /// The chain.
        ids: Vec<BlockId>,
        /// Depth of its first block.
        first_depth: u32,
        /// Recency; 0 for the node's clock.
        touch_request: u64,
    },
    /// How many leading blocks of a chain are there, and that they stay.
    Lease {
        /// The chain.
        ids: Vec<BlockId>,
        /// Depth of its first block.
        first_depth: u32,
        /// Recency; 0 for the node's clock.
        touch_request: u64,
        /// Names the lease; random.
        token: LeaseToken,
        /// For the share of one client.
        client: u64,
        /// How long.
        ttl: Duration,
    },
    /// Let a lease last longer.
    Renew {
        /// Which.
        token: LeaseToken,
        /// How long from now.
        ttl: Duration,
    },
    /// End a lease.
    Release {
        /// Which.
        token: LeaseToken,
    },
    /// Which of these blocks are there.
    Present {
        /// The blocks.
        ids: Vec<BlockId>,
    },
    /// Read blocks.
    Get {
        /// The blocks.
        items: Vec<GetItem>,
        /// Recency; 0 for the node's clock.
        touch_request: u64,
        /// A block that a writer has announced is waited for until it is there, its writer gave
        /// up, or the deadline. (An older node says at once that it is absent.)
        waits: bool,
    },
    /// Read blocks layer by layer; a handle says what has come.
    GetLayers(LayerRequest),
    /// Write blocks.
    Put {
        /// The blocks.
        items: Vec<PreparedPut>,
    },
    /// Write blocks layer by layer.
    PutLayers(LayerPutRequest),
    /// Remove blocks for good.
    Remove {
        /// The blocks.
        ids: Vec<BlockId>,
    },
    /// Make all that was acknowledged safe against power loss.
    Flush,
    /// Drop every block of the namespace.
    Purge,
    /// What the node knows of a block.
    Stat {
        /// The block.
        id: BlockId,
    },
    /// The node's status.
    Status,
}

/// How many leading blocks of a chain are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// So many.
    pub leading: usize,
    /// Why the next is not; `None` when all are.
    pub reason: Option<MissReason>,
}

/// How many leading blocks of a chain are there and promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leased {
    /// So many.
    pub leading: usize,
    /// Why the next is not: it is not there, or (overloaded) was not promised.
    pub reason: Option<MissReason>,
    /// The promise; `None`: there is none. (A node that knows no leases says what is there and
    /// promises nothing.)
    pub lease: Option<Lease>,
}

/// A promise: these blocks stay readable for so long, unless they are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Names it, towards the node, from any client of the namespace.
    pub token: LeaseToken,
    /// Until when. The node counts from the question's arrival and this side from its leaving, so
    /// the promise lasts at least as long as this says, however slow the answer was.
    pub until: Instant,
}

impl Lease {
    /// How long it lasts from now on; zero when it is over.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

/// What came back; the kind is the request's.
#[derive(Debug)]
pub enum Answer {
    /// To a lookup.
    Lookup(Lookup),
    /// To a lease.
    Leased(Leased),
    /// To a renewal: until when it lasts now, or `None` when it has ended.
    Renewed(Result<Option<Instant>, ClientError>),
    /// To a release: whether there was such a lease.
    Released(Result<bool, ClientError>),
    /// To a presence question, a word each; blocks that could not be asked for are not there.
    Present(Vec<bool>),
    /// To a get, in the order of its items.
    Get(Vec<GetResult>),
    /// To a get by layers: its handle has what came.
    Layers,
    /// To a put, in the order of its items.
    Put(Vec<PutOutcome>),
    /// To a remove, flush or purge: how many blocks were concerned.
    Finished(Result<u64, ClientError>),
    /// To a stat.
    Stat(Result<BlockStat, MissReason>),
    /// To a status: a JSON document.
    Status(Result<String, ClientError>),
}
