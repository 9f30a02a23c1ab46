//! How threads talk to each other: asks and answers in mailboxes, memory by passing ownership.
//!
//! ```text
//!   thread A (has the link)                     thread B (has the engine that owns the block)
//!     operation 17 = item 3 of request 9
//!     Ask { from A/17, engine, Get(..) }  ────>  engine.get(..) ... Event::Get
//!     <───────────  Answer { 17, Copy }          the bytes are not copied: A sends from B's memory
//! ```
//!
//! What must always be true: every ask that [`Ask::wants_answer`] gets exactly one answer, even if
//! the link it came from is gone or the engine it goes to; a [`Ticket`] that was handed out comes
//! back to the engine that gave it as a commit or an abort; what an engine offers to the tier below lies in
//! the mailbox there before any later answer of that engine lies in another. Mailboxes have no bound of their own:
//! what is in them is bounded by the open requests that links are allowed (`link_requests` x
//! `connections_max`) and what an engine may have on offer, and a bound that blocks would let two threads wait for each other.

use crate::devices::Routes;
use crate::loading::{LoadFailed, OpenShard};
use crate::report::ThreadReport;
use crossbeam_channel::{Receiver, Sender};
use kvar_base::wake;
use kvar_base::{BlockId, LeaseToken, MissReason, Moment, PutOutcome};
use kvar_engine::{
    BlockStat, Copy, Demoted, Demotion, GetRequest, LeaseGrant, Loaded, Places, PutRequest,
    PutTicket, ReadHints, Tenant,
};
use kvar_io::Bell;
use kvar_transport::TcpStream;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Names an engine (one shard of one device) for the life of the process, and the thread that
/// has it. Serials are never used again, so mail for an engine that is gone finds nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct EngineKey {
    pub(crate) thread: u32,
    pub(crate) serial: u32,
}

/// The thread number of the keeper of the devices, which asks engines as threads do.
pub(crate) const KEEPER: u32 = u32::MAX;

/// Whom an answer goes to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    pub(crate) thread: u32,
    pub(crate) operation: u64,
}

/// Room for a block, and the engine that gave it: routes may change before it comes back.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) engine: EngineKey,
    pub(crate) ticket: PutTicket,
}

/// What is asked of the owner of a block.
pub(crate) enum Ask {
    Lookup {
        ids: Vec<BlockId>,
        places: PlacesAsk,
        touch_request: u64,
    },
    Lease(Box<LeaseAsk>),
    Renew(LeaseToken, Duration),
    Release(LeaseToken),
    /// Some blocks of a lease are of no use to anybody.
    ReleaseSome(LeaseToken, Vec<BlockId>),
    /// The asker is a number of the asking thread's links.
    Get(GetRequest, ReadHints),
    /// Waits for a put of a block.
    Await(AwaitAsk),
    /// Whoever read or waited for a block has gone.
    Forget(ForgetAsk),
    PutBegin(PutRequest),
    PutCommit(PutTicket),
    PutAbort(PutTicket),
    Remove(Vec<BlockId>),
    Flush,
    /// Of one namespace, or of all.
    Purge(Option<Tenant>),
    Stat(BlockId),
    /// A block from the tier above, sent under these routes. Under newer ones it is not taken: who
    /// removed it under those asked only whom they name.
    Take(Box<Demotion>, Arc<Routes>),
}

/// Somebody waits for a put, until it ends or this moment.
pub(crate) struct AwaitAsk {
    pub(crate) id: BlockId,
    pub(crate) until: Moment,
    /// A number of the asking thread's links.
    pub(crate) link: u64,
}

/// What was asked of a block under this operation of the same thread is of no use any more.
pub(crate) struct ForgetAsk {
    pub(crate) id: BlockId,
    pub(crate) operation: u64,
    /// A number of the asking thread's links.
    pub(crate) link: u64,
}

/// Where the blocks of a part stand in their prompt, as in [`Places`].
pub(crate) struct PlacesAsk {
    pub(crate) first_depth: u32,
    /// Empty: in a row.
    pub(crate) each: Vec<u32>,
    /// Of the whole request, whoever has them.
    pub(crate) asked: u32,
}

impl PlacesAsk {
    pub(crate) fn places(&self) -> Places<'_> {
        Places {
            first_depth: self.first_depth,
            each: &self.each,
            asked: self.asked,
        }
    }
}

/// A lookup that wants what it finds to stay.
pub(crate) struct LeaseAsk {
    pub(crate) ids: Vec<BlockId>,
    pub(crate) token: LeaseToken,
    pub(crate) client: u64,
    pub(crate) ttl: Duration,
    pub(crate) touch_request: u64,
    pub(crate) places: PlacesAsk,
    /// Another tier may have what is not there.
    pub(crate) over_gaps: bool,
}

impl Ask {
    /// Whether an answer comes.
    pub(crate) fn wants_answer(&self) -> bool {
        use Ask::{Forget, PutAbort, ReleaseSome};
        !matches!(self, PutAbort(_) | ReleaseSome(..) | Forget(_))
    }
}

/// What comes back.
pub(crate) enum Answer {
    Lookup(Vec<bool>),
    Leased(LeaseGrant),
    /// Until when a lease lasts now, or did until it was released; `None`: there was none.
    AboutLease(Option<Moment>),
    Get(Result<Copy, MissReason>),
    /// A block that was waited for is there, or need not be waited for.
    Awaited,
    PutBegun(Result<Ticket, PutOutcome>),
    Put(PutOutcome),
    Done(Result<u64, String>),
    Stat(Result<BlockStat, MissReason>),
    Taken(Demoted),
    Report(Box<ThreadReport>),
}

