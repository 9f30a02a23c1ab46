//! `kvar replay --offline`: hit rate against capacity, with the policy alone and no node.

use crate::failure::{Failure, Outcome};
use crate::print;
use crate::replay::source::read_trace;
use kvar_plan::{
    Admit, Capacity, Model, OfflineOptions, OfflineRow, Policy, TraceOptions, replay_offline,
};
use std::path::Path;

/// What `kvar replay --offline` was asked for.
pub(crate) struct OfflineRequest<'a> {
    pub(crate) trace: &'a Path,
    pub(crate) trace_options: TraceOptions,
    pub(crate) capacities: Vec<Capacity>,
    pub(crate) big: Vec<Capacity>,
    pub(crate) model: Model,
    pub(crate) policy: Policy,
    pub(crate) admit: Admit,
    pub(crate) warmup_share: f64,
    pub(crate) dram_share: f64,
    pub(crate) block_bytes: u64,
    pub(crate) json: bool,
}

/// Replays and prints.
pub(crate) fn run(request: OfflineRequest<'_>) -> Outcome {
    let trace = read_trace(request.trace, &request.trace_options).map_err(Failure::failed)?;
    let mut options = OfflineOptions {
        model: request.model,
        policy: request.policy,
        admit: request.admit,
        warmup_share: request.warmup_share,
        dram_share: request.dram_share,
        block_bytes: request.block_bytes,
        big: request.big,
        ..OfflineOptions::default()
    };
    if !request.capacities.is_empty() {
        options.capacities = request.capacities;
    }
    let report = replay_offline(&trace, &options).map_err(Failure::usage)?;
    if request.json {
        return print::json(&report);
    }
    let guessed = if trace.block_tokens_guessed {
        " (derived from the lengths)"
    } else {
        ""
    };
    print::line(&format!(
        "{} requests, {} distinct blocks of {} tokens{guessed}; ceiling {:.1} % of blocks, {:.1} % \
         of tokens\n",
        report.requests,
        report.distinct_blocks,
        report.block_tokens,
        report.ceiling_block_hit_rate * 100.0,
        report.ceiling_token_hit_rate * 100.0,
    ))?;
    let head = [
        "capacity",
        "blocks",
        "block hits",
        "token hits",
        "flash writes",
        "write amp.",
    ];
    let big_head = [
        "big tier",
        "big blocks",
        "in fast",
        "in big",
        "offered",
        "taken",
        "big writes",
        "big w. amp.",
    ];
    let has_big = report.rows.iter().any(|row| row.big.is_some());
    let shown = if has_big { &big_head[..] } else { &[] };
    let words = head.iter().chain(shown);
    let mut rows = vec![words.map(|word| (*word).to_owned()).collect()];
    rows.extend(report.rows.iter().map(cells));
    print::table(&rows)
}

fn cells(row: &OfflineRow) -> Vec<String> {
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let mut cells = vec![
        percent(row.capacity_share),
        row.capacity_blocks.to_string(),
        percent(row.block_hit_rate),
        percent(row.token_hit_rate),
        row.flash_write_blocks.to_string(),
        format!("{:.2}", row.write_amplification),
    ];
    if let Some(big) = &row.big {
        cells.extend([
            percent(big.capacity_share),
            big.capacity_blocks.to_string(),
            percent(big.fast_block_hit_rate),
            percent(big.block_hit_rate),
            big.offered_blocks.to_string(),
            big.taken_blocks.to_string(),
            big.flash_write_blocks.to_string(),
            format!("{:.2}", big.write_amplification),
        ]);
    }
    cells
}
