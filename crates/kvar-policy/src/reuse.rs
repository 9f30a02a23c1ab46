//! When blocks come back, learned from a sample of what is asked for.
//!
//! Each use of a block (found, or put) opens an interval that ends at its next use, or never.
//! Intervals are sorted by what is known when they open (the habit of a [`BlockClass`]), and their
//! lengths are counted in buckets, four an octave:
//!
//! ```text
//!   age      0    unit      2 unit     4 unit      ...   1024 units = 16 capacities
//!   bucket   | 0 | 1 2 3 4 | 5 6 7 8 | 9 ...        |
//!                                    ended here / lived to here  =  chance to end in this bucket
//! ```
//!
//! From these chances follow the two figures that all decisions rest on:
//! * [`Voice::worth`], for a tier that lets go of blocks one by one: the most uses for the
//!   room and time it takes, over all horizons (the index of a renewal process);
//! * [`Voice::chance`], for a place that is taken for a fixed time: will it be used in it?
//!
//! Several tenants are learned apart, in one clock and one sample: a flood of one-time blocks would
//! teach otherwise that nobody's new blocks return.
//!
//! ```text
//!   tenant, kind, uses, length  <- all tenants, kind, uses, length  <- other kinds  <- all  <- prior
//!                                  each speaks with the voice to its right where it has few intervals
//! ```
//!
//! What must always be true: with one tenant it is as if there were none; an interval counts whether or not the block was kept meanwhile, so
//! what is learned does not depend on what is decided; a habit with few intervals speaks with the
//! voice of the same habit of other kinds, and that, where it has few, with the voice of all (so
//! where nobody names a kind, none of this changes a figure); before any was seen a block is worth
//! less the longer it is left alone, which is LRU; a block used more often is never worth less than one of the same prompts
//! used less often, since whoever asks for a tail asks for its head; memory is bounded
//! ([`SAMPLE_MAX`]): ids are sampled by their own hash, fewer of them where there are more.
//!
//! Time is the bytes that were asked for or put so far: the same at any speed of replay.

use crate::class::{BlockClass, HABITS, HABITS_OF_KIND, KINDS, LENGTHS};
use crate::share::{TENANTS, Tenant};
use kvar_base::FastMap;
use std::collections::VecDeque;

/// Ids whose last use is remembered at most: some 4 MiB. With a quarter of it hit rates of the
/// shipped traces move by up to 0.6 points, either way.
pub const SAMPLE_MAX: usize = 1 << 16;
const BUCKETS: usize = 42;
const BUCKETS_PER_OCTAVE: f64 = 4.0;
/// Where the other three of an octave begin, as the mantissa of a number of 64 bits: the roots of two.
const QUARTERS: [u64; 3] = [
    1.189_207_115_002_721_f64.to_bits() & MANTISSA,
    std::f64::consts::SQRT_2.to_bits() & MANTISSA,
    1.681_792_830_507_429_f64.to_bits() & MANTISSA,
];
const MANTISSA: u64 = (1 << MANTISSA_BITS) - 1;
const MANTISSA_BITS: u32 = f64::MANTISSA_DIGITS - 1;
/// Units of age in one capacity: how finely the young are told apart.
const UNITS_PER_CAPACITY: f64 = 64.0;
/// After so many capacities without use an interval has ended with "never".
const HORIZON_CAPACITIES: f64 = 16.0;
/// What was counted so many capacities ago counts half: traffic changes within days, not minutes.
const HALF_LIFE_CAPACITIES: f64 = 8.0;
/// Recomputed so often in a capacity.
const RECOMPUTES_PER_CAPACITY: f64 = 16.0;
/// And not before so many uses: a store of a few blocks would do nothing else.
const RECOMPUTE_USES_MIN: u32 = 64;
/// So many intervals of a habit weigh as much as what the other kinds say, these as much as all
/// together, and all as much as the prior. A prompt brings tens of blocks at once, so a few prompts must not be a rule.
const PRIOR_INTERVALS: f64 = 32.0;
/// The prior: of what lives to an age, this share comes back before the age has doubled, or so.
const PRIOR_SHARE: f64 = 0.5;
/// Nothing is ever certain to end.
const ENDS_MAX: f64 = 0.999;

#[derive(Clone, Copy, Debug)]
struct Open {
    since: u64,
    class: BlockClass,
    tenant: Tenant,
}

/// Intervals that are over, by habit: in which bucket they ended, or never.
#[derive(Clone, Debug)]
struct Ended {
    in_bucket: Vec<[f64; BUCKETS]>,
    never: [f64; HABITS],
}

