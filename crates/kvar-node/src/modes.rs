//! The modes of a node's namespaces: how much engines use the store, as its operator wants.
//!
//! ```text
//!   settings   mode = "load"                    what holds where nobody has switched
//!   table      <data>.modes, JSON               what was switched: for all, and by name
//!   memory     a byte a namespace               what holds, for every thread to read
//!   link       Welcome's tail, then Switch      what clients are told (docs/internals/modes.md)
//!
//!   kvar mode ── POST /v1/modes ──> table on disk ──> bytes ──> mail to all threads ──> Switch on each link
//! ```
//!
//! What holds for a namespace is the first of: what was switched for it by name, what was switched for
//! all, the settings.
//!
//! What must always be true: a switch is on disk before anybody hears of it, so that a restart brings
//! back what clients were told last; the data plane reads bytes and waits for nobody.
//!
//! What is absent: obedience. A node answers every call in every mode: engines have connectors that
//! obey, operators have tools that need not, and clients of before there were modes go on as ever.

use crate::json_table::{self, ReadFailed};
use crate::namespaces::Namespaces;
use kvar_base::{Mode, ModeCell};
use kvar_engine::{TENANTS, Tenant};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Version of the table's form.
const FORMAT: u32 = 1;

/// Why the modes cannot be read, or a switch not be made.
#[derive(Debug, thiserror::Error)]
pub enum ModeError {
    /// The table cannot be used.
    #[error(
        "mode table {} is damaged: {reason}; move it away to begin with the mode of the settings, \
         and switch anew (kvar mode)", path.display()
    )]
    Table {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// The system refused.
    #[error("mode table {}: {source}; nothing was switched", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its words.
        source: std::io::Error,
    },
    /// Nobody of that name.
    #[error("no namespace {name:?} on this node; there are {}", names.join(", "))]
    Namespace {
        /// The name.
        name: String,
        /// All there are.
        names: Vec<String>,
    },
}

/// Who said that a mode holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SetBy {
    /// The node's settings.
    Settings,
    /// A switch for all namespaces.
    All,
    /// A switch for this one.
    Name,
}

/// What holds for one namespace, or for all that have nothing of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModeReport {
    /// Which; none: all.
    pub namespace: Option<String>,
    /// What holds.
    pub mode: Mode,
    /// Who said so.
    pub set_by: SetBy,
}

/// What is on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    format: u32,
    /// Switched for all; none: the settings say.
    all: Option<Mode>,
    namespaces: Vec<Row>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: String,
    mode: Mode,
}

/// See the module.
pub(crate) struct Modes {
    path: PathBuf,
    settings: Mode,
    namespaces: Arc<Namespaces>,
    table: Mutex<Table>,
    /// What holds, by the namespace's number.
    cells: [ModeCell; TENANTS],
}

impl Table {
    fn read(path: &Path) -> Result<Self, ModeError> {
        let damaged = |reason: String| ModeError::Table {
            path: path.into(),
            reason,
        };
        let table: Self = match json_table::read(path) {
            Ok(Some(table)) => table,
            Ok(None) => {
                return Ok(Self {
                    format: FORMAT,
                    ..Self::default()
                });
            }
            Err(ReadFailed::Damaged(reason)) => return Err(damaged(reason)),
            Err(ReadFailed::Io(source)) => {
                return Err(ModeError::Io {
                    path: path.into(),
                    source,
                });
            }
        };
        if table.format != FORMAT {
            let reason = format!("it has form {}, this program knows {FORMAT}", table.format);
            return Err(damaged(reason));
        }
        for (at, row) in table.namespaces.iter().enumerate() {
            let others = &table.namespaces[..at];
            if others.iter().any(|other| other.name == row.name) {
                return Err(damaged(format!("{:?} stands in it twice", row.name)));
            }
        }
        Ok(table)
    }

    fn write(&self, path: &Path) -> Result<(), ModeError> {
        json_table::write(path, self).map_err(|source| ModeError::Io {
            path: path.into(),
            source,
        })
    }

    /// With one thing switched; `None` forgets what was.
    fn with(&self, namespace: Option<&str>, mode: Option<Mode>) -> Self {
        let mut table = self.clone();
        let Some(name) = namespace else {
            table.all = mode;
            return table;
        };
        table.namespaces.retain(|row| row.name != name);
        if let Some(mode) = mode {
            let name = name.to_owned();
            table.namespaces.push(Row { name, mode });
            table.namespaces.sort_by(|a, b| a.name.cmp(&b.name));
        }
        table
    }

    /// What holds for one, or for all that have nothing of their own.
    fn holds(&self, namespace: Option<&str>, settings: Mode) -> (Mode, SetBy) {
        let own = self
            .namespaces
            .iter()
            .find(|row| Some(row.name.as_str()) == namespace);
        match (own, self.all) {
            (Some(row), _) => (row.mode, SetBy::Name),
            (None, Some(mode)) => (mode, SetBy::All),
            (None, None) => (settings, SetBy::Settings),
        }
    }
}

