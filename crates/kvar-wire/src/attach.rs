//! The messages by which a client and a node of one host come to share memory (version 4), and
//! places for what is read (version 6).
//!
//! ```text
//!   Attach ──> AttachAnswer      while nothing is open on the link, or it is declined
//!   Stage ───> StageAnswer       at any time on a link that shares memory, once
//! ```
//!
//! What follows is `docs/internals/links.md`.

use crate::bounded::Text;
use crate::message::TEXT_BYTES_MAX;
use serde::{Deserialize, Serialize};

/// Shall we share memory? The client listens on a Unix socket of this name; the node brings the
/// memory there. Nothing else may be under way on the link.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The socket's name in the abstract namespace, behind `kvar-link-`; random.
    pub place: [u8; 16],
    /// What the node says there to be believed; random.
    pub secret: [u8; 16],
}

impl std::fmt::Debug for Attach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Attach { .. }")
    }
}

/// The answer to it. After Attached both sides go on in the memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AttachAnswer {
    /// The memory has been sent, with a ring of so many bytes in each direction.
    Attached {
        /// Bytes of one ring.
        ring_bytes: u32,
    },
    /// The link stays as it is.
    Declined {
        /// What kind of reason.
        why: AttachDeclined,
        /// What it is, and what to do.
        #[serde(with = "Text::<TEXT_BYTES_MAX>")]
        text: String,
    },
}

impl AttachAnswer {
    /// A refusal whose text is cut to what fits.
    #[must_use]
    pub fn declined(why: AttachDeclined, text: &str) -> Self {
        let text = crate::Failure::new(crate::FailureCode::Protocol, text).text;
        Self::Declined { why, text }
    }
}

/// Shall we share a staging region: memory of so many bytes into which you write what I read? It is
/// brought as the memory of an [`Attach`] is.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// As in [`Attach`].
    pub place: [u8; 16],
    /// As in [`Attach`].
    pub secret: [u8; 16],
    /// Its size.
    pub bytes: u64,
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stage {{ bytes: {}, .. }}", self.bytes)
    }
}

/// The answer to it. The region lives as long as the link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StageAnswer {
    /// The memory has been sent.
    Staged {
        /// Its size: what was asked for.
        bytes: u64,
    },
    /// There is none; everything else goes on as before.
    Declined {
        /// What kind of reason. (Remote: the link does not share memory.)
        why: AttachDeclined,
        /// What it is, and what to do.
        #[serde(with = "Text::<TEXT_BYTES_MAX>")]
        text: String,
    },
}

impl StageAnswer {
    /// A refusal whose text is cut to what fits.
    #[must_use]
    pub fn declined(why: AttachDeclined, text: &str) -> Self {
        let text = crate::Failure::new(crate::FailureCode::Protocol, text).text;
        Self::Declined { why, text }
    }
}

/// Why a node does not share memory with a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AttachDeclined {
    /// It shares with nobody.
    Off,
    /// The client is not on its host, as far as it can see.
    Remote,
    /// As many links share memory as may.
    Full,
    /// Something is under way on the link, or it shares memory already.
    Late,
    /// The system refused; the text says what.
    Failed,
}

impl AttachDeclined {
    /// All reasons.
    pub const ALL: [Self; 5] = [
        Self::Off,
        Self::Remote,
        Self::Full,
        Self::Late,
        Self::Failed,
    ];

    /// The word used in status and metrics.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Remote => "remote",
            Self::Full => "full",
            Self::Late => "late",
            Self::Failed => "failed",
        }
    }
}
