//! The client against nodes that are stopped, dead, mad or slow: every call ends by its deadline
//! with a word, and what was wrong is over when the node is well again.

mod peer;

use kvar_base::{BlockId, MissReason, PutOutcome, Refusal};
use kvar_client::*;
use peer::{LIMITS, Mood, Peer, SLACK, key, until};
use std::net::TcpListener;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_millis(150);

fn config(peer: &Peer) -> ClientConfig {
    ClientConfig {
        deadline: DEADLINE,
        connect_timeout: Duration::from_secs(2),
        ..ClientConfig::new(&peer.address.to_string(), key())
    }
}

fn id(n: u64) -> BlockId {
    BlockId::from_name(&key(), &n.to_string())
}

fn timed<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    let result = call();
    (result, begun.elapsed())
}

fn put(client: &Client, n: u64, len: usize) -> PutOutcome {
    client.put(vec![PutItem::of_bytes(id(n), vec![n as u8; len])])[0]
}

fn get(client: &Client, n: u64) -> Option<MissReason> {
    client.get(vec![GetItem::to_vec(id(n))])[0].miss()
}

/// Asks until the node is well again for this client.
fn heals(client: &Client) {
    let what = std::fmt::from_fn(|f| write!(f, "a get of {client:?}: {:?}", client.last_error()));
    until(what, || get(client, 1).is_none());
}

/// Puts block 1 until the node takes it.
fn takes_puts(client: &Client, len: usize) {
    let what = std::fmt::from_fn(|f| write!(f, "a put of {client:?}: {:?}", client.last_error()));
    until(what, || put(client, 1, len) == PutOutcome::Stored);
}

/// A client of a node that holds block 1 (100 KB).
fn with_block(peer: &Peer) -> Client {
    let client = Client::connect(config(peer)).unwrap();
    let options = CallOptions::within(Duration::from_secs(20));
    let item = PutItem::of_bytes(id(1), vec![1; 100_000]);
    assert_eq!(
        client.submit_put(vec![item], options).wait(),
        [PutOutcome::Stored]
    );
    client
}

#[test]
fn every_call_ends_by_its_deadline_whatever_the_node_does() {
    std::thread::scope(|scope| {
        for mood in Mood::ILL {
            scope.spawn(move || calls_end_under(mood));
        }
    });
}

fn calls_end_under(mood: Mood) {
    let peer = Peer::start();
    let client = with_block(&peer);
    peer.set(mood);
    // Each of these takes another road through the client; the larger puts are announced,
    // the largest fills the sockets of a node that takes nothing.
    for round in 0..2 {
        let large = || vec![PutItem::of_bytes(id(7), vec![7; 9 << 20])];
        let items = || (0..50).map(|_| GetItem::to_vec(id(1))).collect::<Vec<_>>();
        let (results, took) = timed(|| client.get(items()));
        assert_eq!(results.len(), 50);
        assert!(
            results.iter().all(|result| !result.is_hit()),
            "{mood:?} {round}"
        );
        assert!(took < DEADLINE + SLACK, "get under {mood:?} took {took:?}");
        let (lookup, took) = timed(|| client.lookup(&[id(1)]));
        assert!(
            took < DEADLINE + SLACK,
            "lookup under {mood:?} took {took:?}"
        );
        assert!(lookup.leading == 0 || mood == Mood::Corrupt || mood == Mood::WrongSum);
        let (outcomes, took) = timed(|| client.put(large()));
        assert!(took < DEADLINE + SLACK, "put under {mood:?} took {took:?}");
        assert_eq!(outcomes.len(), 1);
        let (status, took) = timed(|| client.status(CallOptions::default()));
        assert!(
            took < DEADLINE + SLACK,
            "status under {mood:?} took {took:?}"
        );
        assert!(status.is_err() || mood == Mood::Corrupt || mood == Mood::WrongSum);
    }
    assert_eq!(
        client.stats().hits,
        0,
        "{mood:?}: nothing wrong was called a hit"
    );
    peer.set(Mood::Well);
    heals(&client);
}

#[test]
fn corrupt_bytes_are_a_miss_that_is_counted_and_no_reason_to_hang_up() {
    let peer = Peer::start();
    let client = with_block(&peer);
    peer.set(Mood::Corrupt);
    assert_eq!(get(&client, 1), Some(MissReason::Corrupt));
    peer.set(Mood::Well);
    assert_eq!(get(&client, 1), None);
    let stats = client.stats();
    assert_eq!(
        (stats.checks_failed, stats.links_lost, stats.hits),
        (1, 0, 1)
    );
    assert_eq!(stats.misses.get("corrupt"), Some(&1));
}

