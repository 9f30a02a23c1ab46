"""What the connector counts, by name; knows nothing of vLLM or Prometheus.

Every name is declared here with its meaning and its labels, and becomes a metric
``vllm:kvar_<name>`` of vLLM's own endpoint (counters with ``_total`` behind it). Counts travel as
plain numbers under ``name`` or ``name:label:label``, times as lists under the same, because they
cross two process boundaries on their way:

```text
worker ----> scheduler ----> API server ----> /metrics
   (added up over ranks)        (KvarPromMetrics)
```
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Declared:
    """One metric."""

    help: str
    labels: tuple[str, ...] = ()


COUNTERS: dict[str, Declared] = {
    # The way of prompts' tokens to a hit: funnel.py says what each stage and reason is.
    "funnel_tokens": Declared("Tokens of admitted prompts by the stage they reached.", ("stage",)),
    "lost_tokens": Declared(
        "Tokens of admitted prompts that did not reach a stage, and why.", ("stage", "reason")
    ),
    "readmitted_tokens": Declared("Of the tokens in the funnel, those of preempted requests."),
    # Lookups.
    "failed_lookups": Declared("Lookups that the store did not answer."),
    "looked_up_tokens": Declared("Tokens asked about, each time they were."),
    "stored_tokens": Declared("Of the tokens asked about, those that were stored."),
    "observed_lookups": Declared("Lookups whose finds are not loaded, by mode or role."),
    "observed_tokens": Declared("Tokens that such lookups found beyond the engine's own cache."),
    # Loads.
    "hit_tokens": Declared("Tokens ordered to be loaded."),
    "loaded_tokens": Declared("Tokens loaded."),
    "failed_load_tokens": Declared("Tokens ordered to be loaded that did not come whole."),
    "load_missed_blocks": Declared("Blocks of loads that were no hit.", ("outcome",)),
    "loaded_bytes": Declared("Bytes loaded."),
    "load_seconds": Declared("Time loads took, added up."),
    "layered_load_seconds": Declared("Time loads by layers took, added up."),
    "layered_wait_seconds": Declared("Of that, what forward passes waited for."),
    # Saves.
    "saved_tokens": Declared("Tokens saved, or found saved by another writer."),
    "unsaved_tokens": Declared("Tokens ordered to be saved that were not."),
    "save_refused_blocks": Declared("Blocks of saves that were not stored.", ("outcome",)),
    "save_tainted_blocks": Declared("Blocks not saved since a load by layers had failed."),
    "saved_bytes": Declared("Bytes saved."),
    "save_seconds": Declared("Time from steps' ends until their saves had ended, added up."),
    "layered_save_blocks": Declared("Blocks of which layers were sent while they were computed."),
    # The choice.
    "recompute_tokens": Declared("Stored tokens that were computed since that was sooner."),
    "explored_requests": Declared("Requests that loaded against the choice, to know."),
    "computed_tokens": Declared("Tokens of steps that were mostly prompt."),
    "computed_seconds": Declared("Time of those steps."),
}

HISTOGRAMS: dict[str, Declared] = {
    "hook_seconds": Declared("Time inside one hook of the connector in one step.", ("hook",)),
    "step_hook_seconds": Declared(
        "Time inside all hooks of one side in one step that computed something.", ("side",)
    ),
    "step_seconds": Declared("A worker's step that computed something, hooks included."),
}

# From what a hook that does nothing takes to what nobody should ever see.
SECONDS_BUCKETS = (
    *(round(digits * 10.0**power, 6) for power in (-5, -4, -3, -2) for digits in (1, 2.5, 5)),
    *(0.1, 0.25, 1.0, 5.0),
)


def series(key: str) -> tuple[str, tuple[str, ...]]:
    """A key's metric and the values of its labels.

    >>> series("lost_tokens:present:absent")
    ('lost_tokens', ('present', 'absent'))
    """
    name, *values = key.split(":")
    return name, tuple(values)


def merge(mine: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    """Adds counts, and joins lists of times."""
    for key, value in theirs.items():
        if isinstance(value, list):
            mine[key] = [*mine.get(key, ()), *value]
        else:
            mine[key] = mine.get(key, 0) + value


@dataclass
class Counters:
    """Counts since they were last taken."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Adds to one counter."""
        if amount:
            key = ":".join((name, *labels)) if labels else name
            self.values[key] = self.values.get(key, 0) + amount

    def take(self) -> dict[str, float]:
        """All counters; they start again at nothing."""
        taken, self.values = self.values, {}
        return taken


class _Timed:
    """Adds the time inside a ``with`` to one hook; not for hooks inside each other."""

    __slots__ = ("_began", "_hook", "_now", "_spent")

    def __init__(self, hook: str, spent: dict[str, float], now: Callable[[], float]) -> None:
        self._hook = hook
        self._spent = spent
        self._now = now
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds = self._now() - self._began
        self._spent[self._hook] = self._spent.get(self._hook, 0.0) + seconds


class HookTimes:
    """How long one side's hooks took in a step.

    A hook that is called once a request or a layer counts with all its calls of the step: that is
    what the step pays.
    """

    def __init__(self, side: str, now: Callable[[], float] = time.perf_counter) -> None:
        self._side = side
        self._now = now
        self._spent: dict[str, float] = {}
        self._timed: dict[str, _Timed] = {}
        self._began: float | None = None

    def __call__(self, hook: str) -> _Timed:
        """``with times("start_load_kv"): ...``."""
        timed = self._timed.get(hook)
        if timed is None:
            timed = self._timed[hook] = _Timed(hook, self._spent, self._now)
        return timed

    def step_began(self) -> None:
        """The worker begins a step."""
        self._began = self._now()

    def step_ended(self, *, computed: bool) -> dict[str, list[float]]:
        """The times of a step, if anything was called in it. ``computed``: it had tokens."""
        ended: dict[str, list[float]] = {
            f"hook_seconds:{hook}": [seconds] for hook, seconds in self._spent.items()
        }
        if computed and self._spent:
            ended[f"step_hook_seconds:{self._side}"] = [sum(self._spent.values())]
        if computed and self._began is not None:
            ended["step_seconds"] = [self._now() - self._began]
        self._began = None
        self._spent.clear()
        return ended
