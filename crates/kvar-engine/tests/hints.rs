//! What a writer says of its blocks decides what is kept: what they cost, what kind of traffic they
//! are of, and that they are handed over to one reader.
//!
//! What must always be true: of blocks used alike the dear ones stay; a kind that does not come back
//! is kept off the device while another is kept there; a handed-over block is there until it was read
//! or its time is over, then it makes way first, and nobody's put waits for it.

mod shard;

use kvar_base::PutOutcome;
use kvar_engine::{EngineConfig, GetRequest, PutHints, ReadHints, Tier, Touch, WriteRates};
use kvar_io::sim::{Fault, FaultKind, FaultOn};
use shard::{Shard, config, id};
use std::time::Duration;

const LEN: usize = 16 << 10;
/// Blocks that memory holds.
const MEMORY: u64 = 256;

/// A shard that writes only what is worth a place.
fn shard() -> Shard {
    let writes = WriteRates {
        budget_bytes_per_day: Some(0),
        ..WriteRates::default()
    };
    Shard::new(24 << 20, EngineConfig { writes, ..config() })
}

fn tier(shard: &Shard, number: u64) -> Option<Tier> {
    let stat = shard.engine.stat(shard.now, &id(number));
    stat.map(|stat| stat.tier)
}

fn there(shard: &Shard, numbers: impl Iterator<Item = u64>) -> usize {
    numbers
        .filter(|number| tier(shard, *number).is_some())
        .count()
}

fn handover() -> PutHints {
    PutHints {
        handover: true,
        ..PutHints::default()
    }
}

/// Puts of other blocks, more than memory holds, none of them worth keeping.
fn press(shard: &mut Shard, first: u64, blocks: u64) {
    for number in first..first + blocks {
        let ephemeral = PutHints {
            ephemeral: true,
            ..PutHints::default()
        };
        assert_eq!(
            shard.try_put(number, &[LEN], ephemeral),
            PutOutcome::Stored,
            "{number}"
        );
        shard.pass(Duration::from_millis(5));
    }
}

#[test]
fn a_dear_block_stays_where_a_cheap_one_of_the_same_use_goes() {
    let mut shard = shard();
    for number in 0..200 {
        let hints = PutHints {
            recompute_us: if number % 2 == 0 { 8000 } else { 1000 },
            ephemeral: true,
            ..PutHints::default()
        };
        shard.put(number, &[LEN], hints);
        shard.pass(Duration::from_millis(1));
    }
    press(&mut shard, 1000, 150);
    let dear = there(&shard, (0..200).step_by(2));
    let cheap = there(&shard, (1..200).step_by(2));
    assert!(dear >= 80 && cheap <= 25, "{dear} dear, {cheap} cheap");
}

/// The same on the device, when segments are reclaimed: everything comes back, after more than the
/// device holds.
#[test]
fn a_dear_block_is_written_again_where_a_cheap_one_goes() {
    let mut shard = shard();
    let (mut request, mut dear_hits, mut cheap_hits) = (0, 0, 0);
    for round in 0..12 {
        for number in 0..2500_u64 {
            request += 1;
            let is_dear = number % 2 == 0;
            if shard.engine.lookup(shard.now, &[id(number)], request)[0] {
                let hits = if is_dear {
                    &mut dear_hits
                } else {
                    &mut cheap_hits
                };
                *hits += u32::from(round >= 6);
            } else {
                let hints = PutHints {
                    request,
                    recompute_us: if is_dear { 8000 } else { 1000 },
                    ..PutHints::default()
                };
                shard.put(number, &[LEN], hints);
            }
            shard.pass(Duration::from_millis(1));
        }
    }
    assert!(dear_hits > 3 * cheap_hits, "{dear_hits} and {cheap_hits}");
    assert!(dear_hits > 6 * 1250 / 2, "{dear_hits}");
}

