//! The oracle: of every block, what a read may return and whether it must find it.
//!
//! ```text
//!            put committed                      journal: left memory and device (evicted, corrupt)
//!   Absent ───────────────> Known(put) ───────────────────────────> Absent
//!      ▲                       ▲   │ remove, purge ──────────────────> Absent, at once
//!      │ restart: not there    │ a read says which
//!      └──────────────── OneOf(puts) <── restart: there
//! ```
//!
//! Within a life of the process the model is exact: it knows of every block whether it is visible,
//! in memory, on the device, since calls and the engine's journal say all that can change it.
//! Over a restart it knows bounds:
//!
//! | put | after a restart |
//! |---|---|
//! | guaranteed: flushed, or on the device at a clean end; and its copy not given up since | must be there |
//! | after the last one that was ever flushed | may be there |
//! | before that | must not be there |
//! | before a remove or purge that was answered | must not be there |
//!
//! When faults the engine cannot see touched the pages that tell the order of events
//! ([`history_lost`](crate::device::Harm)), the last three lines are void for that restart; bytes
//! must still be those of one complete put.

use crate::promises::Promises;
use kvar_base::Moment;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

/// One put that was committed.
#[derive(Clone, Debug)]
pub(crate) struct Put {
    pub(crate) nonce: u64,
    pub(crate) lengths: Arc<[u32]>,
    /// What the store calls its bytes.
    pub(crate) version: u64,
    pub(crate) order: u64,
    pub(crate) committed: Moment,
    pub(crate) turn: u64,
    pub(crate) ephemeral: bool,
    /// Of one that is handed over: what is left of that.
    pub(crate) handover: Option<Handover>,
    /// Wall time from which it is not served, in seconds since 1970; 0: it never expires.
    pub(crate) expires_unix_s: u64,
    /// Must be there after any restart.
    pub(crate) guaranteed: bool,
    /// Was guaranteed once: nothing older may come back.
    pub(crate) flushed_once: bool,
    /// Its copy on the device was given up while it was in memory, and what was written again since
    /// is not known to be flushed.
    pub(crate) given_up: bool,
    /// When it was, among puts: a flush that was asked for before need not have written it again.
    pub(crate) given_up_at: u64,
    /// A remove was called after it.
    pub(crate) doomed: bool,
    /// That remove was answered: done.
    pub(crate) buried: bool,
    /// Its bytes may never have reached the device although its record did: a power cut came
    /// before they were flushed, and nobody has read them since.
    pub(crate) in_doubt: bool,
}

/// A block that waits for one reader, and need not be on the device once that is over.
#[derive(Clone, Debug)]
pub(crate) struct Handover {
    pub(crate) until: Moment,
    /// Sections that nobody has asked for.
    pub(crate) unread: Vec<bool>,
}

impl Put {
    /// Whether it may have been left in memory when everything was to be written: its reader came,
    /// or its time is over, or (`crowded`) others took its room.
    fn is_handed_over(&self, now: Moment, crowded: bool) -> bool {
        self.handover.as_ref().is_some_and(|handover| {
            crowded || handover.until <= now || !handover.unread.contains(&true)
        })
    }

    pub(crate) fn is_over(&self, unix_s: u64) -> bool {
        self.expires_unix_s != 0 && self.expires_unix_s <= unix_s
    }
}

/// Whether a block is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Absent,
    There,
    /// Its time to live has passed.
    Over,
    /// It is one of several puts, some of which are over.
    ThereOrOver,
}

/// What a read finds now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Now {
    Absent,
    Known(u64),
    OneOf(Vec<u64>),
}

/// All that is known of one block.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) puts: Vec<Put>,
    pub(crate) now: Now,
    pub(crate) in_memory: bool,
    pub(crate) on_device: bool,
    /// Where on the device; unknown after a restart.
    pub(crate) position: Option<u32>,
    /// What reads that are under way may still deliver of a copy that was evicted.
    pub(crate) lingering: Vec<u64>,
    /// Reads under way.
    pub(crate) readers: u32,
    /// How often it ceased to be visible.
    pub(crate) times_gone: u64,
    /// How often it was removed.
    pub(crate) times_removed: u64,
}

impl Default for Block {
    fn default() -> Self {
        Self {
            puts: Vec::new(),
            now: Now::Absent,
            in_memory: false,
            on_device: false,
            position: None,
            lingering: Vec::new(),
            readers: 0,
            times_gone: 0,
            times_removed: 0,
        }
    }
}

impl Block {
    pub(crate) fn is_visible(&self) -> bool {
        self.now != Now::Absent
    }

    /// Whether its bytes may have been lost in a power cut.
    pub(crate) fn is_in_doubt(&mut self) -> bool {
        self.current().iter().any(|put| put.in_doubt)
    }

