//! Several tenants in one store: what one does leaves the others theirs.
//!
//! What must always be true: a tenant within its part loses nothing to another's flood, in memory or on
//! the device; a purge of one tenant is about its blocks alone, also after a restart; what is counted
//! of each is what is there; with one tenant there is nothing to decide.

mod shard;

use kvar_engine::{
    EngineConfig, LeaseRequest, Places, PutHints, ShardStatus, Shares, Tenant, TenantStatus, Tier,
    WriteRates,
};
use shard::{Shard, config, id};
use std::time::Duration;

const LEN: usize = 16 << 10;
const DEVICE_BYTES: u64 = 24 << 20;
/// Ids of one-time blocks begin here.
const FLOOD: u64 = 1 << 30;

fn tenant(number: u32) -> Tenant {
    Tenant::new(number).expect("a tenant there can be")
}

fn of(number: u32, request: u64, depth: u32) -> PutHints {
    PutHints {
        request,
        depth,
        tenant: tenant(number),
        ..PutHints::default()
    }
}

fn status_of(status: &ShardStatus, number: u8) -> Option<TenantStatus> {
    let mut tenants = status.tenants.iter().copied();
    tenants.find(|status| status.tenant == number)
}

fn tier(shard: &Shard, number: u64) -> Option<Tier> {
    let stat = shard.engine.stat(shard.now, &id(number));
    stat.map(|stat| stat.tier)
}

/// The blocks of one tenant that others must leave alone.
fn put_set(shard: &mut Shard, tenant: u32, blocks: u64) {
    for number in 0..blocks {
        let hints = of(tenant, number / 16 + 1, (number % 16) as u32);
        shard.put(number, &[LEN], hints);
        shard.pass(Duration::from_millis(1));
    }
    shard.settle();
}

fn left(shard: &mut Shard, blocks: u64) -> u64 {
    (0..blocks).filter(|number| shard.is_there(*number)).count() as u64
}

fn left_in_memory(shard: &Shard, blocks: u64) -> u64 {
    let is_in_memory =
        |number: &u64| matches!(tier(shard, *number), Some(Tier::Dram | Tier::DramAndFlash));
    (0..blocks).filter(is_in_memory).count() as u64
}

/// One-time blocks, so many bytes of them.
fn flood(shard: &mut Shard, tenant: u32, bytes: u64) {
    for number in FLOOD..FLOOD + bytes / LEN as u64 {
        shard.put(number, &[LEN], of(tenant, number, 0));
        shard.pass(Duration::from_millis(1));
    }
    shard.settle();
    shard.engine.recount().unwrap();
}

/// Seven sixteenths of memory are 112 blocks, three eighths of the device some 530.
const IN_MEMORY: u64 = 100;
const ON_DEVICE: u64 = 480;

#[test]
fn a_flood_of_one_tenant_leaves_the_others_working_set_where_it_is() {
    let after_flood_of = |flooding: u32, blocks: u64| {
        let mut shard = Shard::new(DEVICE_BYTES, config());
        put_set(&mut shard, 1, blocks);
        flood(&mut shard, flooding, 10 * DEVICE_BYTES);
        let in_memory = left_in_memory(&shard, blocks);
        (in_memory, left(&mut shard, blocks), shard.status())
    };
    let (in_memory, left, status) = after_flood_of(2, IN_MEMORY);
    assert_eq!((in_memory, left), (IN_MEMORY, IN_MEMORY));
    println!(
        "set of {IN_MEMORY}: amplification {:?}",
        status.write_amplification
    );
    let (in_memory, left, status) = after_flood_of(2, ON_DEVICE);
    assert_eq!(left, ON_DEVICE);
    assert!(in_memory >= IN_MEMORY, "{in_memory}");
    let its = status_of(&status, 1).unwrap().counters;
    assert!(
        its.evicted == 0 && its.kept_entitled > 5 * ON_DEVICE,
        "{its:?}"
    );
    // What it costs: the set is written again whenever its segments are the oldest.
    let amplification = status.write_amplification.unwrap();
    println!("set of {ON_DEVICE}: amplification {amplification:.2}");
    assert!(amplification < 2.0, "{amplification}");
    // It is the tenant that makes the difference.
    let (in_memory, left, status) = after_flood_of(1, ON_DEVICE);
    println!(
        "of one tenant: {left} left, amplification {:?}",
        status.write_amplification
    );
    assert!(
        in_memory == 0 && left < ON_DEVICE / 2,
        "{in_memory} and {left} are left"
    );
}

