"""Group-relative credit: a completion against the others of its prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytune_rl.algorithms.advantages import (
    DEFAULT_SCALE,
    AdvantageResult,
    Estimator,
    Scale,
    group_advantages,
    penalised_rewards,
)
from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


@dataclass(frozen=True)
class GroupRelative(Credit):
    """Rewards against those of the group (`advantages.group_advantages`), where asked with the KL taken off
    first.

    Attributes:
        estimator: What a reward is compared with.
        scale_rewards: What the difference is divided by; None: as the estimator's paper has it.
        beta: Price of a nat of the KL in the reward; 0: the KL is not in the reward.
        kl_estimator: How that KL is estimated.
    """

    estimator: Estimator = "grpo"
    scale_rewards: Scale | None = None
    beta: float = 0.0
    kl_estimator: str = "k1"

    @property
    def needs(self) -> frozenset[str]:
        """Log-probs of the reference, for the KL in the reward."""
        return frozenset({"ref_logprobs"} if self.beta > 0 else ())

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """One advantage a completion. With the KL in the reward the loss needs no reference any more."""
        rewards, metrics = experience.rewards, {}
        if self.beta > 0:
            kl = models.row_kl(batch, self.kl_estimator)
            tokens = sum(t.episode.completion_tokens for t in experience.batch)
            metrics["kl"] = float(kl.sum()) / max(tokens, 1)
            rewards = penalised_rewards(rewards, kl, self.beta)
            batch = batch.drop("ref_logprobs")
        grouped = group_advantages(
            rewards, experience.group_ids, self.scale_rewards, estimator=self.estimator
        )
        return Credited(batch, grouped.advantages, {**group_metrics(grouped), **metrics})

    def in_words(self) -> str:
        """Estimator and scale."""
        scale = self.scale_rewards or DEFAULT_SCALE[self.estimator]
        return f"{self.estimator}, scaled by {scale}" if scale != "none" else f"{self.estimator}, not scaled"


def earned_by_group(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    earned: Callable[[NDArray[np.float64], NDArray[np.int64]], NDArray[np.float64]],
) -> NDArray[np.float32]:
    """Advantages group by group, float32 `[n]`; 0 for rewards that are not finite, and for groups that have
    not two different ones.

    Args:
        rewards: float64 `[n]`.
        group_ids: int `[n]`; rows of a group need not be neighbours.
        earned: (the known rewards of a group, their rows) -> their advantages.
    """
    reward, ids = np.asarray(rewards, dtype=np.float64), np.asarray(group_ids, dtype=np.int64)
    found = np.zeros(len(reward))
    for group in np.unique(ids):
        rows = np.flatnonzero((ids == group) & np.isfinite(reward))
        if len(rows) and reward[rows].min() < reward[rows].max():
            found[rows] = earned(reward[rows], rows)
    return found.astype(np.float32)


def reward_metrics(experience: Experience) -> dict[str, float]:
    """`group_metrics` of the rewards, for a credit that compares them in a way of its own."""
    return group_metrics(group_advantages(experience.rewards, experience.group_ids))


def group_metrics(grouped: AdvantageResult) -> dict[str, float]:
    """Metrics of the groups, under ms-swift's names."""
    groups = max(len(grouped.groups), 1)
    known = grouped.group_std[np.isfinite(grouped.group_std)]
    return {
        "reward_std": float(known.mean()) if len(known) else float("nan"),
        "frac_reward_zero_std": grouped.n_zero_std / groups,
        "unscored_completions": float(grouped.n_unscorable),
        "groups_without_comparison": float(grouped.n_single + grouped.n_empty),
    }


def _kind(name: Estimator, summary: str, paper: str, **more: Any) -> CreditKind:
    return CreditKind(name, GroupRelative, summary, paper, {"estimator": name}, **more)


GRPO = register_credit(_kind("grpo", "the reward less the group's mean", "Shao et al. 2024 (DeepSeekMath)"))
RLOO = register_credit(
    _kind(
        "rloo",
        "the reward less the mean of the group's other rewards; with it --loss_type grpo divides each "
        "completion's loss by its length, dr_grpo is the estimator of its paper",
        "Ahmadian et al. 2024, Back to basics",
        kl_in_reward=True,
    )
)
REINFORCE_PLUS_PLUS = register_credit(
    _kind(
        "reinforce_plus_plus",
        "the reward less the group's mean, by the spread over the batch; it takes the KL of the whole "
        "completion off every token's reward, as ms-swift does, where its paper takes off the KL from "
        "there on",
        "Hu et al. 2025 (REINFORCE++)",
        kl_in_reward=True,
    )
)
