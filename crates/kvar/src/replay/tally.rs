//! What a replay counts, and the report it ends with.
//!
//! | figure | meaning |
//! |---|---|
//! | hit | a block looked up that was there, was read and passed both checks, and so did every block before it |
//! | ceiling | the hit rate if nothing ever left: each block of the trace seen before is a hit |
//! | `*_us` | one call of the client, which carries all blocks of a request (`blocks_per_get_call`) |
//! | `*_bytes_per_s` | bytes over the time in which at least one such call was under way |
//! | failed call | one that ended by deadline, unreachable node or a refusal that retrying did not mend |

use hdrhistogram::Histogram;
use kvar_base::{MissReason, PutOutcome};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Longest call that a histogram tells from longer ones.
const CALL_US_MAX: u64 = 600_000_000;

/// Time in which at least one call of a kind was under way, and how long each took.
pub(crate) struct Meter {
    under_way: u32,
    since: Instant,
    busy: Duration,
    histogram: Histogram<u64>,
}

impl Meter {
    fn new() -> Self {
        // Three digits: a thousandth is finer than any clock noise here.
        let histogram =
            Histogram::new_with_max(CALL_US_MAX, 3).expect("bounds that a histogram takes");
        Self {
            under_way: 0,
            since: Instant::now(),
            busy: Duration::ZERO,
            histogram,
        }
    }

    /// A call begins.
    pub(crate) fn begin(&mut self) -> Instant {
        let now = Instant::now();
        if self.under_way == 0 {
            self.since = now;
        }
        self.under_way += 1;
        now
    }

    /// It is over.
    pub(crate) fn end(&mut self, begun: Instant) {
        let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.histogram.saturating_record(took.max(1));
        self.under_way -= 1;
        if self.under_way == 0 {
            self.busy += self.since.elapsed();
        }
    }

    fn quantile(&self, quantile: f64) -> Option<u64> {
        (!self.histogram.is_empty()).then(|| self.histogram.value_at_quantile(quantile))
    }

    fn per_second(&self, bytes: u64) -> f64 {
        let seconds = self.busy.as_secs_f64();
        if seconds > 0.0 {
            bytes as f64 / seconds
        } else {
            0.0
        }
    }
}

/// Everything counted; one for all workers, behind a lock that is held for nanoseconds.
pub(crate) struct Tally {
    pub(crate) lookup: Meter,
    pub(crate) get: Meter,
    pub(crate) put: Meter,
    pub(crate) requests: u64,
    pub(crate) lookup_blocks: u64,
    pub(crate) hit_blocks: u64,
    pub(crate) input_tokens: u64,
    pub(crate) hit_tokens: u64,
    pub(crate) got_blocks: u64,
    pub(crate) verified_bytes: u64,
    pub(crate) wrong_bytes: u64,
    pub(crate) wrong_blocks: u64,
    pub(crate) put_bytes: u64,
    pub(crate) removed_blocks: u64,
    pub(crate) failed_calls: u64,
    pub(crate) busy_retries: u64,
    pub(crate) misses: BTreeMap<&'static str, u64>,
    pub(crate) puts: BTreeMap<&'static str, u64>,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            lookup: Meter::new(),
            get: Meter::new(),
            put: Meter::new(),
            requests: 0,
            lookup_blocks: 0,
            hit_blocks: 0,
            input_tokens: 0,
            hit_tokens: 0,
            got_blocks: 0,
            verified_bytes: 0,
            wrong_bytes: 0,
            wrong_blocks: 0,
            put_bytes: 0,
            removed_blocks: 0,
            failed_calls: 0,
            busy_retries: 0,
            misses: BTreeMap::new(),
            puts: BTreeMap::new(),
        }
    }

    pub(crate) fn miss(&mut self, reason: MissReason, blocks: u64) {
        if blocks > 0 {
            *self.misses.entry(reason.word()).or_default() += blocks;
        }
    }

    pub(crate) fn put_outcome(&mut self, outcome: PutOutcome) {
        *self.puts.entry(outcome.word()).or_default() += 1;
    }

    /// The report.
    pub(crate) fn report(&self, facts: ReportFacts) -> Report {
        let share = |part: u64, whole: u64| {
            if whole > 0 {
                part as f64 / whole as f64
            } else {
                0.0
            }
        };
        let get_calls = self.get.histogram.len();
        Report {
            block_hit_rate: share(self.hit_blocks, self.lookup_blocks),
            token_hit_rate: share(self.hit_tokens, self.input_tokens),
            wrong_bytes: self.wrong_bytes,
            wrong_blocks: self.wrong_blocks,
            verified_bytes: self.verified_bytes,
            get_bytes_per_s: self.get.per_second(self.verified_bytes),
            put_bytes_per_s: self.put.per_second(self.put_bytes),
            lookup_p50_us: self.lookup.quantile(0.5),
            lookup_p99_us: self.lookup.quantile(0.99),
            get_p50_us: self.get.quantile(0.5),
            get_p99_us: self.get.quantile(0.99),
            put_p50_us: self.put.quantile(0.5),
            put_p99_us: self.put.quantile(0.99),
            blocks_per_get_call: share(self.got_blocks, get_calls),
            misses: self.misses.clone(),
            puts: self.puts.clone(),
            removed_blocks: self.removed_blocks,
            failed_calls: self.failed_calls,
            busy_retries: self.busy_retries,
            requests: self.requests,
            lookup_blocks: self.lookup_blocks,
            hit_blocks: self.hit_blocks,
            put_bytes: self.put_bytes,
            facts,
        }
    }
}

