//! A block comes in.
//!
//! ```text
//!  put_begin ── may it come? ── room for it ──> ticket ── the caller fills it ── put_commit
//!      │                                           │                                │ checks hold
//!      ▼                                           ▼                                ▼
//!  Exists, InProgress, Refused                 put_abort                 visible: Dirty, Held, Volatile or Awaited
//! ```
//!
//! What must always be true: an id is filled by one put at a time, and by none for ever; its memory
//! counts as DRAM from the ticket on; no block becomes visible unless every section is what its
//! writer said it is.
//!
//! Left to others: the way to the device (`write`) and the answer to a durable put (`sync`).

use super::types::{Event, PutRequest, PutTicket, Touch};
use super::write::{Source, WriteItem};
use super::{Shard, head_crc, sections_hold};
use crate::dram::{Evicted, Purpose, Resident, State};
use crate::layout::{ImagePlan, RecordHints};
use crate::mutation::{self, Check};
use kvar_base::check::version;
use kvar_base::{MissReason, Moment, PutOutcome, Refusal, SECTIONS_MAX, page_round_up};
use kvar_io::Buffer;
use kvar_policy::{Admission, Tenant};
use std::time::Duration;

/// How long a put may stay without commit or abort after its deadline before its id is free again.
const FILLING_GRACE: Duration = Duration::from_secs(5);
/// Memory that blocks leave free for footers (at most 2 MiB), directory pages and checkpoint
/// chunks, however many copies slow readers hold: without these nothing dirty could leave.
const PAGES_RESERVE_BYTES: usize = 4 << 20;

impl Shard {
    pub(crate) fn put_begin(
        &mut self,
        now: Moment,
        request: &PutRequest,
    ) -> Result<PutTicket, PutOutcome> {
        let outcome = self.put_begin_inner(now, request);
        if let Err(outcome) = &outcome {
            self.counters.count_put(*outcome);
        }
        outcome
    }

    fn put_begin_inner(
        &mut self,
        now: Moment,
        request: &PutRequest,
    ) -> Result<PutTicket, PutOutcome> {
        let refused = |refusal| Err(PutOutcome::Refused(refusal));
        let count = request.sections.len();
        let empty = |(len, _): &(u32, _)| *len == 0;
        if count == 0
            || count > SECTIONS_MAX
            || request.sections.iter().any(empty)
            || request.hints.ttl_s == Some(0)
        {
            return refused(Refusal::WrongFormat);
        }
        let payload: u64 = request
            .sections
            .iter()
            .map(|(len, _)| u64::from(*len))
            .sum();
        if payload > self.superblock.block_bytes_max() {
            return refused(Refusal::TooBig);
        }
        if request.deadline <= now {
            self.counters.overdue_at_call += 1;
            return refused(Refusal::Deadline);
        }
        let touch = Touch {
            request: request.hints.request,
            depth: request.hints.depth,
        };
        let before = self.dram.get(&request.id).map(|resident| resident.state);
        if self.touch(now, &request.id, touch).is_ok() {
            if let Some(before) = before {
                self.await_again(now, &request.id, &request.hints, before);
            }
            let known = self.dram.get(&request.id).map(|resident| resident.version);
            // Of a block that comes section by section nothing is known yet.
            let is_known = request.sections.iter().any(|(_, check)| check.0 != 0);
            let known = known.filter(|_| is_known);
            if known.is_some_and(|known| {
                known != version(request.sections.iter().map(|(_, check)| *check))
            }) {
                self.counters.id_divergence += 1;
            }
            return Err(PutOutcome::Exists);
        }
        self.open_ticket(now, request)
    }

