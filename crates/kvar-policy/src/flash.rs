//! What earns a place on flash, and what keeps it: one measure, one threshold.
//!
//! A place in the log is taken for one turnover, whatever becomes of the block. So a block's worth
//! there is the chance that it is used within a turnover from now, counted as often as a hit saves
//! more than on the average ([`Cost`](crate::Cost)), and both questions are one:
//!
//! ```text
//!   leaves memory, not on flash yet  ── worth > the lesser of threshold and ADMITTED ──┬── written
//!   its segment is to be reclaimed   ── worth > threshold ─────────────────────────────┴─ or gone
//! ```
//!
//! The threshold is not a setting. It is moved after every reclaim, so that of what is reclaimed a
//! stated share ([`KEPT_SHARE_TARGET`]) stays: higher while more would stay, lower while less. So
//! write amplification is a choice (1.33 in the long run), and the threshold finds itself on any traffic. While
//! nothing is reclaimed it falls by half in each turnover: a log nobody writes to grows stale.
//!
//! Of what leaves memory it asks less: few new blocks make long turnovers, in which most blocks
//! return, so that a threshold for both rises until hardly anything new is let in. A log that keeps
//! what is old against what is new loses up to 4 points to plain recency.
//!
//! What must always be true: of many segments at most [`KEPT_SHARE_MAX`](crate::KEPT_SHARE_MAX)
//! stays, and of few at most two whole ones more (prompts fill several, and a prompt that is cut
//! loses what is behind the cut: an engine holds a free segment more in reserve for this); while the log has never been full everything is written.

use crate::class::BlockClass;
use crate::reclaim::KEPT_SHARE_MAX;
use crate::reuse::ReuseModel;
use crate::share::Tenant;

/// Of what is reclaimed this share stays in the long run: write amplification 1.33. With 0.4 (1.7)
/// prompts that come back late and at random lose up to 3 points: what is kept is taken from
/// what is new.
pub const KEPT_SHARE_TARGET: f64 = 0.25;
/// A chance that is always enough to be written when memory lets go: see above.
const ADMITTED: f64 = 0.2;
/// How much more the first block of a prompt counts than its last: without the head the tail is of
/// no use, and a head that misses the threshold by a hair leaves the tail behind as waste.
const HEAD_BONUS: f64 = 0.5;
/// A reclaim that kept everything moves the threshold by e to so much, divided by the number of
/// segments: within a turnover it can move by a factor of e.
const GAIN: f64 = 2.0;
const THRESHOLD_FIRST: f64 = THRESHOLD_MIN;
/// Bounds of the threshold. A chance beyond 0.9 is certainty here. Where little returns, no place
/// is given to what is used less often than once in seven times: with 0.2 large stores lose a quarter
/// of a point, with 0.1 they write up to a tenth more for the same hits.
const THRESHOLD_MIN: f64 = 0.15;
const THRESHOLD_MAX: f64 = 0.9;
/// Segments' worth of keeping that may be saved up, for a prompt that fills several segments.
const SAVED_SEGMENTS_MAX: f64 = 2.0;

/// A block that asks for a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asking {
    /// Whose it is.
    pub tenant: Tenant,
    /// Its class at its last use.
    pub class: BlockClass,
    /// Bytes of demand since then.
    pub age: u64,
    /// Its position in its prompt.
    pub depth: u32,
}

/// Decides who gets a place on flash.
#[derive(Clone, Debug)]
pub struct FlashKeeper {
    threshold: f64,
    segments: u64,
    segment_bytes: u64,
    /// Demand at the last reclaim; `None` before the first.
    reclaimed_at: Option<u64>,
    turnover: u64,
    budget_bytes: f64,
    kept_bytes: u64,
    /// Of these, kept for tenants within their parts: nothing was asked about their worth.
    entitled_bytes: u64,
}

impl FlashKeeper {
    /// For a log of so many segments (at least 1) of so many payload bytes.
    #[must_use]
    pub fn new(segments: u64, segment_bytes: u64) -> Self {
        Self {
            threshold: THRESHOLD_FIRST,
            segments: segments.max(1),
            segment_bytes,
            reclaimed_at: None,
            turnover: 0,
            budget_bytes: 0.0,
            kept_bytes: 0,
            entitled_bytes: 0,
        }
    }

    /// Says how old the log's oldest segment is, in bytes of demand: the time that a block written
    /// now will have. Call before [`is_worth`](Self::is_worth).
    pub fn set_turnover(&mut self, turnover: u64) {
        self.turnover = turnover;
    }

