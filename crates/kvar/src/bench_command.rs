//! `kvar bench`: from arguments to a benchmark's settings, and its figures to standard output.

use crate::arguments::{BenchCommand, RoundsArguments};
use crate::bench::{self, engine, net};
use crate::failure::Outcome;
use crate::print;

/// Runs one benchmark and prints what it found.
pub(crate) fn run(command: &BenchCommand) -> Outcome {
    let (found, rounds) = match command {
        BenchCommand::Engine {
            path,
            size,
            io_engine,
            keep,
            rounds,
        } => {
            let RoundsArguments { pairs, seconds, .. } = *rounds;
            let settings = engine::Settings {
                path: path.clone(),
                size: *size,
                pairs: pairs as usize,
                seconds,
                io_engine: *io_engine,
                keep: *keep,
            };
            (engine::run(&settings)?, rounds)
        }
        BenchCommand::Net {
            folder,
            flash_size,
            spin,
            rounds,
        } => {
            let RoundsArguments { pairs, seconds, .. } = *rounds;
            let settings = net::Settings {
                folder: folder.clone(),
                flash_size: *flash_size,
                pairs: pairs as usize,
                seconds,
                spin: *spin,
            };
            (net::run(&settings)?, rounds)
        }
    };
    if rounds.json {
        return print::json(&found.report);
    }
    bench::print_table(&found.rows, found.report.idle_cpu.unwrap_or(0.0));
    Ok(())
}
