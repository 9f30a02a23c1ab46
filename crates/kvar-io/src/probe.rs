//! How many bytes of writes a device wants under way: enough to keep it busy, no more, since reads
//! wait behind what is over that.
//!
//! ```text
//!   warm up: the range once, so that a file's space is really its own
//!   for 1, 2, 4, 8, 16 chunks under way, twice over:  write for a moment ──> bytes a second
//!   answer: the fewest that reach nine tenths of the best
//! ```
//!
//! What must always be true: nothing outside the range is written; the answer lies within
//! [`WRITES_BYTES_MIN`]..=[`WRITES_BYTES_MAX`]; it ends, within seconds, on a device that is slow, and
//! at an error on one that is broken or does not answer (which then still has its writes under way).
//!
//! Left to others: when it is done (once, at format, while nothing of worth lies in the range), and
//! where the answer is kept.

use crate::{Arena, Completion, Device, DeviceError, Lifetime, Op, Shared};
use std::ops::Range;
use std::time::{Duration, Instant};

/// One write, as the engine's gather writes are.
const CHUNK_BYTES: u64 = 1 << 20;
/// Bounds of the answer. At least two writes, so that one is handed over while another is worked
/// on; no drive of today needs more than sixteen of this size.
pub const WRITES_BYTES_MIN: u64 = 2 * CHUNK_BYTES;
/// See [`WRITES_BYTES_MIN`].
pub const WRITES_BYTES_MAX: u64 = 16 * CHUNK_BYTES;
/// Chunks under way that are tried.
const DEPTHS: [usize; 5] = [1, 2, 4, 8, 16];
/// Each is tried so often, and its best counts: a moment can be disturbed.
const ROUNDS: usize = 2;
/// How long each is tried: hundreds of writes of a fast drive, a few of a slow one.
const STEP: Duration = Duration::from_millis(20);
/// How long the range is written before; what was not reached is left out.
const WARM_UP: Duration = Duration::from_millis(200);
/// Most of the range that is used: more than a drive's smallest cache, soon written.
const RANGE_BYTES_MAX: u64 = 64 << 20;
/// Share of the best rate that is as good as it.
const ENOUGH: f64 = 0.9;
/// A device that completes nothing for so long, or takes so long for one step, is not measured but left at the least; one that then
/// completes nothing for as long again does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WriteProbe {
    /// Bytes of writes to keep under way.
    pub in_flight_bytes: u64,
    /// What the device wrote with that, in bytes a second.
    pub bytes_per_s: f64,
}

/// Writes random bytes to `range` and finds how much of it is best under way. Takes about half a
/// second; `None` where the range is too small to tell, or memory for one chunk is not to be had.
///
/// # Errors
/// When the device refuses a write, or does not answer. In the latter case writes are still under way:
/// whoever drops the device waits for them, perhaps for ever.
pub fn probe_writes(
    device: &mut dyn Device,
    arena: &Arena,
    range: Range<u64>,
) -> Result<Option<WriteProbe>, DeviceError> {
    probe_within(device, arena, range, PATIENCE)
}

fn probe_within(
    device: &mut dyn Device,
    arena: &Arena,
    range: Range<u64>,
    patience: Duration,
) -> Result<Option<WriteProbe>, DeviceError> {
    let chunks = (range.end.saturating_sub(range.start)).min(RANGE_BYTES_MAX) / CHUNK_BYTES;
    let Some(buffer) = arena.allocate(CHUNK_BYTES as usize) else {
        return Ok(None);
    };
    if chunks < 2 * DEPTHS[DEPTHS.len() - 1] as u64 {
        return Ok(None);
    }
    let mut probe = Probe {
        device,
        chunk: random_chunk(buffer),
        start: range.start,
        chunks,
        next: 0,
        over: Vec::new(),
        patience,
        is_slow: false,
    };
    let warm_up = probe.write(4, WARM_UP.max(STEP), chunks)?;
    if probe.is_slow {
        return Ok(Some(least(warm_up)));
    }
    probe.chunks = warm_up.0.max(1);
    let mut rates = [0.0_f64; DEPTHS.len()];
    for _ in 0..ROUNDS {
        for (depth, rate) in DEPTHS.into_iter().zip(&mut rates) {
            let step = probe.write(depth, STEP, u64::MAX)?;
            if probe.is_slow {
                return Ok(Some(least(step)));
            }
            *rate = rate.max(bytes_per_s(step));
        }
    }
    let best = best_depth(&rates);
    Ok(Some(WriteProbe {
        in_flight_bytes: (DEPTHS[best] as u64 * CHUNK_BYTES)
            .clamp(WRITES_BYTES_MIN, WRITES_BYTES_MAX),
        bytes_per_s: rates[best],
    }))
}

