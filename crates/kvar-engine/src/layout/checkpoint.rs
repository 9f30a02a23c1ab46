//! The saved index: a stream, cut into chunks of 256 KiB.
//!
//! ```text
//!  stream   head 48 | segment states, 16 each | buckets, 64 each
//!  chunk    head 64 | its part of the stream | zeros
//! ```
//!
//! What must always be true: a chunk is taken only at the place and on the device it was written
//! for, and whole. That a checkpoint is whole and of one number is for `recovery` to see to.

use super::page_fold;
use super::superblock::Superblock;
use kvar_base::check::crc64;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Payload and head of one checkpoint chunk together.
pub const CHUNK_BYTES: usize = 256 << 10;
/// Bytes of checkpoint stream in one chunk.
pub const CHUNK_PAYLOAD_BYTES: usize = CHUNK_BYTES - size_of::<ChunkHead>();
const CHUNK_MAGIC: u64 = u64::from_le_bytes(*b"KVARCKPT");

/// Head of a checkpoint chunk.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkHead {
    magic: U64,
    check: U64,
    uuid: [u8; 16],
    shard: U32,
    chunk: U32,
    chunks: U32,
    payload_bytes: U32,
    number: U64,
    reserved: U64,
}

const _: () = assert!(size_of::<ChunkHead>() == 64);

/// First bytes of the checkpoint stream.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CheckpointHead {
    /// Records from this sequence number on must be replayed.
    pub replay_from: U64,
    /// Next sequence number when it was begun.
    pub next_sequence: U64,
    /// Bytes ever found and put: the clock of recency. (In what was written before blocks were
    /// kept by worth, bytes ever appended; ages are off there until a block is used.)
    pub demand_bytes: U64,
    /// Seed of the index hash.
    pub hash_seed: U64,
    /// Buckets that follow.
    pub buckets: U64,
    /// Segment states that follow before them.
    pub segments: U64,
}

/// What a checkpoint says of a segment.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SegmentState {
    /// Its generation then.
    pub generation: U32,
    /// Records in it that name an expiry: their times are read again at recovery. (0 in what was
    /// written before blocks could expire.)
    pub expiring: U32,
    /// Sequence number when it was opened.
    pub opened_sequence: U64,
}

/// Which chunk of which checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// Shard.
    pub shard: u32,
    /// Chunk number.
    pub chunk: u32,
    /// Chunks in all.
    pub chunks: u32,
    /// The checkpoint's number; grows.
    pub number: u64,
}

/// Seals a chunk whose payload already stands behind the head.
pub fn encode_chunk(
    bytes: &mut [u8],
    superblock: &Superblock,
    offset: u64,
    place: ChunkPlace,
    payload_bytes: usize,
) {
    let mut head = ChunkHead {
        magic: CHUNK_MAGIC.into(),
        check: U64::ZERO,
        uuid: *superblock.uuid.as_bytes(),
        shard: place.shard.into(),
        chunk: place.chunk.into(),
        chunks: place.chunks.into(),
        payload_bytes: (payload_bytes as u32).into(),
        number: place.number.into(),
        reserved: U64::ZERO,
    };
    let size = size_of::<ChunkHead>();
    bytes[..size].copy_from_slice(head.as_bytes());
    bytes[size + payload_bytes..].fill(0);
    head.check = (crc64(bytes) ^ page_fold(&superblock.secret, offset)).into();
    bytes[..size].copy_from_slice(head.as_bytes());
}

/// Reads a chunk; `None` if it is not one of this device and place.
#[must_use]
pub fn decode_chunk<'a>(
    bytes: &'a [u8],
    superblock: &Superblock,
    offset: u64,
) -> Option<(ChunkPlace, &'a [u8])> {
    let (head, body) = ChunkHead::ref_from_prefix(bytes).ok()?;
    let payload_bytes = head.payload_bytes.get() as usize;
    if head.magic.get() != CHUNK_MAGIC
        || head.uuid != *superblock.uuid.as_bytes()
        || payload_bytes > body.len()
    {
        return None;
    }
    let mut clean = *head;
    clean.check = U64::ZERO;
    let mut crc = kvar_base::Crc64::default();
    crc.update(clean.as_bytes());
    crc.update(body);
    if crc.finish() ^ page_fold(&superblock.secret, offset) != head.check.get() {
        return None;
    }
    let place = ChunkPlace {
        shard: head.shard.get(),
        chunk: head.chunk.get(),
        chunks: head.chunks.get(),
        number: head.number.get(),
    };
    Some((place, &body[..payload_bytes]))
}
