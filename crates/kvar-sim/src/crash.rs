//! Every moment a power cut can come.
//!
//! ```text
//!   a run is recorded:   submit  submit  complete  flush  submit ...      after every step: what is promised
//!                              │
//!   cut after each of its events: nothing unflushed, all completed, all submitted, and five random
//!   subsets with torn writes, each opened again and held to what was promised before that event
//! ```
//!
//! Every second run is recorded on a store that is full, so that reclaim moves blocks meanwhile.
//!
//! What must always be true: what was promised when the last event before the cut happened holds;
//! what was called between that event and the next may hold or not.

use crate::dice::Dice;
use crate::model::{Ending, Model};
use crate::scenario::{Shape, Temper, fill, step, words_of};
use crate::tally::Tally;
use crate::world::{Restart, Tenancy, Violation, World};
use kvar_base::Moment;
use kvar_engine::EngineConfig;
use kvar_io::sim::{FaultRates, Image, SimDisk, SimOptions, WriteLog};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// Events of one recorded run: eight images each, opened in a few seconds.
const EVENTS_MAX: usize = 320;
/// Blocks read from every image, beside the question about all of them whether they are there.
const BLOCKS_READ: u64 = 16;
/// Blocks the runs are about.
const BLOCKS: u64 = 300;

/// What was found.
#[derive(Clone, Debug)]
pub struct CrashFailure {
    /// The seed of the recorded run.
    pub seed: u64,
    /// What, and where.
    pub what: String,
}

/// What became of all images.
#[derive(Clone, Debug, Default)]
pub struct Crashed {
    /// Images opened.
    pub images: u64,
    /// Events after which they were cut.
    pub points: u64,
    /// What happened.
    pub tally: Tally,
    /// The first that did not hold.
    pub failure: Option<CrashFailure>,
}

/// What was promised when the log had so many events.
struct Promise {
    events: usize,
    model: Model,
}

struct Recording {
    salt: u64,
    config: EngineConfig,
    log: WriteLog,
    promises: Vec<Promise>,
}

