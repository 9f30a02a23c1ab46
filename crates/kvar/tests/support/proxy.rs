//! A TCP proxy that is as bad as networks get, one mood at a time.

use super::random::Random;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How often a connection looks whether the mood has changed.
const LOOK: Duration = Duration::from_millis(5);

/// What it does to the bytes that pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    /// Nothing.
    Well,
    /// Lets them wait.
    Delay(Duration),
    /// Passes a part of what comes next and closes.
    Truncate,
    /// Turns a bit over now and then.
    Flip,
    /// One byte a second.
    Trickle,
    /// Takes everything and passes nothing on.
    BlackHole,
    /// Closes everything, and takes no new connection.
    Cut,
}

struct Shared {
    mood: Mutex<Mood>,
    to: Mutex<SocketAddr>,
    closing: AtomicBool,
    flips: AtomicU64,
    seeds: AtomicU64,
}

/// The proxy; ends when dropped.
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    pub(crate) address: SocketAddr,
}

impl Proxy {
    pub(crate) fn to(to: SocketAddr, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            mood: Mutex::new(Mood::Well),
            to: Mutex::new(to),
            closing: AtomicBool::new(false),
            flips: AtomicU64::new(0),
            seeds: AtomicU64::new(seed),
        });
        let of_thread = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if of_thread.closing.load(Ordering::Relaxed) {
                    return;
                }
                // A node that is gone closes the client's connection, as it would itself.
                if of_thread.mood() != Mood::Cut {
                    connect(&of_thread, &client);
                }
            }
        });
        Self { shared, address }
    }

    pub(crate) fn set(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
    }

    pub(crate) fn lead_to(&self, to: SocketAddr) {
        *self.shared.to.lock().unwrap() = to;
    }

    /// Bits turned over so far.
    pub(crate) fn flips(&self) -> u64 {
        self.shared.flips.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn mood(&self) -> Mood {
        *self.mood.lock().unwrap()
    }
}

fn connect(shared: &Arc<Shared>, client: &TcpStream) {
    let to = *shared.to.lock().unwrap();
    let Ok(node) = TcpStream::connect(to) else {
        return;
    };
    for stream in [client, &node] {
        let _ = stream.set_nodelay(true);
        let _ = stream.set_read_timeout(Some(LOOK));
    }
    for (from, to) in [(client, &node), (&node, client)] {
        let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else {
            return;
        };
        let shared = shared.clone();
        std::thread::spawn(move || {
            pass(&shared, &from, &to);
            // The other direction ends by it, too.
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
}

/// Passes bytes on until one side has closed, or the mood ends it.
fn pass(shared: &Shared, mut from: &TcpStream, mut to: &TcpStream) {
    let mut random = Random(shared.seeds.fetch_add(2, Ordering::Relaxed) | 1);
    let mut bytes = vec![0; 64 << 10];
    loop {
        if shared.closing.load(Ordering::Relaxed) || shared.mood() == Mood::Cut {
            return;
        }
        let count = match from.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                continue;
            }
            Err(_) => return,
        };
        let mut rest = &mut bytes[..count];
        match shared.mood() {
            Mood::Well => {}
            Mood::Cut => return,
            Mood::Delay(time) => std::thread::sleep(time),
            Mood::Truncate => {
                let part = random.below(count as u64) as usize;
                let _ = to.write_all(&rest[..part]);
                return;
            }
            Mood::Flip => {
                let at = random.below(count as u64) as usize;
                rest[at] ^= 1 << random.below(8);
                shared.flips.fetch_add(1, Ordering::Relaxed);
            }
            // What was swallowed cannot be made good: the connection is of no use any more.
            Mood::BlackHole => loop {
                std::thread::sleep(LOOK);
                if shared.mood() != Mood::BlackHole || shared.closing.load(Ordering::Relaxed) {
                    return;
                }
            },
            Mood::Trickle => {
                while shared.mood() == Mood::Trickle && !rest.is_empty() {
                    if to.write_all(&rest[..1]).is_err() {
                        return;
                    }
                    rest = &mut rest[1..];
                    let mut waited = Duration::ZERO;
                    while waited < Duration::from_secs(1) && shared.mood() == Mood::Trickle {
                        std::thread::sleep(LOOK);
                        waited += LOOK;
                    }
                }
            }
        }
        if to.write_all(rest).is_err() {
            return;
        }
    }
}
