//! What a hit saves: the cost of computing a block again, against that of the others.
//!
//! ```text
//!   microseconds a byte / running mean of what was put
//!        0 ──── 0.35 ──── 0.71 ──── 1.41 ──── 2.83 ────>
//!          1/4       1/2        1         2         4          a hit counts so often
//! ```
//!
//! The steps are few because the order in which memory lets go keeps a list for each, and bounded
//! because a writer's word is only that: one that overstates its costs gets four times the worth,
//! and raises the mean against itself.
//!
//! What must always be true: unknown is average; nothing overflows, whatever was said.

/// Values of [`Cost`].
pub const COSTS: usize = 5;
const AVERAGE: u8 = 2;

/// What a hit on a block saves, in steps of two around the average.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cost(u8);

impl Default for Cost {
    /// Average; also what nobody spoke of.
    fn default() -> Self {
        Self(AVERAGE)
    }
}

impl Cost {
    /// How often a hit counts: 1/4, 1/2, 1, 2 or 4.
    #[must_use]
    pub fn weight(self) -> f64 {
        f64::from(1_u32 << self.0) / f64::from(1_u32 << AVERAGE)
    }

    pub(crate) fn number(self) -> usize {
        usize::from(self.0)
    }

    pub(crate) fn from_number(number: usize) -> Self {
        Self((number % COSTS) as u8)
    }
}

/// The running mean of what blocks cost. It fades by half with each capacity of bytes.
#[derive(Clone, Debug)]
pub struct CostScale {
    half_life_bytes: f64,
    cost_us: f64,
    bytes: f64,
}

impl CostScale {
    /// A scale that has seen nothing, of a store that holds so many bytes (at least 1).
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            half_life_bytes: capacity_bytes.max(1) as f64,
            cost_us: 0.0,
            bytes: 0.0,
        }
    }

    /// A block of so many bytes came, and its writer said what it costs (0: it did not, and
    /// nothing is learned).
    pub fn observe(&mut self, recompute_us: u32, bytes: u64) {
        if recompute_us == 0 || bytes == 0 {
            return;
        }
        let fade = (-(bytes as f64) / self.half_life_bytes).exp2();
        self.cost_us = self.cost_us * fade + f64::from(recompute_us);
        self.bytes = self.bytes * fade + bytes as f64;
    }

    /// Whether anybody said anything yet.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.bytes > 0.0
    }

    /// What a hit on a block of so many bytes saves; 0 microseconds: not known.
    #[must_use]
    pub fn cost(&self, recompute_us: u32, bytes: u64) -> Cost {
        if recompute_us == 0 || bytes == 0 || !self.is_known() {
            return Cost::default();
        }
        let share = f64::from(recompute_us) / bytes as f64 * (self.bytes / self.cost_us);
        let step = share.log2().round() + f64::from(AVERAGE);
        Cost(step.clamp(0.0, (COSTS - 1) as f64) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 1 << 16;

    fn weight(scale: &CostScale, recompute_us: u32) -> f64 {
        scale.cost(recompute_us, BLOCK).weight()
    }

    #[test]
    fn what_nobody_spoke_of_is_average() {
        let mut scale = CostScale::new(1 << 20);
        assert_eq!(weight(&scale, 500), 1.0);
        scale.observe(0, BLOCK);
        assert!(!scale.is_known());
        scale.observe(500, BLOCK);
        assert_eq!((weight(&scale, 0), weight(&scale, 500)), (1.0, 1.0));
        assert_eq!(scale.cost(500, 0), Cost::default());
    }

    #[test]
    fn a_cost_counts_against_the_mean_and_within_bounds() {
        let mut scale = CostScale::new(1 << 30);
        (0..100).for_each(|_| scale.observe(1000, BLOCK));
        let weights =
            [1, 250, 500, 720, 1000, 1400, 2000, 4000, u32::MAX].map(|us| weight(&scale, us));
        assert_eq!(weights, [0.25, 0.25, 0.5, 1.0, 1.0, 1.0, 2.0, 4.0, 4.0]);
        // Twice the bytes for the same time are half as dear.
        assert_eq!(scale.cost(1000, 2 * BLOCK).weight(), 0.5);
    }

    #[test]
    fn the_mean_follows_what_is_put_within_a_few_capacities() {
        let mut scale = CostScale::new(16 * BLOCK);
        (0..100).for_each(|_| scale.observe(100, BLOCK));
        assert_eq!(weight(&scale, 800), 4.0);
        (0..64).for_each(|_| scale.observe(800, BLOCK));
        assert_eq!(weight(&scale, 800), 1.0);
        assert_eq!(weight(&scale, 100), 0.25);
    }

    #[test]
    fn nothing_that_can_be_said_breaks_it() {
        for bytes in [1, BLOCK, u64::MAX] {
            for us in [1, 7, u32::MAX] {
                let mut scale = CostScale::new(0);
                scale.observe(us, bytes);
                for (other_us, other_bytes) in [(1, u64::MAX), (u32::MAX, 1), (us, bytes)] {
                    let weight = scale.cost(other_us, other_bytes).weight();
                    assert!((0.25..=4.0).contains(&weight));
                }
                assert_eq!(scale.cost(us, bytes).weight(), 1.0);
            }
        }
    }
}
