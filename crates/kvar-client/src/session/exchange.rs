//! What comes in from the links: frames, payload, and their end.
//!
//! A frame for a request that is no longer open is late (its call has ended): its payload is
//! drained, it is counted, and that is all. A frame that breaks the protocol ends its link.

use super::Session;
use crate::call::{Board, Lost, Reply};
use crate::check::SectionChecks;
use crate::config::ClientError;
use crate::connection::{Connection, Open, Phase, Receiving};
use crate::items::{Filled, GetItem, GetOutcome};
use crate::session::links::Slot;
use crate::session::pieces::advance;
use crate::staging::Staging;
use crate::stats::{add, subtract};
use kvar_base::{MissReason, Mode, Moment, PutOutcome};
use kvar_transport::{DownReason, Event, Link, Owned, Sink, TURN_BYTES};
use kvar_wire::{ClientStep, Failure, FailureCode, Header, Message, Payload, Switch};

/// What one turn takes from a link through shared memory. Who asked for these blocks asks for the next ones
/// when the turn is over: a turn of all that may be under way would leave the node without work
/// meanwhile, and a call costs nothing here that a longer turn would save.
const SHARED_TURN_BYTES: usize = TURN_BYTES / 8;

/// An event without its borrows.
enum Happened {
    Frame(Result<(Header, Message), String>, usize),
    Received(u64, Filled),
    Returned(Option<(u64, Filled)>),
    /// The payload of a request has left.
    Sent(u64),
    Down(DownReason),
    Nothing,
    Pause,
}

impl Session {
    /// Moves what the links can move; whether anything came in.
    pub(super) fn drive(&mut self, now: Moment) -> bool {
        let mut any = false;
        for index in 0..self.slots.len() {
            let mut budget = match &self.slots[index] {
                Slot::Linked(connection) if connection.is_shared() => SHARED_TURN_BYTES,
                _ => TURN_BYTES,
            };
            while let Slot::Linked(connection) = &mut self.slots[index] {
                // What the node has written was not moved here, but it is read here.
                budget = budget.saturating_sub(std::mem::take(&mut connection.placed_bytes));
                let happened = next(connection, &mut budget);
                if matches!(happened, Happened::Pause) {
                    break;
                }
                any = true;
                if let Err(why) = self.on_happened(index, happened, now)
                    && let Slot::Linked(connection) = &mut self.slots[index]
                {
                    let endpoint = &self.config.endpoint;
                    connection.fail(ClientError::Protocol(format!("{endpoint}: {why}")));
                }
            }
        }
        any
    }

    fn on_happened(&mut self, index: usize, happened: Happened, now: Moment) -> Result<(), String> {
        let Slot::Linked(connection) = &mut self.slots[index] else {
            return Ok(());
        };
        match happened {
            Happened::Pause | Happened::Nothing => Ok(()),
            Happened::Frame(Err(why), _) => Err(why),
            Happened::Frame(Ok((header, message)), payload_bytes) => {
                connection.heard = now;
                if connection.is_open() {
                    self.node_lives();
                    self.on_message(index, header.request, message, payload_bytes)
                } else {
                    self.on_handshake(index, message)
                }
            }
            Happened::Received(request, sink) => {
                connection.heard = now;
                received(connection, &mut self.board, request, sink);
                self.node_lives();
                Ok(())
            }
            Happened::Returned(sink) => {
                if let Some((request, sink)) = sink
                    && let Some(was) = connection.receiving.take_if(|r| r.request == request)
                    && let Some(slot) = self.board.get_slot(was.call, was.item)
                {
                    slot.item.into = sink;
                }
                Ok(())
            }
            Happened::Sent(request) => {
                if let Some(Open::Put { call, item }) = connection.open.get(&request) {
                    let (call, item) = (*call, *item);
                    let slot = self.board.put_slot(call, item);
                    if let Some(layers) = slot.and_then(|slot| slot.layers.as_mut()) {
                        layers.is_pushing = false;
                        advance(connection, &mut self.board, call, item);
                    }
                }
                Ok(())
            }
            Happened::Down(reason) => {
                self.link_down(index, &reason, now);
                Ok(())
            }
        }
    }

