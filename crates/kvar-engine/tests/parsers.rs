//! Everything that is read from a device, given bytes that nobody wrote: arbitrary ones, valid
//! ones with a bit over, and absurd ones under a check that holds.
//!
//! (One structure at a time, with a fuzzer: `crates/kvar-fuzz`.)
//!
//! What must always be true: no parser panics, none takes a changed byte for a valid one, and a
//! store over such bytes opens, serves right bytes or misses, and goes on.

mod common;

use common::{Dice, Oracle, Store, config, id, lengths, options, payload};
use kvar_base::{BlockId, ContentCheck, DeviceUuid};
use kvar_engine::Superblock;
use kvar_engine::layout::{
    CHUNK_BYTES, ChunkPlace, ImagePlan, PAGE, PageHead, PageKind, RECORDS_PER_PAGE, Record,
    SuperblockCopy, decode_chunk, decode_page, encode_chunk, encode_page,
};
use kvar_io::sim::{Image, SimDisk, SimOptions, Survival};
use proptest::prelude::*;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

const OFFSET: u64 = 12 << 20;

fn superblock() -> Superblock {
    let options = options();
    Superblock::plan(
        16 << 20,
        options.shards,
        options.expected_block_bytes,
        options.uuid,
        options.secret,
        7,
    )
    .unwrap()
}

fn noise(dice: &mut Dice, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len.div_ceil(8))
        .flat_map(|_| dice.next().to_le_bytes())
        .collect();
    bytes.truncate(len);
    bytes
}

fn head(kind: PageKind) -> PageHead {
    PageHead {
        kind,
        segment: 3,
        generation: 5,
        page_number: 0,
        page_count: 1,
        used_pages: 40,
        opened_sequence: 1000,
    }
}

fn page() -> Vec<u8> {
    let mut page = vec![0; PAGE];
    let records: Vec<Record> = (0..17)
        .map(|number| Record::bare(2, &id(number), 1000 + number))
        .collect();
    let head = head(PageKind::Directory);
    encode_page(&mut page, &superblock(), OFFSET, &head, &records);
    page
}

fn chunk() -> Vec<u8> {
    let mut bytes = noise(&mut Dice::new(1), CHUNK_BYTES);
    let place = ChunkPlace {
        shard: 0,
        chunk: 1,
        chunks: 3,
        number: 9,
    };
    encode_chunk(&mut bytes, &superblock(), OFFSET, place, 100_000);
    bytes
}

fn sectioned() -> (BlockId, Vec<u8>) {
    let sections: Vec<_> = (0..90).map(|at| (at * 50 + 1, ContentCheck(7))).collect();
    let plan = ImagePlan::new(&sections);
    let mut image = vec![0; plan.bytes as usize];
    plan.encode(&id(1), &mut image);
    (id(1), image)
}

/// Hands `bytes` to every parser; whether one took it.
fn taken(bytes: &[u8]) -> bool {
    let superblock = superblock();
    let (id, _) = sectioned();
    matches!(
        Superblock::decode(bytes),
        SuperblockCopy::Valid(_) | SuperblockCopy::OtherVersion(_)
    ) || decode_page(bytes, &superblock, OFFSET).is_some()
        || decode_chunk(bytes, &superblock, OFFSET).is_some()
        || ImagePlan::decode(&id, bytes).is_some()
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_nothing(bytes in prop::collection::vec(any::<u8>(), 0..3 * PAGE)) {
        prop_assert!(!taken(&bytes));
    }

    #[test]
    fn arbitrary_bytes_behind_a_magic_are_nothing(which in 0_usize..4, seed: u64, pages in 1_usize..4) {
        let mut bytes = noise(&mut Dice::new(seed), pages * PAGE);
        let superblock = superblock().encode();
        let start = match which {
            0 => superblock[..8].to_vec(),
            1 => page()[..6].to_vec(),
            2 => chunk()[..8].to_vec(),
            _ => sectioned().1[..40].to_vec(),
        };
        bytes[..start.len()].copy_from_slice(&start);
        prop_assert!(!taken(&bytes));
    }
}

