//! The kernel's ring, and whose its answers are: one device's alone, or those of all devices and
//! descriptors of a thread.
//!
//! ```text
//!   devices:     entries ──> submission ring ──┐            ┌── answers of each device
//!   descriptors: a poll each ──────────────────┼── kernel ──┤
//!   enter: one system call ────────────────────┘            └── what is ready, for the thread
//! ```
//!
//! | user data | bits 62-63 | below |
//! |---|---|---|
//! | a device's operation | 1 | 32-47: the device; 0-31: its slot |
//! | a descriptor that is watched | 2 | 32-61: a number used once (its low bits); 0-31: its place |
//! | the end of a poll | 0 | nobody waits for it |
//!
//! What must always be true: whoever drains the completion ring hands every answer to its own; an answer
//! to a poll that was ended is told from one of its successor by the number.
//!
//! A descriptor is watched by a poll that goes on (multishot): one answer for each time that it becomes
//! ready, as with edges in epoll. The kernel may end such a poll by itself (completions overflowed);
//! then it is begun again, and says at once what is ready by then. A poll holds the file behind its
//! descriptor, so a descriptor must be given up here before it is closed, or its peer would not hear of it.
#![allow(unsafe_code)] // entries are pushed; the function that takes any says what they must be

use super::RingRefused;
use crate::calls;
use crate::reactor::Ready;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};
use mio::{Interest, Token};
use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// Entries of a shared ring: what a turn of a thread hands over goes in one call, and more in another.
const SHARED_ENTRIES: u32 = 256;

/// Answers that a shared ring holds: each descriptor may have several at once, beside the operations of
/// devices. What comes beyond is kept by the kernel, and ends polls that go on.
const SHARED_ANSWERS: u32 = 4096;

/// Files of devices that a shared ring knows by number.
const SHARED_FILES: u32 = 64;

/// Most pieces of memory: the kernel's limit for a table of buffers.
pub(crate) const PIECES_MAX: usize = 1 << 14;

/// Longest single sleep; also keeps the kernel's time fields far from their ends.
const SLEEP_MAX: Duration = Duration::from_secs(3600);

const KIND_AT: u32 = 62;
const KIND_DEVICE: u64 = 1;
const KIND_WATCH: u64 = 2;
const NOBODY: u64 = 0;

/// Bits of a watch's serial that its user data has room for.
const SERIAL_MASK: u64 = (1 << 30) - 1;

/// See the module.
pub(crate) struct Hub {
    pub(crate) ring: IoUring,
    /// Whether the kernel does its part of the work when we ask.
    pub(super) deferred: bool,
    /// Whether somebody hands over and waits for all of its users.
    pub(crate) is_shared: bool,
    members: Vec<Member>,
    watches: Vec<Option<Watch>>,
    /// Places in `watches` that are free.
    free: Vec<usize>,
    by_descriptor: HashMap<RawFd, usize>,
    next_serial: u64,
    /// Places of polls that the kernel ended.
    ended: Vec<usize>,
    ready: Vec<Ready>,
    calls: u64,
    has_pieces: bool,
    /// Numbers of pieces that are taken: first and count, in order.
    pieces: Vec<(u32, u32)>,
    notes: Vec<String>,
}

/// A slot of a device, and what the kernel says of it.
pub(super) type Answer = (u32, i32);

/// A device, and what it has not taken yet.
enum Member {
    Free,
    Here(Vec<Answer>),
    /// It went while the kernel owed it answers, which are still to come: its number is never given again.
    Lost,
}

struct Watch {
    serial: u64,
    descriptor: RawFd,
    token: Token,
    events: u32,
}

impl Hub {
    /// A ring for one device of this depth.
    pub(super) fn private(entries: u32) -> Result<Self, RingRefused> {
        Self::build(entries, None)
    }

