//! What tests of whole stores ask of a node, again and again.

use super::{PATIENCE, Peer, bytes_of, http};
use kvar_base::{BlockId, MissReason, NamespaceKey};
use kvar_node::NodeHandle;
use kvar_wire::{Finished, Message, Remove};
use serde_json::Value;
use std::path::Path;

/// Ids of the blocks with these numbers.
pub(crate) fn ids(from: u32, count: u32) -> Vec<BlockId> {
    let key = NamespaceKey::new([9; 32]);
    let name = |number| BlockId::from_name(&key, &format!("block {number}"));
    (from..from + count).map(name).collect()
}

/// Which of them are there, every byte of their `len` right.
pub(crate) fn present(node: &NodeHandle, ids: &[BlockId], len: usize) -> Vec<BlockId> {
    let mut peer = Peer::greet(node);
    let mut found = Vec::new();
    for id in ids {
        match peer.get(*id) {
            Ok(bytes) => {
                assert!(bytes == bytes_of(id, len), "wrong bytes");
                found.push(*id);
            }
            Err(reason) => assert_eq!(reason, MissReason::Absent),
        }
    }
    found
}

pub(crate) fn remove(node: &NodeHandle, ids: &[BlockId]) -> Finished {
    let deadline_us = PATIENCE.as_micros() as u64;
    let ids = ids.to_vec();
    match Peer::greet(node).ask(&Remove { ids, deadline_us }) {
        Message::RemoveAnswer(answer) => answer.finished,
        other => panic!("{other:?}"),
    }
}

/// Stops a node that has no defect to report.
pub(crate) fn stop(node: NodeHandle) {
    node.shutdown();
    let report = node.wait();
    assert!(report.defects.is_empty(), "{report:?}");
}

pub(crate) fn devices(node: &NodeHandle) -> Vec<Value> {
    serde_json::from_str(&http(node, "/v1/devices").1).unwrap()
}

pub(crate) fn device(node: &NodeHandle, path: &Path) -> Value {
    let path = path.to_str().unwrap();
    let found = devices(node).into_iter().find(|it| it["path"] == path);
    found.unwrap_or_else(|| panic!("{path} in {:?}", devices(node)))
}
