"""The scheduler's half, without vLLM: a request is what vLLM's is here, four attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from kvar.vllm.choice import EXPLORE_EVERY, Choice, Override
from kvar.vllm.groups import Groups
from kvar.vllm.orders import (
    FailedLoad,
    LoadReport,
    SaveReport,
    StepOrders,
    merge_failed,
    merge_reports,
)
from kvar.vllm.planner import LOOKUP_REUSE_S, WAIT_S_MAX, Found, Planner, Unanswered
from kvar.vllm.settings import Mode

BLOCK = 32


@dataclass
class Request:
    request_id: str
    num_tokens: int
    num_computed_tokens: int = 0
    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hash_known_tokens()

    def hash_known_tokens(self) -> None:
        self.block_hashes = [
            f"{self.request_id}-{position}".encode() for position in range(self.num_tokens // BLOCK)
        ]


class Lease:
    """A promise of the bench's store, which counts those that stand."""

    def __init__(self, standing: list[Lease]) -> None:
        self.renewals: list[float] = []
        self._standing = standing
        standing.append(self)

    def renew(self, ttl_s: float) -> None:
        assert self in self._standing, "renewed after its release"
        self.renewals.append(ttl_s)

    def release(self) -> None:
        self._standing.remove(self)


class Bench:
    """A planner with a store and a pool that count."""

    def __init__(
        self, *, ranks: int = 1, pool: int = 1000, loads: bool = True, by_layers: bool = False
    ) -> None:
        self.mode = Mode.LOAD
        self.leases: list[Lease] = []
        self.numbers = 0
        self.stored: set[bytes] = set()
        self.away = False
        self.lookups = 0
        self.holds: dict[int, int] = {}
        self.now = 100.0
        self.choice = Choice(override=Override.AUTO, deadline_s=2.0)
        self.planner = Planner(
            groups=Groups.one(BLOCK),
            pool_blocks=pool,
            ranks=ranks,
            loads=loads,
            saves=True,
            lookup=self.lookup,
            hold=self.hold,
            release=self.release,
            now=lambda: self.now,
            numbers=self.number,
            choice=self.choice,
            mode=lambda: self.mode,
            by_layers=by_layers,
        )

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def lookup(
        self, hashes: Sequence[bytes], tokens: int, request: int, lease_s: float
    ) -> Found | Unanswered:
        assert tokens == len(hashes) * BLOCK
        assert request > 0
        self.lookups += 1
        if self.away:
            return Unanswered("store_away")
        found = 0
        while found < len(hashes) and hashes[found] in self.stored:
            found += 1
        return Found(found * BLOCK, Lease(self.leases) if lease_s and found else None)

    def hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.holds[block] = self.holds.get(block, 0) + 1

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.holds[block] -= 1
            if not self.holds[block]:
                del self.holds[block]

    def step(self, request: Request, tokens: int, pages: Sequence[Sequence[int]]) -> StepOrders:
        orders = self.planner.step({request.request_id: tokens}, lambda _: pages)
        request.num_computed_tokens += tokens
        return orders

    def say(
        self,
        *,
        reports: dict[int, SaveReport] | None = None,
        loaded: Sequence[str] = (),
        lost_from: int | None = None,
    ) -> None:
        failed = (
            {} if lost_from is None else {name: FailedLoad(lost_from, "evicted") for name in loaded}
        )
        self.planner.worker_said(reports=reports or {}, loaded=loaded, failed=failed)


def pages(count: int, first: int = 1) -> tuple[list[int]]:
    """The page tables of a request: one group."""
    return (list(range(first, first + count)),)


def test_a_new_prompt_is_saved_block_by_block_as_it_fills() -> None:
    bench = Bench()
    request = Request("a", num_tokens=100)
    assert bench.planner.matched(request, 0) == 0
    bench.planner.allocated(request, pages(4), 0)
    first = bench.step(request, 70, pages(4))
    assert [order.block_ids for order in first.saves] == [[1, 2]]
    assert first.saves[0].hashes == [b"a-0", b"a-1"]
    assert bench.step(request, 25, pages(4)).saves == []
    assert [order.block_ids for order in bench.step(request, 5, pages(4)).saves] == [[3]]


