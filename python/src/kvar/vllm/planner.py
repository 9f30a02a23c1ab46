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

``saved_blocks`` of a request counts its leading blocks that are in the store or on their way.
Every step orders the full blocks beyond it, prompt and generated tokens alike. A local hit that
the store has lost is thereby stored again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from kvar.vllm.choice import Choice, Chosen
from kvar.vllm.funnel import Funnel
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

    positions: int
    """Leading positions that are stored on all ranks."""
    lease: StoreLease | None = None
    """The promise that they stay; None where there is none."""


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
    saved_blocks: int = 0
    local_blocks: int = 0
    loading: list[int] | None = None
    """Pages being filled, in order; they begin at ``local_blocks``."""
    queued_tokens: int = 0
    """Ordered to be loaded, and nothing was heard of them yet."""
    barred: bool = False
    """A load of it failed: compute from now on."""
    stale: bool = False
    """Begun before the cache was reset, or run while a load by layers failed: its pages may not be
    what they should, save none."""
    lookup: tuple[float, int, int] | None = None
    """When it was looked up, how many blocks were asked about, how many were there."""
    chosen: tuple[int, Chosen] | None = None
    """Of so many stored tokens to load so many: decided once for each lookup."""
    lease: StoreLease | None = None
    leased_since: float = 0.0
    renewed: float = 0.0


