"""kvar under LMCache: an L2 backend of its server, found by its ``native_plugin`` adapter.

```sh
lmcache server --port 5555 --chunk-size 256 --l1-size-gb 20 --eviction-policy LRU \
  --l2-adapter '{"type": "native_plugin", "module_path": "kvar.lmcache", "class_name": "Client",
                 "adapter_params": {"endpoint": "127.0.0.1:7411", "key_file": "store.kvar.key"}}'
```

LMCache calls from its own threads and must never wait, so each batch goes to a few threads of
this module, and one eventfd says when some have ended:

```text
   submit_batch_get | set | delete ──> queue ──> workers: one batch each, to its end
   submit_batch_exists ──────────────> queue ──> worker       │ (the interpreter's lock is free)
   drain_completions <── [(number, ok, error, a bool a key)] ─┘──> eventfd
```

Bytes go from and to LMCache's own memory: nothing is copied here. Objects larger than a block
(a chunk of 256 tokens often is) are kept in parts that become visible together (``kvar.objects``).

What must always be true:

* every batch ends by its deadline, which runs from its submission, whatever the node does, and then
  its memory is LMCache's again;
* a key whose bytes did not pass the writer's check is not loaded, and says so in no other way than
  a key that is absent;
* without the node nothing is found and nothing is kept; LMCache and its engines go on, and one line
  of log says so, and another one when it answers again.

A key of LMCache names the model by its path, rank, group and chunk; nothing in it says which
weights lie at that path, or how numbers lie in memory. So an object counts only if it has exactly
the length that is asked for, LMCache's own version is part of its name, and ``fingerprint`` keeps
apart what has the same length and another meaning: other weights, bfloat16 and float16, another
layout.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import kvar
from kvar.objects import (
    EXISTS,
    HIT,
    STORED,
    get_objects,
    present_objects,
    put_objects,
    remove_objects,
)

logger = logging.getLogger("lmcache.kvar")

TESTED_VERSIONS = ((0, 5, 6), (0, 6, 0))
"""LMCache from the first up to, and without, the second."""

WORKERS_MAX = 64
NAME_CHARACTERS_MAX = 120
DEADLINE_MS_MAX = 600_000

# Somebody else is writing the same object: what LMCache wants to be there will be.
_KEPT = frozenset({STORED, EXISTS, "in_progress"})
# The store is away or mute: no word about any one object.
_AWAY = frozenset({"unreachable", "deadline"})
# How often the same trouble is said aloud.
_SAY_EVERY_S = 60.0

Completion = tuple[int, bool, str, list[bool] | None]
# What a batch does: with its ids, its buffers, and how many milliseconds it has left.
_Do = Callable[[list[bytes], Sequence[memoryview], int], tuple[str, list[bool]]]


@dataclass
class Stats:
    """What went through since the start: objects, and bytes of those that were moved."""

    stored: int = 0
    existed: int = 0
    refused: int = 0
    loaded: int = 0
    missed: int = 0
    found: int = 0
    looked_up: int = 0
    removed: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


class Client:
    """What LMCache's ``native_plugin`` adapter drives. Thread-safe.

    ``adapter_params`` are the arguments:

    * ``endpoint``: the node, ``HOST:PORT``;
    * ``key_file``: the namespace's key, which the node wrote beside its data (or ``key``, 64 hex
      digits);
    * ``namespace``: ``"default"``;
    * ``fingerprint``: any text that is equal for servers whose bytes mean the same;
    * ``deadline_ms``: for a batch of loads or stores, 10,000; ``lookup_deadline_ms``: 1,000;
    * ``workers``: batches under way at a time, 4;
    * ``link``: ``auto``, ``tcp`` or ``shm``;
    * ``any_version``: work under an LMCache that this was not tried with, too.

    Raises:
        kvar.ConfigError: an argument makes no sense, or there is no such namespace.
        kvar.WrongKeyError: the node has another key.
        kvar.VersionError: the node speaks another protocol.
    """

    def __init__(
        self,
        endpoint: str = "127.0.0.1:7411",
        *,
        key_file: str | os.PathLike[str] | None = None,
        key: str | None = None,
        namespace: str = "default",
        fingerprint: str = "",
        deadline_ms: int = 10_000,
        lookup_deadline_ms: int = 1_000,
        workers: int = 4,
        link: str = "auto",
        any_version: bool = False,
    ) -> None:
        _check("deadline_ms", deadline_ms, DEADLINE_MS_MAX)
        _check("lookup_deadline_ms", lookup_deadline_ms, DEADLINE_MS_MAX)
        _check("workers", workers, WORKERS_MAX)
        if (key is None) == (key_file is None):
            raise kvar.ConfigError(
                "adapter_params: give the namespace's key either as key_file (the node wrote one "
                "beside its data) or as key"
            )
        self._key = (
            kvar.NamespaceKey.from_hex(key)
            if key is not None
            else kvar.NamespaceKey.from_file(key_file or "")
        )
        version = _version()
        self._is_off = not any_version and version is not None and not is_tried(version)
        if self._is_off:
            logger.warning("%s", untried(version or ""))
        if not fingerprint:
            logger.warning(
                "kvar: no fingerprint in adapter_params: other weights, or another type or layout "
                "of numbers, under the same model path would be taken for the same; give a text "
                "that changes with them"
            )
        release = ".".join(version.split(".")[:2]) if version else "?"
        self._name = f"lmcache {release}\0{fingerprint}"
        self._deadlines_ms = {False: deadline_ms, True: lookup_deadline_ms}
        self._client = _connect(
            endpoint,
            namespace=namespace,
            key=self._key,
            deadline_ms=deadline_ms,
            link=link,
            name=f"lmcache {release}; fingerprint={fingerprint}"[:NAME_CHARACTERS_MAX],
        )
        self._lock = threading.Lock()
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._next = 0
        self._completions: list[Completion] = []
        self._stats = Stats()
        self._is_away = False
        self._said_at = -_SAY_EVERY_S
        self._closed = False
        # Lookups have a worker of their own: they are short, and what waits for them is a prompt.
        self._lookups: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._moves: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._queues = [self._lookups, *[self._moves] * workers]
        self._threads = [
            threading.Thread(target=_work_off, args=(work,), name=f"kvar-lmcache-{n}", daemon=True)
            for n, work in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    # What LMCache calls.

    def event_fd(self) -> int:
        """Readable when completions wait to be drained."""
        return self._event_fd

    def submit_batch_get(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> int:
        """Loads objects into these buffers; the batch's number."""
        return self._submit(self._load, keys, buffers)

    def submit_batch_set(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> int:
        """Stores objects from these buffers; the batch's number."""
        return self._submit(self._store, keys, buffers)

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        """Asks which objects are there; the batch's number."""
        return self._submit(self._exists, keys, (), is_lookup=True)

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        """Removes objects; the batch's number."""
        return self._submit(self._delete, keys, ())

    def drain_completions(self) -> list[Completion]:
        """Batches that ended since the last call: number, went well, why not, a word a key."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                if self._event_fd >= 0:
                    os.eventfd_read(self._event_fd)
            drained, self._completions = self._completions, []
        return drained

    def close(self) -> None:
        """Ends. What is under way ends by its deadline; what still waits ends at once, undone.

        Closing twice is fine.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for work in self._queues:
                work.put(None)
        for thread in self._threads:
            thread.join()
        self._client.close()
        with self._lock:
            event_fd, self._event_fd = self._event_fd, -1
        os.close(event_fd)

    # For people.

    def stats(self) -> Stats:
        """What went through since the start."""
        with self._lock:
            return Stats(**{**vars(self._stats), "reasons": dict(self._stats.reasons)})

    # One batch, on a worker.

    def _load(
        self, ids: list[bytes], buffers: Sequence[memoryview], left_ms: int
    ) -> tuple[str, list[bool]]:
        words = get_objects(self._client, list(zip(ids, buffers, strict=True)), deadline_ms=left_ms)
        hits = [word == HIT for word in words]
        moved = sum(b.nbytes for b, hit in zip(buffers, hits, strict=True) if hit)
        self._count(words, loaded=sum(hits), missed=len(hits) - sum(hits), loaded_bytes=moved)
        return "", hits

    def _store(
        self, ids: list[bytes], buffers: Sequence[memoryview], left_ms: int
    ) -> tuple[str, list[bool]]:
        words = put_objects(self._client, list(zip(ids, buffers, strict=True)), deadline_ms=left_ms)
        kept = [word in _KEPT for word in words]
        stored = [word == STORED for word in words]
        self._count(
            words,
            stored=sum(stored),
            existed=sum(kept) - sum(stored),
            refused=len(kept) - sum(kept),
            stored_bytes=sum(b.nbytes for b, new in zip(buffers, stored, strict=True) if new),
        )
        why = sorted({word for word in words if word not in _KEPT})
        error = f"{kept.count(False)} of {len(kept)} not stored: {', '.join(why)}" if why else ""
        return error, kept

    def _exists(
        self, ids: list[bytes], _: Sequence[memoryview], left_ms: int
    ) -> tuple[str, list[bool]]:
        there = present_objects(self._client, ids, deadline_ms=left_ms)
        self._count([EXISTS], looked_up=len(ids), found=sum(there))
        return "", there

    def _delete(
        self, ids: list[bytes], _: Sequence[memoryview], left_ms: int
    ) -> tuple[str, list[bool]]:
        there = remove_objects(self._client, ids, deadline_ms=left_ms)
        self._count([EXISTS], removed=sum(there))
        return "", there

    # What all batches share.

    def _id(self, key: str) -> bytes:
        return kvar.id_from_name(self._key, f"{self._name}\0{key}")

    def _submit(
        self,
        do: _Do,
        keys: Sequence[str],
        buffers: Sequence[memoryview],
        *,
        is_lookup: bool = False,
    ) -> int:
        batch = (list(keys), list(buffers))
        until = time.monotonic() + self._deadlines_ms[is_lookup] / 1000
        with self._lock:
            if self._closed:
                raise kvar.RequestError("the kvar client is closed; make a new one")
            number, self._next = self._next, self._next + 1
            (self._lookups if is_lookup else self._moves).put(
                lambda: self._run(number, do, batch, until)
            )
        return number

    def _run(
        self,
        number: int,
        do: _Do,
        batch: tuple[list[str], list[memoryview]],
        until: float,
    ) -> None:
        count = len(batch[0])
        ended: tuple[bool, str, list[bool]] = (False, "it did not end", [False] * count)
        try:
            ended = self._done(do, batch, until)
        except BaseException as why:  # A panic of the Rust half too: LMCache waits for this batch.
            logger.exception("kvar: a batch of %d keys failed", count)
            ended = (False, f"{type(why).__name__}: {why}", [False] * count)
        finally:
            # Before anyone hears of the end: the memory is LMCache's again.
            batch[1].clear()
            with self._lock:
                self._completions.append((number, *ended))
                os.eventfd_write(self._event_fd, 1)

    def _done(
        self, do: _Do, batch: tuple[list[str], list[memoryview]], until: float
    ) -> tuple[bool, str, list[bool]]:
        keys, buffers = batch
        nothing = [False] * len(keys)
        left_ms = int((until - time.monotonic()) * 1000)
        if self._closed:
            return False, "kvar is closing", nothing
        if self._is_off:
            return False, "kvar is off under this version of LMCache", nothing
        if left_ms <= 0:
            self._count(["deadline"] * len(keys))
            return False, "deadline: others were before it for too long", nothing
        try:
            error, each = do([self._id(key) for key in keys], buffers, left_ms)
        except kvar.KvarError as why:
            self._away(str(why))
            return False, f"{type(why).__name__}: {why}", nothing
        return not error, error, each

    def _count(self, words: Sequence[str], **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self._stats, name, getattr(self._stats, name) + count)
            for word in words:
                if word != HIT and word not in _KEPT:
                    self._stats.reasons[word] = self._stats.reasons.get(word, 0) + 1
        if words and all(word in _AWAY for word in words):
            self._away(words[0])
        elif words:
            self._there()

    def _away(self, why: str) -> None:
        with self._lock:
            self._is_away = True
            now = time.monotonic()
            if now - self._said_at < _SAY_EVERY_S:
                return
            self._said_at = now
        logger.warning(
            "kvar: %s does not serve (%s); nothing is found or kept there until it does",
            self._client.endpoint,
            why,
        )

    def _there(self) -> None:
        with self._lock:
            was_away, self._is_away = self._is_away, False
        if was_away:
            logger.info("kvar: %s serves again", self._client.endpoint)


def _work_off(work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (do := work.get()) is not None:
        do()
        # Not until the next one comes: it holds LMCache's memory.
        del do


def _connect(endpoint: str, **settings: Any) -> kvar.Client:
    """A client; one that connects later if the node is not there yet."""
    try:
        return kvar.Client(endpoint, **settings)
    except kvar.ConnectError as error:
        logger.warning(
            "kvar: %s is not reachable (%s); going on without it until it is", endpoint, error
        )
        return kvar.Client(endpoint, lazy=True, **settings)


def _check(name: str, value: int, most: int) -> None:
    if not isinstance(value, int) or not 1 <= value <= most:
        raise kvar.ConfigError(f"adapter_params: {name} is {value!r}; give 1 to {most}")


def is_tried(version: str) -> bool:
    """Whether this module was tried with this version of LMCache.

    >>> is_tried("0.5.6"), is_tried("0.5.6+cu128"), is_tried("0.5.5"), is_tried("0.6.0")
    (True, True, False, False)
    """
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers is None:
        return False
    first, beyond = TESTED_VERSIONS
    return first <= (int(numbers[1]), int(numbers[2]), int(numbers[3])) < beyond


def untried(version: str) -> str:
    """What is said of a version that this module was not tried with."""
    first, beyond = (".".join(map(str, version)) for version in TESTED_VERSIONS)
    return (
        f"kvar: off: LMCache {version} is not among those it is made for (from {first}, before "
        f"{beyond}); nothing is found or kept in the store. To use it all the same: "
        '"any_version": true in adapter_params'
    )


def _version() -> str | None:
    try:
        return metadata.version("lmcache")
    except metadata.PackageNotFoundError:
        return None
