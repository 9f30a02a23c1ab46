"""Set-ups the connector must not start in. Needs vLLM: the end-to-end run has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
interface: Any = pytest.importorskip("vllm.v1.kv_cache_interface")


def spec(kind: str = "FullAttentionSpec", block_size: int = 32, **more: object) -> Any:
    import torch

    return getattr(interface, kind)(
        block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.float32, **more
    )


def check(
    *,
    policy: str = "recompute",
    caching: bool = True,
    specs: list[Any] | None = None,
    hashed: int = 32,
    context: int = 1,
) -> None:
    from kvar.vllm.connector import refuse_what_cannot_work

    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy),
        cache_config=SimpleNamespace(enable_prefix_caching=caching, block_size=32),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=context, prefill_context_parallel_size=1
        ),
    )
    groups = [SimpleNamespace(kv_cache_spec=one) for one in specs or [spec()]]
    cache = SimpleNamespace(kv_cache_groups=groups, hash_block_size=hashed)
    refuse_what_cannot_work(config, cache)


def test_the_usual_set_up_starts() -> None:
    check()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "fail"}, '"kv_load_failure_policy": "recompute"'),
        ({"caching": False}, "--enable-prefix-caching"),
        ({"hashed": 16}, "--block-size"),
        ({"context": 2}, "context-parallel"),
    ],
)
def test_a_refusal_names_the_setting_and_the_fix(change: dict[str, Any], words: str) -> None:
    from kvar.vllm.settings import SettingsError

    with pytest.raises(SettingsError, match=words):
        check(**change)


def test_layers_that_drop_their_kv_are_refused() -> None:
    from kvar.vllm.settings import SettingsError

    with pytest.raises(SettingsError, match="--disable-hybrid-kv-cache-manager"):
        check(specs=[spec(), spec()])
    with pytest.raises(SettingsError, match="SlidingWindowSpec"):
        check(specs=[spec("SlidingWindowSpec", sliding_window=128)])


def test_an_untried_vllm_runs_without_the_store(
    node: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    import vllm
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from kvar.vllm import KvarConnector

    extra = {"endpoint": node.endpoint, "namespace_key_file": str(node.key_file)}
    config = SimpleNamespace(
        # What a tried one would refuse at once.
        kv_transfer_config=SimpleNamespace(
            kv_load_failure_policy="fail",
            kv_connector_extra_config=extra,
            is_kv_consumer=True,
            is_kv_producer=True,
        ),
        cache_config=SimpleNamespace(
            enable_prefix_caching=False, block_size=32, prefix_caching_hash_algo="sha256"
        ),
        model_config=SimpleNamespace(model="m", dtype="torch.float32"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
    )
    cache = SimpleNamespace(kv_cache_groups=[], hash_block_size=32, num_blocks=8)
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    log = logging.getLogger("vllm.kvar")
    log.addHandler(caplog.handler)
    try:
        worker = KvarConnector(config, KVConnectorRole.WORKER, cache)
        scheduler = KvarConnector(config, KVConnectorRole.SCHEDULER, cache)
    finally:
        log.removeHandler(caplog.handler)
    assert "off: vLLM 0.99.0 was not tried" in caplog.text
    # Nothing is taken, nothing said, nothing asked.
    worker.register_kv_caches({})
    assert worker.get_handshake_metadata() is None
    scheduler.set_xfer_handshake_metadata_pp_aware({})
    request = SimpleNamespace(skip_reading_prefix_cache=False, request_id="r")
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    worker.shutdown()
    scheduler.shutdown()
