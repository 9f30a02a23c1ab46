//! A server in trouble: the disk behind its data is full, io_uring is forbidden, it is told twice to
//! stop, it is asked while it loads.
#![allow(unsafe_code)] // the filter that forbids a system call

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use support::{Loop, Place, Server, fails, finish, kvar, tool, until};

/// A file system of its own, gone with the test.
struct Mount(PathBuf);

impl Mount {
    /// A tmpfs of this size, or why there is none.
    fn tmpfs(at: &Path, bytes: u64) -> Result<Self, String> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={bytes}");
        tool(
            "mount",
            &["-t", "tmpfs", "-o", &options, "tmpfs", at.to_str().unwrap()],
        )?;
        Ok(Self(at.to_path_buf()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = tool("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

fn put(server: &Server, dir: &Path, name: &str, byte: u8, len: usize, flags: &[&str]) -> String {
    let file = dir.join(format!("{name}.bytes"));
    std::fs::write(&file, vec![byte; len]).unwrap();
    let mut command = server.command("put");
    command.arg(name).arg(&file).arg("--json").args(flags);
    let output = finish(command);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    value["outcome"].as_str().unwrap_or("none").to_owned()
}

/// The data is a loop device over a sparse file in a small file system, so that writes find it full
/// as a thin volume's do.
#[test]
fn a_disk_that_fills_up_while_serving_costs_no_block_that_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let mount = match Mount::tmpfs(&dir.path().join("small"), 96 << 20) {
        Ok(mount) => mount,
        Err(why) => return eprintln!("skipped: no file system can be mounted here ({why})"),
    };
    let backing = mount.0.join("backing");
    std::fs::File::create(&backing)
        .unwrap()
        .set_len(256 << 20)
        .unwrap();
    let device = match Loop::over(&backing) {
        Ok(device) => device,
        Err(why) => return eprintln!("skipped: no loop device here ({why})"),
    };
    let place = Place::new(dir.path())
        .with(&["--flush-after", "50ms"])
        .on(&[&device.0]);
    let server = place.serve();
    let blocks = dir.path();
    for number in 0..8_u8 {
        let name = format!("early {number}");
        assert_eq!(
            put(&server, blocks, &name, number, 100_000, &["--durable"]),
            "stored"
        );
    }
    // Somebody else fills the file system under it.
    let hog = mount.0.join("hog");
    let mut file = std::fs::File::create(&hog).unwrap();
    let chunk = vec![0xee; 1 << 20];
    while std::io::Write::write_all(&mut file, &chunk).is_ok() {}
    drop(file);

    let mut outcomes = Vec::new();
    for number in 0..60_u8 {
        let name = format!("late {number}");
        outcomes.push(put(&server, blocks, &name, number, 200_000, &[]));
    }
    assert!(
        outcomes.iter().all(|it| it == "stored" || it == "busy"),
        "{outcomes:?}"
    );
    let trouble = |server: &Server| {
        let status = server.json("status", &[]);
        status["devices"][0]["trouble"].as_str().map(str::to_owned)
    };
    until("the trouble shows in the status", || {
        trouble(&server).is_some()
    });
    let text = String::from_utf8(server.run("status", &[]).stdout).unwrap();
    assert!(
        text.contains(&trouble(&server).unwrap_or_default()),
        "{text}"
    );
    let metrics = support::admin(&server, "/metrics");
    assert!(metrics.contains("\nkvar_device_trouble 1"), "{metrics}");
    assert!(
        !metrics.contains("kvar_device_write_errors_total 0\n"),
        "{metrics}"
    );
    until("the log says it", || {
        place.log().contains("takes no writes")
    });
    // What is in memory is served, and nothing wrong.
    for number in 0..8_u8 {
        let output = server.run("get", &[&format!("early {number}")]);
        assert!(
            output.stdout == vec![number; 100_000],
            "early {number}: {}",
            place.log()
        );
    }
    for (number, outcome) in (0..60_u8).zip(&outcomes) {
        let output = server.run("get", &[&format!("late {number}")]);
        let is_right = output.stdout == vec![number; 200_000];
        assert!(
            is_right || output.stdout.is_empty(),
            "late {number} ({outcome}) is wrong"
        );
    }
    // Space comes back, and so does the device.
    std::fs::remove_file(&hog).unwrap();
    until("a durable put", || {
        put(&server, blocks, "again", 7, 50_000, &["--durable"]) != "busy"
    });
    until("the trouble is over", || trouble(&server).is_none());
    server.json("flush", &[]);
    let server = server.kill().serve();
    assert!(server.run("get", &["again"]).stdout == vec![7; 50_000]);
    for number in 0..8_u8 {
        assert!(server.run("get", &[&format!("early {number}")]).stdout == vec![number; 100_000]);
    }
    assert_eq!(server.stop(), 0);
    drop(device);
}

/// Makes `io_uring_setup` fail with EPERM in the child, as container runtimes do.
fn forbid_io_uring(command: &mut Command) {
    use std::os::unix::process::CommandExt as _;
    let statement = |code: u32, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let program = [
        // The number of the system call is the first field of what a filter sees.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        statement(libc::BPF_RET | libc::BPF_K, 0, refuse),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let mut program = program;
        let filter = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: plain numbers; binds this process alone.
        let barred = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        // SAFETY: `filter` points at a program of the length it names; the kernel copies both.
        let filtered = unsafe { libc::syscall(libc::SYS_seccomp, mode, 0, &raw const filter) };
        if barred != 0 || filtered != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: two system calls and nothing else between fork and exec: no allocation, no lock.
    unsafe { command.pre_exec(install) };
}

#[test]
fn io_uring_refused_falls_back_to_threads_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let server = place.serve_with(forbid_io_uring);
    let status = server.json("status", &[]);
    assert_eq!(status["shards"][0]["io_engine"], "threads");
    let note = status["shards"][0]["io_notes"][0]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        note.contains("seccomp") && note.contains("using threads"),
        "{note}"
    );
    assert!(place.log().contains("using threads"), "{}", place.log());
    for number in 0..20_u8 {
        let name = format!("block {number}");
        assert_eq!(
            put(&server, dir.path(), &name, number, 70_000, &["--durable"]),
            "stored"
        );
    }
    let server = server.kill().serve_with(forbid_io_uring);
    for number in 0..20_u8 {
        assert!(server.run("get", &[&format!("block {number}")]).stdout == vec![number; 70_000]);
    }
    assert_eq!(server.stop(), 0);

    // Who insists on it gets an error.
    let mut command = place.with(&["--io-engine", "io_uring"]).command();
    forbid_io_uring(&mut command);
    fails(command, 1, &["engine auto or threads", "data"]);
}

#[test]
fn a_second_signal_ends_a_stop_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path()).with(&["--flush-after", "1h"]);
    let mut server = place.serve();
    // A peer that does not take its good-bye: a stop waits a second for it.
    let link = std::net::TcpStream::connect(&server.endpoint).unwrap();
    assert_eq!(put(&server, dir.path(), "lost", 1, 50_000, &[]), "stored");
    let begun = Instant::now();
    server.signal("-TERM");
    until("the first is heard", || {
        place.log().contains("told to stop:")
    });
    server.signal("-TERM");
    let in_time = begun.elapsed() < Duration::from_millis(900);
    let code = server.wait();
    drop(link);
    let log = place.log();
    // On a machine that was busy elsewhere the stop may be over before the second signal comes.
    if in_time {
        assert_eq!(code, 1, "{log}");
        assert!(
            log.contains("told to stop again") && log.contains("as after a kill"),
            "{log}"
        );
    }
    let help = finish({
        let mut help = kvar();
        help.args(["serve", "--help"]);
        help
    });
    let help = String::from_utf8_lossy(&help.stdout).replace('\n', " ");
    assert!(
        help.contains("A second one ends the process at once"),
        "{help}"
    );
    assert_eq!(place.serve().stop(), 0);
}

