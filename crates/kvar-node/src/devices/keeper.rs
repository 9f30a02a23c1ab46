//! The thread that decides about devices.
//!
//! ```text
//!   loaded, failed, closed ──┐                          ┌── Open, Close, Routes ──> threads
//!   a remove while one is away├──> Keeper: table, lives ─┼── table on disk
//!   add, retire, replace ─────┘     (one at a time)      └── view ──> status, metrics
//! ```
//!
//! Coming in: known and written to the table, then formatted (a new one), then loaded, then emptied
//! (a stale one), then routed to. Going out: routed around, then closed, so that nobody is sent to
//! an engine that is not there. Every change of the routes has a number; a remove that began under
//! another number than it ends under is not acknowledged.
//!
//! What must always be true: the last device in service is never taken out: its DRAM still serves,
//! and there is no other place for a block; the data path never waits for this thread, except
//! a remove while a device is away, which waits until that is noted on disk.
//!
//! | file | question |
//! |---|---|
//! | `going` | when and how does a device go? |
//! | `asked` | what if an operator wants something? |
//! | `leaving`, `moves` | how do the blocks of a device that is retired get to the others? |
//! | `told` | what do threads and people hear? |
//!
//! What is absent: when a device counts as lost (`watch`), who owns which block (`routes`), how an
//! engine is opened and closed (`loading`, `owner`).

mod asked;
mod going;
mod leaving;
mod moves;
#[cfg(test)]
mod tests;
mod told;

use super::memory::Division;
use super::removal::Removed;
use super::routes::Routes;
use super::surveyor::Said;
use super::table::DeviceTable;
use super::view::{DeviceView, Phase, Views};
use super::watch::{Kind, Run, Watch};
use crate::config::{Config, DRAM_BYTES_MIN, DeviceTier, WriteRate};
use crate::loading::{LoadFailed, LoadingHook, OpenShard, Progress};
use crate::mail::{Answer, Ask, EngineKey, KEEPER, Mail, Origin, Post};
use crate::node::{MovingHook, WallClock};
use crate::storage::{OpenDevice, Storage};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use kvar_base::{Clock as _, DeviceUuid, Moment, SystemClock};
use kvar_engine::{EngineConfig, Shares, Superblock, WriteRates, memory_bytes};
use kvar_io::Target;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use leaving::{Leaving, MOVES_FROM};

/// Bytes of a write limit that each shard may save up at least: a few of the largest blocks.
const LIMIT_BURST_BYTES_MIN: u64 = 64 << 20;

/// Between the two probes that find a device dead: a controller that is reset takes some hundred
/// milliseconds.
const PROBE_AGAIN: Duration = Duration::from_millis(500);

/// How often the keeper looks whether the machine's clock was set. Nobody else wakes up for it.
const WALL_CLOCK_EVERY: Duration = Duration::from_secs(1);

/// A difference of so many seconds is a clock that was set; one less may be two roundings.
const CLOCK_SET_S: u64 = 2;

/// Rounded to the past: a clock that ran ahead, and did not after a restart, would serve again what
/// had expired.
fn unix_at_start(wall_clock: &WallClock, now: Moment) -> u64 {
    wall_clock().saturating_sub(now.0.div_ceil(1_000_000))
}

/// What an operator asks for. A device is named by slot, uuid or path.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewDevice {
    pub(crate) path: PathBuf,
    #[serde(default)]
    pub(crate) size: Option<u64>,
    /// Take it even if it holds data of another store.
    #[serde(default)]
    pub(crate) erase: bool,
    /// What it is for; not said: what it was, and fast for a new one. A replacement is what the device
    /// before it was.
    #[serde(default)]
    pub(crate) tier: Option<DeviceTier>,
}

/// What an operator asks for.
#[derive(Clone, Debug)]
pub(crate) enum Command {
    Add(NewDevice),
    /// Its blocks move to the others first, at so many bytes a second; or it goes now.
    Retire {
        device: String,
        now: bool,
        rate: Option<u64>,
    },
    Replace {
        device: String,
        new: NewDevice,
    },
}

/// What is to be remembered of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Note {
    /// Blocks are removed while a device is away.
    Removal,
}

/// Tells an operator how it went: the device's view, or why not.
pub(crate) type Reply = tokio::sync::oneshot::Sender<Result<DeviceView, String>>;

