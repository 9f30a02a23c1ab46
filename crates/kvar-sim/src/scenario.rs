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

use crate::dice::Dice;
use crate::payload;
use crate::tally::Tally;
use crate::world::{PutEnd, Restart, Violation, WantedPut, World};
use kvar_base::Moment;
use kvar_engine::EngineConfig;
use kvar_io::sim::{Fault, FaultKind, FaultOn, FaultRates, SimOptions, Survival};
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

/// What to run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Steps; decided by the seed if `None`.
    pub steps: Option<u64>,
    /// Only this temper.
    pub temper: Option<Temper>,
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
    pub(crate) section_bytes_max: u64,
    /// Longest time a step takes, in microseconds.
    pub(crate) step_us_max: u64,
    /// A restart happens once in so many steps.
    pub(crate) life_steps: u64,
    /// Times out of 100 that a step is a put; the rest are mostly gets.
    pub(crate) puts: u64,
    pub(crate) purges: bool,
}

/// Runs a seed.
#[must_use]
pub fn run(seed: u64, wanted: Wanted) -> Ran {
    let mut dice = Dice::new(seed);
    let temper = wanted.temper.unwrap_or(temper_of(seed));
    let rates = rates(temper, &mut dice);
    let (mut world, mut shape) = build(seed, temper, &mut dice);
    world.be_lenient(wanted.lenient);
    shape.steps = wanted.steps.unwrap_or(shape.steps);
    world.trace_steps = wanted.trace_steps.unwrap_or(world.trace_steps);
    let result = catch_unwind(AssertUnwindSafe(|| {
        live(&mut world, &mut dice, &shape, rates)
    }));
    ran(seed, temper, &mut world, result)
}

fn ran(
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

/// Writes a store over, `turnovers` times its device, with removes and restarts of every kind, and
/// looks each time whether everything comes to rest and memory comes back.
#[must_use]
pub fn churn(seed: u64, turnovers: u64) -> Ran {
    let mut dice = Dice::new(seed);
    let (mut world, shape) = build(seed, Temper::Well, &mut dice);
    let shape = Shape {
        numbers: 900,
        puts: 60,
        ..shape
    };
    let result = catch_unwind(AssertUnwindSafe(|| {
        let wanted = turnovers * world.superblock.device_bytes;
        while world.written_bytes() < wanted {
            fill(&mut world, &mut dice, shape.numbers)?;
            for _ in 0..150 {
                step(&mut world, &mut dice, &shape)?;
            }
            world.settle()?;
            world.audit()?;
            world.tally.count("churn/round");
            let how = match dice.below(3) {
                0 => Restart::Clean,
                1 => Restart::Kill,
                _ => Restart::PowerCut(Survival::Random { seed: dice.roll() }),
            };
            world.restart(how, FaultRates::default())?;
        }
        world.settle()
    }));
    ran(seed, Temper::Well, &mut world, result)
}

pub(crate) fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_else(|| "without words".into())
}

fn build(seed: u64, temper: Temper, dice: &mut Dice) -> (World, Shape) {
    let bytes = dice.pick(&[16, 16, 16, 18, 20, 24, 32]) << 20;
    let config = EngineConfig {
        dram_bytes: dice.pick(&[512, 1024, 2048, 2048, 4096]) << 10,
        flush_after: Duration::from_millis(dice.pick(&[20, 60, 100, 400])),
        shutdown_flush: Duration::from_secs(30),
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
        section_bytes_max: dice.pick(&[20_000, 40_000, 120_000, 250_000]),
        step_us_max: dice.pick(&[300, 1000, 3000, 10_000]),
        life_steps: dice.pick(&[120, 250, 400, 800]),
        puts: dice.pick(&[30, 45, 45, 70, 90]),
        purges: dice.once_in(3),
    };
    (
        World::format(seed, bytes, expected_block_bytes, options, config),
        shape,
    )
}

