//! What can be said about blocks: how one is kept, what is known of its use, which are promised.

use crate::arguments::{NodeArguments, duration};
use clap::{Args, Subcommand};
use kvar_base::{BlockId, LeaseToken};
use kvar_client::PutHints;
use std::time::Duration;

/// `kvar put`.
#[derive(Clone, Debug, Args)]
pub(crate) struct PutArguments {
    /// Name of the block (left out with --id), then the file, or - for standard input.
    #[arg(value_names = ["NAME", "FILE"], num_args = 1..=2, required = true)]
    pub(crate) words: Vec<String>,
    /// Id of the block (64 hex digits) instead of a name.
    #[arg(long, value_name = "HEX")]
    pub(crate) id: Option<BlockId>,
    /// Answer only when it survives a power cut.
    #[arg(long)]
    pub(crate) durable: bool,
    #[command(flatten)]
    pub(crate) hints: HintArguments,
}

/// What the writer knows about a block's use. Nothing of it changes what a get returns; it helps the
/// node to keep what is worth most.
#[derive(Clone, Debug, Args)]
pub(crate) struct HintArguments {
    /// How long it lives, in whole seconds or more; without it, until it makes room for others.
    #[arg(long, value_name = "DURATION", value_parser = time_to_live)]
    ttl: Option<u32>,
    /// Keep it in memory only: it is not worth a write to flash.
    #[arg(long)]
    ephemeral: bool,
    /// It is written to be read once, soon, by somebody else (prefill to decode): it stays in memory
    /// until it was read or its time is over (--ttl, or the node's handover_wait), then leaves first.
    #[arg(long)]
    handover: bool,
    /// Your own number for this kind of traffic, such as 1 for chats and 2 for documents: the node
    /// learns apart when blocks of 1, of 2, and of 3 and above come back.
    #[arg(long, value_name = "1-255", value_parser = clap::value_parser!(u8).range(1..))]
    traffic_class: Option<u8>,
    /// What computing it again would cost, such as 800us or 2s: against the mean a byte of what
    /// others said, a hit counts up to four times as often, or a quarter.
    #[arg(long, value_name = "DURATION", value_parser = recompute)]
    recompute: Option<u32>,
    /// Its place in its chain, from 0.
    #[arg(long, value_name = "N", default_value_t = 0)]
    depth: u32,
    /// A number that all calls about one prompt share, and no other prompt has.
    #[arg(long, value_name = "N")]
    request: Option<u64>,
}

impl HintArguments {
    pub(crate) fn hints(&self) -> PutHints {
        PutHints {
            depth: self.depth,
            request: self.request.unwrap_or(0),
            ttl_s: self.ttl,
            ephemeral: self.ephemeral,
            traffic_class: self.traffic_class.unwrap_or(0),
            recompute_us: self.recompute.unwrap_or(0),
            handover: self.handover,
        }
    }
}

/// `kvar lookup`.
#[derive(Clone, Debug, Args)]
pub(crate) struct LookupArguments {
    /// Names of the chain's blocks, in order.
    #[arg(
        value_name = "NAME",
        required_unless_present = "id",
        conflicts_with = "id"
    )]
    pub(crate) names: Vec<String>,
    /// Ids of the chain's blocks (64 hex digits each) instead of names.
    #[arg(long, value_name = "HEX")]
    pub(crate) id: Vec<BlockId>,
    /// Promise that what is there stays for so long (at most 30s).
    #[arg(long, value_name = "DURATION", value_parser = lease_time)]
    pub(crate) lease: Option<Duration>,
}

/// What to do with a lease.
#[derive(Debug, Subcommand)]
pub(crate) enum LeaseCommand {
    /// Let it last longer, from now on. Exit code 3 if it has ended.
    Renew {
        #[command(flatten)]
        node: NodeArguments,
        /// The lease's token (32 hex digits).
        #[arg(value_name = "TOKEN")]
        token: LeaseToken,
        /// How long from now (at most 30s).
        #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = lease_time)]
        ttl: Duration,
        /// Print the outcome as JSON.
        #[arg(long)]
        json: bool,
    },
    /// End it. Exit code 3 if it has ended already.
    Release {
        #[command(flatten)]
        node: NodeArguments,
        /// The lease's token (32 hex digits).
        #[arg(value_name = "TOKEN")]
        token: LeaseToken,
        /// Print the outcome as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// The longest a node promises anything.
const LEASE_MAX: Duration = Duration::from_secs(30);

fn lease_time(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("a lease of no time promises nothing; write 2s".to_owned()),
        time if time > LEASE_MAX => {
            Err("a lease lasts 30 s at most; renew it while it is needed".to_owned())
        }
        time => Ok(time),
    }
}

/// A time to live in seconds; parts of one count as one.
fn time_to_live(text: &str) -> Result<u32, String> {
    let time = duration(text)?;
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    match u32::try_from(seconds) {
        Ok(0) => Err("a block lives for a second at least; leave --ttl out to keep it".to_owned()),
        Ok(seconds) => Ok(seconds),
        Err(_) => Err("that is more than 136 years; leave --ttl out to keep it".to_owned()),
    }
}

/// A cost in microseconds.
fn recompute(text: &str) -> Result<u32, String> {
    u32::try_from(duration(text)?.as_micros())
        .map_err(|_| "that is more than an hour; the largest cost is 4294s".to_owned())
}
