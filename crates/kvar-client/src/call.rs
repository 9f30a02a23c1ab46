//! Calls under way: what each still waits for, and how the parts become one answer.
//!
//! A call is cut into parts that travel alone: up to 16,384 ids of a lookup or remove, one block of
//! a get or put. It is complete when every part has ended; parts end by an answer, by the loss of
//! the link, or by the call's deadline, whichever comes first, and never twice.

use crate::answer::{is_unsettled, small_answer};
use crate::config::ClientError;
use crate::items::{Answer, GetItem, GetOutcome, GetResult, Leased, PreparedPut, Request};
use crate::layer_put::{LayerPutItem, LayerPutRequest, LayerSlot};
use crate::layers::{LayerRequest, Layers};
use crate::session::{Completion, Ticket};
use crate::stats::{Counters, add};
use kvar_base::{
    BlockId, LeaseToken, MissReason, Moment, PutOutcome, Refusal, SECTIONS_MAX, SystemClock,
};
use kvar_wire::{IDS_MAX, LookupAnswer, Message};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Why a part has no answer of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    Unreachable,
    Deadline,
}

impl Lost {
    pub(crate) const fn miss(self) -> MissReason {
        match self {
            Self::Unreachable => MissReason::Unreachable,
            Self::Deadline => MissReason::Deadline,
        }
    }

    pub(crate) const fn refusal(self) -> Refusal {
        match self {
            Self::Unreachable => Refusal::Unreachable,
            Self::Deadline => Refusal::Deadline,
        }
    }

    pub(crate) fn error(self, why: &str) -> ClientError {
        match self {
            Self::Unreachable => ClientError::Unreachable(why.to_owned()),
            Self::Deadline => ClientError::Deadline,
        }
    }
}

pub(crate) struct Call {
    pub(crate) deadline: Moment,
    /// When its first part left.
    pub(crate) sent: Option<Moment>,
    pub(crate) begun: Moment,
    /// The link that its last part left over.
    pub(crate) link: Option<u64>,
    /// Parts that have not ended.
    left: usize,
    pub(crate) work: Work,
}

pub(crate) enum Work {
    Small {
        ask: Ask,
        replies: Vec<Option<Reply>>,
    },
    Get {
        slots: Vec<GetSlot>,
        touch_request: u64,
        /// Whether a block that a writer has announced is waited for.
        waits: bool,
        /// What holds its parts together, if it goes layer by layer.
        layers: Option<Layers>,
    },
    Put {
        slots: Vec<PutSlot>,
        /// The number that its writer knows, if it goes by layers.
        by_layers: Option<u64>,
    },
}

/// Requests without payload.
pub(crate) enum Ask {
    Lookup {
        ids: Vec<BlockId>,
        first_depth: u32,
        touch_request: u64,
    },
    Lease {
        ids: Vec<BlockId>,
        first_depth: u32,
        touch_request: u64,
        token: LeaseToken,
        client: u64,
        ttl: Duration,
    },
    Renew {
        token: LeaseToken,
        ttl: Duration,
    },
    Release {
        token: LeaseToken,
    },
    Present {
        ids: Vec<BlockId>,
    },
    Remove {
        ids: Vec<BlockId>,
    },
    Flush,
    Purge,
    Stat {
        id: BlockId,
    },
    Status,
}

pub(crate) enum Reply {
    Message(Message),
    Lost(Lost),
    /// It was of no use any more: an earlier part of the chain is not there whole.
    NotAsked,
}

/// A lease that the node may hold although nobody was told of it: to be ended, unless it has ended
/// by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owed {
    pub(crate) token: LeaseToken,
    pub(crate) until: Moment,
    /// The link that it was asked over last: another could be faster, and end it before it begins.
    pub(crate) link: Option<u64>,
}

/// The longest that a node lets a lease last.
const LEASE_MAX: Duration = Duration::from_secs(30);

/// Most leases owed at a time: those of a client that loses every answer at some hundred lookups a
/// second, for as long as two seconds. What is beyond ends by itself.
const OWED_MAX: usize = 1024;

