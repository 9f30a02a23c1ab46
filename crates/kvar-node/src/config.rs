//! Every setting of a node, once.
//!
//! [`SETTINGS`] is the one definition: it feeds the TOML parser, the command line's flags (`--key`
//! with dashes for underscores), `kvar config sample`, `kvar config check` and
//! `docs/reference/config.md`. A setting that is not in the table does not exist.
//!
//! ```text
//!   default -> file (TOML, flat keys) -> flags -> Config::validate -> Config
//! ```
//!
//! What must always be true: an unknown key, a value that cannot be read, or a combination that
//! cannot work is an error that names the line, what is wrong and what to write instead. A setting
//! is never ignored.
//!
//! What is absent: opening files or sockets. Whether a size fits the disk is asked when the data
//! file is opened.

mod namespace;
mod table;

pub use namespace::NamespaceConfig;
pub use table::SETTINGS;

pub use crate::links::Sharing;
use kvar_base::{BLOCK_BYTES_MAX, ByteSize, Mode, PAGE_BYTES};
pub use kvar_io::IoEngine;
use kvar_transport::shared::{RING_BYTES_MAX, RING_BYTES_MIN};
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

/// Most shards of one node: shard numbers are part of a device's layout, and no machine kvar is
/// made for has more cores.
pub const SHARDS_MAX: u32 = 256;

/// Least DRAM a shard can work with: a few of the largest blocks in reading and in filling.
pub const DRAM_BYTES_MIN: u64 = 16 << 20;

/// Longest spin before sleep that may be asked for; beyond it a core is simply given away.
pub const SPIN_US_MAX: u64 = 100_000;

/// Between the values of a list; no path of ours has it.
const LIST_SEPARATOR: char = '\n';

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What a device is for.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum DeviceTier {
    /// Takes every put.
    #[default]
    Fast,
    /// Takes what the fast ones do not keep; without a fast one in service, every put.
    Big,
}

impl DeviceTier {
    /// Both, the upper one first.
    pub const ALL: [Self; 2] = [Self::Fast, Self::Big];

    /// The word used in settings, tables and metrics.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Big => "big",
        }
    }

    #[allow(clippy::trivially_copy_pass_by_ref)] // serde asks for this signature.
    pub(crate) fn is_fast(&self) -> bool {
        *self == Self::Fast
    }
}

impl fmt::Display for DeviceTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl std::str::FromStr for DeviceTier {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|tier| tier.word() == text);
        found.ok_or_else(|| format!("{text:?} is no tier: write fast or big"))
    }
}

/// A data file or block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataPath {
    /// Where it is.
    pub path: PathBuf,
    /// Its size, where it is not the size of all.
    pub size: Option<ByteSize>,
    /// Its tier; not said: what it was, and fast for a new one.
    pub tier: Option<DeviceTier>,
}

/// What a start does when a device of the store is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingDevice {
    /// Starts without it, and says so.
    Start,
    /// Does not start.
    Refuse,
}

impl DataPath {
    /// Reads `PATH`, `PATH=SIZE`, and either with `,fast` or `,big` behind it.
    ///
    /// # Errors
    /// When there is no path.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        // As with a size: only what reads as a tier is one.
        let (text, tier) = match text.rsplit_once(',') {
            Some((before, tail)) => match tail.parse() {
                Ok(tier) => (before, Some(tier)),
                Err(_) => (text, None),
            },
            None => (text, None),
        };
        // What stands behind the last = is a size if it reads as one: paths may have that sign, too.
        let (path, size) = match text.rsplit_once('=') {
            Some((path, tail)) => match table::size(tail) {
                Ok(size) => (path, Some(size)),
                Err(_) => (text, None),
            },
            None => (text, None),
        };
        if path.is_empty() {
            return Err("a path is needed, such as /var/lib/kvar/data".into());
        }
        Ok(Self {
            path: PathBuf::from(path),
            size,
            tier,
        })
    }
}

/// So many bytes written a day, for one device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WriteRate {
    /// Without end.
    Unlimited,
    /// Bytes a day.
    Bytes(u64),
    /// So often the whole device.
    Drives(f64),
}

