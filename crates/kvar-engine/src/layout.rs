//! The device, byte by byte: `docs/internals/disk.md` as code.
//!
//! What must always be true: every page that is read back proves what it is (magic, check folded
//! with the device's secret and the page's own offset, uuid, segment, generation); parsing takes
//! any bytes without panic. Nothing here does I/O.

use kvar_base::check::crc64;
use kvar_base::{BlockId, ContentCheck, DeviceUuid, PAGE_BYTES, SECTIONS_MAX, page_round_up};
use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A page as `usize`.
pub const PAGE: usize = PAGE_BYTES as usize;
/// The format this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;
/// Records a page of directory or footer holds.
pub const RECORDS_PER_PAGE: usize = 42;
/// Payload and head of one checkpoint chunk together.
pub const CHUNK_BYTES: usize = 256 << 10;
/// Bytes of checkpoint stream in one chunk.
pub const CHUNK_PAYLOAD_BYTES: usize = CHUNK_BYTES - size_of::<ChunkHead>();
/// Index entries a bucket holds.
pub const SLOTS_PER_BUCKET: u64 = 3;
/// Share of index slots in use when the device is full of blocks of the expected size, in percent.
/// Two choices and one relocation still find a place for all but 0.1 % there.
const INDEX_LOAD_PERCENT: u64 = 78;
/// Distance between directory areas where the segment is larger than that.
const STRIDE_BYTES_MAX: u64 = 4 << 20;
/// Fewest segments a shard works with: open, sealing, prepared, reclaiming, and four to age in.
const SEGMENTS_MIN: u64 = 8;
/// Most pages a shard's segments may hold: positions in the index have 30 bits (4 TiB).
const SHARD_PAGES_MAX: u64 = 1 << 30;

const SUPERBLOCK_MAGIC: [u8; 8] = *b"KVARDISK";
const PAGE_MAGIC: u32 = u32::from_le_bytes(*b"KVPG");
const SECTION_MAGIC: u32 = u32::from_le_bytes(*b"KVSD");
const CHUNK_MAGIC: u64 = u64::from_le_bytes(*b"KVARCKPT");
/// Sequence and checkpoint numbers stay below: at a billion a second that is a century, and
/// counting on from a number that was read never overflows.
pub(crate) const NUMBERS_END: u64 = 1 << 62;
const SEED_PAGE: u64 = 0x6b76_6172_0000_0010;

/// Why a format was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not enough room for the fewest segments.
    #[error(
        "{bytes} bytes are too few for {shards} shard(s): give at least {least} bytes, or fewer shards"
    )]
    TooSmall {
        /// Bytes there.
        bytes: u64,
        /// Shards asked for.
        shards: u32,
        /// Bytes needed.
        least: u64,
    },
    /// More than positions in the index can name.
    #[error(
        "{bytes} bytes are more than {shards} shard(s) can address (4 TiB each): use more shards"
    )]
    TooLarge {
        /// Bytes there.
        bytes: u64,
        /// Shards asked for.
        shards: u32,
    },
    /// No shard at all.
    #[error("a store has at least one shard")]
    NoShards,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    check: U64,
    format_version: U32,
    shards: U32,
    uuid: [u8; 16],
    secret: [u8; 16],
    device_bytes: U64,
    segment_bytes: U64,
    segments_offset: U64,
    segments_per_shard: U32,
    stride_pages: U32,
    area_pages: U32,
    footer_pages: U32,
    checkpoint_offset: U64,
    checkpoint_bytes: U64,
    buckets: U64,
    expected_block_bytes: U64,
    created_unix: U64,
}

/// Sizes and places of everything on one device; written at format, never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Superblock {
    /// Format of the device.
    pub format_version: u32,
    /// Name of the device.
    pub uuid: DeviceUuid,
    /// Folded into every page's check.
    #[serde(skip)]
    pub secret: [u8; 16],
    /// Size when it was formatted.
    pub device_bytes: u64,
    /// Shards it is divided into.
    pub shards: u32,
    /// Size of a segment.
    pub segment_bytes: u64,
    /// Where segment 0 starts.
    pub segments_offset: u64,
    /// Segments each shard owns.
    pub segments_per_shard: u32,
    /// Distance of directory areas in pages.
    pub stride_pages: u32,
    /// Pages of one directory area.
    pub area_pages: u32,
    /// Pages of a footer.
    pub footer_pages: u32,
    /// Where the checkpoint areas start.
    pub checkpoint_offset: u64,
    /// Size of one checkpoint area.
    pub checkpoint_bytes: u64,
    /// Index buckets of one shard.
    pub buckets: u64,
    /// The block size the index and the directories were sized for.
    pub expected_block_bytes: u64,
    /// When it was formatted, seconds since 1970.
    pub created_unix: u64,
}

