//! The contract of payload that is placed in memory beside the stream: what holds for payload that is
//! sent, and that nothing is written outside of its place, nor after its end.

mod harness;

use harness::{Bytes, Got, Kind, Pair, Random, check_all_with_places, frame, pattern, place};
use kvar_io::SharedMemory;
use kvar_io::region::Slot;
use kvar_transport::shared::{Meeting, MeetingRefused, offer_places};
use kvar_transport::{DownReason, SendRefused};

const LENGTHS: [usize; 12] = [
    1,
    2,
    63,
    64,
    65,
    4_095,
    4_096,
    4_097,
    65_536,
    65_537,
    1 << 20,
    16 << 20,
];

/// All that stands between slots in these tests, and must stay there.
const CANARY: u8 = 0xa5;

/// Beside every slot of the test.
fn assert_rests(canaries: &[Slot]) {
    let alive = canaries
        .iter()
        .all(|slot| slot.iter().all(|it| *it == CANARY));
    assert!(alive, "something was written beside a place");
}

#[test]
fn what_is_placed_is_there_whole_at_every_length_and_nothing_beside_it() {
    check_all_with_places(|kind| {
        let (mut pair, region) = Pair::with_places(kind, 20 << 20);
        let mut before = region.take(4096).unwrap();
        before.fill(CANARY);
        for (n, len) in LENGTHS.into_iter().enumerate() {
            if kind.is_slow() && len > 1 << 20 {
                continue;
            }
            let token = n as u64;
            let mut slot = region.take(len).unwrap();
            slot.fill(0xee);
            let mut behind = region.take(4096).unwrap();
            behind.fill(CANARY);
            let bytes = pattern(token, len);
            // In pieces, as sections are.
            let source = Bytes::cut(&bytes, &[len / 3, 0, len / 3]);
            let head = frame(b"placed", 0);
            pair.a.push_placed(&head, token, source, slot.at()).unwrap();
            assert_eq!(pair.b_frame(), (b"placed".to_vec(), 0));
            assert!(slot[..] == bytes[..], "{len} bytes");
            assert_eq!(pair.a_sent(), (token, bytes));
            assert_rests(&[behind]);
        }
        assert_rests(&[before]);
    });
}

