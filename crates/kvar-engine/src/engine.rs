//! A shard and its device: the small reactor around the state machine.

use crate::format::{OpenError, mend_superblock, run};
use crate::index::Index;
use crate::layout::{PAGE, Superblock};
use crate::recovery::{RecoveryReport, recover, void_checkpoint};
use crate::shard::{
    BlockStat, Change, Counters, Demoted, Demotion, EngineConfig, Event, GetRequest, LeaseGrant,
    LeaseRequest, Places, PutRequest, PutTicket, ReadHints, Reader, Shard, ShardStatus,
    ShutdownReport, Standing,
};
use kvar_base::{BlockId, LeaseToken, Moment, PutOutcome, SECTIONS_MAX};
use kvar_io::{Arena, Completion, Device, Op};
use kvar_policy::Tenant;
use std::os::fd::RawFd;
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Memory for directories, footers, checkpoint chunks and the gaps between blocks.
const RESERVE_BYTES: usize = 16 << 20;
/// Memory for blocks that reclaim carries over, beside two of the largest.
const MOVING_BYTES: usize = 8 << 20;
/// What the arena remembers of its pages takes this part of it: four bytes a page.
const ARENA_SHARE: u64 = PAGE as u64 / 4;
/// What is remembered of a block in memory: the resident, its places in the orders, in maps that are
/// half full.
const RESIDENT_BYTES: u64 = 1 << 10;
const _: () = assert!(2 * crate::dram::RESIDENT_SIZE + 256 <= RESIDENT_BYTES as usize);

/// How large an [`Arena`] a shard needs: its DRAM and a reserve for input and output (24 MiB and
/// two of the largest blocks).
#[must_use]
pub fn arena_bytes(config: &EngineConfig, superblock: &Superblock) -> usize {
    let largest = superblock.block_bytes_max() as usize + SECTIONS_MAX * PAGE;
    config.dram_bytes as usize + RESERVE_BYTES + MOVING_BYTES + 2 * largest
}

/// What a shard's memory stays under, while blocks are no smaller than the device was made for: arena,
/// index, what is remembered of blocks in memory, and of the worth of all of them.
#[must_use]
pub fn memory_bytes(config: &EngineConfig, superblock: &Superblock) -> u64 {
    let index = superblock.buckets * crate::index::BUCKET_BYTES as u64;
    let worth = kvar_policy::Keep::memory_bytes(crate::shard::known_blocks(superblock));
    let arena = arena_bytes(config, superblock) as u64;
    let residents = config.dram_bytes / superblock.expected_block_bytes.max(PAGE as u64);
    arena + arena / ARENA_SHARE + residents * RESIDENT_BYTES + index + worth
}

/// A shard as it was found on its device. Can be handed to the thread that will drive it.
pub struct Loaded {
    shard: Shard,
    /// What recovery found.
    pub report: RecoveryReport,
}

/// One shard with its device. Nothing blocks after [`open`](Self::open).
///
/// Calls queue work and answers; [`turn`](Self::turn) moves both. The order of a loop is: calls,
/// `turn`, `events`, then sleep until [`readiness`](Self::readiness) or [`next_timer`](Self::next_timer).
pub struct Engine {
    // The device first: it is dropped first and waits for operations that hold arena memory.
    device: Box<dyn Device>,
    shard: Shard,
    completions: Vec<Completion>,
    /// Of these, what the next turn takes.
    later: Vec<Completion>,
}

impl Engine {
    /// Opens a shard: reads checkpoint and records, mends superblock copies. Blocks.
    ///
    /// # Errors
    /// When the device fails or has no such shard.
    pub fn open(
        mut device: Box<dyn Device>,
        arena: Arena,
        superblock: &Superblock,
        shard: u32,
        config: EngineConfig,
        now: Moment,
    ) -> Result<(Self, RecoveryReport), OpenError> {
        let loaded = Self::recover(&mut *device, arena, superblock, shard, config)?;
        let report = loaded.report.clone();
        Ok((Self::start(device, loaded, now), report))
    }

