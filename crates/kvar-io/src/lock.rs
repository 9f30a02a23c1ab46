//! Who has the storage: a lock against other servers, and on a block device an exclusive open
//! against the system's own users of it.

use crate::TargetError;
use crate::target::{io_error, open_error};
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a lock may outlive its dead holder before it counts as held.
const RELEASE_WAIT_MAX: Duration = Duration::from_secs(3);

/// How often that is looked at; taking a ring apart takes a few milliseconds.
const RELEASE_POLL: Duration = Duration::from_millis(5);

/// Takes the lock, or says who has it. A process that was killed is given a moment: the kernel
/// takes its rings apart, and the files registered with them, after it is gone.
pub(crate) fn lock(path: &Path, file: &File) -> Result<(), TargetError> {
    let deadline = Instant::now() + RELEASE_WAIT_MAX;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) => {
                let process = lock_holder(file);
                if process.is_some_and(is_alive) || Instant::now() >= deadline {
                    return Err(TargetError::InUse {
                        path: path.into(),
                        process,
                    });
                }
                std::thread::sleep(RELEASE_POLL);
            }
            Err(error) => return Err(io_error(path, "locking it")(error.into())),
        }
    }
}

fn is_alive(process: u32) -> bool {
    // "1234 (name) S ...": a zombie has given everything up and waits for its parent alone.
    let status = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let state = status
        .rsplit(')')
        .next()
        .and_then(|rest| rest.trim_start().chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// The process that `/proc/locks` names for this file; best effort, for the message alone.
fn lock_holder(file: &File) -> Option<u32> {
    let metadata = file.metadata().ok()?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let place = format!("{major:02x}:{minor:02x}:{inode}");
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    // "1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF"
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let kind = words.next()?;
        let process = words.nth(2)?;
        (kind == "FLOCK" && words.next()? == place).then(|| process.parse().ok())?
    })
}

/// Opens a block device for this process alone; the lock beside it tells who else has it.
pub(crate) fn open_exclusively(path: &Path) -> Result<File, TargetError> {
    let exclusive = i32::try_from(OFlags::EXCL.bits()).unwrap_or(0);
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(exclusive);
    let opened = options.open(path).or_else(|error| {
        if error.kind() != ErrorKind::ResourceBusy || mount_point(path).is_some() {
            return Err(exclusive_error(path, error));
        }
        // Another server holds the lock too, and a plain open can wait for it.
        let plain = File::open(path).map_err(|error| open_error(path, error))?;
        lock(path, &plain)?;
        drop(plain);
        options
            .open(path)
            .map_err(|error| exclusive_error(path, error))
    });
    let file = opened?;
    lock(path, &file)?;
    Ok(file)
}

fn exclusive_error(path: &Path, error: io::Error) -> TargetError {
    match error.kind() {
        ErrorKind::ResourceBusy => TargetError::Busy {
            path: path.into(),
            mounted_at: mount_point(path),
        },
        _ => open_error(path, error),
    }
}

fn mount_point(path: &Path) -> Option<PathBuf> {
    let device = std::fs::metadata(path).ok()?.rdev();
    let number = format!(
        "{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    // "36 35 98:0 /root /mnt rw,noatime ..."
    mounts.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(2);
        (words.next()? == number).then(|| words.nth(1).map(PathBuf::from))?
    })
}
