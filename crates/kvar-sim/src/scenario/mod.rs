//! What happens under one seed: a store of some size, a disk of some temper, writers and readers,
//! and every now and then the end of the process.
//!
//! | temper | faults |
//! |---|---|
//! | well | none but kills and power cuts (with torn, lost and reordered writes) |
//! | misread | reads flipped, misdirected, failed, short |
//! | miswrite | writes flipped, misdirected, lost |
//! | refuse | writes failed, short, without space; flushes failed |
//! | lie | flushes lost |
//! | slow | operations answer late, some are stuck for a while |
//! | leave | the device vanishes and may come back |
//! | full | no space for a while |
//! | aimed | single faults and decay of the medium, at bytes of blocks |
//! | all | a little of everything |
//!
//! What must always be true: the seed decides everything, so that it alone replays a failure.

mod steps;
mod trouble;

pub(crate) use steps::{fill, step};

use crate::dice::Dice;
use crate::tally::Tally;
use crate::world::{Replacement, Restart, Tenancy, Violation, World};
use kvar_engine::layout::CHUNK_BYTES;
use kvar_engine::{EngineConfig, WriteRates};
use kvar_io::sim::{FaultRates, SimOptions, Survival};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// How the disk behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temper {
    /// See the table above.
    Well,
    /// See the table above.
    Misread,
    /// See the table above.
    Miswrite,
    /// See the table above.
    Refuse,
    /// See the table above.
    Lie,
    /// See the table above.
    Slow,
    /// See the table above.
    Leave,
    /// See the table above.
    Full,
    /// See the table above.
    Aimed,
    /// See the table above.
    All,
}

/// A life that is over before its first segment is.
const LIFE_STEPS_SHORT: u64 = 20;
/// Long enough for most readers here, and over within a life.
const HANDOVER_WAIT: Duration = Duration::from_secs(1);

/// Half the runs have a disk that is well: only there is everything asked for.
const TEMPERS: [Temper; 18] = [
    Temper::Well,
    Temper::Misread,
    Temper::Well,
    Temper::Miswrite,
    Temper::Well,
    Temper::Refuse,
    Temper::Well,
    Temper::Lie,
    Temper::Well,
    Temper::Slow,
    Temper::Well,
    Temper::Leave,
    Temper::Well,
    Temper::Full,
    Temper::Well,
    Temper::Aimed,
    Temper::Slow,
    Temper::All,
];

/// What a run does more of than others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Focus {
    /// Power is cut while checkpoints are written, on a store that reclaims.
    Checkpoints,
    /// Reads are slow and many, on a store that reclaims.
    Readers,
    /// Leases, and more puts than fit.
    Leases,
    /// Times to live.
    Expiry,
    /// Segments that are filled and reused faster than anything is flushed.
    Reuse,
    /// A tier below that takes what reclaim does not keep and memory lets go, late or never.
    Below,
}

/// What to run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Steps; decided by the seed if `None`.
    pub steps: Option<u64>,
    /// Only this temper.
    pub temper: Option<Temper>,
    /// More of something; for a test that looks for one thing.
    pub focus: Option<Focus>,
    /// Two ids may be taken for one: only bytes are judged. For a test that weakens tags.
    pub lenient: bool,
    /// Steps that a failure shows; 60 if `None`.
    pub trace_steps: Option<usize>,
}

/// One run.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Its seed.
    pub seed: u64,
    /// How the disk behaved.
    pub temper: Temper,
    /// What happened.
    pub tally: Tally,
    /// What was wrong, and the steps before it.
    pub failure: Option<Failure>,
    /// Counters of engine and disk at the end: equal for equal seeds.
    pub fingerprint: String,
}

/// A run that found something.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What.
    pub what: String,
    /// The last steps.
    pub trace: Vec<String>,
}

/// The temper of a seed.
#[must_use]
pub fn temper_of(seed: u64) -> Temper {
    TEMPERS[(seed % TEMPERS.len() as u64) as usize]
}

/// What a run is made of.
pub(crate) struct Shape {
    pub(crate) temper: Temper,
    pub(crate) steps: u64,
    /// It begins on a device that is full, so that all of it goes on while space is reclaimed.
    pub(crate) full: bool,
    /// Blocks it is about.
    pub(crate) numbers: u64,
    /// So many times, in as many namespaces.
    pub(crate) namespaces: u64,
    pub(crate) section_bytes_max: u64,
    /// Longest time a step takes, in microseconds.
    pub(crate) step_us_max: u64,
    /// A restart happens once in so many steps.
    pub(crate) life_steps: u64,
    /// Times out of 100 that a step is a put; the rest are mostly gets.
    pub(crate) puts: u64,
    pub(crate) purges: bool,
    /// One put in so many has a time to live; 0: none.
    pub(crate) expiring: u64,
    /// Steps out of 100 that are about leases and clocks.
    pub(crate) promises: u64,
    /// Power is cut now and then while a checkpoint is written.
    pub(crate) cuts_in_checkpoints: bool,
    /// The device is now and then replaced, and may come back.
    pub(crate) replaces: bool,
}

