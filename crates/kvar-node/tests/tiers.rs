//! Two tiers of flash in one node: what the fast device has no room for is a hit from the big one, what is
//! removed on its way down stays removed, and either tier may go.

mod support;

use kvar_base::{BlockId, ByteSize, LeaseToken, MissReason, PutOutcome, Refusal};
use kvar_node::{Config, DataPath, DeviceTier, Node, NodeHandle};
use kvar_wire::*;
use serde_json::{Value, json};
use std::path::Path;
use support::store::{device, ids, remove, stop};
use support::{PATIENCE, Peer, bytes_of, http, post_devices, start, store, until};

const LEN: usize = 64 << 10;
/// Blocks: the fast device holds a third of them, the big one all.
const BLOCKS: u32 = 2400;

fn data(path: &Path, mib: u64, tier: DeviceTier) -> DataPath {
    DataPath {
        path: path.to_path_buf(),
        size: Some(ByteSize(mib << 20)),
        tier: Some(tier),
    }
}

fn config(dir: &Path, shards: u32) -> Config {
    let mut config = support::config(dir, shards);
    config.size = None;
    config.data = vec![
        data(&dir.join("fast"), 64, DeviceTier::Fast),
        data(&dir.join("big"), 400, DeviceTier::Big),
    ];
    config.dram = ByteSize(u64::from(shards) * (36 << 20));
    // What is asked here is where blocks go, not which are worth a write.
    config.set("flash_write_budget", "unlimited").unwrap();
    config
}

fn counters(node: &NodeHandle, name: &str) -> u64 {
    let status: Value = serde_json::from_str(&http(node, "/v1/status").1).unwrap();
    let shards = status["shards"].as_array().unwrap().iter();
    shards
        .map(|shard| shard["engine"]["counters"][name].as_u64().unwrap())
        .sum()
}

/// Puts blocks, as fast as they are taken; no faster than they go down, so that all of them arrive.
fn fill(node: &NodeHandle, ids: &[BlockId]) {
    let mut peer = Peer::greet(node);
    for (number, id) in ids.iter().enumerate() {
        until("there is room in memory", || {
            match peer.put(*id, &[&bytes_of(id, LEN)], false) {
                PutOutcome::Stored => true,
                PutOutcome::Refused(Refusal::Busy) => false,
                outcome => panic!("{outcome:?}"),
            }
        });
        if number % 64 == 0 {
            flush(&mut peer);
        }
    }
    flush(&mut peer);
}

/// Everything is on a device; asked again where a device goes meanwhile.
fn flush(peer: &mut Peer) {
    let deadline_us = PATIENCE.as_micros() as u64;
    until("a flush is through", || {
        let Message::FlushAnswer(answer) = peer.ask(&Flush { deadline_us }) else {
            panic!("something else is answered");
        };
        match answer.finished {
            Finished::Done(_) => true,
            Finished::Failed(text) if text.contains("try again") => false,
            other => panic!("{other:?}"),
        }
    });
}

fn lookup(node: &NodeHandle, ids: &[BlockId], leading_only: bool) -> LookupAnswer {
    let lookup = Lookup {
        ids: ids.to_vec(),
        first_depth: 0,
        leading_only,
        touch_request: 0,
        deadline_us: PATIENCE.as_micros() as u64,
    };
    match Peer::greet(node).ask(&lookup) {
        Message::LookupAnswer(answer) => answer,
        other => panic!("{other:?}"),
    }
}

fn present(node: &NodeHandle, ids: &[BlockId]) -> Vec<BlockId> {
    store::present(node, ids, LEN)
}

/// What left the store for a reason that is counted: too late or not wanted below, or another block
/// needed the place of its index entry.
fn lost(node: &NodeHandle) -> usize {
    let reasons = ["not_worth", "limit", "busy", "late", "gone", "failed"];
    let each = reasons.map(|reason| counters(node, &format!("not_demoted_{reason}")));
    (each.iter().sum::<u64>() + counters(node, "bucket_evicted")) as usize
}

