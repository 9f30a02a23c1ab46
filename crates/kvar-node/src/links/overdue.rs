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
use super::desk::{Desk, Outgoing, To};
use crate::mail::Ask;
use kvar_base::{MissReason, Moment};
use kvar_transport::Link as _;
use kvar_wire::{GetAnswer, GetOutcome};
use std::collections::VecDeque;

/// An answer whose bytes have not left.
struct Unsent {
    token: u64,
    request: u64,
    item: u16,
    deadline: Moment,
}

/// The answers with bytes that a link has queued.
pub(super) struct UnsentAnswers {
    /// In the order in which they leave.
    queue: VecDeque<Unsent>,
    /// Before this none is overdue.
    first_deadline: Moment,
}

impl Default for UnsentAnswers {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            first_deadline: Moment(u64::MAX),
        }
    }
}

impl UnsentAnswers {
    /// An answer is queued.
    pub(super) fn add(&mut self, token: u64, request: u64, item: u16, deadline: Moment) {
        self.first_deadline = self.first_deadline.min(deadline);
        self.queue.push_back(Unsent {
            token,
            request,
            item,
            deadline,
        });
    }

    /// One has left: the first, unless it was taken back.
    fn sent(&mut self, token: u64) {
        if self.queue.front().is_some_and(|first| first.token == token) {
            self.queue.pop_front();
        }
        if self.queue.is_empty() {
            self.first_deadline = Moment(u64::MAX);
        }
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
    /// The bytes of an answer have left.
    pub(super) fn on_sent(&mut self, token: u64) {
        self.unsent.sent(token);
    }

    /// Takes back what is queued and of no use any more; asked before anything is sent.
    pub(super) fn drop_overdue(&mut self, desk: &mut Desk) {
        for Unsent {
            token,
            request,
            item,
            ..
        } in self.unsent.take_overdue(desk.now)
        {
            // What has begun to leave is sent to its end: the stream must stay whole.
            let fenced = self.link.fence_push(token);
            if !fenced.is_some_and(|fenced| fenced.unsent) {
                continue;
            }
            desk.counters.overdue.link += 1;
            let outcome = GetOutcome::Miss(MissReason::Deadline);
            self.send(desk, request, &GetAnswer { item, outcome });
        }
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
                Ask::Get(..) | Ask::PutBegin(_) | Ask::Lookup { .. } | Ask::Stat(_)
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
            unsent.add(token, 7, token as u16, Moment(deadline));
        }
        assert!(unsent.take_overdue(Moment(9)).is_empty());
        let tokens = |overdue: Vec<Unsent>| -> Vec<u64> {
            overdue.into_iter().map(|unsent| unsent.token).collect()
        };
        assert_eq!(tokens(unsent.take_overdue(Moment(10))), [2]);
        assert!(unsent.take_overdue(Moment(19)).is_empty());
        unsent.sent(1);
        assert_eq!(tokens(unsent.take_overdue(Moment(40))), [3]);
        assert_eq!(unsent.first_deadline, Moment(u64::MAX));
        // One that was taken back and leaves all the same is nobody's.
        unsent.sent(3);
    }
}
