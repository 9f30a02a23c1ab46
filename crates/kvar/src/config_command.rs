//! `kvar config sample` and `kvar config check`.

use crate::failure::{Failure, Outcome};
use crate::print;
use kvar_node::{Config, sample};
use std::path::Path;

/// Prints a settings file with every key.
pub(crate) fn print_sample() -> Outcome {
    print::bytes(sample().as_bytes())
}

/// Tells whether a settings file can be used.
pub(crate) fn check(path: &Path) -> Outcome {
    let config = Config::load(path).map_err(Failure::usage)?;
    config.validate().map_err(|mut error| {
        error.origin = Some(path.to_path_buf());
        Failure::usage(error)
    })?;
    print::line(&format!("{}: fine", path.display()))
}
