//! How long a node keeps what: times to live and leases, asked in the bare protocol.

mod support;

use kvar_base::{BlockId, LeaseToken, MissReason, PutOutcome};
use kvar_node::{Hooks, Node, Readiness};
use kvar_wire::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use support::{Peer, bytes_of, config, start, until};

fn ids(count: usize) -> Vec<BlockId> {
    let key = kvar_base::NamespaceKey::new([9; 32]);
    (0..count)
        .map(|number| BlockId::from_name(&key, &format!("block {number}")))
        .collect()
}

fn lease(ids: &[BlockId], token: LeaseToken, client: u64, ttl_ms: u32) -> Lease {
    Lease {
        ids: ids.to_vec(),
        first_depth: 0,
        touch_request: 0,
        token,
        client,
        ttl_ms,
        deadline_us: 10_000_000,
    }
}

fn ask_lease(peer: &mut Peer, lease: &Lease) -> LeaseAnswer {
    match peer.ask(lease) {
        Message::LeaseAnswer(answer) => answer,
        other => panic!("{other:?}"),
    }
}

fn renew(peer: &mut Peer, token: LeaseToken, ttl_ms: u32) -> u32 {
    let renew = Renew {
        token,
        ttl_ms,
        deadline_us: 10_000_000,
    };
    match peer.ask(&renew) {
        Message::RenewAnswer(answer) => answer.lasts_ms,
        other => panic!("{other:?}"),
    }
}

fn release(peer: &mut Peer, token: LeaseToken) -> bool {
    let release = Release {
        token,
        deadline_us: 10_000_000,
    };
    match peer.ask(&release) {
        Message::ReleaseAnswer(answer) => answer.released,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_lease_spans_shards_and_outlives_the_link_that_took_it() {
    for shards in [1, 3] {
        let dir = tempfile::tempdir().unwrap();
        let node = start(&config(dir.path(), shards));
        let mut one = Peer::greet(&node);
        let ids = ids(12);
        for id in &ids[..10] {
            assert_eq!(
                one.put(*id, &[&bytes_of(id, 5000)], false),
                PutOutcome::Stored
            );
        }
        let token = LeaseToken::new([shards as u8; 16]);
        let answer = ask_lease(&mut one, &lease(&ids, token, 1, 20_000));
        assert_eq!(
            (answer.leading, answer.reason),
            (10, Some(MissReason::Absent))
        );
        assert!((15_000..=20_000).contains(&answer.lasts_ms), "{answer:?}");
        // Nothing said is the default; too much is cut.
        let other = LeaseToken::new([100; 16]);
        let short = ask_lease(&mut one, &lease(&ids[..3], other, 1, 0));
        assert!(short.leading == 3 && short.reason.is_none(), "{short:?}");
        assert!((1..=2000).contains(&short.lasts_ms), "{short:?}");
        assert!((20_000..=30_000).contains(&renew(&mut one, other, u32::MAX)));
        assert!(release(&mut one, other) && !release(&mut one, other));
        drop(one);
        let mut two = Peer::greet(&node);
        assert!((20_000..=30_000).contains(&renew(&mut two, token, 30_000)));
        // A remove wins, and leaves the rest of the lease as it is.
        let remove = Remove {
            ids: vec![ids[4]],
            deadline_us: 10_000_000,
        };
        two.ask(&remove);
        assert_eq!(two.get(ids[4]), Err(MissReason::Absent));
        assert!(two.get(ids[5]).is_ok());
        assert!(release(&mut two, token));
        assert_eq!(renew(&mut two, token, 1000), 0);
        // No such blocks, no ids, no time.
        let none = ask_lease(&mut two, &lease(&ids[10..], token, 1, 1000));
        assert_eq!((none.leading, none.lasts_ms), (0, 0));
        let empty = ask_lease(&mut two, &lease(&[], token, 1, 1000));
        assert_eq!((empty.leading, empty.reason), (0, None));
        let late = Lease {
            deadline_us: 0,
            ..lease(&ids, token, 1, 1000)
        };
        assert_eq!(
            ask_lease(&mut two, &late).reason,
            Some(MissReason::Deadline)
        );
        node.shutdown();
        assert!(node.wait().defects.is_empty());
    }
}

fn leased_blocks(node: &kvar_node::NodeHandle) -> u64 {
    let (_, text) = support::http(node, "/metrics");
    let lines = text.lines().filter_map(|line| {
        let value = line.strip_prefix("kvar_leased_blocks")?;
        value.rsplit(' ').next()?.parse::<f64>().ok()
    });
    lines.sum::<f64>() as u64
}

/// Every shard grants what it has of the chain without knowing of the others' gaps: what lies behind
/// the first one is given back at once, not when the lease ends.
#[test]
fn blocks_behind_a_gap_are_not_held() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 3));
    let mut peer = Peer::greet(&node);
    let ids = ids(40);
    for id in ids.iter().filter(|id| **id != ids[0] && **id != ids[5]) {
        let put = peer.put(*id, &[&bytes_of(id, 5000)], false);
        assert_eq!(put, PutOutcome::Stored);
    }
    let token = LeaseToken::new([7; 16]);
    let answer = ask_lease(&mut peer, &lease(&ids[1..], token, 1, 30_000));
    assert_eq!(
        (answer.leading, answer.reason),
        (4, Some(MissReason::Absent))
    );
    // Long before the lease ends.
    let begun = Instant::now();
    let held = std::fmt::from_fn(|f| write!(f, "as many are held: {}", leased_blocks(&node)));
    until(&held, || leased_blocks(&node) == 4);
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert!(release(&mut peer, token));
    // Nothing is promised: there is no lease.
    let answer = ask_lease(&mut peer, &lease(&ids, token, 1, 30_000));
    assert_eq!((answer.leading, answer.lasts_ms), (0, 0));
    until(&held, || leased_blocks(&node) == 0);
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert!(!release(&mut peer, token));
}

