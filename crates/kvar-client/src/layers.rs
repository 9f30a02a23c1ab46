//! Blocks that are read layer by layer: the first section of all of them, then the second of all, so
//! that whoever uses section k of every block before section k + 1 of any waits only for what it needs.
//!
//! ```text
//!   block        0    1    2   ...            one part of the call a block and group of sections,
//!   group 0      0    1    2   ...            asked for in this order; a group is one section, or
//!   group 1      n   n+1  n+2  ...            several that are small
//!   ...
//!                          └── a miss here: the parts below it are not asked for any more
//!
//!   LayerGet (any thread)                     Layers (the client's thread)
//!     wait_section(k) <── condition ── Board <── a part has ended: verified, or missed
//! ```
//!
//! What must always be true:
//! * a section is said to be there when the bytes in the receiver's memory passed the writer's
//!   check, and when every section before it is decided: what was said is never taken back;
//! * the sections of a block that are said to be there are of one version;
//! * a block that misses at section k misses at every section from k on, and says why;
//! * every section is decided by the call's deadline.
//!
//! Left to others: sending and receiving (the parts are those of any get), and which block to read.

use crate::call::GetSlot;
use crate::items::{Filled, GetItem, GetOutcome};
use kvar_base::{BlockId, MissReason, SECTIONS_MAX};
use kvar_transport::Sink;
use kvar_wire::Lengths;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Sections are asked for together until they have so many bytes: a part costs both sides some
/// microseconds, which is what this many bytes cost.
const GROUP_BYTES_MIN: u64 = 32 << 10;

/// A block to read layer by layer.
#[derive(Debug)]
pub struct LayerItem {
    /// Its id.
    pub id: BlockId,
    /// Its depth in its chain, for recency.
    pub depth: u32,
    /// Where each of its sections goes, in order: memory of exactly the section's length. At least
    /// one: a block of none is a miss, `wrong_format`.
    pub into: Vec<Filled>,
}

impl LayerItem {
    /// A block of sections of these lengths, into memory made here.
    #[must_use]
    pub fn to_vecs(id: BlockId, lengths: &[u32]) -> Self {
        let into = lengths.iter().map(|len| vec![0; *len as usize]);
        Self {
            id,
            depth: 0,
            into: into.map(Filled::Bytes).collect(),
        }
    }
}

/// A get by layers on its way to a session.
#[derive(Debug)]
pub struct LayerRequest {
    pub(crate) items: Vec<GetItem>,
    pub(crate) touch_request: u64,
    pub(crate) waits: bool,
    pub(crate) teller: Teller,
}

