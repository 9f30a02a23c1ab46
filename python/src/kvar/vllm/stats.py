"""The connector's counts in vLLM's own log line and on vLLM's own ``/metrics``.

What is counted and what it means is in ``metrics``; here is only how vLLM wants to be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvar.vllm.metrics import COUNTERS, HISTOGRAMS, SECONDS_BUCKETS, merge, series

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "vllm:kvar_"


class KvarStats(KVConnectorStats):
    """Counts and times of an interval; all of them add up."""

    def reset(self) -> None:
        """Starts again at nothing."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another interval, rank or role."""
        merge(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The figures of the log line: counts, and of times the longest."""
        figures: dict[str, int | float] = {}
        for name, value in sorted(self.data.items()):
            if not isinstance(value, list):
                figures[f"kvar_{name}"] = round(value, 3)
            elif value:
                figures[f"kvar_{name}_max"] = round(max(value), 6)
        return figures

    def is_empty(self) -> bool:
        """Whether there is nothing to say."""
        return not self.data


class KvarPromMetrics(KVConnectorPromMetrics):
    """The metrics of one API server; labels beyond vLLM's own come with the first count."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, histogram = metric_types[Counter], metric_types[Histogram]
        self._metrics: dict[str, Any] = {
            name: counter(
                name=PREFIX + name,
                documentation=declared.help,
                labelnames=[*labelnames, *declared.labels],
            )
            for name, declared in COUNTERS.items()
        }
        for name, declared in HISTOGRAMS.items():
            self._metrics[name] = histogram(
                name=PREFIX + name,
                documentation=declared.help,
                buckets=SECONDS_BUCKETS,
                labelnames=[*labelnames, *declared.labels],
            )
        self._bound: dict[tuple[int, str], Any] = {}
        # What has no labels of ours is there, at 0, before it is first counted.
        for engine in per_engine_labelvalues:
            for name, declared in (COUNTERS | HISTOGRAMS).items():
                if not declared.labels:
                    self._series(engine, name)

    def _series(self, engine: int, key: str) -> Any:
        bound = self._bound.get((engine, key))
        if bound is None:
            name, labels = series(key)
            values = [*self.per_engine_labelvalues[engine], *labels]
            bound = self._bound[engine, key] = self._metrics[name].labels(*values)
        return bound

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Takes in what one engine counted since it last said."""
        for key, value in transfer_stats_data.items():
            if series(key)[0] not in self._metrics:
                # Not worth the API server; a test keeps every count declared.
                continue
            bound = self._series(engine_idx, key)
            if isinstance(value, list):
                for seconds in value:
                    bound.observe(seconds)
            else:
                bound.inc(value)
