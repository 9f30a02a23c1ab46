"""Memory that the node writes to: whose it is, when, and what is where there is none."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import OWN_STORE_SIZE, Node, node_in, until

import kvar

Name = Callable[[object], bytes]

REGION = 8 << 20
PIECE = 70_000


def data_of(name: bytes, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def put(client: kvar.Client, *names: bytes, size: int = PIECE) -> None:
    assert client.put([(name, data_of(name, size)) for name in names]) == ["stored"] * len(names)


def words(results: list[kvar.GetResult]) -> list[str]:
    return [result.outcome for result in results]


@pytest.fixture
def staged(node: Node) -> Iterator[kvar.Client]:
    with node.client(staging=REGION) as client:
        assert (client.staging_bytes, client.not_staged) == (REGION, None)
        yield client


def test_the_node_writes_where_a_get_is_looked_at(staged: kvar.Client, name: Name) -> None:
    put(staged, name(1), name(2))
    buffer = staged.staging(PIECE)
    assert (len(buffer), buffer.nbytes, buffer.shared, buffer.in_use) == (PIECE, PIECE, True, False)
    assert repr(buffer) == f"StagingBuffer({PIECE} bytes, shared)"
    # As it is, again and again.
    for number, block in enumerate((name(1), name(2), name(1)), start=1):
        assert words(staged.get([(block, buffer)])) == ["hit"]
        assert bytes(buffer) == data_of(block, PIECE)
        assert (staged.hits_placed, buffer.in_use) == (number, False)
    # What is there goes out again as from any buffer.
    assert staged.put([(name("copy"), buffer)]) == ["stored"]
    assert staged.get_bytes(name("copy")) == data_of(name(1), PIECE)
    # A miss leaves it the caller's.
    assert words(staged.get([(name("absent"), buffer)])) == ["absent"]
    view = memoryview(buffer)
    view[:4] = b"mine"
    assert bytes(buffer)[:4] == b"mine"


def test_views_of_a_buffer_are_destinations_too(staged: kvar.Client, name: Name) -> None:
    names = [name(n) for n in range(8)]
    put(staged, *names)
    buffer = staged.staging(PIECE * 8 + 200)
    view = memoryview(buffer)
    view[:] = b"\xa5" * len(view)
    places = [view[100 + n * PIECE : 100 + (n + 1) * PIECE] for n in range(8)]
    assert words(staged.get(list(zip(names, places, strict=True)))) == ["hit"] * 8
    assert [bytes(place) for place in places] == [data_of(one, PIECE) for one in names]
    assert staged.hits_placed == 8
    assert bytes(view[:100]) == bytes(view[-100:]) == b"\xa5" * 100
    # Pages of layers: side by side they are one place, strewn they are filled on this side.
    layer, page = memoryview(bytearray(data_of(name("l"), 40_000))), 10_000
    assert staged.put_pages([name("p")], [layer[:20_000], layer[20_000:]], [1], page) == ["stored"]
    expected = [bytes(layer[page : 2 * page]), bytes(layer[3 * page :])]
    sides = [view[:page], view[page : 2 * page]]
    assert words(staged.get_pages([name("p")], sides, [0], page)) == ["hit"]
    assert ([bytes(side) for side in sides], staged.hits_placed) == (expected, 9)
    strewn = [view[: 4 * page], view[5 * page : 9 * page]]
    assert words(staged.get_pages([name("p")], strewn, [2], page)) == ["hit"]
    assert [bytes(one[2 * page : 3 * page]) for one in strewn] == expected
    assert staged.hits_placed == 9
    beside = bytearray(page)
    assert words(staged.get_pages([name("p")], [view[:page], beside], [0], page)) == ["hit"]
    assert [bytes(view[:page]), bytes(beside)] == expected
    # Layer by layer each section is a place of its own.
    page = 40_000
    assert staged.put_pages([name("q")], [layer, layer], [0], page) == ["stored"]
    strewn = [view[: 2 * page], view[5 * page : 7 * page]]
    get = staged.submit_get_layers([name("q")], strewn, [1], page)
    assert get.result() == ["hit"]
    assert [bytes(one[page:]) for one in strewn] == [bytes(layer)] * 2
    assert (staged.hits_placed, buffer.in_use) == (11, False)


def test_memory_lives_as_long_as_a_view_or_a_get(staged: kvar.Client, name: Name) -> None:
    put(staged, name(1))
    buffer = staged.staging(REGION)
    gone = weakref.ref(buffer)
    view = memoryview(buffer)[:PIECE]
    del buffer
    gc.collect()
    assert gone() is not None
    # All of the region is held by that view: there is no room beside it.
    assert not staged.staging(1).shared
    assert words(staged.get([(name(1), view)])) == ["hit"]
    assert (view == data_of(name(1), PIECE), staged.hits_placed) == (True, 1)
    view.release()
    gc.collect()
    assert gone() is None
    assert staged.staging(REGION).shared
    # A get that nobody looks after holds its place until it has ended.
    for _ in range(50):
        staged.submit_get([(name(1), memoryview(staged.staging(REGION))[5 : 5 + PIECE])])
        until(lambda: staged.staging(REGION).shared)
    # And a view outlives its client.
    kept = staged.staging(PIECE)
    assert words(staged.get([(name(1), kept)])) == ["hit"]
    staged.close()
    assert not kept.shared
    assert bytes(kept) == data_of(name(1), PIECE)


def test_a_place_is_of_one_get_at_a_time(own_node: Node) -> None:
    block = kvar.id_from_name(own_node.key, "block")
    with own_node.client(staging=REGION) as client:
        put(client, block)
        buffer = client.staging(2 * PIECE)
        view = memoryview(buffer)
        own_node.pause()
        pending = client.submit_get([(block, view[:PIECE])])
        with pytest.raises(BufferError, match="under way"):
            client.submit_get([(block, view[PIECE - 1 : 2 * PIECE - 1])])
        beside = client.submit_get([(block, view[PIECE:])])
        # What was refused as a whole holds nothing back.
        with pytest.raises(BufferError, match="in_use"):
            client.submit_get([(block, client.staging(PIECE)), (block, view[:PIECE])])
        assert buffer.in_use
        own_node.resume()
        assert words(pending.result() + beside.result()) == ["hit", "hit"]
        assert not buffer.in_use
        assert view[:PIECE] == view[PIECE:] == data_of(block, PIECE)


def test_after_a_deadline_a_place_is_held_until_the_node_is_done(own_node: Node) -> None:
    block = kvar.id_from_name(own_node.key, "block")
    with own_node.client(staging=REGION) as client:
        put(client, block)
        buffer = client.staging(PIECE)
        own_node.pause()
        assert words(client.get([(block, buffer)], deadline_ms=100)) == ["deadline"]
        assert buffer.in_use
        with pytest.raises(BufferError, match="may still write"):
            client.get([(block, buffer)])
        # Another one is had meanwhile, and not in its place.
        other = client.staging(PIECE)
        own_node.resume()
        until(lambda: words(client.get([(block, other)])) == ["hit"] and not buffer.in_use)
        assert words(client.get([(block, buffer)])) == ["hit"]
        assert bytes(buffer) == bytes(other) == data_of(block, PIECE)


def test_a_place_of_a_link_that_broke_is_not_used_again(own_node: Node) -> None:
    block = kvar.id_from_name(own_node.key, "block")
    with own_node.client(staging=REGION, connect_timeout_ms=500) as client:
        assert client.put([(block, data_of(block, PIECE))], durable=True) == ["stored"]
        kept, given_up = client.staging(PIECE), client.staging(PIECE)
        assert words(client.get([(block, kept)])) == ["hit"]
        own_node.pause()
        pending = client.submit_get([(block, given_up)])
        own_node.kill()
        assert words(pending.result()) == ["unreachable"]
        assert (kept.shared, kept.in_use, given_up.in_use) == (False, False, True)
        assert bytes(kept) == data_of(block, PIECE)
        own_node.start()
        until(lambda: client.get_bytes(block) is not None and client.staging_bytes == REGION)
        # What was nobody's when the link broke is memory all the same, filled by a copy.
        placed = client.hits_placed
        memoryview(kept)[:] = bytes(PIECE)
        assert words(client.get([(block, kept)])) == ["hit"]
        assert (bytes(kept) == data_of(block, PIECE), client.hits_placed) == (True, placed)
        with pytest.raises(BufferError):
            client.get([(block, given_up)])
        fresh = client.staging(PIECE)
        assert words(client.get([(block, fresh)])) == ["hit"]
        assert (fresh.shared, client.hits_placed) == (True, placed + 1)


def same_without_a_region(client: kvar.Client, name: Name, why: str | None) -> None:
    put(client, name(why))
    assert client.staging_bytes == 0
    if why is None:
        assert client.not_staged is None
    else:
        assert why in (client.not_staged or "")
    buffer = client.staging(PIECE)
    assert (buffer.shared, buffer.nbytes, bytes(buffer)) == (False, PIECE, bytes(PIECE))
    assert words(client.get([(name(why), memoryview(buffer))])) == ["hit"]
    assert (bytes(buffer) == data_of(name(why), PIECE), client.hits_placed) == (True, 0)
    assert repr(buffer) == f"StagingBuffer({PIECE} bytes, private)"
    assert len(client.staging(0)) == 0


def test_without_a_region_the_same_gets_go_to_plain_memory(
    node: Node, name: Name, tmp_path: Path
) -> None:
    with node.client() as client:
        same_without_a_region(client, name, None)
    with node.client(staging=REGION, link="tcp") as client:
        same_without_a_region(client, name, "shares no memory")
    with node.client(staging=1 << 40) as client:
        same_without_a_region(client, name, "too many")
    with pytest.raises(kvar.ConfigError, match="multiple of 4096"):
        node.client(staging=1000)
    own = node_in(tmp_path, OWN_STORE_SIZE, "--shared-memory-staging", "0")
    try:
        own.start()
        with own.client(staging=REGION) as client:
            same_without_a_region(client, name, "shared_memory_staging = 0")
    finally:
        own.end()


def test_places_of_many_threads_are_each_their_own(staged: kvar.Client, name: Name) -> None:
    names = [name(n) for n in range(32)]
    put(staged, *names)
    for _ in range(20):
        buffers = [staged.staging(PIECE) for _ in names]
        gets = [staged.submit_get([pair]) for pair in zip(names, buffers, strict=True)]
        assert words([get.result()[0] for get in gets]) == ["hit"] * 32
        assert [bytes(buffer) for buffer in buffers] == [data_of(one, PIECE) for one in names]
    assert staged.hits_placed == 640


# The client that is killed: it asks for as much as it can, for ever, and says when it has begun.
GREEDY = """
import sys, kvar
endpoint, key_file = sys.argv[1:]
client = kvar.Client(endpoint, key_file=key_file, staging=8 << 20, deadline_ms=60_000)
key = kvar.NamespaceKey.from_file(key_file)
block = kvar.id_from_name(key, "block")
buffers = [client.staging(70_000) for _ in range(100)]
assert all(buffer.shared for buffer in buffers)
gets = [client.submit_get([(block, buffer)]) for buffer in buffers]
print("begun", flush=True)
while True:
    for n, buffer in enumerate(buffers):
        gets[n].result()
        gets[n] = client.submit_get([(block, buffer)])
