//! What was here when the process died.
//!
//! Reads, in this order: the newer valid checkpoint; every segment header of the shard; footers
//! (or, where one is not whole, directory pages) of segments that can hold records the checkpoint
//! does not know; then replays those records by sequence number. Nothing is written.
//!
//! A checkpoint that could not be read must not be read later: this life begins from what the one
//! before it says, draws sequence numbers that the newer one takes for known, and promises what is
//! there now. So whoever goes on to write makes it none, before anything is promised
//! ([`void_checkpoint`]).
//!
//! Records of a segment have numbers from its own opening number up to below that of the third
//! segment after it: that one is prepared only after the second after it was opened, which happens
//! only when this one was sealed. So segments that a checkpoint covers can be left out, and records
//! are sorted in a window of a few segments: memory stays bounded however many there are.
//!
//! The index has no room for the time at which a block expires. It stands in the block's record;
//! the checkpoint says which segments hold such records, and these are read too.

use crate::format::{OpenError, read, write};
use crate::index::{BUCKET_BYTES, Entry, Inserted};
use crate::layout::{
    CHUNK_BYTES, CHUNK_PAYLOAD_BYTES, CheckpointHead, NUMBERS_END, PAGE, PageKind, RECORD_BLOCK,
    RECORD_PURGE, RECORD_TENANT_PURGE, RECORD_TOMBSTONE, Record, SegmentState, Superblock,
    decode_chunk, decode_page,
};
use crate::mutation::{Check, is_disabled};
use crate::segments::{Segment, SegmentPhase};
use crate::shard::{Opening, Shard, checkpoint_prefix_bytes, directory_records, footer_records};
use kvar_base::page_round_up;
use kvar_io::{Arena, Device, Op};
use kvar_policy::Kind;
use serde::Serialize;
use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;
use zerocopy::FromBytes;

/// Header reads under way at once.
const HEADERS_IN_FLIGHT: usize = 32;
/// Times that a checkpoint which could not be read is written over: once more than a bad sector needs
/// to be given another place.
const VOID_TRIES: u32 = 2;
/// Segments after which a segment's record numbers are exceeded; see the module's story.
const OVERLAP: usize = 3;

/// What recovery found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RecoveryReport {
    /// Number of the checkpoint it started from; none: all footers were read.
    pub checkpoint: Option<u64>,
    /// Checkpoints that were there and not whole.
    pub checkpoints_damaged: u32,
    /// Segments in use.
    pub segments: u32,
    /// Segments whose records were read.
    pub segments_replayed: u32,
    /// Segments whose records were read only for the times at which blocks expire.
    pub segments_read_for_expiry: u32,
    /// Of the segments replayed, those without a whole footer.
    pub segments_unsealed: u32,
    /// Segment headers that were damaged.
    pub headers_damaged: u32,
    /// Records replayed.
    pub records: u64,
    /// Blocks that are visible now.
    pub blocks: u64,
    /// Index entries that made room for others during replay.
    pub bucket_evicted: u64,
    /// Checkpoints that could not be read, and could not be made none either: the next recovery may
    /// read them, and find what was there before this life.
    pub checkpoints_unsure: u32,
    /// Superblock copies that were lost and written again (by shard 0).
    pub superblock_copies_mended: u32,
}

