//! fio as the yardstick of a device.

use crate::failure::Failure;
use std::path::Path;
use std::process::Command;

/// What fio reached.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FioResult {
    pub(crate) bytes_per_s: f64,
    pub(crate) p50_us: f64,
}

/// A job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    /// `randread` or `write`.
    pub(crate) rw: &'static str,
    pub(crate) block_bytes: u64,
    pub(crate) depth: u32,
    pub(crate) seconds: f64,
}

/// Whether fio is here, and what to do if not.
pub(crate) fn check() -> Result<(), Failure> {
    let found = Command::new("fio")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if found {
        return Ok(());
    }
    Err(Failure::failed(
        "fio is not installed, and it is what the engine is compared with: apt-get install fio",
    ))
}

/// Runs a job over `bytes` of a file or device that is there, from `offset` on.
pub(crate) fn run(path: &Path, offset: u64, bytes: u64, job: Job) -> Result<FioResult, Failure> {
    let output = Command::new("fio")
        .args([
            "--name=kvar",
            "--ioengine=io_uring",
            "--direct=1",
            "--time_based",
            "--norandommap",
            "--thread",
        ])
        .args([
            "--randrepeat=0",
            "--output-format=json",
            "--group_reporting",
        ])
        .arg(format!("--filename={}", path.display()))
        .arg(format!("--rw={}", job.rw))
        .arg(format!("--bs={}", job.block_bytes))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--offset={offset}"))
        .arg(format!("--size={bytes}"))
        .arg(format!("--runtime={}ms", (job.seconds * 1000.0) as u64))
        .output()
        .map_err(|error| Failure::failed(format!("fio did not start: {error}")))?;
    let wrong = |what: &str| {
        let errors = String::from_utf8_lossy(&output.stderr);
        Failure::failed(format!("fio {what}: {}", errors.trim()))
    };
    if !output.status.success() {
        return Err(wrong("failed"));
    }
    // Notes may stand before the object.
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |start| &text[start..]);
    let value: serde_json::Value =
        serde_json::from_str(json).map_err(|_| wrong("printed no JSON"))?;
    let side = if job.rw.contains("read") {
        "read"
    } else {
        "write"
    };
    let stats = &value["jobs"][0][side];
    let number =
        |value: &serde_json::Value| value.as_f64().ok_or_else(|| wrong("left a figure out"));
    Ok(FioResult {
        bytes_per_s: number(&stats["bw_bytes"])?,
        p50_us: number(&stats["clat_ns"]["percentile"]["50.000000"])? / 1000.0,
    })
}