/// How often, in a million operations, each kind of fault strikes.
fn rates(temper: Temper, dice: &mut Dice) -> FaultRates {
    let none = FaultRates::default();
    let ppm = dice.pick(&[300, 1000, 3000, 10_000]);
    match temper {
        Temper::Well | Temper::Leave | Temper::Full | Temper::Aimed => none,
        Temper::Misread => FaultRates {
            read_flip_ppm: ppm,
            read_misdirect_ppm: ppm,
            read_error_ppm: ppm,
            read_short_ppm: ppm,
            ..none
        },
        Temper::Miswrite => FaultRates {
            write_flip_ppm: ppm,
            write_misdirect_ppm: ppm,
            write_lost_ppm: ppm,
            ..none
        },
        Temper::Refuse => FaultRates {
            write_error_ppm: ppm,
            write_short_ppm: ppm,
            write_no_space_ppm: ppm,
            flush_error_ppm: ppm,
            ..none
        },
        Temper::Lie => FaultRates {
            flush_lost_ppm: 20 * ppm,
            ..none
        },
        Temper::Slow => FaultRates {
            late_ppm: 10 * ppm,
            ..none
        },
        Temper::All => FaultRates {
            read_flip_ppm: ppm / 2,
            read_misdirect_ppm: ppm / 2,
            read_error_ppm: ppm / 2,
            read_short_ppm: ppm / 2,
            write_flip_ppm: ppm / 2,
            write_misdirect_ppm: ppm / 2,
            write_error_ppm: ppm / 2,
            write_short_ppm: ppm / 2,
            write_no_space_ppm: ppm / 2,
            write_lost_ppm: ppm / 2,
            flush_lost_ppm: ppm,
            flush_error_ppm: ppm,
            late_ppm: ppm,
        },
    }
}

