"""Rewards to advantages, on the driver: a handful of scalars per completion, in float64.

Source: Shao et al. 2024 (DeepSeekMath), GRPO, outcome supervision: A_i = (r_i - mean(r)) / std(r), with the
sample standard deviation (n - 1) and the epsilon of ms-swift and TRL; Ahmadian et al. 2024, "Back to basics",
RLOO; Hu et al. 2025 (REINFORCE++), the variant with the group's mean as baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raytune_rl.algorithms.lazy import np
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Scale = Literal["group", "batch", "none"]
Estimator = Literal["grpo", "rloo", "reinforce_plus_plus"]

DEFAULT_SCALE: dict[Estimator, Scale] = {"grpo": "group", "rloo": "none", "reinforce_plus_plus": "batch"}
"""The divisor of each estimator in its paper, and in ms-swift unless told otherwise."""


@dataclass(frozen=True)
class AdvantageResult:
    """Advantages and what has to be told about how they came to be.

    Attributes:
        advantages: float32 [n], 0 for rows that are not scorable.
        groups: int64 [g], the distinct group ids, ascending; the order of the next two.
        group_mean: float64 [g], mean reward; NaN for a group without a scorable row.
        group_std: float64 [g], sample standard deviation; NaN for a group with fewer than two scorable rows.
        n_zero_std: groups of two or more scorable rows that all have the same reward: they teach nothing.
        n_unscorable: rows whose reward is not a finite number.
        n_single: groups with exactly one scorable row: its advantage is 0 for want of a comparison.
        n_empty: groups without any scorable row.
    """

    advantages: NDArray[np.float32]
    groups: NDArray[np.int64]
    group_mean: NDArray[np.float64]
    group_std: NDArray[np.float64]
    n_zero_std: int
    n_unscorable: int
    n_single: int
    n_empty: int


def group_advantages(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    scale: Scale | None = None,
    eps: float = 1e-4,
    estimator: Estimator = "grpo",
) -> AdvantageResult:
    """Group-relative advantages.

    * grpo: the reward less the group's mean.
    * rloo: the reward less the mean of the *other* rewards of the group, n / (n - 1) times the above.
    * reinforce_plus_plus: as grpo, but scaled by the spread of the centred rewards of the whole batch, not of
      the rewards themselves: groups that are hard or easy as a whole do not count.

    Args:
        rewards: float64 [n]; a value that is not finite means "not scorable": it is left out of its group's
            statistics, gets advantage 0 and is counted.
        group_ids: int [n], rows of one prompt share an id; they need not be neighbours.
        scale: divide the centred rewards by the group's sample standard deviation ("group"), by that of all
            scorable rows of the batch ("batch"), or not at all ("none", Dr. GRPO). None: `DEFAULT_SCALE`.
        eps: added to the divisor.
        estimator: see above.

    Raises:
        ConfigError: `scale` or `estimator` is unknown.
        ValueError: the shapes do not fit.
    """
    reward = np.asarray(rewards, dtype=np.float64)
    ids = np.asarray(group_ids, dtype=np.int64)
    if reward.ndim != 1 or reward.shape != ids.shape:
        raise ValueError(
            f"rewards {reward.shape} and group_ids {ids.shape} must be one-dimensional and equal"
        )
    if estimator not in DEFAULT_SCALE:
        raise ConfigError(
            f"advantage_estimator is '{estimator}'; it must be one of {', '.join(DEFAULT_SCALE)}"
        )
    scale = DEFAULT_SCALE[estimator] if scale is None else scale
    if scale not in ("group", "batch", "none"):
        raise ConfigError(f"scale_rewards is '{scale}'; it must be one of group, batch, none")

    groups, group_of = np.unique(ids, return_inverse=True)
    scorable = np.isfinite(reward)
    known = np.where(scorable, reward, 0.0)
    count = np.bincount(group_of, weights=scorable, minlength=len(groups))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(group_of, weights=known, minlength=len(groups)) / count
    low, high = np.full(len(groups), np.inf), np.full(len(groups), -np.inf)
    np.minimum.at(low, group_of[scorable], reward[scorable])
    np.maximum.at(high, group_of[scorable], reward[scorable])
    # Equal rewards may differ from their rounded mean by an ulp; they must give exactly nothing.
    equal = (count > 0) & (low == high)
    centred = np.where(scorable & ~equal[group_of], known - mean[group_of], 0.0)
    squares = np.bincount(group_of, weights=centred**2, minlength=len(groups))
    std = np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)

    advantages = centred
    if estimator == "rloo":
        advantages = centred * (count / np.maximum(count - 1, 1))[group_of]
    if scale == "group":
        advantages = advantages / (np.nan_to_num(std, nan=0.0)[group_of] + eps)
    elif scale == "batch":
        batch = (centred if estimator == "reinforce_plus_plus" else reward)[scorable]
        batch_std = float(np.std(batch, ddof=1)) if len(batch) > 1 else 0.0
        advantages = advantages / (batch_std + eps)
    return AdvantageResult(
        advantages=advantages.astype(np.float32),
        groups=groups,
        group_mean=mean,
        group_std=std,
        n_zero_std=int(np.sum(equal & (count > 1))),
        n_unscorable=int(np.sum(~scorable)),
        n_single=int(np.sum(count == 1)),
        n_empty=int(np.sum(count == 0)),
    )


def decoupled_advantages(
    values: ArrayLike, weights: ArrayLike, group_ids: ArrayLike, eps: float = 1e-8
) -> NDArray[np.float32]:
    """Advantages that normalise each reward function on its own before they are added (GDPO).

    Rewards of different spread then weigh as their weights say, and completions with equal sums of different
    rewards are still told apart. Source: Liu et al. 2026 (GDPO); as in ms-swift.

    Args:
        values: float64 `[n, k]`; NaN means that function k abstained (see `combine_rewards`).
        weights: float64 `[k]`.
        group_ids: int `[n]`.
        eps: added to the divisors.

    Returns:
        float32 `[n]`, of the whole batch mean 0 and standard deviation 1; 0 for rows without any reward.
    """
    total = decoupled_totals(values, weights, group_ids, eps)
    scorable = np.isfinite(np.asarray(values, dtype=np.float64)).any(axis=1)
    known = total[scorable]
    if not len(known) or known.max() == known.min():
        return np.zeros(len(total), dtype=np.float32)
    centred = np.where(scorable, total - known.mean(), 0.0)
    return (centred / (np.std(known, ddof=1) + eps)).astype(np.float32)


def decoupled_totals(
    values: ArrayLike, weights: ArrayLike, group_ids: ArrayLike, eps: float = 1e-8
) -> NDArray[np.float64]:
    """The values that `decoupled_advantages` brings to mean 0 and spread 1: the weighted sum of each
    function's own advantages within the group, float64 `[n]`; 0 for rows without any reward. Arguments as
    there.
    """
    table, weight = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    total = np.zeros(len(table))
    for column in range(table.shape[1]):
        total += weight[column] * group_advantages(table[:, column], group_ids, "group", eps).advantages
    return total


def known_rewards(values: ArrayLike, weights: ArrayLike, failed: ArrayLike) -> NDArray[np.float64]:
    """Rewards without those of rows on which a function failed: what such a row is worth is not known.

    A function that abstains says that it does not apply; one that failed would have had something to say, so
    the sum of the others is no estimate of the total. A function of weight 0 has no part in the total.

    Args:
        values: float64 [n, k]; NaN means that function k abstained or failed.
        weights: float64 [k].
        failed: bool [n, k], where function k failed.

    Returns:
        float64 [n, k]; `values`, and NaN all over in the rows that are unknown.
    """
    unknown = (np.asarray(failed, dtype=bool) & (np.asarray(weights) != 0)).any(axis=1)
    return np.where(unknown[:, None], np.nan, np.asarray(values, dtype=np.float64))


def combine_rewards(values: ArrayLike, weights: ArrayLike) -> NDArray[np.float64]:
    """Weighted sum of several reward functions per completion.

    Args:
        values: float64 [n, k]; NaN means that function k abstained: it does not apply to the row. Rows on
            which one failed are to be taken out before, see `known_rewards`.
        weights: float64 [k].

    Returns:
        float64 [n]; NaN entries are skipped, and a row whose entries are all NaN stays NaN (not scorable).
        Without any function every row has 0.

    Raises:
        ConfigError: there are not as many weights as reward functions.
    """
    table = np.asarray(values, dtype=np.float64)
    weight = np.asarray(weights, dtype=np.float64)
    if table.ndim != 2 or weight.shape != (table.shape[1],):
        raise ConfigError(
            f"reward_weights has {weight.size} values for {table.shape[-1]} reward functions; give each one"
        )
    missing = np.isnan(table)
    total = np.where(missing, 0.0, table) @ weight
    return np.where(missing.all(axis=1) & (weight.size > 0), np.nan, total)


def penalised_rewards(rewards: ArrayLike, kl: ArrayLike, beta: float) -> NDArray[np.float64]:
    """Rewards with the KL inside (`kl_in_reward`): r - beta * KL, before anything is compared.

    Args:
        rewards: float64 [n]; NaN stays NaN.
        kl: float64 [n], per completion the sum over its tokens of an estimator in `kl`; with k1 it is the
            difference of the two log-probs of the whole completion, so two sums a row suffice.
        beta: its weight.

    Raises:
        ValueError: the shapes do not fit.
    """
    reward, penalty = np.asarray(rewards, dtype=np.float64), np.asarray(kl, dtype=np.float64)
    if reward.shape != penalty.shape:
        raise ValueError(f"rewards {reward.shape} and kl {penalty.shape} must have one shape")
    return reward - beta * penalty
