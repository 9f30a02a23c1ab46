//! Several traces in one store: what each keeps beside the others, with shares and without.
//!
//! ```text
//!   chat   ──┐ by time                       alone, on its part of the store
//!   flood  ──┴──> one row of requests ──>    together, as one tenant
//!                                            together, each within its part
//! ```
//!
//! The model is the one of `kvar replay --offline --model engine`, the shares are the engine's.
//!
//! What must always be true: the same traces and options give the same report; ids of different
//! traces are different blocks; alone means with the policy and the room that its share comes to.

use crate::engine_model::FlashShape;
use crate::learned_model::LearnedModel;
use crate::offline::{Admit, Capacity, Numbered, OfflineError, Tally};
use crate::trace::{Request, Trace};
use kvar_policy::{Shares, TENANTS, Tenant};
use serde::Serialize;
use std::collections::HashMap;

/// One trace, and what its tenant weighs.
#[derive(Clone, Copy, Debug)]
pub struct Share<'a> {
    /// The requests.
    pub trace: &'a Trace,
    /// Its weight.
    pub weight: u32,
}

/// What one trace reaches at one capacity.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SharedRow {
    /// Blocks the store could hold.
    pub capacity_blocks: u64,
    /// Which trace.
    pub tenant: usize,
    /// Hits per block looked up, alone on its part.
    pub alone: f64,
    /// Beside the others, all as one tenant.
    pub without_shares: f64,
    /// Beside the others, each within its part.
    pub with_shares: f64,
}

/// What the store writes at one capacity, in blocks and per block put in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SharedWrites {
    /// Blocks the store could hold.
    pub capacity_blocks: u64,
    /// Blocks written without shares, and with.
    pub blocks: [u64; 2],
    /// Write amplification without shares, and with.
    pub amplification: [f64; 2],
}

/// What several traces reach in one store.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SharedReport {
    /// A row a capacity and trace.
    pub rows: Vec<SharedRow>,
    /// A row a capacity.
    pub writes: Vec<SharedWrites>,
    /// Different blocks of each trace.
    pub distinct_blocks: Vec<u64>,
}

/// How to replay; capacities in per cent are of the first trace's distinct blocks.
#[derive(Clone, Debug)]
pub struct SharedOptions {
    /// As in [`OfflineOptions`](crate::OfflineOptions).
    pub capacities: Vec<Capacity>,
    /// DRAM as a share (0..=1) of the first trace's distinct blocks; at most half of the capacity.
    pub dram_share: f64,
    /// Bytes of a block, padding included.
    pub block_bytes: u64,
    /// When a block is written.
    pub admit: Admit,
}

/// One-time blocks at the pace of a trace: `times` as many as it asks for, none of them ever again.
#[must_use]
pub fn flood(trace: &Trace, times: f64) -> Trace {
    let mut next = 0_u64;
    let mut owed = 0.0;
    let mut requests = Vec::with_capacity(trace.requests.len());
    for request in &trace.requests {
        owed += request.hash_ids.len() as f64 * times.max(0.0);
        let count = owed as u64;
        owed -= count as f64;
        requests.push(Request {
            timestamp_ms: request.timestamp_ms,
            input_length: count * trace.block_tokens,
            output_length: 0,
            hash_ids: (next..next + count).collect(),
            lookup_blocks: count as usize,
            session: None,
            parent: None,
            turn: None,
            traffic_class: 0,
        });
        next += count;
    }
    Trace {
        requests,
        ..trace.clone()
    }
}

