//! What a power cut may leave: everything a completed flush covers, and any part of the rest.
//!
//! ```text
//!   log:   S0 S1 C0 F(1) S2 C1 │ C2 ...        S submitted   C completed   F flushed (covers n)
//!                              └ point 6: write 0 is durable, 1 completed, 2 in flight
//! ```
//!
//! Writes are applied in the order in which they completed, those in flight last: where two of them
//! overlap, a drive keeps the later one if it keeps both.

use super::image::{Image, PAGE, Page, SECTOR};
use super::random::Random;
use kvar_base::PAGE_BYTES;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Random images that [`WriteLog::images`] gives for a point, besides the three plain ones. Each
/// costs a reopen of the store in a test that enumerates every point.
const RANDOM_IMAGES: u64 = 5;

/// What of the unflushed writes is there after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// Nothing: the drive's cache lost all of it.
    Flushed,
    /// Every completed write, none in flight: the process was killed, the drive kept its power.
    Completed,
    /// Completed and in flight, all of them.
    Submitted,
    /// The first so many, completed ones first.
    Prefix(usize),
    /// Each of them whole, not at all, or torn at 512 or 4096 bytes, by seed.
    Random {
        /// The seed.
        seed: u64,
    },
}

/// Bytes on their way to the disk.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub(crate) offset: u64,
    pub(crate) content: Content,
}

#[derive(Clone, Debug)]
pub(crate) enum Content {
    Pages(Vec<Arc<Page>>),
    /// A discarded range that reads as zero: this many pages.
    Zeros(u64),
}

impl Write {
    pub(crate) fn bytes(&self) -> Range<u64> {
        let pages = match &self.content {
            Content::Pages(pages) => pages.len() as u64,
            Content::Zeros(pages) => *pages,
        };
        self.offset..self.offset + pages * PAGE_BYTES
    }

    pub(crate) fn apply(&self, image: &mut Image) {
        let first = self.offset / PAGE_BYTES;
        match &self.content {
            Content::Pages(pages) => {
                for (page, content) in (first..).zip(pages) {
                    image.put_page(page, Arc::clone(content));
                }
            }
            Content::Zeros(pages) => image.clear_pages(first..first + pages),
        }
    }

    /// A part of it: from the front, or scattered; in sectors or in pages. Returns that unit.
    pub(crate) fn apply_torn(&self, image: &mut Image, random: &mut Random) -> usize {
        let unit = if random.coin() { SECTOR } else { PAGE };
        let scattered = random.coin();
        let bytes = self.bytes();
        let units = (bytes.end - bytes.start) / unit as u64;
        let front = random.below(units + 1);
        match &self.content {
            Content::Zeros(_) => {
                let pages = front * unit as u64 / PAGE_BYTES;
                image.clear_pages(self.offset / PAGE_BYTES..self.offset / PAGE_BYTES + pages);
            }
            Content::Pages(pages) => {
                for number in 0..units {
                    let arrives = if scattered {
                        random.coin()
                    } else {
                        number < front
                    };
                    if arrives {
                        let at = number as usize * unit;
                        let part = &pages[at / PAGE][at % PAGE..at % PAGE + unit];
                        image.write(self.offset + at as u64, part);
                    }
                }
            }
        }
        unit
    }
}

/// What became of the writes that no flush covered, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survived {
    /// Arrived whole.
    pub whole: u64,
    /// Arrived in sectors of 512 bytes.
    pub torn_at_512: u64,
    /// Arrived in pages of 4096 bytes.
    pub torn_at_4096: u64,
    /// Lost.
    pub lost: u64,
    /// Arrived, at least in part, although one before it was lost.
    pub reordered: u64,
}

impl Survived {
    pub(crate) fn add(&mut self, other: &Self) {
        self.whole += other.whole;
        self.torn_at_512 += other.torn_at_512;
        self.torn_at_4096 += other.torn_at_4096;
        self.lost += other.lost;
        self.reordered += other.reordered;
    }
}

