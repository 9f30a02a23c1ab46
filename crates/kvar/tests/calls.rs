//! Calls under faults, by the hundred thousand: a real server that is killed, stopped and started again,
//! a network that delays, cuts, flips, trickles and swallows; writers and readers whose bytes say which put
//! they are of.
//!
//! ```text
//!   workers ── own client each ── proxy, in a mood ──> server process, killed or stopped now and then
//!      │ every call: how long, how it ended, whose bytes       ▲
//!      └─ tally                        faults, one at a time ──┘     watchdogs: how late does this machine run?
//! ```
//!
//! | counted | allowed |
//! |---|---|
//! | bytes that are not one put of their block | 0 |
//! | calls that end later than their deadline and 10 ms | 0, but for those during which this machine stalled: at most 0.01 % in the long form |
//! | blocks that a lease promised and that were not there | 0, unless the node died meanwhile |
//! | memory of the server, and of this process | no growth beyond what is bounded |
//!
//! A stall is what a watchdog has met, which does nothing but wake up, or time that the call's own two threads
//! were ready and given no core, by the kernel's account: with more to do than cores, these differ.
//!
//! `KVAR_CALLS` says how many calls (the long form: 1,000,000), `KVAR_SEED` which faults.

mod support;

use kvar_base::{BlockId, MissReason, NamespaceKey};
use kvar_client::{CallOptions, Client, ClientConfig, GetItem, GetOutcome, LinkChoice, PutItem};
use kvar_node::KeyFile;
use std::sync::Mutex;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};
use support::proxy::{Mood, Proxy};
use support::random::{Random, bytes_of, is_one_put};
use support::{Place, Server, until};

/// Calls of the short form: what two cores do in well under a minute, the server's part included.
const CALLS: u64 = 100_000;

/// From so many calls on the share of excused calls is judged: fewer are no statistics.
const LONG_FORM: u64 = 1_000_000;

/// How a worker reaches the node: three over sockets, one through memory it shares (which the
/// test holds it to).
const WORKERS: [LinkChoice; 4] = [
    LinkChoice::Tcp,
    LinkChoice::Tcp,
    LinkChoice::Tcp,
    LinkChoice::Auto,
];

/// Blocks that all share, and that nobody removes; then as many of each worker's own.
const BLOCKS: u64 = 200;

/// What a call may take beyond its deadline.
const GRACE: Duration = Duration::from_millis(10);

/// A watchdog that wakes up later than this has met a stall.
const STALL: Duration = Duration::from_millis(2);

/// How long a thread of this process was ready and had no core, since it began; none where the kernel
/// keeps no account of it.
fn unserved(thread: i32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    let nanoseconds = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

/// Threads of this process.
fn threads() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    entries.filter_map(number).collect()
}

/// What a worker counts.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    calls: u64,
    hits: u64,
    misses: u64,
    /// Gets that brought something, and those of them after which memory was shared with the node.
    fruitful: u64,
    fruitful_shared: u64,
    stored: u64,
    unreachable: u64,
    wrong_bytes: u64,
    promised: u64,
    /// Promised, and gone although the node lived.
    broken_promises: u64,
    /// Promised, and not to be had in time or over this network.
    undelivered: u64,
    late: u64,
    late_excused: u64,
    latest_us: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.hits += other.hits;
        self.misses += other.misses;
        self.fruitful += other.fruitful;
        self.fruitful_shared += other.fruitful_shared;
        self.stored += other.stored;
        self.unreachable += other.unreachable;
        self.wrong_bytes += other.wrong_bytes;
        self.promised += other.promised;
        self.broken_promises += other.broken_promises;
        self.undelivered += other.undelivered;
        self.late += other.late;
        self.late_excused += other.late_excused;
        self.latest_us = self.latest_us.max(other.latest_us);
    }
}

/// What all share.
struct World {
    key: NamespaceKey,
    calls_max: u64,
    calls: AtomicU64,
    nonces: AtomicU64,
    is_over: AtomicBool,
    /// Times that each watchdog has woken up.
    rounds: [AtomicU64; WORKERS.len()],
    /// Counts lives of the node, before each ends and after the next has begun.
    lives: AtomicU64,
    stalls: Mutex<Vec<(Instant, Instant)>>,
}

