//! Bytes from outside: each kind of damage has its name, and none of them panics. (Damaged frames
//! under checks that hold, in bulk: `crates/kvar-fuzz`.)

mod samples;

use kvar_base::{BlockId, MapEpoch, SECTIONS_MAX, check::crc64};
use kvar_wire::*;
use proptest::prelude::*;

fn encoded(message: &Message, payload: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    message
        .encode(&mut bytes, 7, MapEpoch::SINGLE_NODE, payload)
        .unwrap();
    bytes
}

fn parse(bytes: &[u8]) -> Result<Message, WireError> {
    let header = Header::decode(bytes.first_chunk().expect("at least a header"))?;
    decode(&header, &bytes[HEADER_BYTES..])
}

/// Makes the header's check right again after a change.
fn reseal(bytes: &mut [u8]) {
    let check = crc64(&bytes[..32]) as u32;
    bytes[32..36].copy_from_slice(&check.to_le_bytes());
}

/// A frame of this kind around any message bytes, all checks right.
fn sealed(kind: u8, message: &[u8]) -> Vec<u8> {
    let mut bytes = encoded(&Ping {}.into(), 0);
    bytes[4] = kind;
    bytes[24..28].copy_from_slice(&(message.len() as u32).to_le_bytes());
    bytes[36..40].copy_from_slice(&(crc64(message) as u32).to_le_bytes());
    bytes.extend_from_slice(message);
    reseal(&mut bytes);
    bytes
}

#[test]
fn each_damage_has_its_name() {
    let good = encoded(&Status {}.into(), 0);
    let damaged = |damage: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        damage(&mut bytes);
        parse(&bytes).unwrap_err()
    };
    assert!(matches!(
        damaged(&|b| b[..4].copy_from_slice(b"HTTP")),
        WireError::Magic { .. }
    ));
    assert!(matches!(
        damaged(&|b| b[9] ^= 1),
        WireError::HeaderCheck { .. }
    ));
    assert!(matches!(
        damaged(&|b| b[33] ^= 1),
        WireError::HeaderCheck { .. }
    ));
    assert!(matches!(
        damaged(&|b| b[37] ^= 1),
        WireError::MessageCheck {
            kind: Kind::Status,
            ..
        }
    ));
    let resealed = |at: usize, value: &[u8]| {
        damaged(&|bytes: &mut Vec<u8>| {
            bytes[at..at + value.len()].copy_from_slice(value);
            reseal(bytes);
        })
    };
    assert_eq!(resealed(4, &[99]), WireError::Kind(99));
    assert_eq!(resealed(5, &[1]), WireError::Flags(1));
    assert_eq!(resealed(7, &[1]), WireError::Flags(1 << 16));
    let found = MESSAGE_BYTES_MAX + 1;
    let error = resealed(24, &(found as u32).to_le_bytes());
    assert_eq!(
        error,
        WireError::MessageLength {
            found,
            bound: MESSAGE_BYTES_MAX
        }
    );
    let error = resealed(28, &u32::MAX.to_le_bytes());
    assert!(matches!(error, WireError::PayloadLength { .. }));
    let error = resealed(28, &1_u32.to_le_bytes());
    assert_eq!(
        error,
        WireError::PayloadUnexpected {
            kind: Kind::Status,
            found: 1
        }
    );
    assert!(matches!(
        damaged(&|b| b.push(0)),
        WireError::MessageLength { .. }
    ));
    assert!(
        matches!(parse(&sealed(26, b"x")), Err(WireError::Content { .. })),
        "bytes too many"
    );
    assert!(
        matches!(parse(&sealed(16 + 8, b"x")), Err(WireError::Content { .. })),
        "too few"
    );
}

#[test]
fn bounds_hold_for_senders_and_receivers() {
    let too_many = Remove {
        ids: vec![BlockId::new([1; 32]); IDS_MAX + 1],
        deadline_us: 1,
    };
    let mut out = vec![1, 2, 3];
    let error = encode(&mut out, 1, MapEpoch(1), &too_many, 0).unwrap_err();
    assert!(
        matches!(
            error,
            WireError::Content {
                kind: Kind::Remove,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(out, [1, 2, 3], "a message that does not go leaves no trace");
    let most = Remove {
        ids: vec![BlockId::new([1; 32]); IDS_MAX],
        deadline_us: 1,
    };
    assert_eq!(
        parse(&encoded(&most.clone().into(), 0)).unwrap(),
        most.into()
    );

    // A list that says it is longer than its bound, or than the bytes behind it.
    for claimed in [
        SECTIONS_MAX as u64 + 1,
        1 << 20,
        u64::from(u32::MAX),
        u64::MAX >> 1,
    ] {
        let mut message = vec![0; 32];
        let mut left = claimed;
        while left >= 0x80 {
            message.push(left as u8 | 0x80);
            left >>= 7;
        }
        message.push(left as u8);
        message.resize(message.len() + 4000, 1);
        let error = parse(&sealed(Kind::Put.number(), &message)).unwrap_err();
        assert!(
            matches!(
                error,
                WireError::Content {
                    kind: Kind::Put,
                    ..
                }
            ),
            "{error}"
        );
    }
    let long = Hello {
        versions: VERSIONS,
        namespace: "n".repeat(NAME_BYTES_MAX + 1),
        nonce: [0; 32],
        client: String::new(),
    };
    assert!(encode(&mut Vec::new(), 1, MapEpoch(1), &long, 0).is_err());
    assert!(
        encode(
            &mut Vec::new(),
            1,
            MapEpoch(1),
            &Payload {},
            PAYLOAD_BYTES_MAX + 1
        )
        .is_err()
    );
}

#[test]
fn a_newer_hello_is_read_and_nothing_else_may_be_longer() {
    for (name, message, payload) in samples::all() {
        let mut bytes = encoded(&message, payload);
        bytes.truncate(HEADER_BYTES + bytes.len() - HEADER_BYTES);
        let mut longer = bytes[HEADER_BYTES..].to_vec();
        // One byte would be the mode of a Welcome that has none.
        longer.extend([0, 0]);
        let parsed = parse(&sealed(message.kind().number(), &longer));
        assert_eq!(parsed.is_ok(), message.kind() == Kind::Hello, "{name}");
    }
}

#[test]
fn every_bit_flip_in_every_sample_is_noticed() {
    for (name, message, payload) in samples::all() {
        let good = encoded(&message, payload);
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&bytes).is_err(), "{name}: bit {bit} may flip unseen");
        }
    }
}

proptest! {
    #[test]
    fn any_header_bytes_are_survived(bytes: [[u8; 20]; 2]) {
        let mut header: [u8; 40] = bytes.concat().try_into().unwrap();
        let _ = Header::decode(&header);
        header[..4].copy_from_slice(b"KVR1");
        header[5..8].fill(0);
        let check = crc64(&header[..32]) as u32;
        header[32..36].copy_from_slice(&check.to_le_bytes());
        if let Ok((message, payload)) = frame_lengths(&header) {
            prop_assert!(message as usize <= MESSAGE_BYTES_MAX);
            prop_assert!(payload as usize <= PAYLOAD_BYTES_MAX);
        }
    }

    #[test]
    fn any_message_bytes_are_survived(kind in 0_u8..40, message: Vec<u8>) {
        let _ = parse(&sealed(kind, &message));
    }
}
