//! `kvar doctor`: why is there no hit?
//!
//! ```text
//!   link ──> wrong address, version, namespace, key: one finding, and nothing else can be asked
//!     └──> status ──> findings about node, devices, what was asked, engines       (pure: `examine`)
//!     └──> one block there and back                                               (`round_trip`)
//! ```
//!
//! A finding is ok, a note (works, could be better, or explains misses) or wrong (keeps blocks from
//! being hits), and says what to do. What engines say of themselves is in the name their link gave
//! (`vllm 0.32; model=...; dtype=...`): engines of one model whose facts differ never share a block.
//!
//! Left to others: figures (`kvar status`), speed (`kvar bench node`), damaged data (`kvar check`).

use crate::arguments::NodeArguments;
use crate::connect::{Connected, connect, failure};
use crate::failure::{Failure, Outcome};
use crate::print;
use kvar_base::{BlockId, ByteSize, LeaseToken, PutOutcome};
use kvar_client::{CallOptions, GetItem, PutItem};
use serde::Serialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// Bytes of the block that is stored and read.
const PROBE_BYTES: usize = 64 << 10;
/// The probe leaves by itself, should this process die before it removes it.
const PROBE_LIVES_S: u32 = 60;
/// Share of blocks asked for from which on one reason for missing is worth a line.
const REASON_SHARE_MIN: f64 = 0.01;
/// So few lookups say nothing yet: prompts that were never there before.
const LOOKUPS_TO_JUDGE: u64 = 256;
/// Of what is kept, so little may be what earlier visits of this command left in the counters.
const KEPT_TO_JUDGE: u64 = 16;
/// A store that refuses so much of what it is given keeps little of use.
const REFUSED_SHARE_MAX: f64 = 0.5;
/// Wear is told by a day of writing, not by the first filling.
const WEAR_AFTER_S: u64 = 24 * 3600;
/// A drive that wears out sooner than this is worth a line.
const ENDURANCE_YEARS_MIN: f64 = 3.0;
/// Facts of an engine that may differ although blocks are the same.
const NO_MATTER: [&str; 2] = ["role", "policy"];

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Grade {
    Ok,
    Note,
    Wrong,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    grade: Grade,
    /// What it is about.
    about: &'static str,
    /// What was found.
    found: String,
    /// What to do; empty for what is well.
    advice: String,
}

impl Finding {
    fn new(grade: Grade, about: &'static str, found: impl Into<String>, advice: &str) -> Self {
        let (found, advice) = (found.into(), advice.to_owned());
        Self {
            grade,
            about,
            found,
            advice,
        }
    }
}

/// Looks at everything; fails if anything is wrong.
pub(crate) fn run(node: &NodeArguments, as_json: bool) -> Outcome {
    let connected = match connect(node) {
        Ok(connected) => connected,
        Err(why) => {
            let advice = "nothing else can be asked before this is right";
            let found = Finding::new(Grade::Wrong, "link", why.message(), advice);
            return tell(&[found], as_json);
        }
    };
    let mut findings = vec![link(&connected)];
    let status = connected
        .client
        .status(connected.options)
        .map_err(failure)?;
    let status: Value = serde_json::from_str(&status)
        .map_err(|error| Failure::failed(format!("the node's status is no JSON: {error}")))?;
    findings.extend(examine(&status, env!("CARGO_PKG_VERSION")));
    findings.push(round_trip(&connected));
    tell(&findings, as_json)
}

fn tell(findings: &[Finding], as_json: bool) -> Outcome {
    let wrong = findings.iter().filter(|it| it.grade == Grade::Wrong);
    let wrong = wrong.count();
    if as_json {
        print::json(&findings)?;
    } else {
        for finding in findings {
            let word = match finding.grade {
                Grade::Ok => "ok   ",
                Grade::Note => "note ",
                Grade::Wrong => "WRONG",
            };
            print::line(&format!("{word}  {}: {}", finding.about, finding.found))?;
            if !finding.advice.is_empty() {
                print::line(&format!("       {}", finding.advice))?;
            }
        }
    }
    if wrong == 0 {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "{wrong} of {} things looked at are wrong",
        findings.len()
    )))
}

fn link(connected: &Connected) -> Finding {
    let stats = connected.client.stats();
    let through = stats.link();
    let found = format!(
        "{} answers, key and namespace are right, through {through}",
        connected.client.endpoint()
    );
    match stats.not_shared {
        Some(why) if through == "tcp" => {
            let found = format!("{found}; no memory is shared: {why}");
            Finding::new(Grade::Ok, "link", found, "")
        }
        _ => Finding::new(Grade::Ok, "link", found, ""),
    }
}

