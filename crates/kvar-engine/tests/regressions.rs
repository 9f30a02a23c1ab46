//! What once went wrong, one story each; the comment above a test says how it showed. And what
//! recovery may cost.

mod common;

use common::{Dice, Oracle, Store, config, id, options, payload};
use kvar_base::{ContentCheck, Moment, PutOutcome, Refusal};
use kvar_engine::layout::{CHUNK_BYTES, decode_chunk};
use kvar_engine::{
    Copy, Engine, EngineConfig, Event, FormatOptions, GetRequest, PutHints, PutRequest, ReadHints,
    Touch, arena_bytes, format, inspect,
};
use kvar_io::Arena;
use kvar_io::sim::{Fault, FaultKind, FaultOn, Image, SimDisk, SimOptions, Survival};
use std::time::Duration;

const KIB: usize = 1 << 10;

/// Few bytes in many sections take a page each. Such a block fitted no segment, and the store
/// opened and closed one segment after the other for it, dropping everything it had.
#[test]
fn a_block_of_many_tiny_sections_does_not_eat_the_device() {
    let config = EngineConfig {
        dram_bytes: 16 << 20,
        ..config()
    };
    let mut store = Store::format(32 << 20, SimOptions::default(), config);
    for number in 0..100 {
        store.put(number, 1, false);
    }
    store.settle();
    let sections = vec![1; 400];
    assert_eq!(
        store.put_sections(5000, 1, &sections, false),
        Some(PutOutcome::Refused(Refusal::TooBig))
    );
    store.settle();
    assert_eq!(store.engine.counters().segments_reclaimed, 0);
    // The most that is taken is also written.
    let sections = vec![1; 120];
    assert_eq!(store.put_sections(5001, 1, &sections, false), None);
    store.settle();
    assert_eq!(store.engine.status(store.now).flash_blocks, 101);
}

/// A put that was larger than the rest of the open segment closed it while reclaim still had to
/// bring blocks there, and no other segment was to be had: both waited for ever. Bulk removes
/// (records without payload) and failed writes did the same.
#[test]
fn reclaim_always_ends_whatever_else_wants_the_open_segment() {
    for seed in 0..8 {
        let mut dice = Dice::new(seed);
        let options = SimOptions {
            seed,
            polls_max: 12,
            ..SimOptions::default()
        };
        let config = EngineConfig {
            dram_bytes: 4 << 20,
            ..config()
        };
        let mut store = Store::format(16 << 20, options, config);
        for step in 0..1500_u64 {
            let len = match dice.below(4) {
                0 => 250 * KIB,
                1 => 100 * KIB,
                _ => 1 + dice.below(20_000) as usize,
            };
            let number = dice.below(2000);
            store.put_sections(number, 1, &[len], false);
            // Wanted blocks, so that reclaim keeps some of every segment.
            let hot: Vec<_> = (0..40).map(|_| id(dice.below(2000))).collect();
            store.engine.lookup(store.now, &hot, step + 1);
            if dice.below(60) == 0 {
                let many: Vec<u64> = (0..150).map(|_| dice.below(4000)).collect();
                store.remove(&many);
            }
            if seed % 4 == 3 && dice.below(200) == 0 {
                store
                    .disk
                    .inject(Fault::once(FaultKind::Error, FaultOn::Write));
            }
            store.turn(Duration::from_millis(dice.below(8)));
        }
        store.disk.clear_faults();
        for _ in 0..3000 {
            store.turn(Duration::from_millis(20));
        }
        let status = store.engine.status(store.now);
        assert!(
            status.unflushed_puts == 0 && store.waiting() == 0 && store.engine.in_flight() == 0,
            "seed {seed}: the store hangs: {status:?}"
        );
        assert!(status.counters.reclaim_kept > 5, "{status:?}");
    }
}

fn small_blocks(mebibytes: u64, expected_block_bytes: u64, sim: SimOptions) -> Store {
    let disk = SimDisk::new(mebibytes << 20, sim);
    let options = FormatOptions {
        expected_block_bytes,
        ..options()
    };
    format(&mut disk.open(), &Arena::new(1 << 20).unwrap(), &options).unwrap();
    let config = EngineConfig {
        dram_bytes: 8 << 20,
        ..config()
    };
    Store::open(disk, config, Oracle::default())
}

