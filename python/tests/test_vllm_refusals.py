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
    draft: bool = False,
    load: str = "async",
    save: str = "after",
    speculative: object = None,
    batches: bool = False,
) -> Any:
    from kvar.vllm.refusals import groups_of
    from kvar.vllm.settings import LoadWay, SaveWay

    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy),
        cache_config=SimpleNamespace(enable_prefix_caching=caching, block_size=32),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=context,
            prefill_context_parallel_size=1,
            use_ubatching=batches,
        ),
        speculative_config=speculative,
    )
    groups = [SimpleNamespace(kv_cache_spec=one, is_eagle_group=draft) for one in specs or [spec()]]
    cache = SimpleNamespace(kv_cache_groups=groups, hash_block_size=hashed)
    return groups_of(config, cache, LoadWay(load), SaveWay(save))


def test_the_usual_set_up_starts() -> None:
    groups = check()
    assert [(group.block_tokens, group.window) for group in groups.all] == [(32, None)]
    assert not groups.fail_whole


def test_full_attention_and_windows_start_in_any_number() -> None:
    windows = [spec("SlidingWindowSpec", sliding_window=512) for _ in range(5)]
    groups = check(specs=[*windows, spec(block_size=64)])
    assert [(group.block_tokens, group.window) for group in groups.all] == [
        *[(32, 512)] * 5,
        (64, None),
    ]
    assert (groups.hash_tokens, groups.hit_tokens, groups.fail_whole) == (32, 64, True)
    alike = interface.UniformTypeKVCacheSpecs(
        block_size=32,
        kv_cache_specs={name: spec("SlidingWindowSpec", sliding_window=64) for name in ("a", "b")},
    )
    assert check(specs=[alike]).all[0].window == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "fail"}, '"kv_load_failure_policy": "recompute"'),
        ({"caching": False}, "--enable-prefix-caching"),
        ({"hashed": 16}, "--block-size"),
        ({"context": 2}, "context-parallel"),
        ({"save": "layers", "speculative": object()}, "Set save to after"),
        ({"save": "layers", "batches": True}, "Set save to after"),
    ],
)
def test_a_refusal_names_the_setting_and_the_fix(change: dict[str, Any], words: str) -> None:
    from kvar.vllm.settings import SettingsError

    with pytest.raises(SettingsError, match=words):
        check(**change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"specs": ["ChunkedLocalAttentionSpec"]}, "ChunkedLocalAttentionSpec"),
        ({"specs": ["RSWASpec"]}, "RSWASpec"),
        ({"specs": ["FullAttentionSpec", "MambaSpec"]}, "MambaSpec"),
        ({"specs": ["FullAttentionSpec", "CrossAttentionSpec"]}, "CrossAttentionSpec"),
        ({"specs": ["FullAttentionSpec"] * 2, "draft": True}, "speculative"),
        ({"specs": ["FullAttentionSpec"] * 2, "hashed": 24}, "prefix-match-unit"),
        ({"specs": ["FullAttentionSpec"] * 2, "load": "layers"}, "Set load to async"),
        ({"specs": ["SlidingWindowSpec"], "load": "layers"}, "Set load to async"),
    ],
)
def test_layers_with_other_rules_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    from kvar.vllm.settings import SettingsError

    more: dict[str, dict[str, Any]] = {
        "SlidingWindowSpec": {"sliding_window": 64},
        "ChunkedLocalAttentionSpec": {"attention_chunk_size": 64},
        "RSWASpec": {"rswa_window": 64},
    }
    specs = []
    for kind in change.pop("specs"):
        if kind == "MambaSpec":
            made = interface.MambaSpec(block_size=32, shapes=((1,),), dtypes=(None,))
        else:
            made = spec(kind, **more.get(kind, {}))
        specs.append(made)
    with pytest.raises(SettingsError, match=words):
        check(specs=specs, **change)


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
        kv_events_config=None,
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