pub(crate) struct GetSlot {
    pub(crate) item: GetItem,
    pub(crate) outcome: Option<GetOutcome>,
    /// Bytes of the node's window that it takes while open.
    pub(crate) cost: u64,
    /// Whether the node was asked for it.
    pub(crate) is_sent: bool,
    /// Whether the node was told to write it to its destination, and has not answered.
    pub(crate) is_placed: bool,
}

pub(crate) struct PutSlot {
    pub(crate) put: PreparedPut,
    pub(crate) outcome: Option<PutOutcome>,
    /// How far it is, if it goes section by section.
    pub(crate) layers: Option<LayerSlot>,
}

impl Ask {
    fn parts(&self) -> usize {
        match self {
            Self::Lookup { ids, .. }
            | Self::Lease { ids, .. }
            | Self::Present { ids }
            | Self::Remove { ids } => ids.len().div_ceil(IDS_MAX),
            Self::Flush
            | Self::Purge
            | Self::Stat { .. }
            | Self::Status
            | Self::Renew { .. }
            | Self::Release { .. } => 1,
        }
    }

    /// Whether it is about a lease that stands.
    pub(crate) fn is_about_a_lease(&self) -> bool {
        matches!(self, Self::Renew { .. } | Self::Release { .. })
    }

    /// Whether a part is sent only when the one before was there whole: blocks behind a gap would
    /// be held for nobody.
    pub(crate) fn is_one_by_one(&self) -> bool {
        matches!(self, Self::Lease { .. })
    }

    /// Whether a reply says that all of its part is there (and, of a lease, promised).
    fn is_whole(&self, part: usize, reply: &Reply) -> bool {
        let Self::Lease { ids, .. } = self else {
            return true;
        };
        let asked = ids.chunks(IDS_MAX).nth(part).map_or(0, <[_]>::len);
        let leading = match reply {
            Reply::Message(Message::LeaseAnswer(answer)) => answer.leading,
            Reply::Message(Message::LookupAnswer(LookupAnswer::Leading(count, _))) => *count,
            _ => return false,
        };
        leading as usize >= asked
    }

    /// Whether the node may take long over it without being ill: it waits for a device.
    pub(crate) fn may_be_slow(&self) -> bool {
        matches!(self, Self::Remove { .. } | Self::Flush | Self::Purge)
    }
}

/// All calls under way and those that are complete.
pub(crate) struct Board {
    pub(crate) calls: HashMap<u64, Call>,
    pub(crate) done: Vec<Completion>,
    /// Parts (call, part) whose turn has come.
    pub(crate) next_parts: Vec<(u64, usize)>,
    pub(crate) owed: VecDeque<Owed>,
    /// Of these, what a node was told and has not answered, by request.
    pub(crate) paying: HashMap<u64, Owed>,
    /// Puts by layers under way, by the number that their writers know.
    pub(crate) layer_puts: HashMap<u64, u64>,
    pub(crate) counters: Arc<Counters>,
    clock: SystemClock,
    /// What last kept the node from being reached, for answers that carry an error.
    pub(crate) last_error: Option<ClientError>,
}

impl Board {
    pub(crate) fn new(counters: Arc<Counters>, clock: SystemClock) -> Self {
        Self {
            calls: HashMap::new(),
            done: Vec::new(),
            next_parts: Vec::new(),
            owed: VecDeque::new(),
            paying: HashMap::new(),
            layer_puts: HashMap::new(),
            counters,
            clock,
            last_error: None,
        }
    }

