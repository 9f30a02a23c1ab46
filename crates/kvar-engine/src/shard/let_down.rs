//! What memory lets go and this device does not take is offered to the tier below, straight from memory.
//!
//! ```text
//!   Held ── worth no place, or no room (`admit`) ──> Volatile, waiting ── turn ──> offered ── Demote ──> (caller)
//!                                                         │                          │           demoted() <─┘
//!              it left memory first, the tier is late ────┤                          ▼
//!              (counted); used again, asked to be         │                       answered
//!              written, over, removed (nothing to offer) ─┘     arrived: as one that is below; leaves when room is wanted
//!                                                               refused: as before, in memory alone
//! ```
//!
//! What must always be true: memory waits for no answer, a block that is on offer may leave it like any
//! other; what is offered is in memory alone at that moment, and never what was removed or is over; only what
//! is said to be flushed below is no more written by a flush; what lies in a tier that hangs is bounded, and
//! it is offered nothing more.
//!
//! Left to others: what is worth a place here (`admit`) and below (`take`); what reclaim gives up, whose
//! offers are counted apart so that neither keeps the other waiting (`demote`).

use super::demote::{NotDemoted, TIME_MAX};
use super::read::cut;
use super::types::{Demoted, Demotion, Event, Moved, Standing};
use super::{Resident, Shard};
use crate::dram::State;
use crate::mutation::{Check, is_disabled};
use kvar_base::{BlockId, FastMap, Moment};
use std::collections::VecDeque;

/// Bytes on offer at once, or one block: half of what reclaim may have there.
const OFFERED_BYTES_MAX: u64 = 4 << 20;
/// Blocks on offer at once.
const OFFERS_MAX: usize = 32;
/// Blocks that wait for their turn: more than leave memory before the first is answered. 40 bytes each.
const WAITING_MAX: usize = 4096;

/// A block that is on offer.
struct Offer {
    id: BlockId,
    /// Which put or read brought it.
    number: u64,
    bytes: u64,
    since: Moment,
}

/// What is on its way from memory to the tier below.
#[derive(Default)]
pub(super) struct LetDown {
    /// What is still to be offered, and which put or read brought it.
    waiting: VecDeque<(BlockId, u64)>,
    offers: FastMap<u64, Offer>,
}

impl LetDown {
    /// How many blocks wait for their turn or an answer.
    pub(super) fn under_way(&self) -> usize {
        self.waiting.len() + self.offers.len()
    }

    /// Whether the tier below owes an answer for so long that it is asked for nothing more.
    pub(super) fn is_late(&self, now: Moment) -> bool {
        let mut since = self.offers.values().map(|offer| offer.since);
        since.any(|since| since.after(TIME_MAX) <= now)
    }

    /// When there is something to offer although nothing happens.
    pub(super) fn timer(&self) -> Option<Moment> {
        (!self.waiting.is_empty() && self.offers.is_empty()).then_some(Moment(0))
    }

    fn has_room(&self, bytes: u64) -> bool {
        let offered: u64 = self.offers.values().map(|offer| offer.bytes).sum();
        let fits = offered + bytes <= OFFERED_BYTES_MAX && self.offers.len() < OFFERS_MAX;
        self.offers.is_empty() || fits
    }
}

impl Shard {
    /// It was decided that a block in memory gets no place on this device.
    pub(super) fn let_down(&mut self, id: &BlockId) {
        let Some(resident) = self.dram.get(id) else {
            return;
        };
        let (number, hints) = (resident.number, resident.hints);
        if !self.goes_down(id, &hints) {
            return;
        }
        if self.let_down.waiting.len() >= WAITING_MAX || self.below_is_late() {
            return self.counters.count_not_demoted(NotDemoted::Late);
        }
        self.let_down.waiting.push_back((*id, number));
    }

    /// Offers what waits, as far as the tier below keeps up.
    pub(super) fn step_let_down(&mut self) {
        while let Some((id, number)) = self.let_down.waiting.front().copied() {
            let why = match () {
                // What memory alone holds is written here.
                () if self.shutdown.is_some() => return self.let_down.waiting.clear(),
                () if self.standing != Standing::Above => Some(NotDemoted::Gone),
                () if self.below_is_late() => Some(NotDemoted::Late),
                () => match self.dram.get(&id) {
                    // It had to leave, or was removed meanwhile: nobody knows any more.
                    None => Some(NotDemoted::Late),
                    Some(it) if !self.may_be_let_down(&id, number, it) => None,
                    Some(it) if !self.let_down.has_room(it.image.padded_len() as u64) => return,
                    Some(it) => {
                        let block = self.demotion_of(&id, it);
                        block.map_or(Some(NotDemoted::Failed), |block| {
                            self.offer_from_memory(number, block);
                            None
                        })
                    }
                },
            };
            self.let_down.waiting.pop_front();
            if let Some(why) = why {
                self.counters.count_not_demoted(why);
            }
        }
    }

    /// Whether a block is still what it was decided to let go.
    fn may_be_let_down(&self, id: &BlockId, number: u64, resident: &Resident) -> bool {
        let is_it = resident.number == number && resident.state == State::Volatile;
        // One that was used again while it was on offer, and let go once more, is on offer already.
        let is_offered = (self.let_down.offers.values()).any(|offer| offer.number == number);
        let expires = resident.hints.expires_unix_s;
        is_it && !is_offered && !resident.is_below && !self.is_over(self.now, id, expires)
    }

    fn demotion_of(&self, id: &BlockId, resident: &Resident) -> Option<Box<Demotion>> {
        let copy = cut(&resident.sections, resident.version, &resident.image, None).ok()?;
        let moved = Moved {
            class: resident.class,
            age_bytes: self.keep.demand_bytes().saturating_sub(resident.used_at),
        };
        let (id, hints) = (*id, resident.hints);
        Some(Box::new(Demotion {
            id,
            copy,
            hints,
            moved,
        }))
    }

    fn offer_from_memory(&mut self, number: u64, block: Box<Demotion>) {
        let token = self.next_offer;
        self.next_offer += 1;
        let id = block.id;
        let offer = Offer {
            id,
            number,
            bytes: block.copy.bytes.padded_len() as u64,
            since: self.now,
        };
        self.let_down.offers.insert(token, offer);
        self.counters.offered += 1;
        self.counters.offered_from_memory += 1;
        self.events.push(Event::Demote { token, block });
        if is_disabled(Check::FlushedBelow) {
            self.dram.set_below(&id);
        }
    }

    /// What became of something that memory let go; whether it was that.
    pub(super) fn let_down_answered(&mut self, token: u64, outcome: Demoted) -> bool {
        let Some(offer) = self.let_down.offers.remove(&token) else {
            return false;
        };
        if let Some(why) = NotDemoted::of(outcome) {
            self.counters.count_not_demoted(why);
            return true;
        }
        let existed = outcome == Demoted::Exists;
        self.counters.demoted += 1;
        self.counters.demoted_from_memory += 1;
        self.counters.demoted_exists += u64::from(existed);
        self.counters.demoted_bytes += if existed { 0 } else { offer.bytes };
        // One that was used again, or is written because somebody asked for that, goes its own way.
        let is_it = |it: &Resident| it.number == offer.number && it.state == State::Volatile;
        if self.dram.get(&offer.id).is_some_and(is_it) {
            self.dram.set_below(&offer.id);
        }
        true
    }
}
