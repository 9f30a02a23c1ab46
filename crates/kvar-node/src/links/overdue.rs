//! What nobody waits for any more: found before it costs a device read or bytes on a link.
//!
//! ```text
//!   in line for the link's budget   the request is closed, so its items are passed over     line
//!   asked, and not handed to its    the ask is dropped                                      asked
//!     owner yet
//!   at the owner, or waiting for    the engine answers Miss(deadline), and reads nothing    call, device
//!     the device                    (kvar-engine counts these)
//!   answered, and its bytes wait    the bytes are taken back, a Miss(deadline) goes         link
//!     for a slow link                 instead
//! ```
//!
//! A put whose bytes have come is stored although its writer has given up: what is in memory and
//! verified is of use to the next who asks, and its way to the device is the same as any other's.
//!
//! What is absent: time that a frame lay in the socket before it was read. A deadline travels as time
//! left, and the clocks of two machines are not compared; a client that gave up meanwhile has sent a
//! Cancel behind it.

use super::Links;
use super::conversation::Conversation;
use super::desk::{Desk, LINK_TIMER, Outgoing, To};
use crate::mail::Ask;
use kvar_base::{MissReason, Moment};
use kvar_transport::Link as _;
use kvar_wire::GetSlot;
use std::collections::VecDeque;

/// An answer whose bytes have not left.
pub(super) struct Unsent {
    pub(super) token: u64,
    pub(super) request: u64,
    pub(super) item: u16,
    pub(super) deadline: Moment,
    /// Of its payload.
    pub(super) bytes: u64,
    /// Whether it is a hit once it has left, or a miss if it has not in time.
    pub(super) is_counted: bool,
    /// Where its payload is written, if it is not sent: the place is in use until it has.
    pub(super) slot: Option<GetSlot>,
}

/// The answers with bytes that a link has queued.
pub(super) struct UnsentAnswers {
    /// In the order in which they leave.
    queue: VecDeque<Unsent>,
    /// Before this none is overdue.
    first_deadline: Moment,
    /// When the link is looked at next for their sake.
    timer: Option<Moment>,
}

impl Default for UnsentAnswers {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            first_deadline: Moment(u64::MAX),
            timer: None,
        }
    }
}

impl UnsentAnswers {
    /// An answer is queued.
    fn add(&mut self, unsent: Unsent) {
        self.first_deadline = self.first_deadline.min(unsent.deadline);
        self.queue.push_back(unsent);
    }

    /// One has left: the first, unless it was taken back.
    fn sent(&mut self, token: u64) -> Option<Unsent> {
        let is_first = self.queue.front().is_some_and(|first| first.token == token);
        let sent = is_first.then(|| self.queue.pop_front()).flatten();
        if self.queue.is_empty() {
            self.first_deadline = Moment(u64::MAX);
        }
        sent
    }

    /// When the link is to be looked at, if it would not be by then. One timer is enough for a link
    /// whose answers leave: it is set anew when it is over.
    fn next_timer(&mut self) -> Option<Moment> {
        let first = self.first_deadline;
        let is_late = self.timer.is_none_or(|timer| timer > first);
        if first == Moment(u64::MAX) || !is_late {
            return None;
        }
        self.timer = Some(first);
        self.timer
    }

    /// A timer of the link is over; whether it was this one, and the link is to be looked at.
    pub(super) fn timer_over(&mut self, now: Moment) -> bool {
        self.timer.take_if(|timer| *timer <= now).is_some()
    }

    /// Takes those out whose time is over.
    fn take_overdue(&mut self, now: Moment) -> Vec<Unsent> {
        if self.first_deadline > now {
            return Vec::new();
        }
        let queue = std::mem::take(&mut self.queue);
        let (overdue, kept): (Vec<_>, Vec<_>) =
            queue.into_iter().partition(|unsent| unsent.deadline <= now);
        self.first_deadline = Moment(u64::MAX);
        for unsent in &kept {
            self.first_deadline = self.first_deadline.min(unsent.deadline);
        }
        self.queue = kept.into();
        overdue
    }
}

impl Conversation {
    /// An answer is queued: it is looked for at its deadline, whether or not the link moves.
    pub(super) fn note_unsent(&mut self, desk: &mut Desk, unsent: Unsent) {
        self.unsent.add(unsent);
        self.set_timer(desk);
    }

