//! The daemon as a library: settings, storage, shard threads, admin, start and stop.
//!
//! ```text
//!   Config ── Node::start ──> NodeHandle { listen_addr, admin_addr, shutdown, wait }
//!                 │
//!                 ├─ kvar-shard-0 ─┐  links + mailbox + engine in one loop; blocks belong to the
//!                 ├─ kvar-shard-1 ─┤  shard that `BlockId::shard` names, links to the shard that
//!                 ├─ ...           ┘  was next; bytes pass between them by ownership, uncopied
//!                 └─ kvar-admin       HTTP on loopback; asks shards by mail, they never wait
//! ```
//!
//! | file | question |
//! |---|---|
//! | `config`, `config_file` | what can be set, and where is it written? |
//! | `key_file`, `storage` | what is opened at start, and what if it does not fit together? |
//! | `node` | in which order does a node start and stop? |
//! | `shard` | what does one thread do? |
//! | `links` | how does one connection go? |
//! | `owner`, `mail` | how does a request reach the shard that owns its block, and come back? |
//! | `report`, `counters`, `metrics`, `admin` | how is the node? |
//!
//! What must always be true: memory is bounded by `dram` + index + [`MEMORY_BASE_BYTES`] + open
//! links x [`LINK_BYTES`] (and the engines' fixed reserves); the data plane waits neither for the
//! admin thread nor for a client.
//!
//! What is absent: layout, policy, checks of stored bytes (kvar-engine); framing and sockets
//! (kvar-wire, kvar-transport); a cluster.

mod admin;
pub mod config;
mod config_file;
pub mod counters;
mod key_file;
mod links;
mod mail;
mod metrics;
mod node;
mod owner;
mod report;
mod shard;
mod storage;

pub use admin::AdminError;
pub use config::{Config, ConfigError};
pub use config_file::{reference_page, sample};
pub use key_file::{KeyFile, KeyFileError};
pub use node::{LINK_BYTES, MEMORY_BASE_BYTES, Node, NodeHandle, StartError, StopReport, Stopper};
pub use report::{NodeFacts, NodeReport, ShardReport};
pub use storage::StorageError;
