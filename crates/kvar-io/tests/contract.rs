//! What every device promises: the same checks over io_uring, threads and the simulated disk.

mod common;

use common::*;
use kvar_io::{Arena, DeviceError, Op, Target, Threads, Wanted};
use rustix::event::{PollFd, PollFlags, Timespec, epoll};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

#[test]
fn data_comes_back_at_every_depth() {
    for stand in stands(16 * MIB as u64, 8 * MIB) {
        for depth in [1, 2, 7, 64] {
            let mut device = stand.open(depth);
            assert_eq!(
                (device.bytes(), device.engine()),
                (16 * MIB as u64, stand.kind)
            );
            // Twice the depth, so that some wait for the ring.
            let count = 2 * depth as u64;
            let len = |mark: u64| 1 + (mark as usize * 5077) % (7 * PAGE);
            let place = |mark: u64| mark * 8 * PAGE as u64;
            let mark = |number: u64| number + 1000 * depth as u64;
            let writes = (0..count).map(|number| {
                write(
                    place(number),
                    vec![filled(&stand.arena, len(number), mark(number))],
                )
            });
            for completion in run(&mut *device, writes.collect()) {
                assert_eq!(completion.result, Ok(()), "{}", stand.kind);
            }
            let reads = (0..count).map(|number| read(&stand.arena, place(number), len(number)));
            for completion in run(&mut *device, reads.collect()) {
                let number = completion.token;
                let expected = filled(&stand.arena, len(number), mark(number));
                assert!(
                    bytes(&completion) == expected.as_slice(),
                    "{} {number}",
                    stand.kind
                );
            }
            drop(device);
            assert_eq!(stand.arena.allocated_bytes(), 0, "{}", stand.kind);
        }
    }
}

#[test]
fn gather_writes_put_buffers_one_behind_the_other_with_their_padding() {
    for stand in stands(4 * MIB as u64, 8 * MIB) {
        let mut device = stand.open(4);
        let lens: Vec<usize> = (0..Op::WRITE_BUFFERS_MAX)
            .map(|at| 1 + at * 37 % 8000)
            .collect();
        let buffers: Vec<_> = lens
            .iter()
            .enumerate()
            .map(|(at, len)| filled(&stand.arena, *len, at as u64))
            .collect();
        let expected: Vec<u8> = buffers
            .iter()
            .flat_map(|buffer| buffer.padded().to_vec())
            .collect();
        let start = 3 * PAGE as u64;
        let over = run(&mut *device, vec![write(start, buffers.clone())]);
        assert_eq!(over[0].result, Ok(()), "{}", stand.kind);
        assert!(
            buffers.iter().all(|buffer| !buffer.is_unique()),
            "the completion still holds them"
        );
        let over = run(
            &mut *device,
            vec![read(&stand.arena, start, expected.len())],
        );
        assert!(bytes(&over[0]) == expected, "{}", stand.kind);

        let one = filled(&stand.arena, 1, 0);
        let over = run(
            &mut *device,
            vec![write(0, vec![one; Op::WRITE_BUFFERS_MAX + 1])],
        );
        assert!(
            matches!(&over[0].result, Err(DeviceError::Io { message, .. }) if message.contains("split"))
        );
    }
}

#[test]
fn what_is_outside_or_unaligned_is_refused_and_gives_its_memory_back() {
    let end = 1 << 20;
    for stand in stands(end, MIB) {
        let mut device = stand.open(8);
        let one = || vec![filled(&stand.arena, 100, 1)];
        let page = PAGE as u64;
        let ops = vec![
            read(&stand.arena, end, 1),
            read(&stand.arena, end - page, PAGE + 1),
            read(&stand.arena, 512, PAGE),
            read(&stand.arena, u64::MAX - page + 1, 1),
            write(end, one()),
            write(1, one()),
            write(0, Vec::new()),
            Op::Discard {
                offset: 0,
                len: 100,
            },
            Op::Discard {
                offset: page,
                len: end,
            },
            Op::Discard { offset: 0, len: 0 },
        ];
        for completion in run(&mut *device, ops) {
            let refused = matches!(completion.result, Err(DeviceError::Range { .. }));
            assert!(refused, "{}: {completion:?}", stand.kind);
        }
        assert_eq!(stand.arena.allocated_bytes(), 0);
        let over = run(
            &mut *device,
            vec![read(&stand.arena, end - page, PAGE), write(0, one())],
        );
        assert!(
            over.iter().all(|completion| completion.result.is_ok()),
            "the edges are inside"
        );
    }
}

