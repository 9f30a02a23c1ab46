//! A device that refuses a read once, or brings other bytes once: nothing is lost by that. One that
//! does it twice has lost the block.

mod shard;

use kvar_base::MissReason;
use kvar_engine::PutHints;
use kvar_io::sim::{Fault, FaultKind, FaultOn};
use shard::{Shard, config, id};
use std::time::Duration;

const LEN: usize = 20_000;
const SECTIONS: usize = 8;

/// What goes wrong with a read, and whether the device says so.
const KINDS: [(FaultKind, bool); 3] = [
    (FaultKind::Error, true),
    (FaultKind::Short, true),
    (FaultKind::FlipBits(1), false),
];

/// A shard with block 1 of one section and block 2 of several, on the device alone.
fn on_flash() -> Shard {
    let mut shard = Shard::new(256 << 20, config());
    shard.put(1, &[LEN], PutHints::default());
    shard.put(2, &[LEN; SECTIONS], PutHints::default());
    shard.settle();
    shard.restart()
}

fn strike(shard: &Shard, kind: FaultKind, times: usize) {
    for _ in 0..times {
        shard.disk.inject(Fault::once(kind, FaultOn::Read));
    }
}

/// (refused and tried again, wrong and tried again, mended, given up)
fn again(shard: &Shard) -> (u64, u64, u64, u64) {
    let counters = shard.counters();
    (
        counters.reads_again_error,
        counters.reads_again_check,
        counters.reads_mended,
        counters.corrupt,
    )
}

#[test]
fn a_read_that_fails_once_is_a_hit_all_the_same() {
    for (kind, is_said) in KINDS {
        for (number, sections) in [(1, None), (2, None), (2, Some(3..5))] {
            let mut shard = on_flash();
            strike(&shard, kind, 1);
            let count = sections
                .as_ref()
                .map_or(0, std::iter::ExactSizeIterator::len);
            let found = shard.get(number, sections);
            assert!(found.is_ok(), "{kind:?}, block {number}: {found:?}");
            assert!(count == 0 || found.is_ok_and(|found| found.len() == count));
            let expected = if is_said { (1, 0, 1, 0) } else { (0, 1, 1, 0) };
            assert_eq!(again(&shard), expected, "{kind:?}, block {number}");
            shard.settle();
        }
    }
}

#[test]
fn a_read_that_fails_twice_is_a_block_lost() {
    for (kind, is_said) in KINDS {
        for (number, sections) in [(1, None), (2, None), (2, Some(3..5))] {
            let mut shard = on_flash();
            strike(&shard, kind, 2);
            assert_eq!(
                shard.get(number, sections.clone()),
                Err(MissReason::Corrupt),
                "{kind:?}, block {number}"
            );
            let expected = if is_said { (1, 0, 0, 1) } else { (0, 1, 0, 1) };
            assert_eq!(again(&shard), expected, "{kind:?}, block {number}");
            assert_eq!(shard.get(number, sections), Err(MissReason::Absent));
            shard.settle();
            assert_eq!(shard.status().dram_bytes, 0);
        }
    }
}

/// The background verification must not throw away what one bad moment of the device hid.
#[test]
fn a_scrub_reads_again_too() {
    for (kind, _) in KINDS {
        let mut shard = Shard::new(64 << 20, config());
        for number in 0..400 {
            shard.put(number, &[LEN], PutHints::default());
        }
        shard.settle();
        shard.config.scrub_bytes_per_s = 64 << 20;
        let mut shard = shard.shut_down();
        // Blocks alone: what it reads first are records.
        let image = shard.disk.image();
        let at = shard::place_of(&image, 3, LEN);
        let fault = Fault::once(kind, FaultOn::Read).within(at..at + LEN as u64);
        shard.disk.inject(fault);
        shard.pass(Duration::from_secs(20));
        let counters = shard.counters();
        assert_eq!(
            (counters.scrub_corrupt, counters.corrupt),
            (0, 0),
            "{kind:?}"
        );
        assert_eq!(counters.reads_mended, 1, "{kind:?}");
        assert!(shard.get(3, None).is_ok());
    }
}

/// A block that somebody removed while its read was tried again does not come back with it.
#[test]
fn a_remove_between_the_two_reads_wins() {
    let mut shard = on_flash();
    strike(&shard, FaultKind::Error, 1);
    let token = shard.begin_get(1, None);
    shard.engine.remove(1 << 40, &[id(1)]);
    assert_eq!(shard.answer(1, token), Err(MissReason::Removed));
    shard.settle();
    assert_eq!(shard.get(1, None), Err(MissReason::Absent));
    assert_eq!(shard.status().dram_bytes, 0);
}
