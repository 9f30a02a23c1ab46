//! The oracle of leases: who was promised which blocks until when, and what that is charged.
//!
//! ```text
//!   token ──> Lease: client, until, blocks          block ──> Pin: charge, bytes, held by which leases
//! ```
//!
//! It follows the budgets of `docs/internals/promises.md` from the calls and the journal alone, so that it
//! can say three things: what is promised and left for no good reason, what was promised beyond a
//! budget, and what was refused although there was room.
//!
//! What must always be true: a lease counts until its end and no longer; a block that was removed,
//! or whose bytes are gone, is promised to nobody.

use kvar_base::Moment;
use std::collections::BTreeMap;

/// One part of so many of memory, and of the device, may be promised.
const BUDGET_PARTS: u64 = 10;
/// One part of so many of that, to one client.
const CLIENT_PARTS: u64 = 4;

/// What a promise is charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Charge {
    Memory,
    Device,
}

/// Bytes of memory, bytes of the device.
pub(crate) type Bytes = (u64, u64);

#[derive(Clone, Debug)]
struct Pin {
    number: u64,
    charge: Charge,
    bytes: u64,
}

#[derive(Clone, Debug)]
struct Lease {
    client: u64,
    until: Moment,
    /// Blocks, each with the number of its pin.
    blocks: Vec<(u64, u64)>,
}

/// Promises that were broken for a reason that counts, in this life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) removed: u64,
    pub(crate) corrupt: u64,
    pub(crate) dropped: u64,
    /// Their last lease ended at the same moment: the store may have counted them or not.
    pub(crate) unsure: u64,
}

/// Why a promise is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Removed,
    Corrupt,
    Dropped,
}

/// All leases of a life.
#[derive(Clone, Debug, Default)]
pub(crate) struct Promises {
    leases: BTreeMap<u64, Lease>,
    pins: BTreeMap<u64, Pin>,
    next_pin: u64,
    now: Moment,
    pub(crate) lost: Lost,
    /// Blocks were promised of which not all is known: totals are not compared any more.
    pub(crate) vague: bool,
}

impl Promises {
    /// It is `now`: what ends now holds nothing any more.
    pub(crate) fn begin_moment(&mut self, now: Moment) {
        self.now = now;
    }

    /// Forgets what has ended; how many leases that were.
    pub(crate) fn end_moment(&mut self) -> u64 {
        let now = self.now;
        let over: Vec<u64> = self.tokens(|lease| lease.until <= now);
        over.iter().filter(|token| self.end(**token)).count() as u64
    }

    fn tokens(&self, wanted: impl Fn(&Lease) -> bool) -> Vec<u64> {
        self.leases
            .iter()
            .filter(|(_, lease)| wanted(lease))
            .map(|(token, _)| *token)
            .collect()
    }

    /// Leases that stand.
    pub(crate) fn standing(&self) -> Vec<u64> {
        self.tokens(|_| true)
    }

    pub(crate) fn client_of(&self, token: u64) -> Option<u64> {
        self.leases.get(&token).map(|lease| lease.client)
    }

    /// Whether a block is promised to somebody.
    pub(crate) fn holds(&self, number: u64) -> bool {
        let Some(pin) = self.pins.get(&number) else {
            return false;
        };
        self.leases
            .values()
            .any(|lease| lease.until > self.now && lease.blocks.contains(&(number, pin.number)))
    }

    pub(crate) fn promised(&self) -> impl Iterator<Item = (u64, u64)> {
        self.pins.iter().map(|(number, pin)| (*number, pin.bytes))
    }

    /// As the store does it: begins a lease, or lets it last longer. The end it has now.
    pub(crate) fn renew(&mut self, token: u64, until: Moment) -> Option<Moment> {
        let lease = self.leases.get_mut(&token)?;
        lease.until = lease.until.max(until);
        Some(lease.until)
    }

