//! From memory to the device.
//!
//! ```text
//!  dirty, moved, controls ── place ──> payload writes ── record ──> directory pages ── flush ──> answered
//!                              │                                      (one sync at a time)
//!                   segment full: sealing ── all recorded ── footer + flush ──> sealed
//!                   prepared segment opens; the next is prepared: header ── flush
//! ```
//!
//! Payload goes out in gather writes of up to 1 MiB while at most [`PAYLOAD_IN_FLIGHT_MAX`] bytes
//! are under way: several are needed to keep a drive busy, more only make reads wait.
//!
//! What a device refuses stays in memory: the blocks are queued again, and when the trouble lasts
//! they become Volatile (readable, evictable, lost with the process) until the device answers.

use super::{Event, Pending, Shard, status::ShutdownReport};
use crate::dram::State;
use crate::index::{Entry, Inserted};
use crate::layout::{
    FLAG_SECTIONED, PAGE, PageHead, PageKind, RECORD_BLOCK, RECORDS_PER_PAGE, Record, encode_page,
};
use crate::segments::{OpenSegment, SegmentPhase};
use kvar_base::check::fold_place;
use kvar_base::{BlockId, Moment, PAGE_BYTES, PutOutcome, Refusal, page_round_up};
use kvar_io::{DeviceError, Op, Shared};
use std::collections::HashSet;
use std::time::Duration;

/// A gather write as the device sees it.
const WRITE_BYTES: u64 = 1 << 20;
/// Payload bytes under way at most.
const PAYLOAD_IN_FLIGHT_MAX: u64 = 8 << 20;
/// How long the device is left alone after it refused writes.
const TROUBLE_PAUSE: Duration = Duration::from_secs(5);
/// Refusals in a row after which what is dirty may leave memory unwritten.
const TROUBLE_MAX: u32 = 3;

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
    pub(super) depth: u32,
    pub(super) source: Source,
}

/// A tombstone or purge to be recorded.
pub(super) struct Control {
    pub(super) kind: u8,
    pub(super) id: BlockId,
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

/// Directory pages and footers under way, then a device flush.
pub(super) struct Sync {
    writes_left: u32,
    failed: bool,
    flushing: bool,
    up_to_sequence: u64,
    seals: bool,
}

/// What the device refused lately.
#[derive(Default)]
pub(super) struct Trouble {
    failures_in_a_row: u32,
    until: Option<Moment>,
    reason: Option<String>,
}

impl Trouble {
    /// Whether it lasted so long that blocks were given up.
    pub(super) fn gave_up(&self) -> bool {
        self.failures_in_a_row >= TROUBLE_MAX
    }

    pub(super) fn reason(&self) -> Option<String> {
        self.reason.clone()
    }
}

/// A shutdown under way.
pub(super) struct Shutdown {
    until: Moment,
    stage: ShutdownStage,
    pub(super) report: ShutdownReport,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ShutdownStage {
    Flushing,
    Checkpointing,
    Done,
}

impl Shard {
    pub(super) fn push_dirty(&mut self, item: WriteItem) {
        self.dirty_bytes += item.image.padded_len() as u64;
        self.dirty.push_back(item);
    }

    pub(super) fn start_controls(&mut self, token: u64, controls: u64, found: u64) {
        if controls == 0 {
            self.events.push(Event::Done {
                token,
                result: Ok(0),
            });
        } else {
            self.control_counts.insert(token, (controls, found));
        }
    }

    /// Whether somebody waits for a flush.
    fn in_a_hurry(&self) -> bool {
        !self.control_counts.is_empty()
            || !self.flush_waiters.is_empty()
            || self.shutdown.is_some()
            || self
                .reclaim
                .as_ref()
                .is_some_and(super::reclaim::Reclaim::waits_for_flush)
            || self.unflushed.durable > 0
    }

