//! Where every block went, told to whoever asked before: a test that must know which misses are
//! deserved.
//!
//! ```text
//!   Cached   a read brought it into memory            Uncached   it made room there
//!   Placed   its index entry leads to a position      Displaced  the entry at a position is gone
//! ```
//!
//! Puts, removes and purges are not in it: their caller knows.
//!
//! What must always be true: what leaves memory or index without a call is in the journal, with
//! why. Nobody asked: it costs a test of an `Option`.

use super::Shard;
use kvar_base::BlockId;

/// Something happened to a block that no call asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A read brought it into memory.
    Cached {
        /// The block.
        id: BlockId,
    },
    /// It left memory.
    Uncached {
        /// The block.
        id: BlockId,
        /// Whether its bytes alone would have fitted, but in no run of pages.
        fragmented: bool,
    },
    /// It left memory because its time to live had passed.
    Expired {
        /// The block.
        id: BlockId,
    },
    /// Its bytes are on the device and the index leads there.
    Placed {
        /// The block.
        id: BlockId,
        /// Pages from the shard's first segment.
        position: u32,
    },
    /// The index does not lead to this position any more.
    Displaced {
        /// Pages from the shard's first segment.
        position: u32,
        /// Whose entry it was, where that is known (the index has no ids, so not of one that made room
        /// for another, or that no record names): after a fault two may lead to one position.
        id: Option<BlockId>,
        /// Why.
        why: Displaced,
    },
}

/// Why an index entry is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Displaced {
    /// Both buckets of another block were full.
    Bucket,
    /// Its segment was wanted and the policy, or want of room, let it go.
    Reclaim,
    /// Its bytes did not pass their check, or could not be read.
    Corrupt,
    /// Its time to live had passed.
    Expired,
    /// The device refused its record. If memory holds it, it is written again.
    Refused,
    /// Its segment was wanted, and the tier below has it.
    Demoted,
}

impl Shard {
    /// Begins the journal.
    pub(crate) fn keep_journal(&mut self) {
        self.journal.get_or_insert_default();
    }

    /// Takes what happened since the last call.
    pub(crate) fn take_journal(&mut self) -> Vec<Change> {
        self.journal.as_mut().map_or_else(Vec::new, std::mem::take)
    }

    pub(super) fn note(&mut self, change: Change) {
        if let Some(journal) = &mut self.journal {
            journal.push(change);
        }
    }

    pub(super) fn note_displaced(&mut self, id: &BlockId, position: u32, why: Displaced) {
        let id = Some(*id);
        self.note(Change::Displaced { position, id, why });
    }

    /// Things remembered on behalf of calls and operations under way; none at rest.
    pub(crate) fn bookkeeping(&self) -> usize {
        self.filling.len()
            + self.dirty.len()
            + self.moved.len()
            + self.offers.len()
            + self.let_down.under_way()
            + self.controls.len()
            + self.recorded_puts.len()
            + self.recorded_controls.len()
            + self.control_counts.len()
            + self.unflushed.puts.len()
            + self.flush_waiters.len()
            + self.reading.len()
            + self.parts.len()
            + self.ahead.coming()
            + self.awaited.count()
            + self.turns.waiting()
            + self.turns.joined()
            + self.pending.len()
            // One that waits for a flush has nothing under way for a moment.
            + usize::from(self.checkpoint.is_some())
    }
}