#[test]
fn a_node_that_breaks_the_protocol_is_named_and_left() {
    for mood in [
        Mood::Rubbish,
        Mood::WrongSum,
        Mood::WrongKind,
        Mood::WrongNumber,
    ] {
        let peer = Peer::start();
        let client = with_block(&peer);
        peer.set(mood);
        assert_eq!(get(&client, 1), Some(MissReason::Unreachable), "{mood:?}");
        let error = client.last_error().expect("a reason").to_string();
        assert!(
            error.contains(&peer.address.to_string()),
            "{mood:?}: {error}"
        );
        assert_eq!(client.stats().links_lost, 1, "{mood:?}");
        peer.set(Mood::Well);
        heals(&client);
        assert_eq!(client.last_error(), None);
    }
}

#[test]
fn a_block_cut_in_the_middle_is_a_miss_and_the_next_call_reconnects() {
    let peer = Peer::start();
    let client = with_block(&peer);
    peer.set(Mood::Cut);
    assert_eq!(get(&client, 1), Some(MissReason::Unreachable));
    peer.set(Mood::Well);
    assert_eq!(
        get(&client, 1),
        None,
        "one lost link is no reason to open the breaker"
    );
    assert_eq!(client.stats().connects, 2);
}

#[test]
fn a_stopped_node_costs_one_deadline_and_is_found_again_when_it_goes_on() {
    let peer = Peer::start();
    let client = with_block(&peer);
    peer.set(Mood::Stopped);
    let options = CallOptions::within(Duration::from_millis(20));
    let (lookup, took) = timed(|| client.submit_lookup(vec![id(1)], options).wait());
    assert_eq!(
        lookup,
        Lookup {
            leading: 0,
            reason: Some(MissReason::Deadline)
        }
    );
    assert!(took < Duration::from_millis(20) + SLACK, "{took:?}");
    assert_ne!(client.breaker(), BreakerState::Closed);
    // From now on nobody waits, whatever is asked; a thousand calls cost next to nothing.
    let (_, took) = timed(|| {
        for _ in 0..250 {
            assert_eq!(
                client.lookup(&[id(1)]).reason,
                Some(MissReason::Unreachable)
            );
            assert_eq!(get(&client, 1), Some(MissReason::Unreachable));
            assert_eq!(
                put(&client, 2, 1 << 20),
                PutOutcome::Refused(Refusal::Unreachable)
            );
            assert!(matches!(
                client.flush(options),
                Err(ClientError::Unreachable(_))
            ));
        }
    });
    assert!(took < SLACK, "1,000 calls to a stopped node took {took:?}");
    peer.set(Mood::Well);
    heals(&client);
    assert_eq!(client.stats().breaker_opened, 1);
}

#[test]
fn a_dead_node_is_unreachable_at_once_and_found_again_when_restarted() {
    let peer = Peer::start();
    let client = with_block(&peer);
    let address = peer.kill();
    until("the breaker opens", || {
        assert_eq!(get(&client, 1), Some(MissReason::Unreachable));
        client.breaker() != BreakerState::Closed
    });
    let peer = Peer::start_with(address, LIMITS);
    takes_puts(&client, 100_000);
    assert_eq!(get(&client, 1), None);
    assert_eq!(client.stats().connects, 2);
    drop(peer);
}

#[test]
fn a_lazy_client_needs_no_node_to_begin_with() {
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let client = Client::lazy(ClientConfig::new(&address.to_string(), key())).unwrap();
    assert_eq!(get(&client, 1), Some(MissReason::Unreachable));
    assert!(matches!(
        client.last_error(),
        Some(ClientError::Unreachable(_))
    ));
    let _peer = Peer::start_with(address, LIMITS);
    takes_puts(&client, 10);
}

