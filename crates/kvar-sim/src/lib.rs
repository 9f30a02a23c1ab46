//! The engine over a disk that misbehaves, against an oracle, by seed.
//!
//! ```text
//!   seed ──> scenario ──> world: writers, readers, restarts ──> engine ──> simulated disk
//!                            │  every call and answer              │ journal    │ faults struck
//!                            └──────────────> model <──────────────┴────────────┘
//!                                  what may be read, what must be
//! ```
//!
//! | file | question |
//! |---|---|
//! | `dice` | what does a seed decide? |
//! | `payload` | which bytes does a put have? |
//! | `model` | the oracle: which bytes may a read return; which misses are deserved? |
//! | `promises` | the oracle of leases: what is promised to whom, and what does it cost? |
//! | `device` | which bytes of the disk did a fault touch, and what does that excuse? |
//! | `world` | one store with its oracle: calls, answers, restarts |
//! | `scenario` | what happens under one seed? |
//! | `churn` | does a store that is written over many times stay what it was? |
//! | `file_churn` | and on a real file, with a real device? |
//! | `crash` | what does every moment of a power cut leave? |
//! | `tally` | did every kind of fault and outcome happen? |
//! | `many` | many seeds on several threads |
//!
//! What must always be true: a seed always gives the same run; a failure names its seed; a miss
//! passes only if the journal of the engine says why the block is gone, and the disk agrees.
//!
//! What is absent: threads inside a run, clocks, randomness that no seed decides; the network.
//! `docs/internals/proof.md` is the story of it.

pub mod churn;
pub mod crash;
mod device;
pub mod dice;
pub mod file_churn;
pub mod many;
mod model;
mod payload;
mod promises;
pub mod scenario;
pub mod tally;
mod world;

pub use model::Model;
pub use world::{Restart, Violation, World};
