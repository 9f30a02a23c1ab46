"""Stock vLLM over the real LMCache server, whose L2 is a kvar node: everything is restarted once.

```text
  node + LMCache server + vLLM        cold: each prompt computed
  kill -9 vLLM and LMCache            ask again: from the node's memory ("dram")
  SIGTERM node, kill the others       ask again: from the node's file ("flash")
  kill -9 all three, start LMCache    no node any more: equal answers, all computed, and one line of
    and vLLM again, ask again         log says why
```

LMCache's own memory (its L1) is empty after each restart, so that what is hit came from kvar. Ends
with 0 only if every answer equals the cold one and at least 98 % of the prompts' full chunks were
external hits by vLLM's own counter. Times are shown and never judged.
"""

from __future__ import annotations

import argparse
import http
import json
import os
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from harness import arguments_of, judge, out_folder, script
from prompts import Prompt, PromptMaker
from servers import Answer, Engine, Node, Server, cpu_arguments, say

BLOCK_TOKENS = 32
# LMCache's default; an object of this model is 9 MiB then, more than a block may be.
CHUNK_TOKENS = 256
ANSWER_TOKENS = 8
LENGTHS_TOKENS = [1024, 4096]
PROMPTS_A_LENGTH = 2
WARM_UP_TOKENS = [600, 1200]
LOGPROB_TOLERANCE = 1e-4
HIT_SHARE_MIN = 0.98
START_S_MAX = 300
STORED_WAIT_S_MAX = 120
# The store is taken for complete when it has not grown for so long.
STORED_QUIET_S = 2.0
FREE_BYTES_MIN = 6 << 30


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


class Run:
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
        self.figures: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def start_engine(self) -> None:
        """LMCache and vLLM, warmed up."""
        self.lmcache.start(self.node)
        self.engine.start(self.lmcache.transfer())
        for prompt in self.warm_up * 2:
            self.engine.ask(prompt.tokens, ANSWER_TOKENS)

    def kill_engine(self) -> None:
        """Both at once, by kill -9."""
        self.engine.kill()
        self.lmcache.kill()

    def ask_cold(self) -> None:
        """Every prompt for the first time."""
        for prompt in self.prompts:
            self.cold[prompt.name] = self.engine.ask(prompt.tokens, ANSWER_TOKENS)
            say(f"  {prompt.name}: cold {self.cold[prompt.name].ttft_s:.3f} s")

    def wait_until_stored(self) -> None:
        """LMCache stores behind the answers: waits until the node grows no more."""
        started = time.monotonic()
        stored, since = -1, started
        while time.monotonic() - since < STORED_QUIET_S or stored <= 0:
            now = self.node.blocks_stored()
            if now != stored:
                stored, since = now, time.monotonic()
            if time.monotonic() - started > STORED_WAIT_S_MAX:
                self.wrong.append(f"the store still grows after {STORED_WAIT_S_MAX} s, or is empty")
                break
            time.sleep(0.1)
        say(f"{stored} blocks stored")

    def ask_again(self, tier: str) -> None:
        """Every prompt again, with LMCache's and vLLM's own memory empty."""
        for prompt in self.prompts:
            before = self.engine.counter("external_prefix_cache_hits")
            answer = self.engine.ask(prompt.tokens, ANSWER_TOKENS)
            hits = int(self.engine.counter("external_prefix_cache_hits") - before)
            full = prompt.full_block_tokens(CHUNK_TOKENS)
            cold = self.cold[prompt.name]
            self._compare(tier, prompt, answer)
            say(
                f"  {prompt.name}: {answer.ttft_s:.3f} s, {hits} of {full} tokens from the store, "
                f"{cold.ttft_s / answer.ttft_s:.1f}x"
            )
            self.figures.append(
                {
                    "tier": tier,
                    "prompt_tokens": len(prompt.tokens),
                    "ttft_cold_s": cold.ttft_s,
                    "ttft_hit_s": answer.ttft_s,
                    "hit_tokens": hits,
                    "full_chunk_tokens": full,
                }
            )
            if hits < HIT_SHARE_MIN * full:
                self.wrong.append(f"{tier}: {prompt.name}: {hits} of {full} tokens were hits")

    def _compare(self, when: str, prompt: Prompt, answer: Answer) -> None:
        if not answer.equals(self.cold[prompt.name], LOGPROB_TOLERANCE):
            self.wrong.append(
                f"{when}: {prompt.name} was answered differently "
                f"({answer.distance(self.cold[prompt.name]):.1e} in logprobs)"
            )

    def without_node(self) -> None:
        """No node, and nothing in anybody's memory: every prompt is computed, and equal."""
        self.node.kill()
        self.kill_engine()
        before = self.lmcache.log_count("kvar: ")
        self.start_engine()
        for prompt in self.prompts:
            answer = self.engine.ask(prompt.tokens, ANSWER_TOKENS)
            self._compare("no node", prompt, answer)
            cold = self.cold[prompt.name].ttft_s
            say(f"  {prompt.name}: {answer.ttft_s:.3f} s without a node, {cold:.3f} s before")
        if self.engine.counter("external_prefix_cache_hits"):
            self.wrong.append("no node: vLLM counts hits that nobody can have given")
        if self.lmcache.log_count("kvar: ") == before:
            self.wrong.append("no node: LMCache's log does not say so")

    def all_phases(self) -> None:
        """From an empty store to a node that is gone."""
        self.node.start()
        self.start_engine()
        say(f"cold: {len(self.prompts)} prompts")
        self.ask_cold()
        self.wait_until_stored()
        say("kill -9 of vLLM and LMCache")
        self.kill_engine()
        self.start_engine()
        self.ask_again("dram")
        self.kill_engine()
        self.node.stop()
        self.node.start()
        self.start_engine()
        self.ask_again("flash")
        self.without_node()

    def close(self) -> None:
        """Ends all of it."""
        self.kill_engine()
        self.node.kill()


def main() -> int:
    """Runs everything; the exit code is the verdict."""
    parser = arguments_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--keep", action="store_true", help="keep logs also on success")
    arguments = parser.parse_args()
    out = out_folder(FREE_BYTES_MIN)
    folder = Path(tempfile.mkdtemp(prefix="lmcache-", dir=out))
    run = Run(arguments, folder)

    def phases() -> None:
        run.all_phases()
        (out / "lmcache.json").write_text(json.dumps(run.figures, indent=1) + "\n")

    return judge(run, phases, folder, keep=arguments.keep)


if __name__ == "__main__":
    script(main)