#[test]
fn one_client_holds_a_share_and_another_still_gets_some() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let mut peer = Peer::greet(&node);
    let ids = ids(100);
    for id in &ids {
        let mut put = Peer::put_message(*id, &[&bytes_of(id, 60_000)], false);
        put.hints.ephemeral = true;
        let request = peer.number();
        peer.send_with(request, &put, &bytes_of(id, 60_000));
        let stored = PutAnswer {
            outcome: PutOutcome::Stored,
        };
        assert_eq!(peer.receive().1, stored.into());
    }
    // 24 MiB of memory: a tenth is 2.4 MiB, a quarter of that 10 blocks of 60 KiB.
    let first = lease(&ids, LeaseToken::new([1; 16]), 1, 20_000);
    let answer = ask_lease(&mut peer, &first);
    assert_eq!(answer.reason, Some(MissReason::Overloaded));
    assert!((8..=11).contains(&answer.leading), "{answer:?}");
    let again = lease(&ids[50..], LeaseToken::new([2; 16]), 1, 20_000);
    assert_eq!(ask_lease(&mut peer, &again).leading, 0);
    let other = lease(&ids[50..], LeaseToken::new([3; 16]), 2, 20_000);
    assert_eq!(ask_lease(&mut peer, &other).leading, answer.leading);
}

#[test]
fn a_block_with_a_time_to_live_ends_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let settings = config(dir.path(), 2);
    let node = start(&settings);
    let mut peer = Peer::greet(&node);
    let ids = ids(2);
    let bytes = bytes_of(&ids[0], 3000);
    for (id, ttl_s) in ids.iter().zip([2, 3600]) {
        let mut put = Peer::put_message(*id, &[&bytes], true);
        put.sections = support::sections_of(id, &[&bytes]);
        put.hints.ttl_s = Some(ttl_s);
        let request = peer.number();
        peer.send_with(request, &put, &bytes);
        let stored = PutAnswer {
            outcome: PutOutcome::Stored,
        };
        assert_eq!(peer.receive().1, stored.into());
    }
    let put = Instant::now();
    assert!(peer.get(ids[0]).is_ok());
    let stat = Stat {
        id: ids[1],
        deadline_us: 10_000_000,
    };
    let Message::StatAnswer(StatAnswer { stat: Ok(stat) }) = peer.ask(&stat) else {
        panic!("it is there")
    };
    let now = unix_s();
    let expires = stat.expires_unix_s.unwrap();
    assert!(
        (now + 3500..now + 3605).contains(&expires),
        "{expires} {now}"
    );
    until("it ends", || peer.get(ids[0]).is_err());
    let lived = put.elapsed();
    let (early, late) = (Duration::from_millis(1900), Duration::from_secs(10));
    assert!((early..late).contains(&lived), "it lived for {lived:?}");
    assert_eq!(peer.get(ids[0]), Err(MissReason::Expired));
    // Over a restart too.
    drop(peer);
    node.shutdown();
    node.wait();
    let node = start(&settings);
    let mut peer = Peer::greet(&node);
    until("it is loaded", || match peer.get(ids[1]) {
        Err(MissReason::Loading) => false,
        outcome => {
            assert!(outcome.is_ok(), "{outcome:?}");
            true
        }
    });
    assert_eq!(peer.get(ids[0]), Err(MissReason::Expired));
}