#[test]
fn flush_and_discard_go_well_and_leave_the_neighbours_alone() {
    for stand in stands(4 * MIB as u64, 4 * MIB) {
        let mut device = stand.open(8);
        let whole = filled(&stand.arena, MIB, 7);
        run(&mut *device, vec![write(0, vec![whole.clone()])]);
        let (from, len) = (256 << 10, 512 << 10);
        let over = run(&mut *device, vec![Op::Flush]);
        assert_eq!(over[0].result, Ok(()), "{}", stand.kind);
        let over = run(
            &mut *device,
            vec![Op::Discard {
                offset: from as u64,
                len: len as u64,
            }],
        );
        assert_eq!(over[0].result, Ok(()), "{}", stand.kind);
        let over = run(&mut *device, vec![read(&stand.arena, 0, MIB)]);
        assert!(bytes(&over[0])[..from] == whole.as_slice()[..from]);
        assert!(bytes(&over[0])[from + len..] == whole.as_slice()[from + len..]);
    }
}

#[test]
fn a_dropped_device_has_finished_its_writes_and_freed_its_memory() {
    for stand in stands(16 * MIB as u64, 16 * MIB) {
        let mut device = stand.open(4);
        for number in 0..64_u64 {
            let buffers = vec![
                filled(&stand.arena, 60_000, number),
                filled(&stand.arena, 1, number),
            ];
            device.submit(number, write(number * 128 * 1024, buffers));
            device.submit(number, read(&stand.arena, number * 128 * 1024, 4096));
            // The second half is never kicked.
            if number == 31 {
                device.kick().unwrap();
            }
        }
        assert_eq!(device.in_flight(), 128);
        drop(device);
        assert_eq!(stand.arena.allocated_bytes(), 0, "{}", stand.kind);
        let mut device = stand.open(4);
        let reads = (0..64_u64).map(|number| read(&stand.arena, number * 128 * 1024, 60_000));
        for completion in run(&mut *device, reads.collect()) {
            let expected = filled(&stand.arena, 60_000, completion.token);
            assert!(bytes(&completion) == expected.as_slice(), "{}", stand.kind);
        }
    }
}

#[test]
fn waiting_ends_with_a_completion_or_at_once_when_there_is_nothing() {
    for stand in stands(MIB as u64, MIB) {
        let mut device = stand.open(4);
        let start = Instant::now();
        device.wait(PATIENCE);
        let mut over = Vec::new();
        device.poll(&mut over);
        assert!(
            over.is_empty() && start.elapsed() < PATIENCE / 2,
            "{}",
            stand.kind
        );
        for number in 0..100 {
            // `wait` hands over what was not kicked.
            device.submit(number, read(&stand.arena, 0, PAGE));
            let start = Instant::now();
            device.wait(Duration::MAX);
            assert!(start.elapsed() < PATIENCE / 2, "{}", stand.kind);
            device.poll(&mut over);
            assert_eq!(over.len(), 1, "{}", stand.kind);
            over.clear();
        }
        device.submit(0, Op::Flush);
        device.wait(Duration::ZERO);
        assert_eq!(drain(&mut *device).len(), 1);
    }
}

#[test]
fn the_descriptor_wakes_a_sleeper_for_each_completion_and_then_rests() {
    for stand in stands(MIB as u64, MIB) {
        let mut device = stand.open(4);
        let Some(descriptor) = device.readiness() else {
            assert_eq!(stand.kind, "sim");
            continue;
        };
        // SAFETY: the descriptor belongs to `device`, which lives to the end of this turn.
        #[allow(unsafe_code)]
        let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let data = epoll::EventData::new_u64(1);
        epoll::add(&epoll, descriptor, data, epoll::EventFlags::IN).unwrap();
        let patience = Timespec::try_from(PATIENCE).unwrap();
        for number in 0..300_u64 {
            match number % 3 {
                0 => device.submit(number, read(&stand.arena, 0, 16 * PAGE)),
                1 => device.submit(number, write(0, vec![filled(&stand.arena, PAGE, number)])),
                // A refusal has to wake its caller too.
                _ => device.submit(number, read(&stand.arena, 1, PAGE)),
            }
            device.kick().unwrap();
            let mut over = Vec::new();
            let start = Instant::now();
            while over.is_empty() {
                let mut events = Vec::with_capacity(4);
                let buffer = rustix::buffer::spare_capacity(&mut events);
                match epoll::wait(&epoll, buffer, Some(&patience)) {
                    // The kernel may deliver completions of a ring like a signal; the descriptor
                    // has to be readable at the next turn all the same.
                    Ok(1) | Err(rustix::io::Errno::INTR) => {}
                    other => panic!("{}: nobody woke us: {other:?}", stand.kind),
                }
                assert!(
                    start.elapsed() < PATIENCE,
                    "{}: never completed",
                    stand.kind
                );
                device.poll(&mut over);
            }
        }
        // One wake may be left over from completions that an earlier poll took.
        let rests = (0..3).any(|_| {
            device.poll(&mut Vec::new());
            let mut polled = [PollFd::new(&descriptor, PollFlags::IN)];
            rustix::event::poll(&mut polled, Some(&Timespec::default())) == Ok(0)
        });
        assert!(rests, "{}: readable with nothing to find", stand.kind);
    }
}

