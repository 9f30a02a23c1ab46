//! What flash may be written, and what becomes of a put while that is short.
//!
//! ```text
//!   ephemeral ───────────────────────────────> Never
//!   durable ─────────────────────────────────> Now   (asked for: the budget goes below nothing)
//!   the budget has room ─────────────────────> Now   (within flush_after, as promised)
//!   the budget is short ─────────────────────> Later (decided when the block leaves memory)
//! ```
//!
//! The budget is a bucket of bytes that fills at a steady rate: bytes a day. What reclaim writes
//! again is taken from it, too, since it wears the flash as much.
//!
//! What must always be true: over any time, what is taken on its account is at most what the rate
//! gives in it, and the bucket's size; time is passed in and going backwards gives nothing.

use std::time::Duration;

const DAY_SECONDS: f64 = 86_400.0;

/// A token bucket of flash writes.
#[derive(Clone, Debug)]
pub struct WriteBudget {
    bytes_per_second: f64,
    size_bytes: f64,
    left_bytes: f64,
    seen: Duration,
    written_bytes: u64,
}

impl WriteBudget {
    /// `bytes_per_day` in the long run, at most `burst_bytes` saved up (and there from the start).
    #[must_use]
    pub fn new(bytes_per_day: u64, burst_bytes: u64) -> Self {
        Self {
            bytes_per_second: bytes_per_day as f64 / DAY_SECONDS,
            size_bytes: burst_bytes as f64,
            left_bytes: burst_bytes as f64,
            seen: Duration::ZERO,
            written_bytes: 0,
        }
    }

    /// A budget that never runs short.
    #[must_use]
    pub fn unlimited() -> Self {
        Self {
            left_bytes: f64::INFINITY,
            size_bytes: f64::INFINITY,
            ..Self::new(0, 0)
        }
    }

    /// Whether so many bytes may be written at `now` (since the start) on its account.
    pub fn has_room(&mut self, bytes: u64, now: Duration) -> bool {
        let passed = now.saturating_sub(self.seen).as_secs_f64();
        self.seen = self.seen.max(now);
        self.left_bytes = (self.left_bytes + passed * self.bytes_per_second).min(self.size_bytes);
        self.left_bytes >= bytes as f64
    }

    /// Bytes were written: room or not, they are paid for, up to one bucket of debt.
    pub fn spend(&mut self, bytes: u64) {
        self.left_bytes = (self.left_bytes - bytes as f64).max(-self.size_bytes);
        self.written_bytes = self.written_bytes.saturating_add(bytes);
    }

    /// Bytes written since the start, in writes of a drive of so many bytes a day.
    #[must_use]
    pub fn drive_writes_per_day(&self, drive_bytes: u64, now: Duration) -> f64 {
        let days = (now.as_secs_f64() / DAY_SECONDS).max(f64::MIN_POSITIVE);
        self.written_bytes as f64 / drive_bytes.max(1) as f64 / days
    }
}

/// When a put is written to flash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Within `flush_after`.
    Now(AdmitReason),
    /// When it leaves memory, if it is worth a place then.
    Later,
    /// Not at all.
    Never,
}

/// Why a block is written to flash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AdmitReason {
    /// The writer waits for it.
    Durable,
    /// The write budget has room.
    Budget,
    /// It leaves memory and is worth a place.
    Worth,
    /// Its tail was worth a place, and is of no use without it.
    Chain,
}

/// Why a block is let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DropReason {
    /// Hinted as not worth a write.
    Ephemeral,
    /// It leaves memory, and no place on flash is worth it.
    NotAdmitted,
    /// Its segment was reclaimed, and it is not worth another turnover.
    NotKept,
}

/// How a put is admitted.
#[must_use]
pub fn admit(
    budget: &mut WriteBudget,
    bytes: u64,
    ephemeral: bool,
    durable: bool,
    now: Duration,
) -> Admission {
    if durable {
        Admission::Now(AdmitReason::Durable)
    } else if ephemeral {
        Admission::Never
    } else if budget.has_room(bytes, now) {
        Admission::Now(AdmitReason::Budget)
    } else {
        Admission::Later
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_put_is_written_as_the_table_says() {
        let check = |room: u64, ephemeral, durable, expected| {
            let mut budget = WriteBudget::new(0, room);
            let got = admit(&mut budget, 10, ephemeral, durable, Duration::ZERO);
            assert_eq!(got, expected);
        };
        check(10, false, false, Admission::Now(AdmitReason::Budget));
        check(9, false, false, Admission::Later);
        check(9, false, true, Admission::Now(AdmitReason::Durable));
        check(10, true, false, Admission::Never);
        check(10, true, true, Admission::Now(AdmitReason::Durable));
    }

    #[test]
    fn wear_is_shown_in_drive_writes() {
        let mut budget = WriteBudget::unlimited();
        let half_a_day = Duration::from_secs(43_200);
        assert!(budget.has_room(u64::MAX, Duration::ZERO));
        budget.spend(3_000);
        assert!(budget.has_room(u64::MAX, half_a_day));
        assert_eq!(budget.drive_writes_per_day(1_000, half_a_day), 6.0);
    }

    proptest! {
        #[test]
        fn no_more_is_taken_than_the_rate_and_the_bucket_give(
            steps in prop::collection::vec((0..5_000_u64, 0..5_000_u64), 1..200),
            burst in 0..20_000_u64,
        ) {
            let per_day = 86_400 * 100;
            let mut budget = WriteBudget::new(per_day, burst);
            let (mut now, mut taken) = (Duration::ZERO, 0);
            for (milliseconds, bytes) in steps {
                now += Duration::from_millis(milliseconds);
                if budget.has_room(bytes, now) {
                    budget.spend(bytes);
                    taken += bytes;
                }
                prop_assert!(taken as f64 <= burst as f64 + now.as_secs_f64() * 100.0 + 1e-6);
                // A clock that goes back gives nothing.
                prop_assert!(!budget.has_room(burst + 1, Duration::ZERO));
            }
        }
    }
}
