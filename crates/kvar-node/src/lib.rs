//! The daemon as a library: settings, storage, devices, threads, admin, start and stop.
//!
//! ```text
//!   Config ── Node::start ──> NodeHandle { listen_addr, admin_addr, loaded, shutdown, wait }
//!                 │
//!                 ├─ kvar-shard-0 ─┐  links + mailbox + engines in one loop, one engine a device;
//!                 ├─ kvar-shard-1 ─┤  blocks belong to the engine that `Routes` names, links to the
//!                 ├─ ...           ┘  thread that was next; bytes pass by ownership, uncopied
//!                 ├─ kvar-keeper      decides which devices are in service
//!                 ├─ kvar-load-...    read shards back at start, then end
//!                 └─ kvar-admin       HTTP on loopback; asks threads by mail, they never wait
//! ```
//!
//! | file | question |
//! |---|---|
//! | `config`, `config_file` | what can be set, and where is it written? |
//! | `key_file`, `storage` | what is opened at start, and what if it does not fit together? |
//! | `namespaces` | who may connect, with which key, and how much is theirs? |
//! | `node` | in which order does a node start and stop? |
//! | `assemble`, `devices` | which devices are there, what lies where, what if one goes? |
//! | `loading` | how is a shard read back while its thread serves already? |
//! | `thread` | what does one thread do? |
//! | `links` | how does one connection go? |
//! | `owner`, `mail` | how does a request reach the engine that owns its block, and come back? |
//! | `report`, `counters`, `metrics`, `admin` | how is the node? |
//! | `device_door`, `mode_door` | how does an operator change the devices, and what engines do? |
//! | `modes` | how much of the store do engines use? |
//!
//! What must always be true: memory is bounded by `dram` + index + [`MEMORY_BASE_BYTES`] + open
//! links x [`LINK_BYTES`] (and the engines' fixed reserves); the data plane waits neither for the
//! admin thread nor for a client.
//!
//! What is absent: layout, policy, checks of stored bytes (kvar-engine); framing and sockets
//! (kvar-wire, kvar-transport); a cluster.

mod admin;
mod assemble;
pub mod config;
mod config_file;
pub mod counters;
mod device_door;
mod devices;
mod json_table;
mod key_file;
mod links;
mod loading;
mod mail;
mod metrics;
mod mode_door;
mod modes;
mod namespaces;
mod node;
mod owner;
mod report;
mod storage;
mod thread;

pub use admin::AdminError;
pub use config::{Config, ConfigError, DataPath, DeviceTier, MissingDevice, NamespaceConfig};
pub use config_file::{reference_page, sample};
pub use device_door::{PROOF_HEADER, TIME_HEADER, proof as admin_proof};
pub use devices::{DeviceReport, DeviceView, Moved, Phase, TableError};
pub use key_file::{KeyFile, KeyFileError, KeyName};
pub use loading::LoadingHook;
pub use modes::{ModeError, ModeReport, SetBy};
pub use namespaces::NamespaceError;
pub use node::{
    AroundHook, Hooks, LINK_BYTES, MEMORY_BASE_BYTES, MovingHook, Node, NodeHandle, Readiness,
    StartError, StopReport, Stopper, WallClock,
};
pub use report::{NamespaceReport, NodeFacts, NodeReport, ShardReport, SleepReport, TierReport};
pub use storage::StorageError;
