//! The calls of a run, one at a time.
//!
//! What must always be true: what is called is decided by the dice and by what the oracle knows,
//! never by what the store answered in time.

use super::Shape;
use crate::churn::NAMESPACE_BLOCKS;
use crate::dice::Dice;
use crate::payload;
use crate::world::{PutEnd, Violation, WantedPut, World};
use kvar_base::Moment;
use std::time::Duration;

impl Shape {
    /// A block, one of the first `below` of any namespace.
    fn number(&self, dice: &mut Dice, below: u64) -> u64 {
        let number = dice.below(below);
        if self.namespaces == 1 {
            return number;
        }
        dice.below(self.namespaces) * NAMESPACE_BLOCKS + number
    }
}

/// Puts, and removes, more than fits; some blocks are read now and then and so stay.
pub(crate) fn fill(world: &mut World, dice: &mut Dice, shape: &Shape) -> Result<(), Violation> {
    let numbers = shape.numbers;
    let bytes_wanted = world.superblock.device_bytes * 5 / 4;
    let mut bytes = 0;
    while bytes < bytes_wanted {
        let number = shape.number(dice, numbers);
        let len = dice.between(1000, 100_000);
        let wanted = WantedPut {
            number,
            writer: 1,
            lengths: vec![len as u32],
            durable: false,
            ephemeral: false,
            ttl_s: None,
            patience: Duration::from_secs(60),
        };
        if world.begin_put(wanted)? {
            world.end_put(0, PutEnd::Commit)?;
            bytes += len;
        } else {
            world.remove(&[number])?;
        }
        if dice.once_in(2) {
            world.get(
                shape.number(dice, numbers.div_ceil(6)),
                None,
                Moment(u64::MAX),
            )?;
        }
        world.turn(Duration::from_millis(dice.below(8)))?;
    }
    Ok(())
}

/// One call, or a moment of nothing.
pub(crate) fn step(world: &mut World, dice: &mut Dice, shape: &Shape) -> Result<(), Violation> {
    // Some blocks are wanted more than others.
    let number = if dice.once_in(2) {
        shape.number(dice, shape.numbers)
    } else {
        shape.number(dice, shape.numbers.div_ceil(8))
    };
    let what = dice.below(100);
    if dice.below(100) < shape.promises && !world.model.lenient {
        promise(world, dice, shape)?;
    }
    match dice.below(100) {
        0..88 if what < shape.puts => put(world, dice, shape, number)?,
        0..88 => get(world, dice, number)?,
        88..90 => {
            let count = dice.between(1, 3);
            let numbers: Vec<u64> = (0..count)
                .map(|_| shape.number(dice, shape.numbers))
                .collect();
            world.remove(&numbers)?;
        }
        90..92 => world.flush()?,
        92..95 => {
            let count = dice.between(1, 12);
            let first = shape.number(dice, shape.numbers);
            let numbers: Vec<u64> = (first..first + count).collect();
            world.lookup(&numbers)?;
        }
        95 => world.stat(number)?,
        96 if dice.once_in(8) => {
            // Long enough for leases and lives to end.
            let ms = dice.pick(&[600, 2500, 2500, 40_000]);
            world.turn(Duration::from_millis(ms))?;
        }
        97 if shape.purges && dice.once_in(20) => {
            // All, or what one of several tenants has.
            let whose = world.tenancy.of(number);
            world.purge((number % 3 > 0).then_some(whose))?;
        }
        97 => world.let_go()?,
        96 => world.stat(number)?,
        _ => world.turn(Duration::from_millis(dice.below(60)))?,
    }
    if !world.open_puts.is_empty() && (world.open_puts.len() > 6 || dice.once_in(2)) {
        let at = dice.below(world.open_puts.len() as u64) as usize;
        let how = match dice.below(40) {
            0 => PutEnd::Abort,
            1 => PutEnd::WrongByte,
            _ => PutEnd::Commit,
        };
        world.end_put(at, how)?;
    }
    if dice.once_in(2) {
        world.turn(Duration::from_micros(dice.below(shape.step_us_max)))?;
    }
    Ok(())
}

/// Something about leases or the clock.
fn promise(world: &mut World, dice: &mut Dice, shape: &Shape) -> Result<(), Violation> {
    let standing = world.model.promises.standing();
    let token = match dice.below(3) {
        0 if !standing.is_empty() => dice.pick(&standing),
        _ => dice.roll(),
    };
    let ttl = Duration::from_millis(dice.pick(&[20, 50, 500, 2000, 2000, 10_000, 30_000, 90_000]));
    match dice.below(12) {
        0..8 => {
            let count = dice.between(1, 12) as usize;
            let first = shape.number(dice, shape.numbers);
            let mut numbers = world.some_that_are_there(first, count);
            if dice.once_in(3) {
                numbers.push(shape.number(dice, shape.numbers));
            }
            if dice.once_in(20) {
                numbers.extend(numbers.first().copied());
            }
            world.lease(token, dice.between(1, 4), &numbers, ttl)
        }
        8 => world.renew(token, ttl),
        9 => world.release(token),
        _ => {
            let (now, by) = (world.unix_s(), dice.pick(&[1, 2, 30, 120, 4000]));
            let unix_s = if dice.once_in(2) { now + by } else { now - by };
            world.set_wall_clock(unix_s)
        }
    }
}

fn put(world: &mut World, dice: &mut Dice, shape: &Shape, number: u64) -> Result<(), Violation> {
    let block_bytes_max = world.superblock.block_bytes_max();
    let section_bytes_max = shape.section_bytes_max.min(block_bytes_max);
    let mut lengths = payload::lengths(dice, section_bytes_max);
    match dice.below(200) {
        0 => lengths = vec![block_bytes_max as u32; 2],
        1 => lengths.push(0),
        _ => {
            while lengths.iter().map(|len| u64::from(*len)).sum::<u64>() > block_bytes_max {
                lengths.pop();
            }
        }
    }
    let patience = match dice.below(60) {
        0 => Duration::ZERO,
        1 => Duration::from_micros(1),
        _ => Duration::from_secs(3600),
    };
    let ttl_s = (shape.expiring > 0 && dice.once_in(shape.expiring))
        .then(|| dice.pick(&[1, 1, 2, 5, 60, 3600]));
    let wanted = WantedPut {
        number,
        writer: dice.between(1, 5),
        lengths,
        durable: dice.once_in(20),
        ephemeral: dice.once_in(25),
        ttl_s,
        patience,
    };
    let comes = world.begin_put(wanted)?;
    if comes && !dice.once_in(4) {
        let at = world.open_puts.len() - 1;
        world.end_put(at, PutEnd::Commit)?;
    }
    Ok(())
}

fn get(world: &mut World, dice: &mut Dice, number: u64) -> Result<(), Violation> {
    let sections = match dice.below(8) {
        0 => world.sections_of(number).map(|count| {
            let first = dice.below(u64::from(count)) as u16;
            first..dice.between(u64::from(first) + 1, u64::from(count)) as u16
        }),
        1 if dice.once_in(20) => Some(900..901),
        _ => None,
    };
    let deadline = if dice.once_in(100) {
        Moment(0)
    } else {
        Moment(u64::MAX)
    };
    world.get(number, sections, deadline)
}

impl World {
    fn sections_of(&self, number: u64) -> Option<u16> {
        let block = self.model.blocks.get(&number)?;
        match block.now {
            crate::model::Now::Known(nonce) => {
                let count = block.put(nonce)?.lengths.len() as u16;
                (count > 1).then_some(count)
            }
            _ => None,
        }
    }
}
