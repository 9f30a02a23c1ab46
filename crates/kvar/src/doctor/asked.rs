//! What was asked for and not served, and what was given and not taken: why, and what to do.

use super::{Finding, Grade, counts, list, number};
use serde_json::Value;

/// Share of blocks asked for from which on one reason for missing is worth a line.
const REASON_SHARE_MIN: f64 = 0.01;
/// So few lookups say nothing yet: prompts that were never there before.
const LOOKUPS_TO_JUDGE: u64 = 256;
/// Of what is kept, so little may be what earlier visits of this command left in the counters.
const KEPT_TO_JUDGE: u64 = 16;
/// A store that refuses so much of what it is given keeps little of use.
const REFUSED_SHARE_MAX: f64 = 0.5;

/// Whether what is stored is found, and each reason for a miss or a refusal that is worth a line.
pub(super) fn asked(status: &Value) -> Vec<Finding> {
    let links = &status["links"];
    let hits = number(links, "get_hits");
    let misses = counts(&links["get_misses"]);
    let asked = hits + misses.values().sum::<u64>();
    let looked_up = number(links, "lookup_ids");
    let shards = list(&status["shards"]).iter();
    let found_there: u64 = shards
        .map(|shard| number(&shard["engine"]["counters"], "lookup_hits"))
        .sum();
    let puts = counts(&links["puts"]);
    let of = |word: &str| puts.get(word).copied().unwrap_or(0);
    let kept = of("stored") + of("exists") + of("in_progress");
    let found = format!(
        "{looked_up} blocks looked up and {found_there} of them found; {hits} of {asked} asked for were \
         served; {kept} kept"
    );
    let (grade, advice) = if looked_up == 0 {
        let advice = "nobody has looked anything up since the node started: is the engine set to this endpoint, its \
                      connector's mode to load (kvar mode), kv_role to kv_both?";
        (Grade::Note, advice)
    } else if looked_up < LOOKUPS_TO_JUDGE || found_there > 0 {
        (Grade::Ok, "")
    } else if kept < KEPT_TO_JUDGE {
        let advice = "nothing is kept: is the mode save or load (kvar mode), are prompts longer than one block, does \
                      the engine's log say why it does not store?";
        (Grade::Wrong, advice)
    } else {
        let advice = "what is kept is never found under the names asked for: do the engines agree (below), and did \
                      any prompt come twice?";
        (Grade::Wrong, advice)
    };
    let mut findings = vec![Finding::new(grade, "asked", found, advice)];
    for (reason, count) in misses {
        let (grade, advice) = about_miss(&reason);
        let is_much = count as f64 >= REASON_SHARE_MIN * asked as f64;
        if count > 0 && (is_much || grade == Grade::Wrong) {
            let found = format!("{count} of {asked} blocks asked for: {reason}");
            findings.push(Finding::new(grade, "misses", found, advice));
        }
    }
    let tried: u64 = puts.values().sum();
    for (outcome, count) in &puts {
        let share = *count as f64 / tried.max(1) as f64;
        if let Some(advice) = about_refusal(outcome)
            && share >= REASON_SHARE_MIN
        {
            let found = format!("{count} of {tried} puts: {outcome}");
            let grade = if share >= REFUSED_SHARE_MAX {
                Grade::Wrong
            } else {
                Grade::Note
            };
            findings.push(Finding::new(grade, "puts", found, advice));
        }
    }
    findings
}

fn about_miss(reason: &str) -> (Grade, &'static str) {
    match reason {
        "absent" => (
            Grade::Note,
            "never stored under that name, or made room for others: do the engines agree (below)? Would more \
             room help (kvar replay --offline)?",
        ),
        "evicted" => (
            Grade::Note,
            "made room for others while it was read: more memory (--dram), or leases (lease_ms)",
        ),
        "not_owner" | "unreachable" => (
            Grade::Note,
            "another node's, or a device out of service (above)",
        ),
        "expired" => (
            Grade::Note,
            "their time to live was over: raise ttl where blocks are put",
        ),
        "removed" => (Grade::Note, "somebody removed or purged them"),
        "corrupt" => (
            Grade::Wrong,
            "bytes failed their check and were not served: the device, its cable or memory is ill (kvar check, \
             smartctl, the kernel's log)",
        ),
        "version" => (
            Grade::Note,
            "a copy changed while it was read in parts; it is asked for again",
        ),
        "loading" => (
            Grade::Note,
            "asked while the node was loading after a start",
        ),
        "deadline" => (
            Grade::Note,
            "too slow for the caller: raise deadline_ms, or find what is slow (kvar bench node, kvar bench engine)",
        ),
        "overloaded" => (
            Grade::Note,
            "more under way than the node takes: more memory (--dram) or fewer callers",
        ),
        "wrong_format" => (
            Grade::Wrong,
            "stored with other section lengths than the reader expects: engines of different layout share names",
        ),
        _ => (Grade::Note, "see the glossary in docs/internals"),
    }
}

fn about_refusal(outcome: &str) -> Option<&'static str> {
    Some(match outcome {
        "busy" => {
            "no memory was free: flash is slower than what comes; raise --dram or the write budget"
        }
        "quota" => "the namespace's share was used up",
        "too_big" => "larger than the node's largest block: a larger device, or parts",
        "wrong_format" => {
            "bytes did not arrive as they were checked by the writer: memory changed under way"
        }
        "deadline" => "too slow for the writer: raise deadline_ms",
        "stale" | "unreachable" => {
            "the node was not the one for it, or a device went out of service meanwhile"
        }
        _ => return None,
    })
}
