//! The command line, as `--help` teaches it.

use crate::bench::{PAIRS, SECONDS};
use crate::block_arguments::{LeaseCommand, LookupArguments, PutArguments};
use crate::device_arguments::DeviceCommand;
use crate::mode_command::ModeArguments;
use crate::node_bench_arguments::NodeBenchArguments;
use crate::replay_arguments::ReplayArguments;
use crate::settings_arguments::SettingsArguments;
use clap::{Args, Parser, Subcommand};
use kvar_base::{BlockId, ByteSize};
use kvar_client::LinkChoice;
use kvar_io::IoEngine;
use std::path::PathBuf;
use std::time::Duration;

const EXAMPLES: &str = "\
Ten lines to the first hit:
  kvar serve --data ./kvar-data --size 4GiB --dram 1GiB &
  echo hello | kvar put greeting -
  kvar get greeting
  kvar status

Exit codes:
  0  done
  1  failed: node unreachable, data damaged, disk full (the line on standard error says which)
  2  arguments or settings are wrong; nothing was done
  3  the block asked for is not there

Results go to standard output (with --json as one JSON object), everything else to standard error.";

/// kvar: a store for the KV cache of LLM inference. What one GPU computed stays, for all.
#[derive(Debug, Parser)]
#[command(name = "kvar", version, after_help = EXAMPLES, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a node until SIGTERM or Ctrl-C.
    #[command(after_help = "\
A first start makes the data file (or takes an empty block device) and writes the namespace key \
beside it as <data>.key. SIGTERM or Ctrl-C once: what is in memory only is written, within \
shutdown_flush. A second one ends the process at once: what was not written yet is lost, as after a \
kill, and the exit code is 1. While it loads what it stored before, a node answers already: lookups \
find nothing, gets are Miss(loading), puts are refused as busy; /readyz says how far it is.

Examples:
  kvar serve --data ./kvar-data --size 4GiB --dram 1GiB
  kvar serve --config /etc/kvar/kvar.toml --listen 127.0.0.1:0 --ready-file /run/kvar.json
  kvar serve --data /dev/nvme1n1 --dram 64GiB --shards 8
  kvar serve --data /dev/nvme1n1 --data /dev/nvme2n1 --data /mnt/c/kvar=2TB --dram 64GiB")]
    Serve(SettingsArguments),

    /// The devices of a running node: list them, add one, retire one, replace one.
    #[command(after_help = "\
Blocks are spread over the devices by size. A device that fails while the node serves is taken out of \
service by itself: its blocks are misses, and new ones go to the others. A device that was away comes \
back with its blocks (kvar device add), unless blocks were removed meanwhile: then it begins empty. \
Changes ask for the namespace key and for the node's own machine.

Examples:
  kvar device list
  kvar device add /dev/nvme3n1
  kvar device add /mnt/d/kvar --size 2TiB
  kvar device retire 2 --rate 500MiB
  kvar device replace 1 /dev/nvme4n1 --json")]
    Device {
        #[command(subcommand)]
        command: DeviceCommand,
    },

    /// The namespaces of a running node: who has how much of it.
    #[command(after_help = "\
A namespace has blocks and a key of its own, and a share that no other's flood can take. It comes with \
the node's settings:
  [[namespace]]
  name = \"team-a\"
  share = 2
At the next start its key is written beside the data, as DATA.team-a.key; whoever has that file works in \
that namespace.

Examples:
  kvar namespace list
  kvar put greeting hello.txt --key-file ./kvar-data.team-a.key
  kvar purge --yes --key-file ./kvar-data.team-a.key")]
    Namespace {
        #[command(subcommand)]
        command: NamespaceCommand,
    },

    /// How much of a running node's store engines use: show it, or switch it under traffic.
    #[command(after_help = "\
Connectors of engines obey within about a second, between requests; no request fails by a switch, and no \
engine is restarted. A namespace with a switch of its own keeps it when all are switched. What was \
switched holds over a restart of the node. The node itself answers everybody in every mode: tools, and \
connectors of before there were modes, go on as ever.

