//! What a checkpoint sees of the index while entries move.
//!
//! ```text
//!   buckets   0 ......... taken ........................ end
//!             in the checkpoint | not yet
//!        E moves  <-------------- E     its old slot is written as if E still lay there
//!                 F ------------>       its new slot is written as if it were empty
//! ```
//!
//! An insert may move another entry to that entry's second bucket. Nothing is recorded of such a
//! move (the index knows no ids), so replay would not make good what the checkpoint got wrong:
//! across the border of what is taken already, the entry would be in the checkpoint never or
//! twice. Here stands, for the slots of buckets not yet taken, what is to be written instead.
//!
//! What must always be true: an entry that was there when the snapshot began and that nothing was
//! recorded of since is in it exactly once. What is put into a slot that is spoken of has a record
//! to be replayed; entries that have none are not moved there.

use crate::index::{RawSlot, SlotRef};
use kvar_base::FastMap;
use kvar_policy::Tenant;

const EMPTY: RawSlot = (0, 0, 0, 0, 0, Tenant::DEFAULT);

/// A snapshot under way.
#[derive(Default)]
pub(crate) struct Snapshot {
    /// Buckets below this are taken.
    pub(crate) taken: usize,
    instead: FastMap<SlotRef, RawSlot>,
}

impl Snapshot {
    /// Whether something else than what lies there is to be written for this slot.
    pub(crate) fn speaks_of(&self, at: SlotRef) -> bool {
        self.instead.contains_key(&at)
    }

    /// An entry moves; something recorded follows it into the slot it leaves.
    pub(crate) fn moved(&mut self, from: SlotRef, to: SlotRef, entry: RawSlot) {
        let (was_taken, is_taken) = (from.bucket < self.taken, to.bucket < self.taken);
        // What lies in a slot that is spoken of is in the snapshot already, or need not be.
        let is_done = was_taken || self.speaks_of(from);
        match (is_done, is_taken) {
            (true, false) => {
                self.instead.insert(to, EMPTY);
            }
            (false, true) => {
                self.instead.insert(from, entry);
            }
            (true, true) | (false, false) => {}
        }
    }

    /// What to write for a slot instead of what lies there; asked once.
    pub(crate) fn take(&mut self, at: SlotRef) -> Option<RawSlot> {
        self.instead.remove(&at)
    }
}