    /// The first half of [`open`](Self::open): reads the shard, mends superblock copies, and makes
    /// checkpoints that could not be read none. Blocks
    /// for as long as recovery takes, so a server does it on another thread than the one that will
    /// drive the shard, with a device of that thread's own over the same storage.
    ///
    /// # Errors
    /// When the device fails or has no such shard.
    pub fn recover(
        device: &mut dyn Device,
        arena: Arena,
        superblock: &Superblock,
        shard: u32,
        config: EngineConfig,
    ) -> Result<Loaded, OpenError> {
        let (mut shard, mut report) = Self::load(device, arena, superblock, shard, config)?;
        for area in std::mem::take(&mut shard.checkpoints_unread) {
            // One that stays is as bad as before; the device is good for the rest.
            let is_void = void_checkpoint(device, &shard, area);
            report.checkpoints_unsure += u32::from(!is_void);
        }
        if shard.number == 0 {
            // A copy that cannot be written is a lost copy; two others agreed.
            report.superblock_copies_mended =
                mend_superblock(device, &shard.arena, superblock).unwrap_or(0);
        }
        // What a killed process wrote may lie in the drive's cache alone. From here on what was
        // found counts as flushed.
        run(device, Op::Flush).1?;
        Ok(Loaded { shard, report })
    }

    /// The second half: drives a shard that was read, with the device of the calling thread.
    #[must_use]
    pub fn start(device: Box<dyn Device>, loaded: Loaded, now: Moment) -> Self {
        let mut engine = Self {
            device,
            shard: loaded.shard,
            completions: Vec::new(),
            later: Vec::new(),
        };
        engine.turn(now);
        engine
    }

    /// The shard as it is on the device; writes nothing.
    pub(crate) fn load(
        device: &mut dyn Device,
        arena: Arena,
        superblock: &Superblock,
        shard: u32,
        config: EngineConfig,
    ) -> Result<(Shard, RecoveryReport), OpenError> {
        if shard >= superblock.shards {
            return Err(OpenError::NoSuchShard {
                shard,
                shards: superblock.shards,
            });
        }
        let seed = xxh3_64_with_seed(&superblock.secret, u64::from(shard));
        let index = Index::new(superblock.buckets, seed);
        let mut shard = Shard::new(superblock, shard, config, arena, index);
        let report = recover(device, &mut shard)?;
        Ok((shard, report))
    }

    /// Which ids are visible, in order; refreshes them. `request` as in [`crate::Touch`].
    pub fn lookup(&mut self, now: Moment, ids: &[BlockId], request: u64) -> Vec<bool> {
        self.lookup_of(now, ids, Places::default(), request)
    }

    /// The same, of blocks that stand at these places of their prompt.
    pub fn lookup_of(
        &mut self,
        now: Moment,
        ids: &[BlockId],
        places: Places<'_>,
        request: u64,
    ) -> Vec<bool> {
        self.shard.called(now);
        self.shard.lookup(now, ids, places, request)
    }

    /// As a lookup that stops at the first block that is not there, and promises the ones before:
    /// they stay readable until the lease ends, unless they are removed. Fewer are promised when
    /// a budget is used up: a tenth of memory and of the device, a quarter of it a client.
    pub fn lease(&mut self, now: Moment, request: &LeaseRequest<'_>) -> LeaseGrant {
        self.shard.called(now);
        self.shard.lease(now, request)
    }

    /// Lets a lease last `ttl` from now (at most [`LEASE_MAX`](crate::LEASE_MAX), and never shorter
    /// than it did); until when it does. `None`: there is no such lease any more.
    pub fn renew(&mut self, now: Moment, token: LeaseToken, ttl: Duration) -> Option<Moment> {
        self.shard.called(now);
        self.shard.renew(now, token, ttl)
    }

    /// Ends a lease; whether there was one.
    pub fn release(&mut self, token: LeaseToken) -> bool {
        self.shard.release(token)
    }

    /// Takes blocks out of a lease, each as often as it is named. (Whoever leases a chain that lies
    /// in several engines gives back what lies behind a gap.) A lease without blocks ends.
    pub fn release_some(&mut self, token: LeaseToken, ids: &[BlockId]) {
        self.shard.release_some(token, ids);
    }

