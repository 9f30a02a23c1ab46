//! What the node as a whole is and holds at the moment.

use super::Gauge;
use crate::report::NodeReport;
use kvar_engine::ShardStatus;
use prometheus_client::registry::Unit;

pub(super) fn gauges(report: &NodeReport<'_>) -> Vec<Gauge> {
    let bytes = || Some(Unit::Bytes);
    let seconds = || Some(Unit::Seconds);
    let links = &report.links;
    let total = |field: fn(&ShardStatus) -> u64| {
        report
            .shards
            .iter()
            .map(|shard| field(&shard.engine))
            .sum::<u64>() as f64
    };
    let in_trouble = report
        .shards
        .iter()
        .filter(|shard| shard.engine.device_trouble.is_some())
        .count();
    let io_uring = report
        .shards
        .iter()
        .filter(|shard| shard.state != "closed")
        .all(|shard| shard.io_engine == "io_uring");
    vec![
        (
            "kvar_ready",
            "1 while the node serves",
            None,
            f64::from(u8::from(report.ready)),
        ),
        (
            "kvar_shards",
            "Shards of the devices that are open",
            None,
            f64::from(report.shards_to_load),
        ),
        (
            "kvar_shards_loaded",
            "Of these, shards that have loaded what was stored",
            None,
            f64::from(report.shards_loaded),
        ),
        (
            "kvar_insecure",
            "1 if the node may listen beyond loopback without encryption",
            None,
            f64::from(u8::from(report.facts.insecure)),
        ),
        (
            "kvar_uptime",
            "Seconds since start",
            seconds(),
            report.uptime_s as f64,
        ),
        (
            "kvar_map_epoch",
            "Epoch of the cluster map",
            None,
            report.facts.epoch as f64,
        ),
        (
            "kvar_flushed_through",
            "All acknowledged before this time (seconds since 1970) survives power loss",
            seconds(),
            report.flushed_through,
        ),
        (
            "kvar_unflushed_puts",
            "Puts acknowledged that power loss would take",
            None,
            report.unflushed_puts as f64,
        ),
        (
            "kvar_write_amplification",
            "Bytes written to the device for each payload byte written the first time; 0 \
             before anything was written",
            None,
            report.write_amplification.unwrap_or(0.0),
        ),
        (
            "kvar_dram_blocks",
            "Blocks in memory",
            None,
            report.dram_blocks as f64,
        ),
        (
            "kvar_dram_used",
            "Bytes of blocks in memory",
            bytes(),
            report.dram_used_bytes as f64,
        ),
        (
            "kvar_dram_max",
            "Bytes of blocks that memory may hold",
            bytes(),
            report.facts.dram_bytes as f64,
        ),
        (
            "kvar_flash_blocks",
            "Blocks on the device",
            None,
            report.flash_blocks as f64,
        ),
        (
            "kvar_flash_max",
            "Payload bytes the device's segments hold when full",
            bytes(),
            report.flash_bytes_max as f64,
        ),
        (
            "kvar_flash_segments_free",
            "Segments with nothing in them",
            None,
            total(|engine| engine.segments_free),
        ),
        (
            "kvar_write_in_flight_max",
            "Bytes of writes kept under way at most, as found when the devices were formatted",
            bytes(),
            total(|engine| engine.write_in_flight_bytes_max),
        ),
        (
            "kvar_dirty",
            "Bytes in memory that wait to be written",
            bytes(),
            total(|engine| engine.dirty_bytes),
        ),
        (
            "kvar_index",
            "Memory of the index",
            bytes(),
            total(|engine| engine.index_bytes),
        ),
        (
            "kvar_leased_blocks",
            "Blocks that are promised to somebody",
            None,
            total(|engine| engine.leased_blocks),
        ),
        (
            "kvar_leased_dram",
            "Memory charged for leases; a tenth is the limit",
            bytes(),
            total(|engine| engine.leased_dram_bytes),
        ),
        (
            "kvar_leased_flash",
            "Bytes of devices charged for leases; a tenth is the limit",
            bytes(),
            total(|engine| engine.leased_flash_bytes),
        ),
        (
            "kvar_expiring_blocks",
            "Blocks on devices that have a time to live",
            None,
            total(|engine| engine.expiring_blocks),
        ),
        (
            "kvar_dram_held",
            "Bytes in memory alone that wait to be decided about: written when they leave, if \
             worth a place",
            bytes(),
            report.held_bytes as f64,
        ),
        (
            "kvar_keep_threshold",
            "What a place on the device must be worth, in the mean of the shards: a chance to be \
             used before it is reclaimed",
            None,
            report
                .shards
                .iter()
                .map(|shard| shard.engine.keep_threshold)
                .sum::<f64>()
                / report.shards.len().max(1) as f64,
        ),
        (
            "kvar_memory_bound",
            "What resident memory stays under with the links open now",
            bytes(),
            report.memory_bytes_bound as f64,
        ),
        (
            "kvar_device_trouble",
            "Shards whose device takes no writes at the moment",
            None,
            in_trouble as f64,
        ),
        (
            "kvar_io_uring",
            "1 if every shard moves bytes by io_uring, 0 if some fell back to threads",
            None,
            f64::from(u8::from(io_uring)),
        ),
        (
            "kvar_shards_silent",
            "Threads that did not answer this scrape",
            None,
            f64::from(report.threads_silent),
        ),
        (
            "kvar_links_open",
            "Links open now",
            None,
            links.links_open as f64,
        ),
        (
            "kvar_links_shared",
            "Links open now that share memory with their client",
            None,
            links.links_shared as f64,
        ),
        (
            "kvar_staging_bytes",
            "Memory of the staging regions of the links open now",
            bytes(),
            links.staging_bytes as f64,
        ),
    ]
}
