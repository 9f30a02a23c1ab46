//! A node that writes what its client reads where the client looks at it, as processes of their own.

mod support;

use kvar_base::{BlockId, MissReason, PutOutcome};
use kvar_client::{
    CallOptions, Client, ClientConfig, Filled, GetItem, GetOutcome, GetResult, LayerItem,
    LinkChoice, PutItem, Staging, VERSIONS, VersionRange,
};
use kvar_node::{Config, DataPath, Hooks, KeyFile, Node};
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::random::Random;
use support::{PATIENCE, Place, Server, config, until};

const REGION: u64 = 16 << 20;

fn id(number: u32) -> BlockId {
    let mut bytes = [0x5d; 32];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    BlockId::new(bytes)
}

fn bytes(number: u32, len: usize) -> Vec<u8> {
    Random::of(u64::from(number)).bytes(len)
}

fn with_region(server: &Server, bytes: u64) -> ClientConfig {
    ClientConfig {
        staging: bytes,
        ..config(server, LinkChoice::Auto)
    }
}

fn staged(server: &Server) -> Client {
    let client = Client::connect(with_region(server, REGION)).unwrap();
    assert_eq!(client.stats().not_staged, None);
    assert_eq!(client.stats().staging_bytes, REGION);
    client
}

fn put(client: &Client, blocks: impl IntoIterator<Item = (u32, usize)>) {
    for (number, len) in blocks {
        let item = PutItem {
            durable: true,
            ..PutItem::of_bytes(id(number), bytes(number, len))
        };
        assert_eq!(client.put(vec![item]), [PutOutcome::Stored], "{len} bytes");
    }
}

fn item(client: &Client, number: u32, len: usize) -> GetItem {
    GetItem::to_staging(id(number), &[len as u32], client.staging(len))
}

/// Reads a block, and says whether the node wrote it in place.
fn read(client: &Client, number: u32, len: usize) -> bool {
    let before = client.stats().hits_placed;
    let results = client.get(vec![item(client, number, len)]);
    assert!(
        results[0].bytes() == Some(&bytes(number, len)[..]),
        "{len} bytes: {:?}",
        results[0].outcome
    );
    client.stats().hits_placed > before
}

#[test]
fn blocks_of_every_size_are_written_where_they_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path()).with(&["--shards", "2"]);
    let server = place.serve();
    let lens = [
        1, 2, 63, 64, 65, 4095, 4096, 4097, 65_535, 65_536, 65_537, 300_001, 524_288,
    ];
    {
        let client = staged(&server);
        put(&client, (0..).zip(lens));
        for (number, len) in (0..).zip(lens) {
            assert!(read(&client, number, len), "{len} bytes were sent");
        }
        // Some sections, several at once, into one buffer.
        let pieces: Vec<Vec<u8>> = (0..7)
            .map(|n| bytes(100 + n, 1000 * n as usize + 1))
            .collect();
        let stored = client.put(vec![PutItem::of_pieces(id(50), pieces.clone())]);
        assert_eq!(stored, [PutOutcome::Stored]);
        let some = pieces[2..5].concat();
        let some_item = GetItem {
            id: id(50),
            sections: Some(2..5),
            into: client.staging(some.len()).into(),
            ..item(&client, 50, 1)
        };
        let some_item = GetItem {
            expected: kvar_client::Lengths::Any,
            ..some_item
        };
        let results = client.get(vec![some_item]);
        assert!(results[0].bytes() == Some(&some[..]), "{:?}", results[0]);
        // A buffer of another length than the block's.
        for wrong in [65_535, 65_537] {
            let to = GetItem {
                expected: kvar_client::Lengths::Any,
                ..item(&client, 9, wrong)
            };
            let results = client.get(vec![to]);
            let miss = GetOutcome::Miss(MissReason::WrongFormat);
            assert_eq!(results[0].outcome, miss);
            assert!(matches!(results[0].into, Filled::Staged(_)));
        }
        let absent = client.get(vec![item(&client, 999, 100)]);
        assert_eq!(absent[0].outcome, GetOutcome::Miss(MissReason::Absent));
        drop((results, absent));
        let stats = client.stats();
        assert_eq!(
            (stats.staging_used, stats.staging_fenced),
            (0, 0),
            "{stats:?}"
        );
        let status = server.json("status", &[]);
        assert_eq!(status["links"]["staging_bytes"], REGION, "{status}");
        assert_eq!(status["links"]["gets_placed"], lens.len() as u64 + 1);
    }
    until("the region is given back", || {
        server.json("status", &[])["links"]["staging_bytes"] == 0
    });
    // From the device.
    assert_eq!(server.stop(), 0);
    let server = place.serve();
    let client = staged(&server);
    for (number, len) in (0..).zip(lens) {
        until("it is read", || {
            client.get(vec![item(&client, number, len)])[0].is_hit()
        });
        assert!(read(&client, number, len));
    }
}

