//! Calls under way, as Python sees them.
//!
//! ```text
//!   submit ──> [checks made on the preparing thread] ──> the client's call ──> ended
//!                     (puts only)                             │
//!   done() looks ─────────────────────────── Slot ────────────┘──> waiters, callbacks
//!   result() waits without the interpreter's lock
//! ```
//!
//! What must always be true:
//! * a call's buffers stay exported until it has ended, whoever still looks at it;
//! * nobody waits here while holding the interpreter's lock or the slot's;
//! * every submitted call ends, also one whose client is closed before it was sent.

use crate::buffers::Exported;
use crate::returner::{Return, hand_over};
use kvar_base::{PutOutcome, Refusal};
use kvar_client::{CallOptions, Client, GetOutcome, GetResult, Pending, PutItem};
use pyo3::exceptions::{PyTimeoutError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyType};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a wait looks whether Ctrl-C was pressed.
pub(crate) const SIGNALS_EVERY: Duration = Duration::from_millis(100);

/// How the read of one block ended.
#[pyclass(name = "GetResult", module = "kvar", frozen)]
#[derive(Clone, Copy)]
pub(crate) struct PyGetResult {
    /// `hit`, or the reason of the miss.
    #[pyo3(get)]
    outcome: &'static str,
    /// Bytes read; 0 for a miss.
    #[pyo3(get)]
    bytes: u64,
}

#[pymethods]
impl PyGetResult {
    fn __repr__(&self) -> String {
        format!("GetResult({:?}, {} bytes)", self.outcome, self.bytes)
    }
}

impl PyGetResult {
    fn of(result: &GetResult) -> Self {
        match &result.outcome {
            GetOutcome::Hit { lengths, .. } => Self {
                outcome: "hit",
                bytes: lengths.iter().map(|len| u64::from(*len)).sum(),
            },
            GetOutcome::Miss(reason) => Self {
                outcome: reason.word(),
                bytes: 0,
            },
        }
    }

    const LOST: Self = Self {
        outcome: "unreachable",
        bytes: 0,
    };
}

enum Call {
    Get(Pending<Vec<GetResult>>),
    Put(Pending<Vec<PutOutcome>>),
}

#[derive(Clone)]
enum Outcomes {
    Get(Vec<PyGetResult>),
    Put(Vec<&'static str>),
}

#[derive(Default)]
struct State {
    /// Set when it was submitted; taken by the first who wants the outcomes.
    call: Option<Call>,
    ended: bool,
    outcomes: Option<Outcomes>,
    callbacks: Vec<Py<PyAny>>,
    exported: Option<Arc<Exported>>,
}

impl State {
    fn is_done(&self) -> bool {
        self.outcomes.is_some() || (self.ended && self.call.is_some())
    }
}

#[derive(Default)]
struct Slot {
    state: Mutex<State>,
    changed: Condvar,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and, if that made it done, tells everyone.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let callbacks = if state.is_done() {
            std::mem::take(&mut state.callbacks)
        } else {
            Vec::new()
        };
        drop(state);
        self.changed.notify_all();
        callbacks
            .into_iter()
            .for_each(|callback| hand_over(Return::Callback(callback)));
    }

    /// Waits until done, at most so long.
    fn wait(&self, at_most: Duration) -> bool {
        let wait = self
            .changed
            .wait_timeout_while(self.lock(), at_most, |state| !state.is_done());
        wait.unwrap_or_else(PoisonError::into_inner).0.is_done()
    }
}

/// A call under way.
#[pyclass(name = "Pending", module = "kvar", frozen)]
pub(crate) struct PyPending {
    slot: Arc<Slot>,
    count: usize,
}

impl PyPending {
    pub(crate) fn of_get(
        pending: Pending<Vec<GetResult>>,
        count: usize,
        exported: Arc<Exported>,
    ) -> Self {
        let slot = Arc::new(Slot::default());
        slot.lock().exported = Some(exported);
        follow(&slot, pending, Call::Get);
        Self { slot, count }
    }

    pub(crate) fn of_put(
        preparer: &Preparer,
        client: Client,
        items: Vec<PutItem>,
        mut options: CallOptions,
        exported: Arc<Exported>,
    ) -> Self {
        let (pending, promise) = Self::promised(items.len(), exported);
        let submitted = Instant::now();
        preparer.run(move || {
            if let Some(deadline) = &mut options.deadline {
                // The deadline counts from when the call was made.
                *deadline = deadline.saturating_sub(submitted.elapsed());
            }
            promise.keep(client.submit_put(items, options));
        });
        pending
    }

    /// A put that the client will have later.
    pub(crate) fn promised(count: usize, exported: Arc<Exported>) -> (Self, Promise) {
        let slot = Arc::new(Slot::default());
        slot.lock().exported = Some(exported);
        let promise = Promise {
            slot: Some(Arc::clone(&slot)),
            count,
        };
        (Self { slot, count }, promise)
    }

