//! What to keep: the order in which DRAM lets go, and who gets and keeps a place on flash.
//!
//! | question | answer | file |
//! |---|---|---|
//! | what is known of a block? | uses, length of the prompt, and what its writer said | [`BlockClass`] |
//! | when do blocks of this kind come back? | counted on a sample of all that is asked for | [`ReuseModel`] |
//! | what does a hit save? | the writer's word against the mean of all | [`CostScale`] |
//! | which block leaves DRAM next? | the tail of the prompt that is worth least | [`WorthOrder`] |
//! | which blocks are written to flash, and which again? | those worth more than a threshold that finds itself | [`FlashKeeper`] |
//! | was a block here before? | two bytes for each that was let go | [`GhostList`] |
//! | all of these, for a store | one clock, one set of figures | [`Keep`] |
//! | whose block leaves, where several share a store? | that of whoever is furthest beyond its part | [`Shares`] |
//! | may flash be written at all? | within so many bytes a day | [`WriteBudget`] |
//!
//! What it is measured against, by replay alone:
//!
//! | question | answer | file |
//! |---|---|---|
//! | which block leaves DRAM next? | the least recently used; within one prompt the tail first | [`TailFirstLru`] |
//! | which blocks of the oldest flash segment are written again? | those touched recently enough | [`RecentlyUsed`] behind [`ReclaimPolicy`] |
//! | how long ago was that? | in 1/64 of a turnover of the flash | [`CoarseClock`] |
//!
//! What must always be true:
//! * nothing here does I/O, reads a clock or decides by chance: the same calls give the same
//!   answers, so that the offline replay shows what a node would do;
//! * a reclaim always frees a stated share of its segment ([`KEPT_SHARE_MAX`]), whatever is asked
//!   ([`FlashKeeper`]: on the average of its segments, and something of each).
//!
//! What is absent: devices, leases and expiry (the engine asks here only about blocks that are
//! free to go), tokens, placement.

mod budget;
mod class;
mod clock;
mod cost;
mod flash;
mod ghost;
mod keep;
mod lru;
mod reclaim;
mod reuse;
mod share;
mod worth;

pub use budget::{Admission, WriteBudget, WriteRates};
pub use class::{BlockClass, CLASSES, HABITS, KINDS, Kind};
pub use clock::{AGE_MAX, CoarseClock, TICKS_PER_TURNOVER};
pub use cost::{COSTS, Cost, CostScale};
pub use flash::{Asking, FlashKeeper, KEPT_SHARE_TARGET};
pub use ghost::GhostList;
pub use keep::{Keep, SWEEP_TICKS, Said, StoreShape};
pub use lru::TailFirstLru;
pub use reclaim::{
    BlockFacts, DropAll, FREQUENCY_MAX, KEEP_AGE_MAX, KEPT_SHARE_MAX, RecentlyUsed, ReclaimPolicy,
    SegmentFacts, Verdict,
};
pub use reuse::{ReuseModel, SAMPLE_MAX, Voice};
pub use share::{Division, Holdings, Losses, Shares, TENANTS, Tenant, TenantSet, WEIGHT_MAX};
pub use worth::{Candidate, WorthOrder};
