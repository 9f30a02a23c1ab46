//! What memory lets go and the device does not take goes to the tier below, straight from memory.
//!
//! What must always be true: every put is in one of the tiers while both keep up; a promise is kept
//! by whoever gave it; a tier below that hangs, refuses or is gone costs no put anything.

mod shard;
#[path = "shard/tiers.rs"]
mod two;

use kvar_base::{BlockId, LeaseToken, Moment};
use kvar_engine::{
    Demoted, EngineConfig, LeaseRequest, Places, PutHints, Standing, Tier, WriteRates,
};
use shard::{Shard, id};
use std::collections::HashSet;
use std::time::Duration;
use two::{LEN, STEP, Tiers, small};

/// Nothing may be written to the device above that nobody asked for.
fn nothing() -> EngineConfig {
    EngineConfig {
        writes: WriteRates {
            budget_bytes_per_day: Some(0),
            limit_bytes_per_day: Some(0),
            ..WriteRates::default()
        },
        ..small()
    }
}

/// What is written must be worth it.
fn short() -> EngineConfig {
    EngineConfig {
        writes: WriteRates {
            budget_bytes_per_day: Some(0),
            ..WriteRates::default()
        },
        ..small()
    }
}

fn tier(shard: &Shard, number: u64) -> Option<Tier> {
    let stat = shard.engine.stat(shard.now, &id(number));
    stat.map(|stat| stat.tier)
}

#[test]
fn what_the_device_may_not_write_is_in_the_second_tier() {
    let mut tiers = Tiers::of(nothing());
    tiers.put(0..1500);
    tiers.rest();
    let counters = tiers.above.counters();
    assert_eq!(counters.block_write_bytes, 0, "{counters:?}");
    assert!(counters.demoted_from_memory > 1300, "{counters:?}");
    assert_eq!(counters.offered, counters.offered_from_memory);
    assert_eq!(counters.demoted, counters.demoted_from_memory);
    assert_eq!(tiers.below.counters().taken, counters.demoted);
    assert_eq!(counters.device_read_bytes, 0, "it is in memory");
    for number in 0..1500 {
        assert!(tiers.somewhere(number), "block {number} is nowhere");
    }
}

/// One-time blocks while the budget is short: as soon as the policy has learned that they do not come
/// back, it refuses them; they were lost to a tier below that had room for all.
#[test]
fn what_is_worth_no_place_is_in_the_second_tier() {
    let mut tiers = Tiers::of(short());
    tiers.put(0..3000);
    tiers.rest();
    let counters = tiers.above.counters();
    assert!(counters.not_admitted > 500, "{counters:?}");
    assert!(counters.demoted_from_memory > 500, "{counters:?}");
    assert!(counters.demoted > counters.demoted_from_memory);
    for number in 0..3000 {
        assert!(tiers.somewhere(number), "block {number} is nowhere");
    }
}

#[test]
fn what_arrived_below_may_leave_memory_and_is_not_written_by_a_flush() {
    let mut tiers = Tiers::of(nothing());
    let number = tiers.put_until_offered();
    let offered: Vec<BlockId> = tiers.above.offers.iter().map(|it| it.1.id).collect();
    tiers.answer_all(Demoted::Stored);
    let before = tiers.above.counters();
    assert_eq!(before.demoted_from_memory, offered.len() as u64);
    tiers.above.engine.flush(99);
    tiers.above.settle();
    for number in 0..number {
        let is_offered = offered.contains(&id(number));
        let expected = if is_offered {
            Tier::Dram
        } else {
            Tier::DramAndFlash
        };
        assert_eq!(tier(&tiers.above, number), Some(expected), "block {number}");
    }
    // They leave like copies of what is safe, and are no loss.
    let asked = PutHints {
        is_asked: true,
        ..PutHints::default()
    };
    for number in 10_000..10_300 {
        tiers.above.put(number, &[LEN], asked);
        tiers.above.pass(STEP);
    }
    let left = (0..number).filter(|number| tier(&tiers.above, *number).is_none());
    assert_eq!(left.count(), offered.len());
    let after = tiers.above.counters();
    assert_eq!(after.dram_evicted_gone, before.dram_evicted_gone);
}

