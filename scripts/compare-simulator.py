#!/usr/bin/env python3
"""Do LRU and the optimum of `kvar replay --offline` agree with kvcache-simulator?

Replays the same requests through both, at the same capacities, and compares the token hit rates to
the digit that both print. The simulator counts the second half of the requests only, after the
cache has been full once; so does `--warmup-share 0.5`. It knows no outputs: requests that
cover more than their input are written with all their ids as input, for both.

    pip install kvcache-simulator==0.1.3 zstandard
    compare-simulator.py KVAR TRACE.jsonl.zst [COARSEN]
"""

import io
import json
import pathlib
import subprocess
import sys
import tempfile

import zstandard
from kvcache_sim.plan import build_execution_plan
from kvcache_sim.policies import simulate_policy
from kvcache_sim.trace import parse_trace_lines

PERCENTS = [1, 2, 5, 10, 20]
WARMUP_SHARE = 0.5


def requests(path: pathlib.Path, coarsen: int) -> list[dict[str, object]]:
    """The requests of a trace, all ids standing for input."""
    kept = []
    with path.open("rb") as raw:
        for text in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw)):
            line = json.loads(text)
            ids = line["hash_ids"]
            length = line["input_length"]
            if coarsen > 1:
                ids = ids[coarsen - 1 :: coarsen]
                length = len(ids) * 16 * coarsen
            if ids:
                kept.append(
                    {
                        "timestamp": line["timestamp"],
                        "input_length": length,
                        "output_length": 0,
                        "hash_ids": ids,
                    }
                )
    return kept


def main() -> int:
    """Prints both, side by side; 1 if any pair differs."""
    kvar, path = sys.argv[1], pathlib.Path(sys.argv[2])
    coarsen = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    block_tokens = 512 if coarsen == 1 else 16 * coarsen
    lines = [json.dumps(request) for request in requests(path, coarsen)]
    plan = build_execution_plan(parse_trace_lines(lines, block_size=block_tokens), WARMUP_SHARE)
    capacities = [plan.unique_blocks * percent // 100 for percent in PERCENTS]
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder) / "trace.jsonl"
        trace.write_text("\n".join(lines) + "\n")
        for policy in ("lru", "optimum"):
            command = [kvar, "replay", str(trace), "--offline", "--model", "blocks", "--json"]
            command += ["--policy", policy, "--block-tokens", str(block_tokens)]
            command += ["--warmup-share", str(WARMUP_SHARE)]
            for capacity in capacities:
                command += ["--capacity", str(capacity)]
            rows = json.loads(subprocess.check_output(command))["rows"]
            for percent, capacity, row in zip(PERCENTS, capacities, rows, strict=True):
                name = "optimal" if policy == "optimum" else policy
                theirs = f"{100 * hit_rate(simulate_policy(plan, name, capacity)):.1f}"
                ours = f"{100 * row['token_hit_rate']:.1f}"
                differing += ours != theirs
                what = f"{policy:8} {percent:3} % {capacity:8} blocks"
                print(f"{what}   kvar {ours:>5}   simulator {theirs:>5}")
    return int(differing > 0)


def hit_rate(result: object) -> float:
    """Of a simulator's result; one that never filled its cache is no figure."""
    rate = getattr(result, "hitRate", None)
    if rate is None:
        raise SystemExit(f"the simulator has no figure: {result}")
    return float(rate)


if __name__ == "__main__":
    sys.exit(main())
