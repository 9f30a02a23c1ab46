//! The one binary: server, command line, replay, checks.
//!
//! Thin on purpose: each command reads its arguments, calls a library, and prints.

mod admin;
mod arguments;
mod bench;
mod bench_command;
mod block_arguments;
mod blocks;
mod config_command;
mod connect;
mod device_arguments;
mod device_command;
mod devices;
mod doctor;
mod failure;
mod lease_command;
mod mode_command;
mod namespace_command;
mod node_bench_arguments;
mod print;
mod replay;
mod replay_arguments;
mod serve;
mod settings_arguments;

use arguments::{Arguments, Command, ConfigCommand};
use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match &arguments.command {
        Command::Serve(settings) => serve::run(settings),
        Command::Doctor { node, json } => doctor::run(node, *json),
        Command::Status { node, json } => blocks::status(node, *json),
        Command::Put { node, put, json } => blocks::put(node, put, *json),
        Command::Lookup { node, lookup, json } => lease_command::lookup(node, lookup, *json),
        Command::Lease { command } => lease_command::run(command),
        Command::Get { node, block } => blocks::get(node, block),
        Command::Remove {
            node,
            names,
            id,
            json,
        } => blocks::remove(node, names, id, *json),
        Command::Purge { node, yes, json } => blocks::purge(node, *yes, *json),
        Command::Flush { node, json } => blocks::flush(node, *json),
        Command::Stat { node, block, json } => blocks::stat(node, block, *json),
        Command::Bench { command } => bench_command::run(command),
        Command::Device { command } => devices::run(command),
        Command::Mode(arguments) => mode_command::run(arguments),
        Command::Namespace { command } => namespace_command::run(command),
        Command::Check { path, json } => device_command::check(path, *json),
        Command::Inspect { path, json } => device_command::inspect(path, *json),
        Command::Replay(arguments) => replay::run(arguments),
        Command::Config {
            command: ConfigCommand::Sample,
        } => config_command::print_sample(),
        Command::Config {
            command: ConfigCommand::Check { file },
        } => config_command::check(file),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
