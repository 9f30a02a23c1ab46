//! `kvar device`: the devices of a running node, over its admin HTTP.
//!
//! Listing needs nothing; changes carry a proof of the namespace key, which itself stays here.

use crate::device_arguments::{AdminArguments, DeviceCommand, NewDeviceArguments};
use crate::failure::{Failure, Outcome};
use crate::print;
use kvar_base::ByteSize;
use kvar_node::{KeyFile, PROOF_HEADER, TIME_HEADER, device_proof};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest answer that is read: 255 devices of about 400 bytes, with room.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// Runs one of the commands.
pub(crate) fn run(command: &DeviceCommand) -> Outcome {
    match command {
        DeviceCommand::List { admin } => list(admin),
        DeviceCommand::Add { new, tier, admin } => {
            let action = json!({ "action": "add", "tier": tier });
            let device = change(admin, &with_new(action, new)?)?;
            say(admin, &device, "in service")
        }
        DeviceCommand::Retire {
            device,
            now,
            rate,
            admin,
        } => {
            let rate = rate.map(|rate| rate.0);
            let action = json!({ "action": "retire", "device": device, "now": now, "rate": rate });
            let device = change(admin, &action)?;
            let what = if device["state"] == "leaving" {
                "is leaving: its blocks move to the others (kvar device list says how far it is)"
            } else {
                "out of service; it can be taken away"
            };
            say(admin, &device, what)
        }
        DeviceCommand::Replace { device, new, admin } => {
            let action = json!({ "action": "replace", "device": device });
            let device = change(admin, &with_new(action, new)?)?;
            say(admin, &device, "in service in the old one's place")
        }
    }
}

/// The node has another working folder than this command: a path it is told is whole.
fn with_new(mut action: Value, new: &NewDeviceArguments) -> Result<Value, Failure> {
    let path = std::path::absolute(&new.path)
        .map_err(|error| Failure::usage(format!("{}: {error}", new.path.display())))?;
    action["path"] = json!(path);
    action["size"] = json!(new.size.map(|size| size.0));
    action["erase"] = json!(new.erase);
    Ok(action)
}

fn list(admin: &AdminArguments) -> Outcome {
    let answer = agent(admin.deadline).get(url(admin)).call();
    let devices = read(admin, answer)?;
    if admin.json {
        return print::json(&devices);
    }
    let head = [
        "slot", "tier", "state", "size", "blocks", "share", "path", "uuid", "why",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for device in devices.as_array().into_iter().flatten() {
        let word = |key: &str| match &device[key] {
            Value::String(text) => text.clone(),
            Value::Null => "-".to_owned(),
            value => value.to_string(),
        };
        let share = device["share"].as_f64().unwrap_or(0.0);
        rows.push(vec![
            word("slot"),
            word("tier"),
            word("state"),
            ByteSize(device["bytes"].as_u64().unwrap_or(0)).to_string(),
            word("blocks"),
            format!("{:.1} %", share * 100.0),
            word("path"),
            word("uuid"),
            moved(&device["moved"]).unwrap_or_else(|| word("reason")),
        ]);
    }
    print::table(&rows)
}

/// How far a device that leaves is.
fn moved(moved: &Value) -> Option<String> {
    let number = |key: &str| moved[key].as_u64();
    let (all, done) = (number("segments")?, number("segments_done")?);
    let mut text = format!(
        "{done} of {all} segments: {} blocks, {} moved",
        number("blocks")?,
        ByteSize(number("bytes")?)
    );
    if let Some(lost) = number("lost_blocks").filter(|lost| *lost > 0) {
        text.push_str(&format!(", {lost} lost"));
    }
    if let Some(count) = number("unreadable_segments").filter(|count| *count > 0) {
        text.push_str(&format!(", {count} segments cannot be read"));
    }
    Some(text)
}

/// A device on one line.
pub(crate) fn in_words(device: &Value) -> String {
    let word = |key: &str| device[key].as_str().unwrap_or("-").to_owned();
    let mut text = format!("{} {} {}", word("path"), word("uuid"), word("state"));
    if device["tier"] == "big" {
        text.push_str(", big");
    }
    for key in ["reason", "trouble"] {
        if let Some(why) = device[key].as_str() {
            text.push_str(&format!(" ({why})"));
        }
    }
    if let Some(streams) = device["write_streams"].as_u64().filter(|count| *count > 0) {
        text.push_str(&format!(", {streams} write streams"));
    }
    if let Some(rate) = device["drive_writes_per_day"].as_f64() {
        text.push_str(&format!(", {rate:.2} drive writes a day"));
    }
    if let Some(years) = device["endurance_years"]
        .as_f64()
        .filter(|years| *years < 100.0)
    {
        text.push_str(&format!(", worn out in {years:.1} years at that"));
    }
    text
}

fn say(admin: &AdminArguments, device: &Value, what: &str) -> Outcome {
    if admin.json {
        return print::json(device);
    }
    let word = |key: &str| device[key].as_str().unwrap_or("-").to_owned();
    print::line(&format!("{} ({}) {what}", word("path"), word("uuid")))
}

fn url(admin: &AdminArguments) -> String {
    format!("http://{}/v1/devices", admin.admin)
}

fn agent(deadline: Duration) -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(deadline))
        .http_status_as_error(false)
        .proxy(None)
        .build()
        .into()
}

fn change(admin: &AdminArguments, action: &Value) -> Result<Value, Failure> {
    let key = KeyFile::read(&admin.key.key_file)
        .map_err(Failure::usage)?
        .key;
    let body = action.to_string();
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |elapsed| elapsed.as_secs());
    let answer = agent(admin.deadline)
        .post(url(admin))
        .header("content-type", "application/json")
        .header(TIME_HEADER, now.to_string())
        .header(PROOF_HEADER, device_proof(&key, now, body.as_bytes()))
        .send(&body);
    read(admin, answer)
}

fn read(
    admin: &AdminArguments,
    answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
) -> Result<Value, Failure> {
    let mut answer = answer.map_err(|error| {
        Failure::failed(format!(
            "no answer from the admin HTTP at {} ({error}); is a node running there, and is --admin \
             right?",
            admin.admin
        ))
    })?;
    let text = answer
        .body_mut()
        .with_config()
        .limit(ANSWER_BYTES_MAX)
        .read_to_string()
        .map_err(|error| Failure::failed(format!("half an answer: {error}")))?;
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|_| json!({ "error": text }));
    if answer.status().is_success() {
        return Ok(value);
    }
    let why = value["error"].as_str().unwrap_or("no reason given");
    Err(Failure::failed(why))
}
