//! The way out: what memory alone holds is written, then the index, within the time that is given.
//!
//! ```text
//!  Flushing ── all flushed ──> Checkpointing ── complete, or late ──> Done
//!      └── late, or the device refuses ──────────────────────────────────┘
//! ```
//!
//! What must always be true: it ends, at the latest when `shutdown_flush` is over, whatever the
//! device does; the report counts as kept only what is flushed.
//!
//! Left to others: puts are refused meanwhile by `put`; writing and flushing go their usual way.

use super::Shard;
use super::status::ShutdownReport;
use kvar_base::Moment;

/// A shutdown under way.
pub(super) struct Shutdown {
    pub(super) until: Moment,
    stage: ShutdownStage,
    pub(super) report: ShutdownReport,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ShutdownStage {
    Flushing,
    Checkpointing,
    Done,
}

impl Shard {
    pub(crate) fn begin_shutdown(&mut self, now: Moment) {
        if self.shutdown.is_some() {
            return;
        }
        self.shutdown = Some(Shutdown {
            until: now.after(self.config.shutdown_flush),
            stage: ShutdownStage::Flushing,
            report: ShutdownReport::default(),
        });
        self.queue_given_up(now);
    }

    pub(super) fn step_shutdown(&mut self, now: Moment) {
        let Some(shutdown) = &self.shutdown else {
            return;
        };
        let (stage, late) = (shutdown.stage, shutdown.until <= now);
        match stage {
            ShutdownStage::Flushing => {
                let flushed = self.unflushed.puts.is_empty()
                    && self.control_counts.is_empty()
                    && self.sync.is_none();
                let stuck = late || self.trouble.until.is_some();
                if !flushed && !stuck {
                    return;
                }
                let (mut kept, mut dropped) = (0, 0);
                for (id, resident) in self.dram.iter() {
                    let on_device = resident.is_below
                        || self.index.find(id).is_some()
                            && !self.unflushed.puts.contains_key(&resident.number);
                    if on_device { kept += 1 } else { dropped += 1 }
                }
                if let Some(shutdown) = &mut self.shutdown {
                    shutdown.report = ShutdownReport {
                        kept_blocks: kept,
                        dropped_blocks: dropped,
                        checkpointed: false,
                    };
                    shutdown.stage = if stuck {
                        ShutdownStage::Done
                    } else {
                        ShutdownStage::Checkpointing
                    };
                }
                if !stuck {
                    self.force_checkpoint();
                }
            }
            ShutdownStage::Checkpointing => {
                if self.checkpoint.is_none() || late {
                    let checkpointed =
                        self.checkpoint.is_none() && self.sealed_since_checkpoint == 0;
                    if let Some(shutdown) = &mut self.shutdown {
                        shutdown.report.checkpointed = checkpointed;
                        shutdown.stage = ShutdownStage::Done;
                    }
                }
            }
            ShutdownStage::Done => {}
        }
    }

    pub(crate) fn shutdown_report(&self) -> Option<ShutdownReport> {
        self.shutdown
            .as_ref()
            .filter(|shutdown| shutdown.stage == ShutdownStage::Done)
            .map(|shutdown| shutdown.report.clone())
    }
}
