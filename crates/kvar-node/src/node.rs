//! Starting a node, and stopping it.
//!
//! ```text
//!   settings -> storage (devices, key) -> addresses -> threads, keeper, admin ── listen returns
//!            -> connections are accepted, and answered with "loading"
//!            -> every shard is loaded -> ready file ── start returns
//!
//!   shutdown() -> every thread: links closed, memory written, checkpoint -> wait() says how it went
//! ```
//!
//! What must always be true: what can be wrong with settings, data or addresses is said before
//! anything is answered; a start that fails leaves no thread behind; a thread that ends by a defect
//! takes the node down cleanly instead of leaving it half alive; a node that is told to stop while
//! it loads stops.

use crate::admin::{self, Admin, AdminError};
use crate::config::Config;
use crate::devices::{Event, Fatal, Keeper, KeeperParts, Views};
use crate::links::{Describe, LinkSettings, SharingSettings, StagingSettings};
use crate::loading::{LoadFailed, LoadingHook};
use crate::mail::{Mail, Post};
use crate::modes::{ModeError, Modes};
use crate::namespaces::{NamespaceError, Namespaces};
use crate::report::{NodeFacts, NodeReport, ThreadReport};
use crate::storage::{Storage, StorageError};
use crate::thread::{self, ThreadParts};
use crossbeam_channel::{Receiver, Sender};
use kvar_base::{BlockId, Clock as _, SystemClock};
use kvar_engine::ShutdownReport;
use kvar_io::Bell;
use kvar_transport::{BindError, Listener};
use kvar_wire::{Limits, VERSIONS, VersionRange};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Resident memory beside arenas and index: code, stacks, the admin thread, tables of open
/// requests. A fresh node of two shards has 20 MiB resident in all; the rest is room for tables
/// under load and for the allocator's slack.
pub const MEMORY_BASE_BYTES: u64 = 64 << 20;

