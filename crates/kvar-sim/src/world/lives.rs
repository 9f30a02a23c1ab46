//! How lives end and begin: rest, the clean end, the kill, the power cut, and opening again.
//!
//! What must always be true: a store comes to rest on a disk that is well, and at rest nothing is
//! held for anybody; it opens again on a disk that is well, whatever happened before.

use super::{PutEnd, Restart, Step, Violation, World, wrong};
use crate::model::{Block, Ending};
use crate::payload;
use kvar_base::Moment;
use kvar_engine::{Engine, OpenError, RecoveryReport, WriteRates, arena_bytes};
use kvar_io::Arena;
use kvar_io::sim::FaultRates;
use std::time::Duration;

/// Turns within which the store comes to rest once the disk is well: a pause after trouble is 1000
/// of them.
const REST_TURNS: u64 = 20_000;
/// A put older than this many turns for every poll that an operation takes (and twice
/// `flush_after`) has had every chance to be written: it may wait for a reclaim of some twenty
/// operations one after the other, and that for another.
const WRITTEN_TURNS: u64 = 60;

impl World {
    /// The disk is well again; the store answers everything and comes to rest.
    pub(crate) fn settle(&mut self) -> Step {
        self.note("settle");
        self.below.iter_mut().for_each(|below| below.at_once = true);
        self.disk.clear_faults();
        self.disk.set_rates(FaultRates::default());
        while !self.open_puts.is_empty() {
            self.end_put(0, PutEnd::Abort)?;
        }
        self.let_go()?;
        for _ in 0..REST_TURNS {
            self.disk.release_stuck();
            self.turn(Duration::from_millis(5))?;
            let engine = self.engine.as_ref().expect("it is open");
            let at_rest =
                self.waiting.is_empty() && engine.in_flight() == 0 && engine.bookkeeping() == 0;
            if at_rest {
                self.let_go()?;
                self.below
                    .iter_mut()
                    .for_each(|below| below.at_once = false);
                return self.check_memory();
            }
        }
        let (waiting, now) = (self.waiting.len(), self.now);
        let engine = self.engine();
        let what = format!(
            "the store does not come to rest: {waiting} calls wait, {} operations are under way, {} things are \
             remembered; {:?}",
            engine.in_flight(),
            engine.bookkeeping(),
            engine.status(now)
        );
        wrong(what)
    }

    /// At rest memory holds the resident blocks and nothing else.
    pub(super) fn check_memory(&mut self) -> Step {
        let now = self.now;
        self.check_promises()?;
        self.check_counts()?;
        self.engine().recount()?;
        let (allocated, dram_bytes) = (
            self.arena.allocated_bytes() as u64,
            self.engine().status(now).dram_bytes,
        );
        if allocated != dram_bytes || dram_bytes > self.config.dram_bytes {
            return wrong(format!(
                "at rest {allocated} bytes of memory are taken, {dram_bytes} by blocks, of {}",
                self.config.dram_bytes
            ));
        }
        Ok(())
    }

    /// The store counts as many blocks as the oracle knows.
    fn check_counts(&mut self) -> Step {
        if self.harm.history_lost || self.model.lenient {
            return Ok(());
        }
        let count = |there: fn(&Block) -> bool| {
            self.model
                .blocks
                .values()
                .filter(|block| there(block))
                .count() as u64
        };
        let known = (
            count(|block| block.in_memory),
            count(|block| block.on_device),
        );
        let now = self.now;
        let status = self.engine().status(now);
        let counted = (status.dram_blocks, status.flash_blocks);
        if counted != known {
            return wrong(format!(
                "{known:?} blocks are in memory and on the device, and {counted:?} are counted"
            ));
        }
        Ok(())
    }

    /// Memory that the store holds at rest: blocks, index, times at which blocks expire, and what it
    /// remembers of calls.
    pub(crate) fn held_bytes(&mut self) -> u64 {
        let now = self.now;
        let allocated = self.arena.allocated_bytes() as u64;
        let engine = self.engine();
        let status = engine.status(now);
        allocated + status.index_bytes + status.expiring_bytes + engine.bookkeeping() as u64
    }

