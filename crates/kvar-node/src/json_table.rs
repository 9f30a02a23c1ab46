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

/// Why a table cannot be read.
#[derive(Debug)]
pub(crate) enum ReadFailed {
    /// It is no table of this kind; why not.
    Damaged(String),
    /// The system refused.
    Io(std::io::Error),
}

/// Reads a table; `None` when there is no file.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, ReadFailed> {
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
    let table = serde_json::from_str(&text);
    table.map_err(|error| ReadFailed::Damaged(error.to_string()))
}

/// Writes a table so that a power cut leaves the old or the new one.
pub(crate) fn write(path: &Path, table: &impl Serialize) -> std::io::Result<()> {
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
