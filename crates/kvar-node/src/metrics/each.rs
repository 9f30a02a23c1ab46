//! What is said of each device, each tier and each namespace: the names, and a row of values for
//! each.

use super::Labels;
use crate::report::NodeReport;

/// What is said of each device.
pub(super) const DEVICE_GAUGES: [(&str, &str); 7] = [
    ("kvar_device_online", "1 while the device is in service"),
    (
        "kvar_device_in_doubt",
        "1 while the device takes no writes, does not answer, or is not there",
    ),
    (
        "kvar_device_share",
        "Share of new blocks that the device gets",
    ),
    ("kvar_device_blocks", "Blocks on the device"),
    (
        "kvar_device_drive_writes_per_day",
        "How often the whole device is written a day, since the start; 0 in the first minute",
    ),
    (
        "kvar_device_endurance_years",
        "Years until the device has been written as often as flash_endurance says, at that rate; \
         +Inf while nothing is written",
    ),
    (
        "kvar_device_write_budget_left",
        "Bytes of the write budget that are left, negative in debt; +Inf without a budget",
    ),
];

/// What is said of each tier.
pub(super) const TIER_GAUGES: [(&str, &str); 6] = [
    ("kvar_tier_devices", "Devices of the tier that are open"),
    (
        "kvar_tier_capacity_bytes",
        "Payload bytes that the segments of the tier's devices hold when full",
    ),
    (
        "kvar_tier_filled_bytes",
        "The same of the segments that hold something",
    ),
    ("kvar_tier_blocks", "Blocks on the tier's devices"),
    (
        "kvar_tier_dram_used_bytes",
        "Bytes of blocks in the memory of the tier's engines",
    ),
    (
        "kvar_tier_dram_max_bytes",
        "Bytes of blocks that this memory may hold",
    ),
];

/// What is said of each namespace.
pub(super) const NAMESPACE_GAUGES: [(&str, &str); 5] = [
    (
        "kvar_namespace_share",
        "The namespace's weight; 0: what the others leave",
    ),
    (
        "kvar_namespace_part",
        "Its part of the store, 0 to 1, while all that hold anything want theirs",
    ),
    ("kvar_namespace_dram_used", "Bytes of its blocks in memory"),
    (
        "kvar_namespace_flash_used",
        "Bytes of its blocks on devices",
    ),
    (
        "kvar_namespace_mode",
        "How much its engines use the store: 0 off, 1 observe, 2 save, 3 load",
    ),
];
pub(super) const NAMESPACE_COUNTERS: [(&str, &str); 7] = [
    ("kvar_namespace_hits", "Blocks served"),
    ("kvar_namespace_misses", "Blocks asked for and not served"),
    ("kvar_namespace_stored", "Blocks stored"),
    (
        "kvar_namespace_evictions",
        "Blocks that left the store because room was wanted",
    ),
    (
        "kvar_namespace_kept",
        "Blocks that reclaim wrote again because their namespace was within its part",
    ),
    (
        "kvar_namespace_observed_lookups",
        "Lookups answered while its mode was not load",
    ),
    (
        "kvar_namespace_observed_blocks",
        "Leading blocks that these found: what would have been loaded",
    ),
];

/// Each device: its labels, and for each of [`DEVICE_GAUGES`] a value.
pub(super) fn devices(report: &NodeReport<'_>) -> Vec<(Labels, Vec<f64>)> {
    report
        .devices
        .iter()
        .map(|it| {
            let slot = it
                .device
                .slot
                .map_or_else(|| "none".to_owned(), |slot| slot.to_string());
            let labels = vec![
                ("slot", slot),
                ("uuid", it.device.uuid.clone()),
                ("path", it.device.path.display().to_string()),
            ];
            let is = |yes: bool| f64::from(u8::from(yes));
            let has_trouble = it.trouble.is_some() || it.device.reason.is_some();
            let values = vec![
                is(it.device.state == "online"),
                is(has_trouble),
                it.device.share,
                it.blocks as f64,
                it.drive_writes_per_day.unwrap_or(0.0),
                it.endurance_years.unwrap_or(f64::INFINITY),
                it.write_budget_left_bytes.unwrap_or(f64::INFINITY),
            ];
            (labels, values)
        })
        .collect()
}

/// Each tier: the same of [`TIER_GAUGES`].
pub(super) fn tiers(report: &NodeReport<'_>) -> Vec<(Labels, Vec<f64>)> {
    report
        .tiers
        .iter()
        .map(|it| {
            let values = vec![
                it.devices as f64,
                it.capacity_bytes as f64,
                it.filled_bytes as f64,
                it.blocks as f64,
                it.dram_bytes as f64,
                it.dram_bytes_max as f64,
            ];
            (vec![("tier", it.tier.word().to_owned())], values)
        })
        .collect()
}

/// Each namespace: its name, and for each of [`NAMESPACE_GAUGES`] and [`NAMESPACE_COUNTERS`] a
/// value.
pub(super) fn namespaces(report: &NodeReport<'_>) -> Vec<(Labels, Vec<f64>, Vec<u64>)> {
    report
        .namespaces
        .iter()
        .map(|it| {
            let gauges = vec![
                f64::from(it.share.unwrap_or(0)),
                it.part,
                it.dram_bytes as f64,
                it.flash_bytes as f64,
                f64::from(it.mode as u8),
            ];
            let counters = vec![
                it.counters.hits,
                it.counters.misses,
                it.counters.stored,
                it.evicted,
                it.kept_entitled,
                it.counters.observed_lookups,
                it.counters.observed_blocks,
            ];
            (vec![("namespace", it.name.clone())], gauges, counters)
        })
        .collect()
}