#[test]
fn many_at_once_each_in_its_own_place_and_nothing_beside() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).with(&["--shards", "2"]).serve();
    for links in [1, 2] {
        let config = ClientConfig {
            links,
            ..with_region(&server, REGION)
        };
        let client = Client::connect(config).unwrap();
        let len = |number: u32| 1 + (number as usize * 7_919) % 40_000;
        let first = links as u32 * 1000;
        put(
            &client,
            (first..first + 64).map(|number| (number, len(number))),
        );
        for depth in [1, 7, 64, 256] {
            let mut guards = Vec::new();
            let items = (0..depth).map(|n| {
                let number = first + n % 64;
                let mut guard = client.staging(4096);
                guard.fill(0xa5);
                guards.push(guard);
                item(&client, number, len(number))
            });
            let results = client.get(items.collect());
            for (n, result) in (0..depth).zip(&results) {
                let number = first + n % 64;
                assert!(result.bytes() == Some(&bytes(number, len(number))[..]));
            }
            for guard in &guards {
                assert!(guard.iter().all(|byte| *byte == 0xa5), "beside a place");
            }
        }
        assert!(client.stats().hits_placed > 300, "{:?}", client.stats());
        // More than the region holds: the rest is private, and all is read.
        let items = (0..40).map(|n| item(&client, first + n % 64, len(first + n % 64)));
        let full: Vec<Staging> = (0..31).map(|_| client.staging(512 << 10)).collect();
        let results = client.get(items.collect());
        for (n, result) in (0..40).zip(&results) {
            let number = first + n % 64;
            assert!(result.bytes() == Some(&bytes(number, len(number))[..]));
        }
        drop(full);
    }
}

#[test]
fn without_a_region_the_same_gets_go_to_private_memory_and_the_stats_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path())
        .with(&["--shared-memory-staging", "20MiB"])
        .serve();
    let first = staged(&server);
    put(&first, [(1, 70_000)]);
    let config = |change: fn(&mut ClientConfig)| {
        let mut config = with_region(&server, REGION);
        change(&mut config);
        config
    };
    for (config, part) in [
        (config(|_| ()), "16777216 more are too many"),
        (
            config(|config| config.link = LinkChoice::Tcp),
            "the link shares no memory",
        ),
    ] {
        let client = Client::connect(config).unwrap();
        let why = client.stats().not_staged.unwrap();
        assert!(why.contains(part), "{why}");
        assert!(!client.staging(70_000).is_shared());
        assert!(!read(&client, 1, 70_000));
    }
    // Nobody asked for one.
    let plain = Client::connect(config(|config| config.staging = 0)).unwrap();
    assert!(!read(&plain, 1, 70_000));
    assert_eq!(plain.stats().not_staged, None);
    let status = server.json("status", &[]);
    assert_eq!(status["links"]["stage_declined"]["full"], 1, "{status}");
    // What the first gives back the next one gets.
    drop(first);
    until("there is room again", || {
        let client = Client::connect(with_region(&server, REGION)).unwrap();
        client.stats().staging_bytes == REGION
    });

    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path())
        .with(&["--shared-memory-staging", "0"])
        .serve();
    let client = Client::connect(with_region(&server, REGION)).unwrap();
    put(&client, [(1, 70_000)]);
    let why = client.stats().not_staged.unwrap();
    assert!(why.contains("shared_memory_staging = 0"), "{why}");
    assert!(!read(&client, 1, 70_000));
}

