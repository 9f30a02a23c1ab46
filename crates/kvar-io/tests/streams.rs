//! Write streams against the kernel that is there. No drive with streams was at hand when this was
//! written: what can be seen without one is that the kernel reads the stream of a write, since a
//! device that has none refuses it, and that such a refusal costs nothing but the stream.

mod common;

use common::*;
use kvar_io::{
    Arena, DeviceError, DeviceOptions, IoEngine, Lifetime, NoStreams, Op, Ring, Target, Wanted,
    WriteStreams, open_device,
};

const LOG: Lifetime = Lifetime::Log { shard: 3 };

fn log_write(arena: &Arena, offset: u64, pages: usize, mark: u64) -> Op {
    // Buffers apart from each other, so that they go as a list.
    let buffers = (0..pages)
        .map(|page| {
            let buffer = filled(arena, PAGE, mark + page as u64);
            std::mem::forget(arena.allocate(PAGE));
            buffer
        })
        .collect();
    Op::Write {
        offset,
        buffers,
        lifetime: LOG,
    }
}

#[test]
fn a_file_has_no_streams_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let target = new_file(&folder.path().join("data"), 1 << 20);
    assert_eq!(target.write_streams().in_use(), Err(NoStreams::File));
}

#[test]
fn a_device_that_refuses_a_stream_is_written_without_from_then_on() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _detach) = match loop_device(folder.path(), 16 << 20) {
        Ok(found) => found,
        Err(message) => return eprintln!("skipped: {message}"),
    };
    let target = Target::open(&path, Wanted::default()).unwrap();
    let none = target.write_streams().in_use().unwrap_err();
    assert!(
        matches!(none, NoStreams::None | NoStreams::Unknown),
        "{none:?}"
    );
    let arena = Arena::new(4 << 20).unwrap();
    let other = Arena::new(4 << 20).unwrap();
    // As if the kernel had reported eight, of a device that has none: by address and from registered
    // memory, alone and as a list.
    for (memory, pages) in [(&arena, 1), (&arena, 5), (&other, 1), (&other, 5)] {
        let streams = WriteStreams::reported(8, 0);
        let file = target.try_clone_file().unwrap();
        let mut ring = match Ring::open(file, target.bytes(), &arena, 8) {
            Ok(ring) => ring.with_streams(&streams),
            Err(refused) => return eprintln!("skipped: {refused}"),
        };
        let over = run(&mut ring, vec![log_write(memory, 8192, pages, 77)]);
        assert_eq!(over[0].result, Ok(()), "{pages} pages");
        // A kernel that tells of streams checks them; an older one does not look.
        assert_eq!(
            streams.is_refused(),
            none == NoStreams::None,
            "{pages} pages"
        );
        let over = run(&mut ring, vec![read(&arena, 8192, pages * PAGE)]);
        for (page, found) in bytes(&over[0]).chunks(PAGE).enumerate() {
            let expected = filled(&arena, PAGE, 77 + page as u64);
            assert!(found == expected.as_slice(), "page {page} of {pages}");
        }
        // What the kernel refuses for another reason says nothing of streams.
        let outside = log_write(memory, target.bytes(), 1, 1);
        let over = run(&mut ring, vec![outside]);
        assert!(matches!(over[0].result, Err(DeviceError::Range { .. })));
    }
}

#[test]
fn threads_write_without_streams() {
    let folder = tempfile::tempdir().unwrap();
    let target = new_file(&folder.path().join("data"), 1 << 20);
    let arena = Arena::new(1 << 20).unwrap();
    let options = DeviceOptions {
        engine: IoEngine::Threads,
        depth: 2,
    };
    let (mut device, _) = open_device(&target, &arena, options).unwrap();
    let over = run(&mut *device, vec![log_write(&arena, 0, 2, 5)]);
    assert_eq!((device.engine(), &over[0].result), ("threads", &Ok(())));
}
