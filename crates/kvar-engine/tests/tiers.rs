//! Two shards, one above the other: what reclaim does not keep goes down, and nothing falls between.

mod shard;
#[path = "shard/tiers.rs"]
mod two;

use kvar_base::{BlockId, LeaseToken, Moment};
use kvar_engine::{
    Demoted, EngineConfig, Event, GetRequest, LeaseRequest, Places, PutHints, ReadHints, Standing,
    Touch, WriteRates,
};
use kvar_policy::BlockClass;
use shard::{Shard, id};
use std::time::Duration;
use two::{LARGE, LEN, SMALL, STEP, Tiers, small};

#[test]
fn what_the_first_tier_has_no_room_for_is_in_the_second() {
    let mut tiers = Tiers::new();
    tiers.put(0..1500);
    tiers.rest();
    let counters = tiers.above.counters();
    assert!(counters.demoted > 500, "{counters:?}");
    assert_eq!(counters.reclaim_dropped, 0, "{counters:?}");
    assert_eq!(
        tiers.below.counters().taken,
        counters.demoted - counters.demoted_exists
    );
    for number in 0..1500 {
        assert!(tiers.somewhere(number), "block {number} is nowhere");
    }
}

#[test]
fn what_memory_holds_of_blocks_that_are_below_is_not_written_again() {
    let mut tiers = Tiers::new();
    tiers.put(0..900);
    // Read again, so that memory holds the oldest as well as the device.
    for number in 0..60 {
        assert!(tiers.somewhere(number));
    }
    tiers.put(2000..2200);
    tiers.rest();
    let before = tiers.above.counters();
    assert!(before.demoted > 100);
    tiers.above.engine.flush(99);
    tiers.rest();
    let after = tiers.above.counters();
    assert_eq!(after.block_write_bytes, before.block_write_bytes);
    let above = tiers.above;
    let kept = above.shut_down();
    assert!(kept.recovery.blocks > 0);
}

#[test]
fn a_store_with_one_tier_offers_nothing() {
    let mut tiers = Tiers::new();
    tiers.above.engine.set_standing(Standing::Only);
    tiers.put(0..1000);
    tiers.rest();
    let counters = tiers.above.counters();
    assert_eq!(counters.offered, 0);
    assert!(counters.reclaim_dropped > 0);
}

#[test]
fn a_block_stays_readable_above_until_the_tier_below_has_flushed_it() {
    let mut tiers = Tiers::new();
    tiers.put_until_offered();
    let offers = std::mem::take(&mut tiers.above.offers);
    let (token, block) = offers.first().unwrap();
    let there = |tiers: &mut Tiers| {
        let found = tiers.above.engine.lookup(tiers.above.now, &[block.id], 0);
        found == [true]
    };
    assert!(there(&mut tiers));
    // On its way, it is in memory below; after a power cut it is where it was.
    tiers.below.now = tiers.above.now;
    tiers.below.engine.take(tiers.below.now, 77, block).unwrap();
    assert!(there(&mut tiers));
    assert_eq!(
        tiers.below.engine.lookup(tiers.below.now, &[block.id], 0),
        [true]
    );
    let mut is_flushed = false;
    while !is_flushed {
        tiers.below.now = tiers.below.now.after(STEP);
        tiers.below.engine.turn(tiers.below.now);
        let heard = tiers.below.hear();
        is_flushed = heard
            .iter()
            .any(|it| matches!(it, Event::Put { token: 77, .. }));
    }
    tiers.answer(*token, Demoted::Stored);
    assert_eq!(tiers.above.counters().demoted, 1);
    let mut below = tiers.below.restart();
    assert_eq!(below.engine.lookup(below.now, &[block.id], 0), [true]);
}

#[test]
fn what_came_down_does_not_stay_in_memory_below() {
    let mut tiers = Tiers::new();
    // Something that is read there.
    for number in 5000..5100 {
        tiers.below.put(number, &[LEN], PutHints::default());
    }
    tiers.below.settle();
    let before = tiers.below.status().dram_blocks;
    assert!(before >= 90, "{before}");
    tiers.put(0..900);
    tiers.rest();
    assert!(tiers.below.counters().taken > 100);
    let read = (5000..5100).filter(|number| {
        let stat = tiers.below.engine.stat(tiers.below.now, &id(*number));
        stat.is_some_and(|stat| stat.tier == kvar_engine::Tier::DramAndFlash)
    });
    assert!(read.count() >= 70);
}

