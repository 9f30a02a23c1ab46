//! `kvar bench node`: gets or puts against a node that is running, as one client sees it.
//!
//! ```text
//!   fill: blocks NAME/0 .. NAME/n-1 that are not there are put      (--op get; left out with --no-fill)
//!   run:  `depth` calls of `batch` blocks under way at all times, blocks at random
//! ```
//!
//! One session on this thread, one link: what one engine's worker would get. Every byte is verified.
//! A put is of a block that was never put before; what it writes stays until the node needs the room
//! (a lasting mark on somebody's cache: it is the operator's node, and the blocks are ephemeral).
//!
//! Left to others: how fast the machine could be (`kvar bench net`), other stores (`bench/peers_net`).

use super::load::{Filling, Random};
use super::stats::{Cpu, latencies};
use crate::arguments::NodeArguments;
use crate::failure::Failure;
use kvar_base::{BlockId, NamespaceKey, PutOutcome};
use kvar_client::PutHints;
use kvar_client::{
    Answer, ClientConfig, Completion, Filled, GetItem, Lengths, PutItem, Request, Session, Source,
    Ticket,
};
use kvar_node::KeyFile;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Puts under way while filling.
const FILL_BYTES_IN_FLIGHT: usize = 8 << 20;
/// Fewer hits than this share, and the run measured how fast misses are.
const HIT_SHARE_MIN: f64 = 0.95;
/// Different contents that puts take turns with: made before the clock starts.
const CONTENTS: usize = 16;

/// What to do to the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Operation {
    /// Blocks that are there, at random.
    Get,
    /// Blocks that were never there.
    Put,
}

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) node: NodeArguments,
    pub(crate) operation: Operation,
    pub(crate) block_bytes: usize,
    pub(crate) batch: usize,
    pub(crate) depth: usize,
    pub(crate) blocks: u64,
    pub(crate) seconds: f64,
    pub(crate) fills: bool,
    pub(crate) spin: Duration,
}

/// What was reached.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Reached {
    op: &'static str,
    block_bytes: usize,
    batch: usize,
    depth: usize,
    /// Calls that ended.
    calls: u64,
    /// Blocks that were read or stored, and those that were not.
    good: u64,
    others: u64,
    pub(crate) bytes_per_s: f64,
    /// Of a call, all its blocks.
    p50_us: u64,
    p99_us: u64,
    p999_us: u64,
    /// CPU time of this client for each GB moved, in seconds.
    client_cpu_s_per_gb: f64,
}

impl Reached {
    /// The way a person reads it.
    pub(crate) fn print(&self) {
        println!(
            "{} of {} bytes, {} a call, {} calls under way: {:.2} GB/s, p50 {} us, p99 {} us, p999 {} us, \
             {:.2} s CPU a GB here, {} blocks ({} not)",
            self.op,
            self.block_bytes,
            self.batch,
            self.depth,
            self.bytes_per_s / 1e9,
            self.p50_us,
            self.p99_us,
            self.p999_us,
            self.client_cpu_s_per_gb,
            self.good,
            self.others
        );
    }
}

/// What many puts send, as an engine's memory is sent: where it lies. (A copy of each would measure
/// how fast the kernel makes new pages.)
#[derive(Clone)]
struct Content(Arc<[u8]>);

impl Source for Content {
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
        visit(&self.0);
    }
}

struct Load<'a> {
    settings: &'a Settings,
    session: Session,
    key: NamespaceKey,
    done: Vec<Completion>,
    random: Random,
    spare: Vec<Filled>,
    contents: Vec<Content>,
    /// Tells apart the puts of this run from those of others.
    run: u64,
    put: u64,
}

/// Fills, runs, and says what was reached.
pub(crate) fn run(settings: &Settings) -> Result<Reached, Failure> {
    let key = KeyFile::read(&settings.node.key.key_file)
        .map_err(Failure::usage)?
        .key;
    let config = ClientConfig {
        deadline: settings.node.deadline,
        spin: settings.spin,
        link: settings.node.link,
        name: concat!("kvar bench ", env!("CARGO_PKG_VERSION")).to_owned(),
        ..ClientConfig::new(&settings.node.endpoint, key.clone())
    };
    let session = Session::connect(config).map_err(crate::connect::failure)?;
    let now = std::time::SystemTime::now();
    let run = now
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |since| since.as_nanos() as u64);
    let mut load = Load {
        settings,
        session,
        key,
        done: Vec::new(),
        random: Random::new(run | 1),
        spare: Vec::new(),
        contents: Vec::new(),
        run,
        put: 0,
    };
    let content = |_| Content(load.random.bytes(settings.block_bytes).into());
    load.contents = (0..CONTENTS).map(content).collect();
    if settings.operation == Operation::Get && settings.fills {
        load.fill()?;
    }
    load.measure()
}

/// The block of a number: another one for each size.
fn id(key: &NamespaceKey, block_bytes: usize, number: u64) -> BlockId {
    BlockId::from_name(key, &format!("kvar bench/{block_bytes}/{number}"))
}