/// What a superblock copy turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SuperblockCopy {
    /// Valid.
    Valid(Superblock),
    /// All zero: never written.
    Blank,
    /// A kvar superblock of another format version.
    OtherVersion(u32),
    /// Something else.
    Damaged,
}

const SUPERBLOCK_REACH: u64 = 128 << 10;

/// Where the four copies lie on a device of this size.
#[must_use]
pub fn superblock_offsets(device_bytes: u64) -> [u64; 4] {
    [
        0,
        64 << 10,
        device_bytes.saturating_sub(128 << 10),
        device_bytes.saturating_sub(64 << 10),
    ]
}

impl Superblock {
    /// Divides a device.
    ///
    /// # Errors
    /// When it is too small or too large for the shards.
    pub fn plan(
        device_bytes: u64,
        shards: u32,
        expected_block_bytes: u64,
        uuid: DeviceUuid,
        secret: [u8; 16],
        created_unix: u64,
    ) -> Result<Self, FormatError> {
        if shards == 0 {
            return Err(FormatError::NoShards);
        }
        let device_bytes = device_bytes / PAGE_BYTES * PAGE_BYTES;
        let shard_count = u64::from(shards);
        let expected_block_bytes = expected_block_bytes.clamp(PAGE_BYTES, 16 << 20);
        let least = 2 * SUPERBLOCK_REACH
            + shard_count * (2 * CHUNK_BYTES as u64 + (SEGMENTS_MIN + 1) * (1 << 20));
        if device_bytes < least {
            return Err(FormatError::TooSmall {
                bytes: device_bytes,
                shards,
                least,
            });
        }
        let per_shard = (device_bytes - 2 * SUPERBLOCK_REACH) / shard_count;
        let segment_bytes = (device_bytes / 256)
            .min(per_shard / (2 * SEGMENTS_MIN))
            .clamp(1 << 20, 64 << 20)
            / PAGE_BYTES
            * PAGE_BYTES;
        let stride_bytes = segment_bytes.min(STRIDE_BYTES_MAX);
        let stride_pages = (stride_bytes / PAGE_BYTES) as u32;
        let records = stride_bytes.div_ceil(expected_block_bytes);
        // One page more for the turn between two places, one for records without payload.
        let area_pages = records.div_ceil(RECORDS_PER_PAGE as u64) as u32 + 2;
        let areas = segment_bytes.div_ceil(stride_bytes) as u32;
        let footer_pages = areas * (area_pages - 1);
        let entries = per_shard.div_ceil(page_round_up(expected_block_bytes));
        let buckets = (entries * 100)
            .div_ceil(INDEX_LOAD_PERCENT * SLOTS_PER_BUCKET)
            .max(16);
        let stream = size_of::<CheckpointHead>() as u64
            + per_shard / segment_bytes * size_of::<SegmentState>() as u64
            + buckets * 64;
        let checkpoint_bytes = stream.div_ceil(CHUNK_PAYLOAD_BYTES as u64) * CHUNK_BYTES as u64;
        let checkpoint_offset = SUPERBLOCK_REACH;
        let segments_offset = checkpoint_offset + 2 * checkpoint_bytes * shard_count;
        let room = device_bytes.saturating_sub(SUPERBLOCK_REACH + segments_offset);
        let segments_per_shard = room / segment_bytes / shard_count;
        if segments_per_shard < SEGMENTS_MIN {
            return Err(FormatError::TooSmall {
                bytes: device_bytes,
                shards,
                least: least * 2,
            });
        }
        if segments_per_shard * segment_bytes / PAGE_BYTES > SHARD_PAGES_MAX {
            return Err(FormatError::TooLarge {
                bytes: device_bytes,
                shards,
            });
        }
        Ok(Self {
            format_version: FORMAT_VERSION,
            uuid,
            secret,
            device_bytes,
            shards,
            segment_bytes,
            segments_offset,
            segments_per_shard: segments_per_shard as u32,
            stride_pages,
            area_pages,
            footer_pages,
            checkpoint_offset,
            checkpoint_bytes,
            buckets,
            expected_block_bytes,
            created_unix,
        })
    }

