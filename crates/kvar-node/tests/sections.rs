//! Puts section by section as a peer may do them that is not ours: what does not fit ends its link, leaves
//! nothing behind, and disturbs nobody else.

mod support;

use kvar_base::{BlockId, ContentCheck, MissReason, PutOutcome, Refusal};
use kvar_node::NodeHandle;
use kvar_wire::*;
use serde_json::Value;
use support::{PATIENCE, Peer, config, http, start, until};

/// Bytes of blocks in memory, and of those that come in.
fn memory(node: &NodeHandle) -> u64 {
    let status: Value = serde_json::from_str(&http(node, "/v1/status").1).unwrap();
    let shards = status["shards"].as_array().unwrap().iter();
    let bytes = shards.map(|shard| shard["engine"]["dram_bytes"].as_u64().unwrap());
    bytes.sum()
}

const LENGTHS: [u32; 3] = [5000, 70_000, 1];

fn id(number: u8) -> BlockId {
    BlockId::new([number; 32])
}

fn announce(id: BlockId, lengths: &[u32]) -> Announce {
    Announce {
        id,
        lengths: lengths.to_vec(),
        hints: PutHints::default(),
        more_hints: MoreHints::default(),
        durable: false,
        // Longer than any test waits: what is free before it was not freed by it.
        deadline_us: 10 * PATIENCE.as_micros() as u64,
    }
}

fn bytes(section: usize) -> Vec<u8> {
    vec![section as u8 + 1; LENGTHS[section] as usize]
}

fn sections(id: BlockId, numbers: std::ops::Range<usize>) -> (Sections, Vec<u8>) {
    let check = |number| ContentCheck::of(&bytes(number), &id, number as u16);
    let body = Sections {
        first: numbers.start as u16,
        checks: numbers.clone().map(check).collect(),
    };
    (body, numbers.flat_map(bytes).collect())
}

impl Peer {
    /// Announces a block; its request, once the node waits for its sections.
    fn begin(&mut self, id: BlockId) -> u64 {
        let request = self.number();
        self.send(request, &announce(id, &LENGTHS));
        let (header, message, _) = self.receive();
        assert_eq!((header.request, message), (request, Pull {}.into()));
        request
    }

    fn bring(&mut self, request: u64, id: BlockId, numbers: std::ops::Range<usize>) {
        let (body, payload) = sections(id, numbers);
        self.send_with(request, &body, &payload);
    }

    fn outcome(&mut self, request: u64) -> PutOutcome {
        let (header, message, _) = self.receive();
        assert_eq!(header.request, request);
        let Message::PutAnswer(answer) = message else {
            panic!("{message:?}")
        };
        answer.outcome
    }
}

#[test]
fn sections_come_alone_or_together_and_are_a_block_at_the_commit() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let (mut peer, mut other) = (Peer::greet(&node), Peer::greet(&node));
    for (number, cuts) in [(1, vec![1, 2, 3]), (2, vec![3]), (3, vec![1, 3])] {
        let id = id(number);
        let request = peer.begin(id);
        assert_eq!(other.put(id, &[b"other"], false), PutOutcome::InProgress);
        let mut first = 0;
        for end in cuts {
            peer.bring(request, id, first..end);
            first = end;
            assert_eq!(other.get(id), Err(MissReason::Absent));
        }
        peer.send(request, &Commit {});
        assert_eq!(peer.outcome(request), PutOutcome::Stored);
        assert_eq!(other.get(id), Ok((0..3).flat_map(bytes).collect()));
        // It is there: no byte travels.
        let request = peer.number();
        peer.send(request, &announce(id, &LENGTHS));
        assert_eq!(peer.outcome(request), PutOutcome::Exists);
    }
    for (lengths, refusal) in [
        (vec![], Refusal::WrongFormat),
        (vec![0], Refusal::WrongFormat),
        (vec![7, 0], Refusal::WrongFormat),
        (vec![u32::MAX; 900], Refusal::TooBig),
    ] {
        let request = peer.number();
        peer.send(request, &announce(id(9), &lengths));
        assert_eq!(peer.outcome(request), PutOutcome::Refused(refusal));
    }
    node.shutdown();
    node.wait();
}

#[test]
fn bytes_that_are_not_what_was_said_are_refused_at_the_commit() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let mut peer = Peer::greet(&node);
    let request = peer.begin(id(1));
    peer.bring(request, id(1), 0..1);
    let (body, mut payload) = sections(id(1), 1..3);
    payload[69_999] ^= 1;
    peer.send_with(request, &body, &payload);
    peer.send(request, &Commit {});
    let wrong = PutOutcome::Refused(Refusal::WrongFormat);
    assert_eq!(peer.outcome(request), wrong);
    assert_eq!(peer.get(id(1)), Err(MissReason::Absent));
    node.shutdown();
    node.wait();
}

