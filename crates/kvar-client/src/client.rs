//! The client: a session on a thread of its own, and handles to it.
//!
//! Calls go to the thread by a queue; it is woken only if it sleeps. Calls that cannot succeed (the
//! breaker is open, a deadline of zero) end on the caller's thread without a word to anyone.

use crate::breaker::BreakerState;
use crate::call::{Board, Lost};
use crate::config::{ClientConfig, ClientError};
use crate::items::{Answer, GetItem, GetOutcome, GetResult, Leased, Lookup, PutItem, Request};
use crate::layer_put::{LayerPut, LayerPutItem, LayerPutRequest};
use crate::layers::{LayerGet, LayerItem, LayerRequest};
use crate::pending::{Completer, Pending, pair};
use crate::session::{Completion, Session};
use crate::staging::Stock;
use crate::stats::{ClientStats, Counters};
use crate::worker::{Command, Published, PutWord, Worker, publish};
use crossbeam_channel::{Sender, unbounded};
use kvar_base::wake;
use kvar_base::{
    BlockId, Clock, LeaseToken, MissReason, Mode, Moment, PutOutcome, Refusal, SystemClock,
};
use kvar_wire::{BlockStat, Limits};
use mio::Waker;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A node's client for any thread. Clones share one thread and its links, which end with the last
/// of them.
#[derive(Clone)]
pub struct Client(Arc<Handle>);

/// What one call may want differently.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallOptions {
    /// Its deadline from now; `None` is the client's.
    pub deadline: Option<Duration>,
    /// Recency: a number that grows with time and is the same for all blocks that one prompt
    /// touches; 0 leaves it to the node.
    pub touch_request: u64,
    /// Depth in the chain of a lookup's first block.
    pub first_depth: u32,
    /// Of a get: a block that a writer has announced is waited for until it is there, its writer
    /// gave up, or the deadline. (A node before version 5 of the protocol does not wait.)
    pub wait_announced: bool,
}

impl CallOptions {
    /// A deadline, all else by default.
    #[must_use]
    pub fn within(deadline: Duration) -> Self {
        Self {
            deadline: Some(deadline),
            ..Self::default()
        }
    }
}

struct Handle {
    commands: Option<Sender<Command>>,
    waker: Arc<Waker>,
    asleep: Arc<AtomicBool>,
    counters: Arc<Counters>,
    published: Arc<Mutex<Published>>,
    clock: SystemClock,
    deadline: Duration,
    endpoint: String,
    /// Who this is towards the node, for the share of leases that one client may hold.
    number: u64,
    /// Numbers puts by layers.
    next_put: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// A client whose link stands.
    ///
    /// # Errors
    /// Why not: wrong setting, address, key, namespace or version, each of its own kind.
    pub fn connect(config: ClientConfig) -> Result<Self, ClientError> {
        Self::start(config, true)
    }

    /// A client that connects on first use; while the node cannot be reached, calls end with
    /// `unreachable`.
    ///
    /// # Errors
    /// A wrong setting.
    pub fn lazy(config: ClientConfig) -> Result<Self, ClientError> {
        Self::start(config, false)
    }

    fn start(config: ClientConfig, connected: bool) -> Result<Self, ClientError> {
        let clock = SystemClock::default();
        let (deadline, endpoint) = (config.deadline, config.endpoint.clone());
        let mut session = Session::with_clock(config, clock)?;
        if connected {
            session.wait_open()?;
        }
        let (commands, receiver) = unbounded();
        let asleep = Arc::new(AtomicBool::new(false));
        let published = Arc::new(Mutex::new(Published::default()));
        let (waker, counters) = (session.waker(), session.counters());
        publish(&session, &published);
        let worker = Worker {
            session,
            commands: receiver,
            asleep: Arc::clone(&asleep),
            published: Arc::clone(&published),
            waiting: HashMap::new(),
        };
        let thread = std::thread::Builder::new()
            .name("kvar-client".to_owned())
            .spawn(move || worker.run())
            .map_err(|error| ClientError::Config(format!("cannot start a thread: {error}")))?;
        let number = client_number();
        let commands = Some(commands);
        let thread = Some(thread);
        Ok(Self(Arc::new(Handle {
            commands,
            waker,
            asleep,
            counters,
            published,
            clock,
            deadline,
            endpoint,
            number,
            next_put: AtomicU64::new(1),
            thread,
        })))
    }

    /// How many leading blocks of a chain are there. Refreshes their recency.
    #[must_use]
    pub fn lookup(&self, ids: &[BlockId]) -> Lookup {
        self.submit_lookup(ids.to_vec(), CallOptions::default())
            .wait()
    }

