"""Chat requests as a user's program sends them, timed token by token.

Uses the OpenAI chat endpoint with plain text, as users do. vLLM is asked for the token ids of
prompt and answer too (``return_token_ids``), so that what could have been found can be said
exactly, and how many of the prompt's tokens it had (``cached_tokens``: its own cache and the store
together).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from dialogues import Message

ASK_S_MAX = 600
# An engine that is starting answers nobody; it is asked again until this long is over.
AWAY_S_MAX = 900
AWAY_PAUSE_S = 0.25


class Away(Exception):
    """Nobody listens there, or whoever did is gone."""


@dataclass
class Answer:
    """What came of one request."""

    engine: int
    began_s: float
    """When it was first sent, by the monotonic clock."""
    ttft_s: float = 0.0
    """From the first sending on, time without an engine included."""
    itl_s: list[float] = field(default_factory=list)
    text: str = ""
    prompt_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()
    cached_tokens: int = 0
    """Of the prompt: not computed, whoever had them."""
    sendings: int = 1
    """More than one: the engine was away, or went away under it."""
    failed: str = ""
    """Why it has no answer; empty if it has."""


@dataclass(frozen=True)
class Question:
    """A conversation that waits for its next answer."""

    messages: Sequence[Message]
    answer_tokens: int
    salt: str = ""
    """Requests of different salts share nothing, in the engine's own cache and in the store."""


class Asker:
    """Asks engines by their URLs."""

    def __init__(self, urls: Sequence[str], model: str) -> None:
        self._urls = urls
        self._model = model
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_S_MAX))

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, question: Question, engine: int = 0) -> Answer:
        """The answer. An engine that is away is asked again; one that says no is not."""
        answer = Answer(engine, time.monotonic())
        while True:
            try:
                await self._send(question, answer)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, Away) as why:
                if time.monotonic() - answer.began_s > AWAY_S_MAX:
                    answer.failed = f"no engine for {AWAY_S_MAX} s: {why}"
                    return answer
                answer.sendings += 1
                await asyncio.sleep(AWAY_PAUSE_S)
            except TimeoutError:
                answer.failed = f"no answer in {ASK_S_MAX} s"
                return answer
            else:
                return answer

    async def _send(self, question: Question, answer: Answer) -> None:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": list(question.messages),
            "max_completion_tokens": question.answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if question.salt:
            body["cache_salt"] = question.salt
        answer.itl_s, answer.text = [], ""
        ids: list[int] = []
        is_over = False
        last = 0.0
        url = f"{self._urls[answer.engine]}/v1/chat/completions"
        async with self._session.post(url, json=body) as response:
            if response.status != 200:  # noqa: PLR2004
                answer.failed = f"{response.status}: {(await response.text())[:300]}"
                return
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    is_over = True
                elif line.startswith(b"data: {"):
                    said = json.loads(line[6:])
                    if "error" in said:
                        answer.failed = str(said["error"])[:300]
                        return
                    last = _take(answer, ids, said, last)
        if not is_over:
            raise Away("the answer stopped in the middle")
        answer.answer_ids = tuple(ids)


def _take(answer: Answer, ids: list[int], said: dict[str, Any], last: float) -> float:
    """One event of the stream; when the last token came."""
    if said.get("prompt_token_ids"):
        answer.prompt_ids = tuple(said["prompt_token_ids"])
    for choice in said.get("choices", ()):
        tokens = choice.get("token_ids") or ()
        if not tokens:
            continue
        now = time.monotonic()
        if ids:
            answer.itl_s.append(now - last)
        else:
            answer.ttft_s = now - answer.began_s
        last = now
        ids += tokens
        answer.text += choice["delta"].get("content") or ""
    usage = said.get("usage")
    if usage:
        details = usage.get("prompt_tokens_details") or {}
        answer.cached_tokens = details.get("cached_tokens") or 0
    return last
