//! The handshake, both sides against each other and against strangers.

use kvar_base::{MapEpoch, NamespaceKey};
use kvar_wire::*;

const LIMITS: Limits = Limits {
    block_bytes_max: 16 << 20,
    eager_bytes_max: EAGER_BYTES_MAX,
    requests_max: 256,
    bytes_max: 64 << 20,
};

fn key(n: u8) -> NamespaceKey {
    NamespaceKey::new([n; 32])
}

fn node_says(node: &mut NodeHandshake, message: Message) -> NodeStep {
    node.on_message(
        message,
        |name| (name == "default").then(|| key(1)),
        "n1",
        LIMITS,
    )
}

/// Runs both sides; what goes from one to the other passes through the encoding.
fn meet(client_key: NamespaceKey, namespace: &str) -> Result<(Welcome, Peer), HandshakeError> {
    let over_the_wire = |message: Message| {
        let mut bytes = Vec::new();
        message
            .encode(&mut bytes, LINK_REQUEST, MapEpoch::SINGLE_NODE, 0)
            .unwrap();
        assert!(bytes.len() - HEADER_BYTES <= HANDSHAKE_MESSAGE_BYTES_MAX);
        decode(
            &Header::decode(bytes.first_chunk().unwrap()).unwrap(),
            &bytes[HEADER_BYTES..],
        )
        .unwrap()
    };
    let mut client = ClientHandshake::new(namespace, client_key, "test 1", [1; 32]);
    let mut node = NodeHandshake::new([2; 32]);
    let mut to_node: Message = client.hello().clone().into();
    let mut peer = None;
    loop {
        let to_client: Message = match node_says(&mut node, over_the_wire(to_node)) {
            NodeStep::Send(challenge) => challenge.into(),
            NodeStep::Open(welcome, who) => {
                peer = Some(who);
                welcome.into()
            }
            NodeStep::Fail(failure) => failure.into(),
        };
        match client.on_message(over_the_wire(to_client))? {
            ClientStep::Send(proof) => to_node = proof.into(),
            ClientStep::Open(welcome) => return Ok((welcome, peer.expect("the node opened too"))),
        }
    }
}

#[test]
fn who_holds_the_key_gets_in() {
    let (welcome, peer) = meet(key(1), "default").unwrap();
    assert_eq!((welcome.node.as_str(), welcome.limits), ("n1", LIMITS));
    let (namespace, client) = ("default".into(), "test 1".into());
    assert_eq!(
        peer,
        Peer {
            namespace,
            client,
            version: VERSIONS.newest
        }
    );
}

#[test]
fn a_wrong_key_is_told_with_both_names() {
    let error = meet(key(2), "default").unwrap_err();
    assert!(matches!(error, HandshakeError::Key(_)), "{error}");
    let text = error.to_string();
    assert!(
        text.contains(&key(1).short_name()) && text.contains(&key(2).short_name()),
        "{text}"
    );
}

#[test]
fn an_unknown_namespace_is_named() {
    let error = meet(key(1), "other").unwrap_err();
    assert!(
        matches!(&error, HandshakeError::Namespace(text) if text.contains("other")),
        "{error}"
    );
}

#[test]
fn versions_without_overlap_are_both_named() {
    let hello = |oldest, newest| -> Message {
        let versions = VersionRange { oldest, newest };
        let (namespace, client) = ("default".into(), "future".into());
        Hello {
            versions,
            namespace,
            nonce: [0; 32],
            client,
        }
        .into()
    };
    let NodeStep::Fail(failure) = node_says(&mut NodeHandshake::new([2; 32]), hello(7, 8)) else {
        panic!("a client of versions 7 to 8 was taken");
    };
    assert_eq!(failure.code, FailureCode::Version);
    assert!(
        failure.text.contains("node speaks 1 to 6") && failure.text.contains("7 to 8"),
        "{failure:?}"
    );
    // A newer client that still speaks ours is fine; one with the range upside down is not.
    let step = node_says(&mut NodeHandshake::new([2; 32]), hello(1, 7));
    assert!(
        matches!(step, NodeStep::Send(Challenge { version: 6, .. })),
        "{step:?}"
    );
    // An old client is spoken to as it can.
    let step = node_says(&mut NodeHandshake::new([2; 32]), hello(1, 1));
    assert!(
        matches!(step, NodeStep::Send(Challenge { version: 1, .. })),
        "{step:?}"
    );
    let step = node_says(&mut NodeHandshake::new([2; 32]), hello(5, 1));
    assert!(matches!(step, NodeStep::Fail(_)), "{step:?}");
    // A node that chooses what was not offered.
    let mut client = ClientHandshake::new("default", key(1), "c", [1; 32]);
    let challenge = Challenge {
        version: VERSIONS.newest + 1,
        nonce: [0; 32],
        key_name: "x".into(),
    };
    let error = client.on_message(challenge.into()).unwrap_err();
    assert!(matches!(error, HandshakeError::Version(_)), "{error}");
}

