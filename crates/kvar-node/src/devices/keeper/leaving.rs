//! A device leaves: what is on it moves to the others first, then it is retired.
//!
//! ```text
//!   Copying ── every segment read ──> Flushing ──> Last ── what came meanwhile ──> retired
//!     │ it serves as before             │ new blocks and reads go to the others; it is sealed, and only
//!                                          hears of removes
//! ```
//!
//! Blocks move by the calls that links use: read at the engine that has it, put at the engine that
//! will own it. So both verify every byte, and nothing on the data path knows of it. Until the first
//! round is over reads hit where the blocks are; then they hit where they went.
//!
//! What must always be true: what was removed does not come back by a move. While a device leaves
//! every remove names its blocks to the keeper before it asks an engine
//! ([`Removal`](crate::devices::Removal)): none of them begins to move until it is over. And it asks
//! the keeper before it is acknowledged ([`Note`](crate::devices::Note)): a move that had begun is
//! given up, and if its bytes were committed already they are removed where they went first.
//!
//! And nothing counts as moved that nobody has seen: a device that cannot be read stays where it is.
//!
//! What is absent: the steps of one block (`moves`); blocks that were never worth a place on the device (ephemeral ones) are lost with
//! it; leases stay with the old copy.

use super::moves::{Block, Move};
use super::{Event, Keeper, Stage};
use crate::devices::surveyor::{Said, Sealed, Surveyor};
use crate::devices::view::{DeviceView, Moved};
use crate::devices::{RoutedDevice, Routes};
use crate::mail::{Ask, Mail, Origin};
use kvar_base::{Clock as _, Moment};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Numbers of the keeper's own operations for moves; smaller ones are numbers of devices.
pub(super) const MOVES_FROM: u64 = 1 << 32;

/// Bytes a second that move when nobody says: a drive's daily work in a few hours, and a small part
/// of what it can do beside that.
const RATE_BYTES_PER_S: u64 = 128 << 20;

/// Blocks on their way at once: two drives are kept busy, and at 16 MiB a block memory is not.
const MOVES_MAX: usize = 8;

/// How long a block that nobody took (memory is full for the moment) is left alone, and how often it
/// is tried: a minute in all.
const TRY_AGAIN: Duration = Duration::from_millis(100);
const TRIES_MAX: u32 = 600;

/// A round is begun so often when the device cannot be read, and how long after the last failure: what
/// makes one fail (memory, threads) is there again in seconds or not at all.
pub(super) const SURVEYS_MAX: u32 = 5;
pub(super) const SURVEY_AGAIN: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    Copying,
    /// So many engines are writing what is in memory only.
    Flushing(usize),
    Last,
}

/// See the module.
pub(super) struct Leaving {
    round: Round,
    pub(super) rate_bytes_per_s: u64,
    surveyor: Option<Surveyor>,
    /// The number of the survey under way; what others say is old.
    pub(super) survey: u64,
    surveys_failed: u32,
    /// When the next is begun, after one that failed.
    survey_again: Option<Moment>,
    /// Whether the surveyor was asked for the next segment.
    is_asked: bool,
    /// Whether it has said that there is none.
    is_through: bool,
    /// Segments that were complete when they were read: the last round reads all others. Not those above
    /// a number: a shard has several open at a time.
    done: HashSet<Sealed>,
    queue: VecDeque<Block>,
    /// Blocks that are being removed: they move, if they are still there, once that is over.
    pub(super) held: Vec<Block>,
    pub(super) moves: HashMap<u64, Move>,
    pub(super) not_before: Moment,
    pub(super) moved: Moved,
    /// Removes that wait until what they spoiled is out of the way.
    pub(super) notes: Vec<Origin>,
}

impl Leaving {
    fn new(rate_bytes_per_s: u64, now: Moment) -> Self {
        Self {
            round: Round::Copying,
            rate_bytes_per_s: rate_bytes_per_s.max(1),
            surveyor: None,
            survey: 0,
            surveys_failed: 0,
            survey_again: None,
            is_asked: false,
            is_through: false,
            done: HashSet::new(),
            queue: VecDeque::new(),
            held: Vec::new(),
            moves: HashMap::new(),
            not_before: now,
            moved: Moved::default(),
            notes: Vec::new(),
        }
    }

