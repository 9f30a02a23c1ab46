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
}

/// Why a table cannot be read.
#[derive(Debug)]
pub(crate) enum ReadFailed {
    /// It is no table of this kind; why not.
    Damaged(String),
    /// The system refused.
    Io(std::io::Error),
}

/// Reads a table; `None` when there is no file.
pub(crate) fn read<T: Table>(path: &Path) -> Result<Option<T>, ReadFailed> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            return match error.kind() {
                ErrorKind::NotFound => Ok(None),
                ErrorKind::InvalidData => Err(ReadFailed::Damaged("it is not text".to_owned())),
                _ => Err(ReadFailed::Io(error)),
            };
        }
    };
    let table: T =
        serde_json::from_str(&text).map_err(|error| ReadFailed::Damaged(error.to_string()))?;
    let (found, known) = (table.format(), T::FORMAT);
    if found != known {
        let reason = format!("it has form {found}, this program knows {known}");
        return Err(ReadFailed::Damaged(reason));
    }
    table.check().map_err(ReadFailed::Damaged)?;
    Ok(Some(table))
}

/// Writes a table so that a power cut leaves the old or the new one.
pub(crate) fn write(path: &Path, table: &impl Table) -> std::io::Result<()> {
    debug_assert_eq!(table.check(), Ok(()));
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
