//! What is known of a block when it is used: the class that its worth is asked for.
//!
//! ```text
//!   class = cost 5 x  kind 4     x  uses 4       x  length 8
//!                     the writer's  before this     logarithm of the
//!                     number        one             request's blocks
//!           │        └────────────── habit, 128 ────────────────────┘
//!           │           when do such blocks come back? learned (`ReuseModel`)
//!           └─ what does a hit save? said by the writer (`CostScale`)
//! ```
//!
//! What must always be true: of a block whose writer said nothing, kind and cost are the defaults,
//! and every figure is what it would be if nobody could say anything.

use crate::cost::{COSTS, Cost};

/// Kinds of traffic that reuse is learned apart for: 0 is not said, 3 is 3 and above. An index
/// entry has two bits for it; with more, each would be learned from less.
pub const KINDS: usize = 4;
/// Values of uses, kind and length together: what reuse is counted by.
pub const HABITS: usize = KINDS * HABITS_OF_KIND;
/// Of one kind: four counts of uses by eight lengths.
pub(crate) const HABITS_OF_KIND: usize = USES * LENGTHS;
/// Values of [`BlockClass`].
pub const CLASSES: usize = HABITS * COSTS;
pub(crate) const USES: usize = 4;
pub(crate) const LENGTHS: usize = 8;

/// A kind of traffic, as the writer told it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind(u8);

impl Kind {
    /// Of the number that a writer gave its traffic; 0: not said.
    #[must_use]
    pub fn of(traffic_class: u8) -> Self {
        Self(traffic_class.min(KINDS as u8 - 1))
    }

    /// As a number below [`KINDS`]: what an index entry keeps in two bits.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }
}

/// What is known of a block when it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockClass {
    cost: Cost,
    habit: u8,
}

impl BlockClass {
    /// A block used `uses` times before (3 stands for more), by a request of so many blocks, of
    /// which its writer said nothing.
    ///
    /// Both tell a lot: a shared head comes back surely, a fresh block seldom; a prompt of one
    /// block never grows into a conversation, and one at the model's limit cannot grow any more.
    #[must_use]
    pub fn new(uses: u8, request_blocks: u32) -> Self {
        let length = request_blocks.max(1).ilog2().min(LENGTHS as u32 - 1);
        Self::from_parts(uses, length as u8)
    }

    /// The same, of this kind.
    #[must_use]
    pub fn of_kind(self, kind: Kind) -> Self {
        let habit = self.habit % HABITS_OF_KIND as u8 + kind.0 * HABITS_OF_KIND as u8;
        Self { habit, ..self }
    }

    /// The same, at this cost.
    #[must_use]
    pub fn at_cost(self, cost: Cost) -> Self {
        Self { cost, ..self }
    }

    /// Uses before the last one, saturating.
    #[must_use]
    pub fn uses(self) -> u8 {
        self.habit % HABITS_OF_KIND as u8 / LENGTHS as u8
    }

    /// The most blocks a request of this class has, but for the longest class.
    #[must_use]
    pub fn request_blocks_max(self) -> u32 {
        (2 << self.length()) - 1
    }

    /// What kind of traffic it is of.
    #[must_use]
    pub fn kind(self) -> Kind {
        Kind(self.habit / HABITS_OF_KIND as u8)
    }

    /// What a hit saves.
    #[must_use]
    pub fn cost(self) -> Cost {
        self.cost
    }

    /// The logarithm of the request's blocks, 0 to 7: what an index entry keeps in three bits.
    #[must_use]
    pub fn length(self) -> u8 {
        self.habit % LENGTHS as u8
    }

    /// From the two figures that an index entry keeps; more than they hold is taken modulo.
    #[must_use]
    pub fn from_parts(uses: u8, length: u8) -> Self {
        let habit = uses.min(USES as u8 - 1) * LENGTHS as u8 + length % LENGTHS as u8;
        let cost = Cost::default();
        Self { cost, habit }
    }

    /// What reuse is counted by: a number below [`HABITS`].
    #[must_use]
    pub fn habit(self) -> usize {
        usize::from(self.habit)
    }

    /// As a number below [`CLASSES`].
    #[must_use]
    pub fn number(self) -> usize {
        self.cost.number() * HABITS + self.habit()
    }

    /// The class of a [`number`](Self::number); too large a one is taken modulo [`CLASSES`].
    #[must_use]
    pub fn from_number(number: usize) -> Self {
        Self {
            cost: Cost::from_number(number / HABITS % COSTS),
            habit: (number % HABITS) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_known_by_its_number_and_its_parts() {
        for number in 0..CLASSES {
            let class = BlockClass::from_number(number);
            assert_eq!(class.number(), number);
            let parts = BlockClass::from_parts(class.uses(), class.length());
            assert_eq!(parts.of_kind(class.kind()).at_cost(class.cost()), class);
        }
    }

    #[test]
    fn a_writer_that_says_nothing_gets_the_defaults() {
        let class = BlockClass::new(2, 9);
        assert_eq!(class, class.of_kind(Kind::of(0)).at_cost(Cost::default()));
        assert_eq!(class.cost().weight(), 1.0);
        assert_eq!(Kind::of(3), Kind::of(255));
        assert_ne!(Kind::of(1), Kind::of(2));
    }
}
