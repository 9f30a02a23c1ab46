//! A call under way, as its caller sees it.
//!
//! A pending call ends exactly once, by its deadline at the latest, also when the client is closed
//! or its thread dies: whoever holds the other half either says an answer or drops it.

use crate::items::Answer;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

type Callback = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    ended: bool,
    answer: Option<Answer>,
    callback: Option<Callback>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that has been submitted. Dropping it does not stop the call.
pub struct Pending<T> {
    shared: Arc<Shared>,
    /// Turns the answer, or that there is none, into what the caller wants; `count` is how many
    /// items it asked for.
    convert: fn(Option<Answer>, usize) -> T,
    count: usize,
}

/// The other half, with the client's thread.
pub(crate) struct Completer(Arc<Shared>);

pub(crate) fn pair<T>(
    convert: fn(Option<Answer>, usize) -> T,
    count: usize,
) -> (Completer, Pending<T>) {
    let shared = Arc::new(Shared::default());
    (
        Completer(Arc::clone(&shared)),
        Pending {
            shared,
            convert,
            count,
        },
    )
}

impl Completer {
    pub(crate) fn complete(self, answer: Answer) {
        self.0.lock().answer = Some(answer);
        // The rest is said by the drop.
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.ended = true;
        let callback = state.callback.take();
        drop(state);
        self.0.changed.notify_all();
        run(callback);
    }
}

/// A caller's function must not take the client's thread down with it; its panic has been printed.
fn run(callback: Option<Callback>) {
    if let Some(callback) = callback {
        let _ = catch_unwind(AssertUnwindSafe(callback));
    }
}

impl<T> Pending<T> {
    /// Whether it has ended.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.shared.lock().ended
    }

    /// Waits until it has ended.
    #[must_use]
    pub fn wait(self) -> T {
        let mut state = self.shared.lock();
        while !state.ended {
            state = self
                .shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let answer = state.answer.take();
        drop(state);
        (self.convert)(answer, self.count)
    }

    /// Waits up to `timeout`.
    ///
    /// # Errors
    /// Itself, when it has not ended by then.
    pub fn wait_timeout(self, timeout: Duration) -> Result<T, Self> {
        let end = Instant::now() + timeout;
        let mut state = self.shared.lock();
        while !state.ended {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                return Err(self);
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        Ok(self.wait())
    }

    /// Has `callback` called once it has ended: on the client's thread, which waits for it, or at
    /// once if it has ended already. It must be quick (wake someone up). The last one given counts.
    pub fn on_done(&self, callback: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.lock();
        if state.ended {
            drop(state);
            run(Some(Box::new(callback)));
        } else {
            state.callback = Some(Box::new(callback));
        }
    }
}

impl<T> fmt::Debug for Pending<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Pending({} items, {})",
            self.count,
            if self.is_done() { "done" } else { "open" }
        )
    }
}
