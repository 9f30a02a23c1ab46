//! `kvar bench`: from arguments to a benchmark's settings, and its figures to standard output.

use crate::arguments::{BenchCommand, RoundsArguments};
use crate::bench::{self, engine, index, layers, net, node};
use crate::failure::{Failure, Outcome};
use crate::print;

/// Runs one benchmark and prints what it found.
pub(crate) fn run(command: &BenchCommand) -> Outcome {
    let (found, json, plot) = match command {
        BenchCommand::Engine {
            path,
            size,
            io_engine,
            keep,
            rounds,
        } => {
            let &RoundsArguments { pairs, seconds, .. } = rounds;
            let settings = engine::Settings {
                path: path.clone(),
                size: *size,
                pairs: pairs as usize,
                seconds,
                io_engine: *io_engine,
                keep: *keep,
            };
            (engine::run(&settings)?, rounds.json, rounds.plot.as_ref())
        }
        BenchCommand::Index {
            entries,
            folder,
            no_recovery,
            json,
        } => {
            let settings = index::Settings {
                entries: *entries,
                folder: folder.clone(),
                no_recovery: *no_recovery,
            };
            (index::run(&settings)?, *json, None)
        }
        BenchCommand::IndexFill { path, entries } => return index::fill(path, *entries),
        BenchCommand::IndexOpen { path } => return print::json(&index::open(path)?),
        BenchCommand::Node(arguments) => {
            let found = node::run(&arguments.settings())?;
            if arguments.json {
                return print::json(&found);
            }
            found.print();
            return Ok(());
        }
        BenchCommand::Layers {
            node,
            blocks,
            layers,
            section,
            compute,
            rounds,
            json,
        } => {
            let found = layers::run(&layers::Settings {
                node: node.clone(),
                blocks: *blocks,
                layers: usize::from(*layers),
                section_bytes: usize::try_from(section.0).unwrap_or(usize::MAX),
                compute: *compute,
                rounds: *rounds,
            })?;
            if *json {
                return print::json(&found);
            }
            found.print();
            return Ok(());
        }
        BenchCommand::Net {
            folder,
            flash_size,
            spin,
            rounds,
        } => {
            let &RoundsArguments { pairs, seconds, .. } = rounds;
            let settings = net::Settings {
                folder: folder.clone(),
                flash_size: *flash_size,
                pairs: pairs as usize,
                seconds,
                spin: *spin,
            };
            (net::run(&settings)?, rounds.json, rounds.plot.as_ref())
        }
    };
    // The figures first: they took minutes, and a picture may fail to be written.
    if json {
        print::json(&found.json())?;
    } else {
        bench::print_table(&found);
    }
    match plot {
        Some(path) => bench::plot::draw(&found, path).map_err(Failure::failed),
        None => Ok(()),
    }
}
