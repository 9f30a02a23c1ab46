//! What happened by why: counters with a word for each reason, outcome or cause.

use super::{Labelled, sum};
use crate::report::NodeReport;
use kvar_engine::Counters;

pub(super) fn labelled(report: &NodeReport<'_>) -> Vec<Labelled> {
    let links = &report.links;
    let sum = |field: fn(&Counters) -> u64| sum(report, field);
    vec![
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
            name: "kvar_stage_declined",
            help: "Clients that asked for a staging region and have none, by reason",
            label: "reason",
            counts: links
                .stage_declined
                .iter()
                .map(|(why, count)| (why.word().to_owned(), count))
                .collect(),
        },
        Labelled {
            name: "kvar_overdue",
            help: "Work dropped because nobody waited for it any more, by where that was found",
            label: "where",
            // From a request's way in to its answer's way out.
            counts: vec![
                ("line".to_owned(), links.overdue.line),
                ("asked".to_owned(), links.overdue.asked),
                ("call".to_owned(), sum(|c| c.overdue_at_call)),
                ("device".to_owned(), sum(|c| c.overdue_at_device)),
                ("link".to_owned(), links.overdue.link),
            ],
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
            help: "Blocks that were not taken by the big tier although they were on their way there, by reason",
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
    ]
}
