//! `kvar lookup` and `kvar lease`: what is there, and that it stays.

use crate::arguments::NodeArguments;
use crate::block_arguments::{LeaseCommand, LookupArguments};
use crate::connect::{Connected, connect, failure};
use crate::failure::{Failure, Outcome};
use crate::print;
use kvar_base::{BlockId, LeaseToken, MissReason};
use kvar_client::Leased;
use serde_json::json;
use std::time::{Duration, Instant};

/// How many leading blocks of a chain are there.
pub(crate) fn lookup(node: &NodeArguments, lookup: &LookupArguments, as_json: bool) -> Outcome {
    let connected = connect(node)?;
    let names = lookup.names.iter();
    let mut ids: Vec<BlockId> = names
        .map(|name| BlockId::from_name(&connected.key, name))
        .collect();
    ids.extend_from_slice(&lookup.id);
    let asked = ids.len();
    let found = ask(&connected, ids, lookup.lease);
    match (found.leading, found.reason) {
        (0, Some(MissReason::Deadline)) => {
            return Err(Failure::failed(
                "the deadline passed first; give more with --deadline",
            ));
        }
        (0, Some(MissReason::Unreachable)) => {
            return Err(match connected.client.last_error() {
                Some(error) => failure(error),
                None => Failure::failed("the node could not be reached"),
            });
        }
        _ => {}
    }
    if as_json {
        print::json(&json!({
            "asked": asked,
            "leading": found.leading,
            "reason": found.reason.map(MissReason::word),
            "lease": found.lease.map(|lease| lease.token.to_hex()),
            "lasts_ms": found.lease.map(|lease| milliseconds(lease.left())),
        }))?;
    } else {
        let next = match found.reason {
            Some(reason) => format!("; the next is not ({reason})"),
            None => String::new(),
        };
        print::line(&format!(
            "{} of {asked} leading blocks are there{next}",
            found.leading
        ))?;
        if let Some(lease) = found.lease {
            print::line(&format!(
                "lease {} lasts {}",
                lease.token.to_hex(),
                in_words(lease.left())
            ))?;
        }
    }
    if found.leading == 0 {
        return Err(Failure::not_found("the first block is not there"));
    }
    Ok(())
}

fn ask(connected: &Connected, ids: Vec<BlockId>, lease: Option<Duration>) -> Leased {
    let (client, options) = (&connected.client, connected.options);
    if let Some(ttl) = lease {
        return client.submit_lookup_leased(ids, ttl, options).wait();
    }
    let found = client.submit_lookup(ids, options).wait();
    Leased {
        leading: found.leading,
        reason: found.reason,
        lease: None,
    }
}

/// Renews or releases a lease.
pub(crate) fn run(command: &LeaseCommand) -> Outcome {
    match command {
        LeaseCommand::Renew {
            node,
            token,
            ttl,
            json,
        } => renew(node, *token, *ttl, *json),
        LeaseCommand::Release { node, token, json } => release(node, *token, *json),
    }
}

fn renew(node: &NodeArguments, token: LeaseToken, ttl: Duration, as_json: bool) -> Outcome {
    let connected = connect(node)?;
    let until = connected
        .client
        .renew(token, ttl, connected.options)
        .map_err(failure)?;
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    if as_json {
        print::json(&json!({ "lasts_ms": left.map(milliseconds) }))?;
    } else if let Some(left) = left {
        print::line(&format!("lasts {}", in_words(left)))?;
    }
    left.map(drop).ok_or_else(ended)
}

fn release(node: &NodeArguments, token: LeaseToken, as_json: bool) -> Outcome {
    let connected = connect(node)?;
    let released = connected
        .client
        .release(token, connected.options)
        .map_err(failure)?;
    if as_json {
        print::json(&json!({ "released": released }))?;
    } else if released {
        print::line("released")?;
    }
    released.then_some(()).ok_or_else(ended)
}

fn ended() -> Failure {
    Failure::not_found("there is no such lease: it has ended, or was released")
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn in_words(time: Duration) -> String {
    humantime::format_duration(Duration::from_millis(milliseconds(time))).to_string()
}
