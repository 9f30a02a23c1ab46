//! `kvar doctor`: why is there no hit?
//!
//! ```text
//!   link ──> wrong address, version, namespace, key: one finding, and nothing else can be asked
//!     └──> status ──> findings about node, devices, what was asked, engines       (pure: `examine`)
//!     └──> one block there and back                                               (`round_trip`)
//! ```
//!
//! | file | question |
//! |---|---|
//! | `node` | is the node well, and what it stands on: devices, room, host, switches? |
//! | `asked` | what was asked of it and not served, given to it and not taken? |
//! | `engines` | do the engines that are linked share their blocks? |
//!
//! A finding is ok, a note (works, could be better, or explains misses) or wrong (keeps blocks from
//! being hits), and says what to do. What engines say of themselves is in the name their link gave
//! (`vllm 0.32; model=...; dtype=...`): engines of one model whose facts differ never share a block.
//!
//! Left to others: figures (`kvar status`), speed (`kvar bench node`), damaged data (`kvar check`).

mod asked;
mod engines;
mod node;

use crate::arguments::NodeArguments;
use crate::connect::{Connected, connect, failure};
use crate::failure::{Failure, Outcome};
use crate::print;
use kvar_base::{BlockId, LeaseToken, PutOutcome};
use kvar_client::{CallOptions, GetItem, PutItem};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Instant;

/// Bytes of the block that is stored and read.
const PROBE_BYTES: usize = 64 << 10;
/// The probe leaves by itself, should this process die before it removes it.
const PROBE_LIVES_S: u32 = 60;

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
    let mut findings = node::node(status, version);
    findings.extend(node::devices(status));
    findings.push(node::room(status));
    findings.extend(node::host(status));
    findings.extend(node::modes(status));
    findings.extend(asked::asked(status));
    findings.extend(engines::engines(status));
    findings
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
}
