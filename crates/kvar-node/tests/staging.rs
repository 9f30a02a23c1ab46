//! What no client of ours would say about its staging region: it ends the link, and harms nobody else.

mod support;

use kvar_base::{BlockId, MapEpoch, PutOutcome};
use kvar_io::region::Region;
use kvar_node::NodeHandle;
use kvar_transport::shared::Meeting;
use kvar_transport::{
    AnyLink, Armed, Event, FrameLengths, HEADER_BYTES, Link as _, LinkOptions, Readiness,
    TcpOptions,
};
use kvar_wire::*;
use mio::{Events, Poll, Token};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::{PATIENCE, Peer, bytes_of, config, key_of, start, until};

const REGION: u64 = 1 << 20;
const LEN: usize = 10_000;

fn id(n: u8) -> BlockId {
    BlockId::new([n; 32])
}

fn framing(header: &[u8; HEADER_BYTES]) -> Result<FrameLengths, String> {
    let (message, payload) = frame_lengths(header).map_err(|error| error.to_string())?;
    Ok(FrameLengths {
        message: message as usize,
        payload: payload as usize,
    })
}

/// A link through shared memory that says what it is told to.
struct Raw {
    link: AnyLink<Vec<u8>, Vec<u8>>,
    poll: Poll,
}

impl Raw {
    fn attach(node: &NodeHandle) -> Self {
        let poll = Poll::new().unwrap();
        let (options, tcp) = (LinkOptions::default(), TcpOptions::default());
        let mut link = AnyLink::connect(node.listen_addr(), framing, options, tcp).unwrap();
        link.register(poll.registry(), Token(0)).unwrap();
        let mut raw = Self { link, poll };
        let mut handshake = ClientHandshake::new("default", key_of(node), "raw", [7; 32]);
        raw.send(LINK_REQUEST, &handshake.hello().clone());
        while let ClientStep::Send(proof) = handshake.on_message(raw.receive().1).unwrap() {
            raw.send(LINK_REQUEST, &proof);
        }
        let (place, meeting) = meet();
        raw.send(
            LINK_REQUEST,
            &Attach {
                place,
                secret: [5; 16],
            },
        );
        let (_, answer) = raw.receive();
        assert!(
            matches!(answer, Message::AttachAnswer(AttachAnswer::Attached { .. })),
            "{answer:?}"
        );
        let end = meeting.take().unwrap();
        raw.link.share(end, raw.poll.registry(), Token(0)).unwrap();
        raw
    }

    fn stage(&mut self, bytes: u64) -> Result<Arc<Region>, (AttachDeclined, String)> {
        let (place, meeting) = meet();
        let secret = [5; 16];
        self.send(
            900,
            &Stage {
                place,
                secret,
                bytes,
            },
        );
        match self.receive() {
            (900, Message::StageAnswer(StageAnswer::Staged { bytes: found })) => {
                assert_eq!(found, bytes);
                Ok(meeting.take_places(bytes).unwrap())
            }
            (900, Message::StageAnswer(StageAnswer::Declined { why, text })) => Err((why, text)),
            other => panic!("{other:?}"),
        }
    }

    fn send<B: Body>(&mut self, request: u64, body: &B) {
        let mut head = Vec::new();
        encode(&mut head, request, MapEpoch::SINGLE_NODE, body, 0).unwrap();
        self.link.send(&head).unwrap();
    }

    fn get(&mut self, request: u64, slots: &[(u8, Option<GetSlot>)]) {
        let item = |(n, slot): &(u8, Option<GetSlot>)| GetItem {
            slot: *slot,
            ..Peer::item(id(*n))
        };
        self.send(
            request,
            &Peer::get_message(slots.iter().map(item).collect()),
        );
    }

