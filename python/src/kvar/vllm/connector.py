"""``KvarConnector``: the part that speaks vLLM. Thin; the decisions are in planner and worker.

vLLM builds it twice, in processes of their own: once in the scheduler, once in each worker. They
share no memory. What they share goes three ways: orders in each step's metadata, reports in each
step's output, and the content fingerprint once at start, from the workers to the scheduler.

```text
scheduler process                              worker process (one a rank)
  Planner --lookup--> store                      Mover --get/put pages--> store
     |  StepOrders in KVConnectorMetadata  ------>  ^
     ^  reports, received ids, bad pages   <------  |
```

Loads are asynchronous (the request waits outside the batch, other requests run on), saves too. With
``load: layers`` a load is part of its step instead, and each layer waits for its own. With ``save:
layers`` a save begins in its step: each layer is sent while the next one is computed.
Pages being saved are held by a reference in vLLM's own block pool, so that finishing, aborting or
preempting their request takes them from nobody's hands.

What a lookup found is leased: it stays in the store until the request has it or wants it no more,
although lookup and load happen in different processes (a lease belongs to nobody's connection).

Left to vLLM: hashing of tokens (its chained block hashes, with LoRA, image and salt in them),
what to recompute after a failed load, and the choice of what is loaded when.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger

import kvar
from kvar.vllm.choice import Choice
from kvar.vllm.events import EventMaker
from kvar.vllm.finder import Finder
from kvar.vllm.fingerprint import config_digest, fingerprint_text, model_name
from kvar.vllm.groups import Group, Groups
from kvar.vllm.introduction import introduction, is_tried, untried
from kvar.vllm.link import AWAY, Link
from kvar.vllm.metrics import HookTimes, merge
from kvar.vllm.orders import (
    FailedLoad,
    LayersReport,
    LoadReport,
    SaveReport,
    StepOrders,
    merge_failed,
    merge_reports,
)
from kvar.vllm.pages import DirectPages, pages_of
from kvar.vllm.planner import Found, Planner, Unanswered
from kvar.vllm.refusals import groups_of
from kvar.vllm.settings import LoadWay, Mode, SaveWay, Settings, SettingsError
from kvar.vllm.stats import KvarPromMetrics, KvarStats
from kvar.vllm.worker import Ended, GroupPages, Mover

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvar")

# A lookup before the workers have said how blocks are named, in the words of kvar.vllm.funnel.
NOT_NAMED = "not_named"


class Orders(KVConnectorMetadata):
    """A step's orders, in the wrapping that vLLM carries from scheduler to workers."""

    def __init__(self, orders: StepOrders) -> None:
        self.orders = orders


class Reports(KVConnectorWorkerMetadata):
    """Ends of saves, loads and steps, in the wrapping that vLLM carries back."""

    def __init__(
        self,
        reports: dict[int, SaveReport],
        loads: LoadReport,
        step: int = 0,
        layers: LayersReport | None = None,
        failed: dict[str, FailedLoad] | None = None,
        texts: frozenset[tuple[str, ...]] = frozenset(),
    ) -> None:
        self.texts = texts
        self.reports = reports
        self.loads = loads
        self.step = step
        self.layers = layers if layers is not None else LayersReport()
        self.failed = failed if failed is not None else {}

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Reports:
        """Adds another rank's reports."""
        assert isinstance(other, Reports)
        reports = merge_reports(self.reports, other.reports)
        loads, step = self.loads + other.loads, max(self.step, other.step)
        failed = merge_failed(self.failed, other.failed)
        texts = self.texts | other.texts
        return Reports(reports, loads, step, self.layers + other.layers, failed, texts)