    /// A ring for all devices and descriptors of the thread that calls.
    pub(crate) fn shared() -> Result<Self, RingRefused> {
        let mut hub = Self::build(SHARED_ENTRIES, Some(SHARED_ANSWERS))?;
        if !hub.deferred {
            let source = io::Error::other("the kernel is older than 6.1");
            return Err(refused("features")(source));
        }
        hub.ring
            .submitter()
            .register_files_sparse(SHARED_FILES)
            .map_err(refused("register files"))?;
        hub.is_shared = true;
        hub.probe().map_err(refused("first use"))?;
        Ok(hub)
    }

    fn build(entries: u32, answers: Option<u32>) -> Result<Self, RingRefused> {
        let mut notes = Vec::new();
        let mut modern = IoUring::builder();
        modern
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .dontfork();
        if let Some(answers) = answers {
            modern.setup_cqsize(answers);
        }
        let (ring, deferred) = match modern.build(entries) {
            Ok(ring) => (ring, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let ring = IoUring::new(entries).map_err(refused("setup"))?;
                notes.push("the kernel is older than 6.1: completions interrupt the shard".into());
                (ring, false)
            }
            Err(error) => return Err(refused("setup")(error)),
        };
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            let source = io::Error::other("the kernel is older than 5.11");
            return Err(refused("features")(source));
        }
        Ok(Self {
            ring,
            deferred,
            is_shared: false,
            members: Vec::new(),
            watches: Vec::new(),
            free: Vec::new(),
            by_descriptor: HashMap::new(),
            next_serial: 0,
            ended: Vec::new(),
            ready: Vec::new(),
            calls: 0,
            has_pieces: false,
            pieces: Vec::new(),
            notes,
        })
    }

    /// One no-op there and back: some sandboxes allow a ring to be made and not to be used.
    pub(super) fn probe(&mut self) -> io::Result<()> {
        // SAFETY: a no-op refers to no memory.
        let pushed = unsafe { self.ring.submission().push(&opcode::Nop::new().build()) };
        pushed.map_err(|full| io::Error::other(full.to_string()))?;
        self.ring.submit_and_wait(1)?;
        self.ring
            .completion()
            .next()
            .map(|_| ())
            .ok_or_else(|| io::Error::other("no answer"))
    }

    /// What an operator should hear of the ring.
    pub(super) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// System calls made for it so far.
    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }

    pub(super) fn count_call(&mut self) {
        self.calls += 1;
        calls::note();
    }

    // ---- handing over and waiting -----------------------------------------------------------

    /// Puts an entry into the submission ring, which is handed over first if it is full; whether
    /// there was room.
    ///
    /// # Safety
    /// Memory that the entry refers to must stay where it is, and nobody else's, until the kernel has
    /// answered it.
    pub(super) unsafe fn push(&mut self, entry: &Entry) -> bool {
        if self.ring.submission().is_full() && self.enter().is_err() {
            return false;
        }
        // SAFETY: the caller's promise.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    /// Hands the submission ring to the kernel, and lets it do work it has put off.
    pub(super) fn enter(&mut self) -> io::Result<()> {
        loop {
            self.count_call();
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Hands over what is queued and sleeps until there is an answer, to whomever, or the time is over;
    /// it may return early for nothing.
    pub(super) fn enter_and_sleep(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.count_call();
        let timespec = Timespec::from(timeout.unwrap_or(SLEEP_MAX).min(SLEEP_MAX));
        let args = SubmitArgs::new().timespec(&timespec);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Whether the kernel has work for us to run, or has not taken all entries.
    pub(super) fn has_put_off(&mut self) -> bool {
        let submission = self.ring.submission();
        submission.taskrun() || submission.cq_overflow() || !submission.is_empty()
    }

    /// Whether an answer lies in the completion ring.
    pub(super) fn has_answers(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Hands out what lies in the completion ring.
    pub(super) fn drain(&mut self) {
        let Self {
            ring,
            members,
            watches,
            ended,
            ready,
            ..
        } = self;
        for answer in ring.completion() {
            let (data, result) = (answer.user_data(), answer.result());
            let place = data as u32;
            match data >> KIND_AT {
                KIND_DEVICE => {
                    let member = (data >> 32) as usize & 0xffff;
                    if let Some(Member::Here(answers)) = members.get_mut(member) {
                        answers.push((place, result));
                    }
                }
                KIND_WATCH => {
                    let place = place as usize;
                    let serial = data >> 32 & SERIAL_MASK;
                    let Some(Some(watch)) = watches.get(place) else {
                        continue;
                    };
                    if watch.serial != serial {
                        continue;
                    }
                    ready.push(match u32::try_from(result) {
                        Ok(events) => Ready::of_poll(watch.token, events),
                        // Whoever tries finds out what is wrong.
                        Err(_) => Ready::broken(watch.token),
                    });
                    if !cqueue::more(answer.flags()) && result >= 0 {
                        ended.push(place);
                    }
                }
                _ => {}
            }
        }
    }

    /// One turn of a thread that has nothing else to wait for: hands over all that is queued, sleeps
    /// until somebody has an answer or for so long, and says which descriptors are ready. Makes no
    /// system call if it may not sleep and there is nothing to hand over or take.
    pub(crate) fn turn(
        &mut self,
        timeout: Option<Duration>,
        out: &mut Vec<Ready>,
    ) -> io::Result<()> {
        self.drain();
        self.watch_again();
        let has_news = !self.ready.is_empty() || self.members.iter().any(Member::has_answers);
        if has_news || timeout == Some(Duration::ZERO) {
            if self.has_put_off() {
                match self.enter() {
                    // Passes when answers are taken, which is what comes next.
                    Err(error)
                        if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {}
                    entered => entered?,
                }
            }
        } else {
            self.enter_and_sleep(timeout)?;
        }
        self.drain();
        out.append(&mut self.ready);
        Ok(())
    }

    // ---- devices ----------------------------------------------------------------------------

    /// A number for a device.
    pub(super) fn join(&mut self) -> Option<u16> {
        let free = |member: &Member| matches!(member, Member::Free);
        let number = self.members.iter().position(free);
        let number = number.unwrap_or(self.members.len());
        if number >= SHARED_FILES as usize {
            return None;
        }
        if number == self.members.len() {
            self.members.push(Member::Free);
        }
        self.members[number] = Member::Here(Vec::new());
        Some(number as u16)
    }

    /// The device of this number goes. If the kernel still owes it answers they are nobody's.
    pub(super) fn leave(&mut self, member: u16, is_owed: bool) {
        self.members[usize::from(member)] = match is_owed {
            true => Member::Lost,
            false => Member::Free,
        };
    }

    /// What an operation of a device carries.
    pub(super) fn user_data(member: u16, slot: u32) -> u64 {
        KIND_DEVICE << KIND_AT | u64::from(member) << 32 | u64::from(slot)
    }

    /// Gives a device its answers, for an empty list.
    pub(super) fn take_answers(&mut self, member: u16, empty: &mut Vec<Answer>) {
        debug_assert!(empty.is_empty());
        if let Member::Here(answers) = &mut self.members[usize::from(member)] {
            std::mem::swap(answers, empty);
        }
    }

    /// Whether a device has answers that it has not taken.
    pub(super) fn has_answers_of(&self, member: u16) -> bool {
        self.members[usize::from(member)].has_answers()
    }

    /// Room for pieces of memory in the ring's table: the first of their numbers.
    pub(crate) fn take_pieces(&mut self, count: usize) -> Result<u32, String> {
        if !self.has_pieces {
            let size = if self.is_shared { PIECES_MAX } else { count };
            let made = self.ring.submitter().register_buffers_sparse(size as u32);
            made.map_err(|error| format!("{error}; it needs Linux 5.19"))?;
            self.has_pieces = true;
        }
        let count = count as u32;
        let (mut at, mut first) = (0, 0);
        for &(taken, len) in &self.pieces {
            if taken - first >= count {
                break;
            }
            (at, first) = (at + 1, taken + len);
        }
        if first + count > PIECES_MAX as u32 {
            return Err("the ring's table of memory is full".to_owned());
        }
        self.pieces.insert(at, (first, count));
        Ok(first)
    }

    /// Gives that room back.
    pub(crate) fn give_pieces(&mut self, first: u32) {
        self.pieces.retain(|&(taken, _)| taken != first);
    }

    // ---- descriptors ------------------------------------------------------------------------

    /// Has a descriptor watched, under a token that events carry.
    pub(crate) fn watch(
        &mut self,
        descriptor: RawFd,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        // A number that comes again was closed without being given up: that one is over.
        let _ = self.unwatch(descriptor);
        let mut events = 0;
        if interest.is_readable() {
            events |= libc::POLLIN | libc::POLLRDHUP;
        }
        if interest.is_writable() {
            events |= libc::POLLOUT;
        }
        self.next_serial = (self.next_serial + 1) & SERIAL_MASK;
        let watch = Watch {
            serial: self.next_serial,
            descriptor,
            token,
            events: events as u32,
        };
        let place = self.free.pop().unwrap_or_else(|| {
            self.watches.push(None);
            self.watches.len() - 1
        });
        if !self.begin_poll(&watch, place) {
            self.free.push(place);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.watches[place] = Some(watch);
        self.by_descriptor.insert(descriptor, place);
        Ok(())
    }

    /// Ends that. The kernel lets go of the file with the next turn.
    pub(crate) fn unwatch(&mut self, descriptor: RawFd) -> io::Result<()> {
        let Some(place) = self.by_descriptor.remove(&descriptor) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let Some(watch) = self.watches[place].take() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        self.ended.retain(|ended| *ended != place);
        self.free.push(place);
        // Not by removing the poll: that is refused (EALREADY) while it has something to say.
        let entry = opcode::AsyncCancel::new(watch_data(&watch, place)).build();
        let entry = entry.user_data(NOBODY).flags(Flags::SKIP_SUCCESS);
        // SAFETY: the entry refers to no memory.
        if unsafe { self.push(&entry) } {
            Ok(())
        } else {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }

    /// Ends all of that, now: the kernel takes a closed ring apart later, and would hold files until then.
    pub(crate) fn unwatch_all(&mut self) {
        let descriptors: Vec<RawFd> = self.by_descriptor.keys().copied().collect();
        for descriptor in descriptors {
            let _ = self.unwatch(descriptor);
        }
        let _ = self.enter();
    }

    fn begin_poll(&mut self, watch: &Watch, place: usize) -> bool {
        let entry = opcode::PollAdd::new(Fd(watch.descriptor), watch.events).multi(true);
        let entry = entry.build().user_data(watch_data(watch, place));
        // SAFETY: the entry refers to no memory.
        unsafe { self.push(&entry) }
    }

    /// Begins polls again that the kernel has ended.
    fn watch_again(&mut self) {
        while let Some(place) = self.ended.pop() {
            let Some(watch) = self.watches[place].take() else {
                continue;
            };
            let begun = self.begin_poll(&watch, place);
            self.watches[place] = Some(watch);
            if !begun {
                // No room at the moment: the next turn tries again.
                self.ended.push(place);
                return;
            }
        }
    }
}

impl Member {
    fn has_answers(&self) -> bool {
        matches!(self, Self::Here(answers) if !answers.is_empty())
    }
}

fn watch_data(watch: &Watch, place: usize) -> u64 {
    KIND_WATCH << KIND_AT | watch.serial << 32 | place as u64
}

pub(super) fn refused(step: &'static str) -> impl Fn(io::Error) -> RingRefused {
    move |source| RingRefused { step, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_in_the_table_is_given_again() {
        let Ok(mut hub) = Hub::shared() else {
            return;
        };
        let [a, b, c] = [5, 7, 3].map(|count| hub.take_pieces(count).unwrap());
        assert_eq!((a, b, c), (0, 5, 12));
        hub.give_pieces(b);
        assert_eq!(hub.take_pieces(8), Ok(15));
        assert_eq!(hub.take_pieces(7), Ok(5));
        assert!(hub.take_pieces(PIECES_MAX - 20).is_err());
        hub.give_pieces(a);
        assert_eq!(hub.take_pieces(4), Ok(0));
    }
}
