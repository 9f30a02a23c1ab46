"""How an engine introduces itself, without vLLM."""

from __future__ import annotations

import doctest
from types import SimpleNamespace

import pytest

from kvar.vllm import introduction as module
from kvar.vllm.introduction import introduction, is_tried, untried


def config(model: str = "/models/m", hash_algo: str = "sha256") -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(model=model, dtype="torch.bfloat16"),
        cache_config=SimpleNamespace(block_size=16, prefix_caching_hash_algo=hash_algo),
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="recompute"),
    )


def named(config: SimpleNamespace, environment: dict[str, str], role: str = "worker") -> str:
    return introduction(config, "0.32.0", role, environment, slices=1, groups=1)


def test_the_name_says_what_blocks_are_made_of() -> None:
    assert introduction(config(), "0.32.1+cpu", "worker", {}, slices=2, groups=6) == (
        "vllm 0.32; dtype=bfloat16; block=16; hash=sha256; seed=fixed; slices=2; groups=6; "
        "policy=recompute; role=worker; model=/models/m"
    )
    assert "seed=random" in named(config(hash_algo="xxhash_cbor"), {})
    seeded = named(config(), {"PYTHONHASHSEED": "7"})
    assert "seed=7" in seeded


@pytest.mark.parametrize("model", ["/a;b=c/" + "é" * 500, "x" * 500, "m"])
def test_any_model_name_fits_and_breaks_nothing(model: str) -> None:
    name = named(config(model), {}, role="scheduler")
    assert len(name.encode()) <= module.NAME_BYTES_MAX
    assert name.count(";") == 9
    assert "; role=scheduler; model=" in name


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "nightly", ""])
def test_versions_that_were_not_tried_are_told_apart(version: str) -> None:
    assert not is_tried(version)
    assert "off: vLLM" in untried(version)
    assert is_tried("0.32.5.dev1+cpu")


def test_the_examples_hold() -> None:
    assert doctest.testmod(module).failed == 0
