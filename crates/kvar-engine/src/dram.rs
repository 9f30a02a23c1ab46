//! What is in memory: residents by id, their recency, and who may leave.
//!
//! ```text
//!   put ──> Dirty ── taken by a write ──> Writing ── recorded ──> Clean ── evicted ──> (flash only)
//!             ▲                              │ failed
//!             └──────────────────────────────┘
//!   ephemeral put, or its flash copy was given up ──> Volatile ── evicted ──> gone
//! ```
//!
//! Only Clean and Volatile residents stand in the order of recency; the others keep the number of
//! their last touch and get their place when they become evictable. A Volatile one that is leased
//! is the only copy there is, and stays until its lease ends; a Clean one may go, its bytes are
//! safe on the device.

use crate::fast_map::FastMap;
use crate::layout::{RecordHints, Sections};
use kvar_base::BlockId;
use kvar_io::Shared;
use kvar_policy::TailFirstLru;
use smallvec::SmallVec;
use std::collections::BTreeSet;

/// Where a resident stands on its way to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Dirty,
    Writing,
    Clean,
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
    /// Touches before it had an index entry to count them.
    pub(crate) early_touches: u8,
    /// What its writer said.
    pub(crate) hints: RecordHints,
    /// Promised to somebody.
    pub(crate) leased: bool,
}

impl Resident {
    pub(crate) fn is_sectioned(&self) -> bool {
        self.sections.len() > 1
    }

    fn bytes(&self) -> u64 {
        self.image.padded_len() as u64
    }

    fn may_leave(&self) -> bool {
        match self.state {
            State::Clean => true,
            State::Volatile => !self.leased,
            State::Dirty | State::Writing => false,
        }
    }
}

/// What had to leave: one block for another of its size, as a rule.
pub(crate) type Evicted = SmallVec<[(BlockId, State); 1]>;

/// All residents of a shard.
pub(crate) struct Dram {
    residents: FastMap<BlockId, Resident>,
    order: TailFirstLru<BlockId>,
    /// Those that expire, by when.
    expiring: BTreeSet<(u32, BlockId)>,
    /// Bytes of residents, tickets and reads under way, in whole pages.
    used_bytes: u64,
    /// Bytes of residents that may leave.
    evictable_bytes: u64,
    limit_bytes: u64,
}

impl Dram {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self {
            residents: FastMap::default(),
            order: TailFirstLru::new(),
            expiring: BTreeSet::new(),
            used_bytes: 0,
            evictable_bytes: 0,
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

    /// Sets bytes aside for a ticket or a read; evicts for it. `None`, and nothing evicted, when
    /// what cannot leave would come to more than `held_max`; otherwise what left.
    pub(crate) fn reserve(&mut self, bytes: u64, held_max: u64) -> Option<Evicted> {
        let mut gone = Evicted::new();
        let held_bytes = self.used_bytes - self.evictable_bytes + bytes;
        if held_bytes > held_max.min(self.limit_bytes) {
            return None;
        }
        while self.used_bytes + bytes > self.limit_bytes {
            gone.push(self.evict()?);
        }
        self.used_bytes += bytes;
        Some(gone)
    }

    /// Takes a reservation back.
    pub(crate) fn release(&mut self, bytes: u64) {
        self.used_bytes -= bytes;
    }

    /// Drops the coldest resident that may leave.
    pub(crate) fn evict(&mut self) -> Option<(BlockId, State)> {
        let id = self.order.pop_coldest()?;
        let gone = self
            .residents
            .remove(&id)
            .expect("what stands in the order is resident");
        self.expiring.remove(&(gone.hints.expires_unix_s, id));
        self.used_bytes -= gone.bytes();
        self.evictable_bytes -= gone.bytes();
        Some((id, gone.state))
    }

    /// Adds a resident whose bytes are reserved already.
    pub(crate) fn insert(&mut self, id: BlockId, resident: Resident) {
        if resident.may_leave() {
            self.order.touch(id, resident.arrival, resident.depth);
            self.evictable_bytes += resident.bytes();
        }
        if resident.hints.expires_unix_s != 0 {
            self.expiring.insert((resident.hints.expires_unix_s, id));
        }
        let before = self.residents.insert(id, resident);
        debug_assert!(
            before.is_none(),
            "a resident is replaced only after it was removed"
        );
    }

    pub(crate) fn remove(&mut self, id: &BlockId) -> Option<Resident> {
        let gone = self.residents.remove(id)?;
        self.order.remove(id);
        self.expiring.remove(&(gone.hints.expires_unix_s, *id));
        self.used_bytes -= gone.bytes();
        if gone.may_leave() {
            self.evictable_bytes -= gone.bytes();
        }
        Some(gone)
    }

    pub(crate) fn set_state(&mut self, id: &BlockId, state: State) {
        self.change(id, |resident| resident.state = state);
    }

    /// Whether somebody was promised this resident.
    pub(crate) fn set_leased(&mut self, id: &BlockId, leased: bool) {
        self.change(id, |resident| resident.leased = leased);
    }

    fn change(&mut self, id: &BlockId, change: impl FnOnce(&mut Resident)) {
        let Some(resident) = self.residents.get_mut(id) else {
            return;
        };
        if resident.may_leave() {
            self.evictable_bytes -= resident.bytes();
        }
        change(resident);
        if resident.may_leave() {
            self.evictable_bytes += resident.bytes();
            self.order.touch(*id, resident.arrival, resident.depth);
        } else {
            self.order.remove(id);
        }
    }

    /// Marks a resident as used; `counts` when this is not the same use as the one before.
    pub(crate) fn touch(&mut self, id: &BlockId, arrival: u64, depth: u32, counts: bool) {
        let Some(resident) = self.residents.get_mut(id) else {
            return;
        };
        resident.arrival = arrival;
        resident.depth = depth;
        let touches = resident.early_touches.saturating_add(u8::from(counts));
        resident.early_touches = touches.max(1);
        if resident.may_leave() {
            self.order.touch(*id, arrival, depth);
        }
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
