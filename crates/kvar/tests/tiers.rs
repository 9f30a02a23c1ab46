//! Two tiers in a real process: what was flushed in either is there after kill -9.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};
use support::{PATIENCE, Place, finish};

/// What the trace below writes.
const BLOCKS_A_SECOND: f64 = 400.0;

/// Prompts of eight new blocks each, 20 ms apart: 25 MB a second with blocks of 64 KiB, which a big
/// tier keeps pace with on any disk.
fn write_steady_trace(path: &Path, requests: u64) {
    let line = |number: u64| {
        let chain: Vec<u64> = (number * 8..number * 8 + 8).collect();
        format!(
            "{{\"timestamp\": {}, \"input_length\": {}, \"output_length\": 1, \"hash_ids\": {chain:?}}}\n",
            number * 8 * 1000 / BLOCKS_A_SECOND as u64,
            chain.len() * 512
        )
    };
    std::fs::write(path, (0..requests).map(line).collect::<String>()).unwrap();
}

fn count(status: &serde_json::Value, name: &str) -> u64 {
    let shards = status["shards"].as_array().unwrap().iter();
    shards
        .map(|shard| shard["engine"]["counters"][name].as_u64().unwrap())
        .sum()
}

#[test]
fn a_kill_loses_nothing_that_was_settled_in_either_tier() {
    let dir = tempfile::tempdir().unwrap();
    let mut place = Place::new(dir.path()).with(&["--flush-after", "100ms", "--dram", "64MiB"]);
    let size = place
        .flags
        .iter()
        .position(|flag| flag == "--size")
        .unwrap();
    place.flags.drain(size..size + 2);
    place = place.with(&["--flash-write-budget", "unlimited"]);
    place.data = vec![
        dir.path().join("fast=48MiB"),
        dir.path().join("big=1GiB,big"),
    ];
    let trace = dir.path().join("trace.jsonl");
    write_steady_trace(&trace, 400);
    let server = place.serve();
    let journal = dir.path().join("journal");
    let mut command = server.command("replay");
    command
        .arg(&trace)
        .args([
            "--block-bytes",
            "64KiB",
            "--pace",
            "real",
            "--deadline",
            "5s",
            "--json",
        ])
        .arg("--journal")
        .arg(&journal);
    let running = std::thread::spawn(move || finish(command));
    let until = Instant::now() + PATIENCE;
    let (status, flushed_through_us, looked_at) = loop {
        let looked_at = Instant::now();
        let (status, flushed_through_us) = server.status_flushed();
        if count(&status, "demoted") > 600 {
            break (status, flushed_through_us, looked_at);
        }
        assert!(Instant::now() < until, "nothing goes down: {}", place.log());
        std::thread::sleep(Duration::from_millis(20));
    };
    let place = server.kill();
    // What left between the last look and the kill was counted by nobody who is still there.
    let unseen = (looked_at.elapsed().as_secs_f64() * BLOCKS_A_SECOND).ceil() as u64;
    assert_eq!(running.join().unwrap().status.code(), Some(1));

    let server = place.serve();
    let report = server.verify(&journal, flushed_through_us);
    let (settled, hits) = (&report["settled"], &report["settled_hits"]);
    let settled = settled.as_u64().unwrap();
    assert!(settled > 800, "{report}");
    // What a machine that is busy was too slow to take down is counted, and so is the block whose index
    // entry another one needed.
    let reasons = ["not_worth", "limit", "busy", "late", "gone", "failed"];
    let lost = reasons.map(|reason| count(&status, &format!("not_demoted_{reason}")));
    let lost = lost.iter().sum::<u64>() + count(&status, "bucket_evicted") + unseen;
    assert!(
        hits.as_u64().unwrap() + lost >= settled,
        "{lost} lost, {report}"
    );
    assert!(lost < settled / 10, "{lost} lost, {report}");
    assert_eq!(
        (&report["wrong_bytes"], &report["removed_but_back"]),
        (&0.into(), &0.into())
    );
    let status = server.json("status", &[]);
    assert!(
        status["tiers"][1]["blocks"].as_u64().unwrap() > 500,
        "{status}"
    );
    assert_eq!(server.stop(), 0);
    assert!(place.log().contains("dropped_blocks=0"), "{}", place.log());
}