    /// How long a put may stay in the queue: a quarter of what was promised, so that the write, the
    /// directory and the flush behind it fit into the rest.
    fn linger(&self) -> Duration {
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

    /// Opens, seals and prepares segments.
    fn step_segments(&mut self) {
        if self.segments.open.is_none()
            && let Some(number) = self.segments.prepared.take()
        {
            let segment = self.segments.get(number);
            segment.phase = SegmentPhase::Open;
            let (generation, opened) = (segment.generation, segment.opened_sequence);
            self.segments.open = Some(OpenSegment::new(
                &self.superblock,
                number,
                generation,
                opened,
            ));
        }
        if self.segments.prepared.is_none() && self.segments.preparing.is_none() {
            let ready = self.segments.free.front().copied();
            if let Some(number) = ready.filter(|number| self.segments.get(*number).readers == 0) {
                self.segments.free.pop_front();
                self.prepare(number);
            }
        }
        if self.segments.prepared.is_none()
            && self.segments.free.is_empty()
            && self.reclaim.is_none()
        {
            self.start_reclaim();
        }
    }

    fn prepare(&mut self, number: u32) {
        // An opening is an event like others: no two segments are opened under one number, so that
        // recovery can tell which is older.
        let opened_sequence = self.next_sequence;
        self.next_sequence += 1;
        let segment = self.segments.get(number);
        segment.phase = SegmentPhase::Preparing;
        segment.generation += 1;
        segment.opened_sequence = opened_sequence;
        let generation = segment.generation;
        let head = self.page_head(PageKind::Header, number, generation, opened_sequence, 1);
        let Some((offset, page)) = self.encode_pages(number, 0, &head, &[Vec::new()]) else {
            let segment = self.segments.get(number);
            segment.phase = SegmentPhase::Free;
            segment.generation -= 1;
            self.segments.free.push_front(number);
            return;
        };
        self.segments.preparing = Some(number);
        self.submit(
            Pending::PrepareHeader,
            Op::Write {
                offset,
                buffers: vec![page],
            },
        );
    }

    pub(super) fn prepare_header_done(&mut self, now: Moment, result: Result<(), DeviceError>) {
        match result {
            Ok(()) => self.submit(Pending::PrepareFlush, Op::Flush),
            Err(error) => self.prepare_failed(now, &error),
        }
    }

    pub(super) fn prepare_flush_done(&mut self, now: Moment, result: Result<(), DeviceError>) {
        if let Err(error) = result {
            return self.prepare_failed(now, &error);
        }
        self.device_answers();
        if let Some(number) = self.segments.preparing.take() {
            self.segments.get(number).phase = SegmentPhase::Prepared;
            self.segments.prepared = Some(number);
        }
    }

    fn prepare_failed(&mut self, now: Moment, error: &DeviceError) {
        if let Some(number) = self.segments.preparing.take() {
            self.segments.get(number).phase = SegmentPhase::Free;
            self.segments.free.push_front(number);
        }
        self.device_refused(now, error);
    }

    fn page_head(
        &self,
        kind: PageKind,
        number: u32,
        generation: u32,
        opened_sequence: u64,
        pages: u16,
    ) -> PageHead {
        PageHead {
            kind,
            segment: self.superblock.device_segment(self.number, number),
            generation,
            page_number: 0,
            page_count: pages,
            used_pages: 0,
            opened_sequence,
        }
    }

    /// Segment pages that follow one another from `first`, ready to write.
    fn encode_pages(
        &mut self,
        number: u32,
        first: u32,
        head: &PageHead,
        pages: &[Vec<Record>],
    ) -> Option<(u64, Shared)> {
        let mut buffer = self.arena.allocate(pages.len() * PAGE)?;
        let offset = self.superblock.offset(self.number, number, first);
        for (at, (page, records)) in buffer
            .as_mut_slice()
            .chunks_mut(PAGE)
            .zip(pages)
            .enumerate()
        {
            let head = PageHead {
                page_number: at as u16,
                ..*head
            };
            encode_page(
                page,
                &self.superblock,
                offset + (at * PAGE) as u64,
                &head,
                records,
            );
        }
        self.counters.meta_write_bytes += (pages.len() * PAGE) as u64;
        Some((offset, buffer.freeze()))
    }

    fn place_controls(&mut self) {
        while let Some(control) = self.controls.pop_front() {
            let Some(open) = &mut self.segments.open else {
                return self.controls.push_front(control);
            };
            let Some(placed) = open.place(0, 0) else {
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
                Record::bare(control.kind, &control.id, sequence),
            );
            self.recorded_controls.push_back((sequence, control.token));
        }
    }

    /// Whether reclaim has still to bring blocks to the open segment and there is no other: closed
    /// now, it would leave them nowhere to go, and reclaim is what frees the next one.
    fn reclaim_needs_open(&self) -> bool {
        self.segments.prepared.is_none()
            && self
                .reclaim
                .as_ref()
                .is_some_and(|reclaim| reclaim.spare_pages() > 0)
    }

    /// The open segment takes nothing more. Whether another one is open now.
    fn close_open(&mut self) -> bool {
        if self.segments.sealing.is_some() {
            return false;
        }
        if let Some(open) = self.segments.open.take() {
            self.segments.get(open.number).phase = SegmentPhase::Sealing;
            self.segments.sealing = Some(open);
        }
        self.step_segments();
        self.segments.open.is_some()
    }

    /// Whether what is queued should go out now.
    fn payload_is_due(&self, now: Moment) -> bool {
        let linger = self.linger();
        self.dirty_bytes >= WRITE_BYTES
            || self.in_a_hurry()
            || self.dirty.front().is_some_and(|item| match item.source {
                Source::Put { since, .. } => since.after(linger) <= now,
                Source::Moved { .. } => true,
            })
    }

    fn write_payload(&mut self, now: Moment) {
        let mut group: Option<(u32, u64, WriteGroup)> = None;
        while self.payload_in_flight_bytes < PAYLOAD_IN_FLIGHT_MAX {
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
                0
            } else {
                self.reclaim
                    .as_ref()
                    .map_or(0, super::reclaim::Reclaim::spare_pages)
            };
            let Some(open) = &mut self.segments.open else {
                break;
            };
            let Some(placed) = open.place(pages, spare) else {
                if spare > 0 && open.pages_left() >= pages {
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
                    let (id, len) = (item.id, item.len);
                    self.moved.pop_front();
                    self.give_up_move(&id, len, from);
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
                        items: Vec::new(),
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
        let offset = self
            .superblock
            .offset(self.number, group.segment, group.items[0].page);
        let buffers = group
            .items
            .iter()
            .map(|placed| placed.item.image.clone())
            .collect();
        self.submit(Pending::Payload(group), Op::Write { offset, buffers });
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
        self.device_answers();
        let sequence = self.next_sequence;
        for placed in group.items {
            self.record_block(group.segment, &placed);
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
        let (wanted, touched, frequency, stamp) = match item.source {
            Source::Put { number, .. } => {
                self.counters.block_write_bytes += stored_bytes;
                let resident = self
                    .dram
                    .get(&item.id)
                    .filter(|resident| resident.number == number);
                let touches = resident.map_or(0, |resident| resident.early_touches);
                (
                    resident.is_some(),
                    touches > 0,
                    touches.min(3),
                    self.stamp(),
                )
            }
            Source::Moved { from } => {
                self.counters.moved_write_bytes += stored_bytes;
                // Only what still lies where it was read from: removed, purged or newer blocks win.
                let entry = before.filter(|entry| entry.position == from);
                (
                    entry.is_some(),
                    false,
                    entry.map_or(0, |entry| entry.frequency),
                    entry.map_or(0, |entry| entry.stamp),
                )
            }
        };
        self.appended_bytes += stored_bytes;
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
        let check64 = fold_place(item.crc, &item.id, &place);
        let mut record = Record::bare(RECORD_BLOCK, &item.id, sequence);
        record.check64 = check64.into();
        record.version = item.version.into();
        record.place = (*page).into();
        record.len = item.len.into();
        record.flags = if item.sectioned { FLAG_SECTIONED } else { 0 };
        record.sections = item.sections.into();
        record.depth = item.depth.into();
        let area = *area;
        if let Some(open) = self.open_or_sealing(segment) {
            open.record(area, record);
        }
        let entry = Entry {
            check64,
            position,
            len: item.len,
            sectioned: item.sectioned,
            touched,
            frequency,
            stamp,
        };
        if let Inserted::Evicted(_) = self.index.insert(&item.id, &entry, self.age()) {
            self.counters.bucket_evicted += 1;
        }
        match item.source {
            Source::Put { number, .. } => {
                self.counters.payload_written_bytes += u64::from(item.len);
                self.recorded_puts.push_back((sequence, number));
                self.dram.set_state(&item.id, State::Clean);
            }
            Source::Moved { .. } => self.counters.reclaim_kept += 1,
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

    /// Starts directory pages and, where a segment is complete, its footer; a flush follows.
    fn start_sync(&mut self, now: Moment) {
        if self.sync.is_some() {
            return;
        }
        let seal_ready = self
            .segments
            .sealing
            .as_ref()
            .is_some_and(|sealing| sealing.writes_in_flight == 0);
        let unwritten = [&self.segments.open, &self.segments.sealing]
            .into_iter()
            .flatten()
            .any(OpenSegment::has_unwritten);
        let due = self.in_a_hurry()
            || self
                .first_unsynced
                .is_some_and(|since| since.after(self.linger()) <= now);
        let wanted = seal_ready || unwritten && due;
        if !wanted {
            return;
        }
        let mut writes = Vec::new();
        for sealing in [false, true] {
            let slot = if sealing {
                &mut self.segments.sealing
            } else {
                &mut self.segments.open
            };
            let Some(mut segment) = slot.take() else {
                continue;
            };
            let head = self.page_head(
                PageKind::Directory,
                segment.number,
                segment.generation,
                segment.opened_sequence,
                1,
            );
            let head = PageHead {
                used_pages: segment.cursor,
                ..head
            };
            for (page, records) in segment.directory_pages() {
                writes.push((segment.number, page, head, vec![records]));
            }
            if sealing && seal_ready {
                let mut pages: Vec<Vec<Record>> = segment
                    .records
                    .chunks(RECORDS_PER_PAGE)
                    .map(<[Record]>::to_vec)
                    .collect();
                if pages.is_empty() {
                    pages.push(Vec::new());
                }
                let head = PageHead {
                    kind: PageKind::Footer,
                    page_count: pages.len() as u16,
                    ..head
                };
                writes.push((segment.number, self.superblock.footer_page(), head, pages));
            }
            *(if sealing {
                &mut self.segments.sealing
            } else {
                &mut self.segments.open
            }) = Some(segment);
        }
        self.first_unsynced = None;
        self.sync = Some(Sync {
            writes_left: writes.len() as u32,
            failed: false,
            flushing: false,
            up_to_sequence: self.next_sequence - 1,
            seals: seal_ready,
        });
        for (number, first, head, pages) in writes {
            match self.encode_pages(number, first, &head, &pages) {
                Some((offset, page)) => self.submit(
                    Pending::SyncPage,
                    Op::Write {
                        offset,
                        buffers: vec![page],
                    },
                ),
                None => {
                    // The reserve for such pages is used up; the segment is sealed without them
                    // being whole, and its blocks count as not flushed.
                    let error = DeviceError::Io {
                        code: None,
                        message: "no memory for directory pages".into(),
                    };
                    self.sync_page_done(now, Err(error));
                }
            }
        }
        self.flush_if_written(now);
    }

    pub(super) fn sync_page_done(&mut self, now: Moment, result: Result<(), DeviceError>) {
        let failed = result.is_err();
        if let Some(sync) = &mut self.sync {
            sync.writes_left -= 1;
            sync.failed |= failed;
        }
        if let Err(error) = result {
            self.device_refused(now, &error);
        }
        self.flush_if_written(now);
    }

    fn flush_if_written(&mut self, now: Moment) {
        let Some(sync) = &mut self.sync else { return };
        if sync.writes_left > 0 || sync.flushing {
            return;
        }
        if sync.failed {
            return self.sync_failed(now);
        }
        sync.flushing = true;
        self.submit(Pending::SyncFlush, Op::Flush);
    }

    pub(super) fn sync_flush_done(&mut self, now: Moment, result: Result<(), DeviceError>) {
        if let Err(error) = result {
            self.device_refused(now, &error);
            return self.sync_failed(now);
        }
        self.device_answers();
        self.counters.device_flushes += 1;
        let Some(sync) = self.sync.take() else { return };
        self.flushed_sequence = self.flushed_sequence.max(sync.up_to_sequence);
        if sync.seals {
            self.finish_seal();
        }
        while let Some((_, number)) = self
            .recorded_puts
            .pop_front_if(|(sequence, _)| *sequence <= self.flushed_sequence)
        {
            if let Some(token) = self.unflushed.end(number) {
                self.events.push(Event::Put {
                    token,
                    outcome: PutOutcome::Stored,
                });
            }
        }
        while let Some((_, token)) = self
            .recorded_controls
            .pop_front_if(|(sequence, _)| *sequence <= self.flushed_sequence)
        {
            self.control_done(token);
        }
    }

    fn control_done(&mut self, token: u64) {
        let Some((left, found)) = self.control_counts.get_mut(&token) else {
            return;
        };
        *left -= 1;
        if *left == 0 {
            let found = *found;
            self.control_counts.remove(&token);
            self.events.push(Event::Done {
                token,
                result: Ok(found),
            });
        }
    }

    fn finish_seal(&mut self) {
        let Some(sealed) = self.segments.sealing.take() else {
            return;
        };
        self.segments.get(sealed.number).phase = SegmentPhase::Sealed;
        self.segments.sealed.push_back(sealed.number);
        self.counters.segments_sealed += 1;
        self.sealed_since_checkpoint += 1;
    }

    /// Directory pages or the flush behind them failed: which of them are on the device is not
    /// known. The blocks stay readable (their index entries lead to good bytes) but nobody is told
    /// that they are flushed; the segments are given up, and everything in memory that was not
    /// flushed is written again elsewhere.
    fn sync_failed(&mut self, now: Moment) {
        self.sync = None;
        if self.segments.sealing.is_none() {
            self.close_open();
        }
        if self
            .segments
            .sealing
            .as_ref()
            .is_some_and(|sealing| sealing.writes_in_flight == 0)
        {
            self.finish_seal();
        }
        self.first_unsynced = None;
        let mut lost: HashSet<u64> = self
            .recorded_puts
            .drain(..)
            .map(|(_, number)| number)
            .collect();
        let again: Vec<BlockId> = self
            .dram
            .iter()
            .filter(|(_, resident)| resident.state == State::Clean && lost.remove(&resident.number))
            .map(|(id, _)| *id)
            .collect();
        // Memory let go of these.
        let mut gone: Vec<u64> = lost.into_iter().collect();
        gone.sort_unstable();
        for number in gone {
            self.give_up_put(number);
        }
        for id in again {
            self.queue_resident(now, &id);
        }
        let tokens: Vec<u64> = self
            .recorded_controls
            .drain(..)
            .map(|(_, token)| token)
            .collect();
        for token in tokens {
            self.fail_control(token);
        }
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
            depth: resident.depth,
            image: resident.image,
            source: Source::Put { number, since: now },
        });
    }

    /// A put that will not be flushed.
    fn give_up_put(&mut self, number: u64) {
        if let Some(token) = self.unflushed.end(number) {
            self.events.push(Event::Put {
                token,
                outcome: PutOutcome::Refused(Refusal::Busy),
            });
        }
    }

    fn fail_control(&mut self, token: u64) {
        if self.control_counts.remove(&token).is_some() {
            let reason = self
                .trouble
                .reason
                .clone()
                .unwrap_or_else(|| "the device refused the write".into());
            self.events.push(Event::Done {
                token,
                result: Err(reason),
            });
        }
    }

    fn device_answers(&mut self) {
        self.retry_given_up |= self.trouble.gave_up();
        self.trouble = Trouble::default();
    }

    pub(crate) fn device_refused(&mut self, now: Moment, error: &DeviceError) {
        self.counters.device_write_errors += 1;
        self.trouble.failures_in_a_row += 1;
        self.trouble.until = Some(now.after(TROUBLE_PAUSE));
        self.trouble.reason = Some(error.to_string());
        if self.trouble.failures_in_a_row < TROUBLE_MAX {
            return;
        }
        // It lasts: nothing may wait for this device, and memory must not fill up with blocks that
        // cannot leave.
        for item in std::mem::take(&mut self.dirty) {
            if let Source::Put { number, .. } = item.source
                && self
                    .dram
                    .get(&item.id)
                    .is_some_and(|resident| resident.number == number)
            {
                self.dram.set_state(&item.id, State::Volatile);
            }
            if let Source::Put { number, .. } = item.source {
                self.give_up_put(number);
            }
        }
        self.dirty_bytes = 0;
        for control in std::mem::take(&mut self.controls) {
            self.fail_control(control.token);
        }
        let reason = error.to_string();
        for waiter in std::mem::take(&mut self.flush_waiters) {
            self.events.push(Event::Done {
                token: waiter.token,
                result: Err(reason.clone()),
            });
        }
    }

    pub(super) fn answer_flushes(&mut self) {
        let oldest = self
            .unflushed
            .puts
            .keys()
            .next()
            .copied()
            .unwrap_or(u64::MAX);
        let Self {
            flush_waiters,
            events,
            ..
        } = self;
        flush_waiters.retain(|waiter| {
            let done = oldest > waiter.up_to_put;
            if done {
                events.push(Event::Done {
                    token: waiter.token,
                    result: Ok(0),
                });
            }
            !done
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
        let stalled =
            self.segments.open.is_none() || self.payload_in_flight_bytes >= PAYLOAD_IN_FLIGHT_MAX;
        let shutdown = self.shutdown.as_ref().map(|shutdown| shutdown.until);
        [dirty.filter(|_| !stalled), sync, shutdown]
            .into_iter()
            .flatten()
            .min()
    }

    pub(crate) fn begin_shutdown(&mut self, now: Moment) {
        if self.shutdown.is_some() {
            return;
        }
        self.shutdown = Some(Shutdown {
            until: now.after(self.config.shutdown_flush),
            stage: ShutdownStage::Flushing,
            report: ShutdownReport::default(),
        });
        self.queue_given_up(now);
    }

    /// What is in memory alone, because reclaim, the index or a device in trouble gave it up, is
    /// queued again.
    fn queue_given_up(&mut self, now: Moment) {
        let volatile: Vec<_> = self
            .dram
            .iter()
            .filter(|(id, resident)| {
                let may_leave = matches!(resident.state, State::Volatile | State::Clean);
                may_leave && !resident.ephemeral && self.index.find(id).is_none()
            })
            .map(|(id, _)| *id)
            .collect();
        for id in volatile {
            self.queue_resident(now, &id);
        }
    }

    pub(super) fn step_shutdown(&mut self, now: Moment) {
        let Some(shutdown) = &self.shutdown else {
            return;
        };
        let (stage, late) = (shutdown.stage, shutdown.until <= now);
        match stage {
            ShutdownStage::Flushing => {
                let flushed = self.unflushed.puts.is_empty()
                    && self.control_counts.is_empty()
                    && self.sync.is_none();
                let stuck = late || self.trouble.until.is_some();
                if !flushed && !stuck {
                    return;
                }
                let (mut kept, mut dropped) = (0, 0);
                for (id, resident) in self.dram.iter() {
                    let on_device = self.index.find(id).is_some()
                        && !self.unflushed.puts.contains_key(&resident.number);
                    if on_device { kept += 1 } else { dropped += 1 }
                }
                if let Some(shutdown) = &mut self.shutdown {
                    shutdown.report = ShutdownReport {
                        kept_blocks: kept,
                        dropped_blocks: dropped,
                        checkpointed: false,
                    };
                    shutdown.stage = if stuck {
                        ShutdownStage::Done
                    } else {
                        ShutdownStage::Checkpointing
                    };
                }
                if !stuck {
                    self.force_checkpoint();
                }
            }
            ShutdownStage::Checkpointing => {
                if self.checkpoint.is_none() || late {
                    let checkpointed =
                        self.checkpoint.is_none() && self.sealed_since_checkpoint == 0;
                    if let Some(shutdown) = &mut self.shutdown {
                        shutdown.report.checkpointed = checkpointed;
                        shutdown.stage = ShutdownStage::Done;
                    }
                }
            }
            ShutdownStage::Done => {}
        }
    }

    pub(crate) fn shutdown_report(&self) -> Option<ShutdownReport> {
        self.shutdown
            .as_ref()
            .filter(|shutdown| shutdown.stage == ShutdownStage::Done)
            .map(|shutdown| shutdown.report.clone())
    }
}

/// Bytes a block of this length takes on the device.
pub(super) fn stored_bytes(len: u32) -> u64 {
    page_round_up(u64::from(len))
}