def test_generated_tokens_are_saved_once_their_hash_is_known() -> None:
    bench = Bench()
    request = Request("a", num_tokens=32)
    bench.planner.matched(request, 0)
    bench.planner.allocated(request, pages(1), 0)
    assert len(bench.step(request, 32, pages(1)).saves) == 1
    # An engine that schedules ahead computes tokens whose values it does not know yet.
    assert bench.step(request, 32, pages(2)).saves == []
    request.num_tokens = 64
    request.hash_known_tokens()
    assert [order.depth for order in bench.step(request, 1, pages(3)).saves] == [1]


def test_what_is_stored_is_loaded_but_never_the_last_token() -> None:
    bench = Bench()
    request = Request("a", num_tokens=96)
    bench.stored = set(request.block_hashes)
    # Three blocks are there, but a prompt of exactly three blocks leaves one token to compute.
    assert bench.planner.matched(request, 0) == 64
    bench.planner.allocated(request, pages(3), 64)
    orders = bench.planner.step({}, lambda _: None)
    assert [(order.request_id, order.block_ids) for order in orders.loads] == [("a", [1, 2])]
    bench.say(loaded=["a"])
    request.num_computed_tokens = 64
    # Nothing that came from the store goes back to it.
    assert [order.block_ids for order in bench.step(request, 32, pages(3)).saves] == [[3]]
    assert bench.planner.counters.take()["loaded_tokens"] == 64


def test_only_what_goes_beyond_the_local_cache_is_loaded() -> None:
    bench = Bench()
    request = Request("a", num_tokens=200)
    bench.stored = set(request.block_hashes[:5])
    assert bench.planner.matched(request, 64) == 96
    bench.planner.allocated(request, pages(7), 96)
    (load,) = bench.planner.step({}, lambda _: None).loads
    assert load.block_ids == [3, 4, 5]
    assert load.hashes == [b"a-2", b"a-3", b"a-4"]


def test_a_local_hit_that_the_store_has_lost_is_stored_again() -> None:
    bench = Bench()
    request = Request("a", num_tokens=130)
    bench.stored = {b"a-0"}
    assert bench.planner.matched(request, 96) == 0
    bench.planner.allocated(request, pages(5), 0)
    request.num_computed_tokens = 96
    (save,) = bench.step(request, 34, pages(5)).saves
    assert (save.depth, save.block_ids) == (1, [2, 3, 4])


def test_a_store_that_is_away_costs_no_hit_and_no_error() -> None:
    bench = Bench()
    bench.away = True
    request = Request("a", num_tokens=130)
    assert bench.planner.matched(request, 64) == 0
    bench.planner.allocated(request, pages(5), 0)
    request.num_computed_tokens = 64
    # What was in the local cache had been saved when it was computed.
    (save,) = bench.step(request, 66, pages(5)).saves
    assert save.depth == 2
    assert bench.planner.counters.take()["failed_lookups"] == 1


def test_a_waiting_request_is_not_looked_up_in_every_step() -> None:
    bench = Bench()
    request = Request("a", num_tokens=100)
    for _ in range(50):
        bench.planner.matched(request, 0)
    assert bench.lookups == 1
    bench.now += LOOKUP_REUSE_S
    bench.planner.matched(request, 0)
    assert bench.lookups == 2


def test_pages_are_held_until_every_rank_has_reported() -> None:
    bench = Bench(ranks=2)
    request = Request("a", num_tokens=65)
    bench.planner.matched(request, 0)
    bench.planner.allocated(request, pages(3), 0)
    (save,) = bench.step(request, 65, pages(3)).saves
    bench.planner.finished(request, pages(3))
    assert bench.holds == {1: 1, 2: 1}
    assert bench.planner.has_work
    bench.say(reports={save.job: SaveReport(1, 2, 0)})
    assert bench.holds == {1: 1, 2: 1}
    bench.say(reports={save.job: SaveReport(1, 0, 2)})
    assert bench.holds == {}
    assert not bench.planner.has_work
    taken = bench.planner.counters.take()
    assert (taken["saved_tokens"], taken["unsaved_tokens"]) == (32, 32)


