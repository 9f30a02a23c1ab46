//! One store over one simulated disk with its oracle: every call goes through here, every answer
//! is judged here.
//!
//! What must always be true: whatever the disk does, bytes are those of one complete put that may
//! be seen; every call is answered; what is not there left for a reason that the journal names and
//! that agrees with how full things were; memory comes back.

mod answers;
mod below;
mod calls;
mod devices;
mod gone;
mod lives;
mod promises;
mod scrub;

pub(crate) use devices::Replacement;

use crate::churn::NAMESPACE_BLOCKS;
use crate::device::Harm;
use crate::model::{Model, Presence};
use crate::payload;
use crate::tally::Tally;
use below::Below;
use devices::Shelved;
use kvar_base::{BlockId, Moment};
use kvar_engine::{
    Copy, Engine, EngineConfig, FormatOptions, PutHints, PutTicket, RecoveryReport, Shares,
    Superblock, TENANTS, Tenant, format, read_superblock,
};
use kvar_io::Arena;
use kvar_io::sim::{FaultRates, Image, SimDisk, SimOptions, Survival};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Steps that are shown when something is wrong.
const TRACE_STEPS: usize = 60;
/// Wall time when a world begins: some day of 2025.
const UNIX_AT_START_S: u64 = 1_750_000_000;

/// Something that must not be.
#[derive(Clone, Debug)]
pub struct Violation(pub String);

type Step = Result<(), Violation>;

impl From<String> for Violation {
    fn from(what: String) -> Self {
        Self(what)
    }
}

fn wrong<T>(what: String) -> Result<T, Violation> {
    Err(Violation(what))
}

/// How a life ends.
#[derive(Clone, Copy, Debug)]
pub enum Restart {
    /// Everything is written first.
    Clean,
    /// The process dies; the drive goes on.
    Kill,
    /// The drive loses its power.
    PowerCut(Survival),
}

/// A put announced and not yet ended.
pub(crate) struct OpenPut {
    pub(crate) number: u64,
    nonce: u64,
    lengths: Arc<[u32]>,
    version: u64,
    ticket: PutTicket,
    deadline: Moment,
    hints: PutHints,
    durable: bool,
}

/// What a writer wants.
pub(crate) struct WantedPut {
    pub(crate) number: u64,
    pub(crate) writer: u64,
    pub(crate) lengths: Vec<u32>,
    pub(crate) durable: bool,
    pub(crate) ephemeral: bool,
    pub(crate) ttl_s: Option<u32>,
    pub(crate) patience: Duration,
}

/// How a put ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PutEnd {
    Commit,
    Abort,
    /// One byte is not what the writer said.
    WrongByte,
}

enum Waiting {
    Get {
        number: u64,
        sections: Option<Range<u16>>,
        candidates: Vec<u64>,
        puts_before: u64,
        presence: Presence,
        in_doubt: bool,
        in_memory: bool,
        times_gone: u64,
        times_removed: u64,
    },
    Put {
        number: u64,
        nonce: u64,
    },
    Remove {
        numbers: Vec<u64>,
        from: u64,
    },
    Purge {
        from: u64,
        whose: Option<u64>,
    },
    Flush {
        from: u64,
    },
}

/// Whose the blocks are, by number.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tenancy {
    /// So many tenants, a prompt in turn each.
    Mixed(u64),
    /// Every namespace of the churn is one.
    ByNamespace,
}

impl Default for Tenancy {
    fn default() -> Self {
        Self::Mixed(1)
    }
}

impl Tenancy {
    pub(crate) fn of(self, number: u64) -> u64 {
        match self {
            Self::Mixed(tenants) => number / 8 % tenants,
            Self::ByNamespace => number / NAMESPACE_BLOCKS,
        }
    }

    /// What a tenant weighs: they differ.
    pub(crate) fn weight(tenant: u64) -> u64 {
        tenant + 1
    }

    /// The same for the store.
    pub(crate) fn shares() -> Shares {
        let mut shares = Shares::none();
        for number in 0..TENANTS as u32 {
            let tenant = Tenant::new(number).expect("there are so many");
            shares.set(tenant, Self::weight(u64::from(number)) as u32);
        }
        shares
    }
}

pub(crate) fn tenant(number: u64) -> Tenant {
    Tenant::new(number as u32).expect("a run has few tenants")
}