class Planner:
    """The scheduler-side state of a connector.

    ``lookup`` answers how many leading positions of a chain of engine hashes are stored, or why the
    store cannot say right now; it is given the prompt's number, and for how many seconds
    what it finds is to stay (0: not at all). ``hold`` and ``release`` keep pages from being reused.
    ``loads`` and ``saves`` are what this engine may do at all, ``mode`` what it is to do now.
    """

    def __init__(
        self,
        *,
        block_tokens: int,
        pool_blocks: int,
        ranks: int,
        loads: bool,
        saves: bool,
        lookup: Callable[[Sequence[bytes], int, float], Found | Unanswered],
        hold: Callable[[Sequence[int]], None],
        release: Callable[[Sequence[int]], None],
        choice: Choice,
        lease_s: float = 2.0,
        by_layers: bool = False,
        mode: Callable[[], Mode] = lambda: Mode.LOAD,
        now: Callable[[], float] = time.monotonic,
        numbers: Callable[[], int] = time.time_ns,
    ) -> None:
        self._block_tokens = block_tokens
        self._held_blocks_max = int(pool_blocks * HELD_SHARE_MAX)
        self._ranks = ranks
        self._may_load = loads
        self._may_save = saves
        self._mode = mode
        self._lookup = lookup
        self._hold = hold
        self._release = release
        self._choice = choice
        self._lease_s = lease_s
        self._by_layers = by_layers
        self._now = now
        self._numbers = numbers
        self._tracked: dict[str, Tracked] = {}
        self._leased: dict[str, Tracked] = {}
        self._orders = StepOrders()
        self._held: dict[int, list[int]] = {}
        self._held_blocks = 0
        self._reports: dict[int, SaveReport] = {}
        self._next_job = 0
        self._failures_heard = 0
        self._tainted: set[str] = set()
        self.salt = ""
        self.counters = Counters()
        self._funnel = Funnel(self.counters)

    @property
    def _loads(self) -> bool:
        return self._may_load and self._mode().loads

    @property
    def _saves(self) -> bool:
        return self._may_save and self._mode().saves

    def matched(self, request: EngineRequest, computed_tokens: int) -> int:
        """Tokens beyond ``computed_tokens`` that can be loaded. Asked once or many times."""
        usable = self._usable_blocks(request)
        self._enter(request, usable, computed_tokens)
        if not self._mode().looks_up:
            self._funnel.to(request.request_id, "looked_up", 0, "mode_off")
            self._leave(request)
            return 0
        tracked = self._track(request)
        tracked.local_blocks = computed_tokens // self._block_tokens
        stored = self._stored_blocks(tracked, usable)
        if isinstance(stored, Unanswered):
            self._funnel.to(request.request_id, "looked_up", 0, stored.reason)
            # Not knowing is no reason to send again what was saved when it was computed.
            tracked.saved_blocks = tracked.local_blocks
            self._let_go(tracked)
            return 0
        tracked.saved_blocks = stored
        self._funnel.to(request.request_id, "looked_up", usable * self._block_tokens, "")
        present = max(stored - tracked.local_blocks, 0) * self._block_tokens
        self._funnel.to(request.request_id, "present", present, "absent")
        tokens, reason = self._wanted(tracked, present)
        self._funnel.to(request.request_id, "chosen", tokens, reason)
        if not tokens:
            self._let_go(tracked)
        return tokens

    def passed_over(self, request: EngineRequest) -> None:
        """The engine asks about a request that wants nothing from any cache."""
        self._enter(request, self._usable_blocks(request), 0)
        self._funnel.to(request.request_id, "looked_up", 0, "opted_out")

    def _usable_blocks(self, request: EngineRequest) -> int:
        # The last token is always computed: its logits are what the request is after.
        return min((request.num_tokens - 1) // self._block_tokens, len(request.block_hashes))

    def _enter(self, request: EngineRequest, usable: int, computed_tokens: int) -> None:
        full_blocks = max(usable, 0) * self._block_tokens
        self._funnel.begin(request.request_id, request.num_tokens, full_blocks, computed_tokens)

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
        return chosen.tokens, "recompute" if chosen.computes else "too_late"

    def _leave(self, request: EngineRequest) -> None:
        """Nothing is asked for it; what an earlier lookup found is let go."""
        tracked = self._tracked.get(request.request_id)
        if tracked is not None:
            tracked.lookup = None
            tracked.chosen = None
            self._let_go(tracked)

    def _stored_blocks(self, tracked: Tracked, usable: int) -> int | Unanswered:
        if usable <= 0:
            return 0
        if tracked.lookup is not None:
            when, asked, known = tracked.lookup
            if asked == usable and self._now() - when < LOOKUP_REUSE_S:
                return known
        lease_s = self._lease_s if self._loads and not tracked.barred else 0.0
        found = self._lookup(tracked.request.block_hashes[:usable], tracked.number, lease_s)
        if isinstance(found, Unanswered):
            self.counters.add("failed_lookups", 1)
            return found
        found_now = found.positions
        self._take(tracked, found.lease)
        tracked.lookup = (self._now(), usable, found_now)
        tracked.chosen = None
        self.counters.add("looked_up_tokens", usable * self._block_tokens)
        self.counters.add("stored_tokens", found_now * self._block_tokens)
        if not self._loads:
            more = max(found_now - tracked.local_blocks, 0)
            self.counters.add("observed_lookups", 1)
            self.counters.add("observed_tokens", more * self._block_tokens)
        return found_now

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

    def allocated(self, request: EngineRequest, block_ids: Sequence[int], tokens: int) -> None:
        """The request has its pages; ``tokens`` of them are to be loaded (0: none)."""
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
        first = tracked.local_blocks
        last = first + tokens // self._block_tokens
        tracked.loading = list(block_ids[first:last])
        tracked.queued_tokens = tokens
        self._choice.queued_tokens += tokens
        self.counters.add("hit_tokens", tokens)
        self._orders.loads.append(
            LoadOrder(
                request.request_id,
                list(request.block_hashes[first:last]),
                tracked.loading,
                first,
                tracked.number,
            )
        )

    def step(
        self,
        scheduled_tokens: Mapping[str, int],
        block_ids_of: Callable[[str], Sequence[int] | None],
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
        block_ids: Callable[[], Sequence[int] | None],
    ) -> None:
        if not self._saves or tracked.stale:
            return
        # Only tokens that are known have a hash; drafts and placeholders are never saved.
        full = min(computed_tokens // self._block_tokens, len(tracked.request.block_hashes))
        first = tracked.saved_blocks
        last = min(full, first + self._held_blocks_max - self._held_blocks)
        if last <= first:
            return
        pages = list((block_ids() or ())[first:last])
        if len(pages) != last - first:
            return
        self._hold(pages)
        job, self._next_job = self._next_job, self._next_job + 1
        self._held[job] = pages
        self._held_blocks += len(pages)
        tracked.saved_blocks = last
        self._orders.saves.append(
            SaveOrder(
                job,
                list(tracked.request.block_hashes[first:last]),
                pages,
                first,
                tracked.number,
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
            a_rank = loads.blocks / self._ranks * self._block_tokens
            self._choice.loaded(a_rank, loads.seconds)
        for job, report in reports.items():
            known = self._reports.get(job)
            total = report if known is None else known + report
            if total.ranks < self._ranks:
                self._reports[job] = total
                continue
            self._reports.pop(job, None)
            pages = self._held.pop(job, None)
            if pages is not None:
                self._held_blocks -= len(pages)
                self._release(pages)
            tokens_a_rank = self._block_tokens / self._ranks
            self.counters.add("saved_tokens", total.stored_blocks * tokens_a_rank)
            self.counters.add("unsaved_tokens", total.failed_blocks * tokens_a_rank)
        for request_id, failure in failed.items():
            tracked_or_none = self._tracked.get(request_id)
            if tracked_or_none is not None:
                self._note_failed_load(tracked_or_none, failure)
        for request_id in loaded:
            done = self._tracked.get(request_id)
            if done is not None and done.loading is not None:
                kept = len(done.loading) * self._block_tokens
                self.counters.add("loaded_tokens", kept)
                self._funnel.to(request_id, "loaded", kept, "")
                done.loading = None
                self._unqueue(done)
                if self._by_layers:
                    self._funnel.book(request_id)
            if done is not None:
                self._let_go(done)

    def _note_failed_load(self, tracked: Tracked, failure: FailedLoad) -> None:
        # Another rank may have lost more of it, or told of it before.
        if tracked.loading is None or failure.position >= len(tracked.loading):
            return
        lost = len(tracked.loading) - failure.position
        self.counters.add("failed_load_tokens", lost * self._block_tokens)
        del tracked.loading[failure.position :]
        kept = len(tracked.loading)
        request_id = tracked.request.request_id
        self._funnel.to(request_id, "loaded", kept * self._block_tokens, failure.reason)
        tracked.barred = True
        # The bad copy is gone from the store; what is computed instead takes its place.
        tracked.saved_blocks = tracked.local_blocks + kept

    def _unqueue(self, tracked: Tracked) -> None:
        self._choice.queued_tokens -= tracked.queued_tokens
        tracked.queued_tokens = 0

    def finished(self, request: EngineRequest, block_ids: Sequence[int]) -> None:
        """The request ended: orders what was not saved yet and forgets it."""
        self._funnel.finished(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        self._tainted.discard(request.request_id)
        if tracked is not None:
            self._let_go(tracked)
            self._unqueue(tracked)
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

    @property
    def has_work(self) -> bool:
        """Whether holds are open or orders wait; the engine must keep stepping until not."""
        return bool(self._held or self._orders.saves or self._orders.loads)

    def _track(self, request: EngineRequest) -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._tracked[request.request_id] = Tracked(request, self._numbers())
            tracked.stale = bool(self._tainted)
        return tracked