#[test]
fn buffers_of_another_arena_work_too() {
    for stand in stands(MIB as u64, MIB) {
        let mut device = stand.open(4);
        let other = Arena::new(MIB).unwrap();
        run(&mut *device, vec![write(0, vec![filled(&other, 5000, 1)])]);
        let over = run(
            &mut *device,
            vec![read(&other, 0, 5000), read(&stand.arena, 0, 5000)],
        );
        assert!(bytes(&over[0]) == filled(&other, 5000, 1).as_slice());
        assert!(bytes(&over[1]) == bytes(&over[0]));
    }
}

/// Registered memory is cut into pieces of 4 MiB; a buffer may lie across a cut, or several.
#[test]
fn a_buffer_across_registered_pieces_moves_whole() {
    const PIECE: usize = 4 * MIB;
    for stand in stands(16 * MIB as u64, 6 * PIECE) {
        let mut device = stand.open(4);
        let before = stand.arena.allocate(PIECE - 5 * PAGE).unwrap();
        let across = filled(&stand.arena, 16 * PAGE, 3);
        assert_eq!(across.arena_offset(), PIECE - 5 * PAGE);
        let many = filled(&stand.arena, 2 * PIECE + 100, 4);
        let expected = [across.as_slice().to_vec(), many.as_slice().to_vec()];
        run(
            &mut *device,
            vec![write(0, vec![across]), write(MIB as u64, vec![many])],
        );
        let ops = vec![
            read(&stand.arena, 0, 16 * PAGE),
            read(&stand.arena, MIB as u64, 2 * PIECE + 100),
        ];
        let over = run(&mut *device, ops);
        assert!(bytes(&over[0]) == expected[0] && bytes(&over[1]) == expected[1]);
        drop(before);
    }
}

/// A file that somebody cut off under the running server: short, and neither a hang nor old bytes.
#[test]
fn the_end_of_a_truncated_file_is_a_short_read() {
    for odd in [0, 100] {
        let folder = tempfile::tempdir().unwrap();
        let target = new_file(&folder.path().join("data"), 8 * PAGE as u64);
        let file = target.try_clone_file().unwrap();
        file.set_len(3 * PAGE as u64 + odd).unwrap();
        for stand in Stand::over(target, MIB) {
            let mut device = stand.open(4);
            let ops = vec![
                read(&stand.arena, PAGE as u64, 4 * PAGE),
                read(&stand.arena, 5 * PAGE as u64, PAGE),
                read(&stand.arena, 0, 3 * PAGE),
            ];
            let over = run(&mut *device, ops);
            let moved = 2 * PAGE + odd as usize;
            let wanted = DeviceError::Short {
                wanted: 4 * PAGE,
                moved,
            };
            assert_eq!(over[0].result, Err(wanted), "{}", stand.kind);
            assert_eq!(
                over[1].result,
                Err(DeviceError::Short {
                    wanted: PAGE,
                    moved: 0
                })
            );
            assert_eq!(over[2].result, Ok(()));
        }
    }
}

