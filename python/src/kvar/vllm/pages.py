"""How the bytes of the engine's pages get to the store and back.

A kvar block is one engine block: one section a layer, in the order of the layers.

```text
layer 0  [page 0][page 1][page 2] ...        block of page 2 = (layer 0's page 2,
layer 1  [page 0][page 1][page 2] ...                           layer 1's page 2,
  ...                                                             ...           )
```

Two ways, chosen by what the engine's memory looks like:

* **direct**: host memory, each layer's pages one behind the other (the CPU backend). The client
  reads and writes the engine's memory itself; nothing is copied on the way.
* **staged**: device memory, or pages that are not contiguous. Bytes go through pinned lanes of
  host memory, copied on a stream of their own. *The device half has not been run on hardware
  yet; the host half (no stream) is tested.*

Transfers are pushed along by :meth:`Transfer.advance`, called once an engine step; it never waits.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import kvar
from kvar.vllm.settings import SettingsError

if TYPE_CHECKING:
    import torch

# One lane of staging: enough blocks that a copy is worth its launch, few enough that a lane of a
# large model (2 MiB a block) stays near 32 MiB.
LANE_BLOCKS = 16

# Lanes in all: while one is copied, another is on the link, for loads and saves at once.
LANES = 4


# Layers are sent when so much of them is computed: waking the thread that sends costs an engine
# some 10 us, and what is left to be sent at a step's end takes a link a millisecond or two.
SENT_BYTES_MIN = 2 << 20


@dataclass(frozen=True)
class Batch:
    """Blocks of one prompt, and the engine's pages that are theirs."""

    client: kvar.Client
    ids: Sequence[bytes]
    blocks: Sequence[int]
    """Numbers of the pages, one a block."""
    deadline_ms: int
    depth: int
    """Place of the first block in its chain."""


class Transfer(Protocol):
    """A load or save under way."""

    def advance(self) -> list[str] | None:
        """Pushes it along; when it has ended, for each block its outcome."""

    def ended_at(self) -> float:
        """When it ended, by the monotonic clock; asked once it has."""

    def wait(self, at_most_s: float) -> None:
        """Returns when it may be pushed along again, or by then: for who has nothing else to do."""


class LayeredTransfer(Protocol):
    """A load by layers under way."""

    def wait_layer(self, layer: int) -> bool:
        """Waits until this layer of all blocks is decided; whether all of it is there."""

    def finish(self) -> list[str]:
        """Waits until everything is decided; for each block its outcome."""

    def seconds(self) -> float:
        """How long it took, once it is finished."""


class LayeredSave(Protocol):
    """A save by layers under way; let go of without a commit, nothing of it becomes visible."""

    def computed(self, layer: int) -> None:
        """One layer of all blocks is filled. In any order, and more than once."""

    def commit(self, deadline_ms: int) -> Transfer:
        """All layers are filled: the blocks become visible."""

    def abort(self) -> None:
        """Gives it up."""


class Pages(Protocol):
    """The engine's pages as the store sees them."""

    page_shape: tuple[int, ...]

    def load(self, batch: Batch, request: int) -> Transfer:
        """Starts filling pages."""

    def save(self, batch: Batch, hints: kvar.PutHints) -> Transfer:
        """Starts storing pages."""


def pages_of(layers: Sequence[torch.Tensor]) -> Pages:
    """The right kind for these tensors, each of shape (pages, ...)."""
    first = layers[0]
    for layer in layers:
        if layer.shape != first.shape or layer.dtype != first.dtype:
            raise SettingsError(
                "kvar: the layers' KV pages differ in shape or type "
                f"({tuple(first.shape)} {first.dtype} and {tuple(layer.shape)} {layer.dtype}); "
                "this connector needs one kind of attention layer"
            )
    if all(layer.device.type == "cpu" and layer.is_contiguous() for layer in layers):
        return DirectPages(layers)
    return StagedPages(layers)


class _Layered:
    """A load by layers that is one call of the client, which ends by its deadline."""

    def __init__(self, get: kvar.LayerGet) -> None:
        self._get = get

    def wait_layer(self, layer: int) -> bool:
        return all(word == "hit" for word in self._get.wait_section(layer))

    def finish(self) -> list[str]:
        return self._get.result()

    def seconds(self) -> float:
        return self._get.seconds or 0.0


