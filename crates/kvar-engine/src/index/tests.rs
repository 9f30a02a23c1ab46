//! The index against a map, at its design load, and while a snapshot of it is taken.
//!
//! What must always be true: what the index finds is what was put there last, and nothing is missing
//! from it but what it said it gave up.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

fn id(number: u32) -> BlockId {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    BlockId::new(bytes)
}

fn entry(position: u32, stamp: u8) -> Entry {
    Entry {
        check64: u64::from(position) << 32 | 7,
        position,
        len: position % 9000 + 1,
        sectioned: false,
        touched: false,
        frequency: 0,
        length: (position % 8) as u8,
        kind: (position % 4) as u8,
        stamp,
        tenant: Tenant::new(position % 32).unwrap(),
    }
}

proptest! {
    /// The index against a map: what it finds is what was put there last; what it lost it said.
    #[test]
    fn agrees_with_a_map(steps in prop::collection::vec((0_u8..3, 0_u32..300, 1_u32..5000), 1..600)) {
        let mut index = Index::new(64, 1);
        let mut model: HashMap<u32, Entry> = HashMap::new();
        let mut seen = HashMap::new();
        for (what, number, position) in steps {
            match what {
                0 => {
                    let new = entry(position * 512 + number, 0);
                    match index.insert(&id(number), &new, |age| age) {
                        Inserted::Added => prop_assert!(model.insert(number, new).is_none()),
                        Inserted::Replaced(old) => prop_assert_eq!(model.insert(number, new), Some(old)),
                        Inserted::Evicted(old) => {
                            model.retain(|_, entry| *entry != old);
                            prop_assert!(model.insert(number, new).is_none());
                        }
                        Inserted::Held => prop_assert!(false, "nothing is held"),
                    }
                }
                1 => prop_assert_eq!(index.remove(&id(number)), model.remove(&number)),
                _ => {
                    if let Some((at, _)) = index.find(&id(number)) {
                        let class = BlockClass::new((position % 5) as u8, position);
                        index.touch(at, 9, class);
                        let known = model.get_mut(&number).unwrap();
                        known.stamp = 9;
                        known.touched = true;
                        known.frequency = class.uses();
                        known.length = class.length();
                    }
                }
            }
            // Where it was found before it is found again, or wherever it is by now.
            for number in [number, (number + 7) % 300] {
                let found = index.find(&id(number));
                if let Some((at, before)) = seen.get(&number) {
                    prop_assert_eq!(index.find_again(&id(number), *at, before), found);
                }
                found.map(|found| seen.insert(number, found));
            }
            prop_assert_eq!(index.len(), model.len());
            let mut held = Holdings::default();
            for entry in model.values() {
                held.add(entry.tenant, entry.stored_bytes());
            }
            prop_assert_eq!(index.holdings(), &held);
        }
        for (number, entry) in &model {
            prop_assert_eq!(index.find(&id(*number)).map(|found| found.1), Some(*entry));
        }
        let mut copy = Index::new(64, 1);
        for bucket in 0..64 {
            copy.set_bucket_bytes(bucket, &index.bucket_bytes(bucket));
        }
        for bucket in 0..64 {
            prop_assert_eq!(copy.bucket_bytes(bucket), index.bucket_bytes(bucket));
        }
        prop_assert_eq!(copy.len(), index.len());
        prop_assert_eq!(copy.holdings(), index.holdings());
        prop_assert_eq!(copy.counted_holdings(), index.counted_holdings());
    }
}

/// A sweep sees every entry, and changes its stamp alone.
#[test]
fn a_sweep_sets_old_stamps_back_and_touches_nothing_else() {
    let mut index = Index::new(50, 1);
    for number in 1..=100 {
        index.insert(&id(number), &entry(number, number as u8), |age| age);
    }
    for begin in (0..70).step_by(7) {
        index.sweep(begin..begin + 7, |stamp| (stamp > 60).then_some(60));
    }
    let mut swept = 0;
    for number in 1..=100_u32 {
        if let Some((_, found)) = index.find(&id(number)) {
            assert_eq!(found, entry(number, number.min(60) as u8));
            swept += u32::from(number > 60);
        }
    }
    assert!(swept > 30, "{swept}");
}

