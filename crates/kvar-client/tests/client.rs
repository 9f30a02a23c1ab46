//! The client against a node that is well, and what it says when the node cannot be had.

mod peer;

use kvar_base::{BlockId, MissReason, NamespaceKey, PutOutcome, Refusal};
use kvar_client::*;
use peer::{LIMITS, Peer, key, until};
use proptest::prelude::*;
use std::net::TcpListener;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

fn config(peer: &Peer) -> ClientConfig {
    // Generous: these tests share two cores with a whole build.
    ClientConfig {
        deadline: Duration::from_secs(20),
        connect_timeout: Duration::from_secs(10),
        ..ClientConfig::new(&peer.address.to_string(), key())
    }
}

fn connect(peer: &Peer) -> Client {
    let begun = Instant::now();
    let client = Client::connect(config(peer)).unwrap();
    // Once connect slept through its whole timeout after the link stood.
    assert!(
        begun.elapsed() < Duration::from_secs(9),
        "connect took {:?}",
        begun.elapsed()
    );
    client
}

fn id(n: u64) -> BlockId {
    BlockId::from_name(&key(), &n.to_string())
}

fn bytes(n: u64, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u64 * 131 + n * 7) as u8).collect()
}

#[test]
fn blocks_of_every_size_come_back() {
    let peer = Peer::start();
    let client = connect(&peer);
    // Around the border between eager and announced, and the largest there is.
    let lengths = [1, 100, 65_535, 65_536, 65_537, 1 << 20, 16 << 20];
    for (n, len) in (0..).zip(lengths) {
        let outcomes = client.put(vec![PutItem::of_bytes(id(n), bytes(n, len))]);
        assert_eq!(outcomes, [PutOutcome::Stored], "{len}");
        let results = client.get(vec![GetItem::to_vec(id(n))]);
        assert_eq!(results[0].bytes(), Some(&bytes(n, len)[..]), "{len}");
    }
    let stats = client.stats();
    assert_eq!((stats.hits, stats.stored, stats.connects), (7, 7, 1));
    assert_eq!(stats.read_bytes, lengths.iter().sum::<usize>() as u64);
}

#[test]
fn sections_are_read_alone_and_land_where_they_should() {
    let peer = Peer::start();
    let client = connect(&peer);
    let pieces: Vec<Vec<u8>> = (0..61).map(|n| bytes(n, 1_000 + n as usize)).collect();
    let lengths: Vec<u32> = pieces.iter().map(|piece| piece.len() as u32).collect();
    assert_eq!(
        client.put(vec![PutItem::of_pieces(id(1), pieces.clone())]),
        [PutOutcome::Stored]
    );

    // All of it, into pieces cut elsewhere than the sections.
    let total: usize = pieces.iter().map(Vec::len).sum();
    let place = vec![vec![0; 5], vec![0; total - 5]];
    let result = client
        .get(vec![GetItem::to_place(id(1), &lengths, place)])
        .remove(0);
    assert_eq!(result.outcome, hit(&result, 0, &lengths));
    assert_eq!(contents(result.into), pieces.concat());

    // Three of them.
    let mut item = GetItem::to_vec(id(1));
    item.sections = Some(10..13);
    let result = client.get(vec![item]).remove(0);
    assert_eq!(result.outcome, hit(&result, 10, &lengths[10..13]));
    assert_eq!(result.bytes(), Some(&pieces[10..13].concat()[..]));
}

fn hit(result: &GetResult, first_section: u16, lengths: &[u32]) -> GetOutcome {
    let GetOutcome::Hit { version, .. } = result.outcome else {
        panic!("{:?}", result.outcome)
    };
    GetOutcome::Hit {
        version,
        first_section,
        lengths: lengths.to_vec(),
    }
}

fn contents(mut into: Filled) -> Vec<u8> {
    let mut all = Vec::new();
    into.visit_mut(&mut |piece| all.extend_from_slice(piece));
    all
}

