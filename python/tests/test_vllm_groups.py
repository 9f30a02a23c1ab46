"""Several groups of layers: an engine with page tables like vLLM's, a store that loses blocks.

What is checked in every life: the hit is the longest that what is stored allows, what a request
goes on with is its own KV in every block that is needed, and no page of another's is ever written.
"""

from __future__ import annotations

import doctest
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

import kvar
from kvar.vllm import groups as module
from kvar.vllm.choice import Choice, Override
from kvar.vllm.finder import Finder
from kvar.vllm.groups import Group, Groups
from kvar.vllm.orders import FailedLoad, LoadOrder, SaveOrder, SaveReport
from kvar.vllm.planner import Found, Planner, StoreLease, Unanswered
from kvar.vllm.worker import names

NULL = 0
HASH = 16
SETS = {
    "gemma": [Group(n, 16, 48) for n in range(2)] + [Group(2, 16)],
    "unequal": [Group(0, 32), Group(1, 16, 40)],
    "unequal windows": [Group(0, 16, 24), Group(1, 48, 100), Group(2, 16)],
    "windows alone": [Group(0, 16, 33)],
    "one": [Group(0, 16)],
    "no windows": [Group(0, 16), Group(1, 32)],
}


@pytest.fixture
def key() -> kvar.NamespaceKey:
    return kvar.NamespaceKey.from_hex("11" * 32)


class Promise:
    def __init__(self, store: FakeStore, ids: Sequence[bytes]) -> None:
        self.ids = ids
        self._store = store
        store.promises.append(self)

    def renew(self, ttl_s: float) -> None:
        assert self in self._store.promises

    def release(self) -> None:
        self._store.promises.remove(self)


