//! What a world is asked to do: every call to the store, noted in the model at the same moment.
//!
//! What must always be true: a call whose answer comes at once is judged at once.

use super::{OpenPut, PutEnd, Step, Violation, Waiting, WantedPut, World, tenant, wrong};
use crate::model::{Handover, Now, Presence, Put};
use crate::payload;
use crate::promises::Reason;
use kvar_base::check::version;
use kvar_base::{BlockId, ContentCheck, Moment, PutOutcome, Refusal};
use kvar_engine::{Event, GetRequest, PutHints, PutRequest, ReadHints, Tier, Touch};
use std::ops::Range;
use std::time::Duration;

/// One put in so many is handed over to one reader.
const HANDOVER_ONE_IN: u64 = 10;

impl World {
    /// Announces a put; whether it may come.
    pub(crate) fn begin_put(&mut self, wanted: WantedPut) -> Result<bool, Violation> {
        let WantedPut {
            number,
            writer,
            lengths,
            durable,
            ephemeral,
            ttl_s,
            patience,
        } = wanted;
        let id = self.id(number);
        let nonce = writer << 40 | self.next_nonce;
        self.next_nonce += 1;
        let deadline = self.now.after(patience);
        let sections: Vec<(u32, ContentCheck)> = lengths
            .iter()
            .enumerate()
            .map(|(at, len)| {
                let bytes = payload::section(number, nonce, at, *len);
                (*len, ContentCheck::of(&bytes, &id, at as u16))
            })
            .collect();
        let version = version(sections.iter().map(|(_, check)| *check));
        // By the put's own number, not by the dice: what is said changes no other step.
        let said = nonce.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let hints = PutHints {
            request: number / 8 + 1,
            depth: (number % 8) as u32,
            ephemeral,
            ttl_s,
            class: (number % 6) as u8,
            recompute_us: match said % 64 {
                0 => u32::MAX,
                said => [0, 0, 500, 1000, 1000, 2000][said as usize % 6],
            },
            handover: (said / 6).is_multiple_of(HANDOVER_ONE_IN),
            is_asked: false,
            tenant: tenant(self.tenancy.of(number)),
            moved: None,
        };
        let request = PutRequest {
            id,
            sections,
            hints,
            durable,
            deadline,
        };
        let now = self.now;
        let memory = self.memory(number, payload::stored_bytes(&lengths));
        let begun = self.engine().put_begin(now, &request);
        self.note(format!(
            "put {number} nonce {nonce:x} {lengths:?}{}{}{}{} -> {:?}",
            if durable { " durable" } else { "" },
            if ephemeral { " ephemeral" } else { "" },
            if hints.handover { " handover" } else { "" },
            ttl_s.map_or_else(String::new, |ttl_s| format!(" for {ttl_s} s")),
            begun.as_ref().map(|_| "comes")
        ));
        self.hear_journal(Some(memory))?;
        let presence = self.model.presence(number);
        let visible = presence == Presence::There;
        let filling = self
            .open_puts
            .iter()
            .any(|put| put.number == number && put.deadline > now);
        let lenient = self.model.lenient || self.is_unknown(number);
        match begun {
            Ok(_) if (visible || filling) && !lenient => wrong(format!(
                "a put of block {number} is welcome although it is {}",
                if visible { "visible" } else { "being put" }
            )),
            Ok(ticket) => {
                self.open_puts.push(OpenPut {
                    number,
                    nonce,
                    lengths: lengths.into(),
                    version,
                    ticket,
                    deadline,
                    hints,
                    durable,
                });
                Ok(true)
            }
            Err(PutOutcome::Exists)
                if !visible && presence != Presence::ThereOrOver && !lenient =>
            {
                wrong(format!(
                    "a put of block {number} is told that it exists, and it is {presence:?}"
                ))
            }
            Err(outcome) => {
                self.count_put(outcome);
                Ok(false)
            }
        }
    }

    pub(super) fn count_put(&mut self, outcome: PutOutcome) {
        self.was_busy |= outcome == PutOutcome::Refused(Refusal::Busy);
        let name = match outcome {
            PutOutcome::Refused(refusal) => format!("put/refused {refusal}"),
            outcome => format!("put/{}", outcome.word()),
        };
        self.tally.count(&name);
    }

