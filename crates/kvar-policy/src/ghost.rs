//! Blocks that were let go and how often they had been used: two bytes each.
//!
//! A block that is put again after it was let go is no stranger. Without this memory every return
//! of a prompt that did not fit looks like its first, and nothing that returns late is ever seen
//! to be worth keeping (up to 6 points of hit rate on the synthetic trace).
//!
//! ```text
//!   bucket    newest | . | . | . | . | . | . | oldest      16 bytes: 8 entries
//!   entry     fingerprint 14 | uses 2                       0 = empty
//! ```
//!
//! What must always be true: memory is what [`GhostList::new`] was told, for ever; what was let go
//! longest ago is forgotten first (within its bucket); a block is found that is not there once in
//! two thousand times, and is then thought better of than it should be.

use crate::reuse::mix;

const SLOTS: usize = 8;
/// The most uses an entry holds.
const USES_MAX: u8 = 3;

/// Remembers what was let go.
#[derive(Clone, Debug)]
pub struct GhostList {
    buckets: Vec<[u16; SLOTS]>,
}

impl GhostList {
    /// Entries for each block of the capacity that are worth their memory (16 bytes: 0.02 % of a
    /// block of 64 KiB). Half as many cost the synthetic trace up to a point where the store is
    /// small; twice as many change nothing that stands out of the noise.
    pub const ENTRIES_PER_BLOCK: u64 = 8;

    /// Room for `entries` (rounded up to whole buckets of eight): two bytes each.
    #[must_use]
    pub fn new(entries: u64) -> Self {
        let buckets = entries.div_ceil(SLOTS as u64).max(1);
        Self {
            buckets: vec![[0; SLOTS]; usize::try_from(buckets).unwrap_or(usize::MAX)],
        }
    }

    fn home(&self, id: u64) -> (usize, u16) {
        let hash = mix(id);
        let bucket = (u128::from(hash) * self.buckets.len() as u128) >> 64;
        // The high bits chose the bucket; an empty slot is 0, so no fingerprint is.
        let fingerprint = ((hash as u16) >> 2).max(1);
        (bucket as usize, fingerprint)
    }

    /// A block that had been used so often was let go.
    pub fn insert(&mut self, id: u64, uses: u8) {
        self.take(id);
        let (bucket, fingerprint) = self.home(id);
        let slots = &mut self.buckets[bucket];
        slots.rotate_right(1);
        slots[0] = fingerprint << 2 | u16::from(uses.min(USES_MAX));
    }

    /// How often a block had been used that is put again, if it is remembered; forgets it.
    pub fn take(&mut self, id: u64) -> Option<u8> {
        let (bucket, fingerprint) = self.home(id);
        let slots = &mut self.buckets[bucket];
        let at = slots.iter().position(|entry| entry >> 2 == fingerprint)?;
        let uses = (slots[at] & 3) as u8;
        slots[at..].rotate_left(1);
        slots[SLOTS - 1] = 0;
        Some(uses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_let_go_is_remembered_once() {
        let mut ghosts = GhostList::new(1000);
        ghosts.insert(7, 2);
        ghosts.insert(8, 200);
        assert_eq!(ghosts.take(7), Some(2));
        assert_eq!(ghosts.take(7), None);
        ghosts.insert(8, 1);
        assert_eq!(ghosts.take(8), Some(1));
        assert_eq!(ghosts.take(8), None);
    }

    #[test]
    fn the_oldest_are_forgotten_first_and_strangers_are_seldom_known() {
        let mut ghosts = GhostList::new(8_000);
        (0..100_000).for_each(|id| ghosts.insert(id, 1));
        let known = |ghosts: &GhostList, ids: std::ops::Range<u64>| {
            ids.filter(|id| ghosts.knows(*id)).count()
        };
        assert!(known(&ghosts, 98_000..100_000) > 1_980);
        assert!(known(&ghosts, 0..50_000) < 100);
        assert!(known(&ghosts, 1 << 40..(1 << 40) + 50_000) < 100);
    }

    impl GhostList {
        fn knows(&self, id: u64) -> bool {
            let (bucket, fingerprint) = self.home(id);
            self.buckets[bucket]
                .iter()
                .any(|entry| entry >> 2 == fingerprint)
        }
    }
}
