//! What is said of the devices: status, metrics, `kvar device list`.
//!
//! The keeper writes it whole at every change; whoever asks takes a reference. What changes with
//! every block comes from the engines' reports and is added by [`DeviceReport`].

use crate::config::DeviceTier;
use crate::report::ShardReport;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

/// One device as the keeper sees it.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceView {
    /// Its number in this process, while it is open.
    #[serde(skip)]
    pub number: Option<u32>,
    /// Since when it serves, in seconds after the start of the node; none while it does not.
    #[serde(skip)]
    pub online_since_s: Option<u64>,
    /// Its place in the routes; none once retired.
    pub slot: Option<u32>,
    /// Its name.
    pub uuid: String,
    /// Where it is, or was.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// What it is for.
    pub tier: DeviceTier,
    /// `loading`, `online`, `leaving`, `failed`, `missing` or `retired`.
    pub state: &'static str,
    /// Why it is not online.
    pub reason: Option<String>,
    /// Share of the blocks that come to its tier.
    pub share: f64,
    /// Whether it will be emptied before it serves again.
    pub stale: bool,
    /// Streams of the drive that writes are told apart by; 0: none.
    pub write_streams: u8,
    /// Why none, while it is open.
    pub write_streams_off: Option<&'static str>,
    /// How far its blocks are, while it is leaving.
    pub moved: Option<Moved>,
}

/// How much of a device that leaves is on the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// Segments to go through; 0 until they are counted.
    pub segments: u64,
    /// Of these, gone through.
    pub segments_done: u64,
    /// Beside them, those whose headers cannot be read: what they held is lost.
    pub unreadable_segments: u64,
    /// Blocks moved, or there already.
    pub blocks: u64,
    /// Bytes of blocks moved.
    pub bytes: u64,
    /// Blocks that could not be moved: damaged, or the others took none for long.
    pub lost_blocks: u64,
}

impl Moved {
    /// Whether everything that was found is elsewhere, and everything was found.
    pub(crate) fn is_all(&self) -> bool {
        self.lost_blocks == 0 && self.unreadable_segments == 0
    }
}

/// A device with what its engines say.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    /// What the keeper sees.
    #[serde(flatten)]
    pub device: DeviceView,
    /// Blocks on it.
    pub blocks: u64,
    /// Payload bytes its segments hold when full.
    pub payload_bytes_max: u64,
    /// Bytes written to it since it came online.
    pub written_bytes: u64,
    /// The same in writes of the whole device a day; null in its first minute.
    pub drive_writes_per_day: Option<f64>,
    /// At this rate, years until it has been written as often as `flash_endurance` says; null where
    /// nothing was written.
    pub endurance_years: Option<f64>,
    /// Bytes of the write budget that are left over its shards, negative in debt; null without one.
    pub write_budget_left_bytes: Option<f64>,
    /// Why it takes no writes at the moment, if so.
    pub trouble: Option<String>,
}

/// A rate is told when it has been watched for so long.
const RATE_AFTER_S: u64 = 60;
const DAY_S: f64 = 86_400.0;
const YEAR_DAYS: f64 = 365.25;

impl DeviceReport {
    pub(crate) fn new(
        device: DeviceView,
        shards: &[ShardReport],
        uptime_s: u64,
        endurance_drive_writes: u64,
    ) -> Self {
        let own = || {
            shards
                .iter()
                .filter(|shard| Some(shard.device) == device.number && shard.state != "closed")
                .map(|shard| &shard.engine)
        };
        let written_bytes = own().map(|engine| engine.counters.written_bytes()).sum();
        // Not since the node's start: a device that was added later would seem to last too long.
        let online_s = device
            .online_since_s
            .map_or(0, |since| uptime_s.saturating_sub(since));
        let days = online_s as f64 / DAY_S;
        let drive_writes = written_bytes as f64 / device.bytes.max(1) as f64;
        let drive_writes_per_day = (online_s >= RATE_AFTER_S).then(|| drive_writes / days);
        Self {
            written_bytes,
            drive_writes_per_day,
            endurance_years: drive_writes_per_day
                .filter(|rate| *rate > 0.0)
                .map(|rate| endurance_drive_writes as f64 / rate / YEAR_DAYS),
            write_budget_left_bytes: own().map(|engine| engine.write_budget_left_bytes).sum(),
            blocks: own().map(|engine| engine.flash_blocks).sum(),
            payload_bytes_max: own().map(|engine| engine.flash_bytes_max).sum(),
            trouble: own().find_map(|engine| engine.device_trouble.clone()),
            device,
        }
    }
}

/// How far the node is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reads what it stored before its last stop; answers, and has no blocks yet.
    #[default]
    Loading,
    /// Serves.
    Serving,
    /// Was told to stop.
    Stopping,
}

/// Everything the keeper says.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    pub(crate) phase: Phase,
    pub(crate) shards: u32,
    pub(crate) shards_loaded: u32,
    /// Memory of arenas and indexes in bytes.
    pub(crate) memory_bytes: u64,
    pub(crate) devices: Vec<DeviceView>,
}

/// The latest view.
#[derive(Debug, Default)]
pub(crate) struct Views(RwLock<Arc<View>>);

impl Views {
    pub(crate) fn latest(&self) -> Arc<View> {
        // The lock guards one pointer: there is no half-made state a panic could leave.
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut View)) {
        let mut guard = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let mut view = View::clone(&guard);
        change(&mut view);
        *guard = Arc::new(view);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvar_engine::ShardStatus;

    /// The rate was that of a device which had been there since the node's start.
    #[test]
    fn a_device_that_was_added_late_seemed_to_last_longer_than_it_will() {
        const BYTES: u64 = 1 << 30;
        let report = |online_since_s, uptime_s| {
            let device = DeviceView {
                number: Some(3),
                online_since_s,
                slot: Some(0),
                uuid: String::new(),
                path: PathBuf::new(),
                bytes: BYTES,
                tier: DeviceTier::Fast,
                state: "online",
                reason: None,
                share: 1.0,
                stale: false,
                write_streams: 0,
                write_streams_off: None,
                moved: None,
            };
            let mut engine = ShardStatus::default();
            engine.counters.block_write_bytes = BYTES;
            let shard = ShardReport {
                device: 3,
                state: "serving",
                loaded_bytes: None,
                failure: None,
                lost_blocks: 0,
                engine,
                recovery: None,
                io_engine: "threads",
                io_notes: Vec::new(),
                arena_bytes: 0,
            };
            DeviceReport::new(device, &[shard], uptime_s, 1000)
        };
        let (day_s, month_s) = (86_400, 30 * 86_400);
        let rate = |report: DeviceReport| report.drive_writes_per_day;
        assert_eq!(rate(report(Some(0), day_s)), Some(1.0));
        assert_eq!(rate(report(Some(month_s), month_s + day_s)), Some(1.0));
        assert_eq!(rate(report(Some(month_s), month_s + 10)), None);
        assert_eq!(rate(report(None, month_s)), None);
    }
}
