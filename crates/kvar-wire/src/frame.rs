//! The frame: a header of 40 bytes, a message, a payload.
//!
//! ```text
//!  0        4     5      6          8           16              24            28            32             36            40
//!  +--------+-----+------+----------+-----------+---------------+-------------+-------------+--------------+-------------+
//!  | "KVR1" |kind |flags | 0 (u16)  | request   | map epoch u64 | message len | payload len | header check |message check|
//!  +--------+-----+------+----------+-----------+---------------+-------------+-------------+--------------+-------------+
//! ```
//!
//! Little-endian. *header check* is the low half of CRC64-NVMe over bytes 0..32, *message check*
//! the same over the message. A header that fails is a broken link: nothing says where the next
//! frame starts. Flags are zero in version 1 and anything else is refused, so that a later version
//! can give them a meaning that an old peer cannot miss.

use crate::message::{Body, Kind, Message};
use kvar_base::{BLOCK_BYTES_MAX, MapEpoch, check::crc64};

/// Length of every header.
pub const HEADER_BYTES: usize = 40;

/// Longest message (1 MiB): 16,384 ids and room.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Longest payload: one block.
pub const PAYLOAD_BYTES_MAX: usize = BLOCK_BYTES_MAX as usize;

const MAGIC: [u8; 4] = *b"KVR1";
const CHECKED_BYTES: usize = 32;

// The layout above, kept true by the compiler.
const AT_KIND: usize = 4;
const AT_FLAGS: usize = 5;
const AT_RESERVED: usize = 6;
const AT_REQUEST: usize = 8;
const AT_EPOCH: usize = 16;
const AT_MESSAGE_LEN: usize = 24;
const AT_PAYLOAD_LEN: usize = 28;
const AT_HEADER_CHECK: usize = 32;
const AT_MESSAGE_CHECK: usize = 36;
const _: () = {
    assert!(AT_KIND == MAGIC.len() && AT_FLAGS == AT_KIND + 1 && AT_RESERVED == AT_FLAGS + 1);
    assert!(AT_REQUEST == AT_RESERVED + size_of::<u16>());
    assert!(AT_EPOCH == AT_REQUEST + size_of::<u64>());
    assert!(AT_MESSAGE_LEN == AT_EPOCH + size_of::<u64>());
    assert!(AT_PAYLOAD_LEN == AT_MESSAGE_LEN + size_of::<u32>());
    assert!(AT_HEADER_CHECK == AT_PAYLOAD_LEN + size_of::<u32>());
    assert!(AT_HEADER_CHECK == CHECKED_BYTES);
    assert!(AT_MESSAGE_CHECK == AT_HEADER_CHECK + size_of::<u32>());
    assert!(HEADER_BYTES == AT_MESSAGE_CHECK + size_of::<u32>());
};

/// What is wrong with bytes that came, or with a message that was to go. All of them end the
/// link: close it, connect anew.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The peer does not speak this protocol.
    #[error("not a kvar frame: it starts with {found:02x?}, not \"KVR1\"; is the address right?")]
    Magic {
        /// The four bytes found.
        found: [u8; 4],
    },
    /// Flipped bits on the way, or the stream is out of step.
    #[error("the header's check is {expected:08x}, its bytes give {found:08x}; link is broken")]
    HeaderCheck {
        /// What the header says.
        expected: u32,
        /// What its bytes give.
        found: u32,
    },
    /// Flipped bits on the way.
    #[error("the {kind:?} message's check is {expected:08x}, its bytes give {found:08x}")]
    MessageCheck {
        /// What the header says.
        expected: u32,
        /// What the bytes give.
        found: u32,
        /// Which message.
        kind: Kind,
    },
    /// A kind that version 1 does not have.
    #[error("unknown message kind {0}; the peer speaks another version of the protocol")]
    Kind(u8),
    /// Flags or reserved bytes that version 1 does not know.
    #[error("unknown flags {0:#08x}; the peer speaks another version of the protocol")]
    Flags(u32),
    /// A message longer than the bound, or not of the length its header says.
    #[error("a message of {found} bytes; the bound is {bound}")]
    MessageLength {
        /// Its length.
        found: usize,
        /// The length allowed.
        bound: usize,
    },
    /// A payload longer than the bound.
    #[error("a payload of {found} bytes; the bound is {bound}")]
    PayloadLength {
        /// Its length.
        found: usize,
        /// The length allowed.
        bound: usize,
    },
    /// A payload behind a message that has none.
    #[error("a {kind:?} message carries no payload, this one has {found} bytes")]
    PayloadUnexpected {
        /// Which message.
        kind: Kind,
        /// The payload's length.
        found: usize,
    },
    /// The message does not parse, or breaks a bound of its own.
    #[error("not a valid {kind:?} message ({why})")]
    Content {
        /// Which message.
        kind: Kind,
        /// What the decoder says.
        why: String,
    },
}

/// A header, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which message follows.
    pub kind: Kind,
    /// The request it belongs to; [`LINK_REQUEST`](crate::LINK_REQUEST) is the link itself.
    pub request: u64,
    /// The sender's map.
    pub epoch: MapEpoch,
    /// Bytes of the message.
    pub message_len: u32,
    /// Bytes of the payload.
    pub payload_len: u32,
    message_check: u32,
}

