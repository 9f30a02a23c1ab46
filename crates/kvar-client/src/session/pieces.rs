//! Puts that go section by section: what the writer says, and what leaves when.
//!
//! One payload of a block is on its way at a time, so that a deadline finds at most one source with
//! the link; the next leaves when the one before has.

use super::Session;
use crate::call::{Board, Lost};
use crate::connection::Connection;
use crate::session::links::Slot;
use crate::worker::PutWord;
use kvar_base::{PutOutcome, Refusal};
use kvar_transport::Link as _;
use kvar_wire::{Cancel, Commit, Sections};
use std::cmp::Reverse;

impl Session {
    /// The writer of a put by layers says something. Of a put that has ended nobody wants to hear.
    pub(crate) fn on_put_word(&mut self, put: u64, word: PutWord) {
        let Some(call) = self.board.layer_puts.get(&put).copied() else {
            return;
        };
        let blocks = self.board.put_count(call);
        match word {
            PutWord::Section(parts) => {
                for (item, part) in parts.into_iter().enumerate() {
                    let slot = self.board.put_slot(call, item);
                    let Some(slot) = slot.filter(|slot| slot.outcome.is_none()) else {
                        continue;
                    };
                    if let (Some(layers), Some(part)) = (&mut slot.layers, part) {
                        layers.given += 1;
                        layers.queue.push_back(part);
                    }
                    self.advance_put(call, item);
                }
            }
            PutWord::Commit(deadline) => {
                if let Some(deadline) = deadline {
                    // Of two deadlines of a call the sooner ends it, and the other finds it gone.
                    self.deadlines.push(Reverse((deadline, call)));
                }
                for item in 0..blocks {
                    let slot = self.board.put_slot(call, item);
                    let Some(slot) = slot.filter(|slot| slot.outcome.is_none()) else {
                        continue;
                    };
                    let Some(layers) = &mut slot.layers else {
                        continue;
                    };
                    layers.is_committed = true;
                    if layers.given < layers.lengths.len() {
                        let wrong = PutOutcome::Refused(Refusal::WrongFormat);
                        self.give_up(call, item, wrong);
                    } else {
                        self.advance_put(call, item);
                    }
                }
            }
            PutWord::Abort => {
                self.fence(call);
                self.board.end_call(call, Lost::Deadline);
            }
        }
    }

    /// Sends what can be sent of a block.
    fn advance_put(&mut self, call: u64, item: usize) {
        let Some(slot) = self.board.put_slot(call, item) else {
            return;
        };
        let Some((serial, _)) = slot.layers.as_ref().and_then(|layers| layers.announced) else {
            return;
        };
        for place in &mut self.slots {
            if let Slot::Linked(connection) = place
                && connection.serial == serial
            {
                return advance(connection, &mut self.board, call, item);
            }
        }
    }

    /// Ends one block of a put whose bytes will not come.
    fn give_up(&mut self, call: u64, item: usize, outcome: PutOutcome) {
        let slot = self.board.put_slot(call, item);
        let announced = slot.and_then(|slot| slot.layers.as_ref()?.announced);
        if let Some((serial, request)) = announced {
            for place in &mut self.slots {
                if let Slot::Linked(connection) = place
                    && connection.serial == serial
                {
                    cancel(connection, &mut self.board, request);
                }
            }
        }
        self.board.end_put(call, item, outcome);
    }
}

/// Sends the next section of a block, or its commit, if the node waits for it.
pub(super) fn advance(connection: &mut Connection, board: &mut Board, call: u64, item: usize) {
    let Some(slot) = board.put_slot(call, item) else {
        return;
    };
    let Some(layers) = &mut slot.layers else {
        return;
    };
    let Some((_, request)) = layers.announced.filter(|_| slot.outcome.is_none()) else {
        return;
    };
    if !layers.is_pulled || layers.is_pushing {
        return;
    }
    let is_sent = match layers.queue.pop_front() {
        Some(part) => {
            layers.is_pushing = true;
            let body = Sections {
                first: part.section,
                checks: vec![part.check],
            };
            connection.push(request, &body, part.source).is_ok()
        }
        None if layers.is_committed && !layers.is_commit_sent => {
            layers.is_commit_sent = true;
            connection.send(request, &Commit {}).is_ok()
        }
        None => true,
    };
    if !is_sent {
        // The link has more queued than it may: the put ends here, and the node is told.
        cancel(connection, board, request);
        board.end_put(call, item, PutOutcome::Refused(Refusal::Busy));
    }
}

fn cancel(connection: &mut Connection, board: &mut Board, request: u64) {
    drop(connection.link.fence_push(request));
    connection.forget(request, board);
    // A link that takes no Cancel has worse troubles.
    let _ = connection.send(request, &Cancel {});
}
