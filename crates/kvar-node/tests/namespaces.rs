//! Several namespaces on one node: keys, purges and counts of their own, over real sockets.
//!
//! What must always be true: nobody gets into a namespace without its own key; what one does to all of
//! its blocks leaves the others'; names keep their numbers over restarts, also while they are away.

mod support;

use kvar_base::{BlockId, NamespaceKey, PutOutcome};
use kvar_node::{Config, KeyFile, Node, NodeHandle, StartError};
use kvar_wire::{
    Finished, Flush, FlushAnswer, HandshakeError, Message, Purge, PurgeAnswer, Status,
};
use serde_json::Value;
use std::path::Path;
use support::{Peer, bytes_of, config, key_of, start};

const DEADLINE_US: u64 = 10_000_000;
const LEN: usize = 16 << 10;

fn with(dir: &Path, namespaces: &[&str]) -> Config {
    let mut config = config(dir, 2);
    let texts: Vec<String> = namespaces.iter().map(|text| (*text).to_owned()).collect();
    config.set_all("namespace", &texts).unwrap();
    config
}

fn key_file(dir: &Path, name: &str) -> KeyFile {
    KeyFile::read(&dir.join(format!("data.{name}.key"))).unwrap()
}

fn peer(node: &NodeHandle, name: &str, key: &NamespaceKey) -> Peer {
    let mut peer = Peer::connect(node.listen_addr());
    peer.shake(name, key).unwrap();
    peer
}

/// As clients name them: the namespace's key decides.
fn id(key: &NamespaceKey, number: u8) -> BlockId {
    BlockId::from_name(key, &format!("prompt {number}"))
}

fn put(peer: &mut Peer, key: &NamespaceKey, numbers: std::ops::Range<u8>) {
    for number in numbers {
        let id = id(key, number);
        let stored = peer.put(id, &[&bytes_of(&id, LEN)], false);
        assert_eq!(stored, PutOutcome::Stored);
    }
    let flushed = FlushAnswer {
        finished: Finished::Done(0),
    };
    let deadline_us = DEADLINE_US;
    assert_eq!(
        peer.ask(&Flush { deadline_us }),
        Message::FlushAnswer(flushed)
    );
}

fn count(peer: &mut Peer, key: &NamespaceKey, numbers: std::ops::Range<u8>) -> usize {
    numbers
        .filter(|number| peer.get(id(key, *number)).is_ok())
        .count()
}

fn purge(peer: &mut Peer) -> Finished {
    match peer.ask(&Purge {
        deadline_us: DEADLINE_US,
    }) {
        Message::PurgeAnswer(PurgeAnswer { finished }) => finished,
        other => panic!("{other:?}"),
    }
}

fn namespaces(peer: &mut Peer) -> Vec<Value> {
    let Message::StatusAnswer(status) = peer.ask(&Status {}) else {
        panic!("a status")
    };
    let status: Value = serde_json::from_str(&status.json).unwrap();
    status["namespaces"].as_array().unwrap().clone()
}

