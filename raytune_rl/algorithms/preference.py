"""The common part of losses of preference pairs: the likelihood of the chosen side, and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import MetricSums, Stat, mean_of
from raytune_rl.algorithms.pairs import Pair, chosen_tokens
from raytune_rl.algorithms.registry import LossInputs

if TYPE_CHECKING:
    from torch import Tensor


def chosen_nll(inputs: LossInputs) -> tuple[Tensor, MetricSums]:
    """-log pi of the tokens of chosen rows and 0 elsewhere, [N], and its mean there, `nll_loss`."""
    chosen = chosen_tokens(inputs.row_of)
    nll = torch.where(chosen, -inputs.logprobs, 0.0)
    return nll, MetricSums({"nll_loss": mean_of(nll[chosen])})


def preference_metrics(policy: Pair, log_ratio: Pair, beta: float) -> MetricSums:
    """Rewards, margins and log-probs of pairs, means over pairs."""
    stats: dict[str, Stat] = {
        "rewards/chosen": mean_of(beta * log_ratio.chosen),
        "rewards/rejected": mean_of(beta * log_ratio.rejected),
        "rewards/accuracies": mean_of(log_ratio.margin > 0),
        "rewards/margins": mean_of(beta * log_ratio.margin),
        "logps/chosen": mean_of(policy.chosen),
        "logps/rejected": mean_of(policy.rejected),
    }
    return MetricSums(stats)
