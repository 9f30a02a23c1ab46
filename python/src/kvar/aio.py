"""``AsyncClient``: the client for asyncio. Same names, same meanings, awaited.

Nothing here waits in a thread: data calls are submitted and wake the event loop when they have
ended. Only connecting, and the calls without blocks' bytes (``remove``, ``flush``, ``status``,
lookups and leases), run on a thread of the loop's executor while they wait.

A call that is cancelled goes on in the background until its deadline, and its buffers with it:
they may be written until then. Give them up, or wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

from kvar._kvar import (
    Client,
    GetResult,
    Lease,
    NamespaceKey,
    Pending,
    PutHints,
    StagingBuffer,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    _Items: TypeAlias = Iterable[tuple[bytes, Buffer | Sequence[Buffer]]]

_T = TypeVar("_T")


class AsyncClient:
    """A connection to a store, for asyncio.

    ```python
    client = await kvar.AsyncClient.connect("127.0.0.1:7411", key_file="store.kvar.key")
    async with client:
        await client.put([(id, b"hello")])
    ```
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    @classmethod
    async def connect(
        cls,
        endpoint: str,
        namespace: str = "default",
        key: NamespaceKey | None = None,
        *,
        key_file: str | PathLike[str] | None = None,
        deadline_ms: int = 1000,
        connect_timeout_ms: int = 1000,
        links: int = 1,
        link: str = "auto",
        staging: int = 0,
    ) -> Self:
        """Connects; the arguments are those of :class:`kvar.Client`."""
        client = await asyncio.to_thread(
            Client,
            endpoint,
            namespace,
            key,
            key_file=key_file,
            deadline_ms=deadline_ms,
            connect_timeout_ms=connect_timeout_ms,
            links=links,
            link=link,
            staging=staging,
        )
        return cls(client)

    @property
    def endpoint(self) -> str:
        """The node this client talks to."""
        return self._client.endpoint

    @property
    def link(self) -> str:
        """What the links go through now: shm, tcp, or none while none stands."""
        return self._client.link

    @property
    def not_shared(self) -> str | None:
        """Why the links share no memory with the node; None while they do."""
        return self._client.not_shared

    @property
    def staging_bytes(self) -> int:
        """Size of the region that the node writes into, for staging(); 0: there is none."""
        return self._client.staging_bytes

    @property
    def not_staged(self) -> str | None:
        """Why there is no such region although one is wanted; None while there is one."""
        return self._client.not_staged

    @property
    def hits_placed(self) -> int:
        """Hits whose bytes the node wrote where they are read."""
        return self._client.hits_placed

    def staging(self, nbytes: int) -> StagingBuffer:
        """Memory for what is read, that the node writes to where it can; waits for nothing."""
        return self._client.staging(nbytes)

    @property
    def block_bytes_max(self) -> int | None:
        """The longest block that the node takes, in bytes; None until a link stands."""
        return self._client.block_bytes_max

    @property
    def announced_bytes_max(self) -> int | None:
        """How much puts layer by layer may have announced, in bytes; None until a link stands."""
        return self._client.announced_bytes_max

    @property
    def announced_blocks_max(self) -> int | None:
        """How many blocks they may have announced at a time; None until a link stands."""
        return self._client.announced_blocks_max

    @property
    def mode(self) -> str:
        """What the operator wants engines to do: off, observe, save or load."""
        return self._client.mode

    async def lookup(
        self, ids: Sequence[bytes], *, deadline_ms: int | None = None, request: int = 0
    ) -> int:
        """How many leading blocks are there."""
        return await asyncio.to_thread(
            self._client.lookup, ids, deadline_ms=deadline_ms, request=request
        )

    async def lookup_leased(
        self,
        ids: Sequence[bytes],
        *,
        ttl_s: float = 2.0,
        deadline_ms: int | None = None,
        request: int = 0,
    ) -> Lease:
        """How many leading blocks are there, and that they stay.

        The lease's own methods wait: call them with ``wait=False`` in a coroutine, or use
        :meth:`renew` and :meth:`release` with its token. The end of its ``with`` waits for nothing.
        """
        return await asyncio.to_thread(
            self._client.lookup_leased,
            ids,
            ttl_s=ttl_s,
            deadline_ms=deadline_ms,
            request=request,
        )

    async def renew(
        self, token: bytes, ttl_s: float = 2.0, *, deadline_ms: int | None = None
    ) -> float | None:
        """Lets a lease last longer: how many seconds from now, or None if it has ended."""
        return await asyncio.to_thread(self._client.renew, token, ttl_s, deadline_ms=deadline_ms)

    async def release(self, token: bytes, *, deadline_ms: int | None = None) -> bool:
        """Ends a lease; whether there was one."""
        return await asyncio.to_thread(self._client.release, token, deadline_ms=deadline_ms)

    async def present(self, ids: Sequence[bytes], *, deadline_ms: int | None = None) -> list[bool]:
        """For each block whether it is there."""
        return await asyncio.to_thread(self._client.present, ids, deadline_ms=deadline_ms)

    async def get(
        self,
        items: _Items,
        *,
        deadline_ms: int | None = None,
        depth: int = 0,
        request: int = 0,
    ) -> list[GetResult]:
        """Reads blocks into buffers."""
        return await _ended(
            self._client.submit_get(items, deadline_ms=deadline_ms, depth=depth, request=request)
        )

    async def get_bytes(self, id: bytes, *, deadline_ms: int | None = None) -> bytes | None:
        """One block's bytes, or None."""
        return await asyncio.to_thread(self._client.get_bytes, id, deadline_ms=deadline_ms)

    async def get_pages(
        self,
        ids: Sequence[bytes],
        layers: Sequence[Buffer],
        indices: Sequence[int],
        page_bytes: int,
        *,
        deadline_ms: int | None = None,
        depth: int = 0,
        request: int = 0,
    ) -> list[GetResult]:
        """Reads blocks into pages of an engine's layers."""
        return await _ended(
            self._client.submit_get_pages(
                ids,
                layers,
                indices,
                page_bytes,
                deadline_ms=deadline_ms,
                depth=depth,
                request=request,
            )
        )

    async def put(
        self,
        items: _Items,
        *,
        deadline_ms: int | None = None,
        durable: bool = False,
        depth: int = 0,
        ttl_s: int | None = None,
        hints: PutHints | None = None,
    ) -> list[str]:
        """Stores blocks."""
        return await _ended(
            self._client.submit_put(
                items,
                deadline_ms=deadline_ms,
                durable=durable,
                depth=depth,
                ttl_s=ttl_s,
                hints=hints,
            )
        )

    async def put_pages(
        self,
        ids: Sequence[bytes],
        layers: Sequence[Buffer],
        indices: Sequence[int],
        page_bytes: int,
        *,
        deadline_ms: int | None = None,
        durable: bool = False,
        depth: int = 0,
        ttl_s: int | None = None,
        hints: PutHints | None = None,
    ) -> list[str]:
        """Stores pages of an engine's layers as blocks."""
        return await _ended(
            self._client.submit_put_pages(
                ids,
                layers,
                indices,
                page_bytes,
                deadline_ms=deadline_ms,
                durable=durable,
                depth=depth,
                ttl_s=ttl_s,
                hints=hints,
            )
        )

    async def remove(self, ids: Sequence[bytes], *, deadline_ms: int | None = None) -> int:
        """Removes blocks for good; how many were there."""
        return await asyncio.to_thread(self._client.remove, ids, deadline_ms=deadline_ms)

    async def flush(self, *, deadline_ms: int | None = None) -> None:
        """Makes everything acknowledged so far safe against power loss."""
        await asyncio.to_thread(self._client.flush, deadline_ms=deadline_ms)

    async def status(self, *, deadline_ms: int | None = None) -> dict[str, Any]:
        """What the node says of itself."""
        return await asyncio.to_thread(self._client.status, deadline_ms=deadline_ms)

    async def close(self) -> None:
        """Ends the connection; calls under way end first, at the latest by their deadlines."""
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


async def _ended(pending: Pending[_T]) -> _T:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def wake() -> None:
        # Called from a thread of the client; the loop may be closed by then.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(ended.set)

    pending.add_done_callback(wake)
    await ended.wait()
    return pending.result()
