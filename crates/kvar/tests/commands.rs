//! The command line as an operator meets it: what it prints, and what it says when something is
//! wrong.

mod support;

use std::process::Command;
use support::{Place, fails, finish, kvar, write_trace};

fn with(words: &[&str]) -> Command {
    let mut command = kvar();
    command.args(words);
    command
}

#[test]
fn a_block_goes_in_and_comes_out() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let file = dir.path().join("hello.txt");
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(&file, &bytes).unwrap();
    let file = file.to_str().unwrap();
    let stored = server.json("put", &["greeting", file, "--durable"]);
    assert_eq!(
        (&stored["outcome"], &stored["bytes"]),
        (&"stored".into(), &200_000.into())
    );
    assert_eq!(server.json("put", &["greeting", file])["outcome"], "exists");
    assert!(server.run("get", &["greeting"]).stdout == bytes);
    let id = stored["id"].as_str().unwrap();
    assert!(server.run("get", &["--id", id]).stdout == bytes);
    let stat = server.json("stat", &["greeting"]);
    assert_eq!(
        (&stat["in_dram"], &stat["on_flash"]),
        (&true.into(), &true.into())
    );
    let status = server.json("status", &[]);
    assert_eq!(status["links"]["puts"]["stored"], 1);
    assert_eq!(server.json("flush", &[])["flushed"], true);
    assert_eq!(server.json("remove", &["greeting", "other"])["removed"], 1);
    let mut get = server.command("get");
    get.arg("greeting");
    fails(get, 3, &["\"greeting\" is not there"]);
    server.json("put", &["a", file]);
    server.json("put", &["--id", &"ab".repeat(32), file]);
    let mut purge = server.command("purge");
    fails(
        {
            purge.arg("--json");
            purge
        },
        2,
        &["--yes"],
    );
    assert_eq!(server.json("purge", &["--yes"])["purged"], 2);
    assert_eq!(server.stop(), 0);
}

#[test]
fn a_key_file_says_which_namespace_a_command_works_in() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path()).with(&["--namespace", "team-a,share=3"]);
    let mut server = place.serve();
    let default_key = server.key_file.clone();
    let file = dir.path().join("hello.txt");
    std::fs::write(&file, [7; 5000]).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(server.json("put", &["greeting", file])["outcome"], "stored");
    server.key_file = dir.path().join("data.team-a.key");
    assert_eq!(server.json("put", &["greeting", file])["outcome"], "stored");
    assert_eq!(server.json("put", &["other", file])["outcome"], "stored");
    let rows = server.json("namespace list", &[]);
    let row = |at: usize| (rows[at]["name"].clone(), rows[at]["share"].clone());
    assert_eq!(row(0), ("default".into(), 1.into()));
    assert_eq!(row(1), ("team-a".into(), 3.into()));
    assert_eq!(rows[1]["dram_bytes"], 2 * 8192);
    let table = server.run("namespace list", &[]).stdout;
    let table = String::from_utf8(table).unwrap();
    assert!(
        table.contains("team-a") && table.contains("75.0 %"),
        "{table}"
    );
    let status = String::from_utf8(server.run("status", &[]).stdout).unwrap();
    assert!(status.contains("team-a (share 3)"), "{status}");
    assert_eq!(server.json("purge", &["--yes"])["purged"], 2);
    server.key_file = default_key;
    assert!(server.run("get", &["greeting"]).status.success());
    assert_eq!(server.stop(), 0);
}