/// Takes a thread's report, on that thread: must be quick.
pub(crate) type ReportTaker = Box<dyn FnOnce(ThreadReport) + Send>;

/// What lies in a mailbox.
pub(crate) enum Mail {
    /// Work for one of the thread's engines.
    Ask(Origin, EngineKey, Ask),
    /// The answer to one of the thread's operations.
    Answer(u64, Answer),
    /// A link of another thread asks how this one is.
    AskReport(Origin),
    /// A connection to serve.
    Link(TcpStream, SocketAddr),
    /// Tell how you are.
    Report(ReportTaker),
    /// The machine's clock was set: so many seconds since 1970 at the node clock's zero.
    ClockSet { unix_at_start_s: u64 },
    /// Modes were switched: clients are to hear of it.
    Modes,
    /// From now on blocks belong to these engines.
    Routes(Arc<Routes>),
    /// Take this shard of a device and load it.
    Open(Box<OpenShard>),
    /// It is loaded, or cannot be.
    Loaded(EngineKey, Result<Box<Loaded>, LoadFailed>),
    /// This engine takes nothing new from now on (its device leaves), or does again. What was committed
    /// before is in a flush that comes behind this.
    Seal(EngineKey, bool),
    /// This engine's device is out: answer everything that waits, and let the engine go. Whether its
    /// blocks are elsewhere: then none are lost with it.
    Close(EngineKey, bool),
    /// Stop: close links, then write what is in memory only.
    Stop,
    /// The thread of this number has closed its links and commits nothing more.
    LinksClosed,
}

/// The mailboxes of all threads; clones share them.
#[derive(Clone)]
pub(crate) struct Post(Arc<[Slot]>);

struct Slot {
    sender: Sender<Mail>,
    bell: Arc<Bell>,
    /// Set by the thread just before it sleeps, so that a busy one is not woken for nothing.
    asleep: Arc<AtomicBool>,
}

/// One thread's end.
pub(crate) struct Mailbox {
    receiver: Receiver<Mail>,
    asleep: Arc<AtomicBool>,
    bell: Arc<Bell>,
}

impl Post {
    /// One mailbox a bell.
    pub(crate) fn new(bells: Vec<Bell>) -> (Self, Vec<Mailbox>) {
        let (slots, boxes): (Vec<_>, Vec<_>) = bells
            .into_iter()
            .map(|bell| {
                let bell = Arc::new(bell);
                let (sender, receiver) = crossbeam_channel::unbounded();
                let asleep = Arc::new(AtomicBool::new(false));
                let mailbox = Mailbox {
                    receiver,
                    asleep: asleep.clone(),
                    bell: bell.clone(),
                };
                (
                    Slot {
                        sender,
                        bell,
                        asleep,
                    },
                    mailbox,
                )
            })
            .unzip();
        (Self(slots.into()), boxes)
    }

    /// How many threads there are.
    pub(crate) fn threads(&self) -> u32 {
        self.0.len() as u32
    }

    /// Puts mail into a thread's box and wakes it if it sleeps. A thread that has ended drops it.
    pub(crate) fn send(&self, thread: u32, mail: Mail) {
        let slot = &self.0[thread as usize];
        if slot.sender.send(mail).is_ok() {
            wake::wake_sleeper(&*slot.asleep, || slot.bell.ring());
        }
    }

    /// Puts mail into every thread's box.
    pub(crate) fn send_all(&self, mail: impl Fn() -> Mail) {
        (0..self.threads()).for_each(|thread| self.send(thread, mail()));
    }

    /// Tells every thread to stop.
    pub(crate) fn stop_all(&self) {
        self.send_all(|| Mail::Stop);
    }
}

impl Mailbox {
    /// What rings when mail comes for a thread that sleeps; to be watched.
    pub(crate) fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// The next piece of mail, if there is one.
    pub(crate) fn take(&self) -> Option<Mail> {
        self.receiver.try_recv().ok()
    }

    /// Announces that the shard is about to sleep; false when mail has come meanwhile.
    pub(crate) fn may_sleep(&self) -> bool {
        wake::may_sleep(&*self.asleep, || self.receiver.is_empty())
    }

    /// The shard is up again.
    pub(crate) fn awake(&self) {
        wake::is_up(&*self.asleep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvar_io::{IoEngine, Reactor};
    use mio::{Interest, Token};
    use std::time::Duration;

    #[test]
    fn a_sleeper_is_woken_and_never_misses_mail() {
        for engine in [IoEngine::Auto, IoEngine::Threads] {
            let reactor = Reactor::new(engine).unwrap().0;
            sleeps_and_is_woken(reactor);
        }
    }

    fn sleeps_and_is_woken(mut reactor: Reactor) {
        let (post, mut boxes) = Post::new(vec![Bell::new().unwrap()]);
        let mailbox = boxes.pop().unwrap();
        let watcher = reactor.watcher();
        watcher
            .watch(mailbox.bell(), Token(0), Interest::READABLE)
            .unwrap();
        const COUNT: usize = 10_000;
        let posting = post.clone();
        let sender = std::thread::spawn(move || {
            for _ in 0..COUNT {
                posting.send(0, Mail::LinksClosed);
            }
        });
        let mut ready = Vec::new();
        let mut got = 0;
        while got < COUNT {
            while mailbox.take().is_some() {
                got += 1;
            }
            if got < COUNT && mailbox.may_sleep() {
                ready.clear();
                reactor
                    .turn(Some(Duration::from_secs(20)), &mut ready)
                    .unwrap();
                assert!(!ready.is_empty(), "slept through mail after {got}");
                mailbox.awake();
            }
        }
        sender.join().unwrap();
    }
}
