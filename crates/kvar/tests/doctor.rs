//! `kvar doctor` against real nodes: what it says of a healthy one, and of what goes wrong.

mod support;

use serde_json::Value;
use support::{Place, fails, kvar};

fn grades<'a>(findings: &'a Value, about: &str) -> Vec<&'a str> {
    let findings = findings.as_array().unwrap().iter();
    let about = findings.filter(|it| it["about"] == about);
    about.map(|it| it["grade"].as_str().unwrap()).collect()
}

#[test]
fn a_healthy_node_has_nothing_wrong_and_keeps_nothing_of_the_visit() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let found = server.json("doctor", &[]);
    for about in ["link", "node", "devices", "room", "round trip"] {
        assert_eq!(grades(&found, about), ["ok"], "{about}: {found}");
    }
    // Nobody else was there yet, which is worth a word.
    assert_eq!(grades(&found, "asked"), ["note"], "{found}");
    let again = server.json("doctor", &[]);
    assert_eq!(grades(&again, "round trip"), ["ok"], "{again}");
    // The first visit is not taken for somebody's use.
    assert_eq!(grades(&again, "asked"), ["note"], "{again}");
    let status = server.json("status", &[]);
    assert_eq!(status["dram_blocks"], 0, "{status}");
    let text = server.run("doctor", &[]);
    assert!(text.status.success());
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.contains("ok     round trip: 64 KiB stored in"),
        "{text}"
    );
}

#[test]
fn who_is_linked_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let status = server.json("status", &[]);
    let clients = status["clients"].as_array().unwrap();
    // The command that asks is the only one.
    assert_eq!(clients.len(), 1, "{status}");
    let name = clients[0]["name"].as_str().unwrap();
    assert!(name.starts_with("kvar "), "{name}");
    assert_eq!(clients[0]["namespace"], 0);
    assert!(matches!(clients[0]["link"].as_str(), Some("tcp" | "shm")));
}

#[test]
fn what_keeps_everybody_out_is_the_first_and_only_line() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let stranger = Place::new(other.path()).serve();
    let with_key = |key: &std::path::Path| {
        let mut command = kvar();
        command.args(["doctor", "--endpoint", &server.endpoint, "--key-file"]);
        command.arg(key);
        command
    };
    fails(with_key(&stranger.key_file), 1, &["1 of 1 things"]);
    let said = support::finish(with_key(&stranger.key_file));
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(
        said.starts_with("WRONG  link: ") && said.contains("wrong key"),
        "{said}"
    );
    let key = server.key_file.clone();
    let gone = with_key(&key);
    let place = server.kill();
    let said = support::finish(gone);
    assert_eq!(said.status.code(), Some(1));
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(said.contains("is a node running there"), "{said}");
    drop(place);
}
