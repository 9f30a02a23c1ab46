"""The two servers of the run: a kvar node and stock vLLM. Started, asked, stopped, killed.

Both run in process groups of their own, so that nothing of them outlives the run: vLLM has child
processes that would otherwise keep memory and cores. No port is fixed: the node picks its own and
says which in its ready file, vLLM listens on a Unix socket.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# vLLM is up after 60 to 140 s on a quiet 2-core machine; a busy one may take several times that.
ENGINE_START_S_MAX = 900
NODE_START_S_MAX = 60
# The node's own `shutdown_flush` is 30 s.
NODE_STOP_S_MAX = 90
ASK_S_MAX = 600
SAY_EVERY_S = 20


def say(text: str) -> None:
    """A progress line."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Server:
    """A process group with a log file."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def spawn(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Starts the process; its output goes to the end of the log."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def check_running(self) -> None:
        """Raises with the end of the log if the process is gone."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"{self.name} ended with {code}; the end of {self.log}:\n{tail}")

    def log_count(self, text: str) -> int:
        """How often a text stands in the log."""
        return self.log.read_text(errors="replace").count(text)

    def signal_group(self, number: signal.Signals) -> None:
        """Sends a signal to the process and all its children."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kill -9 of the whole group; returns when its memory is free."""
        if self._process is None:
            return
        self.signal_group(signal.SIGKILL)
        self._process.wait()
        while _group_exists(self._process.pid):
            time.sleep(0.05)
        self._process = None


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # Children that died but were not reaped yet hold no memory any more.
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if int(fields[2]) == group:
            states.append(fields[0])
    return any(state != "Z" for state in states)


class Node(Server):
    """One kvar node on a file."""

    def __init__(
        self, binary: Path, data: Path, log: Path, *, size: str = "4GiB", dram: str = "2GiB"
    ) -> None:
        super().__init__("the node", log)
        self._binary = binary
        self._size = ["--size", size, "--dram", dram]
        self.data = data
        self.key_file = data.with_name(data.name + ".key")
        self._ready_file = data.with_name("ready.json")
        self.endpoint = "127.0.0.1:0"
        self.admin = ""

    def start(self) -> None:
        """Starts the node and waits until it serves. A second start keeps the endpoint."""
        self._ready_file.unlink(missing_ok=True)
        command = [str(self._binary), "serve", "--data", str(self.data), *self._size]
        command += [
            "--shards",
            "1",
            "--listen",
            self.endpoint,
            "--admin",
            "127.0.0.1:0",
            "--ready-file",
            str(self._ready_file),
        ]
        # Or it removes damaged blocks in the background before a slow engine has met one.
        command += ["--scrub", "0"]
        started = time.monotonic()
        self.spawn(command, dict(os.environ))
        while not self._ready_file.exists():
            self.check_running()
            if time.monotonic() - started > NODE_START_S_MAX:
                raise SystemExit(f"the node is not ready after {NODE_START_S_MAX} s: {self.log}")
            time.sleep(0.02)
        ready = json.loads(self._ready_file.read_text())
        self.endpoint, self.admin = ready["listen"], ready["admin"]
        say(f"node ready at {self.endpoint} after {time.monotonic() - started:.1f} s")

    def stop(self) -> None:
        """SIGTERM: the node writes what is only in memory, and ends with 0."""
        assert self._process is not None
        started = time.monotonic()
        self.signal_group(signal.SIGTERM)
        try:
            code = self._process.wait(timeout=NODE_STOP_S_MAX)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the node did not end within {NODE_STOP_S_MAX} s") from None
        self._process = None
        if code != 0:
            raise SystemExit(f"the node ended with {code} on SIGTERM; see {self.log}")
        say(f"node stopped after {time.monotonic() - started:.1f} s")

    def status(self) -> dict[str, Any]:
        """The node's ``/v1/status``."""
        host, port = self.admin.rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        try:
            connection.request("GET", "/v1/status")
            status: dict[str, Any] = json.loads(connection.getresponse().read())
            return status
        finally:
            connection.close()

    def blocks_stored(self) -> int:
        """Blocks put since the node was started."""
        return int(self.status()["links"]["puts"]["stored"])

    def blocks_evicted(self) -> int:
        """Blocks that left the store because room was wanted."""
        return sum(int(one["evicted"]) for one in self.status()["namespaces"])

    def blocks_corrupt(self) -> int:
        """Blocks that did not pass their check when they were asked for."""
        return int(self.status()["links"]["get_misses"]["corrupt"])


