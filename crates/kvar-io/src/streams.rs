//! Write streams: telling a drive which bytes will die together, so that it keeps them together.
//!
//! ```text
//!   Lifetime of a write       stream, of S that the drive has       what dies with it
//!   Pages                     1                                     overwritten within seconds
//!   Log { shard }             2 + shard modulo (S - 1)              its segment, all at once
//!   any, S below 2            0: none                               one stream tells nothing apart
//! ```
//!
//! An NVMe drive with Flexible Data Placement (FDP) puts the writes of a stream into erase units of
//! their own. A log that is reused a segment at a time then frees whole units, and the drive need not
//! copy what is still alive out of them.
//!
//! Linux tells the number from 6.16 on, and takes the stream of a write in its io_uring entry:
//!
//! ```text
//!   /sys/dev/block/MAJOR:MINOR/queue/max_write_streams           0: none; no such file: an older kernel
//!                             /queue/write_stream_granularity    bytes of an erase unit
//!                             /partition                         a partition: the kernel gives it none
//! ```
//!
//! What must always be true: a stream is a hint, and decides nothing about what is stored; where the
//! kernel reports none, or refuses one that it reported ([`WriteStreams::refuse`]), every write goes
//! without, from then on and for all shards of the device.
//!
//! What is absent: choosing a stream for a file on a file system, which places its files itself.
//! Buffered writes have none either: the page cache writes them when it likes.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where the kernel tells of its block devices by number.
const SYS_DEV_BLOCK: &str = "/sys/dev/block";
/// Streams that are used at most: a write's entry has eight bits for its stream.
const STREAMS_MAX: u16 = u8::MAX as u16;
/// Fewer tell nothing apart.
const STREAMS_MIN: u16 = 2;

/// What will become of what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// Overwritten in place soon: superblock, checkpoints, directory pages of an open segment.
    Pages,
    /// Dies with its segment: blocks, headers and footers of a shard's log.
    Log {
        /// The shard, as the device numbers them.
        shard: u32,
    },
}

/// Why writes go without streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoStreams {
    /// A file on a file system, which places its bytes itself.
    File,
    /// The kernel gives partitions none.
    Partition,
    /// The kernel says nothing of them: it is older than 6.16.
    Unknown,
    /// The drive has none, or too few to tell anything apart.
    None,
    /// Writes go through the page cache.
    Buffered,
    /// The drive refused one that the kernel had reported.
    Refused,
}

impl NoStreams {
    /// For an operator.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::File => "a file: its file system places what is written",
            Self::Partition => "a partition: the kernel gives streams to whole drives alone",
            Self::Unknown => "the kernel tells of no streams (it does from Linux 6.16 on)",
            Self::None => "the drive has none",
            Self::Buffered => "no direct I/O: the page cache writes when it likes",
            Self::Refused => "the drive refused a write with one",
        }
    }
}

/// The streams of one device, shared by all of its shards.
#[derive(Clone, Debug)]
pub struct WriteStreams(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    count: Result<u8, NoStreams>,
    granularity_bytes: u64,
    is_refused: AtomicBool,
}

impl WriteStreams {
    /// What the kernel says of the block device with these numbers.
    #[must_use]
    pub fn of_device(major: u32, minor: u32) -> Self {
        Self::read(Path::new(SYS_DEV_BLOCK), major, minor)
    }

    /// As [`of_device`](Self::of_device), from a tree like the kernel's.
    pub(crate) fn read(tree: &Path, major: u32, minor: u32) -> Self {
        let device = tree.join(format!("{major}:{minor}"));
        if device.join("partition").exists() {
            return Self::none(NoStreams::Partition);
        }
        let number = |name| {
            let text = std::fs::read_to_string(device.join("queue").join(name)).ok()?;
            text.trim().parse::<u64>().ok()
        };
        match number("max_write_streams") {
            None => Self::none(NoStreams::Unknown),
            Some(count) => Self::reported(
                count.min(u64::from(STREAMS_MAX)) as u16,
                number("write_stream_granularity").unwrap_or(0),
            ),
        }
    }

    /// No streams, and why.
    #[must_use]
    pub fn none(why: NoStreams) -> Self {
        Self::new(Err(why), 0)
    }

    /// So many streams, whatever the kernel says: for a test of what happens then.
    #[must_use]
    pub fn reported(count: u16, granularity_bytes: u64) -> Self {
        let count = u8::try_from(count.min(STREAMS_MAX))
            .ok()
            .filter(|_| count >= STREAMS_MIN);
        Self::new(count.ok_or(NoStreams::None), granularity_bytes)
    }

