"""The funnel adds up: random lives of requests through the planner, and each loss by its name."""

from __future__ import annotations

import ast
import random
from collections import Counter as TokenCounts
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_vllm_planner import BLOCK, Bench, Request, pages, seen

import kvar.vllm
from kvar.vllm.funnel import STAGES
from kvar.vllm.metrics import COUNTERS, HISTOGRAMS, HookTimes, merge
from kvar.vllm.orders import FailedLoad
from kvar.vllm.settings import Mode

LIVES = 300


class Reading:
    """What the counters say in all, as a reader of the endpoint would add them up."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def read(self, bench: Bench) -> None:
        merge(self.values, bench.planner.counters.take())
        stage = self.stage
        prompt = stage("prompt")
        assert prompt == stage("full_blocks") + self.lost("full_blocks")
        assert stage("full_blocks") == stage("local") + stage("looked_up") + self.lost("looked_up")
        for before, after in pairwise(STAGES[3:]):
            assert stage(before) == stage(after) + self.lost(after), (before, after)
        assert prompt == stage("local") + stage("used") + self.lost()

    def stage(self, stage: str) -> float:
        return self.values.get(f"funnel_tokens:{stage}", 0)

    def lost(self, stage: str = "") -> float:
        return sum(
            tokens
            for key, tokens in self.values.items()
            if key.startswith(f"lost_tokens:{stage}{':' if stage else ''}")
        )

    def why(self) -> dict[str, float]:
        return {
            key.removeprefix("lost_tokens:"): tokens
            for key, tokens in self.values.items()
            if key.startswith("lost_tokens:")
        }


@dataclass
class Life:
    """One request as the engine knows it, and what the test itself says of it."""

    request: Request
    state: str = "waiting"
    local: int = 0
    loading: int = 0
    is_retry: bool = False
    """Its load failed altogether: vLLM asks again, and it is in the funnel already."""


class History:
    """Random lives of requests; ``truth`` is what the engine itself would count."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.by_layers = self.chance.random() < 0.3
        self.bench = Bench(loads=self.chance.random() < 0.9, by_layers=self.by_layers)
        if self.chance.random() < 0.5:
            computed = self.chance.choice([10, 10_000])
            seen(self.bench, computed_a_s=computed, loaded_a_s=self.chance.choice([100, 1_000]))
        self.reading = Reading()
        self.reading.read(self.bench)
        self.truth = TokenCounts[str]()
        self.lives: list[Life] = []

    def run(self) -> None:
        acts = [self.bear, self.advance, self.advance, self.preempt, self.end, self.disturb]
        for _ in range(100):
            self.bench.now += self.chance.random()
            self.chance.choice(acts)()
            self.bench.planner.step({}, lambda _: None)
            self.reading.read(self.bench)
        for life in self.lives:
            self.bench.planner.finished(life.request, [])
        self.reading.read(self.bench)

    def bear(self) -> None:
        name = f"r{self.chance.random()}"
        life = Life(Request(name, num_tokens=self.chance.randrange(1, 400)))
        known = life.request.block_hashes
        self.bench.stored.update(known[: self.chance.randrange(len(known) + 1)])
        self.lives.append(life)

    def disturb(self) -> None:
        if self.chance.random() < 0.5:
            self.bench.away = not self.bench.away
        else:
            self.bench.mode = self.chance.choice(list(Mode))

    def advance(self) -> None:
        if not self.lives:
            return
        life = self.chance.choice(self.lives)
        if life.state == "waiting":
            self.ask(life)
        elif life.state == "loading":
            self.end_load(life)
        elif life.state == "loaded":
            self.bench.planner.allocated(life.request, pages(40), 0)
            self.truth["used"] += life.loading
            life.state = "running"

    def ask(self, life: Life) -> None:
        request, planner = life.request, self.bench.planner
        full = (request.num_tokens - 1) // BLOCK
        life.local = self.chance.randrange(full + 1) * BLOCK
        if self.chance.random() < 0.1:
            life.local = offered = 0
            planner.passed_over(request)
        else:
            offered = planner.matched(request, life.local)
        if self.chance.random() < 0.2:
            return  # No pages for it in this step.
        if offered and self.chance.random() < 0.1:
            offered = 0  # Another connector's find is taken.
        planner.allocated(request, pages(40), offered)
        if not life.is_retry:
            self.truth["prompt"] += request.num_tokens
            self.truth["local"] += life.local
        life.is_retry = False
        life.loading = offered
        life.state = "loading" if offered else "running"

    def end_load(self, life: Life) -> None:
        name, kept, failed = life.request.request_id, life.loading // BLOCK, {}
        if self.chance.random() < 0.4:
            kept = self.chance.randrange(kept)
            word = self.chance.choice(["evicted", "corrupt", "deadline"])
            failed = {name: FailedLoad(kept, word)}
        self.bench.planner.worker_said(reports={}, loaded=[name], failed=failed)
        life.loading = kept * BLOCK
        self.truth["loaded"] += life.loading
        if self.by_layers:
            life.state = "running"
            self.truth["used"] += life.loading
        elif kept:
            life.state = "loaded"
        else:
            life.state, life.is_retry = "waiting", True

    def preempt(self) -> None:
        """It comes again, with more tokens than before."""
        running = [life for life in self.lives if life.state == "running"]
        if running:
            life = self.chance.choice(running)
            life.request.num_tokens += self.chance.randrange(50)
            life.request.hash_known_tokens()
            life.state = "waiting"

    def end(self) -> None:
        if self.lives:
            life = self.lives.pop(self.chance.randrange(len(self.lives)))
            self.bench.planner.finished(life.request, pages(40))


