//! Reading a shard back while its thread serves links already.
//!
//! ```text
//!   thread:  Open ── arena, its own device ── answers "loading" ────── Loaded ── drives the engine
//!                      └─ loader: another device over the same storage ──┘
//!                         checkpoint, records; tells its progress; can be cancelled
//! ```
//!
//! What must always be true: a start that is told to stop while it loads ends soon: a cancelled
//! load fails every further read at once, and nothing it made is used.
//!
//! What is absent: what is answered meanwhile (`owner`), and recovery itself (kvar-engine).

use crate::devices::{Event, Sign, Watch, WatchedDevice, is_hard};
use crate::mail::{EngineKey, Mail, Post};
use crossbeam_channel::Sender;
use kvar_engine::{Engine, EngineConfig, Loaded, OpenError, Superblock, arena_bytes};
use kvar_io::{
    Arena, Completion, Device, DeviceError, DeviceOptions, IoEngine, Op, Reactor, Target,
    open_device,
};
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Memory the loader's device registers; what it reads lies in the shard's own arena.
const LOADER_ARENA_BYTES: usize = 64 << 10;

/// Called by a loader before every read with the shard's number on its device and the bytes read so
/// far: a test makes a slow disk of it.
pub type LoadingHook = Arc<dyn Fn(u32, u64) + Send + Sync>;

/// How far a load is.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    bytes: AtomicU64,
    is_cancelled: AtomicBool,
}

impl Progress {
    /// Bytes read so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The load is of no use any more.
    pub(crate) fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }
}

/// Why a shard was not loaded.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum LoadFailed {
    /// The device, or what is on it.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its memory.
    #[error("cannot reserve {bytes} bytes of memory ({text}); give a smaller dram")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// The system's words.
        text: String,
    },
    /// The system refuses.
    #[error("the system refuses {0}")]
    System(String),
    /// Nobody wants it any more.
    #[error("stopped while it was loading")]
    Cancelled,
    /// A defect of ours.
    #[error("a defect in recovery: {0}")]
    Defect(String),
}

/// A shard of a device, for the thread that will have it.
pub(crate) struct OpenShard {
    pub(crate) key: EngineKey,
    /// Its device's number in this process.
    pub(crate) device: u32,
    /// Its number on the device.
    pub(crate) number: u32,
    pub(crate) target: Arc<Target>,
    pub(crate) superblock: Arc<Superblock>,
    pub(crate) config: EngineConfig,
    pub(crate) io_engine: IoEngine,
    /// Whether its memory is taken from the system once it is loaded.
    pub(crate) prefault: bool,
    pub(crate) progress: Arc<Progress>,
    pub(crate) watch: Arc<Watch>,
    pub(crate) keeper: Sender<Event>,
    pub(crate) hook: Option<LoadingHook>,
}

/// What the thread holds meanwhile.
pub(crate) struct Opened {
    pub(crate) device: Box<dyn Device>,
    pub(crate) io_engine: &'static str,
    pub(crate) io_notes: Vec<String>,
    pub(crate) arena_bytes: u64,
}

