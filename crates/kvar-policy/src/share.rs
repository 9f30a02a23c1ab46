//! Who has a right to how much: one tenant does not flush another.
//!
//! ```text
//!   a tier of 12, shares 2 : 1 : 1             entitled to 6, 3, 3
//!
//!   holds   a 3   b 7   c 2                    b is beyond; what a and c leave, it may have
//!              |  a puts: somebody must go
//!              v
//!   leaves  b, the furthest beyond in proportion; which of its blocks, its worth decides
//! ```
//!
//! A tier is divided among the tenants that hold anything in it, and the one that asks, by their
//! weights. Nothing is set aside: who is alone has everything, and is beyond its part only when
//! another comes.
//!
//! | room is wanted by | leaves |
//! |---|---|
//! | anybody, somebody is beyond | the tenant with the most bytes for its weight |
//! | anybody, who is beyond has nothing that may leave | the asker's own; else nobody: it is refused |
//!
//! Flash is reclaimed in age order, whoever's blocks are the oldest. There a tenant that lies within
//! its part gets its blocks written again, and that costs wear:
//!
//! ```text
//!   of a segment   | within: all, as far as a loss would leave it below its part | others: by worth |
//!   write amplification     1 / (1 - p - (1 - p) x 0.4)     p: the part of flash that is within
//! ```
//!
//! What a reclaim may keep in the long run is three quarters ([`KEPT_SHARE_MAX`]), so this is what
//! is divided: more could be promised and not held. The last quarter is whoever's writes come. In memory
//! an eighth is left out: who has a small part needs room to work in.
//!
//! What must always be true: nobody within its part loses a block while another is beyond and has
//! one that may leave; with a single tenant nothing here decides anything.
//!
//! What is absent: names (the node knows them), the order of blocks within a tenant ([`WorthOrder`],
//! [`FlashKeeper`](crate::FlashKeeper)), leases.
//!
//! [`WorthOrder`]: crate::WorthOrder

use crate::reclaim::KEPT_SHARE_MAX;

/// Tenants a store tells apart: five bits of an index entry.
pub const TENANTS: usize = 32;

/// Whose a block is, as a store knows it: a number, and no name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenant(u8);

impl Tenant {
    /// The one that is there from the start, and whose all blocks are that say nothing.
    pub const DEFAULT: Self = Self(0);

    /// The tenant of this number, if there can be one.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        u8::try_from(number)
            .ok()
            .filter(|number| usize::from(*number) < TENANTS)
            .map(Self)
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }

    /// Its place in a list of all.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Some tenants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantSet(u32);

const _: () = assert!(TENANTS == u32::BITS as usize);

impl TenantSet {
    /// With this one, too.
    #[must_use]
    pub fn with(self, tenant: Tenant) -> Self {
        Self(self.0 | 1 << tenant.0)
    }

    /// Without this one.
    #[must_use]
    pub fn without(self, tenant: Tenant) -> Self {
        Self(self.0 & !(1 << tenant.0))
    }

    /// Those of both.
    #[must_use]
    pub fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// Whether this one is among them.
    #[must_use]
    pub fn has(self, tenant: Tenant) -> bool {
        self.0 & 1 << tenant.0 != 0
    }

    /// How many there are.
    #[must_use]
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// All of them, the lowest number first.
    pub fn iter(self) -> impl Iterator<Item = Tenant> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let number = left.trailing_zeros();
            left &= left.wrapping_sub(1);
            Tenant::new(number)
        })
    }
}

/// Bytes by tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    bytes: [u64; TENANTS],
    holders: TenantSet,
}

impl Holdings {
    /// So many bytes more.
    pub fn add(&mut self, tenant: Tenant, bytes: u64) {
        let held = &mut self.bytes[tenant.index()];
        *held += bytes;
        if *held > 0 {
            self.holders = self.holders.with(tenant);
        }
    }

