"""What must be equal for stored bytes to mean the same to this engine.

The text made here is hashed into every block id. Whatever differs in it is therefore a miss and
never misread; whatever is left out of it and still matters would be wrong KV. So when in doubt a
line is in: its price is one cold start.

```text
kvar vLLM content 1
vllm=0.32                    the order of K and V inside a page is the engine's own affair
model=weights:5f2c...        a local model by a sample of its weights, a hub model by its name
revision=None
config=91ab...               everything the model's configuration says
dtype=torch.float32  cache_dtype=torch.float32  quantization=None
block_tokens=32
layers=18                    of this rank
page=(1, 32, 512)            shape of one layer's page: KV heads, tokens, K and V content
layout=LBHNC  backend=CPU_ATTN/vec16
group=0 of 6  window=512     where layers are in several groups, or have windows
```

It is made by the worker, which alone knows backend and page shape, and handed to the scheduler
when the engine starts; both must name blocks alike. Card maker and host are not in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# 16 samples of 64 KiB a file: retrained weights differ in nearly every page, so a few would do;
# reading 1 MiB of each of some hundred files still takes well under a second.
SAMPLES_A_FILE = 16
SAMPLE_BYTES = 64 << 10

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


def fingerprint_text(facts: Iterable[tuple[str, object]]) -> str:
    r"""The canonical text: one ``name=value`` line for each fact, in the order given.

    >>> fingerprint_text([("model", "m"), ("layers", 2)])
    'kvar vLLM content 1\nmodel=m\nlayers=2\n'
    """
    lines = ["kvar vLLM content 1"]
    lines += [f"{name}={str(value).replace(chr(10), ' ')}" for name, value in facts]
    return "\n".join(lines) + "\n"


def model_name(model: str) -> str:
    """How the model is named in the fingerprint.

    A local folder or file is named by a sample of its weights: its path says nothing (the same
    model lies elsewhere on the next machine, and another one may come to lie here).
    """
    path = Path(model)
    if not path.exists():
        return f"hub:{model}"
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    weights = [file for file in files if file.suffix in WEIGHT_SUFFIXES]
    if not weights:
        return f"path:{path.resolve()}"
    digest = hashlib.sha256()
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for sample in range(SAMPLES_A_FILE):
                stream.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES_A_FILE - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return f"weights:{digest.hexdigest()[:32]}"


def config_digest(config: Mapping[str, Any]) -> str:
    """A short digest of a model configuration, without what only says where it came from."""
    kept = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name != "transformers_version"
    }
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
