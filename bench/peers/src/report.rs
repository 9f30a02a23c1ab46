//! What the rounds gave, as a table or as JSON.

use crate::child::Fill;
use crate::measure::{Interval, Reads};
use crate::{Arguments, DEPTHS, VALUE_BYTES};
use anyhow::Result;
use serde_json::json;

/// What one store reached.
pub(crate) struct Found {
    pub(crate) fill: Fill,
    /// CPU seconds a second while nobody reads, one a round.
    pub(crate) idle: Vec<f64>,
    /// One row of rounds for each depth.
    pub(crate) runs: [Vec<Reads>; DEPTHS.len()],
}

impl Found {
    pub(crate) fn new(fill: Fill) -> Self {
        Self {
            fill,
            idle: Vec::new(),
            runs: Default::default(),
        }
    }
}

/// One store at one depth; ratios are to kvar, round by round.
struct Line {
    store: &'static str,
    depth: usize,
    bytes_per_s: Interval,
    p50_us: Interval,
    p99_us: Interval,
    cpu_us: Interval,
    cpu_gross_us: Interval,
    rate_ratio: Interval,
    cpu_ratio: Interval,
    cpu_gross_ratio: Interval,
}

impl Line {
    fn of(store: &'static str, depth: usize, runs: &[Reads], kvar: &[Reads]) -> Self {
        let of = |figure: fn(&Reads) -> f64| Interval::of(runs.iter().map(figure).collect());
        let ratio = |figure: fn(&Reads) -> f64| {
            let pairs = runs.iter().zip(kvar);
            Interval::of(
                pairs
                    .map(|(run, ours)| figure(run) / figure(ours))
                    .collect(),
            )
        };
        Self {
            store,
            depth,
            bytes_per_s: of(|run| run.bytes_per_s),
            p50_us: of(|run| run.p50_us),
            p99_us: of(|run| run.p99_us),
            cpu_us: of(|run| run.cpu_us),
            cpu_gross_us: of(|run| run.cpu_gross_us),
            rate_ratio: ratio(|run| run.bytes_per_s),
            cpu_ratio: ratio(|run| run.cpu_us),
            cpu_gross_ratio: ratio(|run| run.cpu_gross_us),
        }
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "store": self.store,
            "depth": self.depth,
            "value_bytes": VALUE_BYTES,
            "bytes_per_s": self.bytes_per_s,
            "p50_us": self.p50_us,
            "p99_us": self.p99_us,
            "cpu_us": self.cpu_us,
            "cpu_gross_us": self.cpu_gross_us,
            "bytes_per_s_ratio_to_kvar": self.rate_ratio,
            "cpu_ratio_to_kvar": self.cpu_ratio,
            "cpu_gross_ratio_to_kvar": self.cpu_gross_ratio,
        })
    }
}

pub(crate) fn print(names: &[&'static str], found: &[Found], arguments: &Arguments) -> Result<()> {
    let mut lines = Vec::new();
    for (at, depth) in DEPTHS.into_iter().enumerate() {
        for (name, store) in names.iter().zip(found) {
            lines.push(Line::of(name, depth, &store.runs[at], &found[0].runs[at]));
        }
    }
    if arguments.json {
        let stores: Vec<_> = names
            .iter()
            .zip(found)
            .map(|(name, store)| {
                json!({
                    "store": name,
                    "fill": store.fill,
                    "idle_cpu": Interval::of(store.idle.clone()),
                })
            })
            .collect();
        let reads: Vec<_> = lines.iter().map(Line::json).collect();
        let report = json!({
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "values": arguments.values,
            "stores": stores,
            "reads": reads,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    println!(
        "{:<12} {:>5} {:>7} {:>8} {:>8} {:>8} {:>8}   {:<20} {:<20}",
        "store",
        "depth",
        "GB/s",
        "p50 us",
        "p99 us",
        "CPU us",
        "gross",
        "GB/s : kvar",
        "CPU : kvar"
    );
    for line in &lines {
        println!(
            "{:<12} {:>5} {:>7.3} {:>8.0} {:>8.0} {:>8.1} {:>8.1}   {:<20} {:<20}",
            line.store,
            line.depth,
            line.bytes_per_s.median / 1e9,
            line.p50_us.median,
            line.p99_us.median,
            line.cpu_us.median,
            line.cpu_gross_us.median,
            line.rate_ratio.to_string(),
            line.cpu_ratio.to_string(),
        );
    }
    for (name, store) in names.iter().zip(found) {
        let Fill {
            bytes_per_s,
            cpu_us,
            write_amplification,
        } = store.fill;
        println!(
            "{name}: filled at {:.2} GB/s, {cpu_us:.0} us CPU a value, {write_amplification:.3} bytes \
             written for each; idle {:.1} % of a core",
            bytes_per_s / 1e9,
            Interval::of(store.idle.clone()).median * 100.0
        );
    }
    Ok(())
}
