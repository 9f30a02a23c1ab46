//! Removes, flushes and purges on a link: what is asked of engines and over when all have done it.
//!
//! ```text
//!   one tier, or a flush: all engines at once ──────────────> Done, or why not
//!   two tiers:            the fast ones ── then the big ones ──> Done, or why not
//!   while a device is away or leaves, the keeper remembers a removal before it is acknowledged
//! ```
//!
//! What must always be true: what was removed does not come back, not with a device that was away,
//! nor by a move under way from device to device.

use super::conversation::Conversation;
use super::desk::{Desk, Operation, To};
use super::parts::removals;
use super::request::{Finish, Kind, Open, Which};
use super::serve::cut;
use crate::config::DeviceTier;
use crate::devices::{Note, Removed};
use crate::mail::Ask;
use kvar_base::BlockId;
use kvar_wire::{Finished, FlushAnswer, PurgeAnswer, RemoveAnswer};

impl Conversation {
    pub(super) fn on_finish(
        &mut self,
        desk: &mut Desk,
        request: u64,
        which: Which,
        left_us: u64,
        ids: &[BlockId],
    ) {
        let finished = match () {
            () if left_us == 0 => Some(Finished::Deadline),
            () if self.is_full(desk, 1) => Some(Finished::Overloaded),
            () if which == Which::Remove && ids.is_empty() => Some(Finished::Done(0)),
            () => None,
        };
        if let Some(finished) = finished {
            return self.send_finished(desk, request, which, finished);
        }
        let routes = desk.routes.clone();
        let asks_of = |tiers: &[DeviceTier]| -> Vec<To> {
            let is_meant = |part: &usize| tiers.contains(&routes.tier_of_part(*part));
            let engines = || (0..routes.engines().len()).filter(is_meant);
            let each = |ask: &dyn Fn() -> Ask| -> Vec<(usize, Ask)> {
                engines().map(|at| (at, ask())).collect()
            };
            let asks: Vec<(usize, Ask)> = match which {
                Which::Remove => removals(ids, &routes, &is_meant),
                Which::Flush => each(&|| Ask::Flush),
                Which::Purge => each(&|| Ask::Purge(Some(self.tenant))),
            };
            let asks = asks.into_iter();
            asks.map(|(at, ask)| To::Engine(routes.engines()[at], ask))
                .collect()
        };
        // What is on its way down must not outlive its removal: see docs/internals/tiers.md.
        let (fast, big) = (asks_of(&[DeviceTier::Fast]), asks_of(&[DeviceTier::Big]));
        let in_turn = which != Which::Flush && !fast.is_empty() && !big.is_empty();
        let (mut asks, mut then) = match in_turn {
            // Blocks of a device that leaves may move from the one tier to the other, either way.
            true if routes.note_removals => (fast, asks_of(&DeviceTier::ALL)),
            true => (fast, big),
            false => (asks_of(&DeviceTier::ALL), Vec::new()),
        };
        if asks.is_empty() {
            asks.push(To::Nobody(Ask::Flush));
        }
        // What goes while a device is away must not come back with it, nor by a move.
        let is_noted = routes.note_removals && which != Which::Flush;
        let removal = is_noted.then(|| match which {
            Which::Remove => Removed::blocks(ids),
            Which::Flush | Which::Purge => Removed::All(self.tenant),
        });
        let removal = removal.map(|removed| desk.begin_removal(removed));
        if is_noted {
            let last = if in_turn { &mut then } else { &mut asks };
            last.push(To::Keeper(Note::Removal));
        }
        let left = asks.len() as u32;
        let kind = Kind::Finish(Finish {
            which,
            left,
            then,
            count: 0,
            failure: None,
            routes,
            removal,
        });
        if let Some(operation) = self.open(desk, request, Some(left_us), kind) {
            for to in asks {
                desk.ask(to, operation);
            }
        }
    }

    pub(super) fn on_done(&mut self, desk: &mut Desk, request: u64, result: Result<u64, String>) {
        let Some(Open {
            kind: Kind::Finish(finish),
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        match result {
            Ok(count) => finish.count += count,
            Err(failure) => finish.failure = Some(failure),
        }
        finish.left -= 1;
        if finish.left > 0 {
            return;
        }
        let then = std::mem::take(&mut finish.then);
        if !then.is_empty() && finish.failure.is_none() {
            finish.left = then.len() as u32;
            return self.ask_all(desk, request, then);
        }
        let which = finish.which;
        drop(finish.removal.take());
        let finished = match finish.failure.take() {
            // A device that came in meanwhile was not asked.
            None if which != Which::Flush && !finish.routes.is_latest() => {
                Finished::Failed("the node's devices changed meanwhile; try again".to_owned())
            }
            None => Finished::Done(finish.count),
            Some(text) => Finished::Failed(cut(text, kvar_wire::TEXT_BYTES_MAX)),
        };
        self.close(desk, request);
        self.send_finished(desk, request, which, finished);
    }

    /// Goes on with a request.
    fn ask_all(&mut self, desk: &mut Desk, request: u64, asks: Vec<To>) {
        let Some(open) = self.open.get(&request) else {
            return;
        };
        let operation = Operation {
            link: self.key,
            request,
            opening: open.opening,
            part: 0,
        };
        for to in asks {
            desk.ask(to, operation);
        }
    }

    pub(super) fn send_finished(
        &mut self,
        desk: &mut Desk,
        request: u64,
        which: Which,
        finished: Finished,
    ) {
        match which {
            Which::Remove => self.send(desk, request, &RemoveAnswer { finished }),
            Which::Flush => self.send(desk, request, &FlushAnswer { finished }),
            Which::Purge => self.send(desk, request, &PurgeAnswer { finished }),
        }
    }
}
