//! More reads than the device takes: who waits is served in turn, and nobody is read for who has gone.

mod shard;

use kvar_base::{MissReason, Moment};
use kvar_engine::{Event, GetRequest, ReadHints, Touch};
use kvar_io::sim::{Fault, FaultKind, FaultOn};
use shard::{Shard, config, id};
use std::time::Duration;

/// Reads that the device is given at once, as the engine's page says.
const AT_DEVICE: u64 = 256;
const LEN: usize = 4096;

/// A shard with so many blocks of one page, all of them on the device alone.
fn with_blocks(count: u64) -> Shard {
    // The index is made for blocks of four pages: with room, so that none displaces another.
    let mut shard = Shard::new((64 << 20).max(count * 40 * 1024), config());
    for number in 0..count {
        shard.put(number, &[LEN], kvar_engine::PutHints::default());
    }
    shard.settle();
    let shard = shard.restart();
    assert_eq!(shard.status().flash_blocks, count);
    shard
}

fn ask(shard: &mut Shard, asker: u64, number: u64, deadline: Moment) {
    let request = GetRequest {
        id: id(number),
        sections: None,
        deadline,
        touch: Touch::default(),
    };
    // Tokens are numbers of blocks here: each is asked for once.
    let hints = ReadHints {
        asker,
        ..ReadHints::default()
    };
    shard.engine.get(shard.now, number, request, hints);
}

/// Turns until the device holds as many reads as it is given, and answers none.
fn fill_device(shard: &mut Shard) {
    for _ in 0..1000 {
        shard.engine.turn(shard.now);
    }
    assert_eq!(shard.disk.stuck() as u64, AT_DEVICE);
}

/// Turns until `count` reads have been answered: token and how it ended, in order.
fn answers(shard: &mut Shard, count: u64) -> Vec<(u64, Result<(), MissReason>)> {
    let mut answers = Vec::new();
    for _ in 0..100_000 {
        for event in shard.hear() {
            if let Event::Get { token, outcome } = event {
                answers.push((token, outcome.map(|_| ())));
            }
        }
        if answers.len() as u64 >= count {
            return answers;
        }
        shard.leap(Duration::from_micros(100));
        shard.engine.turn(shard.now);
    }
    panic!("{} of {count} reads were answered", answers.len());
}

#[test]
fn a_slow_device_reads_nothing_for_who_has_given_up() {
    const COUNT: u64 = 600;
    let mut shard = with_blocks(COUNT + 1);
    let before = shard.counters();
    shard
        .disk
        .inject(Fault::always(FaultKind::Stuck, FaultOn::Read));
    let soon = shard.now.after(Duration::from_millis(50));
    for number in 0..COUNT {
        ask(&mut shard, 1, number, soon);
    }
    // One who has time comes last.
    ask(&mut shard, 2, COUNT, Moment(u64::MAX));
    fill_device(&mut shard);
    shard.leap(Duration::from_secs(1));
    shard.disk.clear_faults();
    shard.disk.release_stuck();
    let mut answers = answers(&mut shard, COUNT + 1);
    answers.sort_unstable_by_key(|(token, _)| *token);
    for (token, outcome) in answers {
        let expected = match token {
            // Under way when the deadline passed: the bytes are there, and whoever asked decides.
            token if token < AT_DEVICE || token == COUNT => Ok(()),
            _ => Err(MissReason::Deadline),
        };
        assert_eq!(outcome, expected, "{token}");
    }
    let counters = shard.counters();
    assert_eq!(counters.overdue_at_device, COUNT - AT_DEVICE);
    assert_eq!(counters.reads_waited, COUNT - AT_DEVICE + 1);
    let read = counters.device_read_bytes - before.device_read_bytes;
    assert_eq!(read, (AT_DEVICE + 1) * LEN as u64);
    // What is asked for too late is not even looked for.
    let now = shard.now;
    ask(&mut shard, 1, 1, now);
    assert_eq!(shard.counters().overdue_at_call, 1);
    assert_eq!(shard.engine.in_flight(), 0);
}

#[test]
fn who_asks_for_one_block_does_not_wait_for_who_asks_for_a_thousand() {
    const FLOOD: u64 = 3000;
    let mut shard = with_blocks(FLOOD + 20);
    let end = Moment(u64::MAX);
    for number in 0..FLOOD {
        ask(&mut shard, 1, number, end);
    }
    for number in FLOOD..FLOOD + 20 {
        ask(&mut shard, number, number, end);
    }
    let answers = answers(&mut shard, FLOOD + 20);
    assert!(answers.iter().all(|(_, outcome)| outcome.is_ok()));
    // The device had its fill when they came; from then on every second read was theirs at least.
    let last = answers.iter().rposition(|(token, _)| *token >= FLOOD);
    let last = last.unwrap() as u64;
    assert!(last < 3 * AT_DEVICE, "the last of twenty was answer {last}");
}

