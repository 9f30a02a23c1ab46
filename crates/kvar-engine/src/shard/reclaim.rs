//! The oldest segment becomes free again.
//!
//! ```text
//!  none prepared, none free
//!      │ read the footer
//!      ▼
//!  Reading ──> Deciding (a segment is open) ──> Moving (kept blocks: from memory, or read and verified) ──> Settling ──> free
//!                 each is written at the log's head like a put              their records flushed,
//!                 the others go to the tier below, where there is one       readers gone
//! ```
//!
//! Which blocks are kept is the policy's word; this file asks it about every block whose index
//! entry still leads here, those worth most first; what is leased is kept without asking, and what
//! has expired is not. Of several tenants those within their parts keep what they have, whatever it is
//! worth (`Losses` of kvar-policy). While the write budget is short, what memory holds as well is not written
//! again: it is decided about when it leaves memory. Until the footer is read, the largest share that may be kept is held free in the
//! open segment and the prepared one, so that keeping never waits for the segment it is to free.

use super::demote::Descent;
use super::read::{Brought, MoveRead};
use super::write::{Source, WriteItem, stored_bytes};
use super::{Change, Displaced, Pending, Shard};
use crate::dram::State;
use crate::index::Entry;
use crate::layout::{
    PAGE, PageKind, RECORD_BLOCK, RECORDS_PER_PAGE, Record, RecordHints, decode_page,
};
use crate::mutation::{Check, is_disabled};
use crate::segments::{SegmentPhase, Spare};
use kvar_base::{BlockId, PAGE_BYTES};
use kvar_io::{DeviceError, Op};
use kvar_policy::Losses;
use std::cmp::Reverse;
use std::collections::{HashSet, VecDeque};
use std::ops::Range;

/// Bytes of kept blocks on their way from device to device at once; two of the largest fit.
const MOVING_BYTES_MAX: u64 = 8 << 20;

pub(super) enum Stage {
    Reading,
    Deciding,
    Moving,
    Settling { sequence: u64 },
}

/// One reclaim.
pub(super) struct Reclaim {
    segment: u32,
    pub(super) stage: Stage,
    /// Directory pages read so far where the footer was not whole.
    areas: VecDeque<u64>,
    records: Vec<Record>,
    /// Whether these are all the records the segment ever had.
    whole: bool,
    pub(super) kept: VecDeque<(BlockId, Entry, RecordHints)>,
    /// What is not kept and has a tier below.
    pub(super) descent: Descent,
    /// Bytes kept and not yet written.
    left_bytes: u64,
    /// Blocks kept and not yet written: each needs a record.
    left_blocks: usize,
    /// Bytes being read or waiting to be written.
    moving_bytes: u64,
}

impl Reclaim {
    pub(super) fn waits_for_flush(&self) -> bool {
        matches!(self.stage, Stage::Settling { .. })
    }

    /// Pages that puts must leave free in the open segment.
    pub(super) fn spare_pages(&self) -> u32 {
        // A seventh more for what is lost at the borders of directory areas.
        ((self.left_bytes + self.left_bytes / 7) / PAGE_BYTES) as u32
    }

    /// What puts and tombstones must leave free in the open segment.
    pub(super) fn spare(&self) -> Spare {
        Spare {
            pages: self.spare_pages(),
            records: self.left_blocks,
        }
    }

    pub(super) fn keep(&mut self, id: BlockId, entry: Entry, hints: RecordHints, bytes: u64) {
        self.left_bytes += bytes;
        self.left_blocks += 1;
        self.kept.push_back((id, entry, hints));
    }

    pub(super) fn left_bytes(&self) -> u64 {
        self.left_bytes
    }

    pub(super) fn left_blocks(&self) -> usize {
        self.left_blocks
    }

    fn left(&mut self, bytes: u64) {
        self.left_bytes = self.left_bytes.saturating_sub(bytes);
        self.left_blocks = self.left_blocks.saturating_sub(1);
    }

    pub(super) fn moved(&mut self, bytes: u64) {
        self.left(bytes);
        self.moving_bytes = self.moving_bytes.saturating_sub(bytes);
    }
}

