//! `kvar bench`: our speed as a ratio to a limit, in one run on one machine.
//!
//! Ours and the yardstick run in alternating order (ABBA), a few seconds each; a figure is the
//! median of the paired ratios with its 90 % interval. Idle CPU is looked at before each pair: a
//! machine that is not idle makes intervals wide, and an interval wider than 0.10 is no judgement.

pub(crate) mod engine;
mod fio;
pub(crate) mod net;
mod pair;
mod stats;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use stats::Ratio;

/// What every figure is about.
const BLOCK_BYTES: usize = 64 << 10;

/// Pairs a design figure takes.
pub(crate) const PAIRS: usize = 15;
/// Seconds of each half of a pair.
pub(crate) const SECONDS: f64 = 3.0;

/// Everything `kvar bench` reports, flat; what was not measured is null.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct BenchReport {
    pub(crate) read_64k_qd16_vs_fio: Option<f64>,
    pub(crate) read_64k_qd16_vs_fio_low: Option<f64>,
    pub(crate) read_64k_qd16_vs_fio_high: Option<f64>,
    pub(crate) read_64k_qd16_p50_vs_fio: Option<f64>,
    pub(crate) read_64k_qd16_p50_vs_fio_low: Option<f64>,
    pub(crate) read_64k_qd16_p50_vs_fio_high: Option<f64>,
    pub(crate) read_64k_qd1_vs_fio: Option<f64>,
    pub(crate) read_64k_qd1_vs_fio_low: Option<f64>,
    pub(crate) read_64k_qd1_vs_fio_high: Option<f64>,
    pub(crate) append_vs_fio: Option<f64>,
    pub(crate) append_vs_fio_low: Option<f64>,
    pub(crate) append_vs_fio_high: Option<f64>,
    pub(crate) write_amplification: Option<f64>,
    pub(crate) write_amplification_low: Option<f64>,
    pub(crate) write_amplification_high: Option<f64>,
    pub(crate) read_cpu_us: Option<f64>,
    pub(crate) read_cpu_us_low: Option<f64>,
    pub(crate) read_cpu_us_high: Option<f64>,
    pub(crate) get_64k_qd16_vs_checking_pair: Option<f64>,
    pub(crate) get_64k_qd16_vs_checking_pair_low: Option<f64>,
    pub(crate) get_64k_qd16_vs_checking_pair_high: Option<f64>,
    pub(crate) get_64k_qd16_vs_pair: Option<f64>,
    pub(crate) get_64k_qd16_vs_pair_low: Option<f64>,
    pub(crate) get_64k_qd16_vs_pair_high: Option<f64>,
    pub(crate) get_64k_qd1_p50_vs_ping: Option<f64>,
    pub(crate) get_64k_qd1_p50_vs_ping_low: Option<f64>,
    pub(crate) get_64k_qd1_p50_vs_ping_high: Option<f64>,
    pub(crate) get_64k_qd4_p99_us: Option<f64>,
    pub(crate) get_64k_qd4_p99_us_low: Option<f64>,
    pub(crate) get_64k_qd4_p99_us_high: Option<f64>,
    pub(crate) shm_64k_vs_memcpy: Option<f64>,
    pub(crate) shm_64k_vs_memcpy_low: Option<f64>,
    pub(crate) shm_64k_vs_memcpy_high: Option<f64>,
    pub(crate) shm_64k_qd1_p50_us: Option<f64>,
    pub(crate) shm_64k_qd1_p50_us_low: Option<f64>,
    pub(crate) shm_64k_qd1_p50_us_high: Option<f64>,
    pub(crate) flash_get_64k_qd16_vs_fio: Option<f64>,
    pub(crate) flash_get_64k_qd16_vs_fio_low: Option<f64>,
    pub(crate) flash_get_64k_qd16_vs_fio_high: Option<f64>,
    /// Share of all CPUs that was idle before the pairs, lowest.
    pub(crate) idle_cpu: Option<f64>,
}

/// What a benchmark found.
pub(crate) struct Outcome {
    pub(crate) report: BenchReport,
    pub(crate) rows: Vec<Row>,
}

/// A named figure of a report, for the table.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) ratio: Ratio,
    pub(crate) note: String,
}

/// A bar on standard error.
fn bar(steps: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:32} {pos}/{len} {elapsed}, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps).with_style(style).with_message(what)
}

/// Prints figures the way a person reads them.
pub(crate) fn print_table(rows: &[Row], idle_cpu: f64) {
    println!("{:<32} {:>8}  {:>17}", "figure", "median", "90 % interval");
    for row in rows {
        let Ratio { median, low, high } = row.ratio;
        let judged = if row.name.contains("_vs_") && high - low > 0.10 {
            "  (not judged: wider than 0.10)"
        } else {
            ""
        };
        println!(
            "{:<32} {median:>8.3}  [{low:>7.3} {high:>7.3}]  {}{judged}",
            row.name, row.note
        );
    }
    println!("lowest idle CPU before a pair: {:.0} %", idle_cpu * 100.0);
}

macro_rules! fill {
    ($report:expr, $name:ident, $low:ident, $high:ident, $ratio:expr) => {{
        let ratio: $crate::bench::stats::Ratio = $ratio;
        $report.$name = Some(ratio.median);
        $report.$low = Some(ratio.low);
        $report.$high = Some(ratio.high);
    }};
}
pub(crate) use fill;