#[test]
fn what_does_not_fit_ends_the_link_and_frees_the_id() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    type Wrong = fn(&mut Peer, u64);
    let wrongs: [(&str, Wrong); 8] = [
        ("in their order", |peer, request| {
            peer.bring(request, id(1), 1..2);
        }),
        ("in their order", |peer, request| {
            peer.bring(request, id(1), 0..1);
            peer.bring(request, id(1), 0..1);
        }),
        ("in their order", |peer, request| {
            let (mut body, payload) = sections(id(1), 0..1);
            body.checks.clear();
            peer.send_with(request, &body, &payload);
        }),
        ("in their order", |peer, request| {
            let (mut body, payload) = sections(id(1), 0..3);
            body.checks.push(ContentCheck(1));
            peer.send_with(request, &body, &payload);
        }),
        ("were announced", |peer, request| {
            let (body, payload) = sections(id(1), 0..2);
            peer.send_with(request, &body, &payload[1..]);
        }),
        ("were announced", |peer, request| {
            let (body, _) = sections(id(1), 0..1);
            peer.send(request, &body);
        }),
        ("before all sections", |peer, request| {
            peer.bring(request, id(1), 0..2);
            peer.send(request, &Commit {});
        }),
        ("announced", |peer, request| {
            let all: Vec<u8> = (0..3).flat_map(bytes).collect();
            peer.send_with(request, &Payload {}, &all);
        }),
    ];
    for (words, wrong) in wrongs {
        let mut peer = Peer::greet(&node);
        let request = peer.begin(id(1));
        wrong(&mut peer, request);
        let failure = peer.failure();
        assert_eq!(failure.code, FailureCode::Protocol);
        assert!(failure.text.contains(words), "{words}: {}", failure.text);
        drop(peer);
        let mut other = Peer::greet(&node);
        until(format!("{words}: the id is free again"), || {
            other.put(id(1), &[b"other"], false) != PutOutcome::InProgress
        });
        let request = other.number();
        other.send(
            request,
            &Remove {
                ids: vec![id(1)],
                deadline_us: 20_000_000,
            },
        );
        let (_, message, _) = other.receive();
        assert!(matches!(message, Message::RemoveAnswer(_)), "{message:?}");
        until(format!("{words}: its memory is back"), || {
            memory(&node) == 0
        });
    }
    node.shutdown();
    node.wait();
}

#[test]
fn a_put_that_has_ended_takes_no_more_and_a_cancel_frees_its_id() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let mut peer = Peer::greet(&node);
    let request = peer.begin(id(1));
    peer.bring(request, id(1), 0..1);
    peer.send(request, &Cancel {});
    // Late ones are drained.
    peer.bring(request, id(1), 1..2);
    peer.send(request, &Commit {});
    assert_eq!(
        peer.put(id(1), &[b"now another"], false),
        PutOutcome::Stored
    );
    // A deadline does the same, and is answered.
    let request = peer.number();
    let short = Announce {
        deadline_us: 30_000,
        ..announce(id(2), &LENGTHS)
    };
    peer.send(request, &short);
    assert_eq!(peer.receive().1, Pull {}.into());
    peer.bring(request, id(2), 0..2);
    let late = PutOutcome::Refused(Refusal::Deadline);
    assert_eq!(peer.outcome(request), late);
    peer.bring(request, id(2), 2..3);
    assert_eq!(
        peer.put(id(2), &[b"now another"], false),
        PutOutcome::Stored
    );
    node.shutdown();
    node.wait();
}

fn waiting_get(id: BlockId) -> Get {
    let mut get = Peer::get_message(vec![Peer::item(id)]);
    get.hints.wait_announced = true;
    get
}

#[test]
fn readers_that_wait_for_a_put_leave_a_fresh_link_to_others() {
    const WAITING: u64 = 40;
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let mut writer = Peer::greet(&node);
    assert_eq!(writer.put(id(2), &[b"there"], false), PutOutcome::Stored);
    let put = writer.begin(id(1));
    let mut reader = Peer::greet(&node);
    let first = reader.number() + 1000;
    for request in first..first + WAITING {
        reader.send(request, &waiting_get(id(1)));
    }
    assert_eq!(reader.get(id(2)), Ok(b"there".to_vec()));
    writer.bring(put, id(1), 0..3);
    writer.send(put, &Commit {});
    assert_eq!(writer.outcome(put), PutOutcome::Stored);
    let block: Vec<u8> = (0..3).flat_map(bytes).collect();
    for _ in 0..WAITING {
        let (_, message, payload) = reader.receive();
        assert!(matches!(message, Message::GetAnswer(_)), "{message:?}");
        assert!(payload == block);
    }
    node.shutdown();
    node.wait();
}

#[test]
fn who_waits_for_a_put_and_cancels_or_goes_takes_no_place() {
    // Of 1,024 places one link may take half.
    const TIMES: u64 = 520;
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let mut writer = Peer::greet(&node);
    assert_eq!(writer.put(id(2), &[b"there"], false), PutOutcome::Stored);
    let put = writer.begin(id(1));
    let mut reader = Peer::greet(&node);
    let first = reader.number() + 1000;
    for request in first..first + TIMES {
        reader.send(request, &waiting_get(id(1)));
        // Answered in order: when this has come, the one before waits.
        assert_eq!(reader.get(id(2)), Ok(b"there".to_vec()));
        reader.send(request, &Cancel {});
    }
    // And links that go: half of what is left, and half of that.
    for _ in 0..4 {
        let mut lost = Peer::greet(&node);
        for request in first..first + 200 {
            lost.send(request, &waiting_get(id(1)));
        }
        lost.send(1, &Ping {});
        assert_eq!(lost.receive().1, Pong {}.into());
    }
    until("lost links are closed", || {
        let status: Value = serde_json::from_str(&http(&node, "/v1/status").1).unwrap();
        status["links"]["links_open"].as_u64().unwrap() == 2
    });
    let requests = first + TIMES..first + TIMES + 200;
    for request in requests.clone() {
        reader.send(request, &waiting_get(id(1)));
    }
    assert_eq!(reader.get(id(2)), Ok(b"there".to_vec()));
    writer.bring(put, id(1), 0..3);
    writer.send(put, &Commit {});
    assert_eq!(writer.outcome(put), PutOutcome::Stored);
    for _ in requests {
        let (_, message, payload) = reader.receive();
        assert!(!payload.is_empty(), "one was told at once: {message:?}");
    }
    node.shutdown();
    node.wait();
}
