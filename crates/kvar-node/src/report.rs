//! What a shard and a node say of themselves: `/v1/status`, `kvar status`, metrics.
//!
//! A thread makes its report by itself when asked; whoever asks waits, the data plane never does.
//! Sums over shards are made by whoever prints.

use crate::config::DeviceTier;
use crate::counters::LinkCounters;
use crate::devices::{DeviceReport, Phase, View};
use kvar_base::MapEpoch;
use kvar_engine::{RecoveryReport, ShardStatus};
use serde::Serialize;

/// One thread at one moment.
#[derive(Clone, Debug)]
pub(crate) struct ThreadReport {
    pub(crate) thread: u32,
    /// What its links did.
    pub(crate) links: LinkCounters,
    /// Its shards, one a device.
    pub(crate) shards: Vec<ShardReport>,
}

/// One shard of a device at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct ShardReport {
    /// Its device's number in this process.
    pub device: u32,
    /// `loading`, `serving`, `failed`, `closing` or `closed`; of the last the counters are kept.
    pub state: &'static str,
    /// Bytes read so far, while it loads.
    pub loaded_bytes: Option<u64>,
    /// Why it failed.
    pub failure: Option<String>,
    /// Blocks that were lost with its device.
    pub lost_blocks: u64,
    /// What its engine did and holds.
    pub engine: ShardStatus,
    /// What recovery found.
    #[serde(skip)]
    pub recovery: Option<RecoveryReport>,
    /// What moves its bytes: `io_uring` or `threads`.
    pub io_engine: &'static str,
    /// What an operator should know about that.
    pub io_notes: Vec<String>,
    /// Size of its arena in bytes: memory tier and buffers.
    pub arena_bytes: u64,
}

/// The devices of one tier at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct TierReport {
    /// Which.
    pub tier: DeviceTier,
    /// Devices that are open.
    pub devices: u64,
    /// Payload bytes their segments hold when full.
    pub capacity_bytes: u64,
    /// The same of the segments that hold something.
    pub filled_bytes: u64,
    /// Blocks on them.
    pub blocks: u64,
    /// Bytes of blocks in the memory of their engines, and what that may hold.
    pub dram_bytes: u64,
    /// See above.
    pub dram_bytes_max: u64,
}

impl TierReport {
    /// Of a tier; `None` if nothing of it is open.
    fn new(tier: DeviceTier, devices: &[DeviceReport], shards: &[ShardReport]) -> Option<Self> {
        let is_meant = |it: &&DeviceReport| it.device.tier == tier && it.device.number.is_some();
        let open: Vec<_> = devices.iter().filter(is_meant).collect();
        let own = || {
            let is_own = |shard: &&ShardReport| {
                let device = Some(shard.device);
                shard.state != "closed" && open.iter().any(|it| it.device.number == device)
            };
            shards.iter().filter(is_own).map(|shard| &shard.engine)
        };
        let filled = |engine: &ShardStatus| {
            let each = engine.flash_bytes_max / engine.segments.max(1);
            each * (engine.segments - engine.segments_free)
        };
        (!open.is_empty()).then(|| Self {
            tier,
            devices: open.len() as u64,
            capacity_bytes: own().map(|engine| engine.flash_bytes_max).sum(),
            filled_bytes: own().map(filled).sum(),
            blocks: own().map(|engine| engine.flash_blocks).sum(),
            dram_bytes: own().map(|engine| engine.dram_bytes).sum(),
            dram_bytes_max: own().map(|engine| engine.dram_bytes_max).sum(),
        })
    }
}

/// What does not change while a node runs.
#[derive(Clone, Debug, Serialize)]
pub struct NodeFacts {
    /// Version of this build.
    pub version: &'static str,
    /// The uuid in the key file, which is the first device's; also the node's name towards clients.
    pub uuid: String,
    /// The cluster map's epoch; constant on a single node.
    pub epoch: u64,
    /// Where clients connect.
    pub listen: String,
    /// Where the admin HTTP answers.
    pub admin: String,
    /// Whether it listens beyond loopback without encryption.
    pub insecure: bool,
    /// The data file or block device; of several the first.
    pub data: String,
    /// Its size in bytes.
    pub device_bytes: u64,
    /// Size of a segment in bytes.
    pub segment_bytes: u64,
    /// Largest block in bytes of payload.
    pub block_bytes_max: u64,
    /// Format of the device.
    pub format_version: u32,
    /// Payload bytes in memory that were asked for.
    pub dram_bytes: u64,
    /// What each open link may add to that.
    pub link_bytes_max: u64,
    /// How often a device may be written over in its life.
    pub flash_endurance: u64,
    /// What an operator should know about the data file.
    pub notes: Vec<String>,
}

impl NodeFacts {
    /// The epoch every answer carries.
    pub const EPOCH: MapEpoch = MapEpoch::SINGLE_NODE;
}

