//! Memory that a node on this host reads into, so that nothing is copied on this side.
//!
//! ```text
//!   Client::staging(len) ──> Staging ── as a get's destination ──> the link owns it
//!            │                  ^                                    │ answered      │ deadline, or the link lost
//!            │ no room,         └────────── the caller's again <─────┘               ▼
//!            ▼ or no region                                                 held by the client:
//!        private memory, which                            the caller gets Filled::Held, the memory is
//!        the same gets go to by a copy                    given out again when the node has fenced it
//! ```
//!
//! What must always be true: who holds a [`Staging`] is the only one who reads or writes it, unless it
//! waits in a get; a part that the node may still write is nobody's, and when the link is lost
//! before the node has said that it does not, no region gives that part out ever again.

use crate::client::Client;
use crate::items::Filled;
use kvar_transport::shared::{Lender, Region, Slot};
use kvar_transport::{Sink, Source};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Regions of links that are gone, of which callers still hold parts: with one more the client asks for
/// no further one until some are given up.
const OLD_REGIONS_MAX: usize = 2;

/// Memory for what is read; derefs to its bytes. It lies in the region that the client shares with the
/// node, or, where there is none or no room in it, is plain memory.
pub struct Staging(Memory);

enum Memory {
    Shared(Slot),
    Private(Vec<u8>),
}

impl Staging {
    /// Whether the node can write here.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self.0, Memory::Shared(_))
    }

    /// Its part of a region.
    pub(crate) fn slot(&self) -> Option<&Slot> {
        match &self.0 {
            Memory::Shared(slot) => Some(slot),
            Memory::Private(_) => None,
        }
    }

    /// Its link was lost while the node may have been writing: of a [`Lender`], nobody is lent it again.
    pub(crate) fn give_up(self) {
        if let Memory::Shared(slot) = self.0 {
            slot.give_up();
        }
    }

    /// For bindings, which give out pointers: shared memory as something that lends it in parts, each of
    /// which makes a destination of its own (`Staging::from`). Plain memory comes back as it is.
    ///
    /// # Errors
    /// The plain memory.
    pub fn into_lender(self) -> Result<Lender, Vec<u8>> {
        match self.0 {
            Memory::Shared(slot) => Ok(slot.into_lender()),
            Memory::Private(bytes) => Err(bytes),
        }
    }
}

impl From<Slot> for Staging {
    fn from(slot: Slot) -> Self {
        Self(Memory::Shared(slot))
    }
}

impl Deref for Staging {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            Memory::Shared(slot) => slot,
            Memory::Private(bytes) => bytes,
        }
    }
}

impl DerefMut for Staging {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Shared(slot) => slot,
            Memory::Private(bytes) => bytes,
        }
    }
}

impl Sink for Staging {
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(&'a mut [u8])) {
        visit(self);
    }
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }
}

impl Source for Staging {
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
        visit(self);
    }
}

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_shared() {
            "shared"
        } else {
            "private"
        };
        write!(f, "Staging({kind}, {})", <[u8]>::len(self))
    }
}

impl Client {
    /// Memory of so many bytes for what is read: where the client has a region
    /// (its [setting](crate::ClientConfig::staging)) the node writes there, and nothing is copied on this side; else, or
    /// when the region is full, it is plain memory for the same gets. Costs a look at a list, and asks
    /// nobody. Take it when it is needed and drop it soon: a region lives as long as its link.
    #[must_use]
    pub fn staging(&self, len: usize) -> Staging {
        self.stock().take(len)
    }
}

impl From<Staging> for Filled {
    fn from(staging: Staging) -> Self {
        Self::Staged(staging)
    }
}

/// Where staging memory is had: shared by the session and every handle of its client.
#[derive(Default)]
pub(crate) struct Stock(Mutex<Regions>);

#[derive(Default)]
struct Regions {
    now: Option<Arc<Region>>,
    old: Vec<Weak<Region>>,
}

impl Stock {
    fn lock(&self) -> MutexGuard<'_, Regions> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of so many bytes.
    pub(crate) fn take(&self, len: usize) -> Staging {
        let region = self.lock().now.clone();
        let slot = region.and_then(|region| region.take(len));
        Staging(match slot {
            Some(slot) => Memory::Shared(slot),
            None => Memory::Private(vec![0; len]),
        })
    }

    /// The node has brought a region.
    pub(crate) fn open(&self, region: Arc<Region>) {
        self.lock().now = Some(region);
    }

    /// Its link is gone: nothing of it is given out any more.
    pub(crate) fn close(&self) {
        let mut regions = self.lock();
        let gone = regions.now.take();
        gone.iter().for_each(|region| region.retire());
        regions.old.extend(gone.iter().map(Arc::downgrade));
        drop(regions);
        drop(gone);
    }

    /// Size of the region, and what of it is given out or held.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let region = self.lock().now.clone();
        region.map_or((0, 0), |region| {
            let bytes = region.bytes();
            (bytes as u64, (bytes - region.free_bytes()) as u64)
        })
    }

    /// Why no further region may be had, if so.
    pub(crate) fn why_not(&self) -> Option<String> {
        let mut regions = self.lock();
        regions.old.retain(|region| region.strong_count() > 0);
        (regions.old.len() >= OLD_REGIONS_MAX).then(|| {
            format!(
                "buffers of {} staging regions whose links are gone are still in use; give them up",
                regions.old.len()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvar_io::SharedMemory;

    fn region() -> Arc<Region> {
        Region::received(&SharedMemory::create(64 << 10).unwrap()).unwrap()
    }

    #[test]
    fn memory_is_had_with_and_without_a_region() {
        let stock = Stock::default();
        assert!(!stock.take(10).is_shared());
        stock.open(region());
        let mut staging = stock.take(60 << 10);
        assert!(staging.is_shared());
        staging[59] = 1;
        // No room: the same API, other memory.
        let private = stock.take(8 << 10);
        assert!(!private.is_shared());
        assert_eq!(
            (private[..].len(), stock.bytes()),
            (8 << 10, (64 << 10, 60 << 10))
        );
        drop(staging);
        assert!(stock.take(64 << 10).is_shared());
        assert!(stock.take(0)[..].is_empty());
    }

    #[test]
    fn what_is_held_of_regions_that_are_gone_is_bounded() {
        let stock = Stock::default();
        let mut held = Vec::new();
        for count in 0..OLD_REGIONS_MAX {
            assert_eq!(stock.why_not(), None, "{count}");
            stock.open(region());
            held.push(stock.take(1));
            stock.close();
            assert!(!stock.take(1).is_shared());
        }
        // One of which nothing is in use does not count.
        stock.open(region());
        stock.close();
        assert!(stock.why_not().unwrap().contains("2 staging regions"));
        held[0][0] = 7;
        held.pop();
        assert_eq!(stock.why_not(), None);
    }
}
