//! Names: of blocks, devices and the key that makes block names unguessable.

use crate::ContentFingerprint;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

#[cfg(debug_assertions)]
thread_local! {
    static HASHED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// How often this thread has hashed a [`BlockId`], for tests of what an operation costs; `None` where
/// the build counts nothing, which is all but debug builds.
#[must_use]
pub fn ids_hashed() -> Option<u64> {
    #[cfg(debug_assertions)]
    return Some(HASHED.with(std::cell::Cell::get));
    #[cfg(not(debug_assertions))]
    None
}

/// The name of a block: 32 bytes that say nothing about prompt, tokens or engine hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockId([u8; 32]);

impl Hash for BlockId {
    /// Two numbers in place of 32 bytes with their length in front: a map hashes an id in a third of
    /// the instructions, and a read asks maps a dozen times.
    fn hash<H: Hasher>(&self, state: &mut H) {
        #[cfg(debug_assertions)]
        HASHED.with(|hashed| hashed.set(hashed.get() + 1));
        for half in self.0.as_chunks().0 {
            state.write_u128(u128::from_le_bytes(*half));
        }
    }
}

impl BlockId {
    /// An id from its bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Which of a device's `shards` owns the block: the id's last 8 bytes, little-endian, scaled
    /// to `0..shards`. Fixed for a format version, because a block on the device lies in its
    /// shard's segments. (Ids are hashes, so shards fill evenly; an index that wants other bits
    /// of the id takes earlier bytes.)
    #[must_use]
    pub fn shard(&self, shards: u32) -> u32 {
        let mut tail = [0_u8; 8];
        tail.copy_from_slice(&self.0[24..]);
        ((u128::from(u64::from_le_bytes(tail)) * u128::from(shards)) >> 64) as u32
    }

    /// The id of one block of one position of a chain.
    ///
    /// `engine_hash` is the engine's own chained hash of the position (it names the whole prefix),
    /// `head_slice` says which part of the heads the block holds (for one copy of all heads: 0 of
    /// 1), `group` is the engine's cache group. Cost: one BLAKE3 of about 120 bytes, 0.2 us.
    #[must_use]
    pub fn derive(
        key: &NamespaceKey,
        engine_hash: &[u8],
        fingerprint: &ContentFingerprint,
        head_slice: (u16, u16),
        group: u32,
    ) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(b"kvar block 1\0");
        hasher.update(&fingerprint.0);
        hasher.update(&head_slice.0.to_le_bytes());
        hasher.update(&head_slice.1.to_le_bytes());
        hasher.update(&group.to_le_bytes());
        hasher.update(engine_hash);
        Self(*hasher.finalize().as_bytes())
    }

    /// The id of a block that a person names by text (`kvar put NAME`).
    #[must_use]
    pub fn from_name(key: &NamespaceKey, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(b"kvar name 1\0");
        hasher.update(name.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0[..6])
    }
}

impl FromStr for BlockId {
    type Err = NamespaceKeyError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_hex(text).map(Self)
    }
}

/// What all that is drawn at random has in common: bytes, and their hexadecimal digits.
macro_rules! drawn_at_random {
    ($name:ident, $bytes:literal) => {
        impl $name {
            /// From its bytes.
            #[must_use]
            pub const fn new(bytes: [u8; $bytes]) -> Self {
                Self(bytes)
            }

            /// A new one from the operating system's randomness.
            ///
            /// # Panics
            /// When the operating system has no randomness to give.
            #[must_use]
            pub fn random() -> Self {
                let mut bytes = [0; $bytes];
                getrandom::fill(&mut bytes).expect("the operating system gives randomness");
                Self(bytes)
            }

            /// As hexadecimal digits, all of them.
            #[must_use]
            pub fn to_hex(&self) -> String {
                self.0.iter().map(|byte| format!("{byte:02x}")).collect()
            }
        }

        impl FromStr for $name {
            type Err = NamespaceKeyError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                parse_hex(text.trim()).map(Self)
            }
        }
    };
}

/// Names a lease, and is the only proof of it: whoever knows the token may use, renew or release
/// the lease, from whatever connection. Hence drawn at random.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LeaseToken([u8; 16]);
drawn_at_random!(LeaseToken, 16);

impl LeaseToken {
    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for LeaseToken {
    /// Enough to tell two apart in a log, too little to use one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0[..3])
    }
}

/// Which device this is; drawn at format, part of every `check64`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeviceUuid([u8; 16]);
drawn_at_random!(DeviceUuid, 16);

impl DeviceUuid {
    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for DeviceUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for DeviceUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

/// The secret of a namespace: who lacks it can neither name its blocks nor connect to it.
#[derive(Clone, PartialEq, Eq)]
pub struct NamespaceKey([u8; 32]);
drawn_at_random!(NamespaceKey, 32);

/// Why a text is not a key or id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NamespaceKeyError {
    /// Wrong number of digits.
    #[error("expected {expected} hexadecimal digits, found {found}")]
    Length {
        /// Digits wanted.
        expected: usize,
        /// Digits there.
        found: usize,
    },
    /// Something that is no digit.
    #[error("not a hexadecimal digit at position {0}")]
    Digit(usize),
}

