"""``lmcache bench l2`` on kvar and on LMCache's own ``fs_native``, in turns, bytes verified.

Each run stores objects of its own, and loads them again: the first run of each is not counted (the
first touch of a page of memory costs more than storing it). ``fs_native`` leaves writing to the
kernel and loads from the page cache; kvar keeps what it stored in its own memory. Prints medians of
the runs and of the paired ratios, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from harness import arguments_of, out_folder, script
from servers import Node, say

OPERATIONS = ("Store", "Load")
RUN_S_MAX = 300
# On either side of an interval.
TAIL = 0.05


class Bench:
    """Both backends in one folder."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.folder = folder
        self.node = Node(arguments.kvar, folder / "store.kvar", folder / "node.log")

    def run(self, name: str) -> dict[str, float]:
        """One run of LMCache's benchmark: MB/s of each operation."""
        files = self.folder / "files"
        if name == "kvar":
            adapter: dict[str, Any] = {
                "type": "native_plugin",
                "module_path": "kvar.lmcache",
                "class_name": "Client",
                "adapter_params": {
                    "endpoint": self.node.endpoint,
                    "key_file": str(self.node.key_file),
                    # LMCache's benchmark gives its objects the same names every time.
                    "fingerprint": uuid.uuid4().hex,
                },
            }
        else:
            adapter = {"type": "fs_native", "base_path": str(files), "num_workers": 4}
        out = self.folder / "out.json"
        command = [sys.executable, "-m", "lmcache.cli.main", "bench", "l2"]
        command += ["--l2-adapter", json.dumps(adapter), "--no-skip-verify"]
        command += ["--num-keys", str(self.arguments.keys), "--in-flight", "4"]
        command += ["--data-size-kb", str(self.arguments.kib), "--rounds", "3"]
        command += ["--format", "json", "--output", str(out)]
        environment = dict(os.environ) | {
            "PYTHONPATH": self.arguments.overlay,
            "LMCACHE_LOG_LEVEL": "ERROR",
        }
        with (self.folder / "bench.log").open("ab") as log:
            subprocess.run(
                command, env=environment, stdout=log, stderr=log, check=True, timeout=RUN_S_MAX
            )
        metrics = json.loads(out.read_text())["metrics"]
        shutil.rmtree(files, ignore_errors=True)
        found = {}
        for value in metrics.values():
            if value.get("operation") in OPERATIONS:
                if value["total_success"] != value["total_keys"]:
                    raise SystemExit(f"{name}: {value['operation']} failed for some: {value}")
                found[value["operation"]] = float(value["throughput_avg_mbps"])
        return found


def interval(ordered: list[float]) -> tuple[float, float]:
    """The 90 % interval of the median: the order statistics that hold it with that probability."""
    count = len(ordered)
    beyond, outside = 0, 0.5**count
    while beyond + 1 < count // 2 and outside + math.comb(count, beyond + 1) * 0.5**count <= TAIL:
        beyond += 1
        outside += math.comb(count, beyond) * 0.5**count
    return ordered[beyond], ordered[-1 - beyond]


def main() -> int:
    """Runs the pairs and prints the medians."""
    parser = arguments_of(__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--kib", type=int, default=1024, help="of an object")
    parser.add_argument("--keys", type=int, default=16, help="objects of a batch; 4 are in flight")
    arguments = parser.parse_args()
    out = out_folder()
    folder = Path(tempfile.mkdtemp(prefix="lmcache-bench-", dir=out))
    bench = Bench(arguments, folder)
    runs: dict[str, list[dict[str, float]]] = {"kvar": [], "fs_native": []}
    try:
        bench.node.start()
        for pair in range(arguments.pairs + 1):
            order = ["kvar", "fs_native"] if pair % 2 == 0 else ["fs_native", "kvar"]
            for name in order:
                found = bench.run(name)
                if pair > 0:
                    runs[name].append(found)
            say(f"pair {pair} of {arguments.pairs}, load {os.getloadavg()[0]:.1f}")
    except subprocess.SubprocessError as why:
        raise SystemExit(f"a run failed ({why}); see {folder / 'bench.log'}") from None
    finally:
        bench.node.kill()
        bench.node.data.unlink(missing_ok=True)
    shutil.rmtree(folder)
    result = {}
    for operation in OPERATIONS:
        ours, theirs = ([run[operation] for run in runs[name]] for name in runs)
        ratios = sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
        low, high = interval(ratios)
        result[operation.lower()] = {
            "kvar_mb_per_s": statistics.median(ours),
            "fs_native_mb_per_s": statistics.median(theirs),
            "ratio": statistics.median(ratios),
            "ratio_low": low,
            "ratio_high": high,
        }
        print(
            f"{operation}: kvar {statistics.median(ours):.0f} MB/s, "
            f"fs_native {statistics.median(theirs):.0f} MB/s, "
            f"x{statistics.median(ratios):.2f} [{low:.2f} {high:.2f}]"
        )
    (out / "lmcache-bench.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    script(main)
