"""Objects of any length: what is larger than a block is kept in parts that become visible together.

A block has a largest length (``Client.block_bytes_max``; a node says it: 16 MiB, or a quarter of a
segment of its device). Up to there an object is one block under its id, put and read as any other.
Beyond, it is several, none of them under the id itself:

```text
   hash(id, "head") ── head: {layout, part_bytes, total, nonce}     a small block
           │
           ├── part 0   id = hash(id, nonce, 0)   part_bytes        blocks like any other
           ├── part 1   id = hash(id, nonce, 1)   part_bytes
           └── part n   id = hash(id, nonce, n)   what is left
```

What must always be true:

* an object is there when its head is, and a head is written when every part is stored: nobody sees
  half of one;
* parts of two writers never mix: each writer draws a nonce, and the head that won names its own;
* a part that is lost is a miss of the whole object, with the part's reason, until it is put again:
  a put looks whether what is there is whole, and writes it anew where it is not;
* how an object lies is found out, not assumed: a node's largest block changes with its devices;
* bytes are checked as those of every block: by the writer's content check, a part at a time.

What is left open: parts of a writer that came second, or died before its head, are reached by
nobody and leave as everything does that nobody reads. :func:`present_objects` sees heads, no parts.
"""

from __future__ import annotations

import contextlib
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

PLAIN_BYTES = 256 << 10
"""Up to here an object is never in parts: no node's largest block is smaller."""

BLOCK_BYTES_MAX = 16 << 20
"""Beyond this an object is never one block: no node's largest block is larger."""

PARTS_MAX = 1 << 20

# For heads: what the parts leave of a put's deadline.
HEADS_SHARE = 0.1

_HEAD = struct.Struct("<8sHHIQ16s")
_MAGIC = b"kvar-prt"
_LAYOUT = 1

HIT = "hit"
STORED = "stored"
EXISTS = "exists"
ABSENT = "absent"
NOBODYS_ID = bytes(32)

Named = tuple[bytes, "Buffer"]


@dataclass(frozen=True)
class Head:
    """What an object's first block says of its parts."""

    part_bytes: int
    total: int
    nonce: bytes

    @classmethod
    def of(cls, total: int, block_bytes_max: int) -> Head:
        """A new one, of parts that no other head names."""
        return cls(min(block_bytes_max, PART_BYTES_MAX), total, os.urandom(16))

    def encode(self) -> bytes:
        """Its block."""
        return _HEAD.pack(_MAGIC, _LAYOUT, 0, self.part_bytes, self.total, self.nonce)

    @classmethod
    def decode(cls, block: Buffer) -> Head | None:
        """The head in this block; None if it is of no layout known here."""
        magic, layout, spare, part_bytes, total, nonce = _HEAD.unpack(block)
        if (magic, layout, spare) != (_MAGIC, _LAYOUT, 0) or part_bytes == 0 or total == 0:
            return None
        return None if total > part_bytes * PARTS_MAX else cls(part_bytes, total, nonce)

    def parts(self, id: bytes) -> Iterator[tuple[bytes, int, int]]:
        """Id, first and end byte of every part of the object ``id``."""
        for number, first in enumerate(range(0, self.total, self.part_bytes)):
            part = _hashed(id, self.nonce + number.to_bytes(8, "little"))
            yield part, first, min(first + self.part_bytes, self.total)


def _hashed(id: bytes, name: bytes) -> bytes:
    # The id is a keyed hash already: who does not hold the key cannot make these either.
    return hashlib.blake2b(id + name, digest_size=32, person=b"kvar object 1").digest()


def head_id(id: bytes) -> bytes:
    """Where the head of an object in parts lies."""
    return _hashed(id, b"head")


class _Time:
    """What is left of a deadline over several calls."""

    def __init__(self, deadline_ms: float) -> None:
        self._end = time.monotonic() + deadline_ms / 1000

    def left_ms(self) -> int:
        # A call with no time left ends by itself, with the word for it.
        return max(0, int((self._end - time.monotonic()) * 1000))


def _block_bytes_max(client: kvar.Client, left: _Time) -> int | None:
    """The node's largest block; None if no node says."""
    if client.block_bytes_max is None:
        client.present([NOBODYS_ID], deadline_ms=left.left_ms())
    return client.block_bytes_max


