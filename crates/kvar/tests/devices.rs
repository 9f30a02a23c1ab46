//! Real block devices under a real server: loop devices, which fail like drives when the file behind
//! them is cut off. Skipped, aloud, where this user may make none.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use support::{Loop, PATIENCE, Place, Server, fails, finish, kvar, until};

/// Loop devices of 96 MiB, each with the file behind it.
fn loops(dir: &Path, names: &[&str]) -> Option<Vec<(Loop, PathBuf)>> {
    let mut made = Vec::new();
    for name in names {
        let file = dir.join(format!("{name}.backing"));
        std::fs::File::create(&file)
            .unwrap()
            .set_len(96 << 20)
            .unwrap();
        match Loop::over(&file) {
            Ok(device) => made.push((device, file)),
            Err(why) => {
                eprintln!("skipped: no loop device here ({why})");
                return None;
            }
        }
    }
    Some(made)
}

fn device(server: &Server, words: &[&str]) -> Command {
    let mut command = kvar();
    command.args(["device", words[0], "--admin", &server.admin]);
    command.arg("--key-file").arg(&server.key_file);
    command.args(&words[1..]);
    command
}

fn listed(server: &Server) -> Vec<serde_json::Value> {
    let output = finish(device(server, &["list", "--json"]));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn state(server: &Server, path: &str) -> String {
    let devices = listed(server);
    let found = devices.iter().find(|device| device["path"] == path);
    found.unwrap()["state"].as_str().unwrap().to_owned()
}

fn fill(server: &Server, dir: &Path, count: u8) {
    for number in 0..count {
        let file = dir.join("bytes");
        std::fs::write(&file, vec![number; 40_000]).unwrap();
        server.json("put", &[&name(number), file.to_str().unwrap(), "--durable"]);
    }
}

fn name(number: u8) -> String {
    format!("block {number}")
}

/// How many are there, every byte right; the others are misses.
fn present(server: &Server, count: u8) -> u8 {
    let mut found = 0;
    for number in 0..count {
        let output = server.run("get", &[&name(number)]);
        match output.status.code() {
            Some(0) => {
                assert!(output.stdout == vec![number; 40_000], "{}", name(number));
                found += 1;
            }
            code => {
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                let is_miss = code == Some(3) || text.contains("did not pass its check");
                assert!(is_miss && output.stdout.is_empty(), "{code:?} {text}");
            }
        }
    }
    found
}

/// Cuts the file behind a drive off until the server has noticed.
fn cut_off(server: &Server, dir: &Path, path: &str, backing: &Path, count: u8) {
    let dead = std::fs::File::options().write(true).open(backing).unwrap();
    let until = Instant::now() + PATIENCE;
    let mut asked = 0_u8;
    while state(server, path) == "online" {
        // Again and again: what the server writes would make a drive of zeros of it.
        dead.set_len(0).unwrap();
        server.run("get", &[&name(asked % count)]);
        // What went is put again, so that there is always something to fail on.
        if asked % count == count - 1 {
            fill(server, dir, count);
        }
        asked = asked.wrapping_add(1);
        assert!(Instant::now() < until, "not fenced: {}", server.place.log());
    }
}

#[test]
fn a_drive_that_dies_is_fenced_and_replaced_under_a_running_server() {
    let dir = tempfile::tempdir().unwrap();
    let Some(drives) = loops(dir.path(), &["a", "b", "c"]) else {
        return;
    };
    let paths: Vec<&str> = drives.iter().map(|(device, _)| device.0.as_str()).collect();
    let place = Place::new(dir.path())
        .with(&["--flush-after", "50ms"])
        .on(&paths[..2]);
    let server = place.serve();
    const COUNT: u8 = 60;
    fill(&server, dir.path(), COUNT);
    assert_eq!(server.stop(), 0);
    // Started anew, so that reads go to the drives.
    let mut server = place.serve();
    cut_off(&server, dir.path(), paths[1], &drives[1].1, COUNT);
    assert_eq!(state(&server, paths[1]), "failed");
    assert_eq!(state(&server, paths[0]), "online");
    assert!(
        place.log().contains("device out of service"),
        "{}",
        place.log()
    );
    let text = String::from_utf8(server.run("status", &[]).stdout).unwrap();
    assert!(text.contains("failed") && text.contains(paths[1]), "{text}");
    let table = String::from_utf8(finish(device(&server, &["list"])).stdout).unwrap();
    assert!(
        table.contains("failed") && table.contains("does not answer"),
        "{table}"
    );

    // The node goes on: what is gone is put again, and everything is there.
    fill(&server, dir.path(), COUNT);
    assert_eq!(present(&server, COUNT), COUNT);
    fails(
        device(&server, &["retire", "0"]),
        1,
        &["last device in service"],
    );
    let other = tempfile::tempdir().unwrap();
    assert_eq!(Place::new(other.path()).serve().stop(), 0);
    let mut stranger = kvar();
    stranger.args(["device", "replace", "1", paths[2], "--admin", &server.admin]);
    stranger
        .arg("--key-file")
        .arg(other.path().join("data.key"));
    fails(stranger, 1, &["with the namespace key"]);

    let output = finish(device(&server, &["replace", "1", paths[2], "--json"]));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text} {}", place.log());
    let new: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&new["slot"], &new["state"]), (&1.into(), &"online".into()));
    fill(&server, dir.path(), COUNT);
    assert_eq!(present(&server, COUNT), COUNT);

    // And over a kill: the settings name the dead drive, the table knows the new one.
    let place = server.place.clone();
    server.child.kill().unwrap();
    server.wait();
    drop(server);
    let server = place.serve();
    assert_eq!(present(&server, COUNT), COUNT);
    assert_eq!(state(&server, paths[2]), "online");
    assert_eq!(server.stop(), 0);
}

