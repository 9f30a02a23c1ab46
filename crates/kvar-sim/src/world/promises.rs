//! Leases and time: what is promised, what is over, and clocks that are set.
//!
//! What must always be true: what is promised is there until the lease ends, unless it was removed,
//! its bytes are gone, or there was nowhere to carry it; the store counts each of these. Budgets
//! hold, and what has room in them is not refused.

use super::{Step, World, wrong};
use crate::model::{Now, Presence};
use crate::payload;
use crate::promises::{Charge, Reason};
use kvar_base::{BlockId, LeaseToken, MissReason, Moment};
use kvar_engine::{LEASE_MAX, LeaseRequest, Places};
use std::time::Duration;

/// Part of the payload of a segment that is reclaimed soon that may be newly promised, in percent.
const SEGMENT_PERCENT: u64 = 60;

fn token_of(token: u64) -> LeaseToken {
    let mut bytes = [0x5a; 16];
    bytes[..8].copy_from_slice(&token.to_le_bytes());
    LeaseToken::new(bytes)
}

impl World {
    /// Seconds since 1970.
    pub(crate) fn unix_s(&self) -> u64 {
        self.unix_at_start_s + self.now.0 / 1_000_000
    }

    /// The machine's clock is set.
    pub(crate) fn set_wall_clock(&mut self, unix_s: u64) -> Step {
        self.note(format!("the clock is set to {unix_s}"));
        self.tally.count(if unix_s < self.unix_s() {
            "clock/set back"
        } else {
            "clock/set forward"
        });
        let now = self.now;
        self.unix_at_start_s = unix_s.saturating_sub(now.0 / 1_000_000);
        self.model.unix_s = self.unix_s();
        self.engine().set_wall_clock(now, unix_s);
        self.hear()
    }

    /// Asks for a promise of blocks, in this order.
    pub(crate) fn lease(
        &mut self,
        token: u64,
        client: u64,
        numbers: &[u64],
        ttl: Duration,
    ) -> Step {
        let ids: Vec<BlockId> = numbers.iter().map(|number| self.id(*number)).collect();
        let request = LeaseRequest {
            ids: &ids,
            token: token_of(token),
            client,
            ttl,
            request: 0,
            places: Places::default(),
            over_gaps: false,
        };
        let now = self.now;
        let grant = self.engine().lease(now, &request);
        self.note(format!(
            "lease {token} of client {client} on {numbers:?} for {ttl:?} -> {grant:?}"
        ));
        let until = now.after(ttl.min(LEASE_MAX));
        if grant.until != until {
            return wrong(format!("a lease until {until:?} is granted as {grant:?}"));
        }
        let leading = grant.leading as usize;
        if leading > numbers.len() || (grant.reason.is_none() && leading < numbers.len()) {
            return wrong(format!("a lease on {} blocks is {grant:?}", numbers.len()));
        }
        let foreign = self
            .model
            .promises
            .client_of(token)
            .is_some_and(|owner| owner != client);
        // About no block nothing is said, not even about the lease.
        if numbers.is_empty() {
            return self.hear();
        }
        // Whoever has the token may let the lease last longer, also where it may not add to it.
        self.model.promises.renew(token, until);
        let mut blocks = Vec::new();
        for number in &numbers[..leading] {
            let presence = self.model.presence(*number);
            let there = matches!(presence, Presence::There | Presence::ThereOrOver);
            if !there && !self.is_unknown(*number) {
                let block = self.model.block(*number);
                return wrong(format!(
                    "block {number} is promised and is {presence:?}: {block:?}"
                ));
            }
            let (charge, bytes) = self.charge_of(*number);
            blocks.push((*number, charge, bytes));
        }
        self.model.promises.grant(token, client, until, &blocks);
        self.tally.add("lease/promised blocks", leading as u64);
        if let Some(next) = numbers.get(leading) {
            self.judge_refusal(client, *next, grant.reason, foreign)?;
        }
        self.check_promises()?;
        self.hear()
    }

    fn judge_refusal(
        &mut self,
        client: u64,
        number: u64,
        reason: Option<MissReason>,
        foreign: bool,
    ) -> Step {
        let presence = self.model.presence(number);
        let (charge, bytes) = self.charge_of(number);
        let deserved = self.is_unknown(number)
            || match reason {
                Some(MissReason::Absent) => presence == Presence::Absent,
                Some(MissReason::Expired) => {
                    matches!(presence, Presence::Over | Presence::ThereOrOver)
                }
                Some(MissReason::Overloaded) => {
                    foreign
                        || self.model.promises.vague
                        || !self.model.promises.has_room(
                            client,
                            number,
                            charge,
                            bytes,
                            self.store_bytes(),
                        )
                        || charge == Charge::Device && self.segment_is_promised(number, bytes)
                        // On its way down, and there is no room to write it on.
                        || charge == Charge::Device && self.below.is_some()
                }
                _ => false,
            };
        self.tally.count(&match reason {
            Some(reason) => format!("lease/ends at a block, {reason}"),
            None => "lease/ends at a block".to_owned(),
        });
        if !deserved {
            let totals = self.model.promises.totals();
            return wrong(format!(
                "block {number} is not promised, {reason:?}, and is {presence:?}; promised so far: {totals:?}"
            ));
        }
        Ok(())
    }

