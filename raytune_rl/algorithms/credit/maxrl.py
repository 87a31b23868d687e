"""MaxRL: what is seldom right weighs more, so that the likelihood of success is raised and not its rate.

Source: Tajwar et al. 2026, "Maximum likelihood reinforcement learning" (arXiv 2602.02710): the gradient of
log p(success) is estimated by the mean score of the successful completions of a group, less the mean score of
all of them, which is GRPO's with the mean reward in place of the spread. A group in which nothing succeeded
earns nothing. So the expectation is the gradient of log p expanded into pass@k up to k = N - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.credit.group import earned_by_group, reward_metrics
from raytune_rl.algorithms.lazy import np
from raytune_rl.errors import RewardError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


def maxrl_advantages(rewards: ArrayLike, group_ids: ArrayLike) -> NDArray[np.float32]:
    """A_i = (r_i - mean) / mean over the group; 0 in a group in which nothing succeeded.

    Args:
        rewards: float64 `[n]`, 1 for a success and 0 for a failure, or anything from 0 up; NaN earns nothing.
        group_ids: int `[n]`.

    Raises:
        RewardError: a reward is negative: its mean is then no rate of success.
    """
    known = np.asarray(rewards, dtype=np.float64)
    if (known[np.isfinite(known)] < 0).any():
        raise RewardError(
            f"--advantage_estimator maxrl divides by a group's mean reward, which must not be negative; one "
            f"reward is {np.nanmin(known):g}. Use rewards from 0 up, or --advantage_estimator grpo."
        )
    return earned_by_group(rewards, group_ids, lambda reward, rows: reward / reward.mean() - 1.0)


@dataclass(frozen=True)
class MaximumLikelihood(Credit):
    """See `maxrl_advantages`."""

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """One advantage a completion."""
        earned = maxrl_advantages(experience.rewards, experience.group_ids)
        return Credited(batch, earned, reward_metrics(experience))

    def in_words(self) -> str:
        """For the plan."""
        return "maxrl: the reward less the group's mean, by that mean"


MAXRL = register_credit(
    CreditKind(
        "maxrl",
        MaximumLikelihood,
        "the reward less the group's mean, divided by that mean; for rewards of 0 and 1",
        "Tajwar et al. 2026 (MaxRL)",
    )
)
