//! What reclaim does not keep is offered to the tier below before it is dropped.
//!
//! ```text
//!   Deciding ── not kept ──> down ── from memory, or read and verified ──> offered ── Demote ──> (caller)
//!                             │                                              │                      │
//!                             │ time is up, the log stands still,            │          demoted() <─┘
//!                             │ nobody below                                 ▼
//!                             └────────────────> dropped <── refused ──── answered ── arrived ──> entry goes
//! ```
//!
//! What must always be true: a block stays readable here until it is flushed below, and its segment
//! is not free before; an offer is made of what the index leads to at that moment, and never of what
//! was removed or is over; a reclaim ends within [`TIME_MAX`] of its first offer, and sooner when puts
//! wait for its segment; what is not answered in time is given up here, and nothing more is offered
//! before it is answered.
//!
//! Left to others: whether it is worth a place below (`take`), how it gets there (the caller), what
//! is kept here (`reclaim`).

use super::read::{MoveRead, cut};
use super::reclaim::Stage;
use super::types::{Demoted, Demotion, Event, Moved, Standing};
use super::write::stored_bytes;
use super::{Counters, Displaced, Shard};
use crate::dram::State;
use crate::index::Entry;
use crate::layout::{ImagePlan, RecordHints};
use crate::mutation::{Check, is_disabled};
use kvar_base::{BlockId, Moment};
use kvar_io::Buffer;
use std::collections::{HashSet, VecDeque};
use std::time::Duration;

/// How long a reclaim may offer blocks: a 64 MiB segment to a device that takes 32 MiB a second.
pub(super) const TIME_MAX: Duration = Duration::from_secs(2);
/// How long the log may stand still for it, so that a remove or a flush that needs a place in it is
/// answered.
const STALL_MAX: Duration = Duration::from_millis(200);
/// Bytes on offer at once, or one block: what a flush of the tier below is worth.
const OFFERED_BYTES_MAX: u64 = 8 << 20;
/// Blocks on offer at once: they come to the shard below in one go, which verifies each (some 10 us).
const OFFERS_MAX: usize = 64;

/// A block that is on offer, or is being read for that.
pub(super) struct Offer {
    id: BlockId,
    entry: Entry,
    hints: RecordHints,
    bytes: u64,
    /// Reclaim did not wait for the answer.
    is_given_up: bool,
}

/// How far a reclaim is with what goes down.
#[derive(Default)]
pub(super) struct Descent {
    /// What is still to be offered.
    pub(super) waiting: VecDeque<(BlockId, Entry, RecordHints)>,
    /// What is being read to be offered.
    reads: Vec<(BlockId, Entry, RecordHints)>,
    /// When the first offer was made.
    since: Option<Moment>,
    /// Since when the log has nowhere to write.
    stalled_since: Option<Moment>,
    /// What was promised meanwhile and is written on instead.
    stays: HashSet<BlockId>,
    /// Nobody is below any more.
    is_alone: bool,
    /// It was given up: what is still being read is dropped.
    is_over: Option<NotDemoted>,
}

/// Why a block did not get there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotDemoted {
    NotWorth,
    Limit,
    Busy,
    Late,
    Gone,
    Failed,
}

impl NotDemoted {
    /// Why it did not, if so.
    pub(super) fn of(outcome: Demoted) -> Option<Self> {
        match outcome {
            Demoted::Stored | Demoted::Exists => None,
            Demoted::NotWorth => Some(Self::NotWorth),
            Demoted::Limit => Some(Self::Limit),
            Demoted::Busy => Some(Self::Busy),
            Demoted::Gone => Some(Self::Gone),
            Demoted::Failed => Some(Self::Failed),
        }
    }
}

impl Counters {
    pub(super) fn count_not_demoted(&mut self, why: NotDemoted) {
        let counter = match why {
            NotDemoted::NotWorth => &mut self.not_demoted_not_worth,
            NotDemoted::Limit => &mut self.not_demoted_limit,
            NotDemoted::Busy => &mut self.not_demoted_busy,
            NotDemoted::Late => &mut self.not_demoted_late,
            NotDemoted::Gone => &mut self.not_demoted_gone,
            NotDemoted::Failed => &mut self.not_demoted_failed,
        };
        *counter += 1;
    }
}

impl Shard {
    pub(crate) fn set_standing(&mut self, standing: Standing) {
        if self.standing == Standing::Above && standing != Standing::Above {
            // What is safe in a tier that goes is in memory alone from now on.
            self.dram.forget_below();
        }
        self.standing = standing;
        if let Some(reclaim) = &mut self.reclaim {
            reclaim.descent.is_alone = standing != Standing::Above;
        }
    }