pub(crate) fn recover(
    device: &mut dyn Device,
    shard: &mut Shard,
) -> Result<RecoveryReport, OpenError> {
    let mut report = RecoveryReport::default();
    let checkpoint = load_checkpoint(device, shard, &mut report)?;
    let headers = read_headers(device, shard)?;
    let mut used: Vec<(u64, u32)> = Vec::new();
    let mut lost = Vec::new();
    for (number, header) in headers.iter().enumerate() {
        let known = checkpoint
            .as_ref()
            .and_then(|checkpoint| checkpoint.segments.get(number));
        let number = number as u32;
        match header {
            Header::Valid {
                generation,
                opened_sequence,
            } => {
                let segment = shard.segments.get(number);
                segment.generation = *generation;
                segment.opened_sequence = *opened_sequence;
                used.push((*opened_sequence, number));
            }
            Header::Blank if known.is_none_or(|known| known.generation.get() == 0) => {}
            Header::Blank | Header::Damaged => {
                report.headers_damaged += 1;
                let found = probe_segment(device, shard, number)?;
                let known =
                    known.map(|known| (known.generation.get(), known.opened_sequence.get()));
                // One that was never opened is not known: as a used one it would be sealed and free
                // at once, and be reclaimed while it is written.
                let known = found.max(known).filter(|(generation, _)| *generation > 0);
                if let Some((generation, opened_sequence)) = known {
                    let segment = shard.segments.get(number);
                    segment.generation = generation;
                    segment.opened_sequence = opened_sequence;
                    used.push((opened_sequence, number));
                } else {
                    lost.push(number);
                }
            }
        }
    }
    // Of these no generation is known; one that was there before must not be given again.
    let newest = shard
        .segments
        .all
        .iter()
        .map(|known| known.generation)
        .max();
    for number in &lost {
        shard.segments.get(*number).generation = newest.unwrap_or(0);
    }
    if !is_disabled(Check::SequenceOrder) {
        used.sort_unstable();
    }
    report.segments = used.len() as u32;
    if let Some(checkpoint) = &checkpoint {
        let Shard {
            index, segments, ..
        } = shard;
        index.retain(|entry| {
            let (segment, _) = segments.locate(entry.position);
            let then = checkpoint.segments.get(segment as usize);
            let now = segments.all.get(segment as usize);
            then.zip(now)
                .is_some_and(|(then, now)| is_opening_of(then, now))
                || is_disabled(Check::CheckpointGeneration)
        });
        shard.keep.resume(checkpoint.head.demand_bytes.get());
        shard.next_sequence = checkpoint.head.next_sequence.get().max(1);
    }
    let mut empty = replay(device, shard, &used, checkpoint.as_ref(), &mut report)?;
    // Numbers drawn from here on are above those of every segment that was ever opened.
    let opened_last = used.last().map_or(0, |(sequence, _)| *sequence);
    shard.next_sequence = shard.next_sequence.max(opened_last + 1);
    if !empty.is_empty() {
        // A checkpoint may know blocks whose directory page never reached the device.
        let Shard {
            index, segments, ..
        } = shard;
        index.retain(|entry| {
            let (segment, _) = segments.locate(entry.position);
            empty.retain(|number| *number != segment);
            true
        });
    }
    shard.segments.free.clear();
    for number in 0..shard.segments.all.len() as u32 {
        if shard.segments.get(number).generation == 0 || lost.contains(&number) {
            shard.segments.free.push_back(number);
        }
    }
    // Oldest first, like all that is reused.
    for (_, number) in used {
        if empty.contains(&number) {
            if shard.segments.get(number).generation > 0 {
                shard.segments.free.push_back(number);
            }
        } else {
            shard.segments.get(number).phase = SegmentPhase::Sealed;
            shard.segments.sealed.push_back(number);
        }
    }
    shard.recovered();
    debug_assert_eq!(shard.segments.recount(None), Ok(()), "after recovery");
    report.blocks = shard.index.len() as u64;
    Ok(report)
}

struct Checkpoint {
    head: CheckpointHead,
    segments: Vec<SegmentState>,
}

/// Loads the newer valid checkpoint into the index.
fn load_checkpoint(
    device: &mut dyn Device,
    shard: &mut Shard,
    report: &mut RecoveryReport,
) -> Result<Option<Checkpoint>, OpenError> {
    let mut areas = Vec::new();
    let mut unread = Vec::new();
    for area in 0..2_u32 {
        let offset = shard.superblock.checkpoint_area(shard.number, area);
        let chunk = read(device, &shard.arena, offset, CHUNK_BYTES);
        let chunk = chunk.as_ref().map_or(&[][..], |chunk| chunk.as_slice());
        match decode_chunk(chunk, &shard.superblock, offset) {
            Some((place, _)) if place.shard == shard.number && place.number < NUMBERS_END => {
                areas.push((place.number, area));
            }
            _ if is_none(chunk) => {}
            _ => unread.push(area),
        }
    }
    areas.sort_unstable();
    // Numbers grow, also past one that is damaged.
    shard.checkpoint_number = areas.last().map_or(0, |(number, _)| *number);
    for (number, area) in areas.into_iter().rev() {
        let offset = shard.superblock.checkpoint_area(shard.number, area);
        if let Some(checkpoint) = load_area(device, shard, number, offset) {
            report.checkpoint = Some(number);
            // The next one leaves this alone.
            shard.checkpoint_area = 1 - area;
            shard.checkpoints_unread = unread;
            return Ok(Some(checkpoint));
        }
        report.checkpoints_damaged += 1;
        unread.push(area);
        shard.index.clear();
    }
    shard.checkpoints_unread = unread;
    Ok(None)
}