/// Memory as a call that wants some of it finds it.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    used_bytes: u64,
    /// At most.
    wanted_bytes: u64,
    asking: u64,
    /// Bytes by tenant.
    held: BTreeMap<u64, u64>,
}

impl Memory {
    /// Whether a tenant has more than its part, of what an eighth is kept out of.
    fn is_beyond(&self, tenant: u64, limit_bytes: u64) -> bool {
        let held = |tenant: u64| self.held.get(&tenant).copied().unwrap_or_default();
        let among = self.held.iter().filter(|(_, bytes)| **bytes > 0);
        let among = among.map(|(tenant, _)| *tenant).chain([self.asking]);
        let among: BTreeSet<u64> = among.collect();
        let weights: u64 = among.iter().map(|one| Tenancy::weight(*one)).sum();
        let promised = limit_bytes - limit_bytes / 8;
        held(tenant) > promised * Tenancy::weight(tenant) / weights
    }
}

/// A copy that a slow reader holds.
struct Held {
    copy: Copy,
    number: u64,
    nonce: u64,
}

/// Formats a disk for the `times`-th time.
fn format_disk(disk: &SimDisk, salt: u64, times: u64, expected_block_bytes: u64) -> Superblock {
    let arena = Arena::new(1 << 20).expect("memory for pages");
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&salt.to_le_bytes());
    uuid[8..].copy_from_slice(&times.to_le_bytes());
    let options = FormatOptions {
        shards: 1,
        expected_block_bytes,
        created_unix: 0,
        uuid: kvar_base::DeviceUuid::new(uuid),
        secret: [salt as u8 ^ 0x5a ^ times as u8; 16],
    };
    format(&mut disk.open(), &arena, &options).expect("a disk that is well can be formatted")
}

/// One store with its oracle.
pub struct World {
    /// The disk.
    pub disk: SimDisk,
    /// What went right so far.
    pub tally: Tally,
    pub(crate) engine: Option<Engine>,
    arena: Arena,
    pub(crate) superblock: Superblock,
    pub(crate) recovery: RecoveryReport,
    pub(crate) config: EngineConfig,
    pub(crate) model: Model,
    pub(crate) harm: Harm,
    pub(crate) now: Moment,
    turns: u64,
    life_began: u64,
    salt: u64,
    next_token: u64,
    next_nonce: u64,
    waiting: HashMap<u64, Waiting>,
    pub(crate) open_puts: Vec<OpenPut>,
    held: Vec<Held>,
    struck_known: usize,
    numbers: HashMap<BlockId, u64>,
    /// What is on the device is flushed, since nothing was written in this life that was not.
    disk_is_durable: bool,
    /// Blocks that left memory as their only place, because they were over or for want of room, so far.
    forgotten: u64,
    /// Index entries given up so far.
    displaced: u64,
    /// Most polls that an operation takes.
    polls_max: u32,
    /// A put was refused for want of memory in this life.
    was_busy: bool,
    /// Wall time at `Moment(0)`.
    unix_at_start_s: u64,
    /// The device that was in service before, if it may come back.
    shelf: Option<Shelved>,
    /// How often a device was formatted.
    formats: u64,
    expected_block_bytes: u64,
    /// Something was written to the device in this life: a segment is open.
    has_placed: bool,
    /// Whose the blocks are.
    pub(crate) tenancy: Tenancy,
    /// There may be a tier below.
    below: Option<Below>,
    /// Blocks that memory, reclaim or a full bucket gave up since the last answers.
    given_up_now: BTreeSet<u64>,
    trace: VecDeque<String>,
    pub(crate) trace_steps: usize,
}

impl World {
    /// A new store.
    ///
    /// # Panics
    /// When the disk cannot be formatted: a defect of the scenario.
    #[must_use]
    pub fn format(
        salt: u64,
        bytes: u64,
        expected_block_bytes: u64,
        options: SimOptions,
        config: EngineConfig,
    ) -> Self {
        let well = SimOptions {
            rates: FaultRates::default(),
            ..options
        };
        let disk = SimDisk::new(bytes, well);
        format_disk(&disk, salt, 0, expected_block_bytes);
        let mut world = Self::over(salt, disk, config, Model::default());
        world.disk.set_rates(options.rates);
        world.polls_max = options.polls_max;
        world.expected_block_bytes = expected_block_bytes;
        world.note("formatted");
        world
    }