#[test]
fn beyond_what_may_wait_the_flood_is_turned_away_and_nobody_else() {
    const FLOOD: u64 = 6000;
    let mut shard = with_blocks(FLOOD + 20);
    let end = Moment(u64::MAX);
    for number in 0..FLOOD {
        ask(&mut shard, 1, number, end);
    }
    for number in FLOOD..FLOOD + 20 {
        ask(&mut shard, 2, number, end);
    }
    let answers = answers(&mut shard, FLOOD + 20);
    let mut overloaded = 0;
    for (token, outcome) in answers {
        if token < FLOOD && outcome == Err(MissReason::Overloaded) {
            overloaded += 1;
        } else {
            assert_eq!(outcome, Ok(()), "{token}");
        }
    }
    assert_eq!(overloaded, FLOOD - AT_DEVICE - 4096 + 20);
    shard.settle();
    assert_eq!(shard.engine.bookkeeping(), 0);
}

#[test]
fn a_block_that_is_removed_while_its_reader_waits_is_a_miss() {
    let mut shard = with_blocks(AT_DEVICE + 2);
    shard
        .disk
        .inject(Fault::always(FaultKind::Stuck, FaultOn::Read));
    let end = Moment(u64::MAX);
    for number in 0..AT_DEVICE + 2 {
        ask(&mut shard, 1, number, end);
    }
    fill_device(&mut shard);
    shard.engine.remove(u64::MAX, &[id(AT_DEVICE)]);
    shard.disk.clear_faults();
    shard.disk.release_stuck();
    for (token, outcome) in answers(&mut shard, AT_DEVICE + 2) {
        let expected = match token {
            AT_DEVICE => Err(MissReason::Absent),
            _ => Ok(()),
        };
        assert_eq!(outcome, expected, "{token}");
    }
}

#[test]
fn of_reads_that_end_at_once_a_turn_takes_in_some_and_the_rest_is_not_lost() {
    const COUNT: u64 = 10;
    let mut shard = with_blocks(COUNT);
    shard
        .disk
        .inject(Fault::always(FaultKind::Stuck, FaultOn::Read));
    for number in 0..COUNT {
        ask(&mut shard, 1, number, Moment(u64::MAX));
    }
    for _ in 0..100 {
        shard.engine.turn(shard.now);
    }
    assert_eq!(shard.disk.stuck() as u64, COUNT);
    shard.disk.clear_faults();
    shard.disk.release_stuck();
    // Long after the last of them is over.
    shard.leap(Duration::from_secs(1));
    let mut answered = Vec::new();
    loop {
        // Two blocks of a page.
        let is_more = shard.engine.turn_some(shard.now, 2 * LEN as u64);
        let now: Vec<u64> = shard
            .hear()
            .into_iter()
            .filter_map(|event| match event {
                Event::Get { token, outcome } => outcome.is_ok().then_some(token),
                _ => None,
            })
            .collect();
        assert_eq!(now.len(), 2, "{answered:?}");
        answered.extend(now);
        let left = COUNT as usize - answered.len();
        assert_eq!((is_more, shard.engine.in_flight()), (left > 0, left));
        if !is_more {
            break;
        }
    }
    answered.sort_unstable();
    assert_eq!(answered, (0..COUNT).collect::<Vec<_>>());
}

/// Asks for the block behind those that the device reads, under a token of its own.
fn ask_for_last(shard: &mut Shard, asker: u64, token: u64, deadline: Moment) {
    let request = GetRequest {
        id: id(AT_DEVICE),
        sections: None,
        deadline,
        touch: Touch::default(),
    };
    let hints = ReadHints {
        asker,
        ..ReadHints::default()
    };
    shard.engine.get(shard.now, token, request, hints);
}

