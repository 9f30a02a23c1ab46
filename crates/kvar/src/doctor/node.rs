//! Whether a node is well, and what it stands on: devices, room, host, what its operator switched.

use super::{Finding, Grade, list, number, text_of};
use kvar_base::ByteSize;
use serde_json::Value;
use std::collections::BTreeSet;

/// Wear is told by a day of writing, not by the first filling.
const WEAR_AFTER_S: u64 = 24 * 3600;
/// A drive that wears out sooner than this is worth a line.
const ENDURANCE_YEARS_MIN: f64 = 3.0;

/// Whether it serves, as which version, to whom.
pub(super) fn node(status: &Value, version: &str) -> Vec<Finding> {
    let text = |key: &str| status[key].as_str().unwrap_or("?");
    let (state, theirs) = (text("state"), text("version"));
    if state == "stopping" {
        let advice = "it takes nothing new; wait until it is back, or ask another node";
        return vec![Finding::new(Grade::Wrong, "node", "it is stopping", advice)];
    }
    if status["ready"] != true {
        let (done, all) = (
            number(status, "shards_loaded"),
            number(status, "shards_to_load"),
        );
        let found = format!("{state}: {done} of {all} shards are loaded");
        let advice = "until then lookups find nothing and puts are refused as busy; /readyz says how far it is";
        return vec![Finding::new(Grade::Wrong, "node", found, advice)];
    }
    let uptime = number(status, "uptime_s");
    let found = format!("kvar {theirs}, {state}, up for {uptime} s");
    let mut findings = vec![Finding::new(Grade::Ok, "node", found, "")];
    if theirs != version {
        let found = format!("the node is kvar {theirs}, this command {version}");
        let advice = "run the same version on both sides";
        findings.push(Finding::new(Grade::Note, "node", found, advice));
    }
    if status["insecure"] == true {
        let found = "it listens beyond loopback without encryption";
        let advice =
            "anyone on that network can read what is stored: keep it to networks you trust";
        findings.push(Finding::new(Grade::Note, "node", found, advice));
    }
    findings
}

/// Devices that keep blocks from being hits, or will wear out soon.
pub(super) fn devices(status: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    for device in list(&status["devices"]) {
        let path = device["path"].as_str().unwrap_or("?");
        let state = device["state"].as_str().unwrap_or("?");
        if let Some(trouble) = device["trouble"].as_str() {
            let found = format!("{path}: takes no writes: {trouble}");
            let advice = "new blocks are kept in memory only; free space or replace it (kvar device replace)";
            findings.push(Finding::new(Grade::Wrong, "device", found, advice));
        } else if !matches!(state, "online" | "retired") {
            let why = device["reason"]
                .as_str()
                .unwrap_or("kvar device list says more");
            let found = format!("{path}: {state}: {why}");
            let (grade, advice) = match state {
                "loading" | "leaving" => (
                    Grade::Note,
                    "it takes its time; kvar device list shows how far it is",
                ),
                _ => (
                    Grade::Wrong,
                    "its blocks are misses; kvar device add brings it back, replace gives its place to another",
                ),
            };
            findings.push(Finding::new(grade, "device", found, advice));
        }
        if let Some(years) = device["endurance_years"].as_f64()
            && years < ENDURANCE_YEARS_MIN
            && number(status, "uptime_s") >= WEAR_AFTER_S
        {
            let found = format!("{path}: lasts {years:.1} years at today's rate of writes");
            let advice = "lower --flash-write-budget, or set --flash-write-limit";
            findings.push(Finding::new(Grade::Note, "device", found, advice));
        }
    }
    if findings.is_empty() {
        let devices = list(&status["devices"]).iter();
        let online = devices.filter(|device| device["state"] == "online").count();
        let found = format!("{online} in service");
        findings.push(Finding::new(Grade::Ok, "devices", found, ""));
    }
    findings
}

/// How full memory and devices are.
pub(super) fn room(status: &Value) -> Finding {
    let flash: u64 = list(&status["tiers"])
        .iter()
        .map(|tier| number(tier, "filled_bytes"))
        .sum();
    let (dram, dram_max) = (
        number(status, "dram_used_bytes"),
        number(status, "dram_bytes"),
    );
    let found = format!(
        "{} of {} in memory, {} of {} on flash",
        ByteSize(dram),
        ByteSize(dram_max),
        ByteSize(flash),
        ByteSize(number(status, "flash_bytes_max"))
    );
    Finding::new(Grade::Ok, "room", found, "")
}

/// What the machine lacks.
pub(super) fn host(status: &Value) -> Vec<Finding> {
    let mut notes: BTreeSet<String> = BTreeSet::new();
    for shard in list(&status["shards"]) {
        if shard["io_engine"] == "threads" {
            notes.insert("io_uring is not used: reads and writes go through threads".to_owned());
        }
        notes.extend(list(&shard["io_notes"]).iter().filter_map(text_of));
    }
    notes.extend(list(&status["notes"]).iter().filter_map(text_of));
    let notes = notes.into_iter();
    let mut findings: Vec<Finding> = notes
        .map(|note| Finding::new(Grade::Note, "host", note, ""))
        .collect();
    // Only this host's, and only when the node runs here; a file that is not there says nothing.
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    if is_local(status) && huge_pages(&meminfo) == Some(0) {
        let found = "no huge pages are reserved on this host";
        let advice = "the node asks for transparent ones; reserving some (vm.nr_hugepages) saves a few per cent";
        findings.push(Finding::new(Grade::Ok, "host", found, advice));
    }
    findings
}

fn is_local(status: &Value) -> bool {
    let listen = status["listen"].as_str().unwrap_or("");
    listen.starts_with("127.") || listen.starts_with("[::1]")
}

fn huge_pages(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find(|line| line.starts_with("HugePages_Total:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// What the operator has switched off explains misses, and is easily forgotten.
pub(super) fn modes(status: &Value) -> Vec<Finding> {
    let namespaces = status["namespaces"].as_array().into_iter().flatten();
    let switched = namespaces.filter_map(|it| {
        let (name, mode) = (it["name"].as_str()?, it["mode"].as_str()?);
        (mode != "load")
            .then(|| format!("namespace {name} is in mode {mode}: its engines load nothing"))
    });
    let advice = "kvar mode says who switched it, and switches it on again";
    switched
        .map(|found| Finding::new(Grade::Note, "mode", found, advice))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_are_read_where_the_kernel_says_them() {
        assert_eq!(
            huge_pages("MemTotal: 1 kB\nHugePages_Total:       3\n"),
            Some(3)
        );
        assert_eq!(huge_pages(""), None);
    }
}