    /// So many bytes less.
    pub fn take(&mut self, tenant: Tenant, bytes: u64) {
        let held = &mut self.bytes[tenant.index()];
        debug_assert!(*held >= bytes, "{tenant:?} gives back more than it holds");
        *held = held.saturating_sub(bytes);
        if *held == 0 {
            self.holders = self.holders.without(tenant);
        }
    }

    /// Bytes that a tenant holds.
    #[must_use]
    pub fn of(&self, tenant: Tenant) -> u64 {
        self.bytes[tenant.index()]
    }

    /// Who holds anything.
    #[must_use]
    pub fn holders(&self) -> TenantSet {
        self.holders
    }

    /// Bytes of all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.bytes.iter().sum()
    }
}

/// The greatest weight: beyond it nobody can tell the parts from all or nothing.
pub const WEIGHT_MAX: u32 = 1_000_000;

/// The part of memory that is promised to nobody.
const UNPROMISED_PART: u64 = 8;

/// What each tenant weighs against the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares([u32; TENANTS]);

impl Default for Shares {
    /// All weigh the same.
    fn default() -> Self {
        Self([1; TENANTS])
    }
}

impl Shares {
    /// Nobody is entitled to anything yet; whoever is not [`set`](Self::set) has what others leave.
    #[must_use]
    pub fn none() -> Self {
        Self([0; TENANTS])
    }

    /// Sets a tenant's weight, at most [`WEIGHT_MAX`]; 0: what others leave.
    pub fn set(&mut self, tenant: Tenant, weight: u32) {
        self.0[tenant.index()] = weight.min(WEIGHT_MAX);
    }

    /// A tenant's weight.
    #[must_use]
    pub fn weight(&self, tenant: Tenant) -> u32 {
        self.0[tenant.index()]
    }

    /// Divides what can be promised of a device that holds so many bytes of blocks when full.
    #[must_use]
    pub fn divide_flash(&self, capacity_bytes: u64, among: TenantSet) -> Division<'_> {
        let promised = (capacity_bytes as f64 * KEPT_SHARE_MAX) as u64;
        self.divide(promised, among)
    }

    /// Divides what is promised of a memory of so many bytes: all but a part in which who has a small
    /// share, or none, can work; else it would get nothing at all while the others use theirs.
    #[must_use]
    pub fn divide_memory(&self, bytes: u64, among: TenantSet) -> Division<'_> {
        self.divide(bytes - bytes / UNPROMISED_PART, among)
    }

    /// Divides so many bytes among these.
    #[must_use]
    pub fn divide(&self, bytes: u64, among: TenantSet) -> Division<'_> {
        let weights = among
            .iter()
            .map(|tenant| u64::from(self.weight(tenant)))
            .sum();
        Division {
            shares: self,
            among,
            weights,
            bytes,
        }
    }
}

/// A tier as it is divided at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Division<'a> {
    shares: &'a Shares,
    among: TenantSet,
    /// Sum of their weights.
    weights: u64,
    bytes: u64,
}