/// Questions one way, answers that were placed the other, among some whose payload is sent.
#[test]
fn every_depth_from_1_to_256_is_placed_and_answered_in_order() {
    check_all_with_places(|kind| {
        for depth in [1, 2, 3, 16, 64, 256] {
            let (mut pair, region) = Pair::with_places(kind, 256 * 12_288);
            let count = if kind.is_slow() { 20 } else { 3 * depth };
            let len = |number: u64| (number as usize * 7_919) % 9_000 + 1;
            let is_placed = |number: u64| number % 5 != 3;
            let mut slots = std::collections::HashMap::new();
            let (mut asked, mut answered, mut served) = (0_u64, 0_u64, 0_u64);
            while answered < count {
                while asked < count && asked - answered < depth {
                    let slot = region.take(len(asked)).unwrap();
                    let at = (slot.at() as u64).to_le_bytes();
                    slots.insert(asked, slot);
                    pair.b.send(&frame(&at, 0)).unwrap();
                    asked += 1;
                }
                pair.turn();
                for got in std::mem::take(&mut pair.got_a) {
                    match got {
                        Got::Frame(message, 0) => {
                            let at = u64::from_le_bytes(message.try_into().unwrap()) as usize;
                            let source = Bytes::whole(pattern(served, len(served)));
                            let number = served.to_le_bytes();
                            if is_placed(served) {
                                let head = frame(&number, 0);
                                pair.a.push_placed(&head, served, source, at).unwrap();
                            } else {
                                let head = frame(&number, len(served));
                                pair.a.push(&head, served, source).unwrap();
                            }
                            served += 1;
                        }
                        Got::Sent(..) | Got::Yield => {}
                        other => panic!("{other:?}"),
                    }
                }
                for got in std::mem::take(&mut pair.got_b) {
                    match got {
                        Got::Frame(number, payload) => {
                            assert_eq!(number, answered.to_le_bytes());
                            if payload > 0 {
                                pair.b.pull(answered, Bytes::room(&[payload])).unwrap();
                                continue;
                            }
                            let slot = slots.remove(&answered).unwrap();
                            assert!(slot[..] == pattern(answered, len(answered))[..]);
                            answered += 1;
                        }
                        Got::Received(number, bytes) => {
                            assert_eq!((number, bytes), (answered, pattern(number, len(number))));
                            slots.remove(&answered).unwrap();
                            answered += 1;
                        }
                        Got::Sent(..) | Got::Yield => {}
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
    });
}

/// Sources are taken back at any moment: what was not told is not written any more after that, and
/// what was told is there.
#[test]
fn a_fence_at_any_moment_ends_the_writing() {
    check_all_with_places(|kind| {
        let (seeds, largest) = if kind.is_slow() {
            (2, 2_000)
        } else {
            (12, 300_000)
        };
        for seed in 0..seeds {
            let mut random = Random::of(seed);
            let (mut pair, region) = Pair::with_places(kind, 16 << 20);
            let mut open = Vec::new();
            for token in 0..24 {
                let len = 1 + random.below(largest) as usize;
                let mut slot = region.take(len).unwrap();
                slot.fill(0xee);
                let source = Bytes::whole(pattern(token, len));
                let head = frame(&token.to_le_bytes(), 0);
                pair.a.push_placed(&head, token, source, slot.at()).unwrap();
                open.push((token, slot));
                // A bit at a time, so that a fence finds copies that have begun.
                let mut budget = 1 + random.below(largest) as usize;
                let _ = pair.a.poll(&mut budget);
                if random.below(3) == 0 {
                    let index = random.below(open.len() as u64) as usize;
                    let (token, mut slot) = open.swap_remove(index);
                    if let Some(fenced) = pair.a.fence_push(token)
                        && fenced.unsent
                    {
                        slot.fill(CANARY);
                        pair.turn();
                        pair.turn();
                        assert_rests(&[slot]);
                    } else {
                        open.push((token, slot)); // its frame comes
                    }
                }
                if random.below(4) == 0 {
                    pair.turn();
                }
            }
            pair.a.send(&frame(b"last", 0)).unwrap();
            loop {
                let (message, _) = pair.b_frame();
                if message == b"last" {
                    break;
                }
                let told = u64::from_le_bytes(message.try_into().unwrap());
                let index = open.iter().position(|(token, _)| *token == told);
                let (token, slot) = open.swap_remove(index.expect("no frame of a fenced one"));
                assert!(slot[..] == pattern(token, slot.len())[..]);
            }
            assert!(open.is_empty(), "{kind:?} {seed}");
        }
    });
}

#[test]
fn a_link_that_goes_down_gives_everything_back_and_writes_no_more() {
    check_all_with_places(|kind| {
        let (mut pair, region) = Pair::with_places(kind, 8 << 20);
        let mut slots = Vec::new();
        for token in 0..4 {
            let mut slot = region.take(1 << 20).unwrap();
            slot.fill(0xee);
            let source = Bytes::whole(pattern(token, slot.len()));
            pair.a
                .push_placed(&frame(b"", 0), token, source, slot.at())
                .unwrap();
            slots.push(slot);
        }
        // Some of it is written.
        let _ = pair.a.poll(&mut 100_000);
        pair.a.close();
        slots.iter_mut().for_each(|slot| slot.fill(CANARY));
        pair.turn_a();
        pair.turn_a();
        let back = |got: &Got| matches!(got, Got::ReturnedSource(_) | Got::Sent(..));
        assert_eq!(pair.got_a.iter().filter(|got| back(got)).count(), 4);
        assert!(matches!(
            pair.got_a.back(),
            Some(Got::Down(DownReason::Local))
        ));
        assert_rests(&slots);
        assert_eq!(pair.a.outgoing_bytes(), 0);
        let refused = pair
            .a
            .push_placed(&frame(b"", 0), 9, Bytes::whole(vec![1]), 0);
        assert_eq!(refused.unwrap_err().why, SendRefused::Down);
    });
}

/// A reader that does not read holds up what is told, and so what is placed: both are bounded.
#[test]
fn what_is_placed_counts_as_queued_until_it_is_told() {
    let (mut pair, region) = Pair::with_places(Kind::Shared(64 << 10), 64 << 20);
    let slot = region.take(1 << 20).unwrap();
    let mut pushed = 0;
    loop {
        let source = Bytes::whole(vec![7; 1 << 20]);
        let head = frame(&[0; 60_000], 0);
        match pair.a.push_placed(&head, pushed, source, slot.at()) {
            Ok(()) => pushed += 1,
            Err(refused) => {
                assert_eq!(refused.why, SendRefused::Full);
                break;
            }
        }
        let _ = pair.a.poll(&mut (4 << 20));
        assert!(pushed < 100, "nothing bounds it");
    }
    assert!(pair.a.outgoing_bytes() >= harness::OUTGOING_BYTES_MAX);
    for _ in 0..pushed {
        assert_eq!(pair.b_frame().0.len(), 60_000);
    }
    pair.turn();
    assert_eq!(pair.a.outgoing_bytes(), 0);
}

#[test]
fn a_large_block_is_placed_over_many_turns_of_which_none_is_long() {
    let (mut pair, region) = Pair::with_places(Kind::Shared(64 << 10), 16 << 20);
    let slot = region.take(16 << 20).unwrap();
    let bytes = pattern(3, slot.len());
    pair.a
        .push_placed(&frame(b"", 0), 1, Bytes::whole(bytes.clone()), slot.at())
        .unwrap();
    let mut turns = 0;
    while pair.a.outgoing_bytes() > 0 {
        let mut budget = 1 << 20;
        while !matches!(
            pair.a.poll(&mut budget),
            kvar_transport::Event::Yield | kvar_transport::Event::Idle
        ) {}
        turns += 1;
        assert!(turns < 100);
    }
    assert!(turns >= 16, "{turns} turns");
    assert!(pair.b_frame().0.is_empty());
    assert!(slot[..] == bytes[..]);
}

#[test]
#[should_panic(expected = "a place lies inside")]
fn a_place_outside_is_a_bug_of_the_caller() {
    let (mut pair, _region) = Pair::with_places(Kind::Shared(64 << 10), 1 << 20);
    let source = Bytes::whole(vec![1; 2]);
    let _ = pair.a.push_placed(&frame(b"", 0), 1, source, (1 << 20) - 1);
}

/// A reader that writes over its own memory meanwhile gets what it gets; the writer's sources and
/// its other readers see nothing of it.
#[test]
fn a_reader_that_scribbles_hurts_only_itself() {
    let (mut pair, region) = Pair::with_places(Kind::Shared(64 << 10), 4 << 20);
    let (mut honest, other) = Pair::with_places(Kind::Shared(64 << 10), 4 << 20);
    let scribbler = std::thread::scope(|scope| {
        let mut slot = region.take(1 << 20).unwrap();
        let at = slot.at();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = scope.spawn(move || {
            let mut rounds = 0;
            while stopped.try_recv().is_err() {
                slot.fill(0xbb);
                rounds += 1;
            }
            rounds
        });
        for round in 0..50 {
            let bytes = pattern(round, 1 << 20);
            let source = Bytes::whole(bytes.clone());
            pair.a
                .push_placed(&frame(b"", 0), round, source, at)
                .unwrap();
            let slot = other.take(1 << 20).unwrap();
            let source = Bytes::whole(bytes.clone());
            honest
                .a
                .push_placed(&frame(b"", 0), round, source, slot.at())
                .unwrap();
            assert_eq!(pair.b_frame().1, 0);
            // What was read from is as it was.
            assert_eq!(pair.a_sent(), (round, bytes.clone()));
            assert_eq!(honest.b_frame().1, 0);
            assert!(slot[..] == bytes[..]);
        }
        stop.send(()).unwrap();
        thread.join().unwrap()
    });
    assert!(scribbler > 0);
}

#[test]
fn places_that_were_not_sent_or_are_not_as_said_are_not_taken() {
    let memory = SharedMemory::create(1 << 20).unwrap();
    let (name, secret) = (place(), [3; 16]);
    let meeting = || Meeting::open(&name, secret).unwrap();
    assert!(matches!(
        meeting().take_places(1 << 20),
        Err(MeetingRefused::NotSent)
    ));
    let short = meeting();
    offer_places(&name, &secret, &memory).unwrap();
    let error = short.take_places(2 << 20).unwrap_err().to_string();
    assert!(error.contains("1048576 bytes were sent"), "{error}");
    let strange = meeting();
    offer_places(&name, &[4; 16], &memory).unwrap();
    assert!(strange.take_places(1 << 20).is_err(), "another's secret");
    assert!(matches!(
        offer_places(&place(), &secret, &memory),
        Err(MeetingRefused::Reach(_))
    ));
}
