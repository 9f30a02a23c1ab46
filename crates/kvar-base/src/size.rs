//! Sizes people write (`64MiB`) and sizes devices want (whole pages).

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// The unit of device I/O: payloads start on a page and are padded to one.
pub const PAGE_BYTES: u64 = 4096;

/// The least multiple of [`PAGE_BYTES`] that is not below `bytes`.
#[must_use]
pub const fn page_round_up(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_BYTES) * PAGE_BYTES
}

/// A number of bytes that reads and prints with a unit: `4096`, `64KiB`, `1.5GiB`, `3TB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

/// Why a text is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a size: write a number and a unit, such as 64KiB, 512MiB, 4GiB or 1TB")]
pub struct ByteSizeError(String);

const UNITS: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("kB", 1_000),
    ("B", 1),
];

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ByteSizeError(text.to_owned());
        let trimmed = text.trim();
        let (number, unit) = UNITS
            .iter()
            .find_map(|(name, unit)| trimmed.strip_suffix(name).map(|number| (number, *unit)))
            .unwrap_or((trimmed, 1));
        let number = number.trim().replace('_', "");
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(unit).map(Self).ok_or_else(wrong);
        }
        let part: f64 = number.parse().map_err(|_| wrong())?;
        let bytes = part * unit as f64;
        if !(0.0..1.8e19).contains(&bytes) || number.contains(['e', 'E', 'n', 'i']) {
            return Err(wrong());
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, unit) in &UNITS[..4] {
            if self.0 >= *unit {
                return if self.0.is_multiple_of(*unit) {
                    write!(f, "{}{name}", self.0 / unit)
                } else {
                    write!(f, "{:.1}{name}", self.0 as f64 / *unit as f64)
                };
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(bytes) => Ok(Self(bytes)),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        let check =
            |text: &str, bytes: u64| assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        check("0", 0);
        check("4096", 4096);
        check("64KiB", 65536);
        check(" 1.5 GiB ", 3 << 29);
        check("3TB", 3_000_000_000_000);
        check("1_000MB", 1_000_000_000);
        for wrong in ["", "GiB", "4 apples", "-1", "1e3", "99999999999TiB", "inf"] {
            assert!(wrong.parse::<ByteSize>().is_err(), "{wrong}");
        }
        assert_eq!(ByteSize(65536).to_string(), "64KiB");
        assert_eq!(ByteSize(3 << 29).to_string(), "1.5GiB");
    }

    #[test]
    fn pages_round_up() {
        assert_eq!([0, 1, 4096, 4097].map(page_round_up), [0, 4096, 4096, 8192]);
    }
}
