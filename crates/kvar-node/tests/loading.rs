//! A node that reads back what it stored answers meanwhile: nothing hangs, nothing is lost, and it
//! can be stopped.

mod support;

use kvar_base::{BlockId, MissReason, PutOutcome, Refusal};
use kvar_node::{Hooks, Node, Readiness};
use kvar_wire::*;
use std::sync::{Arc, Condvar, Mutex};
use support::{Peer, bytes_of, config, http, start};

/// Holds loaders of some shards until it is opened.
#[derive(Default)]
struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn hooks(self: &Arc<Self>, holds: fn(u32, u64) -> bool) -> Hooks {
        let gate = self.clone();
        Hooks {
            loading: Some(Arc::new(move |shard, bytes| {
                if holds(shard, bytes) {
                    let guard = gate.is_open.lock().unwrap();
                    drop(gate.opened.wait_while(guard, |is_open| !*is_open).unwrap());
                }
            })),
            ..Hooks::default()
        }
    }

    fn open(&self) {
        *self.is_open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

fn status(peer: &mut Peer) -> serde_json::Value {
    let Message::StatusAnswer(answer) = peer.ask(&Status {}) else {
        panic!("a status")
    };
    serde_json::from_str(&answer.json).unwrap()
}

/// Ids of which some belong to shard 0 of 2 and some to shard 1.
fn ids() -> Vec<BlockId> {
    (0..16_u8)
        .map(|number| BlockId::new([number * 16 + 3; 32]))
        .collect()
}

#[test]
fn a_node_answers_while_it_loads_and_serves_what_it_had_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 2);
    let node = start(&config);
    let mut peer = Peer::greet(&node);
    for id in ids() {
        assert_eq!(
            peer.put(id, &[&bytes_of(&id, 9000)], true),
            PutOutcome::Stored
        );
    }
    drop(peer);
    node.shutdown();
    node.wait();

    // Shard 0 stands still after its first page, shard 1 loads.
    let gate = Arc::new(Gate::default());
    let hooks = gate.hooks(|shard, bytes| shard == 0 && bytes > 4096);
    let node = Node::listen(&config, hooks).unwrap();
    let mut peer = Peer::greet(&node);
    assert_eq!(http(&node, "/livez").0, 200);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let found = loop {
        let found = status(&mut peer);
        if found["shards_loaded"] == 1 && found["loading_bytes"].as_u64() > Some(4096) {
            break found;
        }
        assert!(std::time::Instant::now() < until, "{found}");
    };
    assert_eq!(
        (&found["state"], &found["ready"]),
        (&"loading".into(), &false.into())
    );
    assert_eq!(found["devices"][0]["state"], "loading");
    let (code, text) = http(&node, "/readyz");
    assert!(
        code == 503 && text.contains("loading: 1 of 2 shards"),
        "{code} {text}"
    );
    assert!(http(&node, "/metrics").1.contains("kvar_shards_loaded 1"));

    let (held, open): (Vec<_>, Vec<_>) = ids().into_iter().partition(|id| id.shard(2) == 0);
    assert!(!held.is_empty() && !open.is_empty());
    let deadline_us = 10_000_000;
    for id in &open {
        assert!(
            peer.get(*id) == Ok(bytes_of(id, 9000)),
            "the other shard serves"
        );
    }
    for id in &held {
        assert_eq!(peer.get(*id), Err(MissReason::Loading));
        let busy = PutOutcome::Refused(Refusal::Busy);
        assert_eq!(peer.put(*id, &[&bytes_of(id, 9000)], false), busy);
        assert_eq!(peer.put(*id, &[&bytes_of(id, 200_000)], false), busy);
        let stat = peer.ask(&Stat {
            id: *id,
            deadline_us,
        });
        let loading = StatAnswer {
            stat: Err(MissReason::Loading),
        };
        assert_eq!(stat, Message::StatAnswer(loading));
    }
    let lookup = Lookup {
        ids: ids(),
        leading_only: false,
        first_depth: 0,
        touch_request: 1,
        deadline_us,
    };
    let Message::LookupAnswer(LookupAnswer::Each(bits)) = peer.ask(&lookup) else {
        panic!("a bitmap")
    };
    let present: Vec<bool> = ids().iter().map(|id| id.shard(2) == 1).collect();
    assert_eq!(bits.bits(ids().len()), present, "absent while it loads");
    let says_loading = |finished: &Finished| {
        assert!(
            matches!(finished, Finished::Failed(text) if text.contains("still loading")),
            "{finished:?}"
        );
    };
    match peer.ask(&Flush { deadline_us }) {
        Message::FlushAnswer(answer) => says_loading(&answer.finished),
        other => panic!("{other:?}"),
    }
    match peer.ask(&Remove {
        ids: vec![held[0]],
        deadline_us,
    }) {
        Message::RemoveAnswer(answer) => says_loading(&answer.finished),
        other => panic!("{other:?}"),
    }

    gate.open();
    assert_eq!(node.loaded().unwrap(), Readiness::Ready);
    assert_eq!(http(&node, "/readyz").0, 200);
    for id in ids() {
        assert!(
            peer.get(id) == Ok(bytes_of(&id, 9000)),
            "the same link goes on"
        );
    }
    assert_eq!(status(&mut peer)["state"], "serving");
}

