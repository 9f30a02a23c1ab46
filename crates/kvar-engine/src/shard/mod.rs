//! The state machine of one shard: calls and completions in, operations and events out.
//!
//! ```text
//!   absent ── put_begin ──> filling ── put_commit, all checks hold ──> visible ──> gone
//!                │              │ abort, wrong check, deadline            │  evicted: dram, reclaim, bucket
//!                ▼              ▼                                         │  removed, purged, corrupt
//!        Exists, InProgress,  absent                                      ▼
//!        Refused                                                     (a new put)
//! ```
//!
//! What must always be true:
//! * a block is visible when all its sections passed their checks, all at once;
//! * an index entry leads to bytes that were completely written, or to a miss;
//! * a record's sequence number is drawn when what it says has happened: the order of records is
//!   the order of events, and recovery needs nothing else.
//!
//! Every device operation has a [`Pending`] under its token; nothing waits by blocking.
//!
//! | file | question |
//! |---|---|
//! | `types` | what do callers hand in, and what do they get back? |
//! | `admit` | what does a use say of a block; which blocks get a place on the device? |
//! | `lookup`, `arrivals` | what is there; which calls are one use of it? |
//! | `put`, `read`, `sections`, `remove` | the calls: a block comes in, is read whole or in part, goes |
//! | `ahead`, `awaited` | what is read along for who asks next; who waits for a block that comes in |
//! | `turns` | whose read goes to the device next; which goes there no more? |
//! | `lease`, `expiry` | what is promised for how long; what is over |
//! | `handover` | what waits for one reader, and how long |
//! | `write` | what is queued; where is it placed; when is it recorded? |
//! | `prepare` | which segment is opened, closed and sealed when? |
//! | `sync` | when is what is recorded on the device, and who is told? |
//! | `trouble` | what if the device refuses? |
//! | `scrub` | is what lies on the device still what was written? |
//! | `reclaim`, `checkpoint` | which segment becomes free again; how is recovery kept short? |
//! | `records` | which records does a segment have? |
//! | `demote`, `let_down` | what goes to the tier below, of what reclaim and what memory gives up? |
//! | `take` | what comes from the tier above? |
//! | `shutdown`, `status` | how does it end; what does it say of itself? |
//! | `journal` | for tests: where did every block go? |

mod types;

mod admit;
mod arrivals;
mod lookup;
mod put;
mod read;
mod remove;
mod sections;
mod turns;

mod ahead;
mod awaited;

mod expiry;
mod handover;
mod lease;

mod prepare;
mod sync;
mod trouble;
mod write;

mod checkpoint;
mod demote;
mod let_down;
mod reclaim;
mod records;
mod scrub;
mod take;

mod shutdown;
mod status;

mod journal;

use crate::dram::{Dram, Resident};
use crate::expiry::Expiries;
use crate::index::{Entry, Index, SlotRef};
use crate::layout::{ImagePlan, PAGE, Superblock};
use crate::leases::Leases;
use crate::mutation::{self, Check};
use crate::segments::Segments;
use kvar_base::FastMap;
use kvar_base::check::{Place, crc64, fold_place};
use kvar_base::{BlockId, ContentCheck, Moment};
use kvar_io::{Arena, Completion, Op};
use kvar_policy::{Keep, StoreShape, TENANTS, WriteBudget};
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};

use ahead::Ahead;
use arrivals::Arrivals;
use awaited::Awaited;
use checkpoint::CheckpointWrite;
pub(crate) use checkpoint::prefix_bytes as checkpoint_prefix_bytes;
pub(crate) use handover::Handover;
pub use journal::{Change, Displaced};
pub(crate) use read::Reader;
use read::{FlashRead, MoveRead};
use reclaim::Reclaim;
pub(crate) use records::{Opening, directory_records, footer_records};
use scrub::{Scrub, ScrubRead};
use sections::{Directories, Part, PartRead};
use shutdown::Shutdown;
pub use status::{Counters, ShardStatus, ShutdownReport, TenantCounters, TenantStatus};
use sync::{FlushWaiter, Sync, UnflushedPuts};
use trouble::Trouble;
pub use types::{
    BlockStat, Copy, Demoted, Demotion, EngineConfig, Event, GetRequest, LeaseGrant, LeaseRequest,
    Moved, Places, PutHints, PutRequest, PutTicket, ReadHints, SectionRef, Standing, Tier, Touch,
};
use write::{Control, WriteGroup, WriteItem};

