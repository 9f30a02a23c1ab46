"""What a report must say of where its figures come from."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def facts(kvar: Path | None, model: str) -> dict[str, str]:
    """Model, versions, commit, machine; load is the runner's to add."""
    import torch
    import vllm

    found = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "model": Path(model).name if Path(model).exists() else model,
        "vLLM": vllm.__version__,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "commit": _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        "machine": f"{os.cpu_count()} cores, {_cpu()}, {_memory_gib()} GiB",
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    if kvar is not None:
        found["kvar"] = _output([str(kvar), "--version"])
    return found


def load() -> float:
    """Processes that wanted to run, over the last minute."""
    return round(os.getloadavg()[0], 2)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cpu() -> str:
    return _field(Path("/proc/cpuinfo"), "model name", "unknown")


def _memory_gib() -> int:
    return int(_field(Path("/proc/meminfo"), "MemTotal", "0 kB").split()[0]) >> 20


def _field(path: Path, name: str, default: str) -> str:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return default


def percentile(values: list[float], part: float) -> float:
    """The value below which this part of all lie, by rank; 0 of none."""
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def spread(values: list[float]) -> dict[str, Any]:
    """Count, mean, median, p99."""
    return {
        "count": len(values),
        "mean": sum(values) / len(values) if values else 0.0,
        "p50": percentile(values, 0.5),
        "p99": percentile(values, 0.99),
    }
