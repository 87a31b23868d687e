"""The reward model's loss: the chosen completion shall score higher.

Source: Ouyang et al. 2022 (InstructGPT), eq. 1; the margin, Touvron et al. 2023 (Llama 2), eq. 2; the
centring term, Eisenstein et al. 2023, "Helping or herding?".
"""

from __future__ import annotations

from dataclasses import dataclass

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import MetricSums, Stat, max_of, mean_of, min_of
from raytune_rl.algorithms.pairs import PAIR, check_pairs, on_chosen, split_pairs
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.errors import ConfigError

MARGIN = "margin"
"""Row value: how much better the chosen completion is, the same on both rows of a pair; absent: 0."""


@dataclass(frozen=True)
class RMSettings:
    """Hyper-parameters of the reward model.

    Attributes:
        center_rewards_coefficient: weight of (r_w + r_l)^2, which keeps scores around 0; None: 0.
    """

    center_rewards_coefficient: float | None = None

    def __post_init__(self) -> None:
        given = self.center_rewards_coefficient
        if given is not None and given < 0:
            raise ConfigError(f"center_rewards_coefficient is {given}; it must not be negative")


def rm_loss(inputs: LossInputs) -> LossOutput:
    """Row losses -LS(r_w - r_l - margin) + c (r_w + r_l)^2.

    Weights: `aggregation.pair_weights`. Metrics: `rewards/*` as in DPO with the scores as rewards, and their
    extremes.
    """
    settings: RMSettings = inputs.settings
    assert inputs.scores is not None
    check_pairs(inputs.row_values, inputs.n_rows)
    scores = split_pairs(inputs.scores.double())
    gap = scores.margin
    if MARGIN in inputs.row_values:
        gap = gap - split_pairs(inputs.row_values[MARGIN]).chosen
    loss = -torch.nn.functional.logsigmoid(gap)
    if settings.center_rewards_coefficient:
        loss = loss + settings.center_rewards_coefficient * (scores.chosen + scores.rejected) ** 2
    both = torch.cat([scores.chosen, scores.rejected])
    stats: dict[str, Stat] = {
        "rewards/chosen": mean_of(scores.chosen),
        "rewards/rejected": mean_of(scores.rejected),
        "rewards/accuracies": mean_of(scores.margin > 0),
        "rewards/margins": mean_of(scores.margin),
        "rewards/max": max_of(both),
        "rewards/min": min_of(both),
    }
    return LossOutput(None, MetricSums(stats), on_chosen(loss))


RM = register_loss(
    Loss(
        "rm",
        RMSettings,
        rm_loss,
        required_rows=lambda settings: (PAIR,),
        rows="pairs",
        forward="scores",
        paper="Ouyang et al. 2022 (InstructGPT)",
    )
)
