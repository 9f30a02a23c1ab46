//! What a shard counts, and what it says of itself.

use super::Shard;
use super::reclaim::Reclaim;
use kvar_base::{MissReason, Moment, PutOutcome, Refusal};
use kvar_policy::Tenant;
use serde::Serialize;
use std::collections::BTreeMap;

/// Everything counted since the shard was opened. Bytes are bytes, the rest are numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Ids looked up.
    pub lookups: u64,
    /// Of these, visible.
    pub lookup_hits: u64,
    /// Reads answered from memory.
    pub dram_hits: u64,
    /// Reads answered from the device.
    pub flash_hits: u64,
    /// Payload bytes answered.
    pub get_bytes: u64,
    /// Reads that found nothing, by reason.
    pub misses: BTreeMap<MissReason, u64>,
    /// Reads that waited for their turn at the device.
    pub reads_waited: u64,
    /// Reads and puts whose deadline had passed when they were asked for.
    pub overdue_at_call: u64,
    /// Reads whose deadline passed while they waited for the device; it read nothing for them.
    pub overdue_at_device: u64,
    /// Puts stored.
    pub puts_stored: u64,
    /// Puts of something visible.
    pub puts_exists: u64,
    /// Puts of something another writer is at.
    pub puts_in_progress: u64,
    /// Puts turned away, by reason.
    pub puts_refused: BTreeMap<Refusal, u64>,
    /// Puts begun and aborted.
    pub puts_aborted: u64,
    /// Payload bytes stored.
    pub put_bytes: u64,
    /// Puts whose bytes did not match the writer's own check.
    pub put_checks_failed: u64,
    /// Puts of a visible id with other bytes.
    pub id_divergence: u64,
    /// Reads of sections of a block on the device, instead of the whole.
    pub part_reads: u64,
    /// Reads that waited for a block which was being put.
    pub waited_reads: u64,
    /// Blocks that left because their time to live had passed.
    pub expired: u64,
    /// Leases granted.
    pub leases_granted: u64,
    /// Leases not granted at all: too many stand.
    pub leases_refused: u64,
    /// Leases granted on fewer blocks than were there: a budget was used up.
    pub leases_cut_short: u64,
    /// Blocks promised by leases.
    pub leased_blocks: u64,
    /// Leases renewed.
    pub leases_renewed: u64,
    /// Leases ended by whoever held them.
    pub leases_released: u64,
    /// Leases whose time was over.
    pub leases_expired: u64,
    /// Promised blocks that were removed or purged.
    pub leased_removed: u64,
    /// Promised blocks whose bytes did not pass their check.
    pub leased_corrupt: u64,
    /// Promised blocks that the device could not carry on; none while it is well.
    pub leased_dropped: u64,
    /// Blocks verified in the background.
    pub scrub_blocks: u64,
    /// Of these, not what was written.
    pub scrub_corrupt: u64,
    /// Segments whose footer was damaged.
    pub scrub_footers_damaged: u64,
    /// Segments verified in the background.
    pub scrub_segments: u64,
    /// Bytes read for that.
    pub scrub_read_bytes: u64,
    /// Segments the device was told not to keep.
    pub segments_discarded: u64,
    /// Times the device did not take that.
    pub discards_failed: u64,
    /// Blocks removed.
    pub removed: u64,
    /// Blocks purged.
    pub purged: u64,
    /// Blocks that left memory and are on the device.
    pub dram_evicted_clean: u64,
    /// Blocks that left memory and were nowhere else.
    pub dram_evicted_gone: u64,
    /// Of these, ephemeral ones.
    pub evicted_ephemeral: u64,
    /// Of these, such as had not been decided about: puts come faster than decisions are written.
    pub evicted_undecided: u64,
    /// Blocks that left memory while their one reader was awaited: nothing else could.
    pub evicted_awaited: u64,
    /// Blocks that left memory after their one reader had come, or its time was over.
    pub evicted_spent: u64,
    /// Handovers that were read.
    pub handovers_read: u64,
    /// Handovers whose time was over before they were.
    pub handovers_overdue: u64,
    /// Handovers that made way to others: half of memory waited for readers.
    pub handovers_crowded: u64,
    /// Blocks written because somebody asked for it: durable puts, a flush.
    pub admitted_asked: u64,
    /// Blocks written because the write budget had plenty.
    pub admitted_budget: u64,
    /// Blocks written because they were about to leave memory and worth a place.
    pub admitted_worth: u64,
    /// Blocks written because others of their prompt were.
    pub admitted_chain: u64,
    /// Blocks not written: worth no place.
    pub not_admitted: u64,
    /// Blocks not written: the limit of writes was reached, or the device takes none.
    pub not_admitted_limit: u64,
    /// Blocks not written: handed over, to be read once from memory.
    pub not_admitted_handover: u64,
    /// Blocks that reclaim left to memory, which decides about them anew.
    pub reclaim_to_memory: u64,
    /// Blocks that reclaim dropped.
    pub reclaim_dropped: u64,
    /// Blocks that reclaim wrote again.
    pub reclaim_kept: u64,
    /// Blocks that were offered to the tier below: by reclaim, and by memory.
    pub offered: u64,
    /// Of these, blocks that memory let go and this device did not take.
    pub offered_from_memory: u64,
    /// Of all offered, blocks that are safe there; they are not among the dropped ones.
    pub demoted: u64,
    /// Of these, blocks that memory let go.
    pub demoted_from_memory: u64,
    /// Of the safe ones, blocks that were there before.
    pub demoted_exists: u64,
    /// Bytes that went there, padding included.
    pub demoted_bytes: u64,
    /// Blocks that did not go there: worth no place.
    pub not_demoted_not_worth: u64,
    /// The same: its limit of writes was reached.
    pub not_demoted_limit: u64,
    /// The same: it had no room at the moment, or this shard had none to read them.
    pub not_demoted_busy: u64,
    /// The same: it took too long.
    pub not_demoted_late: u64,
    /// The same: it was not in service.
    pub not_demoted_gone: u64,
    /// The same: the bytes did not arrive whole, or could not be flushed.
    pub not_demoted_failed: u64,
    /// Blocks taken from the tier above.
    pub taken: u64,
    /// Bytes of these, padding included.
    pub taken_bytes: u64,
    /// Blocks that lost their index entry to another.
    pub bucket_evicted: u64,
    /// Blocks that were on the device alone when it refused their record.
    pub refused_dropped: u64,
    /// Copies that did not pass their check.
    pub corrupt: u64,
    /// Of these, written again from memory.
    pub corrupt_rewritten: u64,
    /// Device reads that failed.
    pub device_read_errors: u64,
    /// Reads of blocks tried once more because the device refused the first.
    pub reads_again_error: u64,
    /// Reads of blocks tried once more because the first did not pass its check.
    pub reads_again_check: u64,
    /// Of these two, well the second time.
    pub reads_mended: u64,
    /// Device writes or flushes that failed.
    pub device_write_errors: u64,
    /// Bytes read from the device for blocks.
    pub device_read_bytes: u64,
    /// Bytes of new blocks written, padding included.
    pub block_write_bytes: u64,
    /// Bytes of blocks written again by reclaim.
    pub moved_write_bytes: u64,
    /// Bytes of headers, directories, footers and checkpoints written.
    pub meta_write_bytes: u64,
    /// Payload bytes in the blocks written the first time.
    pub payload_written_bytes: u64,
    /// Device flushes.
    pub device_flushes: u64,
    /// Segments sealed.
    pub segments_sealed: u64,
    /// Segments reclaimed.
    pub segments_reclaimed: u64,
    /// Checkpoints completed.
    pub checkpoints: u64,
}

