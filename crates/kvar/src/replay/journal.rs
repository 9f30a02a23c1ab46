//! What a replay was told, so that it can be asked for again after a crash.
//!
//! ```text
//!   kvar-journal 1 <block bytes>
//!   P <id> <nonce> <us>      a put is on its way
//!   A <id> <nonce> <us>      it was acknowledged (stored)
//!   E <id> 0 <us>            the node said it exists already: these bytes were not taken
//!   R <id> 0 <us>            a remove is on its way
//!   D <id> 0 <us>            it was acknowledged
//! ```
//!
//! Times are of the machine's monotonic clock in microseconds, the same for every process until the
//! next boot, so ages hold across a kill and a restart.
//!
//! [`Journal::read`] folds the lines into what each block must be:
//!
//! | history of an id | promise |
//! |---|---|
//! | A or E, and nothing after it | [`Promise::Acknowledged`]: should be there, unless evicted |
//! | D, and no P after it | [`Promise::Removed`]: must not be there |
//! | R without D, or P after D without A | [`Promise::Open`]: either is right |
//!
//! Whatever a read returns must be one of the nonces that were on their way for the id since its last
//! acknowledged remove (or another writer's, where the node said it exists already).

use kvar_base::BlockId;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

const MAGIC: &str = "kvar-journal 1";

/// The machine's monotonic clock, in microseconds since boot.
pub(crate) fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

/// A journal being written.
pub(crate) struct JournalWriter {
    path: PathBuf,
    out: BufWriter<File>,
}

impl JournalWriter {
    /// A new journal; one that is there is replaced.
    pub(crate) fn create(path: &Path, block_bytes: usize) -> Result<Self, String> {
        let made = File::create(path).and_then(|file| {
            let mut out = BufWriter::new(file);
            writeln!(out, "{MAGIC} {block_bytes}")?;
            Ok(out)
        });
        let out = made.map_err(|error| format!("journal {}: {error}", path.display()))?;
        Ok(Self {
            path: path.into(),
            out,
        })
    }

    fn line(&mut self, kind: char, id: &BlockId, nonce: u64) -> Result<(), String> {
        writeln!(self.out, "{kind} {id} {nonce:016x} {}", monotonic_us())
            .map_err(|error| format!("journal {}: {error}", self.path.display()))
    }

    pub(crate) fn putting(&mut self, id: &BlockId, nonce: u64) -> Result<(), String> {
        self.line('P', id, nonce)
    }

    pub(crate) fn stored(&mut self, id: &BlockId, nonce: u64) -> Result<(), String> {
        self.line('A', id, nonce)
    }

    pub(crate) fn exists(&mut self, id: &BlockId) -> Result<(), String> {
        self.line('E', id, 0)
    }

    pub(crate) fn removing(&mut self, id: &BlockId) -> Result<(), String> {
        self.line('R', id, 0)
    }

    pub(crate) fn removed(&mut self, id: &BlockId) -> Result<(), String> {
        self.line('D', id, 0)
    }

    pub(crate) fn flush(&mut self) -> Result<(), String> {
        self.out
            .flush()
            .map_err(|error| format!("journal {}: {error}", self.path.display()))
    }
}

/// What a store owes for one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Promise {
    /// Acknowledged at this time and not removed since.
    Acknowledged {
        /// When, in microseconds of the monotonic clock.
        at_us: u64,
    },
    /// Removed, and that was acknowledged.
    Removed,
    /// Something was under way; either state is right.
    Open,
}

/// One block's history, folded.
#[derive(Clone, Debug)]
pub(crate) struct History {
    pub(crate) promise: Promise,
    /// Nonces on their way since the last acknowledged remove.
    pub(crate) nonces: Vec<u64>,
    /// Whether the node said it had a copy already, which may be another writer's.
    pub(crate) foreign: bool,
}

/// A journal read back.
#[derive(Debug)]
pub(crate) struct Journal {
    pub(crate) block_bytes: usize,
    pub(crate) blocks: HashMap<BlockId, History>,
    /// Time of the last line.
    pub(crate) last_us: u64,
}

