//! What only shared memory has: meeting, bells, a peer that writes where it must not, one that is
//! killed.

mod harness;

use harness::{Bytes, Random, framing, place, tcp_pair};
use kvar_io::SharedMemory;
use kvar_io::shared::{SharedBytes, Words};
use kvar_transport::shared::{
    Meeting, MeetingRefused, RING_BYTES_MAX, RING_BYTES_MIN, SharedEnd, memory_bytes, offer,
    ring_bytes,
};
use kvar_transport::{
    AnyLink, Armed, DownReason, Event, Link, LinkKind, LinkOptions, Listener, TURN_BYTES,
    TcpOptions, TcpStream,
};
use mio::{Events, Poll, Token};
use rustix::fs::FallocateFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A loop that sleeps longer than this has missed its bell.
const PATIENCE: Duration = Duration::from_secs(20);

const RING: usize = RING_BYTES_MIN;

type TestLink = AnyLink<Bytes, Bytes>;

/// Links of a client and a node that share memory, each to be run by its own loop.
fn sharing(ring_bytes: usize) -> ((TestLink, SharedEnd), (TestLink, SharedEnd)) {
    let (client, server) = tcp_pair();
    let (place, secret) = (place(), [1; 16]);
    let meeting = Meeting::open(&place, secret).unwrap();
    let node = offer(&place, &secret, ring_bytes).unwrap();
    let link = |stream| TestLink::accepted(stream, framing, LinkOptions::default());
    (
        (link(client), meeting.take().unwrap()),
        (link(server), node),
    )
}

/// A loop of one link that sleeps whenever it may; `on` is told all events but the dull ones.
fn run(
    (mut link, end): (TestLink, SharedEnd),
    mut on: impl FnMut(&mut TestLink, Told) -> bool,
) -> u64 {
    let mut poll = Poll::new().unwrap();
    link.register(poll.registry(), Token(0)).unwrap();
    link.share(end, poll.registry(), Token(0)).unwrap();
    assert_eq!(link.kind(), LinkKind::SharedMemory);
    let mut events = Events::with_capacity(4);
    let mut sleeps = 0;
    if !on(&mut link, Told::Begin) {
        return 0;
    }
    loop {
        let mut budget = TURN_BYTES;
        loop {
            let told = match link.poll(&mut budget) {
                Event::Frame { payload_bytes, .. } => Told::Frame(payload_bytes),
                Event::Received { sink, .. } => Told::Received(sink.bytes()),
                Event::Down(reason) => Told::Down(reason),
                Event::Sent { .. } | Event::Returned(_) | Event::Up => continue,
                Event::Idle | Event::Yield => break,
            };
            if !on(&mut link, told) {
                return sleeps;
            }
        }
        if link.arm() == Armed::Wait {
            sleeps += 1;
            poll.poll(&mut events, Some(PATIENCE)).unwrap();
            assert!(!events.is_empty(), "a bell was missed");
            events.iter().for_each(|event| link.on_event(event));
        }
    }
}

#[derive(Debug)]
enum Told {
    Begin,
    Frame(usize),
    Received(Vec<u8>),
    Down(DownReason),
}

/// An echo and a client on two threads that sleep on bells alone: one that is missed would hang them.
/// Payloads are larger than the ring at times, so that both sides wait for bytes and for room.
#[test]
fn no_bell_is_missed_between_two_threads() {
    const FRAMES: u32 = 2_000;
    let (client, node) = sharing(RING);
    let echo = std::thread::spawn(move || {
        let mut number = 0_u64;
        let mut down = None;
        run(node, |link, told| {
            match told {
                Told::Begin => {}
                Told::Frame(bytes) => link.pull(0, Bytes::room(&[bytes])).unwrap(),
                Told::Received(bytes) => {
                    let head = harness::frame(b"", bytes.len());
                    link.push(&head, number, Bytes::whole(bytes)).unwrap();
                    number += 1;
                }
                Told::Down(reason) => down = Some(reason),
            }
            down.is_none()
        });
        down
    });
    let payload = |number: u32| vec![number as u8; 1 + (number as usize * 7_919) % 150_000];
    let (mut asked, mut answered) = (0, 0);
    run(client, |link, told| {
        match told {
            Told::Begin => {}
            Told::Frame(bytes) => link.pull(9, Bytes::room(&[bytes])).unwrap(),
            Told::Received(bytes) => {
                assert!(
                    bytes == payload(answered),
                    "frame {answered} came back changed"
                );
                answered += 1;
            }
            Told::Down(reason) => panic!("{reason}"),
        }
        while asked < FRAMES && asked - answered < 16 {
            let bytes = payload(asked);
            let head = harness::frame(b"", bytes.len());
            link.push(&head, u64::from(asked), Bytes::whole(bytes))
                .unwrap();
            asked += 1;
        }
        if answered == FRAMES {
            link.finish();
            while !matches!(link.poll(&mut TURN_BYTES.clone()), Event::Idle) {}
        }
        answered < FRAMES
    });
    assert_eq!(echo.join().unwrap(), Some(DownReason::Closed));
}

