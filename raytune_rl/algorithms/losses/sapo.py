"""SAPO: a smooth gate on the ratio instead of a clip.

Source: Gao et al. 2025 (Soft Adaptive Policy Optimization); the temperatures as in ms-swift and
TRL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import MetricSums
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SAPOSettings(PolicySettings):
    """Hyper-parameters of SAPO.

    Attributes:
        tau_pos: temperature of the gate where the advantage is positive; higher closes it sooner.
        tau_neg: the same elsewhere.
    """

    tau_pos: float = option(1.0, "The gate's temperature for positive advantages.", gt=0)
    tau_neg: float = option(1.05, "The gate's temperature for the others.", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, tau in (("tau_pos", self.tau_pos), ("tau_neg", self.tau_neg)):
            if tau <= 0:
                raise ConfigError(f"{name} is {tau}; it divides, so it must be positive")


def sapo_surrogate(
    ratio: Tensor, advantages: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05
) -> Tensor:
    """l = -(4 / tau) * sigmoid(tau * (rho - 1)) * A, per token; its slope at rho = 1 is -A for any tau.

    Args:
        ratio: float [N] with gradient.
        advantages: float [N].
        tau_pos, tau_neg: see `SAPOSettings`.
    """
    tau = torch.where(advantages > 0, ratio.new_tensor(tau_pos), ratio.new_tensor(tau_neg))
    return -(4.0 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages


def sapo_loss(inputs: LossInputs) -> LossOutput:
    """`policy_loss` with SAPO's surrogate."""
    settings: SAPOSettings = inputs.settings

    def surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
        assert inputs.advantages is not None
        loss = sapo_surrogate(ratio, inputs.advantages, tau_pos=settings.tau_pos, tau_neg=settings.tau_neg)
        return loss, MetricSums()

    return policy_loss(inputs, surrogate)


SAPO = register_loss(
    Loss(
        "sapo",
        SAPOSettings,
        sapo_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=policy_rows,
        summary="has a smooth gate instead of a clip",
        paper="Gao et al. 2025 (SAPO)",
        in_words=lambda settings: f"gate {settings.tau_pos:g} / {settings.tau_neg:g}",
    )
)
