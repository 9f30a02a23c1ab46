//! A node with more to do than it can: nothing is done for who has gone, and memory stays bounded.

mod support;

use kvar_base::{BlockId, ByteSize, MissReason, NamespaceKey, PutOutcome};
use kvar_node::{LINK_BYTES, NodeHandle};
use kvar_wire::*;
use serde_json::Value;
use std::io::Write as _;
use std::time::{Duration, Instant};
use support::{Peer, bytes_of, config, http, start, until};

fn ids(count: usize) -> Vec<BlockId> {
    let key = NamespaceKey::new([9; 32]);
    (0..count)
        .map(|number| BlockId::from_name(&key, &format!("block {number}")))
        .collect()
}

fn status(node: &NodeHandle) -> Value {
    serde_json::from_str(&http(node, "/v1/status").1).unwrap()
}

/// So many blocks of one length, put; their ids.
fn stored(peer: &mut Peer, count: usize, len: usize) -> Vec<BlockId> {
    let ids = ids(count);
    for id in &ids {
        let outcome = peer.put(*id, &[&bytes_of(id, len)], false);
        assert_eq!(outcome, PutOutcome::Stored);
    }
    ids
}

fn overdue(node: &NodeHandle, place: &str) -> u64 {
    status(node)["links"]["overdue"][place].as_u64().unwrap()
}

fn frame<B: Body>(request: u64, body: &B) -> Vec<u8> {
    let mut frame = Vec::new();
    encode(
        &mut frame,
        request,
        kvar_base::MapEpoch::SINGLE_NODE,
        body,
        0,
    )
    .unwrap();
    frame
}

/// A client that asked for more than its link takes and gave up: what has not left is not sent.
#[test]
fn bytes_that_wait_for_a_slow_link_are_taken_back_when_their_time_is_over() {
    const COUNT: usize = 250;
    const LEN: usize = 240 << 10;
    const PATIENCE: Duration = Duration::from_millis(300);
    let dir = tempfile::tempdir().unwrap();
    let mut settings = config(dir.path(), 1);
    settings.size = Some(ByteSize(256 << 20));
    settings.dram = ByteSize(160 << 20);
    let node = start(&settings);
    let mut peer = Peer::greet(&node);
    let ids = stored(&mut peer, COUNT, LEN);
    let request = peer.number();
    let mut get = Peer::get_message(ids.iter().map(|id| Peer::item(*id)).collect());
    get.deadline_us = PATIENCE.as_micros() as u64;
    peer.send(request, &get);
    // It reads nothing: the socket is full long before its time is over, and what is queued is taken
    // back all the same.
    until("what is queued is taken back", || {
        overdue(&node, "link") > 0
    });
    let mut answered = vec![0; COUNT];
    let (mut hits, mut late) = (0_u64, 0_u64);
    for _ in 0..COUNT {
        let (header, message, payload) = peer.receive();
        assert_eq!(header.request, request);
        let Message::GetAnswer(GetAnswer { item, outcome }) = message else {
            panic!("{message:?}")
        };
        answered[usize::from(item)] += 1;
        match outcome {
            GetOutcome::Hit { .. } => {
                assert!(payload == bytes_of(&ids[usize::from(item)], LEN));
                hits += 1;
            }
            GetOutcome::Placed { .. } => panic!("nothing was to be placed"),
            GetOutcome::Miss(reason) => {
                assert_eq!(reason, MissReason::Deadline);
                late += 1;
            }
        }
    }
    assert_eq!(answered, vec![1; COUNT]);
    let (line, link) = (overdue(&node, "line"), overdue(&node, "link"));
    assert!(hits > 0 && link > 0, "{hits} hits, {link} taken back");
    assert_eq!(line + link, late);
    // The stream is whole, and the block can be had.
    assert!(peer.get(ids[COUNT - 1]) == Ok(bytes_of(&ids[COUNT - 1], LEN)));
    // What was taken back is a miss and no hit.
    let links = &status(&node)["links"];
    assert_eq!(links["get_hits"], hits + 1);
    assert_eq!(links["get_misses"]["deadline"], late);
    assert_eq!(links["payload_bytes_out"], (hits + 1) * LEN as u64);
    let metrics = http(&node, "/metrics").1;
    let line = format!("kvar_overdue_total{{where=\"link\"}} {link}");
    assert!(metrics.contains(&line), "{line}");
}

