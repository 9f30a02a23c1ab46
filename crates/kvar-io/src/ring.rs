//! A device over io_uring: one system call moves many operations, and none sleeps in the kernel on
//! our thread.
//!
//! ```text
//!   submit ──> slot + queue ──kick──> submission ring ──> kernel
//!                 ▲                                          │
//!                 └── moved less than asked, or interrupted ─┤  (same slot, from where it stopped)
//!   poll <── Completion <──────────── completion ring <──────┘
//! ```
//!
//! What must always be true:
//! * a slot owns its [`Op`], and with it the memory, until the kernel has answered; the device is
//!   not dropped before the last answer;
//! * no more operations are in the kernel than the submission ring has entries, so the completion
//!   ring (twice as large) cannot overflow;
//! * one thread: the ring belongs to the thread that opened it (the kernel then does its part of
//!   the work when we ask, not by interrupting us), so the type is not `Send`;
//! * a device has a ring of its own, or shares the one of its thread's [`crate::Reactor`] (see `hub`): then it
//!   only queues and takes answers, and the reactor's turn hands over and waits for all;
//! * everything that is submitted ends in the completion ring, refusals too: they travel as a
//!   no-op, so that the descriptor of [`Device::readiness`] tells of them like of the rest;
//! * that descriptor is an eventfd, of a ring of its own. A ring whose work is put off (DEFER_TASKRUN) is readable itself
//!   but does not wake who sleeps on it in poll or epoll (seen on Linux 6.18: each sleep ran into
//!   its timeout). The kernel rings an eventfd at once. It is made when first asked for, since it
//!   costs a system call a poll.
//!
//! A sleep waits for one answer. To wait for several for a moment (Linux 6.12 can) was tried: at
//! depth 16 it halves the wake-ups, and loses more than that on bytes that have left the cache by
//! the time they are checked (10.3 us a read of 64 KiB against 7.5, loop device over memory).
//!
//! Buffers of a gather write that lie behind one another in memory go as one piece; what is left
//! goes as a list that is registered too, from Linux 6.15 on.
//!
//! No memory is allocated per operation once slots and gather lists have grown to their size.
//!
//! A write names its stream where the device has any (see [`WriteStreams`]). One that is refused with
//! a stream as an invalid argument goes once more without; if that is taken, none has a stream from
//! then on.
//!
//! Memory of the arena is registered with the kernel when it is first used (see `registered`);
//! where that is refused, the same operations go by address and [`Ring::notes`] says so.
#![allow(unsafe_code)] // the kernel reads and writes memory by address; each block says why it may

pub(crate) mod hub;

use crate::check::{cannot_discard, check_op, failed_after, op_len, short};
use crate::registered::Registered;
use crate::target::is_preallocated_file;
use crate::{Arena, Completion, Device, DeviceError, NoStreams, Op, Shared, WriteStreams};
use hub::{Answer, Hub, refused};
use io_uring::squeue::Entry;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, Probe, opcode};
use rustix::event::EventfdFlags;
use std::cell::{OnceCell, RefCell};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Bounds of the depth: one operation, and what a device queue of today holds several times over.
pub(crate) const DEPTH_MIN: usize = 1;
pub(crate) const DEPTH_MAX: usize = 4096;

/// Most bytes one entry of the ring asks for; its length field has 32 bits. What is left follows.
const STEP_BYTES_MAX: u64 = 1 << 30;

/// How often one operation is tried again after EINTR or EAGAIN without progress: a busy moment
/// passes in a few, a file that always says so must not hold its caller for ever.
const RETRIES_MAX: u32 = 1000;

/// What a wait without end comes to.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// Failed waits in a row after which a dropped device gives its memory up for lost, since
/// returning it while the kernel may still write there would be worse.
const DROP_FAILURES_MAX: u32 = 100;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
#[error("io_uring refused ({step}: {source}{})", hint(.source))]
pub struct RingRefused {
    /// What was being done.
    pub step: &'static str,
    /// The system's words.
    pub source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; EPERM: a container's seccomp profile or sysctl kernel.io_uring_disabled forbids it"
        }
        Some(libc::ENOSYS) => "; ENOSYS: the kernel, or a sandbox around it, does not have it",
        Some(libc::ENOMEM) => "; ENOMEM: raise the limit of locked memory (ulimit -l)",
        Some(libc::EMFILE | libc::ENFILE) => "; raise the limit of open files (ulimit -n)",
        _ => "",
    }
}

