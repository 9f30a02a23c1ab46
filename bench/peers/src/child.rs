//! The child that has one store: fills it, then does what standard input says, a line each.
//!
//! | line in | line out |
//! |---|---|
//! | (start) | `{"fill": ...}` once all values are on the device |
//! | `idle SECONDS` | `{"idle": CPU seconds a second}` while nobody reads |
//! | `read DEPTH SECONDS` | `{"read": ...}` |
//!
//! Ends when standard input does, or with a message at the first error.

use crate::measure::process_cpu;
use crate::{Store, VALUE_BYTES};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

/// How often a store that has no threads of its own is given a turn while nobody reads.
const TURN: Duration = Duration::from_millis(5);

/// What a child answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Fill(Fill),
    Idle(f64),
    Read(crate::Reads),
}

/// What filling reached.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Fill {
    pub(crate) bytes_per_s: f64,
    pub(crate) cpu_us: f64,
    /// Bytes the process caused to be written for each byte of value.
    pub(crate) write_amplification: f64,
}

pub(crate) fn serve(mut store: Box<dyn Store>, values: u64) -> Result<()> {
    say(&Answer::Fill(fill(&mut *store, values)?))?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["idle", seconds] => Answer::Idle(idle(&mut *store, seconds.parse()?)),
            ["read", depth, seconds] => {
                if store.is_cached_by_the_system() {
                    drop_page_cache();
                }
                Answer::Read(store.read(values, depth.parse()?, seconds.parse()?)?)
            }
            _ => bail!("{line:?} is nothing a child does"),
        };
        say(&answer)?;
    }
    Ok(())
}

fn say(answer: &Answer) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(answer)?)?;
    out.flush().context("nobody listens any more")
}

fn fill(store: &mut dyn Store, values: u64) -> Result<Fill> {
    let (cpu, written, started) = (process_cpu(), written_bytes(), Instant::now());
    store.fill(values)?;
    let bytes = values as f64 * VALUE_BYTES as f64;
    Ok(Fill {
        bytes_per_s: bytes / started.elapsed().as_secs_f64(),
        cpu_us: (process_cpu() - cpu).as_secs_f64() * 1e6 / values as f64,
        write_amplification: (written_bytes() - written) as f64 / bytes,
    })
}

/// CPU seconds a second of this process while nobody reads.
fn idle(store: &mut dyn Store, seconds: f64) -> f64 {
    let (cpu, started) = (process_cpu(), Instant::now());
    while started.elapsed().as_secs_f64() < seconds {
        store.turn();
        std::thread::sleep(TURN);
    }
    (process_cpu() - cpu).as_secs_f64() / started.elapsed().as_secs_f64()
}

/// Bytes this process caused to be written to storage; 0 where the system does not say.
fn written_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("write_bytes: "))
        .and_then(|bytes| bytes.trim().parse().ok())
        .unwrap_or(0)
}

fn drop_page_cache() {
    rustix::fs::sync();
    if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "3") {
        eprintln!("the page cache was not dropped ({error}): the next figures are of memory");
    }
}
