//! What the node as a whole has done since its start.

use super::{Counter, sum};
use crate::report::NodeReport;
use kvar_engine::Counters;
use prometheus_client::registry::Unit;

pub(super) fn counters(report: &NodeReport<'_>) -> Vec<Counter> {
    let bytes = || Some(Unit::Bytes);
    let links = &report.links;
    let sum = |field: fn(&Counters) -> u64| sum(report, field);
    vec![
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
            "kvar_gets_placed",
            "Blocks, or parts of some, that were written into a staging region",
            None,
            links.gets_placed,
        ),
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
            "Blocks that the fast tier handed to the big one, flushed there, or found there",
            None,
            sum(|c| c.demoted),
        ),
        (
            "kvar_demoted_from_memory_blocks",
            "Of these, blocks that memory let go and the fast tier did not write",
            None,
            sum(|c| c.demoted_from_memory),
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
    ]
}