impl World {
    fn id(&self, block: u64) -> BlockId {
        BlockId::from_name(&self.key, &block.to_string())
    }

    /// Whether this machine ran late, for as long as a call did, while it was under way.
    fn was_stalled(&self, from: Instant, to: Instant) -> bool {
        // A watchdog writes its stall down when it wakes up, which may be after this thread did.
        let rounds = self.rounds.each_ref().map(|rounds| rounds.load(SeqCst));
        until("every watchdog has woken up since", || {
            let mut both = self.rounds.iter().zip(rounds);
            both.all(|(now, then)| now.load(SeqCst) > then)
        });
        let stalls = self.stalls.lock().unwrap();
        let overlaps = |(begun, ended): &&(Instant, Instant)| *begun <= to && *ended >= from;
        stalls.iter().rev().take(1000).any(|stall| overlaps(&stall))
    }

    /// Sleeps a little again and again, and notes when that took long: what it measures is the sleep.
    fn watch(&self, rounds: &AtomicU64) {
        let nap = Duration::from_millis(1);
        while !self.is_over.load(Relaxed) {
            let begun = Instant::now();
            std::thread::sleep(nap);
            let ended = Instant::now();
            if ended - begun > nap + STALL {
                self.stalls.lock().unwrap().push((begun, ended));
            }
            rounds.fetch_add(1, SeqCst);
        }
    }
}

/// Sends the watchdogs home, also when something else has failed.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

struct Worker<'a> {
    world: &'a World,
    client: Client,
    proxy: &'a Proxy,
    number: u64,
    random: Random,
    tally: Tally,
    calls: u64,
    /// The client's thread, and this one once it runs.
    threads: Vec<i32>,
}

