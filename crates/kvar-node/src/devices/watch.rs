//! Whether a device is still one.
//!
//! ```text
//!   fine ── a read or write fails hard ──> suspect ── fails on, nothing succeeds ──> fenced
//!    ▲                                        │
//!    └───────────── one succeeds ─────────────┘
//! ```
//!
//! A bad sector is no dead device: it costs its block, and the next read succeeds. A full file
//! system is none either: it refuses writes, and space may come back. So what counts is a run of
//! hard failures of one kind (reads; writes and flushes) without one success of that kind between:
//!
//! * reads: at least [`READ_RUN`], confirmed by a probe that reads the superblock copies, and reads
//!   them again a moment later (a node that reads little could meet three bad sectors in a row). The
//!   probe comes at once: failed reads take their blocks with them, so a device that is gone may
//!   soon be asked for nothing more;
//! * writes: at least [`WRITE_RUN`] over [`WRITE_RUN_LASTS`]: the engine leaves a device that
//!   refused alone for five seconds, so this is the third try.
//!
//! What must always be true: counting costs the data path two plain stores an operation.
//!
//! Beside it: when the device refuses a write stream that the kernel had reported, that is said once.
//!
//! What is absent: what happens then (`keeper`). A device that neither completes nor fails an
//! operation is not found here: its reads end by their callers' deadlines.

use kvar_base::Moment;
use kvar_io::{Completion, Device, DeviceError, Op, WriteStreams};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Failed reads in a row before a device is doubted.
const READ_RUN: u32 = 3;
/// How long a device that a probe found alive is left alone: a region of bad sectors is no reason to
/// probe all the time.
const PROBE_PAUSE: Duration = Duration::from_millis(500);
/// Failed writes in a row before a device is given up.
const WRITE_RUN: u32 = 3;
/// How long they must go on.
const WRITE_RUN_LASTS: Duration = Duration::from_secs(5);

/// What failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
}

/// Counts one engine's operations that went well; written by its thread, read by the keeper.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    reads: AtomicU64,
    writes: AtomicU64,
}

impl Watch {
    /// Operations of a kind that went well.
    pub(crate) fn succeeded(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Read => self.reads.load(Ordering::Relaxed),
            Kind::Write => self.writes.load(Ordering::Relaxed),
        }
    }
}

/// What a watched device says.
#[derive(Debug)]
pub(crate) enum Sign<'a> {
    /// An operation failed.
    Failed(Kind, &'a DeviceError),
    /// Writes go well again after one was refused.
    WritesAgain,
    /// The device took a write only without its stream.
    StreamRefused,
}

/// Told of every failure, and when writes go well again.
pub(crate) type OnSign = Box<dyn FnMut(Sign<'_>)>;

/// A device whose operations are watched.
pub(crate) struct WatchedDevice {
    inner: Box<dyn Device>,
    watch: Arc<Watch>,
    on_sign: OnSign,
    was_refused: bool,
    streams: WriteStreams,
    is_stream_refused: bool,
}

impl WatchedDevice {
    pub(crate) fn new(
        inner: Box<dyn Device>,
        streams: &WriteStreams,
        watch: Arc<Watch>,
        on_sign: OnSign,
    ) -> Self {
        Self {
            inner,
            watch,
            on_sign,
            was_refused: false,
            streams: streams.clone(),
            is_stream_refused: false,
        }
    }
}

/// Whether a failure says something about the device: a full file system and a defect of ours do
/// not.
pub(crate) fn is_hard(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Io { .. } | DeviceError::Short { .. })
}

