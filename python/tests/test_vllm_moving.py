"""The connector's worker half: real tensors, a real node, no engine.

Needs torch, which the package itself does not: the end-to-end run has it and runs this too.
"""

from __future__ import annotations

import dataclasses
import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Node, until

import kvar
from kvar.vllm.finder import Finder
from kvar.vllm.groups import Groups
from kvar.vllm.link import Link
from kvar.vllm.orders import FailedLoad, LoadOrder, SaveOrder, SaveReport
from kvar.vllm.pages import LANE_BLOCKS, LANES, DirectPages, StagedPages, pages_of
from kvar.vllm.planner import Found, Unanswered
from kvar.vllm.settings import Mode, Settings, SettingsError
from kvar.vllm.worker import Ended, GroupPages, Mover

torch: Any = pytest.importorskip("torch")

LAYERS = 3
PAGE = (2, 8, 16)
BLOCKS = 100


def layers_of(kind: str, fill: bool) -> list[Any]:
    """Layers whose pages hold numbers that no other page has."""
    made = []
    for layer in range(LAYERS):
        if kind == "direct":
            tensor = torch.zeros((BLOCKS, *PAGE))
        else:
            # Tokens before heads in memory: every page is strewn.
            tensor = torch.zeros((BLOCKS, PAGE[1], PAGE[0], PAGE[2])).permute(0, 2, 1, 3)
        if fill:
            count = tensor.numel()
            numbers = torch.arange(count, dtype=torch.float32) + layer * count
            tensor.copy_(numbers.reshape(tensor.shape))
        made.append(tensor)
    return made


def settings(node: Node) -> Settings:
    return Settings.from_extra_config(
        {
            "endpoint": node.endpoint,
            "namespace_key_file": str(node.key_file),
            "deadline_ms": 5000,
            "lookup_deadline_ms": 5000,
        }
    )


def mover(node: Node, link: Link, layers: list[Any], text: str, handover: bool = False) -> Mover:
    return Mover(
        link=link,
        groups=[GroupPages(pages_of(layers), text, 1)],
        key=node.key,
        head_slice=(0, 1),
        deadline_ms=5000,
        handover=handover,
    )


def finder(node: Node, link: Link, text: str, slices: int = 1) -> Finder:
    return Finder(
        store=link,
        key=node.key,
        groups=Groups.one(32),
        texts=[text],
        slices=slices,
        deadline_ms=5000,
    )


def run_dry(mover: Mover) -> Ended:
    """Everything that ends, until nothing is under way."""
    total = Ended()

    def step() -> bool:
        ended = mover.ended()
        total.loaded.update(ended.loaded)
        total.bad_block_ids.update(ended.bad_block_ids)
        total.failed.update(ended.failed)
        total.reports.update(ended.reports)
        return mover.idle

    until(step)
    return total


@pytest.fixture
def link(node: Node) -> Iterator[Link]:
    link = Link.to(settings(node))
    yield link
    link.close()


@pytest.mark.parametrize("kind", ["direct", "staged"])
@pytest.mark.parametrize("back", ["direct", "staged"])
def test_pages_come_back_into_other_pages(node: Node, link: Link, kind: str, back: str) -> None:
    text = f"{kind} to {back}"
    source = layers_of(kind, fill=True)
    assert isinstance(pages_of(source), DirectPages if kind == "direct" else StagedPages)
    # More than all lanes hold, so that some of it has to wait for one.
    count = LANES * LANE_BLOCKS + 5
    hashes = [f"{text} {n}".encode() for n in range(count)]
    taken = list(range(BLOCKS - 1, BLOCKS - 1 - count, -1))
    saver = mover(node, link, source, text)
    saver.start_save(SaveOrder(7, hashes, taken, 0), "")
    assert run_dry(saver).reports == {7: SaveReport(1, count, 0)}

    target = layers_of(back, fill=False)
    given = list(range(count))
    loader = mover(node, link, target, text)
    missing = b"never saved"
    loader.start_load(LoadOrder("r", [*hashes, missing], [*given, count], 0), "")
    ended = run_dry(loader)
    assert (ended.loaded, ended.bad_block_ids) == ({"r"}, {count})
    assert ended.failed == {"r": FailedLoad(count, "absent")}
    assert loader.counters.take()["load_missed_blocks:absent"] == 1
    for layer in range(LAYERS):
        # Staged pages travel in logical order, so that both kinds mean the same here.
        assert torch.equal(target[layer][given], source[layer][taken])
        assert not target[layer][count:].any()


