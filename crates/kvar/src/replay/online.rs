//! A trace against a node.
//!
//! ```text
//!   for each request, in the order of the trace
//!     look up the ids its input covers            -> leading blocks that are there
//!     get those, check every byte                 -> hits, up to the first that fails
//!     put all others, each under a nonce of its own; busy is retried
//! ```
//!
//! What must always be true: every byte that comes back is checked against one complete put of that
//! block; a node that goes away ends the replay with a report instead of a hang.

use crate::connect::{Connected, connect};
use crate::failure::{Failure, Outcome};
use crate::print;
use crate::replay::journal::JournalWriter;
use crate::replay::order::Order;
use crate::replay::payload;
use crate::replay::source::read_trace;
use crate::replay::tally::{ReportFacts, Tally};
use crate::replay_arguments::{Pace, ReplayArguments};
use indicatif::{ProgressBar, ProgressStyle};
use kvar_base::{BlockId, ByteSize, ContentFingerprint, MissReason, PutOutcome, Refusal};
use kvar_client::{
    CallOptions, Filled, GetItem, GetOutcome, GetResult, Lengths, PutHints, PutItem,
};
use kvar_plan::{OfflineOptions, Request, Trace, TraceOptions, replay_offline};
use parking_lot::Mutex;
use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of payload that one worker has on its way at most: a long prompt is several calls.
const CALL_BYTES_MAX: usize = 64 << 20;

/// How long what a busy node turned away is tried again: longer than a flush takes on a disk that others
/// keep busy, which can be tens of seconds.
const BUSY_RETRY_MAX: Duration = Duration::from_secs(120);

/// First and longest pause before a busy node is asked again.
const BUSY_PAUSE: Duration = Duration::from_millis(1);
const BUSY_PAUSE_MAX: Duration = Duration::from_millis(50);

/// Requests in a row without any answer after which the node counts as gone.
const UNANSWERED_MAX: u64 = 3;

/// Runs a replay and prints its report. Fails if a byte was wrong or the node went away.
pub(crate) fn run(
    arguments: &ReplayArguments,
    trace: &Path,
    options: &TraceOptions,
    block_bytes: ByteSize,
) -> Outcome {
    let mut trace = read_trace(trace, options).map_err(Failure::failed)?;
    trace
        .requests
        .truncate(arguments.requests.unwrap_or(usize::MAX));
    let connected = connect(&arguments.node)?;
    check_block_bytes(&connected, block_bytes, arguments.sections)?;
    let block_len = usize::try_from(block_bytes.0)
        .map_err(|_| Failure::usage("--block-bytes is larger than this machine's memory"))?;
    let journal = arguments
        .journal
        .as_deref()
        .map(|path| JournalWriter::create(path, block_len).map_err(Failure::failed))
        .transpose()?;
    let ceiling = OfflineOptions {
        capacities: Vec::new(),
        ..OfflineOptions::default()
    };
    let ceiling = replay_offline(&trace, &ceiling).map_err(Failure::usage)?;
    let shape = format!(
        "replay block_bytes={block_len} sections={}",
        arguments.sections
    );
    let replay = Replay {
        arguments,
        trace: &trace,
        connected: &connected,
        fingerprint: ContentFingerprint::of_text(&shape),
        lengths: section_lengths(block_len, arguments.sections),
        block_len,
        order: Order::new(trace.requests.len()),
        tally: Mutex::new(Tally::new()),
        journal: Mutex::new(journal),
        // Puts of another replay have other nonces.
        next_nonce: AtomicU64::new(writer_nonce()),
        touch_base: writer_nonce() >> 1,
        unanswered: AtomicU64::new(0),
        aborted: Mutex::new(None),
        began: Instant::now(),
        bar: progress_bar(trace.requests.len()),
    };
    std::thread::scope(|scope| {
        for _ in 0..arguments.concurrency {
            scope.spawn(|| replay.work());
        }
    });
    let elapsed_s = replay.began.elapsed().as_secs_f64();
    replay.bar.finish_and_clear();
    if let Some(journal) = &mut *replay.journal.lock() {
        journal.flush().map_err(Failure::failed)?;
    }
    let aborted = replay.aborted.lock().clone();
    let report = replay.tally.lock().report(ReportFacts {
        ceiling_block_hit_rate: ceiling.ceiling_block_hit_rate,
        ceiling_token_hit_rate: ceiling.ceiling_token_hit_rate,
        write_amplification: write_amplification(&connected),
        block_bytes: block_bytes.0,
        block_tokens: trace.block_tokens,
        concurrency: arguments.concurrency,
        elapsed_s,
        aborted: aborted.clone(),
    });
    if arguments.json {
        print::json(&report)?;
    } else {
        print::named(&report.rows())?;
    }
    if report.wrong_bytes > 0 {
        return Err(Failure::failed(format!(
            "{} blocks came back with wrong bytes: this must never be; keep the data file and the \
             node's log",
            report.wrong_blocks
        )));
    }
    aborted.map_or(Ok(()), |why| Err(Failure::failed(why)))
}

