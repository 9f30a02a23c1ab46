//! `kvar device`: the devices of a running node, over its admin HTTP.
//!
//! How it is talked to: `admin`.

use crate::admin::AdminArguments;
use crate::device_arguments::{DeviceCommand, NewDeviceArguments};
use crate::failure::{Failure, Outcome};
use crate::print;
use kvar_base::ByteSize;
use serde_json::{Value, json};

/// Where the node shows and changes devices.
const PATH: &str = "/v1/devices";

/// Runs one of the commands.
pub(crate) fn run(command: &DeviceCommand) -> Outcome {
    match command {
        DeviceCommand::List { admin } => list(admin),
        DeviceCommand::Add { new, tier, admin } => {
            let action = json!({ "action": "add", "tier": tier });
            let device = admin.change(PATH, &with_new(action, new)?)?;
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
            let device = admin.change(PATH, &action)?;
            let what = if device["state"] == "leaving" {
                "is leaving: its blocks move to the others (kvar device list says how far it is)"
            } else {
                "out of service; it can be taken away"
            };
            say(admin, &device, what)
        }
        DeviceCommand::Replace { device, new, admin } => {
            let action = json!({ "action": "replace", "device": device });
            let device = admin.change(PATH, &with_new(action, new)?)?;
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
    let devices = admin.ask(PATH)?;
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
