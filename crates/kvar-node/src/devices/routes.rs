//! Which engine has a block.
//!
//! ```text
//!   id ── bytes 20..24 ──> partition 0..16384 ──> device ── id.shard(its shards) ──> engine
//!                              table: weighted rendezvous over the devices that are there
//! ```
//!
//! For each partition every device draws a number from (partition, slot) and its size; the
//! smallest wins. So a device that goes leaves its own partitions to the others and moves nobody
//! else's, and when it comes back it has exactly the ones it had: its blocks are found again. The
//! draw is by slot and not by uuid, so that a replacement takes over what the device before it had.
//!
//! With devices of both tiers there are two such tables, one a tier: a block is put at its fast owner,
//! and looked for there first, then at its big owner. A tier without weight is none.
//!
//! What must always be true: the same slots and sizes give the same table, on every machine and in
//! every version (a test pins it): otherwise an update would make every block a miss.
//!
//! What is absent: who is there (`keeper`), and what lies in which shard of a device, which is part
//! of the disk format ([`BlockId::shard`]).

use crate::config::DeviceTier;
use crate::mail::EngineKey;
use kvar_base::BlockId;
use kvar_engine::Standing;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Partitions: enough that devices get their share within a few percent, few enough that the table
/// stays in the second-level cache.
const PARTITIONS: usize = 16_384;

/// A device that blocks are routed to.
#[derive(Clone, Debug)]
pub(crate) struct RoutedDevice {
    pub(crate) slot: u32,
    /// Its weight; 0: it has no blocks any more that are asked for, and hears of removes all the same.
    pub(crate) bytes: u64,
    pub(crate) tier: DeviceTier,
    /// Its engines by shard number.
    pub(crate) engines: Vec<EngineKey>,
}

/// See the module. Shared by all threads; a change is a new one.
#[derive(Debug)]
pub(crate) struct Routes {
    devices: Vec<RoutedDevice>,
    /// For each device the number of its first engine in `engines`.
    first: Vec<usize>,
    engines: Vec<EngineKey>,
    /// Who is asked first; with one tier, all there are.
    upper: Owners,
    /// Who has what those lack, if there are two tiers.
    lower: Option<Owners>,
    /// Whether removes must be noted for a device that is away.
    pub(crate) note_removals: bool,
    generation: u64,
    /// The generation that the keeper made last, whether this thread has heard of it or not.
    latest: Arc<AtomicU64>,
}

/// One table.
#[derive(Debug)]
struct Owners {
    /// The devices in it, by their places in [`Routes::devices`].
    devices: Vec<u8>,
    /// Device of each partition; empty when there is one device or none.
    partitions: Vec<u8>,
}

impl Owners {
    fn over(all: &[RoutedDevice], is_in: impl Fn(&RoutedDevice) -> bool) -> Self {
        let devices: Vec<u8> = (0..=u8::MAX)
            .zip(all)
            .filter(|(_, device)| is_in(device))
            .map(|(number, _)| number)
            .collect();
        let partitions = if devices.len() < 2 {
            Vec::new()
        } else {
            (0..PARTITIONS as u32)
                .map(|partition| winner(partition, all, &devices))
                .collect()
        };
        Self {
            devices,
            partitions,
        }
    }

    fn device(&self, id: &BlockId) -> Option<usize> {
        let device = match self.devices[..] {
            [] => return None,
            [only] => only,
            _ => self.partitions[partition(id)],
        };
        Some(usize::from(device))
    }

    fn share(&self, device: usize) -> f64 {
        if !self.devices.iter().any(|it| usize::from(*it) == device) {
            return 0.0;
        }
        if self.partitions.is_empty() {
            return 1.0;
        }
        let own = self.partitions.iter();
        let own = own.filter(|one| usize::from(**one) == device);
        own.count() as f64 / PARTITIONS as f64
    }
}

