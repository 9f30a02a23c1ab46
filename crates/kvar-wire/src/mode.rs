//! The messages by which a client learns how much its engine is to use the store.
//!
//! ```text
//!   version 1   Welcome: node | proof | limits
//!   version 5   the same                    ... and | mode        how it is when the link opens
//!               Switch: mode                                      whenever it changes afterwards
//! ```
//!
//! The mode stands behind all else in Welcome and is left out towards an older client, to which a
//! Switch is never sent either: for it the mode is what it always was, load.

use crate::bounded::Text;
use crate::message::{Limits, NAME_BYTES_MAX};
use kvar_base::Mode;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

/// The link is open.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Welcome {
    /// Which node this is.
    #[serde(with = "Text::<NAME_BYTES_MAX>")]
    pub node: String,
    /// Proof that the node holds the namespace's key too: a client gives its bytes to no other.
    pub proof: [u8; 32],
    /// What the client must keep to.
    pub limits: Limits,
    /// The mode of the client's namespace. (Version 5; `None` towards and from older ones.)
    #[serde(skip)]
    pub mode: Option<Mode>,
}

struct Node<'a>(&'a str);

impl Serialize for Node<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Text::<NAME_BYTES_MAX>::serialize(self.0, serializer)
    }
}

impl Serialize for Welcome {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let fields = 3 + usize::from(self.mode.is_some());
        let mut welcome = serializer.serialize_struct("Welcome", fields)?;
        welcome.serialize_field("node", &Node(&self.node))?;
        welcome.serialize_field("proof", &self.proof)?;
        welcome.serialize_field("limits", &self.limits)?;
        if let Some(mode) = self.mode {
            welcome.serialize_field("mode", &mode)?;
        }
        welcome.end()
    }
}

/// Reads a Welcome, which may go on behind what the first version has.
pub(crate) fn take_welcome(bytes: &[u8]) -> Result<Welcome, String> {
    let wrong = |error: postcard::Error| error.to_string();
    let (mut welcome, rest) = postcard::take_from_bytes::<Welcome>(bytes).map_err(wrong)?;
    if !rest.is_empty() {
        let (mode, rest) = postcard::take_from_bytes::<Mode>(rest).map_err(wrong)?;
        if !rest.is_empty() {
            return Err(format!("{} bytes too many", rest.len()));
        }
        welcome.mode = Some(mode);
    }
    Ok(welcome)
}

/// The mode of the client's namespace is this from now on. Belongs to no request; has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// This.
    pub mode: Mode,
}
