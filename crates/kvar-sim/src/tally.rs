//! What happened in all runs together. A simulator that never sees a kind of fault or outcome is
//! blind to it and would pass for ever: so that is an error too.

use serde::Serialize;
use std::collections::BTreeMap;

/// Runs after which everything in [`EXPECTED`] must have happened.
pub const RUNS_TO_SEE_ALL: u64 = 200;

/// What must happen sooner or later.
pub const EXPECTED: &[&str] = &[
    "fault/read flipped",
    "fault/read misdirected",
    "fault/read failed",
    "fault/read short",
    "fault/write flipped",
    "fault/write misdirected",
    "fault/write lost",
    "fault/write failed",
    "fault/write short",
    "fault/write without space",
    "fault/flush lost",
    "fault/flush failed",
    "fault/late",
    "fault/sector corrupted",
    "fault/file system full",
    "fault/device vanished",
    "fault/device came back",
    "fault/stuck",
    "crash/power cut",
    "crash/kill",
    "crash/torn at 512",
    "crash/torn at 4096",
    "crash/write lost",
    "crash/write reordered",
    "restart/clean",
    "restart/with faults",
    "restart/without a checkpoint",
    "get/hit from memory",
    "get/hit from the device",
    "get/hit of some sections",
    "get/hit after a restart",
    "miss/absent",
    "miss/expired",
    "miss/corrupt",
    "miss/removed",
    "miss/deadline",
    "miss/wrong_format",
    "put/stored",
    "put/stored durably",
    "put/exists",
    "put/in_progress",
    "put/aborted",
    "put/refused busy",
    "put/refused too_big",
    "put/refused wrong_format",
    "put/refused deadline",
    "remove/done",
    "purge/done",
    "purge/of one tenant done",
    "left/memory, for another tenant",
    "flush/done",
    "flush/failed",
    "lookup/present",
    "lookup/absent",
    "left/memory, on the device",
    "left/memory, for good",
    "left/device, reclaim",
    "left/device, demoted",
    "below/offered",
    "below/offered from memory alone",
    "below/arrived",
    "below/refused",
    "left/device, bucket",
    "left/device, corrupt",
    "left/device, expired",
    "left/memory, expired",
    "kept/by reclaim",
    "checked/was flushed and is there",
    "lease/promised blocks",
    "lease/ends at a block, absent",
    "lease/ends at a block, overloaded",
    "lease/renewed",
    "lease/renewed too late",
    "lease/released",
    "lease/ended by itself",
    "lease/lost, removed",
    "lease/lost, corrupt",
    "get/hit of what is promised",
    "clock/set back",
    "clock/set forward",
    "scrub/two passes",
    "scrub/found what rotted",
    "device/replaced",
    "device/back, stale",
    "device/back, with its blocks",
    "crash/while a checkpoint was written",
    "checked/was written and is there after a kill",
];

/// Counts by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Tally(BTreeMap<String, u64>);

impl Tally {
    /// One more.
    pub fn count(&mut self, what: &str) {
        self.add(what, 1);
    }

    /// So many more.
    pub fn add(&mut self, what: &str, times: u64) {
        if times == 0 {
            return;
        }
        match self.0.get_mut(what) {
            Some(known) => *known += times,
            None => {
                self.0.insert(what.to_owned(), times);
            }
        }
    }

    /// All of another one.
    pub fn merge(&mut self, other: &Self) {
        for (what, times) in &other.0 {
            self.add(what, *times);
        }
    }

    /// How often.
    #[must_use]
    pub fn get(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or_default()
    }

    /// What should have happened and did not.
    #[must_use]
    pub fn unseen(&self) -> Vec<&'static str> {
        EXPECTED
            .iter()
            .filter(|what| self.get(what) == 0)
            .copied()
            .collect()
    }

    /// Name and number, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(what, times)| (what.as_str(), *times))
    }
}
