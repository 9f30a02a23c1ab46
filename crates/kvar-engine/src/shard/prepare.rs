//! Segments on their way from free to sealed, and the pages that say so.
//!
//! ```text
//!  free ── header ── flush (── discard) ──> prepared ── none is open ──> open ── full ──> sealing ──> sealed
//!    ▲   (preparing)                                           a write failed    (`sync`: footer,
//!    └─ the device refused ─┘                                                     flush)
//! ```
//!
//! What must always be true: one segment at most is open, one sealing, one preparing or prepared; a
//! segment is written to only after its new header is flushed, so that recovery never takes records
//! of two generations for one; every opening draws a sequence number of its own; for want of room
//! the open segment is not closed while reclaim has still to bring blocks to it and there is no
//! other.
//!
//! Left to others: which segment becomes free (`reclaim`), when a seal is complete (`sync`).

use super::{Pending, Shard};
use crate::layout::{PAGE, PageHead, PageKind, Record, encode_page};
use crate::mutation::{Check, is_disabled};
use crate::segments::{OpenSegment, SegmentPhase, Segments};
use kvar_base::Moment;
use kvar_io::{DeviceError, Op, Shared};

impl Shard {
    /// Opens, seals and prepares segments.
    pub(super) fn step_segments(&mut self) {
        if self.segments.open.is_none()
            && let Some(number) = self.segments.prepared.take()
        {
            let segment = self.segments.get(number);
            segment.phase = SegmentPhase::Open;
            segment.opened_at = self.keep.demand_bytes();
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
            let is_free = |segments: &mut Segments, number: u32| {
                segments.get(number).readers == 0 || is_disabled(Check::Readers)
            };
            if let Some(number) = ready.filter(|number| is_free(&mut self.segments, *number)) {
                self.segments.free.pop_front();
                self.prepare(number);
            }
        }
        // One is prepared and none free: reclaim may keep all that a segment holds, as a prompt that
        // fills several of them needs it, and still find room.
        if self.segments.free.is_empty() && self.reclaim.is_none() {
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
        self.expiries.clear(number);
        let segment = self.segments.get(number);
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
                lifetime: self.log(),
            },
        );
    }

    pub(super) fn prepare_header_done(&mut self, now: Moment, result: Result<(), DeviceError>) {
        match result {
            Ok(()) if is_disabled(Check::HeaderFlush) => self.prepare_flush_done(now, Ok(())),
            Ok(()) => self.submit(Pending::PrepareFlush, Op::Flush),
            Err(error) => self.prepare_failed(now, &error),
        }
    }

    pub(super) fn prepare_flush_done(&mut self, now: Moment, result: Result<(), DeviceError>) {
        if let Err(error) = result {
            return self.prepare_failed(now, &error);
        }
        self.device_takes();
        // Behind the flush of the header, so that a crash finds either the old generation whole or
        // nothing of it; before any payload, so that none is discarded.
        if self.config.discard
            && let Some(number) = self.segments.preparing
            && self.segments.all[number as usize].generation > 1
        {
            let offset = self.superblock.offset(self.number, number, 1);
            let len = u64::from(self.superblock.segment_pages() - 1) * PAGE as u64;
            return self.submit(Pending::PrepareDiscard, Op::Discard { offset, len });
        }
        self.prepared();
    }

    /// A device that does not take it loses nothing: the segment is written anew all the same.
    pub(super) fn prepare_discard_done(&mut self, result: &Result<(), DeviceError>) {
        match result {
            Ok(()) => self.counters.segments_discarded += 1,
            Err(_) => self.counters.discards_failed += 1,
        }
        self.prepared();
    }

    fn prepared(&mut self) {
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

    /// Whether reclaim has still to bring blocks to the open segment and there is no other: closed
    /// now, it would leave them nowhere to go, and reclaim is what frees the next one.
    pub(super) fn reclaim_needs_open(&self) -> bool {
        self.segments.prepared.is_none()
            && self
                .reclaim
                .as_ref()
                .is_some_and(|reclaim| reclaim.spare_pages() > 0)
    }

    /// The open segment takes nothing more. Whether another one is open now.
    pub(super) fn close_open(&mut self) -> bool {
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

    pub(super) fn finish_seal(&mut self) {
        let Some(sealed) = self.segments.sealing.take() else {
            return;
        };
        self.segments.get(sealed.number).phase = SegmentPhase::Sealed;
        self.segments.sealed.push_back(sealed.number);
        self.expiries.seal(sealed.number);
        self.counters.segments_sealed += 1;
        self.sealed_since_checkpoint += 1;
    }

    pub(super) fn page_head(
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
    pub(super) fn encode_pages(
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
}
