//! Time to live: what is over is a miss wherever it lies, and comes back for nobody.

mod shard;

use kvar_base::{MissReason, Moment, PutOutcome, Refusal};
use kvar_engine::{EngineConfig, PutHints, Tier};
use kvar_io::sim::{Fault, FaultKind, FaultOn};
use shard::{Shard, config, id};
use std::time::Duration;

fn ttl(seconds: u32) -> PutHints {
    PutHints {
        ttl_s: Some(seconds),
        ..PutHints::default()
    }
}

const LEN: usize = 16 << 10;

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[test]
fn a_block_lives_as_long_as_it_was_put_for_in_memory() {
    let mut shard = Shard::new(64 << 20, config());
    let ephemeral = PutHints {
        ephemeral: true,
        ..ttl(10)
    };
    shard.put(1, &[LEN], ephemeral);
    shard.put(2, &[LEN], ttl(20));
    shard.put(3, &[LEN], PutHints::default());
    let expires = shard.engine.stat(shard.now, &id(1)).unwrap().expires_unix_s;
    assert_eq!(expires, Some(1_000_011));
    shard.leap(Duration::from_millis(9_900));
    assert!(shard.is_there(1));
    assert!(shard.get(1, None).is_ok());
    shard.leap(Duration::from_millis(1_200));
    assert!(!shard.is_there(1));
    assert_eq!(shard.get(1, None), Err(MissReason::Expired));
    assert_eq!(shard.engine.stat(shard.now, &id(1)), None);
    assert!(shard.get(2, None).is_ok() && shard.get(3, None).is_ok());
    // In a while nothing is left of it.
    shard.pass(seconds(61));
    assert_eq!(shard.get(1, None), Err(MissReason::Absent));
    assert_eq!(shard.counters().expired, 1);
}

#[test]
fn on_the_device_and_after_a_restart_the_time_is_the_same() {
    let mut shard = Shard::new(64 << 20, config());
    for number in 0..100 {
        shard.put(number, &[LEN, 100], ttl(100 + number as u32));
    }
    shard.put(500, &[LEN], PutHints::default());
    shard.settle();
    assert_eq!(shard.status().expiring_blocks, 100);
    shard.push_out_of_memory(1000);
    assert_eq!(
        shard.engine.stat(shard.now, &id(7)).unwrap().tier,
        Tier::Flash
    );
    // A crash: all records are read. A good stop: the checkpoint says where to look.
    for restart in [Shard::restart, Shard::shut_down] {
        shard = restart(shard);
        assert_eq!(shard.status().expiring_blocks, 100);
        for number in [0, 50, 99] {
            let stat = shard.engine.stat(shard.now, &id(number)).unwrap();
            assert_eq!(stat.expires_unix_s, Some(1_000_101 + number));
        }
        let stat = shard.engine.stat(shard.now, &id(500)).unwrap();
        assert_eq!(stat.expires_unix_s, None);
    }
    shard.now = Moment(150_000_000);
    assert_eq!(shard.get(49, None), Err(MissReason::Expired));
    assert_eq!(shard.get(49, Some(1..2)), Err(MissReason::Expired));
    assert!(shard.get(50, None).is_ok());
    assert!(shard.get(51, Some(1..2)).is_ok());
    assert!(shard.get(500, None).is_ok());
    // Read back into memory it is not younger.
    shard.leap(seconds(1));
    assert_eq!(shard.get(50, None), Err(MissReason::Expired));
}

#[test]
fn a_put_takes_the_place_of_what_is_over_and_the_old_never_comes_back() {
    let mut shard = Shard::new(64 << 20, config());
    shard.put(1, &[LEN], ttl(10));
    shard.settle();
    assert_eq!(shard.try_put(1, &[LEN], ttl(1000)), PutOutcome::Exists);
    shard.leap(seconds(12));
    shard.put(1, &[LEN], PutHints::default());
    assert_eq!(shard.get(1, None), Ok(vec![0]));
    shard.settle();
    let mut shard = shard.restart();
    assert_eq!(shard.get(1, None), Ok(vec![0]));
    shard.remove(1);
    let mut shard = shard.shut_down();
    assert_eq!(shard.get(1, None), Err(MissReason::Absent));
    assert_eq!(
        shard.try_put(1, &[LEN], ttl(0)),
        PutOutcome::Refused(Refusal::WrongFormat)
    );
}

