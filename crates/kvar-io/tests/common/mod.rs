//! Every kind of device, behind one way to open it.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

use kvar_io::sim::{SimDisk, SimOptions};
use kvar_io::{Arena, Completion, Device, Lifetime, Op, Ring, Shared, Target, Threads, Wanted};
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub const PAGE: usize = 4096;

/// Long enough for a loaded machine; a test that gets here has found a hang.
pub const PATIENCE: Duration = Duration::from_secs(30);

type Open = Box<dyn Fn(&Arena, usize) -> Box<dyn Device>>;

/// Storage, memory, and a way to open a device over them again and again.
pub struct Stand {
    pub kind: &'static str,
    pub arena: Arena,
    open: Open,
    _folder: Option<TempDir>,
}

impl Stand {
    pub fn open(&self, depth: usize) -> Box<dyn Device> {
        (self.open)(&self.arena, depth)
    }

    /// Ring and threads over one target.
    pub fn over(target: Target, arena_bytes: usize) -> Vec<Self> {
        let arena = || Arena::new(arena_bytes).unwrap();
        let target = std::rc::Rc::new(target);
        let mut stands = Vec::new();
        let file = target.try_clone_file().unwrap();
        match Ring::open(file, target.bytes(), &arena(), 1) {
            Ok(_) => {
                let target = std::rc::Rc::clone(&target);
                let open: Open = Box::new(move |arena, depth| {
                    let file = target.try_clone_file().unwrap();
                    Box::new(Ring::open(file, target.bytes(), arena, depth).unwrap())
                });
                stands.push(Self {
                    kind: "io_uring",
                    arena: arena(),
                    open,
                    _folder: None,
                });
            }
            Err(refused) => eprintln!("skipped: the ring, because {refused}"),
        }
        let open: Open = Box::new(move |_, depth| {
            let file = target.try_clone_file().unwrap();
            Box::new(Threads::open(file, target.bytes(), depth).unwrap())
        });
        stands.push(Self {
            kind: "threads",
            arena: arena(),
            open,
            _folder: None,
        });
        stands
    }
}

/// Ring, threads and sim, each over fresh storage of its own.
pub fn stands(device_bytes: u64, arena_bytes: usize) -> Vec<Stand> {
    let mut stands = Vec::new();
    for at in 0..2 {
        let folder = tempfile::tempdir().unwrap();
        let target = new_file(&folder.path().join("data"), device_bytes);
        let mut both = Stand::over(target, arena_bytes);
        if at < both.len() {
            stands.push(Stand {
                _folder: Some(folder),
                ..both.swap_remove(at)
            });
        }
    }
    for seed in 1..=3 {
        let disk = SimDisk::new(
            device_bytes,
            SimOptions {
                seed,
                ..SimOptions::default()
            },
        );
        let open: Open = Box::new(move |_, _| Box::new(disk.open()));
        let arena = Arena::new(arena_bytes).unwrap();
        stands.push(Stand {
            kind: "sim",
            arena,
            open,
            _folder: None,
        });
    }
    stands
}

pub fn new_file(path: &Path, bytes: u64) -> Target {
    Target::open(
        path,
        Wanted {
            size: Some(bytes),
            create: true,
        },
    )
    .unwrap()
}

/// Submits all, and collects until nothing is in flight.
pub fn run(device: &mut dyn Device, ops: Vec<Op>) -> Vec<Completion> {
    let count = ops.len();
    for (token, op) in ops.into_iter().enumerate() {
        device.submit(token as u64, op);
    }
    device.kick().unwrap();
    let mut over = drain(device);
    over.sort_by_key(|completion| completion.token);
    let tokens: Vec<u64> = over.iter().map(|completion| completion.token).collect();
    assert_eq!(
        tokens,
        (0..count as u64).collect::<Vec<_>>(),
        "each token once"
    );
    over
}

pub fn drain(device: &mut dyn Device) -> Vec<Completion> {
    let (mut over, start) = (Vec::new(), Instant::now());
    loop {
        device.poll(&mut over);
        if device.in_flight() == 0 {
            return over;
        }
        assert!(start.elapsed() < PATIENCE, "{}: hangs", device.engine());
        device.wait(Duration::from_millis(100));
    }
}

/// A buffer whose bytes tell where they belong.
pub fn filled(arena: &Arena, len: usize, mark: u64) -> Shared {
    let mut buffer = arena.allocate(len).unwrap();
    for (at, word) in buffer.as_mut_slice().chunks_mut(8).enumerate() {
        let value = mark.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at as u64;
        word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
    }
    buffer.freeze()
}

pub fn write(offset: u64, buffers: Vec<Shared>) -> Op {
    let lifetime = Lifetime::Pages;
    Op::Write {
        offset,
        buffers,
        lifetime,
    }
}

pub fn read(arena: &Arena, offset: u64, len: usize) -> Op {
    Op::Read {
        offset,
        buffer: arena.allocate(len).unwrap(),
    }
}

/// The bytes of a read that went well.
pub fn bytes(completion: &Completion) -> &[u8] {
    assert_eq!(completion.result, Ok(()));
    let Op::Read { buffer, .. } = &completion.op else {
        panic!("{:?} is no read", completion.op)
    };
    buffer.as_slice()
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a system tool; its words on success.
pub fn tool(name: &str, arguments: &[&str]) -> Result<String, String> {
    let output = std::process::Command::new(name).args(arguments).output();
    let output = output.map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    Err(format!(
        "{name}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

/// A loop device over a new file, or why there is none here.
pub fn loop_device(folder: &Path, bytes: u64) -> Result<(String, Undo), String> {
    let backing = folder.join("backing").to_string_lossy().into_owned();
    let file = std::fs::File::create(&backing).map_err(|error| error.to_string())?;
    file.set_len(bytes).map_err(|error| error.to_string())?;
    if !is_root() {
        return Err("a loop device needs root".to_owned());
    }
    let path = tool("losetup", &["--find", "--show", &backing])?;
    let detach = Undo("losetup", vec!["--detach".to_owned(), path.clone()]);
    Ok((path, detach))
}

/// Undoes something when the test ends, well or not.
pub struct Undo(pub &'static str, pub Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        let arguments: Vec<&str> = self.1.iter().map(String::as_str).collect();
        if let Err(message) = tool(self.0, &arguments) {
            eprintln!("not undone: {message}");
        }
    }
}
