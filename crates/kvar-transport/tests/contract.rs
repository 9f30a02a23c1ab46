//! The contract of a link, over every kind of stream: what holds for TCP holds for the simulated
//! one and will have to hold for what comes.

mod harness;

use harness::{Bytes, Got, Kind, Pair, Random, check_all, frame, pattern};
use kvar_transport::{Armed, DownReason, PushRefused, SendRefused};

/// Lengths around every border: one byte, the read-ahead, a page, a socket's buffer, the maximum.
const LENGTHS: [usize; 12] = [
    1,
    2,
    39,
    40,
    41,
    4_055,
    4_056,
    4_097,
    65_536,
    65_537,
    1 << 20,
    16 << 20,
];

#[test]
fn payload_arrives_whole_at_every_length() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        for (n, len) in LENGTHS.into_iter().enumerate() {
            if kind.is_slow() && len > 1 << 20 {
                continue;
            }
            let token = n as u64;
            let bytes = pattern(token, len);
            pair.a
                .push(&frame(b"payload", len), token, Bytes::whole(bytes.clone()))
                .unwrap();
            let message = pair.b_frame();
            assert_eq!(message, (b"payload".to_vec(), len));
            pair.b.pull(token, Bytes::room(&[len])).unwrap();
            assert_eq!(pair.b_received(), (token, bytes.clone()));
            assert_eq!(pair.a_sent(), (token, bytes));
        }
    });
}

#[test]
fn a_payload_of_no_length_is_a_frame_and_its_source_comes_back() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        for (token, pieces) in [&[][..], &[0][..], &[0, 0, 0][..]].into_iter().enumerate() {
            let token = token as u64;
            pair.a
                .push(&frame(b"empty", 0), token, Bytes::cut(b"", pieces))
                .unwrap();
            assert_eq!(pair.b_frame(), (b"empty".to_vec(), 0));
            assert_eq!(pair.a_sent(), (token, Vec::new()));
            // There is nothing to receive, so nothing is taken.
            assert!(pair.b.pull(9, Bytes::room(&[])).is_err());
        }
        pair.a.send(&frame(b"next", 0)).unwrap();
        assert_eq!(pair.b_frame().0, b"next");
    });
}

