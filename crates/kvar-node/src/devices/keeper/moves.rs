//! One block on its way from a device that leaves to its next owner, and removes that meet it.
//!
//! ```text
//!   Looking ──> Reading ──> Beginning ──> Committing ──> there
//!      │ there already                        │ removed meanwhile
//!      └──> there                             └──> Removing ──> from the start
//! ```
//!
//! A block that is being removed waits before it is looked at and before it is read.
//!
//! Each step is an ask of an engine, as links ask; the answer comes back to the keeper under the
//! step's own number.
//!
//! What must always be true: memory that was reserved goes back as a commit or an abort; a remove is
//! answered only when nothing that it took is on its way.
//!
//! What is absent: which blocks, and how fast (`leaving`).

use super::Keeper;
use crate::devices::removal::Removed;
use crate::mail::{Answer, Ask, EngineKey, KEEPER, Mail, Origin, Ticket};
use kvar_base::{Clock as _, MissReason, Moment, PutOutcome, Refusal};
use kvar_engine::{Copy, GetRequest, PutHints, PutRequest, ReadHints, SurveyedBlock, Touch};
use std::time::Duration;

/// How long one step of a move may take; a device that does not answer is given more by the next try.
const STEP_DEADLINE: Duration = Duration::from_secs(10);

pub(super) struct Block {
    pub(super) block: SurveyedBlock,
    pub(super) tries: u32,
}

pub(super) enum Step {
    Looking,
    Reading,
    Beginning(Copy),
    Committing(EngineKey),
    Removing,
}

pub(super) struct Move {
    pub(super) block: Block,
    pub(super) step: Step,
    /// A remove came while it was under way.
    pub(super) is_spoiled: bool,
}

impl Move {
    /// Whether it may be visible where it goes although a remove that is not answered yet took it.
    pub(super) fn holds_up_a_remove(&self) -> bool {
        match self.step {
            Step::Committing(_) => self.is_spoiled,
            Step::Removing => true,
            Step::Looking | Step::Reading | Step::Beginning(_) => false,
        }
    }
}

impl Keeper {
    pub(super) fn ask_engine(&self, engine: EngineKey, operation: u64, ask: Ask) {
        let thread = KEEPER;
        let origin = Origin { thread, operation };
        self.post
            .send(engine.thread, Mail::Ask(origin, engine, ask));
    }

    fn step(&mut self, at: usize, engine: EngineKey, ask: Ask, block: Block, step: Step) {
        let operation = self.next_move;
        self.next_move += 1;
        if let Some(leaving) = &mut self.lives[at].leaving {
            let is_spoiled = false;
            let under_way = Move {
                block,
                step,
                is_spoiled,
            };
            leaving.moves.insert(operation, under_way);
            self.ask_engine(engine, operation, ask);
        }
    }

    /// Who has it afterwards: another device of the same tier, or one of the other.
    fn destination(&self, at: usize, block: &Block) -> Option<EngineKey> {
        let tier = self.table.find(self.lives[at].uuid)?.tier;
        self.afterwards.as_ref()?.owner_in(tier, &block.block.id)
    }

    pub(super) fn look(&mut self, at: usize, block: Block) {
        if self.is_being_removed(&block) {
            return self.hold(at, block);
        }
        let now = self.clock.now();
        match self.destination(at, &block) {
            Some(to) => {
                let ask = Ask::Stat(block.block.id);
                self.step(at, to, ask, block, Step::Looking);
            }
            None => {
                if let Some(leaving) = &mut self.lives[at].leaving {
                    leaving.again(block, now);
                }
            }
        }
    }