/// A [`Device`] over io_uring; see the top of this file.
pub struct Ring {
    hub: Rc<RefCell<Hub>>,
    /// Its number among the devices of the ring.
    member: u16,
    table: Table,
    registered: Registered,
    bytes: u64,
    in_kernel: usize,
    in_kernel_max: usize,
    /// Answers on their way from the ring to the table, kept for its memory.
    answers: Vec<Answer>,
    notes: Vec<String>,
    event: OnceCell<OwnedFd>,
    // The kernel knows the descriptor by its number in the ring; this keeps it (and its lock) open.
    _file: File,
}

/// The operations, apart from the ring so that both can be borrowed at once.
struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots that wait for their next entry in the ring.
    queue: VecDeque<u32>,
    discards: bool,
    /// Whether the kernel takes a list of pieces of registered memory.
    registered_lists: bool,
    streams: WriteStreams,
    /// The file's number in the ring's table of registered files.
    file: Fixed,
}

#[derive(Default)]
struct Slot {
    op: Option<(u64, Op)>,
    refused: Option<DeviceError>,
    /// The number of its memory in the ring's table, if it has one.
    registered: Option<u16>,
    moved: u64,
    len: u64,
    retries: u32,
    /// The stream that its entry named; 0: none.
    stream: u8,
    /// It was refused with a stream, and goes without.
    is_unstreamed: bool,
    gather: Vec<libc::iovec>,
}

impl Ring {
    /// Opens a ring of its own of at least `depth` entries over the first `bytes` of `file`, for the
    /// thread that calls.
    ///
    /// # Errors
    /// When the kernel, or a policy around the process, refuses io_uring.
    pub fn open(file: File, bytes: u64, arena: &Arena, depth: usize) -> Result<Self, RingRefused> {
        let mut hub = Hub::private(depth.clamp(DEPTH_MIN, DEPTH_MAX) as u32)?;
        hub.ring
            .submitter()
            .register_files(&[file.as_raw_fd()])
            .map_err(refused("register file"))?;
        hub.probe().map_err(refused("first use"))?;
        let depth = hub.ring.params().sq_entries() as usize;
        Self::join(Rc::new(RefCell::new(hub)), file, bytes, arena, depth)
    }

    /// The same in the ring of a thread, which hands over and waits for all of its users.
    pub(crate) fn open_in(
        shared: &Rc<RefCell<Hub>>,
        file: File,
        bytes: u64,
        arena: &Arena,
        depth: usize,
    ) -> Result<Self, RingRefused> {
        let depth = depth.clamp(DEPTH_MIN, DEPTH_MAX);
        let ring = Self::join(shared.clone(), file, bytes, arena, depth)?;
        let (member, file) = (u32::from(ring.member), ring._file.as_raw_fd());
        let hub = ring.hub.borrow();
        let put = hub.ring.submitter().register_files_update(member, &[file]);
        drop(hub);
        put.map_err(refused("register file"))?;
        Ok(ring)
    }

    fn join(
        hub: Rc<RefCell<Hub>>,
        file: File,
        bytes: u64,
        arena: &Arena,
        in_kernel_max: usize,
    ) -> Result<Self, RingRefused> {
        let mut inner = hub.borrow_mut();
        let full = || refused("room")(io::Error::other("it has as many devices as it may"));
        let member = inner.join().ok_or_else(full)?;
        let (registered, note) = Registered::new(&mut inner, arena);
        let mut notes = inner.notes().to_vec();
        notes.extend(note);
        let registered_lists = takes_registered_lists(&inner.ring);
        drop(inner);
        let table = Table {
            slots: Vec::with_capacity(in_kernel_max),
            free: Vec::with_capacity(in_kernel_max),
            queue: VecDeque::with_capacity(in_kernel_max),
            discards: !is_preallocated_file(&file),
            registered_lists,
            streams: WriteStreams::none(NoStreams::Unknown),
            file: Fixed(u32::from(member)),
        };
        Ok(Self {
            hub,
            member,
            table,
            registered,
            bytes,
            in_kernel: 0,
            in_kernel_max,
            answers: Vec::with_capacity(in_kernel_max),
            notes,
            event: OnceCell::new(),
            _file: file,
        })
    }

