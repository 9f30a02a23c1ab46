//! What is recorded gets onto the device, and who waits for that is told.
//!
//! ```text
//!  due, or a segment complete
//!      │ with moved blocks among what is recorded: first a flush of their payload
//!      │ directory pages; the footer of a complete segment
//!      ▼
//!  writing ── all written ──> flushing ── flushed ──> puts, controls, flushes answered; sealed
//!      └─── one failed ──> given up <── failed ──┘    what memory holds is queued again
//! ```
//!
//! One sync at a time: what is recorded meanwhile waits for the next.
//!
//! What must always be true: nobody is told that something is flushed before the flush that covers
//! its record; whoever waits is answered once, with success or with why not. After a failed sync it
//! is not known which pages are on the device, so that none of them counts, and the next goes to the
//! same places: the others hold what was flushed before. The record of a moved
//! block goes out when its new copy is flushed: recovery takes the newer record, and would lose a
//! block whose old copy is whole.
//!
//! Left to others: what is recorded (`write`), how a segment is closed (`prepare`), when a device
//! is left alone (`trouble`).

use super::types::Event;
use super::{Displaced, Pending, Shard};
use crate::dram::State;
use crate::layout::{PageHead, PageKind, RECORD_BLOCK, RECORDS_PER_PAGE, Record};
use crate::mutation::{Check, is_disabled};
use crate::segments::OpenSegment;
use kvar_base::{BlockId, Moment, PutOutcome};
use kvar_io::{DeviceError, Lifetime, Op};
use std::collections::{BTreeMap, HashSet};

/// Directory pages and footers under way, then a device flush.
pub(super) struct Sync {
    writes_left: u32,
    /// Pages that wait for the flush of moved payload.
    pages: Vec<Op>,
    failed: bool,
    flushing: bool,
    up_to_sequence: u64,
    seals: bool,
}

pub(super) struct FlushWaiter {
    pub(super) token: u64,
    pub(super) up_to_put: u64,
}

/// A put that is acknowledged and not flushed.
pub(super) struct Unflushed {
    pub(super) since: Moment,
    durable: Option<u64>,
}

/// All of them, by number.
#[derive(Default)]
pub(super) struct UnflushedPuts {
    pub(super) puts: BTreeMap<u64, Unflushed>,
    /// How many are durable: somebody waits for the flush. Asked at every turn.
    pub(super) durable: usize,
}

impl UnflushedPuts {
    /// Adds one; a number that is known keeps what is known of it.
    pub(super) fn add(&mut self, number: u64, since: Moment, durable: Option<u64>) {
        if let std::collections::btree_map::Entry::Vacant(place) = self.puts.entry(number) {
            place.insert(Unflushed { since, durable });
            self.durable += usize::from(durable.is_some());
        }
    }

    /// It is flushed, or will not be: the token that waits for it.
    pub(super) fn end(&mut self, number: u64) -> Option<u64> {
        let token = self.puts.remove(&number)?.durable?;
        self.durable -= 1;
        Some(token)
    }
}

impl Shard {
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

    /// Starts directory pages and, where a segment is complete, its footer; a flush follows.
    pub(super) fn start_sync(&mut self, now: Moment) {
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
            pages: Vec::new(),
            failed: false,
            flushing: false,
            up_to_sequence: self.next_sequence - 1,
            seals: seal_ready,
        });
        let mut ready = Vec::with_capacity(writes.len());
        for (number, first, head, pages) in writes {
            // A directory page is written again with the next records, a footer never.
            let lifetime = match head.kind {
                PageKind::Directory => Lifetime::Pages,
                PageKind::Header | PageKind::Footer => self.log(),
            };
            match self.encode_pages(number, first, &head, &pages) {
                Some((offset, page)) => ready.push(Op::Write {
                    offset,
                    buffers: vec![page],
                    lifetime,
                }),
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
        let moved = std::mem::take(&mut self.moved_unsynced);
        match &mut self.sync {
            Some(sync) if moved && !is_disabled(Check::MovedPayloadFlush) => {
                sync.pages = ready;
                self.submit(Pending::SyncPayloadFlush, Op::Flush);
            }
            _ => {
                self.write_sync_pages(ready);
                self.flush_if_written(now);
            }
        }
    }

    fn write_sync_pages(&mut self, pages: Vec<Op>) {
        for page in pages {
            self.submit(Pending::SyncPage, page);
        }
    }

    pub(super) fn sync_payload_flush_done(&mut self, now: Moment, result: Result<(), DeviceError>) {
        let Some(sync) = &mut self.sync else { return };
        let pages = std::mem::take(&mut sync.pages);
        if let Err(error) = result {
            sync.writes_left -= pages.len() as u32;
            sync.failed = true;
            self.device_refused(now, &error);
        } else {
            self.counters.device_flushes += 1;
            self.write_sync_pages(pages);
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
        let Self { segments, .. } = self;
        for segment in [&mut segments.open, &mut segments.sealing] {
            segment.iter_mut().for_each(OpenSegment::flushed);
        }
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

    /// Directory pages or the flush behind them failed: which of them are on the device is not
    /// known. The segments are given up, and what was recorded in them since the last flush leaves
    /// the index: a later flush would speak of it, and nothing would stand behind its word. What
    /// memory holds of it is written again elsewhere.
    fn sync_failed(&mut self, now: Moment) {
        self.sync = None;
        self.trouble.of_records = true;
        let Self { segments, .. } = self;
        for segment in [&mut segments.open, &mut segments.sealing] {
            segment.iter_mut().for_each(OpenSegment::not_flushed);
        }
        let unsure = self.unflushed_blocks();
        // The footer of the segment that is given up may still name what was moved.
        self.moved_unsynced = true;
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
        let mut again = Vec::new();
        for (id, position) in unsure {
            if !self.index.remove_at(&id, position) {
                continue;
            }
            self.note_displaced(&id, position, Displaced::Refused);
            match self.dram.get(&id) {
                Some(resident) if resident.state == State::Clean => {
                    lost.remove(&resident.number);
                    again.push(id);
                }
                Some(_) => {}
                None => {
                    self.counters.refused_dropped += 1;
                    self.counters.leased_corrupt += u64::from(self.lose_lease(&id));
                }
            }
        }
        again.extend(self.dram.in_order(|_, resident| {
            resident.state == State::Clean && lost.remove(&resident.number)
        }));
        // Memory let go of these.
        let mut gone: Vec<u64> = lost.into_iter().collect();
        gone.sort_unstable();
        if let Some(first) = gone.first() {
            self.fail_flushes(*first);
        }
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

    /// Blocks recorded since the last flush: id and position.
    fn unflushed_blocks(&self) -> Vec<(BlockId, u32)> {
        [&self.segments.open, &self.segments.sealing]
            .into_iter()
            .flatten()
            .flat_map(|segment| {
                segment
                    .records
                    .iter()
                    .filter(|record| {
                        record.kind == RECORD_BLOCK && record.sequence() > self.flushed_sequence
                    })
                    .map(|record| {
                        let position = self.segments.position(segment.number, record.place.get());
                        (record.id(), position)
                    })
            })
            .collect()
    }

    /// Whoever waits for a flush of this put or a later one hears that it will not be.
    fn fail_flushes(&mut self, from_put: u64) {
        let reason = self.trouble.reason().unwrap_or_default();
        let Self {
            flush_waiters,
            events,
            ..
        } = self;
        flush_waiters.retain(|waiter| {
            let waits = waiter.up_to_put < from_put;
            if !waits {
                events.push(Event::Done {
                    token: waiter.token,
                    result: Err(reason.clone()),
                });
            }
            waits
        });
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
}
