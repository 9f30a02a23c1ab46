"""Saves by layers under vLLM's own scheduler: sent while the step computes, whole or absent.

What is loaded of them is compared by :mod:`rig` where it is attended to; the other promises of the
connector hold for them too (``test_vllm_scheduler.py`` runs both ways).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Node, until

pytest.importorskip("vllm")

from rig import CONTENT, HEADS, Rig, full, transfer, windowed

PROMPT = [(n * 7919 + 13) % 1000 for n in range(333)]
BLOCK_BYTES_A_LAYER = 16 * HEADS * CONTENT * 8


@pytest.fixture(autouse=True)
def every_layer_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rig's layers are small; a real one is sent with as many as make it worth a word."""
    monkeypatch.setattr("kvar.vllm.pages.SENT_BYTES_MIN", 1)


def specs_of(kind: str) -> list[Any]:
    return [full()] if kind == "one group" else [*(windowed(64) for _ in range(5)), full()]


def received(node: Node) -> int:
    """Bytes of blocks that have come to the node."""
    with node.client() as client:
        return int(client.status()["links"]["payload_bytes_in"])


@pytest.mark.parametrize(("kind", "ranks"), [("one group", 1), ("one group", 2), ("gemma", 1)])
def test_layers_are_at_the_node_before_their_step_ends(
    kind: str, ranks: int, own_node: Node, rig: Callable[..., Rig]
) -> None:
    # A step computes 8 blocks of each group, and a prompt takes three of them.
    setting = transfer(own_node, save="layers")
    engine = rig(setting, specs_of(kind), ranks=ranks, layers_a_group=3, model=kind)
    a_step = 8 * len(specs_of(kind)) * 3 * BLOCK_BYTES_A_LAYER
    steps = 0

    def sent_before_the_end() -> None:
        """Called for each rank when it has computed all layers."""
        nonlocal steps
        steps += 1
        if steps <= 2 * ranks:
            until(lambda: received(own_node) >= steps * a_step)
        if steps == 1:
            assert stored(own_node) == 0

    engine.before_step_ends = sent_before_the_end
    cold, _ = engine.ask(PROMPT)
    assert steps > 2 * ranks
    engine.settle()
    assert engine.count("layered_save_blocks") == 20 * len(specs_of(kind)) * ranks
    assert engine.count("save_seconds") > 0
    assert engine.ask(PROMPT) == (cold, 320)
    engine.settle()


def stored(node: Node) -> int:
    """Blocks that readers can have."""
    with node.client() as client:
        return int(client.status()["links"]["puts"]["stored"])


def test_saves_after_the_step_send_nothing_in_it(own_node: Node, rig: Callable[..., Rig]) -> None:
    engine = rig(transfer(own_node), [full()], model="after")
    steps = 0

    def nothing_sent() -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            assert received(own_node) == 0

    engine.before_step_ends = nothing_sent
    engine.ask(PROMPT)
    engine.settle()
    assert engine.count("layered_save_blocks") == 0
    assert steps > 1 and received(own_node) > 0


class _Dies(Exception):
    pass


def test_an_engine_that_dies_in_its_step_leaves_nothing_behind(
    own_node: Node, rig: Callable[..., Rig]
) -> None:
    engine = rig(transfer(own_node, save="layers"), [full()], model="dies")

    def die() -> None:
        until(lambda: received(own_node) >= 8 * 2 * BLOCK_BYTES_A_LAYER)
        raise _Dies

    engine.before_step_ends = die
    engine.submit(PROMPT)
    with pytest.raises(_Dies):
        engine.step()
    # All layers of its blocks are at the node, which hears no more of them.
    engine.close()
    other = rig(transfer(own_node, save="layers"), [full()], model="dies")
    cold, hit = other.ask(PROMPT)
    assert hit == 0
    other.settle()
    # Nor does what was begun stand in anybody's way.
    assert other.ask(PROMPT) == (cold, 320)
    other.settle()


def test_what_cannot_be_announced_goes_after_the_step(
    node: Node, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvar.vllm import worker

    rooms: list[int] = []
    begin = worker.Mover.begin_saves

    def with_little_room(self: worker.Mover, orders: Any, salt: str) -> None:
        """As if blocks were so large that three of them may be announced."""
        client = self._link.client()
        assert client is not None and client.announced_bytes_max
        groups = self._groups
        large = client.announced_bytes_max // 3
        self._groups = [worker.GroupPages(group.pages, group.text, large) for group in groups]
        begin(self, orders, salt)
        rooms.append(sum(begun.blocks for begun in self._begun.values()))
        self._groups = groups

    monkeypatch.setattr(worker.Mover, "begin_saves", with_little_room)
    engine = rig(transfer(node, save="layers"), [full()], model="little room")
    cold, _ = engine.ask(PROMPT)
    engine.settle()
    assert rooms[:2] == [3, 3]
    assert engine.count("layered_save_blocks") == sum(rooms) < 20
    assert engine.count("saved_tokens") == 320
    assert engine.ask(PROMPT) == (cold, 320)
    engine.settle()


def test_of_a_step_whose_load_failed_nothing_is_saved(
    own_node: Node, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvar.vllm import pages

    setting = transfer(own_node, load="layers", save="layers")
    engine = rig(setting, [full()], model="tainted", step_tokens=512)
    cold, _ = engine.ask(PROMPT[:200])
    engine.settle()
    whole = pages.DirectPages.load_layers

    def load_less(self: pages.DirectPages, batch: pages.Batch, request: int) -> Any:
        lost = [*batch.ids[:-1], bytes(32)]
        batch = pages.Batch(batch.client, lost, batch.blocks, batch.deadline_ms, batch.depth)
        return whole(self, batch, request)

    monkeypatch.setattr(pages.DirectPages, "load_layers", load_less)
    # What the rig compares is wrong in that step, as it is for a model; its answer is not used.
    engine.compares = False
    before, there, came = engine.count("saved_tokens"), stored(own_node), received(own_node)
    # The layers of what the step computes are at the node, and stay announced until it is over.
    engine.before_step_ends = lambda: until(lambda: received(own_node) > came)
    request = engine.submit(PROMPT)
    engine.step()
    assert stored(own_node) == there
    engine.before_step_ends = lambda: None
    engine.compares = True
    monkeypatch.undo()
    engine.until(request.is_finished)
    engine.settle()
    assert engine.count("save_tainted_blocks") > 0
    assert engine.count("saved_tokens") == before
    assert cold
    engine.ask(PROMPT)
    engine.settle()
    assert engine.count("saved_tokens") > before