    fn new(count: Result<u8, NoStreams>, granularity_bytes: u64) -> Self {
        Self(Arc::new(Inner {
            count,
            granularity_bytes,
            is_refused: AtomicBool::new(false),
        }))
    }

    /// How many there are, or why writes go without.
    ///
    /// # Errors
    /// The reason.
    pub fn in_use(&self) -> Result<u8, NoStreams> {
        if self.is_refused() {
            return Err(NoStreams::Refused);
        }
        self.0.count
    }

    /// Whether the drive refused one: an operator should hear that once.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.0.is_refused.load(Ordering::Relaxed)
    }

    /// Bytes that the drive erases together; 0: not told.
    #[must_use]
    pub fn granularity_bytes(&self) -> u64 {
        self.0.granularity_bytes
    }

    /// The drive refused a write with a stream: no write has one any more.
    pub(crate) fn refuse(&self) {
        self.0.is_refused.store(true, Ordering::Relaxed);
    }

    /// The stream of a write; 0: none.
    pub(crate) fn of(&self, lifetime: Lifetime) -> u8 {
        let Ok(count) = self.in_use() else { return 0 };
        match lifetime {
            Lifetime::Pages => 1,
            // `count` is two at least.
            Lifetime::Log { shard } => 2 + (shard % (u32::from(count) - 1)) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A tree as the kernel's, with one device 259:0 of these files.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        let device = tree.path().join("259:0");
        fs::create_dir_all(device.join("queue")).unwrap();
        for (name, text) in files {
            fs::write(device.join(name), text).unwrap();
        }
        tree
    }

    #[test]
    fn what_the_kernel_tells_is_what_is_used() {
        let (streams, unit) = ("queue/max_write_streams", "queue/write_stream_granularity");
        for (files, expected) in [
            (&[(streams, "8\n"), (unit, "13079937024\n")][..], Ok(8)),
            (&[(streams, "2\n")], Ok(2)),
            (&[(streams, "65535\n")], Ok(255)),
            (&[(streams, "1\n")], Err(NoStreams::None)),
            (&[(streams, "0\n"), (unit, "0\n")], Err(NoStreams::None)),
            (&[], Err(NoStreams::Unknown)),
            (&[(streams, "many\n")], Err(NoStreams::Unknown)),
            (&[(streams, "")], Err(NoStreams::Unknown)),
            (
                &[("partition", "1\n"), (streams, "8\n")],
                Err(NoStreams::Partition),
            ),
        ] {
            let tree = tree(files);
            let found = WriteStreams::read(tree.path(), 259, 0);
            assert_eq!(found.in_use(), expected, "{files:?}");
            // A device that is not there is one of which nothing is known.
            let other = WriteStreams::read(tree.path(), 259, 1);
            assert_eq!(other.in_use(), Err(NoStreams::Unknown));
        }
        let tree = tree(&[(streams, "8\n"), (unit, "13079937024\n")]);
        let found = WriteStreams::read(tree.path(), 259, 0);
        assert_eq!(found.granularity_bytes(), 13_079_937_024);
    }

    #[test]
    fn pages_and_the_logs_of_shards_are_kept_apart_as_far_as_there_are_streams() {
        let logs = |streams: &WriteStreams| {
            (0..6)
                .map(|shard| streams.of(Lifetime::Log { shard }))
                .collect::<Vec<_>>()
        };
        let streams = WriteStreams::reported(4, 0);
        assert_eq!(streams.of(Lifetime::Pages), 1);
        assert_eq!(logs(&streams), [2, 3, 4, 2, 3, 4]);
        let streams = WriteStreams::reported(2, 0);
        assert_eq!(
            (streams.of(Lifetime::Pages), logs(&streams)),
            (1, vec![2; 6])
        );
        let streams = WriteStreams::reported(255, 0);
        assert_eq!(streams.of(Lifetime::Log { shard: 253 }), 255);
        assert_eq!(
            streams.of(Lifetime::Log { shard: u32::MAX }),
            2 + (u32::MAX % 254) as u8
        );
        for streams in [
            WriteStreams::reported(1, 0),
            WriteStreams::none(NoStreams::File),
        ] {
            assert_eq!(
                (streams.of(Lifetime::Pages), logs(&streams)),
                (0, vec![0; 6])
            );
        }
    }

    #[test]
    fn what_one_shard_was_refused_no_other_asks_for() {
        let streams = WriteStreams::reported(8, 0);
        let other = streams.clone();
        streams.refuse();
        assert_eq!(other.of(Lifetime::Pages), 0);
        assert_eq!(other.in_use(), Err(NoStreams::Refused));
        assert!(other.is_refused());
    }
}