/// Whether a first chunk says that there is no checkpoint: none was ever written, or it was made none.
fn is_none(chunk: &[u8]) -> bool {
    let head = chunk.get(..PAGE);
    head.is_some_and(|head| head.iter().all(|byte| *byte == 0))
}

/// Makes the checkpoint of an area none, so that no later recovery reads it; durable with the next
/// flush. Whether it is none: it is looked at again, for a write that went elsewhere leaves it.
pub(crate) fn void_checkpoint(device: &mut dyn Device, shard: &Shard, area: u32) -> bool {
    let offset = shard.superblock.checkpoint_area(shard.number, area);
    (0..VOID_TRIES).any(|_| {
        write(device, &shard.arena, offset, &[0; PAGE]).is_ok()
            && read(device, &shard.arena, offset, PAGE).is_ok_and(|head| is_none(head.as_slice()))
    })
}

fn load_area(
    device: &mut dyn Device,
    shard: &mut Shard,
    number: u64,
    offset: u64,
) -> Option<Checkpoint> {
    let prefix_bytes = checkpoint_prefix_bytes(shard.segments.all.len());
    let stream_bytes = prefix_bytes + shard.index.bytes();
    let chunks = stream_bytes.div_ceil(CHUNK_PAYLOAD_BYTES) as u32;
    let mut prefix = Vec::with_capacity(prefix_bytes);
    let mut bucket = 0;
    for chunk in 0..chunks {
        let at = offset + u64::from(chunk) * CHUNK_BYTES as u64;
        let bytes = read(device, &shard.arena, at, CHUNK_BYTES).ok()?;
        let (place, payload) = decode_chunk(bytes.as_slice(), &shard.superblock, at)?;
        if place.shard != shard.number
            || place.number != number
            || place.chunk != chunk
            || place.chunks != chunks
        {
            return None;
        }
        let (head, buckets) = payload.split_at((prefix_bytes - prefix.len()).min(payload.len()));
        prefix.extend_from_slice(head);
        for bytes in buckets.chunks_exact(BUCKET_BYTES) {
            if bucket == shard.index.bucket_count() {
                return None;
            }
            shard.index.set_bucket_bytes(bucket, bytes.try_into().ok()?);
            bucket += 1;
        }
    }
    let (head, rest) = CheckpointHead::read_from_prefix(&prefix).ok()?;
    let agrees = head.hash_seed.get() == shard.index.seed()
        && head.buckets.get() == shard.index.bucket_count() as u64
        && head.segments.get() == shard.segments.all.len() as u64
        && bucket == shard.index.bucket_count()
        && head.replay_from.get() <= head.next_sequence.get()
        && head.next_sequence.get() < NUMBERS_END
        && head.demand_bytes.get() < NUMBERS_END;
    let (segments, _) =
        <[SegmentState]>::ref_from_prefix_with_elems(rest, shard.segments.all.len()).ok()?;
    agrees.then(|| Checkpoint {
        head,
        segments: segments.to_vec(),
    })
}

#[derive(Clone, Copy)]
enum Header {
    Blank,
    Damaged,
    Valid {
        generation: u32,
        opened_sequence: u64,
    },
}

fn read_headers(device: &mut dyn Device, shard: &mut Shard) -> Result<Vec<Header>, OpenError> {
    let count = shard.segments.all.len();
    let mut headers = vec![Header::Damaged; count];
    let (mut next, mut done) = (0, 0);
    let mut completions = Vec::new();
    while done < count {
        while next < count && device.in_flight() < HEADERS_IN_FLIGHT {
            let Some(buffer) = shard.arena.allocate(PAGE) else {
                break;
            };
            let offset = shard.superblock.offset(shard.number, next as u32, 0);
            device.submit(next as u64, Op::Read { offset, buffer });
            next += 1;
        }
        if device.in_flight() == 0 {
            return Err(OpenError::NoMemory);
        }
        device.kick()?;
        device.wait(Duration::from_secs(1));
        device.poll(&mut completions);
        for completion in completions.drain(..) {
            done += 1;
            let Op::Read { offset, buffer } = completion.op else {
                continue;
            };
            let number = completion.token as usize;
            let wanted = shard.superblock.device_segment(shard.number, number as u32);
            headers[number] = match decode_page(buffer.as_slice(), &shard.superblock, offset) {
                _ if completion.result.is_err() => Header::Damaged,
                Some((head, _))
                    if head.kind == PageKind::Header
                        && head.segment == wanted
                        && head.generation > 0 =>
                {
                    Header::Valid {
                        generation: head.generation,
                        opened_sequence: head.opened_sequence,
                    }
                }
                _ if buffer.as_slice().iter().all(|byte| *byte == 0) => Header::Blank,
                _ => Header::Damaged,
            };
        }
    }
    Ok(headers)
}

