//! `kvar mode` against a real server with real clients: what is switched reaches whoever is connected,
//! under traffic and over a restart, and fails no call.

mod support;

use kvar_client::{CallOptions, Client, ClientConfig, GetItem, LinkChoice, Mode, PutItem};
use kvar_node::KeyFile;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::{PATIENCE, Place, Server, finish, kvar};

/// How soon a client must know.
const SOON: Duration = Duration::from_secs(1);

fn mode(server: &Server, words: &[&str]) -> Command {
    let mut command = kvar();
    command.args(["mode", "--admin", &server.admin]);
    command.arg("--key-file").arg(&server.key_file).args(words);
    command
}

/// A switch that must succeed; what holds afterwards, as (namespace, mode, said by).
fn switch(server: &Server, words: &[&str]) -> Vec<(String, String, String)> {
    let Output {
        status,
        stdout,
        stderr,
    } = finish(mode(server, &[words, &["--json"]].concat()));
    assert!(
        status.success(),
        "{words:?}: {}",
        String::from_utf8_lossy(&stderr)
    );
    let rows: serde_json::Value = serde_json::from_slice(&stdout).unwrap();
    let word = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap_or("all").to_owned();
    let rows = rows.as_array().unwrap().iter();
    rows.map(|row| {
        (
            word(row, "namespace"),
            word(row, "mode"),
            word(row, "set_by"),
        )
    })
    .collect()
}

fn row(namespace: &str, mode: &str, set_by: &str) -> (String, String, String) {
    (namespace.to_owned(), mode.to_owned(), set_by.to_owned())
}

fn client(server: &Server, namespace: &str, link: LinkChoice) -> Client {
    let mut file = server.key_file.clone();
    if namespace != "default" {
        file.set_extension(format!("{namespace}.key"));
    }
    let key = KeyFile::read(&file).unwrap().key;
    let config = ClientConfig {
        namespace: namespace.to_owned(),
        deadline: PATIENCE,
        link,
        links: 2,
        ..ClientConfig::new(&server.endpoint, key)
    };
    Client::connect(config).unwrap()
}

/// Waits until a client knows; how long that took.
fn told(client: &Client, mode: Mode) -> Duration {
    let begun = Instant::now();
    while client.mode() != mode {
        assert!(
            begun.elapsed() < PATIENCE,
            "{} and not {mode}",
            client.mode()
        );
        std::thread::yield_now();
    }
    begun.elapsed()
}

