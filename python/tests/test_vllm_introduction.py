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
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1),
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="recompute"),
    )


def test_the_name_says_what_blocks_are_made_of() -> None:
    assert introduction(config(), "0.32.1+cpu", "worker", {}) == (
        "vllm 0.32; dtype=bfloat16; block=16; hash=sha256; seed=fixed; ranks=2; "
        "policy=recompute; role=worker; model=/models/m"
    )
    assert "seed=random" in introduction(config(hash_algo="xxhash_cbor"), "0.32.0", "worker", {})
    seeded = introduction(config(), "0.32.0", "worker", {"PYTHONHASHSEED": "7"})
    assert "seed=7" in seeded


@pytest.mark.parametrize("model", ["/a;b=c/" + "é" * 500, "x" * 500, "m"])
def test_any_model_name_fits_and_breaks_nothing(model: str) -> None:
    name = introduction(config(model), "0.32.0", "scheduler", {})
    assert len(name.encode()) <= module.NAME_BYTES_MAX
    assert name.count(";") == 8
    assert "; role=scheduler; model=" in name


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "nightly", ""])
def test_versions_that_were_not_tried_are_told_apart(version: str) -> None:
    assert not is_tried(version)
    assert "off: vLLM" in untried(version)
    assert is_tried("0.32.5.dev1+cpu")


def test_the_examples_hold() -> None:
    assert doctest.testmod(module).failed == 0
