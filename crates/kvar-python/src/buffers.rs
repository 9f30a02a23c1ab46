//! Python buffers as memory that a client may read and write while Python runs on.
//!
//! ```text
//!   bytearray, numpy array, memoryview ──export──> Exported (held) <── Arc ── pieces of a block
//!                                                     │                        (pointer, length)
//!                                                     └─ released when the last piece is gone
//! ```
//!
//! What must always be true:
//! * a piece lies inside a buffer that stays exported for as long as the piece lives, so its memory
//!   is neither freed nor moved (Python refuses to resize an exported buffer);
//! * what is written into came from a buffer that said it is writable, and no two pieces of one
//!   call overlap;
//! * the interpreter may be gone when the last piece is dropped; then nothing is released.
//!
//! What is left to the caller, as with any buffer given to a call in the background: not to read
//! or write it until the call has ended. Bytes that change while they are sent are not undefined
//! to the store, only wrong: they no longer match their content check and are turned away.

use crate::returner::{Return, hand_over};
use crate::staging::staged;
use kvar_client::{Filled, Sink, Source};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex};

/// Exported buffers of one call.
pub(crate) struct Exported(Mutex<Vec<PyUntypedBuffer>>);

impl Exported {
    /// Releases the buffers now if no piece uses them any more.
    pub(crate) fn release(self: Arc<Self>, py: Python<'_>) {
        if let Some(last) = Arc::into_inner(self) {
            last.take()
                .into_iter()
                .for_each(|buffer| buffer.release(py));
        }
    }

    fn take(&self) -> Vec<PyUntypedBuffer> {
        std::mem::take(
            &mut self
                .0
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        )
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        // On whichever thread the last piece was dropped, which must not wait for Python.
        let buffers = self.take();
        if !buffers.is_empty() {
            hand_over(Return::Buffers(buffers));
        }
    }
}

/// Contiguous memory inside an exported buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    start: *mut u8,
    len: usize,
}

impl Region {
    pub(crate) fn address(&self) -> usize {
        self.start as usize
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// This region and one right behind it as one, if that is where it lies.
    pub(crate) fn joined(&self, next: &Self) -> Option<Self> {
        let is_next = self.start.wrapping_add(self.len) == next.start;
        is_next.then(|| Self {
            start: self.start,
            len: self.len + next.len,
        })
    }

    /// The part of this region, if it lies inside.
    fn part(&self, first: usize, len: usize) -> Option<Self> {
        let end = first.checked_add(len)?;
        // `start` stays inside the region or one past its end: no overflow.
        (end <= self.len).then(|| Self {
            start: self.start.wrapping_add(first),
            len,
        })
    }
}

/// Collects the buffers of one call.
#[derive(Default)]
pub(crate) struct Exporter {
    buffers: Vec<PyUntypedBuffer>,
}

impl Exporter {
    /// Exports one object's memory.
    pub(crate) fn export(&mut self, object: &Bound<'_, PyAny>, writable: bool) -> PyResult<Region> {
        let buffer = PyUntypedBuffer::get(object)?;
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err(
                "the buffer is not contiguous; give a contiguous one, or a list of contiguous ones",
            ));
        }
        if writable && buffer.readonly() {
            return Err(PyBufferError::new_err(
                "the buffer is read-only; give a writable one, such as a bytearray",
            ));
        }
        let region = Region {
            start: buffer.buf_ptr().cast(),
            len: buffer.len_bytes(),
        };
        self.buffers.push(buffer);
        Ok(region)
    }

    /// Ends collecting; the pieces share what comes out.
    pub(crate) fn finish(self) -> Arc<Exported> {
        Arc::new(Exported(Mutex::new(self.buffers)))
    }
}

/// The memory of one block: its sections in order.
pub(crate) struct Pieces {
    regions: Vec<Region>,
    _exported: Arc<Exported>,
}

