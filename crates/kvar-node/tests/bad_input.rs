//! Bad input of every kind a node can be given in its own process: settings, storage, peers. Each
//! gets a clear answer, nothing is lost, nothing hangs, and the node serves on.

mod support;

use kvar_base::{BlockId, MapEpoch, NamespaceKey, PutOutcome, Refusal};
use kvar_node::{Config, Node};
use kvar_wire::*;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use support::{Peer, bytes_of, config, key_of, start, until};

/// The error of a start that must fail says all of `parts`.
fn refused(config: &Config, parts: &[&str]) {
    let error = Node::start(config)
        .expect_err("a start that must fail")
        .to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

/// Stops a node that has just stored something and hands its settings back.
fn stored(config: &Config) -> BlockId {
    let node = start(config);
    let id = BlockId::new([1; 32]);
    let outcome = Peer::greet(&node).put(id, &[&bytes_of(&id, 10_000)], true);
    assert_eq!(outcome, PutOutcome::Stored);
    node.shutdown();
    node.wait();
    id
}

fn flip(path: &std::path::Path, at: u64, len: usize) {
    let mut file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut bytes = vec![0; len];
    file.seek(SeekFrom::Start(at)).unwrap();
    file.read_exact(&mut bytes).unwrap();
    bytes.iter_mut().for_each(|byte| *byte ^= 0xa5);
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&bytes).unwrap();
}

#[test]
fn sizes_and_paths_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), 1);
    let with = |key: &str, text: &str| {
        let mut config = good.clone();
        config.set(key, text).unwrap();
        config
    };
    refused(&with("size", "3TiB"), &["3TiB", "ask for less"]);
    refused(&with("size", "1MiB"), &["too few", "give at least"]);
    refused(
        &Config {
            size: None,
            ..good.clone()
        },
        &["has no size", "4GiB"],
    );
    let missing = dir.path().join("no/such/folder/data");
    refused(
        &with("data", missing.to_str().unwrap()),
        &["does not exist", "mkdir -p"],
    );
    refused(&with("data", dir.path().to_str().unwrap()), &["folder"]);
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "nothing is left behind"
    );
}

#[test]
fn a_port_that_is_taken_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for key in ["listen", "admin"] {
        let mut config = config(dir.path(), 1);
        config.set(key, &address).unwrap();
        refused(&config, &[&address, "port 0"]);
    }
    start(&config(dir.path(), 1));
}

#[test]
fn a_second_server_on_the_same_data_is_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 1);
    let node = start(&config);
    refused(&config, &["in use", "stop the other server"]);
    let id = BlockId::new([1; 32]);
    assert_eq!(
        Peer::greet(&node).put(id, &[b"x"], false),
        PutOutcome::Stored
    );
}

#[test]
fn data_and_key_must_belong_together() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (config, other_config) = (config(dir.path(), 1), config(other.path(), 1));
    let id = stored(&config);
    stored(&other_config);
    let key = config.key_path();
    let (data, other_data) = (&config.data[0].path, &other_config.data[0].path);

    // The data file of another device.
    let away = dir.path().join("away");
    std::fs::rename(data, &away).unwrap();
    std::fs::copy(other_data, data).unwrap();
    refused(&config, &["swapped", "--key-file"]);
    std::fs::rename(&away, data).unwrap();

    // No key, and a key that others can read.
    let kept = std::fs::read(&key).unwrap();
    std::fs::remove_file(&key).unwrap();
    refused(&config, &["holds data", "missing", "restore"]);
    std::fs::write(&key, &kept).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    refused(&config, &["chmod 600"]);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();

    // Another number of shards than it was made with, another size.
    let mut more = config.clone();
    more.set("shards", "2").unwrap();
    more.set("dram", "64MiB").unwrap();
    refused(
        &more,
        &["1 shards", "2 were asked for", "leave --shards out"],
    );
    let mut larger = config.clone();
    larger.set("size", "200MiB").unwrap();
    refused(
        &larger,
        &["were asked for", "give the size it was made with"],
    );

    // None of this cost anything.
    let node = start(&config);
    assert!(Peer::greet(&node).get(id) == Ok(bytes_of(&id, 10_000)));
}

