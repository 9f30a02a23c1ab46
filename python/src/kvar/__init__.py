"""kvar: a store for the KV cache of LLM inference. What was computed once is still there.

```python
import kvar

with kvar.Client("127.0.0.1:7411", key_file="kvar-data/store.kvar.key") as client:
    key = kvar.NamespaceKey.from_file("kvar-data/store.kvar.key")
    id = kvar.id_from_name(key, "greeting")
    client.put([(id, b"hello")])          # ['stored']
    buffer = bytearray(5)
    client.get([(id, buffer)])            # [GetResult('hit', 5 bytes)]
```

Rules that hold for every call:

* outcomes are words, not exceptions: a get says ``hit`` or why not (``absent``, ``corrupt``,
  ``deadline``, ``unreachable``, ...), a put says ``stored``, ``exists``, ``in_progress`` or why not
  (``busy``, ``too_big``, ...). Exceptions are for what no retry helps: see :class:`KvarError`;
* a call ends by its deadline;
* buffers are used where they are, never copied; bytes in them count only after a ``hit``: a read
  that missed may have written part of them;
* other Python threads run while a call waits.

On the node's host the node can write what is read where it is looked at, so that nothing is copied
here (what that brings, and when: ``docs/decisions/0013-slots-for-gets.md``):

```python
client = kvar.Client("127.0.0.1:7411", key_file="store.kvar.key", staging=64 << 20)
buffer = client.staging(16 << 20)                 # plain memory where there is no region
client.get(zip(ids, (memoryview(buffer)[n << 20 : (n + 1) << 20] for n in range(16))))
```

A get into such memory that ends by its deadline may still be written: ``buffer.in_use`` says so.

A lookup can make what it found stay, and a put can say what its blocks are worth:

```python
with client.lookup_leased(ids) as lease:          # for two seconds, or until the end of the block
    client.get(zip(ids[: lease.leading], buffers))
client.put([(id, data)], hints=kvar.PutHints(traffic_class=3, recompute_us=800_000))
```

:class:`AsyncClient` is the same for asyncio. ``kvar.vllm`` is the connector for vLLM.
"""

from __future__ import annotations

from kvar._kvar import (
    Client,
    ConfigError,
    ConnectError,
    ContentFingerprint,
    GetResult,
    KvarError,
    LayerGet,
    LayerPut,
    Lease,
    NamespaceKey,
    Pending,
    PendingLease,
    PutHints,
    RequestError,
    StagingBuffer,
    VersionError,
    WrongKeyError,
    __version__,
    derive_ids,
    id_from_name,
)
from kvar.aio import AsyncClient

BlockId = bytes
"""The name of a block: 32 bytes, as :func:`derive_ids` and :func:`id_from_name` make them."""

__all__ = [
    "AsyncClient",
    "BlockId",
    "Client",
    "ConfigError",
    "ConnectError",
    "ContentFingerprint",
    "GetResult",
    "KvarError",
    "LayerGet",
    "LayerPut",
    "Lease",
    "NamespaceKey",
    "Pending",
    "PendingLease",
    "PutHints",
    "RequestError",
    "StagingBuffer",
    "VersionError",
    "WrongKeyError",
    "__version__",
    "derive_ids",
    "id_from_name",
]