#[test]
fn a_drive_that_is_gone_at_start_comes_back_under_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut drives) = loops(dir.path(), &["a", "b"]) else {
        return;
    };
    let paths: Vec<String> = drives.iter().map(|(device, _)| device.0.clone()).collect();
    let place = Place::new(dir.path()).on(&[&paths[0], &paths[1]]);
    let server = place.serve();
    fill(&server, dir.path(), 40);
    assert_eq!(server.stop(), 0);
    // Pulled out: its path is there and leads nowhere.
    let (pulled, backing) = drives.pop().unwrap();
    drop(pulled);
    let name = paths[1].trim_start_matches("/dev/");
    until("the kernel lets go of it", || {
        let partitions = std::fs::read_to_string("/proc/partitions").unwrap();
        let mut lines = partitions.lines().map(str::split_whitespace);
        // Number, number, size, name; a device that is gone may be listed with nothing on it.
        !lines.any(|mut words| words.nth(2) != Some("0") && words.next() == Some(name))
    });
    let server = place.serve();
    let left = present(&server, 40);
    assert!((5..35).contains(&left), "{left}");
    assert!(place.log().contains("STARTING WITHOUT"), "{}", place.log());
    assert_eq!(state(&server, &paths[1]), "missing");

    // Plugged in elsewhere.
    let again = match Loop::over(&backing) {
        Ok(again) => again,
        Err(why) => return eprintln!("skipped: no second loop device ({why})"),
    };
    let output = finish(device(&server, &["add", &again.0, "--json"]));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text} {}", place.log());
    assert_eq!(present(&server, 40), 40, "its blocks are back with it");
    assert_eq!(server.stop(), 0);
}

