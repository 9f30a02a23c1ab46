//! What goes wrong with the disk of a run: by chance, for a while, or at the bytes of one block.

use super::{Shape, Temper};
use crate::dice::Dice;
use crate::world::{Violation, World};
use kvar_io::sim::{Fault, FaultKind, FaultOn, FaultRates};

/// How often, in a million operations, each kind of fault strikes.
pub(super) fn rates(temper: Temper, dice: &mut Dice) -> FaultRates {
    let none = FaultRates::default();
    let ppm = dice.pick(&[300, 1000, 3000, 10_000]);
    match temper {
        Temper::Well | Temper::Leave | Temper::Full | Temper::Aimed => none,
        Temper::Misread => FaultRates {
            read_flip_ppm: ppm,
            read_misdirect_ppm: ppm,
            read_error_ppm: ppm,
            read_short_ppm: ppm,
            ..none
        },
        Temper::Miswrite => FaultRates {
            write_flip_ppm: ppm,
            write_misdirect_ppm: ppm,
            write_lost_ppm: ppm,
            ..none
        },
        Temper::Refuse => FaultRates {
            write_error_ppm: ppm,
            write_short_ppm: ppm,
            write_no_space_ppm: ppm,
            flush_error_ppm: ppm,
            ..none
        },
        Temper::Lie => FaultRates {
            flush_lost_ppm: 20 * ppm,
            ..none
        },
        Temper::Slow => FaultRates {
            late_ppm: 10 * ppm,
            ..none
        },
        Temper::All => FaultRates {
            read_flip_ppm: ppm / 2,
            read_misdirect_ppm: ppm / 2,
            read_error_ppm: ppm / 2,
            read_short_ppm: ppm / 2,
            write_flip_ppm: ppm / 2,
            write_misdirect_ppm: ppm / 2,
            write_error_ppm: ppm / 2,
            write_short_ppm: ppm / 2,
            write_no_space_ppm: ppm / 2,
            write_lost_ppm: ppm / 2,
            flush_lost_ppm: ppm,
            flush_error_ppm: ppm,
            late_ppm: ppm,
        },
    }
}

/// Trouble that lasts: `trouble` is how many steps of it are left.
pub(super) fn strike(
    world: &mut World,
    dice: &mut Dice,
    shape: &Shape,
    trouble: u64,
) -> Result<u64, Violation> {
    if trouble > 1 {
        return Ok(trouble - 1);
    }
    if trouble == 1 {
        world.disk.clear_faults();
        world.disk.release_stuck();
        world.tally.count(match shape.temper {
            Temper::Leave => "fault/device came back",
            _ => "fault/trouble over",
        });
        return Ok(0);
    }
    if !dice.once_in(80) {
        return Ok(0);
    }
    let all = |world: &World, kind: FaultKind, on: &[FaultOn]| {
        for on in on {
            world.disk.inject(Fault::always(kind, *on));
        }
    };
    let everything = [FaultOn::Read, FaultOn::Write, FaultOn::Flush];
    match shape.temper {
        Temper::Leave => {
            world.tally.count("fault/device vanished");
            all(world, FaultKind::Error, &everything);
            Ok(dice.between(20, 300))
        }
        Temper::Full => {
            world.tally.count("fault/file system full");
            all(world, FaultKind::NoSpace, &[FaultOn::Write]);
            Ok(dice.between(20, 300))
        }
        Temper::Slow => {
            // Reads above all: what they read must stay while everything else goes on.
            let on = dice.pick(&[FaultOn::Read, FaultOn::Read, FaultOn::Write, FaultOn::Flush]);
            for _ in 0..dice.between(1, 6) {
                world.disk.inject(Fault::once(FaultKind::Stuck, on));
            }
            Ok(dice.between(10, 400))
        }
        Temper::Aimed | Temper::All => {
            aim(world, dice);
            Ok(0)
        }
        _ => Ok(0),
    }
}

/// One fault at the bytes of one block.
fn aim(world: &mut World, dice: &mut Dice) {
    let Some(bytes) = world.place_of_some_block(dice.roll()) else {
        return;
    };
    let pages = (bytes.end - bytes.start) / 4096;
    let page = bytes.start + dice.below(pages.max(1)) * 4096;
    match dice.below(3) {
        0 => {
            let sector = page + dice.below(8) * 512;
            world
                .disk
                .corrupt(sector..sector + 512, 1 + dice.below(9) as u32);
            world.tally.count("fault/sector corrupted");
        }
        1 => {
            let kind = dice.pick(&[
                FaultKind::FlipBits(1),
                FaultKind::FlipBits(40),
                FaultKind::Misdirect,
                FaultKind::Error,
                FaultKind::Short,
            ]);
            let fault = Fault::once(kind, FaultOn::Read);
            world.disk.inject(fault.within(page..page + 4096));
        }
        _ => {
            let kind = dice.pick(&[FaultKind::FlipBits(1), FaultKind::Lost, FaultKind::Short]);
            let fault = Fault::once(kind, FaultOn::Write);
            world.disk.inject(fault.within(page..page + 4096));
        }
    }
}
