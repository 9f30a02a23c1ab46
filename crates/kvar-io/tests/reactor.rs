//! What a thread may rely on, whichever reactor it has: the same checks over one ring and over epoll.

mod common;

use common::PATIENCE;
use kvar_io::{
    Arena, Bell, Device, DeviceOptions, IoEngine, Op, Reactor, Ready, Target, Wanted, calls,
};
use mio::{Interest, Token};
use std::io::ErrorKind::ConnectionReset;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// One of each; where the kernel refuses a ring that is said, and epoll alone is tried.
fn reactors() -> Vec<(Reactor, IoEngine)> {
    let (ring, note) = Reactor::new(IoEngine::Auto).unwrap();
    let (epoll, _) = Reactor::new(IoEngine::Threads).unwrap();
    assert_eq!(epoll.kind(), "epoll");
    if let Some(note) = note {
        eprintln!("epoll alone: {note}");
        return vec![(epoll, IoEngine::Threads)];
    }
    assert_eq!(ring.kind(), "io_uring");
    vec![(ring, IoEngine::Auto), (epoll, IoEngine::Threads)]
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let theirs = listener.accept().unwrap().0;
    ours.set_nonblocking(true).unwrap();
    (ours, theirs)
}

fn watch(reactor: &Reactor, descriptor: RawFd, token: usize, interest: Interest) {
    let watcher = reactor.watcher();
    watcher.watch(descriptor, Token(token), interest).unwrap();
}

/// Turns until something is ready that `is_it`; panics when patience is over.
fn until(reactor: &mut Reactor, what: &str, is_it: impl Fn(&Ready) -> bool) -> Vec<Ready> {
    let start = Instant::now();
    let mut ready = Vec::new();
    while !ready.iter().any(&is_it) {
        assert!(start.elapsed() < PATIENCE, "{}: {what}", reactor.kind());
        reactor.turn(Some(PATIENCE), &mut ready).unwrap();
    }
    ready
}

fn rests(reactor: &mut Reactor) -> bool {
    let mut ready = Vec::new();
    // The first may bring what was on its way.
    reactor.turn(Some(Duration::ZERO), &mut ready).unwrap();
    ready.clear();
    reactor
        .turn(Some(Duration::from_millis(5)), &mut ready)
        .unwrap();
    ready.is_empty()
}

#[test]
fn what_is_ready_is_said_once_and_again_when_it_is_anew() {
    for (mut reactor, _) in reactors() {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(b"early").unwrap();
        // Ready before it was watched.
        let interest = Interest::READABLE | Interest::WRITABLE;
        watch(&reactor, ours.as_raw_fd(), 7, interest);
        until(&mut reactor, "room to write", |it| {
            it.token == Token(7) && it.writable
        });
        let mut taken = [0; 64];
        for round in 0..200 {
            if round > 0 {
                theirs.write_all(b"again").unwrap();
                until(&mut reactor, "an edge a message", |it| it.readable);
            } else {
                assert_eq!(ours.read(&mut taken).unwrap(), 5);
                continue;
            }
            assert_eq!(ours.read(&mut taken).unwrap(), 5, "{round}");
        }
        assert!(rests(&mut reactor), "{}: it does not rest", reactor.kind());
    }
}

#[test]
fn room_to_write_comes_back_when_the_peer_reads() {
    for (mut reactor, _) in reactors() {
        let (mut ours, mut theirs) = pair();
        watch(
            &reactor,
            ours.as_raw_fd(),
            1,
            Interest::READABLE | Interest::WRITABLE,
        );
        until(&mut reactor, "room at first", |it| it.writable);
        let piece = vec![3; 1 << 20];
        let mut queued = 0;
        while let Ok(written) = ours.write(&piece) {
            queued += written;
        }
        assert!(rests(&mut reactor));
        let reader = std::thread::spawn(move || {
            let mut left = queued;
            let mut taken = vec![0; 1 << 20];
            while left > 0 {
                left -= theirs.read(&mut taken).unwrap();
            }
        });
        until(&mut reactor, "room again", |it| it.writable);
        reader.join().unwrap();
    }
}

