"""Scenario ``outages``: users go on asking while parts die, come back, or are switched off.

One engine with kvar whose own cache is too small for the prompts that are asked in turn, so that
every answer leans on the store. What happens, and what it must cost:

```text
  steady            every prompt from the store
  kvar mode off     computed; no request waits for the store
  kvar mode load    from the store again
  node killed       computed, after one failure
  node back         from the store again (what it had on flash), without a word to the engine
  engine killed     requests wait for it: whoever asks sends again
  engine back       from the store
  node dead         for good: computed, to the end
```

A request fails if the engine says no, or gives no answer; one that an engine takes with it when it
is killed is sent again and counted apart (``sent_again``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asking import Answer, Asker, Question
from dialogues import Dialogues
from engines import Stage, StartedEngine, funnel_of, wait_until_stored
from facts import load, spread
from servers import kvar_transfer, say

NODE_SIZE, NODE_DRAM = "4GiB", "2GiB"
FREE_GIB = 6
CONTEXT_TOKENS = 4096
OWN_CACHE_BYTES = 160 << 20
PROMPT_CHARACTERS = 5_000
AT_ONCE = 2
# As a user would run it, not as the end-to-end run does: what is late is computed.
DEADLINE_MS, LOOKUP_DEADLINE_MS = 5_000, 100


@dataclass(frozen=True)
class Sizes:
    """How much is asked."""

    prompts: int
    rounds: int
    answer_tokens: int


@dataclass(frozen=True)
class Asked:
    """One answer on the time line."""

    phase: str
    at_s: float
    answer: Answer


class Line:
    """The time line."""

    def __init__(self, stage: Stage, engine: StartedEngine, sizes: Sizes) -> None:
        self._stage = stage
        self._engine = engine
        self._sizes = sizes
        dialogues = Dialogues()
        texts = [dialogues.document(PROMPT_CHARACTERS) for _ in range(sizes.prompts)]
        self._questions = [
            Question([{"role": "user", "content": text}], sizes.answer_tokens) for text in texts
        ]
        self.began_s = time.monotonic()
        self.asked: list[Asked] = []
        self.events: list[dict[str, Any]] = []

    def phase(self, name: str, happens: Callable[[], None] | None = None) -> None:
        """Something happens, and all prompts are asked so many times."""
        self._happen(name, happens)
        asyncio.run(self._rounds(name, self._sizes.rounds))
        mine = [one.answer for one in self.asked if one.phase == name]
        first_s = spread([answer.ttft_s for answer in mine])["p50"]
        say(
            f"{name}: {len(mine)} answers, TTFT p50 {first_s:.3f} s, "
            f"{sum(bool(a.failed) for a in mine)} failed"
        )

    def under_way(self, name: str, happens: Callable[[], None]) -> None:
        """It happens while requests are under way, and more come before it is over."""

        async def go() -> None:
            asking = asyncio.create_task(self._rounds(name, 1))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(self._happen, name, happens)
            await asking

        asyncio.run(go())

    def _happen(self, name: str, happens: Callable[[], None] | None) -> None:
        self.events.append({"name": name, "at_s": time.monotonic() - self.began_s})
        if happens is not None:
            happens()

    async def _rounds(self, name: str, rounds: int) -> None:
        gate = asyncio.Semaphore(AT_ONCE)
        async with Asker([self._engine.url], self._stage.options.served_name) as asker:

            async def one(question: Question) -> None:
                async with gate:
                    answer = await asker.ask(question)
                at_s = answer.began_s - self.began_s
                self.asked.append(Asked(name, at_s, answer))

            for _ in range(rounds):
                await asyncio.gather(*(one(question) for question in self._questions))


def run(stage: Stage) -> dict[str, Any]:
    """The whole line."""
    options = stage.options
    if options.engine:
        raise SystemExit("outages kills engine and node: it starts its own, without --engine")
    quick = options.quick
    sizes = Sizes(prompts=5, rounds=1, answer_tokens=8) if quick else Sizes(8, 3, 24)
    node = stage.start_node(NODE_SIZE, NODE_DRAM)
    engine = stage.new_engine(OWN_CACHE_BYTES, CONTEXT_TOKENS)
    transfer = kvar_transfer(node)
    extra = transfer["kv_connector_extra_config"]
    extra |= {"deadline_ms": DEADLINE_MS, "lookup_deadline_ms": LOOKUP_DEADLINE_MS}
    # Computing is what an outage must be seen by, whatever this machine's speed.
    extra |= {"choice": "always"}
    engine.start(transfer)
    line = Line(stage, engine, sizes)

    def restart_engine() -> None:
        engine.kill()
        engine.start(transfer)

    line.phase("first time")
    wait_until_stored(node)
    line.phase("steady")
    line.phase("kvar mode off", lambda: stage.switch("off"))
    line.phase("kvar mode load", lambda: stage.switch("load"))
    line.under_way("node killed", node.kill)
    line.phase("without node")
    line.under_way("node back", node.start)
    line.phase("with node")
    line.under_way("engine killed", restart_engine)
    line.phase("engine back")
    line.under_way("node dead", node.kill)
    line.phase("for good")
    found = {"sizes": vars(sizes), "wrong": wrong_with(line), "funnel": funnel_of([engine])}
    return _told(line) | found


def _told(line: Line) -> dict[str, Any]:
    phases = []
    for name in dict.fromkeys(one.phase for one in line.asked):
        mine = [one.answer for one in line.asked if one.phase == name]
        phases.append(
            {
                "phase": name,
                "answers": len(mine),
                "failed": sum(bool(answer.failed) for answer in mine),
                "sent_again": sum(answer.sendings - 1 > 0 for answer in mine),
                "hit_share": sum(answer.cached_tokens for answer in mine)
                / max(1, sum(len(answer.prompt_ids) for answer in mine)),
                "ttft_s": spread([answer.ttft_s for answer in mine]),
                "itl_s": spread([gap for answer in mine for gap in answer.itl_s]),
            }
        )
    return {
        "phases": phases,
        "events": line.events,
        "line": [
            {
                "phase": one.phase,
                "at_s": one.at_s,
                "ttft_s": one.answer.ttft_s,
                "itl_p50_s": spread(one.answer.itl_s)["p50"],
                "hit_tokens": one.answer.cached_tokens,
                "prompt_tokens": len(one.answer.prompt_ids),
                "sent_again": one.answer.sendings > 1,
            }
            for one in line.asked
        ],
        "load": load(),
    }


# Of the prompt tokens, in a phase that leans on the store.
HIT_SHARE_MIN = 0.9
LEANING = ("steady", "kvar mode load", "with node", "engine back")
BARE = ("kvar mode off", "without node", "for good")
BARE_HIT_SHARE_MAX = 0.1


def wrong_with(line: Line) -> list[str]:
    """Requests that failed; a store that was not used when it was there, or was when it was not."""
    wrong = [f"{one.phase}: {one.answer.failed}" for one in line.asked if one.answer.failed]
    for row in _told(line)["phases"]:
        share, name = row["hit_share"], row["phase"]
        if name in LEANING and share < HIT_SHARE_MIN:
            wrong.append(f"{name}: {share:.1%} of the tokens were hits")
        if name in BARE and share > BARE_HIT_SHARE_MAX:
            wrong.append(f"{name}: {share:.1%} of the tokens were hits, with no store to ask")
    texts: dict[int, set[str]] = {}
    for one in line.asked:
        if not one.answer.failed:
            texts.setdefault(hash(one.answer.prompt_ids), set()).add(one.answer.text)
    wrong += [
        "a prompt was answered differently with and without the store"
        for answers in texts.values()
        if len(answers) > 1
    ]
    return wrong
