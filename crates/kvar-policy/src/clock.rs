//! Time as the flash feels it: bytes appended, in ticks of 1/64 turnover, kept in one byte.
//!
//! ```text
//!   bytes appended   0 ........ 1 turnover ........ 2 ........ 3 ........ 4
//!   tick             0            64               128        192        256
//!   stamp (tick mod 256)                                                  0 again
//!   age = now - stamp (mod 256):  0 ... 191 as it is,  192 ... 255 -> AGE_MAX
//! ```
//!
//! A stamp wraps after four turnovers, so an entry left alone for longer would look young again.
//! That cannot happen, because entries do not get that old: the log reclaims a segment about one
//! turnover after it was written, and then either drops a block or writes it again; a policy
//! keeps no block of [`KEEP_AGE_MAX`](crate::KEEP_AGE_MAX) ticks (one turnover) or more. So an
//! untouched entry is dropped at the latest two turnovers, and one reserve of segments, after its
//! last touch: half of the wrap. The upper quarter of the circle reads as "old", not as "young",
//! which leaves a margin for whatever else delays a reclaim (copying on of leased blocks).
//!
//! The caller keeps `bytes_appended` over restarts (or stamps every entry anew at recovery):
//! stamps of one count mean nothing under another.

/// Ticks in one turnover of the flash. 64 resolve an age to 1.6 % of a turnover, finer than the
/// hit rate can tell, and leave two bits of the byte for the wrap.
pub const TICKS_PER_TURNOVER: u8 = 64;

/// The greatest age [`CoarseClock::age`] gives: three turnovers or more.
pub const AGE_MAX: u8 = 3 * TICKS_PER_TURNOVER;

/// Turns bytes appended to the log into stamps of index entries, and stamps into ages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoarseClock {
    turnover_bytes: u64,
}

impl CoarseClock {
    /// A clock for a flash whose payload capacity is `turnover_bytes` (at least 1 is assumed).
    #[must_use]
    pub fn new(turnover_bytes: u64) -> Self {
        Self {
            turnover_bytes: turnover_bytes.max(1),
        }
    }

    /// The stamp of an entry touched when `bytes_appended` bytes had been appended since the
    /// log began, rewritten ones included.
    #[must_use]
    pub fn stamp(self, bytes_appended: u64) -> u8 {
        let ticks = u128::from(bytes_appended) * u128::from(TICKS_PER_TURNOVER)
            / u128::from(self.turnover_bytes);
        // Keeping the low byte is the wrap that the story above is about.
        ticks as u8
    }

    /// How long ago `stamp` was made, in ticks, if `bytes_appended` bytes are appended by now;
    /// [`AGE_MAX`] stands for that and everything longer.
    #[must_use]
    pub fn age(self, stamp: u8, bytes_appended: u64) -> u8 {
        self.stamp(bytes_appended).wrapping_sub(stamp).min(AGE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_count_turnovers_and_saturate() {
        let turnover = 1_000_003;
        let clock = CoarseClock::new(turnover);
        for start in [
            0,
            7,
            turnover / 2,
            3 * turnover,
            1 << 40,
            u64::MAX - 5 * turnover,
        ] {
            let stamp = clock.stamp(start);
            let age_after = |bytes: u64| clock.age(stamp, start + bytes);
            assert_eq!(age_after(0), 0);
            assert!((63..=64).contains(&age_after(turnover)), "start {start}");
            assert!(
                (127..=128).contains(&age_after(2 * turnover)),
                "start {start}"
            );
            assert_eq!(age_after(3 * turnover + turnover / 64), AGE_MAX);
            assert_eq!(age_after(4 * turnover - turnover / 64), AGE_MAX);
        }
    }

    #[test]
    fn age_never_falls_before_the_wrap() {
        let clock = CoarseClock::new(4096);
        for start in (0..20_000).step_by(97) {
            let stamp = clock.stamp(start);
            let mut last = 0;
            for passed in (0..4 * 4096 - 64).step_by(61) {
                let age = clock.age(stamp, start + passed);
                assert!(
                    age >= last,
                    "start {start}, passed {passed}: {age} after {last}"
                );
                last = age;
            }
        }
    }

    #[test]
    fn a_flash_of_no_bytes_is_no_division_by_zero() {
        assert_eq!(
            CoarseClock::new(0).stamp(u64::MAX),
            CoarseClock::new(1).stamp(u64::MAX)
        );
    }
}