    /// As [`lookup`](Self::lookup), without waiting.
    pub fn submit_lookup(&self, ids: Vec<BlockId>, options: CallOptions) -> Pending<Lookup> {
        let CallOptions {
            touch_request,
            first_depth,
            ..
        } = options;
        let request = Request::Lookup {
            ids,
            first_depth,
            touch_request,
        };
        self.submit(request, options, 1, |answer, _| match answer {
            Some(Answer::Lookup(lookup)) => lookup,
            _ => Lookup {
                leading: 0,
                reason: Some(MissReason::Unreachable),
            },
        })
    }

    /// As [`lookup`](Self::lookup), and what is there stays for `ttl` (at most 30 s), unless it is
    /// removed: promised equals delivered. Fewer are promised than are there when the node's budget
    /// for leases is used up (`overloaded`). Renew or release it from any client of the namespace;
    /// it ends by itself, whatever becomes of the connection.
    #[must_use]
    pub fn lookup_leased(&self, ids: &[BlockId], ttl: Duration) -> Leased {
        self.submit_lookup_leased(ids.to_vec(), ttl, CallOptions::default())
            .wait()
    }

    /// As [`lookup_leased`](Self::lookup_leased), without waiting.
    pub fn submit_lookup_leased(
        &self,
        ids: Vec<BlockId>,
        ttl: Duration,
        options: CallOptions,
    ) -> Pending<Leased> {
        let CallOptions {
            touch_request,
            first_depth,
            ..
        } = options;
        let request = Request::Lease {
            ids,
            first_depth,
            touch_request,
            token: LeaseToken::random(),
            client: self.0.number,
            ttl,
        };
        self.submit(request, options, 1, |answer, _| match answer {
            Some(Answer::Leased(leased)) => leased,
            _ => Leased {
                leading: 0,
                reason: Some(MissReason::Unreachable),
                lease: None,
            },
        })
    }

    /// Lets a lease last `ttl` from now (at most 30 s, and never shorter than it did); until when
    /// it does, or `None`: it has ended.
    ///
    /// # Errors
    /// Why the node did not say.
    pub fn renew(
        &self,
        token: LeaseToken,
        ttl: Duration,
        options: CallOptions,
    ) -> Result<Option<Instant>, ClientError> {
        self.submit_renew(token, ttl, options).wait()
    }

    /// As [`renew`](Self::renew), without waiting.
    pub fn submit_renew(
        &self,
        token: LeaseToken,
        ttl: Duration,
        options: CallOptions,
    ) -> Pending<Result<Option<Instant>, ClientError>> {
        let request = Request::Renew { token, ttl };
        self.submit(request, options, 1, |answer, _| match answer {
            Some(Answer::Renewed(renewed)) => renewed,
            _ => Err(thread_died()),
        })
    }

    /// Ends a lease; whether there was one.
    ///
    /// # Errors
    /// Why the node did not say. The lease ends by itself all the same.
    pub fn release(&self, token: LeaseToken, options: CallOptions) -> Result<bool, ClientError> {
        self.submit_release(token, options).wait()
    }

    /// As [`release`](Self::release), without waiting.
    pub fn submit_release(
        &self,
        token: LeaseToken,
        options: CallOptions,
    ) -> Pending<Result<bool, ClientError>> {
        self.submit(
            Request::Release { token },
            options,
            1,
            |answer, _| match answer {
                Some(Answer::Released(released)) => released,
                _ => Err(thread_died()),
            },
        )
    }

    /// Which of these blocks are there; what could not be asked for is not.
    #[must_use]
    pub fn present(&self, ids: &[BlockId]) -> Vec<bool> {
        self.submit_present(ids.to_vec(), CallOptions::default())
            .wait()
    }

    /// As [`present`](Self::present), without waiting.
    pub fn submit_present(&self, ids: Vec<BlockId>, options: CallOptions) -> Pending<Vec<bool>> {
        let count = ids.len();
        self.submit(
            Request::Present { ids },
            options,
            count,
            |answer, count| match answer {
                Some(Answer::Present(present)) => present,
                _ => vec![false; count],
            },
        )
    }

    /// Reads blocks; a result for each item, in order.
    #[must_use]
    pub fn get(&self, items: Vec<GetItem>) -> Vec<GetResult> {
        self.submit_get(items, CallOptions::default()).wait()
    }

    /// As [`get`](Self::get), without waiting. (Should the client's own thread have died, the
    /// list is empty: destinations are lost with it.)
    pub fn submit_get(&self, items: Vec<GetItem>, options: CallOptions) -> Pending<Vec<GetResult>> {
        let (count, touch_request) = (items.len(), options.touch_request);
        let request = Request::Get {
            items,
            touch_request,
            waits: options.wait_announced,
        };
        self.submit(request, options, count, |answer, _| match answer {
            Some(Answer::Get(results)) => results,
            _ => Vec::new(),
        })
    }