    /// The machine's clock was set: it is so many seconds since 1970 now. Times to live become
    /// longer or shorter by that.
    pub fn set_wall_clock(&mut self, now: Moment, unix_s: u64) {
        self.shard.set_wall_clock(now, unix_s);
    }

    /// Reads a block; ends in [`Event::Get`].
    pub fn get(&mut self, now: Moment, token: u64, request: GetRequest, hints: ReadHints) {
        self.shard.called(now);
        self.shard.get(now, Reader::new(token, request, hints));
    }

    /// Waits for a block that is being put, until that put ends or `until`; ends in
    /// [`Event::Awaited`]. `asker` as in [`ReadHints`].
    pub fn await_put(&mut self, now: Moment, asker: u64, token: u64, id: &BlockId, until: Moment) {
        self.shard.called(now);
        self.shard.await_put(now, (asker, token), id, until);
    }

    /// Whoever asked for this block, or waits for it, under this token has gone: what is not under way
    /// for it alone is answered now, as overdue.
    pub fn forget(&mut self, now: Moment, asker: u64, token: u64, id: &BlockId) {
        self.shard.called(now);
        self.shard.forget(asker, token, id);
    }

    /// Announces a put: room for its bytes, or why not.
    ///
    /// # Errors
    /// The outcome, when the bytes are not wanted.
    pub fn put_begin(
        &mut self,
        now: Moment,
        request: &PutRequest,
    ) -> Result<PutTicket, PutOutcome> {
        self.shard.called(now);
        self.shard.put_begin(now, request)
    }

    /// The bytes are in the ticket: verifies them; ends in [`Event::Put`].
    pub fn put_commit(&mut self, now: Moment, token: u64, ticket: PutTicket) {
        self.shard.called(now);
        self.shard.put_commit(now, token, ticket);
    }

    /// The bytes will not come.
    pub fn put_abort(&mut self, ticket: PutTicket) {
        self.shard.put_abort(ticket);
    }

    /// Removes blocks; ends in [`Event::Done`] when flushed.
    pub fn remove(&mut self, token: u64, ids: &[BlockId]) {
        self.shard.remove(token, ids);
    }

    /// Removes every block of a tenant, or of all; ends in [`Event::Done`] when flushed.
    pub fn purge(&mut self, token: u64, whose: Option<Tenant>) {
        self.shard.purge(token, whose);
    }

    /// Ends in [`Event::Done`] when all that was acknowledged before is flushed.
    pub fn flush(&mut self, token: u64) {
        self.shard.flush(token);
    }

    /// Where this shard stands among the tiers of its store. Until it is told it is the only one.
    pub fn set_standing(&mut self, standing: Standing) {
        self.shard.set_standing(standing);
    }

    /// What became of a block that was offered by [`Event::Demote`]. Every offer is answered once; until
    /// then the block stays here, for a bounded time.
    pub fn demoted(&mut self, now: Moment, token: u64, outcome: Demoted) {
        self.shard.called(now);
        self.shard.demoted(token, outcome);
    }

    /// Takes a block from the tier above, if its own policy finds it worth a place. `Ok`: it comes in, or
    /// was here and is not flushed yet; ends in [`Event::Put`] or [`Event::Done`] when it is flushed,
    /// or cannot be.
    ///
    /// # Errors
    /// What became of it, where that is known at once.
    pub fn take(&mut self, now: Moment, token: u64, block: &Demotion) -> Result<(), Demoted> {
        self.shard.called(now);
        self.shard.take(now, token, block)
    }

    /// What is known of a block without reading it.
    #[must_use]
    pub fn stat(&self, now: Moment, id: &BlockId) -> Option<BlockStat> {
        self.shard.stat(now, id)
    }

    /// Completions in, due work, operations out. Never blocks.
    pub fn turn(&mut self, now: Moment) {
        self.turn_some(now, u64::MAX);
    }

    /// As [`turn`](Self::turn), of reads that are over about `bytes` (one at least); whether more is
    /// over, for the next turn. Devices answer many operations at once, and who checks all
    /// of them before the first answer leaves keeps the device waiting for what its callers ask next.
    /// What is no read needs no looking at, and is taken in at once.
    pub fn turn_some(&mut self, now: Moment, bytes: u64) -> bool {
        self.device.poll(&mut self.completions);
        self.advance(now, bytes);
        // A refusal leaves the queue with the device; the next turn tries again.
        if let Err(error) = self.device.kick() {
            self.shard.device_refused(now, &error);
        }
        !self.completions.is_empty()
    }

