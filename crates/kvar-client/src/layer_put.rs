//! Blocks that are written layer by layer: announced, filled as their sections are computed, visible at
//! the commit.
//!
//! ```text
//!   LayerPut (any thread)           LayerSlot, one a block (the client's thread)
//!     put_layers ───────────────>   waits for the window ── Announce ──> told to send, or ended
//!     section(0, ...) ──────────>   queue ── one payload at a time ──> the node
//!     section(1, ...) ──────────>   queue
//!     commit() ─────────────────>   behind the last section: Commit ──> outcome
//!     dropped, or abort() ──────>   Cancel: the block is absent
//! ```
//!
//! What must always be true: nothing of a block is visible before its commit; sections go in their
//! order, each once; a call that is not committed by its deadline ends there like any other, and
//! its sources are free then.
//!
//! Left to others: the window (`session::dispatch`), what the node answers (`session::exchange`).

use crate::check::SectionChecks;
use crate::client::Client;
use crate::items::PutSource;
use crate::pending::Pending;
use crate::worker::PutWord;
use kvar_base::{BlockId, ContentCheck, Moment, PutOutcome, SECTIONS_MAX};
use kvar_transport::Source;
use kvar_wire::PutHints;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

/// Of the node's window, its requests and its bytes, puts that wait for their writer take one part of
/// so many: they last as long as a forward pass, and reads and whole puts go on beside them.
pub const ANNOUNCED_SHARE: u64 = 2;

/// A block to write layer by layer.
#[derive(Clone, Debug)]
pub struct LayerPutItem {
    /// Its id.
    pub id: BlockId,
    /// Lengths of its sections, in order.
    pub lengths: Vec<u32>,
    /// What the writer knows about its use.
    pub hints: PutHints,
    /// Whether the call waits until it is safe against power loss.
    pub durable: bool,
}

impl LayerPutItem {
    /// Has sections, as many as may be, none of them empty.
    pub(crate) fn is_sound(&self) -> bool {
        (1..=SECTIONS_MAX).contains(&self.lengths.len()) && !self.lengths.contains(&0)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.lengths.iter().map(|len| u64::from(*len)).sum()
    }
}

/// Blocks of a put by layers that have ended, so that their bytes need not be read any more.
pub(crate) type EndedFlags = Arc<[AtomicBool]>;

/// A put by layers on its way to a session.
#[derive(Clone, Debug)]
pub struct LayerPutRequest {
    pub(crate) items: Vec<LayerPutItem>,
    pub(crate) put: u64,
    pub(crate) ended: EndedFlags,
}

/// A section of a block, with the writer's check.
pub struct SectionPart {
    pub(crate) section: u16,
    pub(crate) check: ContentCheck,
    pub(crate) source: Box<dyn PutSource>,
}

impl fmt::Debug for SectionPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = Source::len(&self.source);
        write!(f, "SectionPart({} of {len} bytes)", self.section)
    }
}

/// A put by layers under way. Dropped before its commit it is given up: the blocks are absent.
pub struct LayerPut {
    client: Client,
    put: u64,
    items: Vec<(BlockId, Vec<u32>)>,
    sections: usize,
    next: usize,
    ended: EndedFlags,
    /// Taken by the commit.
    pending: Option<Pending<Vec<PutOutcome>>>,
}

/// Why a section was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SectionRefused {
    /// They come in their order, each once.
    #[error("section {found} was given, section {expected} comes next")]
    Order {
        /// What comes next.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// One piece for each block, of the announced length.
    #[error("section {section} of block {block} was announced with {expected} bytes, not {found}")]
    Length {
        /// Which section.
        section: usize,
        /// Of which block.
        block: usize,
        /// As announced.
        expected: u64,
        /// As given; 0 when there is none.
        found: u64,
    },
}

impl LayerPut {
    pub(crate) fn new(
        client: Client,
        request: LayerPutRequest,
        pending: Pending<Vec<PutOutcome>>,
    ) -> Self {
        let LayerPutRequest { items, put, ended } = request;
        let lengths = items.iter().map(|item| item.lengths.len());
        Self {
            client,
            put,
            sections: lengths.max().unwrap_or(0),
            items: items.into_iter().map(|it| (it.id, it.lengths)).collect(),
            next: 0,
            ended,
            pending: Some(pending),
        }
    }

