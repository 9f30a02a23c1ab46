//! A disk in memory that misbehaves on purpose, and repeats itself by seed.
//!
//! ```text
//!   SimDevice (a shard's Device) ──┐                 ┌── current image: what reads see
//!   SimDevice (another's)        ──┼──> SimDisk ─────┤      │ a flush moves what it covers
//!   test: inject, crash, log     ──┘   (handle)      └── durable image: what a power cut leaves
//! ```
//!
//! What must always be true:
//! * same options, same operations, same polls: same completions, same bytes, same faults;
//! * a crash image is one that a real drive could leave: all that a completed flush covers, and of
//!   the rest any part, torn at sectors or pages;
//! * every fault that struck is in [`SimDisk::struck`], so that an oracle can tell a store that
//!   lost a block from a disk that did.
//!
//! What it leaves to others: time. An operation takes a number of polls; [`wait`](crate::Device::wait)
//! jumps to the next one that is due.
//!
//! Reading order: image (bytes), faults (what can go wrong), log (crash images), state
//! (what becomes of an operation), disk (handle and device).

mod disk;
mod faults;
mod image;
mod log;
mod random;
mod state;

pub use disk::{SimCounters, SimDevice, SimDisk, SimOptions};
pub use faults::{Fault, FaultKind, FaultOn, FaultRates, FaultStruck, LATE_POLLS_MAX};
pub use image::Image;
pub use log::{Survival, Survived, WriteLog};
