//! Looking at a stopped device: every structure and every live byte (`check`), or what is where
//! (`inspect`). Both only read.

use crate::engine::Engine;
use crate::format::{OpenError, read, read_superblock};
use crate::layout::{RECORD_BLOCK, Superblock, SuperblockCopy, superblock_offsets};
use crate::recovery::{RecoveryReport, segment_records};
use crate::segments::SegmentPhase;
use crate::shard::{EngineConfig, Shard, verify_image};
use kvar_base::PAGE_BYTES;
use kvar_io::{Arena, Device};
use serde::Serialize;

/// Damaged blocks that are named; more are counted.
const DAMAGE_NAMED_MAX: usize = 100;

/// A block whose bytes do not pass their check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Hexadecimal id.
    pub id: String,
    /// Shard.
    pub shard: u32,
    /// Byte offset on the device.
    pub offset: u64,
    /// Stored length in bytes.
    pub len: u32,
}

/// What `check` found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Superblock copies that are not valid (of 4).
    pub superblock_copies_damaged: u32,
    /// What recovery of each shard would find.
    pub recovery: Vec<RecoveryReport>,
    /// Live blocks read and verified.
    pub blocks: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Live blocks that no record names (their record pages are lost; they are still verified when read).
    pub blocks_without_record: u64,
    /// Blocks that failed.
    pub damaged_blocks: u64,
    /// Some of them.
    pub damaged: Vec<Damage>,
}

impl CheckReport {
    /// Whether nothing is wrong: nothing that costs a block or redundancy.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.superblock_copies_damaged == 0
            && self.damaged_blocks == 0
            && self.blocks_without_record == 0
            && self
                .recovery
                .iter()
                .all(|shard| shard.headers_damaged == 0 && shard.checkpoints_damaged == 0)
    }
}

/// A segment, as `inspect` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct SegmentReport {
    /// Shard.
    pub shard: u32,
    /// Number in the shard.
    pub segment: u32,
    /// Byte offset on the device.
    pub offset: u64,
    /// Generation.
    pub generation: u32,
    /// Sequence number when it was opened.
    pub opened_sequence: u64,
    /// Whether its footer is whole.
    pub sealed: bool,
    /// Records of blocks.
    pub block_records: u64,
    /// Records of removes and purges.
    pub other_records: u64,
    /// Records of blocks that are live.
    pub live_blocks: u64,
    /// Bytes of these.
    pub live_bytes: u64,
}

/// What `inspect` found.
#[derive(Clone, Debug, Serialize)]
pub struct InspectReport {
    /// How the device is divided.
    pub superblock: Superblock,
    /// What recovery of each shard would find.
    pub recovery: Vec<RecoveryReport>,
    /// Segments that were ever used.
    pub segments: Vec<SegmentReport>,
}

fn open(device: &mut dyn Device, arena: &Arena) -> Result<Superblock, OpenError> {
    read_superblock(device, arena)?.ok_or(OpenError::NotKvar)
}

fn load(
    device: &mut dyn Device,
    arena: &Arena,
    superblock: &Superblock,
    shard: u32,
) -> Result<(Shard, RecoveryReport), OpenError> {
    Engine::load(
        device,
        arena.clone(),
        superblock,
        shard,
        EngineConfig {
            dram_bytes: 0,
            ..EngineConfig::default()
        },
    )
}

fn used_segments(shard: &Shard) -> Vec<u32> {
    (0..shard.segments.all.len() as u32)
        .filter(|number| shard.segments.all[*number as usize].phase == SegmentPhase::Sealed)
        .collect()
}