impl Routes {
    /// Routes over these devices, at most 255, in force from now on: `latest` counts them.
    pub(crate) fn new(
        devices: Vec<RoutedDevice>,
        note_removals: bool,
        latest: &Arc<AtomicU64>,
    ) -> Self {
        let mut first = Vec::new();
        let mut engines = Vec::new();
        for device in &devices {
            first.push(engines.len());
            engines.extend_from_slice(&device.engines);
        }
        let weighs = |tier| {
            let mut of_tier = devices.iter().filter(|device| device.tier == tier);
            of_tier.any(|device| device.bytes > 0)
        };
        let is_split = DeviceTier::ALL.into_iter().all(weighs);
        let upper = Owners::over(&devices, |it| !is_split || it.tier == DeviceTier::Fast);
        let lower = is_split.then(|| Owners::over(&devices, |it| it.tier == DeviceTier::Big));
        Self {
            devices,
            first,
            engines,
            upper,
            lower,
            note_removals,
            generation: latest.fetch_add(1, Ordering::SeqCst) + 1,
            latest: latest.clone(),
        }
    }

    /// Whether no other routes were made since. Asked when a remove is over: had a device come in
    /// meanwhile, it was not among those that were asked.
    pub(crate) fn is_latest(&self) -> bool {
        self.generation == self.latest.load(Ordering::SeqCst)
    }

    /// Every engine; parts of a request are numbered by place in this list.
    pub(crate) fn engines(&self) -> &[EngineKey] {
        &self.engines
    }

    /// The place in [`engines`](Self::engines) of who is put at and asked first; `None` when there is no
    /// device at all.
    pub(crate) fn owner_part(&self, id: &BlockId) -> Option<usize> {
        self.part_of(&self.upper, id)
    }

    /// The same of who has what the first one lacks; `None` with one tier.
    pub(crate) fn lower_part(&self, id: &BlockId) -> Option<usize> {
        self.part_of(self.lower.as_ref()?, id)
    }

    fn part_of(&self, owners: &Owners, id: &BlockId) -> Option<usize> {
        let device = owners.device(id)?;
        let shards = self.devices[device].engines.len() as u32;
        Some(self.first[device] + id.shard(shards) as usize)
    }

    /// The owner of a block.
    pub(crate) fn owner(&self, id: &BlockId) -> Option<EngineKey> {
        self.owner_part(id).map(|part| self.engines[part])
    }

    /// Who has what the owner lacks; `None` with one tier.
    pub(crate) fn lower_owner(&self, id: &BlockId) -> Option<EngineKey> {
        self.lower_part(id).map(|part| self.engines[part])
    }

    /// The owner among the devices of a tier; of the other tier if there is none.
    pub(crate) fn owner_in(&self, tier: DeviceTier, id: &BlockId) -> Option<EngineKey> {
        let lower = (tier == DeviceTier::Big).then(|| self.lower_owner(id));
        lower.flatten().or_else(|| self.owner(id))
    }

    /// Whether there are two tiers that have blocks.
    pub(crate) fn has_lower(&self) -> bool {
        self.lower.is_some()
    }

    /// The tier of the engine at a place in [`engines`](Self::engines).
    pub(crate) fn tier_of_part(&self, part: usize) -> DeviceTier {
        let device = self.first.partition_point(|first| *first <= part);
        device
            .checked_sub(1)
            .map_or(DeviceTier::Fast, |device| self.devices[device].tier)
    }

    /// Where an engine stands among the tiers.
    pub(crate) fn standing(&self, engine: EngineKey) -> Standing {
        let part = self.engines.iter().position(|it| *it == engine);
        match part.map(|part| self.tier_of_part(part)) {
            Some(DeviceTier::Fast) if self.has_lower() => Standing::Above,
            Some(DeviceTier::Big) if self.has_lower() => Standing::Below,
            _ => Standing::Only,
        }
    }

    /// Every engine that might hold a copy of a block, one a device: its owner, and those it had
    /// while the owner was away.
    pub(crate) fn holder_parts<'a>(&'a self, id: &'a BlockId) -> impl Iterator<Item = usize> + 'a {
        self.devices
            .iter()
            .zip(&self.first)
            .map(|(device, first)| first + id.shard(device.engines.len() as u32) as usize)
    }

