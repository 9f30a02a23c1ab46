//! Small stories: one call or state each.

mod common;

use common::{Oracle, Store, config, id, options, payload};
use kvar_base::{ContentCheck, MissReason, Moment, PutOutcome, Refusal};
use kvar_engine::{
    Engine, Event, GetRequest, OpenError, PutHints, PutRequest, ReadHints, Tier, Touch,
    arena_bytes, check, format, format_probed, inspect, read_superblock,
};
use kvar_io::Arena;
use kvar_io::sim::{Image, SimDisk, SimOptions, Survival};
use std::time::Duration;

fn store() -> Store {
    Store::format(32 << 20, SimOptions::default(), config())
}

fn request(sections: &[&[u8]], number: u64) -> PutRequest {
    PutRequest {
        id: id(number),
        sections: sections
            .iter()
            .enumerate()
            .map(|(at, bytes)| {
                (
                    bytes.len() as u32,
                    ContentCheck::of(bytes, &id(number), at as u16),
                )
            })
            .collect(),
        hints: PutHints::default(),
        durable: false,
        deadline: Moment(u64::MAX),
    }
}

#[test]
fn a_block_is_visible_at_once_then_on_the_device_then_after_a_restart() {
    let mut store = store();
    assert_eq!(store.put(1, 1, false), None);
    assert!(store.outcome_of_get(1).is_ok());
    assert_eq!(
        store.engine.stat(store.now, &id(1)).unwrap().tier,
        Tier::Dram
    );
    store.settle();
    assert_eq!(
        store.engine.stat(store.now, &id(1)).unwrap().tier,
        Tier::DramAndFlash
    );
    let image = store.disk.crash(Survival::Flushed);
    let mut store = store.reopen(image, SimOptions::default());
    assert_eq!(
        store.engine.stat(store.now, &id(1)).unwrap().tier,
        Tier::Flash
    );
    assert!(store.outcome_of_get(1).is_ok());
    assert_eq!(
        store.engine.stat(store.now, &id(1)).unwrap().tier,
        Tier::DramAndFlash
    );
}

#[test]
fn the_first_commit_wins() {
    let mut store = store();
    let (first, second) = (payload(1, 1, 0, 5000), payload(1, 2, 0, 5000));
    let mut one = store
        .engine
        .put_begin(store.now, &request(&[&first], 1))
        .unwrap();
    let again = store.engine.put_begin(store.now, &request(&[&second], 1));
    assert_eq!(again.unwrap_err(), PutOutcome::InProgress);
    assert_eq!(
        store.engine.lookup(store.now, &[id(1)], 0),
        [false],
        "filling is not visible"
    );
    one.buffer_mut().copy_from_slice(&first);
    store.engine.put_commit(store.now, 77, one);
    let outcomes: Vec<_> = store.engine.events().collect();
    assert!(matches!(
        outcomes[..],
        [Event::Put {
            token: 77,
            outcome: PutOutcome::Stored
        }]
    ));
    let again = store.engine.put_begin(store.now, &request(&[&second], 1));
    assert_eq!(again.unwrap_err(), PutOutcome::Exists);
    assert_eq!(store.engine.counters().id_divergence, 1);
}

#[test]
fn an_aborted_put_leaves_nothing() {
    let mut store = store();
    let ticket = store
        .engine
        .put_begin(store.now, &request(&[b"abc"], 1))
        .unwrap();
    store.engine.put_abort(ticket);
    assert_eq!(store.engine.lookup(store.now, &[id(1)], 0), [false]);
    assert_eq!(store.engine.status(store.now).dram_bytes, 0);
    assert!(
        store
            .engine
            .put_begin(store.now, &request(&[b"abc"], 1))
            .is_ok()
    );
}

#[test]
fn bytes_that_are_not_what_the_writer_said_are_refused() {
    let mut store = store();
    let mut ticket = store
        .engine
        .put_begin(store.now, &request(&[b"right", b"also"], 1))
        .unwrap();
    let range = ticket.section_range(0);
    ticket.buffer_mut()[range].copy_from_slice(b"wrong");
    let range = ticket.section_range(1);
    ticket.buffer_mut()[range].copy_from_slice(b"also");
    store.engine.put_commit(store.now, 1, ticket);
    let events: Vec<_> = store.engine.events().collect();
    assert!(matches!(
        events[..],
        [Event::Put {
            outcome: PutOutcome::Refused(Refusal::WrongFormat),
            ..
        }]
    ));
    assert_eq!(store.engine.lookup(store.now, &[id(1)], 0), [false]);
}