impl Header {
    /// Takes a header apart; every bound and check that needs no message is verified.
    ///
    /// # Errors
    /// What is wrong with it. The link is of no more use then.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        if bytes[..AT_KIND] != MAGIC {
            return Err(WireError::Magic {
                found: field(bytes, 0),
            });
        }
        let expected = u32_at(bytes, AT_HEADER_CHECK);
        let found = check32(&bytes[..CHECKED_BYTES]);
        if expected != found {
            return Err(WireError::HeaderCheck { expected, found });
        }
        let flags = u32_at(bytes, AT_KIND) >> 8;
        if flags != 0 {
            return Err(WireError::Flags(flags));
        }
        let kind = Kind::from_number(bytes[AT_KIND]).ok_or(WireError::Kind(bytes[AT_KIND]))?;
        let header = Self {
            kind,
            request: u64::from_le_bytes(field(bytes, AT_REQUEST)),
            epoch: MapEpoch(u64::from_le_bytes(field(bytes, AT_EPOCH))),
            message_len: u32_at(bytes, AT_MESSAGE_LEN),
            payload_len: u32_at(bytes, AT_PAYLOAD_LEN),
            message_check: u32_at(bytes, AT_MESSAGE_CHECK),
        };
        check_lengths(
            kind,
            header.message_len as usize,
            header.payload_len as usize,
        )?;
        Ok(header)
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..AT_KIND].copy_from_slice(&MAGIC);
        bytes[AT_KIND] = self.kind.number();
        bytes[AT_REQUEST..AT_EPOCH].copy_from_slice(&self.request.to_le_bytes());
        bytes[AT_EPOCH..AT_MESSAGE_LEN].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[AT_MESSAGE_LEN..AT_PAYLOAD_LEN].copy_from_slice(&self.message_len.to_le_bytes());
        bytes[AT_PAYLOAD_LEN..AT_HEADER_CHECK].copy_from_slice(&self.payload_len.to_le_bytes());
        let check = check32(&bytes[..CHECKED_BYTES]);
        bytes[AT_HEADER_CHECK..AT_MESSAGE_CHECK].copy_from_slice(&check.to_le_bytes());
        bytes[AT_MESSAGE_CHECK..].copy_from_slice(&self.message_check.to_le_bytes());
        bytes
    }
}

/// The lengths of message and payload behind a header: all that a link needs to know.
///
/// # Errors
/// As [`Header::decode`].
pub fn frame_lengths(header: &[u8; HEADER_BYTES]) -> Result<(u32, u32), WireError> {
    Header::decode(header).map(|header| (header.message_len, header.payload_len))
}

/// Appends header and message to `out`; the payload of `payload_len` bytes goes behind them by
/// itself. On an error `out` is as it was.
///
/// # Errors
/// A message that breaks a bound: split the batch.
pub fn encode<B: Body>(
    out: &mut Vec<u8>,
    request: u64,
    epoch: MapEpoch,
    body: &B,
    payload_len: usize,
) -> Result<(), WireError> {
    let start = out.len();
    let result = append(out, request, epoch, body, payload_len);
    if result.is_err() {
        out.truncate(start);
    }
    result
}

fn append<B: Body>(
    out: &mut Vec<u8>,
    request: u64,
    epoch: MapEpoch,
    body: &B,
    payload_len: usize,
) -> Result<(), WireError> {
    let start = out.len();
    out.resize(start + HEADER_BYTES, 0);
    postcard::serialize_with_flavor(body, Appender(out)).map_err(|error| WireError::Content {
        kind: B::KIND,
        why: error.to_string(),
    })?;
    let message_len = out.len() - start - HEADER_BYTES;
    check_lengths(B::KIND, message_len, payload_len)?;
    let header = Header {
        kind: B::KIND,
        request,
        epoch,
        message_len: message_len as u32,
        payload_len: payload_len as u32,
        message_check: check32(&out[start + HEADER_BYTES..]),
    };
    out[start..start + HEADER_BYTES].copy_from_slice(&header.encode());
    Ok(())
}

/// Reads the message behind a header.
///
/// # Errors
/// What is wrong with it. The link is of no more use then.
pub fn decode(header: &Header, message: &[u8]) -> Result<Message, WireError> {
    if message.len() != header.message_len as usize {
        let bound = header.message_len as usize;
        return Err(WireError::MessageLength {
            found: message.len(),
            bound,
        });
    }
    let (expected, found) = (header.message_check, check32(message));
    if expected != found {
        return Err(WireError::MessageCheck {
            expected,
            found,
            kind: header.kind,
        });
    }
    Message::parse(header.kind, message).map_err(|why| WireError::Content {
        kind: header.kind,
        why,
    })
}

fn check_lengths(kind: Kind, message: usize, payload: usize) -> Result<(), WireError> {
    if message > MESSAGE_BYTES_MAX {
        return Err(WireError::MessageLength {
            found: message,
            bound: MESSAGE_BYTES_MAX,
        });
    }
    if payload > PAYLOAD_BYTES_MAX {
        return Err(WireError::PayloadLength {
            found: payload,
            bound: PAYLOAD_BYTES_MAX,
        });
    }
    if payload > 0 && !kind.carries_payload() {
        return Err(WireError::PayloadUnexpected {
            kind,
            found: payload,
        });
    }
    Ok(())
}

/// The low half of CRC64-NVMe.
fn check32(bytes: &[u8]) -> u32 {
    crc64(bytes) as u32
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    std::array::from_fn(|byte| bytes[at + byte])
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

/// Lets the encoder write behind what a `Vec` holds already.
struct Appender<'a>(&'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for Appender<'_> {
    type Output = ();
    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }
    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}
