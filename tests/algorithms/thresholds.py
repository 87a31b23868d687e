"""The entropy threshold of a step, of values that lie on one machine."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from raytune_rl.algorithms import entropy


def step_threshold(parts: Iterable[ArrayLike], quantile: float) -> float:
    """The threshold of values that lie on several ranks; keep a token if its entropy is not below it.

    Args:
        parts: float32 entropies of each rank.
        quantile: share of tokens to keep.

    Returns:
        One of the values; minus infinity where there are none.
    """
    arrays = [np.asarray(part, dtype=np.float32) for part in parts]
    total = sum(a.size for a in arrays)
    if total == 0:
        return -math.inf
    bucket = entropy.find(
        entropy.merge(entropy.count_high(a) for a in arrays), entropy.threshold_rank(total, quantile)
    )
    low = entropy.merge(entropy.count_low(a, bucket.index) for a in arrays)
    return entropy.value(bucket.index, entropy.find(low, bucket.rest).index)
