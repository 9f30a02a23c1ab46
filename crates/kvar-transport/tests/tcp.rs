//! What only TCP has: addresses, connecting, and edges that must not be lost.

use kvar_transport::{
    Armed, BindError, DownReason, Event, FrameLengths, HEADER_BYTES, Link, LinkOptions, Listener,
    TURN_BYTES, TcpLink, TcpOptions,
};
use mio::{Events, Poll, Token};
use std::net::SocketAddr;
use std::time::Duration;

/// A loop that sleeps longer than this has lost an edge.
const PATIENCE: Duration = Duration::from_secs(20);

type TestLink = TcpLink<Vec<u8>, Vec<u8>>;

fn framing(header: &[u8; HEADER_BYTES]) -> Result<FrameLengths, String> {
    let number = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| header[at + n])) as usize;
    Ok(FrameLengths {
        message: number(0),
        payload: number(4),
    })
}

fn head(payload: usize, number: u32) -> [u8; HEADER_BYTES] {
    let mut head = [0; HEADER_BYTES];
    head[4..8].copy_from_slice(&(payload as u32).to_le_bytes());
    head[8..12].copy_from_slice(&number.to_le_bytes());
    head
}

fn connect(address: SocketAddr) -> TestLink {
    TestLink::connect(
        address,
        framing,
        LinkOptions::default(),
        TcpOptions::default(),
    )
    .unwrap()
}

#[test]
fn a_taken_port_is_named() {
    let first = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let error = Listener::bind(first.local_addr()).unwrap_err();
    assert!(matches!(error, BindError::InUse { .. }), "{error}");
    assert!(
        error.to_string().contains(&first.local_addr().to_string()),
        "{error}"
    );
    let error = Listener::bind("192.0.2.1:0".parse().unwrap()).unwrap_err();
    assert!(matches!(error, BindError::NotHere { .. }), "{error}");
}

#[test]
fn nobody_listening_is_a_reason_not_a_hang() {
    let address = Listener::bind("127.0.0.1:0".parse().unwrap())
        .unwrap()
        .local_addr();
    let mut poll = Poll::new().unwrap();
    let mut link = connect(address);
    link.register(poll.registry(), Token(0)).unwrap();
    link.send(&head(0, 0)).unwrap();
    let mut events = Events::with_capacity(4);
    let reason = loop {
        match link.poll(&mut TURN_BYTES.clone()) {
            Event::Down(reason) => break reason,
            Event::Idle => {
                poll.poll(&mut events, Some(PATIENCE)).unwrap();
                assert!(!events.is_empty(), "nobody said how the connect went");
                events.iter().for_each(|event| link.on_event(event));
            }
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(reason, DownReason::Connect(_)), "{reason}");
}

/// An echo on its own thread and a client that keeps 32 frames under way; both sleep on edges
/// alone, so one that is lost would hang them.
#[test]
fn no_edge_is_lost_between_two_threads() {
    const FRAMES: u32 = 3_000;
    let mut listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr();
    let echo = std::thread::spawn(move || {
        let mut poll = Poll::new().unwrap();
        listener.register(poll.registry(), Token(0)).unwrap();
        let mut link: Option<TestLink> = None;
        let mut events = Events::with_capacity(4);
        let mut number = 0;
        loop {
            if link.as_mut().is_none_or(|link| link.arm() == Armed::Wait) {
                poll.poll(&mut events, Some(PATIENCE)).unwrap();
                assert!(!events.is_empty(), "an edge was lost at the echo");
            }
            for event in &events {
                match &mut link {
                    Some(link) if event.token() == Token(1) => link.on_event(event),
                    _ => {
                        let (stream, _) = listener.accept().unwrap().unwrap();
                        let options = LinkOptions::default();
                        let mut accepted = TestLink::accepted(stream, framing, options);
                        accepted.register(poll.registry(), Token(1)).unwrap();
                        link = Some(accepted);
                    }
                }
            }
            events.clear();
            let Some(link) = &mut link else { continue };
            let mut budget = TURN_BYTES;
            loop {
                match link.poll(&mut budget) {
                    Event::Frame { payload_bytes, .. } => {
                        link.pull(0, vec![0; payload_bytes]).unwrap();
                    }
                    Event::Received { sink, .. } => {
                        link.push(&head(sink.len(), number), u64::from(number), sink)
                            .unwrap();
                        number += 1;
                    }
                    Event::Sent { .. } | Event::Returned(_) => {}
                    Event::Down(reason) => return reason,
                    Event::Idle | Event::Yield => break,
                    Event::Up => panic!("this link was accepted"),
                }
            }
        }
    });

    let mut poll = Poll::new().unwrap();
    let mut link = connect(address);
    link.register(poll.registry(), Token(0)).unwrap();
    let mut events = Events::with_capacity(4);
    let payload = |number: u32| vec![number as u8; 1 + (number as usize * 7_919) % 100_000];
    let (mut asked, mut answered) = (0, 0);
    while answered < FRAMES {
        while asked < FRAMES && asked - answered < 32 {
            let bytes = payload(asked);
            link.push(&head(bytes.len(), asked), u64::from(asked), bytes)
                .unwrap();
            asked += 1;
        }
        let mut budget = TURN_BYTES;
        loop {
            match link.poll(&mut budget) {
                Event::Up | Event::Sent { .. } => {}
                Event::Frame {
                    header,
                    payload_bytes,
                    ..
                } => {
                    assert_eq!(*header, head(payload_bytes, answered));
                    link.pull(9, vec![0; payload_bytes]).unwrap();
                }
                Event::Received { sink, .. } => {
                    assert!(
                        sink == payload(answered),
                        "frame {answered} came back changed"
                    );
                    answered += 1;
                }
                Event::Idle | Event::Yield => break,
                other => panic!("{other:?}"),
            }
        }
        // After the last answer nothing more comes: waiting for it would be waiting for the echo to
        // lose its patience.
        let waits = answered < FRAMES && (asked == FRAMES || asked - answered == 32);
        if waits && link.arm() == Armed::Wait {
            poll.poll(&mut events, Some(PATIENCE)).unwrap();
            assert!(!events.is_empty(), "an edge was lost at the client");
            events.iter().for_each(|event| link.on_event(event));
        }
    }
    link.finish();
    while !matches!(link.poll(&mut TURN_BYTES.clone()), Event::Idle) {}
    assert_eq!(echo.join().unwrap(), DownReason::Closed);
}
