//! Who was promised which blocks, until when, and how much of the store that takes.
//!
//! ```text
//!   token ──> Lease: client, ids, until            by_end: (until, token), the next to end first
//!                      │
//!   id ────> Pin: clients x times, charge, place    one a block, however many leases hold it
//!                      │
//!   client ─> Share: bytes of memory, of the device, references
//! ```
//!
//! A lease pins bytes, not a place. What a block is charged to is decided when it is pinned first:
//! the device if a copy is there, else memory. A block counts once in all and once a client,
//! however many leases hold it, so that a prefix which a thousand prompts share costs what it
//! weighs.
//!
//! What must always be true: what is pinned stays below the budgets, and of a segment that is
//! reclaimed soon below what reclaim can carry on at a gain, so that leases never stop a store; every lease ends by itself; a pin that
//! is lost (removed, purged, corrupt) leaves nothing behind in any count.
//!
//! Left to others: what a pin means for eviction (`dram`, `index`, `shard/reclaim`), time, and who
//! may ask (the token is the caller's: drawn at random, it is the only proof there is).

use crate::mutation::{Check, is_disabled};
use crate::segments::Segments;
use kvar_base::FastMap;
use kvar_base::{BlockId, LeaseToken, Moment};
use smallvec::SmallVec;
use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

/// The longest a lease may last without being renewed: what an engine that died costs at most.
pub const LEASE_MAX: Duration = Duration::from_secs(30);
/// What a lease lasts when nothing else is said: longer than any scheduler takes between its
/// lookup and its loads.
pub const LEASE_DEFAULT: Duration = Duration::from_secs(2);
/// Share of memory, and of the device, that leases may pin, as one part of so many.
const BUDGET_PARTS: u64 = 10;
/// Share of that budget that one client may hold, as one part of so many.
const CLIENT_PARTS: u64 = 4;
/// Ids named by all leases of a shard at most, and leases: at about 48 bytes an id this bounds the
/// lists themselves to some 12 MiB whatever is asked.
const REFERENCES_MAX: usize = 1 << 18;
const LEASES_MAX: usize = 1 << 14;
/// Part of a segment's payload that may be pinned, in hundredths, when the segment is among the
/// next to be reclaimed: reclaim frees something then. (Of a young segment all may be: a long
/// prompt's blocks lie side by side, and its lease ends long before reclaim comes there.)
const SEGMENT_PERCENT: u64 = 60;
/// Which those are: the oldest of the sealed ones, one part of so many.
const OLD_PARTS: usize = 16;

/// What a pinned block is charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Charge {
    Dram(u64),
    Flash(u64),
}

impl Charge {
    fn parts(self) -> (u64, u64) {
        match self {
            Self::Dram(bytes) => (bytes, 0),
            Self::Flash(bytes) => (0, bytes),
        }
    }
}

/// Bytes pinned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Share {
    dram_bytes: u64,
    flash_bytes: u64,
    references: usize,
}

impl Share {
    fn add(&mut self, charge: Charge) {
        let (dram, flash) = charge.parts();
        self.dram_bytes += dram;
        self.flash_bytes += flash;
    }

    fn take(&mut self, charge: Charge) {
        let (dram, flash) = charge.parts();
        self.dram_bytes -= dram;
        self.flash_bytes -= flash;
    }

    fn fits(&self, charge: Charge, limits: &Self) -> bool {
        let (dram, flash) = charge.parts();
        self.dram_bytes + dram <= limits.dram_bytes
            && self.flash_bytes + flash <= limits.flash_bytes
    }
}

struct Pin {
    number: u64,
    charge: Charge,
    /// Place on the device, and bytes there.
    place: Option<(u32, u64)>,
    /// Clients that hold it, and how often.
    holders: SmallVec<[(u64, u32); 2]>,
}

struct Lease {
    client: u64,
    until: Moment,
    /// Blocks, each with the number of the pin it stands for: a block that was removed and put
    /// and leased again is another pin.
    pins: Vec<(BlockId, u64)>,
}

/// Where a block that is to be pinned lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) id: BlockId,
    pub(crate) charge: Charge,
    /// Position on the device and bytes there, if it is there.
    pub(crate) place: Option<(u32, u64)>,
}

/// All leases of a shard.
pub(crate) struct Leases {
    leases: FastMap<LeaseToken, Lease>,
    by_end: BTreeSet<(Moment, LeaseToken)>,
    pins: FastMap<BlockId, Pin>,
    clients: FastMap<u64, Share>,
    /// Positions on the device of what is pinned.
    positions: FastMap<u32, BlockId>,
    /// Bytes pinned in each segment.
    segments: FastMap<u32, u64>,
    all: Share,
    limits: Share,
    segment_bytes_max: u64,
    next_pin: u64,
}

