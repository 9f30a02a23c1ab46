//! Sealed segments are read and verified in the background, before somebody finds out the hard way.
//!
//! ```text
//!  resting ── a day since the pass began, a segment is sealed ──> records of the oldest segment
//!     ^                                                                │ footer, or directories
//!     │ no segment left: pass over                                     v
//!     └──────────────── next segment <── no block left ── block, block, block ...
//! ```
//!
//! Two things pace it: `scrub_bytes_per_s`, and that nothing else is going on. A copy that does not
//! pass its check is removed and counted, as if a reader had met it. Nothing is remembered across
//! a restart: a pass begins with the oldest segment again.
//!
//! What must always be true: it never makes a caller wait, nor takes memory that a block could
//! have; one read of it at most is under way.

use super::read::Brought;
use super::records::{Opening, directory_records, footer_records};
use super::{Pending, Shard};
use crate::index::Entry;
use crate::layout::{PAGE, RECORD_BLOCK, Record};
use crate::mutation::{Check, is_disabled};
use crate::segments::SegmentPhase;
use kvar_base::check::Place;
use kvar_base::{BlockId, Moment, page_round_up};
use kvar_io::{DeviceError, Op};
use std::collections::VecDeque;
use std::time::Duration;

/// How long a shard must have had nothing to do before a read of the scrub.
const QUIET: Duration = Duration::from_millis(20);
/// A pass begins this long after the last one began, at the earliest: bits rot over months, so more
/// is wear and noise.
const PASS_EVERY: Duration = Duration::from_secs(24 * 3600);
/// How long it waits for memory.
const MEMORY_PAUSE: Duration = Duration::from_secs(1);

/// How long it waits after a read that failed.
const ERROR_PAUSE: Duration = Duration::from_secs(60);

/// What the scrub is at.
#[derive(Default)]
pub(super) struct Scrub {
    stage: Stage,
    /// When this pass began.
    begun: Option<Moment>,
    /// Segments opened up to this number are done in this pass.
    done_through: u64,
    /// The next read, at the earliest.
    not_before: Moment,
    in_flight: bool,
    pass_bytes: u64,
    pub(super) passes: u64,
    pub(super) last_pass_unix_s: u64,
}

#[derive(Default)]
enum Stage {
    /// No segment is being looked at.
    #[default]
    Between,
    Records(Found),
    Blocks(Found),
}

/// A segment and what it is known to hold.
struct Found {
    segment: u32,
    opening: Opening,
    areas: VecDeque<u64>,
    records: Vec<Record>,
    blocks: VecDeque<BlockId>,
}

/// A read of the scrub under way.
#[derive(Clone, Copy)]
pub(super) enum ScrubRead {
    Records {
        offset: u64,
    },
    Block {
        id: BlockId,
        entry: Entry,
        place: Place,
        is_again: bool,
    },
}

impl Shard {
    fn has_nothing_to_do(&self) -> bool {
        self.reads_in_flight == 0
            && self.payload_in_flight_bytes == 0
            && self.dirty.is_empty()
            && self.sync.is_none()
            && self.reclaim.is_none()
            && self.checkpoint.is_none()
            && self.shutdown.is_none()
            && self.trouble.until.is_none()
    }

    /// When the scrub has something to do even if nothing happens.
    pub(super) fn scrub_timer(&self) -> Option<Moment> {
        let wanted = self.config.scrub_bytes_per_s > 0
            && !self.scrub.in_flight
            && !self.segments.sealed.is_empty()
            // What else is going on ends with a completion or a timer of its own; asked again then.
            && self.has_nothing_to_do();
        wanted.then(|| self.scrub.not_before.max(self.last_call.after(QUIET)))
    }

    pub(super) fn step_scrub(&mut self, now: Moment) {
        if self.scrub_timer().is_none_or(|at| at > now) {
            return;
        }
        // Segments without a live block take no read: a few are stepped over at once.
        for _ in 0..8 {
            if self.scrub.in_flight || self.scrub.not_before > now {
                return;
            }
            self.scrub_one(now);
        }
    }

