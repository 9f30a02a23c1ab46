//! Starts a child for each store, lets one of them run at a time, and collects what they found.
//!
//! What must always be true: while a child measures, the others are stopped; no child outlives this
//! process's run, whatever went wrong; nothing waits without bound.

use crate::child::{Answer, Fill};
use crate::measure::Reads;
use crate::report::{self, Found};
use crate::{Arguments, DEPTHS, Which};
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// Longest a child may take to fill its store: 100 MB/s for the largest that is sensible.
const FILL_MAX: Duration = Duration::from_secs(1800);
/// Longest a run may take beyond what it was told to.
const OVERTIME_MAX: Duration = Duration::from_secs(120);

/// kvar first: what the others are compared with.
const STORES: [Which; 4] = [
    Which::Kvar,
    Which::FoyerUring,
    Which::FoyerPsync,
    Which::Fjall,
];

pub(crate) fn run(arguments: &Arguments, folder: &Path) -> Result<()> {
    let mut stores = Vec::new();
    let mut fills: Vec<Fill> = Vec::new();
    for which in STORES {
        eprintln!("filling {}", which.name());
        let mut store = Running::start(which, arguments, folder)?;
        match store.answer(FILL_MAX)? {
            Answer::Fill(fill) => fills.push(fill),
            other => bail!("{} began with {other:?}", which.name()),
        }
        store.stop()?;
        stores.push(store);
    }
    let mut found: Vec<Found> = fills.into_iter().map(Found::new).collect();
    for round in 0..arguments.rounds as usize {
        for turn in 0..stores.len() {
            let number = (turn + round) % stores.len();
            let (name, store) = (STORES[number].name(), &mut stores[number]);
            store.resume()?;
            let idle = store.idle(arguments.seconds.min(1.0))?;
            store.stop()?;
            eprintln!(
                "round {round}, {name}: {:.1} % of a core idle",
                idle * 100.0
            );
            found[number].idle.push(idle);
        }
        for (at, depth) in DEPTHS.into_iter().enumerate() {
            for turn in 0..stores.len() {
                let number = (turn + round) % stores.len();
                let (name, store) = (STORES[number].name(), &mut stores[number]);
                store.resume()?;
                let reads = store.read(depth, arguments.seconds)?;
                store.stop()?;
                eprintln!("round {round}, depth {depth}, {name}: {reads}");
                ensure!(reads.wrong == 0, "{name} gave {} wrong values", reads.wrong);
                ensure!(
                    reads.hit_share > 0.9,
                    "{name} has lost {:.0} % of its values: this is no measurement",
                    (1.0 - reads.hit_share) * 100.0
                );
                let idle = *found[number].idle.last().expect("asked at every round");
                found[number].runs[at].push(reads.less_idle(idle));
            }
        }
    }
    let names = STORES.map(Which::name);
    report::print(&names, &found, arguments)
}

/// A child.
struct Running {
    name: &'static str,
    child: Child,
    input: ChildStdin,
    lines: Receiver<std::io::Result<String>>,
}

impl Running {
    fn start(which: Which, arguments: &Arguments, folder: &Path) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--child")
            .arg(which.name())
            .arg("--folder")
            .arg(folder)
            .arg("--values")
            .arg(arguments.values.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting the process of {}", which.name()))?;
        let input = child.stdin.take().context("a child has an input")?;
        let output = child.stdout.take().context("a child has an output")?;
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            name: which.name(),
            child,
            input,
            lines,
        })
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).with_context(|| format!("{} is gone", self.name))
    }

    fn stop(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn answer(&mut self, longest: Duration) -> Result<Answer> {
        let line = match self.lines.recv_timeout(longest) {
            Ok(line) => line?,
            Err(RecvTimeoutError::Timeout) => {
                bail!("{} did not answer within {longest:?}", self.name)
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("{} ended; what it said is above", self.name)
            }
        };
        serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.name))
    }

    fn idle(&mut self, seconds: f64) -> Result<f64> {
        writeln!(self.input, "idle {seconds}")?;
        match self.answer(Duration::from_secs_f64(seconds) + OVERTIME_MAX)? {
            Answer::Idle(share) => Ok(share),
            other => bail!("{} answered {other:?}", self.name),
        }
    }

    fn read(&mut self, depth: usize, seconds: f64) -> Result<Reads> {
        writeln!(self.input, "read {depth} {seconds}")?;
        match self.answer(Duration::from_secs_f64(seconds) + OVERTIME_MAX)? {
            Answer::Read(reads) => Ok(reads),
            other => bail!("{} answered {other:?}", self.name),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A stopped process is killed all the same; what it held is removed with the folder.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