    /// The next message; a payload behind it is passed over.
    fn receive(&mut self) -> (u64, Message) {
        let end = Instant::now() + PATIENCE;
        let mut events = Events::with_capacity(8);
        loop {
            assert!(Instant::now() < end, "the node says nothing");
            match self.link.poll(&mut (1 << 20)) {
                Event::Frame {
                    header, message, ..
                } => {
                    let header = Header::decode(header).unwrap();
                    let message = decode(&header, message).unwrap();
                    self.link.discard();
                    return (header.request, message);
                }
                Event::Idle | Event::Yield => {
                    if self.link.arm() == Armed::Wait {
                        let wait = Some(Duration::from_millis(20));
                        // One that is interrupted is a short one.
                        let _ = self.poll.poll(&mut events, wait);
                        events.iter().for_each(|event| self.link.on_event(event));
                    }
                    self.link.notify(Readiness::TRY_ALL);
                }
                Event::Down(reason) => panic!("the node closed the link: {reason}"),
                _ => {}
            }
        }
    }

    /// The node ends the link for this reason.
    fn is_ended(&mut self, part: &str) {
        loop {
            match self.receive() {
                (_, Message::Failure(failure)) => {
                    assert_eq!(failure.code, FailureCode::Protocol);
                    assert!(failure.text.contains(part), "{}", failure.text);
                    return;
                }
                (_, Message::GetAnswer(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn meet() -> ([u8; 16], Meeting) {
    let mut place = [0; 16];
    rustix::rand::getrandom(&mut place, rustix::rand::GetRandomFlags::empty()).unwrap();
    let meeting = Meeting::open(&place, [5; 16]).unwrap();
    (place, meeting)
}

fn slot(at: u64, bytes: u32) -> Option<GetSlot> {
    Some(GetSlot { at, bytes })
}

fn node_with_blocks(dir: &std::path::Path, staging: &str) -> NodeHandle {
    let mut config = config(dir, 1);
    config.set("shared_memory_staging", staging).unwrap();
    let node = start(&config);
    let mut peer = Peer::greet(&node);
    for n in 1..=4 {
        let bytes = bytes_of(&id(n), LEN);
        assert_eq!(peer.put(id(n), &[&bytes], false), PutOutcome::Stored);
    }
    node
}

#[test]
fn places_outside_or_taken_end_the_link() {
    let dir = tempfile::tempdir().unwrap();
    let node = node_with_blocks(dir.path(), "64MiB");
    let len = LEN as u32;
    let end = REGION - LEN as u64;
    for (slots, part) in [
        (vec![(1, slot(end + 1, len))], "outside"),
        (vec![(1, slot(u64::MAX, len))], "outside"),
        (vec![(1, slot(0, 0))], "outside"),
        (vec![(1, slot(0, len)), (2, slot(9_999, len))], "overlaps"),
        (vec![(1, slot(500, len)), (1, slot(500, len))], "overlaps"),
    ] {
        let mut raw = Raw::attach(&node);
        let region = raw.stage(REGION).unwrap();
        let places = region.take(REGION as usize).unwrap();
        raw.get(1, &slots);
        raw.is_ended(part);
        assert!(places.iter().all(|byte| *byte == 0), "{slots:?}");
    }
    // Over a link that has none, of either kind.
    let mut raw = Raw::attach(&node);
    raw.get(1, &[(1, slot(0, len))]);
    raw.is_ended("no staging region");
    let mut peer = Peer::greet(&node);
    let item = GetItem {
        slot: slot(0, len),
        ..Peer::item(id(1))
    };
    peer.send(5, &Peer::get_message(vec![item]));
    let (_, answer, _) = peer.receive();
    assert!(matches!(answer, Message::Failure(_)), "{answer:?}");
    until("all regions are given back", || {
        let text = Peer::greet(&node).ask(&Status {});
        let Message::StatusAnswer(status) = text else {
            panic!("{text:?}")
        };
        status.json.contains("\"staging_bytes\":0")
    });
}

/// Answers, cancels and fences: a place is free again when the node says so, and not before.
#[test]
fn a_place_is_used_again_when_its_get_has_been_answered_or_fenced() {
    let dir = tempfile::tempdir().unwrap();
    let node = node_with_blocks(dir.path(), "64MiB");
    let mut raw = Raw::attach(&node);
    let region = raw.stage(REGION).unwrap();
    let places = region.take(REGION as usize).unwrap();
    let len = LEN as u32;
    for round in 1..200_u64 {
        let n = 1 + (round % 4) as u8;
        // Another one at the same time, whose bytes come through the ring.
        raw.get(round, &[(n, slot(77, len)), (n, None)]);
        for _ in 0..2 {
            let (request, answer) = raw.receive();
            assert_eq!(request, round);
            let Message::GetAnswer(GetAnswer { item, outcome }) = answer else {
                panic!("{answer:?}")
            };
            match outcome {
                GetOutcome::Placed { sections, .. } => {
                    assert_eq!((item, sections[0].len), (0, len));
                    assert!(places[77..77 + LEN] == bytes_of(&id(n), LEN)[..]);
                }
                GetOutcome::Hit { .. } => assert_eq!(item, 1),
                GetOutcome::Miss(reason) => panic!("{reason:?}"),
            }
        }
        assert!(places[..77].iter().all(|byte| *byte == 0));
        assert!(places[77 + LEN..].iter().all(|byte| *byte == 0));
    }
    // Misses free it too: absent, and of another length.
    for (request, wanted) in [(1000, (9, slot(0, len))), (1001, (1, slot(0, len - 1)))] {
        raw.get(request, &[wanted]);
        let (_, answer) = raw.receive();
        assert!(
            matches!(
                answer,
                Message::GetAnswer(GetAnswer {
                    outcome: GetOutcome::Miss(_),
                    ..
                })
            ),
            "{answer:?}"
        );
    }
    // A cancelled one is free behind the Pong, whether or not it was answered before.
    for round in 2000..2100 {
        raw.get(round, &[(1, slot(0, len)), (2, slot(20_000, len))]);
        raw.send(round, &Cancel {});
        raw.send(10_000 + round, &Ping {});
        loop {
            match raw.receive() {
                (_, Message::Pong(_)) => break,
                (_, Message::GetAnswer(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }
    raw.get(3000, &[(3, slot(0, len))]);
    let (request, answer) = raw.receive();
    assert_eq!(request, 3000, "{answer:?}");
    assert!(places[..LEN] == bytes_of(&id(3), LEN)[..]);
}

#[test]
fn a_region_is_declined_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let node = node_with_blocks(dir.path(), "2MiB");
    let mut raw = Raw::attach(&node);
    for (bytes, why, part) in [
        (0, AttachDeclined::Failed, "at least one"),
        (4097, AttachDeclined::Failed, "4 KiB pages"),
        (4 << 20, AttachDeclined::Full, "shared_memory_staging"),
        (u64::MAX - 4095, AttachDeclined::Full, "too many"),
    ] {
        let (found, text) = raw.stage(bytes).unwrap_err();
        assert_eq!(found, why, "{bytes}: {text}");
        assert!(text.contains(part), "{text}");
    }
    let region = raw.stage(REGION).unwrap();
    assert_eq!(region.bytes() as u64, REGION);
    let (why, _) = raw.stage(REGION).unwrap_err();
    assert_eq!(why, AttachDeclined::Late);
    // Two at a time fit; one of a link without shared memory does not.
    let other = Raw::attach(&node).stage(REGION);
    assert!(other.is_ok());
    let mut peer = Peer::greet(&node);
    let (place, _meeting) = meet();
    let secret = [5; 16];
    let answer = peer.ask(&Stage {
        place,
        secret,
        bytes: 4096,
    });
    assert!(
        matches!(
            answer,
            Message::StageAnswer(StageAnswer::Declined {
                why: AttachDeclined::Remote,
                ..
            })
        ),
        "{answer:?}"
    );
}
