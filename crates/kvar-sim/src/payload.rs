//! The bytes of a put: a function of block, nonce and section, so that bytes read can be told to be
//! exactly one put and no mix of two.
//!
//! ```text
//!  section   nonce 8 | block number 8 | section 8 | numbers of the dice ...
//! ```

use crate::dice::Dice;
use kvar_base::{BlockId, PAGE_BYTES, page_round_up};

/// Entries that a page of section directory holds; see `docs/internals/disk.md`.
const SECTIONS_PER_PAGE: u64 = 84;

/// The id of a block.
pub(crate) fn id(salt: u64, number: u64) -> BlockId {
    let mut dice = Dice::new(salt ^ number << 16);
    let mut bytes = [0; 32];
    for part in bytes.chunks_mut(8) {
        part.copy_from_slice(&dice.roll().to_le_bytes());
    }
    BlockId::new(bytes)
}

/// The bytes of one section of a put.
pub(crate) fn section(number: u64, nonce: u64, section: usize, len: u32) -> Vec<u8> {
    let len = len as usize;
    let mut bytes = Vec::with_capacity(len + 24);
    for head in [nonce, number, section as u64] {
        bytes.extend_from_slice(&head.to_le_bytes());
    }
    let mut dice = Dice::new(number ^ nonce.rotate_left(20) ^ (section as u64) << 50);
    while bytes.len() < len {
        bytes.extend_from_slice(&dice.roll().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Bytes such a put takes in memory and on the device.
pub(crate) fn stored_bytes(lengths: &[u32]) -> u64 {
    let payload: u64 = lengths
        .iter()
        .map(|len| page_round_up(u64::from(*len)))
        .sum();
    let directory = if lengths.len() > 1 {
        (lengths.len() as u64).div_ceil(SECTIONS_PER_PAGE) * PAGE_BYTES
    } else {
        0
    };
    payload + directory
}

/// Section lengths: mostly small, so that little time goes into bytes; now and then up to
/// `section_bytes_max`.
pub(crate) fn lengths(dice: &mut Dice, section_bytes_max: u64) -> Vec<u32> {
    let sections = match dice.below(12) {
        0..8 => 1,
        8..11 => dice.between(2, 5),
        _ => dice.between(2, 20),
    };
    (0..sections)
        .map(|_| {
            let len = match dice.below(16) {
                0..4 => dice.between(1, 9000),
                4..8 => PAGE_BYTES,
                8..12 => 4 * PAGE_BYTES,
                12..15 => dice.between(8, 30_000),
                _ => dice.between(1, section_bytes_max),
            };
            (len.min(section_bytes_max) / if sections > 5 { 4 } else { 1 }).max(1) as u32
        })
        .collect()
}