impl OpenShard {
    /// Opens the thread's own device and starts the loader, which will send [`Mail::Loaded`].
    pub(crate) fn begin(self, post: &Post, reactor: &Reactor) -> Result<Opened, LoadFailed> {
        let bytes = arena_bytes(&self.config, &self.superblock);
        let arena = Arena::new(bytes).map_err(|error| LoadFailed::Memory {
            bytes,
            text: error.to_string(),
        })?;
        let options = DeviceOptions {
            engine: self.io_engine,
            ..DeviceOptions::default()
        };
        let (device, io_notes) = reactor
            .open_device(&self.target, &arena, options)
            .map_err(OpenError::Device)?;
        let io_engine = device.engine();
        let (number, key, keeper) = (self.device, self.key, self.keeper.clone());
        let on_sign = Box::new(move |sign: Sign<'_>| {
            let event = match sign {
                Sign::Failed(kind, error) => Event::Failed {
                    device: number,
                    kind,
                    is_hard: is_hard(error),
                    text: error.to_string(),
                },
                Sign::WritesAgain => Event::WritesAgain { device: number },
                Sign::StreamRefused => Event::StreamRefused { device: number },
            };
            // A keeper that is gone takes no decisions any more.
            let _ = keeper.send(event);
        });
        let streams = self.target.write_streams();
        let device = WatchedDevice::new(device, streams, self.watch.clone(), on_sign);
        let device = Box::new(device);
        let post = post.clone();
        let name = format!("kvar-load-{}-{}", self.device, self.number);
        let spawn = std::thread::Builder::new().name(name);
        let memory = self.prefault.then(|| arena.watch());
        let body = move || {
            let result = catch_unwind(AssertUnwindSafe(|| self.load(arena)));
            let result = result.unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.unwrap_or_else(|| "panicked".to_owned());
                Err(LoadFailed::Defect(text))
            });
            post.send(key.thread, Mail::Loaded(key, result.map(Box::new)));
            if let Some(memory) = memory {
                // Not at a lower priority: it holds the lock of the process's memory meanwhile, and
                // on a busy machine whoever serves would wait for a thread that never runs.
                if let Err(error) = memory.prefault() {
                    tracing::warn!(
                        %error,
                        "memory for blocks is not taken at start but by the first puts, which are \
                         slower: is dram more than this machine has?"
                    );
                }
            }
        };
        spawn
            .spawn(body)
            .map_err(|error| LoadFailed::System(format!("a thread: {error}")))?;
        Ok(Opened {
            device,
            io_engine,
            io_notes,
            arena_bytes: bytes as u64,
        })
    }

    fn load(self, arena: Arena) -> Result<Loaded, LoadFailed> {
        let own = Arena::new(LOADER_ARENA_BYTES).map_err(|error| LoadFailed::Memory {
            bytes: LOADER_ARENA_BYTES,
            text: error.to_string(),
        })?;
        let options = DeviceOptions {
            engine: self.io_engine,
            ..DeviceOptions::default()
        };
        let (inner, _) = open_device(&self.target, &own, options).map_err(OpenError::Device)?;
        let mut device = LoadingDevice {
            inner,
            shard: self.number,
            progress: self.progress.clone(),
            hook: self.hook,
            refused: Vec::new(),
        };
        let loaded = Engine::recover(
            &mut device,
            arena,
            &self.superblock,
            self.number,
            self.config,
        );
        // Also what came out well: a read that was refused looks like a damaged page to recovery.
        if self.progress.is_cancelled() {
            return Err(LoadFailed::Cancelled);
        }
        Ok(loaded?)
    }
}

/// A device that counts what is read and can be cancelled.
struct LoadingDevice {
    inner: Box<dyn Device>,
    shard: u32,
    progress: Arc<Progress>,
    hook: Option<LoadingHook>,
    refused: Vec<Completion>,
}

impl Device for LoadingDevice {
    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }

    fn submit(&mut self, token: u64, op: Op) {
        if let Some(hook) = &self.hook {
            hook(self.shard, self.progress.bytes());
        }
        if self.progress.is_cancelled() {
            let result = Err(DeviceError::Io {
                code: None,
                message: "the load was cancelled".to_owned(),
            });
            self.refused.push(Completion { token, op, result });
            return;
        }
        if let Op::Read { buffer, .. } = &op {
            let bytes = buffer.padded_len() as u64;
            self.progress.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        self.inner.submit(token, op);
    }

    fn kick(&mut self) -> Result<(), DeviceError> {
        self.inner.kick()
    }

    fn poll(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.refused);
        self.inner.poll(out);
    }

    fn wait(&mut self, timeout: Duration) {
        if self.refused.is_empty() {
            self.inner.wait(timeout);
        }
    }

    fn readiness(&self) -> Option<RawFd> {
        self.inner.readiness()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.refused.len()
    }

    fn engine(&self) -> &'static str {
        self.inner.engine()
    }

    fn system_calls(&self) -> u64 {
        self.inner.system_calls()
    }
}