    /// What a place is worth to a block, comparable with the threshold.
    #[must_use]
    pub fn worth(&self, model: &ReuseModel, block: &Asking) -> f64 {
        let length = f64::from(
            block
                .class
                .request_blocks_max()
                .max(block.depth.saturating_add(1)),
        );
        let from_tail = 1.0 - (f64::from(block.depth) + 0.5) / length;
        let chance = model
            .of(block.tenant)
            .chance(block.class, block.age, self.turnover);
        chance * block.class.cost().weight() * (1.0 + HEAD_BONUS * from_tail)
    }

    /// Whether a block that leaves memory is to be written, at `now` bytes of demand.
    #[must_use]
    pub fn is_worth(&self, model: &ReuseModel, block: &Asking, now: u64) -> bool {
        let Some(reclaimed_at) = self.reclaimed_at else {
            return true;
        };
        let idle = now.saturating_sub(reclaimed_at) as f64 / self.turnover.max(1) as f64;
        self.worth(model, block) > self.threshold.min(ADMITTED) * (-idle).exp2()
    }

    /// A segment is about to be reclaimed. Then [`keeps`](Self::keeps) is asked about its live
    /// blocks, those of the greatest [`worth`](Self::worth) first, heads before tails.
    pub fn begin_reclaim(&mut self) {
        let segment = self.segment_bytes as f64;
        self.budget_bytes =
            (self.budget_bytes + segment * KEPT_SHARE_MAX).min(segment * SAVED_SEGMENTS_MAX);
        (self.kept_bytes, self.entitled_bytes) = (0, 0);
    }

    /// Whether a live block of this worth and size is to be written again.
    pub fn keeps(&mut self, worth: f64, bytes: u64) -> bool {
        let kept_bytes = self.kept_bytes.saturating_add(bytes);
        let fits = kept_bytes <= self.segment_bytes && bytes as f64 <= self.budget_bytes;
        if worth <= self.threshold || !fits {
            return false;
        }
        self.kept_bytes = kept_bytes;
        self.budget_bytes -= bytes as f64;
        true
    }

    /// Whether a live block stays whose tenant is within its part: whatever it is worth, and on the
    /// account of reclaims to come. What such tenants hold may lie in one piece, so that whole
    /// segments stay; over a turnover it is no more than what may be kept of it.
    pub fn keeps_entitled(&mut self, bytes: u64) -> bool {
        let kept_bytes = self.kept_bytes.saturating_add(bytes);
        let debt_max = self.segment_bytes as f64 * self.segments as f64 * (1.0 - KEPT_SHARE_MAX);
        if kept_bytes > self.segment_bytes || self.budget_bytes - (bytes as f64) < -debt_max {
            return false;
        }
        self.kept_bytes = kept_bytes;
        self.entitled_bytes += bytes;
        self.budget_bytes -= bytes as f64;
        true
    }

    /// The last block was asked about: the threshold moves, by what was asked about its worth.
    pub fn end_reclaim(&mut self, now: u64) {
        let asked_bytes = self.segment_bytes.saturating_sub(self.entitled_bytes);
        let kept_bytes = self.kept_bytes - self.entitled_bytes;
        if asked_bytes == 0 {
            self.reclaimed_at = Some(now);
            return;
        }
        let share = kept_bytes as f64 / asked_bytes as f64;
        let step = (share - KEPT_SHARE_TARGET) * GAIN / self.segments as f64;
        self.threshold = (self.threshold * step.exp()).clamp(THRESHOLD_MIN, THRESHOLD_MAX);
        self.reclaimed_at = Some(now);
    }

