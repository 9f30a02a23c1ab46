//! The simulated disk: it repeats itself, it fails as told, and a crash leaves what a drive may.

mod common;

use common::*;
use kvar_io::sim::{
    Fault, FaultKind, FaultOn, FaultRates, Image, SimDevice, SimDisk, SimOptions, Survival,
};
use kvar_io::{Arena, Device, DeviceError, Op};

const SIZE: u64 = 1 << 20;
const LEN: usize = 4 * PAGE;

fn disk(seed: u64) -> (SimDisk, SimDevice, Arena) {
    let disk = SimDisk::new(
        SIZE,
        SimOptions {
            seed,
            log: true,
            ..SimOptions::default()
        },
    );
    let device = disk.open();
    (disk, device, Arena::new(2 << 20).unwrap())
}

fn place(number: u64) -> u64 {
    number * LEN as u64
}

/// Writes block `number`, marked with `mark`, and waits for it.
fn put(device: &mut SimDevice, arena: &Arena, number: u64, mark: u64) -> Result<(), DeviceError> {
    let op = write(place(number), vec![filled(arena, LEN, mark)]);
    run(device, vec![op]).remove(0).result
}

fn flush(device: &mut SimDevice) -> Result<(), DeviceError> {
    run(device, vec![Op::Flush]).remove(0).result
}

/// What a block of an image is: zero, one of the marks whole, or torn.
#[derive(Debug, PartialEq)]
enum Found {
    Zero,
    Whole(u64),
    Torn,
}

fn find(image: &Image, arena: &Arena, number: u64, marks: &[u64]) -> Found {
    let mut block = vec![0; LEN];
    image.read(place(number), &mut block);
    if block.iter().all(|byte| *byte == 0) {
        return Found::Zero;
    }
    let whole = |mark: &&u64| filled(arena, LEN, **mark).as_slice() == block;
    marks
        .iter()
        .find(whole)
        .map_or(Found::Torn, |mark| Found::Whole(*mark))
}

#[test]
fn two_runs_of_one_seed_agree_and_another_seed_differs() {
    let history = |seed: u64| {
        let rates = FaultRates {
            read_flip_ppm: 100_000,
            write_misdirect_ppm: 100_000,
            write_error_ppm: 100_000,
            flush_lost_ppm: 300_000,
            ..FaultRates::default()
        };
        let disk = SimDisk::new(
            SIZE,
            SimOptions {
                seed,
                rates,
                log: true,
                ..SimOptions::default()
            },
        );
        let (mut device, arena) = (disk.open(), Arena::new(2 << 20).unwrap());
        let mut told = String::new();
        for number in 0..40 {
            device.submit(
                number,
                write(place(number), vec![filled(&arena, LEN, number)]),
            );
            device.submit(100 + number, read(&arena, place(number / 2), LEN));
            if number % 8 == 7 {
                device.submit(200 + number, Op::Flush);
                device.kick().unwrap();
                let mut over = Vec::new();
                device.poll(&mut over);
                for completion in over {
                    told += &format!("{} {:?} ", completion.token, completion.result);
                }
            }
        }
        told += &format!("{:?} {:?}", disk.struck(), disk.counters());
        (told, disk.crash(Survival::Random { seed }))
    };
    assert_eq!(history(7), history(7));
    assert_ne!(history(7).0, history(8).0);
    assert!(history(7).0.contains("Misdirect"), "faults by seed strike");
}

#[test]
fn completions_change_their_order() {
    let orders: Vec<Vec<u64>> = (0..4)
        .map(|seed| {
            let (_, mut device, arena) = disk(seed);
            for token in 0..16 {
                device.submit(token, read(&arena, 0, PAGE));
            }
            drain(&mut device)
                .iter()
                .map(|completion| completion.token)
                .collect()
        })
        .collect();
    let sorted: Vec<u64> = (0..16).collect();
    assert!(
        orders.iter().all(|order| *order != sorted) && orders[0] != orders[1],
        "{orders:?}"
    );
}

