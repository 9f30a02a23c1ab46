//! `kvar bench net`: gets of 64 KiB over loopback TCP, one core each side, against plain sockets;
//! through shared memory, against a cold memcpy (`shared`); and gets from flash over TCP, against fio on
//! the same file.
//!
//! The node is a process of its own, this very binary on free ports with one shard; the client is
//! a session driven by this thread. Both spin for a stated time before they sleep, as the ping
//! they are compared with does. Every byte passes its check on both sides.

use super::fio::{self, Job};
use super::load::{Filling, Random};
use super::pair::{Pair, Reached};
use super::stats::{idle_cpu, latencies};
use super::{BLOCK_BYTES, Outcome, Row, abba, bar, shared};
use crate::failure::Failure;
use kvar_base::{BlockId, ByteSize};
use kvar_client::{
    Answer, ClientConfig, Completion, Filled, GetItem, Lengths, LinkChoice, PutItem, Request,
    Session, Ticket,
};
use kvar_node::KeyFile;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Blocks of the memory runs: 256 MiB, more than any cache of the CPU.
pub(super) const DRAM_BLOCKS: u64 = 4096;
const DEADLINE: Duration = Duration::from_secs(10);
/// Blocks put under way at once when filling.
const PUTS_IN_FLIGHT: usize = 32;

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// A folder with room for the data files; they are removed afterwards.
    pub(crate) folder: PathBuf,
    /// Size of the store that is read from flash; 0 leaves that out.
    pub(crate) flash_size: ByteSize,
    pub(crate) pairs: usize,
    pub(crate) seconds: f64,
    /// How long node and client spin before they sleep.
    pub(crate) spin: Duration,
}

