//! A thread that touches Python on behalf of threads that must not wait for it.
//!
//! A client's thread moves bytes for everybody. When the last user of a Python buffer happens to be
//! such a thread, or a callback is due there, attaching to the interpreter could make all of them
//! wait for some Python code that holds it. So they hand the work over here.
//!
//! What must always be true: handing over never waits, and never fails in a way that matters (at
//! interpreter end nothing needs releasing any more).

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};

/// What needs the interpreter.
pub(crate) enum Return {
    /// Exported buffers that nobody uses any more.
    Buffers(Vec<PyUntypedBuffer>),
    /// A callback that is due.
    Callback(Py<PyAny>),
}

/// The thread's queue and the process it runs in: threads do not survive a fork.
static QUEUE: Mutex<Option<(u32, Sender<Return>)>> = Mutex::new(None);

/// Hands over; starts the thread at first use.
pub(crate) fn hand_over(what: Return) {
    let process = std::process::id();
    let mut queue = QUEUE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if queue.as_ref().is_none_or(|(owner, _)| *owner != process) {
        *queue = start().map(|sender| (process, sender));
    }
    if let Some((_, sender)) = queue.as_ref() {
        // Fails only when the thread is gone, which is when the process ends.
        let _ = sender.send(what);
    }
}

fn start() -> Option<Sender<Return>> {
    let (sender, receiver) = channel();
    let run = move || {
        for what in receiver {
            handle(what);
        }
    };
    std::thread::Builder::new()
        .name("kvar-python".to_owned())
        .spawn(run)
        .ok()?;
    Some(sender)
}

fn handle(what: Return) {
    Python::try_attach(|py| match what {
        Return::Buffers(buffers) => buffers.into_iter().for_each(|buffer| buffer.release(py)),
        Return::Callback(callback) => {
            if let Err(error) = callback.call0(py) {
                error.write_unraisable(py, Some(callback.bind(py)));
            }
        }
    });
}
