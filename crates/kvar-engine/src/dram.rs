//! What is in memory: residents by id, what they are worth, and who may leave.
//!
//! ```text
//!   put ──> Dirty ── taken by a write ──> Writing ── recorded ──> Clean ── evicted ──> (flash only)
//!    │        ▲                              │ failed                │ its segment is reclaimed
//!    │        └──────────────────────────────┘                       v
//!    └──> Held ── about to leave: worth a place on flash? ── yes ──> Dirty, with its prompt
//!           ▲               └── no ──┐
//!           ├── used again ──────────┴──> Volatile ── evicted ──> gone
//!           │  ephemeral put, or the device gave its copy up ──^
//!           └── used again ─────────────┐
//!   handover ──> Awaited ── read, or its time is over ──> Spent ── evicted ──> gone
//!                   └── flush, stop ──> Dirty
//!
//!   who leaves first:   Spent │ Clean, Volatile, by worth │ Held, by worth │ Awaited, by end of time
//! ```
//!
//! Of several tenants the one furthest beyond its part makes room (`Shares` of kvar-policy). Of its
//! Clean and Volatile residents the tail of the prompt that is worth least leaves before
//! others; a Held one is decided about while there is still room, and leaves undecided only when
//! nothing else can; so does an Awaited one, which `handover` has more about. The only copy of a
//! block that is leased stays until its lease ends.
//!
//! What a block costs to compute counts while memory has it alone: a copy of what the device holds
//! saves a read, whatever the block cost.

use crate::layout::{RecordHints, Sections};
use crate::mutation::{Check, is_disabled};
use crate::shard::Handover;
use kvar_base::FastMap;
use kvar_base::{BlockId, Moment};
use kvar_io::Shared;
use kvar_policy::{
    BlockClass, Candidate, Cost, Division, Holdings, Keep, Shares, Tenant, TenantSet, WorthOrder,
};
use smallvec::SmallVec;
use std::collections::BTreeSet;
use std::ops::Range;

/// Where a resident stands on its way to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Dirty,
    Writing,
    Clean,
    Held,
    Volatile,
    Awaited,
    Spent,
}

/// Bytes of what is known of a block in memory.
pub(crate) const RESIDENT_SIZE: usize = size_of::<Resident>();

/// A block in memory.
#[derive(Clone, Debug)]
pub(crate) struct Resident {
    pub(crate) image: Shared,
    pub(crate) sections: Sections,
    pub(crate) version: u64,
    /// Which put (or read) brought it; a later one of the same id has another number.
    pub(crate) number: u64,
    pub(crate) state: State,
    pub(crate) depth: u32,
    pub(crate) ephemeral: bool,
    /// Arrival number of its last touch.
    pub(crate) arrival: u64,
    /// What is known of its use, and when that was, in bytes of demand.
    pub(crate) class: BlockClass,
    pub(crate) used_at: u64,
    /// What its writer said.
    pub(crate) hints: RecordHints,
    /// Promised to somebody.
    pub(crate) leased: bool,
    /// Of one that was put to be read once: what is left of that.
    pub(crate) handover: Option<Box<Handover>>,
    /// Here only until it is written: it comes from the tier above, and nobody used it since.
    pub(crate) passes: bool,
    /// Flushed in the tier below: it may go at any time, and is not written here again.
    pub(crate) is_below: bool,
}

impl Resident {
    pub(crate) fn is_sectioned(&self) -> bool {
        self.sections.len() > 1
    }

    fn bytes(&self) -> u64 {
        self.image.padded_len() as u64
    }

    /// In memory alone, and nobody said that it may stay so.
    pub(crate) fn is_alone(&self) -> bool {
        let is_only_here = match self.state {
            State::Held | State::Volatile | State::Awaited => true,
            State::Spent => self.is_unread(),
            State::Clean | State::Dirty | State::Writing => false,
        };
        is_only_here && !self.ephemeral && !self.is_below
    }

    /// Was put to be read once, and never was.
    pub(crate) fn is_unread(&self) -> bool {
        let handover = self.handover.as_deref();
        handover.is_some_and(|handover| !handover.is_read())
    }

