//! `kvar check` and `kvar inspect`: looking at a stopped node's data. Nothing is written.

use crate::failure::{Failure, Outcome};
use crate::print;
use indicatif::{ProgressBar, ProgressStyle};
use kvar_base::ByteSize;
use kvar_io::{Arena, Device, DeviceOptions, Target, Wanted, open_device};
use std::path::Path;

/// Memory for reading: room for the largest block and a footer.
const ARENA_BYTES: usize = 64 << 20;

fn open(path: &Path) -> Result<(Target, Box<dyn Device>, Arena), Failure> {
    let target = Target::open(
        path,
        Wanted {
            size: None,
            create: false,
        },
    )
    .map_err(Failure::failed)?;
    let arena = Arena::new(ARENA_BYTES)
        .map_err(|error| Failure::failed(format!("no memory to read with: {error}")))?;
    let (device, notes) = open_device(&target, &arena, DeviceOptions::default())
        .map_err(|error| Failure::failed(format!("{}: {error}", path.display())))?;
    for note in notes {
        eprintln!("kvar: {note}");
    }
    Ok((target, device, arena))
}

fn at(path: &Path) -> impl Fn(kvar_engine::OpenError) -> Failure {
    move |error| Failure::failed(format!("{}: {error}", path.display()))
}

/// Verifies everything; exit code 1 if anything is damaged.
pub(crate) fn check(path: &Path, as_json: bool) -> Outcome {
    let (_target, mut device, arena) = open(path)?;
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} segments")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(0).with_style(style);
    let mut progress = |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    };
    let report = kvar_engine::check(&mut *device, &arena, &mut progress).map_err(at(path))?;
    bar.finish_and_clear();
    if as_json {
        print::json(&report)?;
    } else {
        print::line(&format!(
            "{} blocks with {} verified, {} damaged; {} of 4 superblock copies damaged",
            report.blocks,
            ByteSize(report.bytes),
            report.damaged_blocks,
            report.superblock_copies_damaged,
        ))?;
        for damage in &report.damaged {
            print::line(&format!(
                "damaged: {} in shard {} at {} ({} bytes)",
                damage.id, damage.shard, damage.offset, damage.len
            ))?;
        }
        for (shard, recovery) in report.recovery.iter().enumerate() {
            if recovery.headers_damaged + recovery.checkpoints_damaged > 0 {
                print::line(&format!(
                    "shard {shard}: {} segment headers and {} checkpoints damaged",
                    recovery.headers_damaged, recovery.checkpoints_damaged
                ))?;
            }
        }
    }
    if report.is_clean() {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "{} has damage; a node that serves it answers damaged blocks as misses and mends the rest, \
         so it may go on, but look at the device",
        path.display()
    )))
}

/// Prints the structures.
pub(crate) fn inspect(path: &Path, as_json: bool) -> Outcome {
    let (_target, mut device, arena) = open(path)?;
    let report = kvar_engine::inspect(&mut *device, &arena).map_err(at(path))?;
    if as_json {
        return print::json(&report);
    }
    let superblock = &report.superblock;
    print::line(&format!(
        "format {}, uuid {}, {} in {} shards, {} segments of {} a shard, blocks of about {}\n",
        superblock.format_version,
        superblock.uuid,
        ByteSize(superblock.device_bytes),
        superblock.shards,
        superblock.segments_per_shard,
        ByteSize(superblock.segment_bytes),
        ByteSize(superblock.expected_block_bytes),
    ))?;
    for (shard, recovery) in report.recovery.iter().enumerate() {
        let checkpoint = recovery
            .checkpoint
            .map_or_else(|| "none".to_owned(), |number| number.to_string());
        print::line(&format!(
            "shard {shard}: checkpoint {checkpoint}, {} segments in use, {} replayed ({} unsealed), \
             {} records, {} blocks",
            recovery.segments,
            recovery.segments_replayed,
            recovery.segments_unsealed,
            recovery.records,
            recovery.blocks,
        ))?;
    }
    let head = [
        "segment",
        "generation",
        "sealed",
        "blocks",
        "others",
        "live",
        "live bytes",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(report.segments.iter().map(|segment| {
        vec![
            format!("{}/{}", segment.shard, segment.segment),
            segment.generation.to_string(),
            segment.sealed.to_string(),
            segment.block_records.to_string(),
            segment.other_records.to_string(),
            segment.live_blocks.to_string(),
            segment.live_bytes.to_string(),
        ]
    }));
    print::line("")?;
    print::table(&rows)
}
