//! Where blocks lie on the device: a table in RAM without keys, 64 bytes for 3 entries.
//!
//! ```text
//! bucket  = 3 x check64 | 3 x word | 3 x tail | lengths          64 bytes, one cache line
//! word    = position 30 (pages from the shard's first segment; 0 = empty) | tag 30
//!           | touched 1 | frequency 2 | sectioned 1
//! tail    = length 24 (exact bytes - 1, or pages of a sectioned block) | stamp 8
//! lengths = 3 x 3 bits: the logarithm of the blocks of the request that used it last
//!           | 3 x 5 bits: whose the block is, by number | 3 x 2 bits: the kind of traffic its writer named | 2 spare
//! ```
//!
//! What each tenant holds is counted as entries come, move and go.
//!
//! An id has two buckets; the second is found from the first and the tag, so that an entry can
//! move without its id. A full pair relocates one entry once, then evicts the coldest of the six.
//! Two ids with one tag in one pair are told apart by `check64` when the bytes are read (once in
//! 10^8 lookups).

use crate::layout::SLOTS_PER_BUCKET;
use crate::snapshot::Snapshot;
use crate::table::Table;
use kvar_base::{BlockId, page_round_up};
use kvar_policy::{BlockClass, Holdings, Kind, Tenant, TenantSet};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128_with_seed};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const SLOTS: usize = SLOTS_PER_BUCKET as usize;
const POSITION_BITS: u32 = 30;
const TAG_BITS: u32 = 30;
const POSITION_MASK: u64 = (1 << POSITION_BITS) - 1;
const TAG_MASK: u64 = (1 << TAG_BITS) - 1;
const TOUCHED: u64 = 1 << 60;
const FREQUENCY_SHIFT: u32 = 61;
const SECTIONED: u64 = 1 << 63;
const LENGTH_BITS: usize = 3;
const LENGTH_MASK: u32 = (1 << LENGTH_BITS) - 1;
const KIND_SHIFT: usize = 24;
const KIND_BITS: usize = 2;
const KIND_MASK: u32 = (1 << KIND_BITS) - 1;
/// Tenants stand behind the lengths.
const TENANT_SHIFT: usize = SLOTS * LENGTH_BITS;
const TENANT_BITS: usize = 5;
const TENANT_MASK: u32 = (1 << TENANT_BITS) - 1;
const _: () = assert!(kvar_policy::TENANTS == 1 << TENANT_BITS);

#[derive(
    Clone, Copy, Default, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(64))]
struct Bucket {
    check: [u64; SLOTS],
    word: [u64; SLOTS],
    tail: [u32; SLOTS],
    lengths: u32,
}

impl Bucket {
    fn length(&self, slot: usize) -> u8 {
        (self.lengths >> (slot * LENGTH_BITS) & LENGTH_MASK) as u8
    }

    fn set_length(&mut self, slot: usize, length: u8) {
        let shift = slot * LENGTH_BITS;
        let length = (u32::from(length) & LENGTH_MASK) << shift;
        self.lengths = self.lengths & !(LENGTH_MASK << shift) | length;
    }

    fn kind(&self, slot: usize) -> u8 {
        (self.lengths >> (KIND_SHIFT + slot * KIND_BITS) & KIND_MASK) as u8
    }

    fn set_kind(&mut self, slot: usize, kind: u8) {
        let shift = KIND_SHIFT + slot * KIND_BITS;
        let kind = (u32::from(kind) & KIND_MASK) << shift;
        self.lengths = self.lengths & !(KIND_MASK << shift) | kind;
    }

    fn tenant(&self, slot: usize) -> Tenant {
        let number = self.lengths >> (TENANT_SHIFT + slot * TENANT_BITS) & TENANT_MASK;
        Tenant::new(number).unwrap_or_default()
    }

    fn set_tenant(&mut self, slot: usize, tenant: Tenant) {
        let shift = TENANT_SHIFT + slot * TENANT_BITS;
        let tenant = u32::from(tenant.number()) << shift;
        self.lengths = self.lengths & !(TENANT_MASK << shift) | tenant;
    }