#[test]
fn a_deadline_of_zero_has_passed() {
    let peer = Peer::start();
    let client = with_block(&peer);
    let asked = peer.asked();
    let zero = CallOptions::within(Duration::ZERO);
    let lookup = client.submit_lookup(vec![id(1)], zero).wait();
    assert_eq!(
        lookup,
        Lookup {
            leading: 0,
            reason: Some(MissReason::Deadline)
        }
    );
    let results = client.submit_get(vec![GetItem::to_vec(id(1))], zero).wait();
    assert_eq!(results[0].miss(), Some(MissReason::Deadline));
    let outcomes = client
        .submit_put(vec![PutItem::of_bytes(id(2), vec![1])], zero)
        .wait();
    assert_eq!(outcomes, [PutOutcome::Refused(Refusal::Deadline)]);
    assert_eq!(client.flush(zero), Err(ClientError::Deadline));
    assert_eq!(client.remove(&[id(1)], zero), Err(ClientError::Deadline));
    assert_eq!(
        (peer.asked(), client.breaker()),
        (asked, BreakerState::Closed)
    );
    // The same for a session.
    let mut session = Session::connect(config(&peer)).unwrap();
    session.submit(Request::Status, Duration::ZERO);
    let mut done = Vec::new();
    assert_eq!(session.poll(Duration::from_secs(10), &mut done), 1);
    assert!(matches!(
        done[0].answer,
        Answer::Status(Err(ClientError::Deadline))
    ));
}

#[test]
fn a_node_is_never_asked_for_more_than_its_window() {
    let limits = Limits {
        requests_max: 8,
        ..LIMITS
    };
    let peer = Peer::start_with("127.0.0.1:0".parse().unwrap(), limits);
    let client = Client::connect(config(&peer)).unwrap();
    peer.set(Mood::Mute);
    let items = (0..100).map(|n| GetItem::to_vec(id(n))).collect();
    let results = client.submit_get(items, CallOptions::default()).wait();
    assert!(
        results
            .iter()
            .all(|result| result.miss() == Some(MissReason::Deadline))
    );
    assert_eq!(peer.asked(), 8);
}

#[test]
fn slow_orders_do_not_make_a_node_look_dead() {
    let peer = Peer::start();
    let client = with_block(&peer);
    peer.set(Mood::Mute);
    // A flush waits for a device; that it takes longer than its deadline says nothing.
    assert_eq!(
        client.flush(CallOptions::default()),
        Err(ClientError::Deadline)
    );
    assert_eq!(client.breaker(), BreakerState::Closed);
    assert_eq!(get(&client, 1), Some(MissReason::Deadline));
    assert_ne!(
        client.breaker(),
        BreakerState::Closed,
        "a get that nobody answers does"
    );
}

/// A node asks for so many blocks of a link at a time, so gets may stand in line behind others that wait
/// for a writer; their silence was held against it, and every call ended at once.
#[test]
fn a_get_behind_one_that_waits_for_a_writer_does_not_make_a_node_look_dead() {
    let peer = Peer::start();
    let client = with_block(&peer);
    peer.set(Mood::Mute);
    let options = CallOptions {
        wait_announced: true,
        ..CallOptions::within(Duration::from_secs(60))
    };
    let waiting = client.submit_get(vec![GetItem::to_vec(id(5))], options);
    assert_eq!(get(&client, 1), Some(MissReason::Deadline));
    assert_eq!(client.breaker(), BreakerState::Closed);
    assert!(!waiting.is_done());
    // No other call stands in that line.
    let lookup = client.lookup(&[id(1)]);
    assert_eq!(lookup.reason, Some(MissReason::Deadline));
    assert_ne!(client.breaker(), BreakerState::Closed);
}

/// The same where the one that waits has ended a moment before: the other's turn has only just come.
#[test]
fn a_get_that_ends_just_after_one_that_waits_for_a_writer_does_not_make_a_node_look_dead() {
    let peer = Peer::start();
    let deadline = Duration::from_millis(15);
    let get = |waits| Request::Get {
        items: vec![GetItem::to_vec(id(5))],
        touch_request: 0,
        waits,
    };
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < end, "this machine is late every time");
        peer.set(Mood::Well);
        let mut session = Session::connect(config(&peer)).unwrap();
        peer.set(Mood::Mute);
        let begun = Instant::now();
        session.submit(get(true), deadline);
        session.submit(get(false), deadline);
        let mut done = Vec::new();
        while done.len() < 2 {
            session.poll(DEADLINE, &mut done);
        }
        // Ten milliseconds of silence, had the node been there, would say something.
        if begun.elapsed() < deadline + Duration::from_millis(10) {
            assert_eq!(session.breaker(), BreakerState::Closed);
            break;
        }
    }
}

