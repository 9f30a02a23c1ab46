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

mod checkpoint;
mod read;
mod reclaim;
mod status;
mod write;

use crate::dram::{Dram, Resident, State};
use crate::index::{Entry, Index, SlotRef};
use crate::layout::{ImagePlan, PAGE, Superblock};
use crate::segments::Segments;
use kvar_base::check::{Place, crc64, version};
use kvar_base::{
    BlockId, ContentCheck, MissReason, Moment, PutOutcome, Refusal, SECTIONS_MAX, page_round_up,
};
use kvar_io::{Arena, Buffer, Completion, Op, Shared};
use kvar_policy::{CoarseClock, RecentlyUsed, ReclaimPolicy};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use checkpoint::CheckpointWrite;
pub(crate) use checkpoint::prefix_bytes as checkpoint_prefix_bytes;
use read::{FlashRead, MoveRead};
use reclaim::Reclaim;
pub(crate) use reclaim::{directory_records, footer_records};
pub use status::{Counters, ShardStatus, ShutdownReport};
use write::{Control, WriteGroup, WriteItem};

/// Reads from the device under way at once; one more is Overloaded. Twice what keeps a fast NVMe
/// drive busy at 64 KiB.
const READS_IN_FLIGHT_MAX: usize = 512;
/// How long a put may stay without commit or abort after its deadline before its id is free again.
const FILLING_GRACE: Duration = Duration::from_secs(5);
/// Memory that blocks leave free for footers (at most 2 MiB), directory pages and checkpoint
/// chunks, however many copies slow readers hold: without these nothing dirty could leave.
const PAGES_RESERVE_BYTES: usize = 4 << 20;
/// Requests whose arrival number is remembered, so that the calls of one prompt count as one.
const ARRIVALS_KEPT: usize = 256;

/// Settings of one shard.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Payload bytes in memory, padding to pages included.
    pub dram_bytes: u64,
    /// How old an acknowledged put may be before it is on the device.
    pub flush_after: Duration,
    /// How long a shutdown may write.
    pub shutdown_flush: Duration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            dram_bytes: 1 << 30,
            flush_after: Duration::from_secs(1),
            shutdown_flush: Duration::from_secs(30),
        }
    }
}

/// What a touch says about its block.
#[derive(Clone, Copy, Debug, Default)]
pub struct Touch {
    /// A number shared by all calls about one prompt, unique among prompts; 0: this call alone.
    pub request: u64,
    /// Position in the chain.
    pub depth: u32,
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

/// What a writer knows about the worth of a block.
#[derive(Clone, Copy, Debug, Default)]
pub struct PutHints {
    /// As in [`Touch`].
    pub request: u64,
    /// As in [`Touch`].
    pub depth: u32,
    /// Not worth a write to the device.
    pub ephemeral: bool,
}

/// A put, announced.
#[derive(Clone, Debug)]
pub struct PutRequest {
    /// The block.
    pub id: BlockId,
    /// Exact length and content check of every section.
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
    id: BlockId,
    number: u64,
    plan: ImagePlan,
    buffer: Buffer,
    hints: PutHints,
    durable: bool,
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
    pub sections: Vec<SectionRef>,
    /// The stored image; sections lie in it.
    pub bytes: Shared,
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
}

/// What a device operation was for.
enum Pending {
    Payload(WriteGroup),
    SyncPage,
    SyncFlush,
    PrepareHeader,
    PrepareFlush,
    Read(FlashRead),
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
}

struct FlushWaiter {
    token: u64,
    up_to_put: u64,
}

/// A put that is acknowledged and not flushed.
struct Unflushed {
    since: Moment,
    durable: Option<u64>,
}

/// All of them, by number.
#[derive(Default)]
struct UnflushedPuts {
    puts: BTreeMap<u64, Unflushed>,
    /// How many are durable: somebody waits for the flush. Asked at every turn.
    durable: usize,
}

impl UnflushedPuts {
    /// Adds one; a number that is known keeps what is known of it.
    fn add(&mut self, number: u64, since: Moment, durable: Option<u64>) {
        if let std::collections::btree_map::Entry::Vacant(place) = self.puts.entry(number) {
            place.insert(Unflushed { since, durable });
            self.durable += usize::from(durable.is_some());
        }
    }