    /// An engine has answered one of the keeper's moves.
    pub(super) fn on_moved(&mut self, operation: u64, answer: Answer) {
        let now = self.clock.now();
        let found = self.lives.iter_mut().enumerate().find_map(|(at, live)| {
            let under_way = live.leaving.as_mut()?.moves.remove(&operation)?;
            Some((at, under_way))
        });
        let Some((at, under_way)) = found else {
            // Its device went meanwhile; memory that was reserved goes back.
            return self.give_back(answer);
        };
        let Move {
            block,
            step,
            is_spoiled,
        } = under_way;
        let id = block.block.id;
        match (step, answer) {
            (Step::Looking, Answer::Stat(_)) if self.is_being_removed(&block) => {
                self.hold(at, block);
            }
            (Step::Looking, Answer::Stat(Ok(_))) => self.is_there(at, 0),
            (Step::Looking, Answer::Stat(Err(_))) => self.read_block(at, block, now),
            (Step::Reading | Step::Beginning(_), answer) if is_spoiled => {
                self.give_back(answer);
                self.put_back(at, block);
            }
            (Step::Reading, Answer::Get(Ok(copy))) => self.begin_put(at, block, copy, now),
            (Step::Reading, Answer::Get(Err(reason))) => match reason {
                MissReason::Absent
                | MissReason::Removed
                | MissReason::Expired
                | MissReason::Evicted => {}
                MissReason::Corrupt => self.is_lost(at),
                _ => self.try_again(at, block, now),
            },
            (Step::Beginning(copy), Answer::PutBegun(Ok(ticket))) => {
                self.commit(at, block, &copy, ticket);
            }
            (Step::Beginning(_), Answer::PutBegun(Err(outcome))) => match outcome {
                PutOutcome::Refused(Refusal::TooBig | Refusal::WrongFormat) => self.is_lost(at),
                // Who is at it may give up.
                PutOutcome::Refused(_) | PutOutcome::InProgress => {
                    self.try_again(at, block, now);
                }
                PutOutcome::Exists | PutOutcome::Stored => self.is_there(at, 0),
            },
            (Step::Committing(to), Answer::Put(PutOutcome::Stored)) if is_spoiled => {
                // Whoever removed it has not been answered yet: it goes before he is.
                self.step(at, to, Ask::Remove(vec![id]), block, Step::Removing);
            }
            (Step::Committing(_), Answer::Put(outcome)) => match outcome {
                PutOutcome::Stored => self.is_there(at, u64::from(block.block.stored_bytes)),
                PutOutcome::Refused(_) | PutOutcome::InProgress => {
                    self.try_again(at, block, now);
                }
                PutOutcome::Exists => self.is_there(at, 0),
            },
            (Step::Removing, Answer::Done(result)) => {
                if let Err(text) = result {
                    self.fail_notes(at, &text);
                }
                self.put_back(at, block);
            }
            (_, answer) => {
                debug_assert!(false, "an answer that fits no step");
                self.give_back(answer);
            }
        }
        self.answer_notes();
    }

    fn is_there(&mut self, at: usize, bytes: u64) {
        if let Some(leaving) = &mut self.lives[at].leaving {
            leaving.moved.blocks += 1;
            leaving.moved.bytes += bytes;
        }
    }

    fn is_lost(&mut self, at: usize) {
        if let Some(leaving) = &mut self.lives[at].leaving {
            leaving.moved.lost_blocks += 1;
        }
    }

    fn try_again(&mut self, at: usize, block: Block, now: Moment) {
        if let Some(leaving) = &mut self.lives[at].leaving {
            leaving.again(block, now);
        }
    }

    fn put_back(&mut self, at: usize, block: Block) {
        if let Some(leaving) = &mut self.lives[at].leaving {
            leaving.put_back(block);
        }
    }

    fn hold(&mut self, at: usize, block: Block) {
        if let Some(leaving) = &mut self.lives[at].leaving {
            leaving.held.push(block);
        }
    }

    fn read_block(&mut self, at: usize, block: Block, now: Moment) {
        let live = &mut self.lives[at];
        let shard = block.block.id.shard(live.engines.len() as u32);
        let from = live.engines[shard as usize];
        if let Some(leaving) = &mut live.leaving {
            // From now on, not from when it last had something to do: no burst.
            let bytes = f64::from(block.block.stored_bytes);
            let pause = Duration::from_secs_f64(bytes / leaving.rate_bytes_per_s as f64);
            leaving.not_before = leaving.not_before.max(now).after(pause);
        }
        let request = GetRequest {
            id: block.block.id,
            sections: None,
            deadline: now.after(STEP_DEADLINE),
            touch: Touch::NONE,
        };
        let ask = Ask::Get(request, ReadHints::default());
        self.step(at, from, ask, block, Step::Reading);
    }