"""


def test_a_client_killed_with_gets_under_way_leaves_its_region_to_others(own_node: Node) -> None:
    block = kvar.id_from_name(own_node.key, "block")
    with own_node.client() as client:
        put(client, block)

        def staging() -> int:
            return int(client.status()["links"]["staging_bytes"])

        for _ in range(5):
            command = [sys.executable, "-c", GREEDY, own_node.endpoint, str(own_node.key_file)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as greedy:
                try:
                    assert greedy.stdout is not None
                    assert greedy.stdout.readline() == b"begun\n"
                    assert staging() == REGION
                    # Others are served meanwhile, and after.
                    assert client.get_bytes(block) == data_of(block, PIECE)
                finally:
                    greedy.kill()
            assert client.get_bytes(block) == data_of(block, PIECE)
            until(lambda: staging() == 0)


def test_numpy_and_torch_look_into_it(staged: kvar.Client, name: Name) -> None:
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    source = torch.arange(20_000, dtype=torch.float32)
    assert staged.put([(name(1), source.numpy())]) == ["stored"]
    buffer = staged.staging(2 * 80_000)
    tensor = torch.frombuffer(buffer, dtype=torch.float32).view(2, 20_000)
    array = numpy.frombuffer(buffer, dtype=numpy.float32).reshape(2, 20_000)
    del buffer
    gc.collect()
    assert words(staged.get([(name(1), tensor[1].numpy()), (name(1), array[0])])) == ["hit", "hit"]
    assert staged.hits_placed == 2
    assert torch.equal(tensor, source.expand(2, -1))
    assert numpy.array_equal(array[0], source.numpy())
