//! From the queues to the open segment, and the record of what arrived there.
//!
//! ```text
//!  dirty, moved, controls ── place ──> payload writes ── record ──> directory pages ── flush ──> answered
//!                              │        (here)             (here)         (`sync`: one at a time)
//!                   segment full: sealing ── all recorded ── footer + flush ──> sealed
//!                   prepared segment opens; the next is prepared: header ── flush      (`prepare`)
//! ```
//!
//! Payload goes out in gather writes of up to 1 MiB while at most so many bytes are under way as the
//! device was found to want when it was formatted: several writes are needed to keep a drive busy,
//! more only make reads wait. While reads are under way it is half of that, unless somebody waits for
//! a flush or memory fills up.
//!
//! What must always be true: a block gets its record and its index entry when its bytes are on the
//! device, not before; room that reclaim may still need is not given to puts; a block that was
//! removed or replaced meanwhile gets neither record nor entry.
//!
//! Left to others: `sync` says who is answered and when, `trouble` what becomes of blocks that the
//! device refuses.

use super::{Change, Displaced, Pending, Shard};
use crate::dram::State;
use crate::index::{Entry, Inserted};
use crate::layout::{FLAG_SECTIONED, RECORD_BLOCK, Record, RecordHints};
use crate::mutation::{Check, is_disabled};
use crate::segments::OpenSegment;
use crate::segments::Spare;
use kvar_base::{BlockId, Moment, PAGE_BYTES, page_round_up};
use kvar_io::{DeviceError, Lifetime, Op, Shared};
use kvar_policy::{BlockClass, Tenant};
use std::time::Duration;

/// A gather write as the device sees it.
const WRITE_BYTES: u64 = 1 << 20;
/// Blocks of a gather write of the usual 64 KiB: room for them is taken at once.
const GROUP_ITEMS: usize = (WRITE_BYTES / (64 << 10)) as usize;
/// Payload bytes under way at most where the device was not probed.
const PAYLOAD_IN_FLIGHT_DEFAULT: u64 = 8 << 20;

/// Who wants a block written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// A put.
    Put { number: u64, since: Moment },
    /// Reclaim: the block lies at this position and its segment is to be free.
    Moved { from: u32 },
}

/// A block to be written.
#[derive(Clone, Debug)]
pub(super) struct WriteItem {
    pub(super) id: BlockId,
    pub(super) image: Shared,
    pub(super) len: u32,
    pub(super) sectioned: bool,
    pub(super) sections: u16,
    pub(super) crc: u64,
    pub(super) version: u64,
    pub(super) hints: RecordHints,
    pub(super) source: Source,
}

/// A tombstone or purge to be recorded.
pub(super) struct Control {
    pub(super) kind: u8,
    pub(super) id: BlockId,
    /// Whose blocks a purge of one tenant is about.
    pub(super) tenant: Tenant,
    pub(super) token: u64,
}

struct PlacedItem {
    item: WriteItem,
    page: u32,
    area: usize,
}

/// One gather write under way.
pub(super) struct WriteGroup {
    segment: u32,
    bytes: u64,
    items: Vec<PlacedItem>,
}

impl Shard {
    pub(super) fn push_dirty(&mut self, item: WriteItem) {
        self.budget.spend(item.image.padded_len() as u64);
        self.dirty_bytes += item.image.padded_len() as u64;
        self.dirty.push_back(item);
    }

    /// Whether somebody waits for a flush.
    pub(super) fn in_a_hurry(&self) -> bool {
        !self.control_counts.is_empty()
            || !self.flush_waiters.is_empty()
            || self.shutdown.is_some()
            || self
                .reclaim
                .as_ref()
                .is_some_and(super::reclaim::Reclaim::waits_for_flush)
            || self.unflushed.durable > 0
            || self.checkpoint_waits_for_flush()
    }

    /// How long a put may stay in the queue: a quarter of what was promised, so that the write, the
    /// directory and the flush behind it fit into the rest.
    pub(super) fn linger(&self) -> Duration {
        self.config.flush_after / 4
    }

    pub(super) fn step_write(&mut self, now: Moment) {
        if std::mem::take(&mut self.retry_given_up) {
            self.queue_given_up(now);
        }
        if self.trouble.until.is_some_and(|until| until > now) {
            return self.answer_flushes();
        }
        self.trouble.until = None;
        self.step_segments();
        self.place_controls();
        self.write_payload(now);
        self.step_segments();
        self.start_sync(now);
        self.answer_flushes();
    }

