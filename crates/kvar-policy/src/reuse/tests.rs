//! What the reuse model learns from rows of uses whose intervals are known.
//!
//! What must always be true: it comes near the truth of the row it was shown, and says LRU before
//! it was shown any.

use super::*;
use crate::class::Kind;

const CAPACITY: u64 = 1 << 20;
const ALONE: Tenant = Tenant::DEFAULT;
const SHORT: u32 = 1;
const LONG: u32 = 64;

/// Every 1/256 capacity a fresh block of a prompt of `blocks` is used, and once more after `back`.
fn teach(model: &mut ReuseModel, blocks: u32, back: Option<u64>, from: u64, until: u64) {
    teach_class(model, BlockClass::new(0, blocks), back, from, until);
}

/// The same for blocks of any class; their second use is of the class of the most uses.
fn teach_class(
    model: &mut ReuseModel,
    class: BlockClass,
    back: Option<u64>,
    from: u64,
    until: u64,
) {
    let mut uses: Vec<(u64, u64, BlockClass)> = Vec::new();
    for now in (from..until).step_by(CAPACITY as usize / 256) {
        uses.push((now, now, class));
        let again = BlockClass::new(3, class.request_blocks_max());
        uses.extend(back.map(|back| (now + back, now, again)));
    }
    uses.sort_unstable();
    for (now, id, class) in uses {
        model.observe(id, ALONE, class, now);
    }
}

/// The bucket is read out of the number; what it stands for is the logarithm.
#[test]
fn the_bucket_of_an_age_is_its_logarithm_in_quarters() {
    for capacity in [64, 1000, CAPACITY, 3 << 30, (7 << 40) + 1] {
        let model = ReuseModel::new(capacity);
        let by_logarithm = |age: u64| match age as f64 / model.unit {
            units if units < 1.0 => 0,
            units => ((units.log2() * BUCKETS_PER_OCTAVE) as usize + 1).min(BUCKETS - 1),
        };
        let unit = model.unit as u64;
        let near = (0..13).flat_map(|octave| [0, 1, 2].map(|more| (unit << octave) + more));
        let spread = (0..20_000_u64).map(|number| number * number * number % (40 * capacity));
        for age in near.chain(spread).chain([0, u64::MAX]) {
            assert_eq!(model.bucket(age), by_logarithm(age), "{age} of {capacity}");
        }
    }
}

#[test]
fn before_anything_is_known_it_is_lru() {
    let model = ReuseModel::new(CAPACITY);
    for uses in 0..4 {
        let class = BlockClass::new(uses, LONG);
        let mut last = f64::INFINITY;
        for age in [0, CAPACITY / 16, CAPACITY / 2, 2 * CAPACITY, 9 * CAPACITY] {
            let worth = model.of(ALONE).worth(class, age);
            assert!(worth < last, "{worth} at {age}, {last} before");
            last = worth;
        }
    }
}

#[test]
fn what_comes_back_is_worth_more_than_what_does_not() {
    let mut model = ReuseModel::new(CAPACITY);
    let (comes, stays_away) = (BlockClass::new(0, LONG), BlockClass::new(0, SHORT));
    teach(&mut model, LONG, Some(CAPACITY / 4), 0, 4 * CAPACITY);
    teach(&mut model, SHORT, None, 5 * CAPACITY, 12 * CAPACITY);
    assert!(model.of(ALONE).worth(comes, 0) > 2.0 * model.of(ALONE).worth(stays_away, 0));
    assert!(model.of(ALONE).chance(comes, 0, CAPACITY) > 0.5);
    assert!(model.of(ALONE).chance(stays_away, 0, CAPACITY) < 0.2);
}

#[test]
fn what_is_about_to_come_back_is_worth_more_than_what_has_just_been_used() {
    // All come back after two capacities: LRU would hit none of them.
    let mut model = ReuseModel::new(CAPACITY);
    let class = BlockClass::new(0, LONG);
    teach(&mut model, LONG, Some(2 * CAPACITY), 0, 12 * CAPACITY);
    assert!(model.of(ALONE).worth(class, CAPACITY * 3 / 2) > 2.0 * model.of(ALONE).worth(class, 0));
    assert!(model.of(ALONE).worth(class, 4 * CAPACITY) < model.of(ALONE).worth(class, 0));
}

