//! What can go wrong, by command or by seed.
//!
//! | kind      | a read                   | a write                              | a flush           |
//! |-----------|--------------------------|--------------------------------------|-------------------|
//! | FlipBits  | bits of the copy differ  | bits of what is stored differ        | nothing           |
//! | Misdirect | another place's bytes    | stored in another place              | nothing           |
//! | Lost      | nothing                  | said to be done, not stored          | said, not flushed |
//! | Error     | EIO                      | EIO; a part may be stored            | EIO, not flushed  |
//! | NoSpace   | nothing                  | no space, nothing stored             | nothing           |
//! | Short     | a part, then the end     | a part is stored                     | nothing           |
//! | Stuck     | no answer until released | no answer until released             | the same          |
//! | Late      | answers long after others| answers long after others            | the same          |
//!
//! "Nothing" means that the operation goes well and the fault is not used up. Late comes by seed
//! alone: it is decided when the device takes the operation, not when it is due.

use super::random::Random;
use std::ops::Range;

/// The way in which an operation goes wrong; see the top of this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FaultKind {
    /// Turns this many bits over.
    FlipBits(u32),
    /// Goes to another place by seed.
    Misdirect,
    /// Is said to be done and is not.
    Lost,
    /// Fails with EIO.
    Error,
    /// Fails for lack of space.
    NoSpace,
    /// Moves a part.
    Short,
    /// Does not answer until [`release_stuck`](super::SimDisk::release_stuck).
    Stuck,
    /// Takes up to [`LATE_POLLS_MAX`] polls.
    Late,
}

/// Most polls a late operation takes: long enough that everything else goes on meanwhile and comes
/// to wait for it.
pub const LATE_POLLS_MAX: u64 = 300;

/// Which operations a fault waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FaultOn {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
}

/// A fault that waits for an operation.
#[derive(Clone, Debug)]
pub struct Fault {
    pub(crate) kind: FaultKind,
    pub(crate) on: FaultOn,
    pub(crate) range: Range<u64>,
    pub(crate) times: Option<u32>,
}

impl Fault {
    /// Strikes the next such operation, anywhere on the disk, once.
    #[must_use]
    pub fn once(kind: FaultKind, on: FaultOn) -> Self {
        Self {
            kind,
            on,
            range: 0..u64::MAX,
            times: Some(1),
        }
    }

    /// Strikes every such operation until the faults are cleared.
    #[must_use]
    pub fn always(kind: FaultKind, on: FaultOn) -> Self {
        Self {
            times: None,
            ..Self::once(kind, on)
        }
    }

    /// Only operations that touch these bytes (a flush touches all).
    #[must_use]
    pub fn within(self, range: Range<u64>) -> Self {
        Self { range, ..self }
    }

    pub(crate) fn meets(&self, on: FaultOn, bytes: &Range<u64>) -> bool {
        let touches = self.range.start < bytes.end && bytes.start < self.range.end;
        self.on == on && self.kind.applies(on) && (touches || on == FaultOn::Flush)
    }
}

impl FaultKind {
    fn applies(self, on: FaultOn) -> bool {
        match self {
            Self::Error | Self::Stuck => true,
            Self::FlipBits(_) | Self::Misdirect | Self::Short => on != FaultOn::Flush,
            Self::Lost => on != FaultOn::Read,
            Self::NoSpace => on == FaultOn::Write,
            Self::Late => false,
        }
    }
}

/// How often, in a million operations of its kind, the seed makes one go wrong. All zero: never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultRates {
    /// Reads with one bit over.
    pub read_flip_ppm: u32,
    /// Reads from another place.
    pub read_misdirect_ppm: u32,
    /// Reads that fail.
    pub read_error_ppm: u32,
    /// Reads of a part.
    pub read_short_ppm: u32,
    /// Writes stored with one bit over.
    pub write_flip_ppm: u32,
    /// Writes to another place.
    pub write_misdirect_ppm: u32,
    /// Writes said to be done and not stored.
    pub write_lost_ppm: u32,
    /// Writes that fail.
    pub write_error_ppm: u32,
    /// Writes of a part.
    pub write_short_ppm: u32,
    /// Writes for which there is no space.
    pub write_no_space_ppm: u32,
    /// Flushes said to be done and not done.
    pub flush_lost_ppm: u32,
    /// Flushes that fail.
    pub flush_error_ppm: u32,
    /// Operations of any kind that answer long after others.
    pub late_ppm: u32,
}

impl FaultRates {
    pub(crate) fn roll(&self, on: FaultOn, random: &mut Random) -> Option<FaultKind> {
        let table: &[(u32, FaultKind)] = &match on {
            FaultOn::Read => [
                (self.read_flip_ppm, FaultKind::FlipBits(1)),
                (self.read_misdirect_ppm, FaultKind::Misdirect),
                (self.read_error_ppm, FaultKind::Error),
                (self.read_short_ppm, FaultKind::Short),
                (0, FaultKind::Lost),
                (0, FaultKind::Lost),
            ],
            FaultOn::Write => [
                (self.write_flip_ppm, FaultKind::FlipBits(1)),
                (self.write_misdirect_ppm, FaultKind::Misdirect),
                (self.write_error_ppm, FaultKind::Error),
                (self.write_lost_ppm, FaultKind::Lost),
                (self.write_short_ppm, FaultKind::Short),
                (self.write_no_space_ppm, FaultKind::NoSpace),
            ],
            FaultOn::Flush => [
                (self.flush_lost_ppm, FaultKind::Lost),
                (self.flush_error_ppm, FaultKind::Error),
                (0, FaultKind::Lost),
                (0, FaultKind::Lost),
                (0, FaultKind::Lost),
                (0, FaultKind::Lost),
            ],
        };
        let mut number = random.below(1_000_000);
        table.iter().find_map(|(rate, kind)| {
            let struck = number < u64::from(*rate);
            number = number.saturating_sub(u64::from(*rate));
            struck.then_some(*kind)
        })
    }
}

/// A fault that has struck.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultStruck {
    /// How.
    pub kind: FaultKind,
    /// What.
    pub on: FaultOn,
    /// The bytes that the operation named; empty for a flush.
    pub bytes: Range<u64>,
    /// The bytes that were read or overwritten instead, if it was misdirected.
    pub instead: Option<Range<u64>>,
}
