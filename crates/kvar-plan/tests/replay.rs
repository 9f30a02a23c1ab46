//! Offline replay and the reading of traces, from outside: small traces in, reports out.

use kvar_plan::{
    Admit, Capacity, Model, OfflineError, OfflineOptions, Policy, Trace, TraceOptions,
    replay_offline,
};
use proptest::prelude::*;

/// A trace of whole 16-token blocks, one request a list of ids.
fn trace(requests: &[Vec<u64>]) -> Trace {
    let lines: String = requests
        .iter()
        .map(|ids| {
            format!(
                "{{\"timestamp\":0,\"input_length\":{},\"output_length\":0,\"hash_ids\":{ids:?}}}\n",
                ids.len() * 16
            )
        })
        .collect();
    let options = TraceOptions {
        block_tokens: Some(16),
        coarsen: 1,
    };
    Trace::read(lines.as_bytes(), &options).unwrap()
}

fn options_of(model: Model, capacities: &[Capacity]) -> OfflineOptions {
    OfflineOptions {
        model,
        capacities: capacities.to_vec(),
        ..OfflineOptions::default()
    }
}

#[test]
fn capacities_are_blocks_or_shares() {
    let check = |text: &str, blocks: u64| {
        assert_eq!(
            text.parse::<Capacity>().unwrap().blocks(182_790),
            blocks,
            "{text}"
        );
    };
    check("5%", 9_139);
    check(" 1.5 %", 2_741);
    check("0.00001%", 1);
    check("9_139", 9_139);
    check("300%", 548_370);
    assert_eq!("29%".parse::<Capacity>().unwrap().blocks(100), 29);
    for wrong in ["", "%", "0", "0%", "-5%", "nan%", "inf%", "5GB", "5.5"] {
        let error = wrong.parse::<Capacity>().unwrap_err().to_string();
        assert!(error.contains("is not a capacity"), "{wrong}: {error}");
    }
}

#[test]
fn a_hit_counts_only_behind_hits() {
    // With room for three, the tail of the first prompt is gone when it comes again; its
    // fourth block, put again since, does not count for the third request.
    let trace = trace(&[vec![1, 2, 3, 4], vec![1, 2, 3, 4], vec![9, 4]]);
    let report =
        replay_offline(&trace, &options_of(Model::Blocks, &[Capacity::Blocks(3)])).unwrap();
    let row = &report.rows[0];
    assert_eq!((row.block_hit_rate, row.token_hit_rate), (0.3, 0.3));
    assert_eq!(row.flash_write_blocks, 4 + 1 + 2);
    assert_eq!(report.ceiling_block_hit_rate, 0.4);
    assert_eq!((report.distinct_blocks, report.requests), (5, 3));
}

#[test]
fn options_that_mean_nothing_are_refused() {
    let trace = trace(&[vec![1]]);
    let refuse = |options: &OfflineOptions| replay_offline(&trace, options).unwrap_err();
    let good = options_of(Model::Engine, &[Capacity::Blocks(1)]);
    assert!(replay_offline(&trace, &good).is_ok());
    let wrong = OfflineOptions {
        block_bytes: 0,
        ..good.clone()
    };
    assert_eq!(refuse(&wrong), OfflineError::BlockBytes(0));
    let wrong = OfflineOptions {
        dram_share: -0.1,
        ..good.clone()
    };
    assert_eq!(refuse(&wrong), OfflineError::DramShare(-0.1));
    for share in [-0.1, 1.0, f64::INFINITY] {
        let wrong = OfflineOptions {
            warmup_share: share,
            ..good.clone()
        };
        assert_eq!(refuse(&wrong), OfflineError::WarmupShare(share));
    }
    for (policy, model) in [
        (Policy::Optimum, Model::Engine),
        (Policy::Recent, Model::Blocks),
    ] {
        let wrong = OfflineOptions {
            policy,
            model,
            ..good.clone()
        };
        let error = refuse(&wrong).to_string();
        assert!(error.contains("is for --model"), "{error}");
    }
    for (model, policy) in [
        (Model::Blocks, Policy::Production),
        (Model::Engine, Policy::Recent),
    ] {
        let wrong = OfflineOptions {
            big: vec![Capacity::Blocks(100)],
            model,
            policy,
            ..good.clone()
        };
        assert_eq!(refuse(&wrong), OfflineError::BigModel);
    }
    let big = |capacity| OfflineOptions {
        big: vec![Capacity::Blocks(100), capacity],
        ..good.clone()
    };
    assert!(replay_offline(&trace, &big(Capacity::Blocks(30))).is_ok());
    let small = refuse(&big(Capacity::Blocks(29)));
    let (blocks, block_bytes, min) = (29, 64 << 10, 30);
    assert_eq!(
        small,
        OfflineError::BigTooSmall {
            blocks,
            block_bytes,
            min
        }
    );
    assert_eq!(
        refuse(&big(Capacity::Blocks(0))),
        OfflineError::Capacity(Capacity::Blocks(0))
    );
    for capacity in [Capacity::Blocks(0), Capacity::Percent(-1.0)] {
        let wrong = OfflineOptions {
            capacities: vec![capacity],
            ..good.clone()
        };
        assert_eq!(refuse(&wrong), OfflineError::Capacity(capacity));
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        cut in 0..200_usize,
        coarsen in 0..9_usize,
        block_tokens in prop::option::of(any::<u64>()),
    ) {
        let options = TraceOptions { block_tokens, coarsen };
        let _ = Trace::read(&noise[..], &options);
        // A good line with a piece of it replaced by noise comes further than noise alone.
        let good = b"{\"timestamp\":3,\"input_length\":99,\"output_length\":7,\"hash_ids\":[1,2]}";
        let mut line = good[..cut.min(good.len())].to_vec();
        line.extend(noise.iter().take(3));
        line.extend(&good[(cut + 3).min(good.len())..]);
        if let Ok(trace) = Trace::read(&line[..], &options) {
            let options = options_of(Model::Engine, &[Capacity::Blocks(3)]);
            prop_assert!(replay_offline(&trace, &options).is_ok());
        }
    }

    #[test]
    fn every_store_keeps_within_what_is_possible(
        prompts in prop::collection::vec((0..12_u64, 1..30_u64), 1..120),
        capacity in 1..400_u64,
        dram_share in 0.0..1.0_f64,
        block_kib in 16..700_u64,
    ) {
        // Prompts of a few conversations that grow and are asked again: chained ids.
        let prompts: Vec<Vec<u64>> = prompts
            .into_iter()
            .map(|(chat, length)| (0..length).map(|depth| chat * 100 + depth).collect())
            .collect();
        let trace = trace(&prompts);
        for (model, policy) in [
            (Model::Blocks, Policy::Production),
            (Model::Engine, Policy::Recent),
        ] {
            let capacities = [Capacity::Blocks(capacity), Capacity::Blocks(1 << 20)];
            let options = OfflineOptions {
                dram_share,
                block_bytes: block_kib << 10,
                policy,
                ..options_of(model, &capacities)
            };
            let report = replay_offline(&trace, &options).unwrap();
            prop_assert_eq!(&report, &replay_offline(&trace, &options).unwrap());
            let [row, roomy] = &report.rows[..] else { panic!("one row a capacity") };
            prop_assert!(row.block_hit_rate <= report.ceiling_block_hit_rate);
            prop_assert!(row.token_hit_rate <= report.ceiling_token_hit_rate);
            prop_assert!((1.0..=4.0).contains(&row.write_amplification));
            prop_assert!(row.flash_write_blocks >= report.distinct_blocks);
            prop_assert_eq!(roomy.block_hit_rate, report.ceiling_block_hit_rate);
            prop_assert_eq!(roomy.flash_write_blocks, report.distinct_blocks);
        }
    }
}

