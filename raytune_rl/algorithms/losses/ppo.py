"""PPO: the clipped policy loss over all tokens of a step, and the critic's.

Source: Schulman et al. 2017; the clip of the value as in OpenAI's baselines, TRL and ms-swift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.losses.grpo import clipped
from raytune_rl.algorithms.metrics import MetricSums, mean_of
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from raytune_rl.algorithms.metrics import MetricSums


@dataclass(frozen=True)
class ValueSettings:
    """Hyper-parameters of the critic's loss.

    Attributes:
        cliprange_value: how far a value may move from the one before the step; beyond, it earns nothing.
    """

    cliprange_value: float = 0.2

    def __post_init__(self) -> None:
        if self.cliprange_value < 0:
            raise ConfigError(f"cliprange_value is {self.cliprange_value}; it must not be negative")


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float = 0.2
) -> tuple[Tensor, MetricSums]:
    """max((V - R)^2, (clip(V, V_old +- c) - R)^2) / 2, per token, and how often the clip binds.

    Args:
        values: float [N] with gradient.
        old_values: float [N], before the step.
        returns: float [N].
        cliprange_value: c.
    """
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain, bounded = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.maximum(plain, bounded), MetricSums({"val/clipfrac_avg": mean_of(bounded > plain)})


def value_loss(inputs: LossInputs) -> LossOutput:
    """Token losses of the critic; columns "old_values" and "returns"."""
    settings: ValueSettings = inputs.settings
    assert inputs.values is not None
    token_loss, metrics = clipped_value_loss(
        inputs.values, inputs.columns["old_values"], inputs.columns["returns"], settings.cliprange_value
    )
    error = (inputs.values.detach() - inputs.columns["returns"]) ** 2
    return LossOutput(
        token_loss, metrics.merge(MetricSums({"val/error": mean_of(error), "value": mean_of(inputs.values)}))
    )


PPO = register_loss(
    clipped("ppo", "tokens", "the loss of --rlhf_type ppo: as dapo", "Schulman et al. 2017 (PPO)")
)

PPO_VALUE = register_loss(
    Loss(
        "ppo_value",
        ValueSettings,
        value_loss,
        lambda settings: ("old_values", "returns"),
        forward="values",
        paper="Schulman et al. 2017 (PPO)",
    )
)
