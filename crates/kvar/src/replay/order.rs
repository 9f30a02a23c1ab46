//! Which requests of a trace may run beside each other.
//!
//! Requests begin in the order of the trace. One waits for an earlier one while that one may still
//! put a block that both name; so a replay with many requests at once finds what a replay one by
//! one finds. What a request will put is known once its lookup has been answered; until then it may
//! be any of its blocks.

use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, HashSet};

/// Hands requests to workers.
pub(crate) struct Order {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    next: usize,
    end: usize,
    running: BTreeMap<usize, Running>,
}

struct Running {
    ids: HashSet<u64>,
    /// What it will put; `None` while that is open.
    puts: Option<HashSet<u64>>,
}

impl Running {
    fn holds_back(&self, later: &HashSet<u64>) -> bool {
        match &self.puts {
            None => !self.ids.is_disjoint(later),
            Some(puts) => !puts.is_disjoint(later),
        }
    }
}

impl Order {
    /// Requests 0 to `end`.
    pub(crate) fn new(end: usize) -> Self {
        let state = State {
            next: 0,
            end,
            running: BTreeMap::new(),
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// The next request; `None` when there are no more. `ids_of` names its blocks.
    pub(crate) fn next(&self, ids_of: impl FnOnce(usize) -> HashSet<u64>) -> Option<usize> {
        let mut state = self.state.lock();
        if state.next >= state.end {
            return None;
        }
        let number = state.next;
        state.next += 1;
        let ids = ids_of(number);
        state.running.insert(number, Running { ids, puts: None });
        Some(number)
    }

    /// Waits until no earlier request holds this one back.
    pub(crate) fn wait(&self, number: usize) {
        let mut state = self.state.lock();
        loop {
            let ids = &state.running[&number].ids;
            if !state
                .running
                .range(..number)
                .any(|(_, earlier)| earlier.holds_back(ids))
            {
                return;
            }
            self.changed.wait(&mut state);
        }
    }

    /// The request's lookup has been answered: it will put these and no others.
    pub(crate) fn will_put(&self, number: usize, puts: HashSet<u64>) {
        if let Some(running) = self.state.lock().running.get_mut(&number) {
            running.puts = Some(puts);
        }
        self.changed.notify_all();
    }

    /// The request is over.
    pub(crate) fn finish(&self, number: usize) {
        self.state.lock().running.remove(&number);
        self.changed.notify_all();
    }

    /// No further request begins.
    pub(crate) fn stop(&self) {
        self.state.lock().end = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn set(ids: &[u64]) -> HashSet<u64> {
        ids.iter().copied().collect()
    }

    #[test]
    fn a_later_request_waits_for_puts_it_shares_and_for_nothing_else() {
        let blocks = [set(&[1, 2]), set(&[1, 3]), set(&[9])];
        let order = Order::new(3);
        for number in 0..3 {
            assert_eq!(order.next(|number| blocks[number].clone()), Some(number));
        }
        assert_eq!(order.next(|_| set(&[])), None);
        order.wait(0);
        order.wait(2);
        let (released, waited) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                order.wait(1);
                assert!(
                    released.load(Ordering::SeqCst),
                    "went ahead of what it needs"
                );
                waited.store(true, Ordering::SeqCst);
            });
            // Block 1 is there already; only 2 will be put, which request 1 does not name.
            released.store(true, Ordering::SeqCst);
            order.will_put(0, set(&[2]));
        });
        assert!(waited.load(Ordering::SeqCst));
        order.finish(0);
        order.stop();
    }
}
