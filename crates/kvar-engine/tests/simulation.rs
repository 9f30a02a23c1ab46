//! The store against an oracle, over a simulated disk, by seed.
//!
//! `KVAR_SEEDS=500` runs more seeds; a failure names its seed, and `KVAR_SEED=n` runs that one.

mod common;

use common::{Dice, Oracle, Store, config};
use kvar_engine::EngineConfig;
use kvar_io::sim::{FaultRates, SimOptions, Survival};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

fn for_seeds(name: &str, default: u64, run: impl Fn(u64)) {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
    };
    let seeds = number("KVAR_SEED").map_or_else(
        || 0..number("KVAR_SEEDS").unwrap_or(default),
        |seed| seed..seed + 1,
    );
    for seed in seeds {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(seed))) {
            eprintln!("{name}: seed {seed} failed; KVAR_SEED={seed} runs it alone");
            std::panic::resume_unwind(panic);
        }
    }
}

/// Random calls; returns how many.
fn work(store: &mut Store, dice: &mut Dice, steps: u64, ids: u64, purges: bool) {
    for _ in 0..steps {
        let number = dice.below(ids);
        match dice.below(if purges { 400 } else { 399 }) {
            0..160 => {
                let nonce = dice.below(4) + 1;
                let durable = dice.below(20) == 0;
                store.put(number, nonce, durable);
            }
            160..320 => {
                store.get(number);
            }
            320..340 => {
                store.remove(&[number, dice.below(ids)]);
            }
            340..350 => store.flush(),
            350..399 => store.turn(Duration::from_millis(dice.below(60))),
            _ => store.purge(),
        }
        if dice.below(3) == 0 {
            store.turn(Duration::from_micros(dice.below(3000)));
        }
    }
}

fn sim(seed: u64, rates: FaultRates) -> SimOptions {
    SimOptions {
        seed,
        rates,
        ..SimOptions::default()
    }
}

/// Far more than fits: reclaim, eviction, crashes and restarts, and never a wrong byte.
#[test]
fn churn_with_crashes_never_serves_a_wrong_byte() {
    for_seeds("churn", 12, |seed| {
        let mut dice = Dice::new(seed);
        let options = sim(seed, FaultRates::default());
        let mut store = Store::format(16 << 20, options, config());
        for round in 0..4 {
            work(&mut store, &mut dice, 2500, 1500, true);
            if dice.below(2) == 0 {
                let how = match dice.below(4) {
                    0 => Survival::Flushed,
                    1 => Survival::Completed,
                    2 => Survival::Submitted,
                    _ => Survival::Random { seed: dice.next() },
                };
                let image = store.disk.crash(how);
                store.forget_calls();
                store = store.reopen(image, options);
            } else {
                store.settle();
                shut_down(&mut store);
                let image = store.disk.image();
                store = store.reopen(image, options);
                assert!(store.recovery.checkpoint.is_some(), "round {round}");
            }
        }
        store.settle();
        let counters = store.engine.status(store.now).counters;
        assert!(
            store.oracle.hits > 100 && counters.corrupt == 0,
            "{counters:?}"
        );
    });
}

fn shut_down(store: &mut Store) {
    store.engine.begin_shutdown(store.now);
    for _ in 0..10_000 {
        store.turn(Duration::from_millis(1));
        if let Some(report) = store.engine.shutdown_report() {
            assert_eq!(report.dropped_blocks, 0);
            assert!(report.checkpointed);
            return;
        }
    }
    panic!("the shutdown does not end");
}

/// With room for everything, what was flushed is there after any crash: "always miss" cannot pass.
#[test]
fn what_was_flushed_is_a_hit_after_a_power_cut() {
    for_seeds("power cut", 20, |seed| {
        let mut dice = Dice::new(seed);
        let options = sim(seed, FaultRates::default());
        let config = EngineConfig {
            dram_bytes: 8 << 20,
            ..config()
        };
        let mut store = Store::format(64 << 20, options, config);
        for _ in 0..3 {
            work(&mut store, &mut dice, 600, 300, false);
            let evicted = store.engine.status(store.now).counters;
            assert_eq!(
                evicted.reclaim_dropped + evicted.bucket_evicted + evicted.dram_evicted_gone,
                0
            );
            let image = store.disk.crash(Survival::Random { seed: dice.next() });
            store.forget_calls();
            store = store.reopen(image, options);
            // A put that was flushed and not removed since (nor put again after an unanswered
            // remove) is there.
            let wanted: Vec<u64> = store
                .oracle
                .allowed
                .iter()
                .filter(|(_, puts)| puts.len() == 1 && puts[0].flushed)
                .map(|(number, _)| *number)
                .collect();
            assert!(wanted.len() > 10);
            for number in &wanted {
                if let Err(reason) = store.outcome_of_get(*number) {
                    panic!(
                        "block {number} was flushed and is a miss: {reason}; {:?}; {:?}",
                        store.recovery, store.oracle.allowed[number]
                    );
                }
            }
        }
    });
}

