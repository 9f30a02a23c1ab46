//! Reads of whole blocks: from memory at once, from the device once for all who ask at the same time.
//!
//! A read that began before a remove ends as Miss(removed); one whose entry moved meanwhile (the
//! block was rewritten elsewhere) still ends well, since the bytes it read carry the old place in
//! their check and the segment is not reused while it has readers. One whose copy was given up ends
//! well too, but for itself alone: with the next put of that id nobody waits for it any more.
//!
//! ```text
//!   read ── holds ──────────────────────────────────────> answer
//!     └─ refused, or fails its check ── read again ── holds ──> answer, counted as mended
//!                                            └─ not ──> the entry goes, Miss(corrupt)
//! ```
//!
//! A device may refuse one read and take the next, and bytes may be wrong on their way and right
//! where they lie; what fails twice is gone.

use super::{
    Change, Copy, Displaced, Event, GetRequest, Moved, Pending, ReadHints, SectionRef, Shard,
    Touch, verify_image,
};
use crate::dram::{Purpose, Resident, State};
use crate::index::{Entry, SlotRef};
use crate::layout::{ImagePlan, RecordHints, Section};
use kvar_base::check::{Place, version};
use kvar_base::{BlockId, MissReason, Moment, page_round_up};
use kvar_io::{Buffer, DeviceError, Op, Shared};
use kvar_policy::Tenant;
use smallvec::SmallVec;
use std::ops::Range;

/// Somebody who reads: the caller's number for it, what it wants, and what it says of itself.
#[derive(Clone)]
pub(crate) struct Reader {
    pub(super) token: u64,
    pub(super) request: GetRequest,
    pub(super) hints: ReadHints,
}

impl Reader {
    pub(crate) fn new(token: u64, request: GetRequest, hints: ReadHints) -> Self {
        Self {
            token,
            request,
            hints,
        }
    }
}

/// Who waits for a device read, and for which one: a read that outlived a remove must not answer
/// those who ask after the next put.
pub(super) struct Reading {
    number: u64,
    tenant: Tenant,
    /// One, as a rule.
    waiters: SmallVec<[Reader; 1]>,
}

impl Reading {
    pub(super) fn waiters_mut(&mut self) -> &mut SmallVec<[Reader; 1]> {
        &mut self.waiters
    }
}

/// A device read under way for whoever waits in `reading`.
#[derive(Clone, Copy)]
pub(super) struct FlashRead {
    id: BlockId,
    number: u64,
    /// Where the index had the entry.
    at: SlotRef,
    entry: Entry,
    place: Place,
    segment: u32,
    is_again: bool,
}

/// What a read of a block brought.
pub(super) enum Brought {
    Block(ImagePlan),
    /// Not what it should have; it was the first try.
    Again,
    /// Not for the second time: nothing leads there any more.
    Nothing,
}

/// A device read of a block that reclaim keeps.
#[derive(Clone, Copy)]
pub(super) struct MoveRead {
    pub(super) id: BlockId,
    pub(super) entry: Entry,
    pub(super) place: Place,
    pub(super) segment: u32,
    pub(super) hints: RecordHints,
    /// It is to be offered to the tier below, not written again.
    pub(super) goes_down: bool,
    pub(super) is_again: bool,
}

impl Shard {
    pub(crate) fn get(&mut self, now: Moment, reader: Reader) {
        let (token, request) = (reader.token, &reader.request);
        if request.deadline <= now {
            self.counters.overdue_at_call += 1;
            return self.miss(token, MissReason::Deadline);
        }
        let (id, touch) = (request.id, request.touch);
        let found = self.find(&id);
        // Absent too, although somebody may be reading a copy that was given up meanwhile: whether
        // that one has expired is not known any more.
        if let Err(reason) = self.touch_found(now, &id, found, touch) {
            return self.miss(token, reason);
        }
        // What is in memory, or on its way there, needs no turn.
        if self.must_wait() && self.dram.get(&id).is_none() && !self.reading.contains_key(&id) {
            if found.is_some_and(|(_, entry)| self.get_held(&reader, &entry)) {
                return;
            }
            return self.wait_for_turn(now, reader);
        }
        self.begin_read(reader, found);
    }

    /// Reads a block that is visible, from wherever it is.
    pub(super) fn begin_read(&mut self, reader: Reader, found: Option<(SlotRef, Entry)>) {
        let token = reader.token;
        let (id, sections) = (reader.request.id, reader.request.sections.clone());
        if let Some(resident) = self.dram.get(&id) {
            let mut outcome = cut(
                &resident.sections,
                resident.version,
                &resident.image,
                sections.clone(),
            );
            let is_read = outcome.is_ok() && resident.state == State::Awaited;
            if let Ok(copy) = &mut outcome {
                copy.moved = Moved {
                    class: resident.class,
                    age_bytes: self.keep.demand_bytes().saturating_sub(resident.used_at),
                };
            }
            self.counters.dram_hits += u64::from(outcome.is_ok());
            if is_read {
                self.note_read(&id, sections);
            }
            return self.answer(token, outcome);
        }
        if self.reading.contains_key(&id) {
            if !self.may_join() {
                return self.miss(token, MissReason::Overloaded);
            }
            if let Some(reading) = self.reading.get_mut(&id) {
                reading.waiters.push(reader);
                self.turns.join();
            }
            return;
        }
        let Some((at, entry)) = found else {
            return self.miss(token, MissReason::Absent);
        };
        if self.get_held(&reader, &entry) || self.get_part(&reader, &entry) {
            return;
        }
        self.read_whole(reader, at, entry);
    }