impl WriteRate {
    /// Bytes a day on a device of this size; `None` is without end.
    #[must_use]
    pub fn bytes_per_day(self, device_bytes: u64) -> Option<u64> {
        match self {
            Self::Unlimited => None,
            Self::Bytes(bytes) => Some(bytes),
            Self::Drives(drives) => Some((drives * device_bytes as f64) as u64),
        }
    }
}

impl std::str::FromStr for WriteRate {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self::Unlimited);
        }
        let drives = text
            .strip_suffix('x')
            .and_then(|text| text.trim().parse::<f64>().ok());
        if let Some(drives) = drives.filter(|drives| (0.0..=10_000.0).contains(drives)) {
            return Ok(Self::Drives(drives));
        }
        let bytes = text.parse::<ByteSize>().map(|size| Self::Bytes(size.0));
        bytes.map_err(|_| {
            format!(
                "{text:?} is no rate of writes: write unlimited, a size a day such as 500GB, or drive \
                 writes a day such as 1x"
            )
        })
    }
}

/// The settings of one node. [`Config::default`] runs on a laptop.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where blocks are stored: files (made at first start) or raw block devices; at least one.
    pub data: Vec<DataPath>,
    /// Size of a data file that names none itself; needed when it is made.
    pub size: Option<ByteSize>,
    /// What a start does when a device of the store is not there.
    pub missing_device: MissingDevice,
    /// Payload kept in memory, over all shards.
    pub dram: ByteSize,
    /// Whether that memory is taken from the system at start, and not when it is first used.
    pub prefault: bool,
    /// Shards, one thread each; `None` takes what the device was made with, or one a core.
    pub shards: Option<NonZeroU32>,
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where the admin HTTP listens.
    pub admin: SocketAddr,
    /// Allows listening beyond loopback without encryption.
    pub insecure: bool,
    /// How long an acknowledged block may be in memory only.
    pub flush_after: Duration,
    /// How long a clean stop may take to write what is in memory only.
    pub shutdown_flush: Duration,
    /// How long a handover without a time to live waits for its reader.
    pub handover_wait: Duration,
    /// Usual block size; sizes the index of a new device.
    pub expected_block_bytes: ByteSize,
    /// Bytes a second that each shard verifies in the background; 0 is off.
    pub scrub: ByteSize,
    /// What each device is written a day without asking what it is good for.
    pub flash_write_budget: WriteRate,
    /// What each device is never written more than, a day.
    pub flash_write_limit: WriteRate,
    /// How often each device may be written over in its life, by its maker.
    pub flash_endurance: u64,
    /// Whether block devices are told what is free.
    pub discard: bool,
    /// What moves bytes between memory and device.
    pub io_engine: IoEngine,
    /// How long a shard looks for work before it sleeps, in microseconds.
    pub spin_us: u64,
    /// How much of the store engines use where nobody has switched.
    pub mode: Mode,
    /// Payload bytes one link may have on its way.
    pub link_budget: ByteSize,
    /// Requests one link may have open.
    pub link_requests: u32,
    /// Links open at once.
    pub connections_max: u32,
    /// With which clients memory is shared.
    pub shared_memory: Sharing,
    /// Memory of one link that shares it.
    pub shared_memory_link: ByteSize,
    /// Links that may share memory at once.
    pub shared_memory_links: u32,
    /// Memory of all staging regions together.
    pub shared_memory_staging: ByteSize,
    /// What is logged: a level or a tracing filter.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Where the namespace key is; `None` is beside the data.
    pub key_file: Option<PathBuf>,
    /// Written when the node is ready.
    pub ready_file: Option<PathBuf>,
    /// Namespaces beside the default one, and shares.
    pub namespaces: Vec<NamespaceConfig>,
}

/// One setting: all that is known about it.
pub struct Setting {
    /// Its key in the file; its flag is the same with dashes.
    pub key: &'static str,
    /// Its default, as one would write it; empty when there is none.
    pub default: &'static str,
    /// What a value looks like.
    pub form: &'static str,
    /// A sentence or two: what it does, why this default.
    pub help: &'static str,
    /// Whether it is a yes/no that the command line gives as a bare flag.
    pub is_switch: bool,
    /// Whether it may be given several times (in a file: as a list).
    pub is_list: bool,
    set: fn(&mut Config, &str) -> Result<(), String>,
}

impl Setting {
    /// Its flag on the command line, without the dashes in front.
    #[must_use]
    pub fn flag(&self) -> String {
        self.key.replace('_', "-")
    }
}

