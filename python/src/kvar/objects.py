"""Objects of any length: what is larger than a block is kept in parts that become visible together.

A block has a largest length (``Client.block_bytes_max``; a node says it: 16 MiB, or a quarter of a
segment of its device). Up to there an object is one block, put and read as any other. Beyond, it is
several:

```text
   id ── head: {magic, layout, part_bytes, total, nonce}            a block of two sections
           │
           ├── part 0   id = hash(id, nonce, 0)   part_bytes        blocks like any other
           ├── part 1   id = hash(id, nonce, 1)   part_bytes
           └── part n   id = hash(id, nonce, n)   what is left
```

What must always be true:

* an object is there when its head is, and the head is written when every part is stored: nobody
  sees half of one;
* parts of two writers never mix: each writer draws a nonce, and the head that won names its own;
* a part that is lost is a miss of the whole object, with the part's reason;
* bytes are checked as those of every block: by the writer's content check, a part at a time.

What is left open: parts of a writer that came second, or died before its head, are reached by
nobody and leave as everything does that nobody reads. A lease holds the head alone.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import kvar

if TYPE_CHECKING:
    from typing_extensions import Buffer

PART_BYTES_MAX = 4 << 20
"""Longest part: its own cost is nothing then, and many are under way."""

BLOCK_BYTES_USUAL = 16 << 20
"""What is taken for the largest block while no node has said: no node takes more."""

_HEAD = struct.Struct("<HHIQ16s")
_MAGIC = b"kvar-prt"
_LAYOUT = 1
_HEAD_LENGTHS = (_HEAD.size, len(_MAGIC))

HIT = "hit"
STORED = "stored"
EXISTS = "exists"
# A writer of the same block is at work; of an object's head: its parts are there.
_SETTLED = (STORED, EXISTS)


@dataclass(frozen=True)
class Head:
    """What an object's first block says of its parts."""

    part_bytes: int
    total: int
    nonce: bytes

    @classmethod
    def of(cls, total: int, part_bytes: int) -> Head:
        """A new one, of parts that no other head names."""
        return cls(part_bytes, total, os.urandom(16))

    def encode(self) -> list[bytes]:
        """Its two sections."""
        return [_HEAD.pack(_LAYOUT, 0, self.part_bytes, self.total, self.nonce), _MAGIC]

    @classmethod
    def decode(cls, sections: Sequence[Buffer]) -> Head | None:
        """The head in these sections; None if it is of no layout known here."""
        layout, spare, part_bytes, total, nonce = _HEAD.unpack(sections[0])
        known = bytes(sections[1]) == _MAGIC and layout == _LAYOUT and spare == 0
        if not known or part_bytes == 0 or total == 0:
            return None
        return cls(part_bytes, total, nonce)

    def parts(self, id: bytes) -> Iterator[tuple[bytes, int, int]]:
        """Id, first and end byte of every part of the object ``id``."""
        for number, first in enumerate(range(0, self.total, self.part_bytes)):
            name = id + self.nonce + number.to_bytes(8, "little")
            part = hashlib.blake2b(name, digest_size=32, person=b"kvar object part"[:16]).digest()
            yield part, first, min(first + self.part_bytes, self.total)


class _Time:
    """What is left of a deadline over several calls."""

    def __init__(self, deadline_ms: int) -> None:
        self._end = time.monotonic() + deadline_ms / 1000

    def left_ms(self) -> int:
        # A call with no time left ends by itself, with the word for it.
        return max(0, int((self._end - time.monotonic()) * 1000))


def _block_bytes_max(client: kvar.Client) -> int:
    return client.block_bytes_max or BLOCK_BYTES_USUAL