    /// Reads all of a block that lies on the device and is not being read.
    fn read_whole(&mut self, reader: Reader, at: SlotRef, entry: Entry) {
        let id = reader.request.id;
        let (tenant, bytes) = (entry.tenant, entry.len as usize);
        let Some(buffer) = self.reserve_buffer(tenant, bytes, Purpose::Read) else {
            return self.miss(reader.token, MissReason::Overloaded);
        };
        self.reads_in_flight += 1;
        self.turns.join();
        let number = self.next_put;
        self.next_put += 1;
        self.reading.insert(
            id,
            Reading {
                number,
                tenant,
                waiters: SmallVec::from_buf([reader]),
            },
        );
        let place = self.place_of(&entry);
        let (segment, _) = self.segments.locate(entry.position);
        self.segments.get(segment).readers += 1;
        self.counters.device_read_bytes += buffer.padded_len() as u64;
        let read = FlashRead {
            id,
            number,
            at,
            entry,
            place,
            segment,
            is_again: false,
        };
        self.submit(
            Pending::Read(read),
            Op::Read {
                offset: place.offset,
                buffer,
            },
        );
    }

    pub(super) fn read_done(&mut self, read: FlashRead, op: Op, result: &Result<(), DeviceError>) {
        let Op::Read { buffer, offset } = op else {
            unreachable!("a read ends as a read")
        };
        let FlashRead {
            id,
            number,
            at,
            entry,
            place,
            segment,
            is_again,
        } = read;
        let brought = self.brought(&id, &entry, &place, &buffer, result, is_again);
        // No waiters: a remove or purge ended them. The block must not come back through here.
        let reading = self.reading.get(&id);
        let is_wanted = reading.is_some_and(|reading| reading.number == number);
        if is_wanted && matches!(brought, Brought::Again) {
            self.counters.device_read_bytes += buffer.padded_len() as u64;
            let read = FlashRead {
                is_again: true,
                ..read
            };
            return self.submit(Pending::Read(read), Op::Read { offset, buffer });
        }
        self.reads_in_flight -= 1;
        self.segments.get(segment).readers -= 1;
        let padded = page_round_up(u64::from(entry.len));
        if !is_wanted {
            return self.dram.release(entry.tenant, padded);
        }
        let waiters = self.take_readers(&id);
        let Brought::Block(plan) = brought else {
            self.dram.release(entry.tenant, padded);
            for waiter in waiters {
                self.miss(waiter.token, MissReason::Corrupt);
            }
            return;
        };
        let sections = plan.sections;
        let version = version(sections.iter().map(|section| section.check));
        let image = buffer.freeze();
        let moved = Moved {
            class: entry.class(),
            age_bytes: self.keep.age_bytes(entry.stamp),
        };
        for waiter in &waiters {
            let outcome = cut(&sections, version, &image, waiter.request.sections.clone());
            let outcome = outcome.map(|copy| Copy { moved, ..copy });
            self.counters.flash_hits += u64::from(outcome.is_ok());
            self.answer(waiter.token, outcome);
        }
        // What nobody used does not become resident.
        let used_by = waiters
            .iter()
            .rfind(|waiter| waiter.request.touch != Touch::NONE);
        let Some(touch) = used_by.map(|waiter| waiter.request.touch) else {
            return self.dram.release(entry.tenant, padded);
        };
        // Nor does what the index does not know any more: a block that was dropped by reclaim while it
        // was read stays dropped.
        let known = self.index.find_again(&id, at, &entry);
        let known = known.filter(|_| self.dram.get(&id).is_none());
        let Some((_, known)) = known else {
            return self.dram.release(entry.tenant, padded);
        };
        let arrival = self.arrivals.number(touch.request);
        let hints = RecordHints {
            depth: touch.depth,
            expires_unix_s: self.flash_expiry(&entry),
            tenant: entry.tenant,
            ..RecordHints::default()
        };
        let leased = self.leases.holds(&id);
        self.note(Change::Cached { id });
        self.dram.insert(
            id,
            Resident {
                image,
                sections,
                version,
                number,
                state: State::Clean,
                depth: touch.depth,
                ephemeral: false,
                arrival,
                class: known.class(),
                used_at: self.keep.demand_bytes(),
                hints,
                leased,
                handover: None,
                passes: false,
                is_below: false,
            },
        );
    }

