"""Time to the first token of stored prompts: vLLM over kvar, and over LMCache with its own files.

The same stock vLLM, the same prompts, one arm after the other:

```text
  kvar        vLLM ── kvar's connector ── node                   memory: the node's
                                                                 device: the node restarted
  lmcache     vLLM ── LMCache's connector ── its server (MP mode) ── files (fs_native)
                                                                 memory: the kernel's page cache
                                                                 device: that given back, too
```

Before every question vLLM's own cache is emptied, and so is LMCache's own memory, its L1: what is
asked for comes from what outlives both. Ends with 0 if every answer equals the cold one and nearly
all full chunks were external hits; times are shown, and written as JSON, and not judged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import arguments_of, judge, out_folder, script
from lmcache_stage import (
    CHUNK_TOKENS,
    HIT_SHARE_MIN,
    LOGPROB_TOLERANCE,
    STORED_WAIT_S_MAX,
    Stage,
)
from prompts import Prompt
from servers import Answer, kvar_transfer, say

ANSWER_TOKENS = 4
ARMS = ("kvar", "lmcache")
TIERS = ("memory", "device")
FREE_BYTES_MIN = 8 << 30


class Compare(Stage):
    """One arm after the other."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        super().__init__(arguments, folder)
        self.files = folder / "files"
        self.ttft_s: dict[tuple[str, str, int], list[float]] = {}

    def run(self, arm: str) -> None:
        """One arm from an empty store to its device."""
        say(f"{arm}: cold")
        if arm == "kvar":
            self.node.start()
            self.engine.start(kvar_transfer(self.node))
        else:
            self.lmcache.serve({"type": "fs_native", "base_path": str(self.files)})
            self.engine.start(self.lmcache.transfer())
        for prompt in self.warm_up * 2:
            self.engine.ask(prompt.tokens, ANSWER_TOKENS)
        for prompt in self.prompts:
            answer = self.engine.ask(prompt.tokens, ANSWER_TOKENS)
            self.cold.setdefault(prompt.name, answer)
            self._note(arm, "cold", prompt, answer)
        self.wait_until_stored(lambda: self._stored(arm))
        for tier in TIERS:
            say(f"{arm}: {tier}")
            if arm == "kvar" and tier == "device":
                self.node.stop()
                self.node.start()
                self._wait_until_found()
            for prompt in self.prompts:
                self.engine.forget_local_cache()
                if arm == "lmcache":
                    self.lmcache.clear()
                    if tier == "device":
                        give_back(self.files)
                self._ask_again(arm, tier, prompt)
        self.close()

    def _ask_again(self, arm: str, tier: str, prompt: Prompt) -> None:
        before = self.external_hits()
        answer = self.engine.ask(prompt.tokens, ANSWER_TOKENS)
        hits = self.external_hits() - before
        self._note(arm, tier, prompt, answer)
        if hits < HIT_SHARE_MIN * prompt.full_block_tokens(CHUNK_TOKENS):
            self.wrong.append(f"{arm}, {tier}: {prompt.name}: {hits} tokens were hits")

    def _note(self, arm: str, tier: str, prompt: Prompt, answer: Answer) -> None:
        length = len(prompt.tokens)
        self.ttft_s.setdefault((arm, tier, length), []).append(answer.ttft_s)
        say(f"  {prompt.name}: {answer.ttft_s:.3f} s")
        if not answer.equals(self.cold[prompt.name], LOGPROB_TOLERANCE):
            self.wrong.append(f"{arm}, {tier}: {prompt.name} was answered differently")

    def _stored(self, arm: str) -> int:
        if arm == "kvar":
            return self.node.blocks_stored()
        return sum(path.stat().st_size for path in self.files.rglob("*") if path.is_file())

    def _wait_until_found(self) -> None:
        """Until vLLM has found the restarted node."""
        started = time.monotonic()
        while time.monotonic() - started < STORED_WAIT_S_MAX:
            self.engine.forget_local_cache()
            before = self.external_hits()
            self.engine.ask(self.warm_up[0].tokens, ANSWER_TOKENS)
            if self.external_hits() > before:
                return
        self.wrong.append("kvar: vLLM did not find the node again")

    def figures(self) -> list[dict[str, Any]]:
        """Medians, and how many times as long LMCache took."""
        found = []
        for (arm, tier, length), times in self.ttft_s.items():
            if arm != "kvar":
                continue
            theirs = self.ttft_s.get(("lmcache", tier, length))
            ours_s = statistics.median(times)
            row = {"tier": tier, "prompt_tokens": length, "kvar_s": ours_s}
            if theirs:
                row |= {"lmcache_s": statistics.median(theirs)}
                row |= {"ratio": statistics.median(theirs) / ours_s}
            found.append(row)
        return found


def give_back(folder: Path) -> None:
    """Takes files out of the page cache, so that they are read from the device."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> int:
    """Runs the arms; the exit code is the verdict."""
    parser = arguments_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--keep", action="store_true", help="keep logs also on success")
    arguments = parser.parse_args()
    out = out_folder(FREE_BYTES_MIN)
    folder = Path(tempfile.mkdtemp(prefix="compare-", dir=out))
    compare = Compare(arguments, folder)

    def phases() -> None:
        for arm in arguments.arms:
            compare.run(arm)
        figures = compare.figures()
        (out / "lmcache-compare.json").write_text(json.dumps(figures, indent=1) + "\n")
        for row in figures:
            ratio = f", {row['ratio']:.2f} times ours" if "ratio" in row else ""
            theirs = f"LMCache with its files {row.get('lmcache_s', 0):.3f} s{ratio}"
            print(f"{row['prompt_tokens']:>6} {row['tier']:>7}: {row['kvar_s']:.3f} s; {theirs}")
        print(f"load now {os.getloadavg()[0]:.1f}")

    return judge(compare, phases, folder, keep=arguments.keep)


if __name__ == "__main__":
    script(main)