/// Until it is said to be below, a flush is about it.
#[test]
fn a_flush_writes_what_is_on_offer() {
    let mut tiers = Tiers::of(nothing());
    let number = tiers.put_until_offered();
    tiers.above.engine.flush(99);
    tiers.answer_all(Demoted::Stored);
    tiers.above.settle();
    for number in 0..number {
        let found = tier(&tiers.above, number);
        assert_eq!(found, Some(Tier::DramAndFlash), "block {number}");
    }
    let above = tiers.above.restart();
    assert_eq!(above.recovery.blocks, number);
}

#[test]
fn a_removed_block_is_not_offered_and_one_that_was_put_again_is_not_taken_for_it() {
    let mut tiers = Tiers::of(nothing());
    let number = tiers.put_until_offered();
    let offered: Vec<BlockId> = tiers.above.offers.iter().map(|it| it.1.id).collect();
    let ids: Vec<BlockId> = (0..number).map(id).collect();
    tiers.above.engine.remove(9, &ids);
    let known = (0..number).find(|it| offered.contains(&id(*it))).unwrap();
    tiers.above.put(known, &[LEN], PutHints::default());
    tiers.answer_all(Demoted::Stored);
    for _ in 0..20 {
        tiers.above.pass(STEP);
    }
    assert!(tiers.above.offers.is_empty(), "a removed block was offered");
    // It is another put: nobody said that this one is below.
    tiers.above.engine.flush(99);
    tiers.above.settle();
    assert_eq!(tier(&tiers.above, known), Some(Tier::DramAndFlash));
}

#[test]
fn what_is_over_ephemeral_or_handed_over_is_not_offered() {
    for hints in [
        PutHints {
            ephemeral: true,
            ..PutHints::default()
        },
        PutHints {
            handover: true,
            ..PutHints::default()
        },
    ] {
        let mut tiers = Tiers::of(nothing());
        for number in 0..400 {
            tiers.above.put(number, &[LEN], hints);
            tiers.above.pass(STEP);
        }
        assert_eq!(tiers.above.counters().offered, 0, "{hints:?}");
    }
    // The clock is set forward after the decision, before its turn.
    let mut tiers = Tiers::of(nothing());
    let hints = PutHints {
        ttl_s: Some(100),
        ..PutHints::default()
    };
    for number in 0..2000 {
        tiers.above.put(number, &[LEN], hints);
        if tiers.above.counters().not_admitted_limit > 0 {
            break;
        }
    }
    assert!(tiers.above.counters().not_admitted_limit > 0);
    let now = tiers.above.now;
    tiers.above.engine.set_wall_clock(now, 1_000_101);
    tiers.above.pass(STEP);
    assert_eq!(tiers.above.counters().offered, 0);
}

#[test]
fn what_is_leased_on_its_way_stays_above() {
    let mut tiers = Tiers::of(nothing());
    tiers.put_until_offered();
    let leased = tiers.above.offers[0].1.id;
    let request = LeaseRequest {
        ids: &[leased],
        token: LeaseToken::new([1; 16]),
        client: 1,
        ttl: Duration::from_secs(20),
        request: 0,
        places: Places::default(),
        over_gaps: false,
    };
    let now = tiers.above.now;
    assert_eq!(tiers.above.engine.lease(now, &request).leading, 1);
    tiers.put(5000..5400);
    let now = tiers.above.now;
    assert_eq!(tiers.above.engine.lookup(now, &[leased], 0), [true]);
    assert_eq!(tiers.above.counters().leased_dropped, 0);
}

#[test]
fn a_tier_below_that_never_answers_holds_little_memory_and_no_put() {
    let mut tiers = Tiers::of(nothing());
    for number in 0..3000 {
        let since = tiers.above.now;
        tiers.above.put(number, &[LEN], PutHints::default());
        let waited = tiers.above.now.since(since);
        assert!(
            waited < Duration::from_millis(50),
            "a put waited {waited:?}"
        );
        tiers.above.pass(STEP);
    }
    let counters = tiers.above.counters();
    assert!(counters.offered <= 32, "{counters:?}");
    assert!(counters.not_demoted_late > 2000, "{counters:?}");
    assert_eq!(tiers.above.engine.bookkeeping() as u64, counters.offered);
    // It answers at last: from now on it is asked again.
    tiers.below.now = tiers.above.now;
    tiers.answer_all(Demoted::Stored);
    tiers.put(20_000..20_600);
    assert!(tiers.above.counters().demoted_from_memory > 400);
}

