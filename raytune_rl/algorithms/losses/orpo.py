"""ORPO: likelihood of the chosen completion and the odds ratio to the rejected one, without a reference.

Source: Hong et al. 2024 (ORPO).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import MetricSums, mean_of
from raytune_rl.algorithms.pairs import PAIR, check_pairs, on_chosen, split_pairs
from raytune_rl.algorithms.preference import chosen_nll, preference_metrics
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import mean_rows
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# A mean token probability of 1 has infinite odds. Nearer to it float32 log-probs cannot tell.
NEAREST_TO_ONE = -1e-8


@dataclass(frozen=True)
class ORPOSettings:
    """Hyper-parameters of ORPO.

    Attributes:
        beta: weight of the odds-ratio term, lambda in the paper.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ConfigError(f"beta is {self.beta}; it must not be negative")


def log_odds(mean_logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(mean token log-prob), accurate at both ends; finite at p = 1."""
    logp = mean_logprob.clamp(max=NEAREST_TO_ONE)
    # log(1 - e^l): expm1 where p is large, log1p where it is small.
    large = logp > -math.log(2)
    complement = torch.where(
        large,
        torch.log(-torch.expm1(torch.where(large, logp, -1.0))),
        torch.log1p(-torch.exp(torch.where(large, -1.0, logp))),
    )
    return logp - complement


def orpo_loss(inputs: LossInputs) -> LossOutput:
    """Token losses of the likelihood, and row losses -beta LS(log odds of chosen - log odds of rejected).

    Weights: `aggregation.pair_weights`. Metrics: those of DPO with rewards beta * mean log-prob, `nll_loss`,
    `log_odds_chosen` (the log odds ratio) and `log_odds_ratio` (its log sigmoid), as in TRL.
    """
    settings: ORPOSettings = inputs.settings
    check_pairs(inputs.row_values, inputs.n_rows)
    mean = mean_rows(inputs.logprobs, inputs.row_of, inputs.n_rows)
    ratio = split_pairs(log_odds(mean)).margin
    nll, measured = chosen_nll(inputs)
    metrics = preference_metrics(split_pairs(mean), split_pairs(mean), settings.beta).merge(
        measured,
        MetricSums(
            {
                "log_odds_chosen": mean_of(ratio),
                "log_odds_ratio": mean_of(torch.nn.functional.logsigmoid(ratio)),
            }
        ),
    )
    return LossOutput(nll, metrics, on_chosen(-settings.beta * torch.nn.functional.logsigmoid(ratio)))


ORPO = register_loss(
    Loss(
        "orpo",
        ORPOSettings,
        orpo_loss,
        required_rows=lambda settings: (PAIR,),
        rows="pairs",
        paper="Hong et al. 2024 (ORPO)",
    )
)