    /// It is flushed, or will not be: the token that waits for it.
    fn end(&mut self, number: u64) -> Option<u64> {
        let token = self.puts.remove(&number)?.durable?;
        self.durable -= 1;
        Some(token)
    }
}

/// One shard.
pub(crate) struct Shard {
    pub(crate) superblock: Superblock,
    pub(crate) number: u32,
    pub(crate) config: EngineConfig,
    pub(crate) arena: Arena,
    pub(crate) index: Index,
    pub(crate) segments: Segments,
    dram: Dram,
    clock: CoarseClock,
    pub(crate) appended_bytes: u64,
    pub(crate) next_sequence: u64,
    flushed_sequence: u64,
    next_put: u64,
    filling: HashMap<BlockId, (u64, Moment)>,
    // Writing.
    dirty: VecDeque<WriteItem>,
    dirty_bytes: u64,
    moved: VecDeque<WriteItem>,
    controls: VecDeque<Control>,
    payload_in_flight_bytes: u64,
    sync: Option<write::Sync>,
    first_unsynced: Option<Moment>,
    recorded_puts: VecDeque<(u64, u64)>,
    recorded_controls: VecDeque<(u64, u64)>,
    control_counts: HashMap<u64, (u64, u64)>,
    unflushed: UnflushedPuts,
    flush_waiters: Vec<FlushWaiter>,
    trouble: write::Trouble,
    /// Blocks that were given up while the device refused writes are to be queued again.
    retry_given_up: bool,
    // Reading.
    reading: HashMap<BlockId, read::Reading>,
    reads_in_flight: usize,
    // Tidying.
    policy: Box<dyn ReclaimPolicy + Send>,
    reclaim: Option<Reclaim>,
    checkpoint: Option<CheckpointWrite>,
    pub(crate) checkpoint_number: u64,
    /// Which of the two areas the next checkpoint goes to: not where the last one is.
    pub(crate) checkpoint_area: u32,
    sealed_since_checkpoint: u32,
    shutdown: Option<write::Shutdown>,
    // Plumbing.
    pending: HashMap<u64, Pending>,
    next_token: u64,
    pub(crate) out: Vec<(u64, Op)>,
    pub(crate) events: Vec<Event>,
    arrivals: HashMap<u64, Arrival>,
    arrival_order: VecDeque<u64>,
    next_arrival: u64,
    counters: Counters,
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
        Self {
            superblock: superblock.clone(),
            number,
            arena,
            index,
            segments: Segments::new(superblock),
            dram: Dram::new(config.dram_bytes),
            config,
            clock: CoarseClock::new(turnover),
            appended_bytes: 0,
            next_sequence: 1,
            flushed_sequence: 0,
            next_put: 1,
            filling: HashMap::new(),
            dirty: VecDeque::new(),
            dirty_bytes: 0,
            moved: VecDeque::new(),
            controls: VecDeque::new(),
            payload_in_flight_bytes: 0,
            sync: None,
            first_unsynced: None,
            recorded_puts: VecDeque::new(),
            recorded_controls: VecDeque::new(),
            control_counts: HashMap::new(),
            unflushed: UnflushedPuts::default(),
            flush_waiters: Vec::new(),
            trouble: write::Trouble::default(),
            retry_given_up: false,
            reading: HashMap::new(),
            reads_in_flight: 0,
            policy: Box::new(RecentlyUsed::new()),
            reclaim: None,
            checkpoint: None,
            checkpoint_number: 0,
            checkpoint_area: 0,
            sealed_since_checkpoint: 0,
            shutdown: None,
            pending: HashMap::new(),
            next_token: 1,
            out: Vec::new(),
            events: Vec::new(),
            arrivals: HashMap::new(),
            arrival_order: VecDeque::new(),
            next_arrival: 1,
            counters: Counters::default(),
        }
    }

    fn submit(&mut self, pending: Pending, op: Op) {
        let token = self.next_token;
        self.next_token += 1;
        self.pending.insert(token, pending);
        self.out.push((token, op));
    }

    /// The arrival number of a request: equal for all calls about one prompt, growing with time.
    fn arrival(&mut self, request: u64) -> u64 {
        if let Some(arrival) = self.arrivals.get(&request) {
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
            let looked_up = false;
            self.arrivals.insert(request, Arrival { number, looked_up });
        }
        number
    }

    /// Whether a request looked its chain up before: that counted as its touch.
    fn has_looked_up(&self, request: u64) -> bool {
        self.arrivals
            .get(&request)
            .is_some_and(|arrival| arrival.looked_up)
    }

    fn age(&self) -> impl Fn(u8) -> u8 + use<> {
        let (clock, appended) = (self.clock, self.appended_bytes);
        move |stamp| clock.age(stamp, appended)
    }

    fn stamp(&self) -> u8 {
        self.clock.stamp(self.appended_bytes)
    }

