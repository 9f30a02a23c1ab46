//! The index on the device, so that recovery need not read every footer.
//!
//! ```text
//!  chunk 0 made, kept ── chunks 1.. written ── records ── flush ── chunk 0 written ── flush ── done
//! ```
//!
//! Written a chunk at a time while everything goes on. That is sound: whatever happens to an entry
//! after the checkpoint began has a record with a sequence number from `replay_from` on, and
//! replaying it again changes nothing; entries that only move are looked after by `snapshot`.
//!
//! What must always be true: a first chunk is on the device only when all others are, so that one
//! that was torn shows by its absence and its number may be given again, and when the blocks are to
//! which its entries lead (so there is a flush before it also when it is the only one): an older
//! record of a moved block is not replayed behind its back. The records of all it knows are flushed
//! before as well: recovery drops an entry of a segment that was written then and that no record names,
//! since it might be one that expires, and a block that reclaim has just moved would be lost with it. The
//! area of the last complete checkpoint is not written before the next one is complete.

use super::{Pending, Shard};
use crate::index::BUCKET_BYTES;
use crate::layout::{
    CHUNK_BYTES, CHUNK_PAYLOAD_BYTES, CheckpointHead, ChunkHead, ChunkPlace, SegmentState,
    encode_chunk,
};
use crate::mutation::{Check, is_disabled};
use kvar_base::Moment;
use kvar_io::{DeviceError, Lifetime, Op, Shared};
use zerocopy::IntoBytes;

/// Share of the segments that may be sealed before the next checkpoint: bounds recovery, and keeps
/// checkpoints below 0.3 % of what is written at 64 KiB a block.
const SEGMENTS_PER_CHECKPOINT_SHARE: u32 = 8;

/// A checkpoint under way.
pub(super) struct CheckpointWrite {
    number: u64,
    /// Head and segment states, as they were when it began.
    prefix: Vec<u8>,
    chunk: u32,
    chunks: u32,
    /// The first chunk, which is written last.
    first: Option<Shared>,
    stage: Stage,
    /// Once all chunks are made: the last record that they may know of.
    known_through: Option<u64>,
    /// Whether an operation is under way: one at a time.
    waiting: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Others,
    OthersFlush,
    First,
    FirstFlush,
}

/// Length of what stands before the buckets; whole buckets, so that none is cut by a chunk border.
pub(crate) fn prefix_bytes(segments: usize) -> usize {
    (size_of::<CheckpointHead>() + segments * size_of::<SegmentState>())
        .next_multiple_of(BUCKET_BYTES)
}

impl Shard {
    pub(super) fn step_checkpoint(&mut self) {
        let every = (self.segments.all.len() as u32 / SEGMENTS_PER_CHECKPOINT_SHARE).max(1);
        if self.checkpoint.is_none()
            && self.sealed_since_checkpoint >= every
            && self.shutdown.is_none()
            && self.trouble.reason().is_none()
        {
            self.force_checkpoint();
        }
        self.write_chunk();
    }

    /// Begins a checkpoint now (one under way is begun anew: it would be out of date).
    pub(super) fn force_checkpoint(&mut self) {
        self.checkpoint_number += 1;
        let mut prefix = Vec::with_capacity(prefix_bytes(self.segments.all.len()));
        let head = CheckpointHead {
            replay_from: self.next_sequence.into(),
            next_sequence: self.next_sequence.into(),
            demand_bytes: self.keep.demand_bytes().into(),
            hash_seed: self.index.seed().into(),
            buckets: (self.index.bucket_count() as u64).into(),
            segments: (self.segments.all.len() as u64).into(),
        };
        prefix.extend_from_slice(head.as_bytes());
        for (number, segment) in (0..).zip(&self.segments.all) {
            let state = SegmentState {
                generation: segment.generation.into(),
                expiring: self.expiries.count(number).into(),
                opened_sequence: segment.opened_sequence.into(),
            };
            prefix.extend_from_slice(state.as_bytes());
        }
        prefix.resize(prefix_bytes(self.segments.all.len()), 0);
        let stream = prefix.len() + self.index.bytes();
        let chunks = stream.div_ceil(CHUNK_PAYLOAD_BYTES) as u32;
        let waiting = self
            .checkpoint
            .as_ref()
            .is_some_and(|checkpoint| checkpoint.waiting);
        self.checkpoint = Some(CheckpointWrite {
            number: self.checkpoint_number,
            prefix,
            chunk: 0,
            chunks,
            first: None,
            stage: if chunks == 1 && is_disabled(Check::CheckpointFlush) {
                Stage::First
            } else {
                Stage::Others
            },
            known_through: None,
            waiting,
        });
        self.index.begin_snapshot();
        self.sealed_since_checkpoint = 0;
        self.write_chunk();
    }

