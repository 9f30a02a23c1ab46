"""Results as text, plots and one HTML page. Knows nothing of engines."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

Table = tuple[list[str], list[list[str]]]

TITLES = {
    "random": "Random prompts: computed, and from each tier",
    "chat": "Conversations, turn by turn",
    "sharing": "Two engines, one store",
    "outages": "When things die, and come back",
    "burden": "What it costs when it brings nothing",
}
BARE, STORE, OWN = "#b5482a", "#2a6f97", "#777777"


def _s(seconds: float) -> str:
    return f"{seconds:.3f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _share(part: float) -> str:
    return f"{part:.1%}"


def tables(result: dict[str, Any]) -> list[tuple[str, Table]]:
    """The figures of one scenario, as titled tables."""
    return [*_TABLES[result["scenario"]](result), *_funnel(result)]


def _funnel(result: dict[str, Any]) -> list[tuple[str, Table]]:
    """Where the tokens went: stages, then what was lost on the way, by reason."""
    stages, losses = result["funnel"].get("stages", {}), result["funnel"].get("losses", {})
    if not stages:
        return []
    body = [[name, "", f"{tokens:.0f}"] for name, tokens in stages.items()]
    body += [["lost", reason, f"{tokens:.0f}"] for reason, tokens in losses.items()]
    title = "The hit funnel, with kvar, since the engine was last started (warm-up included)"
    return [(title, (["stage", "why", "tokens"], body))]


def _random(result: dict[str, Any]) -> list[tuple[str, Table]]:
    rows = result["rows"]
    cold = {_cell(row): row for row in rows if row["tier"] == "cold"}
    head = ["prompt", "answer", "at once", "tier", "TTFT p50 s", "mean", "p99", "cold / this"]
    head += ["ITL p50 ms", "tokens/s", "own hits", "store hits", "of", "same answers"]
    body = [
        [
            str(row["prompt_tokens"]),
            str(row["answer_tokens"]),
            str(row["concurrency"]),
            row["tier"],
            _s(row["ttft_p50_s"]),
            _s(row["ttft_mean_s"]),
            _s(row["ttft_p99_s"]),
            f"{cold[_cell(row)]['ttft_p50_s'] / max(row['ttft_p50_s'], 1e-9):.1f}x",
            _ms(row["itl_p50_s"]),
            f"{row['tokens_per_s']:.0f}",
            str(row["own_hit_tokens"]),
            str(row["store_hit_tokens"]),
            str(row["full_block_tokens"]),
            f"{row['answers_equal']} of {row['prompts']}",
        ]
        for row in rows
    ]
    return [("Every pass", (head, body))]


def _cell(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["prompt_tokens"], row["answer_tokens"], row["concurrency"]


def _chat(result: dict[str, Any]) -> list[tuple[str, Table]]:
    found: list[tuple[str, Table]] = []
    head = ["form", "arm", "prompt tokens, turns 2+", "hits", "ceiling", "hit rate", "of ceiling"]
    head += ["TTFT p50 s", "p99", "ITL p50 ms", "failed"]
    body = []
    for name, arms in result["forms"].items():
        for arm in ("without", "kvar"):
            if arm not in arms:
                continue
            one = arms[arm]
            later = one["later_turns"]
            body.append(
                [
                    name,
                    arm,
                    str(later["prompt_tokens"]),
                    str(later["hit_tokens"]),
                    str(later["ceiling_tokens"]),
                    _share(later["hit_share"]),
                    _share(later["of_ceiling"]),
                    _s(one["ttft_later_s"]["p50"]),
                    _s(one["ttft_later_s"]["p99"]),
                    _ms(one["itl_s"]["p50"]),
                    str(len(one["failed"])),
                ]
            )
    found.append(("Turns from the second on", (head, body)))
    head = ["form", "turn", "arm", "TTFT p50 s", "mean", "ITL p50 ms", "hit rate", "of ceiling"]
    body = [
        [
            name,
            str(turn["turn"]),
            arm,
            _s(turn["ttft_s"]["p50"]),
            _s(turn["ttft_s"]["mean"]),
            _ms(turn["itl_s"]["p50"]),
            _share(turn["hit_share"]),
            _share(turn["of_ceiling"]),
        ]
        for name, arms in result["forms"].items()
        for arm in ("without", "kvar")
        if arm in arms
        for turn in arms[arm]["by_turn"]
    ]
    found.append(("By turn", (head, body)))
    return found


def _sharing(result: dict[str, Any]) -> list[tuple[str, Table]]:
    head = ["arm", "hit rate, turns 2+", "of ceiling", "tokens from elsewhere"]
    head += ["TTFT p50 s", "mean", "p99", "failed"]
    body = [
        [
            name,
            _share(arm["hit_share"]),
            _share(arm["later_turns"]["of_ceiling"]),
            str(arm["from_elsewhere_tokens"]),
            _s(arm["ttft_later_s"]["p50"]),
            _s(arm["ttft_later_s"]["mean"]),
            _s(arm["ttft_later_s"]["p99"]),
            str(len(arm["failed"])),
        ]
        for name, arm in result["arms"].items()
    ]
    return [("Arms", (head, body))]


def _outages(result: dict[str, Any]) -> list[tuple[str, Table]]:
    head = ["phase", "answers", "failed", "sent again", "hit rate", "TTFT p50 s", "p99"]
    head += ["ITL p50 ms"]
    body = [
        [
            row["phase"],
            str(row["answers"]),
            str(row["failed"]),
            str(row["sent_again"]),
            _share(row["hit_share"]),
            _s(row["ttft_s"]["p50"]),
            _s(row["ttft_s"]["p99"]),
            _ms(row["itl_s"]["p50"]),
        ]
        for row in result["phases"]
    ]
    return [("Phases, in order", (head, body))]


def _burden(result: dict[str, Any]) -> list[tuple[str, Table]]:
    head = ["the node is", "pairs", "TTFT p50 s, without", "with kvar", "ratio", "90 % of them"]
    head += ["ITL ratio", "90 % of them", "first request s, without", "with kvar"]
    head += ["scheduler's hooks, ms a request"]
    body = [
        [
            row["state"],
            str(row["pairs"]),
            _s(row["ttft_s"]["bare"]["p50"]),
            _s(row["ttft_s"]["kvar"]["p50"]),
            *_ratio(row["ttft"]),
            *_ratio(row["itl"]),
            _s(row["first_s"]["bare"]),
            _s(row["first_s"]["kvar"]),
            f"{row['hooks_ms_a_request']:.2f}",
        ]
        for row in result["states"]
    ]
    return [("The same new prompts with and without the connector", (head, body))]


def _ratio(found: dict[str, float]) -> tuple[str, str]:
    return f"{found['p50']:.3f}", f"{found['low']:.3f} to {found['high']:.3f}"


_TABLES: dict[str, Callable[[dict[str, Any]], list[tuple[str, Table]]]] = {
    "random": _random,
    "chat": _chat,
    "sharing": _sharing,
    "outages": _outages,
    "burden": _burden,
}


def text(result: dict[str, Any]) -> str:
    """For a terminal."""
    lines = []
    for title, (head, body) in tables(result):
        widths = [max(len(row[at]) for row in [head, *body]) for at in range(len(head))]
        lines += ["", title]
        for row in [head, *body]:
            cells = zip(row, widths, strict=True)
            lines.append("  ".join(cell.rjust(width) for cell, width in cells))
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """One picture of a scenario."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.8), dpi=120)
    _PLOTS[result["scenario"]](result, axes)
    axes.set_ylabel("time to first token (s)")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _plot_random(result: dict[str, Any], axes: Any) -> None:
    styles = {"cold": ("o-", BARE), "own": ("d--", OWN), "memory": ("s-", STORE)}
    styles["flash"] = ("^-", "#61a5c2")
    names = {"cold": "computed", "own": "vLLM's own cache", "memory": "kvar, memory"}
    names["flash"] = "kvar, flash, after a restart"
    short = min(row["answer_tokens"] for row in result["rows"])
    for tier, (style, colour) in styles.items():
        rows = [
            row
            for row in result["rows"]
            if row["tier"] == tier and row["concurrency"] == 1 and row["answer_tokens"] == short
        ]
        if rows:
            lengths = [row["prompt_tokens"] for row in rows]
            times = [row["ttft_p50_s"] for row in rows]
            axes.plot(lengths, times, style, color=colour, label=names[tier])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("prompt (tokens), one request at a time, medians")