impl Leases {
    pub(crate) fn new(dram_bytes: u64, flash_bytes: u64, segment_payload_bytes: u64) -> Self {
        Self {
            leases: FastMap::default(),
            by_end: BTreeSet::new(),
            pins: FastMap::default(),
            clients: FastMap::default(),
            positions: FastMap::default(),
            segments: FastMap::default(),
            all: Share::default(),
            limits: Share {
                dram_bytes: dram_bytes / BUDGET_PARTS,
                flash_bytes: flash_bytes / BUDGET_PARTS,
                references: REFERENCES_MAX,
            },
            segment_bytes_max: segment_payload_bytes / 100 * SEGMENT_PERCENT,
            next_pin: 1,
        }
    }

    /// Whether a block is pinned.
    pub(crate) fn holds(&self, id: &BlockId) -> bool {
        !self.pins.is_empty() && self.pins.contains_key(id)
    }

    /// Whether reclaim must carry a block on.
    pub(crate) fn protects(&self, id: &BlockId) -> bool {
        self.holds(id) && !is_disabled(Check::Lease)
    }

    /// Whether what lies at this position is pinned, so that its entry may not make room.
    pub(crate) fn holds_position(&self, position: u32) -> bool {
        !self.positions.is_empty()
            && self.positions.contains_key(&position)
            && !is_disabled(Check::Lease)
    }

