//! A node in this process on free ports, and a peer that speaks the bare protocol: it can say what
//! no client of ours would.
#![allow(dead_code)] // each test file uses its part

pub(crate) mod store;

use kvar_base::{BlockId, ByteSize, ContentCheck, MapEpoch, NamespaceKey, PutOutcome};
use kvar_node::{Config, DataPath, KeyFile, Node, NodeHandle};
use kvar_wire::*;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Long enough for a machine that compiles beside the test; a hang still fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until it is so.
pub(crate) fn until(what: impl std::fmt::Display, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Settings of a small node in `dir`.
pub(crate) fn config(dir: &Path, shards: u32) -> Config {
    let mut config = Config {
        data: vec![DataPath {
            path: dir.join("data"),
            size: None,
            tier: None,
        }],
        size: Some(ByteSize(96 << 20)),
        dram: ByteSize(u64::from(shards) * (24 << 20)),
        ..Config::default()
    };
    for (key, text) in [
        ("listen", "127.0.0.1:0"),
        ("admin", "127.0.0.1:0"),
        ("flush_after", "50ms"),
        // It takes out what is damaged or over before a slow test has asked for it.
        ("scrub", "0"),
    ] {
        config.set(key, text).unwrap();
    }
    config.set("shards", &shards.to_string()).unwrap();
    config
}

pub(crate) fn start(config: &Config) -> NodeHandle {
    Node::start(config).unwrap()
}

pub(crate) fn key_of(node: &NodeHandle) -> NamespaceKey {
    KeyFile::read(node.key_path()).unwrap().key
}

/// Bytes that differ by id and length.
pub(crate) fn bytes_of(id: &BlockId, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| id.as_bytes()[at % 32] ^ (at / 32) as u8)
        .collect()
}

pub(crate) fn sections_of(id: &BlockId, pieces: &[&[u8]]) -> Vec<Section> {
    (0..)
        .zip(pieces)
        .map(|(index, piece)| Section {
            len: piece.len() as u32,
            check: ContentCheck::of(piece, id, index),
        })
        .collect()
}

/// One connection.
pub(crate) struct Peer {
    pub(crate) stream: TcpStream,
    pub(crate) welcome: Option<Welcome>,
    next_request: u64,
}