    /// The same, with the streams of the device behind the file.
    #[must_use]
    pub fn with_streams(mut self, streams: &WriteStreams) -> Self {
        self.table.streams = streams.clone();
        self
    }

    /// What an operator should hear, one sentence each.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Moves waiting slots into the submission ring, as many as may be in the kernel.
    fn fill(&mut self) {
        if self.table.queue.is_empty() {
            return;
        }
        let mut hub = self.hub.borrow_mut();
        while self.in_kernel < self.in_kernel_max
            && let Some(number) = self.table.queue.pop_front()
        {
            let entry = self.table.entry(number);
            let entry = entry.user_data(Hub::user_data(self.member, number));
            // SAFETY: the memory in the entry belongs to the slot's operation (or to its gather
            // list, which only this function's next call for the same slot changes). The slot
            // gives both up in `Table::answered` alone, after the kernel's answer; `Drop` waits
            // for all answers. A frozen buffer is only read.
            if !unsafe { hub.push(&entry) } {
                self.table.queue.push_front(number);
                break;
            }
            self.in_kernel += 1;
        }
    }

    /// Hands the submission ring to the kernel, and lets it do work it has put off.
    fn enter(&mut self) -> io::Result<()> {
        let mut hub = self.hub.borrow_mut();
        match hub.enter() {
            // Short of memory, or the completion ring is full: passes when answers are
            // collected. With nothing in the kernel there is nothing to wait for.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
                    && self.in_kernel > hub.ring.submission().len() =>
            {
                Ok(())
            }
            entered => entered,
        }
    }

    /// Collects what is over. True if more came while the eventfd was cleared, whose ring may have
    /// been cleared with it.
    fn collect(&mut self, out: &mut Vec<Completion>) -> bool {
        if self.in_flight() > 0 {
            let mut hub = self.hub.borrow_mut();
            if !hub.is_shared && (hub.has_put_off() || (!hub.deferred && !hub.has_answers())) {
                drop(hub);
                // A refusal here leaves the queue as it was; the next `kick` reports it.
                drop(self.enter());
                hub = self.hub.borrow_mut();
            }
            hub.drain();
            hub.take_answers(self.member, &mut self.answers);
            drop(hub);
            self.in_kernel -= self.answers.len();
            for (slot, answer) in self.answers.drain(..) {
                self.table.answered(slot, answer, out);
            }
            // What went only part of the way, and what found the ring full before.
            if !self.table.queue.is_empty() {
                drop(self.kick());
            }
        }
        let Some(event) = self.event.get() else {
            return false;
        };
        let mut hub = self.hub.borrow_mut();
        hub.count_call();
        // Nothing to clear is the common case of a busy shard.
        rustix::io::read(event, &mut [0_u8; 8]).is_ok()
            && self.in_flight() > 0
            && (hub.has_put_off() || hub.has_answers())
    }

    /// Sleeps until an answer is there or the deadline; hands over what is queued first.
    fn sleep(&mut self, deadline: Instant) -> io::Result<()> {
        loop {
            self.fill();
            let timeout = deadline.saturating_duration_since(Instant::now());
            if timeout.is_zero() {
                return self.enter();
            }
            let mut hub = self.hub.borrow_mut();
            let slept = match hub.has_answers_of(self.member) {
                true => Ok(()),
                false => hub.enter_and_sleep(Some(timeout)),
            };
            // What is others' goes to them, so that the next sleep does not end for it.
            hub.drain();
            slept?;
            if hub.has_answers_of(self.member) || Instant::now() >= deadline {
                return Ok(());
            }
        }
    }
}

impl Device for Ring {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn submit(&mut self, token: u64, op: Op) {
        let registered = match &op {
            Op::Read { buffer, .. } => {
                let hub = self.hub.borrow();
                self.registered.number(&hub.ring, buffer)
            }
            Op::Write { buffers, .. } => {
                let hub = self.hub.borrow();
                self.registered.number_of_all(&hub.ring, buffers)
            }
            _ => None,
        };
        self.table.add(token, op, registered, self.bytes);
    }

