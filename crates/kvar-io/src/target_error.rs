//! Why storage could not be opened, each with what to do about it.

use kvar_base::ByteSize;
use std::io;
use std::path::{Path, PathBuf};

/// Why storage could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// No such file, and none is to be made.
    #[error(
        "{path} does not exist or is empty: check the path, or start the server once to create it"
    )]
    Missing {
        /// What was named.
        path: PathBuf,
    },
    /// The folder of a new file is not there.
    #[error(
        "the folder {folder} does not exist: create it (mkdir -p {folder}) or name another path"
    )]
    FolderMissing {
        /// The folder.
        folder: PathBuf,
    },
    /// A folder, a pipe, a character device and the like.
    #[error("{path} is {kind}: name a regular file or a block device")]
    NotStorage {
        /// What was named.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A new file needs a size.
    #[error("{path} is new and has no size: say how large it shall be, such as 4GiB")]
    SizeMissing {
        /// What was named.
        path: PathBuf,
    },
    /// Not one page.
    #[error("{path}: {bytes} bytes hold nothing: use at least one page of 4KiB")]
    TooSmall {
        /// What was named.
        path: PathBuf,
        /// Bytes asked for, or there.
        bytes: u64,
    },
    /// The file exists in another size.
    #[error(
        "{path} has {found} bytes, but {wanted} were asked for: give the size it was made with, or \
         move it away to start with an empty store"
    )]
    SizeDiffers {
        /// What was named.
        path: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes asked for.
        wanted: u64,
    },
    /// The file system or the device is smaller than what was asked for.
    #[error(
        "{path}: {} ({wanted} bytes) asked for, {} ({free} bytes) there: ask for less, free space, \
         or name another place", ByteSize(*wanted), ByteSize(*free)
    )]
    NoRoom {
        /// What was named.
        path: PathBuf,
        /// Bytes asked for.
        wanted: u64,
        /// Bytes there.
        free: u64,
    },
    /// Another process has it.
    #[error("{path} is in use{}: stop the other server, or name another path", by(*.process))]
    InUse {
        /// What was named.
        path: PathBuf,
        /// The process that holds the lock, where the system tells.
        process: Option<u32>,
    },
    /// The device is mounted, or part of a RAID, a volume group or swap.
    #[error(
        "{path} is used by the system (mounted{}, or part of a RAID, a volume group or swap): \
         release it, or name another device", at(.mounted_at.as_deref())
    )]
    Busy {
        /// What was named.
        path: PathBuf,
        /// Where it is mounted, if that is why.
        mounted_at: Option<PathBuf>,
    },
    /// Not allowed.
    #[error("{path} cannot be opened for reading and writing ({message}): grant this user both")]
    Permission {
        /// What was named.
        path: PathBuf,
        /// The system's words.
        message: String,
    },
    /// A device whose smallest unit is larger than a page.
    #[error(
        "{path} has sectors of {sector_bytes} bytes; at most 4096 are supported: use another device"
    )]
    SectorTooLarge {
        /// What was named.
        path: PathBuf,
        /// Its sector size.
        sector_bytes: u32,
    },
    /// Anything else the system said.
    #[error("{path}: {doing} failed: {source}")]
    Io {
        /// What was named.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The system's words.
        source: io::Error,
    },
}

fn by(process: Option<u32>) -> String {
    process.map_or_else(String::new, |process| format!(" by process {process}"))
}

fn at(mounted_at: Option<&Path>) -> String {
    mounted_at.map_or_else(String::new, |folder| format!(" at {}", folder.display()))
}
