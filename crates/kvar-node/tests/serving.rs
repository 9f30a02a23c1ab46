//! What a node promises its clients, asked in the bare protocol.

mod support;

use kvar_base::{BlockId, MissReason, PutOutcome, Refusal};
use kvar_wire::*;
use support::{Peer, bytes_of, config, key_of, start, until};

fn ids(count: usize) -> Vec<BlockId> {
    let key = kvar_base::NamespaceKey::new([9; 32]);
    (0..count)
        .map(|number| BlockId::from_name(&key, &format!("block {number}")))
        .collect()
}

#[test]
fn blocks_of_every_shape_come_back_from_every_shard() {
    for shards in [1, 3] {
        let dir = tempfile::tempdir().unwrap();
        let node = start(&config(dir.path(), shards));
        // Two links, so that with several shards both own and foreign blocks are asked for.
        let (mut one, mut other) = (Peer::greet(&node), Peer::greet(&node));
        let max = one.welcome.as_ref().unwrap().limits.block_bytes_max as usize;
        let lens = [1, 4095, 4096, 4097, 65_536, 65_537, max];
        for (id, len) in ids(lens.len()).into_iter().zip(lens) {
            let bytes = bytes_of(&id, len);
            assert_eq!(one.get(id), Err(MissReason::Absent));
            assert_eq!(
                one.put(id, &[&bytes], false),
                PutOutcome::Stored,
                "{len} bytes"
            );
            assert_eq!(other.put(id, &[&bytes], false), PutOutcome::Exists);
            assert!(other.get(id) == Ok(bytes), "{len} bytes");
        }
        // Sections with odd lengths; a range of them alone.
        let id = BlockId::new([200; 32]);
        let pieces: Vec<Vec<u8>> = (0..9).map(|n| bytes_of(&id, 1000 * n + 1)).collect();
        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        assert_eq!(other.put(id, &pieces, false), PutOutcome::Stored);
        assert!(one.get(id) == Ok(pieces.concat()));
        let part = GetItem {
            sections: Some(3..5),
            ..Peer::item(id)
        };
        assert!(one.get_item(part.clone()) == Ok(pieces[3..5].concat()));
        let wrong = |change: fn(&mut GetItem)| {
            let mut item = part.clone();
            change(&mut item);
            item
        };
        for item in [
            wrong(|item| item.sections = Some(8..10)),
            wrong(|item| item.sections = Some(4..4)),
            wrong(|item| item.sections = Some(std::ops::Range { start: 5, end: 3 })),
            wrong(|item| item.expected = Lengths::Equal(2, 77)),
        ] {
            assert_eq!(one.get_item(item), Err(MissReason::WrongFormat));
        }
        let item = wrong(|item| item.version = Some(1));
        assert_eq!(one.get_item(item), Err(MissReason::Version));
        node.shutdown();
        assert!(node.wait().defects.is_empty());
    }
}

#[test]
fn batches_answer_every_item_once_and_lookups_keep_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let mut peer = Peer::greet(&node);
    let ids = ids(100);
    for id in ids.iter().filter(|id| **id != ids[40]) {
        assert_eq!(
            peer.put(*id, &[&bytes_of(id, 5000)], false),
            PutOutcome::Stored
        );
    }
    let request = peer.number();
    peer.send(
        request,
        &Peer::get_message(ids.iter().map(|id| Peer::item(*id)).collect()),
    );
    let mut answered = vec![0; ids.len()];
    for _ in &ids {
        let (_, message, payload) = peer.receive();
        let Message::GetAnswer(answer) = message else {
            panic!("{message:?}")
        };
        let index = usize::from(answer.item);
        answered[index] += 1;
        match answer.outcome {
            GetOutcome::Hit { .. } => assert!(payload == bytes_of(&ids[index], 5000)),
            GetOutcome::Placed { .. } => panic!("nothing was to be placed"),
            GetOutcome::Miss(reason) => assert_eq!((index, reason), (40, MissReason::Absent)),
        }
    }
    assert!(answered.iter().all(|count| *count == 1));

    let lookup = |leading_only| Lookup {
        ids: ids.clone(),
        leading_only,
        first_depth: 0,
        touch_request: 1,
        deadline_us: 10_000_000,
    };
    let leading = LookupAnswer::Leading(40, Some(MissReason::Absent));
    assert_eq!(peer.ask(&lookup(true)), Message::LookupAnswer(leading));
    let Message::LookupAnswer(LookupAnswer::Each(bits)) = peer.ask(&lookup(false)) else {
        panic!("a bitmap")
    };
    let bits = bits.bits(ids.len());
    assert!(
        bits.iter()
            .enumerate()
            .all(|(index, present)| *present == (index != 40))
    );
}

