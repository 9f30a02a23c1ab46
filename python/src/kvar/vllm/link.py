"""The connector's hold on the store: a client that may be missing, and what that costs.

```text
              connected                       a call found the node gone or mute
   down  ------------------>  up  ------------------------------------------------> down
    ^  a thread tries again: after 0.25 s, then twice as long each time, at most 5 s   |
    +----------------------------------------------------------------------------------+
```

While down every question is answered at once with "no": the engine pays one lookup deadline for
the first failure and nothing after it. Trying again is the thread's work, never a request's.

A wrong key or another protocol version is a mistake in the set-up, not weather: at start it is
raised, later (the node was replaced) it is logged and tried again like the rest.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import kvar
from kvar.vllm.settings import Mode, Settings

logger = logging.getLogger("vllm.kvar")

RETRY_FIRST_S = 0.25
RETRY_LAST_S = 5.0

# What the first connection may take, at engine start or from the retry thread; both can wait.
CONNECT_TIMEOUT_MS = 1_000

# Why a lookup was not answered, in the words of kvar.vllm.funnel.
AWAY = "store_away"
LATE = "lookup_deadline"
FAILED = "lookup_failed"

# Asked about to see whether the node answers; ids are hashes, and no hash is all zeros.
NOBODYS_ID = bytes(32)

# An early lookup that failed longer ago than this behind its deadline is asked again.
RECENT_MS = 50


@dataclass(frozen=True)
class Begun:
    """A leased lookup that was begun, and when."""

    pending: kvar.PendingLease
    at: float


class QuietLease:
    """A lease on the engine's path: nothing here waits or raises.

    A node that does not hear of a release lets the lease end by itself.
    """

    def __init__(self, lease: kvar.Lease) -> None:
        self._lease = lease

    def renew(self, ttl_s: float) -> None:
        """Lets it last so long from now."""
        with contextlib.suppress(kvar.KvarError):
            self._lease.renew(ttl_s, wait=False)

    def release(self) -> None:
        """Ends it."""
        with contextlib.suppress(kvar.KvarError):
            self._lease.release(wait=False)


class Link:
    """A client with a breaker. Thread-safe."""

    def __init__(self, connect: Callable[[], kvar.Client], endpoint: str) -> None:
        self._connect = connect
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._client: kvar.Client | None = None
        self._up = False
        self._mode = Mode.LOAD
        self._why_unanswered = AWAY
        self._closed = threading.Event()
        self._retry: threading.Thread | None = None

    @classmethod
    def to(cls, settings: Settings, name: str | None = None) -> Link:
        """The link that the settings describe: connected if the node is there and wanted.

        ``name`` is what the node shows of it (:mod:`kvar.vllm.introduction`).
        """

        def connect() -> kvar.Client:
            return kvar.Client(
                settings.endpoint,
                namespace=settings.namespace,
                key_file=settings.namespace_key_file,
                deadline_ms=settings.deadline_ms,
                connect_timeout_ms=CONNECT_TIMEOUT_MS,
                name=name,
            )

        link = cls(connect, settings.endpoint)
        if settings.mode.looks_up:
            link.start()
        return link

    def start(self) -> None:
        """Connects; an unreachable node is a warning, a wrong key or version is raised."""
        try:
            self._client = self._connect()
            self._up = True
        except kvar.ConnectError as error:
            logger.warning(
                "kvar: %s is not reachable (%s); going on without it and trying again",
                self._endpoint,
                error,
            )
            self._retry_later()

    def client(self) -> kvar.Client | None:
        """The client, or None while the store is away."""
        return self._client if self._up else None

    def mode(self) -> Mode:
        """What the operator wants of this namespace, as the node last said. Asks nobody.

        The node tells its clients of a switch by itself; a store that is away keeps its last word.
        """
        client = self._client
        if client is not None:
            # A client that was closed says nothing any more.
            with contextlib.suppress(kvar.KvarError):
                mode = Mode(client.mode)
                if mode is not self._mode:
                    logger.info("kvar: %s was switched to mode %s", self._endpoint, mode.value)
                    self._mode = mode
        return self._mode

    def lookup(self, ids: Sequence[bytes], deadline_ms: int, request: int = 0) -> int | None:
        """How many leading blocks are there; None if the store is away or does not say in time."""
        client = self.client()
        if client is None:
            self._why_unanswered = AWAY
            return None
        begun = time.monotonic()
        try:
            return client.lookup(ids, deadline_ms=deadline_ms, request=request)
        except kvar.KvarError as error:
            self._not_answered(error, begun, deadline_ms)
            return None

    def present(self, ids: Sequence[bytes], deadline_ms: int) -> list[bool] | None:
        """Which blocks are there; None as for :meth:`lookup`."""
        client = self.client()
        if client is None:
            self._why_unanswered = AWAY
            return None
        begun = time.monotonic()
        try:
            return client.present(ids, deadline_ms=deadline_ms)
        except kvar.KvarError as error:
            self._not_answered(error, begun, deadline_ms)
            return None

    def why_unanswered(self) -> str:
        """Why the last lookup that got no answer got none."""
        return self._why_unanswered

    def _not_answered(self, error: kvar.KvarError, begun: float, deadline_ms: int) -> None:
        in_time = (time.monotonic() - begun) * 1000 < deadline_ms
        self._why_unanswered = FAILED if in_time else LATE
        self.failed(error)

    def begin_lookup(
        self, ids: Sequence[bytes], deadline_ms: int, ttl_s: float, request: int = 0
    ) -> Begun | None:
        """Begins a leased lookup: :meth:`lookup_leased` takes its answer, or :meth:`drop_begun`.

        None: the store is away.
        """
        client = self.client()
        if client is None:
            return None
        try:
            pending = client.submit_lookup_leased(
                ids, ttl_s=ttl_s, deadline_ms=deadline_ms, request=request
            )
        except kvar.KvarError as error:
            self.failed(error)
            return None
        return Begun(pending, time.monotonic())

    def drop_begun(self, begun: Begun) -> None:
        """Ends what it promised. Waits for nothing: an answer still to come ends with its time."""
        if not begun.pending.done():
            return
        with contextlib.suppress(kvar.KvarError):
            lease = begun.pending.result()
            if lease.held:
                QuietLease(lease).release()

    def lookup_leased(
        self,
        ids: Sequence[bytes],
        deadline_ms: int,
        ttl_s: float,
        request: int = 0,
        begun: Begun | None = None,
    ) -> tuple[int, QuietLease | None] | None:
        """As :meth:`lookup`, and with a promise that what is there stays.

        A store promises a share of itself. What is there beyond that is counted all the same: it
        will most likely be there when it is loaded, and if not it is computed.
        """
        client = self.client()
        if client is None:
            self._why_unanswered = AWAY
            return None
        began = time.monotonic()
        lease = None
        if begun is not None:
            try:
                lease = begun.pending.result()
            except kvar.KvarError as error:
                # One that failed a while ago says nothing of now: it is asked again.
                if (time.monotonic() - begun.at) * 1000 < deadline_ms + RECENT_MS:
                    self._not_answered(error, begun.at, deadline_ms)
                    return None
        try:
            if lease is None:
                lease = client.lookup_leased(
                    ids, ttl_s=ttl_s, deadline_ms=deadline_ms, request=request
                )
        except kvar.KvarError as error:
            self._not_answered(error, began, deadline_ms)
            return None
        found = lease.leading
        if lease.reason == "overloaded":
            left_ms = deadline_ms - int((time.monotonic() - began) * 1000)
            try:
                if left_ms > 0:
                    found = max(found, client.lookup(ids, deadline_ms=left_ms, request=request))
            except kvar.KvarError as error:
                self.failed(error)
        return found, QuietLease(lease) if lease.held else None

    def failed(self, why: object) -> None:
        """A call found the node gone or mute: open the breaker."""
        with self._lock:
            if not self._up or self._closed.is_set():
                return
            self._up = False
        logger.warning(
            "kvar: %s does not answer (%s); computing instead until it does", self._endpoint, why
        )
        self._retry_later()

    def _retry_later(self) -> None:
        with self._lock:
            if self._retry is None and not self._closed.is_set():
                self._retry = threading.Thread(target=self._run, name="kvar-link", daemon=True)
                self._retry.start()

    def _run(self) -> None:
        wait_s = RETRY_FIRST_S
        while not self._closed.wait(wait_s):
            wait_s = min(2 * wait_s, RETRY_LAST_S)
            try:
                if self._client is None:
                    self._client = self._connect()
                else:
                    self._client.lookup([NOBODYS_ID], deadline_ms=CONNECT_TIMEOUT_MS)
            except kvar.ConnectError as error:
                logger.debug("kvar: %s is still away: %s", self._endpoint, error)
                continue
            except kvar.KvarError as error:
                logger.warning("kvar: %s answers, but: %s", self._endpoint, error)
                continue
            with self._lock:
                self._up = True
                self._retry = None
            logger.info("kvar: %s answers again", self._endpoint)
            return

    def close(self) -> None:
        """Ends the thread and the client. Calls under way end by their deadlines."""
        self._closed.set()
        with self._lock:
            self._up = False
            retry = self._retry
        if retry is not None:
            retry.join(timeout=CONNECT_TIMEOUT_MS / 1000 + 1)
        if self._client is not None:
            self._client.close()