#[test]
fn a_tier_below_that_never_answers_costs_one_reclaim_two_seconds_and_no_put() {
    let mut tiers = Tiers::new();
    let mut number = 0;
    while tiers.above.counters().segments_reclaimed < 3 {
        // Put as fast as memory takes them; offers are left lying.
        let busy_since = tiers.above.now;
        tiers.above.put(number, &[LEN], PutHints::default());
        let waited = tiers.above.now.since(busy_since);
        assert!(
            waited < Duration::from_millis(500),
            "a put waited {waited:?}"
        );
        number += 1;
        assert!(number < 5000, "{:?}", tiers.above.counters());
    }
    let counters = tiers.above.counters();
    assert!(counters.not_demoted_late > 0, "{counters:?}");
    assert_eq!(counters.demoted, 0);
    let offered = counters.offered;
    for number in 10_000..10_300 {
        tiers.above.put(number, &[LEN], PutHints::default());
    }
    tiers.above.settle();
    assert_eq!(
        tiers.above.counters().offered,
        offered,
        "more was offered to a tier that is late"
    );
    // It answers at last: from now on it is asked again.
    tiers.below.now = tiers.above.now;
    tiers.answer_all(Demoted::Stored);
    tiers.put(20_000..20_600);
    assert!(tiers.above.counters().demoted > 0);
}

#[test]
fn every_refusal_is_counted_under_its_reason() {
    for (outcome, counted) in [
        (Demoted::NotWorth, 0),
        (Demoted::Limit, 1),
        (Demoted::Busy, 2),
        (Demoted::Failed, 3),
    ] {
        let mut tiers = Tiers::new();
        tiers.instead = Some(outcome);
        tiers.put(0..1200);
        tiers.rest();
        let found = tiers.above.counters();
        let by_reason = [
            found.not_demoted_not_worth,
            found.not_demoted_limit,
            found.not_demoted_busy,
            found.not_demoted_failed,
        ];
        assert!(by_reason[counted] > 50, "{outcome:?}: {found:?}");
        assert_eq!(by_reason.iter().sum::<u64>(), by_reason[counted]);
        assert_eq!(found.demoted, 0);
        assert!(found.reclaim_dropped > 0);
    }
}

#[test]
fn a_removed_block_is_not_offered_any_more_and_one_on_offer_is_not_dropped_twice() {
    let mut tiers = Tiers::new();
    let number = tiers.put_until_offered();
    // Removed with everything that is still to be offered; their answers come too late.
    let ids: Vec<BlockId> = (0..number).map(id).collect();
    tiers.above.engine.remove(9, &ids);
    let mut offered = tiers.above.offers.len();
    tiers.answer_all(Demoted::Stored);
    for _ in 0..50 {
        tiers.above.pass(STEP);
        offered += tiers.above.offers.len();
    }
    assert_eq!(tiers.above.counters().demoted, 0);
    assert_eq!(tiers.above.counters().offered, offered as u64);
    assert!(tiers.above.offers.is_empty(), "a removed block was offered");
}

#[test]
fn what_is_leased_on_its_way_down_stays_above_too() {
    let mut tiers = Tiers::new();
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
    assert_eq!(
        tiers.above.engine.lease(tiers.above.now, &request).leading,
        1
    );
    tiers.put(1000..1400);
    let now = tiers.above.now;
    assert!(tiers.above.counters().demoted > 100);
    assert_eq!(tiers.above.engine.lookup(now, &[leased], 0), [true]);
    assert_eq!(tiers.above.counters().leased_dropped, 0);
}

#[test]
fn a_lease_over_gaps_promises_what_is_there_and_names_the_rest() {
    let mut tiers = Tiers::new();
    for number in [1, 2, 4] {
        tiers.above.put(number, &[LEN], PutHints::default());
    }
    let ids: Vec<BlockId> = (1..9).map(id).collect();
    let mut request = LeaseRequest {
        ids: &ids,
        token: LeaseToken::new([1; 16]),
        client: 1,
        ttl: Duration::from_secs(20),
        request: 0,
        places: Places::default(),
        over_gaps: true,
    };
    let grant = tiers.above.engine.lease(tiers.above.now, &request);
    assert_eq!((grant.leading, &grant.gaps[..]), (8, &[2, 4, 5, 6, 7][..]));
    assert_eq!(tiers.above.status().leased_blocks, 3);
    // Nothing there: no lease.
    let others: Vec<BlockId> = (100..103).map(id).collect();
    (request.ids, request.token) = (&others, LeaseToken::new([2; 16]));
    let grant = tiers.above.engine.lease(tiers.above.now, &request);
    assert_eq!((grant.leading, grant.gaps.len()), (3, 3));
    assert_eq!(tiers.above.status().leases, 1);
}