    /// Sections of the block that has most.
    #[must_use]
    pub fn sections(&self) -> usize {
        self.sections
    }

    /// Whether nothing more is wanted of any block: they are there already, or refused.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.pending.as_ref().is_none_or(Pending::is_done)
    }

    /// The next section of every block, a source for each (blocks that have no such section take an
    /// empty one). Makes the content checks, for blocks that are still wanted; waits for nothing.
    /// The bytes must not change until the call has ended.
    ///
    /// # Errors
    /// Not the next, or not of the announced lengths: nothing was taken.
    pub fn section(
        &mut self,
        section: usize,
        sources: Vec<Box<dyn PutSource>>,
    ) -> Result<(), SectionRefused> {
        if section != self.next {
            let (expected, found) = (self.next, section);
            return Err(SectionRefused::Order { expected, found });
        }
        for (block, (_, lengths)) in self.items.iter().enumerate() {
            let expected = lengths.get(section).map_or(0, |len| u64::from(*len));
            let found = sources.get(block).map_or(0, |it| Source::len(it) as u64);
            if expected != found {
                return Err(SectionRefused::Length {
                    section,
                    block,
                    expected,
                    found,
                });
            }
        }
        self.next += 1;
        let number = u16::try_from(section).unwrap_or(u16::MAX);
        let of_block = self.items.iter().zip(sources).zip(self.ended.iter());
        let parts = of_block.map(|(((id, lengths), source), ended)| {
            let length = lengths.get(section).filter(|_| !ended.load(Relaxed))?;
            let lengths = [*length];
            let mut checks = SectionChecks::new(id, number, &lengths);
            source.visit(&mut |piece| checks.feed(piece));
            Some(SectionPart {
                section: number,
                check: *checks.finish().first()?,
                source,
            })
        });
        let word = PutWord::Section(parts.collect());
        self.client.tell_put(self.put, word);
        Ok(())
    }

    /// Makes the blocks visible, each when all of it has arrived and passed its checks. A block of which
    /// sections are missing is refused (`wrong_format`).
    #[must_use]
    pub fn commit(self) -> Pending<Vec<PutOutcome>> {
        self.committed(None)
    }

    /// As [`commit`](Self::commit); the call ends `within` from now, if that is sooner than its own
    /// deadline, which has to hold for as long as the writer computes.
    #[must_use]
    pub fn commit_within(self, within: Duration) -> Pending<Vec<PutOutcome>> {
        let deadline = self.client.moment_in(within);
        self.committed(Some(deadline))
    }

    fn committed(mut self, deadline: Option<Moment>) -> Pending<Vec<PutOutcome>> {
        self.client.tell_put(self.put, PutWord::Commit(deadline));
        self.pending.take().expect("a put is committed once")
    }

    /// Gives the put up: no block of it becomes visible.
    pub fn abort(self) {
        drop(self);
    }
}

impl Drop for LayerPut {
    fn drop(&mut self) {
        if self.pending.is_some() {
            self.client.tell_put(self.put, PutWord::Abort);
        }
    }
}

impl fmt::Debug for LayerPut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (blocks, next, sections) = (self.items.len(), self.next, self.sections);
        write!(
            f,
            "LayerPut({blocks} blocks, {next} of {sections} sections)"
        )
    }
}

/// How far a block is, on the client's thread.
pub(crate) struct LayerSlot {
    pub(crate) lengths: Vec<u32>,
    /// The link and the request that it was announced by.
    pub(crate) announced: Option<(u64, u64)>,
    /// The node waits for its sections.
    pub(crate) is_pulled: bool,
    /// A payload of it is on its way.
    pub(crate) is_pushing: bool,
    pub(crate) queue: VecDeque<SectionPart>,
    /// Sections that came from the writer.
    pub(crate) given: usize,
    pub(crate) is_committed: bool,
    pub(crate) is_commit_sent: bool,
    pub(crate) ended: EndedFlags,
}

impl LayerSlot {
    pub(crate) fn new(lengths: Vec<u32>, ended: EndedFlags) -> Self {
        Self {
            lengths,
            announced: None,
            is_pulled: false,
            is_pushing: false,
            queue: VecDeque::new(),
            given: 0,
            is_committed: false,
            is_commit_sent: false,
            ended,
        }
    }
}
