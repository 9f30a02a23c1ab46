"""The operator's switch, from `kvar mode` to the client and the connector's link."""

from __future__ import annotations

import os
import time
from functools import partial

from conftest import Node, until

import kvar
from kvar.vllm.link import Link
from kvar.vllm.settings import Mode, Settings


def test_a_client_is_told_of_a_switch_and_asks_for_nothing_meanwhile(own_node: Node) -> None:
    with own_node.client() as shared, own_node.client(link="tcp") as plain:
        clients = (shared, plain)

        def all_know(mode: str) -> bool:
            return all(client.mode == mode for client in clients)

        assert [client.mode for client in clients] == ["load", "load"]
        for mode in ("observe", "off", "save", "load", "off"):
            own_node.switch(mode)
            begun = time.monotonic()
            until(partial(all_know, mode))
            assert time.monotonic() - begun < 1
        # One that comes later knows it before its first call, and calls go on in every mode.
        with own_node.client() as late:
            assert late.mode == "off"
            name = kvar.id_from_name(own_node.key, "in every mode")
            assert late.put([(name, b"x")]) == ["stored"]
            assert late.get_bytes(name) == b"x"
        used = process_seconds()
        time.sleep(0.5)
        # Idle, nothing is asked and nothing is looked at.
        assert process_seconds() - used < 0.1


def process_seconds() -> float:
    times = os.times()
    return times.user + times.system


def test_the_connectors_link_obeys_the_lesser_of_setting_and_switch(own_node: Node) -> None:
    settings = Settings.from_extra_config(
        {
            "endpoint": own_node.endpoint,
            "namespace_key_file": str(own_node.key_file),
            "mode": "save",
        }
    )
    link = Link.to(settings)
    assert link.mode() is Mode.LOAD
    assert settings.mode.within(link.mode()) is Mode.SAVE
    own_node.switch("observe")
    until(lambda: link.mode() is Mode.OBSERVE)
    assert settings.mode.within(link.mode()) is Mode.OBSERVE
    # The last word holds while the node is away, and after its restart.
    own_node.stop()
    assert link.mode() is Mode.OBSERVE
    own_node.start()
    own_node.switch("off")
    # Nobody calls a store that is off: the client finds its way back by itself.
    until(lambda: link.mode() is Mode.OFF)
    link.close()
    assert link.mode() is Mode.OFF
