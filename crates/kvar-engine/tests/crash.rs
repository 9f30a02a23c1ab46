//! Every moment a power cut can come: a recorded run, cut after each of its device events, with
//! several choices of what of the unflushed writes survives; reopened and checked.
//!
//! `KVAR_CRASH_STRIDE=1` takes every point (the default takes every third).

mod common;

use common::{Dice, Oracle, Store, config, id};
use kvar_base::MissReason;
use kvar_io::sim::SimOptions;
use std::time::Duration;

/// What was promised when the log had so many events.
struct Promise {
    log_len: usize,
    oracle: Oracle,
}

#[test]
fn every_crash_point_keeps_its_promises() {
    let stride: usize = std::env::var("KVAR_CRASH_STRIDE")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(3);
    let options = SimOptions {
        seed: 11,
        log: true,
        ..SimOptions::default()
    };
    let image = Store::format(16 << 20, SimOptions::default(), config())
        .disk
        .image();
    let mut store = Store::open(
        kvar_io::sim::SimDisk::with_image(image, options),
        config(),
        Oracle::default(),
    );
    let mut dice = Dice::new(11);
    let mut promises = vec![Promise {
        log_len: 0,
        oracle: Oracle::default(),
    }];
    // Every third id is put once and never removed: these must be there once flushed, unless
    // reclaim dropped them, which it says.
    for step in 0..900_u64 {
        match dice.below(10) {
            0 => store.remove(&[dice.below(100) * 3 + 1]),
            1 => store.flush(),
            _ => {
                let number = dice.below(300);
                let nonce = if number.is_multiple_of(3) {
                    1
                } else {
                    dice.below(3) + 1
                };
                store.put(number, nonce, dice.below(15) == 0);
            }
        }
        if step % 3 == 0 {
            store.turn(Duration::from_millis(dice.below(25)));
        }
        promises.push(Promise {
            log_len: store.disk.log_len(),
            oracle: store.oracle.clone(),
        });
    }
    store.settle();
    let evicted = store.engine.counters().clone();
    assert_eq!(
        evicted.reclaim_dropped + evicted.bucket_evicted,
        0,
        "the run fits the device"
    );
    let log = store.disk.log();
    let final_oracle = store.oracle.clone();
    drop(store);
    let (mut images, mut hits) = (0_u64, 0_u64);
    for point in (0..=log.len()).step_by(stride) {
        // What was promised before this point; what a read may return also has what came later
        // (a put under way may have reached the device).
        let before = promises
            .iter()
            .rev()
            .find(|promise| promise.log_len <= point)
            .expect("the first is at 0");
        for (how, image) in log.images(point, point as u64) {
            images += 1;
            let disk = kvar_io::sim::SimDisk::with_image(image, SimOptions::default());
            let mut oracle = merge(&before.oracle, &final_oracle);
            oracle.hits = 0;
            let mut again = Store::open(disk, config(), oracle);
            for number in (0..300_u64).step_by(7).chain((0..300).step_by(30)) {
                let must = number.is_multiple_of(3)
                    && before
                        .oracle
                        .allowed
                        .get(&number)
                        .is_some_and(|puts| puts.iter().any(|put| put.flushed));
                match again.outcome_of_get(number) {
                    Ok(_) => hits += 1,
                    Err(reason) => assert!(
                        !must && matches!(reason, MissReason::Absent | MissReason::Corrupt),
                        "point {point} {how:?}: block {number} ({}) was flushed and is a miss: {reason}",
                        id(number)
                    ),
                }
            }
        }
    }
    println!("{images} crash images of {} events, {hits} hits", log.len());
    assert!(
        images >= 700 && hits > 10_000,
        "{images} images, {hits} hits"
    );
}

/// Puts allowed before the point, and those that came later (under way at the point at most).
fn merge(before: &Oracle, last: &Oracle) -> Oracle {
    let mut merged = before.clone();
    for (number, puts) in &last.allowed {
        let known = merged.allowed.entry(*number).or_default();
        for put in puts {
            if !known.iter().any(|other| other.order == put.order) && put.order >= before.next_put {
                known.push(*put);
            }
        }
    }
    merged
}
