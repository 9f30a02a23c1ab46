//! The engine, as far as hit rate and wear can tell: a DRAM tier above a ring of segments.
//!
//! ```text
//!   put --> DRAM (TailFirstLru, D blocks) --> gone, still on flash
//!    |        ^ promoted by a hit
//!    +----> flash:  | sealed | sealed | ... | open |  + 1 free, the reserve
//!                     oldest: reclaimed when the open one is full and the free one opens
//! ```
//!
//! * A put goes into DRAM and is appended to flash at once (`flush_after` is short against
//!   everything measured here). A put of a present block touches it.
//! * A hit touches the block wherever it is; one found on flash alone is promoted to DRAM.
//! * Reclaim asks the production [`ReclaimPolicy`]; what it keeps is appended again, what it drops
//!   is gone unless DRAM holds it, and then until DRAM lets go of it.
//!
//! What it leaves out: leases, removes, expiry, blocks of different sizes, segment headers and
//! directories beyond the share [`PAYLOAD_SHARE`] stands for.

use crate::offline::{Store, Writes};
use kvar_policy::{
    BlockFacts, CoarseClock, FREQUENCY_MAX, ReclaimPolicy, SegmentFacts, TailFirstLru, Verdict,
};
use std::collections::VecDeque;

/// What headers, directories and the footer leave of a segment for blocks.
const PAYLOAD_SHARE: f64 = 0.99;
const SEGMENT_BYTES_MIN: u64 = 1 << 20;
const SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// A device has about this many segments, between the bounds above.
const SEGMENTS_WANTED: u64 = 256;
const PAGE_BYTES: u64 = 4096;

/// How the flash is cut into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashShape {
    /// Segments that hold payload: all but the one in reserve.
    pub segments: u64,
    /// Blocks that fit one.
    pub blocks_per_segment: u64,
    /// Bytes of one block.
    pub block_bytes: u64,
}

impl FlashShape {
    /// The largest block that is modelled: a quarter of the largest segment.
    pub const BLOCK_BYTES_MAX: u64 = SEGMENT_BYTES_MAX / 4;

    /// The engine's layout for a flash with room for `flash_blocks` blocks of `block_bytes`.
    ///
    /// Segments are at least 1 MiB; a flash smaller than one of them becomes one smaller segment,
    /// so that tiny traces can be replayed.
    #[must_use]
    pub fn new(flash_blocks: u64, block_bytes: u64) -> Self {
        let flash_bytes = flash_blocks.saturating_mul(block_bytes);
        let segment_bytes = (flash_bytes / SEGMENTS_WANTED / PAGE_BYTES * PAGE_BYTES)
            .clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX);
        let fit = (segment_bytes as f64 * PAYLOAD_SHARE) as u64 / block_bytes.max(1);
        let blocks_per_segment = fit.min(flash_blocks).max(1);
        let segments = (flash_blocks / blocks_per_segment).max(1);
        Self {
            segments,
            blocks_per_segment,
            block_bytes,
        }
    }

    /// Blocks of the smallest flash that is two segments.
    pub(crate) fn two_segments(block_bytes: u64) -> u64 {
        let fit = (SEGMENT_BYTES_MIN as f64 * PAYLOAD_SHARE) as u64 / block_bytes.max(1);
        fit.max(1) * 2
    }

    pub(crate) fn payload_bytes(&self) -> u64 {
        self.blocks_per_segment.saturating_mul(self.block_bytes)
    }
}

/// What the index says of a block on flash.
#[derive(Clone, Copy)]
struct Entry {
    /// The number of its segment, counted up for ever; [`NOWHERE`] if it is not on flash.
    segment: u64,
    depth: u32,
    stamp: u8,
    frequency: u8,
    touched: bool,
}

const NOWHERE: u64 = u64::MAX;
const ABSENT: Entry = Entry {
    segment: NOWHERE,
    depth: 0,
    stamp: 0,
    frequency: 0,
    touched: false,
};

/// The store under replay.
pub(crate) struct EngineModel<P> {
    dram_blocks: u64,
    dram: TailFirstLru<u32>,
    shape: FlashShape,
    clock: CoarseClock,
    entries: Vec<Entry>,
    /// Blocks by segment, oldest first; the last one is open. A block that an entry no longer
    /// places there is dead.
    segments: VecDeque<Vec<u32>>,
    /// The number of the oldest segment.
    oldest: u64,
    writes: Writes,
    policy: P,
}