#[test]
fn a_working_set_stays_while_the_write_budget_is_short() {
    let writes = WriteRates {
        budget_bytes_per_day: Some(0),
        budget_burst_bytes: 16 << 20,
        ..WriteRates::default()
    };
    let mut shard = Shard::new(DEVICE_BYTES, EngineConfig { writes, ..config() });
    put_set(&mut shard, 1, ON_DEVICE);
    flood(&mut shard, 2, 10 * DEVICE_BYTES);
    assert!(left_in_memory(&shard, ON_DEVICE) >= IN_MEMORY);
    assert_eq!(left(&mut shard, ON_DEVICE), ON_DEVICE);
}

#[test]
fn what_one_does_not_use_another_may_have_until_it_is_wanted() {
    let mut shard = Shard::new(DEVICE_BYTES, config());
    flood(&mut shard, 2, 2 * DEVICE_BYTES);
    let of_all = |shard: &Shard| {
        let status = shard.status();
        let in_memory = status_of(&status, 2).map_or(0, |it| it.dram_bytes);
        in_memory as f64 / status.dram_bytes_max as f64
    };
    assert!(of_all(&shard) > 0.95);
    put_set(&mut shard, 1, ON_DEVICE);
    assert!(left_in_memory(&shard, ON_DEVICE) >= IN_MEMORY);
    assert_eq!(left(&mut shard, ON_DEVICE), ON_DEVICE);
    assert!((0.4..0.7).contains(&of_all(&shard)), "{}", of_all(&shard));
}

/// Parts cost something only where they hold back a flood.
#[test]
fn tenants_that_flood_alike_write_as_much_as_one() {
    let amplification = |tenants: u64| {
        let mut shard = Shard::new(DEVICE_BYTES, config());
        for number in 0..8 * DEVICE_BYTES / LEN as u64 {
            shard.put(number, &[LEN], of((number % tenants) as u32, number, 0));
            shard.pass(Duration::from_millis(1));
        }
        shard.settle();
        shard.status().write_amplification.unwrap()
    };
    let (one, three) = (amplification(1), amplification(3));
    println!("one tenant: {one:.2}, three: {three:.2}");
    assert!(three < one + 0.05, "{one} and {three}");
}

#[test]
fn who_has_no_share_has_what_the_others_leave() {
    let mut shares = Shares::none();
    shares.set(tenant(1), 1);
    let mut shard = Shard::new(DEVICE_BYTES, EngineConfig { shares, ..config() });
    put_set(&mut shard, 1, 2 * ON_DEVICE);
    // An eighth of memory and a quarter of the device are promised to nobody.
    flood(&mut shard, 2, 4 * DEVICE_BYTES);
    assert!(left_in_memory(&shard, 2 * ON_DEVICE) >= 2 * IN_MEMORY);
    assert_eq!(left(&mut shard, 2 * ON_DEVICE), 2 * ON_DEVICE);
    let of_flood = status_of(&shard.status(), 2).unwrap();
    assert!(of_flood.dram_bytes > 256 << 10 && of_flood.flash_bytes > 2 << 20);
}

#[test]
fn a_purge_of_one_tenant_is_about_its_blocks_alone() {
    let check = |end: fn(Shard) -> Shard| {
        let mut shard = Shard::new(DEVICE_BYTES, config());
        for number in 0..300 {
            shard.put(number, &[LEN], of((number % 3) as u32, number + 1, 0));
            shard.pass(Duration::from_millis(1));
        }
        shard.settle();
        // Some of them are promised, and some are being read.
        let ids = [id(0), id(1), id(4)];
        let grant = shard.engine.lease(
            shard.now,
            &LeaseRequest {
                ids: &ids,
                token: kvar_base::LeaseToken::new([1; 16]),
                client: 1,
                ttl: Duration::from_secs(20),
                request: 0,
                places: Places::default(),
                over_gaps: false,
            },
        );
        assert_eq!(grant.leading, 3);
        let cold = |shard: &Shard, mine: u64| {
            let mut numbers = (0..300).filter(|number| number % 3 == mine);
            numbers.find(|number| tier(shard, *number) == Some(Tier::Flash))
        };
        let [own, other] = [1, 2].map(|mine| cold(&shard, mine).expect("memory is small"));
        let reads = [own, other].map(|number| (number, shard.begin_get(number, None)));
        shard.engine.purge(7, Some(tenant(1)));
        let (number, token) = reads[0];
        assert_eq!(
            shard.answer(number, token),
            Err(kvar_base::MissReason::Removed)
        );
        let (number, token) = reads[1];
        assert_eq!(shard.answer(number, token), Ok(vec![0]));
        assert_eq!(shard.counters().purged, 100);
        assert_eq!(shard.counters().leased_removed, 2);
        shard.settle();
        // It may put again what was purged.
        shard.put(1, &[LEN], of(1, 1, 0));
        shard.settle();
        shard.engine.recount().unwrap();
        let there = |shard: &mut Shard| -> Vec<u64> {
            (0..300).filter(|number| shard.is_there(*number)).collect()
        };
        let expected: Vec<u64> = (0..300)
            .filter(|number| number % 3 != 1 || *number == 1)
            .collect();
        assert_eq!(there(&mut shard), expected);
        let mut shard = end(shard);
        shard.engine.recount().unwrap();
        assert_eq!(there(&mut shard), expected);
        let status = shard.status();
        let on_device = |number| status_of(&status, number).map_or(0, |it| it.flash_bytes);
        assert_eq!(
            [0, 1, 2].map(on_device),
            [100, 1, 100].map(|blocks| blocks * LEN as u64)
        );
    };
    check(Shard::restart);
    check(Shard::shut_down);
}

