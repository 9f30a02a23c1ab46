//! Engines of one model share blocks only if they mean the same by them: what the engines that are
//! linked say of themselves, and in what they differ.

use super::{Finding, Grade, list, number};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Facts of an engine that may differ although blocks are the same.
const NO_MATTER: [&str; 2] = ["role", "policy"];

/// Engines of one model that mean different things by a block, and what else keeps them from hits.
pub(super) fn engines(status: &Value) -> Vec<Finding> {
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