    /// Puts that a read which begins now may return, if none of them were over.
    fn candidates(&self) -> Vec<u64> {
        let mut all = self.lingering.clone();
        match &self.now {
            Now::Absent => {}
            Now::Known(nonce) => all.push(*nonce),
            Now::OneOf(nonces) => all.extend(nonces),
        }
        all
    }

    pub(crate) fn put(&self, nonce: u64) -> Option<&Put> {
        self.puts.iter().find(|put| put.nonce == nonce)
    }

    fn current(&mut self) -> Vec<&mut Put> {
        let now = self.now.clone();
        let is_current = move |nonce: u64| match &now {
            Now::Absent => false,
            Now::Known(known) => *known == nonce,
            Now::OneOf(nonces) => nonces.contains(&nonce),
        };
        self.puts
            .iter_mut()
            .filter(|put| is_current(put.nonce))
            .collect()
    }

    /// What is there now is flushed. Where it is one of several, the oldest of them stands for all:
    /// something must be there, and nothing older.
    fn guarantee(&mut self) {
        if self.is_in_doubt() {
            return;
        }
        if let Some(put) = self.current().into_iter().next() {
            (put.guaranteed, put.flushed_once) = (true, true);
            put.given_up = false;
        }
    }

    /// It left memory and device without a call.
    fn evicted(&mut self) {
        if self.in_memory || self.on_device {
            return;
        }
        self.lingering = if self.readers > 0 {
            self.candidates()
        } else {
            Vec::new()
        };
        self.now = Now::Absent;
        self.times_gone += 1;
    }

    fn removed(&mut self) {
        self.now = Now::Absent;
        self.lingering.clear();
        (self.in_memory, self.on_device, self.position) = (false, false, None);
        self.times_gone += 1;
        self.times_removed += 1;
        for put in &mut self.puts {
            put.doomed = true;
            put.guaranteed = false;
        }
    }

    /// Puts that may be on the device, oldest first, if history is whole.
    pub(crate) fn survivors(&self) -> Vec<u64> {
        let first = self
            .puts
            .iter()
            .rposition(|put| put.flushed_once && !put.doomed)
            .unwrap_or(0);
        self.puts[first..]
            .iter()
            .filter(|put| !put.buried)
            .map(|put| put.nonce)
            .collect()
    }
}

/// How the life before ended, and what is therefore known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ending {
    /// What was not flushed may be there in part.
    pub(crate) power_cut: bool,
    /// Everything visible was said to be on the device.
    pub(crate) everything_kept: bool,
    /// The process was killed: puts committed before this moment and turn were written.
    pub(crate) written_before: Option<(Moment, u64)>,
    pub(crate) history_lost: bool,
}

/// What is wrong, in words.
pub(crate) type Verdict = Result<(), String>;

/// The oracle of one store.
#[derive(Clone, Debug, Default)]
pub struct Model {
    pub(crate) blocks: BTreeMap<u64, Block>,
    /// Which block was written to a position last.
    pub(crate) positions: HashMap<u32, u64>,
    /// Which others were written there before.
    positions_before: HashMap<u32, BTreeSet<u64>>,
    pub(crate) next_order: u64,
    /// Wall time.
    pub(crate) unix_s: u64,
    /// What leases promise.
    pub(crate) promises: Promises,
    /// Two ids may be taken for one (tags were weakened): only bytes are judged.
    pub(crate) lenient: bool,
    pub(crate) guaranteed_found: u64,
    pub(crate) written_found: u64,
}

impl Model {
    pub(crate) fn block(&mut self, number: u64) -> &mut Block {
        self.blocks.entry(number).or_default()
    }

    /// Whether a block is there for who asks now.
    pub(crate) fn presence(&self, number: u64) -> Presence {
        let Some(block) = self.blocks.get(&number) else {
            return Presence::Absent;
        };
        let is_over = |nonce: &u64| {
            block
                .put(*nonce)
                .is_some_and(|put| put.is_over(self.unix_s))
        };
        match &block.now {
            Now::Absent => Presence::Absent,
            _ if self.promises.holds(number) => Presence::There,
            Now::Known(nonce) if is_over(nonce) => Presence::Over,
            Now::Known(_) => Presence::There,
            Now::OneOf(nonces) if nonces.iter().all(is_over) => Presence::Over,
            Now::OneOf(nonces) if nonces.iter().any(is_over) => Presence::ThereOrOver,
            Now::OneOf(_) => Presence::There,
        }
    }

