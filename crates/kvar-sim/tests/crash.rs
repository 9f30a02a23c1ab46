//! The short form of `kvar-sim crash`: every event of two recorded runs, one of them on a full
//! device, cut eight ways each.

use kvar_sim::crash::enumerate;

/// `KVAR_CRASH_IMAGES=n` cuts more runs.
#[test]
fn every_crash_point_keeps_its_promises() {
    let wanted = std::env::var("KVAR_CRASH_IMAGES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(2000);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let crashed = enumerate(0, wanted, cores, |_| {});
    if let Some(failure) = crashed.failure {
        panic!(
            "{}\nagain: cargo run --release -p kvar-sim -- crash --first {} --points 1 --threads 1",
            failure.what, failure.seed
        );
    }
    let hits = crashed.tally.get("get/hit after a restart");
    let promised = crashed.tally.get("checked/was flushed and is there");
    println!(
        "{} images of {} points, {promised} promises held, {hits} hits",
        crashed.images, crashed.points
    );
    assert!(crashed.images >= 2000 && promised > 20_000 && hits > 5000);
}
