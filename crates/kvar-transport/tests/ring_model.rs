//! The protocol of a ring in every order of events that two threads allow: shuttle runs a writer and
//! a reader that sleep for want of room and bytes, under many schedules. A side that is never woken is
//! a deadlock, which it reports with the schedule that leads there; a byte that is read before it was
//! written, or written over before it was read, is a wrong byte.
//!
//! (Shuttle has one order for all memory; that the fences give this ring the same is said beside
//! them, in `shared`.)

use kvar_transport::ring::{Reader, RingMemory, Word, Writer};
use shuttle::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

/// Schedules of a random kind, beside the exhaustive ones.
const SCHEDULES: usize = 4_000;
/// Most schedules of the exhaustive kind: there are more than there is time for.
const SCHEDULES_MAX: usize = 30_000;
/// Preemptions that a schedule of the third kind has at most: few are enough for most defects.
const PREEMPTIONS: usize = 3;
/// So small that it is soon full and soon empty.
const RING_BYTES: usize = 4;
const SENT: [u8; 7] = [1, 2, 3, 4, 5, 6, 7];

struct Place {
    words: [AtomicU64; 4],
    bytes: [AtomicU8; RING_BYTES],
    writer_bell: Bell,
    reader_bell: Bell,
}

/// Stays rung until it is heard.
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn new() -> Self {
        Self {
            rung: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.changed.wait(rung).unwrap();
        }
        *rung = false;
    }
}

impl Place {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            words: std::array::from_fn(|_| AtomicU64::new(0)),
            bytes: std::array::from_fn(|_| AtomicU8::new(0)),
            writer_bell: Bell::new(),
            reader_bell: Bell::new(),
        })
    }
}

struct Shown(Arc<Place>);

impl Shown {
    fn word(&self, word: Word) -> &AtomicU64 {
        &self.0.words[word as usize]
    }
}

impl RingMemory for Shown {
    fn capacity(&self) -> usize {
        RING_BYTES
    }
    fn load(&self, word: Word) -> u64 {
        self.word(word).load(Ordering::SeqCst)
    }
    fn store(&self, word: Word, value: u64) {
        self.word(word).store(value, Ordering::SeqCst);
    }
    fn raise(&self, flag: Word) {
        self.word(flag).store(1, Ordering::SeqCst);
    }
    fn is_raised(&self, flag: Word) -> bool {
        self.word(flag).load(Ordering::SeqCst) != 0
    }
    fn take(&self, flag: Word) -> bool {
        self.word(flag).swap(0, Ordering::SeqCst) != 0
    }
    fn copy_in(&mut self, at: usize, bytes: &[u8]) {
        for (place, byte) in self.0.bytes[at..].iter().zip(bytes) {
            place.store(*byte, Ordering::SeqCst);
        }
    }
    fn copy_out(&self, at: usize, into: &mut [u8]) {
        for (byte, place) in into.iter_mut().zip(&self.0.bytes[at..]) {
            *byte = place.load(Ordering::SeqCst);
        }
    }
}

/// Whether a side looks once more after it has said that it waits.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Manners {
    Right,
    WriterSleepsAtOnce,
    ReaderSleepsAtOnce,
}

fn meet(manners: Manners) {
    let place = Place::new();
    let writer = {
        let place = Arc::clone(&place);
        thread::spawn(move || {
            let mut writer = Writer::new(Shown(Arc::clone(&place)));
            let mut left = &SENT[..];
            while !left.is_empty() {
                // Three at a time: pieces that do not fit the ring's end.
                let now = &left[..left.len().min(3)];
                let ring = || place.reader_bell.ring();
                let written = writer.write(&[IoSlice::new(now)], ring).unwrap();
                left = &left[written..];
                if written == 0 {
                    let room = if manners == Manners::WriterSleepsAtOnce {
                        Shown(Arc::clone(&place)).raise(Word::WriterWaits);
                        false
                    } else {
                        writer.arm().unwrap()
                    };
                    if !room {
                        place.writer_bell.wait();
                    }
                }
            }
        })
    };
    let mut reader = Reader::new(Shown(Arc::clone(&place)));
    let mut got = Vec::new();
    while got.len() < SENT.len() {
        let mut into = [0; 3];
        let room = into.len().min(SENT.len() - got.len());
        let ring = || place.writer_bell.ring();
        let read = reader
            .read(&mut [IoSliceMut::new(&mut into[..room])], ring)
            .unwrap();
        got.extend_from_slice(&into[..read]);
        if read == 0 {
            let there = if manners == Manners::ReaderSleepsAtOnce {
                Shown(Arc::clone(&place)).raise(Word::ReaderWaits);
                false
            } else {
                reader.arm().unwrap()
            };
            reader.rest(|| place.writer_bell.ring()).unwrap();
            if !there {
                place.reader_bell.wait();
            }
        }
    }
    assert_eq!(got, SENT);
    writer.join().unwrap();
}

#[test]
fn bytes_arrive_and_nobody_sleeps_for_ever_in_every_order() {
    shuttle::check_dfs(|| meet(Manners::Right), Some(SCHEDULES_MAX));
    shuttle::check_random(|| meet(Manners::Right), SCHEDULES);
    shuttle::check_pct(|| meet(Manners::Right), SCHEDULES, PREEMPTIONS);
}

/// The checker sees what it is for: a side that sleeps without a last look sleeps for ever in some
/// order.
#[test]
fn a_side_that_sleeps_at_once_is_found() {
    for manners in [Manners::WriterSleepsAtOnce, Manners::ReaderSleepsAtOnce] {
        let random = || shuttle::check_random(move || meet(manners), SCHEDULES);
        let few = || shuttle::check_pct(move || meet(manners), SCHEDULES, PREEMPTIONS);
        let found = std::panic::catch_unwind(random).is_err();
        let found = found || std::panic::catch_unwind(few).is_err();
        assert!(found, "{manners:?}");
    }
}