    fn set_timer(&mut self, desk: &mut Desk) {
        if let Some(at) = self.unsent.next_timer() {
            desk.timers.insert((at, self.key, LINK_TIMER));
        }
    }

    /// The bytes of an answer have left.
    pub(super) fn on_sent(&mut self, desk: &mut Desk, token: u64) {
        if let Some(sent) = self.unsent.sent(token) {
            self.staging.free(sent.slot);
            self.count_hit(desk, &sent);
        }
    }

    /// What is taken back was no hit, so hits are counted when they have left.
    fn count_hit(&self, desk: &mut Desk, sent: &Unsent) {
        let hits = u64::from(sent.is_counted);
        desk.counters.payload_bytes_out += sent.bytes;
        desk.counters.get_hits += hits;
        desk.counters.gets_placed += u64::from(sent.slot.is_some());
        desk.of_namespace[self.tenant.index()].hits += hits;
    }

    /// Takes back what is queued and of no use any more; asked before anything is sent.
    pub(super) fn drop_overdue(&mut self, desk: &mut Desk) {
        for unsent in self.unsent.take_overdue(desk.now) {
            // What has begun to leave is sent to its end: the stream must stay whole.
            let fenced = self.link.fence_push(unsent.token);
            self.staging.free(unsent.slot);
            if !fenced.is_some_and(|fenced| fenced.unsent) {
                self.count_hit(desk, &unsent);
                continue;
            }
            desk.counters.overdue.link += 1;
            let Unsent {
                request,
                item,
                is_counted,
                ..
            } = unsent;
            self.send_miss(desk, request, item, MissReason::Deadline, is_counted);
        }
        self.set_timer(desk);
    }
}

impl Links {
    /// Drops asks that were left by requests which are over, before their owners hear of them.
    pub(super) fn drop_dead(&mut self, outgoing: &mut Vec<Outgoing>) {
        // Most turns end no request early, and then there is nothing to look for.
        if !std::mem::take(&mut self.desk.ended_early) {
            return;
        }
        let (slots, desk) = (&self.slots, &mut self.desk);
        outgoing.retain(|Outgoing { operation, to }| {
            let (To::Engine(_, ask) | To::Nobody(ask)) = to else {
                return true;
            };
            // What is asked of a device on behalf of nobody. A remove goes on to its end, and memory
            // that was given out comes back.
            let is_idle = matches!(
                ask,
                Ask::Get(..) | Ask::Await(_) | Ask::PutBegin(_) | Ask::Lookup { .. } | Ask::Stat(_)
            );
            let number = *operation as usize;
            let Some(operation) = desk.operations.get(number).filter(|_| is_idle) else {
                return true;
            };
            let link = slots.get(operation.link.index);
            let link = link.filter(|link| link.key == operation.link);
            let request = link.and_then(|link| link.open.get(&operation.request));
            let is_wanted = request.is_some_and(|open| open.opening == operation.opening);
            if !is_wanted {
                desk.counters.overdue.asked += 1;
                desk.operations.remove(number);
            }
            is_wanted
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_overdue_by_their_own_deadline_wherever_they_stand() {
        let mut unsent = UnsentAnswers::default();
        for (token, deadline) in [(1, 30), (2, 10), (3, 20)] {
            unsent.add(Unsent {
                token,
                request: 7,
                item: token as u16,
                deadline: Moment(deadline),
                bytes: 1,
                is_counted: true,
                slot: None,
            });
        }
        assert_eq!(unsent.next_timer(), Some(Moment(10)));
        assert_eq!(unsent.next_timer(), None, "it is set");
        assert!(unsent.take_overdue(Moment(9)).is_empty());
        let tokens = |overdue: Vec<Unsent>| -> Vec<u64> {
            overdue.into_iter().map(|unsent| unsent.token).collect()
        };
        assert!(!unsent.timer_over(Moment(9)));
        assert!(unsent.timer_over(Moment(10)));
        assert_eq!(tokens(unsent.take_overdue(Moment(10))), [2]);
        assert_eq!(unsent.next_timer(), Some(Moment(20)));
        assert!(unsent.take_overdue(Moment(19)).is_empty());
        assert!(unsent.sent(1).is_some());
        assert_eq!(tokens(unsent.take_overdue(Moment(40))), [3]);
        assert_eq!(unsent.first_deadline, Moment(u64::MAX));
        // One that was taken back and leaves all the same is nobody's.
        assert!(unsent.sent(3).is_none());
    }
}