#[test]
fn a_clock_that_is_set_back_lengthens_lives_and_brings_no_removed_block_back() {
    let mut shard = Shard::new(64 << 20, config());
    shard.put(1, &[LEN], ttl(60));
    shard.put(2, &[LEN], ttl(60));
    shard.settle();
    shard.remove(2);
    shard.leap(seconds(100));
    assert_eq!(shard.get(1, None), Err(MissReason::Expired));
    shard.engine.set_wall_clock(shard.now, 1_000_030);
    assert!(shard.get(1, None).is_ok());
    assert_eq!(shard.get(2, None), Err(MissReason::Absent));
    // Set forward, they end sooner; and so over a restart.
    shard.engine.set_wall_clock(shard.now, 1_000_062);
    assert_eq!(shard.get(1, None), Err(MissReason::Expired));
    shard.config.unix_at_start_s = 999_000;
    let mut shard = shard.restart();
    assert!(shard.get(1, None).is_ok());
    assert_eq!(shard.get(2, None), Err(MissReason::Absent));
}

#[test]
fn reclaim_drops_what_is_over_and_carries_the_time_of_what_is_not() {
    let config = EngineConfig {
        dram_bytes: 1 << 20,
        ..config()
    };
    let mut shard = Shard::new(24 << 20, config);
    for number in 0..20 {
        let lives = if number % 2 == 0 { 5 } else { 100_000 };
        shard.put(number, &[LEN], ttl(lives));
    }
    shard.settle();
    shard.leap(seconds(10));
    // Used again and again: the policy would keep them all.
    let mut next = 1000;
    while shard.counters().segments_reclaimed < 40 {
        for number in 0..20 {
            let outcome = shard.get(number, None);
            if number % 2 == 0 {
                assert!(outcome.is_err(), "{number}");
            }
        }
        for _ in 0..16 {
            shard.put(next, &[LEN], PutHints::default());
            next += 1;
        }
        shard.settle();
    }
    assert!(shard.counters().expired >= 10, "{:?}", shard.counters());
    let on_device = |number: &u64| {
        let stat = shard.engine.stat(shard.now, &id(*number));
        stat.is_some_and(|stat| stat.flushed)
    };
    let kept: Vec<u64> = (0..20).filter(on_device).collect();
    assert!(kept.len() >= 5, "{kept:?}");
    let mut shard = shard.restart();
    for number in kept {
        let stat = shard.engine.stat(shard.now, &id(number)).unwrap();
        assert_eq!(stat.expires_unix_s, Some(1_100_001), "{number}");
    }
    // What memory knows of expiry is what lives and what its segment has not lost yet.
    assert!(shard.status().expiring_blocks < 400);
    shard.leap(seconds(200_000));
    assert_eq!(
        shard.engine.lookup(shard.now, &[id(1), id(3)], 0),
        [false; 2]
    );
}

/// The checkpoint is written a chunk at a time, and the record of a block may reach the device
/// after it: such a block is in the checkpoint and in no record, and nobody knows when it expires.
#[test]
fn an_entry_whose_time_is_lost_is_dropped_rather_than_served_for_ever() {
    let mut shard = Shard::new(64 << 20, config());
    for number in 0..50 {
        shard.put(number, &[LEN], ttl(100));
    }
    shard.settle();
    let shard = shard.shut_down();
    // The directory pages and the footer of the first segment are lost.
    let mut image = shard.disk.image();
    let superblock = shard.superblock.clone();
    for area in superblock.areas() {
        for page in 0..superblock.area_pages {
            image.write(superblock.offset(0, 0, area + page), &[0xee; 4096]);
        }
    }
    let mut shard = shard.restart_from(image);
    for number in 0..50 {
        assert!(!shard.is_there(number), "{number}");
    }
}

