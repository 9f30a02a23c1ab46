//! Rates, latencies and CPU of a run, and the median of several.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::{Duration, Instant};

/// What a run of reads reached.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Reads {
    pub(crate) bytes_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// CPU of the process for each read, less what it uses while nobody reads.
    pub(crate) cpu_us: f64,
    /// CPU of the process for each read.
    pub(crate) cpu_gross_us: f64,
    pub(crate) hit_share: f64,
    pub(crate) wrong: u64,
}

impl Reads {
    /// The same without what the process would have used if nobody had read: so much of a core.
    pub(crate) fn less_idle(self, idle: f64) -> Self {
        let seconds_a_read = crate::VALUE_BYTES as f64 / self.bytes_per_s;
        let idle_us = idle * seconds_a_read * 1e6;
        Self {
            cpu_us: (self.cpu_gross_us - idle_us).max(0.0),
            ..self
        }
    }
}

/// The median of some measurements and its 90 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Interval {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Interval {
    /// Of measurements of any distribution: the interval of the sign test, between the k-th smallest
    /// and the k-th largest; with fewer than five the whole range.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let count = values.len();
        assert!(count > 0, "a median needs measurements");
        let skip = outside(count);
        Self {
            median: f64::midpoint(values[(count - 1) / 2], values[count / 2]),
            low: values[skip],
            high: values[count - 1 - skip],
        }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, low, high } = self;
        write!(f, "{median:.2} [{low:.2} {high:.2}]")
    }
}

/// How many measurements may lie outside on either side: the most whose chance stays below 5 %.
fn outside(count: usize) -> usize {
    let (mut chance, mut below) = (0.5_f64.powi(count as i32), 0.0);
    for rank in 0..count / 2 {
        below += chance;
        if below > 0.05 {
            return rank;
        }
        chance = chance * (count - rank) as f64 / (rank + 1) as f64;
    }
    count / 2
}

impl fmt::Display for Reads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.2} GB/s, p50 {:.0} us, {:.1} us CPU a read",
            self.bytes_per_s / 1e9,
            self.p50_us,
            self.cpu_gross_us
        )
    }
}

/// A run under way.
pub(crate) struct Run {
    started: Instant,
    seconds: f64,
    cpu: Duration,
    pub(crate) tally: Tally,
}

/// What one reader counted.
pub(crate) struct Tally {
    latencies: Histogram<u64>,
    hits: u64,
    misses: u64,
    wrong: u64,
}

impl Tally {
    pub(crate) fn new() -> Self {
        // Bounds of a microsecond and a minute: `saturating_record` does not move them.
        let latencies = Histogram::new_with_bounds(1, 60_000_000, 3).expect("they are valid");
        Self {
            latencies,
            hits: 0,
            misses: 0,
            wrong: 0,
        }
    }

    /// A read is over: a value that is right or not, or none.
    pub(crate) fn count(&mut self, latency: Duration, is_right: Option<bool>) {
        match is_right {
            Some(true) => {
                self.hits += 1;
                self.latencies.saturating_record(latency.as_micros() as u64);
            }
            Some(false) => self.wrong += 1,
            None => self.misses += 1,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        let _ = self.latencies.add(&other.latencies);
        self.hits += other.hits;
        self.misses += other.misses;
        self.wrong += other.wrong;
    }
}

impl Run {
    pub(crate) fn begin(seconds: f64) -> Self {
        Self {
            started: Instant::now(),
            seconds,
            cpu: process_cpu(),
            tally: Tally::new(),
        }
    }

    pub(crate) fn end_at(&self) -> Instant {
        self.started + Duration::from_secs_f64(self.seconds)
    }

    pub(crate) fn finish(self) -> Reads {
        let elapsed = self.started.elapsed().as_secs_f64();
        let cpu = process_cpu().saturating_sub(self.cpu);
        let Tally {
            latencies,
            hits,
            misses,
            wrong,
        } = self.tally;
        let reads = hits.max(1) as f64;
        Reads {
            bytes_per_s: hits as f64 * crate::VALUE_BYTES as f64 / elapsed,
            p50_us: latencies.value_at_quantile(0.5) as f64,
            p99_us: latencies.value_at_quantile(0.99) as f64,
            cpu_us: cpu.as_secs_f64() * 1e6 / reads,
            cpu_gross_us: cpu.as_secs_f64() * 1e6 / reads,
            hit_share: hits as f64 / (hits + misses + wrong).max(1) as f64,
            wrong,
        }
    }
}

/// CPU time of this process, all of its threads.
pub(crate) fn process_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The next of a row of numbers that look random; rows begun at different numbers have nothing in
/// common.
pub(crate) fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_sign_test() {
        assert_eq!([1, 4, 5, 8, 15].map(outside), [0, 0, 1, 2, 4]);
        let of = Interval::of((1..=5).map(f64::from).collect());
        assert_eq!((of.low, of.median, of.high), (2.0, 3.0, 4.0));
    }

    #[test]
    fn what_a_process_uses_anyway_is_no_cost_of_a_read() {
        let reads = Reads {
            bytes_per_s: crate::VALUE_BYTES as f64 * 10_000.0,
            p50_us: 0.0,
            p99_us: 0.0,
            cpu_us: 60.0,
            cpu_gross_us: 60.0,
            hit_share: 1.0,
            wrong: 0,
        };
        // Half a core at 10,000 reads a second: 50 us of the 60.
        let net = reads.less_idle(0.5);
        assert!((net.cpu_us - 10.0).abs() < 1e-9 && net.cpu_gross_us == 60.0);
        assert_eq!(reads.less_idle(1.0).cpu_us, 0.0);
    }
}
