//! The machine, behind safe types: memory that devices can read and write, and devices.
//!
//! ```text
//!   Arena ── allocate ──> Buffer (one owner, writable) ── freeze ──> Shared (many readers)
//!                           │  ▲                                        │  ▲
//!                     Op::Read │ Completion                      Op::Write │ Completion
//!                           ▼  │                                        ▼  │
//!                         Device: Ring (io_uring) | Threads | Sim
//! ```
//!
//! A thread sleeps over its devices, sockets and timers in one place, its [`Reactor`].
//!
//! What must always be true: memory under an operation belongs to that operation. An [`Op`] owns
//! its buffers and gives them back in its [`Completion`], so no one can free or change bytes that
//! a device still reads or writes. That is the whole safety story, and why `unsafe` can live here
//! and nowhere above.
//!
//! What is absent: layout, checksums, policy. A device moves bytes and says how it went.

pub mod calls;
mod check;
mod device;
mod lock;
pub mod memory;
mod open;
mod probe;
mod reactor;
pub mod region;
mod registered;
mod ring;
pub mod shared;
pub mod sim;
mod streams;
mod target;
mod target_error;
mod threads;

pub use device::{Completion, Device, DeviceError, Op};
pub use memory::{Arena, ArenaWatch, Buffer, Shared};
pub use open::{DeviceOptions, IoEngine, open_device};
pub use probe::{WRITES_BYTES_MAX, WRITES_BYTES_MIN, WriteProbe, probe_writes};
pub use reactor::{Bell, Reactor, Ready, Watcher};
pub use ring::{Ring, RingRefused};
pub use shared::SharedMemory;
pub use streams::{Lifetime, NoStreams, WriteStreams};
pub use target::{Target, Wanted};
pub use target_error::TargetError;
pub use threads::Threads;
