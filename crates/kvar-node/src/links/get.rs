//! Gets on a link: items wait for room in the link's budget, are asked of their owners, and are
//! pushed as they come.
//!
//! ```text
//!   Awaiting ── a put has ended, if that was to be waited for ──> Waiting
//!
//!   Waiting ── room for its bytes ──> Asked ── the owner has it ──────────────> pushed, Answered
//!                                       │ not there, and there is a tier below
//!                                       └──> AskedBelow ── has it, or not ────> Answered
//! ```
//!
//! A copy goes through the link, or is written to the place that the item names and only told
//! ([`staging`](super::staging)).
//!
//! What must always be true: bytes asked for and bytes queued together stay within the budget, but
//! for one block, which is always let through, and for the first blocks of a link, whose size is
//! not known yet; what is waited for takes nothing of it. A peer that takes its answers too slowly is
//! not listened to meanwhile.

use super::conversation::{Conversation, may_be_below};
use super::desk::{Desk, LinkKey, Operation, To};
use super::overdue::Unsent;
use super::request::{Get, Item, ItemState, Kind, Open, Reading};
use super::serve::touch_request;
use crate::mail::{Ask, AwaitAsk};
use crate::report::NodeFacts;
use kvar_base::{BLOCK_BYTES_MAX, MissReason, Moment};
use kvar_engine::{Copy, GetRequest, ReadHints, Touch};
use kvar_transport::{Link as _, SharedPieces};
use kvar_wire::{GetAnswer, GetHints, GetOutcome, GetSlot, Section};

/// Reads under way while the link has not seen a block yet and nobody knows how large they are.
const FIRST_READS: u32 = 8;

impl Conversation {
    pub(super) fn on_get(&mut self, desk: &mut Desk, request: u64, get: kvar_wire::Get) {
        let slots = get.items.iter().filter_map(|item| item.slot);
        if let Err(text) = self.staging.take(slots) {
            return self.protocol(desk, &text);
        }
        let miss = match () {
            () if get.deadline_us == 0 => Some(MissReason::Deadline),
            () if self.is_full(desk, get.items.len()) => Some(MissReason::Overloaded),
            () => None,
        };
        if let Some(reason) = miss {
            for (item, wanted) in get.items.iter().enumerate() {
                let is_counted = is_counted(get.hints, wanted);
                self.staging.free(wanted.slot);
                self.send_miss(desk, request, item as u16, reason, is_counted);
            }
            return;
        }
        let count = get.items.len();
        if count == 0 {
            return self.protocol(
                desk,
                "a get of nothing has no answer; name at least one block",
            );
        }
        let items = get.items.into_iter();
        let kind = Kind::Get(Get {
            items: items
                .map(|wanted| Item {
                    wanted,
                    state: ItemState::Waiting,
                })
                .collect(),
            left: count as u32,
            touch_request: touch_request(desk, self.tenant, get.touch_request),
            hints: get.hints,
        });
        let waits = get.hints.wait_announced;
        if let Some(operation) = self.open(desk, request, Some(get.deadline_us), kind) {
            if waits {
                return self.await_puts(desk, operation);
            }
            self.line_up(request, operation.opening, count);
            self.start_gets(desk);
        }
    }

    /// Asks that a get be told of its blocks when nobody puts them any more, and reads nothing before.
    fn await_puts(&mut self, desk: &mut Desk, operation: Operation) {
        let Some(Open {
            deadline,
            kind: Kind::Get(get),
            ..
        }) = self.open.get_mut(&operation.request)
        else {
            return;
        };
        for (part, item) in (0..).zip(&mut get.items) {
            let ask = Ask::Await(AwaitAsk {
                id: item.wanted.id,
                until: *deadline,
                link: self.key.serial,
            });
            let operation = Operation { part, ..operation };
            let operation = desk.ask_owner(&item.wanted.id, operation, ask);
            item.state = ItemState::Awaiting(operation);
        }
    }

    /// What an item waited for is over: now it is read as any other.
    pub(super) fn on_awaited(&mut self, request: u64, index: u32) {
        if let Some(Open {
            opening,
            kind: Kind::Get(get),
            ..
        }) = self.open.get_mut(&request)
        {
            get.items[index as usize].state = ItemState::Waiting;
            self.waiting_gets
                .push_back((request, *opening, index as u16));
        }
    }

    /// Puts a get's items in line.
    fn line_up(&mut self, request: u64, opening: u64, items: usize) {
        let items = (0..items).map(|item| (request, opening, item as u16));
        self.waiting_gets.extend(items);
    }

