//! Which blocks of the segment are kept, which go down, which go.
//!
//! Of several tenants those within their parts keep what they have, whatever it is worth (`Losses`
//! of kvar-policy). While the write budget is short, what memory holds as well is not written
//! again: it is decided about when it leaves memory.

use super::Stage;
use crate::dram::State;
use crate::index::Entry;
use crate::layout::{RECORD_BLOCK, RecordHints};
use crate::shard::{Displaced, Shard};
use kvar_base::{BlockId, PAGE_BYTES};
use kvar_policy::Losses;
use std::cmp::Reverse;
use std::collections::HashSet;

impl Shard {
    /// Says which blocks are kept, once there is a segment for them to go to; right after a start
    /// on a full device there is none, and none to come.
    pub(super) fn decide(&mut self) {
        let decides = self
            .reclaim
            .as_ref()
            .is_some_and(|reclaim| matches!(reclaim.stage, Stage::Deciding));
        if !decides || self.segments.open.is_none() && !self.segments.is_exhausted() {
            return;
        }
        let Some(mut reclaim) = self.reclaim.take() else {
            return;
        };
        let segment = reclaim.segment;
        let mut live = Vec::new();
        let mut seen = HashSet::new();
        for record in std::mem::take(&mut reclaim.records) {
            if record.kind != RECORD_BLOCK {
                continue;
            }
            let position = self.segments.position(segment, record.place.get());
            if let Some((_, entry)) = self.find(&record.id())
                && entry.position == position
                && seen.insert(position)
            {
                live.push((record.id(), entry, record.hints()));
            }
        }
        if !reclaim.whole {
            // Of what is promised the lease knows the id, whatever became of its record.
            let positions = self.positions_of(segment);
            for id in self.leases.at(&positions) {
                if let Some((_, entry)) = self.find(&id)
                    && positions.contains(&entry.position)
                    && seen.insert(entry.position)
                {
                    let hints = RecordHints {
                        expires_unix_s: self.flash_expiry(&entry),
                        tenant: entry.tenant,
                        ..RecordHints::default()
                    };
                    live.push((id, entry, hints));
                }
            }
        }
        if !reclaim.whole {
            // What the records do not name goes now, before somebody is promised it.
            self.drop_strays(segment, &seen);
        }
        let opened_at = self.segments.get(segment).opened_at;
        self.keep.set_oldest(opened_at);
        let costs = |(_, entry, hints): &(_, Entry, RecordHints)| {
            (hints.recompute_us, Self::demand_of(entry))
        };
        self.keep.remind_of_costs(live.iter().map(costs));
        let mut live: Vec<_> = live
            .into_iter()
            .map(|(id, entry, hints)| {
                let worth = self.worth_of(&entry, &hints);
                (
                    self.leases.holds(&id),
                    worth,
                    Reverse(hints.depth),
                    id,
                    entry,
                    hints,
                )
            })
            .collect();
        // What is promised goes on before anything else, as far as there is room at all; then what
        // is worth most, of equals the head.
        live.sort_by(|a, b| {
            (b.0.cmp(&a.0))
                .then(b.1.total_cmp(&a.1))
                .then(b.2.cmp(&a.2))
                .then(a.3.cmp(&b.3))
        });
        (reclaim.left_bytes, reclaim.left_blocks) = (0, 0);
        let (most, room) = self.room_for_kept();
        // Nobody's promise is broken where nothing is promised.
        let has_leased = live.first().is_some_and(|(leased, ..)| *leased);
        let entitled_most = if has_leased { most } else { room };
        let records_max = self.records_for_kept();
        let time = Self::budget_time(self.now);
        let has_room = self.budget.has_room(0, time);
        let has_plenty = self.budget.has_plenty(0, time);
        live.retain(|(_, _, _, id, entry, hints)| {
            let is_over = self.is_over(self.now, id, hints.expires_unix_s);
            if is_over {
                self.drop_expired(id, entry.position);
            }
            !is_over
        });
        let held = self.index.holdings();
        let mut losses = Losses::new(&self.config.shares, self.capacity_bytes(), held);
        for (.., entry, _) in &live {
            losses.announce(entry.tenant, entry.stored_bytes());
        }
        self.keep.keeper_mut().begin_reclaim();
        let is_late = self.below_is_late();
        for (_, worth, _, id, entry, hints) in live {
            let leased = self.leases.protects(&id);
            let bytes = entry.stored_bytes();
            let entitled = losses.is_entitled(entry.tenant, bytes);
            // While the budget is short, memory keeps for a time what it holds, too; not at the end
            // of the process.
            let waits = !has_plenty
                && self.shutdown.is_none()
                && self
                    .dram
                    .get(&id)
                    .is_some_and(|resident| resident.state == State::Clean);
            let after = reclaim.left_bytes + bytes;
            let keeps = if reclaim.left_blocks >= records_max {
                false
            } else if leased {
                after <= room
            } else if entitled {
                has_room && after <= entitled_most && self.keep.keeper_mut().keeps_entitled(bytes)
            } else {
                // What was to be read once, a turnover ago, nobody waits for any more.
                let is_wanted = !waits && !hints.handover && has_room && after <= most;
                is_wanted && self.keep.keeper_mut().keeps(worth, bytes)
            };
            if keeps {
                self.budget.spend(bytes);
                reclaim.keep(id, entry, hints, bytes);
                self.by_tenant[entry.tenant.index()].kept_entitled += u64::from(entitled);
            } else if self.goes_down(&id, &hints) {
                if is_late {
                    self.drop_late(&id, &entry, &hints);
                } else {
                    reclaim.descent.waiting.push_back((id, entry, hints));
                }
            } else {
                losses.lost(entry.tenant, bytes);
                self.index.remove_at(&id, entry.position);
                self.note_displaced(&id, entry.position, Displaced::Reclaim);
                let state = if waits { State::Held } else { State::Volatile };
                self.drop_flash_copy(&id, &entry, &hints, state);
            }
        }
        self.keep.end_reclaim();
        reclaim.stage = Stage::Moving;
        self.reclaim = Some(reclaim);
    }

