//! How memory is divided among devices.
//!
//! | devices at start | each has |
//! |---|---|
//! | of one tier | its part of `dram`, by size |
//! | of both | fast ones three quarters by size, big ones a quarter by size |
//!
//! Every put lands in the memory of a fast device, and most of what comes back does so within
//! seconds: that is where a byte of memory saves most. Big devices need it for what is on its way to them
//! and for prompts that were resumed lately. By size over both tiers they would have nearly all of it.
//!
//! A device that comes later brings its own, in the ratio of its tier; the first of a tier brings that
//! tier's part.
//!
//! What is absent: the least that a shard can work with (`config`).

use crate::config::DeviceTier;

/// What big devices have where there are fast ones, too.
const BIG_SHARE: f64 = 0.25;

/// Memory for each byte of device, by tier.
#[derive(Clone, Copy, Debug)]
pub(super) struct Division {
    dram_bytes: f64,
    per_byte: [Option<f64>; 2],
}

impl Division {
    /// Of so much memory, among devices of these tiers and sizes.
    pub(super) fn new(dram_bytes: u64, devices: &[(DeviceTier, u64)]) -> Self {
        let dram_bytes = dram_bytes as f64;
        let bytes_of = |tier| -> u64 {
            let of_tier = devices.iter().filter(|device| device.0 == tier);
            of_tier.map(|device| device.1).sum()
        };
        let [fast, big] = DeviceTier::ALL.map(bytes_of);
        let per = |part: f64, bytes: u64| (bytes > 0).then(|| dram_bytes * part / bytes as f64);
        let per_byte = match (fast, big) {
            (_, 0) => [per(1.0, fast), None],
            (0, _) => [None, per(1.0, big)],
            _ => [per(1.0 - BIG_SHARE, fast), per(BIG_SHARE, big)],
        };
        Self {
            dram_bytes,
            per_byte,
        }
    }

    /// What a device has.
    pub(super) fn of(&mut self, tier: DeviceTier, bytes: u64) -> u64 {
        let part = match tier {
            DeviceTier::Fast => 1.0 - BIG_SHARE,
            DeviceTier::Big => BIG_SHARE,
        };
        let whole = self.dram_bytes * part;
        let per_byte = &mut self.per_byte[tier as usize];
        let per_byte = per_byte.get_or_insert_with(|| whole / bytes.max(1) as f64);
        (*per_byte * bytes as f64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DeviceTier::{Big, Fast};

    #[test]
    fn fast_devices_have_most_of_it_and_one_tier_has_all() {
        let mut one = Division::new(1000, &[(Fast, 10), (Fast, 30)]);
        assert_eq!((one.of(Fast, 10), one.of(Fast, 30)), (250, 750));
        let mut big = Division::new(1000, &[(Big, 10)]);
        assert_eq!(big.of(Big, 10), 1000);
        let mut both = Division::new(1000, &[(Fast, 10), (Big, 300), (Big, 100)]);
        let each = [both.of(Fast, 10), both.of(Big, 300), both.of(Big, 100)];
        assert_eq!(each, [750, 187, 62]);
    }

    #[test]
    fn the_first_device_of_another_tier_brings_that_tiers_part() {
        let mut division = Division::new(1000, &[(Fast, 10)]);
        assert_eq!((division.of(Big, 5000), division.of(Big, 2500)), (250, 125));
        assert_eq!(division.of(Fast, 20), 2000);
    }
}