    /// Room for a block that is not visible.
    pub(super) fn open_ticket(
        &mut self,
        now: Moment,
        request: &PutRequest,
    ) -> Result<PutTicket, PutOutcome> {
        let refused = |refusal| Err(PutOutcome::Refused(refusal));
        if self
            .filling
            .get(&request.id)
            .is_some_and(|(_, until)| *until > now)
        {
            return Err(PutOutcome::InProgress);
        }
        if self.shutdown.is_some() {
            return refused(Refusal::Busy);
        }
        let plan = ImagePlan::new(&request.sections);
        if plan.bytes > self.superblock.image_bytes_max() {
            return refused(Refusal::TooBig);
        }
        let (tenant, bytes) = (request.hints.tenant, plan.bytes as usize);
        let Some(buffer) = self.reserve_buffer(tenant, bytes, Purpose::Put) else {
            return refused(Refusal::Busy);
        };
        let number = self.next_put;
        self.next_put += 1;
        self.filling
            .insert(request.id, (number, request.deadline.after(FILLING_GRACE)));
        Ok(PutTicket {
            id: request.id,
            number,
            plan,
            buffer,
            hints: request.hints,
            durable: request.durable,
            passes: false,
        })
    }

    /// A buffer that counts as a tenant's DRAM, evicting for it; `None` when what is there cannot
    /// leave, or may not for this tenant.
    pub(super) fn reserve_buffer(
        &mut self,
        tenant: Tenant,
        bytes: usize,
        purpose: Purpose,
    ) -> Option<Buffer> {
        let padded = page_round_up(bytes as u64);
        let mut gone = Evicted::new();
        let fits = self
            .dram
            .reserve(tenant, padded, purpose, &self.keep, &mut gone);
        for gone in gone {
            self.evicted(&gone, false);
        }
        if !fits {
            return None;
        }
        // Memory that evicted blocks still hold for a reader, or gaps between blocks of several
        // sizes, can keep a run of pages from being free although the bytes are.
        loop {
            if let Some(buffer) = self.allocate_block(bytes) {
                return Some(buffer);
            }
            let Some(gone) = self.dram.evict_for_run(tenant, padded, &self.keep) else {
                self.dram.release(tenant, padded);
                return None;
            };
            self.evicted(&gone, true);
        }
    }

    /// Memory for a block, if that leaves enough for pages.
    pub(super) fn allocate_block(&self, bytes: usize) -> Option<Buffer> {
        self.arena.allocate_beside(bytes, PAGES_RESERVE_BYTES)
    }

    pub(crate) fn put_abort(&mut self, ticket: PutTicket) {
        self.counters.puts_aborted += 1;
        let mine = self.end_filling(&ticket);
        let PutTicket {
            id, buffer, hints, ..
        } = ticket;
        let padded = buffer.padded_len() as u64;
        self.dram.release(hints.tenant, padded);
        drop(buffer);
        // Else another put fills the id by now, and whoever waits, waits for that.
        if mine {
            self.end_awaited(&id);
        }
    }

    fn end_filling(&mut self, ticket: &PutTicket) -> bool {
        let mine = self
            .filling
            .get(&ticket.id)
            .is_some_and(|(number, _)| *number == ticket.number);
        if mine {
            self.filling.remove(&ticket.id);
        }
        mine
    }

    pub(crate) fn put_commit(&mut self, now: Moment, token: u64, ticket: PutTicket) {
        let id = ticket.id;
        let mine = self.end_filling(&ticket);
        self.commit(now, token, ticket, mine);
        if mine {
            self.end_awaited(&id);
        }
    }

