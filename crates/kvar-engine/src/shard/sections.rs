//! Reads of some sections of a block: no more of the device than they take.
//!
//! ```text
//!  directory known ────────────────────────────────────> sections ──> verified ──> answer
//!  directory not known ──> front ── holds what is wanted ──────────────^
//!                            └────── it lies further on ──> sections ──^
//!
//!  image      | section directory | section 0 | section 1 | ... | section n |
//!  front      |===================|-- and what is wanted, where it is near -->
//!  sections                                   |========wanted======|
//! ```
//!
//! How far the front must reach to hold what is wanted is known from the last directory of a block
//! of the same length: blocks of one model are laid out alike. A wrong guess costs one more read,
//! never a wrong byte. Directories that were verified are remembered, so that an engine which takes
//! a block layer by layer reads each one once.
//!
//! What must always be true: a directory is believed when it matches the entry's `check64`; a
//! section is served when it matches the directory's content check. What a remembered directory
//! says is used only for the very copy it was read from. The segment is not written anew before the
//! last read of it is over.
//!
//! Left to others: whole blocks (`read`), which alone become resident; what a reader that takes one
//! section after another is spared (`ahead`).

use super::ahead::STRETCH_BYTES;
use super::{Copy, Moved, Pending, Reader, SectionRef, Shard, Touch};
use crate::dram::Purpose;
use crate::index::Entry;
use crate::layout::{ImagePlan, PAGE};
use kvar_base::FastMap;
use kvar_base::check::{Place, crc64, version};
use kvar_base::{BlockId, ContentCheck, MissReason, page_round_up};
use kvar_io::{DeviceError, Op};
use kvar_policy::Tenant;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Bytes read for nothing, at most, to save a second read: what a drive moves in the time that one
/// more read takes to answer.
const NEAR_BYTES: u64 = 64 << 10;
/// Sections of remembered directories in all (24 bytes each: 1 MiB).
const SECTIONS_KNOWN_MAX: usize = 40_000;

/// A read of sections under way.
#[derive(Clone)]
pub(super) struct PartRead {
    id: BlockId,
    number: u64,
    entry: Entry,
    place: Place,
    segment: u32,
    wanted: Range<u16>,
    /// What the directory says; `None`: this read begins at the directory.
    known: Option<Arc<Known>>,
    /// Bytes from the start of the image to the start of the read.
    from: u64,
    /// Whether what comes beyond what is wanted is kept for who asks next.
    is_stretch: bool,
    is_again: bool,
}

/// Who waits for a read of sections, and of whose block.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) token: u64,
    pub(super) tenant: Tenant,
}

/// A section directory that was verified.
pub(super) struct Known {
    check64: u64,
    position: u32,
    version: u64,
    plan: ImagePlan,
}

impl Known {
    fn sections(&self) -> usize {
        self.plan.sections.len()
    }

    /// Bytes of the image from the first to behind the last of these sections, in whole pages.
    fn span(&self, wanted: &Range<u16>) -> Range<u64> {
        let sections = &self.plan.sections;
        let first = &sections[usize::from(wanted.start)];
        let last = &sections[usize::from(wanted.end) - 1];
        u64::from(first.offset)
            ..page_round_up(u64::from(last.offset) + u64::from(last.len)).min(self.plan.bytes)
    }

    fn has(&self, wanted: &Range<u16>) -> bool {
        usize::from(wanted.end) <= self.sections()
    }