impl Counters {
    pub(super) fn count_miss(&mut self, reason: MissReason) {
        *self.misses.entry(reason).or_default() += 1;
    }

    pub(super) fn count_put(&mut self, outcome: PutOutcome) {
        match outcome {
            PutOutcome::Stored => self.puts_stored += 1,
            PutOutcome::Exists => self.puts_exists += 1,
            PutOutcome::InProgress => self.puts_in_progress += 1,
            PutOutcome::Refused(refusal) => *self.puts_refused.entry(refusal).or_default() += 1,
        }
    }

    /// Bytes written to the device, for whatever reason.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.block_write_bytes + self.moved_write_bytes + self.meta_write_bytes
    }

    /// Bytes written to the device for each byte of payload written the first time.
    #[must_use]
    pub fn write_amplification(&self) -> Option<f64> {
        let written = self.written_bytes();
        (self.payload_written_bytes > 0).then(|| written as f64 / self.payload_written_bytes as f64)
    }
}

/// What became of a tenant's blocks since the shard was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TenantCounters {
    /// Blocks that left the store because room was wanted.
    pub evicted: u64,
    /// Blocks that left memory and are on the device.
    pub left_memory: u64,
    /// Blocks that reclaim wrote again because their tenant was within its part.
    pub kept_entitled: u64,
}