    fn scrub_one(&mut self, now: Moment) {
        match std::mem::take(&mut self.scrub.stage) {
            Stage::Between => self.next_scrub_segment(now),
            Stage::Records(found) if self.is_still(&found) => {
                self.scrub.stage = Stage::Records(found);
                self.read_scrub_records(now);
            }
            Stage::Blocks(found) if self.is_still(&found) => self.scrub_block(now, found),
            // Reclaimed meanwhile: what lives on lies elsewhere by now.
            Stage::Records(_) | Stage::Blocks(_) => {}
        }
    }

    fn is_still(&self, found: &Found) -> bool {
        let segment = &self.segments.all[found.segment as usize];
        segment.phase == SegmentPhase::Sealed && self.opening(found.segment) == found.opening
    }

    fn next_scrub_segment(&mut self, now: Moment) {
        let begun = *self.scrub.begun.get_or_insert(now);
        let done = self.scrub.done_through;
        let next = self
            .segments
            .sealed
            .iter()
            .map(|number| (self.segments.all[*number as usize].opened_sequence, *number))
            .filter(|(opened, _)| *opened > done)
            .min();
        let Some((opened, segment)) = next else {
            self.scrub.passes += 1;
            self.scrub.last_pass_unix_s = self.unix_s(now);
            self.scrub.done_through = 0;
            self.scrub.begun = None;
            self.scrub.pass_bytes = 0;
            self.scrub.not_before = begun.after(PASS_EVERY).max(now.after(QUIET));
            return;
        };
        self.scrub.done_through = opened;
        let footer = self
            .superblock
            .offset(self.number, segment, self.superblock.footer_page());
        self.scrub.stage = Stage::Records(Found {
            segment,
            opening: self.opening(segment),
            areas: VecDeque::from([footer]),
            records: Vec::new(),
            blocks: VecDeque::new(),
        });
    }

    /// Reads the next pages of records, or goes on to the blocks when there are none left.
    fn read_scrub_records(&mut self, now: Moment) {
        let Stage::Records(found) = &self.scrub.stage else {
            return;
        };
        let Some(offset) = found.areas.front().copied() else {
            return self.scrub_records_complete();
        };
        let footer =
            self.superblock
                .offset(self.number, found.segment, self.superblock.footer_page());
        let pages = if offset == footer {
            self.superblock.footer_pages
        } else {
            self.superblock.area_pages
        };
        let Some(buffer) = self.allocate_block(pages as usize * PAGE) else {
            self.scrub.not_before = now.after(MEMORY_PAUSE);
            return;
        };
        if let Stage::Records(found) = &mut self.scrub.stage {
            found.areas.pop_front();
        }
        self.pace_scrub(now, buffer.padded_len() as u64);
        self.scrub.in_flight = true;
        self.submit(
            Pending::Scrub(ScrubRead::Records { offset }),
            Op::Read { offset, buffer },
        );
    }

    fn pace_scrub(&mut self, now: Moment, bytes: u64) {
        let rate = self.config.scrub_bytes_per_s.max(1);
        let takes = Duration::from_micros(bytes.saturating_mul(1_000_000) / rate);
        self.scrub.not_before = self.scrub.not_before.max(now).after(takes);
        self.scrub.pass_bytes += bytes;
        self.counters.scrub_read_bytes += bytes;
    }

    fn scrub_records_complete(&mut self) {
        let Stage::Records(mut found) = std::mem::take(&mut self.scrub.stage) else {
            return;
        };
        for record in std::mem::take(&mut found.records) {
            let position = self.segments.position(found.segment, record.place.get());
            let leads_here = |entry: Entry| entry.position == position;
            if record.kind == RECORD_BLOCK
                && self
                    .find(&record.id())
                    .is_some_and(|(_, entry)| leads_here(entry))
            {
                found.blocks.push_back(record.id());
            }
        }
        self.scrub.stage = Stage::Blocks(found);
    }

