//! Keys, fingerprints and block ids as Python sees them. An id is plain `bytes` of length 32.

use crate::errors::ConfigError;
use kvar_base::{BlockId, ContentFingerprint, NamespaceKey};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

/// The secret of a namespace.
#[pyclass(name = "NamespaceKey", module = "kvar", frozen)]
pub(crate) struct PyNamespaceKey(pub(crate) NamespaceKey);

impl PyNamespaceKey {
    pub(crate) fn read(path: &std::path::Path) -> PyResult<NamespaceKey> {
        let wrong = |why: String| {
            ConfigError::new_err(format!(
                "{}: {why}; give the key file that the node wrote beside its data \
                 (FILE.key, with a line namespace_key = \"64 hexadecimal digits\")",
                path.display()
            ))
        };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let table: toml::Table = text
            .parse()
            .map_err(|_| wrong("not a key file (no TOML)".to_owned()))?;
        let digits = table
            .get("namespace_key")
            .and_then(toml::Value::as_str)
            .ok_or_else(|| wrong("no namespace_key in it".to_owned()))?;
        digits
            .parse()
            .map_err(|error| wrong(format!("namespace_key: {error}")))
    }
}

#[pymethods]
impl PyNamespaceKey {
    /// The key in a key file: `FILE.key`, which a node writes beside its data.
    #[staticmethod]
    #[allow(clippy::needless_pass_by_value)] // PyO3 hands arguments over by value.
    fn from_file(path: PathBuf) -> PyResult<Self> {
        Self::read(&path).map(Self)
    }

    /// The key of 64 hexadecimal digits.
    #[staticmethod]
    fn from_hex(text: &str) -> PyResult<Self> {
        text.parse()
            .map(Self)
            .map_err(|error| ConfigError::new_err(format!("namespace key: {error}")))
    }

    /// Eight digits that name the key without giving it away.
    #[getter]
    fn short_name(&self) -> String {
        self.0.short_name()
    }

    fn __repr__(&self) -> String {
        format!("NamespaceKey({})", self.0.short_name())
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other
            .cast::<Self>()
            .is_ok_and(|other| other.get().0 == self.0)
    }

    fn __hash__(&self) -> u64 {
        hash_of(&self.0.short_name())
    }
}

/// What must be equal for bytes to mean the same.
#[pyclass(name = "ContentFingerprint", module = "kvar", frozen)]
pub(crate) struct PyContentFingerprint(pub(crate) ContentFingerprint);

#[pymethods]
impl PyContentFingerprint {
    /// The fingerprint of a canonical text: `key=value` lines in a fixed order.
    #[staticmethod]
    fn of_text(text: &str) -> Self {
        Self(ContentFingerprint::of_text(text))
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.0)
    }

    fn __repr__(&self) -> String {
        format!("ContentFingerprint({:?})", self.0)
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other
            .cast::<Self>()
            .is_ok_and(|other| other.get().0 == self.0)
    }

    fn __hash__(&self) -> u64 {
        hash_of(&self.0)
    }
}

fn hash_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Names one block for each engine hash of a chain.
#[pyfunction]
#[pyo3(
    signature = (key, engine_hashes, fingerprint, head_slice = (0, 1), group = 0),
    text_signature = "(key, engine_hashes, fingerprint, head_slice=(0, 1), group=0)",
)]
#[allow(clippy::needless_pass_by_value)] // PyO3 hands arguments over by value.
pub(crate) fn derive_ids<'py>(
    py: Python<'py>,
    key: &PyNamespaceKey,
    engine_hashes: Vec<PyBackedBytes>,
    fingerprint: &PyContentFingerprint,
    head_slice: (u16, u16),
    group: u32,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    if head_slice.0 >= head_slice.1 {
        return Err(PyValueError::new_err(format!(
            "head_slice {head_slice:?} is no slice: write (number, count) with number below count"
        )));
    }
    Ok(engine_hashes
        .iter()
        .map(|hash| BlockId::derive(&key.0, hash, &fingerprint.0, head_slice, group))
        .map(|id| PyBytes::new(py, id.as_bytes()))
        .collect())
}

/// The id of a block that a person names.
#[pyfunction]
pub(crate) fn id_from_name<'py>(
    py: Python<'py>,
    key: &PyNamespaceKey,
    name: &str,
) -> Bound<'py, PyBytes> {
    PyBytes::new(py, BlockId::from_name(&key.0, name).as_bytes())
}

/// An id as an argument.
pub(crate) fn block_id(bytes: &[u8]) -> PyResult<BlockId> {
    <[u8; 32]>::try_from(bytes).map(BlockId::new).map_err(|_| {
        PyValueError::new_err(format!(
            "a block id is 32 bytes and this has {}; make ids with derive_ids or id_from_name",
            bytes.len()
        ))
    })
}
