//! Which block leaves memory next, where worth is learned: the tail of the prompt worth least.
//!
//! ```text
//!   request 7:  depth 0  1  2  3 | 4  5  6     used together, by request 7 last
//!               class a  a  a  a | b  b  b  <- its tail stands for it, and leaves first
//!
//!   class a:  request 2, request 9, ...        oldest ... newest
//!   class b:  request 5, request 7, ...        worth is asked at both ends
//! ```
//!
//! Within a class, worth is a curve over age that rises to a summit at most once in practice, so
//! the least stands at an end: the oldest (nobody will come any more), or, where prompts return
//! later than memory could hold all of them, the newest (the others are nearer to their return).
//!
//! What must always be true: `groups`, `tails` and `places` speak of the same blocks; of one
//! request's blocks the deepest leaves first, so that no head leaves before its tail.
//!
//! Cost: O(log n) for a touch, O(classes that have blocks) for [`least`](WorthOrder::least): where
//! no writer says anything these are 32 at most, whatever [`CLASSES`] there are.

use crate::class::{BlockClass, CLASSES};
use crate::reuse::Voice;
use kvar_base::FastMap;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, VecDeque};
use std::hash::Hash;

/// A place in a request; the arrival tells apart the head slices of one position.
type Place = (u32, u32);

/// The blocks of a request by place; most requests of other kinds than prompts have one, which then
/// takes no memory of its own. Blocks come in from the head and leave at the tail, or, used by the
/// next request, from the head: both ends are cheap.
#[derive(Clone, Debug)]
enum Blocks<K> {
    One(Place, K, BlockClass),
    Many(VecDeque<(Place, K, BlockClass)>),
}

#[derive(Clone, Debug)]
struct Group<K> {
    /// When the request used its blocks.
    used_at: u64,
    blocks: Blocks<K>,
}

impl<K: Copy> Group<K> {
    fn last(&self) -> Option<(Place, K, BlockClass)> {
        match &self.blocks {
            Blocks::One(place, key, class) => Some((*place, *key, *class)),
            Blocks::Many(blocks) => blocks.back().copied(),
        }
    }

    fn tail(&self) -> Option<BlockClass> {
        self.last().map(|(_, _, class)| class)
    }

    fn has(&self, place: Place) -> bool {
        match &self.blocks {
            Blocks::One(known, _, _) => *known == place,
            Blocks::Many(blocks) => blocks.binary_search_by_key(&place, |one| one.0).is_ok(),
        }
    }

    fn insert(&mut self, place: Place, key: K, class: BlockClass) {
        if let Blocks::One(known, other, its) = &self.blocks {
            self.blocks = Blocks::Many(VecDeque::from([(*known, *other, *its)]));
        }
        if let Blocks::Many(blocks) = &mut self.blocks {
            let at = blocks.partition_point(|one| one.0 < place);
            blocks.insert(at, (place, key, class));
        }
    }

    fn remove(&mut self, place: Place) {
        match &mut self.blocks {
            Blocks::One(known, _, _) if *known == place => {
                self.blocks = Blocks::Many(VecDeque::new());
            }
            Blocks::One(..) => {}
            Blocks::Many(blocks) => {
                if let Ok(at) = blocks.binary_search_by_key(&place, |one| one.0) {
                    blocks.remove(at);
                }
            }
        }
    }

    fn keys_from_tail(&self) -> impl Iterator<Item = K> + '_ {
        let (one, many) = match &self.blocks {
            Blocks::One(_, key, _) => (Some(*key), None),
            Blocks::Many(blocks) => (None, Some(blocks.iter().rev().map(|one| one.1))),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}

/// The block that leaves next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate<K> {
    /// The block.
    pub key: K,
    /// The request that used it last.
    pub request: u64,
    /// Its class then.
    pub class: BlockClass,
    /// Its position in that request.
    pub depth: u32,
    /// Time since that use, in bytes of demand.
    pub age: u64,
    /// As [`Voice::worth`] says.
    pub worth: f64,
}

/// Blocks in the order of what they are worth.
#[derive(Clone, Debug)]
pub struct WorthOrder<K> {
    groups: FastMap<u64, Group<K>>,
    /// By class: the requests whose tail is of it, and when they used their blocks: worth is asked
    /// of all ends at every eviction, and must not look each of them up.
    tails: Vec<BTreeSet<(u64, u64)>>,
    /// Which of these are not empty, a bit each.
    filled: [u64; CLASSES.div_ceil(64)],
    places: FastMap<K, (u64, Place)>,
    arrivals: u32,
}

