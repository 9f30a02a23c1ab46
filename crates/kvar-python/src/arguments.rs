//! From Python's arguments to the client's items; everything that can be wrong is said here.

use crate::buffers::{Exported, Exporter, Pieces, Region, pages, refuse_overlap};
use crate::errors::RequestError;
use crate::hints::PyPutHints;
use crate::ids::block_id;
use kvar_base::{BlockId, LeaseToken};
use kvar_client::{GetItem, LayerItem, LayerPutItem, Lengths, PutHints, PutItem};
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
        indices: Vec<usize>,
        page_bytes: usize,
        writable: bool,
    ) -> PyResult<Self> {
        let paged = PageBlocks::new(ids, layers, indices, page_bytes, writable)?;
        let PageBlocks {
            ids,
            layers,
            indices,
            page_bytes,
            exported,
        } = paged;
        let blocks = ids
            .into_iter()
            .zip(indices)
            .map(|(id, index)| {
                let regions = pages(&layers, index, page_bytes)?;
                Ok((id, Pieces::new(regions, &exported)))
            })
            .collect::<PyResult<Vec<_>>>()?;
        Ok(Self { blocks, exported })
    }

    /// As blocks to read; the first stands at `depth` in its chain, the others behind it.
    pub(crate) fn into_gets(self, depth: u32) -> PyResult<(Vec<GetItem>, Arc<Exported>)> {
        let items = self
            .blocks
            .into_iter()
            .zip(depths(depth))
            .map(|((id, pieces), depth)| {
                let expected = Lengths::of(&pieces.lengths());
                let into = pieces.into_destination()?;
                Ok(GetItem {
                    expected,
                    depth,
                    into,
                    ..GetItem::to_vec(id)
                })
            })
            .collect::<PyResult<_>>()?;
        Ok((items, self.exported))
    }

    /// As blocks to read section by section.
    pub(crate) fn into_layers(self, depth: u32) -> PyResult<(Vec<LayerItem>, Arc<Exported>)> {
        let items = self
            .blocks
            .into_iter()
            .zip(depths(depth))
            .map(|((id, pieces), depth)| {
                let into = pieces.split().into_iter().map(Pieces::into_destination);
                let into = into.collect::<PyResult<_>>()?;
                Ok(LayerItem { id, depth, into })
            })
            .collect::<PyResult<_>>()?;
        Ok((items, self.exported))
    }

    /// As blocks to write; the first stands at `depth` in its chain, the others behind it.
    pub(crate) fn into_puts(self, words: &PutWords) -> (Vec<PutItem>, Arc<Exported>) {
        let items = self
            .blocks
            .into_iter()
            .zip(words.hints())
            .map(|((id, pieces), hints)| PutItem {
                durable: words.durable,
                hints,
                ..PutItem::of_pieces(id, pieces)
            })
            .collect();
        (items, self.exported)
    }
}

/// Blocks that are pages of layers, before anybody has looked at one section of them.
pub(crate) struct PageBlocks {
    pub(crate) ids: Vec<BlockId>,
    pub(crate) layers: Vec<Region>,
    /// The page of each block; it lies inside every layer.
    pub(crate) indices: Vec<usize>,
    pub(crate) page_bytes: usize,
    pub(crate) exported: Arc<Exported>,
}

impl PageBlocks {
    pub(crate) fn new(
        ids: &[PyBackedBytes],
        layers: &[Bound<'_, PyAny>],
        indices: Vec<usize>,
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
            let mut sorted = indices.clone();
            sorted.sort_unstable();
            if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
                return Err(PyValueError::new_err(
                    "two destinations overlap: an index is given twice",
                ));
            }
        }
        if let Some(last) = indices.iter().max() {
            pages(&layers, *last, page_bytes)?;
        }
        Ok(Self {
            ids: block_ids(ids)?,
            layers,
            indices,
            page_bytes,
            exported: exporter.finish(),
        })
    }

    /// As blocks to write section by section.
    pub(crate) fn to_layer_puts(&self, words: &PutWords) -> PyResult<Vec<LayerPutItem>> {
        let len = u32::try_from(self.page_bytes).map_err(|_| {
            PyValueError::new_err(format!("a page of {} bytes is too large", self.page_bytes))
        })?;
        let item = |(id, hints): (&BlockId, PutHints)| LayerPutItem {
            id: *id,
            lengths: vec![len; self.layers.len()],
            hints,
            durable: words.durable,
        };
        Ok(self.ids.iter().zip(words.hints()).map(item).collect())
    }
}

/// What a put says of its blocks, beside their bytes.
#[derive(Clone, Copy)]
pub(crate) struct PutWords {
    durable: bool,
    /// Of the first block; the others stand behind it.
    depth: u32,
    hints: PutHints,
}

impl PutWords {
    pub(crate) fn new(
        durable: bool,
        depth: u32,
        ttl_s: Option<u32>,
        hints: Option<PyPutHints>,
    ) -> PyResult<Self> {
        if ttl_s == Some(0) {
            return Err(RequestError::new_err(
                "ttl_s is 0: a block lives for a second at least; leave it out to keep the block",
            ));
        }
        let hints = hints.map_or_else(PutHints::default, |hints| hints.0);
        Ok(Self {
            durable,
            depth,
            hints: PutHints { ttl_s, ..hints },
        })
    }

    /// Of each block, in order.
    fn hints(&self) -> impl Iterator<Item = PutHints> {
        let hints = self.hints;
        depths(self.depth).map(move |depth| PutHints { depth, ..hints })
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
