//! `kvar bench node` on the command line.

use crate::arguments::{NodeArguments, duration, seconds};
use crate::bench::SECONDS;
use crate::bench::node::{Operation, Settings};
use clap::Args;
use kvar_base::ByteSize;
use std::time::Duration;

/// Largest block of the bench: a block's maximum is the node's to say, and it says so.
const BLOCK_BYTES_MAX: u64 = 16 << 20;

/// What to ask the node, and for how long.
#[derive(Clone, Debug, Args)]
pub(crate) struct NodeBenchArguments {
    #[command(flatten)]
    node: NodeArguments,
    /// What to do: get blocks that are there, or put blocks that are not.
    #[arg(long, value_name = "get|put", default_value = "get")]
    op: Operation,
    /// Bytes of a block, at most 16MiB.
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = block)]
    size: ByteSize,
    /// Blocks of a call.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// Calls under way at once.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    depth: u16,
    /// Different blocks that gets ask for at random; put first where they are not there.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..))]
    blocks: u64,
    /// Put nothing first: the blocks of an earlier run are there.
    #[arg(long)]
    no_fill: bool,
    /// Seconds of the run.
    #[arg(long, value_name = "S", default_value_t = SECONDS, value_parser = seconds)]
    seconds: f64,
    /// How long the client looks for work before it sleeps.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration)]
    spin: Duration,
    /// Print the figures as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl NodeBenchArguments {
    /// As the bench wants them.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            node: self.node.clone(),
            operation: self.op,
            block_bytes: self.size.0 as usize,
            batch: usize::from(self.batch),
            depth: usize::from(self.depth),
            blocks: self.blocks,
            seconds: self.seconds,
            fills: !self.no_fill,
            spin: self.spin,
        }
    }
}

fn block(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text
        .parse()
        .map_err(|error: kvar_base::ByteSizeError| error.to_string())?;
    if (1..=BLOCK_BYTES_MAX).contains(&size.0) {
        Ok(size)
    } else {
        Err(format!(
            "a block has 1 byte to {}",
            ByteSize(BLOCK_BYTES_MAX)
        ))
    }
}
