//! Opening what an operator names: everything that can be wrong with it has its own words, and
//! nothing is left behind.

mod common;

use common::*;
use kvar_io::{Arena, DeviceOptions, Target, TargetError, Wanted, open_device};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

const SIZE: u64 = 1 << 20;

fn open(path: &Path, size: Option<u64>, create: bool) -> Result<Target, TargetError> {
    Target::open(path, Wanted { size, create })
}

fn words(path: &Path, size: Option<u64>, create: bool) -> String {
    open(path, size, create).unwrap_err().to_string()
}

#[test]
fn a_new_file_is_allocated_private_and_locked_until_the_last_descriptor_closes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    let target = open(&path, Some(SIZE + 100), true).unwrap();
    assert_eq!(
        (target.bytes(), target.path(), target.is_block_device()),
        (SIZE, path.as_path(), false)
    );
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(
        (metadata.len(), metadata.permissions().mode() & 0o777),
        (SIZE, 0o600)
    );
    assert_eq!(target.is_sparse(), metadata.blocks() * 512 < SIZE);
    assert_eq!(
        target.notes().len(),
        usize::from(target.is_sparse()) + usize::from(!target.is_direct())
    );
    assert_eq!(target.foreign_content().unwrap(), None);

    let in_use = words(&path, None, false);
    assert!(
        in_use.contains(&format!("in use by process {}", std::process::id())),
        "{in_use}"
    );
    let shard = target.try_clone_file().unwrap();
    drop(target);
    assert!(matches!(
        open(&path, None, false),
        Err(TargetError::InUse { .. })
    ));
    drop(shard);
    assert_eq!(open(&path, None, false).unwrap().bytes(), SIZE);
    assert_eq!(open(&path, Some(SIZE), true).unwrap().bytes(), SIZE);
}

#[test]
fn another_size_names_both_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    drop(open(&path, Some(SIZE), true).unwrap());
    for wanted in [SIZE / 2, SIZE * 2] {
        let message = words(&path, Some(wanted), true);
        assert!(message.contains(&wanted.to_string()) && message.contains(&SIZE.to_string()));
        assert!(message.contains("move it away"), "{message}");
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);
}

#[test]
fn a_file_larger_than_the_disk_is_refused_and_not_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    let message = words(&path, Some(1 << 60), true);
    assert!(
        message.contains("1048576TiB") && message.contains("ask for less"),
        "{message}"
    );
    assert!(!path.exists());
    // An empty file that was there stays, and stays empty.
    std::fs::File::create(&path).unwrap();
    assert!(matches!(
        open(&path, Some(1 << 60), true),
        Err(TargetError::NoRoom { .. })
    ));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
}

#[test]
fn what_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    assert!(words(&path, None, false).contains("does not exist"));
    assert!(words(&path, None, true).contains("such as 4GiB"));
    assert!(words(&folder.path().join("no/data"), Some(SIZE), true).contains("mkdir -p"));
    assert!(words(&path, Some(100), true).contains("at least one page"));
    assert!(!path.exists());
    std::fs::File::create(&path).unwrap();
    assert!(matches!(
        open(&path, None, false),
        Err(TargetError::Missing { .. })
    ));
    assert!(matches!(
        open(&path, None, true),
        Err(TargetError::SizeMissing { .. })
    ));
    let adopted = open(&path, Some(SIZE), true).unwrap();
    assert_eq!(adopted.bytes(), SIZE);
    drop(adopted);
    std::fs::write(&path, [1; 100]).unwrap();
    assert!(matches!(
        open(&path, None, false),
        Err(TargetError::TooSmall { bytes: 100, .. })
    ));
}

#[test]
fn what_is_no_storage_is_refused_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    assert!(words(folder.path(), Some(SIZE), true).contains("a folder"));
    assert!(words(Path::new("/dev/null"), Some(SIZE), true).contains("a character device"));
    let pipe = folder.path().join("pipe");
    tool("mkfifo", &[pipe.to_str().unwrap()]).unwrap();
    assert!(words(&pipe, Some(SIZE), true).contains("a pipe"));
    let under_a_file = folder.path().join("file");
    std::fs::write(&under_a_file, "x").unwrap();
    assert!(open(&under_a_file.join("data"), Some(SIZE), true).is_err());
}

#[test]
fn a_file_without_permission_says_so() {
    if is_root() {
        return eprintln!("skipped: root may open everything");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    drop(open(&path, Some(SIZE), true).unwrap());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
    assert!(words(&path, None, false).contains("grant this user both"));
}

#[test]
fn foreign_content_is_recognised() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    let check = |offset: usize, magic: &[u8], name: &str| {
        let mut bytes = vec![0; SIZE as usize];
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        std::fs::write(&path, bytes).unwrap();
        let found = open(&path, None, false).unwrap().foreign_content().unwrap();
        assert!(
            found.is_some_and(|found| found.contains(name)),
            "{name}: {found:?}"
        );
    };
    check(512, b"EFI PART", "GPT");
    check(1080, &[0x53, 0xef], "ext4");
    check(0, b"XFSB", "XFS");
    check(65600, b"_BHRfS_M", "Btrfs");
    check(510, &[0x55, 0xaa], "partition table");
}

/// Many servers started at once over a missing file: one has it, the others hear why not.
#[test]
fn of_many_that_create_at_once_one_wins() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    let opened: Vec<Result<Target, TargetError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| open(&path, Some(SIZE), true)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(
        opened.iter().filter(|target| target.is_ok()).count(),
        1,
        "{opened:?}"
    );
    assert!(
        opened
            .iter()
            .all(|target| matches!(target, Ok(_) | Err(TargetError::InUse { .. })))
    );
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);
}

/// Names the file to the child of the test below.
const HOLD: &str = "KVAR_TEST_HOLD";

/// The child: a server that is busy until it is killed. Without the name, nothing.
#[test]
fn a_holder_for_the_test_below() {
    let Some(path) = std::env::var_os(HOLD) else {
        return;
    };
    let target = open(Path::new(&path), None, false).unwrap();
    let arena = Arena::new(64 << 20).unwrap();
    let (mut device, _) = open_device(&target, &arena, DeviceOptions::default()).unwrap();
    let mut over = Vec::new();
    for token in 0..32 {
        device.submit(token, read(&arena, 0, SIZE as usize));
    }
    println!("busy");
    loop {
        device.wait(PATIENCE);
        device.poll(&mut over);
        for completion in over.drain(..) {
            device.submit(completion.token, completion.op);
        }
        device.kick().unwrap();
    }
}

/// The kernel gives the files of a killed process' ring back after the process is gone; a restart
/// must not find its own ghost.
#[test]
fn a_killed_server_leaves_nothing_in_the_way_of_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    drop(open(&path, Some(SIZE), true).unwrap());
    for _ in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_holder_for_the_test_below", "--nocapture"])
            .env(HOLD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let busy = lines.any(|line| line.unwrap().contains("busy"));
        let refused = open(&path, None, false).map(|target| target.bytes());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(busy, "the child did not start");
        let holder = Some(child.id());
        assert!(matches!(refused, Err(TargetError::InUse { process, .. }) if process == holder));
        open(&path, None, false).unwrap();
    }
}