/// What the keeper is told.
pub(crate) enum Event {
    /// An engine is loaded, or cannot be.
    Loaded(EngineKey, Result<(), LoadFailed>),
    /// An operation failed; hard: not for want of space.
    Failed {
        device: u32,
        kind: Kind,
        is_hard: bool,
        text: String,
    },
    /// Writes go well again after one was refused.
    WritesAgain { device: u32 },
    /// A device took a write only without its stream; each of its shards says so once.
    StreamRefused { device: u32 },
    /// A device that was doubted answers, or does not.
    Probed { device: u32, alive: bool },
    /// An engine is gone.
    Closed(EngineKey),
    /// The answer to an ask of the keeper's own.
    Answered(u64, Answer),
    /// What a device that leaves names.
    Surveyed {
        device: u32,
        survey: u64,
        said: Said,
    },
    /// Blocks are about to be removed, under a number of this removal's own.
    RemovalBegins(u64, Removed),
    /// It is over, or given up.
    RemovalEnds(u64),
    /// A request waits until this is remembered.
    Note(Origin, Note),
    /// An operator asks.
    Command(Command, Reply),
    /// The node stops.
    Stop,
}

/// Why the node cannot go on.
pub(crate) struct Fatal {
    pub(crate) shard: u32,
    pub(crate) path: PathBuf,
    pub(crate) failure: LoadFailed,
}

/// What the keeper is given.
pub(crate) struct KeeperParts {
    pub(crate) config: Config,
    /// What each namespace weighs.
    pub(crate) shares: Shares,
    pub(crate) storage: Storage,
    pub(crate) post: Post,
    pub(crate) views: Arc<Views>,
    pub(crate) clock: SystemClock,
    pub(crate) hook: Option<LoadingHook>,
    pub(crate) moving: Option<MovingHook>,
    pub(crate) wall_clock: WallClock,
    pub(crate) block_bytes_max: u64,
    /// Told once: all is loaded, or the node cannot go on.
    pub(crate) started: Sender<Result<(), Fatal>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// So many engines are being loaded.
    Loading(usize),
    /// So many engines are being emptied.
    Emptying(usize),
    Online,
    /// Out; so many engines are still to go.
    Closing(usize),
}

/// A device that is open.
struct Live {
    number: u32,
    uuid: DeviceUuid,
    path: PathBuf,
    target: Arc<Target>,
    superblock: Arc<Superblock>,
    engines: Vec<EngineKey>,
    watches: Vec<Arc<Watch>>,
    stage: Stage,
    is_routed: bool,
    memory_bytes: u64,
    runs: [Run; 2],
    is_probed: bool,
    /// Whether its writes fail at the moment.
    is_refusing: bool,
    /// Whether it was told that it takes no write streams.
    is_stream_refused: bool,
    /// Whether it would be out of service if it were not the last.
    is_hopeless: bool,
    /// Why it is of little use, though it is the last one.
    trouble: Option<String>,
    /// Who waits for it to come in or to go.
    reply: Option<Reply>,
    /// The device whose place it takes once it is loaded.
    replaces: Option<DeviceUuid>,
    /// When it began to serve.
    online_since: Option<Moment>,
    /// Its blocks move to the others.
    leaving: Option<Box<Leaving>>,
}

