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
//! A lease belongs to its token, not to the link: it stands when the link is gone, and another one
//! may renew or release it. Every engine knows its own part of it; a renewal or release goes to all.

use super::conversation::Conversation;
use super::desk::{Desk, Operation, To};
use super::request::{AboutLease, Kind, Lease, Open};
use super::serve::{split, touch_request};
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
        let several = parts.len() > 1;
        let kind = Kind::Lease(Lease {
            token: lease.token,
            left: parts.len() as u32,
            granted: vec![false; lease.ids.len()],
            ids: if several { lease.ids } else { Vec::new() },
            routes: routes.clone(),
            refused: None,
            until: None,
            positions,
        });
        let Some(operation) = self.open(desk, request, Some(lease.deadline_us), kind) else {
            return;
        };
        for (part, ids) in parts {
            let ask = Ask::Lease(Box::new(LeaseAsk {
                ids,
                token: lease.token,
                client: lease.client,
                ttl: ttl(lease.ttl_ms),
                touch_request,
                first_depth: lease.first_depth,
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
        grant: LeaseGrant,
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
            if let Some(granted) = position(at).and_then(|at| lease.granted.get_mut(at)) {
                *granted = true;
            }
        }
        if let (Some(reason), Some(at)) = (grant.reason, position(grant.leading as usize)) {
            let refused = (at, reason);
            let first = lease.refused.is_none_or(|(first, _)| at < first);
            lease.refused = if first { Some(refused) } else { lease.refused };
        }
        if grant.leading > 0 {
            lease.until = Some(lease.until.map_or(grant.until, |it| it.min(grant.until)));
        }
        lease.left -= 1;
        if lease.left > 0 {
            return;
        }
        let leading = lease.granted.iter().take_while(|granted| **granted).count();
        let all = leading == lease.granted.len();
        let (token, surplus) = (lease.token, surplus(lease, leading));
        let answer = LeaseAnswer {
            leading: leading as u32,
            reason: (!all).then(|| {
                lease
                    .refused
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
    for id in behind.filter_map(|(id, granted)| granted.then_some(*id)) {
        let Some(engine) = lease.routes.owner(&id) else {
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
