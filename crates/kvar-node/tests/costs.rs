//! What a get of 64 KiB costs a node's thread in the steady state, in counts that do not depend on how
//! busy the machine is: memory allocations and system calls, from a link's socket to the device and back.
//!
//! Each bound says what is behind it. A count that goes up is a change of the hot path that nobody asked
//! for: look for it before you raise the bound. (A client that sleeps between its gets makes the node
//! sleep too, which is what is counted here; a thread that spins makes fewer calls.)

mod support;

use allocation_counter::measure;
use kvar_base::{BlockId, ByteSize, NamespaceKey, PutOutcome};
use kvar_node::{Hooks, Node, NodeHandle};
use kvar_wire::{Flush, GetAnswer, GetOutcome, Message};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use support::{Peer, bytes_of, config, http, until};

const LEN: usize = 64 << 10;

/// Of a get from memory: the tree of recency takes a node for six blocks. 0.18 alone, 0.26 with sixteen
/// under way.
const HIT_ALLOCATIONS_MAX: f64 = 0.4;
/// Of a get from the device: as above, and of the block that comes into memory and the one that leaves. 0.44.
const READ_ALLOCATIONS_MAX: f64 = 0.6;
/// From memory, one under way: sleep, receive, send.
const HIT_CALLS_QD1_MAX: f64 = 3.3;
/// Sixteen under way, over one ring: they come and go together.
const HIT_CALLS_QD16_MAX: f64 = 1.0;
/// From the device, one under way, over one ring: sleep, receive, hand over and sleep, send.
const READ_CALLS_QD1_MAX: f64 = 4.3;
/// Sixteen under way: some are answered together.
const READ_CALLS_QD16_MAX: f64 = 1.5;

struct Counted {
    node: NodeHandle,
    allocations: Arc<AtomicU64>,
    peer: Peer,
    ids: Vec<BlockId>,
    _dir: tempfile::TempDir,
}

impl Counted {
    /// A node of one thread that has so many blocks, in so much memory.
    fn start(blocks: usize, dram: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = config(dir.path(), 1);
        settings.size = Some(ByteSize(256 << 20));
        settings.dram = ByteSize(dram);
        let allocations = Arc::new(AtomicU64::new(0));
        let sum = allocations.clone();
        let hooks = Hooks {
            around: Some(Arc::new(move |round: &mut dyn FnMut()| {
                let count = measure(round).count_total;
                sum.fetch_add(count, Ordering::Relaxed);
            })),
            ..Hooks::default()
        };
        let node = Node::listen(&settings, hooks).unwrap();
        node.loaded().unwrap();
        let mut peer = Peer::greet(&node);
        let key = NamespaceKey::new([9; 32]);
        let ids: Vec<_> = (0..blocks)
            .map(|number| BlockId::from_name(&key, &format!("block {number}")))
            .collect();
        for id in &ids {
            // What does not fit memory waits for the device, by being refused.
            let bytes = bytes_of(id, LEN);
            until("room for a block", || {
                peer.put(*id, &[&bytes], false) == PutOutcome::Stored
            });
        }
        let flush = Flush {
            deadline_us: 30_000_000,
        };
        assert!(matches!(peer.ask(&flush), Message::FlushAnswer(_)));
        Self {
            node,
            allocations,
            peer,
            ids,
            _dir: dir,
        }
    }

    fn status(&self) -> Value {
        serde_json::from_str(&http(&self.node, "/v1/status").1).unwrap()
    }

    /// Gets blocks in turn, so many at once.
    fn get(&mut self, rounds: usize, depth: usize) {
        let ids: Vec<_> = self.ids.iter().cycle().take(rounds).copied().collect();
        for ids in ids.chunks(depth) {
            for id in ids {
                let number = self.peer.number();
                let get = Peer::get_message(vec![Peer::item(*id)]);
                self.peer.send(number, &get);
            }
            for _ in ids {
                let (_, message, payload) = self.peer.receive();
                let Message::GetAnswer(GetAnswer { outcome, .. }) = message else {
                    panic!("{message:?}")
                };
                assert!(matches!(outcome, GetOutcome::Hit { .. }), "{outcome:?}");
                assert_eq!(payload.len(), LEN);
            }
        }
    }

    /// Allocations and system calls a get, and the part that came from the device.
    fn cost(&mut self, rounds: usize, depth: usize) -> (f64, f64, f64) {
        self.get(rounds, depth);
        let sums = |it: &Self| {
            let status = it.status();
            let calls = status["threads"][0]["system_calls"].as_u64().unwrap();
            let reads = status["shards"][0]["engine"]["counters"]["flash_hits"].as_u64();
            (calls, reads.unwrap_or_else(|| panic!("{status:#}")))
        };
        let before = sums(self);
        let allocated = self.allocations.load(Ordering::Relaxed);
        self.get(rounds, depth);
        let allocated = self.allocations.load(Ordering::Relaxed) - allocated;
        let after = sums(self);
        let each = |count: u64| count as f64 / rounds as f64;
        (
            each(allocated),
            each(after.0 - before.0),
            each(after.1 - before.1),
        )
    }
}

fn holds(what: &str, found: f64, most: f64) {
    println!("{what}: {found:.3} (at most {most})");
    assert!(
        found <= most,
        "{what}: {found:.3} for each get, and {most} were enough before"
    );
}

/// Whether one ring serves all; where the kernel refuses it, that is said and calls are not judged.
fn is_one_ring(node: &Counted) -> bool {
    let status = node.status();
    let reactor = status["threads"][0]["reactor"].as_str().unwrap();
    if reactor != "io_uring" {
        eprintln!("system calls are not judged over {reactor}");
    }
    reactor == "io_uring"
}

#[test]
fn a_get_from_memory_takes_no_memory_and_few_calls() {
    let mut node = Counted::start(256, 128 << 20);
    let (allocations, calls, reads) = node.cost(2048, 1);
    assert!(reads < 0.01, "{reads} came from the device");
    holds("allocations, one", allocations, HIT_ALLOCATIONS_MAX);
    let judged = is_one_ring(&node);
    if judged {
        holds("system calls, one", calls, HIT_CALLS_QD1_MAX);
    }
    let (allocations, calls, _) = node.cost(4096, 16);
    holds("allocations, 16", allocations, HIT_ALLOCATIONS_MAX);
    if judged {
        holds("system calls, 16", calls, HIT_CALLS_QD16_MAX);
    }
}

#[test]
fn a_get_from_the_device_takes_no_memory_and_few_calls() {
    let mut node = Counted::start(1024, 16 << 20);
    let (allocations, calls, reads) = node.cost(2048, 1);
    assert!(reads > 0.7, "{reads} came from the device");
    holds("allocations, one", allocations, READ_ALLOCATIONS_MAX);
    let judged = is_one_ring(&node);
    if judged {
        holds("system calls, one", calls, READ_CALLS_QD1_MAX);
    }
    let (allocations, calls, reads) = node.cost(4096, 16);
    assert!(reads > 0.7, "{reads} came from the device");
    holds("allocations, 16", allocations, READ_ALLOCATIONS_MAX);
    if judged {
        holds("system calls, 16", calls, READ_CALLS_QD16_MAX);
    }
}