impl LayerRequest {
    /// Blocks that all have as many sections as the first (others are a miss, `wrong_format`); the
    /// handle says what has come.
    #[must_use]
    pub fn new(blocks: Vec<LayerItem>, touch_request: u64) -> (Self, LayerGet) {
        let sections = blocks.first().map_or(0, |block| block.into.len());
        let groups = blocks.first().map_or_else(Vec::new, groups_of);
        let count = blocks.len();
        let mut items = Vec::with_capacity(groups.len() * count);
        let mut rest: Vec<_> = blocks
            .into_iter()
            .map(|block| {
                let is_sound = block.into.len() == sections && sections <= SECTIONS_MAX;
                (block.id, block.depth, is_sound, block.into.into_iter())
            })
            .collect();
        for group in &groups {
            for (id, depth, is_sound, into) in &mut rest {
                let pieces: Vec<Filled> = into.by_ref().take(group.len()).collect();
                items.push(part(*id, *depth, is_sound.then(|| group.clone()), pieces));
            }
        }
        let shared = Arc::new(Shared {
            groups,
            blocks: count,
            begun: Instant::now(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let mut state = shared.lock();
        // Blocks without sections have no part that could say so.
        let lost = (sections == 0).then_some((0, MissReason::WrongFormat));
        state.lost = vec![lost; count];
        state.arrived = (0..shared.groups.len())
            .map(|_| Arrived::default())
            .collect();
        drop(state);
        let request = Self {
            items,
            touch_request,
            waits: false,
            teller: Teller(Arc::clone(&shared)),
        };
        (request, LayerGet { shared, sections })
    }

    /// The same, and blocks that a writer has announced are waited for.
    #[must_use]
    pub fn waiting(self, waits: bool) -> Self {
        Self { waits, ..self }
    }
}

/// Which sections are asked for together.
fn groups_of(block: &LayerItem) -> Vec<Range<u16>> {
    let mut groups = Vec::new();
    let (mut first, mut bytes) = (0, 0);
    for (end, into) in (1..=u16::MAX).zip(&block.into) {
        bytes += Sink::len(into) as u64;
        if bytes >= GROUP_BYTES_MIN {
            groups.push(first..end);
            (first, bytes) = (end, 0);
        }
    }
    // What is left is too small to be asked for alone.
    let end = u16::try_from(block.into.len()).unwrap_or(u16::MAX);
    match groups.last_mut() {
        Some(last) if first < end => last.end = end,
        None if first < end => groups.push(first..end),
        _ => {}
    }
    groups
}

/// One part of the call; without a range it is not sound, which ends it before it is sent.
fn part(id: BlockId, depth: u32, group: Option<Range<u16>>, mut pieces: Vec<Filled>) -> GetItem {
    let length = |piece: &Filled| u32::try_from(Sink::len(piece)).unwrap_or(u32::MAX);
    let lengths: Vec<u32> = pieces.iter().map(length).collect();
    let into = match pieces.len() {
        1 => pieces.remove(0),
        _ => Filled::Pieces(pieces),
    };
    GetItem {
        id,
        sections: Some(group.unwrap_or(0..0)),
        expected: Lengths::of(&lengths),
        version: None,
        depth,
        into,
    }
}

/// What is shared by the handle and the client's thread.
#[derive(Debug)]
struct Shared {
    groups: Vec<Range<u16>>,
    blocks: usize,
    begun: Instant,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// For each block from which group on it misses, and why.
    lost: Vec<Option<(usize, MissReason)>>,
    arrived: Vec<Arrived>,
    /// Groups from the first on that are decided.
    decided: usize,
    ended: bool,
}

/// A group of sections of all blocks.
#[derive(Debug, Default)]
struct Arrived {
    /// When its last part ended.
    at: Option<Instant>,
    /// The blocks' memory, until somebody takes it.
    into: Vec<Filled>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A get by layers under way. Dropping it does not stop the call; its memory goes when that has ended.
pub struct LayerGet {
    shared: Arc<Shared>,
    sections: usize,
}

impl LayerGet {
    /// Sections of every block.
    #[must_use]
    pub fn sections(&self) -> usize {
        self.sections
    }

    /// Blocks.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.shared.blocks
    }

    /// Sections `first..end` come together with this one.
    ///
    /// # Panics
    /// There is no such section.
    #[must_use]
    pub fn group(&self, section: usize) -> Range<usize> {
        let group = &self.shared.groups[self.number(section)];
        usize::from(group.start)..usize::from(group.end)
    }

    /// Waits until this section of all blocks, and every one before it, is there or known to be missing,
    /// up to `timeout`: then `None`. For each block why its section is not there; `None`: it is, its
    /// bytes passed the writer's check, and nothing will write them any more.
    ///
    /// # Panics
    /// There is no such section.
    #[must_use]
    pub fn wait_section(
        &self,
        section: usize,
        timeout: Duration,
    ) -> Option<Vec<Option<MissReason>>> {
        if self.shared.blocks == 0 {
            return Some(Vec::new());
        }
        let number = self.number(section);
        let state = self.wait(timeout, |state| state.decided <= number)?;
        Some(misses(&state, number))
    }

    /// Whether [`wait_section`](Self::wait_section) would not wait.
    #[must_use]
    pub fn is_decided(&self, section: usize) -> bool {
        self.wait_section(section, Duration::ZERO).is_some()
    }

    /// When this section of the last block came, or was known to be missing.
    ///
    /// # Panics
    /// There is no such section.
    #[must_use]
    pub fn decided_at(&self, section: usize) -> Option<Instant> {
        if self.shared.blocks == 0 {
            return None;
        }
        self.shared.lock().arrived[self.number(section)].at
    }

    /// The memory of this section and of those that come with it ([`group`](Self::group)), a list of
    /// them for each block: the caller's again. `None`: not decided yet, or taken before. Of a block
    /// that misses the bytes mean nothing.
    ///
    /// # Panics
    /// There is no such section.
    #[must_use]
    pub fn take_section(&self, section: usize) -> Option<Vec<Vec<Filled>>> {
        let number = self.number(section);
        let mut state = self.shared.lock();
        let is_there = state.decided > number && !state.arrived[number].into.is_empty();
        let into = is_there.then(|| std::mem::take(&mut state.arrived[number].into));
        drop(state);
        let pieces = |filled| match filled {
            Filled::Pieces(pieces) => pieces,
            one => vec![one],
        };
        Some(into?.into_iter().map(pieces).collect())
    }

    /// Whether everything is decided: no memory of the call is used any more.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.shared.lock().ended
    }

    /// How long it took until the last section was decided; `None`: it is not yet.
    #[must_use]
    pub fn took(&self) -> Option<Duration> {
        let state = self.shared.lock();
        let last = state.arrived.iter().filter_map(|arrived| arrived.at).max();
        let last = last.unwrap_or(self.shared.begun);
        (state.ended).then(|| last.saturating_duration_since(self.shared.begun))
    }

    /// Waits until everything is decided, up to `timeout`: then `None`. For each block why it is not
    /// there whole.
    #[must_use]
    pub fn wait_all(&self, timeout: Duration) -> Option<Vec<Option<MissReason>>> {
        let state = self.wait(timeout, |state| !state.ended)?;
        Some(misses(&state, self.shared.groups.len()))
    }

    /// Waits for the end, which the call's deadline bounds, and says of each block why it is not there
    /// whole, and from which section on.
    #[must_use]
    pub fn finish(self) -> Vec<Option<(usize, MissReason)>> {
        let mut state = self.shared.lock();
        while !state.ended {
            let changed = self.shared.changed.wait(state);
            state = changed.unwrap_or_else(PoisonError::into_inner);
        }
        let groups = &self.shared.groups;
        let first = |group: usize| groups.get(group).map_or(0, |it| usize::from(it.start));
        let from = |lost: &Option<(usize, MissReason)>| lost.map(|(at, why)| (first(at), why));
        state.lost.iter().map(from).collect()
    }

    /// Waits while something holds; `None`: it still does.
    fn wait(
        &self,
        timeout: Duration,
        holds: impl Fn(&State) -> bool,
    ) -> Option<MutexGuard<'_, State>> {
        let state = self.shared.lock();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, timeout, |state| holds(state));
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (!holds(&state)).then_some(state)
    }