/// A tenant at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TenantStatus {
    /// Its number.
    pub tenant: u8,
    /// Bytes of its blocks in memory, those that are being put or read included.
    pub dram_bytes: u64,
    /// Bytes of its blocks on the device.
    pub flash_bytes: u64,
    /// What became of them.
    #[serde(flatten)]
    pub counters: TenantCounters,
}

/// A shard at one moment.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ShardStatus {
    /// Its number.
    pub shard: u32,
    /// Everything counted.
    pub counters: Counters,
    /// Blocks in memory.
    pub dram_blocks: u64,
    /// Bytes of blocks in memory.
    pub dram_bytes: u64,
    /// Bytes of blocks that memory may hold.
    pub dram_bytes_max: u64,
    /// Bytes in memory alone that wait to be decided about; what is not written by choice.
    pub held_bytes: u64,
    /// Bytes in memory alone that wait for their one reader.
    pub awaited_bytes: u64,
    /// What a place on the device must be worth at the moment: a chance to be used, 0 to 1.
    pub keep_threshold: f64,
    /// Bytes of the write budget that are left, negative in debt; null without a budget.
    pub write_budget_left_bytes: Option<f64>,
    /// Blocks on the device.
    pub flash_blocks: u64,
    /// Bytes of segments.
    pub flash_bytes_max: u64,
    /// Segments free, sealed, and in all.
    pub segments_free: u64,
    /// Segments sealed.
    pub segments_sealed: u64,
    /// Segments in all.
    pub segments: u64,
    /// Memory of the index in bytes.
    pub index_bytes: u64,
    /// Index entries it was sized for.
    pub index_entries_max: u64,
    /// Bytes waiting to be written.
    pub dirty_bytes: u64,
    /// Bytes of writes it keeps under way at most, as found when the device was formatted.
    pub write_in_flight_bytes_max: u64,
    /// Puts acknowledged and not flushed.
    pub unflushed_puts: u64,
    /// How long ago, in microseconds, the oldest of them was acknowledged; 0 = all is flushed.
    pub unflushed_age_us: u64,
    /// Bytes written a byte of payload; null before anything was written.
    pub write_amplification: Option<f64>,
    /// Leases that stand.
    pub leases: u64,
    /// Blocks they hold.
    pub leased_blocks: u64,
    /// Memory charged for them.
    pub leased_dram_bytes: u64,
    /// Bytes of the device charged for them.
    pub leased_flash_bytes: u64,
    /// Records on the device that name an expiry, and the memory that knows them.
    pub expiring_blocks: u64,
    /// Memory of these.
    pub expiring_bytes: u64,
    /// Passes of the background verification that are complete.
    pub scrub_passes: u64,
    /// When the last was, in seconds since 1970; 0: none since the start.
    pub scrub_last_pass_unix_s: u64,
    /// Bytes read in the pass under way.
    pub scrub_pass_bytes: u64,
    /// Sealed segments that the pass under way is through with.
    pub scrub_pass_segments: u64,
    /// Why the device takes no writes at the moment, if so.
    pub device_trouble: Option<String>,
    /// Tenants that have anything here, or had since the start.
    pub tenants: Vec<TenantStatus>,
}

