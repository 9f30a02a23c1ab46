//! What a world hears: faults of the disk, the journal of the store, answers to calls; and what it
//! makes of them.
//!
//! What must always be true: faults are heard before the journal, and the journal before the
//! answers, so that whatever excuses a miss is known when the miss is judged.

use super::{Held, Memory, Step, Violation, Waiting, World, wrong};
use crate::model::{Now, Presence};
use crate::payload;
use kvar_base::{BlockId, MissReason, PutOutcome};
use kvar_engine::{Change, Copy, Event};
use kvar_io::sim::{FaultKind, FaultOn};
use std::ops::Range;

impl World {
    /// What faults struck since.
    pub(super) fn hear_disk(&mut self, opening: bool) {
        let struck = self.disk.struck_since(self.struck_known);
        self.struck_known += struck.len();
        for fault in &struck {
            self.harm.note(fault, &self.superblock, opening);
            let what = match (fault.on, fault.kind) {
                (_, FaultKind::Late) => "late",
                (_, FaultKind::Stuck) => "stuck",
                (FaultOn::Read, FaultKind::FlipBits(_)) => "read flipped",
                (FaultOn::Read, FaultKind::Misdirect) => "read misdirected",
                (FaultOn::Read, FaultKind::Short) => "read short",
                (FaultOn::Read, _) => "read failed",
                (FaultOn::Write, FaultKind::FlipBits(_)) => "write flipped",
                (FaultOn::Write, FaultKind::Misdirect) => "write misdirected",
                (FaultOn::Write, FaultKind::Short) => "write short",
                (FaultOn::Write, FaultKind::Lost) => "write lost",
                (FaultOn::Write, FaultKind::NoSpace) => "write without space",
                (FaultOn::Write, _) => "write failed",
                (FaultOn::Flush, FaultKind::Lost) => "flush lost",
                (FaultOn::Flush, _) => "flush failed",
            };
            self.tally.count(&format!("fault/{what}"));
            if fault.kind != FaultKind::Late {
                self.note(format!(
                    "    disk: {what} {:?} {:?}",
                    fault.bytes, fault.instead
                ));
            }
        }
    }

    /// Journal, then answers.
    pub(super) fn hear(&mut self) -> Step {
        self.hear_journal(None)?;
        let events: Vec<Event> = self.engine().events().collect();
        let judged = events.into_iter().try_for_each(|event| self.judge(event));
        self.given_up_now.clear();
        judged
    }

    pub(super) fn number(&self, id: &BlockId) -> Result<u64, Violation> {
        self.numbers
            .get(id)
            .copied()
            .ok_or_else(|| Violation(format!("the journal speaks of {id}, which nobody put")))
    }

