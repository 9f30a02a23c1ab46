//! Prints the tables of `docs/decisions/0012-admission-asks-less.md`: hit rate (% of blocks), write
//! amplification and flash writes (% of the distinct blocks) at every capacity, DRAM being 2 % of
//! the distinct blocks and inside the capacity.
//!
//! ```text
//! cargo run --release -p kvar-plan --example keep_table -- TRACE.jsonl.zst [COARSEN] [first|second]
//! ```
//!
//! `first` and `second` replay that half of the requests alone.

use kvar_plan::{
    Admit, Capacity, Model, OfflineOptions, OfflineReport, Policy, Trace, TraceOptions,
    replay_offline,
};
use std::error::Error;
use std::fs::File;
use std::io::BufReader;

fn print_row(name: &str, report: &OfflineReport) {
    let distinct = report.distinct_blocks.max(1) as f64;
    print!("| {name} |");
    for row in &report.rows {
        print!(
            " {:.1} / {:.2} / {:.0} |",
            row.block_hit_rate * 100.0,
            row.write_amplification,
            row.flash_write_blocks as f64 / distinct * 100.0
        );
    }
    println!();
}

fn print_rates(name: &str, report: &OfflineReport) {
    print!("| {name} |");
    for row in &report.rows {
        print!(" {:.1} |", row.block_hit_rate * 100.0);
    }
    println!();
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments
        .next()
        .ok_or("say which trace: a .jsonl.zst file")?;
    let coarsen = arguments.next().map_or(Ok(1), |text| text.parse())?;
    let half = arguments.next();
    let reader = BufReader::new(zstd::Decoder::new(File::open(&path)?)?);
    let options = TraceOptions {
        block_tokens: None,
        coarsen,
    };
    let mut trace = Trace::read(reader, &options)?;
    let middle = trace.requests.len() / 2;
    match half.as_deref() {
        None => {}
        Some("first") => trace.requests.truncate(middle),
        Some("second") => _ = trace.requests.drain(..middle),
        Some(other) => return Err(format!("{other:?} is no half: first or second").into()),
    }

    let blocks = OfflineOptions {
        model: Model::Blocks,
        capacities: [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
            .map(Capacity::Percent)
            .to_vec(),
        ..OfflineOptions::default()
    };
    let lru = replay_offline(&trace, &blocks)?;
    println!(
        "{path}: {} blocks of {} tokens, ceiling {:.1} %\n",
        lru.distinct_blocks,
        lru.block_tokens,
        lru.ceiling_block_hit_rate * 100.0,
    );
    println!("| policy | 1 % | 2 % | 5 % | 10 % | 20 % | 50 % |\n|---|---|---|---|---|---|---|");
    print_rates("unit blocks, LRU with tails first", &lru);
    let optimum = OfflineOptions {
        policy: Policy::Optimum,
        ..blocks.clone()
    };
    let engine = OfflineOptions {
        model: Model::Engine,
        ..blocks
    };
    let recent = OfflineOptions {
        policy: Policy::Recent,
        ..engine.clone()
    };
    print_row("recently used (0002)", &replay_offline(&trace, &recent)?);
    let learned = engine;
    let all = OfflineOptions {
        admit: Admit::All,
        ..learned.clone()
    };
    print_row("learned, all admitted", &replay_offline(&trace, &all)?);
    let report = replay_offline(&trace, &learned)?;
    print_row("**learned, admitted by worth**", &report);
    print_rates("unit blocks, optimum", &replay_offline(&trace, &optimum)?);

    let differences: Vec<f64> = report
        .rows
        .iter()
        .zip(&lru.rows)
        .map(|(row, lru)| (row.block_hit_rate - lru.block_hit_rate) * 100.0)
        .collect();
    let small = &differences[..4];
    println!(
        "\nlearned - LRU: {:+.2} points in the mean of 1 to 10 %, {:+.2} at the worst capacity",
        small.iter().sum::<f64>() / small.len() as f64,
        differences.iter().copied().fold(f64::INFINITY, f64::min)
    );
    Ok(())
}