/// What became of memory at shutdown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShutdownReport {
    /// Blocks in memory that are on the device.
    pub kept_blocks: u64,
    /// Blocks in memory that are not, and are lost.
    pub dropped_blocks: u64,
    /// Whether the checkpoint was written (the next start is quicker).
    pub checkpointed: bool,
}

impl Shard {
    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn status(&self, now: Moment) -> ShardStatus {
        let oldest = self
            .unflushed
            .puts
            .values()
            .next()
            .map(|unflushed| now.since(unflushed.since));
        let (leases, leased_blocks, leased_dram_bytes, leased_flash_bytes) = self.leases.totals();
        let (scrub_pass_bytes, scrub_pass_segments) = self.scrub_progress();
        ShardStatus {
            leases,
            leased_blocks,
            leased_dram_bytes,
            leased_flash_bytes,
            expiring_blocks: self.expiries.blocks(),
            expiring_bytes: self.expiries.bytes(),
            scrub_passes: self.scrub.passes,
            scrub_last_pass_unix_s: self.scrub.last_pass_unix_s,
            scrub_pass_bytes,
            scrub_pass_segments,
            shard: self.number,
            counters: self.counters.clone(),
            dram_blocks: self.dram.len() as u64,
            dram_bytes: self.dram.used_bytes(),
            dram_bytes_max: self.dram.limit_bytes(),
            held_bytes: self.dram.held_bytes(),
            awaited_bytes: self.dram.awaited_bytes(),
            keep_threshold: self.keep.keeper().threshold(),
            write_budget_left_bytes: self.budget.left_bytes(),
            flash_blocks: self.index.len() as u64,
            flash_bytes_max: u64::from(self.superblock.segments_per_shard)
                * self.superblock.payload_bytes(),
            segments_free: self.segments.free.len() as u64,
            segments_sealed: self.segments.sealed.len() as u64,
            segments: self.segments.all.len() as u64,
            index_bytes: self.index.bytes() as u64,
            index_entries_max: self.index.bucket_count() as u64 * crate::layout::SLOTS_PER_BUCKET,
            dirty_bytes: self.dirty_bytes,
            write_in_flight_bytes_max: self.write_in_flight_bytes_max(),
            unflushed_puts: self.unflushed.puts.len() as u64,
            unflushed_age_us: oldest.map_or(0, |age| age.as_micros().max(1) as u64),
            write_amplification: self.counters.write_amplification(),
            device_trouble: self.trouble.reason(),
            tenants: self.tenants(),
        }
    }

    fn tenants(&self) -> Vec<TenantStatus> {
        let tenants = (0..).zip(&self.by_tenant);
        let tenants = tenants.filter_map(|(number, counters)| {
            let tenant = Tenant::new(number)?;
            let dram_bytes = self.dram.held_by(tenant);
            let flash_bytes = self.index.holdings().of(tenant);
            let is_known = dram_bytes + flash_bytes > 0 || *counters != TenantCounters::default();
            is_known.then_some(TenantStatus {
                tenant: tenant.number(),
                dram_bytes,
                flash_bytes,
                counters: *counters,
            })
        });
        tenants.collect()
    }

    /// Whether every segment is in one state alone, and what is counted of each tenant is what
    /// counting anew gives: for tests. Cost: the whole index, and all of memory.
    pub(crate) fn recount(&self) -> Result<(), String> {
        let reclaiming = self.reclaim.as_ref().map(Reclaim::segment);
        self.segments.recount(reclaiming)?;
        let found = self.index.counted_holdings();
        if found != *self.index.holdings() {
            return Err(format!(
                "the index leads to {found:?} and counts {:?}",
                self.index.holdings()
            ));
        }
        self.dram.recount()
    }
}
