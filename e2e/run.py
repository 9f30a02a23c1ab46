"""The main job on real input: stock vLLM gets its KV back after everything was restarted.

```text
  node + vLLM   cold: each prompt computed, then asked again (vLLM's own cache: the ceiling)
  kill -9 vLLM, start it again              ask again: tier "dram", from the node's memory
  SIGTERM node, kill vLLM, start both       ask again: tier "flash", from the node's file
  stop node, flip bytes all over its file   ask again: must be recomputed, equal to cold
```

Ends with 0 only if every answer equals the cold one (same greedy tokens, logprobs within 1e-4),
at least 98 % of the prompts' full blocks were external hits by vLLM's own counter, the connector's
own account of the same prompts adds up to that (the funnel on vLLM's ``/metrics``), and the damaged
store was noticed and changed nothing. Times are shown and never judged: CI machines are busy.

Between tiers vLLM's own cache must be empty, or it would answer itself: it is killed, or (quick
form, from the second tier on) told to forget, which also shows that it finds a restarted node.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import funnel
import report
from harness import HERE, arguments_of, judge, out_folder, script
from prompts import Prompt, PromptMaker
from servers import Answer, Engine, Node, cpu_arguments, kvar_transfer, say

BLOCK_TOKENS = 32
ANSWER_TOKENS = 8
LENGTHS_TOKENS = [512, 1024, 2048, 4096, 8192]
PROMPTS_A_LENGTH = 3
QUICK_LENGTHS_TOKENS = [512, 2048]
QUICK_PROMPTS_A_LENGTH = 2
# Long enough for two chunks of prefill; asked before every measurement, never measured.
WARM_UP_TOKENS = [600, 1200]

LOGPROB_TOLERANCE = 1e-4
HIT_SHARE_MIN = 0.98

# Gemma 3 under vLLM's hybrid KV cache manager: full attention, and five of windows. Each group
# stores blocks of its own.
HYBRID_GROUPS = 6

# One flipped byte in every 256 KiB: some five in each block of this model (1.2 MiB), while most
# of the store's own records survive, so that damaged blocks are found, read, and must be refused.
FLIP_EVERY_BYTES = 256 << 10
# The superblocks stay whole: without them the node rightly refuses to start at all.
FLIP_FROM_BYTES = 1 << 20

# The store's file (4 GiB), logs, and some room.
FREE_BYTES_MIN = 6 << 30

STORED_WAIT_S_MAX = 120

# The breaker tries again at the latest after 5 s; a slow machine needs some more.
FOUND_AGAIN_S_MAX = 60

# A Unix socket's path has at most 107 characters, of which the run's folder and vLLM's own names
# (a uuid) take 50; the source tree may lie deep.
SOCKET_FOLDER_CHARACTERS_MAX = 57


class Run:
    """One run: its servers, its prompts, and what came out."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.quick: bool = arguments.quick
        self.groups = HYBRID_GROUPS if arguments.hybrid else 1
        self.bytes_a_token = 0.0
        self.node = Node(arguments.kvar, folder / "store.kvar", folder / "node.log")
        self.engine = Engine(
            Path(sys.executable),
            arguments.model,
            arguments.overlay,
            cpu_arguments(BLOCK_TOKENS, hybrid=arguments.hybrid),
            folder,
            folder / "vllm.log",
        )
        maker = PromptMaker(AutoTokenizer.from_pretrained(arguments.model))
        self.warm_up = [
            maker.make(f"warm-up-{number}", "en", tokens)
            for number, tokens in enumerate(WARM_UP_TOKENS)
        ]
        self.prompts = maker.series(
            QUICK_LENGTHS_TOKENS if self.quick else LENGTHS_TOKENS,
            QUICK_PROMPTS_A_LENGTH if self.quick else PROMPTS_A_LENGTH,
        )
        self.cold: dict[str, Answer] = {}
        self.local: dict[str, Answer] = {}
        self.rows: list[report.Row] = []
        self.wrong: list[str] = []

    def start_engine(self) -> None:
        """Starts vLLM and asks the warm-up prompts, so that first-time costs fall on them."""
        self.engine.start(kvar_transfer(self.node))
        self.ask_warm_up()

    def ask_warm_up(self) -> None:
        """Asks what is not measured, twice: computed or loaded, and from vLLM's own cache."""
        for prompt in self.warm_up * 2:
            self.engine.ask(prompt.tokens, ANSWER_TOKENS)

    def cold_phase(self) -> None:
        """Every prompt for the first time, and at once again from vLLM's own cache."""
        say(f"cold: {len(self.prompts)} prompts")
        for prompt in self.prompts:
            before = self.engine.counter("external_prefix_cache_hits")
            cold = self.engine.ask(prompt.tokens, ANSWER_TOKENS)
            if self.engine.counter("external_prefix_cache_hits") != before:
                self.wrong.append(f"{prompt.name}: an external hit on a prompt never seen")
            local = self.engine.ask(prompt.tokens, ANSWER_TOKENS)
            self.cold[prompt.name], self.local[prompt.name] = cold, local
            say(
                f"  {prompt.name} ({prompt.language}): cold {cold.ttft_s:.3f} s, "
                f"vLLM's own cache {local.ttft_s:.3f} s"
            )
            if not cold.equals(local, LOGPROB_TOLERANCE):
                # Not ours to judge, but it would explain a difference seen later.
                say(f"  note: vLLM's own cache differs by {cold.distance(local):.1e} in logprobs")

    def wait_until_stored(self) -> None:
        """Saves go on behind the answers: waits until the node holds all full blocks."""
        expected = self.groups * sum(
            (len(prompt.tokens) + ANSWER_TOKENS - 1) // BLOCK_TOKENS
            for prompt in self.prompts + self.warm_up
        )
        started = time.monotonic()
        while (stored := self.node.blocks_stored()) < expected:
            if time.monotonic() - started > STORED_WAIT_S_MAX:
                self.wrong.append(
                    f"{stored} of {expected} blocks stored after {STORED_WAIT_S_MAX} s"
                )
                break
            time.sleep(0.2)
        say(f"{stored} blocks stored ({expected} expected)")
        saved = self.engine.counter("kvar_saved_tokens")
        self.bytes_a_token = self.engine.counter("kvar_saved_bytes") / max(saved, 1)

    def tier_phase(self, tier: str) -> None:
        """Every prompt again, from the store."""
        say(f"{tier}: {len(self.prompts)} prompts")
        for prompt in self.prompts:
            hits, answer = self._ask_counted(prompt)
            row = self._row(prompt, tier, answer, hits)
            self.rows.append(row)
            say(
                f"  {prompt.name} ({prompt.language}): {answer.ttft_s:.3f} s, "
                f"{hits} of {row.full_block_tokens} tokens from the store, "
                f"{row.ttft_cold_s / row.ttft_hit_s:.1f}x"
            )
            if not row.outputs_equal:
                self.wrong.append(f"{tier}: {prompt.name} was answered differently")
        share = sum(row.external_hit_tokens for row in self.rows if row.tier == tier) / sum(
            row.full_block_tokens for row in self.rows if row.tier == tier
        )
        if share < HIT_SHARE_MIN:
            self.wrong.append(f"{tier}: {share:.1%} of the full blocks were external hits")

    def check_funnel(self) -> None:
        """The connector's own account of the prompts asked since vLLM was started."""
        asked = [*self.warm_up * 2, *self.prompts]
        metrics = funnel.Metrics(self.engine.metrics())
        for line in funnel.told(metrics):
            say(f"  {line}")
        self.wrong += funnel.wrong_with(metrics, sum(len(prompt.tokens) for prompt in asked))
        loaded = metrics.sum("vllm:kvar_loaded_bytes_total")
        all_layers = metrics.sum("vllm:kvar_loaded_tokens_total") * self.bytes_a_token
        say(
            f"  {loaded / 1e6:.0f} MB loaded; all layers of those tokens have "
            f"{all_layers / 1e6:.0f} MB ({loaded / max(all_layers, 1):.0%})"
        )

    def _ask_counted(self, prompt: Prompt) -> tuple[int, Answer]:
        before = self.engine.counter("external_prefix_cache_hits")
        answer = self.engine.ask(prompt.tokens, ANSWER_TOKENS)
        return int(self.engine.counter("external_prefix_cache_hits") - before), answer

    def _row(self, prompt: Prompt, tier: str, answer: Answer, hits: int) -> report.Row:
        cold = self.cold[prompt.name]
        return report.Row(
            name=prompt.name,
            language=prompt.language,
            tier=tier,
            prompt_tokens=len(prompt.tokens),
            ttft_cold_s=cold.ttft_s,
            ttft_hit_s=answer.ttft_s,
            ttft_local_hit_s=self.local[prompt.name].ttft_s,
            external_hit_tokens=hits,
            full_block_tokens=prompt.full_block_tokens(BLOCK_TOKENS),
            outputs_equal=answer.equals(cold, LOGPROB_TOLERANCE),
            logprob_distance=answer.distance(cold),
        )

    def damage_store(self) -> None:
        """Flips bytes all over the stopped node's file; always the same ones."""
        chance = random.Random(0xC0FFEE)
        size = self.node.data.stat().st_size
        flips = 0
        with self.node.data.open("r+b") as store:
            for start in range(FLIP_FROM_BYTES, size - FLIP_EVERY_BYTES, FLIP_EVERY_BYTES):
                place = start + chance.randrange(FLIP_EVERY_BYTES)
                store.seek(place)
                byte = store.read(1)[0]
                store.seek(place)
                store.write(bytes([byte ^ chance.randrange(1, 256)]))
                flips += 1
            os.fsync(store.fileno())
        say(f"flipped {flips} bytes in {size >> 20} MiB")

    def damaged_phase(self) -> None:
        """Every prompt again, from a store full of wrong bytes."""
        recovered_before = self.engine.counter("kvar_failed_load_tokens")
        say(f"damaged: {len(self.prompts)} prompts")
        for prompt in self.prompts:
            hits, answer = self._ask_counted(prompt)
            equal = answer.equals(self.cold[prompt.name], LOGPROB_TOLERANCE)
            say(f"  {prompt.name}: {answer.ttft_s:.3f} s, {hits} tokens promised, equal: {equal}")
            if not equal:
                self.wrong.append(f"damaged: {prompt.name} was answered differently")
        recovered = self.engine.counter("kvar_failed_load_tokens") - recovered_before
        corrupt = self.node.blocks_corrupt()
        say(
            f"{recovered:.0f} tokens were promised, did not come and were computed; the node found "
            f"{corrupt} damaged blocks"
        )
        if not recovered or not corrupt:
            self.wrong.append("damaged: the damage was never met, so nothing was shown")

    def all_phases(self) -> None:
        """The run from an empty store to a damaged one."""
        self.node.start()
        self.start_engine()
        self.cold_phase()
        self.wait_until_stored()

        say("kill -9 of vLLM")
        self.engine.kill()
        self.start_engine()
        self.tier_phase("dram")
        self.check_funnel()

        if self.quick:
            self.node.stop()
            self.node.start()
            self.forget()
        else:
            self.engine.kill()
            self.node.stop()
            self.node.start()
            self.start_engine()
        self.tier_phase("flash")

        if not self.quick:
            self.engine.kill()
        self.node.stop()
        self.damage_store()
        self.node.start()
        if self.quick:
            self.forget()
        else:
            self.engine.start(kvar_transfer(self.node))
        self.damaged_phase()

    def forget(self) -> None:
        """Empties vLLM's own cache, and waits until it has found the restarted node."""
        started = time.monotonic()
        hits = 0
        while not hits:
            if time.monotonic() - started > FOUND_AGAIN_S_MAX:
                self.wrong.append(f"vLLM did not find the node again in {FOUND_AGAIN_S_MAX} s")
                break
            self.engine.forget_local_cache()
            hits, _ = self._ask_counted(self.warm_up[0])
        say(f"vLLM found the node again after {time.monotonic() - started:.1f} s")
        self.ask_warm_up()
        self.engine.forget_local_cache()

    def close(self) -> None:
        """Ends both servers at once."""
        self.engine.kill()
        self.node.kill()


def main() -> int:
    """Runs everything; the exit code is the verdict."""
    parser = arguments_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--quick", action="store_true", help="two lengths, fewer restarts (for CI)")
    parser.add_argument("--hybrid", action="store_true", help="windows in groups of their own")
    parser.add_argument("--keep", action="store_true", help="keep logs also on success")
    arguments = parser.parse_args()

    out = out_folder(FREE_BYTES_MIN)
    fits = len(str(out)) < SOCKET_FOLDER_CHARACTERS_MAX
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=out if fits else None))

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    started = time.monotonic()
    run = Run(arguments, folder)

    def phases() -> None:
        run.all_phases()
        summaries = report.summarise(run.rows)
        report.write_json(summaries, run.rows, HERE / "results.json", out / "details.json")
        report.plot(summaries, HERE / "ttft.png")
        print(report.table(summaries))
        print(
            f"{time.monotonic() - started:.0f} s; load now {os.getloadavg()[0]:.1f}; "
            "figures in e2e/results.json, plot in e2e/ttft.png"
        )

    return judge(run, phases, folder, keep=arguments.keep)


if __name__ == "__main__":
    script(main)
