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
//! | `coming` | how does a device come in? |
//! | `going` | when and how does a device go? |
//! | `asked` | what if an operator wants something? |
//! | `leaving`, `moves` | how do the blocks of a device that is retired get to the others? |
//! | `told` | what do threads and people hear? |
//!
//! What is absent: when a device counts as lost (`watch`), who owns which block (`routes`), how an
//! engine is opened and closed (`loading`, `owner`).

mod asked;
mod coming;
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
use crate::config::{Config, DeviceTier};
use crate::loading::{LoadFailed, LoadingHook};
use crate::mail::{Answer, EngineKey, Mail, Origin, Post};
use crate::node::{MovingHook, WallClock};
use crate::storage::{OpenDevice, Storage};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use kvar_base::{Clock as _, DeviceUuid, Moment, SystemClock};
use kvar_engine::{Shares, Superblock};
use kvar_io::Target;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use leaving::{Leaving, MOVES_FROM};

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
