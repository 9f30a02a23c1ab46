//! Parsers of what comes over a link.

use kvar_base::check::crc64;
use kvar_base::{MapEpoch, NamespaceKey};
use kvar_wire::{
    ClientHandshake, HEADER_BYTES, Header, Limits, MESSAGE_BYTES_MAX, Message, NodeHandshake,
    NodeStep, PAYLOAD_BYTES_MAX, decode, frame_lengths,
};

const KEY: [u8; 32] = [5; 32];
const NONCE: [u8; 32] = [6; 32];
const KIND: usize = 4;
const MESSAGE_LEN: usize = 24;
const PAYLOAD_LEN: usize = 28;
const HEADER_CHECK: usize = 32;
const MESSAGE_CHECK: usize = 36;

/// Makes both checks of a frame right, and its length that of its message.
fn seal(frame: &mut [u8]) {
    let (header, message) = frame.split_at_mut(HEADER_BYTES);
    header[..KIND].copy_from_slice(b"KVR1");
    header[MESSAGE_LEN..PAYLOAD_LEN].copy_from_slice(&(message.len() as u32).to_le_bytes());
    header[MESSAGE_CHECK..].copy_from_slice(&(crc64(message) as u32).to_le_bytes());
    let check = crc64(&header[..HEADER_CHECK]) as u32;
    header[HEADER_CHECK..MESSAGE_CHECK].copy_from_slice(&check.to_le_bytes());
}

fn parse(frame: &[u8]) -> Option<(Header, Message)> {
    let header = Header::decode(frame.first_chunk::<HEADER_BYTES>()?).ok()?;
    assert!(header.message_len as usize <= MESSAGE_BYTES_MAX);
    assert!(header.payload_len as usize <= PAYLOAD_BYTES_MAX);
    let lengths = frame_lengths(frame.first_chunk::<HEADER_BYTES>()?).ok();
    assert_eq!(lengths, Some((header.message_len, header.payload_len)));
    let message = frame.get(HEADER_BYTES..HEADER_BYTES + header.message_len as usize)?;
    let message = decode(&header, message).ok()?;
    Some((header, message))
}

/// What was read can be written and read again, to the same.
fn round(header: &Header, message: &Message) {
    let mut bytes = Vec::new();
    let payload = header.payload_len as usize;
    message
        .encode(&mut bytes, 7, MapEpoch::SINGLE_NODE, payload)
        .expect("what was read can be written");
    let (_, again) = parse(&bytes).expect("what was written can be read");
    assert_eq!(&again, message);
}

pub(crate) fn frame(bytes: &[u8]) {
    if let Some((header, message)) = parse(bytes) {
        round(&header, &message);
    }
    if bytes.len() < HEADER_BYTES || bytes.len() > HEADER_BYTES + MESSAGE_BYTES_MAX {
        return;
    }
    let mut sealed = bytes.to_vec();
    seal(&mut sealed);
    if let Some((header, message)) = parse(&sealed) {
        round(&header, &message);
    }
}

/// The first byte is the kind.
pub(crate) fn message(bytes: &[u8]) {
    let Some((kind, message)) = bytes.split_first() else {
        return;
    };
    let mut sealed = vec![0; HEADER_BYTES];
    sealed[KIND] = *kind;
    sealed.extend_from_slice(&message[..message.len().min(MESSAGE_BYTES_MAX)]);
    seal(&mut sealed);
    if let Some((header, message)) = parse(&sealed) {
        round(&header, &message);
    }
}

/// Frames one after the other: a kind, a length of two bytes, a message. Node and client take them
/// all, each on its side.
pub(crate) fn handshake(bytes: &[u8]) {
    let key = NamespaceKey::new(KEY);
    let mut node = NodeHandshake::new(NONCE);
    // One that knows no key opens to nobody.
    let mut closed = NodeHandshake::new(NONCE);
    let limits = Limits {
        block_bytes_max: 1 << 20,
        eager_bytes_max: 64 << 10,
        requests_max: 100,
        bytes_max: 1 << 24,
    };
    let mut client = ClientHandshake::new("default", key.clone(), "fuzz", NONCE);
    let mut rest = bytes;
    while let Some((head, behind)) = rest.split_at_checked(3) {
        let len = usize::from(u16::from_le_bytes([head[1], head[2]])).min(behind.len());
        let (message, behind) = behind.split_at(len);
        rest = behind;
        let mut sealed = vec![0; HEADER_BYTES];
        sealed[KIND] = head[0];
        sealed.extend_from_slice(message);
        seal(&mut sealed);
        let Some((_, message)) = parse(&sealed) else {
            continue;
        };
        let known = |name: &str| (name == "default").then(|| key.clone());
        let opened = closed.on_message(message.clone(), |_| None, "node", limits);
        assert!(!matches!(opened, NodeStep::Open(..)));
        let _ = node.on_message(message.clone(), known, "node", limits);
        let _ = client.on_message(message);
    }
}