    /// Asks for as many waiting items as the link's budget has room for, and lets the peer feel
    /// it when it takes its answers too slowly.
    pub(super) fn start_gets(&mut self, desk: &mut Desk) {
        let budget = desk.settings.limits.bytes_max;
        let queued = self.link.outgoing_bytes() as u64;
        self.link.pause(queued > budget);
        while let Some((request, opening, index)) = self.waiting_gets.front().copied() {
            // At least one is always under way, else a budget below one block would wait for ever.
            if self.reading_bytes + queued >= budget && self.reading_bytes + queued > 0 {
                return;
            }
            if self.block_bytes_seen.is_none() && self.reads >= FIRST_READS {
                return;
            }
            self.waiting_gets.pop_front();
            let guess = self
                .block_bytes_seen
                .unwrap_or(desk.settings.block_bytes_guess);
            let Some(open) = self.open.get_mut(&request) else {
                continue;
            };
            let Kind::Get(get) = &mut open.kind else {
                continue;
            };
            if open.opening != opening {
                continue;
            }
            let (touch_request, deadline) = (get.touch_request, open.deadline);
            let item = &mut get.items[usize::from(index)];
            let bytes = expected_bytes(&item.wanted)
                .unwrap_or(guess)
                .min(BLOCK_BYTES_MAX);
            self.reading_bytes += bytes;
            self.reads += 1;
            let id = item.wanted.id;
            let ask = ask_for(&item.wanted, deadline, touch_request, get.hints, self.key);
            let operation = Operation {
                link: self.key,
                request,
                opening,
                part: u32::from(index),
            };
            let operation = desk.ask_owner(&id, operation, ask);
            item.state = ItemState::Asked(Reading { bytes, operation });
        }
    }