/// Deadlines that pass while the node may write: the memory is held, comes back when the node has said
/// that it is done, and nothing is written to it after that.
#[test]
fn memory_is_held_past_a_deadline_until_the_node_has_fenced_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let client = staged(&server);
    let len = 100_000;
    put(&client, (0..32).map(|number| (number, len)));
    let (mut hits, mut held, mut guards) = (0, 0, Vec::new());
    for round in 0..150_u64 {
        if round == 50 {
            server.signal("-STOP");
        }
        if round == 60 {
            server.signal("-CONT");
        }
        let items = (0..32).map(|number| item(&client, number, len));
        let within = CallOptions::within(Duration::from_micros(200 + 150 * (round % 40)));
        for (number, result) in (0..).zip(client.submit_get(items.collect(), within).wait()) {
            match (&result.outcome, result.into) {
                (GetOutcome::Hit { .. }, Filled::Staged(staging)) => {
                    hits += 1;
                    assert!(staging[..] == bytes(number, len)[..]);
                }
                (GetOutcome::Miss(_), Filled::Held) => held += 1,
                // Never asked for, or of the private kind: free at once, and what is written there stays.
                (GetOutcome::Miss(_), Filled::Staged(mut staging)) => {
                    staging.fill(0xcc);
                    guards.push(staging);
                }
                other => panic!("{other:?}"),
            }
        }
        if guards.len() > 60 {
            guards.drain(..50).for_each(|guard| untouched(&guard));
        }
    }
    until("everything is fenced", || {
        let _ = client.get(vec![item(&client, 3, len)]);
        client.stats().staging_held == 0
    });
    guards.iter().for_each(untouched_staging);
    guards.clear();
    let stats = client.stats();
    assert!(
        held > 100,
        "no deadline passed in time ({held} held, {hits} hits)"
    );
    assert_eq!(stats.staging_fenced, held, "{stats:?}");
    assert_eq!(
        (stats.staging_used, stats.checks_failed),
        (0, 0),
        "{stats:?}"
    );
    assert!(hits > 0 && read(&client, 3, len));
}

fn untouched(guard: &[u8]) {
    assert!(guard.iter().all(|byte| *byte == 0xcc));
}

fn untouched_staging(guard: &Staging) {
    untouched(guard);
}

/// What was under way when the node died is nobody's; what was not stays its holder's, and the next
/// link has a region of its own.
#[test]
fn a_killed_node_takes_the_region_with_it_and_the_next_one_brings_another() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let server = place.serve();
    let endpoint = server.endpoint.clone();
    let client = staged(&server);
    let len = 200_000;
    put(&client, [(1, len)]);
    let results = client.get(vec![item(&client, 1, len)]);
    let kept = results.into_iter().next().unwrap();
    server.signal("-STOP");
    let items = (0..8).map(|_| item(&client, 1, len)).collect();
    let pending = client.submit_get(items, CallOptions::within(PATIENCE));
    server.kill();
    for result in pending.wait() {
        assert_eq!(result.outcome, GetOutcome::Miss(MissReason::Unreachable));
        assert!(!matches!(result.into, Filled::Staged(staging) if staging.is_shared()));
    }
    assert!(kept.bytes() == Some(&bytes(1, len)[..]));
    let stats = client.stats();
    assert_eq!(
        (stats.staging_bytes, stats.staging_held),
        (0, 0),
        "{stats:?}"
    );
    assert!(!client.staging(100).is_shared());
    let _server = place.clone().with(&["--listen", &endpoint]).serve();
    until("there is a region again", || {
        client.get(vec![item(&client, 1, len)])[0].is_hit() && client.stats().staging_bytes > 0
    });
    assert!(read(&client, 1, len));
    // Memory of the region that is gone is memory all the same, and is read into by a copy.
    let before = client.stats().hits_placed;
    let results = client.get(vec![GetItem {
        into: kept.into,
        ..item(&client, 1, len)
    }]);
    assert!(results[0].bytes() == Some(&bytes(1, len)[..]));
    assert_eq!(client.stats().hits_placed, before);
}