    fn on_handshake(&mut self, index: usize, message: Message) -> Result<(), String> {
        let Slot::Linked(connection) = &mut self.slots[index] else {
            return Ok(());
        };
        if let Message::Switch(Switch { mode }) = message
            && !matches!(connection.phase, Phase::Connecting(_))
        {
            // The operator switched while the link opens; `opened` tells it on.
            connection.mode = mode;
            return Ok(());
        }
        if matches!(connection.phase, Phase::Attaching(..)) {
            return self.on_attach_answer(index, message);
        }
        let Phase::Connecting(handshake) = &mut connection.phase else {
            return Ok(());
        };
        match handshake.on_message(message) {
            Ok(ClientStep::Send(proof)) => connection
                .send(kvar_wire::LINK_REQUEST, &proof)
                .map_err(|error| error.to_string()),
            Ok(ClientStep::Open(welcome)) => {
                connection.version = handshake.version().unwrap_or(0);
                // An older node knows one mode, the usual one.
                connection.mode = welcome.mode.unwrap_or_default();
                self.attach(index, welcome.limits);
                Ok(())
            }
            Err(error) => {
                connection.fail(ClientError::at(&self.config.endpoint, &error));
                Ok(())
            }
        }
    }

    fn on_message(
        &mut self,
        index: usize,
        request: u64,
        message: Message,
        payload_bytes: usize,
    ) -> Result<(), String> {
        let Slot::Linked(connection) = &mut self.slots[index] else {
            return Ok(());
        };
        let board = &mut self.board;
        match message {
            Message::Pong(_) => {
                release(connection, board, request);
                return Ok(());
            }
            Message::StageAnswer(answer) => return self.on_stage_answer(index, request, answer),
            Message::Switch(Switch { mode }) => {
                connection.mode = mode;
                self.note_mode();
                return Ok(());
            }
            Message::Failure(failure) => {
                connection.fail(said(&self.config.endpoint, &failure));
                return Ok(());
            }
            _ => {}
        }
        let Some(open) = connection.open.get_mut(&request) else {
            connection.link.discard();
            if request >= self.next_number {
                return Err(format!(
                    "the node answers request {request}, which never was"
                ));
            }
            add(&self.counters.late_answers, 1);
            return Ok(());
        };
        match (open, message) {
            (
                Open::Get {
                    call,
                    first,
                    count,
                    left,
                },
                Message::GetAnswer(answer),
            ) => {
                let (call, item) = (*call, *first + usize::from(answer.item));
                if usize::from(answer.item) >= *count || *left == 0 {
                    return Err("the node answers an item that was not asked for".to_owned());
                }
                let is_hit = matches!(answer.outcome, kvar_wire::GetOutcome::Hit { .. });
                let is_placed = matches!(answer.outcome, kvar_wire::GetOutcome::Placed { .. });
                if is_hit == (payload_bytes == 0) {
                    return Err("a hit without its bytes, or bytes without a hit".to_owned());
                }
                // From here on the item is answered, whatever becomes of its bytes.
                *left -= 1;
                let last = *left == 0;
                let Some(slot) = board.get_slot(call, item) else {
                    return Ok(());
                };
                if slot.outcome.is_some() {
                    return Err("the node answers an item twice".to_owned());
                }
                connection.requests_open -= 1;
                connection.bytes_open -= slot.cost;
                slot.cost = 0;
                // Whatever it says, nothing is written to its place any more.
                let was_to_be_placed = std::mem::take(&mut slot.is_placed);
                let id = slot.item.id;
                if last {
                    connection.open.remove(&request);
                }
                if is_placed && !was_to_be_placed {
                    board.end_get(call, item, GetOutcome::Miss(MissReason::Unreachable));
                    return Err("the node placed what it was to send".to_owned());
                }
                match answer.outcome {
                    kvar_wire::GetOutcome::Miss(reason) => {
                        board.end_get(call, item, GetOutcome::Miss(reason));
                        Ok(())
                    }
                    kvar_wire::GetOutcome::Hit {
                        version,
                        first_section,
                        sections,
                    }
                    | kvar_wire::GetOutcome::Placed {
                        version,
                        first_section,
                        sections,
                    } => {
                        let of = Receiving {
                            request,
                            call,
                            item,
                            id,
                            version,
                            first_section,
                            sections,
                        };
                        let done = match is_placed {
                            true => placed(connection, board, &of),
                            false => hit(connection, board, of, payload_bytes),
                        };
                        done.inspect_err(|_| {
                            // It is answered, so the end of the link would pass it over.
                            let lost = GetOutcome::Miss(MissReason::Unreachable);
                            board.end_get(call, item, lost);
                        })
                    }
                }
            }
            (Open::Put { call, item }, Message::Pull(_)) => {
                let (call, item) = (*call, *item);
                let slot = board.put_slot(call, item);
                if let Some(layers) = slot.and_then(|slot| slot.layers.as_mut()) {
                    if std::mem::replace(&mut layers.is_pulled, true) {
                        return Err("the node pulls sections twice".to_owned());
                    }
                    advance(connection, board, call, item);
                    return Ok(());
                }
                let slot = board.put_slot(call, item);
                let Some(source) = slot.and_then(|slot| slot.put.source.take()) else {
                    return Err("the node pulls bytes that it has".to_owned());
                };
                if let Err(source) = connection.push(request, &Payload {}, source) {
                    // The link has more queued than it may: the put ends here, and the node is
                    // told that its bytes will not come.
                    drop(source);
                    connection.forget(request, board);
                    let _ = connection.send(request, &kvar_wire::Cancel {});
                    let busy = PutOutcome::Refused(kvar_base::Refusal::Busy);
                    board.end_put(call, item, busy);
                }
                Ok(())
            }
            (Open::Put { call, item }, Message::PutAnswer(answer)) => {
                let (call, item) = (*call, *item);
                // The node may answer before it has taken all bytes; then they are free now.
                drop(connection.link.fence_push(request));
                connection.forget(request, board);
                board.end_put(call, item, answer.outcome);
                Ok(())
            }
            (
                Open::Small { call, part },
                message @ (Message::LookupAnswer(_)
                | Message::RemoveAnswer(_)
                | Message::FlushAnswer(_)
                | Message::PurgeAnswer(_)
                | Message::LeaseAnswer(_)
                | Message::RenewAnswer(_)
                | Message::ReleaseAnswer(_)
                | Message::StatAnswer(_)
                | Message::StatusAnswer(_)),
            ) => {
                let (call, part) = (*call, *part);
                connection.forget(request, board);
                board.end_small(call, part, Reply::Message(message));
                Ok(())
            }
            (_, message) => Err(format!(
                "the node answers with {:?}, which fits nothing",
                message.kind()
            )),
        }
    }