/// An entry that made room for another by moving to its second bucket, across the border of what
/// a checkpoint had already written, was missing from the checkpoint or stood in it twice: a
/// flushed block was lost by a restart, or a removed one came back.
#[test]
fn entries_that_move_during_a_checkpoint_are_in_it_once() {
    let sim = SimOptions {
        polls_max: 30,
        ..SimOptions::default()
    };
    let mut store = small_blocks(256, 8192, sim);
    let (mut number, mut checkpoints) = (0, 0);
    while number < 32_500 {
        for _ in 0..100 {
            if store.put_sections(number, 1, &[4000], false).is_none() {
                number += 1;
            }
        }
        store.turn(Duration::from_millis(5));
        if store.engine.counters().checkpoints > checkpoints && number > 20_000 {
            store.settle();
            checkpoints = store.engine.counters().checkpoints;
            let disk = SimDisk::with_image(store.disk.image(), SimOptions::default());
            let mut again = Store::open(disk, store.config.clone(), Oracle::default());
            assert!(again.recovery.checkpoint.is_some());
            let ids: Vec<_> = (0..number).map(id).collect();
            let (before, after) = (
                store.engine.lookup(store.now, &ids, 0),
                again.engine.lookup(again.now, &ids, 0),
            );
            let status = store.engine.status(store.now);
            assert_eq!(status.counters.reclaim_dropped, 0, "all of it fits");
            let lost = before.iter().filter(|hit| **hit).count() as u64
                - after.iter().filter(|hit| **hit).count() as u64;
            // What lost its place in a full bucket is in memory alone.
            assert!(
                lost <= status.counters.bucket_evicted,
                "{lost} of {number} blocks are lost"
            );
            assert_eq!(
                again.engine.status(again.now).flash_blocks,
                status.flash_blocks
            );
        }
    }
    assert!(checkpoints >= 4, "{checkpoints}");
}

/// The first chunk of a checkpoint was written first: a power cut could leave chunks of a number
/// that was given again after the restart, and later a checkpoint of two halves was taken for
/// whole. Now the first chunk follows when all others are flushed, and never over the last good
/// checkpoint.
#[test]
fn a_checkpoint_shows_only_when_all_of_it_is_there() {
    let sim = SimOptions {
        polls_max: 8,
        log: true,
        ..SimOptions::default()
    };
    let mut store = small_blocks(64, 4096, sim);
    let mut number = 0;
    while store.engine.counters().checkpoints < 3 {
        for _ in 0..40 {
            number += 1;
            store.put_sections(number, 1, &[4000], false);
        }
        store.turn(Duration::from_millis(5));
    }
    store.engine.begin_shutdown(store.now);
    while store.engine.shutdown_report().is_none() {
        store.turn(Duration::from_millis(5));
    }
    let superblock = store.superblock.clone();
    let chunks = superblock.checkpoint_bytes as usize / CHUNK_BYTES;
    assert!(chunks > 1, "the index takes several chunks");
    let numbers = |image: &Image, area| -> Vec<Option<u64>> {
        let mut bytes = vec![0; CHUNK_BYTES];
        (0..chunks)
            .map(|chunk| {
                let offset = superblock.checkpoint_area(0, area) + (chunk * CHUNK_BYTES) as u64;
                image.read(offset, &mut bytes);
                decode_chunk(&bytes, &superblock, offset).map(|(place, _)| place.number)
            })
            .collect()
    };
    let log = store.disk.log();
    let (mut partial, mut had_one) = (0, false);
    for point in (0..=log.len()).step_by(3) {
        let flushed = log.image(point, Survival::Flushed);
        let whole = |numbers: &[Option<u64>]| {
            numbers[0].is_some() && numbers.iter().all(|number| *number == numbers[0])
        };
        let one = (0..2).any(|area| whole(&numbers(&flushed, area)));
        assert!(one || !had_one, "point {point}: no checkpoint is left");
        had_one |= one;
        let image = log.image(point, Survival::Random { seed: point as u64 });
        for area in 0..2 {
            let numbers = numbers(&image, area);
            partial += u64::from(numbers.windows(2).any(|pair| pair[0] != pair[1]));
            // One that cannot be read was torn: the checkpoint before it is being written over.
            let older = numbers
                .iter()
                .flatten()
                .any(|number| Some(*number) < numbers[0]);
            assert!(!older, "point {point}: {numbers:?}");
        }
    }
    assert!(had_one && partial > 0, "some points were in the middle");
}

