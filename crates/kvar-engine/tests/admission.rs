//! Which blocks get a place on the device, while the write budget has plenty, is short, is spent.
//!
//! What must always be true: within the budget every block is on the device soon; beyond it what
//! is asked for again and again is, and one-time blocks are not; what somebody asked to be written
//! is written whatever the budget says; memory that is full of undecided blocks refuses nothing.

mod shard;

use kvar_base::PutOutcome;
use kvar_engine::{EngineConfig, PutHints, Tier, WriteRates};
use shard::{Shard, config, id};
use std::time::Duration;

const LEN: usize = 16 << 10;

/// A budget that is short from the start.
fn short() -> WriteRates {
    WriteRates {
        budget_bytes_per_day: Some(0),
        ..WriteRates::default()
    }
}

fn shard(writes: WriteRates) -> Shard {
    let config = EngineConfig { writes, ..config() };
    Shard::new(24 << 20, config)
}

fn hints(request: u64, depth: u32) -> PutHints {
    PutHints {
        request,
        depth,
        ..PutHints::default()
    }
}

fn tier(shard: &Shard, number: u64) -> Option<Tier> {
    let stat = shard.engine.stat(shard.now, &id(number));
    stat.map(|stat| stat.tier)
}

/// One-time blocks, each a prompt of its own, a turnover of the device and more.
fn pass_by(shard: &mut Shard, first: u64, blocks: u64) {
    for number in first..first + blocks {
        shard.put(number, &[LEN], hints(number, 0));
        shard.pass(Duration::from_millis(1));
    }
}

#[test]
fn within_the_budget_every_block_is_on_the_device_soon() {
    let mut shard = shard(WriteRates::default());
    pass_by(&mut shard, 0, 50);
    shard.pass(Duration::from_millis(400));
    shard.settle();
    assert!((0..50).all(|number| tier(&shard, number) == Some(Tier::DramAndFlash)));
    assert_eq!(shard.counters().admitted_budget, 50);
    assert_eq!(shard.status().write_budget_left_bytes, None);
}

#[test]
fn while_the_budget_is_short_a_block_waits_in_memory() {
    let mut shard = shard(short());
    pass_by(&mut shard, 0, 50);
    shard.pass(Duration::from_secs(5));
    assert!((0..50).all(|number| tier(&shard, number) == Some(Tier::Dram)));
    assert_eq!(shard.status().held_bytes, 50 * LEN as u64);
    assert_eq!(shard.status().unflushed_puts, 0);
    assert_eq!(shard.counters().block_write_bytes, 0);
}

#[test]
fn what_is_asked_for_is_written_whatever_the_budget_says() {
    let mut shard = shard(short());
    let asked = PutHints {
        is_asked: true,
        ..PutHints::default()
    };
    shard.put(1, &[LEN], asked);
    shard.put(2, &[LEN], PutHints::default());
    shard.settle();
    assert_eq!(tier(&shard, 1), Some(Tier::DramAndFlash));
    assert_eq!(tier(&shard, 2), Some(Tier::Dram));
}

#[test]
fn a_flush_and_a_stop_write_what_waits_in_memory() {
    let mut shard = shard(short());
    pass_by(&mut shard, 0, 20);
    shard.engine.flush(9);
    shard.settle();
    assert!((0..20).all(|number| tier(&shard, number) == Some(Tier::DramAndFlash)));
    assert_eq!(shard.counters().admitted_asked, 20);
    pass_by(&mut shard, 20, 20);
    let mut shard = shard.shut_down();
    assert!((0..40).all(|number| shard.get(number, None).is_ok()));
}

