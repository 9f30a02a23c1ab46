//! What flash may be written, and what becomes of a block while that is short.
//!
//! ```text
//!                 plenty                    short                  spent
//!   put           Now, within flush_after   Later: when it leaves memory, if it is worth a place
//!   leaves memory     written if worth it   written if worth it    gone
//!   reclaim           kept if worth it      kept if worth it       gone
//!   asked for     written: a durable put, a flush, a shutdown, what a lease holds
//!   ephemeral     never written
//! ```
//!
//! Two rates, both in bytes a day, each a bucket that fills steadily. The *budget* is what may be
//! spent without asking what it is good for: short of it, only what earns a place is written. The
//! *limit* is what is never exceeded, but for what somebody asked for; it is none unless it is set.
//! What reclaim writes again counts like everything else, since it wears the flash as much.
//!
//! What must always be true: over any time, what is taken on the account of a rate is at most what
//! the rate gives in it, and the bucket's size; time is passed in and going backwards gives nothing.

use std::time::Duration;

const DAY_SECONDS: f64 = 86_400.0;

/// One rate.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    bytes_per_second: f64,
    size_bytes: f64,
    left_bytes: f64,
    debt_bytes_max: f64,
}

impl Bucket {
    /// Without a rate it never runs short.
    fn new(bytes_per_day: Option<u64>, size_bytes: u64) -> Self {
        let size_bytes = bytes_per_day.map_or(f64::INFINITY, |_| size_bytes as f64);
        Self {
            bytes_per_second: bytes_per_day.unwrap_or(0) as f64 / DAY_SECONDS,
            size_bytes,
            left_bytes: size_bytes,
            debt_bytes_max: size_bytes,
        }
    }

    fn pass(&mut self, seconds: f64) {
        self.left_bytes = (self.left_bytes + seconds * self.bytes_per_second).min(self.size_bytes);
    }

    /// Room or not, it is paid for, up to the debt that is remembered.
    fn spend(&mut self, bytes: u64) {
        self.left_bytes = (self.left_bytes - bytes as f64).max(-self.debt_bytes_max);
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.left_bytes >= bytes as f64
    }
}

/// What may be written to flash, for whatever reason.
#[derive(Clone, Debug)]
pub struct WriteBudget {
    budget: Bucket,
    limit: Bucket,
    seen: Duration,
}

/// The rates of a [`WriteBudget`]; `None` is without end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteRates {
    /// Bytes a day that are written without asking what for.
    pub budget_bytes_per_day: Option<u64>,
    /// Bytes a day that are never exceeded.
    pub limit_bytes_per_day: Option<u64>,
    /// Bytes of the budget that may be saved up, and are there from the start.
    pub budget_burst_bytes: u64,
    /// The same of the limit.
    pub limit_burst_bytes: u64,
}

impl WriteBudget {
    /// At these rates.
    #[must_use]
    pub fn new(rates: &WriteRates) -> Self {
        Self {
            budget: Bucket::new(rates.budget_bytes_per_day, rates.budget_burst_bytes),
            limit: Bucket {
                // What was asked for is paid back before anything else is written.
                debt_bytes_max: f64::INFINITY,
                ..Bucket::new(rates.limit_bytes_per_day, rates.limit_burst_bytes)
            },
            seen: Duration::ZERO,
        }
    }

    fn pass(&mut self, now: Duration) {
        let seconds = now.saturating_sub(self.seen).as_secs_f64();
        self.seen = self.seen.max(now);
        self.budget.pass(seconds);
        self.limit.pass(seconds);
    }

    /// Whether so many bytes may be written at `now` (since the start) without asking what for.
    pub fn has_plenty(&mut self, bytes: u64, now: Duration) -> bool {
        self.pass(now);
        self.budget.has_room(bytes) && self.limit.has_room(bytes)
    }

    /// Whether so many bytes may be written at all, if nobody asked for it.
    pub fn has_room(&mut self, bytes: u64, now: Duration) -> bool {
        self.pass(now);
        self.limit.has_room(bytes)
    }