def test_ranks_that_report_together_are_added_up() -> None:
    mine, theirs = {1: SaveReport(1, 2, 0)}, {1: SaveReport(1, 1, 1), 2: SaveReport(1, 5, 0)}
    merged = merge_reports(mine, theirs)
    assert merged == {1: SaveReport(2, 3, 1), 2: SaveReport(1, 5, 0)}


def test_ranks_that_lose_different_blocks_have_lost_the_first_of_them() -> None:
    mine = {"a": FailedLoad(3, "absent"), "b": FailedLoad(0, "corrupt")}
    theirs = {"a": FailedLoad(1, "deadline"), "c": FailedLoad(2, "evicted")}
    merged = merge_failed(mine, theirs)
    assert merged == mine | theirs == merge_failed(theirs, mine)


def test_the_end_of_a_request_saves_what_filled_last() -> None:
    bench = Bench()
    request = Request("a", num_tokens=32)
    bench.planner.matched(request, 0)
    bench.planner.allocated(request, pages(1), 0)
    bench.step(request, 32, pages(1))
    request.num_computed_tokens = request.num_tokens = 64
    request.hash_known_tokens()
    bench.planner.finished(request, pages(2))
    (save,) = bench.planner.step({}, lambda _: None).saves
    assert (save.depth, save.block_ids) == (1, [2])
    assert bench.holds == {1: 1, 2: 1}


def test_a_request_aborted_while_it_loads_saves_nothing() -> None:
    bench = Bench()
    request = Request("a", num_tokens=100)
    bench.stored = set(request.block_hashes)
    bench.planner.allocated(request, pages(4), bench.planner.matched(request, 0))
    request.num_computed_tokens = 96
    bench.planner.finished(request, pages(3))
    orders = bench.planner.step({}, lambda _: None)
    assert orders.saves == []
    # Its end of loading comes later, and finds nobody.
    bench.say(loaded=["a"])
    assert bench.holds == {}


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_failed_load_is_not_tried_again_and_its_blocks_are_saved_anew(kept: int) -> None:
    bench = Bench()
    request = Request("a", num_tokens=100)
    bench.stored = set(request.block_hashes)
    bench.planner.allocated(request, pages(4), bench.planner.matched(request, 0))
    bench.planner.step({}, lambda _: None)
    bench.say(loaded=["a"], lost_from=kept)
    taken = bench.planner.counters.take()
    assert taken["failed_load_tokens"] == (3 - kept) * BLOCK
    assert taken.get("loaded_tokens", 0) == kept * BLOCK
    if kept == 0:
        # vLLM gives the pages back and asks from the start; the store still says "all there".
        assert bench.planner.matched(request, 0) == 0
        bench.stored.clear()
        bench.now += LOOKUP_REUSE_S
        assert bench.planner.matched(request, 0) == 0
        bench.planner.allocated(request, pages(4), 0)
    request.num_computed_tokens = kept * BLOCK
    (save,) = bench.step(request, 100 - kept * BLOCK, pages(4)).saves
    assert save.depth == kept


def test_saves_wait_when_too_much_of_the_pool_is_held() -> None:
    bench = Bench(pool=8)
    request = Request("a", num_tokens=6 * BLOCK)
    bench.planner.matched(request, 0)
    bench.planner.allocated(request, pages(6), 0)
    (first,) = bench.step(request, 6 * BLOCK, pages(6)).saves
    assert first.block_ids == [1, 2, 3, 4]
    assert bench.step(request, 1, pages(7)).saves == []
    bench.say(reports={first.job: SaveReport(1, 4, 0)})
    (rest,) = bench.step(request, 1, pages(7)).saves
    assert rest.block_ids == [5, 6]


def test_a_preempted_request_starts_over_and_its_pages_stay_held() -> None:
    bench = Bench()
    request = Request("a", num_tokens=100)
    bench.planner.matched(request, 0)
    bench.planner.allocated(request, pages(4), 0)
    (save,) = bench.step(request, 100, pages(4)).saves
    request.num_computed_tokens = 0
    assert bench.holds == {1: 1, 2: 1, 3: 1}
    bench.stored = {b"a-0", b"a-1"}
    bench.now += LOOKUP_REUSE_S
    assert bench.planner.matched(request, 0) == 64
    bench.planner.allocated(request, pages(4, first=11), 64)
    (load,) = bench.planner.step({}, lambda _: None).loads
    assert load.block_ids == [11, 12]
    bench.say(reports={save.job: SaveReport(1, 3, 0)})
    assert bench.holds == {}