    /// Largest block in bytes of payload: a quarter of a segment, at most 16 MiB.
    #[must_use]
    pub fn block_bytes_max(&self) -> u64 {
        (self.segment_bytes / 4).min(kvar_base::BLOCK_BYTES_MAX)
    }

    /// Largest stored image of a block, section directory and padding of every section included:
    /// half a segment, so that any block that is taken fits into an empty one.
    #[must_use]
    pub fn image_bytes_max(&self) -> u64 {
        self.segment_bytes / 2
    }

    /// Pages of a segment.
    #[must_use]
    pub fn segment_pages(&self) -> u32 {
        (self.segment_bytes / PAGE_BYTES) as u32
    }

    /// First page of the footer; payload ends before it.
    #[must_use]
    pub fn footer_page(&self) -> u32 {
        self.segment_pages() - self.footer_pages
    }

    /// Bytes of a segment that payload can use at best.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        let areas = self.areas().count() as u64;
        self.segment_bytes
            - PAGE_BYTES * (1 + u64::from(self.footer_pages) + areas * u64::from(self.area_pages))
    }

    /// First page of every directory area of a segment.
    pub fn areas(&self) -> impl Iterator<Item = u32> + use<> {
        let (end, area, stride) = (self.footer_page(), self.area_pages, self.stride_pages);
        (0..)
            .map(move |number| if number == 0 { 1 } else { number * stride })
            .take_while(move |first| first + area < end)
    }

    /// The segment's number over all shards; names it in checks and pages.
    #[must_use]
    pub fn device_segment(&self, shard: u32, segment: u32) -> u32 {
        shard * self.segments_per_shard + segment
    }

    /// Byte offset of a page of a shard's segment.
    #[must_use]
    pub fn offset(&self, shard: u32, segment: u32, page: u32) -> u64 {
        self.segments_offset
            + u64::from(self.device_segment(shard, segment)) * self.segment_bytes
            + u64::from(page) * PAGE_BYTES
    }

    /// Byte offset of a checkpoint area (0 or 1) of a shard.
    #[must_use]
    pub fn checkpoint_area(&self, shard: u32, area: u32) -> u64 {
        self.checkpoint_offset + u64::from(shard * 2 + area) * self.checkpoint_bytes
    }

    /// The page to write.
    #[must_use]
    pub fn encode(&self) -> [u8; PAGE] {
        let mut raw = RawSuperblock {
            magic: SUPERBLOCK_MAGIC,
            check: U64::ZERO,
            format_version: self.format_version.into(),
            shards: self.shards.into(),
            uuid: *self.uuid.as_bytes(),
            secret: self.secret,
            device_bytes: self.device_bytes.into(),
            segment_bytes: self.segment_bytes.into(),
            segments_offset: self.segments_offset.into(),
            segments_per_shard: self.segments_per_shard.into(),
            stride_pages: self.stride_pages.into(),
            area_pages: self.area_pages.into(),
            footer_pages: self.footer_pages.into(),
            checkpoint_offset: self.checkpoint_offset.into(),
            checkpoint_bytes: self.checkpoint_bytes.into(),
            buckets: self.buckets.into(),
            expected_block_bytes: self.expected_block_bytes.into(),
            created_unix: self.created_unix.into(),
        };
        let mut page = [0_u8; PAGE];
        let head = size_of::<RawSuperblock>();
        page[..head].copy_from_slice(raw.as_bytes());
        raw.check = crc64(&page).into();
        page[..head].copy_from_slice(raw.as_bytes());
        page
    }

    /// Reads one copy.
    #[must_use]
    pub fn decode(page: &[u8]) -> SuperblockCopy {
        if page.iter().all(|byte| *byte == 0) {
            return SuperblockCopy::Blank;
        }
        let Ok((mut raw, _)) = RawSuperblock::read_from_prefix(page) else {
            return SuperblockCopy::Damaged;
        };
        if page.len() != PAGE || raw.magic != SUPERBLOCK_MAGIC {
            return SuperblockCopy::Damaged;
        }
        let check = raw.check.get();
        raw.check = U64::ZERO;
        let mut clean = [0_u8; PAGE];
        clean.copy_from_slice(page);
        clean[..size_of::<RawSuperblock>()].copy_from_slice(raw.as_bytes());
        if crc64(&clean) != check {
            return SuperblockCopy::Damaged;
        }
        if raw.format_version.get() != FORMAT_VERSION {
            return SuperblockCopy::OtherVersion(raw.format_version.get());
        }
        // A valid check says we wrote it; still, only a division this code would make is taken.
        let planned = Self::plan(
            raw.device_bytes.get(),
            raw.shards.get(),
            raw.expected_block_bytes.get(),
            DeviceUuid::new(raw.uuid),
            raw.secret,
            raw.created_unix.get(),
        );
        match planned {
            Ok(superblock) if superblock.encode()[..] == *page => SuperblockCopy::Valid(superblock),
            _ => SuperblockCopy::Damaged,
        }
    }
}

