//! A store written over many times by three namespaces, with everything that happens in a long life:
//! removes, times to live, leases, the scrub, ends of every kind, a device lost and replaced.
//!
//! What must always be true: after every round all calls are answered, every block is what the
//! oracle says, and the store holds no more memory than it did early on.

use crate::dice::Dice;
use crate::scenario::{Ran, Shape, Temper, build, fill, ran, step};
use crate::world::{Replacement, Restart, Tenancy, Violation, World};
use kvar_io::sim::{FaultRates, Survival};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// Namespaces, and how far apart the numbers of their blocks are.
const NAMESPACES: u64 = 3;
pub(crate) const NAMESPACE_BLOCKS: u64 = 1 << 32;
/// Calls of a round beside those that fill the device.
const STEPS: u64 = 150;
/// Turnovers after which memory may not grow any more.
const WARM_TURNOVERS: u64 = 3;
/// By how much, in percent: index and arena are of fixed size, what is left are the times at which
/// blocks expire, and these follow how many happen to.
const GROWTH_PERCENT: u64 = 25;

/// Writes a store over `turnovers` times, and looks each time whether everything comes to rest,
/// memory comes back and counters agree.
#[must_use]
pub fn churn(seed: u64, turnovers: u64) -> Ran {
    let mut dice = Dice::new(seed);
    let (mut world, shape) = build(seed, Temper::Well, &mut dice);
    world.config.scrub_bytes_per_s = 1 << 30;
    world.tenancy = Tenancy::ByNamespace;
    let shape = Shape {
        numbers: 300,
        namespaces: NAMESPACES,
        puts: 60,
        expiring: 4,
        promises: 4,
        purges: false,
        ..shape
    };
    let result = catch_unwind(AssertUnwindSafe(|| {
        rounds(&mut world, &mut dice, &shape, turnovers)
    }));
    ran(seed, Temper::Well, &mut world, result)
}

fn rounds(
    world: &mut World,
    dice: &mut Dice,
    shape: &Shape,
    turnovers: u64,
) -> Result<(), Violation> {
    let device_bytes = world.superblock.device_bytes;
    let (mut round, mut warm_bytes, mut written_before) = (0, 0, 0);
    loop {
        let written = written_before + world.written_bytes();
        if written >= turnovers * device_bytes {
            break;
        }
        fill(world, dice, shape)?;
        for _ in 0..STEPS {
            step(world, dice, shape)?;
        }
        world.settle()?;
        world.audit()?;
        world.settle()?;
        let held_bytes = world.held_bytes();
        if written < WARM_TURNOVERS * device_bytes {
            warm_bytes = warm_bytes.max(held_bytes);
        } else if held_bytes > warm_bytes + warm_bytes / 100 * GROWTH_PERCENT {
            return Err(Violation(format!(
                "the store holds {held_bytes} bytes after {round} rounds, and {warm_bytes} early on"
            )));
        }
        world.tally.count("churn/round");
        round += 1;
        match round % 7 {
            3 => {
                written_before += world.written_bytes();
                world.replace_device(Replacement::New)?;
            }
            5 if world.has_old_device() => {
                written_before += world.written_bytes();
                world.return_old_device()?;
                written_before -= world.written_bytes();
            }
            6 => {
                world.restart(Restart::Clean, FaultRates::default())?;
                world.scrub_finds_what_rots(dice.roll())?;
                world.settle()?;
            }
            _ => {
                let how = match dice.below(3) {
                    0 => Restart::Clean,
                    1 => Restart::Kill,
                    _ => Restart::PowerCut(Survival::Random { seed: dice.roll() }),
                };
                world.restart(how, FaultRates::default())?;
            }
        }
        world.turn(Duration::from_millis(1))?;
    }
    world.tally.add("churn/turnovers", turnovers);
    world.settle()?;
    world.audit()
}