#[test]
fn a_peer_that_goes_is_noticed() {
    for (mut reactor, _) in reactors() {
        let (ours, theirs) = pair();
        watch(&reactor, ours.as_raw_fd(), 2, Interest::READABLE);
        reactor.turn(Some(Duration::ZERO), &mut Vec::new()).unwrap();
        drop(theirs);
        until(&mut reactor, "the end", |it| it.readable && it.read_closed);
    }
}

#[test]
fn a_descriptor_that_is_given_up_says_nothing_more_and_its_peer_hears_of_its_end() {
    for (mut reactor, _) in reactors() {
        let (ours, mut theirs) = pair();
        watch(&reactor, ours.as_raw_fd(), 3, Interest::READABLE);
        reactor.turn(Some(Duration::ZERO), &mut Vec::new()).unwrap();
        let watcher = reactor.watcher();
        watcher.unwatch(ours.as_raw_fd()).unwrap();
        assert!(watcher.unwatch(ours.as_raw_fd()).is_err(), "only once");
        theirs.write_all(b"unheard").unwrap();
        assert!(rests(&mut reactor), "{}", reactor.kind());
        drop(ours);
        // A poll that went on would hold the socket, and the peer would wait for ever.
        theirs.set_read_timeout(Some(PATIENCE)).unwrap();
        // What was not read makes it a reset.
        let end = theirs.read(&mut [0; 8]).map_err(|error| error.kind());
        assert_eq!(end, Err(ConnectionReset), "{}", reactor.kind());
        let (again, mut peer) = pair();
        watch(&reactor, again.as_raw_fd(), 4, Interest::READABLE);
        peer.write_all(b"heard").unwrap();
        until(&mut reactor, "the next one", |it| {
            it.token == Token(4) && it.readable
        });
    }
}

#[test]
fn a_socket_that_is_watched_and_given_up_at_once_is_not_held() {
    for (mut reactor, _) in reactors() {
        for _ in 0..600 {
            let (ours, mut theirs) = pair();
            watch(&reactor, ours.as_raw_fd(), 5, Interest::READABLE);
            reactor.watcher().unwatch(ours.as_raw_fd()).unwrap();
            drop(ours);
            reactor.turn(Some(Duration::ZERO), &mut Vec::new()).unwrap();
            theirs.set_read_timeout(Some(PATIENCE)).unwrap();
            assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 0);
        }
    }
}

#[test]
fn more_are_ready_at_once_than_the_ring_has_room_for() {
    for (mut reactor, _) in reactors() {
        // Beyond the entries of the ring, and, with two edges each, many answers at once.
        let pairs: Vec<_> = (0..300).map(|_| pair()).collect();
        for (token, (ours, _)) in pairs.iter().enumerate() {
            watch(&reactor, ours.as_raw_fd(), token, Interest::READABLE);
        }
        for round in 0..20 {
            for (_, theirs) in &pairs {
                let mut theirs = theirs;
                theirs.write_all(&[round]).unwrap();
            }
            let mut heard = vec![false; pairs.len()];
            let start = Instant::now();
            while heard.contains(&false) {
                assert!(
                    start.elapsed() < PATIENCE,
                    "{}: lost an edge",
                    reactor.kind()
                );
                let mut ready = Vec::new();
                reactor.turn(Some(PATIENCE), &mut ready).unwrap();
                for it in ready.into_iter().filter(|it| it.readable) {
                    heard[it.token.0] = true;
                }
            }
            for (ours, _) in &pairs {
                let mut ours = ours;
                while ours.read(&mut [0; 8]).is_ok() {}
            }
        }
    }
}