#[test]
fn a_data_file_that_is_damaged_says_how() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        size: None,
        ..config(dir.path(), 1)
    };
    let sized = support::config(dir.path(), 1);
    let id = stored(&sized);
    let data = &config.data[0].path;
    let whole = std::fs::read(data).unwrap();

    std::fs::File::options()
        .write(true)
        .open(data)
        .unwrap()
        .set_len(50 << 20)
        .unwrap();
    refused(&config, &["truncated"]);
    std::fs::write(data, &whole).unwrap();

    // Not kvar's at all: left alone.
    let foreign = dir.path().join("foreign");
    let text = b"somebody's thesis ".repeat(1 << 20);
    std::fs::write(&foreign, &text).unwrap();
    let other = Config {
        data: vec![kvar_node::DataPath {
            path: foreign.clone(),
            size: None,
            tier: None,
        }],
        ..config.clone()
    };
    refused(&other, &["not kvar's"]);
    assert!(std::fs::read(&foreign).unwrap() == text);

    // Flipped bytes: one superblock copy is mended, a block is a miss and can be put again.
    flip(data, 100, 8);
    let at = whole
        .windows(64)
        .position(|window| window == &bytes_of(&id, 10_000)[..64])
        .unwrap();
    flip(data, at as u64 + 5000, 1);
    let node = start(&config);
    let mut peer = Peer::greet(&node);
    assert_eq!(peer.get(id), Err(kvar_base::MissReason::Corrupt));
    assert_eq!(
        peer.put(id, &[&bytes_of(&id, 10_000)], false),
        PutOutcome::Stored
    );
    assert!(peer.get(id) == Ok(bytes_of(&id, 10_000)));
}

#[test]
fn wrong_keys_versions_and_namespaces_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let key = key_of(&node);
    let shake = |namespace: &str, key: &NamespaceKey| {
        Peer::connect(node.listen_addr())
            .shake(namespace, key)
            .unwrap_err()
    };
    let wrong = NamespaceKey::new([5; 32]);
    let error = shake("default", &wrong);
    assert!(matches!(error, HandshakeError::Key(_)), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains(&key.short_name()) && text.contains(&wrong.short_name()),
        "{text}"
    );
    assert!(matches!(shake("other", &key), HandshakeError::Namespace(_)));

    let mut peer = Peer::connect(node.listen_addr());
    let handshake = ClientHandshake::new("default", key, "from the future", [7; 32]);
    let versions = VersionRange {
        oldest: 7,
        newest: 9,
    };
    peer.send(
        LINK_REQUEST,
        &Hello {
            versions,
            ..handshake.hello().clone()
        },
    );
    let failure = peer.failure();
    assert_eq!(failure.code, FailureCode::Version);
    assert!(failure.text.contains("7 to 9"), "{}", failure.text);

    // Nothing is served before the proof.
    let mut peer = Peer::connect(node.listen_addr());
    peer.send(3, &Status {});
    assert_eq!(peer.failure().code, FailureCode::Protocol);
}

#[test]
fn broken_frames_end_their_link_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let mut good = Peer::greet(&node);
    let id = BlockId::new([1; 32]);
    assert_eq!(
        good.put(id, &[&bytes_of(&id, 10_000)], false),
        PutOutcome::Stored
    );
    let frame = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        let get = Peer::get_message(vec![Peer::item(id)]);
        encode(&mut bytes, 5, MapEpoch::SINGLE_NODE, &get, 0).unwrap();
        change(&mut bytes);
        bytes
    };
    let recheck = |bytes: &mut Vec<u8>| {
        let check = kvar_base::check::crc64(&bytes[..32]) as u32;
        bytes[32..36].copy_from_slice(&check.to_le_bytes());
    };
    let broken = [
        frame(&|bytes| bytes[0] = b'X'),
        // Type.
        frame(&|bytes| {
            bytes[4] = 99;
            recheck(bytes);
        }),
        // Lengths: of the message, of a payload it may not have, beyond every bound.
        frame(&|bytes| {
            bytes[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
            recheck(bytes);
        }),
        frame(&|bytes| {
            bytes[28..32].copy_from_slice(&7_u32.to_le_bytes());
            recheck(bytes);
        }),
        // Checks: of the header, of the message.
        frame(&|bytes| bytes[9] ^= 1),
        frame(&|bytes| *bytes.last_mut().unwrap() ^= 1),
        b"GET / HTTP/1.1\r\nHost: kvar\r\n\r\n".repeat(4),
    ];
    for bytes in broken {
        for greeted in [true, false] {
            let mut peer = if greeted {
                Peer::greet(&node)
            } else {
                Peer::connect(node.listen_addr())
            };
            // The node may close while this is still being sent.
            let _ = peer.stream.write_all(&bytes);
            while let Some((_, message, _)) = peer.try_receive() {
                assert!(matches!(message, Message::Failure(_)), "{message:?}");
            }
        }
    }
    // A message whose bytes are no such message, with right checks.
    let mut peer = Peer::greet(&node);
    let garbage = frame(&|bytes| {
        let len = bytes.len();
        bytes[40..].fill(0xff);
        let check = kvar_base::check::crc64(&bytes[40..len]) as u32;
        bytes[36..40].copy_from_slice(&check.to_le_bytes());
    });
    peer.stream.write_all(&garbage).unwrap();
    assert_eq!(peer.failure().code, FailureCode::Protocol);
    assert!(
        good.get(id) == Ok(bytes_of(&id, 10_000)),
        "other links are as they were"
    );
}

