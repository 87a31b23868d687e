"""A policy loss of your own, for --external_plugins; chosen by its name.

    raytune-rl rlhf ... --external_plugins loss_plugin.py --loss_type power --loss_args '{"power": 2}'

`compute` gets one micro-batch of token log-probs and returns one loss a token. It divides by nothing: the
normaliser holds for the whole optimizer step, and the driver has worked it out (`normaliser`, one of the
built-in loss types). `policy_loss` adds what all policy losses share: the KL, the entropy filter and the
rollout corrections. So only the surrogate is new here.
"""

from dataclasses import dataclass

from torch import Tensor

from raytune_rl.algorithms.metrics import MetricSums, max_of
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss


@dataclass(frozen=True, kw_only=True)
class PowerSettings(PolicySettings):
    """What --loss_args may set, beside the flags that all policy losses have."""

    power: float = 0.5


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
    )
)
