//! A device over plain threads, for where io_uring is refused: positioned reads and writes that
//! block in a few threads of their own.
//!
//! ```text
//!   submit ──> queue ──kick──> channel ──> worker 0..n (pread, pwritev, fdatasync)
//!   poll <───────────── channel of completions + eventfd <──────┘
//! ```
//!
//! What must always be true: an operation is in exactly one of queue, channel, worker, completion,
//! and each of these owns its memory; whenever the channel of completions holds something that no
//! poll has seen, the eventfd is readable or about to be.

use crate::check::{cannot_discard, check_op, failed_after, op_len, short};
use crate::target::is_preallocated_file;
use crate::{Completion, Device, DeviceError, Op};
use crossbeam_channel::{Receiver, Sender, unbounded};
use kvar_base::wake;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most workers of one device: enough that an NVMe drive has work, few enough that a node with a
/// shard a core does not drown in threads.
const WORKERS_MAX: usize = 16;

/// Longest single sleep; keeps the kernel's time fields far from their ends.
const SLEEP_MAX: Duration = Duration::from_secs(3600);

/// A [`Device`] over threads; see the top of this file.
pub struct Threads {
    bytes: u64,
    queue: Vec<(u64, Op)>,
    // `None` only while it is dropped: closing the channel ends the workers.
    work: Option<Sender<(u64, Op)>>,
    done: Receiver<Completion>,
    bell: Arc<Bell>,
    own: Sender<Completion>,
    workers: Vec<JoinHandle<()>>,
    in_flight: usize,
}

/// The eventfd, rung once for any number of completions.
struct Bell {
    event: OwnedFd,
    rung: AtomicBool,
}

impl Bell {
    /// After a completion was sent.
    fn ring(&self) {
        wake::ring(&self.rung, || {
            // Can only fail when the counter is full, and then the descriptor is readable anyway.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        });
    }

    /// Before completions are received.
    fn quiet(&self) {
        wake::silence(&self.rung, || {
            let _ = rustix::io::read(&self.event, &mut [0_u8; 8]);
        });
    }
}

impl Threads {
    /// Starts `depth` workers (at least one, at most 16) over the first `bytes` of `file`.
    ///
    /// # Errors
    /// When the system refuses a thread or a descriptor.
    pub fn open(file: File, bytes: u64, depth: usize) -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let bell = Arc::new(Bell {
            event,
            rung: AtomicBool::new(false),
        });
        let (work, inbox) = unbounded::<(u64, Op)>();
        let (own, done) = unbounded();
        let discards = !is_preallocated_file(&file);
        let file = Arc::new(file);
        let mut device = Self {
            bytes,
            queue: Vec::new(),
            work: Some(work),
            done,
            bell,
            own,
            workers: Vec::new(),
            in_flight: 0,
        };
        for number in 0..depth.clamp(1, WORKERS_MAX) {
            let (file, inbox) = (Arc::clone(&file), inbox.clone());
            let (outbox, bell) = (device.own.clone(), Arc::clone(&device.bell));
            let worker = std::thread::Builder::new().name(format!("kvar-io-{number}"));
            // On an error the workers so far end with `device`.
            device.workers.push(worker.spawn(move || {
                for (token, mut op) in inbox {
                    let result = perform(&file, &mut op, discards);
                    // Nobody listens only while the device is dropped; then the memory goes here.
                    let _ = outbox.send(Completion { token, op, result });
                    bell.ring();
                }
            })?);
        }
        Ok(device)
    }
}

impl Device for Threads {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn submit(&mut self, token: u64, op: Op) {
        self.in_flight += 1;
        self.queue.push((token, op));
    }

    fn kick(&mut self) -> Result<(), DeviceError> {
        for (token, op) in self.queue.drain(..) {
            let over = match (check_op(&op, self.bytes), &self.work) {
                (Ok(()), Some(work)) => match work.send((token, op)) {
                    Ok(()) => continue,
                    Err(refused) => {
                        let (token, op) = refused.into_inner();
                        let message = "the threads of this device are gone".to_owned();
                        let result = Err(DeviceError::Io {
                            code: None,
                            message,
                        });
                        Completion { token, op, result }
                    }
                },
                (checked, _) => Completion {
                    token,
                    op,
                    result: checked,
                },
            };
            let _ = self.own.send(over);
            self.bell.ring();
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) {
        self.bell.quiet();
        for completion in self.done.try_iter() {
            self.in_flight -= 1;
            out.push(completion);
        }
    }

    fn wait(&mut self, timeout: Duration) {
        // Handing over cannot fail here.
        let _ = self.kick();
        let now = Instant::now();
        let deadline = now.checked_add(timeout).unwrap_or(now + SLEEP_MAX);
        while self.in_flight > 0 && self.done.is_empty() {
            let left = deadline
                .saturating_duration_since(Instant::now())
                .min(SLEEP_MAX);
            let timespec = Timespec::try_from(left).ok();
            let mut bell = [PollFd::new(&self.bell.event, PollFlags::IN)];
            match rustix::event::poll(&mut bell, timespec.as_ref()) {
                // A bell left over from completions that are collected already.
                Ok(1..) if self.done.is_empty() => self.bell.quiet(),
                Err(Errno::INTR) => {}
                _ => return,
            }
            if left.is_zero() {
                return;
            }
        }
    }

    fn readiness(&self) -> Option<RawFd> {
        Some(self.bell.event.as_raw_fd())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn engine(&self) -> &'static str {
        "threads"
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Handing over cannot fail here.
        let _ = self.kick();
        drop(self.work.take());
        for worker in self.workers.drain(..) {
            // A worker that panicked has dropped its operation; there is nothing left to wait for.
            let _ = worker.join();
        }
    }
}

fn perform(file: &File, op: &mut Op, discards: bool) -> Result<(), DeviceError> {
    let wanted = op_len(op);
    match op {
        Op::Read { offset, buffer } => {
            let offset = *offset;
            all(wanted, |moved| {
                file.read_at(&mut buffer.padded_mut()[moved as usize..], offset + moved)
            })
        }
        // A plain write has no word for its lifetime.
        Op::Write {
            offset, buffers, ..
        } => {
            let mut slices: Vec<IoSlice<'_>> = buffers
                .iter()
                .map(|buffer| IoSlice::new(buffer.padded()))
                .collect();
            let mut left = &mut slices[..];
            let mut before = 0;
            all(wanted, |moved| {
                IoSlice::advance_slices(&mut left, (moved - before) as usize);
                before = moved;
                Ok(rustix::io::pwritev(file, left, *offset + moved)?)
            })
        }
        Op::Flush => retry(|| file.sync_data()).map_err(DeviceError::from),
        Op::Discard { .. } if !discards => Ok(()),
        Op::Discard { offset, len } => {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match retry(|| Ok(rustix::fs::fallocate(file, mode, *offset, *len)?)) {
                Err(error) if !cannot_discard(&error) => Err(error.into()),
                _ => Ok(()),
            }
        }
    }
}

/// Calls `step` with the bytes moved so far until `wanted` are.
fn all(wanted: u64, mut step: impl FnMut(u64) -> io::Result<usize>) -> Result<(), DeviceError> {
    let mut moved = 0;
    while moved < wanted {
        match retry(|| step(moved)) {
            Ok(0) => return Err(short(moved, wanted)),
            Ok(more) => moved += more as u64,
            Err(error) => return Err(failed_after(moved, wanted, error)),
        }
    }
    Ok(())
}

/// Again after a signal. (A blocking file does not say EAGAIN.)
fn retry<T>(mut step: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match step() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            decided => return decided,
        }
    }
}
