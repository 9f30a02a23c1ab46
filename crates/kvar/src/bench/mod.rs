//! `kvar bench`: our speed as a ratio to a limit, in one run on one machine.
//!
//! Ours and the yardstick run in alternating order (ABBA: the order turns with every pair), a few
//! seconds each; a figure is the median of the paired ratios with its 90 % interval. Idle CPU is looked at before each pair: a
//! machine that is not idle makes intervals wide, and an interval wider than 0.10 is no judgement.

pub(crate) mod engine;
mod fio;
pub(crate) mod index;
pub(crate) mod layers;
mod load;
pub(crate) mod net;
pub(crate) mod node;
mod pair;
pub(crate) mod plot;
mod shared;
mod stats;

use crate::failure::Failure;
use indicatif::{ProgressBar, ProgressStyle};
use stats::Ratio;

/// What every figure is about.
const BLOCK_BYTES: usize = 64 << 10;

/// Pairs a design figure takes.
pub(crate) const PAIRS: usize = 15;
/// Seconds of each half of a pair.
pub(crate) const SECONDS: f64 = 3.0;

/// The figures that a report always names; what was not measured is null.
const FIGURES: &[&str] = &[
    "read_64k_qd16_vs_fio",
    "read_64k_qd16_p50_vs_fio",
    "read_64k_qd1_vs_fio",
    "append_vs_fio",
    "write_amplification",
    "read_cpu_us",
    "read_cpu_user_us",
    "read_cpu_system_us",
    "read_qd1_cpu_us",
    "append_cpu_us",
    "append_cpu_user_us",
    "append_cpu_system_us",
    "get_64k_qd16_vs_checking_pair",
    "get_64k_qd16_vs_pair",
    "get_64k_qd1_p50_vs_ping",
    "get_64k_qd4_p99_us",
    "shm_64k_vs_memcpy",
    "shm_64k_qd1_p50_us",
    "flash_get_64k_qd16_vs_fio",
];

/// What a benchmark found: ratios to the yardsticks, and the absolute medians behind them, without
/// which nobody could tell a fast store from a slow yardstick.
pub(crate) struct Outcome {
    pub(crate) rows: Vec<Row>,
    /// Share of all CPUs that was idle before the pairs, lowest.
    pub(crate) idle_cpu: f64,
}

impl Outcome {
    pub(crate) fn new(rows: Vec<Row>, idle: &[f64]) -> Self {
        let idle_cpu = idle.iter().copied().fold(1.0, f64::min);
        Self { rows, idle_cpu }
    }

    /// One flat object: each figure with its 90 % interval as `NAME_low` and `NAME_high`.
    pub(crate) fn json(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut report = serde_json::Map::new();
        let mut put = |name: &str, ratio: Option<Ratio>| {
            report.insert(name.to_owned(), ratio.map(|ratio| ratio.median).into());
            report.insert(format!("{name}_low"), ratio.map(|ratio| ratio.low).into());
            report.insert(format!("{name}_high"), ratio.map(|ratio| ratio.high).into());
        };
        FIGURES.iter().for_each(|name| put(name, None));
        for row in &self.rows {
            put(row.name, Some(row.ratio));
        }
        report.insert("idle_cpu".to_owned(), self.idle_cpu.into());
        report
    }
}

/// A named figure of a report.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) ratio: Ratio,
    /// One a pair, in their order.
    pub(crate) values: Vec<f64>,
    pub(crate) note: &'static str,
}

impl Row {
    /// From what the pairs gave.
    pub(crate) fn of(name: &'static str, values: Vec<f64>, note: &'static str) -> Self {
        let ratio = Ratio::of(values.clone());
        Self {
            name,
            ratio,
            values,
            note,
        }
    }
}

/// Runs both in an order that changes from pair to pair, so that drift hits both alike.
fn abba<A, B>(
    pair: usize,
    first: impl FnOnce() -> Result<A, Failure>,
    second: impl FnOnce() -> Result<B, Failure>,
) -> Result<(A, B), Failure> {
    if pair.is_multiple_of(2) {
        let a = first()?;
        Ok((a, second()?))
    } else {
        let b = second()?;
        Ok((first()?, b))
    }
}

/// A bar on standard error.
fn bar(steps: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:32} {pos}/{len} {elapsed}, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps).with_style(style).with_message(what)
}

/// Prints figures the way a person reads them.
pub(crate) fn print_table(found: &Outcome) {
    println!("{:<36} {:>8}  {:>19}", "figure", "median", "90 % interval");
    for row in &found.rows {
        let Ratio { median, low, high } = row.ratio;
        let judged = if row.name.contains("_vs_") && high - low > 0.10 {
            "  (not judged: wider than 0.10)"
        } else {
            ""
        };
        println!(
            "{:<36} {median:>8.4}  [{low:>8.4} {high:>8.4}]  {}{judged}",
            row.name, row.note
        );
    }
    println!(
        "lowest idle CPU before a pair: {:.0} %",
        found.idle_cpu * 100.0
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_names_every_figure_and_what_was_not_measured_is_null() {
        let rows = vec![Row::of("append_vs_fio", vec![0.5, 0.7, 0.6], "")];
        let report = Outcome::new(rows, &[0.9, 0.8]).json();
        assert_eq!(report["append_vs_fio"], 0.6);
        assert_eq!(report["append_vs_fio_low"], 0.5);
        assert_eq!(report["append_vs_fio_high"], 0.7);
        assert_eq!(report["idle_cpu"], 0.8);
        assert!(report["shm_64k_vs_memcpy"].is_null());
        assert_eq!(report.len(), FIGURES.len() * 3 + 1);
    }
}