impl Shard {
    pub(super) fn start_reclaim(&mut self) {
        let Some(segment) = self.segments.sealed.pop_front() else {
            return;
        };
        self.segments.get(segment).phase = SegmentPhase::Reclaiming;
        let most = self.superblock.payload_bytes();
        self.reclaim = Some(Reclaim {
            segment,
            stage: Stage::Reading,
            areas: VecDeque::new(),
            records: Vec::new(),
            whole: false,
            kept: VecDeque::new(),
            descent: Descent::default(),
            left_bytes: most,
            // Tombstones must leave the records that what is promised will need, also such as is
            // promised until it is decided about.
            left_blocks: (self.leases.at(&self.positions_of(segment)).len()).max(RECORDS_PER_PAGE),
            moving_bytes: 0,
        });
        let footer = self
            .superblock
            .offset(self.number, segment, self.superblock.footer_page());
        self.read_records(footer, self.superblock.footer_pages);
    }

    fn read_records(&mut self, offset: u64, pages: u32) {
        match self.arena.allocate(pages as usize * PAGE) {
            Some(buffer) => {
                self.submit(
                    Pending::ReclaimFooter { offset },
                    Op::Read { offset, buffer },
                );
            }
            None => self.records_complete(),
        }
    }

    pub(super) fn reclaim_footer_done(
        &mut self,
        offset: u64,
        op: Op,
        result: &Result<(), DeviceError>,
    ) {
        let Op::Read { buffer, .. } = op else {
            unreachable!("a read ends as a read")
        };
        let Some(reclaim) = &mut self.reclaim else {
            return;
        };
        let segment = reclaim.segment;
        let generation = self.segments.all[segment as usize].generation;
        let wanted = (
            self.superblock.device_segment(self.number, segment),
            generation,
        );
        let footer = self
            .superblock
            .offset(self.number, segment, self.superblock.footer_page());
        let pages = if result.is_ok() {
            buffer.as_slice()
        } else {
            &[]
        };
        if offset == footer {
            if let Some(records) = footer_records(pages, &self.superblock, offset, wanted) {
                reclaim.records = records;
                reclaim.whole = true;
                return self.records_complete();
            }
            reclaim.areas = self
                .superblock
                .areas()
                .map(|first| self.superblock.offset(self.number, segment, first))
                .collect();
        } else {
            reclaim
                .records
                .extend(directory_records(pages, &self.superblock, offset, wanted));
        }
        match reclaim.areas.pop_front() {
            Some(next) => self.read_records(next, self.superblock.area_pages),
            None => self.records_complete(),
        }
    }

    /// All records of the segment that can be had are here.
    fn records_complete(&mut self) {
        if let Some(reclaim) = &mut self.reclaim {
            reclaim.stage = Stage::Deciding;
        }
        self.decide();
    }