def _plot_chat(result: dict[str, Any], axes: Any) -> None:
    for (name, arms), line in zip(result["forms"].items(), ("-", "--"), strict=False):
        for arm, colour in (("without", BARE), ("kvar", STORE)):
            if arm in arms:
                turns = arms[arm]["by_turn"]
                at = [turn["turn"] for turn in turns]
                times = [turn["ttft_s"]["p50"] for turn in turns]
                axes.plot(at, times, f"o{line}", color=colour, label=f"{name}, {arm}")
    axes.set_xlabel("turn of the conversation (medians over users)")
    axes.set_ylim(bottom=0)


def _plot_sharing(result: dict[str, Any], axes: Any) -> None:
    names = list(result["arms"])
    times = [result["arms"][name]["ttft_later_s"]["mean"] for name in names]
    colours = [STORE if name.startswith("kvar") else BARE for name in names]
    bars = axes.bar(names, times, color=colours, label="mean, turns from the second on")
    shares = [f"{result['arms'][name]['hit_share']:.0%} hits" for name in names]
    axes.bar_label(bars, shares)


def _plot_outages(result: dict[str, Any], axes: Any) -> None:
    line = result["line"]
    for hit, colour, name in ((True, STORE, "from the store"), (False, BARE, "computed")):
        part = [one for one in line if (2 * one["hit_tokens"] > one["prompt_tokens"]) == hit]
        at = [one["at_s"] for one in part]
        axes.plot(at, [one["ttft_s"] for one in part], "o", ms=4, color=colour, label=name)
    axes.set_yscale("log")
    for event in result["events"]:
        axes.axvline(event["at_s"], color=OWN, lw=0.8, ls=":")
        axes.text(
            event["at_s"], 0.99, f" {event['name']}", rotation=90, fontsize=7, va="top",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xlabel("seconds since the start; each dot is one request")


def _plot_burden(result: dict[str, Any], axes: Any) -> None:
    states = [row["state"] for row in result["states"]]
    for arm, colour, shift in (("bare", BARE, -0.2), ("kvar", STORE, 0.2)):
        at = [number + shift for number in range(len(states))]
        times = [row["ttft_s"][arm]["p50"] for row in result["states"]]
        label = "with the connector" if arm == "kvar" else "without"
        axes.bar(at, times, 0.4, color=colour, label=label)
    axes.set_xticks(range(len(states)), [f"node {state}" for state in states])


_PLOTS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "random": _plot_random,
    "chat": _plot_chat,
    "sharing": _plot_sharing,
    "outages": _plot_outages,
    "burden": _plot_burden,
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% } .wrong { color: #a00; font-weight: bold }
"""


def _html_table(table: Table) -> str:
    head, body = table
    rows = [("th", head), *(("td", row) for row in body)]
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in rows
    ]
    return "<table>" + "\n".join(lines) + "</table>"


def _ceilings(results: dict[str, dict[str, Any]]) -> Table:
    """What there was to be had, and what was had: the first thing to look at."""
    rows: list[list[str]] = []
    if "random" in results:
        rows += [
            [
                f"random, {row['prompt_tokens']} tokens, {row['tier']}",
                str(row["full_block_tokens"]),
                str(row["store_hit_tokens"]),
                _share(row["store_hit_tokens"] / max(1, row["full_block_tokens"])),
            ]
            for row in results["random"]["rows"]
            if row["tier"] in ("memory", "flash") and row["concurrency"] == 1
        ]
    if "chat" in results:
        for name, arms in results["chat"]["forms"].items():
            later = arms["kvar"]["later_turns"]
            rows.append(_ceiling_row(f"chat, {name}, turns 2+", later))
    if "sharing" in results:
        for name, arm in results["sharing"]["arms"].items():
            rows.append(_ceiling_row(f"sharing, {name}, turns 2+", arm["later_turns"]))
    return ["input", "tokens that could be hits", "hits", "share"], rows


def _ceiling_row(name: str, later: dict[str, Any]) -> list[str]:
    most, hits = later["ceiling_tokens"], later["hit_tokens"]
    return [name, str(most), str(hits), _share(later["of_ceiling"])]


def write(results: dict[str, dict[str, Any]], out: Path) -> Path:
    """The page of all scenarios that have results, and their plots; where it is."""
    parts = ["<h1>kvar: what an engine gets back</h1>"]
    for name, result in results.items():
        parts.append(f"<h3>{html.escape(TITLES[name])}: where it ran</h3>")
        parts.append(_html_table((["", name], [[k, v] for k, v in result["facts"].items()])))
    parts.append("<h2>The ceiling of each input</h2>")
    parts.append(_html_table(_ceilings(results)))
    for name, result in results.items():
        picture = out / f"{name}.png"
        plot(result, picture)
        parts.append(f"<h2>{html.escape(TITLES[name])}</h2>")
        if result["quick"]:
            parts.append("<p>The quick form: it shows that it works, and no figures to quote.</p>")
        coded = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{coded}">')
        for title, table in tables(result):
            parts += [f"<h3>{html.escape(title)}</h3>", _html_table(table)]
        wrong = [f'<p class="wrong">{html.escape(one)}</p>' for one in result["wrong"]]
        parts += wrong or ["<p>Nothing failed; every hit that must be was one.</p>"]
    page = out / "report.html"
    head = f"<!doctype html><meta charset=utf-8><title>kvar</title><style>{_STYLE}</style>"
    page.write_text(head + "\n".join(parts) + "\n", encoding="utf-8")
    return page
