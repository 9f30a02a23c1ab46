//! Many seeds on several threads. The order in which they end is no part of any run.

use crate::scenario::{Ran, Wanted, run};
use crate::tally::{RUNS_TO_SEE_ALL, Tally};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

/// What became of many runs.
#[derive(Debug, Default)]
pub struct Many {
    /// Runs that ended.
    pub runs: u64,
    /// What happened in all of them.
    pub tally: Tally,
    /// Those that found something, by seed.
    pub failures: Vec<Ran>,
}

impl Many {
    /// What never happened although enough runs should have seen it.
    #[must_use]
    pub fn blind_to(&self) -> Vec<&'static str> {
        if self.runs < RUNS_TO_SEE_ALL {
            return Vec::new();
        }
        self.tally.unseen()
    }
}

/// Runs seeds until all have run or `failures_max` have failed; tells `progress` after each which
/// one it was and how many have ended.
pub fn run_many(
    seeds: Range<u64>,
    threads: usize,
    wanted: Wanted,
    failures_max: usize,
    progress: impl Fn(u64, &Ran) + Sync,
) -> Many {
    let (next, ended) = (AtomicU64::new(seeds.start), AtomicU64::new(0));
    let stop = AtomicBool::new(false);
    let many = Mutex::new(Many::default());
    thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let ran = run(seed, wanted);
                    progress(ended.fetch_add(1, Ordering::Relaxed) + 1, &ran);
                    let mut many = many.lock().expect("no thread panics holding it");
                    many.runs += 1;
                    many.tally.merge(&ran.tally);
                    if ran.failure.is_some() {
                        many.failures.push(ran);
                        if many.failures.len() >= failures_max {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let mut many = many.into_inner().expect("no thread panics holding it");
    many.failures.sort_by_key(|ran| ran.seed);
    many
}