def test_a_load_by_layers_is_waited_for_layer_by_layer(node: Node, link: Link) -> None:
    source = layers_of("direct", fill=True)
    hashes = [f"by layers {n}".encode() for n in range(20)]
    worker = mover(node, link, source, "by layers")
    worker.start_save(SaveOrder(1, hashes, list(range(20)), 0), "")
    run_dry(worker)
    target = layers_of("direct", fill=False)
    loader = mover(node, link, target, "by layers")
    given = list(range(50, 70))
    loader.start_layers(LoadOrder("r", hashes, given, 0, tokens=640), "")
    for layer in range(LAYERS):
        loader.wait_layer(layer)
        assert torch.equal(target[layer][given], source[layer][:20])
    loader.finish_layers()
    ended = loader.ended()
    assert ended.loaded == set(), "vLLM's own channel is for those that wait outside"
    assert (set(ended.layers.loaded), ended.layers.failures) == ({"r"}, 0)
    assert (ended.bad_block_ids, ended.loads.tokens) == (set(), 640)
    counted = loader.counters.take()
    assert counted["layered_load_seconds"] > 0 and counted["layered_wait_seconds"] > 0


def test_a_load_by_layers_that_fails_is_told_in_its_step(own_node: Node) -> None:
    link = Link.to(settings(own_node))
    layers = layers_of("direct", fill=True)
    worker = mover(own_node, link, layers, "fails")
    worker.start_save(SaveOrder(1, [b"h"], [1], 0), "")
    run_dry(worker)
    worker.start_layers(LoadOrder("r", [b"h", b"missing"], [2, 3], 0), "")
    for layer in range(LAYERS):
        worker.wait_layer(layer)
    worker.finish_layers()
    ended = worker.ended()
    assert (ended.bad_block_ids, ended.layers.failures, worker.failures) == ({3}, 1, 1)
    # What the scheduler ordered before it heard of that is turned down, and reported.
    worker.refuse_save(SaveOrder(2, [b"i"], [4], 0))
    assert worker.ended().reports == {2: SaveReport(1, 0, 1)}
    # A node that is gone ends it as well.
    own_node.stop()
    for _ in range(2):
        worker.start_layers(LoadOrder("s", [b"h"], [2], 0), "")
        worker.wait_layer(0)
        worker.finish_layers()
        assert worker.ended().bad_block_ids == {2}
    assert worker.failures == 3
    link.close()


@pytest.mark.parametrize("kind", ["direct", "staged"])
def test_a_wait_ends_with_what_it_waits_for_and_soon_without(own_node: Node, kind: str) -> None:
    link = Link.to(settings(own_node))
    worker = mover(own_node, link, layers_of(kind, fill=True), "waits")
    # Nothing is under way.
    worker.wait()
    worker.start_save(SaveOrder(1, [b"h"], [1], 0), "")
    while not worker.idle:
        worker.wait()
        worker.ended()
    own_node.pause()
    worker.start_load(LoadOrder("r", [b"h"], [2], 0), "")
    for _ in range(3):
        worker.wait()
        assert not worker.ended().loaded
    own_node.resume()
    assert run_dry(worker).loaded == {"r"}
    link.close()


def test_blocks_of_a_prefill_engine_are_handed_over(node: Node, link: Link) -> None:
    def handed_over() -> int:
        with urllib.request.urlopen(f"http://{node.admin}/v1/status", timeout=5) as answer:
            shards = json.load(answer)["shards"]
        return sum(shard["engine"]["counters"]["handovers_read"] for shard in shards)

    before = handed_over()
    for kind in ("direct", "staged"):
        layers = layers_of(kind, fill=True)
        worker = mover(node, link, layers, f"handed over {kind}", handover=True)
        worker.start_save(SaveOrder(1, [b"a", b"b"], [1, 2], 0), "")
        run_dry(worker)
        worker.start_load(LoadOrder("r", [b"a", b"b"], [3, 4], 0), "")
        assert not run_dry(worker).bad_block_ids
    until(lambda: handed_over() == before + 4)


def test_a_reset_puts_everything_stored_out_of_reach(node: Node, link: Link) -> None:
    layers = layers_of("direct", fill=True)
    worker = mover(node, link, layers, "reset")
    worker.start_save(SaveOrder(1, [b"h"], [1], 0), "")
    run_dry(worker)
    worker.start_load(LoadOrder("old", [b"h"], [2], 0), "")
    worker.start_load(LoadOrder("new", [b"h"], [3], 0), "salt")
    assert run_dry(worker).bad_block_ids == {3}


def test_the_scheduler_finds_only_what_all_ranks_have_stored(node: Node, link: Link) -> None:
    layers = layers_of("direct", fill=True)
    hashes = [b"a", b"b"]
    for rank, known in ((0, hashes), (1, hashes[:1])):
        worker = Mover(
            link=link,
            groups=[GroupPages(pages_of(layers), "ranks", 1)],
            key=node.key,
            head_slice=(rank, 2),
            deadline_ms=5000,
        )
        worker.start_save(SaveOrder(1, known, list(range(len(known))), 0), "")
        run_dry(worker)
    found = finder(node, link, "ranks", slices=2).find(hashes, 64, 1, 0, "")
    assert found == Found(32, None, 32)