/// What one open link may hold beside its payload budget, whose bytes lie in the arenas: a message
/// being received, one being parsed, and answers queued.
pub const LINK_BYTES: u64 = 4 << 20;

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings.
    #[error(transparent)]
    Config(#[from] crate::ConfigError),
    /// What it stores in.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Its namespaces.
    #[error(transparent)]
    Namespaces(#[from] NamespaceError),
    /// What was switched.
    #[error(transparent)]
    Modes(#[from] ModeError),
    /// Where it listens.
    #[error(transparent)]
    Listen(#[from] BindError),
    /// Where its admin HTTP listens.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// Recovery.
    #[error("shard {shard} of {}: {why}", data.display())]
    Shard {
        /// Which.
        shard: u32,
        /// The data file or block device.
        data: PathBuf,
        /// Why, and what to do.
        why: String,
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
    /// Threads that ended by a defect, and what they said.
    pub defects: Vec<String>,
}

/// Starts nodes.
#[derive(Debug)]
pub struct Node;

/// Tells the seconds since 1970; called about once a second, on a thread of the node's.
pub type WallClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Hears which block moves, and whether it is about to be committed.
pub type MovingHook = Arc<dyn Fn(BlockId, bool) + Send + Sync>;

/// Runs what it is given, once: one turn of a thread, and its sleep.
pub type AroundHook = Arc<dyn Fn(&mut dyn FnMut()) + Send + Sync>;

/// What a caller may watch or slow down; for tests and tools.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Called by loaders before every read: shard and bytes read so far.
    pub loading: Option<LoadingHook>,
    /// Called on the keeper's thread before a block that moves from a device that leaves is put where
    /// it goes, and before what was put is committed.
    pub moving: Option<MovingHook>,
    /// Seconds since 1970, asked instead of the machine's clock for times to live.
    pub wall_clock: Option<WallClock>,
    /// Called around every turn of every shard's thread, on that thread, to count what it costs.
    pub around: Option<AroundHook>,
    /// Versions of the protocol that it speaks alone: to be met as an older build would be.
    pub versions: Option<VersionRange>,
}

/// How the loading of what was stored ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Everything that is there is served.
    Ready,
    /// The node was told to stop before.
    Stopped,
}

/// A running node. Dropping it stops the node and waits.
pub struct NodeHandle {
    listen: SocketAddr,
    admin_address: SocketAddr,
    key_path: PathBuf,
    ready_file: Option<PathBuf>,
    post: Post,
    keeper: Sender<Event>,
    keeper_thread: Option<JoinHandle<()>>,
    threads: Vec<JoinHandle<std::io::Result<ShutdownReport>>>,
    admin: Option<Admin>,
    facts: Arc<NodeFacts>,
    status: Arc<StatusSource>,
    loaded: Receiver<Result<(), Fatal>>,
    started: Instant,
}

/// What both doors to the status need.
pub(crate) struct StatusSource {
    pub(crate) facts: Arc<NodeFacts>,
    pub(crate) views: Arc<Views>,
    modes: Arc<Modes>,
    threads: u32,
    started: Instant,
}

/// The wall clock in seconds with its fraction; `flushed_through` is finer than a second.
fn unix_seconds() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

impl Describe for StatusSource {
    fn json(&self, reports: Vec<ThreadReport>) -> String {
        self.report(reports).to_json()
    }
}

impl StatusSource {
    pub(crate) fn report(&self, reports: Vec<ThreadReport>) -> NodeReport<'_> {
        NodeReport::new(
            &self.facts,
            &self.views.latest(),
            &self.modes,
            self.threads,
            reports,
            self.started.elapsed().as_secs(),
            unix_seconds(),
        )
    }
}

impl Node {
    /// Opens storage, listens, loads what is stored, and returns when the node serves.
    ///
    /// # Errors
    /// Why it cannot, and what to do.
    pub fn start(config: &Config) -> Result<NodeHandle, StartError> {
        let node = Self::listen(config, Hooks::default())?;
        node.loaded()?;
        Ok(node)
    }

    /// As [`start`](Self::start), and returns as soon as the node answers: what it stored before is
    /// still being loaded, and [`NodeHandle::loaded`] waits for that.
    ///
    /// # Errors
    /// As [`start`](Self::start), but for what loading finds.
    pub fn listen(config: &Config, hooks: Hooks) -> Result<NodeHandle, StartError> {
        config.validate()?;
        let started = Instant::now();
        let clock = SystemClock::default();
        let mut storage = Storage::open(config, &clock)?;
        let namespaces = Arc::new(Namespaces::open(config, &storage.key_file)?);
        let modes = Modes::open(config.beside_key("modes"), config.mode, namespaces.clone())?;
        let modes = Arc::new(modes);
        let listener = Listener::bind(config.listen)?;
        let admin_socket = admin::bind(config.admin)?;
        let (listen, admin_address) = (listener.local_addr(), admin_socket.address);

        // One thread for each shard of the device that has most.
        let superblocks = || storage.devices.iter().map(|device| &device.superblock);
        let threads = superblocks().map(|it| it.shards).max().unwrap_or(1);
        let block_bytes_max = superblocks().map(|it| it.block_bytes_max()).min();
        let block_bytes_max = block_bytes_max.unwrap_or(0);
        let first = &storage.devices[0];
        let facts = Arc::new(NodeFacts {
            version: env!("CARGO_PKG_VERSION"),
            uuid: storage.key_file.uuid.to_string(),
            epoch: NodeFacts::EPOCH.0,
            listen: listen.to_string(),
            admin: admin_address.to_string(),
            insecure: config.insecure,
            data: first.path.display().to_string(),
            device_bytes: superblocks().map(|it| it.device_bytes).sum(),
            segment_bytes: first.superblock.segment_bytes,
            block_bytes_max,
            format_version: first.superblock.format_version,
            dram_bytes: config.dram.0,
            link_bytes_max: LINK_BYTES,
            flash_endurance: config.flash_endurance,
            notes: std::mem::take(&mut storage.notes),
        });
        let block_bytes_max = u32::try_from(block_bytes_max).unwrap_or(u32::MAX);
        let limits = Limits {
            block_bytes_max,
            eager_bytes_max: kvar_wire::EAGER_BYTES_MAX.min(block_bytes_max),
            requests_max: config.link_requests,
            bytes_max: config.link_budget.0,
        };

        // Every thread's mailbox exists before the first thread does.
        let system = |what| move |source| StartError::System { what, source };
        let bells: std::io::Result<_> = (0..threads).map(|_| Bell::new()).collect();
        let (post, mailboxes) = Post::new(bells.map_err(system("a waker"))?);
        let views = Arc::new(Views::default());
        let status = Arc::new(StatusSource {
            facts: facts.clone(),
            views: views.clone(),
            modes: modes.clone(),
            threads,
            started,
        });
        let key = storage.key_file.key.clone();
        let settings = LinkSettings {
            limits,
            node: facts.uuid.clone(),
            namespaces: namespaces.clone(),
            modes: modes.clone(),
            block_bytes_guess: config.expected_block_bytes.0,
            sharing: SharingSettings {
                with: config.shared_memory,
                ring_bytes: kvar_transport::shared::ring_bytes(config.shared_memory_link.0),
                links_max: config.shared_memory_links as usize,
                links: Arc::new(AtomicUsize::new(0)),
            },
            staging: StagingSettings::new(config.shared_memory_staging.0),
            versions: hooks.versions.unwrap_or(VERSIONS),
            describe: status.clone(),
        };
        let (keeper_sender, events) = crossbeam_channel::unbounded();
        let (started_sender, loaded) = crossbeam_channel::bounded(1);
        let parts = KeeperParts {
            config: config.clone(),
            shares: namespaces.shares(),
            storage,
            post: post.clone(),
            views,
            clock,
            hook: hooks.loading,
            moving: hooks.moving,
            wall_clock: hooks
                .wall_clock
                .unwrap_or_else(|| Arc::new(move || clock.unix_seconds())),
            block_bytes_max: facts.block_bytes_max,
            started: started_sender,
        };
        let keeper = Keeper::new(parts, keeper_sender.clone(), events);
        // From here on whatever fails ends what has begun: the handle stops its threads.
        let mut handle = NodeHandle {
            listen,
            admin_address,
            key_path: config.key_path(),
            ready_file: config.ready_file.clone(),
            post: post.clone(),
            keeper: keeper_sender.clone(),
            keeper_thread: None,
            threads: Vec::new(),
            admin: None,
            facts,
            status: status.clone(),
            loaded,
            started,
        };
        let spawn = std::thread::Builder::new().name("kvar-keeper".to_owned());
        let keeper = spawn.spawn(move || keeper.run());
        handle.keeper_thread = Some(keeper.map_err(system("a thread"))?);
        let connections = Arc::new(AtomicUsize::new(0));
        let mut listener = Some(listener);
        for (number, mailbox) in (0..).zip(mailboxes) {
            let parts = ThreadParts {
                number,
                io_engine: config.io_engine,
                around: hooks.around.clone(),
                mailbox,
                post: post.clone(),
                keeper: keeper_sender.clone(),
                listener: listener.take(),
                settings: settings.clone(),
                spin: Duration::from_micros(config.spin_us),
                connections_max: config.connections_max as usize,
                connections: connections.clone(),
                clock,
            };
            let guard = StopOnDefect {
                stopper: handle.stopper(),
                is_armed: true,
            };
            let body = move || {
                // Bound here, or the closure would capture a copy of the flag and not the guard.
                let mut guard = guard;
                pin(number, threads);
                let ended = thread::run(parts);
                guard.is_armed = ended.is_err();
                ended
            };
            let spawn = std::thread::Builder::new().name(format!("kvar-shard-{number}"));
            handle
                .threads
                .push(spawn.spawn(body).map_err(system("a thread"))?);
        }
        let door = admin::Door {
            status,
            post,
            keeper: keeper_sender,
            modes,
            key,
        };
        handle.admin = Some(admin_socket.serve(door)?);
        handle.announce();
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
        Stopper {
            post: self.post.clone(),
            keeper: self.keeper.clone(),
        }
    }

    /// Waits until everything that is stored is loaded, and writes the ready file.
    ///
    /// # Errors
    /// What is wrong with the data; the node is stopping then.
    pub fn loaded(&self) -> Result<Readiness, StartError> {
        match self.loaded.recv() {
            Ok(Ok(())) => {
                self.write_ready_file()?;
                let view = self.status.views.latest();
                tracing::info!(
                    shards = view.shards_loaded,
                    ready_ms = self.started.elapsed().as_millis() as u64,
                    "serving"
                );
                Ok(Readiness::Ready)
            }
            // The keeper is gone: the node stops.
            Err(_) => Ok(Readiness::Stopped),
            Ok(Err(fatal)) => {
                self.shutdown();
                let Fatal {
                    shard,
                    path,
                    failure,
                } = fatal;
                if matches!(failure, LoadFailed::Cancelled) {
                    return Ok(Readiness::Stopped);
                }
                Err(StartError::Shard {
                    shard,
                    data: path,
                    why: failure.to_string(),
                })
            }
        }
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
        for (number, thread) in self.threads.drain(..).enumerate() {
            match thread.join() {
                Ok(Ok(report)) => {
                    stop.kept_blocks += report.kept_blocks;
                    stop.dropped_blocks += report.dropped_blocks;
                    stop.checkpointed &= report.checkpointed;
                }
                Ok(Err(error)) => stop.defects.push(format!("thread {number}: {error}")),
                Err(panic) => {
                    let text = panic
                        .downcast_ref::<String>()
                        .cloned()
                        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                    let text = text.unwrap_or_else(|| "panicked".to_owned());
                    stop.defects.push(format!("thread {number}: {text}"));
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
        if let Some(keeper) = self.keeper_thread.take() {
            let _ = self.keeper.send(Event::Stop);
            let _ = keeper.join();
        }
        stop
    }

    /// Logs what an operator wants to see first.
    fn announce(&self) {
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
            threads = self.threads.len(),
            "listening; loading what is stored"
        );
    }

    fn write_ready_file(&self) -> Result<(), StartError> {
        let facts = &self.facts;
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
        if !self.threads.is_empty() || self.keeper_thread.is_some() {
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
pub struct Stopper {
    post: Post,
    keeper: Sender<Event>,
}

impl Stopper {
    /// As [`NodeHandle::shutdown`].
    pub fn stop(&self) {
        // The keeper first: it says that the node is stopping.
        let _ = self.keeper.send(Event::Stop);
        self.post.stop_all();
    }
}

/// A thread that ends by a defect must not leave the others waiting for its answers.
struct StopOnDefect {
    stopper: Stopper,
    is_armed: bool,
}

impl Drop for StopOnDefect {
    fn drop(&mut self) {
        if self.is_armed {
            tracing::error!("a thread ended by a defect; stopping the node");
            self.stopper.stop();
            self.stopper.post.send_all(|| Mail::LinksClosed);
        }
    }
}

/// Puts a thread on a core of its own, if there are several and a core for each; a single one is
/// better placed by the system. One that refuses costs speed and nothing else.
fn pin(number: u32, threads: u32) {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else {
        return;
    };
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU)
        .filter(|core| allowed.is_set(*core))
        .collect();
    if threads < 2 || cores.len() < threads as usize {
        return;
    }
    let mut one = CpuSet::new();
    one.set(cores[number as usize]);
    let _ = sched_setaffinity(None, &one);
}
