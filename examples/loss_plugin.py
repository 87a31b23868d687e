"""A policy loss of your own, for --external_plugins; chosen by its name.

    raytune-rl rlhf ... --external_plugins loss_plugin.py --loss_type power --loss_args '{"power": 2}'

`compute` gets one micro-batch of token log-probs and returns one loss a token. It divides by nothing: the
normaliser holds for the whole optimizer step, and the driver has worked it out (`normaliser`, one of the
built-in loss types). `policy_loss` adds what all policy losses share: the KL, the entropy filter and the
rollout corrections. So only the surrogate is new here.

The same file in raytune_rl/algorithms/losses/ is a built-in loss, and `power` is a flag, --power.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.metrics import MetricSums, max_of
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PowerSettings(PolicySettings):
    """Settings of --loss_args, beside the flags that all policy losses have."""

    power: float = option(0.5, "Exponent of the importance ratio.", gt=0)


def power_surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
    """-(ratio^p / p) * A: near the old policy the policy gradient, and farther away softer for p < 1."""
    power = inputs.settings.power
    token_loss = -(ratio**power / power) * inputs.advantages
    return token_loss, MetricSums({"power/ratio_max": max_of(ratio)})


def power_loss(inputs: LossInputs) -> LossOutput:
    return policy_loss(inputs, power_surrogate)


register_loss(
    Loss(
        "power",
        PowerSettings,
        power_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="dapo",
        summary="is dapo with a power of the ratio and no clip",
        in_words=lambda settings: f"ratio to the power of {settings.power:g}",
    )
)