/// Questions one way, payload the other, as gets are; never more under way than there are credits.
#[test]
fn every_depth_from_1_to_256_is_answered_in_order() {
    check_all(|kind| {
        for depth in [1, 2, 3, 16, 64, 256] {
            let mut pair = Pair::new(kind);
            let count = if kind.is_slow() { 20 } else { 3 * depth };
            let len = |number: u64| (number as usize * 7_919) % 9_000 + 1;
            let (mut asked, mut answered, mut served) = (0_u64, 0_u64, 0_u64);
            while answered < count {
                while asked < count && asked - answered < depth {
                    pair.a.send(&frame(&asked.to_le_bytes(), 0)).unwrap();
                    asked += 1;
                }
                pair.turn();
                for got in std::mem::take(&mut pair.got_b) {
                    match got {
                        Got::Frame(message, 0) => {
                            let number = u64::from_le_bytes(message.try_into().unwrap());
                            assert_eq!(number, served);
                            served += 1;
                            let source = Bytes::whole(pattern(number, len(number)));
                            let head = frame(b"", len(number));
                            pair.b.push(&head, number, source).unwrap();
                        }
                        Got::Sent(..) | Got::Yield => {}
                        other => panic!("{other:?}"),
                    }
                }
                for got in std::mem::take(&mut pair.got_a) {
                    match got {
                        Got::Frame(_, bytes) => {
                            assert_eq!(bytes, len(answered));
                            pair.a.pull(answered, Bytes::room(&[bytes])).unwrap();
                        }
                        Got::Received(number, bytes) => {
                            assert_eq!((number, bytes), (answered, pattern(number, len(number))));
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

#[test]
fn scatter_lists_of_any_cut_arrive_whole() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        // Unaligned, empty pieces among them, and more pieces than one call takes.
        let cuts: [&[usize]; 5] = [
            &[1, 0, 3, 4096, 17],
            &[0, 0, 5],
            &[5000; 3],
            &[7; 500],
            &[4095, 1, 4097, 65_537, 3],
        ];
        for (n, from) in cuts.iter().enumerate() {
            for (m, to) in cuts.iter().enumerate() {
                let len: usize = from.iter().sum();
                let token = (n * 10 + m) as u64;
                let bytes = pattern(token, len);
                pair.a
                    .push(&frame(b"x", len), token, Bytes::cut(&bytes, from))
                    .unwrap();
                pair.b_frame();
                // The other side's cut is made to fit by one last piece.
                let mut room: Vec<usize> = Vec::new();
                for piece in *to {
                    let left = len - room.iter().sum::<usize>();
                    room.push((*piece).min(left));
                }
                room.push(len - room.iter().sum::<usize>());
                pair.b.pull(token, Bytes::room(&room)).unwrap();
                assert_eq!(pair.b_received(), (token, bytes), "{from:?} to {to:?}");
            }
        }
    });
}

#[test]
fn frames_without_payload_and_long_messages_keep_their_order() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        let messages: Vec<Vec<u8>> = (0..200_usize)
            .map(|n| pattern(n as u64, [0, 1, 30, 4_055, 4_096, 4_097, 30_000][n % 7]))
            .collect();
        for message in &messages {
            pair.a.send(&frame(message, 0)).unwrap();
        }
        for message in &messages {
            assert_eq!(pair.b_frame(), (message.clone(), 0));
        }
    });
}

#[test]
fn both_directions_at_once_with_many_in_flight() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        let count = if kind.is_slow() { 8 } else { 256 };
        for token in 0..count {
            let len = 1 + (token as usize * 2_654_435) % 70_000;
            let bytes = pattern(token, len);
            pair.a
                .push(&frame(b"a", len), token, Bytes::whole(bytes.clone()))
                .unwrap();
            pair.b
                .push(&frame(b"b", len), token, Bytes::whole(bytes))
                .unwrap();
        }
        let (mut at_a, mut at_b) = (0, 0);
        while at_a < count || at_b < count {
            pair.turn();
            for (got, next, link) in [
                (std::mem::take(&mut pair.got_a), &mut at_a, &mut pair.a),
                (std::mem::take(&mut pair.got_b), &mut at_b, &mut pair.b),
            ] {
                for got in got {
                    match got {
                        Got::Frame(_, len) => link.pull(*next, Bytes::room(&[len])).unwrap(),
                        Got::Received(token, bytes) => {
                            assert_eq!(token, *next);
                            assert_eq!(bytes, pattern(token, bytes.len()));
                            *next += 1;
                        }
                        Got::Sent(..) => {}
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
    });
}

#[test]
fn a_slow_reader_is_felt_and_bounded() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        let len = 1 << 20;
        let mut queued = 0;
        // The peer takes nothing: once the sockets are full the link's own bound says stop.
        let refused = loop {
            match pair
                .a
                .push(&frame(b"", len), queued, Bytes::whole(vec![1; len]))
            {
                Ok(()) => queued += 1,
                Err(PushRefused { why, source }) => {
                    assert_eq!(source.total(), len);
                    break why;
                }
            }
            pair.turn_a();
            assert!(queued < 64, "no bound felt");
        };
        assert_eq!(refused, SendRefused::Full);
        assert!(pair.a.outgoing_bytes() <= harness::OUTGOING_BYTES_MAX + len + 1024);
        if kind.is_slow() {
            return;
        }
        // It reads after all: everything arrives, in order, and the link takes frames again.
        for token in 0..queued {
            assert_eq!(pair.b_frame().1, len);
            pair.b.pull(token, Bytes::room(&[len])).unwrap();
            assert_eq!(pair.b_received().0, token);
        }
        pair.a.send(&frame(b"again", 0)).unwrap();
        assert_eq!(pair.b_frame().0, b"again");
    });
}

#[test]
fn a_paused_link_takes_no_frame_and_goes_on_later() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        pair.b.pause(true);
        pair.a.send(&frame(b"one", 0)).unwrap();
        for _ in 0..20 {
            pair.turn();
        }
        assert!(pair.got_b.is_empty());
        pair.b.pause(false);
        assert_eq!(pair.b_frame().0, b"one");
    });
}

