"""Scenario ``sharing``: two engines, one store; conversations spread at random and by affinity.

```text
  own, affinity     no store; a user's turns go to the same engine: the strong baseline
  own, random       no store; any engine
  kvar, affinity    the same two engines with one kvar node
  kvar, random
  kvar, one         one engine with the node: how many hits there are to be had
```

``from_elsewhere`` are hits on blocks that the engine asked had never computed itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from asking import Asker, Question
from ceiling import Ceiling
from chat import Form, Turn, converse, summary
from engines import Counters, EngineLike, RunningEngine, Stage, StartedEngine, funnel_of
from servers import say

NODE_SIZE, NODE_DRAM = "8GiB", "2GiB"
FREE_GIB = 10
CONTEXT_TOKENS = 5120
OWN_CACHE_BYTES = 192 << 20
SEED = 7
ENGINES = 2
# Points of hit rate that two engines at random may be below one.
HIT_SHARE_BELOW_MAX = 0.02


def form(*, quick: bool) -> Form:
    """Long conversations: recomputing them at another engine is what hurts."""
    if quick:
        return Form("shared", 4, 2, 16, 2, True)
    return Form("shared", 8, 5, 32, 2, True)


def spread_at_random() -> Callable[[int, int], int]:
    """Any engine, the same for the same session and turn in every arm."""
    return lambda session, turn: random.Random(f"{SEED} {session} {turn}").randrange(ENGINES)


def by_affinity() -> Callable[[int, int], int]:
    """A user's turns go to one engine."""
    return lambda session, turn: session % ENGINES


def from_elsewhere(done: list[Turn], block_tokens: int) -> int:
    """Tokens that were hit and that the engine asked had not computed before."""
    own = [Ceiling(block_tokens) for _ in range(ENGINES)]
    found = 0
    for turn in sorted(done, key=lambda turn: turn.answer.began_s):
        answer = turn.answer
        here = own[answer.engine]
        found += max(0, answer.cached_tokens - here.tokens(answer.prompt_ids))
        here.learn(answer.prompt_ids + answer.answer_ids[:-1])
    return found


def run(stage: Stage) -> dict[str, Any]:
    """All arms."""
    what = form(quick=stage.options.quick)
    arms: dict[str, dict[str, Any]] = {}
    if stage.options.engine:
        if len(stage.options.engine) < ENGINES:
            raise SystemExit(f"--engine must be given {ENGINES} times: engines that share a store")
        running = [RunningEngine(url) for url in stage.options.engine[:ENGINES]]
        _arm(stage, running, what, "kvar, affinity", by_affinity(), arms)
        _arm(stage, running, what, "kvar, random", spread_at_random(), arms)
        _arm(stage, running, what, "kvar, one", lambda session, turn: 0, arms)
        return _told(arms, what, running)
    engines: list[StartedEngine] = []
    for store in ("own", "kvar"):
        if store == "kvar":
            stage.start_node(NODE_SIZE, NODE_DRAM)
        for engine in engines:
            engine.kill()
        engines = []
        for _ in range(ENGINES):
            engines.append(stage.new_engine(OWN_CACHE_BYTES, CONTEXT_TOKENS))
            engines[-1].start(stage.transfer() if store == "kvar" else None)
        _arm(stage, engines, what, f"{store}, affinity", by_affinity(), arms)
        _arm(stage, engines, what, f"{store}, random", spread_at_random(), arms)
        if store == "kvar":
            _arm(stage, engines, what, "kvar, one", lambda session, turn: 0, arms)
    return _told(arms, what, engines)


def _told(
    arms: dict[str, dict[str, Any]], what: Form, engines: Sequence[EngineLike]
) -> dict[str, Any]:
    found = {"arms": arms, "form": vars(what), "wrong": wrong_with(arms)}
    return found | {"funnel": funnel_of(engines)}


def _arm(
    stage: Stage,
    engines: Sequence[EngineLike],
    what: Form,
    name: str,
    engine_of: Callable[[int, int], int],
    arms: dict[str, dict[str, Any]],
) -> None:
    async def go() -> list[Turn]:
        async with Asker([one.url for one in engines], stage.options.served_name) as asker:
            warm = Question([{"role": "user", "content": "Hello! " * 300}], 4, f"warm-up {name}")
            for number in range(len(engines)):
                await asker.ask(warm, number)
            counters.take()
            salt = f"{name} {stage.folder.name}"
            return await converse(
                asker, replace(what, name=name), salt, stage.options.block_tokens, engine_of
            )

    for engine in engines:
        engine.forget_local_cache()
    counters = Counters(engines)
    say(name)
    done = asyncio.run(go())
    found = summary(done)
    found["counters"] = counters.take()
    found["from_elsewhere_tokens"] = from_elsewhere(done, stage.options.block_tokens)
    found["hit_share"] = found["later_turns"]["hit_share"]
    arms[name] = found
    say(
        f"{name}: {found['hit_share']:.1%} hits, {found['from_elsewhere_tokens']} tokens from "
        f"elsewhere, TTFT p50 {found['ttft_later_s']['p50']:.3f} s"
    )


def wrong_with(arms: dict[str, dict[str, Any]]) -> list[str]:
    """Failures; hits that did not cross from one engine to the other."""
    wrong = [f"{name}: {why}" for name, arm in arms.items() for why in arm["failed"]]
    one, spread_out = arms["kvar, one"], arms["kvar, random"]
    if spread_out["hit_share"] < one["hit_share"] - HIT_SHARE_BELOW_MAX:
        wrong.append(
            f"at random over {ENGINES} engines {spread_out['hit_share']:.1%} were hits, on one "
            f"{one['hit_share']:.1%}"
        )
    if not spread_out["from_elsewhere_tokens"]:
        wrong.append("no hit came from another engine")
    return wrong