    /// Ends the put at this place of `open_puts`.
    pub(crate) fn end_put(&mut self, at: usize, how: PutEnd) -> Step {
        let put = self.open_puts.swap_remove(at);
        self.note(format!(
            "{how:?} of put {} nonce {:x}",
            put.number, put.nonce
        ));
        let OpenPut {
            number,
            nonce,
            lengths,
            version,
            mut ticket,
            hints,
            durable,
            ..
        } = put;
        if how == PutEnd::Abort {
            self.engine().put_abort(ticket);
            self.tally.count("put/aborted");
            return self.hear();
        }
        for (section, len) in lengths.iter().enumerate() {
            let bytes = payload::section(number, nonce, section, *len);
            let range = ticket.section_range(section);
            ticket.buffer_mut()[range].copy_from_slice(&bytes);
        }
        if how == PutEnd::WrongByte {
            let section = nonce as usize % lengths.len();
            let range = ticket.section_range(section);
            let at = range.start + (nonce as usize * 7919) % range.len();
            ticket.buffer_mut()[at] ^= 0x10;
        }
        let visible = self.model.presence(number) == Presence::There && !self.is_unknown(number);
        let (now, token) = (self.now, self.token(Waiting::Put { number, nonce }));
        self.engine().put_commit(now, token, ticket);
        self.hear_journal(None)?;
        let answer = self.engine().events().collect::<Vec<_>>();
        let mut refused = None;
        for event in &answer {
            if let Event::Put {
                token: this,
                outcome,
            } = event
                && *this == token
                && *outcome != PutOutcome::Stored
            {
                refused = Some(*outcome);
            }
        }
        if refused.is_none() {
            if how == PutEnd::WrongByte {
                return wrong(format!(
                    "put {nonce:x} of block {number} was taken although a byte is not what its writer said"
                ));
            }
            if visible && !self.model.lenient {
                return wrong(format!(
                    "block {number} is visible and a second put was taken"
                ));
            }
            let order = self.model.next_order;
            self.model.next_order += 1;
            let wait = self.config.handover_wait;
            let wait = hints
                .ttl_s
                .map_or(wait, |ttl_s| Duration::from_secs(u64::from(ttl_s)));
            let put = Put {
                nonce,
                handover: (hints.handover && !durable).then(|| Handover {
                    until: now.after(wait),
                    unread: vec![true; lengths.len()],
                }),
                lengths,
                version,
                order,
                committed: self.now,
                turn: self.turns,
                ephemeral: hints.ephemeral,
                expires_unix_s: self.expiry(now, hints.ttl_s),
                guaranteed: false,
                flushed_once: false,
                given_up: false,
                given_up_at: 0,
                doomed: false,
                buried: false,
                in_doubt: false,
            };
            self.model.committed(number, put);
            self.disk_is_durable = false;
            if durable {
                self.tally.count("put/taken, to be durable");
            }
        }
        answer.into_iter().try_for_each(|event| self.judge(event))
    }

    /// Reads a block, whole or some sections.
    pub(crate) fn get(
        &mut self,
        number: u64,
        sections: Option<Range<u16>>,
        deadline: Moment,
    ) -> Step {
        let id = self.id(number);
        self.model.read(number, sections.as_ref());
        let puts_before = self.model.next_order;
        let (candidates, presence) = (self.model.candidates(number), self.model.presence(number));
        let block = self.model.block(number);
        block.readers += 1;
        let waiting = Waiting::Get {
            number,
            sections: sections.clone(),
            candidates,
            puts_before,
            presence,
            in_doubt: block.is_in_doubt(),
            in_memory: block.in_memory,
            times_gone: block.times_gone,
            times_removed: block.times_removed,
        };
        let stored_bytes = block
            .puts
            .iter()
            .map(|put| payload::stored_bytes(&put.lengths))
            .max();
        let token = self.token(waiting);
        self.note(format!("get {number} {sections:?} as {token}"));
        let request = GetRequest {
            id,
            sections,
            deadline,
            touch: Touch {
                request: number / 8 + 1,
                depth: (number % 8) as u32,
            },
        };
        let now = self.now;
        let memory = self.memory(number, stored_bytes.unwrap_or(u64::MAX / 2));
        // Every other reader of sections takes one after another.
        let hints = ReadHints {
            goes_on: request.sections.is_some() && token.is_multiple_of(2),
            asker: token % 3,
        };
        self.engine().get(now, token, request, hints);
        self.hear_journal(Some(memory))?;
        self.hear()
    }

    /// Asks which blocks are there.
    pub(crate) fn lookup(&mut self, numbers: &[u64]) -> Step {
        let ids: Vec<BlockId> = numbers.iter().map(|number| self.id(*number)).collect();
        let now = self.now;
        let present = self.engine().lookup(now, &ids, 0);
        self.note(format!("lookup {numbers:?} -> {present:?}"));
        for (number, present) in numbers.iter().zip(present) {
            self.tally.count(if present {
                "lookup/present"
            } else {
                "lookup/absent"
            });
            self.check_presence(*number, present, "lookup")?;
        }
        self.hear()
    }

