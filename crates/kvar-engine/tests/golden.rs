//! Devices of released formats, kept as files: what an old version wrote, this one reads.
//!
//! `golden/disk/v1/small.img.zst` is a device of 16 MiB: blocks of one and of several sections,
//! some of them removed, a checkpoint, and behind it an open segment without a footer. Its content
//! is a function of the numbers below; nothing here may be changed for a format that is released.
//!
//! `KVAR_GOLDEN_WRITE=1 cargo test -p kvar-engine --test golden` makes the file if there is none.

mod common;

use common::{Oracle, Store, id, options, payload};
use kvar_base::MissReason;
use kvar_engine::{EngineConfig, FormatOptions, Tier, check, format, inspect};
use kvar_io::Arena;
use kvar_io::sim::{Image, SimDisk, SimOptions, Survival};
use std::path::PathBuf;
use std::time::Duration;

const DEVICE_BYTES: usize = 16 << 20;
const BLOCKS: u64 = 120;
/// Removed before the checkpoint, and after it.
const REMOVED: [u64; 4] = [3, 10, 40, 115];
/// The first block that is put when there is a checkpoint.
const LATE: u64 = 100;

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden/disk/v1/small.img.zst")
}

/// Section lengths of a block of the image.
fn sections(number: u64) -> Vec<usize> {
    match number % 10 {
        0 => vec![700, 1, 4096, 900],
        5 => vec![64; 86], // more than one page of section directory
        _ => vec![1 + (number * 37 % 900) as usize],
    }
}

fn bytes_of(number: u64) -> Vec<u8> {
    sections(number)
        .iter()
        .enumerate()
        .flat_map(|(section, len)| payload(number, 1, section, *len))
        .collect()
}

fn config() -> EngineConfig {
    EngineConfig {
        dram_bytes: 4 << 20,
        ..common::config()
    }
}

fn make() -> Image {
    let disk = SimDisk::new(DEVICE_BYTES as u64, SimOptions::default());
    let arena = Arena::new(1 << 20).unwrap();
    let options = FormatOptions {
        expected_block_bytes: 64 << 10,
        created_unix: 1_700_000_000,
        ..options()
    };
    format(&mut disk.open(), &arena, &options).unwrap();
    let mut store = Store::open(disk, config(), Oracle::default());
    let put = |store: &mut Store, number: u64| {
        while store
            .put_sections(number, 1, &sections(number), false)
            .is_some()
        {
            store.turn(Duration::from_millis(5));
        }
    };
    for number in 0..LATE {
        put(&mut store, number);
        store.turn(Duration::from_millis(2));
    }
    store.settle();
    store.remove(&REMOVED[..2]);
    store.settle();
    while store.engine.counters().checkpoints == 0 {
        store.turn(Duration::from_millis(5));
    }
    for number in LATE..BLOCKS {
        put(&mut store, number);
    }
    store.settle();
    store.remove(&REMOVED[2..]);
    store.settle();
    store.disk.crash(Survival::Flushed)
}

fn golden() -> Image {
    if std::env::var_os("KVAR_GOLDEN_WRITE").is_some() && !path().exists() {
        let mut bytes = vec![0; DEVICE_BYTES];
        make().read(0, &mut bytes);
        let packed = zstd::encode_all(&bytes[..], 19).unwrap();
        std::fs::write(path(), packed).unwrap();
    }
    let packed = std::fs::read(path()).expect("golden/disk/v1/small.img.zst is in the repository");
    assert!(packed.len() < 300 << 10, "it is small");
    let bytes = zstd::decode_all(&packed[..]).unwrap();
    assert_eq!(bytes.len(), DEVICE_BYTES);
    let mut image = Image::new(DEVICE_BYTES as u64);
    image.write(0, &bytes);
    image
}

fn open(image: Image) -> Store {
    let disk = SimDisk::with_image(image, SimOptions::default());
    Store::open(disk, config(), Oracle::default())
}

/// Reads a block without the oracle, whose lengths are others.
fn read(store: &mut Store, number: u64) -> Result<Vec<u8>, MissReason> {
    use kvar_base::Moment;
    use kvar_engine::{Event, GetRequest, ReadHints, Touch};
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
                    let parts = copy.sections.iter();
                    parts.flat_map(|part| copy.section(part).to_vec()).collect()
                });
            }
        }
    }
    panic!("a read was never answered");
}

fn holds_what_was_put(store: &mut Store) {
    for number in 0..BLOCKS {
        if REMOVED.contains(&number) {
            assert_eq!(read(store, number), Err(MissReason::Absent), "{number}");
        } else {
            assert_eq!(
                store.engine.stat(store.now, &id(number)).unwrap().tier,
                Tier::Flash
            );
            assert!(read(store, number) == Ok(bytes_of(number)), "{number}");
        }
    }
}

#[test]
fn a_device_of_format_version_1_is_read() {
    let image = golden();
    let mut store = open(image.clone());
    let recovery = store.recovery.clone();
    assert_eq!(recovery.checkpoint, Some(5));
    assert_eq!((recovery.segments, recovery.segments_unsealed), (7, 2));
    assert_eq!(recovery.blocks, BLOCKS - REMOVED.len() as u64);
    assert_eq!(store.superblock.created_unix, 1_700_000_000);
    holds_what_was_put(&mut store);

    let arena = Arena::new(16 << 20).unwrap();
    let disk = SimDisk::with_image(image, SimOptions::default());
    let report = check(&mut disk.open(), &arena, &mut |_, _| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.blocks, recovery.blocks);
    let segments = inspect(&mut disk.open(), &arena).unwrap().segments;
    assert_eq!(
        segments.iter().filter(|segment| segment.sealed).count(),
        5,
        "{segments:?}"
    );
    let others: u64 = segments.iter().map(|segment| segment.other_records).sum();
    assert_eq!(others, REMOVED.len() as u64);
}

#[test]
fn a_device_of_format_version_1_goes_on() {
    let mut store = open(golden());
    store.put_sections(1000, 1, &[500], true);
    store.remove(&[5]);
    store.settle();
    let image = store.disk.crash(Survival::Flushed);
    store.forget_calls();
    let mut store = store.reopen(image, SimOptions::default());
    assert_eq!(read(&mut store, 5), Err(MissReason::Absent));
    assert_eq!(read(&mut store, 1000).unwrap(), payload(1000, 1, 0, 500));
    assert_eq!(read(&mut store, 7).unwrap(), bytes_of(7));
}

/// Without its checkpoint the device tells the same from its records.
#[test]
fn records_alone_tell_the_same() {
    let mut image = golden();
    let offset = open(image.clone()).superblock.checkpoint_offset;
    let end = open(image.clone()).superblock.segments_offset;
    image.flip_bits(offset..end, 5000, 1);
    let mut store = open(image);
    assert_eq!(store.recovery.checkpoint, None);
    assert!(store.recovery.records > BLOCKS);
    holds_what_was_put(&mut store);
}