    /// A link is gone and owns nothing any more: what was open on it ends.
    fn link_down(&mut self, index: usize, reason: &DownReason, now: Moment) {
        let slot = std::mem::replace(&mut self.slots[index], Slot::empty());
        let Slot::Linked(mut connection) = slot else {
            return;
        };
        // The socket closes with the link; an error here has no consequence.
        let _ = connection.link.deregister(self.poll.registry());
        let was_open = matches!(connection.phase, Phase::Open(_));
        if was_open {
            self.counters.link_closed(connection.is_shared());
        }
        if connection.region.take().is_some() {
            // The node may write there until it has seen the link's end, so nobody gets it again.
            self.counters.stock.close();
            let why = "the link broke, and its staging region went with it".to_owned();
            self.counters.say_not_staged(Some(why));
        }
        let held = std::mem::take(&mut connection.held);
        subtract(&self.counters.staging_held, held.len());
        held.into_iter().for_each(|(_, staging)| staging.give_up());
        let error = connection.fault.take().unwrap_or_else(|| {
            ClientError::Unreachable(format!("{}: {reason}", self.config.endpoint))
        });
        for (request, open) in connection.open {
            self.board.owe_again(request);
            let placed = take_placed(&mut self.board, &open);
            placed.into_iter().for_each(Staging::give_up);
            end_open(&mut self.board, &open);
        }
        if was_open {
            add(&self.counters.links_lost, 1);
            self.board.last_error = Some(error);
            // Another link takes its place now, not when something is asked: see `keep_links`.
            self.relink |= self.counters.mode.get() != Mode::default();
            self.note_mode();
        } else if connection.goes_plain {
            self.relink = true;
        } else {
            self.connect_failed(index, now, error);
        }
    }
}