    /// The threshold, to be shown.
    #[must_use]
    pub fn threshold(&self) -> f64 {
        self.threshold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 16;

    fn keeper() -> FlashKeeper {
        FlashKeeper::new(4, SEGMENT)
    }

    /// Reclaims a segment of 16 blocks of one byte and of these worths; how many stay.
    fn reclaim(keeper: &mut FlashKeeper, worths: impl Iterator<Item = f64>, now: u64) -> usize {
        keeper.begin_reclaim();
        let kept = worths.filter(|worth| keeper.keeps(*worth, 1)).count();
        keeper.end_reclaim(now);
        kept
    }

    #[test]
    fn the_threshold_finds_the_stated_share_on_any_traffic() {
        for scale in [0.5, 0.8, 1.0] {
            let mut keeper = keeper();
            let kept: usize = (0..400)
                .map(|now| {
                    let worths = (0..16).rev().map(|rank| scale * f64::from(rank) / 16.0);
                    let kept = reclaim(&mut keeper, worths, now);
                    if now < 200 { 0 } else { kept }
                })
                .sum();
            let share = kept as f64 / (200 * 16) as f64 - KEPT_SHARE_TARGET;
            assert!(share.abs() < 0.06, "{share} off, at {scale}");
        }
    }

    #[test]
    fn in_the_long_run_a_quarter_goes_whatever_it_is_worth() {
        let mut keeper = keeper();
        let kept: Vec<usize> = (0..40)
            .map(|now| reclaim(&mut keeper, std::iter::repeat_n(1.0, 20), now))
            .collect();
        assert!(kept.iter().all(|kept| *kept <= 16), "{kept:?}");
        assert!(kept.iter().sum::<usize>() <= 40 * 12 + 16, "{kept:?}");
        assert!(kept.contains(&12), "{kept:?}");
        assert_eq!(keeper.threshold(), THRESHOLD_MAX);
    }

    #[test]
    fn what_tenants_are_entitled_to_stays_in_one_piece_and_is_paid_for_later() {
        let mut keeper = FlashKeeper::new(8, SEGMENT);
        let mut reclaim = |entitled: u64, worth: f64| {
            keeper.begin_reclaim();
            let stay = (0..entitled).filter(|_| keeper.keeps_entitled(1)).count();
            let kept = (entitled..SEGMENT)
                .filter(|_| keeper.keeps(worth, 1))
                .count();
            keeper.end_reclaim(0);
            (stay, kept)
        };
        // Three quarters of the log lie together: they stay whole, the rest pays for it.
        for _ in 0..20 {
            let stayed: usize = (0..6).map(|_| reclaim(SEGMENT, 1.0).0).sum();
            assert_eq!(stayed, 6 * 16);
            assert_eq!(reclaim(0, 1.0).1, 0);
            reclaim(0, 1.0);
        }
        // Nothing makes a log keep more than that for long.
        let stayed: usize = (0..400).map(|_| reclaim(SEGMENT, 1.0).0).sum();
        assert!(stayed <= 400 * 12 + 4 * 16, "{stayed}");
    }

    #[test]
    fn a_log_that_was_never_full_takes_everything_and_an_idle_one_asks_for_less() {
        let model = ReuseModel::new(1000);
        let mut keeper = keeper();
        keeper.set_turnover(1000);
        let block = Asking {
            tenant: Tenant::DEFAULT,
            class: BlockClass::new(0, 1),
            age: 4000,
            depth: 0,
        };
        assert!(keeper.is_worth(&model, &block, 0));
        for now in 0..40 {
            reclaim(&mut keeper, std::iter::repeat_n(1.0, 16), now);
        }
        assert!(!keeper.is_worth(&model, &block, 40));
        assert!(keeper.is_worth(&model, &block, 20_000));
    }

    /// Few new blocks made long turnovers, in which most return: the threshold rose, and kept out more.
    #[test]
    fn what_is_new_is_let_in_however_much_asks_to_stay() {
        let model = ReuseModel::new(1000);
        let mut keeper = keeper();
        keeper.set_turnover(1000);
        for now in 0..40 {
            reclaim(&mut keeper, std::iter::repeat_n(1.0, 16), now);
        }
        let block = Asking {
            tenant: Tenant::DEFAULT,
            class: BlockClass::new(0, 1),
            age: 500,
            depth: 0,
        };
        let worth = keeper.worth(&model, &block);
        assert!(ADMITTED < worth && worth < keeper.threshold(), "{worth}");
        assert!(keeper.is_worth(&model, &block, 40));
        keeper.begin_reclaim();
        assert!(!keeper.keeps(worth, 1));
    }

    #[test]
    fn a_head_is_worth_more_than_its_tail() {
        let model = ReuseModel::new(1000);
        let mut keeper = keeper();
        keeper.set_turnover(1000);
        let worth = |depth| {
            let class = BlockClass::new(0, 40);
            let age = 10;
            keeper.worth(
                &model,
                &Asking {
                    tenant: Tenant::DEFAULT,
                    class,
                    age,
                    depth,
                },
            )
        };
        assert!(worth(0) > worth(20) && worth(20) > worth(39) && worth(39) > worth(39_000) - 1e-9);
        assert!(worth(0) < 1.5 * worth(39));
    }
}
