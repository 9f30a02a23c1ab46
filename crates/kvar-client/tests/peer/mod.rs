//! A node for tests: a map behind blocking sockets, one thread a connection, and able to misbehave
//! in every way that the client must survive.
#![allow(dead_code)] // each test file uses its part

use kvar_base::{
    BlockId, LeaseToken, MapEpoch, MissReason, NamespaceKey, PutOutcome, Refusal, check,
};
use kvar_wire::*;
use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How the node answers from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Well,
    /// Takes nothing, says nothing: SIGSTOP.
    Stopped,
    /// Reads everything, answers nothing.
    Mute,
    /// Answers with bytes that are no frame.
    Rubbish,
    /// Sends half of a block and closes.
    Cut,
    /// Flips a bit in every block.
    Corrupt,
    /// Says that sections are longer than the payload.
    WrongSum,
    /// Answers with a message that fits nothing.
    WrongKind,
    /// Answers a request that never was.
    WrongNumber,
    /// Sends a byte, waits a while, sends a byte.
    Trickle,
    /// Closes as soon as anything is asked.
    Close,
}

impl Mood {
    /// Every way to misbehave.
    pub(crate) const ILL: [Self; 10] = [
        Self::Stopped,
        Self::Mute,
        Self::Rubbish,
        Self::Cut,
        Self::Corrupt,
        Self::WrongSum,
        Self::WrongKind,
        Self::WrongNumber,
        Self::Trickle,
        Self::Close,
    ];
}

#[derive(Clone)]
struct Stored {
    sections: Vec<Section>,
    bytes: Vec<u8>,
}

struct Shared {
    key: NamespaceKey,
    limits: Limits,
    mood: Mutex<Mood>,
    changed: Condvar,
    blocks: Mutex<HashMap<BlockId, Stored>>,
    leases: Mutex<HashSet<LeaseToken>>,
    /// Every lease that was asked for: how many ids, and for how long.
    leases_asked: Mutex<Vec<(usize, u32)>>,
    /// The newest version it speaks.
    newest: AtomicU16,
    /// Hints of the puts that were stored.
    hints: Mutex<Vec<PutHints>>,
    closing: AtomicBool,
    /// Whether it says that it has sent memory which it has not.
    lies: AtomicBool,
    /// A section of a block that goes wrong on its way.
    spoiled: Mutex<Option<(BlockId, u16)>>,
    /// From this section on what it has of a block is of another version.
    torn: Mutex<Option<(BlockId, u16)>>,
    /// After so many items of gets it closes every link and answers no more.
    items_left: AtomicUsize,
    /// The items of all gets, in order, and what was said about them.
    items: Mutex<Vec<(GetItem, GetHints)>>,
    /// The blocks of all puts, in order.
    puts: Mutex<Vec<BlockId>>,
    /// Get items and puts that were asked for.
    pub asked: AtomicUsize,
    sockets: Mutex<Vec<TcpStream>>,
}

pub(crate) struct Peer {
    shared: Arc<Shared>,
    pub(crate) address: SocketAddr,
}

pub(crate) const LIMITS: Limits = Limits {
    block_bytes_max: 16 << 20,
    eager_bytes_max: EAGER_BYTES_MAX,
    requests_max: 256,
    bytes_max: 64 << 20,
};

/// Long enough for a machine that compiles beside the test; a hang still fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How much later than its deadline a call may be seen to end here, where a build may hold both
/// cores. (The client itself is late by a timer's millisecond.)
pub(crate) const SLACK: Duration = Duration::from_millis(700);