    /// Every block is asked for and read.
    pub(crate) fn audit(&mut self) -> Step {
        let numbers: Vec<u64> = self.model.blocks.keys().copied().collect();
        for number in numbers {
            self.stat(number)?;
            self.get(number, None, Moment(u64::MAX))?;
            while self.waiting.len() > 16 {
                self.turn(Duration::from_micros(200))?;
            }
        }
        self.answer_all()
    }

    /// Goes on until every call is answered.
    pub(crate) fn answer_all(&mut self) -> Step {
        for _ in 0..REST_TURNS {
            if self.waiting.is_empty() {
                return Ok(());
            }
            self.turn(Duration::from_micros(200))?;
        }
        wrong(format!("{} calls are not answered", self.waiting.len()))
    }

    /// Ends this life and begins the next.
    pub(crate) fn restart(&mut self, how: Restart, rates: FaultRates) -> Step {
        self.note(format!("restart: {how:?}"));
        let everything_kept = match how {
            Restart::Clean => self.shut_down()?,
            _ => false,
        };
        let written_before = match how {
            // Only of a disk that keeps pace: else puts wait for it, which is no fault of theirs. And
            // only where the write budget never runs short: else they stay in memory by choice.
            Restart::Kill
                if self.struck_known == 0
                    && !self.was_busy
                    && self.below.is_none()
                    && self.config.writes == WriteRates::default() =>
            {
                let age = 2 * self.config.flush_after;
                let moment = Moment(self.now.0.saturating_sub(age.as_micros() as u64));
                let turn = self
                    .turns
                    .saturating_sub(WRITTEN_TURNS * u64::from(self.polls_max));
                (turn > self.life_began).then_some((moment, turn))
            }
            _ => None,
        };
        // What callers hold of the old process is gone with it.
        self.let_go()?;
        self.open_puts.clear();
        self.waiting.clear();
        let survived = self.disk.survived();
        match how {
            Restart::Clean => self.tally.count("restart/clean"),
            Restart::Kill => {
                self.disk.kill();
                self.tally.count("crash/kill");
            }
            Restart::PowerCut(how) => {
                self.disk.crash(how);
                self.tally.count("crash/power cut");
                self.harm.history_lost |= self.harm.flush_lost;
            }
        }
        let after = self.disk.survived();
        for (what, before, after) in [
            ("torn at 512", survived.torn_at_512, after.torn_at_512),
            ("torn at 4096", survived.torn_at_4096, after.torn_at_4096),
            ("write lost", survived.lost, after.lost),
            ("write reordered", survived.reordered, after.reordered),
        ] {
            self.tally.add(&format!("crash/{what}"), after - before);
        }
        self.engine = None;
        self.disk.clear_faults();
        self.hear_disk(false);
        self.disk.set_rates(rates);
        if rates != FaultRates::default() {
            self.tally.count("restart/with faults");
        }
        let report = match self.open() {
            Ok(report) => report,
            Err(error) => {
                self.note(format!("the store does not open: {error}"));
                self.tally.count("restart/refused");
                if rates == FaultRates::default() {
                    return wrong(format!(
                        "the store does not open although the disk is well: {error}"
                    ));
                }
                self.disk.set_rates(FaultRates::default());
                match self.open() {
                    Ok(report) => report,
                    Err(error) => {
                        return wrong(format!(
                            "the store does not open although the disk is well: {error}"
                        ));
                    }
                }
            }
        };
        self.note(format!("opened: {report:?}"));
        // The store says itself that the next recovery may read what this one could not.
        self.harm.history_lost |= report.checkpoints_unsure > 0;
        if report.checkpoint.is_none() {
            self.tally.count("restart/without a checkpoint");
            if matches!(how, Restart::Clean) && self.struck_known == 0 {
                return wrong("a clean end left no checkpoint on a disk that is well".into());
            }
        }
        let ending = Ending {
            power_cut: matches!(how, Restart::PowerCut(_)),
            everything_kept,
            written_before,
            history_lost: self.harm.history_lost,
        };
        self.begin_life(ending, report.bucket_evicted)
    }