    /// Whether its blocks are looked for elsewhere by now.
    pub(super) fn has_left(&self) -> bool {
        self.round != Round::Copying
    }

    #[cfg(test)]
    pub(super) fn is_flushed(&self) -> bool {
        self.round == Round::Last
    }

    pub(super) fn moved(&self) -> Moved {
        self.moved
    }

    /// A block that met a remove is next; that is no fault of anybody, so it costs no try.
    pub(super) fn put_back(&mut self, block: Block) {
        self.queue.push_front(block);
    }

    /// Removes are over: what they held up is looked at again.
    pub(super) fn release(&mut self) {
        self.held.drain(..).for_each(|it| self.queue.push_front(it));
    }

    pub(super) fn again(&mut self, mut block: Block, now: Moment) {
        block.tries += 1;
        if block.tries > TRIES_MAX {
            self.moved.lost_blocks += 1;
        } else {
            self.not_before = self.not_before.max(now.after(TRY_AGAIN));
            self.queue.push_back(block);
        }
    }
}

impl Keeper {
    /// Begins to move a device's blocks to the others.
    pub(super) fn leave(&mut self, at: usize, rate: Option<u64>) -> Result<DeviceView, String> {
        let live = &self.lives[at];
        let uuid = live.uuid;
        if live.leaving.is_some() {
            return Err(
                "it is leaving already (kvar device list says how far it is); --now drops what \
                 has not moved yet"
                    .to_owned(),
            );
        }
        if self.lives.iter().any(|it| it.leaving.is_some()) {
            return Err(
                "another device is leaving; wait until it has left (kvar device list), or drop \
                 this one's blocks with --now"
                    .to_owned(),
            );
        }
        let before = self.table.clone();
        if let Some(entry) = self.table.find_mut(uuid) {
            entry.leaving = true;
        }
        if let Err(text) = self.save() {
            self.table = before;
            return Err(text);
        }
        let rate = rate.unwrap_or(RATE_BYTES_PER_S);
        tracing::info!(%uuid, rate, "device leaving: its blocks move to the others");
        let now = self.clock.now();
        self.lives[at].leaving = Some(Box::new(Leaving::new(rate, now)));
        // It may tell why it did not leave the last time.
        self.lives[at].trouble = None;
        self.publish();
        self.survey(at);
        self.view_of(uuid).ok_or_else(|| "it is gone".to_owned())
    }

    /// Goes on where the process before was stopped; one device at a time.
    pub(super) fn resume_leaving(&mut self) {
        for at in 0..self.lives.len() {
            if self.lives.iter().any(|it| it.leaving.is_some()) {
                return;
            }
            let live = &self.lives[at];
            let is_marked = self
                .table
                .find(live.uuid)
                .is_some_and(|entry| entry.leaving);
            if is_marked
                && live.stage == Stage::Online
                && live.leaving.is_none()
                && self.staying_beside(at) > 0
            {
                let now = self.clock.now();
                self.lives[at].leaving = Some(Box::new(Leaving::new(RATE_BYTES_PER_S, now)));
                self.publish();
                self.survey(at);
            }
        }
    }

    /// A device that has nowhere to go stays: the others went while its blocks were moving.
    pub(super) fn stay_if_alone(&mut self) {
        let leaves = |it: &super::Live| it.leaving.is_some();
        let Some(at) = self.lives.iter().position(leaves) else {
            return;
        };
        if self.staying_beside(at) > 0 {
            return;
        }
        let uuid = self.lives[at].uuid;
        tracing::warn!(%uuid, "the device stays: no other is in service");
        self.stay(at);
    }

