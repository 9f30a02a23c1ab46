//! The device, byte by byte: `docs/internals/disk.md` as code.
//!
//! ```text
//!  device    superblock x 2 | checkpoint areas, 2 a shard | segments ... | superblock x 2
//!  segment   header | directory, payload, directory, payload ... | footer
//! ```
//!
//! | file | what lies there |
//! |---|---|
//! | `superblock` | sizes and places of everything on one device |
//! | `page` | pages of a segment: header, directory, footer, and the records in them |
//! | `image` | the stored bytes of one block: section directory and sections |
//! | `checkpoint` | chunks of the saved index |
//!
//! What must always be true: every page that is read back proves what it is (magic, check folded
//! with the device's secret and the page's own offset, uuid, segment, generation); parsing takes
//! any bytes without panic. Nothing here does I/O.

mod checkpoint;
mod image;
mod page;
mod superblock;

pub use checkpoint::{
    CHUNK_BYTES, CHUNK_PAYLOAD_BYTES, CheckpointHead, ChunkHead, ChunkPlace, SegmentState,
    decode_chunk, encode_chunk,
};
pub use image::{ImagePlan, Section, Sections};
pub use page::{
    FLAG_SECTIONED, PageHead, PageKind, RECORD_BLOCK, RECORD_PURGE, RECORD_TENANT_PURGE,
    RECORD_TOMBSTONE, RECORDS_PER_PAGE, Record, RecordHints, decode_page, encode_page,
};
pub use superblock::{FORMAT_VERSION, FormatError, Superblock, SuperblockCopy, superblock_offsets};

use kvar_base::PAGE_BYTES;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// A page as `usize`.
pub const PAGE: usize = PAGE_BYTES as usize;

/// Index entries a bucket holds.
pub const SLOTS_PER_BUCKET: u64 = 3;

/// Sequence and checkpoint numbers stay below: at a billion a second that is a century, and
/// counting on from a number that was read never overflows.
pub(crate) const NUMBERS_END: u64 = 1 << 62;
const SEED_PAGE: u64 = 0x6b76_6172_0000_0010;

/// What is folded into the check of a page or chunk: the device's secret and where it lies, so that
/// one from another device or place does not pass.
fn page_fold(secret: &[u8; 16], offset: u64) -> u64 {
    let mut bytes = [0_u8; 24];
    bytes[..16].copy_from_slice(secret);
    bytes[16..].copy_from_slice(&offset.to_le_bytes());
    xxh3_64_with_seed(&bytes, SEED_PAGE)
}