#[test]
fn requests_that_make_no_sense_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let mut peer = Peer::greet(&node);
    let max = peer.welcome.as_ref().unwrap().limits.block_bytes_max as usize;
    let (id, refused) = (BlockId::new([2; 32]), PutOutcome::Refused);
    assert_eq!(
        peer.put(id, &[&vec![1; max + 1]], false),
        refused(Refusal::TooBig)
    );
    assert_eq!(
        peer.put(id, &[&[]], false),
        refused(Refusal::WrongFormat),
        "zero length"
    );
    assert_eq!(
        peer.put(id, &[], false),
        refused(Refusal::WrongFormat),
        "no section"
    );
    assert_eq!(
        peer.put(id, &[b"a", &[], b"b"], false),
        refused(Refusal::WrongFormat)
    );

    // Bytes that are not what the writer's own check says.
    let mut put = Peer::put_message(id, &[b"hello"], false);
    let request = peer.number();
    peer.send_with(request, &put, b"jello");
    let answer = PutAnswer {
        outcome: refused(Refusal::WrongFormat),
    };
    assert_eq!(peer.receive().1, Message::PutAnswer(answer));
    // A payload that is not as long as its sections.
    put.sections[0].len = 9;
    let request = peer.number();
    peer.send_with(request, &put, b"hello");
    assert_eq!(peer.receive().1, Message::PutAnswer(answer));
    assert_eq!(peer.get(id), Err(kvar_base::MissReason::Absent));

    // The same id with the same and with other bytes: the first stays.
    assert_eq!(peer.put(id, &[b"first"], false), PutOutcome::Stored);
    assert_eq!(peer.put(id, &[b"first"], false), PutOutcome::Exists);
    assert_eq!(peer.put(id, &[b"other"], false), PutOutcome::Exists);
    assert!(peer.get(id).as_deref() == Ok(b"first"));

    // What no client of ours sends ends its link.
    let twice = |peer: &mut Peer| {
        let request = peer.number();
        let announce = Peer::put_message(BlockId::new([3; 32]), &[&vec![1; 100_000]], false);
        peer.send(request, &announce);
        peer.send(request, &announce);
    };
    let unasked = |peer: &mut Peer| {
        let request = peer.number();
        peer.send(
            request,
            &Peer::put_message(BlockId::new([4; 32]), &[&vec![1; 100_000]], false),
        );
        peer.send_with(request, &Payload {}, b"another length");
    };
    let answers = |peer: &mut Peer| peer.send(9, &Pong {});
    let nothing = |peer: &mut Peer| peer.send(9, &Peer::get_message(Vec::new()));
    let eager = |peer: &mut Peer| {
        let bytes = vec![1; 100_000];
        peer.send_with(
            9,
            &Peer::put_message(BlockId::new([5; 32]), &[&bytes], false),
            &bytes,
        );
    };
    let cases: [&dyn Fn(&mut Peer); 5] = [&twice, &unasked, &answers, &nothing, &eager];
    for (number, case) in cases.iter().enumerate() {
        let mut peer = Peer::greet(&node);
        case(&mut peer);
        // An answer to what was right may come first.
        let code = loop {
            match peer.receive().1 {
                Message::Failure(failure) => break failure.code,
                Message::Pull(_) => {}
                other => panic!("case {number}: {other:?}"),
            }
        };
        assert_eq!(code, FailureCode::Protocol, "case {number}");
    }
    assert!(peer.get(id).as_deref() == Ok(b"first"));
}

