//! Real processes: the binary as an operator runs it, on free ports, in a folder of its own.
#![allow(dead_code)] // each test file uses its part

pub(crate) mod proxy;
pub(crate) mod random;

use kvar_client::{Client, ClientConfig, LinkChoice};
use kvar_node::KeyFile;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Long enough for a machine that compiles beside the test; a hang still fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until it is so.
pub(crate) fn until(what: impl std::fmt::Display, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// In which idle processes are measured. A tick is 10 ms: in less time one of them more or less
/// would decide.
const IDLE_WINDOW: Duration = Duration::from_secs(2);
const IDLE_TRIES: usize = 5;
/// What follows a burst of work is over when nothing of it shows in this part of a window.
const SETTLE_PART: u32 = 8;
/// Whoever does not settle within this time is measured all the same.
const SETTLE_MAX: Duration = Duration::from_secs(10);

pub(crate) fn kvar() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvar"));
    // Flushes wait for a disk that other tests keep busy, too.
    command.env("KVAR_DEADLINE", "60s");
    command
        .env_remove("KVAR_KEY_FILE")
        .env_remove("KVAR_ENDPOINT")
        .stdin(Stdio::null());
    command
}

/// Settings of a server.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
    pub(crate) flags: Vec<String>,
    /// Where the data is; empty: a file in `dir`.
    pub(crate) data: Vec<PathBuf>,
}

