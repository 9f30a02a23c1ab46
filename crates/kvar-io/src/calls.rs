//! How many system calls the data path makes on a thread, for figures and tests.
//!
//! Whoever makes one on the path of a get or put says so here, where it is made. It is a count of
//! each thread alone, so that it costs an addition.

use std::cell::Cell;

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

/// One more.
pub fn note() {
    CALLS.with(|calls| calls.set(calls.get() + 1));
}

/// How many this thread has made so far.
#[must_use]
pub fn so_far() -> u64 {
    CALLS.with(Cell::get)
}