    /// A store over a disk that is formatted, with what is known of it.
    ///
    /// # Panics
    /// When it cannot be opened.
    #[must_use]
    pub fn over(salt: u64, disk: SimDisk, config: EngineConfig, model: Model) -> Self {
        let pages = Arena::new(1 << 20).expect("memory for pages");
        let superblock = read_superblock(&mut disk.open(), &pages)
            .expect("the disk can be read")
            .expect("it is formatted");
        let mut world = Self {
            disk,
            tally: Tally::default(),
            engine: None,
            arena: pages,
            superblock,
            recovery: RecoveryReport::default(),
            config,
            model,
            harm: Harm::default(),
            now: Moment(1),
            turns: 0,
            life_began: 0,
            salt,
            next_token: 1,
            next_nonce: 1,
            waiting: HashMap::new(),
            open_puts: Vec::new(),
            held: Vec::new(),
            struck_known: 0,
            numbers: HashMap::new(),
            disk_is_durable: true,
            forgotten: 0,
            displaced: 0,
            polls_max: 1,
            was_busy: false,
            unix_at_start_s: UNIX_AT_START_S,
            shelf: None,
            formats: 0,
            expected_block_bytes: 0,
            has_placed: false,
            tenancy: Tenancy::default(),
            below: None,
            given_up_now: BTreeSet::new(),
            trace: VecDeque::new(),
            trace_steps: TRACE_STEPS,
        };
        world.model.unix_s = world.unix_s();
        let known: Vec<u64> = world.model.blocks.keys().copied().collect();
        for number in known {
            world.id(number);
        }
        world.open().expect("a disk that is well can be opened");
        world
    }

    fn note(&mut self, what: impl std::fmt::Display) {
        if self.trace.len() >= self.trace_steps {
            self.trace.pop_front();
        }
        self.trace
            .push_back(format!("{:>9} us  {what}", self.now.0));
    }

    /// The last steps.
    #[must_use]
    pub fn trace(&self) -> Vec<String> {
        self.trace.iter().cloned().collect()
    }

    pub(crate) fn id(&mut self, number: u64) -> BlockId {
        let id = payload::id(self.salt, number);
        self.numbers.insert(id, number);
        id
    }

    fn engine(&mut self) -> &mut Engine {
        self.engine
            .as_mut()
            .expect("the store is open between restarts")
    }

    /// Memory as it is, for a call about this block that wants so much of it at most.
    fn memory(&mut self, number: u64, wanted_bytes: u64) -> Memory {
        let now = self.now;
        let status = self.engine().status(now);
        let held = status.tenants.iter();
        Memory {
            used_bytes: status.dram_bytes,
            wanted_bytes,
            asking: self.tenancy.of(number),
            held: held
                .map(|it| (u64::from(it.tenant), it.dram_bytes))
                .collect(),
        }
    }

    fn token(&mut self, waiting: Waiting) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.waiting.insert(token, waiting);
        token
    }

    /// A place on the disk where a block lies that is visible now, for faults that aim.
    pub(crate) fn place_of_some_block(&self, pick: u64) -> Option<Range<u64>> {
        let placed: Vec<(u32, u64)> = self
            .model
            .positions
            .iter()
            .map(|(position, number)| (*position, *number))
            .filter(|(_, number)| {
                self.model
                    .blocks
                    .get(number)
                    .is_some_and(|block| block.on_device)
            })
            .collect();
        if placed.is_empty() {
            return None;
        }
        let (position, number) = *placed.iter().min_by_key(|(position, _)| {
            // Any order that does not depend on the map's.
            u64::from(*position).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ pick
        })?;
        let pages = self.superblock.segment_pages();
        let offset = self
            .superblock
            .offset(0, position / pages, position % pages);
        let put = self.model.blocks.get(&number)?.puts.last()?;
        Some(offset..offset + payload::stored_bytes(&put.lengths))
    }

    /// Bytes written to the disk so far.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.disk.counters().write_bytes
    }

    /// Counters of engine and disk, to compare two runs.
    #[must_use]
    pub fn fingerprint(&mut self) -> String {
        let now = self.now;
        let status = self.engine().status(now);
        format!("{:?} {:?} {:?}", self.disk.counters(), status, self.tally)
    }

    /// The disk's content.
    #[must_use]
    pub fn image(&self) -> Image {
        self.disk.image()
    }
}