impl fmt::Debug for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Setting({} = {:?})", self.key, self.default)
    }
}

impl Default for Config {
    /// The defaults of [`SETTINGS`], read by the same code that reads a file.
    fn default() -> Self {
        let blank: SocketAddr = ([127, 0, 0, 1], 0).into();
        let mut config = Self {
            data: Vec::new(),
            missing_device: MissingDevice::Start,
            size: None,
            dram: ByteSize(0),
            prefault: false,
            shards: None,
            listen: blank,
            admin: blank,
            insecure: false,
            flush_after: Duration::ZERO,
            shutdown_flush: Duration::ZERO,
            handover_wait: Duration::ZERO,
            expected_block_bytes: ByteSize(0),
            scrub: ByteSize(0),
            flash_write_budget: WriteRate::Unlimited,
            flash_write_limit: WriteRate::Unlimited,
            flash_endurance: 0,
            discard: false,
            io_engine: IoEngine::Auto,
            spin_us: 0,
            mode: Mode::default(),
            link_budget: ByteSize(0),
            link_requests: 0,
            connections_max: 0,
            shared_memory: Sharing::Auto,
            shared_memory_link: ByteSize(0),
            shared_memory_links: 0,
            shared_memory_staging: ByteSize(0),
            log: String::new(),
            log_format: LogFormat::Text,
            key_file: None,
            ready_file: None,
            namespaces: Vec::new(),
        };
        for setting in SETTINGS
            .iter()
            .filter(|setting| !setting.default.is_empty())
        {
            (setting.set)(&mut config, setting.default).expect("a default of ours can be read");
        }
        config
    }
}

impl Config {
    /// Sets one setting from its text, whether from a file or a flag.
    ///
    /// # Errors
    /// What is wrong with the value, or the nearest known key.
    pub fn set(&mut self, key: &str, text: &str) -> Result<(), String> {
        let setting = SETTINGS.iter().find(|setting| setting.key == key);
        let setting = setting.ok_or_else(|| unknown_key(key))?;
        (setting.set)(self, text)
    }

    /// As [`set`](Self::set), for a setting that may be given several times.
    ///
    /// # Errors
    /// As [`set`](Self::set); several of one that is not a list.
    pub fn set_all(&mut self, key: &str, texts: &[String]) -> Result<(), String> {
        match texts {
            [text] => self.set(key, text),
            _ if SETTINGS
                .iter()
                .any(|setting| setting.key == key && setting.is_list) =>
            {
                self.set(key, &texts.join("\n"))
            }
            _ => Err("give one value".into()),
        }
    }

    /// Where the namespace key is: the named file, or the first data path with `.key` added.
    #[must_use]
    pub fn key_path(&self) -> PathBuf {
        self.key_file.clone().unwrap_or_else(|| {
            let first = self.data.first().map(|data| data.path.clone());
            let mut path = first.unwrap_or_default().into_os_string();
            path.push(".key");
            path.into()
        })
    }

    /// The tier that the settings give to what lies at a path; none if they do not say.
    pub(crate) fn tier_of(&self, path: &std::path::Path) -> Option<DeviceTier> {
        let found = self.data.iter().find(|data| data.path == path);
        found.and_then(|data| data.tier)
    }

    /// Where the device table is: beside the key file, with `.devices` for `.key`.
    #[must_use]
    pub fn table_path(&self) -> PathBuf {
        self.beside_key("devices")
    }

    /// A file beside the key file, with another extension.
    pub(crate) fn beside_key(&self, extension: &str) -> PathBuf {
        let key = self.key_path();
        if key.extension().is_some_and(|found| found == "key") {
            return key.with_extension(extension);
        }
        let mut path = key.into_os_string();
        path.push(format!(".{extension}"));
        path.into()
    }

