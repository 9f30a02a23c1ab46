//! Opening what a node stores in: data file, key file, superblock, in an order that a kill at any
//! point survives.
//!
//! ```text
//!   lock and size the data file
//!   superblock?  there    -> key file must be there and name this device
//!                blank    -> key file there: take its uuid (a first start was cut short, or the
//!                            data was wiped on purpose); else draw both, write the key file;
//!                            then format
//! ```
//!
//! The key is on disk before the device is formatted, so there is never a device whose key was
//! never written. A store of several devices is put together by [`assemble`](crate::assemble), with
//! the same order: key, device table, devices.

use crate::config::{Config, DataPath};
use crate::devices::{DeviceTable, TableError};
use crate::key_file::{KeyFile, KeyFileError};
use kvar_base::{ByteSize, Clock as _, DeviceUuid, SystemClock};
use kvar_engine::{FormatOptions, OpenError, Superblock, format_probed, read_superblock};
use kvar_io::{
    Arena, Device, DeviceError, DeviceOptions, IoEngine, Target, TargetError, Wanted, WriteProbe,
    open_device,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Memory for reading and writing superblocks: single pages.
const ARENA_BYTES: usize = 1 << 20;

/// Why storage cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The data file or block device.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// It holds something else than kvar's data.
    #[error(
        "{} holds {what}, not kvar's data; name another path, or erase it first if nobody needs it",
        path.display()
    )]
    Foreign {
        /// The data file or block device.
        path: PathBuf,
        /// What it holds.
        what: &'static str,
    },
    /// What is on it.
    #[error("{}: {source}", path.display())]
    Device {
        /// The data file or block device.
        path: PathBuf,
        /// Why.
        source: OpenError,
    },
    /// The I/O engine.
    #[error("{}: {source}", path.display())]
    Io {
        /// The data file or block device.
        path: PathBuf,
        /// Why.
        source: DeviceError,
    },
    /// Memory.
    #[error("cannot reserve {bytes} bytes of memory ({source}); give a smaller dram")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// The system's words.
        source: std::io::Error,
    },
    /// The key file.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// Data without its key.
    #[error(
        "{} holds data but its key file {} is missing: restore it (without the key the stored \
         blocks cannot be named), or move the data away to start with an empty store",
        data.display(), key.display()
    )]
    KeyMissing {
        /// The data file or block device.
        data: PathBuf,
        /// Where its key was looked for.
        key: PathBuf,
    },
    /// The key of another device.
    #[error(
        "{} is device {found}, but its key file {} belongs to device {expected}: the data or the \
         key file was swapped; put the right two together, or name the other with --key-file",
        data.display(), key.display()
    )]
    OtherDevice {
        /// The data file or block device.
        data: PathBuf,
        /// The key file.
        key: PathBuf,
        /// The device found.
        found: DeviceUuid,
        /// The device the key was made with.
        expected: DeviceUuid,
    },
    /// The device table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A device that nobody knows.
    #[error(
        "{} is device {uuid}, which does not belong to this store: take it out of the settings, or          erase it first to add it as a new device", path.display()
    )]
    Unknown {
        /// The data file or block device.
        path: PathBuf,
        /// Its name.
        uuid: DeviceUuid,
    },
    /// One device under two names.
    #[error("{} and {} are the same device {uuid}; name it once", path.display(), other.display())]
    Twice {
        /// The data file or block device.
        path: PathBuf,
        /// The other path.
        other: PathBuf,
        /// Its name.
        uuid: DeviceUuid,
    },
    /// Devices that are not there, where all must be.
    #[error(
        "{} of {all} devices missing: {}; bring them back, or start without them \
         (missing_device = \"start\")", missing.len(), missing.join("; ")
    )]
    Missing {
        /// Each with its reason.
        missing: Vec<String>,
        /// Devices of the store.
        all: usize,
    },
    /// None is there.
    #[error(
        "none of the store's devices is there: {}; bring one back, or move the device table away to \
         start with an empty store", missing.join("; ")
    )]
    NoneThere {
        /// Each with its reason.
        missing: Vec<String>,
    },
    /// Another number of shards than the device has.
    #[error(
        "{} was made with {found} shards and {wanted} were asked for; the number is fixed when a \
         device is made: leave --shards out, or start with an empty store elsewhere",
        data.display()
    )]
    Shards {
        /// The data file or block device.
        data: PathBuf,
        /// Its shards.
        found: u32,
        /// Those asked for.
        wanted: u32,
    },
}