def sum_samples(text: str, pattern: str) -> float:
    """Sum of all samples of a Prometheus text whose series match the pattern."""
    total = 0.0
    for line in text.splitlines():
        if not line.startswith("#") and re.search(pattern, line.rsplit(" ", 1)[0]):
            total += float(line.rsplit(" ", 1)[1])
    return total


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt."""

    ttft_s: float
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]

    def equals(self, other: Answer, tolerance: float) -> bool:
        """Same greedy tokens, same logprobs within the tolerance."""
        return self.tokens == other.tokens and self.distance(other) <= tolerance

    def distance(self, other: Answer) -> float:
        """Largest difference of two logprobs at the same place."""
        pairs = zip(self.logprobs, other.logprobs, strict=False)
        return max((abs(mine - theirs) for mine, theirs in pairs), default=math.inf)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connects to the path instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def kvar_transfer(node: Node) -> dict[str, Any]:
    """The setting of vLLM for the connector, against this node."""
    return {
        "kv_connector": "KvarConnector",
        "kv_connector_module_path": "kvar.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "endpoint": node.endpoint,
            "namespace_key_file": str(node.key_file),
            # The cores are shared with the engine here: late is better than recomputed.
            "deadline_ms": 30_000,
            "lookup_deadline_ms": 1_000,
        },
    }


def cpu_arguments(block_tokens: int, *, hybrid: bool = False) -> list[str]:
    """Of vLLM on a CPU, for the small model; ``hybrid``: windows in groups of their own."""
    arguments = ["--dtype", "float32", "--enforce-eager", "--block-size", str(block_tokens)]
    arguments += ["--max-model-len", "9216", "--max-num-seqs", "4"]
    arguments += ["--kv-cache-memory-bytes", str(1 << 30)]
    return arguments if hybrid else [*arguments, "--disable-hybrid-kv-cache-manager"]


class Engine(Server):
    """Stock vLLM, with a connector."""

    def __init__(
        self,
        python: Path,
        model: Path,
        overlay: str,
        arguments: Sequence[str],
        folder: Path,
        log: Path,
        name: str = "vLLM",
    ) -> None:
        super().__init__(name, log)
        self._python = python
        self._model = model
        self._overlay = overlay
        self._arguments = arguments
        self._folder = folder
        self._socket = folder / "engine.sock"

    def _listening(self) -> list[str]:
        """Where it is to listen, as arguments."""
        self._socket.unlink(missing_ok=True)
        return ["--uds", str(self._socket)]

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        return UnixConnection(self._socket, timeout_s)

    def start(self, transfer: dict[str, Any] | None) -> None:
        """Starts vLLM with this ``--kv-transfer-config`` or none; waits until it answers."""
        command = [str(self._python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--served-model-name", "model", "--model", str(self._model)]
        command += [*self._listening(), *self._arguments]
        if transfer is not None:
            command += ["--kv-transfer-config", json.dumps(transfer)]
        environment = dict(os.environ)
        environment |= {
            "PYTHONPATH": self._overlay,
            "PYTHONUNBUFFERED": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            # Sockets between its processes, which a kill -9 leaves behind: gone with the folder.
            "VLLM_RPC_BASE_PATH": str(self._folder),
            "HF_HUB_OFFLINE": "1",
        }
        started = time.monotonic()
        said = started
        self.spawn(command, environment)
        while not self._healthy():
            self.check_running()
            now = time.monotonic()
            if now - started > ENGINE_START_S_MAX:
                raise SystemExit(
                    f"{self.name} is not up after {ENGINE_START_S_MAX} s; see {self.log}"
                )
            if now - said > SAY_EVERY_S:
                said = now
                say(f"  {self.name} is starting ({now - started:.0f} s)")
            time.sleep(0.5)
        say(f"{self.name} up after {time.monotonic() - started:.0f} s")

    def _healthy(self) -> bool:
        try:
            status, _ = self._call("GET", "/health", None, 5)
        except (OSError, http.client.HTTPException):
            return False
        return status == http.HTTPStatus.OK

    def _call(
        self, method: str, path: str, body: object | None, timeout_s: float
    ) -> tuple[int, bytes]:
        connection = self._connection(timeout_s)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def ask(self, tokens: Sequence[int], answer_tokens: int) -> Answer:
        """Asks one prompt, greedily, and times the first token."""
        body = {
            "model": "model",
            "prompt": list(tokens),
            "max_tokens": answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
            "stream": True,
        }
        connection = self._connection(ASK_S_MAX)
        words: list[str] = []
        logprobs: list[float] = []
        first_s = math.nan
        try:
            text = json.dumps(body)
            started = time.monotonic()
            connection.request(
                "POST", "/v1/completions", text, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise SystemExit(f"vLLM answered {response.status}: {response.read()[:500]!r}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                choice = json.loads(line[6:])["choices"][0]
                if choice.get("logprobs") is None:
                    continue
                if not words:
                    first_s = time.monotonic() - started
                words += choice["logprobs"]["tokens"]
                logprobs += choice["logprobs"]["token_logprobs"]
        finally:
            connection.close()
        if len(words) != answer_tokens:
            self.check_running()
            raise SystemExit(f"vLLM sent {len(words)} tokens where {answer_tokens} were asked")
        return Answer(first_s, tuple(words), tuple(logprobs))

    def counter(self, name: str) -> float:
        """One of vLLM's own counters."""
        return sum_samples(self.metrics(), rf"^vllm:{name}_total\b")

    def metrics(self) -> str:
        """All of its metrics."""
        _, text = self._call("GET", "/metrics", None, 30)
        return text.decode()

    def forget_local_cache(self) -> None:
        """Empties vLLM's own prefix cache; retried while saves still hold pages."""
        for _ in range(100):
            status, body = self._call("POST", "/reset_prefix_cache", None, 30)
            if status != http.HTTPStatus.OK:
                raise SystemExit(f"{self.name} answered {status} to /reset_prefix_cache")
            if not body or json.loads(body).get("success") is not False:
                return
            time.sleep(0.2)
        raise SystemExit(f"the prefix cache of {self.name} stays in use; see its log")
