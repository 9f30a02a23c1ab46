//! A small table in a JSON file beside the key file: read whole, written whole.
//!
//! What must always be true: a power cut leaves the old table or the new one; a file that is there
//! and cannot be read as a table is never taken for none.
//!
//! Left to each table: what its rows mean and which of them fit together.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::Path;

/// What is kept in such a file.
pub(crate) trait Table: Serialize + DeserializeOwned {
    /// The version of its form that this program knows.
    const FORMAT: u32;

    /// The version of its form that it says it has.
    fn format(&self) -> u32;

    /// Whether its rows fit together, or which do not.
    fn check(&self) -> Result<(), String>;

    /// What its reader or writer is told.
    type Error;

    /// The error for this file.
    fn failed(path: &Path, why: Failed) -> Self::Error;
}

/// Why a table cannot be read or written.
#[derive(Debug)]
pub(crate) enum Failed {
    /// It is no table of this kind; why not.
    Damaged(String),
    /// The system refused.
    Io(std::io::Error),
}

/// Reads a table; `None` when there is no file.
pub(crate) fn read<T: Table>(path: &Path) -> Result<Option<T>, T::Error> {
    try_read(path).map_err(|why| T::failed(path, why))
}

fn try_read<T: Table>(path: &Path) -> Result<Option<T>, Failed> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            return match error.kind() {
                ErrorKind::NotFound => Ok(None),
                ErrorKind::InvalidData => Err(Failed::Damaged("it is not text".to_owned())),
                _ => Err(Failed::Io(error)),
            };
        }
    };
    let table: T =
        serde_json::from_str(&text).map_err(|error| Failed::Damaged(error.to_string()))?;
    let (found, known) = (table.format(), T::FORMAT);
    if found != known {
        let reason = format!("it has form {found}, this program knows {known}");
        return Err(Failed::Damaged(reason));
    }
    table.check().map_err(Failed::Damaged)?;
    Ok(Some(table))
}

/// Writes a table so that a power cut leaves the old or the new one.
pub(crate) fn write<T: Table>(path: &Path, table: &T) -> Result<(), T::Error> {
    debug_assert_eq!(table.check(), Ok(()));
    try_write(path, table).map_err(|error| T::failed(path, Failed::Io(error)))
}

fn try_write(path: &Path, table: &impl Serialize) -> std::io::Result<()> {
    let mut draft = path.to_path_buf().into_os_string();
    draft.push(".draft");
    let mut file = File::create(&draft)?;
    file.write_all(&serde_json::to_vec_pretty(table)?)?;
    file.sync_all()?;
    std::fs::rename(&draft, path)?;
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}