def test_after_a_reset_nothing_begun_before_is_saved() -> None:
    bench = Bench()
    old, new = Request("old", num_tokens=100), Request("new", num_tokens=100)
    bench.planner.matched(old, 0)
    bench.planner.allocated(old, pages(4), 0)
    bench.planner.reset("salt")
    assert bench.step(old, 100, pages(4)).saves == []
    bench.planner.matched(new, 0)
    bench.planner.allocated(new, pages(4), 0)
    orders = bench.step(new, 100, pages(4))
    assert (len(orders.saves), orders.salt) == (1, "salt")


def test_what_was_computed_while_a_load_by_layers_failed_is_never_saved() -> None:
    bench = Bench()
    one, two, three = (Request(name, num_tokens=96) for name in "abc")
    for request in (one, two):
        bench.planner.matched(request, 0)
        bench.planner.allocated(request, pages(3), 0)
    assert bench.step(one, 32, pages(3)).failures_heard == 0
    # The worker says so in the output of the step, with the pages that it lost.
    bench.planner.worker_said(reports={}, loaded=["a"], failed={}, failures=1)
    for request in (one, two):
        orders = bench.step(request, 64, pages(3))
        assert (orders.saves, orders.failures_heard) == ([], 1)
    # Who begins meanwhile may share pages that are being computed anew.
    bench.planner.matched(three, 0)
    bench.planner.allocated(three, pages(3), 0)
    assert bench.step(three, 96, pages(3)).saves == []
    for request in (one, two, three):
        bench.planner.finished(request, pages(3))
    assert bench.step(one, 0, pages(3)).saves == []
    four = Request("d", num_tokens=96)
    bench.planner.matched(four, 0)
    bench.planner.allocated(four, pages(3), 0)
    assert len(bench.step(four, 96, pages(3)).saves) == 1


def test_a_connector_that_may_not_load_still_counts_what_is_there() -> None:
    bench = Bench(loads=False)
    request = Request("a", num_tokens=100)
    bench.stored = {b"a-0", b"a-1"}
    assert bench.planner.matched(request, 0) == 0
    assert bench.planner.counters.take()["stored_tokens"] == 64
    assert bench.leases == []


def loading(bench: Bench) -> Request:
    """A request whose load has been ordered."""
    request = Request("a", num_tokens=100)
    bench.stored = set(request.block_hashes)
    bench.planner.allocated(request, pages(4), bench.planner.matched(request, 0))
    assert len(bench.leases) == 1
    (load,) = bench.planner.step({}, lambda _: None).loads
    assert load.request == 1
    return request


def test_what_was_found_is_leased_until_it_is_loaded() -> None:
    bench = Bench()
    loading(bench)
    (lease,) = bench.leases
    assert lease.renewals == []
    # A load that takes long keeps its promise, renewed at half of its time and not in every step.
    for _ in range(40):
        bench.now += 0.25
        bench.planner.step({}, lambda _: None)
    assert lease.renewals == [2.0] * 10
    bench.say(loaded=["a"])
    assert bench.leases == []
    bench.now += 5
    bench.planner.step({}, lambda _: None)


@pytest.mark.parametrize("end", ["failed", "aborted", "aborted while it waits"])
def test_a_lease_ends_with_its_request_however_it_ends(end: str) -> None:
    bench = Bench()
    if end == "aborted while it waits":
        request = Request("a", num_tokens=100)
        bench.stored = set(request.block_hashes)
        assert bench.planner.matched(request, 0) > 0
        assert len(bench.leases) == 1
        bench.planner.finished(request, [])
    elif end == "aborted":
        bench.planner.finished(loading(bench), pages(4))
    else:
        loading(bench)
        bench.say(loaded=["a"], lost_from=0)
    assert bench.leases == []
    bench.now += 5
    bench.planner.step({}, lambda _: None)


