//! From Python's arguments to the client's items; everything that can be wrong is said here.

use crate::buffers::{Exported, Exporter, Pieces, Region, pages, refuse_overlap};
use crate::hints::PyPutHints;
use crate::ids::block_id;
use kvar_base::{BlockId, LeaseToken};
use kvar_client::{Filled, GetItem, LayerItem, PutHints, PutItem};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyList, PyTuple};
use std::sync::Arc;
use std::time::Duration;

/// Blocks of a call and their memory, not yet an item of this or that kind.
pub(crate) struct Blocks {
    blocks: Vec<(BlockId, Pieces)>,
    /// Keeps the buffers exported until the call lets go of them.
    pub(crate) exported: Arc<Exported>,
}

impl Blocks {
    /// From `(id, buffer)` and `(id, [buffer, ...])`.
    pub(crate) fn of_items(items: &Bound<'_, PyAny>, writable: bool) -> PyResult<Self> {
        let mut exporter = Exporter::default();
        let mut parsed: Vec<(BlockId, Vec<Region>)> = Vec::new();
        for item in items.try_iter()? {
            let item = item?;
            let (id, memory) = item
                .extract::<(PyBackedBytes, Bound<'_, PyAny>)>()
                .map_err(|_| {
                    PyTypeError::new_err("an item is a pair (id, buffer) or (id, [buffer, ...])")
                })?;
            let mut regions = Vec::new();
            if memory.is_instance_of::<PyList>() || memory.is_instance_of::<PyTuple>() {
                for section in memory.try_iter()? {
                    regions.push(exporter.export(&section?, writable)?);
                }
            } else {
                regions.push(exporter.export(&memory, writable)?);
            }
            if regions.is_empty() {
                return Err(PyValueError::new_err("a block has at least one section"));
            }
            parsed.push((block_id(&id)?, regions));
        }
        if writable {
            refuse_overlap(parsed.iter().flat_map(|(_, regions)| regions))?;
        }
        let exported = exporter.finish();
        let blocks = parsed
            .into_iter()
            .map(|(id, regions)| (id, Pieces::new(regions, &exported)))
            .collect();
        Ok(Self { blocks, exported })
    }

    /// From page `indices[i]` of every layer, for block `i`.
    pub(crate) fn of_pages(
        ids: &[PyBackedBytes],
        layers: &[Bound<'_, PyAny>],
        indices: &[usize],
        page_bytes: usize,
        writable: bool,
    ) -> PyResult<Self> {
        if ids.len() != indices.len() {
            return Err(PyValueError::new_err(format!(
                "{} ids and {} indices: give as many of one as of the other",
                ids.len(),
                indices.len()
            )));
        }
        if layers.is_empty() || page_bytes == 0 {
            return Err(PyValueError::new_err(
                "a block has at least one section, of at least one byte",
            ));
        }
        let mut exporter = Exporter::default();
        let layers = layers
            .iter()
            .map(|layer| exporter.export(layer, writable))
            .collect::<PyResult<Vec<_>>>()?;
        if writable {
            // Layers apart and indices apart make pages apart.
            refuse_overlap(layers.iter())?;
            let mut sorted = indices.to_vec();
            sorted.sort_unstable();
            if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
                return Err(PyValueError::new_err(
                    "two destinations overlap: an index is given twice",
                ));
            }
        }
        let parsed = ids
            .iter()
            .zip(indices)
            .map(|(id, index)| Ok((block_id(id)?, pages(&layers, *index, page_bytes)?)))
            .collect::<PyResult<Vec<_>>>()?;
        let exported = exporter.finish();
        let blocks = parsed
            .into_iter()
            .map(|(id, regions)| (id, Pieces::new(regions, &exported)))
            .collect();
        Ok(Self { blocks, exported })
    }

    /// As blocks to read; the first stands at `depth` in its chain, the others behind it.
    pub(crate) fn into_gets(self, depth: u32) -> (Vec<GetItem>, Arc<Exported>) {
        let items = self
            .blocks
            .into_iter()
            .zip(depths(depth))
            .map(|((id, pieces), depth)| {
                let lengths = pieces.lengths();
                GetItem {
                    depth,
                    ..GetItem::to_place(id, &lengths, pieces)
                }
            })
            .collect();
        (items, self.exported)
    }

    /// As blocks to read section by section.
    pub(crate) fn into_layers(self, depth: u32) -> (Vec<LayerItem>, Arc<Exported>) {
        let items = self
            .blocks
            .into_iter()
            .zip(depths(depth))
            .map(|((id, pieces), depth)| {
                let place = |piece| Filled::Place(Box::new(piece));
                let into = pieces.split().into_iter().map(place).collect();
                LayerItem { id, depth, into }
            })
            .collect();
        (items, self.exported)
    }

    /// As blocks to write; the first stands at `depth` in its chain, the others behind it.
    pub(crate) fn into_puts(
        self,
        depth: u32,
        durable: bool,
        ttl_s: Option<u32>,
        hints: Option<PyPutHints>,
    ) -> (Vec<PutItem>, Arc<Exported>) {
        let hints = hints.map_or_else(PutHints::default, |hints| hints.0);
        let items = self
            .blocks
            .into_iter()
            .zip(depths(depth))
            .map(|((id, pieces), depth)| PutItem {
                durable,
                hints: PutHints {
                    depth,
                    ttl_s,
                    ..hints
                },
                ..PutItem::of_pieces(id, pieces)
            })
            .collect();
        (items, self.exported)
    }
}

/// Depths from `first` on; a chain that long ends at the deepest there is.
fn depths(first: u32) -> impl Iterator<Item = u32> {
    (0_u32..).map(move |offset| first.saturating_add(offset))
}

/// Ids of a call.
pub(crate) fn block_ids(ids: &[PyBackedBytes]) -> PyResult<Vec<BlockId>> {
    ids.iter().map(|id| block_id(id)).collect()
}

/// A lease's token.
pub(crate) fn lease_token(bytes: &[u8]) -> PyResult<LeaseToken> {
    let bytes = bytes.try_into().map_err(|_| {
        PyValueError::new_err(format!(
            "a lease's token is 16 bytes (Lease.token), not {}",
            bytes.len()
        ))
    })?;
    Ok(LeaseToken::new(bytes))
}

/// A deadline of a call; `None` is the client's own.
pub(crate) fn deadline(deadline_ms: Option<u64>) -> Option<Duration> {
    deadline_ms.map(Duration::from_millis)
}
