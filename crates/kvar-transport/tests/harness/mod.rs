//! Two ends of a link of some kind, a framing of its own, and what they got.
#![allow(dead_code)] // each test file uses its part

use kvar_io::SharedMemory;
use kvar_io::region::Region;
use kvar_io::shared::SharedBytes;
use kvar_transport::shared::{Meeting, offer, offer_places};
use kvar_transport::sim::{self, SimControl, SimOptions, SimStream};
use kvar_transport::{
    AnyLink, DownReason, Event, FrameLengths, HEADER_BYTES, Link, LinkKind, LinkOptions, Listener,
    Owned, Readiness, Sink, Source, StreamLink, TcpLink, TcpOptions, TcpStream,
};
use mio::{Events, Poll, Token};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Small, so that back-pressure is soon felt.
pub(crate) const OUTGOING_BYTES_MAX: usize = 20 << 20;

/// Longer than any test needs; a hang is a failure with a name.
const PATIENCE: Duration = Duration::from_secs(60);

/// The kinds of link that the contract is checked over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Tcp,
    /// Memory shared by both, in rings of so many bytes.
    Shared(usize),
    /// Chopped and stalled by this seed.
    Sim(u64),
    /// One byte a call.
    Bytewise,
}

impl Kind {
    /// Too slow for the largest lengths.
    pub(crate) fn is_slow(self) -> bool {
        self == Self::Bytewise
    }
}

/// Those that can have memory beside their stream.
pub(crate) fn check_all_with_places(check: impl Fn(Kind)) {
    check_all(|kind| {
        if kind != Kind::Tcp {
            check(kind);
        }
    });
}

pub(crate) fn check_all(check: impl Fn(Kind)) {
    for kind in [
        Kind::Tcp,
        Kind::Shared(64 << 10),
        Kind::Shared(1 << 20),
        Kind::Sim(1),
        Kind::Sim(0xfeed),
        Kind::Bytewise,
    ] {
        println!("over {kind:?}");
        check(kind);
    }
}

/// Header of the tests: a mark, then the two lengths.
pub(crate) fn frame(message: &[u8], payload: usize) -> Vec<u8> {
    let mut head = vec![0; HEADER_BYTES];
    head[..4].copy_from_slice(b"TEST");
    head[4..8].copy_from_slice(&(message.len() as u32).to_le_bytes());
    head[8..12].copy_from_slice(&(payload as u32).to_le_bytes());
    head.extend_from_slice(message);
    head
}

pub(crate) fn framing(header: &[u8; HEADER_BYTES]) -> Result<FrameLengths, String> {
    let number = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| header[at + n])) as usize;
    if header[..4] != *b"TEST" {
        return Err("no frame of this test".into());
    }
    Ok(FrameLengths {
        message: number(4),
        payload: number(8),
    })
}

/// Numbers from a seed (xorshift).
pub(crate) struct Random(u64);

impl Random {
    /// Those of a seed, far from those of the seeds beside it.
    pub(crate) fn of(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Bytes that differ everywhere and by seed.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::of(seed);
    (0..len).map(|_| random.below(256) as u8).collect()
}

/// What stands before and behind every piece of a sink, and must stay there.
const CANARY: u8 = 0xa5;

/// A source and sink in pieces; those of a sink stand between canaries.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bytes {
    pieces: Vec<Vec<u8>>,
    canary_bytes: usize,
}

impl Bytes {
    pub(crate) fn whole(bytes: Vec<u8>) -> Self {
        Self {
            pieces: vec![bytes],
            canary_bytes: 0,
        }
    }

    /// `bytes` cut into pieces of these lengths, and the rest.
    pub(crate) fn cut(bytes: &[u8], lengths: &[usize]) -> Self {
        let mut pieces = Vec::new();
        let mut left = bytes;
        for len in lengths {
            let (piece, rest) = left.split_at((*len).min(left.len()));
            pieces.push(piece.to_vec());
            left = rest;
        }
        pieces.push(left.to_vec());
        Self {
            pieces,
            canary_bytes: 0,
        }
    }

