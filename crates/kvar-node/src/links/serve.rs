//! What each request makes a link ask, and each answer makes it say.

use super::conversation::{Conversation, Incoming, abort, may_be_below};
use super::desk::{Desk, LINK_TIMER, Operation, To};
use super::filling::Filling;
use super::request::{
    AboutLease, Below, Finish, Get, Item, ItemState, Kind, Lookup, Open, Put, PutState, Stat, Which,
};
use crate::config::DeviceTier;
use crate::devices::{Note, Removed, Routes};
use crate::mail::{Answer, Ask};
use crate::report::ThreadReport;
use kvar_base::{BlockId, MissReason, PutOutcome, Refusal};
use kvar_engine::{BlockStat, PutHints, PutRequest, Tenant, Tier};
use kvar_transport::Link as _;
use kvar_wire::{
    Bitmap, Finished, FlushAnswer, GetAnswer, GetOutcome, LeaseAnswer, LookupAnswer, Message, Pong,
    PurgeAnswer, RemoveAnswer, StatAnswer,
};

impl Conversation {
    /// Takes a request of a client that has proved itself.
    pub(super) fn on_request(
        &mut self,
        desk: &mut Desk,
        request: u64,
        message: Message,
        payload_bytes: usize,
    ) {
        let begins = matches!(
            message,
            Message::Lookup(_)
                | Message::Get(_)
                | Message::Put(_)
                | Message::Remove(_)
                | Message::Flush(_)
                | Message::Purge(_)
                | Message::Stat(_)
                | Message::Status(_)
                | Message::Lease(_)
                | Message::Renew(_)
                | Message::Release(_)
        );
        if begins && (request == LINK_TIMER || self.open.contains_key(&request)) {
            let text = format!(
                "request number {request} is the link's own or open already; numbers are unique \
                 while open"
            );
            return self.protocol(desk, &text);
        }
        match message {
            Message::Lookup(lookup) => self.on_lookup(desk, request, &lookup),
            Message::Get(get) => self.on_get(desk, request, get),
            Message::Put(put) => self.on_put(desk, request, &put, payload_bytes),
            Message::Payload(_) => self.on_payload(desk, request, payload_bytes),
            Message::Remove(remove) => {
                desk.counters.removes += 1;
                self.on_finish(
                    desk,
                    request,
                    Which::Remove,
                    remove.deadline_us,
                    &remove.ids,
                );
            }
            Message::Flush(flush) => {
                desk.counters.flushes += 1;
                self.on_finish(desk, request, Which::Flush, flush.deadline_us, &[]);
            }
            Message::Purge(purge) => {
                desk.counters.purges += 1;
                self.on_finish(desk, request, Which::Purge, purge.deadline_us, &[]);
            }
            Message::Lease(lease) => self.on_lease(desk, request, lease),
            Message::Renew(renew) => {
                let kvar_wire::Renew {
                    token,
                    ttl_ms,
                    deadline_us,
                } = renew;
                let about = AboutLease::Renew { token, ttl_ms };
                self.on_about_lease(desk, request, about, deadline_us);
            }
            Message::Release(release) => {
                let token = release.token;
                let about = AboutLease::Release { token };
                self.on_about_lease(desk, request, about, release.deadline_us);
            }
            Message::Stat(stat) => self.on_stat(desk, request, stat),
            Message::Status(_) => self.on_status(desk, request),
            Message::Cancel(_) => {
                desk.counters.cancels += 1;
                self.cut_short(desk, request, false);
            }
            Message::Ping(_) => self.send(desk, request, &Pong {}),
            Message::Attach(attach) => self.on_attach(desk, request, &attach),
            Message::Failure(failure) => {
                tracing::warn!(peer = %self.peer, "the client ends its link: {}", failure.text);
                self.end_requests(desk);
                self.link.close();
            }
            other => {
                let text = format!("a node takes no {:?} from a client", other.kind());
                self.protocol(desk, &text);
            }
        }
    }

    pub(super) fn is_full(&self, desk: &Desk, more: usize) -> bool {
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        self.open_weight.saturating_add(more) > desk.settings.limits.requests_max
    }

    // ---- lookup -----------------------------------------------------------------------------

