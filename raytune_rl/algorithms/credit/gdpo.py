"""GDPO: each reward function is compared within the group on its own, and then their sum over the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.advantages import (
    decoupled_advantages,
    decoupled_totals,
    known_rewards,
)
from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.credit.group import reward_metrics
from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


@dataclass(frozen=True)
class DecoupledGroups(Credit):
    """See `advantages.decoupled_advantages`.

    Attributes:
        reward_weights: One a reward function.
    """

    reward_weights: tuple[float, ...]

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """One advantage a completion."""
        values = self._known(experience)
        decoupled = decoupled_advantages(values, self.reward_weights, experience.group_ids)
        return Credited(batch, decoupled, reward_metrics(experience))

    def informative(self, experience: Experience) -> set[int]:
        """It is what the functions come to together that must differ."""
        totals = decoupled_totals(self._known(experience), self.reward_weights, experience.group_ids)
        return experience.informative(np.round(totals, 6))

    def _known(self, experience: Experience) -> NDArray[np.float64]:
        """Rewards by function, without those of completions on which one of them failed."""
        scored = experience.scored
        return known_rewards(scored.values, self.reward_weights, scored.failed())

    def in_words(self) -> str:
        """For the plan."""
        return "grpo, each reward function scaled by its own spread"


GDPO = register_credit(
    CreditKind(
        "gdpo",
        DecoupledGroups,
        "each reward function against the group on its own (--scale_rewards gdpo)",
        "Liu et al. 2026 (GDPO)",
    )
)