impl Worker<'_> {
    /// Runs one call and holds it to its deadline.
    fn timed<T>(&mut self, deadline: Duration, call: impl FnOnce(&Client, CallOptions) -> T) -> T {
        let unserved_before = self.unserved();
        let begun = Instant::now();
        let result = call(&self.client, CallOptions::within(deadline));
        let ended = Instant::now();
        self.tally.calls += 1;
        self.world.calls.fetch_add(1, Relaxed);
        let over = (ended - begun).saturating_sub(deadline);
        if over > GRACE {
            self.tally.latest_us = self.tally.latest_us.max(over.as_micros() as u64);
            let unserved = self.unserved().saturating_sub(unserved_before);
            if over.saturating_sub(unserved) <= GRACE || self.world.was_stalled(begun, ended) {
                self.tally.late_excused += 1;
            } else {
                self.tally.late += 1;
                eprintln!(
                    "worker {}: a call of {deadline:?} was {over:?} late, {unserved:?} of it without a core",
                    self.number
                );
            }
        }
        result
    }

    fn unserved(&self) -> Duration {
        let threads = self.threads.iter();
        threads.filter_map(|thread| unserved(*thread)).sum()
    }

    fn deadline(&mut self) -> Duration {
        Duration::from_millis([5, 20, 50, 200][self.random.below(4) as usize])
    }

    fn length(&mut self) -> usize {
        // Small, eager, announced; what is in the middle most often.
        [17, 900, 4096, 4096, 9000, 9000, 20_000, 65_537][self.random.below(8) as usize]
    }

    /// A block of all, or one of this worker's own.
    fn block(&mut self) -> u64 {
        let block = self.random.below(2 * BLOCKS);
        if block < BLOCKS {
            block
        } else {
            block - BLOCKS + BLOCKS * (self.number + 1)
        }
    }

    fn put(&mut self) {
        let count = 1 + self.random.below(4);
        let items: Vec<PutItem> = (0..count)
            .map(|_| {
                let (block, len) = (self.block(), self.length());
                let bytes = bytes_of(block, self.world.nonces.fetch_add(1, Relaxed), len);
                PutItem::of_bytes(self.world.id(block), bytes)
            })
            .collect();
        let deadline = self.deadline();
        let outcomes = self.timed(deadline, |client, options| {
            client.submit_put(items, options).wait()
        });
        assert_eq!(outcomes.len() as u64, count);
        let stored = outcomes.iter().filter(|it| it.word() == "stored");
        self.tally.stored += stored.count() as u64;
        self.rest_if(outcomes.iter().all(|it| it.word() == "unreachable"));
    }

    /// Reads blocks; for each whether it was there, or why not.
    fn get(&mut self, blocks: &[u64], deadline: Duration) -> Vec<Result<(), MissReason>> {
        let items = blocks.iter();
        let items: Vec<GetItem> = items
            .map(|block| GetItem::to_vec(self.world.id(*block)))
            .collect();
        let results = self.timed(deadline, |client, options| {
            client.submit_get(items, options).wait()
        });
        assert_eq!(results.len(), blocks.len());
        let mut outcomes = Vec::new();
        for (block, result) in blocks.iter().zip(results) {
            outcomes.push(match (&result.outcome, result.bytes()) {
                (GetOutcome::Miss(reason), _) => {
                    self.tally.misses += 1;
                    Err(*reason)
                }
                (GetOutcome::Hit { .. }, bytes) => {
                    self.tally.hits += 1;
                    let is_right = bytes.is_some_and(|bytes| is_one_put(*block, bytes));
                    self.tally.wrong_bytes += u64::from(!is_right);
                    Ok(())
                }
            });
        }
        if outcomes.iter().any(Result::is_ok) {
            self.tally.fruitful += 1;
            self.tally.fruitful_shared += u64::from(self.client.stats().links_shared > 0);
        }
        let gone = Err(MissReason::Unreachable);
        self.rest_if(outcomes.iter().all(|outcome| *outcome == gone));
        outcomes
    }

    /// A call that could not even be tried takes no time: without a rest there would be no others.
    fn rest_if(&mut self, is_unreachable: bool) {
        if is_unreachable {
            self.tally.unreachable += 1;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Looks a chain up with a promise, and reads what was promised.
    fn promise(&mut self) {
        let count = 1 + self.random.below(6);
        let chain: Vec<u64> = (0..count).map(|_| self.block()).collect();
        let ids: Vec<BlockId> = chain.iter().map(|block| self.world.id(*block)).collect();
        let (life, flips) = (self.world.lives.load(Relaxed), self.proxy.flips());
        let deadline = self.deadline();
        let leased = self.timed(deadline, |client, options| {
            let ttl = Duration::from_secs(2);
            client.submit_lookup_leased(ids, ttl, options).wait()
        });
        let Some(lease) = leased.lease else {
            return self.rest_if(leased.reason == Some(MissReason::Unreachable));
        };
        self.tally.promised += leased.leading as u64;
        let deadline = self.deadline();
        let outcomes = self.get(&chain[..leased.leading], deadline);
        let has_ended = Instant::now() >= lease.until;
        let has_died = self.world.lives.load(Relaxed) != life;
        let was_flipped = self.proxy.flips() != flips;
        for reason in outcomes.into_iter().filter_map(Result::err) {
            match reason {
                MissReason::Deadline | MissReason::Unreachable | MissReason::Overloaded => {
                    self.tally.undelivered += 1;
                }
                MissReason::Corrupt if was_flipped => self.tally.undelivered += 1,
                _ if has_died || has_ended => {}
                _ => self.tally.broken_promises += 1,
            }
        }
        let _ = self.timed(Duration::from_millis(50), |client, options| {
            client.release(lease.token, options)
        });
    }

    fn run(mut self) -> Tally {
        let this = rustix::thread::gettid();
        self.threads.push(this.as_raw_nonzero().get());
        while self.tally.calls < self.calls {
            match self.random.below(100) {
                0..30 => self.put(),
                30..70 => {
                    let count = 1 + self.random.below(8);
                    let blocks: Vec<u64> = (0..count).map(|_| self.block()).collect();
                    let deadline = self.deadline();
                    self.get(&blocks, deadline);
                }
                70..85 => self.promise(),
                85..95 => {
                    let ids: Vec<BlockId> = (0..BLOCKS).map(|it| self.world.id(it)).collect();
                    let deadline = self.deadline();
                    let found = self.timed(deadline, |client, options| {
                        client.submit_lookup(ids, options).wait()
                    });
                    self.rest_if(found.reason == Some(MissReason::Unreachable));
                }
                _ => {
                    let own = BLOCKS * (self.number + 1) + self.random.below(BLOCKS);
                    let id = self.world.id(own);
                    let deadline = self.deadline();
                    // It may fail in every way; what is removed twice is removed.
                    let _ = self.timed(deadline, |client, options| client.remove(&[id], options));
                }
            }
        }
        self.tally
    }
}

impl Drop for Worker<'_> {
    /// Nobody waits for the calls of a worker that has failed.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.world.calls.fetch_max(self.world.calls_max, Relaxed);
        }
    }
}

