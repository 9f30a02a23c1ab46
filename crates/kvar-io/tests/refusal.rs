//! io_uring refused for real: by a seccomp filter, as container runtimes install it, and by the
//! limit of locked memory. Both bind the thread that asks for them, so other tests go on.
#![allow(unsafe_code)]

mod common;

use common::*;
use kvar_io::{Arena, DeviceError, DeviceOptions, IoEngine, Ring, open_device};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

const SIZE: u64 = 1 << 20;

/// Makes `io_uring_setup` fail with `errno` for the calling thread and those it starts.
fn forbid_io_uring(errno: i32) -> std::io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let system_call = libc::SYS_io_uring_setup as u32;
    let mut program = [
        // The number of the system call is the first field of what a filter sees.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: system_call,
        },
        statement(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: plain numbers; binds this thread alone.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: `filter` points at a program of the length it names; the kernel copies both.
    if unsafe { libc::syscall(libc::SYS_seccomp, mode, 0, &raw const filter) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// In a thread of its own, since a filter never goes away.
fn forbidden(errno: i32, test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || match forbid_io_uring(errno) {
        Ok(()) => test(),
        Err(error) => eprintln!("skipped: no seccomp filter here ({error})"),
    });
    thread.join().unwrap();
}

#[test]
fn auto_falls_back_to_threads_and_says_why() {
    for (errno, reason) in [(libc::EPERM, "seccomp"), (libc::ENOSYS, "kernel")] {
        forbidden(errno, move || {
            let folder = tempfile::tempdir().unwrap();
            let target = new_file(&folder.path().join("data"), SIZE);
            let arena = Arena::new(SIZE as usize).unwrap();
            let options = DeviceOptions {
                depth: 8,
                ..DeviceOptions::default()
            };
            let (mut device, notes) = open_device(&target, &arena, options).unwrap();
            assert_eq!((device.engine(), notes.len()), ("threads", 1));
            assert!(
                notes[0].contains(reason) && notes[0].ends_with("using threads"),
                "{notes:?}"
            );
            let expected = filled(&arena, 9000, 1);
            run(&mut *device, vec![write(0, vec![expected.clone()])]);
            let over = run(&mut *device, vec![read(&arena, 0, 9000)]);
            assert!(bytes(&over[0]) == expected.as_slice());
        });
    }
}

#[test]
fn who_insists_on_io_uring_gets_an_error_that_says_what_to_do() {
    forbidden(libc::EPERM, || {
        let folder = tempfile::tempdir().unwrap();
        let target = new_file(&folder.path().join("data"), SIZE);
        let arena = Arena::new(SIZE as usize).unwrap();
        let options = DeviceOptions {
            engine: IoEngine::IoUring,
            depth: 8,
        };
        let Err(error) = open_device(&target, &arena, options) else {
            panic!("it was forbidden")
        };
        assert!(matches!(
            error,
            DeviceError::Io {
                code: Some(libc::EPERM),
                ..
            }
        ));
        assert!(
            error.to_string().contains("engine auto or threads"),
            "{error}"
        );
    });
}

#[test]
fn the_engine_that_was_asked_for_is_the_engine() {
    let folder = tempfile::tempdir().unwrap();
    let target = new_file(&folder.path().join("data"), SIZE);
    let arena = Arena::new(SIZE as usize).unwrap();
    let open = |engine| open_device(&target, &arena, DeviceOptions { engine, depth: 8 });
    let (device, notes) = open("threads".parse().unwrap()).unwrap();
    assert_eq!((device.engine(), notes.is_empty()), ("threads", true));
    match open("io_uring".parse().unwrap()) {
        Ok((device, _)) => {
            assert_eq!(device.engine(), "io_uring");
            assert_eq!(
                open("auto".parse().unwrap()).unwrap().0.engine(),
                "io_uring"
            );
        }
        Err(error) => eprintln!("skipped: {error}"),
    }
    assert!(
        "uring"
            .parse::<IoEngine>()
            .unwrap_err()
            .contains("auto, io_uring or threads")
    );
}

#[test]
fn memory_over_the_limit_goes_unregistered_with_a_note() {
    let folder = tempfile::tempdir().unwrap();
    let target = new_file(&folder.path().join("data"), SIZE);
    let Some(limit) = getrlimit(Resource::Memlock)
        .current
        .filter(|limit| *limit <= 1 << 30)
    else {
        return eprintln!("skipped: the limit of locked memory is too high to reach");
    };
    std::thread::spawn(move || {
        // Root may lock anything; give that up in this thread.
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::IPC_LOCK);
        set_capabilities(None, sets).unwrap();
        let arena = Arena::new(limit as usize + (1 << 20)).unwrap();
        let mut ring = match Ring::open(target.try_clone_file().unwrap(), SIZE, &arena, 8) {
            Ok(ring) => ring,
            Err(refused) => return eprintln!("skipped: {refused}"),
        };
        assert_eq!(ring.notes().len(), 1, "{:?}", ring.notes());
        assert!(
            ring.notes()[0].contains(&format!("is {limit} bytes")),
            "{:?}",
            ring.notes()
        );
        let expected = filled(&arena, 9000, 1);
        run(&mut ring, vec![write(0, vec![expected.clone()])]);
        let over = run(&mut ring, vec![read(&arena, 0, 9000)]);
        assert!(bytes(&over[0]) == expected.as_slice());
    })
    .join()
    .unwrap();
}
