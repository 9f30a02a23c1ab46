//! Puts that come section by section: announced, filled as the writer computes, visible at the commit.
//!
//! ```text
//!   Announce ── refused, there already ──> PutAnswer
//!      └─ Pull ──> Sections 0.. ──> Sections k.. ──> ... ──> Commit ──> verified ──> PutAnswer
//!                      └── Cancel, deadline, the link is lost: aborted, the block is absent
//! ```
//!
//! What must always be true: sections come in their order, each once, into the owner's memory where
//! they will be stored; nothing of the block is visible before the owner has verified all of it; the
//! announced bytes count towards the link's window from the first word to the answer.
//!
//! Left to others: what an announced put is while nothing comes (`conversation`), and the block (the
//! engine).

use super::conversation::{Conversation, Incoming, abort};
use super::desk::{Desk, Operation, To};
use super::filling::Filling;
use super::put::engine_hints;
use super::request::{Kind, Open, Put, PutState};
use super::serve::touch_request;
use crate::mail::{Ask, Ticket};
use kvar_base::{ContentCheck, PutOutcome, Refusal};
use kvar_engine::{PutHints, PutRequest};
use kvar_transport::Link as _;
use kvar_wire::{Announce, PutAnswer, Sections};

impl Conversation {
    /// A block is coming, section by section.
    pub(super) fn on_announce(&mut self, desk: &mut Desk, request: u64, announce: &Announce) {
        let (payload_bytes, limits) = (announce.payload_bytes(), desk.settings.limits);
        let refusal = match () {
            () if announce.deadline_us == 0 => Some(Refusal::Deadline),
            () if payload_bytes > u64::from(limits.block_bytes_max) => Some(Refusal::TooBig),
            () if payload_bytes == 0 => Some(Refusal::WrongFormat),
            () if self.is_full(desk, 1) => Some(Refusal::Busy),
            () if self.announced_bytes + payload_bytes > limits.bytes_max => Some(Refusal::Busy),
            () => None,
        };
        if let Some(refusal) = refusal {
            let outcome = PutOutcome::Refused(refusal);
            desk.counters.puts.add(outcome);
            return self.send(desk, request, &PutAnswer { outcome });
        }
        let kind = Kind::Put(Put {
            payload_bytes,
            state: PutState::Beginning { eager: false },
            next_section: Some(0),
        });
        self.announced_bytes += payload_bytes;
        let Some(operation) = self.open(desk, request, Some(announce.deadline_us), kind) else {
            return;
        };
        let hints = announce.all_hints();
        let hints = PutHints {
            request: touch_request(desk, self.tenant, hints.request),
            tenant: self.tenant,
            ..engine_hints(hints)
        };
        // Their checks come with their bytes.
        let unknown = |len: &u32| (*len, ContentCheck(0));
        let ask = Ask::PutBegin(PutRequest {
            id: announce.id,
            sections: announce.lengths.iter().map(unknown).collect(),
            hints,
            durable: announce.durable,
            deadline: desk.deadline(announce.deadline_us),
        });
        desk.ask_owner(&announce.id, operation, ask);
    }

    /// The next sections of a block that was announced.
    pub(super) fn on_sections(
        &mut self,
        desk: &mut Desk,
        request: u64,
        sections: &Sections,
        payload_bytes: usize,
    ) {
        let put = match self.open.get_mut(&request) {
            Some(Open {
                kind: Kind::Put(put),
                ..
            }) => put,
            Some(_) => return self.protocol(desk, "sections for a request that is no put"),
            // Its put has ended meanwhile (deadline, cancel): drained.
            None => return self.link.discard(),
        };
        let (first, count) = (usize::from(sections.first), sections.checks.len());
        let PutState::Pulling(Ticket { ticket, .. }) = &mut put.state else {
            return self.protocol(desk, "sections that nobody asked for; wait for Pull");
        };
        if put.next_section != Some(sections.first)
            || count == 0
            || first + count > ticket.sections()
        {
            let text = format!(
                "sections {first} to {} of a put that waits for section {:?} of {}; send each once, \
                 in their order",
                first + count,
                put.next_section,
                ticket.sections()
            );
            return self.protocol(desk, &text);
        }
        let length = |section| ticket.section_range(section).len();
        let expected: usize = (first..first + count).map(length).sum();
        if expected != payload_bytes {
            let text = format!("sections of {expected} bytes were announced, {payload_bytes} came");
            return self.protocol(desk, &text);
        }
        for (section, check) in (first..).zip(&sections.checks) {
            ticket.set_check(section, *check);
        }
        put.next_section = Some(sections.first + count as u16);
        let token = desk.number();
        let state = std::mem::replace(&mut put.state, PutState::Receiving(token));
        let PutState::Pulling(ticket) = state else {
            return;
        };
        desk.counters.payload_bytes_in += payload_bytes as u64;
        let filling = Filling::sections(ticket, first..first + count);
        match self.link.pull(token, filling) {
            Ok(()) => self.incoming = Incoming::Filling { request, token },
            // The link went down meanwhile; it ends its requests by itself.
            Err(refused) => abort(desk, Some(refused.sink.0)),
        }
    }

    /// The writer has sent all sections.
    pub(super) fn on_commit(&mut self, desk: &mut Desk, request: u64) {
        let key = self.key;
        let (put, opening) = match self.open.get_mut(&request) {
            Some(Open {
                kind: Kind::Put(put),
                opening,
                ..
            }) => (put, *opening),
            Some(_) => return self.protocol(desk, "a commit of a request that is no put"),
            // Its put has ended meanwhile.
            None => return,
        };
        let is_whole = match &put.state {
            PutState::Pulling(Ticket { ticket, .. }) => {
                put.next_section.map(usize::from) == Some(ticket.sections())
            }
            _ => false,
        };
        if !is_whole {
            let text = "a commit before all sections were sent; send Cancel to give the put up";
            return self.protocol(desk, text);
        }
        let state = std::mem::replace(&mut put.state, PutState::Committing);
        let PutState::Pulling(Ticket { engine, ticket }) = state else {
            return;
        };
        let operation = Operation {
            link: key,
            request,
            opening,
            part: 0,
        };
        desk.ask(To::Engine(engine, Ask::PutCommit(ticket)), operation);
    }
}