/// Prompts that come back after more than memory holds, among twice as many of the same length that
/// never do: blocks written in the second half, and hits.
fn written_and_hits(regular: u8, stranger: u8) -> (u64, usize) {
    let mut shard = shard();
    let (mut request, mut next, mut hits, mut before) = (0, 1 << 20, 0, 0);
    let put = |shard: &mut Shard, number: u64, request: u64, depth: u64, class: u8| {
        let hints = PutHints {
            request,
            depth: depth as u32,
            class,
            ..PutHints::default()
        };
        shard.try_put(number, &[LEN], hints);
    };
    for round in 0..40 {
        if round == 20 {
            before = shard.counters().block_write_bytes;
        }
        for prompt in 0..30_u64 {
            request += 1;
            let ids: Vec<_> = (prompt * 5..prompt * 5 + 5).map(id).collect();
            let found = shard.engine.lookup(shard.now, &ids, request);
            let leading = found.iter().take_while(|found| **found).count() as u64;
            hits += if round >= 20 { leading as usize } else { 0 };
            for depth in leading..5 {
                put(&mut shard, prompt * 5 + depth, request, depth, regular);
            }
            shard.pass(Duration::from_millis(5));
            for _ in 0..2 {
                request += 1;
                let ids: Vec<_> = (next..next + 5).map(id).collect();
                shard.engine.lookup(shard.now, &ids, request);
                for depth in 0..5 {
                    put(&mut shard, next + depth, request, depth, stranger);
                }
                next += 5;
                shard.pass(Duration::from_millis(5));
            }
        }
    }
    let written = shard.counters().block_write_bytes - before;
    (written / LEN as u64, hits)
}

#[test]
fn a_one_time_kind_is_kept_out_while_another_is_kept() {
    let (named, named_hits) = written_and_hits(1, 2);
    let (unnamed, hits) = written_and_hits(0, 0);
    let asked = 20 * 150;
    assert!(named_hits * 100 >= asked * 95, "{named_hits} of {asked}");
    assert!(named_hits >= hits, "{named_hits} {hits}");
    assert!(named * 2 <= unnamed, "{named} written of {unnamed}");
}

#[test]
fn a_handed_over_block_leaves_after_its_read_and_not_before() {
    let mut shard = shard();
    for number in 0..40 {
        shard.put(number, &[LEN], handover());
    }
    press(&mut shard, 1000, 2 * MEMORY);
    assert_eq!(there(&shard, 0..40), 40);
    for number in 0..20 {
        assert!(shard.get(number, None).is_ok());
    }
    let counters = shard.counters();
    assert_eq!((counters.handovers_read, counters.evicted_spent), (20, 0));
    // Where there is room for them anyway they stay: they leave first, not at once.
    assert_eq!(there(&shard, 0..40), 40);
    press(&mut shard, 5000, 20);
    assert_eq!((there(&shard, 0..20), there(&shard, 20..40)), (0, 20));
    let counters = shard.counters();
    assert_eq!((counters.evicted_spent, counters.evicted_awaited), (20, 0));
    assert_eq!(counters.not_admitted_handover, 40);
    assert_eq!(counters.block_write_bytes, 0);
}

#[test]
fn a_reader_split_over_workers_has_read_when_each_has_its_part() {
    let mut shard = shard();
    shard.put(1, &[LEN, LEN, LEN], handover());
    for part in [0..1, 0..1, 2..3] {
        assert!(shard.get(1, Some(part)).is_ok());
        assert_eq!(shard.counters().handovers_read, 0);
    }
    // Sections that it does not have are no read.
    assert!(shard.get(1, Some(3..4)).is_err());
    assert!(shard.get(1, Some(1..2)).is_ok());
    assert_eq!(shard.counters().handovers_read, 1);
    assert_eq!(shard.status().awaited_bytes, 0);
}