    /// It does not leave any more. New routes are the caller's.
    fn stay(&mut self, at: usize) {
        let uuid = self.lives[at].uuid;
        self.stop_leaving(at);
        // Only here: one that goes must take nothing between this and its close.
        self.seal(at, false);
        if let Some(entry) = self.table.find_mut(uuid) {
            entry.leaving = false;
        }
        if let Err(text) = self.save() {
            tracing::error!("{text}");
        }
    }

    /// Who owns what without the devices that leave.
    pub(super) fn routes_afterwards(&self, devices: &[RoutedDevice]) -> Arc<Routes> {
        let mut devices = devices.to_vec();
        for device in &mut devices {
            let leaves = self
                .lives
                .iter()
                .any(|it| it.leaving.is_some() && it.engines.first() == device.engines.first());
            if leaves {
                device.bytes = 0;
            }
        }
        Arc::new(Routes::new(devices, false, &Arc::default()))
    }

    fn survey(&mut self, at: usize) {
        let live = &mut self.lives[at];
        let Some(leaving) = &mut live.leaving else {
            return;
        };
        leaving.surveyor = None;
        leaving.survey_again = None;
        (leaving.is_asked, leaving.is_through) = (true, false);
        leaving.survey = self.next_survey;
        self.next_survey += 1;
        let done = Arc::new(leaving.done.clone());
        let begun = Surveyor::begin(
            (live.number, leaving.survey),
            live.target.clone(),
            live.superblock.clone(),
            done,
            self.sender.clone(),
        );
        match begun {
            Ok(surveyor) => leaving.surveyor = Some(surveyor),
            Err(error) => {
                let (device, survey) = (live.number, leaving.survey);
                let said = Said::Failed(format!("a thread: {error}"));
                let _ = self.sender.send(Event::Surveyed {
                    device,
                    survey,
                    said,
                });
            }
        }
    }

    pub(super) fn on_surveyed(&mut self, device: u32, survey: u64, said: Said) {
        let now = self.clock.now();
        let found = self.lives.iter().position(|it| it.number == device);
        let Some(at) = found else { return };
        let Some(leaving) = &mut self.lives[at].leaving else {
            return;
        };
        if leaving.survey != survey {
            return;
        }
        leaving.is_asked = false;
        match said {
            Said::Begun {
                segments,
                unreadable,
            } => {
                // Each round meets the same ones, and those that went bad since.
                let moved = &mut leaving.moved;
                moved.unreadable_segments = moved.unreadable_segments.max(unreadable);
                leaving.moved.segments = leaving.moved.segments_done + segments;
            }
            Said::Blocks(blocks, sealed) => {
                leaving.done.extend(sealed);
                leaving.surveys_failed = 0;
                leaving.moved.segments_done += 1;
                let blocks = blocks.into_iter().map(|block| Block { block, tries: 0 });
                leaving.queue.extend(blocks);
            }
            Said::End => leaving.is_through = true,
            Said::Failed(why) => {
                leaving.surveys_failed += 1;
                tracing::warn!(device, "cannot read what a leaving device holds: {why}");
                if leaving.surveys_failed >= SURVEYS_MAX {
                    return self.cannot_leave(at, &why);
                }
                // Nothing more is asked of this one.
                leaving.is_asked = true;
                leaving.survey_again = Some(now.after(SURVEY_AGAIN));
            }
        }
    }

    /// Nobody can say what is on it: it stays, and says why. To retire it now would lose what it has.
    fn cannot_leave(&mut self, at: usize, why: &str) {
        let live = &mut self.lives[at];
        let (uuid, path) = (live.uuid, live.path.display());
        tracing::error!(%uuid, %path, why, "the device stays: what is on it cannot be read");
        live.trouble = Some(format!(
            "it was to leave and stays: what is on it cannot be read ({why}); retire it again, or with \
             --now to drop its blocks"
        ));
        self.stay(at);
        self.publish();
    }