#[test]
fn puts_that_cannot_be_are_refused_with_a_word() {
    let mut store = store();
    let largest = store.superblock.block_bytes_max() as usize;
    let check = |store: &mut Store, request: &PutRequest| {
        store.engine.put_begin(store.now, request).unwrap_err()
    };
    let refused = PutOutcome::Refused;
    assert_eq!(
        check(&mut store, &request(&[], 1)),
        refused(Refusal::WrongFormat)
    );
    assert_eq!(
        check(&mut store, &request(&[b""], 1)),
        refused(Refusal::WrongFormat)
    );
    assert_eq!(
        check(&mut store, &request(&[b"a", b""], 1)),
        refused(Refusal::WrongFormat)
    );
    assert_eq!(
        check(&mut store, &request(&[&vec![0; largest + 1]], 1)),
        refused(Refusal::TooBig)
    );
    let late = PutRequest {
        deadline: store.now,
        ..request(&[b"a"], 1)
    };
    assert_eq!(check(&mut store, &late), refused(Refusal::Deadline));
    assert!(
        store
            .engine
            .put_begin(store.now, &request(&[&vec![0; largest]], 1))
            .is_ok()
    );
}

#[test]
fn a_put_never_waits_for_memory() {
    let mut store = store();
    let mut tickets = Vec::new();
    let refused = loop {
        let number = tickets.len() as u64;
        match store.engine.put_begin(
            store.now,
            &request(&[&payload(number, 1, 0, 100_000)], number),
        ) {
            Ok(ticket) => tickets.push(ticket),
            Err(outcome) => break outcome,
        }
    };
    assert_eq!(refused, PutOutcome::Refused(Refusal::Busy));
    assert!(tickets.len() > 10);
}

