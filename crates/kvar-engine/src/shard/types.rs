//! What callers hand to a shard and what they get back.
//!
//! | going in | coming out |
//! |---|---|
//! | [`EngineConfig`] | |
//! | [`GetRequest`], with a [`Touch`] | [`Event::Get`] with a `Copy` of [`SectionRef`]s |
//! | [`PutRequest`], with [`PutHints`] | a [`PutTicket`] to receive into, then [`Event::Put`] |
//! | ids to remove, a flush, a purge of all or of one tenant | [`Event::Done`] |
//! | ids to be sure of: [`LeaseRequest`] | [`LeaseGrant`] |
//! | an id to look at | [`BlockStat`] |
//! | [`Standing`] | [`Event::Demote`] with a [`Demotion`] for the tier below, which answers [`Demoted`] |
//!
//! What must always be true: a `Copy` holds its memory until it is dropped, whatever becomes of
//! the block; the memory of a [`PutTicket`] is nobody else's until the put is committed or aborted.
//!
//! Nothing here decides anything; the shard does.

use crate::layout::{ImagePlan, RecordHints};
use kvar_base::{BlockId, ContentCheck, LeaseToken, MissReason, Moment, PutOutcome};
use kvar_io::{Buffer, Shared};
use kvar_policy::{BlockClass, Shares, Tenant, WriteRates};
use smallvec::SmallVec;
use std::ops::Range;
use std::time::Duration;

/// Settings of one shard.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Payload bytes in memory, padding to pages included.
    pub dram_bytes: u64,
    /// How old an acknowledged put may be before it is on the device.
    pub flush_after: Duration,
    /// How long a shutdown may write.
    pub shutdown_flush: Duration,
    /// Seconds since 1970 at `Moment(0)`: expiry outlives the process, so it is kept in wall time.
    /// [`Engine::set_wall_clock`](crate::Engine::set_wall_clock) corrects it later.
    pub unix_at_start_s: u64,
    /// Bytes a second that background verification of sealed segments may read, while nothing else
    /// is going on; 0 turns it off.
    pub scrub_bytes_per_s: u64,
    /// What may be written to the device a day; without end unless it is set.
    pub writes: WriteRates,
    /// How long a handover without a time to live waits for its reader.
    pub handover_wait: Duration,
    /// Tell the device which segments are free before they are written again (never a file).
    pub discard: bool,
    /// What each tenant weighs when memory and device are divided; all the same by default.
    pub shares: Shares,
}

/// What a scrub reads by default: 250 GB a shard in 17 hours, at under 0.1 % of a core.
const SCRUB_BYTES_PER_S: u64 = 4 << 20;

/// How long a handover waits: a decode engine fetches within seconds, and in a queue within a minute.
const HANDOVER_WAIT: Duration = Duration::from_secs(60);

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            dram_bytes: 1 << 30,
            flush_after: Duration::from_secs(1),
            shutdown_flush: Duration::from_secs(30),
            unix_at_start_s: 0,
            scrub_bytes_per_s: SCRUB_BYTES_PER_S,
            writes: WriteRates::default(),
            handover_wait: HANDOVER_WAIT,
            discard: false,
            shares: Shares::default(),
        }
    }
}

/// What a touch says about its block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touch {
    /// A number shared by all calls about one prompt, unique among prompts; 0: this call alone.
    pub request: u64,
    /// Position in the chain.
    pub depth: u32,
}

impl Touch {
    /// Nobody uses the block: it is read to be moved. It stays as young as it was, and is not brought
    /// into memory.
    pub const NONE: Self = Self {
        request: u64::MAX,
        depth: u32::MAX,
    };
}

/// A read.
#[derive(Clone, Debug)]
pub struct GetRequest {
    /// The block.
    pub id: BlockId,
    /// Which sections; all of them if `None`.
    pub sections: Option<Range<u16>>,
    /// When the answer is of no use any more.
    pub deadline: Moment,
    /// Recency.
    pub touch: Touch,
}

/// What a reader says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadHints {
    /// The caller's number for whom it asks: when the device has more to do than it can, askers are
    /// served in turn.
    pub asker: u64,
    /// It asks for the sections behind these next: they are read along.
    pub goes_on: bool,
}