#[test]
fn each_has_its_own_key_and_its_own_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let settings = with(dir.path(), &["team-a,share=2", "team-b"]);
    let node = start(&settings);
    let (a, b) = (
        key_file(dir.path(), "team-a"),
        key_file(dir.path(), "team-b"),
    );
    let (a_key, b_key) = (a.key.clone(), b.key.clone());
    let name = a.namespace.clone().unwrap();
    assert_eq!((name.name.as_str(), name.number), ("team-a", 1));

    // A key opens its own namespace and no other; an unknown name is no namespace.
    let refused = |name: &str, key: &NamespaceKey| {
        let mut peer = Peer::connect(node.listen_addr());
        peer.shake(name, key).unwrap_err()
    };
    let default = key_of(&node);
    for (name, key) in [
        ("team-a", &b_key),
        ("default", &a_key),
        ("team-b", &default),
    ] {
        assert!(
            matches!(refused(name, key), HandshakeError::Key(_)),
            "{name}"
        );
    }
    assert!(matches!(
        refused("team-c", &a_key),
        HandshakeError::Namespace(_)
    ));

    let mut of_a = peer(&node, "team-a", &a_key);
    let mut of_b = peer(&node, "team-b", &b_key);
    let mut of_all = Peer::greet(&node);
    put(&mut of_a, &a_key, 0..40);
    put(&mut of_b, &b_key, 0..20);
    put(&mut of_all, &default, 0..10);
    // The same prompts are other blocks.
    assert_ne!(id(&a_key, 1), id(&b_key, 1));
    assert_eq!(count(&mut of_b, &b_key, 0..40), 20);

    let rows = namespaces(&mut of_a);
    let row = |at: usize, key: &str| rows[at][key].clone();
    let names: Vec<Value> = (0..3).map(|at| row(at, "name")).collect();
    assert_eq!(names, ["default", "team-a", "team-b"]);
    let shares: Vec<Value> = (0..3).map(|at| row(at, "share")).collect();
    assert_eq!(shares, [1, 2, 1]);
    assert_eq!((row(1, "part"), row(2, "part")), (0.5.into(), 0.25.into()));
    for (at, blocks) in [(0, 10), (1, 40), (2, 20)] {
        let bytes = Value::from(blocks * LEN as u64);
        assert_eq!(
            (row(at, "dram_bytes"), row(at, "flash_bytes")),
            (bytes.clone(), bytes)
        );
        assert_eq!(row(at, "stored"), blocks);
    }
    assert_eq!((row(2, "hits"), row(2, "misses")), (20.into(), 20.into()));

    assert_eq!(purge(&mut of_b), Finished::Done(20));
    assert_eq!(count(&mut of_b, &b_key, 0..20), 0);
    assert_eq!(count(&mut of_a, &a_key, 0..40), 40);
    assert_eq!(count(&mut of_all, &default, 0..10), 10);
    put(&mut of_b, &b_key, 30..35);
    drop((of_a, of_b, of_all));
    assert!(node.wait_for_stop().defects.is_empty());

    // What was purged stays so, and what was not is there; by name, in whatever order they stand.
    let node = start(&with(dir.path(), &["team-b", "team-a"]));
    let mut of_a = peer(&node, "team-a", &a_key);
    let mut of_b = peer(&node, "team-b", &b_key);
    assert_eq!(count(&mut of_a, &a_key, 0..40), 40);
    assert_eq!(count(&mut of_b, &b_key, 0..40), 5);
    let numbers: Vec<Value> = namespaces(&mut of_b)
        .iter()
        .map(|row| row["number"].clone())
        .collect();
    assert_eq!(numbers, [0, 1, 2]);
    // A purge of the default one is of nobody else's.
    assert_eq!(purge(&mut Peer::greet(&node)), Finished::Done(10));
    assert_eq!(count(&mut of_a, &a_key, 0..40), 40);
}

#[test]
fn a_name_that_is_gone_keeps_its_number_and_lets_nobody_in() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&with(dir.path(), &["team-a"]));
    let key = key_file(dir.path(), "team-a").key;
    put(&mut peer(&node, "team-a", &key), &key, 0..10);
    node.wait_for_stop();

    let node = start(&with(dir.path(), &["team-b"]));
    assert_eq!(key_file(dir.path(), "team-b").namespace.unwrap().number, 2);
    let mut gone = Peer::connect(node.listen_addr());
    let error = gone.shake("team-a", &key).unwrap_err();
    assert!(matches!(error, HandshakeError::Namespace(_)), "{error}");
    let rows = namespaces(&mut Peer::greet(&node));
    assert_eq!(
        (&rows[1]["name"], &rows[1]["share"]),
        (&"team-a".into(), &Value::Null)
    );
    assert_eq!(rows[1]["flash_bytes"], 10 * LEN as u64);
    node.wait_for_stop();

    let node = start(&with(dir.path(), &["team-b", "team-a"]));
    assert_eq!(count(&mut peer(&node, "team-a", &key), &key, 0..10), 10);
    node.wait_for_stop();

    // Without its key it does not start, and says what to do.
    std::fs::remove_file(dir.path().join("data.team-a.key")).unwrap();
    let error = Node::start(&with(dir.path(), &["team-a"])).unwrap_err();
    assert!(matches!(error, StartError::Namespaces(_)));
    assert!(error.to_string().contains("restore it"), "{error}");
}

trait Stop {
    fn wait_for_stop(self) -> kvar_node::StopReport;
}

impl Stop for NodeHandle {
    fn wait_for_stop(self) -> kvar_node::StopReport {
        self.shutdown();
        self.wait()
    }
}