impl Place {
    /// A small store in `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        let flags = [
            "--size",
            "512MiB",
            "--dram",
            "64MiB",
            "--shards",
            "1",
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
        ];
        Self {
            dir: dir.to_path_buf(),
            flags: flags.map(str::to_owned).to_vec(),
            data: Vec::new(),
        }
    }

    pub(crate) fn with(mut self, flags: &[&str]) -> Self {
        for pair in flags.chunks(2) {
            match self.flags.iter().position(|flag| flag == pair[0]) {
                Some(at) => self.flags[at + 1] = pair[1].to_owned(),
                None => self
                    .flags
                    .extend(pair.iter().map(|flag| (*flag).to_owned())),
            }
        }
        self
    }

    /// On these block devices, whole; the key lies in `dir`.
    pub(crate) fn on(mut self, devices: &[&str]) -> Self {
        self.data = devices.iter().map(PathBuf::from).collect();
        let key = self.dir.join("store.key").display().to_string();
        let size = self.flags.iter().position(|flag| flag == "--size");
        if let Some(at) = size {
            self.flags.drain(at..at + 2);
        }
        self.with(&["--key-file", &key])
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = kvar();
        command.arg("serve");
        if self.data.is_empty() {
            command.arg("--data").arg(self.data());
        }
        for data in &self.data {
            command.arg("--data").arg(data);
        }
        command
            .arg("--ready-file")
            .arg(self.dir.join("ready.json"))
            .args(&self.flags);
        command
    }

    /// Starts a server and waits until it serves.
    pub(crate) fn serve(&self) -> Server {
        self.serve_with(|_| {})
    }

    /// As `serve`, with a command that is changed first.
    pub(crate) fn serve_with(&self, change: impl FnOnce(&mut Command)) -> Server {
        let ready = self.dir.join("ready.json");
        let _ = std::fs::remove_file(&ready);
        let log = std::fs::File::create(self.dir.join("log")).unwrap();
        let begun = Instant::now();
        let mut command = self.command();
        change(&mut command);
        let mut child = command.stderr(log).stdout(Stdio::null()).spawn().unwrap();
        let until = begun + PATIENCE;
        while !ready.exists() {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the server ended ({status}): {}", self.log());
            }
            assert!(Instant::now() < until, "not ready: {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        let ready_after = begun.elapsed();
        let ready = std::fs::read_to_string(ready).unwrap();
        let ready: serde_json::Value = serde_json::from_str(&ready).unwrap();
        let word = |key: &str| ready[key].as_str().unwrap().to_owned();
        Server {
            child,
            endpoint: word("listen"),
            admin: word("admin"),
            key_file: word("key_file").into(),
            place: self.clone(),
            ready_after,
        }
    }

    /// A start that must fail: its exit code and its line.
    pub(crate) fn refuse(&self) -> (i32, String) {
        let output = finish(self.command());
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

/// A running server; killed when dropped.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) endpoint: String,
    pub(crate) admin: String,
    pub(crate) key_file: PathBuf,
    pub(crate) place: Place,
    pub(crate) ready_after: Duration,
}

impl Server {
    /// A command against it.
    pub(crate) fn command(&self, subcommand: &str) -> Command {
        let mut command = kvar();
        command
            .args(subcommand.split(' '))
            .args(["--endpoint", &self.endpoint]);
        command.arg("--key-file").arg(&self.key_file);
        command
    }

    /// Runs a command with these words; its output.
    pub(crate) fn run(&self, subcommand: &str, words: &[&str]) -> Output {
        let mut command = self.command(subcommand);
        command.args(words);
        finish(command)
    }

    /// As `run`, for one that must succeed and prints JSON.
    pub(crate) fn json(&self, subcommand: &str, words: &[&str]) -> serde_json::Value {
        let output = self.run(subcommand, &[words, &["--json"]].concat());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "{subcommand} {words:?}: {text}{}",
            self.place.log()
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Its status, and through when all that was acknowledged is flushed, by the machine's monotonic
    /// clock.
    pub(crate) fn status_flushed(&self) -> (serde_json::Value, u64) {
        let asked_at_us = monotonic_us();
        let status = self.json("status", &[]);
        let shards = status["shards"].as_array().unwrap().iter();
        let unflushed_us = shards.map(|shard| &shard["engine"]["unflushed_age_us"]);
        let oldest_us = unflushed_us.map(|age| age.as_u64().unwrap()).max().unwrap();
        (status, asked_at_us - oldest_us)
    }

    /// What of a replay's journal is there after a kill, of what was flushed through that time.
    pub(crate) fn verify(&self, journal: &Path, flushed_through_us: u64) -> serde_json::Value {
        let through = flushed_through_us.to_string();
        let journal = journal.to_str().unwrap();
        let words = ["--verify", journal, "--older-than", "0s"];
        let words = [&words[..], &["--killed-at-us", &through]].concat();
        self.json("replay", &words)
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([name, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    /// SIGTERM, and its exit code.
    pub(crate) fn stop(mut self) -> i32 {
        self.signal("-TERM");
        self.wait()
    }

    /// Waits for it to end by itself.
    pub(crate) fn wait(&mut self) -> i32 {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < until, "does not end: {}", self.place.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// kill -9.
    pub(crate) fn kill(mut self) -> Place {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.place.clone()
    }

    /// Resident memory in bytes.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            * 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Settings of a client of this server, over this kind of link.
pub(crate) fn config(server: &Server, link: LinkChoice) -> ClientConfig {
    let key = KeyFile::read(&server.key_file).unwrap().key;
    ClientConfig {
        link,
        deadline: PATIENCE,
        connect_timeout: Duration::from_secs(10),
        ..ClientConfig::new(&server.endpoint, key)
    }
}

/// A client of this server, linked.
pub(crate) fn client(server: &Server, link: LinkChoice) -> Client {
    Client::connect(config(server, link)).unwrap()
}

/// Runs a command to its end; one that hangs is killed and fails the test.
pub(crate) fn finish(mut command: Command) -> Output {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read_out = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let read_err = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        err.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let until = Instant::now() + PATIENCE * 4;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{command:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    Output {
        status,
        stdout: read_out.join().unwrap(),
        stderr: read_err.join().unwrap(),
    }
}

/// What a command that must fail says, and with which code.
pub(crate) fn fails(command: Command, code: i32, parts: &[&str]) {
    let shown = format!("{command:?}");
    let output = finish(command);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{shown}: {text}");
    for part in parts {
        assert!(text.contains(part), "{shown}: {text:?} lacks {part:?}");
    }
    assert!(!text.contains("panicked"), "{shown}: {text}");
}

/// CPU time of a process so far, in ticks of 10 ms.
pub(crate) fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after = stat.rsplit_once(')').unwrap().1;
    let fields: Vec<&str> = after.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// CPU time that each process uses of 200 ticks with nothing to do, and what it may use: what is
/// going on at first may end, what never ends shows.
pub(crate) fn ticks_when_idle<const N: usize>(allowed: [(u32, u64); N]) -> [u64; N] {
    let used = |window: Duration| {
        let before = allowed.map(|(pid, _)| cpu_ticks(pid));
        std::thread::sleep(window);
        let after = allowed.map(|(pid, _)| cpu_ticks(pid));
        std::array::from_fn(|at| after[at] - before[at])
    };
    let fits = |used: &[u64; N], windows: u64| {
        let mut pairs = used.iter().zip(&allowed);
        pairs.all(|(used, (_, most))| used * windows <= *most)
    };
    let until = Instant::now() + SETTLE_MAX;
    while !fits(&used(IDLE_WINDOW / SETTLE_PART), SETTLE_PART.into()) && Instant::now() < until {}
    // A checkpoint may still come between.
    let mut least = [u64::MAX; N];
    for _ in 0..IDLE_TRIES {
        let found = used(IDLE_WINDOW);
        least = std::array::from_fn(|at| least[at].min(found[at]));
        if fits(&least, 1) {
            break;
        }
    }
    least
}

/// The machine's monotonic clock in microseconds, as journals have it.
pub(crate) fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

/// A trace of conversations: each goes on from one of the last few, or begins anew.
pub(crate) fn write_trace(path: &Path, requests: usize, seed: u64) {
    let mut random = random::Random(seed | 1);
    let mut random = |below: u64| random.below(below);
    let mut chains: Vec<Vec<u64>> = vec![vec![0]];
    let (mut next, mut text) = (1_u64, String::new());
    for number in 0..requests {
        let mut chain = match random(4) {
            0 => vec![0],
            _ => chains[chains.len() - 1 - random(chains.len().min(20) as u64) as usize].clone(),
        };
        for _ in 0..=random(6) {
            chain.push(next);
            next += 1;
        }
        let tokens = chain.len() * 512 - 5;
        text.push_str(&format!(
            "{{\"timestamp\": {number}, \"input_length\": {tokens}, \"output_length\": 10, \
             \"hash_ids\": {chain:?}}}\n"
        ));
        if chain.len() < 40 {
            chains.push(chain);
        }
    }
    std::fs::write(path, text).unwrap();
}

/// A page of the admin HTTP.
pub(crate) fn admin(server: &Server, path: &str) -> String {
    use std::io::Write as _;
    let mut stream = std::net::TcpStream::connect(&server.admin).unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text.split_once("\r\n\r\n").unwrap().1.to_owned()
}

/// Runs a tool of the system: what it printed, or why it failed.
pub(crate) fn tool(program: &str, words: &[&str]) -> Result<String, String> {
    match Command::new(program).args(words).output() {
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        }
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

/// A loop device over a file, detached with the test.
pub(crate) struct Loop(pub(crate) String);

impl Loop {
    pub(crate) fn over(file: &Path) -> Result<Self, String> {
        tool("losetup", &["--find", "--show", file.to_str().unwrap()]).map(Self)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = tool("losetup", &["--detach", &self.0]);
    }
}