    /// Its class in the order in which memory lets go.
    fn leaving_class(&self) -> BlockClass {
        match self.state {
            State::Clean => self.class.at_cost(Cost::default()),
            _ => self.class,
        }
    }

    /// When nobody waits for it any more.
    fn awaited_until(&self) -> Moment {
        let handover = self.handover.as_deref();
        handover.map_or(Moment(0), Handover::until)
    }

    fn may_leave(&self) -> bool {
        match self.state {
            State::Clean => true,
            State::Held | State::Volatile | State::Awaited | State::Spent => {
                !self.leased || is_disabled(Check::Lease)
            }
            State::Dirty | State::Writing => false,
        }
    }
}

/// What of a resident its place among those that may leave depends on: read once, where the resident
/// is at hand, so that coming, changing and leaving ask the map once each.
struct Spot {
    state: State,
    bytes: u64,
    is_alone: bool,
    may_leave: bool,
    arrival: u64,
    depth: u32,
    class: BlockClass,
    used_at: u64,
    number: u64,
    until: Moment,
    tenant: Tenant,
}

impl Spot {
    fn of(resident: &Resident) -> Self {
        Self {
            state: resident.state,
            bytes: resident.bytes(),
            is_alone: resident.is_alone(),
            may_leave: resident.may_leave(),
            arrival: resident.arrival,
            depth: resident.depth,
            class: resident.leaving_class(),
            used_at: resident.used_at,
            number: resident.number,
            until: resident.awaited_until(),
            tenant: resident.hints.tenant,
        }
    }
}

/// What had to leave: one block for another of its size, as a rule.
pub(crate) type Evicted = SmallVec<[Gone; 1]>;

/// What memory is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A block that comes in, and stays until it is written.
    Put,
    /// A block or a part of one that is read.
    Read,
}

/// A tenant's residents that may leave: at once, and when they were decided about.
#[derive(Default)]
struct Orders {
    leaving: WorthOrder<BlockId>,
    held: WorthOrder<BlockId>,
    /// Those whose reader is awaited, by when that ends; and those it came for, or never will, in
    /// the order in which they were put.
    awaited: BTreeSet<(Moment, u64, BlockId)>,
    spent: BTreeSet<(u64, BlockId)>,
}

impl Orders {
    fn of(&mut self, state: State) -> Option<&mut WorthOrder<BlockId>> {
        match state {
            State::Clean | State::Volatile => Some(&mut self.leaving),
            State::Held => Some(&mut self.held),
            State::Dirty | State::Writing | State::Awaited | State::Spent => None,
        }
    }

    fn is_empty(&self) -> bool {
        let is_ordered = self.leaving.is_empty() && self.held.is_empty();
        is_ordered && self.awaited.is_empty() && self.spent.is_empty()
    }
}

/// All residents of a shard.
pub(crate) struct Dram {
    residents: FastMap<BlockId, Resident>,
    /// By tenant, as far as one has ever had a resident.
    orders: Vec<Orders>,
    shares: Shares,
    /// Bytes of residents, and of tickets and reads under way, by tenant.
    resident: Holdings,
    reserved: Holdings,
    /// Bytes of residents that may leave, by tenant.
    evictable: Holdings,
    /// Those that expire, by when.
    expiring: BTreeSet<(u32, BlockId)>,
    /// Bytes of residents, tickets and reads under way, in whole pages.
    used_bytes: u64,
    /// Bytes of residents that may leave.
    evictable_bytes: u64,
    /// Bytes of Held residents that may leave.
    held_bytes: u64,
    /// Bytes of Awaited residents, whether or not they may leave.
    awaited_bytes: u64,
    /// Residents that are Held, Volatile or Awaited, but for ephemeral ones: a flush is about them.
    alone: usize,
    limit_bytes: u64,
}

/// A resident that left.
pub(crate) struct Gone {
    pub(crate) id: BlockId,
    pub(crate) state: State,
    pub(crate) class: BlockClass,
    pub(crate) ephemeral: bool,
    pub(crate) is_below: bool,
    pub(crate) tenant: Tenant,
}

