//! Every check of the engine is switched off in turn, and the simulator must find it: else a check
//! that somebody breaks by accident would go unnoticed as well.
//!
//! The number behind each mutation is the number of seeds within which it must be found, a few
//! times what it took when this was written (the test prints what it takes; the table is in
//! `docs/internals/proof.md`). `KVAR_HUNT=1000` hunts longer.

use kvar_engine::mutation::{Check, disable, weaken_tags};
use kvar_sim::scenario::{Focus, Temper, Wanted, run};

struct Mutation {
    checks: &'static [Check],
    /// The disk under which it shows.
    temper: Temper,
    /// What the runs do more of.
    focus: Option<Focus>,
    /// Two ids are often taken for one, so that only bytes are judged.
    collisions: bool,
    seeds: u64,
}

const fn mutation(checks: &'static [Check], temper: Temper, seeds: u64) -> Mutation {
    Mutation {
        checks,
        temper,
        focus: None,
        collisions: false,
        seeds,
    }
}

const fn focused(checks: &'static [Check], focus: Focus, seeds: u64) -> Mutation {
    Mutation {
        focus: Some(focus),
        ..mutation(checks, Temper::Well, seeds)
    }
}

/// Bits of an index tag that are left where two ids are to be taken for one.
const WEAK_TAG_BITS: u32 = 5;

/// Hunts through seeds; how many it took, and what was found.
fn hunt(mutation: &Mutation, seeds: u64) -> Option<(u64, String)> {
    let _off = disable(mutation.checks);
    let _weak = mutation.collisions.then(|| weaken_tags(WEAK_TAG_BITS));
    let wanted = Wanted {
        temper: Some(mutation.temper),
        focus: mutation.focus,
        lenient: mutation.collisions,
        ..Wanted::default()
    };
    (0..seeds).find_map(|seed| {
        let failure = run(seed, wanted).failure?;
        Some((seed + 1, failure.what))
    })
}

fn must_be_found(mutation: &Mutation) {
    let longer = std::env::var("KVAR_HUNT")
        .ok()
        .and_then(|text| text.parse().ok());
    let seeds = longer.unwrap_or(mutation.seeds);
    match hunt(mutation, seeds) {
        Some((took, what)) => {
            let what: String = what.chars().take(200).collect();
            println!("{:?} found after {took} seeds: {what}", mutation.checks);
        }
        None => panic!(
            "{:?} is off and {seeds} seeds do not see it",
            mutation.checks
        ),
    }
}

macro_rules! mutations {
    ($($name:ident: $mutation:expr;)*) => {
        $(#[test] fn $name() { must_be_found(&$mutation); })*
    };
}

mutations! {
    without_generations_of_pages: mutation(&[Check::Generation], Temper::Well, 40);
    without_a_check_of_stored_bytes: mutation(&[Check::Bytes], Temper::Miswrite, 30);
    without_ids_in_checks: Mutation {
        collisions: true,
        ..mutation(&[Check::IdFold], Temper::Well, 20)
    };
    without_a_check_of_pages: focused(&[Check::Page], Focus::Reuse, 100);
    without_two_places_for_a_page: mutation(&[Check::TwoPlaces], Temper::Well, 200);
    without_tombstones: mutation(&[Check::Tombstone], Temper::Well, 20);
    without_waiting_for_readers: Mutation {
        temper: Temper::Slow,
        ..focused(&[Check::Readers], Focus::Readers, 900)
    };
    without_order_at_recovery: mutation(&[Check::SequenceOrder], Temper::Well, 40);
    without_generations_of_checkpoints: mutation(&[Check::CheckpointGeneration], Temper::Well, 60);
    without_a_check_at_commit: mutation(&[Check::ContentCheck], Temper::Well, 5);
    with_records_before_payload: mutation(&[Check::RecordAfterPayload], Temper::Well, 20);
    without_a_flush_before_reuse: mutation(&[Check::FlushBeforeReuse], Temper::Well, 400);
    without_a_flush_of_headers: focused(&[Check::HeaderFlush], Focus::Reuse, 400);
    without_a_flush_of_moved_payload: focused(&[Check::MovedPayloadFlush], Focus::Reuse, 60);
    without_a_flush_before_a_checkpoint: focused(&[Check::CheckpointFlush], Focus::Checkpoints, 60);
    without_records_before_a_checkpoint: focused(&[Check::CheckpointRecords], Focus::Checkpoints, 200);
    without_leases: focused(&[Check::Lease], Focus::Leases, 20);
    without_expiry: focused(&[Check::Expiry], Focus::Expiry, 10);
    without_expiry_at_recovery: focused(&[Check::ExpiryAtRecovery], Focus::Expiry, 10);
    without_a_flush_below: focused(&[Check::FlushedBelow], Focus::Below, 10);
    without_a_check_by_the_scrub: focused(&[Check::Scrub], Focus::Checkpoints, 60);
}

/// The generation in `check64` is a second lock behind the one on the pages, and nothing shows when
/// it alone is open: an entry leads to a segment of another generation only when a page of that
/// one was taken for this one's (found above), and even then the place holds either the very bytes
/// that were put, or others, which the CRC beside it does not let pass. Should this test fail,
/// the generation has come to carry weight of its own: move it up into the list.
#[test]
fn the_generation_in_check64_is_covered_by_others() {
    let covered = mutation(&[Check::PlaceGeneration], Temper::Well, 30);
    if let Some((seed, what)) = hunt(&covered, covered.seeds) {
        panic!("seed {}: {what}", seed - 1);
    }
}

/// The same disks with nothing switched off: what is found above is the mutation.
#[test]
fn nothing_is_found_when_nothing_is_switched_off() {
    let collisions = Mutation {
        collisions: true,
        ..mutation(&[], Temper::Well, 0)
    };
    for (mutation, seeds) in [
        (collisions, 15),
        (focused(&[], Focus::Checkpoints, 0), 10),
        (focused(&[], Focus::Leases, 0), 10),
        (focused(&[], Focus::Expiry, 0), 10),
        (focused(&[], Focus::Below, 0), 15),
        (mutation(&[], Temper::Slow, 0), 15),
        (mutation(&[], Temper::Miswrite, 0), 15),
    ] {
        if let Some((seed, what)) = hunt(&mutation, seeds) {
            panic!("{:?}, seed {}: {what}", mutation.temper, seed - 1);
        }
    }
}