    /// Whether a block that this device does not keep, or does not take, is to be offered.
    pub(super) fn goes_down(&self, id: &BlockId, hints: &RecordHints) -> bool {
        let is_ephemeral = || self.dram.get(id).is_some_and(|it| it.ephemeral);
        self.standing == Standing::Above
            && self.shutdown.is_none()
            && !hints.handover
            && !is_ephemeral()
    }

    /// Whether the tier below has not answered yet what was given up: it is asked for nothing more.
    pub(super) fn below_is_late(&self) -> bool {
        self.offers.values().any(|offer| offer.is_given_up) || self.let_down.is_late(self.now)
    }

    /// Brings what goes down to the caller, a window at a time.
    pub(super) fn step_descent(&mut self) {
        self.bound_descent();
        loop {
            let Some(reclaim) = &mut self.reclaim else {
                return;
            };
            let descent = &reclaim.descent;
            let begins = matches!(reclaim.stage, Stage::Moving)
                && reclaim.kept.is_empty()
                && !descent.is_alone
                && self.shutdown.is_none();
            if !begins {
                return;
            }
            let Some((_, entry, _)) = descent.waiting.front() else {
                return;
            };
            let bytes = stored_bytes(entry.len);
            let offered: u64 = self.offers.values().map(|offer| offer.bytes).sum();
            let reading = descent
                .reads
                .iter()
                .map(|(_, entry, _)| stored_bytes(entry.len));
            let reading: u64 = reading.sum();
            let under_way = self.offers.len() + descent.reads.len();
            let fits = offered + reading + bytes <= OFFERED_BYTES_MAX;
            if under_way > 0 && (!fits || under_way >= OFFERS_MAX) {
                return;
            }
            let Some((id, entry, hints)) = reclaim.descent.waiting.pop_front() else {
                return;
            };
            reclaim.descent.since.get_or_insert(self.now);
            self.begin_offer(id, entry, hints);
        }
    }

    fn begin_offer(&mut self, id: BlockId, entry: Entry, hints: RecordHints) {
        if !self.may_be_offered(&id, &entry, &hints) {
            return;
        }
        let resident = self.dram.get(&id);
        let resident = resident.filter(|resident| resident.state == State::Clean);
        if let Some(resident) = resident {
            let copy = cut(&resident.sections, resident.version, &resident.image, None);
            return match copy {
                Ok(copy) => self.offer(id, entry, hints, copy),
                Err(_) => self.drop_not_demoted(&id, &entry, &hints, NotDemoted::Failed),
            };
        }
        if !self.read_to_move(id, entry, hints, true) {
            return self.drop_not_demoted(&id, &entry, &hints, NotDemoted::Busy);
        }
        if let Some(reclaim) = &mut self.reclaim {
            reclaim.descent.reads.push((id, entry, hints));
        }
    }

    /// A read for an offer is over; `plan`: its bytes are what they should be.
    pub(super) fn read_to_offer(
        &mut self,
        read: &MoveRead,
        buffer: Buffer,
        plan: Option<&ImagePlan>,
    ) {
        let MoveRead {
            id, entry, hints, ..
        } = *read;
        let is_over = self.reclaim.as_mut().and_then(|reclaim| {
            reclaim.descent.reads.retain(|read| read.0 != id);
            reclaim.descent.is_over
        });
        // What fails its check has lost its entry already.
        let Some(plan) = plan.filter(|_| self.may_be_offered(&id, &entry, &hints)) else {
            return;
        };
        if let Some(why) = is_over {
            return self.drop_not_demoted(&id, &entry, &hints, why);
        }
        if self.shutdown.is_some() {
            return self.wait_for_below(id, entry, hints);
        }
        let version = kvar_base::check::version(plan.sections.iter().map(|it| it.check));
        match cut(&plan.sections, version, &buffer.freeze(), None) {
            Ok(copy) => self.offer(id, entry, hints, copy),
            Err(_) => self.drop_not_demoted(&id, &entry, &hints, NotDemoted::Failed),
        }
    }

    /// Whether a block that was to go down when it was decided about still is: it may have left since,
    /// have been promised, or have expired while it waited or was read. What is over goes now.
    fn may_be_offered(&mut self, id: &BlockId, entry: &Entry, hints: &RecordHints) -> bool {
        if !self.still_leads(id, entry) || self.stays(id) {
            return false;
        }
        let is_over = self.is_over(self.now, id, hints.expires_unix_s);
        if is_over {
            self.drop_expired(id, entry.position);
        }
        !is_over
    }