#[test]
fn what_is_leased_stays_until_it_is_released() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let file = dir.path().join("kv.bin");
    std::fs::write(&file, b"kv").unwrap();
    let file = file.to_str().unwrap();
    // Every hint has its word; a node of this build understands all of them.
    let hints = ["--handover", "--recompute", "800ms", "--traffic-class", "3"];
    for (depth, name) in ["0", "1"].iter().zip(["a", "b"]) {
        let mut words = vec![
            name,
            file,
            "--ttl",
            "5s",
            "--depth",
            depth,
            "--request",
            "7",
        ];
        words.extend(hints);
        assert_eq!(server.json("put", &words)["outcome"], "stored");
    }
    let begun = std::time::Instant::now();
    let chain = ["a", "b", "c"];
    let found = server.json("lookup", &chain);
    assert_eq!(
        (&found["leading"], &found["reason"]),
        (&2.into(), &"absent".into())
    );
    assert!(found["lease"].is_null());
    let leased = server.json("lookup", &["a", "b", "--lease", "20s"]);
    assert_eq!(
        (&leased["leading"], &leased["reason"]),
        (&2.into(), &().into())
    );
    assert!((1..=20_000).contains(&leased["lasts_ms"].as_u64().unwrap()));
    let token = leased["lease"].as_str().unwrap();
    let renewed = server.json("lease renew", &[token, "--ttl", "30s"]);
    assert!(renewed["lasts_ms"].as_u64().unwrap() > 20_000);
    // Their time to live is over, the promise is not.
    while begun.elapsed() < std::time::Duration::from_secs(7) {
        assert_eq!(server.json("lookup", &chain)["leading"], 2);
    }
    assert_eq!(server.json("lease release", &[token])["released"], true);
    let gone = |command: &str, words: &[&str]| {
        let mut command = server.command(command);
        command.args(words);
        fails(command, 3, &["there"]);
    };
    gone("lookup", &chain);
    gone("lease renew", &[token]);
    gone("lease release", &[token]);
    for wrong in [["--lease", "31s"], ["--lease", "0s"]] {
        fails(with(&["lookup", "a", wrong[0], wrong[1]]), 2, &["lease"]);
    }
    fails(
        with(&["put", "a", file, "--recompute", "2h"]),
        2,
        &["4294s"],
    );
    assert_eq!(server.stop(), 0);
}

#[test]
fn what_is_for_offline_replay_says_so() {
    for words in [
        ["--model", "engine"],
        ["--policy", "lru"],
        ["--admission", "all"],
        ["--dram-share", "0.1"],
        ["--beside", "other.jsonl"],
        ["--flood", "4"],
        ["--big", "20%"],
    ] {
        let mut command = with(&["replay", "trace.jsonl", "--block-bytes", "4KiB"]);
        command.args(words);
        fails(command, 2, &["--offline"]);
    }
}

#[test]
fn offline_replay_shows_what_a_share_is_worth_beside_a_flood() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.jsonl");
    write_trace(&trace, 300, 1);
    let replay = |words: &[&str]| {
        let mut command = with(&["replay", trace.to_str().unwrap(), "--offline"]);
        command.args(words);
        command
    };
    let shared = "--model engine --admission all --capacity 50% --flood 8";
    let shared: Vec<&str> = shared.split(' ').collect();
    let output = finish(replay(&[&shared[..], &["--share", "9", "--json"]].concat()));
    assert!(output.status.success());
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rate = |key: &str| report["rows"][0][key].as_f64().unwrap();
    assert!(
        rate("with_shares") > rate("without_shares") + 0.05,
        "{report}"
    );
    assert_eq!(report["rows"].as_array().unwrap().len(), 2);
    let table = String::from_utf8(finish(replay(&shared)).stdout).unwrap();
    assert!(
        table.contains("flood 8") && table.contains("with shares"),
        "{table}"
    );
    fails(replay(&["--flood", "8"]), 2, &["--model engine"]);
    fails(replay(&["--share", "8"]), 2, &["--beside"]);
    fails(replay(&["--flood", "0"]), 2, &["0.01 to 1000"]);
}