#[test]
fn a_switch_reaches_every_client_under_traffic_and_fails_no_call() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).with(&["--shards", "2"]).serve();
    let clients = [LinkChoice::Shm, LinkChoice::Tcp].map(|link| client(&server, "default", link));
    let key = KeyFile::read(&server.key_file).unwrap().key;
    let id = |at: u64| kvar_base::BlockId::from_name(&key, &format!("block {at}"));
    let (is_over, calls) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for (number, client) in (0_u64..).zip(&clients) {
            let (is_over, calls) = (&is_over, &calls);
            scope.spawn(move || {
                let mut at = number << 32;
                while !is_over.load(Ordering::Relaxed) {
                    let bytes = vec![at as u8; 20_000];
                    let outcomes = client.put(vec![PutItem::of_bytes(id(at), bytes.clone())]);
                    assert_eq!(outcomes[0].word(), "stored");
                    let results = client.get(vec![GetItem::to_vec(id(at))]);
                    assert_eq!(results[0].bytes(), Some(&bytes[..]));
                    assert_eq!(client.lookup(&[id(at)]).leading, 1);
                    calls.fetch_add(3, Ordering::Relaxed);
                    at += 1;
                }
            });
        }
        let modes = [Mode::Observe, Mode::Off, Mode::Save, Mode::Load];
        for mode in modes.into_iter().cycle().take(12) {
            let before = calls.load(Ordering::Relaxed);
            let rows = switch(&server, &[mode.word()]);
            assert_eq!(rows[0], row("all", mode.word(), "all"));
            for client in &clients {
                assert!(told(client, mode) < SOON);
            }
            while calls.load(Ordering::Relaxed) < before + 30 {
                std::thread::yield_now();
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    // Counted while the mode was another: lookups that found their one block each.
    let status = server.json("status", &[]);
    let of = &status["namespaces"][0];
    let (lookups, blocks) = (&of["observed_lookups"], &of["observed_blocks"]);
    assert!(lookups.as_u64().unwrap() > 0, "{of}");
    assert_eq!(lookups, blocks);
    for client in &clients {
        assert_eq!(client.stats().switches, 12);
        assert_eq!(client.stats().links_lost, 0);
    }
}

#[test]
fn a_namespace_has_a_mode_of_its_own_and_a_restart_changes_none() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--namespace", "team-a", "--mode", "save"];
    let place = Place::new(dir.path()).with(&flags);
    let server = place.serve();
    let port = server.endpoint.clone();
    let of_all = client(&server, "default", LinkChoice::Auto);
    let of_a = client(&server, "team-a", LinkChoice::Auto);
    assert_eq!((of_all.mode(), of_a.mode()), (Mode::Save, Mode::Save));

    switch(&server, &["off", "--namespace", "team-a"]);
    told(&of_a, Mode::Off);
    let rows = switch(&server, &["observe"]);
    let expected = [
        row("all", "observe", "all"),
        row("default", "observe", "all"),
        row("team-a", "off", "name"),
    ];
    assert_eq!(rows, expected);
    told(&of_all, Mode::Observe);
    assert_eq!(of_a.mode(), Mode::Off);
    // Tools work in every mode.
    let file = dir.path().join("bytes");
    std::fs::write(&file, b"bytes").unwrap();
    server.json("put", &["a name", file.to_str().unwrap()]);
    assert_eq!(server.run("get", &["a name"]).stdout, b"bytes");

    // Nobody calls, and yet both find the node again, and hear what was switched meanwhile.
    assert_eq!(server.stop(), 0);
    assert_eq!((of_all.mode(), of_a.mode()), (Mode::Observe, Mode::Off));
    let server = place.with(&["--listen", &port, "--mode", "load"]).serve();
    assert_eq!(switch(&server, &[]), expected);
    switch(&server, &["save", "--namespace", "team-a"]);
    told(&of_a, Mode::Save);
    assert_eq!(of_all.mode(), Mode::Observe);
    switch(&server, &["--reset", "--namespace", "team-a"]);
    told(&of_a, Mode::Observe);
    let rows = switch(&server, &["--reset"]);
    assert_eq!(rows[2], row("team-a", "load", "settings"));
    for client in [&of_all, &of_a] {
        told(client, Mode::Load);
        let options = CallOptions::default();
        assert!(client.status(options).is_ok());
    }
    let table = String::from_utf8(finish(mode(&server, &[])).stdout).unwrap();
    assert!(
        table.contains("(all)") && table.contains("the node's settings"),
        "{table}"
    );
    let list = String::from_utf8(server.run("namespace list", &[]).stdout).unwrap();
    assert!(list.contains("mode") && list.contains("load"), "{list}");
}

#[test]
fn what_cannot_be_switched_is_said_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let fails = |words: &[&str], code: i32, parts: &[&str]| {
        let output = finish(mode(&server, words));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {text}");
        for part in parts {
            assert!(text.contains(part), "{words:?}: {text:?} lacks {part:?}");
        }
    };
    fails(
        &["of"],
        2,
        &["invalid value 'of'", "off, observe, save, load"],
    );
    fails(&["off", "--reset"], 2, &["cannot be used with"]);
    let known = ["no namespace \"team-b\"", "default"];
    fails(&["off", "--namespace", "team-b"], 1, &known);
    fails(&["--namespace", "team-b"], 1, &known[..1]);
    // Another store's key switches nothing here.
    let other = tempfile::tempdir().unwrap();
    let key = Place::new(other.path()).serve().key_file.clone();
    let mut command = kvar();
    command.args(["mode", "off", "--node", &server.admin]);
    command.arg("--key-file").arg(key);
    let output = finish(command);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--key-file"));
    assert_eq!(switch(&server, &[])[0], row("all", "load", "settings"));
    assert!(!dir.path().join("data.modes").exists());
    // A table that nobody can read stops a start, and says what to do.
    assert_eq!(server.stop(), 0);
    std::fs::write(dir.path().join("data.modes"), "{").unwrap();
    let (code, text) = Place::new(dir.path()).refuse();
    assert!(code != 0 && text.contains("data.modes"), "{code}: {text}");
}