    pub(crate) fn room(lengths: &[usize]) -> Self {
        let canary_bytes = if lengths.len() > 8 { 32 } else { 4096 };
        let piece = |len: &usize| {
            let mut piece = vec![CANARY; len + 2 * canary_bytes];
            piece[canary_bytes..canary_bytes + len].fill(0xee);
            piece
        };
        Self {
            pieces: lengths.iter().map(piece).collect(),
            canary_bytes,
        }
    }

    /// The bytes; the canaries are looked at on the way.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.total());
        for piece in &self.pieces {
            let (before, rest) = piece.split_at(self.canary_bytes);
            let (inner, behind) = rest.split_at(rest.len() - self.canary_bytes);
            let alive = before.iter().chain(behind).all(|byte| *byte == CANARY);
            assert!(alive, "something was written beside a sink");
            bytes.extend_from_slice(inner);
        }
        bytes
    }

    pub(crate) fn total(&self) -> usize {
        let all: usize = self.pieces.iter().map(Vec::len).sum();
        all - self.pieces.len() * 2 * self.canary_bytes
    }

    pub(crate) fn fill(&mut self, byte: u8) {
        self.visit_mut(&mut |piece| piece.fill(byte));
    }
}

impl Source for Bytes {
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
        for piece in &self.pieces {
            visit(&piece[self.canary_bytes..piece.len() - self.canary_bytes]);
        }
    }
}

impl Sink for Bytes {
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(&'a mut [u8])) {
        for piece in &mut self.pieces {
            let end = piece.len() - self.canary_bytes;
            visit(&mut piece[self.canary_bytes..end]);
        }
    }
    fn len(&self) -> usize {
        self.total()
    }
}

/// A link and, where it has some, its events.
pub(crate) trait Tested: Link<Source = Bytes, Sink = Bytes> {
    fn hear(&mut self, _event: &mio::event::Event) {}
}

impl Tested for StreamLink<SimStream, Bytes, Bytes> {}
impl Tested for TcpLink<Bytes, Bytes> {}
impl Tested for AnyLink<Bytes, Bytes> {
    fn hear(&mut self, event: &mio::event::Event) {
        self.on_event(event);
    }
}

type TestedLink = Box<dyn Tested>;

/// Both ends of a TCP connection on this host.
pub(crate) fn tcp_pair() -> (TcpStream, TcpStream) {
    let mut listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr()).unwrap();
    let client = TcpStream::from_std(client, TcpOptions::default()).unwrap();
    loop {
        if let Some((server, _)) = listener.accept().unwrap() {
            return (client, server);
        }
    }
}

/// Random enough for names that tests of one machine give at the same time.
pub(crate) fn place() -> [u8; 16] {
    let mut place = [0; 16];
    rustix::rand::getrandom(&mut place, rustix::rand::GetRandomFlags::empty()).unwrap();
    place
}

/// A client's and a node's link that share memory.
pub(crate) fn shared_pair(
    poll: &Poll,
    ring_bytes: usize,
    options: LinkOptions,
) -> (AnyLink<Bytes, Bytes>, AnyLink<Bytes, Bytes>) {
    let (client, server) = tcp_pair();
    let mut a = AnyLink::accepted(client, framing, options);
    let mut b = AnyLink::accepted(server, framing, options);
    a.register(poll.registry(), Token(0)).unwrap();
    b.register(poll.registry(), Token(1)).unwrap();
    let (place, secret) = (place(), [7; 16]);
    let meeting = Meeting::open(&place, secret).unwrap();
    let node = offer(&place, &secret, ring_bytes).unwrap();
    let client = meeting.take().unwrap();
    a.share(client, poll.registry(), Token(0)).unwrap();
    b.share(node, poll.registry(), Token(1)).unwrap();
    assert_eq!(a.kind(), LinkKind::SharedMemory);
    (a, b)
}

/// An event, owned.
#[derive(Debug)]
pub(crate) enum Got {
    Frame(Vec<u8>, usize),
    Received(u64, Vec<u8>),
    Sent(u64, Vec<u8>),
    ReturnedSink(u64),
    ReturnedSource(u64),
    Down(DownReason),
    Yield,
}