    /// Says which blocks are kept, once there is a segment for them to go to; right after a start
    /// on a full device there is none, and none to come.
    fn decide(&mut self) {
        let decides = self
            .reclaim
            .as_ref()
            .is_some_and(|reclaim| matches!(reclaim.stage, Stage::Deciding));
        if !decides || self.segments.open.is_none() && !self.segments.is_exhausted() {
            return;
        }
        let Some(mut reclaim) = self.reclaim.take() else {
            return;
        };
        let segment = reclaim.segment;
        let mut live = Vec::new();
        let mut seen = HashSet::new();
        for record in std::mem::take(&mut reclaim.records) {
            if record.kind != RECORD_BLOCK {
                continue;
            }
            let position = self.segments.position(segment, record.place.get());
            if let Some((_, entry)) = self.find(&record.id())
                && entry.position == position
                && seen.insert(position)
            {
                live.push((record.id(), entry, record.hints()));
            }
        }
        if !reclaim.whole {
            // Of what is promised the lease knows the id, whatever became of its record.
            let positions = self.positions_of(segment);
            for id in self.leases.at(&positions) {
                if let Some((_, entry)) = self.find(&id)
                    && positions.contains(&entry.position)
                    && seen.insert(entry.position)
                {
                    let hints = RecordHints {
                        expires_unix_s: self.flash_expiry(&entry),
                        tenant: entry.tenant,
                        ..RecordHints::default()
                    };
                    live.push((id, entry, hints));
                }
            }
        }
        if !reclaim.whole {
            // What the records do not name goes now, before somebody is promised it.
            self.drop_strays(segment, &seen);
        }
        let opened_at = self.segments.get(segment).opened_at;
        self.keep.set_oldest(opened_at);
        let costs = |(_, entry, hints): &(_, Entry, RecordHints)| {
            (hints.recompute_us, Self::demand_of(entry))
        };
        self.keep.remind_of_costs(live.iter().map(costs));
        let mut live: Vec<_> = live
            .into_iter()
            .map(|(id, entry, hints)| {
                let worth = self.worth_of(&entry, &hints);
                (
                    self.leases.holds(&id),
                    worth,
                    Reverse(hints.depth),
                    id,
                    entry,
                    hints,
                )
            })
            .collect();
        // What is promised goes on before anything else, as far as there is room at all; then what
        // is worth most, of equals the head.
        live.sort_by(|a, b| {
            (b.0.cmp(&a.0))
                .then(b.1.total_cmp(&a.1))
                .then(b.2.cmp(&a.2))
                .then(a.3.cmp(&b.3))
        });
        (reclaim.left_bytes, reclaim.left_blocks) = (0, 0);
        let (most, room) = self.room_for_kept();
        // Nobody's promise is broken where nothing is promised.
        let has_leased = live.first().is_some_and(|(leased, ..)| *leased);
        let entitled_most = if has_leased { most } else { room };
        let records_max = self.records_for_kept();
        let time = Self::budget_time(self.now);
        let has_room = self.budget.has_room(0, time);
        let has_plenty = self.budget.has_plenty(0, time);
        live.retain(|(_, _, _, id, entry, hints)| {
            let is_over = self.is_over(self.now, id, hints.expires_unix_s);
            if is_over {
                self.drop_expired(id, entry.position);
            }
            !is_over
        });
        let held = self.index.holdings();
        let mut losses = Losses::new(&self.config.shares, self.capacity_bytes(), held);
        for (.., entry, _) in &live {
            losses.announce(entry.tenant, entry.stored_bytes());
        }
        self.keep.keeper_mut().begin_reclaim();
        let is_late = self.below_is_late();
        for (_, worth, _, id, entry, hints) in live {
            let leased = self.leases.protects(&id);
            let bytes = entry.stored_bytes();
            let entitled = losses.is_entitled(entry.tenant, bytes);
            // While the budget is short, memory keeps for a time what it holds, too; not at the end
            // of the process.
            let waits = !has_plenty
                && self.shutdown.is_none()
                && self
                    .dram
                    .get(&id)
                    .is_some_and(|resident| resident.state == State::Clean);
            let after = reclaim.left_bytes + bytes;
            let keeps = if reclaim.left_blocks >= records_max {
                false
            } else if leased {
                after <= room
            } else if entitled {
                has_room && after <= entitled_most && self.keep.keeper_mut().keeps_entitled(bytes)
            } else {
                // What was to be read once, a turnover ago, nobody waits for any more.
                let is_wanted = !waits && !hints.handover && has_room && after <= most;
                is_wanted && self.keep.keeper_mut().keeps(worth, bytes)
            };
            if keeps {
                self.budget.spend(bytes);
                reclaim.keep(id, entry, hints, bytes);
                self.by_tenant[entry.tenant.index()].kept_entitled += u64::from(entitled);
            } else if self.goes_down(&id, &hints) {
                if is_late {
                    self.drop_late(&id, &entry);
                } else {
                    reclaim.descent.waiting.push_back((id, entry, hints));
                }
            } else {
                losses.lost(entry.tenant, bytes);
                self.index.remove_at(&id, entry.position);
                self.note_displaced(entry.position, Displaced::Reclaim);
                let state = if waits { State::Held } else { State::Volatile };
                let cost = self.keep.cost(hints.recompute_us, Self::demand_of(&entry));
                self.dram.set_hints(&id, &hints, cost);
                self.drop_flash_copy(&id, &entry, state);
            }
        }
        self.keep.end_reclaim();
        reclaim.stage = Stage::Moving;
        self.reclaim = Some(reclaim);
    }

