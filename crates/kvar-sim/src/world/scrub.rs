//! The scrub is held to what it is for: what rots unseen is found within two passes.

use super::{Step, World, wrong};
use std::time::Duration;

/// Blocks that rot.
const ROTTEN_MAX: usize = 6;
/// Turns within which two passes are over; a pass reads every block of a small device.
const PASS_TURNS: u64 = 60_000;
/// A pass begins a day after the one before.
const A_DAY: Duration = Duration::from_secs(25 * 3600);

impl World {
    /// Right after a clean end and a new start: bytes of some blocks rot, nobody asks for anything,
    /// and the scrub must find them all.
    pub(crate) fn scrub_finds_what_rots(&mut self, pick: u64) -> Step {
        if self.config.scrub_bytes_per_s == 0 || self.harm.history_lost || self.model.lenient {
            return Ok(());
        }
        let mut lying: Vec<(u64, u32)> = self
            .model
            .blocks
            .iter()
            .filter(|(_, block)| block.on_device && !block.in_memory)
            .filter_map(|(number, block)| Some((*number, block.position?)))
            .collect();
        lying.sort_by_key(|(number, _)| (number ^ pick).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        lying.truncate(ROTTEN_MAX);
        let pages = self.superblock.segment_pages();
        for (number, position) in &lying {
            let offset = self
                .superblock
                .offset(0, position / pages, position % pages);
            self.note(format!("block {number} rots at position {position}"));
            // One bit, in what every block has: its first bytes.
            self.disk.corrupt(offset..offset + 1, 1);
        }
        if lying.is_empty() {
            return Ok(());
        }
        self.hear_disk(false);
        let (mut passes, mut turns) = (0, 0);
        while passes < 2 {
            self.turn(Duration::from_millis(40))?;
            let now = self.now;
            let passed = self.engine().status(now).scrub_passes;
            if passed > passes {
                passes = passed;
                self.turn(A_DAY)?;
            }
            turns += 1;
            if turns > PASS_TURNS {
                let status = self.engine().status(now);
                return wrong(format!("the scrub does not get through: {status:?}"));
            }
        }
        self.tally.count("scrub/two passes");
        for (number, position) in lying {
            let block = self.model.block(number);
            if block.on_device && block.position == Some(position) {
                return wrong(format!(
                    "block {number} rotted at position {position} and the scrub went over it twice: {block:?}"
                ));
            }
            self.tally.count("scrub/found what rotted");
        }
        Ok(())
    }
}