/// What a device is left at that is too slow to be measured.
fn least(step: (u64, Duration)) -> WriteProbe {
    WriteProbe {
        in_flight_bytes: WRITES_BYTES_MIN,
        bytes_per_s: bytes_per_s(step),
    }
}

fn bytes_per_s((written, elapsed): (u64, Duration)) -> f64 {
    (written * CHUNK_BYTES) as f64 / elapsed.as_secs_f64().max(1e-6)
}

/// The first that is about as good as the best.
fn best_depth(rates: &[f64; DEPTHS.len()]) -> usize {
    let best = rates.iter().copied().fold(0.0, f64::max);
    rates
        .iter()
        .position(|rate| *rate >= best * ENOUGH)
        .unwrap_or(0)
}

fn silent(open: u64, patience: Duration) -> DeviceError {
    let silent_s = 2.0 * patience.as_secs_f64();
    DeviceError::Io {
        code: None,
        message: format!(
            "the device does not answer: {open} writes of {CHUNK_BYTES} bytes are under way and none \
             has ended for {silent_s} s; look at the drive and the kernel's log, or use another device"
        ),
    }
}

/// Bytes that no drive can make smaller.
fn random_chunk(mut buffer: crate::Buffer) -> Shared {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in buffer.as_mut_slice().chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    buffer.freeze()
}

struct Probe<'a> {
    device: &'a mut dyn Device,
    chunk: Shared,
    start: u64,
    chunks: u64,
    next: u64,
    over: Vec<Completion>,
    patience: Duration,
    /// Whether it completed nothing for longer than that, or took longer for a step.
    is_slow: bool,
}