#[test]
fn a_full_file_system_is_no_space() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_string_lossy().into_owned();
    if !is_root() {
        return eprintln!("skipped: mounting a small tmpfs needs root");
    }
    if let Err(message) = tool("mount", &["-t", "tmpfs", "-o", "size=1m", "tmpfs", &place]) {
        return eprintln!("skipped: {message}");
    }
    let _undo = Undo("umount", vec!["-l".to_owned(), place]);
    let path = folder.path().join("data");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    let target = Target::open(&path, Wanted::default()).unwrap();
    assert!(target.is_sparse(), "the node must hear of it");
    for stand in Stand::over(target, 8 * MIB) {
        let mut device = stand.open(4);
        let over = run(
            &mut *device,
            vec![write(0, vec![filled(&stand.arena, 4 * MIB, 1)])],
        );
        assert_eq!(over[0].result, Err(DeviceError::NoSpace), "{}", stand.kind);
        // A sparse file gives space back, so the next engine finds some to fill again.
        let over = run(
            &mut *device,
            vec![Op::Discard {
                offset: 0,
                len: 8 << 20,
            }],
        );
        assert_eq!(over[0].result, Ok(()), "{}", stand.kind);
        let over = run(
            &mut *device,
            vec![write(0, vec![filled(&stand.arena, MIB / 2, 1)])],
        );
        assert_eq!(
            over[0].result,
            Ok(()),
            "{}: space was given back",
            stand.kind
        );
        run(
            &mut *device,
            vec![Op::Discard {
                offset: 0,
                len: 8 << 20,
            }],
        );
    }
}

#[test]
fn a_block_device_is_measured_used_and_refused_while_mounted() {
    let folder = tempfile::tempdir().unwrap();
    let (device_path, _detach) = match loop_device(folder.path(), 32 << 20) {
        Ok(found) => found,
        Err(message) => return eprintln!("skipped: {message}"),
    };
    let target = Target::open(&device_path, Wanted::default()).unwrap();
    assert_eq!((target.bytes(), target.is_block_device()), (32 << 20, true));
    assert_eq!(
        (target.is_sparse(), target.foreign_content().unwrap()),
        (false, None)
    );
    let second = Target::open(&device_path, Wanted::default())
        .unwrap_err()
        .to_string();
    let process = format!("in use by process {}", std::process::id());
    assert!(second.contains(&process), "{second}");
    for stand in Stand::over(target, MIB) {
        let mut device = stand.open(8);
        let at = (32 << 20) - 16 * PAGE as u64;
        run(
            &mut *device,
            vec![write(at, vec![filled(&stand.arena, 16 * PAGE, 5)])],
        );
        let over = run(
            &mut *device,
            vec![Op::Flush, read(&stand.arena, at, 16 * PAGE)],
        );
        assert_eq!(over[0].result, Ok(()));
        assert!(bytes(&over[1]) == filled(&stand.arena, 16 * PAGE, 5).as_slice());
        let over = run(
            &mut *device,
            vec![Op::Discard {
                offset: at,
                len: 16 * PAGE as u64,
            }],
        );
        assert_eq!(over[0].result, Ok(()), "{}", stand.kind);
    }

    let wanted = Wanted {
        size: Some(16 << 20),
        create: false,
    };
    assert_eq!(
        Target::open(&device_path, wanted).unwrap().bytes(),
        16 << 20
    );
    let wanted = Wanted {
        size: Some(64 << 20),
        create: false,
    };
    let larger = Target::open(&device_path, wanted).unwrap_err().to_string();
    assert!(
        larger.contains("64MiB") && larger.contains("32MiB"),
        "{larger}"
    );

    if let Err(message) = tool("mkfs.ext4", &["-q", &device_path]) {
        return eprintln!("skipped: a file system on it, because {message}");
    }
    let found = Target::open(&device_path, Wanted::default())
        .unwrap()
        .foreign_content();
    assert!(found.unwrap().is_some_and(|what| what.contains("ext4")));
    let mount = tempfile::tempdir().unwrap();
    let place = mount.path().to_string_lossy().into_owned();
    if let Err(message) = tool("mount", &[&device_path, &place]) {
        return eprintln!("skipped: a mounted device, because {message}");
    }
    let _unmount = Undo("umount", vec![place.clone()]);
    let busy = Target::open(&device_path, Wanted::default())
        .unwrap_err()
        .to_string();
    assert!(busy.contains(&place), "{busy}");
}

#[test]
fn several_devices_share_one_target() {
    let folder = tempfile::tempdir().unwrap();
    let target = new_file(&folder.path().join("data"), MIB as u64);
    let arena = Arena::new(MIB).unwrap();
    let open = || Threads::open(target.try_clone_file().unwrap(), target.bytes(), 1).unwrap();
    let (mut first, mut second) = (open(), open());
    run(&mut first, vec![write(0, vec![filled(&arena, PAGE, 1)])]);
    assert!(
        bytes(&run(&mut second, vec![read(&arena, 0, PAGE)])[0])
            == filled(&arena, PAGE, 1).as_slice()
    );
}