#[test]
fn every_refusal_is_counted_and_the_block_stays_in_memory() {
    for outcome in [
        Demoted::NotWorth,
        Demoted::Limit,
        Demoted::Busy,
        Demoted::Gone,
        Demoted::Failed,
    ] {
        let mut tiers = Tiers::of(nothing());
        tiers.put_until_offered();
        let offered: Vec<BlockId> = tiers.above.offers.iter().map(|it| it.1.id).collect();
        tiers.answer_all(outcome);
        let found = tiers.above.counters();
        let by_reason = [
            (Demoted::NotWorth, found.not_demoted_not_worth),
            (Demoted::Limit, found.not_demoted_limit),
            (Demoted::Busy, found.not_demoted_busy),
            (Demoted::Gone, found.not_demoted_gone),
            (Demoted::Failed, found.not_demoted_failed),
        ];
        for (reason, count) in by_reason {
            let expected = if reason == outcome { offered.len() } else { 0 };
            assert_eq!(count, expected as u64, "{outcome:?}: {found:?}");
        }
        let now = tiers.above.now;
        let there = tiers.above.engine.lookup(now, &offered, 0);
        assert!(there.iter().all(|there| *there), "{outcome:?}");
    }
}

#[test]
fn the_limit_of_writes_below_holds_for_what_memory_lets_go() {
    let mut tiers = Tiers::of(nothing());
    tiers.below = Shard::new(
        two::LARGE,
        EngineConfig {
            writes: WriteRates {
                limit_bytes_per_day: Some(1),
                limit_burst_bytes: 1 << 20,
                ..WriteRates::default()
            },
            ..small()
        },
    );
    tiers.below.engine.set_standing(Standing::Below);
    tiers.put(0..800);
    tiers.rest();
    let counters = tiers.above.counters();
    assert!(counters.not_demoted_limit > 400, "{counters:?}");
    assert!(tiers.below.counters().taken_bytes <= 2 << 20);
}

#[test]
fn without_a_tier_below_memory_lets_go_as_ever() {
    let mut tiers = Tiers::of(nothing());
    tiers.put(0..200);
    tiers.above.engine.set_standing(Standing::Only);
    let before = tiers.above.counters().offered;
    tiers.put(200..800);
    tiers.rest();
    let counters = tiers.above.counters();
    assert_eq!(counters.offered, before);
    assert!(counters.dram_evicted_gone > 300, "{counters:?}");
    assert_eq!(tiers.above.engine.bookkeeping(), 0);
}

#[test]
fn a_stop_writes_what_is_on_offer() {
    let mut tiers = Tiers::of(nothing());
    let number = tiers.put_until_offered();
    let mut above = tiers.above.shut_down();
    for number in 0..number {
        assert!(
            above.get(number, None).is_ok(),
            "block {number} was dropped"
        );
    }
    assert!(above.now > Moment(0));
}

/// A block that was let go, used while it was on offer, and let go again stood twice on the way down.
#[test]
fn what_is_on_offer_is_not_offered_again() {
    let mut tiers = Tiers::of(nothing());
    let number = tiers.put_until_offered();
    for round in 0..200 {
        // All that is on offer is used again, and more comes, so that it is decided about once more.
        let offered: Vec<_> = tiers.above.offers.iter().map(|it| it.1.id).collect();
        let now = tiers.above.now;
        tiers.above.engine.lookup(now, &offered, 0);
        tiers
            .above
            .put(10_000 + number + round, &[LEN], PutHints::default());
        tiers.above.pass(Duration::from_millis(1));
    }
    let offers = tiers.above.offers.len();
    let ids: HashSet<_> = tiers.above.offers.iter().map(|it| it.1.id).collect();
    assert!(offers > 3);
    assert_eq!(ids.len(), offers, "each once");
}

/// The tier below is taken out of service: what was safe there is in memory alone, and a flush writes it.
#[test]
fn what_was_safe_below_is_written_when_the_tier_below_goes() {
    let mut tiers = Tiers::of(nothing());
    tiers.put(0..600);
    tiers.rest();
    assert!(tiers.above.counters().demoted_from_memory > 0);
    tiers.above.engine.set_standing(Standing::Only);
    let in_memory: Vec<u64> = (0..600)
        .filter(|number| tier(&tiers.above, *number) == Some(Tier::Dram))
        .collect();
    assert!(!in_memory.is_empty());
    let token = tiers.above.token();
    tiers.above.engine.flush(token);
    tiers.above.settle();
    let mut above = tiers.above.restart();
    for number in in_memory {
        assert!(above.is_there(number), "{number} was in memory alone");
    }
}