    /// Share of the blocks of its tier that a slot gets.
    pub(crate) fn share(&self, slot: u32) -> f64 {
        let Some(device) = self.devices.iter().position(|device| device.slot == slot) else {
            return 0.0;
        };
        let lower = self.lower.as_ref().map_or(0.0, |lower| lower.share(device));
        self.upper.share(device) + lower
    }
}

/// From bytes of the id that neither the shard nor the index uses.
fn partition(id: &BlockId) -> usize {
    let mut bytes = [0_u8; 4];
    bytes.copy_from_slice(&id.as_bytes()[20..24]);
    ((u64::from(u32::from_le_bytes(bytes)) * PARTITIONS as u64) >> 32) as usize
}

/// The device with the least of exponential draws with rates in proportion to the sizes: each wins
/// with its share of the sum.
fn winner(partition: u32, all: &[RoutedDevice], among: &[u8]) -> u8 {
    let draw = |device: &RoutedDevice| {
        let bits = mix(u64::from(device.slot) << 32 | u64::from(partition));
        // In (0, 1]: 53 bits, as many as the fraction of a double has.
        let uniform = ((bits >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        -uniform.ln() / device.bytes as f64
    };
    let mut best = (f64::INFINITY, among.first().copied().unwrap_or(0));
    for number in among {
        let drawn = draw(&all[usize::from(*number)]);
        if drawn < best.0 {
            best = (drawn, *number);
        }
    }
    best.1
}

/// The finalizer of SplitMix64: every bit of the input changes half of the output's.
fn mix(mut bits: u64) -> u64 {
    bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(slot: u32, gib: u64, shards: u32) -> RoutedDevice {
        RoutedDevice {
            slot,
            bytes: gib << 30,
            tier: DeviceTier::Fast,
            engines: (0..shards)
                .map(|thread| EngineKey {
                    thread,
                    serial: slot * 100 + thread,
                })
                .collect(),
        }
    }

    fn routes(devices: Vec<RoutedDevice>) -> Routes {
        Routes::new(devices, false, &Arc::default())
    }

    fn ids() -> Vec<BlockId> {
        (0..20_000_u32)
            .map(|number| {
                let mut bytes = [0; 32];
                for chunk in 0..4 {
                    let at = chunk * 8;
                    let bits = mix(u64::from(number) * 4 + chunk as u64);
                    bytes[at..at + 8].copy_from_slice(&bits.to_le_bytes());
                }
                BlockId::new(bytes)
            })
            .collect()
    }

    fn slot_of(routes: &Routes, id: &BlockId) -> u32 {
        routes.owner(id).unwrap().serial / 100
    }

    #[test]
    fn a_device_that_goes_moves_its_own_blocks_and_gets_them_back() {
        let all = [device(0, 100, 2), device(1, 200, 2), device(2, 100, 3)];
        let before = routes(all.to_vec());
        let without = routes(vec![all[0].clone(), all[2].clone()]);
        let after = routes(all.to_vec());
        for id in ids() {
            match slot_of(&before, &id) {
                1 => assert_ne!(slot_of(&without, &id), 1),
                slot => assert_eq!(slot_of(&without, &id), slot),
            }
            assert_eq!(before.owner(&id), after.owner(&id));
        }
    }

    #[test]
    fn a_device_without_weight_owns_nothing_and_hears_of_removes() {
        let mut all = [device(0, 100, 2), device(1, 200, 2), device(2, 100, 3)];
        let others = routes(vec![all[1].clone(), all[2].clone()]);
        all[0].bytes = 0;
        let leaving = routes(all.to_vec());
        for id in ids() {
            assert_eq!(leaving.owner(&id), others.owner(&id));
            assert_eq!(leaving.holder_parts(&id).count(), 3);
        }
        assert_eq!(leaving.share(0), 0.0);
    }

    #[test]
    fn shares_follow_sizes() {
        let devices = [device(0, 100, 1), device(1, 200, 1), device(7, 700, 4)];
        let routes = routes(devices.to_vec());
        for (slot, share) in [(0, 0.1), (1, 0.2), (7, 0.7)] {
            let found = routes.share(slot);
            assert!(
                (found / share - 1.0).abs() < 0.1,
                "slot {slot}: {found} for {share}"
            );
        }
        assert_eq!(routes.share(3), 0.0);
        let ids = ids();
        let large = ids.iter().filter(|id| slot_of(&routes, id) == 7).count();
        assert!(
            (large as f64 / ids.len() as f64 - 0.7).abs() < 0.02,
            "{large}"
        );
    }

    #[test]
    fn one_device_has_everything_by_shard_and_none_has_nothing() {
        let one = routes(vec![device(3, 1, 4)]);
        for id in ids() {
            assert_eq!(one.owner(&id), Some(one.engines()[id.shard(4) as usize]));
            assert!(one.holder_parts(&id).eq([id.shard(4) as usize]));
        }
        assert_eq!(routes(Vec::new()).owner(&ids()[0]), None);
    }

    #[test]
    fn the_table_never_changes() {
        let devices = [device(0, 1, 1), device(1, 2, 1), device(2, 1, 1)];
        let routes = routes(devices.to_vec());
        assert_eq!(kvar_base::check::crc64(&routes.upper.partitions), PINNED);
        // Of whichever tier they all are.
        let routes = self::routes(devices.map(big).to_vec());
        assert_eq!(kvar_base::check::crc64(&routes.upper.partitions), PINNED);
        assert!(!routes.has_lower());
    }

    fn big(device: RoutedDevice) -> RoutedDevice {
        RoutedDevice {
            tier: DeviceTier::Big,
            ..device
        }
    }

    #[test]
    fn each_tier_is_a_store_of_its_own() {
        let fast = [device(0, 100, 2), device(3, 200, 2)];
        let below = [big(device(1, 1000, 2)), big(device(2, 3000, 3))];
        let all = [&fast[..1], &below[..], &fast[1..]].concat();
        let both = routes(all.clone());
        let (upper, lower) = (routes(fast.to_vec()), routes(below.to_vec()));
        for id in ids() {
            assert_eq!(both.owner(&id), upper.owner(&id));
            assert_eq!(both.lower_owner(&id), lower.owner(&id));
            assert_eq!(both.owner_in(DeviceTier::Fast, &id), upper.owner(&id));
            assert_eq!(both.owner_in(DeviceTier::Big, &id), lower.owner(&id));
            assert_eq!(both.holder_parts(&id).count(), 4);
            assert_eq!(upper.lower_owner(&id), None);
            assert_eq!(lower.owner_in(DeviceTier::Fast, &id), lower.owner(&id));
        }
        assert_eq!(both.share(0), upper.share(0));
        assert_eq!(both.share(2), lower.share(2));
        for (part, engine) in both.engines().iter().enumerate() {
            let is_big = [1, 2].contains(&(engine.serial / 100));
            assert_eq!(both.tier_of_part(part) == DeviceTier::Big, is_big);
            let standing = if is_big {
                Standing::Below
            } else {
                Standing::Above
            };
            assert_eq!(both.standing(*engine), standing);
            assert_eq!(lower.standing(*engine), Standing::Only);
        }
    }

    #[test]
    fn a_tier_that_has_left_is_none_and_hears_of_removes() {
        let fast = device(0, 100, 2);
        let mut below = big(device(1, 1000, 2));
        below.bytes = 0;
        let leaving = routes(vec![fast.clone(), below.clone()]);
        let without = routes(vec![fast.clone()]);
        (below.bytes, below.tier) = (100, DeviceTier::Big);
        let gone_fast = RoutedDevice { bytes: 0, ..fast };
        let alone = routes(vec![gone_fast, below.clone()]);
        for id in ids() {
            assert_eq!(leaving.owner(&id), without.owner(&id));
            assert_eq!(leaving.lower_owner(&id), None);
            assert_eq!(leaving.holder_parts(&id).count(), 2);
            assert_eq!(alone.owner(&id).unwrap().serial / 100, 1);
        }
    }

    /// CRC64 of the table of three devices of 1, 2 and 1 GiB.
    const PINNED: u64 = 0x014d_b22a_2fea_d9e3;
}
