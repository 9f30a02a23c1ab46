//! `kvar-sim`: the proof in its long form.
//!
//! ```text
//!   kvar-sim engine --seeds 50000          many seeds
//!   kvar-sim engine --seed 4711            one seed, with its last steps
//!   kvar-sim crash --points 20000          every moment a power cut can come
//!   kvar-sim churn --turnovers 20          one store, written over and over
//!   kvar-sim churn --file PATH             the same on a real file
//! ```
//!
//! What must always be true: it ends with 0 only if nothing was found and nothing was overlooked;
//! whatever it finds, it says which command shows it again.

use clap::{Args, Parser, Subcommand};
use kvar_sim::churn::churn;
use kvar_sim::crash;
use kvar_sim::file_churn::churn_file;
use kvar_sim::many::run_many;
use kvar_sim::scenario::{Ran, Wanted, run};
use kvar_sim::tally::Tally;
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Failures after which no more seeds are begun: one shows the way, more are noise.
const FAILURES_MAX: usize = 5;

#[derive(Parser)]
#[command(
    name = "kvar-sim",
    version,
    about = "The engine over a disk that misbehaves, against an oracle, by seed"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Random stores, disks, calls and crashes.
    Engine(EngineArguments),
    /// Recorded runs, cut at every event.
    Crash(CrashArguments),
    /// One store, written over many times.
    Churn(ChurnArguments),
}

