//! Places for what a link's client reads: its staging region, and which part of it is whose.
//!
//! ```text
//!   none ── Stage ──> making ── a piece a turn, until all is reserved ──> sent, and ready ── gone with the link
//!     ^                  │ no memory
//!     └── Declined ──────┘
//!
//!   free ── a get names it ──> taken ── answered, and what was to be written is ──> free
//! ```
//!
//! `docs/internals/links.md` tells it from both sides. What must always be true: a part belongs to one
//! item of one get at most, from when that came until nothing will be written for it any more; nothing
//! is read from the region, ever.

use super::conversation::{Conversation, Phase};
use super::desk::Desk;
use kvar_base::PAGE_BYTES;
use kvar_io::SharedMemory;
use kvar_io::shared::Carver;
use kvar_transport::shared::offer_places;
use kvar_transport::{LinkKind, TURN_BYTES};
use kvar_wire::{AttachDeclined, GetSlot, Stage, StageAnswer};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the regions of all links may take together, and do; a part is given back when dropped.
#[derive(Clone, Debug)]
pub(crate) struct StagingSettings {
    pub(crate) bytes_max: u64,
    pub(crate) bytes: Arc<AtomicU64>,
}

impl StagingSettings {
    /// Regions may take so much.
    pub(crate) fn new(bytes_max: u64) -> Self {
        let bytes = Arc::default();
        Self { bytes_max, bytes }
    }
}

struct Share {
    all: Arc<AtomicU64>,
    bytes: u64,
}

impl Share {
    fn take(settings: &StagingSettings, bytes: u64) -> Option<Self> {
        let more = |taken: u64| {
            taken
                .checked_add(bytes)
                .filter(|sum| *sum <= settings.bytes_max)
        };
        let all = Arc::clone(&settings.bytes);
        all.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()?;
        Some(Self { all, bytes })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// See the module.
#[derive(Default)]
pub(super) enum Staging {
    #[default]
    None,
    Making(Box<Making>),
    Ready(Ready),
}

pub(super) struct Making {
    request: u64,
    stage: Stage,
    memory: SharedMemory,
    map: Carver,
    reserved: usize,
    share: Share,
}

pub(super) struct Ready {
    share: Share,
    taken: Taken,
}

/// Parts that belong to somebody: where each begins, and ends.
#[derive(Default)]
struct Taken(BTreeMap<u64, u64>);

impl Taken {
    /// Takes a part of a region of `bytes`, or says why that cannot be.
    fn take(&mut self, slot: GetSlot, bytes: u64) -> Result<(), String> {
        let GetSlot { at, bytes: len } = slot;
        let end = slot.end().filter(|end| *end <= bytes && len > 0);
        let Some(end) = end else {
            return Err(format!(
                "a place of {len} bytes at {at} lies outside of a staging region of {bytes}"
            ));
        };
        let below = self.0.range(..end).next_back();
        if let Some((other, other_end)) = below.filter(|(_, other_end)| **other_end > at) {
            return Err(format!(
                "a place of {len} bytes at {at} overlaps one that is in use, from {other} to {other_end}"
            ));
        }
        self.0.insert(at, end);
        Ok(())
    }
}

impl Staging {
    /// Bytes of memory that it takes.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Making(making) => making.share.bytes,
            Self::Ready(ready) => ready.share.bytes,
        }
    }

    /// Takes the parts that a get names. An error ends the link.
    pub(super) fn take(&mut self, slots: impl Iterator<Item = GetSlot>) -> Result<(), String> {
        for slot in slots {
            let Self::Ready(ready) = self else {
                return Err("a get names a place, and the link has no staging region".to_owned());
            };
            ready.taken.take(slot, ready.share.bytes)?;
        }
        Ok(())
    }

    /// Nothing will be written to a part any more.
    pub(super) fn free(&mut self, slot: Option<GetSlot>) {
        if let (Self::Ready(ready), Some(slot)) = (self, slot) {
            let was = ready.taken.0.remove(&slot.at);
            debug_assert!(was.is_some(), "a part is freed once");
        }
    }
}

impl Conversation {
    /// Answers a client that asks for a staging region, at once or when it is made.
    pub(super) fn on_stage(&mut self, desk: &mut Desk, request: u64, stage: &Stage) {
        match self.begin_staging(desk, request, stage) {
            Ok(making) => self.staging = Staging::Making(Box::new(making)),
            Err((why, text)) => self.decline_staging(desk, request, why, &text),
        }
    }

    fn decline_staging(&mut self, desk: &mut Desk, request: u64, why: AttachDeclined, text: &str) {
        desk.counters.stage_declined.add(why);
        tracing::debug!(peer = %self.peer, why = why.word(), "no staging region: {text}");
        self.send(desk, request, &StageAnswer::declined(why, text));
    }

