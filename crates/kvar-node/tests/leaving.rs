//! A device is retired in daylight: its blocks move to the others, are hits all the while, and what is
//! removed meanwhile stays removed.

mod support;

use kvar_base::{BlockId, ByteSize, MissReason, PutOutcome};
use kvar_node::{Config, DataPath, Hooks, Node, NodeHandle, Readiness};
use kvar_wire::*;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;
use support::store::{device, remove, stop};
use support::{PATIENCE, Peer, bytes_of, http, post_devices, start, store, until};

const LEN: usize = 20_000;

fn config(dir: &Path, names: &[&str]) -> Config {
    let mut config = support::config(dir, 2);
    let path = |name: &&str| DataPath {
        path: dir.join(name),
        size: None,
        tier: None,
    };
    config.data = names.iter().map(path).collect();
    config.dram = ByteSize(names.len() as u64 * (48 << 20));
    config
}

fn ids(count: u32) -> Vec<BlockId> {
    store::ids(0, count)
}

/// Blocks of one section and of three, in turn.
fn fill(node: &NodeHandle, ids: &[BlockId]) {
    let mut peer = Peer::greet(node);
    for (number, id) in ids.iter().enumerate() {
        let bytes = bytes_of(id, LEN);
        let pieces: Vec<&[u8]> = match number % 2 {
            0 => vec![&bytes],
            _ => vec![&bytes[..100], &bytes[100..9000], &bytes[9000..]],
        };
        assert_eq!(peer.put(*id, &pieces, true), PutOutcome::Stored);
    }
}

fn get(peer: &mut Peer, id: BlockId) -> Result<(), MissReason> {
    peer.get(id).map(|bytes| {
        assert!(bytes == bytes_of(&id, LEN), "wrong bytes");
    })
}

fn retire(node: &NodeHandle, slot: &str, rate: Option<u64>) -> (u16, Value) {
    let body = json!({ "action": "retire", "device": slot, "rate": rate });
    post_devices(node, &body)
}

fn wait_until_gone(node: &NodeHandle, path: &Path, mut meanwhile: impl FnMut()) {
    let until = Instant::now() + PATIENCE;
    loop {
        let found = device(node, path);
        if found["state"] == "retired" {
            return;
        }
        assert_eq!(found["state"], "leaving", "{found}");
        assert!(Instant::now() < until, "it does not end: {found}");
        meanwhile();
    }
}

#[test]
fn every_block_is_a_hit_before_while_and_after_its_device_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["a", "b", "c"]);
    let node = start(&config);
    let ids = ids(240);
    fill(&node, &ids);
    let path = dir.path().join("b");
    let before = device(&node, &path)["blocks"].as_u64().unwrap();
    assert!(before > 40, "{before}");
    let (code, answer) = retire(&node, "1", None);
    assert_eq!(
        (code, &answer["state"]),
        (200, &"leaving".into()),
        "{answer}"
    );
    let mut peer = Peer::greet(&node);
    let mut reads = 0;
    wait_until_gone(&node, &path, || {
        for id in ids.iter().skip(reads % 7).step_by(7) {
            assert_eq!(get(&mut peer, *id), Ok(()), "a miss while it moves");
        }
        reads += 1;
    });
    for id in &ids {
        assert_eq!(get(&mut peer, *id), Ok(()), "a miss after it moved");
    }
    let found = device(&node, &path);
    assert_eq!(
        (&found["slot"], &found["share"]),
        (&Value::Null, &0.0.into())
    );
    // None of them is counted as lost with it.
    let metrics = http(&node, "/metrics").1;
    let lost = metrics
        .lines()
        .filter(|line| line.contains("device_lost"))
        .all(|line| line.ends_with(" 0"));
    assert!(lost, "{metrics}");
    // It can be taken away, and is not missed at the next start.
    drop(peer);
    stop(node);
    std::fs::remove_file(&path).unwrap();
    let node = start(&config);
    let mut peer = Peer::greet(&node);
    for id in &ids {
        assert_eq!(get(&mut peer, *id), Ok(()), "a miss after a restart");
    }
    // The other one may go, too; the last may not.
    assert_eq!(retire(&node, "2", None).0, 200);
    wait_until_gone(&node, &dir.path().join("c"), || {});
    for id in &ids {
        assert_eq!(get(&mut peer, *id), Ok(()), "a miss on the last device");
    }
    let (code, answer) = retire(&node, "0", None);
    let why = answer["error"].as_str().unwrap_or_default();
    assert!(code == 409 && why.contains("last device"), "{answer}");
}

/// Holds a move at one of its steps, once.
#[derive(Default)]
struct Gate {
    stage: Mutex<Stage>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Armed,
    Holding(BlockId),
    Open,
}

impl Gate {
    fn hold(&self, id: BlockId) {
        let mut stage = self.stage.lock().unwrap();
        if *stage == Stage::Armed {
            *stage = Stage::Holding(id);
            self.changed.notify_all();
            drop(
                self.changed
                    .wait_while(stage, |stage| *stage != Stage::Open)
                    .unwrap(),
            );
        }
    }