    fn place_controls(&mut self) {
        while let Some(control) = self.controls.pop_front() {
            let spare = Spare {
                pages: 0,
                ..self.spare()
            };
            let Some(open) = &mut self.segments.open else {
                return self.controls.push_front(control);
            };
            let Some(placed) = open.place(0, spare) else {
                self.controls.push_front(control);
                if !self.reclaim_needs_open() && self.close_open() {
                    continue;
                }
                return;
            };
            let sequence = self.next_sequence;
            self.next_sequence += 1;
            open.record(
                placed.area,
                Record::bare(control.kind, &control.id, sequence).of_tenant(control.tenant),
            );
            self.recorded_controls.push_back((sequence, control.token));
        }
    }

    /// Whether what is queued should go out now.
    fn payload_is_due(&self, now: Moment) -> bool {
        let linger = self.linger();
        self.dirty_bytes >= WRITE_BYTES
            || self.in_a_hurry()
            || self.memory_waits()
            || self.dirty.front().is_some_and(|item| match item.source {
                Source::Put { since, .. } => since.after(linger) <= now,
                Source::Moved { .. } => true,
            })
    }

    /// Bytes of writes this shard may have under way: its part of what the device wants.
    pub(super) fn write_in_flight_bytes_max(&self) -> u64 {
        match self.superblock.write_in_flight_bytes {
            0 => PAYLOAD_IN_FLIGHT_DEFAULT,
            found => (found / u64::from(self.superblock.shards)).max(WRITE_BYTES),
        }
    }

    /// The same at this moment: reads go first while writes have time.
    fn payload_in_flight_max(&self) -> u64 {
        let most = self.write_in_flight_bytes_max();
        let has_time = self.dirty_bytes < self.dram.put_limit_bytes(0) / 2;
        if self.reads_in_flight > 0 && has_time && !self.in_a_hurry() {
            (most / 2).max(WRITE_BYTES)
        } else {
            most
        }
    }

    fn write_payload(&mut self, now: Moment) {
        let mut group: Option<(u32, u64, WriteGroup)> = None;
        let in_flight_max = self.payload_in_flight_max();
        while self.payload_in_flight_bytes < in_flight_max {
            let from_moved = !self.moved.is_empty();
            let Some(item) = self.moved.front().or_else(|| self.dirty.front()) else {
                break;
            };
            let pages = (item.image.padded_len() as u64 / PAGE_BYTES) as u32;
            if !from_moved {
                if let Source::Put { number, .. } = item.source
                    && self
                        .dram
                        .get(&item.id)
                        .is_none_or(|resident| resident.number != number)
                {
                    // Removed or replaced since it was queued.
                    let gone = self.dirty.pop_front().expect("it was looked at");
                    self.dirty_bytes -= gone.image.padded_len() as u64;
                    continue;
                }
                if !self.payload_is_due(now) {
                    break;
                }
            }
            // What reclaim keeps must find its place, or the segment it leaves never gets free.
            let spare = if from_moved {
                Spare::default()
            } else {
                self.spare()
            };
            let Some(open) = &mut self.segments.open else {
                break;
            };
            let Some(placed) = open.place(pages, spare) else {
                if spare.pages > 0 && open.pages_left() >= pages {
                    break;
                }
                if !from_moved && self.reclaim_needs_open() {
                    break;
                }
                if let Source::Moved { from } = item.source
                    && self.segments.prepared.is_none()
                {
                    if self.segments.preparing.is_some() {
                        break; // There will be room in a moment.
                    }
                    // The segment that would take it is the one it is to leave: let it go.
                    if let Some(item) = self.moved.pop_front() {
                        self.give_up_item(&item, from);
                    }
                    continue;
                }
                if let Some((_, _, group)) = group.take() {
                    self.submit_group(group);
                }
                if self.close_open() {
                    continue;
                }
                break;
            };
            let number = open.number;
            let item = if from_moved {
                self.moved.pop_front().expect("it was looked at")
            } else {
                let item = self.dirty.pop_front().expect("it was looked at");
                self.dirty_bytes -= item.image.padded_len() as u64;
                self.dram.set_state(&item.id, State::Writing);
                item
            };
            let bytes = u64::from(pages) * PAGE_BYTES;
            self.payload_in_flight_bytes += bytes;
            let fits = group.as_ref().is_some_and(|(end, bytes, group)| {
                *end == placed.page
                    && group.segment == number
                    && *bytes < WRITE_BYTES
                    && group.items.len() < Op::WRITE_BUFFERS_MAX
            });
            if !fits && let Some((_, _, group)) = group.take() {
                self.submit_group(group);
            }
            let (end, total, current) = group.get_or_insert_with(|| {
                (
                    placed.page,
                    0,
                    WriteGroup {
                        segment: number,
                        bytes: 0,
                        items: Vec::with_capacity(GROUP_ITEMS),
                    },
                )
            });
            *end = placed.page + pages;
            *total += bytes;
            current.bytes += bytes;
            current.items.push(PlacedItem {
                item,
                page: placed.page,
                area: placed.area,
            });
        }
        if let Some((_, _, group)) = group {
            self.submit_group(group);
        }
    }