    /// Whether it is of this very copy.
    pub(super) fn is_of(&self, entry: &Entry) -> bool {
        self.check64 == entry.check64 && self.position == entry.position
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// The end of the sections from `first` on that lie whole before `end` in the image.
    pub(super) fn reach_of(&self, first: u16, end: u64) -> u16 {
        let rest = self.plan.sections.get(usize::from(first)..).unwrap_or(&[]);
        let whole = rest
            .iter()
            .take_while(|section| u64::from(section.offset) + u64::from(section.len) <= end);
        first + whole.count() as u16
    }

    /// These and as many behind them as make a stretch.
    fn stretch(&self, wanted: &Range<u16>) -> Range<u16> {
        let start = u64::from(self.plan.sections[usize::from(wanted.start)].offset);
        let mut end = wanted.end;
        while usize::from(end) < self.sections()
            && u64::from(self.plan.sections[usize::from(end)].offset) < start + STRETCH_BYTES
        {
            end += 1;
        }
        wanted.start..end
    }

    /// Where these sections lie in a read that begins at `from` in the image.
    pub(super) fn sections_at(&self, wanted: &Range<u16>, from: u64) -> SmallVec<[SectionRef; 1]> {
        let at = |index: u16| {
            let section = &self.plan.sections[usize::from(index)];
            SectionRef {
                index,
                len: section.len,
                check: section.check,
                offset: (u64::from(section.offset) - from) as u32,
            }
        };
        wanted.clone().map(at).collect()
    }
}

/// Directories that were verified lately.
#[derive(Default)]
pub(super) struct Directories {
    known: FastMap<BlockId, Arc<Known>>,
    order: VecDeque<BlockId>,
    sections: usize,
    last: Option<Arc<Known>>,
}

impl Directories {
    fn of(&self, id: &BlockId, entry: &Entry) -> Option<&Arc<Known>> {
        self.known.get(id).filter(|known| known.is_of(entry))
    }

    /// How a block of this length is most likely laid out.
    fn guess(&self, image_bytes: u32) -> Option<&Arc<Known>> {
        self.last
            .as_ref()
            .filter(|known| known.plan.bytes == u64::from(image_bytes))
    }

    fn remember(&mut self, id: BlockId, known: &Arc<Known>) {
        self.last = Some(known.clone());
        self.sections += known.sections();
        match self.known.insert(id, known.clone()) {
            Some(before) => self.sections -= before.sections(),
            None => self.order.push_back(id),
        }
        while self.sections > SECTIONS_KNOWN_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            if let Some(gone) = self.known.remove(&oldest) {
                self.sections -= gone.sections();
            }
        }
    }
}

impl Shard {
    /// Reads sections of a block on the device, unless all of it is wanted: then `false`. To a reader
    /// that goes on those behind them come along.
    pub(super) fn get_part(&mut self, reader: &Reader, entry: &Entry) -> bool {
        let (token, id) = (reader.token, &reader.request.id);
        let wanted = reader.request.sections.as_ref();
        let Some(wanted) = wanted.filter(|_| entry.sectioned) else {
            return false;
        };
        if wanted.is_empty() {
            self.miss(token, MissReason::WrongFormat);
            return true;
        }
        let known = self.directories.of(id, entry).cloned();
        let likely = known.clone();
        let likely = likely.or_else(|| self.directories.guess(entry.len).cloned());
        let likely = likely.filter(|likely| likely.has(wanted));
        let plan = |is_stretch| {
            let (known, likely) = (known.as_deref(), likely.as_deref());
            let (stretch, span) = plan_of(known, likely, wanted, is_stretch);
            (stretch, span.start..span.end.min(u64::from(entry.len)))
        };
        let mut is_stretch = reader.hints.goes_on;
        let (mut stretch, mut span) = plan(is_stretch);
        if is_stretch && !self.may_hold(page_round_up(span.end - span.start)) {
            is_stretch = false;
            (stretch, span) = plan(is_stretch);
        }
        let is_laid_out = likely.is_some();
        if likely.is_some_and(|likely| likely.sections() == stretch.len()) {
            return false;
        }
        if known.as_ref().is_some_and(|known| !known.has(wanted)) {
            self.miss(token, MissReason::WrongFormat);
            return true;
        }
        let number = self.next_put;
        self.next_put += 1;
        let (segment, _) = self.segments.locate(entry.position);
        let read = PartRead {
            id: *id,
            number,
            entry: *entry,
            place: self.place_of(entry),
            segment,
            wanted: wanted.clone(),
            known,
            from: span.start,
            is_stretch,
            is_again: false,
        };
        let tenant = entry.tenant;
        self.parts.insert((*id, number), Part { token, tenant });
        if is_stretch {
            // Where nothing is known of the layout, whoever comes meanwhile may have to read after all.
            let reach = if is_laid_out { stretch } else { 0..u16::MAX };
            self.stretch_begun((*id, number), reach);
            self.set_aside(&(*id, number), page_round_up(span.end - span.start));
        }
        self.reads_in_flight += 1;
        self.segments.get(segment).readers += 1;
        self.counters.part_reads += 1;
        self.read_part(read, span);
        true
    }

