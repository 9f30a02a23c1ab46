//! Many clients at once over few blocks, with every kind of call, clients that vanish in the middle
//! and memory that is too small: every byte that comes back is one complete put of that block, and
//! afterwards the node has nothing left open.

mod support;

use kvar_base::{BlockId, NamespaceKey, PutOutcome, Refusal};
use kvar_client::{CallOptions, Client, ClientConfig, GetItem, GetOutcome, PutItem};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::random::{Random, bytes_of, is_one_put};
use support::{PATIENCE, Place};

const CLIENTS: u64 = 6;
const BLOCKS: u64 = 60;
const SOAK: Duration = Duration::from_secs(4);

fn connect(endpoint: &str, key: &NamespaceKey) -> Client {
    let deadline = PATIENCE;
    let connect_timeout = PATIENCE;
    let config = ClientConfig {
        deadline,
        connect_timeout,
        ..ClientConfig::new(endpoint, key.clone())
    };
    Client::connect(config).unwrap()
}

#[test]
fn clients_that_come_and_go_leave_nothing_wrong_and_nothing_open() {
    let dir = tempfile::tempdir().unwrap();
    // Memory for a fraction of the blocks, so that they come from both tiers.
    let server = Place::new(dir.path())
        .with(&[
            "--shards",
            "2",
            "--dram",
            "32MiB",
            "--size",
            "256MiB",
            "--flush-after",
            "50ms",
        ])
        .serve();
    let key = kvar_node::KeyFile::read(&server.key_file).unwrap().key;
    let (hits, nonces) = (AtomicU64::new(0), AtomicU64::new(1));
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (endpoint, key, hits, nonces) = (&server.endpoint, &key, &hits, &nonces);
            scope.spawn(move || work(endpoint, key, number + 1, hits, nonces));
        }
    });
    assert!(
        hits.load(Ordering::Relaxed) > 100,
        "{hits:?} hits are no soak"
    );

    // Every vanished client's links and half puts are gone: any block can be put and removed.
    let client = connect(&server.endpoint, &key);
    let until = Instant::now() + PATIENCE;
    for block in 0..BLOCKS {
        let id = BlockId::from_name(&key, &block.to_string());
        client.remove(&[id], CallOptions::default()).unwrap();
        loop {
            match client.put(vec![PutItem::of_bytes(id, bytes_of(block, 0, 1000))])[0] {
                PutOutcome::Stored => break,
                PutOutcome::InProgress | PutOutcome::Refused(Refusal::Busy)
                    if Instant::now() < until =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                outcome => panic!("block {block}: {outcome:?}"),
            }
        }
    }
    client.flush(CallOptions::default()).unwrap();
    let status = server.json("status", &[]);
    assert_eq!(status["links"]["protocol_errors"], 0);
    assert_eq!(status["links"]["get_misses"]["corrupt"], 0);
    assert_eq!(status["links"]["puts"]["wrong_format"], 0);
    assert_eq!(status["unflushed_puts"], 0);
    assert_eq!(server.stop(), 0);
}

fn work(endpoint: &str, key: &NamespaceKey, seed: u64, hits: &AtomicU64, nonces: &AtomicU64) {
    let mut random = Random(seed * 0x9e37_79b9);
    let mut client = connect(endpoint, key);
    let until = Instant::now() + SOAK;
    let name = |block: u64| BlockId::from_name(key, &block.to_string());
    while Instant::now() < until {
        let block = random.below(BLOCKS);
        match random.below(100) {
            0..40 => {
                let items = (0..8).map(|step| GetItem::to_vec(name((block + step) % BLOCKS)));
                for (step, result) in (0..).zip(client.get(items.collect())) {
                    if let Some(bytes) = result.bytes() {
                        let block = (block + step) % BLOCKS;
                        assert!(is_one_put(block, bytes), "seed {seed}: block {block}");
                        hits.fetch_add(1, Ordering::Relaxed);
                    }
                    let failed = [
                        kvar_base::MissReason::Corrupt,
                        kvar_base::MissReason::Unreachable,
                    ];
                    let bad = failed
                        .into_iter()
                        .any(|reason| result.outcome == GetOutcome::Miss(reason));
                    assert!(!bad, "seed {seed}: {:?}", result.outcome);
                }
            }
            40..75 => {
                let nonce = nonces.fetch_add(1, Ordering::Relaxed);
                // Eager, announced, and as large as a block may be; now and then in sections.
                let len = [17, 4096, 65_536, 65_537, 200_000, 250_000][random.below(6) as usize];
                let bytes = bytes_of(block, nonce, len);
                let item = if random.below(3) == 0 {
                    let pieces: Vec<Vec<u8>> =
                        bytes.chunks(len.div_ceil(5)).map(<[u8]>::to_vec).collect();
                    PutItem::of_pieces(name(block), pieces)
                } else {
                    PutItem::of_bytes(name(block), bytes)
                };
                let pending = client.submit_put(vec![item], CallOptions::default());
                if random.below(12) == 0 {
                    // Vanishes in the middle.
                    drop(pending);
                    client = connect(endpoint, key);
                } else {
                    drop(pending.wait());
                }
            }
            75..85 => {
                let ids: Vec<BlockId> = (0..BLOCKS).map(name).collect();
                assert!(client.lookup(&ids).leading <= ids.len());
                assert_eq!(client.present(&ids).len(), ids.len());
            }
            85..95 => {
                client
                    .remove(&[name(block)], CallOptions::default())
                    .unwrap();
            }
            95..98 => {
                let items = vec![GetItem::to_vec(name(block))];
                drop(client.submit_get(items, CallOptions::within(Duration::from_micros(200))));
            }
            _ => client.flush(CallOptions::default()).unwrap(),
        }
    }
}