impl Shape {
    fn look_at(&mut self, focus: Focus) {
        self.full = true;
        match focus {
            Focus::Checkpoints => {
                (self.cuts_in_checkpoints, self.expiring) = (true, 3);
                (self.puts, self.section_bytes_max) = (90, 250_000);
            }
            Focus::Readers => {
                (self.puts, self.section_bytes_max) = (60, 250_000);
                (self.steps, self.life_steps, self.replaces) = (1500, 800, false);
            }
            Focus::Below => {
                (self.puts, self.section_bytes_max) = (80, 120_000);
                self.replaces = false;
            }
            Focus::Leases => (self.promises, self.puts) = (12, 90),
            Focus::Expiry => (self.expiring, self.promises) = (2, 4),
            Focus::Reuse => {
                (self.puts, self.section_bytes_max, self.step_us_max) = (97, 250_000, 300);
                (self.expiring, self.promises, self.replaces) = (0, 0, false);
                (self.life_steps, self.numbers) = (120, 1500);
            }
        }
    }
}

/// Runs a seed.
#[must_use]
pub fn run(seed: u64, wanted: Wanted) -> Ran {
    let mut dice = Dice::new(seed);
    let temper = wanted.temper.unwrap_or(temper_of(seed));
    let rates = trouble::rates(temper, &mut dice);
    let (mut world, mut shape) = build(seed, temper, &mut dice);
    world.be_lenient(wanted.lenient);
    wanted.focus.iter().for_each(|focus| shape.look_at(*focus));
    // One of those that have a short write budget is among them.
    if wanted.focus == Some(Focus::Below)
        || wanted.focus.is_none() && matches!(seed % 16, 5 | 7 | 13)
    {
        world.put_something_below(seed);
    }
    shape.steps = wanted.steps.unwrap_or(shape.steps);
    world.trace_steps = wanted.trace_steps.unwrap_or(world.trace_steps);
    let result = catch_unwind(AssertUnwindSafe(|| {
        live(&mut world, &mut dice, &shape, rates)
    }));
    ran(seed, temper, &mut world, result)
}

pub(crate) fn ran(
    seed: u64,
    temper: Temper,
    world: &mut World,
    result: std::thread::Result<Result<(), Violation>>,
) -> Ran {
    let failure = match result {
        Ok(Ok(())) => None,
        Ok(Err(Violation(what))) => Some(what),
        Err(panic) => Some(format!("panic: {}", words_of(&*panic))),
    };
    let failure = failure.map(|what| Failure {
        what,
        trace: world.trace(),
    });
    Ran {
        seed,
        temper,
        fingerprint: if failure.is_none() {
            world.fingerprint()
        } else {
            String::new()
        },
        tally: std::mem::take(&mut world.tally),
        failure,
    }
}

pub(crate) fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_else(|| "without words".into())
}

/// A quarter of the runs has a write budget that is short: from the start, or after a while; a
/// part of them a limit, too.
fn write_rates(seed: u64) -> WriteRates {
    let short = WriteRates {
        budget_bytes_per_day: Some(0),
        ..WriteRates::default()
    };
    match seed % 16 {
        3 | 7 => short,
        11 => WriteRates {
            budget_burst_bytes: 8 << 20,
            ..short
        },
        15 => WriteRates {
            // A MiB a second of the simulation's time.
            limit_bytes_per_day: Some(86_400 << 20),
            limit_burst_bytes: 4 << 20,
            ..short
        },
        _ => WriteRates::default(),
    }
}