/// What a writer knows about the worth of a block.
#[derive(Clone, Copy, Debug, Default)]
pub struct PutHints {
    /// As in [`Touch`].
    pub request: u64,
    /// As in [`Touch`].
    pub depth: u32,
    /// Not worth a write to the device.
    pub ephemeral: bool,
    /// How long it may be served, in seconds from the put; `None`: without end.
    pub ttl_s: Option<u32>,
    /// The writer's own number for what kind of traffic it is; 0: not said. Blocks of one are taken
    /// to come back alike; 3 and above are one.
    pub class: u8,
    /// What computing it again costs, in microseconds; 0: not known. Against the mean of what others
    /// said, a hit counts up to four times as often, or a quarter.
    pub recompute_us: u32,
    /// Written by one engine to be read once, soon, by another: stays in memory until then, or for
    /// its time to live, or for [`EngineConfig::handover_wait`]; then it leaves first.
    pub handover: bool,
    /// To be written to the device within `flush_after` whatever the write budget says: somebody
    /// asked for that, as whoever moves blocks here.
    pub is_asked: bool,
    /// Whose it is.
    pub tenant: Tenant,
    /// It is no new block: this is what another store knew of its use.
    pub moved: Option<Moved>,
}

/// What a store knows of a block's use when it hands the block on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// How often it was used, by how long requests.
    pub class: BlockClass,
    /// Bytes of demand since it was used last.
    pub age_bytes: u64,
}

/// Where a shard stands among the tiers of its store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// There is one tier.
    #[default]
    Only,
    /// There is a tier below: what reclaim does not keep is offered to it.
    Above,
    /// There is a tier above, which is asked first.
    Below,
}

/// A block on its way to the tier below. Holds its memory until dropped.
#[derive(Clone, Debug)]
pub struct Demotion {
    /// The block.
    pub id: BlockId,
    /// All its sections.
    pub copy: Copy,
    /// What its writer said.
    pub hints: RecordHints,
    /// What is known of its use.
    pub moved: Moved,
}

/// What became of a demotion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Demoted {
    /// It is below, flushed.
    Stored,
    /// It was below already, and is flushed.
    Exists,
    /// Not worth a place there.
    NotWorth,
    /// The limit of writes there is reached.
    Limit,
    /// There is no room at the moment, or somebody else is bringing it.
    Busy,
    /// Nobody is there: leaving, stopping, or not loaded.
    Gone,
    /// The bytes were not what they should be, or could not be flushed.
    Failed,
}

impl Demoted {
    /// Whether the block is safe below.
    #[must_use]
    pub fn has_arrived(self) -> bool {
        matches!(self, Self::Stored | Self::Exists)
    }
}

/// Where blocks stand in the prompt that they are asked for: another shard, or another tier, may be
/// asked for the rest of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Places<'a> {
    /// Depth of the first block that the caller asked for, of whomever.
    pub first_depth: u32,
    /// Each one's place among all that it asked for; in a row if empty.
    pub each: &'a [u32],
    /// How many these are; 0: what is asked here is all.
    pub asked: u32,
}

impl Places<'_> {
    /// Depth in the chain of the block at this place of the request.
    pub(super) fn depth(&self, at: usize) -> u32 {
        let place = match self.each {
            [] => u32::try_from(at).unwrap_or(u32::MAX),
            each => each.get(at).copied().unwrap_or(u32::MAX),
        };
        self.first_depth.saturating_add(place)
    }

    /// How many blocks the prompt has, as far as the request tells.
    pub(super) fn blocks(&self, asked_here: usize) -> u32 {
        let asked_here = u32::try_from(asked_here).unwrap_or(u32::MAX);
        self.first_depth.saturating_add(self.asked.max(asked_here))
    }
}

/// A lookup that wants what it finds to stay.
#[derive(Clone, Copy, Debug)]
pub struct LeaseRequest<'a> {
    /// The blocks, in the order of the chain.
    pub ids: &'a [BlockId],
    /// Names the lease; drawn at random. One that stands already is extended: more blocks, and
    /// the later of both ends.
    pub token: LeaseToken,
    /// Who wants it: budgets are kept a client.
    pub client: u64,
    /// How long; at most [`LEASE_MAX`](crate::LEASE_MAX).
    pub ttl: Duration,
    /// As in [`Touch`].
    pub request: u64,
    /// Where they stand in it.
    pub places: Places<'a>,
    /// Goes on behind a block that is not there: another tier may have it.
    pub over_gaps: bool,
}

/// What was promised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseGrant {
    /// How many leading blocks, `gaps` among them; 0: there is no lease, unless it stood before.
    pub leading: u32,
    /// Which of them are not there and not promised, by their place in the request; none unless it
    /// goes over gaps.
    pub gaps: Vec<u32>,
    /// Why not the next: absent, expired, or overloaded (a budget is used up). `None`: all are.
    pub reason: Option<MissReason>,
    /// Until when.
    pub until: Moment,
}

