"""The connector's own metrics as vLLM's endpoint carries them: the funnel, and time in hooks.

Knows nothing of servers: it reads the text of ``/metrics``.
"""

from __future__ import annotations

import re

SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
LABEL = re.compile(r'(\w+)="([^"]*)"')

# What docs/engines/vllm.md promises of a quiet machine; here it is only shown.
P99_S = 0.001


class Metrics:
    """One reading of the endpoint, of one engine."""

    def __init__(self, text: str) -> None:
        self._samples: list[tuple[str, dict[str, str], float]] = []
        for line in text.splitlines():
            sample = SAMPLE.match(line)
            if sample is not None:
                labels = dict(LABEL.findall(sample["labels"] or ""))
                self._samples.append((sample["name"], labels, float(sample["value"])))

    def sum(self, name: str, **labels: str) -> float:
        """Sum of all samples of this name with these labels."""
        return sum(
            value
            for sample, its, value in self._samples
            if sample == name and labels.items() <= its.items()
        )

    def by(self, name: str, *labels: str) -> dict[str, float]:
        """Sums of a name's samples by some of their labels."""
        sums: dict[str, float] = {}
        for sample, its, value in self._samples:
            if sample == name:
                key = " ".join(its[label] for label in labels)
                sums[key] = sums.get(key, 0) + value
        return sums


def funnel(metrics: Metrics) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens by stage, and losses by stage and reason."""
    stages = metrics.by("vllm:kvar_funnel_tokens_total", "stage")
    return stages, metrics.by("vllm:kvar_lost_tokens_total", "stage", "reason")


def wrong_with(metrics: Metrics, prompt_tokens: int) -> list[str]:
    """What is wrong with the funnel of an engine that was asked so many tokens since its start."""
    stages, losses = funnel(metrics)
    wrong = []

    def expect(what: str, is_: float, should: float) -> None:
        if is_ != should:
            wrong.append(f"funnel: {what} is {is_:.0f} and should be {should:.0f}")

    used, local = stages.get("used", 0), stages.get("local", 0)
    expect("prompt", stages.get("prompt", 0), prompt_tokens)
    expect("local + used + losses", local + used + sum(losses.values()), prompt_tokens)
    # vLLM counts the same from its own side.
    expect("used", used, metrics.sum("vllm:external_prefix_cache_hits_total"))
    expect("local", local, metrics.sum("vllm:prefix_cache_hits_total"))
    return wrong


def told(metrics: Metrics) -> list[str]:
    """The funnel and the hooks as lines for people."""
    stages, losses = funnel(metrics)
    lines = ["funnel: " + ", ".join(f"{stage} {tokens:.0f}" for stage, tokens in stages.items())]
    lines += ["lost: " + ", ".join(f"{why} {tokens:.0f}" for why, tokens in losses.items())]
    step = metrics.sum("vllm:kvar_step_seconds_sum")
    for side in ("worker", "scheduler"):
        name = "vllm:kvar_step_hook_seconds"
        count = metrics.sum(f"{name}_count", side=side)
        spent = metrics.sum(f"{name}_sum", side=side)
        quick = metrics.sum(f"{name}_bucket", side=side, le=f"{P99_S}")
        if count and step:
            lines.append(
                f"hooks of the {side}: {spent / step:.2%} of the steps' time, "
                f"{quick / count:.1%} of {count:.0f} steps within {P99_S * 1000:.0f} ms"
            )
    return lines