def test_a_request_that_waits_keeps_its_lease_for_a_while() -> None:
    bench = Bench()
    request = Request("a", num_tokens=100)
    bench.stored = set(request.block_hashes)
    bench.planner.matched(request, 0)
    bench.now += LOOKUP_REUSE_S
    bench.planner.step({}, lambda _: None)
    (lease,) = bench.leases
    assert lease.renewals == [2.0]
    # Asked about again, it is looked up anew: one promise, never two.
    bench.planner.matched(request, 0)
    assert len(bench.leases) == 1
    assert bench.leases != [lease]
    bench.now += WAIT_S_MAX + 1
    bench.planner.step({}, lambda _: None)
    assert bench.leases == []
    assert bench.planner.matched(request, 0) == 96
    assert len(bench.leases) == 1


def test_nothing_is_leased_that_is_not_loaded() -> None:
    bench = Bench()
    request = Request("a", num_tokens=100)
    bench.stored = set(request.block_hashes)
    # The engine has it all itself.
    assert bench.planner.matched(request, 96) == 0
    assert bench.leases == []
    # Its turn came and no pages were to be had for the load.
    bench.now += LOOKUP_REUSE_S
    assert bench.planner.matched(request, 0) == 96
    bench.planner.allocated(request, [], 0)
    assert bench.leases == []
    # A failed load is not tried again, so nothing is promised to it.
    other = Bench()
    failed = loading(other)
    other.say(loaded=["a"], lost_from=0)
    other.planner.matched(failed, 0)
    assert other.leases == []


def test_all_orders_of_a_prompt_have_its_number() -> None:
    bench = Bench()
    one, two = Request("a", num_tokens=65), Request("b", num_tokens=65)
    numbers = []
    for request in (one, two):
        bench.planner.matched(request, 0)
        bench.planner.allocated(request, pages(3), 0)
        (save,) = bench.step(request, 65, pages(3)).saves
        numbers.append(save.request)
    assert numbers == [1, 2]


def seen(bench: Bench, *, computed_a_s: float, loaded_a_s: float) -> None:
    """The engine computes and the store brings so many tokens a second; both were seen."""
    teacher = Request("teacher", num_tokens=1000)
    bench.planner.matched(teacher, 0)
    bench.planner.allocated(teacher, pages(32), 0)
    orders = bench.step(teacher, 1000, pages(32))
    bench.now += 1000 / computed_a_s
    bench.planner.worker_said(
        reports={orders.saves[0].job: SaveReport(1, len(orders.saves[0].block_ids), 0)},
        loaded=(),
        failed={},
        loads=LoadReport(BLOCK, BLOCK / loaded_a_s),
        step=orders.step,
    )
    bench.planner.counters.take()


def test_what_is_computed_sooner_is_not_loaded_and_its_lease_ends() -> None:
    bench = Bench()
    request = Request("a", num_tokens=640)
    bench.stored.update(request.block_hashes)
    seen(bench, computed_a_s=10_000, loaded_a_s=1_000)
    assert bench.planner.matched(request, 0) == 0
    assert bench.leases == []
    bench.planner.allocated(request, pages(20), 0)
    assert bench.planner.counters.take()["recompute_tokens"] == 19 * BLOCK
    # It is there already: nothing to save but the last block.
    assert [order.depth for order in bench.step(request, 640, pages(20)).saves] == [19]


def test_of_a_long_prefix_only_what_arrives_in_time_is_loaded() -> None:
    bench = Bench()
    request = Request("a", num_tokens=3201)
    bench.stored.update(request.block_hashes)
    seen(bench, computed_a_s=100, loaded_a_s=1_000)
    tokens = bench.planner.matched(request, 0)
    # Half of two seconds at 1000 tokens a second, less the start, in whole blocks.
    assert tokens == 31 * BLOCK
    bench.planner.allocated(request, pages(101), tokens)
    assert bench.choice.queued_tokens == tokens
    assert len(bench.step(request, 1, pages(101)).loads[0].block_ids) == tokens // BLOCK
    bench.say(loaded=["a"])
    assert bench.choice.queued_tokens == 0


def test_a_load_that_waits_behind_others_loses_to_computing() -> None:
    bench = Bench()
    seen(bench, computed_a_s=3_000, loaded_a_s=4_000)
    first, second = Request("a", num_tokens=3201), Request("b", num_tokens=3201)
    for request in (first, second):
        bench.stored.update(request.block_hashes)
    tokens = bench.planner.matched(first, 0)
    assert tokens == 3200
    bench.planner.allocated(first, pages(101), tokens)
    assert bench.planner.matched(second, 0) == 0
    # Aborted: what it ordered is not waited for any more.
    bench.planner.finished(first, pages(101))
    bench.now += 10
    assert bench.planner.matched(second, 0) == 3200