#[test]
fn what_does_not_fit_is_wrong_format_and_the_link_goes_on() {
    let peer = Peer::start();
    let client = connect(&peer);
    client.put(vec![PutItem::of_bytes(id(1), bytes(1, 1000))]);
    let mut short = GetItem::to_place(id(1), &[1000], vec![0_u8; 999]);
    let empty = GetItem {
        sections: Some(3..3),
        ..GetItem::to_vec(id(1))
    };
    let far = GetItem {
        sections: Some(0..2000),
        ..GetItem::to_vec(id(1))
    };
    let other = GetItem::to_place(id(1), &[500, 500], vec![0_u8; 1000]);
    let version = GetItem {
        version: Some(1),
        ..GetItem::to_vec(id(1))
    };
    short.expected = Lengths::Any;
    let results = client.get(vec![
        short,
        empty,
        far,
        other,
        version,
        GetItem::to_vec(id(1)),
    ]);
    let misses: Vec<Option<MissReason>> = results.iter().map(GetResult::miss).collect();
    let wrong = Some(MissReason::WrongFormat);
    assert_eq!(
        misses,
        [wrong, wrong, wrong, wrong, Some(MissReason::Version), None]
    );

    let none = PutItem::of_bytes(id(2), Vec::new());
    let mut lying = PutItem::of_bytes(id(3), vec![1; 10]);
    lying.lengths = vec![5, 6];
    let large = PutItem::of_bytes(id(4), vec![0; (16 << 20) + 1]);
    let fine = PutItem::of_bytes(id(5), vec![1]);
    let outcomes = client.put(vec![none, lying, large, fine]);
    let wrong = PutOutcome::Refused(Refusal::WrongFormat);
    let too_big = PutOutcome::Refused(Refusal::TooBig);
    assert_eq!(outcomes, [wrong, wrong, too_big, PutOutcome::Stored]);
    assert_eq!(peer.blocks(), 2);
    assert_eq!(client.stats().links_lost, 0);
}

#[test]
fn every_operation_says_what_it_did() {
    let peer = Peer::start();
    let client = connect(&peer);
    let all = CallOptions::default();
    assert_eq!(
        client.lookup(&[]),
        Lookup {
            leading: 0,
            reason: None
        }
    );
    assert!(client.get(Vec::new()).is_empty() && client.put(Vec::new()).is_empty());
    client.put(
        (0..3)
            .map(|n| PutItem::of_bytes(id(n), bytes(n, 9)))
            .collect(),
    );
    assert_eq!(
        client.put(vec![PutItem::of_bytes(id(0), vec![1])]),
        [PutOutcome::Exists]
    );
    let chain = [id(0), id(1), id(9), id(2)];
    let expected = Lookup {
        leading: 2,
        reason: Some(MissReason::Absent),
    };
    assert_eq!(client.lookup(&chain), expected);
    assert_eq!(client.present(&chain), [true, true, false, true]);
    assert_eq!(client.stat(id(1), all).unwrap().bytes, 9);
    assert_eq!(client.stat(id(9), all), Err(MissReason::Absent));
    assert_eq!(client.status(all).unwrap(), "{\"node\":\"test\"}");
    client.flush(all).unwrap();
    assert_eq!(client.remove(&[id(0), id(9)], all), Ok(1));
    assert_eq!(
        client.get(vec![GetItem::to_vec(id(0))])[0].miss(),
        Some(MissReason::Absent)
    );
    assert_eq!(client.purge(all), Ok(2));
    assert_eq!(client.lookup(&chain).leading, 0);
    assert_eq!(client.limits(), Some(LIMITS));
    assert_eq!(client.stats().misses.get("absent"), Some(&1));
}

#[test]
fn chains_longer_than_a_message_are_asked_in_parts() {
    let peer = Peer::start();
    let client = connect(&peer);
    let chain: Vec<BlockId> = (0..40_000).map(id).collect();
    client.put(
        chain[..300]
            .iter()
            .map(|id| PutItem::of_bytes(*id, vec![1]))
            .collect(),
    );
    assert_eq!(client.lookup(&chain).leading, 300);
    let present = client.present(&chain);
    assert_eq!(present.len(), chain.len());
    assert_eq!(present.iter().filter(|there| **there).count(), 300);
    assert_eq!(client.remove(&chain, CallOptions::default()), Ok(300));
}