#[test]
fn what_the_fast_device_has_no_room_for_is_a_hit_from_the_big_one() {
    for shards in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let node = start(&config(dir.path(), shards));
        let ids = ids(0, BLOCKS);
        fill(&node, &ids);
        let demoted = counters(&node, "demoted");
        assert!(demoted > u64::from(BLOCKS) / 3, "{demoted}");
        // A machine that is busy may have been too slow for some; they are counted.
        let lost = lost(&node);
        let found = present(&node, &ids);
        assert!(
            found.len() + lost >= ids.len(),
            "{} and {lost}",
            found.len()
        );
        assert!(lost < ids.len() / 10, "{lost} were lost");
        let LookupAnswer::Each(bitmap) = lookup(&node, &ids, false) else {
            panic!("each was asked for")
        };
        let seen = bitmap.bits(ids.len()).into_iter().filter(|it| *it).count();
        assert_eq!(seen, found.len());
        assert_eq!(
            lookup(&node, &found, true),
            LookupAnswer::Leading(found.len() as u32, None)
        );

        // Both tiers say what they are.
        let status: Value = serde_json::from_str(&http(&node, "/v1/status").1).unwrap();
        let tiers = status["tiers"].as_array().unwrap();
        assert_eq!(
            (&tiers[0]["tier"], &tiers[1]["tier"]),
            (&"fast".into(), &"big".into())
        );
        assert!(tiers[1]["blocks"].as_u64().unwrap() > u64::from(BLOCKS) / 3);
        let memory = |at: usize| tiers[at]["dram_bytes_max"].as_u64().unwrap();
        assert!(memory(0) > memory(1));
        assert_eq!(device(&node, &dir.path().join("big"))["tier"], "big");
        let metrics = http(&node, "/metrics").1;
        for line in [
            "kvar_tier_blocks{tier=\"big\"}",
            "kvar_demoted_blocks_total ",
            "kvar_demoted_from_memory_blocks_total ",
            "kvar_not_demoted_total{reason=\"late\"}",
        ] {
            assert!(metrics.contains(line), "{line} in {metrics}");
        }

        // And after a stop and a start.
        stop(node);
        let node = start(&config(dir.path(), shards));
        assert_eq!(present(&node, &found).len(), found.len());
        // Removed from wherever it lies.
        let (gone, left) = found.split_at(100);
        assert!(matches!(remove(&node, gone), Finished::Done(count) if count >= 100));
        assert!(present(&node, gone).is_empty());
        assert_eq!(present(&node, &left[..50]).len(), 50);
        stop(node);
        let node = start(&config(dir.path(), shards));
        assert!(present(&node, gone).is_empty());
        stop(node);
    }
}

/// Beyond the write budget of the fast device what is worth no place there was lost, however much room the
/// big one had.
#[test]
fn what_memory_lets_go_beyond_the_write_budget_is_a_hit_from_the_big_device() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 2);
    config.set("flash_write_budget", "1MiB").unwrap();
    let node = start(&config);
    let ids = ids(0, 2 * BLOCKS);
    let mut peer = Peer::greet(&node);
    for id in &ids {
        until("there is room in memory", || {
            match peer.put(*id, &[&bytes_of(id, LEN)], false) {
                PutOutcome::Stored => true,
                PutOutcome::Refused(Refusal::Busy) => false,
                outcome => panic!("{outcome:?}"),
            }
        });
    }
    flush(&mut peer);
    let from_memory = counters(&node, "demoted_from_memory");
    assert!(from_memory > u64::from(BLOCKS) / 4, "{from_memory}");
    // A machine that is busy may have been too slow for some; they are counted.
    let lost = lost(&node) + counters(&node, "dram_evicted_gone") as usize;
    let found = present(&node, &ids);
    assert!(
        found.len() + lost >= ids.len(),
        "{} and {lost}",
        found.len()
    );
    let without = ids.len() - from_memory as usize;
    assert!(found.len() > without, "{} of {}", found.len(), ids.len());
    stop(node);
}