/// An idle link costs no CPU: both sides sleep, and nothing wakes them.
#[test]
fn an_idle_link_wakes_nobody() {
    let mut poll = Poll::new().unwrap();
    let (mut a, mut b) = harness::shared_pair(&poll, RING, LinkOptions::default());
    let mut events = Events::with_capacity(8);
    a.send(&harness::frame(b"hello", 0)).unwrap();
    let mut heard = false;
    let mut still = 0;
    while still < 3 {
        poll.poll(&mut events, Some(Duration::from_millis(50)))
            .unwrap();
        still = if heard && events.is_empty() {
            still + 1
        } else {
            0
        };
        for event in &events {
            let link = if event.token() == Token(0) {
                &mut a
            } else {
                &mut b
            };
            link.on_event(event);
        }
        for link in [&mut a, &mut b] {
            loop {
                match link.poll(&mut TURN_BYTES.clone()) {
                    Event::Frame { .. } => heard = true,
                    Event::Idle => break,
                    other => panic!("{other:?}"),
                }
            }
            while link.arm() == Armed::Ready {
                link.poll(&mut TURN_BYTES.clone());
            }
        }
    }
}

#[test]
fn memory_for_a_link_makes_the_largest_rings_that_fit() {
    assert_eq!(ring_bytes(2 << 20), 1 << 20);
    assert_eq!(ring_bytes((2 << 20) + 4096), 1 << 20);
    assert_eq!(ring_bytes((2 << 20) - 1), 1 << 19);
    assert_eq!(ring_bytes(0), RING_BYTES_MIN);
    assert_eq!(ring_bytes(u64::MAX), RING_BYTES_MAX);
}

fn socket_name(place: &[u8; 16]) -> SocketAddr {
    let hex: String = place.iter().map(|byte| format!("{byte:02x}")).collect();
    SocketAddr::from_abstract_name(format!("kvar-link-{hex}")).unwrap()
}

#[test]
fn a_node_that_finds_nobody_at_the_place_says_so() {
    let refused = offer(&place(), &[0; 16], RING).unwrap_err();
    assert!(matches!(refused, MeetingRefused::Reach(_)), "{refused}");
    assert!(refused.to_string().contains("on this host"), "{refused}");
}

/// The name of an abstract socket can be seen by everyone on the host: whoever comes without the secret
/// is passed over, whatever it brings, and nobody is waited for.
#[test]
fn strangers_at_the_place_are_passed_over() {
    let (place, secret) = (place(), [3; 16]);
    let meeting = Meeting::open(&place, secret).unwrap();
    let mut silent = UnixStream::connect_addr(&socket_name(&place)).unwrap();
    let mut loud = UnixStream::connect_addr(&socket_name(&place)).unwrap();
    loud.write_all(&[9; 24]).unwrap();
    offer(&place, &[4; 16], RING).unwrap();
    let mut bare = UnixStream::connect_addr(&socket_name(&place)).unwrap();
    bare.write_all(&[&secret[..], &(RING as u64).to_le_bytes()].concat())
        .unwrap();
    let _node = offer(&place, &secret, RING).unwrap();
    meeting.take().unwrap();
    // The door is closed behind it.
    assert_eq!(silent.read(&mut [0]).unwrap_or(0), 0);
    assert!(UnixStream::connect_addr(&socket_name(&place)).is_err());

    let place = harness::place();
    let meeting = Meeting::open(&place, secret).unwrap();
    let refused = meeting.take().unwrap_err();
    assert!(matches!(refused, MeetingRefused::NotSent), "{refused}");
}

