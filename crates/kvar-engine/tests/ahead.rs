//! Readers that take blocks section by section: few reads of the device, nothing kept for ever, nothing
//! served that does not hold; and readers that wait for a block that is coming in.

mod shard;

use kvar_base::{ContentCheck, MissReason, Moment, PutOutcome};
use kvar_engine::{
    EngineConfig, Event, GetRequest, PutHints, PutRequest, PutTicket, ReadHints, Tier, Touch,
};
use kvar_io::sim::{Fault, FaultKind, FaultOn, SimOptions};
use shard::{Shard, bytes, config, id};
use std::collections::HashMap;
use std::time::Duration;

const PAGE: u64 = 4096;
const SECTION: usize = 64 << 10;
const DEVICE_BYTES: u64 = 4 << 30;
const SECTIONS: u16 = 32;

fn roomy() -> EngineConfig {
    EngineConfig {
        dram_bytes: 16 << 20,
        ..config()
    }
}

/// A shard with blocks `1..=count` of 2 MiB on the device alone.
fn on_flash(count: u64) -> Shard {
    let mut shard = Shard::new(DEVICE_BYTES, roomy());
    for number in 1..=count {
        shard.put(number, &[SECTION; SECTIONS as usize], PutHints::default());
        shard.settle();
    }
    let shard = shard.restart();
    let stat = shard.engine.stat(shard.now, &id(1)).unwrap();
    assert_eq!(stat.tier, Tier::Flash);
    shard
}

fn begin(shard: &mut Shard, number: u64, section: u16, hints: ReadHints) -> u64 {
    let token = shard.token();
    let request = GetRequest {
        id: id(number),
        sections: Some(section..section + 1),
        deadline: shard.now.after(Duration::from_secs(1)),
        touch: Touch::default(),
    };
    shard.engine.get(shard.now, token, request, hints);
    token
}

const GOES_ON: ReadHints = ReadHints {
    asker: 0,
    goes_on: true,
};

fn take(shard: &mut Shard, number: u64, section: u16) -> Result<Vec<u16>, MissReason> {
    let token = begin(shard, number, section, GOES_ON);
    shard.answer(number, token)
}

#[test]
fn a_block_that_is_taken_by_sections_is_read_once_in_stretches() {
    let mut shard = on_flash(3);
    let before = shard.counters();
    for section in 0..SECTIONS {
        for number in 1..=3 {
            assert_eq!(take(&mut shard, number, section), Ok(vec![section]));
        }
    }
    let counters = shard.counters();
    let read = counters.device_read_bytes - before.device_read_bytes;
    assert_eq!(read, 3 * (PAGE + u64::from(SECTIONS) * SECTION as u64));
    // 2 MiB in stretches of 256 KiB.
    assert_eq!(counters.part_reads - before.part_reads, 3 * 8);
    // All of it was taken: nothing is kept.
    assert_eq!(shard.status().dram_bytes, 0);
    assert_eq!(shard.engine.bookkeeping(), 0);
}

#[test]
fn sections_that_are_asked_for_at_once_wait_for_one_read() {
    let mut shard = on_flash(2);
    let before = shard.counters();
    for number in 1..=2 {
        let tokens: Vec<u64> = (0..8)
            .map(|section| begin(&mut shard, number, section, GOES_ON))
            .collect();
        let mut hits = Vec::new();
        for _ in 0..100 {
            for event in shard.hear() {
                if let Event::Get { token, outcome } = event {
                    let copy = outcome.unwrap();
                    let section = &copy.sections[0];
                    let expected = bytes(number, usize::from(section.index), SECTION);
                    assert!(copy.section(section) == expected);
                    hits.push((token, section.index));
                }
            }
            shard.leap(Duration::from_micros(100));
            shard.engine.turn(shard.now);
        }
        hits.sort_unstable();
        assert_eq!(hits, tokens.into_iter().zip(0..8).collect::<Vec<_>>());
    }
    let counters = shard.counters();
    // The first block's layout was not known: its first stretch ends where the directory was not
    // reckoned with.
    assert!(counters.part_reads - before.part_reads <= 2 + 3);
    shard.settle();
    assert_eq!(shard.engine.bookkeeping(), 0);
}

#[test]
fn what_nobody_comes_for_goes_from_an_idle_shard_too() {
    let mut shard = on_flash(2);
    assert!(take(&mut shard, 1, 0).is_ok());
    assert!(shard.status().dram_bytes > 0, "a stretch is held");
    // Nobody asks this shard for anything: it looks by itself.
    let at = shard.engine.next_timer().expect("it will look");
    assert!(at <= shard.now.after(Duration::from_secs(2)));
    shard.leap(at.since(shard.now));
    shard.engine.turn(shard.now);
    assert_eq!(shard.status().dram_bytes, 0);
    assert_eq!(shard.engine.next_timer(), None);
    assert_eq!(take(&mut shard, 1, 1), Ok(vec![1]));
}