def _bytes_of(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def present_objects(client: kvar.Client, ids: Sequence[bytes], *, deadline_ms: int) -> list[bool]:
    """For each object whether it is there.

    Raises:
        kvar.KvarError: nothing seems to be there because nobody could be asked.
    """
    left = _Time(deadline_ms)
    plain, heads = _present(client, ids, left)
    there = [one or other for one, other in zip(plain, heads, strict=True)]
    if ids and not any(there):
        client.lookup([ids[0]], deadline_ms=left.left_ms())
    return there


def _present(
    client: kvar.Client, ids: Sequence[bytes], left: _Time
) -> tuple[list[bool], list[bool]]:
    """Which are there as one block, and which in parts."""
    asked = [*ids, *map(head_id, ids)]
    there = client.present(asked, deadline_ms=left.left_ms())
    return there[: len(ids)], there[len(ids) :]


def put_objects(
    client: kvar.Client,
    objects: Sequence[Named],
    *,
    deadline_ms: int,
    hints: kvar.PutHints | None = None,
    ttl_s: int | None = None,
) -> list[str]:
    """Stores objects of any length; an outcome word for each, as of :meth:`kvar.Client.put`.

    Waits until all have ended, at most ``deadline_ms``. Their order is taken for that of a prompt:
    of what must go, the last go first. An object in parts takes two round trips more, and one of
    which somebody's copy is there costs three, and no transfer.
    """
    left = _Time(deadline_ms)
    most = _block_bytes_max(client, left)
    if most is None:
        return [_why_unknown(left)] * len(objects)
    views = [_bytes_of(buffer) for _, buffer in objects]
    words = [""] * len(objects)
    small = [n for n, view in enumerate(views) if len(view) <= most]
    large = [n for n, view in enumerate(views) if len(view) > most]
    # In parts under an earlier limit, it may be there already.
    maybe = large + [n for n in small if len(views[n]) > PLAIN_BYTES]
    for n, is_there in zip(
        maybe, _whole(client, [objects[n][0] for n in maybe], left), strict=True
    ):
        words[n] = EXISTS if is_there else ""

    def submit(depth: int, id: bytes, data: Buffer, within_ms: int) -> kvar.Pending[list[str]]:
        # A call each: what belongs to one object is worth the same, and its place is its own.
        return client.submit_put(
            [(id, data)], deadline_ms=within_ms, depth=depth, hints=hints, ttl_s=ttl_s
        )

    parts_ms = int(left.left_ms() * (1 - HEADS_SHARE))
    plain = [(n, submit(n, objects[n][0], views[n], parts_ms)) for n in small if not words[n]]
    under_way = []
    for n in large:
        if words[n]:
            continue
        head = Head.of(len(views[n]), most)
        parts = list(head.parts(objects[n][0]))
        puts = [submit(n, part, views[n][first:end], parts_ms) for part, first, end in parts]
        under_way.append((n, head, [part for part, _, _ in parts], puts))
    heads = []
    lost: list[bytes] = []
    for n, head, parts_of, puts in under_way:
        ended = [put.result()[0] for put in puts]
        failed = [word for word in ended if word not in (STORED, EXISTS)]
        if failed:
            words[n] = failed[0]
            lost += parts_of
        else:
            where = head_id(objects[n][0])
            heads.append((n, submit(n, where, head.encode(), left.left_ms())))
    for n, put in plain + heads:
        words[n] = put.result()[0]
    if lost:
        # Nobody will ask for them; if this fails they leave by themselves.
        with contextlib.suppress(kvar.KvarError):
            client.remove(lost, deadline_ms=left.left_ms())
    return words


def _why_unknown(left: _Time) -> str:
    return "unreachable" if left.left_ms() else "deadline"


def _whole(client: kvar.Client, ids: Sequence[bytes], left: _Time) -> list[bool]:
    """Which are there with all that belongs to them; heads without are removed."""
    if not ids:
        return []
    plain, in_parts = _present(client, ids, left)
    there = list(plain)
    asked = [n for n, has_head in enumerate(in_parts) if has_head and not plain[n]]
    heads = _read_heads(client, [ids[n] for n in asked], left)
    parts: list[bytes] = []
    spans: list[tuple[int, int, int]] = []
    broken: list[bytes] = []
    for n, head in zip(asked, heads, strict=True):
        if isinstance(head, Head):
            first = len(parts)
            parts += [part for part, _, _ in head.parts(ids[n])]
            spans.append((n, first, len(parts)))
        elif head == "wrong_format":
            broken.append(head_id(ids[n]))
    found = client.present(parts, deadline_ms=left.left_ms()) if parts else []
    for n, first, end in spans:
        there[n] = all(found[first:end])
        # With no time left nobody was asked: no reason to give up what may be whole.
        if not there[n] and left.left_ms():
            broken.append(head_id(ids[n]))
    if broken:
        with contextlib.suppress(kvar.KvarError):
            client.remove(broken, deadline_ms=left.left_ms())
    return there


def get_objects(client: kvar.Client, objects: Sequence[Named], *, deadline_ms: int) -> list[str]:
    """Reads objects into buffers of their lengths: ``"hit"``, or the reason of a miss, for each.

    Bytes in a buffer count only after ``"hit"``. An object in parts takes one round trip more.
    """
    left = _Time(deadline_ms)
    most = _block_bytes_max(client, left)
    if most is None:
        return [_why_unknown(left)] * len(objects)
    views = [_bytes_of(buffer) for _, buffer in objects]
    words = [ABSENT] * len(objects)
    plain = [n for n, view in enumerate(views) if len(view) <= most]
    parted = [n for n, view in enumerate(views) if len(view) > most]
    _get_plain(client, objects, views, words, plain, left)
    _get_parted(client, objects, views, words, parted, left)
    # As it would lie under another limit: of a node that has other devices now.
    other = [n for n in plain if words[n] == ABSENT and len(views[n]) > PLAIN_BYTES]
    _get_parted(client, objects, views, words, other, left)
    other = [n for n in parted if words[n] == ABSENT and len(views[n]) <= BLOCK_BYTES_MAX]
    _get_plain(client, objects, views, words, other, left)
    return words


def _get_plain(
    client: kvar.Client,
    objects: Sequence[Named],
    views: Sequence[memoryview],
    words: list[str],
    which: Sequence[int],
    left: _Time,
) -> None:
    if not which:
        return
    items = [(objects[n][0], views[n]) for n in which]
    for n, result in zip(which, client.get(items, deadline_ms=left.left_ms()), strict=True):
        words[n] = result.outcome


def _get_parted(
    client: kvar.Client,
    objects: Sequence[Named],
    views: Sequence[memoryview],
    words: list[str],
    which: Sequence[int],
    left: _Time,
) -> None:
    if not which:
        return
    blocks: list[tuple[bytes, memoryview]] = []
    owners: list[int] = []
    heads = _read_heads(client, [objects[n][0] for n in which], left)
    for n, head in zip(which, heads, strict=True):
        if isinstance(head, str):
            words[n] = head
        elif head.total != len(views[n]):
            words[n] = "wrong_format"
        else:
            words[n] = HIT
            for part, first, end in head.parts(objects[n][0]):
                blocks.append((part, views[n][first:end]))
                owners.append(n)
    got = client.get(blocks, deadline_ms=left.left_ms()) if blocks else []
    for n, result in zip(owners, got, strict=True):
        # Of several parts the first that misses says why.
        if words[n] == HIT:
            words[n] = result.outcome


def remove_objects(client: kvar.Client, ids: Sequence[bytes], *, deadline_ms: int) -> list[bool]:
    """Removes objects of any length, safe against power loss; for each whether it was there.

    Raises:
        kvar.KvarError: nobody could be asked, or it was not done in time.
    """
    left = _Time(deadline_ms)
    plain, in_parts = _present(client, ids, left)
    gone = [id for id, is_there in zip(ids, plain, strict=True) if is_there]
    with_heads = [id for id, is_there in zip(ids, in_parts, strict=True) if is_there]
    if not gone and not with_heads:
        if ids:
            client.lookup([ids[0]], deadline_ms=left.left_ms())
        return [False] * len(ids)
    heads = _read_heads(client, with_heads, left)
    # Heads first: from then on nobody finds the parts.
    client.remove(gone + [head_id(id) for id in with_heads], deadline_ms=left.left_ms())
    parts = [
        part
        for id, head in zip(with_heads, heads, strict=True)
        if isinstance(head, Head)
        for part, _, _ in head.parts(id)
    ]
    if parts:
        # They are out of reach; what is not removed leaves by itself.
        with contextlib.suppress(kvar.KvarError):
            client.remove(parts, deadline_ms=left.left_ms())
    return [one or other for one, other in zip(plain, in_parts, strict=True)]


def _read_heads(client: kvar.Client, ids: Sequence[bytes], left: _Time) -> list[Head | str]:
    """The heads of these objects, or why there is none."""
    if not ids:
        return []
    buffers = [bytearray(_HEAD.size) for _ in ids]
    items = list(zip(map(head_id, ids), buffers, strict=True))
    got = client.get(items, deadline_ms=left.left_ms())
    return [
        (Head.decode(block) or "wrong_format") if result.outcome == HIT else result.outcome
        for block, result in zip(buffers, got, strict=True)
    ]
