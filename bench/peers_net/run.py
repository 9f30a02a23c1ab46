"""kvar beside Mooncake Store and Redis, in turns, in one run: rates, latencies, CPU a GB, a plot.

For every size, operation, batch and depth, and in every round, each store runs once; the order
turns with the round, and the others are stopped meanwhile (SIGSTOP), so that nobody's threads
disturb another's run. Before all that each store's memory is written once: the first touch of a
page costs more than a put. A figure is the median of the rounds; a ratio to kvar is that of the
same round.

| name        | client                                              | verifies what it reads |
|-------------|-----------------------------------------------------|------------------------|
| kvar        | ``kvar bench node``: Rust, one thread, one link     | every byte, both sides |
| kvar-python | ``kvar.Client``, a thread for each call under way   | every byte, both sides |
| mooncake    | ``MooncakeDistributedStore``, zero-copy calls, ditto | nothing                |
| redis       | ``redis-benchmark`` (GET, SET, MGET), one connection a call | nothing         |

kvar's ratio to Mooncake is given from Python to Python too: what an engine would see.
Results: ``bench/results/peers.json``, a list of {peer, op, size, batch, depth, bytes_per_s, p50_us,
p99_us, p999_us, client_cpu_s_per_gb, server_cpu_s_per_gb, ratio_to_kvar, low, high}.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SIZES = {"64KiB": 64 << 10, "1MiB": 1 << 20, "4MiB": 4 << 20}
# Blocks that are asked for at random: 256 to 512 MiB, more than any cache of the CPU.
BLOCKS = {64 << 10: 4096, 1 << 20: 512, 4 << 20: 128}
# Memory that each store may use, and what is put to have touched all of it.
MEMORY_BYTES = 3 << 30
# Memory that clients hold at once; cells beyond it are left out, which is said.
CELL_BYTES_MAX = 256 << 20
TICKS = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """A process and those it started."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def cpu_s(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS


def idle_share() -> float:
    def times() -> tuple[int, int]:
        numbers = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return numbers[3] + numbers[4], sum(numbers)

    before = times()
    time.sleep(0.3)
    after = times()
    return (after[0] - before[0]) / max(after[1] - before[1], 1)