    fn offer(&mut self, id: BlockId, entry: Entry, hints: RecordHints, copy: super::Copy) {
        let token = self.next_offer;
        self.next_offer += 1;
        let known = self.find(&id).map_or(entry, |(_, now)| now);
        let moved = Moved {
            class: known.class(),
            age_bytes: self.keep.age_bytes(known.stamp),
        };
        let offer = Offer {
            id,
            entry,
            hints,
            bytes: stored_bytes(entry.len),
            is_given_up: false,
        };
        self.offers.insert(token, offer);
        self.counters.offered += 1;
        let block = Demotion {
            id,
            copy,
            hints,
            moved,
        };
        let block = Box::new(block);
        self.events.push(Event::Demote { token, block });
        if is_disabled(Check::FlushedBelow) && self.index.remove_at(&id, entry.position) {
            self.note_displaced(&id, entry.position, Displaced::Demoted);
        }
    }

    pub(crate) fn demoted(&mut self, token: u64, outcome: Demoted) {
        if self.let_down_answered(token, outcome) {
            return;
        }
        let Some(offer) = self.offers.remove(&token) else {
            return;
        };
        let Offer {
            id, entry, hints, ..
        } = offer;
        // Given up, removed, moved on, or promised meanwhile: nothing here is about it any more.
        if offer.is_given_up || !self.still_leads(&id, &entry) || self.stays(&id) {
            return;
        }
        match NotDemoted::of(outcome) {
            None => self.drop_demoted(&id, &entry, outcome == Demoted::Exists),
            Some(NotDemoted::Gone) => self.wait_for_below(id, entry, hints),
            Some(why) => self.drop_not_demoted(&id, &entry, &hints, why),
        }
    }

    fn still_leads(&self, id: &BlockId, entry: &Entry) -> bool {
        let found = self.index.find(id);
        found.is_some_and(|(_, now)| now.position == entry.position)
    }

    /// The tier below is stopping: if this shard is, too, the block stays where it is.
    fn wait_for_below(&mut self, id: BlockId, entry: Entry, hints: RecordHints) {
        if let Some(reclaim) = &mut self.reclaim {
            reclaim.descent.waiting.push_front((id, entry, hints));
            reclaim.descent.is_alone = true;
        }
    }

    fn stays(&self, id: &BlockId) -> bool {
        let reclaim = self.reclaim.as_ref();
        reclaim.is_some_and(|reclaim| reclaim.descent.stays.contains(id))
    }

    /// What is known of a block on its way down.
    fn descending(&self, id: &BlockId) -> Option<(Entry, RecordHints)> {
        let descent = &self.reclaim.as_ref()?.descent;
        let waiting = descent.waiting.iter().find(|it| it.0 == *id);
        let waiting = waiting.map(|(_, entry, hints)| (*entry, *hints));
        let read = descent.reads.iter().find(|it| it.0 == *id);
        let read = read.map(|(_, entry, hints)| (*entry, *hints));
        let live = |offer: &&Offer| offer.id == *id && !offer.is_given_up;
        let offered = self.offers.values().find(live);
        let offered = offered.map(|offer| (offer.entry, offer.hints));
        let found = waiting.or(read).or(offered)?;
        (self.still_leads(id, &found.0) && !self.stays(id)).then_some(found)
    }

    /// Whether a block can be promised: one on its way down must find a place at the head of the log,
    /// too, which what is written meanwhile may have taken already.
    pub(super) fn may_stay(&self, id: &BlockId) -> bool {
        let Some((entry, _)) = self.descending(id) else {
            return true;
        };
        self.reclaim.as_ref().is_some_and(|reclaim| {
            let (room, _) = self.room_for_kept();
            reclaim.left_bytes() + stored_bytes(entry.len) <= room
                && reclaim.left_blocks() < self.records_for_kept()
        })
    }

    /// A block was promised: if it is on its way down it is written on like everything that is promised,
    /// whatever becomes of the offer.
    pub(super) fn keep_promised(&mut self, id: &BlockId) {
        if let Some((entry, hints)) = self.descending(id)
            && let Some(reclaim) = &mut self.reclaim
        {
            let bytes = stored_bytes(entry.len);
            self.budget.spend(bytes);
            reclaim.descent.waiting.retain(|waiting| waiting.0 != *id);
            reclaim.descent.stays.insert(*id);
            reclaim.keep(*id, entry, hints, bytes);
        }
    }

