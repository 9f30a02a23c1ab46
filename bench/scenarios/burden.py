"""Scenario ``burden``: what a connector costs when the store brings nothing.

Two engines that differ in the connector alone, on prompts that nobody asked before. Each prompt
goes to both, one after the other, and who begins changes from pair to pair:

```text
  full      the node serves, and lets something go for whatever it takes
  stopped   the node has stopped (SIGSTOP): nothing answers, connections stay open
  absent    the node is gone: connections are refused
```

The first request after a change is told apart (``first_s``): it may meet a deadline.
What is compared is the median of the paired ratios, with the range of its middle nine tenths.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
from dataclasses import dataclass
from typing import Any

from asking import Answer, Asker, Question
from dialogues import Dialogues
from engines import Stage, StartedEngine, funnel_of
from facts import load, percentile, spread
from funnel import Metrics
from servers import kvar_transfer, say

# A block of 32 tokens of the small model is 1.2 MiB, and a node of less takes none so large.
NODE_SIZE, NODE_DRAM = "2GiB", "256MiB"
FREE_GIB = 4
FILL_S = 8
# An engine's threads spin for a moment after an answer, and would take the next one's cores.
PAUSE_S = 0.5
CONTEXT_TOKENS = 4096
OWN_CACHE_BYTES = 256 << 20
DOCUMENTS = 4
# As they are unless a user sets them.
DEADLINE_MS, LOOKUP_DEADLINE_MS = 2_000, 20
BARE, KVAR = 0, 1


@dataclass(frozen=True)
class Sizes:
    """How much is asked."""

    pairs: int
    prompt_characters: int
    answer_tokens: int


@dataclass
class Pair:
    """The same prompt at both engines."""

    bare: Answer
    kvar: Answer


class Duel:
    """Asks both engines the same, in turns."""

    def __init__(self, stage: Stage, engines: list[StartedEngine], sizes: Sizes) -> None:
        self._urls = [engine.url for engine in engines]
        self._model = stage.options.served_name
        self._sizes = sizes
        self._folder = stage.folder.name
        dialogues = Dialogues()
        self._texts = [dialogues.document(sizes.prompt_characters) for _ in range(DOCUMENTS)]

    def pairs(self, state: str, count: int) -> list[Pair]:
        """So many prompts that are new to both."""
        return asyncio.run(self._pairs(state, count))

    async def _pairs(self, state: str, count: int) -> list[Pair]:
        found = []
        async with Asker(self._urls, self._model) as asker:
            for number in range(count):
                question = self._question(state, number)
                answers: dict[int, Answer] = {}
                for engine in (BARE, KVAR) if number % 2 == 0 else (KVAR, BARE):
                    await asyncio.sleep(PAUSE_S)
                    answers[engine] = await asker.ask(question, engine)
                found.append(Pair(answers[BARE], answers[KVAR]))
        return found

    def _question(self, state: str, number: int) -> Question:
        text = self._texts[number % len(self._texts)]
        salt = f"{self._folder} {state} {number}"
        said = [{"role": "user", "content": text}]
        return Question(said, self._sizes.answer_tokens, salt)


def run(stage: Stage) -> dict[str, Any]:
    """All states, one after the other."""
    options = stage.options
    if options.engine:
        raise SystemExit("burden stops and kills its node: it starts its own, without --engine")
    sizes = Sizes(2, 3_000, 8) if options.quick else Sizes(7, 5_000, 24)
    node = stage.start_node(NODE_SIZE, NODE_DRAM)
    transfer = kvar_transfer(node)
    extra = transfer["kv_connector_extra_config"]
    extra |= {"deadline_ms": DEADLINE_MS, "lookup_deadline_ms": LOOKUP_DEADLINE_MS}
    engines = [stage.new_engine(OWN_CACHE_BYTES, CONTEXT_TOKENS) for _ in (BARE, KVAR)]
    engines[BARE].start(None)
    engines[KVAR].start(transfer)
    duel = Duel(stage, engines, sizes)
    duel.pairs("warm-up", DOCUMENTS)
    fill(stage)
    evicted = node.blocks_evicted()
    states: list[dict[str, Any]] = []
    wrong: list[str] = []
    for state, happens in (
        ("full", lambda: None),
        ("stopped", lambda: node.signal_group(signal.SIGSTOP)),
        ("absent", node.kill),
    ):
        if state == "stopped" and node.blocks_evicted() == evicted:
            wrong.append("full: the node let go of nothing, so that it was not full")
        happens()
        before = _scheduler_hooks(engines[KVAR])
        first, *pairs = duel.pairs(state, 1 + sizes.pairs)
        wrong += [f"{state}: {why}" for pair in (first, *pairs) for why in wrong_with(pair)]
        states.append(_told(state, first, pairs))
        hooks = _scheduler_hooks(engines[KVAR])
        states[-1]["hooks_ms_a_request"] = 1e3 * (hooks - before) / (1 + sizes.pairs)
        say(
            f"{state}: TTFT x {states[-1]['ttft']['p50']:.3f}, ITL x {states[-1]['itl']['p50']:.3f}"
        )
    found = {"sizes": vars(sizes), "states": states, "wrong": wrong, "load": load()}
    return found | {"funnel": funnel_of(engines[KVAR:])}


def fill(stage: Stage) -> None:
    """Puts what nobody wants until the node lets go of some of it for more."""
    node = stage.node
    assert node is not None
    command = [str(stage.options.kvar), "bench", "node", "--op", "put", "--size", "1MiB"]
    command += ["--endpoint", node.endpoint, "--key-file", str(node.key_file)]
    command += ["--depth", "4", "--seconds", str(FILL_S)]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    if not node.blocks_evicted():
        raise SystemExit(f"the node is not full after {FILL_S} s of puts")


def _scheduler_hooks(engine: StartedEngine) -> float:
    """Seconds that vLLM's scheduler has spent in the connector."""
    return Metrics(engine.metrics()).sum("vllm:kvar_step_hook_seconds_sum", side="scheduler")


def _told(state: str, first: Pair, pairs: list[Pair]) -> dict[str, Any]:
    return {
        "state": state,
        "pairs": len(pairs),
        "first_s": {"bare": first.bare.ttft_s, "kvar": first.kvar.ttft_s},
        "ttft_s": {
            "bare": spread([pair.bare.ttft_s for pair in pairs]),
            "kvar": spread([pair.kvar.ttft_s for pair in pairs]),
        },
        "ttft": _ratios([pair.kvar.ttft_s / pair.bare.ttft_s for pair in pairs]),
        "itl": _ratios([_itl_s(pair.kvar) / _itl_s(pair.bare) for pair in pairs]),
    }


def _itl_s(answer: Answer) -> float:
    return float(spread(answer.itl_s)["p50"])


def _ratios(values: list[float]) -> dict[str, float]:
    return {
        "p50": percentile(values, 0.5),
        "low": percentile(values, 0.05),
        "high": percentile(values, 0.95),
    }


def wrong_with(pair: Pair) -> list[str]:
    """A request that failed, a hit where there can be none, another answer than without kvar."""
    wrong = [answer.failed for answer in (pair.bare, pair.kvar) if answer.failed]
    if wrong:
        return wrong
    wrong += [
        f"{answer.cached_tokens} tokens of a new prompt were hits"
        for answer in (pair.bare, pair.kvar)
        if answer.cached_tokens
    ]
    if pair.bare.text != pair.kvar.text:
        wrong.append("a prompt was answered differently with and without the connector")
    return wrong
