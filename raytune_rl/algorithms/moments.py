"""Mean and variance that merge exactly, so that whitening sees the whole step and not one rank's share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of some values.

    Source: Chan, Golub and LeVeque 1979, the pairwise update, which does not lose digits where the mean is
    large.
    """

    count: int = 0
    mean: float = 0.0
    deviations: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of a tensor, in float64."""
        if not values.numel():
            return cls()
        flat = values.detach().double()
        mean = flat.mean()
        return cls(values.numel(), float(mean), float(((flat - mean) ** 2).sum()))

    def merge(self, other: Moments) -> Moments:
        """Of both together."""
        count = self.count + other.count
        if count == 0:
            return self
        gap = other.mean - self.mean
        return Moments(
            count,
            self.mean + gap * other.count / count,
            self.deviations + other.deviations + gap**2 * self.count * other.count / count,
        )

    @property
    def std(self) -> float:
        """Sample standard deviation; 0 with fewer than two values."""
        return math.sqrt(self.deviations / (self.count - 1)) if self.count > 1 else 0.0


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Of all parts together."""
    whole = Moments()
    for part in parts:
        whole = whole.merge(part)
    return whole


def whiten(values: Tensor, moments: Moments, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(variance + eps), with the mean added back unless it is to be shifted to 0.

    Args:
        values: float, any shape.
        moments: of the whole step (`merge_moments` over ranks).
        shift_mean: False keeps the mean: rewards are scaled, not moved.
        eps: added to the variance.
    """
    scaled = (values - moments.mean) / math.sqrt(moments.std**2 + eps)
    return scaled if shift_mean else scaled + moments.mean
