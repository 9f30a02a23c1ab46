"""Scenario ``random``: random prompts of several lengths, cold and from each tier.

Driven by vLLM's own ``vllm bench serve``, unchanged, in this process; all prompts of a cell
(length, answer length, concurrency) come from its seed: every pass asks the same ones.

```text
  for each cell    cold       never asked before: computed, and stored
                   own        again at once: vLLM's own prefix cache, the ceiling of any store
                   memory     its own cache emptied: from the node's memory
  node restarted
  for each cell    flash      its own cache emptied: from the node's file
```
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
from dataclasses import asdict, dataclass
from typing import Any

from engines import (
    Counters,
    EngineLike,
    RunningEngine,
    Stage,
    funnel_of,
    wait_until_stored,
)
from facts import load
from servers import say

NODE_SIZE, NODE_DRAM = "12GiB", "2GiB"
FREE_GIB = 14
# All prompts and answers of the largest cell, for the pass "own".
OWN_CACHE_BYTES = 1280 << 20
SEED = 20_240_607
# Below it the connector may find that computing is sooner than loading: no hit is demanded.
DEMANDED_TOKENS_MIN = 512
HIT_SHARE_MIN = 0.98
FOUND_AGAIN_TRIES = 30


@dataclass(frozen=True)
class Cell:
    """Prompts of one kind."""

    prompt_tokens: int
    answer_tokens: int
    concurrency: int
    prompts: int

    @property
    def seed(self) -> int:
        """Its own: no two cells share a prompt."""
        return SEED + 7 * self.prompt_tokens + 3 * self.answer_tokens + self.concurrency


@dataclass(frozen=True)
class Row:
    """One pass over one cell; times in seconds, by vLLM's benchmark."""

    prompt_tokens: int
    answer_tokens: int
    concurrency: int
    tier: str
    prompts: int
    failed: int
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    tokens_per_s: float
    asked_tokens: int
    own_hit_tokens: int
    store_hit_tokens: int
    full_block_tokens: int
    answers_equal: int
    load: float


WARM_UP = Cell(prompt_tokens=600, answer_tokens=4, concurrency=2, prompts=2)


def cells(options: argparse.Namespace) -> list[Cell]:
    """Lengths x answers x concurrency."""
    lengths = [100, 1024] if options.quick else options.lengths
    answers = [1, 16] if options.quick else options.answers
    prompts = 2 if options.quick else 4
    return [
        Cell(length, answer, concurrency, max(prompts, concurrency))
        for length, answer, concurrency in itertools.product(lengths, answers, options.concurrency)
    ]