    /// Takes a request in; returns how many parts are to be sent (0: it is complete already).
    pub(crate) fn add(
        &mut self,
        ticket: u64,
        request: Request,
        now: Moment,
        deadline: Moment,
    ) -> usize {
        add(&self.counters.calls, 1);
        let small = |ask: Ask| {
            let replies = (0..ask.parts()).map(|_| None).collect();
            Work::Small { ask, replies }
        };
        let work = match request {
            Request::Lookup {
                ids,
                first_depth,
                touch_request,
            } => {
                add(&self.counters.lookups, 1);
                small(Ask::Lookup {
                    ids,
                    first_depth,
                    touch_request,
                })
            }
            Request::Lease {
                ids,
                first_depth,
                touch_request,
                token,
                client,
                ttl,
            } => {
                add(&self.counters.lookups, 1);
                small(Ask::Lease {
                    ids,
                    first_depth,
                    touch_request,
                    token,
                    client,
                    ttl,
                })
            }
            Request::Renew { token, ttl } => small(Ask::Renew { token, ttl }),
            Request::Release { token } => small(Ask::Release { token }),
            Request::Present { ids } => {
                add(&self.counters.lookups, 1);
                small(Ask::Present { ids })
            }
            Request::Remove { ids } => small(Ask::Remove { ids }),
            Request::Flush => small(Ask::Flush),
            Request::Purge => small(Ask::Purge),
            Request::Stat { id } => small(Ask::Stat { id }),
            Request::Status => small(Ask::Status),
            Request::Get {
                items,
                touch_request,
                waits,
            } => {
                let slots = items.into_iter().map(|item| self.slot(item)).collect();
                Work::Get {
                    slots,
                    touch_request,
                    waits,
                    layers: None,
                }
            }
            Request::GetLayers(LayerRequest {
                items,
                touch_request,
                waits,
                teller,
            }) => {
                let slots = items.into_iter().map(|item| self.slot(item));
                let mut slots: Vec<GetSlot> = slots.collect();
                let layers = Some(Layers::new(&mut slots, teller));
                Work::Get {
                    slots,
                    touch_request,
                    waits,
                    layers,
                }
            }
            Request::Put { items } => {
                let slots = items
                    .into_iter()
                    .map(|put| {
                        let wrong = PutOutcome::Refused(Refusal::WrongFormat);
                        let outcome = (!put.sound).then_some(wrong);
                        let layers = None;
                        PutSlot {
                            put,
                            outcome,
                            layers,
                        }
                    })
                    .collect();
                Work::Put {
                    slots,
                    by_layers: None,
                }
            }
            Request::PutLayers(LayerPutRequest { items, put, ended }) => {
                self.layer_puts.insert(put, ticket);
                let slot = |item: LayerPutItem| {
                    let wrong = PutOutcome::Refused(Refusal::WrongFormat);
                    let outcome = (!item.is_sound()).then_some(wrong);
                    let put = PreparedPut::without_bytes(&item);
                    PutSlot {
                        put,
                        outcome,
                        layers: Some(LayerSlot::new(item.lengths, Arc::clone(&ended))),
                    }
                };
                let slots = items.into_iter().map(slot).collect();
                Work::Put {
                    slots,
                    by_layers: Some(put),
                }
            }
        };
        let (parts, left) = match &work {
            Work::Small { replies, .. } => (replies.len(), replies.len()),
            Work::Get { slots, .. } => (
                slots.len(),
                slots.iter().filter(|slot| slot.outcome.is_none()).count(),
            ),
            Work::Put { slots, .. } => (
                slots.len(),
                slots.iter().filter(|slot| slot.outcome.is_none()).count(),
            ),
        };
        self.calls.insert(
            ticket,
            Call {
                deadline,
                sent: None,
                link: None,
                begun: now,
                left,
                work,
            },
        );
        if left == 0 {
            self.complete(ticket);
            return 0;
        }
        parts
    }

    fn slot(&self, item: GetItem) -> GetSlot {
        let empty = |range: &std::ops::Range<u16>| {
            range.is_empty() || usize::from(range.end) > SECTIONS_MAX
        };
        let wrong = item.sections.as_ref().is_some_and(empty);
        let outcome = wrong.then_some(GetOutcome::Miss(MissReason::WrongFormat));
        GetSlot {
            item,
            outcome,
            cost: 0,
            is_sent: false,
            is_placed: false,
        }
    }