#[test]
fn sections_that_come_layer_by_layer_are_written_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let client = staged(&server);
    let layers: Vec<Vec<u8>> = (0..5).map(|n| bytes(n, 65_536)).collect();
    for number in 0..8 {
        let item = PutItem::of_pieces(id(number), layers.clone());
        assert_eq!(client.put(vec![item]), [PutOutcome::Stored]);
    }
    let blocks = (0..8).map(|number| LayerItem {
        id: id(number),
        depth: number,
        into: (0..5).map(|_| client.staging(65_536).into()).collect(),
    });
    let get = client.submit_get_layers(blocks.collect(), CallOptions::default());
    for (section, layer) in layers.iter().enumerate() {
        let misses = get.wait_section(section, PATIENCE).unwrap();
        assert!(misses.iter().all(Option::is_none), "{misses:?}");
        for pieces in get.take_section(section).unwrap() {
            let [Filled::Staged(staging)] = &pieces[..] else {
                panic!("{pieces:?}")
            };
            assert!(staging[..] == layer[..]);
        }
    }
    assert_eq!(client.stats().hits_placed, 40);
}

/// Says to a test that it is the client to be killed, and where the node is: its endpoint and its key file.
const KILLED: [&str; 2] = ["KVAR_TEST_ENDPOINT", "KVAR_TEST_KEY_FILE"];
/// What the killed client reads.
const KILLED_LEN: usize = 300_000;

/// Memory of links and regions that is mapped into a process, in bytes.
fn mapped_bytes(pid: u32) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let shared = maps.lines().filter(|line| line.contains("memfd:kvar-link"));
    let bytes = shared.map(|line| {
        let (range, _) = line.split_once(' ').unwrap();
        let (from, to) = range.split_once('-').unwrap();
        u64::from_str_radix(to, 16).unwrap() - u64::from_str_radix(from, 16).unwrap()
    });
    bytes.sum()
}

/// The client is a process of its own, so that it can be killed: this test once more, told that it is
/// the client. It has a region and as many gets under way as fit in it, again and again.
#[test]
fn a_client_killed_with_gets_under_way_leaves_nothing_that_is_written_to() {
    if let [Some(endpoint), Some(key_file)] = KILLED.map(std::env::var_os) {
        return read_for_ever(endpoint.to_str().unwrap(), Path::new(&key_file));
    }
    let dir = tempfile::tempdir().unwrap();
    // Room for one region and a half: the next client has one only if the last one's was taken back.
    let bound = (REGION * 3 / 2).to_string();
    let place = Place::new(dir.path()).with(&["--shared-memory-staging", &bound]);
    let server = place.serve();
    let other = Client::connect(config(&server, LinkChoice::Auto)).unwrap();
    put(&other, (0..8).map(|number| (number, KILLED_LEN)));
    let status = || server.json("status", &[]);
    let before = mapped_bytes(server.child.id());
    for round in 0..6 {
        let placed = status()["links"]["gets_placed"].as_u64().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        let this_test = "a_client_killed_with_gets_under_way_leaves_nothing_that_is_written_to";
        command.args(["--exact", this_test, "--nocapture"]);
        command.env(KILLED[0], &server.endpoint);
        command.env(KILLED[1], &server.key_file);
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut killed = command.spawn().unwrap();
        until("it reads into its region", || {
            status()["links"]["gets_placed"].as_u64().unwrap() > placed + 100
        });
        assert!(mapped_bytes(server.child.id()) >= before + REGION);
        // In some rounds the node stands still meanwhile, with gets in every state.
        if round % 2 == 1 {
            server.signal("-STOP");
        }
        killed.kill().unwrap();
        assert_eq!(killed.wait().unwrap().signal(), Some(9), "it had ended");
        if round % 2 == 1 {
            server.signal("-CONT");
        }
        let results = other.get((0..8).map(|n| GetItem::to_vec(id(n))).collect());
        for (number, result) in (0..).zip(&results) {
            assert!(result.bytes() == Some(&bytes(number, KILLED_LEN)[..]));
        }
        until("the region is taken back", || {
            status()["links"]["staging_bytes"] == 0
        });
        // No mapping is left through which anything could be written.
        until("it is unmapped", || {
            mapped_bytes(server.child.id()) == before
        });
    }
}