#[test]
fn the_command_line_says_that_a_node_loads() {
    use kvar_node::{Config, DataPath, Hooks, Node};
    use std::sync::{Arc, Condvar, Mutex};
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let server = place.serve();
    assert_eq!(
        put(&server, dir.path(), "kept", 3, 50_000, &["--durable"]),
        "stored"
    );
    assert_eq!(server.stop(), 0);

    // The same data in this process, held while it loads: what does the command line say?
    let mut config = Config {
        data: vec![DataPath {
            path: place.data(),
            size: None,
            tier: None,
        }],
        ..Config::default()
    };
    for (key, text) in [
        ("listen", "127.0.0.1:0"),
        ("admin", "127.0.0.1:0"),
        ("dram", "64MiB"),
    ] {
        config.set(key, text).unwrap();
    }
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let held = gate.clone();
    let hooks = Hooks {
        loading: Some(Arc::new(move |_, bytes| {
            if bytes > 0 {
                let (is_open, opened) = &*held;
                let guard = is_open.lock().unwrap();
                drop(opened.wait_while(guard, |is_open| !*is_open).unwrap());
            }
        })),
        ..Hooks::default()
    };
    let node = Node::listen(&config, hooks).unwrap();
    let command = |words: &[&str]| {
        let mut command = kvar();
        command
            .arg(words[0])
            .args(["--endpoint", &node.listen_addr().to_string()]);
        command
            .arg("--key-file")
            .arg(node.key_path())
            .args(&words[1..]);
        command
    };
    let text = String::from_utf8(finish(command(&["status"])).stdout).unwrap();
    assert!(text.contains("loading: 0 of 1 shards"), "{text}");
    fails(command(&["get", "kept"]), 1, &["loading", "try again"]);
    fails(command(&["stat", "kept"]), 1, &["loading", "try again"]);
    fails(command(&["flush"]), 1, &["still loading"]);
    fails(command(&["remove", "kept"]), 1, &["still loading"]);
    fails(command(&["purge", "--yes"]), 1, &["still loading"]);
    fails(
        command(&[
            "put",
            "kept",
            place.dir.join("kept.bytes").to_str().unwrap(),
        ]),
        1,
        &["busy"],
    );
    let (is_open, opened) = &*gate;
    *is_open.lock().unwrap() = true;
    opened.notify_all();
    node.loaded().unwrap();
    assert!(finish(command(&["get", "kept"])).stdout == vec![3; 50_000]);
}
