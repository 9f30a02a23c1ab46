//! The breaker: a node that does not answer is not asked again and again.
//!
//! ```text
//!             cannot connect, or silent past a deadline
//!   Closed ─────────────────────────────────────────────> Open (calls end at once)
//!     ^                                                     │ pause over
//!     │ a frame came, or a link stands                      ▼
//!     ├──────────────────────────────────────────────── Probing (calls end at once)
//!     │                                                     │ failed: pause doubled
//!     └── also straight from Open <── Open <────────────────┘
//! ```
//!
//! The first failure costs a call its deadline; those after it cost nothing. Probes run beside the
//! calls, never in one.

use kvar_base::Moment;
use std::time::Duration;

/// First pause. A node that restarts is back in about two seconds; this finds it soon after.
const PAUSE_MIN: Duration = Duration::from_millis(50);

/// Longest pause: a connect every two seconds is no load for anyone.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Whether calls go to the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// They do.
    #[default]
    Closed,
    /// They end at once as unreachable.
    Open,
    /// They still do, and the node is being tried.
    Probing,
}

#[derive(Debug)]
pub(crate) struct Breaker {
    state: BreakerState,
    pause: Duration,
    /// When `Open` ends, or when `Probing` is given up.
    until: Moment,
}

impl Breaker {
    pub(crate) fn new() -> Self {
        Self {
            state: BreakerState::Closed,
            pause: PAUSE_MIN,
            until: Moment(0),
        }
    }

    pub(crate) fn state(&self) -> BreakerState {
        self.state
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state == BreakerState::Closed
    }

    /// The node failed. `for_good`: a setting is wrong, and soon is no better than later.
    pub(crate) fn failed(&mut self, now: Moment, for_good: bool) {
        let pause = if for_good { PAUSE_MAX } else { self.pause };
        self.state = BreakerState::Open;
        self.until = now.after(pause);
        self.pause = (pause * 2).min(PAUSE_MAX);
    }

    /// The node lives.
    pub(crate) fn heard(&mut self) {
        self.state = BreakerState::Closed;
        self.pause = PAUSE_MIN;
    }

    /// Whether it is time to try the node; from then until `patience` later it is being tried.
    pub(crate) fn begin_probe(&mut self, now: Moment, patience: Duration) -> bool {
        let due = self.state != BreakerState::Closed && now >= self.until;
        if due {
            self.state = BreakerState::Probing;
            self.until = now.after(patience);
        }
        due
    }

    /// When something is to be done next.
    pub(crate) fn timer(&self) -> Option<Moment> {
        (!self.is_closed()).then_some(self.until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_one_word_ends_them() {
        let mut breaker = Breaker::new();
        let mut now = Moment(1_000);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            breaker.failed(now, false);
            assert!(!breaker.begin_probe(now, Duration::from_secs(1)));
            let until = breaker.timer().unwrap();
            pauses.push(until.since(now).as_millis());
            assert!(breaker.begin_probe(until, Duration::from_secs(1)));
            assert_eq!(breaker.state(), BreakerState::Probing);
            now = until;
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        breaker.heard();
        assert_eq!(
            (breaker.state(), breaker.timer()),
            (BreakerState::Closed, None)
        );
        breaker.failed(now, false);
        assert_eq!(breaker.timer(), Some(now.after(PAUSE_MIN)));
    }
}
