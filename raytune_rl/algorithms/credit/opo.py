"""OPO: the reward less the group's mean weighted by length, the baseline of least variance.

Source: Hao et al. 2025, "On-policy RL with optimal reward baseline" (arXiv 2505.23585), eq. 7: the optimal
baseline weighs rewards by the squared norm of their gradients, which for independent tokens grows with the
length. The paper adds nothing else: no division by a spread, no KL, one step a generation. verl counts a
completion's tokens after its own rejections; here they are the tokens that were sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.credit.group import earned_by_group, reward_metrics
from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


def opo_advantages(rewards: ArrayLike, lengths: ArrayLike, group_ids: ArrayLike) -> NDArray[np.float32]:
    """A_i = r_i - sum_j l_j r_j / sum_j l_j over the group.

    Args:
        rewards: float64 `[n]`; NaN earns nothing and counts nowhere.
        lengths: int `[n]`, sampled tokens. Where a group has none, its rewards weigh the same.
        group_ids: int `[n]`.
    """
    length = np.asarray(lengths, dtype=np.float64)

    def earned(reward: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        weights = length[rows] if length[rows].any() else None
        return reward - np.average(reward, weights=weights)

    return earned_by_group(rewards, group_ids, earned)


@dataclass(frozen=True)
class OptimalBaseline(Credit):
    """See `opo_advantages`."""

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """One advantage a completion."""
        lengths = [t.episode.completion_tokens for t in experience.batch]
        earned = opo_advantages(experience.rewards, lengths, experience.group_ids)
        return Credited(batch, earned, reward_metrics(experience))

    def in_words(self) -> str:
        """For the plan."""
        return "opo: the reward less the group's mean by length"


OPO = register_credit(
    CreditKind(
        "opo", OptimalBaseline, "the reward less the group's mean weighted by length", "Hao et al. 2025 (OPO)"
    )
)
