//! The device table: which devices belong to this store.
//!
//! ```text
//!   <key file with .devices for .key>, JSON, written whole and renamed into place:
//!     { "format": 1,
//!       "devices": [ { "uuid", "slot", "path", "bytes", "state": "in" | "retired", "stale",
//!                     "leaving", "tier": "fast" | "big" } ] }
//! ```
//!
//! | field | meaning |
//! |---|---|
//! | uuid | the device, wherever it is plugged in |
//! | slot | its place in the routes; a replacement takes it over; none once retired |
//! | path | where it was last seen |
//! | bytes | its weight in the routes, also while it is away |
//! | stale | blocks were removed while it was away: it is emptied before it serves again |
//! | leaving | its blocks move to the others, then it is retired; goes on after a restart |
//! | tier | what it is for; not there: fast |
//!
//! What must always be true: the table is on disk before what it allows happens: before a device is
//! formatted, and `stale` before the remove is acknowledged. A store of one device needs no table:
//! the key file names the device.
//!
//! What is absent: whether a device is there right now; that is seen, not stored.

use crate::config::DeviceTier;
use crate::json_table::{self, Failed, Table as _};
use kvar_base::DeviceUuid;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Most devices of a node, retired ones included: routes number them with a byte.
pub(crate) const DEVICES_MAX: usize = 255;

/// What the store wants of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DeviceState {
    /// To be used.
    In,
    /// Taken out of service for good; not opened even if it is there.
    Retired,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    pub(crate) uuid: DeviceUuidText,
    pub(crate) slot: Option<u32>,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) state: DeviceState,
    pub(crate) stale: bool,
    #[serde(default, skip_serializing_if = "is_not")]
    pub(crate) leaving: bool,
    #[serde(default, skip_serializing_if = "DeviceTier::is_fast")]
    pub(crate) tier: DeviceTier,
}

/// Written only where it is so: a table without it can be read by older programs.
#[allow(clippy::trivially_copy_pass_by_ref)] // serde asks for this signature.
fn is_not(flag: &bool) -> bool {
    !*flag
}

/// A uuid that is written as people read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct DeviceUuidText(pub(crate) DeviceUuid);

impl TryFrom<String> for DeviceUuidText {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
            .map(Self)
            .map_err(|error: kvar_base::NamespaceKeyError| error.to_string())
    }
}

impl From<DeviceUuidText> for String {
    fn from(uuid: DeviceUuidText) -> Self {
        uuid.0.to_string()
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeviceTable {
    format: u32,
    pub(crate) devices: Vec<Entry>,
}

/// Why the table cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// Not what a table looks like.
    #[error(
        "device table {} is damaged: {reason}; restore it from a backup (without it nobody knows \
         which devices belong to this store)", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// The system refused.
    #[error("device table {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its words.
        source: std::io::Error,
    },
}

impl Default for DeviceTable {
    fn default() -> Self {
        Self {
            format: Self::FORMAT,
            devices: Vec::new(),
        }
    }
}

impl json_table::Table for DeviceTable {
    const FORMAT: u32 = 1;

    fn format(&self) -> u32 {
        self.format
    }

    fn check(&self) -> Result<(), String> {
        if self.devices.len() > DEVICES_MAX {
            return Err(format!("it has more than {DEVICES_MAX} devices"));
        }
        for (at, entry) in self.devices.iter().enumerate() {
            let others = &self.devices[..at];
            if others.iter().any(|other| other.uuid == entry.uuid) {
                return Err(format!("device {} stands in it twice", entry.uuid.0));
            }
            if entry.slot.is_some() != (entry.state == DeviceState::In) {
                return Err(format!("device {} has a wrong slot", entry.uuid.0));
            }
            if entry.slot.is_some() && others.iter().any(|other| other.slot == entry.slot) {
                return Err(format!("two devices have the slot of {}", entry.uuid.0));
            }
            if entry.bytes == 0 {
                return Err(format!("device {} has no size", entry.uuid.0));
            }
        }
        Ok(())
    }

    type Error = TableError;

    fn failed(path: &Path, why: Failed) -> TableError {
        let path = path.into();
        match why {
            Failed::Damaged(reason) => TableError::Damaged { path, reason },
            Failed::Io(source) => TableError::Io { path, source },
        }
    }
}

