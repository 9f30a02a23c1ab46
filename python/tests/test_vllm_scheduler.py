"""The whole connector under vLLM's own scheduler, with ranks that stand in for the model.

Real bytes over a real node; what is computed, attended to and loaded is checked by :mod:`rig`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node

pytest.importorskip("vllm")

from rig import Rig, full, latent, transfer, windowed

PROMPT = [(n * 7919 + 13) % 1000 for n in range(333)]
OTHER = PROMPT[:200] + [(n * 104729 + 5) % 1000 for n in range(150)]


GEMMA = {"one group": 1, "gemma": 6, "unequal blocks": 2, "a window alone": 1}


def specs_of(kind: str) -> list[Any]:
    return {
        "one group": lambda: [full()],
        "gemma": lambda: [*(windowed(64) for _ in range(5)), full()],
        "unequal blocks": lambda: [windowed(40), full(32)],
        "a window alone": lambda: [windowed(50)],
        "latent": lambda: [latent()],
    }[kind]()


@pytest.mark.parametrize("save", ["after", "layers"])
@pytest.mark.parametrize("kind", GEMMA)
def test_what_one_engine_computed_another_goes_on_with(
    save: str, kind: str, node: Node, rig: Callable[..., Rig]
) -> None:
    model = f"again/{kind}/{save}"
    first = rig(transfer(node, save=save), specs_of(kind), model=model)
    cold, hit = first.ask(PROMPT)
    assert hit == 0
    first.settle()
    second = rig(transfer(node, save=save), specs_of(kind), model=model)
    warm, hit = second.ask(PROMPT)
    block = max(spec.block_size for spec in specs_of(kind))
    assert (warm, hit) == (cold, (len(PROMPT) - 1) // block * block)
    # A prompt that shares a part of it is in the engine's own cache as far as it goes; where only
    # the window's end was loaded, that of the part is in the store.
    _, hit = second.ask(OTHER)
    assert hit == (0 if kind == "one group" else 192)
    second.settle()
    _, hit = second.ask(OTHER)
    assert hit == (len(OTHER) - 1) // block * block
    second.settle()
    third = rig(transfer(node, save=save), specs_of(kind), model=model)
    _, hit = third.ask([*OTHER[:250], 1, 2, 3])
    assert hit == 250 // block * block
    third.settle()


@pytest.mark.parametrize("kind", GEMMA)
def test_a_load_goes_on_from_the_engines_own_hit(
    kind: str, node: Node, rig: Callable[..., Rig]
) -> None:
    first = rig(transfer(node), specs_of(kind), model=f"own/{kind}")
    cold, _ = first.ask(PROMPT)
    first.settle()
    second = rig(transfer(node), specs_of(kind), model=f"own/{kind}")
    _, hit = second.ask(PROMPT[:100])
    assert hit == 96
    warm, hit = second.ask(PROMPT)
    assert (warm, hit, second.count("funnel_tokens:local")) == (cold, 320 - 96, 96)
    second.settle()


def test_of_windows_only_the_ends_are_loaded(node: Node, rig: Callable[..., Rig]) -> None:
    for kind in ("one group", "gemma"):
        engine = rig(transfer(node), specs_of(kind), model=f"ends/{kind}")
        engine.ask(PROMPT)
        engine.settle()
        saved = engine.count("saved_bytes")
        engine.ask(PROMPT)
        engine.settle()
        loaded = engine.count("loaded_bytes")
        if kind == "one group":
            # All 20 blocks but the last token's.
            assert loaded == saved
        else:
            # 20 of full attention, and 4 of each of five windows of 64, of 6 times 20.
            assert loaded == saved * 40 / 120


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", GEMMA)
def test_a_block_that_is_lost_on_the_way_of_one_rank_is_computed_by_all(
    ranks: int, kind: str, node: Node, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvar.vllm import pages

    engine = rig(transfer(node), specs_of(kind), ranks=ranks, model=f"lost/{kind}/{ranks}")
    cold, _ = engine.ask(PROMPT)
    engine.settle()
    loads = 0
    whole = pages.DirectPages.load

    def load_less(self: pages.DirectPages, batch: pages.Batch, request: int) -> Any:
        """The last block of the first rank's last order asks for what nobody has."""
        nonlocal loads
        loads += 1
        if loads == len(specs_of(kind)):
            lost = [*batch.ids[:-1], bytes(32)]
            batch = pages.Batch(batch.client, lost, batch.blocks, batch.deadline_ms, batch.depth)
        return whole(self, batch, request)

    monkeypatch.setattr(pages.DirectPages, "load", load_less)
    warm, hit = engine.ask(PROMPT)
    assert warm == cold
    block = max(spec.block_size for spec in specs_of(kind))
    full_blocks = (len(PROMPT) - 1) // block * block
    # With one table vLLM goes on from the lost page; with several it begins anew.
    assert hit == (full_blocks - block if kind == "one group" else 0)
    assert engine.count("lost_tokens:loaded:absent") == full_blocks - hit
    engine.settle()
    monkeypatch.undo()
    assert engine.ask(PROMPT) == (cold, full_blocks)
    engine.settle()