/// Waits until it is so.
pub(crate) fn until(what: impl std::fmt::Display, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn key() -> NamespaceKey {
    NamespaceKey::new([7; 32])
}

impl Peer {
    pub(crate) fn start() -> Self {
        Self::start_with("127.0.0.1:0".parse().unwrap(), LIMITS)
    }

    pub(crate) fn start_with(address: SocketAddr, limits: Limits) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            key: key(),
            limits,
            mood: Mutex::new(Mood::Well),
            changed: Condvar::new(),
            blocks: Mutex::default(),
            leases: Mutex::default(),
            leases_asked: Mutex::default(),
            newest: AtomicU16::new(VERSIONS.newest),
            hints: Mutex::default(),
            closing: AtomicBool::new(false),
            lies: AtomicBool::new(false),
            spoiled: Mutex::default(),
            torn: Mutex::default(),
            items_left: AtomicUsize::new(usize::MAX),
            items: Mutex::default(),
            puts: Mutex::default(),
            asked: AtomicUsize::new(0),
            sockets: Mutex::default(),
        });
        let of_thread = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if of_thread.closing.load(Ordering::SeqCst) {
                    return;
                }
                let stream = stream.unwrap();
                stream.set_nodelay(true).unwrap();
                of_thread
                    .sockets
                    .lock()
                    .unwrap()
                    .push(stream.try_clone().unwrap());
                let shared = Arc::clone(&of_thread);
                // A connection that ends, however it ends, is no error of the node's.
                std::thread::spawn(move || Serving { shared, stream }.serve());
            }
        });
        Self { shared, address }
    }

    pub(crate) fn set(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
        self.shared.changed.notify_all();
    }

    /// A bit of this section is wrong from now on, whenever it is sent.
    pub(crate) fn spoil(&self, id: BlockId, section: u16) {
        *self.shared.spoiled.lock().unwrap() = Some((id, section));
    }

    /// From this section on it says another version of this block.
    pub(crate) fn tear(&self, id: BlockId, section: u16) {
        *self.shared.torn.lock().unwrap() = Some((id, section));
    }

    /// Dies after so many more items of gets.
    pub(crate) fn die_after(&self, items: usize) {
        self.shared.items_left.store(items, Ordering::SeqCst);
    }

    /// The items of all gets, and what was said about them.
    pub(crate) fn items(&self) -> Vec<(GetItem, GetHints)> {
        self.shared.items.lock().unwrap().clone()
    }

    /// The blocks of all puts, whole or by layers, in the order in which they came.
    pub(crate) fn puts(&self) -> Vec<BlockId> {
        self.shared.puts.lock().unwrap().clone()
    }

    /// Says from now on that it shares memory, and sends none.
    pub(crate) fn lie_about_memory(&self) {
        self.shared.lies.store(true, Ordering::SeqCst);
    }

    /// From the next connection on it is a node of this version.
    pub(crate) fn grow_old(&self, version: u16) {
        self.shared.newest.store(version, Ordering::SeqCst);
    }

    /// Hints of the puts that were stored, in order.
    pub(crate) fn hints(&self) -> Vec<PutHints> {
        self.shared.hints.lock().unwrap().clone()
    }

    pub(crate) fn leases(&self) -> usize {
        self.shared.leases.lock().unwrap().len()
    }

    /// Every lease that was asked for so far: how many ids, and for how many milliseconds.
    pub(crate) fn leases_asked(&self) -> Vec<(usize, u32)> {
        self.shared.leases_asked.lock().unwrap().clone()
    }

    /// Has these blocks, without bytes.
    pub(crate) fn fill(&self, ids: &[BlockId]) {
        let stored = Stored {
            sections: Vec::new(),
            bytes: Vec::new(),
        };
        let blocks = ids.iter().map(|id| (*id, stored.clone()));
        self.shared.blocks.lock().unwrap().extend(blocks);
    }

    pub(crate) fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::SeqCst)
    }

    pub(crate) fn blocks(&self) -> usize {
        self.shared.blocks.lock().unwrap().len()
    }

    /// Dies: all connections break, nobody listens any more.
    pub(crate) fn kill(self) -> SocketAddr {
        self.address
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        for socket in self.shared.sockets.lock().unwrap().drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        self.set(Mood::Well);
    }
}

/// A put whose bytes are still to come.
struct Coming {
    put: Put,
    /// Of its window.
    bytes: u64,
    /// Of one by layers: what was announced, and what has come.
    lengths: Vec<u32>,
    here: Vec<u8>,
}

impl Coming {
    fn of(put: Put) -> Self {
        Self {
            bytes: put.payload_bytes(),
            put,
            lengths: Vec::new(),
            here: Vec::new(),
        }
    }
}

struct Serving {
    shared: Arc<Shared>,
    stream: TcpStream,
}