/// Verifies a stopped device whole. `progress` hears (segments done, segments in all).
///
/// The arena needs room for the largest block and a footer (64 MiB is plenty).
///
/// # Errors
/// When the device cannot be opened or has no kvar on it; damage is in the report.
pub fn check(
    device: &mut dyn Device,
    arena: &Arena,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CheckReport, OpenError> {
    let superblock = open(device, arena)?;
    let mut report = CheckReport::default();
    for offset in superblock_offsets(superblock.device_bytes) {
        let page = read(device, arena, offset, PAGE_BYTES as usize);
        let valid = page.is_ok_and(
            |page| matches!(Superblock::decode(page.as_slice()), SuperblockCopy::Valid(copy) if copy == superblock),
        );
        report.superblock_copies_damaged += u32::from(!valid);
    }
    let total = u64::from(superblock.shards) * u64::from(superblock.segments_per_shard);
    for number in 0..superblock.shards {
        let (mut shard, recovery) = load(device, arena, &superblock, number)?;
        report.recovery.push(recovery);
        for segment in used_segments(&shard) {
            check_segment(device, &mut shard, segment, &mut report)?;
            let done =
                u64::from(number) * u64::from(superblock.segments_per_shard) + u64::from(segment);
            progress(done, total);
        }
        // Every block that a record named was taken out of the index on the way.
        report.blocks_without_record += shard.index.len() as u64;
    }
    progress(total, total);
    Ok(report)
}

fn check_segment(
    device: &mut dyn Device,
    shard: &mut Shard,
    segment: u32,
    report: &mut CheckReport,
) -> Result<(), OpenError> {
    let (records, _) = segment_records(device, shard, segment)?;
    for record in records.iter().filter(|record| record.kind == RECORD_BLOCK) {
        let id = record.id();
        let position = shard.segments.position(segment, record.place.get());
        let Some((_, entry)) = shard
            .index
            .find(&id)
            .filter(|(_, entry)| entry.position == position)
        else {
            continue;
        };
        let place = shard.place_of(&entry);
        let sound =
            read(device, &shard.arena, place.offset, entry.len as usize).is_ok_and(|image| {
                verify_image(
                    &id,
                    image.as_slice(),
                    entry.sectioned,
                    entry.check64,
                    &place,
                )
                .is_some()
            });
        report.blocks += 1;
        report.bytes += u64::from(entry.len);
        if !sound {
            report.damaged_blocks += 1;
            if report.damaged.len() < DAMAGE_NAMED_MAX {
                report.damaged.push(Damage {
                    id: id.to_string(),
                    shard: shard.number,
                    offset: place.offset,
                    len: entry.len,
                });
            }
        }
        shard.index.remove_at(&id, position);
    }
    Ok(())
}

/// What is where on a stopped device.
///
/// # Errors
/// When the device cannot be opened or has no kvar on it.
pub fn inspect(device: &mut dyn Device, arena: &Arena) -> Result<InspectReport, OpenError> {
    let superblock = open(device, arena)?;
    let mut report = InspectReport {
        superblock: superblock.clone(),
        recovery: Vec::new(),
        segments: Vec::new(),
    };
    for number in 0..superblock.shards {
        let (shard, recovery) = load(device, arena, &superblock, number)?;
        report.recovery.push(recovery);
        for segment in used_segments(&shard) {
            let (records, sealed) = segment_records(device, &shard, segment)?;
            let state = shard.segments.all[segment as usize];
            let mut row = SegmentReport {
                shard: number,
                segment,
                offset: superblock.offset(number, segment, 0),
                generation: state.generation,
                opened_sequence: state.opened_sequence,
                sealed,
                block_records: 0,
                other_records: 0,
                live_blocks: 0,
                live_bytes: 0,
            };
            for record in &records {
                if record.kind != RECORD_BLOCK {
                    row.other_records += 1;
                    continue;
                }
                row.block_records += 1;
                let position = shard.segments.position(segment, record.place.get());
                if shard
                    .index
                    .find(&record.id())
                    .is_some_and(|(_, entry)| entry.position == position)
                {
                    row.live_blocks += 1;
                    row.live_bytes += u64::from(record.len.get());
                }
            }
            report.segments.push(row);
        }
    }
    Ok(report)
}