#[test]
fn a_lease_over_both_tiers_promises_the_whole_chain_and_gives_back_what_is_behind_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let all = ids(0, BLOCKS);
    fill(&node, &all);
    let found = present(&node, &all);
    // Old ones, new ones, in turn: each engine of each tier has some.
    let (old, new) = (&found[..20], &found[found.len() - 20..]);
    let mut chain: Vec<BlockId> = old.iter().zip(new).flat_map(|it| [*it.0, *it.1]).collect();
    let lease = |chain: &[BlockId], token: u8| {
        let lease = Lease {
            ids: chain.to_vec(),
            first_depth: 0,
            touch_request: 0,
            token: LeaseToken::new([token; 16]),
            client: u64::from(token),
            ttl_ms: 20_000,
            deadline_us: PATIENCE.as_micros() as u64,
        };
        match Peer::greet(&node).ask(&lease) {
            Message::LeaseAnswer(answer) => answer,
            other => panic!("{other:?}"),
        }
    };
    let leased = |node: &NodeHandle| {
        let status: Value = serde_json::from_str(&http(node, "/v1/status").1).unwrap();
        let shards = status["shards"].as_array().unwrap().iter();
        let each = shards.map(|shard| shard["engine"]["leased_blocks"].as_u64().unwrap());
        each.sum::<u64>()
    };
    let answer = lease(&chain, 1);
    assert_eq!((answer.leading, answer.reason), (40, None));
    assert!(answer.lasts_ms > 10_000);
    assert_eq!(leased(&node), 40);
    // A gap: what is behind it is promised by nobody.
    chain.insert(13, BlockId::new([0xee; 32]));
    let answer = lease(&chain, 2);
    assert_eq!(
        (answer.leading, answer.reason),
        (13, Some(MissReason::Absent))
    );
    until("what is behind the gap is given back", || {
        leased(&node) == 40
    });
    stop(node);
}

#[test]
fn what_is_removed_on_its_way_down_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let all = ids(0, BLOCKS);
    let mut removed: Vec<BlockId> = Vec::new();
    std::thread::scope(|scope| {
        let filling = scope.spawn(|| fill(&node, &all));
        // The oldest blocks are those on their way: one after the other, while others come in.
        let mut at = 0;
        while !filling.is_finished() {
            let demoted = counters(&node, "offered") as usize;
            let next = (demoted + at % 97).min(all.len() - 1);
            let some = &all[next.saturating_sub(40)..next];
            at += 1;
            if demoted > 0 && matches!(remove(&node, some), Finished::Done(_)) {
                removed.extend(some);
                // Acknowledged: gone from this moment on, unless it is put now.
                let put_later = 500 + demoted;
                if next + put_later < all.len() {
                    assert!(present(&node, some).is_empty(), "removed and there");
                }
            }
        }
        filling.join().unwrap();
    });
    assert!(counters(&node, "demoted") > 0);
    assert!(removed.len() > 200, "{}", removed.len());
    // Whatever was on its way has arrived by now.
    let back = present(&node, &removed);
    let oldest = &all[..all.len() - 1200];
    let back: Vec<_> = back.iter().filter(|id| oldest.contains(id)).collect();
    assert!(back.is_empty(), "{} came back", back.len());
    stop(node);
}

#[test]
fn a_purge_takes_what_is_on_its_way_too() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let all = ids(0, BLOCKS / 2);
    fill(&node, &all);
    let purge = Purge {
        deadline_us: PATIENCE.as_micros() as u64,
    };
    match Peer::greet(&node).ask(&purge) {
        Message::PurgeAnswer(answer) => assert!(matches!(answer.finished, Finished::Done(_))),
        other => panic!("{other:?}"),
    }
    assert!(present(&node, &all).is_empty());
    stop(node);
}

