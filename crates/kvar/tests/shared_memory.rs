//! A node and its clients on one host, as processes of their own, with shared memory between them.

mod support;

use kvar_base::{BlockId, MissReason, PutOutcome};
use kvar_client::{
    CallOptions, Client, ClientConfig, ClientError, Filled, GetItem, GetOutcome, LinkChoice,
    PutItem,
};
use std::time::{Duration, Instant};
use support::random::Random;
use support::{PATIENCE, Place, client, config, ticks_when_idle, until};

fn id(number: u32) -> BlockId {
    let mut bytes = [0x5c; 32];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    BlockId::new(bytes)
}

fn bytes(number: u32, len: usize) -> Vec<u8> {
    Random::of(u64::from(number)).bytes(len)
}

/// Every size from one byte to the largest block, read by a client of the other kind as well.
#[test]
fn blocks_of_every_size_go_through_shared_memory() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).with(&["--shards", "2"]).serve();
    let (shared, plain) = (
        client(&server, LinkChoice::Auto),
        client(&server, LinkChoice::Tcp),
    );
    assert_eq!(shared.stats().link(), "shm");
    assert_eq!(plain.stats().link(), "tcp");
    let largest = 512 << 10;
    let lens = [
        1, 2, 4095, 4096, 4097, 65_535, 65_536, 65_537, 300_001, largest,
    ];
    for (number, len) in (0..).zip(lens) {
        let of = bytes(number, len);
        let (writer, reader) = if number % 2 == 0 {
            (&shared, &plain)
        } else {
            (&plain, &shared)
        };
        let put = vec![PutItem::of_bytes(id(number), of.clone())];
        assert_eq!(writer.put(put), [PutOutcome::Stored], "{len} bytes");
        for client in [reader, writer] {
            let results = client.get(vec![GetItem::to_vec(id(number))]);
            assert!(results[0].bytes() == Some(&of[..]), "{len} bytes");
        }
    }
    // In one call, more than the ring takes.
    let items = (0..10).map(|number| GetItem::to_vec(id(number))).collect();
    for (number, result) in (0..).zip(shared.get(items)) {
        assert!(result.bytes() == Some(&bytes(number, lens[number as usize])[..]));
    }
    let status = server.json("status", &[]);
    // The status was asked for over a third link, of a command on this host.
    assert_eq!(status["links"]["links_shared"], 2, "{status}");
    assert_eq!(status["links"]["links_attached"], 2);
    let text = server.run("status", &[]).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("this link") && text.contains("shm"), "{text}");
    let plain = server.run("status", &["--link", "tcp"]).stdout;
    let plain = String::from_utf8(plain).unwrap();
    assert!(plain.contains("no shared memory: link = tcp"), "{plain}");
}

#[test]
fn what_cannot_be_shared_stays_on_tcp_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path())
        .with(&["--shared-memory", "off"])
        .serve();
    let plain = client(&server, LinkChoice::Auto);
    let stats = plain.stats();
    assert_eq!((stats.link(), stats.attach_declined), ("tcp", 1));
    let why = stats.not_shared.unwrap();
    assert!(why.contains("shared_memory = off"), "{why}");
    let put = vec![PutItem::of_bytes(id(1), bytes(1, 1000))];
    assert_eq!(plain.put(put), [PutOutcome::Stored]);
    let refused = Client::connect(config(&server, LinkChoice::Shm)).unwrap_err();
    assert!(matches!(&refused, ClientError::Config(_)), "{refused}");
    assert!(refused.to_string().contains("link = auto"), "{refused}");
    let status = server.json("status", &[]);
    assert_eq!(status["links"]["attach_declined"]["off"], 3, "{status}");

    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path())
        .with(&["--shared-memory-links", "1"])
        .serve();
    let first = client(&server, LinkChoice::Shm);
    let second = client(&server, LinkChoice::Auto);
    let why = second.stats().not_shared.unwrap();
    assert!(why.contains("as many as may"), "{why}");
    let refused = Client::connect(config(&server, LinkChoice::Shm)).unwrap_err();
    assert!(matches!(&refused, ClientError::Busy(_)), "{refused}");
    // What the first gives back the next one gets.
    drop(first);
    until("a place is free again", || {
        client(&server, LinkChoice::Auto).stats().link() == "shm"
    });
}

#[test]
fn a_killed_node_is_felt_at_once_and_one_that_comes_back_is_shared_with_again() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let server = place.serve();
    let endpoint = server.endpoint.clone();
    let client = client(&server, LinkChoice::Auto);
    let put = vec![PutItem {
        durable: true,
        ..PutItem::of_bytes(id(1), bytes(1, 200_000))
    }];
    assert_eq!(client.put(put), [PutOutcome::Stored]);
    server.kill();
    let begun = Instant::now();
    let results = client.get(vec![GetItem::to_vec(id(1))]);
    let unreachable = GetOutcome::Miss(MissReason::Unreachable);
    assert_eq!(results[0].outcome, unreachable);
    // Long before the deadline of a minute: nobody waited for it.
    assert!(begun.elapsed() < PATIENCE / 4, "{:?}", begun.elapsed());
    assert_eq!(client.stats().link(), "none");
    let _server = place.clone().with(&["--listen", &endpoint]).serve();
    until("the block is read again", || {
        let results = client.get(vec![GetItem::to_vec(id(1))]);
        results[0].bytes() == Some(&bytes(1, 200_000)[..])
    });
    assert_eq!(client.stats().link(), "shm");
}

