//! What leaves the device: whose copy it was, and whether there was a reason.
//!
//! | the journal names | history lost | whose entry it was |
//! |---|---|---|
//! | a block | | that one's |
//! | a position alone | no | that of the block which was written there last |
//! | a position alone | yes | that of each block which lay there once and has no entry any more |
//!
//! The last row: a lost header lets recovery find the older blocks of a segment beside those that were
//! written there since, and the index has no ids. The store is asked then, as it is after a restart.
//!
//! What must always be true: an entry goes only for a reason that the state of the store, a fault or a
//! call bears out.

use super::{Step, World, wrong};
use crate::model::Presence;
use crate::payload;
use crate::promises::Reason;
use kvar_engine::{Displaced, Tier};

/// Share of the index in use, in percent, below which no entry should have to make room.
const BUCKET_LOAD_PERCENT_MIN: u64 = 20;

impl World {
    /// The index does not lead to a position any more. `named`: whose entry the journal says it was.
    pub(super) fn hear_displaced(
        &mut self,
        position: u32,
        named: Option<u64>,
        why: Displaced,
    ) -> Step {
        self.displaced += 1;
        self.note(format!("    gone from position {position}: {why:?}"));
        self.check_reason(position, why)?;
        let placed = self.model.positions.get(&position).copied();
        if named.is_none() && self.harm.history_lost {
            return self
                .without_entry(position)
                .into_iter()
                .try_for_each(|number| self.hear_displaced_of(number, position, why, true));
        }
        let mut excused = self.harm.history_lost;
        if named.is_some() && named != placed || placed.is_none() {
            if self.harm.is_none() && !self.model.lenient {
                return wrong(format!(
                    "position {position} is given up as that of {named:?}, and {placed:?} was placed there"
                ));
            }
            self.tally.count("left/device, an entry that a fault left");
            excused = true;
        }
        match named.or(placed) {
            Some(number) => self.hear_displaced_of(number, position, why, excused),
            None => Ok(()),
        }
    }

    /// Blocks that may have had an entry for a position, and have none at all.
    fn without_entry(&mut self, position: u32) -> Vec<u64> {
        let mut numbers = self.model.may_lie_at(position);
        let now = self.now;
        // What is over has its entry all the same.
        self.engine().set_wall_clock(now, 0);
        numbers.retain(|number| {
            let id = self.id(*number);
            let stat = self.engine().stat(now, &id);
            stat.is_none_or(|stat| stat.tier == Tier::Dram)
        });
        let unix_s = self.unix_s();
        self.engine().set_wall_clock(now, unix_s);
        numbers
    }

    /// Whether the state of the store bears the reason out.
    fn check_reason(&mut self, position: u32, why: Displaced) -> Step {
        let now = self.now;
        let status = self.engine().status(now);
        self.tally.count(match why {
            Displaced::Bucket => "left/device, bucket",
            Displaced::Reclaim => "left/device, reclaim",
            Displaced::Corrupt => "left/device, corrupt",
            Displaced::Expired => "left/device, expired",
            Displaced::Refused => "left/device, refused",
            Displaced::Demoted => "left/device, demoted",
        });
        match why {
            Displaced::Bucket
                if status.flash_blocks * 100
                    < status.index_entries_max * BUCKET_LOAD_PERCENT_MIN
                    && !self.model.lenient =>
            {
                wrong(format!(
                    "position {position} lost its index entry although {} of {} are used",
                    status.flash_blocks, status.index_entries_max
                ))
            }
            Displaced::Reclaim | Displaced::Demoted
                if status.segments_free > 1 && !self.harm.refused =>
            {
                wrong(format!(
                    "position {position} was reclaimed although {} segments are free",
                    status.segments_free
                ))
            }
            Displaced::Refused if !self.harm.refused => wrong(format!(
                "position {position} is given up and the device refused nothing"
            )),
            _ => Ok(()),
        }
    }

    /// The copy of a block at a position is given up.
    fn hear_displaced_of(
        &mut self,
        number: u64,
        position: u32,
        why: Displaced,
        mut excused: bool,
    ) -> Step {
        match why {
            Displaced::Bucket | Displaced::Reclaim => drop(self.given_up_now.insert(number)),
            Displaced::Demoted => self.check_is_below(position, number)?,
            Displaced::Refused => {}
            Displaced::Expired => self.check_over(number, "left the device")?,
            Displaced::Corrupt => {
                let pages = self.superblock.segment_pages();
                let offset = self
                    .superblock
                    .offset(0, position / pages, position % pages);
                let puts = &self.model.block(number).puts;
                let stored = puts.iter().map(|put| payload::stored_bytes(&put.lengths));
                let bytes = stored.max().unwrap_or(0);
                excused |= self.harm.touched(&(offset..offset + bytes));
            }
        }
        self.model
            .displaced(number, position, why == Displaced::Corrupt, excused)?;
        let excuse = match why {
            Displaced::Corrupt | Displaced::Refused => Some(Reason::Corrupt),
            // With no segment open, right after a start on a full device, there is nowhere to go;
            // and what no record names any more cannot be carried on. If there is a tier below it goes
            // there, where the lease does not reach.
            Displaced::Reclaim | Displaced::Demoted
                if self.harm.refused || self.harm.history_touched || !self.has_placed =>
            {
                Some(Reason::Dropped)
            }
            Displaced::Reclaim | Displaced::Bucket | Displaced::Expired | Displaced::Demoted => {
                None
            }
        };
        self.hear_left(number, excuse)
    }

    /// A block left because it is over.
    pub(super) fn check_over(&mut self, number: u64, how: &str) -> Step {
        let presence = self.model.presence(number);
        let over = matches!(presence, Presence::Over | Presence::ThereOrOver);
        if !over && !self.is_unknown(number) && !self.model.lenient {
            let (unix_s, block) = (self.unix_s(), self.model.block(number));
            return wrong(format!(
                "block {number} {how} as expired at {unix_s} and is {presence:?}: {block:?}"
            ));
        }
        Ok(())
    }
}
