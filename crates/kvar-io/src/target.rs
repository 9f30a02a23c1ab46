//! What the operator named to hold the data: a raw block device, or a regular file.
//!
//! ```text
//!   path ── missing ──> create (0600), lock, allocate, sync file and folder ──┐
//!     │                                                                       ├──> Target
//!     ├── regular file ──> lock, compare sizes ───────────────────────────────┤
//!     ├── block device ──> open exclusively, lock, measure ───────────────────┘
//!     └── anything else: TargetError::NotStorage
//! ```
//!
//! What must always be true:
//! * one process at a time: the lock is taken before anything is changed and lives as long as the
//!   target and every file cloned from it;
//! * a failed open leaves things as they were: a file it created is removed again;
//! * a preallocated file owns its space, so a write to it cannot find the file system full.
//!
//! What it leaves to others: what the bytes mean. [`Target::foreign_content`] says whether they
//! look like somebody else's; whoever formats asks it first.

use crate::lock::{lock, open_exclusively};
use crate::{Arena, NoStreams, TargetError, WriteStreams};
use kvar_base::PAGE_BYTES;
use rustix::fs::{FallocateFlags, FileType, OFlags};
use rustix::io::Errno;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Unit of `st_blocks`, whatever the file system.
const STAT_BLOCK_BYTES: u64 = 512;

/// Readable by its owner alone: the file holds what people said to a model.
const FILE_MODE: u32 = 0o600;

/// How often an open starts again because another process created or removed the file meanwhile.
const OPEN_ATTEMPTS_MAX: usize = 8;

/// What the caller expects of the storage.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Bytes to use, rounded down to whole pages. Needed for a new file; compared with the size of
    /// an existing one; on a block device an upper bound (`None`: all of it).
    pub size: Option<u64>,
    /// Whether a missing (or empty) file is made.
    pub create: bool,
}

/// Opened and locked storage. Several devices, one a shard, may be opened over it.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    file: File,
    bytes: u64,
    is_block_device: bool,
    sparse: bool,
    direct: bool,
    write_streams: WriteStreams,
}