    fn number(&self, section: usize) -> usize {
        let groups = &self.shared.groups;
        let number = groups.partition_point(|group| usize::from(group.end) <= section);
        assert!(
            number < groups.len(),
            "section {section} of {} sections",
            self.sections
        );
        number
    }
}

/// For each block why it is not there up to this group.
fn misses(state: &State, group: usize) -> Vec<Option<MissReason>> {
    let miss = |lost: &Option<(usize, MissReason)>| match lost {
        Some((from, reason)) if *from <= group => Some(*reason),
        _ => None,
    };
    state.lost.iter().map(miss).collect()
}

impl fmt::Debug for LayerGet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (decided, groups) = (self.shared.lock().decided, self.shared.groups.len());
        let blocks = self.shared.blocks;
        write!(f, "LayerGet({blocks} blocks, {decided} of {groups} groups)")
    }
}

/// Tells the handle what happens; its end is the end of the call, however it comes about.
#[derive(Debug)]
pub(crate) struct Teller(Arc<Shared>);

impl Teller {
    fn lost(&self, block: usize, group: usize, reason: MissReason) {
        let mut state = self.0.lock();
        let lost = &mut state.lost[block];
        if lost.is_none_or(|(from, _)| group < from) {
            *lost = Some((group, reason));
        }
    }