def test_stages_and_losses_add_up_in_every_reading_and_say_what_happened() -> None:
    reasons: set[str] = set()
    for seed in range(LIVES):
        history = History(seed)
        history.run()
        reading, truth = history.reading, history.truth
        reasons |= set(reading.why())
        assert reading.stage("prompt") == truth["prompt"], seed
        assert reading.stage("used") == truth["used"], seed
        assert reading.values.get("loaded_tokens", 0) == truth["loaded"], seed
        assert reading.stage("local") == truth["local"], seed
    assert reasons == {
        "full_blocks:partial_block",
        "looked_up:mode_off",
        "looked_up:opted_out",
        "looked_up:store_away",
        "present:absent",
        "chosen:role",
        "chosen:mode",
        "chosen:barred",
        "chosen:recompute",
        "chosen:too_late",
        "chosen:declined",
        "loaded:evicted",
        "loaded:corrupt",
        "loaded:deadline",
        "loaded:aborted",
        "used:aborted",
    }


def test_a_hit_is_booked_when_the_request_runs_on_it() -> None:
    bench, reading = Bench(), Reading()
    request = Request("a", num_tokens=100)
    bench.stored = set(request.block_hashes)
    bench.planner.allocated(request, pages(4), bench.planner.matched(request, 32))
    bench.say(loaded=["a"])
    reading.read(bench)
    assert reading.stage("prompt") == 0
    bench.planner.allocated(request, [], 0)
    reading.read(bench)
    booked = {stage: reading.stage(stage) for stage in STAGES}
    assert booked == {"prompt": 100, "full_blocks": 96, "local": 32} | dict.fromkeys(
        ["looked_up", "present", "chosen", "loaded", "used"], 64
    )
    assert reading.why() == {"full_blocks:partial_block": 4}


def test_a_request_that_is_preempted_goes_through_again() -> None:
    bench, reading = Bench(), Reading()
    request = Request("a", num_tokens=64)
    for _ in range(2):
        bench.planner.matched(request, 0)
        bench.planner.allocated(request, pages(2), 0)
    reading.read(bench)
    assert (reading.stage("prompt"), reading.values["readmitted_tokens"]) == (128, 64)