/// See the module.
pub(crate) struct Keeper {
    config: Config,
    shares: Shares,
    table: DeviceTable,
    /// Whether a mark in the table is not on disk yet.
    is_unsaved: bool,
    post: Post,
    views: Arc<Views>,
    clock: SystemClock,
    hook: Option<LoadingHook>,
    moving: Option<MovingHook>,
    wall_clock: WallClock,
    /// When the wall clock is looked at next.
    clock_due: Moment,
    block_bytes_max: u64,
    started: Option<Sender<Result<(), Fatal>>>,
    sender: Sender<Event>,
    receiver: Receiver<Event>,
    lives: Vec<Live>,
    /// Why devices of the store are not online: state and words.
    away: BTreeMap<String, (&'static str, String)>,
    latest: Arc<AtomicU64>,
    /// Who owns what once the devices that leave are gone; only while some are.
    afterwards: Option<Arc<Routes>>,
    /// What is being removed.
    removals: HashMap<u64, Removed>,
    next_move: u64,
    next_survey: u64,
    next_serial: u32,
    next_device: u32,
    /// Who has how much memory.
    division: Division,
    /// Seconds since 1970 at the clock's zero.
    unix_at_start_s: u64,
}

impl Keeper {
    /// Takes the devices over, hands their shards to the threads and says who owns what. Mail lies
    /// ready before the threads run.
    pub(crate) fn new(
        parts: KeeperParts,
        sender: Sender<Event>,
        receiver: Receiver<Event>,
    ) -> Self {
        let Storage {
            devices,
            away,
            table,
            ..
        } = parts.storage;
        let tier_of = |it: &OpenDevice| {
            let entry = table.find(it.superblock.uuid);
            entry.map_or(DeviceTier::Fast, |entry| entry.tier)
        };
        let sizes = devices.iter();
        let sizes: Vec<_> = sizes
            .map(|it| (tier_of(it), it.superblock.device_bytes))
            .collect();
        let away = away.into_iter();
        let mut keeper = Self {
            division: Division::new(parts.config.dram.0, &sizes),
            unix_at_start_s: unix_at_start(&parts.wall_clock, parts.clock.now()),
            clock_due: parts.clock.now().after(WALL_CLOCK_EVERY),
            wall_clock: parts.wall_clock,
            config: parts.config,
            shares: parts.shares,
            table,
            is_unsaved: false,
            post: parts.post,
            views: parts.views,
            clock: parts.clock,
            hook: parts.hook,
            moving: parts.moving,
            block_bytes_max: parts.block_bytes_max,
            started: Some(parts.started),
            sender,
            receiver,
            lives: Vec::new(),
            away: away
                .map(|device| (device.uuid.to_string(), ("missing", device.reason)))
                .collect(),
            latest: Arc::default(),
            afterwards: None,
            removals: HashMap::new(),
            next_move: MOVES_FROM,
            next_survey: 1,
            next_serial: 0,
            next_device: 0,
        };
        let only = devices.len() == 1;
        for device in devices {
            let is_stale = keeper.is_stale(device.superblock.uuid);
            let live = keeper.open(device, only);
            // Its blocks are Miss(loading) meanwhile; one that must be emptied first is not asked.
            live.is_routed = !is_stale;
        }
        keeper.publish();
        keeper
    }

    /// Runs until the node stops.
    pub(crate) fn run(mut self) {
        loop {
            let now = self.clock.now();
            if now >= self.clock_due {
                self.clock_due = now.after(WALL_CLOCK_EVERY);
                self.mind_the_clock(now);
                if self.lives.iter().any(|it| it.leaving.is_some()) {
                    self.publish_view();
                }
            }
            let due = self.move_blocks(now).min(self.clock_due);
            let event = match self.receiver.recv_timeout(due.since(self.clock.now())) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if matches!(event, Event::Stop) {
                self.views.change(|view| view.phase = Phase::Stopping);
                return;
            }
            self.on_event(event);
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Loaded(key, result) => self.on_loaded(key, result),
            Event::Failed {
                device,
                kind,
                is_hard,
                text,
            } => self.on_failed(device, kind, is_hard, &text),
            Event::WritesAgain { device } => self.on_writes_again(device),
            Event::StreamRefused { device } => self.on_stream_refused(device),
            Event::Probed { device, alive } => self.on_probed(device, alive),
            Event::Closed(key) => self.on_closed(key),
            Event::Answered(number, answer) if number >= MOVES_FROM => {
                self.on_moved(number, answer);
            }
            Event::Answered(number, answer) => self.on_answered(number, &answer),
            Event::Surveyed {
                device,
                survey,
                said,
            } => self.on_surveyed(device, survey, said),
            Event::RemovalBegins(number, removed) => self.removal_begins(number, removed),
            Event::RemovalEnds(number) => self.removal_ends(number),
            Event::Note(origin, Note::Removal) => self.note_removal(origin),
            Event::Command(command, reply) => self.on_command(command, reply),
            // The loop ends at it.
            Event::Stop => {}
        }
    }

    /// Somebody sets the machine's clock, or a machine starts without one and learns the time later:
    /// times to live are kept in wall time, so every engine must hear of it.
    fn mind_the_clock(&mut self, now: Moment) {
        let unix_at_start_s = unix_at_start(&self.wall_clock, now);
        if unix_at_start_s.abs_diff(self.unix_at_start_s) < CLOCK_SET_S {
            return;
        }
        tracing::warn!(
            before = self.unix_at_start_s,
            after = unix_at_start_s,
            "the machine's clock was set; times to live follow it"
        );
        self.unix_at_start_s = unix_at_start_s;
        self.post.send_all(|| Mail::ClockSet { unix_at_start_s });
    }