    fn on_lookup(&mut self, desk: &mut Desk, request: u64, lookup: &kvar_wire::Lookup) {
        desk.counters.lookups += 1;
        desk.counters.lookup_ids += lookup.ids.len() as u64;
        let miss = match () {
            () if lookup.deadline_us == 0 => Some(MissReason::Deadline),
            () if self.is_full(desk, 1) => Some(MissReason::Overloaded),
            () => None,
        };
        if let Some(reason) = miss {
            return self.send(desk, request, &LookupAnswer::Miss(reason));
        }
        let touch_request = touch_request(desk, self.tenant, lookup.touch_request);
        let (parts, positions) = split(&lookup.ids, &desk.routes);
        let below = desk.routes.has_lower().then(|| Below {
            ids: lookup.ids.clone(),
            routes: desk.routes.clone(),
        });
        let kind = Kind::Lookup(Lookup {
            leading_only: lookup.leading_only,
            left: parts.len() as u32,
            present: vec![false; lookup.ids.len()],
            positions,
            touch_request,
            below,
        });
        if parts.is_empty() {
            let answer = leading_or_each(lookup.leading_only, &[]);
            return self.send(desk, request, &answer);
        }
        let Some(operation) = self.open(desk, request, Some(lookup.deadline_us), kind) else {
            return;
        };
        for (part, ids) in parts {
            let ask = Ask::Lookup { ids, touch_request };
            let to = match desk.routes.engines().get(part as usize) {
                Some(engine) => To::Engine(*engine, ask),
                None => To::Nobody(ask),
            };
            desk.ask(to, Operation { part, ..operation });
        }
    }

