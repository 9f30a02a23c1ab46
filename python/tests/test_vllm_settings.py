"""Settings and content names of the vLLM connector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvar.vllm.choice import Override
from kvar.vllm.fingerprint import SAMPLE_BYTES, config_digest, fingerprint_text, model_name
from kvar.vllm.settings import LoadWay, Mode, SaveWay, Settings, SettingsError

NEEDED = {"endpoint": "127.0.0.1:1", "namespace_key_file": "/k"}


def test_defaults_are_the_documented_ones() -> None:
    settings = Settings.from_extra_config(NEEDED)
    expected = Settings("127.0.0.1:1", "default", "/k", Mode.LOAD, 2000, 20, 2000, Override.AUTO)
    assert settings == expected


def test_what_an_operator_says_of_the_traffic_is_taken() -> None:
    settings = Settings.from_extra_config(NEEDED | {"traffic_class": 2, "handover": True})
    assert (settings.traffic_class, settings.handover) == (2, True)


def test_loads_are_outside_the_batch_unless_layers_are_asked_for() -> None:
    assert Settings.from_extra_config(NEEDED).load is LoadWay.ASYNC
    assert Settings.from_extra_config(NEEDED | {"load": "layers"}).load is LoadWay.LAYERS


def test_saves_are_after_the_step_unless_layers_are_asked_for() -> None:
    assert Settings.from_extra_config(NEEDED).save is SaveWay.AFTER
    assert Settings.from_extra_config(NEEDED | {"save": "layers"}).save is SaveWay.LAYERS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"endpoint": None}, ["endpoint"]),
        ({"endpoint": ""}, ["endpoint", "not empty"]),
        ({"namespace": 7}, ["namespace", "7"]),
        ({"mode": "lod"}, ["'lod'", "off, observe, save, load"]),
        ({"deadline_ms": 0}, ["deadline_ms", "60000"]),
        ({"deadline_ms": "20"}, ["deadline_ms"]),
        ({"lookup_deadline_ms": True}, ["lookup_deadline_ms"]),
        ({"lease_ms": 30_001}, ["lease_ms", "30000"]),
        ({"choice": "never"}, ["'never'", "auto, always"]),
        ({"deadlin_ms": 5}, ["deadlin_ms", "deadline_ms"]),
        ({"traffic_class": 256}, ["traffic_class", "1 to 255"]),
        ({"traffic_class": True}, ["traffic_class"]),
        ({"load": "sync"}, ["'sync'", "async, layers"]),
        ({"save": "sync"}, ["'sync'", "after, layers"]),
        ({"handover": "yes"}, ["handover", "true or false"]),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SettingsError) as refusal:
        Settings.from_extra_config(NEEDED | change)
    assert all(word in str(refusal.value) for word in words)


def test_modes_do_what_their_words_say() -> None:
    assert Mode.LOAD.within(Mode.OBSERVE) is Mode.OBSERVE
    assert Mode.OFF.within(Mode.SAVE) is Mode.OFF
    does = {mode: (mode.looks_up, mode.saves, mode.loads) for mode in Mode}
    assert does == {
        Mode.OFF: (False, False, False),
        Mode.OBSERVE: (True, False, False),
        Mode.SAVE: (True, True, False),
        Mode.LOAD: (True, True, True),
    }


def test_a_local_model_is_named_by_its_weights_and_not_by_its_place(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    weights = bytearray(range(256)) * (SAMPLE_BYTES // 64)
    for folder in (here, there):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "notes.txt").write_text(str(folder))
    assert model_name(str(here)) == model_name(str(there))
    weights[-1] ^= 1
    (there / "model.safetensors").write_bytes(weights)
    assert model_name(str(here)) != model_name(str(there))
    assert model_name("org/model") == "hub:org/model"


def test_a_configuration_is_named_by_what_it_says() -> None:
    one = {"layers": 2, "rope": {"theta": 1e4}, "_name_or_path": "/a", "transformers_version": "1"}
    same = {"rope": {"theta": 1e4}, "layers": 2, "_name_or_path": "/b", "transformers_version": "2"}
    assert config_digest(one) == config_digest(same)
    assert config_digest(one) != config_digest(one | {"rope": {"theta": 1e6}})


def test_a_value_cannot_pose_as_another_line() -> None:
    honest = fingerprint_text([("model", "m"), ("layers", 2)])
    assert honest == "kvar vLLM content 1\nmodel=m\nlayers=2\n"
    assert fingerprint_text([("model", "m\nlayers=2")]) != honest
