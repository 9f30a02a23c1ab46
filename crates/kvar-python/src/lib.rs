//! The compiled half of the Python package: translation between Python and `kvar-client`.
//!
//! ```text
//!   python/src/kvar/__init__.py   what users import, and the words about it
//!   python/src/kvar/_kvar.pyi     the types of everything here; checked against this module
//!   arguments ─> client ─> kvar-client ─> pending ─> Python
//!        └─ buffers (exported memory)        └─ returner (Python on behalf of other threads)
//!            └─ staging (memory that the node writes to)
//! ```
//!
//! What must always be true:
//! * nothing here decides anything: what can be decided is decided in `kvar-client`;
//! * the interpreter's lock is free while something waits;
//! * buffers are never copied, and stay exported until their call has ended.
//!
//! What is absent: protocol, sockets, retries. `unsafe` has two addresses: `buffers`, memory of others, and
//! `staging`, memory that this gives out.

mod arguments;
#[allow(unsafe_code)]
mod buffers;
mod client;
mod errors;
mod hints;
mod ids;
mod layer_put;
mod layers;
mod lease;
mod open;
mod pending;
mod returner;
#[allow(unsafe_code)]
mod staging;

use pyo3::prelude::*;

#[pymodule]
mod _kvar {
    #[pymodule_export]
    use crate::client::PyClient;
    #[pymodule_export]
    use crate::errors::{
        ConfigError, ConnectError, KvarError, RequestError, VersionError, WrongKeyError,
    };
    #[pymodule_export]
    use crate::hints::PyPutHints;
    #[pymodule_export]
    use crate::ids::{PyContentFingerprint, PyNamespaceKey, derive_ids, id_from_name};
    #[pymodule_export]
    use crate::layer_put::PyLayerPut;
    #[pymodule_export]
    use crate::layers::PyLayerGet;
    #[pymodule_export]
    use crate::lease::{PyLease, PyPendingLease};
    #[pymodule_export]
    use crate::pending::{PyGetResult, PyPending};
    #[pymodule_export]
    use crate::staging::PyStaging;
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
