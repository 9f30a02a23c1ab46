//! What is there: lookups, what is said of one block, and the touch by which a call uses what it finds.

use super::Shard;
use super::types::{BlockStat, Places, Tier, Touch};
use crate::dram::State;
use crate::index::{Entry, SlotRef};
use kvar_base::{BlockId, MissReason, Moment, page_round_up};

impl Shard {
    pub(crate) fn lookup(
        &mut self,
        now: Moment,
        ids: &[BlockId],
        places: Places<'_>,
        request: u64,
    ) -> Vec<bool> {
        self.arrivals
            .expect_blocks(request, places.blocks(ids.len()));
        let mut found = Vec::with_capacity(ids.len());
        self.index.find_all(ids, &mut found);
        let present: Vec<bool> = (ids.iter().zip(found).enumerate())
            .map(|(at, (id, found))| {
                let depth = places.depth(at);
                let touch = Touch { request, depth };
                self.touch_found(now, id, found, touch).is_ok()
            })
            .collect();
        self.arrivals.looked_up(request);
        self.counters.lookups += ids.len() as u64;
        self.counters.lookup_hits += present.iter().filter(|present| **present).count() as u64;
        present
    }

    pub(crate) fn stat(&self, now: Moment, id: &BlockId) -> Option<BlockStat> {
        let entry = self.index.find(id).map(|(_, entry)| entry);
        let resident = self.dram.get(id);
        let expires = match (resident, &entry) {
            (Some(resident), _) => resident.hints.expires_unix_s,
            (None, Some(entry)) => self.flash_expiry(entry),
            (None, None) => return None,
        };
        if self.is_over(now, id, expires) {
            return None;
        }
        let tier = match (resident, entry) {
            (None, None) => return None,
            (Some(_), None) => Tier::Dram,
            (None, Some(_)) => Tier::Flash,
            (Some(_), Some(_)) => Tier::DramAndFlash,
        };
        let stored = resident.map_or_else(
            || entry.map_or(0, |entry| page_round_up(u64::from(entry.len))),
            |resident| resident.image.padded_len() as u64,
        );
        Some(BlockStat {
            tier,
            stored_bytes: stored,
            sections: resident.map(|resident| resident.sections.len() as u16),
            version: resident.map(|resident| resident.version),
            flushed: entry.is_some()
                && resident
                    .is_none_or(|resident| !self.unflushed.puts.contains_key(&resident.number)),
            expires_unix_s: (expires != 0).then_some(u64::from(expires)),
        })
    }

    /// Whether a block is visible, and if not why; refreshes it.
    pub(super) fn touch(
        &mut self,
        now: Moment,
        id: &BlockId,
        touch: Touch,
    ) -> Result<(), MissReason> {
        let found = self.index.find(id);
        self.touch_found(now, id, found, touch)
    }

    /// As [`touch`](Self::touch), of what the index was found to hold.
    pub(super) fn touch_found(
        &mut self,
        now: Moment,
        id: &BlockId,
        found: Option<(SlotRef, Entry)>,
        touch: Touch,
    ) -> Result<(), MissReason> {
        let expires = match (self.dram.get(id), &found) {
            (Some(resident), _) => resident.hints.expires_unix_s,
            (None, Some((_, entry))) => self.flash_expiry(entry),
            (None, None) => {
                self.note_missed(id);
                return Err(MissReason::Absent);
            }
        };
        if self.is_over(now, id, expires) {
            return Err(MissReason::Expired);
        }
        if touch != Touch::NONE && !self.arrivals.has_looked_up(touch.request) {
            let blocks = self.arrivals.blocks(touch.request, touch.depth);
            let bytes = self.use_block(id, found, touch, blocks);
            self.keep.demanded(bytes);
        }
        Ok(())
    }

