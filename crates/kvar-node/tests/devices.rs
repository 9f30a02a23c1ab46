//! Several devices in one node: where blocks lie, and what happens when a device goes and comes.
//! Files stand for drives here; `crates/kvar/tests/devices.rs` does it with real block devices.

mod support;

use kvar_base::{BlockId, ByteSize, MissReason, PutOutcome, Refusal};
use kvar_node::{Config, DataPath, Node, NodeHandle};
use kvar_wire::*;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use support::store::{device, devices, remove, stop};
use support::{Peer, bytes_of, http, key_of, post_devices, start, store, until};

/// Settings of a node with a file for each name.
fn config(dir: &Path, names: &[&str]) -> Config {
    let mut config = support::config(dir, 2);
    config.data = names
        .iter()
        .map(|name| data_path(&dir.join(name)))
        .collect();
    config.dram = ByteSize(names.len() as u64 * (48 << 20));
    config
}

fn data_path(path: &Path) -> DataPath {
    DataPath {
        path: path.to_path_buf(),
        size: None,
        tier: None,
    }
}

fn ids(count: u32) -> Vec<BlockId> {
    store::ids(0, count)
}

fn fill(node: &NodeHandle, ids: &[BlockId]) {
    let mut peer = Peer::greet(node);
    for id in ids {
        assert_eq!(
            peer.put(*id, &[&bytes_of(id, 20_000)], true),
            PutOutcome::Stored
        );
    }
}

fn present(node: &NodeHandle, ids: &[BlockId]) -> Vec<BlockId> {
    store::present(node, ids, 20_000)
}

fn refused(config: &Config, parts: &[&str]) {
    let error = Node::start(config)
        .expect_err("a start that must fail")
        .to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

#[test]
fn blocks_are_spread_and_found_again_wherever_their_devices_are() {
    let dir = tempfile::tempdir().unwrap();
    let three = config(dir.path(), &["a", "b", "c"]);
    let node = start(&three);
    let ids = ids(120);
    fill(&node, &ids);
    assert_eq!(present(&node, &ids).len(), ids.len());
    let found = devices(&node);
    assert_eq!(found.len(), 3);
    for device in &found {
        assert_eq!(device["state"], "online");
        let (blocks, share) = (device["blocks"].as_u64(), device["share"].as_f64().unwrap());
        assert!(
            blocks > Some(15) && (share - 0.333).abs() < 0.03,
            "{device}"
        );
    }
    // Lookups keep their order over devices.
    let lookup = Lookup {
        ids: [&ids[..50], &[BlockId::new([7; 32])], &ids[50..]].concat(),
        leading_only: true,
        first_depth: 0,
        touch_request: 1,
        deadline_us: 10_000_000,
    };
    let leading = LookupAnswer::Leading(50, Some(MissReason::Absent));
    assert_eq!(
        Peer::greet(&node).ask(&lookup),
        Message::LookupAnswer(leading)
    );
    stop(node);

    // Moved, and named in another order; the key lies where it lay.
    std::fs::rename(dir.path().join("b"), dir.path().join("moved")).unwrap();
    let mut moved = config(dir.path(), &["c", "moved", "a"]);
    moved.size = None;
    moved.key_file = Some(three.key_path());
    let node = start(&moved);
    assert_eq!(present(&node, &ids).len(), ids.len());
    assert_eq!(remove(&node, &ids[..10]), Finished::Done(10));
    stop(node);
    let node = start(&moved);
    assert_eq!(present(&node, &ids), ids[10..]);
}

#[test]
fn a_device_that_was_away_comes_back_with_its_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["a", "b"]);
    let node = start(&config);
    let ids = ids(60);
    fill(&node, &ids);
    stop(node);
    let (path, away) = (dir.path().join("b"), dir.path().join("away"));
    std::fs::rename(&path, &away).unwrap();

    let node = start(&config);
    assert!(!path.exists(), "what is missing is never made anew");
    let left = present(&node, &ids);
    assert!((10..50).contains(&left.len()), "{}", left.len());
    let missing = device(&node, &path);
    assert_eq!(
        (&missing["state"], &missing["share"]),
        (&"missing".into(), &0.0.into())
    );
    let notes = node.facts().notes.join(" ");
    assert!(
        notes.contains("STARTING WITHOUT") && notes.contains("b"),
        "{notes}"
    );
    // New blocks have a place meanwhile, whoever they belonged to.
    let more: Vec<BlockId> = (0..20)
        .map(|number| BlockId::new([number * 12; 32]))
        .collect();
    fill(&node, &more);
    assert_eq!(present(&node, &more).len(), more.len());

    // Back while the node runs.
    std::fs::rename(&away, &path).unwrap();
    let (code, answer) = post_devices(&node, &json!({ "action": "add", "path": path }));
    assert_eq!(
        (code, &answer["state"]),
        (200, &"online".into()),
        "{answer}"
    );
    assert_eq!(present(&node, &ids).len(), ids.len());
    stop(node);
    // And over a start.
    let node = start(&config);
    assert_eq!(present(&node, &ids).len(), ids.len());
}