#[test]
fn either_tier_may_go_and_come() {
    let dir = tempfile::tempdir().unwrap();
    let (fast, big) = (dir.path().join("fast"), dir.path().join("big"));
    let config = config(dir.path(), 2);
    let node = start(&config);
    let all = ids(0, BLOCKS);
    fill(&node, &all);
    let below = device(&node, &big)["blocks"].as_u64().unwrap();
    assert!(below > u64::from(BLOCKS) / 3);
    // The big one goes at once, while blocks are on their way to it.
    let more = ids(10_000, 600);
    let offered = counters(&node, "offered");
    std::thread::scope(|scope| {
        let filling = scope.spawn(|| fill(&node, &more));
        until("blocks go down again", || {
            counters(&node, "offered") > offered
        });
        let retire = json!({ "action": "retire", "device": big, "now": true });
        let (code, answer) = post_devices(&node, &retire);
        assert_eq!(code, 200, "{answer}");
        filling.join().unwrap();
    });
    let newest = &more[more.len() - 300..];
    assert_eq!(present(&node, newest).len(), 300, "the fast tier serves on");
    let demoted = counters(&node, "demoted");
    fill(&node, &ids(20_000, 300));
    assert_eq!(counters(&node, "demoted"), demoted, "there is nobody below");

    // Another one comes in its place.
    let new = dir.path().join("new");
    let add = json!({ "action": "add", "path": new, "size": 400 << 20, "tier": "big" });
    let (code, answer) = post_devices(&node, &add);
    assert_eq!((code, &answer["tier"]), (200, &"big".into()), "{answer}");
    fill(&node, &ids(30_000, 1500));
    assert!(counters(&node, "demoted") > demoted);

    // The fast one leaves: its blocks move down, and new ones come to the big one.
    let last = ids(40_000, 200);
    fill(&node, &last);
    let retire = json!({ "action": "retire", "device": fast });
    let (code, answer) = post_devices(&node, &retire);
    assert_eq!(
        (code, &answer["state"]),
        (200, &"leaving".into()),
        "{answer}"
    );
    until("the fast device has left", || {
        device(&node, &fast)["state"] == "retired"
    });
    assert_eq!(present(&node, &last).len(), last.len());
    let alone = ids(50_000, 200);
    fill(&node, &alone);
    assert_eq!(present(&node, &alone).len(), alone.len());
    stop(node);
    let node = start(&config);
    assert_eq!(device(&node, &new)["tier"], "big", "the table knows it");
    assert_eq!(present(&node, &alone).len(), alone.len());
    stop(node);
}

#[test]
fn a_big_device_that_is_not_there_at_start_costs_its_blocks_alone() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 1);
    let node = start(&config);
    let all = ids(0, BLOCKS);
    fill(&node, &all);
    let newest = present(&node, &all[all.len() - 300..]);
    stop(node);
    let (path, away) = (dir.path().join("big"), dir.path().join("away"));
    std::fs::rename(&path, &away).unwrap();
    let node = start(&config);
    assert_eq!(present(&node, &newest).len(), newest.len());
    // Removed meanwhile: gone there, too, when it is back.
    let oldest = &all[..50];
    assert!(matches!(remove(&node, oldest), Finished::Done(_)));
    std::fs::rename(&away, &path).unwrap();
    let (code, answer) = post_devices(&node, &json!({ "action": "add", "path": path }));
    assert_eq!((code, &answer["tier"]), (200, &"big".into()), "{answer}");
    assert!(present(&node, oldest).is_empty());
    stop(node);
}

#[test]
fn the_settings_say_which_tier_and_say_no_to_a_wrong_one() {
    let parse = |text: &str| DataPath::parse(text).unwrap();
    assert_eq!(
        parse("/a=1GiB,big"),
        data(Path::new("/a"), 1024, DeviceTier::Big)
    );
    assert_eq!(parse("/a,fast").tier, Some(DeviceTier::Fast));
    assert_eq!((parse("/a").tier, parse("/a=1GiB").tier), (None, None));
    // A path may have a comma.
    assert_eq!(parse("/a,b").path, Path::new("/a,b"));
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 1);
    stop(start(&config));
    // Said again, or not said: what it was. Said otherwise: what it says now, with a note.
    config.data[1].tier = None;
    let node = start(&config);
    assert_eq!(device(&node, &dir.path().join("big"))["tier"], "big");
    stop(node);
    config.data[1].tier = Some(DeviceTier::Fast);
    let node = start(&config);
    assert_eq!(device(&node, &dir.path().join("big"))["tier"], "fast");
    let notes = node.facts().notes.join("\n");
    assert!(notes.contains("was big and is fast from now on"), "{notes}");
    stop(node);
    let add = json!({ "action": "add", "path": "/x", "tier": "slow" });
    let node = start(&config);
    let (code, answer) = post_devices(&node, &add);
    assert_eq!(code, 400, "{answer}");
    stop(node);
    drop(Node::start(&config).unwrap());
}