    /// Blocks for which there is a record: tombstones may have taken those of the open segment.
    pub(super) fn records_for_kept(&self) -> usize {
        let next = self.segments.prepared.is_some() || self.segments.preparing.is_some();
        match &self.segments.open {
            Some(_) if next => usize::MAX,
            Some(open) => open.records_left(),
            None => 0,
        }
    }

    /// Bytes of what is kept that there is room for, of what nobody was promised and of all: with no
    /// segment open (right after a start on a full device) there is nowhere to go.
    pub(super) fn room_for_kept(&self) -> (u64, u64) {
        let Some(open) = &self.segments.open else {
            return (0, 0);
        };
        // Another one may be on its way already: then what does not fit here goes there.
        let next = self.segments.prepared.is_some() || self.segments.preparing.is_some();
        let left = u64::from(open.pages_left()) * PAGE_BYTES;
        let more = if next {
            self.superblock.payload_bytes()
        } else {
            0
        };
        let room = left + more;
        // Some is lost at the borders of directory areas, and what is in memory goes before what must
        // be read: blocks that nobody was promised leave that much free for those that were.
        (room / 8 * 7, room)
    }

    /// What puts and tombstones must leave free in the open segment for what reclaim brings: a
    /// prepared segment takes its part of that.
    pub(super) fn spare(&self) -> Spare {
        let wanted = self
            .reclaim
            .as_ref()
            .map_or_else(Spare::default, Reclaim::spare);
        if self.segments.prepared.is_none() {
            return wanted;
        }
        // A seventh of it is lost at the borders of directory areas.
        let pages = (self.superblock.payload_bytes() / PAGE_BYTES) as u32;
        Spare {
            pages: wanted.pages.saturating_sub(pages - pages / 7),
            records: 0,
        }
    }

    /// Reclaim gave up the copy on the device; one in memory is the last, and in this state now.
    pub(super) fn drop_flash_copy(&mut self, id: &BlockId, entry: &Entry, state: State) {
        if self
            .dram
            .get(id)
            .is_some_and(|resident| resident.state == State::Clean)
        {
            self.dram.set_state(id, state);
            self.counters.reclaim_to_memory += 1;
        } else {
            self.counters.reclaim_dropped += 1;
        }
        if self.dram.get(id).is_none() {
            self.by_tenant[entry.tenant.index()].evicted += 1;
            self.let_go(id, entry.class());
            self.counters.leased_dropped += u64::from(self.lose_lease(id));
        }
    }

    pub(super) fn step_reclaim(&mut self) {
        self.decide();
        self.start_moves();
        self.step_descent();
        if self.segments.is_exhausted() {
            self.give_up_moves();
        }
        let has_descended = self.has_descended();
        let Some(reclaim) = &mut self.reclaim else {
            return;
        };
        let moving = reclaim.moving_bytes > 0
            || !reclaim.kept.is_empty()
            || !self.moved.is_empty()
            || !has_descended;
        if matches!(reclaim.stage, Stage::Moving) && !moving {
            (reclaim.left_bytes, reclaim.left_blocks) = (0, 0);
            reclaim.stage = Stage::Settling {
                sequence: self.next_sequence - 1,
            };
        }
        let Stage::Settling { sequence } = reclaim.stage else {
            return;
        };
        let (segment, whole) = (reclaim.segment, reclaim.whole);
        if self.flushed_sequence < sequence
            && self.has_unflushed_records()
            && !is_disabled(Check::FlushBeforeReuse)
        {
            return;
        }
        if self.segments.all[segment as usize].readers > 0 && !is_disabled(Check::Readers) {
            return;
        }
        if !whole {
            self.drop_strays(segment, &HashSet::new());
        }
        self.reclaim = None;
        let freed = self.segments.get(segment);
        freed.phase = SegmentPhase::Free;
        self.segments.free.push_back(segment);
        self.counters.segments_reclaimed += 1;
        debug_assert_eq!(self.recount(), Ok(()), "after a reclaim");
    }

