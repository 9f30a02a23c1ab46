//! What a client has while it is open, and how its errors are said in Python.

use crate::errors::{ConfigError, ConnectError, RequestError, VersionError, WrongKeyError};
use crate::ids::PyNamespaceKey;
use crate::pending::Preparer;
use kvar_base::{MissReason, NamespaceKey};
use kvar_client::{Client, ClientError};
use pyo3::prelude::*;
use std::path::PathBuf;

/// What a client has while it is open.
pub(crate) struct Open {
    pub(crate) client: Client,
    pub(crate) preparer: Preparer,
}

/// The exception for an error.
pub(crate) fn raise(error: &ClientError) -> PyErr {
    let text = error.to_string();
    match error {
        ClientError::Config(_) | ClientError::Namespace(_) => ConfigError::new_err(text),
        ClientError::Unreachable(_) | ClientError::Busy(_) => ConnectError::new_err(text),
        ClientError::Version(_) | ClientError::Protocol(_) => VersionError::new_err(text),
        ClientError::WrongKey(_) => WrongKeyError::new_err(text),
        ClientError::Deadline | ClientError::Failed(_) => RequestError::new_err(text),
    }
}

/// The key, which is given in one of two ways.
pub(crate) fn key_of(
    key: Option<&Bound<'_, PyNamespaceKey>>,
    key_file: Option<PathBuf>,
) -> PyResult<NamespaceKey> {
    match (key, key_file) {
        (Some(key), None) => Ok(key.get().0.clone()),
        (None, Some(path)) => PyNamespaceKey::read(&path),
        _ => Err(ConfigError::new_err(
            "give the namespace's key either as key=NamespaceKey or as key_file=PATH \
             (the node wrote one beside its data)",
        )),
    }
}

/// "Nobody could be asked" is not "nothing is there".
pub(crate) fn was_asked(
    open: Option<&Open>,
    leading: usize,
    reason: Option<MissReason>,
) -> PyResult<()> {
    match reason {
        Some(MissReason::Unreachable) if leading == 0 => {
            let error = open.and_then(|open| open.client.last_error());
            Err(raise(&error.unwrap_or_else(|| {
                let node = open.map_or("the node", |open| open.client.endpoint());
                ClientError::Unreachable(format!("{node} does not answer"))
            })))
        }
        Some(MissReason::Deadline) if leading == 0 => Err(raise(&ClientError::Deadline)),
        _ => Ok(()),
    }
}
