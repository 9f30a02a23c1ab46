//! `kvar.Client`: each method turns arguments into a call of `kvar-client`, waits for it without
//! the interpreter's lock, and turns what came back into Python. No decisions are made here.

use crate::arguments::{Blocks, PageBlocks, PutWords, block_ids, deadline, lease_token};
use crate::errors::{ConfigError, RequestError};
use crate::hints::PyPutHints;
use crate::ids::{PyNamespaceKey, block_id};
use crate::layer_put::PyLayerPut;
use crate::layers::PyLayerGet;
use crate::lease::{PyLease, PyPendingLease, lease_time};
use crate::open::{Open, key_of, raise, was_asked};
use crate::pending::{Preparer, PyPending};
use crate::staging::PyStaging;
use kvar_client::{CallOptions, Client, ClientConfig, GetItem};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict, PyList};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A connection to a store.
#[pyclass(name = "Client", module = "kvar", frozen)]
pub(crate) struct PyClient {
    open: Mutex<Option<Arc<Open>>>,
    endpoint: String,
    deadline: Duration,
}

impl PyClient {
    fn open(&self) -> PyResult<Arc<Open>> {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or_else(|| RequestError::new_err("the client is closed; make a new one"))
    }

    fn options(&self, deadline_ms: Option<u64>) -> CallOptions {
        CallOptions::within(deadline(deadline_ms).unwrap_or(self.deadline))
    }

    fn submit_gets(
        &self,
        blocks: Blocks,
        deadline_ms: Option<u64>,
        depth: u32,
        request: u64,
    ) -> PyResult<PyPending> {
        let open = self.open()?;
        let (items, exported) = blocks.into_gets(depth)?;
        let count = items.len();
        let options = CallOptions {
            touch_request: request,
            ..self.options(deadline_ms)
        };
        let pending = open.client.submit_get(items, options);
        Ok(PyPending::of_get(pending, count, exported))
    }

    fn submit_puts(
        &self,
        blocks: Blocks,
        deadline_ms: Option<u64>,
        words: PutWords,
    ) -> PyResult<PyPending> {
        let open = self.open()?;
        let (items, exported) = blocks.into_puts(&words);
        let options = self.options(deadline_ms);
        Ok(PyPending::of_put(
            &open.preparer,
            open.client.clone(),
            items,
            options,
            exported,
        ))
    }
}