/// Most bytes of so many that puts may hold against eviction: a quarter is left to reads, which would
/// otherwise find memory full of blocks that wait for a slow device.
fn put_limit_bytes(limit_bytes: u64, block_bytes: u64) -> u64 {
    (limit_bytes / 4 * 3).max(block_bytes)
}

impl Dram {
    pub(crate) fn new(limit_bytes: u64, shares: Shares) -> Self {
        Self {
            residents: FastMap::default(),
            orders: Vec::new(),
            shares,
            resident: Holdings::default(),
            reserved: Holdings::default(),
            evictable: Holdings::default(),
            expiring: BTreeSet::new(),
            used_bytes: 0,
            evictable_bytes: 0,
            held_bytes: 0,
            awaited_bytes: 0,
            alone: 0,
            limit_bytes,
        }
    }

    pub(crate) fn get(&self, id: &BlockId) -> Option<&Resident> {
        self.residents.get(id)
    }

    pub(crate) fn len(&self) -> usize {
        self.residents.len()
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    pub(crate) fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// Most bytes that puts may hold against eviction.
    pub(crate) fn put_limit_bytes(&self, block_bytes: u64) -> u64 {
        put_limit_bytes(self.limit_bytes, block_bytes)
    }

    /// Bytes that wait to be decided about.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Bytes that wait for their reader.
    pub(crate) fn awaited_bytes(&self) -> u64 {
        self.awaited_bytes
    }

    /// Bytes that leave only when nothing else can: what waits to be decided about, or for its
    /// reader.
    pub(crate) fn waiting_bytes(&self) -> u64 {
        self.held_bytes + self.awaited_bytes
    }

    /// The Awaited resident whose time ends first, of those that nobody was promised, and when
    /// that is.
    pub(crate) fn first_awaited(&self) -> Option<(Moment, BlockId)> {
        let firsts = self
            .orders
            .iter()
            .filter_map(|orders| orders.awaited.first());
        firsts.min().map(|(until, _, id)| (*until, *id))
    }

    /// Whether a flush would find something that is in memory alone.
    pub(crate) fn has_alone(&self) -> bool {
        self.alone > 0
    }

    /// The Held resident that is worth least, of the tenant that holds most for its part.
    pub(crate) fn least_held(&self, keep: &Keep) -> Option<Candidate<BlockId>> {
        let candidates = self.tenants(|orders| !orders.held.is_empty());
        let tenant = match candidates.len() {
            0 => return None,
            1 => candidates.iter().next(),
            _ => self
                .division(candidates)
                .furthest(candidates, |tenant| self.held_by(tenant)),
        }?;
        let held = &self.orders.get(tenant.index())?.held;
        held.least(keep.reuse().of(tenant), keep.demand_bytes())
    }

    /// The Held residents of a tenant's prompt, deepest first.
    pub(crate) fn held_of(&self, tenant: Tenant, arrival: u64) -> Vec<BlockId> {
        let orders = self.orders.get(tenant.index());
        orders.map_or_else(Vec::new, |orders| orders.held.of_request(arrival).collect())
    }

    /// Bytes of a tenant, residents and reservations.
    pub(crate) fn held_by(&self, tenant: Tenant) -> u64 {
        self.resident.of(tenant) + self.reserved.of(tenant)
    }

    /// How memory is divided, among these and whoever has anything in it.
    fn division(&self, also: TenantSet) -> Division<'_> {
        let among = self.resident.holders().and(self.reserved.holders());
        self.shares.divide_memory(self.limit_bytes, among.and(also))
    }

    fn tenants(&self, are: impl Fn(&Orders) -> bool) -> TenantSet {
        let tenants = (0..).zip(&self.orders).filter(|(_, orders)| are(orders));
        tenants
            .filter_map(|(number, _)| Tenant::new(number))
            .fold(TenantSet::default(), TenantSet::with)
    }