impl Target {
    /// Opens `path`, or creates it, and locks it against every other process.
    ///
    /// # Errors
    /// See [`TargetError`]; after an error nothing has changed on the file system.
    pub fn open(path: impl AsRef<Path>, wanted: Wanted) -> Result<Self, TargetError> {
        let path = path.as_ref();
        let wanted_bytes = wanted.size.map(|bytes| bytes / PAGE_BYTES * PAGE_BYTES);
        if wanted_bytes == Some(0) {
            let bytes = wanted.size.unwrap_or(0);
            return Err(TargetError::TooSmall {
                path: path.into(),
                bytes,
            });
        }
        for _ in 0..OPEN_ATTEMPTS_MAX {
            let attempt = match std::fs::metadata(path) {
                Ok(metadata) => Self::open_existing(path, &metadata, wanted_bytes, wanted.create),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    Self::create(path, wanted_bytes, wanted.create)
                }
                Err(error) => Err(open_error(path, error)),
            };
            match attempt {
                // Another process created or removed it between our look and our open.
                Err(TargetError::Io { doing: RACED, .. }) => {}
                decided => return decided,
            }
        }
        let source = io::Error::other("it is being created and removed over and over");
        Err(TargetError::Io {
            path: path.into(),
            doing: RACED,
            source,
        })
    }

    fn create(path: &Path, bytes: Option<u64>, create: bool) -> Result<Self, TargetError> {
        let folder = folder_of(path);
        match std::fs::metadata(folder) {
            Ok(metadata) if metadata.is_dir() => {}
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(open_error(folder, error));
            }
            _ => {
                return Err(TargetError::FolderMissing {
                    folder: folder.into(),
                });
            }
        }
        if !create {
            return Err(TargetError::Missing { path: path.into() });
        }
        let bytes = bytes.ok_or_else(|| TargetError::SizeMissing { path: path.into() })?;
        check_room(path, folder, bytes)?;
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create_new(true)
            .mode(FILE_MODE);
        let file = options.open(path).map_err(|source| match source.kind() {
            ErrorKind::AlreadyExists => TargetError::Io {
                path: path.into(),
                doing: RACED,
                source,
            },
            _ => open_error(path, source),
        })?;
        // Whoever locks first fills the file; only the holder of the lock may remove it.
        lock(path, &file)?;
        let sparse =
            allocate(path, &file, bytes).inspect_err(|_| drop(std::fs::remove_file(path)))?;
        Ok(Self::finish(path, file, bytes, false, sparse))
    }

    fn open_existing(
        path: &Path,
        metadata: &Metadata,
        wanted: Option<u64>,
        create: bool,
    ) -> Result<Self, TargetError> {
        let kind = FileType::from_raw_mode(metadata.mode());
        match kind {
            FileType::RegularFile => Self::open_file(path, wanted, create),
            FileType::BlockDevice => Self::open_block_device(path, wanted),
            _ => Err(TargetError::NotStorage {
                path: path.into(),
                kind: kind_name(kind),
            }),
        }
    }

    fn open_file(path: &Path, wanted: Option<u64>, create: bool) -> Result<Self, TargetError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| match source.kind() {
                ErrorKind::NotFound => TargetError::Io {
                    path: path.into(),
                    doing: RACED,
                    source,
                },
                _ => open_error(path, source),
            })?;
        lock(path, &file)?;
        let metadata = file
            .metadata()
            .map_err(io_error(path, "reading its size"))?;
        if metadata.nlink() == 0 {
            let source = io::Error::other("removed while it was opened");
            return Err(TargetError::Io {
                path: path.into(),
                doing: RACED,
                source,
            });
        }
        let found = metadata.len();
        if found == 0 {
            // Made by hand, or by a server that died between creating and allocating.
            if !create {
                return Err(TargetError::Missing { path: path.into() });
            }
            let bytes = wanted.ok_or_else(|| TargetError::SizeMissing { path: path.into() })?;
            check_room(path, folder_of(path), bytes)?;
            let sparse = allocate(path, &file, bytes)?;
            return Ok(Self::finish(path, file, bytes, false, sparse));
        }
        if let Some(wanted) = wanted
            && wanted != found
        {
            return Err(TargetError::SizeDiffers {
                path: path.into(),
                found,
                wanted,
            });
        }
        let bytes = found / PAGE_BYTES * PAGE_BYTES;
        if bytes == 0 {
            return Err(TargetError::TooSmall {
                path: path.into(),
                bytes: found,
            });
        }
        let sparse = is_sparse(&metadata);
        Ok(Self::finish(path, file, bytes, false, sparse))
    }

    fn open_block_device(path: &Path, wanted: Option<u64>) -> Result<Self, TargetError> {
        let mut file = open_exclusively(path)?;
        let sector_bytes = rustix::fs::ioctl_blksszget(&file)
            .map_err(|error| io_error(path, "reading its sector size")(error.into()))?;
        if u64::from(sector_bytes) > PAGE_BYTES {
            return Err(TargetError::SectorTooLarge {
                path: path.into(),
                sector_bytes,
            });
        }
        let found = file
            .seek(SeekFrom::End(0))
            .map_err(io_error(path, "measuring its size"))?;
        let bytes = match wanted {
            Some(wanted) if wanted > found => {
                return Err(TargetError::NoRoom {
                    path: path.into(),
                    wanted,
                    free: found,
                });
            }
            Some(wanted) => wanted,
            None => found / PAGE_BYTES * PAGE_BYTES,
        };
        if bytes == 0 {
            return Err(TargetError::TooSmall {
                path: path.into(),
                bytes: found,
            });
        }
        Ok(Self::finish(path, file, bytes, true, false))
    }

    fn finish(path: &Path, file: File, bytes: u64, is_block_device: bool, sparse: bool) -> Self {
        let direct = set_direct(&file);
        let write_streams = match file.metadata() {
            _ if !is_block_device => WriteStreams::none(NoStreams::File),
            _ if !direct => WriteStreams::none(NoStreams::Buffered),
            Ok(metadata) => {
                let device = metadata.rdev();
                WriteStreams::of_device(rustix::fs::major(device), rustix::fs::minor(device))
            }
            Err(_) => WriteStreams::none(NoStreams::Unknown),
        };
        Self {
            path: path.into(),
            file,
            bytes,
            is_block_device,
            sparse,
            direct,
            write_streams,
        }
    }

    /// What was named.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Usable bytes, whole pages.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is a raw block device, and no file.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// Whether some of the file's space is not allocated, so that a write can find the disk full.
    #[must_use]
    pub fn is_sparse(&self) -> bool {
        self.sparse
    }

    /// Whether I/O goes around the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Its write streams, if it has any: the same for all devices that are opened over it.
    #[must_use]
    pub fn write_streams(&self) -> &WriteStreams {
        &self.write_streams
    }

    /// Another descriptor of the same open file, for one more device; the lock lasts until the
    /// last one is closed.
    ///
    /// # Errors
    /// When the process has too many open files.
    pub fn try_clone_file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// What an operator should hear about this storage, one sentence each.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let path = self.path.display();
        let mut notes = Vec::new();
        if self.sparse {
            notes.push(format!(
                "{path} is sparse: its space is not reserved, and writes fail when the file system is full"
            ));
        }
        if !self.direct {
            notes.push(format!(
                "{path} does not support direct I/O: data passes through the page cache and uses memory twice"
            ));
        }
        notes
    }

    /// What the first bytes look like, when they look like a file system, a partition table or a
    /// volume of somebody else. To be asked before a device without a superblock is formatted.
    ///
    /// # Errors
    /// When the bytes cannot be read.
    pub fn foreign_content(&self) -> Result<Option<&'static str>, TargetError> {
        let doing = "looking for foreign content";
        let arena = Arena::new(FOREIGN_BYTES).map_err(io_error(&self.path, doing))?;
        let mut buffer = arena
            .allocate(FOREIGN_BYTES)
            .ok_or_else(|| io_error(&self.path, doing)(io::Error::from(ErrorKind::OutOfMemory)))?;
        let bytes = buffer.padded_mut();
        bytes.fill(0);
        let len = usize::try_from(self.bytes).map_or(bytes.len(), |target| target.min(bytes.len()));
        let bytes = &mut bytes[..len];
        self.file
            .read_exact_at(bytes, 0)
            .map_err(io_error(&self.path, doing))?;
        Ok(FOREIGN.iter().find_map(|(name, offset, magic)| {
            (bytes.get(*offset..offset + magic.len()) == Some(*magic)).then_some(*name)
        }))
    }
}