#[test]
fn a_node_without_the_key_gets_nothing() {
    let mut client = ClientHandshake::new("default", key(1), "c", [1; 32]);
    let challenge = Challenge {
        version: 1,
        nonce: [3; 32],
        key_name: key(1).short_name(),
    };
    let ClientStep::Send(proof) = client.on_message(challenge.into()).unwrap() else {
        panic!("a client proves itself first");
    };
    // The best a false node can do is to send the client's own proof back.
    let welcome = Welcome {
        node: "false".into(),
        proof: proof.proof,
        limits: LIMITS,
        mode: None,
    };
    let error = client.on_message(welcome.into()).unwrap_err();
    assert!(matches!(error, HandshakeError::Key(_)), "{error}");
}

#[test]
fn a_proof_is_good_for_one_handshake_only() {
    let prove = |node_nonce: [u8; 32]| {
        let mut client = ClientHandshake::new("default", key(1), "c", [1; 32]);
        let mut node = NodeHandshake::new(node_nonce);
        let NodeStep::Send(challenge) = node_says(&mut node, client.hello().clone().into()) else {
            panic!("no challenge");
        };
        let ClientStep::Send(proof) = client.on_message(challenge.into()).unwrap() else {
            panic!("no proof");
        };
        (node, proof)
    };
    let (mut node, _) = prove([5; 32]);
    let (_, replayed) = prove([6; 32]);
    let step = node_says(&mut node, replayed.into());
    assert!(
        matches!(
            step,
            NodeStep::Fail(Failure {
                code: FailureCode::Key,
                ..
            })
        ),
        "{step:?}"
    );
}

#[test]
fn what_has_no_place_ends_it() {
    for message in [
        Message::Ping(Ping {}),
        Message::Proof(Proof {
            proof: [0; 32],
            key_name: String::new(),
        }),
    ] {
        let step = node_says(&mut NodeHandshake::new([2; 32]), message.clone());
        assert!(
            matches!(
                step,
                NodeStep::Fail(Failure {
                    code: FailureCode::Protocol,
                    ..
                })
            ),
            "{step:?}"
        );
        let mut client = ClientHandshake::new("default", key(1), "c", [1; 32]);
        let error = client.on_message(message).unwrap_err();
        assert!(matches!(error, HandshakeError::Protocol(_)), "{error}");
    }
    // Limits under which no block could ever travel.
    let limits = Limits {
        bytes_max: 1,
        ..LIMITS
    };
    let mut client = ClientHandshake::new("default", key(1), "c", [1; 32]);
    let mut node = NodeHandshake::new([2; 32]);
    let NodeStep::Send(challenge) = node_says(&mut node, client.hello().clone().into()) else {
        panic!("no challenge");
    };
    let ClientStep::Send(proof) = client.on_message(challenge.into()).unwrap() else {
        panic!("no proof");
    };
    let step = node.on_message(proof.into(), |_| Some(key(1)), "n1", limits);
    let NodeStep::Open(welcome, _) = step else {
        panic!("not opened")
    };
    let error = client.on_message(welcome.into()).unwrap_err();
    assert!(matches!(error, HandshakeError::Protocol(_)), "{error}");
}

#[test]
fn a_failure_text_is_cut_between_characters() {
    let failure = Failure::new(FailureCode::Busy, &"é".repeat(TEXT_BYTES_MAX));
    assert!(failure.text.len() <= TEXT_BYTES_MAX && failure.text.ends_with('é'));
}