class Passes:
    """Runs passes against one engine."""

    def __init__(self, options: argparse.Namespace, engine: EngineLike) -> None:
        self._options = options
        self._engine = engine
        self._counters = Counters([engine])
        self._cold: dict[Cell, list[str]] = {}

    def run(self, cell: Cell, tier: str) -> Row:
        """One pass; the engine's own cache is as the caller left it."""
        self._counters.take()
        found = self._bench(cell)
        counted = self._counters.take()
        texts: list[str] = found["generated_texts"]
        first = self._cold.setdefault(cell, texts)
        block = self._options.block_tokens
        lengths: list[int] = found["input_lens"]
        row = Row(
            prompt_tokens=cell.prompt_tokens,
            answer_tokens=cell.answer_tokens,
            concurrency=cell.concurrency,
            tier=tier,
            prompts=cell.prompts,
            failed=cell.prompts - int(found["completed"]),
            ttft_mean_s=found["mean_ttft_ms"] / 1e3,
            ttft_p50_s=found["p50_ttft_ms"] / 1e3,
            ttft_p99_s=found["p99_ttft_ms"] / 1e3,
            itl_p50_s=found["p50_itl_ms"] / 1e3,
            itl_p99_s=found["p99_itl_ms"] / 1e3,
            tokens_per_s=found["total_token_throughput"],
            asked_tokens=sum(lengths),
            own_hit_tokens=counted["prefix_cache_hits"],
            store_hit_tokens=counted["external_prefix_cache_hits"],
            full_block_tokens=sum((tokens - 1) // block * block for tokens in lengths),
            answers_equal=sum(a == b for a, b in zip(texts, first, strict=True)),
            load=load(),
        )
        say(
            f"{cell.prompt_tokens:>6} tokens, answers of {cell.answer_tokens:>3}, "
            f"{cell.concurrency} at once, {tier:>6}: TTFT {row.ttft_p50_s:.3f} s, "
            f"{row.own_hit_tokens} + {row.store_hit_tokens} of {row.full_block_tokens} tokens"
        )
        return row

    def warm_up(self) -> None:
        """First-time costs fall on prompts that are not measured."""
        self._bench(WARM_UP)

    def find_again(self) -> None:
        """Asks what is not measured until the engine has found the restarted node."""
        for _ in range(FOUND_AGAIN_TRIES):
            self._engine.forget_local_cache()
            self._counters.take()
            self._bench(WARM_UP)
            if self._counters.take()["external_prefix_cache_hits"]:
                return
        raise SystemExit("vLLM did not find the restarted node again; see the logs")

    def _bench(self, cell: Cell) -> dict[str, Any]:
        from vllm.benchmarks import serve
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        words = ["--backend", "openai", "--base-url", self._engine.url]
        words += ["--endpoint", "/v1/completions", "--model", str(self._options.model)]
        words += ["--served-model-name", self._options.served_name]
        words += ["--dataset-name", "random", "--random-input-len", str(cell.prompt_tokens)]
        words += ["--random-output-len", str(cell.answer_tokens), "--seed", str(cell.seed)]
        words += ["--num-prompts", str(cell.prompts), "--max-concurrency", str(cell.concurrency)]
        words += ["--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99"]
        # Its own trial request would be one of the prompts, asked before the cold pass.
        words += ["--ready-check-timeout-sec", "0", "--num-warmups", "0", "--temperature", "0"]
        words += ["--disable-tqdm", "--save-detailed"]
        arguments = parser.parse_args(words)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            found: dict[str, Any] = asyncio.run(serve.main_async(arguments))
        if found.get("completed") != cell.prompts:
            say(said.getvalue()[-2000:])
        return found


def run(stage: Stage) -> dict[str, Any]:
    """All passes over all cells."""
    options = stage.options
    todo = cells(options)
    if options.engine:
        return _run_running(options, todo)
    node = stage.start_node(NODE_SIZE, NODE_DRAM)
    longest = max(cell.prompt_tokens + cell.answer_tokens for cell in todo)
    engine = stage.new_engine(OWN_CACHE_BYTES, longest + 64)
    engine.start(stage.transfer())
    passes = Passes(options, engine)
    passes.warm_up()
    rows: list[Row] = []
    for cell in todo:
        rows.append(passes.run(cell, "cold"))
        rows.append(passes.run(cell, "own"))
        wait_until_stored(node)
        engine.forget_local_cache()
        rows.append(passes.run(cell, "memory"))
        engine.forget_local_cache()
    node.stop()
    node.start()
    passes.find_again()
    for cell in todo:
        engine.forget_local_cache()
        rows.append(passes.run(cell, "flash"))
    return _told(rows, engine)


def _run_running(options: argparse.Namespace, todo: list[Cell]) -> dict[str, Any]:
    """The same against an engine that runs already, whose node is not ours to restart."""
    engine = RunningEngine(options.engine[0])
    passes = Passes(options, engine)
    passes.warm_up()
    rows = []
    for cell in todo:
        rows.append(passes.run(cell, "cold"))
        rows.append(passes.run(cell, "own"))
        engine.forget_local_cache()
        rows.append(passes.run(cell, "memory"))
    return _told(rows, engine)


def _told(rows: list[Row], engine: EngineLike) -> dict[str, Any]:
    found = {"rows": [asdict(row) for row in rows], "wrong": wrong_with(rows)}
    return found | {"funnel": funnel_of([engine])}


def wrong_with(rows: list[Row]) -> list[str]:
    """What must not be, whatever the machine: failures, hits that are missing."""
    wrong = []
    for row in rows:
        what = f"{row.prompt_tokens} tokens, {row.answer_tokens} answered, {row.concurrency} a time"
        if row.failed:
            wrong.append(f"{what}, {row.tier}: {row.failed} requests failed")
        demanded = row.tier in ("memory", "flash") and row.prompt_tokens >= DEMANDED_TOKENS_MIN
        if demanded and row.store_hit_tokens < HIT_SHARE_MIN * row.full_block_tokens:
            wrong.append(
                f"{what}, {row.tier}: {row.store_hit_tokens} of {row.full_block_tokens} tokens hit"
            )
        if row.tier == "cold" and row.store_hit_tokens:
            wrong.append(f"{what}: {row.store_hit_tokens} tokens hit that were never asked")
    return wrong