fn next(connection: &mut Connection, budget: &mut usize) -> Happened {
    match connection.link.poll(budget) {
        Event::Frame {
            header,
            message,
            payload_bytes,
        } => {
            let parsed = Header::decode(header)
                .and_then(|header| Ok((header, kvar_wire::decode(&header, message)?)))
                .map_err(|error| error.to_string());
            Happened::Frame(parsed, payload_bytes)
        }
        Event::Received { token, sink } => Happened::Received(token, sink),
        Event::Returned(Owned::Sink { token, sink }) => Happened::Returned(Some((token, sink))),
        Event::Returned(Owned::Source { .. }) => Happened::Returned(None),
        Event::Down(reason) => Happened::Down(reason),
        Event::Sent { token, .. } => Happened::Sent(token),
        Event::Up => Happened::Nothing,
        Event::Yield | Event::Idle => Happened::Pause,
    }
}

/// A node's last words on an open link.
pub(super) fn said(endpoint: &str, failure: &Failure) -> ClientError {
    let text = format!("{endpoint}: {}", failure.text);
    match failure.code {
        FailureCode::Busy | FailureCode::ShuttingDown => ClientError::Busy(text),
        FailureCode::Version => ClientError::Version(text),
        FailureCode::Namespace => ClientError::Namespace(text),
        FailureCode::Key => ClientError::WrongKey(text),
        FailureCode::Protocol => ClientError::Protocol(text),
    }
}

/// A hit's bytes are next on the link: gives them a place, or has them drained.
fn hit(
    connection: &mut Connection,
    board: &mut Board,
    of: Receiving,
    payload_bytes: usize,
) -> Result<(), String> {
    let (call, item) = (of.call, of.item);
    let sent = of.bytes();
    if sent != payload_bytes as u64 {
        return Err(format!(
            "sections of {sent} bytes in a payload of {payload_bytes}"
        ));
    }
    let Some(slot) = board.get_slot(call, item) else {
        return Ok(());
    };
    let mut miss = of.judge(&slot.item)?;
    if let Filled::Bytes(bytes) = &mut slot.item.into
        && miss.is_none()
    {
        bytes.resize(payload_bytes, 0);
    }
    if Sink::len(&slot.item.into) != payload_bytes {
        miss = miss.or(Some(MissReason::WrongFormat));
    }
    if let Some(reason) = miss {
        connection.link.discard();
        board.end_get(call, item, GetOutcome::Miss(reason));
        return Ok(());
    }
    let into = std::mem::replace(&mut slot.item.into, Filled::NOWHERE);
    let request = of.request;
    connection
        .link
        .pull(request, into)
        .map_err(|_| "a payload that is not there".to_owned())?;
    // While its bytes are on their way the item is found by its request again, for the deadline.
    connection.open.entry(request).or_insert(Open::Get {
        call,
        first: item,
        count: 0,
        left: 0,
    });
    connection.receiving = Some(of);
    Ok(())
}

/// A hit's bytes are all there: the caller may see them if they are what the writer wrote.
fn received(connection: &mut Connection, board: &mut Board, request: u64, mut sink: Filled) {
    let Some(of) = connection.receiving.take_if(|of| of.request == request) else {
        return;
    };
    if matches!(
        connection.open.get(&request),
        Some(Open::Get { left: 0, .. })
    ) {
        connection.open.remove(&request);
    }
    let outcome = of.verify(board, &mut sink);
    if let Some(slot) = board.get_slot(of.call, of.item) {
        slot.item.into = sink;
    }
    board.end_get(of.call, of.item, outcome);
}

/// A hit's bytes are where they were wanted: the caller may see them if they are what the writer wrote.
fn placed(connection: &mut Connection, board: &mut Board, of: &Receiving) -> Result<(), String> {
    let (call, item) = (of.call, of.item);
    let Some(slot) = board.get_slot(call, item) else {
        return Ok(());
    };
    let room = Sink::len(&slot.item.into) as u64;
    if of.bytes() != room {
        let placed = of.bytes();
        return Err(format!(
            "the node placed {placed} bytes in a place of {room}"
        ));
    }
    let outcome = match of.judge(&slot.item)? {
        Some(reason) => GetOutcome::Miss(reason),
        None => {
            let mut into = std::mem::replace(&mut slot.item.into, Filled::NOWHERE);
            let outcome = of.verify(board, &mut into);
            connection.placed_bytes += Sink::len(&into);
            if let Some(slot) = board.get_slot(call, item) {
                slot.item.into = into;
            }
            outcome
        }
    };
    if matches!(outcome, GetOutcome::Hit { .. }) {
        add(&board.counters.hits_placed, 1);
    }
    board.end_get(call, item, outcome);
    Ok(())
}