    /// Promises blocks under a token, for the first time or more of them.
    pub(crate) fn grant(
        &mut self,
        token: u64,
        client: u64,
        until: Moment,
        blocks: &[(u64, Charge, u64)],
    ) {
        if blocks.is_empty() && !self.leases.contains_key(&token) {
            return;
        }
        let lease = self.leases.entry(token).or_insert(Lease {
            client,
            until,
            blocks: Vec::new(),
        });
        lease.until = lease.until.max(until);
        for (number, charge, bytes) in blocks {
            let pin = self.pins.entry(*number).or_insert_with(|| {
                self.next_pin += 1;
                Pin {
                    number: self.next_pin,
                    charge: *charge,
                    bytes: *bytes,
                }
            });
            lease.blocks.push((*number, pin.number));
        }
    }

    /// Ends a lease; whether there was one.
    pub(crate) fn end(&mut self, token: u64) -> bool {
        let ended = self.leases.remove(&token).is_some();
        let leases = &self.leases;
        self.pins.retain(|number, pin| {
            let held = |lease: &Lease| lease.blocks.contains(&(*number, pin.number));
            leases.values().any(held)
        });
        ended
    }

    /// A block is gone; whether it was promised.
    pub(crate) fn lose(&mut self, number: u64, why: Reason) -> bool {
        let held = self.holds(number);
        if self.pins.remove(&number).is_none() {
            return false;
        }
        match why {
            _ if !held => self.lost.unsure += 1,
            Reason::Removed => self.lost.removed += 1,
            Reason::Corrupt => self.lost.corrupt += 1,
            Reason::Dropped => self.lost.dropped += 1,
        }
        held
    }

    /// Leases, blocks, and bytes charged.
    pub(crate) fn totals(&self) -> (u64, u64, Bytes) {
        let bytes = self.bytes(|_| true);
        (self.leases.len() as u64, self.pins.len() as u64, bytes)
    }

    fn bytes(&self, counts: impl Fn((u64, u64)) -> bool) -> Bytes {
        let mut bytes = (0, 0);
        for (number, pin) in &self.pins {
            if counts((*number, pin.number)) {
                match pin.charge {
                    Charge::Memory => bytes.0 += pin.bytes,
                    Charge::Device => bytes.1 += pin.bytes,
                }
            }
        }
        bytes
    }

    /// Whether a client may be promised so much more within what all, and it alone, may have.
    pub(crate) fn has_room(
        &self,
        client: u64,
        number: u64,
        charge: Charge,
        bytes: u64,
        store: Bytes,
    ) -> bool {
        let of_client = |block: (u64, u64)| {
            self.leases
                .values()
                .any(|lease| lease.client == client && lease.blocks.contains(&block))
        };
        let known = self.pins.get(&number);
        let (charge, bytes) = known.map_or((charge, bytes), |pin| (pin.charge, pin.bytes));
        let mine = known.is_some_and(|pin| of_client((number, pin.number)));
        let part = |(memory, device): Bytes| match charge {
            Charge::Memory => memory,
            Charge::Device => device,
        };
        let limit = part(store) / BUDGET_PARTS;
        (known.is_some() || part(self.bytes(|_| true)) + bytes <= limit)
            && (mine || part(self.bytes(of_client)) + bytes <= limit / CLIENT_PARTS)
    }

    /// What is promised beyond a budget, in words.
    pub(crate) fn beyond(&self, store: Bytes) -> Option<String> {
        let limits = (store.0 / BUDGET_PARTS, store.1 / BUDGET_PARTS);
        let exceeds =
            |bytes: Bytes, parts: u64| bytes.0 > limits.0 / parts || bytes.1 > limits.1 / parts;
        let all = self.bytes(|_| true);
        if exceeds(all, 1) {
            return Some(format!(
                "{all:?} bytes are promised, of {limits:?} that may be"
            ));
        }
        let mut clients: Vec<u64> = self.leases.values().map(|lease| lease.client).collect();
        clients.sort_unstable();
        clients.dedup();
        clients.into_iter().find_map(|client| {
            let bytes = self.bytes(|block| {
                self.leases
                    .values()
                    .any(|lease| lease.client == client && lease.blocks.contains(&block))
            });
            exceeds(bytes, CLIENT_PARTS).then(|| {
                format!(
                    "{bytes:?} bytes are promised to client {client}, of a quarter of {limits:?} that may be"
                )
            })
        })
    }
}