#[test]
fn what_was_removed_while_a_device_was_away_does_not_come_back_with_it() {
    for back_at_start in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), &["a", "b"]);
        let node = start(&config);
        let ids = ids(40);
        fill(&node, &ids);
        stop(node);
        let (path, away) = (dir.path().join("b"), dir.path().join("away"));
        std::fs::rename(&path, &away).unwrap();
        let node = start(&config);
        let left = present(&node, &ids);
        let gone: Vec<BlockId> = ids
            .iter()
            .filter(|id| !left.contains(id))
            .copied()
            .collect();
        assert!(matches!(remove(&node, &gone[..1]), Finished::Done(_)));
        assert_eq!(
            device(&node, &path)["stale"],
            false,
            "the view is made at a change"
        );
        let node = if back_at_start {
            stop(node);
            std::fs::rename(&away, &path).unwrap();
            start(&config)
        } else {
            std::fs::rename(&away, &path).unwrap();
            let (code, answer) = post_devices(&node, &json!({ "action": "add", "path": path }));
            assert_eq!(code, 200, "{answer}");
            node
        };
        assert_eq!(device(&node, &path)["state"], "online");
        assert_eq!(
            present(&node, &ids),
            left,
            "all of it is gone, and nothing else"
        );
        // It is a device like any other from now on.
        let mut peer = Peer::greet(&node);
        for id in &gone {
            assert_eq!(
                peer.put(*id, &[&bytes_of(id, 20_000)], true),
                PutOutcome::Stored
            );
        }
        stop(node);
        let node = start(&config);
        assert_eq!(present(&node, &ids).len(), ids.len());
    }
}

#[test]
fn a_start_without_all_devices_is_the_operators_choice() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), &["a", "b"]);
    stop(start(&config));
    let (a, b, away) = (
        dir.path().join("a"),
        dir.path().join("b"),
        dir.path().join("away"),
    );
    std::fs::rename(&b, &away).unwrap();
    config.set("missing_device", "refuse").unwrap();
    refused(
        &config,
        &[
            "1 of 2 devices missing",
            b.to_str().unwrap(),
            "missing_device",
        ],
    );
    config.set("missing_device", "start").unwrap();
    stop(start(&config));
    std::fs::rename(&a, dir.path().join("also away")).unwrap();
    refused(&config, &["none of the store's devices is there"]);
    std::fs::rename(dir.path().join("also away"), &a).unwrap();

    // A device of another store, the same one twice, a table that is damaged, no key.
    let other = tempfile::tempdir().unwrap();
    stop(start(&support::config(other.path(), 2)));
    std::fs::copy(other.path().join("data"), &b).unwrap();
    refused(&config, &["does not belong to this store"]);
    std::fs::copy(&a, &b).unwrap();
    refused(&config, &["are the same device", "name it once"]);
    std::fs::rename(&away, &b).unwrap();
    let table = config.table_path();
    let kept = std::fs::read(&table).unwrap();
    std::fs::write(&table, "{}").unwrap();
    refused(&config, &["device table", "damaged", "restore"]);
    std::fs::write(&table, kept).unwrap();
    let key = std::fs::read(config.key_path()).unwrap();
    std::fs::remove_file(config.key_path()).unwrap();
    refused(&config, &["missing", "restore"]);
    std::fs::write(config.key_path(), key).unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(config.key_path(), mode).unwrap();
    stop(start(&config));
    config.data.push(config.data[0].clone());
    refused(&config, &["named twice"]);
}