#[test]
fn remove_flush_purge_and_stat_do_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let mut peer = Peer::greet(&node);
    let ids = ids(10);
    for id in &ids {
        assert_eq!(
            peer.put(*id, &[&bytes_of(id, 9000)], true),
            PutOutcome::Stored
        );
    }
    let deadline_us = 10_000_000;
    let stat = peer.ask(&Stat {
        id: ids[0],
        deadline_us,
    });
    let Message::StatAnswer(StatAnswer { stat: Ok(stat) }) = stat else {
        panic!("{stat:?}")
    };
    assert!(stat.in_dram && stat.bytes >= 9000);
    let remove = Remove {
        ids: ids[..4].to_vec(),
        deadline_us,
    };
    let removed = RemoveAnswer {
        finished: Finished::Done(4),
    };
    assert_eq!(peer.ask(&remove), Message::RemoveAnswer(removed));
    let flushed = FlushAnswer {
        finished: Finished::Done(0),
    };
    assert_eq!(
        peer.ask(&Flush { deadline_us }),
        Message::FlushAnswer(flushed)
    );
    assert_eq!(peer.get(ids[0]), Err(MissReason::Absent));
    let purged = PurgeAnswer {
        finished: Finished::Done(6),
    };
    assert_eq!(
        peer.ask(&Purge { deadline_us }),
        Message::PurgeAnswer(purged)
    );
    assert_eq!(peer.get(ids[9]), Err(MissReason::Absent));
    let gone = StatAnswer {
        stat: Err(MissReason::Absent),
    };
    assert_eq!(
        peer.ask(&Stat {
            id: ids[9],
            deadline_us
        }),
        Message::StatAnswer(gone)
    );
    let Message::StatusAnswer(status) = peer.ask(&Status {}) else {
        panic!("a status")
    };
    let status: serde_json::Value = serde_json::from_str(&status.json).unwrap();
    assert_eq!(status["links"]["puts"]["stored"], 10);
    assert_eq!(status["shards"].as_array().unwrap().len(), 2);
    assert_eq!(peer.ask(&Ping {}), Message::Pong(Pong {}));
}

#[test]
fn a_deadline_of_zero_has_passed() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let mut peer = Peer::greet(&node);
    let id = ids(1)[0];
    let bytes = bytes_of(&id, 100);
    let request = peer.number();
    let put = Put {
        deadline_us: 0,
        ..Peer::put_message(id, &[&bytes], false)
    };
    peer.send_with(request, &put, &bytes);
    let refused = PutAnswer {
        outcome: PutOutcome::Refused(Refusal::Deadline),
    };
    assert_eq!(peer.receive().1, Message::PutAnswer(refused));
    let request = peer.number();
    peer.send(
        request,
        &Get {
            deadline_us: 0,
            ..Peer::get_message(vec![Peer::item(id); 3])
        },
    );
    for item in 0..3 {
        let outcome = GetOutcome::Miss(MissReason::Deadline);
        assert_eq!(
            peer.receive().1,
            Message::GetAnswer(GetAnswer { item, outcome })
        );
    }
    let finished = Finished::Deadline;
    let flush = peer.ask(&Flush { deadline_us: 0 });
    assert_eq!(flush, Message::FlushAnswer(FlushAnswer { finished }));
    assert_eq!(
        peer.put(id, &[&bytes], false),
        PutOutcome::Stored,
        "the link lives on"
    );
}