    /// Verifies what a device gave; counts, and the second time forgets, what does not hold.
    pub(super) fn brought(
        &mut self,
        id: &BlockId,
        entry: &Entry,
        place: &Place,
        buffer: &Buffer,
        result: &Result<(), DeviceError>,
        is_again: bool,
    ) -> Brought {
        let plan = result.as_ref().ok().and_then(|()| {
            verify_image(id, buffer.as_slice(), entry.sectioned, entry.check64, place)
        });
        if let Some(plan) = plan {
            self.counters.reads_mended += u64::from(is_again);
            return Brought::Block(plan);
        }
        self.counters.device_read_errors += u64::from(result.is_err());
        if is_again {
            self.drop_corrupt(id, entry.position);
            return Brought::Nothing;
        }
        self.count_again(result);
        Brought::Again
    }

    pub(super) fn count_again(&mut self, result: &Result<(), DeviceError>) {
        match result {
            Ok(()) => self.counters.reads_again_check += 1,
            Err(_) => self.counters.reads_again_error += 1,
        }
    }

    /// The copy at a position did not pass its check: nothing leads there any more.
    pub(super) fn drop_corrupt(&mut self, id: &BlockId, position: u32) {
        self.counters.corrupt += 1;
        if self.index.remove_at(id, position) {
            self.note_displaced(id, position, Displaced::Corrupt);
            match self.dram.get(id).map(|resident| resident.state) {
                // Memory has the bytes as they were written: they go to the device again.
                Some(State::Clean) => {
                    self.counters.corrupt_rewritten += 1;
                    self.queue_resident(self.now, id);
                }
                Some(_) => {}
                None => self.counters.leased_corrupt += u64::from(self.lose_lease(id)),
            }
        }
    }

    /// A block was put that was not visible: what is still being read of it is a copy that was given
    /// up. Who waits for that gets what was put. Else whoever asks later would join that read, and
    /// what it brings would become resident while the index leads to the put.
    pub(super) fn answer_by_put(&mut self, id: &BlockId) {
        for waiter in self.take_readers(id) {
            self.begin_read(waiter, None);
        }
    }

    /// Takes those who wait for the read of a block; nobody waits for it any more.
    fn take_readers(&mut self, id: &BlockId) -> SmallVec<[Reader; 1]> {
        let reading = self.reading.remove(id);
        let waiters = reading.map_or_else(SmallVec::new, |reading| reading.waiters);
        self.turns.part(waiters.len());
        waiters
    }

    /// Ends reads under way of a tenant's blocks, or of all.
    pub(super) fn end_reads_of(&mut self, whose: Option<Tenant>, reason: MissReason) {
        let is_concerned = |tenant: Tenant| whose.is_none_or(|whose| whose == tenant);
        let whole = self.reading.iter();
        let whole = whole.filter(|(_, reading)| is_concerned(reading.tenant));
        let parts = self.parts.iter();
        let parts = parts.filter(|(_, part)| is_concerned(part.tenant));
        let mut ids: Vec<BlockId> = (whole.map(|(id, _)| *id))
            .chain(parts.map(|((id, _), _)| *id))
            .chain(self.ids_held(is_concerned))
            .collect();
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            self.end_reads(&id, reason);
        }
    }

    /// Ends reads under way of an id; what the device still delivers is dropped.
    pub(super) fn end_reads(&mut self, id: &BlockId, reason: MissReason) {
        for waiter in self.take_readers(id) {
            self.miss(waiter.token, reason);
        }
        self.end_parts(id, reason);
    }

    pub(super) fn miss(&mut self, token: u64, reason: MissReason) {
        self.answer(token, Err(reason));
    }

    pub(super) fn answer(&mut self, token: u64, outcome: Result<Copy, MissReason>) {
        match &outcome {
            Ok(copy) => {
                self.counters.get_bytes += copy
                    .sections
                    .iter()
                    .map(|section| u64::from(section.len))
                    .sum::<u64>();
            }
            Err(reason) => self.counters.count_miss(*reason),
        }
        self.events.push(Event::Get { token, outcome });
    }
}

/// The sections asked for.
pub(super) fn cut(
    sections: &[Section],
    version: u64,
    image: &Shared,
    wanted: Option<Range<u16>>,
) -> Result<Copy, MissReason> {
    let wanted = wanted.map_or(0..sections.len(), |range| {
        usize::from(range.start)..usize::from(range.end)
    });
    let part = sections
        .get(wanted.clone())
        .ok_or(MissReason::WrongFormat)?;
    if part.is_empty() {
        return Err(MissReason::WrongFormat);
    }
    let sections = part
        .iter()
        .zip(wanted)
        .map(|(section, index)| SectionRef {
            index: index as u16,
            len: section.len,
            check: section.check,
            offset: section.offset,
        })
        .collect();
    Ok(Copy {
        version,
        sections,
        bytes: image.clone(),
        moved: Moved::default(),
    })
}
