//! Puts on a link: the owner says whether it takes a block, its payload is received straight into
//! the owner's memory, and the owner verifies it.
//!
//! ```text
//!   Beginning (announced) ── the owner takes it ──> Pull sent: Pulling ── payload ──┐
//!   Beginning (eager: the payload stands at the door) ── the owner takes it ────────┤
//!        │ it does not: the payload is drained                                      ▼
//!        └──> answered                       answered <── Committing <── all is here: Receiving
//! ```
//!
//! What must always be true: a ticket goes back to its owner as commit or abort, whatever becomes
//! of the link; announced bytes are bounded.

use super::conversation::{Conversation, Incoming, abort};
use super::desk::{Desk, Operation, To};
use super::filling::Filling;
use super::request::{Kind, Open, Put, PutState};
use super::serve::touch_request;
use crate::mail::{Ask, Ticket};
use kvar_base::{PutOutcome, Refusal};
use kvar_engine::{PutHints, PutRequest, Tenant};
use kvar_transport::Link as _;
use kvar_wire::PutAnswer;

impl Conversation {
    pub(super) fn on_put(
        &mut self,
        desk: &mut Desk,
        request: u64,
        put: &kvar_wire::Put,
        at_the_door: usize,
    ) {
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
            next_section: None,
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
    pub(super) fn on_payload(&mut self, desk: &mut Desk, request: u64, payload_bytes: usize) {
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
        if put.next_section.is_some() || put.payload_bytes != payload_bytes as u64 {
            let text = format!(
                "a put announced {} bytes and sent {payload_bytes}",
                put.payload_bytes
            );
            return self.protocol(desk, &text);
        }
        match std::mem::replace(&mut put.state, PutState::Committing) {
            PutState::Pulling(ticket) => {
                let token = desk.number();
                match self.link.pull(token, Filling::whole(ticket)) {
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

    /// The owner has said whether it takes the block.
    pub(super) fn on_put_begun(
        &mut self,
        desk: &mut Desk,
        request: u64,
        begun: Result<Ticket, PutOutcome>,
    ) {
        let Some(Open {
            kind: Kind::Put(put),
            ..
        }) = self.open.get_mut(&request)
        else {
            return abort(desk, begun.ok());
        };
        let PutState::Beginning { eager } = put.state else {
            return abort(desk, begun.ok());
        };
        match begun {
            Ok(ticket) if eager => {
                let token = desk.number();
                match self.link.pull(token, Filling::whole(ticket)) {
                    Ok(()) => {
                        put.state = PutState::Receiving(token);
                        self.incoming = Incoming::Filling { request, token };
                    }
                    Err(refused) => {
                        // The link went down meanwhile; it ends its requests by itself.
                        abort(desk, Some(refused.sink.0));
                    }
                }
            }
            Ok(ticket) => {
                put.state = PutState::Pulling(ticket);
                self.send(desk, request, &kvar_wire::Pull {});
            }
            Err(outcome) => {
                if eager {
                    self.turn_away();
                }
                self.answer_put(desk, request, outcome);
            }
        }
    }

    /// A put's payload is complete: on to its owner.
    pub(super) fn on_received(&mut self, desk: &mut Desk, ticket: Ticket) {
        let Incoming::Filling { request, .. } = self.incoming else {
            return abort(desk, Some(ticket));
        };
        self.incoming = Incoming::Nothing;
        let key = self.key;
        match self.open.get_mut(&request) {
            Some(Open {
                opening,
                kind: Kind::Put(put),
                ..
            }) => {
                if put.next_section.is_some() {
                    // The others come later, and Commit behind them.
                    put.state = PutState::Pulling(ticket);
                    return;
                }
                desk.counters.payload_bytes_in += put.payload_bytes;
                put.state = PutState::Committing;
                let operation = Operation {
                    link: key,
                    request,
                    opening: *opening,
                    part: 0,
                };
                let Ticket { engine, ticket } = ticket;
                desk.ask(To::Engine(engine, Ask::PutCommit(ticket)), operation);
            }
            _ => abort(desk, Some(ticket)),
        }
    }

    /// Answers a put and closes it.
    pub(super) fn answer_put(&mut self, desk: &mut Desk, request: u64, outcome: PutOutcome) {
        self.close(desk, request);
        let is_stored = outcome == PutOutcome::Stored;
        desk.of_namespace[self.tenant.index()].stored += u64::from(is_stored);
        desk.counters.puts.add(outcome);
        self.send(desk, request, &PutAnswer { outcome });
    }

    /// The payload at the door is not wanted.
    fn turn_away(&mut self) {
        self.link.discard();
        self.incoming = Incoming::Nothing;
    }

    /// Gives a put's memory back to its owner, wherever it is.
    pub(super) fn drop_put(&mut self, desk: &mut Desk, put: Put) {
        match put.state {
            PutState::Beginning { eager: true } => self.turn_away(),
            PutState::Pulling(ticket) => abort(desk, Some(ticket)),
            PutState::Receiving(token) => {
                self.incoming = Incoming::Nothing;
                abort(desk, self.link.fence_pull(token).map(|filling| filling.0));
            }
            // The owner has the ticket, or will hand it to nobody.
            PutState::Beginning { eager: false } | PutState::Committing => {}
        }
    }
}

/// Every hint of the wire is one of the engine; each side's compiler asks about a new one.
pub(super) fn engine_hints(hints: kvar_wire::PutHints) -> PutHints {
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
