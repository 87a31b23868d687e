"""Metrics that merge exactly, whatever the split into micro-batches and ranks.

A mean of means depends on how a batch was cut. Here a mean travels as (sum, count) and is divided once, by
the reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Literal

from raytune_rl.algorithms.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["mean", "total", "max", "min", "ess"]


@dataclass(frozen=True)
class Stat:
    """One mergeable number.

    Attributes:
        reduction: How it merges: "mean" adds `value` (a sum) and `count`; "total" adds `value`; "max" and
            "min" compare; "ess" adds `value` (a sum of weights), `squares` and `count`.
        value: The sum or extremum; a float, or a detached 0-dim tensor until `MetricSums.host()` fetches it.
        count: Number of terms in `value`; 0 means nothing was measured.
        squares: The sum of the weights' squares, for "ess" only.
    """

    reduction: Reduction
    value: float | Tensor
    count: int
    squares: float | Tensor = 0.0

    def merge(self, other: Stat) -> Stat:
        if self.reduction != other.reduction:
            raise ValueError(f"cannot merge a {self.reduction} with a {other.reduction}")
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        if self.reduction in ("mean", "total", "ess"):
            return Stat(self.reduction, self.value + other.value, count, self.squares + other.squares)
        mine, theirs = float(self.value), float(other.value)
        pick = max if self.reduction == "max" else min
        # Python's max(1.0, nan) depends on the order of its arguments; a NaN must win, it is the news.
        value = float("nan") if mine != mine or theirs != theirs else pick(mine, theirs)
        return Stat(self.reduction, value, count)

    def result(self) -> float:
        """The plain number: a mean is divided here, and only here. NaN when nothing was measured."""
        if self.count == 0:
            return 0.0 if self.reduction == "total" else float("nan")
        if self.reduction == "ess":
            squares = self.count * float(self.squares)
            return float(self.value) ** 2 / squares if squares else 0.0
        return float(self.value) / self.count if self.reduction == "mean" else float(self.value)


@dataclass(frozen=True)
class MetricSums:
    """A set of named `Stat`s: a worker returns one per call, the driver merges them and takes `result()`."""

    stats: Mapping[str, Stat] = field(default_factory=dict)

    def merge(self, *others: MetricSums) -> MetricSums:
        """Combines with others; the order and grouping do not matter (beyond float rounding of sums)."""
        merged = dict(self.stats)
        for other in others:
            for name, stat in other.stats.items():
                merged[name] = merged[name].merge(stat) if name in merged else stat
        return MetricSums(merged)

    def host(self) -> MetricSums:
        """The same values as plain floats, fetched from the device in one copy; call before sending it
        anywhere."""
        away: list[tuple[str, str, Tensor]] = [
            (name, part, held)
            for name, stat in self.stats.items()
            for part, held in (("value", stat.value), ("squares", stat.squares))
            if not isinstance(held, (float, Real))  # the driver, which has numbers alone, does without torch
        ]
        if not away:
            return self
        numbers = torch.stack([held.double().reshape(()) for _, _, held in away]).tolist()
        stats = dict(self.stats)
        for (name, part, _), number in zip(away, numbers, strict=True):
            stats[name] = replace(stats[name], **{part: number})
        return MetricSums(stats)

    def result(self) -> dict[str, float]:
        """Plain numbers by name; a metric that measured nothing is left out rather than logged as NaN."""
        host = self.host()
        return {n: s.result() for n, s in host.stats.items() if s.count > 0 or s.reduction == "total"}


def merge_all(parts: Iterable[MetricSums]) -> MetricSums:
    """Merges any number of parts, none included."""
    return MetricSums().merge(*parts)


def mean_of(values: Tensor) -> Stat:
    """Mean of all elements, summed in float64 and detached."""
    return Stat("mean", values.detach().double().sum(), values.numel())


def max_of(values: Tensor) -> Stat:
    """Largest element, detached; empty input measures nothing."""
    return Stat("max", values.detach().double().max() if values.numel() else 0.0, values.numel())


def min_of(values: Tensor) -> Stat:
    """Smallest element, detached; empty input measures nothing."""
    return Stat("min", values.detach().double().min() if values.numel() else 0.0, values.numel())


def total_of(values: Tensor) -> Stat:
    """Sum of all elements, never divided: for counts."""
    return Stat("total", values.detach().double().sum(), values.numel())


def ess_of(weights: Tensor) -> Stat:
    """Effective sample size as a fraction, (sum w)^2 / (n sum w^2): 1 for equal weights, 0 if all are 0."""
    detached = weights.detach().double()
    return Stat("ess", detached.sum(), detached.numel(), (detached**2).sum())


def row_means(values: Tensor, row_of: Tensor, n_rows: int) -> Tensor:
    """Mean per row of a flat column, rows without tokens left out.

    Args:
        values: float [N], detached here.
        row_of: int64 [N], the row of each token.
        n_rows: number of rows.

    Returns:
        float64 [rows that have at least one token], in row order.
    """
    sums, counts = row_sums(values, row_of, n_rows), row_counts(row_of, n_rows)
    return sums[counts > 0] / counts[counts > 0]


def row_sums(values: Tensor, row_of: Tensor, n_rows: int) -> Tensor:
    """Sum per row of a flat column, float64 [n_rows], detached; 0 for rows without tokens."""
    sums = torch.zeros(n_rows, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, row_of, values.detach().double())


def row_counts(row_of: Tensor, n_rows: int) -> Tensor:
    """Tokens per row, int64 [n_rows]."""
    return torch.bincount(row_of, minlength=n_rows)
