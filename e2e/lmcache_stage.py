"""What the runs of LMCache share: its server in MP mode, and a stage of node, server and engine."""

from __future__ import annotations

import argparse
import http
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prompts import PromptMaker
from servers import Answer, Engine, Node, Server, cpu_arguments, say

BLOCK_TOKENS = 32
# LMCache's default; an object of this model is 9 MiB then, more than a block may be.
CHUNK_TOKENS = 256
LENGTHS_TOKENS = [1024, 4096]
PROMPTS_A_LENGTH = 2
WARM_UP_TOKENS = [600, 1200]
LOGPROB_TOLERANCE = 1e-4
HIT_SHARE_MIN = 0.98
START_S_MAX = 300
STORED_WAIT_S_MAX = 120
# The store is taken for complete when it has not grown for so long.
STORED_QUIET_S = 2.0


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


class LMCache(Server):
    """LMCache's server in MP mode, with a kvar node behind it."""

    def __init__(self, python: Path, overlay: str, log: Path) -> None:
        super().__init__("the LMCache server", log)
        self._python = python
        self._overlay = overlay
        self.port = free_port()
        self._http_port = free_port()

    def start(self, node: Node) -> None:
        """Starts the server over this node and waits until it is healthy."""
        self.serve(
            {
                "type": "native_plugin",
                "module_path": "kvar.lmcache",
                "class_name": "Client",
                "adapter_params": {"endpoint": node.endpoint, "key_file": str(node.key_file)},
            }
        )

    def serve(self, adapter: dict[str, Any]) -> None:
        """Starts the server over this L2 and waits until it is healthy."""
        command = [str(self._python), "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--http-port", str(self._http_port)]
        command += ["--chunk-size", str(CHUNK_TOKENS), "--l1-size-gb", "1"]
        command += ["--eviction-policy", "LRU", "--supported-transfer-mode", "engine_driven"]
        command += ["--l2-adapter", json.dumps(adapter)]
        started = time.monotonic()
        self.spawn(command, dict(os.environ) | {"PYTHONPATH": self._overlay})
        while not self._healthy():
            self.check_running()
            if time.monotonic() - started > START_S_MAX:
                raise SystemExit(f"LMCache is not up after {START_S_MAX} s; see {self.log}")
            time.sleep(0.2)
        say(f"LMCache up after {time.monotonic() - started:.0f} s")

    def clear(self) -> None:
        """Empties the server's own memory, its L1."""
        clear = urllib.request.Request(
            f"http://127.0.0.1:{self._http_port}/cache/clear", method="POST"
        )
        urllib.request.urlopen(clear, timeout=30).close()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self._http_port}/healthcheck", timeout=5
            ) as answer:
                return bool(answer.status == http.HTTPStatus.OK)
        except (OSError, urllib.error.URLError):
            return False

    def transfer(self) -> dict[str, Any]:
        """The setting of vLLM for LMCache's own connector, against this server."""
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": self.port,
            },
        }


class Stage:
    """The servers, the prompts, and what came out."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        from transformers import AutoTokenizer

        python, overlay = Path(sys.executable), arguments.overlay
        self.node = Node(arguments.kvar, folder / "store.kvar", folder / "node.log")
        self.lmcache = LMCache(python, overlay, folder / "lmcache.log")
        self.engine = Engine(
            python,
            arguments.model,
            overlay,
            cpu_arguments(BLOCK_TOKENS),
            folder,
            folder / "vllm.log",
        )
        maker = PromptMaker(AutoTokenizer.from_pretrained(arguments.model))
        self.warm_up = [
            maker.make(f"warm-up-{number}", "en", tokens)
            for number, tokens in enumerate(WARM_UP_TOKENS)
        ]
        self.prompts = maker.series(LENGTHS_TOKENS, PROMPTS_A_LENGTH)
        self.cold: dict[str, Answer] = {}
        self.wrong: list[str] = []

    def wait_until_stored(self, stored: Callable[[], int]) -> int:
        """LMCache stores behind the answers: waits until nothing comes; how much it has."""
        started = since = time.monotonic()
        have = -1
        while time.monotonic() - since < STORED_QUIET_S or have <= 0:
            now = stored()
            if now != have:
                have, since = now, time.monotonic()
            if time.monotonic() - started > STORED_WAIT_S_MAX:
                self.wrong.append(f"the store still grows after {STORED_WAIT_S_MAX} s, or is empty")
                break
            time.sleep(0.1)
        return have

    def external_hits(self) -> int:
        """Tokens that vLLM counts as hits of its connector."""
        return int(self.engine.counter("external_prefix_cache_hits"))

    def close(self) -> None:
        """Ends all servers."""
        self.engine.kill()
        self.lmcache.kill()
        self.node.kill()