#[test]
fn polls_that_the_kernel_ends_go_on() {
    // A ring holds 4,096 answers: many more come before anybody looks, so that polls end.
    for (mut reactor, _) in reactors() {
        let (ours, mut theirs) = pair();
        theirs.set_nodelay(true).unwrap();
        watch(&reactor, ours.as_raw_fd(), 0, Interest::READABLE);
        let bells: Vec<_> = (0..64).map(|_| Bell::new().unwrap()).collect();
        for (token, bell) in bells.iter().enumerate() {
            watch(&reactor, bell.as_raw_fd(), 1 + token, Interest::READABLE);
        }
        reactor.turn(Some(Duration::ZERO), &mut Vec::new()).unwrap();
        for _ in 0..200 {
            bells.iter().for_each(Bell::ring);
        }
        until(&mut reactor, "a bell", |it| it.token != Token(0));
        for (token, bell) in bells.iter().enumerate() {
            while !rests(&mut reactor) {}
            bell.ring();
            until(&mut reactor, "each bell", |it| it.token == Token(1 + token));
        }
        theirs.write_all(b"x").unwrap();
        until(&mut reactor, "the socket", |it| it.token == Token(0));
    }
}

#[test]
fn a_sleeper_hears_every_bell_and_wakes_in_time_for_its_timer() {
    for (mut reactor, _) in reactors() {
        let bell = Arc::new(Bell::new().unwrap());
        watch(&reactor, bell.as_raw_fd(), 9, Interest::READABLE);
        let start = Instant::now();
        let mut ready = Vec::new();
        while start.elapsed() < Duration::from_millis(20) {
            reactor
                .turn(Some(Duration::from_millis(20)), &mut ready)
                .unwrap();
        }
        assert!(ready.is_empty() && start.elapsed() < PATIENCE);
        assert!(reactor.sleeps() > 0);
        for _ in 0..100 {
            let ringing = bell.clone();
            let ringer = std::thread::spawn(move || ringing.ring());
            until(&mut reactor, "the bell", |it| it.token == Token(9));
            ringer.join().unwrap();
        }
    }
}

/// A device on a fresh file, driven by the reactor.
fn device(
    reactor: &Reactor,
    engine: IoEngine,
    folder: &std::path::Path,
    name: &str,
) -> (Box<dyn Device>, Arena) {
    let wanted = Wanted {
        size: Some(8 * MIB),
        create: true,
    };
    let target = Target::open(folder.join(name), wanted).unwrap();
    let arena = Arena::new(8 << 20).unwrap();
    let options = DeviceOptions { engine, depth: 16 };
    let (device, _) = reactor.open_device(&target, &arena, options).unwrap();
    if let Some(descriptor) = device.readiness() {
        watch(reactor, descriptor, 1000, Interest::READABLE);
    }
    (device, arena)
}

#[test]
fn devices_and_sockets_move_in_the_same_turns() {
    for (mut reactor, engine) in reactors() {
        let folder = tempfile::tempdir().unwrap();
        let mut devices: Vec<_> = ["a", "b", "c"]
            .map(|name| device(&reactor, engine, folder.path(), name))
            .into();
        let (ours, mut theirs) = pair();
        watch(&reactor, ours.as_raw_fd(), 1, Interest::READABLE);
        for round in 0..50_u64 {
            for (number, (device, arena)) in (0..).zip(&mut devices) {
                for at in 0..20 {
                    // More than its depth, each device its own bytes.
                    let mut buffer = arena.allocate(4096).unwrap();
                    buffer.as_mut_slice().fill((round + number * 7 + at) as u8);
                    let op = match round % 2 {
                        0 => Op::Write {
                            offset: at * 4096,
                            buffers: vec![buffer.freeze()],
                            lifetime: kvar_io::Lifetime::Pages,
                        },
                        _ => Op::Read {
                            offset: at * 4096,
                            buffer,
                        },
                    };
                    device.submit(at, op);
                }
                device.kick().unwrap();
            }
            theirs.write_all(&[round as u8]).unwrap();
            let (mut over, mut heard, start) = (0, false, Instant::now());
            while over < 60 || !heard {
                assert!(
                    start.elapsed() < PATIENCE,
                    "{}: {over} {heard}",
                    reactor.kind()
                );
                let mut ready = Vec::new();
                reactor.turn(Some(PATIENCE), &mut ready).unwrap();
                heard |= ready.iter().any(|it| it.token == Token(1) && it.readable);
                for (number, (device, _)) in (0..).zip(&mut devices) {
                    let mut out = Vec::new();
                    device.poll(&mut out);
                    device.kick().unwrap();
                    over += out.len();
                    for completion in out {
                        assert_eq!(completion.result, Ok(()));
                        if let Op::Read { buffer, .. } = completion.op {
                            let wrote = (round - 1 + number * 7 + completion.token) as u8;
                            assert!(buffer.as_slice().iter().all(|byte| *byte == wrote));
                        }
                    }
                }
            }
            let mut ours = &ours;
            assert_eq!(ours.read(&mut [0; 8]).unwrap(), 1);
        }
    }
}