/// Reads from the device under way at once; others wait for their turn (`turns`). What keeps a fast
/// NVMe drive busy at 64 KiB: with more, whoever asks next waits longer and nobody gets more.
const READS_AT_DEVICE_MAX: usize = 256;

/// What a device operation was for.
enum Pending {
    Payload(WriteGroup),
    SyncPayloadFlush,
    SyncPage,
    SyncFlush,
    PrepareHeader,
    PrepareFlush,
    PrepareDiscard,
    Read(FlashRead),
    PartRead(PartRead),
    Scrub(ScrubRead),
    MoveRead(MoveRead),
    ReclaimFooter { offset: u64 },
    CheckpointChunk,
    CheckpointFlush,
}

/// One shard.
pub(crate) struct Shard {
    pub(crate) superblock: Superblock,
    pub(crate) number: u32,
    pub(crate) config: EngineConfig,
    pub(crate) arena: Arena,
    pub(crate) index: Index,
    pub(crate) segments: Segments,
    /// When what lies on the device expires.
    pub(crate) expiries: Expiries,
    leases: Leases,
    dram: Dram,
    /// What blocks are worth, and the clock of their use.
    pub(crate) keep: Keep,
    budget: WriteBudget,
    written_requests: VecDeque<u64>,
    /// Where the next stamps are looked at, and at which stamp that was last done.
    sweep_next: usize,
    /// Buckets whose turn has come.
    sweep_left: usize,
    swept_at: u8,
    pub(crate) next_sequence: u64,
    flushed_sequence: u64,
    next_put: u64,
    filling: FastMap<BlockId, (u64, Moment)>,
    // Writing.
    dirty: VecDeque<WriteItem>,
    dirty_bytes: u64,
    moved: VecDeque<WriteItem>,
    controls: VecDeque<Control>,
    payload_in_flight_bytes: u64,
    sync: Option<Sync>,
    first_unsynced: Option<Moment>,
    /// Moved blocks are recorded whose new copy may not be flushed.
    moved_unsynced: bool,
    recorded_puts: VecDeque<(u64, u64)>,
    recorded_controls: VecDeque<(u64, u64)>,
    control_counts: FastMap<u64, (u64, u64)>,
    unflushed: UnflushedPuts,
    flush_waiters: Vec<FlushWaiter>,
    trouble: Trouble,
    /// Blocks that were given up while the device refused writes are to be queued again.
    retry_given_up: bool,
    // Reading.
    reading: FastMap<BlockId, read::Reading>,
    /// Reads of sections, by block and number of the read.
    parts: BTreeMap<(BlockId, u64), Part>,
    directories: Directories,
    ahead: Ahead,
    awaited: Awaited,
    reads_in_flight: usize,
    turns: turns::Turns,
    // Tidying.
    reclaim: Option<Reclaim>,
    /// Whether there is a tier below or above.
    standing: Standing,
    /// What is on offer to the tier below, by token.
    offers: FastMap<u64, demote::Offer>,
    /// What goes there from memory.
    let_down: let_down::LetDown,
    next_offer: u64,
    scrub: Scrub,
    checkpoint: Option<CheckpointWrite>,
    pub(crate) checkpoint_number: u64,
    /// Which of the two areas the next checkpoint goes to: not where the last one is.
    pub(crate) checkpoint_area: u32,
    /// Areas whose checkpoint recovery could not read, and which nobody must read later.
    pub(crate) checkpoints_unread: Vec<u32>,
    sealed_since_checkpoint: u32,
    shutdown: Option<Shutdown>,
    // Plumbing.
    /// What is under way at the device; an operation's token is its place here.
    pending: Slab<Pending>,
    pub(crate) out: Vec<(u64, Op)>,
    pub(crate) events: Vec<Event>,
    arrivals: Arrivals,
    /// Seconds since 1970 at `Moment(0)`.
    unix_at_start_s: u64,
    last_call: Moment,
    /// The latest moment it was told of.
    now: Moment,
    counters: Counters,
    by_tenant: [TenantCounters; TENANTS],
    /// Only where somebody asked for it.
    journal: Option<Vec<Change>>,
}