impl Ended {
    fn none() -> Self {
        Self {
            in_bucket: vec![[0.0; BUCKETS]; HABITS],
            never: [0.0; HABITS],
        }
    }

    fn add(&mut self, other: &Self) {
        for (sum, counts) in self.in_bucket.iter_mut().zip(&other.in_bucket) {
            sum.iter_mut()
                .zip(counts)
                .for_each(|(sum, one)| *sum += one);
        }
        self.never
            .iter_mut()
            .zip(&other.never)
            .for_each(|(sum, one)| *sum += one);
    }

    fn fade(&mut self, by: f64) {
        self.in_bucket
            .iter_mut()
            .flatten()
            .for_each(|count| *count *= by);
        self.never.iter_mut().for_each(|count| *count *= by);
    }

    /// What lived to each bucket: ended in it or later, never, or is open and as old; one that is in
    /// the bucket now has lived through half of it.
    fn lived(&self, open: &[[f64; BUCKETS]]) -> Vec<[f64; BUCKETS]> {
        let mut lived = vec![[0.0; BUCKETS]; HABITS];
        for (habit, lived) in lived.iter_mut().enumerate() {
            let mut later = self.never[habit];
            for bucket in (0..BUCKETS).rev() {
                later += self.in_bucket[habit][bucket] + open[habit][bucket] / 2.0;
                lived[bucket] = later;
                later += open[habit][bucket] / 2.0;
            }
        }
        lived
    }
}

/// How many intervals are open, by habit and age.
type Ages = Vec<[f64; BUCKETS]>;

fn no_ages() -> Ages {
    vec![[0.0; BUCKETS]; HABITS]
}

fn sum_of<'a>(parts: impl Iterator<Item = &'a Ages>) -> Ages {
    let mut sum = no_ages();
    for part in parts {
        let counts = sum.iter_mut().flatten().zip(part.iter().flatten());
        counts.for_each(|(sum, one)| *sum += one);
    }
    sum
}

/// What is known of one tenant.
#[derive(Clone, Debug)]
struct Learned {
    ended: Ended,
    /// Empty where it speaks with the voice of all.
    curves: Vec<Curve>,
}

/// Chances and what follows from them, of one habit.
#[derive(Clone, Copy, Debug)]
struct Curve {
    /// Chance to end in this bucket, of those that live to it.
    ends: [f64; BUCKETS],
    /// Share that lives to the beginning of this bucket.
    lives: [f64; BUCKETS],
    worth: [f64; BUCKETS],
}

/// Learns when blocks come back. See the story above.
#[derive(Clone, Debug)]
pub struct ReuseModel {
    unit: f64,
    /// Where buckets begin, the one behind the last too.
    begins: [f64; BUCKETS + 1],
    open: FastMap<u64, Open>,
    /// (id, since) in the order of time; one whose `since` is out of date was used again.
    order: VecDeque<(u64, u64)>,
    /// An id is sampled if its hash has so many zeros at the end.
    sample_zeros: u32,
    /// By tenant, as far as one was seen.
    tenants: [Option<Box<Learned>>; TENANTS],
    /// Whether any use was of this kind.
    is_kind_seen: [bool; KINDS],
    computed_at: u64,
    uses_since: u32,
    /// Of all tenants.
    curves: Vec<Curve>,
}

/// What is learned, as it is for one tenant's blocks.
#[derive(Clone, Copy, Debug)]
pub struct Voice<'a> {
    model: &'a ReuseModel,
    curves: &'a [Curve],
}

impl Voice<'_> {
    /// Uses to come for each capacity's worth of bytes and time that are spent on waiting for
    /// them, at the best horizon, of a block last used `age` bytes ago; each counts as often as
    /// its [`Cost`](crate::Cost) says.
    #[must_use]
    pub fn worth(self, class: BlockClass, age: u64) -> f64 {
        self.curves[class.habit()].worth[self.model.bucket(age)] * class.cost().weight()
    }

    /// The chance that a block last used `age` bytes ago is used within `span` bytes more.
    #[must_use]
    pub fn chance(self, class: BlockClass, age: u64, span: u64) -> f64 {
        let lives_now = self.lives(class, age);
        let lives_then = self.lives(class, age.saturating_add(span));
        (1.0 - lives_then / lives_now.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0)
    }

    fn lives(self, class: BlockClass, age: u64) -> f64 {
        let bucket = self.model.bucket(age);
        let curve = &self.curves[class.habit()];
        let part = (age as f64 - self.model.begin(bucket)) / self.model.width(bucket);
        curve.lives[bucket] * (1.0 - curve.ends[bucket] * part.clamp(0.0, 1.0))
    }
}