#[test]
fn a_handover_nobody_came_for_makes_way_when_its_time_is_over() {
    let mut shard = shard();
    let in_two_seconds = PutHints {
        ttl_s: Some(2),
        ..handover()
    };
    shard.put(1, &[LEN], in_two_seconds);
    shard.put(2, &[LEN], handover());
    assert_eq!(shard.status().awaited_bytes, 2 * LEN as u64);
    shard.leap(Duration::from_secs(5));
    shard.pass(Duration::from_millis(5));
    assert_eq!(shard.counters().handovers_overdue, 1);
    assert!(!shard.is_there(1) && tier(&shard, 2).is_some());
    shard.leap(config().handover_wait);
    shard.pass(Duration::from_millis(5));
    assert_eq!(shard.counters().handovers_overdue, 2);
    // Without a time to live of its own it is still served while there is room.
    assert!(tier(&shard, 2).is_some());
    press(&mut shard, 1000, MEMORY);
    assert!(tier(&shard, 2).is_none());
}

#[test]
fn handovers_take_half_of_memory_and_refuse_nobody() {
    let mut shard = shard();
    for number in 0..2 * MEMORY {
        assert_eq!(
            shard.try_put(number, &[LEN], handover()),
            PutOutcome::Stored
        );
    }
    let half = MEMORY / 2;
    assert_eq!(shard.status().awaited_bytes, half * LEN as u64);
    let counters = shard.counters();
    assert_eq!(counters.handovers_crowded, 2 * MEMORY - half);
    press(&mut shard, 10_000, MEMORY);
    // Those that came last wait, and the others went.
    assert_eq!(there(&shard, 2 * MEMORY - half..2 * MEMORY), half as usize);
    assert_eq!(there(&shard, 0..2 * MEMORY - half), 0);
    // What is dirty and cannot leave takes even their room, rather than a put.
    for number in 20_000..20_000 + 3 * MEMORY / 4 {
        let asked = PutHints {
            is_asked: true,
            ..PutHints::default()
        };
        assert_eq!(shard.try_put(number, &[LEN], asked), PutOutcome::Stored);
    }
    assert!(shard.counters().evicted_awaited > 0);
}

#[test]
fn undecided_blocks_are_decided_about_while_half_of_memory_waits_for_readers() {
    let mut shard = shard();
    for number in 0..MEMORY / 2 {
        shard.put(number, &[LEN], handover());
    }
    for number in 1000..1000 + 2 * MEMORY {
        shard.put(number, &[LEN], PutHints::default());
        shard.pass(Duration::from_millis(5));
    }
    let counters = shard.counters();
    assert_eq!(counters.evicted_undecided, 0, "{counters:?}");
    assert_eq!(there(&shard, 0..MEMORY / 2), MEMORY as usize / 2);
}

#[test]
fn a_flush_and_a_stop_write_what_is_awaited_and_not_what_was_read() {
    let mut shard = shard();
    for number in 0..4 {
        shard.put(number, &[LEN], handover());
    }
    assert!(shard.get(0, None).is_ok());
    shard.engine.flush(9);
    shard.settle();
    let on_device = |shard: &Shard, number| tier(shard, number) == Some(Tier::DramAndFlash);
    assert!(!on_device(&shard, 0) && (1..4).all(|number| on_device(&shard, number)));
    assert_eq!(shard.counters().admitted_asked, 3);
    for number in 4..8 {
        shard.put(number, &[LEN], handover());
    }
    assert!(shard.get(4, None).is_ok());
    let mut shard = shard.shut_down();
    let found: Vec<u64> = (0..8)
        .filter(|number| shard.get(*number, None).is_ok())
        .collect();
    assert_eq!(found, [1, 2, 3, 5, 6, 7]);
}