#[test]
fn who_has_given_up_makes_room_in_a_full_line_for_who_has_not() {
    const WAITING: u64 = 4096;
    let mut shard = with_blocks(AT_DEVICE + 1);
    shard
        .disk
        .inject(Fault::always(FaultKind::Stuck, FaultOn::Read));
    for number in 0..AT_DEVICE {
        ask(&mut shard, 1, number, Moment(u64::MAX));
    }
    fill_device(&mut shard);
    let soon = shard.now.after(Duration::from_millis(50));
    for token in 1000..1000 + WAITING {
        ask_for_last(&mut shard, 1, token, soon);
    }
    ask_for_last(&mut shard, 1, 1, Moment(u64::MAX));
    let full = shard.hear();
    assert!(
        matches!(
            full[..],
            [Event::Get {
                token: 1,
                outcome: Err(MissReason::Overloaded)
            }]
        ),
        "nobody has given up yet: {full:?}"
    );
    shard.leap(Duration::from_secs(1));
    ask_for_last(&mut shard, 1, 2, Moment(u64::MAX));
    let swept = shard.hear();
    assert_eq!(swept.len() as u64, WAITING);
    for event in swept {
        let Event::Get { outcome, .. } = event else {
            panic!("{event:?}")
        };
        assert_eq!(outcome.err(), Some(MissReason::Deadline));
    }
    assert_eq!(shard.counters().overdue_at_device, WAITING);
    shard.disk.clear_faults();
    shard.disk.release_stuck();
    let answers = answers(&mut shard, AT_DEVICE + 1);
    assert!(answers.contains(&(2, Ok(()))));
}

#[test]
fn what_was_written_is_taken_in_before_reads_that_were_over_first() {
    const COUNT: u64 = 10;
    let mut shard = with_blocks(COUNT);
    shard
        .disk
        .inject(Fault::always(FaultKind::Stuck, FaultOn::Read));
    for number in 0..COUNT {
        ask(&mut shard, 1, number, Moment(u64::MAX));
    }
    for _ in 0..100 {
        shard.engine.turn(shard.now);
    }
    shard
        .disk
        .inject(Fault::always(FaultKind::Stuck, FaultOn::Write));
    shard.put(COUNT, &[LEN], kvar_engine::PutHints::default());
    shard.leap(Duration::from_millis(200));
    for _ in 0..100 {
        shard.engine.turn(shard.now);
    }
    assert!(shard.disk.stuck() as u64 > COUNT, "the write is under way");
    shard.disk.clear_faults();
    shard.disk.release_stuck();
    shard.leap(Duration::from_secs(1));
    let mut reads = 0;
    for _ in 0..5 {
        assert!(shard.engine.turn_some(shard.now, 1));
        let is_read = |event: &Event| matches!(event, Event::Get { .. });
        reads += shard.hear().iter().filter(|event| is_read(event)).count();
    }
    assert_eq!(reads, 5);
    assert_eq!(shard.status().flash_blocks, COUNT + 1);
}

#[test]
fn the_device_reads_nothing_for_who_has_gone() {
    let mut shard = with_blocks(AT_DEVICE + 2);
    let before = shard.counters();
    shard
        .disk
        .inject(Fault::always(FaultKind::Stuck, FaultOn::Read));
    for number in 0..AT_DEVICE + 2 {
        ask(&mut shard, 1, number, Moment(u64::MAX));
    }
    fill_device(&mut shard);
    // One that waits for its turn, and one that has joined a read under way.
    let joined = 1 << 32;
    let request = GetRequest {
        id: id(0),
        sections: None,
        deadline: Moment(u64::MAX),
        touch: Touch::default(),
    };
    shard
        .engine
        .get(shard.now, joined, request, ReadHints::default());
    shard.engine.forget(shard.now, 1, AT_DEVICE, &id(AT_DEVICE));
    shard.engine.forget(shard.now, 0, joined, &id(0));
    let gone: Vec<u64> = shard
        .hear()
        .into_iter()
        .filter_map(|event| match event {
            Event::Get { token, outcome } => {
                assert_eq!(outcome.err(), Some(MissReason::Deadline));
                Some(token)
            }
            _ => None,
        })
        .collect();
    assert_eq!(gone, [AT_DEVICE, joined]);
    assert_eq!(shard.counters().overdue_at_device, 2);
    // Twice is no more than once.
    shard.engine.forget(shard.now, 1, AT_DEVICE, &id(AT_DEVICE));
    shard.disk.clear_faults();
    shard.disk.release_stuck();
    let answers = answers(&mut shard, AT_DEVICE + 1);
    assert!(answers.iter().all(|(_, outcome)| outcome.is_ok()));
    let read = shard.counters().device_read_bytes - before.device_read_bytes;
    assert_eq!(read, (AT_DEVICE + 1) * LEN as u64);
    shard.settle();
    assert_eq!(shard.engine.bookkeeping(), 0);
}