    fn read_part(&mut self, mut read: PartRead, span: Range<u64>) {
        let (tenant, bytes) = (read.entry.tenant, (span.end - span.start) as usize);
        let Some(buffer) = self.reserve_buffer(tenant, bytes, Purpose::Read) else {
            return self.end_part(&read, Err(MissReason::Overloaded));
        };
        read.from = span.start;
        self.counters.device_read_bytes += buffer.padded_len() as u64;
        let offset = read.place.offset + span.start;
        self.submit(Pending::PartRead(read), Op::Read { offset, buffer });
    }

    pub(super) fn part_read_done(
        &mut self,
        read: PartRead,
        op: Op,
        result: &Result<(), DeviceError>,
    ) {
        let Op::Read { buffer, .. } = op else {
            unreachable!("a read ends as a read")
        };
        let padded = buffer.padded_len() as u64;
        self.dram.release(read.entry.tenant, padded);
        // A remove or purge answered whoever waited.
        if !self.parts.contains_key(&(read.id, read.number)) {
            return self.end_part(&read, Err(MissReason::Removed));
        }
        if result.is_err() {
            drop(buffer);
            self.counters.device_read_errors += 1;
            return self.part_failed(read, padded, result);
        }
        let known = match &read.known {
            Some(known) => known.clone(),
            None => match self.verified_directory(&read, buffer.as_slice()) {
                Directory::Verified(known) => known,
                Directory::Longer(bytes) if bytes > padded => {
                    drop(buffer);
                    return self.read_part(read, 0..bytes);
                }
                Directory::Longer(_) | Directory::Wrong => {
                    drop(buffer);
                    return self.part_failed(read, padded, result);
                }
            },
        };
        if !known.has(&read.wanted) {
            return self.end_part(&read, Err(MissReason::WrongFormat));
        }
        let span = known.span(&read.wanted);
        if span.start < read.from || span.end > read.from + padded {
            drop(buffer);
            let stretch = known.span(&known.stretch(&read.wanted));
            let bytes = page_round_up(stretch.end - stretch.start);
            let has_room = read.is_stretch && self.set_aside(&(read.id, read.number), bytes);
            let span = if has_room { stretch } else { span };
            let read = PartRead {
                known: Some(known),
                ..read
            };
            return self.read_part(read, span);
        }
        let sections = known.sections_at(&read.wanted, read.from);
        let holds = sections.iter().all(|section| {
            let bytes = &buffer.as_slice()[section.offset as usize..][..section.len as usize];
            ContentCheck::of(bytes, &read.id, section.index) == section.check
        });
        if !holds {
            drop(buffer);
            return self.part_failed(read, padded, result);
        }
        self.counters.reads_mended += u64::from(read.is_again);
        self.counters.flash_hits += 1;
        let bytes = buffer.freeze();
        if read.is_stretch {
            let (key, tenant, next) = ((read.id, read.number), read.entry.tenant, read.wanted.end);
            let lies = (read.from, padded);
            let is_held = self.hold(key, tenant, &known, lies, next, &bytes);
            let held_from = if is_held { next } else { u16::MAX };
            let first = read.wanted.start;
            self.share(&key, &known, lies, (first, held_from), &bytes);
        }
        let copy = Copy {
            version: known.version,
            sections,
            bytes,
            moved: Moved::default(),
        };
        self.end_part(&read, Ok(copy));
    }

    fn verified_directory(&mut self, read: &PartRead, front: &[u8]) -> Directory {
        let Some(pages) = ImagePlan::pages_of_directory(&read.id, front) else {
            return Directory::Wrong;
        };
        let Some(directory) = front.get(..pages * PAGE) else {
            return Directory::Longer((pages * PAGE) as u64);
        };
        let check64 = super::check64_of(crc64(directory), &read.id, &read.place);
        let image_bytes = u64::from(read.entry.len);
        match ImagePlan::decode_directory(&read.id, front, image_bytes) {
            Some(plan) if check64 == read.entry.check64 => {
                let known = Arc::new(Known {
                    check64,
                    position: read.entry.position,
                    version: version(plan.sections.iter().map(|section| section.check)),
                    plan,
                });
                self.directories.remember(read.id, &known);
                Directory::Verified(known)
            }
            _ => Directory::Wrong,
        }
    }