    // ---- coming in --------------------------------------------------------------------------

    fn open(&mut self, device: OpenDevice, only: bool) -> &mut Live {
        let OpenDevice {
            path,
            target,
            superblock,
        } = device;
        let number = self.next_device;
        self.next_device += 1;
        let shards = u64::from(superblock.shards);
        let dram_bytes = if only {
            self.config.dram.0 / shards
        } else {
            let entry = self.table.find(superblock.uuid);
            let tier = entry.map_or(DeviceTier::Fast, |entry| entry.tier);
            let share = self.division.of(tier, superblock.device_bytes);
            (share / shards).max(DRAM_BYTES_MIN)
        };
        let each = |rate: WriteRate| {
            let bytes = rate.bytes_per_day(superblock.device_bytes);
            bytes.map(|bytes| bytes / shards)
        };
        let limit = each(self.config.flash_write_limit);
        let writes = WriteRates {
            budget_bytes_per_day: each(self.config.flash_write_budget),
            budget_burst_bytes: superblock.device_bytes / shards,
            limit_bytes_per_day: limit,
            limit_burst_bytes: limit.map_or(0, |limit| (limit / 24).max(LIMIT_BURST_BYTES_MIN)),
        };
        let config = EngineConfig {
            dram_bytes,
            writes,
            flush_after: self.config.flush_after,
            shutdown_flush: self.config.shutdown_flush,
            unix_at_start_s: self.unix_at_start_s,
            scrub_bytes_per_s: self.config.scrub.0,
            discard: self.config.discard,
            handover_wait: self.config.handover_wait,
            shares: self.shares.clone(),
        };
        let one = memory_bytes(&config, &superblock);
        let (mut engines, mut watches) = (Vec::new(), Vec::new());
        for shard in 0..superblock.shards {
            let key = EngineKey {
                thread: shard % self.post.threads(),
                serial: self.next_serial,
            };
            self.next_serial += 1;
            let watch = Arc::new(Watch::default());
            engines.push(key);
            watches.push(watch.clone());
            let open = OpenShard {
                key,
                device: number,
                number: shard,
                target: target.clone(),
                superblock: superblock.clone(),
                config: config.clone(),
                io_engine: self.config.io_engine,
                progress: Arc::new(Progress::default()),
                watch,
                keeper: self.sender.clone(),
                hook: self.hook.clone(),
            };
            self.post.send(key.thread, Mail::Open(Box::new(open)));
        }
        self.away.remove(&superblock.uuid.to_string());
        self.lives.push(Live {
            number,
            uuid: superblock.uuid,
            path,
            target,
            stage: Stage::Loading(engines.len()),
            memory_bytes: shards * one,
            superblock,
            engines,
            watches,
            is_routed: false,
            runs: [Run::default(); 2],
            is_probed: false,
            is_refusing: false,
            is_stream_refused: false,
            is_hopeless: false,
            trouble: None,
            reply: None,
            replaces: None,
            online_since: None,
            leaving: None,
        });
        let last = self.lives.len() - 1;
        &mut self.lives[last]
    }

    fn on_loaded(&mut self, key: EngineKey, result: Result<(), LoadFailed>) {
        let Some(at) = self.position(key) else { return };
        let Stage::Loading(left) = self.lives[at].stage else {
            return;
        };
        if let Err(failure) = result {
            return self.on_load_failed(at, key, failure);
        }
        self.lives[at].stage = Stage::Loading(left - 1);
        if left > 1 {
            return self.publish_view();
        }
        if !self.is_stale(self.lives[at].uuid) {
            return self.come_online(at);
        }
        let live = &mut self.lives[at];
        tracing::warn!(
            uuid = %live.uuid,
            path = %live.path.display(),
            "blocks were removed while this device was away: it begins empty"
        );
        live.stage = Stage::Emptying(live.engines.len());
        for engine in &live.engines {
            let origin = Origin {
                thread: KEEPER,
                operation: u64::from(live.number),
            };
            self.post
                .send(engine.thread, Mail::Ask(origin, *engine, Ask::Purge(None)));
        }
    }