impl Modes {
    /// Reads the table at `path`. `settings` is what holds where nobody has switched.
    ///
    /// # Errors
    /// A table that makes no sense: guessing could switch a fleet on that somebody switched off.
    pub(crate) fn open(
        path: PathBuf,
        settings: Mode,
        namespaces: Arc<Namespaces>,
    ) -> Result<Self, ModeError> {
        let table = Table::read(&path)?;
        let modes = Self {
            path,
            settings,
            namespaces,
            cells: std::array::from_fn(|_| ModeCell::new(settings)),
            table: Mutex::new(Table::default()),
        };
        modes.take(&table);
        *modes.table.lock().unwrap_or_else(PoisonError::into_inner) = table;
        Ok(modes)
    }

    /// Whose modes these are.
    pub(crate) fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    /// What holds for a namespace now.
    pub(crate) fn of(&self, tenant: Tenant) -> Mode {
        self.cells[tenant.index()].get()
    }

    fn take(&self, table: &Table) {
        for namespace in self.namespaces.iter() {
            let (mode, _) = table.holds(Some(&namespace.name), self.settings);
            self.cells[namespace.tenant.index()].set(mode);
        }
    }

    /// Switches one namespace, or all that have nothing of their own; `None` forgets what was
    /// switched. Whoever calls tells the threads.
    ///
    /// # Errors
    /// No such namespace, or the table cannot be written: nothing has changed then.
    pub(crate) fn switch(
        &self,
        namespace: Option<&str>,
        mode: Option<Mode>,
    ) -> Result<(), ModeError> {
        if let Some(name) = namespace
            && self.namespaces.iter().all(|known| known.name != name)
        {
            return Err(ModeError::Namespace {
                name: name.to_owned(),
                names: self.namespaces.iter().map(|it| it.name.clone()).collect(),
            });
        }
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let next = table.with(namespace, mode);
        if next != *table {
            next.write(&self.path)?;
        }
        self.take(&next);
        *table = next;
        Ok(())
    }

    /// What holds: for all, then for each namespace.
    pub(crate) fn report(&self) -> Vec<ModeReport> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let names = self.namespaces.iter().map(|it| Some(it.name.clone()));
        std::iter::once(None)
            .chain(names)
            .map(|namespace| {
                let (mode, set_by) = table.holds(namespace.as_deref(), self.settings);
                ModeReport {
                    namespace,
                    mode,
                    set_by,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::key_file::KeyFile;
    use kvar_base::DeviceUuid;

    fn modes(dir: &Path, settings: Mode) -> Result<Modes, ModeError> {
        let mut config = Config {
            key_file: Some(dir.join("data.key")),
            ..Config::default()
        };
        config.set("namespace", "team-a").unwrap();
        let store = KeyFile::generate(DeviceUuid::new([7; 16]));
        let namespaces = Arc::new(Namespaces::open(&config, &store).unwrap());
        Modes::open(dir.join("data.modes"), settings, namespaces)
    }

    fn held(modes: &Modes) -> Vec<(Mode, SetBy)> {
        let report = modes.report().into_iter();
        report.map(|it| (it.mode, it.set_by)).collect()
    }

    #[test]
    fn a_name_comes_before_all_and_all_before_the_settings_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let now = modes(dir.path(), Mode::Save).unwrap();
        let team = Tenant::new(1).unwrap();
        assert_eq!(held(&now), [(Mode::Save, SetBy::Settings); 3]);
        assert!(!dir.path().join("data.modes").exists());

        now.switch(None, Some(Mode::Observe)).unwrap();
        now.switch(Some("team-a"), Some(Mode::Off)).unwrap();
        let expected = [
            (Mode::Observe, SetBy::All),
            (Mode::Observe, SetBy::All),
            (Mode::Off, SetBy::Name),
        ];
        for modes in [&now, &modes(dir.path(), Mode::Load).unwrap()] {
            assert_eq!(held(modes), expected);
            assert_eq!(modes.of(Tenant::DEFAULT), Mode::Observe);
            assert_eq!(modes.of(team), Mode::Off);
        }

        now.switch(Some("team-a"), None).unwrap();
        assert_eq!(now.of(team), Mode::Observe);
        now.switch(None, None).unwrap();
        assert_eq!(held(&now), [(Mode::Save, SetBy::Settings); 3]);
        assert_eq!(now.of(team), Mode::Save);
    }

    #[test]
    fn a_name_that_is_not_there_is_said_and_switches_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let modes = modes(dir.path(), Mode::Load).unwrap();
        let error = modes.switch(Some("team-b"), Some(Mode::Off)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no namespace \"team-b\" on this node; there are default, team-a"
        );
        assert_eq!(held(&modes), [(Mode::Load, SetBy::Settings); 3]);
    }

    #[test]
    fn a_table_that_makes_no_sense_says_why() {
        let dir = tempfile::tempdir().unwrap();
        for (text, part) in [
            ("{", "damaged"),
            ("{\"format\":2,\"all\":null,\"namespaces\":[]}", "form 2"),
            ("{\"format\":1,\"all\":\"of\",\"namespaces\":[]}", "of"),
            (
                "{\"format\":1,\"all\":null,\"namespaces\":[{\"name\":\"a\",\"mode\":\"off\"},\
                 {\"name\":\"a\",\"mode\":\"load\"}]}",
                "twice",
            ),
        ] {
            std::fs::write(dir.path().join("data.modes"), text).unwrap();
            let error = modes(dir.path(), Mode::Load).err().unwrap().to_string();
            assert!(
                error.contains(part) && error.contains("data.modes"),
                "{error}"
            );
        }
    }
}
