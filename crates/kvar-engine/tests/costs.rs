//! What a read and a put cost, in counts that do not depend on how busy the machine is: memory
//! allocations, system calls and hashes of block ids (each a search in a map) of the shard's own thread.
//!
//! Each bound says what is behind it. A count that goes up is a change of the hot path that nobody
//! asked for: look for it before you raise the bound.

use allocation_counter::measure;
use kvar_base::{BlockId, ContentCheck, DeviceUuid, Moment, PutOutcome};
use kvar_engine::{
    Engine, EngineConfig, Event, FormatOptions, GetRequest, PutHints, PutRequest, ReadHints, Touch,
    arena_bytes, format,
};
use kvar_io::{Arena, DeviceOptions, IoEngine, Target, Wanted, open_device};
use std::time::Duration;

const BLOCK_BYTES: usize = 64 << 10;
/// Large enough for segments of 4 MiB: what a segment costs is shared by 60 blocks.
const DEVICE_BYTES: u64 = 1 << 30;
const BLOCKS: u64 = 2048;
const DEPTH: usize = 16;
const NAP: Duration = Duration::from_millis(50);

/// A read from the device: none of its own. The order of recency is a tree that takes a node for
/// every sixth block.
const READ_ALLOCATIONS_MAX: f64 = 0.25;
/// A hit in memory: the same tree, which is asked to move a block.
const HIT_ALLOCATIONS_MAX: f64 = 0.25;
/// A read from the device. Memory: is it here, to use it, to begin (3), who leaves (1), is it here
/// meanwhile, to come in (2); the order of memory: to leave, to come in (1 and 2); reads under way:
/// is there one, to begin, is it still wanted, to end (4). The index and what is learned hash for
/// themselves.
const READ_HASHES_MAX: f64 = 13.5;
/// A hit. Memory: is it here, to use it, to move it, to answer (4); the order: to leave and to enter
/// (3).
const HIT_HASHES_MAX: f64 = 7.5;
/// A put: the trees of recency and of what is not flushed (one node for six each), and, shared by
/// the 16 blocks of a gather write, its two lists; directory pages, footers, headers and reclaim
/// make up the rest, shared by the blocks of a sync or a segment.
const PUT_ALLOCATIONS_MAX: f64 = 1.5;
/// A read alone under way: one call that hands it over and waits for it, and now and then one for
/// work that the kernel left over.
const READ_CALLS_QD1_MAX: f64 = 1.3;
/// Sixteen under way: calls are shared as far as completions come together. At worst each has one.
const READ_CALLS_QD16_MAX: f64 = 1.05;
/// A gather write of 1 MiB is one entry, handed over together with others; the rest is waiting for
/// room, headers, directory pages and flushes.
const PUT_CALLS_MAX: f64 = 0.4;

struct Store {
    engine: Engine,
    payload: Vec<u8>,
    crc: u64,
    now: u64,
    next: u64,
    _folder: tempfile::TempDir,
}

fn id(number: u64) -> BlockId {
    let mut bytes = [0x5c; 32];
    bytes[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    BlockId::new(bytes)
}

impl Store {
    /// A store on a file through io_uring; `None`, said aloud, where the kernel refuses it.
    fn open(dram_bytes: u64) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let wanted = Wanted {
            size: Some(DEVICE_BYTES),
            create: true,
        };
        let target = Target::open(folder.path().join("data"), wanted).unwrap();
        let options = DeviceOptions {
            engine: IoEngine::IoUring,
            ..DeviceOptions::default()
        };
        let small = Arena::new(1 << 20).unwrap();
        let mut device = match open_device(&target, &small, options) {
            Ok((device, _)) => device,
            Err(refused) => {
                eprintln!("not measured: {refused}");
                return None;
            }
        };
        let how = FormatOptions {
            shards: 1,
            expected_block_bytes: BLOCK_BYTES as u64,
            created_unix: 0,
            uuid: DeviceUuid::new([3; 16]),
            secret: [4; 16],
        };
        let superblock = format(&mut *device, &small, &how).unwrap();
        drop(device);
        let config = EngineConfig {
            dram_bytes,
            scrub_bytes_per_s: 0,
            ..EngineConfig::default()
        };
        let arena = Arena::new(arena_bytes(&config, &superblock)).unwrap();
        let (device, _) = open_device(&target, &arena, options).unwrap();
        let (engine, _) = Engine::open(device, arena, &superblock, 0, config, Moment(1)).unwrap();
        let payload: Vec<u8> = (0..BLOCK_BYTES).map(|at| (at * 31) as u8).collect();
        let crc = kvar_base::check::crc64(&payload);
        let mut store = Self {
            engine,
            payload,
            crc,
            now: 1,
            next: 0,
            _folder: folder,
        };
        let requests = store.requests(BLOCKS);
        store.put_all(&requests);
        store.settle();
        Some(store)
    }

    fn requests(&mut self, count: u64) -> Vec<PutRequest> {
        let len = BLOCK_BYTES as u32;
        (0..count)
            .map(|_| {
                let id = id(self.next);
                self.next += 1;
                PutRequest {
                    id,
                    sections: vec![(len, ContentCheck::from_crc(self.crc, &id, 0, len))],
                    hints: PutHints {
                        request: self.next,
                        ..PutHints::default()
                    },
                    durable: false,
                    deadline: Moment(u64::MAX),
                }
            })
            .collect()
    }

    fn tick(&mut self) -> Moment {
        self.now += 20;
        Moment(self.now)
    }

    fn put_all(&mut self, requests: &[PutRequest]) {
        for (number, request) in requests.iter().enumerate() {
            loop {
                let now = self.tick();
                match self.engine.put_begin(now, request) {
                    Ok(mut ticket) => {
                        ticket.buffer_mut().copy_from_slice(&self.payload);
                        self.engine.put_commit(now, 0, ticket);
                        break;
                    }
                    Err(PutOutcome::Refused(_)) => {
                        self.engine.turn_and_wait(now, NAP);
                        self.engine.events().for_each(drop);
                    }
                    Err(outcome) => panic!("{outcome:?}"),
                }
            }
            if number % DEPTH == 0 {
                let now = self.tick();
                self.engine.turn(now);
                self.engine.events().for_each(drop);
            }
        }
    }

    /// All of it is on the device, and nothing is under way.
    fn settle(&mut self) {
        self.engine.flush(u64::MAX);
        let mut is_flushed = false;
        // A checkpoint may go on for longer than the flush.
        while !is_flushed || self.engine.in_flight() > 0 {
            let now = self.tick();
            self.engine.turn_and_wait(now, NAP);
            is_flushed |= self.engine.events().any(|event| {
                matches!(
                    event,
                    Event::Done {
                        token: u64::MAX,
                        ..
                    }
                )
            });
        }
    }

    /// Reads blocks `from..from + count`, so many at once; all must hit.
    fn read(&mut self, from: u64, count: u64, depth: usize) {
        let (mut begun, mut done) = (0, 0);
        while done < count {
            while begun < count && begun - done < depth as u64 {
                let now = self.tick();
                let request = GetRequest {
                    id: id(from + begun),
                    sections: None,
                    deadline: Moment(u64::MAX),
                    touch: Touch::default(),
                };
                self.engine.get(now, begun, request, ReadHints::default());
                begun += 1;
            }
            let now = self.tick();
            self.engine.turn_and_wait(now, NAP);
            for event in self.engine.events() {
                if let Event::Get { outcome, .. } = event {
                    let copy = outcome.expect("every block is there");
                    assert_eq!(copy.section(&copy.sections[0]).len(), BLOCK_BYTES);
                    done += 1;
                }
            }
        }
    }
}