    /// Sets bytes aside for a tenant's ticket or read; evicts for it. `false` when what cannot leave
    /// would come to too much: of all, or of this tenant within the room that the parts of the
    /// others leave it. Reads may fill what there is, puts three quarters of it. What left is in
    /// `gone` in either case.
    pub(crate) fn reserve(
        &mut self,
        tenant: Tenant,
        bytes: u64,
        purpose: Purpose,
        keep: &Keep,
        gone: &mut Evicted,
    ) -> bool {
        let division = self.division(TenantSet::default().with(tenant));
        let room = match division.is_shared() {
            true => division.room(self.limit_bytes, tenant, |tenant| self.held_by(tenant)),
            false => self.limit_bytes,
        };
        let fits = |room: u64, held: u64| {
            let most = match purpose {
                Purpose::Put => put_limit_bytes(room, bytes).min(room),
                Purpose::Read => room,
            };
            held + bytes <= most
        };
        let own = self.held_by(tenant) - self.evictable.of(tenant);
        if !fits(self.limit_bytes, self.used_bytes - self.evictable_bytes) || !fits(room, own) {
            return false;
        }
        while self.used_bytes + bytes > self.limit_bytes {
            match self.evict(tenant, bytes, keep) {
                Some(one) => gone.push(one),
                None => return false,
            }
        }
        self.used_bytes += bytes;
        self.reserved.add(tenant, bytes);
        true
    }

    /// Takes a reservation back.
    pub(crate) fn release(&mut self, tenant: Tenant, bytes: u64) {
        self.used_bytes -= bytes;
        self.reserved.take(tenant, bytes);
    }

    /// Drops the resident that is the first to leave for so many bytes of a tenant's.
    pub(crate) fn evict(&mut self, asking: Tenant, bytes: u64, keep: &Keep) -> Option<Gone> {
        let candidates = self.tenants(|orders| !orders.is_empty());
        let division = self.division(TenantSet::default().with(asking));
        let held = |tenant| self.held_by(tenant) + if tenant == asking { bytes } else { 0 };
        let leaves = division.leaves(asking, candidates, held)?;
        self.evict_of(leaves, keep)
    }

    /// Drops a resident for the sake of a run of pages, although there are bytes enough. If nobody is
    /// beyond its part and the asker has nothing that may leave, it is whoever holds most: or a
    /// tenant whose blocks are of an odd size would never get one in.
    pub(crate) fn evict_for_run(
        &mut self,
        asking: Tenant,
        bytes: u64,
        keep: &Keep,
    ) -> Option<Gone> {
        if let Some(gone) = self.evict(asking, 0, keep) {
            return Some(gone);
        }
        let division = self.division(TenantSet::default().with(asking));
        if division.is_beyond(asking, self.held_by(asking).saturating_sub(bytes)) {
            return None;
        }
        let candidates = self.tenants(|orders| !orders.is_empty());
        let leaves = division.furthest(candidates, |tenant| self.held_by(tenant))?;
        self.evict_of(leaves, keep)
    }

    fn evict_of(&mut self, tenant: Tenant, keep: &Keep) -> Option<Gone> {
        let (voice, now) = (keep.reuse().of(tenant), keep.demand_bytes());
        let orders = self.orders.get(tenant.index())?;
        let least = |order: &WorthOrder<BlockId>| order.least(voice, now).map(|least| least.key);
        let spent = orders.spent.first().map(|(_, id)| *id);
        let id = spent
            .or_else(|| least(&orders.leaving))
            .or_else(|| least(&orders.held))
            .or_else(|| orders.awaited.first().map(|(_, _, id)| *id))?;
        let resident = self.remove(&id)?;
        Some(Gone {
            id,
            state: resident.state,
            class: resident.class,
            ephemeral: resident.ephemeral,
            tenant,
            is_below: resident.is_below,
        })
    }

    fn orders(&mut self, tenant: Tenant) -> &mut Orders {
        if self.orders.len() <= tenant.index() {
            self.orders.resize_with(tenant.index() + 1, Orders::default);
        }
        &mut self.orders[tenant.index()]
    }

