//! What a client counts; written by its thread, read by anyone.

use crate::breaker::BreakerState;
use crate::items::GetOutcome;
use crate::staging::Stock;
use kvar_base::{MissReason, Mode, ModeCell, PutOutcome, Refusal};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) calls: AtomicU64,
    pub(crate) lookups: AtomicU64,
    pub(crate) hits: AtomicU64,
    misses: [AtomicU64; MissReason::ALL.len()],
    pub(crate) stored: AtomicU64,
    pub(crate) exists: AtomicU64,
    pub(crate) in_progress: AtomicU64,
    refused: [AtomicU64; Refusal::ALL.len()],
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) checks_failed: AtomicU64,
    pub(crate) late_answers: AtomicU64,
    pub(crate) connects: AtomicU64,
    pub(crate) connect_failures: AtomicU64,
    pub(crate) links_lost: AtomicU64,
    pub(crate) breaker_opened: AtomicU64,
    links_tcp: AtomicU64,
    links_shared: AtomicU64,
    pub(crate) attach_declined: AtomicU64,
    not_shared: Mutex<Option<String>>,
    /// Hits whose bytes the node wrote into staging memory.
    pub(crate) hits_placed: AtomicU64,
    pub(crate) stage_declined: AtomicU64,
    /// Buffers that came to be held, and of these what is still.
    pub(crate) staging_fenced: AtomicU64,
    pub(crate) staging_held: AtomicU64,
    /// Where staging memory is had.
    pub(crate) stock: Stock,
    not_staged: Mutex<Option<String>>,
    breaker: AtomicU8,
    /// What the node last said of the namespace's mode.
    pub(crate) mode: ModeCell,
    pub(crate) switches: AtomicU64,
}

impl Counters {
    pub(crate) fn got(&self, outcome: &GetOutcome) {
        match outcome {
            GetOutcome::Hit { lengths, .. } => {
                add(&self.hits, 1);
                add(
                    &self.read_bytes,
                    lengths.iter().map(|len| u64::from(*len)).sum(),
                );
            }
            GetOutcome::Miss(reason) => add(&self.misses[*reason as usize], 1),
        }
    }

    pub(crate) fn put(&self, outcome: PutOutcome, bytes: u64) {
        match outcome {
            PutOutcome::Stored => {
                add(&self.stored, 1);
                add(&self.written_bytes, bytes);
            }
            PutOutcome::Exists => add(&self.exists, 1),
            PutOutcome::InProgress => add(&self.in_progress, 1),
            PutOutcome::Refused(refusal) => add(&self.refused[refusal as usize], 1),
        }
    }

    pub(crate) fn link_opened(&self, is_shared: bool) {
        add(self.links_of(is_shared), 1);
        if is_shared {
            self.say_not_shared(None);
        }
    }

    pub(crate) fn link_closed(&self, is_shared: bool) {
        self.links_of(is_shared).fetch_sub(1, Relaxed);
    }

    fn links_of(&self, is_shared: bool) -> &AtomicU64 {
        if is_shared {
            &self.links_shared
        } else {
            &self.links_tcp
        }
    }

