//! Starting a node, and stopping it.
//!
//! ```text
//!   settings -> storage (data, key) -> addresses -> one thread a shard: device, engine, recovery
//!            -> admin -> all shards are up -> ready file -> connections are accepted
//!
//!   shutdown() -> every shard: links closed, memory written, checkpoint -> wait() says how it went
//! ```
//!
//! What must always be true: nothing is accepted before every shard has recovered; a start that
//! fails leaves no thread behind; a shard that ends by a defect takes the node down cleanly instead
//! of leaving it half alive.

use crate::admin::{self, Admin, AdminError};
use crate::config::Config;
use crate::links::{Describe, LinkSettings};
use crate::mail::{Mail, Post};
use crate::report::{NodeFacts, NodeReport, ShardReport};
use crate::shard::{self, ShardParts, WAKER};
use crate::storage::{self, Storage, StorageError};
use kvar_base::{Clock as _, SystemClock};
use kvar_engine::{Engine, EngineConfig, OpenError, RecoveryReport, ShutdownReport, arena_bytes};
use kvar_io::{DeviceOptions, open_device};
use kvar_transport::{BindError, Listener};
use kvar_wire::Limits;
use mio::{Poll, Waker};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Resident memory beside arenas and index: code, stacks, the admin thread, tables of open
/// requests. A fresh node of two shards has 20 MiB resident in all; the rest is room for tables
/// under load and for the allocator's slack.
pub const MEMORY_BASE_BYTES: u64 = 64 << 20;

/// What one open link may hold beside its payload budget, whose bytes lie in the arenas: a message
/// being received, one being parsed, and answers queued.
pub const LINK_BYTES: u64 = 4 << 20;

