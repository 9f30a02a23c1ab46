"""What the scheduler tells the workers in a step, and what they tell it back.

```text
scheduler                                 worker (one a rank)
  StepOrders{loads, saves, salt}   --->     starts them in the background
  SaveReports{job -> SaveReport}   <---     ends of saves; loads end through vLLM's own channel
  FailedLoad by request            <---     from where on a load brought nothing, and why
  LoadReport, step                 <---     how fast loads were; which step has ended
```

Orders carry engine hashes, not block ids: every rank names its own blocks from them. These are
plain data and know nothing of vLLM, so that they can be tested without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class LoadOrder:
    """Fill these pages of a request: one order for each group of layers that needs some."""

    request_id: str
    hashes: list[bytes]
    block_ids: list[int]
    depth: int
    """Position of the first block in its chain."""
    request: int = 0
    """The prompt's number towards the store; 0: none."""
    group: int = 0
    orders: int = 1
    """Orders of this request in this step: it has what it loads when all of them have ended."""
    tokens: float = 0.0
    """What this order brings, of the request's; groups share."""


@dataclass
class SaveOrder:
    """Store these pages; the scheduler keeps them from being reused until the job's report."""

    job: int
    hashes: list[bytes]
    block_ids: list[int]
    depth: int
    """Position of the first block in its chain."""
    request: int = 0
    """The prompt's number towards the store; 0: none."""
    group: int = 0


@dataclass
class StepOrders:
    """All a worker is to start in one step."""

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    salt: str = ""
    """Part of the fingerprint; a new one after the cache was reset from outside."""
    step: int = 0
    """Names a step whose end the scheduler wants to hear of; 0: it does not."""
    failures_heard: int = 0
    """Steps with failed loads by layers that the scheduler knew of when it ordered this."""
    tokens: int = 0
    """Computed in this step; 0: it only looks after loads and saves."""


@dataclass
class SaveReport:
    """How one job ended on the ranks counted in it."""

    ranks: int
    stored_blocks: int
    failed_blocks: int

    def __add__(self, other: SaveReport) -> SaveReport:
        return SaveReport(
            self.ranks + other.ranks,
            self.stored_blocks + other.stored_blocks,
            self.failed_blocks + other.failed_blocks,
        )


@dataclass
class LayersReport:
    """Ends of loads by layers, which vLLM's own channel has no place for."""

    loaded: frozenset[str] = frozenset()
    """Requests whose load was part of this step, well or not."""
    failures: int = 0
    """Steps so far in which such a load failed."""

    def __add__(self, other: LayersReport) -> LayersReport:
        """Adds another rank's."""
        return LayersReport(self.loaded | other.loaded, max(self.failures, other.failures))


@dataclass(frozen=True)
class FailedLoad:
    """Where a load stopped being whole: what comes behind that place is of no use."""

    position: int
    """Of the first block that did not come, counted from the load's first; 0 where nothing of a
    load that is not whole is of use."""
    reason: str
    """Its outcome."""


@dataclass
class LoadReport:
    """What the loads that ended brought, to see how fast the store is."""

    tokens: float = 0.0
    """Of all ranks counted in it."""
    seconds: float = 0.0
    """In which loads were under way, on the rank where it was longest."""

    def __add__(self, other: LoadReport) -> LoadReport:
        """Adds another rank's."""
        return LoadReport(self.tokens + other.tokens, max(self.seconds, other.seconds))


def merge_failed(
    mine: Mapping[str, FailedLoad], theirs: Mapping[str, FailedLoad]
) -> dict[str, FailedLoad]:
    """Adds two ranks' failed loads: a request has what all ranks have."""
    merged = dict(mine)
    for request_id, failed in theirs.items():
        known = merged.get(request_id)
        if known is None or failed.position < known.position:
            merged[request_id] = failed
    return merged


def merge_reports(
    mine: dict[int, SaveReport], theirs: dict[int, SaveReport]
) -> dict[int, SaveReport]:
    """Adds two ranks' reports job by job."""
    merged = dict(mine)
    for job, report in theirs.items():
        merged[job] = merged[job] + report if job in merged else report
    return merged