/// What kind of page of a segment this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum PageKind {
    /// First page: this generation has begun.
    Header = 1,
    /// Records of blocks in front of or behind it.
    Directory = 2,
    /// All records, at the seal.
    Footer = 3,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawPageHead {
    magic: U32,
    kind: U16,
    records: U16,
    check: U64,
    uuid: [u8; 16],
    segment: U32,
    generation: U32,
    page_number: U16,
    page_count: U16,
    used_pages: U32,
    opened_sequence: U64,
    reserved: U64,
}

const PAGE_HEAD: usize = size_of::<RawPageHead>();
const _: () = assert!(PAGE_HEAD == 64);
const _: () = assert!(size_of::<Record>() == 96);
const _: () = assert!(PAGE_HEAD + RECORDS_PER_PAGE * size_of::<Record>() == PAGE);
const _: () = assert!(size_of::<ChunkHead>() == 64);

/// Block.
pub const RECORD_BLOCK: u8 = 1;
/// Tombstone of a remove.
pub const RECORD_TOMBSTONE: u8 = 2;
/// Everything recorded before is gone.
pub const RECORD_PURGE: u8 = 3;
/// Flag: the stored bytes begin with a section directory.
pub const FLAG_SECTIONED: u8 = 1;

/// What is stored about one block, tombstone or purge.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Record {
    id: [u8; 32],
    sequence: U64,
    /// Check of the stored head; see [`kvar_base::check`].
    pub check64: U64,
    /// Version of the copy.
    pub version: U64,
    /// Pages from the start of the segment.
    pub place: U32,
    /// Exact bytes (one section) or whole pages (several).
    pub len: U32,
    /// One of `RECORD_*`.
    pub kind: u8,
    /// `FLAG_*`.
    pub flags: u8,
    /// Number of sections.
    pub sections: U16,
    /// Reserved in this version.
    pub expires_unix: U32,
    /// Reserved in this version.
    pub namespace: U32,
    /// Depth in the chain.
    pub depth: U32,
    reserved: [u8; 16],
}

impl Record {
    /// A record of a kind with no place.
    #[must_use]
    pub fn bare(kind: u8, id: &BlockId, sequence: u64) -> Self {
        let mut record = Self::new_zeroed();
        record.kind = kind;
        record.id = *id.as_bytes();
        record.sequence = sequence.into();
        record
    }

    /// The block it speaks of.
    #[must_use]
    pub fn id(&self) -> BlockId {
        BlockId::new(self.id)
    }

    /// Its place in the order of everything.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence.get()
    }

    /// Whether the stored bytes begin with a section directory.
    #[must_use]
    pub fn is_sectioned(&self) -> bool {
        self.flags & FLAG_SECTIONED != 0
    }

    /// Whether its fields can be true on this device.
    fn is_sane(&self, superblock: &Superblock) -> bool {
        if self.sequence() >= NUMBERS_END {
            return false;
        }
        match self.kind {
            RECORD_TOMBSTONE | RECORD_PURGE => true,
            RECORD_BLOCK => {
                let pages = u64::from(self.len.get()).div_ceil(PAGE_BYTES);
                self.len.get() > 0
                    && self.place.get() > 0
                    && u64::from(self.place.get()) + pages <= u64::from(superblock.footer_page())
                    && (1..=SECTIONS_MAX).contains(&usize::from(self.sections.get()))
            }
            _ => false,
        }
    }
}

/// A page of a segment, apart from its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHead {
    /// What it is.
    pub kind: PageKind,
    /// Segment over all shards.
    pub segment: u32,
    /// Generation of that segment.
    pub generation: u32,
    /// Which page of the footer.
    pub page_number: u16,
    /// Of how many.
    pub page_count: u16,
    /// Pages of the segment used when this was written.
    pub used_pages: u32,
    /// Sequence number when the segment was opened.
    pub opened_sequence: u64,
}

