"""CPO and SimPO: preferences without a reference, on the policy's own log-probs.

Source: Xu et al. 2024 (CPO); Meng et al. 2024 (SimPO), eq. 6. SimPO is CPO with the mean token
log-prob, a target margin and no likelihood term; ms-swift keeps the likelihood at weight 1 unless cpo_alpha
is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raytune_rl.algorithms.dpo_losses import smoothed
from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.pairs import PAIR, check_pairs, on_chosen, split_pairs
from raytune_rl.algorithms.preference import chosen_nll, preference_metrics
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import mean_rows, sum_rows
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

CPOType = Literal["sigmoid", "hinge", "ipo", "simpo"]
LOSS_TYPES: tuple[CPOType, ...] = ("sigmoid", "hinge", "ipo", "simpo")


@dataclass(frozen=True, kw_only=True)
class CPOSettings:
    """Hyper-parameters of CPO.

    Attributes:
        loss_type: sigmoid and hinge compare summed log-probs, ipo and simpo mean token log-probs.
        beta: temperature; SimPO's is near 2.
        cpo_alpha: weight of the likelihood of the chosen completion.
        simpo_gamma: target margin of simpo, subtracted after beta.
        label_smoothing: probability that a label is wrong; of sigmoid and simpo.
    """

    loss_type: CPOType = "sigmoid"
    beta: float = 0.1
    cpo_alpha: float = 1.0
    simpo_gamma: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ConfigError(f"loss_type is '{self.loss_type}'; it must be one of {', '.join(LOSS_TYPES)}")
        if self.beta < 0 or (self.beta == 0 and self.loss_type == "ipo"):
            raise ConfigError(f"beta is {self.beta}; it must be positive")
        if self.cpo_alpha < 0:
            raise ConfigError(f"cpo_alpha is {self.cpo_alpha}; it must not be negative")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 0.5)")
        if self.label_smoothing > 0 and self.loss_type not in ("sigmoid", "simpo"):
            raise ConfigError(
                f"label_smoothing {self.label_smoothing} does nothing for loss_type {self.loss_type}"
            )


def cpo_pair_loss(margin: Tensor, settings: CPOSettings) -> Tensor:
    """Loss of a pair from the difference of its log-probs (summed or mean, as the type has it), [n_pairs]."""
    if settings.loss_type == "ipo":
        return (margin - 1 / (2 * settings.beta)) ** 2
    if settings.loss_type == "hinge":
        return torch.relu(1 - settings.beta * margin)
    target = settings.simpo_gamma if settings.loss_type == "simpo" else 0.0
    return smoothed(settings.beta * margin - target, settings.label_smoothing)


def cpo_loss(inputs: LossInputs) -> LossOutput:
    """Row losses of the pairs, and cpo_alpha times the likelihood of the chosen completions as token losses.

    Weights: `aggregation.pair_weights`. Metrics: those of DPO with rewards beta * log-prob, and `nll_loss`.
    """
    settings: CPOSettings = inputs.settings
    check_pairs(inputs.row_values, inputs.n_rows)
    reduce = mean_rows if settings.loss_type in ("ipo", "simpo") else sum_rows
    policy = split_pairs(reduce(inputs.logprobs, inputs.row_of, inputs.n_rows))
    row_loss = on_chosen(cpo_pair_loss(policy.margin, settings))
    metrics = preference_metrics(policy, policy, settings.beta)
    if settings.cpo_alpha == 0:
        return LossOutput(None, metrics, row_loss)
    nll, measured = chosen_nll(inputs)
    return LossOutput(settings.cpo_alpha * nll, metrics.merge(measured), row_loss)


CPO = register_loss(
    Loss(
        "cpo",
        CPOSettings,
        cpo_loss,
        required_rows=lambda settings: (PAIR,),
        rows="pairs",
        paper="Xu et al. 2024 (CPO); Meng et al. 2024 (SimPO)",
    )
)
