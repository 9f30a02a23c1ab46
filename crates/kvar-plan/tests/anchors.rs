//! The published figures of the shipped trace: if one of these moves, either the reading of
//! traces or the policy has changed its meaning.

use kvar_plan::{
    Admit, Capacity, Model, OfflineOptions, Policy, Trace, TraceOptions, replay_offline,
    replay_offline_with,
};
use kvar_policy::DropAll;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::LazyLock;

static CONVERSATION: LazyLock<Trace> = LazyLock::new(|| {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../traces/mooncake-conversation.jsonl.zst");
    let file = File::open(path).expect("the shipped trace is there");
    let reader = zstd::Decoder::new(file).expect("it is zstd");
    Trace::read(BufReader::new(reader), &TraceOptions::default()).expect("it is a trace")
});

fn percent(share: f64) -> String {
    format!("{:.1}", share * 100.0)
}

#[test]
fn unit_blocks_reach_the_published_hit_rates() {
    let percents = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];
    let options = OfflineOptions {
        model: Model::Blocks,
        capacities: percents.map(Capacity::Percent).to_vec(),
        ..OfflineOptions::default()
    };
    let report = replay_offline(&CONVERSATION, &options).unwrap();
    assert_eq!((report.requests, report.distinct_blocks), (12_031, 182_790));
    assert_eq!(report.block_tokens, 512);
    assert_eq!(percent(report.ceiling_block_hit_rate), "36.6");
    let rates: Vec<_> = report
        .rows
        .iter()
        .map(|row| percent(row.block_hit_rate))
        .collect();
    assert_eq!(
        rates,
        ["5.2", "7.9", "19.6", "27.9", "34.5", "36.3", "36.6"]
    );
    assert_eq!(report.rows[2].capacity_blocks, 9_139);
    assert_eq!(report.rows[6].flash_write_blocks, 182_790);
}

#[test]
fn what_was_used_recently_comes_close_to_exact_lru() {
    let options = OfflineOptions {
        model: Model::Engine,
        policy: Policy::Recent,
        capacities: [5.0, 10.0, 20.0, 50.0].map(Capacity::Percent).to_vec(),
        dram_share: 0.0,
        ..OfflineOptions::default()
    };
    let report = replay_offline(&CONVERSATION, &options).unwrap();
    let exact = [0.196, 0.279, 0.345, 0.363];
    for (row, exact) in report.rows.iter().zip(exact) {
        assert!(
            (row.block_hit_rate - exact).abs() < 0.01,
            "{row:?} against {exact}"
        );
        assert!(row.write_amplification < 1.15, "{row:?}");
    }
}

#[test]
fn rewriting_earns_its_wear() {
    let options = OfflineOptions {
        model: Model::Engine,
        policy: Policy::Recent,
        capacities: [10.0, 20.0].map(Capacity::Percent).to_vec(),
        ..OfflineOptions::default()
    };
    let kept = replay_offline(&CONVERSATION, &options).unwrap();
    let ring = replay_offline_with(&CONVERSATION, &options, || DropAll).unwrap();
    for (kept, ring) in kept.rows.iter().zip(&ring.rows) {
        assert_eq!(ring.write_amplification, 1.0);
        assert!(
            kept.block_hit_rate > ring.block_hit_rate + 0.02,
            "{kept:?} against {ring:?}"
        );
    }
}

#[test]
fn the_optimum_reaches_the_published_hit_rates() {
    let options = OfflineOptions {
        model: Model::Blocks,
        policy: Policy::Optimum,
        capacities: [1.0, 2.0, 5.0, 10.0].map(Capacity::Percent).to_vec(),
        ..OfflineOptions::default()
    };
    let report = replay_offline(&CONVERSATION, &options).unwrap();
    let rates: Vec<_> = report
        .rows
        .iter()
        .map(|row| percent(row.block_hit_rate))
        .collect();
    assert_eq!(rates, ["24.6", "31.4", "36.6", "36.6"]);
}

/// Memory inside the capacity, worth learned: what `docs/decisions/0003-learned-worth.md` says of
/// this trace.
#[test]
fn learned_worth_beats_exact_lru_where_room_is_short() {
    let options = OfflineOptions {
        model: Model::Engine,
        capacities: [2.0, 5.0, 20.0].map(Capacity::Percent).to_vec(),
        ..OfflineOptions::default()
    };
    let learned = replay_offline(&CONVERSATION, &options).unwrap();
    let exact = [0.079, 0.196, 0.345];
    let gains: Vec<f64> = learned
        .rows
        .iter()
        .zip(exact)
        .map(|(row, exact)| row.block_hit_rate - exact)
        .collect();
    assert!(gains[..2].iter().sum::<f64>() / 2.0 > 0.03, "{gains:?}");
    assert!(gains.iter().all(|gain| *gain > -0.01), "{gains:?}");
    for row in &learned.rows {
        assert!(row.write_amplification < 1.85, "{row:?}");
    }
    // Deciding late saves writes, and costs no hits.
    let all = OfflineOptions {
        admit: Admit::All,
        ..options
    };
    let all = replay_offline(&CONVERSATION, &all).unwrap();
    for (late, all) in learned.rows.iter().zip(&all.rows) {
        assert!(late.flash_write_blocks < all.flash_write_blocks, "{late:?}");
        assert!(
            late.block_hit_rate > all.block_hit_rate - 0.001,
            "{late:?} {all:?}"
        );
    }
}

/// What `docs/internals/tiers.md` says of this trace. Half a point is noise.
#[test]
fn a_big_tier_brings_hits_where_room_is_short() {
    for admit in [Admit::ByWorth, Admit::All] {
        let alone = OfflineOptions {
            model: Model::Engine,
            admit,
            capacities: vec![Capacity::Percent(2.0)],
            ..OfflineOptions::default()
        };
        let both = OfflineOptions {
            big: [10.0, 20.0].map(Capacity::Percent).to_vec(),
            ..alone.clone()
        };
        let alone = replay_offline(&CONVERSATION, &alone).unwrap();
        let both = replay_offline(&CONVERSATION, &both).unwrap();
        let alone = &alone.rows[0];
        for row in &both.rows {
            let big = row.big.as_ref().unwrap();
            assert_eq!(row.capacity_blocks, alone.capacity_blocks);
            assert!(row.block_hit_rate > alone.block_hit_rate + 0.03, "{row:?}");
            let sum = big.fast_block_hit_rate + big.block_hit_rate;
            assert!((sum - row.block_hit_rate).abs() < 1e-9, "{row:?}");
            assert!(big.taken_blocks <= big.offered_blocks, "{row:?}");
            assert!(big.write_amplification < 1.85, "{row:?}");
        }
        // A larger one is no worse.
        let [small, large] = &both.rows[..] else {
            panic!("a row a big tier")
        };
        assert!(
            large.block_hit_rate > small.block_hit_rate - 0.005,
            "{both:?}"
        );
        // Also where the write budget of the fast tier is short: what memory lets go is not lost to it.
        assert!(large.block_hit_rate > 0.34, "{both:?}");
        let writes = large.flash_write_blocks;
        assert!(admit == Admit::All || writes < 30_000, "{writes}");
    }
}