/// A node at one moment: what `/v1/status` prints.
#[derive(Clone, Debug, Serialize)]
pub struct NodeReport<'a> {
    /// What does not change.
    #[serde(flatten)]
    pub facts: &'a NodeFacts,
    /// How far it is.
    pub state: Phase,
    /// Whether it serves.
    pub ready: bool,
    /// Shards that have loaded what was stored in them.
    pub shards_loaded: u32,
    /// Shards there are to load.
    pub shards_to_load: u32,
    /// Bytes read by those that are loading.
    pub loading_bytes: u64,
    /// Each device.
    pub devices: Vec<DeviceReport>,
    /// Each tier of which a device is open.
    pub tiers: Vec<TierReport>,
    /// What resident memory stays under with no link: arenas, index, and the stated constant.
    pub memory_bytes_max: u64,
    /// Seconds since start.
    pub uptime_s: u64,
    /// What memory is bounded by with the links open now, in bytes.
    pub memory_bytes_bound: u64,
    /// All acknowledged before this time is safe against power loss, in seconds since 1970.
    pub flushed_through: f64,
    /// Puts acknowledged and not flushed.
    pub unflushed_puts: u64,
    /// Bytes written to the device for each byte of payload written the first time.
    pub write_amplification: Option<f64>,
    /// Blocks in memory.
    pub dram_blocks: u64,
    /// Bytes of blocks in memory.
    pub dram_used_bytes: u64,
    /// Bytes in memory alone that wait to be decided about.
    pub held_bytes: u64,
    /// Blocks on the device.
    pub flash_blocks: u64,
    /// Payload bytes the device's segments hold when full.
    pub flash_bytes_max: u64,
    /// What recovery found, one entry a shard.
    pub recovery: Vec<RecoveryReport>,
    /// Threads that did not answer in time.
    #[serde(skip)]
    pub threads_silent: u32,
    /// What the links of all threads did.
    pub links: LinkCounters,
    /// Each shard.
    pub shards: Vec<ShardReport>,
}

impl<'a> NodeReport<'a> {
    /// Sums up. `now_unix` is the time of the reports in seconds since 1970.
    pub(crate) fn new(
        facts: &'a NodeFacts,
        view: &View,
        threads: u32,
        mut reports: Vec<ThreadReport>,
        uptime_s: u64,
        now_unix: f64,
    ) -> Self {
        let mut links = LinkCounters::default();
        reports.sort_by_key(|report| report.thread);
        let threads_silent = threads.saturating_sub(reports.len() as u32);
        reports.iter().for_each(|report| links += report.links);
        let shards = reports.into_iter().flat_map(|report| report.shards);
        let mut shards: Vec<ShardReport> = shards.collect();
        shards.sort_by_key(|shard| (shard.device, shard.engine.shard));
        let memory_bytes_max = crate::node::MEMORY_BASE_BYTES + view.memory_bytes;
        let devices = view.devices.iter().cloned();
        let devices = devices
            .map(|device| DeviceReport::new(device, &shards, uptime_s, facts.flash_endurance));
        let devices: Vec<DeviceReport> = devices.collect();
        let tiers = DeviceTier::ALL.into_iter();
        let tiers = tiers.filter_map(|tier| TierReport::new(tier, &devices, &shards));
        let tiers = tiers.collect();
        let engines = || shards.iter().map(|shard| &shard.engine);
        let oldest_us = engines()
            .map(|engine| engine.unflushed_age_us)
            .max()
            .unwrap_or(0);
        let (mut written, mut payload) = (0, 0);
        for counters in engines().map(|engine| &engine.counters) {
            written += counters.written_bytes();
            payload += counters.payload_written_bytes;
        }
        Self {
            facts,
            state: view.phase,
            ready: view.phase == Phase::Serving,
            shards_loaded: view.shards_loaded,
            shards_to_load: view.shards,
            loading_bytes: shards.iter().filter_map(|shard| shard.loaded_bytes).sum(),
            devices,
            tiers,
            uptime_s,
            memory_bytes_max,
            memory_bytes_bound: memory_bytes_max + links.links_open * facts.link_bytes_max,
            flushed_through: now_unix - oldest_us as f64 / 1e6,
            unflushed_puts: engines().map(|engine| engine.unflushed_puts).sum(),
            write_amplification: (payload > 0).then(|| written as f64 / payload as f64),
            dram_blocks: engines().map(|engine| engine.dram_blocks).sum(),
            dram_used_bytes: engines().map(|engine| engine.dram_bytes).sum(),
            held_bytes: engines().map(|engine| engine.held_bytes).sum(),
            flash_blocks: engines().map(|engine| engine.flash_blocks).sum(),
            flash_bytes_max: engines().map(|engine| engine.flash_bytes_max).sum(),
            recovery: shards
                .iter()
                .filter_map(|shard| shard.recovery.clone())
                .collect(),
            threads_silent,
            links,
            shards,
        }
    }

    /// As JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|error| {
            // Only a map with keys that are no text could fail, and there is none.
            format!("{{\"error\":\"the status cannot be written as JSON: {error}\"}}")
        })
    }
}