#[test]
fn large_batches_keep_to_a_small_window() {
    let limits = Limits {
        requests_max: 3,
        bytes_max: 1 << 20,
        block_bytes_max: 1 << 20,
        ..LIMITS
    };
    let peer = Peer::start_with("127.0.0.1:0".parse().unwrap(), limits);
    for links in 1..=LINKS_MAX {
        let client = Client::connect(ClientConfig {
            links,
            ..config(&peer)
        })
        .unwrap();
        client.purge(CallOptions::default()).unwrap();
        let sizes = [10, 70_000, 400_000, 1 << 20];
        let put = |n: u64| PutItem::of_bytes(id(n), bytes(n, sizes[n as usize % 4]));
        let outcomes = client.put((0..40).map(put).collect());
        assert!(
            outcomes
                .iter()
                .all(|outcome| *outcome == PutOutcome::Stored),
            "{outcomes:?}"
        );
        let results = client.get((0..40).map(|n| GetItem::to_vec(id(n))).collect());
        for (n, result) in (0..).zip(&results) {
            assert_eq!(
                result.bytes(),
                Some(&bytes(n, sizes[n as usize % 4])[..]),
                "{n}"
            );
        }
    }
}

#[test]
fn a_node_that_cannot_be_had_is_an_error_of_its_kind() {
    let peer = Peer::start();
    let error = |config: ClientConfig| Client::connect(config).expect_err("no link");
    let wrong = |change: &dyn Fn(&mut ClientConfig)| {
        let mut config = config(&peer);
        change(&mut config);
        error(config)
    };
    let found = wrong(&|config| config.key = NamespaceKey::new([8; 32]));
    assert!(matches!(found, ClientError::WrongKey(_)), "{found:?}");
    assert!(found.to_string().contains(&key().short_name()), "{found}");
    let found = wrong(&|config| config.namespace = "nowhere".to_owned());
    assert!(
        matches!(&found, ClientError::Namespace(text) if text.contains("nowhere")),
        "{found}"
    );
    for endpoint in [
        "",
        "here",
        "127.0.0.1:",
        "127.0.0.1:99999",
        ":7411",
        "127.0.0.1:0",
    ] {
        let found = wrong(&|config| config.endpoint = endpoint.to_owned());
        assert!(
            matches!(found, ClientError::Config(_)),
            "{endpoint:?}: {found:?}"
        );
    }
    let found = wrong(&|config| config.links = 9);
    assert!(matches!(found, ClientError::Config(_)), "{found:?}");

    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let found = error(ClientConfig::new(&free.to_string(), key()));
    assert!(
        matches!(&found, ClientError::Unreachable(t) if t.contains(&free.to_string())),
        "{found}"
    );

    // Something listens, and is no kvar node: it says nothing, or something else.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = ClientConfig::new(&silent.local_addr().unwrap().to_string(), key());
    config.connect_timeout = Duration::from_millis(200);
    let found = error(config);
    assert!(matches!(found, ClientError::Unreachable(_)), "{found:?}");
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = other.accept().unwrap();
        std::io::Write::write_all(
            &mut stream,
            b"HTTP/1.1 400 Bad Request\r\nServer: other\r\n\r\n",
        )
        .unwrap();
        // Until the client has had enough.
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let found = error(ClientConfig::new(&address, key()));
    assert!(
        matches!(&found, ClientError::Unreachable(t) if t.contains("KVR1")),
        "{found:?}"
    );
}

#[test]
fn names_are_looked_up() {
    let peer = Peer::start();
    let endpoint = format!("localhost:{}", peer.address.port());
    // The name may also have an address of the other family, where nobody listens: tried in turn.
    let client = Client::lazy(ClientConfig {
        endpoint,
        ..config(&peer)
    })
    .unwrap();
    let what = std::fmt::from_fn(|f| write!(f, "a put: {:?}", client.last_error()));
    until(what, || {
        client.put(vec![PutItem::of_bytes(id(1), vec![1])]) == [PutOutcome::Stored]
    });
    let nowhere = ClientConfig::new("no-such-host.invalid:7411", key());
    let found = Client::connect(ClientConfig {
        connect_timeout: Duration::from_secs(10),
        ..nowhere
    });
    let found = found.expect_err("no link");
    assert!(matches!(found, ClientError::Unreachable(_)), "{found:?}");
}