fn live(
    world: &mut World,
    dice: &mut Dice,
    shape: &Shape,
    rates: FaultRates,
) -> Result<(), Violation> {
    if shape.full {
        fill(world, dice, shape.numbers)?;
    }
    world.disk.set_rates(rates);
    let mut trouble = 0;
    let mut life_steps = shape.life_steps;
    for _ in 0..shape.steps {
        step(world, dice, shape)?;
        trouble = strike(world, dice, shape, trouble)?;
        if dice.once_in(life_steps) {
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
    world.audit()?;
    world.settle()
}

/// Puts, and removes, more than fits; some blocks are read now and then and so stay.
pub(crate) fn fill(world: &mut World, dice: &mut Dice, numbers: u64) -> Result<(), Violation> {
    let bytes_wanted = world.superblock.device_bytes * 5 / 4;
    let mut bytes = 0;
    while bytes < bytes_wanted {
        let number = dice.below(numbers);
        let len = dice.between(1000, 100_000);
        let wanted = WantedPut {
            number,
            writer: 1,
            lengths: vec![len as u32],
            durable: false,
            ephemeral: false,
            patience: Duration::from_secs(60),
        };
        if world.begin_put(wanted)? {
            world.end_put(0, PutEnd::Commit)?;
            bytes += len;
        } else {
            world.remove(&[number])?;
        }
        if dice.once_in(2) {
            world.get(dice.below(numbers.div_ceil(6)), None, Moment(u64::MAX))?;
        }
        world.turn(Duration::from_millis(dice.below(8)))?;
    }
    Ok(())
}

/// One call, or a moment of nothing.
pub(crate) fn step(world: &mut World, dice: &mut Dice, shape: &Shape) -> Result<(), Violation> {
    // Some blocks are wanted more than others.
    let number = if dice.once_in(2) {
        dice.below(shape.numbers)
    } else {
        dice.below(shape.numbers.div_ceil(8))
    };
    let what = dice.below(100);
    match dice.below(100) {
        0..88 if what < shape.puts => put(world, dice, shape, number)?,
        0..88 => get(world, dice, number)?,
        88..90 => {
            let count = dice.between(1, 3);
            let numbers: Vec<u64> = (0..count).map(|_| dice.below(shape.numbers)).collect();
            world.remove(&numbers)?;
        }
        90..92 => world.flush()?,
        92..95 => {
            let count = dice.between(1, 12);
            let first = dice.below(shape.numbers);
            let numbers: Vec<u64> = (first..first + count).collect();
            world.lookup(&numbers)?;
        }
        95..97 => world.stat(number)?,
        97 if shape.purges && dice.once_in(20) => world.purge()?,
        97 => world.let_go()?,
        _ => world.turn(Duration::from_millis(dice.below(60)))?,
    }
    if !world.open_puts.is_empty() && (world.open_puts.len() > 6 || dice.once_in(2)) {
        let at = dice.below(world.open_puts.len() as u64) as usize;
        let how = match dice.below(40) {
            0 => PutEnd::Abort,
            1 => PutEnd::WrongByte,
            _ => PutEnd::Commit,
        };
        world.end_put(at, how)?;
    }
    if dice.once_in(2) {
        world.turn(Duration::from_micros(dice.below(shape.step_us_max)))?;
    }
    Ok(())
}

fn put(world: &mut World, dice: &mut Dice, shape: &Shape, number: u64) -> Result<(), Violation> {
    let block_bytes_max = world.superblock.block_bytes_max();
    let section_bytes_max = shape.section_bytes_max.min(block_bytes_max);
    let mut lengths = payload::lengths(dice, section_bytes_max);
    match dice.below(200) {
        0 => lengths = vec![block_bytes_max as u32; 2],
        1 => lengths.push(0),
        _ => {
            while lengths.iter().map(|len| u64::from(*len)).sum::<u64>() > block_bytes_max {
                lengths.pop();
            }
        }
    }
    let patience = match dice.below(60) {
        0 => Duration::ZERO,
        1 => Duration::from_micros(1),
        _ => Duration::from_secs(3600),
    };
    let wanted = WantedPut {
        number,
        writer: dice.between(1, 5),
        lengths,
        durable: dice.once_in(20),
        ephemeral: dice.once_in(25),
        patience,
    };
    let comes = world.begin_put(wanted)?;
    if comes && !dice.once_in(4) {
        let at = world.open_puts.len() - 1;
        world.end_put(at, PutEnd::Commit)?;
    }
    Ok(())
}

fn get(world: &mut World, dice: &mut Dice, number: u64) -> Result<(), Violation> {
    let sections = match dice.below(8) {
        0 => world.sections_of(number).map(|count| {
            let first = dice.below(u64::from(count)) as u16;
            first..dice.between(u64::from(first) + 1, u64::from(count)) as u16
        }),
        1 if dice.once_in(20) => Some(900..901),
        _ => None,
    };
    let deadline = if dice.once_in(100) {
        Moment(0)
    } else {
        Moment(u64::MAX)
    };
    world.get(number, sections, deadline)
}

/// Trouble that lasts: `trouble` is how many steps of it are left.
fn strike(
    world: &mut World,
    dice: &mut Dice,
    shape: &Shape,
    trouble: u64,
) -> Result<u64, Violation> {
    if trouble > 1 {
        return Ok(trouble - 1);
    }
    if trouble == 1 {
        world.disk.clear_faults();
        world.disk.release_stuck();
        world.tally.count(match shape.temper {
            Temper::Leave => "fault/device came back",
            _ => "fault/trouble over",
        });
        return Ok(0);
    }
    if !dice.once_in(80) {
        return Ok(0);
    }
    let all = |world: &World, kind: FaultKind, on: &[FaultOn]| {
        for on in on {
            world.disk.inject(Fault::always(kind, *on));
        }
    };
    let everything = [FaultOn::Read, FaultOn::Write, FaultOn::Flush];
    match shape.temper {
        Temper::Leave => {
            world.tally.count("fault/device vanished");
            all(world, FaultKind::Error, &everything);
            Ok(dice.between(20, 300))
        }
        Temper::Full => {
            world.tally.count("fault/file system full");
            all(world, FaultKind::NoSpace, &[FaultOn::Write]);
            Ok(dice.between(20, 300))
        }
        Temper::Slow => {
            // Reads above all: what they read must stay while everything else goes on.
            let on = dice.pick(&[FaultOn::Read, FaultOn::Read, FaultOn::Write, FaultOn::Flush]);
            for _ in 0..dice.between(1, 6) {
                world.disk.inject(Fault::once(FaultKind::Stuck, on));
            }
            Ok(dice.between(10, 400))
        }
        Temper::Aimed | Temper::All => {
            aim(world, dice);
            Ok(0)
        }
        _ => Ok(0),
    }
}

/// One fault at the bytes of one block.
fn aim(world: &mut World, dice: &mut Dice) {
    let Some(bytes) = world.place_of_some_block(dice.roll()) else {
        return;
    };
    let pages = (bytes.end - bytes.start) / 4096;
    let page = bytes.start + dice.below(pages.max(1)) * 4096;
    match dice.below(3) {
        0 => {
            let sector = page + dice.below(8) * 512;
            world
                .disk
                .corrupt(sector..sector + 512, 1 + dice.below(9) as u32);
            world.tally.count("fault/sector corrupted");
        }
        1 => {
            let kind = dice.pick(&[
                FaultKind::FlipBits(1),
                FaultKind::FlipBits(40),
                FaultKind::Misdirect,
                FaultKind::Error,
                FaultKind::Short,
            ]);
            let fault = Fault::once(kind, FaultOn::Read);
            world.disk.inject(fault.within(page..page + 4096));
        }
        _ => {
            let kind = dice.pick(&[FaultKind::FlipBits(1), FaultKind::Lost, FaultKind::Short]);
            let fault = Fault::once(kind, FaultOn::Write);
            world.disk.inject(fault.within(page..page + 4096));
        }
    }
}

impl World {
    /// Two ids may be taken for one: only bytes are judged.
    fn be_lenient(&mut self, lenient: bool) {
        self.model.lenient = lenient;
    }

    fn sections_of(&self, number: u64) -> Option<u16> {
        let block = self.model.blocks.get(&number)?;
        match block.now {
            crate::model::Now::Known(nonce) => {
                let count = block.put(nonce)?.lengths.len() as u16;
                (count > 1).then_some(count)
            }
            _ => None,
        }
    }
}
