//! What can be said about a replay: which trace, at what pace, through a node or through the policy
//! alone.

use crate::arguments::{NodeArguments, duration};
use clap::{Args, ValueEnum};
use kvar_base::ByteSize;
use kvar_plan::Capacity;
use std::path::PathBuf;
use std::time::Duration;

/// When requests of a trace go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pace {
    /// At the trace's own times.
    Real,
    /// As fast as they are answered.
    Fast,
}

/// Which store `--offline` replays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OfflineModel {
    /// The pure policy over unit blocks.
    Blocks,
    /// DRAM tier, segments, reserve and rewriting, as the engine does.
    Engine,
}

/// Who decides what stays, in `--offline`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OfflinePolicy {
    /// What a node runs; with --model blocks that is LRU with tails first.
    Production,
    /// LRU with tails first (--model blocks).
    Lru,
    /// Who knows the future (--model blocks): no policy can do better.
    Optimum,
    /// What was used recently (--model engine): what nodes ran before worth was learned.
    Recent,
}

/// When a block is written to flash, in `--offline --model engine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OfflineAdmission {
    /// When it leaves memory, if it is worth a place then: a node whose write budget is short.
    Worth,
    /// At its put: a node whose write budget has plenty.
    All,
}

/// `kvar replay`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ReplayArguments {
    #[command(flatten)]
    pub(crate) node: NodeArguments,
    /// The trace: Mooncake or Qwen-Bailian form, one JSON object a line, zstd or plain; - is
    /// standard input.
    #[arg(value_name = "TRACE", required_unless_present = "verify")]
    pub(crate) trace: Option<PathBuf>,
    /// Bytes of one block. (Offline, for --model engine: default 64KiB.)
    #[arg(long, value_name = "SIZE", required_unless_present_any = ["offline", "verify"])]
    pub(crate) block_bytes: Option<ByteSize>,
    /// Sections of one block.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1008))]
    pub(crate) sections: u16,
    /// How many blocks of the trace make one.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) coarsen: usize,
    /// Tokens of one block in the trace, where the lengths do not tell.
    #[arg(long, value_name = "N")]
    pub(crate) block_tokens: Option<u64>,
    /// Requests under way at once. More than one keeps the order that counts: a request's puts are
    /// acknowledged before a later one that shares a block looks up.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) concurrency: u16,
    /// Whether requests wait for their time in the trace.
    #[arg(long, value_enum, default_value_t = Pace::Fast)]
    pub(crate) pace: Pace,
    /// Only the first N requests.
    #[arg(long, value_name = "N")]
    pub(crate) requests: Option<usize>,
    /// Remove a block that was put earlier after every N-th request (crash tests; hit rates fall
    /// below the ceiling then).
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) remove_every: usize,
    /// Write what is acknowledged to this file as it is.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["offline", "verify"])]
    pub(crate) journal: Option<PathBuf>,
    /// Read every block of a journal back instead of replaying.
    #[arg(long, value_name = "JOURNAL", conflicts_with_all = ["trace", "offline"])]
    pub(crate) verify: Option<PathBuf>,
    /// With --verify: blocks acknowledged longer than this before the end count as settled.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = duration)]
    pub(crate) older_than: Duration,
    /// With --verify: when the node was killed, in microseconds of the monotonic clock (default:
    /// the journal's last line).
    #[arg(long, value_name = "US")]
    pub(crate) killed_at_us: Option<u64>,
    /// Replay the policy alone, without a node.
    #[arg(long)]
    pub(crate) offline: bool,
    /// Offline: a capacity in blocks (9139) or as a share of the distinct blocks (5%); repeatable.
    #[arg(long, value_name = "BLOCKS|SHARE%", requires = "offline")]
    pub(crate) capacity: Vec<Capacity>,
    /// Offline: which store.
    #[arg(long, value_enum, default_value_t = OfflineModel::Blocks, requires = "offline")]
    pub(crate) model: OfflineModel,
    /// Offline: who decides what stays.
    #[arg(long, value_enum, default_value_t = OfflinePolicy::Production, requires = "offline")]
    pub(crate) policy: OfflinePolicy,
    /// Offline, --model engine: when a block is written to flash.
    #[arg(long, value_enum, default_value_t = OfflineAdmission::Worth, requires = "offline")]
    pub(crate) admission: OfflineAdmission,
    /// Offline: the share of the requests that warm the store up and are not counted.
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.0,
        requires = "offline"
    )]
    pub(crate) warmup_share: f64,
    /// Offline, --model engine: DRAM as a share of the distinct blocks.
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.02,
        requires = "offline"
    )]
    pub(crate) dram_share: f64,
    /// Offline, --model engine: a second, big tier of flash below each --capacity, in blocks or as a share of
    /// the distinct blocks; repeatable. What the fast tier does not keep is offered to it, and it takes
    /// what its own policy thinks worth a place. Memory stays what it was: a quarter of it is the big
    /// tier's. To see whether a larger fast tier would do as well, replay the sum as --capacity.
    #[arg(long, value_name = "BLOCKS|SHARE%", requires = "offline")]
    pub(crate) big: Vec<Capacity>,
    /// Offline, --model engine: another trace in the same store, as a namespace of its own; repeatable.
    /// Prints what each reaches alone on its share, beside the others, and beside them with shares.
    #[arg(long, value_name = "TRACE", requires = "offline")]
    pub(crate) beside: Vec<PathBuf>,
    /// The same with so many one-time blocks for each block the trace asks for.
    #[arg(long, value_name = "TIMES", requires = "offline", value_parser = times)]
    pub(crate) flood: Option<f64>,
    /// Weight of each trace in turn: TRACE, those --beside it, the flood. 1 where none is given.
    #[arg(long, value_name = "N", requires = "offline", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) share: Vec<u32>,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

fn times(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|times| (0.01..=1000.0).contains(times))
        .ok_or_else(|| format!("{text:?} is no number from 0.01 to 1000"))
}
