"""The asyncio twin: the same names, and the same things happen."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable

from conftest import Node

import kvar

Name = Callable[[object], bytes]


def test_many_calls_at_once(node: Node, name: Name) -> None:
    async def run() -> None:
        async with await kvar.AsyncClient.connect(
            node.endpoint, key_file=node.key_file, deadline_ms=10_000
        ) as client:
            ids = [name(n) for n in range(50)]
            puts = [client.put([(id, bytes([n]) * 9000)]) for n, id in enumerate(ids)]
            assert await asyncio.gather(*puts) == [["stored"]] * 50
            buffers = [bytearray(9000) for _ in ids]
            gets = [client.get([pair]) for pair in zip(ids, buffers, strict=True)]
            results = await asyncio.gather(*gets)
            assert {result.outcome for (result,) in results} == {"hit"}
            assert [buffer[0] for buffer in buffers] == list(range(50))
            assert await client.lookup(ids) == 50
            assert await client.present([ids[0], name("no")]) == [True, False]
            assert await client.get_bytes(ids[7]) == bytes([7]) * 9000
            layer = bytearray(9000)
            (paged,) = await client.get_pages([ids[3]], [layer], [0], 9000)
            assert (paged.outcome, layer[0]) == ("hit", 3)
            assert await client.put_pages([name("p")], [layer], [0], 9000) == ["stored"]
            with await client.lookup_leased(ids, ttl_s=20) as lease:
                assert (lease.leading, lease.reason) == (50, None)
                assert lease.token is not None
                assert await client.renew(lease.token, 30) is not None
                assert await client.release(lease.token)
            hints = kvar.PutHints(handover=True)
            assert await client.put([(name("h"), b"x")], hints=hints) == ["stored"]
            assert await client.remove([ids[0]]) == 1
            await client.flush()
            assert isinstance(await client.status(), dict)

    asyncio.run(run())


def test_a_cancelled_call_leaves_the_client_working(node: Node, name: Name) -> None:
    async def run() -> None:
        async with await kvar.AsyncClient.connect(
            node.endpoint, key_file=node.key_file, deadline_ms=10_000
        ) as client:
            task = asyncio.create_task(
                client.put([(name(n), bytes(1 << 20)) for n in range(10, 20)])
            )
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await client.put([(name(2), b"x")]) == ["stored"]

    asyncio.run(run())


def test_both_clients_have_the_same_methods() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    only_sync = {name for name in names(kvar.Client) if name.startswith("submit_")}
    assert names(kvar.AsyncClient) - {"connect"} == names(kvar.Client) - only_sync
    told = {"endpoint", "link", "not_shared", "mode", "announced_bytes_max", "block_bytes_max"}
    told |= {"staging", "staging_bytes", "not_staged", "hits_placed", "announced_blocks_max"}
    for name in names(kvar.AsyncClient) - told:
        assert inspect.iscoroutinefunction(getattr(kvar.AsyncClient, name)), name