/// Memory for places in `b`'s hands, and the node's side of it.
pub(crate) fn places(bytes: usize) -> (Arc<Region>, SharedBytes) {
    let memory = SharedMemory::create(bytes).unwrap();
    let (place, secret) = (place(), [9; 16]);
    let meeting = Meeting::open(&place, secret).unwrap();
    offer_places(&place, &secret, &memory).unwrap();
    let region = meeting.take_places(bytes as u64).unwrap();
    (region, memory.map_untouched().unwrap().bytes(bytes))
}

enum Net {
    Tcp { poll: Poll, events: Events },
    Sim { control: SimControl },
}

pub(crate) struct Pair {
    pub(crate) a: TestedLink,
    pub(crate) b: TestedLink,
    pub(crate) got_a: VecDeque<Got>,
    pub(crate) got_b: VecDeque<Got>,
    net: Net,
    begun: Instant,
}

impl Pair {
    pub(crate) fn new(kind: Kind) -> Self {
        Self::build(kind, None)
    }

    /// The same, and end a places its payload in memory of so many bytes, which is end b's.
    pub(crate) fn with_places(kind: Kind, bytes: usize) -> (Self, Arc<Region>) {
        let (region, shared) = places(bytes);
        (Self::build(kind, Some(shared)), region)
    }

    fn build(kind: Kind, places: Option<SharedBytes>) -> Self {
        let options = LinkOptions {
            outgoing_bytes_max: OUTGOING_BYTES_MAX,
            ..Default::default()
        };
        let (a, b, net): (TestedLink, TestedLink, Net) = match kind {
            Kind::Tcp => {
                let poll = Poll::new().unwrap();
                let (client, server) = tcp_pair();
                let mut a = TcpLink::accepted(client, framing, options);
                let mut b = TcpLink::accepted(server, framing, options);
                a.register(poll.registry(), Token(0)).unwrap();
                b.register(poll.registry(), Token(1)).unwrap();
                (
                    Box::new(a),
                    Box::new(b),
                    Net::Tcp {
                        poll,
                        events: Events::with_capacity(8),
                    },
                )
            }
            Kind::Shared(ring_bytes) => {
                let poll = Poll::new().unwrap();
                let (mut a, b) = shared_pair(&poll, ring_bytes, options);
                places.into_iter().for_each(|places| a.stage(places));
                let events = Events::with_capacity(8);
                (Box::new(a), Box::new(b), Net::Tcp { poll, events })
            }
            Kind::Sim(seed) => {
                let chosen = SimOptions {
                    chunk_bytes_max: 300_000,
                    ..SimOptions::default()
                };
                Self::simulated(seed, chosen, options, places)
            }
            Kind::Bytewise => {
                let chosen = SimOptions {
                    chunk_bytes_max: 1,
                    stall_one_in: 0,
                    capacity_bytes: 64,
                };
                Self::simulated(7, chosen, options, places)
            }
        };
        let (got_a, got_b) = (VecDeque::new(), VecDeque::new());
        Self {
            a,
            b,
            got_a,
            got_b,
            net,
            begun: Instant::now(),
        }
    }

    fn simulated(
        seed: u64,
        sim: SimOptions,
        options: LinkOptions,
        places: Option<SharedBytes>,
    ) -> (TestedLink, TestedLink, Net) {
        let (mut a, b, control) = sim::pair(seed, sim);
        if let Some(places) = places {
            a = a.with_places(places);
        }
        let link = |stream: SimStream| Box::new(StreamLink::new(stream, framing, options, false));
        (link(a), link(b), Net::Sim { control })
    }

    /// Any side may move again; over TCP the operating system says which (these tests try all: that
    /// edges are enough is shown where a real loop runs).
    fn ready(&mut self) {
        assert!(self.begun.elapsed() < PATIENCE, "nothing happens any more");
        if let Net::Tcp { poll, events } = &mut self.net {
            poll.poll(events, Some(Duration::ZERO)).unwrap();
            for event in &*events {
                let end = if event.token() == Token(0) {
                    &mut self.a
                } else {
                    &mut self.b
                };
                end.hear(event);
            }
        }
    }

