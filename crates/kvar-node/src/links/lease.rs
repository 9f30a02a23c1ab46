//! Leases on a link: a lookup that is asked of every engine concerned and promises what all of
//! them promise, and the two calls about a lease that stands.
//!
//! ```text
//!   chain      A B A A B C          A, B, C: engines
//!   A grants   1   1 0              its own blocks, in their order
//!   B grants     1     1
//!   answer     1 1 1 - - -          three are promised; B gets back what it granted beyond them
//! ```
//!
//! With two tiers the fast engines go over gaps, and what they lack is asked of the big ones before that is
//! reckoned.
//!
//! A lease belongs to its token, not to the link: it stands when the link is gone, and another one
//! may renew or release it. Every engine knows its own part of it; a renewal or release goes to all.

use super::conversation::{Conversation, may_be_below};
use super::desk::{Desk, Operation, To};
use super::parts::{placed, split, split_below};
use super::request::{AboutLease, Kind, Lease, LeaseBelow, Open};
use super::serve::touch_request;
use crate::mail::{Ask, EngineKey, LeaseAsk};
use kvar_base::{BlockId, MissReason, Moment};
use kvar_engine::{LEASE_DEFAULT, LeaseGrant};
use kvar_wire::{LeaseAnswer, ReleaseAnswer, RenewAnswer};
use std::time::Duration;

impl Conversation {
    pub(super) fn on_lease(&mut self, desk: &mut Desk, request: u64, lease: kvar_wire::Lease) {
        desk.counters.lookups += 1;
        desk.counters.lookup_ids += lease.ids.len() as u64;
        let reason = match () {
            () if lease.deadline_us == 0 => Some(MissReason::Deadline),
            () if self.is_full(desk, 1) => Some(MissReason::Overloaded),
            () => None,
        };
        if reason.is_some() || lease.ids.is_empty() {
            let (leading, lasts_ms) = (0, 0);
            let answer = LeaseAnswer {
                leading,
                reason,
                lasts_ms,
            };
            return self.send(desk, request, &answer);
        }
        let touch_request = touch_request(desk, self.tenant, lease.touch_request);
        let routes = desk.routes.clone();
        let (parts, positions) = split(&lease.ids, &routes);
        if parts.is_empty() {
            let answer = LeaseAnswer {
                leading: 0,
                reason: Some(MissReason::Absent),
                lasts_ms: 0,
            };
            return self.send(desk, request, &answer);
        }
        let over_gaps = routes.has_lower();
        let parts = placed(parts, lease.first_depth, lease.ids.len(), &positions);
        let several = parts.len() > 1 || over_gaps;
        let below = over_gaps.then(|| LeaseBelow {
            client: lease.client,
            ttl: ttl(lease.ttl_ms),
            touch_request,
            first_depth: lease.first_depth,
        });
        let kind = Kind::Lease(Lease {
            token: lease.token,
            left: parts.len() as u32,
            granted: vec![None; lease.ids.len()],
            below,
            ids: if several { lease.ids } else { Vec::new() },
            routes: routes.clone(),
            refused: None,
            until: None,
            positions,
        });
        let Some(operation) = self.open(desk, request, Some(lease.deadline_us), kind) else {
            return;
        };
        for (part, ids, places) in parts {
            let ask = Ask::Lease(Box::new(LeaseAsk {
                ids,
                token: lease.token,
                client: lease.client,
                ttl: ttl(lease.ttl_ms),
                touch_request,
                places,
                over_gaps,
            }));
            let to = match routes.engines().get(part as usize) {
                Some(engine) => To::Engine(*engine, ask),
                None => To::Nobody(ask),
            };
            desk.ask(to, Operation { part, ..operation });
        }
    }