/// The image after a crash, from what was durable, completed and in flight.
pub(crate) fn survive(
    durable: &Image,
    completed: &[Write],
    in_flight: &[Write],
    how: Survival,
) -> (Image, Survived) {
    let mut image = durable.clone();
    let mut survived = Survived::default();
    let all = completed.iter().chain(in_flight);
    let there = completed.len() + in_flight.len();
    let first = match how {
        Survival::Flushed | Survival::Random { .. } => 0,
        Survival::Completed => completed.len(),
        Survival::Submitted => there,
        Survival::Prefix(count) => count.min(there),
    };
    match how {
        Survival::Flushed | Survival::Completed | Survival::Submitted | Survival::Prefix(_) => {
            all.take(first).for_each(|write| write.apply(&mut image));
            (survived.whole, survived.lost) = (first as u64, (there - first) as u64);
        }
        Survival::Random { seed } => {
            let mut random = Random::new(seed);
            let mut in_flight: Vec<&Write> = in_flight.iter().collect();
            random.shuffle(&mut in_flight);
            for write in completed.iter().chain(in_flight) {
                let arrives = random.below(3);
                survived.reordered += u64::from(arrives > 0 && survived.lost > 0);
                match arrives {
                    0 => survived.lost += 1,
                    1 => {
                        survived.whole += 1;
                        write.apply(&mut image);
                    }
                    _ if write.apply_torn(&mut image, &mut random) == SECTOR => {
                        survived.torn_at_512 += 1;
                    }
                    _ => survived.torn_at_4096 += 1,
                }
            }
        }
    }
    (image, survived)
}

/// Everything that was written and flushed, in order, from a first image on.
#[derive(Clone, Debug)]
pub struct WriteLog {
    start: Image,
    events: Vec<Event>,
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Submitted {
        number: u64,
        write: Write,
    },
    /// `stored` is what became of it; a fault may have changed, moved or lost it.
    Completed {
        number: u64,
        stored: Option<Write>,
    },
    /// The first `covers` stored writes, in order of completion, are durable.
    Flushed {
        covers: u64,
    },
}

impl WriteLog {
    pub(crate) fn new(start: Image) -> Self {
        Self {
            start,
            events: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, event: Event) {
        self.events.push(event);
    }

    /// Events so far; a point is a number of events, from 0 to this.
    #[must_use]
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing has happened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// The image after a crash at `point` (at the end, if it is beyond it).
    #[must_use]
    pub fn image(&self, point: usize, how: Survival) -> Image {
        let (durable, completed, in_flight) = self.state(point);
        survive(&durable, &completed, &in_flight, how).0
    }

    /// The images to check for a crash at `point`: nothing unflushed, all completed, all submitted,
    /// and some random ones.
    pub fn images(&self, point: usize, seed: u64) -> impl Iterator<Item = (Survival, Image)> {
        let (durable, completed, in_flight) = self.state(point);
        let mut random = Random::new(seed ^ point as u64);
        let plain = [Survival::Flushed, Survival::Completed, Survival::Submitted];
        let torn: Vec<Survival> = (0..RANDOM_IMAGES)
            .map(|_| Survival::Random {
                seed: random.next(),
            })
            .collect();
        plain
            .into_iter()
            .chain(torn)
            .map(move |how| (how, survive(&durable, &completed, &in_flight, how).0))
    }

    /// What was durable, completed and in flight after `point` events.
    fn state(&self, point: usize) -> (Image, Vec<Write>, Vec<Write>) {
        let mut in_flight: BTreeMap<u64, &Write> = BTreeMap::new();
        let mut stored: Vec<&Write> = Vec::new();
        let mut durable = 0;
        for event in &self.events[..point.min(self.events.len())] {
            match event {
                Event::Submitted { number, write } => {
                    in_flight.insert(*number, write);
                }
                Event::Completed {
                    number,
                    stored: write,
                } => {
                    in_flight.remove(number);
                    stored.extend(write);
                }
                Event::Flushed { covers } => durable = durable.max(*covers as usize),
            }
        }
        let mut image = self.start.clone();
        let (flushed, rest) = stored.split_at(durable.min(stored.len()));
        flushed.iter().for_each(|write| write.apply(&mut image));
        let completed = rest.iter().copied().cloned().collect();
        (image, completed, in_flight.into_values().cloned().collect())
    }
}
