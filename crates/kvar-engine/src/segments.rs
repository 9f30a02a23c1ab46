//! Which segment is in which state, and where the next block goes.
//!
//! ```text
//!   Free ──> Preparing ──> Prepared ──> Open ──> Sealing ──> Sealed ──> Reclaiming ──> Free
//! ```
//!
//! At most one segment is open, one sealing, one prepared, one reclaiming. Segments are freed in
//! the order they were opened and opened again in the order they were freed.
//!
//! An open segment hands out places front to back. Each place also reserves room for a record in
//! a directory area; a payload may run over the place of the next area, which is then left out,
//! as long as the area in use has plenty of room (see [`OpenSegment::place`]).

use crate::layout::{RECORDS_PER_PAGE, Record, Superblock};
use std::collections::VecDeque;

/// The state of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentPhase {
    Free,
    Preparing,
    Prepared,
    Open,
    Sealing,
    Sealed,
    Reclaiming,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) phase: SegmentPhase,
    pub(crate) generation: u32,
    pub(crate) opened_sequence: u64,
    /// When it was opened, in bytes of demand.
    pub(crate) opened_at: u64,
    /// Device reads under way in it; it is not written again before they are over.
    pub(crate) readers: u32,
}

/// A directory area of an open segment.
///
/// The page being filled is written to two places by turns; a full page keeps its place for good.
/// Turns count only when they are flushed: after a batch that failed, the place that holds the
/// flushed records is not the one to be written.
#[derive(Debug)]
pub(crate) struct Area {
    pub(crate) first_page: u32,
    pages: u32,
    /// Records of the page being filled; `written` of them are on the device already.
    current: Vec<Record>,
    written: usize,
    /// Where the page goes next, and where it went last.
    next_place: u32,
    other_place: u32,
    unused_place: u32,
    /// Records handed out to places, recorded or not.
    reserved: usize,
    /// How it was before the batch that is not flushed yet.
    before: Option<Before>,
}

/// What an area goes back to when a batch fails.
#[derive(Debug)]
struct Before {
    written: usize,
    next_place: u32,
    other_place: u32,
    unused_place: u32,
    /// The page that was being filled, if the batch filled it.
    filled: Option<Vec<Record>>,
}

impl Area {
    fn new(first_page: u32, pages: u32) -> Self {
        Self {
            first_page,
            pages,
            current: Vec::with_capacity(RECORDS_PER_PAGE),
            written: 0,
            next_place: 0,
            other_place: 1,
            unused_place: 2,
            reserved: 0,
            before: None,
        }
    }

    fn capacity(&self) -> usize {
        (self.pages as usize - 1) * RECORDS_PER_PAGE
    }

    fn free(&self) -> usize {
        self.capacity() - self.reserved
    }

    /// Takes records and returns the pages to write: (page in the segment, its records).
    fn add(&mut self, records: &[Record]) -> Vec<(u32, Vec<Record>)> {
        let mut pages = Vec::new();
        let mut records = records.iter().copied();
        let before = self.before.get_or_insert(Before {
            written: self.written,
            next_place: self.next_place,
            other_place: self.other_place,
            unused_place: self.unused_place,
            filled: None,
        });
        loop {
            let room = RECORDS_PER_PAGE - self.current.len();
            self.current.extend(records.by_ref().take(room));
            if self.current.len() == self.written {
                return pages;
            }
            pages.push((self.first_page + self.next_place, self.current.clone()));
            self.written = self.current.len();
            if self.current.len() == RECORDS_PER_PAGE {
                // This place is final now. The other place may hold the only flushed copy of
                // earlier records until this batch is flushed, so the next page, which may be
                // written in the same batch, starts on an unused place.
                let next = Vec::with_capacity(RECORDS_PER_PAGE);
                let filled = std::mem::replace(&mut self.current, next);
                before.filled.get_or_insert(filled);
                self.written = 0;
                self.next_place = self.unused_place;
                self.unused_place += 1;
            } else if !crate::mutation::is_disabled(crate::mutation::Check::TwoPlaces) {
                std::mem::swap(&mut self.next_place, &mut self.other_place);
            }
        }
    }

