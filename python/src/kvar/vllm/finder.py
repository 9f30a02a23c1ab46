"""What of a prompt is stored, for engines with one group of layers or several.

```text
1  leased lookup of the chain of all full-attention groups, in the order of the tokens --> n tokens
2  leased lookup of the windows that end at n           all there: the hit is n
3  which window blocks below n are there?               the longest prefix with all its windows
```

The first is asked when a request arrives, so that its answer is there, or nearly, when the engine
asks about the request (:meth:`Finder.begin`).

Without windows it ends after 1, without full attention it begins with 3 where 2 fails for the whole
prompt. All of it together keeps to one deadline; no answer in time is no answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import kvar
from kvar.vllm.groups import Group, Groups
from kvar.vllm.planner import Found, StoreLease, Unanswered
from kvar.vllm.worker import names

LATE = "lookup_deadline"

# An answer that was asked for early is good for this share of what it promises: the rest is for
# the load to be ordered, or the promise to be renewed.
BEGUN_SHARE = 0.25

# For so long it is taken as it is; later, if not all was there, the store is asked again.
FRESH_S = 0.05


class Store(Protocol):
    """The part of the link that is asked."""

    def lookup(self, ids: Sequence[bytes], deadline_ms: int, request: int = 0) -> int | None:
        """How many leading blocks are there."""

    def begin_lookup(
        self, ids: Sequence[bytes], deadline_ms: int, ttl_s: float, request: int = 0
    ) -> Any:
        """Begins a leased lookup; what ``lookup_leased`` is given to take its answer, or None."""

    def drop_begun(self, begun: Any) -> None:
        """Nobody takes the answer of ``begin_lookup``: what it promised ends."""

    def lookup_leased(
        self,
        ids: Sequence[bytes],
        deadline_ms: int,
        ttl_s: float,
        request: int = 0,
        begun: Any = None,
    ) -> tuple[int, StoreLease | None] | None:
        """As ``lookup``, and they stay."""

    def present(self, ids: Sequence[bytes], deadline_ms: int) -> list[bool] | None:
        """Which blocks are there."""

    def why_unanswered(self) -> str:
        """Why the last question got no answer."""


class Leases:
    """Several promises as one."""

    def __init__(self, leases: Sequence[StoreLease]) -> None:
        self._leases = leases

    def renew(self, ttl_s: float) -> None:
        """Lets them last so long from now."""
        for lease in self._leases:
            lease.renew(ttl_s)

    def release(self) -> None:
        """Ends them."""
        for lease in self._leases:
            lease.release()


@dataclass(frozen=True)
class Question:
    """One prompt that is asked about."""

    chain: Sequence[bytes]
    tokens: int
    request: int
    lease_s: float
    salt: str
    ends: float


@dataclass(frozen=True)
class _Begun:
    """The first question about a prompt, asked before the engine asked about it."""

    question: Question
    store: Any


class _NoAnswer(Exception):
    """A question was not answered."""


class Finder:
    """Asks the store about prompts; belongs to the scheduler."""

    def __init__(
        self,
        *,
        store: Store,
        key: kvar.NamespaceKey,
        groups: Groups,
        texts: Sequence[str],
        slices: int,
        deadline_ms: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._key = key
        self._groups = groups
        self._texts = texts
        self._slices = slices
        self._deadline_ms = deadline_ms
        self._now = now
        self._begun: dict[int, _Begun] = {}

    def begin(
        self, chain: Sequence[bytes], tokens: int, request: int, lease_s: float, salt: str
    ) -> None:
        """Asks about a prompt that the engine will ask about soon; waits for nothing."""
        if not self._groups.whole:
            return
        ends = self._now() + self._deadline_ms / 1000
        asked = Question(chain, tokens, request, lease_s, salt, ends)
        ids = self._ids(asked, self._whole_blocks(tokens))
        store = self._store.begin_lookup(ids, self._deadline_ms, lease_s, request)
        self.forget(request)
        if store is not None:
            self._begun[request] = _Begun(asked, store)

    def forget(self, request: int) -> None:
        """Nobody wants the answer to what was begun, nor what it promised."""
        begun = self._begun.pop(request, None)
        if begun is not None:
            self._store.drop_begun(begun.store)

    def _begun_of(self, asked: Question) -> tuple[Any, float]:
        """What was begun of this very question, if it is still good, and how long ago."""
        begun = self._begun.pop(asked.request, None)
        if begun is None:
            return None, 0.0
        before = begun.question
        is_same = (before.tokens, before.lease_s, before.salt) == (
            asked.tokens,
            asked.lease_s,
            asked.salt,
        )
        age_s = asked.ends - before.ends
        is_good = is_same and age_s < asked.lease_s * BEGUN_SHARE
        if is_good:
            return begun.store, age_s
        self._store.drop_begun(begun.store)
        return None, 0.0

    def _whole_blocks(self, tokens: int) -> list[tuple[Group, int]]:
        """The blocks of the full-attention groups, in the order of their tokens."""
        blocks = [
            (group, position)
            for group in self._groups.whole
            for position in range(tokens // group.block_tokens)
        ]
        # So that the first that is missing ends the prefix.
        blocks.sort(key=lambda block: (block[1] + 1) * block[0].block_tokens)
        return blocks

    def find(
        self, chain: Sequence[bytes], tokens: int, request: int, lease_s: float, salt: str
    ) -> Found | Unanswered:
        """What is stored of a prompt's first ``tokens``, and stays so long (0: need not)."""
        ends = self._now() + self._deadline_ms / 1000
        asked = Question(chain, tokens, request, lease_s, salt, ends)
        leases: list[StoreLease] = []
        try:
            whole = self._whole(asked, leases)
            hit = self._windowed(asked, whole, leases)
        except _NoAnswer as why:
            Leases(leases).release()
            return Unanswered(str(why))
        if not hit:
            Leases(leases).release()
            leases.clear()
        lease = None
        if leases:
            lease = leases[0] if len(leases) == 1 else Leases(leases)
        return Found(hit, lease, whole)

    def _whole(self, asked: Question, leases: list[StoreLease]) -> int:
        """The prefix that all full-attention groups have."""
        if not self._groups.whole:
            return asked.tokens
        blocks = self._whole_blocks(asked.tokens)
        ids = self._ids(asked, blocks)
        store, age_s = self._begun_of(asked)
        present = self._lookup(asked, ids, leases, store)
        if present < len(ids) and store is not None and age_s > FRESH_S:
            # More of it may have been stored since.
            Leases(leases).release()
            leases.clear()
            present = self._lookup(asked, ids, leases)
        if present == len(ids):
            return asked.tokens
        group, position = blocks[present // self._slices]
        first_missing_ends = (position + 1) * group.block_tokens
        return (first_missing_ends - 1) // self._groups.hit_tokens * self._groups.hit_tokens

    def _windowed(self, asked: Question, tokens: int, leases: list[StoreLease]) -> int:
        """The longest of these prefixes whose windows are there."""
        if not self._groups.windowed or not tokens:
            return tokens
        mine: list[StoreLease] = []
        windows = self._windows(tokens)
        if self._lookup(asked, self._ids(asked, windows), mine) == len(windows) * self._slices:
            leases += mine
            return tokens
        Leases(mine).release()
        there = self._present(asked, tokens)
        while tokens and not there.issuperset(self._windows(tokens)):
            tokens -= self._groups.hit_tokens
        if tokens and asked.lease_s:
            # The longest prefix shrank: nobody needs what was promised beyond it, and it ends soon.
            self._lookup(asked, self._ids(asked, self._windows(tokens)), leases)
        return tokens

    def _windows(self, tokens: int) -> list[tuple[Group, int]]:
        return [
            (group, position)
            for group in self._groups.windowed
            for position in range(group.needed_from(tokens), tokens // group.block_tokens)
        ]

    def _present(self, asked: Question, tokens: int) -> set[tuple[Group, int]]:
        blocks = [
            (group, position)
            for group in self._groups.windowed
            for position in range(tokens // group.block_tokens)
        ]
        answer = self._store.present(self._ids(asked, blocks), self._left_ms(asked))
        if answer is None:
            raise _NoAnswer(self._store.why_unanswered())
        slices = self._slices
        return {
            block
            for number, block in enumerate(blocks)
            if all(answer[number * slices : (number + 1) * slices])
        }

    def _lookup(
        self,
        asked: Question,
        ids: Sequence[bytes],
        leases: list[StoreLease],
        begun: Any = None,
    ) -> int:
        left_ms = self._left_ms(asked)
        if not asked.lease_s:
            found = self._store.lookup(ids, left_ms, asked.request)
            if found is None:
                raise _NoAnswer(self._store.why_unanswered())
            return found
        leased = self._store.lookup_leased(ids, left_ms, asked.lease_s, asked.request, begun)
        if leased is None:
            raise _NoAnswer(self._store.why_unanswered())
        if leased[1] is not None:
            leases.append(leased[1])
        return leased[0]

    def _left_ms(self, asked: Question) -> int:
        left_ms = round((asked.ends - self._now()) * 1000)
        if left_ms <= 0:
            raise _NoAnswer(LATE)
        return left_ms

    def _ids(self, asked: Question, blocks: Sequence[tuple[Group, int]]) -> list[bytes]:
        """Names block by block, each of all slices."""
        by_group: dict[int, dict[int, list[bytes]]] = {}
        for group in {group for group, _ in blocks}:
            positions = [position for its, position in blocks if its is group]
            first, last = min(positions), max(positions) + 1
            hashes = self._groups.hashes(group, asked.chain, first, last)
            text = self._texts[group.number]
            by_slice = [
                names(self._key, hashes, text, asked.salt, (number, self._slices), group.number)
                for number in range(self._slices)
            ]
            by_group[group.number] = {
                first + place: [ids[place] for ids in by_slice] for place in range(last - first)
            }
        return [name for group, position in blocks for name in by_group[group.number][position]]