    pub(crate) fn begin_life(&mut self, ending: Ending, made_room: u64) -> Step {
        let Self {
            model,
            engine,
            salt,
            now,
            unix_at_start_s,
            ..
        } = self;
        let engine = engine.as_mut().expect("it was opened");
        // What is over is there all the same, and would be again if the clock were set back.
        engine.set_wall_clock(*now, 0);
        let there = |number| engine.stat(*now, &payload::id(*salt, number)).is_some();
        let known = (model.guaranteed_found, model.written_found);
        model.restarted(ending, there, made_room)?;
        engine.set_wall_clock(*now, *unix_at_start_s + now.0 / 1_000_000);
        let found = (
            model.guaranteed_found - known.0,
            model.written_found - known.1,
        );
        self.tally.add("checked/was flushed and is there", found.0);
        self.tally
            .add("checked/was written and is there after a kill", found.1);
        self.disk_is_durable |= ending.power_cut;
        Ok(())
    }

    /// Opens the store on the disk as it is.
    pub(super) fn open(&mut self) -> Result<RecoveryReport, OpenError> {
        self.engine = None;
        self.config.unix_at_start_s = self.unix_at_start_s;
        self.arena = Arena::new(arena_bytes(&self.config, &self.superblock))
            .map_err(|_| OpenError::NoMemory)?;
        let device = Box::new(self.disk.open());
        let opened = Engine::open(
            device,
            self.arena.clone(),
            &self.superblock,
            0,
            self.config.clone(),
            self.now,
        );
        self.hear_disk(true);
        let (mut engine, report) = opened?;
        engine.keep_journal();
        self.engine = Some(engine);
        self.stand_above();
        self.recovery = report.clone();
        (self.harm.refused, self.was_busy, self.has_placed) = (false, false, false);
        self.life_began = self.turns;
        Ok(report)
    }

    /// Writes everything; whether all that is on the device is known to stay there.
    pub(super) fn shut_down(&mut self) -> Result<bool, Violation> {
        self.let_go()?;
        while !self.open_puts.is_empty() {
            self.end_put(0, PutEnd::Abort)?;
        }
        let (now, displaced, forgotten) = (self.now, self.displaced, self.forgotten);
        let positions: Vec<_> = self
            .model
            .blocks
            .iter()
            .map(|(number, block)| (*number, block.position))
            .collect();
        self.engine().begin_shutdown(now);
        for _ in 0..REST_TURNS {
            self.disk.release_stuck();
            self.turn(Duration::from_millis(4))?;
            let Some(report) = self.engine().shutdown_report() else {
                continue;
            };
            self.note(format!("shut down: {report:?}"));

            // What reclaim moved while the checkpoint was written may be found at either place.
            for (number, position) in positions {
                let block = self.model.block(number);
                block.position = block.position.filter(|_| block.position == position);
            }
            // Of blocks in doubt it is not known whether the device has them, too.
            let history_lost = self.harm.history_lost;
            let (mut in_memory_alone, mut unsure) = (0, 0);
            for (number, block) in &mut self.model.blocks {
                if block.is_visible() && !block.on_device {
                    in_memory_alone += 1;
                    // What is below counts as kept.
                    let below = self.below.as_ref().is_some_and(|it| it.has(*number));
                    unsure += u64::from(below || history_lost && block.is_in_doubt());
                }
            }
            // The report was made before the checkpoint. Since then memory may have forgotten what was
            // over, and reads of sections that were under way may have displaced what it alone held: the
            // report counts these among the dropped, and they are not there any more.
            let differs = report.dropped_blocks > in_memory_alone + (self.forgotten - forgotten)
                || (self.displaced == displaced
                    && !history_lost
                    && report.dropped_blocks + unsure < in_memory_alone);
            if differs && !self.harm.refused && !self.model.lenient {
                return wrong(format!(
                    "a clean end says {report:?}, and {in_memory_alone} blocks are in memory alone"
                ));
            }
            return Ok(!self.harm.refused);
        }
        wrong("the shutdown does not end".into())
    }
}
