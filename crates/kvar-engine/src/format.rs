//! Making a device, and telling whether one is ours.

use crate::layout::{
    FORMAT_VERSION, FormatError, PAGE, Superblock, SuperblockCopy, superblock_offsets,
};
use kvar_base::{ByteSize, DeviceUuid, PAGE_BYTES};
use kvar_io::{
    Arena, Buffer, Completion, Device, DeviceError, Lifetime, Op, WriteProbe, probe_writes,
};
use std::time::Duration;

/// Smallest device that is tried before it is used: on a smaller one kvar itself is being tried, and
/// should start at once.
const PROBED_BYTES_MIN: u64 = 1 << 30;

/// How to divide a new device.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Shards; fixed for the life of the device.
    pub shards: u32,
    /// Typical block size: sizes index and directories. Smaller blocks work and waste space.
    pub expected_block_bytes: u64,
    /// Seconds since 1970, for people who look at it later.
    pub created_unix: u64,
    /// Name of the device; draw it at random.
    pub uuid: DeviceUuid,
    /// Secret of the device; draw it at random.
    pub secret: [u8; 16],
}

impl FormatOptions {
    /// Options with a random name and secret.
    #[must_use]
    pub fn random(shards: u32, expected_block_bytes: u64, created_unix: u64) -> Self {
        Self {
            shards,
            expected_block_bytes,
            created_unix,
            uuid: DeviceUuid::random(),
            secret: *DeviceUuid::random().as_bytes(),
        }
    }
}

/// Why a device was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is something, and it is not ours.
    #[error(
        "it holds data that is not kvar's and is left alone: give another path, or erase it first if you are sure"
    )]
    NotKvar,
    /// A device of another format.
    #[error(
        "it has format version {found}, this program reads and writes version {FORMAT_VERSION}: use a kvar of that \
         version, or give another path"
    )]
    OtherVersion {
        /// Version on the device.
        found: u32,
    },
    /// Superblock copies are lost.
    #[error(
        "only {valid} of its 4 superblock copies are valid and 2 must agree: the device was damaged, or a first start \
         was interrupted; erase it to start afresh (a cache can be filled again), or restore it"
    )]
    Damaged {
        /// Copies that are valid.
        valid: usize,
    },
    /// Shorter than it was.
    #[error(
        "it has {actual} and was formatted with {recorded}: it was truncated; restore its length, or erase it to start afresh"
    )]
    Truncated {
        /// Bytes when formatted.
        recorded: ByteSize,
        /// Bytes now.
        actual: ByteSize,
    },
    /// The division asked for is impossible.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The device refused.
    #[error("the device failed: {0}")]
    Device(#[from] DeviceError),
    /// A shard that the device has not.
    #[error("shard {shard} of a device with {shards}")]
    NoSuchShard {
        /// Asked for.
        shard: u32,
        /// There.
        shards: u32,
    },
    /// The memory given is too small.
    #[error("not enough memory for input and output: give the shard a larger arena")]
    NoMemory,
}

/// Runs one operation and waits for it.
pub(crate) fn run(device: &mut dyn Device, op: Op) -> (Op, Result<(), DeviceError>) {
    device.submit(0, op);
    let mut done = Vec::new();
    loop {
        if let Err(error) = device.kick() {
            // The queue is still the device's; a refusal of the whole queue does not pass by itself.
            device.wait(Duration::from_millis(100));
            device.poll(&mut done);
            if done.is_empty() && device.in_flight() == 0 {
                return (Op::Flush, Err(error));
            }
        }
        device.wait(Duration::from_millis(100));
        device.poll(&mut done);
        if let Some(Completion { op, result, .. }) = done.pop() {
            return (op, result);
        }
    }
}

/// Reads `len` bytes at `offset`.
pub(crate) fn read(
    device: &mut dyn Device,
    arena: &Arena,
    offset: u64,
    len: usize,
) -> Result<Buffer, OpenError> {
    let buffer = arena.allocate(len).ok_or(OpenError::NoMemory)?;
    let (op, result) = run(device, Op::Read { offset, buffer });
    result?;
    match op {
        Op::Read { buffer, .. } => Ok(buffer),
        _ => Err(OpenError::NoMemory),
    }
}

/// Writes bytes at `offset`.
pub(crate) fn write(
    device: &mut dyn Device,
    arena: &Arena,
    offset: u64,
    bytes: &[u8],
) -> Result<(), OpenError> {
    let mut buffer = arena.allocate(bytes.len()).ok_or(OpenError::NoMemory)?;
    buffer.as_mut_slice().copy_from_slice(bytes);
    Ok(run(
        device,
        Op::Write {
            offset,
            buffers: vec![buffer.freeze()],
            lifetime: Lifetime::Pages,
        },
    )
    .1?)
}

/// Divides a device and writes its superblock. What was there is lost.
///
/// Cost: four pages and two flushes, whatever the size.
///
/// # Errors
/// When the division is impossible or the device fails.
pub fn format(
    device: &mut dyn Device,
    arena: &Arena,
    options: &FormatOptions,
) -> Result<Superblock, OpenError> {
    let superblock = plan(device, options)?;
    write_copies(device, arena, &superblock)?;
    Ok(superblock)
}