fn page_fold(secret: &[u8; 16], offset: u64) -> u64 {
    let mut bytes = [0_u8; 24];
    bytes[..16].copy_from_slice(secret);
    bytes[16..].copy_from_slice(&offset.to_le_bytes());
    xxh3_64_with_seed(&bytes, SEED_PAGE)
}

/// Writes a segment page that will lie at byte `offset` of the device.
///
/// # Panics
/// When there are more records than fit, or the page is no page: a defect of the caller.
pub fn encode_page(
    page: &mut [u8],
    superblock: &Superblock,
    offset: u64,
    head: &PageHead,
    records: &[Record],
) {
    assert!(page.len() == PAGE && records.len() <= RECORDS_PER_PAGE);
    let mut raw = RawPageHead {
        magic: PAGE_MAGIC.into(),
        kind: (head.kind as u16).into(),
        records: (records.len() as u16).into(),
        check: U64::ZERO,
        uuid: *superblock.uuid.as_bytes(),
        segment: head.segment.into(),
        generation: head.generation.into(),
        page_number: head.page_number.into(),
        page_count: head.page_count.into(),
        used_pages: head.used_pages.into(),
        opened_sequence: head.opened_sequence.into(),
        reserved: U64::ZERO,
    };
    let body = records.as_bytes();
    page[PAGE_HEAD..PAGE_HEAD + body.len()].copy_from_slice(body);
    page[PAGE_HEAD + body.len()..].fill(0);
    page[..PAGE_HEAD].copy_from_slice(raw.as_bytes());
    raw.check = (crc64(page) ^ page_fold(&superblock.secret, offset)).into();
    page[..PAGE_HEAD].copy_from_slice(raw.as_bytes());
}

/// Reads a segment page found at byte `offset`; `None` if it is not one of this device and place.
#[must_use]
pub fn decode_page(
    page: &[u8],
    superblock: &Superblock,
    offset: u64,
) -> Option<(PageHead, Vec<Record>)> {
    let (raw, body) = RawPageHead::ref_from_prefix(page).ok()?;
    if page.len() != PAGE
        || raw.magic.get() != PAGE_MAGIC
        || raw.uuid != *superblock.uuid.as_bytes()
        || usize::from(raw.records.get()) > RECORDS_PER_PAGE
    {
        return None;
    }
    let mut clean = *raw;
    clean.check = U64::ZERO;
    let mut crc = kvar_base::Crc64::default();
    crc.update(clean.as_bytes());
    crc.update(body);
    if crc.finish() ^ page_fold(&superblock.secret, offset) != raw.check.get() {
        return None;
    }
    let kind = match raw.kind.get() {
        1 => PageKind::Header,
        2 => PageKind::Directory,
        3 => PageKind::Footer,
        _ => return None,
    };
    if !(1..u32::MAX).contains(&raw.generation.get()) || raw.opened_sequence.get() >= NUMBERS_END {
        return None;
    }
    let head = PageHead {
        kind,
        segment: raw.segment.get(),
        generation: raw.generation.get(),
        page_number: raw.page_number.get(),
        page_count: raw.page_count.get(),
        used_pages: raw.used_pages.get(),
        opened_sequence: raw.opened_sequence.get(),
    };
    let count = usize::from(raw.records.get());
    let (records, _) = <[Record]>::ref_from_prefix_with_elems(body, count).ok()?;
    let records = records
        .iter()
        .filter(|record| record.is_sane(superblock))
        .copied()
        .collect();
    Some((head, records))
}

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

/// First bytes of the checkpoint stream.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CheckpointHead {
    /// Records from this sequence number on must be replayed.
    pub replay_from: U64,
    /// Next sequence number when it was begun.
    pub next_sequence: U64,
    /// Bytes ever appended: the clock of recency.
    pub appended_bytes: U64,
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
    /// Reserved.
    pub reserved: U32,
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

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SectionHead {
    magic: U32,
    sections: U16,
    pages: U16,
    id: [u8; 32],
    reserved: [u8; 24],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SectionEntry {
    len: U32,
    page: U32,
    check: U64,
    nonce: [u8; 12],
    tag: [u8; 16],
    reserved: [u8; 4],
}

const SECTIONS_PER_PAGE: usize = 84;
const _: () = assert!(size_of::<SectionHead>() == 64 && size_of::<SectionEntry>() == 48);
const _: () = assert!(64 + SECTIONS_PER_PAGE * 48 == PAGE);
const _: () = assert!(SECTIONS_PER_PAGE * 12 == SECTIONS_MAX);

/// One section of a block: what the writer said, and where it lies in the stored image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Exact length in bytes.
    pub len: u32,
    /// The writer's check.
    pub check: ContentCheck,
    /// Bytes from the start of the image.
    pub offset: u32,
}