/// All requests in the order of their times, ids told apart by trace; and whose each request is.
fn merged(shares: &[Share<'_>]) -> (Trace, Vec<usize>) {
    let mut order: Vec<(u64, usize, usize)> = Vec::new();
    for (tenant, share) in shares.iter().enumerate() {
        let requests = share.trace.requests.iter().enumerate();
        order.extend(requests.map(|(at, request)| (request.timestamp_ms, tenant, at)));
    }
    // Of one moment in the order of the traces; within a trace as in its file.
    order.sort_by_key(|(time, tenant, _)| (*time, *tenant));
    let mut numbers: HashMap<(usize, u64), u64> = HashMap::new();
    let mut requests = Vec::with_capacity(order.len());
    for (_, tenant, at) in &order {
        let mut request = shares[*tenant].trace.requests[*at].clone();
        for id in &mut request.hash_ids {
            let next = numbers.len() as u64;
            *id = *numbers.entry((*tenant, *id)).or_insert(next);
        }
        requests.push(request);
    }
    let whose = order.into_iter().map(|(_, tenant, _)| tenant).collect();
    let trace = Trace {
        requests,
        ..shares[0].trace.clone()
    };
    (trace, whose)
}

fn tenant(number: usize) -> Tenant {
    Tenant::new(number as u32).unwrap_or_default()
}

/// Replays the traces in one store.
///
/// # Errors
/// Options that mean nothing, no trace or too many of them (see [`OfflineError`]).
pub fn replay_shared(
    shares: &[Share<'_>],
    options: &SharedOptions,
) -> Result<SharedReport, OfflineError> {
    if !(1..=TENANTS).contains(&shares.len()) {
        return Err(OfflineError::Traces(shares.len()));
    }
    crate::offline::check(options.dram_share, options.block_bytes, &options.capacities)?;
    let alone: Vec<Numbered<'_>> = shares
        .iter()
        .map(|share| Numbered::new(share.trace, 0.0))
        .collect::<Result<_, _>>()?;
    let (trace, whose) = merged(shares);
    let together = Numbered::new(&trace, 0.0)?;
    let mut tenants = vec![Tenant::DEFAULT; together.distinct as usize];
    for (request, range) in together.ranges.iter().enumerate() {
        for block in &together.blocks[range.clone()] {
            tenants[*block as usize] = tenant(whose[request]);
        }
    }
    let mut weights = Shares::none();
    for (number, share) in shares.iter().enumerate() {
        weights.set(tenant(number), share.weight);
    }
    let all: f64 = shares.iter().map(|share| f64::from(share.weight)).sum();
    let dram_all = alone[0].distinct as f64 * options.dram_share;

    let mut report = SharedReport {
        rows: Vec::new(),
        writes: Vec::new(),
        distinct_blocks: alone.iter().map(|one| one.distinct).collect(),
    };
    for capacity in &options.capacities {
        let capacity_blocks = capacity.blocks(alone[0].distinct);
        // A part of the store: so much of memory and of flash.
        let model = |distinct: u64, part: f64| {
            let blocks = ((capacity_blocks as f64 * part) as u64).max(1);
            let dram_blocks = ((dram_all * part) as u64).min(blocks / 2);
            let shape = FlashShape::new(blocks - dram_blocks, options.block_bytes);
            LearnedModel::new(distinct, dram_blocks, shape, options.admit)
        };
        let run = |mut store: LearnedModel| -> Vec<Tally> {
            together.replay_by(&mut store, shares.len(), |request| whose[request])
        };
        let without = run(model(together.distinct, 1.0));
        let with = run(model(together.distinct, 1.0).shared(tenants.clone(), weights.clone()));
        for (number, share) in shares.iter().enumerate() {
            let part = f64::from(share.weight) / all.max(1.0);
            let mut store = model(alone[number].distinct, part);
            let alone = alone[number].replay_by(&mut store, 1, |_| 0);
            report.rows.push(SharedRow {
                capacity_blocks,
                tenant: number,
                alone: alone[0].block_hit_rate(),
                without_shares: without[number].block_hit_rate(),
                with_shares: with[number].block_hit_rate(),
            });
        }
        let writes = [without[0].writes, with[0].writes];
        report.writes.push(SharedWrites {
            capacity_blocks,
            blocks: writes.map(crate::offline::Writes::total),
            amplification: writes.map(crate::offline::Writes::amplification),
        });
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Coverage;

    fn trace(requests: impl Iterator<Item = (u64, Vec<u64>)>) -> Trace {
        let requests = requests.map(|(timestamp_ms, hash_ids)| Request {
            timestamp_ms,
            input_length: hash_ids.len() as u64 * 16,
            output_length: 0,
            lookup_blocks: hash_ids.len(),
            hash_ids,
            session: None,
            parent: None,
            turn: None,
            traffic_class: 0,
        });
        Trace {
            requests: requests.collect(),
            block_tokens: 16,
            block_tokens_guessed: false,
            coverage: Coverage::WholeBlocks,
        }
    }

    /// Prompts of eight blocks that come back in turn, five hundred blocks in all.
    fn chat() -> Trace {
        let prompts = (0..4000_u64).map(|at| {
            let prompt = at * 7 % 64;
            (at * 10, (prompt * 8..prompt * 8 + 8).collect())
        });
        trace(prompts)
    }

    fn options(blocks: u64, admit: Admit) -> SharedOptions {
        SharedOptions {
            capacities: vec![Capacity::Blocks(blocks)],
            dram_share: 0.1,
            block_bytes: 64 << 10,
            admit,
        }
    }

    #[test]
    fn a_flood_takes_nothing_from_who_is_within_its_part() {
        let chat = chat();
        let flood = flood(&chat, 4.0);
        assert_eq!(flood.requests.len(), chat.requests.len());
        let (own, other) = (
            Share {
                trace: &chat,
                weight: 1,
            },
            Share {
                trace: &flood,
                weight: 1,
            },
        );
        for admit in [Admit::All, Admit::ByWorth] {
            let report = replay_shared(&[own, other], &options(2000, admit)).unwrap();
            assert_eq!(report.distinct_blocks, [512, 128_000]);
            let [chat, flood] = &report.rows[..] else {
                panic!("{report:?}")
            };
            assert!(chat.alone > 0.98, "{chat:?}");
            assert!(chat.with_shares > chat.alone - 0.01, "{chat:?}");
            assert!(flood.with_shares < 0.001, "{flood:?}");
        }
    }

    #[test]
    fn one_trace_is_not_shared() {
        let chat = chat();
        let share = Share {
            trace: &chat,
            weight: 3,
        };
        let report = replay_shared(&[share], &options(300, Admit::ByWorth)).unwrap();
        let row = &report.rows[0];
        assert_eq!(row.alone, row.without_shares);
        assert_eq!(row.alone, row.with_shares);
        assert_eq!(report.writes[0].blocks[0], report.writes[0].blocks[1]);
        let none = replay_shared(&[], &options(300, Admit::ByWorth));
        assert_eq!(none, Err(OfflineError::Traces(0)));
    }
}