impl Peer {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            welcome: None,
            next_request: 1,
        }
    }

    /// Connects and shakes hands.
    pub(crate) fn greet(node: &NodeHandle) -> Self {
        let mut peer = Self::connect(node.listen_addr());
        peer.shake("default", &key_of(node)).unwrap();
        peer
    }

    /// Shakes hands, or says how the node refused.
    pub(crate) fn shake(
        &mut self,
        namespace: &str,
        key: &NamespaceKey,
    ) -> Result<(), HandshakeError> {
        let mut handshake = ClientHandshake::new(namespace, key.clone(), "test", [7; 32]);
        self.send(LINK_REQUEST, &handshake.hello().clone());
        loop {
            match handshake.on_message(self.receive().1)? {
                ClientStep::Send(proof) => self.send(LINK_REQUEST, &proof),
                ClientStep::Open(welcome) => {
                    self.welcome = Some(welcome);
                    return Ok(());
                }
            }
        }
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.next_request += 1;
        self.next_request
    }

    pub(crate) fn send<B: Body>(&mut self, request: u64, body: &B) {
        self.send_with(request, body, &[]);
    }

    pub(crate) fn send_with<B: Body>(&mut self, request: u64, body: &B, payload: &[u8]) {
        let mut head = Vec::new();
        encode(
            &mut head,
            request,
            MapEpoch::SINGLE_NODE,
            body,
            payload.len(),
        )
        .unwrap();
        self.stream.write_all(&head).unwrap();
        self.stream.write_all(payload).unwrap();
    }

    /// The next frame; `None` when the node has closed the link.
    pub(crate) fn try_receive(&mut self) -> Option<(Header, Message, Vec<u8>)> {
        let mut header = [0; HEADER_BYTES];
        match self.stream.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("the node neither answered nor closed the link")
            }
            Err(_) => return None,
        }
        let header = Header::decode(&header).unwrap();
        let mut message = vec![0; header.message_len as usize];
        let mut payload = vec![0; header.payload_len as usize];
        self.stream.read_exact(&mut message).unwrap();
        self.stream.read_exact(&mut payload).unwrap();
        Some((header, decode(&header, &message).unwrap(), payload))
    }

    pub(crate) fn receive(&mut self) -> (Header, Message, Vec<u8>) {
        self.try_receive().expect("the node closed the link")
    }

    /// Asks and takes the next answer.
    pub(crate) fn ask<B: Body>(&mut self, body: &B) -> Message {
        let request = self.number();
        self.send(request, body);
        let (header, message, _) = self.receive();
        assert_eq!(
            (header.request, header.epoch),
            (request, MapEpoch::SINGLE_NODE)
        );
        message
    }

    pub(crate) fn put_message(id: BlockId, pieces: &[&[u8]], durable: bool) -> Put {
        Put {
            id,
            sections: sections_of(&id, pieces),
            hints: PutHints::default(),
            durable,
            deadline_us: PATIENCE.as_micros() as u64,
        }
    }

    /// Puts a block, eager or announced as its size demands.
    pub(crate) fn put(&mut self, id: BlockId, pieces: &[&[u8]], durable: bool) -> PutOutcome {
        let put = Self::put_message(id, pieces, durable);
        let payload = pieces.concat();
        let request = self.number();
        let eager_max = self.welcome.as_ref().unwrap().limits.eager_bytes_max;
        if payload.len() <= eager_max as usize {
            self.send_with(request, &put, &payload);
        } else {
            self.send(request, &put);
        }
        loop {
            match self.receive() {
                (header, Message::Pull(_), _) => {
                    assert_eq!(header.request, request);
                    self.send_with(request, &Payload {}, &payload);
                }
                (header, Message::PutAnswer(answer), _) => {
                    assert_eq!(header.request, request);
                    return answer.outcome;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn get_message(items: Vec<GetItem>) -> Get {
        Get {
            items: items.into(),
            touch_request: 0,
            deadline_us: PATIENCE.as_micros() as u64,
            hints: GetHints::default(),
        }
    }

    pub(crate) fn item(id: BlockId) -> GetItem {
        GetItem {
            id,
            sections: None,
            expected: Lengths::Any,
            version: None,
            depth: 0,
            slot: None,
        }
    }

    /// Gets one block whole; its bytes pass the writer's checks.
    pub(crate) fn get(&mut self, id: BlockId) -> Result<Vec<u8>, kvar_base::MissReason> {
        self.get_item(Self::item(id))
    }

    pub(crate) fn get_item(&mut self, item: GetItem) -> Result<Vec<u8>, kvar_base::MissReason> {
        let (id, request) = (item.id, self.number());
        self.send(request, &Self::get_message(vec![item]));
        let (header, message, payload) = self.receive();
        assert_eq!(header.request, request);
        let Message::GetAnswer(GetAnswer { item: 0, outcome }) = message else {
            panic!("{message:?}")
        };
        match outcome {
            GetOutcome::Placed { .. } => panic!("it was not asked to place anything"),
            GetOutcome::Miss(reason) => Err(reason),
            GetOutcome::Hit {
                first_section,
                sections,
                ..
            } => {
                let mut rest = &payload[..];
                for (index, section) in (first_section..).zip(sections) {
                    let (piece, after) = rest.split_at(section.len as usize);
                    assert_eq!(ContentCheck::of(piece, &id, index), section.check);
                    rest = after;
                }
                assert!(rest.is_empty());
                Ok(payload)
            }
        }
    }

    /// The node ends the link and says why.
    pub(crate) fn failure(&mut self) -> Failure {
        loop {
            match self.receive() {
                (_, Message::Failure(failure), _) => {
                    assert!(
                        self.try_receive().is_none(),
                        "the link closes after a failure"
                    );
                    return failure;
                }
                (_, Message::GetAnswer(_) | Message::PutAnswer(_), _) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// A request to the admin HTTP: status code and body.
pub(crate) fn request(
    node: &NodeHandle,
    method: &str,
    path: &str,
    body: &str,
    headers: &[(&str, String)],
) -> (u16, String) {
    let mut stream = TcpStream::connect(node.admin_addr()).unwrap();
    let headers: String = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: node\r\nconnection: close\r\ncontent-length: {length}\r\n\
         {headers}\r\n"
    );
    stream
        .write_all(format!("{head}{body}").as_bytes())
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let code = head.split_whitespace().nth(1).unwrap().parse().unwrap();
    (code, body.to_owned())
}

pub(crate) fn http(node: &NodeHandle, path: &str) -> (u16, String) {
    request(node, "GET", path, "", &[])
}

/// What proves to the admin HTTP that the sender of a body has the key.
pub(crate) fn proof_headers(
    key: &NamespaceKey,
    path: &str,
    body: &str,
) -> [(&'static str, String); 2] {
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    [
        (kvar_node::TIME_HEADER, now.to_string()),
        (
            kvar_node::PROOF_HEADER,
            kvar_node::admin_proof(key, path, now, body.as_bytes()),
        ),
    ]
}

/// Changes the devices: status code and answer.
pub(crate) fn post_devices(
    node: &NodeHandle,
    body: &serde_json::Value,
) -> (u16, serde_json::Value) {
    post(node, "/v1/devices", body)
}

/// Changes something: status code and answer.
pub(crate) fn post(
    node: &NodeHandle,
    path: &str,
    body: &serde_json::Value,
) -> (u16, serde_json::Value) {
    let body = body.to_string();
    let headers = proof_headers(&key_of(node), path, &body);
    let (code, text) = request(node, "POST", path, &body, &headers);
    let value =
        serde_json::from_str(&text).unwrap_or_else(|_| serde_json::json!({ "error": text }));
    (code, value)
}