/// A put, announced.
#[derive(Clone, Debug)]
pub struct PutRequest {
    /// The block.
    pub id: BlockId,
    /// Exact length and content check of every section; a check of 0 is not known yet, and set
    /// before the commit ([`PutTicket::set_check`]).
    pub sections: Vec<(u32, ContentCheck)>,
    /// What the writer knows.
    pub hints: PutHints,
    /// Answer when flushed, not when acknowledged.
    pub durable: bool,
    /// When the put is of no use any more.
    pub deadline: Moment,
}

/// Room for a block that is coming in. Must end in `put_commit` or `put_abort`.
#[derive(Debug)]
pub struct PutTicket {
    pub(super) id: BlockId,
    pub(super) number: u64,
    pub(super) plan: ImagePlan,
    pub(super) buffer: Buffer,
    pub(super) hints: PutHints,
    pub(super) durable: bool,
    /// It comes from the tier above and only passes through memory.
    pub(super) passes: bool,
}

impl PutTicket {
    /// The block.
    #[must_use]
    pub fn id(&self) -> BlockId {
        self.id
    }

    /// Sections.
    #[must_use]
    pub fn sections(&self) -> usize {
        self.plan.sections.len()
    }

    /// Where a section's bytes belong in [`buffer_mut`](Self::buffer_mut).
    #[must_use]
    pub fn section_range(&self, section: usize) -> Range<usize> {
        let section = &self.plan.sections[section];
        section.offset as usize..section.offset as usize + section.len as usize
    }

    /// What the writer says of a section, where it was not known when the put began.
    pub fn set_check(&mut self, section: usize, check: ContentCheck) {
        self.plan.sections[section].check = check;
    }

    /// The memory to receive into.
    pub fn buffer_mut(&mut self) -> &mut [u8] {
        self.buffer.as_mut_slice()
    }
}

/// A section of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionRef {
    /// Which one.
    pub index: u16,
    /// Exact length.
    pub len: u32,
    /// The writer's check.
    pub check: ContentCheck,
    /// Start in [`Copy::bytes`].
    pub offset: u32,
}

/// One copy of a block, as read. Holds its memory until dropped.
#[derive(Clone, Debug)]
pub struct Copy {
    /// Equal version, equal bytes.
    pub version: u64,
    /// The sections asked for.
    pub sections: SmallVec<[SectionRef; 1]>,
    /// The stored image; sections lie in it.
    pub bytes: Shared,
    /// What was known of its use when it was read; of a part of a block nothing.
    pub moved: Moved,
}

impl Copy {
    /// The bytes of a section of this copy.
    #[must_use]
    pub fn section(&self, section: &SectionRef) -> &[u8] {
        &self.bytes.as_slice()[section.offset as usize..][..section.len as usize]
    }
}

/// What became of a call.
#[derive(Debug)]
pub enum Event {
    /// A read is over.
    Get {
        /// The caller's number.
        token: u64,
        /// The copy, or why not.
        outcome: Result<Copy, MissReason>,
    },
    /// A put is over.
    Put {
        /// The caller's number.
        token: u64,
        /// How.
        outcome: PutOutcome,
    },
    /// Who waited for a block that is being put need not wait any more: it is there, or will not be, or
    /// the deadline has come, or nobody puts it.
    Awaited {
        /// The caller's number.
        token: u64,
    },
    /// A block that reclaim does not keep is offered to the tier below; ends in a call of
    /// [`Engine::demoted`](crate::Engine::demoted).
    Demote {
        /// The shard's number for it.
        token: u64,
        /// The block.
        block: Box<Demotion>,
    },
    /// A remove, flush or purge is over.
    Done {
        /// The caller's number.
        token: u64,
        /// Blocks it concerned, or why the device could not do it.
        result: Result<u64, String>,
    },
}

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// In memory alone.
    Dram,
    /// On the device alone.
    Flash,
    /// In both.
    DramAndFlash,
}

/// What is known of a block without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BlockStat {
    /// Where.
    pub tier: Tier,
    /// Bytes it takes there.
    pub stored_bytes: u64,
    /// Sections, when it is in memory.
    pub sections: Option<u16>,
    /// Version, when it is in memory.
    pub version: Option<u64>,
    /// Whether it survives a power cut: its record and bytes are flushed.
    pub flushed: bool,
    /// When it expires, in seconds since 1970.
    pub expires_unix_s: Option<u64>,
}