/// Generation and opening number of a segment whose header is lost, from its other pages.
fn probe_segment(
    device: &mut dyn Device,
    shard: &mut Shard,
    number: u32,
) -> Result<Option<(u32, u64)>, OpenError> {
    let superblock = shard.superblock.clone();
    let wanted = superblock.device_segment(shard.number, number);
    let footer = (superblock.footer_page(), superblock.footer_pages);
    let places = superblock
        .areas()
        .map(|first| (first, superblock.area_pages))
        .chain([footer]);
    let mut newest = None;
    for (first, pages) in places {
        let offset = superblock.offset(shard.number, number, first);
        let Ok(bytes) = read(device, &shard.arena, offset, pages as usize * PAGE) else {
            continue;
        };
        for (at, page) in bytes.as_slice().chunks_exact(PAGE).enumerate() {
            if let Some((head, _)) = decode_page(page, &superblock, offset + (at * PAGE) as u64)
                && head.segment == wanted
            {
                newest = newest.max(Some((head.generation, head.opened_sequence)));
            }
        }
    }
    Ok(newest)
}

/// Replays records from `replay_from` on; returns the segments that hold none at all.
fn replay(
    device: &mut dyn Device,
    shard: &mut Shard,
    used: &[(u64, u32)],
    checkpoint: Option<&Checkpoint>,
    report: &mut RecoveryReport,
) -> Result<Vec<u32>, OpenError> {
    let replay_from = checkpoint.map_or(0, |checkpoint| checkpoint.head.replay_from.get());
    let mut unnamed = Unnamed::default();
    let opened = |at: usize| used.get(at).map(|(sequence, _)| *sequence);
    let mut empty = Vec::new();
    let mut window: VecDeque<(u32, Record)> = VecDeque::new();
    for (at, (_, number)) in used.iter().enumerate() {
        let then = checkpoint.and_then(|checkpoint| checkpoint.segments.get(*number as usize));
        let then = then.filter(|then| is_opening_of(then, &shard.segments.all[*number as usize]));
        if opened(at + OVERLAP).is_some_and(|sequence| sequence <= replay_from) {
            let expiring = then.map_or(0, |then| then.expiring.get());
            if expiring > 0 && !is_disabled(Check::ExpiryAtRecovery) {
                report.segments_read_for_expiry += 1;
                let (records, _) = segment_records(device, shard, *number)?;
                if take_expiries(shard, *number, &records) < expiring {
                    unnamed.add(*number, &records);
                }
            }
            continue;
        }
        report.segments_replayed += 1;
        let (records, sealed) = segment_records(device, shard, *number)?;
        report.segments_unsealed += u32::from(!sealed);
        if records.is_empty() && !sealed {
            empty.push(*number);
        }
        take_expiries(shard, *number, &records);
        if then.is_some() {
            unnamed.add(*number, &records);
        }
        let fresh = records
            .into_iter()
            .filter(|record| record.sequence() >= replay_from);
        window.extend(fresh.map(|record| (*number, record)));
        // Records still to be read have numbers from the opening of the next segment on.
        let ready_below = opened(at + 1).unwrap_or(u64::MAX);
        if !is_disabled(Check::SequenceOrder) {
            window
                .make_contiguous()
                .sort_by_key(|(_, record)| record.sequence());
        }
        apply_below(shard, &mut window, ready_below, report);
    }
    apply_below(shard, &mut window, u64::MAX, report);
    unnamed.drop_entries(shard);
    Ok(empty)
}

/// Whether a checkpoint speaks of a segment as it was opened last.
fn is_opening_of(then: &SegmentState, now: &Segment) -> bool {
    (then.generation.get(), then.opened_sequence.get()) == (now.generation, now.opened_sequence)
}

/// Notes when a segment's blocks expire; how many do.
fn take_expiries(shard: &mut Shard, number: u32, records: &[Record]) -> u32 {
    let mut expiring = HashSet::new();
    for record in records.iter().filter(|record| record.kind == RECORD_BLOCK) {
        let expires_unix_s = record.hints().expires_unix_s;
        let page = record.place.get();
        shard.expiries.add(number, page, expires_unix_s);
        if expires_unix_s != 0 {
            expiring.insert(page);
        }
    }
    expiring.len() as u32
}

