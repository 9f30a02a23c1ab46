//! What the parts of a call without payload add up to, in the caller's terms.

use crate::call::{Ask, Lost, Reply};
use crate::config::ClientError;
use crate::items::{Answer, Lease, Leased, Lookup};
use kvar_base::{BlockId, LeaseToken, MissReason};
use kvar_wire::{Finished, IDS_MAX, LookupAnswer, Message};
use std::time::{Duration, Instant};

/// Whether the node may have granted a lease of which this side knows nothing: the answer did not
/// come, or the node's own deadline cut it short.
pub(crate) fn is_unsettled(reply: &Option<Reply>) -> bool {
    match reply {
        Some(Reply::Lost(_)) => true,
        Some(Reply::Message(Message::LeaseAnswer(answer))) => {
            answer.reason == Some(MissReason::Deadline)
        }
        _ => false,
    }
}

/// `sent`: when the call's first word left.
pub(crate) fn small_answer(
    ask: &Ask,
    replies: Vec<Option<Reply>>,
    why: &str,
    sent: Instant,
) -> Answer {
    let replies = replies
        .into_iter()
        .map(|reply| reply.unwrap_or(Reply::Lost(Lost::Unreachable)));
    match ask {
        Ask::Lookup { ids, .. } => Answer::Lookup(leading(ids, replies)),
        Ask::Lease { ids, token, .. } => {
            Answer::Leased(leased(ids, *token, replies.collect(), sent))
        }
        Ask::Renew { .. } => Answer::Renewed(match { replies }.next() {
            Some(Reply::Message(Message::RenewAnswer(answer))) => {
                Ok(lasting(answer.lasts_ms).map(|lasts| sent + lasts))
            }
            Some(Reply::Lost(lost)) => Err(lost.error(why)),
            _ => Err(Lost::Unreachable.error(why)),
        }),
        Ask::Release { .. } => Answer::Released(match { replies }.next() {
            Some(Reply::Message(Message::ReleaseAnswer(answer))) => Ok(answer.released),
            Some(Reply::Lost(lost)) => Err(lost.error(why)),
            _ => Err(Lost::Unreachable.error(why)),
        }),
        Ask::Present { ids } => {
            let mut present = Vec::with_capacity(ids.len());
            for (part, reply) in ids.chunks(IDS_MAX).zip(replies) {
                match reply {
                    Reply::Message(Message::LookupAnswer(LookupAnswer::Each(bitmap))) => {
                        present.extend(bitmap.bits(part.len()));
                    }
                    _ => present.resize(present.len() + part.len(), false),
                }
            }
            Answer::Present(present)
        }
        Ask::Remove { .. } | Ask::Flush | Ask::Purge => {
            let each = replies.map(|reply| match reply {
                Reply::Message(
                    Message::RemoveAnswer(kvar_wire::RemoveAnswer { finished })
                    | Message::FlushAnswer(kvar_wire::FlushAnswer { finished })
                    | Message::PurgeAnswer(kvar_wire::PurgeAnswer { finished }),
                ) => finished_result(finished),
                Reply::Message(_) => Err(Lost::Unreachable.error(why)),
                Reply::Lost(lost) => Err(lost.error(why)),
                Reply::NotAsked => Ok(0),
            });
            Answer::Finished(each.sum())
        }
        Ask::Stat { .. } => Answer::Stat(match { replies }.next() {
            Some(Reply::Message(Message::StatAnswer(answer))) => answer.stat,
            Some(Reply::Lost(lost)) => Err(lost.miss()),
            _ => Err(MissReason::Unreachable),
        }),
        Ask::Status => Answer::Status(match { replies }.next() {
            Some(Reply::Message(Message::StatusAnswer(answer))) => Ok(answer.json),
            Some(Reply::Lost(lost)) => Err(lost.error(why)),
            _ => Err(Lost::Unreachable.error(why)),
        }),
    }
}

fn finished_result(finished: Finished) -> Result<u64, ClientError> {
    match finished {
        Finished::Done(count) => Ok(count),
        Finished::Deadline => Err(ClientError::Deadline),
        Finished::Overloaded => Err(ClientError::Busy(
            "the node has too much to do; try again later".to_owned(),
        )),
        Finished::Failed(why) => Err(ClientError::Failed(why)),
    }
}

fn lasting(lasts_ms: u32) -> Option<Duration> {
    (lasts_ms > 0).then(|| Duration::from_millis(lasts_ms.into()))
}

/// A chain is promised as far as each part is there whole, and for as long as the shortest promise.
/// Both sides' clocks run from before the answer: `sent` is before anything the node counts from.
fn leased(ids: &[BlockId], token: LeaseToken, replies: Vec<Reply>, sent: Instant) -> Leased {
    let mut lasts: Option<Duration> = None;
    let mut as_lookups = Vec::with_capacity(replies.len());
    for reply in replies {
        as_lookups.push(match reply {
            Reply::Message(Message::LeaseAnswer(answer)) => {
                if let Some(this) = lasting(answer.lasts_ms) {
                    lasts = Some(lasts.map_or(this, |other| other.min(this)));
                }
                let leading = LookupAnswer::Leading(answer.leading, answer.reason);
                Reply::Message(Message::LookupAnswer(leading))
            }
            other => other,
        });
    }
    let Lookup { leading, reason } = leading(ids, as_lookups.into_iter());
    Leased {
        leading,
        reason,
        lease: lasts.map(|lasts| Lease {
            token,
            until: sent + lasts,
        }),
    }
}

/// The chain is there as far as each part is there whole.
fn leading(ids: &[BlockId], replies: impl Iterator<Item = Reply>) -> Lookup {
    let mut leading = 0;
    for (part, reply) in ids.chunks(IDS_MAX).zip(replies) {
        let reason = match reply {
            Reply::Message(Message::LookupAnswer(LookupAnswer::Leading(count, reason))) => {
                let count = (count as usize).min(part.len());
                leading += count;
                if count == part.len() {
                    continue;
                }
                reason.unwrap_or(MissReason::Absent)
            }
            Reply::Message(Message::LookupAnswer(LookupAnswer::Miss(reason))) => reason,
            Reply::Lost(lost) => lost.miss(),
            Reply::Message(_) => MissReason::Unreachable,
            Reply::NotAsked => MissReason::Absent,
        };
        return Lookup {
            leading,
            reason: Some(reason),
        };
    }
    Lookup {
        leading,
        reason: None,
    }
}
