"""Scenario ``chat``: conversations of many users, turn by turn, answers by the engine.

All sessions take turns: between two turns of one user all others are served, so that an engine
whose own cache is small has forgotten the first when the user speaks again.

```text
  plain    sessions begin with nothing
  long     a document of some 1,000 tokens before all, and a history of 1,000 tokens and more each
  arms     without: stock vLLM alone        kvar: the same engine with the connector
```

The ceiling of an arm is computed from the very token ids that were sent and generated in it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asking import Answer, Asker, Question
from ceiling import Ceiling
from dialogues import LANGUAGES, Dialogues, Message, Session
from engines import Counters, EngineLike, RunningEngine, Stage, funnel_of
from facts import load, spread
from servers import say

NODE_SIZE, NODE_DRAM = "8GiB", "2GiB"
FREE_GIB = 10
CONTEXT_TOKENS = 5120
# A little more than the longest conversation: what lies further back is forgotten.
OWN_CACHE_BYTES = 192 << 20
DOCUMENT_CHARACTERS = 4_500
HISTORY_CHARACTERS = {"en": 4_800, "zh": 2_000}


@dataclass(frozen=True)
class Form:
    """How many users, how long."""

    name: str
    sessions: int
    turns: int
    answer_tokens: int
    at_once: int
    is_long: bool


def forms(*, quick: bool) -> list[Form]:
    """Plain and long."""
    if quick:
        return [Form("plain", 4, 3, 16, 2, False), Form("long", 2, 2, 16, 2, True)]
    return [Form("plain", 16, 6, 48, 2, False), Form("long", 6, 6, 48, 2, True)]


@dataclass
class Turn:
    """One turn of one session."""

    session: int
    language: str
    turn: int
    answer: Answer
    ceiling_tokens: int


def sessions_of(form: Form) -> tuple[list[Message], list[Session]]:
    """What stands before all, and the sessions."""
    dialogues = Dialogues()
    before: list[Message] = []
    if form.is_long:
        before = [{"role": "user", "content": dialogues.document(DOCUMENT_CHARACTERS)}]
        before += [{"role": "assistant", "content": "I have read it."}]
    found = []
    for _, language in zip(range(form.sessions), itertools.cycle(LANGUAGES), strict=False):
        if form.is_long:
            most = HISTORY_CHARACTERS[language]
            found.append(dialogues.long(language, most, form.turns))
        else:
            found.append(dialogues.plain(language, form.turns))
    return before, found


async def converse(
    asker: Asker,
    form: Form,
    salt: str,
    block_tokens: int,
    engine_of: Callable[[int, int], int] = lambda session, turn: 0,
) -> list[Turn]:
    """All turns of all sessions; ``engine_of`` says which engine is asked for (session, turn)."""
    before, sessions = sessions_of(form)
    histories = [before + session.opening for session in sessions]
    ceiling = Ceiling(block_tokens)
    gate = asyncio.Semaphore(form.at_once)
    done: list[Turn] = []

    async def one(number: int, turn: int) -> None:
        session, history = sessions[number], histories[number]
        history.append({"role": "user", "content": session.says[turn]})
        question = Question(list(history), form.answer_tokens, salt)
        async with gate:
            answer = await asker.ask(question, engine_of(number, turn))
        history.append({"role": "assistant", "content": answer.text})
        known = ceiling.tokens(answer.prompt_ids) if answer.prompt_ids else 0
        ceiling.learn(answer.prompt_ids + answer.answer_ids[:-1])
        done.append(Turn(number, session.language, turn + 1, answer, known))

    for turn in range(form.turns):
        await asyncio.gather(*(one(number, turn) for number in range(form.sessions)))
        first = [one.answer.ttft_s for one in done if one.turn == turn + 1]
        say(f"  {form.name}, turn {turn + 1}: TTFT p50 {spread(first)['p50']:.3f} s")
    return done


def summary(done: list[Turn]) -> dict[str, Any]:
    """Hits beside the ceiling, times by turn."""
    later = [turn for turn in done if turn.turn >= 2]  # noqa: PLR2004

    def share(turns: list[Turn]) -> dict[str, float]:
        prompt = sum(len(turn.answer.prompt_ids) for turn in turns)
        hits = sum(turn.answer.cached_tokens for turn in turns)
        most = sum(turn.ceiling_tokens for turn in turns)
        return {
            "prompt_tokens": prompt,
            "hit_tokens": hits,
            "ceiling_tokens": most,
            "hit_share": hits / max(prompt, 1),
            "of_ceiling": hits / max(most, 1),
        }

    numbers = sorted({turn.turn for turn in done})
    return {
        "later_turns": share(later),
        "later_turns_by_language": {
            language: share([turn for turn in later if turn.language == language])
            for language in sorted({turn.language for turn in done})
        },
        "ttft_later_s": spread([turn.answer.ttft_s for turn in later]),
        "itl_s": spread([gap for turn in done for gap in turn.answer.itl_s]),
        "by_turn": [
            {
                "turn": number,
                "ttft_s": spread([turn.answer.ttft_s for turn in done if turn.turn == number]),
                "itl_s": spread(
                    [gap for turn in done if turn.turn == number for gap in turn.answer.itl_s]
                ),
                **share([turn for turn in done if turn.turn == number]),
            }
            for number in numbers
        ],
        "failed": [turn.answer.failed for turn in done if turn.answer.failed],
        "load": load(),
    }


def _run_form(
    stage: Stage, engine: EngineLike, form: Form, arm: str
) -> tuple[dict[str, Any], dict[str, int]]:
    async def go() -> list[Turn]:
        async with Asker([engine.url], stage.options.served_name) as asker:
            warm = Question([{"role": "user", "content": "Hello! " * 300}], 4, f"warm-up {arm}")
            for _ in range(2):
                await asker.ask(warm)
            counters.take()
            salt = f"{form.name} {arm} {stage.folder.name}"
            return await converse(asker, form, salt, stage.options.block_tokens)

    counters = Counters([engine])
    say(f"{form.name}, {arm}: {form.sessions} sessions of {form.turns} turns")
    done = asyncio.run(go())
    return summary(done), counters.take()


def run(stage: Stage) -> dict[str, Any]:
    """Both forms in both arms."""
    todo = forms(quick=stage.options.quick)
    found: dict[str, dict[str, Any]] = {form.name: {"form": vars(form)} for form in todo}
    went: dict[str, Any] = {}
    if stage.options.engine:
        running = RunningEngine(stage.options.engine[0])
        _run_arm(stage, running, "kvar", todo, found)
        went = funnel_of([running])
    else:
        for arm in ("without", "kvar"):
            engine = stage.new_engine(OWN_CACHE_BYTES, CONTEXT_TOKENS)
            if arm == "kvar":
                stage.start_node(NODE_SIZE, NODE_DRAM)
            engine.start(stage.transfer() if arm == "kvar" else None)
            _run_arm(stage, engine, arm, todo, found)
            went = funnel_of([engine])
            engine.kill()
    return {"forms": found, "funnel": went, "wrong": wrong_with(found)}


def _run_arm(
    stage: Stage, engine: EngineLike, arm: str, todo: list[Form], found: dict[str, dict[str, Any]]
) -> None:
    for form in todo:
        summarised, counted = _run_form(stage, engine, form, arm)
        found[form.name][arm] = summarised | {"counters": counted}
        later = summarised["later_turns"]
        say(
            f"{form.name}, {arm}: {later['hit_share']:.1%} of the tokens of turns from the 2nd on, "
            f"{later['of_ceiling']:.1%} of what was possible"
        )


# Of the ceiling, and of the tokens in the long form: what the store is for.
OF_CEILING_MIN = 0.98
LONG_HIT_SHARE_MIN = 0.80


def wrong_with(found: dict[str, dict[str, Any]]) -> list[str]:
    """Failures, and hits below what must be."""
    wrong = []
    for name, arms in found.items():
        for arm in ("without", "kvar"):
            wrong += [f"{name}, {arm}: {why}" for why in arms.get(arm, {}).get("failed", [])]
        later = arms["kvar"]["later_turns"]
        if later["of_ceiling"] < OF_CEILING_MIN:
            wrong.append(f"{name}: {later['of_ceiling']:.1%} of the ceiling")
        if arms["form"]["is_long"] and later["hit_share"] < LONG_HIT_SHARE_MIN:
            wrong.append(f"{name}: {later['hit_share']:.1%} of the tokens of later turns were hits")
    return wrong
