//! Exact LRU with tails first: what left longest ago leaves next, and of the blocks that one
//! request touched the deepest leaves first.
//!
//! A block of a prompt is of use only if all before it are there, so a prompt is best eaten from
//! its end. Recency is therefore a pair, and the order of leaving is:
//!
//! ```text
//!   coldest                                                       hottest
//!   request 7          request 7    ...   request 9          request 9
//!   depth 31           depth 30           depth 2            depth 0
//! ```
//!
//! What must always be true: `order` and `ranks` hold the same keys, and a key's rank is the one
//! of its latest request: a slow old request that touches a block after a newer one did does not
//! make it colder.
//!
//! Cost: O(log n) a call. With three million blocks, 77 bytes each for keys of four bytes and 85
//! for keys of eight: 0.13 % of the memory that blocks of 64 KiB fill. A doubly linked list would
//! be leaner, and would have to walk to keep a request's blocks in order.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// Where a block stands; less is colder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    request: u64,
    depth: Reverse<u32>,
    /// Tells apart what has the same request and depth (the head slices of one position).
    arrival: u32,
}

/// The order in which blocks leave a tier: least recently used first, tails before heads.
///
/// ```
/// let mut lru = kvar_policy::TailFirstLru::new();
/// for (depth, block) in ["a0", "a1", "a2"].into_iter().enumerate() {
///     lru.touch(block, 1, depth as u32);
/// }
/// lru.touch("a0", 2, 0); // a later request shares the first block
/// assert_eq!(lru.pop_coldest(), Some("a2"));
/// assert_eq!(lru.pop_coldest(), Some("a1"));
/// assert_eq!(lru.coldest(), Some("a0"));
/// ```
#[derive(Clone, Debug)]
pub struct TailFirstLru<K> {
    order: BTreeMap<Rank, K>,
    ranks: HashMap<K, Rank>,
    arrivals: u32,
}

impl<K: Copy + Eq + Hash> TailFirstLru<K> {
    /// An empty order.
    #[must_use]
    pub fn new() -> Self {
        Self {
            order: BTreeMap::new(),
            ranks: HashMap::new(),
            arrivals: 0,
        }
    }

    /// Inserts `key`, or makes it as recent as `request`.
    ///
    /// `request` grows with time and is shared by all blocks that one request touches; among
    /// these the greater `depth` leaves first. A request older than the one that touched the
    /// key last changes nothing.
    pub fn touch(&mut self, key: K, request: u64, depth: u32) {
        if let Some(rank) = self.ranks.get(&key) {
            if rank.request > request || (rank.request == request && rank.depth.0 == depth) {
                return;
            }
            self.order.remove(rank);
        }
        self.arrivals = self.arrivals.wrapping_add(1);
        let mut rank = Rank {
            request,
            depth: Reverse(depth),
            arrival: self.arrivals,
        };
        // Only after four thousand million touches can the number be taken; then the next is it.
        while self.order.contains_key(&rank) {
            self.arrivals = self.arrivals.wrapping_add(1);
            rank.arrival = self.arrivals;
        }
        self.order.insert(rank, key);
        self.ranks.insert(key, rank);
    }

    /// Takes `key` out; whether it was there.
    pub fn remove(&mut self, key: &K) -> bool {
        match self.ranks.remove(key) {
            Some(rank) => self.order.remove(&rank).is_some(),
            None => false,
        }
    }

    /// The block that leaves next.
    #[must_use]
    pub fn coldest(&self) -> Option<K> {
        self.order.first_key_value().map(|(_, key)| *key)
    }

    /// Takes out the block that leaves next.
    pub fn pop_coldest(&mut self) -> Option<K> {
        let (_, key) = self.order.pop_first()?;
        self.ranks.remove(&key);
        Some(key)
    }

    /// All blocks in the order in which they would leave: for an owner that must pass over some
    /// (leased, not yet written).
    pub fn iter_coldest_first(&self) -> impl Iterator<Item = K> + '_ {
        self.order.values().copied()
    }

    /// How many blocks there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ranks.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranks.is_empty()
    }

    /// Whether `key` is in it. Does not touch it.
    #[must_use]
    pub fn contains(&self, key: &K) -> bool {
        self.ranks.contains_key(key)
    }
}

impl<K: Copy + Eq + Hash> Default for TailFirstLru<K> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The plain model: a list, sorted when asked.
    #[derive(Default)]
    struct Model {
        /// key, request, depth, number of the touch
        blocks: Vec<(u8, u64, u32, usize)>,
        touches: usize,
    }

    impl Model {
        fn touch(&mut self, key: u8, request: u64, depth: u32) {
            self.touches += 1;
            let touches = self.touches;
            match self.blocks.iter_mut().find(|block| block.0 == key) {
                Some(block) if block.1 > request || (block.1, block.2) == (request, depth) => {}
                Some(block) => *block = (key, request, depth, touches),
                None => self.blocks.push((key, request, depth, touches)),
            }
        }

        fn coldest_first(&self) -> Vec<u8> {
            let mut blocks = self.blocks.clone();
            blocks.sort_by_key(|&(_, request, depth, touch)| (request, Reverse(depth), touch));
            blocks.into_iter().map(|block| block.0).collect()
        }

        fn remove(&mut self, key: u8) -> bool {
            let before = self.blocks.len();
            self.blocks.retain(|block| block.0 != key);
            self.blocks.len() != before
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Touch {
            key: u8,
            request_back: u64,
            depth: u32,
        },
        Remove(u8),
        Pop,
        NextRequest,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..24_u8, 0..3_u64, 0..6_u32)
                .prop_map(|(key, request_back, depth)| Step::Touch { key, request_back, depth }),
            1 => (0..24_u8).prop_map(Step::Remove),
            1 => Just(Step::Pop),
            2 => Just(Step::NextRequest),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_sorted_list(steps in prop::collection::vec(step(), 1..300)) {
            let (mut lru, mut model, mut request) = (TailFirstLru::new(), Model::default(), 3_u64);
            for step in steps {
                match step {
                    Step::Touch { key, request_back, depth } => {
                        lru.touch(key, request - request_back, depth);
                        model.touch(key, request - request_back, depth);
                    }
                    Step::Remove(key) => prop_assert_eq!(lru.remove(&key), model.remove(key)),
                    Step::Pop => {
                        let expected = model.coldest_first().first().copied();
                        prop_assert_eq!(lru.pop_coldest(), expected);
                        if let Some(key) = expected {
                            model.remove(key);
                        }
                    }
                    Step::NextRequest => request += 1,
                }
                let expected = model.coldest_first();
                prop_assert_eq!(lru.iter_coldest_first().collect::<Vec<_>>(), expected.clone());
                prop_assert_eq!(lru.coldest(), expected.first().copied());
                prop_assert_eq!((lru.len(), lru.is_empty()), (expected.len(), expected.is_empty()));
                prop_assert!((0..24).all(|key| lru.contains(&key) == expected.contains(&key)));
            }
        }
    }

    #[test]
    fn a_wrapped_arrival_number_loses_nobody() {
        let mut lru = TailFirstLru::new();
        lru.touch(1, 5, 0);
        lru.arrivals = lru.arrivals.wrapping_sub(1);
        lru.touch(2, 5, 0);
        assert_eq!(lru.iter_coldest_first().collect::<Vec<_>>(), [1, 2]);
    }
}