/// Stores a block, reads it, removes it.
fn round_trip(connected: &Connected) -> Finding {
    // A name that no other probe has: a block that exists is not stored.
    let name = format!("kvar doctor {:?}", LeaseToken::random().as_bytes());
    let id = BlockId::from_name(&connected.key, &name);
    let bytes: Vec<u8> = (0..PROBE_BYTES).map(|at| (at * 31 % 251) as u8).collect();
    let mut item = PutItem::of_bytes(id, bytes.clone());
    item.hints.ephemeral = true;
    item.hints.ttl_s = Some(PROBE_LIVES_S);
    let options: CallOptions = connected.options;
    let begun = Instant::now();
    let put = connected.client.submit_put(vec![item], options).wait();
    let put_us = begun.elapsed().as_micros();
    let wrong = |found: String| {
        let advice = "the lines above say why; kvar status and the node's log say more";
        Finding::new(Grade::Wrong, "round trip", found, advice)
    };
    match put.first() {
        Some(PutOutcome::Stored) => {}
        other => {
            let word = other.map_or("nothing", |outcome| outcome.word());
            return wrong(format!("storing {PROBE_BYTES} bytes: {word}"));
        }
    }
    let begun = Instant::now();
    let got = connected
        .client
        .submit_get(vec![GetItem::to_vec(id)], options);
    let got = got.wait();
    let get_us = begun.elapsed().as_micros();
    let first = got.first();
    let is_right = first.and_then(|result| result.bytes()) == Some(&bytes[..]);
    // It leaves by itself too; a failure here is no finding.
    drop(connected.client.remove(&[id], options));
    if !is_right {
        let word = first
            .and_then(kvar_client::GetResult::miss)
            .map_or("other bytes", |reason| reason.word());
        return wrong(format!("reading what was just stored: {word}"));
    }
    let found = format!("64 KiB stored in {put_us} us and read in {get_us} us, bytes equal");
    Finding::new(Grade::Ok, "round trip", found, "")
}

/// What a node's status says.
fn examine(status: &Value, version: &str) -> Vec<Finding> {
    let mut findings = node(status, version);
    findings.extend(devices(status));
    findings.push(room(status));
    findings.extend(host(status));
    findings.extend(modes(status));
    findings.extend(asked(status));
    findings.extend(engines(status));
    findings
}