    fn held(&self) -> BlockId {
        let stage = self.stage.lock().unwrap();
        let stage = self
            .changed
            .wait_while(stage, |stage| *stage == Stage::Armed)
            .unwrap();
        match *stage {
            Stage::Holding(id) => id,
            _ => panic!("opened by somebody else"),
        }
    }

    fn open(&self) {
        *self.stage.lock().unwrap() = Stage::Open;
        self.changed.notify_all();
    }
}

/// A remove that comes while its block is on its way, read already and not yet put, or put and not
/// yet committed: acknowledged, it stays removed.
#[test]
fn what_is_removed_while_it_moves_stays_removed() {
    for before_commit in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let gate = Arc::new(Gate::default());
        let holding = gate.clone();
        let hooks = Hooks {
            moving: Some(Arc::new(move |id, is_commit| {
                if is_commit == before_commit {
                    holding.hold(id);
                }
            })),
            ..Hooks::default()
        };
        let node = Node::listen(&config(dir.path(), &["a", "b"]), hooks).unwrap();
        assert_eq!(node.loaded().unwrap(), Readiness::Ready);
        let ids = ids(100);
        fill(&node, &ids);
        let path = dir.path().join("b");
        assert_eq!(retire(&node, "1", None).0, 200);
        let moving = gate.held();
        let mut peer = Peer::greet(&node);
        std::thread::scope(|scope| {
            let removing = scope.spawn(|| remove(&node, &ids));
            // Gone everywhere, and not acknowledged: the keeper has not heard of it.
            for id in &ids {
                until("it is removed", || get(&mut peer, *id).is_err());
            }
            assert!(!removing.is_finished());
            gate.open();
            assert_eq!(removing.join().unwrap(), Finished::Done(100));
            assert_eq!(get(&mut peer, moving), Err(MissReason::Absent));
        });
        wait_until_gone(&node, &path, || {
            assert_eq!(get(&mut peer, moving), Err(MissReason::Absent));
        });
        for id in &ids {
            let found = get(&mut peer, *id);
            assert_eq!(found, Err(MissReason::Absent), "it came back");
        }
    }
}

#[test]
fn a_device_that_was_leaving_leaves_on_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["a", "b"]);
    let node = start(&config);
    let ids = ids(200);
    fill(&node, &ids);
    let path = dir.path().join("b");
    // So slow that it cannot be through before the stop.
    assert_eq!(retire(&node, "1", Some(50_000)).0, 200);
    let again = retire(&node, "1", None);
    let why = again.1["error"].as_str().unwrap_or_default();
    assert!(
        again.0 == 409 && why.contains("leaving already"),
        "{again:?}"
    );
    let moved = || device(&node, &path)["moved"]["blocks"].as_u64();
    until("three blocks have moved", || moved() >= Some(3));
    stop(node);
    let node = start(&config);
    wait_until_gone(&node, &path, || {});
    let mut peer = Peer::greet(&node);
    for id in &ids {
        assert_eq!(get(&mut peer, *id), Ok(()));
    }
}

#[test]
fn a_device_that_leaves_can_be_told_to_go_now() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), &["a", "b"]));
    let ids = ids(100);
    fill(&node, &ids);
    assert_eq!(retire(&node, "1", Some(1000)).0, 200);
    let now = json!({ "action": "retire", "device": "1", "now": true });
    let (code, answer) = post_devices(&node, &now);
    assert_eq!(
        (code, &answer["state"]),
        (200, &"retired".into()),
        "{answer}"
    );
    let mut peer = Peer::greet(&node);
    let there = ids.iter().filter(|id| get(&mut peer, **id).is_ok()).count();
    assert!((20..90).contains(&there), "{there}");
    // What is put again has its place on the other.
    for id in &ids {
        let outcome = peer.put(*id, &[&bytes_of(id, LEN)], true);
        assert!(matches!(outcome, PutOutcome::Stored | PutOutcome::Exists));
    }
}

/// A block's time to live is the same wherever it lies.
#[test]
fn times_to_live_move_along() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), &["a", "b"]));
    let ids = ids(40);
    let mut peer = Peer::greet(&node);
    for id in &ids {
        let bytes = bytes_of(id, LEN);
        let mut put = Peer::put_message(*id, &[&bytes], true);
        put.hints.ttl_s = Some(3600);
        let request = peer.number();
        peer.send_with(request, &put, &bytes);
        let outcome = PutOutcome::Stored;
        assert_eq!(peer.receive().1, PutAnswer { outcome }.into());
    }
    let expiries = |peer: &mut Peer| -> Vec<u64> {
        let expiry = |id: &BlockId| {
            let stat = Stat {
                id: *id,
                deadline_us: 10_000_000,
            };
            match peer.ask(&stat) {
                Message::StatAnswer(StatAnswer { stat: Ok(stat) }) => stat.expires_unix_s.unwrap(),
                other => panic!("{other:?}"),
            }
        };
        ids.iter().map(expiry).collect()
    };
    let before = expiries(&mut peer);
    assert_eq!(retire(&node, "1", None).0, 200);
    wait_until_gone(&node, &dir.path().join("b"), || {});
    for (before, after) in before.iter().zip(expiries(&mut peer)) {
        assert!(before.abs_diff(after) <= 2, "{before} {after}");
    }
}