/// Segments of which the checkpoint may know blocks that no record names: one of these might expire,
/// and would live for ever. That is where records are missing of those that were counted, of a segment
/// that was full then; of any other also what came while the checkpoint was written is in it, uncounted.
#[derive(Default)]
struct Unnamed {
    /// Pages that records name, by segment.
    named: HashMap<u32, HashSet<u32>>,
}

impl Unnamed {
    fn add(&mut self, number: u32, records: &[Record]) {
        let pages = records.iter().map(|record| record.place.get());
        self.named.insert(number, pages.collect());
    }

    fn drop_entries(&self, shard: &mut Shard) {
        if self.named.is_empty() {
            return;
        }
        let Shard {
            index, segments, ..
        } = shard;
        index.retain(|entry| {
            let (segment, page) = segments.locate(entry.position);
            self.named
                .get(&segment)
                .is_none_or(|pages| pages.contains(&page))
        });
    }
}

fn apply_below(
    shard: &mut Shard,
    window: &mut VecDeque<(u32, Record)>,
    below: u64,
    report: &mut RecoveryReport,
) {
    let mut last = 0;
    while let Some((segment, record)) =
        window.pop_front_if(|(_, record)| record.sequence() < below || below == u64::MAX)
    {
        if record.sequence() == last {
            continue; // The same record on two pages.
        }
        last = record.sequence();
        report.records += 1;
        shard.next_sequence = shard.next_sequence.max(last + 1);
        match record.kind {
            RECORD_BLOCK => {
                let len = record.len.get();
                let entry = Entry {
                    check64: record.check64.get(),
                    position: shard.segments.position(segment, record.place.get()),
                    len,
                    sectioned: record.is_sectioned(),
                    touched: false,
                    frequency: 0,
                    length: 0,
                    kind: Kind::of(record.hints().class).number(),
                    stamp: shard.keep.stamp(),
                    tenant: record.tenant(),
                };
                shard.keep.demanded(page_round_up(u64::from(len)));
                let age = shard.age();
                let inserted = shard.index.insert(&record.id(), &entry, age);
                report.bucket_evicted += u64::from(matches!(inserted, Inserted::Evicted(_)));
            }
            RECORD_TOMBSTONE | RECORD_PURGE | RECORD_TENANT_PURGE
                if is_disabled(Check::Tombstone) => {}
            RECORD_TOMBSTONE => {
                shard.index.remove(&record.id());
            }
            RECORD_PURGE => shard.index.clear(),
            RECORD_TENANT_PURGE if shard.index.holdings().of(record.tenant()) == 0 => {}
            RECORD_TENANT_PURGE => {
                let tenant = record.tenant();
                shard.index.retain(|entry| entry.tenant != tenant);
            }
            _ => {}
        }
    }
}

/// The records of a segment, and whether its footer was whole.
pub(crate) fn segment_records(
    device: &mut dyn Device,
    shard: &Shard,
    number: u32,
) -> Result<(Vec<Record>, bool), OpenError> {
    let place = (shard.number, number);
    let opening = shard.opening(number);
    records_of(device, &shard.arena, &shard.superblock, place, &opening)
}

/// The records of an opening of a segment, (shard, number), and whether it is sealed.
pub(crate) fn records_of(
    device: &mut dyn Device,
    arena: &Arena,
    superblock: &Superblock,
    (shard, number): (u32, u32),
    opening: &Opening,
) -> Result<(Vec<Record>, bool), OpenError> {
    let offset = superblock.offset(shard, number, superblock.footer_page());
    if let Ok(pages) = read(
        device,
        arena,
        offset,
        superblock.footer_pages as usize * PAGE,
    ) && let Some(records) = footer_records(pages.as_slice(), superblock, offset, opening)
    {
        return Ok((records, true));
    }
    let mut records = Vec::new();
    for first in superblock.areas() {
        let offset = superblock.offset(shard, number, first);
        // An area that cannot be read costs its own records.
        if let Ok(pages) = read(device, arena, offset, superblock.area_pages as usize * PAGE) {
            records.extend(directory_records(
                pages.as_slice(),
                superblock,
                offset,
                opening,
            ));
        }
    }
    records.sort_by_key(Record::sequence);
    records.dedup_by_key(|record| record.sequence());
    Ok((records, false))
}