#[test]
fn no_more_is_held_than_a_share_of_memory() {
    let mut shard = on_flash(24);
    for number in 1..=24 {
        assert!(take(&mut shard, number, 0).is_ok());
        assert!(shard.status().dram_bytes <= (16 << 20) / 4 + (512 << 10));
    }
    for number in 1..=24 {
        assert_eq!(take(&mut shard, number, 1), Ok(vec![1]), "{number}");
    }
}

#[test]
fn stretches_that_are_under_way_count_as_held() {
    let mut shard = on_flash(24);
    let tokens: Vec<u64> = (1..=24)
        .map(|number| begin(&mut shard, number, 0, GOES_ON))
        .collect();
    let answers = ends(&mut shard, tokens.len());
    assert!(answers.values().all(|outcome| *outcome == Ok(0)));
    let held = shard.status().dram_bytes;
    assert!(held > 0 && held <= (16 << 20) / 4, "{held} are held");
    // The rest is read when it is asked for.
    for number in 1..=24 {
        assert_eq!(take(&mut shard, number, 1), Ok(vec![1]), "{number}");
    }
    shard.settle();
    shard.leap(Duration::from_secs(3));
    shard.engine.turn(shard.now);
    assert_eq!(shard.status().dram_bytes, 0);
    assert_eq!(shard.engine.bookkeeping(), 0);
}

#[test]
fn a_reader_of_sections_that_are_not_there_ends_nobody_elses_read() {
    let mut shard = on_flash(1);
    // Of the layout nothing is known yet.
    let wrong = begin(&mut shard, 1, 100, GOES_ON);
    let right = begin(&mut shard, 1, 0, GOES_ON);
    let answers = ends(&mut shard, 2);
    assert_eq!(answers[&wrong], Err(MissReason::WrongFormat));
    assert_eq!(answers[&right], Ok(0));
}

#[test]
fn who_waits_for_a_stretch_too_long_costs_no_read() {
    let mut shard = on_flash(1);
    let read = shard.counters().device_read_bytes;
    stick(&shard);
    // They come to wait for one read, which does not reach the second's section.
    let first = begin(&mut shard, 1, 0, GOES_ON);
    let second = begin(&mut shard, 1, 9, GOES_ON);
    for _ in 0..100 {
        shard.engine.turn(shard.now);
    }
    assert_eq!(shard.disk.stuck(), 1);
    shard.leap(Duration::from_secs(2));
    release(&shard);
    let answers = ends(&mut shard, 2);
    assert_eq!(answers[&first], Ok(0), "under way when its time was over");
    assert_eq!(answers[&second], Err(MissReason::Deadline));
    shard.settle();
    let read = shard.counters().device_read_bytes - read;
    assert_eq!(read, PAGE + (256 << 10));
}

/// Reads of the device, at most, as the engine's page says.
const AT_DEVICE: u64 = 256;

#[test]
fn a_section_that_is_held_waits_for_no_turn_at_the_device() {
    let mut shard = Shard::new(DEVICE_BYTES, roomy());
    shard.put(1, &[SECTION; SECTIONS as usize], PutHints::default());
    for number in 2..=AT_DEVICE + 2 {
        shard.put(number, &[4096], PutHints::default());
    }
    shard.settle();
    let mut shard = shard.restart();
    assert_eq!(take(&mut shard, 1, 0), Ok(vec![0]));
    stick(&shard);
    for number in 2..=AT_DEVICE + 2 {
        shard.begin_get(number, None);
    }
    for _ in 0..1000 {
        shard.engine.turn(shard.now);
    }
    assert_eq!(shard.disk.stuck() as u64, AT_DEVICE);
    let waiting = shard.counters().reads_waited;
    let token = begin(&mut shard, 1, 1, GOES_ON);
    assert_eq!(heard(&mut shard, token), Some(Ok(1)));
    assert_eq!(shard.counters().reads_waited, waiting);
    release(&shard);
    shard.settle();
}

