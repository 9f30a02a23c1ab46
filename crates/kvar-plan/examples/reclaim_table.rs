//! Prints the tables of `docs/decisions/0002-reclaim-policy.md`: hit rate (% of blocks) and write
//! amplification of every reclaim policy that was weighed, at every capacity.
//!
//! ```text
//! cargo run --release -p kvar-plan --example reclaim_table -- TRACE.jsonl.zst [COARSEN [DRAM_SHARE]]
//! ```

use kvar_plan::{
    Capacity, Model, OfflineOptions, OfflineReport, Policy, Trace, TraceOptions, replay_offline,
    replay_offline_with,
};
use kvar_policy::{
    BlockFacts, DropAll, KEPT_SHARE_MAX, RecentlyUsed, ReclaimPolicy, SegmentFacts, Verdict,
};
use std::error::Error;
use std::fs::File;
use std::io::BufReader;

/// An alternative that was turned away: keep by age alone, beyond what the house allows.
struct ByAge {
    keep_age: u8,
    budget_bytes: u64,
}

impl ReclaimPolicy for ByAge {
    fn begin(&mut self, segment: SegmentFacts) {
        self.budget_bytes = (segment.payload_bytes as f64 * KEPT_SHARE_MAX) as u64;
    }

    fn verdict(&mut self, block: &BlockFacts) -> Verdict {
        if block.age >= self.keep_age || block.bytes > self.budget_bytes {
            return Verdict::Drop;
        }
        self.budget_bytes -= block.bytes;
        Verdict::Keep
    }
}

fn print_row(name: &str, report: &OfflineReport) {
    print!("| {name} |");
    for row in &report.rows {
        print!(
            " {:.1} / {:.2} |",
            row.block_hit_rate * 100.0,
            row.write_amplification
        );
    }
    println!();
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments
        .next()
        .ok_or("say which trace: a .jsonl.zst file")?;
    let coarsen = arguments.next().map_or(Ok(1), |text| text.parse())?;
    let dram_share = arguments.next().map_or(Ok(0.02), |text| text.parse())?;
    let reader = BufReader::new(zstd::Decoder::new(File::open(&path)?)?);
    let trace = Trace::read(
        reader,
        &TraceOptions {
            block_tokens: None,
            coarsen,
        },
    )?;

    let options = OfflineOptions {
        model: Model::Blocks,
        capacities: [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
            .map(Capacity::Percent)
            .to_vec(),
        dram_share,
        ..OfflineOptions::default()
    };
    let blocks = replay_offline(&trace, &options)?;
    println!(
        "{path}: {} blocks of {} tokens, ceiling {:.1} %, DRAM {} % of the blocks\n",
        blocks.distinct_blocks,
        blocks.block_tokens,
        blocks.ceiling_block_hit_rate * 100.0,
        dram_share * 100.0
    );
    println!("| policy | 1 % | 2 % | 5 % | 10 % | 20 % | 50 % |\n|---|---|---|---|---|---|---|");
    print_row("unit blocks, exact LRU", &blocks);
    let options = OfflineOptions {
        model: Model::Engine,
        policy: Policy::Recent,
        ..options
    };
    print_row(
        "drop all (plain ring)",
        &replay_offline_with(&trace, &options, || DropAll)?,
    );
    let limits = [
        ("flat 32", [32; 3], KEPT_SHARE_MAX),
        ("flat 48", [48; 3], KEPT_SHARE_MAX),
        ("flat 64: any touch", [64; 3], KEPT_SHARE_MAX),
        ("16 / 32 / 56", [16, 32, 56], KEPT_SHARE_MAX),
        ("**32 / 40 / 48**", [32, 40, 48], KEPT_SHARE_MAX),
        ("the same, at most 1/2 kept", [32, 40, 48], 0.5),
        ("the same, at most 1/4 kept", [32, 40, 48], 0.25),
    ];
    for (name, keep_age, share) in limits {
        let policy = || RecentlyUsed::with_limits(keep_age, share);
        print_row(name, &replay_offline_with(&trace, &options, policy)?);
    }
    let policy = || ByAge {
        keep_age: 96,
        budget_bytes: 0,
    };
    print_row(
        "age < 96, touched or not",
        &replay_offline_with(&trace, &options, policy)?,
    );
    Ok(())
}