    /// Puts that a read which begins now may return: nothing that is over.
    pub(crate) fn candidates(&self, number: u64) -> Vec<u64> {
        let Some(block) = self.blocks.get(&number) else {
            return Vec::new();
        };
        let promised = self.promises.holds(number);
        let mut nonces = block.candidates();
        nonces.retain(|nonce| {
            promised
                || block
                    .put(*nonce)
                    .is_none_or(|put| !put.is_over(self.unix_s))
        });
        nonces
    }

    /// A put was taken: it is visible.
    pub(crate) fn committed(&mut self, number: u64, put: Put) {
        let block = self.block(number);
        block.now = Now::Known(put.nonce);
        block.puts.push(put);
        (block.in_memory, block.on_device, block.position) = (true, false, None);
    }

    pub(crate) fn removed(&mut self, number: u64) {
        self.block(number).removed();
    }

    /// The device is another one: nothing of what was ever put may be there.
    pub(crate) fn device_is_gone(&mut self) {
        for block in self.blocks.values_mut() {
            block.removed();
            block.puts.clear();
        }
        self.positions.clear();
        self.positions_before.clear();
    }

    /// The remove of everything before `order` is durable.
    pub(crate) fn buried(&mut self, number: u64, order: u64) {
        for put in &mut self.block(number).puts {
            put.buried |= put.order < order;
        }
    }

    pub(crate) fn cached(&mut self, number: u64) {
        self.block(number).in_memory = true;
    }

    pub(crate) fn uncached(&mut self, number: u64) {
        let block = self.block(number);
        block.in_memory = false;
        block.evicted();
    }

    /// The tier below has this put. Of one that is on the device the store says when it gives that copy up.
    pub(crate) fn is_below(&mut self, number: u64, nonce: u64) {
        let block = self.block(number);
        if !block.on_device {
            let known = block.current().into_iter();
            (known.filter(|put| put.nonce == nonce)).for_each(|put| put.given_up = true);
        }
    }

    pub(crate) fn placed(&mut self, number: u64, position: u32) {
        if let Some(before) = self.positions.insert(position, number) {
            self.positions_before
                .entry(position)
                .or_default()
                .insert(before);
        }
        let block = self.block(number);
        (block.on_device, block.position) = (true, Some(position));
    }

    /// Blocks on the device that lie at a position, for all that is known: they lay there once, and it is
    /// not known that they lie elsewhere.
    pub(crate) fn may_lie_at(&self, position: u32) -> Vec<u64> {
        let before = self.positions_before.get(&position).into_iter().flatten();
        let all: BTreeSet<u64> = before
            .chain(self.positions.get(&position))
            .copied()
            .collect();
        let may_lie_there = |number: &u64| {
            self.blocks.get(number).is_some_and(|block| {
                block.on_device && block.position.is_none_or(|known| known == position)
            })
        };
        all.into_iter().filter(may_lie_there).collect()
    }

    /// The copy of a block at a position is given up; `corrupt` and `excused` say whether for its
    /// bytes, and whether a fault touched these.
    pub(crate) fn displaced(
        &mut self,
        number: u64,
        position: u32,
        corrupt: bool,
        excused: bool,
    ) -> Verdict {
        let lenient = self.lenient;
        let at = self.next_order;
        self.next_order += 1;
        let block = self.block(number);
        if corrupt && !excused && !block.is_in_doubt() && !lenient {
            return Err(format!(
                "block {number} is corrupt at position {position} and no fault touched it: {block:?}"
            ));
        }
        for put in block.current() {
            (put.guaranteed, put.given_up, put.given_up_at) = (false, true, at);
        }
        (block.on_device, block.position) = (false, None);
        block.evicted();
        Ok(())
    }

    /// Sections of a block are read (all of them: `None`).
    pub(crate) fn read(&mut self, number: u64, sections: Option<&Range<u16>>) {
        let Some(block) = self.blocks.get_mut(&number) else {
            return;
        };
        for handover in block
            .current()
            .into_iter()
            .flat_map(|put| &mut put.handover)
        {
            for (section, unread) in (0_u16..).zip(&mut handover.unread) {
                *unread &= sections.is_some_and(|sections| !sections.contains(&section));
            }
        }
    }

    /// All puts before `order` are flushed, it was said; `told` is the one put this is about, if so.
    /// `crowded`: handovers made way to others since the process began.
    pub(crate) fn flushed(
        &mut self,
        order: u64,
        told: Option<u64>,
        now: Moment,
        crowded: bool,
    ) -> Verdict {
        let (lenient, unix_s) = (self.lenient, self.unix_s);
        for (number, block) in &mut self.blocks {
            let on_device = block.on_device;
            let is_meant =
                // What is over may have been forgotten, and nobody waits for that to be flushed.
                |put: &Put| {
                    put.order < order
                        && told.is_none_or(|told| told == put.nonce)
                        && !put.is_over(unix_s)
                };
            let Some(put) = block
                .current()
                .into_iter()
                .next()
                .filter(|put| is_meant(put))
            else {
                continue;
            };
            let may_be_missing =
                put.ephemeral || put.given_up || put.is_handed_over(now, crowded) || lenient;
            if on_device {
                if !put.given_up || put.given_up_at < order {
                    block.guarantee();
                }
            } else if !may_be_missing {
                return Err(format!(
                    "block {number} was put before a flush that is done and is not on the device: {block:?}"
                ));
            }
        }
        Ok(())
    }