#[test]
fn a_drive_that_dies_in_the_middle_of_a_replay_costs_hits_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let Some(drives) = loops(dir.path(), &["a", "b"]) else {
        return;
    };
    let paths: Vec<&str> = drives.iter().map(|(device, _)| device.0.as_str()).collect();
    // Little memory, so that reads go to the drives.
    let place = Place::new(dir.path())
        .with(&["--flush-after", "50ms", "--dram", "32MiB"])
        .on(&paths);
    let server = place.serve();
    let trace = dir.path().join("trace.jsonl");
    support::write_trace(&trace, 12_000, 17);
    let mut command = server.command("replay");
    command
        .arg(&trace)
        .args(["--block-bytes", "20000", "--json"]);
    command.args(["--concurrency", "4", "--remove-every", "50"]);
    let running = std::thread::spawn(move || finish(command));
    let stored = || server.json("status", &[])["links"]["puts"]["stored"].as_u64();
    let what = std::fmt::from_fn(|f| write!(f, "the replay is under way: {}", place.log()));
    until(what, || stored() >= Some(2000));
    let dead = std::fs::File::options()
        .write(true)
        .open(&drives[1].1)
        .unwrap();
    while state(&server, paths[1]) == "online" && !running.is_finished() {
        dead.set_len(0).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = running.join().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{text} {}", place.log()));
    assert_eq!(report["wrong_bytes"], 0, "{report}");
    assert!(report["verified_bytes"].as_u64() > Some(0), "{report}");
    assert_eq!(state(&server, paths[1]), "failed", "{}", place.log());
    assert_eq!(server.stop(), 0);
    assert!(!place.log().contains("defect"), "{}", place.log());
}

#[test]
fn a_drive_that_failed_and_was_mended_comes_back_with_its_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let Some(drives) = loops(dir.path(), &["a", "b"]) else {
        return;
    };
    let paths: Vec<&str> = drives.iter().map(|(device, _)| device.0.as_str()).collect();
    let place = Place::new(dir.path()).on(&paths);
    let server = place.serve();
    const COUNT: u8 = 40;
    fill(&server, dir.path(), COUNT);
    assert_eq!(server.stop(), 0);
    let kept = std::fs::read(&drives[1].1).unwrap();
    let server = place.serve();
    cut_off(&server, dir.path(), paths[1], &drives[1].1, COUNT);
    // Mended: what it has is as good as ever.
    std::fs::write(&drives[1].1, &kept).unwrap();
    let output = finish(device(&server, &["add", paths[1], "--json"]));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text} {}", place.log());
    assert_eq!(present(&server, COUNT), COUNT);
    // Removed while it is away again: it comes back empty, and the block stays away.
    let server = {
        assert_eq!(server.stop(), 0);
        place.serve()
    };
    cut_off(&server, dir.path(), paths[1], &drives[1].1, COUNT);
    fill(&server, dir.path(), COUNT);
    assert!(server.json("remove", &[&name(7)])["removed"].as_u64() >= Some(1));
    std::fs::write(&drives[1].1, &kept).unwrap();
    let server = server.kill().serve();
    assert_eq!(state(&server, paths[1]), "online");
    assert_eq!(server.run("get", &[&name(7)]).status.code(), Some(3));
    assert!(place.log().contains("it begins empty"), "{}", place.log());
    assert_eq!(server.stop(), 0);
}

#[test]
fn a_drive_is_retired_in_daylight() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let path = dir.path().join("b").to_str().unwrap().to_owned();
    let added = finish(device(&server, &["add", &path, "--size", "512MiB"]));
    let why = String::from_utf8_lossy(&added.stderr).into_owned();
    assert!(added.status.success(), "{why}");
    const COUNT: u8 = 40;
    fill(&server, dir.path(), COUNT);
    assert_eq!(present(&server, COUNT), COUNT);
    // So slow that it is seen.
    let begun = finish(device(&server, &["retire", "1", "--rate", "200KiB"]));
    let text = String::from_utf8(begun.stdout).unwrap();
    assert!(text.contains("is leaving"), "{text}");
    let until = Instant::now() + PATIENCE;
    loop {
        let table = String::from_utf8(finish(device(&server, &["list"])).stdout).unwrap();
        if table.contains(" segments: ") && table.contains(" moved") {
            assert!(table.contains("leaving"), "{table}");
            break;
        }
        assert!(Instant::now() < until, "{table}");
    }
    assert_eq!(present(&server, COUNT), COUNT);
    while state(&server, &path) == "leaving" {
        assert!(Instant::now() < until, "{}", server.place.log());
    }
    assert_eq!(state(&server, &path), "retired");
    assert_eq!(present(&server, COUNT), COUNT);
    let both = device(&server, &["retire", "0", "--now", "--rate", "1MiB"]);
    fails(both, 2, &["--rate"]);
    assert_eq!(server.stop(), 0);
}
