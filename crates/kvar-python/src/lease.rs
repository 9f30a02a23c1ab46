//! `kvar.Lease`: what a leased lookup found, and the promise that it stays.

use crate::errors::RequestError;
use crate::open::{Open, raise, was_asked};
use kvar_base::{LeaseToken, MissReason};
use kvar_client::{CallOptions, Leased, Pending};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How many leading blocks are there, and a promise that they stay.
///
/// The promise ends by itself; `renew` lets it last longer, `release` ends it, and so does the end
/// of a `with` block. It belongs to its token, not to this object or its client: another process of
/// the namespace may renew or release it (`Client.renew`, `Client.release`).
#[pyclass(name = "Lease", module = "kvar", frozen)]
pub(crate) struct PyLease {
    /// Weak: a lease that lies around keeps no connection open.
    open: Weak<Open>,
    options: CallOptions,
    leading: usize,
    reason: Option<MissReason>,
    token: Option<LeaseToken>,
    /// Until when, as far as this process knows; `None` once it was released.
    until: Mutex<Option<Instant>>,
}

impl PyLease {
    fn of(leased: &Leased, open: Weak<Open>, options: CallOptions) -> Self {
        Self {
            open,
            options,
            leading: leased.leading,
            reason: leased.reason,
            token: leased.lease.map(|lease| lease.token),
            until: Mutex::new(leased.lease.map(|lease| lease.until)),
        }
    }

    fn until(&self) -> Option<Instant> {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_until(&self, until: Option<Instant>) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }

    fn client(&self) -> PyResult<Arc<Open>> {
        let gone = || {
            RequestError::new_err("the client of this lease is closed; use its token with another")
        };
        self.open.upgrade().ok_or_else(gone)
    }
}

/// A leased lookup under way.
#[pyclass(name = "PendingLease", module = "kvar", frozen)]
pub(crate) struct PyPendingLease {
    open: Weak<Open>,
    options: CallOptions,
    pending: Mutex<Option<Pending<Leased>>>,
}

impl PyPendingLease {
    pub(crate) fn of(pending: Pending<Leased>, open: &Arc<Open>, options: CallOptions) -> Self {
        Self {
            open: Arc::downgrade(open),
            options,
            pending: Mutex::new(Some(pending)),
        }
    }

    fn pending(&self) -> MutexGuard<'_, Option<Pending<Leased>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl PyPendingLease {
    /// Whether it has ended.
    fn done(&self) -> bool {
        self.pending().as_ref().is_none_or(Pending::is_done)
    }

    /// What it found; waits for it, at most until the call's deadline. Once: the lease is the
    /// caller's. Raises as lookup does.
    pub(crate) fn result(&self, py: Python<'_>) -> PyResult<PyLease> {
        let Some(pending) = self.pending().take() else {
            return Err(RequestError::new_err("the lease was taken before"));
        };
        let leased = if pending.is_done() {
            pending.wait()
        } else {
            py.detach(|| pending.wait())
        };
        let open = self.open.upgrade();
        was_asked(open.as_deref(), leased.leading, leased.reason)?;
        Ok(PyLease::of(&leased, self.open.clone(), self.options))
    }

    fn __repr__(&self) -> String {
        let word = if self.done() { "done" } else { "open" };
        format!("PendingLease({word})")
    }
}

/// A lease's time as Python gives it.
pub(crate) fn lease_time(seconds: f64) -> PyResult<Duration> {
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err(RequestError::new_err(format!(
            "ttl_s is {seconds}: a lease lasts longer than no time (2.0 is usual, 30.0 the most)"
        ))),
    }
}

#[pymethods]
impl PyLease {
    /// How many leading blocks are there; those are promised, if any are (see `held`).
    #[getter]
    fn leading(&self) -> usize {
        self.leading
    }

    /// Why the next block is not: a word as of a get, `overloaded` when it may be there and no more
    /// can be promised; None when all are.
    #[getter]
    fn reason(&self) -> Option<&'static str> {
        self.reason.map(MissReason::word)
    }

    /// Names the lease towards the node, 16 secret bytes; None if there is no promise.
    #[getter]
    fn token<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.token.map(|token| PyBytes::new(py, token.as_bytes()))
    }

    /// Whether the promise stands, by this process's clock.
    #[getter]
    fn held(&self) -> bool {
        self.until().is_some_and(|until| until > Instant::now())
    }

    /// Seconds that it stands yet; never more than the node thinks.
    #[getter]
    fn left_s(&self) -> f64 {
        self.until().map_or(0.0, |until| {
            until
                .saturating_duration_since(Instant::now())
                .as_secs_f64()
        })
    }

    /// Lets it last `ttl_s` seconds from now (30 at most); False if it has ended.
    ///
    /// With `wait=False` it is sent and True is returned without an answer; `left_s` stays as it was.
    #[pyo3(signature = (ttl_s = 2.0, *, wait = true))]
    fn renew(&self, py: Python<'_>, ttl_s: f64, wait: bool) -> PyResult<bool> {
        let ttl = lease_time(ttl_s)?;
        let Some(token) = self.token else {
            return Ok(false);
        };
        let open = self.client()?;
        let pending = open.client.submit_renew(token, ttl, self.options);
        if !wait {
            return Ok(true);
        }
        let until = py
            .detach(|| pending.wait())
            .map_err(|error| raise(&error))?;
        self.set_until(until);
        Ok(until.is_some())
    }

    /// Ends it; whether there was one.
    ///
    /// With `wait=False` it is sent and True is returned without an answer.
    #[pyo3(signature = (*, wait = true))]
    fn release(&self, py: Python<'_>, wait: bool) -> PyResult<bool> {
        let Some(token) = self.token else {
            return Ok(false);
        };
        let open = self.client()?;
        self.set_until(None);
        let pending = open.client.submit_release(token, self.options);
        if !wait {
            return Ok(true);
        }
        py.detach(|| pending.wait()).map_err(|error| raise(&error))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    /// Releases it without waiting; a node that cannot be reached lets it end by itself.
    #[pyo3(signature = (_kind, _value, _traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) {
        // A closed client has nothing to send it with; the lease ends by itself.
        let _ = self.release(py, false);
    }

    fn __repr__(&self) -> String {
        let next = self.reason.map_or("all", MissReason::word);
        let state = if self.held() { "held" } else { "not held" };
        format!("Lease({} blocks, {next}, {state})", self.leading)
    }
}
