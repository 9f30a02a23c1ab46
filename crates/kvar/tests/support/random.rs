//! Numbers from a seed, and bytes that say which put they are of.

/// Xorshift.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Numbers of a seed, far from those of the seeds beside it.
    pub(crate) fn of(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Bytes of one put: block and nonce in front, everything after follows from them.
pub(crate) fn bytes_of(block: u64, nonce: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    bytes.extend_from_slice(&block.to_le_bytes());
    bytes.extend_from_slice(&nonce.to_le_bytes());
    let mut random = Random(block << 32 | nonce | 1);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.below(u64::MAX).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Whether bytes are one put of that block, whole.
pub(crate) fn is_one_put(block: u64, bytes: &[u8]) -> bool {
    let nonce = bytes
        .get(8..16)
        .map(|nonce| u64::from_le_bytes(nonce.try_into().unwrap()));
    nonce.is_some_and(|nonce| bytes_of(block, nonce, bytes.len()) == bytes)
}