def test_now_and_then_a_load_is_tried_all_the_same() -> None:
    bench = Bench()
    seen(bench, computed_a_s=10_000, loaded_a_s=1_000)
    loads = 0
    for number in range(2 * EXPLORE_EVERY):
        request = Request(f"r{number}", num_tokens=129)
        bench.stored.update(request.block_hashes)
        loads += bench.planner.matched(request, 0) > 0
    assert loads == 2
    assert bench.planner.counters.take()["explored_requests"] == 2


def turn(bench: Bench, request: Request) -> tuple[int, StepOrders]:
    """One request asked about, given its pages and run for a step."""
    tokens = bench.planner.matched(request, 0)
    bench.planner.allocated(request, pages(4), tokens)
    return tokens, bench.step(request, 100, pages(4))


def test_each_mode_does_what_its_word_says() -> None:
    bench = Bench()
    bench.stored = {f"{mode.value}-{n}".encode() for mode in Mode for n in (0, 1)}
    did = {}
    for mode in Mode:
        bench.mode, bench.lookups = mode, 0
        tokens, orders = turn(bench, Request(mode.value, num_tokens=100))
        did[mode] = (bench.lookups, tokens, len(orders.loads), len(orders.saves))
        bench.now += 10
    assert did == {
        Mode.OFF: (0, 0, 0, 0),
        Mode.OBSERVE: (1, 0, 0, 0),
        Mode.SAVE: (1, 0, 0, 1),
        Mode.LOAD: (1, 64, 1, 1),
    }
    counts = bench.planner.counters.take()
    # Two lookups whose blocks were not loaded, of two blocks each.
    assert (counts["observed_lookups"], counts["observed_tokens"]) == (2, 4 * BLOCK)
    assert (counts["hit_tokens"], len(bench.leases)) == (2 * BLOCK, 1)


def test_a_switch_to_off_ends_nothing_that_was_begun_and_begins_nothing() -> None:
    bench = Bench()
    going = loading(bench)
    waiting = Request("b", num_tokens=100)
    bench.stored |= set(waiting.block_hashes)
    assert bench.planner.matched(waiting, 0) > 0
    assert len(bench.leases) == 2
    bench.mode = Mode.OFF
    # Who waits is asked about again, and finds nothing; its promise is given back.
    assert bench.planner.matched(waiting, 0) == 0
    assert len(bench.leases) == 1
    bench.planner.allocated(waiting, pages(4), 0)
    assert bench.step(waiting, 100, pages(4)).saves == []
    # Who loads goes on to the end.
    bench.say(loaded=["a"])
    assert bench.planner.counters.take()["loaded_tokens"] == 96
    assert bench.leases == []
    bench.planner.finished(going, pages(4))
    bench.planner.finished(waiting, pages(4))
    assert not bench.planner.has_work
    before = bench.lookups
    assert turn(bench, Request("c", num_tokens=100))[0] == 0
    assert bench.lookups == before


def test_a_load_that_vllm_has_taken_pages_for_is_ordered_after_a_switch_too() -> None:
    bench = Bench()
    request = Request("a", num_tokens=100)
    bench.stored = set(request.block_hashes)
    tokens = bench.planner.matched(request, 0)
    bench.mode = Mode.OFF
    bench.planner.allocated(request, pages(4), tokens)
    (load,) = bench.planner.step({}, lambda _: None).loads
    assert len(load.block_ids) * BLOCK == tokens


def test_what_runs_when_the_operator_switches_saves_on_is_saved_as_far_as_it_is_known() -> None:
    bench = Bench()
    bench.mode = Mode.OBSERVE
    request = Request("a", num_tokens=100)
    assert turn(bench, request)[1].saves == []
    bench.mode = Mode.SAVE
    request.num_tokens = 130
    request.hash_known_tokens()
    (save,) = bench.step(request, 30, pages(4)).saves
    assert (save.depth, len(save.hashes)) == (0, 4)
