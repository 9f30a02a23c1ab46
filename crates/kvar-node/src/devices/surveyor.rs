//! Reads what a device names, segment by segment, on a thread of its own.
//!
//! ```text
//!   keeper ── next ──> surveyor ── Begun, then a segment's blocks for each next, then End ──> keeper
//! ```
//!
//! What must always be true: no more than one segment's blocks are on their way, whatever the device
//! holds; its owner never waits for it. A thread that is of no use any more ends after the read under way,
//! however long a device that is ill takes over that, and keeps the device open till then. What it says
//! carries the number of its survey, so that nobody takes it for another's.

use super::keeper::Event;
use crate::storage::device_over;
use crossbeam_channel::{Receiver, Sender, bounded};
use kvar_engine::{
    OpenError, Superblock, SurveyedBlock, SurveyedSegments, survey_arena_bytes, survey_blocks,
    survey_segments,
};
use kvar_io::{Arena, IoEngine, Target};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A segment that is complete: its shard, and its opening number there.
pub(crate) type Sealed = (u32, u64);

/// What a surveyor says.
pub(crate) enum Said {
    /// So many segments, so many of which cannot even be said whether they are in use.
    Begun { segments: u64, unreadable: u64 },
    /// The blocks of the next segment; which one it was if nothing can come to it any more.
    Blocks(Vec<SurveyedBlock>, Option<Sealed>),
    /// These were all.
    End,
    /// It cannot go on.
    Failed(String),
}

/// One survey under way.
pub(crate) struct Surveyor {
    next: Sender<()>,
    is_over: Arc<AtomicBool>,
}

impl Surveyor {
    /// Begins, with all segments but those that are `done`.
    pub(crate) fn begin(
        (device, survey): (u32, u64),
        target: Arc<Target>,
        superblock: Arc<Superblock>,
        done: Arc<HashSet<Sealed>>,
        keeper: Sender<Event>,
    ) -> std::io::Result<Self> {
        let (next, asked) = bounded(1);
        let is_over = Arc::new(AtomicBool::new(false));
        let over = is_over.clone();
        let body = move || {
            let say = |said| {
                // A keeper that is gone wants nothing any more.
                let _ = keeper.send(Event::Surveyed {
                    device,
                    survey,
                    said,
                });
            };
            let goes_on = || !over.load(Ordering::Relaxed);
            if let Err(why) = read_all(&target, &superblock, &done, &asked, &say, &goes_on) {
                say(Said::Failed(why.to_string()));
            }
        };
        let spawn = std::thread::Builder::new().name("kvar-survey".to_owned());
        spawn.spawn(body)?;
        Ok(Self { next, is_over })
    }

    /// Asks for the next segment.
    pub(crate) fn next(&self) {
        // One is asked for at a time; a thread that has ended has said so.
        let _ = self.next.try_send(());
    }
}

impl Drop for Surveyor {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

fn read_all(
    target: &Target,
    superblock: &Superblock,
    done: &HashSet<Sealed>,
    asked: &Receiver<()>,
    say: &dyn Fn(Said),
    goes_on: &dyn Fn() -> bool,
) -> Result<(), OpenError> {
    let arena = Arena::new(survey_arena_bytes(superblock)).map_err(|_| OpenError::NoMemory)?;
    // Threads: a ring of its own would cost more to set up than it saves here.
    let mut device = device_over(target, &arena, IoEngine::Threads)
        .map_err(|error| OpenError::Device(device_error(&error)))?;
    let SurveyedSegments {
        segments: all,
        unreadable,
    } = survey_segments(&mut *device, &arena, superblock, goes_on)?;
    if !goes_on() {
        return Ok(());
    }
    let wanted: Vec<_> = all
        .into_iter()
        .filter(|segment| !done.contains(&(segment.shard, segment.opened_sequence)))
        .collect();
    say(Said::Begun {
        segments: wanted.len() as u64,
        unreadable,
    });
    for segment in &wanted {
        if asked.recv().is_err() {
            return Ok(());
        }
        let (blocks, is_sealed) = survey_blocks(&mut *device, &arena, superblock, segment)?;
        let sealed = is_sealed.then_some((segment.shard, segment.opened_sequence));
        say(Said::Blocks(blocks, sealed));
    }
    if asked.recv().is_ok() {
        say(Said::End);
    }
    Ok(())
}

fn device_error(error: &dyn std::fmt::Display) -> kvar_io::DeviceError {
    kvar_io::DeviceError::Io {
        code: None,
        message: error.to_string(),
    }
}
