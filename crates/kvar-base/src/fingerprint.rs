//! What must be equal for two blocks' bytes to mean the same.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Hash of model, revision, dtype, block tokens, layers, heads, head size and cache group: part of
/// every block id, so that KV of another model or shape is a miss and never misread. The card's
/// maker is not in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContentFingerprint(pub [u8; 32]);

impl ContentFingerprint {
    /// The fingerprint of a canonical text (`key=value` lines in a fixed order).
    #[must_use]
    pub fn of_text(text: &str) -> Self {
        Self(blake3::derive_key(
            "kvar content fingerprint 1",
            text.as_bytes(),
        ))
    }
}

impl fmt::Debug for ContentFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6]
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