impl<K: Copy + Eq + Hash> WorthOrder<K> {
    /// An empty order.
    #[must_use]
    pub fn new() -> Self {
        Self {
            groups: FastMap::default(),
            tails: vec![BTreeSet::new(); CLASSES],
            filled: [0; CLASSES.div_ceil(64)],
            places: FastMap::default(),
            arrivals: 0,
        }
    }

    /// Inserts `key`, or says that `request` (a number that grows with time) used it at `now`.
    /// A request older than the one that used it last changes nothing.
    pub fn touch(&mut self, key: K, request: u64, depth: u32, class: BlockClass, now: u64) {
        if let Some((before, _)) = self.places.get(&key) {
            if *before > request {
                return;
            }
            self.remove(&key);
        }
        self.arrivals = self.arrivals.wrapping_add(1);
        let mut place = (depth, self.arrivals);
        let (before, after, used_at) = match self.groups.entry(request) {
            Entry::Vacant(vacant) => {
                vacant.insert(Group {
                    used_at: now,
                    blocks: Blocks::One(place, key, class),
                });
                (None, Some(class), now)
            }
            Entry::Occupied(mut occupied) => {
                let group = occupied.get_mut();
                while group.has(place) {
                    place.1 = place.1.wrapping_add(1);
                }
                let before = group.tail();
                group.insert(place, key, class);
                (before, group.tail(), group.used_at)
            }
        };
        self.places.insert(key, (request, place));
        self.move_tail((request, used_at), before, after);
    }

    /// Takes `key` out; whether it was there.
    pub fn remove(&mut self, key: &K) -> bool {
        let Some((request, place)) = self.places.remove(key) else {
            return false;
        };
        if let Entry::Occupied(mut occupied) = self.groups.entry(request) {
            let group = occupied.get_mut();
            let before = group.tail();
            group.remove(place);
            let (after, used_at) = (group.tail(), group.used_at);
            if after.is_none() {
                occupied.remove();
            }
            self.move_tail((request, used_at), before, after);
        }
        true
    }

    fn move_tail(
        &mut self,
        request: (u64, u64),
        before: Option<BlockClass>,
        after: Option<BlockClass>,
    ) {
        if before == after {
            return;
        }
        if let Some(class) = before.map(BlockClass::number) {
            self.tails[class].remove(&request);
            if self.tails[class].is_empty() {
                self.filled[class / 64] &= !(1 << (class % 64));
            }
        }
        if let Some(class) = after.map(BlockClass::number) {
            self.tails[class].insert(request);
            self.filled[class / 64] |= 1 << (class % 64);
        }
    }

    /// The classes that have blocks, in order.
    fn filled(&self) -> impl Iterator<Item = usize> {
        (0..).zip(&self.filled).flat_map(|(word, bits)| {
            let mut left = *bits;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
                left &= left - 1;
                Some(word * 64 + bit)
            })
        })
    }

    /// The block worth least at `now`: of equals, the one of the oldest request.
    #[must_use]
    pub fn least(&self, voice: Voice<'_>, now: u64) -> Option<Candidate<K>> {
        let mut least: Option<(f64, u64, u64)> = None;
        for class in self.filled() {
            let requests = &self.tails[class];
            let of_class = BlockClass::from_number(class);
            for (request, used_at) in [requests.first(), requests.last()].into_iter().flatten() {
                let age = now.saturating_sub(*used_at);
                let worth = voice.worth(of_class, age);
                let is_less = |(other, before, _): &(f64, u64, u64)| {
                    worth.total_cmp(other).then(request.cmp(before)).is_lt()
                };
                if least.as_ref().is_none_or(is_less) {
                    least = Some((worth, *request, age));
                }
            }
        }
        let (worth, request, age) = least?;
        let group = self.groups.get(&request)?;
        let ((depth, _), key, class) = group.last()?;
        Some(Candidate {
            key,
            request,
            class,
            depth,
            age,
            worth,
        })
    }

    /// As [`least`](Self::least), taken out.
    pub fn pop_least(&mut self, voice: Voice<'_>, now: u64) -> Option<Candidate<K>> {
        let least = self.least(voice, now)?;
        self.remove(&least.key);
        Some(least)
    }

    /// The blocks that `request` used last of all, deepest first.
    pub fn of_request(&self, request: u64) -> impl Iterator<Item = K> + '_ {
        let group = self.groups.get(&request);
        group.into_iter().flat_map(Group::keys_from_tail)
    }

    /// How many blocks there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether `key` is in it. Does not touch it.
    #[must_use]
    pub fn contains(&self, key: &K) -> bool {
        self.places.contains_key(key)
    }
}

