"""The worker's half: moves pages as ordered, in the background, and says how it ended.

What must always be true:
* nothing here waits while the engine has something to compute (where it has not, :meth:`Mover.wait`
  does, for a moment); every call is a look at what the client's threads have done meanwhile;
* every order gets its answer, also when the store is away or a call raises: a load's request is
  reported as received (with its bad pages), a save's job is reported, or the engine would wait
  for ever;
* a page is reported as loaded only if the client verified its bytes;
* what was computed on pages that a load by layers failed to fill is never saved;
* of a save by layers nothing is visible before its step is over, and then all of a block or none.

A load by layers is part of its step: it starts before the forward pass, each layer is waited for
when it is computed (the only place where something waits for the store in the middle of a step, up
to the load's deadline), and the step knows at its end what did not come. Whatever was computed
meanwhile may be wrong. So the saves of that step, and those that the scheduler ordered before it
heard of the failure, are turned down.

A save by layers begins with its step's first layer and is committed, or given up, at its end:

```text
   layer 0 computed ─> announced, layer 0 sent ─ layer 1 sent ─ ... ─ step over ─> commit
                       └ as many blocks as may be announced at a time; the others: ─> saved whole
```
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import kvar
from kvar.vllm.link import Link
from kvar.vllm.metrics import Counters
from kvar.vllm.orders import (
    FailedLoad,
    LayersReport,
    LoadOrder,
    LoadReport,
    SaveOrder,
    SaveReport,
)
from kvar.vllm.pages import (
    Batch,
    DirectPages,
    LayeredSave,
    LayeredTransfer,
    Pages,
    Together,
    Transfer,
)

logger = logging.getLogger("vllm.kvar")

# The store has the block now, by us or by another writer.
STORED = ("stored", "exists", "in_progress")

# Said by the client when the node is: gone, or mute.
AWAY = ("unreachable", "deadline")

# What a step may take while blocks of it are announced. An engine that hangs is no reason to hold a
# store's memory for longer.
STEP_MS_MAX = 60_000

# In a step that computes nothing the engine only asks what has ended, hundreds of times a second in
# several processes, which takes cores from those who move the bytes. So such a step waits here
# instead; a request that comes meanwhile waits at most so long for its turn.
IDLE_WAIT_S = 0.002

# What becomes of a load that was not even begun.
STORE_AWAY = "store_away"


@dataclass
class _Load:
    order: LoadOrder
    transfer: Transfer
    started: float


@dataclass
class _LayeredLoad:
    order: LoadOrder
    transfer: LayeredTransfer
    waited: float = 0.0
    complete: bool = True


@dataclass
class _Save:
    order: SaveOrder
    transfer: Transfer
    step_ended: float


@dataclass
class _Begun:
    """A save by layers whose step is not over: of its order's blocks the first ``blocks``."""

    group: int
    blocks: int
    save: LayeredSave


@dataclass
class Ended:
    """What has ended since it was last asked."""

    loaded: set[str] = field(default_factory=set)
    useless: set[str] = field(default_factory=set)
    """Of the loaded ones, those that got nothing of use."""
    bad_block_ids: set[int] = field(default_factory=set)
    failed: dict[str, FailedLoad] = field(default_factory=dict)
    reports: dict[int, SaveReport] = field(default_factory=dict)
    loads: LoadReport = field(default_factory=LoadReport)
    layers: LayersReport = field(default_factory=LayersReport)


@dataclass(frozen=True)
class GroupPages:
    """One group of layers on this rank."""

    pages: Pages
    text: str
    """What its blocks' names are made of, beside the prefix."""
    bytes_a_block: int


