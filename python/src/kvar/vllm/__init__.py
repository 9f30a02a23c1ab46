"""kvar for vLLM: ``--kv-transfer-config`` with ``kv_connector_module_path`` set to this module.

```json
{"kv_connector": "KvarConnector", "kv_connector_module_path": "kvar.vllm", "kv_role": "kv_both",
 "kv_load_failure_policy": "recompute",
 "kv_connector_extra_config": {"endpoint": "127.0.0.1:7411",
                               "namespace_key_file": "/var/lib/kvar/data.key"}}
```

Parts, from the top: ``connector`` speaks vLLM; ``planner`` decides (scheduler process), ``worker``
moves (worker process), ``orders`` is what passes between them; ``pages`` knows the engine's
memory, ``link`` the store, ``finder`` what of a prompt is in it, ``groups`` what a hit needs of
each kind of layer; ``settings``, ``refusals`` and ``fingerprint`` say what is checked and what is
named; ``metrics``, ``funnel`` and ``stats`` what is counted. vLLM is imported by ``connector``,
``refusals`` and ``stats`` only, when the connector is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvar.vllm.connector import KvarConnector

__all__ = ["KvarConnector"]


def __getattr__(name: str) -> object:
    if name == "KvarConnector":
        from kvar.vllm.connector import KvarConnector

        return KvarConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