/// Does one thing after another to node and network until all calls are made; the server that is left.
fn do_harm(world: &World, proxies: &[Proxy], mut server: Server, seed: u64) -> (Server, u64) {
    let mut random = Random(seed | 1);
    let mut faults = 0;
    while world.calls.load(Relaxed) < world.calls_max {
        faults += 1;
        let time = Duration::from_millis(20 + random.below(200));
        match random.below(10) {
            0 => {
                world.lives.fetch_add(1, Relaxed);
                let place = server.kill();
                server = place.serve();
                let address = server.endpoint.parse().unwrap();
                proxies.iter().for_each(|proxy| proxy.lead_to(address));
                world.lives.fetch_add(1, Relaxed);
            }
            1 | 2 => {
                server.signal("-STOP");
                // How long a fault lasts, here and below: a timetable, and no wait for anything.
                std::thread::sleep(time);
                server.signal("-CONT");
            }
            mood => {
                let mood = match mood {
                    3 => Mood::Delay(Duration::from_millis(1 + random.below(30))),
                    4 => Mood::Truncate,
                    5 | 6 => Mood::Flip,
                    7 => Mood::Trickle,
                    8 => Mood::BlackHole,
                    _ => Mood::Cut,
                };
                let proxy = &proxies[random.below(proxies.len() as u64) as usize];
                proxy.set(mood);
                std::thread::sleep(time);
                proxy.set(Mood::Well);
            }
        }
        // Well for as long: a node that is never well proves little.
        std::thread::sleep(Duration::from_millis(50 + random.below(250)));
    }
    (server, faults)
}

fn setting(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).unwrap_or_default();
    let text = text.replace('_', "");
    text.parse().unwrap_or(default)
}

fn own_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() * 1024
}