/// A device that is there and belongs to this store.
pub(crate) struct OpenDevice {
    pub(crate) path: PathBuf,
    pub(crate) target: Arc<Target>,
    pub(crate) superblock: Arc<Superblock>,
}

/// A device of this store that is not there.
#[derive(Clone, Debug)]
pub(crate) struct AwayDevice {
    pub(crate) uuid: DeviceUuid,
    pub(crate) reason: String,
}

/// Storage that can be served from.
pub(crate) struct Storage {
    /// At least one.
    pub(crate) devices: Vec<OpenDevice>,
    pub(crate) away: Vec<AwayDevice>,
    /// Which devices belong to the store.
    pub(crate) table: DeviceTable,
    pub(crate) key_file: KeyFile,
    /// What an operator should hear.
    pub(crate) notes: Vec<String>,
}

impl Storage {
    /// Opens it, or makes it at a first start.
    pub(crate) fn open(config: &Config, clock: &SystemClock) -> Result<Self, StorageError> {
        match (DeviceTable::read(&config.table_path())?, &config.data[..]) {
            (None, [data]) => Self::open_one(config, data, clock),
            (table, _) => crate::assemble::open(config, table, clock),
        }
    }

    /// A store of one device needs no table: the key file names it.
    fn open_one(
        config: &Config,
        data: &DataPath,
        clock: &SystemClock,
    ) -> Result<Self, StorageError> {
        let path = &data.path;
        let size = data.size.or(config.size).map(|size| size.0);
        let on_device = |source| StorageError::Device {
            path: path.clone(),
            source,
        };
        let mut options = FormatOptions::random(
            config.shards_of_new_device().get(),
            config.expected_block_bytes.0,
            clock.unix_seconds(),
        );
        if let (Some(bytes), false) = (size, path.exists()) {
            // A size that cannot be divided must not leave a file behind.
            plan(bytes, &options).map_err(on_device)?;
        }
        let target = Target::open(path, Wanted { size, create: true })?;
        let mut notes = target.notes();
        let arena = arena(ARENA_BYTES)?;
        let mut device = device_over(&target, &arena, config.io_engine)?;
        let key_path = config.key_path();
        let (superblock, key_file) = match read_superblock(&mut *device, &arena) {
            Ok(Some(superblock)) => {
                let key_file = KeyFile::read(&key_path).map_err(|error| match error {
                    KeyFileError::Missing { path: key } => StorageError::KeyMissing {
                        data: path.clone(),
                        key,
                    },
                    error => error.into(),
                })?;
                if key_file.uuid != superblock.uuid {
                    return Err(StorageError::OtherDevice {
                        data: path.clone(),
                        key: key_path,
                        found: superblock.uuid,
                        expected: key_file.uuid,
                    });
                }
                (superblock, key_file)
            }
            Ok(None) => {
                // Its first page is blank, but a file system or a volume may begin further in.
                if let Some(what) = target.foreign_content()? {
                    return Err(StorageError::Foreign {
                        path: path.clone(),
                        what,
                    });
                }
                // Whether it can be divided is asked before a key is left behind.
                plan(target.bytes(), &options).map_err(on_device)?;
                let key_file = match KeyFile::read(&key_path) {
                    Ok(key_file) => {
                        notes.push(format!(
                            "{} is blank and {} was there already: an empty store with that key",
                            path.display(),
                            key_path.display()
                        ));
                        key_file
                    }
                    Err(KeyFileError::Missing { .. }) => {
                        let key_file = KeyFile::generate(options.uuid);
                        key_file.create(&key_path)?;
                        key_file
                    }
                    Err(error) => return Err(error.into()),
                };
                options.uuid = key_file.uuid;
                let made = format_probed(&mut *device, &arena, &options);
                if made.is_err() {
                    let_go(device);
                }
                let (superblock, probe) = made.map_err(on_device)?;
                notes.extend(probe.map(|probe| probe_note(path, &probe)));
                (superblock, key_file)
            }
            Err(OpenError::NotKvar) => {
                let what = target.foreign_content()?.unwrap_or("something else");
                return Err(StorageError::Foreign {
                    path: path.clone(),
                    what,
                });
            }
            Err(error) => return Err(on_device(error)),
        };
        check_shards(config, path, &superblock)?;
        let mut table = DeviceTable::default();
        table.enter(superblock.uuid, path, superblock.device_bytes, data.tier);
        let device = OpenDevice {
            path: path.clone(),
            target: Arc::new(target),
            superblock: Arc::new(superblock),
        };
        Ok(Self {
            devices: vec![device],
            away: Vec::new(),
            table,
            key_file,
            notes,
        })
    }
}