impl<P: ReclaimPolicy> EngineModel<P> {
    pub(crate) fn new(distinct: u64, dram_blocks: u64, shape: FlashShape, policy: P) -> Self {
        Self {
            dram_blocks,
            dram: TailFirstLru::new(),
            clock: CoarseClock::new(shape.segments.saturating_mul(shape.payload_bytes())),
            shape,
            entries: vec![ABSENT; distinct as usize],
            segments: VecDeque::from([Vec::new()]),
            oldest: 0,
            writes: Writes::default(),
            policy,
        }
    }

    fn appended_bytes(&self) -> u64 {
        (self.writes.put + self.writes.again).saturating_mul(self.shape.block_bytes)
    }

    fn touch_flash(&mut self, block: u32) {
        let stamp = self.clock.stamp(self.appended_bytes());
        let entry = &mut self.entries[block as usize];
        if entry.segment != NOWHERE {
            entry.stamp = stamp;
            entry.touched = true;
            entry.frequency = (entry.frequency + 1).min(FREQUENCY_MAX);
        }
    }

    fn touch_dram(&mut self, block: u32, request: u64, depth: u32) {
        self.dram.touch(block, request, depth);
        while self.dram.len() as u64 > self.dram_blocks {
            self.dram.pop_coldest();
        }
    }

    /// Writes a block that is not on flash. A full open segment is sealed first, the free one
    /// opened, and the oldest reclaimed, which makes it the free one.
    fn append(&mut self, block: u32, depth: u32) {
        while self.open().len() as u64 >= self.shape.blocks_per_segment {
            self.segments.push_back(Vec::new());
            if self.segments.len() as u64 > self.shape.segments {
                self.reclaim();
            }
        }
        self.entries[block as usize] = Entry {
            depth,
            stamp: self.clock.stamp(self.appended_bytes()),
            ..ABSENT
        };
        self.writes.put += 1;
        self.place(block);
    }

    fn open(&mut self) -> &mut Vec<u32> {
        if self.segments.is_empty() {
            self.segments.push_back(Vec::new());
        }
        let last = self.segments.len() - 1;
        &mut self.segments[last]
    }

    fn place(&mut self, block: u32) {
        self.open().push(block);
        self.entries[block as usize].segment = self.oldest + self.segments.len() as u64 - 1;
    }

    fn reclaim(&mut self) {
        let number = self.oldest;
        let blocks = self.segments.pop_front().unwrap_or_default();
        self.oldest += 1;
        let is_live = |entries: &[Entry], block: u32| entries[block as usize].segment == number;
        let live_blocks = blocks
            .iter()
            .filter(|block| is_live(&self.entries, **block))
            .count() as u64;
        self.policy.begin(SegmentFacts {
            live_blocks,
            live_bytes: live_blocks * self.shape.block_bytes,
            payload_bytes: self.shape.payload_bytes(),
        });
        // A reclaim that frees nothing would never end: whatever a policy says, one block goes.
        let (mut kept, kept_max) = (0, self.shape.blocks_per_segment - 1);
        for block in blocks {
            if !is_live(&self.entries, block) {
                continue;
            }
            let entry = self.entries[block as usize];
            let verdict = self.policy.verdict(&BlockFacts {
                touched: entry.touched,
                frequency: entry.frequency,
                age: self.clock.age(entry.stamp, self.appended_bytes()),
                bytes: self.shape.block_bytes,
                depth: entry.depth,
            });
            match verdict {
                Verdict::Keep if kept < kept_max => {
                    kept += 1;
                    self.entries[block as usize].touched = false;
                    self.writes.again += 1;
                    self.place(block);
                }
                Verdict::Keep | Verdict::Drop => self.entries[block as usize] = ABSENT,
            }
        }
    }
}

impl<P: ReclaimPolicy> Store for EngineModel<P> {
    fn lookup(&mut self, blocks: &[u32], request: u64) -> usize {
        let is_here = |block: &&u32| {
            self.entries[**block as usize].segment != NOWHERE || self.dram.contains(block)
        };
        let hits = blocks.iter().take_while(is_here).count();
        for (depth, block) in blocks[..hits].iter().enumerate() {
            self.touch_flash(*block);
            self.touch_dram(*block, request, depth as u32);
        }
        hits
    }

    fn put(&mut self, blocks: &[u32], depth: usize, request: u64) {
        for (depth, block) in (depth as u32..).zip(blocks) {
            let on_flash = self.entries[*block as usize].segment != NOWHERE;
            let in_dram = self.dram.contains(block);
            if on_flash || in_dram {
                self.touch_flash(*block);
                if in_dram {
                    self.touch_dram(*block, request, depth);
                }
            } else {
                self.append(*block, depth);
                self.touch_dram(*block, request, depth);
            }
        }
    }