def test_layers_of_several_shapes_are_refused() -> None:
    with pytest.raises(SettingsError, match="one kind of attention layer"):
        pages_of([torch.zeros(4, 2), torch.zeros(4, 3)])


def test_a_node_that_dies_costs_one_failure_and_is_found_again(own_node: Node) -> None:
    link = Link.to(settings(own_node))
    layers = layers_of("direct", fill=True)
    worker = mover(own_node, link, layers, "dies")
    worker.start_save(SaveOrder(1, [b"h"], [1], 0), "")
    assert run_dry(worker).reports[1].stored_blocks == 1
    own_node.stop()
    # Every order still gets its answer.
    worker.start_load(LoadOrder("r", [b"h"], [2], 0), "")
    worker.start_save(SaveOrder(2, [b"i"], [3], 0), "")
    ended = run_dry(worker)
    assert (ended.loaded, ended.bad_block_ids) == ({"r"}, {2})
    assert ended.failed["r"].position == 0
    assert ended.reports == {2: SaveReport(1, 0, 1)}
    link.lookup([bytes(32)], 1000)
    assert link.client() is None
    started = time.monotonic()
    for _ in range(1000):
        assert link.lookup([bytes(32)], 1000) is None
    assert time.monotonic() - started < 1
    own_node.start()
    until(lambda: link.client() is not None)
    worker.start_load(LoadOrder("again", [b"h"], [2], 0), "")
    assert run_dry(worker).bad_block_ids == set()
    assert torch.equal(layers[0][2], layers[0][1])
    link.close()


def test_a_node_that_hangs_is_left_alone_after_the_first_deadline(own_node: Node) -> None:
    link = Link.to(settings(own_node))
    own_node.pause()
    started = time.monotonic()
    assert link.lookup([bytes(32)], 100) is None
    assert link.why_unanswered() == "lookup_deadline"
    for _ in range(100):
        assert link.lookup([bytes(32)], 100) is None
    assert link.why_unanswered() == "store_away"
    assert time.monotonic() - started < 1
    own_node.resume()
    until(lambda: link.lookup([bytes(32)], 5000) == 0)
    link.close()


def test_an_engine_may_start_before_its_node(own_node: Node) -> None:
    found = settings(own_node)
    own_node.kill()
    link = Link.to(found)
    assert link.lookup([bytes(32)], 1000) is None
    own_node.start()
    until(lambda: link.lookup([bytes(32)], 1000) == 0)
    link.close()


def test_a_connector_that_is_off_leaves_the_node_alone(node: Node) -> None:
    off = dataclasses.replace(settings(node), mode=Mode.OFF)
    link = Link.to(off)
    assert link.client() is None
    assert link.lookup([bytes(32)], 1000) is None
    link.close()


def test_a_wrong_key_stops_the_engine_at_start(node: Node, tmp_path: Any) -> None:
    other = tmp_path / "other.key"
    other.write_text(f'uuid = "{"0" * 32}"\nnamespace_key = "{"1" * 64}"\n')
    other.chmod(0o600)
    wrong = Settings.from_extra_config(
        {"endpoint": node.endpoint, "namespace_key_file": str(other)}
    )
    with pytest.raises(kvar.WrongKeyError):
        Link.to(wrong)


def test_the_scheduler_leases_in_one_process_what_the_worker_loads_in_another(
    node: Node, link: Link
) -> None:
    worker = mover(node, link, layers_of("direct", fill=True), "leased")
    hashes = [f"leased {n}".encode() for n in range(5)]
    worker.start_save(SaveOrder(1, hashes, list(range(5)), 0, 77), "")
    assert run_dry(worker).reports[1].stored_blocks == len(hashes)
    chain = [*hashes, b"not there"]
    scheduler = Link.to(settings(node))
    leases = leases_of(node)
    asked = finder(node, scheduler, "leased")
    found = asked.find(chain, 6 * 32, 78, 20.0, "")
    assert isinstance(found, Found)
    assert (found.tokens, leases_of(node)) == (5 * 32, leases + 1)
    lease = found.lease
    assert lease is not None
    worker.start_load(LoadOrder("r", hashes, list(range(10, 15)), 0, 78), "")
    assert run_dry(worker).bad_block_ids == set()
    lease.renew(20.0)
    lease.release()
    until(lambda: leases_of(node) == leases)
    # Nothing found, nothing promised.
    assert asked.find(chain[5:], 32, 78, 20.0, "") == Found(0)
    scheduler.close()
    # On the engine's path nothing raises, whatever became of the link.
    lease.renew(20.0)
    lease.release()
    assert asked.find(chain, 6 * 32, 78, 20.0, "") == Unanswered("store_away")


def leases_of(node: Node) -> int:
    """Leases that the node holds."""
    with node.client() as client:
        shards = client.status()["shards"]
    return sum(shard["engine"]["leases"] for shard in shards)
