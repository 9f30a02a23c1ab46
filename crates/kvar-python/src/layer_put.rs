//! Puts layer by layer, as Python sees them: a handle that is told of each section when it is filled.
//!
//! ```text
//!   submit_put_layers ──> announced at once (the client's call)
//!   filled(1) ─┐
//!   filled(2) ─┼──> the preparing thread, in this order: content checks, then the client
//!   commit() ──┘                                └─> Pending
//! ```
//!
//! What must always be true: no method reads a byte of a section or waits for anybody; the buffers stay
//! exported until the client has let go of the last piece; a handle that goes without a commit gives
//! the put up, so that no block of it becomes visible.

use crate::arguments::PageBlocks;
use crate::buffers::{Exported, Pieces};
use crate::pending::{Preparer, PyPending};
use kvar_client::{LayerPut, PutSource};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The put and the memory that it is filled from.
struct Writer {
    put: LayerPut,
    layers: Pieces,
    indices: Vec<usize>,
    page_bytes: usize,
}

impl Writer {
    /// Makes the checks of a section of all blocks, and hands it to the client.
    fn section(&mut self, section: usize) {
        if self.put.is_done() {
            return;
        }
        let page = |index: &usize| {
            let page = self
                .layers
                .part(section, index * self.page_bytes, self.page_bytes);
            page.map(|page| Box::new(page) as Box<dyn PutSource>)
        };
        // All lie inside, as was seen when the call began, and come in order, as the handle sees to.
        if let Some(sources) = self.indices.iter().map(page).collect() {
            let _ = self.put.section(section, sources);
        }
    }
}

/// What is there until it is committed or given up.
type Shared = Arc<Mutex<Option<Writer>>>;

fn take(shared: &Shared) -> Option<Writer> {
    shared.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// A put layer by layer under way.
#[pyclass(name = "LayerPut", module = "kvar", frozen)]
pub(crate) struct PyLayerPut {
    writer: Shared,
    preparer: Preparer,
    exported: Mutex<Option<Arc<Exported>>>,
    deadline: Duration,
    blocks: usize,
    sections: usize,
    filled: AtomicUsize,
}

impl PyLayerPut {
    pub(crate) fn of(
        put: LayerPut,
        blocks: PageBlocks,
        preparer: &Preparer,
        deadline: Duration,
    ) -> Self {
        let PageBlocks {
            layers,
            indices,
            page_bytes,
            exported,
            ..
        } = blocks;
        Self {
            preparer: preparer.clone(),
            exported: Mutex::new(Some(Arc::clone(&exported))),
            deadline,
            blocks: indices.len(),
            sections: layers.len(),
            filled: AtomicUsize::new(0),
            writer: Arc::new(Mutex::new(Some(Writer {
                put,
                layers: Pieces::new(layers, &exported),
                indices,
                page_bytes,
            }))),
        }
    }
}

#[pymethods]
impl PyLayerPut {
    /// Sections of every block.
    #[getter]
    fn sections(&self) -> usize {
        self.sections
    }

    /// The first `count` sections of every block are filled, and do not change until the call has
    /// ended: those that were not sent yet are.
    fn filled(&self, count: usize) -> PyResult<()> {
        if count > self.sections {
            let text = format!("{count} of {} sections are filled", self.sections);
            return Err(PyIndexError::new_err(text));
        }
        let before = self.filled.fetch_max(count, Relaxed);
        if before < count {
            let writer = Arc::clone(&self.writer);
            self.preparer.run(move || {
                let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(writer) = writer.as_mut() {
                    (before..count).for_each(|section| writer.section(section));
                }
            });
        }
        Ok(())
    }

    /// All sections are filled and were said to be: the blocks become visible, each when all of it has arrived. An
    /// outcome word for each, as of a put; at most `deadline_ms` from now.
    #[pyo3(signature = (*, deadline_ms = None))]
    fn commit(&self, deadline_ms: Option<u64>) -> PyResult<PyPending> {
        let exported = self.exported.lock();
        let exported = exported.unwrap_or_else(PoisonError::into_inner).take();
        let Some(exported) = exported else {
            return Err(PyValueError::new_err(
                "the put was committed or given up before",
            ));
        };
        let within = deadline_ms.map_or(self.deadline, Duration::from_millis);
        let begun = Instant::now();
        let (pending, promise) = PyPending::promised(self.blocks, exported);
        let writer = Arc::clone(&self.writer);
        self.preparer.run(move || {
            if let Some(Writer { put, .. }) = take(&writer) {
                promise.keep(put.commit_within(within.saturating_sub(begun.elapsed())));
            }
        });
        Ok(pending)
    }

    /// Gives the put up: no block of it becomes visible.
    fn abort(&self) {
        let exported = self.exported.lock();
        drop(exported.unwrap_or_else(PoisonError::into_inner).take());
        let writer = Arc::clone(&self.writer);
        self.preparer.run(move || drop(take(&writer)));
    }

    fn __repr__(&self) -> String {
        let (blocks, filled, sections) = (self.blocks, self.filled.load(Relaxed), self.sections);
        format!("LayerPut({blocks} blocks, {filled} of {sections} sections)")
    }
}