Examples:
  kvar mode
  kvar mode observe
  kvar mode off --namespace team-a
  kvar mode --reset --namespace team-a")]
    Mode(ModeArguments),

    /// How a node is.
    Status {
        #[command(flatten)]
        node: NodeArguments,
        /// Print the whole status as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Why is there no hit? Asks the node, and the engines linked to it, and says what to do.
    #[command(after_help = "\
Looks at the link (address, version, namespace, key), at the node (state, devices, room, what it was \
asked and why it missed), at what this host could do better (io_uring, huge pages, shared memory), at \
the engines that are linked (do those of one model mean the same by a block?), and stores, reads and \
removes one block of 64 KiB. Each line is ok, note, or wrong; with a wrong one the exit code is 1.

Examples:
  kvar doctor
  kvar doctor --endpoint 10.0.0.7:7411 --key-file store.kvar.key --json")]
    Doctor {
        #[command(flatten)]
        node: NodeArguments,
        /// Print the findings as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Store a file (or - for standard input) as one block.
    #[command(after_help = "\
A block is immutable: the first bytes stored under a name stay until it is removed; putting it \
again says `exists`.

Examples:
  kvar put greeting hello.txt
  head -c 1M /dev/urandom | kvar put noise - --durable
  kvar put greeting hello.txt --ttl 1h
  kvar put prefill-7 kv.bin --handover --recompute 800ms --traffic-class 3")]
    Put {
        #[command(flatten)]
        node: NodeArguments,
        #[command(flatten)]
        put: PutArguments,
        /// Print the outcome as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Write a block to standard output. Exit code 3 if it is not there.
    Get {
        #[command(flatten)]
        node: NodeArguments,
        #[command(flatten)]
        block: BlockArguments,
    },

    /// How many leading blocks of a chain are there; with --lease they stay. Exit code 3 if not even the
    /// first is there.
    #[command(after_help = "\
A lease promises that what was found stays readable, unless it is removed: eviction, reclaim and time \
to live wait for its end. It ends by itself, at most 30 s later, and lives on when this command has \
ended: its token, which is printed, renews or releases it from anywhere.

Examples:
  kvar lookup part-0 part-1 part-2
  kvar lookup part-0 part-1 part-2 --lease 5s --json
  kvar lease renew 0123456789abcdef0123456789abcdef --ttl 5s
  kvar lease release 0123456789abcdef0123456789abcdef")]
    Lookup {
        #[command(flatten)]
        node: NodeArguments,
        #[command(flatten)]
        lookup: LookupArguments,
        /// Print the outcome as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Renew or release a lease that `kvar lookup --lease` or a client took.
    Lease {
        #[command(subcommand)]
        command: LeaseCommand,
    },

    /// Remove blocks; returns when the removal survives a power cut.
    Remove {
        #[command(flatten)]
        node: NodeArguments,
        /// Names of blocks.
        #[arg(value_name = "NAME", required_unless_present = "id")]
        names: Vec<String>,
        /// Ids of blocks (64 hex digits), beside or instead of names.
        #[arg(long, value_name = "HEX")]
        id: Vec<BlockId>,
        /// Print the outcome as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Drop every block of the namespace that the key file is of.
    Purge {
        #[command(flatten)]
        node: NodeArguments,
        /// Needed, because this cannot be undone.
        #[arg(long)]
        yes: bool,
        /// Print the outcome as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Wait until all that was acknowledged survives a power cut.
    Flush {
        #[command(flatten)]
        node: NodeArguments,
        /// Print the outcome as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Where a block is, its size and age. Exit code 3 if it is not there.
    Stat {
        #[command(flatten)]
        node: NodeArguments,
        #[command(flatten)]
        block: BlockArguments,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Drive a node with a real trace, or ask the policy alone what a capacity would hit.
    #[command(after_help = "\
With --endpoint: looks each request's chain up, gets what is there, puts the rest, and checks \
every byte that comes back against one complete put of that block.

Examples:
  kvar replay conversation.jsonl.zst --block-bytes 4KiB
  kvar replay trace.jsonl --block-bytes 64KiB --concurrency 4 --json > report.json
  zcat trace.gz | kvar replay - --block-bytes 64KiB --pace real

With --offline: the production policy over the trace, no node.
  kvar replay conversation.jsonl.zst --offline --capacity 5% --capacity 10% --model engine
  kvar replay conversation.jsonl.zst --offline --capacity 5% --policy optimum
  kvar replay conversation.jsonl.zst --offline --model engine --capacity 20% --flood 4 --share 2 --share 1

A crash test: what was acknowledged is journalled, and asked for again after a restart.
  kvar replay trace.jsonl --block-bytes 64KiB --journal acks.txt     (kill -9 the node meanwhile)
  kvar replay --verify acks.txt --older-than 2s")]
    Replay(Box<ReplayArguments>),

    /// Speed as a ratio to the machine's limits, in one run: ours and the yardstick take turns.
    #[command(after_help = "\
The figures of a design need at least 15 pairs of 3 s on an idle machine; --pairs 3 --seconds 1 is \
a first look. An interval wider than 0.10 is no judgement.

Examples:
  kvar bench engine --size 4GiB
  kvar bench net --pairs 3 --seconds 1 --json")]
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },

    /// Verify a stopped node's data: every structure and every byte.
    #[command(after_help = "Exit code 1 if anything is damaged. The node must be stopped.")]
    Check {
        /// The data file or block device.
        path: PathBuf,
        /// Print the report as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Print the structures of a stopped node's data.
    Inspect {
        /// The data file or block device.
        path: PathBuf,
        /// Print them as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Settings files: print one, check one.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// The engine against fio on a file of the same size (fio must be installed).
    Engine {
        /// The data file, made here with a .fio beside it; or a block device of twice the size. What is
        /// there is lost.
        #[arg(long, value_name = "PATH", default_value = "./kvar-bench.data")]
        path: PathBuf,
        /// Size of each of the two files.
        #[arg(long, value_name = "SIZE", default_value = "4GiB")]
        size: ByteSize,
        /// What moves bytes: auto, io_uring or threads.
        #[arg(long, value_name = "ENGINE", default_value = "auto")]
        io_engine: IoEngine,
        /// Leave the files there.
        #[arg(long)]
        keep: bool,
        #[command(flatten)]
        rounds: RoundsArguments,
    },
    /// Memory and time of an index entry, and recovery with that many blocks.
    Index {
        /// Blocks.
        #[arg(long, value_name = "N", default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(1000..=50_000_000))]
        entries: u64,
        /// A folder for a sparse file (its metadata take about 200 bytes a block).
        #[arg(long, value_name = "FOLDER", default_value = ".")]
        folder: PathBuf,
        /// The table alone.
        #[arg(long)]
        no_recovery: bool,
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Fills a device for `index` and ends by SIGKILL.
    #[command(hide = true)]
    IndexFill { path: PathBuf, entries: u64 },
    /// Opens a device for `index`.
    #[command(hide = true)]
    IndexOpen { path: PathBuf },
    /// Gets or puts against a node that is running: rate, latency and CPU as one client sees them.
    Node(NodeBenchArguments),
    /// Loads blocks layer by layer from a node that is running: what an engine would wait before each
    /// layer, for a compute time a layer that is assumed.
    Layers {
        #[command(flatten)]
        node: NodeArguments,
        /// Blocks of the prompt; put first where they are not there.
        #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=10_000))]
        blocks: u64,
        /// Layers: sections of a block.
        #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1008))]
        layers: u16,
        /// Bytes of a section.
        #[arg(long, value_name = "SIZE", default_value = "64KiB")]
        section: ByteSize,
        /// How long a layer is assumed to compute.
        #[arg(long, value_name = "DURATION", default_value = "2ms", value_parser = duration)]
        compute: Duration,
        /// Loads that are measured.
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=10_000))]
        rounds: u64,
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
    },
    /// A node over loopback against a bare pair of sockets, and from flash against fio.
    Net {
        /// A folder with room for the data files; they are removed afterwards.
        #[arg(long, value_name = "FOLDER", default_value = ".")]
        folder: PathBuf,
        /// Size of the store that is read from flash; 0 leaves that out.
        #[arg(long, value_name = "SIZE", default_value = "4GiB")]
        flash_size: ByteSize,
        /// How long node and client look for work before they sleep.
        #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration)]
        spin: Duration,
        #[command(flatten)]
        rounds: RoundsArguments,
    },
}

/// How long to measure.
#[derive(Clone, Debug, Args)]
pub(crate) struct RoundsArguments {
    /// Pairs of runs, ours and the yardstick.
    #[arg(long, value_name = "N", default_value_t = PAIRS as u64, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(crate) pairs: u64,
    /// Seconds of each run.
    #[arg(long, value_name = "S", default_value_t = SECONDS, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// Print the figures as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Draw the ratios, their pairs and intervals: an SVG picture.
    #[arg(long, value_name = "PATH", value_parser = picture)]
    pub(crate) plot: Option<PathBuf>,
}

/// Where a picture goes: asked before minutes are spent on measuring.
fn picture(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.extension().is_none_or(|extension| extension != "svg") {
        return Err("a plot is an SVG picture: let its name end in .svg".to_owned());
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    match folder {
        Some(folder) if !folder.is_dir() => Err(format!(
            "there is no folder {}: make it, or choose another",
            folder.display()
        )),
        _ => Ok(path),
    }
}

/// What to do with namespaces.
#[derive(Debug, Subcommand)]
pub(crate) enum NamespaceCommand {
    /// Every namespace: its share, what it holds, what was asked of it.
    List {
        #[command(flatten)]
        node: NodeArguments,
        /// Print them as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What to do with settings.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print a settings file with every key, its default and what it does.
    Sample,
    /// Tell whether a settings file can be used.
    Check {
        /// The file.
        file: PathBuf,
    },
}

/// The key to a node.
#[derive(Clone, Debug, Args)]
pub(crate) struct KeyArguments {
    /// The namespace's key file, beside the node's data: DATA.key, or DATA.NAME.key of a namespace NAME.
    #[arg(
        long,
        value_name = "FILE",
        env = "KVAR_KEY_FILE",
        default_value = "./kvar-data.key"
    )]
    pub(crate) key_file: PathBuf,
}

/// Which node, and the key to it.
#[derive(Clone, Debug, Args)]
pub(crate) struct NodeArguments {
    /// The node.
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        env = "KVAR_ENDPOINT",
        default_value = "127.0.0.1:7411"
    )]
    pub(crate) endpoint: String,
    #[command(flatten)]
    pub(crate) key: KeyArguments,
    /// What the link goes through: auto takes shared memory if the node is on this host and agrees.
    #[arg(
        long,
        value_name = "auto|tcp|shm",
        env = "KVAR_LINK",
        default_value = "auto"
    )]
    pub(crate) link: LinkChoice,
    /// How long a call may take.
    #[arg(
        long,
        value_name = "DURATION",
        env = "KVAR_DEADLINE",
        default_value = "10s",
        value_parser = duration
    )]
    pub(crate) deadline: Duration,
}

/// Which block.
#[derive(Clone, Debug, Args)]
pub(crate) struct BlockArguments {
    /// Name of the block.
    #[arg(
        value_name = "NAME",
        required_unless_present = "id",
        conflicts_with = "id"
    )]
    pub(crate) name: Option<String>,
    /// Id of the block (64 hex digits) instead of a name.
    #[arg(long, value_name = "HEX")]
    pub(crate) id: Option<BlockId>,
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| format!("{text:?} is not a duration: write 250ms, 1s, 30s or 2m"))
}

pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.01..=3600.0).contains(seconds))
        .ok_or_else(|| format!("{text:?} is no number of seconds from 0.01 to 3600"))
}
