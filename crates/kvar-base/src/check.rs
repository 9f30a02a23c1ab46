//! The checks that keep wrong bytes from being served.
//!
//! ```text
//! content_check = crc64(section payload) ^ fold(id, section index, exact length)
//! check64       = crc64(head)            ^ fold(id, device uuid, segment, generation, offset, length)
//! version       = hash of the content checks in order
//! ```
//!
//! *head* is what an index entry points at: the payload of a block of one section, or the section
//! directory of a block of several (which in turn names every section's content check).
//!
//! Folding by XOR keeps the CRC recoverable: who holds one check and the place can tell the other
//! without touching the bytes again. That is how a block read from a device is served with the
//! content check its writer made, although the index stores only `check64`.

use crate::{BlockId, DeviceUuid};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

const SEED_CONTENT: u64 = 0x6b76_6172_0000_0001;
const SEED_DEVICE: u64 = 0x6b76_6172_0000_0002;
const SEED_VERSION: u64 = 0x6b76_6172_0000_0003;

/// CRC-64/NVME of bytes that may come in pieces. About 9 GB/s from DRAM on one core.
#[derive(Clone, Debug)]
pub struct Crc64(crc_fast::Digest);

impl Default for Crc64 {
    fn default() -> Self {
        Self(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme))
    }
}

impl Crc64 {
    /// Feeds the next piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The CRC of all pieces so far.
    #[must_use]
    pub fn finish(&self) -> u64 {
        self.0.finalize()
    }
}

/// CRC-64/NVME of one contiguous piece.
#[must_use]
pub fn crc64(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

/// What a writer says a section's bytes are; bound to block, section and exact length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContentCheck(pub u64);

impl ContentCheck {
    /// The check of a section whose payload has this CRC.
    #[must_use]
    pub fn from_crc(crc: u64, id: &BlockId, section: u16, len: u32) -> Self {
        Self(crc ^ content_fold(id, section, len))
    }

    /// The check of a section held in one piece.
    #[must_use]
    pub fn of(payload: &[u8], id: &BlockId, section: u16) -> Self {
        let len = u32::try_from(payload.len()).expect("a section is at most 16 MiB");
        Self::from_crc(crc64(payload), id, section, len)
    }

    /// The CRC of the payload that this check was made from.
    #[must_use]
    pub fn crc(self, id: &BlockId, section: u16, len: u32) -> u64 {
        self.0 ^ content_fold(id, section, len)
    }
}

fn content_fold(id: &BlockId, section: u16, len: u32) -> u64 {
    let mut bytes = [0_u8; 38];
    bytes[..32].copy_from_slice(id.as_bytes());
    bytes[32..34].copy_from_slice(&section.to_le_bytes());
    bytes[34..].copy_from_slice(&len.to_le_bytes());
    xxh3_64_with_seed(&bytes, SEED_CONTENT)
}

/// Where on a device a block's stored bytes lie; folded into `check64` so that bytes read from
/// another place, segment generation or device do not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The device.
    pub device: DeviceUuid,
    /// Segment number on that device, counted over all shards.
    pub segment: u32,
    /// How often that segment had been opened when the block was written.
    pub generation: u32,
    /// Byte offset on the device.
    pub offset: u64,
    /// Exact stored length in bytes, padding after the last byte not counted.
    pub len: u32,
}

/// Turns a head's CRC into `check64` and back (it is its own inverse).
#[must_use]
pub fn fold_place(crc_or_check: u64, id: &BlockId, place: &Place) -> u64 {
    let mut bytes = [0_u8; 68];
    bytes[..32].copy_from_slice(id.as_bytes());
    bytes[32..48].copy_from_slice(place.device.as_bytes());
    bytes[48..52].copy_from_slice(&place.segment.to_le_bytes());
    bytes[52..56].copy_from_slice(&place.generation.to_le_bytes());
    bytes[56..64].copy_from_slice(&place.offset.to_le_bytes());
    bytes[64..].copy_from_slice(&place.len.to_le_bytes());
    crc_or_check ^ xxh3_64_with_seed(&bytes, SEED_DEVICE)
}

/// The version of a copy: two copies with equal version hold equal bytes.
#[must_use]
pub fn version(checks: impl IntoIterator<Item = ContentCheck>) -> u64 {
    let mut checks = checks.into_iter();
    let (first, second) = (checks.next(), checks.next());
    if let (Some(only), None) = (first, second) {
        // What nearly all blocks have. The hash is the same, without its state of half a KiB.
        return xxh3_64_with_seed(&only.0.to_le_bytes(), SEED_VERSION);
    }
    let mut hasher = xxhash_rust::xxh3::Xxh3::with_seed(SEED_VERSION);
    for check in first.into_iter().chain(second).chain(checks) {
        hasher.update(&check.0.to_le_bytes());
    }
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn crc_is_the_nvme_one() {
        assert_eq!(crc64(b"123456789"), 0xae8b_1486_0a79_9888);
    }

    #[test]
    fn pieces_equal_the_whole() {
        let mut crc = Crc64::default();
        crc.update(b"1234");
        crc.update(b"");
        crc.update(b"56789");
        assert_eq!(crc.finish(), crc64(b"123456789"));
    }

    #[test]
    fn the_version_of_one_check_is_the_hash_of_a_list_of_one() {
        for check in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            let mut list = xxhash_rust::xxh3::Xxh3::with_seed(SEED_VERSION);
            list.update(&u64::to_le_bytes(check));
            assert_eq!(version([ContentCheck(check)]), list.digest());
        }
        let both = [ContentCheck(1), ContentCheck(2)];
        assert_ne!(version(both), version([ContentCheck(1)]));
        assert_ne!(version(both), version([ContentCheck(2), ContentCheck(1)]));
    }

    proptest! {
        #[test]
        fn content_check_binds_id_section_and_length(
            a in any::<[u8; 32]>(), b in any::<[u8; 32]>(), section in 0_u16..100, payload: Vec<u8>,
        ) {
            prop_assume!(a != b);
            let (a, b) = (BlockId::new(a), BlockId::new(b));
            let check = ContentCheck::of(&payload, &a, section);
            prop_assert_ne!(check, ContentCheck::of(&payload, &b, section));
            prop_assert_ne!(check, ContentCheck::of(&payload, &a, section + 1));
            let len = payload.len() as u32;
            prop_assert_eq!(check.crc(&a, section, len), crc64(&payload));
            prop_assert_ne!(check.crc(&a, section, len + 1), crc64(&payload));
        }

        #[test]
        fn place_fold_is_an_involution_and_sees_every_field(crc: u64, id: [u8; 32], bit in 0_usize..36 * 8) {
            let id = BlockId::new(id);
            let place = Place { device: DeviceUuid::new([7; 16]), segment: 3, generation: 9, offset: 8192, len: 65536 };
            let check = fold_place(crc, &id, &place);
            prop_assert_eq!(fold_place(check, &id, &place), crc);
            let mut other = place;
            match bit {
                0..128 => {
                    let mut uuid = *place.device.as_bytes();
                    uuid[bit / 8] ^= 1 << (bit % 8);
                    other.device = DeviceUuid::new(uuid);
                }
                128..160 => other.segment ^= 1 << (bit - 128),
                160..192 => other.generation ^= 1 << (bit - 160),
                192..256 => other.offset ^= 1 << (bit - 192),
                _ => other.len ^= 1 << (bit - 256),
            }
            prop_assert_ne!(fold_place(check, &id, &other), crc);
        }
    }
}