    /// Begins as many moves as may be under way; when to come back.
    pub(super) fn move_blocks(&mut self, now: Moment) -> Moment {
        let mut due = Moment(u64::MAX);
        for at in 0..self.lives.len() {
            self.move_from(at, now);
            // It may be gone by now.
            let live = self.lives.get(at);
            let again = live.and_then(|it| it.leaving.as_ref()?.survey_again);
            if again.is_some_and(|again| again <= now) {
                self.survey(at);
            } else if let Some(again) = again {
                due = due.min(again);
            }
            let live = self.lives.get(at);
            if let Some(leaving) = live.and_then(|it| it.leaving.as_ref())
                && leaving.moves.len() < MOVES_MAX
                && !leaving.queue.is_empty()
            {
                due = due.min(leaving.not_before);
            }
        }
        due
    }

    fn move_from(&mut self, at: usize, now: Moment) {
        loop {
            let Some(leaving) = &mut self.lives[at].leaving else {
                return;
            };
            let may_begin = leaving.moves.len() < MOVES_MAX && leaving.not_before <= now;
            if may_begin && let Some(block) = leaving.queue.pop_front() {
                self.look(at, block);
                continue;
            }
            if !leaving.queue.is_empty() || !leaving.held.is_empty() || leaving.is_asked {
                return;
            }
            if !leaving.is_through {
                leaving.is_asked = true;
                if let Some(surveyor) = &leaving.surveyor {
                    surveyor.next();
                }
                return;
            }
            if !leaving.moves.is_empty() {
                return;
            }
            return match leaving.round {
                Round::Copying => self.let_others_serve(at),
                Round::Flushing(_) => {}
                Round::Last => self.has_gone(at),
            };
        }
    }

    /// The first round is over: from now on its blocks are looked for where they went.
    fn let_others_serve(&mut self, at: usize) {
        let live = &mut self.lives[at];
        let Some(leaving) = &mut live.leaving else {
            return;
        };
        leaving.round = Round::Flushing(live.engines.len());
        let operation = u64::from(live.number);
        let engines = live.engines.clone();
        // In every mailbox before the flush: what is put after it goes elsewhere. A thread that has not
        // heard yet may still ask the old engine, and some have room there already: that is refused.
        self.publish();
        self.seal(at, true);
        for engine in engines {
            self.ask_engine(engine, operation, Ask::Flush);
        }
    }

    fn seal(&self, at: usize, is_sealed: bool) {
        for engine in &self.lives[at].engines {
            self.post
                .send(engine.thread, Mail::Seal(*engine, is_sealed));
        }
    }

    pub(super) fn on_flushed(&mut self, at: usize) {
        let Some(leaving) = &mut self.lives[at].leaving else {
            return;
        };
        let Round::Flushing(left) = leaving.round else {
            return;
        };
        // One that could not be flushed has lost what was in memory only; the rest moves.
        leaving.round = Round::Flushing(left - 1);
        if left == 1 {
            leaving.round = Round::Last;
            self.survey(at);
        }
    }

    fn has_gone(&mut self, at: usize) {
        let live = &self.lives[at];
        let (uuid, moved) = (live.uuid, live.leaving.as_ref().map(|it| it.moved));
        let moved = moved.unwrap_or_default();
        tracing::info!(
            %uuid,
            path = %live.path.display(),
            blocks = moved.blocks,
            bytes = moved.bytes,
            lost = moved.lost_blocks,
            unreadable_segments = moved.unreadable_segments,
            "device has left: its blocks are on the others, and it can be taken away"
        );
        self.table.retire(uuid);
        if let Err(text) = self.save() {
            // On disk it is leaving: the next start moves what is there, which is there already.
            tracing::error!("{text}");
        }
        self.close_as(at, moved.is_all());
        self.resume_leaving();
    }

    /// Nothing moves from a device any more: it goes, or was left alone.
    pub(super) fn stop_leaving(&mut self, at: usize) {
        let Some(leaving) = self.lives[at].leaving.take() else {
            return;
        };
        for origin in leaving.notes {
            let text = "a device went meanwhile; try again".to_owned();
            self.answer_note(origin, Err(text));
        }
    }
}
