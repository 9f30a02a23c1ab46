//! The superblock: sizes and places of everything on one device.
//!
//! ```text
//!  0        64 KiB    128 KiB                                       -128 KiB   -64 KiB    end
//!  | copy 0 | copy 1  | checkpoint areas | segments of shard 0, 1 ... | copy 2  | copy 3   |
//!
//!  segment, in pages   0        1 ..        stride ..                     footer_page ..
//!                      header | directory | payload ... | directory | ... | footer
//! ```
//!
//! Written at format, in four copies, never changed. A field that is zero was not known then.
//!
//! What must always be true: a superblock that is taken is one that [`Superblock::plan`] would make
//! for this size: no other division of a device is ever used, however good its check.
//!
//! Left to others: which copies are read and which of them wins (`format`).

use super::checkpoint::{CHUNK_BYTES, CHUNK_PAYLOAD_BYTES, CheckpointHead, SegmentState};
use super::page::RECORDS_PER_PAGE;
use super::{PAGE, SLOTS_PER_BUCKET};
use kvar_base::check::crc64;
use kvar_base::{DeviceUuid, PAGE_BYTES, page_round_up};
use kvar_io::{WRITES_BYTES_MAX, WRITES_BYTES_MIN};
use serde::Serialize;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The format this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;
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
const SUPERBLOCK_REACH: u64 = 128 << 10;

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
    write_in_flight_bytes: U64,
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
    /// Bytes of writes the device wants under way, found when it was formatted; 0: not probed.
    pub write_in_flight_bytes: u64,
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
            write_in_flight_bytes: 0,
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
            write_in_flight_bytes: self.write_in_flight_bytes.into(),
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
        let in_flight = raw.write_in_flight_bytes.get();
        let planned = planned.map(|superblock| Self {
            write_in_flight_bytes: in_flight,
            ..superblock
        });
        let in_bounds =
            in_flight == 0 || (WRITES_BYTES_MIN..=WRITES_BYTES_MAX).contains(&in_flight);
        match planned {
            Ok(superblock) if in_bounds && superblock.encode()[..] == *page => {
                SuperblockCopy::Valid(superblock)
            }
            _ => SuperblockCopy::Damaged,
        }
    }
}