/// Allocations and system calls of one operation, over `count` of them.
fn cost(store: &mut Store, count: u64, mut run: impl FnMut(&mut Store)) -> (f64, f64) {
    let calls = store.engine.system_calls();
    let allocations = measure(|| run(store)).count_total;
    let calls = store.engine.system_calls() - calls;
    (
        allocations as f64 / count as f64,
        calls as f64 / count as f64,
    )
}

/// Hashes of ids of one operation, over `count` of them; none where the build does not count them.
fn hashes(store: &mut Store, count: u64, mut run: impl FnMut(&mut Store)) -> f64 {
    let before = kvar_base::ids_hashed();
    run(store);
    let after = kvar_base::ids_hashed();
    before.zip(after).map_or(0.0, |(before, after)| {
        (after - before) as f64 / count as f64
    })
}

fn holds(what: &str, found: f64, most: f64) {
    println!("{what}: {found:.3} (at most {most})");
    assert!(
        found <= most,
        "{what}: {found:.3} for each operation, and {most} were enough before"
    );
}

#[test]
fn a_read_from_the_device_takes_no_memory_and_few_calls() {
    let Some(mut store) = Store::open(8 << 20) else {
        return;
    };
    // Lists and maps grow to their size.
    store.read(0, 512, DEPTH);
    let before = store.engine.counters().flash_hits;
    let (allocations, calls) = cost(&mut store, 1024, |store| store.read(512, 1024, DEPTH));
    assert_eq!(
        store.engine.counters().flash_hits - before,
        1024,
        "all of them were read from the device"
    );
    holds(
        "allocations of a read, 16 under way",
        allocations,
        READ_ALLOCATIONS_MAX,
    );
    holds(
        "system calls of a read, 16 under way",
        calls,
        READ_CALLS_QD16_MAX,
    );
    let (allocations, calls) = cost(&mut store, 512, |store| store.read(0, 512, 1));
    holds(
        "allocations of a read alone",
        allocations,
        READ_ALLOCATIONS_MAX,
    );
    holds("system calls of a read alone", calls, READ_CALLS_QD1_MAX);
    let hashes = hashes(&mut store, 1024, |store| store.read(512, 1024, DEPTH));
    holds("hashes of ids of a read", hashes, READ_HASHES_MAX);
}

#[test]
fn a_hit_in_memory_takes_no_memory_and_no_calls() {
    let Some(mut store) = Store::open(256 << 20) else {
        return;
    };
    store.read(0, 512, DEPTH);
    let before = store.engine.counters().dram_hits;
    let (allocations, calls) = cost(&mut store, 512, |store| store.read(0, 512, DEPTH));
    assert_eq!(store.engine.counters().dram_hits - before, 512);
    holds("allocations of a hit", allocations, HIT_ALLOCATIONS_MAX);
    holds("system calls of a hit", calls, 0.0);
    let hashes = hashes(&mut store, 512, |store| store.read(0, 512, DEPTH));
    holds("hashes of ids of a hit", hashes, HIT_HASHES_MAX);
}

#[test]
fn a_put_takes_little_memory_and_few_calls() {
    let Some(mut store) = Store::open(32 << 20) else {
        return;
    };
    let requests = store.requests(2048);
    let (allocations, calls) = cost(&mut store, 2048, |store| store.put_all(&requests));
    holds("allocations of a put", allocations, PUT_ALLOCATIONS_MAX);
    holds("system calls of a put", calls, PUT_CALLS_MAX);
}