    /// Bytes were written, or are about to be.
    pub fn spend(&mut self, bytes: u64) {
        self.budget.spend(bytes);
        self.limit.spend(bytes);
    }

    /// Bytes of the budget that are left; negative is debt, `None` is no budget.
    #[must_use]
    pub fn left_bytes(&self) -> Option<f64> {
        Some(self.budget.left_bytes).filter(|left| left.is_finite())
    }

    /// How a put is admitted.
    pub fn admit(
        &mut self,
        bytes: u64,
        ephemeral: bool,
        is_asked: bool,
        now: Duration,
    ) -> Admission {
        if is_asked {
            Admission::Asked
        } else if ephemeral {
            Admission::Never
        } else if self.has_plenty(bytes, now) {
            Admission::Budget
        } else {
            Admission::Later
        }
    }
}

/// When a put is written to flash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Within `flush_after`: somebody asked for it.
    Asked,
    /// Within `flush_after`: the budget has plenty.
    Budget,
    /// When it leaves memory, if it is worth a place then.
    Later,
    /// Not at all.
    Never,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn budget(per_day: u64, burst_bytes: u64) -> WriteBudget {
        WriteBudget::new(&WriteRates {
            budget_bytes_per_day: Some(per_day),
            budget_burst_bytes: burst_bytes,
            ..WriteRates::default()
        })
    }

    #[test]
    fn a_put_is_written_as_the_table_says() {
        let check = |room: u64, ephemeral, durable, expected| {
            let mut budget = budget(0, room);
            assert_eq!(
                budget.admit(10, ephemeral, durable, Duration::ZERO),
                expected
            );
        };
        check(10, false, false, Admission::Budget);
        check(9, false, false, Admission::Later);
        check(9, false, true, Admission::Asked);
        check(10, true, false, Admission::Never);
        check(10, true, true, Admission::Asked);
    }

    #[test]
    fn without_rates_it_never_runs_short() {
        let mut budget = WriteBudget::new(&WriteRates::default());
        budget.spend(u64::MAX);
        assert!(budget.has_plenty(u64::MAX, Duration::ZERO));
        assert!(budget.has_room(u64::MAX, Duration::ZERO));
        assert_eq!(budget.left_bytes(), None);
    }

    #[test]
    fn a_budget_that_is_short_leaves_room_and_a_limit_does_not() {
        let mut budget = WriteBudget::new(&WriteRates {
            budget_bytes_per_day: Some(0),
            limit_bytes_per_day: Some(86_400),
            budget_burst_bytes: 100,
            limit_burst_bytes: 100,
        });
        budget.spend(60);
        assert!(!budget.has_plenty(50, Duration::ZERO));
        assert!(budget.has_room(40, Duration::ZERO));
        budget.spend(50);
        assert!(!budget.has_room(1, Duration::ZERO));
        // A byte a second pays the debt of ten first.
        assert!(!budget.has_room(1, Duration::from_secs(10)));
        assert!(budget.has_room(1, Duration::from_secs(11)));
        assert_eq!(budget.left_bytes(), Some(-10.0));
    }

    proptest! {
        #[test]
        fn no_more_is_taken_than_the_rate_and_the_bucket_give(
            steps in prop::collection::vec((0..5_000_u64, 0..5_000_u64), 1..200),
            burst in 0..20_000_u64,
        ) {
            let per_day = 86_400 * 100;
            let mut budget = budget(per_day, burst);
            let (mut now, mut taken) = (Duration::ZERO, 0);
            for (milliseconds, bytes) in steps {
                now += Duration::from_millis(milliseconds);
                if budget.has_plenty(bytes, now) {
                    budget.spend(bytes);
                    taken += bytes;
                }
                prop_assert!(taken as f64 <= burst as f64 + now.as_secs_f64() * 100.0 + 1e-6);
                // A clock that goes back gives nothing.
                prop_assert!(!budget.has_plenty(burst + 1, Duration::ZERO));
            }
        }
    }
}