def _bytes_of(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def put_objects(
    client: kvar.Client,
    objects: Sequence[tuple[bytes, Buffer]],
    *,
    deadline_ms: int,
    hints: kvar.PutHints | None = None,
    ttl_s: int | None = None,
) -> list[str]:
    """Stores objects of any length; an outcome word for each, as of :meth:`kvar.Client.put`.

    Waits until all have ended, at most ``deadline_ms``. An object in parts takes two round trips
    more, and one of which somebody else's copy is there costs one.
    """
    left = _Time(deadline_ms)
    most = _block_bytes_max(client)
    views = [_bytes_of(buffer) for _, buffer in objects]
    words = [""] * len(objects)
    large = [n for n, view in enumerate(views) if len(view) > most]
    if large:
        there = client.present([objects[n][0] for n in large], deadline_ms=left.left_ms())
        for n, is_there in zip(large, there, strict=True):
            words[n] = EXISTS if is_there else ""
    heads: dict[int, Head] = {}
    blocks: list[tuple[bytes, memoryview]] = []
    owners: list[int] = []
    for n, ((id, _), view) in enumerate(zip(objects, views, strict=True)):
        if words[n]:
            continue
        if len(view) <= most:
            blocks.append((id, view))
            owners.append(n)
            continue
        heads[n] = Head.of(len(view), min(most, PART_BYTES_MAX))
        for part, first, end in heads[n].parts(id):
            blocks.append((part, view[first:end]))
            owners.append(n)
    put = client.put(blocks, deadline_ms=left.left_ms(), hints=hints, ttl_s=ttl_s) if blocks else []
    for n, word in zip(owners, put, strict=True):
        if n not in heads or (word not in _SETTLED and not words[n]):
            words[n] = word
    whole = [n for n in heads if not words[n]]
    if whole:
        items = [(objects[n][0], heads[n].encode()) for n in whole]
        put = client.put(items, deadline_ms=left.left_ms(), hints=hints, ttl_s=ttl_s)
        for n, word in zip(whole, put, strict=True):
            words[n] = word
    return words


def get_objects(
    client: kvar.Client, objects: Sequence[tuple[bytes, Buffer]], *, deadline_ms: int
) -> list[str]:
    """Reads objects into buffers of their lengths: ``"hit"``, or the reason of a miss, for each.

    Bytes in a buffer count only after ``"hit"``. An object in parts takes one round trip more.
    """
    left = _Time(deadline_ms)
    most = _block_bytes_max(client)
    views = [_bytes_of(buffer) for _, buffer in objects]
    words = [""] * len(objects)
    large = [n for n, view in enumerate(views) if len(view) > most]
    heads: dict[int, Head] = {}
    if large:
        found = _read_heads(client, [objects[n][0] for n in large], left)
        for n, head in zip(large, found, strict=True):
            if isinstance(head, str):
                words[n] = head
            elif head.total != len(views[n]):
                words[n] = "wrong_format"
            else:
                heads[n] = head
    blocks: list[tuple[bytes, memoryview]] = []
    owners: list[int] = []
    for n, ((id, _), view) in enumerate(zip(objects, views, strict=True)):
        if n in heads:
            for part, first, end in heads[n].parts(id):
                blocks.append((part, view[first:end]))
                owners.append(n)
        elif not words[n]:
            blocks.append((id, view))
            owners.append(n)
    got = client.get(blocks, deadline_ms=left.left_ms()) if blocks else []
    for n, result in zip(owners, got, strict=True):
        # Of several parts the first that misses says why.
        if words[n] in ("", HIT):
            words[n] = result.outcome
    return words


def remove_objects(client: kvar.Client, ids: Sequence[bytes], *, deadline_ms: int) -> list[bool]:
    """Removes objects of any length, safe against power loss; for each whether it was there."""
    left = _Time(deadline_ms)
    there = client.present(ids, deadline_ms=left.left_ms())
    present = [id for id, is_there in zip(ids, there, strict=True) if is_there]
    if not present:
        return there
    heads = _read_heads(client, present, left)
    parts = [
        part
        for id, head in zip(present, heads, strict=True)
        if isinstance(head, Head)
        for part, _, _ in head.parts(id)
    ]
    # Heads first: from then on nobody finds the parts.
    client.remove(present, deadline_ms=left.left_ms())
    if parts:
        client.remove(parts, deadline_ms=left.left_ms())
    return there


def _read_heads(client: kvar.Client, ids: Sequence[bytes], left: _Time) -> list[Head | str]:
    """The heads of these objects, or why there is none."""
    buffers = [[bytearray(length) for length in _HEAD_LENGTHS] for _ in ids]
    got = client.get(list(zip(ids, buffers, strict=True)), deadline_ms=left.left_ms())
    return [
        (Head.decode(sections) or "wrong_format") if result.outcome == HIT else result.outcome
        for sections, result in zip(buffers, got, strict=True)
    ]