    /// Whether every count is what counting anew gives: for tests. Cost: all residents.
    pub(crate) fn recount(&self) -> Result<(), String> {
        let (mut resident, mut evictable) = (Holdings::default(), Holdings::default());
        for one in self.residents.values() {
            resident.add(one.hints.tenant, one.bytes());
            if one.may_leave() {
                evictable.add(one.hints.tenant, one.bytes());
            }
        }
        let used_bytes = resident.total() + self.reserved.total();
        let holds = resident == self.resident
            && evictable == self.evictable
            && evictable.total() == self.evictable_bytes
            && used_bytes == self.used_bytes;
        holds.then_some(()).ok_or_else(|| {
            format!(
                "memory holds {resident:?} and counts {:?}; {evictable:?} of it may leave, counted \
                 {:?}; {used_bytes} bytes are used, counted {}",
                self.resident, self.evictable, self.used_bytes
            )
        })
    }

    /// Gives a resident its place among those that may leave, if it is one.
    fn enter(&mut self, id: &BlockId, spot: &Spot) {
        let (state, bytes, number) = (spot.state, spot.bytes, spot.number);
        self.alone += usize::from(spot.is_alone);
        self.awaited_bytes += if state == State::Awaited { bytes } else { 0 };
        if !spot.may_leave {
            return;
        }
        self.evictable_bytes += bytes;
        self.evictable.add(spot.tenant, bytes);
        self.held_bytes += if state == State::Held { bytes } else { 0 };
        let orders = self.orders(spot.tenant);
        match state {
            State::Awaited => drop(orders.awaited.insert((spot.until, number, *id))),
            State::Spent => drop(orders.spent.insert((number, *id))),
            _ => {}
        }
        if let Some(order) = orders.of(state) {
            order.touch(*id, spot.arrival, spot.depth, spot.class, spot.used_at);
        }
    }

    /// Takes that place away.
    fn leave(&mut self, id: &BlockId, spot: &Spot) {
        let (state, bytes, number) = (spot.state, spot.bytes, spot.number);
        self.alone -= usize::from(spot.is_alone);
        self.awaited_bytes -= if state == State::Awaited { bytes } else { 0 };
        if !spot.may_leave {
            return;
        }
        self.evictable_bytes -= bytes;
        self.evictable.take(spot.tenant, bytes);
        self.held_bytes -= if state == State::Held { bytes } else { 0 };
        let orders = self.orders(spot.tenant);
        match state {
            State::Awaited => drop(orders.awaited.remove(&(spot.until, number, *id))),
            State::Spent => drop(orders.spent.remove(&(number, *id))),
            _ => {}
        }
        if let Some(order) = orders.of(state) {
            order.remove(id);
        }
    }

    /// Adds a resident whose bytes are reserved already.
    pub(crate) fn insert(&mut self, id: BlockId, resident: Resident) {
        if resident.hints.expires_unix_s != 0 {
            self.expiring.insert((resident.hints.expires_unix_s, id));
        }
        let (tenant, bytes) = (resident.hints.tenant, resident.bytes());
        self.reserved.take(tenant, bytes);
        self.resident.add(tenant, bytes);
        let spot = Spot::of(&resident);
        let before = self.residents.insert(id, resident);
        debug_assert!(
            before.is_none(),
            "a resident is replaced only after it was removed"
        );
        self.enter(&id, &spot);
    }

    pub(crate) fn remove(&mut self, id: &BlockId) -> Option<Resident> {
        let gone = self.residents.remove(id)?;
        self.leave(id, &Spot::of(&gone));
        if gone.hints.expires_unix_s != 0 {
            self.expiring.remove(&(gone.hints.expires_unix_s, *id));
        }
        self.used_bytes -= gone.bytes();
        self.resident.take(gone.hints.tenant, gone.bytes());
        Some(gone)
    }

    pub(crate) fn set_state(&mut self, id: &BlockId, state: State) {
        self.change(id, |resident| resident.state = state);
    }

