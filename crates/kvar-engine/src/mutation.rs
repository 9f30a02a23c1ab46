//! Checks that can be switched off, to show that the simulator sees when one is missing.
//!
//! | built | [`is_disabled`] |
//! |---|---|
//! | without the feature `mutations` (every release) | `false`, a constant: the compiler leaves nothing of it |
//! | with it (the mutation tests alone) | what this thread last disabled |
//!
//! What must always be true: nothing outside a test can disable a check. A site reads as the
//! condition it had, and `|| is_disabled(...)` or `&& !is_disabled(...)` behind it.
//!
//! `docs/internals/proof.md` says which is found how soon.

/// A check without which something goes wrong sooner or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Pages of an older generation of a segment are not taken for this one's.
    Generation,
    /// The generation is part of `check64`.
    PlaceGeneration,
    /// The id is part of `check64`.
    IdFold,
    /// Stored bytes must match `check64` and their content checks.
    Bytes,
    /// A page must match its own check.
    Page,
    /// A directory page goes to two places by turns.
    TwoPlaces,
    /// Tombstones and purges are heeded at recovery.
    Tombstone,
    /// A segment that is being read is not written.
    Readers,
    /// Recovery replays in the order of events.
    SequenceOrder,
    /// Entries of a checkpoint whose segment was opened again since are dropped.
    CheckpointGeneration,
    /// A put's bytes must be what its writer said.
    ContentCheck,
    /// A block is recorded when its bytes are on the device, not before.
    RecordAfterPayload,
    /// What was kept of a segment is flushed elsewhere before the segment is free.
    FlushBeforeReuse,
    /// A new header is flushed before anything else of its generation is written.
    HeaderFlush,
    /// The new copy of a moved block is flushed before its record is written.
    MovedPayloadFlush,
    /// The blocks that a checkpoint knows are flushed before its first chunk is written.
    CheckpointFlush,
    /// What is promised by a lease does not leave.
    Lease,
    /// What is over is not served.
    Expiry,
    /// Recovery reads from the records when blocks expire.
    ExpiryAtRecovery,
    /// Where blocks expire, the records of what a checkpoint knows are flushed before it is complete.
    CheckpointRecords,
    /// The scrub verifies what it reads.
    Scrub,
    /// A block that goes down stays until the tier below has flushed it.
    FlushedBelow,
}

impl Check {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::Generation,
        Self::PlaceGeneration,
        Self::IdFold,
        Self::Bytes,
        Self::Page,
        Self::TwoPlaces,
        Self::Tombstone,
        Self::Readers,
        Self::SequenceOrder,
        Self::CheckpointGeneration,
        Self::ContentCheck,
        Self::RecordAfterPayload,
        Self::FlushBeforeReuse,
        Self::HeaderFlush,
        Self::MovedPayloadFlush,
        Self::CheckpointFlush,
        Self::Lease,
        Self::Expiry,
        Self::ExpiryAtRecovery,
        Self::CheckpointRecords,
        Self::Scrub,
        Self::FlushedBelow,
    ];
}

/// Whether a check is switched off.
#[cfg(not(feature = "mutations"))]
#[inline]
#[must_use]
pub const fn is_disabled(_: Check) -> bool {
    false
}

/// Bits of an index tag that count: all of them.
#[cfg(not(feature = "mutations"))]
#[inline]
pub(crate) const fn tag_mask() -> u64 {
    u64::MAX
}

#[cfg(feature = "mutations")]
pub(crate) use switched::tag_mask;
#[cfg(feature = "mutations")]
pub use switched::{Disabled, disable, is_disabled, weaken_tags};

#[cfg(feature = "mutations")]
mod switched {
    use super::Check;
    use std::cell::Cell;

    thread_local! {
        static DISABLED: Cell<u32> = const { Cell::new(0) };
        static TAG_MASK: Cell<u64> = const { Cell::new(u64::MAX) };
    }

    /// Keeps checks of this thread switched off until it is dropped.
    #[derive(Debug)]
    #[must_use = "the checks are on again when this is dropped"]
    pub struct Disabled {
        disabled: u32,
        tag_mask: u64,
    }

    impl Drop for Disabled {
        fn drop(&mut self) {
            DISABLED.set(self.disabled);
            TAG_MASK.set(self.tag_mask);
        }
    }

    fn before() -> Disabled {
        Disabled {
            disabled: DISABLED.get(),
            tag_mask: TAG_MASK.get(),
        }
    }

    /// Switches checks off on this thread.
    pub fn disable(checks: &[Check]) -> Disabled {
        let before = before();
        let bits = checks
            .iter()
            .fold(0, |bits, check| bits | 1 << *check as u32);
        DISABLED.set(before.disabled | bits);
        before
    }

    /// Leaves so many bits of every index tag on this thread, so that two ids that are taken for
    /// one happen every few hundred blocks instead of every hundred million.
    pub fn weaken_tags(bits: u32) -> Disabled {
        let before = before();
        TAG_MASK.set((1 << bits) - 1);
        before
    }

    /// Whether a check is switched off on this thread.
    #[must_use]
    pub fn is_disabled(check: Check) -> bool {
        DISABLED.get() & 1 << check as u32 != 0
    }

    pub(crate) fn tag_mask() -> u64 {
        TAG_MASK.get()
    }
}