/// The killed client.
fn read_for_ever(endpoint: &str, key_file: &Path) {
    let key = KeyFile::read(key_file).unwrap().key;
    let client = Client::connect(ClientConfig {
        staging: REGION,
        deadline: PATIENCE,
        ..ClientConfig::new(endpoint, key)
    });
    let client = client.unwrap();
    assert_eq!(client.stats().staging_bytes, REGION);
    std::thread::spawn(|| {
        // Until whoever started it is gone.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(1);
    });
    loop {
        let items = (0..48).map(|n| item(&client, n % 8, KILLED_LEN));
        assert!(client.get(items.collect()).iter().all(GetResult::is_hit));
    }
}

/// Each side as an older build would be met, through the real handshake: whoever does not know regions
/// is not asked for one and sent no place, and the same gets go through the rings.
#[test]
fn with_a_node_or_a_client_of_before_the_same_gets_go_through_the_rings() {
    let upto = |newest| VersionRange { newest, ..VERSIONS };
    for (node_speaks, client_speaks) in [(6, 6), (6, 5), (5, 6), (5, 5), (4, 6), (6, 4)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let data = vec![DataPath {
            path,
            size: None,
            tier: None,
        }];
        let mut settings = Config {
            data,
            ..Config::default()
        };
        for (key, text) in [
            ("size", "96MiB"),
            ("dram", "24MiB"),
            ("shards", "1"),
            ("listen", "127.0.0.1:0"),
            ("admin", "127.0.0.1:0"),
        ] {
            settings.set(key, text).unwrap();
        }
        let hooks = Hooks {
            versions: Some(upto(node_speaks)),
            ..Hooks::default()
        };
        let node = Node::listen(&settings, hooks).unwrap();
        node.loaded().unwrap();
        let key = KeyFile::read(node.key_path()).unwrap().key;
        let client = Client::connect(ClientConfig {
            staging: REGION,
            deadline: PATIENCE,
            versions: upto(client_speaks),
            ..ClientConfig::new(&node.listen_addr().to_string(), key)
        });
        let client = client.unwrap();
        put(&client, [(1, 100_000), (2, 1000)]);
        let both_know = node_speaks.min(client_speaks) >= 6;
        for (number, len) in [(1, 100_000), (2, 1000)] {
            assert_eq!(read(&client, number, len), both_know);
        }
        let stats = client.stats();
        assert_eq!(stats.link(), "shm", "{node_speaks} and {client_speaks}");
        if both_know {
            assert_eq!(stats.not_staged, None);
        } else {
            let spoken = format!("protocol version {}", node_speaks.min(client_speaks));
            let why = stats.not_staged.unwrap();
            assert!(why.contains(&spoken), "{why}");
        }
    }
}
