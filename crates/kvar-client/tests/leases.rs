//! Leases when something goes wrong: no answer, a late one, a gap in the chain.

mod peer;

use kvar_base::{BlockId, MissReason};
use kvar_client::*;
use kvar_wire::IDS_MAX;
use peer::{Mood, PATIENCE, Peer, key, until};
use std::time::{Duration, Instant};

const TTL: Duration = Duration::from_secs(30);

fn ids(count: usize) -> Vec<BlockId> {
    (0..count)
        .map(|n| BlockId::from_name(&key(), &n.to_string()))
        .collect()
}

fn client(peer: &Peer) -> Client {
    Client::connect(ClientConfig {
        deadline: PATIENCE,
        ..ClientConfig::new(&peer.address.to_string(), key())
    })
    .unwrap()
}

/// The node granted the lease and its answer never came: it would hold the blocks for half a minute,
/// and nobody would know their token.
#[test]
fn a_lease_of_which_the_answer_is_lost_is_given_back() {
    // The deadline passes; the link breaks.
    for mood in [Mood::Mute, Mood::Cut] {
        let peer = Peer::start();
        let ids = ids(3);
        peer.fill(&ids);
        let client = client(&peer);
        // One that was answered stays.
        let kept = client.lookup_leased(&ids, TTL);
        assert_eq!((kept.leading, peer.leases()), (3, 1));
        peer.set(mood);
        let options = CallOptions::within(Duration::from_millis(300));
        let lost = client.submit_lookup_leased(ids.clone(), TTL, options);
        until("the node grants it", || peer.leases_asked().len() == 2);
        let lost = lost.wait();
        assert_eq!((lost.leading, lost.lease), (0, None), "{mood:?}");
        until("it is given back", || peer.leases() == 1);
        peer.set(Mood::Well);
    }
}

/// An answer that took long must not make the promise look longer than it is.
#[test]
fn a_lease_is_counted_from_the_question_and_not_from_the_answer() {
    let peer = Peer::start();
    let ids = ids(1);
    peer.fill(&ids);
    let client = client(&peer);
    peer.set(Mood::Trickle);
    let begun = Instant::now();
    let lease = client.lookup_leased(&ids, TTL).lease.unwrap();
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(500), "the answer was not slow");
    assert!(lease.until < begun + TTL + took / 2, "{:?}", lease.left());
    assert!(lease.left() < TTL);
    let begun = Instant::now();
    let renewed = client.renew(lease.token, TTL, CallOptions::default());
    assert!(renewed.unwrap().unwrap() < begun + TTL + begun.elapsed() / 2);
    peer.set(Mood::Well);
}

/// Blocks behind a gap would be held for nobody.
#[test]
fn a_part_of_a_chain_is_leased_only_when_the_part_before_is_there_whole() {
    let peer = Peer::start();
    let ids = ids(2 * IDS_MAX + 10);
    let client = client(&peer);
    peer.fill(&ids[..IDS_MAX - 1]);
    peer.fill(&ids[IDS_MAX..]);
    let leased = client.lookup_leased(&ids, TTL);
    assert_eq!(
        (leased.leading, leased.reason),
        (IDS_MAX - 1, Some(MissReason::Absent))
    );
    assert!(leased.lease.is_some());
    assert_eq!(peer.leases_asked().len(), 1);
    peer.fill(&ids);
    let leased = client.lookup_leased(&ids, TTL);
    assert_eq!((leased.leading, leased.reason), (ids.len(), None));
    let asked = peer.leases_asked();
    let counts: Vec<usize> = asked[1..].iter().map(|(ids, _)| *ids).collect();
    assert_eq!(counts, [IDS_MAX, IDS_MAX, 10]);
}

/// Zero on the wire leaves it to the node, which would be two seconds.
#[test]
fn a_time_below_a_millisecond_is_one() {
    let peer = Peer::start();
    let ids = ids(1);
    peer.fill(&ids);
    let client = client(&peer);
    let _ = client.lookup_leased(&ids, Duration::from_micros(100));
    assert_eq!(peer.leases_asked(), [(1, 1)]);
}

/// What ended a lease went out once, and was forgotten with the link that took it.
#[test]
fn a_lease_stood_on_when_the_link_broke_that_was_to_end_it() {
    let peer = Peer::start();
    let ids = ids(3);
    peer.fill(&ids);
    let client = client(&peer);
    assert_eq!(client.lookup_leased(&ids[..1], TTL).leading, 1);
    peer.set(Mood::Mute);
    let options = CallOptions::within(Duration::from_millis(300));
    let lost = client.submit_lookup_leased(ids.clone(), TTL, options);
    until("the node grants it", || peer.leases() == 2);
    // Takes the next word, which is the release or right before it, and hangs up.
    peer.set(Mood::Close);
    assert_eq!(lost.wait().lease, None);
    until("the link breaks", || client.stats().links_lost > 0);
    assert_eq!(peer.leases(), 2);
    peer.set(Mood::Well);
    until("it is given back", || peer.leases() == 1);
}