#[test]
fn many_calls_from_many_threads_share_the_client() {
    let peer = Peer::start();
    let client = connect(&peer);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let client = client.clone();
            scope.spawn(move || {
                for n in thread * 1000..thread * 1000 + 100 {
                    let len = 1 + (n as usize * 977) % 90_000;
                    let outcomes = client.put(vec![PutItem::of_bytes(id(n), bytes(n, len))]);
                    assert_eq!(outcomes, [PutOutcome::Stored]);
                    let results = client.get(vec![GetItem::to_vec(id(n))]);
                    assert_eq!(results[0].bytes(), Some(&bytes(n, len)[..]));
                }
            });
        }
    });
    assert_eq!(client.stats().hits, 400);
}

#[test]
fn pending_calls_tell_when_they_are_done() {
    let peer = Peer::start();
    let client = connect(&peer);
    let (told, heard) = channel();
    let item = vec![PutItem::of_bytes(id(1), bytes(1, 100_000))];
    let pending = client.submit_put(item, CallOptions::default());
    let again = told.clone();
    pending.on_done(move || told.send(1).unwrap());
    heard.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(pending.is_done());
    pending.on_done(move || again.send(2).unwrap());
    assert_eq!(
        heard.recv_timeout(Duration::from_secs(20)),
        Ok(2),
        "told at once when done"
    );
    assert_eq!(
        pending.wait_timeout(Duration::ZERO).unwrap(),
        [PutOutcome::Stored]
    );
    // A caller's panic is the caller's.
    client
        .submit_flush(CallOptions::default())
        .on_done(|| panic!("in a callback, on purpose"));
    assert!(client.get(vec![GetItem::to_vec(id(1))])[0].is_hit());
}

