//! What is in memory: residents by id, what they are worth, and who may leave.
//!
//! ```text
//!   put ──> Dirty ── taken by a write ──> Writing ── recorded ──> Clean ── evicted ──> (flash only)
//!    │        ▲                              │ failed                │ its segment is reclaimed
//!    │        └──────────────────────────────┘                       v
//!    └──> Held ── about to leave: worth a place on flash? ── yes ──> Dirty, with its prompt
//!           ▲               └── no ──┐
//!           └── used again ──────────┴──> Volatile ── evicted ──> gone
//!   ephemeral put, or the device gave its copy up ──^
//! ```
//!
//! Clean and Volatile residents leave first, the tail of the prompt that is worth least before
//! others; a Held one is decided about while there is still room, and leaves undecided only when
//! nothing else can. The only copy of a block that is leased stays until its lease ends.

use crate::fast_map::FastMap;
use crate::layout::{RecordHints, Sections};
use crate::mutation::{Check, is_disabled};
use kvar_base::BlockId;
use kvar_io::Shared;
use kvar_policy::{BlockClass, Candidate, Keep, WorthOrder};
use smallvec::SmallVec;
use std::collections::BTreeSet;

/// Where a resident stands on its way to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Dirty,
    Writing,
    Clean,
    Held,
    Volatile,
}

/// A block in memory.
#[derive(Clone, Debug)]
pub(crate) struct Resident {
    pub(crate) image: Shared,
    pub(crate) sections: Sections,
    pub(crate) version: u64,
    /// Which put (or read) brought it; a later one of the same id has another number.
    pub(crate) number: u64,
    pub(crate) state: State,
    pub(crate) depth: u32,
    pub(crate) ephemeral: bool,
    /// Arrival number of its last touch.
    pub(crate) arrival: u64,
    /// What is known of its use, and when that was, in bytes of demand.
    pub(crate) class: BlockClass,
    pub(crate) used_at: u64,
    /// What its writer said.
    pub(crate) hints: RecordHints,
    /// Promised to somebody.
    pub(crate) leased: bool,
    /// Here only until it is written: it comes from the tier above, and nobody used it since.
    pub(crate) passes: bool,
    /// Flushed in the tier below: it may go at any time, and is not written here again.
    pub(crate) is_below: bool,
}

impl Resident {
    pub(crate) fn is_sectioned(&self) -> bool {
        self.sections.len() > 1
    }

    fn bytes(&self) -> u64 {
        self.image.padded_len() as u64
    }

    /// In memory alone, and nobody said that it may stay so.
    pub(crate) fn is_alone(&self) -> bool {
        let is_only_here = matches!(self.state, State::Held | State::Volatile);
        is_only_here && !self.ephemeral && !self.is_below
    }

    fn may_leave(&self) -> bool {
        match self.state {
            State::Clean => true,
            State::Held | State::Volatile => !self.leased || is_disabled(Check::Lease),
            State::Dirty | State::Writing => false,
        }
    }
}

/// What had to leave: one block for another of its size, as a rule.
pub(crate) type Evicted = SmallVec<[Gone; 1]>;

/// All residents of a shard.
pub(crate) struct Dram {
    residents: FastMap<BlockId, Resident>,
    /// Those that may leave at once, and those that are to be decided about.
    leaving: WorthOrder<BlockId>,
    held: WorthOrder<BlockId>,
    /// Those that expire, by when.
    expiring: BTreeSet<(u32, BlockId)>,
    /// Bytes of residents, tickets and reads under way, in whole pages.
    used_bytes: u64,
    /// Bytes of residents that may leave.
    evictable_bytes: u64,
    /// Bytes of Held residents that may leave.
    held_bytes: u64,
    /// Residents that are Held or Volatile, but for ephemeral ones: a flush is about them.
    alone: usize,
    limit_bytes: u64,
}