    /// Reads blocks layer by layer: the first section of all of them, then the second of all. The
    /// handle says of each section when it is there; the call ends by its deadline.
    pub fn submit_get_layers(&self, blocks: Vec<LayerItem>, options: CallOptions) -> LayerGet {
        let (request, get) = LayerRequest::new(blocks, options.touch_request);
        let request = Request::GetLayers(request.waiting(options.wait_announced));
        // What came is in the handle.
        let _ = self.submit(request, options, 1, |_, _| ());
        get
    }

    pub(crate) fn stock(&self) -> &Stock {
        &self.0.counters.stock
    }

    /// Writes blocks; an outcome for each item, in order. (A cache's put may be forgotten, so
    /// the outcomes may be too.)
    pub fn put(&self, items: Vec<PutItem>) -> Vec<PutOutcome> {
        self.submit_put(items, CallOptions::default()).wait()
    }

    /// As [`put`](Self::put), without waiting for the node. The content checks are made before it
    /// returns.
    pub fn submit_put(
        &self,
        items: Vec<PutItem>,
        options: CallOptions,
    ) -> Pending<Vec<PutOutcome>> {
        let count = items.len();
        let lost = self.hopeless(options);
        // What will not be sent need not be read.
        let prepare = if lost.is_some() {
            PutItem::prepare_unread
        } else {
            PutItem::prepare
        };
        let request = Request::Put {
            items: items.into_iter().map(prepare).collect(),
        };
        self.submit_or_end(
            lost,
            request,
            options,
            count,
            |answer, count| match answer {
                Some(Answer::Put(outcomes)) => outcomes,
                _ => vec![PutOutcome::Refused(Refusal::Unreachable); count],
            },
        )
    }

    /// Writes blocks layer by layer: announces them; their sections are given to the handle as they are
    /// computed, and the blocks are visible at its commit. The deadline is that of the commit. (A
    /// node before version 5 of the protocol refuses such blocks, `wrong_format`.)
    pub fn put_layers(&self, blocks: Vec<LayerPutItem>, options: CallOptions) -> LayerPut {
        let count = blocks.len();
        let request = LayerPutRequest {
            ended: blocks.iter().map(|_| AtomicBool::new(false)).collect(),
            items: blocks,
            put: self.0.next_put.fetch_add(1, Ordering::Relaxed),
        };
        let told = request.clone();
        let pending =
            self.submit(
                Request::PutLayers(told),
                options,
                count,
                |answer, count| match answer {
                    Some(Answer::Put(outcomes)) => outcomes,
                    _ => vec![PutOutcome::Refused(Refusal::Unreachable); count],
                },
            );
        LayerPut::new(self.clone(), request, pending)
    }

    pub(crate) fn tell_put(&self, put: u64, word: PutWord) {
        self.0.send(Command::Put(put, word));
    }

    pub(crate) fn moment_in(&self, within: Duration) -> Moment {
        self.0.clock.now().after(within)
    }

    /// Removes blocks; returns when that is safe against power loss, with how many were there.
    ///
    /// # Errors
    /// Why not; after `Deadline` and `Unreachable` it may have been done.
    pub fn remove(&self, ids: &[BlockId], options: CallOptions) -> Result<u64, ClientError> {
        self.submit_remove(ids.to_vec(), options).wait()
    }

    /// As [`remove`](Self::remove), without waiting.
    pub fn submit_remove(
        &self,
        ids: Vec<BlockId>,
        options: CallOptions,
    ) -> Pending<Result<u64, ClientError>> {
        self.submit(Request::Remove { ids }, options, 1, finished)
    }

    /// Returns when all that was acknowledged before is safe against power loss.
    ///
    /// # Errors
    /// Why not.
    pub fn flush(&self, options: CallOptions) -> Result<(), ClientError> {
        self.submit_flush(options).wait().map(|_| ())
    }

    /// As [`flush`](Self::flush), without waiting.
    pub fn submit_flush(&self, options: CallOptions) -> Pending<Result<u64, ClientError>> {
        self.submit(Request::Flush, options, 1, finished)
    }

    /// Drops every block of the namespace; returns when that is safe against power loss, with
    /// how many there were.
    ///
    /// # Errors
    /// Why not; after `Deadline` and `Unreachable` it may have been done.
    pub fn purge(&self, options: CallOptions) -> Result<u64, ClientError> {
        self.submit(Request::Purge, options, 1, finished).wait()
    }

