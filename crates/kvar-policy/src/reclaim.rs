//! What a reclaimed flash segment passes on.
//!
//! The flash is a ring of segments, filled once from front to back and reclaimed whole, oldest
//! first. At its reclaim each live block of a segment is kept (written again at the log's head)
//! or dropped:
//!
//! ```text
//!            oldest                                            head
//!   ... free | seg 12 | seg 13 | ............ | seg 40 | seg 41 > free
//!                |  begin(facts)                           ^
//!                |  verdict(block) --- Keep ---------------+   rewritten: costs flash wear
//!                +------------------- Drop ----------------- > a miss from now on
//! ```
//!
//! What must always be true: of any segment at most [`KEPT_SHARE_MAX`] of the payload is kept, so
//! a reclaim frees space and write amplification is bounded by 1 / (1 - that share).
//!
//! What it leaves to the engine: leased blocks (never asked about, always copied on), expired and
//! removed ones (never asked about, never copied), the ring itself.

use crate::clock::TICKS_PER_TURNOVER;

/// The greatest value of [`BlockFacts::frequency`]: two bits of an index entry.
pub const FREQUENCY_MAX: u8 = 3;

/// The largest share of a segment's payload that a reclaim may write again: write amplification
/// is at most 4. A half would cost chat traffic 1.7 points of hit rate, while what is reached in the
/// mean stays below 1.4 without a tighter bound.
pub const KEPT_SHARE_MAX: f64 = 0.75;

/// No policy keeps a block of this age or more: one turnover since its last touch. The
/// [`CoarseClock`](crate::CoarseClock) relies on it.
pub const KEEP_AGE_MAX: u8 = TICKS_PER_TURNOVER;

/// The segment about to be reclaimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentFacts {
    /// Blocks the index still points to here.
    pub live_blocks: u64,
    /// Their bytes, padding included.
    pub live_bytes: u64,
    /// The bytes of blocks a segment can hold.
    pub payload_bytes: u64,
}

/// What the index entry and the record say about one live block: eleven bits of policy
/// (touched 1, frequency 2, stamp 8), the rest from the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockFacts {
    /// Read, or put again, since it was last written to flash.
    pub touched: bool,
    /// How often it was touched since its first write, saturating at [`FREQUENCY_MAX`].
    pub frequency: u8,
    /// Time since its last touch (its put is one, a rewrite is none), in ticks of 1/64 turnover,
    /// as [`CoarseClock::age`](crate::CoarseClock::age) gives it.
    pub age: u8,
    /// Its bytes on flash, padding included.
    pub bytes: u64,
    /// Its position in its prompt.
    pub depth: u32,
}

/// What becomes of a block whose segment is reclaimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Write it again at the head of the log.
    Keep,
    /// Let it go.
    Drop,
}

/// Decides what a reclaimed segment passes on: one [`begin`](Self::begin), then one
/// [`verdict`](Self::verdict) for each live block, in any order.
pub trait ReclaimPolicy {
    /// A segment is about to be reclaimed.
    fn begin(&mut self, segment: SegmentFacts);
    /// Keep or drop this live block of it.
    fn verdict(&mut self, block: &BlockFacts) -> Verdict;
}

/// The production policy: keep what was touched since it was written, and not too long ago; the
/// more often it was touched, the longer.
///
/// | touched since its first put | kept if the last touch is less than this ago |
/// |---|---|
/// | once | 32 ticks, half a turnover |
/// | twice | 40 ticks |
/// | three times or more | 48 ticks, three quarters of a turnover |
///
/// Why: a kept block lives a whole turnover more, wanted or not, and shortens the turnover for all
/// others. So one that nobody came back to for half a turnover is not worth the room, unless it
/// has shown that it is one people come back to. Block-exact LRU, which this follows, would let
/// blocks live one turnover after the last touch; these live between 1.5 and 1.75 at the most.
/// The measurements are in `docs/decisions/0002-reclaim-policy.md`.
#[derive(Clone, Debug)]
pub struct RecentlyUsed {
    keep_age: [u8; FREQUENCY_MAX as usize],
    kept_share: f64,
    budget_bytes: u64,
}

impl RecentlyUsed {
    /// Ticks by frequency; see the table above.
    const KEEP_AGE: [u8; FREQUENCY_MAX as usize] = [32, 40, 48];

    /// The measured default.
    #[must_use]
    pub fn new() -> Self {
        Self::with_limits(Self::KEEP_AGE, KEPT_SHARE_MAX)
    }

