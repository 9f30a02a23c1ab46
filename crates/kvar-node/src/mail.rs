//! How shards talk to each other: asks and answers in mailboxes, memory by passing ownership.
//!
//! ```text
//!   shard A (has the link)                      shard B (owns the block)
//!     operation 17 = item 3 of request 9
//!     Ask { from A/17, Get(..) }  ───────────>  engine.get(..) ... Event::Get
//!     <───────────  Answer { 17, Copy }         the bytes are not copied: A sends from B's memory
//! ```
//!
//! What must always be true: every ask that [`Ask::wants_answer`] gets exactly one answer, even if
//! the link it came from is gone; a [`PutTicket`] that was handed out comes back as a commit or an
//! abort. Mailboxes have no bound of their own: what is in them is bounded by the open requests
//! that links are allowed (`link_requests` x `connections_max`), and a bound that blocks would let
//! two shards wait for each other.

use crate::report::ShardReport;
use crossbeam_channel::{Receiver, Sender};
use kvar_base::{BlockId, MissReason, PutOutcome};
use kvar_engine::{BlockStat, Copy, GetRequest, PutRequest, PutTicket};
use kvar_transport::TcpStream;
use mio::Waker;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whom an answer goes to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    pub(crate) shard: u32,
    pub(crate) operation: u64,
}

/// What one shard asks of the owner of a block.
pub(crate) enum Ask {
    Lookup {
        ids: Vec<BlockId>,
        touch_request: u64,
    },
    Get(GetRequest),
    PutBegin(PutRequest),
    PutCommit(PutTicket),
    PutAbort(PutTicket),
    Remove(Vec<BlockId>),
    Flush,
    Purge,
    Stat(BlockId),
    Report,
}

impl Ask {
    /// Whether an answer comes.
    pub(crate) fn wants_answer(&self) -> bool {
        !matches!(self, Self::PutAbort(_))
    }
}

/// What comes back.
pub(crate) enum Answer {
    Lookup(Vec<bool>),
    Get(Result<Copy, MissReason>),
    PutBegun(Result<PutTicket, PutOutcome>),
    Put(PutOutcome),
    Done(Result<u64, String>),
    Stat(Option<BlockStat>),
    Report(Box<ShardReport>),
}

/// Takes a shard's report, on that shard's thread: must be quick.
pub(crate) type ReportTaker = Box<dyn FnOnce(ShardReport) + Send>;

/// What lies in a mailbox.
pub(crate) enum Mail {
    /// Work for the shard's engine.
    Ask(Origin, Ask),
    /// The answer to one of the shard's operations.
    Answer(u64, Answer),
    /// A connection to serve.
    Link(TcpStream, SocketAddr),
    /// Tell how you are.
    Report(ReportTaker),
    /// Stop: close links, then write what is in memory only.
    Stop,
    /// The shard of this number has closed its links and commits nothing more.
    LinksClosed,
}

/// The mailboxes of all shards; clones share them.
#[derive(Clone)]
pub(crate) struct Post(Arc<[Slot]>);

struct Slot {
    sender: Sender<Mail>,
    waker: Waker,
    /// Set by the shard just before it sleeps, so that a busy one is not woken for nothing.
    asleep: Arc<AtomicBool>,
}

/// One shard's end.
pub(crate) struct Mailbox {
    receiver: Receiver<Mail>,
    asleep: Arc<AtomicBool>,
}

impl Post {
    /// One mailbox a waker.
    pub(crate) fn new(wakers: Vec<Waker>) -> (Self, Vec<Mailbox>) {
        let (slots, boxes): (Vec<_>, Vec<_>) = wakers
            .into_iter()
            .map(|waker| {
                let (sender, receiver) = crossbeam_channel::unbounded();
                let asleep = Arc::new(AtomicBool::new(false));
                let mailbox = Mailbox {
                    receiver,
                    asleep: asleep.clone(),
                };
                (
                    Slot {
                        sender,
                        waker,
                        asleep,
                    },
                    mailbox,
                )
            })
            .unzip();
        (Self(slots.into()), boxes)
    }

    /// How many shards there are.
    pub(crate) fn shards(&self) -> u32 {
        self.0.len() as u32
    }

    /// Puts mail into a shard's box and wakes it if it sleeps. A shard that has ended drops it.
    pub(crate) fn send(&self, shard: u32, mail: Mail) {
        let slot = &self.0[shard as usize];
        if slot.sender.send(mail).is_ok() && slot.asleep.swap(false, Ordering::SeqCst) {
            // A waker fails only when its poll is gone, and then nobody sleeps.
            let _ = slot.waker.wake();
        }
    }

    /// Tells every shard to stop.
    pub(crate) fn stop_all(&self) {
        (0..self.shards()).for_each(|shard| self.send(shard, Mail::Stop));
    }
}

impl Mailbox {
    /// The next piece of mail, if there is one.
    pub(crate) fn take(&self) -> Option<Mail> {
        self.receiver.try_recv().ok()
    }

    /// Announces that the shard is about to sleep; false when mail has come meanwhile.
    pub(crate) fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        if self.receiver.is_empty() {
            return true;
        }
        self.asleep.store(false, Ordering::SeqCst);
        false
    }

    /// The shard is up again.
    pub(crate) fn awake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mio::{Events, Poll, Token};
    use std::time::Duration;

    #[test]
    fn a_sleeper_is_woken_and_never_misses_mail() {
        let mut poll = Poll::new().unwrap();
        let waker = Waker::new(poll.registry(), Token(0)).unwrap();
        let (post, mut boxes) = Post::new(vec![waker]);
        let mailbox = boxes.pop().unwrap();
        const COUNT: usize = 10_000;
        // Kept: a waker that is dropped takes its last call with it.
        let posting = post.clone();
        let sender = std::thread::spawn(move || {
            for _ in 0..COUNT {
                posting.send(0, Mail::LinksClosed);
            }
        });
        let mut events = Events::with_capacity(4);
        let mut got = 0;
        while got < COUNT {
            while mailbox.take().is_some() {
                got += 1;
            }
            if got < COUNT && mailbox.may_sleep() {
                poll.poll(&mut events, Some(Duration::from_secs(20)))
                    .unwrap();
                assert!(!events.is_empty(), "slept through mail after {got}");
                mailbox.awake();
            }
        }
        sender.join().unwrap();
    }
}