/// A loop that told a link every turn that it was not paused never slept again.
#[test]
fn saying_again_that_a_link_is_not_paused_is_no_work() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        for _ in 0..20 {
            pair.turn();
        }
        pair.b.pause(false);
        assert_eq!(pair.b.arm(), Armed::Wait);
        pair.b.pause(true);
        assert_eq!(pair.b.arm(), Armed::Ready);
    });
}

#[test]
fn a_peer_that_dies_in_the_middle_of_a_frame_gives_everything_back() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        let len = 200_000;
        pair.a
            .push(&frame(b"half", len), 1, Bytes::whole(pattern(1, len)))
            .unwrap();
        pair.b_frame();
        pair.b.pull(2, Bytes::room(&[100_000, 100_000])).unwrap();
        // b waits for a payload and has something queued itself when a is gone.
        pair.b
            .push(&frame(b"mine", 3), 3, Bytes::whole(vec![1, 2, 3]))
            .unwrap();
        pair.kill_a();
        let mut returned = Vec::new();
        let reason = loop {
            pair.turn_b();
            match pair.got_b.pop_front() {
                Some(Got::ReturnedSink(token) | Got::ReturnedSource(token)) => returned.push(token),
                Some(Got::Received(token, _)) => returned.push(token), // all had arrived before
                Some(Got::Sent(token, _)) => returned.push(token),
                Some(Got::Down(reason)) => break reason,
                Some(other) => panic!("{other:?}"),
                None => {}
            }
        };
        returned.sort_unstable();
        assert_eq!(returned, [2, 3], "{kind:?} {reason}");
        assert_eq!(pair.b.send(&frame(b"", 0)), Err(SendRefused::Down));
    });
}

#[test]
fn closing_between_frames_is_told_from_cutting_one() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        pair.a.send(&frame(b"last words", 0)).unwrap();
        pair.a.finish();
        assert_eq!(pair.b_frame().0, b"last words");
        assert_eq!(pair.b_down(), DownReason::Closed);

        let mut pair = Pair::new(kind);
        let bytes = frame(b"cut", 0);
        pair.raw_into_b(&bytes[..bytes.len() - 1]);
        pair.finish_raw();
        assert_eq!(pair.b_down(), DownReason::Cut);
    });
}

#[test]
fn a_half_open_peer_blocks_nobody_and_buffers_come_back_by_fence() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        let len = 8 << 20;
        pair.silence();
        pair.a
            .push(&frame(b"in vain", len), 1, Bytes::whole(pattern(1, len)))
            .unwrap();
        pair.a
            .push(&frame(b"behind it", 4), 2, Bytes::whole(vec![0; 4]))
            .unwrap();
        for _ in 0..50 {
            pair.turn_a();
        }
        assert!(pair.got_a.iter().all(|got| !matches!(got, Got::Down(_))));
        assert_eq!(
            pair.a.fence_push(1).unwrap().source.bytes(),
            pattern(1, len)
        );
        assert!(pair.a.fence_push(2).unwrap().unsent);
        assert!(pair.a.fence_push(2).is_none());
    });
}

#[test]
fn a_fenced_sink_is_never_written_again() {
    check_all(|kind| {
        for round in 0..20_usize {
            let mut pair = Pair::new(kind);
            let len = 30_000 + round;
            pair.a
                .push(&frame(b"late", len), 1, Bytes::whole(pattern(1, len)))
                .unwrap();
            pair.b_frame();
            pair.b.pull(1, Bytes::room(&[len])).unwrap();
            // Let the payload be on its way, further each round, then take the buffer back.
            for _ in 0..round {
                pair.turn();
            }
            let Some(sink) = pair.b.fence_pull(1) else {
                continue; // all had arrived
            };
            let mut canary = sink;
            canary.fill(0xcc);
            pair.a.send(&frame(b"next", 0)).unwrap();
            // The late payload is drained: the next frame is found behind it.
            assert_eq!(pair.b_frame().0, b"next");
            assert!(
                canary.bytes().iter().all(|byte| *byte == 0xcc),
                "{kind:?} round {round}"
            );
            assert!(pair.b.fence_pull(1).is_none());
        }
    });
}