/// Prompts that come back after more than memory holds, among as many that never do.
#[test]
fn beyond_the_budget_what_comes_back_gets_a_place_and_what_does_not_gets_none() {
    let mut shard = shard(short());
    let (mut request, mut stranger) = (0, 1_000_000);
    let mut hits = 0;
    let rounds = 40;
    for round in 0..rounds {
        for prompt in 0..40_u64 {
            request += 1;
            let blocks: Vec<u64> = (prompt * 5..prompt * 5 + 5).collect();
            let ids: Vec<_> = blocks.iter().map(|number| id(*number)).collect();
            let found = shard.engine.lookup(shard.now, &ids, request);
            let there = found.iter().take_while(|found| **found).count();
            hits += if round >= rounds / 2 { there } else { 0 };
            // What is behind the first that is missing may be there.
            for (depth, number) in (0..).zip(&blocks).skip(there) {
                let outcome = shard.try_put(*number, &[LEN], hints_of(request, depth));
                assert!(matches!(outcome, PutOutcome::Stored | PutOutcome::Exists));
            }
            shard.pass(Duration::from_millis(5));
            // A stranger's prompt, as long.
            request += 1;
            let strangers: Vec<_> = (stranger..stranger + 5).map(id).collect();
            shard.engine.lookup(shard.now, &strangers, request);
            for depth in 0..5 {
                shard.put(stranger, &[LEN], hints_of(request, depth));
                stranger += 1;
            }
            shard.pass(Duration::from_millis(5));
        }
    }
    let counters = shard.counters();
    let asked = (rounds / 2) * 200;
    // Memory holds 256 blocks, one round is 400: LRU would find nothing of it in memory.
    assert!(hits * 10 >= asked * 9, "{hits} of {asked}: {counters:?}");
    // 8,000 strangers passed; most of them were not worth a write.
    assert!(counters.not_admitted > 4000, "{counters:?}");
    let written = counters.admitted_worth + counters.admitted_chain;
    assert!(written < 4000, "{counters:?}");
    assert_eq!(counters.evicted_undecided, 0, "{counters:?}");
    assert!(
        counters.admitted_chain > 3 * counters.admitted_worth,
        "{counters:?}"
    );
}

fn hints_of(request: u64, depth: usize) -> PutHints {
    hints(request, depth as u32)
}

#[test]
fn beyond_the_limit_nothing_is_written_that_nobody_asked_for() {
    let mut shard = shard(WriteRates {
        budget_bytes_per_day: Some(0),
        limit_bytes_per_day: Some(86_400),
        limit_burst_bytes: 1 << 20,
        ..WriteRates::default()
    });
    // Twice the memory, and all of it would get a place: the device was never full.
    pass_by(&mut shard, 0, 600);
    shard.settle();
    let counters = shard.counters();
    let written = counters.block_write_bytes;
    assert!(
        (1 << 19..=(1 << 20) + LEN as u64).contains(&written),
        "{counters:?}"
    );
    assert!(counters.not_admitted_limit > 200, "{counters:?}");
    // A flush is asked for, and writes also what was worth no place and is still in memory.
    shard.engine.flush(9);
    shard.settle();
    assert_eq!(shard.status().held_bytes, 0);
    assert!(shard.counters().block_write_bytes > written + (2 << 20));
    let alone = (0..600).filter(|number| tier(&shard, *number) == Some(Tier::Dram));
    assert_eq!(alone.count(), 0);
}

#[test]
fn a_budget_that_fills_again_writes_what_waited() {
    let mut shard = shard(WriteRates {
        budget_bytes_per_day: Some(86_400 * (64 << 10)),
        budget_burst_bytes: 1 << 20,
        ..WriteRates::default()
    });
    pass_by(&mut shard, 0, 100);
    shard.pass(Duration::from_millis(500));
    let held = shard.status().held_bytes;
    assert!(held > 25 * LEN as u64, "{held}");
    // 64 KiB a second: the rest within half a minute.
    for _ in 0..300 {
        shard.pass(Duration::from_millis(100));
    }
    assert_eq!(shard.status().held_bytes, 0);
    assert!((0..100).all(|number| tier(&shard, number) == Some(Tier::DramAndFlash)));
}

#[test]
fn puts_faster_than_decisions_are_refused_nothing() {
    let mut shard = shard(short());
    let mut refused = 0;
    for number in 0..1000 {
        let outcome = shard.try_put(number, &[LEN], hints(number, 0));
        refused += u32::from(outcome != PutOutcome::Stored);
    }
    assert_eq!(refused, 0);
    let there = (0..1000)
        .filter(|number| tier(&shard, *number).is_some())
        .count();
    assert!((200..=300).contains(&there), "{there}: memory holds 256");
}
