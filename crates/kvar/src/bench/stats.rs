//! Medians, intervals, idle CPU.

use hdrhistogram::Histogram;
use std::time::Duration;

/// The median of some measurements and its 90 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ratio {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Ratio {
    /// From measurements of any distribution: the interval is that of the sign test, between the
    /// k-th smallest and the k-th largest. With fewer than five it is the whole range.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let count = values.len();
        assert!(count > 0, "a median needs measurements");
        let median = f64::midpoint(values[(count - 1) / 2], values[count / 2]);
        let skip = sign_test_rank(count);
        Self {
            median,
            low: values[skip],
            high: values[count - 1 - skip],
        }
    }
}

/// How many measurements may lie outside on either side: the most whose chance stays below 5 %.
fn sign_test_rank(count: usize) -> usize {
    let mut chance = 0.5_f64.powi(count as i32);
    let mut below = 0.0;
    for rank in 0..count / 2 {
        below += chance;
        if below > 0.05 {
            return rank;
        }
        chance = chance * (count - rank) as f64 / (rank + 1) as f64;
    }
    count / 2
}

/// Share of all CPUs that is idle over a moment; steal counts as busy.
pub(crate) fn idle_cpu() -> f64 {
    let before = cpu_times();
    std::thread::sleep(Duration::from_millis(300));
    let after = cpu_times();
    let (idle, all) = (
        after.0.saturating_sub(before.0),
        after.1.saturating_sub(before.1),
    );
    if all == 0 {
        1.0
    } else {
        idle as f64 / all as f64
    }
}

fn cpu_times() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let times: Vec<u64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|number| number.parse().ok())
        .take(8)
        .collect();
    let idle = times.get(3).unwrap_or(&0) + times.get(4).unwrap_or(&0);
    (idle, times.iter().sum())
}

/// Longest latency that is told apart, in microseconds: a minute.
const LATENCY_US_MAX: u64 = 60_000_000;

/// Room for latencies in microseconds, to three digits; recorded with `saturating_record`, which
/// does not make more room: what is over the bound counts as the bound. (A histogram without bounds
/// begins with a bound of 2.)
pub(crate) fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("bounds and digits are valid")
}

/// CPU time, and how it divides: in the program, and in the kernel on its behalf.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) total: Duration,
    /// Ticks, which are coarse: only their ratio over a whole run is used.
    user_ticks: u64,
    system_ticks: u64,
}

impl Cpu {
    /// What this thread has used.
    pub(crate) fn of_thread() -> Self {
        let text = std::fs::read_to_string("/proc/thread-self/stat").unwrap_or_default();
        // The name, in brackets, may hold spaces.
        let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        let mut ticks = fields.split_whitespace().skip(11);
        let mut next = || ticks.next().and_then(|ticks| ticks.parse().ok());
        Self {
            total: thread_cpu(),
            user_ticks: next().unwrap_or(0),
            system_ticks: next().unwrap_or(0),
        }
    }

    /// Microseconds since `before` for each of `operations`: in all, in the program, in the kernel.
    pub(crate) fn us_since(&self, before: &Self, operations: u64) -> CpuUs {
        let total = self.total.saturating_sub(before.total).as_secs_f64() * 1e6;
        let total = total / operations.max(1) as f64;
        let user = self.user_ticks.saturating_sub(before.user_ticks) as f64;
        let system = self.system_ticks.saturating_sub(before.system_ticks) as f64;
        let share = user / (user + system).max(1.0);
        CpuUs {
            total,
            user: total * share,
            system: total * (1.0 - share),
        }
    }
}

/// Microseconds of CPU for an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct CpuUs {
    pub(crate) total: f64,
    pub(crate) user: f64,
    pub(crate) system: f64,
}

/// Of Linux, towards programs, on every machine we run on.
const TICKS_A_SECOND: f64 = 100.0;

/// CPU time that a process has used, in seconds; in steps of a tick, so take it over a second or more.
pub(crate) fn seconds_of_process(process: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    ticks as f64 / TICKS_A_SECOND
}

/// CPU time this thread has used.
fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_latency_is_not_taken_for_a_short_one() {
        let mut found = latencies();
        for latency_us in [3, 5_000, 5_000_000, u64::MAX] {
            found.saturating_record(latency_us);
        }
        assert_eq!(found.value_at_quantile(0.25), 3);
        assert!((5_000..5_010).contains(&found.value_at_quantile(0.5)));
        assert!((5_000_000..5_010_000).contains(&found.value_at_quantile(0.75)));
        assert!(found.value_at_quantile(1.0) >= LATENCY_US_MAX);
    }

    #[test]
    fn cpu_is_divided_as_the_ticks_are() {
        let before = Cpu::default();
        let after = Cpu {
            total: Duration::from_micros(1000),
            user_ticks: 3,
            system_ticks: 1,
        };
        let cpu = after.us_since(&before, 100);
        assert_eq!((cpu.total, cpu.user, cpu.system), (10.0, 7.5, 2.5));
        // This thread's own: spinning is the program's time, and it is found.
        let before = Cpu::of_thread();
        // Seldom asked: the question is the kernel's time.
        while thread_cpu() < before.total + Duration::from_millis(200) {
            (0..1_000_000).for_each(|_| std::hint::spin_loop());
        }
        let cpu = Cpu::of_thread().us_since(&before, 1);
        assert!(cpu.total >= 200_000.0 && cpu.user > 0.0, "{cpu:?}");
    }

    #[test]
    fn the_interval_is_that_of_the_sign_test() {
        assert_eq!(
            [1, 4, 5, 8, 15, 25].map(sign_test_rank),
            [0, 0, 1, 2, 4, 8].map(|rank: usize| rank.min(25))
        );
        let ratio = Ratio::of((1..=15).map(f64::from).collect());
        assert_eq!(
            ratio,
            Ratio {
                median: 8.0,
                low: 5.0,
                high: 11.0
            }
        );
        assert_eq!(
            Ratio::of(vec![2.0, 1.0]),
            Ratio {
                median: 1.5,
                low: 1.0,
                high: 2.0
            }
        );
    }
}
