//! `kvar put | get | remove | purge | flush | stat | status`: one call each.

use crate::arguments::{BlockArguments, NodeArguments};
use crate::block_arguments::PutArguments;
use crate::connect::{Connected, connect, failure};
use crate::failure::{Failure, Outcome};
use crate::print;
use kvar_base::{BLOCK_BYTES_MAX, BlockId, ByteSize, MissReason, PutOutcome, Refusal};
use kvar_client::{GetItem, GetOutcome, PutItem};
use serde_json::json;
use std::io::Read;
use std::path::Path;

fn id_of(connected: &Connected, block: &BlockArguments) -> Result<BlockId, Failure> {
    match (&block.id, &block.name) {
        (Some(id), _) => Ok(*id),
        (None, Some(name)) => Ok(BlockId::from_name(&connected.key, name)),
        (None, None) => Err(Failure::usage("name a block, or give --id")),
    }
}

/// Stores a file as one block. Its words are NAME FILE, or FILE alone with an id.
pub(crate) fn put(node: &NodeArguments, put: &PutArguments, as_json: bool) -> Outcome {
    let (block, file) = match (put.words.as_slice(), put.id) {
        ([name, file], None) => (
            BlockArguments {
                name: Some(name.clone()),
                id: None,
            },
            file,
        ),
        ([file], id @ Some(_)) => (BlockArguments { name: None, id }, file),
        _ => {
            let text = "give NAME FILE, or --id HEX FILE (FILE may be - for standard input)";
            return Err(Failure::usage(text));
        }
    };
    let connected = connect(node)?;
    let id = id_of(&connected, &block)?;
    let limits = connected.client.limits();
    let bytes_max = limits.map_or(BLOCK_BYTES_MAX, |limits| u64::from(limits.block_bytes_max));
    let bytes = read_at_most(Path::new(file), bytes_max)?;
    if bytes.is_empty() {
        return Err(Failure::usage(format!(
            "{file} is empty; a block has at least one byte"
        )));
    }
    let len = bytes.len();
    let item = PutItem {
        durable: put.durable,
        hints: put.hints.hints(),
        ..PutItem::of_bytes(id, bytes)
    };
    let outcomes = connected
        .client
        .submit_put(vec![item], connected.options)
        .wait();
    let outcome = outcomes
        .first()
        .copied()
        .unwrap_or(PutOutcome::Refused(Refusal::Unreachable));
    if as_json {
        print::json(&json!({ "id": id.to_string(), "bytes": len, "outcome": outcome.word() }))?;
    }
    match outcome {
        PutOutcome::Stored if as_json => Ok(()),
        PutOutcome::Exists if as_json => Ok(()),
        PutOutcome::Stored => print::line(&format!("stored {} as {id}", ByteSize(len as u64))),
        PutOutcome::Exists => print::line(&format!(
            "exists: {id} keeps the bytes it has (kvar remove it first)"
        )),
        PutOutcome::InProgress => Err(Failure::failed(
            "another writer is storing this block; try again",
        )),
        PutOutcome::Refused(refusal) => Err(Failure::failed(refused(&connected, refusal))),
    }
}

fn refused(connected: &Connected, refusal: Refusal) -> String {
    let why = match refusal {
        Refusal::Busy => "the node has no memory free at the moment; try again, or raise --dram",
        Refusal::TooBig => "the block is larger than the node's largest",
        Refusal::Deadline => "the deadline passed first; give more with --deadline",
        Refusal::Unreachable => match connected.client.last_error() {
            Some(error) => return format!("not stored: {error}"),
            None => "the node could not be reached",
        },
        Refusal::WrongFormat => "the bytes did not arrive as they were sent; try again",
        Refusal::Stale => "the cluster has changed; try again",
        Refusal::Quota => "the namespace's share is used up; remove blocks or raise the quota",
    };
    format!("not stored ({refusal}): {why}")
}

/// Reads a file of at most so many bytes; more is an error that names both sizes.
fn read_at_most(path: &Path, bytes_max: u64) -> Result<Vec<u8>, Failure> {
    let wrong = |error: std::io::Error| Failure::failed(format!("{}: {error}", path.display()));
    let mut bytes = Vec::new();
    let mut reader: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(path).map_err(wrong)?)
    };
    (&mut reader)
        .take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(wrong)?;
    if bytes.len() as u64 > bytes_max {
        return Err(Failure::usage(format!(
            "{} has more than {}, the largest block of this node; store it in parts under names of \
             their own, or use a larger device (the largest block is a quarter of a segment, at \
             most {})",
            path.display(),
            ByteSize(bytes_max),
            ByteSize(BLOCK_BYTES_MAX),
        )));
    }
    Ok(bytes)
}

