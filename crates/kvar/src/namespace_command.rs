//! `kvar namespace list`: who shares a running node, and how much each has of it.

use crate::arguments::{NamespaceCommand, NodeArguments};
use crate::connect::{connect, failure};
use crate::failure::{Failure, Outcome};
use crate::print;
use kvar_base::ByteSize;
use serde_json::{Value, json};

/// Runs one of the commands.
pub(crate) fn run(command: &NamespaceCommand) -> Outcome {
    match command {
        NamespaceCommand::List { node, json } => list(node, *json),
    }
}

fn list(node: &NodeArguments, as_json: bool) -> Outcome {
    let connected = connect(node)?;
    let status = connected.client.status(connected.options);
    let status: Value = serde_json::from_str(&status.map_err(failure)?)
        .map_err(|error| Failure::failed(format!("the node's status is no JSON: {error}")))?;
    let Some(namespaces) = status["namespaces"].as_array() else {
        return Err(Failure::failed(
            "the node says nothing of namespaces: it is older than this command; update it",
        ));
    };
    if as_json {
        return print::json(&json!(namespaces));
    }
    let room = |key: &str| status[key].as_u64().unwrap_or(0);
    let (dram, flash) = (room("dram_bytes"), room("flash_bytes_max"));
    let head = [
        "name",
        "share",
        "mode",
        "part",
        "in memory",
        "of it",
        "on flash",
        "of it",
        "hits",
        "misses",
        "evicted",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(namespaces.iter().map(|it| row(it, dram, flash)));
    print::table(&rows)
}

fn row(namespace: &Value, dram: u64, flash: u64) -> Vec<String> {
    let number = |key: &str| namespace[key].as_u64().unwrap_or(0);
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let of = |bytes: u64, room: u64| percent(bytes as f64 / room.max(1) as f64);
    let (in_memory, on_flash) = (number("dram_bytes"), number("flash_bytes"));
    let share = namespace["share"].as_u64();
    vec![
        namespace["name"].as_str().unwrap_or("-").to_owned(),
        // Not in the settings any more: what is left of it leaves first.
        share.map_or_else(|| "gone".to_owned(), |share| share.to_string()),
        namespace["mode"].as_str().unwrap_or("-").to_owned(),
        percent(namespace["part"].as_f64().unwrap_or(0.0)),
        ByteSize(in_memory).to_string(),
        of(in_memory, dram),
        ByteSize(on_flash).to_string(),
        of(on_flash, flash),
        number("hits").to_string(),
        number("misses").to_string(),
        number("evicted").to_string(),
    ]
}