class Mover:
    """The loads and saves of one rank.

    ``fail_whole``: a load that lost a block is of no use, and is told by request, not by page.
    ``saves``: whether this rank saves; another one has the same bytes if not.
    """

    def __init__(
        self,
        *,
        link: Link,
        groups: Sequence[GroupPages],
        key: kvar.NamespaceKey,
        head_slice: tuple[int, int],
        deadline_ms: int,
        traffic_class: int = 0,
        handover: bool = False,
        fail_whole: bool = False,
        saves: bool = True,
    ) -> None:
        self._link = link
        self._groups = groups
        self._key = key
        self._head_slice = head_slice
        self._deadline_ms = deadline_ms
        self._fail_whole = fail_whole
        self._saves_here = saves
        self._traffic_class = traffic_class
        self._handover = handover
        self._loads: list[_Load] = []
        self._saves: list[_Save] = []
        self._begun: dict[int, _Begun] = {}
        self._layered: list[_LayeredLoad] = []
        self._failed_at_start: list[LoadOrder] = []
        self._orders_left: dict[str, int] = {}
        self._orders_lost: set[str] = set()
        self.failures = 0
        self._ended = Ended()
        self._load_ended = float("-inf")
        self.counters = Counters()

    def start_load(self, order: LoadOrder, salt: str) -> None:
        """Starts one load; its end is in a later :meth:`ended`."""
        client = self._link.client()
        if client is not None and order.block_ids:
            try:
                pages = self._groups[order.group].pages
                transfer = pages.load(self._batch(client, order, salt), order.request)
                self._loads.append(_Load(order, transfer, time.monotonic()))
                return
            except kvar.KvarError as error:
                self._link.failed(error)
        self._note_misses(order, [STORE_AWAY] * len(order.block_ids))
        self._end_order(order)

    def _end_order(self, order: LoadOrder) -> None:
        """One order of a request has ended; the request's load with the last of them."""
        left = self._orders_left.pop(order.request_id, order.orders) - 1
        if left:
            self._orders_left[order.request_id] = left
            return
        self._ended.loaded.add(order.request_id)
        if order.request_id in self._orders_lost:
            self._orders_lost.discard(order.request_id)
            self._ended.useless.add(order.request_id)

    def start_layers(self, order: LoadOrder, salt: str) -> None:
        """Starts a load by layers; it is over by :meth:`finish_layers`."""
        client = self._link.client()
        pages = self._groups[order.group].pages
        if client is not None and isinstance(pages, DirectPages):
            try:
                transfer = pages.load_layers(self._batch(client, order, salt), order.request)
                self._layered.append(_LayeredLoad(order, transfer))
                return
            except kvar.KvarError as error:
                self._link.failed(error)
        self._failed_at_start.append(order)

    def wait_layer(self, layer: int) -> None:
        """Waits for this layer of the loads of this step, up to their deadline."""
        for load in self._layered:
            # What is lost stays lost: nothing is gained by waiting for the rest of it here.
            if load.complete:
                began = time.monotonic()
                load.complete = load.transfer.wait_layer(layer)
                load.waited += time.monotonic() - began

    def finish_layers(self) -> None:
        """Ends the loads by layers of this step."""
        if not self._layered and not self._failed_at_start:
            return
        failed = bool(self._failed_at_start)
        ended = self._ended
        loaded = set(ended.layers.loaded)
        for order in self._failed_at_start:
            loaded.add(order.request_id)
            self._note_misses(order, [STORE_AWAY] * len(order.block_ids))
        for load in self._layered:
            began = time.monotonic()
            words = load.transfer.finish()
            load.waited += time.monotonic() - began
            loaded.add(load.order.request_id)
            failed = self._note_misses(load.order, words) or failed
            away = [word for word in words if word in AWAY]
            if away:
                self._link.failed(away[0])
            seconds = load.transfer.seconds()
            self.counters.add("load_seconds", seconds)
            self.counters.add("layered_load_seconds", seconds)
            self.counters.add("layered_wait_seconds", load.waited)
            ended.loads.seconds += seconds
            self._note_hits(load.order, words)
        self._layered.clear()
        self._failed_at_start.clear()
        self.failures += failed
        ended.layers = LayersReport(frozenset(loaded), self.failures)

    def begin_saves(self, orders: Sequence[SaveOrder], salt: str) -> None:
        """The step computes these: as many as there is room for go layer by layer.

        Each of them is ended by :meth:`start_save` or :meth:`refuse_save`, as all orders are.
        """
        client = self._link.client()
        if client is None or not self._saves_here:
            return
        try:
            room = client.announced_bytes_max or 0
            places = client.announced_blocks_max or 0
            for order in orders:
                group = self._groups[order.group]
                blocks = min(len(order.block_ids), room // group.bytes_a_block, places)
                if blocks and isinstance(group.pages, DirectPages):
                    batch = self._batch(client, _first(order, blocks), salt, STEP_MS_MAX)
                    save = group.pages.save_layers(batch, self._hints(order))
                    self._begun[order.job] = _Begun(order.group, blocks, save)
                    room -= blocks * group.bytes_a_block
                    places -= blocks
        except kvar.KvarError as error:
            self._link.failed(error)

    def give_up(self) -> None:
        """Ends saves by layers whose step was not ended; nothing of them becomes visible."""
        for begun in self._begun.values():
            begun.save.abort()
        self._begun.clear()

    def computed(self, group: int, layer: int) -> None:
        """A layer of a group is computed: saves by layers send it."""
        for begun in self._begun.values():
            if begun.group == group:
                begun.save.computed(layer)

    def refuse_save(self, order: SaveOrder) -> None:
        """Turns a save down: its pages may not be what they should."""
        begun = self._begun.pop(order.job, None)
        if begun is not None:
            begun.save.abort()
        self.counters.add("save_tainted_blocks", len(order.block_ids))
        self._ended.reports[order.job] = SaveReport(1, 0, len(order.block_ids))

    def start_save(self, order: SaveOrder, salt: str, step_ended: float | None = None) -> None:
        """Starts one save, or what is left of one by layers; its end is in a later :meth:`ended`.

        Called when the step is over that computed it; ``step_ended``: since when, if not now.
        """
        if step_ended is None:
            step_ended = time.monotonic()
        if not self._saves_here:
            self._ended.reports[order.job] = SaveReport(1, 0, 0)
            return
        transfers: list[Transfer] = []
        begun = self._begun.pop(order.job, None)
        done = 0
        if begun is not None:
            done = begun.blocks
            self.counters.add("layered_save_blocks", done)
            transfers.append(begun.save.commit(self._deadline_ms))
        if done < len(order.block_ids) or not transfers:
            transfers.append(self._save_whole(_rest(order, done), salt))
        transfer = transfers[0] if len(transfers) == 1 else Together(transfers)
        self._saves.append(_Save(order, transfer, step_ended))

    def _save_whole(self, order: SaveOrder, salt: str) -> Transfer:
        client = self._link.client()
        if client is not None:
            try:
                pages = self._groups[order.group].pages
                return pages.save(self._batch(client, order, salt), self._hints(order))
            except kvar.KvarError as error:
                self._link.failed(error)
        return _Over([STORE_AWAY] * len(order.block_ids))

    def _hints(self, order: SaveOrder) -> kvar.PutHints:
        return kvar.PutHints(
            request=order.request, traffic_class=self._traffic_class, handover=self._handover
        )

    def _batch(
        self, client: kvar.Client, order: LoadOrder | SaveOrder, salt: str, more_ms: int = 0
    ) -> Batch:
        text = self._groups[order.group].text
        ids = names(self._key, order.hashes, text, salt, self._head_slice, order.group)
        within_ms = self._deadline_ms + more_ms
        return Batch(client, ids, order.block_ids, within_ms, order.depth)

    def wait(self) -> None:
        """The step computes nothing: waits a little for what it is there to look after."""
        for under_way in (self._loads, self._saves):
            if under_way:
                under_way[0].transfer.wait(IDLE_WAIT_S)
                return

    def ended(self) -> Ended:
        """Pushes everything along and hands over what has ended since the last call."""
        for load in list(self._loads):
            words = self._advance(load.transfer, len(load.order.block_ids))
            if words is None:
                continue
            self._loads.remove(load)
            self._note_misses(load.order, words)
            self._note_hits(load.order, words)
            self._end_order(load.order)
            ended_at = load.transfer.ended_at()
            self.counters.add("load_seconds", ended_at - load.started)
            # Loads under way together share the link: time counts once for all of them.
            self._ended.loads.seconds += max(ended_at - max(load.started, self._load_ended), 0.0)
            self._load_ended = max(ended_at, self._load_ended)
        for save in list(self._saves):
            words = self._advance(save.transfer, len(save.order.block_ids))
            if words is None:
                continue
            self._saves.remove(save)
            for word in words:
                if word not in STORED:
                    self.counters.add("save_refused_blocks", 1, word)
            stored = sum(word in STORED for word in words)
            self._ended.reports[save.order.job] = SaveReport(1, stored, len(words) - stored)
            bytes_a_block = self._groups[save.order.group].bytes_a_block
            self.counters.add("saved_bytes", stored * bytes_a_block)
            seconds = save.transfer.ended_at() - save.step_ended
            self.counters.add("save_seconds", max(seconds, 0.0))
        ended, self._ended = self._ended, Ended()
        ended.layers.failures = self.failures
        return ended

    def _advance(self, transfer: Transfer, count: int) -> list[str] | None:
        try:
            words = transfer.advance()
        except kvar.KvarError as error:
            self._link.failed(error)
            return ["unreachable"] * count
        away = [word for word in words or () if word in AWAY]
        if away:
            self._link.failed(away[0])
        return words

    def _note_misses(self, order: LoadOrder, words: Sequence[str]) -> bool:
        """Whether some blocks of a load did not come; which, and why, is kept to be told."""
        failed = None
        for position, (block, word) in enumerate(zip(order.block_ids, words, strict=True)):
            if word != "hit":
                failed = failed or FailedLoad(0 if self._fail_whole else position, word)
                if self._fail_whole:
                    self._orders_lost.add(order.request_id)
                else:
                    self._ended.bad_block_ids.add(block)
                self.counters.add("load_missed_blocks", 1, word)
        if failed is not None:
            self._ended.failed.setdefault(order.request_id, failed)
        return failed is not None

    def _note_hits(self, order: LoadOrder, words: Sequence[str]) -> None:
        hits = words.count("hit")
        self._ended.loads.tokens += order.tokens * hits / max(len(words), 1)
        self.counters.add("loaded_bytes", hits * self._groups[order.group].bytes_a_block)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not (self._loads or self._saves or self._layered or self._begun)


class _Over:
    """A transfer that could not begin."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._at = time.monotonic()

    def advance(self) -> list[str] | None:
        return self._words

    def ended_at(self) -> float:
        return self._at

    def wait(self, at_most_s: float) -> None:
        pass


def _first(order: SaveOrder, blocks: int) -> SaveOrder:
    """An order's first blocks."""
    return replace(order, hashes=order.hashes[:blocks], block_ids=order.block_ids[:blocks])


def _rest(order: SaveOrder, blocks: int) -> SaveOrder:
    """What is left of an order behind its first blocks."""
    if not blocks:
        return order
    return replace(
        order,
        hashes=order.hashes[blocks:],
        block_ids=order.block_ids[blocks:],
        depth=order.depth + blocks,
    )


def names(
    key: kvar.NamespaceKey,
    hashes: Sequence[bytes],
    fingerprint_text: str,
    salt: str,
    head_slice: tuple[int, int],
    group: int = 0,
) -> list[bytes]:
    """The block ids of one slice of these positions of one group."""
    text = f"{fingerprint_text}reset={salt}\n" if salt else fingerprint_text
    fingerprint = kvar.ContentFingerprint.of_text(text)
    return kvar.derive_ids(key, hashes, fingerprint, head_slice=head_slice, group=group)
