//! A remove that is under way, as the keeper knows it.
//!
//! ```text
//!   link    begins ──> asks engines ──> Note ── answered ──> over: it answers its client
//!   keeper  blocks it names ............................│
//!           do not move                                 └─> they may
//! ```
//!
//! Why from its beginning: engines are asked one after the other, and a move that begins and ends
//! between puts a block where the remove has been already.
//!
//! What must always be true: what was begun is ended, however its request ends: by its answer, its
//! deadline, a cancel, or with its link. So it ends where it is dropped.

use super::keeper::Event;
use crossbeam_channel::Sender;
use kvar_base::BlockId;
use kvar_engine::{SurveyedBlock, Tenant};
use std::sync::atomic::{AtomicU64, Ordering};

/// What goes.
#[derive(Debug)]
pub(crate) enum Removed {
    /// These, in order.
    Blocks(Vec<BlockId>),
    /// All of a namespace.
    All(Tenant),
}

impl Removed {
    pub(crate) fn blocks(ids: &[BlockId]) -> Self {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        Self::Blocks(ids)
    }

    pub(crate) fn names(&self, block: &SurveyedBlock) -> bool {
        match self {
            Self::Blocks(ids) => ids.binary_search(&block.id).is_ok(),
            Self::All(tenant) => block.hints.tenant == *tenant,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Removal {
    number: u64,
    keeper: Sender<Event>,
}

impl Removal {
    /// Tells the keeper, before any engine is asked.
    pub(crate) fn begin(keeper: &Sender<Event>, removed: Removed) -> Self {
        // Unique over all threads; what nodes in one process leave out of each other's does not matter.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // A keeper that is gone moves nothing.
        let _ = keeper.send(Event::RemovalBegins(number, removed));
        Self {
            number,
            keeper: keeper.clone(),
        }
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        let _ = self.keeper.send(Event::RemovalEnds(self.number));
    }
}