#[derive(Args)]
struct EngineArguments {
    /// How many seeds.
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Only this one, and its last steps.
    #[arg(long, conflicts_with_all = ["seeds", "first"])]
    seed: Option<u64>,
    /// Steps that a failure shows.
    #[arg(long)]
    trace: Option<usize>,
    /// Steps a run; else the seed decides.
    #[arg(long)]
    steps: Option<u64>,
    /// Threads; else one a core.
    #[arg(long)]
    threads: Option<usize>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct CrashArguments {
    /// Crash images to open.
    #[arg(long, default_value_t = 2000)]
    points: u64,
    /// The seed of the first recorded run.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Threads; else one a core.
    #[arg(long)]
    threads: Option<usize>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ChurnArguments {
    /// How often the device is written over.
    #[arg(long, default_value_t = 20)]
    turnovers: u64,
    /// What decides everything else.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A real file instead of a simulated disk. It is created, or overwritten whatever it holds.
    #[arg(long)]
    file: Option<PathBuf>,
    /// Size of that file in MiB.
    #[arg(long, default_value_t = 256, requires = "file", value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    size_mib: u64,
}

#[derive(Serialize)]
struct Report {
    runs: u64,
    seconds: f64,
    failures: Vec<Found>,
    unseen: Vec<&'static str>,
    tally: Tally,
}

#[derive(Serialize)]
struct Found {
    seed: u64,
    what: String,
    replay: String,
}

fn main() -> ExitCode {
    // A panic in a run is a finding with a seed; its own words would only tear the progress line.
    std::panic::set_hook(Box::new(|_| {}));
    match Arguments::parse().command {
        Command::Engine(arguments) => engine(&arguments),
        Command::Crash(arguments) => crash_points(&arguments),
        Command::Churn(arguments) => churned(&arguments),
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn replay(ran: &Ran, steps: Option<u64>) -> String {
    let steps = steps.map_or_else(String::new, |steps| format!(" --steps {steps}"));
    format!(
        "cargo run --release -p kvar-sim -- engine --seed {}{steps}",
        ran.seed
    )
}

fn show(ran: &Ran, steps: Option<u64>) {
    let Some(failure) = &ran.failure else { return };
    eprintln!("\nseed {} ({:?}): {}", ran.seed, ran.temper, failure.what);
    for line in &failure.trace {
        eprintln!("  {line}");
    }
    eprintln!("again: {}", replay(ran, steps));
}

fn engine(arguments: &EngineArguments) -> ExitCode {
    let wanted = Wanted {
        steps: arguments.steps,
        trace_steps: arguments.trace,
        ..Wanted::default()
    };
    if let Some(seed) = arguments.seed {
        let ran = run(seed, wanted);
        show(&ran, arguments.steps);
        if ran.failure.is_none() {
            println!("seed {seed} ({:?}): nothing found", ran.temper);
        }
        print_tally(&ran.tally);
        return ExitCode::from(u8::from(ran.failure.is_some()));
    }
    let seeds = arguments.first..arguments.first.saturating_add(arguments.seeds);
    let began = Instant::now();
    let line = std::io::stderr().is_terminal();
    let many = run_many(
        seeds,
        arguments.threads.unwrap_or_else(cores),
        wanted,
        FAILURES_MAX,
        |ended, ran| {
            show(ran, arguments.steps);
            let every = if line {
                20
            } else {
                (arguments.seeds / 20).max(1)
            };
            if ended.is_multiple_of(every) {
                let seconds = began.elapsed().as_secs_f64();
                let start = if line { "\r" } else { "" };
                let end = if line { "" } else { "\n" };
                let rate = ended as f64 / seconds;
                eprint!(
                    "{start}{ended} of {} seeds, {rate:.0} a second{end}",
                    arguments.seeds
                );
                let _ = std::io::stderr().flush();
            }
        },
    );
    if line {
        eprintln!();
    }

    // Short runs see less; what they are for is a look at one place.
    let unseen = if arguments.steps.is_some() {
        Vec::new()
    } else {
        many.blind_to()
    };
    let report = Report {
        runs: many.runs,
        seconds: began.elapsed().as_secs_f64(),
        failures: many
            .failures
            .iter()
            .map(|ran| Found {
                seed: ran.seed,
                what: ran
                    .failure
                    .as_ref()
                    .map_or_else(String::new, |failure| failure.what.clone()),
                replay: replay(ran, arguments.steps),
            })
            .collect(),
        unseen,
        tally: many.tally,
    };
    end(&report, arguments.json)
}

fn crash_points(arguments: &CrashArguments) -> ExitCode {
    let began = Instant::now();
    let threads = arguments.threads.unwrap_or_else(cores);
    let crashed = crash::enumerate(arguments.first, arguments.points, threads, |images| {
        if images.is_multiple_of(1000) {
            eprintln!("{images} of {} crash images", arguments.points);
        }
    });
    let failures = crashed
        .failure
        .iter()
        .map(|failure| Found {
            seed: failure.seed,
            what: failure.what.clone(),
            replay: format!(
                "cargo run --release -p kvar-sim -- crash --first {} --points 1 --threads 1",
                failure.seed
            ),
        })
        .collect();
    let report = Report {
        runs: crashed.images,
        seconds: began.elapsed().as_secs_f64(),
        failures,
        unseen: Vec::new(),
        tally: crashed.tally,
    };
    for found in &report.failures {
        eprintln!("{}\nagain: {}", found.what, found.replay);
    }
    end(&report, arguments.json)
}

fn churned(arguments: &ChurnArguments) -> ExitCode {
    let Some(path) = &arguments.file else {
        let ran = churn(arguments.seed, arguments.turnovers);
        print_tally(&ran.tally);
        if let Some(failure) = &ran.failure {
            eprintln!("{}", failure.what);
            for line in &failure.trace {
                eprintln!("  {line}");
            }
        }
        return ExitCode::from(u8::from(ran.failure.is_some()));
    };
    let told = |turnover, mb_per_s: f64| eprintln!("turnover {turnover}: {mb_per_s:.1} MB/s");
    let (bytes, seed) = (arguments.size_mib << 20, arguments.seed);
    match churn_file(path, bytes, arguments.turnovers, seed, told) {
        Ok(found) => {
            match serde_json::to_string_pretty(&found) {
                Ok(text) => println!("{text}"),
                Err(error) => eprintln!("the report cannot be printed: {error}"),
            }
            for failure in &found.failures {
                eprintln!("{failure}");
            }
            ExitCode::from(u8::from(!found.failures.is_empty()))
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn print_tally(tally: &Tally) {
    for (what, times) in tally.iter() {
        println!("{times:>12}  {what}");
    }
}

fn end(report: &Report, json: bool) -> ExitCode {
    if json {
        match serde_json::to_string_pretty(report) {
            Ok(text) => println!("{text}"),
            Err(error) => eprintln!("the report cannot be printed: {error}"),
        }
    } else {
        print_tally(&report.tally);
        println!(
            "{} runs in {:.1} s: {} found something",
            report.runs,
            report.seconds,
            report.failures.len()
        );
    }
    if !report.unseen.is_empty() {
        eprintln!(
            "blind: in all these runs this never happened, so that nothing is known of it: {}",
            report.unseen.join(", ")
        );
    }
    ExitCode::from(u8::from(
        !report.failures.is_empty() || !report.unseen.is_empty(),
    ))
}