#[test]
fn a_fenced_source_is_free_and_the_stream_stays_whole() {
    check_all(|kind| {
        for round in 0..30 {
            let mut pair = Pair::new(kind);
            let len = if kind.is_slow() { 2_000 } else { 3 << 20 };
            let bytes = pattern(1, len);
            pair.a
                .push(&frame(b"cut short", len), 1, Bytes::cut(&bytes, &[7, 900]))
                .unwrap();
            pair.a
                .push(&frame(b"second", 9), 2, Bytes::whole(pattern(2, 9)))
                .unwrap();
            for _ in 0..round {
                pair.turn_a();
            }
            let Some(mut fenced) = pair.a.fence_push(1) else {
                continue;
            };
            // Whoever has the source back may change it; what was begun arrives as it was.
            fenced.source.fill(0);
            if !fenced.unsent {
                assert_eq!(pair.b_frame().0, b"cut short");
                pair.b.pull(1, Bytes::room(&[len])).unwrap();
                assert_eq!(pair.b_received(), (1, bytes), "{kind:?} round {round}");
            }
            assert_eq!(pair.b_frame(), (b"second".to_vec(), 9));
            pair.b.pull(2, Bytes::room(&[9])).unwrap();
            assert_eq!(pair.b_received(), (2, pattern(2, 9)));
        }
    });
}

#[test]
fn payload_that_nobody_wants_is_drained() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        let len = if kind.is_slow() { 5_000 } else { 5 << 20 };
        pair.a
            .push(&frame(b"unwanted", len), 1, Bytes::whole(pattern(1, len)))
            .unwrap();
        pair.a.send(&frame(b"wanted", 0)).unwrap();
        pair.b_frame();
        pair.b.discard();
        assert_eq!(pair.b_frame().0, b"wanted");
    });
}

#[test]
fn a_sink_of_another_length_is_given_back() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        assert_eq!(
            pair.b.pull(1, Bytes::room(&[5])).unwrap_err().payload_bytes,
            0
        );
        pair.a
            .push(&frame(b"five", 5), 1, Bytes::whole(vec![1; 5]))
            .unwrap();
        pair.b_frame();
        let refused = pair.b.pull(1, Bytes::room(&[6])).unwrap_err();
        assert_eq!((refused.payload_bytes, refused.sink.total()), (5, 6));
        pair.b.pull(1, Bytes::room(&[5])).unwrap();
        assert_eq!(pair.b_received(), (1, vec![1; 5]));
    });
}

#[test]
fn garbage_and_lengths_over_the_bound_end_the_link() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        pair.raw_into_b(&[0x55; 100]);
        let DownReason::Garbage(why) = pair.b_down() else {
            panic!("not called garbage")
        };
        assert_eq!(why, "no frame of this test");

        let mut pair = Pair::new(kind);
        pair.b.set_bounds(10, 10);
        pair.a.send(&frame(b"ten bytes.", 0)).unwrap();
        pair.a.send(&frame(b"eleven byte", 0)).unwrap();
        assert_eq!(pair.b_frame().0, b"ten bytes.");
        let DownReason::Garbage(why) = pair.b_down() else {
            panic!("not called garbage")
        };
        assert_eq!(why, "a message of 11 bytes where at most 10 may come");
    });
}

#[test]
fn no_turn_moves_much_more_than_its_budget() {
    check_all(|kind| {
        let mut pair = Pair::new(kind);
        for token in 0..16 {
            pair.a
                .push(&frame(b"", 65_536), token, Bytes::whole(vec![3; 65_536]))
                .unwrap();
        }
        let (mut received, mut yields) = (0, 0);
        while received < 16 {
            pair.turn_a();
            pair.ready_b();
            let mut budget = 20_000;
            loop {
                match pair.poll_b(&mut budget) {
                    Some(Got::Frame(_, len)) => pair.b.pull(1, Bytes::room(&[len])).unwrap(),
                    Some(Got::Received(..)) => received += 1,
                    Some(Got::Yield) => {
                        assert_eq!(pair.b.arm(), Armed::Ready);
                        yields += 1;
                        break;
                    }
                    Some(other) => panic!("{other:?}"),
                    None => break,
                }
            }
        }
        assert!(
            yields > 0 || kind == Kind::Bytewise,
            "{kind:?} never yielded"
        );
    });
}