    /// Keeps blocks touched once, twice, three times or more if that was less than so many ticks
    /// ago (at most [`KEEP_AGE_MAX`]), and of a segment no more than `kept_share` of its payload
    /// (at most [`KEPT_SHARE_MAX`]; what is no number counts as none).
    #[must_use]
    pub fn with_limits(keep_age: [u8; FREQUENCY_MAX as usize], kept_share: f64) -> Self {
        Self {
            keep_age: keep_age.map(|ticks| ticks.min(KEEP_AGE_MAX)),
            kept_share: kept_share.clamp(0.0, KEPT_SHARE_MAX),
            budget_bytes: 0,
        }
    }
}

impl Default for RecentlyUsed {
    fn default() -> Self {
        Self::new()
    }
}

impl ReclaimPolicy for RecentlyUsed {
    fn begin(&mut self, segment: SegmentFacts) {
        self.budget_bytes = (segment.payload_bytes as f64 * self.kept_share) as u64;
    }

    fn verdict(&mut self, block: &BlockFacts) -> Verdict {
        // A touched block was touched at least once, even if its index entry does not count.
        let times = usize::from(block.frequency.clamp(1, FREQUENCY_MAX));
        let is_wanted = block.touched && block.age < self.keep_age[times - 1];
        if !is_wanted || block.bytes > self.budget_bytes {
            return Verdict::Drop;
        }
        self.budget_bytes -= block.bytes;
        Verdict::Keep
    }
}

/// The plain ring: passes nothing on. The yardstick of write amplification 1.
#[derive(Clone, Copy, Debug, Default)]
pub struct DropAll;

impl ReclaimPolicy for DropAll {
    fn begin(&mut self, _segment: SegmentFacts) {}
    fn verdict(&mut self, _block: &BlockFacts) -> Verdict {
        Verdict::Drop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: SegmentFacts = SegmentFacts {
        live_blocks: 16,
        live_bytes: 16 << 16,
        payload_bytes: 16 << 16,
    };
    const BLOCK: BlockFacts = BlockFacts {
        touched: true,
        frequency: 1,
        age: 0,
        bytes: 1 << 16,
        depth: 0,
    };

    #[test]
    fn recent_and_frequent_blocks_stay() {
        let check = |block: BlockFacts, expected: Verdict| {
            let mut policy = RecentlyUsed::new();
            policy.begin(SEGMENT);
            assert_eq!(policy.verdict(&block), expected, "{block:?}");
        };
        check(BLOCK, Verdict::Keep);
        check(
            BlockFacts {
                frequency: 0,
                ..BLOCK
            },
            Verdict::Keep,
        );
        check(
            BlockFacts {
                touched: false,
                ..BLOCK
            },
            Verdict::Drop,
        );
        for (frequency, age) in [(1, 32), (2, 40), (3, 48), (255, 48)] {
            check(
                BlockFacts {
                    frequency,
                    age: age - 1,
                    ..BLOCK
                },
                Verdict::Keep,
            );
            check(
                BlockFacts {
                    frequency,
                    age,
                    ..BLOCK
                },
                Verdict::Drop,
            );
        }
    }

    #[test]
    fn a_reclaim_always_frees_its_share() {
        let mut policy = RecentlyUsed::new();
        for _ in 0..3 {
            policy.begin(SEGMENT);
            let kept = (0..16)
                .filter(|_| policy.verdict(&BLOCK) == Verdict::Keep)
                .count();
            assert_eq!(kept, 12);
        }
        // A block that does not fit the rest leaves room for smaller ones.
        policy.begin(SEGMENT);
        assert_eq!(
            policy.verdict(&BlockFacts {
                bytes: 13 << 16,
                ..BLOCK
            }),
            Verdict::Drop
        );
        assert_eq!(
            policy.verdict(&BlockFacts {
                bytes: 12 << 16,
                ..BLOCK
            }),
            Verdict::Keep
        );
        assert_eq!(
            policy.verdict(&BlockFacts { bytes: 1, ..BLOCK }),
            Verdict::Drop
        );
    }

    #[test]
    fn no_limits_given_go_beyond_what_the_clock_relies_on() {
        let mut policy = RecentlyUsed::with_limits([u8::MAX; 3], f64::INFINITY);
        policy.begin(SEGMENT);
        assert_eq!(
            policy.verdict(&BlockFacts {
                age: KEEP_AGE_MAX,
                ..BLOCK
            }),
            Verdict::Drop
        );
        assert_eq!(
            policy.verdict(&BlockFacts {
                bytes: 13 << 16,
                ..BLOCK
            }),
            Verdict::Drop
        );
        let mut nothing = RecentlyUsed::with_limits([64; 3], f64::NAN);
        nothing.begin(SEGMENT);
        assert_eq!(nothing.verdict(&BLOCK), Verdict::Drop);
        let mut ring = DropAll;
        ring.begin(SEGMENT);
        assert_eq!(ring.verdict(&BLOCK), Verdict::Drop);
    }
}