    fn submit_group(&mut self, group: WriteGroup) {
        if let Some(open) = self.open_or_sealing(group.segment) {
            open.writes_in_flight += 1;
        }
        if is_disabled(Check::RecordAfterPayload) {
            group
                .items
                .iter()
                .for_each(|placed| self.record_block(group.segment, placed));
        }
        let offset = self
            .superblock
            .offset(self.number, group.segment, group.items[0].page);
        let buffers = group
            .items
            .iter()
            .map(|placed| placed.item.image.clone())
            .collect();
        let op = Op::Write {
            offset,
            buffers,
            lifetime: self.log(),
        };
        self.submit(Pending::Payload(group), op);
    }

    /// What dies with its segment.
    pub(super) fn log(&self) -> Lifetime {
        Lifetime::Log { shard: self.number }
    }

    fn open_or_sealing(&mut self, number: u32) -> Option<&mut OpenSegment> {
        let Self { segments, .. } = self;
        [segments.open.as_mut(), segments.sealing.as_mut()]
            .into_iter()
            .flatten()
            .find(|segment| segment.number == number)
    }

    pub(super) fn payload_done(
        &mut self,
        now: Moment,
        group: WriteGroup,
        result: Result<(), DeviceError>,
    ) {
        self.payload_in_flight_bytes -= group.bytes;
        if let Some(segment) = self.open_or_sealing(group.segment) {
            segment.writes_in_flight -= 1;
        }
        if let Err(error) = result {
            return self.payload_failed(now, group, &error);
        }
        self.device_takes();
        let sequence = self.next_sequence;
        for placed in group.items {
            if !is_disabled(Check::RecordAfterPayload) {
                self.record_block(group.segment, &placed);
            }
        }
        // Blocks that nobody wants any more leave nothing to be synced.
        if self.next_sequence > sequence && self.first_unsynced.is_none() {
            self.first_unsynced = Some(now);
        }
    }

    /// The bytes of a block are on the device: it gets its record and its index entry.
    fn record_block(&mut self, segment: u32, placed: &PlacedItem) {
        let PlacedItem { item, page, area } = placed;
        let stored_bytes = item.image.padded_len() as u64;
        let position = self.segments.position(segment, *page);
        let before = self.find(&item.id).map(|(_, entry)| entry);
        let (wanted, class, stamp) = match item.source {
            Source::Put { number, .. } => {
                self.counters.block_write_bytes += stored_bytes;
                let resident = self
                    .dram
                    .get(&item.id)
                    .filter(|resident| resident.number == number);
                let class = resident.map_or_else(BlockClass::default, |resident| resident.class);
                (
                    resident.is_some(),
                    class,
                    resident.map_or(0, |resident| self.keep.stamp_at(resident.used_at)),
                )
            }
            Source::Moved { from } => {
                self.counters.moved_write_bytes += stored_bytes;
                // Only what still lies where it was read from: removed, purged or newer blocks win.
                let entry = before.filter(|entry| entry.position == from);
                (
                    entry.is_some(),
                    entry.map_or_else(BlockClass::default, |entry| entry.class()),
                    entry.map_or(0, |entry| entry.stamp),
                )
            }
        };
        if let Source::Moved { .. } = item.source
            && let Some(reclaim) = &mut self.reclaim
        {
            reclaim.moved(stored_bytes);
        }
        if !wanted {
            return;
        }
        let place = self.place_at(segment, *page, item.len);
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let check64 = super::check64_of(item.crc, &item.id, &place);
        let mut record = Record::bare(RECORD_BLOCK, &item.id, sequence);
        record.check64 = check64.into();
        record.version = item.version.into();
        record.place = (*page).into();
        record.len = item.len.into();
        record.flags = if item.sectioned { FLAG_SECTIONED } else { 0 };
        record.sections = item.sections.into();
        record.set_hints(&item.hints);
        let area = *area;
        if let Some(open) = self.open_or_sealing(segment) {
            open.record(area, record);
        }
        let age = self.age();
        let tenant = item.hints.tenant;
        let spared = self.entitled_on_device(tenant);
        let entry = Entry {
            check64,
            position,
            len: item.len,
            sectioned: item.sectioned,
            touched: class.uses() > 0,
            frequency: class.uses(),
            length: class.length(),
            kind: class.kind().number(),
            stamp,
            tenant,
        };
        let Self { index, leases, .. } = self;
        let held = |position| leases.holds_position(position);
        let inserted = index.insert_beside(&item.id, &entry, age, held, spared);
        let placed = inserted != Inserted::Held;
        if placed {
            self.expiries.add(segment, *page, item.hints.expires_unix_s);
            self.leases
                .moved(&self.segments, &item.id, position, stored_bytes);
            self.note(Change::Placed {
                id: item.id,
                position,
            });
        } else {
            self.counters.bucket_evicted += 1;
        }
        if let Inserted::Evicted(other) = inserted {
            self.counters.bucket_evicted += 1;
            self.by_tenant[other.tenant.index()].evicted += 1;
            self.note(Change::Displaced {
                position: other.position,
                id: None,
                why: Displaced::Bucket,
            });
        }
        match item.source {
            Source::Put { number, .. } => {
                self.counters.payload_written_bytes += u64::from(item.len);
                self.recorded_puts.push_back((sequence, number));
                let state = if placed {
                    State::Clean
                } else {
                    State::Volatile
                };
                self.dram.set_state(&item.id, state);
                self.passed(&item.id);
            }
            Source::Moved { .. } => {
                self.counters.reclaim_kept += 1;
                self.moved_unsynced = true;
            }
        }
    }