    /// Blocks for which there is a record: tombstones may have taken those of the open segment.
    pub(in crate::shard) fn records_for_kept(&self) -> usize {
        let next = self.segments.prepared.is_some() || self.segments.preparing.is_some();
        match &self.segments.open {
            Some(_) if next => usize::MAX,
            Some(open) => open.records_left(),
            None => 0,
        }
    }

    /// Bytes of what is kept that there is room for, of what nobody was promised and of all: with no
    /// segment open (right after a start on a full device) there is nowhere to go.
    pub(in crate::shard) fn room_for_kept(&self) -> (u64, u64) {
        let Some(open) = &self.segments.open else {
            return (0, 0);
        };
        // Another one may be on its way already: then what does not fit here goes there.
        let next = self.segments.prepared.is_some() || self.segments.preparing.is_some();
        let left = u64::from(open.pages_left()) * PAGE_BYTES;
        let more = if next {
            self.superblock.payload_bytes()
        } else {
            0
        };
        let room = left + more;
        // Some is lost at the borders of directory areas, and what is in memory goes before what must
        // be read: blocks that nobody was promised leave that much free for those that were.
        (room / 8 * 7, room)
    }

    /// Reclaim gave up the copy on the device, with its record, which says `hints`; one in memory is the
    /// last, and in this state now.
    pub(in crate::shard) fn drop_flash_copy(
        &mut self,
        id: &BlockId,
        entry: &Entry,
        hints: &RecordHints,
        state: State,
    ) {
        if self
            .dram
            .get(id)
            .is_some_and(|resident| resident.state == State::Clean)
        {
            let cost = self.keep.cost(hints.recompute_us, Self::demand_of(entry));
            self.dram.set_hints(id, hints, cost);
            self.dram.set_state(id, state);
            self.counters.reclaim_to_memory += 1;
        } else {
            self.counters.reclaim_dropped += 1;
        }
        if self.dram.get(id).is_none() {
            self.by_tenant[entry.tenant.index()].evicted += 1;
            self.let_go(id, entry.class());
            self.counters.leased_dropped += u64::from(self.lose_lease(id));
        }
    }
}
