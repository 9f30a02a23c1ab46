//! Parsers of what lies on a device, one structure at a time.

use kvar_base::check::crc64;
use kvar_base::{BlockId, ContentCheck, DeviceUuid, SECTIONS_MAX};
use kvar_engine::Superblock;
use kvar_engine::layout::{
    CHUNK_BYTES, CHUNK_PAYLOAD_BYTES, ChunkPlace, ImagePlan, PAGE, PageHead, PageKind,
    RECORDS_PER_PAGE, Record, SuperblockCopy, decode_chunk, decode_page, encode_chunk, encode_page,
};
use zerocopy::FromBytes;

/// Where the page or chunk is said to lie.
pub(crate) const OFFSET: u64 = 12 << 20;
/// A block whose image is read.
pub(crate) const ID: BlockId = BlockId::new([7; 32]);
/// Where the check of a superblock stands.
const SUPERBLOCK_CHECK: std::ops::Range<usize> = 8..16;
/// Fewest segments a shard has.
const SEGMENTS_MIN: u32 = 8;

/// The device they are said to be of.
pub(crate) fn device() -> Superblock {
    let uuid = DeviceUuid::new([3; 16]);
    Superblock::plan(16 << 20, 1, 64 << 10, uuid, [9; 16], 7).expect("a device of 16 MiB")
}

/// At least `len` bytes, zeros behind what there is.
fn padded(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(len, 0);
    padded
}

pub(crate) fn superblock(bytes: &[u8]) {
    let _ = Superblock::decode(bytes);
    let mut page = padded(bytes, PAGE);
    page[SUPERBLOCK_CHECK].fill(0);
    let check = crc64(&page);
    page[SUPERBLOCK_CHECK].copy_from_slice(&check.to_le_bytes());
    // Fields that make no sense under a check that holds: only what would be planned is taken.
    if let SuperblockCopy::Valid(copy) = Superblock::decode(&page) {
        assert_eq!(copy.encode()[..], page[..]);
        assert!(copy.segments_per_shard >= SEGMENTS_MIN);
        let end = copy.offset(copy.shards - 1, copy.segments_per_shard - 1, 0) + copy.segment_bytes;
        assert!(end <= copy.device_bytes, "segments lie on the device");
        assert!(copy.footer_page() < copy.segment_pages());
    }
}

pub(crate) fn page(bytes: &[u8]) {
    let device = device();
    if let Some((_, records)) = decode_page(bytes, &device, OFFSET) {
        assert!(records.len() <= RECORDS_PER_PAGE);
    }
    // The same bytes as fields of a page that is whole.
    let Some((fields, rest)) = bytes.split_at_checked(24) else {
        return;
    };
    let head = PageHead {
        kind: [PageKind::Header, PageKind::Directory, PageKind::Footer][usize::from(fields[0] % 3)],
        segment: u32::from_le_bytes(fields[4..8].try_into().expect("four bytes")),
        generation: u32::from_le_bytes(fields[8..12].try_into().expect("four bytes")),
        page_number: u16::from(fields[1]),
        page_count: u16::from(fields[2]),
        used_pages: u32::from(fields[3]),
        opened_sequence: u64::from_le_bytes(fields[16..24].try_into().expect("eight bytes")),
    };
    let records: Vec<Record> = rest
        .chunks_exact(size_of::<Record>())
        .take(RECORDS_PER_PAGE)
        .filter_map(|bytes| Record::read_from_bytes(bytes).ok())
        .collect();
    let mut page = vec![0; PAGE];
    encode_page(&mut page, &device, OFFSET, &head, &records);
    if let Some((read, found)) = decode_page(&page, &device, OFFSET) {
        assert_eq!(read.segment, head.segment);
        assert!(found.len() <= records.len());
    }
    assert!(decode_page(&page, &device, OFFSET + PAGE as u64).is_none());
}

pub(crate) fn chunk(bytes: &[u8]) {
    let device = device();
    let mut chunk = padded(bytes, CHUNK_BYTES);
    if let Some((_, payload)) = decode_chunk(&chunk, &device, OFFSET) {
        assert!(payload.len() <= CHUNK_PAYLOAD_BYTES);
    }
    let place = ChunkPlace {
        shard: 0,
        chunk: 1,
        chunks: 3,
        number: 9,
    };
    let filled = bytes.len().min(CHUNK_PAYLOAD_BYTES);
    encode_chunk(&mut chunk, &device, OFFSET, place, filled);
    let (_, payload) = decode_chunk(&chunk, &device, OFFSET).expect("what was encoded");
    assert_eq!(payload.len(), filled);
    assert!(decode_chunk(&chunk, &device, OFFSET + CHUNK_BYTES as u64).is_none());
}

pub(crate) fn section_directory(bytes: &[u8]) {
    // The bytes as they are, and behind a beginning that is right.
    let plan = ImagePlan::new(&[(1, ContentCheck(1)), (1, ContentCheck(2))]);
    let mut image = vec![0; plan.bytes as usize];
    plan.encode(&ID, &mut image);
    let mut behind = image[..36.min(image.len())].to_vec();
    behind.extend_from_slice(bytes);
    for front in [bytes, &behind] {
        for image_bytes in [front.len() as u64, 1 << 20, u64::from(u32::MAX)] {
            let Some(plan) = ImagePlan::decode_directory(&ID, front, image_bytes) else {
                continue;
            };
            assert!((2..=SECTIONS_MAX).contains(&plan.sections.len()));
            for section in &plan.sections {
                assert!(section.len > 0);
                let end = u64::from(section.offset) + u64::from(section.len);
                assert!(end <= image_bytes, "a section lies in its image");
            }
        }
    }
}