/// As [`format()`], after half a second of writing to the first segments: how many bytes of writes the
/// device wants under way stands in the superblock then. On a device too small to tell it does not.
///
/// # Errors
/// When the division is impossible or the device fails.
pub fn format_probed(
    device: &mut dyn Device,
    arena: &Arena,
    options: &FormatOptions,
) -> Result<(Superblock, Option<WriteProbe>), OpenError> {
    let mut superblock = plan(device, options)?;
    let segments = u64::from(superblock.segments_per_shard) * u64::from(superblock.shards);
    let start = superblock.segments_offset;
    let end = start + segments * superblock.segment_bytes;
    let found = if superblock.device_bytes >= PROBED_BYTES_MIN {
        probe_writes(device, arena, start..end)?
    } else {
        None
    };
    if let Some(found) = found {
        superblock.write_in_flight_bytes = found.in_flight_bytes;
    }
    write_copies(device, arena, &superblock)?;
    Ok((superblock, found))
}

fn plan(device: &dyn Device, options: &FormatOptions) -> Result<Superblock, FormatError> {
    Superblock::plan(
        device.bytes(),
        options.shards,
        options.expected_block_bytes,
        options.uuid,
        options.secret,
        options.created_unix,
    )
}

fn write_copies(
    device: &mut dyn Device,
    arena: &Arena,
    superblock: &Superblock,
) -> Result<(), OpenError> {
    // Pages of an earlier life carry another uuid and are never taken for ours.
    for offset in superblock_offsets(superblock.device_bytes) {
        write(device, arena, offset, &superblock.encode())?;
    }
    run(device, Op::Flush).1?;
    Ok(())
}

fn copies(
    device: &mut dyn Device,
    arena: &Arena,
    device_bytes: u64,
) -> Result<[SuperblockCopy; 4], OpenError> {
    let mut found = [const { SuperblockCopy::Damaged }; 4];
    for (copy, offset) in found.iter_mut().zip(superblock_offsets(device_bytes)) {
        if offset + PAGE_BYTES <= device.bytes() {
            // A page that cannot be read is a lost copy, not the end.
            if let Ok(page) = read(device, arena, offset, PAGE) {
                *copy = Superblock::decode(page.as_slice());
            }
        }
    }
    Ok(found)
}

/// What device this is: `None` for a blank one.
///
/// # Errors
/// When it is not ours, of another version, damaged, shorter than it was, or fails.
pub fn read_superblock(
    device: &mut dyn Device,
    arena: &Arena,
) -> Result<Option<Superblock>, OpenError> {
    let actual = device.bytes() / PAGE_BYTES * PAGE_BYTES;
    let mut found = copies(device, arena, actual)?;
    let recorded = found.iter().find_map(|copy| match copy {
        SuperblockCopy::Valid(superblock) => Some(superblock.device_bytes),
        _ => None,
    });
    if let Some(recorded) = recorded
        && recorded != actual
    {
        if recorded > actual {
            return Err(OpenError::Truncated {
                recorded: ByteSize(recorded),
                actual: ByteSize(actual),
            });
        }
        found = copies(device, arena, recorded)?;
    }
    let valid: Vec<&Superblock> = found
        .iter()
        .filter_map(|copy| match copy {
            SuperblockCopy::Valid(superblock) => Some(superblock),
            _ => None,
        })
        .collect();
    let quorum = valid
        .iter()
        .find(|one| valid.iter().filter(|other| other == one).count() >= 2);
    if let Some(superblock) = quorum {
        return Ok(Some((*superblock).clone()));
    }
    if found.iter().all(|copy| *copy == SuperblockCopy::Blank) {
        return Ok(None);
    }
    for copy in &found {
        if let SuperblockCopy::OtherVersion(version) = copy {
            return Err(OpenError::OtherVersion { found: *version });
        }
    }
    let ours = !valid.is_empty() || holds_magic(device, arena);
    Err(if ours {
        OpenError::Damaged { valid: valid.len() }
    } else {
        OpenError::NotKvar
    })
}

fn holds_magic(device: &mut dyn Device, arena: &Arena) -> bool {
    superblock_offsets(device.bytes())
        .into_iter()
        .any(|offset| {
            read(device, arena, offset, PAGE)
                .is_ok_and(|page| page.as_slice().starts_with(b"KVARDISK"))
        })
}

/// Writes superblock copies that are lost or differ again; returns how many.
pub(crate) fn mend_superblock(
    device: &mut dyn Device,
    arena: &Arena,
    superblock: &Superblock,
) -> Result<u32, OpenError> {
    let mut mended = 0;
    let found = copies(device, arena, superblock.device_bytes)?;
    for (copy, offset) in found
        .iter()
        .zip(superblock_offsets(superblock.device_bytes))
    {
        if !matches!(copy, SuperblockCopy::Valid(same) if same == superblock) {
            write(device, arena, offset, &superblock.encode())?;
            mended += 1;
        }
    }
    if mended > 0 {
        run(device, Op::Flush).1?;
    }
    Ok(mended)
}
