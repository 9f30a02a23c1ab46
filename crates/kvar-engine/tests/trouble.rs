//! A device that refuses writes for a long time, and one that refuses a single page: what may be
//! lost, and what may be said meanwhile.

mod common;

use common::{Store, config};
use kvar_engine::EngineConfig;
use kvar_io::sim::{Fault, FaultKind, FaultOn, SimOptions, Survival};
use std::time::Duration;

/// A disk that refuses every write: reads and puts go on in memory, nothing waits for ever.
#[test]
fn a_full_file_system_costs_persistence_and_nothing_else() {
    for seed in 0..6 {
        a_full_file_system(seed);
    }
}

fn a_full_file_system(seed: u64) {
    let options = SimOptions {
        seed,
        ..SimOptions::default()
    };
    let mut store = Store::format(32 << 20, options, config());
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
    // Busy is said for a while after each try of the device, every five seconds, no more.
    assert!(stored > 700, "{stored} stored, {busy} busy");
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
    store = store.reopen(image, SimOptions::default());
    assert!(store.outcome_of_get(2000).is_ok());
}

/// Blocks were on the device and out of memory when it refused the page of their records. A flush
/// then failed, as it should; but the next one said that all was done, and a power cut later the
/// blocks were gone although they had been there all the time.
#[test]
fn a_flush_after_a_refused_record_page_keeps_its_word() {
    let config = EngineConfig {
        dram_bytes: 2 << 20,
        // Nothing is flushed unless somebody asks.
        flush_after: Duration::from_secs(3600),
        ..config()
    };
    let mut store = Store::format(16 << 20, SimOptions::default(), config);
    let numbers = 0..220_u64;
    for number in numbers.clone() {
        store.put(number, 1, false);
        store.turn(Duration::from_micros(300));
    }
    let area = store
        .superblock
        .areas()
        .next()
        .expect("a segment has an area");
    let pages = u64::from(store.superblock.area_pages) * 4096;
    for segment in 0..store.superblock.segments_per_shard {
        let first = store.superblock.offset(0, segment, area);
        let fault = Fault::always(FaultKind::NoSpace, FaultOn::Write);
        store.disk.inject(fault.within(first..first + pages));
    }
    let flushed = |store: &mut Store| {
        store.flush();
        while store.waiting() > 0 {
            store.turn(Duration::from_millis(20));
        }
    };
    flushed(&mut store);
    let refused = store.engine.counters().device_write_errors;
    assert!(refused > 0, "a record page was refused");
    store.disk.clear_faults();
    store.turn(Duration::from_secs(10));
    flushed(&mut store);
    let there: Vec<u64> = numbers
        .filter(|number| store.engine.stat(store.now, &common::id(*number)).is_some())
        .collect();
    let image = store.disk.crash(Survival::Flushed);
    store.forget_calls();
    store = store.reopen(image, SimOptions::default());
    let lost: Vec<u64> = there
        .iter()
        .copied()
        .filter(|number| store.outcome_of_get(*number).is_err())
        .collect();
    assert!(there.len() > 60, "{} are there", there.len());
    assert!(
        lost.is_empty(),
        "of {} blocks {lost:?} are lost",
        there.len()
    );
}
