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

use kvar_base::{BLOCK_BYTES_MAX, ByteSize, PAGE_BYTES};
pub use kvar_io::IoEngine;
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

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The settings of one node. [`Config::default`] runs on a laptop.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where blocks are stored: a file (made at first start) or a raw block device.
    pub data: PathBuf,
    /// Size of a data file; needed when it is made.
    pub size: Option<ByteSize>,
    /// Payload kept in memory, over all shards.
    pub dram: ByteSize,
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
    /// Usual block size; sizes the index of a new device.
    pub expected_block_bytes: ByteSize,
    /// What moves bytes between memory and device.
    pub io_engine: IoEngine,
    /// How long a shard looks for work before it sleeps, in microseconds.
    pub spin_us: u64,
    /// Payload bytes one link may have on its way.
    pub link_budget: ByteSize,
    /// Requests one link may have open.
    pub link_requests: u32,
    /// Links open at once.
    pub connections_max: u32,
    /// What is logged: a level or a tracing filter.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Where the namespace key is; `None` is beside the data.
    pub key_file: Option<PathBuf>,
    /// Written when the node is ready.
    pub ready_file: Option<PathBuf>,
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
    set: fn(&mut Config, &str) -> Result<(), String>,
}

/// Every setting, in the order in which the sample shows them.
pub const SETTINGS: &[Setting] = &[
    Setting {
        key: "data",
        default: "./kvar-data",
        form: "path",
        help: "Where blocks are stored: a file, made at first start, or a raw block device. \
               The namespace key is written beside it.",
        is_switch: false,
        set: |config, text| {
            if text.is_empty() {
                return Err("a path is needed, such as /var/lib/kvar/data".into());
            }
            config.data = PathBuf::from(text);
            Ok(())
        },
    },
    Setting {
        key: "size",
        default: "",
        form: "size",
        help: "Size of the data file. Needed when the file is made; afterwards it may be left \
               out, and must be the same where it is given. Of a block device it is the most that is \
               used.",
        is_switch: false,
        set: |config, text| {
            config.size = Some(size(text)?);
            Ok(())
        },
    },
    Setting {
        key: "dram",
        default: "1GiB",
        form: "size",
        help: "Payload bytes kept in memory, over all shards: the first tier, and where every put \
               lands. The process needs this plus the index and a fixed part besides.",
        is_switch: false,
        set: |config, text| {
            config.dram = size(text)?;
            Ok(())
        },
    },
    Setting {
        key: "shards",
        default: "auto",
        form: "number or \"auto\"",
        help: "Threads that each own a part of the device, one a core. Fixed when the device is \
               made; auto takes the device's number, and one a core for a new one.",
        is_switch: false,
        set: |config, text| {
            config.shards = match text {
                "auto" => None,
                _ => Some(number(text, 1, u64::from(SHARDS_MAX))? as u32).and_then(NonZeroU32::new),
            };
            Ok(())
        },
    },
    Setting {
        key: "listen",
        default: "127.0.0.1:7411",
        form: "address:port",
        help: "Where clients connect. Port 0 takes a free one (see ready_file). Beyond loopback \
               only with insecure, because links are not encrypted.",
        is_switch: false,
        set: |config, text| {
            config.listen = address(text)?;
            Ok(())
        },
    },
    Setting {
        key: "admin",
        default: "127.0.0.1:7412",
        form: "address:port",
        help: "Where the admin HTTP answers: /livez, /readyz, /metrics, /v1/status. Port 0 takes \
               a free one.",
        is_switch: false,
        set: |config, text| {
            config.admin = address(text)?;
            Ok(())
        },
    },
    Setting {
        key: "insecure",
        default: "false",
        form: "true or false",
        help: "Allows listening beyond loopback although links are not encrypted. Shows in log, \
               metrics and status.",
        is_switch: true,
        set: |config, text| {
            config.insecure = match text {
                "true" => true,
                "false" => false,
                _ => return Err(format!("{text:?} is neither true nor false")),
            };
            Ok(())
        },
    },
    Setting {
        key: "flush_after",
        default: "1s",
        form: "duration",
        help: "How long an acknowledged block may be in memory only. A kill loses at most about \
               twice this; shorter writes smaller pieces.",
        is_switch: false,
        set: |config, text| {
            config.flush_after = duration(text)?;
            Ok(())
        },
    },
    Setting {
        key: "shutdown_flush",
        default: "30s",
        form: "duration",
        help: "How long a clean stop (SIGTERM) may take to write what is in memory only. What is \
               not written by then is dropped, and the log says how many blocks.",
        is_switch: false,
        set: |config, text| {
            config.shutdown_flush = duration(text)?;
            Ok(())
        },
    },
    Setting {
        key: "expected_block_bytes",
        default: "64KiB",
        form: "size",
        help: "Usual size of a block; a new device gets an index with room for that many. Too \
               large a guess evicts blocks before the device is full, too small a one costs memory.",
        is_switch: false,
        set: |config, text| {
            config.expected_block_bytes = size(text)?;
            Ok(())
        },
    },
    Setting {
        key: "io_engine",
        default: "auto",
        form: "\"auto\", \"io_uring\" or \"threads\"",
        help: "What moves bytes between memory and device. auto takes io_uring and falls back to \
               threads where the system refuses it; the status says which and why.",
        is_switch: false,
        set: |config, text| {
            config.io_engine = text.parse()?;
            Ok(())
        },
    },
    Setting {
        key: "spin_us",
        default: "0",
        form: "microseconds",
        help: "How long a shard looks for work before it sleeps. A wake-up costs 60-80 us on a \
               virtual machine; spinning spends a core to save them.",
        is_switch: false,
        set: |config, text| {
            config.spin_us = number(text, 0, SPIN_US_MAX)?;
            Ok(())
        },
    },
    Setting {
        key: "link_budget",
        default: "64MiB",
        form: "size",
        help: "Payload bytes that one link may have on its way at once; bounds what a slow client \
               can hold. At least one largest block.",
        is_switch: false,
        set: |config, text| {
            config.link_budget = size(text)?;
            Ok(())
        },
    },
    Setting {
        key: "link_requests",
        default: "256",
        form: "number",
        help: "Requests that one link may have open at once. A client learns it at connect.",
        is_switch: false,
        set: |config, text| {
            config.link_requests = number(text, 1, 65_536)? as u32;
            Ok(())
        },
    },
    Setting {
        key: "connections_max",
        default: "1024",
        form: "number",
        help: "Links open at once over all shards; one more is told so and closed.",
        is_switch: false,
        set: |config, text| {
            config.connections_max = number(text, 1, 1_000_000)? as u32;
            Ok(())
        },
    },
    Setting {
        key: "log",
        default: "info",
        form: "level or filter",
        help: "What is logged: error, warn, info, debug, trace, or a filter by module such as \
               \"info,kvar_node=debug\".",
        is_switch: false,
        set: |config, text| {
            config.log = text.to_owned();
            Ok(())
        },
    },
    Setting {
        key: "log_format",
        default: "text",
        form: "\"text\" or \"json\"",
        help: "How log lines look. They go to standard error.",
        is_switch: false,
        set: |config, text| {
            config.log_format = match text {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                _ => return Err(format!("{text:?} is not one of text, json")),
            };
            Ok(())
        },
    },
    Setting {
        key: "key_file",
        default: "",
        form: "path",
        help: "Where the key of the default namespace is. Empty: the data path with .key added. \
               Written at first start with mode 0600.",
        is_switch: false,
        set: |config, text| {
            config.key_file = (!text.is_empty()).then(|| PathBuf::from(text));
            Ok(())
        },
    },
    Setting {
        key: "ready_file",
        default: "",
        form: "path",
        help: "Written, as JSON with listen, admin and key_file, once the node serves; removed \
               when it stops. For scripts that start it on port 0.",
        is_switch: false,
        set: |config, text| {
            config.ready_file = (!text.is_empty()).then(|| PathBuf::from(text));
            Ok(())
        },
    },
];

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
            data: PathBuf::new(),
            size: None,
            dram: ByteSize(0),
            shards: None,
            listen: blank,
            admin: blank,
            insecure: false,
            flush_after: Duration::ZERO,
            shutdown_flush: Duration::ZERO,
            expected_block_bytes: ByteSize(0),
            io_engine: IoEngine::Auto,
            spin_us: 0,
            link_budget: ByteSize(0),
            link_requests: 0,
            connections_max: 0,
            log: String::new(),
            log_format: LogFormat::Text,
            key_file: None,
            ready_file: None,
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

    /// Where the namespace key is: the named file, or the data path with `.key` added.
    #[must_use]
    pub fn key_path(&self) -> PathBuf {
        self.key_file.clone().unwrap_or_else(|| {
            let mut path = self.data.clone().into_os_string();
            path.push(".key");
            path.into()
        })
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
        let shards = u64::from(self.shards.map_or(1, NonZeroU32::get));
        if self.dram.0 / shards < DRAM_BYTES_MIN {
            return wrong(
                "dram",
                format!(
                    "{} for {shards} shards is less than {} a shard, which a few blocks in \
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

fn size(text: &str) -> Result<ByteSize, String> {
    text.parse()
        .map_err(|error: kvar_base::ByteSizeError| error.to_string())
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| format!("{text:?} is not a duration: write 250ms, 1s, 30s or 2m"))
}

fn number(text: &str, min: u64, max: u64) -> Result<u64, String> {
    text.replace('_', "")
        .parse()
        .ok()
        .filter(|number| (min..=max).contains(number))
        .ok_or_else(|| format!("{text:?} is not a whole number from {min} to {max}"))
}

fn address(text: &str) -> Result<SocketAddr, String> {
    use std::net::ToSocketAddrs;
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    // A host name is asked of the resolver only when it is one, so that a check of a file with
    // plain addresses never touches the network.
    text.to_socket_addrs()
        .ok()
        .and_then(|mut found| found.next())
        .ok_or_else(|| format!("{text:?} is not an address: write 127.0.0.1:7411 or [::1]:7411"))
}