#[test]
fn offline_replay_shows_what_a_big_tier_brings() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.jsonl");
    write_trace(&trace, 300, 1);
    let replay = |words: &str| {
        let mut command = with(&["replay", trace.to_str().unwrap(), "--offline"]);
        command.args(words.split(' '));
        command
    };
    let words = "--model engine --capacity 10% --big 50% --big 90%";
    let table = String::from_utf8(finish(replay(words)).stdout).unwrap();
    assert!(
        table.contains("big tier") && table.contains("in fast"),
        "{table}"
    );
    let output = finish(replay(&format!("{words} --json")));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        let big = &row["big"];
        let parts = ["fast_block_hit_rate", "block_hit_rate"].map(|key| big[key].as_f64().unwrap());
        let all = row["block_hit_rate"].as_f64().unwrap();
        assert!((parts[0] + parts[1] - all).abs() < 1e-9, "{row}");
        assert!(big["write_amplification"].is_number(), "{row}");
    }
    fails(replay("--big 20%"), 2, &["--model engine"]);
    fails(
        replay("--model engine --policy recent --big 20%"),
        2,
        &["leave --policy out"],
    );
    fails(
        replay("--model engine --capacity 10% --big 3"),
        2,
        &["two segments", "at least 30 blocks"],
    );
    fails(replay("--model engine --big 0%"), 2, &["not a capacity"]);
    fails(
        replay("--model engine --flood 2 --big 50%"),
        2,
        &["one trace"],
    );
}

#[test]
fn a_block_with_a_time_to_live_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let file = dir.path().join("hello.txt");
    std::fs::write(&file, b"hello").unwrap();
    let file = file.to_str().unwrap();
    server.json("put", &["short", file, "--ttl", "1s"]);
    server.json("put", &["long", file, "--ttl", "1h", "--durable"]);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let expires = server.json("stat", &["long"])["expires_unix_s"]
        .as_u64()
        .unwrap();
    assert!(
        (now + 3540..now + 3602).contains(&expires),
        "{expires} {now}"
    );
    let begun = std::time::Instant::now();
    loop {
        let mut get = server.command("get");
        get.arg("short");
        let output = get.output().unwrap();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.code() == Some(3) && said.contains("expired"),
                "{said}"
            );
            break;
        }
        assert!(
            begun.elapsed() < std::time::Duration::from_secs(20),
            "it lives on"
        );
    }
    assert_eq!(server.run("get", &["long"]).stdout, b"hello");
    let mut put = server.command("put");
    put.args(["never", file, "--ttl", "0s"]);
    fails(put, 2, &["a second at least", "--ttl"]);
    assert_eq!(server.stop(), 0);
}

#[test]
fn blocks_that_cannot_be_are_refused_before_they_are_sent() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let put = |name: &str, len: usize| {
        let file = dir.path().join(name);
        std::fs::write(&file, vec![7; len]).unwrap();
        let mut command = server.command("put");
        command.arg(name).arg(file);
        command
    };
    fails(
        put("large", 20 << 20),
        2,
        &["largest block", "512KiB", "parts"],
    );
    fails(put("empty", 0), 2, &["empty", "at least one byte"]);
    let mut missing = server.command("put");
    missing.args(["name", "no-such-file"]);
    fails(missing, 1, &["no-such-file"]);
    let mut late = put("late", 100);
    late.args(["--deadline", "0s"]);
    fails(late, 1, &["deadline"]);
}

#[test]
fn a_node_that_is_not_there_or_not_ours_is_told_apart() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (server, stranger) = (
        Place::new(dir.path()).serve(),
        Place::new(other.path()).serve(),
    );
    let key = server.key_file.to_str().unwrap();
    let get =
        |endpoint: &str, key: &str| with(&["get", "x", "--endpoint", endpoint, "--key-file", key]);
    fails(
        get(&stranger.endpoint, key),
        1,
        &["wrong key", "--key-file"],
    );
    fails(
        get(&server.endpoint, "nowhere.key"),
        2,
        &["nowhere.key", "beside the node's data"],
    );
    fails(get("nonsense", key), 2, &["host:port"]);
    let endpoint = stranger.endpoint.clone();
    stranger.kill();
    fails(get(&endpoint, key), 1, &["is a node running"]);
}