/// A call that the window had no room for was taken for one that the node was told of.
#[test]
fn a_call_that_never_left_does_not_make_a_node_look_dead() {
    let limits = Limits {
        block_bytes_max: 100_000,
        bytes_max: 100_000,
        ..LIMITS
    };
    let peer = Peer::start_with("127.0.0.1:0".parse().unwrap(), limits);
    let client = with_block(&peer);
    peer.set(Mood::Mute);
    let options = CallOptions {
        wait_announced: true,
        ..CallOptions::within(Duration::from_secs(60))
    };
    // Its length is not known, so it takes 64 KiB of the window, for as long as the writer takes.
    let waiting = client.submit_get(vec![GetItem::to_vec(id(5))], options);
    let asked = peer.asked();
    let late = PutOutcome::Refused(Refusal::Deadline);
    assert_eq!(put(&client, 6, 50_000), late);
    assert_eq!(client.breaker(), BreakerState::Closed);
    assert!(!waiting.is_done());
    assert!(peer.asked() <= asked + 1, "only the get has left");
    // One that does leave, and is not answered, says something.
    assert_eq!(put(&client, 7, 10_000), late);
    assert_ne!(client.breaker(), BreakerState::Closed);
}

#[test]
fn late_answers_are_drained_and_later_calls_go_on() {
    let peer = Peer::start();
    let client = with_block(&peer);
    peer.set(Mood::Stopped);
    let items: Vec<GetItem> = (0..20).map(|_| GetItem::to_vec(id(1))).collect();
    let results = client
        .submit_get(items, CallOptions::within(Duration::from_millis(30)))
        .wait();
    assert!(
        results
            .iter()
            .all(|result| result.miss() == Some(MissReason::Deadline))
    );
    peer.set(Mood::Well);
    heals(&client);
    let stats = client.stats();
    assert_eq!(
        (stats.late_answers, stats.links_lost),
        (20, 0),
        "drained, on the same link"
    );
}

#[test]
fn closing_a_client_ends_its_calls_and_frees_their_buffers() {
    let peer = Peer::start();
    let client = with_block(&peer);
    peer.set(Mood::Mute);
    let before = peer.asked();
    let bytes = std::sync::Arc::new(vec![5_u8; 4 << 20]);
    struct Held(std::sync::Arc<Vec<u8>>);
    impl Source for Held {
        fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
            visit(&self.0);
        }
    }
    let options = CallOptions::within(Duration::from_secs(60));
    let item = || PutItem::of_pieces(id(5), Held(std::sync::Arc::clone(&bytes)));
    let puts = client.submit_put(vec![item(), item()], options);
    let gets = client.submit_get(vec![GetItem::to_vec(id(1))], options);
    until("all three are asked", || peer.asked() >= before + 3);
    drop(client);
    assert!(puts.is_done() && gets.is_done());
    assert_eq!(puts.wait(), [PutOutcome::Refused(Refusal::Unreachable); 2]);
    assert_eq!(gets.wait()[0].miss(), Some(MissReason::Unreachable));
    assert_eq!(std::sync::Arc::strong_count(&bytes), 1);
}

/// The memory that a node says it has sent does not come: the link is of no use, and the next one, at once,
/// does not ask. Only who wants nothing else is told.
#[test]
fn memory_that_does_not_come_costs_a_link_and_not_the_node() {
    let peer = Peer::start();
    peer.lie_about_memory();
    let config = ClientConfig::new(&peer.address.to_string(), key());
    let client = Client::connect(config.clone()).unwrap();
    let stats = client.stats();
    assert_eq!((stats.link(), stats.attach_declined), ("tcp", 1));
    let why = stats.not_shared.unwrap();
    assert!(why.contains("did not come"), "{why}");
    let id = kvar_base::BlockId::from_name(&key(), "over tcp");
    assert_eq!(
        client.put(vec![PutItem::of_bytes(id, b"all the same".to_vec())]),
        [kvar_base::PutOutcome::Stored]
    );
    let refused = Client::connect(ClientConfig {
        link: LinkChoice::Shm,
        ..config
    });
    let refused = refused.unwrap_err();
    assert!(refused.to_string().contains("did not come"), "{refused}");
}

/// A node of before is not asked for what it does not know, and a client that wants nothing else is told.
#[test]
fn an_old_node_is_not_asked_to_share_memory() {
    let peer = Peer::start();
    peer.grow_old(3);
    let config = ClientConfig::new(&peer.address.to_string(), key());
    let client = Client::connect(config.clone()).unwrap();
    let why = client.stats().not_shared.unwrap();
    assert!(why.contains("protocol version 3"), "{why}");
    let refused = Client::connect(ClientConfig {
        link: LinkChoice::Shm,
        ..config
    });
    let refused = refused.unwrap_err();
    assert!(matches!(refused, ClientError::Config(_)), "{refused}");
}
