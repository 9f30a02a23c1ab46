"""How an engine introduces itself to the node, and whether it is one that this was tried with.

A link carries a name; the node shows it (``/v1/status``, ``kvar doctor``), so that an operator
sees who is linked, and why two engines of one model share no block:

```text
vllm 0.32; dtype=float32; block=32; hash=sha256; seed=fixed; slices=1; groups=1; policy=recompute;
  role=worker; model=gemma-3
```

``slices`` are ranks whose KV differs, ``groups`` those of the KV cache (one without vLLM's hybrid
KV cache manager).

Nothing here decides what is loaded: blocks are told apart by their ids (``fingerprint``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

TESTED_VERSIONS = ((0, 32), (0, 33))
"""vLLM from the first up to, and without, the second."""

NAME_BYTES_MAX = 255
MODEL_BYTES_MAX = 80


def is_tried(version: str) -> bool:
    """Whether the connector was tried with this version of vLLM.

    >>> is_tried("0.32.1+cpu"), is_tried("0.33.0"), is_tried("nightly")
    (True, False, False)
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return False
    first, beyond = TESTED_VERSIONS
    return first <= (int(numbers[1]), int(numbers[2])) < beyond


def untried(version: str) -> str:
    """What is said of a version that the connector was not tried with."""
    first, beyond = (".".join(map(str, version)) for version in TESTED_VERSIONS)
    return (
        f"kvar: off: vLLM {version} was not tried (tried: from {first}, before {beyond}); the "
        "engine runs without the store. To use it all the same: "
        '"any_version": true in kv_connector_extra_config'
    )


def hash_seed(algorithm: str, environment: Mapping[str, str]) -> str:
    """What vLLM begins its chains of hashes with: ``random`` ones find nothing after a restart.

    >>> hash_seed("sha256", {}), hash_seed("xxhash", {})
    ('fixed', 'random')
    >>> hash_seed("xxhash", {"PYTHONHASHSEED": "0"})
    '0'
    """
    seed = environment.get("PYTHONHASHSEED")
    if seed is not None:
        return seed
    return "random" if algorithm.startswith("xxhash") else "fixed"


def introduction(
    vllm_config: Any,
    version: str,
    role: str,
    environment: Mapping[str, str] = os.environ,
    *,
    slices: int,
    groups: int,
) -> str:
    """The name of this engine's link."""
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    algorithm = str(getattr(cache, "prefix_caching_hash_algo", "unknown"))
    facts = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "block": cache.block_size,
        "hash": algorithm,
        "seed": hash_seed(algorithm, environment),
        "slices": slices,
        "groups": groups,
        "policy": getattr(vllm_config.kv_transfer_config, "kv_load_failure_policy", "unknown"),
        "role": role,
        "model": _end_of(str(model.model).rstrip("/")),
    }
    words = [f"vllm {'.'.join(version.split('.')[:2])}"]
    words += [f"{name}={str(value).replace(';', ',')}" for name, value in facts.items()]
    return "; ".join(words).encode()[:NAME_BYTES_MAX].decode(errors="ignore")


def _end_of(model: str) -> str:
    """The last parts of a path, which say most; alike for all roles of an engine."""
    return model.encode()[-MODEL_BYTES_MAX:].decode(errors="ignore")
