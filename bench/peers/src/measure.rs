//! Rates, latencies and CPU of a run, and the median of several.

use hdrhistogram::Histogram;
use std::fmt;
use std::time::{Duration, Instant};

/// What a run of reads reached.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reads {
    pub(crate) bytes_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// CPU of the process for each read.
    pub(crate) cpu_us: f64,
    pub(crate) hit_share: f64,
    pub(crate) wrong: u64,
}

impl Reads {
    /// The median of each figure.
    pub(crate) fn median(runs: &[Self]) -> Self {
        let of = |figure: fn(&Self) -> f64| {
            let mut values: Vec<f64> = runs.iter().map(figure).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        Self {
            bytes_per_s: of(|run| run.bytes_per_s),
            p50_us: of(|run| run.p50_us),
            p99_us: of(|run| run.p99_us),
            cpu_us: of(|run| run.cpu_us),
            hit_share: of(|run| run.hit_share),
            wrong: runs.iter().map(|run| run.wrong).sum(),
        }
    }
}

impl fmt::Display for Reads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.2} GB/s, p50 {:.0} us, {:.1} us CPU a read",
            self.bytes_per_s / 1e9,
            self.p50_us,
            self.cpu_us
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
        let latencies = Histogram::new(3).expect("three digits are a precision");
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
            hit_share: hits as f64 / (hits + misses + wrong).max(1) as f64,
            wrong,
        }
    }
}

/// CPU time of this process, all of its threads.
fn process_cpu() -> Duration {
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
