//! What a shard and a node say of themselves: `/v1/status`, `kvar status`, metrics.
//!
//! A thread makes its report by itself when asked; whoever asks waits, the data plane never does.
//! Sums over shards are made by whoever prints.

use crate::config::DeviceTier;
use crate::counters::{LinkCounters, NamespaceCounters};
use crate::devices::{DeviceReport, Phase, View};
use crate::modes::{ModeReport, Modes};
use crate::namespaces::Namespace;
use kvar_base::{MapEpoch, Mode};
use kvar_engine::{RecoveryReport, ShardStatus, TENANTS};
use serde::Serialize;

/// One thread at one moment.
#[derive(Clone, Debug)]
pub(crate) struct ThreadReport {
    pub(crate) thread: u32,
    /// What it did between requests.
    pub(crate) sleep: SleepReport,
    /// What its links did.
    pub(crate) links: LinkCounters,
    /// What was asked of each namespace, by number.
    pub(crate) namespaces: Vec<NamespaceCounters>,
    /// Who is linked to it.
    pub(crate) clients: Vec<ClientReport>,
    /// Its shards, one a device.
    pub(crate) shards: Vec<ShardReport>,
}

/// What a thread sleeps over, and what its data path asked of the kernel.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SleepReport {
    /// Which thread.
    pub thread: u32,
    /// `io_uring`: one ring for sockets, devices and timers; `epoll`: sockets apart from devices.
    pub reactor: &'static str,
    /// How often it went to sleep.
    pub sleeps: u64,
    /// System calls of its data path.
    pub system_calls: u64,
}

/// Clients that a report names: it must fit a message.
pub(crate) const CLIENTS_REPORTED_MAX: usize = 256;

/// One client's link at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct ClientReport {
    /// Its name and version, as it says; an engine's connector says what its blocks are made of, too.
    pub name: String,
    /// Its address.
    pub peer: String,
    /// The number of the namespace it works in.
    pub namespace: u8,
    /// What the link goes through: `tcp` or `shm`.
    pub link: &'static str,
    /// Requests it has open.
    pub requests_open: u64,
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

/// One namespace at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct NamespaceReport {
    /// Its name.
    pub name: String,
    /// What devices know it by.
    pub number: u8,
    /// Its weight against the others; null: it is not in the settings any more, so that what is left
    /// of it leaves first.
    pub share: Option<u32>,
    /// How much of the store its engines use.
    pub mode: Mode,
    /// Its part of the store, 0 to 1, while all that hold anything want theirs.
    pub part: f64,
    /// Bytes of its blocks in memory.
    pub dram_bytes: u64,
    /// Bytes of its blocks on devices.
    pub flash_bytes: u64,
    /// Blocks that left the store because room was wanted.
    pub evicted: u64,
    /// Blocks that reclaim wrote again because their namespace was within its part.
    pub kept_entitled: u64,
    /// What was asked of it.
    #[serde(flatten)]
    pub counters: NamespaceCounters,
}

impl NamespaceReport {
    /// What shards and links say of one.
    fn new(
        namespace: &Namespace,
        mode: Mode,
        counters: &[NamespaceCounters],
        shards: &[ShardReport],
    ) -> Self {
        let number = namespace.tenant.number();
        let mut report = Self {
            name: namespace.name.clone(),
            number,
            share: namespace.share,
            mode,
            part: 0.0,
            dram_bytes: 0,
            flash_bytes: 0,
            evicted: 0,
            kept_entitled: 0,
            counters: counters
                .get(namespace.tenant.index())
                .copied()
                .unwrap_or_default(),
        };
        let tenants = shards.iter().flat_map(|shard| &shard.engine.tenants);
        for its in tenants.filter(|its| its.tenant == number) {
            report.dram_bytes += its.dram_bytes;
            report.flash_bytes += its.flash_bytes;
            report.evicted += its.counters.evicted;
            report.kept_entitled += its.counters.kept_entitled;
        }
        report
    }

    fn all(modes: &Modes, counters: &[NamespaceCounters], shards: &[ShardReport]) -> Vec<Self> {
        let reports = modes.namespaces().iter();
        let mut reports: Vec<Self> = reports
            .map(|namespace| Self::new(namespace, modes.of(namespace.tenant), counters, shards))
            .collect();
        let holds = |report: &Self| report.dram_bytes + report.flash_bytes > 0;
        let weight = |report: &Self| f64::from(report.share.unwrap_or(0));
        let all: f64 = reports.iter().filter(|it| holds(it)).map(weight).sum();
        for report in &mut reports {
            // Of one that holds nothing: what it would have if it came.
            let others = if holds(report) { 0.0 } else { weight(report) };
            report.part = weight(report) / (all + others).max(1.0);
        }
        reports
    }
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
    /// What memory is bounded by with the links open now and their staging regions, in bytes.
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
    /// Each namespace, the default one first.
    pub namespaces: Vec<NamespaceReport>,
    /// How much of the store engines use: all that have nothing of their own, then each namespace.
    pub modes: Vec<ModeReport>,
    /// Who is linked, by name.
    pub clients: Vec<ClientReport>,
    /// Others beyond those, at least.
    pub clients_more: u64,
    /// Each thread.
    pub threads: Vec<SleepReport>,
    /// Each shard.
    pub shards: Vec<ShardReport>,
}

impl<'a> NodeReport<'a> {
    /// Sums up. `now_unix` is the time of the reports in seconds since 1970.
    pub(crate) fn new(
        facts: &'a NodeFacts,
        view: &View,
        modes: &Modes,
        threads: u32,
        mut reports: Vec<ThreadReport>,
        uptime_s: u64,
        now_unix: f64,
    ) -> Self {
        let mut links = LinkCounters::default();
        reports.sort_by_key(|report| report.thread);
        let threads_silent = threads.saturating_sub(reports.len() as u32);
        reports.iter().for_each(|report| links += report.links);
        let clients = reports.iter().flat_map(|report| report.clients.clone());
        let mut clients: Vec<ClientReport> = clients.collect();
        clients.sort_by(|a, b| (&a.name, &a.peer).cmp(&(&b.name, &b.peer)));
        let clients_more = clients.len().saturating_sub(CLIENTS_REPORTED_MAX) as u64;
        clients.truncate(CLIENTS_REPORTED_MAX);
        let mut of_namespace = vec![NamespaceCounters::default(); TENANTS];
        for report in &reports {
            let counters = of_namespace.iter_mut().zip(&report.namespaces);
            counters.for_each(|(sum, more)| *sum += *more);
        }
        let sleeps = reports.iter().map(|report| report.sleep).collect();
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
            memory_bytes_bound: memory_bytes_max
                + links.links_open * facts.link_bytes_max
                + links.staging_bytes,
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
            namespaces: NamespaceReport::all(modes, &of_namespace, &shards),
            modes: modes.report(),
            clients,
            clients_more,
            threads: sleeps,
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