    fn decided(&self, group: usize, into: Vec<Filled>) {
        let mut state = self.0.lock();
        let at = Some(Instant::now());
        state.arrived[group] = Arrived { at, into };
        let before = state.decided;
        while (state.arrived.get(state.decided)).is_some_and(|arrived| arrived.at.is_some()) {
            state.decided += 1;
        }
        let goes_on = state.decided > before;
        drop(state);
        if goes_on {
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        // Only where the client's thread died is anything undecided here.
        for block in 0..self.0.blocks {
            let from = state.decided;
            if from < self.0.groups.len() && state.lost[block].is_none_or(|(at, _)| at > from) {
                state.lost[block] = Some((from, MissReason::Unreachable));
            }
        }
        state.decided = self.0.groups.len();
        state.ended = true;
        drop(state);
        self.0.changed.notify_all();
    }
}

/// The parts of a call by layers: what has to hold between them.
pub(crate) struct Layers {
    blocks: usize,
    /// Parts of each group that have not ended.
    left: Vec<usize>,
    /// Of each block the version that its parts are of.
    versions: Vec<Option<u64>>,
    teller: Teller,
}

impl Layers {
    pub(crate) fn new(slots: &mut [GetSlot], teller: Teller) -> Self {
        let (blocks, groups) = (teller.0.blocks, teller.0.groups.len());
        let mut layers = Self {
            blocks,
            left: vec![blocks; groups],
            versions: vec![None; blocks],
            teller,
        };
        for item in 0..slots.len() {
            if slots[item].outcome.is_some() {
                layers.ended(slots, item);
            }
        }
        layers
    }

    /// What a part that ended like this counts as: a hit only with the others' version, which the
    /// parts that follow are asked for.
    pub(crate) fn judge(
        &mut self,
        slots: &mut [GetSlot],
        item: usize,
        outcome: GetOutcome,
    ) -> GetOutcome {
        let GetOutcome::Hit { version, .. } = outcome else {
            return outcome;
        };
        match &mut self.versions[item % self.blocks] {
            Some(bound) if *bound != version => GetOutcome::Miss(MissReason::Version),
            Some(_) => outcome,
            unbound => {
                *unbound = Some(version);
                let of_block = slots[item % self.blocks..].iter_mut().step_by(self.blocks);
                for slot in of_block.filter(|slot| slot.outcome.is_none()) {
                    slot.item.version = Some(version);
                }
                outcome
            }
        }
    }

    /// A part has ended and has its outcome; how many others ended with it, since what is behind a
    /// miss is not asked for.
    pub(crate) fn ended(&mut self, slots: &mut [GetSlot], item: usize) -> usize {
        let mut others = 0;
        if let Some(GetOutcome::Miss(reason)) = slots[item].outcome {
            let (group, block) = (item / self.blocks, item % self.blocks);
            self.teller.lost(block, group, reason);
            for later in (item + self.blocks..slots.len()).step_by(self.blocks) {
                if slots[later].outcome.is_none() && !slots[later].is_sent {
                    slots[later].outcome = Some(GetOutcome::Miss(reason));
                    others += 1;
                    self.one_less(slots, later);
                }
            }
        }
        self.one_less(slots, item);
        others
    }

    fn one_less(&mut self, slots: &mut [GetSlot], item: usize) {
        let group = item / self.blocks;
        self.left[group] -= 1;
        if self.left[group] == 0 {
            let slots = &mut slots[group * self.blocks..][..self.blocks];
            let take = |slot: &mut GetSlot| std::mem::replace(&mut slot.item.into, Filled::NOWHERE);
            self.teller
                .decided(group, slots.iter_mut().map(take).collect());
        }
    }

    /// How each block ended, to be counted once.
    pub(crate) fn outcomes<'a>(
        &'a self,
        slots: &'a [GetSlot],
    ) -> impl Iterator<Item = GetOutcome> + 'a {
        (0..self.blocks).map(move |block| {
            let Some(of_block) = slots.get(block..).filter(|slots| !slots.is_empty()) else {
                return GetOutcome::Miss(MissReason::WrongFormat);
            };
            let mut all = Vec::new();
            for slot in of_block.iter().step_by(self.blocks) {
                match &slot.outcome {
                    Some(GetOutcome::Hit { lengths, .. }) => all.extend_from_slice(lengths),
                    Some(GetOutcome::Miss(reason)) => return GetOutcome::Miss(*reason),
                    None => return GetOutcome::Miss(MissReason::Unreachable),
                }
            }
            GetOutcome::Hit {
                version: self.versions[block].unwrap_or(0),
                first_section: 0,
                lengths: all,
            }
        })
    }
}
