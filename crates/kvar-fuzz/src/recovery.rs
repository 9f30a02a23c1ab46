//! A whole device of which some bytes, records and checkpoint chunks say something else: the store
//! opens or says why not, serves right bytes or misses, and takes new blocks.
//!
//! ```text
//!   edit  kind 1 | page u16 | at u16 | length 1 | bytes
//!         0: bytes of a page      1: bytes of its records, under a check that holds
//!         2: bytes of a checkpoint chunk, under a check that holds
//! ```

use crate::disk::device;
use kvar_base::{BlockId, ContentCheck, Moment};
use kvar_engine::layout::{
    CHUNK_BYTES, PAGE, Record, decode_chunk, decode_page, encode_chunk, encode_page,
};
use kvar_engine::{
    Engine, EngineConfig, Event, FormatOptions, GetRequest, PutHints, PutRequest, ReadHints,
    Superblock, Touch, arena_bytes, format, read_superblock,
};
use kvar_io::Arena;
use kvar_io::sim::{Image, SimDisk, SimOptions, Survival};
use std::sync::OnceLock;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

/// Blocks on the device; the last third is behind the checkpoint.
const BLOCKS: u64 = 60;
/// Turns within which a store at rest answers everything.
const TURNS_MAX: u64 = 20_000;
/// Edits that are made of one input: more only hide each other.
const EDITS_MAX: usize = 64;

fn config() -> EngineConfig {
    EngineConfig {
        dram_bytes: 1 << 20,
        flush_after: Duration::from_millis(20),
        scrub_bytes_per_s: 0,
        ..EngineConfig::default()
    }
}

fn id(number: u64) -> BlockId {
    let mut bytes = [0x11; 32];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (at % 8 * 8)) as u8 ^ at as u8;
    }
    BlockId::new(bytes)
}

/// The sections of a block: one, or four.
fn sections(number: u64) -> Vec<Vec<u8>> {
    let count = if number.is_multiple_of(5) { 4 } else { 1 };
    (0..count)
        .map(|section| {
            let len = 500 + number * 131 % 9000;
            (0..len)
                .map(|at| (number * 7 + section * 3 + at) as u8)
                .collect()
        })
        .collect()
}

struct Store {
    engine: Engine,
    now: Moment,
    next: u64,
}

impl Store {
    fn open(disk: &SimDisk, superblock: &Superblock) -> Option<Self> {
        let arena = Arena::new(arena_bytes(&config(), superblock)).expect("memory");
        let now = Moment(1);
        let device = Box::new(disk.open());
        let (engine, _) = Engine::open(device, arena, superblock, 0, config(), now).ok()?;
        let next = 1;
        Some(Self { engine, now, next })
    }

    /// Goes on until there is an answer to this token.
    fn answer(&mut self, token: u64) -> Event {
        for _ in 0..TURNS_MAX {
            let answer = self.engine.events().find(|event| match event {
                Event::Get { token: of, .. }
                | Event::Put { token: of, .. }
                | Event::Done { token: of, .. } => *of == token,
                Event::Demote { .. } | Event::Awaited { .. } => false,
            });
            if let Some(answer) = answer {
                return answer;
            }
            self.now = self.now.after(Duration::from_millis(1));
            self.engine.turn(self.now);
        }
        panic!(
            "call {token} is not answered: {:?}",
            self.engine.status(self.now)
        );
    }

    fn put(&mut self, number: u64) {
        let id = id(number);
        let bytes = sections(number);
        let checks = (0..)
            .zip(&bytes)
            .map(|(at, bytes)| (bytes.len() as u32, ContentCheck::of(bytes, &id, at)))
            .collect();
        let request = PutRequest {
            id,
            sections: checks,
            hints: PutHints {
                ttl_s: number.is_multiple_of(7).then_some(3600),
                ..PutHints::default()
            },
            durable: false,
            deadline: Moment(u64::MAX),
        };
        let Ok(mut ticket) = self.engine.put_begin(self.now, &request) else {
            return;
        };
        for (at, bytes) in bytes.iter().enumerate() {
            let range = ticket.section_range(at);
            ticket.buffer_mut()[range].copy_from_slice(bytes);
        }
        self.next += 1;
        let token = self.next;
        self.engine.put_commit(self.now, token, ticket);
        self.answer(token);
    }

    /// Whether a block is a hit; its bytes must be right then.
    fn get(&mut self, number: u64) -> bool {
        self.next += 1;
        let token = self.next;
        let request = GetRequest {
            id: id(number),
            sections: None,
            deadline: Moment(u64::MAX),
            touch: Touch::default(),
        };
        self.engine
            .get(self.now, token, request, ReadHints::default());
        let Event::Get { outcome, .. } = self.answer(token) else {
            panic!("a read is answered as a read");
        };
        let Ok(copy) = outcome else { return false };
        let expected = sections(number);
        assert_eq!(copy.sections.len(), expected.len(), "block {number}");
        for (section, bytes) in copy.sections.iter().zip(&expected) {
            assert_eq!(
                copy.section(section),
                bytes,
                "block {number} has other bytes"
            );
        }
        true
    }