#[test]
fn calls_under_faults_are_never_wrong_never_late_and_break_no_promise() {
    let (calls_max, seed) = (setting("KVAR_CALLS", CALLS), setting("KVAR_SEED", 1));
    let dir = tempfile::tempdir().unwrap();
    // Memory for a part of the blocks, so that they come from both tiers.
    let flags = ["--shards", "2", "--dram", "32MiB", "--size", "256MiB"];
    let place = Place::new(dir.path()).with(&flags);
    let server = place.with(&["--flush-after", "50ms"]).serve();
    let world = World {
        key: KeyFile::read(&server.key_file).unwrap().key,
        calls_max,
        calls: AtomicU64::new(0),
        nonces: AtomicU64::new(1),
        is_over: AtomicBool::new(false),
        rounds: Default::default(),
        lives: AtomicU64::new(0),
        stalls: Mutex::new(Vec::new()),
    };
    let to = server.endpoint.parse().unwrap();
    let proxies = WORKERS.map(|_| Proxy::to(to, seed << 8));
    let worker = |number: usize| {
        let config = ClientConfig {
            link: WORKERS[number],
            connect_timeout: Duration::from_millis(500),
            ..ClientConfig::new(&proxies[number].address.to_string(), world.key.clone())
        };
        let before = threads();
        let client = Client::lazy(config).unwrap();
        let mut threads = threads();
        threads.retain(|thread| !before.contains(thread));
        Worker {
            world: &world,
            client,
            threads,
            proxy: &proxies[number],
            number: number as u64,
            random: Random(seed << 16 | (number as u64) << 4 | 1),
            tally: Tally::default(),
            calls: calls_max.div_ceil(WORKERS.len() as u64),
        }
    };
    // Before any other thread begins: what is new then is the client's.
    let workers: Vec<Worker<'_>> = (0..WORKERS.len()).map(worker).collect();
    let (mut sum, mut grown) = (Tally::default(), 0);
    let mut tallies = Vec::new();
    let (mut server, faults) = std::thread::scope(|scope| {
        let _over = Over(&world.is_over);
        for rounds in &world.rounds {
            scope.spawn(|| world.watch(rounds));
        }
        let workers: Vec<_> = workers
            .into_iter()
            .map(|worker| scope.spawn(|| worker.run()))
            .collect();
        let memory = scope.spawn(|| {
            // After a fifth of the calls everything that is kept has been asked for once. Every call
            // ends by its deadline, and with a worker that fails all of them (`Drop`).
            while world.calls.load(Relaxed) < calls_max / 5 {
                std::thread::sleep(Duration::from_millis(10));
            }
            let before = own_resident_bytes();
            while world.calls.load(Relaxed) < calls_max {
                std::thread::sleep(Duration::from_millis(10));
            }
            own_resident_bytes().saturating_sub(before)
        });
        let harmed = do_harm(&world, &proxies, server, seed);
        for worker in workers {
            let tally = worker.join().unwrap();
            sum.add(&tally);
            tallies.push(tally);
        }
        grown = memory.join().unwrap();
        harmed
    });
    let stalls = world.stalls.lock().unwrap().len();
    let lives = 1 + world.lives.load(Relaxed) / 2;
    eprintln!(
        "seed {seed}: {sum:?}; {faults} faults, {lives} lives, {stalls} stalls, grown by {grown}"
    );

    for (link, tally) in WORKERS.into_iter().zip(&tallies) {
        let (all, shared) = (tally.fruitful, tally.fruitful_shared);
        // A link that opens while the network turns bits over may stay on TCP.
        let is_as_told = match link {
            LinkChoice::Tcp => shared == 0,
            _ => shared * 2 > all,
        };
        assert!(is_as_told, "{link:?}: {shared} of {all} gets shared memory");
    }
    assert_eq!(sum.wrong_bytes, 0);
    assert_eq!(sum.broken_promises, 0);
    assert_eq!(sum.late, 0, "the latest by {} us", sum.latest_us);
    if calls_max >= LONG_FORM {
        let excused = sum.late_excused as f64 / sum.calls as f64;
        assert!(excused <= 1e-4, "{excused} of all calls had to be excused");
    }
    // That nothing comes back would be no proof of anything.
    assert!(sum.hits > sum.calls / 4 && sum.promised > sum.calls / 50);
    assert!(grown < 64 << 20, "this process has grown by {grown}");

    // All is well again: what is put is there, and nothing is left open but the clients' links.
    let last = worker(0);
    let client = &last.client;
    let id = world.id(u64::MAX);
    let what = std::fmt::from_fn(|f| write!(f, "a block is there: {}", server.place.log()));
    until(what, || {
        let bytes = bytes_of(u64::MAX, 1, 5000);
        client.put(vec![PutItem::of_bytes(id, bytes.clone())]);
        client.get(vec![GetItem::to_vec(id)])[0].bytes() == Some(&bytes[..])
    });
    let status = server.json("status", &[]);
    let bound = status["memory_bytes_bound"].as_u64().unwrap();
    let resident = server.resident_bytes();
    assert!(resident <= bound, "{resident} resident, {bound} stated");
    server.signal("-TERM");
    assert_eq!(server.wait(), 0, "{}", server.place.log());
}
