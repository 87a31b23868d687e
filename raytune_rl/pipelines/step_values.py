"""Values that a loss must know of its whole step, and where the driver takes it from.

Some of it follows from the order of the rows, some stands in the data, and some depends on where the policy
is now: a baseline, or what a value is to be compared with. For that the step's rows are scored first, under
the weights of the step and without gradient. So a value is the same whatever the number of ranks and
micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms import aot
from raytune_rl.algorithms.losses import dpo, kto
from raytune_rl.algorithms.pairs import PAIR, pair_numbers

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """Log-probs of the step's scored rows, summed over each answer, float64 `[rows]`."""

    policy: Numbers
    reference: Numbers

    @property
    def log_ratios(self) -> Numbers:
        """log pi - log pi_ref."""
        return self.policy - self.reference


def _margins(per_row: Numbers) -> Numbers:
    return per_row[0::2] - per_row[1::2]


def _aot_reference(sums: Sums, settings: Any, rows: int) -> Numbers:
    return aot.paired_partners(_margins(sums.policy), _margins(sums.reference))


def _aot_partner(sums: Sums, settings: Any, rows: int) -> Numbers:
    return aot.unpaired_partners(sums.log_ratios[0::2], sums.log_ratios[1::2])


def _bco_shift(sums: Sums, settings: Any, rows: int) -> Numbers:
    """BCO's delta (Jung et al. 2024): half the mean reward of either side."""
    return np.full(rows, settings.beta * sums.log_ratios.mean())


def _reference_point(sums: Sums, settings: Any, rows: int) -> Numbers:
    return np.full(rows, kto.reference_point(sums.log_ratios))


FROM_POLICY: Mapping[str, Callable[[Sums, Any, int], Numbers]] = {
    aot.REFERENCE: _aot_reference,
    aot.PARTNER: _aot_partner,
    dpo.BCO_SHIFT: _bco_shift,
    kto.REFERENCE_POINT: _reference_point,
}
"""Row values that depend on where the policy is: (sums, the loss's settings, trained rows) -> float64
`[rows]`."""

FROM_ORDER: Mapping[str, Callable[[int], Numbers]] = {PAIR: lambda rows: pair_numbers(rows // 2)}
"""Row values that follow from the order of the trained rows: their number -> float64 `[rows]`."""