#[test]
fn a_session_keeps_many_calls_in_flight_on_its_own_thread() {
    let peer = Peer::start();
    for spin in [Duration::ZERO, Duration::from_micros(200)] {
        let mut session = Session::connect(ClientConfig {
            spin,
            ..config(&peer)
        })
        .unwrap();
        let deadline = Duration::from_secs(20);
        let (mut done, mut ended, mut submitted) = (Vec::new(), 0, 0);
        while ended < 500 {
            while submitted < 500 && submitted - ended < 16 {
                let item = PutItem::of_bytes(id(submitted), bytes(submitted, 60_000)).prepare();
                session.submit(Request::Put { items: vec![item] }, deadline);
                submitted += 1;
            }
            ended += session.poll(Duration::from_secs(20), &mut done) as u64;
        }
        let fine = |completion: &Completion| {
            matches!(&completion.answer, Answer::Put(outcomes)
                if matches!(outcomes[..], [PutOutcome::Stored | PutOutcome::Exists]))
        };
        assert!(done.len() == 500 && done.iter().all(fine));
        assert_eq!(session.calls_open(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn the_client_agrees_with_a_map(
        steps in prop::collection::vec(
            (0_u64..12, 0_u8..4, prop::collection::vec(1_usize..40_000, 1..6)), 1..40,
        ),
    ) {
        let peer = Peer::start();
        let client = connect(&peer);
        let mut model = std::collections::BTreeMap::<u64, Vec<Vec<u8>>>::new();
        for (n, kind, lengths) in steps {
            match kind {
                0 | 1 => {
                    let pieces: Vec<Vec<u8>> = lengths.iter().map(|len| bytes(n, *len)).collect();
                    let outcomes = client.put(vec![PutItem::of_pieces(id(n), pieces.clone())]);
                    let stored = !model.contains_key(&n);
                    prop_assert_eq!(outcomes[0] == PutOutcome::Stored, stored);
                    model.entry(n).or_insert(pieces);
                }
                2 => {
                    let results = client.get((0..12).map(|n| GetItem::to_vec(id(n))).collect());
                    for (n, result) in (0..).zip(results) {
                        let expected = model.get(&n).map(|pieces| pieces.concat());
                        prop_assert_eq!(result.bytes(), expected.as_deref());
                    }
                }
                _ => {
                    let removed = client.remove(&[id(n)], CallOptions::default());
                    prop_assert_eq!(removed, Ok(u64::from(model.remove(&n).is_some())));
                }
            }
        }
    }
}

#[test]
fn a_lookup_can_be_leased_renewed_and_released_by_another_client() {
    let peer = Peer::start();
    let (client, other) = (connect(&peer), connect(&peer));
    // More ids than one message takes: one lease all the same.
    let count = kvar_wire::IDS_MAX + 10;
    let ids: Vec<BlockId> = (0..count as u64).map(id).collect();
    for n in [0, 1, 2] {
        client.put(vec![PutItem::of_bytes(id(n), bytes(n, 100))]);
    }
    let leased = client.lookup_leased(&ids, Duration::from_secs(60));
    assert_eq!(
        (leased.leading, leased.reason),
        (3, Some(MissReason::Absent))
    );
    let lease = leased.lease.unwrap();
    let left = lease.left();
    assert!(left > Duration::from_secs(10) && left <= Duration::from_secs(30));
    assert_eq!(peer.leases(), 1);
    let again = client
        .lookup_leased(&ids[..2], Duration::from_secs(1))
        .lease
        .unwrap();
    assert_ne!(again.token, lease.token, "tokens are drawn anew");
    let options = CallOptions::default();
    let before = Instant::now();
    let renewed = other.renew(lease.token, Duration::from_secs(9), options);
    let renewed = renewed.unwrap().unwrap();
    assert!(renewed >= before + Duration::from_secs(9));
    assert!(renewed <= Instant::now() + Duration::from_secs(9));
    assert!(other.release(lease.token, options).unwrap());
    assert!(!other.release(lease.token, options).unwrap());
    assert_eq!(
        client
            .renew(lease.token, Duration::from_secs(9), options)
            .unwrap(),
        None
    );
    let none = client.lookup_leased(&[id(77)], Duration::from_secs(1));
    assert_eq!((none.leading, none.lease), (0, None));
    // A node that is gone promises nothing, at once or by the deadline.
    peer.kill();
    let lost = client.lookup_leased(&ids[..2], Duration::from_secs(1));
    assert_eq!((lost.leading, lost.lease), (0, None));
    assert!(
        client
            .release(again.token, CallOptions::within(Duration::from_secs(1)))
            .is_err()
    );
}

#[test]
fn an_old_node_says_what_is_there_and_promises_nothing() {
    let peer = Peer::start();
    peer.grow_old(1);
    let client = connect(&peer);
    client.put(vec![PutItem::of_bytes(id(1), bytes(1, 100))]);
    let leased = client.lookup_leased(&[id(1), id(2)], Duration::from_secs(1));
    assert_eq!(
        (leased.leading, leased.reason),
        (1, Some(MissReason::Absent))
    );
    assert_eq!(leased.lease, None);
    let (token, options) = (kvar_base::LeaseToken::new([1; 16]), CallOptions::default());
    assert_eq!(
        client
            .renew(token, Duration::from_secs(1), options)
            .unwrap(),
        None
    );
    assert!(!client.release(token, options).unwrap());
}

#[test]
fn a_node_gets_every_hint_that_it_understands() {
    let all = PutHints {
        depth: 3,
        request: 1 << 40,
        ttl_s: Some(60),
        ephemeral: true,
        traffic_class: 9,
        recompute_us: 2_000_000,
        handover: true,
    };
    let old = PutHints {
        traffic_class: 0,
        recompute_us: 0,
        handover: false,
        ..all
    };
    for (version, expected) in [(3, all), (2, old), (1, old)] {
        let peer = Peer::start();
        peer.grow_old(version);
        let client = connect(&peer);
        // One travels with its put, the other is announced.
        let items = [(1, 100), (2, 100_000)].map(|(n, len)| PutItem {
            hints: all,
            ..PutItem::of_bytes(id(n), bytes(n, len))
        });
        assert_eq!(client.put(items.into()), [PutOutcome::Stored; 2]);
        assert_eq!(peer.hints(), [expected; 2], "version {version}");
    }
}
