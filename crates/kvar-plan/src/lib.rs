//! Planning: traces of real traffic, and what a store of a given capacity would hit on them.
//!
//! * [`trace`] reads the Mooncake and the Qwen-Bailian form, and folds small blocks into larger;
//! * [`offline`] replays a trace against capacities: the pure policy with unit blocks, or a model
//!   of the real engine (DRAM tier, segments, reserve, rewriting, a big tier of flash below) around the
//!   production policy.
//!
//! * [`shared`] replays several traces in one store: what each keeps beside the others.
//!
//! What must always be true: a hit counts only while every earlier block of its request hit,
//! since only a prefix saves computation; every rate is printed beside the ceiling, which is what
//! a cache of unlimited size would reach on the same trace.
//!
//! What is absent: files, compression, clocks, chance. The caller opens and decompresses.

mod engine_model;
mod learned_model;
pub mod offline;
mod optimum;
pub mod shared;
pub mod trace;

pub use engine_model::FlashShape;
pub use offline::{
    Admit, BigRow, Capacity, CapacityError, Model, OfflineError, OfflineOptions, OfflineReport,
    OfflineRow, Policy, replay_offline, replay_offline_with,
};
pub use shared::{
    Share, SharedOptions, SharedReport, SharedRow, SharedWrites, flood, replay_shared,
};
pub use trace::{Coverage, Request, Trace, TraceError, TraceOptions};