    fn writes(&self) -> Writes {
        self.writes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvar_policy::{DropAll, RecentlyUsed};

    /// Three segments of three blocks each.
    const SHAPE: FlashShape = FlashShape {
        segments: 3,
        blocks_per_segment: 3,
        block_bytes: 256 << 10,
    };

    /// A store that has been put blocks 0 to 8, one request each, so that its flash is full.
    fn full<P: ReclaimPolicy>(dram_blocks: u64, policy: P) -> EngineModel<P> {
        let mut store = EngineModel::new(100, dram_blocks, SHAPE, policy);
        for block in 0..9 {
            store.put(&[block], 0, u64::from(block));
        }
        store
    }

    fn present<P: ReclaimPolicy>(store: &mut EngineModel<P>) -> Vec<u32> {
        (0..100)
            .filter(|block| store.lookup(&[*block], 1000) == 1)
            .collect()
    }

    #[test]
    fn the_shape_is_the_engines() {
        let check = |flash_blocks, block_bytes, segments, blocks_per_segment| {
            let shape = FlashShape {
                segments,
                blocks_per_segment,
                block_bytes,
            };
            assert_eq!(FlashShape::new(flash_blocks, block_bytes), shape);
        };
        check(914, 64 << 10, 60, 15); // 1 MiB, the least
        check(1 << 20, 64 << 10, 1035, 1013); // 64 MiB, the most
        check(32 << 10, 64 << 10, 260, 126); // 8 MiB: 1/256
        check(5, 64 << 10, 1, 5);
        check(0, 64 << 10, 1, 1);
        check(10, 16 << 20, 10, 1);
        check(u64::MAX, 1, u64::MAX / 66_437_775, 66_437_775);
    }

    #[test]
    fn the_oldest_segment_leaves_whole() {
        let mut store = full(0, DropAll);
        store.put(&[9], 0, 9);
        assert_eq!(present(&mut store), [3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(store.writes(), Writes { put: 10, again: 0 });
    }

    #[test]
    fn what_was_touched_is_written_again_within_the_share() {
        let mut store = full(0, RecentlyUsed::new());
        assert_eq!(store.lookup(&[1], 20), 1);
        store.put(&[9], 0, 21);
        assert_eq!(store.writes(), Writes { put: 10, again: 1 });
        assert_eq!(present(&mut store), [1, 3, 4, 5, 6, 7, 8, 9]);
        // Now all are touched; of each segment two of three blocks fit the share.
        store.put(&[10], 0, 22);
        store.put(&[11], 0, 23);
        assert_eq!(store.writes(), Writes { put: 12, again: 3 });
        assert_eq!(present(&mut store), [1, 3, 4, 6, 7, 8, 9, 10, 11]);
    }

    #[test]
    fn a_put_of_a_present_block_touches_it_and_writes_nothing() {
        let mut store = full(0, RecentlyUsed::new());
        store.put(&[2], 0, 20);
        store.put(&[9], 0, 21);
        assert_eq!(store.writes(), Writes { put: 10, again: 1 });
        assert!(present(&mut store).contains(&2));
    }

    #[test]
    fn dram_holds_what_flash_let_go_and_takes_in_what_flash_hit() {
        let mut store = full(2, DropAll);
        assert_eq!(store.lookup(&[0], 20), 1); // promoted; 8 stays, 7 leaves DRAM
        store.put(&[9], 0, 21); // flash drops 0, 1, 2; DRAM lets go of 8
        assert_eq!(store.lookup(&[0], 22), 1);
        assert_eq!(store.lookup(&[1], 23), 0);
        store.put(&[10, 11], 0, 24); // DRAM lets go of 0 at last
        assert_eq!(store.lookup(&[0], 25), 0);
        assert_eq!(store.writes(), Writes { put: 12, again: 0 });
    }

    #[test]
    fn a_policy_that_keeps_everything_is_overruled() {
        struct KeepAll;
        impl ReclaimPolicy for KeepAll {
            fn begin(&mut self, _segment: SegmentFacts) {}
            fn verdict(&mut self, _block: &BlockFacts) -> Verdict {
                Verdict::Keep
            }
        }
        let mut store = full(0, KeepAll);
        store.put(&(9..40).collect::<Vec<_>>(), 0, 9);
        assert_eq!(store.writes().put, 40);
        assert!(present(&mut store).contains(&39));
    }
}
