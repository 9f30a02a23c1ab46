//! Which calls are one use: the calls about one prompt carry one number, and what they touch is used
//! once, however many of them come (a lookup, then gets, then puts).
//!
//! Only the latest requests are remembered. A number of zero stands for itself: every call under it is
//! a use of its own.

use kvar_base::FastMap;
use std::collections::VecDeque;

/// Requests whose arrival number is remembered, so that the calls of one prompt count as one.
const KEPT: usize = 256;
/// After so many uses under one number the blocks of a request begin a new group in the order of
/// memory: one number for everything, which any client may send, would make one group of all, and
/// each touch a walk through it.
const USES_MAX: u64 = 4096;

/// What is remembered of a request.
struct Arrival {
    number: u64,
    /// Its lookup touched what it found; the gets and puts that follow are the same use.
    looked_up: bool,
    /// How many blocks its prompt has, as far as is known.
    blocks: u32,
    uses: u64,
}

/// The latest requests, each with its number in the order in which they came.
pub(super) struct Arrivals {
    by_request: FastMap<u64, Arrival>,
    /// Requests in the order in which they are forgotten.
    order: VecDeque<u64>,
    next: u64,
}

impl Default for Arrivals {
    fn default() -> Self {
        Self {
            by_request: FastMap::default(),
            order: VecDeque::new(),
            next: 1,
        }
    }
}

impl Arrivals {
    /// The arrival number of a request: equal for all calls about one prompt, growing with time.
    pub(super) fn number(&mut self, request: u64) -> u64 {
        if request != 0
            && let Some(arrival) = self.by_request.get_mut(&request)
        {
            arrival.uses += 1;
            if arrival.uses.is_multiple_of(USES_MAX) {
                arrival.number = self.next;
                self.next += 1;
            }
            return arrival.number;
        }
        let number = self.next;
        self.next += 1;
        if request != 0 {
            if self.order.len() == KEPT {
                let oldest = self.order.pop_front().expect("it is full");
                self.by_request.remove(&oldest);
            }
            self.order.push_back(request);
            let arrival = Arrival {
                number,
                looked_up: false,
                blocks: 0,
                uses: 0,
            };
            self.by_request.insert(request, arrival);
        }
        number
    }

    /// Whether a request looked its chain up before: that counted as its touch.
    pub(super) fn has_looked_up(&self, request: u64) -> bool {
        self.get(request).is_some_and(|arrival| arrival.looked_up)
    }

    fn get(&self, request: u64) -> Option<&Arrival> {
        // What stands for itself is never remembered, and need not be looked for.
        (request != 0).then(|| self.by_request.get(&request))?
    }

    /// How many blocks the prompt of a request has, if this one is at `depth` in it.
    pub(super) fn blocks(&self, request: u64, depth: u32) -> u32 {
        let known = self.get(request).map_or(0, |one| one.blocks);
        known.max(depth.saturating_add(1))
    }

    /// A request's prompt has at least so many blocks.
    pub(super) fn expect_blocks(&mut self, request: u64, blocks: u32) {
        if let Some(arrival) = self.known(request) {
            arrival.blocks = arrival.blocks.max(blocks);
        }
    }

    /// The calls that follow under this number are the same use of what was looked up.
    pub(super) fn looked_up(&mut self, request: u64) {
        if let Some(arrival) = self.known(request) {
            arrival.looked_up = true;
        }
    }

    /// A request that has a number; it is remembered from now on.
    fn known(&mut self, request: u64) -> Option<&mut Arrival> {
        if request == 0 {
            return None;
        }
        self.number(request);
        self.by_request.get_mut(&request)
    }
}
