//! Reads what a device names, segment by segment, on a thread of its own.
//!
//! ```text
//!   keeper ── next ──> surveyor ── Begun, then a segment's blocks for each next, then End ──> keeper
//! ```
//!
//! What must always be true: no more than one segment's blocks are on their way, whatever the device
//! holds; the thread ends with its owner, who waits for the read under way at most.

use super::keeper::Event;
use crate::storage::device_over;
use crossbeam_channel::{Receiver, Sender, bounded};
use kvar_engine::{
    OpenError, Superblock, SurveyedBlock, survey_arena_bytes, survey_blocks, survey_segments,
};
use kvar_io::{Arena, IoEngine, Target};
use std::sync::Arc;
use std::thread::JoinHandle;

/// What a surveyor says.
pub(crate) enum Said {
    /// So many segments, and the opening number of each shard's newest.
    Begun { segments: u64, newest: Vec<u64> },
    /// The blocks of the next segment.
    Blocks(Vec<SurveyedBlock>),
    /// These were all.
    End,
    /// It cannot go on.
    Failed(String),
}

/// One survey under way.
pub(crate) struct Surveyor {
    next: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Surveyor {
    /// Begins; `from` is the oldest opening number that counts in each shard (none: all do).
    pub(crate) fn begin(
        device: u32,
        target: Arc<Target>,
        superblock: Arc<Superblock>,
        from: Vec<u64>,
        keeper: Sender<Event>,
    ) -> std::io::Result<Self> {
        let (next, asked) = bounded(1);
        let body = move || {
            let say = |said| {
                // A keeper that is gone wants nothing any more.
                let _ = keeper.send(Event::Surveyed { device, said });
            };
            if let Err(why) = survey(&target, &superblock, &from, &asked, &say) {
                say(Said::Failed(why.to_string()));
            }
        };
        let spawn = std::thread::Builder::new().name("kvar-survey".to_owned());
        Ok(Self {
            next: Some(next),
            thread: Some(spawn.spawn(body)?),
        })
    }

    /// Asks for the next segment.
    pub(crate) fn next(&self) {
        if let Some(next) = &self.next {
            // One is asked for at a time; a thread that has ended has said so.
            let _ = next.try_send(());
        }
    }
}

impl Drop for Surveyor {
    fn drop(&mut self) {
        self.next = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn survey(
    target: &Target,
    superblock: &Superblock,
    from: &[u64],
    asked: &Receiver<()>,
    say: &dyn Fn(Said),
) -> Result<(), OpenError> {
    let arena = Arena::new(survey_arena_bytes(superblock)).map_err(|_| OpenError::NoMemory)?;
    // Threads: a ring of its own would cost more to set up than it saves here.
    let mut device = device_over(target, &arena, IoEngine::Threads)
        .map_err(|error| OpenError::Device(device_error(&error)))?;
    let all = survey_segments(&mut *device, &arena, superblock)?;
    let mut newest = vec![0; superblock.shards as usize];
    for segment in &all {
        let known = &mut newest[segment.shard as usize];
        *known = segment.opened_sequence.max(*known);
    }
    let counts = |shard: u32, opened: u64| {
        from.get(shard as usize)
            .is_none_or(|oldest| opened >= *oldest)
    };
    let wanted: Vec<_> = all
        .into_iter()
        .filter(|segment| counts(segment.shard, segment.opened_sequence))
        .collect();
    say(Said::Begun {
        segments: wanted.len() as u64,
        newest,
    });
    for segment in &wanted {
        if asked.recv().is_err() {
            return Ok(());
        }
        let blocks = survey_blocks(&mut *device, &arena, superblock, segment)?;
        say(Said::Blocks(blocks));
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