/// Every byte of a page is covered by a check: none can change unseen.
#[test]
fn a_changed_byte_is_seen() {
    let superblock = superblock();
    let mut dice = Dice::new(3);
    let valid = superblock.encode();
    assert!(matches!(
        Superblock::decode(&valid),
        SuperblockCopy::Valid(_)
    ));
    let page = page();
    assert_eq!(decode_page(&page, &superblock, OFFSET).unwrap().1.len(), 17);
    for at in 0..PAGE {
        let mut changed = valid;
        changed[at] ^= 1 << dice.below(8);
        assert_eq!(
            Superblock::decode(&changed),
            SuperblockCopy::Damaged,
            "superblock byte {at}"
        );
        let mut changed = page.clone();
        changed[at] ^= 1 << dice.below(8);
        assert!(
            decode_page(&changed, &superblock, OFFSET).is_none(),
            "page byte {at}"
        );
    }
    let chunk = chunk();
    assert!(decode_chunk(&chunk, &superblock, OFFSET).is_some());
    let places: Vec<_> = (0..300)
        .map(|_| dice.below(CHUNK_BYTES as u64) as usize)
        .collect();
    for at in (0..64).chain(places) {
        let mut changed = chunk.clone();
        changed[at] ^= 1 << dice.below(8);
        assert!(
            decode_chunk(&changed, &superblock, OFFSET).is_none(),
            "chunk byte {at}"
        );
    }
}

/// What is right in one place is nothing in another, nor on another device.
#[test]
fn what_is_misplaced_is_nothing() {
    let here = superblock();
    let mut other = here.clone();
    other.uuid = DeviceUuid::new([8; 16]);
    let mut stranger = here.clone();
    stranger.secret = [1; 16];
    let (page, chunk) = (page(), chunk());
    for (superblock, offset) in [
        (&here, OFFSET + 4096),
        (&here, 0),
        (&other, OFFSET),
        (&stranger, OFFSET),
    ] {
        assert!(decode_page(&page, superblock, offset).is_none());
        assert!(decode_chunk(&chunk, superblock, offset).is_none());
    }
    let (_, image) = sectioned();
    assert!(ImagePlan::decode(&id(2), &image).is_none());
    assert!(ImagePlan::decode(&id(1), &image[..image.len() - PAGE]).is_none());
}

fn filled(blocks: u64) -> (Superblock, Image) {
    let mut store = Store::format(16 << 20, SimOptions::default(), config());
    for number in 0..blocks {
        store.put(number, 1, false);
        store.turn(Duration::from_millis(2));
    }
    store.settle();
    (
        store.superblock.clone(),
        store.disk.crash(Survival::Flushed),
    )
}

/// The store over this image: what it serves is right, and it comes to rest.
fn judge(image: Image, blocks: u64) -> u64 {
    let disk = SimDisk::with_image(image, SimOptions::default());
    let mut store = Store::open(disk, config(), Oracle::default());
    let mut hits = 0;
    for number in 0..blocks {
        let right: Vec<u8> = lengths(number, 1)
            .iter()
            .enumerate()
            .flat_map(|(at, len)| payload(number, 1, at, *len))
            .collect();
        store.oracle.allowed.insert(
            number,
            vec![common::Put {
                nonce: 1,
                order: 0,
                flushed: false,
                uncertain: true,
            }],
        );
        if let Ok(bytes) = store.outcome_of_get(number) {
            assert!(bytes == right, "block {number}: wrong bytes");
            hits += 1;
        }
    }
    for number in 1000..1300 {
        store.put(number, 1, false);
        store.turn(Duration::from_millis(3));
    }
    store.settle();
    hits
}

/// A bit over anywhere in a sectioned block, its directory first: the right bytes or a miss.
#[test]
fn a_changed_byte_of_a_sectioned_block_is_never_served() {
    let (_, image) = filled(12);
    let mut bytes = vec![0; 16 << 20];
    image.read(0, &mut bytes);
    let places: Vec<usize> = (0..bytes.len() / PAGE)
        .map(|page| page * PAGE)
        .filter(|at| bytes[*at..].starts_with(b"KVSD"))
        .collect();
    assert!(places.len() >= 2, "there are sectioned blocks");
    let mut dice = Dice::new(5);
    let mut misses = 0;
    for round in 0..150 {
        let place = places[round % places.len()] as u64;
        // The head and the first entries, then anywhere.
        let at = place + dice.below(if round % 3 == 0 { 3 * PAGE as u64 } else { 260 });
        let mut broken = image.clone();
        broken.flip_bit(at * 8 + dice.below(8));
        let disk = SimDisk::with_image(broken, SimOptions::default());
        let mut store = Store::open(disk, config(), Oracle::default());
        for number in 0..12 {
            let put = common::Put {
                nonce: 1,
                order: 0,
                flushed: true,
                uncertain: false,
            };
            store.oracle.allowed.insert(number, vec![put]);
            misses += u64::from(store.outcome_of_get(number).is_err());
        }
    }
    assert!(misses > 80, "{misses}");
}