/// A client that keeps the protocol of the meeting and then writes what it likes.
struct Scribbler {
    _tcp: TcpStream,
    bell: UnixStream,
    memory: SharedMemory,
    /// Words of the ring to the node, and from it.
    words: [Words; 2],
    bytes: SharedBytes,
}

fn scribbler() -> (Scribbler, TestLink, Poll) {
    let (client, server) = tcp_pair();
    let place = place();
    let listener = UnixListener::bind_addr(&socket_name(&place)).unwrap();
    let end = offer(&place, &[5; 16], RING).unwrap();
    let (bell, _) = listener.accept().unwrap();
    let mut said = [0; 24];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut pieces = [IoSliceMut::new(&mut said)];
    rustix::net::recvmsg(&bell, &mut pieces, &mut rights, RecvFlags::empty()).unwrap();
    let file = rights
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        })
        .unwrap();
    let memory = SharedMemory::received(file, memory_bytes(RING)).unwrap();
    let mut carver = memory.map().unwrap();
    let to_node = carver.words(4, 128);
    carver.skip_to(2048);
    let to_client = carver.words(4, 128);
    carver.skip_to(4096);
    let bytes = carver.bytes(RING);
    let poll = Poll::new().unwrap();
    let mut node = TestLink::accepted(server, framing, LinkOptions::default());
    node.register(poll.registry(), Token(0)).unwrap();
    node.share(end, poll.registry(), Token(0)).unwrap();
    let words = [to_node, to_client];
    (
        Scribbler {
            _tcp: client,
            memory,
            bell,
            words,
            bytes,
        },
        node,
        poll,
    )
}

/// Polls until the link is down or has nothing to do.
fn drain(link: &mut TestLink) -> Option<DownReason> {
    link.notify(kvar_transport::Readiness::TRY_ALL);
    let mut budget = 64 << 20;
    loop {
        let payload = match link.poll(&mut budget) {
            Event::Down(reason) => return Some(reason),
            Event::Idle | Event::Yield => return None,
            Event::Frame { payload_bytes, .. } => payload_bytes,
            _ => 0,
        };
        if payload > 0 {
            link.pull(1, Bytes::room(&[payload])).unwrap();
        }
    }
}

const TAIL: usize = 0;
const HEAD: usize = 1;

/// Each index, written beyond what is possible or back: the link ends and says why.
#[test]
fn an_index_that_cannot_be_ends_the_link_with_a_reason() {
    for wrong in [RING as u64 + 1, u64::MAX, 1 << 40] {
        let (client, mut node, _poll) = scribbler();
        client.words[0].word(TAIL).store(wrong, Ordering::SeqCst);
        let Some(DownReason::Broken(why)) = drain(&mut node) else {
            panic!("a tail at {wrong} was taken");
        };
        assert!(why.contains("wrote over its shared memory: tail"), "{why}");

        let (client, mut node, _poll) = scribbler();
        node.push(&harness::frame(b"", 9), 1, Bytes::whole(vec![1; 9]))
            .unwrap();
        client.words[1].word(HEAD).store(wrong, Ordering::SeqCst);
        // The writer looks when it has no room by what it knows, or before it sleeps.
        let mut down = drain(&mut node);
        for token in 2..20 {
            let len = 10_000;
            let _ = node.push(&harness::frame(b"", len), token, Bytes::whole(vec![1; len]));
            down = down.or_else(|| drain(&mut node));
        }
        let Some(DownReason::Broken(why)) = down else {
            panic!("a head at {wrong} was taken: {down:?}");
        };
        assert!(why.contains("wrote over its shared memory: head"), "{why}");
    }
    // Back again.
    let (mut client, mut node, _poll) = scribbler();
    client.bytes.copy_in(0, &harness::frame(b"sound", 0));
    client.words[0].word(TAIL).store(45, Ordering::SeqCst);
    assert_eq!(drain(&mut node), None);
    client.words[0].word(TAIL).store(44, Ordering::SeqCst);
    assert!(matches!(drain(&mut node), Some(DownReason::Broken(_))));
}