/// The device lost a header, so the next start found the segment as it was before, and opened it
/// again under the generation that it had had. The footer of the life between was still there: it
/// was taken for this life's, and its times for those of what lies there now; what was put since at
/// other pages had none, and was served for ever.
#[test]
fn the_footer_of_a_life_whose_header_was_lost_does_not_hide_when_blocks_expire() {
    const SEGMENT: u32 = 5;
    let config = EngineConfig {
        dram_bytes: 1 << 20,
        ..config()
    };
    let mut shard = Shard::new(24 << 20, config);
    let mut numbers = 1000..;
    let mut fill = |shard: &mut Shard| {
        let number = numbers.next().unwrap();
        shard.put(number, &[LEN], ttl(50_000));
        shard.settle();
    };
    // Every segment was opened once, so that a lost header leaves an older one.
    while shard.counters().segments_reclaimed == 0 {
        fill(&mut shard);
    }
    let header = shard.superblock.offset(0, SEGMENT, 0);
    let lost = Fault::once(FaultKind::Lost, FaultOn::Write);
    shard.disk.inject(lost.within(header..header + 4096));
    while shard.disk.struck().is_empty() {
        fill(&mut shard);
    }
    let sealed = shard.counters().segments_sealed;
    while shard.counters().segments_sealed < sealed + 3 {
        fill(&mut shard);
    }
    // All of that is over, so that nothing is kept. What comes is more than the segment takes that was
    // prepared: the rest goes where the header was lost.
    let mut shard = shard.restart();
    shard.leap(seconds(100_000));
    for number in 0..90 {
        shard.put(number, &[LEN], ttl(100));
        shard.settle();
    }
    let mut shard = shard.shut_down();
    let now = 1_000_000 + shard.now.0 / 1_000_000;
    for number in 0..90 {
        let stat = shard.engine.stat(shard.now, &id(number));
        let expires = stat.expect("its time is not over").expires_unix_s;
        assert!(
            expires.is_some_and(|expires| (now..=now + 100).contains(&expires)),
            "{number}: {expires:?}"
        );
    }
    shard.leap(seconds(1000));
    for number in 0..90 {
        assert_eq!(shard.get(number, None), Err(MissReason::Expired));
    }
}

/// A checkpoint counts what expires when it begins, and takes most of the index later. What was put in
/// between stood in it and not in the count, so that nobody missed its record when its directory page was
/// lost: it was served for ever.
#[test]
fn whatever_directory_page_is_lost_no_block_of_a_checkpoint_loses_its_time() {
    // The index is several chunks, and the first two are made at once. What comes then has a time.
    let mut shard = Shard::new(1 << 30, config());
    let mut count = 0;
    let mut first = None;
    while shard.counters().checkpoints == 0 {
        let before = shard.counters().meta_write_bytes;
        let hints = first.map_or_else(PutHints::default, |_| ttl(50_000));
        for _ in 0..16 {
            shard.put(count, &[LEN], hints);
            count += 1;
        }
        shard.pass(Duration::from_micros(20));
        if shard.counters().meta_write_bytes - before >= 512 << 10 {
            first = first.or(Some(count));
        }
    }
    let first = first.expect("a checkpoint was begun");
    let image = shard.disk.image();
    let (superblock, opened) = (
        shard.superblock.clone(),
        shard.counters().segments_sealed as u32,
    );
    let mut lost = 0;
    for segment in opened.saturating_sub(1)..opened + 4 {
        for area in superblock.areas() {
            for page in 0..superblock.area_pages {
                let offset = superblock.offset(0, segment, area + page);
                let mut found = [0; 4096];
                image.read(offset, &mut found);
                if found == [0; 4096] {
                    continue;
                }
                lost += 1;
                let mut image = image.clone();
                image.write(offset, &[0xee; 4096]);
                shard = shard.restart_from(image);
                for number in first..count {
                    let stat = shard.engine.stat(shard.now, &id(number));
                    assert!(
                        stat.is_none_or(|stat| stat.expires_unix_s.is_some()),
                        "{number}, page {page} of segment {segment} lost"
                    );
                }
            }
        }
    }
    assert!(lost > 2, "{lost}");
}