struct Replay<'a> {
    arguments: &'a ReplayArguments,
    trace: &'a Trace,
    connected: &'a Connected,
    fingerprint: ContentFingerprint,
    lengths: Vec<u32>,
    block_len: usize,
    order: Order,
    tally: Mutex<Tally>,
    journal: Mutex<Option<JournalWriter>>,
    next_nonce: AtomicU64,
    touch_base: u64,
    unanswered: AtomicU64,
    aborted: Mutex<Option<String>>,
    began: Instant,
    bar: ProgressBar,
}

impl Replay<'_> {
    fn work(&self) {
        // Memory of blocks, used again from one request to the next.
        let mut spare = Vec::new();
        let ids_of = |number: usize| {
            self.trace.requests[number]
                .hash_ids
                .iter()
                .copied()
                .collect::<HashSet<u64>>()
        };
        while let Some(number) = self.order.next(ids_of) {
            self.order.wait(number);
            if self.aborted.lock().is_none() {
                self.pace(number);
                if let Err(why) = self.request(number, &mut spare) {
                    *self.aborted.lock() = Some(why);
                    self.order.stop();
                }
            }
            self.order.finish(number);
            self.bar.inc(1);
        }
    }

    fn pace(&self, number: usize) {
        if self.arguments.pace == Pace::Real {
            let first = self
                .trace
                .requests
                .first()
                .map_or(0, |request| request.timestamp_ms);
            let at = self.trace.requests[number]
                .timestamp_ms
                .saturating_sub(first);
            let at = Duration::from_millis(at);
            std::thread::sleep(at.saturating_sub(self.began.elapsed()));
        }
    }

    fn id(&self, hash: u64) -> BlockId {
        let key = &self.connected.key;
        BlockId::derive(key, &hash.to_le_bytes(), &self.fingerprint, (0, 1), 0)
    }

    fn request(&self, number: usize, spare: &mut Vec<Vec<u8>>) -> Result<(), String> {
        let request = &self.trace.requests[number];
        let ids: Vec<BlockId> = request.hash_ids.iter().map(|hash| self.id(*hash)).collect();
        let options = CallOptions {
            touch_request: self.touch_base + number as u64 + 1,
            ..self.connected.options
        };
        let leading = self.look_up(request, &ids, options)?;
        let remove = self.arguments.remove_every > 0
            && (number + 1).is_multiple_of(self.arguments.remove_every);
        let mut puts: HashSet<u64> = request.hash_ids[leading..].iter().copied().collect();
        puts.extend(request.hash_ids.last().filter(|_| remove));
        self.order.will_put(number, puts);
        let hits = self.get(&ids[..leading], options, spare)?;
        {
            let mut tally = self.tally.lock();
            tally.requests += 1;
            tally.lookup_blocks += request.lookup_blocks as u64;
            tally.hit_blocks += hits as u64;
            tally.input_tokens += request.input_length;
            tally.hit_tokens += request.hit_tokens(hits, self.trace.block_tokens);
        }
        for (part, ids) in ids[hits..].chunks(self.blocks_a_call()).enumerate() {
            let depth = hits + part * self.blocks_a_call();
            self.put(ids, depth, request.traffic_class, options, spare)?;
        }
        if remove && let Some(id) = ids.last() {
            let class = request.traffic_class;
            self.remove(id, ids.len() - 1, class, options, spare)?;
        }
        Ok(())
    }

    fn blocks_a_call(&self) -> usize {
        (CALL_BYTES_MAX / self.block_len).clamp(1, 1024)
    }

    /// A call was answered, or not; enough of the latter in a row, and the node is gone.
    fn answered(&self, answered: bool) -> Result<(), String> {
        if answered {
            self.unanswered.store(0, Ordering::Relaxed);
            return Ok(());
        }
        self.tally.lock().failed_calls += 1;
        if self.unanswered.fetch_add(1, Ordering::Relaxed) + 1 < UNANSWERED_MAX {
            return Ok(());
        }
        let why = self.connected.client.last_error();
        let why = why.map_or_else(String::new, |error| format!(" ({error})"));
        Err(format!("the node went away{why}"))
    }

    fn look_up(
        &self,
        request: &Request,
        ids: &[BlockId],
        options: CallOptions,
    ) -> Result<usize, String> {
        let asked = ids[..request.lookup_blocks].to_vec();
        if asked.is_empty() {
            return Ok(0);
        }
        let begun = self.tally.lock().lookup.begin();
        let lookup = self.connected.client.submit_lookup(asked, options).wait();
        let mut tally = self.tally.lock();
        tally.lookup.end(begun);
        let leading = lookup.leading.min(request.lookup_blocks);
        let missing = (request.lookup_blocks - leading) as u64;
        tally.miss(lookup.reason.unwrap_or(MissReason::Absent), missing);
        drop(tally);
        self.answered(!lookup.reason.is_some_and(is_failure))?;
        Ok(leading)
    }

    /// Reads blocks and checks them; how many leading ones are hits. Blocks that the node is too
    /// busy to read are asked for again.
    fn get(
        &self,
        ids: &[BlockId],
        options: CallOptions,
        spare: &mut Vec<Vec<u8>>,
    ) -> Result<usize, String> {
        let mut is_hit = vec![false; ids.len()];
        for (part, chunk) in ids.chunks(self.blocks_a_call()).enumerate() {
            let first = part * self.blocks_a_call();
            let mut left: Vec<usize> = (first..first + chunk.len()).collect();
            let mut retry = Retry::new();
            while !left.is_empty() {
                let items = left.iter().map(|depth| GetItem {
                    expected: Lengths::of(&self.lengths),
                    depth: *depth as u32,
                    into: Filled::Bytes(spare.pop().unwrap_or_default()),
                    ..GetItem::to_vec(ids[*depth])
                });
                let items = items.collect();
                let begun = self.tally.lock().get.begin();
                let results = self.connected.client.submit_get(items, options).wait();
                self.tally.lock().get.end(begun);
                let mut failed = results.len() < left.len();
                let mut again = Vec::new();
                for (depth, result) in left.iter().zip(results) {
                    if result.outcome == GetOutcome::Miss(MissReason::Overloaded) && retry.may() {
                        self.tally.lock().busy_retries += 1;
                        again.push(*depth);
                    } else {
                        is_hit[*depth] = self.check(&result, &mut failed);
                    }
                    if let Filled::Bytes(bytes) = result.into {
                        spare.push(bytes);
                    }
                }
                self.answered(!failed)?;
                left = again;
                if !left.is_empty() {
                    retry.pause();
                }
            }
        }
        Ok(is_hit.iter().take_while(|is_hit| **is_hit).count())
    }

    /// Counts a read; whether it is a hit with right bytes.
    fn check(&self, result: &GetResult, failed: &mut bool) -> bool {
        let verified = result
            .bytes()
            .map(|bytes| (bytes.len(), payload::verify(bytes, &result.id).is_some()));
        let mut tally = self.tally.lock();
        tally.got_blocks += 1;
        match (&result.outcome, verified) {
            (_, Some((len, true))) => {
                tally.verified_bytes += len as u64;
                true
            }
            (_, Some((len, false))) => {
                tally.wrong_bytes += len as u64;
                tally.wrong_blocks += 1;
                false
            }
            (GetOutcome::Miss(reason), None) => {
                tally.miss(*reason, 1);
                *failed |= is_failure(*reason);
                false
            }
            (GetOutcome::Hit { .. }, None) => false,
        }
    }

    /// Puts blocks until each is stored, there already, or has failed.
    fn put(
        &self,
        ids: &[BlockId],
        first_depth: usize,
        traffic_class: u8,
        options: CallOptions,
        spare: &mut Vec<Vec<u8>>,
    ) -> Result<(), String> {
        let mut left: Vec<(usize, BlockId)> = ids.iter().copied().enumerate().collect();
        let mut retry = Retry::new();
        while !left.is_empty() {
            let mut nonces = Vec::with_capacity(left.len());
            let mut items = Vec::with_capacity(left.len());
            for (index, id) in &left {
                let nonce = self.next_nonce.fetch_add(1, Ordering::Relaxed);
                let mut bytes = spare.pop().unwrap_or_default();
                bytes.resize(self.block_len, 0);
                payload::fill(&mut bytes, id, nonce);
                let hints = PutHints {
                    depth: (first_depth + index) as u32,
                    request: options.touch_request,
                    traffic_class,
                    ..PutHints::default()
                };
                let lengths = self.lengths.clone();
                items.push(PutItem {
                    hints,
                    lengths,
                    ..PutItem::of_bytes(*id, bytes)
                });
                nonces.push(nonce);
            }
            self.journal(|journal| {
                let mut lines = left.iter().zip(&nonces);
                lines.try_for_each(|((_, id), nonce)| journal.putting(id, *nonce))
            })?;
            let begun = self.tally.lock().put.begin();
            let outcomes = self.connected.client.submit_put(items, options).wait();
            let mut again = Vec::new();
            let mut failed = false;
            {
                let mut tally = self.tally.lock();
                tally.put.end(begun);
                for ((place, outcome), nonce) in left.iter().zip(&outcomes).zip(&nonces) {
                    let id = &place.1;
                    if *outcome == PutOutcome::Refused(Refusal::Busy) && retry.may() {
                        tally.busy_retries += 1;
                        again.push(*place);
                        continue;
                    }
                    tally.put_outcome(*outcome);
                    match outcome {
                        PutOutcome::Stored => {
                            tally.put_bytes += self.block_len as u64;
                            self.journal(|journal| journal.stored(id, *nonce))?;
                        }
                        PutOutcome::Exists => self.journal(|journal| journal.exists(id))?,
                        PutOutcome::InProgress => {}
                        PutOutcome::Refused(_) => failed = true,
                    }
                }
            }
            self.answered(!failed)?;
            left = again;
            if !left.is_empty() {
                retry.pause();
            }
        }
        Ok(())
    }

    /// Removes a block and, every other time, puts it anew.
    fn remove(
        &self,
        id: &BlockId,
        depth: usize,
        traffic_class: u8,
        options: CallOptions,
        spare: &mut Vec<Vec<u8>>,
    ) -> Result<(), String> {
        self.journal(|journal| journal.removing(id))?;
        let removed = self.connected.client.remove(&[*id], options);
        if removed.is_ok() {
            self.tally.lock().removed_blocks += 1;
            self.journal(|journal| journal.removed(id))?;
        }
        self.answered(removed.is_ok())?;
        if self.tally.lock().removed_blocks.is_multiple_of(2) {
            self.put(&[*id], depth, traffic_class, options, spare)?;
        }
        Ok(())
    }

    fn journal(
        &self,
        write: impl FnOnce(&mut JournalWriter) -> Result<(), String>,
    ) -> Result<(), String> {
        self.journal.lock().as_mut().map_or(Ok(()), write)
    }
}