class FakeStore:
    """Blocks by name; what is promised is not lost, unless it breaks its word."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, tuple[int, bytes]] = {}
        self.promises: list[Promise] = []
        self.questions = 0
        self.silent_from = 1 << 30
        self.begun = 0

    def _asked(self) -> bool:
        self.questions += 1
        return self.questions < self.silent_from

    def _leading(self, ids: Sequence[bytes]) -> int:
        return next((n for n, name in enumerate(ids) if name not in self.blocks), len(ids))

    def lookup(self, ids: Sequence[bytes], deadline_ms: int, request: int = 0) -> int | None:
        return self._leading(ids) if self._asked() else None

    def begin_lookup(
        self, ids: Sequence[bytes], deadline_ms: int, ttl_s: float, request: int = 0
    ) -> Any:
        self.begun += 1
        found = self._leading(ids)
        return found, Promise(self, ids[:found]) if found else None

    def drop_begun(self, begun: Any) -> None:
        if begun[1] is not None:
            begun[1].release()

    def lookup_leased(
        self,
        ids: Sequence[bytes],
        deadline_ms: int,
        ttl_s: float,
        request: int = 0,
        begun: Any = None,
    ) -> tuple[int, StoreLease | None] | None:
        if not self._asked():
            return None
        if begun is not None:
            return begun  # type: ignore[no-any-return]
        found = self._leading(ids)
        return found, Promise(self, ids[:found]) if found else None

    def present(self, ids: Sequence[bytes], deadline_ms: int) -> list[bool] | None:
        return [name in self.blocks for name in ids] if self._asked() else None

    def why_unanswered(self) -> str:
        return "lookup_deadline"

    def lose(self, chance: random.Random, share: float) -> None:
        kept = {name for promise in self.promises for name in promise.ids}
        for name in list(self.blocks):
            if name not in kept and chance.random() < share:
                del self.blocks[name]


@dataclass
class Request:
    request_id: str
    chain: list[bytes]
    num_tokens: int
    num_computed_tokens: int = 0
    tables: list[list[int]] = field(default_factory=list)

    @property
    def block_hashes(self) -> list[bytes]:
        return self.chain[: self.num_tokens // HASH]


def chain_of(prompt: Sequence[int]) -> list[bytes]:
    chain, before = [], b""
    for part in prompt:
        before = hashlib.sha256(before + bytes([part])).digest()
        chain.append(before)
    return chain


class Engine:
    """Pages, page tables and steps, by vLLM's rules; the worker is part of it."""

    def __init__(self, key: kvar.NamespaceKey, groups: Groups, store: FakeStore, pool: int) -> None:
        self.key, self.groups, self.store = key, groups, store
        self.free = list(range(1, pool))
        self.users: dict[int, int] = {}
        self.content: dict[int, tuple[int, bytes]] = {}
        self.saving: list[SaveOrder] = []
        self.now = 0.0
        finder = Finder(
            store=store,
            key=key,
            groups=groups,
            texts=[f"group {group.number}" for group in groups.all],
            slices=1,
            deadline_ms=1000,
            now=lambda: self.now,
        )
        self.planner = Planner(
            groups=groups,
            pool_blocks=pool,
            ranks=1,
            loads=True,
            saves=True,
            lookup=partial(finder.find, salt=""),
            hold=self.take_all,
            release=self.give_all,
            choice=Choice(override=Override.ALWAYS, deadline_s=2.0),
            now=lambda: self.now,
        )

    def take(self, page: int) -> None:
        assert page != NULL
        self.users[page] = self.users.get(page, 0) + 1

    def give(self, page: int) -> None:
        self.users[page] -= 1
        if not self.users[page]:
            del self.users[page]
            # Whoever gets it next may find anything in it.
            self.content[page] = (-1, b"garbage")
            self.free.append(page)

    def take_all(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.take(page)

    def give_all(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.give(page)

    def new_page(self) -> int:
        page = self.free.pop()
        self.take(page)
        return page

    def mine(self, request: Request, group: Group, position: int) -> tuple[int, bytes]:
        (name,) = self.groups.hashes(group, request.chain, position, position + 1)
        return group.number, name

    def names(self, order: LoadOrder | SaveOrder) -> list[bytes]:
        text = f"group {order.group}"
        return names(self.key, order.hashes, text, "", (0, 1), order.group)

    def room(self, request: Request, tokens: int) -> None:
        """Pages for so many tokens; what windows leave behind becomes the null page."""
        for group, table in zip(self.groups.all, request.tables, strict=True):
            while len(table) < -(-tokens // group.block_tokens):
                table.append(self.new_page())

    def slide(self, request: Request, tokens: int) -> None:
        for group, table in zip(self.groups.all, request.tables, strict=True):
            for position in range(min(group.needed_from(tokens), len(table))):
                if table[position] != NULL:
                    self.give(table[position])
                    table[position] = NULL

    def drop(self, request: Request) -> None:
        for table in request.tables:
            for page in table:
                if page != NULL:
                    self.give(page)
        request.tables = [[] for _ in self.groups.all]

    def begin(self, request: Request, local: int) -> int:
        """Admits a request with so many tokens of the engine's own; how many were loaded."""
        planner = self.planner
        self.drop(request)
        tokens = planner.matched(request, local)
        total = local + tokens
        for group, table in zip(self.groups.all, request.tables, strict=True):
            for position in range(total // group.block_tokens):
                table.append(NULL if position < group.needed_from(total) else self.new_page())
                if position * group.block_tokens < local and table[position] != NULL:
                    self.content[table[position]] = self.mine(request, group, position)
        planner.allocated(request, request.tables, tokens)
        request.num_computed_tokens = total
        if not tokens:
            return 0
        orders = planner.step({}, lambda _: None).loads
        lost = self.load(orders)
        failed = {}
        if lost is not None:
            kept = 0 if self.groups.fail_whole else lost
            failed = {request.request_id: FailedLoad(kept, "evicted")}
            tokens = kept * self.groups.hit_tokens
        planner.worker_said(reports={}, loaded=[request.request_id], failed=failed)
        if lost is not None and not tokens:
            return self.begin(request, local)
        request.num_computed_tokens = local + tokens
        planner.allocated(request, request.tables, 0)
        return tokens

    def load(self, orders: Sequence[LoadOrder]) -> int | None:
        """Fills pages; the first place that was lost."""
        lost = None
        assert {order.orders for order in orders} == {len(orders)}
        for order in orders:
            for place, (name, page) in enumerate(
                zip(self.names(order), order.block_ids, strict=True)
            ):
                assert page != NULL and self.users[page] == 1
                if name in self.store.blocks:
                    self.content[page] = self.store.blocks[name]
                elif lost is None:
                    lost = place
        return lost

    def is_right(self, request: Request) -> bool:
        """Whether everything is there that the next token looks at."""
        tokens = request.num_computed_tokens
        return all(
            self.content[table[position]] == self.mine(request, group, position)
            for group, table in zip(self.groups.all, request.tables, strict=True)
            for position in range(group.needed_from(tokens), tokens // group.block_tokens)
        )

    def compute(self, request: Request, tokens: int) -> None:
        """One step of so many tokens, and what is ordered to be saved in it."""
        before = request.num_computed_tokens
        self.slide(request, before)
        self.room(request, before + tokens)
        orders = self.planner.step({request.request_id: tokens}, lambda _: request.tables)
        request.num_computed_tokens = before + tokens
        for group, table in zip(self.groups.all, request.tables, strict=True):
            first = before // group.block_tokens
            for position in range(first, (before + tokens) // group.block_tokens):
                if table[position] != NULL:
                    self.content[table[position]] = self.mine(request, group, position)
        self.saving += orders.saves

    def end_saves(self) -> None:
        """What was ordered is stored from the pages as they are now."""
        reports = {}
        for order in self.saving:
            for name, page, its in zip(
                self.names(order), order.block_ids, order.hashes, strict=True
            ):
                assert self.content[page] == (order.group, its), "saved what was not its own"
                self.store.blocks[name] = self.content[page]
            reports[order.job] = SaveReport(1, len(order.block_ids), 0)
        self.saving = []
        self.planner.worker_said(reports=reports, loaded=[], failed={})

    def end(self, request: Request) -> None:
        self.slide(request, request.num_computed_tokens)
        self.planner.finished(request, request.tables)
        self.saving += self.planner.step({}, lambda _: None).saves
        self.drop(request)

    def best_hit(self, request: Request) -> int:
        """The longest prefix that is stored, by trying all."""

        def there(group: Group, position: int) -> bool:
            number, its = self.mine(request, group, position)
            text = f"group {number}"
            (name,) = names(self.key, [its], text, "", (0, 1), number)
            return name in self.store.blocks

        usable = (request.num_tokens - 1) // self.groups.hit_tokens * self.groups.hit_tokens
        return max(
            tokens
            for tokens in range(0, usable + 1, self.groups.hit_tokens)
            if all(
                there(group, position)
                for group in self.groups.all
                for position in range(group.needed_from(tokens), tokens // group.block_tokens)
            )
        )


@pytest.mark.parametrize("kind", SETS)
def test_whatever_is_lost_a_request_goes_on_with_its_own_kv(
    kind: str, key: kvar.NamespaceKey
) -> None:
    hits = losses = 0
    for seed in range(40):
        chance = random.Random(f"{kind} {seed}")
        store = FakeStore()
        engine = Engine(key, Groups(SETS[kind], HASH), store, chance.choice([120, 2000]))
        prompts: list[list[int]] = [[]]
        for number in range(12):
            # A prompt goes on from where another one was at some time.
            stem = chance.choice(prompts)
            stem = stem[: chance.randrange(len(stem) + 1)]
            prompt = stem + [chance.randrange(256) for _ in range(chance.randrange(1, 14))]
            prompt = prompt[:24]
            prompts.append(prompt)
            tokens = len(prompt) * HASH + chance.randrange(HASH)
            tokens = max(tokens - chance.randrange(HASH), 1)
            request = Request(f"r{number}", chain_of([*prompt, 0]), tokens)
            hit = engine.groups.hit_tokens
            local = chance.randrange((tokens - 1) // hit + 1) * hit if chance.random() < 0.3 else 0
            best = engine.best_hit(request)
            if chance.random() < 0.2:
                # The store breaks its word between lookup and load.
                asked = engine.planner.matched(request, local)
                promised = [name for promise in store.promises for name in promise.ids]
                store.blocks.pop(chance.choice(promised or [b""]), None)
                loaded = engine.begin(request, local)
                losses += loaded < asked
            else:
                loaded = engine.begin(request, local)
                assert loaded == max(best - local, 0), (seed, number)
            hits += loaded > 0
            assert engine.is_right(request), (seed, number)
            while request.num_computed_tokens < tokens:
                left = tokens - request.num_computed_tokens
                engine.compute(request, min(left, chance.randrange(1, 100)))
                assert engine.is_right(request)
                if chance.random() < 0.5:
                    engine.end_saves()
            engine.end(request)
            if chance.random() < 0.8:
                engine.end_saves()
            store.lose(chance, chance.choice([0, 0, 0.05, 0.3]))
            engine.now += 10
        engine.end_saves()
        assert engine.users == {}, "pages are still held"
        assert store.promises == [], "promises still stand"
    assert hits > 50
    assert losses > 3


def test_what_is_saved_of_a_prompt_is_found_again_whole(key: kvar.NamespaceKey) -> None:
    for kind, groups in SETS.items():
        store = FakeStore()
        engine = Engine(key, Groups(groups, HASH), store, 1000)
        for number in range(2):
            request = Request(f"r{number}", chain_of(range(20)), 20 * HASH)
            loaded = engine.begin(request, 0)
            hit = engine.groups.hit_tokens
            assert loaded == (number and (20 * HASH - 1) // hit * hit), kind
            engine.compute(request, request.num_tokens - loaded)
            engine.end(request)
            engine.end_saves()


def test_a_hit_of_a_long_prompt_loads_only_the_windows_ends(key: kvar.NamespaceKey) -> None:
    groups = Groups([Group(0, 16, 48), Group(1, 16)], HASH)
    engine = Engine(key, groups, FakeStore(), 1000)
    request = Request("a", chain_of(range(20)), 20 * HASH)
    engine.begin(request, 0)
    engine.compute(request, request.num_tokens)
    engine.end_saves()
    assert len(engine.store.blocks) == 40, "every block of every group is saved as it fills"
    again = Request("b", request.chain, request.num_tokens)
    assert engine.planner.matched(again, 64) == 240
    tables = [[NULL] * 16 + [1, 2, 3], list(range(4, 23))]
    engine.planner.allocated(again, tables, 240)
    loads = engine.planner.step({}, lambda _: None).loads
    assert [(load.group, load.depth, load.block_ids) for load in loads] == [
        (0, 16, [1, 2, 3]),
        (1, 4, list(range(8, 23))),
    ]
    assert sum(load.tokens for load in loads) == 240


def finder_of(key: kvar.NamespaceKey, store: FakeStore, clock: list[float]) -> Finder:
    return Finder(
        store=store,
        key=key,
        groups=Groups([Group(0, 16, 48), Group(1, 16)], HASH),
        texts=["w", "f"],
        slices=2,
        deadline_ms=20,
        now=lambda: clock.pop(0) if len(clock) > 1 else clock[0],
    )


def stored(key: kvar.NamespaceKey, chain: list[bytes], *, windows: Sequence[int]) -> FakeStore:
    """A store that has the full-attention blocks of a chain, and these of the window's."""
    store = FakeStore()
    for rank in range(2):
        ids = names(key, chain, "f", "", (rank, 2), 1)
        window = names(key, chain, "w", "", (rank, 2), 0)
        store.blocks |= dict.fromkeys(ids, (1, b""))
        store.blocks |= {window[position]: (0, b"") for position in windows}
    return store


def test_the_usual_hit_takes_two_questions_and_is_promised_whole(key: kvar.NamespaceKey) -> None:
    chain = chain_of(range(10))
    store = stored(key, chain, windows=[7, 8, 9])
    found = finder_of(key, store, [0.0]).find(chain, 160, 1, 2.0, "")
    assert isinstance(found, Found)
    assert (found.tokens, store.questions) == (160, 2)
    assert sum(len(promise.ids) for promise in store.promises) == 2 * 13
    assert found.lease is not None
    found.lease.renew(2.0)
    found.lease.release()
    assert store.promises == []


def test_a_hit_ends_where_the_windows_are(key: kvar.NamespaceKey) -> None:
    chain = chain_of(range(10))
    # The window of 6 blocks is there, that of 10 is not.
    store = stored(key, chain, windows=[0, 3, 4, 5, 9])
    found = finder_of(key, store, [0.0]).find(chain, 160, 1, 2.0, "")
    assert isinstance(found, Found)
    assert (found.tokens, found.whole) == (96, 160)
    store = stored(key, chain, windows=[5, 9])
    assert finder_of(key, store, [0.0]).find(chain, 160, 1, 2.0, "") == Found(0, None, 160)
    assert store.promises == [], "nothing is promised where nothing is hit"


@pytest.mark.parametrize("question", [1, 2, 3, 4])
def test_no_answer_to_any_of_the_questions_is_no_answer(
    question: int, key: kvar.NamespaceKey
) -> None:
    chain = chain_of(range(10))
    store = stored(key, chain, windows=[3, 4, 5])
    store.silent_from = question
    said = finder_of(key, store, [0.0]).find(chain, 160, 1, 2.0, "")
    assert said == Unanswered("lookup_deadline")
    assert store.promises == []


def test_all_questions_together_keep_to_one_deadline(key: kvar.NamespaceKey) -> None:
    chain = chain_of(range(10))
    store = stored(key, chain, windows=[3, 4, 5])
    said = finder_of(key, store, [0.0, 0.001, 0.021]).find(chain, 160, 1, 2.0, "")
    assert (said, store.questions) == (Unanswered("lookup_deadline"), 1)


def test_the_examples_hold() -> None:
    assert doctest.testmod(module).failed == 0


def test_when_few_pages_may_be_held_those_go_first_that_a_window_leaves_behind(
    key: kvar.NamespaceKey,
) -> None:
    engine = Engine(key, Groups([Group(0, 16), Group(1, 16, 48)], HASH), FakeStore(), 12)
    request = Request("a", chain_of(range(5)), 5 * HASH)
    engine.begin(request, 0)
    request.tables = [list(range(1, 6)), list(range(6, 11))]
    orders = engine.planner.step({"a": 5 * HASH}, lambda _: request.tables)
    # Half of 12 pages: all five of the window's, and one of the others.
    assert [(save.group, save.block_ids) for save in orders.saves] == [
        (1, [6, 7, 8, 9, 10]),
        (0, [1]),
    ]


def test_what_was_asked_at_arrival_is_the_answer_while_it_is_good(key: kvar.NamespaceKey) -> None:
    clock = [0.0]
    store = FakeStore()
    finder = Finder(
        store=store,
        key=key,
        groups=Groups.one(HASH),
        texts=["f"],
        slices=1,
        deadline_ms=20,
        now=lambda: clock[0],
    )
    chain = chain_of(range(4))
    ids = names(key, chain, "f", "", (0, 1), 0)
    tokens = 4 * HASH

    def found(request: int, *, later: float) -> int:
        """Two blocks are there at arrival, and all of them ``later``."""
        store.blocks = dict.fromkeys(ids[:2], (0, b""))
        finder.begin(chain, tokens, request, 2.0, "")
        store.blocks = dict.fromkeys(ids, (0, b""))
        clock[0] += later
        found = finder.find(chain, tokens, request, 2.0, "")
        assert isinstance(found, Found) and found.lease is not None
        found.lease.release()
        assert not store.promises
        return found.tokens

    assert found(1, later=0.01) == 2 * HASH
    # The question is spent; asked again it is asked anew.
    assert finder.find(chain, tokens, 1, 0.0, "") == Found(tokens, None, tokens)
    # More may have come since.
    assert found(2, later=0.1) == tokens
    assert found(3, later=1.0) == tokens
    # After a reset it was about other blocks.
    finder.begin(chain, tokens, 4, 2.0, "")
    assert finder.find(chain, tokens, 4, 2.0, "new") == Found(0)
    assert not store.promises
    # Where all was there at arrival, nothing more can have come.
    finder.begin(chain, tokens, 5, 2.0, "")
    clock[0] += 0.1
    before = store.questions
    found_5 = finder.find(chain, tokens, 5, 2.0, "")
    assert isinstance(found_5, Found) and found_5.lease is not None
    found_5.lease.release()
    assert (store.questions, store.begun) == (before + 1, 5)
    # Of one that nobody asks about any more, or that is begun anew, nothing stays promised.
    finder.begin(chain, tokens, 6, 2.0, "")
    finder.begin(chain, tokens, 6, 2.0, "")
    assert len(store.promises) == 1
    finder.forget(6)
    assert not finder._begun and not store.promises