/// Words and bytes at random, by seed, between sound frames of the node: whatever comes of it, the node
/// neither hangs nor panics, its sources come back as they were, and what it took in lies in its sinks
/// alone.
#[test]
fn a_client_that_scribbles_harms_only_itself() {
    let mut ended = 0;
    for seed in 1..=300_u64 {
        let mut random = Random::of(seed);
        let mut draw = |below: u64| random.below(below);
        let (mut client, mut node, _poll) = scribbler();
        let mut down = None;
        for step in 0..60 {
            match draw(6) {
                0 => {
                    let ring = draw(2) as usize;
                    let word = draw(4) as usize;
                    let value = match draw(4) {
                        0 => draw(RING as u64 * 2),
                        1 => u64::MAX - draw(100),
                        2 => 1 << draw(64),
                        _ => draw(300),
                    };
                    client.words[ring].word(word).store(value, Ordering::SeqCst);
                }
                1 => {
                    let head = harness::frame(b"claims", draw(1 << 20) as usize);
                    client.bytes.copy_in(draw(60_000) as usize, &head);
                }
                2 => {
                    let noise: Vec<u8> = (0..draw(2_000)).map(|_| draw(256) as u8).collect();
                    client.bytes.copy_in(draw(60_000) as usize, &noise);
                }
                3 => {
                    // A sound step, so that some get further than the first look.
                    let tail = client.words[0].word(TAIL).load(Ordering::SeqCst);
                    client.words[0]
                        .word(TAIL)
                        .store(tail.wrapping_add(draw(500)), Ordering::SeqCst);
                }
                4 => {
                    let len = 1 + draw(40_000) as usize;
                    let _ = node.push(&harness::frame(b"", len), step, Bytes::whole(vec![7; len]));
                }
                _ => {
                    node.arm();
                }
            }
            if let Some(mut fenced) = (draw(10) == 0).then(|| node.fence_push(step)).flatten() {
                assert!(fenced.source.bytes().iter().all(|byte| *byte == 7));
                fenced.source.fill(0);
            }
            if let Some(reason) = drain(&mut node) {
                down = Some(reason);
                break;
            }
        }
        ended += u64::from(down.is_some());
        if let Some(reason) = down {
            assert!(
                matches!(reason, DownReason::Broken(_) | DownReason::Garbage(_)),
                "seed {seed}: {reason}"
            );
        }
    }
    assert!(ended > 100, "only {ended} of 300 scribblers were found out");
}

/// Seals forbid another size, not holes: their pages are zeros when they are touched again, and nobody
/// dies of it.
#[test]
fn holes_in_the_memory_are_zeros_and_no_fault() {
    let (mut client, mut node, _poll) = scribbler();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let all = client.memory.bytes() as u64;
    for round in 0..20_u64 {
        client.bytes.copy_in(0, &harness::frame(b"gone", 0));
        rustix::fs::fallocate(&client.memory, flags, 0, all).unwrap();
        // All words are zero again, which for the node is an index that goes back, or none at all.
        let _ = node.push(&harness::frame(b"", 900), round, Bytes::whole(vec![1; 900]));
        if let Some(reason) = drain(&mut node) {
            assert!(matches!(reason, DownReason::Broken(_)), "{reason}");
            return;
        }
        client.words[0].word(TAIL).store(64, Ordering::SeqCst);
        if let Some(reason) = drain(&mut node) {
            let said = matches!(reason, DownReason::Broken(_) | DownReason::Garbage(_));
            assert!(said, "{reason}");
            return;
        }
    }
    panic!("zeros were taken for frames");
}

/// A client that rings without end, or fills the node's bell, keeps nobody.
#[test]
fn a_bell_that_rings_for_ever_keeps_nobody() {
    let (mut client, mut node, mut poll) = scribbler();
    client.bell.set_nonblocking(true).unwrap();
    while client.bell.write(&[1; 512]).is_ok() {}
    let mut events = Events::with_capacity(4);
    let begun = Instant::now();
    for _ in 0..20 {
        poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        events.iter().for_each(|event| node.on_event(event));
        assert_eq!(drain(&mut node), None);
        node.arm();
    }
    // The client never hears its own bell: the node's end fills up and does not block.
    for _ in 0..2_000 {
        client.words[1].word(2).store(1, Ordering::SeqCst);
        let tail = client.words[1].word(TAIL).load(Ordering::SeqCst);
        client.words[1].word(HEAD).store(tail, Ordering::SeqCst);
        node.send(&harness::frame(b"", 0)).unwrap();
        assert_eq!(drain(&mut node), None);
    }
    assert!(begun.elapsed() < PATIENCE);
}