#[test]
fn a_purge_of_all_is_of_every_tenant() {
    let mut shard = Shard::new(DEVICE_BYTES, config());
    for number in 0..60 {
        shard.put(number, &[LEN], of((number % 3) as u32, number + 1, 0));
    }
    shard.settle();
    shard.engine.purge(7, None);
    shard.settle();
    assert_eq!(shard.counters().purged, 60);
    let mut shard = shard.restart();
    assert!((0..60).all(|number| !shard.is_there(number)));
    assert_eq!(shard.status().tenants, []);
}

#[test]
fn what_a_tenant_holds_is_known_again_after_a_restart() {
    let ends: [fn(Shard) -> Shard; 2] = [Shard::restart, Shard::shut_down];
    for end in ends {
        let mut shard = Shard::new(DEVICE_BYTES, config());
        // Beyond the device, so that blocks were moved, and of several sections.
        for number in 0..2000 {
            let lengths: &[usize] = if number % 5 == 0 {
                &[5000, 9000]
            } else {
                &[LEN]
            };
            shard.put(number, lengths, of((number % 31) as u32 + 1, number + 1, 0));
            shard.pass(Duration::from_millis(1));
        }
        shard.settle();
        shard.engine.recount().unwrap();
        let shard = end(shard);
        shard.engine.recount().unwrap();
        let mut expected = [0; 32];
        for number in 0..2000 {
            if let Some(stat) = shard.engine.stat(shard.now, &id(number)) {
                expected[(number % 31) as usize + 1] += stat.stored_bytes;
            }
        }
        let mut found = [0; 32];
        for its in shard.status().tenants {
            found[usize::from(its.tenant)] = its.flash_bytes;
        }
        assert_eq!(found, expected);
        assert!(found[1..].iter().all(|bytes| *bytes > 100 << 10));
    }
}

/// Whatever it is called and whatever the weights: a store of one tenant does what a store without
/// tenants did.
#[test]
fn with_one_tenant_nothing_is_decided_here() {
    let run = |number: u32, weight: u32| {
        let mut shares = Shares::default();
        shares.set(tenant(number), weight);
        let writes = WriteRates {
            budget_bytes_per_day: Some(0),
            budget_burst_bytes: 30 << 20,
            ..WriteRates::default()
        };
        let config = EngineConfig {
            shares,
            writes,
            ..config()
        };
        let mut shard = Shard::new(DEVICE_BYTES, config);
        for step in 0..4000_u64 {
            let of_set = step * 7919 % 1500;
            let number_of_block = if step % 3 == 0 { of_set } else { FLOOD + step };
            let hints = of(
                number,
                number_of_block / 8 + 1,
                (number_of_block % 8) as u32,
            );
            let _ = shard.try_put(number_of_block, &[LEN - step as usize % 3 * 4096], hints);
            let _ = shard.begin_get(step * 31 % 1500, None);
            shard.pass(Duration::from_millis(2));
        }
        shard.settle();
        let status = ShardStatus {
            tenants: Vec::new(),
            ..shard.status()
        };
        (format!("{status:?}"), shard.disk.counters().write_bytes)
    };
    let default = run(0, 1);
    assert_eq!(default, run(9, 1000));
    assert_eq!(default, run(31, 0));
}
