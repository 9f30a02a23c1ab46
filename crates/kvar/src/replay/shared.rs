//! `kvar replay --offline --beside`, `--flood`: several traces in one store, as namespaces of it.

use super::OFFLINE_BLOCK_BYTES;
use crate::failure::{Failure, Outcome};
use crate::print;
use crate::replay::source::read_trace;
use crate::replay_arguments::{OfflineAdmission, OfflineModel, OfflinePolicy, ReplayArguments};
use kvar_plan::{Admit, Capacity, Share, SharedOptions, Trace, TraceOptions, flood, replay_shared};
use std::path::Path;

/// Replays and prints.
pub(crate) fn run(
    arguments: &ReplayArguments,
    first: &Path,
    trace_options: &TraceOptions,
) -> Outcome {
    if arguments.model != OfflineModel::Engine || arguments.policy != OfflinePolicy::Production {
        return Err(Failure::usage(
            "namespaces share a store of the engine: add --model engine, and leave --policy out",
        ));
    }
    if !arguments.big.is_empty() {
        return Err(Failure::usage(
            "--big is for one trace: leave --beside and --flood out",
        ));
    }
    if arguments.warmup_share > 0.0 {
        return Err(Failure::usage("--warmup-share is for one trace"));
    }
    let read = |path: &Path| read_trace(path, trace_options).map_err(Failure::failed);
    let mut traces: Vec<(String, Trace)> = Vec::new();
    for path in [first]
        .into_iter()
        .chain(arguments.beside.iter().map(AsRef::as_ref))
    {
        traces.push((path.display().to_string(), read(path)?));
    }
    if let Some(times) = arguments.flood {
        let one_time = flood(&traces[0].1, times);
        traces.push((format!("flood {times}"), one_time));
    }
    if arguments.share.len() > traces.len() {
        return Err(Failure::usage(format!(
            "{} weights for {} traces: give --share once for each at most",
            arguments.share.len(),
            traces.len()
        )));
    }
    let weight = |number: usize| arguments.share.get(number).copied().unwrap_or(1);
    let shares: Vec<Share<'_>> = (0..)
        .zip(&traces)
        .map(|(number, (_, trace))| Share {
            trace,
            weight: weight(number),
        })
        .collect();
    let capacities = match &arguments.capacity[..] {
        [] => [5.0, 10.0, 20.0, 50.0].map(Capacity::Percent).to_vec(),
        given => given.to_vec(),
    };
    let options = SharedOptions {
        capacities,
        dram_share: arguments.dram_share,
        block_bytes: arguments
            .block_bytes
            .map_or(OFFLINE_BLOCK_BYTES, |bytes| bytes.0),
        admit: match arguments.admission {
            OfflineAdmission::Worth => Admit::ByWorth,
            OfflineAdmission::All => Admit::All,
        },
    };
    let report = replay_shared(&shares, &options).map_err(Failure::usage)?;
    if arguments.json {
        return print::json(&report);
    }
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let head = [
        "capacity",
        "trace",
        "share",
        "alone on it",
        "beside the others",
        "with shares",
        "flash writes",
        "write amp.",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for row in &report.rows {
        let mut cells = vec![
            row.capacity_blocks.to_string(),
            traces[row.tenant].0.clone(),
            weight(row.tenant).to_string(),
            percent(row.alone),
            percent(row.without_shares),
            percent(row.with_shares),
        ];
        let mut writes = report.writes.iter();
        let writes = writes.find(|it| it.capacity_blocks == row.capacity_blocks);
        // Of the store, not of the trace: once.
        if let Some(writes) = writes.filter(|_| row.tenant == 0) {
            let [without, with] = writes.blocks;
            let [amp_without, amp_with] = writes.amplification;
            cells.push(format!("{without} -> {with}"));
            cells.push(format!("{amp_without:.2} -> {amp_with:.2}"));
        } else {
            cells.extend([String::new(), String::new()]);
        }
        rows.push(cells);
    }
    print::table(&rows)
}