/// Sources and sinks are taken back at any moment, on both sides; what was not taken back arrives, in
/// order and whole, and a sink that came back is never written again.
#[test]
fn fences_at_any_moment_leave_the_rest_whole() {
    check_all(|kind| {
        let rounds = if kind.is_slow() { 3 } else { 25 };
        for seed in 1..=rounds {
            let mut random = Random::of(seed);
            let mut draw = |below: u64| random.below(below);
            let mut pair = Pair::new(kind);
            let most = if kind.is_slow() { 300 } else { 150_000 };
            let count = 30;
            let lengths: Vec<usize> = (0..count).map(|_| 1 + draw(most) as usize).collect();
            let (mut pushed, mut next_frame) = (0, 0_u64);
            // Payload by payload: taken back unsent, or to come.
            let mut unsent = vec![false; count as usize];
            let mut returned: Vec<Bytes> = Vec::new();
            let mut receiving: Option<u64> = None;
            let mut idle_turns = 0;
            // A byte a turn is progress that is not seen here.
            let still = if kind.is_slow() { 3_000 } else { 50 };
            while idle_turns < still {
                if pushed < count && draw(2) == 0 {
                    let bytes = pattern(pushed, lengths[pushed as usize]);
                    let head = frame(&pushed.to_le_bytes(), bytes.len());
                    pair.a.push(&head, pushed, Bytes::whole(bytes)).unwrap();
                    pushed += 1;
                }
                if pushed > 0 && draw(4) == 0 {
                    let token = draw(pushed);
                    if let Some(mut fenced) = pair.a.fence_push(token) {
                        unsent[token as usize] = fenced.unsent;
                        fenced.source.fill(0);
                    }
                }
                if draw(2) == 0 {
                    pair.turn_a();
                }
                if draw(2) == 0 {
                    pair.turn_b();
                }
                if let Some(token) = receiving
                    && draw(6) == 0
                    && let Some(mut sink) = pair.b.fence_pull(token)
                {
                    sink.fill(0xcc);
                    returned.push(sink);
                    receiving = None;
                }
                pair.got_a.clear();
                let got = std::mem::take(&mut pair.got_b);
                idle_turns = if got.is_empty() && pushed == count {
                    idle_turns + 1
                } else {
                    0
                };
                for got in got {
                    match got {
                        Got::Frame(message, len) => {
                            let token = u64::from_le_bytes(message.try_into().unwrap());
                            while unsent[next_frame as usize] {
                                next_frame += 1;
                            }
                            assert_eq!(token, next_frame, "{kind:?} seed {seed}");
                            assert_eq!(len, lengths[token as usize]);
                            next_frame += 1;
                            if draw(5) == 0 {
                                pair.b.discard();
                            } else {
                                pair.b
                                    .pull(token, Bytes::room(&[len / 2, len - len / 2]))
                                    .unwrap();
                                receiving = Some(token);
                            }
                        }
                        Got::Received(token, bytes) => {
                            assert_eq!(bytes, pattern(token, bytes.len()), "{kind:?} seed {seed}");
                            receiving = None;
                        }
                        Got::Yield => {}
                        other => panic!("{other:?}"),
                    }
                }
            }
            while next_frame < count && unsent[next_frame as usize] {
                next_frame += 1;
            }
            assert_eq!(
                next_frame, count,
                "{kind:?} seed {seed}: a payload is missing"
            );
            for sink in returned {
                let bytes = sink.bytes();
                assert!(
                    bytes.iter().all(|byte| *byte == 0xcc),
                    "{kind:?} seed {seed}"
                );
            }
        }
    });
}

#[test]
fn a_link_that_broke_is_followed_by_one_that_knows_nothing_of_it() {
    check_all(|kind| {
        for round in 0..3 {
            let mut pair = Pair::new(kind);
            let len = 3_000;
            let head = frame(b"half", len);
            pair.a
                .push(&head, 1, Bytes::whole(pattern(round, len)))
                .unwrap();
            pair.b_frame();
            pair.b.pull(1, Bytes::room(&[len])).unwrap();
            pair.kill_a();
            let reason = loop {
                pair.turn_b();
                if let Some(Got::Down(reason)) = pair.got_b.pop_front() {
                    break reason;
                }
            };
            assert!(
                matches!(
                    reason,
                    DownReason::Cut | DownReason::Closed | DownReason::Broken(_)
                ),
                "{kind:?}: {reason}"
            );
        }
    });
}
