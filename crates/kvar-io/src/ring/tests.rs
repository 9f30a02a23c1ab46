//! What a write says to the kernel, byte by byte, and what becomes of one that is refused.
//!
//! What must always be true: the stream stands where `<linux/io_uring.h>` has it, in all four kinds
//! of writes; a stream that is refused costs one more try and no block.

use super::*;
use crate::Lifetime;

/// Where an entry of the ring has its opcode, and the stream of a write: `write_stream` of
/// `struct io_uring_sqe`, in the union of `splice_fd_in` and `file_index`.
const AT_OPCODE: usize = 0;
const AT_STREAM: usize = 44;

fn bytes_of(entry: &Entry) -> [u8; 64] {
    // SAFETY: an entry is 64 plain bytes that the kernel reads just so.
    unsafe { std::mem::transmute_copy(entry) }
}

fn table(streams: WriteStreams, registered_lists: bool) -> Table {
    Table {
        slots: Vec::new(),
        free: Vec::new(),
        queue: VecDeque::new(),
        discards: false,
        registered_lists,
        streams,
        file: Fixed(0),
    }
}

fn write(arena: &Arena, pages: usize, lifetime: Lifetime) -> Op {
    // With gaps between them, so that they stay several pieces.
    let mut all: Vec<_> = (0..2 * pages)
        .map(|_| arena.allocate(4096).unwrap())
        .collect();
    let buffers = (0..pages).map(|at| all.remove(at).freeze()).collect();
    Op::Write {
        offset: 8192,
        buffers,
        lifetime,
    }
}

#[test]
fn every_kind_of_write_names_its_stream_where_the_kernel_looks() {
    let arena = Arena::new(1 << 20).unwrap();
    let log = Lifetime::Log { shard: 4 };
    let kinds = [
        (1, None, opcode::Write::CODE),
        (1, Some(3), opcode::WriteFixed::CODE),
        (3, None, opcode::Writev::CODE),
        (3, Some(3), opcode::WritevFixed::CODE),
    ];
    for (pages, registered, code) in kinds {
        for (streams, lifetime, expected) in [
            (WriteStreams::reported(16, 0), log, 6),
            (WriteStreams::reported(16, 0), Lifetime::Pages, 1),
            (WriteStreams::none(NoStreams::File), log, 0),
        ] {
            let mut table = table(streams, true);
            table.add(9, write(&arena, pages, lifetime), registered, 1 << 20);
            let bytes = bytes_of(&table.entry(0));
            assert_eq!((bytes[AT_OPCODE], bytes[AT_STREAM]), (code, expected));
            assert_eq!(bytes[AT_STREAM + 1..AT_STREAM + 4], [0; 3]);
        }
    }
    // Reads and flushes have none, and their field means something else.
    let mut table = table(WriteStreams::reported(16, 0), true);
    let buffer = arena.allocate(4096).unwrap();
    table.add(1, Op::Read { offset: 0, buffer }, None, 1 << 20);
    table.add(2, Op::Flush, None, 1 << 20);
    for slot in 0..2 {
        assert_eq!(
            bytes_of(&table.entry(slot))[AT_STREAM..AT_STREAM + 4],
            [0; 4]
        );
    }
}

#[test]
fn a_stream_that_is_refused_costs_one_more_try() {
    let arena = Arena::new(1 << 20).unwrap();
    let streams = WriteStreams::reported(8, 0);
    let mut table = table(streams.clone(), false);
    let mut out = Vec::new();
    table.add(7, write(&arena, 1, Lifetime::Pages), None, 1 << 20);
    assert_eq!(table.queue.pop_front(), Some(0));
    assert_eq!(bytes_of(&table.entry(0))[AT_STREAM], 1);
    table.answered(0, -libc::EINVAL, &mut out);
    assert!(out.is_empty() && !streams.is_refused());
    assert_eq!(table.queue.pop_front(), Some(0));
    assert_eq!(bytes_of(&table.entry(0))[AT_STREAM], 0);
    table.answered(0, 4096, &mut out);
    assert_eq!((out.len(), out[0].token, &out[0].result), (1, 7, &Ok(())));
    assert!(streams.is_refused());
    // And the slot's next write begins without one.
    table.add(8, write(&arena, 1, Lifetime::Pages), None, 1 << 20);
    assert_eq!(bytes_of(&table.entry(0))[AT_STREAM], 0);
}

#[test]
fn what_is_refused_without_a_stream_as_well_says_nothing_of_streams() {
    let arena = Arena::new(1 << 20).unwrap();
    let streams = WriteStreams::reported(8, 0);
    let mut table = table(streams.clone(), false);
    let mut out = Vec::new();
    table.add(7, write(&arena, 1, Lifetime::Pages), None, 1 << 20);
    for _ in 0..2 {
        table.entry(0);
        table.answered(0, -libc::EINVAL, &mut out);
    }
    assert!(out[0].result.is_err() && !streams.is_refused());
    table.add(8, write(&arena, 1, Lifetime::Pages), None, 1 << 20);
    assert_eq!(bytes_of(&table.entry(0))[AT_STREAM], 1);
}
