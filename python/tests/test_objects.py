"""Objects of any length against a real node."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from conftest import Node

import kvar
from kvar import objects
from kvar.objects import get_objects, present_objects, put_objects, remove_objects

Name = Callable[[object], bytes]

DEADLINE_MS = 30_000


def put(client: kvar.Client, *items: tuple[bytes, bytes]) -> list[str]:
    return put_objects(client, items, deadline_ms=DEADLINE_MS)


def get(client: kvar.Client, id: bytes, length: int) -> tuple[str, bytes]:
    buffer = bytearray(length)
    (word,) = get_objects(client, [(id, buffer)], deadline_ms=DEADLINE_MS)
    return word, bytes(buffer)


def head_of(client: kvar.Client, id: bytes) -> objects.Head:
    (head,) = objects._read_heads(client, [id], objects._Time(DEADLINE_MS))
    assert isinstance(head, objects.Head)
    return head


def test_objects_of_all_lengths_come_back(client: kvar.Client, name: Name) -> None:
    most = client.block_bytes_max
    assert most is not None
    chance = random.Random(1)
    for length in (1, 56, 4096, most - 1, most, most + 1, 2 * most, 5 * most + 4097):
        data = chance.randbytes(length)
        id = name(length)
        assert put(client, (id, data)) == ["stored"]
        assert get(client, id, length) == ("hit", data)
        assert present_objects(client, [id], deadline_ms=DEADLINE_MS) == [True]
        # A second writer's bytes are of no use: the first are there.
        assert put(client, (id, os.urandom(length))) == ["exists"]
        assert get(client, id, length) == ("hit", data)


def test_a_batch_of_large_and_small_ones_keeps_its_order(client: kvar.Client, name: Name) -> None:
    most = client.block_bytes_max or 0
    lengths = [10, 3 * most, most, 2 * most + 1, 0x1000]
    data = [os.urandom(length) for length in lengths]
    ids = [name(n) for n in range(len(lengths))]
    assert put(client, *zip(ids, data, strict=True)) == ["stored"] * len(ids)
    buffers = [bytearray(length) for length in lengths]
    wanted = list(zip(ids, buffers, strict=True))
    wanted.insert(2, (name("nobody's"), bytearray(2 * most)))
    wanted.insert(4, (name("nobody's, small"), bytearray(5)))
    words = get_objects(client, wanted, deadline_ms=DEADLINE_MS)
    assert words == ["hit", "hit", "absent", "hit", "absent", "hit", "hit"]
    assert [bytes(buffer) for buffer in buffers] == data


def test_another_length_is_no_hit(client: kvar.Client, name: Name) -> None:
    most = client.block_bytes_max or 0
    put(client, (name(1), os.urandom(3 * most)), (name(2), b"small"))
    assert get(client, name(1), 3 * most + 1)[0] == "wrong_format"
    # So small a one is never in parts: nobody looks for any.
    assert get(client, name(1), 4)[0] == "absent"
    assert get(client, name(2), 2 * most)[0] == "wrong_format"


def test_a_lost_part_is_a_miss_of_the_whole(client: kvar.Client, name: Name) -> None:
    most = client.block_bytes_max or 0
    data = os.urandom(4 * most)
    assert put(client, (name(1), data)) == ["stored"]
    parts = [part for part, _, _ in head_of(client, name(1)).parts(name(1))]
    client.remove([parts[1]])
    word, _ = get(client, name(1), len(data))
    assert word in ("absent", "removed")
    # The next put finds out, and writes all of it anew.
    assert put(client, (name(1), data)) == ["stored"]
    assert get(client, name(1), len(data)) == ("hit", data)
    assert put(client, (name(1), data)) == ["exists"]


def test_nobody_sees_an_object_whose_writer_died_before_its_head(
    client: kvar.Client, name: Name
) -> None:
    most = client.block_bytes_max or 0
    data = os.urandom(2 * most)
    head = objects.Head.of(len(data), most)
    client.put([(part, data[first:end]) for part, first, end in head.parts(name(1))])
    assert present_objects(client, [name(1)], deadline_ms=DEADLINE_MS) == [False]
    assert get(client, name(1), len(data))[0] == "absent"
    # The next writer is not in its way.
    assert put(client, (name(1), data)) == ["stored"]
    assert get(client, name(1), len(data)) == ("hit", data)


def test_parts_of_two_writers_never_mix(client: kvar.Client, name: Name) -> None:
    most = client.block_bytes_max or 0
    first, second = os.urandom(3 * most), os.urandom(3 * most)
    # Two writers whose parts are all there; then one head wins.
    heads = [objects.Head.of(3 * most, most) for _ in range(2)]
    for head, data in zip(heads, (first, second), strict=True):
        blocks = [(part, data[begin:end]) for part, begin, end in head.parts(name(1))]
        assert set(client.put(blocks)) == {"stored"}
    where = objects.head_id(name(1))
    assert client.put([(where, heads[1].encode())]) == ["stored"]
    assert client.put([(where, heads[0].encode())]) == ["exists"]
    assert get(client, name(1), 3 * most) == ("hit", second)


def test_what_is_removed_leaves_with_its_parts(client: kvar.Client, name: Name) -> None:
    most = client.block_bytes_max or 0
    put(client, (name(1), os.urandom(3 * most)), (name(2), b"small"))
    parts = [part for part, _, _ in head_of(client, name(1)).parts(name(1))]
    ids = [name(1), name("nobody's"), name(2)]
    assert remove_objects(client, ids, deadline_ms=DEADLINE_MS) == [True, False, True]
    left = [*ids, *parts, objects.head_id(name(1))]
    assert client.present(left) == [False] * len(left)
    assert remove_objects(client, ids, deadline_ms=DEADLINE_MS) == [False] * 3


@pytest.mark.parametrize(
    "block",
    [
        objects._HEAD.pack(b"kvar-prt", 2, 0, 1 << 20, 1 << 22, bytes(16)),  # Of tomorrow.
        objects._HEAD.pack(b"kvar-prt", 1, 0, 0, 1 << 22, bytes(16)),  # Parts of no bytes.
        objects._HEAD.pack(b"kvar-prt", 1, 0, 1, 1 << 40, bytes(16)),  # Too many parts.
        objects._HEAD.pack(b"somethin", 1, 0, 1 << 20, 1 << 22, bytes(16)),
    ],
)
def test_a_head_that_is_none_is_the_wrong_format_until_it_is_put_again(
    client: kvar.Client, name: Name, block: bytes
) -> None:
    assert client.put([(objects.head_id(name(1)), block)]) == ["stored"]
    data = os.urandom(3 * (client.block_bytes_max or 0))
    assert get(client, name(1), len(data))[0] == "wrong_format"
    assert put(client, (name(1), data)) == ["stored"]
    assert get(client, name(1), len(data)) == ("hit", data)


def test_what_was_stored_under_another_limit_is_found(client: kvar.Client, name: Name) -> None:
    most = client.block_bytes_max or 0
    # As a node of smaller segments would have had it: in parts, although it is one block here.
    data = os.urandom(most)
    head = objects.Head.of(most, most // 4)
    blocks = [(part, data[first:end]) for part, first, end in head.parts(name(1))]
    client.put([*blocks, (objects.head_id(name(1)), head.encode())])
    assert get(client, name(1), most) == ("hit", data)
    assert put(client, (name(1), data)) == ["exists"]


def test_a_client_that_has_not_connected_yet_splits_as_the_node_wants(
    node: Node, name: Name
) -> None:
    with node.client(lazy=True) as client:
        assert client.block_bytes_max is None
        with node.client() as other:
            data = os.urandom(2 * (other.block_bytes_max or 0))
        assert put(client, (name(1), data)) == ["stored"]
        assert get(client, name(1), len(data)) == ("hit", data)


def test_a_node_that_is_gone_ends_every_call_with_a_word(own_node: Node) -> None:
    with own_node.client(deadline_ms=500) as client:
        most = client.block_bytes_max or 0
        own_node.kill()
        large = (bytes(32), bytearray(3 * most))
        assert put_objects(client, [large], deadline_ms=500)[0] in ("unreachable", "deadline")
        assert get_objects(client, [large], deadline_ms=500)[0] in ("unreachable", "deadline")
