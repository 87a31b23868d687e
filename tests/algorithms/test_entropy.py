"""The step-wide entropy threshold: exactly numpy's order statistic, however the tokens lie on ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from raytune_rl.algorithms import entropy
from raytune_rl.errors import ConfigError
from tests.algorithms.thresholds import step_threshold

RNG = np.random.default_rng(3)
VALUES = np.concatenate([RNG.gamma(0.3, 1.5, 4000), np.zeros(500), RNG.uniform(0, 1e-30, 20)]).astype(
    np.float32
)


def cut(values: NDArray[np.float32], ranks: int) -> list[NDArray[np.float32]]:
    return np.array_split(np.random.default_rng(ranks).permutation(values), ranks)


@pytest.mark.parametrize("quantile", [1.0, 0.9, 0.5, 0.2, 0.05, 0.001])
@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_threshold_keeps_the_top_share(quantile: float, ranks: int) -> None:
    found = step_threshold(cut(VALUES, ranks), quantile)
    # the definition: tokens not below the (1 - q) quantile, in exact order statistics
    want = np.quantile(VALUES, 1 - quantile, method="higher")
    assert np.float32(found) == want
    kept = int((np.float32(found) <= VALUES).sum())
    ties = int((np.float32(found) == VALUES).sum())
    assert kept - ties < quantile * len(VALUES) + 1
    assert kept >= quantile * (len(VALUES) - 1)


def test_interpolation_makes_no_difference() -> None:
    """torch's and numpy's linear quantile, as TRL takes it, picks the same tokens."""
    for quantile in (0.2, 0.31, 0.77):
        linear = np.quantile(VALUES.astype(np.float64), 1 - quantile)
        exact = step_threshold([VALUES], quantile)
        np.testing.assert_array_equal(linear <= VALUES, np.float32(exact) <= VALUES)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, math.inf, -math.inf, 0.1])
def test_keys_go_back_to_their_values(value: float) -> None:
    key = int(entropy.keys([value])[0])
    assert entropy.value(key >> 16, key & 0xFFFF) == np.float32(value)


def test_keys_keep_the_order() -> None:
    values = np.sort(np.concatenate([VALUES, -VALUES, [np.inf, -np.inf]]).astype(np.float32))
    assert (np.diff(entropy.keys(values).astype(np.int64)) >= 0).all()
    assert entropy.keys([-0.0]) == entropy.keys([0.0])


def test_edges() -> None:
    assert step_threshold([[2.5]], 0.1) == 2.5
    assert step_threshold([[], [2.5, 1.0]], 1.0) == 1.0
    assert step_threshold([[], []], 0.5) == -math.inf
    assert step_threshold([[1.0] * 9], 0.2) == 1.0
    # 1 - 0.8 is a little less than 0.2 in binary; of six tokens the top five begin at number 1, not 2
    assert entropy.threshold_rank(6, 0.8) == 1
    with pytest.raises(ValueError, match="NaN"):
        step_threshold([[1.0, math.nan]], 0.5)
    for bad in (0.0, -0.1, 1.1):
        with pytest.raises(ConfigError, match="top_entropy_quantile"):
            entropy.threshold_rank(5, bad)
    with pytest.raises(ValueError, match="no tokens"):
        entropy.threshold_rank(0, 0.5)


def test_what_travels_is_small_and_adds_up() -> None:
    high = [entropy.count_high(part) for part in cut(VALUES, 3)]
    assert {h.shape for h in high} == {(entropy.BUCKETS,)}
    np.testing.assert_array_equal(entropy.merge(high), entropy.count_high(VALUES))