/// Pages with records that cannot be, sealed with a check that holds.
#[test]
fn absurd_records_under_a_good_check_cost_blocks_and_nothing_else() {
    let (superblock, image) = filled(60);
    let mut hits = 0;
    for seed in 0..60 {
        let mut dice = Dice::new(seed);
        let mut broken = image.clone();
        for _ in 0..1 + dice.below(6) {
            let segment = dice.below(u64::from(superblock.segments_per_shard)) as u32;
            let (kind, first) = match dice.below(3) {
                0 => (PageKind::Header, 0),
                1 => (PageKind::Directory, 1 + dice.below(4) as u32),
                _ => (PageKind::Footer, superblock.footer_page()),
            };
            let absurd = |dice: &mut Dice| {
                [
                    0,
                    1,
                    2,
                    40,
                    u64::from(u32::MAX),
                    1 << 61,
                    u64::MAX,
                    dice.next(),
                ][dice.below(8) as usize]
            };
            // Of this opening of the segment, or it counts for nothing.
            let place = superblock.offset(0, segment, 0);
            let mut header = vec![0; PAGE];
            image.read(place, &mut header);
            let opened = decode_page(&header, &superblock, place);
            let opened = opened.map_or(1, |(head, _)| head.opened_sequence);
            let head = PageHead {
                kind,
                segment: [segment, absurd(&mut dice) as u32][dice.below(2) as usize],
                generation: [1, absurd(&mut dice) as u32][dice.below(2) as usize],
                page_number: [0, absurd(&mut dice) as u16][dice.below(2) as usize],
                page_count: [1, absurd(&mut dice) as u16][dice.below(2) as usize],
                used_pages: absurd(&mut dice) as u32,
                opened_sequence: [opened, absurd(&mut dice)][dice.below(2) as usize],
            };
            let records: Vec<Record> = (0..dice.below(RECORDS_PER_PAGE as u64 + 1))
                .map(|_| {
                    let mut bytes = noise(&mut dice, size_of::<Record>());
                    bytes[..32].copy_from_slice(id(dice.below(80)).as_bytes());
                    bytes[32..40].copy_from_slice(&absurd(&mut dice).to_le_bytes());
                    for field in [56, 60] {
                        let value = absurd(&mut dice) as u32;
                        bytes[field..field + 4].copy_from_slice(&value.to_le_bytes());
                    }
                    bytes[64] = dice.below(5) as u8;
                    Record::read_from_bytes(&bytes).unwrap()
                })
                .collect();
            let offset = superblock.offset(0, segment, first);
            let mut page = vec![0; PAGE];
            encode_page(&mut page, &superblock, offset, &head, &records);
            broken.write(offset, &page);
        }
        hits += judge(broken, 60);
    }
    assert!(hits > 500, "{hits}");
}

/// A checkpoint whose index entries lead anywhere, under a check that holds.
#[test]
fn absurd_checkpoints_under_a_good_check_cost_blocks_and_nothing_else() {
    let (superblock, image) = filled(120);
    let mut hits = 0;
    for seed in 0..60 {
        let mut dice = Dice::new(seed);
        let mut broken = image.clone();
        let mut changed = 0;
        for area in 0..2 {
            let offset = superblock.checkpoint_area(0, area);
            let mut bytes = vec![0; CHUNK_BYTES];
            broken.read(offset, &mut bytes);
            let Some((place, payload)) = decode_chunk(&bytes, &superblock, offset) else {
                continue;
            };
            let len = payload.len();
            for _ in 0..1 + dice.below(200) {
                // Mostly entries, now and then the head and the segment states before them.
                let start = if dice.below(20) == 0 { 64 } else { 64 + 320 };
                let at = start + dice.below((len - 328) as u64) as usize;
                let absurd = [u64::MAX, 0, 1 << 30, dice.next()][dice.below(4) as usize];
                let value = absurd.as_bytes();
                bytes[at..at + 8].copy_from_slice(value);
            }
            encode_chunk(&mut bytes, &superblock, offset, place, len);
            broken.write(offset, &bytes);
            changed += 1;
        }
        assert!(changed > 0, "there is a checkpoint");
        hits += judge(broken, 120);
    }
    assert!(hits > 500, "{hits}");
}
