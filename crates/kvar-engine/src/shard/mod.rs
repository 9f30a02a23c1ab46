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
//! | `demote`, `take` | what goes to the tier below; what comes from the one above? |
//! | `shutdown`, `status` | how does it end; what does it say of itself? |
//! | `journal` | for tests: where did every block go? |

mod types;

mod admit;
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
mod reclaim;
mod records;
mod scrub;
mod take;

mod shutdown;
mod status;

mod journal;

use crate::dram::{Dram, State};
use crate::expiry::Expiries;
use crate::index::{Entry, Index, SlotRef};
use crate::layout::{ImagePlan, PAGE, Superblock};
use crate::leases::Leases;
use crate::mutation::{self, Check};
use crate::segments::Segments;
use kvar_base::FastMap;
use kvar_base::check::{Place, crc64, fold_place};
use kvar_base::{BlockId, ContentCheck, MissReason, Moment, page_round_up};
use kvar_io::{Arena, Completion, Op};
use kvar_policy::{Keep, StoreShape, TENANTS, WriteBudget};
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};

use ahead::Ahead;
use awaited::Awaited;
use checkpoint::CheckpointWrite;
pub(crate) use checkpoint::prefix_bytes as checkpoint_prefix_bytes;
pub(crate) use handover::Handover;
pub use journal::{Change, Displaced};
pub(crate) use read::Reader;
use read::{FlashRead, MoveRead};
use reclaim::Reclaim;
pub(crate) use records::{directory_records, footer_records};
use scrub::{Scrub, ScrubRead};
use sections::{Directories, Part, PartRead};
use shutdown::Shutdown;
pub use status::{Counters, ShardStatus, ShutdownReport, TenantCounters, TenantStatus};
use sync::{FlushWaiter, Sync, UnflushedPuts};
use trouble::Trouble;
pub use types::{
    BlockStat, Copy, Demoted, Demotion, EngineConfig, Event, GetRequest, LeaseGrant, LeaseRequest,
    Moved, PutHints, PutRequest, PutTicket, ReadHints, SectionRef, Standing, Tier, Touch,
};
use write::{Control, WriteGroup, WriteItem};

/// Reads from the device under way at once; others wait for their turn (`turns`). What keeps a fast
/// NVMe drive busy at 64 KiB: with more, whoever asks next waits longer and nobody gets more.
const READS_AT_DEVICE_MAX: usize = 256;
/// Requests whose arrival number is remembered, so that the calls of one prompt count as one.
const ARRIVALS_KEPT: usize = 256;
/// After so many uses under one number the blocks of a request begin a new group in the order of
/// memory: one number for everything, which any client may send, would make one group of all, and
/// each touch a walk through it.
const ARRIVAL_USES_MAX: u64 = 4096;

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