    /// An owner has answered an item.
    pub(super) fn on_got(
        &mut self,
        desk: &mut Desk,
        request: u64,
        index: u32,
        outcome: Result<Copy, MissReason>,
    ) {
        let Some(Open {
            kind: Kind::Get(get),
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        let item = &mut get.items[index as usize];
        use ItemState::{Answered, Asked, AskedBelow, Awaiting, Waiting};
        let (bytes, outcome) = match (item.state, outcome) {
            (Asked(Reading { bytes, .. }), Err(reason)) if may_be_below(reason) => {
                if self.ask_below(desk, request, index, bytes, reason) {
                    return;
                }
                (bytes, Err(reason))
            }
            (Asked(reading), outcome) => (reading.bytes, outcome),
            // What the first one said is the reason, unless the other knows more than that.
            (AskedBelow(reading, above), Err(MissReason::Absent)) => (reading.bytes, Err(above)),
            (AskedBelow(reading, _), outcome) => (reading.bytes, outcome),
            (Awaiting(_) | Waiting | Answered, _) => return,
        };
        let Some(Open {
            deadline,
            kind: Kind::Get(get),
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        let deadline = *deadline;
        let item = &mut get.items[index as usize];
        item.state = ItemState::Answered;
        self.reading_bytes -= bytes;
        self.reads -= 1;
        get.left -= 1;
        self.open_weight -= 1;
        let is_over = get.left == 0;
        let outcome = outcome.and_then(|copy| fits(&item.wanted, copy));
        let is_counted = is_counted(get.hints, &item.wanted);
        let slot = item.wanted.slot;
        let answering = Answering {
            request,
            item: index as u16,
            deadline,
            is_counted,
            slot,
        };
        match outcome {
            Ok(copy) => self.push_copy(desk, &answering, copy),
            Err(reason) => {
                self.staging.free(slot);
                self.send_miss(desk, request, answering.item, reason, is_counted);
            }
        }
        if is_over {
            self.close(desk, request);
        }
    }

    /// Asks the tier below for an item, if there is one; its budget stays as it is.
    fn ask_below(
        &mut self,
        desk: &mut Desk,
        request: u64,
        index: u32,
        bytes: u64,
        reason: MissReason,
    ) -> bool {
        let Some(open) = self.open.get_mut(&request) else {
            return false;
        };
        let (opening, deadline) = (open.opening, open.deadline);
        let Kind::Get(get) = &mut open.kind else {
            return false;
        };
        let (touch_request, hints) = (get.touch_request, get.hints);
        let item = &mut get.items[index as usize];
        let Some(engine) = desk.routes.lower_owner(&item.wanted.id) else {
            return false;
        };
        let ask = ask_for(&item.wanted, deadline, touch_request, hints, self.key);
        let operation = Operation {
            link: self.key,
            request,
            opening,
            part: index,
        };
        let operation = desk.ask(To::Engine(engine, ask), operation);
        item.state = ItemState::AskedBelow(Reading { bytes, operation }, reason);
        true
    }

    pub(super) fn send_miss(
        &mut self,
        desk: &mut Desk,
        request: u64,
        item: u16,
        reason: MissReason,
        is_counted: bool,
    ) {
        if is_counted {
            desk.counters.get_misses.add(reason);
            desk.of_namespace[self.tenant.index()].misses += 1;
        }
        self.send(
            desk,
            request,
            &GetAnswer {
                item,
                outcome: GetOutcome::Miss(reason),
            },
        );
    }

    fn push_copy(&mut self, desk: &mut Desk, answering: &Answering, copy: Copy) {
        let Answering {
            request,
            item,
            deadline,
            is_counted,
            slot,
        } = *answering;
        let mut sections = std::mem::take(&mut desk.sections);
        sections.clear();
        sections.extend(copy.sections.iter().map(|section| Section {
            len: section.len,
            check: section.check,
        }));
        let ranges: smallvec::SmallVec<[_; 2]> = copy
            .sections
            .iter()
            .map(|section| {
                let start = section.offset as usize;
                start..start + section.len as usize
            })
            .collect();
        let bytes = ranges.iter().map(ExactSizeIterator::len).sum::<usize>();
        let first_section = copy.sections.first().map_or(0, |section| section.index);
        let version = copy.version;
        let (outcome, payload_bytes) = match slot {
            None => {
                let hit = GetOutcome::Hit {
                    version,
                    first_section,
                    sections,
                };
                (hit, bytes)
            }
            Some(_) => {
                let placed = GetOutcome::Placed {
                    version,
                    first_section,
                    sections,
                };
                (placed, 0)
            }
        };
        desk.scratch.clear();
        let (answer, epoch) = (GetAnswer { item, outcome }, NodeFacts::EPOCH);
        let encoded = kvar_wire::encode(&mut desk.scratch, request, epoch, &answer, payload_bytes);
        if let GetOutcome::Hit { sections, .. } | GetOutcome::Placed { sections, .. } =
            answer.outcome
        {
            desk.sections = sections;
        }
        if let Err(error) = encoded {
            tracing::error!(peer = %self.peer, %error, "an answer does not fit its bounds");
            return self.link.close();
        }
        self.block_bytes_seen = self.block_bytes_seen.max(Some(bytes as u64));
        let token = desk.number();
        let source = SharedPieces {
            bytes: copy.bytes,
            ranges,
        };
        let head = &desk.scratch;
        let pushed = match slot {
            None => self.link.push(head, token, source),
            // It lies inside: looked at when it was taken.
            Some(slot) => self.link.push_placed(head, token, source, slot.at as usize),
        };
        if pushed.is_err() {
            return self.link.close();
        }
        self.note_unsent(
            desk,
            Unsent {
                token,
                request,
                item,
                deadline,
                bytes: bytes as u64,
                is_counted,
                slot,
            },
        );
    }
}

/// An item of which its owner has sent a copy.
struct Answering {
    request: u64,
    item: u16,
    deadline: Moment,
    is_counted: bool,
    slot: Option<GetSlot>,
}

/// What an engine is asked of an item, be it the first one or the one below.
fn ask_for(
    wanted: &kvar_wire::GetItem,
    deadline: Moment,
    touch_request: u64,
    hints: GetHints,
    link: LinkKey,
) -> Ask {
    // The sections of a block that are taken one after another are one use of it.
    let touch = match hints.by_layer && !is_first(wanted) {
        true => Touch::NONE,
        false => Touch {
            request: touch_request,
            depth: wanted.depth,
        },
    };
    let request = GetRequest {
        id: wanted.id,
        sections: wanted.sections.clone(),
        deadline,
        touch,
    };
    let hints = ReadHints {
        asker: link.serial,
        goes_on: hints.by_layer,
    };
    Ask::Get(request, hints)
}

/// Whether an item counts as a hit or a miss: a block that is taken section by section is one.
pub(super) fn is_counted(hints: GetHints, wanted: &kvar_wire::GetItem) -> bool {
    !hints.by_layer || is_first(wanted)
}

/// Whether an item is a block's first section, or the whole.
fn is_first(wanted: &kvar_wire::GetItem) -> bool {
    wanted
        .sections
        .as_ref()
        .is_none_or(|range| range.start == 0)
}

/// Bytes a reader says it has room for.
fn expected_bytes(item: &kvar_wire::GetItem) -> Option<u64> {
    match &item.expected {
        kvar_wire::Lengths::Any => None,
        kvar_wire::Lengths::Equal(count, len) => Some(u64::from(*count) * u64::from(*len)),
        kvar_wire::Lengths::Each(lengths) => Some(lengths.iter().map(|len| u64::from(*len)).sum()),
    }
}

/// Whether a copy is what the reader wants and has room for.
fn fits(wanted: &kvar_wire::GetItem, copy: Copy) -> Result<Copy, MissReason> {
    if wanted
        .version
        .is_some_and(|version| version != copy.version)
    {
        return Err(MissReason::Version);
    }
    if !wanted
        .expected
        .fit(copy.sections.iter().map(|section| section.len))
    {
        return Err(MissReason::WrongFormat);
    }
    if let Some(slot) = wanted.slot {
        let lengths = copy.sections.iter().map(|section| u64::from(section.len));
        if lengths.sum::<u64>() != u64::from(slot.bytes) {
            return Err(MissReason::WrongFormat);
        }
    }
    Ok(copy)
}