impl Receiving {
    fn bytes(&self) -> u64 {
        let lengths = self.sections.iter().map(|section| u64::from(section.len));
        lengths.sum()
    }

    /// Why an item is not what was asked for, if so; an error is a node that answers something else.
    fn judge(&self, item: &GetItem) -> Result<Option<MissReason>, String> {
        let wanted = item.sections.clone();
        let first = wanted.as_ref().map_or(0, |range| range.start);
        let count = wanted.map(|range| range.len());
        if self.first_section != first || count.is_some_and(|count| count != self.sections.len()) {
            return Err("the node sends other sections than were asked for".to_owned());
        }
        let lengths = self.sections.iter().map(|section| section.len);
        if !item.expected.fit(lengths) {
            return Ok(Some(MissReason::WrongFormat));
        }
        let other = item.version.is_some_and(|version| version != self.version);
        Ok(other.then_some(MissReason::Version))
    }

    /// Whether the bytes are what the writer wrote.
    fn verify(&self, board: &Board, sink: &mut Filled) -> GetOutcome {
        let lengths: Vec<u32> = self.sections.iter().map(|section| section.len).collect();
        let mut checks = SectionChecks::new(&self.id, self.first_section, &lengths);
        sink.visit_mut(&mut |piece| checks.feed(piece));
        let expected = self.sections.iter().map(|section| section.check);
        if !checks.finish().into_iter().eq(expected) {
            add(&board.counters.checks_failed, 1);
            return GetOutcome::Miss(MissReason::Corrupt);
        }
        let (version, first_section) = (self.version, self.first_section);
        GetOutcome::Hit {
            version,
            first_section,
            lengths,
        }
    }
}

/// Takes the memory of a request's items to which the node may write; who asked for them is told that
/// it is held.
pub(super) fn take_placed(board: &mut Board, open: &Open) -> Vec<Staging> {
    let Open::Get {
        call, first, count, ..
    } = *open
    else {
        return Vec::new();
    };
    let mut taken = Vec::new();
    for item in first..first + count {
        let Some(slot) = board.get_slot(call, item) else {
            continue;
        };
        if !std::mem::take(&mut slot.is_placed) {
            continue;
        }
        match std::mem::replace(&mut slot.item.into, Filled::Held) {
            Filled::Staged(staging) => taken.push(staging),
            other => slot.item.into = other,
        }
    }
    taken
}

/// The node has answered a Ping: what was given up before that was sent it does not write any more.
fn release(connection: &mut Connection, board: &Board, ping: u64) {
    let before = connection.held.len();
    connection.held.retain(|(fence, _)| *fence > ping);
    subtract(&board.counters.staging_held, before - connection.held.len());
}

fn end_open(board: &mut Board, open: &Open) {
    let lost = Lost::Unreachable;
    match *open {
        Open::Small { call, part } => board.end_small(call, part, Reply::Lost(lost)),
        Open::Get {
            call, first, count, ..
        } => {
            // `count` is 0 where only the bytes of the first were still on their way.
            for item in first..first + count.max(1) {
                board.end_get(call, item, GetOutcome::Miss(lost.miss()));
            }
        }
        Open::Put { call, item } => {
            board.end_put(call, item, PutOutcome::Refused(lost.refusal()));
        }
    }
}

impl Connection {
    /// A request is over: its part of the window is free.
    pub(super) fn forget(&mut self, request: u64, board: &mut Board) {
        match self.open.remove(&request) {
            Some(Open::Small { .. }) => {
                self.requests_open -= 1;
                board.paying.remove(&request);
            }
            Some(Open::Put { call, item }) => {
                self.requests_open -= 1;
                match board.put_slot(call, item) {
                    Some(slot) if slot.layers.is_some() => {
                        self.announced_requests -= 1;
                        self.announced_open -= slot.put.bytes;
                    }
                    Some(slot) => self.bytes_open -= slot.put.bytes,
                    None => {}
                }
            }
            Some(Open::Get {
                call,
                first,
                count,
                left,
            }) => {
                self.requests_open -= left as u64;
                for item in first..first + count {
                    if let Some(slot) = board.get_slot(call, item) {
                        self.bytes_open -= std::mem::take(&mut slot.cost);
                    }
                }
            }
            None => {}
        }
    }
}