    fn flushed(&mut self) {
        self.before = None;
    }

    fn undo(&mut self) {
        let Some(before) = self.before.take() else {
            return;
        };
        if let Some(filled) = before.filled {
            self.current = filled;
        }
        self.current.truncate(before.written);
        self.written = before.written;
        self.next_place = before.next_place;
        self.other_place = before.other_place;
        self.unused_place = before.unused_place;
    }
}

/// A segment that takes payload or waits for its last writes.
#[derive(Debug)]
pub(crate) struct OpenSegment {
    pub(crate) number: u32,
    pub(crate) generation: u32,
    pub(crate) opened_sequence: u64,
    pub(crate) cursor: u32,
    end: u32,
    areas: Vec<Area>,
    next_areas: VecDeque<u32>,
    area_pages: u32,
    /// Everything recorded, for the footer.
    pub(crate) records: Vec<Record>,
    /// Recorded, not yet on a directory page: (area, record).
    unwritten: Vec<(usize, Record)>,
    /// On directory pages that are not flushed yet.
    unflushed: Vec<(usize, Record)>,
    pub(crate) writes_in_flight: u32,
}

/// What must stay free behind a place, for what reclaim carries on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spare {
    pub(crate) pages: u32,
    pub(crate) records: usize,
}

/// Where a block goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) page: u32,
    pub(crate) area: usize,
}

impl OpenSegment {
    pub(crate) fn new(
        superblock: &Superblock,
        number: u32,
        generation: u32,
        opened_sequence: u64,
    ) -> Self {
        let mut next_areas: VecDeque<u32> = superblock.areas().collect();
        let first = next_areas
            .pop_front()
            .expect("a segment has a directory area");
        let area_pages = superblock.area_pages;
        Self {
            number,
            generation,
            opened_sequence,
            cursor: first + area_pages,
            end: superblock.footer_page(),
            areas: vec![Area::new(first, area_pages)],
            next_areas,
            area_pages,
            records: Vec::new(),
            unwritten: Vec::new(),
            unflushed: Vec::new(),
            writes_in_flight: 0,
        }
    }

    /// The next place for so many pages, keeping `spare` free behind it; `None` when the
    /// segment is full. No pages = room for a record alone.
    pub(crate) fn place(&mut self, pages: u32, spare: Spare) -> Option<Placed> {
        if spare.records > 0 && self.records_left() <= spare.records {
            return None;
        }
        loop {
            let area = self.areas.len() - 1;
            let free = self.areas[area].free();
            while self
                .next_areas
                .front()
                .is_some_and(|first| *first < self.cursor)
            {
                self.next_areas.pop_front();
            }
            let ahead = self.next_areas.front().copied();
            let end = self.cursor + pages;
            let runs_over = ahead.is_some_and(|first| first < end);
            if free == 0 || runs_over && free < self.areas[area].capacity() / 2 {
                let first = ahead?;
                self.next_areas.pop_front();
                self.areas.push(Area::new(first, self.area_pages));
                self.cursor = first + self.area_pages;
                continue;
            }
            if end + spare.pages > self.end {
                return None;
            }
            let page = self.cursor;
            self.cursor = end;
            self.areas[area].reserved += 1;
            return Some(Placed { page, area });
        }
    }

    /// Blocks and tombstones that it may still name, at best.
    pub(crate) fn records_left(&self) -> usize {
        let area = self.areas.last();
        area.map_or(0, |area| {
            area.free() + self.next_areas.len() * area.capacity()
        })
    }

    /// Pages behind the cursor at best.
    pub(crate) fn pages_left(&self) -> u32 {
        self.end.saturating_sub(self.cursor)
    }

    pub(crate) fn record(&mut self, area: usize, record: Record) {
        self.records.push(record);
        self.unwritten.push((area, record));
    }

    pub(crate) fn has_unwritten(&self) -> bool {
        !self.unwritten.is_empty()
    }

