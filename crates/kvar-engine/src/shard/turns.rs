//! Reads that wait for their turn at the device: in turn among those who ask, and none for nobody.
//!
//! ```text
//!   get ── fewer than READS_AT_DEVICE_MAX under way, nobody waits ──> device
//!    └─ else ──> line of whoever asks ── a read has ended, and it is that line's turn ──> device
//!                       │  the deadline has passed meanwhile, or who asked has gone:  Miss(deadline), the
//!                       │  device reads nothing
//!                       └─ READS_WAITING_MAX wait:  the youngest of the longest line, Miss(overloaded)
//! ```
//!
//! A device that is handed everything at once serves in its own order, and takes nothing back: who asks
//! for a thousand blocks is served before who asks for one, and long after it has given up.
//!
//! What must always be true: a line that waits is served after at most one read of each other line;
//! what waits, be it for its turn or for a read that another began, is bounded and holds no memory of
//! blocks; nothing waits while the device has room.
//!
//! Left to others: who asks (the caller numbers them), and the read itself (`read`, `sections`).

use super::read::Reading;
use super::{READS_AT_DEVICE_MAX, Reader, Shard};
use kvar_base::{BlockId, FastMap, MissReason, Moment};
use std::collections::VecDeque;
use std::time::Duration;

/// Reads that wait, at most: what four links with the usual number of requests can ask for. 120 bytes
/// each.
pub(super) const READS_WAITING_MAX: usize = 4096;

/// Readers that wait for a read which another began, at most, over all reads under way. 120 bytes each.
pub(super) const READS_JOINED_MAX: usize = 4 * READS_WAITING_MAX;

/// How often, at most, those whose time is over are looked for in a full waiting room.
const SWEEP_PAUSE: Duration = Duration::from_millis(1);

/// See the module.
#[derive(Default)]
pub(super) struct Turns {
    lines: FastMap<u64, VecDeque<Reader>>,
    /// Whose turn is next. Each that has a line stands here once.
    order: VecDeque<u64>,
    waiting: usize,
    swept_at: Moment,
    /// Readers of reads under way.
    joined: usize,
    joined_swept_at: Moment,
}

impl Turns {
    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// How many wait for a read that is under way.
    pub(super) fn joined(&self) -> usize {
        self.joined
    }

    /// A read has begun, or one more waits for it.
    pub(super) fn join(&mut self) {
        self.joined += 1;
    }

    /// So many wait for a read no more.
    pub(super) fn part(&mut self, count: usize) {
        self.joined -= count;
    }

    fn push(&mut self, reader: Reader) {
        let asker = reader.hints.asker;
        let line = self.lines.entry(asker).or_default();
        if line.is_empty() {
            self.order.push_back(asker);
        }
        line.push_back(reader);
        self.waiting += 1;
    }

    /// The next of the line whose turn it is.
    fn pop(&mut self) -> Option<Reader> {
        let asker = self.order.pop_front()?;
        let line = self.lines.get_mut(&asker)?;
        let next = line.pop_front();
        if line.is_empty() {
            self.lines.remove(&asker);
        } else {
            self.order.push_back(asker);
        }
        self.waiting -= usize::from(next.is_some());
        next
    }

    /// Makes room for one who asks: takes the youngest of the longest line, if that is longer than
    /// the line of who asks would become.
    fn make_way(&mut self, asker: u64) -> Option<u64> {
        let own = self.lines.get(&asker).map_or(0, VecDeque::len);
        let longest = self.order.iter().max_by_key(|it| self.lines[*it].len());
        let line = self.lines.get_mut(longest?)?;
        if line.len() <= own + 1 {
            return None;
        }
        let youngest = line.pop_back()?;
        self.waiting -= 1;
        Some(youngest.token)
    }

    /// Takes one out of an asker's line; whether it was there.
    fn leave(&mut self, asker: u64, is_it: impl Fn(&Reader) -> bool) -> bool {
        let Some(line) = self.lines.get_mut(&asker) else {
            return false;
        };
        let Some(at) = line.iter().position(is_it) else {
            return false;
        };
        line.remove(at);
        self.waiting -= 1;
        if line.is_empty() {
            self.lines.remove(&asker);
            self.order.retain(|it| *it != asker);
        }
        true
    }

    /// Takes out all whose time is over.
    fn sweep(&mut self, now: Moment) -> Vec<u64> {
        self.swept_at = now;
        let mut over = Vec::new();
        for line in self.lines.values_mut() {
            line.retain(|reader| {
                let is_over = reader.request.deadline <= now;
                if is_over {
                    over.push(reader.token);
                }
                !is_over
            });
        }
        let lines = &mut self.lines;
        self.order.retain(|asker| !lines[asker].is_empty());
        lines.retain(|_, line| !line.is_empty());
        self.waiting -= over.len();
        // The order of a map is its own affair; that of answers is not.
        over.sort_unstable();
        over
    }
}

impl Shard {
    /// Whether a read that begins now has to wait.
    pub(super) fn must_wait(&self) -> bool {
        self.reads_in_flight >= READS_AT_DEVICE_MAX || self.turns.waiting > 0
    }

    /// A read waits for its turn.
    pub(super) fn wait_for_turn(&mut self, now: Moment, reader: Reader) {
        if self.turns.waiting >= READS_WAITING_MAX && now.since(self.turns.swept_at) >= SWEEP_PAUSE
        {
            for token in self.turns.sweep(now) {
                self.overdue_at_device(token);
            }
        }
        if self.turns.waiting >= READS_WAITING_MAX {
            match self.turns.make_way(reader.hints.asker) {
                Some(youngest) => self.miss(youngest, MissReason::Overloaded),
                None => return self.miss(reader.token, MissReason::Overloaded),
            }
        }
        self.counters.reads_waited += 1;
        self.turns.push(reader);
    }

