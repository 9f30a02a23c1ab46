//! Time as an argument. State machines get a [`Moment`]; only shells hold a [`Clock`].

use std::time::{Duration, Instant};

/// Microseconds since some fixed start; monotonic, of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Moment(pub u64);

impl Moment {
    /// The moment `later` after this one (saturating).
    #[must_use]
    pub fn after(self, later: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(later.as_micros()).unwrap_or(u64::MAX)),
        )
    }

    /// Time from `earlier` to this one; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// Where a shell gets its time from; a simulation has its own.
pub trait Clock {
    /// Now, monotonic.
    fn now(&self) -> Moment;
    /// Seconds since 1970, for expiry times that outlive the process.
    fn unix_seconds(&self) -> u64;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl SystemClock {
    /// A moment of this clock as the whole process knows it.
    #[must_use]
    pub fn instant(&self, moment: Moment) -> Instant {
        self.0 + Duration::from_micros(moment.0)
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Moment {
        Moment(u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn unix_seconds(&self) -> u64 {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |elapsed| elapsed.as_secs())
    }
}