/// A resident that left.
pub(crate) struct Gone {
    pub(crate) id: BlockId,
    pub(crate) state: State,
    pub(crate) class: BlockClass,
    pub(crate) ephemeral: bool,
    pub(crate) is_below: bool,
}

impl Dram {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self {
            residents: FastMap::default(),
            leaving: WorthOrder::new(),
            held: WorthOrder::new(),
            expiring: BTreeSet::new(),
            used_bytes: 0,
            evictable_bytes: 0,
            held_bytes: 0,
            alone: 0,
            limit_bytes,
        }
    }

    pub(crate) fn get(&self, id: &BlockId) -> Option<&Resident> {
        self.residents.get(id)
    }

    pub(crate) fn len(&self) -> usize {
        self.residents.len()
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    pub(crate) fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// Most bytes that puts may hold against eviction: a quarter is left to reads, which would
    /// otherwise find memory full of blocks that wait for a slow device.
    pub(crate) fn put_limit_bytes(&self, block_bytes: u64) -> u64 {
        (self.limit_bytes / 4 * 3).max(block_bytes)
    }

    /// Bytes that wait to be decided about.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Whether a flush would find something that is in memory alone.
    pub(crate) fn has_alone(&self) -> bool {
        self.alone > 0
    }

    /// The Held resident that is worth least.
    pub(crate) fn least_held(&self, keep: &Keep) -> Option<Candidate<BlockId>> {
        self.held.least(keep.reuse(), keep.demand_bytes())
    }

    /// The Held residents of a prompt, deepest first.
    pub(crate) fn held_of(&self, arrival: u64) -> Vec<BlockId> {
        self.held.of_request(arrival).collect()
    }

    /// Sets bytes aside for a ticket or a read; evicts for it. `None`, and nothing evicted, when
    /// what cannot leave would come to more than `held_max`; otherwise what left.
    pub(crate) fn reserve(&mut self, bytes: u64, held_max: u64, keep: &Keep) -> Option<Evicted> {
        let mut gone = Evicted::new();
        let held_bytes = self.used_bytes - self.evictable_bytes + bytes;
        if held_bytes > held_max.min(self.limit_bytes) {
            return None;
        }
        while self.used_bytes + bytes > self.limit_bytes {
            gone.push(self.evict(keep)?);
        }
        self.used_bytes += bytes;
        Some(gone)
    }

    /// Takes a reservation back.
    pub(crate) fn release(&mut self, bytes: u64) {
        self.used_bytes -= bytes;
    }

    /// Drops the resident that is the first to leave.
    pub(crate) fn evict(&mut self, keep: &Keep) -> Option<Gone> {
        let (reuse, now) = (keep.reuse(), keep.demand_bytes());
        let least = self.leaving.least(reuse, now);
        let least = least.or_else(|| self.held.least(reuse, now))?;
        let id = least.key;
        let resident = self.remove(&id)?;
        Some(Gone {
            id,
            state: resident.state,
            class: resident.class,
            ephemeral: resident.ephemeral,
            is_below: resident.is_below,
        })
    }

    fn order_of(&mut self, state: State) -> Option<&mut WorthOrder<BlockId>> {
        match state {
            State::Clean | State::Volatile => Some(&mut self.leaving),
            State::Held => Some(&mut self.held),
            State::Dirty | State::Writing => None,
        }
    }

    /// Gives a resident its place among those that may leave, if it is one.
    fn enter(&mut self, id: &BlockId) {
        let Some(resident) = self.residents.get(id) else {
            return;
        };
        self.alone += usize::from(resident.is_alone());
        if !resident.may_leave() {
            return;
        }
        let (state, bytes) = (resident.state, resident.bytes());
        let (arrival, depth) = (resident.arrival, resident.depth);
        let (class, used_at) = (resident.class, resident.used_at);
        self.evictable_bytes += bytes;
        self.held_bytes += if state == State::Held { bytes } else { 0 };
        if let Some(order) = self.order_of(state) {
            order.touch(*id, arrival, depth, class, used_at);
        }
    }

    /// Takes that place away.
    fn leave(&mut self, id: &BlockId) {
        let Some(resident) = self.residents.get(id) else {
            return;
        };
        self.alone -= usize::from(resident.is_alone());
        if !resident.may_leave() {
            return;
        }
        let (state, bytes) = (resident.state, resident.bytes());
        self.evictable_bytes -= bytes;
        self.held_bytes -= if state == State::Held { bytes } else { 0 };
        if let Some(order) = self.order_of(state) {
            order.remove(id);
        }
    }

    /// Adds a resident whose bytes are reserved already.
    pub(crate) fn insert(&mut self, id: BlockId, resident: Resident) {
        if resident.hints.expires_unix_s != 0 {
            self.expiring.insert((resident.hints.expires_unix_s, id));
        }
        let before = self.residents.insert(id, resident);
        debug_assert!(
            before.is_none(),
            "a resident is replaced only after it was removed"
        );
        self.enter(&id);
    }

    pub(crate) fn remove(&mut self, id: &BlockId) -> Option<Resident> {
        self.leave(id);
        let gone = self.residents.remove(id)?;
        self.expiring.remove(&(gone.hints.expires_unix_s, *id));
        self.used_bytes -= gone.bytes();
        Some(gone)
    }

    pub(crate) fn set_state(&mut self, id: &BlockId, state: State) {
        self.change(id, |resident| resident.state = state);
    }

    /// The device gave its copy up, and the tier below has one.
    pub(crate) fn set_below(&mut self, id: &BlockId) {
        self.change(id, |resident| {
            resident.state = State::Volatile;
            resident.is_below = true;
        });
    }

    /// Whether somebody was promised this resident.
    pub(crate) fn set_leased(&mut self, id: &BlockId, leased: bool) {
        self.change(id, |resident| resident.leased = leased);
    }

    fn change(&mut self, id: &BlockId, change: impl FnOnce(&mut Resident)) {
        self.leave(id);
        if let Some(resident) = self.residents.get_mut(id) {
            change(resident);
        }
        self.enter(id);
    }

    /// A resident was used, by a request with this arrival number. One that was not worth a place
    /// on flash is asked about again.
    pub(crate) fn touch(
        &mut self,
        id: &BlockId,
        arrival: u64,
        depth: u32,
        class: BlockClass,
        used_at: u64,
    ) {
        self.change(id, |resident| {
            resident.arrival = arrival;
            resident.depth = depth;
            resident.class = class;
            resident.used_at = used_at;
            resident.passes = false;
            let is_safe = resident.ephemeral || resident.is_below;
            if resident.state == State::Volatile && !is_safe {
                resident.state = State::Held;
            }
        });
    }

    /// Residents that expired before a second of wall time, the longest ago first.
    pub(crate) fn expired_before(&self, unix_s: u64) -> impl Iterator<Item = BlockId> {
        self.expiring
            .iter()
            .take_while(move |(expires, _)| u64::from(*expires) < unix_s)
            .map(|(_, id)| *id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&BlockId, &Resident)> {
        self.residents.iter()
    }

    /// Those that are `wanted`, oldest put first: in whatever order the map has them, the same calls
    /// must give the same writes, or no seed of the simulation would replay.
    pub(crate) fn in_order(
        &self,
        mut wanted: impl FnMut(&BlockId, &Resident) -> bool,
    ) -> Vec<BlockId> {
        let mut found: Vec<(u64, BlockId)> = self
            .iter()
            .filter(|(id, resident)| wanted(id, resident))
            .map(|(id, resident)| (resident.number, *id))
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, id)| id).collect()
    }

    /// Drops every resident (not the reservations of tickets and reads).
    pub(crate) fn clear(&mut self) -> usize {
        let ids = self.in_order(|_, _| true);
        ids.iter().for_each(|id| {
            self.remove(id);
        });
        ids.len()
    }
}