    pub(crate) fn ready_b(&mut self) {
        self.ready();
        self.b.notify(Readiness::TRY_ALL);
    }

    pub(crate) fn turn_a(&mut self) {
        self.ready();
        self.a.notify(Readiness::TRY_ALL);
        while let Some(got) = poll_one(&mut self.a, &mut (1 << 20)) {
            self.got_a.push_back(got);
        }
    }

    pub(crate) fn turn_b(&mut self) {
        self.ready_b();
        while let Some(got) = poll_one(&mut self.b, &mut (1 << 20)) {
            self.got_b.push_back(got);
        }
    }

    pub(crate) fn turn(&mut self) {
        self.turn_a();
        self.turn_b();
    }

    pub(crate) fn poll_b(&mut self, budget: &mut usize) -> Option<Got> {
        poll_one(&mut self.b, budget)
    }

    pub(crate) fn b_frame(&mut self) -> (Vec<u8>, usize) {
        loop {
            match self.got_b.pop_front() {
                Some(Got::Frame(message, payload)) => return (message, payload),
                Some(Got::Sent(..) | Got::Yield) => {}
                Some(other) => panic!("a frame was to come, not {other:?}"),
                None => self.turn(),
            }
        }
    }

    pub(crate) fn b_received(&mut self) -> (u64, Vec<u8>) {
        loop {
            match self.got_b.pop_front() {
                Some(Got::Received(token, bytes)) => return (token, bytes),
                Some(Got::Yield) => {}
                Some(other) => panic!("a payload was to come, not {other:?}"),
                None => self.turn(),
            }
        }
    }

    pub(crate) fn a_sent(&mut self) -> (u64, Vec<u8>) {
        loop {
            match self.got_a.pop_front() {
                Some(Got::Sent(token, bytes)) => return (token, bytes),
                Some(Got::Yield) => {}
                Some(other) => panic!("a source was to come back, not {other:?}"),
                None => self.turn(),
            }
        }
    }

    pub(crate) fn b_down(&mut self) -> DownReason {
        loop {
            match self.got_b.pop_front() {
                Some(Got::Down(reason)) => return reason,
                Some(Got::Yield) => {}
                Some(other) => panic!("the link was to go down, not {other:?}"),
                None => self.turn(),
            }
        }
    }

    /// End a is gone from one moment to the next.
    pub(crate) fn kill_a(&mut self) {
        if let Net::Sim { control } = &self.net {
            control.cut();
        }
        let options = LinkOptions::default();
        let (nobody, _, _) = sim::pair(0, SimOptions::default());
        self.a = Box::new(StreamLink::new(nobody, framing, options, false));
    }

    /// Nothing more arrives, and nobody is told.
    pub(crate) fn silence(&mut self) {
        if let Net::Sim { control } = &self.net {
            control.silence(true);
        }
        // Over TCP: end b is simply never polled again, so that its window closes.
    }

    /// Bytes that are no frames, from end a. They leave through a link of no framing.
    pub(crate) fn raw_into_b(&mut self, bytes: &[u8]) {
        // A head of any bytes is sent as it is.
        self.a.send(bytes).unwrap();
        self.turn_a();
        while self.a.outgoing_bytes() > 0 {
            self.turn();
        }
    }

    pub(crate) fn finish_raw(&mut self) {
        self.a.finish();
    }
}

fn poll_one(link: &mut TestedLink, budget: &mut usize) -> Option<Got> {
    Some(match link.poll(budget) {
        Event::Up => panic!("these links stand from the beginning"),
        Event::Frame {
            message,
            payload_bytes,
            ..
        } => Got::Frame(message.to_vec(), payload_bytes),
        Event::Received { token, sink } => Got::Received(token, sink.bytes()),
        Event::Sent { token, source } => Got::Sent(token, source.bytes()),
        Event::Returned(Owned::Sink { token, .. }) => Got::ReturnedSink(token),
        Event::Returned(Owned::Source { token, .. }) => Got::ReturnedSource(token),
        Event::Down(reason) => Got::Down(reason),
        Event::Yield => Got::Yield,
        Event::Idle => return None,
    })
}