impl Probe<'_> {
    /// Keeps so many chunks under way for a while, `most` in all; how many were written, and how
    /// long the last of them took to come.
    fn write(
        &mut self,
        depth: usize,
        time: Duration,
        most: u64,
    ) -> Result<(u64, Duration), DeviceError> {
        let started = Instant::now();
        let (mut begun, mut written, mut failed) = (0, 0, None);
        let mut heard = started;
        loop {
            let is_over =
                started.elapsed() >= time || begun >= most || failed.is_some() || self.is_slow;
            if is_over && begun == written {
                break;
            }
            while !is_over && begun < most && begun - written < depth as u64 {
                let offset = self.start + self.next * CHUNK_BYTES;
                self.next = (self.next + 1) % self.chunks;
                let buffers = vec![self.chunk.clone()];
                let op = Op::Write {
                    offset,
                    buffers,
                    lifetime: Lifetime::Log { shard: 0 },
                };
                self.device.submit(begun, op);
                begun += 1;
            }
            self.device.kick()?;
            self.device
                .wait(self.patience.saturating_sub(heard.elapsed()));
            self.device.poll(&mut self.over);
            if !self.over.is_empty() {
                heard = Instant::now();
            } else if heard.elapsed() >= self.patience {
                if std::mem::replace(&mut self.is_slow, true) {
                    return Err(silent(begun - written, self.patience));
                }
                heard = Instant::now();
            }
            for completion in self.over.drain(..) {
                written += 1;
                failed = failed.or(completion.result.err());
            }
        }
        // One that answers now and then would take minutes for all the steps.
        self.is_slow |= started.elapsed() >= self.patience;
        match failed {
            Some(error) => Err(error),
            None => Ok((written, started.elapsed())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{Fault, FaultKind, FaultOn, SimDisk, SimOptions};

    #[test]
    fn the_fewest_that_are_about_as_good_as_the_best_win() {
        assert_eq!(best_depth(&[1.0, 1.9, 2.0, 2.1, 2.1]), 1);
        assert_eq!(best_depth(&[1.0, 1.0, 1.0, 1.0, 1.0]), 0);
        assert_eq!(best_depth(&[1.0, 2.0, 3.0, 4.0, 5.0]), 4);
        assert_eq!(best_depth(&[0.0; 5]), 0);
    }

    #[test]
    fn a_probe_stays_in_its_range_and_within_its_bounds() {
        let disk = SimDisk::new(80 << 20, SimOptions::default());
        let arena = Arena::new(2 << 20).unwrap();
        let mut device = disk.open();
        let range = (8 << 20)..(72 << 20);
        let found = probe_writes(&mut device, &arena, range).unwrap().unwrap();
        assert!((WRITES_BYTES_MIN..=WRITES_BYTES_MAX).contains(&found.in_flight_bytes));
        assert!(found.bytes_per_s > 0.0);
        let mut outside = Vec::new();
        for offset in [0, 72 << 20] {
            let buffer = arena.allocate(1 << 20).unwrap();
            device.submit(0, Op::Read { offset, buffer });
            device.kick().unwrap();
            while outside.is_empty() {
                device.wait(Duration::from_millis(10));
                device.poll(&mut outside);
            }
            let Some(Completion {
                op: Op::Read { buffer, .. },
                ..
            }) = outside.pop()
            else {
                panic!("a read ends as a read");
            };
            assert!(buffer.as_slice().iter().all(|byte| *byte == 0));
        }
    }

    /// It was waited for in slices of the patience, again and again.
    #[test]
    fn a_device_that_never_answers_hung_the_first_start() {
        let disk = SimDisk::new(80 << 20, SimOptions::default());
        let arena = Arena::new(2 << 20).unwrap();
        let mut device = disk.open();
        disk.inject(Fault::always(FaultKind::Stuck, FaultOn::Write));
        let patience = Duration::from_millis(20);
        let found = probe_within(&mut device, &arena, 0..80 << 20, patience);
        let text = found.unwrap_err().to_string();
        assert!(text.contains("does not answer"), "{text}");
        assert!(device.in_flight() > 0);
        disk.release_stuck();
    }

    /// One write that takes long is no reason to give the device up.
    #[test]
    fn a_device_that_answers_late_is_left_at_the_least() {
        let disk = SimDisk::new(80 << 20, SimOptions::default());
        let arena = Arena::new(2 << 20).unwrap();
        let mut device = Late {
            inner: disk.open(),
            disk: disk.clone(),
            silent: 0,
        };
        disk.inject(Fault::always(FaultKind::Stuck, FaultOn::Write));
        let patience = Duration::from_millis(20);
        let found = probe_within(&mut device, &arena, 0..80 << 20, patience);
        let found = found.unwrap().unwrap();
        assert_eq!(found.in_flight_bytes, WRITES_BYTES_MIN);
        assert!(found.bytes_per_s > 0.0);
        assert_eq!(device.in_flight(), 0);
    }

    /// Answers only who has waited for it once in vain.
    struct Late {
        inner: crate::sim::SimDevice,
        disk: SimDisk,
        silent: u32,
    }

    impl Device for Late {
        fn bytes(&self) -> u64 {
            self.inner.bytes()
        }

        fn submit(&mut self, token: u64, op: Op) {
            assert!(self.silent == 0, "it was given more after it fell silent");
            self.inner.submit(token, op);
        }

        fn kick(&mut self) -> Result<(), DeviceError> {
            self.inner.kick()
        }

        fn poll(&mut self, out: &mut Vec<Completion>) {
            if self.silent > 1 {
                self.disk.clear_faults();
                self.disk.release_stuck();
            }
            self.inner.poll(out);
        }

        fn wait(&mut self, timeout: Duration) {
            self.silent += 1;
            if self.silent == 1 {
                std::thread::sleep(timeout);
            } else {
                self.inner.wait(timeout);
            }
        }

        fn readiness(&self) -> Option<std::os::fd::RawFd> {
            None
        }

        fn in_flight(&self) -> usize {
            self.inner.in_flight()
        }

        fn engine(&self) -> &'static str {
            "late"
        }
    }

    #[test]
    fn what_is_too_small_to_tell_is_not_written() {
        let disk = SimDisk::new(16 << 20, SimOptions::default());
        let arena = Arena::new(2 << 20).unwrap();
        assert_eq!(
            probe_writes(&mut disk.open(), &arena, 0..16 << 20),
            Ok(None)
        );
        let none = Arena::new(4096).unwrap();
        let disk = SimDisk::new(80 << 20, SimOptions::default());
        assert_eq!(probe_writes(&mut disk.open(), &none, 0..80 << 20), Ok(None));
    }
}
