//! A server's life as a process: starts, stops, kills, and what is still there afterwards.

mod support;

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;
use support::{PATIENCE, Place, Server, fails, finish, kvar, ticks_when_idle, until, write_trace};

fn check_is_clean(place: &Place) {
    let mut check = kvar();
    check.arg("check").arg(place.data()).arg("--json");
    let output = finish(check);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_stop_keeps_everything_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    // Nothing is written by time: what survives was written by the stop.
    let place = Place::new(dir.path()).with(&["--flush-after", "1h"]);
    let server = place.serve();
    let file = dir.path().join("file");
    for number in 0..20_u8 {
        std::fs::write(&file, vec![number; 50_000]).unwrap();
        server.json("put", &[&format!("block {number}"), file.to_str().unwrap()]);
    }
    assert_eq!(server.stop(), 0);
    let log = place.log();
    assert!(
        log.contains("dropped_blocks=0") && log.contains("kept_blocks=20"),
        "{log}"
    );
    assert!(
        !dir.path().join("ready.json").exists(),
        "a stopped node is not ready"
    );
    check_is_clean(&place);
    let server = place.serve();
    for number in 0..20_u8 {
        assert!(server.run("get", &[&format!("block {number}")]).stdout == vec![number; 50_000]);
    }
    let stat = server.json("stat", &["block 3"]);
    assert_eq!(stat["on_flash"], true);
}

#[test]
fn one_data_file_has_one_server_and_one_key() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let place = Place::new(dir.path());
    let server = place.serve();
    let twin = Place {
        dir: dir.path().to_path_buf(),
        ..place.clone()
    };
    let (code, text) = twin.refuse();
    assert!(code == 1 && text.contains("in use"), "{text}");
    let mut check = kvar();
    check.arg("check").arg(place.data());
    fails(check, 1, &["in use"]);
    let mut taken = place.clone().with(&["--listen", &server.endpoint]);
    taken.dir = other.path().to_path_buf();
    let (code, text) = taken.refuse();
    assert!(
        code == 1 && text.contains(&server.endpoint) && text.contains("port 0"),
        "{text}"
    );
    assert_eq!(server.stop(), 0);

    let elsewhere = Place::new(other.path());
    let _ = std::fs::remove_file(elsewhere.data());
    let _ = std::fs::remove_file(other.path().join("data.key"));
    elsewhere.serve().stop();
    std::fs::copy(elsewhere.data(), place.data()).unwrap();
    let (code, text) = place.refuse();
    assert!(code == 1 && text.contains("swapped"), "{text}");
}

#[test]
fn a_large_new_store_is_ready_at_once() {
    let dir = tempfile::tempdir().unwrap();
    // As large as the disk lets it be, up to what one shard can address; the memory of the index
    // is kept small by a large expected block.
    let free = rustix::fs::statvfs(dir.path()).unwrap();
    let free = free.f_bavail * free.f_frsize;
    let size = (free / 2).min(1 << 40);
    let size = format!("{size}");
    let flags = ["--size", &size, "--expected-block-bytes", "1MiB"];
    let server = Place::new(dir.path()).with(&flags).serve();
    assert!(
        server.ready_after < Duration::from_secs(2),
        "{:?} for {size}",
        server.ready_after
    );
    assert_eq!(server.stop(), 0);
}

#[test]
fn threads_do_what_the_ring_does() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path()).with(&["--io-engine", "threads", "--shards", "2"]);
    let server = place.serve();
    assert_eq!(
        server.json("status", &[])["shards"][1]["io_engine"],
        "threads"
    );
    replay(
        &server,
        dir.path(),
        &["--block-bytes", "20000", "--sections", "3"],
    );
    assert_eq!(server.stop(), 0);
    check_is_clean(&place);
}

/// A replay that must find everything it may find.
fn replay(server: &Server, dir: &Path, words: &[&str]) -> serde_json::Value {
    let trace = dir.join("trace.jsonl");
    write_trace(&trace, 300, 5);
    let report = server.json("replay", &[&[trace.to_str().unwrap()], words].concat());
    assert_eq!(
        report["block_hit_rate"], report["ceiling_block_hit_rate"],
        "{report}"
    );
    assert_eq!(
        report["token_hit_rate"], report["ceiling_token_hit_rate"],
        "{report}"
    );
    assert_eq!(
        (&report["wrong_bytes"], &report["failed_calls"]),
        (&0.into(), &0.into())
    );
    assert!(report["verified_bytes"].as_u64().unwrap() > 0);
    report
}