    fn begin_put(&mut self, at: usize, block: Block, copy: Copy, now: Moment) {
        let hints = block.block.hints;
        let unix_s = self.unix_at_start_s + now.0 / 1_000_000;
        let ttl_s = match u64::from(hints.expires_unix_s) {
            0 => None,
            expires if expires <= unix_s => return,
            expires => u32::try_from(expires - unix_s).ok(),
        };
        let Some(to) = self.destination(at, &block) else {
            return self.try_again(at, block, now);
        };
        self.hear(&block, false);
        let ask = Ask::PutBegin(PutRequest {
            id: block.block.id,
            sections: copy
                .sections
                .iter()
                .map(|section| (section.len, section.check))
                .collect(),
            hints: PutHints {
                request: 0,
                depth: hints.depth,
                ephemeral: false,
                ttl_s,
                class: hints.class,
                recompute_us: hints.recompute_us,
                handover: hints.handover,
                tenant: hints.tenant,
                is_asked: true,
                moved: Some(copy.moved),
            },
            durable: false,
            deadline: now.after(STEP_DEADLINE),
        });
        self.step(at, to, ask, block, Step::Beginning(copy));
    }

    fn commit(&mut self, at: usize, block: Block, copy: &Copy, ticket: Ticket) {
        let Ticket { engine, mut ticket } = ticket;
        for (number, section) in copy.sections.iter().enumerate() {
            let place = ticket.section_range(number);
            ticket.buffer_mut()[place].copy_from_slice(copy.section(section));
        }
        self.hear(&block, true);
        let ask = Ask::PutCommit(ticket);
        self.step(at, engine, ask, block, Step::Committing(engine));
    }

    fn hear(&self, block: &Block, is_commit: bool) {
        if let Some(hook) = &self.moving {
            hook(block.block.id, is_commit);
        }
    }

    fn give_back(&self, answer: Answer) {
        if let Answer::PutBegun(Ok(Ticket { engine, ticket })) = answer {
            self.ask_engine(engine, u64::MAX, Ask::PutAbort(ticket));
        }
    }

    // ---- removes ----------------------------------------------------------------------------

    /// Blocks are about to be removed: what moves of them at this moment is given up, and nothing of
    /// them begins to move until [`removal_ends`](Self::removal_ends).
    pub(super) fn removal_begins(&mut self, number: u64, removed: Removed) {
        for leaving in self.lives.iter_mut().filter_map(|it| it.leaving.as_mut()) {
            for under_way in leaving.moves.values_mut() {
                // One that only looks has read nothing yet; it is held before it does.
                let has_read = !matches!(under_way.step, Step::Looking);
                under_way.is_spoiled |= has_read && removed.names(&under_way.block.block);
            }
        }
        self.removals.insert(number, removed);
    }

    /// Every engine has answered, or nobody was told that it is done.
    pub(super) fn removal_ends(&mut self, number: u64) {
        self.removals.remove(&number);
        for leaving in self.lives.iter_mut().filter_map(|it| it.leaving.as_mut()) {
            leaving.release();
        }
    }

    fn is_being_removed(&self, block: &Block) -> bool {
        self.removals.values().any(|it| it.names(&block.block))
    }

    /// Whether a remove must wait until what it spoiled is out of the way; it is answered later then.
    pub(super) fn must_wait_for_moves(&mut self, origin: Origin) -> bool {
        let Some(leaving) = self.lives.iter_mut().find_map(|it| it.leaving.as_mut()) else {
            return false;
        };
        let waits = leaving.moves.values().any(Move::holds_up_a_remove);
        if waits {
            leaving.notes.push(origin);
        }
        waits
    }

    fn fail_notes(&mut self, at: usize, text: &str) {
        let notes = match &mut self.lives[at].leaving {
            Some(leaving) => std::mem::take(&mut leaving.notes),
            None => return,
        };
        for origin in notes {
            self.answer_note(origin, Err(text.to_owned()));
        }
    }

    /// Answers removes that wait, once nothing that they spoiled is on its way.
    fn answer_notes(&mut self) {
        let Some(leaving) = self.lives.iter_mut().find_map(|it| it.leaving.as_mut()) else {
            return;
        };
        if leaving.notes.is_empty() || leaving.moves.values().any(Move::holds_up_a_remove) {
            return;
        }
        for origin in std::mem::take(&mut leaving.notes) {
            self.answer_note(origin, Ok(0));
        }
    }

    pub(super) fn answer_note(&self, origin: Origin, noted: Result<u64, String>) {
        let answer = Mail::Answer(origin.operation, Answer::Done(noted));
        self.post.send(origin.thread, answer);
    }
}
