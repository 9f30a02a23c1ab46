#!/usr/bin/env python3
"""Python gets into staging memory against gets into memory of the caller, over shared memory.

A third way is what an engine's own pages would need: into staging memory, and copied from there.
Clients and node are on this machine; turns of the three alternate, and each round gives a ratio to
plain memory. Needs the package (``pip install ./python`` or a wheel on PYTHONPATH) and a release
build::

    python3 bench/staging.py target/release/kvar
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import kvar

SIZES = (64 << 10, 1 << 20)
DEPTHS = (1, 16)
# Blocks that are read in turns: more than a core's cache holds, and less than the node's memory.
BYTES_READ = 64 << 20
START_S_MAX = 30


class Reader:
    """A client and its destinations, which are used again and again."""

    def __init__(
        self, client: kvar.Client, ids: list[bytes], size: int, depth: int, *, copied: bool = False
    ) -> None:
        self.client, self.ids, self.size, self.at = client, ids, size, 0
        self.buffers = [client.staging(size) for _ in range(depth)]
        self.pages = [memoryview(bytearray(size)) for _ in range(depth if copied else 0)]

    def turn(self, seconds: float) -> tuple[float, float, float]:
        """Reads for so long: GB/s, the median call in us, CPU seconds of this process a GB."""
        times = []
        cpu, begun = time.process_time(), time.perf_counter()
        now = begun
        while now - begun < seconds:
            ids = [self.ids[(self.at + n) % len(self.ids)] for n in range(len(self.buffers))]
            self.at += len(ids)
            results = self.client.get(list(zip(ids, self.buffers, strict=True)))
            assert all(result.outcome == "hit" for result in results), results
            for page, buffer in zip(self.pages, self.buffers, strict=False):
                page[:] = memoryview(buffer)
            was, now = now, time.perf_counter()
            times.append(now - was)
        gigabytes = len(times) * len(self.buffers) * self.size / 1e9
        used = time.process_time() - cpu
        return gigabytes / (now - begun), statistics.median(times) * 1e6, used / gigabytes


def spread(values: list[float], digits: int) -> str:
    """The median, and what nine in ten lie between."""
    values = sorted(values)
    cut = len(values) // 20
    low, high = values[cut], values[-1 - cut]
    return f"{statistics.median(values):.{digits}f} [{low:.{digits}f} {high:.{digits}f}]"


def measure(endpoint: str, key_file: str, rounds_wanted: int, seconds: float) -> None:
    """All cases, one line each."""
    key = kvar.NamespaceKey.from_file(key_file)
    with (
        kvar.Client(endpoint, key_file=key_file, staging=64 << 20) as staged,
        kvar.Client(endpoint, key_file=key_file) as plain,
    ):
        assert (staged.link, plain.link, staged.not_staged) == ("shm", "shm", None)
        for size in SIZES:
            ids = [kvar.id_from_name(key, f"{size} {n}") for n in range(BYTES_READ // size)]
            for id in ids:
                assert staged.put([(id, os.urandom(size))]) == ["stored"]
            for depth in DEPTHS:
                readers = {
                    "plain": Reader(plain, ids, size, depth),
                    "staging": Reader(staged, ids, size, depth),
                    "copied": Reader(staged, ids, size, depth, copied=True),
                }
                for reader in readers.values():
                    reader.turn(seconds)
                rounds = []
                for number in range(rounds_wanted):
                    order = list(readers) if number % 2 else list(readers)[::-1]
                    rounds.append({name: readers[name].turn(seconds) for name in order})
                print(f"{size >> 10} KiB, {depth} at a time")
                for what, column, digits in (("GB/s", 0, 2), ("p50 us", 1, 0), ("CPU s/GB", 2, 2)):
                    line = f"  {what:9}"
                    for name in readers:
                        line += f" {name} {spread([one[name][column] for one in rounds], digits)}"
                    for name in ("staging", "copied"):
                        ratios = [one[name][column] / one["plain"][column] for one in rounds]
                        line += f" {name}/plain {spread(ratios, 2)}"
                    print(line)


def main() -> None:
    """Starts a node, measures, ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kvar", help="the binary, a release build")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn")
    parser.add_argument("--spin", default="0", help="how long the node's threads spin, in us")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        command = [arguments.kvar, "serve", "--data", f"{folder}/data", "--size", "1GiB"]
        command += ["--dram", "512MiB", "--shards", "1", "--listen", "127.0.0.1:0"]
        command += ["--admin", "127.0.0.1:0", "--ready-file", str(ready)]
        command += ["--spin-us", arguments.spin]
        with (Path(folder) / "log").open("wb") as log:
            node = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            end = time.monotonic() + START_S_MAX
            while not ready.exists():
                assert time.monotonic() < end and node.poll() is None, "the node did not start"
                time.sleep(0.05)
            said = json.loads(ready.read_text())
            measure(said["listen"], said["key_file"], arguments.rounds, arguments.seconds)
        finally:
            node.kill()
            node.wait()


if __name__ == "__main__":
    main()