    /// A part of a call without payload has ended.
    pub(crate) fn end_small(&mut self, ticket: u64, part: usize, reply: Reply) {
        let Some(call) = self.calls.get_mut(&ticket) else {
            return;
        };
        let Work::Small { ask, replies } = &mut call.work else {
            return;
        };
        if replies[part].is_some() {
            return;
        }
        let goes_on = ask.is_whole(part, &reply);
        replies[part] = Some(reply);
        call.left -= 1;
        if ask.is_one_by_one() && call.left > 0 {
            if goes_on {
                self.next_parts.push((ticket, part + 1));
            } else {
                for reply in replies.iter_mut().filter(|reply| reply.is_none()) {
                    *reply = Some(Reply::NotAsked);
                }
                call.left = 0;
            }
        }
        if call.left == 0 {
            self.complete(ticket);
        }
    }

    /// A block of a get has ended; its destination is in its slot.
    pub(crate) fn end_get(&mut self, ticket: u64, item: usize, outcome: GetOutcome) {
        let Some(call) = self.calls.get_mut(&ticket) else {
            return;
        };
        let Work::Get { slots, layers, .. } = &mut call.work else {
            return;
        };
        if slots[item].outcome.is_some() {
            return;
        }
        call.left -= 1;
        match layers {
            None => slots[item].outcome = Some(outcome),
            Some(layers) => {
                let outcome = layers.judge(slots, item, outcome);
                slots[item].outcome = Some(outcome);
                call.left -= layers.ended(slots, item);
            }
        }
        if call.left == 0 {
            self.complete(ticket);
        }
    }

    /// A block of a put has ended; nobody reads its source any more.
    pub(crate) fn end_put(&mut self, ticket: u64, item: usize, outcome: PutOutcome) {
        let Some(call) = self.calls.get_mut(&ticket) else {
            return;
        };
        let Work::Put { slots, .. } = &mut call.work else {
            return;
        };
        let slot = &mut slots[item];
        if slot.outcome.is_some() {
            return;
        }
        slot.put.source = None;
        slot.outcome = Some(outcome);
        if let Some(layers) = &mut slot.layers {
            layers.queue.clear();
            layers.ended[item].store(true, std::sync::atomic::Ordering::Relaxed);
        }
        call.left -= 1;
        if call.left == 0 {
            self.complete(ticket);
        }
    }

    pub(crate) fn get_slot(&mut self, ticket: u64, item: usize) -> Option<&mut GetSlot> {
        match &mut self.calls.get_mut(&ticket)?.work {
            Work::Get { slots, .. } => slots.get_mut(item),
            _ => None,
        }
    }

    /// Whether a call is a get that waits for blocks that a writer has announced.
    pub(crate) fn waits(&self, ticket: u64) -> bool {
        let work = self.calls.get(&ticket).map(|call| &call.work);
        matches!(work, Some(Work::Get { waits: true, .. }))
    }

    /// Blocks of a put.
    pub(crate) fn put_count(&self, ticket: u64) -> usize {
        match self.calls.get(&ticket).map(|call| &call.work) {
            Some(Work::Put { slots, .. }) => slots.len(),
            _ => 0,
        }
    }

    pub(crate) fn put_slot(&mut self, ticket: u64, item: usize) -> Option<&mut PutSlot> {
        match &mut self.calls.get_mut(&ticket)?.work {
            Work::Put { slots, .. } => slots.get_mut(item),
            _ => None,
        }
    }

    /// Ends every part of a call that has not ended.
    pub(crate) fn end_call(&mut self, ticket: u64, lost: Lost) {
        let Some(call) = self.calls.get(&ticket) else {
            return;
        };
        let parts = match &call.work {
            Work::Small { replies, .. } => replies.len(),
            Work::Get { slots, .. } => slots.len(),
            Work::Put { slots, .. } => slots.len(),
        };
        for part in 0..parts {
            match self.calls.get(&ticket).map(|call| &call.work) {
                Some(Work::Small { .. }) => self.end_small(ticket, part, Reply::Lost(lost)),
                Some(Work::Get { .. }) => {
                    self.end_get(ticket, part, GetOutcome::Miss(lost.miss()));
                }
                Some(Work::Put { .. }) => {
                    self.end_put(ticket, part, PutOutcome::Refused(lost.refusal()));
                }
                None => return,
            }
        }
    }