    /// The outcomes of a call that is done.
    fn outcomes(&self, py: Python<'_>) -> Outcomes {
        let mut state = self.slot.lock();
        let outcomes = match state.call.take() {
            Some(Call::Get(pending)) => {
                // Waits for nothing: the call has ended. Drops the destinations, too.
                let mut results: Vec<_> = pending.wait().iter().map(PyGetResult::of).collect();
                results.resize(self.count, PyGetResult::LOST);
                Outcomes::Get(results)
            }
            Some(Call::Put(pending)) => {
                let mut words: Vec<_> = pending.wait().iter().map(|put| put.word()).collect();
                words.resize(self.count, Refusal::Unreachable.word());
                Outcomes::Put(words)
            }
            None => state.outcomes.clone().unwrap_or(Outcomes::Put(Vec::new())),
        };
        state.outcomes = Some(outcomes.clone());
        let exported = state.exported.take();
        drop(state);
        if let Some(exported) = exported {
            exported.release(py);
        }
        outcomes
    }

    /// Waits for the end; the interpreter's lock is free meanwhile.
    pub(crate) fn wait<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<Duration>,
    ) -> PyResult<Bound<'py, PyList>> {
        let end = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = end.map_or(SIGNALS_EVERY, |end| {
                end.saturating_duration_since(Instant::now())
            });
            if py.detach(|| self.slot.wait(left.min(SIGNALS_EVERY))) {
                break;
            }
            py.check_signals()?;
            if end.is_some_and(|end| Instant::now() >= end) {
                return Err(PyTimeoutError::new_err("the call has not ended yet"));
            }
        }
        match self.outcomes(py) {
            Outcomes::Get(results) => PyList::new(py, results),
            Outcomes::Put(words) => PyList::new(py, words),
        }
    }
}

#[pymethods]
impl PyPending {
    /// Whether it has ended.
    fn done(&self) -> bool {
        self.slot.lock().is_done()
    }

    /// The outcomes; waits for them, at most `timeout` seconds (then: TimeoutError).
    #[pyo3(signature = (timeout = None))]
    fn result<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyList>> {
        let timeout = match timeout {
            None => None,
            Some(seconds) => Some(Duration::try_from_secs_f64(seconds).map_err(|_| {
                PyValueError::new_err(format!("a timeout of {seconds} s cannot be meant"))
            })?),
        };
        self.wait(py, timeout)
    }

    /// Has `callback()` called, on a thread of this package, once it has ended.
    fn add_done_callback(&self, callback: Py<PyAny>) {
        self.slot.change(|state| state.callbacks.push(callback));
    }

    /// For annotations such as Pending[list[str]]; the class itself.
    #[classmethod]
    #[pyo3(signature = (item, /))]
    fn __class_getitem__(cls: &Bound<'_, PyType>, item: &Bound<'_, PyAny>) -> Py<PyType> {
        let _ = item;
        cls.clone().unbind()
    }

    fn __repr__(&self) -> String {
        format!(
            "Pending({} blocks, {})",
            self.count,
            if self.done() { "done" } else { "open" }
        )
    }
}

/// Has the slot told when the call ends. The order matters: a call that ends at once runs its
/// callback right here, when the slot must not be locked.
fn follow<T>(slot: &Arc<Slot>, pending: Pending<T>, call: fn(Pending<T>) -> Call) {
    let told = Arc::clone(slot);
    pending.on_done(move || told.change(|state| state.ended = true));
    slot.change(|state| state.call = Some(call(pending)));
}

/// A call whose pending the client gives later. Dropped without one, nothing of it was sent: it ends
/// without an outcome for any of its blocks.
pub(crate) struct Promise {
    slot: Option<Arc<Slot>>,
    count: usize,
}

impl Promise {
    /// The client has the call.
    pub(crate) fn keep(mut self, pending: Pending<Vec<PutOutcome>>) {
        if let Some(slot) = self.slot.take() {
            follow(&slot, pending, Call::Put);
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            slot.change(|state| {
                state.outcomes = Some(Outcomes::Put(vec![Refusal::Unreachable.word(); self.count]));
            });
        }
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// The thread that makes content checks of submitted puts, in their order. Reading every byte once
/// costs 0.1 us a KiB, which is nothing for a link and a lot for an engine's step.
#[derive(Clone)]
pub(crate) struct Preparer(Sender<Work>);

impl Preparer {
    pub(crate) fn start() -> std::io::Result<Self> {
        let (sender, receiver) = channel::<Work>();
        std::thread::Builder::new()
            .name("kvar-prepare".to_owned())
            .spawn(move || receiver.into_iter().for_each(|work| work()))?;
        Ok(Self(sender))
    }

    /// Has this done behind what was given before; does not wait. What comes back since the thread
    /// is gone is dropped, which ends its call.
    pub(crate) fn run(&self, work: impl FnOnce() + Send + 'static) {
        let _ = self.0.send(Box::new(work));
    }
}