    /// The directory pages that must be written for what was recorded: a batch, which ends with
    /// [`flushed`](Self::flushed) or [`not_flushed`](Self::not_flushed).
    pub(crate) fn directory_pages(&mut self) -> Vec<(u32, Vec<Record>)> {
        self.unflushed.append(&mut self.unwritten);
        let unwritten = &self.unflushed;
        let mut pages = Vec::new();
        for (number, area) in self.areas.iter_mut().enumerate() {
            let records: Vec<_> = unwritten
                .iter()
                .filter(|(area, _)| *area == number)
                .map(|(_, record)| *record)
                .collect();
            if !records.is_empty() {
                pages.extend(area.add(&records));
            }
        }
        pages
    }

    /// The last batch of directory pages is flushed.
    pub(crate) fn flushed(&mut self) {
        self.unflushed.clear();
        self.areas.iter_mut().for_each(Area::flushed);
    }

    /// Which pages of the last batch are on the device is not known: they are written again, to
    /// the same places. What was flushed before lies in others.
    pub(crate) fn not_flushed(&mut self) {
        self.unflushed.append(&mut self.unwritten);
        std::mem::swap(&mut self.unflushed, &mut self.unwritten);
        self.areas.iter_mut().for_each(Area::undo);
    }
}

/// All segments of a shard.
pub(crate) struct Segments {
    pub(crate) all: Vec<Segment>,
    /// Oldest freed first.
    pub(crate) free: VecDeque<u32>,
    /// Oldest opened first.
    pub(crate) sealed: VecDeque<u32>,
    /// Its header is under way.
    pub(crate) preparing: Option<u32>,
    pub(crate) prepared: Option<u32>,
    pub(crate) open: Option<OpenSegment>,
    pub(crate) sealing: Option<OpenSegment>,
    pages_each: u32,
}

impl Segments {
    pub(crate) fn new(superblock: &Superblock) -> Self {
        let blank = Segment {
            phase: SegmentPhase::Free,
            generation: 0,
            opened_sequence: 0,
            opened_at: 0,
            readers: 0,
        };
        Self {
            all: vec![blank; superblock.segments_per_shard as usize],
            free: (0..superblock.segments_per_shard).collect(),
            sealed: VecDeque::new(),
            preparing: None,
            prepared: None,
            open: None,
            sealing: None,
            pages_each: superblock.segment_pages(),
        }
    }

    pub(crate) fn get(&mut self, number: u32) -> &mut Segment {
        &mut self.all[number as usize]
    }

    /// Whether every segment stands where its phase says, and there alone; `reclaiming` is the one that
    /// is being reclaimed.
    pub(crate) fn recount(&self, reclaiming: Option<u32>) -> Result<(), String> {
        let one = |number: Option<u32>, phase| number.map(|number| (number, phase));
        let number_of = |open: &Option<OpenSegment>| open.as_ref().map(|open| open.number);
        let single = [
            one(self.preparing, SegmentPhase::Preparing),
            one(self.prepared, SegmentPhase::Prepared),
            one(number_of(&self.open), SegmentPhase::Open),
            one(number_of(&self.sealing), SegmentPhase::Sealing),
            one(reclaiming, SegmentPhase::Reclaiming),
        ];
        let free = self.free.iter().map(|it| (*it, SegmentPhase::Free));
        let sealed = self.sealed.iter().map(|it| (*it, SegmentPhase::Sealed));
        let mut places = vec![Vec::new(); self.all.len()];
        for (number, phase) in single.into_iter().flatten().chain(free).chain(sealed) {
            places[number as usize].push(phase);
        }
        for (number, (segment, places)) in self.all.iter().zip(places).enumerate() {
            if places != [segment.phase] {
                return Err(format!(
                    "segment {number} is {:?} and stands among those that are {places:?}",
                    segment.phase
                ));
            }
        }
        Ok(())
    }