pub(crate) fn build(seed: u64, temper: Temper, dice: &mut Dice) -> (World, Shape) {
    let bytes = dice.pick(&[16, 16, 16, 18, 20, 24, 32]) << 20;
    let config = EngineConfig {
        dram_bytes: dice.pick(&[512, 1024, 2048, 2048, 4096]) << 10,
        flush_after: Duration::from_millis(dice.pick(&[20, 60, 100, 400])),
        shutdown_flush: Duration::from_secs(30),
        scrub_bytes_per_s: dice.pick(&[0, 4, 64, 4096]) << 20,
        writes: write_rates(seed),
        handover_wait: HANDOVER_WAIT,
        shares: Tenancy::shares(),
        ..EngineConfig::default()
    };
    let expected_block_bytes = dice.pick(&[4, 8, 16, 16, 32, 64]) << 10;
    let options = SimOptions {
        seed: dice.roll(),
        polls_max: dice.pick(&[1, 2, 4, 4, 8, 30]),
        ..SimOptions::default()
    };
    let shape = Shape {
        temper,
        steps: dice.between(400, 2200),
        full: dice.once_in(3),
        numbers: dice.pick(&[40, 150, 400, 900, 1500]),
        namespaces: 1,
        section_bytes_max: dice.pick(&[20_000, 40_000, 120_000, 250_000]),
        step_us_max: dice.pick(&[300, 1000, 3000, 10_000]),
        life_steps: dice.pick(&[120, 250, 400, 800]),
        puts: dice.pick(&[30, 45, 45, 70, 90]),
        purges: dice.once_in(3),
        expiring: dice.pick(&[0, 0, 3, 10, 10]),
        promises: dice.pick(&[0, 2, 4, 8]),
        cuts_in_checkpoints: dice.once_in(5),
        replaces: dice.once_in(4),
    };
    let mut world = World::format(seed, bytes, expected_block_bytes, options, config);
    // Half of the runs are of one tenant; the others of up to four.
    world.tenancy = Tenancy::Mixed([1, 2, 1, 3, 1, 4, 1, 2][(seed / 2 % 8) as usize]);
    (world, shape)
}

fn live(
    world: &mut World,
    dice: &mut Dice,
    shape: &Shape,
    rates: FaultRates,
) -> Result<(), Violation> {
    if shape.full {
        fill(world, dice, shape)?;
    }
    world.disk.set_rates(rates);
    let mut trouble = 0;
    let mut life_steps = shape.life_steps;
    for _ in 0..shape.steps {
        let written = world.meta_write_bytes();
        step(world, dice, shape)?;
        trouble = trouble::strike(world, dice, shape, trouble)?;
        // A chunk of a checkpoint is on its way.
        let in_checkpoint = world.meta_write_bytes() >= written + CHUNK_BYTES as u64;
        if in_checkpoint && shape.cuts_in_checkpoints && dice.once_in(2) {
            for _ in 0..dice.below(4) {
                world.turn(Duration::from_micros(100))?;
            }
            let seed = dice.roll();
            world.tally.count("crash/while a checkpoint was written");
            world.restart(
                Restart::PowerCut(Survival::Random { seed }),
                FaultRates::default(),
            )?;
            world.disk.set_rates(rates);
            trouble = 0;
            world.audit()?;
        } else if shape.replaces && dice.once_in(4 * life_steps) {
            if world.has_old_device() && dice.once_in(2) {
                world.return_old_device()?;
            } else {
                let by = dice.pick(&[Replacement::New, Replacement::New, Replacement::Formatted]);
                world.replace_device(by)?;
            }
            world.disk.set_rates(rates);
            trouble = 0;
        } else if dice.once_in(life_steps) {
            // Now and then one end follows hard upon another.
            life_steps = if dice.once_in(3) {
                LIFE_STEPS_SHORT
            } else {
                shape.life_steps
            };
            let how = match dice.below(10) {
                0..3 => Restart::Clean,
                3..6 => Restart::Kill,
                6 => Restart::PowerCut(Survival::Flushed),
                7 => Restart::PowerCut(Survival::Submitted),
                _ => Restart::PowerCut(Survival::Random { seed: dice.roll() }),
            };
            // A disk that misbehaves while the store opens costs history; mostly it waits.
            let opening = if dice.once_in(4) {
                rates
            } else {
                FaultRates::default()
            };
            world.restart(how, opening)?;
            world.disk.set_rates(rates);
            trouble = 0;
            if dice.once_in(3) {
                world.audit()?;
            }
        }
    }
    world.settle()?;
    world.audit()?;
    let how = dice.pick(&[
        Restart::Clean,
        Restart::Kill,
        Restart::PowerCut(Survival::Flushed),
    ]);
    world.restart(how, FaultRates::default())?;
    if dice.once_in(3) {
        world.settle()?;
        world.restart(Restart::Clean, FaultRates::default())?;
        world.scrub_finds_what_rots(dice.roll())?;
    }
    world.audit()?;
    world.settle()
}

impl World {
    fn meta_write_bytes(&self) -> u64 {
        self.engine
            .as_ref()
            .map_or(0, |engine| engine.counters().meta_write_bytes)
    }

    /// Two ids may be taken for one: only bytes are judged.
    fn be_lenient(&mut self, lenient: bool) {
        self.model.lenient = lenient;
    }
}