#[test]
fn who_asks_again_and_again_while_the_device_hangs_is_not_remembered_each_time() {
    const JOINED_MAX: usize = 4 * 4096;
    for sections in [1..2, 0..SECTIONS] {
        let mut shard = on_flash(1);
        stick(&shard);
        let ask = |shard: &mut Shard, deadline| {
            let token = shard.token();
            let request = GetRequest {
                id: id(1),
                sections: Some(sections.clone()),
                deadline,
                touch: Touch::default(),
            };
            shard.engine.get(shard.now, token, request, GOES_ON);
            token
        };
        for _ in 0..2 * JOINED_MAX {
            shard.leap(Duration::from_millis(1));
            let soon = shard.now.after(Duration::from_millis(5));
            ask(&mut shard, soon);
            assert!(shard.engine.bookkeeping() <= JOINED_MAX + 8);
        }
        assert_eq!(shard.disk.stuck(), 0, "no turn yet");
        shard.hear();
        // Nobody else is turned away for them, as long as there is room for who still waits.
        let mut last = 0;
        for _ in 0..JOINED_MAX {
            shard.leap(Duration::from_micros(10));
            last = ask(&mut shard, Moment(u64::MAX));
        }
        let late = |event: Event| match event {
            Event::Get { outcome, .. } => assert_eq!(outcome.err(), Some(MissReason::Deadline)),
            other => panic!("{other:?}"),
        };
        shard.hear().into_iter().for_each(late);
        shard.leap(Duration::from_secs(1));
        let one_more = ask(&mut shard, Moment(u64::MAX));
        assert_eq!(
            heard(&mut shard, one_more),
            Some(Err(MissReason::Overloaded))
        );
        release(&shard);
        assert_eq!(shard.answer(1, last), Ok(sections.collect()));
        shard.settle();
        shard.leap(Duration::from_secs(3));
        shard.engine.turn(shard.now);
        assert_eq!(shard.engine.bookkeeping(), 0);
    }
}

fn stick(shard: &Shard) {
    let stuck = Fault::always(FaultKind::Stuck, FaultOn::Read);
    shard.disk.inject(stuck);
}

fn release(shard: &Shard) {
    shard.disk.clear_faults();
    shard.disk.release_stuck();
}

/// How so many reads end: the first section of what each brought.
fn ends(shard: &mut Shard, count: usize) -> HashMap<u64, Result<u16, MissReason>> {
    let mut ends = HashMap::new();
    for _ in 0..1000 {
        for event in shard.hear() {
            if let Event::Get { token, outcome } = event {
                ends.insert(token, outcome.map(|copy| copy.sections[0].index));
            }
        }
        if ends.len() >= count {
            return ends;
        }
        shard.leap(Duration::from_micros(100));
        shard.engine.turn(shard.now);
    }
    panic!("{} of {count} reads have ended", ends.len());
}

#[test]
fn a_removed_block_is_not_served_from_what_is_held() {
    let mut shard = on_flash(2);
    assert!(take(&mut shard, 1, 0).is_ok());
    shard.remove(1);
    assert_eq!(take(&mut shard, 1, 1), Err(MissReason::Absent));
    assert_eq!(shard.status().dram_bytes, 0);
}

#[test]
fn what_is_held_of_a_copy_that_was_given_up_is_not_served_for_a_newer() {
    let shard = on_flash(1);
    let mut broken = shard.disk.image();
    let at = shard::place_of(&broken, 1, SECTION);
    broken.flip_bit((at + 20 * SECTION as u64 + 77) * 8);
    let disk = kvar_io::sim::SimDisk::with_image(broken, SimOptions::default());
    let mut shard = Shard::open(disk, roomy(), shard.now);
    assert_eq!(take(&mut shard, 1, 0), Ok(vec![0]));
    let since = shard.now;
    assert_eq!(take(&mut shard, 1, 20), Err(MissReason::Corrupt));
    // The same id, in other sections, and soon on the device alone: others push it out of memory.
    shard.put(1, &[100, 200, 300], PutHints::default());
    shard.settle();
    let tier = |shard: &Shard| shard.engine.stat(shard.now, &id(1)).unwrap().tier;
    for number in 2.. {
        if tier(&shard) == Tier::Flash {
            break;
        }
        assert!(number < 50, "it stays in memory");
        shard.put(number, &[2 << 20], PutHints::default());
        (0..3).for_each(|_| assert!(shard.is_there(number)));
    }
    assert!(
        shard.now < since.after(Duration::from_secs(2)),
        "what is held may have gone"
    );
    let token = begin(&mut shard, 1, 1, GOES_ON);
    for _ in 0..1000 {
        for event in shard.hear() {
            if let Event::Get {
                token: its,
                outcome,
            } = event
                && its == token
            {
                let copy = outcome.unwrap();
                assert_eq!((copy.sections[0].index, copy.sections[0].len), (1, 200));
                return;
            }
        }
        shard.leap(Duration::from_micros(100));
        shard.engine.turn(shard.now);
    }
    panic!("it is not answered");
}

