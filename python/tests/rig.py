"""vLLM's real scheduler, block pool and connectors over a real node; the model is a stand-in.

What a rank "computes" of a token is a number that only this prefix gives, in memory like vLLM's:
the layers of all groups lie over each other, page by page. Before a token is computed everything
that it would attend to is compared with those numbers, so that a page that was loaded wrongly, into
the wrong place, or not at all fails the test in the step that would have used it. Needs torch and
vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from conftest import Node, until

STEP_WAIT_S_MAX = 60.0
HEADS = 2
CONTENT = 4
KNUTH = 2654435761


class Loose(SimpleNamespace):
    """Settings of which only some are set; vLLM's code reads many that are off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def transfer(node: Node, role: str = "kv_both", **extra: object) -> dict[str, Any]:
    """The setting of vLLM for the connector."""
    settings = {
        "endpoint": node.endpoint,
        "namespace_key_file": str(node.key_file),
        "lookup_deadline_ms": 5000,
        "deadline_ms": 5000,
        "choice": "always",
        "any_version": True,
    }
    return {
        "kv_connector": "KvarConnector",
        "kv_connector_module_path": "kvar.vllm",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings | extra,
    }


def full(block: int = 16, **more: Any) -> Any:
    """A kind of layer: full attention."""
    return spec_of("FullAttentionSpec", block, **more)


def windowed(window: int, block: int = 16) -> Any:
    """A kind of layer: a sliding window."""
    return spec_of("SlidingWindowSpec", block, sliding_window=window)


def latent(block: int = 16) -> Any:
    """A kind of layer: MLA, whose KV is the same on all ranks."""
    return spec_of("MLAAttentionSpec", block, num_kv_heads=1, max_tp_shards=1)


def spec_of(kind: str, block: int, **more: Any) -> Any:
    import torch
    from vllm.v1 import kv_cache_interface

    facts = {"num_kv_heads": HEADS, "head_size": 64, "dtype": torch.float32} | more
    return getattr(kv_cache_interface, kind)(block_size=block, **facts)


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """What vLLM's worker of this tensor-parallel rank would be told."""
    from vllm.distributed import parallel_state

    before = parallel_state.get_tp_group, parallel_state.get_pp_group
    parallel_state.get_tp_group = lambda: SimpleNamespace(rank_in_group=rank)
    parallel_state.get_pp_group = lambda: SimpleNamespace(rank_in_group=0)
    try:
        yield
    finally:
        parallel_state.get_tp_group, parallel_state.get_pp_group = before