    pub(super) fn on_leased(
        &mut self,
        desk: &mut Desk,
        request: u64,
        part: u32,
        grant: &LeaseGrant,
    ) {
        let Some(Open {
            kind: Kind::Lease(lease),
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        let positions = lease.positions.get(part as usize);
        let position = |at: usize| positions.map_or(Some(at), |all| Some(*all.get(at)? as usize));
        for at in 0..grant.leading as usize {
            // Few, if any.
            let is_gap = grant.gaps.binary_search(&(at as u32)).is_ok();
            if let Some(granted) = position(at).and_then(|at| lease.granted.get_mut(at)) {
                *granted = (!is_gap).then_some(part);
            }
        }
        if let (Some(reason), Some(at)) = (grant.reason, position(grant.leading as usize)) {
            let refused = (at, reason);
            let first = lease.refused.is_none_or(|(first, _)| at < first);
            lease.refused = if first { Some(refused) } else { lease.refused };
        }
        if grant.leading as usize > grant.gaps.len() {
            lease.until = Some(lease.until.map_or(grant.until, |it| it.min(grant.until)));
        }
        lease.left -= 1;
        if lease.left > 0 || self.lease_below(desk, request) {
            return;
        }
        let Some(Open {
            kind: Kind::Lease(lease),
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        let leading = lease.granted.iter().take_while(|it| it.is_some()).count();
        let all = leading == lease.granted.len();
        let (token, surplus) = (lease.token, surplus(lease, leading));
        let answer = LeaseAnswer {
            leading: leading as u32,
            reason: (!all).then(|| {
                lease
                    .refused
                    .filter(|(at, _)| *at == leading)
                    .map_or(MissReason::Absent, |(_, reason)| reason)
            }),
            lasts_ms: match lease.until {
                Some(until) if leading > 0 => lasting(desk.now, until),
                _ => 0,
            },
        };
        self.close(desk, request);
        self.send(desk, request, &answer);
        for (engine, ids) in surplus {
            desk.tell(engine, Ask::ReleaseSome(token, ids));
        }
    }

    /// Asks the tier below for what the one above lacks; whether there is anything to ask.
    fn lease_below(&mut self, desk: &mut Desk, request: u64) -> bool {
        let link = self.key;
        let Some(Open {
            opening,
            kind: Kind::Lease(lease),
            ..
        }) = self.open.get_mut(&request)
        else {
            return false;
        };
        let Some(below) = lease.below.take() else {
            return false;
        };
        // What is refused for another reason than that it is not there ends the promise: nothing behind
        // it is of use.
        let end = lease.refused.map_or(lease.ids.len(), |(at, reason)| {
            if may_be_below(reason) {
                lease.ids.len()
            } else {
                at
            }
        });
        let lacking = (0..).zip(&lease.ids).zip(&lease.granted).take(end);
        let lacking = lacking.filter(|(_, granted)| granted.is_none());
        let lacking = lacking.map(|(id, _)| id);
        let parts = split_below(lacking, &lease.routes, &mut lease.positions);
        let asked = lease.granted.len();
        let parts = placed(parts, below.first_depth, asked, &lease.positions);
        lease.left = parts.len() as u32;
        let (opening, token, routes) = (*opening, lease.token, lease.routes.clone());
        let asks_any = !parts.is_empty();
        for (part, ids, places) in parts {
            let ask = Ask::Lease(Box::new(LeaseAsk {
                ids,
                token,
                client: below.client,
                ttl: below.ttl,
                touch_request: below.touch_request,
                places,
                over_gaps: false,
            }));
            let operation = Operation {
                link,
                request,
                opening,
                part,
            };
            desk.ask(To::Engine(routes.engines()[part as usize], ask), operation);
        }
        asks_any
    }

    /// A renewal, or without a time a release.
    pub(super) fn on_about_lease(
        &mut self,
        desk: &mut Desk,
        request: u64,
        about: AboutLease,
        left_us: u64,
    ) {
        let routes = desk.routes.clone();
        if left_us == 0 || self.is_full(desk, 1) || routes.engines().is_empty() {
            return self.send_about_lease(desk, request, about, None);
        }
        let kind = Kind::AboutLease {
            about,
            left: routes.engines().len() as u32,
            until: None,
        };
        if let Some(operation) = self.open(desk, request, Some(left_us), kind) {
            for engine in routes.engines() {
                let ask = match about {
                    AboutLease::Renew { token, ttl_ms } => Ask::Renew(token, ttl(ttl_ms)),
                    AboutLease::Release { token } => Ask::Release(token),
                };
                desk.ask(To::Engine(*engine, ask), operation);
            }
        }
    }

    /// An engine's answer: until when its part of the lease lasts, or did until now.
    pub(super) fn on_about_leased(
        &mut self,
        desk: &mut Desk,
        request: u64,
        answer: Option<Moment>,
    ) {
        let Some(Open {
            kind: Kind::AboutLease { about, left, until },
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        *until = match (*until, answer) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        *left -= 1;
        if *left == 0 {
            let (about, until) = (*about, *until);
            self.close(desk, request);
            self.send_about_lease(desk, request, about, until);
        }
    }

    pub(super) fn send_about_lease(
        &mut self,
        desk: &mut Desk,
        request: u64,
        about: AboutLease,
        until: Option<Moment>,
    ) {
        match about {
            AboutLease::Renew { .. } => {
                let lasts_ms = until.map_or(0, |until| lasting(desk.now, until));
                self.send(desk, request, &RenewAnswer { lasts_ms });
            }
            AboutLease::Release { .. } => {
                let released = until.is_some();
                self.send(desk, request, &ReleaseAnswer { released });
            }
        }
    }
}

/// What engines granted behind the first gap: nobody can use it, and it would stand in the budgets
/// until the lease ends.
fn surplus(lease: &Lease, leading: usize) -> Vec<(EngineKey, Vec<BlockId>)> {
    let mut by_engine: Vec<(EngineKey, Vec<BlockId>)> = Vec::new();
    let behind = lease.ids.iter().zip(&lease.granted).skip(leading);
    for (id, part) in behind.filter_map(|(id, granted)| Some((*id, (*granted)?))) {
        let Some(engine) = lease.routes.engines().get(part as usize).copied() else {
            continue;
        };
        match by_engine.iter_mut().find(|(key, _)| *key == engine) {
            Some((_, ids)) => ids.push(id),
            None => by_engine.push((engine, vec![id])),
        }
    }
    by_engine
}

/// What a client asks for; nothing said is the default.
fn ttl(ttl_ms: u32) -> Duration {
    if ttl_ms == 0 {
        LEASE_DEFAULT
    } else {
        Duration::from_millis(ttl_ms.into())
    }
}

/// Milliseconds from now on, rounded down: a promise ends sooner rather than later for the client.
fn lasting(now: Moment, until: Moment) -> u32 {
    u32::try_from(until.since(now).as_millis()).unwrap_or(u32::MAX)
}