    /// The device gave its copy up, and the tier below has one.
    pub(crate) fn set_below(&mut self, id: &BlockId) {
        self.change(id, |resident| {
            resident.state = State::Volatile;
            resident.is_below = true;
        });
    }

    /// There is no tier below any more: what was safe there is in memory alone.
    pub(crate) fn forget_below(&mut self) {
        let below = self.residents.iter().filter(|(_, it)| it.is_below);
        let below: Vec<BlockId> = below.map(|(id, _)| *id).collect();
        for id in &below {
            self.change(id, |resident| resident.is_below = false);
        }
    }

    /// Whether somebody was promised this resident.
    pub(crate) fn set_leased(&mut self, id: &BlockId, leased: bool) {
        self.change(id, |resident| resident.leased = leased);
    }

    fn change(&mut self, id: &BlockId, change: impl FnOnce(&mut Resident)) {
        let Some(resident) = self.residents.get_mut(id) else {
            return;
        };
        let before = Spot::of(resident);
        change(resident);
        let after = Spot::of(resident);
        self.leave(id, &before);
        self.enter(id, &after);
    }

    /// Part of an Awaited resident was read; whether that was all of it, and it is Spent now.
    pub(crate) fn read(&mut self, id: &BlockId, sections: Option<Range<u16>>) -> bool {
        let is_read =
            |resident: &mut Resident| resident.handover.as_mut()?.read(sections).then_some(());
        let is_spent = self.residents.get_mut(id).and_then(is_read).is_some();
        if is_spent {
            self.set_state(id, State::Spent);
        }
        is_spent
    }

    /// A Spent or Awaited resident is handed over once more.
    pub(crate) fn await_again(&mut self, id: &BlockId, handover: Handover) {
        self.change(id, |resident| {
            resident.hints.handover = true;
            resident.handover = Some(Box::new(handover));
            resident.state = State::Awaited;
        });
    }

    /// What its record on the device says of a resident that was read from there: the record goes.
    pub(crate) fn set_hints(&mut self, id: &BlockId, hints: &RecordHints, cost: Cost) {
        self.change(id, |resident| {
            resident.hints = RecordHints {
                expires_unix_s: resident.hints.expires_unix_s,
                tenant: resident.hints.tenant,
                ..*hints
            };
            resident.class = resident.class.at_cost(cost);
        });
    }

    /// A resident was used, by a request with this arrival number. One that was not worth a place
    /// on flash is asked about again; so is one that was to be read once, and then another request
    /// wants it: from now on it is a block like any other.
    pub(crate) fn touch(
        &mut self,
        id: &BlockId,
        arrival: u64,
        depth: u32,
        class: BlockClass,
        used_at: u64,
    ) {
        self.change(id, |resident| {
            let is_another = resident.arrival != arrival;
            resident.arrival = arrival;
            resident.depth = depth;
            resident.class = class;
            resident.used_at = used_at;
            if resident.state == State::Spent && is_another {
                resident.hints.handover = false;
                resident.handover = None;
                resident.state = State::Volatile;
            }
            resident.passes = false;
            let is_safe = resident.ephemeral || resident.is_below;
            if resident.state == State::Volatile && !is_safe {
                resident.state = State::Held;
            }
        });
    }

    /// Residents that expired before a second of wall time, the longest ago first.
    pub(crate) fn expired_before(&self, unix_s: u64) -> impl Iterator<Item = BlockId> {
        self.expiring
            .iter()
            .take_while(move |(expires, _)| u64::from(*expires) < unix_s)
            .map(|(_, id)| *id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&BlockId, &Resident)> {
        self.residents.iter()
    }

    /// Those that are `wanted`, oldest put first: in whatever order the map has them, the same calls
    /// must give the same writes, or no seed of the simulation would replay.
    pub(crate) fn in_order(
        &self,
        mut wanted: impl FnMut(&BlockId, &Resident) -> bool,
    ) -> Vec<BlockId> {
        let mut found: Vec<(u64, BlockId)> = self
            .iter()
            .filter(|(id, resident)| wanted(id, resident))
            .map(|(id, resident)| (resident.number, *id))
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, id)| id).collect()
    }
}