    /// Shards of a new device when the settings leave it open: one a core.
    #[must_use]
    pub fn shards_of_new_device(&self) -> NonZeroU32 {
        self.shards.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let cores = u32::try_from(cores).unwrap_or(SHARDS_MAX).min(SHARDS_MAX);
            NonZeroU32::new(cores).unwrap_or(NonZeroU32::MIN)
        })
    }

    /// Whether the combination can work.
    ///
    /// # Errors
    /// The first thing that cannot, and what to write instead.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |key: &'static str, message: String| {
            Err(ConfigError {
                origin: None,
                line: None,
                message: format!("{key}: {message}"),
            })
        };
        for (at, data) in self.data.iter().enumerate() {
            if self.data[..at].iter().any(|other| other.path == data.path) {
                return wrong("data", format!("{} is named twice", data.path.display()));
            }
        }
        for (at, namespace) in self.namespaces.iter().enumerate() {
            let name = &namespace.name;
            if self.namespaces[..at]
                .iter()
                .any(|other| other.name == *name)
            {
                return wrong("namespace", format!("{name:?} is named twice"));
            }
        }
        let beside = self.namespaces.iter().filter(|it| !it.is_default()).count();
        if beside >= kvar_engine::TENANTS {
            return wrong(
                "namespace",
                format!(
                    "{beside} beside the default one are too many; a node has at most {}",
                    kvar_engine::TENANTS - 1
                ),
            );
        }
        let shards = u64::from(self.shards.map_or(1, NonZeroU32::get)) * self.data.len() as u64;
        if self.dram.0 / shards < DRAM_BYTES_MIN {
            return wrong(
                "dram",
                format!(
                    "{} for {shards} shards over all devices is less than {} a shard, which a few blocks in \
                     flight need; give at least {}",
                    self.dram,
                    ByteSize(DRAM_BYTES_MIN),
                    ByteSize(DRAM_BYTES_MIN * shards),
                ),
            );
        }
        if self.flush_after.is_zero() {
            return wrong(
                "flush_after",
                "must be more than zero, such as 100ms or 1s".into(),
            );
        }
        if !(PAGE_BYTES..=BLOCK_BYTES_MAX).contains(&self.expected_block_bytes.0) {
            return wrong(
                "expected_block_bytes",
                format!(
                    "{} is outside {} to {}",
                    self.expected_block_bytes,
                    ByteSize(PAGE_BYTES),
                    ByteSize(BLOCK_BYTES_MAX)
                ),
            );
        }
        let (least, most) = (2 * RING_BYTES_MIN as u64, 2 * RING_BYTES_MAX as u64);
        if !(least..=most).contains(&self.shared_memory_link.0) {
            return wrong(
                "shared_memory_link",
                format!(
                    "{} is outside {} to {}",
                    self.shared_memory_link,
                    ByteSize(least),
                    ByteSize(most)
                ),
            );
        }
        if self.link_budget.0 < BLOCK_BYTES_MAX {
            return wrong(
                "link_budget",
                format!(
                    "{} is less than one largest block; give at least {}",
                    self.link_budget,
                    ByteSize(BLOCK_BYTES_MAX)
                ),
            );
        }
        for (key, address) in [("listen", self.listen), ("admin", self.admin)] {
            if !address.ip().is_loopback() && !self.insecure {
                return wrong(
                    key,
                    format!(
                        "{address} can be reached from other machines and links are not encrypted; \
                         listen on 127.0.0.1, or add --insecure (insecure = true) if the network \
                         is trusted"
                    ),
                );
            }
        }
        if self.listen == self.admin && self.listen.port() != 0 {
            return wrong(
                "admin",
                format!("{} is the listen address; choose another", self.admin),
            );
        }
        Ok(())
    }
}

/// Why settings cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file, if they came from one.
    pub origin: Option<PathBuf>,
    /// The line in it, counted from 1.
    pub line: Option<usize>,
    /// What is wrong and what to write instead.
    pub message: String,
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.origin, self.line) {
            (Some(origin), Some(line)) => write!(f, "{}:{line}: ", origin.display())?,
            (Some(origin), None) => write!(f, "{}: ", origin.display())?,
            (None, Some(line)) => write!(f, "line {line}: ")?,
            (None, None) => {}
        }
        f.write_str(&self.message)
    }
}

/// What to say about a key that does not exist.
pub(crate) fn unknown_key(key: &str) -> String {
    let nearest = SETTINGS
        .iter()
        .map(|setting| (strsim::damerau_levenshtein(setting.key, key), setting.key))
        .min()
        .filter(|(distance, _)| *distance <= key.len().max(3) / 2)
        .map_or_else(String::new, |(_, nearest)| {
            format!(", did you mean `{nearest}`?")
        });
    format!("unknown setting `{key}`{nearest} (`kvar config sample` prints all there are)")
}