    /// Whether a block is visible; refreshes it.
    fn touch(&mut self, id: &BlockId, touch: Touch) -> bool {
        let found = self.index.find(id).map(|(at, _)| at);
        let counts = !self.has_looked_up(touch.request);
        if let Some(at) = found {
            let stamp = self.stamp();
            self.index.touch(at, stamp, counts);
        }
        if self.dram.get(id).is_some() {
            let arrival = self.arrival(touch.request);
            self.dram.touch(id, arrival, touch.depth, counts);
            return true;
        }
        found.is_some()
    }

    pub(crate) fn lookup(&mut self, ids: &[BlockId], request: u64) -> Vec<bool> {
        let present: Vec<bool> = ids
            .iter()
            .enumerate()
            .map(|(depth, id)| {
                self.touch(
                    id,
                    Touch {
                        request,
                        depth: depth as u32,
                    },
                )
            })
            .collect();
        if request != 0 {
            self.arrival(request);
            if let Some(arrival) = self.arrivals.get_mut(&request) {
                arrival.looked_up = true;
            }
        }
        self.counters.lookups += ids.len() as u64;
        self.counters.lookup_hits += present.iter().filter(|present| **present).count() as u64;
        present
    }

    pub(crate) fn stat(&self, id: &BlockId) -> Option<BlockStat> {
        let entry = self.index.find(id).map(|(_, entry)| entry);
        let resident = self.dram.get(id);
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
        })
    }

    pub(crate) fn put_begin(
        &mut self,
        now: Moment,
        request: &PutRequest,
    ) -> Result<PutTicket, PutOutcome> {
        let outcome = self.put_begin_inner(now, request);
        if let Err(outcome) = &outcome {
            self.counters.count_put(*outcome);
        }
        outcome
    }

    fn put_begin_inner(
        &mut self,
        now: Moment,
        request: &PutRequest,
    ) -> Result<PutTicket, PutOutcome> {
        let refused = |refusal| Err(PutOutcome::Refused(refusal));
        let count = request.sections.len();
        if count == 0 || count > SECTIONS_MAX || request.sections.iter().any(|(len, _)| *len == 0) {
            return refused(Refusal::WrongFormat);
        }
        let payload: u64 = request
            .sections
            .iter()
            .map(|(len, _)| u64::from(*len))
            .sum();
        if payload > self.superblock.block_bytes_max() {
            return refused(Refusal::TooBig);
        }
        if request.deadline <= now {
            return refused(Refusal::Deadline);
        }
        let touch = Touch {
            request: request.hints.request,
            depth: request.hints.depth,
        };
        if self.touch(&request.id, touch) {
            let known = self.dram.get(&request.id).map(|resident| resident.version);
            if known.is_some_and(|known| {
                known != version(request.sections.iter().map(|(_, check)| *check))
            }) {
                self.counters.id_divergence += 1;
            }
            return Err(PutOutcome::Exists);
        }
        if self
            .filling
            .get(&request.id)
            .is_some_and(|(_, until)| *until > now)
        {
            return Err(PutOutcome::InProgress);
        }
        if self.shutdown.is_some() {
            return refused(Refusal::Busy);
        }
        let plan = ImagePlan::new(&request.sections);
        if plan.bytes > self.superblock.image_bytes_max() {
            return refused(Refusal::TooBig);
        }
        let held_max = self.dram.put_limit_bytes(page_round_up(plan.bytes));
        let Some(buffer) = self.reserve_buffer(plan.bytes as usize, held_max) else {
            return refused(Refusal::Busy);
        };
        let number = self.next_put;
        self.next_put += 1;
        self.filling
            .insert(request.id, (number, request.deadline.after(FILLING_GRACE)));
        Ok(PutTicket {
            id: request.id,
            number,
            plan,
            buffer,
            hints: request.hints,
            durable: request.durable,
        })
    }

    /// A buffer that counts as DRAM, evicting for it; `None` when what is there cannot leave.
    /// What then cannot leave comes to `held_max` bytes at most.
    fn reserve_buffer(&mut self, bytes: usize, held_max: u64) -> Option<Buffer> {
        let padded = page_round_up(bytes as u64);
        for (_, state) in self.dram.reserve(padded, held_max)? {
            self.counters.count_dram_eviction(state);
        }
        // Memory that evicted blocks still hold for a reader, or gaps between blocks of several
        // sizes, can keep a run of pages from being free although the bytes are.
        loop {
            if let Some(buffer) = self.allocate_block(bytes) {
                return Some(buffer);
            }
            let Some((_, state)) = self.dram.evict() else {
                self.dram.release(padded);
                return None;
            };
            self.counters.count_dram_eviction(state);
        }
    }

    /// Memory for a block, if that leaves enough for pages.
    fn allocate_block(&self, bytes: usize) -> Option<Buffer> {
        let taken = self.arena.allocated_bytes() + page_round_up(bytes as u64) as usize;
        (taken + PAGES_RESERVE_BYTES <= self.arena.bytes())
            .then(|| self.arena.allocate(bytes))
            .flatten()
    }

    pub(crate) fn put_abort(&mut self, ticket: PutTicket) {
        self.counters.puts_aborted += 1;
        self.end_filling(&ticket);
        let PutTicket { buffer, .. } = ticket;
        self.dram.release(buffer.padded_len() as u64);
        drop(buffer);
    }

    fn end_filling(&mut self, ticket: &PutTicket) -> bool {
        let mine = self
            .filling
            .get(&ticket.id)
            .is_some_and(|(number, _)| *number == ticket.number);
        if mine {
            self.filling.remove(&ticket.id);
        }
        mine
    }

    pub(crate) fn put_commit(&mut self, now: Moment, token: u64, ticket: PutTicket) {
        let padded = ticket.buffer.padded_len() as u64;
        let mine = self.end_filling(&ticket);
        let PutTicket {
            id,
            number,
            plan,
            mut buffer,
            hints,
            durable,
        } = ticket;
        let outcome = if !mine {
            Err(PutOutcome::Refused(Refusal::Deadline))
        } else if self.dram.get(&id).is_some() || self.index.find(&id).is_some() {
            Err(PutOutcome::Exists)
        } else if !sections_hold(&id, &plan, buffer.as_slice()) {
            self.counters.put_checks_failed += 1;
            Err(PutOutcome::Refused(Refusal::WrongFormat))
        } else {
            Ok(())
        };
        if let Err(outcome) = outcome {
            self.dram.release(padded);
            self.counters.count_put(outcome);
            self.events.push(Event::Put { token, outcome });
            return;
        }
        plan.encode(&id, buffer.as_mut_slice());
        buffer.zero_padding();
        let bytes = plan
            .sections
            .iter()
            .map(|section| u64::from(section.len))
            .sum::<u64>();
        let version = version(plan.sections.iter().map(|section| section.check));
        let crc = head_crc(&id, &plan, buffer.as_slice());
        let arrival = self.arrival(hints.request);
        // While the device takes nothing, one block at a time tries it; the others may leave.
        let given_up = self.trouble.gave_up() && !durable && !self.dirty.is_empty();
        let volatile = hints.ephemeral || given_up;
        let image = buffer.freeze();
        self.dram.insert(
            id,
            Resident {
                image: image.clone(),
                sections: Arc::from(plan.sections.as_slice()),
                version,
                number,
                state: if volatile {
                    State::Volatile
                } else {
                    State::Dirty
                },
                depth: hints.depth,
                ephemeral: hints.ephemeral,
                arrival,
                early_touches: 0,
            },
        );
        self.counters.put_bytes += bytes;
        self.counters.count_put(PutOutcome::Stored);
        if volatile {
            self.events.push(Event::Put {
                token,
                outcome: PutOutcome::Stored,
            });
            return;
        }
        self.unflushed.add(number, now, durable.then_some(token));
        self.push_dirty(WriteItem {
            id,
            len: plan.bytes as u32,
            sectioned: plan.is_sectioned(),
            sections: plan.sections.len() as u16,
            crc,
            version,
            depth: hints.depth,
            image,
            source: write::Source::Put { number, since: now },
        });
        if !durable {
            self.events.push(Event::Put {
                token,
                outcome: PutOutcome::Stored,
            });
        }
    }

    pub(crate) fn remove(&mut self, token: u64, ids: &[BlockId]) {
        let mut found = 0;
        for id in ids {
            let was_resident = self.forget_resident(id);
            let was_indexed = self.index.remove(id).is_some();
            found += u64::from(was_resident || was_indexed);
            self.end_reads(id, MissReason::Removed);
            // Also when nothing is known of it: an older record may still stand on the device,
            // and would come back at the next recovery.
            self.controls.push_back(Control {
                kind: crate::layout::RECORD_TOMBSTONE,
                id: *id,
                token,
            });
        }
        self.counters.removed += found;
        self.start_controls(token, ids.len() as u64, found);
    }

    pub(crate) fn purge(&mut self, token: u64) {
        let on_flash_alone = self.index.len() as u64
            - self
                .dram
                .iter()
                .filter(|(id, _)| self.index.find(id).is_some())
                .count() as u64;
        let ids: Vec<_> = self.dram.iter().map(|(id, _)| *id).collect();
        let found = on_flash_alone + ids.len() as u64;
        for id in &ids {
            self.forget_resident(id);
        }
        self.dram.clear();
        self.index.clear();
        let reading: Vec<_> = self.reading.keys().copied().collect();
        for id in reading {
            self.end_reads(&id, MissReason::Removed);
        }
        self.counters.purged += found;
        let id = BlockId::new([0; 32]);
        self.controls.push_back(Control {
            kind: crate::layout::RECORD_PURGE,
            id,
            token,
        });
        self.start_controls(token, 1, found);
    }

    pub(crate) fn flush(&mut self, token: u64) {
        self.flush_waiters.push(FlushWaiter {
            token,
            up_to_put: self.next_put - 1,
        });
        if self.trouble.gave_up() {
            // What was given up is not flushed: it is tried once more, and the answer says how
            // that went.
            self.retry_given_up = true;
        } else {
            self.answer_flushes();
        }
    }

    /// Drops a resident and what waits for it to be flushed.
    fn forget_resident(&mut self, id: &BlockId) -> bool {
        let Some(gone) = self.dram.remove(id) else {
            return false;
        };
        if let Some(token) = self.unflushed.end(gone.number) {
            self.events.push(Event::Put {
                token,
                outcome: PutOutcome::Stored,
            });
        }
        true
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
            generation: self.segments.all[segment as usize].generation,
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
    }

    pub(crate) fn current_stamp(&self) -> u8 {
        self.stamp()
    }

    pub(crate) fn age_now(&self) -> impl Fn(u8) -> u8 + use<> {
        self.age()
    }

    /// A device operation is over.
    pub(crate) fn complete(&mut self, now: Moment, completion: Completion) {
        let Some(pending) = self.pending.remove(&completion.token) else {
            debug_assert!(false, "a completion has a pending operation");
            return;
        };
        let Completion { op, result, .. } = completion;
        match pending {
            Pending::Payload(group) => self.payload_done(now, group, result),
            Pending::SyncPage => self.sync_page_done(now, result),
            Pending::SyncFlush => self.sync_flush_done(now, result),
            Pending::PrepareHeader => self.prepare_header_done(now, result),
            Pending::PrepareFlush => self.prepare_flush_done(now, result),
            Pending::Read(read) => self.read_done(read, op, &result),
            Pending::MoveRead(read) => self.move_read_done(read, op, &result),
            Pending::ReclaimFooter { offset } => self.reclaim_footer_done(offset, op, &result),
            Pending::CheckpointChunk => self.checkpoint_chunk_done(now, result),
            Pending::CheckpointFlush => self.checkpoint_flush_done(now, result),
        }
    }

    /// Does what has become possible or due.
    pub(crate) fn step(&mut self, now: Moment) {
        self.step_reclaim();
        self.step_write(now);
        self.step_checkpoint();
        self.step_shutdown(now);
    }
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