/// What does not come from counting.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ReportFacts {
    pub(crate) ceiling_block_hit_rate: f64,
    pub(crate) ceiling_token_hit_rate: f64,
    pub(crate) write_amplification: Option<f64>,
    pub(crate) block_bytes: u64,
    pub(crate) block_tokens: u64,
    pub(crate) concurrency: u16,
    pub(crate) elapsed_s: f64,
    /// Why the replay ended before the trace did.
    pub(crate) aborted: Option<String>,
}

/// The report: one flat JSON object.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) block_hit_rate: f64,
    pub(crate) token_hit_rate: f64,
    pub(crate) wrong_bytes: u64,
    pub(crate) wrong_blocks: u64,
    pub(crate) verified_bytes: u64,
    pub(crate) get_bytes_per_s: f64,
    pub(crate) put_bytes_per_s: f64,
    pub(crate) lookup_p50_us: Option<u64>,
    pub(crate) lookup_p99_us: Option<u64>,
    pub(crate) get_p50_us: Option<u64>,
    pub(crate) get_p99_us: Option<u64>,
    pub(crate) put_p50_us: Option<u64>,
    pub(crate) put_p99_us: Option<u64>,
    pub(crate) blocks_per_get_call: f64,
    pub(crate) misses: BTreeMap<&'static str, u64>,
    pub(crate) puts: BTreeMap<&'static str, u64>,
    pub(crate) removed_blocks: u64,
    pub(crate) failed_calls: u64,
    pub(crate) busy_retries: u64,
    pub(crate) requests: u64,
    pub(crate) lookup_blocks: u64,
    pub(crate) hit_blocks: u64,
    pub(crate) put_bytes: u64,
    #[serde(flatten)]
    pub(crate) facts: ReportFacts,
}

impl Report {
    /// For people.
    pub(crate) fn rows(&self) -> Vec<Vec<String>> {
        let percent = |rate: f64| format!("{:.1} %", rate * 100.0);
        let speed = |bytes: f64| format!("{:.1} MB/s", bytes / 1e6);
        let us = |value: Option<u64>| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value} us"))
        };
        let words = |counts: &BTreeMap<&'static str, u64>| {
            let words: Vec<String> = counts
                .iter()
                .map(|(word, count)| format!("{word} {count}"))
                .collect();
            if words.is_empty() {
                "none".to_owned()
            } else {
                words.join(", ")
            }
        };
        let facts = &self.facts;
        let amplification = facts
            .write_amplification
            .map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
        let row = |name: &str, value: String| vec![name.to_owned(), value];
        let mut rows = vec![
            row(
                "requests",
                format!("{} in {:.1} s", self.requests, facts.elapsed_s),
            ),
            row(
                "block hit rate",
                format!(
                    "{} (ceiling {})",
                    percent(self.block_hit_rate),
                    percent(facts.ceiling_block_hit_rate)
                ),
            ),
            row(
                "token hit rate",
                format!(
                    "{} (ceiling {})",
                    percent(self.token_hit_rate),
                    percent(facts.ceiling_token_hit_rate)
                ),
            ),
            row("bytes verified", self.verified_bytes.to_string()),
            row("wrong bytes", self.wrong_bytes.to_string()),
            row("get", speed(self.get_bytes_per_s)),
            row("put", speed(self.put_bytes_per_s)),
            row(
                "lookup p50 / p99",
                format!("{} / {}", us(self.lookup_p50_us), us(self.lookup_p99_us)),
            ),
            row(
                "get call p50 / p99",
                format!(
                    "{} / {} ({:.1} blocks each)",
                    us(self.get_p50_us),
                    us(self.get_p99_us),
                    self.blocks_per_get_call
                ),
            ),
            row(
                "put call p50 / p99",
                format!("{} / {}", us(self.put_p50_us), us(self.put_p99_us)),
            ),
            row("misses", words(&self.misses)),
            row("puts", words(&self.puts)),
            row("failed calls", self.failed_calls.to_string()),
            row("write amplification", amplification),
        ];
        if let Some(aborted) = &facts.aborted {
            rows.push(row("ended early", aborted.clone()));
        }
        rows
    }
}
