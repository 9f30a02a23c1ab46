//! `kvar serve`: settings, log, a node, and the signals that end it.
//!
//! ```text
//!   SIGTERM or Ctrl-C   first: stop accepting, write what is in memory only, exit 0
//!                       (while it still loads: end at once, exit 0)
//!                       second: exit 1 at once; what was not written is lost, as after a kill
//! ```

use crate::failure::{Failure, Outcome};
use crate::settings_arguments::SettingsArguments;
use kvar_node::config::{Config, LogFormat};
use kvar_node::{Hooks, Node, Readiness, StartError, StopReport, Stopper};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::IsTerminal as _;
use tracing_subscriber::EnvFilter;

/// Runs a node until it is told to stop.
pub(crate) fn run(arguments: &SettingsArguments) -> Outcome {
    let config = arguments.config().map_err(Failure::usage)?;
    start_log(&config)?;
    raise_descriptor_limit();
    let signals = Signals::new([SIGTERM, SIGINT])
        .map_err(|error| Failure::failed(format!("cannot watch for signals: {error}")))?;
    let refused = |error: StartError| match &error {
        StartError::Config(_) => Failure::usage(error),
        _ => Failure::failed(error),
    };
    let node = Node::listen(&config, Hooks::default()).map_err(refused)?;
    watch(signals, node.stopper())?;
    if node.loaded().map_err(refused)? == Readiness::Stopped {
        tracing::info!("told to stop while it was loading: nothing was changed");
    }
    let StopReport {
        kept_blocks,
        dropped_blocks,
        checkpointed,
        defects,
    } = node.wait();
    if !defects.is_empty() {
        return Err(Failure::failed(format!(
            "the node ended by a defect ({}); its data is as after a kill: start it again",
            defects.join("; ")
        )));
    }
    if dropped_blocks > 0 {
        tracing::warn!(
            dropped_blocks,
            "blocks were in memory only and not written within shutdown_flush: raise it to keep \
             them next time"
        );
    }
    tracing::info!(kept_blocks, dropped_blocks, checkpointed, "stopped");
    Ok(())
}

fn start_log(config: &Config) -> Outcome {
    let filter = EnvFilter::try_new(&config.log).map_err(|error| {
        Failure::usage(format!(
            "log: {:?} is no level or filter ({error}): write info",
            config.log
        ))
    })?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    Ok(())
}

fn watch(mut signals: Signals, stopper: Stopper) -> Outcome {
    let body = move || {
        for (number, _) in signals.forever().enumerate() {
            if number > 0 {
                tracing::warn!(
                    "told to stop again: ending at once; what was in memory only is lost, as after a \
                     kill"
                );
                std::process::exit(1);
            }
            tracing::info!("told to stop: writing what is in memory only (once more ends at once)");
            stopper.stop();
        }
    };
    std::thread::Builder::new()
        .name("kvar-signals".to_owned())
        .spawn(body)
        .map(drop)
        .map_err(|error| Failure::failed(format!("cannot watch for signals: {error}")))
}

/// As many descriptors as the system lets this process have: every link needs one, and the usual
/// soft limit is as low as the default of connections_max.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    );
}
