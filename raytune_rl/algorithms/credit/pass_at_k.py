"""Pass@k training: what counts is that one of k completions is right.

Source: Chen et al. 2025, "Pass@k training for adaptively balancing exploration and exploitation of large
reasoning models" (arXiv 2508.10751), the analytical form: the reward of k completions is the best of theirs,
and a completion's advantage the mean of the advantages of all sets of k that it is in. verl's grpo_passk is
another one of that name: only the best completion of a group gets anything, its lead over the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.credit.group import earned_by_group, reward_metrics
from raytune_rl.algorithms.lazy import np
from raytune_rl.algorithms.options import option
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


def pass_at_k_of(completions: int, right: int, k: int) -> tuple[float, float, float]:
    """The mean reward of the sets of k completions, and the advantages of a right and of a wrong one.

    With R = 1 - C(wrong, k) / C(n, k) and its standard deviation s = sqrt(R (1 - R)), a set with a right
    completion earns (1 - R) / s, one without -R / s. All are 0 / 0 where no set differs, and then 0.

    Args:
        completions: n, at least k.
        right: How many of them are right.
        k: Completions of a set.
    """
    wrong = completions - right
    mean = 1.0 - math.comb(wrong, k) / math.comb(completions, k)
    spread = math.sqrt(mean * (1.0 - mean))
    if spread == 0.0:
        return mean, 0.0, 0.0
    fails = math.comb(wrong - 1, k - 1) / math.comb(completions - 1, k - 1)
    return mean, (1.0 - mean) / spread, (1.0 - mean - fails) / spread


def pass_at_k_advantages(
    rewards: ArrayLike, group_ids: ArrayLike, k: int, threshold: float = 1.0
) -> NDArray[np.float32]:
    """`pass_at_k_of` for each completion of each group; groups of fewer than k known rewards earn nothing.

    Args:
        rewards: float64 `[n]`; a completion is right whose reward is at least `threshold`. NaN earns nothing.
        group_ids: int `[n]`.
        k: Completions of a set.
        threshold: See above.
    """

    def earned(reward: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        if len(reward) < k:
            return np.zeros(len(reward))
        right = reward >= threshold
        _, of_right, of_wrong = pass_at_k_of(len(reward), int(right.sum()), k)
        return np.where(right, of_right, of_wrong)

    return earned_by_group(rewards, group_ids, earned)


@dataclass(frozen=True)
class PassAtK(Credit):
    """See `pass_at_k_advantages`.

    Attributes:
        pass_k: Completions of which one must be right; at most --num_generations.
        pass_reward: The least total reward of a right completion.
        num_generations: Completions of a group.
    """

    pass_k: int = option(4, "Completions of which one must be right, at most --num_generations.", ge=1)
    pass_reward: float = option(1.0, "A completion is right whose total reward is at least this.")
    num_generations: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.pass_k <= self.num_generations:
            raise ConfigError(
                f"--pass_k {self.pass_k} is not between 1 and --num_generations {self.num_generations}: "
                "pass@k is taken over the completions of one prompt."
            )

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """One advantage a completion; metric `pass_at_k/groups_without_signal`, a share."""
        earned = self._earned(experience)
        silent = 1.0 - len(self.informative(experience)) / max(len(experience.groups), 1)
        metrics = {**reward_metrics(experience), "pass_at_k/groups_without_signal": silent}
        return Credited(batch, earned, metrics)

    def informative(self, experience: Experience) -> set[int]:
        """Groups in which some set of k has a right completion and some set has none."""
        earned = self._earned(experience)
        return {t.group for t, value in zip(experience.batch, earned, strict=True) if value != 0}

    def _earned(self, experience: Experience) -> NDArray[np.float32]:
        return pass_at_k_advantages(experience.rewards, experience.group_ids, self.pass_k, self.pass_reward)

    def in_words(self) -> str:
        """For the plan."""
        return f"pass@{self.pass_k}: right is a reward of at least {self.pass_reward:g}"


PASS_AT_K = register_credit(
    CreditKind(
        "pass_at_k",
        PassAtK,
        "that one of --pass_k completions is right, against all sets of so many in the group",
        "Chen et al. 2025 (pass@k training)",
    )
)