/// A client that stops when all it asked for is queued: nothing else happens on its link, and what is
/// overdue does not hold memory until it goes on.
#[test]
fn what_a_stopped_client_does_not_take_is_taken_back_at_its_deadline() {
    const COUNT: usize = 56;
    const LEN: usize = 240 << 10;
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let mut peer = Peer::greet(&node);
    let ids = stored(&mut peer, COUNT, LEN);
    let request = peer.number();
    let mut get = Peer::get_message(ids.iter().map(|id| Peer::item(*id)).collect());
    get.deadline_us = 2_000_000;
    peer.send(request, &get);
    until("what is queued is taken back", || {
        overdue(&node, "link") > 0
    });
    assert_eq!(overdue(&node, "line"), 0, "all of it was queued");
    node.shutdown();
    node.wait();
}

/// After a node was stopped for a while requests and their cancels lie in its sockets together.
#[test]
fn what_was_cancelled_before_it_was_asked_is_not_asked() {
    const COUNT: u64 = 50;
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let mut peer = Peer::greet(&node);
    let id = ids(1)[0];
    assert_eq!(
        peer.put(id, &[&bytes_of(&id, 5000)], false),
        PutOutcome::Stored
    );
    let mut bytes = Vec::new();
    let first = peer.number() + 1000;
    for request in first..first + COUNT {
        let mut get = Peer::get_message(vec![Peer::item(id)]);
        // Whatever a reader says of itself, when it has gone nothing is asked for it.
        get.hints.by_layer = request % 2 == 1;
        get.hints.wait_announced = request % 3 == 1;
        bytes.extend(frame(request, &get));
        bytes.extend(frame(request, &Cancel {}));
    }
    peer.stream.write_all(&bytes).unwrap();
    // Answered in order: when this has come, those have been taken.
    assert!(peer.get(id) == Ok(bytes_of(&id, 5000)));
    assert_eq!(overdue(&node, "asked"), COUNT);
    let shards = &status(&node)["shards"];
    let shards = shards.as_array().unwrap().iter();
    let hits = shards.map(|shard| shard["engine"]["counters"]["dram_hits"].as_u64().unwrap());
    assert_eq!(hits.sum::<u64>(), 1);
}

/// A block that is asked for section by section is one hit, and one miss.
#[test]
fn a_block_that_is_missed_by_sections_is_one_miss() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let mut peer = Peer::greet(&node);
    let section = |number| GetItem {
        sections: Some(number..number + 1),
        ..Peer::item(ids(1)[0])
    };
    let mut get = Peer::get_message((0..4).map(section).collect());
    get.hints.by_layer = true;
    let request = peer.number();
    peer.send(request, &get);
    for _ in 0..4 {
        let (_, message, _) = peer.receive();
        let Message::GetAnswer(answer) = message else {
            panic!("{message:?}")
        };
        assert_eq!(answer.outcome, GetOutcome::Miss(MissReason::Absent));
    }
    let links = &status(&node)["links"];
    assert_eq!(links["get_misses"]["absent"], 1);
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() * 1024
}

/// Links that ask without end and read nothing: each holds what it may, and others are served.
#[test]
fn a_flood_that_reads_no_answers_is_held_back_and_costs_nobody_else() {
    const LINKS: u64 = 12;
    const LEN: usize = 64 << 10;
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let mut small = Peer::greet(&node);
    let ids = stored(&mut small, 100, LEN);
    let items: Vec<GetItem> = ids.iter().map(|id| Peer::item(*id)).collect();
    let before = resident_bytes();
    let mut floods: Vec<Peer> = (0..LINKS).map(|_| Peer::greet(&node)).collect();
    let mut stuck = vec![false; floods.len()];
    let until = Instant::now() + Duration::from_secs(20);
    let mut request = 1000;
    while !stuck.iter().all(|stuck| *stuck) {
        for (flood, stuck) in floods.iter_mut().zip(&mut stuck) {
            if *stuck {
                continue;
            }
            request += 1;
            let limit = Some(Duration::from_millis(50));
            flood.stream.set_write_timeout(limit).unwrap();
            let get = frame(request, &Peer::get_message(items.clone()));
            *stuck = flood.stream.write_all(&get).is_err();
        }
        // Between all these one block at a time, as ever.
        let id = ids[request as usize % ids.len()];
        assert!(small.get(id) == Ok(bytes_of(&id, LEN)));
        assert!(
            Instant::now() < until,
            "the node takes all that is asked: {request}"
        );
    }
    let grown = resident_bytes().saturating_sub(before);
    let slack = 32 << 20;
    assert!(grown <= LINKS * LINK_BYTES + slack, "grown by {grown}");
    let links = &status(&node)["links"];
    assert_eq!(links["links_open"], LINKS + 1);
    drop(floods);
    node.shutdown();
    assert!(node.wait().defects.is_empty());
}
