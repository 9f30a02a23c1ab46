"""What the run shows: a table, ``results.json``, and a plot. Knows nothing of servers."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One prompt asked again of one tier."""

    name: str
    language: str
    tier: str
    prompt_tokens: int
    ttft_cold_s: float
    ttft_hit_s: float
    ttft_local_hit_s: float
    external_hit_tokens: int
    full_block_tokens: int
    outputs_equal: bool
    logprob_distance: float


@dataclass(frozen=True)
class Summary:
    """All prompts of one length and tier: medians of times, sums of tokens' shares."""

    prompt_tokens: int
    tier: str
    prompts: int
    ttft_cold_s: float
    ttft_hit_s: float
    ttft_local_hit_s: float
    cold_over_hit: float
    cold_over_local_hit: float
    external_hit_tokens: int
    full_block_tokens: int
    hit_share: float
    outputs_equal: bool
    logprob_distance_max: float


def summarise(rows: list[Row]) -> list[Summary]:
    """One summary for each length and tier, in the order first met."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.prompt_tokens, row.tier), []).append(row)
    return [_summary(tokens, tier, group) for (tokens, tier), group in groups.items()]


def _summary(tokens: int, tier: str, rows: list[Row]) -> Summary:
    cold = statistics.median(row.ttft_cold_s for row in rows)
    hit = statistics.median(row.ttft_hit_s for row in rows)
    local = statistics.median(row.ttft_local_hit_s for row in rows)
    return Summary(
        prompt_tokens=tokens,
        tier=tier,
        prompts=len(rows),
        ttft_cold_s=round(cold, 4),
        ttft_hit_s=round(hit, 4),
        ttft_local_hit_s=round(local, 4),
        cold_over_hit=round(cold / hit, 2),
        cold_over_local_hit=round(cold / local, 2),
        external_hit_tokens=round(statistics.median(row.external_hit_tokens for row in rows)),
        full_block_tokens=rows[0].full_block_tokens,
        hit_share=round(
            sum(row.external_hit_tokens for row in rows)
            / max(1, sum(row.full_block_tokens for row in rows)),
            4,
        ),
        outputs_equal=all(row.outputs_equal for row in rows),
        logprob_distance_max=max(row.logprob_distance for row in rows),
    )


def table(summaries: list[Summary]) -> str:
    """The figures for people."""
    head = (
        f"{'tokens':>6} {'tier':>9} {'cold s':>8} {'hit s':>8} {'local s':>8} "
        f"{'cold/hit':>9} {'cold/local':>10} {'hit tokens':>12} {'of':>6} {'equal':>6} {'dlogp':>8}"
    )
    lines = [head, "-" * len(head)]
    lines += [
        f"{row.prompt_tokens:>6} {row.tier:>9} {row.ttft_cold_s:>8.3f} {row.ttft_hit_s:>8.3f} "
        f"{row.ttft_local_hit_s:>8.3f} {row.cold_over_hit:>8.1f}x {row.cold_over_local_hit:>9.1f}x "
        f"{row.external_hit_tokens:>12} {row.full_block_tokens:>6} "
        f"{'yes' if row.outputs_equal else 'NO':>6} {row.logprob_distance_max:>8.1e}"
        for row in summaries
    ]
    return "\n".join(lines)


def write_json(summaries: list[Summary], rows: list[Row], results: Path, details: Path) -> None:
    """``results.json`` by length and tier, and every single prompt beside it."""
    results.write_text(json.dumps([asdict(one) for one in summaries], indent=2) + "\n")
    details.write_text(json.dumps([asdict(one) for one in rows], indent=2) + "\n")


def plot(summaries: list[Summary], path: Path) -> None:
    """Time to the first token over prompt length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    tiers = list(dict.fromkeys(row.tier for row in summaries))
    first = [row for row in summaries if row.tier == tiers[0]]
    lengths = [row.prompt_tokens for row in first]
    axes.plot(lengths, [row.ttft_cold_s for row in first], "o-", color="#b5482a", label="computed")
    for tier, style in zip(tiers, ("s-", "^-", "v-"), strict=False):
        of_tier = [row for row in summaries if row.tier == tier]
        axes.plot(
            [row.prompt_tokens for row in of_tier],
            [row.ttft_hit_s for row in of_tier],
            style,
            label=f"kvar, {tier}",
        )
    axes.plot(
        lengths,
        [row.ttft_local_hit_s for row in first],
        "d--",
        color="#777777",
        label="vLLM's own cache, never restarted",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel("time to first token (s)")
    axes.set_title("Time to first token after a restart (median)")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