/// Deadlines that pass while payload is under way: the place is the caller's again, and what is written
/// there afterwards by the caller stays.
#[test]
fn a_place_that_was_given_back_is_never_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let client = client(&server, LinkChoice::Shm);
    let len = 100_000;
    let items = (0..32).map(|number| PutItem::of_bytes(id(number), bytes(number, len)));
    assert_eq!(client.put(items.collect()), [PutOutcome::Stored; 32]);
    let (mut late, mut hits) = (0, 0);
    let mut kept: Vec<Vec<u8>> = Vec::new();
    for round in 0..150_u64 {
        if round == 50 {
            server.signal("-STOP");
        }
        if round == 60 {
            server.signal("-CONT");
        }
        let items = (0..32).map(|number| GetItem {
            into: Filled::Bytes(vec![0xee; len]),
            ..GetItem::to_vec(id(number))
        });
        let within = CallOptions::within(Duration::from_micros(200 + 150 * (round % 40)));
        let results = client.submit_get(items.collect(), within).wait();
        for (number, result) in (0..).zip(results) {
            match result.outcome {
                GetOutcome::Hit { .. } => {
                    hits += 1;
                    assert!(result.bytes() == Some(&bytes(number, len)[..]));
                }
                GetOutcome::Miss(MissReason::Deadline | MissReason::Unreachable) => {
                    late += 1;
                    if let Filled::Bytes(mut place) = result.into {
                        place.fill(0xcc);
                        kept.push(place);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        if kept.len() > 400 {
            kept.drain(..200).for_each(|place| untouched(&place));
        }
    }
    // What was under way has come by now, and went nowhere.
    until("the link is well again", || {
        let results = client.get(vec![GetItem::to_vec(id(3))]);
        results[0].bytes() == Some(&bytes(3, len)[..])
    });
    kept.iter().for_each(|place| untouched(place));
    assert!(
        late > 100,
        "no deadline passed in time ({late} late, {hits} hits)"
    );
    assert_eq!(client.stats().checks_failed, 0);
}

fn untouched(place: &[u8]) {
    assert!(place.iter().all(|byte| *byte == 0xcc));
}

/// Several clients at once, some of which spin; the node spins too, and goes to sleep all the same.
#[test]
fn many_clients_share_memory_each_with_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path())
        .with(&["--shards", "2", "--spin-us", "200"])
        .serve();
    let threads: Vec<_> = (0..6)
        .map(|who| {
            let config = ClientConfig {
                spin: Duration::from_micros(if who % 2 == 0 { 100 } else { 0 }),
                links: 1 + who as usize % 2,
                ..config(&server, LinkChoice::Shm)
            };
            std::thread::spawn(move || {
                let client = Client::connect(config).unwrap();
                for round in 0..20 {
                    let number = |item: u32| who * 10_000 + round * 10 + item;
                    let len = |item: u32| 1 + (number(item) as usize * 7_919) % 150_000;
                    let put = |item| PutItem::of_bytes(id(number(item)), bytes(item, len(item)));
                    let stored = client.put((0..4).map(put).collect());
                    assert_eq!(stored, [PutOutcome::Stored; 4]);
                    let got = client.get((0..4).map(|n| GetItem::to_vec(id(number(n)))).collect());
                    for (item, result) in (0..).zip(got) {
                        assert!(result.bytes() == Some(&bytes(item, len(item))[..]));
                    }
                }
                client.stats().link().to_owned()
            })
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), "shm");
    }
    until("all links are gone", || {
        server.json("status", &["--link", "tcp"])["links"]["links_shared"] == 0
    });
}

#[test]
fn an_idle_link_costs_the_node_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).with(&["--scrub", "0"]).serve();
    let clients: Vec<Client> = (0..8).map(|_| client(&server, LinkChoice::Shm)).collect();
    for client in &clients {
        let _ = client.get(vec![GetItem::to_vec(id(7))]);
    }
    let [used] = ticks_when_idle([(server.child.id(), 4)]);
    assert!(
        used <= 4,
        "an idle node with idle links used {used}0 ms of 2 s"
    );
    for client in &clients {
        let miss = GetOutcome::Miss(MissReason::Absent);
        assert_eq!(client.get(vec![GetItem::to_vec(id(7))])[0].outcome, miss);
        assert_eq!(client.stats().link(), "shm");
    }
}