    fn on_answered(&mut self, number: u64, answer: &Answer) {
        let found = self
            .lives
            .iter()
            .position(|it| u64::from(it.number) == number);
        let Some(at) = found else { return };
        let Stage::Emptying(left) = self.lives[at].stage else {
            return self.on_flushed(at);
        };
        match answer {
            Answer::Done(Ok(_)) => {}
            Answer::Done(Err(text)) => {
                let text = format!("it cannot be emptied: {text}");
                return self.take_out(at, "failed", &text);
            }
            _ => return,
        }
        self.lives[at].stage = Stage::Emptying(left - 1);
        if left > 1 {
            return;
        }
        let uuid = self.lives[at].uuid;
        if let Some(entry) = self.table.find_mut(uuid) {
            entry.stale = false;
        }
        match self.save() {
            Ok(()) => self.come_online(at),
            Err(text) => self.take_out(at, "failed", &text),
        }
    }

    fn come_online(&mut self, at: usize) {
        let now = self.clock.now();
        let live = &mut self.lives[at];
        live.online_since = Some(now);
        live.stage = Stage::Online;
        live.is_routed = true;
        let (uuid, replaces, reply) = (live.uuid, live.replaces.take(), live.reply.take());
        tracing::info!(%uuid, path = %live.path.display(), "device online");
        if let Some(old) = replaces {
            let mut table = self.table.clone();
            let slot = table.retire(old);
            if let (Some(slot), Some(entry)) = (slot, table.find_mut(uuid)) {
                entry.slot = Some(slot);
            }
            self.table = table;
            if let Err(text) = self.save() {
                // Still in force: what the table says on disk is the new device beside the old one.
                tracing::error!("{text}");
            }
            self.away.remove(&old.to_string());
            if let Some(old) = self.lives.iter().position(|it| it.uuid == old) {
                self.close(old);
            }
        }
        self.publish();
        if let Some(reply) = reply {
            let view = self
                .view_of(uuid)
                .ok_or_else(|| "it is gone again".to_owned());
            let _ = reply.send(view);
        }
        self.resume_leaving();
        self.say_started();
    }

    fn on_load_failed(&mut self, at: usize, key: EngineKey, failure: LoadFailed) {
        let live = &self.lives[at];
        let shard = live.engines.iter().position(|it| *it == key).unwrap_or(0) as u32;
        let others = self.lives.iter().filter(|it| it.is_routed).count();
        let is_alone = others <= usize::from(live.is_routed);
        if let (LoadFailed::Cancelled, _) | (_, true) = (&failure, is_alone)
            && let Some(started) = self.started.take()
        {
            let path = live.path.clone();
            let _ = started.send(Err(Fatal {
                shard,
                path,
                failure,
            }));
            return;
        }
        let text = format!("shard {shard} cannot be loaded: {failure}");
        self.take_out(at, "failed", &text);
        self.say_started();
    }

    /// Once nothing of what was there at start is being loaded any more.
    fn say_started(&mut self) {
        let is_loading = |it: &Live| matches!(it.stage, Stage::Loading(_) | Stage::Emptying(_));
        if self.lives.iter().any(is_loading) {
            return;
        }
        if let Some(started) = self.started.take() {
            self.views.change(|view| view.phase = Phase::Serving);
            let _ = started.send(Ok(()));
        }
    }

    // ---- what is remembered -----------------------------------------------------------------

    fn is_stale(&self, uuid: DeviceUuid) -> bool {
        self.table.find(uuid).is_some_and(|entry| entry.stale)
    }

    fn is_routed(&self, uuid: DeviceUuid) -> bool {
        self.lives.iter().any(|it| it.uuid == uuid && it.is_routed)
    }

    fn save(&self) -> Result<(), String> {
        self.table
            .write(&self.config.table_path())
            .map_err(|error| error.to_string())
    }

    fn note_removal(&mut self, origin: Origin) {
        let away: Vec<DeviceUuid> = self
            .table
            .in_use()
            .filter(|entry| !entry.stale && !self.is_routed(entry.uuid.0))
            .map(|entry| entry.uuid.0)
            .collect();
        self.is_unsaved |= !away.is_empty();
        for uuid in away {
            if let Some(entry) = self.table.find_mut(uuid) {
                entry.stale = true;
            }
        }
        let mut noted = Ok(0);
        if self.is_unsaved {
            // Until it is on disk it must not be acknowledged; in memory it holds either way.
            noted = self.save().map(|()| 0).map_err(|text| {
                format!("a device is away and it cannot be noted that blocks went: {text}")
            });
            self.is_unsaved = noted.is_err();
        }
        if noted.is_ok() && self.must_wait_for_moves(origin) {
            return;
        }
        self.post.send(
            origin.thread,
            Mail::Answer(origin.operation, Answer::Done(noted)),
        );
    }
}
