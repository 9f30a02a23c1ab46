"""The client against a real node."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import Node, until

import kvar

Name = Callable[[object], bytes]


def outcomes(results: list[kvar.GetResult]) -> list[str]:
    return [result.outcome for result in results]


def test_what_is_put_comes_back(client: kvar.Client, name: Name) -> None:
    data = bytes(range(256)) * 300
    assert client.put([(name(1), data)]) == ["stored"]
    buffer = bytearray(len(data))
    (result,) = client.get([(name(1), buffer)])
    assert (result.outcome, result.bytes, bytes(buffer)) == ("hit", len(data), data)
    assert client.get_bytes(name(1)) == data
    assert client.put([(name(1), b"other bytes")]) == ["exists"]
    assert client.get_bytes(name(1)) == data


def test_a_block_with_a_time_to_live_ends(client: kvar.Client, name: Name) -> None:
    assert client.put([(name(1), b"short")], ttl_s=1) == ["stored"]
    assert client.put([(name(2), b"long")], ttl_s=3600) == ["stored"]
    assert client.get_bytes(name(1)) == b"short"
    until(lambda: client.get_bytes(name(1)) is None)
    buffer = bytearray(5)
    assert outcomes(client.get([(name(1), buffer)])) == ["expired"]
    assert client.get_bytes(name(2)) == b"long"
    with pytest.raises(kvar.RequestError, match="ttl_s is 0"):
        client.put([(name(3), b"never")], ttl_s=0)


def test_what_was_never_put_is_absent(client: kvar.Client, name: Name) -> None:
    buffer = bytearray(b"mine")
    (result,) = client.get([(name(1), buffer)])
    assert (result.outcome, result.bytes, bytes(buffer)) == ("absent", 0, b"mine")
    assert client.get_bytes(name(1)) is None


def test_lookup_counts_leading_blocks_and_present_all(client: kvar.Client, name: Name) -> None:
    ids = [name(n) for n in range(5)]
    client.put([(ids[n], b"x" * 100) for n in (0, 1, 3)])
    assert client.lookup(ids) == 2
    assert client.lookup([]) == 0
    assert client.present(ids) == [True, True, False, True, False]


def test_what_is_leased_stays_until_it_is_released(
    node: Node, client: kvar.Client, name: Name
) -> None:
    ids = [name(n) for n in range(4)]
    client.put([(id, b"x" * 100) for id in ids[:3]], ttl_s=1)
    # Nobody promises this one.
    client.put([(name(4), b"x" * 100)], ttl_s=1)
    with client.lookup_leased(ids, ttl_s=20) as lease:
        assert (lease.leading, lease.reason, lease.held) == (3, "absent", True)
        assert 10 < lease.left_s <= 20
        token = lease.token
        assert token is not None
        # Another client of the namespace may renew it.
        with node.client() as other:
            assert 20 < (other.renew(token, 30) or 0) <= 30
        assert lease.renew(25)
        # Their time to live is over, the promise is not.
        until(lambda: client.lookup([name(4)]) == 0)
        assert client.lookup(ids) == 3
    until(lambda: client.lookup(ids) == 0)
    assert not lease.held
    assert client.renew(token) is None
    assert not client.release(token)
    assert not lease.release()


def test_a_lease_is_released_by_its_token_and_ends_by_itself(
    client: kvar.Client, name: Name
) -> None:
    client.put([(name(1), b"x")])
    lease = client.lookup_leased([name(1)], ttl_s=20)
    assert lease.token is not None
    assert client.release(lease.token)
    short = client.lookup_leased([name(1)], ttl_s=0.05)
    assert (short.leading, short.reason) == (1, None)
    until(lambda: not short.renew(0.001))
    none = client.lookup_leased([name(2)])
    assert (none.leading, none.token, none.held, none.left_s) == (0, None, False, 0.0)
    assert not none.renew()
    with pytest.raises(kvar.RequestError, match="ttl_s is 0"):
        client.lookup_leased([name(1)], ttl_s=0)
    with pytest.raises(ValueError, match="16 bytes"):
        client.release(b"short")


def test_a_lease_outlives_its_client(node: Node, client: kvar.Client, name: Name) -> None:
    with node.client() as other:
        other.put([(name(1), b"x")])
        lease = other.lookup_leased([name(1)], ttl_s=20)
    with pytest.raises(kvar.RequestError, match="closed"):
        lease.release()
    assert lease.token is not None
    assert client.release(lease.token)


def test_a_put_says_what_its_blocks_are_worth(client: kvar.Client, name: Name) -> None:
    hints = kvar.PutHints(
        request=1 << 60, ephemeral=True, traffic_class=255, recompute_us=2_000_000, handover=True
    )
    assert (hints.request, hints.ephemeral, hints.traffic_class) == (1 << 60, True, 255)
    assert (hints.recompute_us, hints.handover) == (2_000_000, True)
    assert hints == eval(repr(hints), {"PutHints": kvar.PutHints})
    assert hints != kvar.PutHints()
    assert client.put([(name(1), b"kept in memory")], hints=hints, ttl_s=60) == ["stored"]
    assert client.get_bytes(name(1)) == b"kept in memory"
    assert client.lookup([name(1)], request=1 << 60) == 1
    with pytest.raises(OverflowError):
        kvar.PutHints(traffic_class=256)


def test_sections_scatter_and_gather(client: kvar.Client, name: Name) -> None:
    sections = [bytes([n]) * (1000 + n) for n in range(7)]
    assert client.put([(name(1), sections)]) == ["stored"]
    buffers = [bytearray(len(section)) for section in sections]
    assert outcomes(client.get([(name(1), buffers)])) == ["hit"]
    assert [bytes(buffer) for buffer in buffers] == sections
    wrong = [bytearray(len(section)) for section in sections[:-1]]
    assert outcomes(client.get([(name(1), wrong)])) == ["wrong_format"]


def test_buffers_of_any_item_type_are_used_in_place(client: kvar.Client, name: Name) -> None:
    numbers = array("d", [float(n) for n in range(1000)])
    client.put([(name(1), numbers)])
    back = array("d", bytes(8000))
    assert outcomes(client.get([(name(1), memoryview(back))])) == ["hit"]
    assert back == numbers


def layers_of(page: int, count: int) -> list[bytearray]:
    """Memory of so many layers of ten pages; every page is of one byte, which no other has."""
    return [
        bytearray(b"".join(bytes([16 * layer + n]) * page for n in range(10)))
        for layer in range(count)
    ]


def test_pages_of_layers_travel_as_blocks(client: kvar.Client, name: Name) -> None:
    page, layer_count = 4096, 3
    layers = layers_of(page, layer_count)
    ids = [name(n) for n in range(4)]
    assert client.put_pages(ids, layers, [7, 2, 9, 0], page) == ["stored"] * 4
    empty = [bytearray(10 * page) for _ in range(layer_count)]
    missing = name("missing")
    got = client.get_pages([*ids, missing], empty, [1, 3, 5, 8, 4], page)
    assert outcomes(got) == ["hit"] * 4 + ["absent"]
    for layer in range(layer_count):
        view = [empty[layer][n * page] for n in range(10)]
        base = 16 * layer
        assert view == [0, base + 7, 0, base + 2, 0, base + 9, 0, 0, base, 0]
    # A block of pages is a block of sections.
    single = [bytearray(page) for _ in range(layer_count)]
    assert outcomes(client.get([(ids[0], single)])) == ["hit"]
    assert single == [layer[7 * page : 8 * page] for layer in layers]


def test_layers_come_one_after_another(client: kvar.Client, name: Name) -> None:
    page, layer_count = 40_000, 6
    layers = layers_of(page, layer_count)
    ids = [name(n) for n in range(4)]
    assert client.put_pages(ids, layers, [7, 2, 9, 0], page) == ["stored"] * 4
    empty = [bytearray(10 * page) for _ in range(layer_count)]
    get = client.submit_get_layers([*ids, name("missing")], empty, [1, 3, 5, 8, 4], page)
    assert get.sections == layer_count
    for layer in range(layer_count):
        assert get.wait_section(layer, timeout=20) == ["hit"] * 4 + ["absent"]
        base = 16 * layer
        view = [empty[layer][n * page] for n in (1, 3, 5, 8, 4)]
        assert view == [base + 7, base + 2, base + 9, base, 0]
    assert get.result() == ["hit"] * 4 + ["absent"]
    assert get.done()
    assert get.seconds is not None and get.seconds < 20
    # The buffers are the caller's again: an exported one cannot be made longer.
    until(lambda: grows(empty[0]))
    with pytest.raises(IndexError, match="section 6 of 6"):
        get.wait_section(6)
    # Nobody announced it, so nobody waits for it.
    alone = client.submit_get_layers([name("no")], empty[1:], [0], page, wait_announced=True)
    assert alone.result() == ["absent"]
    assert client.submit_get_layers([], empty[1:], [], page).result() == []


def grows(buffer: bytearray) -> bool:
    try:
        buffer.append(0)
    except BufferError:
        return False
    return True


def test_layers_go_one_after_another_and_are_there_at_the_commit(
    client: kvar.Client, name: Name
) -> None:
    page, layer_count = 4096, 5
    layers = layers_of(page, layer_count)
    ids = [name(n) for n in range(3)]
    put = client.submit_put_layers(ids, layers, [7, 2, 9], page, deadline_ms=60_000)
    assert put.sections == layer_count
    for filled in (0, 1, 3, 2, 5):
        put.filled(filled)
    with pytest.raises(IndexError, match="6 of 5"):
        put.filled(6)
    assert client.present(ids) == [False] * 3
    pending = put.commit(deadline_ms=10_000)
    assert pending.result() == ["stored"] * 3
    with pytest.raises(ValueError, match="before"):
        put.commit()
    empty = [bytearray(10 * page) for _ in layers]
    got = client.get_pages(ids, empty, [0, 1, 2], page)
    assert [result.outcome for result in got] == ["hit"] * 3
    for mine, theirs in zip(empty, layers, strict=True):
        expected = b"".join(theirs[n * page : (n + 1) * page] for n in (7, 2, 9))
        assert bytes(mine[: 3 * page]) == expected
    # Of what is there already nothing is sent.
    again = client.submit_put_layers(ids, layers, [7, 2, 9], page)
    again.filled(layer_count)
    assert again.commit().result() == ["exists"] * 3


def test_a_put_by_layers_without_its_commit_is_nothing(client: kvar.Client, name: Name) -> None:
    layers = layers_of(64, 3)

    def begin(id: bytes, sections: int) -> kvar.LayerPut:
        put = client.submit_put_layers([id], layers, [1], 64, deadline_ms=60_000)
        put.filled(sections)
        return put

    begin(name("given up"), 3).abort()
    begin(name("forgotten"), 3)
    assert begin(name("not whole"), 2).commit().result() == ["wrong_format"]

    def is_free(word: str) -> bool:
        return client.put([(name(word), b"new")]) == ["stored"]

    def may_grow() -> bool:
        try:
            layers[0].append(1)
        except BufferError:
            return False
        return True

    for word in ("given up", "forgotten", "not whole"):
        # It does not stand in the way either.
        until(partial(is_free, word))
        assert client.get_bytes(name(word)) == b"new"
    # The memory is the caller's again.
    until(may_grow)


def test_pages_of_a_put_by_layers_lie_inside(client: kvar.Client, name: Name) -> None:
    with pytest.raises(ValueError, match="page 10 of 64 bytes lies outside"):
        client.submit_put_layers([name(0)], layers_of(64, 2), [10], 64)


def test_a_batch_larger_than_any_message(client: kvar.Client, name: Name) -> None:
    ids = [name(n) for n in range(3000)]
    client.put([(id, n.to_bytes(4, "little") * 8) for n, id in enumerate(ids)])
    assert client.lookup(ids) == 3000
    buffers = [bytearray(32) for _ in ids]
    assert set(outcomes(client.get(list(zip(ids, buffers, strict=True))))) == {"hit"}
    assert [int.from_bytes(buffer[:4], "little") for buffer in buffers] == list(range(3000))


def test_removed_is_gone(client: kvar.Client, name: Name) -> None:
    client.put([(name(1), b"x")])
    assert client.remove([name(1), name(2)]) == 1
    assert client.present([name(1)]) == [False]
    assert client.put([(name(1), b"y")]) == ["stored"]
    assert client.get_bytes(name(1)) == b"y"


def test_pending_keeps_its_buffers_until_it_is_done(client: kvar.Client, name: Name) -> None:
    data = bytearray(b"z" * (1 << 20))
    pending = client.submit_put([(name(1), data)])
    try:
        # Exported memory cannot be resized: Python itself says whether it is still held.
        data.clear()
        assert pending.done(), "the buffer came free before the put was done"
    except BufferError:
        pass
    assert pending.result(timeout=10) == ["stored"]
    until(lambda: can_clear(data))
    calls: list[int] = []
    done = client.submit_get([(name(1), bytearray(1 << 20))])
    done.result(timeout=10)
    done.add_done_callback(lambda: calls.append(1))
    until(lambda: calls == [1])


def can_clear(data: bytearray) -> bool:
    try:
        data.clear()
    except BufferError:
        return False
    return True


def test_other_threads_run_while_a_call_waits(client: kvar.Client, name: Name) -> None:
    data = bytearray(1 << 20)
    ids = [name(n) for n in range(30)]
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0)

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks
    client.put([(id, data) for id in ids])
    after = ticks
    stop.set()
    thread.join()
    assert after > before


@pytest.mark.parametrize(
    ("break_it", "error", "words"),
    [
        (lambda c, i: c.lookup([b"short"]), ValueError, "32 bytes"),
        (lambda c, i: c.put([(i, "text")]), TypeError, "buffer|bytes-like"),
        (lambda c, i: c.get([(i, b"read-only")]), BufferError, "read-only"),
        (lambda c, i: c.get([(i, memoryview(bytearray(10))[::2])]), BufferError, "contiguous"),
        (lambda c, i: c.get_pages([i], [bytearray(10)], [1], 8), ValueError, "outside"),
        (lambda c, i: c.get_pages([i], [bytearray(10)], [0, 1], 4), ValueError, "as many"),
        (lambda c, i: c.get_pages([i, i], [bytearray(8)], [0, 0], 8), ValueError, "overlap"),
        (lambda c, i: c.get_pages([i], [bytearray(8)], [-1], 8), OverflowError, "negative"),
        (lambda c, i: c.get([(i, [])]), ValueError, "section"),
        (lambda c, i: c.lookup([i], deadline_ms=-1), OverflowError, "negative"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(
    client: kvar.Client,
    name: Name,
    break_it: Callable[[kvar.Client, bytes], object],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        break_it(client, name(1))


def test_two_destinations_may_not_overlap(client: kvar.Client, name: Name) -> None:
    shared = memoryview(bytearray(100))
    with pytest.raises(ValueError, match="overlap"):
        client.get([(name(1), shared[:60]), (name(2), shared[50:])])


def test_outcomes_of_puts_that_cannot_be(client: kvar.Client, name: Name) -> None:
    assert client.put([(name(1), b"")]) == ["wrong_format"]
    assert client.put([(name(2), bytes(17 << 20))]) == ["too_big"]


def test_a_deadline_of_zero_is_over_at_once(client: kvar.Client, name: Name) -> None:
    client.put([(name(1), b"x")])
    started = time.monotonic()
    assert outcomes(client.get([(name(1), bytearray(1))], deadline_ms=0)) == ["deadline"]
    assert client.put([(name(2), b"x")], deadline_ms=0) == ["deadline"]
    assert time.monotonic() - started < 5


def test_durable_puts_flush_and_status(client: kvar.Client, name: Name) -> None:
    assert client.put([(name(1), b"x" * 5000)], durable=True, depth=3) == ["stored"]
    client.flush()
    assert isinstance(client.status(), dict)


def test_a_wrong_key_is_refused(node: Node) -> None:
    with pytest.raises(kvar.WrongKeyError):
        kvar.Client(node.endpoint, key=kvar.NamespaceKey.from_hex("ab" * 32))


def test_nobody_there_is_a_connect_error(node: Node) -> None:
    with pytest.raises(kvar.ConnectError):
        kvar.Client("127.0.0.1:1", key=node.key, connect_timeout_ms=500)


def test_settings_that_cannot_be_meant(node: Node, tmp_path: Path) -> None:
    for arguments in ({}, {"key": node.key, "key_file": node.key_file}):
        with pytest.raises(kvar.ConfigError, match="key"):
            kvar.Client(node.endpoint, **arguments)  # type: ignore[arg-type]
    with pytest.raises(kvar.ConfigError):
        kvar.Client("nowhere", key=node.key)
    with pytest.raises(kvar.ConfigError, match=r"no\.key"):
        kvar.NamespaceKey.from_file(tmp_path / "no.key")
    with pytest.raises(kvar.ConfigError):
        kvar.NamespaceKey.from_hex("12")


def test_every_error_is_a_kvar_error() -> None:
    kinds = ["ConnectError", "VersionError", "WrongKeyError", "ConfigError", "RequestError"]
    assert all(issubclass(getattr(kvar, kind), kvar.KvarError) for kind in kinds)


def test_a_node_that_dies_and_comes_back(own_node: Node) -> None:
    block = kvar.id_from_name(own_node.key, "block")
    with own_node.client(deadline_ms=2000, connect_timeout_ms=500) as client:
        assert client.put([(block, b"still there")], durable=True) == ["stored"]
        own_node.kill()
        buffer = bytearray(11)
        assert outcomes(client.get([(block, buffer)]))[0] in ("unreachable", "deadline")
        assert client.put([(block, b"x")])[0] in ("unreachable", "deadline")
        with pytest.raises(kvar.KvarError):
            client.lookup([block])
        own_node.start()
        until(lambda: outcomes(client.get([(block, buffer)])) == ["hit"])
        assert buffer == b"still there"


def test_a_closed_client_says_so(node: Node) -> None:
    client = node.client()
    client.close()
    client.close()
    with pytest.raises(kvar.KvarError, match="closed"):
        client.lookup([])


def test_names_are_stable_and_distinct(node: Node) -> None:
    key = kvar.NamespaceKey.from_hex("01" * 32)
    text = kvar.ContentFingerprint.of_text("model=a")
    ids = kvar.derive_ids(key, [b"one", b"two"], text)
    assert ids == kvar.derive_ids(key, [b"one", b"two"], text, (0, 1), 0)
    assert [len(id) for id in ids] == [32, 32]
    others = [
        kvar.derive_ids(node.key, [b"one"], text),
        kvar.derive_ids(key, [b"one"], kvar.ContentFingerprint.of_text("model=b")),
        kvar.derive_ids(key, [b"one"], text, head_slice=(0, 2)),
        kvar.derive_ids(key, [b"one"], text, group=1),
    ]
    assert len({ids[0], *(other[0] for other in others)}) == 5
    with pytest.raises(ValueError, match="slice"):
        kvar.derive_ids(key, [b"one"], text, head_slice=(1, 1))
    assert key == kvar.NamespaceKey.from_hex("01" * 32)
    assert key != node.key
    assert "01" * 8 not in repr(key)


def test_a_client_on_the_nodes_host_shares_memory_unless_told_not_to(
    node: Node, name: Name
) -> None:
    data = bytes(range(251)) * 4000
    with node.client() as shared, node.client(link="tcp") as plain:
        assert (shared.link, shared.not_shared) == ("shm", None)
        assert (plain.link, plain.not_shared) == ("tcp", "link = tcp")
        # What one has put through memory the other reads through its socket, and back.
        assert shared.put([(name(1), data)]) == ["stored"]
        assert plain.get_bytes(name(1)) == data
        assert plain.put([(name(2), data[::-1])]) == ["stored"]
        assert shared.get_bytes(name(2)) == data[::-1]
    with pytest.raises(kvar.ConfigError, match="auto, tcp, shm"):
        node.client(link="pigeon")


def test_a_node_that_stops_and_dies_is_felt_through_shared_memory(own_node: Node) -> None:
    client = own_node.client(deadline_ms=300)
    key = own_node.key
    assert client.link == "shm"
    buffer = bytearray(1000)
    assert client.put([(kvar.id_from_name(key, "kept"), b"k" * 1000)]) == ["stored"]
    own_node.pause()
    begun = time.monotonic()
    (result,) = client.get([(kvar.id_from_name(key, "kept"), buffer)])
    assert result.outcome in ("deadline", "unreachable")
    assert time.monotonic() - begun < 3
    # The buffer is free again, and nothing is written into it when the node wakes up.
    buffer[:] = b"c" * 1000
    own_node.resume()
    until(lambda: client.get_bytes(kvar.id_from_name(key, "kept")) == b"k" * 1000)
    assert buffer == b"c" * 1000
    own_node.kill()
    until(lambda: client.link == "none")