    fn on_looked_up(&mut self, desk: &mut Desk, request: u64, part: u32, found: Vec<bool>) {
        let Some(Open {
            kind: Kind::Lookup(lookup),
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        match lookup.positions.get(part as usize) {
            None => lookup.present = found,
            Some(positions) => {
                for (position, present) in positions.iter().zip(found) {
                    lookup.present[*position as usize] = present;
                }
            }
        }
        lookup.left -= 1;
        if lookup.left == 0 && !self.look_below(desk, request) {
            let Some(Open {
                kind: Kind::Lookup(lookup),
                ..
            }) = self.open.get(&request)
            else {
                return;
            };
            let answer = leading_or_each(lookup.leading_only, &lookup.present);
            self.close(desk, request);
            self.send(desk, request, &answer);
        }
    }

    /// Asks the tier below for what the one above lacks; whether there is anything to ask.
    fn look_below(&mut self, desk: &mut Desk, request: u64) -> bool {
        let link = self.key;
        let Some(Open {
            opening,
            kind: Kind::Lookup(lookup),
            ..
        }) = self.open.get_mut(&request)
        else {
            return false;
        };
        let Some(Below { ids, routes }) = lookup.below.take() else {
            return false;
        };
        let lacking = (0..).zip(&ids).zip(&lookup.present);
        let lacking = lacking.filter(|(_, present)| !**present).map(|(id, _)| id);
        let parts = split_below(lacking, &routes, &mut lookup.positions);
        lookup.left = parts.len() as u32;
        let (opening, touch_request) = (*opening, lookup.touch_request);
        let asks_any = !parts.is_empty();
        for (part, ids) in parts {
            let operation = Operation {
                link,
                request,
                opening,
                part,
            };
            let ask = Ask::Lookup { ids, touch_request };
            desk.ask(To::Engine(routes.engines()[part as usize], ask), operation);
        }
        asks_any
    }

    // ---- get --------------------------------------------------------------------------------

    fn on_get(&mut self, desk: &mut Desk, request: u64, get: kvar_wire::Get) {
        let miss = match () {
            () if get.deadline_us == 0 => Some(MissReason::Deadline),
            () if self.is_full(desk, get.items.len()) => Some(MissReason::Overloaded),
            () => None,
        };
        if let Some(reason) = miss {
            for item in 0..get.items.len() {
                desk.counters.get_misses.add(reason);
                desk.of_namespace[self.tenant.index()].misses += 1;
                let outcome = GetOutcome::Miss(reason);
                self.send(
                    desk,
                    request,
                    &GetAnswer {
                        item: item as u16,
                        outcome,
                    },
                );
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
        });
        if let Some(operation) = self.open(desk, request, Some(get.deadline_us), kind) {
            self.line_up(request, operation.opening, count);
            self.start_gets(desk);
        }
    }

    // ---- put --------------------------------------------------------------------------------

    fn on_put(&mut self, desk: &mut Desk, request: u64, put: &kvar_wire::Put, at_the_door: usize) {
        let (payload_bytes, limits) = (put.payload_bytes(), desk.settings.limits);
        let eager = at_the_door > 0;
        if at_the_door > limits.eager_bytes_max as usize {
            let text = format!(
                "a put of {at_the_door} bytes came unannounced; more than {} are announced first",
                limits.eager_bytes_max
            );
            return self.protocol(desk, &text);
        }
        let refusal = match () {
            () if put.deadline_us == 0 => Some(Refusal::Deadline),
            () if payload_bytes > u64::from(limits.block_bytes_max) => Some(Refusal::TooBig),
            () if eager && at_the_door as u64 != payload_bytes => Some(Refusal::WrongFormat),
            () if payload_bytes == 0 => Some(Refusal::WrongFormat),
            () if self.is_full(desk, 1) => Some(Refusal::Busy),
            () if self.announced_bytes + payload_bytes > limits.bytes_max => Some(Refusal::Busy),
            () => None,
        };
        if let Some(refusal) = refusal {
            if eager {
                self.link.discard();
            }
            let outcome = PutOutcome::Refused(refusal);
            desk.counters.puts.add(outcome);
            return self.send(desk, request, &kvar_wire::PutAnswer { outcome });
        }
        let kind = Kind::Put(Put {
            payload_bytes,
            state: PutState::Beginning { eager },
        });
        self.announced_bytes += payload_bytes;
        let Some(operation) = self.open(desk, request, Some(put.deadline_us), kind) else {
            return;
        };
        if eager {
            self.incoming = Incoming::AtTheDoor { request };
        }
        let hints = PutHints {
            request: touch_request(desk, self.tenant, put.hints.request),
            tenant: self.tenant,
            ..engine_hints(put.hints)
        };
        let sections = put
            .sections
            .iter()
            .map(|section| (section.len, section.check))
            .collect();
        let (id, durable) = (put.id, put.durable);
        let deadline = desk.deadline(put.deadline_us);
        let ask = Ask::PutBegin(PutRequest {
            id,
            sections,
            hints,
            durable,
            deadline,
        });
        desk.ask_owner(&id, operation, ask);
    }

    /// The payload of an announced put.
    fn on_payload(&mut self, desk: &mut Desk, request: u64, payload_bytes: usize) {
        if payload_bytes == 0 {
            return self.protocol(desk, "a payload frame without payload");
        }
        let put = match self.open.get_mut(&request) {
            Some(Open {
                kind: Kind::Put(put),
                ..
            }) => put,
            Some(_) => return self.protocol(desk, "a payload for a request that is no put"),
            // Its put has ended meanwhile (deadline, cancel): drained.
            None => return self.link.discard(),
        };
        if put.payload_bytes != payload_bytes as u64 {
            let text = format!(
                "a put announced {} bytes and sent {payload_bytes}",
                put.payload_bytes
            );
            return self.protocol(desk, &text);
        }
        match std::mem::replace(&mut put.state, PutState::Committing) {
            PutState::Pulling(ticket) => {
                let token = desk.number();
                match self.link.pull(token, Filling(ticket)) {
                    Ok(()) => {
                        put.state = PutState::Receiving(token);
                        self.incoming = Incoming::Filling { request, token };
                    }
                    // The link went down meanwhile; it ends its requests by itself.
                    Err(refused) => abort(desk, Some(refused.sink.0)),
                }
            }
            state => {
                put.state = state;
                self.protocol(desk, "a payload that nobody asked for; wait for Pull");
            }
        }
    }

    // ---- remove, flush, purge ---------------------------------------------------------------

    fn on_finish(
        &mut self,
        desk: &mut Desk,
        request: u64,
        which: Which,
        left_us: u64,
        ids: &[BlockId],
    ) {
        let finished = match () {
            () if left_us == 0 => Some(Finished::Deadline),
            () if self.is_full(desk, 1) => Some(Finished::Overloaded),
            () if which == Which::Remove && ids.is_empty() => Some(Finished::Done(0)),
            () => None,
        };
        if let Some(finished) = finished {
            return self.send_finished(desk, request, which, finished);
        }
        let routes = desk.routes.clone();
        let asks_of = |tiers: &[DeviceTier]| -> Vec<To> {
            let is_meant = |part: &usize| tiers.contains(&routes.tier_of_part(*part));
            let engines = || (0..routes.engines().len()).filter(is_meant);
            let each = |ask: &dyn Fn() -> Ask| -> Vec<(usize, Ask)> {
                engines().map(|at| (at, ask())).collect()
            };
            let asks: Vec<(usize, Ask)> = match which {
                Which::Remove => removals(ids, &routes, &is_meant),
                Which::Flush => each(&|| Ask::Flush),
                Which::Purge => each(&|| Ask::Purge(Some(self.tenant))),
            };
            let asks = asks.into_iter();
            asks.map(|(at, ask)| To::Engine(routes.engines()[at], ask))
                .collect()
        };
        // What is on its way down must not outlive its removal: see docs/internals/tiers.md.
        let (fast, big) = (asks_of(&[DeviceTier::Fast]), asks_of(&[DeviceTier::Big]));
        let in_turn = which != Which::Flush && !fast.is_empty() && !big.is_empty();
        let (mut asks, mut then) = match in_turn {
            // Blocks of a device that leaves may move from the one tier to the other, either way.
            true if routes.note_removals => (fast, asks_of(&DeviceTier::ALL)),
            true => (fast, big),
            false => (asks_of(&DeviceTier::ALL), Vec::new()),
        };
        if asks.is_empty() {
            asks.push(To::Nobody(Ask::Flush));
        }
        // What goes while a device is away must not come back with it, nor by a move.
        let is_noted = routes.note_removals && which != Which::Flush;
        let removal = is_noted.then(|| match which {
            Which::Remove => Removed::blocks(ids),
            Which::Flush | Which::Purge => Removed::All(self.tenant),
        });
        let removal = removal.map(|removed| desk.begin_removal(removed));
        if is_noted {
            let last = if in_turn { &mut then } else { &mut asks };
            last.push(To::Keeper(Note::Removal));
        }
        let left = asks.len() as u32;
        let kind = Kind::Finish(Finish {
            which,
            left,
            then,
            count: 0,
            failure: None,
            routes,
            removal,
        });
        if let Some(operation) = self.open(desk, request, Some(left_us), kind) {
            asks.into_iter().for_each(|to| desk.ask(to, operation));
        }
    }

    fn on_done(&mut self, desk: &mut Desk, request: u64, result: Result<u64, String>) {
        let Some(Open {
            kind: Kind::Finish(finish),
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        match result {
            Ok(count) => finish.count += count,
            Err(failure) => finish.failure = Some(failure),
        }
        finish.left -= 1;
        if finish.left > 0 {
            return;
        }
        let then = std::mem::take(&mut finish.then);
        if !then.is_empty() && finish.failure.is_none() {
            finish.left = then.len() as u32;
            return self.ask_all(desk, request, then);
        }
        let which = finish.which;
        drop(finish.removal.take());
        let finished = match finish.failure.take() {
            // A device that came in meanwhile was not asked.
            None if which != Which::Flush && !finish.routes.is_latest() => {
                Finished::Failed("the node's devices changed meanwhile; try again".to_owned())
            }
            None => Finished::Done(finish.count),
            Some(text) => Finished::Failed(cut(text, kvar_wire::TEXT_BYTES_MAX)),
        };
        self.close(desk, request);
        self.send_finished(desk, request, which, finished);
    }

    /// Goes on with a request.
    fn ask_all(&mut self, desk: &mut Desk, request: u64, asks: Vec<To>) {
        let Some(open) = self.open.get(&request) else {
            return;
        };
        let operation = Operation {
            link: self.key,
            request,
            opening: open.opening,
            part: 0,
        };
        asks.into_iter().for_each(|to| desk.ask(to, operation));
    }

    fn send_finished(&mut self, desk: &mut Desk, request: u64, which: Which, finished: Finished) {
        match which {
            Which::Remove => self.send(desk, request, &RemoveAnswer { finished }),
            Which::Flush => self.send(desk, request, &FlushAnswer { finished }),
            Which::Purge => self.send(desk, request, &PurgeAnswer { finished }),
        }
    }

    // ---- stat and status --------------------------------------------------------------------

    fn on_stat(&mut self, desk: &mut Desk, request: u64, stat: kvar_wire::Stat) {
        let reason = match () {
            () if stat.deadline_us == 0 => Some(MissReason::Deadline),
            () if self.is_full(desk, 1) => Some(MissReason::Overloaded),
            () => None,
        };
        if let Some(reason) = reason {
            return self.send(desk, request, &StatAnswer { stat: Err(reason) });
        }
        let (id, above) = (stat.id, None);
        let kind = Kind::Stat(Stat { id, above });
        if let Some(operation) = self.open(desk, request, Some(stat.deadline_us), kind) {
            desk.ask_owner(&id, operation, Ask::Stat(id));
        }
    }

    fn on_stat_answer(
        &mut self,
        desk: &mut Desk,
        operation: Operation,
        answer: Result<BlockStat, MissReason>,
    ) {
        let Some(Open {
            kind: Kind::Stat(stat),
            ..
        }) = self.open.get_mut(&operation.request)
        else {
            return;
        };
        let below = desk.routes.lower_owner(&stat.id);
        let answer = match (answer, stat.above, below) {
            (Err(reason), None, Some(engine)) if may_be_below(reason) => {
                stat.above = Some(reason);
                return desk.ask(To::Engine(engine, Ask::Stat(stat.id)), operation);
            }
            (Err(MissReason::Absent), Some(above), _) => Err(above),
            (answer, ..) => answer,
        };
        self.close(desk, operation.request);
        let stat = answer.map(describe);
        self.send(desk, operation.request, &StatAnswer { stat });
    }

    fn on_status(&mut self, desk: &mut Desk, request: u64) {
        let kind = Kind::Status {
            left: desk.threads,
            reports: Vec::new(),
        };
        if let Some(operation) = self.open(desk, request, None, kind) {
            for thread in 0..desk.threads {
                desk.ask(To::Thread(thread), operation);
            }
        }
    }

    fn on_report(&mut self, desk: &mut Desk, request: u64, report: ThreadReport) {
        let Some(Open {
            kind: Kind::Status { left, reports },
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        reports.push(report);
        *left -= 1;
        if *left > 0 {
            return;
        }
        let reports = std::mem::take(reports);
        self.close(desk, request);
        let json = cut(
            desk.settings.describe.json(reports),
            kvar_wire::STATUS_BYTES_MAX,
        );
        self.send(desk, request, &kvar_wire::StatusAnswer { json });
    }

    // ---- answers ----------------------------------------------------------------------------

    /// Takes an owner's answer to an operation of this link.
    pub(super) fn on_answer(&mut self, desk: &mut Desk, operation: Operation, answer: Answer) {
        let Operation {
            request,
            opening,
            part,
            ..
        } = operation;
        if self
            .open
            .get(&request)
            .is_none_or(|open| open.opening != opening)
        {
            return orphan(desk, answer);
        }
        match answer {
            Answer::Lookup(found) => self.on_looked_up(desk, request, part, found),
            Answer::Leased(grant) => self.on_leased(desk, request, part, &grant),
            Answer::AboutLease(until) => self.on_about_leased(desk, request, until),
            Answer::Get(outcome) => self.on_got(desk, request, part, outcome),
            Answer::PutBegun(begun) => self.on_put_begun(desk, request, begun),
            Answer::Put(outcome) => self.answer_put(desk, request, outcome),
            Answer::Done(result) => self.on_done(desk, request, result),
            Answer::Stat(stat) => self.on_stat_answer(desk, operation, stat),
            Answer::Taken(_) => debug_assert!(false, "no link offers a block"),
            Answer::Report(report) => self.on_report(desk, request, *report),
        }
    }

    /// Says that a request's deadline has passed, for those that answer once.
    pub(super) fn answer_deadline(&mut self, desk: &mut Desk, request: u64, kind: &Kind) {
        match kind {
            Kind::Lookup(_) => {
                self.send(desk, request, &LookupAnswer::Miss(MissReason::Deadline));
            }
            Kind::Finish(finish) => {
                self.send_finished(desk, request, finish.which, Finished::Deadline);
            }
            Kind::Lease(_) => {
                let answer = LeaseAnswer {
                    leading: 0,
                    reason: Some(MissReason::Deadline),
                    lasts_ms: 0,
                };
                self.send(desk, request, &answer);
            }
            Kind::AboutLease { about, .. } => self.send_about_lease(desk, request, *about, None),
            Kind::Stat(_) => {
                self.send(
                    desk,
                    request,
                    &StatAnswer {
                        stat: Err(MissReason::Deadline),
                    },
                );
            }
            Kind::Status { .. } | Kind::Get(_) | Kind::Put(_) => {}
        }
    }
}

/// An answer that nobody waits for any more; a ticket in it goes back to its owner.
pub(super) fn orphan(desk: &mut Desk, answer: Answer) {
    if let Answer::PutBegun(Ok(ticket)) = answer {
        abort(desk, Some(ticket));
    }
}

/// Zero means that the client leaves recency to the node: every call is a prompt of its own, under a
/// number that no client of ours chooses.
pub(super) fn touch_request(desk: &Desk, tenant: Tenant, given: u64) -> u64 {
    if given == 0 {
        1 << 63 | desk.now.0
    } else {
        // What one namespace calls a request is not what another calls so.
        given ^ u64::from(tenant.number()) << 56
    }
}

/// Every hint of the wire is one of the engine; each side's compiler asks about a new one.
fn engine_hints(hints: kvar_wire::PutHints) -> PutHints {
    let kvar_wire::PutHints {
        depth,
        request,
        ttl_s,
        ephemeral,
        traffic_class,
        recompute_us,
        handover,
    } = hints;
    PutHints {
        request,
        depth,
        ephemeral,
        ttl_s,
        class: traffic_class,
        recompute_us,
        handover,
        is_asked: false,
        tenant: Tenant::DEFAULT,
        moved: None,
    }
}

/// Ids by owner, and where each stood; with one owner in all, no positions.
pub(super) type Parts = (Vec<(u32, Vec<BlockId>)>, Vec<Vec<u32>>);

pub(super) fn split(ids: &[BlockId], routes: &Routes) -> Parts {
    if ids.is_empty() {
        return (Vec::new(), Vec::new());
    }
    let engines = routes.engines().len();
    if engines <= 1 {
        return (vec![(0, ids.to_vec())], Vec::new());
    }
    let mut parts: Vec<Vec<BlockId>> = vec![Vec::new(); engines];
    let mut positions: Vec<Vec<u32>> = vec![Vec::new(); engines];
    for (position, id) in ids.iter().enumerate() {
        if let Some(part) = routes.owner_part(id) {
            parts[part].push(*id);
            positions[part].push(position as u32);
        }
    }
    let parts = (0..)
        .zip(parts)
        .filter(|(_, ids)| !ids.is_empty())
        .collect();
    (parts, positions)
}

/// What the tier below is asked for, by its engines; where the ids stand is noted.
pub(super) fn split_below<'a>(
    lacking: impl Iterator<Item = (u32, &'a BlockId)>,
    routes: &Routes,
    positions: &mut Vec<Vec<u32>>,
) -> Vec<(u32, Vec<BlockId>)> {
    let mut parts: Vec<(u32, Vec<BlockId>)> = Vec::new();
    for (position, id) in lacking {
        let Some(part) = routes.lower_part(id) else {
            continue;
        };
        if positions.len() < routes.engines().len() {
            positions.resize(routes.engines().len(), Vec::new());
        }
        positions[part].push(position);
        match parts.iter_mut().find(|(known, _)| *known as usize == part) {
            Some((_, ids)) => ids.push(*id),
            None => parts.push((part as u32, vec![*id])),
        }
    }
    parts
}

/// A remove goes to every device: a block may have been put elsewhere while its owner was away, and
/// must not come back when its owner goes again.
fn removals(
    ids: &[BlockId],
    routes: &Routes,
    is_meant: &dyn Fn(&usize) -> bool,
) -> Vec<(usize, Ask)> {
    let mut parts: Vec<Vec<BlockId>> = vec![Vec::new(); routes.engines().len()];
    for id in ids {
        for part in routes.holder_parts(id).filter(is_meant) {
            parts[part].push(*id);
        }
    }
    parts
        .into_iter()
        .enumerate()
        .filter(|(_, ids)| !ids.is_empty())
        .map(|(part, ids)| (part, Ask::Remove(ids)))
        .collect()
}

fn leading_or_each(leading_only: bool, present: &[bool]) -> LookupAnswer {
    if !leading_only {
        return LookupAnswer::Each(Bitmap::of(present));
    }
    let leading = present.iter().take_while(|present| **present).count();
    let reason = (leading < present.len()).then_some(MissReason::Absent);
    LookupAnswer::Leading(leading as u32, reason)
}

fn describe(stat: BlockStat) -> kvar_wire::BlockStat {
    kvar_wire::BlockStat {
        bytes: stat.stored_bytes,
        sections: None,
        version: stat.version,
        in_dram: stat.tier != Tier::Flash,
        on_flash: stat.tier != Tier::Dram,
        flushed: stat.flushed,
        age_s: None,
        expires_unix_s: stat.expires_unix_s,
    }
}

/// A text of at most so many bytes.
fn cut(mut text: String, bytes_max: usize) -> String {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