@pytest.mark.parametrize("save", ["after", "layers"])
def test_ranks_that_share_heads_store_a_slice_each(
    save: str, node: Node, rig: Callable[..., Rig]
) -> None:
    engine = rig(transfer(node, save=save), specs_of("gemma"), ranks=2, model=f"slices/{save}")
    cold, _ = engine.ask(PROMPT)
    engine.settle()
    assert engine.count("save_refused_blocks:busy") == 0
    assert engine.ask(PROMPT) == (cold, 320)
    engine.settle()
    # Another number of ranks cuts other slices.
    alone = rig(transfer(node, save=save), specs_of("gemma"), model=f"slices/{save}")
    assert alone.ask(PROMPT) == (cold, 0)
    alone.settle()


@pytest.mark.parametrize("save", ["after", "layers"])
@pytest.mark.parametrize(("ranks", "replicas"), [(4, 4), (4, 2)])
def test_ranks_with_the_same_kv_store_it_once(
    save: str, ranks: int, replicas: int, node: Node, rig: Callable[..., Rig]
) -> None:
    kind = "latent" if ranks == replicas else "one group"
    model = f"replicas/{ranks}/{replicas}/{save}"
    engine = rig(
        transfer(node, save=save), specs_of(kind), ranks=ranks, replicas=replicas, model=model
    )
    cold, _ = engine.ask(PROMPT)
    engine.settle()
    copies = ranks // replicas
    a_block = engine.count("saved_bytes") / (20 * copies)
    assert a_block == 2 * 16 * 2 * 4 * 8, "each block once, of two layers"
    assert engine.count("saved_tokens") == 320
    assert engine.ask(PROMPT) == (cold, 320)
    assert engine.count("loaded_bytes") == engine.count("saved_bytes") * replicas
    engine.settle()
    # The same blocks are those of an engine with as many slices.
    other = rig(transfer(node, save=save), specs_of(kind), ranks=copies, model=model)
    assert other.ask(PROMPT) == (cold, 320)
    other.settle()


def test_a_producer_only_saves_and_a_consumer_only_loads(
    node: Node, rig: Callable[..., Rig]
) -> None:
    consumer = rig(transfer(node, "kv_consumer"), [full()], model="roles")
    cold, _ = consumer.ask(PROMPT)
    consumer.settle()
    assert consumer.count("saved_bytes") == 0
    producer = rig(transfer(node, "kv_producer"), [full()], model="roles")
    for _ in range(2):
        assert producer.ask(PROMPT) == (cold, 0)
        producer.settle()
    assert producer.count("saved_bytes") > 0
    assert producer.count("lost_tokens:chosen:role") == 320
    assert producer.count("loaded_bytes") == 0
    assert consumer.ask(PROMPT) == (cold, 320)
    consumer.settle()
    assert not producer.connector.requires_kv_delivery


def test_workers_that_are_not_heard_at_the_start_are_in_their_first_step(
    node: Node, rig: Callable[..., Rig]
) -> None:
    """As in a MultiConnector, whose first connector with a greeting speaks alone."""
    engine = rig(transfer(node), [full()], ranks=2, model="late", greets=False)
    cold, _ = engine.ask(PROMPT)
    assert engine.count("lost_tokens:looked_up:not_named") == 320
    engine.settle()
    assert engine.ask(PROMPT) == (cold, 320)
    engine.settle()


def beside_example(node: Node, folder: Path, *, first: str) -> dict[str, Any]:
    example = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    children = [transfer(node), example]
    if first != "kvar":
        children.reverse()
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": children},
    }


@pytest.mark.parametrize("first", ["kvar", "example"])
def test_beside_another_connector_both_save_and_the_first_with_a_hit_loads(
    first: str, node: Node, tmp_path: Path, rig: Callable[..., Rig]
) -> None:
    setting = beside_example(node, tmp_path, first=first)
    # The other one saves a prompt that is computed in one step.
    engine = rig(setting, [full()], model=f"beside/{first}", step_tokens=512)
    assert type(engine.connector).__name__ == "MultiConnector"
    cold, _ = engine.ask(PROMPT)
    engine.settle()
    saved = list(tmp_path.rglob("*.safetensors"))
    assert len(saved) == 2 and engine.count("saved_bytes") > 0
    # The pages that the other one fills are compared as ours are.
    warm, hit = engine.ask(PROMPT)
    assert warm == cold
    if first == "kvar":
        assert hit == 320 and engine.count("loaded_bytes") > 0
    else:
        assert hit == 0 and engine.count("loaded_bytes") == 0
        assert engine.count("lost_tokens:chosen:declined") == 320
    engine.settle()
    # Alone, ours has it too.
    alone = rig(transfer(node), [full()], model=f"beside/{first}")
    assert alone.ask(PROMPT) == (cold, 320)
    alone.settle()