/// Name of the namespace that is there from the first start.
const NAMESPACE: &str = "default";

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings.
    #[error(transparent)]
    Config(#[from] crate::ConfigError),
    /// What it stores in.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Where it listens.
    #[error(transparent)]
    Listen(#[from] BindError),
    /// Where its admin HTTP listens.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// Recovery.
    #[error("shard {shard} of {}: {source}", data.display())]
    Shard {
        /// Which.
        shard: u32,
        /// The data file or block device.
        data: PathBuf,
        /// Why.
        source: OpenError,
    },
    /// The ready file.
    #[error("ready file {}: {source}", path.display())]
    ReadyFile {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// Anything else the system refuses: threads, descriptors.
    #[error("the system refuses {what}: {source}")]
    System {
        /// What was asked of it.
        what: &'static str,
        /// Its words.
        source: std::io::Error,
    },
}

/// How a node ended.
#[derive(Clone, Debug, Default)]
pub struct StopReport {
    /// Blocks in memory that are on the device.
    pub kept_blocks: u64,
    /// Blocks that were in memory only and were not written in time.
    pub dropped_blocks: u64,
    /// Whether every shard wrote a checkpoint.
    pub checkpointed: bool,
    /// Shards that ended by a defect, and what they said.
    pub defects: Vec<String>,
}

/// Starts nodes.
#[derive(Debug)]
pub struct Node;

/// A running node. Dropping it stops the node and waits.
pub struct NodeHandle {
    listen: SocketAddr,
    admin_address: SocketAddr,
    key_path: PathBuf,
    ready_file: Option<PathBuf>,
    post: Post,
    shards: Vec<JoinHandle<std::io::Result<ShutdownReport>>>,
    admin: Option<Admin>,
    facts: Arc<NodeFacts>,
}

/// What both doors to the status need.
pub(crate) struct StatusSource {
    pub(crate) facts: Arc<NodeFacts>,
    pub(crate) ready: AtomicBool,
    started: Instant,
}

/// The wall clock in seconds with its fraction; `flushed_through` is finer than a second.
fn unix_seconds() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

impl Describe for StatusSource {
    fn json(&self, reports: &[ShardReport]) -> String {
        self.report(reports).to_json()
    }
}

impl StatusSource {
    pub(crate) fn report<'a>(&'a self, reports: &'a [ShardReport]) -> NodeReport<'a> {
        NodeReport::new(
            &self.facts,
            reports,
            self.ready.load(Ordering::Relaxed),
            self.started.elapsed().as_secs(),
            unix_seconds(),
        )
    }
}

/// A shard that has opened its part of the device.
struct Opened {
    recovery: RecoveryReport,
}

impl Node {
    /// Opens storage, recovers, listens, and returns when the node serves.
    ///
    /// # Errors
    /// Why it cannot, and what to do.
    pub fn start(config: &Config) -> Result<NodeHandle, StartError> {
        config.validate()?;
        let started = Instant::now();
        let clock = SystemClock::default();
        let Storage {
            target,
            superblock,
            key_file,
            notes,
        } = Storage::open(config, &clock)?;
        // Addresses are taken before recovery, which may take a while: a typo shows at once.
        let listener = Listener::bind(config.listen)?;
        let admin_socket = admin::bind(config.admin)?;
        let (listen, admin_address) = (listener.local_addr(), admin_socket.address);

        let shards = superblock.shards;
        let engine_config = EngineConfig {
            dram_bytes: config.dram.0 / u64::from(shards),
            flush_after: config.flush_after,
            shutdown_flush: config.shutdown_flush,
        };
        let shard_arena_bytes = arena_bytes(&engine_config, &superblock);
        let index_bytes = superblock.buckets * 64;
        let mut facts = NodeFacts {
            version: env!("CARGO_PKG_VERSION"),
            uuid: superblock.uuid.to_string(),
            epoch: NodeFacts::EPOCH.0,
            listen: listen.to_string(),
            admin: admin_address.to_string(),
            insecure: config.insecure,
            data: config.data.display().to_string(),
            device_bytes: superblock.device_bytes,
            segment_bytes: superblock.segment_bytes,
            block_bytes_max: superblock.block_bytes_max(),
            format_version: superblock.format_version,
            dram_bytes: config.dram.0,
            memory_bytes_max: MEMORY_BASE_BYTES
                + u64::from(shards) * (shard_arena_bytes as u64 + index_bytes),
            link_bytes_max: LINK_BYTES,
            notes,
            recovery: Vec::new(),
        };
        let block_bytes_max = u32::try_from(facts.block_bytes_max).unwrap_or(u32::MAX);
        let limits = Limits {
            block_bytes_max,
            eager_bytes_max: kvar_wire::EAGER_BYTES_MAX.min(block_bytes_max),
            requests_max: config.link_requests,
            bytes_max: config.link_budget.0,
        };

        // Every shard's poll and mailbox exist before the first thread does.
        let system = |what| move |source| StartError::System { what, source };
        let mut polls = Vec::new();
        let mut wakers = Vec::new();
        for _ in 0..shards {
            let poll = Poll::new().map_err(system("an event queue"))?;
            wakers.push(Waker::new(poll.registry(), WAKER).map_err(system("a waker"))?);
            polls.push(poll);
        }
        let (post, mailboxes) = Post::new(wakers);
        let target = Arc::new(target);
        let superblock = Arc::new(superblock);
        let connections = Arc::new(AtomicUsize::new(0));
        // A shard waits here after recovery until all have recovered; `None` tells it to end.
        let (opened_sender, opened) = crossbeam_channel::unbounded();
        let mut gates = Vec::new();
        let mut threads = Vec::new();
        let mut listener = Some(listener);
        for ((number, poll), mailbox) in (0..).zip(polls).zip(mailboxes) {
            let (gate_sender, gate) = crossbeam_channel::bounded::<LinkSettings>(1);
            gates.push(gate_sender);
            let (post, connections) = (post.clone(), connections.clone());
            let (target, superblock) = (target.clone(), superblock.clone());
            let (engine_config, opened_sender) = (engine_config.clone(), opened_sender.clone());
            let listener = listener.take();
            let spin = Duration::from_micros(config.spin_us);
            let connections_max = config.connections_max as usize;
            let options = DeviceOptions {
                engine: config.io_engine,
                ..DeviceOptions::default()
            };
            let spawn = std::thread::Builder::new().name(format!("kvar-shard-{number}"));
            let guard = StopOnDefect {
                post: post.clone(),
                is_armed: true,
            };
            let body = move || {
                // Bound here, or the closure would capture a copy of the flag and not the guard.
                let mut guard = guard;
                pin(number, shards);
                let open = || -> Result<_, OpenError> {
                    let arena =
                        storage::arena(shard_arena_bytes).map_err(|_| OpenError::NoMemory)?;
                    let (device, io_notes) = open_device(&target, &arena, options)?;
                    let (engine, recovery) = Engine::open(
                        device,
                        arena,
                        &superblock,
                        number,
                        engine_config,
                        clock.now(),
                    )?;
                    Ok((engine, io_notes, recovery))
                };
                let (engine, io_notes, recovery) = match open() {
                    Ok(opened) => opened,
                    Err(error) => {
                        guard.is_armed = false;
                        let _ = opened_sender.send((number, Err(error)));
                        return Ok(ShutdownReport::default());
                    }
                };
                let _ = opened_sender.send((number, Ok(Opened { recovery })));
                drop(opened_sender);
                let Ok(settings) = gate.recv() else {
                    guard.is_armed = false;
                    return Ok(ShutdownReport::default());
                };
                let ended = shard::run(ShardParts {
                    number,
                    poll,
                    mailbox,
                    post,
                    engine,
                    io_notes,
                    arena_bytes: shard_arena_bytes as u64,
                    listener,
                    settings,
                    spin,
                    connections_max,
                    connections,
                    clock,
                });
                guard.is_armed = ended.is_err();
                ended
            };
            threads.push(spawn.spawn(body).map_err(system("a thread"))?);
        }
        drop(opened_sender);
        let mut recovery = vec![None; shards as usize];
        for (number, result) in opened {
            match result {
                Ok(Opened { recovery: found }) => recovery[number as usize] = Some(found),
                Err(source) => {
                    // Closed gates end the shards that did open.
                    drop(gates);
                    threads.into_iter().for_each(|thread| drop(thread.join()));
                    let data = config.data.clone();
                    return Err(StartError::Shard {
                        shard: number,
                        data,
                        source,
                    });
                }
            }
        }
        facts.recovery = recovery
            .iter()
            .flatten()
            .map(|report| serde_json::to_value(report).unwrap_or_default())
            .collect();
        let facts = Arc::new(facts);
        let status = Arc::new(StatusSource {
            facts: facts.clone(),
            ready: AtomicBool::new(false),
            started,
        });
        let settings = LinkSettings {
            limits,
            node: facts.uuid.clone(),
            namespace: NAMESPACE.to_owned(),
            key: key_file.key,
            block_bytes_guess: config.expected_block_bytes.0,
            describe: status.clone(),
        };
        let admin = admin_socket.serve(status.clone(), post.clone());
        let admin = match admin {
            Ok(admin) => admin,
            Err(error) => {
                drop(gates);
                threads.into_iter().for_each(|thread| drop(thread.join()));
                return Err(error.into());
            }
        };
        for gate in gates {
            let _ = gate.send(settings.clone());
        }
        status.ready.store(true, Ordering::Relaxed);
        let handle = NodeHandle {
            listen,
            admin_address,
            key_path: config.key_path(),
            ready_file: config.ready_file.clone(),
            post,
            shards: threads,
            admin: Some(admin),
            facts,
        };
        handle.announce(started)?;
        Ok(handle)
    }
}

impl NodeHandle {
    /// Where clients connect.
    #[must_use]
    pub fn listen_addr(&self) -> SocketAddr {
        self.listen
    }

    /// Where the admin HTTP answers.
    #[must_use]
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin_address
    }

    /// Where the namespace key is.
    #[must_use]
    pub fn key_path(&self) -> &std::path::Path {
        &self.key_path
    }

    /// What does not change while it runs.
    #[must_use]
    pub fn facts(&self) -> &NodeFacts {
        &self.facts
    }

    /// Tells the node to stop; returns at once. Calling it again changes nothing.
    pub fn shutdown(&self) {
        self.stopper().stop();
    }

    /// Something that can tell the node to stop, for a signal handler's thread.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(self.post.clone())
    }

    /// Waits until the node has stopped, by [`shutdown`](Self::shutdown) or by a defect.
    pub fn wait(mut self) -> StopReport {
        self.join()
    }

    fn join(&mut self) -> StopReport {
        let mut stop = StopReport {
            checkpointed: true,
            ..StopReport::default()
        };
        for (number, thread) in self.shards.drain(..).enumerate() {
            match thread.join() {
                Ok(Ok(report)) => {
                    stop.kept_blocks += report.kept_blocks;
                    stop.dropped_blocks += report.dropped_blocks;
                    stop.checkpointed &= report.checkpointed;
                }
                Ok(Err(error)) => stop.defects.push(format!("shard {number}: {error}")),
                Err(panic) => {
                    let text = panic
                        .downcast_ref::<String>()
                        .cloned()
                        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                    let text = text.unwrap_or_else(|| "panicked".to_owned());
                    stop.defects.push(format!("shard {number}: {text}"));
                }
            }
        }
        stop.checkpointed &= stop.defects.is_empty();
        if let Some(path) = self.ready_file.take() {
            // Gone already is as good.
            let _ = std::fs::remove_file(path);
        }
        if let Some(admin) = self.admin.take() {
            admin.stop();
        }
        stop
    }

    /// Logs what an operator wants to see first, and writes the ready file.
    fn announce(&self, started: Instant) -> Result<(), StartError> {
        let facts = &self.facts;
        for note in &facts.notes {
            tracing::warn!("{note}");
        }
        if facts.insecure {
            tracing::warn!(
                listen = %facts.listen,
                "INSECURE: links are not encrypted and may be reached from other machines"
            );
        }
        tracing::info!(
            listen = %facts.listen,
            admin = %facts.admin,
            data = %facts.data,
            uuid = %facts.uuid,
            shards = self.shards.len(),
            memory_bytes_max = facts.memory_bytes_max,
            ready_ms = started.elapsed().as_millis() as u64,
            "serving"
        );
        let Some(path) = &self.ready_file else {
            return Ok(());
        };
        let ready = serde_json::json!({
            "listen": facts.listen,
            "admin": facts.admin,
            "key_file": self.key_path.display().to_string(),
        });
        // Renamed into place, so that whoever waits for the file never reads half of it.
        let mut draft = path.clone().into_os_string();
        draft.push(".draft");
        std::fs::write(&draft, format!("{ready}\n"))
            .and_then(|()| std::fs::rename(&draft, path))
            .map_err(|source| StartError::ReadyFile {
                path: path.clone(),
                source,
            })
    }
}