    fn is_used(&self, slot: usize) -> bool {
        self.word[slot] & POSITION_MASK != 0
    }
}

const _: () = assert!(size_of::<Bucket>() == 64);

/// Lookups that wait for memory together: about what a core keeps under way.
const BATCH: usize = 16;

/// Bytes of a bucket, in memory and in a checkpoint.
pub(crate) const BUCKET_BYTES: usize = size_of::<Bucket>();

/// What the index knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Check of the stored head.
    pub check64: u64,
    /// Pages from the start of the shard's first segment; never 0.
    pub position: u32,
    /// Exact bytes of a block of one section; whole pages in bytes of a sectioned one.
    pub len: u32,
    /// Begins with a section directory.
    pub sectioned: bool,
    /// Read or put again since it was last written.
    pub touched: bool,
    /// Uses before the last one, 0..=3.
    pub frequency: u8,
    /// Logarithm of the blocks of the request that used it last, 0..=7.
    pub length: u8,
    /// Kind of traffic its writer named, 0..=3.
    pub kind: u8,
    /// Coarse moment of the last touch.
    pub stamp: u8,
    /// Whose it is.
    pub tenant: Tenant,
}

impl Entry {
    /// Bytes it takes on the device, padding to pages included.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        page_round_up(u64::from(self.len))
    }

    /// What is known of its use.
    #[must_use]
    pub fn class(&self) -> BlockClass {
        BlockClass::from_parts(self.frequency, self.length).of_kind(Kind::of(self.kind))
    }
}

/// A place in the table; good until the next insert or remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotRef {
    pub(crate) bucket: usize,
    pub(crate) slot: usize,
}

/// What lies in a slot: check, word, tail, length of the request, kind of traffic, whose it is.
pub(crate) type RawSlot = (u64, u64, u32, u8, u8, Tenant);

/// What an insert had to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// There was room.
    Added,
    /// It was known; its place is the new one now.
    Replaced(Entry),
    /// Another block's entry had to go.
    Evicted(Entry),
    /// Nothing changed: the places are full and all of them are held.
    Held,
}

/// The table of one shard.
pub struct Index {
    buckets: Table<Bucket>,
    seed: u64,
    entries: usize,
    /// Bytes of the blocks it leads to, by tenant.
    holdings: Holdings,
    snapshot: Option<Snapshot>,
}

struct Home {
    first: usize,
    second: usize,
    tag: u64,
}

impl Home {
    const NONE: Self = Self {
        first: 0,
        second: 0,
        tag: 0,
    };
}

impl Index {
    /// An empty table; `seed` keeps outsiders from choosing ids that collide.
    #[must_use]
    pub fn new(buckets: u64, seed: u64) -> Self {
        Self {
            buckets: Table::zeroed(buckets.max(1) as usize),
            seed,
            entries: 0,
            holdings: Holdings::default(),
            snapshot: None,
        }
    }

    /// Entries in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Bytes of the blocks it leads to, padding included, by tenant.
    #[must_use]
    pub fn holdings(&self) -> &Holdings {
        &self.holdings
    }

    /// The same, counted anew: for tests. Cost: the whole table.
    #[must_use]
    pub fn counted_holdings(&self) -> Holdings {
        let mut holdings = Holdings::default();
        for bucket in 0..self.buckets.len() {
            for slot in (0..SLOTS).filter(|slot| self.buckets[bucket].is_used(*slot)) {
                let entry = self.entry(SlotRef { bucket, slot });
                holdings.add(entry.tenant, entry.stored_bytes());
            }
        }
        holdings
    }