    /// What the node knows of a block.
    ///
    /// # Errors
    /// Why there is nothing to know.
    pub fn stat(&self, id: BlockId, options: CallOptions) -> Result<BlockStat, MissReason> {
        let pending = self.submit(Request::Stat { id }, options, 1, |answer, _| match answer {
            Some(Answer::Stat(stat)) => stat,
            _ => Err(MissReason::Unreachable),
        });
        pending.wait()
    }

    /// The node's status as JSON.
    ///
    /// # Errors
    /// Why it did not say.
    pub fn status(&self, options: CallOptions) -> Result<String, ClientError> {
        let pending = self.submit(Request::Status, options, 1, |answer, _| match answer {
            Some(Answer::Status(status)) => status,
            _ => Err(thread_died()),
        });
        pending.wait()
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        self.0.counters.snapshot()
    }

    /// The mode that the operator gave the namespace (`kvar mode`), as the node last said; `load`
    /// until it has. Costs a look at a byte: nothing is sent, the node tells of a change by itself.
    ///
    /// For whoever uses the store for an engine. Calls are made in every mode.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.0.counters.mode.get()
    }

    /// The breaker; `Closed` is the normal state.
    #[must_use]
    pub fn breaker(&self) -> BreakerState {
        self.0.counters.breaker()
    }

    /// What the node allows; `None` while no link has stood.
    #[must_use]
    pub fn limits(&self) -> Option<Limits> {
        self.0
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .limits
    }

    /// What last kept the node from being reached; `None` while it can be.
    #[must_use]
    pub fn last_error(&self) -> Option<ClientError> {
        self.0
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .last_error
            .clone()
    }

    /// The node's address as given.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.0.endpoint
    }

    fn submit<T>(
        &self,
        request: Request,
        options: CallOptions,
        count: usize,
        convert: fn(Option<Answer>, usize) -> T,
    ) -> Pending<T> {
        self.submit_or_end(self.hopeless(options), request, options, count, convert)
    }

    /// Why a call would end before it began.
    fn hopeless(&self, options: CallOptions) -> Option<Lost> {
        if options.deadline.unwrap_or(self.0.deadline).is_zero() {
            Some(Lost::Deadline)
        } else {
            (self.breaker() != BreakerState::Closed).then_some(Lost::Unreachable)
        }
    }

    fn submit_or_end<T>(
        &self,
        lost: Option<Lost>,
        request: Request,
        options: CallOptions,
        count: usize,
        convert: fn(Option<Answer>, usize) -> T,
    ) -> Pending<T> {
        let (completer, pending) = pair(convert, count);
        let handle = &*self.0;
        if let Some(lost) = lost {
            handle.end_here(request, lost, completer);
        } else {
            let within = options.deadline.unwrap_or(handle.deadline);
            let deadline = handle.clock.now().after(within);
            handle.send(Command::Call {
                request,
                deadline,
                completer,
            });
        }
        pending
    }
}

impl Handle {
    fn send(&self, command: Command) {
        let Some(commands) = &self.commands else {
            return;
        };
        // A refused command is dropped, which ends its call: the thread has died.
        let _ = commands.send(command);
        wake::wake_sleeper(&*self.asleep, || {
            let _ = self.waker.wake();
        });
    }

    /// Ends a call that cannot succeed, with a word for each of its items.
    fn end_here(&self, request: Request, lost: Lost, completer: Completer) {
        let mut board = Board::new(Arc::clone(&self.counters), self.clock);
        board.last_error = self
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .last_error
            .clone();
        board.add(0, request, Moment(0), Moment(0));
        board.end_call(0, lost);
        if let Some(Completion { answer, .. }) = board.done.pop() {
            completer.complete(answer);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.commands = None;
        let _ = self.waker.wake();
        if let Some(thread) = self.thread.take() {
            // The last handle may be dropped by a callback, on the thread itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// A number that no other client has: budgets of leases are kept by it. Drawn as tokens are, of
/// which half the bytes are enough to tell clients apart.
fn client_number() -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *LeaseToken::random().as_bytes();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

fn finished(answer: Option<Answer>, _: usize) -> Result<u64, ClientError> {
    match answer {
        Some(Answer::Finished(result)) => result,
        _ => Err(thread_died()),
    }
}

fn thread_died() -> ClientError {
    ClientError::Unreachable("the client was closed, or its thread died".to_owned())
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({}, {:?})", self.0.endpoint, self.breaker())
    }
}

impl GetResult {
    /// The reason of a miss.
    #[must_use]
    pub fn miss(&self) -> Option<MissReason> {
        match self.outcome {
            GetOutcome::Miss(reason) => Some(reason),
            GetOutcome::Hit { .. } => None,
        }
    }
}
