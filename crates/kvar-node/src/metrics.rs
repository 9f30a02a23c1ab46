//! `/metrics`: the node's report in OpenMetrics text.
//!
//! Every number comes from one report taken at the scrape, so that the lines of one page belong
//! together. Names begin with `kvar_`; a unit ends the name; counters get `_total`.

use crate::report::NodeReport;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;

/// What the page is.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Everything of one page.
#[derive(Debug)]
struct Page {
    gauges: Vec<(&'static str, &'static str, Option<Unit>, f64)>,
    counters: Vec<(&'static str, &'static str, Option<Unit>, u64)>,
    labelled: Vec<Labelled>,
    /// Each namespace: its name, and for each of [`NAMESPACE_GAUGES`] and [`NAMESPACE_COUNTERS`] a
    /// value.
    namespaces: Vec<(Labels, Vec<f64>, Vec<u64>)>,
    /// Each device: its labels, and for each of [`DEVICE_GAUGES`] a value.
    devices: Vec<(Labels, Vec<f64>)>,
    /// Each tier: the same of [`TIER_GAUGES`].
    tiers: Vec<(Labels, Vec<f64>)>,
    info: Vec<(&'static str, String)>,
}

/// Names and values that tell lines of one metric apart.
type Labels = Vec<(&'static str, String)>;

/// What is said of each device.
const DEVICE_GAUGES: [(&str, &str); 7] = [
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

/// What is said of each namespace.
const NAMESPACE_GAUGES: [(&str, &str); 4] = [
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
];
const NAMESPACE_COUNTERS: [(&str, &str); 5] = [
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
];

/// What is said of each tier.
const TIER_GAUGES: [(&str, &str); 6] = [
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

/// A counter by a word.
#[derive(Debug)]
struct Labelled {
    name: &'static str,
    help: &'static str,
    label: &'static str,
    counts: Vec<(String, u64)>,
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, unit, value) in &self.gauges {
            let gauge = ConstGauge::new(*value);
            let line = encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?;
            gauge.encode(line)?;
        }
        for (name, help, unit, value) in &self.counters {
            let counter = ConstCounter::new(*value);
            let line =
                encoder.encode_descriptor(name, help, unit.as_ref(), counter.metric_type())?;
            counter.encode(line)?;
        }
        for Labelled {
            name,
            help,
            label,
            counts,
        } in &self.labelled
        {
            let kind = ConstCounter::new(0_u64).metric_type();
            let mut lines = encoder.encode_descriptor(name, help, None, kind)?;
            for (word, count) in counts {
                let labels = [(*label, word.as_str())];
                ConstCounter::new(*count).encode(lines.encode_family(&labels)?)?;
            }
        }
        for (gauges, of_each) in [
            (&DEVICE_GAUGES[..], &self.devices),
            (&TIER_GAUGES[..], &self.tiers),
        ] {
            for (number, (name, help)) in gauges.iter().enumerate() {
                let kind = ConstGauge::new(0_f64).metric_type();
                let mut lines = encoder.encode_descriptor(name, help, None, kind)?;
                for (labels, values) in of_each {
                    ConstGauge::new(values[number]).encode(lines.encode_family(labels)?)?;
                }
            }
        }
        for (number, (name, help)) in NAMESPACE_GAUGES.iter().enumerate() {
            let kind = ConstGauge::new(0_f64).metric_type();
            let mut lines = encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, values, _) in &self.namespaces {
                ConstGauge::new(values[number]).encode(lines.encode_family(labels)?)?;
            }
        }
        for (number, (name, help)) in NAMESPACE_COUNTERS.iter().enumerate() {
            let kind = ConstCounter::new(0_u64).metric_type();
            let mut lines = encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, _, values) in &self.namespaces {
                ConstCounter::new(values[number]).encode(lines.encode_family(labels)?)?;
            }
        }
        let one = ConstGauge::new(1_i64);
        let mut info = encoder.encode_descriptor(
            "kvar_build_info",
            "Always 1; version, device and mode of this node as labels",
            None,
            one.metric_type(),
        )?;
        one.encode(info.encode_family(&self.info)?)
    }
}

