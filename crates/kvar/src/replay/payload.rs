//! Bytes of a test block that say which put they are from.
//!
//! ```text
//!   0        8        16                                        block_bytes
//!   +--------+--------+-------------------------------------------+
//!   | nonce  | length | words of a generator seeded by (id, nonce)|
//!   +--------+--------+-------------------------------------------+
//! ```
//!
//! Every put draws its own nonce, so a block read back can be checked against *one complete put of
//! that id*: the nonce in front names the put, and every byte after it follows from id and nonce.
//! Bytes of another id, another put, a mix of two puts, or a shortened block do not pass.

use kvar_base::BlockId;

/// Least size of a block that can carry nonce and length.
pub(crate) const BLOCK_BYTES_MIN: usize = 16;

/// Fills `out` with the payload of (`id`, `nonce`).
pub(crate) fn fill(out: &mut [u8], id: &BlockId, nonce: u64) {
    let len = out.len() as u64;
    let mut words = Words::new(id, nonce);
    let (head, body) = out.split_at_mut(BLOCK_BYTES_MIN);
    head[..8].copy_from_slice(&nonce.to_le_bytes());
    head[8..].copy_from_slice(&len.to_le_bytes());
    let mut chunks = body.chunks_exact_mut(8);
    for chunk in &mut chunks {
        chunk.copy_from_slice(&words.next().to_le_bytes());
    }
    let tail = chunks.into_remainder();
    let last = words.next().to_le_bytes();
    tail.copy_from_slice(&last[..tail.len()]);
}

/// The nonce of the put that `bytes` is, whole; `None` when they are no complete put of `id`.
pub(crate) fn verify(bytes: &[u8], id: &BlockId) -> Option<u64> {
    if bytes.len() < BLOCK_BYTES_MIN {
        return None;
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let nonce = word(0);
    if word(8) != bytes.len() as u64 {
        return None;
    }
    let mut words = Words::new(id, nonce);
    let mut chunks = bytes[BLOCK_BYTES_MIN..].chunks_exact(8);
    // Folded instead of compared one by one, so that the loop has no branch a word.
    let mut difference = 0;
    for chunk in &mut chunks {
        difference |= words.next() ^ u64::from_le_bytes(chunk.try_into().expect("eight bytes"));
    }
    let tail = chunks.remainder();
    let last = words.next().to_le_bytes();
    (difference == 0 && tail == &last[..tail.len()]).then_some(nonce)
}

/// A fast stream of words (a Weyl sequence through a multiply-xor mix): far from secret, but
/// different for every (id, nonce) and position.
struct Words {
    state: u64,
}

impl Words {
    fn new(id: &BlockId, nonce: u64) -> Self {
        let mut seed = [0_u8; 40];
        seed[..32].copy_from_slice(id.as_bytes());
        seed[32..].copy_from_slice(&nonce.to_le_bytes());
        Self {
            state: kvar_base::check::crc64(&seed) ^ nonce.rotate_left(17),
        }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        mixed ^ (mixed >> 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_complete_put_of_that_id_passes() {
        let (id, other) = (BlockId::new([1; 32]), BlockId::new([2; 32]));
        for len in [16, 17, 23, 24, 4096, 65_537] {
            let (mut one, mut two) = (vec![0; len], vec![0; len]);
            fill(&mut one, &id, 7);
            fill(&mut two, &id, 8);
            assert_eq!((verify(&one, &id), verify(&two, &id)), (Some(7), Some(8)));
            assert_eq!(verify(&one[..len - 1], &id), None);
            if len > 16 {
                assert_eq!(verify(&one, &other), None);
            }
            if len >= 4096 {
                let mut mixed = one.clone();
                mixed[len / 2..].copy_from_slice(&two[len / 2..]);
                assert_eq!(verify(&mixed, &id), None);
                for at in [0, 8, 16, len / 2, len - 1] {
                    let mut flipped = one.clone();
                    flipped[at] ^= 4;
                    assert_eq!(verify(&flipped, &id), None, "byte {at}");
                }
            }
        }
    }
}