class _LayeredSave:
    """A save by layers that is one call of the client, which takes layers in their order."""

    def __init__(self, put: kvar.LayerPut, layer_bytes: int) -> None:
        self._put = put
        self._at_a_time = max(SENT_BYTES_MIN // max(layer_bytes, 1), 1)
        self._filled: set[int] = set()
        self._ready = 0
        self._sent = 0

    def computed(self, layer: int) -> None:
        self._filled.add(layer)
        while self._ready in self._filled:
            self._ready += 1
        if self._ready - self._sent >= self._at_a_time:
            self._sent = self._ready
            self._put.filled(self._sent)

    def commit(self, deadline_ms: int) -> Transfer:
        # A layer that the engine did not speak of was computed all the same.
        self._put.filled(self._put.sections)
        return _Pending(self._put.commit(deadline_ms=deadline_ms))

    def abort(self) -> None:
        self._put.abort()


class Together:
    """Transfers of one order, one behind the other in its blocks."""

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        self._transfers = transfers
        self._words: list[list[str] | None] = [None] * len(transfers)

    def advance(self) -> list[str] | None:
        """Pushes all of them along; when all have ended, for each block its outcome."""
        for number, transfer in enumerate(self._transfers):
            if self._words[number] is None:
                self._words[number] = transfer.advance()
        words = [its for its in self._words if its is not None]
        if len(words) < len(self._words):
            return None
        return [word for its in words for word in its]

    def ended_at(self) -> float:
        """When the last of them ended."""
        return max(transfer.ended_at() for transfer in self._transfers)

    def wait(self, at_most_s: float) -> None:
        """Waits for the first that has not ended."""
        for words, transfer in zip(self._words, self._transfers, strict=True):
            if words is None:
                transfer.wait(at_most_s)
                return


def _as_bytes(layer: torch.Tensor) -> torch.Tensor:
    import torch

    return layer.view(torch.uint8)


def words_of(results: Sequence[kvar.GetResult | str]) -> list[str]:
    """The outcomes of a get or a put as words."""
    return [result if isinstance(result, str) else result.outcome for result in results]


class _Pending:
    """A transfer that is one call of the client."""

    def __init__(self, pending: kvar.Pending[Any]) -> None:
        self._pending = pending
        self._ended_at: float | None = None
        # An engine step is long against a load: when it is looked at says little.
        pending.add_done_callback(self._note_end)

    def _note_end(self) -> None:
        self._ended_at = time.monotonic()

    def advance(self) -> list[str] | None:
        return words_of(self._pending.result()) if self._pending.done() else None

    def ended_at(self) -> float:
        return time.monotonic() if self._ended_at is None else self._ended_at

    def wait(self, at_most_s: float) -> None:
        wait_for(self._pending, at_most_s)


def wait_for(pending: kvar.Pending[Any], at_most_s: float) -> None:
    """Waits for a call to end, at most so long."""
    with contextlib.suppress(TimeoutError):
        pending.result(at_most_s)


class DirectPages:
    """Pages in contiguous host memory; the client works on them in place."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self.page_shape = tuple(layers[0].shape[1:])
        self._layers = [_as_bytes(layer).reshape(-1).numpy() for layer in layers]
        self._page_bytes = self._layers[0].size // layers[0].shape[0]

    def load(self, batch: Batch, request: int) -> Transfer:
        """Starts filling pages."""
        pending = batch.client.submit_get_pages(
            batch.ids,
            self._layers,
            batch.blocks,
            self._page_bytes,
            deadline_ms=batch.deadline_ms,
            depth=batch.depth,
            request=request,
        )
        return _Pending(pending)

    def load_layers(self, batch: Batch, request: int) -> LayeredTransfer:
        """Starts filling pages, the first layer of all of them first."""
        get = batch.client.submit_get_layers(
            batch.ids,
            self._layers,
            batch.blocks,
            self._page_bytes,
            deadline_ms=batch.deadline_ms,
            depth=batch.depth,
            request=request,
        )
        return _Layered(get)

    def save(self, batch: Batch, hints: kvar.PutHints) -> Transfer:
        """Starts storing pages."""
        pending = batch.client.submit_put_pages(
            batch.ids,
            self._layers,
            batch.blocks,
            self._page_bytes,
            deadline_ms=batch.deadline_ms,
            depth=batch.depth,
            hints=hints,
        )
        return _Pending(pending)

    def save_layers(self, batch: Batch, hints: kvar.PutHints) -> LayeredSave:
        """Announces blocks whose layers are being computed; ``deadline_ms`` is for all of it."""
        put = batch.client.submit_put_layers(
            batch.ids,
            self._layers,
            batch.blocks,
            self._page_bytes,
            deadline_ms=batch.deadline_ms,
            depth=batch.depth,
            hints=hints,
        )
        return _LayeredSave(put, self._page_bytes * len(batch.blocks))


class StagedPages:
    """Pages on a device, or strewn in host memory: copied through lanes of host memory."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        import torch

        self.page_shape = tuple(layers[0].shape[1:])
        self.layers = [_as_bytes(layer) for layer in layers]
        first = self.layers[0]
        self.page_bytes = first[0].numel()
        self.device = first.device
        # CUDA and ROCm share torch's interface; host memory needs neither stream nor pinning.
        on_device = self.device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(self.device) if on_device else None
        shape = (LANES, len(layers), LANE_BLOCKS * self.page_bytes)
        memory = torch.empty(shape, dtype=torch.uint8, pin_memory=on_device)
        self.free = [Lane(self, memory[lane]) for lane in range(LANES)]

    def load(self, batch: Batch, request: int) -> Transfer:
        """Starts filling pages."""
        return _StagedLoad(self, batch, request)

    def save(self, batch: Batch, hints: kvar.PutHints) -> Transfer:
        """Starts storing pages, once what the engine has launched so far is done."""
        return _StagedSave(self, batch, hints)


class Lane:
    """Host memory for ``LANE_BLOCKS`` blocks, all layers; used by one piece of work at a time."""

    def __init__(self, pages: StagedPages, memory: torch.Tensor) -> None:
        self._pages = pages
        self._memory = memory
        self.sections = [layer.numpy() for layer in memory]

    def _views(self, count: int) -> list[torch.Tensor]:
        shape = self._pages.layers[0].shape[1:]
        used = count * self._pages.page_bytes
        return [layer[:used].view(count, *shape) for layer in self._memory]

    def copy_in(self, blocks: Sequence[int], after: Any) -> Any:
        """Starts copying pages into the lane; returns what tells when it is done."""
        import torch

        def copy() -> None:
            index = torch.tensor(blocks, device=self._pages.device)
            for layer, view in zip(self._pages.layers, self._views(len(blocks)), strict=True):
                view.copy_(layer.index_select(0, index), non_blocking=True)

        return self._on_stream(copy, after)

    def copy_out(self, places: Sequence[int], blocks: Sequence[int]) -> Any:
        """Starts copying the lane's ``places`` into pages; returns what tells when it is done."""
        import torch

        def copy() -> None:
            index = torch.tensor(blocks, device=self._pages.device)
            for layer, view in zip(self._pages.layers, self._views(LANE_BLOCKS), strict=True):
                # Nearly always all of the first blocks arrived, and no copy is needed to say so.
                whole = list(places) == list(range(len(places)))
                chosen = view[: len(places)] if whole else view[list(places)]
                layer.index_copy_(0, index, chosen.to(self._pages.device, non_blocking=True))

        return self._on_stream(copy, None)

    def _on_stream(self, copy: Any, after: Any) -> Any:
        stream = self._pages.stream
        if stream is None:
            copy()
            return None
        import torch

        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            copy()
            done = torch.cuda.Event()
            done.record(stream)
        return done


def _is_done(event: Any) -> bool:
    return event is None or bool(event.query())


class _Piece:
    """Up to ``LANE_BLOCKS`` blocks of a staged transfer, in one lane."""

    def __init__(self, lane: Lane, first: int, count: int) -> None:
        self.lane = lane
        self.first = first
        self.count = count
        self.event: Any = None
        self.pending: kvar.Pending[Any] | None = None


class _Staged(ABC):
    """What loads and saves through lanes share: pieces take lanes as they come free."""

    def __init__(self, pages: StagedPages, batch: Batch) -> None:
        self.pages = pages
        self.batch = batch
        self.words = [""] * len(batch.ids)
        self._next = 0
        self._pieces: list[_Piece] = []

    def advance(self) -> list[str] | None:
        """Starts what a lane is free for, pushes along what has one."""
        for piece in list(self._pieces):
            if self.push(piece):
                self._pieces.remove(piece)
                self.pages.free.append(piece.lane)
        while self._next < len(self.words) and self.pages.free:
            count = min(LANE_BLOCKS, len(self.words) - self._next)
            piece = _Piece(self.pages.free.pop(), self._next, count)
            self._next += count
            self._pieces.append(piece)
            self.begin(piece)
        return self.words if self._next == len(self.words) and not self._pieces else None

    def ended_at(self) -> float:
        """Now: a piece ends when it is pushed."""
        return time.monotonic()

    def wait(self, at_most_s: float) -> None:
        """Waits for the first piece that is on the link."""
        for piece in self._pieces:
            if piece.pending is not None:
                wait_for(piece.pending, at_most_s)
                return

    @abstractmethod
    def begin(self, piece: _Piece) -> None:
        """Starts a piece that has just got its lane."""

    @abstractmethod
    def push(self, piece: _Piece) -> bool:
        """Pushes a piece along; True once it has ended."""

    def ids_of(self, piece: _Piece) -> Sequence[bytes]:
        """The ids of a piece."""
        return self.batch.ids[piece.first : piece.first + piece.count]

    def blocks_of(self, piece: _Piece) -> Sequence[int]:
        """The engine's pages of a piece."""
        return self.batch.blocks[piece.first : piece.first + piece.count]


class _StagedLoad(_Staged):
    """store -> lane -> pages."""

    def __init__(self, pages: StagedPages, batch: Batch, request: int) -> None:
        super().__init__(pages, batch)
        self.request = request

    def begin(self, piece: _Piece) -> None:
        piece.pending = self.batch.client.submit_get_pages(
            self.ids_of(piece),
            piece.lane.sections,
            range(piece.count),
            self.pages.page_bytes,
            deadline_ms=self.batch.deadline_ms,
            depth=self.batch.depth + piece.first,
            request=self.request,
        )

    def push(self, piece: _Piece) -> bool:
        if piece.pending is not None:
            if not piece.pending.done():
                return False
            words = words_of(piece.pending.result())
            piece.pending = None
            self.words[piece.first : piece.first + piece.count] = words
            places = [place for place, word in enumerate(words) if word == "hit"]
            if places:
                blocks = self.blocks_of(piece)
                piece.event = piece.lane.copy_out(places, [blocks[place] for place in places])
        return _is_done(piece.event)


class _StagedSave(_Staged):
    """pages -> lane -> store."""

    def __init__(self, pages: StagedPages, batch: Batch, hints: kvar.PutHints) -> None:
        super().__init__(pages, batch)
        self.hints = hints
        self.computed: Any = None
        if pages.stream is not None:
            import torch

            # The pages are filled by work that the engine has only launched: wait for it.
            self.computed = torch.cuda.Event()
            self.computed.record(torch.cuda.current_stream(pages.device))

    def begin(self, piece: _Piece) -> None:
        piece.event = piece.lane.copy_in(self.blocks_of(piece), self.computed)

    def push(self, piece: _Piece) -> bool:
        if piece.pending is None:
            if not _is_done(piece.event):
                return False
            piece.pending = self.batch.client.submit_put_pages(
                self.ids_of(piece),
                piece.lane.sections,
                range(piece.count),
                self.pages.page_bytes,
                deadline_ms=self.batch.deadline_ms,
                depth=self.batch.depth + piece.first,
                hints=self.hints,
            )
        if not piece.pending.done():
            return False
        self.words[piece.first : piece.first + piece.count] = words_of(piece.pending.result())
        return True
