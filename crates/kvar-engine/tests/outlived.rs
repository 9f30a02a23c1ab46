//! A read that is slower than its block: the copy it reads is given up, and the block is put again before
//! the device answers. Nobody is given the old copy who asked after the put, and it never takes the place
//! of the new one.

mod shard;

use kvar_base::{ContentCheck, MissReason, Moment, PutOutcome};
use kvar_engine::{Event, PutHints, PutRequest, Tier};
use kvar_io::sim::{Fault, FaultKind, FaultOn};
use shard::{Shard, bytes, config, id};
use std::time::Duration;

const LEN: usize = 20_000;
/// Bytes that a section takes, its padding included.
const STORED: u64 = 20_480;
const PAGE: u64 = 4096;
const SECTIONS: usize = 8;
/// The block as it is put again: one section, and shorter.
const AGAIN_LEN: usize = 5000;

/// A shard whose device holds back the read of all of block 1, under the token that comes with it, and has
/// lost the copy meanwhile: another reader, of its first section, found it unreadable twice.
fn outlived() -> (Shard, u64) {
    let mut shard = Shard::new(256 << 20, config());
    shard.put(1, &[LEN; SECTIONS], PutHints::default());
    shard.settle();
    let mut shard = shard.restart();
    let first = shard::place_of(&shard.disk.image(), 1, LEN);
    let last = first + (SECTIONS as u64 - 1) * STORED;
    let stuck = Fault::once(FaultKind::Stuck, FaultOn::Read);
    shard.disk.inject(stuck.within(last..last + STORED));
    for _ in 0..2 {
        let error = Fault::once(FaultKind::Error, FaultOn::Read);
        shard.disk.inject(error.within(first - PAGE..first));
    }
    let part = shard.begin_get(1, Some(0..1));
    let whole = shard.begin_get(1, None);
    assert_eq!(shard.answer(1, part), Err(MissReason::Corrupt));
    assert_eq!(shard.disk.stuck(), 1);
    assert_eq!(shard.get(1, None), Err(MissReason::Absent));
    (shard, whole)
}

/// Puts block 1 again; what is answered with the commit.
fn put_again(shard: &mut Shard) -> Vec<Event> {
    let section = bytes(1, 0, AGAIN_LEN);
    let request = PutRequest {
        id: id(1),
        sections: vec![(AGAIN_LEN as u32, ContentCheck::of(&section, &id(1), 0))],
        hints: PutHints::default(),
        durable: false,
        deadline: Moment(u64::MAX),
    };
    let mut ticket = shard.engine.put_begin(shard.now, &request).unwrap();
    ticket.buffer_mut()[..AGAIN_LEN].copy_from_slice(&section);
    shard.engine.put_commit(shard.now, 1 << 40, ticket);
    shard.hear()
}

fn is_stored(event: &Event) -> bool {
    matches!(event, Event::Put { outcome, .. } if *outcome == PutOutcome::Stored)
}

/// Puts others until block 1 is on the device alone, whatever the device still holds back.
fn push_out(shard: &mut Shard) {
    let tier = |shard: &Shard| shard.engine.stat(shard.now, &id(1)).map(|stat| stat.tier);
    for number in 1000..10_000 {
        shard.put(number, &[LEN], PutHints::default());
        (0..3).for_each(|_| assert!(shard.is_there(number)));
        shard.pass(Duration::from_millis(5));
        if tier(shard) == Some(Tier::Flash) {
            return;
        }
    }
    panic!("block 1 does not leave memory: {:?}", tier(shard));
}

/// The old copy came into memory, and the index led to the new one: reads gave back what had been
/// replaced, and less memory was counted than it took.
#[test]
fn a_read_that_outlived_its_block_does_not_come_back_over_the_next_put() {
    let (mut shard, _) = outlived();
    assert!(put_again(&mut shard).iter().any(is_stored));
    push_out(&mut shard);
    shard.disk.release_stuck();
    shard.settle();
    let tier = shard.engine.stat(shard.now, &id(1)).unwrap().tier;
    assert_eq!(tier, Tier::Flash, "the old copy came in");
    assert_eq!(shard.get(1, None), Ok(vec![0]));
    assert_eq!(shard.engine.bookkeeping(), 0);
}

/// Who asked after the put joined the read of before, and was given the old copy.
#[test]
fn who_asks_after_a_put_does_not_join_a_read_of_before() {
    let (mut shard, _) = outlived();
    put_again(&mut shard);
    push_out(&mut shard);
    // The old read is still held back; this one is answered all the same.
    assert_eq!(shard.get(1, None), Ok(vec![0]));
    assert_eq!(shard.disk.stuck(), 1);
    shard.disk.release_stuck();
    shard.settle();
    assert_eq!(shard.get(1, None), Ok(vec![0]));
}

/// Who waits for a device that holds a read back need not, once somebody has put the block.
#[test]
fn a_put_answers_who_waits_for_a_copy_that_is_gone() {
    let (mut shard, waiting) = outlived();
    let answered = put_again(&mut shard)
        .into_iter()
        .find_map(|event| match event {
            Event::Get { token, outcome } if token == waiting => Some(outcome),
            _ => None,
        });
    let copy = answered.expect("the block is in memory").unwrap();
    assert_eq!(copy.sections.len(), 1);
    assert_eq!(*copy.section(&copy.sections[0]), bytes(1, 0, AGAIN_LEN)[..]);
    shard.disk.release_stuck();
    shard.settle();
    assert_eq!(shard.get(1, None), Ok(vec![0]));
}