    fn owe(&mut self, owed: Owed) {
        if self.owed.len() >= OWED_MAX {
            self.owed.pop_front();
        }
        self.owed.push_back(owed);
    }

    /// The link went before the node had answered that it ended a lease.
    pub(crate) fn owe_again(&mut self, request: u64) {
        if let Some(owed) = self.paying.remove(&request) {
            self.owe(Owed { link: None, ..owed });
        }
    }

    fn complete(&mut self, ticket: u64) {
        let Some(call) = self.calls.remove(&ticket) else {
            return;
        };
        let why = match &self.last_error {
            Some(error) => error.to_string(),
            None => "the link to the node broke before it answered".to_owned(),
        };
        let answer = match call.work {
            Work::Small { ask, replies } => {
                let ended_by_itself = |ttl: Duration| call.deadline.after(ttl.min(LEASE_MAX));
                let owed = match &ask {
                    Ask::Lease { token, ttl, .. } if replies.iter().any(is_unsettled) => {
                        Some(Owed {
                            token: *token,
                            until: ended_by_itself(*ttl),
                            link: call.link,
                        })
                    }
                    _ => None,
                };
                let sent = call.sent.unwrap_or(call.begun);
                let answer = small_answer(&ask, replies, &why, self.clock.instant(sent));
                let nobody_knows = !matches!(answer, Answer::Leased(Leased { lease: Some(_), .. }));
                // What was never sent is owed to nobody.
                if let Some(owed) = owed.filter(|_| call.sent.is_some() && nobody_knows) {
                    self.owe(owed);
                }
                answer
            }
            Work::Get {
                slots,
                layers: Some(layers),
                ..
            } => {
                for outcome in layers.outcomes(&slots) {
                    self.counters.got(&outcome);
                }
                Answer::Layers
            }
            Work::Get { slots, .. } => {
                let result = |slot: GetSlot| {
                    let lost = GetOutcome::Miss(MissReason::Unreachable);
                    let outcome = slot.outcome.unwrap_or(lost);
                    self.counters.got(&outcome);
                    GetResult {
                        id: slot.item.id,
                        outcome,
                        into: slot.item.into,
                    }
                };
                Answer::Get(slots.into_iter().map(result).collect())
            }
            Work::Put { slots, by_layers } => {
                if let Some(put) = by_layers {
                    self.layer_puts.remove(&put);
                }
                let outcome = |slot: PutSlot| {
                    let lost = PutOutcome::Refused(Refusal::Unreachable);
                    let outcome = slot.outcome.unwrap_or(lost);
                    self.counters.put(outcome, slot.put.bytes);
                    outcome
                };
                Answer::Put(slots.into_iter().map(outcome).collect())
            }
        };
        self.done.push(Completion {
            ticket: Ticket(ticket),
            answer,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvar_wire::PutHints;

    /// One of no blocks stayed on the board's list for as long as the client lived.
    #[test]
    fn a_put_by_layers_that_ends_at_once_leaves_nothing_on_the_board() {
        let mut board = Board::new(Arc::default(), SystemClock::default());
        let item = |length| LayerPutItem {
            id: BlockId::new([1; 32]),
            lengths: vec![length],
            hints: PutHints::default(),
            durable: false,
        };
        // None, one that is not sound, and one that has to be sent first.
        for (put, (items, parts)) in
            (1..).zip([(vec![], 0), (vec![item(0)], 0), (vec![item(7)], 1)])
        {
            let request = Request::PutLayers(LayerPutRequest {
                ended: items.iter().map(|_| false.into()).collect(),
                items,
                put,
            });
            assert_eq!(board.add(put, request, Moment(0), Moment(9)), parts);
            assert_eq!((board.calls.len(), board.layer_puts.len()), (parts, parts));
            board.end_call(put, Lost::Deadline);
            assert_eq!((board.calls.len(), board.layer_puts.len()), (0, 0));
        }
        assert_eq!(board.done.len(), 3);
    }
}