#[test]
fn more_connections_than_allowed_are_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 2);
    config.set("connections_max", "2").unwrap();
    let node = start(&config);
    let (mut one, two) = (Peer::greet(&node), Peer::greet(&node));
    let error = Peer::connect(node.listen_addr())
        .shake("default", &key_of(&node))
        .unwrap_err();
    assert!(matches!(&error, HandshakeError::Busy(text) if text.contains("connections_max")));
    drop(two);
    // A place is free once the node has seen it go.
    let greet = || Peer::connect(node.listen_addr()).shake("default", &key_of(&node));
    until("a place is free", || greet().is_ok());
    assert_eq!(one.ask(&Ping {}), Message::Pong(Pong {}));
}

/// Whoever asks to share memory and cannot have it hears why and keeps its link.
#[test]
fn asking_in_vain_to_share_memory_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 1));
    let mut peer = Peer::greet(&node);
    let attach = Attach {
        place: [0x3c; 16],
        secret: [1; 16],
    };
    let declined = |peer: &mut Peer| match peer.ask(&attach) {
        Message::AttachAnswer(AttachAnswer::Declined { why, text }) => (why, text),
        other => panic!("{other:?}"),
    };
    // Nobody listens at the place.
    let (why, text) = declined(&mut peer);
    assert_eq!(why, AttachDeclined::Remote, "{text}");
    assert!(text.contains("cannot be reached"), "{text}");
    // Something is under way: an announced put.
    let id = BlockId::new([77; 32]);
    let block = vec![5; 100_000];
    let request = peer.number();
    peer.send(request, &Peer::put_message(id, &[&block], false));
    assert_eq!(peer.receive().1, Message::Pull(Pull {}));
    let (why, text) = declined(&mut peer);
    assert_eq!(why, AttachDeclined::Late, "{text}");
    // The link goes on as if nothing had been asked.
    peer.send_with(request, &Payload {}, &block);
    let stored = PutAnswer {
        outcome: kvar_base::PutOutcome::Stored,
    };
    assert_eq!(peer.receive().1, Message::PutAnswer(stored));
    assert!(peer.get(id) == Ok(block));
    let Message::StatusAnswer(status) = peer.ask(&Status {}) else {
        panic!("no status");
    };
    let status: serde_json::Value = serde_json::from_str(&status.json).unwrap();
    let counted = &status["links"]["attach_declined"];
    assert_eq!(
        (&counted["remote"], &counted["late"]),
        (&1.into(), &1.into())
    );
    assert_eq!(status["links"]["links_shared"], 0);
}

#[test]
fn listening_beyond_loopback_needs_a_word() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 1);
    config.set("listen", "0.0.0.0:0").unwrap();
    refused(&config, &["--insecure", "not encrypted"]);
    config.set("insecure", "true").unwrap();
    let node = start(&config);
    assert!(node.facts().insecure);
    let page = http(node.admin_addr(), "/metrics");
    assert!(page.contains("kvar_insecure 1"), "{page}");
    assert!(http(node.admin_addr(), "/v1/status").contains("\"insecure\":true"));
}

#[test]
fn the_admin_http_says_how_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&config(dir.path(), 2));
    let id = BlockId::new([1; 32]);
    let mut peer = Peer::greet(&node);
    assert_eq!(
        peer.put(id, &[&bytes_of(&id, 10_000)], true),
        PutOutcome::Stored
    );
    assert!(peer.get(id).is_ok());
    assert!(peer.get(BlockId::new([2; 32])).is_err());
    assert!(http(node.admin_addr(), "/livez").contains("200 OK"));
    assert!(http(node.admin_addr(), "/readyz").contains("200 OK"));
    assert!(http(node.admin_addr(), "/nothing").contains("404"));
    let page = http(node.admin_addr(), "/metrics");
    for line in [
        "kvar_puts_total{outcome=\"stored\"} 1",
        "kvar_get_hits_total 1",
        "kvar_get_misses_total{reason=\"absent\"} 1",
        "kvar_received_bytes_total 10000",
        "kvar_shards_silent 0",
        "kvar_insecure 0",
        "# UNIT kvar_dram_used_bytes bytes",
        "# EOF",
    ] {
        assert!(page.contains(line), "{page}\nlacks {line}");
    }
    let body = http(node.admin_addr(), "/v1/status");
    let status: serde_json::Value =
        serde_json::from_str(body.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(status["epoch"], 1);
    assert_eq!(status["ready"], true);
    assert_eq!(status["unflushed_puts"], 0);
    assert!(status["flushed_through"].as_f64().unwrap() > 1e9);
    assert!(status["write_amplification"].as_f64().unwrap() >= 1.0);
    assert_eq!(status["uuid"], node.facts().uuid);
}

fn http(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: kvar\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