impl ReuseModel {
    /// A model for a store that holds `capacity_bytes` (at least 1 is assumed).
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        let blank = Curve {
            ends: [0.0; BUCKETS],
            lives: [1.0; BUCKETS],
            worth: [0.0; BUCKETS],
        };
        let unit = capacity_bytes.max(1) as f64 / UNITS_PER_CAPACITY;
        let begin = |bucket| match bucket {
            0 => 0.0,
            bucket => unit * ((bucket - 1) as f64 / BUCKETS_PER_OCTAVE).exp2(),
        };
        let mut model = Self {
            unit,
            begins: std::array::from_fn(begin),
            open: FastMap::default(),
            order: VecDeque::new(),
            sample_zeros: 0,
            tenants: std::array::from_fn(|_| None),
            // What nobody named a kind for is asked about in any case.
            is_kind_seen: std::array::from_fn(|kind| kind == 0),
            computed_at: 0,
            uses_since: 0,
            curves: vec![blank; HABITS],
        };
        model.compute(0);
        model
    }

    /// A tenant's block was used. `id` is any number that is the same for the same block only; `now`
    /// is bytes used so far and never falls.
    ///
    /// Cost: mostly nothing (the id is not sampled); seldom a hash lookup; 16 times in a capacity
    /// a pass over the sample.
    pub fn observe(&mut self, id: u64, tenant: Tenant, class: BlockClass, now: u64) {
        self.see_kind(class);
        let id = mix(id);
        if id.trailing_zeros() >= self.sample_zeros {
            let before = self.open(id, tenant, class, now);
            if let Some(before) = before {
                self.ended(&before, now);
            }
            // One used again at the same moment stands there already.
            if before.is_none_or(|before| before.since != now) {
                self.order.push_back((id, now));
            }
            self.forget(now);
        }
        self.recompute_if_due(now);
    }

    /// A block came from elsewhere: that is no use of it, and how long it was alone there is not
    /// counted here. Its interval begins anew.
    pub fn restart(&mut self, id: u64, tenant: Tenant, class: BlockClass, now: u64) {
        self.see_kind(class);
        let id = mix(id);
        if id.trailing_zeros() >= self.sample_zeros {
            self.open(id, tenant, class, now);
            self.order.push_back((id, now));
            self.forget(now);
        }
        self.recompute_if_due(now);
    }

    /// A block that is not here was asked for: its interval ends, as with a use. Where it is used
    /// then, another model counts.
    pub fn end(&mut self, id: u64, now: u64) {
        let id = mix(id);
        if id.trailing_zeros() >= self.sample_zeros
            && let Some(before) = self.open.remove(&id)
        {
            self.ended(&before, now);
        }
    }

    /// What is learned of this tenant; of one that was never seen what all have taught.
    #[must_use]
    pub fn of(&self, tenant: Tenant) -> Voice<'_> {
        let learned = self.tenants[tenant.index()].as_deref();
        let own = learned.map_or(&[][..], |learned| &learned.curves);
        let curves = if own.is_empty() { &self.curves } else { own };
        Voice {
            model: self,
            curves,
        }
    }

    /// Opens an interval; the one that was open.
    fn open(&mut self, id: u64, tenant: Tenant, class: BlockClass, now: u64) -> Option<Open> {
        self.tenants[tenant.index()].get_or_insert_with(|| {
            Box::new(Learned {
                ended: Ended::none(),
                curves: Vec::new(),
            })
        });
        let open = Open {
            since: now,
            class,
            tenant,
        };
        self.open.insert(id, open)
    }

    fn ended(&mut self, before: &Open, now: u64) {
        let bucket = self.bucket(now.saturating_sub(before.since));
        if let Some(learned) = &mut self.tenants[before.tenant.index()] {
            learned.ended.in_bucket[before.class.habit()][bucket] += 1.0;
        }
    }

    fn see_kind(&mut self, class: BlockClass) {
        let kind = usize::from(class.kind().number());
        if !self.is_kind_seen[kind] {
            // Until the next pass it speaks with the voice of what nobody named a kind for.
            self.is_kind_seen[kind] = true;
            let own = self.tenants.iter_mut().flatten();
            let own = own.map(|learned| &mut learned.curves);
            for curves in own.filter(|curves| !curves.is_empty()) {
                curves.copy_within(..HABITS_OF_KIND, kind * HABITS_OF_KIND);
            }
            self.curves
                .copy_within(..HABITS_OF_KIND, kind * HABITS_OF_KIND);
        }
    }

    fn recompute_if_due(&mut self, now: u64) {
        let interval = self.capacity() / RECOMPUTES_PER_CAPACITY;
        self.uses_since = self.uses_since.saturating_add(1);
        let is_due = now.saturating_sub(self.computed_at) as f64 >= interval;
        if is_due && self.uses_since >= RECOMPUTE_USES_MIN {
            self.compute(now);
        }
    }

    fn capacity(&self) -> f64 {
        self.unit * UNITS_PER_CAPACITY
    }

    fn bucket(&self, age: u64) -> usize {
        let units = age as f64 / self.unit;
        if units < 1.0 {
            return 0;
        }
        // Four times the logarithm, rounded down, is in the number already.
        let bits = units.to_bits();
        let octave = (bits >> MANTISSA_BITS) as usize - (f64::MAX_EXP - 1) as usize;
        let quarter = QUARTERS.map(|begin| usize::from(bits & MANTISSA >= begin));
        (octave * BUCKETS_PER_OCTAVE as usize + quarter.iter().sum::<usize>() + 1).min(BUCKETS - 1)
    }

    fn begin(&self, bucket: usize) -> f64 {
        self.begins[bucket]
    }

    fn width(&self, bucket: usize) -> f64 {
        self.begin(bucket + 1) - self.begin(bucket)
    }

    /// Ends what is beyond the horizon, and samples fewer ids when there are too many.
    fn forget(&mut self, now: u64) {
        let horizon = (HORIZON_CAPACITIES * self.capacity()) as u64;
        while let Some((id, since)) = self.order.front().copied() {
            let is_current = self.open.get(&id).is_some_and(|open| open.since == since);
            if is_current && now.saturating_sub(since) < horizon {
                break;
            }
            self.order.pop_front();
            if is_current
                && let Some(open) = self.open.remove(&id)
                && let Some(learned) = &mut self.tenants[open.tenant.index()]
            {
                learned.ended.never[open.class.habit()] += 1.0;
            }
        }
        // Blocks used again and again leave stale numbers behind an old one.
        let crowded = self.open.len() > SAMPLE_MAX || self.order.len() > 4 * SAMPLE_MAX;
        if crowded {
            self.sample_zeros += u32::from(self.open.len() > SAMPLE_MAX);
            let zeros = self.sample_zeros;
            self.open.retain(|id, _| id.trailing_zeros() >= zeros);
            let Self { order, open, .. } = self;
            order.retain(|(id, since)| open.get(id).is_some_and(|open| open.since == *since));
        }
    }

    fn compute(&mut self, now: u64) {
        let passed = now.saturating_sub(self.computed_at) as f64 / self.capacity();
        self.computed_at = now;
        self.uses_since = 0;
        let fade = (-passed / HALF_LIFE_CAPACITIES).exp2();
        let mut all = Ended::none();
        for learned in self.tenants.iter_mut().flatten() {
            learned.ended.fade(fade);
            all.add(&learned.ended);
        }
        let ages = self.ages(now);
        let lived = all.lived(&sum_of(ages.iter().flatten()));
        let ends = self.ends_of_all(&all, &lived);
        for (habit, ends) in ends.iter().enumerate() {
            if self.is_kind_seen[habit / HABITS_OF_KIND] {
                self.curves[habit] = self.curve(*ends);
            }
        }
        // Alone, a tenant is all.
        if self.tenants.iter().flatten().count() < 2 {
            return;
        }
        for tenant in 0..TENANTS {
            let Some(mut learned) = self.tenants[tenant].take() else {
                continue;
            };
            let lived = match &ages[tenant] {
                Some(ages) => learned.ended.lived(ages),
                None => learned.ended.lived(&no_ages()),
            };
            learned.curves.clone_from(&self.curves);
            for habit in 0..HABITS {
                if !self.is_kind_seen[habit / HABITS_OF_KIND] {
                    continue;
                }
                let ended = &learned.ended.in_bucket[habit];
                let own = |bucket| blend(ended[bucket], lived[habit][bucket], ends[habit][bucket]);
                let own = std::array::from_fn(own);
                let ends = not_below_tails(own, habit, &learned.curves);
                learned.curves[habit] = self.curve(ends);
            }
            self.tenants[tenant] = Some(learned);
        }
    }

    /// How many intervals are open and how old, by habit, of each tenant that has any: one look at each.
    fn ages(&self, now: u64) -> [Option<Ages>; TENANTS] {
        let mut ages = [const { None }; TENANTS];
        for interval in self.open.values() {
            let bucket = self.bucket(now.saturating_sub(interval.since));
            let of_tenant = ages[interval.tenant.index()].get_or_insert_with(no_ages);
            of_tenant[interval.class.habit()][bucket] += 1.0;
        }
        ages
    }

    /// The chance to end in each bucket, by habit, whoever's the blocks are.
    fn ends_of_all(&self, all: &Ended, lived: &[[f64; BUCKETS]]) -> Vec<[f64; BUCKETS]> {
        let sum = |counts: &[[f64; BUCKETS]], bucket: usize| {
            counts.iter().fold(0.0, |sum, counts| sum + counts[bucket])
        };
        let mut share = PRIOR_SHARE;
        let mut ends_of_all = [0.0; BUCKETS];
        for (bucket, ends_here) in ends_of_all.iter_mut().enumerate() {
            let (begin, width) = (self.begin(bucket), self.width(bucket));
            let doubling = width / (begin + width + self.unit);
            let (ended, lived) = (sum(&all.in_bucket, bucket), sum(lived, bucket));
            let ends = blend(ended, lived, share * doubling);
            *ends_here = ends;
            // Where little is known, the old are no better than the young were.
            share = share.min(ends / doubling);
        }
        let mut by_habit = vec![[0.0; BUCKETS]; HABITS];
        for habit in 0..HABITS {
            if !self.is_kind_seen[habit / HABITS_OF_KIND] {
                continue;
            }
            let same = habit % HABITS_OF_KIND;
            let others = (0..KINDS)
                .map(|kind| kind * HABITS_OF_KIND + same)
                .filter(|other| *other != habit);
            for bucket in 0..BUCKETS {
                let (ended, also_lived) = others.clone().fold((0.0, 0.0), |sums, other| {
                    (
                        sums.0 + all.in_bucket[other][bucket],
                        sums.1 + lived[other][bucket],
                    )
                });
                let others = blend(ended, also_lived, ends_of_all[bucket]);
                let own = blend(all.in_bucket[habit][bucket], lived[habit][bucket], others);
                let tails = match same.checked_sub(LENGTHS) {
                    Some(_) => by_habit[habit - LENGTHS][bucket],
                    None => 0.0,
                };
                by_habit[habit][bucket] = own.max(tails).min(ENDS_MAX);
            }
        }
        by_habit
    }

    fn curve(&self, ends: [f64; BUCKETS]) -> Curve {
        let (mut lives, mut worth) = ([1.0; BUCKETS], [0.0; BUCKETS]);
        for bucket in 1..BUCKETS {
            lives[bucket] = lives[bucket - 1] * (1.0 - ends[bucket - 1]);
        }
        for (start, worth) in worth.iter_mut().enumerate() {
            let (mut alive, mut spent, mut best) = (1.0, 0.0, 0.0_f64);
            for (bucket, ends) in ends.iter().enumerate().skip(start) {
                let after = alive * (1.0 - ends);
                spent += f64::midpoint(alive, after) * self.width(bucket);
                alive = after;
                best = best.max((1.0 - alive) / spent);
            }
            *worth = best * self.capacity();
        }
        Curve { ends, lives, worth }
    }
}

/// What was counted, with the voice of others where it is little.
fn blend(ended: f64, lived: f64, otherwise: f64) -> f64 {
    (ended + PRIOR_INTERVALS * otherwise) / (lived + PRIOR_INTERVALS)
}

/// At least the chances of the same prompts' blocks that were used less often.
fn not_below_tails(own: [f64; BUCKETS], habit: usize, curves: &[Curve]) -> [f64; BUCKETS] {
    let has_tails = habit % HABITS_OF_KIND >= LENGTHS;
    std::array::from_fn(|bucket| {
        let tails = match has_tails {
            true => curves[habit - LENGTHS].ends[bucket],
            false => 0.0,
        };
        own[bucket].max(tails).min(ENDS_MAX)
    })
}

/// Spreads the bits of an id (the finaliser of splitmix64): its last bits decide about sampling.
pub(crate) fn mix(id: u64) -> u64 {
    let id = (id ^ id >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let id = (id ^ id >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    id ^ id >> 31
}

#[cfg(test)]
mod tests;
