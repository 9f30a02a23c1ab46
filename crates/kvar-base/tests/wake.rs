//! The two protocols of `wake`, in every order of events that a few threads allow: shuttle runs
//! senders and a sleeper under many schedules, and a sleeper that is never woken is a deadlock,
//! which it reports with the schedule that leads there.

use kvar_base::wake::{self, Flag};
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;
use std::collections::VecDeque;
use std::sync::Arc;

/// Schedules of a random kind, beside the exhaustive ones.
const SCHEDULES: usize = 5_000;
/// Most schedules of the exhaustive kind: two senders have more than there is time for.
const SCHEDULES_MAX: usize = 50_000;
/// Preemptions that a schedule of the third kind has at most: few are enough for most defects.
const PREEMPTIONS: usize = 3;
const SENDERS: u32 = 2;
const EACH: u32 = 2;

struct Shown(AtomicBool);

impl Flag for Shown {
    fn swap(&self, on: bool) -> bool {
        self.0.swap(on, Ordering::SeqCst)
    }

    fn set(&self, on: bool) {
        self.0.store(on, Ordering::SeqCst);
    }
}

/// A waker or an eventfd: stays until it is taken, wakes whoever waits.
struct Signal {
    given: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    fn give(&self) {
        *self.given.lock().unwrap() = true;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let mut given = self.given.lock().unwrap();
        while !*given {
            given = self.changed.wait(given).unwrap();
        }
    }

    fn clear(&self) {
        *self.given.lock().unwrap() = false;
    }
}

struct Place {
    queue: Mutex<VecDeque<u32>>,
    flag: Shown,
    signal: Signal,
}

impl Place {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::new(VecDeque::new()),
            flag: Shown(AtomicBool::new(false)),
            signal: Signal {
                given: Mutex::new(false),
                changed: Condvar::new(),
            },
        })
    }

    fn take_all(&self) -> u32 {
        let taken = std::iter::from_fn(|| self.queue.lock().unwrap().pop_front());
        taken.count() as u32
    }

    fn is_empty(&self) -> bool {
        self.queue.lock().unwrap().is_empty()
    }
}

/// Senders put pieces into the queue and call `sent`; the owner runs `round` until it has all.
fn meet(senders: u32, sent: fn(&Place), round: fn(&Place) -> u32) {
    let place = Place::new();
    let threads: Vec<_> = (0..senders)
        .map(|_| {
            let place = Arc::clone(&place);
            thread::spawn(move || {
                for piece in 0..EACH {
                    place.queue.lock().unwrap().push_back(piece);
                    sent(&place);
                }
            })
        })
        .collect();
    let mut got = 0;
    while got < senders * EACH {
        got += round(&place);
    }
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(place.is_empty());
}

fn every_order(sent: fn(&Place), round: fn(&Place) -> u32) {
    shuttle::check_dfs(move || meet(1, sent, round), Some(SCHEDULES_MAX));
    shuttle::check_random(move || meet(SENDERS, sent, round), SCHEDULES);
    shuttle::check_pct(move || meet(SENDERS, sent, round), SCHEDULES, PREEMPTIONS);
}

/// As the mailboxes of a node and of a client do it.
fn sleep(place: &Place) -> u32 {
    let got = place.take_all();
    if got == 0 && wake::may_sleep(&place.flag, || place.is_empty()) {
        place.signal.wait();
        place.signal.clear();
        wake::is_up(&place.flag);
    }
    got
}

fn wake_up(place: &Place) {
    wake::wake_sleeper(&place.flag, || place.signal.give());
}

/// As a device over threads does it.
fn listen(place: &Place) -> u32 {
    place.signal.wait();
    wake::silence(&place.flag, || place.signal.clear());
    place.take_all()
}

fn ring(place: &Place) {
    wake::ring(&place.flag, || place.signal.give());
}

#[test]
fn a_sleeper_is_woken_in_every_order() {
    every_order(wake_up, sleep);
}

#[test]
fn a_listener_hears_the_bell_in_every_order() {
    every_order(ring, listen);
}

/// The checker sees what it is for: a sleeper that looks before it says that it sleeps, and a bell
/// that is silenced after the queue was emptied, sleep for ever in some order.
#[test]
fn protocols_in_the_wrong_order_are_found() {
    let hangs = |sent: fn(&Place), round: fn(&Place) -> u32| {
        let check = || shuttle::check_random(move || meet(SENDERS, sent, round), SCHEDULES);
        std::panic::catch_unwind(check).is_err()
    };
    assert!(hangs(wake_up, |place| {
        let got = place.take_all();
        if got == 0 {
            place.flag.set(true);
            place.signal.wait();
            place.signal.clear();
            wake::is_up(&place.flag);
        }
        got
    }));
    assert!(hangs(ring, |place| {
        place.signal.wait();
        let got = place.take_all();
        wake::silence(&place.flag, || place.signal.clear());
        got
    }));
}
