//! Reads of some sections: the device is asked for what is wanted, and nothing unverified comes back.

mod shard;

use kvar_base::MissReason;
use kvar_engine::{EngineConfig, PutHints, Tier};
use kvar_io::sim::SimOptions;
use shard::{Shard, config, id};

const PAGE: u64 = 4096;
const SECTION: usize = 64 << 10;
/// Large enough for blocks of some MiB: a block is a quarter of a segment at most.
const DEVICE_BYTES: u64 = 4 << 30;

fn roomy() -> EngineConfig {
    EngineConfig {
        dram_bytes: 16 << 20,
        ..config()
    }
}

/// A shard with two equal blocks of `sections` on the device alone.
fn on_flash(sections: usize, len: usize) -> Shard {
    let mut shard = Shard::new(DEVICE_BYTES, roomy());
    for number in [1, 2] {
        shard.put(number, &vec![len; sections], PutHints::default());
    }
    shard.settle();
    let shard = shard.restart();
    assert_eq!(
        shard.engine.stat(shard.now, &id(1)).unwrap().tier,
        Tier::Flash
    );
    shard
}

/// What a read of these sections takes from the device.
fn cost(shard: &mut Shard, number: u64, sections: std::ops::Range<u16>) -> u64 {
    let before = shard.counters().device_read_bytes;
    let wanted: Vec<u16> = sections.clone().collect();
    assert_eq!(shard.get(number, Some(sections)), Ok(wanted));
    shard.counters().device_read_bytes - before
}

#[test]
fn some_sections_cost_themselves_and_the_directory_once() {
    let mut shard = on_flash(40, SECTION);
    // Nothing is known of the layout: the directory alone, then what is wanted.
    assert_eq!(cost(&mut shard, 1, 20..22), PAGE + 2 * SECTION as u64);
    // The directory is known now.
    assert_eq!(cost(&mut shard, 1, 22..24), 2 * SECTION as u64);
    assert_eq!(cost(&mut shard, 1, 0..1), SECTION as u64);
    // Another block of the same length is laid out alike: near ones come with its directory.
    let reads = shard.counters().part_reads;
    assert_eq!(cost(&mut shard, 2, 0..2), PAGE + 2 * SECTION as u64);
    assert_eq!(cost(&mut shard, 2, 39..40), SECTION as u64);
    assert_eq!(shard.counters().part_reads, reads + 2);
    // A part of a block makes nothing resident; the whole does, in one read.
    assert_eq!(shard.status().dram_blocks, 0);
    assert_eq!(shard.status().dram_bytes, 0);
    let before = shard.counters().device_read_bytes;
    assert_eq!(shard.get(1, None).unwrap().len(), 40);
    assert_eq!(
        shard.counters().device_read_bytes - before,
        PAGE + 40 * SECTION as u64
    );
    assert_eq!(shard.status().dram_blocks, 1);
    // From memory a part is a part, too.
    assert_eq!(cost(&mut shard, 1, 3..5), 0);
}

#[test]
fn the_first_sections_come_with_a_directory_that_nothing_is_known_of() {
    let mut shard = on_flash(10, 30_000);
    // 30,000 bytes are 8 pages; the front is the directory and 64 KiB.
    assert_eq!(cost(&mut shard, 1, 0..2), PAGE + (64 << 10));
    // A gap of one section is read along rather than asked for twice.
    assert_eq!(cost(&mut shard, 2, 1..3), PAGE + 3 * 8 * PAGE);
}

#[test]
fn a_directory_of_many_pages_and_ragged_sections_is_read_whole() {
    let mut shard = Shard::new(DEVICE_BYTES, roomy());
    let lengths: Vec<usize> = (0..400).map(|section| 1 + section * 37 % 9000).collect();
    shard.put(1, &lengths, PutHints::default());
    shard.settle();
    let mut shard = shard.restart();
    for first in [0, 83, 84, 200, 399] {
        assert_eq!(shard.get(1, Some(first..first + 1)), Ok(vec![first]));
    }
    assert_eq!(shard.get(1, Some(100..300)).unwrap().len(), 200);
    assert_eq!(shard.get(1, Some(0..400)).unwrap().len(), 400);
    assert_eq!(shard.status().dram_blocks, 1);
}

#[test]
fn sections_that_are_not_there_are_of_the_wrong_format_and_cost_no_block() {
    let mut shard = on_flash(5, SECTION);
    for wanted in [5..6, 0..6, 3..3, 4..900] {
        assert_eq!(
            shard.get(1, Some(wanted.clone())),
            Err(MissReason::WrongFormat),
            "{wanted:?}"
        );
    }
    assert!(shard.get(1, Some(4..5)).is_ok());
    assert_eq!(shard.counters().corrupt, 0);
    shard.settle();
    assert_eq!(shard.status().dram_bytes, 0);
}

#[test]
fn a_wrong_byte_anywhere_in_what_is_read_is_a_corrupt_miss() {
    let shard = on_flash(6, SECTION);
    let image = shard.disk.image();
    // Where section 0 of block 1 lies tells where everything of it lies.
    let at = shard::place_of(&image, 1, SECTION);
    let directory = at - PAGE;
    for (place, wanted, expected) in [
        (directory + 70, 3..4, Err(MissReason::Corrupt)),
        (directory + 4000, 3..4, Err(MissReason::Corrupt)),
        (at + 3 * SECTION as u64 + 5, 3..4, Err(MissReason::Corrupt)),
        (at + 3 * SECTION as u64 + 5, 2..3, Ok(vec![2])),
        (at + 5, 0..2, Err(MissReason::Corrupt)),
    ] {
        let mut broken = image.clone();
        broken.flip_bit(place * 8);
        let disk = kvar_io::sim::SimDisk::with_image(broken, SimOptions::default());
        let mut shard = Shard::open(disk, roomy(), shard.now);
        assert_eq!(shard.get(1, Some(wanted.clone())), expected, "{wanted:?}");
        assert_eq!(shard.is_there(1), expected.is_ok());
        assert_eq!(shard.counters().corrupt, u64::from(expected.is_err()));
    }
}

#[test]
fn a_remove_ends_a_read_of_sections() {
    let mut shard = on_flash(40, SECTION);
    let token = shard.begin_get(1, Some(30..31));
    shard.remove(1);
    shard.put(1, &[100], PutHints::default());
    // Its answer was among the events that the remove's settling let pass; a new one is of the new.
    let _ = token;
    assert_eq!(shard.get(1, None), Ok(vec![0]));
    shard.settle();
    assert_eq!(shard.counters().misses[&MissReason::Removed], 1);
    assert_eq!(shard.engine.bookkeeping(), 0);
}