pub(crate) fn run(settings: &Settings) -> Result<Outcome, Failure> {
    let folder = settings
        .folder
        .join(format!("kvar-bench-net-{}", std::process::id()));
    std::fs::create_dir_all(&folder)
        .map_err(|error| Failure::failed(format!("cannot make {}: {error}", folder.display())))?;
    let result = run_inner(settings, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    result
}

fn run_inner(settings: &Settings, folder: &Path) -> Result<Outcome, Failure> {
    let mut rows = Vec::new();
    let mut idle = Vec::new();
    from_memory(settings, folder, &mut rows, &mut idle)?;
    shared::run(settings, folder, &mut rows, &mut idle)?;
    if settings.flash_size.0 > 0 {
        from_flash(settings, folder, &mut rows, &mut idle)?;
    }
    Ok(Outcome::new(rows, &idle))
}

fn from_memory(
    settings: &Settings,
    folder: &Path,
    rows: &mut Vec<Row>,
    idle: &mut Vec<f64>,
) -> Result<(), Failure> {
    let node = NodeProcess::start(&folder.join("memory.data"), "1GiB", "512MiB", settings.spin)?;
    let mut client = Client::open(&node, settings.spin, LinkChoice::Tcp)?;
    client.fill(DRAM_BLOCKS)?;
    let mut pair = Pair::open(false)?;
    let progress = bar((settings.pairs * 4) as u64, "pairs against sockets");
    let (mut checking, mut bare, mut ping, mut p99) = (vec![], vec![], vec![], vec![]);
    let (mut rate, mut checking_rate, mut bare_rate) = (vec![], vec![], vec![]);
    let (mut p50, mut ping_p50) = (vec![], vec![]);
    for number in 0..settings.pairs {
        idle.push(idle_cpu());
        // Ours stands between the two yardsticks, so that both are next to it.
        let order = if number.is_multiple_of(2) {
            [true, false]
        } else {
            [false, true]
        };
        let first = pair.run(16, settings.seconds, order[0])?;
        let ours = client.read(16, settings.seconds, DRAM_BLOCKS)?;
        let second = pair.run(16, settings.seconds, order[1])?;
        let (with_check, without) = if order[0] {
            (first, second)
        } else {
            (second, first)
        };
        checking.push(ours.bytes_per_s / with_check.bytes_per_s);
        bare.push(ours.bytes_per_s / without.bytes_per_s);
        rate.push(ours.bytes_per_s / 1e9);
        checking_rate.push(with_check.bytes_per_s / 1e9);
        bare_rate.push(without.bytes_per_s / 1e9);
        progress.inc(2);
        p99.push(client.read(4, settings.seconds / 2.0, DRAM_BLOCKS)?.p99_us);
        progress.inc(1);
        // A yardstick that polls keeps a core busy: it lives only while it is used.
        let mut polling = Pair::open(true)?;
        let theirs = polling.run(1, settings.seconds / 2.0, false)?;
        drop(polling);
        let ours = client.read(1, settings.seconds / 2.0, DRAM_BLOCKS)?;
        ping.push(ours.p50_us / theirs.p50_us);
        p50.push(ours.p50_us);
        ping_p50.push(theirs.p50_us);
        progress.inc(1);
    }
    progress.finish_and_clear();
    rows.extend([
        Row::of(
            "get_64k_qd16_vs_checking_pair",
            checking,
            "from memory, over TCP",
        ),
        Row::of("get_64k_qd16_vs_pair", bare, ""),
        Row::of(
            "get_64k_qd1_p50_vs_ping",
            ping,
            "lower is better; --spin matters",
        ),
        Row::of("get_64k_qd4_p99_us", p99, "microseconds"),
        Row::of("get_64k_qd16_gb_per_s", rate, "ours"),
        Row::of(
            "checking_pair_gb_per_s",
            checking_rate,
            "sockets and a CRC64",
        ),
        Row::of("pair_gb_per_s", bare_rate, "sockets alone"),
        Row::of("get_64k_qd1_p50_us", p50, "ours, microseconds"),
        Row::of("ping_p50_us", ping_p50, "sockets that poll, microseconds"),
    ]);
    Ok(())
}

fn from_flash(
    settings: &Settings,
    folder: &Path,
    rows: &mut Vec<Row>,
    idle: &mut Vec<f64>,
) -> Result<(), Failure> {
    fio::check()?;
    let data = folder.join("flash.data");
    let node = NodeProcess::start(
        &data,
        &settings.flash_size.to_string(),
        "64MiB",
        settings.spin,
    )?;
    let mut client = Client::open(&node, settings.spin, LinkChoice::Tcp)?;
    let blocks = settings.flash_size.0 * 9 / 10 / BLOCK_BYTES as u64;
    client.fill(blocks)?;
    let progress = bar(settings.pairs as u64, "pairs against fio");
    let (mut ratios, mut rate, mut fio_rate) = (vec![], vec![], vec![]);
    let job = Job {
        rw: "randread",
        block_bytes: BLOCK_BYTES as u64,
        depth: 16,
        seconds: settings.seconds,
    };
    for number in 0..settings.pairs {
        idle.push(idle_cpu());
        let read_fio = || fio::run(&data, 0, settings.flash_size.0, job);
        let read = || client.read(16, settings.seconds, blocks);
        let (theirs, ours) = abba(number, read_fio, read)?;
        ratios.push(ours.bytes_per_s / theirs.bytes_per_s);
        rate.push(ours.bytes_per_s / 1e9);
        fio_rate.push(theirs.bytes_per_s / 1e9);
        progress.inc(1);
    }
    progress.finish_and_clear();
    rows.extend([
        Row::of("flash_get_64k_qd16_vs_fio", ratios, "from flash, over TCP"),
        Row::of("flash_get_64k_qd16_gb_per_s", rate, "ours"),
        Row::of("flash_fio_64k_qd16_gb_per_s", fio_rate, "fio"),
    ]);
    Ok(())
}

/// A node of this binary, ended with its value.
pub(super) struct NodeProcess {
    pub(super) child: Child,
    endpoint: String,
    key_file: PathBuf,
}

impl NodeProcess {
    pub(super) fn start(
        data: &Path,
        size: &str,
        dram: &str,
        spin: Duration,
    ) -> Result<Self, Failure> {
        let own = std::env::current_exe()
            .map_err(|error| Failure::failed(format!("where am I: {error}")))?;
        let ready = data.with_extension("ready");
        let mut child = Command::new(own)
            .arg("serve")
            .arg("--data")
            .arg(data)
            .args([
                "--size", size, "--dram", dram, "--shards", "1", "--log", "warn",
            ])
            .args(["--shared-memory-staging", "512MiB"])
            .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .arg("--spin-us")
            .arg(spin.as_micros().to_string())
            .arg("--ready-file")
            .arg(&ready)
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| Failure::failed(format!("the node did not start: {error}")))?;
        let started = Instant::now();
        loop {
            if let Some(found) = std::fs::read_to_string(&ready).ok().and_then(|text| {
                let value: serde_json::Value = serde_json::from_str(&text).ok()?;
                Some((
                    value["listen"].as_str()?.to_owned(),
                    PathBuf::from(value["key_file"].as_str()?),
                ))
            }) {
                let (endpoint, key_file) = found;
                return Ok(Self {
                    child,
                    endpoint,
                    key_file,
                });
            }
            if let Ok(Some(status)) = child.try_wait() {
                return Err(Failure::failed(format!(
                    "the node ended before it was ready ({status})"
                )));
            }
            if started.elapsed() > Duration::from_secs(30) {
                let _ = child.kill();
                return Err(Failure::failed("the node was not ready within 30 s"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // Its data is thrown away: no need to let it write.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) struct Client {
    session: Session,
    block_bytes: usize,
    done: Vec<Completion>,
    random: Random,
    spare: Vec<Filled>,
    at_random: bool,
    /// The number of its first block.
    first: u64,
}

impl Client {
    pub(super) fn open(
        node: &NodeProcess,
        spin: Duration,
        link: LinkChoice,
    ) -> Result<Self, Failure> {
        Self::open_with(node, spin, link, BLOCK_BYTES, 0)
    }

    /// The same for blocks of another size, and with a staging region of so many bytes.
    pub(super) fn open_with(
        node: &NodeProcess,
        spin: Duration,
        link: LinkChoice,
        block_bytes: usize,
        staging: u64,
    ) -> Result<Self, Failure> {
        let key = KeyFile::read(&node.key_file)
            .map_err(|error| Failure::failed(error.to_string()))?
            .key;
        let config = ClientConfig {
            deadline: DEADLINE,
            link,
            spin,
            staging,
            ..ClientConfig::new(&node.endpoint, key)
        };
        let session = Session::connect(config).map_err(crate::connect::failure)?;
        Ok(Self {
            session,
            block_bytes,
            done: Vec::new(),
            random: Random::new(0x1357_9bdf),
            spare: Vec::new(),
            at_random: false,
            first: 0,
        })
    }

    fn id(number: u64) -> BlockId {
        let mut bytes = [0xa7; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        BlockId::new(bytes)
    }

    /// Its blocks are those from this number on.
    pub(super) fn set_first(&mut self, number: u64) {
        self.first = number;
    }

    /// From now on reads into so many places by turns, at random, and not into those just free.
    pub(super) fn read_into_places(&mut self, count: usize) {
        let bytes = self.block_bytes;
        let place = || Filled::Place(Box::new(vec![7_u8; bytes]));
        self.spare = (0..count).map(|_| place()).collect();
        self.at_random = true;
    }

    /// The same into places that the node can write to.
    pub(super) fn read_into_staging(&mut self, count: usize) -> Result<(), Failure> {
        let staging = (0..count).map(|_| self.session.staging(self.block_bytes));
        let staging: Vec<_> = staging.collect();
        if !staging.iter().all(kvar_client::Staging::is_shared) {
            let why = self.session.stats().not_staged.unwrap_or_default();
            return Err(Failure::failed(format!("no staging region: {why}")));
        }
        self.spare = staging.into_iter().map(Filled::from).collect();
        self.at_random = true;
        Ok(())
    }

    /// Hits that the node wrote where they were wanted.
    pub(super) fn hits_placed(&self) -> u64 {
        self.session.stats().hits_placed
    }

    fn spare(&mut self) -> Option<Filled> {
        if self.at_random && !self.spare.is_empty() {
            let number = self.random.number() as usize % self.spare.len();
            return Some(self.spare.swap_remove(number));
        }
        self.spare.pop()
    }

    pub(super) fn fill(&mut self, blocks: u64) -> Result<(), Failure> {
        let filling = Filling {
            blocks,
            in_flight: PUTS_IN_FLIGHT,
            deadline: DEADLINE,
        };
        let (random, bytes, first) = (&mut self.random, self.block_bytes, self.first);
        filling.put(&mut self.session, |number| {
            PutItem::of_bytes(Self::id(first + number), random.bytes(bytes))
        })?;
        let flush = self.session.submit(Request::Flush, DEADLINE);
        while !self
            .done
            .iter()
            .any(|completion| completion.ticket == flush)
        {
            self.session
                .poll(Duration::from_millis(100), &mut self.done);
        }
        self.done.clear();
        Ok(())
    }

    pub(super) fn read(
        &mut self,
        depth: usize,
        seconds: f64,
        blocks: u64,
    ) -> Result<Reached, Failure> {
        let mut latencies = latencies();
        let started = Instant::now();
        let end = started + Duration::from_secs_f64(seconds);
        let mut begun: HashMap<Ticket, Instant> = HashMap::with_capacity(depth * 2);
        let (mut hits, mut tried) = (0_u64, 0_u64);
        loop {
            let now = Instant::now();
            while begun.len() < depth && now < end {
                let number = self.first + self.random.number() % blocks;
                let into = self
                    .spare()
                    .unwrap_or_else(|| Filled::Place(Box::new(vec![0_u8; self.block_bytes])));
                let item = GetItem {
                    expected: Lengths::of(&[self.block_bytes as u32]),
                    into,
                    ..GetItem::to_vec(Self::id(number))
                };
                let ticket = self.session.submit(
                    Request::Get {
                        items: vec![item],
                        touch_request: 0,
                        waits: false,
                    },
                    DEADLINE,
                );
                begun.insert(ticket, Instant::now());
                tried += 1;
            }
            if begun.is_empty() {
                break;
            }
            self.session
                .poll(Duration::from_millis(100), &mut self.done);
            let heard = Instant::now();
            for completion in self.done.drain(..) {
                let Some(since) = begun.remove(&completion.ticket) else {
                    continue;
                };
                if let Answer::Get(results) = completion.answer {
                    for result in results {
                        if result.is_hit() {
                            hits += 1;
                            latencies.saturating_record((heard - since).as_micros() as u64);
                        }
                        self.spare.push(result.into);
                    }
                }
            }
        }
        if hits * 100 < tried * 95 {
            return Err(Failure::failed(format!(
                "this was no measurement: {hits} hits of {tried} gets"
            )));
        }
        Ok(Reached {
            bytes_per_s: hits as f64 * self.block_bytes as f64 / started.elapsed().as_secs_f64(),
            p50_us: latencies.value_at_quantile(0.5) as f64,
            p99_us: latencies.value_at_quantile(0.99) as f64,
        })
    }
}