def test_a_multi_connector_finds_our_counts_by_name() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    import kvar.vllm.connector  # noqa: F401  (as vLLM's API server does when it starts)

    said = MultiConnector.build_kv_connector_stats({"KvarConnector": {"saved_bytes": 5}})
    assert said is not None
    assert said.reduce() == {"KvarConnector": {"kvar_saved_bytes": 5}}


@pytest.mark.parametrize("kind", ["one group", "unequal blocks"])
def test_a_router_hears_what_is_stored_under_the_engines_own_names(
    kind: str, node: Node, rig: Callable[..., Rig]
) -> None:
    import msgspec
    from vllm.distributed.kv_events import KVEventBatch

    specs = specs_of(kind)
    engine = rig(transfer(node), specs, model=f"events/{kind}", events=True)
    engine.ask(PROMPT)
    engine.settle()

    def told(medium: str, group: int) -> dict[Any, Any]:
        """For each block its parent, tokens and keys."""
        blocks = {}
        for event in engine.events:
            if getattr(event, "medium", None) != medium or event.group_idx != group:
                continue
            size, parent = event.block_size, event.parent_block_hash
            for place, name in enumerate(event.block_hashes):
                tokens = tuple(event.token_ids[place * size : (place + 1) * size])
                blocks[name] = (parent, tokens, event.extra_keys and event.extra_keys[place])
                parent = name
        return blocks

    for group, spec in enumerate(specs):
        stored = told("STORAGE", group)
        full_blocks = (len(PROMPT) + 1) // spec.block_size
        assert len(stored) == full_blocks
        own = told("GPU", group)
        assert own and all(stored[name] == said for name, said in own.items())
        assert [said[1] for said in stored.values()] == [
            tuple(PROMPT[n * spec.block_size : (n + 1) * spec.block_size])
            for n in range(full_blocks)
        ]
    ours = [event for event in engine.events if getattr(event, "medium", "") == "STORAGE"]
    assert {(event.locality, event.ownership) for event in ours} == {("REMOTE", "kvar")}
    # In the form that vLLM's publisher sends.
    assert msgspec.msgpack.Encoder().encode(KVEventBatch(ts=0.0, events=ours))
    kinds = {event.kv_cache_spec_kind for event in ours}
    assert kinds == {"full_attention"} | ({"sliding_window"} if len(specs) > 1 else set())


