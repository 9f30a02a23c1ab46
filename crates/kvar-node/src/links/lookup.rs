//! Lookups on a link: which of these blocks are there?
//!
//! ```text
//!   every engine concerned is asked once ── all have answered ──> answer
//!   two tiers: the fast ones ── then the big ones, for what those lack ──> answer
//! ```
//!
//! What is absent: promises about what is there (see `lease`), which goes by the same rounds.

use super::conversation::Conversation;
use super::desk::{Desk, Operation, To};
use super::parts::{placed, split, split_below};
use super::request::{Below, Kind, Lookup, Open};
use super::serve::touch_request;
use crate::mail::Ask;
use kvar_base::MissReason;
use kvar_wire::{Bitmap, LookupAnswer};

impl Conversation {
    pub(super) fn on_lookup(&mut self, desk: &mut Desk, request: u64, lookup: &kvar_wire::Lookup) {
        desk.counters.lookups += 1;
        desk.counters.lookup_ids += lookup.ids.len() as u64;
        let miss = match () {
            () if lookup.deadline_us == 0 => Some(MissReason::Deadline),
            () if self.is_full(desk, 1) => Some(MissReason::Overloaded),
            () => None,
        };
        if let Some(reason) = miss {
            return self.send(desk, request, &LookupAnswer::Miss(reason));
        }
        let touch_request = touch_request(desk, self.tenant, lookup.touch_request);
        let (parts, positions) = split(&lookup.ids, &desk.routes);
        let parts = placed(parts, lookup.first_depth, lookup.ids.len(), &positions);
        let below = desk.routes.has_lower().then(|| Below {
            ids: lookup.ids.clone(),
            routes: desk.routes.clone(),
        });
        let kind = Kind::Lookup(Lookup {
            leading_only: lookup.leading_only,
            left: parts.len() as u32,
            present: vec![false; lookup.ids.len()],
            positions,
            touch_request,
            first_depth: lookup.first_depth,
            below,
        });
        if parts.is_empty() {
            let answer = leading_or_each(lookup.leading_only, &[]);
            return self.send(desk, request, &answer);
        }
        let Some(operation) = self.open(desk, request, Some(lookup.deadline_us), kind) else {
            return;
        };
        for (part, ids, places) in parts {
            let ask = Ask::Lookup {
                ids,
                places,
                touch_request,
            };
            let to = match desk.routes.engines().get(part as usize) {
                Some(engine) => To::Engine(*engine, ask),
                None => To::Nobody(ask),
            };
            desk.ask(to, Operation { part, ..operation });
        }
    }

    pub(super) fn on_looked_up(
        &mut self,
        desk: &mut Desk,
        request: u64,
        part: u32,
        found: Vec<bool>,
    ) {
        let Some(Open {
            kind: Kind::Lookup(lookup),
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        match lookup.positions.get(part as usize) {
            None => lookup.present = found,
            Some(positions) => {
                for (position, present) in positions.iter().zip(found) {
                    lookup.present[*position as usize] = present;
                }
            }
        }
        lookup.left -= 1;
        if lookup.left == 0 && !self.look_below(desk, request) {
            let Some(Open {
                kind: Kind::Lookup(lookup),
                ..
            }) = self.open.get(&request)
            else {
                return;
            };
            let answer = leading_or_each(lookup.leading_only, &lookup.present);
            self.note_observed(desk, &answer);
            self.close(desk, request);
            self.send(desk, request, &answer);
        }
    }

    /// Asks the tier below for what the one above lacks; whether there is anything to ask.
    fn look_below(&mut self, desk: &mut Desk, request: u64) -> bool {
        let link = self.key;
        let Some(Open {
            opening,
            kind: Kind::Lookup(lookup),
            ..
        }) = self.open.get_mut(&request)
        else {
            return false;
        };
        let Some(Below { ids, routes }) = lookup.below.take() else {
            return false;
        };
        let lacking = (0..).zip(&ids).zip(&lookup.present);
        let lacking = lacking.filter(|(_, present)| !**present).map(|(id, _)| id);
        let parts = split_below(lacking, &routes, &mut lookup.positions);
        lookup.left = parts.len() as u32;
        let (opening, touch_request) = (*opening, lookup.touch_request);
        let (first_depth, asked) = (lookup.first_depth, lookup.present.len());
        let parts = placed(parts, first_depth, asked, &lookup.positions);
        let asks_any = !parts.is_empty();
        for (part, ids, places) in parts {
            let operation = Operation {
                link,
                request,
                opening,
                part,
            };
            let ask = Ask::Lookup {
                ids,
                places,
                touch_request,
            };
            desk.ask(To::Engine(routes.engines()[part as usize], ask), operation);
        }
        asks_any
    }
}

fn leading_or_each(leading_only: bool, present: &[bool]) -> LookupAnswer {
    if !leading_only {
        return LookupAnswer::Each(Bitmap::of(present));
    }
    let leading = present.iter().take_while(|present| **present).count();
    let reason = (leading < present.len()).then_some(MissReason::Absent);
    LookupAnswer::Leading(leading as u32, reason)
}