    pub(super) fn check_presence(&mut self, number: u64, present: bool, who: &str) -> Step {
        if self.is_unknown(number) {
            return Ok(());
        }
        let right = match self.model.presence(number) {
            Presence::There => present,
            Presence::Absent | Presence::Over => !present,
            Presence::ThereOrOver => true,
        };
        if !right && !self.model.lenient {
            let block = self.model.block(number);
            return wrong(format!(
                "{who} says that block {number} is {}: {block:?}",
                if present { "there" } else { "not there" }
            ));
        }
        Ok(())
    }

    /// Whether the journal's positions do not tell what becomes of this block: history was lost,
    /// and its entry may lead to where another was written since.
    pub(super) fn is_unknown(&mut self, number: u64) -> bool {
        self.harm.history_lost && self.model.block(number).is_in_doubt()
    }

    /// Asks where a block is.
    pub(crate) fn stat(&mut self, number: u64) -> Step {
        let id = self.id(number);
        let now = self.now;
        let stat = self.engine().stat(now, &id);
        self.check_presence(number, stat.is_some(), "stat")?;
        if let Some(stat) = stat
            && !self.model.lenient
            && !self.is_unknown(number)
        {
            let block = self.model.block(number);
            let tier = match (block.in_memory, block.on_device) {
                (true, true) => Tier::DramAndFlash,
                (true, false) => Tier::Dram,
                _ => Tier::Flash,
            };
            if stat.tier != tier {
                return wrong(format!(
                    "block {number} is said to be in {:?}: {block:?}",
                    stat.tier
                ));
            }
            // Before anybody reads it: what is in memory is of the put that is there.
            let mut there = match &block.now {
                Now::Absent => &[][..],
                Now::Known(nonce) => std::slice::from_ref(nonce),
                Now::OneOf(nonces) => nonces,
            }
            .iter()
            .filter_map(|nonce| block.put(*nonce));
            if let Some(version) = stat.version
                && !there.any(|put| put.version == version)
            {
                return wrong(format!(
                    "block {number} is in memory as version {version:x}, of no put that is there: {block:?}"
                ));
            }
        }
        Ok(())
    }

    pub(crate) fn remove(&mut self, numbers: &[u64]) -> Step {
        self.note(format!("remove {numbers:?}"));
        let ids: Vec<BlockId> = numbers.iter().map(|number| self.id(*number)).collect();
        let from = self.model.next_order;
        for number in numbers {
            self.model.removed(*number);
            self.hear_left(*number, Some(Reason::Removed))?;
        }
        self.shelf_is_stale();
        let numbers = numbers.to_vec();
        let token = self.token(Waiting::Remove { numbers, from });
        self.engine().remove(token, &ids);
        self.disk_is_durable = false;
        self.hear()
    }

    /// Blocks of a tenant, or of all.
    pub(super) fn purged(&self, whose: Option<u64>) -> Vec<u64> {
        let known = self.model.blocks.keys().copied();
        let is_concerned =
            |number: &u64| whose.is_none_or(|whose| whose == self.tenancy.of(*number));
        known.filter(is_concerned).collect()
    }

    pub(crate) fn purge(&mut self, whose: Option<u64>) -> Step {
        self.note(format!("purge of {whose:?}"));
        let from = self.model.next_order;
        for number in self.purged(whose) {
            self.model.removed(number);
            self.hear_left(number, Some(Reason::Removed))?;
        }
        self.shelf_is_stale();
        let token = self.token(Waiting::Purge { from, whose });
        self.engine().purge(token, whose.map(tenant));
        self.disk_is_durable = false;
        self.hear()
    }

    pub(crate) fn flush(&mut self) -> Step {
        let from = self.model.next_order;
        let token = self.token(Waiting::Flush { from });
        self.note(format!("flush as {token}"));
        self.engine().flush(token);
        self.hear()
    }

    /// Lets time pass.
    pub(crate) fn turn(&mut self, time: Duration) -> Step {
        self.now = self.now.after(time);
        self.turns += 1;
        self.model.unix_s = self.unix_s();
        let now = self.now;
        self.model.promises.begin_moment(now);
        self.answer_from_below();
        // As a node does: of what is over a bounded part, now and then all.
        let bytes = match self.turns % 4 {
            0 => u64::MAX,
            part => part << 14,
        };
        self.engine().turn_some(now, bytes);
        self.hear_disk(false);
        self.hear()?;
        let ended = self.model.promises.end_moment();
        self.tally.add("lease/ended by itself", ended);
        if ended > 0 {
            self.check_promises()?;
        }
        Ok(())
    }
}