    fn positions_of(&self, segment: u32) -> Range<u32> {
        self.segments.position(segment, 0)..self.segments.position(segment + 1, 0)
    }

    /// Takes out the entries that lead to a segment, but for those at `named` positions.
    fn drop_strays(&mut self, segment: u32, named: &HashSet<u32>) {
        let positions = self.positions_of(segment);
        let Self {
            index,
            journal,
            by_tenant,
            ..
        } = self;
        let stray = index.retain(|entry| {
            let stays = !positions.contains(&entry.position) || named.contains(&entry.position);
            by_tenant[entry.tenant.index()].evicted += u64::from(!stays);
            if let Some(journal) = journal.as_mut().filter(|_| !stays) {
                journal.push(Change::Displaced {
                    position: entry.position,
                    id: None,
                    why: Displaced::Reclaim,
                });
            }
            stays
        });
        self.counters.reclaim_dropped += stray as u64;
        self.lose_strayed_leases(positions);
    }

    pub(super) fn has_unflushed_records(&self) -> bool {
        self.sync.is_some()
            || [&self.segments.open, &self.segments.sealing]
                .into_iter()
                .flatten()
                .any(crate::segments::OpenSegment::has_unwritten)
    }

    /// Brings kept blocks to the write queue, a window at a time.
    fn start_moves(&mut self) {
        loop {
            let Some(reclaim) = &mut self.reclaim else {
                return;
            };
            if !matches!(reclaim.stage, Stage::Moving) || reclaim.moving_bytes >= MOVING_BYTES_MAX {
                return;
            }
            let Some((id, entry, hints)) = reclaim.kept.pop_front() else {
                return;
            };
            let bytes = stored_bytes(entry.len);
            if self
                .index
                .find(&id)
                .is_none_or(|(_, now)| now.position != entry.position)
            {
                reclaim.left(bytes);
                continue;
            }
            reclaim.moving_bytes += bytes;
            let resident = self
                .dram
                .get(&id)
                .filter(|resident| resident.state == State::Clean);
            if let Some(resident) = resident.cloned() {
                let plan = crate::layout::ImagePlan::new(
                    &resident
                        .sections
                        .iter()
                        .map(|section| (section.len, section.check))
                        .collect::<Vec<_>>(),
                );
                let crc = super::head_crc(&id, &plan, resident.image.as_slice());
                self.moved.push_back(WriteItem {
                    id,
                    len: plan.bytes as u32,
                    sectioned: plan.is_sectioned(),
                    sections: plan.sections.len() as u16,
                    crc,
                    version: resident.version,
                    hints,
                    image: resident.image,
                    source: Source::Moved {
                        from: entry.position,
                    },
                });
                continue;
            }
            let place = self.place_of(&entry);
            let (segment, _) = self.segments.locate(entry.position);
            match self.allocate_block(entry.len as usize) {
                Some(buffer) => {
                    self.segments.get(segment).readers += 1;
                    self.counters.device_read_bytes += bytes;
                    let read = MoveRead {
                        id,
                        entry,
                        place,
                        segment,
                        hints,
                        goes_down: false,
                        is_again: false,
                    };
                    self.submit(
                        Pending::MoveRead(read),
                        Op::Read {
                            offset: place.offset,
                            buffer,
                        },
                    );
                }
                None => self.give_up_move(&id, &entry),
            }
        }
    }

    pub(super) fn give_up_move(&mut self, id: &BlockId, entry: &Entry) {
        if let Some(reclaim) = &mut self.reclaim {
            reclaim.moved(stored_bytes(entry.len));
        }
        if self.index.remove_at(id, entry.position) {
            self.note_displaced(entry.position, Displaced::Reclaim);
            self.drop_flash_copy(id, entry, State::Held);
        }
    }

