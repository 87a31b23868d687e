"""GPG: the reward less the group's mean, made up for the groups that teach nothing.

Source: Chu et al. 2025, "GPG: a simple and strong reinforcement learning baseline for model reasoning" (arXiv
2504.02546), with F_norm = 1: A_i = alpha (r_i - mean), where alpha = B / (B - M) and M of the B groups of the
batch have equal rewards, so no gradient. verl counts completions with a reward other than 0 instead of groups
with a signal, which for rewards of 0 and 1 is the inverse of the success rate; here it is the paper's count.
`--loss_type gpg` is the loss of the same paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.advantages import group_advantages
from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.credit.group import reward_metrics
from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


def gpg_advantages(rewards: ArrayLike, group_ids: ArrayLike) -> tuple[NDArray[np.float32], float]:
    """A_i = alpha (r_i - mean), and alpha: groups by groups with different rewards; 1 where there are none.

    Args:
        rewards: float64 `[n]`; NaN earns nothing.
        group_ids: int `[n]`.
    """
    plain = group_advantages(rewards, group_ids, "none")
    teaching = int(np.sum(np.nan_to_num(plain.group_std) > 0))
    alpha = len(plain.groups) / teaching if teaching else 1.0
    return (plain.advantages * alpha).astype(np.float32), alpha


@dataclass(frozen=True)
class GroupPolicyGradient(Credit):
    """See `gpg_advantages`."""

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """One advantage a completion; metric `gpg/alpha`."""
        earned, alpha = gpg_advantages(experience.rewards, experience.group_ids)
        return Credited(batch, earned, {**reward_metrics(experience), "gpg/alpha": alpha})

    def in_words(self) -> str:
        """For the plan."""
        return "gpg: the reward less the group's mean, scaled up for groups of equal rewards"


GPG = register_credit(
    CreditKind(
        "gpg",
        GroupPolicyGradient,
        "the reward less the group's mean, scaled up by the share of groups that teach",
        "Chu et al. 2025 (GPG)",
    )
)
