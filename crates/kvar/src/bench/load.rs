//! What loads are made of: numbers that look random, and blocks that are put until all are there.

use super::bar;
use crate::failure::Failure;
use kvar_base::PutOutcome;
use kvar_client::{Answer, PutItem, Request, Session, Ticket};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a filling waits before it puts again what was refused.
const REFUSED_PAUSE: Duration = Duration::from_millis(2);

/// Numbers that look random and come again with their seed (xorshift). A few instructions each: it
/// stands in loops that are measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// The sequence of a seed; zero would stay zero.
    pub(super) fn new(seed: u64) -> Self {
        Self(if seed == 0 { 1 } else { seed })
    }

    pub(super) fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// So many bytes that nothing compresses.
    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = len.div_ceil(8);
        let mut bytes: Vec<u8> = (0..words)
            .flat_map(|_| self.number().to_le_bytes())
            .collect();
        bytes.truncate(len);
        bytes
    }
}

/// Which blocks are put, and how.
pub(super) struct Filling {
    /// Blocks 0 to this.
    pub(super) blocks: u64,
    /// Puts under way at once.
    pub(super) in_flight: usize,
    /// Of each put; a node that takes none for so long is given up.
    pub(super) deadline: Duration,
}

impl Filling {
    /// Puts each block until it is there; `item` makes one from its number.
    pub(super) fn put(
        &self,
        session: &mut Session,
        mut item: impl FnMut(u64) -> PutItem,
    ) -> Result<(), Failure> {
        let progress = bar(self.blocks, "blocks filled");
        let mut under_way: HashMap<Ticket, u64> = HashMap::new();
        let mut again: Vec<u64> = Vec::new();
        let mut done = Vec::new();
        let (mut next, mut moved_at) = (0, Instant::now());
        while next < self.blocks || !under_way.is_empty() || !again.is_empty() {
            while under_way.len() < self.in_flight && (next < self.blocks || !again.is_empty()) {
                let number = again.pop().unwrap_or_else(|| {
                    next += 1;
                    next - 1
                });
                let items = vec![item(number).prepare()];
                let ticket = session.submit(Request::Put { items }, self.deadline);
                under_way.insert(ticket, number);
            }
            session.poll(Duration::from_millis(100), &mut done);
            let mut refused = None;
            for completion in done.drain(..) {
                let Some(number) = under_way.remove(&completion.ticket) else {
                    continue;
                };
                match completion.answer {
                    Answer::Put(outcomes)
                        if matches!(outcomes[..], [PutOutcome::Stored | PutOutcome::Exists]) =>
                    {
                        moved_at = Instant::now();
                        progress.inc(1);
                    }
                    answer => {
                        again.push(number);
                        refused = Some(answer);
                    }
                }
            }
            if let Some(answer) = refused {
                if moved_at.elapsed() > self.deadline {
                    return Err(Failure::failed(format!(
                        "the node takes no blocks: {answer:?}; is it large enough, and is its device \
                         well (kvar status)?"
                    )));
                }
                // Busy: the device is behind. A put never waits in the node, so it waits here.
                std::thread::sleep(REFUSED_PAUSE);
            }
        }
        progress.finish_and_clear();
        Ok(())
    }
}
