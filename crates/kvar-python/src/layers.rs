//! Gets layer by layer, as Python sees them: a handle that says of each section when it is there.
//!
//! What must always be true: nobody waits here while holding the interpreter's lock; the call's buffers
//! stay exported until it has ended and the handle lets go of them.

use crate::buffers::Exported;
use crate::pending::SIGNALS_EVERY;
use kvar_base::MissReason;
use kvar_client::LayerGet;
use pyo3::exceptions::{PyIndexError, PyTimeoutError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyList;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A get layer by layer under way.
#[pyclass(name = "LayerGet", module = "kvar", frozen)]
pub(crate) struct PyLayerGet {
    get: LayerGet,
    exported: Mutex<Option<Arc<Exported>>>,
}

fn words(misses: &[Option<MissReason>]) -> impl ExactSizeIterator<Item = &'static str> {
    misses
        .iter()
        .map(|miss| miss.map_or("hit", MissReason::word))
}

impl PyLayerGet {
    pub(crate) fn of(get: LayerGet, exported: Arc<Exported>) -> Self {
        let exported = Mutex::new(Some(exported));
        Self { get, exported }
    }

    /// Looks again and again, so that Ctrl-C ends it; `None` by the timeout.
    fn wait(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        look: impl Fn(Duration) -> Option<Vec<Option<MissReason>>> + Sync,
    ) -> PyResult<Vec<Option<MissReason>>> {
        let timeout = timeout.map(|seconds| {
            Duration::try_from_secs_f64(seconds).map_err(|_| {
                PyValueError::new_err(format!("a timeout of {seconds} s cannot be meant"))
            })
        });
        // Nearly always it is there already: then the lock need not change hands.
        if let Some(misses) = look(Duration::ZERO) {
            return Ok(misses);
        }
        let end = timeout.transpose()?.map(|timeout| Instant::now() + timeout);
        loop {
            let left = end.map_or(SIGNALS_EVERY, |end| {
                end.saturating_duration_since(Instant::now())
            });
            if let Some(misses) = py.detach(|| look(left.min(SIGNALS_EVERY))) {
                return Ok(misses);
            }
            py.check_signals()?;
            if end.is_some_and(|end| Instant::now() >= end) {
                return Err(PyTimeoutError::new_err("it is not decided yet"));
            }
        }
    }
}

#[pymethods]
impl PyLayerGet {
    /// Sections of every block.
    #[getter]
    fn sections(&self) -> usize {
        self.get.sections()
    }

    /// Waits until this section of all blocks, and every one before it, is there or known to be
    /// missing; for each block "hit", or why not.
    ///
    /// At most `timeout` seconds (then: TimeoutError), or until the call's deadline.
    #[pyo3(signature = (section, timeout = None))]
    fn wait_section<'py>(
        &self,
        py: Python<'py>,
        section: usize,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyList>> {
        if section >= self.get.sections() && self.get.blocks() > 0 {
            let sections = self.get.sections();
            let text = format!("section {section} of {sections} sections");
            return Err(PyIndexError::new_err(text));
        }
        let misses = self.wait(py, timeout, |at_most| {
            self.get.wait_section(section, at_most)
        })?;
        PyList::new(py, words(&misses))
    }

    /// Seconds from the call until the last section was decided; None: it is not yet.
    #[getter]
    fn seconds(&self) -> Option<f64> {
        self.get.took().map(|took| took.as_secs_f64())
    }

    /// Whether everything is decided: no buffer is used any more.
    fn done(&self) -> bool {
        self.get.is_done()
    }

    /// Waits until everything is decided; for each block "hit" if it is there whole, or why not.
    ///
    /// At most `timeout` seconds (then: TimeoutError), or until the call's deadline.
    #[pyo3(signature = (timeout = None))]
    fn result<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyList>> {
        let misses = self.wait(py, timeout, |at_most| self.get.wait_all(at_most))?;
        // The pieces keep the buffers exported, too.
        for section in 0..self.get.sections() {
            if self.get.blocks() > 0 {
                drop(self.get.take_section(section));
            }
        }
        let exported = self.exported.lock();
        let exported = exported.unwrap_or_else(PoisonError::into_inner).take();
        if let Some(exported) = exported {
            exported.release(py);
        }
        PyList::new(py, words(&misses))
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.get)
    }
}
