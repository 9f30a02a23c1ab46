//! The store of one shard: what lies where on the device, what is in DRAM, and how both survive.
//!
//! ```text
//!            lookup  get  put_begin/put_commit  remove  flush  purge
//!               \     \        |                  /      /      /
//!   Engine ── turn ── Shard (state machine: no I/O, no clock, no randomness)
//!               |        dram: residents + recency        index: where on the device
//!               |        write: place -> payload -> directory -> flush -> seal
//!               |        reclaim: oldest segment -> keep or drop -> free
//!            Device      checkpoint, recovery
//! ```
//!
//! | file | question |
//! |---|---|
//! | `layout` | what does a byte on the device mean? (`docs/internals/disk.md`): `superblock`, `page`, `image`, `checkpoint` |
//! | `index`, `snapshot` | where on the device is a block? How is that table copied while it changes? |
//! | `dram` | what is in memory, and what may leave it? |
//! | `expiry`, `leases` | when is a block over; who was promised which? |
//! | `segments` | which segment is in which state; where does the next block go? |
//! | `shard`, `shard/types` | the state machine; what callers hand in and get back |
//! | `shard/put`, `shard/read`, `shard/sections`, `shard/remove` | its calls: how does a block come in, get out whole or in part, go? |
//! | `shard/lease`, `shard/expiry` | how long is what promised; what is over? |
//! | `shard/scrub` | is what lies on the device still what was written? |
//! | `shard/write`, `shard/prepare`, `shard/sync` | how does a block get onto the device: queues and payload; segments; directory, flush, answers |
//! | `shard/trouble` | what if the device refuses? |
//! | `shard/reclaim`, `shard/checkpoint` | how does space come back; how is recovery kept short? |
//! | `shard/demote`, `shard/take` | what is offered to the tier below; what is taken from the one above? |
//! | `shard/shutdown`, `shard/status` | how does it end; what does it say of itself? |
//! | `shard/journal`, `mutation` | for tests: where did every block go? Is every check needed? |
//! | `recovery` | what was here when the process died? |
//! | `survey` | which blocks does a device in service name? |
//! | `format`, `check`, `engine` | making a device, verifying a stopped one, driving a live one |
//!
//! What must always be true: no byte is served that does not pass the check its writer made; what
//! is acknowledged and flushed is found again; what is removed stays removed.
//!
//! What is absent: network, cluster, tokens, models, threads. Time is an argument.

mod check;
mod dram;
mod engine;
mod expiry;
mod format;
mod index;
pub mod layout;
mod leases;
pub mod mutation;
mod recovery;
mod segments;
mod shard;
mod snapshot;
mod survey;
mod table;

pub use check::{CheckReport, Damage, InspectReport, SegmentReport, check, inspect};
pub use engine::{Engine, Loaded, arena_bytes, memory_bytes};
pub use format::{FormatOptions, OpenError, format, format_probed, read_superblock};
pub use index::{Entry, Index, Inserted};
pub use kvar_policy::{Shares, TENANTS, Tenant, WEIGHT_MAX, WriteRates};
pub use layout::{FormatError, Superblock};
pub use leases::{LEASE_DEFAULT, LEASE_MAX};
pub use recovery::RecoveryReport;
pub use shard::{
    BlockStat, Change, Copy, Counters, Demoted, Demotion, Displaced, EngineConfig, Event,
    GetRequest, LeaseGrant, LeaseRequest, Moved, Places, PutHints, PutRequest, PutTicket,
    ReadHints, SectionRef, ShardStatus, ShutdownReport, Standing, TenantCounters, TenantStatus,
    Tier, Touch,
};
pub use survey::{
    SurveyedBlock, SurveyedSegment, SurveyedSegments, survey_arena_bytes, survey_blocks,
    survey_segments,
};