/// A checkpoint may be whole while the directory of the open segment is not yet on the device.
/// Recovery took such a segment for unused, wrote over blocks that the checkpoint led to, and
/// they were found to be corrupt.
#[test]
fn a_segment_that_a_checkpoint_leads_to_is_not_free() {
    let sim = SimOptions {
        log: true,
        ..SimOptions::default()
    };
    let config = EngineConfig {
        flush_after: Duration::from_secs(4),
        ..config()
    };
    let mut store = Store::format(16 << 20, sim, config);
    for number in 0..300 {
        store.put_sections(number, 1, &[20_000], false);
        store.turn(Duration::from_millis(1));
    }
    assert!(store.engine.counters().checkpoints > 2);
    let log = store.disk.log();
    for point in 0..=log.len() {
        let disk = SimDisk::with_image(log.image(point, Survival::Flushed), SimOptions::default());
        if point > 12 && point % 5 == 0 {
            let mut again = Store::open(disk, store.config.clone(), Oracle::default());
            let found = again.engine.status(again.now).flash_blocks;
            // Enough to write over a segment that was taken for free.
            for number in 1000..1080 {
                again.put_sections(number, 1, &[20_000], false);
                again.turn(Duration::from_millis(1));
            }
            again.settle();
            let mut corrupt = 0;
            for number in 0..300 {
                let request = GetRequest {
                    id: id(number),
                    sections: None,
                    deadline: Moment(u64::MAX),
                    touch: Touch::default(),
                };
                again
                    .engine
                    .get(again.now, 1 << 40, request, ReadHints::default());
                for _ in 0..20 {
                    again.now = again.now.after(Duration::from_millis(1));
                    again.engine.turn(again.now);
                }
                again.engine.events().for_each(drop);
            }
            corrupt += again.engine.counters().corrupt;
            assert_eq!(corrupt, 0, "point {point}, {found} blocks found");
        }
    }
}

/// Two segments were opened under one sequence number when nothing was recorded in between; which
/// of them is older could then not be told at recovery, and reclaim could take a tombstone before
/// the block it covers.
#[test]
fn no_two_segments_are_opened_under_one_number() {
    let mut store = Store::format(16 << 20, SimOptions::default(), config());
    for round in 0..4 {
        for number in 0..200 {
            store.put(round * 200 + number, 1, false);
            store.turn(Duration::from_millis(1));
        }
        store.settle();
        let image = store.disk.crash(Survival::Flushed);
        store.forget_calls();
        store = store.reopen(image, SimOptions::default());
        store.settle();
        let arena = Arena::new(16 << 20).unwrap();
        let report = inspect(&mut store.disk.open(), &arena).unwrap();
        let mut opened: Vec<u64> = report
            .segments
            .iter()
            .map(|segment| segment.opened_sequence)
            .collect();
        opened.sort_unstable();
        assert!(
            opened.windows(2).all(|pair| pair[0] < pair[1]),
            "{opened:?}"
        );
    }
}

/// A block that was removed while it was being written left a timer behind that was always due:
/// the node spun on a core until the next put.
#[test]
fn at_rest_nothing_is_due() {
    for seed in 0..30 {
        let sim = SimOptions {
            seed,
            polls_max: 20,
            ..SimOptions::default()
        };
        let mut store = Store::format(16 << 20, sim, config());
        for number in 0..4 {
            store.put(number, 1, false);
            store.turn(Duration::from_millis(30));
            for _ in 0..seed % 7 {
                store.turn(Duration::from_millis(1));
            }
            store.remove(&[number]);
            store.turn(Duration::from_millis(1));
        }
        store.settle();
        for _ in 0..50 {
            store.turn(Duration::from_millis(50));
        }
        assert_eq!(store.engine.next_timer(), None, "seed {seed}");
    }
}