#[test]
fn a_replay_finds_the_ceiling_one_by_one_and_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    // Memory for all of it: what is asked here must not depend on how busy the disk is.
    let place = Place::new(dir.path()).with(&["--shards", "2", "--dram", "384MiB"]);
    let server = place.serve();
    // Another block size makes other ids: each replay begins with nothing.
    replay(&server, dir.path(), &["--block-bytes", "40000"]);
    replay(
        &server,
        dir.path(),
        &["--block-bytes", "40001", "--concurrency", "6"],
    );
    let report = replay(
        &server,
        dir.path(),
        &["--block-bytes", "100KiB", "--pace", "real"],
    );
    for key in [
        "get_bytes_per_s",
        "put_bytes_per_s",
        "lookup_p50_us",
        "get_p50_us",
        "get_p99_us",
        "put_p99_us",
        "write_amplification",
    ] {
        assert!(
            report[key].as_f64().is_some_and(|value| value > 0.0),
            "{key}: {report}"
        );
    }
    let status = server.json("status", &[]);
    let bound = status["memory_bytes_bound"].as_u64().unwrap();
    assert!(
        server.resident_bytes() <= bound,
        "{} of {bound}",
        server.resident_bytes()
    );
}

#[test]
fn the_conversation_trace_hits_its_ceiling() {
    let trace =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../traces/mooncake-conversation.jsonl.zst");
    let dir = tempfile::tempdir().unwrap();
    let flags = [
        "--size",
        "1600MiB",
        "--dram",
        "128MiB",
        "--expected-block-bytes",
        "4KiB",
    ];
    let server = Place::new(dir.path()).with(&flags).serve();
    let words = [trace.to_str().unwrap(), "--block-bytes", "4KiB"];
    let report = server.json("replay", &words);
    assert_eq!(
        report["block_hit_rate"], report["ceiling_block_hit_rate"],
        "{report}"
    );
    let rate = report["block_hit_rate"].as_f64().unwrap();
    assert!((rate - 0.366).abs() < 0.001, "{rate}");
    assert_eq!(
        (&report["wrong_bytes"], &report["failed_calls"]),
        (&0.into(), &0.into())
    );
}

/// Kills a server in the middle of a replay, restarts it, and asks for everything it acknowledged.
/// What must be there is what the node itself called flushed just before: on a disk that other
/// tests keep busy a flush takes longer than any multiple of flush_after.
#[test]
fn a_kill_loses_nothing_that_was_settled() {
    let dir = tempfile::tempdir().unwrap();
    let place =
        Place::new(dir.path()).with(&["--flush-after", "100ms", "--shards", "2", "--size", "1GiB"]);
    let trace = dir.path().join("trace.jsonl");
    write_trace(&trace, 20_000, 11);
    let (mut server, mut settled) = (place.serve(), 0);
    for (round, after_ms) in [600, 250, 900, 400].into_iter().enumerate() {
        let journal = dir.path().join(format!("journal {round}"));
        // Another block size in each round: its ids are its own, the store goes on.
        let block_bytes = (30_000 + 1000 * round).to_string();
        let mut command = server.command("replay");
        command
            .arg(&trace)
            .args(["--block-bytes", &block_bytes, "--remove-every", "7"]);
        command.args(["--deadline", "2s", "--concurrency", "2", "--json"]);
        command.arg("--journal").arg(&journal);
        let running = std::thread::spawn(move || finish(command));
        // Under way first, however busy the machine is; then somewhere in the middle.
        let what = std::fmt::from_fn(|f| write!(f, "the replay is under way: {}", place.log()));
        let written = || std::fs::metadata(&journal).map_or(0, |journal| journal.len());
        until(what, || written() >= 20_000);
        // When it is killed is the round's own.
        std::thread::sleep(Duration::from_millis(after_ms));
        let (_, flushed_through_us) = server.status_flushed();
        let place = server.kill();
        let output = running.join().unwrap();
        assert_eq!(
            output.status.code(),
            Some(1),
            "the replay says that the node went away"
        );
        assert!(String::from_utf8_lossy(&output.stderr).contains("went away"));

        server = place.serve();
        let report = server.verify(&journal, flushed_through_us);
        settled += report["settled"].as_u64().unwrap();
        assert_eq!(
            report["settled"], report["settled_hits"],
            "round {round}: {report}"
        );
        assert_eq!(report["wrong_bytes"], 0, "round {round}: {report}");
        assert_eq!(report["removed_but_back"], 0, "round {round}: {report}");
    }
    assert!(settled > 0, "nothing was flushed before any kill");
    let place = server.kill();
    check_is_clean(&place);
}