/// Asking a busy node again, less and less often, and not for ever.
struct Retry {
    until: Instant,
    pause: Duration,
}

impl Retry {
    fn new() -> Self {
        Self {
            until: Instant::now() + BUSY_RETRY_MAX,
            pause: BUSY_PAUSE,
        }
    }

    fn may(&self) -> bool {
        Instant::now() < self.until
    }

    fn pause(&mut self) {
        std::thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(BUSY_PAUSE_MAX);
    }
}

/// Whether a miss means that the node did not do its work, rather than that nothing was there.
pub(crate) fn is_failure(reason: MissReason) -> bool {
    matches!(
        reason,
        MissReason::Unreachable
            | MissReason::Deadline
            | MissReason::Overloaded
            | MissReason::NotOwner
    )
}

fn check_block_bytes(
    connected: &Connected,
    block_bytes: ByteSize,
    sections: u16,
) -> Result<(), Failure> {
    let least = payload::BLOCK_BYTES_MIN.max(usize::from(sections)) as u64;
    if block_bytes.0 < least {
        return Err(Failure::usage(format!(
            "--block-bytes {block_bytes} is too small to be checked; at least {least}"
        )));
    }
    match connected.client.limits() {
        Some(limits) if block_bytes.0 > u64::from(limits.block_bytes_max) => {
            Err(Failure::usage(format!(
                "--block-bytes {block_bytes} is more than the largest block of this node, {}; give \
                 less, or serve a larger device",
                ByteSize(u64::from(limits.block_bytes_max))
            )))
        }
        _ => Ok(()),
    }
}

/// Lengths of the sections of a block: equal, the last takes what is left over.
fn section_lengths(block_len: usize, sections: u16) -> Vec<u32> {
    let count = usize::from(sections);
    let each = block_len / count;
    let mut lengths = vec![each as u32; count];
    if let Some(last) = lengths.last_mut() {
        *last += (block_len - each * count) as u32;
    }
    lengths
}

/// A number that no other replay begins with: 40 bits of the clock above 24 bits of room would
/// repeat, so it is the clock's nanoseconds folded with the process number.
fn writer_nonce() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_nanos() as u64);
    now ^ (u64::from(std::process::id()) << 48)
}

fn write_amplification(connected: &Connected) -> Option<f64> {
    let status = connected.client.status(connected.options).ok()?;
    let status: serde_json::Value = serde_json::from_str(&status).ok()?;
    status["write_amplification"].as_f64()
}

fn progress_bar(requests: usize) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{bar:40} {pos}/{len} requests, {per_sec}, {eta} left");
    ProgressBar::new(requests as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