impl Journal {
    /// Reads a journal; a last line cut short by a crash of the writer is passed over.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let wrong = |line: usize, what: &str| {
            format!(
                "journal {} line {line}: {what}; was it written by kvar replay --journal?",
                path.display()
            )
        };
        let io = |error: std::io::Error| format!("journal {}: {error}", path.display());
        let mut reader = BufReader::new(File::open(path).map_err(io)?);
        let mut text = String::new();
        reader.read_line(&mut text).map_err(io)?;
        let block_bytes = text
            .strip_prefix(MAGIC)
            .and_then(|rest| rest.trim().parse().ok())
            .ok_or_else(|| wrong(1, "not a journal"))?;
        let mut journal = Self {
            block_bytes,
            blocks: HashMap::new(),
            last_us: 0,
        };
        for number in 2.. {
            text.clear();
            if reader.read_line(&mut text).map_err(io)? == 0 || !text.ends_with('\n') {
                break;
            }
            journal
                .fold(&text)
                .ok_or_else(|| wrong(number, "cannot be read"))?;
        }
        Ok(journal)
    }

    fn fold(&mut self, line: &str) -> Option<()> {
        let mut words = line.split_ascii_whitespace();
        let kind = words.next()?;
        let id: BlockId = words.next()?.parse().ok()?;
        let nonce = u64::from_str_radix(words.next()?, 16).ok()?;
        let at_us: u64 = words.next()?.parse().ok()?;
        self.last_us = self.last_us.max(at_us);
        let history = self.blocks.entry(id).or_insert(History {
            promise: Promise::Open,
            nonces: Vec::new(),
            foreign: false,
        });
        match kind {
            "P" => {
                history.nonces.push(nonce);
                // A put of a block that is there changes nothing; after a remove it may bring the
                // block back even if its answer never came.
                if history.promise == Promise::Removed {
                    history.promise = Promise::Open;
                }
            }
            "A" => history.promise = Promise::Acknowledged { at_us },
            // Of a block that was acknowledged before, the first time counts: the copy is as old.
            "E" => {
                history.foreign = true;
                if !matches!(history.promise, Promise::Acknowledged { .. }) {
                    history.promise = Promise::Acknowledged { at_us };
                }
            }
            "R" => history.promise = Promise::Open,
            "D" => {
                *history = History {
                    promise: Promise::Removed,
                    nonces: Vec::new(),
                    foreign: false,
                }
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histories_fold_into_promises() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let ids: Vec<BlockId> = (0..6).map(|number| BlockId::new([number; 32])).collect();
        let mut journal = JournalWriter::create(&path, 4096).unwrap();
        for id in &ids {
            journal.putting(id, 9).unwrap();
        }
        for id in &ids[1..] {
            journal.stored(id, 9).unwrap();
        }
        for id in &ids[2..] {
            journal.removing(id).unwrap();
        }
        for id in &ids[3..] {
            journal.removed(id).unwrap();
        }
        for id in &ids[4..] {
            journal.putting(id, 10).unwrap();
        }
        journal.stored(&ids[5], 10).unwrap();
        journal.flush().unwrap();
        let read = Journal::read(&path).unwrap();
        assert_eq!(read.block_bytes, 4096);
        let promise = |number: usize| read.blocks[&ids[number]].promise;
        assert_eq!(promise(0), Promise::Open);
        assert!(matches!(promise(1), Promise::Acknowledged { .. }));
        assert_eq!(promise(2), Promise::Open);
        assert_eq!(promise(3), Promise::Removed);
        assert_eq!(promise(4), Promise::Open);
        assert_eq!(
            promise(5),
            Promise::Acknowledged {
                at_us: read.last_us
            }
        );
        assert_eq!(read.blocks[&ids[1]].nonces, [9]);
        assert_eq!(read.blocks[&ids[5]].nonces, [10]);
    }

    #[test]
    fn what_is_no_journal_is_said_to_be_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        std::fs::write(&path, "hello\n").unwrap();
        assert!(Journal::read(&path).unwrap_err().contains("line 1"));
        std::fs::write(&path, "kvar-journal 1 4096\nP zz 0 1\n").unwrap();
        assert!(Journal::read(&path).unwrap_err().contains("line 2"));
        std::fs::write(&path, "kvar-journal 1 4096\nP 00").unwrap();
        assert!(Journal::read(&path).unwrap().blocks.is_empty());
    }
}
