//! `kvar replay --verify JOURNAL`: reads back everything a replay was told is stored.
//!
//! What a node owes after a kill: every byte it returns is one complete put of that block; what was
//! acknowledged long enough ago (`--older-than`, twice the node's flush_after) and not evicted is
//! there; what was removed stays away. The first and the last are errors here; misses are counted
//! by age and left to the caller, who knows whether anything had to be evicted.

use crate::connect::connect;
use crate::failure::{Failure, Outcome};
use crate::print;
use crate::replay::journal::{History, Journal, Promise};
use crate::replay::online::is_failure;
use crate::replay::payload;
use crate::replay_arguments::ReplayArguments;
use kvar_base::BlockId;
use kvar_client::{GetItem, GetOutcome, GetResult};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Bytes of payload asked for in one call.
const CALL_BYTES_MAX: usize = 64 << 20;

/// What was found.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// Blocks acknowledged and not removed since.
    acknowledged: u64,
    acknowledged_bytes: u64,
    hits: u64,
    hit_bytes: u64,
    /// Of the acknowledged, by what the node said.
    misses: BTreeMap<&'static str, u64>,
    /// Of the acknowledged, by how long before the end they were acknowledged.
    misses_by_age: BTreeMap<&'static str, u64>,
    /// Acknowledged longer ago than `--older-than`.
    settled: u64,
    settled_hits: u64,
    settled_share_of_bytes: f64,
    /// Blocks whose removal was acknowledged.
    removed: u64,
    removed_but_back: u64,
    /// Blocks with something under way at the end; either state is right.
    open: u64,
    wrong_bytes: u64,
    failed_calls: u64,
}

/// Reads everything back and prints what was found. Fails on a wrong byte, a removed block that is
/// back, or a call that failed.
pub(crate) fn run(arguments: &ReplayArguments, path: &Path) -> Outcome {
    let journal = Journal::read(path).map_err(Failure::failed)?;
    let connected = connect(&arguments.node)?;
    let ended_us = arguments.killed_at_us.unwrap_or(journal.last_us);
    let older_us = u64::try_from(arguments.older_than.as_micros()).unwrap_or(u64::MAX);
    let mut report = Report::default();
    let mut ids: Vec<BlockId> = journal.blocks.keys().copied().collect();
    ids.sort();
    let blocks_a_call = (CALL_BYTES_MAX / journal.block_bytes.max(1)).clamp(1, 1024);
    for chunk in ids.chunks(blocks_a_call) {
        let items = chunk.iter().map(|id| GetItem::to_vec(*id)).collect();
        let results = connected.client.submit_get(items, connected.options).wait();
        report.failed_calls += u64::from(results.len() < chunk.len());
        for result in results {
            let history = &journal.blocks[&result.id];
            report.count(history, &result, journal.block_bytes, ended_us, older_us);
        }
    }
    if report.acknowledged_bytes > 0 {
        let settled_bytes = report.settled * journal.block_bytes as u64;
        report.settled_share_of_bytes = settled_bytes as f64 / report.acknowledged_bytes as f64;
    }
    if arguments.json {
        print::json(&report)?;
    } else {
        let value = serde_json::to_value(&report).unwrap_or_default();
        let rows = value.as_object().into_iter().flatten();
        let rows: Vec<Vec<String>> = rows
            .map(|(name, value)| vec![name.replace('_', " "), value.to_string()])
            .collect();
        print::named(&rows)?;
    }
    let Report {
        wrong_bytes,
        removed_but_back,
        failed_calls,
        ..
    } = report;
    if wrong_bytes + removed_but_back + failed_calls == 0 {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "{wrong_bytes} wrong bytes, {removed_but_back} removed blocks are back, {failed_calls} \
         calls failed"
    )))
}

impl Report {
    fn count(
        &mut self,
        history: &History,
        result: &GetResult,
        block_bytes: usize,
        ended_us: u64,
        older_us: u64,
    ) {
        let is_right = result.bytes().map(|bytes| {
            payload::verify(bytes, &result.id)
                .is_some_and(|nonce| history.foreign || history.nonces.contains(&nonce))
        });
        if is_right == Some(false) && history.promise != Promise::Removed {
            self.wrong_bytes += block_bytes as u64;
        }
        let miss = match &result.outcome {
            GetOutcome::Miss(reason) => Some(*reason),
            GetOutcome::Hit { .. } => None,
        };
        self.failed_calls += u64::from(miss.is_some_and(is_failure));
        match history.promise {
            Promise::Open => self.open += 1,
            Promise::Removed => {
                self.removed += 1;
                self.removed_but_back += u64::from(miss.is_none());
            }
            Promise::Acknowledged { at_us } => {
                let age_us = ended_us.saturating_sub(at_us);
                let is_settled = age_us > older_us;
                self.acknowledged += 1;
                self.acknowledged_bytes += block_bytes as u64;
                self.settled += u64::from(is_settled);
                match miss {
                    None => {
                        self.hits += 1;
                        self.hit_bytes += block_bytes as u64;
                        self.settled_hits += u64::from(is_settled);
                    }
                    Some(reason) => {
                        *self.misses.entry(reason.word()).or_default() += 1;
                        *self.misses_by_age.entry(age_word(age_us)).or_default() += 1;
                    }
                }
            }
        }
    }
}

fn age_word(age_us: u64) -> &'static str {
    match age_us {
        0..500_000 => "under_500ms",
        500_000..1_000_000 => "500ms_to_1s",
        1_000_000..2_000_000 => "1s_to_2s",
        2_000_000..5_000_000 => "2s_to_5s",
        _ => "over_5s",
    }
}
