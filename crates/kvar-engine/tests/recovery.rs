//! What recovery makes of what a power cut tore.

mod shard;

use kvar_engine::PutHints;
use kvar_io::sim::{Fault, FaultKind, FaultOn, SimDisk, SimOptions, Survival};
use shard::{Shard, config, place_of};
use std::time::Duration;

const LEN: usize = 16 << 10;
/// Some 850 blocks.
const DEVICE: u64 = 16 << 20;

/// A power cut tore the very first header of a segment, and the checkpoint knew the segment as never
/// opened. Where it knew three others (fewer, and the segment was seen to be empty), recovery took it
/// for a used one and for a free one at once: it was reclaimed while it was written, and blocks that
/// were flushed went with it.
#[test]
fn a_segment_whose_first_header_is_torn_is_free_and_nothing_else() {
    let mut store = Shard::new(DEVICE, config());
    for number in 0..400 {
        store.put(number, &[LEN], PutHints::default());
    }
    let store = store.shut_down();
    assert!(store.recovery.segments > 3, "{:?}", store.recovery);
    let never = store.superblock.segments_per_shard - 1;
    let mut image = store.disk.crash(Survival::Flushed);
    image.write(store.superblock.offset(0, never, 0), &[0xee; 4096]);

    let mut store = store.restart_from(image);
    assert_eq!(store.recovery.headers_damaged, 1);
    assert_eq!(store.engine.recount(), Ok(()));
    for number in 0..400 {
        store.get(number, None).unwrap();
    }
    // And it is used like any other, until all are used.
    for number in 1000..2000 {
        store.put(number, &[LEN], PutHints::default());
    }
    store.settle();
    assert_eq!(store.engine.recount(), Ok(()));
    for number in 1900..2000 {
        store.get(number, None).unwrap();
    }
}

/// A checkpoint was misread once, so that recovery began from the one before. There was a block that
/// the newer one did not know, a flush said that it stays, and the next recovery read the newer one.
#[test]
fn a_checkpoint_that_could_not_be_read_is_none_from_then_on() {
    let mut store = Shard::new(DEVICE, config());
    for number in 0..200 {
        store.put(number, &[LEN], PutHints::default());
    }
    let mut store = store.shut_down();
    assert_eq!(store.recovery.checkpoint, Some(1));
    // One block is misread until it is given up.
    let place = place_of(&store.disk.image(), 7, LEN);
    let misread = Fault::always(FaultKind::Error, FaultOn::Read);
    store
        .disk
        .inject(misread.clone().within(place..place + LEN as u64));
    store.get(7, None).unwrap_err();
    store.disk.clear_faults();
    assert!(!store.is_there(7));
    store.engine.begin_shutdown(store.now);
    while store.engine.shutdown_report().is_none() {
        store.pass(Duration::from_millis(1));
    }

    let image = store.disk.crash(Survival::Flushed);
    let newer = store.superblock.checkpoint_area(0, 1);
    let disk = SimDisk::with_image(image, SimOptions::default());
    disk.inject(Fault::once(FaultKind::Error, FaultOn::Read).within(newer..newer + 4096));
    let mut store = Shard::open(disk, config(), store.now);
    assert_eq!(
        (store.recovery.checkpoint, store.recovery.checkpoints_unsure),
        (Some(1), 0)
    );
    store.get(7, None).unwrap();
    store.put(500, &[LEN], PutHints::default());
    store.engine.flush(99);
    store.settle();

    let mut store = store.restart();
    assert_eq!(store.recovery.checkpoint, Some(1));
    store.get(7, None).unwrap();
    store.get(500, None).unwrap();
    // The next one takes its place.
    let store = store.shut_down();
    assert!(store.recovery.checkpoint > Some(1));
}
