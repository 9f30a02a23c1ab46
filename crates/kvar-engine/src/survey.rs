//! Which blocks a device names, read beside the engines that drive it.
//!
//! ```text
//!   headers ──> segments in use, oldest first in each shard
//!   a segment ──> footer, or where it is open its directory pages ──> blocks
//! ```
//!
//! The index has no ids, so whoever wants to know what is on a device reads its records. A device in
//! service changes meanwhile: what is told here may have been removed, moved or reclaimed by the
//! time somebody asks for it, and only the engine that drives the shard knows.
//!
//! What must always be true: it only reads, through a device of its caller's own, and takes nothing
//! for a record that does not pass its check.

use crate::format::{OpenError, read};
use crate::layout::{PAGE, PageKind, RECORD_BLOCK, RecordHints, Superblock, decode_page};
use crate::recovery::records_of;
use crate::shard::Opening;
use kvar_base::BlockId;
use kvar_io::{Arena, Device};

/// A segment that was opened some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SurveyedSegment {
    /// Its shard.
    pub shard: u32,
    /// Its number in the shard.
    pub segment: u32,
    /// Grows with time within a shard.
    pub opened_sequence: u64,
    generation: u32,
}

/// The segments of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SurveyedSegments {
    /// Those in use, the oldest of every shard first.
    pub segments: Vec<SurveyedSegment>,
    /// Segments of which nobody knows whether they are: their headers cannot be read.
    pub unreadable: u64,
}

/// A block that a segment names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SurveyedBlock {
    /// Its id.
    pub id: BlockId,
    /// Bytes it takes.
    pub stored_bytes: u32,
    /// What its writer said.
    pub hints: RecordHints,
}

/// Memory that a survey of this device needs.
#[must_use]
pub fn survey_arena_bytes(superblock: &Superblock) -> usize {
    // A footer or an area at a time, and room for what is lost at borders.
    superblock.footer_pages.max(superblock.area_pages) as usize * PAGE * 2 + (1 << 20)
}

/// The segments in use, the oldest of every shard first. A header that cannot be read costs its
/// segment, and is counted. `goes_on` is asked before each of them, since a device that is ill takes
/// long over every read: false ends it with what there is.
///
/// # Errors
/// When there is no memory.
pub fn survey_segments(
    device: &mut dyn Device,
    arena: &Arena,
    superblock: &Superblock,
    goes_on: &dyn Fn() -> bool,
) -> Result<SurveyedSegments, OpenError> {
    let (mut ranked, mut unreadable) = (Vec::new(), 0);
    'shards: for shard in 0..superblock.shards {
        let mut used = Vec::new();
        for segment in 0..superblock.segments_per_shard {
            if !goes_on() {
                break 'shards;
            }
            let offset = superblock.offset(shard, segment, 0);
            let page = match read(device, arena, offset, PAGE) {
                Ok(page) => page,
                Err(OpenError::NoMemory) => return Err(OpenError::NoMemory),
                Err(_) => {
                    unreadable += 1;
                    continue;
                }
            };
            if let Some((head, _)) = decode_page(page.as_slice(), superblock, offset)
                && head.kind == PageKind::Header
                && head.segment == superblock.device_segment(shard, segment)
                && head.generation > 0
            {
                used.push(SurveyedSegment {
                    shard,
                    segment,
                    opened_sequence: head.opened_sequence,
                    generation: head.generation,
                });
            }
        }
        used.sort_unstable_by_key(|segment| segment.opened_sequence);
        ranked.extend((0_usize..).zip(used));
    }
    // Shards in turn, so that all of them are read from at the same time.
    ranked.sort_by_key(|(rank, segment)| (*rank, segment.shard));
    let segments = ranked.into_iter().map(|(_, segment)| segment).collect();
    Ok(SurveyedSegments {
        segments,
        unreadable,
    })
}

/// The blocks a segment names, in the order they were written, and whether it is sealed: one that is not
/// may get more. One that was opened anew since names none.
///
/// # Errors
/// When there is no memory.
pub fn survey_blocks(
    device: &mut dyn Device,
    arena: &Arena,
    superblock: &Superblock,
    segment: &SurveyedSegment,
) -> Result<(Vec<SurveyedBlock>, bool), OpenError> {
    let place = (segment.shard, segment.segment);
    let opening = Opening {
        segment: superblock.device_segment(segment.shard, segment.segment),
        generation: segment.generation,
        sequence: segment.opened_sequence,
    };
    let (records, is_sealed) = records_of(device, arena, superblock, place, &opening)?;
    let blocks = records.iter().filter(|record| record.kind == RECORD_BLOCK);
    let blocks = blocks
        .map(|record| SurveyedBlock {
            id: record.id(),
            stored_bytes: record.len.get(),
            hints: record.hints(),
        })
        .collect();
    Ok((blocks, is_sealed))
}