/// A machine that learned the time late, or whose clock was set: what was to live for an hour does,
/// by the clock as it is now.
#[test]
fn times_to_live_follow_a_clock_that_is_set() {
    let dir = tempfile::tempdir().unwrap();
    let ahead_s = Arc::new(AtomicU64::new(0));
    let told = ahead_s.clone();
    let hooks = Hooks {
        wall_clock: Some(Arc::new(move || unix_s() + told.load(Ordering::SeqCst))),
        ..Hooks::default()
    };
    let node = Node::listen(&config(dir.path(), 2), hooks).unwrap();
    assert_eq!(node.loaded().unwrap(), Readiness::Ready);
    let mut peer = Peer::greet(&node);
    // Blocks of both shards: every engine must hear of it.
    let ids = ids(16);
    let put = |peer: &mut Peer, id: BlockId| {
        let bytes = bytes_of(&id, 3000);
        let mut put = Peer::put_message(id, &[&bytes], false);
        put.hints.ttl_s = Some(3600);
        let request = peer.number();
        peer.send_with(request, &put, &bytes);
        let stored = PutAnswer {
            outcome: PutOutcome::Stored,
        };
        assert_eq!(peer.receive().1, stored.into());
    };
    for id in &ids {
        put(&mut peer, *id);
    }
    assert!(ids.iter().all(|id| peer.get(*id).is_ok()));
    ahead_s.store(2 * 3600, Ordering::SeqCst);
    for id in &ids {
        until("it ends", || peer.get(*id).is_err());
        assert_eq!(peer.get(*id), Err(MissReason::Expired));
    }
    // What is put now lives for an hour of the new time.
    put(&mut peer, ids[0]);
    let stat = Stat {
        id: ids[0],
        deadline_us: 10_000_000,
    };
    let Message::StatAnswer(StatAnswer { stat: Ok(stat) }) = peer.ask(&stat) else {
        panic!("it is there")
    };
    let expires = stat.expires_unix_s.unwrap();
    assert!(expires > unix_s() + 3 * 3600 - 60, "{expires} {}", unix_s());
}

/// The clock is set while a shard is still being read back: it began with the old time.
#[test]
fn an_engine_that_comes_after_the_clock_was_set_knows_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 2);
    let node = Node::listen(&config, Hooks::default()).unwrap();
    assert_eq!(node.loaded().unwrap(), Readiness::Ready);
    let mut peer = Peer::greet(&node);
    let ids = ids(16);
    let (short, long) = ids.split_at(8);
    for (ids, ttl_s) in [(short, 3600), (long, 3 * 3600)] {
        for id in ids {
            let bytes = bytes_of(id, 3000);
            let mut put = Peer::put_message(*id, &[&bytes], true);
            put.hints.ttl_s = Some(ttl_s);
            let request = peer.number();
            peer.send_with(request, &put, &bytes);
            let outcome = PutOutcome::Stored;
            assert_eq!(peer.receive().1, PutAnswer { outcome }.into());
        }
    }
    drop(peer);
    node.shutdown();
    node.wait();

    // Both loads stand still until the keeper has seen the new time and looked once more, behind
    // its word to the threads.
    let clock = Arc::new((Mutex::new((0, 0)), Condvar::new()));
    let (told, held) = (clock.clone(), clock.clone());
    let hooks = Hooks {
        wall_clock: Some(Arc::new(move || {
            let (state, changed) = &*told;
            let mut state = state.lock().unwrap();
            let (ahead_s, seen) = &mut *state;
            *seen += u32::from(*ahead_s > 0);
            changed.notify_all();
            unix_s() + *ahead_s
        })),
        loading: Some(Arc::new(move |_, _| {
            let (state, changed) = &*held;
            let guard = state.lock().unwrap();
            drop(changed.wait_while(guard, |(_, seen)| *seen < 2).unwrap());
        })),
        ..Hooks::default()
    };
    let node = Node::listen(&config, hooks).unwrap();
    let mut peer = Peer::greet(&node);
    assert_eq!(peer.get(ids[0]), Err(MissReason::Loading));
    clock.0.lock().unwrap().0 = 2 * 3600;
    assert_eq!(node.loaded().unwrap(), Readiness::Ready);
    for id in short {
        let found = peer.get(*id);
        assert!(
            matches!(found, Err(MissReason::Expired | MissReason::Absent)),
            "it lives on"
        );
    }
    for id in long {
        assert!(peer.get(*id).is_ok(), "it has an hour left");
    }
}

fn unix_s() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs()
}