/// After the device had refused writes for long, a flush was answered with success although what
/// it stands for was in memory alone, and stayed there when the device answered again.
#[test]
fn a_flush_after_trouble_is_true() {
    let mut store = Store::format(32 << 20, SimOptions::default(), config());
    store.put(1, 1, false);
    store.settle();
    store
        .disk
        .inject(Fault::always(FaultKind::NoSpace, FaultOn::Write));
    for number in 100..120 {
        store.put(number, 1, false);
        store.turn(Duration::from_secs(3));
    }
    store.engine.flush(1 << 40);
    let mut answer = None;
    for _ in 0..100 {
        store.now = store.now.after(Duration::from_secs(1));
        store.engine.turn(store.now);
        for event in store.engine.events() {
            if let Event::Done { result, .. } = event {
                answer = Some(result);
            }
        }
    }
    let reason = answer
        .expect("a flush ends")
        .expect_err("nothing is flushed");
    assert!(reason.contains("no space"), "{reason}");
    store.disk.clear_faults();
    store.flush();
    store.settle();
    let image = store.disk.crash(Survival::Flushed);
    let mut store = store.reopen(image, SimOptions::default());
    for number in 100..120 {
        assert!(store.outcome_of_get(number).is_ok(), "block {number}");
    }
}

fn request(number: u64, bytes: &[u8]) -> PutRequest {
    PutRequest {
        id: id(number),
        sections: vec![(bytes.len() as u32, ContentCheck::of(bytes, &id(number), 0))],
        hints: PutHints::default(),
        durable: false,
        deadline: Moment(u64::MAX),
    }
}

/// A put for which there was no room threw everything out of memory before it was refused.
#[test]
fn a_put_that_is_refused_evicts_nothing() {
    let mut store = Store::format(32 << 20, SimOptions::default(), config());
    store.put_sections(1, 1, &[100_000], false);
    store.settle();
    let bytes = payload(2, 1, 0, 200 * KIB);
    let tickets: Vec<_> = (10..17)
        .map(|number| {
            let put = request(number, &bytes);
            store.engine.put_begin(store.now, &put).unwrap()
        })
        .collect();
    let before = store.engine.counters().clone();
    let largest = payload(2, 1, 0, 256 * KIB);
    assert_eq!(
        store
            .engine
            .put_begin(store.now, &request(50, &largest))
            .unwrap_err(),
        PutOutcome::Refused(Refusal::Busy)
    );
    assert_eq!(store.engine.status(store.now).dram_blocks, 1);
    assert_eq!(
        store.engine.counters().dram_evicted_clean,
        before.dram_evicted_clean
    );
    tickets
        .into_iter()
        .for_each(|ticket| store.engine.put_abort(ticket));
    assert!(
        store
            .engine
            .put_begin(store.now, &request(50, &bytes))
            .is_ok()
    );
}

/// Copies that slow readers held filled the memory that directory pages are made in; the store
/// took that for a failing device.
#[test]
fn readers_that_hold_on_to_copies_cost_puts_and_no_write() {
    let config = EngineConfig {
        dram_bytes: 2 << 20,
        ..config()
    };
    let disk = SimDisk::new(128 << 20, SimOptions::default());
    let superblock = format(&mut disk.open(), &Arena::new(1 << 20).unwrap(), &options()).unwrap();
    let arena = Arena::new(arena_bytes(&config, &superblock)).unwrap();
    let mut now = Moment(1);
    let (mut engine, _) =
        Engine::open(Box::new(disk.open()), arena, &superblock, 0, config, now).unwrap();
    let mut held: Vec<Copy> = Vec::new();
    let mut refused = 0;
    for number in 0..4000 {
        let len = if refused < 300 { 30_000 } else { 4000 };
        let bytes = payload(number, 1, 0, len);
        match engine.put_begin(now, &request(number, &bytes)) {
            Ok(mut ticket) => {
                ticket.buffer_mut().copy_from_slice(&bytes);
                engine.put_commit(now, number, ticket);
                let get = GetRequest {
                    id: id(number),
                    sections: None,
                    deadline: Moment(u64::MAX),
                    touch: Touch::default(),
                };
                engine.get(now, number, get, ReadHints::default());
            }
            Err(_) => refused += 1,
        }
        now = now.after(Duration::from_millis(1));
        engine.turn(now);
        for event in engine.events() {
            if let Event::Get { outcome, .. } = event {
                held.extend(outcome.ok());
            }
        }
    }
    assert!(refused > 500, "memory is full of held copies: {refused}");
    for _ in 0..200 {
        now = now.after(Duration::from_millis(20));
        engine.turn(now);
    }
    assert_eq!(engine.counters().device_write_errors, 0);
    assert_eq!(engine.status(now).unflushed_puts, 0);
    held.clear();
    let bytes = payload(9999, 1, 0, 30_000);
    assert!(engine.put_begin(now, &request(9999, &bytes)).is_ok());
}