/// Entries come, go and move while a snapshot is taken a few buckets at a time; what was there
/// from before its beginning to its end is in it, and nothing is in it twice.
#[test]
fn a_snapshot_has_what_stays_once_however_entries_move() {
    for seed in 0..20_u32 {
        let buckets = 400;
        let mut index = Index::new(buckets as u64, u64::from(seed));
        let mut number = seed * 1_000_000;
        let first = number;
        let mut gone = std::collections::HashSet::new();
        let add = |index: &mut Index, number: &mut u32| {
            *number += 1;
            match index.insert(&id(*number), &entry(*number - first, 0), |age| age) {
                Inserted::Evicted(evicted) => evicted.position,
                _ => 0,
            }
        };
        while index.len() < buckets * SLOTS * 80 / 100 {
            gone.insert(add(&mut index, &mut number));
        }
        let before = number;
        index.begin_snapshot();
        let mut copy = Index::new(buckets as u64, u64::from(seed));
        for bucket in 0..buckets {
            let bytes = index.take_bucket(bucket);
            copy.set_bucket_bytes(bucket, &bytes);
            gone.insert(add(&mut index, &mut number));
            let old = first + 1 + (bucket as u32 * 7) % (before - first);
            index.remove(&id(old));
            copy.remove(&id(old)); // as the replay of its tombstone would
            gone.insert(old - first);
        }
        index.end_snapshot();
        for old in first + 1..=before {
            if gone.contains(&(old - first)) {
                continue;
            }
            let found = copy.remove(&id(old)).map(|entry| entry.position);
            assert_eq!(found, Some(old - first), "seed {seed}: lost");
        }
        let mut seen = std::collections::HashSet::new();
        let mut twice = 0;
        copy.retain(|entry| {
            twice += u32::from(entry.position <= before - first && !seen.insert(entry.position));
            true
        });
        assert_eq!(twice, 0, "seed {seed}: stands in it twice");
        for old in first + 1..=before {
            copy.remove(&id(old));
            assert!(copy.find(&id(old)).is_none(), "seed {seed}: comes back");
        }
    }
}

#[test]
fn design_load_loses_at_most_one_put_in_a_thousand() {
    let buckets = 20_000;
    let mut index = Index::new(buckets, 3);
    let entries = (buckets * SLOTS_PER_BUCKET * 78 / 100) as u32;
    let lost = (0..entries)
        .filter(|number| {
            matches!(
                index.insert(&id(*number), &entry(number + 1, 0), |age| age),
                Inserted::Evicted(_)
            )
        })
        .count();
    assert!(lost * 1000 <= entries as usize, "{lost} of {entries}");
    assert!(index.bytes() <= 28 * entries as usize);
    assert_eq!(*index.holdings(), index.counted_holdings());
}

#[test]
fn the_largest_lengths_fit() {
    let mut index = Index::new(4, 0);
    for (number, len, sectioned) in [
        (1, 16 << 20, false),
        (2, (20 << 20) + 4096, true),
        (3, 1, false),
    ] {
        let wide = Entry {
            len,
            sectioned,
            position: (1 << 30) - 1,
            ..entry(1, 255)
        };
        index.insert(&id(number), &wide, |age| age);
        assert_eq!(index.find(&id(number)).unwrap().1, wide);
    }
}

#[test]
fn a_full_pair_gives_up_the_coldest() {
    let mut index = Index::new(1, 0);
    for number in 1..=3 {
        index.insert(&id(number), &entry(number, number as u8), |age| 100 - age);
    }
    let (at, _) = index.find(&id(1)).unwrap();
    index.touch(at, 0, BlockClass::new(1, 1));
    let gone = index.insert(&id(4), &entry(4, 50), |stamp| 100 - stamp);
    assert_eq!(gone, Inserted::Evicted(entry(2, 2)));
    assert!(index.find(&id(1)).is_some());
}

proptest! {
    /// Asking for many at once gives what asking one by one gives, whatever their number.
    #[test]
    fn find_all_agrees_with_find(known in 0_u32..400, asked in prop::collection::vec(0_u32..500, 0..80)) {
        let mut index = Index::new(200, 3);
        for number in 0..known {
            let _ = index.insert(&id(number), &entry(number + 1, 0), |age| age);
        }
        let ids: Vec<BlockId> = asked.into_iter().map(id).collect();
        let mut found = Vec::new();
        index.find_all(&ids, &mut found);
        let one_by_one: Vec<_> = ids.iter().map(|id| index.find(id)).collect();
        prop_assert_eq!(found, one_by_one);
    }
}