#[test]
fn a_crash_keeps_what_was_flushed_and_any_part_of_the_rest() {
    let (mut lost, mut kept, mut torn) = (0, 0, 0);
    for seed in 0..60 {
        let (disk, mut device, arena) = disk(seed);
        put(&mut device, &arena, 0, 10).unwrap();
        put(&mut device, &arena, 1, 11).unwrap();
        flush(&mut device).unwrap();
        put(&mut device, &arena, 1, 21).unwrap();
        device.submit(9, write(place(2), vec![filled(&arena, LEN, 22)]));
        device.kick().unwrap();
        let how = match seed % 5 {
            0 => Survival::Flushed,
            1 => Survival::Completed,
            2 => Survival::Submitted,
            3 => Survival::Prefix(1),
            _ => Survival::Random { seed },
        };
        let image = disk.crash(how);
        let of = |number| find(&image, &arena, number, &[10, 11, 21, 22]);
        assert_eq!(of(0), Found::Whole(10), "flushed and not written again");
        match how {
            Survival::Flushed => assert_eq!((of(1), of(2)), (Found::Whole(11), Found::Zero)),
            Survival::Completed | Survival::Prefix(_) => {
                assert_eq!((of(1), of(2)), (Found::Whole(21), Found::Zero));
            }
            Survival::Submitted => assert_eq!((of(1), of(2)), (Found::Whole(21), Found::Whole(22))),
            Survival::Random { .. } => match of(1) {
                Found::Whole(11) => lost += 1,
                Found::Whole(21) => kept += 1,
                Found::Torn => torn += 1,
                other => panic!("{other:?} was never there"),
            },
        }
        assert_eq!(
            (device.in_flight(), arena.allocated_bytes()),
            (0, 0),
            "what was under way is gone"
        );
        assert_eq!(disk.image(), image, "the disk goes on with what is left");
        put(&mut device, &arena, 3, 30).unwrap();
    }
    assert!(
        lost > 0 && kept > 0 && torn > 0,
        "{lost} lost, {kept} kept, {torn} torn"
    );
}

/// A flush covers what had completed when it was submitted, and nothing that came later.
#[test]
fn a_flush_does_not_cover_a_write_that_it_overtook() {
    let (disk, mut device, arena) = disk(1);
    put(&mut device, &arena, 0, 1).unwrap();
    device.submit(0, Op::Flush);
    device.submit(1, write(place(1), vec![filled(&arena, LEN, 2)]));
    device.kick().unwrap();
    drain(&mut device);
    let image = disk.crash(Survival::Flushed);
    assert_eq!(find(&image, &arena, 0, &[1]), Found::Whole(1));
    assert_eq!(find(&image, &arena, 1, &[2]), Found::Zero);
}

/// At every point of a log, every image has all that was flushed by then, and nothing else than
/// what was submitted by then.
#[test]
fn every_point_of_the_log_gives_legal_images() {
    let (disk, mut device, arena) = disk(3);
    let (mut flushed_at, mut submitted_at) = (Vec::new(), Vec::new());
    for number in 0..12 {
        submitted_at.push(disk.log_len());
        put(&mut device, &arena, number, 100 + number).unwrap();
        if number % 3 == 2 {
            flush(&mut device).unwrap();
            flushed_at.resize(number as usize + 1, disk.log_len());
        }
    }
    let log = disk.log();
    assert_eq!((log.len(), log.is_empty()), (12 * 2 + 4, false));
    let (mut images, mut torn) = (0, 0);
    for point in 0..=log.len() {
        for (how, image) in log.images(point, 99) {
            images += 1;
            assert_eq!(image, log.image(point, how), "an image can be had again");
            for number in 0..12_u64 {
                let found = find(&image, &arena, number, &[100 + number]);
                if flushed_at[number as usize] <= point {
                    assert_eq!(found, Found::Whole(100 + number), "point {point} {how:?}");
                }
                if submitted_at[number as usize] >= point {
                    assert_eq!(found, Found::Zero, "point {point} {how:?}");
                }
                torn += usize::from(found == Found::Torn);
            }
        }
    }
    assert!(
        images == 8 * (log.len() + 1) && torn > 10,
        "{images} images, {torn} torn"
    );
    assert_eq!(log.image(usize::MAX, Survival::Completed), disk.image());
}

