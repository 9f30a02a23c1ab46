#!/usr/bin/env python3
"""Kills a node with SIGKILL at random moments of a replay, opens it again and asks for everything.

    cargo build --release -p kvar && scripts/kill-loop.py [--rounds 20] [--seed 1] [--loop-device | --two-tiers]

Each round: the conversation trace (blocks of another size, so of other ids) goes through the node
with every acknowledged put and remove in a journal; kill -9 after 12 to 25 s; reopen; `kvar replay
--verify` reads every journalled block back. Fails on a wrong byte, a removed block that is back,
a settled block (acknowledged more than twice flush_after before the kill) that is a miss, or when
settled blocks are fewer than 80 % of the acknowledged bytes.

With --loop-device the store is a raw block device: a loop device over a file, made here and removed at
the end (root alone may do that).

With --two-tiers the store is a small fast file and a large big one: most of what is settled went down from the
one to the other. Puts may come faster than a disk that both share can take them down, and what reclaim drops
for that is no broken promise: the node counts what did not get down, and is asked for its counts just before it is
killed. No more settled blocks may be misses than it counted, and a fiftieth for what came after it was asked. (What
the big tier itself lets go when it is full is older than the round, and is allowed to nobody.)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRACE = ROOT / "traces" / "mooncake-conversation.jsonl.zst"
SETTLED_SHARE_MIN = 0.80
SIZE_BYTES = 6 << 30
FAST_BYTES = 1 << 30
UNCOUNTED_SHARE_MAX = 0.02
CROWDED_OUT = re.compile(r'^kvar_evictions_total\{cause="bucket"\} (\d+)', re.MULTILINE)
NOT_DEMOTED = re.compile(r'^kvar_not_demoted_total\{reason="(\w+)"\} (\d+)', re.MULTILINE)


class LoopDevice:
    """A block device over a file of that folder."""

    def __init__(self, folder: Path) -> None:
        if os.geteuid() != 0:
            sys.exit("--loop-device: only root may make a loop device; run it as root, or leave the option out")
        if shutil.which("losetup") is None:
            sys.exit("--loop-device: losetup is not installed (it comes with util-linux)")
        image = folder / "loop-image"
        with image.open("wb") as file:
            file.truncate(SIZE_BYTES)
        made = subprocess.run(
            ["losetup", "--find", "--show", "--direct-io=on", image], capture_output=True, text=True, check=False
        )
        if made.returncode != 0:
            sys.exit(f"--loop-device: no loop device can be had: {made.stderr.strip()}")
        self.path = Path(made.stdout.strip())

    def remove(self) -> None:
        gone = subprocess.run(["losetup", "--detach", self.path], capture_output=True, text=True, check=False)
        if gone.returncode != 0:
            print(f"{self.path} is still there, take it away with losetup -d: {gone.stderr.strip()}", file=sys.stderr)


class Node:
    def __init__(self, kvar: Path, folder: Path, data: list[str]) -> None:
        self.ready = folder / "ready"
        self.ready.unlink(missing_ok=True)
        self.key = folder / "data.key"
        began = time.monotonic()
        self.process = subprocess.Popen(
            [kvar, "serve", "--dram", "256MiB", "--shards", "2", "--key-file", self.key]
            + [word for each in data for word in ("--data", each)]
            + ["--expected-block-bytes", "8KiB", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
            + ["--flush-after", "1s", "--log", "error", "--ready-file", self.ready]
            # All is written within flush_after: what waits in memory for want of a budget a kill may take.
            + ["--flash-write-budget", "unlimited"]
        )
        while not self.ready.exists():
            if self.process.poll() is not None:
                sys.exit(f"the node ended with {self.process.returncode} before it was ready")
            time.sleep(0.01)
        self.seconds = time.monotonic() - began
        listens = json.loads(self.ready.read_text())
        self.endpoint, self.admin = listens["listen"], listens["admin"]

    def arguments(self) -> list[str]:
        return ["--endpoint", self.endpoint, "--key-file", str(self.key)]

    def not_kept(self) -> dict[str, int]:
        """Blocks that did not get down to the big tier, or were crowded out of the index, by its own count."""
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        counts = [*NOT_DEMOTED.findall(metrics), *(("bucket", count) for count in CROWDED_OUT.findall(metrics))]
        return {reason: int(count) for reason, count in counts if count != "0"}

    def kill(self) -> int:
        """Kills it; when that was, in microseconds of the monotonic clock."""
        self.process.kill()
        moment = time.monotonic_ns() // 1000
        self.process.wait()
        return moment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--kvar", type=Path, default=target / "release" / "kvar")
    parser.add_argument("--loop-device", action="store_true", help="a raw block device instead of a file; root only")
    parser.add_argument("--two-tiers", action="store_true", help="a fast file, and a big one below it")
    options = parser.parse_args()
    if options.two_tiers and options.loop_device:
        parser.error("--two-tiers uses files: leave --loop-device out")
    # So that what was made is taken away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    dice = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kvar-kills-"))
    node = None
    loop = None
    data = [f"{folder / 'data'}={SIZE_BYTES}"]
    try:
        if options.loop_device:
            loop = LoopDevice(folder)
            data = [str(loop.path)]
        if options.two_tiers:
            data = [f"{folder / 'fast'}={FAST_BYTES}", f"{folder / 'big'}={SIZE_BYTES},big"]
        node = Node(options.kvar, folder, data)
        settled_bytes_share = []
        for number in range(options.rounds):
            journal = folder / f"journal-{number}"
            replay = subprocess.Popen(
                [options.kvar, "replay", TRACE, "--block-bytes", str(8192 + 512 * number), "--remove-every", "9"]
                + ["--journal", journal, "--deadline", "3s", "--json"] + node.arguments(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(dice.uniform(12, 25))
            not_kept = node.not_kept() if options.two_tiers else {}
            killed = node.kill()
            replay.wait()
            node = Node(options.kvar, folder, data)
            verified = subprocess.run(
                [options.kvar, "replay", "--verify", journal, "--older-than", "2s", "--killed-at-us", str(killed)]
                + ["--json"] + node.arguments(),
                capture_output=True,
                text=True,
                check=False,
            )
            if not verified.stdout:
                sys.exit(f"round {number}: {verified.stderr}")
            found = json.loads(verified.stdout)
            settled_bytes_share.append(found["settled_share_of_bytes"])
            print(
                f"round {number:2}: {found['acknowledged']} acknowledged, {found['settled']} settled "
                f"({100 * found['settled_share_of_bytes']:.0f} % of bytes), {found['settled_hits']} of them hits, "
                f"{found['removed']} removed, {found['removed_but_back']} back, wrong bytes {found['wrong_bytes']}, "
                f"not kept {not_kept}, ready again in {node.seconds:.2f} s",
                flush=True,
            )
            uncounted = UNCOUNTED_SHARE_MAX * found["settled"] if options.two_tiers else 0
            hits_min = found["settled"] - sum(not_kept.values()) - uncounted
            bad = found["wrong_bytes"] or found["removed_but_back"] or found["settled_hits"] < hits_min
            if bad:
                sys.exit(f"round {number} broke a promise: {verified.stdout}")
        share = min(settled_bytes_share)
        print(f"{options.rounds} kills: 0 wrong bytes, nothing removed came back; settled at least {100 * share:.0f} %")
        if sum(settled_bytes_share) / len(settled_bytes_share) < SETTLED_SHARE_MIN:
            sys.exit(f"settled blocks are less than {100 * SETTLED_SHARE_MIN:.0f} % of the acknowledged bytes")
    finally:
        if node is not None:
            node.process.kill()
            node.process.wait()
        if loop is not None:
            loop.remove()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