impl<K: Copy + Eq + Hash> Default for WorthOrder<K> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ReuseModel, TailFirstLru, Tenant};
    use proptest::prelude::*;

    const CAPACITY: u64 = 1000;

    fn drain(order: &mut WorthOrder<u8>, model: &ReuseModel, now: u64) -> Vec<u8> {
        std::iter::from_fn(|| {
            let least = order.least(model.of(Tenant::DEFAULT), now)?;
            assert!(order.remove(&least.key));
            Some(least.key)
        })
        .collect()
    }

    #[test]
    fn the_tail_leaves_before_its_head_whatever_they_are_worth() {
        let mut order = WorthOrder::new();
        // The head is of a class that is worth no more than the tail's.
        for (depth, uses) in [(0, 0), (1, 3), (2, 3)] {
            order.touch(depth as u8, 1, depth, BlockClass::new(uses, 3), 0);
        }
        assert_eq!(order.of_request(1).collect::<Vec<_>>(), [2, 1, 0]);
        let model = ReuseModel::new(CAPACITY);
        assert_eq!(drain(&mut order, &model, 10), [2, 1, 0]);
    }

    #[test]
    fn where_prompts_return_too_late_the_newest_makes_way() {
        let mut model = ReuseModel::new(CAPACITY);
        let class = BlockClass::new(0, 4);
        for number in 0..8 * CAPACITY {
            model.observe(number, Tenant::DEFAULT, class, number);
            if let Some(again) = number.checked_sub(2 * CAPACITY) {
                model.observe(again, Tenant::DEFAULT, BlockClass::new(1, 4), number);
            }
        }
        let mut order = WorthOrder::new();
        order.touch(1_u8, 1, 0, class, 0);
        order.touch(2, 2, 0, class, 1500);
        order.touch(3, 3, 0, class, 1600);
        assert_eq!(order.least(model.of(Tenant::DEFAULT), 1600).unwrap().key, 3);
        // Nobody came back to the oldest after all.
        order.touch(3, 4, 0, class, 4900);
        order.touch(2, 5, 0, class, 4950);
        assert_eq!(order.least(model.of(Tenant::DEFAULT), 5000).unwrap().key, 1);
    }

    #[test]
    fn a_dear_block_stays_where_a_cheap_one_of_the_same_use_goes() {
        let model = ReuseModel::new(CAPACITY);
        let mut scale = crate::CostScale::new(CAPACITY);
        scale.observe(100, 10);
        let class = BlockClass::new(0, 1);
        let mut order = WorthOrder::new();
        for (key, recompute_us) in [(1_u8, 400), (2, 0), (3, 25), (4, 100)] {
            let class = class.at_cost(scale.cost(recompute_us, 10));
            order.touch(key, u64::from(key), 0, class, 0);
        }
        // The cheap one first, then those of average or unknown cost, oldest first.
        assert_eq!(drain(&mut order, &model, 50), [3, 2, 4, 1]);
        assert_eq!(order.filled().count(), 0);
        // But what nobody comes for any more goes, whatever it cost.
        order.touch(1, 5, 0, class.at_cost(scale.cost(400, 10)), 0);
        order.touch(2, 6, 0, class, 14_900);
        assert_eq!(drain(&mut order, &model, 15_000), [1, 2]);
    }

    proptest! {
        /// With one class and nothing learned it is LRU with tails first.
        #[test]
        fn before_anything_is_learned_it_is_lru(
            touches in prop::collection::vec((0..20_u8, 0..6_u32, any::<bool>()), 1..120),
            removed in prop::collection::vec(0..20_u8, 0..4),
        ) {
            let model = ReuseModel::new(CAPACITY);
            let class = BlockClass::new(0, 1);
            let (mut order, mut lru, mut request) = (WorthOrder::new(), TailFirstLru::new(), 0);
            let mut last = std::collections::HashMap::new();
            for (key, depth, next) in touches {
                request += u64::from(next);
                // Far enough apart for every request to be of an age of its own.
                let now = 1 << (request % 60);
                if request >= 60 {
                    break;
                }
                order.touch(key, request, depth, class, now);
                lru.remove(&key);
                lru.touch(key, request, depth);
                last.insert(key, (request, depth));
            }
            for key in removed {
                prop_assert_eq!(order.remove(&key), lru.remove(&key));
            }
            prop_assert_eq!(order.len(), lru.len());
            prop_assert!((0..20).all(|key| order.contains(&key) == lru.contains(&key)));
            let mut sorted = lru.iter_coldest_first().collect::<Vec<_>>();
            let left = drain(&mut order, &model, 1 << 60);
            prop_assert!(order.is_empty());
            // Of one depth of one request either may leave first.
            let of = |key: &u8| (last[key].0, std::cmp::Reverse(last[key].1));
            prop_assert!(left.is_sorted_by_key(of), "{left:?}");
            let mut keys = left;
            keys.sort_unstable();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, keys);
        }
    }
}
