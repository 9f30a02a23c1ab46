//! The tier below as a world has it: it answers what is offered late, in any order, or never in this life.
//!
//! ```text
//!   Demote ── bytes of a put that may be seen? ──> open ── some turns ──> stored, there, refused, gone
//!                                                    └── never, but at rest
//! ```
//!
//! What must always be true: what is offered is there at that moment and is one complete put; an entry is
//! given up as demoted only after it was said to be stored below. What memory let go need not be flushed
//! any more once that was said of this very put, and no sooner.

use super::{Step, World, wrong};
use crate::dice::Dice;
use crate::model::Presence;
use kvar_engine::{Demoted, Demotion, Standing};
use std::collections::BTreeSet;

/// Most turns that an answer takes, if it comes.
const ANSWER_TURNS_MAX: u64 = 120;
/// In so many turns somebody takes the tier below away, or brings it back, once.
const CHANGE_TURNS: u64 = 700;

struct Offered {
    token: u64,
    number: u64,
    /// Which put it is of.
    nonce: u64,
    /// In which turn it is answered.
    due: u64,
    outcome: Demoted,
    /// Its memory is held until it is answered.
    _block: Box<Demotion>,
}

/// See the module.
pub(super) struct Below {
    dice: Dice,
    open: Vec<Offered>,
    /// Blocks that were said to be stored.
    stored: BTreeSet<u64>,
    standing: Standing,
    /// Everything is answered at once.
    pub(super) at_once: bool,
}

impl Below {
    /// Whether a block was said to be stored here.
    pub(super) fn has(&self, number: u64) -> bool {
        self.stored.contains(&number)
    }
}

impl World {
    /// From now on there is a tier below.
    pub(crate) fn put_something_below(&mut self, seed: u64) {
        self.below = Some(Below {
            dice: Dice::new(seed ^ 0xbe10),
            open: Vec::new(),
            stored: BTreeSet::new(),
            standing: Standing::Above,
            at_once: false,
        });
        self.engine().set_standing(Standing::Above);
    }

    /// A new life: nobody answers what the last one offered.
    pub(super) fn stand_above(&mut self) {
        let standing = self.below.as_mut().map(|below| {
            below.open.clear();
            below.standing
        });
        if let Some(standing) = standing {
            self.engine().set_standing(standing);
        }
    }

    /// A block is offered.
    pub(super) fn hear_offer(&mut self, token: u64, block: Box<Demotion>) -> Step {
        let number = self.number(&block.id)?;
        let presence = self.model.presence(number);
        // The journal is heard first: what was given up in the same moment was there when it was offered.
        let given_up = self.given_up_now.contains(&number);
        let lenient = self.model.lenient || self.is_unknown(number);
        if presence == Presence::Absent && !lenient && !given_up {
            return wrong(format!("block {number} is offered below and is not there"));
        }
        let mut candidates = self.model.candidates(number);
        if given_up {
            // Which of them it was is known no more: any that could be on the device.
            candidates.extend(self.model.block(number).survivors());
        }
        let found = self.which_put(number, &None, &block.copy);
        let Some(nonce) = found.filter(|nonce| candidates.contains(nonce) || lenient) else {
            return wrong(format!(
                "block {number}: the bytes offered are {found:x?}, allowed are {candidates:x?}"
            ));
        };
        self.tally.count("below/offered");
        if !self.model.block(number).on_device {
            self.tally.count("below/offered from memory alone");
        }
        let turns = self.turns;
        let Some(below) = &mut self.below else {
            return wrong(format!(
                "block {number} is offered and there is nobody below"
            ));
        };
        let outcome = match below.dice.below(40) {
            0..28 => Demoted::Stored,
            28..30 => Demoted::Exists,
            30..32 => Demoted::NotWorth,
            32..34 => Demoted::Busy,
            34 => Demoted::Limit,
            35 => Demoted::Gone,
            _ => Demoted::Failed,
        };
        let due = if below.dice.once_in(60) {
            u64::MAX
        } else {
            turns + below.dice.below(ANSWER_TURNS_MAX)
        };
        below.open.push(Offered {
            token,
            number,
            nonce,
            due,
            outcome,
            _block: block,
        });
        self.note(format!("    block {number} is offered below as {token}"));
        Ok(())
    }

    /// Answers what is due; now and then the tier comes or goes.
    pub(super) fn answer_from_below(&mut self) {
        let turns = self.turns;
        let Some(below) = &mut self.below else {
            return;
        };
        let changes = !below.at_once && below.dice.once_in(CHANGE_TURNS);
        if changes {
            below.standing = match below.standing {
                Standing::Above => Standing::Only,
                _ => Standing::Above,
            };
        }
        let standing = below.standing;
        let at_once = below.at_once;
        let (due, open): (Vec<Offered>, Vec<Offered>) = std::mem::take(&mut below.open)
            .into_iter()
            .partition(|offered| at_once || offered.due <= turns);
        below.open = open;
        if changes {
            self.note(format!("stands as {standing:?}"));
            self.engine().set_standing(standing);
        }
        for Offered {
            token,
            number,
            nonce,
            outcome,
            ..
        } in due
        {
            if outcome.has_arrived()
                && let Some(below) = &mut self.below
            {
                below.stored.insert(number);
                self.model.is_below(number, nonce);
            }
            self.tally.count(if outcome.has_arrived() {
                "below/arrived"
            } else {
                "below/refused"
            });
            self.note(format!("    {token}, block {number}, is {outcome:?} below"));
            let now = self.now;
            self.engine().demoted(now, token, outcome);
        }
    }

    /// An entry is given up because the block is below.
    pub(super) fn check_is_below(&self, position: u32, number: u64) -> Step {
        let is_there = self.below.as_ref().is_some_and(|below| below.has(number));
        if !is_there && !self.model.lenient {
            return wrong(format!(
                "position {position} (block {number}) is given up for the tier below, which was not said to \
                 have it"
            ));
        }
        Ok(())
    }
}