    /// The same again, once; then nothing leads there any more.
    fn part_failed(&mut self, read: PartRead, bytes: u64, result: &Result<(), DeviceError>) {
        if read.is_again {
            self.drop_corrupt(&read.id, read.entry.position);
            return self.end_part(&read, Err(MissReason::Corrupt));
        }
        self.count_again(result);
        let (is_again, span) = (true, read.from..read.from + bytes);
        self.read_part(PartRead { is_again, ..read }, span);
    }

    fn end_part(&mut self, read: &PartRead, outcome: Result<Copy, MissReason>) {
        self.reads_in_flight -= 1;
        self.segments.get(read.segment).readers -= 1;
        let failed = outcome.as_ref().err().copied();
        if let Some(part) = self.parts.remove(&(read.id, read.number)) {
            self.answer(part.token, outcome);
        }
        if !read.is_stretch {
            return;
        }
        // Of the others' reads it says only that there is no such block any more. Nor need what it
        // brought be theirs: they may want what it did not reach, and the block may be elsewhere by
        // now, or in memory alone.
        let is_gone = |reason: &MissReason| {
            use MissReason::{Corrupt, Removed};
            matches!(reason, Corrupt | Removed)
        };
        let gone = failed.filter(is_gone);
        for waiter in self.stretch_ended(&(read.id, read.number)) {
            if let Some(reason) = gone {
                self.miss(waiter.token, reason);
            } else if waiter.request.deadline <= self.now {
                self.overdue_at_device(waiter.token);
            } else {
                self.get_again(waiter);
            }
        }
    }

    /// Serves a reader that waited for a read which was not its own.
    pub(super) fn get_again(&mut self, mut reader: Reader) {
        // What it is worth is noted.
        reader.request.touch = Touch::NONE;
        self.get(self.now, reader);
    }

    /// Answers whoever reads sections of a block; what the device still delivers is dropped.
    pub(super) fn end_parts(&mut self, id: &BlockId, reason: MissReason) {
        let numbers: Vec<u64> = self
            .parts
            .range((*id, 0)..=(*id, u64::MAX))
            .map(|((_, number), _)| *number)
            .collect();
        for number in numbers {
            if let Some(part) = self.parts.remove(&(*id, number)) {
                self.miss(part.token, reason);
            }
        }
        self.end_ahead(id, reason);
    }
}

/// Which sections a read should bring, and what bytes of the image that takes, as far as the layout is
/// known, or guessed.
fn plan_of(
    known: Option<&Known>,
    likely: Option<&Known>,
    wanted: &Range<u16>,
    is_stretch: bool,
) -> (Range<u16>, Range<u64>) {
    let stretch = match likely {
        Some(likely) if is_stretch => likely.stretch(wanted),
        _ => wanted.clone(),
    };
    let span = match (known, likely) {
        (Some(known), Some(_)) => known.span(&stretch),
        (None, Some(likely)) => {
            let directory = (likely.plan.directory_pages * PAGE) as u64;
            let span = likely.span(&stretch);
            let near = span.start - directory <= NEAR_BYTES;
            0..if near { span.end } else { directory }
        }
        // Nothing is known: the directory is most likely one page, and a section no longer
        // than what is near. (Or it is known that there are no such sections.)
        (_, None) if wanted.start == 0 && is_stretch => 0..PAGE as u64 + STRETCH_BYTES,
        (_, None) if wanted.start == 0 => 0..PAGE as u64 + NEAR_BYTES,
        (_, None) => 0..PAGE as u64,
    };
    (stretch, span)
}

/// What the first bytes of an image say.
enum Directory {
    Verified(Arc<Known>),
    /// It takes so many bytes, more than were read.
    Longer(u64),
    Wrong,
}
