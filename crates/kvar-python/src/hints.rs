//! `kvar.PutHints`: what a writer knows about the worth of its blocks.

use kvar_client::PutHints;
use pyo3::prelude::*;

/// What a writer knows about the use of the blocks it puts; helps the node to keep what is worth
/// most, and changes nothing else.
///
/// * `request`: a number that all calls about one prompt share and no other prompt has, so that
///   they count as one use; 0: the call by itself.
/// * `ephemeral`: not worth a write to flash; kept in memory as long as there is room.
/// * `traffic_class`: the writer's own number, 1 to 255, for a kind of traffic (chat, documents,
///   agents): blocks of one class are taken to come back alike; 0: not said.
/// * `recompute_us`: what computing one of the blocks again costs, in microseconds; 0: not known.
/// * `handover`: written to be read once, soon, by another engine (prefill to decode).
#[pyclass(name = "PutHints", module = "kvar", frozen, eq, from_py_object)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct PyPutHints(pub(crate) PutHints);

#[pymethods]
impl PyPutHints {
    #[new]
    #[pyo3(signature = (
        *, request = 0, ephemeral = false, traffic_class = 0, recompute_us = 0, handover = false,
    ))]
    fn new(
        request: u64,
        ephemeral: bool,
        traffic_class: u8,
        recompute_us: u32,
        handover: bool,
    ) -> Self {
        Self(PutHints {
            request,
            ephemeral,
            traffic_class,
            recompute_us,
            handover,
            ..PutHints::default()
        })
    }

    /// The prompt's number.
    #[getter]
    fn request(&self) -> u64 {
        self.0.request
    }

    /// Whether it is not worth a write to flash.
    #[getter]
    fn ephemeral(&self) -> bool {
        self.0.ephemeral
    }

    /// The kind of traffic.
    #[getter]
    fn traffic_class(&self) -> u8 {
        self.0.traffic_class
    }

    /// What computing a block again costs.
    #[getter]
    fn recompute_us(&self) -> u32 {
        self.0.recompute_us
    }

    /// Whether it is read once, soon, by another engine.
    #[getter]
    fn handover(&self) -> bool {
        self.0.handover
    }

    fn __repr__(&self) -> String {
        let PutHints {
            request,
            ephemeral,
            traffic_class,
            recompute_us,
            handover,
            ..
        } = self.0;
        let word = |is: bool| if is { "True" } else { "False" };
        format!(
            "PutHints(request={request}, ephemeral={}, traffic_class={traffic_class}, \
             recompute_us={recompute_us}, handover={})",
            word(ephemeral),
            word(handover)
        )
    }
}
