//! What each request makes a link do, and each answer: the table of both, and what all of them share.
//!
//! | request | file |
//! |---|---|
//! | lookup | `lookup` |
//! | lease, renew, release | `lease` |
//! | get | `get` |
//! | put, payload | `put` |
//! | remove, flush, purge | `finish` |
//! | stat, status | `stat` |
//! | attach | `attach` |
//! | stage | `staging` |

use super::conversation::{Conversation, abort};
use super::desk::{Desk, LINK_TIMER, Operation};
use super::request::{AboutLease, Kind, Which};
use crate::mail::Answer;
use kvar_base::MissReason;
use kvar_engine::Tenant;
use kvar_transport::Link as _;
use kvar_wire::{Finished, LeaseAnswer, LookupAnswer, Message, Pong, StatAnswer};

impl Conversation {
    /// Takes a request of a client that has proved itself.
    pub(super) fn on_request(
        &mut self,
        desk: &mut Desk,
        request: u64,
        message: Message,
        payload_bytes: usize,
    ) {
        let begins = matches!(
            message,
            Message::Lookup(_)
                | Message::Get(_)
                | Message::Put(_)
                | Message::Announce(_)
                | Message::Remove(_)
                | Message::Flush(_)
                | Message::Purge(_)
                | Message::Stat(_)
                | Message::Status(_)
                | Message::Lease(_)
                | Message::Renew(_)
                | Message::Release(_)
                | Message::Stage(_)
        );
        if begins && (request == LINK_TIMER || self.open.contains_key(&request)) {
            let text = format!(
                "request number {request} is the link's own or open already; numbers are unique \
                 while open"
            );
            return self.protocol(desk, &text);
        }
        match message {
            Message::Lookup(lookup) => self.on_lookup(desk, request, &lookup),
            Message::Get(get) => self.on_get(desk, request, get),
            Message::Put(put) => self.on_put(desk, request, &put, payload_bytes),
            Message::Payload(_) => self.on_payload(desk, request, payload_bytes),
            Message::Announce(announce) => self.on_announce(desk, request, &announce),
            Message::Sections(sections) => {
                self.on_sections(desk, request, &sections, payload_bytes);
            }
            Message::Commit(_) => self.on_commit(desk, request),
            Message::Remove(remove) => {
                desk.counters.removes += 1;
                self.on_finish(
                    desk,
                    request,
                    Which::Remove,
                    remove.deadline_us,
                    &remove.ids,
                );
            }
            Message::Flush(flush) => {
                desk.counters.flushes += 1;
                self.on_finish(desk, request, Which::Flush, flush.deadline_us, &[]);
            }
            Message::Purge(purge) => {
                desk.counters.purges += 1;
                self.on_finish(desk, request, Which::Purge, purge.deadline_us, &[]);
            }
            Message::Lease(lease) => self.on_lease(desk, request, lease),
            Message::Renew(renew) => {
                let kvar_wire::Renew {
                    token,
                    ttl_ms,
                    deadline_us,
                } = renew;
                let about = AboutLease::Renew { token, ttl_ms };
                self.on_about_lease(desk, request, about, deadline_us);
            }
            Message::Release(release) => {
                let token = release.token;
                let about = AboutLease::Release { token };
                self.on_about_lease(desk, request, about, release.deadline_us);
            }
            Message::Stat(stat) => self.on_stat(desk, request, stat),
            Message::Status(_) => self.on_status(desk, request),
            Message::Cancel(_) => {
                desk.counters.cancels += 1;
                self.cut_short(desk, request, false);
            }
            Message::Ping(_) => self.send(desk, request, &Pong {}),
            Message::Attach(attach) => self.on_attach(desk, request, &attach),
            Message::Stage(stage) => self.on_stage(desk, request, &stage),
            Message::Failure(failure) => {
                tracing::warn!(peer = %self.peer, "the client ends its link: {}", failure.text);
                self.end_requests(desk);
                self.link.close();
            }
            other => {
                let text = format!("a node takes no {:?} from a client", other.kind());
                self.protocol(desk, &text);
            }
        }
    }

    /// Whether so many requests more are too many for one link.
    pub(super) fn is_full(&self, desk: &Desk, more: usize) -> bool {
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        self.open_weight.saturating_add(more) > desk.settings.limits.requests_max
    }

    /// Takes an owner's answer to an operation of this link.
    pub(super) fn on_answer(&mut self, desk: &mut Desk, operation: Operation, answer: Answer) {
        let Operation {
            request,
            opening,
            part,
            ..
        } = operation;
        if self
            .open
            .get(&request)
            .is_none_or(|open| open.opening != opening)
        {
            return orphan(desk, answer);
        }
        match answer {
            Answer::Lookup(found) => self.on_looked_up(desk, request, part, found),
            Answer::Leased(grant) => self.on_leased(desk, request, part, &grant),
            Answer::AboutLease(until) => self.on_about_leased(desk, request, until),
            Answer::Get(outcome) => self.on_got(desk, request, part, outcome),
            Answer::Awaited => self.on_awaited(request, part),
            Answer::PutBegun(begun) => self.on_put_begun(desk, request, begun),
            Answer::Put(outcome) => self.answer_put(desk, request, outcome),
            Answer::Done(result) => self.on_done(desk, request, result),
            Answer::Stat(stat) => self.on_stat_answer(desk, operation, stat),
            Answer::Taken(_) => debug_assert!(false, "no link offers a block"),
            Answer::Report(report) => self.on_report(desk, request, *report),
        }
    }

    /// Says that a request's deadline has passed, for those that answer once.
    pub(super) fn answer_deadline(&mut self, desk: &mut Desk, request: u64, kind: &Kind) {
        match kind {
            Kind::Lookup(_) => {
                self.send(desk, request, &LookupAnswer::Miss(MissReason::Deadline));
            }
            Kind::Finish(finish) => {
                self.send_finished(desk, request, finish.which, Finished::Deadline);
            }
            Kind::Lease(_) => {
                let answer = LeaseAnswer {
                    leading: 0,
                    reason: Some(MissReason::Deadline),
                    lasts_ms: 0,
                };
                self.send(desk, request, &answer);
            }
            Kind::AboutLease { about, .. } => self.send_about_lease(desk, request, *about, None),
            Kind::Stat(_) => {
                self.send(
                    desk,
                    request,
                    &StatAnswer {
                        stat: Err(MissReason::Deadline),
                    },
                );
            }
            Kind::Status { .. } | Kind::Get(_) | Kind::Put(_) => {}
        }
    }
}

/// An answer that nobody waits for any more; a ticket in it goes back to its owner.
pub(super) fn orphan(desk: &mut Desk, answer: Answer) {
    if let Answer::PutBegun(Ok(ticket)) = answer {
        abort(desk, Some(ticket));
    }
}

/// Zero means that the client leaves recency to the node: every call is a prompt of its own, under a
/// number that no client of ours chooses.
pub(super) fn touch_request(desk: &Desk, tenant: Tenant, given: u64) -> u64 {
    if given == 0 {
        1 << 63 | desk.now.0
    } else {
        // What one namespace calls a request is not what another calls so.
        given ^ u64::from(tenant.number()) << 56
    }
}

/// A text of at most so many bytes.
pub(super) fn cut(mut text: String, bytes_max: usize) -> String {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