#[test]
fn what_was_removed_stays_away_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let server = place.serve();
    let file = dir.path().join("file");
    std::fs::write(&file, b"here and gone").unwrap();
    let file = file.to_str().unwrap();
    server.json("put", &["gone", file, "--durable"]);
    server.json("put", &["kept", file, "--durable"]);
    assert_eq!(server.json("remove", &["gone"])["removed"], 1);
    let server = server.kill().serve();
    assert_eq!(server.run("get", &["gone"]).status.code(), Some(3));
    assert_eq!(server.run("get", &["kept"]).stdout, b"here and gone");
}

#[test]
fn a_server_that_is_killed_or_stuck_costs_a_client_its_deadline_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let server = place.serve();
    let file = dir.path().join("file");
    std::fs::write(&file, vec![1; 100_000]).unwrap();
    let file = file.to_str().unwrap();
    server.json("put", &["block", file]);
    // Stopped, not dead: the connection stands and nothing answers.
    server.signal("-STOP");
    for words in [&["get", "block"][..], &["put", "other", file]] {
        let mut command = server.command(words[0]);
        command.args(&words[1..]).args(["--deadline", "300ms"]);
        let begun = std::time::Instant::now();
        fails(command, 1, &[]);
        assert!(
            begun.elapsed() < PATIENCE / 3,
            "{words:?} took {:?}",
            begun.elapsed()
        );
    }
    server.signal("-CONT");
    assert_eq!(
        server.run("get", &["block"]).stdout,
        vec![1; 100_000],
        "and it goes on"
    );

    // A client that is killed in the middle of a put leaves nothing half.
    let mut put = server.command("put");
    put.args(["piped", "-"]).stdin(std::process::Stdio::piped());
    let mut child = put.stderr(std::process::Stdio::null()).spawn().unwrap();
    child
        .stdin
        .as_mut()
        .unwrap()
        .write_all(&[2; 70_000])
        .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(server.run("get", &["piped"]).status.code(), Some(3));
    assert_eq!(server.stop(), 0);
}

/// With a client connected, a shard's loop never slept: a whole core for nothing.
#[test]
fn a_node_with_an_idle_client_sleeps() {
    use kvar_base::BlockId;
    use kvar_client::{Client, ClientConfig, GetItem, PutItem};
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let key = kvar_node::KeyFile::read(&server.key_file).unwrap().key;
    let client = Client::connect(ClientConfig {
        deadline: PATIENCE,
        ..ClientConfig::new(&server.endpoint, key.clone())
    })
    .unwrap();
    let id = BlockId::from_name(&key, "block");
    client.put(vec![PutItem::of_bytes(id, vec![7; 100_000])]);
    assert!(client.get(vec![GetItem::to_vec(id)])[0].is_hit());
    server.json("flush", &[]);
    let [node, own] = ticks_when_idle([(server.child.id(), 4), (std::process::id(), 10)]);
    assert!(
        node <= 4,
        "the node used {node} of 200 ticks with nothing to do"
    );
    assert!(
        own <= 10,
        "the client used {own} of 200 ticks with nothing to do"
    );
}

/// The first touch of fresh memory costs more than what is put there: puts should not pay for it.
#[test]
fn memory_is_taken_at_start_unless_told_not_to() {
    const DRAM_BYTES: u64 = 128 << 20;
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path()).with(&["--dram", "128MiB"]);
    let server = place.clone().with(&["--prefault", "false"]).serve();
    assert!(
        server.resident_bytes() < DRAM_BYTES,
        "memory nobody used was taken"
    );
    assert_eq!(server.stop(), 0);
    let server = place.serve();
    let what = std::fmt::from_fn(|f| write!(f, "it is taken: {} bytes", server.resident_bytes()));
    until(what, || server.resident_bytes() >= DRAM_BYTES);
}