#[test]
fn a_node_that_is_told_to_stop_while_it_loads_stops() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 2);
    let id = BlockId::new([1; 32]);
    let node = start(&config);
    assert_eq!(
        Peer::greet(&node).put(id, &[b"kept"], true),
        PutOutcome::Stored
    );
    node.shutdown();
    node.wait();

    let gate = Arc::new(Gate::default());
    let node = Node::listen(&config, gate.hooks(|_, bytes| bytes > 0)).unwrap();
    let mut peer = Peer::greet(&node);
    assert_eq!(peer.get(id), Err(MissReason::Loading));
    node.shutdown();
    // What is being read at this moment ends, as on a slow disk; what would come next is not read.
    gate.open();
    assert_eq!(node.loaded().unwrap(), Readiness::Stopped);
    let report = node.wait();
    assert!(
        report.defects.is_empty() && report.dropped_blocks == 0,
        "{report:?}"
    );

    let node = start(&config);
    assert!(Peer::greet(&node).get(id).as_deref() == Ok(b"kept"));
}

#[test]
fn a_shard_that_cannot_be_loaded_ends_the_node_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 2);
    // More than a process can address: found when the shards are opened, after listening.
    config.set("dram", "1024TiB").unwrap();
    let node = Node::listen(&config, Hooks::default()).unwrap();
    let error = node.loaded().unwrap_err().to_string();
    assert!(
        error.contains("shard ") && error.contains("give a smaller dram"),
        "{error}"
    );
    assert!(node.wait().defects.is_empty());
    config.set("dram", "64MiB").unwrap();
    start(&config);
}

#[test]
fn data_that_is_cut_off_while_it_loads_is_lost_and_nothing_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 1);
    let id = BlockId::new([1; 32]);
    let node = start(&config);
    assert_eq!(
        Peer::greet(&node).put(id, &[b"gone"], true),
        PutOutcome::Stored
    );
    node.shutdown();
    node.wait();
    let path = config.data[0].path.clone();
    let hooks = Hooks {
        loading: Some(Arc::new(move |_, _| {
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_len(64 << 10).unwrap();
        })),
        ..Hooks::default()
    };
    let node = Node::listen(&config, hooks).unwrap();
    // Recovery takes what cannot be read for lost.
    assert_eq!(node.loaded().unwrap(), Readiness::Ready);
    assert_eq!(Peer::greet(&node).get(id), Err(MissReason::Absent));
    node.shutdown();
    node.wait();
}