impl Shard {
    pub(crate) fn new(
        superblock: &Superblock,
        number: u32,
        config: EngineConfig,
        arena: Arena,
        index: Index,
    ) -> Self {
        let turnover = u64::from(superblock.segments_per_shard) * superblock.payload_bytes();
        let keep = Keep::new(&StoreShape {
            capacity_bytes: turnover + config.dram_bytes,
            segments: u64::from(superblock.segments_per_shard),
            segment_bytes: superblock.payload_bytes(),
            blocks: known_blocks(superblock),
        });
        Self {
            superblock: superblock.clone(),
            number,
            arena,
            index,
            segments: Segments::new(superblock),
            expiries: Expiries::new(superblock.segments_per_shard as usize),
            leases: Leases::new(config.dram_bytes, turnover, superblock.payload_bytes()),
            dram: Dram::new(config.dram_bytes, config.shares.clone()),
            unix_at_start_s: config.unix_at_start_s,
            last_call: Moment(0),
            now: Moment(0),
            keep,
            budget: WriteBudget::new(&config.writes),
            config,
            written_requests: VecDeque::new(),
            sweep_next: 0,
            sweep_left: 0,
            swept_at: 0,
            next_sequence: 1,
            flushed_sequence: 0,
            next_put: 1,
            filling: FastMap::default(),
            dirty: VecDeque::new(),
            dirty_bytes: 0,
            moved: VecDeque::new(),
            controls: VecDeque::new(),
            payload_in_flight_bytes: 0,
            sync: None,
            first_unsynced: None,
            moved_unsynced: false,
            recorded_puts: VecDeque::new(),
            recorded_controls: VecDeque::new(),
            control_counts: FastMap::default(),
            unflushed: UnflushedPuts::default(),
            flush_waiters: Vec::new(),
            trouble: Trouble::default(),
            retry_given_up: false,
            reading: FastMap::default(),
            parts: BTreeMap::new(),
            directories: Directories::default(),
            ahead: Ahead::default(),
            awaited: Awaited::default(),
            reads_in_flight: 0,
            turns: turns::Turns::default(),
            reclaim: None,
            standing: Standing::default(),
            offers: FastMap::default(),
            let_down: let_down::LetDown::default(),
            next_offer: 1,
            scrub: Scrub::default(),
            checkpoint: None,
            checkpoint_number: 0,
            checkpoint_area: 0,
            checkpoints_unread: Vec::new(),
            sealed_since_checkpoint: 0,
            shutdown: None,
            pending: Slab::new(),
            out: Vec::new(),
            events: Vec::new(),
            arrivals: Arrivals::default(),
            counters: Counters::default(),
            by_tenant: [TenantCounters::default(); TENANTS],
            journal: None,
        }
    }

    fn submit(&mut self, pending: Pending, op: Op) {
        let token = self.pending.insert(pending) as u64;
        self.out.push((token, op));
    }

    /// How old a stamp is, in ticks.
    pub(crate) fn age(&self) -> impl Fn(u8) -> u8 + use<> {
        let now = self.keep.stamp();
        move |stamp| now.wrapping_sub(stamp)
    }

    /// A call comes in.
    pub(crate) fn called(&mut self, now: Moment) {
        (self.last_call, self.now) = (now, now);
        self.end_leases(now);
        self.end_waits(now);
        self.tidy_held();
        self.tidy_awaited(now);
    }

    /// The place of an index entry, for its check.
    pub(crate) fn place_of(&self, entry: &Entry) -> Place {
        let (segment, page) = self.segments.locate(entry.position);
        self.place_at(segment, page, entry.len)
    }

    pub(crate) fn place_at(&self, segment: u32, page: u32, len: u32) -> Place {
        Place {
            device: self.superblock.uuid,
            segment: self.superblock.device_segment(self.number, segment),
            generation: if mutation::is_disabled(Check::PlaceGeneration) {
                0
            } else {
                self.segments.all[segment as usize].generation
            },
            offset: self.superblock.offset(self.number, segment, page),
            len,
        }
    }

    /// What pages of a segment must say to be of its last opening.
    pub(crate) fn opening(&self, number: u32) -> Opening {
        let segment = &self.segments.all[number as usize];
        Opening {
            segment: self.superblock.device_segment(self.number, number),
            generation: segment.generation,
            sequence: segment.opened_sequence,
        }
    }

    fn find(&self, id: &BlockId) -> Option<(SlotRef, Entry)> {
        self.index.find(id)
    }