    fn kick(&mut self) -> Result<(), DeviceError> {
        self.fill();
        let mut hub = self.hub.borrow_mut();
        let has_entries = !hub.is_shared && !hub.ring.submission().is_empty();
        drop(hub);
        if has_entries {
            self.enter()?;
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) {
        while self.collect(out) {}
    }

    fn wait(&mut self, timeout: Duration) {
        if self.in_flight() == 0 {
            return;
        }
        let now = Instant::now();
        drop(self.sleep(now.checked_add(timeout).unwrap_or(now + WAIT_MAX)));
    }

    fn readiness(&self) -> Option<RawFd> {
        let hub = self.hub.borrow();
        if hub.is_shared {
            // Whoever waits for the ring waits for this device too.
            return None;
        }
        if let Some(event) = self.event.get() {
            return Some(event.as_raw_fd());
        }
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = event.ok().filter(|event| {
            hub.ring
                .submitter()
                .register_eventfd(event.as_raw_fd())
                .is_ok()
        });
        let Some(event) = event else {
            // Out of descriptors: a sleeper with a timeout still gets on.
            return Some(hub.ring.as_raw_fd());
        };
        let event = self.event.get_or_init(|| event);
        // What completed before the eventfd was there rang nothing.
        let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
        Some(event.as_raw_fd())
    }

    fn in_flight(&self) -> usize {
        self.table.slots.len() - self.table.free.len()
    }

    fn engine(&self) -> &'static str {
        "io_uring"
    }

    fn system_calls(&self) -> u64 {
        self.hub.borrow().calls()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut over = Vec::new();
        let mut failures = 0;
        while self.in_flight() > 0 && failures < DROP_FAILURES_MAX {
            match self.sleep(Instant::now() + Duration::from_secs(1)) {
                Ok(()) => failures = 0,
                Err(_) => failures += 1,
            }
            self.poll(&mut over);
            over.clear();
        }
        let is_owed = self.in_kernel > 0;
        if is_owed {
            // The kernel still owns this memory, and no longer answers.
            std::mem::forget(std::mem::take(&mut self.table.slots));
        }
        let mut hub = self.hub.borrow_mut();
        hub.leave(self.member, is_owed);
        // The kernel takes a closed ring apart later; the file, its lock and the memory go now.
        let submitter = hub.ring.submitter();
        drop(match hub.is_shared {
            true => submitter
                .register_files_update(u32::from(self.member), &[-1])
                .map(drop),
            false => submitter.unregister_files(),
        });
        self.registered.release(&mut hub);
    }
}

/// Whether this kernel has gather writes from registered memory.
fn takes_registered_lists(ring: &IoUring) -> bool {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).is_ok()
        && probe.is_supported(opcode::WritevFixed::CODE)
}

/// The memory of a write from `moved` on, as the kernel takes it: pieces that lie behind one
/// another in memory are one.
fn list_pieces(buffers: &[Shared], moved: u64, list: &mut Vec<libc::iovec>) {
    list.clear();
    let mut skip = moved as usize;
    for buffer in buffers {
        let bytes = &buffer.padded()[skip.min(buffer.padded_len())..];
        skip -= buffer.padded_len() - bytes.len();
        if bytes.is_empty() {
            continue;
        }
        let (iov_base, iov_len) = (bytes.as_ptr().cast_mut().cast(), bytes.len());
        match list.last_mut() {
            Some(last)
                if last.iov_base.wrapping_byte_add(last.iov_len) == iov_base
                    && last.iov_len + iov_len <= STEP_BYTES_MAX as usize =>
            {
                last.iov_len += iov_len;
            }
            _ => list.push(libc::iovec { iov_base, iov_len }),
        }
    }
}

/// Address and length of one piece, in what an entry of the ring takes.
fn step_of(piece: &libc::iovec) -> (*const u8, u32) {
    let step = piece.iov_len.min(STEP_BYTES_MAX as usize) as u32;
    (piece.iov_base.cast_const().cast(), step)
}

impl Table {
    fn add(&mut self, token: u64, op: Op, registered: Option<u16>, device_bytes: u64) {
        let number = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[number as usize];
        slot.refused = check_op(&op, device_bytes).err();
        slot.len = op_len(&op);
        slot.registered = registered;
        (slot.moved, slot.retries) = (0, 0);
        (slot.stream, slot.is_unstreamed) = (0, false);
        slot.op = Some((token, op));
        self.queue.push_back(number);
    }