#[test]
fn a_wrong_byte_in_the_middle_of_a_stretch_ends_the_block_there() {
    let shard = on_flash(2);
    let image = shard.disk.image();
    let at = shard::place_of(&image, 1, SECTION);
    let mut broken = image;
    broken.flip_bit((at + 2 * SECTION as u64 + 77) * 8);
    let disk = kvar_io::sim::SimDisk::with_image(broken, SimOptions::default());
    let mut shard = Shard::open(disk, roomy(), shard.now);
    assert_eq!(take(&mut shard, 1, 0), Ok(vec![0]));
    assert_eq!(take(&mut shard, 1, 1), Ok(vec![1]));
    assert_eq!(take(&mut shard, 1, 2), Err(MissReason::Corrupt));
    assert_eq!(take(&mut shard, 1, 3), Err(MissReason::Absent));
    assert_eq!(shard.counters().corrupt, 1);
    assert_eq!(take(&mut shard, 2, 2), Ok(vec![2]));
}

#[test]
fn a_small_block_is_read_whole_at_its_first_section() {
    let mut shard = Shard::new(DEVICE_BYTES, roomy());
    for number in [1, 2] {
        shard.put(number, &[30_000; 6], PutHints::default());
    }
    shard.settle();
    let mut shard = shard.restart();
    for section in 0..6 {
        assert_eq!(take(&mut shard, 1, section), Ok(vec![section]));
    }
    let before = shard.counters().device_read_bytes;
    for section in 0..6 {
        assert_eq!(take(&mut shard, 2, section), Ok(vec![section]));
    }
    let read = shard.counters().device_read_bytes - before;
    assert_eq!(read, PAGE + 6 * 8 * PAGE);
    assert_eq!(shard.status().dram_blocks, 1);
}

// ---- waiting ------------------------------------------------------------------------------------

/// Has an asker wait for a put of a block, for a second.
fn wait(shard: &mut Shard, asker: u64, number: u64) -> u64 {
    let token = shard.token();
    let until = shard.now.after(Duration::from_secs(1));
    let id = id(number);
    shard.engine.await_put(shard.now, asker, token, &id, until);
    token
}

/// Who need not wait any more.
fn told(shard: &mut Shard) -> Vec<u64> {
    let events = shard.hear().into_iter();
    let told = events.filter_map(|event| match event {
        Event::Awaited { token } => Some(token),
        _ => None,
    });
    told.collect()
}

/// Announces a block whose checks are not known yet.
fn announce(shard: &mut Shard, number: u64, lengths: &[usize]) -> Result<PutTicket, PutOutcome> {
    announce_until(shard, number, lengths, Moment(u64::MAX))
}

fn announce_until(
    shard: &mut Shard,
    number: u64,
    lengths: &[usize],
    deadline: Moment,
) -> Result<PutTicket, PutOutcome> {
    let request = PutRequest {
        id: id(number),
        sections: lengths
            .iter()
            .map(|len| (*len as u32, ContentCheck(0)))
            .collect(),
        hints: PutHints::default(),
        durable: false,
        deadline,
    };
    shard.engine.put_begin(shard.now, &request)
}

fn fill(ticket: &mut PutTicket, number: u64, section: usize) {
    let range = ticket.section_range(section);
    let bytes = bytes(number, section, range.len());
    ticket.buffer_mut()[range].copy_from_slice(&bytes);
    let check = ContentCheck::of(&bytes, &id(number), section as u16);
    ticket.set_check(section, check);
}

fn heard(shard: &mut Shard, wanted: u64) -> Option<Result<u16, MissReason>> {
    let events = shard.hear();
    events.into_iter().find_map(|event| match event {
        Event::Get { token, outcome } if token == wanted => {
            Some(outcome.map(|copy| copy.sections[0].index))
        }
        _ => None,
    })
}

#[test]
fn whoever_waits_for_an_announced_block_is_told_at_its_commit() {
    let mut shard = Shard::new(DEVICE_BYTES, roomy());
    let early = wait(&mut shard, 0, 1);
    assert_eq!(told(&mut shard), [early], "nobody has announced it");
    let mut ticket = announce(&mut shard, 1, &[SECTION, 100, SECTION]).unwrap();
    let waiting = [wait(&mut shard, 0, 1), wait(&mut shard, 0, 1)];
    let token = begin(&mut shard, 1, 0, ReadHints::default());
    assert_eq!(
        heard(&mut shard, token),
        Some(Err(MissReason::Absent)),
        "who does not wait is told at once"
    );
    for section in 0..3 {
        fill(&mut ticket, 1, section);
    }
    assert!(told(&mut shard).is_empty(), "nothing before the commit");
    let token = shard.token();
    shard.engine.put_commit(shard.now, token, ticket);
    assert_eq!(told(&mut shard), waiting);
    assert_eq!(take(&mut shard, 1, 2), Ok(vec![2]));
    assert_eq!(shard.counters().waited_reads, 2);
    // It is there: nobody waits.
    let late = wait(&mut shard, 0, 1);
    assert_eq!(told(&mut shard), [late]);
    shard.settle();
    assert_eq!(shard.engine.bookkeeping(), 0);
}