    /// Recovery is over: what it found is what is flushed.
    pub(crate) fn recovered(&mut self) {
        self.flushed_sequence = self.next_sequence - 1;
        // When segments were opened is not kept: evenly, within one capacity.
        let now = self.keep.demand_bytes();
        let span = now
            .min(u64::from(self.superblock.segments_per_shard) * self.superblock.payload_bytes());
        let count = self.segments.sealed.len().max(1) as u64;
        for (number, segment) in (0..).zip(&self.segments.sealed) {
            self.segments.all[*segment as usize].opened_at = now - span + span / count * number;
        }
        self.swept_at = self.keep.stamp();
    }

    /// A device operation is over.
    pub(crate) fn complete(&mut self, now: Moment, completion: Completion) {
        self.now = now;
        let Some(pending) = self.pending.try_remove(completion.token as usize) else {
            debug_assert!(false, "a completion has a pending operation");
            return;
        };
        let Completion { op, result, .. } = completion;
        match pending {
            Pending::Payload(group) => self.payload_done(now, group, result),
            Pending::SyncPayloadFlush => self.sync_payload_flush_done(now, result),
            Pending::SyncPage => self.sync_page_done(now, result),
            Pending::SyncFlush => self.sync_flush_done(now, result),
            Pending::PrepareHeader => self.prepare_header_done(now, result),
            Pending::PrepareFlush => self.prepare_flush_done(now, result),
            Pending::PrepareDiscard => self.prepare_discard_done(&result),
            Pending::Read(read) => self.read_done(read, op, &result),
            Pending::PartRead(read) => self.part_read_done(read, op, &result),
            Pending::Scrub(read) => self.scrub_read_done(now, read, op, &result),
            Pending::MoveRead(read) => self.move_read_done(read, op, &result),
            Pending::ReclaimFooter { offset } => self.reclaim_footer_done(offset, op, &result),
            Pending::CheckpointChunk => self.checkpoint_chunk_done(now, result),
            Pending::CheckpointFlush => self.checkpoint_flush_done(now, result),
        }
    }

    /// Does what has become possible or due.
    pub(crate) fn step(&mut self, now: Moment) {
        self.pass_time(now);
        self.end_waits(now);
        self.tidy_held();
        self.tidy_awaited(now);
        self.give_turns(now);
        self.sweep_stamps();
        self.decide_ahead(now);
        self.step_let_down();
        self.step_reclaim();
        self.step_write(now);
        self.step_checkpoint();
        self.step_shutdown(now);
        self.step_scrub(now);
    }
}

/// Blocks that a shard holds at its design load, about: the index has room for a third more.
pub(crate) fn known_blocks(superblock: &Superblock) -> u64 {
    superblock.buckets * crate::layout::SLOTS_PER_BUCKET / 4 * 3
}

/// Whether every section's bytes are what its writer said.
fn sections_hold(id: &BlockId, plan: &ImagePlan, image: &[u8]) -> bool {
    plan.sections.iter().enumerate().all(|(number, section)| {
        let bytes = &image[section.offset as usize..][..section.len as usize];
        ContentCheck::of(bytes, id, number as u16) == section.check
    })
}

/// CRC of what `check64` covers: the payload of one section, or the section directory.
fn head_crc(id: &BlockId, plan: &ImagePlan, image: &[u8]) -> u64 {
    if plan.is_sectioned() {
        crc64(&image[..plan.directory_pages * PAGE])
    } else {
        plan.sections[0].check.crc(id, 0, plan.sections[0].len)
    }
}

/// A head's CRC turned into `check64`.
fn check64_of(crc: u64, id: &BlockId, place: &Place) -> u64 {
    if mutation::is_disabled(Check::IdFold) {
        return fold_place(crc, &BlockId::new([0; 32]), place);
    }
    fold_place(crc, id, place)
}

/// A stored image, verified against its check64 and, section by section, its content checks.
pub(crate) fn verify_image(
    id: &BlockId,
    image: &[u8],
    sectioned: bool,
    check64: u64,
    place: &Place,
) -> Option<ImagePlan> {
    let trusted = mutation::is_disabled(Check::Bytes);
    if !sectioned {
        let crc = crc64(image);
        let section = (
            image.len() as u32,
            ContentCheck::from_crc(crc, id, 0, image.len() as u32),
        );
        let holds = check64_of(crc, id, place) == check64 || trusted;
        return holds.then(|| ImagePlan::new(&[section]));
    }
    let plan = ImagePlan::decode(id, image)?;
    let holds = check64_of(head_crc(id, &plan, image), id, place) == check64
        && sections_hold(id, &plan, image);
    (holds || trusted).then_some(plan)
}