impl Serving {
    fn serve(mut self) -> Option<()> {
        let (oldest, newest) = (1, self.shared.newest.load(Ordering::SeqCst));
        let mut handshake = NodeHandshake::speaking(VersionRange { oldest, newest }, [9; 32]);
        loop {
            let (_, message, _) = self.read()?;
            let key = self.shared.key.clone();
            let key_of = |name: &str| (name == "default").then_some(key);
            match handshake.on_message(message, key_of, "test node", self.shared.limits) {
                NodeStep::Send(challenge) => self.say(LINK_REQUEST, &challenge.into(), &[])?,
                NodeStep::Open(welcome, _) => {
                    self.say(LINK_REQUEST, &welcome.into(), &[])?;
                    break;
                }
                NodeStep::Fail(failure) => {
                    self.say(LINK_REQUEST, &failure.into(), &[])?;
                    return None;
                }
            }
        }
        let mut announced: HashMap<u64, Coming> = HashMap::new();
        loop {
            let (header, message, payload) = self.read()?;
            let request = header.request;
            match message {
                Message::Get(get) => {
                    self.shared
                        .asked
                        .fetch_add(get.items.len(), Ordering::SeqCst);
                    for (number, item) in get.items.iter().enumerate() {
                        let mut items = self.shared.items.lock().unwrap();
                        items.push((item.clone(), get.hints));
                        drop(items);
                        let left = &self.shared.items_left;
                        if left.fetch_sub(1, Ordering::SeqCst) == 0 {
                            left.store(0, Ordering::SeqCst);
                            return None;
                        }
                        self.answer_get(request, number as u16, item)?;
                    }
                }
                Message::Put(put) => {
                    let bytes = put.payload_bytes();
                    if let Some(outcome) = self.turn_down(&announced, put.id, bytes) {
                        self.say(request, &PutAnswer { outcome }.into(), &[])?;
                    } else if payload.is_empty() {
                        announced.insert(request, Coming::of(put));
                        self.say(request, &Pull {}.into(), &[])?;
                    } else {
                        self.store(request, put, payload)?;
                    }
                }
                Message::Announce(announce) => {
                    let put = Put {
                        id: announce.id,
                        sections: Vec::new(),
                        hints: announce.all_hints(),
                        durable: announce.durable,
                        deadline_us: announce.deadline_us,
                    };
                    let bytes = announce.payload_bytes();
                    if let Some(outcome) = self.turn_down(&announced, put.id, bytes) {
                        self.say(request, &PutAnswer { outcome }.into(), &[])?;
                    } else {
                        let coming = Coming {
                            bytes,
                            lengths: announce.lengths,
                            ..Coming::of(put)
                        };
                        announced.insert(request, coming);
                        self.say(request, &Pull {}.into(), &[])?;
                    }
                }
                Message::Sections(sections) => {
                    if let Some(Coming {
                        put, here, lengths, ..
                    }) = announced.get_mut(&request)
                    {
                        assert_eq!(usize::from(sections.first), put.sections.len());
                        for check in sections.checks {
                            let len = lengths[put.sections.len()];
                            put.sections.push(Section { len, check });
                        }
                        here.extend(payload);
                    }
                }
                Message::Commit(_) => {
                    if let Some(Coming { put, here, .. }) = announced.remove(&request) {
                        self.store(request, put, here)?;
                    }
                }
                Message::Payload(_) => {
                    if let Some(Coming { put, .. }) = announced.remove(&request) {
                        self.store(request, put, payload)?;
                    }
                }
                Message::Cancel(_) => drop(announced.remove(&request)),
                // Before it does what is asked: it may be asked again.
                _ if *self.shared.mood.lock().unwrap() == Mood::Close => return None,
                message => {
                    let answer = self.answer(message)?;
                    self.say(request, &answer, &[])?;
                }
            }
        }
    }

    /// Notes that a block is to be put; what is said of it if it is not wanted. Beyond its window a
    /// node takes no put, whichever kind fills it.
    fn turn_down(
        &self,
        announced: &HashMap<u64, Coming>,
        id: BlockId,
        bytes: u64,
    ) -> Option<PutOutcome> {
        self.shared.asked.fetch_add(1, Ordering::SeqCst);
        self.shared.puts.lock().unwrap().push(id);
        let open: u64 = announced.values().map(|coming| coming.bytes).sum();
        let limits = &self.shared.limits;
        if self.shared.blocks.lock().unwrap().contains_key(&id) {
            Some(PutOutcome::Exists)
        } else if open + bytes > limits.bytes_max || announced.len() >= limits.requests_max as usize
        {
            Some(PutOutcome::Refused(Refusal::Busy))
        } else {
            None
        }
    }