/// Records runs from seed `first` on until `images_wanted` images are opened and held to what was
/// promised; every run that is begun is cut at every event.
pub fn enumerate(
    first: u64,
    images_wanted: u64,
    threads: usize,
    progress: impl Fn(u64) + Sync,
) -> Crashed {
    let (next, opened) = (AtomicU64::new(first), AtomicU64::new(0));
    let all = Mutex::new(Crashed::default());
    thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                // Two at least: one store that is fresh and one that is full.
                while opened.load(Ordering::Relaxed) < images_wanted
                    || next.load(Ordering::Relaxed) < first + 2
                {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let mut one = Crashed::default();
                    let cut = catch_unwind(AssertUnwindSafe(|| {
                        cut_everywhere(seed, &mut one, || {
                            progress(opened.fetch_add(1, Ordering::Relaxed) + 1);
                        })
                    }));
                    let what = match cut {
                        Ok(Ok(())) => None,
                        Ok(Err(Violation(what))) => Some(what),
                        Err(panic) => Some(format!("panic: {}", words_of(&*panic))),
                    };
                    let mut all = all.lock().expect("no thread panics holding it");
                    all.images += one.images;
                    all.points += one.points;
                    all.tally.merge(&one.tally);
                    if let Some(what) = what {
                        let known = all.failure.as_ref().map_or(u64::MAX, |known| known.seed);
                        if seed < known {
                            all.failure = Some(CrashFailure { seed, what });
                        }
                        opened.store(u64::MAX / 2, Ordering::Relaxed);
                        next.fetch_max(first + 2, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    all.into_inner().expect("no thread panics holding it")
}

fn cut_everywhere(
    seed: u64,
    crashed: &mut Crashed,
    mut opened: impl FnMut(),
) -> Result<(), Violation> {
    let recording = record(seed)?;
    for point in 0..=recording.log.len() {
        crashed.points += 1;
        let model = recording.promised_at(point);
        for (how, image) in recording.log.images(point, seed) {
            crashed.images += 1;
            let mut dice = Dice::new(seed ^ (point as u64) << 20);
            hold_to(
                &recording,
                model.clone(),
                image,
                &mut dice,
                &mut crashed.tally,
            )
            .map_err(|Violation(what)| {
                Violation(format!(
                    "seed {seed}, cut after {point} of {} events, {how:?}: {what}",
                    recording.log.len()
                ))
            })?;
            opened();
        }
    }
    Ok(())
}

/// Opens an image and asks for what was promised.
fn hold_to(
    recording: &Recording,
    model: Model,
    image: Image,
    dice: &mut Dice,
    tally: &mut Tally,
) -> Result<(), Violation> {
    let disk = SimDisk::with_image(image, SimOptions::default());
    let mut world = World::over(recording.salt, disk, recording.config.clone(), model);
    let ending = Ending {
        power_cut: true,
        everything_kept: false,
        written_before: None,
        history_lost: false,
    };
    let made_room = world.recovery.bucket_evicted;
    world.begin_life(ending, made_room)?;
    for _ in 0..BLOCKS_READ {
        world.get(dice.below(BLOCKS), None, Moment(u64::MAX))?;
    }
    world.answer_all()?;
    tally.merge(&world.tally);
    Ok(())
}

impl Recording {
    /// What was promised at a point of the log. What was called between the events around it may
    /// have happened or not.
    fn promised_at(&self, point: usize) -> Model {
        let after = self
            .promises
            .partition_point(|promise| promise.events <= point);
        let before = &self.promises[after - 1].model;
        let mut model = self
            .promises
            .get(after)
            .map_or_else(|| before.clone(), |next| next.model.clone());
        model.weaken_to(before);
        model
    }
}

fn record(seed: u64) -> Result<Recording, Violation> {
    let mut dice = Dice::new(seed ^ 0x00c0_ffee);
    let full = seed % 2 == 1;
    let config = EngineConfig {
        dram_bytes: dice.pick(&[1, 2, 4]) << 20,
        flush_after: Duration::from_millis(dice.pick(&[20, 100])),
        shares: Tenancy::shares(),
        ..EngineConfig::default()
    };
    let options = SimOptions {
        seed: dice.roll(),
        polls_max: dice.pick(&[1, 4, 8]),
        ..SimOptions::default()
    };
    let mut world = World::format(seed, 16 << 20, 16 << 10, options, config.clone());
    world.tenancy = Tenancy::Mixed(1 + seed / 2 % 3);
    let shape = Shape {
        temper: Temper::Well,
        steps: 0,
        full,
        numbers: BLOCKS,
        namespaces: 1,
        section_bytes_max: if full { 120_000 } else { 30_000 },
        step_us_max: dice.pick(&[1000, 10_000]),
        life_steps: 0,
        puts: 70,
        purges: dice.once_in(2),
        expiring: dice.pick(&[0, 4]),
        promises: dice.pick(&[0, 4]),
        cuts_in_checkpoints: false,
        replaces: false,
    };
    if full {
        fill(&mut world, &mut dice, &shape)?;
    }
    world.settle()?;
    world.restart(Restart::Clean, FaultRates::default())?;
    let disk = SimDisk::with_image(
        world.image(),
        SimOptions {
            log: true,
            ..options
        },
    );
    let mut recorded = World::over(seed, disk, config.clone(), world.model.clone());
    recorded.tenancy = world.tenancy;
    let ending = Ending {
        power_cut: true,
        everything_kept: true,
        written_before: None,
        history_lost: false,
    };
    recorded.begin_life(ending, 0)?;
    let mut promises = vec![Promise {
        events: 0,
        model: recorded.model.clone(),
    }];
    while recorded.disk.log_len() < EVENTS_MAX {
        step(&mut recorded, &mut dice, &shape)?;
        let events = recorded.disk.log_len();
        let model = recorded.model.clone();
        match promises.last_mut() {
            // Later promises of the same moment hold as well.
            Some(last) if last.events == events => last.model = model,
            _ => promises.push(Promise { events, model }),
        }
    }
    Ok(Recording {
        salt: seed,
        config,
        log: recorded.disk.log(),
        promises,
    })
}