/// The page of a report.
pub(crate) fn page(report: &NodeReport<'_>) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(collect(report)));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

fn collect(report: &NodeReport<'_>) -> Page {
    let bytes = || Some(Unit::Bytes);
    let seconds = || Some(Unit::Seconds);
    let links = &report.links;
    let sum = |field: fn(&kvar_engine::Counters) -> u64| {
        report
            .shards
            .iter()
            .map(|shard| field(&shard.engine.counters))
            .sum::<u64>()
    };
    let total = |field: fn(&kvar_engine::ShardStatus) -> u64| {
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
    Page {
        gauges: vec![
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
        ],
        counters: vec![
            (
                "kvar_links_accepted",
                "Links accepted",
                None,
                links.links_accepted,
            ),
            (
                "kvar_links_refused",
                "Links turned away because connections_max were open",
                None,
                links.links_refused,
            ),
            (
                "kvar_links_attached",
                "Links that came to share memory with their client",
                None,
                links.links_attached,
            ),
            (
                "kvar_handshakes_failed",
                "Handshakes with a wrong key, version or namespace, or too slow",
                None,
                links.handshakes_failed,
            ),
            (
                "kvar_protocol_errors",
                "Links closed because the peer broke the protocol",
                None,
                links.protocol_errors,
            ),
            ("kvar_lookups", "Lookup requests", None, links.lookups),
            (
                "kvar_lookup_ids",
                "Block ids looked up",
                None,
                links.lookup_ids,
            ),
            (
                "kvar_lookup_hits",
                "Ids looked up that were there",
                None,
                sum(|c| c.lookup_hits),
            ),
            ("kvar_get_hits", "Blocks served", None, links.get_hits),
            (
                "kvar_get_hits_dram",
                "Blocks read from memory",
                None,
                sum(|c| c.dram_hits),
            ),
            (
                "kvar_get_hits_flash",
                "Blocks read from the device",
                None,
                sum(|c| c.flash_hits),
            ),
            ("kvar_removes", "Remove requests", None, links.removes),
            ("kvar_flushes", "Flush requests", None, links.flushes),
            ("kvar_purges", "Purge requests", None, links.purges),
            (
                "kvar_cancels",
                "Requests that their client cancelled",
                None,
                links.cancels,
            ),
            (
                "kvar_received",
                "Payload bytes received",
                bytes(),
                links.payload_bytes_in,
            ),
            (
                "kvar_sent",
                "Payload bytes handed to links",
                bytes(),
                links.payload_bytes_out,
            ),
            (
                "kvar_device_read",
                "Bytes read from the device",
                bytes(),
                sum(|c| c.device_read_bytes),
            ),
            (
                "kvar_device_written",
                "Bytes written to the device, all kinds",
                bytes(),
                sum(|c| c.block_write_bytes + c.moved_write_bytes + c.meta_write_bytes),
            ),
            (
                "kvar_device_flushes",
                "Device flushes",
                None,
                sum(|c| c.device_flushes),
            ),
            (
                "kvar_device_read_errors",
                "Device reads that failed",
                None,
                sum(|c| c.device_read_errors),
            ),
            (
                "kvar_device_reads_again",
                "Reads of blocks tried once more: refused, or not what was written",
                None,
                sum(|c| c.reads_again_error + c.reads_again_check),
            ),
            (
                "kvar_device_reads_mended",
                "Of these, well the second time",
                None,
                sum(|c| c.reads_mended),
            ),
            (
                "kvar_device_write_errors",
                "Device writes or flushes that failed",
                None,
                sum(|c| c.device_write_errors),
            ),
            (
                "kvar_corrupt",
                "Copies that did not pass their check and were dropped",
                None,
                sum(|c| c.corrupt),
            ),
            (
                "kvar_part_reads",
                "Reads of some sections of a block on a device",
                None,
                sum(|c| c.part_reads),
            ),
            (
                "kvar_scrub_blocks",
                "Blocks verified in the background",
                None,
                sum(|c| c.scrub_blocks),
            ),
            (
                "kvar_scrub_corrupt",
                "Of these, copies that were not what was written; they are removed",
                None,
                sum(|c| c.scrub_corrupt),
            ),
            (
                "kvar_scrub_read",
                "Bytes read for background verification",
                bytes(),
                sum(|c| c.scrub_read_bytes),
            ),
            (
                "kvar_id_divergence",
                "Puts of an id that is there with other bytes",
                None,
                sum(|c| c.id_divergence),
            ),
            (
                "kvar_demoted_blocks",
                "Blocks that reclaim handed to the big tier, flushed there, or found there",
                None,
                sum(|c| c.demoted),
            ),
            (
                "kvar_demoted",
                "Bytes of blocks that were written to the big tier for that",
                bytes(),
                sum(|c| c.demoted_bytes),
            ),
            (
                "kvar_checkpoints",
                "Checkpoints completed",
                None,
                sum(|c| c.checkpoints),
            ),
        ],
        labelled: vec![
            Labelled {
                name: "kvar_get_misses",
                help: "Blocks asked for and not served, by reason",
                label: "reason",
                counts: links
                    .get_misses
                    .iter()
                    .map(|(reason, count)| (reason.word().to_owned(), count))
                    .collect(),
            },
            Labelled {
                name: "kvar_attach_declined",
                help: "Clients that asked to share memory and stayed on TCP, by reason",
                label: "reason",
                counts: links
                    .attach_declined
                    .iter()
                    .map(|(why, count)| (why.word().to_owned(), count))
                    .collect(),
            },
            Labelled {
                name: "kvar_puts",
                help: "Puts by outcome",
                label: "outcome",
                counts: links
                    .puts
                    .iter()
                    .map(|(outcome, count)| (outcome.word().to_owned(), count))
                    .collect(),
            },
            Labelled {
                name: "kvar_leases",
                help: "Leases by what became of them; lost_ ones are promised blocks that went all the same",
                label: "event",
                counts: vec![
                    ("granted".to_owned(), sum(|c| c.leases_granted)),
                    ("refused".to_owned(), sum(|c| c.leases_refused)),
                    ("cut_short".to_owned(), sum(|c| c.leases_cut_short)),
                    ("renewed".to_owned(), sum(|c| c.leases_renewed)),
                    ("released".to_owned(), sum(|c| c.leases_released)),
                    ("expired".to_owned(), sum(|c| c.leases_expired)),
                    ("lost_removed".to_owned(), sum(|c| c.leased_removed)),
                    ("lost_corrupt".to_owned(), sum(|c| c.leased_corrupt)),
                    ("lost_dropped".to_owned(), sum(|c| c.leased_dropped)),
                ],
            },
            Labelled {
                name: "kvar_admissions",
                help: "Blocks written to a device, by reason, and those that were not: worth no place, \
                       the limit of writes was reached, or handed over to one reader",
                label: "reason",
                counts: vec![
                    ("asked".to_owned(), sum(|c| c.admitted_asked)),
                    ("budget".to_owned(), sum(|c| c.admitted_budget)),
                    ("worth".to_owned(), sum(|c| c.admitted_worth)),
                    ("chain".to_owned(), sum(|c| c.admitted_chain)),
                    ("kept".to_owned(), sum(|c| c.reclaim_kept)),
                    ("not_worth".to_owned(), sum(|c| c.not_admitted)),
                    ("not_limit".to_owned(), sum(|c| c.not_admitted_limit)),
                    ("not_handover".to_owned(), sum(|c| c.not_admitted_handover)),
                ],
            },
            Labelled {
                name: "kvar_handovers",
                help: "Blocks put to be read once: read, not read in time (overdue), pushed aside by others \
                       (crowded), gone from memory unread (lost)",
                label: "event",
                counts: vec![
                    ("read".to_owned(), sum(|c| c.handovers_read)),
                    ("overdue".to_owned(), sum(|c| c.handovers_overdue)),
                    ("crowded".to_owned(), sum(|c| c.handovers_crowded)),
                    ("lost".to_owned(), sum(|c| c.evicted_awaited)),
                ],
            },
            Labelled {
                name: "kvar_not_demoted",
                help: "Blocks that reclaim dropped although there is a big tier, by reason",
                label: "reason",
                counts: vec![
                    ("not_worth".to_owned(), sum(|c| c.not_demoted_not_worth)),
                    ("limit".to_owned(), sum(|c| c.not_demoted_limit)),
                    ("busy".to_owned(), sum(|c| c.not_demoted_busy)),
                    ("late".to_owned(), sum(|c| c.not_demoted_late)),
                    ("gone".to_owned(), sum(|c| c.not_demoted_gone)),
                    ("failed".to_owned(), sum(|c| c.not_demoted_failed)),
                ],
            },
            Labelled {
                name: "kvar_evictions",
                help: "Blocks that left a tier, by cause; dram_clean ones are still on the device, to_memory ones \
                       in memory",
                label: "cause",
                counts: vec![
                    ("dram_clean".to_owned(), sum(|c| c.dram_evicted_clean)),
                    (
                        "dram_gone".to_owned(),
                        sum(|c| c.dram_evicted_gone - c.evicted_ephemeral - c.evicted_undecided),
                    ),
                    ("dram_ephemeral".to_owned(), sum(|c| c.evicted_ephemeral)),
                    ("dram_undecided".to_owned(), sum(|c| c.evicted_undecided)),
                    ("dram_awaited".to_owned(), sum(|c| c.evicted_awaited)),
                    ("dram_spent".to_owned(), sum(|c| c.evicted_spent)),
                    ("to_memory".to_owned(), sum(|c| c.reclaim_to_memory)),
                    ("reclaim".to_owned(), sum(|c| c.reclaim_dropped)),
                    ("bucket".to_owned(), sum(|c| c.bucket_evicted)),
                    ("expired".to_owned(), sum(|c| c.expired)),
                    ("removed".to_owned(), sum(|c| c.removed)),
                    ("purged".to_owned(), sum(|c| c.purged)),
                    (
                        "device_lost".to_owned(),
                        report.shards.iter().map(|shard| shard.lost_blocks).sum(),
                    ),
                ],
            },
        ],
        devices: report
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
            .collect(),
        namespaces: report
            .namespaces
            .iter()
            .map(|it| {
                let gauges = vec![
                    f64::from(it.share.unwrap_or(0)),
                    it.part,
                    it.dram_bytes as f64,
                    it.flash_bytes as f64,
                ];
                let counters = vec![
                    it.counters.hits,
                    it.counters.misses,
                    it.counters.stored,
                    it.evicted,
                    it.kept_entitled,
                ];
                (vec![("namespace", it.name.clone())], gauges, counters)
            })
            .collect(),
        tiers: report
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
            .collect(),
        info: vec![
            ("version", report.facts.version.to_owned()),
            ("uuid", report.facts.uuid.clone()),
            ("insecure", report.facts.insecure.to_string()),
        ],
    }
}