    fn flush(&mut self) {
        self.next += 1;
        let token = self.next;
        self.engine.flush(token);
        self.answer(token);
    }
}

/// The device before anything is changed.
fn whole() -> &'static (Superblock, Image) {
    static WHOLE: OnceLock<(Superblock, Image)> = OnceLock::new();
    WHOLE.get_or_init(|| {
        let planned = device();
        let disk = SimDisk::new(planned.device_bytes, SimOptions::default());
        let arena = Arena::new(1 << 20).expect("memory");
        let options = FormatOptions {
            shards: 1,
            expected_block_bytes: 64 << 10,
            created_unix: 7,
            uuid: planned.uuid,
            secret: planned.secret,
        };
        let superblock = format(&mut disk.open(), &arena, &options).expect("a new disk");
        let mut store = Store::open(&disk, &superblock).expect("it opens");
        (0..BLOCKS / 3 * 2).for_each(|number| store.put(number));
        store.flush();
        store.engine.begin_shutdown(store.now);
        while store.engine.shutdown_report().is_none() {
            store.now = store.now.after(Duration::from_millis(1));
            store.engine.turn(store.now);
        }
        drop(store);
        let mut store = Store::open(&disk, &superblock).expect("it opens");
        (BLOCKS / 3 * 2..BLOCKS).for_each(|number| store.put(number));
        store.flush();
        drop(store);
        (superblock, disk.crash(Survival::Flushed))
    })
}

/// Overwrites what there is of `into` at `at`.
fn overwrite(into: &mut [u8], at: usize, bytes: &[u8]) {
    let at = at % into.len().max(1);
    for (old, new) in into[at..].iter_mut().zip(bytes) {
        *old = *new;
    }
}

fn edit(image: &mut Image, superblock: &Superblock, kind: u8, page: u64, at: usize, bytes: &[u8]) {
    let offset = page % (superblock.device_bytes / PAGE as u64) * PAGE as u64;
    match kind % 3 {
        0 => {
            let mut page = vec![0; PAGE];
            image.read(offset, &mut page);
            overwrite(&mut page, at, bytes);
            image.write(offset, &page);
        }
        1 => {
            let mut page = vec![0; PAGE];
            image.read(offset, &mut page);
            let Some((head, mut records)) = decode_page(&page, superblock, offset) else {
                return;
            };
            if records.is_empty() {
                records.push(Record::bare(1, &id(1), 1));
            }
            let mut raw = records.as_bytes().to_vec();
            overwrite(&mut raw, at, bytes);
            let records: Vec<Record> = raw
                .chunks_exact(size_of::<Record>())
                .filter_map(|raw| Record::read_from_bytes(raw).ok())
                .collect();
            encode_page(&mut page, superblock, offset, &head, &records);
            image.write(offset, &page);
        }
        _ => {
            let offset = superblock.checkpoint_area(0, (page % 2) as u32);
            let mut chunk = vec![0; CHUNK_BYTES];
            image.read(offset, &mut chunk);
            let Some((place, payload)) = decode_chunk(&chunk, superblock, offset) else {
                return;
            };
            let filled = payload.len();
            let head = payload.as_ptr() as usize - chunk.as_ptr() as usize;
            overwrite(&mut chunk[head..head + filled], at, bytes);
            encode_chunk(&mut chunk, superblock, offset, place, filled);
            image.write(offset, &chunk);
        }
    }
}

pub(crate) fn recovery(bytes: &[u8]) {
    let (superblock, image) = whole();
    let mut image = image.clone();
    let (mut rest, mut edits) = (bytes, 0);
    while let Some((head, behind)) = rest.split_at_checked(6) {
        let len = usize::from(head[5]).min(behind.len());
        let (changed, behind) = behind.split_at(len);
        let page = u64::from(u16::from_le_bytes([head[1], head[2]]));
        let at = usize::from(u16::from_le_bytes([head[3], head[4]]));
        edit(&mut image, superblock, head[0], page, at, changed);
        (rest, edits) = (behind, edits + 1);
        if edits == EDITS_MAX {
            break;
        }
    }
    let disk = SimDisk::with_image(image, SimOptions::default());
    let arena = Arena::new(1 << 20).expect("memory");
    let Ok(Some(found)) = read_superblock(&mut disk.open(), &arena) else {
        return;
    };
    let Some(mut store) = Store::open(&disk, &found) else {
        return;
    };
    let hits = (0..BLOCKS).filter(|number| store.get(*number)).count() as u64;
    assert!(edits > 0 || hits == BLOCKS, "{hits} of {BLOCKS} are there");
    // And it goes on.
    (BLOCKS..BLOCKS + 4).for_each(|number| store.put(number));
    (BLOCKS..BLOCKS + 4).for_each(|number| {
        store.get(number);
    });
    store.flush();
}