    /// As [`turn`](Self::turn); where it brought no answer, sleeps like [`wait`](Self::wait) too. One
    /// system call hands over what is queued and waits, where `turn` and `wait` make two.
    pub fn turn_and_wait(&mut self, now: Moment, timeout: Duration) {
        self.device.poll(&mut self.completions);
        self.advance(now, u64::MAX);
        if self.shard.events.is_empty() && self.device.in_flight() > 0 {
            return self.device.wait(timeout);
        }
        if let Err(error) = self.device.kick() {
            self.shard.device_refused(now, &error);
        }
    }

    /// Takes in what is over, of reads about so many bytes.
    fn advance(&mut self, now: Moment, bytes: u64) {
        let mut left = bytes.max(1);
        for completion in self.completions.drain(..) {
            if let Op::Read { buffer, .. } = &completion.op {
                if left == 0 {
                    self.later.push(completion);
                    continue;
                }
                left = left.saturating_sub(buffer.padded_len() as u64);
            }
            self.shard.complete(now, completion);
        }
        std::mem::swap(&mut self.completions, &mut self.later);
        self.shard.step(now);
        for (token, op) in self.shard.out.drain(..) {
            self.device.submit(token, op);
        }
    }

    /// Answers since the last call.
    pub fn events(&mut self) -> std::vec::Drain<'_, Event> {
        self.shard.events.drain(..)
    }

    /// Whether there are answers to take, or operations that [`turn`](Self::turn) would hand over.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.shard.events.is_empty() || !self.shard.out.is_empty()
    }

    /// When [`turn`](Self::turn) has something to do even if nothing happens.
    #[must_use]
    pub fn next_timer(&self) -> Option<Moment> {
        self.shard.next_timer()
    }

    /// Readable when completions wait; `None` for a device that needs no waiting.
    #[must_use]
    pub fn readiness(&self) -> Option<RawFd> {
        self.device.readiness()
    }

    /// Blocks until a completion waits, nothing is under way, or `timeout` has passed; for callers
    /// that have nothing else to wait for.
    pub fn wait(&mut self, timeout: Duration) {
        self.device.wait(timeout);
    }

    /// From now on [`journal`](Self::journal) tells what happens to blocks without a call: for tests.
    pub fn keep_journal(&mut self) {
        self.shard.keep_journal();
    }

    /// What happened since the last call; nothing unless it was asked for.
    pub fn journal(&mut self) -> Vec<Change> {
        self.shard.take_journal()
    }

    /// Things remembered on behalf of calls and operations under way; none at rest.
    #[must_use]
    pub fn bookkeeping(&self) -> usize {
        self.shard.bookkeeping()
    }

    /// Whether every segment is in one state alone, and the bytes counted of each tenant are what
    /// counting anew gives: for tests. Cost: the whole index, and all of memory.
    ///
    /// # Errors
    /// What differs.
    pub fn recount(&self) -> Result<(), String> {
        self.shard.recount()
    }

    /// Operations under way, those included that are over and not taken in.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.device.in_flight() + self.completions.len()
    }

    /// System calls that the device made for this shard so far.
    #[must_use]
    pub fn system_calls(&self) -> u64 {
        self.device.system_calls()
    }

    /// How the device does I/O, in a word.
    #[must_use]
    pub fn io_engine(&self) -> &'static str {
        self.device.engine()
    }

    /// The shard at this moment.
    #[must_use]
    pub fn status(&self, now: Moment) -> ShardStatus {
        self.shard.status(now)
    }

    /// What was counted.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        self.shard.counters()
    }

    /// Writes everything and a checkpoint, within `shutdown_flush`; puts are Busy from now on.
    pub fn begin_shutdown(&mut self, now: Moment) {
        self.shard.begin_shutdown(now);
    }

    /// What became of memory, once that is over.
    #[must_use]
    pub fn shutdown_report(&self) -> Option<ShutdownReport> {
        self.shard.shutdown_report()
    }
}
