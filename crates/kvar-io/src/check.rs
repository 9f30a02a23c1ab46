//! What every device refuses before it touches anything, and reads out of the system's answers.

use crate::{DeviceError, Op};
use kvar_base::PAGE_BYTES;
use rustix::io::Errno;
use std::io;

/// Bytes an operation moves, padding included; zero for a flush.
pub(crate) fn op_len(op: &Op) -> u64 {
    match op {
        Op::Read { buffer, .. } => buffer.padded_len() as u64,
        Op::Write { buffers, .. } => buffers
            .iter()
            .map(|buffer| buffer.padded_len() as u64)
            .sum(),
        Op::Flush => 0,
        Op::Discard { len, .. } => *len,
    }
}

/// Refuses what lies outside the device, is not in whole pages, moves nothing, or gathers more
/// than [`Op::WRITE_BUFFERS_MAX`] buffers.
pub(crate) fn check_op(op: &Op, device_bytes: u64) -> Result<(), DeviceError> {
    let (Op::Read { offset, .. } | Op::Write { offset, .. } | Op::Discard { offset, .. }) = op
    else {
        return Ok(());
    };
    if let Op::Write { buffers, .. } = op
        && buffers.len() > Op::WRITE_BUFFERS_MAX
    {
        let (found, most) = (buffers.len(), Op::WRITE_BUFFERS_MAX);
        let message = format!("one write gathers {found} buffers; split it, {most} are the most");
        return Err(DeviceError::Io {
            code: None,
            message,
        });
    }
    let (offset, len) = (*offset, op_len(op));
    let inside = offset
        .checked_add(len)
        .is_some_and(|end| end <= device_bytes);
    let aligned = offset.is_multiple_of(PAGE_BYTES) && len.is_multiple_of(PAGE_BYTES);
    if inside && aligned && len > 0 {
        Ok(())
    } else {
        Err(DeviceError::Range { offset, len })
    }
}

/// Whether the answer to a discard only says that this storage cannot discard.
pub(crate) fn cannot_discard(error: &io::Error) -> bool {
    let no = [
        Errno::OPNOTSUPP,
        Errno::NOSYS,
        Errno::INVAL,
        Errno::NOTTY,
        Errno::NODEV,
    ];
    Errno::from_io_error(error).is_some_and(|error| no.contains(&error))
}

/// The error of an operation that had moved `moved` of `wanted` bytes before. After an odd count
/// (the end of a truncated file) direct I/O calls the continuation invalid; the truth is that it
/// was short.
pub(crate) fn failed_after(moved: u64, wanted: u64, error: io::Error) -> DeviceError {
    if !moved.is_multiple_of(PAGE_BYTES) && error.kind() == io::ErrorKind::InvalidInput {
        return short(moved, wanted);
    }
    error.into()
}

/// The error of an operation that moves no further.
pub(crate) fn short(moved: u64, wanted: u64) -> DeviceError {
    let count = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
    DeviceError::Short {
        wanted: count(wanted),
        moved: count(moved),
    }
}