    /// Why memory is not shared with the node.
    pub(crate) fn say_not_shared(&self, why: Option<String>) {
        *self
            .not_shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// Why there is no staging region.
    pub(crate) fn say_not_staged(&self, why: Option<String>) {
        *self
            .not_staged
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = why;
    }

    pub(crate) fn set_breaker(&self, state: BreakerState) {
        self.breaker.store(state as u8, Relaxed);
    }

    pub(crate) fn breaker(&self) -> BreakerState {
        match self.breaker.load(Relaxed) {
            0 => BreakerState::Closed,
            1 => BreakerState::Open,
            _ => BreakerState::Probing,
        }
    }

    pub(crate) fn snapshot(&self) -> ClientStats {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        let (staging_bytes, staging_used) = self.stock.bytes();
        ClientStats {
            calls: get(&self.calls),
            lookups: get(&self.lookups),
            hits: get(&self.hits),
            misses: MissReason::ALL
                .iter()
                .map(|reason| (reason.word(), get(&self.misses[*reason as usize])))
                .filter(|(_, count)| *count > 0)
                .collect(),
            stored: get(&self.stored),
            exists: get(&self.exists),
            in_progress: get(&self.in_progress),
            refused: Refusal::ALL
                .iter()
                .map(|refusal| (refusal.word(), get(&self.refused[*refusal as usize])))
                .filter(|(_, count)| *count > 0)
                .collect(),
            read_bytes: get(&self.read_bytes),
            written_bytes: get(&self.written_bytes),
            checks_failed: get(&self.checks_failed),
            late_answers: get(&self.late_answers),
            connects: get(&self.connects),
            connect_failures: get(&self.connect_failures),
            links_lost: get(&self.links_lost),
            breaker_opened: get(&self.breaker_opened),
            links_tcp: get(&self.links_tcp),
            links_shared: get(&self.links_shared),
            attach_declined: get(&self.attach_declined),
            not_shared: self
                .not_shared
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            hits_placed: get(&self.hits_placed),
            staging_bytes,
            staging_used,
            staging_held: get(&self.staging_held),
            staging_fenced: get(&self.staging_fenced),
            stage_declined: get(&self.stage_declined),
            not_staged: self
                .not_staged
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            breaker: self.breaker(),
            mode: self.mode.get(),
            switches: get(&self.switches),
        }
    }
}

pub(crate) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Relaxed);
}

pub(crate) fn subtract(counter: &AtomicU64, count: usize) {
    counter.fetch_sub(count as u64, Relaxed);
}

impl ClientStats {
    /// What links go through now: `shm`, `tcp`, both, or `none` while no link stands.
    #[must_use]
    pub fn link(&self) -> &'static str {
        match (self.links_shared, self.links_tcp) {
            (0, 0) => "none",
            (0, _) => "tcp",
            (_, 0) => "shm",
            _ => "shm and tcp",
        }
    }
}

/// A client's counters since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ClientStats {
    /// Calls of any kind.
    pub calls: u64,
    /// Lookups and presence questions.
    pub lookups: u64,
    /// Blocks read and verified.
    pub hits: u64,
    /// Blocks not read, by reason; reasons that did not occur are left out.
    pub misses: BTreeMap<&'static str, u64>,
    /// Blocks stored.
    pub stored: u64,
    /// Blocks that were there already.
    pub exists: u64,
    /// Blocks that another writer was at.
    pub in_progress: u64,
    /// Blocks turned away, by reason.
    pub refused: BTreeMap<&'static str, u64>,
    /// Payload bytes of hits.
    pub read_bytes: u64,
    /// Payload bytes of stored blocks.
    pub written_bytes: u64,
    /// Blocks whose bytes came and did not pass the writer's content check.
    pub checks_failed: u64,
    /// Answers that came after their call had ended; drained.
    pub late_answers: u64,
    /// Links that were opened.
    pub connects: u64,
    /// Links that did not come about.
    pub connect_failures: u64,
    /// Open links that broke.
    pub links_lost: u64,
    /// Times the breaker opened.
    pub breaker_opened: u64,
    /// Links open now over TCP.
    pub links_tcp: u64,
    /// Links open now through memory shared with the node.
    pub links_shared: u64,
    /// Times the node declined to share memory, or it could not be taken.
    pub attach_declined: u64,
    /// Why links do not share memory with the node; `None` while they do, or none stands.
    pub not_shared: Option<String>,
    /// Blocks (or sections of blocks that went by layers) that the node wrote where they were wanted, in
    /// staging memory.
    pub hits_placed: u64,
    /// Size of the staging region; 0: there is none, and staging memory is private.
    pub staging_bytes: u64,
    /// What of it is in use or held.
    pub staging_used: u64,
    /// Buffers of it that are held until the node has said that it writes there no more.
    pub staging_held: u64,
    /// Buffers that came to be held since the client was made.
    pub staging_fenced: u64,
    /// Times the node declined to share a staging region, or it could not be taken.
    pub stage_declined: u64,
    /// Why there is no staging region although one is wanted; `None` while there is one.
    pub not_staged: Option<String>,
    /// The breaker now.
    pub breaker: BreakerState,
    /// The mode that the operator gave the namespace, as the node last said; `load` until it has.
    pub mode: Mode,
    /// Times it changed.
    pub switches: u64,
}
