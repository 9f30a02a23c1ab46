//! Whether a device may come into a running node, and under which name.
//!
//! | what lies at the path | `add` | `replace` |
//! |---|---|---|
//! | nothing | a new file of `size` | the same |
//! | blank | a new device | a new device |
//! | a device of this store that is away | is back, with its blocks unless some were removed | refused |
//! | a device that was retired | is back, and begins empty | refused |
//! | another store's device | only with `erase`, as a new one | the same |
//! | something else | refused | refused |
//!
//! What must always be true: the table names a device before it is formatted, and is as it was when
//! the device is refused.

use super::keeper::NewDevice;
use super::table::{DEVICES_MAX, DeviceState, DeviceTable, Entry};
use crate::config::Config;
use crate::storage::{Found, OpenDevice, look, make, plan};
use kvar_base::{ByteSize, DeviceUuid};
use kvar_engine::{FormatOptions, Superblock};
use kvar_io::Target;
use std::path::PathBuf;
use std::sync::Arc;

/// What must hold.
pub(super) struct Rules<'a> {
    pub(super) config: &'a Config,
    /// Paths of the devices that are open.
    pub(super) open: &'a [PathBuf],
    /// Shards of a new device.
    pub(super) shards: u32,
    /// Largest block that clients were told they may put.
    pub(super) block_bytes_max: u64,
    pub(super) created_unix: u64,
    /// A device that takes another's place has no blocks of its own.
    pub(super) must_be_new: bool,
}

/// A device that may come in; the table says so on disk.
pub(super) struct Admitted {
    pub(super) device: OpenDevice,
    /// Whether it was here before.
    pub(super) is_back: bool,
}

/// See the module.
pub(super) fn admit(
    new: &NewDevice,
    rules: &Rules<'_>,
    table: &mut DeviceTable,
) -> Result<Admitted, String> {
    let path = &new.path;
    let same = |other: &PathBuf| {
        other == path
            || other
                .canonicalize()
                .ok()
                .is_some_and(|it| Some(it) == path.canonicalize().ok())
    };
    if rules.open.iter().any(same) {
        return Err(format!("{} is in service already", path.display()));
    }
    if table.devices.len() >= DEVICES_MAX {
        return Err(format!(
            "the store has {DEVICES_MAX} devices, retired ones included, and can have no more"
        ));
    }
    let mut options = FormatOptions::random(
        rules.shards,
        rules.config.expected_block_bytes.0,
        rules.created_unix,
    );
    if let (Some(bytes), false) = (new.size, path.exists()) {
        // A size that cannot be used must not leave a file behind.
        check_new(bytes, &options, rules)?;
    }
    let found = look(path, new.size, true, rules.config.io_engine);
    let found = found.map_err(|error| error.to_string())?;
    let before = table.clone();
    let admitted = match found {
        Found::Device(target, superblock) => {
            let known = table.find(superblock.uuid).cloned();
            match known {
                Some(_) if rules.must_be_new => Err(format!(
                    "{} is device {} of this store: a replacement is a new device; add this one \
                     instead, or erase it first",
                    path.display(),
                    superblock.uuid
                )),
                Some(known) => back(&known, target, superblock, new, rules, table),
                None if new.erase => {
                    options.uuid = DeviceUuid::random();
                    fresh(target, &options, new, rules, table)
                }
                None => Err(format!(
                    "{} is device {} of another store: add it with --erase if nobody needs what is \
                     on it",
                    path.display(),
                    superblock.uuid
                )),
            }
        }
        Found::Blank(target) => fresh(target, &options, new, rules, table),
    };
    if admitted.is_err() {
        *table = before;
        // What was written meanwhile is taken back, too; if that fails the next start finds a blank
        // device of the store and makes it.
        let _ = table.write(&rules.config.table_path());
    }
    admitted
}

fn check_new(bytes: u64, options: &FormatOptions, rules: &Rules<'_>) -> Result<(), String> {
    let superblock = plan(bytes, options).map_err(|error| error.to_string())?;
    check_blocks(&superblock, rules)
}

fn check_blocks(superblock: &Superblock, rules: &Rules<'_>) -> Result<(), String> {
    if superblock.block_bytes_max() < rules.block_bytes_max {
        return Err(format!(
            "its largest block would be {}, and clients were told {}: give a larger device, or \
             restart the node with it among its data",
            ByteSize(superblock.block_bytes_max()),
            ByteSize(rules.block_bytes_max)
        ));
    }
    Ok(())
}

/// A new device: named on disk, then made.
fn fresh(
    target: Target,
    options: &FormatOptions,
    new: &NewDevice,
    rules: &Rules<'_>,
    table: &mut DeviceTable,
) -> Result<Admitted, String> {
    check_new(target.bytes(), options, rules)?;
    table.enter(options.uuid, &new.path, target.bytes(), new.tier);
    save(table, rules)?;
    let superblock = make(&target, options, rules.config.io_engine);
    let superblock = superblock.map_err(|error| error.to_string())?;
    Ok(Admitted {
        device: OpenDevice {
            path: new.path.clone(),
            target: Arc::new(target),
            superblock: Arc::new(superblock),
        },
        is_back: false,
    })
}

/// A device that was here before.
fn back(
    known: &Entry,
    target: Target,
    superblock: Superblock,
    new: &NewDevice,
    rules: &Rules<'_>,
    table: &mut DeviceTable,
) -> Result<Admitted, String> {
    check_blocks(&superblock, rules)?;
    let slot = known.slot.unwrap_or_else(|| table.free_slot());
    if let Some(entry) = table.find_mut(known.uuid.0) {
        entry.state = DeviceState::In;
        entry.slot = Some(slot);
        entry.path.clone_from(&new.path);
        entry.tier = new.tier.unwrap_or(entry.tier);
    }
    save(table, rules)?;
    Ok(Admitted {
        device: OpenDevice {
            path: new.path.clone(),
            target: Arc::new(target),
            superblock: Arc::new(superblock),
        },
        is_back: true,
    })
}

fn save(table: &DeviceTable, rules: &Rules<'_>) -> Result<(), String> {
    table
        .write(&rules.config.table_path())
        .map_err(|error| error.to_string())
}