class Rank:
    """One worker: its memory and its half of the connector."""

    def __init__(self, rig: Rig, number: int) -> None:
        import torch
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

        self.rig = rig
        # Replicas compute the same.
        self.slice = number // rig.cache.kv_tp_replicas
        self.layers: dict[str, Any] = {}
        largest = max(group.kv_cache_spec.block_size for group in rig.cache.kv_cache_groups)
        memory = [
            torch.zeros(rig.cache.num_blocks * largest * HEADS * CONTENT, dtype=torch.int64)
            for _ in range(rig.layers_a_group)
        ]
        for group in rig.cache.kv_cache_groups:
            block = group.kv_cache_spec.block_size
            heads = largest // block * HEADS
            for name, bytes_of_all in zip(group.layer_names, memory, strict=True):
                self.layers[name] = bytes_of_all.view(rig.cache.num_blocks, heads, block, CONTENT)
        names = [group.layer_names for group in rig.cache.kv_cache_groups]
        self.in_order = [
            (group, place, names[group][place])
            for place in range(rig.layers_a_group)
            for group in range(len(names))
        ]
        self.connector: Any = KVConnectorFactory.create_connector(
            rig.config, KVConnectorRole.WORKER, rig.cache
        )
        with as_rank(number):
            self.connector.register_kv_caches(self.layers)

    def forward_context(self) -> Any:
        """What ``start_load_kv`` is given: ExampleConnector finds the layers in it."""
        layers = {name: SimpleNamespace(kv_cache=layer) for name, layer in self.layers.items()}
        return SimpleNamespace(no_compile_layers=layers, attn_metadata=dict.fromkeys(layers))

    def step(self, output: Any) -> Any:
        """One step as vLLM's worker does it."""
        from vllm.v1.outputs import KVConnectorOutput

        connector, said = self.connector, KVConnectorOutput()
        connector.handle_preemptions(output.kv_connector_metadata)
        connector.bind_connector_metadata(output.kv_connector_metadata)
        if output.has_sync_kv_loads:
            connector.start_load_kv(self.forward_context())
        numbers = {
            request_id: self.rig.scheduled_numbers(request_id)
            for request_id in output.num_scheduled_tokens
        }
        # Layer by layer, as a model: of the layers behind nothing is there yet.
        for group, place, name in self.in_order:
            connector.wait_for_layer_load(name)
            for request_id, tokens in output.num_scheduled_tokens.items():
                self.compute(request_id, tokens, numbers[request_id], group, place)
            if numbers:
                connector.save_kv_layer(name, self.layers[name], None)
        self.rig.before_step_ends()
        if not output.has_sync_kv_loads:
            connector.start_load_kv(self.forward_context())
        connector.wait_for_save()
        results = connector.get_transfer_results(output.finished_req_ids)
        said.finished_sending = results.finished_sending or None
        said.finished_recving = results.finished_recving or None
        said.failed_recving = results.failed_recving
        said.invalid_block_ids = connector.get_block_ids_with_load_errors()
        said.kv_connector_stats = connector.get_kv_connector_stats()
        said.kv_connector_worker_meta = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        return said

    def compute(
        self, request_id: str, tokens: int, numbers: list[int], number: int, layer: int
    ) -> None:
        """Compares all that these tokens attend to in a layer, and writes what they add to it."""
        group = self.rig.cache.kv_cache_groups[number]
        table = self.rig.scheduler.kv_cache_manager.get_block_ids(request_id)[number]
        memory = self.layers[group.layer_names[layer]]
        spec = group.kv_cache_spec
        # The scheduler counts what it has just scheduled as computed.
        first = len(numbers) - tokens
        window = getattr(spec, "sliding_window", None)
        begin = max(first - window + 1, 0) if window else 0
        for position in range(begin, first + tokens):
            page, place = table[position // spec.block_size], position % spec.block_size
            expected = numbers[position] * 1000 + number * 100 + layer * 10 + self.slice
            here = memory[page, :, place, :]
            if position >= first:
                assert page != 0, "a token's own page is the null page"
                here[:] = expected
            elif self.rig.compares:
                assert (here == expected).all(), (request_id, number, position)


class Rig:
    """A scheduler and its ranks."""

    def __init__(
        self,
        connector: dict[str, Any],
        specs: Sequence[Any],
        *,
        ranks: int = 1,
        replicas: int = 1,
        blocks: int = 200,
        layers_a_group: int = 2,
        events: bool = False,
        greets: bool = True,
        step_tokens: int = 128,
        model: str = "some/model",
    ) -> None:
        import math

        from vllm.config import (
            CacheConfig,
            KVEventsConfig,
            KVTransferConfig,
            ObservabilityConfig,
            SchedulerConfig,
        )
        from vllm.config.aux_output import AuxOutputConfig
        from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
        from vllm.utils.hashing import sha256
        from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

        self.layers_a_group = layers_a_group
        sizes = [spec.block_size for spec in specs]
        self.cache: Any = KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec([f"g{number}.l{n}" for n in range(layers_a_group)], spec)
                for number, spec in enumerate(specs)
            ],
            hash_block_size=math.gcd(*sizes),
            kv_tp_replicas=replicas,
        )
        cache = CacheConfig(block_size=sizes[0], enable_prefix_caching=True)
        cache.num_gpu_blocks = blocks
        model_config = Loose(
            model=model,
            dtype="float32",
            hf_config=SimpleNamespace(to_dict=lambda: {"a": 1}),
            max_model_len=4096,
            runner_type="generate",
        )
        self.config: Any = Loose(
            kv_transfer_config=KVTransferConfig(**connector),
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null")
            if events
            else None,
            model_config=model_config,
            cache_config=cache,
            parallel_config=Loose(
                tensor_parallel_size=ranks,
                pipeline_parallel_size=1,
                decode_context_parallel_size=1,
                prefill_context_parallel_size=1,
                data_parallel_index=0,
                use_ubatching=False,
            ),
            scheduler_config=SchedulerConfig(
                max_num_seqs=8,
                max_num_batched_tokens=step_tokens,
                max_model_len=4096,
                is_encoder_decoder=False,
                disable_hybrid_kv_cache_manager=len(specs) == 1,
            ),
            observability_config=ObservabilityConfig(),
            compilation_config=SimpleNamespace(static_forward_context={}),
            ec_manager_config=SimpleNamespace(
                get_encoder_cache_manager_obj=lambda: EncoderCacheManager
            ),
            aux_output_config=AuxOutputConfig(),
            num_speculative_tokens=0,
            num_lookahead_tokens=0,
            num_prefill_lookahead_tokens=0,
            max_in_flight_tokens=step_tokens,
            max_concurrent_batches=1,
            use_v2_model_runner=False,
            is_mm_encoder_only=False,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(self.cache.hash_block_size, sha256)
        # vLLM builds the workers' halves first.
        self.ranks = [Rank(self, number) for number in range(ranks)]
        self.scheduler: Any = Scheduler(
            self.config,
            self.cache,
            structured_output_manager=Loose(accept_tokens=lambda request, tokens: True),
            block_size=math.lcm(*sizes),
            hash_block_size=self.cache.hash_block_size,
            log_stats=True,
        )
        self.connector = self.scheduler.connector
        greetings = {
            (0, number): rank.connector.get_handshake_metadata()
            for number, rank in enumerate(self.ranks)
        }
        if greets and any(greetings.values()):
            self.connector.set_xfer_handshake_metadata_pp_aware(greetings)
        self._aggregator = KVOutputAggregator.from_connector(self.connector, ranks)
        self.counts: dict[str, Any] = {}
        self.events: list[Any] = []
        self.scheduler.kv_event_publisher = SimpleNamespace(
            publish=lambda batch: self.events.extend(batch.events), shutdown=lambda: None
        )
        self._asked = 0
        self.before_step_ends: Any = lambda: None
        """Called when all layers of a step are computed, before its end is said."""
        self.compares = True

    def wait_for_saves(self) -> None:
        """In each step, those of the steps before: what is held depends on no timing then."""

        def ended() -> bool:
            saves = [save for rank in self.ranks for save in rank.connector._mover._saves]
            return all(save.transfer.advance() is not None for save in saves)

        self.before_step_ends = lambda: until(ended)

    def scheduled_numbers(self, request_id: str) -> list[int]:
        """For each token up to the last that is computed in this step its number."""
        request = self.scheduler.requests[request_id]
        return self.numbers(request.all_token_ids[: request.num_computed_tokens])

    @staticmethod
    def numbers(tokens: Sequence[int]) -> list[int]:
        """For each token a number that only this prefix gives."""
        numbers, number = [], 1
        for token in tokens:
            number = (number * 31 + token * KNUTH + 7) % (1 << 40)
            numbers.append(number)
        return numbers

    def ask(self, prompt: Sequence[int], answer: int = 2) -> tuple[list[int], int]:
        """Runs one prompt to its end: the answer, and how many tokens came from outside."""
        hits = self.count("funnel_tokens:used")
        (answered,) = self.ask_all([prompt], answer)
        return answered, int(self.count("funnel_tokens:used") - hits)

    def ask_all(self, prompts: Sequence[Sequence[int]], answer: int = 2) -> list[list[int]]:
        """Runs prompts at once to their ends: the answers."""
        requests = [self.submit(prompt, answer) for prompt in prompts]
        self.until(lambda: all(request.is_finished() for request in requests))
        return [list(request.output_token_ids) for request in requests]

    def submit(self, prompt: Sequence[int], answer: int = 2) -> Any:
        """Adds a request, which runs with the next steps."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._asked += 1
        request = Request(
            f"r{self._asked}",
            list(prompt),
            SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True),
            None,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        return request

    def until(self, done: Any) -> None:
        """Steps until something holds."""
        deadline = time.monotonic() + STEP_WAIT_S_MAX
        while not done():
            assert time.monotonic() < deadline, "it did not happen in time"
            self.step()

    def settle(self) -> None:
        """Steps until nothing is under way, and forgets the engine's own cache."""
        self.until(lambda: not self.scheduler.has_requests())
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.cache.num_blocks - 1, "pages are still held"
        assert self.scheduler.reset_prefix_cache()

    def step(self) -> None:
        """Schedules, runs the ranks, and takes in what they say."""
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        said = []
        for rank in self.ranks:
            if not output.total_num_scheduled_tokens:
                # Loads and saves go on meanwhile.
                time.sleep(0.001)
            said.append(rank.step(output))
        ids = list(output.num_scheduled_tokens)
        tokens = [self._sampled(request_id) for request_id in ids]
        made = [
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={name: place for place, name in enumerate(ids)},
                sampled_token_ids=tokens,
                kv_connector_output=one,
            )
            for one in said
        ]
        outputs = self.scheduler.update_from_output(output, self._aggregator.aggregate(made))
        for one in outputs.values():
            if one.scheduler_stats is not None and one.scheduler_stats.kv_connector_stats:
                self._count(one.scheduler_stats.kv_connector_stats)

    def _sampled(self, request_id: str) -> list[int]:
        request = self.scheduler.requests[request_id]
        if request.num_computed_tokens < request.num_tokens:
            return []
        return [self.numbers(request.all_token_ids)[-1] % 1000]

    def _count(self, said: dict[str, Any]) -> None:
        from kvar.vllm.metrics import merge

        # A MultiConnector says it by connector.
        counts = said.get("KvarConnector", said) if "KvarConnector" in said else said
        merge(self.counts, counts)

    def count(self, name: str) -> float:
        """A counter of the connector, since the rig was built."""
        return float(self.counts.get(name, 0))

    def close(self) -> None:
        """Lets go of the node."""
        for rank in self.ranks:
            rank.connector.shutdown()
        self.connector.shutdown()
