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
//! their last touch and get their place when they become evictable.

use crate::layout::Section;
use kvar_base::BlockId;
use kvar_io::Shared;
use kvar_policy::TailFirstLru;
use std::collections::HashMap;
use std::sync::Arc;

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
    pub(crate) sections: Arc<[Section]>,
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
}

impl Resident {
    pub(crate) fn is_sectioned(&self) -> bool {
        self.sections.len() > 1
    }
}

/// All residents of a shard.
pub(crate) struct Dram {
    residents: HashMap<BlockId, Resident>,
    order: TailFirstLru<BlockId>,
    /// Bytes of residents, tickets and reads under way, in whole pages.
    used_bytes: u64,
    limit_bytes: u64,
}

impl Dram {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self {
            residents: HashMap::new(),
            order: TailFirstLru::new(),
            used_bytes: 0,
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

    /// Sets bytes aside for a ticket or a read; evicts for it. `None` when what is here cannot
    /// leave; otherwise what left.
    pub(crate) fn reserve(&mut self, bytes: u64) -> Option<Vec<(BlockId, State)>> {
        let mut gone = Vec::new();
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
        self.used_bytes -= gone.image.padded_len() as u64;
        Some((id, gone.state))
    }

    /// Adds a resident whose bytes are reserved already.
    pub(crate) fn insert(&mut self, id: BlockId, resident: Resident) {
        if matches!(resident.state, State::Clean | State::Volatile) {
            self.order.touch(id, resident.arrival, resident.depth);
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
        self.used_bytes -= gone.image.padded_len() as u64;
        Some(gone)
    }

    pub(crate) fn set_state(&mut self, id: &BlockId, state: State) {
        let Some(resident) = self.residents.get_mut(id) else {
            return;
        };
        resident.state = state;
        if matches!(state, State::Clean | State::Volatile) {
            self.order.touch(*id, resident.arrival, resident.depth);
        } else {
            self.order.remove(id);
        }
    }

    pub(crate) fn touch(&mut self, id: &BlockId, arrival: u64, depth: u32) {
        let Some(resident) = self.residents.get_mut(id) else {
            return;
        };
        resident.arrival = arrival;
        resident.depth = depth;
        resident.early_touches = resident.early_touches.saturating_add(1);
        if matches!(resident.state, State::Clean | State::Volatile) {
            self.order.touch(*id, arrival, depth);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&BlockId, &Resident)> {
        self.residents.iter()
    }

    /// Drops every resident (not the reservations of tickets and reads).
    pub(crate) fn clear(&mut self) -> usize {
        let ids: Vec<_> = self.residents.keys().copied().collect();
        ids.iter().for_each(|id| {
            self.remove(id);
        });
        ids.len()
    }
}