    fn payload_failed(&mut self, now: Moment, group: WriteGroup, error: &DeviceError) {
        for placed in group.items.into_iter().rev() {
            match placed.item.source {
                Source::Put { number, .. } => {
                    if self
                        .dram
                        .get(&placed.item.id)
                        .is_some_and(|resident| resident.number == number)
                    {
                        self.dram.set_state(&placed.item.id, State::Dirty);
                        self.dirty_bytes += placed.item.image.padded_len() as u64;
                        self.dirty.push_front(placed.item);
                    }
                }
                Source::Moved { .. } => self.moved.push_front(placed.item),
            }
        }
        // The rest of the segment may be as bad: it is sealed as it is and its space comes back
        // when it is reclaimed.
        if self
            .segments
            .open
            .as_ref()
            .is_some_and(|open| open.number == group.segment)
        {
            self.close_open();
        }
        self.device_refused(now, error);
    }

    /// Queues a resident for writing (again).
    pub(super) fn queue_resident(&mut self, now: Moment, id: &BlockId) {
        let Some(resident) = self.dram.get(id).cloned() else {
            return;
        };
        let sectioned = resident.is_sectioned();
        let plan = crate::layout::ImagePlan::new(
            &resident
                .sections
                .iter()
                .map(|section| (section.len, section.check))
                .collect::<Vec<_>>(),
        );
        self.dram.set_state(id, State::Dirty);
        let crc = super::head_crc(id, &plan, resident.image.as_slice());
        let number = resident.number;
        self.unflushed.add(number, now, None);
        self.push_dirty(WriteItem {
            id: *id,
            len: plan.bytes as u32,
            sectioned,
            sections: plan.sections.len() as u16,
            crc,
            version: resident.version,
            hints: resident.hints,
            image: resident.image,
            source: Source::Put { number, since: now },
        });
    }

    /// When `step` has something to do even if nothing happens.
    pub(crate) fn next_timer(&self) -> Option<Moment> {
        if let Some(until) = self.trouble.until {
            return Some(until);
        }
        let dirty = self.dirty.front().map(|item| match item.source {
            Source::Put { since, .. } => since.after(self.linger()),
            Source::Moved { .. } => Moment(0),
        });
        let sync = self
            .first_unsynced
            .filter(|_| self.sync.is_none())
            .map(|since| since.after(self.linger()));
        let stalled = self.segments.open.is_none()
            || self.payload_in_flight_bytes >= self.payload_in_flight_max();
        let shutdown = self.shutdown.as_ref().map(|shutdown| shutdown.until);
        let lease = self.leases.next_end();
        let scrub = self.scrub_timer();
        let (descent, let_down) = (self.descent_timer(), self.let_down.timer());
        let dirty = dirty.filter(|_| !stalled);
        // What is held for who asks next, and who waits for a put, are seen to when their time is over.
        let (held, awaited) = (self.ahead.next_end(), self.awaited.next_end());
        [
            dirty, sync, shutdown, lease, scrub, descent, let_down, held, awaited,
        ]
        .into_iter()
        .flatten()
        .min()
    }
}

/// Bytes a block of this length takes on the device.
pub(super) fn stored_bytes(len: u32) -> u64 {
    page_round_up(u64::from(len))
}