    /// Whether a segment holds so much that is promised that more of it need not be.
    fn segment_is_promised(&self, number: u64, bytes: u64) -> bool {
        let segment = |number: u64| {
            let position = self.model.blocks.get(&number)?.position?;
            Some(position / self.superblock.segment_pages())
        };
        let Some(this) = segment(number) else {
            return true;
        };
        let promised: u64 = self
            .model
            .promises
            .promised()
            .filter(|(other, _)| segment(*other).is_none_or(|other| other == this))
            .map(|(_, bytes)| bytes)
            .sum();
        promised + bytes > self.superblock.payload_bytes() / 100 * SEGMENT_PERCENT
    }

    /// What a promise of this block costs. Where several puts may be meant it is not known.
    fn charge_of(&mut self, number: u64) -> (Charge, u64) {
        let unknown = self.is_unknown(number);
        let block = self.model.block(number);
        let charge = if block.on_device {
            Charge::Device
        } else {
            Charge::Memory
        };
        let put = match &block.now {
            Now::Known(nonce) => block.put(*nonce),
            Now::OneOf(nonces) if nonces.len() == 1 => block.put(nonces[0]),
            _ => None,
        };
        let bytes = put.map(|put| payload::stored_bytes(&put.lengths));
        self.model.promises.vague |= unknown || bytes.is_none() && block.is_visible();
        (charge, bytes.unwrap_or(0))
    }

    /// Bytes of memory and of the device that a tenth is of.
    fn store_bytes(&self) -> (u64, u64) {
        let segments = u64::from(self.superblock.segments_per_shard);
        let device = segments * self.superblock.payload_bytes();
        (self.config.dram_bytes, device)
    }

    pub(crate) fn renew(&mut self, token: u64, ttl: Duration) -> Step {
        let now = self.now;
        let renewed = self.engine().renew(now, token_of(token), ttl);
        self.note(format!("renew {token} for {ttl:?} -> {renewed:?}"));
        let expected = self
            .model
            .promises
            .renew(token, now.after(ttl.min(LEASE_MAX)));
        if renewed != expected {
            return wrong(format!(
                "lease {token} is renewed until {renewed:?}, and should last until {expected:?}"
            ));
        }
        self.tally.count(if renewed.is_some() {
            "lease/renewed"
        } else {
            "lease/renewed too late"
        });
        self.hear()
    }

    pub(crate) fn release(&mut self, token: u64) -> Step {
        let ended = self.engine().release(token_of(token));
        self.note(format!("release {token} -> {ended}"));
        if self.model.promises.end(token) != ended {
            return wrong(format!("release of lease {token} says {ended}"));
        }
        self.tally.add("lease/released", u64::from(ended));
        self.check_promises()?;
        self.hear()
    }

    /// A block left: it must not have been promised, or for a reason that counts.
    pub(super) fn hear_left(&mut self, number: u64, excuse: Option<Reason>) -> Step {
        let gone = self.model.presence(number) == Presence::Absent;
        if !gone || self.is_unknown(number) || self.model.lenient {
            return Ok(());
        }
        match excuse {
            None if self.model.promises.holds(number) => {
                let block = self.model.block(number);
                wrong(format!(
                    "block {number} was promised and is gone: {block:?}"
                ))
            }
            None => Ok(()),
            Some(why) => {
                if self.model.promises.lose(number, why) {
                    self.tally.count(match why {
                        Reason::Removed => "lease/lost, removed",
                        Reason::Corrupt => "lease/lost, corrupt",
                        Reason::Dropped => "lease/lost, dropped",
                    });
                }
                Ok(())
            }
        }
    }

    /// Budgets hold, and the store counts as the oracle does.
    pub(super) fn check_promises(&mut self) -> Step {
        let promises = &self.model.promises;
        if promises.vague || self.harm.history_lost || self.model.lenient {
            return Ok(());
        }
        if let Some(beyond) = promises.beyond(self.store_bytes()) {
            return wrong(beyond);
        }
        let (expected, lost) = (promises.totals(), promises.lost);
        let now = self.now;
        let status = self.engine().status(now);
        let counted = (
            status.leases,
            status.leased_blocks,
            (status.leased_dram_bytes, status.leased_flash_bytes),
        );
        if counted != expected {
            return wrong(format!("leases are {expected:?}, and counted {counted:?}"));
        }
        let of = |counted: u64, known: u64| (known..=known + lost.unsure).contains(&counted);
        let counters = &status.counters;
        let right = of(counters.leased_removed, lost.removed)
            && of(counters.leased_corrupt, lost.corrupt)
            && of(counters.leased_dropped, lost.dropped);
        if !right {
            return wrong(format!(
                "promises broken are {lost:?}, and counted {} removed, {} corrupt, {} dropped",
                counters.leased_removed, counters.leased_corrupt, counters.leased_dropped
            ));
        }
        Ok(())
    }

    /// Blocks that are there from a number on, for a lease that finds something.
    pub(crate) fn some_that_are_there(&self, from: u64, count: usize) -> Vec<u64> {
        let known: Vec<u64> = self
            .model
            .blocks
            .range(from..)
            .map(|(n, _)| *n)
            .take(200)
            .collect();
        known
            .into_iter()
            .filter(|number| self.model.presence(*number) == Presence::There)
            .take(count)
            .collect()
    }

    /// How long until the next moment at which something may be over is left to the dice; this is
    /// when blocks put now with this time to live are.
    pub(super) fn expiry(&self, now: Moment, ttl_s: Option<u32>) -> u64 {
        ttl_s.map_or(0, |ttl_s| {
            let begun = self.unix_at_start_s + now.0.div_ceil(1_000_000);
            (begun + u64::from(ttl_s)).min(u64::from(u32::MAX))
        })
    }
}