    /// Memory of the table in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.buckets.len() * BUCKET_BYTES
    }

    /// Buckets.
    #[must_use]
    pub fn bucket_count(&self) -> usize {
        self.buckets.len()
    }

    /// Seed of the hash.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    fn home(&self, id: &BlockId) -> Home {
        let hash = xxh3_128_with_seed(id.as_bytes(), self.seed);
        let tag = (hash >> 64) as u64 & TAG_MASK & crate::mutation::tag_mask();
        let first = ((u128::from(hash as u64) * self.buckets.len() as u128) >> 64) as usize;
        Home {
            first,
            second: self.other(first, tag),
            tag,
        }
    }

    /// The second bucket of an entry that lies in `bucket`: going there and back ends where it began.
    fn other(&self, bucket: usize, tag: u64) -> usize {
        let count = self.buckets.len();
        let sum = (xxh3_64(&tag.to_le_bytes()) % count as u64) as usize;
        // (sum - bucket) modulo count, without a second division.
        if sum >= bucket {
            sum - bucket
        } else {
            sum + count - bucket
        }
    }

    /// The words of both buckets: asked for before either is looked at, they arrive together.
    fn words(&self, home: &Home) -> [[u64; SLOTS]; 2] {
        [home.first, home.second].map(|bucket| self.buckets[bucket].word)
    }

    fn find_slot(&self, home: &Home) -> Option<SlotRef> {
        Self::slot_in(home, &self.words(home))
    }

    fn slot_in(home: &Home, words: &[[u64; SLOTS]; 2]) -> Option<SlotRef> {
        let holds =
            |word: &u64| word & POSITION_MASK != 0 && word >> POSITION_BITS & TAG_MASK == home.tag;
        let slot = words.as_flattened().iter().position(holds)?;
        let bucket = if slot < SLOTS {
            home.first
        } else {
            home.second
        };
        let slot = slot % SLOTS;
        Some(SlotRef { bucket, slot })
    }

    /// The entry of an id. Cost: one hash, one or two cache lines.
    #[must_use]
    pub fn find(&self, id: &BlockId) -> Option<(SlotRef, Entry)> {
        let at = self.find_slot(&self.home(id))?;
        Some((at, self.entry(at)))
    }

    /// The entry of an id that was found at `at` before, and led there. Cost: the cache line that it lay
    /// in, if it still does; else as [`find`](Self::find).
    #[must_use]
    pub fn find_again(
        &self,
        id: &BlockId,
        at: SlotRef,
        before: &Entry,
    ) -> Option<(SlotRef, Entry)> {
        let bucket = &self.buckets[at.bucket];
        // No two blocks lie at one place, and the check is of this id alone.
        let is_there = (bucket.word[at.slot] & POSITION_MASK) as u32 == before.position
            && bucket.check[at.slot] == before.check64;
        if is_there {
            return Some((at, self.entry(at)));
        }
        self.find(id)
    }

    /// The entries of many ids, in order. A lookup of one id waits for memory; here up to
    /// sixteen wait together.
    pub fn find_all(&self, ids: &[BlockId], found: &mut Vec<Option<(SlotRef, Entry)>>) {
        for ids in ids.chunks(BATCH) {
            let mut homes = [const { Home::NONE }; BATCH];
            let mut words = [[[0; SLOTS]; 2]; BATCH];
            for (number, id) in ids.iter().enumerate() {
                homes[number] = self.home(id);
                words[number] = self.words(&homes[number]);
            }
            found.extend((0..ids.len()).map(|number| {
                let at = Self::slot_in(&homes[number], &words[number])?;
                Some((at, self.entry(at)))
            }));
        }
    }

    fn entry(&self, at: SlotRef) -> Entry {
        let bucket = &self.buckets[at.bucket];
        let (word, tail) = (bucket.word[at.slot], bucket.tail[at.slot]);
        let sectioned = word & SECTIONED != 0;
        let raw_len = tail >> 8;
        Entry {
            check64: bucket.check[at.slot],
            position: (word & POSITION_MASK) as u32,
            len: if sectioned {
                raw_len << 12
            } else {
                raw_len + 1
            },
            sectioned,
            touched: word & TOUCHED != 0,
            frequency: (word >> FREQUENCY_SHIFT & 3) as u8,
            length: bucket.length(at.slot),
            kind: bucket.kind(at.slot),
            stamp: tail as u8,
            tenant: bucket.tenant(at.slot),
        }
    }

    /// Writes an entry over whatever lies there.
    fn set(&mut self, at: SlotRef, tag: u64, entry: &Entry) {
        self.uncount(at);
        let raw_len = if entry.sectioned {
            entry.len >> 12
        } else {
            entry.len - 1
        };
        let bucket = &mut self.buckets[at.bucket];
        bucket.check[at.slot] = entry.check64;
        bucket.word[at.slot] = u64::from(entry.position)
            | tag << POSITION_BITS
            | if entry.touched { TOUCHED } else { 0 }
            | u64::from(entry.frequency.min(3)) << FREQUENCY_SHIFT
            | if entry.sectioned { SECTIONED } else { 0 };
        bucket.tail[at.slot] = raw_len << 8 | u32::from(entry.stamp);
        bucket.set_length(at.slot, entry.length);
        bucket.set_kind(at.slot, entry.kind);
        bucket.set_tenant(at.slot, entry.tenant);
        self.count(at);
    }

    /// What lies in a slot has come.
    fn count(&mut self, at: SlotRef) {
        let entry = self.entry(at);
        self.holdings.add(entry.tenant, entry.stored_bytes());
    }

    /// What lies in a slot is about to go.
    fn uncount(&mut self, at: SlotRef) {
        if self.buckets[at.bucket].is_used(at.slot) {
            let gone = self.entry(at);
            self.holdings.take(gone.tenant, gone.stored_bytes());
        }
    }

    /// Adds or moves the entry of an id. `age` tells how old a stamp is; it is asked only when the
    /// six places of the id are full.
    pub fn insert(&mut self, id: &BlockId, entry: &Entry, age: impl Fn(u8) -> u8) -> Inserted {
        self.insert_beside(id, entry, age, |_| false, TenantSet::default())
    }

    /// As [`insert`](Self::insert), but an entry at a position that is `held` is not evicted, and one
    /// of a tenant that is `spared` only if all that might go are such.
    pub fn insert_beside(
        &mut self,
        id: &BlockId,
        entry: &Entry,
        age: impl Fn(u8) -> u8,
        held: impl Fn(u32) -> bool,
        spared: TenantSet,
    ) -> Inserted {
        debug_assert!(
            entry.position != 0 && u64::from(entry.position) <= POSITION_MASK && entry.len > 0
        );
        let home = self.home(id);
        if let Some(at) = self.find_slot(&home) {
            let before = self.entry(at);
            self.set(at, home.tag, entry);
            return Inserted::Replaced(before);
        }
        if let Some(at) = self.free_slot(home.first, home.second) {
            self.set(at, home.tag, entry);
            self.entries += 1;
            return Inserted::Added;
        }
        let taken = [home.first, home.second]
            .into_iter()
            .flat_map(|bucket| (0..SLOTS).map(move |slot| SlotRef { bucket, slot }));
        for at in taken.clone() {
            let tag = self.tag(at);
            let target = self.other(at.bucket, tag);
            if let Some(free) = self.free_to_move_to(target) {
                let moved = self.entry(at);
                let raw = self.raw(at);
                if let Some(snapshot) = &mut self.snapshot {
                    snapshot.moved(at, free, raw);
                }
                self.set(free, tag, &moved);
                self.set(at, home.tag, entry);
                self.entries += 1;
                return Inserted::Added;
            }
        }
        let coldest = taken
            .filter(|at| !held(self.entry(*at).position))
            .max_by_key(|at| {
                let entry = self.entry(*at);
                let is_spared = spared.has(entry.tenant);
                (
                    !is_spared,
                    !entry.touched,
                    age(entry.stamp),
                    3 - entry.frequency,
                )
            });
        let Some(coldest) = coldest else {
            return Inserted::Held;
        };
        let before = self.entry(coldest);
        self.set(coldest, home.tag, entry);
        Inserted::Evicted(before)
    }

    fn tag(&self, at: SlotRef) -> u64 {
        self.buckets[at.bucket].word[at.slot] >> POSITION_BITS & TAG_MASK
    }

    fn free_in(&self, bucket: usize) -> Option<SlotRef> {
        (0..SLOTS)
            .find(|slot| self.buckets[bucket].word[*slot] & POSITION_MASK == 0)
            .map(|slot| SlotRef { bucket, slot })
    }

    /// A free slot that the snapshot under way has no word about.
    fn free_to_move_to(&self, bucket: usize) -> Option<SlotRef> {
        self.free_in(bucket).filter(|at| {
            self.snapshot
                .as_ref()
                .is_none_or(|snapshot| !snapshot.speaks_of(*at))
        })
    }

    fn raw(&self, at: SlotRef) -> RawSlot {
        let bucket = &self.buckets[at.bucket];
        (
            bucket.check[at.slot],
            bucket.word[at.slot],
            bucket.tail[at.slot],
            bucket.length(at.slot),
            bucket.kind(at.slot),
            bucket.tenant(at.slot),
        )
    }

    fn free_slot(&self, first: usize, second: usize) -> Option<SlotRef> {
        let used = |bucket: usize| {
            self.buckets[bucket]
                .word
                .iter()
                .filter(|word| **word & POSITION_MASK != 0)
                .count()
        };
        let emptier = if used(second) < used(first) {
            second
        } else {
            first
        };
        self.free_in(emptier)
    }

    /// Takes the entry of an id out, if it lies at `position`.
    pub fn remove_at(&mut self, id: &BlockId, position: u32) -> bool {
        match self.find(id) {
            Some((at, entry)) if entry.position == position => {
                self.clear_slot(at);
                true
            }
            _ => false,
        }
    }

    /// Takes the entry of an id out.
    pub fn remove(&mut self, id: &BlockId) -> Option<Entry> {
        let (at, entry) = self.find(id)?;
        self.clear_slot(at);
        Some(entry)
    }

    fn clear_slot(&mut self, at: SlotRef) {
        self.uncount(at);
        self.buckets[at.bucket].word[at.slot] = 0;
        self.buckets[at.bucket].check[at.slot] = 0;
        self.buckets[at.bucket].tail[at.slot] = 0;
        self.buckets[at.bucket].set_length(at.slot, 0);
        self.buckets[at.bucket].set_kind(at.slot, 0);
        self.buckets[at.bucket].set_tenant(at.slot, Tenant::DEFAULT);
        self.entries -= 1;
    }

    /// An entry was used now, and is of this class since.
    pub fn touch(&mut self, at: SlotRef, stamp: u8, class: BlockClass) {
        let bucket = &mut self.buckets[at.bucket];
        let word = &mut bucket.word[at.slot];
        let frequency = u64::from(class.uses().min(3));
        *word = (*word | TOUCHED) & !(3 << FREQUENCY_SHIFT) | frequency << FREQUENCY_SHIFT;
        let tail = &mut bucket.tail[at.slot];
        *tail = *tail & !0xff | u32::from(stamp);
        bucket.set_length(at.slot, class.length());
    }

    /// Looks at the stamps of some buckets; `change` says what to write in place of one. Cost: the
    /// cache lines of these buckets.
    pub fn sweep(&mut self, buckets: std::ops::Range<usize>, change: impl Fn(u8) -> Option<u8>) {
        for number in buckets.start..buckets.end.min(self.buckets.len()) {
            let bucket = &mut self.buckets[number];
            for slot in 0..SLOTS {
                let is_used = bucket.word[slot] & POSITION_MASK != 0;
                if let Some(stamp) = change(bucket.tail[slot] as u8).filter(|_| is_used) {
                    bucket.tail[slot] = bucket.tail[slot] & !0xff | u32::from(stamp);
                }
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.buckets.clear();
        self.entries = 0;
        self.holdings = Holdings::default();
    }

    /// Drops entries whose position is not wanted; for loading a checkpoint, and for a segment
    /// whose records cannot be read. Cost: the whole table.
    pub fn retain(&mut self, mut keep: impl FnMut(&Entry) -> bool) -> usize {
        let mut dropped = 0;
        for bucket in 0..self.buckets.len() {
            for slot in 0..SLOTS {
                let at = SlotRef { bucket, slot };
                if self.buckets[bucket].word[slot] & POSITION_MASK != 0 && !keep(&self.entry(at)) {
                    self.clear_slot(at);
                    dropped += 1;
                }
            }
        }
        dropped
    }

    /// Begins a snapshot: every bucket, in order, is to be taken by
    /// [`take_bucket`](Self::take_bucket). One under way is forgotten.
    pub(crate) fn begin_snapshot(&mut self) {
        self.snapshot = Some(Snapshot::default());
    }

    /// The snapshot is complete, or given up.
    pub(crate) fn end_snapshot(&mut self) {
        self.snapshot = None;
    }

    /// The next bucket for the snapshot under way: every entry that was there when it began and
    /// that nothing was recorded of since is in it once, however entries move meanwhile.
    pub(crate) fn take_bucket(&mut self, number: usize) -> [u8; BUCKET_BYTES] {
        let mut bucket = self.buckets[number];
        if let Some(snapshot) = &mut self.snapshot {
            for slot in 0..SLOTS {
                if let Some(instead) = snapshot.take(SlotRef {
                    bucket: number,
                    slot,
                }) {
                    let (check, word, tail, length, kind, tenant) = instead;
                    (bucket.check[slot], bucket.word[slot]) = (check, word);
                    bucket.tail[slot] = tail;
                    bucket.set_length(slot, length);
                    bucket.set_kind(slot, kind);
                    bucket.set_tenant(slot, tenant);
                }
            }
            snapshot.taken = number + 1;
        }
        Self::encode_bucket(&bucket)
    }

    /// The bucket as a checkpoint stores it.
    #[must_use]
    pub fn bucket_bytes(&self, bucket: usize) -> [u8; BUCKET_BYTES] {
        Self::encode_bucket(&self.buckets[bucket])
    }

    fn encode_bucket(bucket: &Bucket) -> [u8; BUCKET_BYTES] {
        let mut out = [0_u8; BUCKET_BYTES];
        for slot in 0..SLOTS {
            out[slot * 8..][..8].copy_from_slice(&bucket.check[slot].to_le_bytes());
            out[24 + slot * 8..][..8].copy_from_slice(&bucket.word[slot].to_le_bytes());
            out[48 + slot * 4..][..4].copy_from_slice(&bucket.tail[slot].to_le_bytes());
        }
        out[60..].copy_from_slice(&bucket.lengths.to_le_bytes());
        out
    }

    /// Puts a bucket of a checkpoint back.
    pub fn set_bucket_bytes(&mut self, bucket: usize, bytes: &[u8; BUCKET_BYTES]) {
        let eight =
            |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let mut fresh = Bucket::default();
        for slot in 0..SLOTS {
            fresh.check[slot] = eight(slot * 8);
            fresh.word[slot] = eight(24 + slot * 8);
            fresh.tail[slot] =
                u32::from_le_bytes(bytes[48 + slot * 4..][..4].try_into().expect("four bytes"));
        }
        fresh.lengths = u32::from_le_bytes(bytes[60..].try_into().expect("four bytes"));
        let used = |bucket: &Bucket| (0..SLOTS).filter(|slot| bucket.is_used(*slot)).count();
        self.entries = self.entries + used(&fresh) - used(&self.buckets[bucket]);
        let slots = (0..SLOTS).map(|slot| SlotRef { bucket, slot });
        slots.clone().for_each(|at| self.uncount(at));
        self.buckets[bucket] = fresh;
        slots
            .filter(|at| fresh.is_used(at.slot))
            .for_each(|at| self.count(at));
    }
}

#[cfg(test)]
mod tests;
