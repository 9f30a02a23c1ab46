"""The scheduler's half: what is there, what to load, what to save. Decides; moves no bytes.

What must always be true:
* nothing here raises on the engine's path or waits longer than one lookup;
* a page ordered to be saved is held until every rank has reported, so that it is neither freed nor
  overwritten while it is read, whatever happens to its request (end, abort, preemption);
* a request whose load failed is not sent to load again, so that it cannot go round for ever;
* what was computed while a load by layers failed may be wrong, and is not saved: the requests that
  ran then save nothing more, nor do those that begin before the last of them has ended (they may
  share pages that are being computed anew);
* what a request was promised (its lease) is held from its lookup to the end of its load, and let go
  when there is nothing to load, when the load has ended, and when the request ends in any way;
* a switch of the mode holds from the next question on: what was ordered before goes on to its end,
  so that no request fails by it.

A request's life here:

```text
          matched()            allocated(n > 0)           loaded / failed
  new  --------------> known ------------------> loading ----------------> running
                         |   allocated(0)                                    |
                         +-----------------------------------------------> running --> finished()
  preempted: back to new (matched() again); its ordered saves go on under their holds
  lease:     |<-- taken by matched(), renewed by step() -->|   let go: loaded, failed, finished()
```

``saved`` of a request counts, group by group, its leading blocks that are in the store or on their
way, or gone. Every step orders the full blocks beyond it, prompt and generated tokens alike. A
local hit that the store has lost is thereby stored again.

Layers may be in several groups with page tables of their own (``groups``): what is loaded or saved
is then ordered for each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from kvar.vllm.choice import Choice, Chosen
from kvar.vllm.funnel import Funnel
from kvar.vllm.groups import Group, Groups
from kvar.vllm.metrics import Counters
from kvar.vllm.orders import FailedLoad, LoadOrder, LoadReport, SaveOrder, SaveReport, StepOrders
from kvar.vllm.settings import Mode

# A request that finds no free memory is asked about in every step. Its answer stays good for half
# of the two seconds that a lookup's lease lasts by default.
LOOKUP_REUSE_S = 1.0

# A lease is renewed when this share of its time is over: one lost renewal does no harm.
RENEW_SHARE = 0.5

# How long a request that only waits may hold what it was promised: the store promises a small share
# of itself, and a queue of minutes would take all of it. It is looked up anew when its turn comes.
WAIT_S_MAX = 30.0

# Pages held for saving are taken from the engine's pool when their request ends before they are
# stored. Half of the pool leaves room for new work; saves beyond it wait for a later step.
HELD_SHARE_MAX = 0.5


class StoreLease(Protocol):
    """A promise that blocks stay; calls neither wait nor raise."""

    def renew(self, ttl_s: float) -> None:
        """Lets it last so long from now."""

    def release(self) -> None:
        """Ends it."""


@dataclass
class Found:
    """What a lookup found."""

    tokens: int
    """Leading tokens that are stored on all ranks, in all that a hit needs."""
    lease: StoreLease | None = None
    """The promise that they stay; None where there is none."""
    whole: int = 0
    """Leading tokens that are stored of the layers with full attention, if that is more."""


@dataclass(frozen=True)
class Unanswered:
    """A lookup that said nothing."""

    reason: str
    """Why, as the funnel counts it."""


class EngineRequest(Protocol):
    """The part of vLLM's ``Request`` that is read here."""

    @property
    def request_id(self) -> str:
        """Its name."""

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and answer."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is there, before the step that is being scheduled."""

    @property
    def block_hashes(self) -> Sequence[bytes]:
        """Chained hashes of the full blocks of known tokens."""


@dataclass
class Tracked:
    """What is known of one request."""

    request: EngineRequest
    number: int
    """Names its prompt towards the store."""
    saved: list[int]
    """By group: blocks that need not be saved any more."""
    local_tokens: int = 0
    loading: int | None = None
    """Tokens being loaded, beyond ``local_tokens``."""
    queued_tokens: int = 0
    """Ordered to be loaded, and nothing was heard of them yet."""
    barred: bool = False
    """A load of it failed: compute from now on."""
    stale: bool = False
    """Begun before the cache was reset, or run while a load by layers failed: its pages may not be
    what they should, save none."""
    lookup: tuple[float, int, Found] | None = None
    """When it was looked up, how many tokens were asked about, what was there."""
    chosen: tuple[int, Chosen] | None = None
    """Of so many stored tokens to load so many: decided once for each lookup."""
    lease: StoreLease | None = None
    leased_since: float = 0.0
    renewed: float = 0.0