#[test]
fn warming_up_is_not_counted() {
    let trace = trace(&[vec![1, 2], vec![1, 2], vec![1, 2], vec![3, 4]]);
    let options = OfflineOptions {
        warmup_share: 0.5,
        ..options_of(Model::Blocks, &[Capacity::Blocks(4)])
    };
    let report = replay_offline(&trace, &options).unwrap();
    assert_eq!(report.rows[0].block_hit_rate, 0.5);
    assert_eq!(report.ceiling_block_hit_rate, 0.5);
    // Of the writes, too, only those of the counted part.
    assert_eq!(report.rows[0].flash_write_blocks, 2);
}

proptest! {
    // Each case is eight replays.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nobody_beats_the_optimum_and_the_learned_engine_holds_its_bounds(
        prompts in prop::collection::vec((0..12_u64, 1..30_u64), 1..120),
        capacity in 1..400_u64,
        dram_share in 0.0..1.0_f64,
        block_kib in 16..700_u64,
    ) {
        let prompts: Vec<Vec<u64>> = prompts
            .into_iter()
            .map(|(chat, length)| (0..length).map(|depth| chat * 100 + depth).collect())
            .collect();
        let trace = trace(&prompts);
        let replay = |model, policy, admit| {
            let options = OfflineOptions {
                dram_share,
                block_bytes: block_kib << 10,
                policy,
                admit,
                ..options_of(model, &[Capacity::Blocks(capacity)])
            };
            let report = replay_offline(&trace, &options).unwrap();
            assert_eq!(report, replay_offline(&trace, &options).unwrap());
            report.rows[0].clone()
        };
        let optimum = replay(Model::Blocks, Policy::Optimum, Admit::ByWorth);
        let lru = replay(Model::Blocks, Policy::Production, Admit::ByWorth);
        prop_assert!(lru.block_hit_rate <= optimum.block_hit_rate);
        for admit in [Admit::ByWorth, Admit::All] {
            let learned = replay(Model::Engine, Policy::Production, admit);
            prop_assert!(learned.block_hit_rate <= optimum.block_hit_rate);
            prop_assert!(learned.write_amplification <= 4.0 + 2.0);
            let both = OfflineOptions {
                dram_share,
                block_bytes: block_kib << 10,
                admit,
                // Two segments of the smallest blocks at least.
                big: vec![Capacity::Blocks(126 + capacity)],
                ..options_of(Model::Engine, &[Capacity::Blocks(capacity)])
            };
            let report = replay_offline(&trace, &both).unwrap();
            prop_assert_eq!(&report, &replay_offline(&trace, &both).unwrap());
            let row = &report.rows[0];
            prop_assert!(row.block_hit_rate <= report.ceiling_block_hit_rate);
            let big = row.big.as_ref().unwrap();
            prop_assert!(big.taken_blocks <= big.offered_blocks);
        }
    }
}
