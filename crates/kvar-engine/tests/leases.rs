//! Leases: what was promised is there until the promise ends, and costs others no more than a tenth.

mod shard;

use kvar_base::{BlockId, LeaseToken, MissReason, PutOutcome};
use kvar_engine::{
    Demoted, EngineConfig, LEASE_MAX, LeaseGrant, LeaseRequest, Places, PutHints, Standing, Tier,
};
use kvar_io::sim::{SimDisk, SimOptions};
use shard::{Shard, config, id};
use std::time::Duration;

const LEN: usize = 16 << 10;

fn token(number: u8) -> LeaseToken {
    LeaseToken::new([number; 16])
}

fn lease(shard: &mut Shard, number: u8, client: u64, blocks: &[u64], ttl: Duration) -> LeaseGrant {
    let ids: Vec<BlockId> = blocks.iter().map(|number| id(*number)).collect();
    let request = LeaseRequest {
        ids: &ids,
        token: token(number),
        client,
        ttl,
        request: 0,
        places: Places::default(),
        over_gaps: false,
    };
    shard.engine.lease(shard.now, &request)
}

fn small() -> EngineConfig {
    EngineConfig {
        dram_bytes: 4 << 20,
        ..config()
    }
}

fn ephemeral() -> PutHints {
    PutHints {
        ephemeral: true,
        ..PutHints::default()
    }
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// Puts so much that the whole device is written anew; leases are kept alive meanwhile.
fn turn_over(shard: &mut Shard, first: u64, leases: &[u8]) {
    let reclaimed = shard.counters().segments_reclaimed + shard.status().segments;
    let mut number = first;
    while shard.counters().segments_reclaimed < reclaimed {
        shard.put(number, &[LEN], PutHints::default());
        number += 1;
        if number.is_multiple_of(16) {
            for number in leases {
                let until = shard.engine.renew(shard.now, token(*number), LEASE_MAX);
                assert!(until.is_some());
            }
        }
    }
    shard.settle();
}

#[test]
fn a_lease_promises_the_leading_blocks_that_are_there() {
    let mut shard = Shard::new(64 << 20, small());
    for number in [1, 2, 4] {
        shard.put(number, &[LEN], PutHints::default());
    }
    let grant = lease(&mut shard, 1, 7, &[1, 2, 3, 4], seconds(2));
    assert_eq!((grant.leading, grant.reason), (2, Some(MissReason::Absent)));
    assert_eq!(grant.until, shard.now.after(seconds(2)));
    assert_eq!(shard.status().leased_blocks, 2);
    // Nothing there is no lease.
    let none = lease(&mut shard, 2, 7, &[3], seconds(2));
    assert_eq!((none.leading, shard.status().leases), (0, 1));
    assert_eq!(shard.engine.renew(shard.now, token(2), seconds(1)), None);
    // The same token takes more blocks in, and no lease is longer than the longest.
    let more = lease(&mut shard, 1, 7, &[4], seconds(3600));
    assert_eq!((more.leading, more.reason), (1, None));
    assert_eq!(more.until, shard.now.after(LEASE_MAX));
    assert_eq!(
        (shard.status().leases, shard.status().leased_blocks),
        (1, 3)
    );
    // Another client's lease of the same name is none.
    assert_eq!(lease(&mut shard, 1, 8, &[1], seconds(1)).leading, 0);
    assert!(shard.engine.release(token(1)) && !shard.engine.release(token(1)));
    let status = shard.status();
    assert_eq!((status.leases, status.leased_blocks), (0, 0));
    assert_eq!(
        (status.leased_dram_bytes, status.leased_flash_bytes),
        (0, 0)
    );
}

#[test]
fn memory_keeps_the_only_copy_while_it_is_leased_and_not_after() {
    let mut shard = Shard::new(64 << 20, small());
    for number in 0..6 {
        shard.put(number, &[LEN], ephemeral());
    }
    assert_eq!(lease(&mut shard, 1, 7, &[0, 1, 2], LEASE_MAX).leading, 3);
    shard.push_out_of_memory(1000);
    for number in 0..6 {
        assert_eq!(shard.is_there(number), number < 3, "{number}");
    }
    // It ends by itself.
    shard.pass(LEASE_MAX);
    assert_eq!(shard.counters().leases_expired, 1);
    assert_eq!(shard.status().leased_dram_bytes, 0);
    shard.push_out_of_memory(2000);
    assert!((0..3).all(|number| !shard.is_there(number)));
}

#[test]
fn a_clean_copy_may_leave_memory_and_is_read_back() {
    let mut shard = Shard::new(64 << 20, small());
    for number in 0..3 {
        shard.put(number, &[LEN, 3000], PutHints::default());
    }
    shard.settle();
    assert_eq!(lease(&mut shard, 1, 7, &[0, 1, 2], LEASE_MAX).leading, 3);
    assert_eq!(shard.status().leased_dram_bytes, 0);
    shard.push_out_of_memory(1000);
    for number in 0..3 {
        let stat = shard.engine.stat(shard.now, &id(number)).unwrap();
        assert_eq!(stat.tier, Tier::Flash);
        assert!(shard.get(number, None).is_ok());
    }
}

#[test]
fn reclaim_carries_leased_blocks_on_however_often() {
    let mut shard = Shard::new(24 << 20, small());
    let leased: Vec<u64> = (0..20).collect();
    for number in 0..60 {
        shard.put(number, &[LEN], PutHints::default());
    }
    shard.settle();
    assert_eq!(lease(&mut shard, 1, 7, &leased, LEASE_MAX).leading, 20);
    // Until the policy has let go of all the others.
    let mut turnovers = 0;
    while (20..60).any(|number| shard.engine.stat(shard.now, &id(number)).is_some()) {
        turnovers += 1;
        assert!(turnovers < 12, "others stay without a lease");
        turn_over(&mut shard, turnovers * 100_000, &[1]);
    }
    for number in leased {
        assert!(shard.get(number, None).is_ok(), "{number}");
    }
    let status = shard.status();
    assert_eq!(status.counters.leased_dropped, 0);
    assert_eq!(status.leased_blocks, 20);
    assert!(shard.engine.release(token(1)));
    let mut turnovers = 0;
    while (0..20).any(|number| shard.engine.stat(shard.now, &id(number)).is_some()) {
        turnovers += 1;
        assert!(turnovers < 12, "they stay without a lease");
        turn_over(&mut shard, (100 + turnovers) * 100_000, &[]);
    }
    assert_eq!(shard.engine.bookkeeping(), 0);
}

#[test]
fn a_lease_beats_the_time_to_live() {
    let mut shard = Shard::new(24 << 20, small());
    let ttl = PutHints {
        ttl_s: Some(5),
        ..PutHints::default()
    };
    shard.put(1, &[LEN], ttl);
    shard.put(2, &[LEN], ttl);
    shard.settle();
    lease(&mut shard, 1, 7, &[1], LEASE_MAX);
    shard.leap(seconds(10));
    assert_eq!(shard.get(2, None), Err(MissReason::Expired));
    turn_over(&mut shard, 1000, &[1]);
    assert!(shard.get(1, None).is_ok());
    assert!(shard.engine.release(token(1)));
    assert_eq!(shard.get(1, None), Err(MissReason::Expired));
}

#[test]
fn removes_and_purges_win_and_are_counted() {
    let mut shard = Shard::new(64 << 20, small());
    for number in 0..4 {
        shard.put(number, &[LEN], PutHints::default());
    }
    shard.settle();
    lease(&mut shard, 1, 7, &[0, 1, 2, 3], LEASE_MAX);
    shard.remove(2);
    assert_eq!(shard.get(2, None), Err(MissReason::Absent));
    assert_eq!(shard.counters().leased_removed, 1);
    assert_eq!(shard.status().leased_blocks, 3);
    // A new block of that id is not what was promised; another lease of it is its own.
    shard.put(2, &[LEN], ephemeral());
    lease(&mut shard, 2, 7, &[2], LEASE_MAX);
    assert!(shard.engine.release(token(1)));
    assert_eq!(shard.status().leased_blocks, 1);
    shard.push_out_of_memory(1000);
    assert!(shard.is_there(2));
    shard.engine.purge(99, None);
    shard.settle();
    assert_eq!(shard.counters().leased_removed, 2);
    let status = shard.status();
    assert_eq!((status.leased_blocks, status.leased_dram_bytes), (0, 0));
    assert!(shard.engine.release(token(2)));
    assert_eq!(shard.status().leases, 0);
}

#[test]
fn budgets_promise_fewer_and_a_thousand_leases_of_one_prefix_count_once() {
    let mut shard = Shard::new(64 << 20, small());
    // A tenth of 4 MiB is 409 KiB: 25 blocks of 16 KiB; a quarter of it 6 a client.
    for number in 0..100 {
        shard.put(number, &[LEN], ephemeral());
    }
    let all: Vec<u64> = (0..100).collect();
    let grant = lease(&mut shard, 1, 1, &all, LEASE_MAX);
    assert_eq!(
        (grant.leading, grant.reason),
        (6, Some(MissReason::Overloaded))
    );
    assert_eq!(shard.counters().leases_cut_short, 1);
    // The same blocks again, for the same client or another: no more bytes.
    for number in 2..200 {
        assert_eq!(
            lease(&mut shard, number, 1, &all[..6], LEASE_MAX).leading,
            6
        );
    }
    assert_eq!(shard.status().leased_dram_bytes, 6 * LEN as u64);
    for client in 2..6 {
        let own: Vec<u64> = (10 * client..10 * client + 6).collect();
        lease(&mut shard, 200 + client as u8, client, &own, LEASE_MAX);
    }
    let status = shard.status();
    assert_eq!(status.leased_dram_bytes, 25 * LEN as u64);
    // The store goes on taking new blocks.
    for number in 1000..2000 {
        assert_eq!(
            shard.try_put(number, &[LEN], ephemeral()),
            PutOutcome::Stored,
            "{number}"
        );
    }
    shard.pass(LEASE_MAX);
    assert_eq!(shard.status().leases, 0);
    assert_eq!(shard.status().leased_dram_bytes, 0);
}

/// Whatever is leased, on the device too: a store at its limit goes on taking and dropping blocks,
/// and what was promised is there.
#[test]
fn leases_cannot_pin_a_store_full() {
    let config = EngineConfig {
        dram_bytes: 2 << 20,
        ..config()
    };
    let mut shard = Shard::new(24 << 20, config);
    for number in 0..1200 {
        shard.put(number, &[LEN], PutHints::default());
    }
    shard.settle();
    let mut promised = Vec::new();
    for client in 0..40_u8 {
        // Old ones, which are reclaimed next.
        for number in (0..1200).map(|number| (number + u64::from(client) * 35) % 1200) {
            if lease(&mut shard, client, u64::from(client), &[number], LEASE_MAX).leading == 1 {
                promised.push(number);
            }
        }
    }
    promised.sort_unstable();
    promised.dedup();
    let status = shard.status();
    assert!(status.leased_flash_bytes <= status.flash_bytes_max / 10);
    assert!(
        status.leased_flash_bytes > status.flash_bytes_max / 12,
        "{status:?}"
    );
    let held: Vec<u8> = (0..40)
        .filter(|number| {
            shard
                .engine
                .renew(shard.now, token(*number), LEASE_MAX)
                .is_some()
        })
        .collect();
    for round in 1..4 {
        turn_over(&mut shard, 100_000 * round, &held);
    }
    assert_eq!(shard.counters().leased_dropped, 0);
    for number in promised {
        assert!(shard.get(number, None).is_ok(), "{number}");
    }
}

#[test]
fn a_corrupt_copy_ends_its_promise() {
    let mut shard = Shard::new(64 << 20, small());
    shard.put(1, &[LEN], PutHints::default());
    shard.settle();
    let mut shard = shard.restart();
    lease(&mut shard, 1, 7, &[1], LEASE_MAX);
    let at = shard::place_of(&shard.disk.image(), 1, LEN);
    shard.disk.corrupt(at + 100..at + 200, 3);
    assert_eq!(shard.get(1, None), Err(MissReason::Corrupt));
    assert_eq!(shard.counters().leased_corrupt, 1);
    assert_eq!(shard.status().leased_flash_bytes, 0);
    assert_eq!(shard.status().leased_blocks, 0);
}

/// A store that starts full has nowhere to write what is promised on to: it went to the tier below, where
/// the lease does not reach, and no counter said so.
#[test]
fn what_is_promised_and_goes_down_for_want_of_room_is_counted() {
    let mut shard = Shard::new(24 << 20, small());
    turn_over(&mut shard, 0, &[]);
    let oldest = (0..10_000).find(|number| shard.is_there(*number)).unwrap();
    // Ends of the process, moment after moment, until one comes when no segment is free, open or empty.
    let mut shard = shard.restart();
    for number in 100_000..100_010 {
        shard.put(number, &[LEN], PutHints::default());
        shard.engine.flush(number);
        for _ in 0..40 {
            shard.now = shard.now.after(Duration::from_micros(100));
            shard.engine.turn(shard.now);
            shard.hear();
            let disk = SimDisk::with_image(shard.disk.image(), SimOptions::default());
            let started = Shard::open(disk, small(), shard.now);
            if promised_and_gone_below(started, oldest) > 0 {
                return;
            }
        }
    }
    panic!("there was always room");
}

/// Promises the oldest blocks of a shard that has just been started and has a tier below; how many of them
/// went there, each counted as lost.
fn promised_and_gone_below(mut shard: Shard, oldest: u64) -> u64 {
    shard.engine.set_standing(Standing::Above);
    for number in oldest..oldest + 200 {
        let client = number % 200;
        lease(&mut shard, client as u8, client, &[number], LEASE_MAX);
    }
    let mut gone = 0;
    for number in 200_000..200_020 {
        let _ = shard.try_put(number, &[LEN], PutHints::default());
        shard.pass(Duration::from_millis(5));
        for (token, block) in std::mem::take(&mut shard.offers) {
            let before = shard.status().leased_blocks;
            shard.engine.demoted(shard.now, token, Demoted::Stored);
            assert_eq!(shard.engine.lookup(shard.now, &[block.id], 0), [false]);
            gone += before - shard.status().leased_blocks;
        }
    }
    assert_eq!(shard.counters().leased_dropped, gone);
    gone
}
