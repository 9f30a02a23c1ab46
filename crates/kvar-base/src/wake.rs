//! How a thread that sleeps over a queue is woken, and not woken for nothing: two small protocols
//! over one flag, beside any queue and anything that wakes.
//!
//! ```text
//!   asleep   owner:  set ── queue empty? ── sleep ... up ── clear      a busy thread is not woken
//!            sender: send ── was it set? clear and wake
//!
//!   rung     owner:  silence the bell ── clear ── take all             a bell is rung once
//!            sender: send ── was it clear? set and ring
//! ```
//!
//! What must always be true: what is in the queue when its owner sleeps has woken it, or is about
//! to. Sender and owner each write one thing and then read the other's, so both must see one order
//! of all these: a [`Flag`] is read by the sender behind a fence and written by the owner before
//! one, whatever order the queue itself keeps.
//!
//! The flag is a parameter, so that a model checker can put its own in and try every order of
//! events (`tests/wake.rs`).

use std::sync::atomic::{AtomicBool, Ordering, fence};

/// A truth that two threads share.
pub trait Flag {
    /// Changes it; what it was.
    fn swap(&self, on: bool) -> bool;
    /// Changes it.
    fn set(&self, on: bool);
}

impl Flag for AtomicBool {
    fn swap(&self, on: bool) -> bool {
        fence(Ordering::SeqCst);
        self.swap(on, Ordering::SeqCst)
    }

    fn set(&self, on: bool) {
        self.store(on, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
}

/// After something was sent to a thread that says when it sleeps: wakes it if it does.
pub fn wake_sleeper(asleep: &impl Flag, wake: impl FnOnce()) {
    if asleep.swap(false) {
        wake();
    }
}

/// Before the owner of a queue sleeps: whether it may. When it is up again it calls [`is_up`].
pub fn may_sleep(asleep: &impl Flag, is_empty: impl FnOnce() -> bool) -> bool {
    asleep.set(true);
    if is_empty() {
        return true;
    }
    asleep.set(false);
    false
}

/// The owner is up again.
pub fn is_up(asleep: &impl Flag) {
    asleep.set(false);
}

/// After something was sent to a thread that listens to a bell: rings it unless it rings already.
pub fn ring(rung: &impl Flag, bell: impl FnOnce()) {
    if !rung.swap(true) {
        bell();
    }
}

/// Before the owner of a queue takes all that is in it. In this order: who sends between the two
/// finds the bell rung and does not ring, and is received; who sends after them rings again. (A
/// ring that comes late wakes the owner once for nothing, and the next call here silences it.)
pub fn silence(rung: &impl Flag, bell: impl FnOnce()) {
    bell();
    rung.set(false);
}