/// A process killed (the drive keeps what completed): every put older than twice `flush_after`
/// is there.
#[test]
fn a_kill_loses_nothing_older_than_two_flush_intervals() {
    for_seeds("kill", 10, |seed| {
        let mut dice = Dice::new(seed);
        let options = sim(seed, FaultRates::default());
        let config = EngineConfig {
            dram_bytes: 8 << 20,
            ..config()
        };
        let mut store = Store::format(64 << 20, options, config.clone());
        let mut acknowledged = Vec::new();
        for number in 0..400_u64 {
            assert_eq!(store.put(number, 1, false), None);
            acknowledged.push((store.now, number));
            store.turn(Duration::from_millis(dice.below(5)));
        }
        let killed = store.now;
        let image = store.disk.crash(Survival::Completed);
        store.forget_calls();
        store = store.reopen(image, options);
        let mut checked = 0;
        for (when, number) in acknowledged {
            if killed.since(when) > 2 * config.flush_after {
                assert!(store.outcome_of_get(number).is_ok(), "block {number}");
                checked += 1;
            }
        }
        assert!(checked > 100);
    });
}

/// Every fault the disk knows, at random: misses, yes; wrong bytes, hangs and panics, no.
#[test]
fn a_disk_that_lies_gets_misses_out_of_us_and_nothing_else() {
    for_seeds("faults", 25, |seed| {
        let mut dice = Dice::new(seed);
        let rates = FaultRates {
            read_flip_ppm: 3000,
            read_misdirect_ppm: 3000,
            read_error_ppm: 3000,
            write_flip_ppm: 3000,
            write_misdirect_ppm: 3000,
            write_lost_ppm: 3000,
            write_error_ppm: 3000,
            flush_lost_ppm: 3000,
            flush_error_ppm: 3000,
        };
        let mut store = Store::format(16 << 20, sim(seed, FaultRates::default()), config());
        let image = store.disk.image();
        store = store.reopen(image, sim(seed, rates));
        for _ in 0..3 {
            // No removes here: a tombstone on a disk that loses what it said it flushed cannot hold.
            for _ in 0..1500 {
                let number = dice.below(800);
                if dice.below(2) == 0 {
                    store.put(number, dice.below(4) + 1, false);
                } else {
                    store.get(number);
                }
                store.turn(Duration::from_millis(dice.below(8)));
            }
            let how = Survival::Random { seed: dice.next() };
            let image = store.disk.crash(how);
            store.forget_calls();
            store = store.reopen(image, sim(seed + 1000, rates));
        }
        for _ in 0..4000 {
            store.turn(Duration::from_millis(10));
        }
        assert_eq!(store.waiting(), 0, "a call hangs");
        assert!(store.oracle.hits > 20);
    });
}

/// A disk that refuses every write: reads and puts go on in memory, nothing waits for ever.
#[test]
fn a_full_file_system_costs_persistence_and_nothing_else() {
    use kvar_io::sim::{Fault, FaultKind, FaultOn};
    let mut store = Store::format(32 << 20, sim(1, FaultRates::default()), config());
    for number in 0..20 {
        store.put(number, 1, false);
    }
    store.settle();
    store
        .disk
        .inject(Fault::always(FaultKind::NoSpace, FaultOn::Write));
    let (mut stored, mut busy) = (0, 0);
    for number in 100..1000 {
        match store.put(number, 1, number % 50 == 0) {
            None => stored += 1,
            Some(_) => busy += 1,
        }
        if number % 100 == 0 {
            store.flush();
            store.remove(&[number - 1]);
        }
        store.turn(Duration::from_millis(50));
    }
    for _ in 0..1000 {
        store.turn(Duration::from_millis(50));
    }
    assert_eq!(store.waiting(), 0, "a call hangs");
    // Busy is said only until the trouble has lasted, fifteen seconds of these forty-five.
    assert!(stored > 750, "{stored} stored, {busy} busy");
    assert!(
        store
            .engine
            .status(store.now)
            .device_trouble
            .unwrap()
            .contains("no space")
    );
    assert!(store.outcome_of_get(3).is_ok());
    assert!(store.outcome_of_get(998).is_ok());
    store.disk.clear_faults();
    store.put(2000, 1, false);
    store.settle();
    assert_eq!(store.engine.status(store.now).device_trouble, None);
    let image = store.disk.crash(Survival::Flushed);
    store = store.reopen(image, sim(1, FaultRates::default()));
    assert!(store.outcome_of_get(2000).is_ok());
}

#[test]
fn two_runs_of_a_seed_agree() {
    let run = || {
        let mut store = Store::format(16 << 20, sim(5, FaultRates::default()), config());
        work(&mut store, &mut Dice::new(5), 2000, 900, true);
        (
            store.disk.counters(),
            store.engine.status(store.now).counters,
        )
    };
    assert_eq!(run(), run());
}

#[test]
fn an_oracle_without_puts_lets_no_read_pass() {
    let caught = catch_unwind(|| Oracle::default().judge_read(1, &[b"x"]));
    assert!(caught.is_err());
}
