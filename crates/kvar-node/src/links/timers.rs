//! When requests and links of a thread are due, in order.
//!
//! A sorted ring and not a tree: most deadlines are as long as those before, so a timer comes in near the
//! end and goes out near the front, and only what lies between there and the nearer end is moved. It keeps
//! the memory it once took, where a tree takes and gives it back with every few requests.
//!
//! Cost: a search, and a move of 32 bytes for each timer between the place and the nearer end.

use super::desk::LinkKey;
use kvar_base::Moment;
use std::collections::VecDeque;

/// When, of which link, and which of its requests.
pub(crate) type Timer = (Moment, LinkKey, u64);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Timers(VecDeque<Timer>);

impl Timers {
    /// Notes one; a second that is the same is the first.
    pub(crate) fn insert(&mut self, timer: Timer) {
        if let Err(at) = self.0.binary_search(&timer) {
            self.0.insert(at, timer);
        }
    }

    /// Forgets one, if it is there.
    pub(crate) fn remove(&mut self, timer: &Timer) {
        if let Ok(at) = self.0.binary_search(timer) {
            self.0.remove(at);
        }
    }

    /// The next to be due.
    pub(crate) fn first(&self) -> Option<Timer> {
        self.0.front().copied()
    }

    /// Takes out the next, if it is due.
    pub(crate) fn pop_due(&mut self, now: Moment) -> Option<Timer> {
        self.0.pop_front_if(|(at, ..)| *at <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn they_are_due_in_order(steps in prop::collection::vec((0..40_u64, 0..3_usize, 0..4_u64, 0..4_u8), 0..200)) {
            let (mut timers, mut model) = (Timers::default(), BTreeSet::<Timer>::new());
            for (at, index, request, what) in steps {
                let timer = (Moment(at), LinkKey { index, serial: 7 }, request);
                match what {
                    0 => {
                        timers.remove(&timer);
                        model.remove(&timer);
                    }
                    1 => {
                        let due = model.first().copied().filter(|(due, ..)| due.0 <= at);
                        prop_assert_eq!(timers.pop_due(Moment(at)), due);
                        if let Some(due) = due {
                            model.remove(&due);
                        }
                    }
                    _ => {
                        timers.insert(timer);
                        model.insert(timer);
                    }
                }
                prop_assert_eq!(timers.first(), model.first().copied());
            }
            prop_assert!(timers.0.iter().eq(&model));
        }
    }
}
