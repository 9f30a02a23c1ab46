"""One client process of a store: takes a job a line on standard input, answers a line.

The same loop for kvar's and for Mooncake's Python API: ``depth`` threads, each with one blocking
call of ``batch`` blocks under way, into and from memory of its own. Latencies are of a call.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Store(Protocol):
    """The two calls that are compared. Both say how many blocks were good."""

    def memory(self, size: int, blocks: int) -> Any:
        """Memory for so many blocks, made ready for the store."""

    def get(self, names: list[str], memory: Any, size: int) -> int:
        """Reads whole blocks into memory."""

    def put(self, names: list[str], memory: Any, size: int) -> int:
        """Stores blocks."""

    def empty(self) -> None:
        """Removes everything."""


class Kvar:
    """kvar's Python client."""

    def __init__(self, endpoint: str, key_file: str) -> None:
        import kvar

        self._key = kvar.NamespaceKey.from_file(key_file)
        self._client = kvar.Client(endpoint, key=self._key, deadline_ms=10_000, link="tcp")
        self._id = kvar.id_from_name
        self._hints = kvar.PutHints(ephemeral=True)

    def memory(self, size: int, blocks: int) -> Any:
        return [bytearray(np.random.bytes(size)) for _ in range(blocks)]

    def get(self, names: list[str], memory: Any, size: int) -> int:
        items = [
            (self._id(self._key, name), place) for name, place in zip(names, memory, strict=True)
        ]
        return sum(result.outcome == "hit" for result in self._client.get(items))

    def put(self, names: list[str], memory: Any, size: int) -> int:
        items = [
            (self._id(self._key, name), place) for name, place in zip(names, memory, strict=True)
        ]
        return sum(
            word in ("stored", "exists") for word in self._client.put(items, hints=self._hints)
        )

    def empty(self) -> None:
        """What is ephemeral makes room by itself."""


class Mooncake:
    """Mooncake's Python store, zero-copy calls on registered memory."""

    def __init__(self, host: str, metadata: str, master: str) -> None:
        from mooncake.store import MooncakeDistributedStore

        self._store = MooncakeDistributedStore()
        # What is registered must neither move nor go.
        self._kept: list[Any] = []
        code = self._store.setup(host, metadata, 0, 512 << 20, "tcp", "", master)
        if code:
            raise SystemExit(f"mooncake setup: {code}")

    def memory(self, size: int, blocks: int) -> Any:
        array = np.frombuffer(bytearray(np.random.bytes(size * blocks)), dtype=np.uint8)
        self._kept.append(array)
        code = self._store.register_buffer(array.ctypes.data, array.nbytes)
        if code:
            raise SystemExit(f"mooncake register_buffer: {code}")
        return array

    def _places(self, memory: Any, size: int, count: int) -> list[int]:
        return [memory.ctypes.data + number * size for number in range(count)]

    def get(self, names: list[str], memory: Any, size: int) -> int:
        places = self._places(memory, size, len(names))
        if len(names) == 1:
            return int(self._store.get_into(names[0], places[0], size) == size)
        got = self._store.batch_get_into(names, places, [size] * len(names))
        return sum(count == size for count in got)

    def put(self, names: list[str], memory: Any, size: int) -> int:
        places = self._places(memory, size, len(names))
        if len(names) == 1:
            return int(self._store.put_from(names[0], places[0], size) == 0)
        return sum(
            code == 0 for code in self._store.batch_put_from(names, places, [size] * len(names))
        )

    def empty(self) -> None:
        self._store.remove_all(True)


class Job:
    """One measurement."""

    def __init__(self, store: Store, asked: dict[str, Any], memories: dict[int, list[Any]]) -> None:
        self.store = store
        self.op: str = asked["op"]
        self.size: int = asked["size"]
        self.batch: int = asked["batch"]
        self.depth: int = asked["depth"]
        self.seconds: float = asked["seconds"]
        self.blocks: int = asked["blocks"]
        self.run: str = asked["run"]
        need = self.batch
        known = memories.setdefault(self.size * 1000 + self.batch, [])
        while len(known) < self.depth:
            known.append(store.memory(self.size, need))
        self.memories = known[: self.depth]
        self.latencies: list[list[float]] = [[] for _ in range(self.depth)]
        self.good = [0] * self.depth
        self.others = [0] * self.depth

    def thread(self, number: int, end: float) -> None:
        dice = random.Random(hash((self.run, number)))
        put = 0
        memory = self.memories[number]
        call: Callable[[list[str], Any, int], int] = getattr(self.store, self.op)
        while time.monotonic() < end:
            if self.op == "get":
                names = [f"{self.size}/{dice.randrange(self.blocks)}" for _ in range(self.batch)]
            else:
                names = [f"{self.run}/{number}/{put + at}" for at in range(self.batch)]
                put += self.batch
            began = time.perf_counter()
            good = call(names, memory, self.size)
            self.latencies[number].append(time.perf_counter() - began)
            self.good[number] += good
            self.others[number] += self.batch - good

    def measure(self) -> dict[str, Any]:
        began, cpu = time.monotonic(), cpu_s()
        end = began + self.seconds
        threads = [
            threading.Thread(target=self.thread, args=(number, end)) for number in range(self.depth)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        good = sum(self.good)
        all_latencies = sorted(one for some in self.latencies for one in some)

        def at(share: float) -> float:
            place = min(int(len(all_latencies) * share), len(all_latencies) - 1)
            return all_latencies[place] * 1e6

        return {
            "bytes_per_s": good * self.size / seconds,
            "p50_us": at(0.5),
            "p99_us": at(0.99),
            "p999_us": at(0.999),
            "good": good,
            "others": sum(self.others),
            "client_cpu_s": cpu_s() - cpu,
        }


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def fill(store: Store, asked: dict[str, Any]) -> dict[str, Any]:
    size, blocks = asked["size"], asked["blocks"]
    memory = store.memory(size, 1)
    end = time.monotonic() + 120
    for number in range(blocks):
        while not store.put([f"{size}/{number}"], memory, size):
            if time.monotonic() > end:
                return {"error": f"not filled within 120 s: {number} of {blocks}"}
            time.sleep(0.002)
    return {"filled": blocks}


def main() -> None:
    kind, *rest = sys.argv[1:]
    store: Store = Kvar(*rest) if kind == "kvar" else Mooncake(*rest)
    memories: dict[int, list[Any]] = {}
    # Other libraries print to standard output, too: answers are marked.
    print("@ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["op"] == "fill":
            answer = fill(store, asked)
        elif asked["op"] == "empty":
            store.empty()
            answer = {}
        else:
            answer = Job(store, asked, memories).measure()
        print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