#[test]
fn settings_are_checked_by_name_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kvar.toml");
    let path = file.to_str().unwrap();
    let sample = finish(with(&["config", "sample"]));
    std::fs::write(&file, &sample.stdout).unwrap();
    assert!(
        finish(with(&["config", "check", path])).status.success(),
        "the sample is fine"
    );
    std::fs::write(&file, "dram = \"1GiB\"\nlisten_on = \"127.0.0.1:1\"\n").unwrap();
    fails(
        with(&["config", "check", path]),
        2,
        &["kvar.toml:2:", "`listen_on`", "config sample"],
    );
    fails(with(&["serve", "--config", path]), 2, &["kvar.toml:2:"]);
    std::fs::write(&file, "listen = \"0.0.0.0:7411\"\n").unwrap();
    fails(
        with(&["config", "check", path]),
        2,
        &["kvar.toml", "--insecure"],
    );
    fails(
        with(&["config", "check", "no.toml"]),
        2,
        &["no.toml", "config sample"],
    );
    fails(with(&["serve", "--dram", "lots"]), 2, &["--dram", "64KiB"]);
    fails(with(&["serve", "--drm", "1GiB"]), 2, &["--dram"]);
    fails(
        with(&["serve", "--listen", "0.0.0.0:0"]),
        2,
        &["--insecure"],
    );
}

#[test]
fn every_help_teaches_by_example() {
    let help = |words: &[&str]| {
        let output = finish(with(&[words, &["--help"]].concat()));
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(help(&[]).contains("Exit codes:") && help(&[]).contains("kvar get greeting"));
    for setting in kvar_node::config::SETTINGS {
        assert!(
            help(&["serve"]).contains(&format!("--{}", setting.flag())),
            "{}",
            setting.key
        );
    }
    for command in ["put", "replay", "serve"] {
        assert!(help(&[command]).contains("Examples:"), "{command}");
    }
}

#[test]
fn a_broken_trace_names_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let trace = dir.path().join("trace.jsonl");
    write_trace(&trace, 5, 1);
    let mut text = std::fs::read_to_string(&trace).unwrap();
    text.push_str("{\"timestamp\": 9, \"input_le\n");
    std::fs::write(&trace, text).unwrap();
    let mut replay = server.command("replay");
    replay.arg(&trace).args(["--block-bytes", "4KiB"]);
    fails(replay, 1, &["line 6"]);
    let path = trace.to_str().unwrap();
    fails(with(&["replay", "--offline", path]), 1, &["line 6"]);
    fails(
        with(&["replay", "--offline", "none.jsonl"]),
        1,
        &["none.jsonl"],
    );
    fails(with(&["replay", path]), 2, &["--block-bytes"]);
    write_trace(&trace, 5, 1);
    let mut large = server.command("replay");
    large.arg(&trace).args(["--block-bytes", "1GiB"]);
    fails(large, 2, &["largest block"]);
    fails(
        with(&["replay", "--offline", path, "--capacity", "0%"]),
        2,
        &["capacity"],
    );
}

#[test]
fn offline_replay_prints_the_rows_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.jsonl");
    write_trace(&trace, 400, 3);
    let path = trace.to_str().unwrap();
    let words = [
        "replay",
        "--offline",
        path,
        "--capacity",
        "10%",
        "--capacity",
        "100%",
        "--json",
    ];
    let report: serde_json::Value = serde_json::from_slice(&finish(with(&words)).stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    let rate = |row: usize| rows[row]["block_hit_rate"].as_f64().unwrap();
    assert!(rate(0) < rate(1));
    assert_eq!(rate(1), report["ceiling_block_hit_rate"].as_f64().unwrap());
    for key in [
        "capacity_blocks",
        "capacity_share",
        "token_hit_rate",
        "flash_write_blocks",
        "write_amplification",
    ] {
        assert!(rows[0][key].is_number(), "{key}");
    }
}
