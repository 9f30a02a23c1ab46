//! What a client is told, and what it says when it cannot do as told.

use kvar_base::NamespaceKey;
use kvar_wire::{HandshakeError, NAME_BYTES_MAX, VERSIONS, VersionRange};
use std::time::Duration;

/// Most links to one node: one for bulk and one beside it is all that TCP gains from.
pub const LINKS_MAX: usize = 2;

/// What a client's links go through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkChoice {
    /// Shared memory if the node is on this host and agrees, else TCP.
    #[default]
    Auto,
    /// TCP.
    Tcp,
    /// Shared memory or nothing.
    Shm,
}

impl LinkChoice {
    /// All choices.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Tcp, Self::Shm];

    /// The word used in settings.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tcp => "tcp",
            Self::Shm => "shm",
        }
    }
}

impl std::str::FromStr for LinkChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|choice| choice.word() == text);
        found.ok_or_else(|| format!("{text:?} is not one of auto, tcp, shm"))
    }
}

/// Settings of a client.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The node: `host:port`.
    pub endpoint: String,
    /// The namespace.
    pub namespace: String,
    /// Its key.
    pub key: NamespaceKey,
    /// Every call that does not bring its own deadline ends within this (1 s).
    pub deadline: Duration,
    /// Longest time for name, connection and handshake (1 s).
    pub connect_timeout: Duration,
    /// Links to the node, 1 to [`LINKS_MAX`] (1).
    pub links: usize,
    /// What the links go through (auto).
    pub link: LinkChoice,
    /// Bytes of the region that the client asks a node on this host for, so that what it reads can be
    /// written where it is looked at ([`Client::staging`](crate::Client::staging)); a whole number of
    /// 4 KiB pages. 0 (the default) asks for none.
    pub staging: u64,
    /// How long to look for answers before sleeping (0). Waking a sleeper costs 60 to 80 us on a
    /// virtual machine; spinning costs a core that the engine may want.
    pub spin: Duration,
    /// How this client names itself in the node's log.
    pub name: String,
    /// Versions of the protocol that it speaks; fewer than all of them to be met as an older build would be.
    pub versions: VersionRange,
}

impl ClientConfig {
    /// Settings for the default namespace of one node, all else at its default.
    #[must_use]
    pub fn new(endpoint: &str, key: NamespaceKey) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            namespace: "default".to_owned(),
            key,
            deadline: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(1),
            links: 1,
            link: LinkChoice::Auto,
            staging: 0,
            spin: Duration::ZERO,
            name: concat!("kvar-client ", env!("CARGO_PKG_VERSION")).to_owned(),
            versions: VERSIONS,
        }
    }

    pub(crate) fn check(&self) -> Result<(), ClientError> {
        let wrong = |text: String| Err(ClientError::Config(text));
        let port = self
            .endpoint
            .rsplit_once(':')
            .map(|(host, port)| (host, port.parse::<u16>()));
        match port {
            Some((host, Ok(port))) if !host.is_empty() && port > 0 => {}
            _ => {
                return wrong(format!(
                    "{:?} is no endpoint: write host:port, such as 127.0.0.1:7411",
                    self.endpoint,
                ));
            }
        }
        if self.namespace.is_empty() || self.namespace.len() > NAME_BYTES_MAX {
            return wrong(format!(
                "a namespace's name has 1 to {NAME_BYTES_MAX} bytes, not {}",
                self.namespace.len(),
            ));
        }
        if self.name.len() > NAME_BYTES_MAX {
            return wrong(format!(
                "a client's name has at most {NAME_BYTES_MAX} bytes"
            ));
        }
        if !(1..=LINKS_MAX).contains(&self.links) {
            return wrong(format!(
                "links must be 1 to {LINKS_MAX}, not {}",
                self.links
            ));
        }
        if !self.staging.is_multiple_of(kvar_base::PAGE_BYTES) {
            return wrong(format!(
                "staging must be a multiple of 4096 bytes, not {}",
                self.staging
            ));
        }
        if self.connect_timeout.is_zero() {
            return wrong("connect_timeout must be longer than zero".to_owned());
        }
        Ok(())
    }
}

/// Why a call has no outcome, or a client no node. Kinds differ where a caller would do something
/// else: retry, fix a setting, or give up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// A setting is wrong: fix it.
    #[error("{0}")]
    Config(String),
    /// The node cannot be reached: is it running, is the address right? Retrying may help.
    #[error("{0}")]
    Unreachable(String),
    /// The node speaks no version of the protocol that this client speaks: update one of them.
    #[error("{0}")]
    Version(String),
    /// The key is not the namespace's: give the client the node's key file.
    #[error("{0}")]
    WrongKey(String),
    /// The node has no such namespace.
    #[error("{0}")]
    Namespace(String),
    /// The node has too much to do, or is on its way down: try again later.
    #[error("{0}")]
    Busy(String),
    /// What answered is no kvar node, or a broken one.
    #[error("{0}")]
    Protocol(String),
    /// The deadline passed first. The node may still do what was asked.
    #[error("the deadline passed before the node answered; it may still do what was asked")]
    Deadline,
    /// The node tried and could not.
    #[error("the node says: {0}")]
    Failed(String),
}

impl ClientError {
    /// The word used in logs and Python.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Config(_) => "config",
            Self::Unreachable(_) => "unreachable",
            Self::Version(_) => "version",
            Self::WrongKey(_) => "wrong_key",
            Self::Namespace(_) => "namespace",
            Self::Busy(_) => "busy",
            Self::Protocol(_) => "protocol",
            Self::Deadline => "deadline",
            Self::Failed(_) => "failed",
        }
    }

    /// Whether trying again without a change is of no use.
    pub(crate) const fn is_for_good(&self) -> bool {
        matches!(
            self,
            Self::Config(_) | Self::Version(_) | Self::WrongKey(_) | Self::Namespace(_)
        )
    }

    pub(crate) fn at(endpoint: &str, error: &HandshakeError) -> Self {
        let text = format!("{endpoint}: {error}");
        match error {
            HandshakeError::Version(_) => Self::Version(text),
            HandshakeError::Namespace(_) => Self::Namespace(text),
            HandshakeError::Key(_) => Self::WrongKey(text),
            HandshakeError::Busy(_) => Self::Busy(text),
            HandshakeError::Protocol(_) => Self::Protocol(text),
        }
    }
}