    fn commit(&mut self, now: Moment, token: u64, ticket: PutTicket, mine: bool) {
        let padded = ticket.buffer.padded_len() as u64;
        let PutTicket {
            id,
            number,
            plan,
            mut buffer,
            hints: told,
            durable,
            passes,
        } = ticket;
        let outcome = if !mine {
            Err(PutOutcome::Refused(Refusal::Deadline))
        } else if self.visible(now, &id).is_ok() {
            Err(PutOutcome::Exists)
        } else if !sections_hold(&id, &plan, buffer.as_slice())
            && !mutation::is_disabled(Check::ContentCheck)
        {
            self.counters.put_checks_failed += 1;
            Err(PutOutcome::Refused(Refusal::WrongFormat))
        } else {
            Ok(())
        };
        if let Err(outcome) = outcome {
            self.dram.release(told.tenant, padded);
            self.counters.count_put(outcome);
            self.events.push(Event::Put { token, outcome });
            return;
        }
        if self.visible(now, &id) == Err(MissReason::Expired) {
            self.clear_expired(&id);
        }
        plan.encode(&id, buffer.as_mut_slice());
        buffer.zero_padding();
        let bytes = plan
            .sections
            .iter()
            .map(|section| u64::from(section.len))
            .sum::<u64>();
        let version = version(plan.sections.iter().map(|section| section.check));
        let (sectioned, sections) = (plan.is_sectioned(), plan.sections.len() as u16);
        let crc = head_crc(&id, &plan, buffer.as_slice());
        let arrival = self.arrivals.number(told.request);
        // While the device takes nothing, one block at a time tries it; the others may leave.
        let given_up = self.trouble.gave_up() && !durable && !self.dirty.is_empty();
        let is_asked = durable || told.is_asked;
        let is_awaited = told.handover && !is_asked;
        let admission = self.budget.admit(
            padded,
            told.ephemeral || is_awaited,
            is_asked,
            Self::budget_time(now),
        );
        let state = match admission {
            _ if is_awaited => State::Awaited,
            Admission::Never => State::Volatile,
            _ if given_up => State::Volatile,
            Admission::Later => State::Held,
            Admission::Asked | Admission::Budget => State::Dirty,
        };
        let handover =
            is_awaited.then(|| Box::new(self.handover_of(now, &told, usize::from(sections))));
        let mut used_at = self.keep.demand_bytes();
        let class = if let Some(moved) = told.moved {
            used_at = used_at.saturating_sub(moved.age_bytes);
            self.keep
                .taken_over(super::admit::short(&id), told.tenant, moved.class);
            moved.class
        } else {
            self.arrived(&id, &told, padded)
        };
        self.keep.demanded(padded);
        let image = buffer.freeze();
        let hints = RecordHints {
            depth: told.depth,
            expires_unix_s: self.expiry(now, told.ttl_s),
            class: told.class,
            handover: told.handover,
            recompute_us: told.recompute_us,
            tenant: told.tenant,
        };
        self.dram.insert(
            id,
            Resident {
                image: image.clone(),
                sections: plan.sections,
                version,
                number,
                state,
                depth: hints.depth,
                ephemeral: told.ephemeral,
                arrival,
                class,
                used_at,
                hints,
                leased: false,
                handover,
                passes,
                is_below: false,
            },
        );
        self.answer_by_put(&id);
        self.counters.not_admitted_handover += u64::from(is_awaited);
        if passes {
            self.counters.taken += 1;
            self.counters.taken_bytes += padded;
        } else {
            self.counters.put_bytes += bytes;
            self.counters.count_put(PutOutcome::Stored);
        }
        if state != State::Dirty {
            self.events.push(Event::Put {
                token,
                outcome: PutOutcome::Stored,
            });
            self.end_waits(now);
            // At once, or the next puts would find nothing that may leave.
            return self.decide_ahead(now);
        }
        let is_asked = admission == Admission::Asked;
        self.counters.admitted_asked += u64::from(is_asked && !passes);
        self.counters.admitted_budget += u64::from(!is_asked);
        self.unflushed.add(number, now, durable.then_some(token));
        self.push_dirty(WriteItem {
            id,
            len: plan.bytes as u32,
            sectioned,
            sections,
            crc,
            version,
            hints,
            image,
            source: Source::Put { number, since: now },
        });
        if !durable {
            self.events.push(Event::Put {
                token,
                outcome: PutOutcome::Stored,
            });
        }
    }
}
