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
//! never written.

use crate::config::Config;
use crate::key_file::{KeyFile, KeyFileError};
use kvar_base::{Clock as _, DeviceUuid, SystemClock};
use kvar_engine::{FormatOptions, OpenError, Superblock, format, read_superblock};
use kvar_io::{Arena, DeviceError, DeviceOptions, Target, TargetError, Wanted, open_device};
use std::path::PathBuf;

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

/// Storage that can be served from.
pub(crate) struct Storage {
    pub(crate) target: Target,
    pub(crate) superblock: Superblock,
    pub(crate) key_file: KeyFile,
    /// What an operator should hear.
    pub(crate) notes: Vec<String>,
}

impl Storage {
    /// Opens it, or makes it at a first start.
    pub(crate) fn open(config: &Config, clock: &SystemClock) -> Result<Self, StorageError> {
        let path = &config.data;
        let size = config.size.map(|size| size.0);
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
        let device_options = DeviceOptions {
            engine: config.io_engine,
            ..DeviceOptions::default()
        };
        // The notes of this short-lived device are the same as the shards' own.
        let (mut device, _) =
            open_device(&target, &arena, device_options).map_err(|source| StorageError::Io {
                path: path.clone(),
                source,
            })?;
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
                (
                    format(&mut *device, &arena, &options).map_err(on_device)?,
                    key_file,
                )
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
        if let Some(wanted) = config.shards
            && wanted.get() != superblock.shards
        {
            return Err(StorageError::Shards {
                data: path.clone(),
                found: superblock.shards,
                wanted: wanted.get(),
            });
        }
        Ok(Self {
            target,
            superblock,
            key_file,
            notes,
        })
    }
}

fn plan(bytes: u64, options: &FormatOptions) -> Result<(), OpenError> {
    let FormatOptions {
        shards,
        expected_block_bytes,
        created_unix,
        uuid,
        secret,
    } = options.clone();
    Superblock::plan(
        bytes,
        shards,
        expected_block_bytes,
        uuid,
        secret,
        created_unix,
    )?;
    Ok(())
}

/// Maps memory.
pub(crate) fn arena(bytes: usize) -> Result<Arena, StorageError> {
    Arena::new(bytes).map_err(|source| StorageError::Memory { bytes, source })
}
