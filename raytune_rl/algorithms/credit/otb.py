"""OTB: at each place of a completion the baseline of least variance, of the group's completions that are as
long.

Source: Li et al. 2026, "The optimal token baseline: variance reduction for long-horizon LLM-RL" (arXiv
2602.07078): b_t = sum_i W_it r_i / sum_i W_it over the group, where W_it adds up, over the tokens before and
at t, the squared norm of the gradient in the logits, 1 - 2 pi(token) + sum of pi^2 over the vocabulary (the
paper's proxy, which a forward pass gives). Each token earns r_i - b_t.

Where a single completion is as long there is nothing to compare with, and by the formula its tokens earn
nothing; verl has that, and the reward itself, as a switch. A place is the number of a sampled token, whatever
stands between turns. It costs one forward pass over a generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.credit.base import Credit, Credited, CreditKind, Models, register_credit
from raytune_rl.algorithms.credit.group import reward_metrics
from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import TrainBatch


def otb_advantages(
    rewards: ArrayLike, logprobs: Sequence[ArrayLike], squares: Sequence[ArrayLike]
) -> list[NDArray[np.float32]]:
    """r_i - b_t for each token of the completions of one group.

    Args:
        rewards: float64 `[g]`; a completion without a finite one earns nothing and counts nowhere.
        logprobs: Of each completion, float `[tokens]`.
        squares: Sum of the squared probabilities of the vocabulary at each token, of the same shapes.
    """
    reward = np.asarray(rewards, dtype=np.float64)
    known = np.isfinite(reward)
    if not known.any() or reward[known].min() == reward[known].max():
        return [np.zeros(len(np.asarray(row)), dtype=np.float32) for row in logprobs]
    energies = [
        np.cumsum(
            1.0 - 2.0 * np.exp(np.asarray(row, dtype=np.float64)) + np.asarray(square, dtype=np.float64)
        )
        for row, square in zip(logprobs, squares, strict=True)
    ]
    longest = max(len(energy) for energy in energies)
    weights = np.zeros((len(reward), longest))
    present = np.zeros((len(reward), longest))
    for row, energy in enumerate(energies):
        if known[row]:
            weights[row, : len(energy)] = np.maximum(energy, 0.0)
            present[row, : len(energy)] = 1.0
    # Where no token was a choice all weights are 0, and each completion counts once.
    weights = np.where(weights.sum(0) > 0, weights, present)
    baseline = (weights * np.where(known, reward, 0.0)[:, None]).sum(0) / np.maximum(weights.sum(0), 1e-300)
    return [
        ((reward[row] - baseline[: len(energy)]) if known[row] else np.zeros(len(energy))).astype(np.float32)
        for row, energy in enumerate(energies)
    ]


@dataclass(frozen=True)
class OptimalTokenBaseline(Credit):
    """See `otb_advantages`."""

    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """One advantage a token, as the column "advantages"."""
        columns, means = models.token_baseline(batch, experience.rewards, experience.group_ids)
        credited = batch.with_columns(advantages=columns)
        return Credited(credited, means.astype(np.float32), reward_metrics(experience))

    def in_words(self) -> str:
        """For the plan."""
        return "otb: the reward less, at each place, the group's mean by gradient norm up to there"


OTB = register_credit(
    CreditKind(
        "otb",
        OptimalTokenBaseline,
        "the reward less a baseline for each place of the completion, weighted by gradient norms",
        "Li et al. 2026 (OTB)",
    )
)
