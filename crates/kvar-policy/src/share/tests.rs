//! Parts and losses, by hand and by chance.
//!
//! What must always be true: nobody within its part loses a block while another is beyond and has one
//! that may leave; parts never come to more than there is.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn tenant(number: u32) -> Tenant {
    Tenant::new(number).expect("a tenant there can be")
}

fn set(numbers: &[u32]) -> TenantSet {
    let add = |set: TenantSet, number: &u32| set.with(tenant(*number));
    numbers.iter().fold(TenantSet::default(), add)
}

fn shares(weights: &[u32]) -> Shares {
    let mut shares = Shares::none();
    for (number, weight) in (0..).zip(weights) {
        shares.set(tenant(number), *weight);
    }
    shares
}

#[test]
fn a_tier_is_divided_among_those_who_are_there() {
    let shares = shares(&[2, 1, 1]);
    let parts = |among: &[u32]| {
        let division = shares.divide(12, set(among));
        [0, 1, 2].map(|number| division.entitlement(tenant(number)))
    };
    assert_eq!(parts(&[0, 1, 2]), [6, 3, 3]);
    assert_eq!(parts(&[0, 2]), [8, 0, 4]);
    assert_eq!(parts(&[1]), [0, 12, 0]);
    assert_eq!(parts(&[]), [0, 0, 0]);
}

#[test]
fn where_nobody_has_a_share_all_are_equal() {
    let shares = Shares::none();
    let division = shares.divide(12, set(&[3, 9]));
    assert_eq!(division.entitlement(tenant(9)), 6);
    assert!(division.is_beyond(tenant(3), 7) && !division.is_beyond(tenant(3), 6));
}

#[test]
fn who_is_furthest_beyond_for_its_weight_leaves_first() {
    let check = |held: [u64; 4], candidates: &[u32], expected: Option<u32>| {
        let shares = shares(&[2, 1, 1, 0]);
        let division = shares.divide(12, set(&[0, 1, 2, 3]));
        let leaves = division.leaves(tenant(0), set(candidates), |it| held[it.index()]);
        assert_eq!(leaves, expected.map(tenant), "{held:?} {candidates:?}");
    };
    check([3, 7, 2, 0], &[0, 1, 2], Some(1));
    check([8, 3, 1, 0], &[0, 1, 2], Some(0));
    check([7, 5, 0, 0], &[0, 1], Some(1));
    // Who has no share has what others leave.
    check([6, 3, 2, 1], &[0, 1, 2, 3], Some(3));
    // Who is beyond has nothing that may leave: the asker's own.
    check([6, 6, 0, 0], &[0], Some(0));
    check([3, 6, 3, 0], &[2], None);
}

#[test]
fn room_is_what_the_others_do_not_have_within_their_parts() {
    let shares = shares(&[1, 1, 2]);
    let held = [2, 9, 0];
    let division = shares.divide(16, set(&[0, 1]));
    let room = |number| division.room(16, tenant(number), |it| held[it.index()]);
    assert_eq!((room(0), room(1)), (8, 14));
    let alone = shares.divide(16, set(&[1]));
    assert_eq!(alone.room(16, tenant(1), |it| held[it.index()]), 16);
}

#[test]
fn flash_gives_nothing_up_below_a_part_and_the_least_worth_first() {
    let mut held = Holdings::default();
    held.add(tenant(0), 20);
    held.add(tenant(1), 80);
    let mut losses = Losses::new(&shares(&[1, 1]), 100, &held);
    // Parts of 37: the first is within, the second may lose 43.
    losses.announce(tenant(0), 5);
    losses.announce(tenant(1), 50);
    assert!(losses.is_entitled(tenant(0), 5));
    let asked = [10, 10, 10, 10, 10].map(|bytes| {
        let stays = losses.is_entitled(tenant(1), bytes);
        if !stays {
            losses.lost(tenant(1), bytes);
        }
        stays
    });
    assert_eq!(asked, [true, false, false, false, false]);
}

#[test]
fn a_single_tenant_is_entitled_to_nothing_in_particular() {
    let mut held = Holdings::default();
    held.add(tenant(4), 10);
    let mut losses = Losses::new(&Shares::default(), 100, &held);
    losses.announce(tenant(4), 10);
    assert!(!losses.is_entitled(tenant(4), 10));
}

/// A tier of unit blocks, of which some are held fast.
struct Tier {
    held: Holdings,
    fast: BTreeMap<Tenant, u64>,
    shares: Shares,
    bytes: u64,
}

impl Tier {
    fn loose(&self) -> TenantSet {
        let is_loose =
            |it: &Tenant| self.held.of(*it) > self.fast.get(it).copied().unwrap_or_default();
        let add = |set: TenantSet, it| set.with(it);
        self.held
            .holders()
            .iter()
            .filter(is_loose)
            .fold(TenantSet::default(), add)
    }
}

proptest! {
    #[test]
    fn nobody_within_its_part_loses_a_block_while_another_is_beyond(
        weights in prop::collection::vec(0..5_u32, 1..5),
        puts in prop::collection::vec((0..4_u32, any::<bool>()), 1..400),
        bytes in 4..60_u64,
    ) {
        let count = weights.len() as u32;
        let mut tier = Tier {
            held: Holdings::default(),
            fast: BTreeMap::new(),
            shares: shares(&weights),
            bytes,
        };
        for (number, is_fast) in puts {
            let asking = tenant(number % count);
            let division = tier.shares.divide(bytes, tier.held.holders().with(asking));
            let wants = |it: Tenant| tier.held.of(it) + u64::from(it == asking);
            if tier.held.total() == tier.bytes {
                let loose = tier.loose();
                let Some(leaves) = division.leaves(asking, loose, wants) else {
                    // Refused: whoever is beyond holds all of it fast, and the asker has nothing.
                    prop_assert!(!loose.has(asking));
                    prop_assert!(loose.iter().all(|it| !division.is_beyond(it, wants(it))));
                    continue;
                };
                let others_beyond = loose
                    .iter()
                    .any(|it| it != leaves && division.is_beyond(it, wants(it)));
                if leaves != asking || others_beyond {
                    prop_assert!(division.is_beyond(leaves, wants(leaves)));
                }
                tier.held.take(leaves, 1);
            }
            tier.held.add(asking, 1);
            if is_fast && tier.fast.get(&asking).is_none_or(|fast| *fast < bytes / 4) {
                *tier.fast.entry(asking).or_default() += 1;
            }
            prop_assert!(tier.held.total() <= bytes);
        }
    }

    #[test]
    fn parts_never_come_to_more_than_there_is(
        weights in prop::collection::vec(0..=WEIGHT_MAX, TENANTS),
        among in any::<u32>(),
        bytes in any::<u64>(),
    ) {
        let among = (0..TENANTS as u32)
            .filter(|number| among & 1 << number != 0)
            .fold(TenantSet::default(), |set, number| set.with(tenant(number)));
        let shares = shares(&weights);
        let division = shares.divide(bytes, among);
        let sum: u128 = among.iter().map(|it| u128::from(division.entitlement(it))).sum();
        prop_assert!(sum <= u128::from(bytes));
        prop_assert!(among.is_empty() || sum + TENANTS as u128 > u128::from(bytes));
    }
}
