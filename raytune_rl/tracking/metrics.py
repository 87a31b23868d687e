"""Metrics that can be added up over micro-batches and ranks without losing their meaning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MetricSums:
    """Partial results by metric name; plain dicts of floats, so it pickles small and needs no import to make.

    `MetricSums(**{"mean": {"kl": (sum, count)}, "max": {"ratio": 2.0}})` is all it takes.

    Attributes:
        mean: name -> (sum, count). Counts may be fractional weights.
        max: name -> greatest so far.
        min: name -> least so far.
        sum: name -> total, for counters such as failures.
    """

    mean: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    max: Mapping[str, float] = field(default_factory=dict)
    min: Mapping[str, float] = field(default_factory=dict)
    sum: Mapping[str, float] = field(default_factory=dict)

    def merge(self, other: MetricSums) -> MetricSums:
        """The metrics of both parts together. A NaN in either stays NaN, in extremes too."""
        mean = dict(self.mean)
        for name, (total, count) in other.mean.items():
            before = mean.get(name, (0.0, 0.0))
            mean[name] = (before[0] + total, before[1] + count)
        total_of = dict(self.sum)
        for name, value in other.sum.items():
            total_of[name] = total_of.get(name, 0.0) + value
        return MetricSums(
            mean, _extremes(self.max, other.max, 1), _extremes(self.min, other.min, -1), total_of
        )

    @classmethod
    def merge_all(cls, parts: Iterable[MetricSums]) -> MetricSums:
        merged = cls()
        for part in parts:
            merged = merged.merge(part)
        return merged

    def finalize(self) -> dict[str, float]:
        """name -> value. A mean over nothing (count 0) is left out: there is no number to report.

        Raises:
            ValueError: One name is used for two kinds of metric.
        """
        kinds: list[Mapping[str, float]] = [
            {name: total / count for name, (total, count) in self.mean.items() if count != 0},
            self.max,
            self.min,
            self.sum,
        ]
        result: dict[str, float] = {}
        for kind in kinds:
            if twice := result.keys() & kind.keys():
                raise ValueError(f"metric names used for two kinds of metric: {', '.join(sorted(twice))}")
            result.update({name: float(value) for name, value in kind.items()})
        return result


def _extremes(left: Mapping[str, float], right: Mapping[str, float], sign: int) -> dict[str, float]:
    merged = dict(left)
    for name, value in right.items():
        before = merged.get(name, value)
        # Every comparison with NaN is false, so without this line the order of the parts would decide.
        if math.isnan(before) or math.isnan(value):
            merged[name] = math.nan
        else:
            merged[name] = value if (value - before) * sign > 0 else before
    return merged
