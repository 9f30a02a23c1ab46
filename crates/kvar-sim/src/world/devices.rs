//! A device that is gone for good, the one that takes its place, and the old one coming back.
//!
//! ```text
//!   in service ── vanishes ──> shelf ── back, nothing was removed meanwhile ──> in service, with its blocks
//!                    │           └───── back, something was ──────────────────> formatted, empty
//!                    └─ a new device, or the same one formatted anew: every block is a miss
//! ```
//!
//! What must always be true: nothing of an older format is ever served; what was removed does not
//! come back with a device that was away (whoever manages devices knows that it is stale).

use super::{Step, World, format_disk, wrong};
use crate::device::Harm;
use crate::model::{Ending, Model};
use kvar_base::Moment;
use kvar_engine::Superblock;
use kvar_io::sim::{FaultRates, SimDisk, SimOptions, Survival};

/// What takes the place of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replacement {
    /// Another one, of zeros.
    New,
    /// The same one, formatted: all the old bytes still lie there.
    Formatted,
}

/// A device that is out of service.
pub(super) struct Shelved {
    disk: SimDisk,
    superblock: Superblock,
    model: Model,
    harm: Harm,
    struck_known: usize,
    /// Something was removed or purged since it left.
    stale: bool,
}

impl World {
    fn leave_device(&mut self) -> Step {
        self.let_go()?;
        self.open_puts.clear();
        self.waiting.clear();
        self.engine = None;
        self.disk.clear_faults();
        self.disk.kill();
        self.disk.set_rates(FaultRates::default());
        self.hear_disk(false);
        Ok(())
    }

    /// A remove or purge was called: what is away does not hear of it.
    pub(super) fn shelf_is_stale(&mut self) {
        if let Some(shelved) = &mut self.shelf {
            shelved.stale = true;
        }
    }

    /// The device is gone, and something takes its place.
    pub(crate) fn replace_device(&mut self, by: Replacement) -> Step {
        self.note(format!("the device is replaced: {by:?}"));
        self.leave_device()?;
        if by == Replacement::New {
            let bytes = self.superblock.device_bytes;
            let disk = SimDisk::new(
                bytes,
                SimOptions {
                    seed: self.salt ^ self.next_nonce << 8,
                    polls_max: self.polls_max,
                    ..SimOptions::default()
                },
            );
            self.shelf = Some(Shelved {
                disk: std::mem::replace(&mut self.disk, disk),
                superblock: self.superblock.clone(),
                model: self.model.clone(),
                harm: self.harm.clone(),
                struck_known: self.struck_known,
                stale: false,
            });
            self.struck_known = 0;
        }
        self.tally.count("device/replaced");
        self.begin_anew()
    }

    /// Formats the device and holds it to be empty.
    fn begin_anew(&mut self) -> Step {
        self.formats += 1;
        self.superblock = format_disk(
            &self.disk,
            self.salt,
            self.formats,
            self.expected_block_bytes,
        );
        self.harm = Harm::default();
        self.model.device_is_gone();
        self.come_up(false)
    }

    fn come_up(&mut self, power_cut: bool) -> Step {
        if let Err(error) = self.open() {
            return wrong(format!(
                "the store does not open although the disk is well: {error}"
            ));
        }
        let ending = Ending {
            power_cut,
            everything_kept: false,
            written_before: None,
            history_lost: self.harm.history_lost,
        };
        let made_room = self.recovery.bucket_evicted;
        self.begin_life(ending, made_room)
    }

    /// Whether a device lies on the shelf.
    pub(crate) fn has_old_device(&self) -> bool {
        self.shelf.is_some()
    }

    /// The device on the shelf takes its place again. What was put on the other one is gone.
    pub(crate) fn return_old_device(&mut self) -> Step {
        let Some(shelved) = self.shelf.take() else {
            return Ok(());
        };
        self.note(format!("the old device is back, stale: {}", shelved.stale));
        self.leave_device()?;
        // It had no power meanwhile.
        let seed = self.salt ^ self.next_nonce;
        self.disk = shelved.disk;
        self.disk.crash(Survival::Random { seed });
        self.struck_known = shelved.struck_known;
        if shelved.stale {
            self.tally.count("device/back, stale");
            return self.begin_anew();
        }
        self.tally.count("device/back, with its blocks");
        let (next_order, unix_s) = (self.model.next_order, self.model.unix_s);
        let lenient = self.model.lenient;
        self.superblock = shelved.superblock;
        self.harm = shelved.harm;
        self.harm.history_lost |= self.harm.flush_lost;
        self.model = shelved.model;
        self.model.next_order = next_order.max(self.model.next_order);
        (self.model.unix_s, self.model.lenient) = (unix_s, lenient);
        self.come_up(true)?;
        // A look at some of them at once.
        let known: Vec<u64> = self.model.blocks.keys().copied().take(20).collect();
        for number in known {
            self.get(number, None, Moment(u64::MAX))?;
        }
        Ok(())
    }
}
