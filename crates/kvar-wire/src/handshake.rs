//! The handshake, as two state machines: messages in, messages out.
//!
//! ```text
//!   ClientHandshake                                NodeHandshake
//!   AwaitChallenge   Hello ──────────────────────> AwaitHello
//!        │           <───────────────── Challenge      │        (or Failure: version, namespace)
//!        ▼                                             ▼
//!   AwaitWelcome     Proof ──────────────────────> AwaitProof
//!        │           <─────────────────── Welcome      │        (or Failure: key)
//!        ▼                                             ▼
//!   Over                                           Over
//! ```
//!
//! What must always be true: nobody who lacks the namespace's key gets past it, on either side;
//! a proof is good for one pair of nonces, one namespace, one choice of version and one direction.
//!
//! What is absent: the time limit (whoever owns the link watches the clock) and where nonces come
//! from.

use crate::message::{
    Challenge, Failure, FailureCode, Hello, Limits, Message, NAME_BYTES_MAX, Proof, VersionRange,
};
use crate::mode::Welcome;
use crate::{PAYLOAD_BYTES_MAX, VERSIONS};
use kvar_base::NamespaceKey;

/// Why a client has no link. Retrying helps with `Busy` and `ShuttingDown` alone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// No version in common.
    #[error("{0}")]
    Version(String),
    /// No such namespace on the node.
    #[error("{0}")]
    Namespace(String),
    /// One of the two does not hold the namespace's key.
    #[error("{0}")]
    Key(String),
    /// Too many links, or the node is on its way down.
    #[error("{0}")]
    Busy(String),
    /// The peer is no kvar node, or a broken one.
    #[error("{0}")]
    Protocol(String),
}

/// The client's side.
#[derive(Debug)]
pub struct ClientHandshake {
    hello: Hello,
    key: NamespaceKey,
    version: Option<u16>,
    state: ClientState,
}

#[derive(Debug)]
enum ClientState {
    AwaitChallenge,
    AwaitWelcome(Challenge),
    Over,
}

/// What a client does next.
#[derive(Debug, PartialEq)]
pub enum ClientStep {
    /// Send this and wait.
    Send(Proof),
    /// The link is open.
    Open(Welcome),
}

impl ClientHandshake {
    /// Begins; [`hello`](Self::hello) is to be sent first. `nonce` must be random.
    #[must_use]
    pub fn new(namespace: &str, key: NamespaceKey, client: &str, nonce: [u8; 32]) -> Self {
        let (namespace, client) = (namespace.to_owned(), client.to_owned());
        let hello = Hello {
            versions: VERSIONS,
            namespace,
            nonce,
            client,
        };
        Self {
            hello,
            key,
            version: None,
            state: ClientState::AwaitChallenge,
        }
    }

    /// The same for a client that speaks these versions alone: to be met as an older build would be.
    #[must_use]
    pub fn speaking(mut self, versions: VersionRange) -> Self {
        self.hello.versions = versions;
        self
    }

    /// The version that both speak, once the node has chosen it.
    #[must_use]
    pub fn version(&self) -> Option<u16> {
        self.version
    }

    /// The first message.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Takes the node's next message.
    ///
    /// # Errors
    /// Why there is no link; close it.
    pub fn on_message(&mut self, message: Message) -> Result<ClientStep, HandshakeError> {
        let state = std::mem::replace(&mut self.state, ClientState::Over);
        match (state, message) {
            (_, Message::Failure(failure)) => Err(refused(failure)),
            (ClientState::AwaitChallenge, Message::Challenge(challenge)) => {
                let ours = self.hello.versions;
                if !(ours.oldest..=ours.newest).contains(&challenge.version) {
                    return Err(HandshakeError::Version(format!(
                        "the node chose protocol version {}, this client speaks {ours}; \
                         update the older of the two",
                        challenge.version,
                    )));
                }
                let proof = self
                    .key
                    .prove(&transcript(Role::Client, &self.hello, &challenge));
                self.version = Some(challenge.version);
                self.state = ClientState::AwaitWelcome(challenge);
                Ok(ClientStep::Send(Proof {
                    proof,
                    key_name: self.key.short_name(),
                }))
            }
            (ClientState::AwaitWelcome(challenge), Message::Welcome(welcome)) => {
                let said = transcript(Role::Node, &self.hello, &challenge);
                if !self.key.verify(&said, &welcome.proof) {
                    return Err(HandshakeError::Key(format!(
                        "the node does not hold the key {} of namespace {:?}: it says it has {}; \
                         nothing was sent to it. Is this the right node?",
                        self.key.short_name(),
                        self.hello.namespace,
                        challenge.key_name,
                    )));
                }
                limits_make_sense(&welcome.limits)?;
                Ok(ClientStep::Open(welcome))
            }
            (_, message) => Err(HandshakeError::Protocol(format!(
                "the node sent {:?} in the middle of the handshake; it is no kvar node, or a \
                 broken one",
                message.kind(),
            ))),
        }
    }
}

fn refused(failure: Failure) -> HandshakeError {
    match failure.code {
        FailureCode::Version => HandshakeError::Version(failure.text),
        FailureCode::Namespace => HandshakeError::Namespace(failure.text),
        FailureCode::Key => HandshakeError::Key(failure.text),
        FailureCode::Busy | FailureCode::ShuttingDown => HandshakeError::Busy(failure.text),
        FailureCode::Protocol => HandshakeError::Protocol(failure.text),
    }
}