def test_who_is_never_admitted_is_never_counted() -> None:
    bench, reading = Bench(), Reading()
    request = Request("a", num_tokens=100)
    bench.stored = set(request.block_hashes)
    bench.planner.matched(request, 0)
    bench.planner.finished(request, [])
    reading.read(bench)
    assert reading.stage("prompt") == 0


def test_every_count_is_declared_with_its_labels() -> None:
    """Names are text: one that is not declared would be lost, or break the endpoint."""
    folder = Path(kvar.vllm.__file__).parent
    found: dict[str, set[int]] = {}
    for source in folder.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "add"
                and ast.unparse(node.func.value).endswith("counters")
            ):
                name = node.args[0]
                assert isinstance(name, ast.Constant) and isinstance(name.value, str)
                found.setdefault(name.value, set()).add(len(node.args) - 2)
    assert found == {name: {len(declared.labels)} for name, declared in COUNTERS.items()}


def test_hooks_are_timed_a_step_and_their_sum_beside_the_step() -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.5, 5.0, 5.25, 10.0])
    times = HookTimes("worker", lambda: next(clock))
    times.step_began()
    with times("start_load_kv"):
        pass
    for _ in range(2):
        with times("wait_for_layer_load"):
            pass
    ended = times.step_ended(computed=True)
    assert ended == {
        "hook_seconds:start_load_kv": [2.0],
        "hook_seconds:wait_for_layer_load": [0.75],
        "step_hook_seconds:worker": [2.75],
        "step_seconds": [10.0],
    }
    assert {key.split(":")[0] for key in ended} == set(HISTOGRAMS)
    assert times.step_ended(computed=True) == {}


def test_a_step_without_tokens_is_no_measure_of_the_share() -> None:
    times = HookTimes("scheduler", lambda: 0.0)
    with times("build_connector_meta"):
        pass
    assert set(times.step_ended(computed=False)) == {"hook_seconds:build_connector_meta"}


def test_the_endpoint_carries_all_of_it() -> None:
    pytest.importorskip("vllm")
    from types import SimpleNamespace

    import prometheus_client
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    from kvar.vllm.stats import KvarPromMetrics, KvarStats

    registry = CollectorRegistry()

    def kept(kind: Any) -> Any:
        return lambda **settings: kind(registry=registry, **settings)

    metrics = KvarPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        {Counter: kept(Counter), Gauge: kept(Gauge), Histogram: kept(Histogram)},
        ["engine"],
        {0: ["0"], 1: ["1"]},
    )
    said = KvarStats(data={"saved_bytes": 5, "hook_seconds:get_finished": [0.5]})
    more = {"saved_bytes": 2, "lost_tokens:present:absent": 32, "hook_seconds:get_finished": [2e-5]}
    said.aggregate(KvarStats(data=more))
    assert said.reduce()["kvar_hook_seconds:get_finished_max"] == 0.5
    metrics.observe(said.to_dict(), 1)
    text = prometheus_client.generate_latest(registry).decode()
    for line in (
        'saved_bytes_total{engine="1"} 7.0',
        'saved_bytes_total{engine="0"} 0.0',
        'lost_tokens_total{engine="1",reason="absent",stage="present"} 32.0',
        'hook_seconds_bucket{engine="1",hook="get_finished",le="2.5e-05"} 1.0',
        'hook_seconds_bucket{engine="1",hook="get_finished",le="0.001"} 1.0',
        'hook_seconds_count{engine="1",hook="get_finished"} 2.0',
    ):
        assert f"vllm:kvar_{line}\n" in text
    for name in COUNTERS:
        assert f"# TYPE vllm:kvar_{name}_total counter" in text
    for name in HISTOGRAMS:
        assert f"# TYPE vllm:kvar_{name} histogram" in text
