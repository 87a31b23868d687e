"""Group-relative advantages against numbers worked out by hand, and their special cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raytune_rl.algorithms.advantages import (
    combine_rewards,
    decoupled_advantages,
    group_advantages,
    penalised_rewards,
)
from raytune_rl.errors import ConfigError

NAN = float("nan")


def test_closed_form_group() -> None:
    # Group 0: 1, 2, 3, 6 -> mean 3, sample variance (4 + 1 + 0 + 9) / 3.
    result = group_advantages([1, 2, 3, 6], [0, 0, 0, 0], eps=0.0)
    std = (14 / 3) ** 0.5
    np.testing.assert_allclose(result.advantages, np.array([-2, -1, 0, 3]) / std, rtol=1e-6)
    assert result.advantages.dtype == np.float32
    assert result.group_std[0] == pytest.approx(std)
    assert result.group_mean[0] == 3.0


def test_epsilon_is_added_to_the_divisor() -> None:
    result = group_advantages([0.0, 1.0], [4, 4], eps=0.25)
    np.testing.assert_allclose(
        result.advantages, [-0.5 / (0.5**0.5 + 0.25), 0.5 / (0.5**0.5 + 0.25)], rtol=1e-6
    )


def test_scales() -> None:
    rewards, groups = [0.0, 2.0, 10.0, 14.0], [0, 0, 1, 1]
    none = group_advantages(rewards, groups, "none").advantages
    np.testing.assert_array_equal(none, [-1, 1, -2, 2])
    batch = group_advantages(rewards, groups, "batch", eps=0.0).advantages
    np.testing.assert_allclose(batch, none / np.std(rewards, ddof=1), rtol=1e-6)
    group = group_advantages(rewards, groups, "group", eps=0.0).advantages
    np.testing.assert_allclose(group, np.array([-1, 1, -1, 1]) / 2**0.5, rtol=1e-6)


def test_rows_of_a_group_need_not_be_neighbours() -> None:
    rng = np.random.default_rng(0)
    rewards, groups = rng.normal(size=24), np.repeat([7, 3, 5], 8)
    order = rng.permutation(24)
    straight = group_advantages(rewards, groups)
    mixed = group_advantages(rewards[order], groups[order])
    np.testing.assert_allclose(mixed.advantages, straight.advantages[order], rtol=1e-6)
    assert straight.groups.tolist() == [3, 5, 7]


def test_shift_and_scale_of_rewards_do_not_matter() -> None:
    rewards, groups = [0.1, 0.9, 0.4, 0.4], [0, 0, 0, 0]
    a = group_advantages(rewards, groups, eps=0.0).advantages
    b = group_advantages(np.array(rewards) * 7 - 100, groups, eps=0.0).advantages
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert a.sum() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_exactly_nothing(scale: str) -> None:
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1 in binary: the mean is an ulp off.
    result = group_advantages([0.1, 0.1, 0.1, 5.0, 6.0], [0, 0, 0, 1, 1], scale)  # type: ignore[arg-type]
    assert result.advantages[:3].tolist() == [0, 0, 0]
    assert result.advantages[3] < 0 < result.advantages[4]
    assert result.n_zero_std == 1
    assert result.group_std[0] == 0


def test_nan_is_left_out_of_its_group() -> None:
    result = group_advantages([1.0, NAN, 3.0, 2.0], [0, 0, 0, 0], eps=0.0)
    np.testing.assert_allclose(result.advantages, [-1, 0, 1, 0], atol=1e-6)
    assert (result.n_unscorable, result.n_single, result.n_empty, result.n_zero_std) == (1, 0, 0, 0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
def test_infinite_rewards_count_as_unscorable(bad: float) -> None:
    result = group_advantages([bad, 1.0, 2.0], [0, 0, 0])
    assert np.isfinite(result.advantages).all()
    assert result.advantages[0] == 0
    assert result.n_unscorable == 1


def test_single_and_empty_groups_are_counted() -> None:
    result = group_advantages([5.0, NAN, NAN, NAN, 8.0], [0, 0, 1, 1, 2])
    assert result.advantages.tolist() == [0, 0, 0, 0, 0]
    assert (result.n_unscorable, result.n_single, result.n_empty, result.n_zero_std) == (3, 2, 1, 0)
    assert np.isnan(result.group_std).all()
    assert np.isnan(result.group_mean[1])


def test_no_rows() -> None:
    result = group_advantages([], [])
    assert len(result.advantages) == 0
    assert result.n_empty == 0


def test_wrong_use() -> None:
    with pytest.raises(ConfigError, match="scale_rewards"):
        group_advantages([1.0], [0], "std")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be"):
        group_advantages([1.0, 2.0], [0])


def test_combine_rewards() -> None:
    values = [[1.0, 2.0], [NAN, 3.0], [4.0, NAN], [NAN, NAN]]
    np.testing.assert_array_equal(combine_rewards(values, [2.0, 10.0]), [22, 30, 8, NAN])
    with pytest.raises(ConfigError, match="2 reward functions"):
        combine_rewards(values, [1.0])


def test_rloo_is_the_reward_less_the_mean_of_the_others() -> None:
    rewards = [1.0, 4.0, 2.0, 5.0, 7.0]
    result = group_advantages(rewards, [0, 0, 0, 1, 1], estimator="rloo")
    want = [1 - 6 / 2, 4 - 3 / 2, 2 - 5 / 2, 5 - 7, 7 - 5]
    np.testing.assert_allclose(result.advantages, want, rtol=1e-6)


def test_rloo_counts_scorable_others_only() -> None:
    result = group_advantages([1.0, NAN, 4.0, 3.0, NAN], [0, 0, 0, 1, 1], estimator="rloo")
    np.testing.assert_allclose(result.advantages, [-3, 0, 3, 0, 0], atol=1e-6)
    assert (result.n_single, result.n_unscorable) == (1, 2)


def test_reinforce_plus_plus_divides_by_the_spread_of_centred_rewards() -> None:
    rewards, groups = [0.0, 2.0, 100.0, 104.0], [0, 0, 1, 1]
    result = group_advantages(rewards, groups, estimator="reinforce_plus_plus", eps=0.0)
    centred = np.array([-1.0, 1.0, -2.0, 2.0])
    np.testing.assert_allclose(result.advantages, centred / np.std(centred, ddof=1), rtol=1e-6)
    # the spread of the rewards themselves, in which one group stands far off, is another thing
    grpo = group_advantages(rewards, groups, "batch", eps=0.0)
    np.testing.assert_allclose(grpo.advantages, centred / np.std(rewards, ddof=1), rtol=1e-6)


def test_reinforce_plus_plus_leaves_unscorable_rows_out_of_the_spread() -> None:
    with_nan = group_advantages([0.0, 2.0, NAN, 4.0, 8.0], [0, 0, 0, 1, 1], estimator="reinforce_plus_plus")
    without = group_advantages([0.0, 2.0, 4.0, 8.0], [0, 0, 1, 1], estimator="reinforce_plus_plus")
    np.testing.assert_allclose(with_nan.advantages[[0, 1, 3, 4]], without.advantages, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus"])
@pytest.mark.parametrize("scale", [None, "group", "batch", "none"])
def test_every_estimator_and_scale_on_hopeless_groups(estimator: Any, scale: Any) -> None:
    """Equal rewards, a group of one, nothing scorable: exactly 0, finite, and counted."""
    rewards, groups = [0.1, 0.1, 0.1, 7.0, NAN, NAN], [0, 0, 0, 1, 2, 2]
    result = group_advantages(rewards, groups, scale, estimator=estimator)
    assert result.advantages.tolist() == [0.0] * 6
    assert (result.n_zero_std, result.n_single, result.n_empty) == (1, 1, 1)


@pytest.mark.parametrize(
    ("estimator", "scale"), [("grpo", "group"), ("rloo", "none"), ("reinforce_plus_plus", "batch")]
)
def test_default_scales(estimator: Any, scale: Any) -> None:
    rewards, groups = [0.0, 2.0, 10.0, 14.0], [0, 0, 1, 1]
    default = group_advantages(rewards, groups, estimator=estimator).advantages
    np.testing.assert_array_equal(
        default, group_advantages(rewards, groups, scale, estimator=estimator).advantages
    )


def test_unknown_estimator() -> None:
    with pytest.raises(ConfigError, match="advantage_estimator"):
        group_advantages([1.0], [0], estimator="gae")  # type: ignore[arg-type]


def test_kl_in_the_reward() -> None:
    got = penalised_rewards([1.0, NAN, 0.5], [2.0, 1.0, -4.0], beta=0.1)
    np.testing.assert_allclose(got, [0.8, NAN, 0.9])
    with pytest.raises(ValueError, match="one shape"):
        penalised_rewards([1.0], [1.0, 2.0], 0.1)


def test_decoupled_advantages_weigh_rewards_as_their_weights_say() -> None:
    """GDPO: each function by its own spread in the group, then the sum by that of the batch."""
    values = np.array([[1.0, 100.0], [0.0, 100.0], [0.0, 300.0], [1.0, 300.0], [3.0, 5.0], [1.0, 5.0]])
    groups = [7, 7, 7, 7, 2, 2]
    weights = [1.0, 0.5]
    z = np.zeros(values.shape)
    for group in (7, 2):
        rows = np.array(groups) == group
        for column in range(2):
            part = values[rows, column]
            std = part.std(ddof=1)
            z[rows, column] = (part - part.mean()) / std if std else 0.0
    total = z @ weights
    expected = (total - total.mean()) / total.std(ddof=1)
    np.testing.assert_allclose(decoupled_advantages(values, weights, groups), expected, rtol=1e-6)


def test_decoupled_advantages_without_rewards() -> None:
    nan = np.nan
    found = decoupled_advantages([[1.0, nan], [nan, nan], [0.0, nan], [2.0, 1.0]], [1.0, 1.0], [0, 0, 0, 1])
    assert found[1] == 0
    assert found[0] > 0 > found[2]
    assert decoupled_advantages([[1.0], [1.0]], [1.0], [0, 0]).tolist() == [0, 0]
    assert decoupled_advantages([[nan], [nan]], [1.0], [0, 0]).tolist() == [0, 0]
