"""Training on the tokens of high entropy only, with a threshold over the whole optimizer step.

Source: Wang et al. 2025, "Beyond the 80/20 rule: high-entropy minority tokens drive effective RL": keep the
top share rho of the tokens by the entropy of the policy's distribution. TRL and ms-swift take the quantile of
each micro-batch (over ranks), so which tokens train depends on how the batch was cut. Here it is an order
statistic of the whole step, found exactly without moving the entropies: each rank counts its values by their
high 16 bits, the driver adds the counts and names the bucket, each rank counts the low 16 bits inside it. Two
rounds of 65,536 integers a rank give the threshold to the last bit:

    high = merge(count_high(e) for e in ranks);  bucket = find(high, rank)
    low = merge(count_low(e, bucket.index) for e in ranks);  threshold = value(bucket, find(low, bucket.rest))
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import np
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

BUCKETS = 1 << 16


@dataclass(frozen=True)
class Bucket:
    """Where an order statistic lies: the bucket, and its rank among the values in there."""

    index: int
    rest: int


def keys(values: ArrayLike) -> NDArray[np.uint32]:
    """float32 values as integers in the same order; -0 and 0 are one.

    Raises:
        ValueError: a value is NaN: it has no place in an order.
    """
    flat = np.asarray(values, dtype=np.float32).reshape(-1) + np.float32(0.0)
    if np.isnan(flat).any():
        raise ValueError(f"{int(np.isnan(flat).sum())} of {flat.size} entropies are NaN")
    bits = flat.view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def count_high(values: ArrayLike) -> NDArray[np.int64]:
    """How many values have each pattern of the high 16 bits, int64 [65536]."""
    return np.bincount(keys(values) >> 16, minlength=BUCKETS)


def count_low(values: ArrayLike, high: int) -> NDArray[np.int64]:
    """The same by the low 16 bits, of the values whose high bits are `high`."""
    value_keys = keys(values)
    return np.bincount(value_keys[value_keys >> 16 == high] & 0xFFFF, minlength=BUCKETS)


def merge(counts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Counts of all ranks."""
    return np.sum(list(counts), axis=0, dtype=np.int64)


def find(counts: NDArray[np.int64], rank: int) -> Bucket:
    """The bucket of the value with that rank, counted from 0 and from the smallest."""
    below = np.cumsum(counts)
    index = int(np.searchsorted(below, rank, side="right"))
    return Bucket(index, rank - int(below[index - 1] if index else 0))


def value(high: int, low: int) -> float:
    """The float32 value with these key bits."""
    key = np.uint32(high << 16 | low)
    bits = key ^ np.uint32(1 << 31) if key >> 31 else ~key
    return float(np.asarray([bits], dtype=np.uint32).view(np.float32)[0])


def threshold_rank(total: int, quantile: float) -> int:
    """Rank of the smallest entropy that is kept when the top share `quantile` of `total` tokens is.

    It is the smallest order statistic not below the (1 - quantile) quantile, so tokens at the threshold are
    kept and the choice is that of TRL's interpolated quantile.

    Raises:
        ConfigError: the share is not in (0, 1].
        ValueError: there are no tokens.
    """
    if not 0 < quantile <= 1:
        raise ConfigError(
            f"top_entropy_quantile is {quantile}; it is the share of tokens to train on, in (0, 1]"
        )
    if total < 1:
        raise ValueError("no tokens, so no threshold")
    # Rounded as TRL's (1 - q) * (n - 1) would be without the error of binary fractions: 1 - 0.8 is not 0.2.
    return math.ceil(round((1 - quantile) * (total - 1), 9))