#[test]
fn a_device_that_dies_is_fenced_and_the_node_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["a", "b"]);
    let node = start(&config);
    let ids = ids(200);
    fill(&node, &ids);
    stop(node);
    // Started anew: nothing is in memory, every read goes to the device.
    let node = start(&config);
    let path = dir.path().join("b");
    // A device that goes while it is loaded loses no block that anybody had counted.
    until("it is loaded", || device(&node, &path)["state"] == "online");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let mut peer = Peer::greet(&node);
    let mut asked = ids.iter().cycle();
    let what = std::fmt::from_fn(|f| write!(f, "it fails: {}", device(&node, &path)));
    until(what, || {
        let id = asked.next().unwrap();
        // Again and again: a write of the engine's makes a file of it, which reads as zeros.
        file.set_len(0).unwrap();
        match peer.get(*id) {
            Ok(bytes) => assert!(bytes == bytes_of(id, 20_000)),
            Err(reason) => assert!(
                matches!(reason, MissReason::Absent | MissReason::Corrupt),
                "{reason}"
            ),
        }
        device(&node, &path)["state"] == "failed"
    });
    let lost = device(&node, &path);
    assert!(
        lost["reason"].as_str().unwrap().contains("does not answer"),
        "{lost}"
    );
    let left = present(&node, &ids);
    assert!(!left.is_empty() && left.len() < ids.len());
    let metrics = http(&node, "/metrics").1;
    let online = |path: &Path, yes: u8| {
        let label = format!("path=\"{}\"", path.display());
        let mut lines = metrics.lines();
        let line = lines.find(|it| it.starts_with("kvar_device_online") && it.contains(&label));
        assert!(line.unwrap().ends_with(&format!(" {yes}.0")), "{line:?}");
    };
    online(&path, 0);
    online(&dir.path().join("a"), 1);
    assert!(
        !metrics.contains("cause=\"device_lost\"} 0\n"),
        "lost blocks are counted"
    );
    // Every block has a place again.
    for id in ids.iter().filter(|id| !left.contains(id)) {
        assert_eq!(
            peer.put(*id, &[&bytes_of(id, 20_000)], true),
            PutOutcome::Stored
        );
    }
    assert_eq!(present(&node, &ids).len(), ids.len());

    // Replaced: its blocks are where they are now, or misses; nothing is wrong.
    let new = dir.path().join("new");
    let replace = json!({ "action": "replace", "device": path, "path": new, "size": 96 << 20 });
    let (code, answer) = post_devices(&node, &replace);
    assert_eq!(
        (code, &answer["state"], &answer["slot"]),
        (200, &"online".into(), &1.into())
    );
    assert_eq!(device(&node, &path)["state"], "retired");
    let left = present(&node, &ids);
    fill(
        &node,
        &ids.iter()
            .filter(|id| !left.contains(id))
            .copied()
            .collect::<Vec<_>>(),
    );
    assert_eq!(present(&node, &ids).len(), ids.len());
    stop(node);
    // The settings still name the dead one; the table knows better.
    let node = start(&config);
    assert_eq!(present(&node, &ids).len(), ids.len());
}

#[test]
fn the_last_device_is_not_fenced_and_memory_serves_on() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["a"]);
    let node = start(&config);
    let ids = ids(40);
    fill(&node, &ids);
    stop(node);
    let node = start(&config);
    let mut peer = Peer::greet(&node);
    // Half of them are in memory before the device goes.
    assert_eq!(present(&node, &ids[..20]).len(), 20);
    let path = dir.path().join("a");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    // Reads that fail make the keeper ask the device itself, which does not answer either.
    for id in &ids[20..] {
        // Again and again: after a start the engine prepares segments, and what it writes makes a file
        // of it, which reads as zeros. That is no read that fails, and afterwards nothing is left to be
        // asked for.
        file.set_len(0).unwrap();
        assert!(peer.get(*id).is_err());
    }
    until("the keeper's verdict", || {
        let found = device(&node, &path);
        let why = found["reason"].as_str().unwrap_or_default();
        why.contains("does not answer")
    });
    assert_eq!(device(&node, &path)["state"], "online");
    assert_eq!(present(&node, &ids[..20]).len(), 20, "memory serves on");
}