    /// Applies the journal. `reserving`: memory before the call that wants some of it.
    pub(super) fn hear_journal(&mut self, mut reserving: Option<Memory>) -> Step {
        let journal = self.engine().journal();
        if journal.is_empty() {
            return Ok(());
        }
        let memory = reserving.as_ref();
        let mut used_bytes = memory.map_or(0, |memory| memory.used_bytes);
        for change in journal {
            match change {
                Change::Cached { id } => {
                    let number = self.number(&id)?;
                    self.model.cached(number);
                }
                Change::Expired { id } => {
                    let number = self.number(&id)?;
                    self.check_over(number, "left memory")?;
                    self.tally.count("left/memory, expired");
                    self.note(format!("    block {number} is over and left memory"));
                    self.forgotten += 1;
                    self.model.uncached(number);
                    self.hear_left(number, None)?;
                }
                Change::Placed { id, position } => {
                    let number = self.number(&id)?;
                    if self.model.block(number).on_device {
                        self.tally.count("kept/by reclaim");
                    }
                    (self.disk_is_durable, self.has_placed) = (false, true);
                    self.note(format!("    block {number} lies at position {position}"));
                    self.model.placed(number, position);
                }
                Change::Uncached { id, fragmented } => {
                    let number = self.number(&id)?;
                    let block = self.model.block(number);
                    let on_device = block.on_device;
                    let leaving = match &block.now {
                        Now::Known(nonce) => block.put(*nonce),
                        _ => block.puts.last(),
                    };
                    let leaving = leaving.map_or(0, |put| payload::stored_bytes(&put.lengths));
                    let is_known = matches!(block.now, Now::Known(_));
                    let wanted = reserving.as_ref().map_or(0, |memory| memory.wanted_bytes);
                    let has_room = used_bytes + wanted <= self.config.dram_bytes;
                    // Within a turn only reads of sections want memory, a part of a block each.
                    if !fragmented && has_room && reserving.is_some() && !self.model.lenient {
                        return wrong(format!(
                            "block {number} left memory although {used_bytes} of {} bytes were used and {wanted} \
                             more were wanted",
                            self.config.dram_bytes
                        ));
                    }
                    let tenant = self.tenancy.of(number);
                    if let Some(memory) = &mut reserving {
                        let may_go = tenant == memory.asking
                            || memory.is_beyond(tenant, self.config.dram_bytes);
                        if !may_go && !fragmented && !self.model.lenient {
                            return wrong(format!(
                                "block {number} of tenant {tenant}, which is within its part, left memory for \
                                 another's: {memory:?}"
                            ));
                        }
                        if tenant != memory.asking {
                            self.tally.count("left/memory, for another tenant");
                        }
                        let held = memory.held.entry(tenant).or_default();
                        // Where that is not known, no more is judged of this tenant.
                        let left = if is_known { leaving } else { 0 };
                        *held = held.saturating_sub(left);
                    }
                    // Where it is not known which put left, neither is how much room it made.
                    used_bytes = if is_known {
                        used_bytes.saturating_sub(leaving)
                    } else {
                        u64::MAX - wanted
                    };
                    self.tally.count(match (fragmented, on_device) {
                        (true, _) => "left/memory, fragmented",
                        (false, true) => "left/memory, on the device",
                        (false, false) => "left/memory, for good",
                    });
                    self.note(format!("    block {number} left memory"));
                    self.forgotten += u64::from(!on_device);
                    if !on_device {
                        self.given_up_now.insert(number);
                    }
                    self.model.uncached(number);
                    self.hear_left(number, None)?;
                }
                Change::Displaced { position, id, why } => {
                    let named = id.map(|id| self.number(&id)).transpose()?;
                    self.hear_displaced(position, named, why)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn judge(&mut self, event: Event) -> Step {
        match event {
            Event::Get { token, outcome } => {
                let Some(waiting @ Waiting::Get { .. }) = self.waiting.remove(&token) else {
                    return wrong(format!("a read answers to {token}, which waits for none"));
                };
                self.judge_get(token, waiting, outcome)
            }
            Event::Put { token, outcome } => {
                let Some(Waiting::Put { number, nonce }) = self.waiting.remove(&token) else {
                    return wrong(format!("a put answers to {token}, which waits for none"));
                };
                self.note(format!("    put {number} nonce {nonce:x}: {outcome:?}"));
                self.count_put(outcome);
                if outcome == PutOutcome::Stored {
                    self.judge_durable(number, nonce)?;
                }
                Ok(())
            }
            Event::Demote { token, block } => self.hear_offer(token, block),
            Event::Awaited { token } => wrong(format!("{token} need not wait, and nobody does")),
            Event::Done { token, result } => {
                let Some(waiting) = self.waiting.remove(&token) else {
                    return wrong(format!("an answer to {token}, which waits for none"));
                };
                self.note(format!("    {token} is done: {result:?}"));
                let done = result.is_ok();
                match waiting {
                    Waiting::Remove { numbers, from } if done => {
                        self.tally.count("remove/done");
                        for number in numbers {
                            self.model.buried(number, from);
                        }
                    }
                    Waiting::Purge { from, whose } if done => {
                        self.tally.count(match whose {
                            None => "purge/done",
                            Some(_) => "purge/of one tenant done",
                        });
                        for number in self.purged(whose) {
                            self.model.buried(number, from);
                        }
                    }
                    Waiting::Flush { from } if done => {
                        self.tally.count("flush/done");
                        self.hear_flushed(from, None)?;
                    }
                    Waiting::Remove { .. } => self.tally.count("remove/failed"),
                    Waiting::Purge { .. } => self.tally.count("purge/failed"),
                    Waiting::Flush { .. } => self.tally.count("flush/failed"),
                    Waiting::Get { .. } | Waiting::Put { .. } => {
                        return wrong(format!("an answer of another kind to {token}"));
                    }
                }
                Ok(())
            }
        }
    }

    fn hear_flushed(&mut self, order: u64, told: Option<u64>) -> Step {
        let now = self.now;
        let crowded = self.engine().counters().handovers_crowded > 0;
        Ok(self.model.flushed(order, told, now, crowded)?)
    }

    /// A durable put that is answered later than at once is flushed.
    pub(super) fn judge_durable(&mut self, number: u64, nonce: u64) -> Step {
        let block = self.model.block(number);
        let is_durable = matches!(&block.now, Now::Known(known) if *known == nonce)
            && block.on_device
            && block.put(nonce).is_some_and(|put| !put.guaranteed);
        if is_durable {
            self.tally.count("put/stored durably");
            self.hear_flushed(u64::MAX, Some(nonce))?;
        }
        Ok(())
    }

    pub(super) fn judge_get(
        &mut self,
        token: u64,
        waiting: Waiting,
        outcome: Result<Copy, MissReason>,
    ) -> Step {
        let Waiting::Get {
            number,
            sections,
            candidates,
            puts_before,
            presence,
            in_doubt,
            in_memory: from_memory,
            times_gone,
            times_removed,
        } = waiting
        else {
            return wrong("only reads come here".into());
        };
        let lenient = self.model.lenient || self.is_unknown(number);
        let block = self.model.block(number);
        block.readers -= 1;
        let stayed = block.times_gone == times_gone;
        let was_removed = block.times_removed != times_removed;
        let since = block.puts.iter().filter(|put| put.order >= puts_before);
        let allowed: Vec<u64> = candidates
            .into_iter()
            .chain(since.map(|put| put.nonce))
            .collect();
        if block.readers == 0 {
            block.lingering.clear();
        }
        let shown = format!("{block:?}");
        match outcome {
            Ok(copy) => {
                let found = self.which_put(number, &sections, &copy);
                self.note(format!("    get {token}: block {number} is {found:x?}"));
                let Some(nonce) = found else {
                    return wrong(format!(
                        "block {number}: the bytes read are of no put of this block: {shown}"
                    ));
                };
                if !allowed.contains(&nonce) && !lenient {
                    return wrong(format!(
                        "block {number}: read put {nonce:x}, allowed are {allowed:x?}: {shown}"
                    ));
                }
                if was_removed && !lenient {
                    let block = self.model.block(number);
                    if block.put(nonce).is_none_or(|put| put.order < puts_before) {
                        return wrong(format!(
                            "block {number} was removed during a read that found it all the same: {shown}"
                        ));
                    }
                }
                if self.model.promises.holds(number) {
                    self.tally.count("get/hit of what is promised");
                }
                self.tally.count(if from_memory {
                    "get/hit from memory"
                } else {
                    "get/hit from the device"
                });
                if sections.is_some() {
                    self.tally.count("get/hit of some sections");
                }
                // Answered by a put that came while it waited: that is a read of the put, too (of a handover,
                // maybe its only one). What was there when it was asked was noted then.
                let block = self.model.block(number);
                if block.put(nonce).is_some_and(|put| put.order >= puts_before) {
                    self.tally.count("get/answered by a later put");
                    self.model.read(number, sections.as_ref());
                }
                let block = self.model.block(number);
                if let Now::OneOf(known) = &block.now {
                    self.tally.count("get/hit after a restart");
                    if stayed && known.contains(&nonce) {
                        let durable = self.disk_is_durable;
                        self.model.pinned(number, nonce, durable);
                    }
                }
                if sections.is_none() && token.is_multiple_of(16) && self.held.len() < 4 {
                    self.held.push(Held {
                        copy,
                        number,
                        nonce,
                    });
                }
                Ok(())
            }
            Err(reason) => {
                self.note(format!(
                    "    get {token}: block {number} is a miss, {reason}"
                ));
                self.tally.count(&format!("miss/{reason}"));
                // What is read stays as it is until the read is over, whatever becomes of the block.
                if reason == MissReason::Corrupt && !in_doubt && !lenient && self.harm.is_none() {
                    return wrong(format!(
                        "a read of block {number} found other bytes and no fault struck: {shown}"
                    ));
                }
                // A read of a copy that has moved meanwhile costs nothing but itself.
                let unix_s = self.model.unix_s;
                let over = {
                    let puts = &self.model.block(number).puts;
                    puts.iter().any(|put| put.is_over(unix_s))
                };
                if reason == MissReason::Expired && !over && !lenient {
                    return wrong(format!(
                        "block {number} is said to have expired at {unix_s}: {shown}"
                    ));
                }
                let told = matches!(reason, MissReason::Expired | MissReason::Deadline);
                if presence == Presence::Over && !told && !lenient {
                    return wrong(format!(
                        "block {number} has expired and is a miss, {reason}: {shown}"
                    ));
                }
                let misread = reason == MissReason::Corrupt && self.a_fault_touched(number);
                let deserved = misread
                    || matches!(presence, Presence::Absent | Presence::Over)
                    || presence == Presence::ThereOrOver && reason == MissReason::Expired
                    || !stayed
                    || matches!(reason, MissReason::Overloaded | MissReason::Deadline)
                    || reason == MissReason::WrongFormat && sections.is_some();
                if !deserved && !lenient {
                    return wrong(format!(
                        "block {number} was there all the time and is a miss, {reason}: {shown}"
                    ));
                }
                Ok(())
            }
        }
    }

    /// Whether a fault touched any place where this block lay.
    pub(super) fn a_fault_touched(&self, number: u64) -> bool {
        let puts = self.model.blocks.get(&number).map(|block| &block.puts);
        let stored = puts
            .into_iter()
            .flatten()
            .map(|put| payload::stored_bytes(&put.lengths));
        let bytes = stored.max().unwrap_or(0);
        let pages = self.superblock.segment_pages();
        self.model.positions.iter().any(|(position, known)| {
            let offset = self
                .superblock
                .offset(0, position / pages, position % pages);
            *known == number && self.harm.touched(&(offset..offset + bytes))
        })
    }

    /// The put whose bytes these are.
    pub(super) fn which_put(
        &mut self,
        number: u64,
        sections: &Option<Range<u16>>,
        copy: &Copy,
    ) -> Option<u64> {
        let puts = &self.model.block(number).puts;
        let found = puts.iter().rev().find(|put| {
            let wanted = sections.clone().unwrap_or(0..put.lengths.len() as u16);
            copy.sections.len() == wanted.len()
                && copy.sections.iter().zip(wanted).all(|(section, at)| {
                    put.lengths.get(usize::from(at)) == Some(&section.len)
                        && section.index == at
                        && *copy.section(section)
                            == payload::section(number, put.nonce, usize::from(at), section.len)[..]
                })
        });
        found.map(|put| put.nonce)
    }

    /// Slow readers look at their bytes again and let go.
    pub(crate) fn let_go(&mut self) -> Step {
        for Held {
            copy,
            number,
            nonce,
        } in std::mem::take(&mut self.held)
        {
            if self.which_put(number, &None, &copy) != Some(nonce) {
                return wrong(format!(
                    "the bytes of block {number} changed in its reader's hands"
                ));
            }
        }
        Ok(())
    }
}
