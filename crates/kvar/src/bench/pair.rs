//! What plain sockets reach: the yardsticks of `kvar bench net`.
//!
//! A thread answers requests of 8 bytes (which block) with 64 KiB from a pool of 256 MiB over one
//! loopback connection. *bare*: blocking sockets, so many requests under way. *checking*: the same,
//! and the reader makes the CRC64 of every block. *ping*: both sides poll without sleeping, one
//! request under way.

use super::BLOCK_BYTES;
use super::load::Random;
use super::stats::latencies;
use crate::failure::Failure;
use kvar_base::check::crc64;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const POOL_BLOCKS: usize = 4096;
/// Places that blocks are read into, by turns: as many as there are requests under way, so that they
/// stay in the second-level cache like those of a client that uses its buffers again.
const SLOTS: usize = 16;

/// What a run reached.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reached {
    pub(crate) bytes_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// A connection with its answering thread.
pub(crate) struct Pair {
    stream: TcpStream,
    server: Option<JoinHandle<()>>,
    slots: Vec<u8>,
    polling: bool,
    random: u64,
}

#[allow(clippy::needless_pass_by_value)] // the shape that map_err wants
fn failed(error: std::io::Error) -> Failure {
    Failure::failed(format!("loopback sockets: {error}"))
}

impl Pair {
    pub(crate) fn open(polling: bool) -> Result<Self, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let server = std::thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                serve(stream, polling);
            }
        });
        let stream = TcpStream::connect(address).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_nonblocking(polling).map_err(failed)?;
        Ok(Self {
            stream,
            server: Some(server),
            slots: vec![0; SLOTS * BLOCK_BYTES],
            polling,
            random: 99,
        })
    }

    pub(crate) fn run(
        &mut self,
        depth: usize,
        seconds: f64,
        checking: bool,
    ) -> Result<Reached, Failure> {
        let mut latencies = latencies();
        let started = Instant::now();
        let end = started + Duration::from_secs_f64(seconds);
        let mut begun = std::collections::VecDeque::new();
        let (mut done, mut folded) = (0_u64, 0_u64);
        for _ in 0..depth {
            self.ask()?;
            begun.push_back(Instant::now());
        }
        while let Some(since) = begun.pop_front() {
            let slot = done as usize % SLOTS;
            let place = &mut self.slots[slot * BLOCK_BYTES..][..BLOCK_BYTES];
            read_whole(&mut self.stream, place, self.polling).map_err(failed)?;
            if checking {
                folded ^= crc64(place);
            }
            let now = Instant::now();
            latencies.saturating_record((now - since).as_micros() as u64);
            done += 1;
            if now < end {
                self.ask()?;
                begun.push_back(Instant::now());
            }
        }
        std::hint::black_box(folded);
        Ok(Reached {
            bytes_per_s: done as f64 * BLOCK_BYTES as f64 / started.elapsed().as_secs_f64(),
            p50_us: latencies.value_at_quantile(0.5) as f64,
            p99_us: latencies.value_at_quantile(0.99) as f64,
        })
    }

    fn ask(&mut self) -> Result<(), Failure> {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let which = (self.random >> 33) % POOL_BLOCKS as u64;
        write_whole(&mut self.stream, &which.to_le_bytes(), self.polling).map_err(failed)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn serve(mut stream: TcpStream, polling: bool) {
    let _ = stream.set_nodelay(true);
    let _ = stream.set_nonblocking(polling);
    let pool = Random::new(5).bytes(POOL_BLOCKS * BLOCK_BYTES);
    let mut which = [0_u8; 8];
    while read_whole(&mut stream, &mut which, polling).is_ok() {
        let at = u64::from_le_bytes(which) as usize % POOL_BLOCKS;
        if write_whole(
            &mut stream,
            &pool[at * BLOCK_BYTES..][..BLOCK_BYTES],
            polling,
        )
        .is_err()
        {
            return;
        }
    }
}

fn read_whole(stream: &mut TcpStream, mut into: &mut [u8], polling: bool) -> std::io::Result<()> {
    if !polling {
        return stream.read_exact(into);
    }
    while !into.is_empty() {
        match stream.read(into) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => into = &mut into[count..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_whole(stream: &mut TcpStream, mut from: &[u8], polling: bool) -> std::io::Result<()> {
    if !polling {
        return stream.write_all(from);
    }
    while !from.is_empty() {
        match stream.write(from) {
            Ok(count) => from = &from[count..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