    /// The process is another one. `there`: what it finds. `made_room`: entries that its recovery
    /// had to give up.
    pub(crate) fn restarted(
        &mut self,
        ending: Ending,
        mut there: impl FnMut(u64) -> bool,
        made_room: u64,
    ) -> Verdict {
        let Ending {
            power_cut,
            everything_kept,
            written_before,
            history_lost,
        } = ending;
        let trusted = !history_lost && !self.lenient;
        self.promises = Promises::default();
        let mut missing = Vec::new();
        let (mut guaranteed_found, mut written_found) = (0, 0);
        for (number, block) in &mut self.blocks {
            let visible_before = block.is_visible() && block.on_device;
            if everything_kept && visible_before {
                block.guarantee();
            }
            let guaranteed = block.puts.iter().any(|put| put.guaranteed);
            let written = written_before.is_some_and(|(moment, turn)| {
                matches!(block.now, Now::Known(_))
                    && block.current().iter().all(|put| {
                        put.committed < moment
                            && put.turn < turn
                            && !put.ephemeral
                            && put.handover.is_none()
                            && !put.given_up
                            && !put.doomed
                    })
            });
            let candidates = if trusted {
                block.survivors()
            } else {
                block.puts.iter().map(|put| put.nonce).collect()
            };
            (block.in_memory, block.readers) = (false, 0);
            // A clean end on a disk that is well leaves every block where it was.
            block.position = block.position.filter(|_| everything_kept && trusted);
            block.lingering.clear();
            block.on_device = there(*number);
            block.times_gone += 1;
            if block.on_device {
                if candidates.is_empty() && !self.lenient {
                    return Err(format!(
                        "block {number} was removed and is there again: {block:?}"
                    ));
                }
                guaranteed_found += u64::from(guaranteed);
                written_found += u64::from(written && !guaranteed);
                block.now = Now::OneOf(candidates);
                let Now::OneOf(candidates) = &block.now else {
                    continue;
                };
                for put in &mut block.puts {
                    put.guaranteed &= candidates.contains(&put.nonce);
                    put.given_up = false;
                    put.doomed &= put.buried;
                    // One that was flushed once, given up by reclaim and written again from memory is
                    // as unsure as a new one.
                    put.in_doubt |= history_lost || power_cut && !put.guaranteed;
                }
                if guaranteed {
                    block.guarantee();
                }
            } else {
                if (guaranteed || written) && trusted {
                    missing.push((*number, format!("{block:?}")));
                }
                block.now = Now::Absent;
                block.puts.iter_mut().for_each(|put| put.guaranteed = false);
            }
        }
        self.guaranteed_found += guaranteed_found;
        self.written_found += written_found;
        if missing.len() as u64 > made_room {
            let (number, block) = &missing[0];
            return Err(format!(
                "{} blocks were flushed and are not there after a restart whose recovery gave up {made_room}; \
                 the first is {number}: {block}",
                missing.len()
            ));
        }
        Ok(())
    }

    /// Takes back what was promised, doubted or buried after `before`: a cut came somewhere between.
    pub(crate) fn weaken_to(&mut self, before: &Self) {
        for (number, block) in &mut self.blocks {
            let known = before.blocks.get(number);
            for put in &mut block.puts {
                let known = known.and_then(|known| known.put(put.nonce));
                put.guaranteed &= known.is_some_and(|known| known.guaranteed);
                put.flushed_once = known.is_some_and(|known| known.flushed_once);
                put.buried = known.is_some_and(|known| known.buried);
            }
        }
    }

    /// A read returned this put: from now on it is that one. `durable`: what is on the device is
    /// known to be flushed.
    pub(crate) fn pinned(&mut self, number: u64, nonce: u64, durable: bool) {
        let block = self.block(number);
        if let Now::OneOf(_) = block.now {
            block.now = Now::Known(nonce);
            let guaranteed = block.puts.iter().any(|put| put.guaranteed);
            for put in &mut block.puts {
                put.guaranteed = guaranteed && put.nonce == nonce;
                put.flushed_once |= put.guaranteed;
                put.in_doubt &= put.nonce != nonce;
            }
            if durable && block.on_device {
                block.guarantee();
            }
        }
    }
}
