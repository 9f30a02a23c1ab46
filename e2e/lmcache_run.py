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
import json
import tempfile
from pathlib import Path
from typing import Any

from harness import arguments_of, judge, out_folder, script
from lmcache_stage import CHUNK_TOKENS, HIT_SHARE_MIN, LOGPROB_TOLERANCE, Stage
from prompts import Prompt
from servers import Answer, say

ANSWER_TOKENS = 8
FREE_BYTES_MIN = 6 << 30


class Run(Stage):
    """Everything is restarted, piece by piece."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        super().__init__(arguments, folder)
        self.figures: list[dict[str, Any]] = []

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

    def ask_again(self, tier: str) -> None:
        """Every prompt again, with LMCache's and vLLM's own memory empty."""
        for prompt in self.prompts:
            before = self.external_hits()
            answer = self.engine.ask(prompt.tokens, ANSWER_TOKENS)
            hits = self.external_hits() - before
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
        if self.external_hits():
            self.wrong.append("no node: vLLM counts hits that nobody can have given")
        if self.lmcache.log_count("kvar: ") == before:
            self.wrong.append("no node: LMCache's log does not say so")

    def all_phases(self) -> None:
        """From an empty store to a node that is gone."""
        self.node.start()
        self.start_engine()
        say(f"cold: {len(self.prompts)} prompts")
        self.ask_cold()
        say(f"{self.wait_until_stored(self.node.blocks_stored)} blocks stored")
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