#[test]
fn devices_come_and_go_on_an_operators_word() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["a"]);
    let node = start(&config);
    let ids = ids(60);
    fill(&node, &ids);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let add = json!({ "action": "add", "path": b, "size": 96 << 20 });

    // Without the key, or with it over something else, nothing happens.
    let bare = support::request(&node, "POST", "/v1/devices", &add.to_string(), &[]);
    assert_eq!(bare.0, 403, "{}", bare.1);
    let wrong = support::proof_headers(&key_of(&node), "/v1/devices", "{}");
    let bare = support::request(&node, "POST", "/v1/devices", &add.to_string(), &wrong);
    assert_eq!(bare.0, 403, "{}", bare.1);
    assert!(!b.exists());

    let refuse = |body: Value, code: u16, part: &str| {
        let (found, answer) = post_devices(&node, &body);
        let why = answer["error"].as_str().unwrap_or_default().to_owned();
        assert!(
            found == code && why.contains(part),
            "{body}: {found} {answer}"
        );
    };
    refuse(json!({ "action": "explode" }), 400, "explode");
    refuse(
        json!({ "action": "retire", "device": "0" }),
        409,
        "last device",
    );
    refuse(
        json!({ "action": "retire", "device": "9" }),
        409,
        "kvar device list",
    );
    refuse(
        json!({ "action": "add", "path": a }),
        409,
        "in service already",
    );
    refuse(json!({ "action": "add", "path": b }), 409, "how large");
    refuse(
        json!({ "action": "add", "path": b, "size": 1 << 20 }),
        409,
        "too few",
    );
    assert!(!b.exists(), "nothing is left behind");
    let foreign = dir.path().join("foreign");
    std::fs::write(&foreign, b"somebody's thesis ".repeat(1 << 20)).unwrap();
    refuse(
        json!({ "action": "add", "path": foreign, "erase": true }),
        409,
        "not kvar's",
    );
    let other = tempfile::tempdir().unwrap();
    stop(start(&support::config(other.path(), 2)));
    let theirs: PathBuf = other.path().join("data");
    refuse(json!({ "action": "add", "path": theirs }), 409, "--erase");

    let (code, answer) = post_devices(&node, &add);
    assert_eq!(
        (code, &answer["state"], &answer["slot"]),
        (200, &"online".into(), &1.into())
    );
    // Half of the blocks belong to the new one now; they are put again.
    let left = present(&node, &ids);
    assert!(left.len() < ids.len());
    fill(
        &node,
        &ids.iter()
            .filter(|id| !left.contains(id))
            .copied()
            .collect::<Vec<_>>(),
    );
    assert!(device(&node, &b)["blocks"].as_u64() > Some(10));
    stop(node);

    // It belongs to the store from now on, though no setting names it.
    let node = start(&config);
    assert_eq!(present(&node, &ids).len(), ids.len());
    let (code, answer) = post_devices(
        &node,
        &json!({ "action": "retire", "device": "1", "now": true }),
    );
    assert_eq!(
        (code, &answer["state"]),
        (200, &"retired".into()),
        "{answer}"
    );
    let mut peer = Peer::greet(&node);
    let gone: Vec<BlockId> = ids
        .iter()
        .filter(|id| peer.get(**id).is_err())
        .copied()
        .collect();
    // What was there before the device came is still there: nothing moved.
    let refilled = gone
        .iter()
        .all(|id| peer.put(*id, &[b"x"], false) == PutOutcome::Stored);
    assert!(refilled);
    // Retired is for good: it comes back empty.
    let (code, answer) = post_devices(&node, &json!({ "action": "add", "path": b }));
    assert_eq!(
        (code, &answer["state"]),
        (200, &"online".into()),
        "{answer}"
    );
    assert_eq!(device(&node, &b)["blocks"], 0);
    for id in &gone {
        assert_ne!(
            peer.put(*id, &[b"x"], false),
            PutOutcome::Refused(Refusal::Busy)
        );
    }
}
