//! Inputs made of others: cut, flipped, repeated, spliced. A small fuzzer for where there is no
//! larger one; libFuzzer has its own.

/// Most bytes of an input.
const INPUT_BYTES_MAX: usize = 64 << 10;

/// Numbers by seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % end.max(1) as u64) as usize
    }
}

/// One of the inputs, changed in a few places, as the seed says.
#[must_use]
pub fn mutate(corpus: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let mut dice = Dice(seed);
    let mut bytes = corpus[dice.below(corpus.len())].clone();
    for _ in 0..=dice.below(5) {
        let at = dice.below(bytes.len());
        match dice.below(8) {
            0 => bytes.truncate(at),
            1 | 2 if !bytes.is_empty() => bytes[at] ^= 1 << dice.below(8),
            3 | 4 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.below(5)],
            5 if bytes.len() >= at + 8 => {
                let absurd = [
                    0,
                    1,
                    u64::MAX,
                    1 << 31,
                    1 << 62,
                    dice.below(usize::MAX) as u64,
                ];
                bytes[at..at + 8].copy_from_slice(&absurd[dice.below(6)].to_le_bytes());
            }
            6 => bytes.extend_from_within(at..),
            _ => {
                let other = &corpus[dice.below(corpus.len())];
                bytes.truncate(at);
                bytes.extend_from_slice(&other[dice.below(other.len())..]);
            }
        }
    }
    bytes.truncate(INPUT_BYTES_MAX);
    bytes
}