fn node(status: &Value, version: &str) -> Vec<Finding> {
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

fn devices(status: &Value) -> Vec<Finding> {
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

fn room(status: &Value) -> Finding {
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

fn host(status: &Value) -> Vec<Finding> {
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

/// What was asked for and not served, and what was not taken.
/// What the operator has switched off explains misses, and is easily forgotten.
fn modes(status: &Value) -> Vec<Finding> {
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

fn asked(status: &Value) -> Vec<Finding> {
    let links = &status["links"];
    let hits = number(links, "get_hits");
    let misses = counts(&links["get_misses"]);
    let asked = hits + misses.values().sum::<u64>();
    let looked_up = number(links, "lookup_ids");
    let shards = list(&status["shards"]).iter();
    let found_there: u64 = shards
        .map(|shard| number(&shard["engine"]["counters"], "lookup_hits"))
        .sum();
    let puts = counts(&links["puts"]);
    let of = |word: &str| puts.get(word).copied().unwrap_or(0);
    let kept = of("stored") + of("exists") + of("in_progress");
    let found = format!(
        "{looked_up} blocks looked up and {found_there} of them found; {hits} of {asked} asked for were \
         served; {kept} kept"
    );
    let (grade, advice) = if looked_up == 0 {
        let advice = "nobody has looked anything up since the node started: is the engine set to this endpoint, its \
                      connector's mode to load (kvar mode), kv_role to kv_both?";
        (Grade::Note, advice)
    } else if looked_up < LOOKUPS_TO_JUDGE || found_there > 0 {
        (Grade::Ok, "")
    } else if kept < KEPT_TO_JUDGE {
        let advice = "nothing is kept: is the mode save or load (kvar mode), are prompts longer than one block, does \
                      the engine's log say why it does not store?";
        (Grade::Wrong, advice)
    } else {
        let advice = "what is kept is never found under the names asked for: do the engines agree (below), and did \
                      any prompt come twice?";
        (Grade::Wrong, advice)
    };
    let mut findings = vec![Finding::new(grade, "asked", found, advice)];
    for (reason, count) in misses {
        let (grade, advice) = about_miss(&reason);
        let is_much = count as f64 >= REASON_SHARE_MIN * asked as f64;
        if count > 0 && (is_much || grade == Grade::Wrong) {
            let found = format!("{count} of {asked} blocks asked for: {reason}");
            findings.push(Finding::new(grade, "misses", found, advice));
        }
    }
    let tried: u64 = puts.values().sum();
    for (outcome, count) in &puts {
        let share = *count as f64 / tried.max(1) as f64;
        if let Some(advice) = about_refusal(outcome)
            && share >= REASON_SHARE_MIN
        {
            let found = format!("{count} of {tried} puts: {outcome}");
            let grade = if share >= REFUSED_SHARE_MAX {
                Grade::Wrong
            } else {
                Grade::Note
            };
            findings.push(Finding::new(grade, "puts", found, advice));
        }
    }
    findings
}

fn about_miss(reason: &str) -> (Grade, &'static str) {
    match reason {
        "absent" => (
            Grade::Note,
            "never stored under that name, or made room for others: do the engines agree (below)? Would more \
             room help (kvar replay --offline)?",
        ),
        "evicted" => (
            Grade::Note,
            "made room for others while it was read: more memory (--dram), or leases (lease_ms)",
        ),
        "not_owner" | "unreachable" => (
            Grade::Note,
            "another node's, or a device out of service (above)",
        ),
        "expired" => (
            Grade::Note,
            "their time to live was over: raise ttl where blocks are put",
        ),
        "removed" => (Grade::Note, "somebody removed or purged them"),
        "corrupt" => (
            Grade::Wrong,
            "bytes failed their check and were not served: the device, its cable or memory is ill (kvar check, \
             smartctl, the kernel's log)",
        ),
        "version" => (
            Grade::Note,
            "a copy changed while it was read in parts; it is asked for again",
        ),
        "loading" => (
            Grade::Note,
            "asked while the node was loading after a start",
        ),
        "deadline" => (
            Grade::Note,
            "too slow for the caller: raise deadline_ms, or find what is slow (kvar bench node, kvar bench engine)",
        ),
        "overloaded" => (
            Grade::Note,
            "more under way than the node takes: more memory (--dram) or fewer callers",
        ),
        "wrong_format" => (
            Grade::Wrong,
            "stored with other section lengths than the reader expects: engines of different layout share names",
        ),
        _ => (Grade::Note, "see the glossary in docs/internals"),
    }
}

fn about_refusal(outcome: &str) -> Option<&'static str> {
    Some(match outcome {
        "busy" => {
            "no memory was free: flash is slower than what comes; raise --dram or the write budget"
        }
        "quota" => "the namespace's share was used up",
        "too_big" => "larger than the node's largest block: a larger device, or parts",
        "wrong_format" => {
            "bytes did not arrive as they were checked by the writer: memory changed under way"
        }
        "deadline" => "too slow for the writer: raise deadline_ms",
        "stale" | "unreachable" => {
            "the node was not the one for it, or a device went out of service meanwhile"
        }
        _ => return None,
    })
}

/// Engines of one model that mean different things by a block.
fn engines(status: &Value) -> Vec<Finding> {
    // Namespaces share no block anyway.
    let mut of_model: BTreeMap<(u64, String), Vec<BTreeMap<String, String>>> = BTreeMap::new();
    let mut linked = 0;
    for client in list(&status["clients"]) {
        let facts = facts(client["name"].as_str().unwrap_or(""));
        if let Some(model) = facts.get("model") {
            linked += 1;
            let key = (number(client, "namespace"), model.clone());
            of_model.entry(key).or_default().push(facts);
        }
    }
    if linked == 0 {
        let doors = list(&status["clients"]).iter();
        let doors = doors.filter(|it| {
            it["name"]
                .as_str()
                .is_some_and(|name| name.starts_with("lmcache"))
        });
        let doors = doors.count();
        if doors > 0 {
            let found = format!("{doors} links of LMCache's server");
            return vec![Finding::new(Grade::Ok, "engines", found, "")];
        }
        let found = "none that says what it runs is linked now";
        let advice =
            "an engine links when it starts; other programs and older connectors do not say";
        return vec![Finding::new(Grade::Note, "engines", found, advice)];
    }
    let mut findings = Vec::new();
    for ((_, model), engines) in &of_model {
        let differing = differing(engines);
        if differing.is_empty() {
            let found = format!("{} links of {model}, all alike", engines.len());
            findings.push(Finding::new(Grade::Ok, "engines", found, ""));
            continue;
        }
        let found = format!("{model}: {}", differing.join("; "));
        let advice = "they share no block: start them with the same settings (PYTHONHASHSEED and the hash algorithm, \
                      --block-size, --dtype, the same vLLM)";
        findings.push(Finding::new(Grade::Wrong, "engines", found, advice));
    }
    let seeded = of_model.values().flatten();
    if seeded
        .filter_map(|engine| engine.get("seed"))
        .any(|seed| seed == "random")
    {
        let found =
            "an engine names its blocks anew at every start (a hash of the xxhash kind, no seed)";
        let advice = "set PYTHONHASHSEED to the same number everywhere, or --prefix-caching-hash-algo sha256";
        findings.push(Finding::new(Grade::Wrong, "engines", found, advice));
    }
    for engine in of_model.values().flatten() {
        if engine.get("policy").is_some_and(|policy| policy == "fail") {
            let found = "an engine fails requests whose load fails (kv_load_failure_policy)";
            let advice = "set \"kv_load_failure_policy\": \"recompute\"";
            findings.push(Finding::new(Grade::Wrong, "engines", found, advice));
            break;
        }
    }
    findings
}

/// `first; key=value; key=value`, as an engine's link names itself; the first is its program.
fn facts(name: &str) -> BTreeMap<String, String> {
    let mut parts = name.split(';').map(str::trim);
    let program = parts.next().unwrap_or("").to_owned();
    let facts = parts.filter_map(|part| part.split_once('='));
    let mut facts: BTreeMap<String, String> = facts
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    facts.insert("program".to_owned(), program);
    facts
}

/// The facts of which there is more than one value, and which.
fn differing(engines: &[BTreeMap<String, String>]) -> Vec<String> {
    let keys: BTreeSet<&String> = engines.iter().flat_map(BTreeMap::keys).collect();
    let mut differing = Vec::new();
    for key in keys {
        if NO_MATTER.contains(&key.as_str()) {
            continue;
        }
        let values: BTreeSet<&str> = engines
            .iter()
            .map(|engine| engine.get(key).map_or("unsaid", String::as_str))
            .collect();
        if values.len() > 1 {
            let values: Vec<&str> = values.into_iter().collect();
            differing.push(format!("{key} is {}", values.join(" or ")));
        }
    }
    differing
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or(0)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text_of(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn counts(value: &Value) -> BTreeMap<String, u64> {
    let map = value.as_object().into_iter().flatten();
    map.filter_map(|(word, count)| Some((word.clone(), count.as_u64()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn healthy() -> Value {
        json!({
            "version": "1", "state": "serving", "ready": true, "uptime_s": 5, "listen": "10.0.0.1:1",
            "devices": [{"path": "/d", "state": "online", "trouble": null, "endurance_years": 9.0}],
            "tiers": [{"filled_bytes": 4096}], "dram_bytes": 1 << 20, "dram_used_bytes": 4096,
            "shards": [{"io_engine": "io_uring", "io_notes": [], "engine": {"counters": {"lookup_hits": 90}}}],
            "notes": [],
            "links": {"get_hits": 9000, "get_misses": {"absent": 1000, "corrupt": 0}, "lookup_ids": 100,
                      "puts": {"stored": 10, "busy": 0}},
            "clients": [{"name": "vllm 0.32; model=m; dtype=bf16; role=worker"},
                        {"name": "vllm 0.32; model=m; dtype=bf16; role=scheduler"}, {"name": "kvar 1"}],
        })
    }

    fn wrong(status: &Value) -> Vec<Finding> {
        let findings = examine(status, "1").into_iter();
        findings.filter(|it| it.grade == Grade::Wrong).collect()
    }

    #[test]
    fn nothing_is_wrong_with_a_healthy_node() {
        assert_eq!(wrong(&healthy()), []);
        let findings = examine(&healthy(), "1");
        let misses: Vec<_> = findings.iter().filter(|it| it.about == "misses").collect();
        assert_eq!(misses.len(), 1);
        assert!(misses[0].found.contains("1000 of 10000"), "{misses:?}");
        assert!(
            findings
                .iter()
                .any(|it| it.found.contains("2 links of m, all alike"))
        );
    }

    #[test]
    fn a_namespace_that_was_switched_off_is_named() {
        let mut status = healthy();
        status["namespaces"] = json!([
            {"name": "default", "mode": "load"}, {"name": "team-a", "mode": "observe"}
        ]);
        let findings = examine(&status, "1").into_iter();
        let modes: Vec<Finding> = findings.filter(|it| it.about == "mode").collect();
        assert_eq!(modes.len(), 1);
        assert!(modes[0].found.contains("team-a is in mode observe"));
    }

    #[test]
    fn each_trouble_is_named_with_what_to_do() {
        let cases = [
            ("/ready", json!(false), "node", "shards are loaded"),
            (
                "/devices/0/trouble",
                json!("no space"),
                "device",
                "no space",
            ),
            ("/devices/0/state", json!("failed"), "device", "/d: failed"),
            ("/links/get_misses/corrupt", json!(7), "misses", "corrupt"),
            (
                "/clients/1/name",
                json!("vllm 0.32; model=m; dtype=f32"),
                "engines",
                "dtype is bf16 or f32",
            ),
            (
                "/clients/0/name",
                json!("vllm 0.32; model=m; dtype=bf16; seed=1"),
                "engines",
                "seed is 1 or unsaid",
            ),
            (
                "/clients/0/name",
                json!("vllm 0.31; model=m; dtype=bf16"),
                "engines",
                "program is vllm 0.31 or vllm 0.32",
            ),
        ];
        for (place, value, about, words) in cases {
            let mut status = healthy();
            *status.pointer_mut(place).unwrap() = value;
            let found = wrong(&status);
            assert_eq!(found.len(), 1, "{place}: {found:?}");
            assert_eq!(found[0].about, about);
            assert!(found[0].found.contains(words), "{found:?}");
            assert!(!found[0].advice.is_empty(), "{found:?}");
        }
    }

    #[test]
    fn engines_that_never_find_their_own_blocks_again_are_named() {
        let mut status = healthy();
        for at in 0..2 {
            status["clients"][at]["name"] = json!("vllm 0.32; model=m; hash=xxhash; seed=random");
        }
        let found = wrong(&status);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].advice.contains("PYTHONHASHSEED"), "{found:?}");
        let mut status = healthy();
        status["clients"][0]["name"] = json!("vllm 0.32; model=m; dtype=bf16; policy=fail");
        let found = wrong(&status);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].advice.contains("recompute"), "{found:?}");
    }

    #[test]
    fn a_store_that_is_asked_and_never_given_anything_is_wrong() {
        let mut status = healthy();
        status["shards"][0]["engine"]["counters"]["lookup_hits"] = json!(0);
        status["links"] = json!({"get_hits": 0, "lookup_ids": 1000, "puts": {"stored": 2}});
        assert!(wrong(&status)[0].advice.contains("nothing is kept"));
        // What is there already counts as kept, too.
        status["links"]["puts"] = json!({"exists": 500});
        assert!(
            wrong(&status)[0]
                .advice
                .contains("never found under the names")
        );
        status["shards"][0]["engine"]["counters"]["lookup_hits"] = json!(1);
        assert_eq!(wrong(&status), []);
        // Prompts that were never there before are no trouble yet.
        status["links"] = json!({"lookup_ids": 8});
        assert_eq!(wrong(&status), []);
        status["links"] = json!({});
        assert_eq!(wrong(&status), []);
        let findings = examine(&status, "1");
        assert!(
            findings
                .iter()
                .any(|it| it.advice.contains("nobody has looked"))
        );
    }

    #[test]
    fn one_damaged_block_in_many_and_a_store_that_refuses_are_wrong() {
        let mut status = healthy();
        status["links"]["get_misses"]["corrupt"] = json!(1);
        assert!(wrong(&status)[0].found.contains("1 of 10001"));
        let mut status = healthy();
        status["links"]["puts"]["too_big"] = json!(90);
        assert!(wrong(&status)[0].found.contains("too_big"));
    }

    #[test]
    fn namespaces_may_run_one_model_in_two_ways() {
        let mut status = healthy();
        status["clients"][0]["namespace"] = json!(1);
        status["clients"][0]["name"] = json!("vllm 0.32; model=m; dtype=f32");
        assert_eq!(wrong(&status), []);
    }

    #[test]
    fn an_empty_status_is_no_panic() {
        assert!(!examine(&json!({}), "1").is_empty());
    }

    #[test]
    fn huge_pages_are_read_where_the_kernel_says_them() {
        assert_eq!(
            huge_pages("MemTotal: 1 kB\nHugePages_Total:       3\n"),
            Some(3)
        );
        assert_eq!(huge_pages(""), None);
    }
}
