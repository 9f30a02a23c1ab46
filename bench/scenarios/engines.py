"""A scenario's engines and node: stock vLLM on ports of its own, or engines that run already.

```text
  Stage            the node and the engines a scenario asks
    .engines         started here (StartedEngine), or running (RunningEngine: --engine URL)
    .node            a kvar node started here, or none
```

What runs already is asked and never restarted; scenarios that must restart say so.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import funnel
import servers
from servers import Node, say, sum_samples

# A Unix socket's path has at most 107 characters; vLLM's own part of it is a uuid and more.
SOCKET_FOLDER_CHARACTERS_MAX = 48


class EngineLike(Protocol):
    """What a scenario needs of an engine."""

    @property
    def url(self) -> str:
        """Where it answers, without a path."""

    def metrics(self) -> str:
        """Its Prometheus text."""

    def forget_local_cache(self) -> None:
        """Empties its own prefix cache."""


class StartedEngine(servers.Engine):
    """Stock vLLM on a TCP port of its own: vLLM's benchmark speaks to nothing else."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._port = _free_port()

    @property
    def url(self) -> str:
        """Where it answers; the same after a restart."""
        return f"http://127.0.0.1:{self._port}"

    def _listening(self) -> list[str]:
        return ["--host", "127.0.0.1", "--port", str(self._port)]

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout_s)


class RunningEngine:
    """An engine that somebody else started."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def metrics(self) -> str:
        """Its Prometheus text."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    def forget_local_cache(self) -> None:
        """Empties its own prefix cache, where it lets one."""
        request = urllib.request.Request(f"{self.url}/reset_prefix_cache", method="POST")
        try:
            urllib.request.urlopen(request, timeout=30).close()
        except OSError as why:
            raise SystemExit(
                f"{self.url}/reset_prefix_cache: {why}. The engine's own cache must be emptied "
                "between passes, or it would answer itself: start it with VLLM_SERVER_DEV_MODE=1"
            ) from None


class Counters:
    """vLLM's own counters of prompt tokens, since they were last read."""

    NAMES = (
        "prompt_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "external_prefix_cache_queries",
        "external_prefix_cache_hits",
    )

    def __init__(self, engines: Sequence[EngineLike]) -> None:
        self._engines = engines
        self._before = self._read()

    def _read(self) -> dict[str, float]:
        texts = [engine.metrics() for engine in self._engines]
        return {
            name: sum(sum_samples(text, rf"^vllm:{name}_total\b") for text in texts)
            for name in self.NAMES
        }

    def take(self) -> dict[str, int]:
        """What was added since."""
        now = self._read()
        added = {name: int(now[name] - self._before[name]) for name in self.NAMES}
        self._before = now
        return added


def funnel_of(engines: Sequence[EngineLike]) -> dict[str, dict[str, float]]:
    """Where the tokens of all prompts went since these engines were started, by the connector."""
    total: dict[str, dict[str, float]] = {"stages": {}, "losses": {}}
    for engine in engines:
        found = funnel.funnel(funnel.Metrics(engine.metrics()))
        for part, counts in zip(total.values(), found, strict=True):
            for name, tokens in counts.items():
                part[name] = part.get(name, 0) + tokens
    return total


class Stage:
    """What a scenario runs on; everything it started ends with it."""

    def __init__(self, options: Any, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.node: Node | None = None
        self.engines: list[StartedEngine] = []

    def start_node(self, size: str, dram: str) -> Node:
        """A kvar node on a file in the scenario's folder."""
        self.node = Node(
            self.options.kvar,
            self.folder / "store.kvar",
            self.folder / "node.log",
            size=size,
            dram=dram,
        )
        self.node.start()
        return self.node

    def new_engine(self, cache_bytes: int, context_tokens: int) -> StartedEngine:
        """An engine, not started: its own KV cache so large, contexts so long."""
        number = len(self.engines)
        folder = self.folder / f"engine-{number}"
        folder.mkdir()
        arguments = self.options.engine_arguments.split()
        arguments += ["--block-size", str(self.options.block_tokens)]
        arguments += ["--max-model-len", str(context_tokens), "--enable-prompt-tokens-details"]
        if self.options.cpu:
            arguments += ["--kv-cache-memory-bytes", str(cache_bytes)]
        if self.options.chat_template:
            arguments += ["--chat-template", str(self.options.chat_template)]
        engine = StartedEngine(
            Path(sys.executable),
            self.options.model,
            self.options.overlay,
            arguments,
            folder,
            folder / "vllm.log",
            name=f"vLLM {number}",
        )
        self.engines.append(engine)
        return engine

    def transfer(self) -> dict[str, Any]:
        """VLLM's setting for the connector against this stage's node."""
        assert self.node is not None
        return servers.kvar_transfer(self.node)

    def switch(self, mode: str) -> None:
        """``kvar mode`` against the node."""
        assert self.node is not None
        command = [str(self.options.kvar), "mode", mode, "--admin", self.node.admin]
        command += ["--key-file", str(self.node.key_file)]
        subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
        say(f"kvar mode {mode}")

    def close(self) -> None:
        """Ends everything at once."""
        for engine in self.engines:
            engine.kill()
        if self.node is not None:
            self.node.kill()


@contextlib.contextmanager
def stage(options: Any, name: str, free_gib: int) -> Iterator[Stage]:
    """A stage in a folder of its own, which is kept when something goes wrong."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free >> 30
    if free < free_gib:
        raise SystemExit(f"{free} GiB free in {out}, {free_gib} needed: free some, or name --out")
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_short(out)))
    here = Stage(options, folder)
    fine = False
    try:
        yield here
        fine = True
    finally:
        here.close()
        if fine and not options.keep:
            shutil.rmtree(folder)
        else:
            (folder / "store.kvar").unlink(missing_ok=True)
            say(f"logs are kept in {folder}")


def _short(out: Path) -> Path | None:
    """The folder, or the system's where its path is too long for vLLM's own Unix sockets."""
    return out if len(str(out)) < SOCKET_FOLDER_CHARACTERS_MAX else None


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port: int = asked.getsockname()[1]
        return port


def wait_until_stored(node: Node, quiet_s: float = 1.0, most_s: float = 120.0) -> int:
    """Saves go on behind the answers: waits until no more come; how many blocks came in all."""
    before, since = -1, time.monotonic()
    until = since + most_s
    while time.monotonic() < until:
        stored = node.blocks_stored()
        if stored != before:
            before, since = stored, time.monotonic()
        elif time.monotonic() - since >= quiet_s:
            break
        time.sleep(0.1)
    return before


def write_json(path: Path, what: object) -> None:
    """Whole, or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(what, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)
