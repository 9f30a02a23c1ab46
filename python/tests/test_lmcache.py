"""The LMCache door, as LMCache's native_plugin adapter drives it; and by it, where it is there."""

from __future__ import annotations

import importlib
import logging
import os
import select
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from conftest import Node, until

import kvar
from kvar import lmcache, objects

Key = Callable[[object], str]


@pytest.fixture
def door(node: Node) -> Iterator[lmcache.Client]:
    door = lmcache.Client(node.endpoint, key_file=node.key_file)
    yield door
    door.close()


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Log lines reach the test although LMCache, once imported, keeps them to itself."""
    log = logging.getLogger("lmcache.kvar")
    log.addHandler(caplog.handler)
    log.propagate = False
    yield
    log.removeHandler(caplog.handler)
    log.propagate = True


@pytest.fixture
def key(request: pytest.FixtureRequest) -> Key:
    """Keys as LMCache makes them, that no other test uses."""
    return lambda part: f"/models/m@01000100@0@{request.node.name}{part}".replace("[", "").replace(
        "]", ""
    )


def ended(door: lmcache.Client, number: int, seconds: float = 30) -> lmcache.Completion:
    """Waits for a batch as LMCache does: for the eventfd, then drains."""
    poller = select.poll()
    poller.register(door.event_fd(), select.POLLIN)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not poller.poll(100):
            continue
        for completion in door.drain_completions():
            assert completion[0] == number
            return completion
    raise AssertionError("the batch did not end")


def view(data: bytes | bytearray) -> memoryview:
    return memoryview(bytearray(data))


def test_what_is_stored_is_found_loaded_and_deleted(door: lmcache.Client, key: Key) -> None:
    data = [os.urandom(300_000), os.urandom(1), os.urandom(7_000_000)]
    keys = [key(n) for n in range(3)]
    assert ended(door, door.submit_batch_exists(keys))[3] == [False] * 3
    stored = ended(door, door.submit_batch_set(keys, [view(d) for d in data]))
    assert stored[1:] == (True, "", [True] * 3)
    asked = [keys[2], key("nobody's"), keys[0]]
    assert ended(door, door.submit_batch_exists(asked))[3] == [True, False, True]
    into = [view(bytes(len(data[2]))), view(bytes(10)), view(bytes(len(data[0])))]
    loaded = ended(door, door.submit_batch_get(asked, into))
    assert loaded[1:] == (True, "", [True, False, True])
    assert (bytes(into[0]), bytes(into[2])) == (data[2], data[0])
    assert ended(door, door.submit_batch_delete(asked))[3] == [True, False, True]
    assert ended(door, door.submit_batch_exists(keys))[3] == [False, True, False]
    stats = door.stats()
    assert (stats.stored, stats.loaded, stats.missed, stats.removed) == (3, 2, 1, 2)
    assert stats.loaded_bytes == len(data[0]) + len(data[2])


def test_storing_again_is_well(door: lmcache.Client, key: Key) -> None:
    for _ in range(2):
        stored = ended(door, door.submit_batch_set([key(1)], [view(b"the same")]))
        assert stored[1:] == (True, "", [True])
    assert door.stats().existed == 1


def test_a_chunk_that_lost_a_part_is_stored_again(
    node: Node, door: lmcache.Client, key: Key, client: kvar.Client
) -> None:
    data = os.urandom(3 * (client.block_bytes_max or 0))
    assert ended(door, door.submit_batch_set([key(1)], [view(data)]))[1]
    id = door._id(key(1))
    (head,) = objects._read_heads(client, [id], objects._Time(10_000))
    assert isinstance(head, objects.Head)
    parts = [part for part, _, _ in head.parts(id)]
    client.remove(parts[1:2])
    assert ended(door, door.submit_batch_get([key(1)], [view(bytes(len(data)))]))[3] == [False]
    assert ended(door, door.submit_batch_set([key(1)], [view(data)]))[1]
    into = view(bytes(len(data)))
    assert ended(door, door.submit_batch_get([key(1)], [into]))[3] == [True]
    assert bytes(into) == data


def test_another_length_or_fingerprint_is_not_loaded(
    node: Node, door: lmcache.Client, key: Key
) -> None:
    ended(door, door.submit_batch_set([key(1)], [view(b"as bfloat16")]))
    assert ended(door, door.submit_batch_get([key(1)], [view(bytes(5))]))[3] == [False]
    assert door.stats().reasons == {"wrong_format": 1}
    other = lmcache.Client(node.endpoint, key_file=node.key_file, fingerprint="float16")
    try:
        assert ended(other, other.submit_batch_get([key(1)], [view(bytes(11))]))[3] == [False]
        assert other.stats().reasons == {"absent": 1}
    finally:
        other.close()


def test_many_batches_end_each_once(door: lmcache.Client, key: Key) -> None:
    keys = [key(n) for n in range(50)]
    numbers = {door.submit_batch_set([k], [view(k.encode())]) for k in keys}
    over: list[int] = []

    def all_ended() -> bool:
        over.extend(completion[0] for completion in door.drain_completions())
        return len(over) >= len(numbers)

    until(all_ended)
    assert sorted(over) == sorted(numbers)
    into = [view(bytes(len(k))) for k in keys]
    assert ended(door, door.submit_batch_get(keys, into))[3] == [True] * 50
    assert [bytes(buffer).decode() for buffer in into] == keys


def test_a_node_that_dies_and_returns_costs_misses_and_two_lines(
    own_node: Node, key: Key, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmcache.kvar")
    door = lmcache.Client(
        own_node.endpoint, key_file=own_node.key_file, deadline_ms=1_000, lookup_deadline_ms=300
    )
    try:
        data = os.urandom(100_000)
        assert ended(door, door.submit_batch_set([key(1)], [view(data)]))[1]
        own_node.stop()
        for _ in range(5):
            loaded = ended(door, door.submit_batch_get([key(1)], [view(bytes(len(data)))]))
            assert loaded[3] == [False]
            stored = ended(door, door.submit_batch_set([key(2)], [view(data)]))
            assert (stored[1], stored[3]) == (False, [False])
            assert "1 of 1 not stored" in stored[2]
        away = [record for record in caplog.records if "does not serve" in record.message]
        assert len(away) == 1
        own_node.start()

        def is_back() -> bool:
            buffer = view(bytes(len(data)))
            hit = ended(door, door.submit_batch_get([key(1)], [buffer]))[3] == [True]
            return hit and bytes(buffer) == data

        until(is_back)
        assert any("serves again" in record.message for record in caplog.records)
    finally:
        door.close()


def test_a_node_that_comes_later_is_found(
    own_node: Node, key: Key, caplog: pytest.LogCaptureFixture
) -> None:
    own_node.stop()
    door = lmcache.Client(own_node.endpoint, key_file=own_node.key_file, deadline_ms=1_000)
    try:
        assert "not reachable" in caplog.text
        assert ended(door, door.submit_batch_exists([key(1)]))[3] == [False]
        own_node.start()
        until(lambda: ended(door, door.submit_batch_set([key(1)], [view(b"x")]))[1])
    finally:
        door.close()


def test_a_mute_node_holds_nobody_up_beyond_the_deadline(own_node: Node, key: Key) -> None:
    door = lmcache.Client(
        own_node.endpoint, key_file=own_node.key_file, deadline_ms=400, lookup_deadline_ms=400
    )
    own_node.pause()
    try:
        begun = time.monotonic()
        # More than there are workers: what waits for its turn ends by its deadline, too.
        numbers = []
        for n in range(20):
            numbers.append(door.submit_batch_get([key(n)], [view(bytes(9))]))
            numbers.append(door.submit_batch_set([key(n)], [view(bytes(9))]))
            numbers.append(door.submit_batch_exists([key(n)]))
            numbers.append(door.submit_batch_delete([key(n)]))
        over: list[lmcache.Completion] = []

        def all_ended() -> bool:
            over.extend(door.drain_completions())
            return len(over) == len(numbers)

        until(all_ended)
        assert not any(any(each or ()) for _, _, _, each in over)
        assert time.monotonic() - begun < 10
    finally:
        own_node.resume()
        door.close()


def test_closing_ends_what_is_under_way_and_twice_is_fine(node: Node, key: Key) -> None:
    door = lmcache.Client(node.endpoint, key_file=node.key_file)
    numbers = [door.submit_batch_set([key(n)], [view(b"x" * 1000)]) for n in range(20)]
    door.close()
    door.close()
    ended = door.drain_completions()
    assert sorted(completion[0] for completion in ended) == numbers
    assert all(ok or error == "kvar is closing" for _, ok, error, _ in ended)
    with pytest.raises(kvar.RequestError, match="closed"):
        door.submit_batch_exists([key(1)])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 0}, "workers is 0; give 1 to 64"),
        ({"deadline_ms": "soon"}, "deadline_ms is 'soon'"),
        ({"key": "00", "key_file": None}, "64 hex"),
        ({"key": "00" * 32}, "either"),
        ({"namespace": "no such"}, "no such"),
        ({"link": "carrier pigeon"}, "link"),
        ({"key_file": None}, "key_file"),
    ],
)
def test_what_makes_no_sense_is_said_at_the_start(
    node: Node, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(kvar.KvarError, match=words):
        lmcache.Client(node.endpoint, **({"key_file": node.key_file} | settings))  # type: ignore[arg-type]


def test_a_wrong_key_is_said_at_the_start(node: Node) -> None:
    with pytest.raises(kvar.WrongKeyError):
        lmcache.Client(node.endpoint, key="11" * 32)


def test_an_untried_lmcache_is_said_once_and_runs_without_the_store(
    node: Node, key: Key, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "0.7.1")
    door = lmcache.Client(node.endpoint, key_file=node.key_file)
    try:
        assert "off: LMCache 0.7.1 is not among those it is made for" in caplog.text
        assert "(from 0.5.6, before 0.6.0)" in caplog.text
        assert ended(door, door.submit_batch_set([key(1)], [view(b"x")]))[1] is False
        assert ended(door, door.submit_batch_exists([key(1)]))[3] == [False]
    finally:
        door.close()
    door = lmcache.Client(node.endpoint, key_file=node.key_file, any_version=True)
    try:
        assert ended(door, door.submit_batch_set([key(1)], [view(b"x")]))[1]
    finally:
        door.close()


def test_lmcaches_own_adapter_finds_and_drives_it(node: Node, tmp_path: Path) -> None:
    # Where LMCache must be (e2e/lmcache.sh says so), its absence is no reason to skip.
    if "KVAR_NEEDS_LMCACHE" not in os.environ:
        pytest.importorskip("lmcache")
    factory = importlib.import_module("lmcache.v1.distributed.l2_adapters.native_plugin_l2_adapter")
    api = importlib.import_module("lmcache.v1.distributed.api")
    memory = importlib.import_module("lmcache.v1.memory_management")
    torch = importlib.import_module("torch")
    config = factory.NativePluginL2AdapterConfig.from_dict(
        {
            "type": "native_plugin",
            "module_path": "kvar.lmcache",
            "class_name": "Client",
            "adapter_params": {"endpoint": node.endpoint, "key_file": str(node.key_file)},
        }
    )
    adapter = factory._create_native_plugin_l2_adapter(config)
    try:
        shape = torch.Size([2, 18, 64, 256])

        def tensor_object() -> object:
            raw = torch.randn(shape)
            meta = memory.MemoryObjMetadata(
                shape, torch.float32, 0, raw.numel() * 4, 1, fmt=memory.MemoryFormat.KV_2LTD
            )
            return memory.TensorMemoryObj(raw.view(torch.uint8).flatten(), meta, None)

        keys = [api.ObjectKey(os.urandom(32), str(tmp_path), 0x01000100) for _ in range(3)]
        objects = [tensor_object() for _ in keys]
        task = adapter.submit_store_task(keys, objects)
        until(lambda: task in adapter.pop_completed_store_tasks())
        loaded = [tensor_object() for _ in keys]
        task = adapter.submit_load_task(keys, loaded)
        results: list[object] = []

        def has_loaded() -> bool:
            results.append(adapter.query_load_result(task))
            return results[-1] is not None

        until(has_loaded)
        assert results[-1].popcount() == len(keys)  # type: ignore[attr-defined]
        for one, other in zip(objects, loaded, strict=True):
            assert torch.equal(one.raw_data, other.raw_data)  # type: ignore[attr-defined]
    finally:
        adapter.close()
