//! The short form of the proof: what `kvar-sim engine` does in the long one.

use kvar_sim::churn::churn;
use kvar_sim::file_churn::churn_file;
use kvar_sim::many::{Many, run_many};
use kvar_sim::scenario::{Temper, Wanted, run, temper_of};

/// Seeds of the short form; a quarter of a minute on two cores.
const SEEDS: u64 = 500;

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn show(many: &Many) -> String {
    many.failures
        .iter()
        .filter_map(|ran| {
            let failure = ran.failure.as_ref()?;
            Some(format!(
                "seed {} ({:?}): {}\n  {}\nagain: cargo run --release -p kvar-sim -- engine --seed {}\n",
                ran.seed,
                ran.temper,
                failure.what,
                failure.trace.join("\n  "),
                ran.seed
            ))
        })
        .collect()
}

/// `KVAR_SEEDS=n` runs more, `KVAR_SEED_FIRST=n` others.
#[test]
fn no_seed_finds_a_wrong_byte_a_lost_block_or_a_call_that_hangs() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let first = number("KVAR_SEED_FIRST").unwrap_or(0);
    let seeds = number("KVAR_SEEDS").unwrap_or(SEEDS);
    let many = run_many(
        first..first + seeds,
        cores(),
        Wanted::default(),
        3,
        |_, _| {},
    );
    assert!(many.failures.is_empty(), "{}", show(&many));
    assert!(
        many.blind_to().is_empty(),
        "this never happened: {:?}",
        many.blind_to()
    );
    let faulty = (first..first + seeds)
        .filter(|seed| temper_of(*seed) != Temper::Well)
        .count();
    println!("{} runs, {faulty} with a disk that misbehaves", many.runs);
}

#[test]
fn two_runs_of_a_seed_agree() {
    for seed in [3, 8, 17] {
        let (first, second) = (run(seed, Wanted::default()), run(seed, Wanted::default()));
        assert!(first.failure.is_none());
        assert_eq!(first.fingerprint, second.fingerprint, "seed {seed}");
    }
    let (one, other) = (run(2, Wanted::default()), run(4, Wanted::default()));
    assert_ne!(one.fingerprint, other.fingerprint);
}

/// The device written over twenty times by three namespaces, with removes, times to live, leases, the
/// scrub, restarts of every kind, and the device lost and replaced: nothing wrong, and after every
/// round memory holds the resident blocks alone.
#[test]
fn twenty_turnovers_leave_nothing_behind() {
    let ran = churn(1, 20);
    if let Some(failure) = ran.failure {
        panic!("{}\n  {}", failure.what, failure.trace.join("\n  "));
    }
    let rounds = ran.tally.get("churn/round");
    let reclaimed = ran.tally.get("left/device, reclaim");
    assert!(
        rounds >= 5 && reclaimed > 1000,
        "{rounds} rounds, {reclaimed} reclaimed"
    );
    for what in [
        "device/replaced",
        "left/device, expired",
        "remove/done",
        "get/hit of what is promised",
        "scrub/two passes",
        "left/memory, for another tenant",
    ] {
        assert!(ran.tally.get(what) > 0, "{what} did not happen");
    }
}

/// The same on a real file, three times over.
#[test]
fn a_real_file_keeps_every_byte_over_turnovers() {
    let folder = tempfile::tempdir().expect("a folder");
    let found = churn_file(&folder.path().join("data"), 64 << 20, 3, 1, |_, _| {})
        .expect("the file can be used");
    assert_eq!(found.failures, Vec::<String>::new(), "{found:?}");
    assert!(
        found.hits > 500 && found.replaced == 1 && found.restarts == 3,
        "{found:?}"
    );
}