    /// The open segment was given up (its device refused a write) and there is no other: what is
    /// kept has nowhere to go, and only letting it go frees the next segment.
    fn give_up_moves(&mut self) {
        for item in std::mem::take(&mut self.moved) {
            if let Source::Moved { from } = item.source {
                self.give_up_item(&item.id, item.len, from);
            }
        }
        let Some(reclaim) = &mut self.reclaim else {
            return;
        };
        for (id, entry, _) in std::mem::take(&mut reclaim.kept) {
            if self.index.remove_at(&id, entry.position) {
                self.note_displaced(entry.position, Displaced::Reclaim);
                self.drop_flash_copy(&id, &entry, State::Held);
            }
        }
    }

    /// As [`give_up_move`](Self::give_up_move), of a block that is queued.
    pub(super) fn give_up_item(&mut self, id: &BlockId, len: u32, from: u32) {
        match self.find(id) {
            Some((_, entry)) if entry.position == from => self.give_up_move(id, &entry),
            _ => {
                if let Some(reclaim) = &mut self.reclaim {
                    reclaim.moved(stored_bytes(len));
                }
            }
        }
    }

    pub(super) fn move_read_done(
        &mut self,
        read: MoveRead,
        op: Op,
        result: &Result<(), DeviceError>,
    ) {
        let Op::Read { buffer, offset } = op else {
            unreachable!("a read ends as a read")
        };
        let MoveRead {
            id,
            entry,
            place,
            segment,
            hints,
            goes_down,
            is_again,
        } = read;
        let plan = match self.brought(&id, &entry, &place, &buffer, result, is_again) {
            Brought::Block(plan) => plan,
            Brought::Again => {
                let is_again = true;
                let read = MoveRead { is_again, ..read };
                return self.submit(Pending::MoveRead(read), Op::Read { offset, buffer });
            }
            Brought::Nothing => {
                self.segments.get(segment).readers -= 1;
                if goes_down {
                    return self.read_to_offer(&read, buffer, None);
                }
                return self.give_up_move(&id, &entry);
            }
        };
        self.segments.get(segment).readers -= 1;
        if goes_down {
            return self.read_to_offer(&read, buffer, Some(&plan));
        }
        let crc = super::head_crc(&id, &plan, buffer.as_slice());
        let version = kvar_base::check::version(plan.sections.iter().map(|section| section.check));
        self.moved.push_back(WriteItem {
            id,
            len: entry.len,
            sectioned: entry.sectioned,
            sections: plan.sections.len() as u16,
            crc,
            version,
            hints,
            image: buffer.freeze(),
            source: Source::Moved {
                from: entry.position,
            },
        });
    }
}

/// Whether a page is of this segment and of its present generation.
fn is_wanted(found: (u32, u32), wanted: (u32, u32)) -> bool {
    found.0 == wanted.0 && (found.1 == wanted.1 || is_disabled(Check::Generation))
}

/// The records of a footer, if it is whole.
pub(crate) fn footer_records(
    pages: &[u8],
    superblock: &crate::layout::Superblock,
    offset: u64,
    wanted: (u32, u32),
) -> Option<Vec<Record>> {
    let mut records = Vec::new();
    let mut count = 1;
    for (number, page) in pages.chunks_exact(PAGE).enumerate() {
        if number >= count {
            return Some(records);
        }
        let (head, found) = decode_page(page, superblock, offset + (number * PAGE) as u64)?;
        let mine = head.kind == PageKind::Footer
            && is_wanted((head.segment, head.generation), wanted)
            && usize::from(head.page_number) == number;
        if !mine {
            return None;
        }
        count = usize::from(head.page_count);
        records.extend(found);
    }
    (!pages.is_empty() && pages.len() / PAGE >= count).then_some(records)
}

/// The records of whatever pages of a directory area are whole.
pub(crate) fn directory_records(
    pages: &[u8],
    superblock: &crate::layout::Superblock,
    offset: u64,
    wanted: (u32, u32),
) -> Vec<Record> {
    pages
        .chunks_exact(PAGE)
        .enumerate()
        .filter_map(|(number, page)| decode_page(page, superblock, offset + (number * PAGE) as u64))
        .filter(|(head, _)| {
            head.kind == PageKind::Directory && is_wanted((head.segment, head.generation), wanted)
        })
        .flat_map(|(_, records)| records)
        .collect()
}