    fn begin_staging(
        &self,
        desk: &Desk,
        request: u64,
        stage: &Stage,
    ) -> Result<Making, (AttachDeclined, String)> {
        let settings = &desk.settings.staging;
        let declined = |why, text: &str| Err((why, text.to_owned()));
        if self.link.kind() != LinkKind::SharedMemory {
            let text = "this link shares no memory with the node";
            return declined(AttachDeclined::Remote, text);
        }
        if !matches!(self.staging, Staging::None) {
            return declined(AttachDeclined::Late, "this link has a staging region");
        }
        if settings.bytes_max == 0 {
            let text = "the node makes no staging regions (shared_memory_staging = 0)";
            return declined(AttachDeclined::Off, text);
        }
        if stage.bytes == 0 || !stage.bytes.is_multiple_of(PAGE_BYTES) {
            let text = "a staging region has a whole number of 4 KiB pages, at least one";
            return declined(AttachDeclined::Failed, text);
        }
        let Some(share) = Share::take(settings, stage.bytes) else {
            let text = format!(
                "staging regions take {} bytes of the {} that they may (shared_memory_staging); \
                 {} more are too many",
                settings.bytes.load(Ordering::Relaxed),
                settings.bytes_max,
                stage.bytes,
            );
            return Err((AttachDeclined::Full, text));
        };
        let failed = |error: std::io::Error| {
            let text = format!("no memory for a staging region: {error}");
            (AttachDeclined::Failed, text)
        };
        let bytes = usize::try_from(stage.bytes).unwrap_or(usize::MAX);
        let memory = SharedMemory::begin(bytes).map_err(failed)?;
        let map = memory.map_untouched().map_err(failed)?;
        Ok(Making {
            request,
            stage: *stage,
            memory,
            map,
            reserved: 0,
            share,
        })
    }

    /// Whether a region is being made.
    pub(super) fn is_making_places(&self) -> bool {
        matches!(self.staging, Staging::Making(_)) && matches!(self.phase, Phase::Serving)
    }

    /// Goes on with a region that is being made: zeros are written over a turn's share of it, so that
    /// nobody else waits for all of them.
    pub(super) fn make_places(&mut self, desk: &mut Desk) {
        if !self.is_making_places() {
            return;
        }
        let Staging::Making(making) = &mut self.staging else {
            return;
        };
        let len = TURN_BYTES.min(making.memory.bytes() - making.reserved);
        let made = making.memory.reserve(making.reserved, len);
        if made.is_ok() {
            making.map.populate(making.reserved, len);
            making.reserved += len;
            if making.reserved < making.memory.bytes() {
                return;
            }
        }
        let Staging::Making(making) = std::mem::take(&mut self.staging) else {
            return;
        };
        let Making {
            request,
            stage,
            memory,
            mut map,
            share,
            ..
        } = *making;
        let sent = made
            .map_err(|error| format!("no memory for a staging region: {error}"))
            .and_then(|()| {
                let sent = offer_places(&stage.place, &stage.secret, &memory);
                sent.map_err(|error| error.to_string())
            });
        if let Err(text) = sent {
            tracing::warn!(peer = %self.peer, "a client gets no staging region: {text}");
            return self.decline_staging(desk, request, AttachDeclined::Failed, &text);
        }
        self.link.stage(map.bytes(memory.bytes()));
        let taken = Taken::default();
        self.staging = Staging::Ready(Ready { share, taken });
        let bytes = stage.bytes;
        self.send(desk, request, &StageAnswer::Staged { bytes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot(at: u64, bytes: u32) -> GetSlot {
        GetSlot { at, bytes }
    }

    #[test]
    fn a_part_lies_inside_and_belongs_to_one() {
        let mut taken = Taken::default();
        for wrong in [
            slot(0, 0),
            slot(0, 101),
            slot(100, 1),
            slot(99, 2),
            slot(u64::MAX, 1),
            slot(u64::MAX - 1, 5),
        ] {
            let error = taken.take(wrong, 100).unwrap_err();
            assert!(error.contains("outside"), "{wrong:?}: {error}");
        }
        taken.take(slot(10, 10), 100).unwrap();
        taken.take(slot(20, 1), 100).unwrap();
        for wrong in [
            slot(10, 10),
            slot(0, 11),
            slot(19, 1),
            slot(15, 1),
            slot(0, 100),
            slot(20, 1),
            slot(20, 9),
        ] {
            let error = taken.take(wrong, 100).unwrap_err();
            assert!(error.contains("overlaps"), "{wrong:?}: {error}");
        }
        taken.take(slot(0, 10), 100).unwrap();
        taken.take(slot(21, 79), 100).unwrap();
    }

    #[test]
    fn regions_take_no_more_than_they_may() {
        let settings = StagingSettings::new(100);
        let first = Share::take(&settings, 60).unwrap();
        assert!(Share::take(&settings, 41).is_none());
        assert!(Share::take(&settings, u64::MAX).is_none());
        let second = Share::take(&settings, 40).unwrap();
        drop(first);
        assert!(Share::take(&settings, 60).is_some());
        drop(second);
        assert_eq!(settings.bytes.load(Ordering::Relaxed), 0);
    }

    proptest! {
        /// Against a list that is looked through from end to end.
        #[test]
        fn parts_that_are_taken_never_overlap(
            asked in prop::collection::vec((0_u64..64, 0_u32..20, any::<bool>()), 1..80),
        ) {
            let mut taken = Taken::default();
            let mut model: Vec<GetSlot> = Vec::new();
            for (at, bytes, frees) in asked {
                if frees {
                    if let Some(gone) = model.pop() {
                        taken.0.remove(&gone.at);
                    }
                    continue;
                }
                let new = slot(at, bytes);
                let apart = |other: &GetSlot| {
                    new.end().unwrap() <= other.at || other.end().unwrap() <= new.at
                };
                let fits = bytes > 0 && new.end().unwrap() <= 64 && model.iter().all(apart);
                prop_assert_eq!(taken.take(new, 64).is_ok(), fits);
                if fits {
                    model.push(new);
                }
            }
        }
    }
}
