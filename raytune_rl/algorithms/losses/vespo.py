"""VESPO: a smooth kernel on the ratio of the whole completion, not divided by its length.

Source: Shen et al. 2026, "VESPO: variational sequence-level soft policy optimization" (arXiv 2602.10693): the
policy gradient with the weight phi(W) = W^k e^(lambda (1 - W)), W = pi(y) / pi_old(y), k and lambda apart for
positive and negative advantages; phi(1) = 1, and both ends go to 0. Defaults, bounds of log W and the mean
over tokens as in TRL, where the correction of the gap to the engine is a factor inside W; here it is outside,
as with every other loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import MetricSums, mean_of
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import MAX_LOG_RATIO, bounded, sum_rows
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

LEAST_LOG_WEIGHT = math.log(1e-8)
"""Below it a completion has no weight to speak of."""


@dataclass(frozen=True, kw_only=True)
class VESPOSettings(PolicySettings):
    """Hyper-parameters of VESPO.

    Attributes:
        vespo_k_pos, vespo_lambda_pos: exponent and decay of the kernel where the advantage is not negative.
        vespo_k_neg, vespo_lambda_neg: the same elsewhere.
    """

    vespo_k_pos: float = option(2.0, "Exponent of the kernel where the advantage is not negative.", ge=0)
    vespo_lambda_pos: float = option(3.0, "Decay of the kernel where the advantage is not negative.", ge=0)
    vespo_k_neg: float = option(3.0, "Exponent of the kernel for negative advantages.", ge=0)
    vespo_lambda_neg: float = option(2.0, "Decay of the kernel for negative advantages.", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")


def vespo_weights(
    log_ratio: Tensor, advantages: Tensor, row_of: Tensor, n_rows: int, settings: VESPOSettings
) -> Tensor:
    """phi of each token's row, float64 [N], without gradient.

    Args:
        log_ratio: float [N], log pi - log pi_old.
        advantages: float [N].
        row_of: int64 [N].
        n_rows: rows.
        settings: the kernel.
    """
    moved = bounded(log_ratio.detach().double()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_weight = sum_rows(moved, row_of, n_rows).clamp(LEAST_LOG_WEIGHT, MAX_LOG_RATIO)[row_of]
    good = advantages >= 0
    power = torch.where(good, settings.vespo_k_pos, settings.vespo_k_neg).double()
    decay = torch.where(good, settings.vespo_lambda_pos, settings.vespo_lambda_neg).double()
    return (power * log_weight + decay * (1.0 - log_weight.exp())).exp()


def vespo_loss(inputs: LossInputs) -> LossOutput:
    """`policy_loss` with -phi(W) A log pi; metric `vespo/weight_mean`, over tokens."""
    settings: VESPOSettings = inputs.settings

    def surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
        assert inputs.advantages is not None
        old = inputs.columns.get("old_logprobs", inputs.logprobs.detach())
        weight = vespo_weights(
            inputs.logprobs - old, inputs.advantages, inputs.row_of, inputs.n_rows, settings
        )
        loss = -weight.to(inputs.logprobs.dtype) * inputs.advantages * inputs.logprobs
        return loss, MetricSums({"vespo/weight_mean": mean_of(weight)})

    return policy_loss(inputs, surrogate)


VESPO = register_loss(
    Loss(
        "vespo",
        VESPOSettings,
        vespo_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="tokens",
        fixed={"importance_sampling_level": "token"},
        summary="has a smooth kernel on the ratio of the whole completion",
        paper="Shen et al. 2026 (VESPO)",
        in_words=lambda settings: (
            f"kernel {settings.vespo_k_pos:g}, {settings.vespo_lambda_pos:g} / "
            f"{settings.vespo_k_neg:g}, {settings.vespo_lambda_neg:g}"
        ),
    )
)