fn limits_make_sense(limits: &Limits) -> Result<(), HandshakeError> {
    let block = u64::from(limits.block_bytes_max);
    let fine = block > 0
        && block <= PAYLOAD_BYTES_MAX as u64
        && limits.eager_bytes_max <= limits.block_bytes_max
        && limits.requests_max > 0
        && limits.bytes_max >= block;
    if fine {
        return Ok(());
    }
    Err(HandshakeError::Protocol(format!(
        "the node's limits make no sense: {limits:?}"
    )))
}

/// The node's side.
#[derive(Debug)]
pub struct NodeHandshake {
    nonce: [u8; 32],
    versions: VersionRange,
    state: NodeState,
}

#[derive(Debug)]
enum NodeState {
    AwaitHello,
    AwaitProof(Hello, Challenge, NamespaceKey),
    Over,
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The namespace it works in.
    pub namespace: String,
    /// Its name and version, as it says.
    pub client: String,
    /// The version of the protocol that both speak.
    pub version: u16,
}

/// What a node does next.
#[derive(Debug, PartialEq)]
pub enum NodeStep {
    /// Send this and wait.
    Send(Challenge),
    /// Send this; the link is open. Whoever knows the mode of the peer's namespace adds it, if the
    /// peer's version has modes.
    Open(Welcome, Peer),
    /// Send this and close.
    Fail(Failure),
}

impl NodeHandshake {
    /// Begins. `nonce` must be random.
    #[must_use]
    pub fn new(nonce: [u8; 32]) -> Self {
        Self {
            nonce,
            versions: VERSIONS,
            state: NodeState::AwaitHello,
        }
    }

    /// As [`new`](Self::new), for a node that speaks these versions alone: while a cluster is
    /// updated, or to be met as an older build would be.
    #[must_use]
    pub fn speaking(versions: VersionRange, nonce: [u8; 32]) -> Self {
        Self {
            versions,
            ..Self::new(nonce)
        }
    }

    /// Takes the client's next message. `key_of` finds a namespace's key, `node` and `limits` are
    /// what Welcome will say.
    pub fn on_message(
        &mut self,
        message: Message,
        key_of: impl FnOnce(&str) -> Option<NamespaceKey>,
        node: &str,
        limits: Limits,
    ) -> NodeStep {
        let state = std::mem::replace(&mut self.state, NodeState::Over);
        match (state, message) {
            (NodeState::AwaitHello, Message::Hello(hello)) => self.on_hello(hello, key_of),
            (NodeState::AwaitProof(hello, challenge, key), Message::Proof(proof)) => {
                let said = transcript(Role::Client, &hello, &challenge);
                if !key.verify(&said, &proof.proof) {
                    return fail(
                        FailureCode::Key,
                        &format!(
                            "wrong key for namespace {:?}: the node has key {}, the client has {}; \
                         give the client the node's key file",
                            hello.namespace,
                            challenge.key_name,
                            printable(&proof.key_name),
                        ),
                    );
                }
                let proof = key.prove(&transcript(Role::Node, &hello, &challenge));
                let welcome = Welcome {
                    node: node.to_owned(),
                    proof,
                    limits,
                    mode: None,
                };
                let (namespace, client) = (hello.namespace, hello.client);
                NodeStep::Open(
                    welcome,
                    Peer {
                        namespace,
                        client,
                        version: challenge.version,
                    },
                )
            }
            (_, message) => fail(
                FailureCode::Protocol,
                &format!(
                    "{:?} has no place in the handshake; say Hello first",
                    message.kind()
                ),
            ),
        }
    }

    fn on_hello(
        &mut self,
        hello: Hello,
        key_of: impl FnOnce(&str) -> Option<NamespaceKey>,
    ) -> NodeStep {
        let Some(version) = self.versions.agree(hello.versions) else {
            return fail(
                FailureCode::Version,
                &format!(
                    "no protocol version in common: the node speaks {}, the client {}; update the \
                 older of the two",
                    self.versions, hello.versions,
                ),
            );
        };
        let Some(key) = key_of(&hello.namespace) else {
            return fail(
                FailureCode::Namespace,
                &format!(
                    "no namespace {} on this node; check the name, \"default\" is always there",
                    printable(&hello.namespace),
                ),
            );
        };
        let challenge = Challenge {
            version,
            nonce: self.nonce,
            key_name: key.short_name(),
        };
        self.state = NodeState::AwaitProof(hello, challenge.clone(), key);
        NodeStep::Send(challenge)
    }
}

fn fail(code: FailureCode, text: &str) -> NodeStep {
    NodeStep::Fail(Failure::new(code, text))
}

/// A stranger's text, safe in a log line.
fn printable(text: &str) -> String {
    format!("{:?}", text.chars().take(64).collect::<String>())
}

#[derive(Clone, Copy)]
enum Role {
    Client = 1,
    Node = 2,
}

/// What a proof is about: everything both sides said, so that nothing can be changed on the way.
fn transcript(role: Role, hello: &Hello, challenge: &Challenge) -> Vec<u8> {
    let mut said = Vec::with_capacity(128 + NAME_BYTES_MAX);
    said.push(role as u8);
    said.extend_from_slice(&hello.versions.oldest.to_le_bytes());
    said.extend_from_slice(&hello.versions.newest.to_le_bytes());
    said.extend_from_slice(&challenge.version.to_le_bytes());
    said.extend_from_slice(&hello.nonce);
    said.extend_from_slice(&challenge.nonce);
    // Last, so that no length is needed to tell it from what follows.
    said.extend_from_slice(hello.namespace.as_bytes());
    said
}