#[test]
fn an_abort_a_wrong_block_and_a_deadline_end_the_wait() {
    let mut shard = Shard::new(DEVICE_BYTES, roomy());
    // Aborted.
    let ticket = announce(&mut shard, 1, &[SECTION]).unwrap();
    let waiting = wait(&mut shard, 0, 1);
    shard.engine.put_abort(ticket);
    assert_eq!(told(&mut shard), [waiting]);
    // Committed with bytes that are not what was said.
    let mut ticket = announce(&mut shard, 1, &[SECTION]).unwrap();
    fill(&mut ticket, 1, 0);
    ticket.buffer_mut()[5] ^= 1;
    let waiting = wait(&mut shard, 0, 1);
    let token = shard.token();
    shard.engine.put_commit(shard.now, token, ticket);
    assert_eq!(told(&mut shard), [waiting]);
    // Never ended: nobody asks this shard for anything, and it looks by itself.
    let ticket = announce(&mut shard, 1, &[SECTION]).unwrap();
    let waiting = wait(&mut shard, 0, 1);
    let at = shard.engine.next_timer().expect("it will look");
    assert_eq!(at, shard.now.after(Duration::from_secs(1)));
    shard.leap(Duration::from_secs(1));
    shard.engine.turn(shard.now);
    assert_eq!(told(&mut shard), [waiting]);
    assert_eq!(shard.engine.next_timer(), None);
    shard.engine.put_abort(ticket);
    shard.settle();
    assert_eq!(shard.engine.bookkeeping(), 0);
}

#[test]
fn one_who_asks_leaves_half_of_the_waiting_places_to_others_and_there_are_so_many() {
    const PLACES: usize = 1024;
    let mut shard = Shard::new(DEVICE_BYTES, roomy());
    let ticket = announce(&mut shard, 1, &[SECTION]).unwrap();
    for _ in 0..PLACES {
        wait(&mut shard, 7, 1);
    }
    assert_eq!(told(&mut shard).len(), PLACES / 2);
    for asker in 100..100 + PLACES as u64 {
        wait(&mut shard, asker, 1);
    }
    assert_eq!(told(&mut shard).len(), PLACES / 2);
    shard.engine.put_abort(ticket);
    assert_eq!(told(&mut shard).len(), PLACES);
    shard.settle();
    assert_eq!(shard.engine.bookkeeping(), 0);
}

#[test]
fn who_waits_and_goes_frees_its_place() {
    let mut shard = Shard::new(DEVICE_BYTES, roomy());
    let ticket = announce(&mut shard, 1, &[SECTION]).unwrap();
    for _ in 0..2000 {
        let token = wait(&mut shard, 7, 1);
        assert!(told(&mut shard).is_empty());
        shard.engine.forget(shard.now, 7, token, &id(1));
        assert_eq!(told(&mut shard), [token]);
    }
    shard.engine.put_abort(ticket);
    shard.settle();
    assert_eq!(shard.engine.bookkeeping(), 0);
}

#[test]
fn a_late_end_of_an_older_put_wakes_nobody_who_waits_for_a_newer() {
    for is_abort in [true, false] {
        let mut shard = Shard::new(DEVICE_BYTES, roomy());
        let deadline = shard.now.after(Duration::from_secs(1));
        let mut old = announce_until(&mut shard, 1, &[SECTION], deadline).unwrap();
        fill(&mut old, 1, 0);
        // Its writer hangs for so long that the id is free again.
        shard.leap(Duration::from_secs(7));
        let mut new = announce(&mut shard, 1, &[SECTION]).unwrap();
        fill(&mut new, 1, 0);
        let waiting = wait(&mut shard, 0, 1);
        if is_abort {
            shard.engine.put_abort(old);
        } else {
            let token = shard.token();
            shard.engine.put_commit(shard.now, token, old);
        }
        assert!(told(&mut shard).is_empty());
        let token = shard.token();
        shard.engine.put_commit(shard.now, token, new);
        assert_eq!(told(&mut shard), [waiting]);
    }
}