    /// A visible block is used by a request of so many blocks; its bytes, for the clock.
    fn use_block(
        &mut self,
        id: &BlockId,
        found: Option<(SlotRef, Entry)>,
        touch: Touch,
        blocks: u32,
    ) -> u64 {
        let resident = self.dram.get(id).map(|resident| {
            let bytes = resident.image.padded_len() as u64;
            let tenant = resident.hints.tenant;
            (resident.class, tenant, resident.state, bytes)
        });
        let before = resident.map(|(class, tenant, ..)| (class, tenant));
        let before = before.or(found.map(|(_, entry)| (entry.class(), entry.tenant)));
        if resident.is_some_and(|(.., state, _)| state == State::Awaited) {
            self.touch_awaited(id, touch);
        } else if let Some((before, tenant)) = before {
            let class = self.used(id, tenant, before, blocks);
            if let Some((at, _)) = found {
                self.index.touch(at, self.keep.stamp(), class);
            }
            if resident.is_some() {
                let arrival = self.arrivals.number(touch.request);
                let now = self.keep.demand_bytes();
                self.dram.touch(id, arrival, touch.depth, class, now);
            }
        }
        match (found, resident) {
            (Some((_, entry)), _) => Self::demand_of(&entry),
            (None, Some((.., bytes))) => bytes,
            (None, None) => 0,
        }
    }

    /// Whether a block is visible, and if not why.
    pub(super) fn visible(&self, now: Moment, id: &BlockId) -> Result<(), MissReason> {
        let expires = match (self.dram.get(id), self.index.find(id)) {
            (Some(resident), _) => resident.hints.expires_unix_s,
            (None, Some((_, entry))) => self.flash_expiry(&entry),
            (None, None) => return Err(MissReason::Absent),
        };
        if self.is_over(now, id, expires) {
            return Err(MissReason::Expired);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Index;
    use crate::layout::{PAGE, Superblock};
    use crate::shard::EngineConfig;
    use kvar_base::DeviceUuid;
    use kvar_io::Arena;

    /// A prompt looks its chain up, gets what is there and puts the rest: one use of every block,
    /// not two. The policy, and the model that the planner replays, count requests.
    #[test]
    fn the_calls_of_one_request_count_as_one_touch() {
        let uuid = DeviceUuid::new([1; 16]);
        let superblock = Superblock::plan(16 << 20, 1, 65536, uuid, [2; 16], 0).unwrap();
        let index = Index::new(superblock.buckets, 0);
        let config = EngineConfig::default();
        let arena = Arena::new(PAGE).unwrap();
        let mut shard = Shard::new(&superblock, 0, config, arena, index);
        let id = BlockId::new([7; 32]);
        let entry = Entry {
            check64: 1,
            position: 9,
            len: 10,
            sectioned: false,
            touched: false,
            frequency: 0,
            length: 0,
            kind: 0,
            stamp: 0,
            tenant: kvar_policy::Tenant::DEFAULT,
        };
        let age = shard.age();
        shard.index.insert(&id, &entry, age);
        let frequency = |shard: &Shard| shard.find(&id).unwrap().1.frequency;
        let touch = |request| Touch { request, depth: 0 };
        let now = Moment(1);
        shard.lookup(now, &[id], Places::default(), 5);
        shard.touch(now, &id, touch(5)).unwrap();
        shard.lookup(now, &[id], Places::default(), 5);
        assert_eq!(frequency(&shard), 1);
        shard.lookup(now, &[id], Places::default(), 6);
        shard.touch(now, &id, touch(6)).unwrap();
        assert_eq!(frequency(&shard), 2);
        // Calls that name no request stand for themselves; so does a get without a lookup.
        shard.touch(now, &id, touch(0)).unwrap();
        assert_eq!(frequency(&shard), 3);
        shard.index.insert(&id, &entry, |age| age);
        shard.touch(now, &id, touch(7)).unwrap();
        assert_eq!(frequency(&shard), 1);
        assert!(shard.find(&id).unwrap().1.touched);
    }
}