    fn scrub_block(&mut self, now: Moment, mut found: Found) {
        let Some(id) = found.blocks.pop_front() else {
            self.counters.scrub_segments += 1;
            return;
        };
        let here = self
            .find(&id)
            .filter(|(_, entry)| self.segments.locate(entry.position).0 == found.segment);
        let Some((_, entry)) = here else {
            self.scrub.stage = Stage::Blocks(found);
            return;
        };
        if self.is_over(now, &id, self.flash_expiry(&entry)) {
            self.drop_expired(&id, entry.position);
            self.scrub.stage = Stage::Blocks(found);
            return;
        }
        let Some(buffer) = self.allocate_block(entry.len as usize) else {
            found.blocks.push_front(id);
            self.scrub.stage = Stage::Blocks(found);
            self.scrub.not_before = now.after(MEMORY_PAUSE);
            return;
        };
        self.segments.get(found.segment).readers += 1;
        self.scrub.stage = Stage::Blocks(found);
        let place = self.place_of(&entry);
        self.pace_scrub(now, page_round_up(u64::from(entry.len)));
        self.scrub.in_flight = true;
        self.submit(
            Pending::Scrub(ScrubRead::Block {
                id,
                entry,
                place,
                is_again: false,
            }),
            Op::Read {
                offset: place.offset,
                buffer,
            },
        );
    }

    pub(super) fn scrub_read_done(
        &mut self,
        now: Moment,
        read: ScrubRead,
        op: Op,
        result: &Result<(), DeviceError>,
    ) {
        let Op::Read { buffer, offset } = op else {
            unreachable!("a read ends as a read")
        };
        self.scrub.in_flight = false;
        if result.is_err() {
            // A bad sector, or a device on its way out: the next read will tell, not at full pace.
            self.scrub.not_before = self.scrub.not_before.max(now.after(ERROR_PAUSE));
        }
        match read {
            ScrubRead::Block {
                id,
                entry,
                place,
                is_again,
            } => {
                let brought = (!is_disabled(Check::Scrub))
                    .then(|| self.brought(&id, &entry, &place, &buffer, result, is_again));
                if matches!(brought, Some(Brought::Again)) {
                    self.scrub.in_flight = true;
                    let read = ScrubRead::Block {
                        id,
                        entry,
                        place,
                        is_again: true,
                    };
                    return self.submit(Pending::Scrub(read), Op::Read { offset, buffer });
                }
                let holds = !matches!(brought, Some(Brought::Nothing));
                let (segment, _) = self.segments.locate(entry.position);
                self.segments.get(segment).readers -= 1;
                self.counters.scrub_blocks += 1;
                self.counters.scrub_corrupt += u64::from(!holds);
            }
            ScrubRead::Records { offset } => {
                let Stage::Records(found) = &mut self.scrub.stage else {
                    return;
                };
                let opening = found.opening;
                let footer = self.superblock.offset(
                    self.number,
                    found.segment,
                    self.superblock.footer_page(),
                );
                let pages = if result.is_ok() {
                    buffer.as_slice()
                } else {
                    &[]
                };
                if offset != footer {
                    let records = directory_records(pages, &self.superblock, offset, &opening);
                    found.records.extend(records);
                } else if let Some(records) =
                    footer_records(pages, &self.superblock, offset, &opening)
                {
                    found.records = records;
                } else {
                    self.counters.scrub_footers_damaged += 1;
                    found.areas = self
                        .superblock
                        .areas()
                        .map(|first| self.superblock.offset(self.number, found.segment, first))
                        .collect();
                }
            }
        }
    }

    /// Bytes read in this pass, and of how many segments it is through.
    pub(super) fn scrub_progress(&self) -> (u64, u64) {
        let through = self
            .segments
            .sealed
            .iter()
            .filter(|number| {
                self.segments.all[**number as usize].opened_sequence <= self.scrub.done_through
            })
            .count() as u64;
        (self.scrub.pass_bytes, through)
    }
}
