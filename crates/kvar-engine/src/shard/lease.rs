//! Promises: blocks that somebody was told of stay readable until the promise ends.
//!
//! ```text
//!  lease ── visible? in order ── budget? ──> pinned ── release, time over ──> as any other block
//!             │ no: it ends here    │ no          └── removed, purged, corrupt ──> lost, counted
//!             └─────────────────────┴──> fewer are promised
//! ```
//!
//! | what could take it | pinned |
//! |---|---|
//! | eviction from memory | the only copy stays; one with a copy on the device may go |
//! | reclaim of its segment | always written on |
//! | another block's index entry | takes another place, or stays in memory alone |
//! | its time to live | waits for the end of the lease |
//! | remove, purge, bytes that fail their check | win |
//!
//! What must always be true: what is promised stays a hit for as long as was said, but for the last
//! row; memory and device go on taking new blocks whatever is leased.
//!
//! Left to others: counting and budgets (`leases`).

use super::types::{LeaseGrant, LeaseRequest};
use super::{Shard, Touch};
use crate::dram::State;
use crate::leases::{Charge, LEASE_MAX, Wanted};
use crate::shard::write::stored_bytes;
use kvar_base::{BlockId, LeaseToken, MissReason, Moment};
use std::ops::Range;
use std::time::Duration;

impl Shard {
    pub(crate) fn lease(&mut self, now: Moment, request: &LeaseRequest<'_>) -> LeaseGrant {
        let until = now.after(request.ttl.min(LEASE_MAX));
        let mut grant = LeaseGrant {
            leading: 0,
            gaps: Vec::new(),
            reason: None,
            until,
        };
        self.counters.lookups += request.ids.len() as u64;
        if request.ids.is_empty() {
            return grant;
        }
        let blocks = request.places.blocks(request.ids.len());
        self.arrivals.expect_blocks(request.request, blocks);
        let known = self.leases.renew(request.token, until).is_some();
        if !self.leases.begin(request.token, request.client, until) {
            self.counters.leases_refused += 1;
            grant.reason = Some(MissReason::Overloaded);
            return grant;
        }
        for (at, id) in request.ids.iter().enumerate() {
            let touch = Touch {
                request: request.request,
                depth: request.places.depth(at),
            };
            if let Err(reason) = self.touch(now, id, touch) {
                if request.over_gaps && reason == MissReason::Absent {
                    grant.gaps.push(grant.leading);
                    grant.leading += 1;
                    continue;
                }
                grant.reason = Some(reason);
                break;
            }
            self.counters.lookup_hits += 1;
            if !self.pin(request.token, id) {
                self.counters.leases_cut_short += 1;
                grant.reason = Some(MissReason::Overloaded);
                break;
            }
            grant.leading += 1;
        }
        self.arrivals.looked_up(request.request);
        let promised = u64::from(grant.leading) - grant.gaps.len() as u64;
        self.counters.leased_blocks += promised;
        if promised > 0 {
            self.counters.leases_granted += u64::from(!known);
        } else if !known {
            self.leases.end(&self.segments, request.token);
        }
        grant
    }

    fn pin(&mut self, token: LeaseToken, id: &BlockId) -> bool {
        let place = self
            .find(id)
            .map(|(_, entry)| (entry.position, stored_bytes(entry.len)));
        let resident = self
            .dram
            .get(id)
            .map(|resident| (resident.state, resident.image.padded_len() as u64));
        // A clean copy whose entry had to make room for another is the only one.
        if place.is_none() && matches!(resident, Some((State::Clean, _))) {
            self.dram.set_state(id, State::Held);
        }
        let charge = match (place, resident) {
            (Some((_, bytes)), None | Some((State::Clean, _))) => Charge::Flash(bytes),
            (_, Some((_, bytes))) => Charge::Dram(bytes),
            (None, None) => return false,
        };
        let place = place.filter(|_| matches!(charge, Charge::Flash(_)));
        if place.is_some() && !self.may_stay(id) {
            return false;
        }
        let wanted = Wanted {
            id: *id,
            charge,
            place,
        };
        let pinned = self.leases.pin(&self.segments, token, wanted);
        if pinned {
            self.dram.set_leased(id, true);
            self.keep_promised(id);
        }
        pinned
    }

    /// Lets a lease last `ttl` from now; until when it does, or `None`: it has ended.
    pub(crate) fn renew(
        &mut self,
        now: Moment,
        token: LeaseToken,
        ttl: Duration,
    ) -> Option<Moment> {
        let until = self.leases.renew(token, now.after(ttl.min(LEASE_MAX)));
        self.counters.leases_renewed += u64::from(until.is_some());
        until
    }

    /// Ends a lease; whether there was one.
    pub(crate) fn release(&mut self, token: LeaseToken) -> bool {
        let ended = self.end_lease(token);
        self.counters.leases_released += u64::from(ended);
        ended
    }

    /// Takes blocks out of a lease that nobody can use: they lie behind one that is not promised.
    pub(crate) fn release_some(&mut self, token: LeaseToken, ids: &[BlockId]) {
        for id in self.leases.end_some(&self.segments, token, ids) {
            self.dram.set_leased(&id, false);
        }
    }

    fn end_lease(&mut self, token: LeaseToken) -> bool {
        let Some(free) = self.leases.end(&self.segments, token) else {
            return false;
        };
        for id in free {
            self.dram.set_leased(&id, false);
        }
        true
    }

    /// Ends leases whose time is over.
    pub(super) fn end_leases(&mut self, now: Moment) {
        while let Some(token) = self.leases.due(now) {
            self.end_lease(token);
            self.counters.leases_expired += 1;
        }
    }

    /// Index entries that led to these positions are gone, and with them what was promised there.
    pub(super) fn lose_strayed_leases(&mut self, positions: Range<u32>) {
        for id in self.leases.at(&positions) {
            if self.find(&id).is_some() {
                continue;
            }
            match self.dram.get(&id).map(|resident| resident.state) {
                // The copy in memory is the last.
                Some(State::Clean) => self.dram.set_state(&id, State::Held),
                Some(_) => {}
                None => self.counters.leased_dropped += u64::from(self.lose_lease(&id)),
            }
        }
    }

    /// Blocks were purged: how many of them were promised.
    pub(super) fn lose_purged_leases(&mut self) -> u64 {
        let mut lost = 0;
        for id in self.leases.promised() {
            if self.find(&id).is_none() && self.dram.get(&id).is_none() {
                lost += u64::from(self.lose_lease(&id));
            }
        }
        lost
    }

    /// A block is gone although it was promised; says whether it was.
    pub(super) fn lose_lease(&mut self, id: &BlockId) -> bool {
        let lost = self.leases.lost(&self.segments, id);
        if lost {
            self.dram.set_leased(id, false);
        }
        lost
    }
}