impl Device for WatchedDevice {
    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }

    fn submit(&mut self, token: u64, op: Op) {
        self.inner.submit(token, op);
    }

    fn kick(&mut self) -> Result<(), DeviceError> {
        self.inner.kick()
    }

    fn poll(&mut self, out: &mut Vec<Completion>) {
        let before = out.len();
        self.inner.poll(out);
        let (mut reads, mut writes) = (0, 0);
        for completion in &out[before..] {
            let kind = match &completion.op {
                Op::Read { .. } => Kind::Read,
                Op::Write { .. } | Op::Flush => Kind::Write,
                // A device may refuse a hint and be well.
                Op::Discard { .. } => continue,
            };
            match (&completion.result, kind) {
                (Ok(()), Kind::Read) => reads += 1,
                (Ok(()), Kind::Write) => writes += 1,
                (Err(error), kind) => {
                    self.was_refused |= kind == Kind::Write;
                    (self.on_sign)(Sign::Failed(kind, error));
                }
            }
        }
        if self.was_refused && writes > 0 {
            self.was_refused = false;
            (self.on_sign)(Sign::WritesAgain);
        }
        if writes > 0 && !self.is_stream_refused && self.streams.is_refused() {
            self.is_stream_refused = true;
            (self.on_sign)(Sign::StreamRefused);
        }
        // This thread alone writes them: a load and a store, no locked operation.
        for (counter, more) in [(&self.watch.reads, reads), (&self.watch.writes, writes)] {
            if more > 0 {
                counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
            }
        }
    }

    fn wait(&mut self, timeout: Duration) {
        self.inner.wait(timeout);
    }

    fn readiness(&self) -> Option<RawFd> {
        self.inner.readiness()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn engine(&self) -> &'static str {
        self.inner.engine()
    }

    fn system_calls(&self) -> u64 {
        self.inner.system_calls()
    }
}

/// What a run of failures means so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing yet.
    Wait,
    /// It reads nothing that was asked for: see whether it reads anything at all.
    Probe,
    /// It is of no use any more.
    Fence,
}

/// A run of failures of one kind on one device.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Run {
    failures: u32,
    since: Moment,
    succeeded: u64,
    /// No verdict before this.
    not_before: Moment,
}

impl Run {
    /// One more; `succeeded` is how many operations of this kind went well on the device so far.
    pub(crate) fn failed(&mut self, kind: Kind, now: Moment, succeeded: u64) -> Verdict {
        if self.failures == 0 || succeeded != self.succeeded {
            (self.failures, self.since, self.succeeded) = (0, now, succeeded);
        }
        self.failures += 1;
        let (run, lasts, verdict) = match kind {
            Kind::Read => (READ_RUN, Duration::ZERO, Verdict::Probe),
            Kind::Write => (WRITE_RUN, WRITE_RUN_LASTS, Verdict::Fence),
        };
        if self.failures >= run && now.since(self.since) >= lasts && now >= self.not_before {
            verdict
        } else {
            Verdict::Wait
        }
    }

    /// Starts over: a probe found the device alive.
    pub(crate) fn end(&mut self, now: Moment) {
        self.failures = 0;
        self.not_before = now.after(PROBE_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment(ms * 1000)
    }

    #[test]
    fn the_third_failed_read_asks_for_a_probe_and_a_device_found_alive_is_left_alone() {
        let mut run = Run::default();
        let verdicts = [1000, 1000, 1000].map(|ms| run.failed(Kind::Read, at(ms), 7));
        assert_eq!(verdicts, [Verdict::Wait, Verdict::Wait, Verdict::Probe]);
        run.end(at(1100));
        for ms in [1100, 1200, 1300, 1599] {
            assert_eq!(run.failed(Kind::Read, at(ms), 7), Verdict::Wait);
        }
        assert_eq!(run.failed(Kind::Read, at(1600), 7), Verdict::Probe);
    }

    #[test]
    fn one_success_ends_a_run() {
        let mut run = Run::default();
        for ms in 0..10 {
            assert_eq!(run.failed(Kind::Read, at(ms * 1000), ms), Verdict::Wait);
        }
    }

    #[test]
    fn writes_are_given_more_time() {
        let mut run = Run::default();
        let verdicts = [0, 4000, 4500, 9000].map(|ms| run.failed(Kind::Write, at(ms), 0));
        assert_eq!(
            verdicts,
            [Verdict::Wait, Verdict::Wait, Verdict::Wait, Verdict::Fence]
        );
    }
}