impl Load<'_> {
    /// Puts the blocks that gets will ask for.
    fn fill(&mut self) -> Result<(), Failure> {
        let filling = Filling {
            blocks: self.settings.blocks,
            in_flight: (FILL_BYTES_IN_FLIGHT / self.settings.block_bytes).clamp(1, 64),
            deadline: self.settings.node.deadline,
        };
        let (key, block_bytes) = (&self.key, self.settings.block_bytes);
        let contents = &self.contents;
        filling.put(&mut self.session, |number| {
            let bytes = contents[number as usize % CONTENTS].clone();
            PutItem::of_pieces(id(key, block_bytes, number), bytes)
        })
    }

    fn begin(&mut self) -> Ticket {
        let count = self.settings.batch;
        let request = match self.settings.operation {
            Operation::Get => {
                let items = (0..count)
                    .map(|_| {
                        let number = self.random.number() % self.settings.blocks;
                        let into = self.spare.pop().unwrap_or_else(|| {
                            Filled::Place(Box::new(vec![0_u8; self.settings.block_bytes]))
                        });
                        GetItem {
                            expected: Lengths::of(&[self.settings.block_bytes as u32]),
                            into,
                            ..GetItem::to_vec(id(&self.key, self.settings.block_bytes, number))
                        }
                    })
                    .collect();
                Request::Get {
                    items,
                    touch_request: 0,
                    waits: false,
                }
            }
            Operation::Put => {
                let items = (0..count)
                    .map(|_| {
                        self.put += 1;
                        let name = format!("kvar bench/{}/{}", self.run, self.put);
                        let id = BlockId::from_name(&self.key, &name);
                        let bytes = self.contents[self.put as usize % CONTENTS].clone();
                        let mut item = PutItem::of_pieces(id, bytes);
                        item.hints = PutHints {
                            ephemeral: true,
                            ..PutHints::default()
                        };
                        item.prepare()
                    })
                    .collect();
                Request::Put { items }
            }
        };
        self.session.submit(request, self.settings.node.deadline)
    }

    fn measure(&mut self) -> Result<Reached, Failure> {
        let mut latencies = latencies();
        let cpu = Cpu::of_thread();
        let started = Instant::now();
        let end = started + Duration::from_secs_f64(self.settings.seconds);
        let mut begun: HashMap<Ticket, Instant> = HashMap::with_capacity(self.settings.depth * 2);
        let (mut calls, mut good, mut others) = (0_u64, 0_u64, 0_u64);
        loop {
            while begun.len() < self.settings.depth && Instant::now() < end {
                let since = Instant::now();
                let ticket = self.begin();
                begun.insert(ticket, since);
            }
            if begun.is_empty() {
                break;
            }
            self.session
                .poll(Duration::from_millis(100), &mut self.done);
            let heard = Instant::now();
            for completion in std::mem::take(&mut self.done) {
                let Some(since) = begun.remove(&completion.ticket) else {
                    continue;
                };
                let (hits, misses) = match completion.answer {
                    Answer::Get(results) => {
                        let hits = results.iter().filter(|result| result.is_hit()).count();
                        let misses = results.len() - hits;
                        self.spare
                            .extend(results.into_iter().map(|result| result.into));
                        (hits, misses)
                    }
                    Answer::Put(outcomes) => {
                        let stored = |outcome: &&PutOutcome| **outcome == PutOutcome::Stored;
                        let stored = outcomes.iter().filter(stored).count();
                        (stored, outcomes.len() - stored)
                    }
                    _ => (0, self.settings.batch),
                };
                calls += 1;
                good += hits as u64;
                others += misses as u64;
                if misses == 0 {
                    latencies.saturating_record((heard - since).as_micros() as u64);
                }
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        let bytes = good as f64 * self.settings.block_bytes as f64;
        if self.settings.operation == Operation::Get
            && (good as f64) < HIT_SHARE_MIN * (good + others) as f64
        {
            return Err(Failure::failed(format!(
                "this was no measurement: {good} hits of {} blocks asked for; does the node hold --blocks {} \
                 of {} bytes, and were they filled?",
                good + others,
                self.settings.blocks,
                self.settings.block_bytes
            )));
        }
        let cpu_us = cpu_us(&cpu);
        Ok(Reached {
            op: match self.settings.operation {
                Operation::Get => "get",
                Operation::Put => "put",
            },
            block_bytes: self.settings.block_bytes,
            batch: self.settings.batch,
            depth: self.settings.depth,
            calls,
            good,
            others,
            bytes_per_s: bytes / seconds,
            p50_us: latencies.value_at_quantile(0.5),
            p99_us: latencies.value_at_quantile(0.99),
            p999_us: latencies.value_at_quantile(0.999),
            client_cpu_s_per_gb: cpu_us / 1e6 / (bytes / 1e9).max(f64::MIN_POSITIVE),
        })
    }
}

fn cpu_us(before: &Cpu) -> f64 {
    Cpu::of_thread()
        .total
        .saturating_sub(before.total)
        .as_secs_f64()
        * 1e6
}