/// What is remembered of a request.
struct Arrival {
    number: u64,
    /// Its lookup touched what it found; the gets and puts that follow are the same use.
    looked_up: bool,
    /// How many blocks its prompt has, as far as is known.
    blocks: u32,
    uses: u64,
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
    arrivals: FastMap<u64, Arrival>,
    arrival_order: VecDeque<u64>,
    next_arrival: u64,
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
            arrivals: FastMap::default(),
            arrival_order: VecDeque::new(),
            next_arrival: 1,
            counters: Counters::default(),
            by_tenant: [TenantCounters::default(); TENANTS],
            journal: None,
        }
    }

    fn submit(&mut self, pending: Pending, op: Op) {
        let token = self.pending.insert(pending) as u64;
        self.out.push((token, op));
    }

    /// The arrival number of a request: equal for all calls about one prompt, growing with time.
    fn arrival(&mut self, request: u64) -> u64 {
        if let Some(arrival) = self.arrivals.get_mut(&request) {
            arrival.uses += 1;
            if arrival.uses.is_multiple_of(ARRIVAL_USES_MAX) {
                arrival.number = self.next_arrival;
                self.next_arrival += 1;
            }
            return arrival.number;
        }
        let number = self.next_arrival;
        self.next_arrival += 1;
        if request != 0 {
            if self.arrival_order.len() == ARRIVALS_KEPT {
                let oldest = self.arrival_order.pop_front().expect("it is full");
                self.arrivals.remove(&oldest);
            }
            self.arrival_order.push_back(request);
            let arrival = Arrival {
                number,
                looked_up: false,
                blocks: 0,
                uses: 0,
            };
            self.arrivals.insert(request, arrival);
        }
        number
    }

    /// Whether a request looked its chain up before: that counted as its touch.
    fn has_looked_up(&self, request: u64) -> bool {
        self.arrivals
            .get(&request)
            .is_some_and(|arrival| arrival.looked_up)
    }

    /// How many blocks the prompt of a request has, if this one is at `depth` in it.
    fn request_blocks(&self, request: u64, depth: u32) -> u32 {
        let known = self.arrivals.get(&request).map_or(0, |one| one.blocks);
        known.max(depth.saturating_add(1))
    }

    /// How old a stamp is, in ticks.
    pub(crate) fn age(&self) -> impl Fn(u8) -> u8 + use<> {
        let now = self.keep.stamp();
        move |stamp| now.wrapping_sub(stamp)
    }

    /// Whether a block is visible, and if not why; refreshes it.
    fn touch(&mut self, now: Moment, id: &BlockId, touch: Touch) -> Result<(), MissReason> {
        let found = self.index.find(id);
        self.touch_found(now, id, found, touch)
    }

    /// As [`touch`](Self::touch), of what the index was found to hold.
    fn touch_found(
        &mut self,
        now: Moment,
        id: &BlockId,
        found: Option<(SlotRef, Entry)>,
        touch: Touch,
    ) -> Result<(), MissReason> {
        let expires = match (self.dram.get(id), &found) {
            (Some(resident), _) => resident.hints.expires_unix_s,
            (None, Some((_, entry))) => self.flash_expiry(entry),
            (None, None) => {
                self.note_missed(id);
                return Err(MissReason::Absent);
            }
        };
        if self.is_over(now, id, expires) {
            return Err(MissReason::Expired);
        }
        if touch != Touch::NONE && !self.has_looked_up(touch.request) {
            let blocks = self.request_blocks(touch.request, touch.depth);
            let bytes = self.use_block(id, found, touch, blocks);
            self.keep.demanded(bytes);
        }
        Ok(())
    }

    /// A visible block is used by a request of so many blocks; its bytes, for the clock.
    fn use_block(
        &mut self,
        id: &BlockId,
        found: Option<(SlotRef, Entry)>,
        touch: Touch,
        blocks: u32,
    ) -> u64 {
        let resident = self.dram.get(id);
        let is_awaited = resident.is_some_and(|resident| resident.state == State::Awaited);
        let resident = resident.map(|resident| resident.class);
        let before = resident.or(found.map(|(_, entry)| entry.class()));
        if is_awaited {
            self.touch_awaited(id, touch);
        } else if let Some(before) = before {
            let class = self.used(id, before, blocks);
            if let Some((at, _)) = found {
                self.index.touch(at, self.keep.stamp(), class);
            }
            if resident.is_some() {
                let arrival = self.arrival(touch.request);
                let now = self.keep.demand_bytes();
                self.dram.touch(id, arrival, touch.depth, class, now);
            }
        }
        match (found, self.dram.get(id)) {
            (Some((_, entry)), _) => Self::demand_of(&entry),
            (None, Some(resident)) => resident.image.padded_len() as u64,
            (None, None) => 0,
        }
    }

    /// Whether a block is visible, and if not why.
    fn visible(&self, now: Moment, id: &BlockId) -> Result<(), MissReason> {
        let expires = match (self.dram.get(id), self.index.find(id)) {
            (Some(resident), _) => resident.hints.expires_unix_s,
            (None, Some((_, entry))) => self.flash_expiry(&entry),
            (None, None) => return Err(MissReason::Absent),
        };
        if self.is_over(now, id, expires) {
            return Err(MissReason::Expired);
        }
        Ok(())
    }

    /// A call comes in.
    pub(crate) fn called(&mut self, now: Moment) {
        (self.last_call, self.now) = (now, now);
        self.end_leases(now);
        self.end_waits(now);
        self.tidy_held();
        self.tidy_awaited(now);
    }

    pub(crate) fn lookup(&mut self, now: Moment, ids: &[BlockId], request: u64) -> Vec<bool> {
        self.expect_blocks(request, ids.len());
        let mut found = Vec::with_capacity(ids.len());
        self.index.find_all(ids, &mut found);
        let present: Vec<bool> = (0..)
            .zip(ids.iter().zip(found))
            .map(|(depth, (id, found))| {
                let touch = Touch { request, depth };
                self.touch_found(now, id, found, touch).is_ok()
            })
            .collect();
        self.looked_up(request);
        self.counters.lookups += ids.len() as u64;
        self.counters.lookup_hits += present.iter().filter(|present| **present).count() as u64;
        present
    }

    /// A request's prompt has at least so many blocks.
    fn expect_blocks(&mut self, request: u64, blocks: usize) {
        if request != 0 {
            self.arrival(request);
            if let Some(arrival) = self.arrivals.get_mut(&request) {
                let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
                arrival.blocks = arrival.blocks.max(blocks);
            }
        }
    }

    /// The calls that follow under this number are the same use of what was looked up.
    fn looked_up(&mut self, request: u64) {
        if request != 0 {
            self.arrival(request);
            if let Some(arrival) = self.arrivals.get_mut(&request) {
                arrival.looked_up = true;
            }
        }
    }

    pub(crate) fn stat(&self, now: Moment, id: &BlockId) -> Option<BlockStat> {
        let entry = self.index.find(id).map(|(_, entry)| entry);
        let resident = self.dram.get(id);
        let expires = match (resident, &entry) {
            (Some(resident), _) => resident.hints.expires_unix_s,
            (None, Some(entry)) => self.flash_expiry(entry),
            (None, None) => return None,
        };
        if self.is_over(now, id, expires) {
            return None;
        }
        let tier = match (resident, entry) {
            (None, None) => return None,
            (Some(_), None) => Tier::Dram,
            (None, Some(_)) => Tier::Flash,
            (Some(_), Some(_)) => Tier::DramAndFlash,
        };
        let stored = resident.map_or_else(
            || entry.map_or(0, |entry| page_round_up(u64::from(entry.len))),
            |resident| resident.image.padded_len() as u64,
        );
        Some(BlockStat {
            tier,
            stored_bytes: stored,
            sections: resident.map(|resident| resident.sections.len() as u16),
            version: resident.map(|resident| resident.version),
            flushed: entry.is_some()
                && resident
                    .is_none_or(|resident| !self.unflushed.puts.contains_key(&resident.number)),
            expires_unix_s: (expires != 0).then_some(u64::from(expires)),
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use kvar_base::DeviceUuid;

    /// A prompt looks its chain up, gets what is there and puts the rest: one use of every block,
    /// not two. The policy, and the model that the planner replays, count requests.
    #[test]
    fn the_calls_of_one_request_count_as_one_touch() {
        let uuid = DeviceUuid::new([1; 16]);
        let superblock = Superblock::plan(16 << 20, 1, 65536, uuid, [2; 16], 0).unwrap();
        let index = Index::new(superblock.buckets, 0);
        let config = EngineConfig::default();
        let arena = Arena::new(PAGE).unwrap();
        let mut shard = Shard::new(&superblock, 0, config, arena, index);
        let id = BlockId::new([7; 32]);
        let entry = Entry {
            check64: 1,
            position: 9,
            len: 10,
            sectioned: false,
            touched: false,
            frequency: 0,
            length: 0,
            kind: 0,
            stamp: 0,
            tenant: kvar_policy::Tenant::DEFAULT,
        };
        let age = shard.age();
        shard.index.insert(&id, &entry, age);
        let frequency = |shard: &Shard| shard.find(&id).unwrap().1.frequency;
        let touch = |request| Touch { request, depth: 0 };
        let now = Moment(1);
        shard.lookup(now, &[id], 5);
        shard.touch(now, &id, touch(5)).unwrap();
        shard.lookup(now, &[id], 5);
        assert_eq!(frequency(&shard), 1);
        shard.lookup(now, &[id], 6);
        shard.touch(now, &id, touch(6)).unwrap();
        assert_eq!(frequency(&shard), 2);
        // Calls that name no request stand for themselves; so does a get without a lookup.
        shard.touch(now, &id, touch(0)).unwrap();
        assert_eq!(frequency(&shard), 3);
        shard.index.insert(&id, &entry, |age| age);
        shard.touch(now, &id, touch(7)).unwrap();
        assert_eq!(frequency(&shard), 1);
        assert!(shard.find(&id).unwrap().1.touched);
    }
}
