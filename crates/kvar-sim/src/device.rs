//! What a fault touched, and what that excuses.
//!
//! | touched, unseen by the engine | excuses |
//! |---|---|
//! | the bytes of a block | a miss(corrupt) of that block |
//! | headers, directories, footers; a flush that a power cut found out | that after the next restart blocks are gone, or there again: see [`Harm::history_lost`] |
//! | superblocks, checkpoints | nothing: there are others |
//!
//! What must always be true: nothing else excuses anything.

use kvar_base::PAGE_BYTES;
use kvar_engine::Superblock;
use kvar_io::sim::{FaultKind, FaultOn, FaultStruck};
use std::ops::Range;

/// What faults did so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Harm {
    /// Ranges of bytes that were read wrong, written wrong or not written.
    ranges: Vec<Range<u64>>,
    /// A flush was said to be done and was not.
    pub(crate) flush_lost: bool,
    /// What tells the order of events may be gone: from the next restart on, blocks may be missing
    /// or come back. Bytes must still be right, and what happens from then on must hold until the
    /// restart after that.
    pub(crate) history_lost: bool,
    /// A fault touched what tells which blocks a segment holds, if only while it was read.
    pub(crate) history_touched: bool,
    /// The device refused a write or flush in this life.
    pub(crate) refused: bool,
}

impl Harm {
    /// Notes a fault. `opening`: the store was being opened, so that what is read is the history.
    pub(crate) fn note(&mut self, fault: &FaultStruck, superblock: &Superblock, opening: bool) {
        let silent = matches!(
            fault.kind,
            FaultKind::FlipBits(_) | FaultKind::Misdirect | FaultKind::Lost
        );
        match fault.on {
            FaultOn::Flush => {
                self.flush_lost |= fault.kind == FaultKind::Lost;
                self.refused |= fault.kind == FaultKind::Error;
                return;
            }
            FaultOn::Write => self.refused |= !silent && fault.kind != FaultKind::Late,
            FaultOn::Read => {}
        }
        if fault.kind == FaultKind::Late {
            return;
        }
        let wrong_on_disk = fault.on == FaultOn::Write && silent;
        let wrong_when_it_counts = fault.on == FaultOn::Read && opening;
        // What a misdirected read was given from elsewhere harms nothing there.
        let elsewhere = fault.instead.clone().filter(|_| wrong_on_disk);
        for bytes in [Some(fault.bytes.clone()), elsewhere].into_iter().flatten() {
            if is_history(superblock, &bytes) {
                self.history_touched = true;
                self.history_lost |= wrong_on_disk || wrong_when_it_counts;
            }
            self.ranges.push(bytes);
        }
    }

    /// Whether no byte was ever harmed.
    pub(crate) fn is_none(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether a fault touched any of these bytes.
    pub(crate) fn touched(&self, bytes: &Range<u64>) -> bool {
        self.ranges
            .iter()
            .any(|range| range.start < bytes.end && bytes.start < range.end)
    }
}

/// Whether any of these pages is a header, directory or footer of a segment.
fn is_history(superblock: &Superblock, bytes: &Range<u64>) -> bool {
    let segments = u64::from(superblock.segments_per_shard) * u64::from(superblock.shards);
    let first = superblock.segments_offset;
    let end = first + segments * superblock.segment_bytes;
    let (mut at, end) = (bytes.start.max(first), bytes.end.min(end));
    let areas: Vec<u32> = superblock.areas().collect();
    while at < end {
        let page = ((at - first) % superblock.segment_bytes / PAGE_BYTES) as u32;
        let in_area = areas
            .iter()
            .any(|area| (*area..area + superblock.area_pages).contains(&page));
        if page == 0 || in_area || page >= superblock.footer_page() {
            return true;
        }
        at += PAGE_BYTES;
    }
    false
}