/// Recovery starts from the checkpoint and replays what is newer, nothing else: the records of a
/// device that is nearly full are not read again.
#[test]
fn recovery_replays_only_what_is_newer_than_the_checkpoint() {
    let mut store = Store::format(64 << 20, SimOptions::default(), config());
    let mut number = 0;
    let put = |store: &mut Store, number: &mut u64| {
        *number += 1;
        while store.put_sections(*number, 1, &[12_000], false).is_some() {
            store.turn(Duration::from_millis(2));
        }
        store.turn(Duration::from_micros(300));
    };
    while number < 2600 {
        put(&mut store, &mut number);
    }
    store.settle();
    let before = store.engine.counters().checkpoints;
    while store.engine.counters().checkpoints == before {
        put(&mut store, &mut number);
    }
    store.settle();
    let first_newer = number + 1;
    for _ in 0..40 {
        put(&mut store, &mut number);
    }
    store.remove(&[1, 2, first_newer]);
    store.settle();
    let sealed = store.engine.status(store.now).segments_sealed;
    let image = store.disk.crash(Survival::Flushed);
    store.forget_calls();
    let mut store = store.reopen(image.clone(), SimOptions::default());
    let recovery = store.recovery.clone();
    assert_eq!(recovery.checkpoint, Some(before + 1));
    assert!(sealed > 25 && recovery.segments > 25, "{recovery:?}");
    assert!(recovery.segments_replayed <= 4, "{recovery:?}");
    // What was under way while the checkpoint was written is replayed too: of 3000 blocks not many.
    assert!((43..43 + 170).contains(&recovery.records), "{recovery:?}");
    assert_eq!(recovery.blocks, number - 3);
    for number in [1, 2, first_newer] {
        assert_eq!(store.engine.lookup(store.now, &[id(number)], 0), [false]);
    }
    for number in [3, 1700, first_newer + 1, number] {
        assert_eq!(
            store.engine.lookup(store.now, &[id(number)], 0),
            [true],
            "{number}"
        );
    }
    // Headers, both first chunks, the checkpoint, and the records of those few segments.
    let read = store.disk.counters().read_bytes;
    assert!(read < 4 << 20, "{read} bytes read");
    // The same without a checkpoint costs every record.
    let mut image = image;
    let areas = store.superblock.checkpoint_offset..store.superblock.segments_offset;
    image.flip_bits(areas, 5000, 1);
    let disk = SimDisk::with_image(image, SimOptions::default());
    let store = Store::open(disk, config(), Oracle::default());
    assert_eq!(store.recovery.checkpoint, None);
    assert_eq!(store.recovery.segments_replayed, recovery.segments);
    assert_eq!(store.recovery.blocks, recovery.blocks);
}

/// A device that is slower than its writers filled memory with blocks that could not leave, and
/// every read from the device was Overloaded.
#[test]
fn reads_find_memory_while_puts_wait_for_a_slow_device() {
    let mut store = Store::format(32 << 20, SimOptions::default(), config());
    store.put_sections(1, 1, &[9000], true);
    store.settle();
    let image = store.disk.crash(Survival::Flushed);
    let mut store = store.reopen(image, SimOptions::default());
    store
        .disk
        .inject(Fault::always(FaultKind::Stuck, FaultOn::Write));
    let mut number = 100;
    while store.put_sections(number, 1, &[60_000], false).is_none() {
        number += 1;
        store.turn(Duration::from_millis(100));
    }
    assert!(number > 110, "memory took {} puts", number - 100);
    let raw = GetRequest {
        id: id(1),
        sections: None,
        deadline: Moment(u64::MAX),
        touch: Touch::default(),
    };
    store
        .engine
        .get(store.now, u64::MAX, raw, ReadHints::default());
    for _ in 0..100 {
        store.now = store.now.after(Duration::from_millis(1));
        store.engine.turn(store.now);
        let found = store.engine.events().find_map(|event| match event {
            Event::Get {
                token: u64::MAX,
                outcome,
            } => Some(outcome.is_ok()),
            _ => None,
        });
        if let Some(found) = found {
            assert!(found);
            store.disk.clear_faults();
            store.disk.release_stuck();
            return;
        }
    }
    panic!("the read was not answered");
}
