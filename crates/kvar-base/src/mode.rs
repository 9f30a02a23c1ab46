//! How much of the store engines use: the operator's switch.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};

/// What connectors do with a store. Each includes the one before it.
///
/// A word to whoever sits in an engine: a node answers everything in every mode, and tools (puts
/// and gets of an operator) never ask.
///
/// On the wire the order is the number: new modes go to the end.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Nothing is asked.
    Off,
    /// Lookups are asked and counted; nothing is loaded, nothing saved.
    Observe,
    /// As observe, and what is computed is saved.
    Save,
    /// Everything: the normal way to run.
    #[default]
    Load,
}

impl Mode {
    /// All modes, in wire order.
    pub const ALL: [Self; 4] = [Self::Off, Self::Observe, Self::Save, Self::Load];

    /// The word used on the command line, in metrics, JSON and Python.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Observe => "observe",
            Self::Save => "save",
            Self::Load => "load",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Mode {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|mode| mode.word() == text);
        found.ok_or_else(|| format!("{text:?} is not one of off, observe, save, load"))
    }
}

/// A mode that one thread sets and any thread reads, at the cost of reading a byte.
#[derive(Debug)]
pub struct ModeCell(AtomicU8);

impl Default for ModeCell {
    fn default() -> Self {
        Self::new(Mode::default())
    }
}

impl ModeCell {
    /// A cell that holds this mode.
    #[must_use]
    pub const fn new(mode: Mode) -> Self {
        Self(AtomicU8::new(mode as u8))
    }

    /// What was set last, as far as this thread has heard.
    #[must_use]
    pub fn get(&self) -> Mode {
        let number = self.0.load(Ordering::Relaxed);
        Mode::ALL[usize::from(number).min(Mode::ALL.len() - 1)]
    }

    /// Sets it. Nothing else is ordered by it.
    pub fn set(&self, mode: Mode) {
        self.0.store(mode as u8, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_has_one_word_and_one_number() {
        let cell = ModeCell::default();
        assert_eq!(cell.get(), Mode::Load);
        for (number, mode) in (0..).zip(Mode::ALL) {
            assert_eq!(mode as u8, number);
            assert_eq!(mode.word().parse(), Ok(mode));
            cell.set(mode);
            assert_eq!(cell.get(), mode);
        }
        let wrong = "of".parse::<Mode>().unwrap_err();
        assert!(wrong.contains("off, observe, save, load"), "{wrong}");
    }
}