/// A stored image, verified against its check64 and, section by section, its content checks.
pub(crate) fn verify_image(
    id: &BlockId,
    image: &[u8],
    sectioned: bool,
    check64: u64,
    place: &Place,
) -> Option<ImagePlan> {
    use kvar_base::check::fold_place;
    if !sectioned {
        let crc = crc64(image);
        let section = (
            image.len() as u32,
            ContentCheck::from_crc(crc, id, 0, image.len() as u32),
        );
        return (fold_place(crc, id, place) == check64).then(|| ImagePlan::new(&[section]));
    }
    let plan = ImagePlan::decode(id, image)?;
    let holds = fold_place(head_crc(id, &plan, image), id, place) == check64
        && sections_hold(id, &plan, image);
    holds.then_some(plan)
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
            stamp: 0,
        };
        let age = shard.age();
        shard.index.insert(&id, &entry, age);
        let frequency = |shard: &Shard| shard.find(&id).unwrap().1.frequency;
        let touch = |request| Touch { request, depth: 0 };
        shard.lookup(&[id], 5);
        shard.touch(&id, touch(5));
        shard.lookup(&[id], 5);
        assert_eq!(frequency(&shard), 1);
        shard.lookup(&[id], 6);
        shard.touch(&id, touch(6));
        assert_eq!(frequency(&shard), 2);
        // Calls that name no request stand for themselves; so does a get without a lookup.
        shard.touch(&id, touch(0));
        assert_eq!(frequency(&shard), 3);
        shard.index.insert(&id, &entry, |age| age);
        shard.touch(&id, touch(7));
        assert_eq!(frequency(&shard), 1);
        assert!(shard.find(&id).unwrap().1.touched);
    }
}
