//! `kvar replay`: a real trace against a node, or against the policy alone.
//!
//! | file | part |
//! |---|---|
//! | `source` | opening a trace |
//! | `offline` | the policy alone |
//! | `shared` | the policy alone, several traces in one store |
//! | `online` | a node: look up, get, check, put |
//! | `order` | which requests may run beside each other |
//! | `tally` | what is counted, and the report |
//! | `payload` | bytes that say which put they are from |
//! | `journal`, `verify` | what was acknowledged, and whether it is still there after a crash |

mod journal;
mod offline;
mod online;
mod order;
mod payload;
mod shared;
mod source;
mod tally;
mod verify;

use crate::failure::{Failure, Outcome};
use crate::replay_arguments::{OfflineAdmission, OfflineModel, OfflinePolicy, ReplayArguments};
use kvar_plan::{Admit, Model, Policy, TraceOptions};

/// Block size that `--offline --model engine` assumes when none is given.
const OFFLINE_BLOCK_BYTES: u64 = 64 << 10;

/// Runs the form of replay that was asked for.
pub(crate) fn run(arguments: &ReplayArguments) -> Outcome {
    let trace_options = TraceOptions {
        block_tokens: arguments.block_tokens,
        coarsen: arguments.coarsen,
    };
    if arguments.offline {
        let trace = arguments
            .trace
            .as_deref()
            .ok_or_else(|| Failure::usage("no trace given"))?;
        let policy = match arguments.policy {
            OfflinePolicy::Lru if arguments.model == OfflineModel::Engine => {
                let what = "--policy lru is for --model blocks: a node's flash is no LRU";
                return Err(Failure::usage(what));
            }
            OfflinePolicy::Lru | OfflinePolicy::Production => Policy::Production,
            OfflinePolicy::Optimum => Policy::Optimum,
            OfflinePolicy::Recent => Policy::Recent,
        };
        let is_shared = !arguments.beside.is_empty() || arguments.flood.is_some();
        if is_shared {
            return shared::run(arguments, trace, &trace_options);
        }
        if !arguments.share.is_empty() {
            let what = "--share weighs several traces: give --beside TRACE or --flood TIMES, too";
            return Err(Failure::usage(what));
        }
        return offline::run(offline::OfflineRequest {
            policy,
            admit: match arguments.admission {
                OfflineAdmission::Worth => Admit::ByWorth,
                OfflineAdmission::All => Admit::All,
            },
            warmup_share: arguments.warmup_share,
            trace,
            trace_options,
            capacities: arguments.capacity.clone(),
            big: arguments.big.clone(),
            model: match arguments.model {
                OfflineModel::Blocks => Model::Blocks,
                OfflineModel::Engine => Model::Engine,
            },
            dram_share: arguments.dram_share,
            block_bytes: arguments
                .block_bytes
                .map_or(OFFLINE_BLOCK_BYTES, |bytes| bytes.0),
            json: arguments.json,
        });
    }
    if let Some(journal) = &arguments.verify {
        return verify::run(arguments, journal);
    }
    let trace = arguments
        .trace
        .as_deref()
        .ok_or_else(|| Failure::usage("no trace given"))?;
    let block_bytes = arguments
        .block_bytes
        .ok_or_else(|| Failure::usage("say how large a block is: --block-bytes 64KiB"))?;
    online::run(arguments, trace, &trace_options, block_bytes)
}