@dataclass(frozen=True)
class HeldPages:
    """Pages of one group that are being saved."""

    group: Group
    pages: list[int]
    event: object


class Planner:
    """The scheduler-side state of a connector.

    ``lookup`` answers how many leading tokens of a chain of engine hashes are stored, of so many,
    or why the store cannot say right now; it is given the prompt's number, and for how many seconds
    what it finds is to stay (0: not at all). ``hold`` and ``release`` keep pages from being reused.
    ``loads`` and ``saves`` are what this engine may do at all, ``mode`` what it is to do now.
    ``begin_lookup`` begins that without waiting, ``forget_lookup`` says that nobody will ask.
    ``announce`` makes of blocks of a request what others are told once they are stored.
    """

    def __init__(
        self,
        *,
        groups: Groups,
        pool_blocks: int,
        ranks: int,
        slices: int = 0,
        loads: bool,
        saves: bool,
        lookup: Callable[[Sequence[bytes], int, int, float], Found | Unanswered],
        hold: Callable[[Sequence[int]], None],
        release: Callable[[Sequence[int]], None],
        choice: Choice,
        lease_s: float = 2.0,
        by_layers: bool = False,
        announce: Callable[[EngineRequest, Group, int, int], object] | None = None,
        mode: Callable[[], Mode] = lambda: Mode.LOAD,
        begin_lookup: Callable[[Sequence[bytes], int, int, float], object] | None = None,
        forget_lookup: Callable[[int], object] | None = None,
        now: Callable[[], float] = time.monotonic,
        numbers: Callable[[], int] = time.time_ns,
    ) -> None:
        self._groups = groups
        self._block_tokens = groups.hit_tokens
        # What a window leaves behind is gone in the next step: first those.
        self._save_order = (*groups.windowed, *groups.whole)
        self._held_blocks_max = int(pool_blocks * HELD_SHARE_MAX)
        self._ranks = ranks
        self._slices = slices or ranks
        self._may_load = loads
        self._may_save = saves
        self._mode = mode
        self._lookup = lookup
        self._hold = hold
        self._release = release
        self._choice = choice
        self._lease_s = lease_s
        self._by_layers = by_layers
        self._announce = announce
        self._announced: list[object] = []
        self._begin_lookup = begin_lookup
        self._forget_lookup = forget_lookup
        self._now = now
        self._numbers = numbers
        self._tracked: dict[str, Tracked] = {}
        self._leased: dict[str, Tracked] = {}
        self._orders = StepOrders()
        self._held: dict[int, HeldPages] = {}
        self._held_blocks = 0
        self._reports: dict[int, SaveReport] = {}
        self._next_job = 0
        self._failures_heard = 0
        self._tainted: set[str] = set()
        self.null_block = 0
        """Where the engine keeps no page any more."""
        self.salt = ""
        self.counters = Counters()
        self._funnel = Funnel(self.counters)

    @property
    def _loads(self) -> bool:
        return self._may_load and self._mode().loads

    @property
    def _saves(self) -> bool:
        return self._may_save and self._mode().saves

    def arrived(self, request: EngineRequest) -> None:
        """A request that the engine will ask about: the store is asked meanwhile."""
        usable = self._usable_tokens(request)
        if self._begin_lookup is None or not self._loads or usable <= 0 or not self._lease_s:
            return
        chain = request.block_hashes[: usable // self._groups.hash_tokens]
        self._begin_lookup(chain, usable, self._track(request).number, self._lease_s)

    def matched(self, request: EngineRequest, computed_tokens: int) -> int:
        """Tokens beyond ``computed_tokens`` that can be loaded. Asked once or many times."""
        usable = self._usable_tokens(request)
        self._funnel.begin(request.request_id, request.num_tokens, usable, computed_tokens)
        if not self._mode().looks_up:
            self._funnel.to(request.request_id, "looked_up", 0, "mode_off")
            self._leave(request)
            return 0
        tracked = self._track(request)
        tracked.local_tokens = computed_tokens // self._block_tokens * self._block_tokens
        stored = self._stored(tracked, usable)
        if isinstance(stored, Unanswered):
            self._funnel.to(request.request_id, "looked_up", 0, stored.reason)
            # Not knowing is no reason to send again what was saved when it was computed.
            self._need_not_save(tracked, tracked.local_tokens)
            self._let_go(tracked)
            return 0
        self._need_not_save(tracked, stored.tokens, stored.whole)
        self._funnel.to(request.request_id, "looked_up", usable, "")
        present = max(stored.tokens - tracked.local_tokens, 0)
        self._funnel.to(request.request_id, "present", present, "absent")
        tokens, reason = self._wanted(tracked, present)
        self._funnel.to(request.request_id, "chosen", tokens, reason)
        if not tokens:
            self._let_go(tracked)
        return tokens

    def passed_over(self, request: EngineRequest) -> None:
        """The engine asks about a request that wants nothing from any cache."""
        usable = self._usable_tokens(request)
        self._funnel.begin(request.request_id, request.num_tokens, usable, 0)
        self._funnel.to(request.request_id, "looked_up", 0, "opted_out")

    def _usable_tokens(self, request: EngineRequest) -> int:
        # The last token is always computed: its logits are what the request is after.
        known = min(request.num_tokens - 1, self._groups.known_tokens(request.block_hashes))
        return max(known, 0) // self._block_tokens * self._block_tokens

    def _need_not_save(self, tracked: Tracked, tokens: int, whole: int = 0) -> None:
        """So many leading tokens are stored; of layers with full attention perhaps more."""
        for group in self._groups.all:
            known = max(tokens, whole) if group.window is None else tokens
            tracked.saved[group.number] = known // group.block_tokens

    def _wanted(self, tracked: Tracked, tokens: int) -> tuple[int, str]:
        """How many of these stored tokens to load, and why not the others."""
        if not self._may_load:
            return 0, "role"
        if not self._loads:
            return 0, "mode"
        if tracked.barred:
            return 0, "barred"
        if not tokens:
            return 0, ""
        if tracked.chosen is None or tracked.chosen[0] != tokens:
            tracked.chosen = (tokens, self._choice.choose(tokens, self._block_tokens))
            self.counters.add("explored_requests", tracked.chosen[1].explores)
        chosen = tracked.chosen[1]
        # What a shorter hit needs of windows was not asked about.
        is_cut = bool(self._groups.windowed) and chosen.tokens < tokens
        return 0 if is_cut else chosen.tokens, "recompute" if chosen.computes else "too_late"

    def _leave(self, request: EngineRequest) -> None:
        """Nothing is asked for it; what an earlier lookup found is let go."""
        tracked = self._tracked.get(request.request_id)
        if tracked is not None:
            tracked.lookup = None
            tracked.chosen = None
            self._let_go(tracked)

    def _stored(self, tracked: Tracked, usable: int) -> Found | Unanswered:
        if usable <= 0:
            return Found(0)
        if tracked.lookup is not None:
            when, asked, known = tracked.lookup
            if asked == usable and self._now() - when < LOOKUP_REUSE_S:
                return known
        lease_s = self._lease_s if self._loads and not tracked.barred else 0.0
        chain = tracked.request.block_hashes[: usable // self._groups.hash_tokens]
        found = self._lookup(chain, usable, tracked.number, lease_s)
        if isinstance(found, Unanswered):
            self.counters.add("failed_lookups", 1)
            return found
        self._take(tracked, found.lease)
        tracked.lookup = (self._now(), usable, found)
        tracked.chosen = None
        self.counters.add("looked_up_tokens", usable)
        self.counters.add("stored_tokens", found.tokens)
        if not self._loads:
            self.counters.add("observed_lookups", 1)
            more = max(found.tokens - tracked.local_tokens, 0)
            self.counters.add("observed_tokens", more)
        return found

    def _take(self, tracked: Tracked, lease: StoreLease | None) -> None:
        """The request holds this promise from now on, and no other."""
        before, tracked.lease = tracked.lease, lease
        if lease is None:
            self._leased.pop(tracked.request.request_id, None)
        else:
            tracked.leased_since = tracked.renewed = self._now()
            self._leased[tracked.request.request_id] = tracked
        # After the new one is taken: nothing is without a promise in between.
        if before is not None:
            before.release()

    def _let_go(self, tracked: Tracked) -> None:
        self._take(tracked, None)

    def _renew(self) -> None:
        """Keeps promises to requests that load, or wait for their turn."""
        now = self._now()
        for tracked in list(self._leased.values()):
            if tracked.loading is None and now - tracked.leased_since > WAIT_S_MAX:
                tracked.lookup = None
                self._let_go(tracked)
            elif tracked.lease is not None and now - tracked.renewed >= (
                RENEW_SHARE * self._lease_s
            ):
                tracked.renewed = now
                tracked.lease.renew(self._lease_s)

    def allocated(
        self, request: EngineRequest, block_ids: Sequence[Sequence[int]], tokens: int
    ) -> None:
        """The request has its pages, by group; ``tokens`` are to be loaded (0: none)."""
        if tokens <= 0:
            self._funnel.book(request.request_id)
        else:
            self._funnel.ordered(request.request_id, tokens)
        is_known = request.request_id in self._tracked
        if tokens <= 0 and not is_known and not self._mode().looks_up:
            return
        tracked = self._track(request)
        tracked.lookup = None
        if tracked.chosen is not None:
            self.counters.add("recompute_tokens", tracked.chosen[0] - tracked.chosen[1].tokens)
            tracked.chosen = None
        if tokens <= 0:
            if tracked.loading is None:
                self._let_go(tracked)
            return
        tracked.loading = tokens
        tracked.queued_tokens = tokens
        self._choice.queued_tokens += tokens
        self.counters.add("hit_tokens", tokens)
        self._orders.loads += self._load_orders(tracked, block_ids, tokens)

    def _load_orders(
        self, tracked: Tracked, block_ids: Sequence[Sequence[int]], tokens: int
    ) -> list[LoadOrder]:
        orders = []
        total = tracked.local_tokens + tokens
        for group in self._groups.all:
            pages = block_ids[group.number]
            last = total // group.block_tokens
            # The engine has no pages for what a window has left behind.
            first = max(tracked.local_tokens // group.block_tokens, group.needed_from(total))
            while first < last and pages[first] == self.null_block:
                first += 1
            if first < last:
                orders.append(
                    LoadOrder(
                        tracked.request.request_id,
                        self._groups.hashes(group, tracked.request.block_hashes, first, last),
                        list(pages[first:last]),
                        first,
                        tracked.number,
                        group.number,
                    )
                )
        if not orders:
            # The engine waits for an answer all the same.
            orders.append(LoadOrder(tracked.request.request_id, [], [], 0, tracked.number))
        for order in orders:
            order.orders = len(orders)
            order.tokens = tokens / len(orders)
        return orders

    def step(
        self,
        scheduled_tokens: Mapping[str, int],
        block_ids_of: Callable[[str], Sequence[Sequence[int]] | None],
    ) -> StepOrders:
        """The orders of this step; called once a step, after everything was scheduled."""
        if self._leased:
            self._renew()
        for request_id, tokens in scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                self._save(
                    tracked,
                    tracked.request.num_computed_tokens + tokens,
                    partial(block_ids_of, request_id),
                )
        orders, self._orders = self._orders, StepOrders()
        orders.salt = self.salt
        orders.failures_heard = self._failures_heard
        # A request that is past its prompt brings one token a step.
        prompt_tokens = sum(tokens for tokens in scheduled_tokens.values() if tokens > 1)
        all_tokens = sum(scheduled_tokens.values())
        orders.tokens = all_tokens
        orders.step = self._choice.step_began(self._now(), prompt_tokens, all_tokens)
        return orders

    def _save(
        self,
        tracked: Tracked,
        computed_tokens: int,
        block_ids: Callable[[], Sequence[Sequence[int]] | None],
    ) -> None:
        if not self._saves or tracked.stale:
            return
        # Only tokens that are known have a hash; drafts and placeholders are never saved.
        known = min(computed_tokens, self._groups.known_tokens(tracked.request.block_hashes))
        tables: Sequence[Sequence[int]] | None = None
        for group in self._save_order:
            full = known // group.block_tokens
            room = self._held_blocks_max - self._held_blocks
            if full > tracked.saved[group.number] and room > 0:
                if tables is None:
                    tables = block_ids() or ()
                if len(tables) > group.number and len(tables[group.number]) >= full:
                    self._save_group(tracked, group, tables[group.number], full, room)

    def _save_group(
        self, tracked: Tracked, group: Group, table: Sequence[int], full: int, room: int
    ) -> None:
        first = tracked.saved[group.number]
        while first < full and table[first] == self.null_block:
            first += 1
        last = min(full, first + room)
        pages = list(table[first:last])
        tracked.saved[group.number] = last
        if not pages:
            return
        self._hold(pages)
        job, self._next_job = self._next_job, self._next_job + 1
        event = None
        if self._announce is not None:
            event = self._announce(tracked.request, group, first, last)
        self._held[job] = HeldPages(group, pages, event)
        self._held_blocks += len(pages)
        self._orders.saves.append(
            SaveOrder(
                job,
                self._groups.hashes(group, tracked.request.block_hashes, first, last),
                pages,
                first,
                tracked.number,
                group.number,
            )
        )

    def worker_said(
        self,
        *,
        reports: Mapping[int, SaveReport],
        loaded: Iterable[str],
        failed: Mapping[str, FailedLoad],
        loads: LoadReport | None = None,
        step: int = 0,
        failures: int = 0,
    ) -> None:
        """Takes in what the workers reported after a step."""
        if failures > self._failures_heard:
            self._failures_heard = failures
            self._tainted.update(self._tracked)
            for tracked in self._tracked.values():
                tracked.stale = True
        tokens, seconds = self._choice.step_ended(self._now(), step)
        self.counters.add("computed_tokens", tokens)
        self.counters.add("computed_seconds", seconds)
        if loads is not None:
            self._choice.loaded(loads.tokens / self._ranks, loads.seconds)
        for job, report in reports.items():
            self._note_save(job, report)
        for request_id, failure in failed.items():
            tracked_or_none = self._tracked.get(request_id)
            if tracked_or_none is not None:
                self._note_failed_load(tracked_or_none, failure)
        for request_id in loaded:
            done = self._tracked.get(request_id)
            if done is not None and done.loading is not None:
                self.counters.add("loaded_tokens", done.loading)
                self._funnel.to(request_id, "loaded", done.loading, "")
                done.loading = None
                self._unqueue(done)
                if self._by_layers:
                    self._funnel.book(request_id)
            if done is not None:
                self._let_go(done)

    def _note_save(self, job: int, report: SaveReport) -> None:
        known = self._reports.get(job)
        total = report if known is None else known + report
        if total.ranks < self._ranks:
            self._reports[job] = total
            return
        self._reports.pop(job, None)
        held = self._held.pop(job, None)
        if held is None:
            return
        self._held_blocks -= len(held.pages)
        self._release(held.pages)
        if held.event is not None and total.stored_blocks == len(held.pages) * self._slices:
            self._announced.append(held.event)
        # A token is saved by the share of the groups and slices that are.
        share = held.group.block_tokens / len(self._groups.all) / self._slices
        self.counters.add("saved_tokens", total.stored_blocks * share)
        self.counters.add("unsaved_tokens", total.failed_blocks * share)

    def _note_failed_load(self, tracked: Tracked, failure: FailedLoad) -> None:
        # Another rank may have lost more of it, or told of it before.
        kept = failure.position * self._block_tokens
        if tracked.loading is None or kept >= tracked.loading:
            return
        self.counters.add("failed_load_tokens", tracked.loading - kept)
        tracked.loading = kept
        self._funnel.to(tracked.request.request_id, "loaded", kept, failure.reason)
        tracked.barred = True
        # The bad copy is gone from the store; what is computed instead takes its place.
        self._need_not_save(tracked, tracked.local_tokens + kept)

    def _unqueue(self, tracked: Tracked) -> None:
        self._choice.queued_tokens -= tracked.queued_tokens
        tracked.queued_tokens = 0

    def finished(self, request: EngineRequest, block_ids: Sequence[Sequence[int]]) -> None:
        """The request ended: orders what was not saved yet and forgets it."""
        self._funnel.finished(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        self._tainted.discard(request.request_id)
        if tracked is not None:
            self._let_go(tracked)
            self._unqueue(tracked)
            if self._forget_lookup is not None:
                self._forget_lookup(tracked.number)
        # Pages of a load that is still under way hold nothing worth keeping.
        if tracked is not None and tracked.loading is None:
            self._save(tracked, request.num_computed_tokens, lambda: block_ids)

    def reset(self, salt: str) -> None:
        """Forgets all that was stored so far: from now on every block has another name.

        Pages under way keep their old names and are out of reach with them.
        """
        self.salt = salt
        for tracked in self._tracked.values():
            tracked.lookup = None
            tracked.stale = True
            if tracked.loading is None:
                self._let_go(tracked)

    def take_announced(self) -> list[object]:
        """What ``announce`` made of saves that were stored whole since the last call."""
        taken, self._announced = self._announced, []
        return taken

    @property
    def has_work(self) -> bool:
        """Whether holds are open or orders wait; the engine must keep stepping until not."""
        return bool(self._held or self._orders.saves or self._orders.loads)

    def _track(self, request: EngineRequest) -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            saved = [0] * len(self._groups.all)
            tracked = Tracked(request, self._numbers(), saved)
            self._tracked[request.request_id] = tracked
            tracked.stale = bool(self._tainted)
        return tracked
