//! What to keep: the order in which DRAM lets go, and what a reclaimed flash segment passes on.
//!
//! | question | answer | file |
//! |---|---|---|
//! | which block leaves DRAM next? | the least recently used; within one prompt the tail first | [`TailFirstLru`] |
//! | which blocks of the oldest flash segment are written again? | those touched recently enough | [`RecentlyUsed`] behind [`ReclaimPolicy`] |
//! | how long ago was that, in a byte of the index entry? | 1/64 of a turnover of the flash | [`CoarseClock`] |
//!
//! What must always be true:
//! * nothing here does I/O, reads a clock or decides by chance: the same calls give the same
//!   answers, so that the offline replay shows what a node would do;
//! * a reclaim always frees a stated share of its segment ([`KEPT_SHARE_MAX`]), whatever is asked.
//!
//! What is absent: devices, leases and expiry (the engine asks here only about blocks that are
//! free to go), tokens, placement.

mod clock;
mod lru;
mod reclaim;

pub use clock::{AGE_MAX, CoarseClock, TICKS_PER_TURNOVER};
pub use lru::TailFirstLru;
pub use reclaim::{
    BlockFacts, DropAll, FREQUENCY_MAX, KEEP_AGE_MAX, KEPT_SHARE_MAX, RecentlyUsed, ReclaimPolicy,
    SegmentFacts, Verdict,
};