// SAFETY: a region is plain memory with no thread of its own; the exporter that keeps it alive is
// `Send` and `Sync` (PyO3 attaches to the interpreter before it touches a Python object).
unsafe impl Send for Pieces {}

impl Pieces {
    pub(crate) fn new(regions: Vec<Region>, exported: &Arc<Exported>) -> Self {
        Self {
            regions,
            _exported: Arc::clone(exported),
        }
    }

    /// Each section by itself.
    pub(crate) fn split(self) -> Vec<Self> {
        let one = |region: &Region| Self::new(vec![*region], &self._exported);
        self.regions.iter().map(one).collect()
    }

    /// A part of one section, if it lies inside.
    pub(crate) fn part(&self, section: usize, first: usize, len: usize) -> Option<Self> {
        let region = self.regions.get(section)?.part(first, len)?;
        Some(Self::new(vec![region], &self._exported))
    }

    /// As a destination: where it lies in staging buffers their memory is lent, else it is used as it is.
    pub(crate) fn into_destination(self) -> PyResult<Filled> {
        let plain = |region| Filled::Place(Box::new(Self::new(vec![region], &self._exported)));
        let staged = staged(&self.regions, plain)?;
        Ok(staged.unwrap_or_else(|| Filled::Place(Box::new(self))))
    }

    /// Exact lengths of the sections.
    pub(crate) fn lengths(&self) -> Vec<u32> {
        // A length beyond 4 GiB is beyond every block, and stays so when it is cut.
        self.regions
            .iter()
            .map(|region| u32::try_from(region.len).unwrap_or(u32::MAX))
            .collect()
    }
}

impl Source for Pieces {
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
        for region in &self.regions {
            if region.len == 0 {
                visit(&[]);
                continue;
            }
            // SAFETY: the region lies inside an exported buffer (`export`, `part`) that stays
            // exported as long as `_exported` lives, which is as long as `self`; bytes have no
            // invalid values. That nobody writes meanwhile is the caller's promise (see above); a
            // broken promise makes a wrong content check, which the store turns away.
            visit(unsafe { std::slice::from_raw_parts(region.start, region.len) });
        }
    }
}

impl Sink for Pieces {
    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(&'a mut [u8])) {
        for region in &self.regions {
            if region.len == 0 {
                visit(&mut []);
                continue;
            }
            // SAFETY: as for `Source`; the buffer said it is writable, no other piece of the call
            // overlaps it (`refuse_overlap`), and `&mut self` lends each region out once.
            visit(unsafe { std::slice::from_raw_parts_mut(region.start, region.len) });
        }
    }

    fn len(&self) -> usize {
        self.regions.iter().map(|region| region.len).sum()
    }
}

/// The pages of one block: page `index` of every layer.
pub(crate) fn pages(layers: &[Region], index: usize, page_bytes: usize) -> PyResult<Vec<Region>> {
    let outside = || {
        PyValueError::new_err(format!(
            "page {index} of {page_bytes} bytes lies outside a layer of {} bytes",
            layers.iter().map(|region| region.len).min().unwrap_or(0)
        ))
    };
    let first = index.checked_mul(page_bytes).ok_or_else(outside)?;
    layers
        .iter()
        .map(|layer| layer.part(first, page_bytes).ok_or_else(outside))
        .collect()
}

/// Refuses destinations that overlap: two blocks would be written over each other.
pub(crate) fn refuse_overlap<'a>(regions: impl Iterator<Item = &'a Region>) -> PyResult<()> {
    let mut spans: Vec<_> = regions
        .filter(|r| r.len > 0)
        .map(|r| (r.start as usize, r.len))
        .collect();
    spans.sort_unstable();
    if spans
        .windows(2)
        .any(|pair| pair[0].0 + pair[0].1 > pair[1].0)
    {
        return Err(PyValueError::new_err(
            "two destinations overlap; give every block memory of its own",
        ));
    }
    Ok(())
}
