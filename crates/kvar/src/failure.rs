//! How a command ends when it does not do what it was asked.
//!
//! One line on standard error: what is wrong, its cause, what to do. The exit code says which kind,
//! so that scripts need not read the line.

use std::fmt;
use std::process::ExitCode;

/// What the exit code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The work failed: node unreachable, data damaged, disk full.
    Failed = 1,
    /// Arguments or settings are wrong; nothing was done.
    Usage = 2,
    /// What was asked for is not there.
    NotFound = 3,
}

/// A command's failure.
#[derive(Debug)]
pub(crate) struct Failure {
    kind: Kind,
    message: String,
}

/// What a command returns.
pub(crate) type Outcome = Result<(), Failure>;

impl Failure {
    pub(crate) fn new(kind: Kind, message: impl fmt::Display) -> Self {
        Self {
            kind,
            message: message.to_string(),
        }
    }

    /// The work failed.
    pub(crate) fn failed(message: impl fmt::Display) -> Self {
        Self::new(Kind::Failed, message)
    }

    /// Arguments or settings are wrong.
    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// What was asked for is not there.
    pub(crate) fn not_found(message: impl fmt::Display) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// What went wrong, and what to do.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// Prints the line and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        eprintln!("kvar: {}", self.message);
        ExitCode::from(self.kind as u8)
    }
}
