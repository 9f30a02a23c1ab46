//! The devices of a node: which there are, which blocks lie on which, what happens when one goes.
//!
//! ```text
//!              add                 load, drop what was removed meanwhile
//!   (blank) ────────> joining ──────────────────────────────────> online
//!                        ▲                                       │  │  │ retire
//!              add       │          refuses for good, is gone    │  │  ▼
//!        ┌───────────────┴─── failed <───────────────────────────┘  │ leaving: its blocks move
//!   missing (at start)                                  node stops  │  │ moved, or retire --now
//!                                                                   │  ▼ (replace: at once)
//!                                                                   │ retired ── add ──> joining, empty
//! ```
//!
//! | file | question |
//! |---|---|
//! | `table` | which devices belong to this store, in which slots? On disk, beside the key |
//! | `routes` | which engine has a block? |
//! | `watch` | is a device still one? |
//! | `admit` | may this device come in? |
//! | `memory` | who has how much of it? |
//! | `removal` | what does a remove tell the keeper before it begins, and when is it over? |
//! | `keeper` | the thread that decides: opens, fences, adds, retires, replaces |
//! | `surveyor` | what is on a device that leaves? |
//! | `view` | what status, metrics and `kvar device list` say of them |
//!
//! `docs/internals/devices.md` has the tables, the rule and its reasons.
//!
//! What must always be true: a block is asked for where the routes say, and never two engines at
//! once; a block that was removed while its device was away does not come back with the device.

mod admit;
mod keeper;
mod memory;
mod removal;
mod routes;
mod surveyor;
mod table;
mod view;
mod watch;

pub(crate) use keeper::{Command, Event, Fatal, Keeper, KeeperParts, NewDevice, Note};
pub(crate) use removal::{Removal, Removed};
pub(crate) use routes::{RoutedDevice, Routes};
pub use table::TableError;
pub(crate) use table::{DeviceState, DeviceTable, Entry};
pub use view::{DeviceReport, DeviceView, Moved, Phase};
pub(crate) use view::{View, Views};
pub(crate) use watch::{Sign, Watch, WatchedDevice, is_hard};