fn missed(block: &str, reason: MissReason, connected: &Connected) -> Failure {
    match reason {
        MissReason::Absent | MissReason::Evicted | MissReason::Expired | MissReason::Removed => {
            Failure::not_found(format!("{block} is not there ({reason})"))
        }
        MissReason::Corrupt => Failure::failed(format!(
            "{block} did not pass its check and was dropped; put it again"
        )),
        MissReason::Deadline => {
            Failure::failed("the deadline passed first; give more with --deadline")
        }
        MissReason::Unreachable => match connected.client.last_error() {
            Some(error) => failure(error),
            None => Failure::failed("the node could not be reached"),
        },
        reason => Failure::failed(format!("{block} could not be read ({reason}); try again")),
    }
}

fn shown(block: &BlockArguments) -> String {
    match (&block.name, &block.id) {
        (Some(name), _) => format!("{name:?}"),
        (None, Some(id)) => id.to_string(),
        (None, None) => "the block".to_owned(),
    }
}

/// Writes a block to standard output.
pub(crate) fn get(node: &NodeArguments, block: &BlockArguments) -> Outcome {
    let connected = connect(node)?;
    let id = id_of(&connected, block)?;
    let results = connected
        .client
        .submit_get(vec![GetItem::to_vec(id)], connected.options)
        .wait();
    let Some(result) = results.first() else {
        return Err(missed(&shown(block), MissReason::Unreachable, &connected));
    };
    match (&result.outcome, result.bytes()) {
        (_, Some(bytes)) => print::bytes(bytes),
        (GetOutcome::Miss(reason), _) => Err(missed(&shown(block), *reason, &connected)),
        (GetOutcome::Hit { .. }, None) => Err(Failure::failed("a hit without bytes")),
    }
}

/// Removes blocks.
pub(crate) fn remove(
    node: &NodeArguments,
    names: &[String],
    ids: &[BlockId],
    as_json: bool,
) -> Outcome {
    let connected = connect(node)?;
    let mut all: Vec<BlockId> = names
        .iter()
        .map(|name| BlockId::from_name(&connected.key, name))
        .collect();
    all.extend_from_slice(ids);
    let removed = connected
        .client
        .remove(&all, connected.options)
        .map_err(failure)?;
    if as_json {
        return print::json(&json!({ "asked": all.len(), "removed": removed }));
    }
    print::line(&format!("removed {removed} of {}", all.len()))
}

/// Drops every block of the namespace.
pub(crate) fn purge(node: &NodeArguments, yes: bool, as_json: bool) -> Outcome {
    if !yes {
        return Err(Failure::usage(
            "purge drops every block of the namespace and cannot be undone; say so with --yes",
        ));
    }
    let connected = connect(node)?;
    let purged = connected.client.purge(connected.options).map_err(failure)?;
    if as_json {
        return print::json(&json!({ "purged": purged }));
    }
    print::line(&format!("dropped {purged} blocks"))
}

/// Waits until all that was acknowledged survives a power cut.
pub(crate) fn flush(node: &NodeArguments, as_json: bool) -> Outcome {
    let connected = connect(node)?;
    connected.client.flush(connected.options).map_err(failure)?;
    if as_json {
        return print::json(&json!({ "flushed": true }));
    }
    print::line("flushed")
}

/// When a block ends, in words.
fn expires(unix_s: Option<u64>) -> String {
    let Some(unix_s) = unix_s else {
        return "never".to_owned();
    };
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let left = std::time::Duration::from_secs(unix_s.saturating_sub(now));
    format!("in {}", humantime::format_duration(left))
}

/// Where a block is.
pub(crate) fn stat(node: &NodeArguments, block: &BlockArguments, as_json: bool) -> Outcome {
    let connected = connect(node)?;
    let id = id_of(&connected, block)?;
    let stat = connected
        .client
        .stat(id, connected.options)
        .map_err(|reason| missed(&shown(block), reason, &connected))?;
    if as_json {
        return print::json(&json!({
            "id": id.to_string(),
            "bytes": stat.bytes,
            "in_dram": stat.in_dram,
            "on_flash": stat.on_flash,
            "flushed": stat.flushed,
            "version": stat.version,
            "age_s": stat.age_s,
            "expires_unix_s": stat.expires_unix_s,
        }));
    }
    let tier = match (stat.in_dram, stat.on_flash) {
        (true, true) => "memory and flash",
        (true, false) => "memory",
        _ => "flash",
    };
    print::named(&[
        vec!["id".into(), id.to_string()],
        vec!["bytes stored".into(), stat.bytes.to_string()],
        vec!["in".into(), tier.into()],
        vec!["expires".into(), expires(stat.expires_unix_s)],
        vec![
            "survives power loss".into(),
            if stat.flushed { "yes" } else { "not yet" }.into(),
        ],
    ])
}