#[test]
fn a_read_may_name_sections_and_names_that_are_not_there_are_a_miss() {
    let mut store = store();
    store.put_sections(3, 1, &[5000, 10, 4096, 1], false);
    store.settle();
    let mut get = |sections| {
        let touch = Touch::default();
        let deadline = Moment(u64::MAX);
        store.engine.get(
            store.now,
            9,
            GetRequest {
                id: id(3),
                sections,
                deadline,
                touch,
            },
            ReadHints::default(),
        );
        match store.engine.events().next() {
            Some(Event::Get { outcome, .. }) => outcome.map(|copy| {
                copy.sections
                    .iter()
                    .map(|section| (section.index, copy.section(section).to_vec()))
                    .collect::<Vec<_>>()
            }),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        get(Some(1..3)).unwrap(),
        [(1, payload(3, 1, 1, 10)), (2, payload(3, 1, 2, 4096))]
    );
    assert_eq!(get(Some(2..5)), Err(MissReason::WrongFormat));
    assert_eq!(get(Some(2..2)), Err(MissReason::WrongFormat));
    assert_eq!(get(None).unwrap().len(), 4);
}

#[test]
fn a_deadline_of_zero_is_a_deadline_that_has_passed() {
    let mut store = store();
    store.put(1, 1, false);
    store.turn(Duration::from_millis(1));
    let request = GetRequest {
        id: id(1),
        sections: None,
        deadline: store.now,
        touch: Touch::default(),
    };
    store
        .engine
        .get(store.now, 9, request, ReadHints::default());
    assert!(matches!(
        store.engine.events().next(),
        Some(Event::Get {
            outcome: Err(MissReason::Deadline),
            ..
        })
    ));
}

#[test]
fn a_remove_outlives_a_power_cut_at_every_moment_after_its_answer() {
    let mut store = store();
    store.put(1, 1, true);
    store.put(2, 1, true);
    store.settle();
    store.remove(&[1]);
    store.settle();
    let image = store.disk.crash(Survival::Flushed);
    let mut store = store.reopen(image, SimOptions::default());
    assert_eq!(store.outcome_of_get(1), Err(MissReason::Absent));
    assert!(store.outcome_of_get(2).is_ok());
    store.put(1, 2, true);
    store.settle();
    let image = store.disk.crash(Survival::Flushed);
    let mut store = store.reopen(image, SimOptions::default());
    assert!(
        store.outcome_of_get(1).is_ok(),
        "a put after the remove is seen"
    );
}

#[test]
fn a_purge_outlives_a_restart() {
    let mut store = store();
    for number in 0..50 {
        store.put(number, 1, false);
    }
    store.settle();
    store.purge();
    store.settle();
    store.put(7, 2, false);
    store.settle();
    let image = store.disk.crash(Survival::Flushed);
    let mut store = store.reopen(image, SimOptions::default());
    assert_eq!(store.engine.status(store.now).flash_blocks, 1);
    assert!(store.outcome_of_get(7).is_ok());
}

#[test]
fn a_remove_ends_the_reads_under_way() {
    let mut store = store();
    store.put(1, 1, true);
    store.settle();
    let image = store.disk.crash(Survival::Flushed);
    let mut store = store.reopen(
        image,
        SimOptions {
            polls_max: 50,
            ..SimOptions::default()
        },
    );
    store.get(1);
    store.remove(&[1]);
    store.put(1, 3, false);
    store.settle();
    assert_eq!(store.oracle.misses.get(&MissReason::Removed), Some(&1));
    assert!(store.outcome_of_get(1).is_ok());
}

#[test]
fn ephemeral_blocks_stay_off_the_device() {
    let mut store = store();
    let bytes = payload(1, 1, 0, 5000);
    let mut put = request(&[&bytes], 1);
    put.hints.ephemeral = true;
    let mut ticket = store.engine.put_begin(store.now, &put).unwrap();
    ticket.buffer_mut().copy_from_slice(&bytes);
    store.engine.put_commit(store.now, 1, ticket);
    assert_eq!(store.engine.lookup(store.now, &[id(1)], 0), [true]);
    store.engine.events().for_each(drop);
    store.settle();
    assert_eq!(store.engine.counters().block_write_bytes, 0);
}

#[test]
fn write_amplification_at_64_kib_is_below_1_02() {
    let config = kvar_engine::EngineConfig {
        dram_bytes: 32 << 20,
        ..config()
    };
    let disk = SimDisk::new(1 << 30, SimOptions::default());
    let arena = Arena::new(1 << 20).unwrap();
    let options = kvar_engine::FormatOptions {
        expected_block_bytes: 65536,
        ..options()
    };
    let superblock = format(&mut disk.open(), &arena, &options).unwrap();
    let arena = Arena::new(arena_bytes(&config, &superblock)).unwrap();
    let (mut engine, _) = Engine::open(
        Box::new(disk.open()),
        arena,
        &superblock,
        0,
        config,
        Moment(1),
    )
    .unwrap();
    let mut now = Moment(1);
    let bytes = vec![7_u8; 65536];
    for number in 0..8000 {
        let put = request(&[&bytes], number);
        let mut ticket = loop {
            match engine.put_begin(now, &put) {
                Ok(ticket) => break ticket,
                Err(_) => {
                    now = now.after(Duration::from_micros(50));
                    engine.turn(now);
                }
            }
        };
        ticket.buffer_mut().copy_from_slice(&bytes);
        engine.put_commit(now, 1, ticket);
        now = now.after(Duration::from_micros(50));
        engine.turn(now);
        engine.events().for_each(drop);
    }
    let counters = engine.counters();
    assert!(counters.checkpoints > 0);
    let amplification = counters.write_amplification().unwrap();
    assert!(amplification <= 1.02, "{amplification}");
}

fn formatted() -> Image {
    let mut store = store();
    for number in 0..200 {
        store.put(number, 1, false);
        store.turn(Duration::from_millis(2));
    }
    store.settle();
    store.disk.crash(Survival::Flushed)
}

fn opened(image: Image) -> Result<Option<kvar_engine::Superblock>, OpenError> {
    read_superblock(
        &mut SimDisk::with_image(image, SimOptions::default()).open(),
        &Arena::new(1 << 20).unwrap(),
    )
}

#[test]
fn a_device_that_is_not_ours_is_left_alone_and_says_why() {
    assert_eq!(opened(Image::new(8 << 20)), Ok(None));
    let mut foreign = Image::new(8 << 20);
    foreign.write(0, b"something else entirely");
    assert_eq!(opened(foreign), Err(OpenError::NotKvar));
    let image = formatted();
    let mut shorter = Image::new(16 << 20);
    let mut bytes = vec![0; 16 << 20];
    image.read(0, &mut bytes);
    shorter.write(0, &bytes);
    assert!(matches!(opened(shorter), Err(OpenError::Truncated { .. })));
    let mut longer = Image::new(40 << 20);
    let mut bytes = vec![0; 32 << 20];
    image.read(0, &mut bytes);
    longer.write(0, &bytes);
    assert!(matches!(opened(longer), Ok(Some(_))));
}

#[test]
fn two_of_four_superblocks_are_enough_and_the_others_are_mended() {
    for lost in [[0_u64, 65536], [0, (32 << 20) - 65536]] {
        let mut image = formatted();
        for offset in lost {
            image.flip_bits(offset..offset + 100, 3, 1);
        }
        let disk = SimDisk::with_image(image.clone(), SimOptions::default());
        let mut store = Store::open(disk, config(), common::Oracle::default());
        assert!(store.recovery.blocks > 150);
        store.turn(Duration::from_millis(1));
        let report = check(
            &mut store.disk.open(),
            &Arena::new(32 << 20).unwrap(),
            &mut |_, _| {},
        )
        .unwrap();
        assert_eq!(report.superblock_copies_damaged, 0);
    }
    let mut image = formatted();
    for offset in [0, 65536, (32 << 20) - 65536] {
        image.flip_bits(offset..offset + 100, 3, 1);
    }
    assert_eq!(opened(image), Err(OpenError::Damaged { valid: 1 }));
}

#[test]
fn flipped_bytes_anywhere_are_misses_and_check_finds_them() {
    let image = formatted();
    let arena = Arena::new(32 << 20).unwrap();
    let disk = SimDisk::with_image(image.clone(), SimOptions::default());
    let clean = check(&mut disk.open(), &arena, &mut |_, _| {}).unwrap();
    assert!(clean.is_clean() && clean.blocks == 200, "{clean:?}");
    assert!(
        inspect(&mut disk.open(), &arena)
            .unwrap()
            .segments
            .iter()
            .map(|row| row.live_blocks)
            .sum::<u64>()
            == 200
    );
    let mut found = 0;
    for seed in 0..30 {
        let mut broken = image.clone();
        broken.flip_bits(256 << 10..32 << 20, 2000, seed);
        let disk = SimDisk::with_image(broken, SimOptions::default());
        let report = check(&mut disk.open(), &arena, &mut |_, _| {}).unwrap();
        found += report.damaged_blocks;
        let mut store = Store::open(disk, config(), common::Oracle::default());
        for number in 0..200 {
            if let Ok(bytes) = store_get_raw(&mut store, number) {
                let lengths = common::lengths(number, 1);
                let right: Vec<u8> = lengths
                    .iter()
                    .enumerate()
                    .flat_map(|(at, len)| payload(number, 1, at, *len))
                    .collect();
                assert_eq!(bytes, right);
            }
        }
    }
    assert!(found > 30, "{found}");
}

fn store_get_raw(store: &mut Store, number: u64) -> Result<Vec<u8>, MissReason> {
    let request = GetRequest {
        id: id(number),
        sections: None,
        deadline: Moment(u64::MAX),
        touch: Touch::default(),
    };
    store
        .engine
        .get(store.now, 1 << 40, request, ReadHints::default());
    for _ in 0..1000 {
        store.now = store.now.after(Duration::from_millis(1));
        store.engine.turn(store.now);
        for event in store.engine.events() {
            if let Event::Get { outcome, .. } = event {
                return outcome.map(|copy| {
                    copy.sections
                        .iter()
                        .flat_map(|section| copy.section(section).to_vec())
                        .collect()
                });
            }
        }
    }
    panic!("a read was never answered");
}

#[test]
fn a_device_too_small_says_how_small_is_too_small() {
    let disk = SimDisk::new(1 << 20, SimOptions::default());
    let error = format(&mut disk.open(), &Arena::new(1 << 20).unwrap(), &options()).unwrap_err();
    assert!(error.to_string().contains("at least"), "{error}");
}

#[test]
fn what_the_probe_found_bounds_the_writes_under_way_for_good() {
    let disk = SimDisk::new(1 << 30, SimOptions::default());
    let arena = Arena::new(2 << 20).unwrap();
    let (superblock, found) = format_probed(&mut disk.open(), &arena, &options()).unwrap();
    let found = found.expect("the device is large enough to tell");
    assert_eq!(superblock.write_in_flight_bytes, found.in_flight_bytes);
    let again = read_superblock(&mut disk.open(), &arena).unwrap().unwrap();
    assert_eq!(again, superblock);
    let store = Store::open(disk, config(), Oracle::default());
    let most = store.engine.status(store.now).write_in_flight_bytes_max;
    assert_eq!(most, found.in_flight_bytes);
    // A device that was made before, or is too small to tell, has what every device had.
    let small = SimDisk::new(32 << 20, SimOptions::default());
    let (superblock, found) = format_probed(&mut small.open(), &arena, &options()).unwrap();
    assert_eq!((found, superblock.write_in_flight_bytes), (None, 0));
    let store = Store::open(small, config(), Oracle::default());
    assert_eq!(
        store.engine.status(store.now).write_in_flight_bytes_max,
        8 << 20
    );
}