#[test]
fn heads_are_never_worth_less_than_their_tails() {
    let mut model = ReuseModel::new(CAPACITY);
    teach(&mut model, LONG, Some(CAPACITY / 8), 0, 8 * CAPACITY);
    teach_class(
        &mut model,
        BlockClass::new(2, LONG),
        None,
        9 * CAPACITY,
        15 * CAPACITY,
    );
    for age in (0..4 * CAPACITY).step_by(CAPACITY as usize / 8) {
        let worth: Vec<f64> = (0..4)
            .map(|uses| model.of(ALONE).worth(BlockClass::new(uses, LONG), age))
            .collect();
        assert!(worth.is_sorted(), "{worth:?} at {age}");
    }
}

#[test]
fn chances_are_chances_and_grow_with_the_time_given() {
    let mut model = ReuseModel::new(CAPACITY);
    let class = BlockClass::new(0, LONG);
    teach(&mut model, LONG, Some(CAPACITY), 0, 6 * CAPACITY);
    for age in [0, 1, CAPACITY, 40 * CAPACITY, u64::MAX] {
        let mut last = 0.0;
        for span in [0, 1, CAPACITY / 9, CAPACITY, 7 * CAPACITY, u64::MAX] {
            let chance = model.of(ALONE).chance(class, age, span);
            assert!(
                (last..=1.0).contains(&chance),
                "{chance} after {last} at {age}"
            );
            last = chance;
        }
    }
}

#[test]
fn memory_stays_bounded_and_what_is_learned_stays() {
    let mut model = ReuseModel::new(CAPACITY);
    let class = BlockClass::new(0, LONG);
    // A million ids in flight at once, each used again after a quarter of a capacity.
    let mut now = 0;
    for id in 0..400_000_u64 {
        now = id * 4;
        model.observe(id, ALONE, class, now);
        if let Some(again) = id.checked_sub(CAPACITY / 16) {
            model.observe(again, ALONE, BlockClass::new(1, LONG), now);
        }
        assert!(model.open.len() <= SAMPLE_MAX && model.order.len() <= 4 * SAMPLE_MAX + 1);
    }
    assert!(model.sample_zeros > 0, "it had to sample, at {now}");
    let chance = model.of(ALONE).chance(class, 0, CAPACITY);
    assert!(chance > 0.8, "{chance}");
}

#[test]
fn time_that_stands_still_and_capacities_of_nothing_are_no_trouble() {
    let mut model = ReuseModel::new(0);
    for id in 0..100_000 {
        model.observe(id, ALONE, BlockClass::new(9, u32::MAX), 7);
    }
    assert!(
        model
            .of(ALONE)
            .worth(BlockClass::new(0, 0), u64::MAX)
            .is_finite()
    );
    assert!(model.open.len() <= SAMPLE_MAX);
}

#[test]
fn a_block_asked_for_again_and_again_at_one_moment_takes_no_memory() {
    let mut model = ReuseModel::new(1000);
    (0..10_000).for_each(|_| model.observe(7, ALONE, BlockClass::new(0, 1), 5));
    assert_eq!(model.order.len(), 1);
}

#[test]
fn a_kind_that_returns_and_one_that_does_not_are_told_apart() {
    let mut model = ReuseModel::new(CAPACITY);
    let class = BlockClass::new(0, LONG);
    let (agents, documents) = (class.of_kind(Kind::of(1)), class.of_kind(Kind::of(2)));
    // Nobody said anything for a while: both speak with the voice of that.
    teach_class(&mut model, class, Some(CAPACITY / 2), 0, 2 * CAPACITY);
    let before = model.of(ALONE).chance(class, 0, CAPACITY);
    model.observe(u64::MAX, ALONE, agents, 3 * CAPACITY);
    assert_eq!(
        model.of(ALONE).chance(agents, 0, CAPACITY),
        model.of(ALONE).chance(class, 0, CAPACITY)
    );
    assert!(before > 0.5, "{before}");
    teach_class(
        &mut model,
        agents,
        Some(CAPACITY / 4),
        4 * CAPACITY,
        8 * CAPACITY,
    );
    teach_class(&mut model, documents, None, 9 * CAPACITY, 14 * CAPACITY);
    let (agents, documents) = (
        model.of(ALONE).chance(agents, 0, CAPACITY),
        model.of(ALONE).chance(documents, 0, CAPACITY),
    );
    assert!(agents > 0.7, "{agents}");
    assert!(documents < 0.1, "{documents}");
}

