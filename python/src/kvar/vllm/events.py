"""What a router is told: which blocks this engine has put into the store.

vLLM publishes KV events (``--kv-events-config``); the connector adds one ``BlockStored`` for each
save that the node has taken whole, in vLLM's own form: medium ``STORAGE``, locality ``REMOTE``,
ownership ``kvar``. Hashes, tokens and keys are those that vLLM publishes for the same blocks in its
own memory, so that a router finds them under one name.

There is no ``BlockRemoved``: what a shared store lets go of it tells no engine, and a router that
sends a request here for such a block costs a miss. A lookup is the only word on what is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed.kv_events import MEDIUM_STORAGE, BlockStored
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)
from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind, get_kv_cache_spec_sliding_window

from kvar.vllm.groups import Group, Groups

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

OWNERSHIP = "kvar"
LOCALITY = "REMOTE"


class EventMaker:
    """Makes the events of one engine."""

    def __init__(self, groups: Groups, kv_cache_config: KVCacheConfig) -> None:
        self._groups = groups
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self._kinds = [get_kv_cache_spec_kind(spec) for spec in specs]
        self._windows = [get_kv_cache_spec_sliding_window(spec) for spec in specs]

    def stored(self, request: Request, group: Group, first: int, last: int) -> BlockStored:
        """That blocks ``first`` to ``last`` (without it) of a group are stored."""
        chain, size = request.block_hashes, group.block_tokens
        names = self._groups.hashes(group, chain, max(first - 1, 0), last)
        parent = names.pop(0) if first else None
        extra_keys, image = [], 0
        for position in range(first, last):
            keys, image = generate_block_hash_extra_keys(
                request, position * size, (position + 1) * size, image
            )
            extra_keys.append(keys)
        lora = request.lora_request
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(name) for name in names],
            parent_block_hash=maybe_convert_block_hash(parent) if parent is not None else None,
            token_ids=list(request.all_token_ids[first * size : last * size]),
            block_size=size,
            lora_id=lora.adapter_id if lora else None,
            lora_name=lora.name if lora else None,
            medium=MEDIUM_STORAGE,
            extra_keys=to_event_extra_keys(extra_keys),
            group_idx=group.number,
            kv_cache_spec_kind=self._kinds[group.number].value,
            kv_cache_spec_sliding_window=self._windows[group.number],
            locality=LOCALITY,
            ownership=OWNERSHIP,
            session_id=request.session_id,
        )