    /// Whether no segment takes anything, nor will before one is reclaimed.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.open.is_none()
            && self.prepared.is_none()
            && self.preparing.is_none()
            && self.free.is_empty()
    }

    /// A position of the index: pages from the start of the shard's first segment.
    pub(crate) fn position(&self, segment: u32, page: u32) -> u32 {
        segment * self.pages_each + page
    }

    /// Segment and page of a position.
    pub(crate) fn locate(&self, position: u32) -> (u32, u32) {
        (position / self.pages_each, position % self.pages_each)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RECORD_BLOCK;
    use kvar_base::{BlockId, DeviceUuid};
    use std::collections::{HashMap, HashSet};

    fn superblock(bytes: u64) -> Superblock {
        Superblock::plan(bytes, 1, 65536, DeviceUuid::new([1; 16]), [2; 16], 0).unwrap()
    }

    /// Fills a segment with blocks of so many pages and returns the share of it that is payload.
    fn fill(superblock: &Superblock, pages: u32) -> f64 {
        let mut segment = OpenSegment::new(superblock, 0, 1, 0);
        let mut places = Vec::new();
        while let Some(placed) = segment.place(pages, Spare::default()) {
            places.push(placed.page);
            let area = &segment.areas[placed.area];
            let area_end = area.first_page + superblock.area_pages;
            assert!(
                placed.page >= area_end,
                "payload stands behind its own area"
            );
        }
        assert!(places.windows(2).all(|pair| pair[0] + pages <= pair[1]));
        assert!(places.last().unwrap() + pages <= superblock.footer_page());
        for area in &segment.areas {
            let area_pages = area.first_page..area.first_page + superblock.area_pages;
            assert!(
                places
                    .iter()
                    .all(|page| page + pages <= area_pages.start || *page >= area_pages.end)
            );
        }
        f64::from(places.len() as u32 * pages) / f64::from(superblock.segment_pages())
    }

    #[test]
    fn little_of_a_segment_is_lost() {
        let small = superblock(4 << 30);
        let large = superblock(64 << 30);
        for (superblock, pages, share) in [
            (&small, 16, 0.97),
            (&small, 289, 0.92),
            (&large, 16, 0.98),
            (&large, 289, 0.97),
            (&large, 4096, 0.7),
        ] {
            let got = fill(superblock, pages);
            assert!(got >= share, "{pages} pages: {got}");
        }
        fill(&small, 1);
    }

    proptest::proptest! {
        /// Batches of so many records, each flushed or not; of the pages of one that is not, some
        /// are on the device, some torn, some as they were.
        #[test]
        fn neither_a_torn_page_nor_a_refused_batch_loses_what_was_flushed(
            batches in proptest::collection::vec((1..50_usize, 0..3_u32, 0..81_u32), 1..24),
        ) {
            let superblock = superblock(1 << 30);
            let mut segment = OpenSegment::new(&superblock, 0, 1, 0);
            let mut disk = HashMap::new();
            let mut flushed: HashSet<u64> = HashSet::new();
            let (mut sequence, mut recorded) = (0, HashSet::new());
            for (count, fate, fates) in batches {
                for _ in 0..count {
                    let Some(placed) = segment.place(1, Spare::default()) else {
                        break;
                    };
                    sequence += 1;
                    recorded.insert(sequence);
                    let id = BlockId::new([0; 32]);
                    segment.record(placed.area, Record::bare(RECORD_BLOCK, &id, sequence));
                }
                let pages = segment.directory_pages();
                // Before the flush any of these pages may be torn.
                let torn = pages.iter().map(|(page, _)| *page).collect::<HashSet<_>>();
                let left = on(disk.iter().filter(|(page, _)| !torn.contains(page)));
                proptest::prop_assert!(left.is_superset(&flushed));
                let mut fates = fates;
                for (page, records) in pages {
                    match if fate > 0 { 0 } else { fates % 3 } {
                        0 => drop(disk.insert(page, records)),
                        1 => drop(disk.remove(&page)),
                        _ => {}
                    }
                    fates /= 3;
                }
                if fate > 0 {
                    segment.flushed();
                    flushed.clone_from(&recorded);
                } else {
                    segment.not_flushed();
                }
                proptest::prop_assert!(on(disk.iter()).is_superset(&flushed));
            }
        }
    }

    fn on<'a>(pages: impl Iterator<Item = (&'a u32, &'a Vec<Record>)>) -> HashSet<u64> {
        pages
            .flat_map(|(_, records)| records)
            .map(Record::sequence)
            .collect()
    }
}