impl NamespaceKey {
    /// Eight digits that name the key without giving it away; for logs and errors.
    #[must_use]
    pub fn short_name(&self) -> String {
        let hash = blake3::keyed_hash(&self.0, b"kvar key name 1");
        hash.as_bytes()[..4]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Proof of holding the key, for a challenge of the other side.
    #[must_use]
    pub fn prove(&self, challenge: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"kvar hello 1\0");
        hasher.update(challenge);
        *hasher.finalize().as_bytes()
    }

    /// Whether `proof` is [`prove`](Self::prove) of the same challenge; in constant time.
    #[must_use]
    pub fn verify(&self, challenge: &[u8], proof: &[u8; 32]) -> bool {
        blake3::Hash::from_bytes(self.prove(challenge)) == blake3::Hash::from_bytes(*proof)
    }
}

impl fmt::Debug for NamespaceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NamespaceKey({})", self.short_name())
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], NamespaceKeyError> {
    let found = text.chars().count();
    if found != 2 * N {
        return Err(NamespaceKeyError::Length {
            expected: 2 * N,
            found,
        });
    }
    let mut out = [0_u8; N];
    for (position, digit) in text.chars().enumerate() {
        let value = digit
            .to_digit(16)
            .ok_or(NamespaceKeyError::Digit(position))?;
        out[position / 2] = out[position / 2] << 4 | value as u8;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_goes_there_and_back() {
        let key = NamespaceKey::random();
        assert_eq!(key.to_hex().parse::<NamespaceKey>().unwrap(), key);
        let token = LeaseToken::random();
        assert_eq!(token.to_hex().parse::<LeaseToken>().unwrap(), token);
        let uuid = DeviceUuid::random();
        assert_eq!(uuid.to_hex().parse::<DeviceUuid>().unwrap(), uuid);
        assert_eq!(uuid.to_hex(), uuid.to_string());
        let id = BlockId::from_name(&key, "x");
        assert_eq!(id.to_string().parse::<BlockId>().unwrap(), id);
        assert_eq!(
            "ab".parse::<BlockId>(),
            Err(NamespaceKeyError::Length {
                expected: 64,
                found: 2
            })
        );
        assert_eq!(
            "g".repeat(64).parse::<BlockId>(),
            Err(NamespaceKeyError::Digit(0))
        );
        assert_eq!(
            "é".repeat(32).parse::<BlockId>(),
            Err(NamespaceKeyError::Length {
                expected: 64,
                found: 32
            })
        );
    }

    #[test]
    fn every_part_of_an_id_matters() {
        let key = NamespaceKey::new([1; 32]);
        let print = ContentFingerprint::of_text("model=a");
        let id = BlockId::derive(&key, b"hash", &print, (0, 1), 0);
        assert_eq!(id, BlockId::derive(&key, b"hash", &print, (0, 1), 0));
        let others = [
            BlockId::derive(&NamespaceKey::new([2; 32]), b"hash", &print, (0, 1), 0),
            BlockId::derive(&key, b"hasi", &print, (0, 1), 0),
            BlockId::derive(
                &key,
                b"hash",
                &ContentFingerprint::of_text("model=b"),
                (0, 1),
                0,
            ),
            BlockId::derive(&key, b"hash", &print, (0, 2), 0),
            BlockId::derive(&key, b"hash", &print, (0, 1), 1),
        ];
        assert!(others.iter().all(|other| *other != id));
    }

    #[test]
    fn shards_share_ids_evenly_and_for_good() {
        let key = NamespaceKey::new([1; 32]);
        let mut counts = [0_u32; 3];
        for number in 0..3000 {
            counts[BlockId::from_name(&key, &number.to_string()).shard(3) as usize] += 1;
        }
        assert!(
            counts.iter().all(|count| (900..1100).contains(count)),
            "{counts:?}"
        );
        let mut bytes = [0xff; 32];
        assert_eq!(BlockId::new(bytes).shard(256), 255);
        bytes[24..].fill(0);
        assert_eq!(BlockId::new(bytes).shard(256), 0);
        bytes[31] = 0x80;
        assert_eq!(BlockId::new(bytes).shard(256), 128);
        assert_eq!(BlockId::new(bytes).shard(1), 0);
    }

    #[test]
    fn a_key_proves_itself_and_does_not_print() {
        let (key, other) = (NamespaceKey::new([1; 32]), NamespaceKey::new([2; 32]));
        assert!(key.verify(b"challenge", &key.prove(b"challenge")));
        assert!(!key.verify(b"challenge", &other.prove(b"challenge")));
        assert!(!key.verify(b"other", &key.prove(b"challenge")));
        assert!(!format!("{key:?}").contains("0101"));
    }
}