#[test]
fn a_block_that_is_below_already_costs_no_bytes() {
    let mut tiers = Tiers::new();
    for number in 0..900 {
        tiers.below.put(number, &[LEN], PutHints::default());
    }
    tiers.below.settle();
    tiers.above.now = tiers.below.now;
    tiers.put(0..900);
    tiers.rest();
    let counters = tiers.above.counters();
    assert!(counters.demoted_exists > 100, "{counters:?}");
    assert_eq!(counters.demoted_exists, counters.demoted);
    assert_eq!(counters.demoted_bytes, 0);
    assert_eq!(tiers.below.counters().taken, 0);
}

#[test]
fn what_is_over_or_handed_over_does_not_go_down() {
    let mut tiers = Tiers::new();
    for number in 0..100 {
        let hints = match number % 2 {
            0 => PutHints {
                handover: true,
                ..PutHints::default()
            },
            _ => PutHints {
                ttl_s: Some(1),
                ..PutHints::default()
            },
        };
        tiers.above.put(number, &[LEN], hints);
        tiers.step();
    }
    tiers.above.leap(Duration::from_secs(2));
    tiers.put(1000..1900);
    tiers.rest();
    assert!(tiers.above.counters().demoted > 100);
    for number in 0..100 {
        assert!(!tiers.below.is_there(number), "{number}");
    }
}

/// Whether a block is over was asked when it was decided that it goes down. It waits for those before it,
/// and is read; what had expired by then, or by a clock that was set, was read and offered all the same.
#[test]
fn what_is_over_before_its_turn_to_go_down_is_not_offered() {
    const EXPIRING: u64 = 120;
    for was_read in [false, true] {
        let mut tiers = Tiers::new();
        let hints = PutHints {
            ttl_s: Some(1000),
            ..PutHints::default()
        };
        // Small ones of one segment: more of them than are on offer at once.
        for number in 0..EXPIRING {
            tiers.above.put(number, &[4 << 10], hints);
            tiers.above.pass(STEP);
        }
        let mut number = EXPIRING;
        let is_going = |above: &Shard| {
            let read = above.counters().device_read_bytes > 0;
            read && above.offers.is_empty() != was_read
        };
        while !is_going(&tiers.above) {
            tiers.above.put(number, &[LEN], PutHints::default());
            tiers.above.pass(STEP);
            number += 1;
            assert!(number < 2000, "{:?}", tiers.above.counters());
        }
        if was_read {
            // Of those that wait memory has a copy, so that nothing need be read to offer them.
            (0..EXPIRING).for_each(|number| drop(tiers.above.get(number, None).unwrap()));
        }
        let before = tiers.above.counters();
        let now = tiers.above.now;
        // Over, and not for so long that memory forgets them.
        tiers.above.engine.set_wall_clock(now, 1_001_020);
        let expiring: Vec<BlockId> = (0..EXPIRING).map(id).collect();
        for _ in 0..50 {
            tiers.answer_all(Demoted::Stored);
            tiers.above.pass(STEP);
            let mut offered = tiers.above.offers.iter().map(|(_, block)| block.id);
            assert!(
                offered.all(|id| !expiring.contains(&id)),
                "what is over is offered"
            );
        }
        let after = tiers.above.counters();
        assert!(after.expired > before.expired + 20, "{before:?} {after:?}");
    }
}

#[test]
fn the_limit_of_writes_below_holds() {
    let mut tiers = Tiers::new();
    let limited = EngineConfig {
        writes: WriteRates {
            limit_bytes_per_day: Some(1),
            limit_burst_bytes: 1 << 20,
            ..WriteRates::default()
        },
        ..small()
    };
    tiers.below = Shard::new(LARGE, limited);
    tiers.below.engine.set_standing(Standing::Below);
    tiers.put(0..1300);
    tiers.rest();
    let counters = tiers.above.counters();
    assert!(counters.not_demoted_limit > 100, "{counters:?}");
    assert!(tiers.below.counters().taken_bytes <= 2 << 20);
}

#[test]
fn a_stop_leaves_what_was_not_offered_where_it_is() {
    let mut tiers = Tiers::new();
    let number = tiers.put_until_offered();
    let before: Vec<u64> = (0..number).filter(|it| tiers.above.is_there(*it)).collect();
    // The tier below stops a moment earlier, and says so.
    tiers.answer_all(Demoted::Gone);
    let mut above = tiers.above.shut_down();
    for number in before {
        assert!(above.is_there(number), "block {number} was dropped");
    }
    assert_eq!(above.now.max(Moment(1)), above.now);
}