    /// Whether one more may wait for a read that is under way: a device that hangs ends no read, and
    /// whoever asks for the same again and again would be remembered each time.
    pub(super) fn may_join(&mut self) -> bool {
        let now = self.now;
        let is_full = self.turns.joined >= READS_JOINED_MAX;
        if is_full && now.since(self.turns.joined_swept_at) >= SWEEP_PAUSE {
            self.turns.joined_swept_at = now;
            for token in self.leave_reads(|reader| reader.request.deadline <= now) {
                self.overdue_at_device(token);
            }
        }
        self.turns.joined < READS_JOINED_MAX
    }

    /// Whoever asked under this token has gone. Its read, if the device has it already, is delivered.
    pub(crate) fn forget(&mut self, asker: u64, token: u64, id: &BlockId) {
        if self.forget_awaited(id, token) {
            return;
        }
        let is_it = |reader: &Reader| reader.token == token;
        let was_here = self.turns.leave(asker, is_it) || self.leave_reads_of(id, is_it);
        if was_here {
            self.overdue_at_device(token);
        }
    }

    /// Takes one out who waits for a read of this block that is under way; whether there was one.
    fn leave_reads_of(&mut self, id: &BlockId, is_it: impl Fn(&Reader) -> bool) -> bool {
        let whole = self.reading.get_mut(id);
        let whole = whole.map(Reading::waiters_mut).into_iter();
        let found = whole.chain(self.ahead.waiters_of(id)).any(|waiters| {
            let at = waiters.iter().position(&is_it);
            at.map(|at| waiters.remove(at)).is_some()
        });
        self.turns.part(usize::from(found));
        found
    }

    /// Takes out those who wait for a read under way and are done with it.
    fn leave_reads(&mut self, is_done: impl Fn(&Reader) -> bool) -> Vec<u64> {
        let mut done = Vec::new();
        let mut stays = |reader: &mut Reader| {
            let is_done = is_done(reader);
            if is_done {
                done.push(reader.token);
            }
            !is_done
        };
        let whole = self.reading.values_mut().map(Reading::waiters_mut);
        whole.for_each(|waiters| waiters.retain(&mut stays));
        let stretches = self.ahead.waiters_mut();
        stretches.for_each(|waiters| waiters.retain(&mut stays));
        self.turns.part(done.len());
        // The order of a map is its own affair; that of answers is not.
        done.sort_unstable();
        done
    }

    /// Begins as many of the reads that wait as the device has room for.
    pub(super) fn give_turns(&mut self, now: Moment) {
        while self.reads_in_flight < READS_AT_DEVICE_MAX {
            let Some(reader) = self.turns.pop() else {
                return;
            };
            if reader.request.deadline <= now {
                self.overdue_at_device(reader.token);
                continue;
            }
            // It was there when it was asked for, and may have gone since; what it was worth is noted.
            match self.visible(now, &reader.request.id) {
                Err(reason) => self.miss(reader.token, reason),
                Ok(()) => {
                    let found = self.find(&reader.request.id);
                    self.begin_read(reader, found);
                }
            }
        }
    }

    pub(super) fn overdue_at_device(&mut self, token: u64) {
        self.counters.overdue_at_device += 1;
        self.miss(token, MissReason::Deadline);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GetRequest, ReadHints, Touch};

    fn reader(asker: u64, token: u64, deadline: u64) -> Reader {
        let request = GetRequest {
            id: BlockId::new([1; 32]),
            sections: None,
            deadline: Moment(deadline),
            touch: Touch::default(),
        };
        let hints = ReadHints {
            asker,
            ..ReadHints::default()
        };
        Reader::new(token, request, hints)
    }

    #[test]
    fn lines_are_served_in_turn_and_each_in_order() {
        let mut turns = Turns::default();
        for token in 0..4 {
            turns.push(reader(1, token, 9));
        }
        turns.push(reader(2, 10, 9));
        turns.push(reader(3, 20, 9));
        turns.push(reader(3, 21, 9));
        let order: Vec<u64> = std::iter::from_fn(|| turns.pop().map(|it| it.token)).collect();
        assert_eq!(order, [0, 10, 20, 1, 21, 2, 3]);
        assert_eq!((turns.waiting(), turns.lines.len()), (0, 0));
    }

    #[test]
    fn the_longest_line_makes_way_to_a_shorter_one_only() {
        let mut turns = Turns::default();
        for token in 0..5 {
            turns.push(reader(1, token, 9));
        }
        turns.push(reader(2, 10, 9));
        assert_eq!(turns.make_way(2), Some(4));
        assert_eq!(turns.make_way(3), Some(3));
        assert_eq!(turns.make_way(1), None);
        turns.push(reader(2, 11, 9));
        // Equally long: nobody goes for who would only trade places.
        assert_eq!(turns.make_way(2), None);
        assert_eq!(turns.waiting(), 5);
    }

    #[test]
    fn what_is_over_is_swept_and_the_rest_keeps_its_turn() {
        let mut turns = Turns::default();
        for (token, deadline) in [(0, 5), (1, 50), (2, 5)] {
            turns.push(reader(1, token, deadline));
            turns.push(reader(token + 2, token + 10, 5));
        }
        assert_eq!(turns.sweep(Moment(5)), [0, 2, 10, 11, 12]);
        assert_eq!(turns.waiting(), 1);
        assert_eq!(turns.pop().map(|it| it.token), Some(1));
        assert!(turns.pop().is_none());
    }
}