    fn write_chunk(&mut self) {
        let Some(checkpoint) = &mut self.checkpoint else {
            return;
        };
        if checkpoint.waiting {
            return;
        }
        if checkpoint.chunk == checkpoint.chunks {
            let last = self.next_sequence - 1;
            checkpoint.known_through.get_or_insert(last);
            if checkpoint.stage == Stage::Others && self.checkpoint_waits_for_flush() {
                return;
            }
            let Some(checkpoint) = &mut self.checkpoint else {
                return;
            };
            checkpoint.waiting = true;
            let first = (checkpoint.stage == Stage::First).then(|| checkpoint.first.take());
            if let Some(first) = first.flatten() {
                let offset = self
                    .superblock
                    .checkpoint_area(self.number, self.checkpoint_area);
                let buffers = vec![first];
                let lifetime = Lifetime::Pages;
                let op = Op::Write {
                    offset,
                    buffers,
                    lifetime,
                };
                return self.submit(Pending::CheckpointChunk, op);
            }
            checkpoint.stage = match checkpoint.stage {
                Stage::Others => Stage::OthersFlush,
                _ => Stage::FirstFlush,
            };
            return self.submit(Pending::CheckpointFlush, Op::Flush);
        }
        let Some(mut buffer) = self.arena.allocate(CHUNK_BYTES) else {
            return;
        };
        let bytes = buffer.as_mut_slice();
        let head = size_of::<ChunkHead>();
        let first = checkpoint.chunk as usize * CHUNK_PAYLOAD_BYTES;
        let mut filled = 0;
        while filled < CHUNK_PAYLOAD_BYTES {
            let at = first + filled;
            let into = &mut bytes[head + filled..];
            if at < checkpoint.prefix.len() {
                let part = &checkpoint.prefix
                    [at..checkpoint.prefix.len().min(first + CHUNK_PAYLOAD_BYTES)];
                into[..part.len()].copy_from_slice(part);
                filled += part.len();
                continue;
            }
            let bucket = (at - checkpoint.prefix.len()) / BUCKET_BYTES;
            if bucket >= self.index.bucket_count() {
                break;
            }
            into[..BUCKET_BYTES].copy_from_slice(&self.index.take_bucket(bucket));
            filled += BUCKET_BYTES;
        }
        let offset = self
            .superblock
            .checkpoint_area(self.number, self.checkpoint_area)
            + u64::from(checkpoint.chunk) * CHUNK_BYTES as u64;
        let place = ChunkPlace {
            shard: self.number,
            chunk: checkpoint.chunk,
            chunks: checkpoint.chunks,
            number: checkpoint.number,
        };
        encode_chunk(bytes, &self.superblock, offset, place, filled);
        checkpoint.chunk += 1;
        self.counters.meta_write_bytes += CHUNK_BYTES as u64;
        if place.chunk == 0 {
            checkpoint.first = Some(buffer.freeze());
            return self.write_chunk();
        }
        checkpoint.waiting = true;
        self.submit(
            Pending::CheckpointChunk,
            Op::Write {
                offset,
                buffers: vec![buffer.freeze()],
                lifetime: Lifetime::Pages,
            },
        );
    }

    /// Whether records of blocks that it knows are not flushed yet, and must be.
    pub(super) fn checkpoint_waits_for_flush(&self) -> bool {
        self.checkpoint
            .as_ref()
            .and_then(|checkpoint| checkpoint.known_through)
            .is_some_and(|through| self.flushed_sequence < through)
            && self.has_unflushed_records()
            && !is_disabled(Check::CheckpointRecords)
    }

    pub(super) fn checkpoint_chunk_done(&mut self, now: Moment, result: Result<(), DeviceError>) {
        if let Err(error) = result {
            return self.checkpoint_failed(now, &error);
        }
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.waiting = false;
        }
        self.write_chunk();
    }

    pub(super) fn checkpoint_flush_done(&mut self, now: Moment, result: Result<(), DeviceError>) {
        if let Err(error) = result {
            return self.checkpoint_failed(now, &error);
        }
        let Some(checkpoint) = &mut self.checkpoint else {
            return;
        };
        checkpoint.waiting = false;
        match checkpoint.stage {
            Stage::OthersFlush => checkpoint.stage = Stage::First,
            Stage::FirstFlush => {
                self.checkpoint = None;
                self.index.end_snapshot();
                self.checkpoint_area = 1 - self.checkpoint_area;
                self.counters.checkpoints += 1;
            }
            // Of a checkpoint that was begun anew meanwhile.
            Stage::Others | Stage::First => {}
        }
        self.write_chunk();
    }

    /// The other area still holds the one before; recovery will take longer, that is all.
    fn checkpoint_failed(&mut self, now: Moment, error: &DeviceError) {
        self.checkpoint = None;
        self.index.end_snapshot();
        self.sealed_since_checkpoint += 1;
        self.device_refused(now, error);
    }
}