#[test]
fn a_device_goes_with_operations_under_way_and_another_takes_its_place() {
    for (mut reactor, engine) in reactors() {
        let folder = tempfile::tempdir().unwrap();
        let (mut stays, stays_arena) = device(&reactor, engine, folder.path(), "stays");
        for round in 0..30 {
            let name = format!("goes-{round}");
            let wanted = Wanted {
                size: Some(MIB),
                create: true,
            };
            let target = Target::open(folder.path().join(name), wanted).unwrap();
            let arena = Arena::new(8 << 20).unwrap();
            let options = DeviceOptions { engine, depth: 16 };
            let (mut goes, _) = reactor.open_device(&target, &arena, options).unwrap();
            let buffer = stays_arena.allocate(4096).unwrap();
            stays.submit(round, Op::Read { offset: 0, buffer });
            stays.kick().unwrap();
            for at in 0..40 {
                let buffer = arena.allocate(4096).unwrap();
                goes.submit(at, Op::Read { offset: 0, buffer });
            }
            goes.kick().unwrap();
            drop(goes);
            assert_eq!(arena.allocated_bytes(), 0, "its memory came back");
            let (mut out, start) = (Vec::new(), Instant::now());
            while out.is_empty() {
                assert!(start.elapsed() < PATIENCE, "{}", reactor.kind());
                reactor
                    .turn(Some(Duration::from_millis(100)), &mut Vec::new())
                    .unwrap();
                stays.poll(&mut out);
            }
            assert_eq!((out[0].token, &out[0].result), (round, &Ok(())));
        }
    }
}

#[test]
fn a_thread_that_spins_over_one_ring_makes_no_system_call() {
    for (mut reactor, engine) in reactors() {
        if engine == IoEngine::Threads {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let (mut device, arena) = device(&reactor, engine, folder.path(), "data");
        let (ours, _theirs) = pair();
        watch(&reactor, ours.as_raw_fd(), 1, Interest::READABLE);
        assert!(rests(&mut reactor));
        let before = calls::so_far();
        for _ in 0..1000 {
            reactor.turn(Some(Duration::ZERO), &mut Vec::new()).unwrap();
            device.poll(&mut Vec::new());
        }
        assert_eq!(calls::so_far() - before, 0);
        // And a read is one call to hand it over and one, at most, to hear of it.
        let buffer = arena.allocate(4096).unwrap();
        device.submit(1, Op::Read { offset: 0, buffer });
        device.kick().unwrap();
        let mut out = Vec::new();
        while out.is_empty() {
            reactor.turn(Some(Duration::ZERO), &mut Vec::new()).unwrap();
            device.poll(&mut out);
        }
        let made = calls::so_far() - before;
        assert!((1..=3).contains(&made), "{made} calls");
    }
}

#[test]
fn a_number_that_was_closed_without_being_given_up_could_not_be_watched_again() {
    for (mut reactor, _) in reactors() {
        let (ours, mut theirs) = pair();
        let number = ours.as_raw_fd();
        watch(&reactor, number, 1, Interest::READABLE);
        reactor.turn(Some(Duration::ZERO), &mut Vec::new()).unwrap();
        // Another socket comes to stand under the same number, as after a close.
        let (other, mut peer) = pair();
        let mut place = ours.into();
        rustix::io::dup2(&other, &mut place).unwrap();
        watch(&reactor, number, 2, Interest::READABLE);
        peer.write_all(b"new").unwrap();
        until(&mut reactor, "the new one", |it| it.token == Token(2));
        // The old one is not held any more.
        theirs.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 0);
    }
}