/// How the sections of a block lie behind one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImagePlan {
    /// The sections.
    pub sections: Vec<Section>,
    /// Bytes of the image: exact for one section, whole pages for several.
    pub bytes: u64,
    /// Pages of section directory in front (0 for one section).
    pub directory_pages: usize,
}

impl ImagePlan {
    /// Lays sections out; the caller has checked that none is empty and that they are not too many.
    #[must_use]
    pub fn new(sections: &[(u32, ContentCheck)]) -> Self {
        if let [(len, check)] = *sections {
            let section = Section {
                len,
                check,
                offset: 0,
            };
            return Self {
                sections: vec![section],
                bytes: u64::from(len),
                directory_pages: 0,
            };
        }
        let directory_pages = sections.len().div_ceil(SECTIONS_PER_PAGE);
        let mut at = (directory_pages * PAGE) as u64;
        let sections = sections
            .iter()
            .map(|&(len, check)| {
                let offset = at as u32;
                at += page_round_up(u64::from(len));
                Section { len, check, offset }
            })
            .collect();
        Self {
            sections,
            bytes: at,
            directory_pages,
        }
    }

    /// Whether a section directory is in front.
    #[must_use]
    pub fn is_sectioned(&self) -> bool {
        self.directory_pages > 0
    }

    /// Writes the section directory and zeroes the padding of every section.
    pub fn encode(&self, id: &BlockId, image: &mut [u8]) {
        for section in &self.sections {
            let end = section.offset as usize + section.len as usize;
            let padded = (end.div_ceil(PAGE) * PAGE).min(image.len());
            image[end..padded].fill(0);
        }
        let pages = self.sections.chunks(SECTIONS_PER_PAGE);
        for (page, sections) in image[..self.directory_pages * PAGE]
            .chunks_mut(PAGE)
            .zip(pages)
        {
            page.fill(0);
            let head = SectionHead {
                magic: SECTION_MAGIC.into(),
                sections: (self.sections.len() as u16).into(),
                pages: (self.directory_pages as u16).into(),
                id: *id.as_bytes(),
                reserved: [0; 24],
            };
            page[..64].copy_from_slice(head.as_bytes());
            for (number, section) in sections.iter().enumerate() {
                let entry = SectionEntry {
                    len: section.len.into(),
                    page: (section.offset / PAGE as u32).into(),
                    check: section.check.0.into(),
                    nonce: [0; 12],
                    tag: [0; 16],
                    reserved: [0; 4],
                };
                page[64 + number * 48..][..48].copy_from_slice(entry.as_bytes());
            }
        }
    }

    /// Reads the section directory in front of an image; `None` if there is none of this block.
    #[must_use]
    pub fn decode(id: &BlockId, image: &[u8]) -> Option<Self> {
        let (head, _) = SectionHead::ref_from_prefix(image).ok()?;
        let count = usize::from(head.sections.get());
        if head.magic.get() != SECTION_MAGIC
            || head.id != *id.as_bytes()
            || !(2..=SECTIONS_MAX).contains(&count)
            || image.len() < count.div_ceil(SECTIONS_PER_PAGE) * PAGE
        {
            return None;
        }
        let entries: Vec<_> = image
            .chunks_exact(PAGE)
            .flat_map(|page| page[64..].chunks_exact(48))
            .take(count)
            .map(|entry| SectionEntry::read_from_bytes(entry).ok())
            .collect::<Option<_>>()?;
        let plan = Self::new(
            &entries
                .iter()
                .map(|entry| (entry.len.get(), ContentCheck(entry.check.get())))
                .collect::<Vec<_>>(),
        );
        let agrees = plan.sections.iter().zip(&entries).all(|(section, entry)| {
            section.len > 0 && section.offset / PAGE as u32 == entry.page.get()
        });
        (agrees && plan.bytes == image.len() as u64).then_some(plan)
    }
}