/// How the node is.
pub(crate) fn status(node: &NodeArguments, as_json: bool) -> Outcome {
    let connected = connect(node)?;
    let text = connected
        .client
        .status(connected.options)
        .map_err(failure)?;
    if as_json {
        return print::line(&text);
    }
    let status: serde_json::Value = serde_json::from_str(&text)
        .map_err(|error| Failure::failed(format!("the node's status is no JSON: {error}")))?;
    let word = |path: &str| match status.pointer(path) {
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(value) if !value.is_null() => value.to_string(),
        _ => "-".to_owned(),
    };
    let size = |path: &str| {
        let bytes = status.pointer(path).and_then(serde_json::Value::as_u64);
        bytes.map_or_else(|| "-".to_owned(), |bytes| ByteSize(bytes).to_string())
    };
    let amplification = status
        .pointer("/write_amplification")
        .and_then(serde_json::Value::as_f64)
        .map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
    let state = match word("/state").as_str() {
        "loading" => format!(
            "loading: {} of {} shards, {} read for the others",
            word("/shards_loaded"),
            word("/shards_to_load"),
            size("/loading_bytes")
        ),
        state => state.to_owned(),
    };
    let devices = status
        .pointer("/devices")
        .and_then(serde_json::Value::as_array);
    let devices: Vec<String> = devices
        .into_iter()
        .flatten()
        .filter(|device| device["state"] != "retired")
        .map(crate::devices::in_words)
        .collect();
    let devices = devices.join("; ");
    let shards = status
        .pointer("/shards")
        .and_then(serde_json::Value::as_array);
    let in_flight = shards
        .into_iter()
        .flatten()
        .filter_map(|shard| shard["engine"]["write_in_flight_bytes_max"].as_u64())
        .sum();
    let namespaces = status["namespaces"].as_array().into_iter().flatten();
    let namespaces: Vec<String> = namespaces
        .filter(|it| it["share"].is_u64())
        .map(|it| {
            let name = it["name"].as_str().unwrap_or("-");
            let mode = match it["mode"].as_str() {
                None | Some("load") => String::new(),
                Some(mode) => format!(", mode {mode}"),
            };
            format!("{name} (share {}{mode})", it["share"])
        })
        .collect();
    let namespaces = namespaces.join(", ");
    let stats = connected.client.stats();
    let link = match &stats.not_shared {
        Some(why) => format!("{} (no shared memory: {why})", stats.link()),
        None => stats.link().to_owned(),
    };
    let rows = [
        ("version", word("/version")),
        ("state", state),
        ("devices", devices),
        (
            "listen",
            format!("{} (admin {})", word("/listen"), word("/admin")),
        ),
        ("insecure", word("/insecure")),
        ("uptime", format!("{} s", word("/uptime_s"))),
        ("io engine", word("/shards/0/io_engine")),
        (
            "memory tier",
            format!("{} of {}", size("/dram_used_bytes"), size("/dram_bytes")),
        ),
        ("blocks in memory", word("/dram_blocks")),
        (
            "blocks on flash",
            format!(
                "{} (room {})",
                word("/flash_blocks"),
                size("/flash_bytes_max")
            ),
        ),
        (
            "not flushed yet",
            format!("{} puts", word("/unflushed_puts")),
        ),
        (
            "waits in memory",
            format!("{} (to be written or let go)", size("/held_bytes")),
        ),
        (
            "writes under way",
            format!("at most {}", ByteSize(in_flight)),
        ),
        ("namespaces", namespaces),
        ("write amplification", amplification),
        ("hits", word("/links/get_hits")),
        ("puts stored", word("/links/puts/stored")),
        (
            "links open",
            format!(
                "{}, {} of them through shared memory",
                word("/links/links_open"),
                word("/links/links_shared")
            ),
        ),
        ("this link", link),
    ];
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(name, value)| vec![name.to_owned(), value])
        .collect();
    print::named(&rows)
}