impl Drop for NodeHandle {
    fn drop(&mut self) {
        if !self.shards.is_empty() {
            self.shutdown();
            self.join();
        }
    }
}

impl std::fmt::Debug for NodeHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeHandle({})", self.listen)
    }
}

/// Tells a node to stop.
#[derive(Clone)]
pub struct Stopper(Post);

impl Stopper {
    /// As [`NodeHandle::shutdown`].
    pub fn stop(&self) {
        self.0.stop_all();
    }
}

/// A shard that ends by a defect must not leave the others waiting for its answers.
struct StopOnDefect {
    post: Post,
    is_armed: bool,
}

impl Drop for StopOnDefect {
    fn drop(&mut self) {
        if self.is_armed {
            tracing::error!("a shard ended by a defect; stopping the node");
            self.post.stop_all();
            (0..self.post.shards()).for_each(|shard| self.post.send(shard, Mail::LinksClosed));
        }
    }
}

/// Puts a shard on a core of its own, if there are several and a core for each; a single shard is
/// better placed by the system. One that refuses costs speed and nothing else.
fn pin(number: u32, shards: u32) {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else {
        return;
    };
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU)
        .filter(|core| allowed.is_set(*core))
        .collect();
    if shards < 2 || cores.len() < shards as usize {
        return;
    }
    let mut one = CpuSet::new();
    one.set(cores[number as usize]);
    let _ = sched_setaffinity(None, &one);
}