    /// What is pinned at any of these positions.
    pub(crate) fn at(&self, positions: &Range<u32>) -> Vec<BlockId> {
        let mut ids: Vec<BlockId> = self
            .positions
            .iter()
            .filter(|(position, _)| positions.contains(position))
            .map(|(_, id)| *id)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// Bytes pinned in a segment.
    pub(crate) fn segment_bytes(&self, segment: u32) -> u64 {
        self.segments.get(&segment).copied().unwrap_or(0)
    }

    /// Begins a lease, or lets one that stands last longer. `false` when there are too many.
    pub(crate) fn begin(&mut self, token: LeaseToken, client: u64, until: Moment) -> bool {
        if let Some(lease) = self.leases.get_mut(&token) {
            if lease.client != client {
                return false;
            }
            self.by_end.remove(&(lease.until, token));
            lease.until = lease.until.max(until);
            self.by_end.insert((lease.until, token));
            return true;
        }
        if self.leases.len() >= LEASES_MAX {
            return false;
        }
        let pins = Vec::new();
        self.by_end.insert((until, token));
        self.leases.insert(
            token,
            Lease {
                client,
                until,
                pins,
            },
        );
        true
    }

    /// Pins a block for a lease that [`begin`](Self::begin) began; `false` when a budget is used up.
    pub(crate) fn pin(&mut self, segments: &Segments, token: LeaseToken, wanted: Wanted) -> bool {
        let Some(lease) = self.leases.get_mut(&token) else {
            return false;
        };
        let client = lease.client;
        let share = self.clients.get(&client).copied().unwrap_or_default();
        let client_limits = Share {
            dram_bytes: self.limits.dram_bytes / CLIENT_PARTS,
            flash_bytes: self.limits.flash_bytes / CLIENT_PARTS,
            references: self.limits.references / CLIENT_PARTS as usize,
        };
        if self.all.references >= self.limits.references
            || share.references >= client_limits.references
        {
            return false;
        }
        let known = self.pins.get(&wanted.id);
        let charge = known.map_or(wanted.charge, |pin| pin.charge);
        let mine = known.is_some_and(|pin| pin.holders.iter().any(|(holder, _)| *holder == client));
        if !mine && !share.fits(charge, &client_limits) {
            return false;
        }
        if known.is_none() {
            if !self.all.fits(charge, &self.limits) {
                return false;
            }
            if let Some((position, bytes)) = wanted.place {
                let segment = segments.locate(position).0;
                let pinned = self.segment_bytes(segment);
                if is_old(segments, segment) && pinned + bytes > self.segment_bytes_max {
                    return false;
                }
            }
            self.all.add(charge);
            let number = self.next_pin;
            self.next_pin += 1;
            self.pins.insert(
                wanted.id,
                Pin {
                    number,
                    charge,
                    place: None,
                    holders: SmallVec::new(),
                },
            );
            if let Some((position, bytes)) = wanted.place {
                self.moved(segments, &wanted.id, position, bytes);
            }
        }
        let share = self.clients.entry(client).or_default();
        share.references += 1;
        self.all.references += 1;
        let pin = self.pins.get_mut(&wanted.id).expect("it is pinned by now");
        match pin.holders.iter_mut().find(|(holder, _)| *holder == client) {
            Some((_, times)) => *times += 1,
            None => {
                share.add(charge);
                pin.holders.push((client, 1));
            }
        }
        let number = pin.number;
        if let Some(lease) = self.leases.get_mut(&token) {
            lease.pins.push((wanted.id, number));
        }
        true
    }

    /// A pinned block was written to another place on the device.
    pub(crate) fn moved(&mut self, segments: &Segments, id: &BlockId, position: u32, bytes: u64) {
        if !self.holds(id) {
            return;
        }
        self.leave_place(segments, id);
        if let Some(pin) = self.pins.get_mut(id) {
            pin.place = Some((position, bytes));
            self.positions.insert(position, *id);
            *self
                .segments
                .entry(segments.locate(position).0)
                .or_default() += bytes;
        }
    }

    fn leave_place(&mut self, segments: &Segments, id: &BlockId) {
        let Some((position, bytes)) = self.pins.get_mut(id).and_then(|pin| pin.place.take()) else {
            return;
        };
        self.positions.remove(&position);
        let segment = segments.locate(position).0;
        if let Some(pinned) = self.segments.get_mut(&segment) {
            *pinned -= bytes;
            if *pinned == 0 {
                self.segments.remove(&segment);
            }
        }
    }

    /// A block is gone although it was promised; whether it was.
    pub(crate) fn lost(&mut self, segments: &Segments, id: &BlockId) -> bool {
        if !self.holds(id) {
            return false;
        }
        self.leave_place(segments, id);
        let Some(pin) = self.pins.remove(id) else {
            return false;
        };
        self.all.take(pin.charge);
        // The references stay with their leases, which still name the block.
        for (client, _) in pin.holders {
            if let Some(share) = self.clients.get_mut(&client) {
                share.take(pin.charge);
            }
        }
        true
    }

    /// All that is promised.
    pub(crate) fn promised(&self) -> Vec<BlockId> {
        let mut ids: Vec<_> = self.pins.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// Lets a lease last until `until`; the moment it lasts to now, or `None` if it has ended.
    pub(crate) fn renew(&mut self, token: LeaseToken, until: Moment) -> Option<Moment> {
        let lease = self.leases.get_mut(&token)?;
        self.by_end.remove(&(lease.until, token));
        lease.until = lease.until.max(until);
        self.by_end.insert((lease.until, token));
        Some(lease.until)
    }

    /// Ends a lease: the blocks that nobody holds any more, or `None` if there is no such lease.
    pub(crate) fn end(&mut self, segments: &Segments, token: LeaseToken) -> Option<Vec<BlockId>> {
        let lease = self.leases.remove(&token)?;
        self.by_end.remove(&(lease.until, token));
        Some(self.let_go(segments, lease.client, lease.pins))
    }

    /// Takes blocks out of a lease, each as often as it is named; a lease that has none left ends.
    /// The blocks that nobody holds any more.
    pub(crate) fn end_some(
        &mut self,
        segments: &Segments,
        token: LeaseToken,
        ids: &[BlockId],
    ) -> Vec<BlockId> {
        let Some(lease) = self.leases.get_mut(&token) else {
            return Vec::new();
        };
        let mut times: FastMap<BlockId, usize> = FastMap::default();
        for id in ids {
            *times.entry(*id).or_default() += 1;
        }
        let mut out = Vec::new();
        lease.pins.retain(|(id, number)| {
            let left = times.get_mut(id).filter(|left| **left > 0);
            let kept = left.is_none();
            if let Some(left) = left {
                *left -= 1;
                out.push((*id, *number));
            }
            kept
        });
        let (client, until, is_over) = (lease.client, lease.until, lease.pins.is_empty());
        if is_over {
            self.leases.remove(&token);
            self.by_end.remove(&(until, token));
        }
        self.let_go(segments, client, out)
    }

    /// Takes references of a client off the books; the blocks that nobody holds any more.
    fn let_go(
        &mut self,
        segments: &Segments,
        client: u64,
        pins: Vec<(BlockId, u64)>,
    ) -> Vec<BlockId> {
        let mut free = Vec::new();
        self.all.references -= pins.len();
        if let Some(share) = self.clients.get_mut(&client) {
            share.references -= pins.len();
        }
        for (id, number) in pins {
            let Some(pin) = self.pins.get_mut(&id).filter(|pin| pin.number == number) else {
                continue;
            };
            if let Some(at) = pin.holders.iter().position(|(holder, _)| *holder == client) {
                pin.holders[at].1 -= 1;
                if pin.holders[at].1 == 0 {
                    pin.holders.swap_remove(at);
                    if let Some(share) = self.clients.get_mut(&client) {
                        share.take(pin.charge);
                    }
                }
            }
            if pin.holders.is_empty() {
                let charge = pin.charge;
                self.leave_place(segments, &id);
                self.pins.remove(&id);
                self.all.take(charge);
                free.push(id);
            }
        }
        if self
            .clients
            .get(&client)
            .is_some_and(|share| share.references == 0)
        {
            self.clients.remove(&client);
        }
        free
    }

    /// The next lease whose time is over.
    pub(crate) fn due(&self, now: Moment) -> Option<LeaseToken> {
        let (until, token) = self.by_end.first()?;
        (*until <= now).then_some(*token)
    }

    /// When the next lease ends.
    pub(crate) fn next_end(&self) -> Option<Moment> {
        self.by_end.first().map(|(until, _)| *until)
    }

    /// Leases, blocks pinned, bytes of memory and of the device charged for them.
    pub(crate) fn totals(&self) -> (u64, u64, u64, u64) {
        (
            self.leases.len() as u64,
            self.pins.len() as u64,
            self.all.dram_bytes,
            self.all.flash_bytes,
        )
    }
}

/// Whether a segment is among the next to be reclaimed.
fn is_old(segments: &Segments, segment: u32) -> bool {
    let opened = |number: u32| segments.all[number as usize].opened_sequence;
    segments
        .sealed
        .get(segments.sealed.len() / OLD_PARTS)
        .is_some_and(|border| opened(segment) <= opened(*border))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Superblock;
    use kvar_base::DeviceUuid;
    use proptest::prelude::*;

    fn id(number: u8) -> BlockId {
        BlockId::new([number; 32])
    }

    proptest! {
        /// Whatever is begun, pinned, moved, lost and ended: the totals are those of what is pinned,
        /// no budget is exceeded, and nothing is left when all leases have ended.
        #[test]
        fn the_books_balance(steps in prop::collection::vec((0_u8..7, 0_u8..8, 0_u8..24), 1..400)) {
            let uuid = DeviceUuid::new([1; 16]);
            let superblock = Superblock::plan(64 << 20, 1, 65536, uuid, [2; 16], 0).unwrap();
            let segments = Segments::new(&superblock);
            let mut leases = Leases::new(1000, 2000, 400);
            let (dram_max, flash_max) = (100, 200);
            for (at, (what, lease, block)) in steps.into_iter().enumerate() {
                let some = [id(block), id(block / 2)];
                let token = LeaseToken::new([lease; 16]);
                let client = u64::from(lease % 5);
                match what {
                    0 => {
                        leases.begin(token, client, Moment(at as u64));
                    }
                    1 | 2 => {
                        let bytes = u64::from(block % 5) * 3 + 1;
                        let on_flash = block % 3 > 0;
                        let position = u32::from(block) * 100 + 1;
                        let wanted = Wanted {
                            id: id(block),
                            charge: if on_flash { Charge::Flash(bytes) } else { Charge::Dram(bytes) },
                            place: on_flash.then_some((position, bytes)),
                        };
                        leases.pin(&segments, token, wanted);
                    }
                    3 => leases.moved(&segments, &id(block), u32::from(block) * 100 + at as u32 * 3000, 5),
                    4 => {
                        leases.lost(&segments, &id(block));
                    }
                    5 => {
                        leases.end_some(&segments, token, &some);
                    }
                    _ => {
                        leases.end(&segments, token);
                    }
                }
                let (_, pinned, dram, flash) = leases.totals();
                let sum = |part: fn((u64, u64)) -> u64| {
                    leases.pins.values().map(|pin| part(pin.charge.parts())).sum::<u64>()
                };
                prop_assert_eq!(dram, sum(|parts| parts.0));
                prop_assert_eq!(flash, sum(|parts| parts.1));
                prop_assert_eq!(pinned as usize, leases.pins.len());
                prop_assert!(dram <= dram_max && flash <= flash_max);
                for share in leases.clients.values() {
                    prop_assert!(share.dram_bytes <= dram_max / 4 && share.flash_bytes <= flash_max / 4);
                }
                let places: Vec<_> = leases.pins.values().filter_map(|pin| pin.place).collect();
                prop_assert_eq!(places.len(), leases.positions.len());
                let bytes: u64 = places.iter().map(|(_, bytes)| bytes).sum();
                prop_assert_eq!(bytes, leases.segments.values().sum::<u64>());
            }
            while let Some(token) = leases.due(Moment(u64::MAX)) {
                leases.end(&segments, token);
            }
            prop_assert_eq!(leases.totals(), (0, 0, 0, 0));
            prop_assert_eq!(leases.all, Share::default());
            prop_assert!(leases.clients.is_empty() && leases.positions.is_empty());
            prop_assert!(leases.segments.is_empty() && leases.pins.is_empty());
        }
    }
}