/// What is known of a block, without using it.
fn read_of_nobody(shard: &mut Shard, number: u64) -> kvar_engine::Copy {
    let request = GetRequest {
        id: id(number),
        sections: None,
        deadline: Moment(u64::MAX),
        touch: Touch::NONE,
    };
    let now = shard.now;
    shard.engine.get(now, 5, request, ReadHints::default());
    for _ in 0..1000 {
        for event in shard.hear() {
            if let Event::Get { outcome, .. } = event {
                return outcome.unwrap();
            }
        }
        shard.now = shard.now.after(Duration::from_micros(100));
        shard.engine.turn(shard.now);
    }
    panic!("never answered");
}

/// Blocks of a device that was retired arrived as strangers that had just been used.
#[test]
fn a_block_that_is_moved_is_as_old_and_as_often_used_as_it_was() {
    let mut from = Shard::new(SMALL, small());
    from.put(1, &[LEN], PutHints::default());
    (0..2).for_each(|_| assert!(from.is_there(1)));
    let fresh = read_of_nobody(&mut from, 1).moved;
    from.push_out_of_memory(1);
    let copy = read_of_nobody(&mut from, 1);
    assert_eq!((copy.moved.class.uses(), fresh.class.uses()), (2, 2));
    assert!(copy.moved.age_bytes > fresh.age_bytes);
    let tier = from.engine.stat(from.now, &id(1)).unwrap().tier;
    assert_eq!(tier, kvar_engine::Tier::Flash, "nobody used it");
    assert_eq!(read_of_nobody(&mut from, 1).moved, copy.moved);

    let mut to = Shard::new(SMALL, small());
    for number in 100..400 {
        to.put(number, &[LEN], PutHints::default());
    }
    let hints = PutHints {
        moved: Some(copy.moved),
        is_asked: true,
        ..PutHints::default()
    };
    to.put(1, &[LEN], hints);
    to.settle();
    let there = read_of_nobody(&mut to, 1).moved;
    assert_eq!(there.class, copy.moved.class);
    // As old as this shard's clock can tell.
    assert!(there.age_bytes >= 3 << 20, "{there:?}");
}

/// The tier below is asked for what the one above lacks: a block of a long prompt was used by a short one
/// there, and stood at its head.
#[test]
fn a_part_of_a_prompt_is_used_by_the_whole_of_it() {
    let mut below = Shard::new(SMALL, small());
    let numbers = [1, 2, 3];
    for number in numbers {
        below.put(number, &[LEN], PutHints::default());
    }
    let ids = numbers.map(id);
    let length =
        |shard: &mut Shard, number: u64| read_of_nobody(shard, number).moved.class.length();
    let whole = |blocks: u32| BlockClass::new(0, blocks).length();
    let now = below.now;
    below.engine.lookup(now, &ids[..1], 5);
    assert_eq!(length(&mut below, 1), whole(1));
    let places = Places {
        first_depth: 100,
        each: &[7, 60],
        asked: 64,
    };
    let now = below.now;
    let found = below.engine.lookup_of(now, &ids[..2], places, 6);
    assert_eq!(found, [true, true]);
    assert_eq!(length(&mut below, 1), whole(164));
    assert_eq!(length(&mut below, 2), whole(164));
    // A lease is a lookup, too; and a part that is asked for later is of the same prompt.
    let request = LeaseRequest {
        ids: &ids[2..],
        token: LeaseToken::new([1; 16]),
        client: 1,
        ttl: Duration::from_secs(20),
        request: 9,
        places: Places {
            first_depth: 0,
            each: &[40],
            asked: 41,
        },
        over_gaps: false,
    };
    let now = below.now;
    assert_eq!(below.engine.lease(now, &request).leading, 1);
    assert_eq!(length(&mut below, 3), whole(41));
    assert_ne!(whole(41), whole(1));
}

#[test]
fn uses_are_known_below() {
    let mut tiers = Tiers::new();
    for number in 0..200 {
        tiers.above.put(number, &[LEN], PutHints::default());
        (0..2).for_each(|_| assert!(tiers.above.is_there(number)));
        tiers.step();
    }
    let mut uses = Vec::new();
    let mut number = 1000;
    while uses.is_empty() {
        tiers.above.put(number, &[LEN], PutHints::default());
        tiers.above.pass(STEP);
        let offers = std::mem::take(&mut tiers.above.offers);
        for (token, block) in offers {
            if (0..200).map(id).any(|it| it == block.id) {
                uses.push(block.moved.class.uses());
            }
            tiers.answer(token, Demoted::NotWorth);
        }
        number += 1;
        assert!(number < 4000);
    }
    assert!(uses.iter().all(|uses| *uses == 2), "{uses:?}");
}