/// A flush was asked for while the device refused writes; when it took them again, the flush was
/// said to be done, and blocks that waited for their reader were still in memory alone.
#[test]
fn a_flush_that_had_to_wait_for_the_device_writes_what_is_awaited() {
    let mut shard = shard();
    let asked = PutHints {
        is_asked: true,
        ..PutHints::default()
    };
    shard
        .disk
        .inject(Fault::always(FaultKind::NoSpace, FaultOn::Write));
    shard.put(1, &[LEN], asked);
    shard.pass(Duration::from_secs(20));
    assert!(shard.counters().device_write_errors >= 3);
    shard.put(2, &[LEN], handover());
    shard.put(3, &[LEN], handover());
    assert!(shard.get(3, None).is_ok());
    shard.disk.clear_faults();
    shard.engine.flush(9);
    shard.pass(Duration::from_secs(6));
    shard.settle();
    let tiers = [1, 2, 3].map(|number| tier(&shard, number));
    let [both, alone] = [Some(Tier::DramAndFlash), Some(Tier::Dram)];
    assert_eq!(tiers, [both, both, alone]);
}

#[test]
fn what_somebody_asked_to_be_written_is_written_handed_over_or_not() {
    let mut shard = shard();
    let asked = PutHints {
        is_asked: true,
        ..handover()
    };
    shard.put(1, &[LEN], asked);
    shard.settle();
    assert_eq!(tier(&shard, 1), Some(Tier::DramAndFlash));
    assert_eq!(shard.counters().not_admitted_handover, 0);
}

#[test]
fn a_handover_that_a_second_request_wants_is_a_block_like_any_other() {
    let mut shard = shard();
    shard.put(1, &[LEN], handover());
    let get = |shard: &mut Shard, request| {
        let request = GetRequest {
            id: id(1),
            sections: None,
            deadline: kvar_base::Moment(u64::MAX),
            touch: Touch { request, depth: 0 },
        };
        shard
            .engine
            .get(shard.now, 77, request, ReadHints::default());
        assert_eq!(shard.engine.events().count(), 1);
    };
    // The same request, several workers of it: one read.
    (0..3).for_each(|_| get(&mut shard, 5));
    assert_eq!(shard.status().held_bytes, 0);
    get(&mut shard, 6);
    assert_eq!(shard.status().held_bytes, LEN as u64);
    press(&mut shard, 1000, 2 * MEMORY);
    assert!(shard.get(1, None).is_ok());
}

#[test]
fn what_is_handed_over_once_more_waits_once_more() {
    let mut shard = shard();
    shard.put(1, &[LEN], handover());
    assert!(shard.get(1, None).is_ok());
    assert_eq!(shard.status().awaited_bytes, 0);
    assert_eq!(shard.try_put(1, &[LEN], handover()), PutOutcome::Exists);
    assert_eq!(shard.status().awaited_bytes, LEN as u64);
    press(&mut shard, 1000, 2 * MEMORY);
    assert!(shard.get(1, None).is_ok());
    assert_eq!(shard.counters().handovers_read, 2);
}

/// A record says that a block was handed over; a turnover later nobody waits for it any more. All
/// of these come back, and most fit, so that others are written again.
#[test]
fn reclaim_does_not_write_a_handover_again() {
    let mut shard = shard();
    let (mut request, mut misses) = (0, [0, 0]);
    let put = |shard: &mut Shard, number, request, handover| {
        let hints = PutHints {
            request,
            handover,
            is_asked: true,
            ..PutHints::default()
        };
        shard.put(number, &[LEN], hints);
        shard.pass(Duration::from_millis(1));
    };
    for round in 0..12 {
        for number in 0..600_u64 {
            request += 2;
            put(&mut shard, 1 << 20 | request, request, false);
            let handover = number % 2 == 0;
            if !shard.engine.lookup(shard.now, &[id(number)], request + 1)[0] {
                misses[usize::from(handover)] += u32::from(round >= 4);
                put(&mut shard, number, request + 1, handover);
            }
        }
        shard.settle();
    }
    let [others, handovers] = misses;
    assert!(handovers > 400 && others * 10 < handovers, "{misses:?}");
}
