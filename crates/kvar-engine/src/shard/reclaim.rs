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
//! Which blocks are kept is the policy's word: it is asked about every block whose index
//! entry still leads here, those worth most first; what is leased is kept without asking, and what
//! has expired is not. Until the footer is read, the largest share that may be kept is held free in
//! the open segment and the prepared one, so that keeping never waits for the segment it is to free.
//!
//! | file | question |
//! |---|---|
//! | `decide` | which blocks are kept, which go down, which go? |
//! | `moves` | how do kept blocks get to the log's head? |

mod decide;
mod moves;

use super::demote::Descent;
use super::records::{directory_records, footer_records};
use super::{Change, Displaced, Pending, Shard};
use crate::index::Entry;
use crate::layout::{PAGE, RECORDS_PER_PAGE, Record, RecordHints};
use crate::mutation::{Check, is_disabled};
use crate::segments::{SegmentPhase, Spare};
use kvar_base::{BlockId, PAGE_BYTES};
use kvar_io::{DeviceError, Op};
use std::collections::{HashSet, VecDeque};
use std::ops::Range;

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
    pub(super) fn segment(&self) -> u32 {
        self.segment
    }

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
        let Some(segment) = self.reclaim.as_ref().map(Reclaim::segment) else {
            return;
        };
        let opening = self.opening(segment);
        let Some(reclaim) = &mut self.reclaim else {
            return;
        };
        let footer = self
            .superblock
            .offset(self.number, segment, self.superblock.footer_page());
        let pages = if result.is_ok() {
            buffer.as_slice()
        } else {
            &[]
        };
        if offset == footer {
            if let Some(records) = footer_records(pages, &self.superblock, offset, &opening) {
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
                .extend(directory_records(pages, &self.superblock, offset, &opening));
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
}