class Greeting(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler at start: how it names its blocks, group by group."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.texts = texts


class KvarConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps the KV of prompts and answers in a kvar store, and brings it back.

    Set ``kv_connector`` to ``KvarConnector``, ``kv_connector_module_path`` to ``kvar.vllm``,
    ``kv_role`` to ``kv_both`` and ``kv_load_failure_policy`` to ``recompute``; the settings of
    ``kv_connector_extra_config`` are those of :class:`kvar.vllm.settings.Settings`.
    """

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is lost is a miss later; no request has to be run again for it."""
        return False

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        import vllm

        self._settings = Settings.from_extra_config(transfer.kv_connector_extra_config or {})
        version = str(vllm.__version__)
        self._is_untried = not is_tried(version) and not self._settings.any_version
        if self._is_untried:
            logger.warning("%s", untried(version))
            self._settings = replace(self._settings, mode=Mode.OFF)
            self._groups = Groups.one(vllm_config.cache_config.block_size)
        else:
            self._groups = groups_of(
                vllm_config, kv_cache_config, self._settings.load, self._settings.save
            )
        self._key = kvar.NamespaceKey.from_file(self._settings.namespace_key_file)
        parallel = vllm_config.parallel_config
        self._ranks: int = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        # Ranks that hold the same bytes (MLA, fewer KV heads than ranks) store them once.
        self._replicas: int = getattr(kv_cache_config, "kv_tp_replicas", 1)
        self._slices: int = self._ranks // self._replicas
        name = introduction(
            vllm_config,
            version,
            role.name.lower(),
            slices=self._slices,
            groups=len(self._groups.all),
        )
        self._link = Link.to(self._settings, name)
        self._by_layers = self._settings.load is LoadWay.LAYERS
        self._saves_by_layers = self._settings.save is SaveWay.LAYERS
        if self._by_layers and self._ranks > 1:
            raise SettingsError(
                f"kvar: load is layers with {self._ranks} ranks: a rank does not know in time that "
                "another one's load failed, and would save what was computed on it. Set load to "
                "async."
            )
        # Scheduler side.
        self._finder: Finder | None = None
        self._pool: BlockPool | None = None
        # Worker side.
        self._mover: Mover | None = None
        self._texts: tuple[str, ...] | None = None
        self._is_introduced = False
        self._ended = Ended()
        self._layer_places: dict[str, tuple[int, int]] = {}
        self._saves_begun = False
        self._hooks = HookTimes(role.name.lower())
        self._step_computes = False
        mode = self._settings.mode
        self._planner = Planner(
            groups=self._groups,
            pool_blocks=kv_cache_config.num_blocks,
            ranks=self._ranks,
            slices=self._slices,
            loads=transfer.is_kv_consumer,
            saves=transfer.is_kv_producer,
            mode=lambda: mode.within(self._link.mode()),
            lookup=self._stored_tokens,
            hold=self._hold,
            release=self._release,
            choice=Choice(
                override=self._settings.choice, deadline_s=self._settings.deadline_ms / 1000
            ),
            lease_s=self._settings.lease_ms / 1000,
            by_layers=self._by_layers,
            announce=self._event_maker(),
            begin_lookup=self._begin_lookup,
            forget_lookup=self._forget_lookup,
        )
        logger.info(
            "kvar: %s of namespace %s at %s, mode %s, key %s",
            role.name.lower(),
            self._settings.namespace,
            self._settings.endpoint,
            mode.value,
            self._key.short_name,
        )

    # ---- scheduler ----

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Takes the workers' fingerprint, without which no block can be named."""
        if self._is_untried:
            return
        texts = {said.texts for said in metadata.values() if isinstance(said, Greeting)}
        # Another connector beside this one, first in a MultiConnector, speaks alone; the workers
        # say it again in their first step.
        if texts and not self._take_texts(texts):
            raise SettingsError(
                f"kvar: {self._ranks} ranks named their KV content in {len(texts)} ways; all ranks "
                "need the same model, layer count and KV layout (pipeline parallelism: a layer "
                "count that the stages divide)"
            )

    def _take_texts(self, texts: Set[tuple[str, ...]]) -> bool:
        """Whether all ranks say the same, so that blocks can be named."""
        if len(texts) != 1:
            return False
        (these,) = texts
        self._finder = Finder(
            store=self._link,
            key=self._key,
            groups=self._groups,
            texts=these,
            slices=self._slices,
            deadline_ms=self._settings.lookup_deadline_ms,
        )
        return True

    def _event_maker(self) -> Callable[[Any, Group, int, int], object] | None:
        events = self._vllm_config.kv_events_config
        if self._is_untried or events is None or not events.enable_kv_cache_events:
            return None
        return EventMaker(self._groups, self._kv_cache_config).stored

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Which blocks are in the store now by this engine."""
        return self._planner.take_announced()

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Takes vLLM's pool of pages, where pages being saved are held."""
        self._pool = gpu_block_pool
        self._planner.null_block = gpu_block_pool.null_block.block_id

    def _hold(self, block_ids: Sequence[int]) -> None:
        assert self._pool is not None
        self._pool.touch([self._pool.blocks[block_id] for block_id in block_ids])

    def _release(self, block_ids: Sequence[int]) -> None:
        assert self._pool is not None
        # The end of a chain is worth least: it goes to the front of what is reused.
        self._pool.free_blocks(self._pool.blocks[block_id] for block_id in reversed(block_ids))

    def _stored_tokens(
        self, chain: Sequence[bytes], tokens: int, request: int, lease_s: float
    ) -> Found | Unanswered:
        if self._link.client() is None:
            return Unanswered(AWAY)
        if self._finder is None:
            return Unanswered(NOT_NAMED)
        return self._finder.find(chain, tokens, request, lease_s, self._planner.salt)

    def _begin_lookup(
        self, chain: Sequence[bytes], tokens: int, request: int, lease_s: float
    ) -> None:
        if self._finder is not None:
            self._finder.begin(chain, tokens, request, lease_s, self._planner.salt)

    def _forget_lookup(self, request: int) -> None:
        if self._finder is not None:
            self._finder.forget(request)

    def on_new_request(self, request: Request) -> None:
        """Asks the store about it, so that the answer is there when the scheduler asks."""
        if self._is_untried or request.skip_reading_prefix_cache:
            return
        with self._hooks("on_new_request"):
            self._planner.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How much of the prompt is in the store beyond what the engine has itself."""
        if self._is_untried:
            return 0, False
        with self._hooks("get_num_new_matched_tokens"):
            if request.skip_reading_prefix_cache:
                self._planner.passed_over(request)
                return 0, False
            tokens = self._planner.matched(request, num_computed_tokens)
        return tokens, tokens > 0 and not self._by_layers

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Orders the load, now that there are pages to load into."""
        if self._is_untried:
            return
        with self._hooks("update_state_after_alloc"):
            block_ids = blocks.get_block_ids() if num_external_tokens else ()
            self._planner.allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The orders of this step."""
        state = scheduler_output.kv_connector_block_state

        def block_ids_of(request_id: str) -> Sequence[Sequence[int]] | None:
            return state.get_block_ids(request_id) if state is not None else None

        with self._hooks("build_connector_meta"):
            orders = self._planner.step(scheduler_output.num_scheduled_tokens, block_ids_of)
            self._step_computes = self._step_computes or orders.tokens > 0
            return Orders(orders)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Takes in what the workers reported."""
        with self._hooks("update_connector_output"):
            meta = connector_output.kv_connector_worker_meta
            said = meta if isinstance(meta, Reports) else Reports({}, LoadReport())
            if self._finder is None and said.texts and not self._take_texts(said.texts):
                logger.error("kvar: ranks name their KV content in several ways; nothing is found")
            self._planner.worker_said(
                reports=said.reports,
                loads=said.loads,
                step=said.step,
                failures=said.layers.failures,
                loaded={*(connector_output.finished_recving or ()), *said.layers.loaded},
                failed=said.failed,
            )

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As below, where there is one group."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Orders what is left to save. The request's pages need not wait: we hold ours."""
        self._planner.finished(request, block_ids)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Keeps the engine stepping while saves are under way, so that their holds end."""
        return self._planner.has_work

    def reset_cache(self) -> bool | None:
        """Makes everything stored so far unreachable for this engine.

        A reset is how callers say "the weights have changed": nothing older may come back.
        """
        self._planner.reset(uuid.uuid4().hex)
        logger.info("kvar: cache reset; what was stored before is not used any more")
        return True

    # ---- worker ----

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Takes the engine's KV memory."""
        if self._is_untried:
            return
        groups = []
        for group in self._groups.all:
            caches = self._caches_of(group, kv_caches)
            # Layers that share another layer's KV appear twice; their bytes are stored once.
            layers = list({layer.data_ptr(): layer for layer in caches.values()}.values())
            groups.append(self._group_pages(group, next(iter(caches)), layers))
            places = {layer.data_ptr(): number for number, layer in enumerate(layers)}
            for name, layer in caches.items():
                self._layer_places[name] = (group.number, places[layer.data_ptr()])
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        tensor_ranks = self._vllm_config.parallel_config.tensor_parallel_size
        rank = get_pp_group().rank_in_group * tensor_ranks + get_tp_group().rank_in_group
        # Replicas are neighbours: the first of them saves, all load the same.
        mine = rank // self._replicas
        self._texts = tuple(group.text for group in groups)
        self._mover = Mover(
            link=self._link,
            groups=groups,
            key=self._key,
            head_slice=(mine, self._slices),
            saves=rank % self._replicas == 0,
            deadline_ms=self._settings.deadline_ms,
            traffic_class=self._settings.traffic_class,
            handover=self._settings.handover,
            fail_whole=self._groups.fail_whole,
        )
        for text in self._texts:
            logger.info("kvar: slice %d of %d, %s", mine, self._slices, text.replace("\n", " "))

    def _caches_of(self, group: Group, caches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The memory of one group's layers."""
        if len(self._groups.all) == 1:
            return caches
        # Layers that share another layer's KV are in no group.
        names = self._kv_cache_config.kv_cache_groups[group.number].layer_names
        return {name: caches[name] for name in names}

    def _group_pages(self, group: Group, name: str, layers: list[torch.Tensor]) -> GroupPages:
        blocks = self._kv_cache_config.num_blocks
        if any(layer.shape[0] != blocks for layer in layers):
            raise SettingsError(
                f"kvar: the attention backend's KV memory is of shape {tuple(layers[0].shape)}, "
                f"which does not begin with the {blocks} pages; use another attention backend"
            )
        pages = pages_of(layers)
        ways = {"load": (self._by_layers, "async"), "save": (self._saves_by_layers, "after")}
        for name_, (is_layered, other) in ways.items():
            if is_layered and not isinstance(pages, DirectPages):
                raise SettingsError(
                    f"kvar: {name_} is layers, which works on pages in contiguous host memory; "
                    f"these are on a device, or strewn. Set {name_} to {other}."
                )
        first = layers[0]
        bytes_a_block = first[0].numel() * first.element_size() * len(layers)
        return GroupPages(pages, self._content_text(group, name, first, len(layers)), bytes_a_block)

    def _content_text(self, group: Group, name: str, first: torch.Tensor, layers: int) -> str:
        import vllm

        model = self._vllm_config.model_config
        context = self._vllm_config.compilation_config.static_forward_context
        layer = context.get(name)
        backend = layer.get_attn_backend().get_name() if layer is not None else "unknown"
        facts = [
            ("vllm", ".".join(vllm.__version__.split(".")[:2])),
            ("model", model_name(model.model)),
            ("revision", model.revision),
            ("config", config_digest(model.hf_config.to_dict())),
            ("dtype", model.dtype),
            ("cache_dtype", first.dtype),
            ("cache_kind", self._vllm_config.cache_config.cache_dtype),
            ("quantization", model.quantization),
            ("block_tokens", group.block_tokens),
            ("layers", layers),
            ("page", tuple(first.shape[1:])),
            ("stride", tuple(first.stride()[1:])),
            ("layout", self._kv_cache_config.kv_cache_layout),
            # The CPU backend packs keys by instruction set; others have no such attribute.
            ("backend", f"{backend}/{getattr(layer, 'isa', '')}"),
        ]
        if self._groups.fail_whole:
            facts.append(("group", f"{group.number} of {len(self._groups.all)}"))
            facts.append(("window", group.window))
        return fingerprint_text(facts)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the scheduler needs to name the same blocks."""
        return Greeting(self._texts) if self._texts is not None else None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins, with these orders."""
        self._hooks.step_began()
        self._saves_begun = False
        if self._mover is not None:
            # Of a step that did not come to its end.
            self._mover.give_up()
        super().bind_connector_metadata(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Starts the loads of this step."""
        orders = self._step_orders()
        if self._mover is None or orders is None:
            return
        with self._hooks("start_load_kv"):
            start = self._mover.start_layers if self._by_layers else self._mover.start_load
            for order in orders.loads:
                start(order, orders.salt)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads by layers: waits for this one. Otherwise nothing: requests run once all arrived."""
        if self._by_layers and self._mover is not None:
            place = self._layer_places.get(layer_name)
            if place is not None:
                with self._hooks("wait_for_layer_load"):
                    self._mover.wait_layer(place[1])

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Saves by layers: sends this one. Otherwise whole blocks are saved after the step."""
        orders = self._step_orders() if self._saves_by_layers else None
        if self._mover is None or orders is None or not orders.saves:
            return
        place = self._layer_places.get(layer_name)
        if place is None:
            return
        with self._hooks("save_kv_layer"):
            if not self._saves_begun:
                self._saves_begun = True
                if orders.failures_heard == self._mover.failures:
                    self._mover.begin_saves(orders.saves, orders.salt)
            self._mover.computed(*place)

    def wait_for_save(self) -> None:
        """Starts the saves of this step, or commits those under way; waits for none."""
        orders = self._step_orders()
        if self._mover is None or orders is None:
            return
        with self._hooks("wait_for_save"):
            step_ended = time.monotonic()
            self._mover.finish_layers()
            may_save = orders.failures_heard == self._mover.failures
            for order in orders.saves:
                if may_save:
                    self._mover.start_save(order, orders.salt, step_ended)
                else:
                    self._mover.refuse_save(order)

    def _step_orders(self) -> StepOrders | None:
        metadata = self._connector_metadata
        return metadata.orders if isinstance(metadata, Orders) else None

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose load has ended, well or not."""
        if self._mover is not None:
            orders = self._step_orders()
            if orders is not None and not orders.tokens:
                self._mover.wait()
            with self._hooks("get_finished"):
                self._ended = self._mover.ended()
        return None, self._ended.loaded or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The same, with those that got nothing of use where pages cannot say it."""
        _, loaded = self.get_finished(finished_req_ids)
        return KVConnectorTransferResults(
            finished_recving=set(loaded or ()), failed_recving=set(self._ended.useless)
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that could not be loaded, of the loads that have just ended."""
        return self._ended.bad_block_ids

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Saves that have just ended, how fast loads were, and the step if that is asked for."""
        orders = self._step_orders()
        step = orders.step if orders is not None else 0
        ended = self._ended
        says: object = (
            step or ended.reports or ended.loads.tokens or ended.layers.loaded or ended.failed
        )
        texts = frozenset({self._texts} if self._texts and not self._is_introduced else ())
        self._is_introduced = True
        if not says and not texts:
            return None
        return Reports(ended.reports, ended.loads, step, ended.layers, ended.failed, texts)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """What goes by layers needs a hook in every layer, which a graph of all layers has not."""
        ways = (LoadWay.LAYERS.value, SaveWay.LAYERS.value)
        return extra_config.get("load") == ways[0] or extra_config.get("save") == ways[1]

    # ---- both ----

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counts since the last call, which each side makes once a step."""
        data: dict[str, Any] = dict(self._planner.counters.take())
        orders = self._step_orders()
        if self._mover is not None:
            data.update(self._mover.counters.take())
        computed = self._step_computes or (orders is not None and orders.tokens > 0)
        merge(data, self._hooks.step_ended(computed=computed))
        self._step_computes = False
        return KvarStats(data=data) if data else None

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        """Counts as they come out of another process."""
        return KvarStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """The counts as metrics of the API server's own endpoint."""
        return KvarPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Lets go of the node; calls under way end by their deadlines."""
        if self._mover is not None:
            self._mover.give_up()
        self._link.close()


# In a MultiConnector vLLM finds a connector's counts again by its name alone. The error is for a
# name that is there already.
with contextlib.suppress(ValueError):
    KVConnectorFactory.register_connector("KvarConnector", "kvar.vllm", "KvarConnector")