#[test]
fn each_fault_does_what_its_line_says() {
    let (disk, mut device, arena) = disk(5);
    for number in 0..8 {
        put(&mut device, &arena, number, number + 1).unwrap();
    }
    flush(&mut device).unwrap();
    let get = |device: &mut SimDevice, number| {
        let completion = run(device, vec![read(&arena, place(number), LEN)]).remove(0);
        let result = completion.result.clone();
        result.map(|()| bytes(&completion).to_vec())
    };
    let expected = |mark: u64| filled(&arena, LEN, mark).as_slice().to_vec();
    let bits =
        |a: &[u8], b: &[u8]| -> u32 { a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum() };
    let error = |kind: &str, result: Result<Vec<u8>, DeviceError>| {
        assert!(
            format!("{:?}", result.unwrap_err()).starts_with(kind),
            "{kind}"
        );
    };

    disk.inject(Fault::once(FaultKind::FlipBits(3), FaultOn::Read));
    assert_eq!(bits(&get(&mut device, 0).unwrap(), &expected(1)), 3);
    assert_eq!(
        get(&mut device, 0).unwrap(),
        expected(1),
        "the medium was not hurt"
    );
    disk.inject(Fault::once(FaultKind::FlipBits(2), FaultOn::Write));
    put(&mut device, &arena, 0, 1).unwrap();
    assert_eq!(bits(&get(&mut device, 0).unwrap(), &expected(1)), 2);

    disk.inject(Fault::once(FaultKind::Misdirect, FaultOn::Read));
    assert_ne!(get(&mut device, 1).unwrap(), expected(2));
    disk.inject(Fault::once(FaultKind::Misdirect, FaultOn::Write));
    put(&mut device, &arena, 1, 77).unwrap();
    assert_ne!(get(&mut device, 1).unwrap(), expected(77));
    let instead = disk.struck().last().unwrap().instead.clone().unwrap();
    let mut victim = vec![0; LEN];
    disk.image().read(instead.start, &mut victim);
    assert_eq!(victim, expected(77), "it went where the record says");

    disk.inject(Fault::once(FaultKind::Lost, FaultOn::Write));
    let before = disk.image();
    put(&mut device, &arena, 2, 88).unwrap();
    assert_eq!(disk.image(), before);

    let third = place(3)..place(4);
    disk.inject(Fault::always(FaultKind::Error, FaultOn::Read).within(third.clone()));
    error("Io", get(&mut device, 3));
    error("Io", get(&mut device, 3));
    get(&mut device, 4).unwrap();
    disk.clear_faults();
    get(&mut device, 3).unwrap();
    disk.inject(Fault::once(FaultKind::Short, FaultOn::Read));
    error("Short", get(&mut device, 4));

    disk.inject(Fault::once(FaultKind::NoSpace, FaultOn::Write));
    assert_eq!(put(&mut device, &arena, 4, 99), Err(DeviceError::NoSpace));
    assert_eq!(put(&mut device, &arena, 4, 99), Ok(()));

    disk.inject(Fault::once(FaultKind::Error, FaultOn::Flush));
    assert!(flush(&mut device).is_err());
    disk.inject(Fault::once(FaultKind::Lost, FaultOn::Flush));
    flush(&mut device).unwrap();
    let image = disk.crash(Survival::Flushed);
    assert_eq!(
        find(&image, &arena, 4, &[5, 99]),
        Found::Whole(5),
        "the flush was a lie"
    );

    disk.corrupt(place(5)..place(6), 4);
    assert_eq!(bits(&get(&mut device, 5).unwrap(), &expected(6)), 4);
    assert_eq!(disk.struck().len(), 12);
}

#[test]
fn what_is_stuck_answers_when_released_and_hangs_nobody() {
    let (disk, mut device, arena) = disk(6);
    disk.inject(Fault::once(FaultKind::Stuck, FaultOn::Write));
    device.submit(1, write(0, vec![filled(&arena, LEN, 1)]));
    let mut over = Vec::new();
    for _ in 0..100 {
        device.wait(PATIENCE);
        device.poll(&mut over);
    }
    assert_eq!((over.len(), disk.stuck(), device.in_flight()), (0, 1, 1));
    assert_ne!(
        arena.allocated_bytes(),
        0,
        "the memory stays with the operation"
    );
    disk.release_stuck();
    device.poll(&mut over);
    assert_eq!((over.len(), disk.stuck()), (1, 0));
    assert_eq!(find(&disk.image(), &arena, 0, &[1]), Found::Whole(1));

    disk.inject(Fault::always(FaultKind::Stuck, FaultOn::Read));
    device.submit(2, read(&arena, 0, LEN));
    device.kick().unwrap();
    drop(device);
    drop(over);
    assert_eq!(arena.allocated_bytes(), 0, "a drop gives up what is stuck");
}

#[test]
fn devices_share_a_disk_and_it_counts() {
    let (disk, mut first, arena) = disk(9);
    let mut second = disk.open();
    put(&mut first, &arena, 0, 1).unwrap();
    let over = run(&mut second, vec![read(&arena, 0, LEN)]);
    assert!(bytes(&over[0]) == filled(&arena, LEN, 1).as_slice());
    flush(&mut second).unwrap();
    run(
        &mut second,
        vec![
            Op::Discard {
                offset: 0,
                len: LEN as u64,
            },
            read(&arena, 1, 1),
        ],
    );
    let counters = disk.counters();
    assert_eq!(
        (
            counters.reads,
            counters.writes,
            counters.flushes,
            counters.discards
        ),
        (1, 1, 1, 1)
    );
    assert_eq!(
        (counters.read_bytes, counters.write_bytes),
        (LEN as u64, LEN as u64)
    );
}
