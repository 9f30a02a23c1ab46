//! Which device a shard gets: io_uring where it is allowed, threads where not, and a note that
//! says why.

use crate::{Arena, Device, DeviceError, Ring, Target, Threads};
use std::str::FromStr;

/// How operations reach the storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring, and threads where it is refused.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// Threads, whatever the kernel can do.
    Threads,
}

impl FromStr for IoEngine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "io_uring" => Ok(Self::IoUring),
            "threads" => Ok(Self::Threads),
            _ => Err(format!(
                "{text:?} is no I/O engine: write auto, io_uring or threads"
            )),
        }
    }
}

/// What a device is opened with.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOptions {
    /// How operations reach the storage.
    pub engine: IoEngine,
    /// Operations that the device works on at once; more may be submitted and wait their turn.
    pub depth: usize,
}

impl Default for DeviceOptions {
    /// [`IoEngine::Auto`] at depth 128: reads of 64 KiB saturate an NVMe drive from 32 to 64, and
    /// the writes of a segment come on top.
    fn default() -> Self {
        Self {
            engine: IoEngine::Auto,
            depth: 128,
        }
    }
}

/// Opens a device over `target` for the thread that calls, with what an operator should hear about
/// it. Buffers of `arena` are the cheap ones; those of another work too.
///
/// # Errors
/// When no engine that the options allow can be had.
pub fn open_device(
    target: &Target,
    arena: &Arena,
    options: DeviceOptions,
) -> Result<(Box<dyn Device>, Vec<String>), DeviceError> {
    let mut notes = Vec::new();
    if options.engine != IoEngine::Threads {
        match Ring::open(
            target.try_clone_file()?,
            target.bytes(),
            arena,
            options.depth,
        ) {
            Ok(ring) => {
                let ring = ring.with_streams(target.write_streams());
                notes.extend_from_slice(ring.notes());
                return Ok((Box::new(ring), notes));
            }
            Err(refused) if options.engine == IoEngine::IoUring => {
                let code = refused.source.raw_os_error();
                let message = format!("{refused}; allow it, or choose the engine auto or threads");
                return Err(DeviceError::Io { code, message });
            }
            Err(refused) => notes.push(format!("{refused}; using threads")),
        }
    }
    let threads = Threads::open(target.try_clone_file()?, target.bytes(), options.depth)?;
    Ok((Box::new(threads), notes))
}