#[test]
fn a_put_that_never_sends_its_bytes_ends_and_leaves_room_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let (mut slow, mut other) = (Peer::greet(&node), Peer::greet(&node));
    let id = ids(1)[0];
    let bytes = bytes_of(&id, 200_000);
    let request = slow.number();
    let put = Put {
        deadline_us: 100_000,
        ..Peer::put_message(id, &[&bytes], false)
    };
    slow.send(request, &put);
    assert!(matches!(slow.receive().1, Message::Pull(_)));
    assert_eq!(other.put(id, &[&bytes], false), PutOutcome::InProgress);
    assert_eq!(
        other.get(id),
        Err(MissReason::Absent),
        "filling is not visible"
    );
    let refused = PutAnswer {
        outcome: PutOutcome::Refused(Refusal::Deadline),
    };
    assert_eq!(slow.receive().1, Message::PutAnswer(refused));
    // What still comes is drained, and the link goes on.
    slow.send_with(request, &Payload {}, &bytes);
    assert_eq!(other.put(id, &[&bytes], false), PutOutcome::Stored);
    assert!(slow.get(id) == Ok(bytes));

    // The same by a link that dies in the middle of its payload.
    let id = BlockId::new([3; 32]);
    let bytes = bytes_of(&id, 250_000);
    let mut dying = Peer::greet(&node);
    let request = dying.number();
    dying.send(request, &Peer::put_message(id, &[&bytes], false));
    assert!(matches!(dying.receive().1, Message::Pull(_)));
    let mut head = Vec::new();
    encode(
        &mut head,
        request,
        kvar_base::MapEpoch::SINGLE_NODE,
        &Payload {},
        bytes.len(),
    )
    .unwrap();
    std::io::Write::write_all(&mut dying.stream, &head).unwrap();
    std::io::Write::write_all(&mut dying.stream, &bytes[..100_000]).unwrap();
    drop(dying);
    until("the id is free again", || {
        match other.put(id, &[&bytes], false) {
            PutOutcome::Stored => true,
            PutOutcome::InProgress => false,
            outcome => panic!("{outcome:?}"),
        }
    });
    assert!(other.get(id) == Ok(bytes));
}

#[test]
fn a_cancel_ends_a_request_and_frees_its_number() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let mut peer = Peer::greet(&node);
    let id = ids(1)[0];
    let bytes = bytes_of(&id, 100_000);
    let request = peer.number();
    peer.send(request, &Peer::put_message(id, &[&bytes], false));
    assert!(matches!(peer.receive().1, Message::Pull(_)));
    peer.send(request, &Cancel {});
    assert_eq!(peer.ask(&Ping {}), Message::Pong(Pong {}));
    assert_eq!(
        peer.put(id, &[&bytes], false),
        PutOutcome::Stored,
        "the block is free again"
    );
    peer.send(999, &Cancel {});
    assert!(peer.get(id) == Ok(bytes), "a cancel of nothing is nothing");
}

#[test]
fn a_reader_that_does_not_read_holds_back_itself_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 1);
    config.set("link_budget", "16MiB").unwrap();
    config.set("link_requests", "600").unwrap();
    let node = start(&config);
    let (mut stuck, mut other) = (Peer::greet(&node), Peer::greet(&node));
    let ids = ids(8);
    for id in &ids {
        assert_eq!(
            other.put(*id, &[&bytes_of(id, 250_000)], false),
            PutOutcome::Stored
        );
    }
    // 150 MB asked for, nothing read: only the budget of them is under way.
    let items: Vec<GetItem> = (0..600).map(|n| Peer::item(ids[n % ids.len()])).collect();
    let request = stuck.number();
    stuck.send(request, &Peer::get_message(items));
    for id in &ids {
        assert!(other.get(*id) == Ok(bytes_of(id, 250_000)));
    }
    for _ in 0..600 {
        let (_, message, payload) = stuck.receive();
        let Message::GetAnswer(answer) = message else {
            panic!("{message:?}")
        };
        let id = &ids[usize::from(answer.item) % ids.len()];
        assert!(payload == bytes_of(id, 250_000));
    }
    // One more than it may have open is turned away, not queued.
    let request = stuck.number();
    stuck.send(request, &Peer::get_message(vec![Peer::item(ids[0]); 601]));
    for _ in 0..601 {
        let outcome = GetOutcome::Miss(MissReason::Overloaded);
        assert!(
            matches!(stuck.receive().1, Message::GetAnswer(answer) if answer.outcome == outcome)
        );
    }
}

#[test]
fn what_was_acknowledged_survives_a_clean_stop() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 2);
    // So long that only the stop itself can have written them.
    config.set("flush_after", "1h").unwrap();
    let node = start(&config);
    let key = key_of(&node);
    let mut peer = Peer::greet(&node);
    let ids = ids(200);
    for id in &ids {
        assert_eq!(
            peer.put(*id, &[&bytes_of(id, 20_000)], false),
            PutOutcome::Stored
        );
    }
    node.shutdown();
    let failure = peer.failure();
    assert_eq!(failure.code, FailureCode::ShuttingDown);
    let stop = node.wait();
    assert_eq!(
        (stop.kept_blocks, stop.dropped_blocks, stop.checkpointed),
        (200, 0, true)
    );

    config.size = None;
    config.shards = None;
    let node = start(&config);
    assert_eq!(key_of(&node), key);
    let mut peer = Peer::greet(&node);
    for id in &ids {
        assert!(peer.get(*id) == Ok(bytes_of(id, 20_000)));
    }
}
