"""Which set-ups of vLLM the connector keeps right, and which it must not start in.

A refusal names the setting and what to write instead. What is not refused is described for the
rest of the connector as :class:`kvar.vllm.groups.Groups`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    HiddenStateCacheSpec,
    KVCacheSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvar.vllm.groups import Group, Groups
from kvar.vllm.settings import LoadWay, SaveWay, SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# These look like what they extend and keep their KV by other rules.
WITH_RULES_OF_THEIR_OWN = (
    HiddenStateCacheSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowMLASpec,
)


def groups_of(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    load: LoadWay = LoadWay.ASYNC,
    save: SaveWay = SaveWay.AFTER,
) -> Groups:
    """The groups of layers of this engine.

    Raises :class:`SettingsError` for set-ups whose KV this connector would not keep right.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_load_failure_policy == "fail":
        raise SettingsError(
            'kvar: kv_load_failure_policy is "fail" (vLLM\'s default), so that a block lost '
            "between lookup and load would end its request with an error. "
            'Set "kv_load_failure_policy": "recompute" in --kv-transfer-config.'
        )
    if not vllm_config.cache_config.enable_prefix_caching:
        raise SettingsError(
            "kvar: prefix caching is off, and with it the block hashes that name KV. "
            "Start vLLM with --enable-prefix-caching."
        )
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise SettingsError(
            "kvar: context parallelism spreads one block over ranks by token, which this "
            "connector does not store. Set the context-parallel sizes to 1."
        )
    if save is SaveWay.LAYERS:
        _refuse_save_by_layers(vllm_config)
    engines = kv_cache_config.kv_cache_groups
    if len(engines) > 1 and any(group.is_eagle_group for group in engines):
        raise SettingsError(
            "kvar: a draft model's layers are in a group of their own, whose hits vLLM shortens "
            "by a block. Start vLLM without speculative decoding, or with "
            "--disable-hybrid-kv-cache-manager."
        )
    groups = [
        Group(number, group.kv_cache_spec.block_size, window_of(group.kv_cache_spec))
        for number, group in enumerate(engines)
    ]
    block_tokens = vllm_config.cache_config.block_size
    hash_tokens = kv_cache_config.hash_block_size or block_tokens
    if len(groups) == 1 and {hash_tokens, groups[0].block_tokens} != {block_tokens}:
        raise SettingsError(
            f"kvar: blocks of {groups[0].block_tokens} tokens, hashed by {hash_tokens}, configured "
            f"as {block_tokens}: set --block-size to a size that the attention backend uses as it "
            "is"
        )
    if any(group.block_tokens % hash_tokens for group in groups):
        raise SettingsError(
            f"kvar: hashes of {hash_tokens} tokens do not fit blocks of "
            f"{', '.join(str(group.block_tokens) for group in groups)}: leave --prefix-match-unit "
            "to vLLM"
        )
    found = Groups(groups, hash_tokens)
    if load is LoadWay.LAYERS and found.fail_whole:
        raise SettingsError(
            f"kvar: load is layers, and the model's KV cache has {len(groups)} groups or a sliding "
            "window: vLLM can be told of a failure in the step only where there is one group of "
            "full attention. Set load to async, or start vLLM with "
            "--disable-hybrid-kv-cache-manager."
        )
    return found


def _refuse_save_by_layers(vllm_config: VllmConfig) -> None:
    """A layer must be computed for all of the step's tokens when its hook is called."""
    if vllm_config.speculative_config is not None:
        raise SettingsError(
            "kvar: save is layers, and a draft model's layers are computed several times a step. "
            "Set save to after, or start vLLM without speculative decoding."
        )
    if vllm_config.parallel_config.use_ubatching:
        raise SettingsError(
            "kvar: save is layers, and the step is computed in several batches, each of which "
            "calls a layer's hook. Set save to after, or start vLLM without --enable-dbo and "
            "--ubatch-size."
        )


def window_of(spec: KVCacheSpec) -> int | None:
    """How far layers of this kind look back; None: to the beginning."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        windows = {window_of(one) for one in spec.kv_cache_specs.values()}
        if len(windows) > 1:
            raise SettingsError(
                f"kvar: layers of one group look back by {windows} tokens; this connector needs "
                "one window a group. Start vLLM with --disable-hybrid-kv-cache-manager."
            )
        return windows.pop()
    if not isinstance(spec, WITH_RULES_OF_THEIR_OWN):
        if isinstance(spec, FullAttentionSpec):
            return None
        if isinstance(spec, SlidingWindowSpec):
            return int(spec.sliding_window + spec.extra_retained_tokens)
    raise SettingsError(
        f"kvar: {type(spec).__name__} layers keep their KV by rules that this connector has not; "
        "it knows full attention and sliding windows. Try "
        "--disable-hybrid-kv-cache-manager, or run this model without it."
    )
