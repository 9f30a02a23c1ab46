//! The namespaces of a node: names, keys, numbers and shares.
//!
//! ```text
//!   settings   [[namespace]] name = "team-a" share = 2        who may be here, and how much is theirs
//!   key file   <data>.team-a.key, mode 0600                   made at the first start with that name
//!   table      <data>.namespaces, JSON                        name -> number, for ever
//!   devices    a number a block                               what the engines know
//! ```
//!
//! | name is | in the table | not in the table |
//! |---|---|---|
//! | in the settings, key there | its number | the key's number, if nobody has it; else the next |
//! | in the settings, no key | refused: restore the key | a new key, the next number |
//! | not in the settings | no share: what is left of it leaves first; nobody can connect to it | |
//!
//! What must always be true: a number is never another name's, also when the name is gone, since blocks
//! of it may lie on a device that is away; a key is on disk before its number is in the table, and both
//! before anybody is served; a name that is not in the settings gives nobody a link.
//!
//! What is absent: ids and proofs (clients make them with the key), and what a share is worth (the
//! engines, by kvar-policy).

use crate::config::Config;
use crate::json_table::{self, Failed, Table as _};
use crate::key_file::{KeyFile, KeyFileError, KeyName};
use kvar_base::{DeviceUuid, NamespaceKey};
use kvar_engine::{Shares, TENANTS, Tenant};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Name of the namespace that is there from the first start.
pub(crate) const DEFAULT: &str = "default";

/// Why the namespaces of the settings cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A key file.
    #[error("namespace {name:?}: {source}")]
    Key {
        /// Whose.
        name: String,
        /// Why.
        source: KeyFileError,
    },
    /// Blocks without their key.
    #[error(
        "namespace {name:?} was here before and its key file {} is missing: restore it (without it the \
         stored blocks cannot be named), or give the namespace another name to begin anew",
        path.display()
    )]
    KeyMissing {
        /// Whose.
        name: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The key of something else.
    #[error(
        "key file {} is not that of namespace {name:?} of this store: it is of {found}; name the right \
         one with key_file, or take that name out of the settings", path.display()
    )]
    OtherKey {
        /// Whose it should be.
        name: String,
        /// The key file.
        path: PathBuf,
        /// Whose it is.
        found: String,
    },
    /// No number is left.
    #[error(
        "namespace {name:?} would be the {TENANTS}th of this store, and a number is never used again: \
         take one of the names there were: {}", names.join(", ")
    )]
    TooMany {
        /// The new one.
        name: String,
        /// All there were.
        names: Vec<String>,
    },
    /// The table cannot be used.
    #[error(
        "namespace table {} is damaged: {reason}; restore it from a backup, or move it away if every \
         namespace's key file is still there (the numbers stand in them, too)", path.display()
    )]
    Table {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// The system refused.
    #[error("namespace table {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its words.
        source: std::io::Error,
    },
}

/// One namespace.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    pub(crate) name: String,
    pub(crate) tenant: Tenant,
    /// Its weight; `None`: it is not in the settings any more.
    pub(crate) share: Option<u32>,
    key: Option<NamespaceKey>,
}

/// All there are, and all there were.
#[derive(Clone, Debug)]
pub(crate) struct Namespaces(Vec<Namespace>);

/// What is on disk: numbers by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    format: u32,
    namespaces: Vec<Row>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: String,
    number: u8,
}

impl json_table::Table for Table {
    const FORMAT: u32 = 1;

    fn format(&self) -> u32 {
        self.format
    }

    fn check(&self) -> Result<(), String> {
        for (at, row) in self.namespaces.iter().enumerate() {
            let others = &self.namespaces[..at];
            if others.iter().any(|other| other.name == row.name) {
                return Err(format!("{:?} stands in it twice", row.name));
            }
            if others.iter().any(|other| other.number == row.number) {
                return Err(format!("two names have number {}", row.number));
            }
            if !(1..TENANTS).contains(&usize::from(row.number)) {
                return Err(format!("{:?} has number {}", row.name, row.number));
            }
        }
        Ok(())
    }

    type Error = NamespaceError;

    fn failed(path: &Path, why: Failed) -> NamespaceError {
        let path = path.into();
        match why {
            Failed::Damaged(reason) => NamespaceError::Table { path, reason },
            Failed::Io(source) => NamespaceError::Io { path, source },
        }
    }
}

impl Default for Table {
    fn default() -> Self {
        Self {
            format: Self::FORMAT,
            namespaces: Vec::new(),
        }
    }
}

impl Table {
    fn number_of(&self, name: &str) -> Option<u8> {
        let mut rows = self.namespaces.iter();
        rows.find(|row| row.name == name).map(|row| row.number)
    }