impl DeviceTable {
    /// Reads the table; `None` when there is none.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>, TableError> {
        json_table::read(path)
    }

    /// Writes the table so that a power cut leaves the old or the new one.
    pub(crate) fn write(&self, path: &Path) -> Result<(), TableError> {
        json_table::write(path, self)
    }

    /// The entry of a device.
    pub(crate) fn find(&self, uuid: DeviceUuid) -> Option<&Entry> {
        self.devices.iter().find(|entry| entry.uuid.0 == uuid)
    }

    /// As [`find`](Self::find), to change it.
    pub(crate) fn find_mut(&mut self, uuid: DeviceUuid) -> Option<&mut Entry> {
        self.devices.iter_mut().find(|entry| entry.uuid.0 == uuid)
    }

    /// Devices in use, whether they are there or not.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = &Entry> {
        self.devices
            .iter()
            .filter(|entry| entry.state == DeviceState::In)
    }

    /// The lowest slot that nobody has.
    pub(crate) fn free_slot(&self) -> u32 {
        (0..)
            .find(|slot| self.devices.iter().all(|entry| entry.slot != Some(*slot)))
            .unwrap_or(0)
    }

    /// A device comes in at a free slot.
    pub(crate) fn enter(
        &mut self,
        uuid: DeviceUuid,
        path: &Path,
        bytes: u64,
        tier: Option<DeviceTier>,
    ) -> u32 {
        let slot = self.free_slot();
        self.devices.push(Entry {
            uuid: DeviceUuidText(uuid),
            slot: Some(slot),
            path: path.into(),
            bytes,
            state: DeviceState::In,
            stale: false,
            leaving: false,
            tier: tier.unwrap_or_default(),
        });
        slot
    }

    /// A device leaves for good; should it ever come back, it comes back empty.
    pub(crate) fn retire(&mut self, uuid: DeviceUuid) -> Option<u32> {
        let entry = self.find_mut(uuid)?;
        entry.state = DeviceState::Retired;
        entry.stale = true;
        entry.leaving = false;
        entry.slot.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uuid(number: u8) -> DeviceUuid {
        DeviceUuid::new([number; 16])
    }

    #[test]
    fn a_table_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.devices");
        assert_eq!(DeviceTable::read(&path).unwrap(), None);
        let mut table = DeviceTable::default();
        for number in 1..=3 {
            table.enter(uuid(number), Path::new("/a/b"), 100, None);
        }
        assert_eq!(table.retire(uuid(2)), Some(1));
        table.enter(uuid(4), Path::new("/c"), 100, Some(DeviceTier::Big));
        assert_eq!(
            table.find(uuid(4)).unwrap().slot,
            Some(1),
            "a free slot is used again"
        );
        assert_eq!(table.in_use().count(), 3);
        table.write(&path).unwrap();
        assert_eq!(DeviceTable::read(&path).unwrap().unwrap(), table);
    }

    #[test]
    fn a_table_of_before_there_were_tiers_is_one_of_fast_devices() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.devices");
        let text = format!(
            "{{\"format\":1,\"devices\":[{{\"uuid\":\"{}\",\"slot\":0,\"path\":\"/x\",\"bytes\":5,\
             \"state\":\"in\",\"stale\":false}}]}}",
            uuid(1)
        );
        std::fs::write(&path, text).unwrap();
        let table = DeviceTable::read(&path).unwrap().unwrap();
        assert_eq!(table.devices[0].tier, DeviceTier::Fast);
        // And a table of fast devices is one that older programs read.
        table.write(&path).unwrap();
        assert!(!std::fs::read_to_string(&path).unwrap().contains("tier"));
    }

    #[test]
    fn a_table_that_makes_no_sense_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.devices");
        let check = |text: &str, part: &str| {
            std::fs::write(&path, text).unwrap();
            let error = DeviceTable::read(&path).unwrap_err().to_string();
            assert!(
                error.contains(part) && error.contains("data.devices"),
                "{error}"
            );
        };
        let entry = |uuid: u8, slot: &str, state: &str| {
            format!(
                "{{\"uuid\":\"{}\",\"slot\":{slot},\"path\":\"/x\",\"bytes\":5,\
                 \"state\":\"{state}\",\"stale\":false}}",
                DeviceUuid::new([uuid; 16])
            )
        };
        let table =
            |entries: &[String]| format!("{{\"format\":1,\"devices\":[{}]}}", entries.join(","));
        check("{", "damaged");
        check("{\"format\":2,\"devices\":[]}", "form 2");
        check(&table(&[entry(1, "0", "in"), entry(1, "1", "in")]), "twice");
        check(
            &table(&[entry(1, "0", "in"), entry(2, "0", "in")]),
            "two devices",
        );
        check(&table(&[entry(1, "null", "in")]), "wrong slot");
        check(&table(&[entry(1, "0", "retired")]), "wrong slot");
        check(
            &table(&[entry(1, "0", "in").replace(":5", ":0")]),
            "no size",
        );
        check(
            &table(&[entry(1, "0", "in").replace("0101", "01zz")]),
            "digit",
        );
    }
}