#[test]
fn a_few_intervals_of_a_kind_are_no_rule() {
    let mut model = ReuseModel::new(CAPACITY);
    let class = BlockClass::new(0, LONG);
    teach_class(&mut model, class, Some(CAPACITY / 4), 0, 6 * CAPACITY);
    let kind = class.of_kind(Kind::of(1));
    (0..4).for_each(|id| model.observe(1 << 60 | id, ALONE, kind, 7 * CAPACITY));
    model.compute(9 * CAPACITY);
    let (common, own) = (
        model.of(ALONE).chance(class, 0, CAPACITY),
        model.of(ALONE).chance(kind, 0, CAPACITY),
    );
    assert!((common - own).abs() < 0.15, "{common} {own}");
}

/// One kind for everything, whatever its name, is the same as none.
#[test]
fn kinds_that_nobody_tells_apart_change_nothing() {
    let learned = |kind: u8| {
        let mut model = ReuseModel::new(CAPACITY);
        let kind = Kind::of(kind);
        let class = BlockClass::new(0, LONG).of_kind(kind);
        let mut uses = Vec::new();
        for now in (0..4 * CAPACITY).step_by(CAPACITY as usize / 200) {
            uses.push((now, now, class));
            let again = BlockClass::new(1, LONG).of_kind(kind);
            uses.push((now + CAPACITY / 3, now, again));
        }
        uses.sort_unstable();
        for (now, id, class) in uses {
            model.observe(id, ALONE, class, now);
        }
        (0..32_u64)
            .map(|step| model.of(ALONE).worth(class, step * CAPACITY / 8))
            .collect::<Vec<_>>()
    };
    assert_eq!(learned(0), learned(2));
}

#[test]
fn a_dear_block_is_worth_so_much_more_and_as_likely_to_return() {
    let model = ReuseModel::new(CAPACITY);
    let mut scale = crate::CostScale::new(CAPACITY);
    scale.observe(1000, 4096);
    let class = BlockClass::new(1, LONG);
    let dear = class.at_cost(scale.cost(4000, 4096));
    for age in [0, CAPACITY / 3, 5 * CAPACITY] {
        assert_eq!(
            model.of(ALONE).worth(dear, age),
            4.0 * model.of(ALONE).worth(class, age)
        );
        assert_eq!(
            model.of(ALONE).chance(dear, age, CAPACITY),
            model.of(ALONE).chance(class, age, CAPACITY)
        );
    }
}

/// A chat whose blocks come back, beside four times as many that never do.
#[test]
fn what_a_flood_teaches_is_of_the_flood_alone() {
    let [chat, flood, new] = [1, 2, 3].map(|number| Tenant::new(number).unwrap());
    let class = BlockClass::new(0, LONG);
    let mut model = ReuseModel::new(CAPACITY);
    for step in 0..8 * 256 {
        let now = step * CAPACITY / 256;
        model.observe(step, chat, class, now);
        if let Some(again) = step.checked_sub(64) {
            model.observe(again, chat, BlockClass::new(3, LONG), now);
        }
        (0..4).for_each(|one| model.observe(1 << 40 | step << 2 | one, flood, class, now));
    }
    let chance = |tenant| model.of(tenant).chance(class, 0, CAPACITY);
    assert!(chance(chat) > 0.8, "{}", chance(chat));
    assert!(chance(flood) < 0.05, "{}", chance(flood));
    // Whom nobody knows yet is what all are together.
    assert!((0.1..0.4).contains(&chance(new)), "{}", chance(new));
    let all = chance(new);
    model.observe(u64::MAX, new, class, 8 * CAPACITY);
    model.compute(8 * CAPACITY);
    let one_more = model.of(new).chance(class, 0, CAPACITY);
    assert!((one_more - all).abs() < 0.05, "{one_more} {all}");
}
