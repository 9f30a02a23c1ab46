//! Putting a store of several devices together at start.
//!
//! ```text
//!   paths of the settings, then paths of the table that the settings do not name
//!     there, known ─────────> online          retired ─────────> left alone, with a note
//!     there, unknown ───────> error           blank, of a known path ──> made again, empty
//!     not there, known ─────> missing         blank, new ──> a new device of the store
//!     not there, new ───────> a new file
//! ```
//!
//! A device is known by its uuid, wherever it is found: a drive that was plugged in elsewhere, and
//! is named there, is the same device.
//!
//! What must always be true: nothing is formatted before key file and device table that name it are
//! on disk; a path of a known device that is not there is never made anew, because an unmounted
//! disk would fill its mount point.
//!
//! What is absent: what happens when a device goes or comes later (`devices`).

use crate::config::{Config, DataPath, MissingDevice};
use crate::devices::{DeviceState, DeviceTable, Entry};
use crate::key_file::{KeyFile, KeyFileError};
use crate::storage::{
    AwayDevice, Found, OpenDevice, Storage, StorageError, check_shards, look, make, plan,
};
use kvar_base::{Clock as _, DeviceUuid, SystemClock};
use kvar_engine::{FormatOptions, Superblock};
use kvar_io::{Target, TargetError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the paths turned out to hold.
#[derive(Default)]
struct Seen {
    devices: Vec<(PathBuf, Target, Superblock)>,
    blank: Vec<(PathBuf, Target)>,
    /// Paths of known devices that could not be opened, and why.
    away: Vec<(PathBuf, String)>,
    /// Paths of retired devices.
    retired: Vec<PathBuf>,
}

/// Opens every device that is there, and makes new ones.
pub(crate) fn open(
    config: &Config,
    table: Option<DeviceTable>,
    clock: &SystemClock,
) -> Result<Storage, StorageError> {
    let had_table = table.is_some();
    let mut table = table.unwrap_or_default();
    let before = table.clone();
    let key_path = config.key_path();
    let found_key = match KeyFile::read(&key_path) {
        Ok(key_file) => Some(key_file),
        Err(KeyFileError::Missing { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let mut notes = Vec::new();
    let Seen {
        devices,
        blank,
        mut away,
        retired,
    } = look_at_all(config, &table)?;
    for path in retired {
        notes.push(format!(
            "{} was a device that is retired: what is there is left alone; take it out of the \
             settings, or take it in with kvar device add",
            path.display()
        ));
    }
    let key_file = match found_key {
        Some(key_file) => key_file,
        None if had_table || !devices.is_empty() => {
            let data = devices.first().map(|(path, ..)| path.clone());
            return Err(StorageError::KeyMissing {
                data: data.unwrap_or_else(|| config.table_path()),
                key: key_path,
            });
        }
        None => KeyFile::generate(DeviceUuid::random()),
    };

    let mut online: Vec<OpenDevice> = Vec::new();
    for (path, target, superblock) in devices {
        let uuid = superblock.uuid;
        if let Some(other) = online.iter().find(|it| it.superblock.uuid == uuid) {
            return Err(StorageError::Twice {
                path,
                other: other.path.clone(),
                uuid,
            });
        }
        let tier = config.tier_of(&path);
        match table.find_mut(uuid) {
            Some(entry) if entry.state == DeviceState::Retired => {
                notes.push(format!(
                    "{} is device {uuid}, which was retired: it is left alone; take it out of the \
                     settings, or take it back with kvar device add",
                    path.display()
                ));
                continue;
            }
            Some(entry) => {
                entry.path.clone_from(&path);
                entry.bytes = superblock.device_bytes;
                if let Some(tier) = tier.filter(|tier| *tier != entry.tier) {
                    notes.push(format!(
                        "{} was {} and is {tier} from now on, as the settings say",
                        path.display(),
                        entry.tier
                    ));
                    entry.tier = tier;
                }
            }
            // The device that the key was made with, of a store that had no table yet.
            None if uuid == key_file.uuid => {
                table.enter(uuid, &path, superblock.device_bytes, tier);
            }
            None if config.data.iter().any(|data| data.path == path) => {
                return Err(StorageError::Unknown { path, uuid });
            }
            // Where a device of ours was seen last, and no setting names it.
            None => {
                away.push((
                    path,
                    format!("its path holds device {uuid}, not of this store"),
                ));
                continue;
            }
        }
        check_shards(config, &path, &superblock)?;
        online.push(OpenDevice {
            path,
            target: Arc::new(target),
            superblock: Arc::new(superblock),
        });
    }

    // New devices get as many shards as the others have.
    let shards = online.iter().map(|device| device.superblock.shards).max();
    let shards = shards.unwrap_or_else(|| config.shards_of_new_device().get());
    let mut to_make = Vec::new();
    for (path, target) in blank {
        let mut options =
            FormatOptions::random(shards, config.expected_block_bytes.0, clock.unix_seconds());
        plan(target.bytes(), &options).map_err(|source| StorageError::Device {
            path: path.clone(),
            source,
        })?;
        let is_there = |entry: &Entry| {
            online
                .iter()
                .any(|it: &OpenDevice| it.superblock.uuid == entry.uuid.0)
        };
        let known = table
            .in_use()
            .find(|entry| entry.path == path && !is_there(entry));
        match known {
            Some(entry) => {
                notes.push(format!(
                    "{} is blank and was device {}: it begins empty in the same place",
                    path.display(),
                    entry.uuid.0
                ));
                options.uuid = entry.uuid.0;
            }
            None => {
                // The first device of a store has the name in the key file.
                if table.devices.is_empty() {
                    options.uuid = key_file.uuid;
                }
                table.enter(options.uuid, &path, target.bytes(), config.tier_of(&path));
            }
        }
        to_make.push((path, target, options));
    }

    let is_open = |uuid: DeviceUuid| {
        online.iter().any(|device| device.superblock.uuid == uuid)
            || to_make.iter().any(|(.., options)| options.uuid == uuid)
    };
    let missing: Vec<AwayDevice> = table
        .in_use()
        .filter(|entry| !is_open(entry.uuid.0))
        .map(|entry| {
            let why = away.iter().find(|(path, _)| *path == entry.path);
            let why = why.map_or_else(|| "is not there".to_owned(), |(_, why)| why.clone());
            AwayDevice {
                uuid: entry.uuid.0,
                reason: why,
            }
        })
        .collect();
    check_missing(config, &table, &missing, online.len() + to_make.len())?;
    for device in &missing {
        notes.push(format!(
            "STARTING WITHOUT device {}: {}; its blocks are misses until it is back (kvar device \
             list)",
            device.uuid, device.reason
        ));
    }

    if !key_path.exists() {
        key_file.create(&key_path)?;
    }
    if !had_table || table != before {
        table.write(&config.table_path())?;
    }
    for (path, target, options) in to_make {
        let superblock = make(&target, &options, config.io_engine)?;
        online.push(OpenDevice {
            path,
            target: Arc::new(target),
            superblock: Arc::new(superblock),
        });
    }
    for device in &online {
        notes.extend(device.target.notes());
    }
    Ok(Storage {
        devices: online,
        away: missing,
        table,
        key_file,
        notes,
    })
}

/// Opens every path there is to look at.
fn look_at_all(config: &Config, table: &DeviceTable) -> Result<Seen, StorageError> {
    let mut seen = Seen::default();
    let from_table = table.in_use().map(|entry| DataPath {
        path: entry.path.clone(),
        size: None,
        tier: None,
    });
    let configured = |path: &Path| config.data.iter().any(|data| data.path == path);
    let others = from_table.filter(|data| !configured(&data.path));
    for (data, is_configured) in config
        .data
        .iter()
        .cloned()
        .map(|data| (data, true))
        .chain(others.map(|data| (data, false)))
    {
        let known = table.in_use().any(|entry| entry.path == data.path);
        let was_here = |entry: &Entry| entry.path == data.path;
        if !known && table.devices.iter().any(was_here) {
            // Only a device that is in use again may lie there; the size asked for was the old one's.
            match look(&data.path, None, false, config.io_engine) {
                Ok(Found::Device(target, superblock))
                    if table.in_use().any(|entry| entry.uuid.0 == superblock.uuid) =>
                {
                    seen.devices.push((data.path, target, superblock));
                }
                _ => seen.retired.push(data.path),
            }
            continue;
        }
        // The size of a device that was added by hand is its own.
        let size = data.size.or(config.size.filter(|_| is_configured));
        let size = size.map(|size| size.0);
        if !known && !data.path.exists() {
            // A size that cannot be divided must not leave a file behind.
            let shards = config.shards_of_new_device().get();
            let options = FormatOptions::random(shards, config.expected_block_bytes.0, 0);
            if let Some(bytes) = size {
                plan(bytes, &options).map_err(|source| StorageError::Device {
                    path: data.path.clone(),
                    source,
                })?;
            }
        }
        match look(&data.path, size, !known, config.io_engine) {
            Ok(Found::Device(target, superblock)) => {
                seen.devices.push((data.path, target, superblock));
            }
            Ok(Found::Blank(target)) => seen.blank.push((data.path, target)),
            // These are the operator's to mend; going on without the device would hide them.
            Err(
                error @ StorageError::Target(
                    TargetError::InUse { .. } | TargetError::SizeDiffers { .. },
                ),
            ) => return Err(error),
            Err(error) if known => seen.away.push((data.path, error.to_string())),
            Err(error) => return Err(error),
        }
    }
    Ok(seen)
}

fn check_missing(
    config: &Config,
    table: &DeviceTable,
    missing: &[AwayDevice],
    there: usize,
) -> Result<(), StorageError> {
    let named: Vec<String> = missing
        .iter()
        .map(|device| {
            let path = table
                .find(device.uuid)
                .map(|entry| entry.path.display().to_string());
            format!(
                "{} ({}: {})",
                path.unwrap_or_default(),
                device.uuid,
                device.reason
            )
        })
        .collect();
    if there == 0 {
        return Err(StorageError::NoneThere { missing: named });
    }
    if !named.is_empty() && config.missing_device == MissingDevice::Refuse {
        return Err(StorageError::Missing {
            missing: named,
            all: table.in_use().count(),
        });
    }
    Ok(())
}
