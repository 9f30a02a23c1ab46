"""Runs one scenario, or all, and writes what was found: JSON, a table, plots, one HTML page.

    scenario.py random | chat | sharing | outages | burden | all [--quick]

The same on a machine with a GPU: ``--model`` and ``--engine-arguments`` for engines started here,
or ``--engine URL`` for engines that run already (with the connector,
``--enable-prompt-tokens-details`` and VLLM_SERVER_DEV_MODE=1). Ends with 0 only if nothing failed
and every hit that must be was one; times are shown and never judged.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType, ModuleType

import burden
import chat
import facts
import outages
import pages
import random_prompts
import sharing
from engines import stage, write_json
from servers import say

SCENARIOS: dict[str, ModuleType] = {
    "random": random_prompts,
    "chat": chat,
    "sharing": sharing,
    "outages": outages,
    "burden": burden,
}
HERE = Path(__file__).parent
CPU_ARGUMENTS = "--dtype float32 --enforce-eager --max-num-seqs 4 --disable-hybrid-kv-cache-manager"
LENGTHS = [100, 1024, 4096, 8192]


def options() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("scenario", choices=[*SCENARIOS, "all"])
    add("--kvar", type=Path, help="the kvar binary, for the node (not with --engine)")
    add("--overlay", default="", help="PYTHONPATH of the kvar package, for engines started here")
    add("--model", required=True, help="the model: a folder, or a name vLLM loads by")
    add("--engine", action="append", default=[], metavar="URL", help="an engine that runs already")
    add("--served-name", default="model", help="the model's name at --engine (default: model)")
    add("--engine-arguments", default=CPU_ARGUMENTS, help=f"of vLLM (default: {CPU_ARGUMENTS})")
    add("--chat-template", type=Path, help="for a model whose tokenizer has none")
    add("--block-tokens", type=int, default=32, help="tokens a block (default: 32)")
    add("--lengths", type=int, nargs="+", default=LENGTHS, help="of random prompts, in tokens")
    add("--answers", type=int, nargs="+", default=[1, 128], help="to them, in tokens")
    add("--concurrency", type=int, nargs="+", default=[1, 4], help="of them at once")
    add("--out", type=Path, default=HERE / "out", help="where results go (default: %(default)s)")
    add("--quick", action="store_true", help="few and short requests: shows that it works")
    add("--keep", action="store_true", help="keep the logs also when all went well")
    found = parser.parse_args()
    found.cpu = not found.engine and "float32" in found.engine_arguments
    if not found.engine and found.kvar is None:
        parser.error("--kvar is needed to start a node; or give engines that run, by --engine")
    return found


def run_one(name: str, found: argparse.Namespace) -> bool:
    """One scenario; whether all was as it must be."""
    module = SCENARIOS[name]
    before, began = facts.load(), time.monotonic()
    with stage(found, name, module.FREE_GIB) as on:
        result = module.run(on)
    result["scenario"] = name
    result["quick"] = found.quick
    result["facts"] = facts.facts(found.kvar, found.model) | {
        "block": f"{found.block_tokens} tokens",
        "vLLM's arguments": found.engine_arguments if not found.engine else "not ours",
        "load": f"{before} before, {facts.load()} after",
        "took": f"{time.monotonic() - began:.0f} s",
    }
    write_json(found.out / f"{name}.json", result)
    print(pages.text(result))
    for wrong in result["wrong"]:
        print(f"WRONG: {wrong}")
    return not result["wrong"]


def main() -> int:
    """Runs what was asked for; the exit code is the verdict."""
    found = options()

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    names = list(SCENARIOS) if found.scenario == "all" else [found.scenario]
    fine = [run_one(name, found) for name in names]
    results = {}
    for name in SCENARIOS:
        path = found.out / f"{name}.json"
        if path.exists():
            results[name] = json.loads(path.read_text())
    report = pages.write(results, found.out)
    say(f"report: {report}")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted; everything was stopped")
        sys.exit(130)