    /// The next entry of a slot: its operation from where it stopped.
    fn entry(&mut self, number: u32) -> Entry {
        let Self {
            slots,
            discards,
            registered_lists,
            streams,
            file,
            ..
        } = self;
        let file = *file;
        let Slot {
            op,
            refused,
            registered,
            moved,
            len,
            gather,
            stream,
            is_unstreamed,
            ..
        } = &mut slots[number as usize];
        match op {
            _ if refused.is_some() => opcode::Nop::new().build(),
            Some((_, Op::Read { offset, buffer })) => {
                let step = (*len - *moved).min(STEP_BYTES_MAX) as u32;
                let memory = buffer.padded_mut()[*moved as usize..].as_mut_ptr();
                let from = *offset + *moved;
                match *registered {
                    Some(piece) => opcode::ReadFixed::new(file, memory, step, piece)
                        .offset(from)
                        .build(),
                    None => opcode::Read::new(file, memory, step).offset(from).build(),
                }
            }
            Some((
                _,
                Op::Write {
                    offset,
                    buffers,
                    lifetime,
                },
            )) => {
                let to = *offset + *moved;
                *stream = if *is_unstreamed {
                    0
                } else {
                    streams.of(*lifetime)
                };
                list_pieces(buffers, *moved, gather);
                match (&gather[..], *registered) {
                    ([piece], Some(number)) => {
                        let (memory, step) = step_of(piece);
                        opcode::WriteFixed::new(file, memory, step, number)
                            .offset(to)
                            .write_stream(*stream)
                            .build()
                    }
                    ([piece], None) => {
                        let (memory, step) = step_of(piece);
                        opcode::Write::new(file, memory, step)
                            .offset(to)
                            .write_stream(*stream)
                            .build()
                    }
                    (list, Some(number)) if *registered_lists => {
                        opcode::WritevFixed::new(file, list.as_ptr(), list.len() as u32, number)
                            .offset(to)
                            .write_stream(*stream)
                            .build()
                    }
                    (list, _) => opcode::Writev::new(file, list.as_ptr(), list.len() as u32)
                        .offset(to)
                        .write_stream(*stream)
                        .build(),
                }
            }
            Some((_, Op::Flush)) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
            Some((_, Op::Discard { offset, .. })) if *discards => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(file, *len)
                    .offset(*offset)
                    .mode(mode)
                    .build()
            }
            // A preallocated file keeps its space: others could take it, and a later write would
            // find the disk full.
            Some((_, Op::Discard { .. })) | None => opcode::Nop::new().build(),
        }
    }

    /// Takes the kernel's answer for a slot: over, or once more from where it stopped.
    fn answered(&mut self, number: u32, answer: i32, out: &mut Vec<Completion>) {
        let Some(slot) = self.slots.get_mut(number as usize) else {
            return;
        };
        let Some((_, op)) = &slot.op else { return };
        let again = matches!(answer.saturating_neg(), libc::EINTR | libc::EAGAIN);
        let result = if let Some(refused) = slot.refused.take() {
            Err(refused)
        } else if again && slot.retries < RETRIES_MAX {
            slot.retries += 1;
            self.queue.push_back(number);
            return;
        } else if answer == -libc::EINVAL && slot.stream != 0 {
            slot.is_unstreamed = true;
            self.queue.push_back(number);
            return;
        } else if answer < 0 {
            let error = io::Error::from_raw_os_error(-answer);
            if matches!(op, Op::Discard { .. }) && cannot_discard(&error) {
                Ok(())
            } else {
                Err(failed_after(slot.moved, slot.len, error))
            }
        } else if matches!(op, Op::Flush | Op::Discard { .. }) {
            Ok(())
        } else if answer == 0 {
            Err(short(slot.moved, slot.len))
        } else {
            if slot.is_unstreamed {
                // It was the stream, and nothing else, that was not taken.
                self.streams.refuse();
            }
            slot.moved += answer as u64;
            slot.retries = 0;
            if slot.moved < slot.len {
                self.queue.push_back(number);
                return;
            }
            Ok(())
        };
        if let Some((token, op)) = slot.op.take() {
            self.free.push(number);
            out.push(Completion { token, op, result });
        }
    }
}

#[cfg(test)]
mod tests;