/// Enough of the device to see every mark below.
const FOREIGN_BYTES: usize = 128 << 10;

/// Marks that others leave, as util-linux' blkid knows them: name, offset, bytes.
const FOREIGN: &[(&str, usize, &[u8])] = &[
    ("a GPT partition table", 512, b"EFI PART"),
    ("a GPT partition table", 4096, b"EFI PART"),
    ("an ext2, ext3 or ext4 file system", 1080, &[0x53, 0xef]),
    ("an XFS file system", 0, b"XFSB"),
    ("a Btrfs file system", 65600, b"_BHRfS_M"),
    ("an F2FS file system", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("an LVM physical volume", 512, b"LABELONE"),
    ("a Linux RAID member", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("a Linux RAID member", 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("a Ceph BlueStore device", 0, b"bluestore block device"),
    ("swap space", 4086, b"SWAPSPACE2"),
    // Last: FAT and old partition tables have nothing but this.
    ("a boot sector or partition table", 510, &[0x55, 0xaa]),
];

/// What was being done when two processes met; [`Target::open`] starts again.
const RACED: &str = "opening";

pub(crate) fn io_error(path: &Path, doing: &'static str) -> impl Fn(io::Error) -> TargetError {
    move |source| TargetError::Io {
        path: path.into(),
        doing,
        source,
    }
}

pub(crate) fn open_error(path: &Path, error: io::Error) -> TargetError {
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => TargetError::Permission {
            path: path.into(),
            message: error.to_string(),
        },
        _ => TargetError::Io {
            path: path.into(),
            doing: "opening it",
            source: error,
        },
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a folder",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        _ => "no file",
    }
}

fn free_bytes(folder: &Path) -> io::Result<u64> {
    let status = rustix::fs::statvfs(folder)?;
    Ok(status.f_bavail.saturating_mul(status.f_frsize))
}

fn check_room(path: &Path, folder: &Path, wanted: u64) -> Result<(), TargetError> {
    let free = free_bytes(folder).map_err(io_error(path, "asking for free space"))?;
    if wanted > free {
        return Err(TargetError::NoRoom {
            path: path.into(),
            wanted,
            free,
        });
    }
    Ok(())
}

/// Gives a new, locked, empty file its size. Says whether it is sparse. After an error it is
/// empty again.
fn allocate(path: &Path, file: &File, bytes: u64) -> Result<bool, TargetError> {
    let undo = |error| {
        drop(file.set_len(0));
        error
    };
    let sparse = match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => false,
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            file.set_len(bytes)
                .map_err(io_error(path, "setting its size"))
                .map_err(undo)?;
            true
        }
        Err(Errno::NOSPC | Errno::DQUOT) => {
            let free = free_bytes(folder_of(path)).unwrap_or(0);
            return Err(undo(TargetError::NoRoom {
                path: path.into(),
                wanted: bytes,
                free,
            }));
        }
        Err(error) => return Err(undo(io_error(path, "allocating its space")(error.into()))),
    };
    // The file and its name have to survive a power cut before anything is promised on it.
    file.sync_all()
        .map_err(io_error(path, "making it durable"))
        .map_err(undo)?;
    // Some network file systems cannot sync a folder; they make names durable by themselves.
    drop(File::open(folder_of(path)).and_then(|folder| folder.sync_all()));
    Ok(sparse)
}

fn is_sparse(metadata: &Metadata) -> bool {
    metadata.blocks().saturating_mul(STAT_BLOCK_BYTES) < metadata.len()
}

/// Whether `file` is a regular file whose whole space is allocated.
pub(crate) fn is_preallocated_file(file: &File) -> bool {
    file.metadata()
        .is_ok_and(|metadata| metadata.is_file() && !is_sparse(&metadata))
}

/// Turns direct I/O on and tries it with one page; back to the page cache where it does not work.
fn set_direct(file: &File) -> bool {
    let Ok(flags) = rustix::fs::fcntl_getfl(file) else {
        return false;
    };
    if rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT).is_err() {
        return false;
    }
    let works = Arena::new(PAGE_BYTES as usize).ok().and_then(|arena| {
        let mut page = arena.allocate(PAGE_BYTES as usize)?;
        // Alignment rules beyond a page show as an invalid argument; a broken sector is no reason
        // to give direct I/O up.
        let read = file.read_at(page.padded_mut(), 0);
        Some(!matches!(read, Err(error) if error.kind() == ErrorKind::InvalidInput))
    });
    if works == Some(true) {
        return true;
    }
    let _ = rustix::fs::fcntl_setfl(file, flags);
    false
}
