//! `kvar.StagingBuffer`: memory for what is read, that the node may be able to write to itself.
//!
//! ```text
//!   Client.staging(n) ─> StagingBuffer ── views: memoryview, numpy, torch; each keeps it alive
//!                             │ its memory stands in a list, by address
//!   get into a view ─> found in that list? ─ lend ─> a slot: the node writes there
//!                             └ no, or plain memory: as any buffer
//! ```
//!
//! What must always be true:
//! * memory of a buffer is neither freed nor given out again while the object, a view of it, or a get into it
//!   lives (a view holds the object, a slot holds its part of the region);
//! * a range that a get is under way to, or that one was given up over and the node has not fenced yet, is
//!   the destination of no second get: that is refused with a word. If the link was lost meanwhile it stays
//!   so, since nothing fences it any more.
//!
//! What is left to the caller is what is left to the caller of every buffer: not to read or write it until
//! the call has ended; and, after a get that ended by its deadline, not until `in_use` is false.

use crate::buffers::Region;
use kvar_client::{Client, Filled, Lender, Staging};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::os::raw::c_int;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared memory of every buffer that lives, by its first address: of whatever client it is, it has to be
/// found when a get is to go there. Locked with the interpreter's lock held, and for a look.
static LENDERS: Mutex<BTreeMap<usize, Arc<Lender>>> = Mutex::new(BTreeMap::new());

fn lenders() -> MutexGuard<'static, BTreeMap<usize, Arc<Lender>>> {
    LENDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which staging buffer's memory, and a byte in it.
type Found = (Arc<Lender>, usize);

/// Why a part of a staging buffer cannot be a destination now.
const IN_USE: &str = "a get into this part of the staging buffer is under way, or ended by its deadline and the \
                      node may still write there: take another one, or wait until in_use is False";

/// Where a destination lies in a staging buffer.
fn find(region: &Region) -> Option<Found> {
    let at = region.address();
    let lenders = lenders();
    let (start, lender) = lenders.range(..=at).next_back()?;
    let first = at - start;
    let end = first.checked_add(region.len())?;
    (region.len() > 0 && end <= lender.bytes()).then(|| (Arc::clone(lender), first))
}

/// The sections of one block as a destination that the node may fill: one slot where they lie side by side, else
/// pieces, of which each has to be filled by this side. `None`: nothing of it lies in a staging buffer.
pub(crate) fn staged(
    regions: &[Region],
    plain: impl Fn(Region) -> Filled,
) -> PyResult<Option<Filled>> {
    let mut runs: Vec<(Region, Option<Found>)> = Vec::new();
    for region in regions {
        let found = find(region);
        if let (Some((last, Some((lender, _)))), Some((same, _))) = (runs.last_mut(), &found)
            && Arc::ptr_eq(lender, same)
            && let Some(joined) = last.joined(region)
        {
            *last = joined;
            continue;
        }
        runs.push((*region, found));
    }
    if runs.iter().all(|(_, found)| found.is_none()) {
        return Ok(None);
    }
    let fill = |(region, found): (Region, Option<Found>)| match found {
        None => Ok(plain(region)),
        Some((lender, first)) => lender
            .lend(first, region.len())
            .map(|slot| Filled::Staged(Staging::from(slot)))
            .ok_or_else(|| PyBufferError::new_err(IN_USE)),
    };
    let mut filled = runs.into_iter().map(fill).collect::<PyResult<Vec<_>>>()?;
    Ok(match filled.len() {
        1 => filled.pop(),
        _ => Some(Filled::Pieces(filled)),
    })
}

/// Memory that the node has no part in.
struct Private(NonNull<[u8]>);

// SAFETY: plain memory with no thread of its own; who reads or writes it goes through Python's buffers, with
// their promise (see the module).
unsafe impl Send for Private {}
// SAFETY: as above; a shared reference gives out its address and nothing else.
unsafe impl Sync for Private {}

impl Private {
    fn new(bytes: Vec<u8>) -> Self {
        // A leaked box is no null.
        Self(NonNull::from(Box::leak(bytes.into_boxed_slice())))
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // SAFETY: it came from a box (`new`), which is freed here alone, and nobody has a pointer to it
        // any more: every view holds the object that this goes with.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

enum Memory {
    Shared(Arc<Lender>),
    Private(Private),
}

/// Memory for what is read: a writable buffer of bytes, as a bytearray is one. Made by Client.staging.
///
/// Where the client has a staging region (`Client(staging=...)`), the node writes into it what a get
/// asks for, and nothing is copied on this side; else it is plain memory for the same gets. Views
/// (memoryview, numpy.frombuffer, torch.frombuffer, and parts of them) are destinations as it is itself.
#[pyclass(name = "StagingBuffer", module = "kvar", frozen, weakref)]
pub(crate) struct PyStaging(Memory);

impl PyStaging {
    pub(crate) fn new(client: &Client, bytes: usize) -> Self {
        Self(match client.staging(bytes).into_lender() {
            Ok(lender) => {
                let lender = Arc::new(lender);
                lenders().insert(lender.as_ptr() as usize, Arc::clone(&lender));
                Memory::Shared(lender)
            }
            Err(bytes) => Memory::Private(Private::new(bytes)),
        })
    }
}

#[pymethods]
#[allow(clippy::needless_pass_by_value)] // PyO3 hands arguments over by value.
impl PyStaging {
    /// Its size in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        match &self.0 {
            Memory::Shared(lender) => lender.bytes(),
            Memory::Private(private) => private.0.len(),
        }
    }

    /// Whether the node can write here now. False: the client has no region or had no room in it, its link
    /// broke since (take a new buffer: the next link brings a new region), or it is closed.
    #[getter]
    fn shared(&self) -> bool {
        match &self.0 {
            Memory::Shared(lender) => lender.is_live(),
            Memory::Private(_) => false,
        }
    }

    /// Whether a get into part of it is under way, or was given up and the node may still write there. If
    /// the link broke meanwhile it stays so: the buffer is of no more use.
    #[getter]
    fn in_use(&self) -> bool {
        match &self.0 {
            Memory::Shared(lender) => !lender.is_free(),
            Memory::Private(_) => false,
        }
    }

    fn __len__(&self) -> usize {
        self.nbytes()
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        let start = match &this.0 {
            Memory::Shared(lender) => lender.as_ptr(),
            Memory::Private(private) => private.0.as_ptr().cast(),
        };
        // No Python object is as large as half of the address space.
        let len = this.nbytes() as ffi::Py_ssize_t;
        // SAFETY: Python gives a place for a view; the memory is of that length, and lives as long as the
        // object, which the view holds.
        let refused =
            unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start.cast(), len, 0, flags) };
        if refused == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }

    fn __repr__(&self) -> String {
        let kind = match &self.0 {
            Memory::Shared(_) if self.shared() => "shared",
            _ => "private",
        };
        format!("StagingBuffer({} bytes, {kind})", self.nbytes())
    }
}

impl Drop for PyStaging {
    fn drop(&mut self) {
        // Nobody looks for it any more; what is lent of it keeps its memory by itself.
        if let Memory::Shared(lender) = &self.0 {
            lenders().remove(&(lender.as_ptr() as usize));
        }
    }
}