    fn is_free(&self, number: u8) -> bool {
        self.namespaces.iter().all(|row| row.number != number)
    }

    /// A number that no name ever had here.
    fn next(&self, name: &str) -> Result<u8, NamespaceError> {
        let highest = self.namespaces.iter().map(|row| row.number).max();
        let next = highest.unwrap_or(0) + 1;
        let next = (usize::from(next) < TENANTS).then_some(next);
        // Numbers that keys brought with them may have left gaps; no name had these either.
        let next = next.or_else(|| (1..TENANTS as u8).find(|number| self.is_free(*number)));
        next.ok_or_else(|| NamespaceError::TooMany {
            name: name.to_owned(),
            names: self.namespaces.iter().map(|row| row.name.clone()).collect(),
        })
    }
}

impl Namespaces {
    /// Reads, and at a first start makes, what the namespaces of the settings need beside the key of
    /// the default one.
    pub(crate) fn open(config: &Config, store: &KeyFile) -> Result<Self, NamespaceError> {
        let path = config.beside_key("namespaces");
        let mut table = json_table::read::<Table>(&path)?.unwrap_or_default();
        let before = table.clone();
        let mut all = vec![Namespace {
            name: DEFAULT.to_owned(),
            tenant: Tenant::DEFAULT,
            share: Some(1),
            key: Some(store.key.clone()),
        }];
        for wanted in &config.namespaces {
            if wanted.name == DEFAULT {
                all[0].share = Some(wanted.share);
                continue;
            }
            let key_path = wanted.key_path(config);
            let (number, key) = key_of(&mut table, &wanted.name, &key_path, store.uuid)?;
            let tenant = Tenant::new(u32::from(number)).unwrap_or_default();
            all.push(Namespace {
                name: wanted.name.clone(),
                tenant,
                share: Some(wanted.share),
                key: Some(key),
            });
        }
        if table != before {
            json_table::write(&path, &table)?;
        }
        for row in table.namespaces {
            let tenant = Tenant::new(u32::from(row.number)).unwrap_or_default();
            if all.iter().all(|known| known.name != row.name) {
                all.push(Namespace {
                    name: row.name,
                    tenant,
                    share: None,
                    key: None,
                });
            }
        }
        all.sort_by_key(|namespace| namespace.tenant);
        Ok(Self(all))
    }

    /// The tenant and key of a namespace that may be connected to.
    pub(crate) fn find(&self, name: &str) -> Option<(Tenant, NamespaceKey)> {
        let found = self.0.iter().find(|namespace| namespace.name == name)?;
        Some((found.tenant, found.key.clone()?))
    }

    /// What each weighs: who is not in the settings has what the others leave.
    pub(crate) fn shares(&self) -> Shares {
        let mut shares = Shares::none();
        for namespace in &self.0 {
            shares.set(namespace.tenant, namespace.share.unwrap_or(0));
        }
        shares
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Namespace> {
        self.0.iter()
    }
}

/// The number and key of a name, made if it is new.
fn key_of(
    table: &mut Table,
    name: &str,
    path: &Path,
    store: DeviceUuid,
) -> Result<(u8, NamespaceKey), NamespaceError> {
    let known = table.number_of(name);
    let wrong = |source| NamespaceError::Key {
        name: name.to_owned(),
        source,
    };
    let other = |found: String| NamespaceError::OtherKey {
        name: name.to_owned(),
        path: path.into(),
        found,
    };
    let (number, key) = match KeyFile::read(path) {
        Ok(file) if file.uuid != store => return Err(other(format!("store {}", file.uuid))),
        Ok(file) => match file.namespace {
            Some(whose) if whose.name == name => {
                let number = known.unwrap_or(whose.number);
                let is_its_own = known.is_some() || table.is_free(number);
                if whose.number != number || !is_its_own {
                    return Err(other(format!("number {}", whose.number)));
                }
                (number, file.key)
            }
            Some(whose) => return Err(other(format!("namespace {:?}", whose.name))),
            None => return Err(other(format!("namespace {DEFAULT:?}"))),
        },
        Err(KeyFileError::Missing { .. }) if known.is_some() => {
            return Err(NamespaceError::KeyMissing {
                name: name.to_owned(),
                path: path.into(),
            });
        }
        Err(KeyFileError::Missing { .. }) => {
            let number = table.next(name)?;
            let mut file = KeyFile::generate(store);
            file.namespace = Some(KeyName {
                name: name.to_owned(),
                number,
            });
            file.create(path).map_err(wrong)?;
            (number, file.key)
        }
        Err(error) => return Err(wrong(error)),
    };
    if known.is_none() {
        table.namespaces.push(Row {
            name: name.to_owned(),
            number,
        });
    }
    Ok((number, key))
}

#[cfg(test)]
mod tests;