    fn answer(&self, message: Message) -> Option<Message> {
        let mut blocks = self.shared.blocks.lock().unwrap();
        Some(match message {
            Message::Lookup(lookup) => {
                let bits: Vec<bool> = lookup
                    .ids
                    .iter()
                    .map(|id| blocks.contains_key(id))
                    .collect();
                let leading = bits.iter().take_while(|there| **there).count();
                let reason = (leading < bits.len()).then_some(MissReason::Absent);
                if lookup.leading_only {
                    LookupAnswer::Leading(leading as u32, reason).into()
                } else {
                    LookupAnswer::Each(Bitmap::of(&bits)).into()
                }
            }
            Message::Lease(_) | Message::Renew(_) | Message::Release(_)
                if self.shared.newest.load(Ordering::SeqCst) < VERSION_WITH_LEASES =>
            {
                panic!("an old node is asked for leases")
            }
            Message::Attach(_) => {
                let newest = self.shared.newest.load(Ordering::SeqCst);
                assert!(
                    newest >= VERSION_WITH_SHARED_MEMORY,
                    "an old node is asked to share memory"
                );
                if self.shared.lies.load(Ordering::SeqCst) {
                    return Some(
                        AttachAnswer::Attached {
                            ring_bytes: 1 << 20,
                        }
                        .into(),
                    );
                }
                let text = "this node's threads block, so they share no memory";
                AttachAnswer::declined(AttachDeclined::Off, text).into()
            }
            Message::Lease(lease) => {
                let asked = (lease.ids.len(), lease.ttl_ms);
                self.shared.leases_asked.lock().unwrap().push(asked);
                let there = lease.ids.iter().map(|id| blocks.contains_key(id));
                let leading = there.take_while(|there| *there).count();
                if leading > 0 {
                    self.shared.leases.lock().unwrap().insert(lease.token);
                }
                LeaseAnswer {
                    leading: leading as u32,
                    reason: (leading < lease.ids.len()).then_some(MissReason::Absent),
                    lasts_ms: if leading > 0 {
                        lease.ttl_ms.min(30_000)
                    } else {
                        0
                    },
                }
                .into()
            }
            Message::Renew(renew) => {
                let stands = self.shared.leases.lock().unwrap().contains(&renew.token);
                let lasts_ms = if stands { renew.ttl_ms } else { 0 };
                RenewAnswer { lasts_ms }.into()
            }
            Message::Release(release) => {
                let released = self.shared.leases.lock().unwrap().remove(&release.token);
                ReleaseAnswer { released }.into()
            }
            Message::Remove(remove) => {
                let count = remove
                    .ids
                    .iter()
                    .filter(|id| blocks.remove(id).is_some())
                    .count();
                RemoveAnswer {
                    finished: Finished::Done(count as u64),
                }
                .into()
            }
            Message::Flush(_) => FlushAnswer {
                finished: Finished::Done(0),
            }
            .into(),
            Message::Purge(_) => {
                let count = blocks.len() as u64;
                blocks.clear();
                PurgeAnswer {
                    finished: Finished::Done(count),
                }
                .into()
            }
            Message::Stat(stat) => {
                let stat = blocks
                    .get(&stat.id)
                    .ok_or(MissReason::Absent)
                    .map(|block| BlockStat {
                        bytes: block.bytes.len() as u64,
                        sections: None,
                        version: None,
                        in_dram: true,
                        on_flash: false,
                        flushed: false,
                        age_s: None,
                        expires_unix_s: None,
                    });
                StatAnswer { stat }.into()
            }
            Message::Status(_) => StatusAnswer {
                json: "{\"node\":\"test\"}".into(),
            }
            .into(),
            Message::Ping(_) => Pong {}.into(),
            _ => return None,
        })
    }