#[pymethods]
#[allow(clippy::needless_pass_by_value)] // PyO3 hands arguments over by value.
impl PyClient {
    #[new]
    #[pyo3(signature = (
        endpoint, namespace = "default", key = None, *, key_file = None, deadline_ms = 1000,
        connect_timeout_ms = 1000, links = 1, link = "auto", lazy = false,
        name = None, staging = 0,
    ))]
    #[allow(clippy::too_many_arguments)] // The public signature, nearly all of it by keyword.
    fn new(
        py: Python<'_>,
        endpoint: &str,
        namespace: &str,
        key: Option<&Bound<'_, PyNamespaceKey>>,
        key_file: Option<PathBuf>,
        deadline_ms: u64,
        connect_timeout_ms: u64,
        links: usize,
        link: &str,
        lazy: bool,
        name: Option<String>,
        staging: u64,
    ) -> PyResult<Self> {
        let link = link
            .parse()
            .map_err(|why| ConfigError::new_err(format!("link: {why}")))?;
        let config = ClientConfig {
            namespace: namespace.to_owned(),
            deadline: Duration::from_millis(deadline_ms),
            connect_timeout: Duration::from_millis(connect_timeout_ms),
            links,
            link,
            staging,
            name: name
                .unwrap_or_else(|| concat!("kvar-python ", env!("CARGO_PKG_VERSION")).to_owned()),
            ..ClientConfig::new(endpoint, key_of(key, key_file)?)
        };
        let start = if lazy { Client::lazy } else { Client::connect };
        let client = py.detach(|| start(config)).map_err(|error| raise(&error))?;
        let preparer = Preparer::start()
            .map_err(|error| ConfigError::new_err(format!("cannot start a thread: {error}")))?;
        Ok(Self {
            open: Mutex::new(Some(Arc::new(Open { client, preparer }))),
            endpoint: endpoint.to_owned(),
            deadline: Duration::from_millis(deadline_ms),
        })
    }

    /// The node's address as given.
    #[getter]
    fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// What the links go through now: "shm", "tcp", or "none" while none stands.
    #[getter]
    fn link(&self) -> PyResult<&'static str> {
        Ok(self.open()?.client.stats().link())
    }

    /// Why the links share no memory with the node; None while they do.
    #[getter]
    fn not_shared(&self) -> PyResult<Option<String>> {
        Ok(self.open()?.client.stats().not_shared)
    }

    /// Size of the region that the node on this host writes into, for buffers of staging(); 0: there is none.
    #[getter]
    fn staging_bytes(&self) -> PyResult<u64> {
        Ok(self.open()?.client.stats().staging_bytes)
    }

    /// Why there is no such region although one is wanted (Client(staging=...)); None while there is one.
    #[getter]
    fn not_staged(&self) -> PyResult<Option<String>> {
        Ok(self.open()?.client.stats().not_staged)
    }

    /// Hits whose bytes the node wrote where they are read, since the client was made.
    #[getter]
    fn hits_placed(&self) -> PyResult<u64> {
        Ok(self.open()?.client.stats().hits_placed)
    }

    /// Memory of so many bytes for what is read.
    ///
    /// Where the client has a region with room for it (Client(staging=...)) the node writes there what a get
    /// asks for; else it is plain memory for the same gets. Asks nobody, and takes no time.
    fn staging(&self, nbytes: usize) -> PyResult<PyStaging> {
        Ok(PyStaging::new(&self.open()?.client, nbytes))
    }

    /// How much the operator wants engines to use the store: "off", "observe", "save" or "load".
    ///
    /// Nothing is asked: the node tells of a switch by itself. "load" until a link has stood, and
    /// calls are made in every mode: whoever uses the store for an engine obeys.
    #[getter]
    fn mode(&self) -> PyResult<&'static str> {
        Ok(self.open()?.client.mode().word())
    }

    /// The longest block that the node takes, in bytes; None until a link stands.
    #[getter]
    fn block_bytes_max(&self) -> PyResult<Option<u32>> {
        let limits = self.open()?.client.limits();
        Ok(limits.map(|limits| limits.block_bytes_max))
    }

    /// How many bytes of blocks a put layer by layer may have announced at a time (what is more
    /// waits for its turn); None until a link stands.
    #[getter]
    fn announced_bytes_max(&self) -> PyResult<Option<u64>> {
        let limits = self.open()?.client.limits();
        Ok(limits.map(|limits| limits.bytes_max / kvar_client::ANNOUNCED_SHARE))
    }

    /// How many blocks it may have announced at a time; None until a link stands.
    #[getter]
    fn announced_blocks_max(&self) -> PyResult<Option<u64>> {
        let limits = self.open()?.client.limits();
        Ok(limits.map(|limits| u64::from(limits.requests_max) / kvar_client::ANNOUNCED_SHARE))
    }

    /// How many leading blocks of a chain are there; refreshes their recency.
    ///
    /// `request` is the prompt's number as in PutHints. Raises ConnectError or RequestError when
    /// nobody could be asked: that is not "none".
    #[pyo3(signature = (ids, *, deadline_ms = None, request = 0))]
    fn lookup(
        &self,
        py: Python<'_>,
        ids: Vec<PyBackedBytes>,
        deadline_ms: Option<u64>,
        request: u64,
    ) -> PyResult<usize> {
        let (open, ids) = (self.open()?, block_ids(&ids)?);
        let options = CallOptions {
            touch_request: request,
            ..self.options(deadline_ms)
        };
        let lookup = py.detach(|| open.client.submit_lookup(ids, options).wait());
        was_asked(Some(&open), lookup.leading, lookup.reason)?;
        Ok(lookup.leading)
    }

    /// As lookup, and what is there stays for `ttl_s` seconds (30 at most), unless it is removed.
    ///
    /// A node promises a share of its memory and flash; beyond that `reason` is "overloaded" and
    /// `leading` counts what is promised. Raises as lookup does.
    #[pyo3(signature = (ids, *, ttl_s = 2.0, deadline_ms = None, request = 0))]
    fn lookup_leased(
        &self,
        py: Python<'_>,
        ids: Vec<PyBackedBytes>,
        ttl_s: f64,
        deadline_ms: Option<u64>,
        request: u64,
    ) -> PyResult<PyLease> {
        self.submit_lookup_leased(ids, ttl_s, deadline_ms, request)?
            .result(py)
    }

    /// As lookup_leased, without waiting.
    #[pyo3(signature = (ids, *, ttl_s = 2.0, deadline_ms = None, request = 0))]
    fn submit_lookup_leased(
        &self,
        ids: Vec<PyBackedBytes>,
        ttl_s: f64,
        deadline_ms: Option<u64>,
        request: u64,
    ) -> PyResult<PyPendingLease> {
        let (open, ids, ttl) = (self.open()?, block_ids(&ids)?, lease_time(ttl_s)?);
        let options = CallOptions {
            touch_request: request,
            ..self.options(deadline_ms)
        };
        let pending = open.client.submit_lookup_leased(ids, ttl, options);
        Ok(PyPendingLease::of(pending, &open, self.options(None)))
    }

    /// Lets the lease of this token last `ttl_s` seconds from now (30 at most): how many seconds it
    /// lasts, or None if it has ended.
    #[pyo3(signature = (token, ttl_s = 2.0, *, deadline_ms = None))]
    fn renew(
        &self,
        py: Python<'_>,
        token: &[u8],
        ttl_s: f64,
        deadline_ms: Option<u64>,
    ) -> PyResult<Option<f64>> {
        let (open, token, ttl) = (self.open()?, lease_token(token)?, lease_time(ttl_s)?);
        let options = self.options(deadline_ms);
        let until = py
            .detach(|| open.client.renew(token, ttl, options))
            .map_err(|error| raise(&error))?;
        let now = Instant::now();
        Ok(until.map(|until| until.saturating_duration_since(now).as_secs_f64()))
    }

    /// Ends the lease of this token; whether there was one.
    #[pyo3(signature = (token, *, deadline_ms = None))]
    fn release(&self, py: Python<'_>, token: &[u8], deadline_ms: Option<u64>) -> PyResult<bool> {
        let (open, token) = (self.open()?, lease_token(token)?);
        let options = self.options(deadline_ms);
        py.detach(|| open.client.release(token, options))
            .map_err(|error| raise(&error))
    }

    /// For each block whether it is there; one that could not be asked for is not.
    #[pyo3(signature = (ids, *, deadline_ms = None))]
    fn present(
        &self,
        py: Python<'_>,
        ids: Vec<PyBackedBytes>,
        deadline_ms: Option<u64>,
    ) -> PyResult<Vec<bool>> {
        let (open, ids) = (self.open()?, block_ids(&ids)?);
        let options = self.options(deadline_ms);
        Ok(py.detach(|| open.client.submit_present(ids, options).wait()))
    }

    /// Reads blocks: items are (id, buffer) or (id, [buffer of each section]).
    ///
    /// A buffer has exactly the length of what it takes. A GetResult for each item, in order;
    /// bytes in a buffer count only after "hit". `depth` is the place of the first item in its
    /// chain, `request` the prompt's number as in PutHints.
    #[pyo3(signature = (items, *, deadline_ms = None, depth = 0, request = 0))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        items: &Bound<'py, PyAny>,
        deadline_ms: Option<u64>,
        depth: u32,
        request: u64,
    ) -> PyResult<Bound<'py, PyList>> {
        self.submit_get(items, deadline_ms, depth, request)?
            .wait(py, None)
    }

    /// One block's bytes, or None if they are not to be had.
    #[pyo3(signature = (id, *, deadline_ms = None))]
    fn get_bytes<'py>(
        &self,
        py: Python<'py>,
        id: &[u8],
        deadline_ms: Option<u64>,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let (open, item) = (self.open()?, GetItem::to_vec(block_id(id)?));
        let options = self.options(deadline_ms);
        let results = py.detach(|| open.client.submit_get(vec![item], options).wait());
        Ok(results
            .first()
            .and_then(|result| result.bytes())
            .map(|bytes| PyBytes::new(py, bytes)))
    }

    /// Reads block i into bytes indices[i] * page_bytes onwards of every layer, a section each.
    #[pyo3(signature = (
        ids, layers, indices, page_bytes, *, deadline_ms = None, depth = 0, request = 0,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn get_pages<'py>(
        &self,
        py: Python<'py>,
        ids: Vec<PyBackedBytes>,
        layers: Vec<Bound<'py, PyAny>>,
        indices: Vec<usize>,
        page_bytes: usize,
        deadline_ms: Option<u64>,
        depth: u32,
        request: u64,
    ) -> PyResult<Bound<'py, PyList>> {
        self.submit_get_pages(
            ids,
            layers,
            indices,
            page_bytes,
            deadline_ms,
            depth,
            request,
        )?
        .wait(py, None)
    }

    /// Stores blocks: items are (id, buffer) or (id, [buffer of each section]).
    ///
    /// An outcome word for each, in order. `durable` waits until it is safe against power loss;
    /// `depth` is the place of the first item in its chain, the others stand behind it; `ttl_s` is
    /// how many seconds the blocks live (None: until they make room for others); `hints` is what the
    /// writer knows about their worth.
    #[pyo3(signature = (
        items, *, deadline_ms = None, durable = false, depth = 0, ttl_s = None, hints = None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn put<'py>(
        &self,
        py: Python<'py>,
        items: &Bound<'py, PyAny>,
        deadline_ms: Option<u64>,
        durable: bool,
        depth: u32,
        ttl_s: Option<u32>,
        hints: Option<PyPutHints>,
    ) -> PyResult<Bound<'py, PyList>> {
        self.submit_put(items, deadline_ms, durable, depth, ttl_s, hints)?
            .wait(py, None)
    }

    /// Stores bytes indices[i] * page_bytes onwards of every layer as block i, a section each.
    #[pyo3(signature = (
        ids, layers, indices, page_bytes, *, deadline_ms = None, durable = false, depth = 0,
        ttl_s = None, hints = None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn put_pages<'py>(
        &self,
        py: Python<'py>,
        ids: Vec<PyBackedBytes>,
        layers: Vec<Bound<'py, PyAny>>,
        indices: Vec<usize>,
        page_bytes: usize,
        deadline_ms: Option<u64>,
        durable: bool,
        depth: u32,
        ttl_s: Option<u32>,
        hints: Option<PyPutHints>,
    ) -> PyResult<Bound<'py, PyList>> {
        self.submit_put_pages(
            ids,
            layers,
            indices,
            page_bytes,
            deadline_ms,
            durable,
            depth,
            ttl_s,
            hints,
        )?
        .wait(py, None)
    }

    /// Removes blocks for good, safe against power loss; how many were there.
    #[pyo3(signature = (ids, *, deadline_ms = None))]
    fn remove(
        &self,
        py: Python<'_>,
        ids: Vec<PyBackedBytes>,
        deadline_ms: Option<u64>,
    ) -> PyResult<u64> {
        let (open, ids) = (self.open()?, block_ids(&ids)?);
        let options = self.options(deadline_ms);
        py.detach(|| open.client.remove(&ids, options))
            .map_err(|error| raise(&error))
    }

    /// Returns when all that was acknowledged before is safe against power loss.
    #[pyo3(signature = (*, deadline_ms = None))]
    fn flush(&self, py: Python<'_>, deadline_ms: Option<u64>) -> PyResult<()> {
        let (open, options) = (self.open()?, self.options(deadline_ms));
        py.detach(|| open.client.flush(options))
            .map_err(|error| raise(&error))
    }

    /// What the node says of itself.
    #[pyo3(signature = (*, deadline_ms = None))]
    fn status<'py>(
        &self,
        py: Python<'py>,
        deadline_ms: Option<u64>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let (open, options) = (self.open()?, self.options(deadline_ms));
        let text = py
            .detach(|| open.client.status(options))
            .map_err(|error| raise(&error))?;
        let document = py.import("json")?.call_method1("loads", (text,))?;
        document.cast_into().map_err(Into::into)
    }

    /// As get, without waiting.
    #[pyo3(signature = (items, *, deadline_ms = None, depth = 0, request = 0))]
    fn submit_get(
        &self,
        items: &Bound<'_, PyAny>,
        deadline_ms: Option<u64>,
        depth: u32,
        request: u64,
    ) -> PyResult<PyPending> {
        self.submit_gets(Blocks::of_items(items, true)?, deadline_ms, depth, request)
    }

    /// As put, without waiting, not even for the content checks.
    #[pyo3(signature = (
        items, *, deadline_ms = None, durable = false, depth = 0, ttl_s = None, hints = None,
    ))]
    fn submit_put(
        &self,
        items: &Bound<'_, PyAny>,
        deadline_ms: Option<u64>,
        durable: bool,
        depth: u32,
        ttl_s: Option<u32>,
        hints: Option<PyPutHints>,
    ) -> PyResult<PyPending> {
        let words = PutWords::new(durable, depth, ttl_s, hints)?;
        self.submit_puts(Blocks::of_items(items, false)?, deadline_ms, words)
    }

    /// As get_pages, without waiting.
    #[pyo3(signature = (
        ids, layers, indices, page_bytes, *, deadline_ms = None, depth = 0, request = 0,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn submit_get_pages(
        &self,
        ids: Vec<PyBackedBytes>,
        layers: Vec<Bound<'_, PyAny>>,
        indices: Vec<usize>,
        page_bytes: usize,
        deadline_ms: Option<u64>,
        depth: u32,
        request: u64,
    ) -> PyResult<PyPending> {
        let blocks = Blocks::of_pages(&ids, &layers, indices, page_bytes, true)?;
        self.submit_gets(blocks, deadline_ms, depth, request)
    }

    /// As submit_get_pages, layer by layer: section 0 of all blocks, then section 1 of all. The
    /// handle says of each section when it is there.
    ///
    /// With `wait_announced` a block that a writer has announced is waited for, until it is there,
    /// its writer gave up, or the deadline.
    #[pyo3(signature = (
        ids, layers, indices, page_bytes, *, deadline_ms = None, depth = 0, request = 0,
        wait_announced = false,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn submit_get_layers(
        &self,
        ids: Vec<PyBackedBytes>,
        layers: Vec<Bound<'_, PyAny>>,
        indices: Vec<usize>,
        page_bytes: usize,
        deadline_ms: Option<u64>,
        depth: u32,
        request: u64,
        wait_announced: bool,
    ) -> PyResult<PyLayerGet> {
        let blocks = Blocks::of_pages(&ids, &layers, indices, page_bytes, true)?;
        let open = self.open()?;
        let (items, exported) = blocks.into_layers(depth)?;
        let options = CallOptions {
            touch_request: request,
            wait_announced,
            ..self.options(deadline_ms)
        };
        let get = open.client.submit_get_layers(items, options);
        Ok(PyLayerGet::of(get, exported))
    }

    /// As put_pages, without waiting, not even for the content checks.
    #[pyo3(signature = (
        ids, layers, indices, page_bytes, *, deadline_ms = None, durable = false, depth = 0,
        ttl_s = None, hints = None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn submit_put_pages(
        &self,
        ids: Vec<PyBackedBytes>,
        layers: Vec<Bound<'_, PyAny>>,
        indices: Vec<usize>,
        page_bytes: usize,
        deadline_ms: Option<u64>,
        durable: bool,
        depth: u32,
        ttl_s: Option<u32>,
        hints: Option<PyPutHints>,
    ) -> PyResult<PyPending> {
        let words = PutWords::new(durable, depth, ttl_s, hints)?;
        let blocks = Blocks::of_pages(&ids, &layers, indices, page_bytes, false)?;
        self.submit_puts(blocks, deadline_ms, words)
    }

    /// As submit_put_pages, layer by layer: the blocks are announced now, and each section is sent
    /// when the handle is told that it is filled. They become visible after its commit.
    ///
    /// `deadline_ms` is for all of it; what the writer computes meanwhile counts.
    #[pyo3(signature = (
        ids, layers, indices, page_bytes, *, deadline_ms = None, durable = false, depth = 0,
        ttl_s = None, hints = None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn submit_put_layers(
        &self,
        ids: Vec<PyBackedBytes>,
        layers: Vec<Bound<'_, PyAny>>,
        indices: Vec<usize>,
        page_bytes: usize,
        deadline_ms: Option<u64>,
        durable: bool,
        depth: u32,
        ttl_s: Option<u32>,
        hints: Option<PyPutHints>,
    ) -> PyResult<PyLayerPut> {
        let words = PutWords::new(durable, depth, ttl_s, hints)?;
        let open = self.open()?;
        let blocks = PageBlocks::new(&ids, &layers, indices, page_bytes, false)?;
        let items = blocks.to_layer_puts(&words)?;
        let put = open.client.put_layers(items, self.options(deadline_ms));
        Ok(PyLayerPut::of(put, blocks, &open.preparer, self.deadline))
    }

    /// Ends the connection; calls under way end without an outcome. Closing twice is fine.
    fn close(&self, py: Python<'_>) {
        let open = self
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // The last user of a client waits for its thread to end.
        py.detach(|| drop(open));
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (_kind, _value, _traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) {
        self.close(py);
    }

    fn __repr__(&self) -> String {
        let open = self
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some();
        format!(
            "Client({:?}, {})",
            self.endpoint,
            if open { "open" } else { "closed" }
        )
    }
}

impl Drop for PyClient {
    fn drop(&mut self) {
        let open = self
            .open
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // Python drops objects with its lock held, and joining a thread is no time to hold it.
        if let Some(open) = open {
            Python::try_attach(|py| py.detach(|| drop(open)));
        }
    }
}