    fn drop_demoted(&mut self, id: &BlockId, entry: &Entry, existed: bool) {
        if !self.index.remove_at(id, entry.position) {
            return;
        }
        self.note_displaced(id, entry.position, Displaced::Demoted);
        self.counters.demoted += 1;
        self.counters.demoted_exists += u64::from(existed);
        self.counters.demoted_bytes += if existed { 0 } else { stored_bytes(entry.len) };
        match self.dram.get(id).map(|resident| resident.state) {
            // The copy in memory may go at any time: nothing is lost with it.
            Some(State::Clean) => self.dram.set_below(id),
            Some(_) => {}
            None => {
                self.let_go(id, entry.class());
                // A lease stays with the copy it was taken on, and there was no room to write this
                // one on (else it would not have been offered).
                self.counters.leased_dropped += u64::from(self.lose_lease(id));
            }
        }
    }

    fn drop_not_demoted(
        &mut self,
        id: &BlockId,
        entry: &Entry,
        hints: &RecordHints,
        why: NotDemoted,
    ) {
        if !self.index.remove_at(id, entry.position) {
            return;
        }
        self.counters.count_not_demoted(why);
        self.note_displaced(id, entry.position, Displaced::Reclaim);
        let is_short = !self.budget.has_plenty(0, Self::budget_time(self.now));
        let state = if is_short {
            State::Held
        } else {
            State::Volatile
        };
        self.drop_flash_copy(id, entry, hints, state);
    }

    /// As [`drop_not_demoted`](Self::drop_not_demoted), for want of an answer to what was offered before.
    pub(super) fn drop_late(&mut self, id: &BlockId, entry: &Entry, hints: &RecordHints) {
        self.drop_not_demoted(id, entry, hints, NotDemoted::Late);
    }

    /// Gives up what has not arrived when there is no time left, or nobody below.
    fn bound_descent(&mut self) {
        let is_exhausted = self.segments.is_exhausted();
        let is_pressed = self.dirty_bytes >= self.dram.put_limit_bytes(0) / 2;
        let (now, ends) = (self.now, self.shutdown.is_some());
        let Some(reclaim) = &mut self.reclaim else {
            return;
        };
        if !matches!(reclaim.stage, Stage::Moving) || reclaim.descent.is_over.is_some() {
            return;
        }
        let descent = &mut reclaim.descent;
        if is_exhausted {
            descent.stalled_since.get_or_insert(now);
        } else {
            descent.stalled_since = None;
        }
        let is_over = |since: Option<Moment>, span| since.is_some_and(|it| it.after(span) <= now);
        let why = if is_exhausted && ends {
            // What memory alone holds needs the segment.
            Some(NotDemoted::Gone)
        } else if ends {
            None
        } else if self.standing != Standing::Above {
            Some(NotDemoted::Gone)
        } else if is_over(descent.since, TIME_MAX)
            || is_over(descent.stalled_since, STALL_MAX)
            || is_exhausted && is_pressed
        {
            Some(if descent.is_alone {
                NotDemoted::Gone
            } else {
                NotDemoted::Late
            })
        } else {
            None
        };
        if let Some(why) = why {
            self.give_up_descent(why);
        }
    }

    fn give_up_descent(&mut self, why: NotDemoted) {
        let Some(reclaim) = &mut self.reclaim else {
            return;
        };
        reclaim.descent.is_over = Some(why);
        let mut left = std::mem::take(&mut reclaim.descent.waiting);
        let mut given_up: Vec<u64> = Vec::new();
        for (token, offer) in &mut self.offers {
            if !offer.is_given_up {
                offer.is_given_up = true;
                given_up.push(*token);
            }
        }
        given_up.sort_unstable();
        for token in given_up {
            let offer = &self.offers[&token];
            left.push_back((offer.id, offer.entry, offer.hints));
        }
        for (id, entry, hints) in left {
            if !self.stays(&id) {
                self.drop_not_demoted(&id, &entry, &hints, why);
            }
        }
    }

    /// Whether nothing of this reclaim is on its way down.
    pub(super) fn has_descended(&self) -> bool {
        let Some(reclaim) = &self.reclaim else {
            return true;
        };
        let descent = &reclaim.descent;
        descent.waiting.is_empty()
            && descent.reads.is_empty()
            && (self.offers.values().all(|offer| offer.is_given_up)
                || is_disabled(Check::FlushedBelow))
    }

    /// When [`bound_descent`](Self::bound_descent) has something to do.
    pub(super) fn descent_timer(&self) -> Option<Moment> {
        let reclaim = self.reclaim.as_ref()?;
        let is_moving = matches!(reclaim.stage, Stage::Moving) && self.shutdown.is_none();
        if !is_moving || self.has_descended() {
            return None;
        }
        let descent = &reclaim.descent;
        let stall = descent.stalled_since.map(|since| since.after(STALL_MAX));
        let time = descent.since.map(|since| since.after(TIME_MAX));
        [stall, time].into_iter().flatten().min()
    }
}