/// A device keeps the number of shards it was made with.
pub(crate) fn check_shards(
    config: &Config,
    path: &Path,
    superblock: &Superblock,
) -> Result<(), StorageError> {
    match config.shards {
        Some(wanted) if wanted.get() != superblock.shards => Err(StorageError::Shards {
            data: path.to_path_buf(),
            found: superblock.shards,
            wanted: wanted.get(),
        }),
        _ => Ok(()),
    }
}

/// What lies at a path.
pub(crate) enum Found {
    /// A device of kvar's.
    Device(Target, Superblock),
    /// Nothing that anybody needs.
    Blank(Target),
}

/// Opens what lies at a path, without writing to it; with `create` makes a file that is not there.
pub(crate) fn look(
    path: &Path,
    size: Option<u64>,
    create: bool,
    io_engine: IoEngine,
) -> Result<Found, StorageError> {
    let target = Target::open(path, Wanted { size, create })?;
    let arena = arena(ARENA_BYTES)?;
    let mut device = device_over(&target, &arena, io_engine)?;
    let found = match read_superblock(&mut *device, &arena) {
        Ok(found) => found,
        Err(OpenError::NotKvar) => {
            let what = target.foreign_content()?.unwrap_or("something else");
            return Err(StorageError::Foreign {
                path: path.into(),
                what,
            });
        }
        Err(source) => {
            return Err(StorageError::Device {
                path: path.into(),
                source,
            });
        }
    };
    drop(device);
    match found {
        Some(superblock) => Ok(Found::Device(target, superblock)),
        None => match target.foreign_content()? {
            Some(what) => Err(StorageError::Foreign {
                path: path.into(),
                what,
            }),
            None => Ok(Found::Blank(target)),
        },
    }
}

/// Divides a blank device, under a name that is on disk already.
pub(crate) fn make(
    target: &Target,
    options: &FormatOptions,
    io_engine: IoEngine,
) -> Result<Superblock, StorageError> {
    let arena = arena(ARENA_BYTES)?;
    let mut device = device_over(target, &arena, io_engine)?;
    let made = format_probed(&mut *device, &arena, options);
    let_go(device);
    match made {
        Ok((superblock, _)) => Ok(superblock),
        Err(source) => Err(StorageError::Device {
            path: target.path().into(),
            source,
        }),
    }
}

/// Drops a device; one that has not answered would be waited for, perhaps for ever. What is under way
/// keeps its memory, and the device stays locked until this process ends.
fn let_go(device: Box<dyn Device>) {
    if device.in_flight() > 0 {
        std::mem::forget(device);
    }
}

/// What was found of a new device, for whoever starts the node.
fn probe_note(path: &Path, probe: &WriteProbe) -> String {
    format!(
        "{} is new and was tried: it writes {}/s with {} under way, which is what it gets",
        path.display(),
        ByteSize(probe.bytes_per_s as u64),
        ByteSize(probe.in_flight_bytes)
    )
}

/// Whether a device answers at all: reads its superblock copies.
pub(crate) fn is_alive(target: &Target, uuid: DeviceUuid) -> bool {
    let Ok(arena) = arena(ARENA_BYTES) else {
        return true;
    };
    // Threads: the kernel's ring would cost more to set up than the four reads.
    device_over(target, &arena, IoEngine::Threads).is_ok_and(|mut device| {
        matches!(read_superblock(&mut *device, &arena), Ok(Some(found)) if found.uuid == uuid)
    })
}

/// A device over storage that is open already.
pub(crate) fn device_over(
    target: &Target,
    arena: &Arena,
    engine: IoEngine,
) -> Result<Box<dyn Device>, StorageError> {
    let options = DeviceOptions {
        engine,
        ..DeviceOptions::default()
    };
    // The notes of this short-lived device are the same as the shards' own.
    let opened = open_device(target, arena, options).map_err(|source| StorageError::Io {
        path: target.path().into(),
        source,
    })?;
    Ok(opened.0)
}

/// Whether so many bytes can be divided like that.
pub(crate) fn plan(bytes: u64, options: &FormatOptions) -> Result<Superblock, OpenError> {
    let FormatOptions {
        shards,
        expected_block_bytes,
        created_unix,
        uuid,
        secret,
    } = options.clone();
    Ok(Superblock::plan(
        bytes,
        shards,
        expected_block_bytes,
        uuid,
        secret,
        created_unix,
    )?)
}

/// Maps memory.
pub(crate) fn arena(bytes: usize) -> Result<Arena, StorageError> {
    Arena::new(bytes).map_err(|source| StorageError::Memory { bytes, source })
}