class Peer(abc.ABC):
    """A store: servers that can be stopped, and a way to measure one cell."""

    name = ""

    def __init__(self) -> None:
        self.servers: list[subprocess.Popen[Any]] = []
        self.clients: list[subprocess.Popen[Any]] = []

    def signal(self, number: int) -> None:
        for process in self.servers + self.clients:
            for pid in tree(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    @abc.abstractmethod
    def fill(self, size: int) -> None:
        """Puts the blocks of a size that gets will ask for."""

    @abc.abstractmethod
    def run(self, cell: Cell, seconds: float, run: str) -> dict[str, Any] | None:
        """Measures one cell; nothing if the store cannot be asked so."""

    def warm_up(self) -> None:
        """Writes as much as the store may hold."""
        cell, written = Cell(op="put", size=1 << 20, batch=1, depth=4), 0
        while written < MEMORY_BYTES:
            found = self.run(cell, 1.0, f"{time.time_ns()}")
            assert found is not None
            written += max(found["good"], 1) * cell.size

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        for process in self.clients + self.servers:
            process.kill()
            process.wait()


class Cell(argparse.Namespace):
    """What is measured: op, size, batch, depth."""

    op: str
    size: int
    batch: int
    depth: int


class Child:
    """A client.py process."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "client.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self.log = log
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:]) if line[1] == "{" else None
        raise SystemExit(f"a client ended: see\n{self.log.read_text()[-2000:]}")

    def ask(self, **asked: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        if "error" in answer:
            raise SystemExit(f"peers: {answer['error']}")
        return answer


class KvarNode:
    """The node that both of kvar's clients use."""

    def __init__(self, kvar: str, work: Path) -> None:
        self.kvar = kvar
        ready = work / "ready"
        self.process = subprocess.Popen(
            [kvar, "serve", "--data", str(work / "data"), "--size", "16GiB",
             "--dram", str(MEMORY_BYTES),
             "--shards", "1", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log", "warn",
             "--ready-file", str(ready)],
            stderr=(work / "kvar.log").open("w"),
        )  # fmt: skip
        wait_for(lambda: ready.exists() and bool(ready.read_text()), "the node", work / "kvar.log")
        said = json.loads(ready.read_text())
        self.endpoint: str = said["listen"]
        self.key_file: str = said["key_file"]
        self.arguments = ["--endpoint", self.endpoint, "--key-file", self.key_file, "--link", "tcp"]

    def flush(self) -> None:
        subprocess.run([self.kvar, "flush", *self.arguments], check=True, stdout=subprocess.DEVNULL)


class KvarRust(Peer):
    """The Rust client, through ``kvar bench node``."""

    name = "kvar"

    def __init__(self, node: KvarNode) -> None:
        super().__init__()
        self.node = node
        self.servers = [node.process]

    def bench(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [self.node.kvar, "bench", "node", *self.node.arguments, "--json", *arguments],
            check=True,
            capture_output=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def fill(self, size: int) -> None:
        self.bench("--size", str(size), "--blocks", str(BLOCKS[size]), "--seconds", "0.1")
        self.node.flush()

    def run(self, cell: Cell, seconds: float, run: str) -> dict[str, Any] | None:
        found = self.bench(
            "--op", cell.op, "--size", str(cell.size), "--batch", str(cell.batch), "--depth",
            str(cell.depth), "--blocks", str(BLOCKS[cell.size]), "--seconds", str(seconds),
            "--no-fill",
        )  # fmt: skip
        found["client_cpu_s"] = found["client_cpu_s_per_gb"] * found["good"] * cell.size / 1e9
        return found


class Scripted(Peer):
    """A peer whose client is client.py."""

    child: Child

    def fill(self, size: int) -> None:
        self.child.ask(op="fill", size=size, blocks=BLOCKS[size])

    def run(self, cell: Cell, seconds: float, run: str) -> dict[str, Any] | None:
        asked = vars(cell) | {"seconds": seconds, "blocks": BLOCKS[cell.size], "run": run}
        found: dict[str, Any] = self.child.ask(**asked)
        return found


class KvarPython(Scripted):
    """The Python client."""

    name = "kvar-python"

    def __init__(self, node: KvarNode, work: Path) -> None:
        super().__init__()
        self.node = node
        self.servers = [node.process]
        self.child = Child(["kvar", node.endpoint, node.key_file], work / "kvar-python.log")
        self.clients = [self.child.process]

    def fill(self, size: int) -> None:
        super().fill(size)
        self.node.flush()


class Mooncake(Scripted):
    """Mooncake Store: its master, a process that lends memory, a client."""

    name = "mooncake"

    def __init__(self, tools: Path, work: Path) -> None:
        super().__init__()
        ports = free_ports(4)
        master, metadata, metrics, holder = ports
        where = f"127.0.0.1:{master}"
        url = f"http://127.0.0.1:{metadata}/metadata"
        log = (work / "mooncake.log").open("w")
        self.servers.append(
            subprocess.Popen(
                [str(tools / "mooncake_master"), "--port", str(master),
                 "--enable_http_metadata_server=true", "--http_metadata_server_host=127.0.0.1",
                 f"--http_metadata_server_port={metadata}", f"--metrics_port={metrics}"],
                stdout=log, stderr=log,
            )
        )  # fmt: skip
        wait_for(
            lambda: listens(master) and listens(metadata), "mooncake_master", work / "mooncake.log"
        )
        held = subprocess.Popen(
            [
                sys.executable,
                str(HERE / "holder.py"),
                f"127.0.0.1:{holder}",
                url,
                where,
                str(MEMORY_BYTES),
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self.servers.append(held)
        assert held.stdout is not None
        for line in held.stdout:
            if line.startswith("@ready"):
                break
        else:
            raise SystemExit(
                f"mooncake's holder ended: {(work / 'mooncake.log').read_text()[-2000:]}"
            )
        self.child = Child(
            ["mooncake", f"127.0.0.1:{free_ports(1)[0]}", url, where], work / "mooncake-client.log"
        )
        self.clients = [self.child.process]

    def run(self, cell: Cell, seconds: float, run: str) -> dict[str, Any] | None:
        found = super().run(cell, seconds, run)
        if cell.op == "put":
            self.child.ask(op="empty")
        return found


class Redis(Peer):
    """Redis, driven by redis-benchmark."""

    name = "redis"

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.port = free_ports(1)[0]
        self.servers = [
            subprocess.Popen(
                ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
                 "--appendonly", "no", "--maxmemory", str(MEMORY_BYTES),
                 "--maxmemory-policy", "allkeys-lru"],
                stdout=(work / "redis.log").open("w"),
            )
        ]  # fmt: skip
        wait_for(lambda: listens(self.port), "redis-server", work / "redis.log")

    def fill(self, size: int) -> None:
        value = os.urandom(size)
        with socket.create_connection(("127.0.0.1", self.port)) as link:
            answers = link.makefile("rb")
            for number in range(BLOCKS[size]):
                key = f"key{size}:{number:012d}".encode()
                parts = [b"SET", key, value]
                words = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
                link.sendall(b"*3\r\n" + words)
                if answers.readline() != b"+OK\r\n":
                    raise SystemExit("redis does not take a value")

    def run(self, cell: Cell, seconds: float, run: str) -> dict[str, Any] | None:
        key = f"key{cell.size}:__rand_int__"
        if cell.op == "get":
            command = ["MGET", *[key] * cell.batch] if cell.batch > 1 else ["GET", key]
            keys = BLOCKS[cell.size]
        elif cell.batch > 1:
            return None
        else:
            command = ["SET", f"new{cell.size}:__rand_int__", "x" * cell.size]
            keys = 1 << 30
        if cell.op == "put" and cell.size > 100_000:
            # An argument may have 128 KiB; redis-benchmark's own SET takes a size.
            command = []
        # It stops after so many calls, not after so long: a short run says how many these are.
        calls = max(cell.depth * 2, 20)
        for _ in range(2):
            began = time.monotonic()
            found = self.bench(cell, command, keys, calls)
            took = time.monotonic() - began
            if took > seconds / 2:
                break
            calls = max(int(calls * seconds / max(took, 0.02)), calls)
        return found

    def bench(self, cell: Cell, command: list[str], keys: int, calls: int) -> dict[str, Any]:
        start = [
            "redis-benchmark", "-p", str(self.port), "-c", str(cell.depth), "-n", str(calls), "-r",
            str(keys), "--csv",
        ]  # fmt: skip
        own = ["-t", "set", "-d", str(cell.size)]
        before = os.times()
        done = subprocess.run(
            [*start, *(command or own)],
            check=True,
            capture_output=True,
            text=True,
        )
        after = os.times()
        row = list(csv.DictReader(io.StringIO(done.stdout)))[-1]
        rate = float(row["rps"]) * cell.batch
        return {
            "bytes_per_s": rate * cell.size,
            "p50_us": float(row["p50_latency_ms"]) * 1e3,
            "p99_us": float(row["p99_latency_ms"]) * 1e3,
            "p999_us": None,
            "good": calls * cell.batch,
            "client_cpu_s": (after[2] + after[3]) - (before[2] + before[3]),
        }


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; the namespace is ours alone."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False


def wait_for(done: Callable[[], bool], what: str, log: Path) -> None:
    end = time.monotonic() + 60
    while not done():
        if time.monotonic() > end:
            raise SystemExit(f"peers: {what} was not ready within 60 s:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)


def cells(options: argparse.Namespace, size: int) -> Iterator[Cell]:
    for op in options.ops:
        for batch in options.batches:
            for depth in options.depths:
                if size * batch * depth <= CELL_BYTES_MAX:
                    yield Cell(op=op, size=size, batch=batch, depth=depth)
                else:
                    print(
                        f"left out: {op} {size} x {batch} x {depth}: "
                        f"{CELL_BYTES_MAX >> 20} MiB at most"
                    )


def sign_test_interval(values: list[float]) -> tuple[float, float]:
    """The 90 % interval of the median: with fewer than five values, all of them."""
    values = sorted(values)
    chance, below, skip = 0.5 ** len(values), 0.0, 0
    for rank in range(len(values) // 2):
        below += chance
        if below > 0.05:
            break
        chance *= (len(values) - rank) / (rank + 1)
        skip = rank + 1
    return values[skip], values[-1 - skip]


def measure(peers: list[Peer], cell: Cell, options: argparse.Namespace) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for round_number in range(options.rounds):
        turn = round_number % len(peers)
        for peer in peers[turn:] + peers[:turn]:
            for other in peers:
                other.signal(signal.SIGSTOP)
            peer.signal(signal.SIGCONT)
            servers = [pid for server in peer.servers for pid in tree(server.pid)]
            before = cpu_s(servers)
            found = peer.run(cell, options.seconds, f"{time.time_ns()}")
            if found is not None:
                found["server_cpu_s"] = cpu_s(servers) - before
                runs[peer.name].append(found)
    for peer in peers:
        peer.signal(signal.SIGCONT)
    rows = []
    ours = [run["bytes_per_s"] for run in runs["kvar"]]
    for peer in peers:
        found = runs[peer.name]
        if not found:
            continue

        def median(name: str, found: list[dict[str, Any]] = found) -> float | None:
            values = [run[name] for run in found if run[name] is not None]
            return statistics.median(values) if values else None

        def a_gb(name: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.median(
                run[name] / (run["good"] * cell.size / 1e9 or 1) for run in found
            )

        ratios = [run["bytes_per_s"] / our for run, our in zip(found, ours, strict=True)]
        low, high = sign_test_interval(ratios)
        rows.append(
            {
                "peer": peer.name,
                **vars(cell),
                "bytes_per_s": median("bytes_per_s"),
                "p50_us": median("p50_us"),
                "p99_us": median("p99_us"),
                "p999_us": median("p999_us"),
                "client_cpu_s_per_gb": a_gb("client_cpu_s"),
                "server_cpu_s_per_gb": a_gb("server_cpu_s"),
                "ratio_to_kvar": statistics.median(ratios),
                "low": low,
                "high": high,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"{first['op']} {first['size'] >> 10} KiB, {first['batch']} a call, "
        f"{first['depth']} under way"
    )
    for row in rows:
        p99 = row["p99_us"] or 0
        print(
            f"  {row['peer']:<12} {row['bytes_per_s'] / 1e9:6.2f} GB/s  "
            f"p50 {row['p50_us']:8.0f} us  p99 {p99:8.0f} us  CPU a GB "
            f"{row['client_cpu_s_per_gb']:.2f} + {row['server_cpu_s_per_gb']:.2f} s"
            f"  x{row['ratio_to_kvar']:.2f} [{row['low']:.2f} {row['high']:.2f}]",
            flush=True,
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted({(row["op"], row["size"], row["batch"]) for row in rows})
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.4), squeeze=False)
    for axis, (op, size, batch) in zip(axes[0], kinds, strict=True):
        for name in ("kvar", "kvar-python", "mooncake", "redis"):
            mine = [
                row
                for row in rows
                if (row["op"], row["size"], row["batch"], row["peer"]) == (op, size, batch, name)
            ]
            if mine:
                axis.plot(
                    [row["depth"] for row in mine],
                    [row["bytes_per_s"] / 1e9 for row in mine],
                    marker="o",
                    label=name,
                )
        axis.set_title(f"{op} {size >> 10} KiB x {batch}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("calls under way")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("GB/s")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kvar", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--tools", required=True, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", required=True, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ops", nargs="+", choices=["get", "put"], default=["get", "put"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.work).free
    if free < 4 << 30:
        raise SystemExit(f"{free >> 20} MiB free for temporary files, 4 GiB needed (TMPDIR)")
    peers: list[Peer] = []
    rows: list[dict[str, Any]] = []
    idle = []
    try:
        node = KvarNode(options.kvar, options.work)
        peers.append(KvarRust(node))
        peers.append(KvarPython(node, options.work))
        peers.append(Mooncake(options.tools, options.work))
        peers.append(Redis(options.work))
        for peer in peers:
            peer.warm_up()
        for size in (SIZES[name] for name in options.sizes):
            for peer in peers:
                peer.fill(size)
            # Mooncake's puts are followed by a removal of everything: gets come first.
            for cell in sorted(cells(options, size), key=lambda cell: cell.op):
                idle.append(idle_share())
                found = measure(peers, cell, options)
                rows += found
                show(found)
    finally:
        for peer in peers:
            peer.stop()
    (options.out / "peers.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, options.out / "peers.png")
    print(f"lowest idle CPU before a cell: {min(idle):.0%}; {options.out}/peers.json, peers.png")


if __name__ == "__main__":
    main()