def test_nobody_hears_of_what_was_not_stored(
    node: Node, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvar.vllm.worker import Mover

    engine = rig(transfer(node), [full()], model="untold", events=True)
    monkeypatch.setattr(Mover, "start_save", lambda self, order, *_: self.refuse_save(order))
    engine.ask(PROMPT)
    engine.settle()
    assert {getattr(event, "medium", "GPU") for event in engine.events} == {"GPU"}


def test_loads_by_layers_are_there_in_the_step_that_orders_them(
    node: Node, rig: Callable[..., Rig]
) -> None:
    engine = rig(transfer(node, load="layers"), [full()], model="layers")
    cold, _ = engine.ask(PROMPT)
    engine.settle()
    assert engine.ask(PROMPT) == (cold, 320)
    engine.settle()
    assert engine.count("layered_load_seconds") > 0
    assert engine.count("lost_tokens:full_blocks:partial_block") == 2 * 13


@pytest.mark.parametrize("save", ["after", "layers"])
@pytest.mark.parametrize("kind", ["one group", "gemma"])
def test_requests_that_are_preempted_end_with_the_same_answers(
    save: str, kind: str, node: Node, rig: Callable[..., Rig]
) -> None:
    prompts = [[number, *PROMPT[: 150 + 10 * number]] for number in range(6)]
    roomy = rig(transfer(node, mode="off"), specs_of(kind), blocks=2000)
    expected = roomy.ask_all(prompts, answer=60)
    roomy.settle()
    # Half of what all of them would take at their ends.
    blocks = 40 if kind == "one group" else 80
    tight = rig(
        transfer(node, save=save), specs_of(kind), blocks=blocks, model=f"preempted/{kind}/{save}"
    )
    tight.wait_for_saves()
    for _ in range(2):
        assert tight.ask_all(prompts, answer=60) == expected
        tight.settle()
    assert tight.count("readmitted_tokens") > 0, "nobody was preempted"
    assert tight.count("funnel_tokens:used") > 0
    lost = sum(said for name, said in tight.counts.items() if name.startswith("lost_tokens"))
    ended = tight.count("funnel_tokens:local") + tight.count("funnel_tokens:used")
    assert tight.count("funnel_tokens:prompt") == ended + lost


@pytest.mark.parametrize("save", ["after", "layers"])
def test_a_node_that_dies_costs_no_answer(
    save: str, own_node: Node, rig: Callable[..., Rig]
) -> None:
    engine = rig(transfer(own_node, deadline_ms=1000, save=save), specs_of("gemma"))
    cold, _ = engine.ask(PROMPT)
    engine.settle()
    waiting = engine.submit(PROMPT)
    # Its load is ordered; the node is gone before it is there.
    own_node.kill()
    engine.until(waiting.is_finished)
    assert list(waiting.output_token_ids) == cold
    engine.settle()
    assert engine.ask(PROMPT) == (cold, 0)
    engine.settle()
    assert engine.count("lost_tokens:looked_up:store_away") > 0


@pytest.mark.parametrize("save", ["after", "layers"])
def test_after_a_reset_from_outside_nothing_older_comes_back(
    save: str, node: Node, rig: Callable[..., Rig]
) -> None:
    engine = rig(transfer(node, save=save), specs_of("gemma"), model=f"reset/{save}")
    cold, _ = engine.ask(PROMPT)
    engine.settle()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert engine.ask(PROMPT) == (cold, 0)
    engine.settle()
    assert engine.ask(PROMPT) == (cold, 320)
    engine.settle()


@pytest.mark.parametrize("save", ["after", "layers"])
@pytest.mark.parametrize("kind", ["one group", "gemma"])
def test_a_request_that_is_aborted_holds_nothing(
    save: str, kind: str, node: Node, rig: Callable[..., Rig]
) -> None:
    from vllm.v1.request import RequestStatus

    engine = rig(transfer(node, save=save), specs_of(kind), model=f"aborted/{kind}/{save}")
    cold, _ = engine.ask(PROMPT)
    engine.settle()
    for prompt, steps in ((PROMPT, 1), (OTHER[::-1], 2)):
        # Its load has begun; of the other one, a part is computed and being saved.
        request = engine.submit(prompt)
        for _ in range(steps):
            engine.step()
        assert not request.is_finished()
        engine.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
        engine.settle()
    assert engine.count("lost_tokens:loaded:aborted") + engine.count("lost_tokens:used:aborted")
    assert engine.ask(PROMPT) == (cold, 320)
    engine.settle()


def test_the_store_is_asked_when_a_request_arrives(
    node: Node, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvar.vllm.link import Link

    engine = rig(transfer(node), specs_of("gemma"), model="early")
    cold, _ = engine.ask(PROMPT)
    engine.settle()
    begun: list[Any] = []
    taken: list[Any] = []
    begin, take = Link.begin_lookup, Link.lookup_leased

    def beginning(self: Link, *arguments: Any) -> Any:
        begun.append(begin(self, *arguments))
        return begun[-1]

    def taking(self: Link, *arguments: Any) -> Any:
        taken.append(arguments[-1])
        return take(self, *arguments)

    monkeypatch.setattr(Link, "begin_lookup", beginning)
    monkeypatch.setattr(Link, "lookup_leased", taking)
    request = engine.submit(PROMPT)
    assert len(begun) == 1 and not taken
    engine.until(request.is_finished)
    assert taken[0] is begun[0] and len(begun) == 1
    assert list(request.output_token_ids) == cold
    engine.settle()
    assert engine.count("funnel_tokens:used") == 320


def test_only_steps_that_compute_nothing_wait(
    node: Node, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvar.vllm.connector import KvarConnector
    from kvar.vllm.worker import Mover

    steps: list[int] = []
    waits: list[int] = []
    bind = KvarConnector.bind_connector_metadata

    def binding(self: KvarConnector, metadata: Any) -> None:
        steps.append(metadata.orders.tokens)
        bind(self, metadata)

    monkeypatch.setattr(KvarConnector, "bind_connector_metadata", binding)
    monkeypatch.setattr(Mover, "wait", lambda self: waits.append(steps[-1]))
    engine = rig(transfer(node), [full()], model="waits")
    engine.ask(PROMPT)
    engine.settle()
    engine.ask(PROMPT)
    engine.settle()
    assert waits and set(waits) == {0}
    assert len(waits) == steps.count(0) < len(steps)