/// Says to a test that it is the client, and where the node listens.
const CLIENT: &str = "KVAR_TEST_NODE";

/// The client that is killed: it sends more than the ring takes, so that it is in the middle of it then.
fn send_half(node: &str) {
    let stream = std::net::TcpStream::connect(node).unwrap();
    let mut tcp = stream.try_clone().unwrap();
    let (place, secret) = (place(), [8; 16]);
    let meeting = Meeting::open(&place, secret).unwrap();
    tcp.write_all(&place).unwrap();
    // The answer: a byte when the memory was sent.
    tcp.read_exact(&mut [0]).unwrap();
    let end = meeting.take().unwrap();
    let stream = TcpStream::from_std(stream, TcpOptions::default()).unwrap();
    let link = TestLink::accepted(stream, framing, LinkOptions::default());
    let len = 10 << 20;
    run((link, end), |link, told| {
        if matches!(told, Told::Begin) {
            let head = harness::frame(b"half", len);
            link.push(&head, 1, Bytes::whole(vec![6; len])).unwrap();
        }
        true
    });
}

/// The client is a process of its own: this test once more, told that it is the client.
#[test]
fn a_killed_client_is_gone_at_once_and_gives_everything_back() {
    if let Ok(node) = std::env::var(CLIENT) {
        return send_half(&node);
    }
    let mut listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let this_test = "a_killed_client_is_gone_at_once_and_gives_everything_back";
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", this_test, "--nocapture"])
        .env(CLIENT, listener.local_addr().to_string())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let mut accepted = loop {
        if let Some((stream, _)) = listener.accept().unwrap() {
            break stream;
        }
        assert!(begun.elapsed() < PATIENCE, "the child does not come");
        std::thread::sleep(Duration::from_millis(1));
    };
    let mut place = [0; 16];
    let mut got = 0;
    use kvar_transport::Stream as _;
    while got < place.len() {
        got += accepted
            .read(&mut [IoSliceMut::new(&mut place[got..])])
            .unwrap_or(0);
        assert!(begun.elapsed() < PATIENCE, "the child says no place");
    }
    let end = offer(&place, &[8; 16], RING).unwrap();
    accepted.write(&[std::io::IoSlice::new(&[1])]).unwrap();

    let mut poll = Poll::new().unwrap();
    let mut node = TestLink::accepted(accepted, framing, LinkOptions::default());
    node.register(poll.registry(), Token(0)).unwrap();
    node.share(end, poll.registry(), Token(0)).unwrap();
    let mut events = Events::with_capacity(8);
    let mut back = Vec::new();
    let mut killed: Option<Instant> = None;
    let reason = 'down: loop {
        loop {
            match node.poll(&mut TURN_BYTES.clone()) {
                Event::Frame { payload_bytes, .. } => {
                    node.pull(1, Bytes::room(&[payload_bytes])).unwrap();
                    // What it has queued for the client comes back too.
                    let head = harness::frame(b"", 3 << 20);
                    node.push(&head, 2, Bytes::whole(vec![2; 3 << 20])).unwrap();
                    child.kill().unwrap();
                    child.wait().unwrap();
                    killed = Some(Instant::now());
                }
                Event::Returned(kvar_transport::Owned::Sink { token, sink }) => {
                    sink.bytes(); // looks at the canaries
                    back.push(token);
                }
                Event::Returned(kvar_transport::Owned::Source { token, .. }) => back.push(token),
                Event::Down(reason) => break 'down reason,
                Event::Idle | Event::Yield => break,
                other => panic!("{other:?}"),
            }
        }
        assert!(begun.elapsed() < PATIENCE, "the link does not go down");
        if node.arm() == Armed::Wait {
            poll.poll(&mut events, Some(PATIENCE)).unwrap();
            assert!(!events.is_empty(), "nobody said that the client is dead");
            events.iter().for_each(|event| node.on_event(event));
        }
    };
    back.sort_unstable();
    assert_eq!(back, [1, 2], "{reason}");
    assert!(
        matches!(reason, DownReason::Cut | DownReason::Broken(_)),
        "{reason}"
    );
    let noticed = killed.unwrap().elapsed();
    assert!(
        noticed < Duration::from_secs(5),
        "noticed after {noticed:?}"
    );
}