impl Division<'_> {
    /// Whether there is anything to decide.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.among.len() > 1
    }

    /// Its weight here: where all have none, all are equal.
    fn weight(&self, tenant: Tenant) -> u64 {
        match () {
            () if !self.among.has(tenant) => 0,
            () if self.weights == 0 => 1,
            () => u64::from(self.shares.weight(tenant)),
        }
    }

    fn weights(&self) -> u64 {
        match self.weights {
            0 => u64::from(self.among.len()).max(1),
            weights => weights,
        }
    }

    /// Bytes that a tenant has a right to.
    #[must_use]
    pub fn entitlement(&self, tenant: Tenant) -> u64 {
        let part = u128::from(self.bytes) * u128::from(self.weight(tenant));
        (part / u128::from(self.weights())) as u64
    }

    /// Whether a tenant that holds so much is beyond its part.
    #[must_use]
    pub fn is_beyond(&self, tenant: Tenant, held: u64) -> bool {
        held > self.entitlement(tenant)
    }

    /// Who is within its part.
    #[must_use]
    pub fn within(&self, held: &Holdings) -> TenantSet {
        let within = |it: &Tenant| !self.is_beyond(*it, held.of(*it));
        self.among
            .iter()
            .filter(within)
            .fold(TenantSet::default(), TenantSet::with)
    }

    /// Of these candidates the one that holds most for its weight; of equals the lowest number.
    pub fn furthest(&self, candidates: TenantSet, held: impl Fn(Tenant) -> u64) -> Option<Tenant> {
        let mut furthest: Option<(Tenant, u64, u64)> = None;
        for tenant in candidates.iter() {
            let (bytes, weight) = (held(tenant), self.weight(tenant));
            let is_further = furthest.is_none_or(|(_, most, its)| {
                let (a, b) = (
                    u128::from(bytes) * u128::from(its),
                    u128::from(most) * u128::from(weight),
                );
                // Two without weight: by what they hold.
                a > b || (weight, its) == (0, 0) && bytes > most
            });
            if is_further {
                furthest = Some((tenant, bytes, weight));
            }
        }
        furthest.map(|(tenant, ..)| tenant)
    }

    /// Whose block leaves, of those that have one that may leave, when `asking` wants room. `held`
    /// counts what it wants already.
    pub fn leaves(
        &self,
        asking: Tenant,
        candidates: TenantSet,
        held: impl Fn(Tenant) -> u64,
    ) -> Option<Tenant> {
        if !self.is_shared() {
            return candidates.iter().next();
        }
        self.furthest(candidates, &held)
            .filter(|tenant| self.is_beyond(*tenant, held(*tenant)))
            .or_else(|| candidates.has(asking).then_some(asking))
    }

    /// Of so many bytes, those that a tenant may come to hold: what the others do not have within
    /// their parts.
    pub fn room(&self, bytes: u64, tenant: Tenant, held: impl Fn(Tenant) -> u64) -> u64 {
        let others = self.among.without(tenant).iter();
        let theirs: u64 = others
            .map(|other| held(other).min(self.entitlement(other)))
            .sum();
        bytes.saturating_sub(theirs)
    }
}

/// What each tenant may lose in one reclaim of flash.
///
/// Blocks are asked about within a tenant in the order of their worth, most first; all of them must
/// have been [announced](Self::announce) before.
#[derive(Clone, Debug)]
pub struct Losses {
    /// Bytes that may go; `None`: any.
    may_lose: [Option<u64>; TENANTS],
    /// Bytes that were not asked about yet.
    left: [u64; TENANTS],
}

impl Losses {
    /// For a device that holds so many bytes of blocks when full, of which these are held.
    #[must_use]
    pub fn new(shares: &Shares, capacity_bytes: u64, held: &Holdings) -> Self {
        let division = shares.divide_flash(capacity_bytes, held.holders());
        let mut may_lose = [None; TENANTS];
        if division.is_shared() {
            for tenant in held.holders().iter() {
                let beyond = held.of(tenant).saturating_sub(division.entitlement(tenant));
                may_lose[tenant.index()] = Some(beyond);
            }
        }
        Self {
            may_lose,
            left: [0; TENANTS],
        }
    }

    /// The segment holds this much of a tenant's.
    pub fn announce(&mut self, tenant: Tenant, bytes: u64) {
        self.left[tenant.index()] += bytes;
    }

    /// A tenant's next block: whether it must stay, since what may go of its tenant is less than what is
    /// left, and others of it are worth less.
    pub fn is_entitled(&mut self, tenant: Tenant, bytes: u64) -> bool {
        let left = &mut self.left[tenant.index()];
        let must_stay = self.may_lose[tenant.index()].is_some_and(|may_lose| *left > may_lose);
        *left = left.saturating_sub(bytes);
        must_stay
    }

    /// It went all the same, or because it may.
    pub fn lost(&mut self, tenant: Tenant, bytes: u64) {
        if let Some(may_lose) = &mut self.may_lose[tenant.index()] {
            *may_lose = may_lose.saturating_sub(bytes);
        }
    }
}

#[cfg(test)]
mod tests;
