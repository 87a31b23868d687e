"""GMPO: the geometric mean of a completion's ratios, each clipped on the side where it would run away.

Source: Zhao et al. 2025, "Geometric-mean policy optimization" (arXiv 2507.20673), eq. 4: J = mean over
completions of (prod_t |min(rho_t A, clip(rho_t) A)|)^(1 / |o|) sgn(A), with the clip range (e^-0.4, e^0.4).
Written in logarithms, as TRL's experimental trainer does. Next to it, GSPO (--importance_sampling_level
sequence) clips the mean instead of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import MetricSums, mean_of
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import clamped_exp, mean_rows
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GMPOSettings(PolicySettings):
    """Hyper-parameters of GMPO.

    Attributes:
        gmpo_epsilon: the clip range in nats: a token's ratio is held within e^-epsilon and e^epsilon.
    """

    gmpo_epsilon: float = option(0.4, "Clip a token's log ratio at - and + this many nats.", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gmpo_epsilon <= 0:
            raise ConfigError(f"gmpo_epsilon is {self.gmpo_epsilon}; it must be over 0 nats")


def gmpo_surrogate(
    log_ratio: Tensor, advantages: Tensor, row_of: Tensor, n_rows: int, gmpo_epsilon: float = 0.4
) -> tuple[Tensor, Tensor]:
    """l = -exp(mean over the row of c_t) A, with c = min(log rho, epsilon) where A > 0, else max(log rho,
    -epsilon): |min(rho A, clip(rho) A)| = e^c |A|.

    Args:
        log_ratio: float [N] with gradient, log pi - log pi_old.
        advantages: float [N].
        row_of: int64 [N].
        n_rows: rows.
        gmpo_epsilon: nats.

    Returns:
        token_loss [N], the same for all tokens of a row that share their advantage; and bool [N], clipped.
    """
    up, down = log_ratio.clamp(max=gmpo_epsilon), log_ratio.clamp(min=-gmpo_epsilon)
    held = torch.where(advantages > 0, up, down)
    mean = clamped_exp(mean_rows(held, row_of, n_rows))
    return -mean[row_of].to(log_ratio.dtype) * advantages, held.detach() != log_ratio.detach()


def gmpo_loss(inputs: LossInputs) -> LossOutput:
    """`policy_loss` with GMPO's surrogate; metric `gmpo/clip_ratio`, over tokens."""
    settings: GMPOSettings = inputs.settings

    def surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
        assert inputs.advantages is not None
        old = inputs.columns.get("old_logprobs", inputs.logprobs.detach())
        loss, clipped = gmpo_surrogate(
            inputs.logprobs - old, inputs.advantages, inputs.row_of, inputs.n_rows, settings.gmpo_epsilon
        )
        return loss, MetricSums({"gmpo/clip_ratio": mean_of(clipped)})

    return policy_loss(inputs, surrogate)


GMPO = register_loss(
    Loss(
        "gmpo",
        GMPOSettings,
        gmpo_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=policy_rows,
        fixed={"importance_sampling_level": "token"},
        summary="has the geometric mean of a completion's clipped ratios",
        paper="Zhao et al. 2025 (GMPO)",
        in_words=lambda settings: f"log ratios within {settings.gmpo_epsilon:g} nats",
    )
)
