//! The exception tree. One root, split where a caller would act differently.
//!
//! ```text
//! KvarError
//! ├── ConnectError     nobody answers there: start the node, or try again later
//! ├── VersionError     client and node speak no common protocol: upgrade one of them
//! ├── WrongKeyError    not the key of that namespace: give the right key file
//! ├── ConfigError      an argument or file that cannot be meant: correct it
//! └── RequestError     the node did not do it (deadline, link lost, closed): try again or give up
//! ```

use pyo3::create_exception;
use pyo3::exceptions::PyException;

create_exception!(
    kvar,
    KvarError,
    PyException,
    "The root of all errors of this package."
);
create_exception!(kvar, ConnectError, KvarError, "The node cannot be reached.");
create_exception!(
    kvar,
    VersionError,
    KvarError,
    "Client and node speak no common protocol."
);
create_exception!(
    kvar,
    WrongKeyError,
    KvarError,
    "This is not the key of that namespace."
);
create_exception!(
    kvar,
    ConfigError,
    KvarError,
    "An argument or a file cannot be meant."
);
create_exception!(
    kvar,
    RequestError,
    KvarError,
    "The node did not do what was asked."
);
