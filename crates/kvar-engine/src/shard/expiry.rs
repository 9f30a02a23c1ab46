//! What is over: blocks whose time to live has passed.
//!
//! Time to live is kept as a moment of wall time, in whole seconds rounded up, so that it means the
//! same after a restart. The shard reads no clock: it was told what wall time `Moment(0)` was, and
//! is told again when the machine's clock was set.
//!
//! What must always be true: what is over is no hit, wherever it lies; a clock that is set makes
//! times to live longer or shorter, and brings nothing back that was removed.
//!
//! What is over is not hunted for: it is a miss when somebody asks, and leaves for good with its
//! segment, with the scrub, with a new put, or, in memory, a minute later.

use super::{Displaced, Shard};
use crate::index::Entry;
use crate::mutation::{Check, is_disabled};
use kvar_base::{BlockId, MissReason, Moment};

/// How long a block in memory is still known as expired, in seconds, before it is forgotten.
const FORGOTTEN_AFTER_S: u64 = 60;

impl Shard {
    /// Seconds since 1970.
    pub(super) fn unix_s(&self, now: Moment) -> u64 {
        self.unix_at_start_s + now.0 / 1_000_000
    }

    /// The machine's clock was set: this is wall time now.
    pub(crate) fn set_wall_clock(&mut self, now: Moment, unix_s: u64) {
        self.unix_at_start_s = unix_s.saturating_sub(now.0 / 1_000_000);
    }

    /// When a block put now with this time to live expires; 0: never.
    pub(super) fn expiry(&self, now: Moment, ttl_s: Option<u32>) -> u32 {
        let Some(ttl_s) = ttl_s else { return 0 };
        // Rounded up: it lives as long as was asked for, and less than a second more.
        let begun = self.unix_at_start_s + now.0.div_ceil(1_000_000);
        u32::try_from(begun + u64::from(ttl_s)).unwrap_or(u32::MAX)
    }

    /// When what an entry leads to expires; 0: never.
    pub(super) fn flash_expiry(&self, entry: &Entry) -> u32 {
        let (segment, page) = self.segments.locate(entry.position);
        self.expiries.of(segment, page)
    }

    /// Whether a block with this expiry may not be served any more. A lease holds it.
    pub(super) fn is_over(&self, now: Moment, id: &BlockId, expires_unix_s: u32) -> bool {
        expires_unix_s != 0
            && u64::from(expires_unix_s) <= self.unix_s(now)
            && !self.leases.holds(id)
            && !is_disabled(Check::Expiry)
    }

    /// Time has passed: ends leases and forgets what has been over for a while.
    pub(super) fn pass_time(&mut self, now: Moment) {
        self.now = now;
        self.end_leases(now);
        let before = self.unix_s(now).saturating_sub(FORGOTTEN_AFTER_S);
        loop {
            let free = |id: &BlockId| !self.leases.holds(id);
            let Some(id) = self.dram.expired_before(before).find(free) else {
                return;
            };
            self.forget_resident(&id);
            self.note(super::Change::Expired { id });
            self.counters.expired += 1;
        }
    }

    /// Takes the entry of an expired block out.
    pub(super) fn drop_expired(&mut self, id: &BlockId, position: u32) {
        if self.index.remove_at(id, position) {
            self.counters.expired += 1;
            self.note_displaced(id, position, Displaced::Expired);
        }
    }

    /// A put of an id that is not visible: what is left of an expired block makes room. Whoever
    /// asks from now on must not be given what a read of the old copy still finds.
    pub(super) fn clear_expired(&mut self, id: &BlockId) {
        self.end_reads(id, MissReason::Expired);
        if self.forget_resident(id) {
            self.counters.expired += 1;
            self.note(super::Change::Expired { id: *id });
        }
        if let Some((_, entry)) = self.find(id) {
            self.drop_expired(id, entry.position);
        }
    }
}
