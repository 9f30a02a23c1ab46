//! A block comes from the tier above: this shard decides whether it is worth a place.
//!
//! ```text
//!   take ── here already ── flushed? ── yes ──> Exists
//!     │                        └── no ── flushed first ──> Done
//!     ├── worth a place? the limit of writes? room? ── no ──> refused, with the reason
//!     └── put like any other, durable ──> Put ── flushed
//! ```
//!
//! It passes through memory: as soon as it is recorded it leaves, unless somebody used it, so that what
//! comes down displaces no block that is read here for longer than its write takes.
//!
//! What must always be true: nobody is told that a block is here before it is flushed; every byte is
//! verified again; a remove that is called after a take finds what it brought.
//!
//! Left to others: the way onto the device (`write`, `sync`), and what the tier above makes of the
//! answer (`demote`).

use super::sync::FlushWaiter;
use super::types::{Demoted, Demotion, Moved, PutHints, PutRequest, Standing};
use super::{Change, Shard};
use crate::dram::State;
use kvar_base::{BlockId, Moment, SECTIONS_MAX};
use kvar_policy::Asking;
use std::time::Duration;

/// How long the id is kept free for the block: it is filled within the same call.
const FILLING: Duration = Duration::from_secs(1);

impl Shard {
    pub(crate) fn take(
        &mut self,
        now: Moment,
        token: u64,
        block: &Demotion,
    ) -> Result<(), Demoted> {
        if self.shutdown.is_some() {
            return Err(Demoted::Gone);
        }
        if !self.trouble.is_over() {
            return Err(Demoted::Busy);
        }
        if self.visible(now, &block.id).is_ok() {
            return self.has_already(now, token, &block.id);
        }
        let ttl_s = match u64::from(block.hints.expires_unix_s) {
            0 => None,
            expires => match expires.saturating_sub(self.unix_s(now)) {
                0 => return Err(Demoted::NotWorth),
                left => Some(u32::try_from(left).unwrap_or(u32::MAX)),
            },
        };
        let sections = block.copy.sections.iter();
        let sections: Vec<_> = sections.map(|it| (it.len, it.check)).collect();
        let bytes = block.copy.bytes.padded_len() as u64;
        let payload: u64 = block.copy.sections.iter().map(|it| u64::from(it.len)).sum();
        let is_whole = (1..=SECTIONS_MAX).contains(&sections.len());
        if !is_whole || payload > self.superblock.block_bytes_max() {
            return Err(Demoted::Failed);
        }
        if !self.is_worth_taking(block) {
            return Err(Demoted::NotWorth);
        }
        if !self.budget.has_room(bytes, Self::budget_time(now)) {
            return Err(Demoted::Limit);
        }
        let request = PutRequest {
            id: block.id,
            sections,
            hints: PutHints {
                depth: block.hints.depth,
                ttl_s,
                class: block.hints.class,
                recompute_us: block.hints.recompute_us,
                handover: block.hints.handover,
                tenant: block.hints.tenant,
                // From its arrival on it is counted here.
                moved: Some(Moved {
                    age_bytes: 0,
                    ..block.moved
                }),
                ..PutHints::default()
            },
            durable: true,
            deadline: now.after(FILLING),
        };
        let ticket = self.open_ticket(now, &request);
        let mut ticket = ticket.map_err(|_| Demoted::Busy)?;
        for (number, section) in block.copy.sections.iter().enumerate() {
            let place = ticket.section_range(number);
            ticket.buffer_mut()[place].copy_from_slice(block.copy.section(section));
        }
        ticket.passes = true;
        self.put_commit(now, token, ticket);
        Ok(())
    }

    /// Before the log was ever full everything is; then what has a chance to be used in time.
    fn is_worth_taking(&mut self, block: &Demotion) -> bool {
        if let Some(oldest) = self.segments.sealed.front().copied() {
            let opened_at = self.segments.get(oldest).opened_at;
            self.keep.set_oldest(opened_at);
        }
        // What it costs counts by what costs here, whichever way it came.
        let bytes = block.copy.bytes.padded_len() as u64;
        let cost = self.keep.cost(block.hints.recompute_us, bytes);
        self.keep.is_worth(&Asking {
            tenant: block.hints.tenant,
            class: block.moved.class.at_cost(cost),
            age: 0,
            depth: block.hints.depth,
        })
    }

    /// What is here is only worth something to the tier above if it survives a power cut.
    fn has_already(&mut self, now: Moment, token: u64, id: &BlockId) -> Result<(), Demoted> {
        let state = self.dram.get(id).map(|resident| resident.state);
        if matches!(state, Some(State::Held | State::Volatile | State::Awaited)) {
            self.queue_resident(now, id);
        }
        if self.unflushed.puts.is_empty() {
            return Err(Demoted::Exists);
        }
        self.flush_waiters.push(FlushWaiter {
            token,
            up_to_put: self.next_put - 1,
        });
        Ok(())
    }

    /// A block that only passes through memory is recorded: its room is wanted by others.
    pub(super) fn passed(&mut self, id: &BlockId) {
        let passes = self
            .dram
            .get(id)
            .is_some_and(|it| it.passes && it.state == State::Clean && !it.leased);
        if passes && self.dram.remove(id).is_some() {
            let (id, fragmented) = (*id, false);
            self.note(Change::Uncached { id, fragmented });
        }
    }

    /// A block is asked for that is not here.
    pub(super) fn note_missed(&mut self, id: &BlockId) {
        if self.standing != Standing::Only {
            self.keep.missed(super::admit::short(id));
        }
    }
}
