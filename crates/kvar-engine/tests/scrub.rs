//! Background verification, and telling a device what is free.

mod shard;

use kvar_base::{MissReason, Moment};
use kvar_engine::{EngineConfig, PutHints, Tier};
use kvar_io::sim::SimOptions;
use shard::{Shard, config, id};
use std::time::Duration;

const LEN: usize = 16 << 10;

/// A shard with some sealed segments, as it is after a start.
fn filled(rate: u64) -> Shard {
    let mut shard = Shard::new(64 << 20, config());
    for number in 0..400 {
        shard.put(number, &[LEN], PutHints::default());
    }
    shard.settle();
    shard.config.scrub_bytes_per_s = rate;
    shard.shut_down()
}

#[test]
fn a_pass_reads_every_live_block_at_its_pace_and_rests_for_a_day() {
    let mut shard = filled(1 << 20);
    shard.remove(3);
    shard.pass(Duration::from_secs(2));
    let early = shard.status();
    assert_eq!(early.scrub_passes, 0);
    let read = early.counters.scrub_read_bytes;
    assert!((1 << 20..3 << 20).contains(&read), "{read}");
    assert!(early.scrub_pass_bytes == read);
    shard.pass(Duration::from_secs(10));
    let status = shard.status();
    assert_eq!(status.scrub_passes, 1);
    assert_eq!(status.scrub_last_pass_unix_s / 100, 10_000);
    assert_eq!(status.counters.scrub_blocks, 399);
    assert_eq!(status.counters.scrub_corrupt, 0);
    assert!(status.counters.scrub_segments >= 5);
    shard.leap(Duration::from_secs(3600));
    shard.pass(Duration::from_secs(1));
    assert_eq!(shard.counters().scrub_blocks, 399);
    shard.leap(Duration::from_secs(24 * 3600));
    shard.pass(Duration::from_secs(10));
    assert_eq!(shard.status().scrub_passes, 2);
    assert_eq!(shard.counters().scrub_blocks, 2 * 399);
}

#[test]
fn rotten_blocks_are_found_and_removed_before_anybody_asks() {
    let mut shard = filled(64 << 20);
    let mut image = shard.disk.image();
    let at = shard::place_of(&image, 77, LEN);
    image.flip_bit((at + 9000) * 8);
    shard = shard.restart_from(image);
    shard.pass(Duration::from_secs(2));
    let counters = shard.counters();
    assert_eq!((counters.scrub_corrupt, counters.corrupt), (1, 1));
    assert_eq!(shard.get(77, None), Err(MissReason::Absent));
    assert!(shard.get(78, None).is_ok());
    shard.put(77, &[LEN], PutHints::default());
    assert!(shard.get(77, None).is_ok());
}

#[test]
fn a_rotten_copy_of_a_block_in_memory_is_written_again() {
    let mut shard = filled(64 << 20);
    assert!(shard.get(77, None).is_ok());
    let at = shard::place_of(&shard.disk.image(), 77, LEN);
    shard.disk.corrupt(at + 100..at + 200, 3);
    shard.pass(Duration::from_secs(2));
    let counters = shard.counters();
    assert_eq!((counters.scrub_corrupt, counters.corrupt_rewritten), (1, 1));
    shard.settle();
    let mut shard = shard.restart();
    assert!(shard.get(77, None).is_ok());
}

#[test]
fn a_busy_shard_is_left_alone_and_a_quiet_one_is_not_spun() {
    let mut shard = filled(1 << 30);
    for turn in 0..100 {
        shard.get(turn, None).unwrap();
        shard.pass(Duration::from_millis(5));
    }
    assert_eq!(shard.counters().scrub_blocks, 0);
    // The timer says when there is something to do: never now without anything done.
    let mut turns = 0;
    while shard.status().scrub_passes == 0 {
        let timer = shard.engine.next_timer();
        if shard.engine.in_flight() == 0 {
            let at = timer.expect("a pass is under way");
            shard.now = shard.now.max(at);
        }
        shard.engine.turn(shard.now);
        turns += 1;
        assert!(turns < 3000, "it spins: {:?}", shard.status());
    }
    let next = shard.engine.next_timer().unwrap();
    assert!(next > Moment(80_000_000_000), "{next:?}");
}

#[test]
fn scrub_and_reclaim_do_not_step_on_each_other() {
    let config = EngineConfig {
        dram_bytes: 1 << 20,
        scrub_bytes_per_s: 1 << 30,
        ..config()
    };
    let mut shard = Shard::new(24 << 20, config);
    for number in 0..6000 {
        shard.put(number, &[LEN], PutHints::default());
        if number % 64 == 0 {
            shard.pass(Duration::from_millis(120));
        }
    }
    shard.settle();
    let counters = shard.counters();
    assert!(
        counters.scrub_blocks > 500 && counters.segments_reclaimed > 50,
        "{counters:?}"
    );
    assert_eq!(counters.corrupt, 0);
}

#[test]
fn free_segments_are_discarded_where_that_is_wanted_and_nothing_else_is_lost() {
    for discard in [false, true] {
        let config = EngineConfig {
            dram_bytes: 1 << 20,
            discard,
            ..config()
        };
        let mut shard = Shard::new(24 << 20, config);
        for number in 0..3000 {
            shard.put(number, &[LEN], PutHints::default());
        }
        shard.settle();
        let counters = shard.counters();
        assert!(counters.segments_reclaimed > 20, "{counters:?}");
        assert_eq!(counters.segments_discarded > 20, discard);
        assert_eq!(shard.disk.counters().discards > 20, discard);
        // What reclaim dropped while it was in memory is there, and on no device.
        let on_device = |n: &u64| {
            let stat = shard.engine.stat(shard.now, &id(*n));
            stat.is_some_and(|stat| stat.tier != Tier::Dram)
        };
        let there: Vec<u64> = (0..3000).filter(on_device).collect();
        assert!(there.len() > 800, "{}", there.len());
        let misses = |shard: &mut Shard, numbers: &[u64]| {
            let missing = |n: &&u64| shard.get(**n, None).is_err();
            numbers.iter().filter(missing).count() as u64
        };
        let image = shard.disk.crash(kvar_io::sim::Survival::Flushed);
        let disk = kvar_io::sim::SimDisk::with_image(image, SimOptions::default());
        let now = shard.now;
        let mut shard = Shard::open(disk, shard.config, now);
        assert_eq!(shard.recovery.headers_damaged, 0);
        // A full device has nothing open after a start: its oldest segment makes room unread.
        assert!(misses(&mut shard, &there[64..]) <= shard.recovery.bucket_evicted);
        assert_eq!(shard.counters().corrupt, 0);
    }
}