    fn answer_get(&mut self, request: u64, item: u16, wanted: &GetItem) -> Option<()> {
        let found = self.shared.blocks.lock().unwrap().get(&wanted.id).cloned();
        let miss = |reason| GetAnswer {
            item,
            outcome: kvar_wire::GetOutcome::Miss(reason),
        };
        let Some(Stored { sections, bytes }) = found else {
            return self.say(request, &miss(MissReason::Absent).into(), &[]);
        };
        let all = 0..sections.len() as u16;
        let range = wanted.sections.clone().unwrap_or(all);
        let (start, end) = (usize::from(range.start), usize::from(range.end));
        if end > sections.len()
            || !wanted
                .expected
                .fit(sections[start..end].iter().map(|s| s.len))
        {
            return self.say(request, &miss(MissReason::WrongFormat).into(), &[]);
        }
        let at = |n: usize| sections[..n].iter().map(|s| s.len as usize).sum::<usize>();
        let mut payload = bytes[at(start)..at(end)].to_vec();
        let mut version = check::version(sections.iter().map(|s| s.check));
        let is_hit = |of: &Mutex<Option<(BlockId, u16)>>| {
            (*of.lock().unwrap()).filter(|(id, _)| *id == wanted.id)
        };
        if let Some((_, section)) = is_hit(&self.shared.spoiled)
            && range.contains(&section)
        {
            let end = payload.len() - 1;
            payload[end] ^= 1;
        }
        if is_hit(&self.shared.torn).is_some_and(|(_, from)| range.start >= from) {
            version ^= 1;
            if wanted.version.is_some_and(|wanted| wanted != version) {
                return self.say(request, &miss(MissReason::Version).into(), &[]);
            }
        }
        let mut sent = sections[start..end].to_vec();
        match *self.shared.mood.lock().unwrap() {
            Mood::Corrupt => {
                let middle = payload.len() / 2;
                payload[middle] ^= 4;
            }
            Mood::WrongSum => sent[0].len += 1,
            _ => {}
        }
        let outcome = kvar_wire::GetOutcome::Hit {
            version,
            first_section: range.start,
            sections: sent,
        };
        self.say(request, &GetAnswer { item, outcome }.into(), &payload)
    }

    fn store(&mut self, request: u64, put: Put, payload: Vec<u8>) -> Option<()> {
        let mut at = 0;
        for (number, section) in put.sections.iter().enumerate() {
            let bytes = &payload[at..at + section.len as usize];
            let check = kvar_base::ContentCheck::of(bytes, &put.id, number as u16);
            assert_eq!(
                check, section.check,
                "the client's check of section {number}"
            );
            at += bytes.len();
        }
        assert_eq!(at, payload.len());
        self.shared.hints.lock().unwrap().push(put.hints);
        let stored = Stored {
            sections: put.sections,
            bytes: payload,
        };
        self.shared.blocks.lock().unwrap().insert(put.id, stored);
        self.say(
            request,
            &PutAnswer {
                outcome: PutOutcome::Stored,
            }
            .into(),
            &[],
        )
    }

    fn read(&mut self) -> Option<(Header, Message, Vec<u8>)> {
        self.wait_while_stopped();
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head).ok()?;
        self.wait_while_stopped();
        let header = Header::decode(&head).expect("a sound header of the client");
        let mut message = vec![0; header.message_len as usize];
        self.stream.read_exact(&mut message).ok()?;
        let mut payload = vec![0; header.payload_len as usize];
        self.stream.read_exact(&mut payload).ok()?;
        Some((
            header,
            decode(&header, &message).expect("a sound message"),
            payload,
        ))
    }

    fn wait_while_stopped(&self) {
        let mut mood = self.shared.mood.lock().unwrap();
        while *mood == Mood::Stopped {
            mood = self.shared.changed.wait(mood).unwrap();
        }
    }

    fn say(&mut self, request: u64, message: &Message, payload: &[u8]) -> Option<()> {
        self.wait_while_stopped();
        let mood = *self.shared.mood.lock().unwrap();
        let handshake = matches!(
            message,
            Message::Challenge(_) | Message::Welcome(_) | Message::AttachAnswer(_)
        );
        let mut bytes = Vec::new();
        let number = if mood == Mood::WrongNumber && !handshake {
            1 << 60
        } else {
            request
        };
        let wrong: Message = Pull {}.into();
        match mood {
            Mood::WrongKind if !handshake => wrong.encode(&mut bytes, number, MapEpoch(1), 0),
            _ => message.encode(&mut bytes, number, MapEpoch(1), payload.len()),
        }
        .unwrap();
        bytes.extend_from_slice(payload);
        match mood {
            Mood::Mute => return Some(()),
            Mood::Close if !handshake => return None,
            Mood::Rubbish if !handshake => bytes = vec![0x42; 1000],
            Mood::Cut if !handshake => bytes.truncate(bytes.len() / 2),
            Mood::Trickle => {
                for byte in bytes {
                    // What is wrong with this node, and no wait for anything.
                    std::thread::sleep(Duration::from_millis(20));
                    self.stream.write_all(&[byte]).ok()?;
                }
                return Some(());
            }
            _ => {}
        }
        self.stream.write_all(&bytes).ok()?;
        (mood != Mood::Cut || handshake).then_some(())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}
