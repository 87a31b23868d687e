"""FIPO: a token counts for more where what follows it is being reinforced.

Source: "FIPO: Future-KL influenced policy optimization", arXiv 2603.19835; constants and order as ms-swift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.losses.grpo import GRPOSettings, clip_in_words, clipped_by_settings
from raytune_rl.algorithms.metrics import MetricSums, mean_of
from raytune_rl.algorithms.options import option
from raytune_rl.algorithms.policy_loss import policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.algorithms.rows import bounded, clamped_exp, discounted_to_go
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SAFE = (0.8, 1.0)
"""Bounds of the weight of a token that is to become less likely and has become much likelier."""


@dataclass(frozen=True, kw_only=True)
class FIPOSettings(GRPOSettings):
    """Hyper-parameters of FIPO, beside those of the clipped loss.

    Attributes:
        fipo_decay_rate: tokens after which what follows counts half.
        fipo_clip_range: how far a token's weight may be from 1; 0: no bounds.
        fipo_clip_high_only: weights are at least 1: no token loses weight.
        fipo_safety_threshold: ratio over which a token with a negative advantage is kept within `SAFE`; None:
            none is.
    """

    fipo_decay_rate: float = option(32.0, "Tokens after which what follows counts half.", gt=0)
    fipo_clip_range: float = option(0.2, "How far a token's weight may be from 1; 0: no bounds.", ge=0, le=1)
    fipo_clip_high_only: bool = option(True, "No token's weight is below 1.")
    fipo_safety_threshold: float | None = option(
        4.0, "Ratio over which a token with a negative advantage gets no weight over 1.", gt=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fipo_decay_rate <= 0:
            raise ConfigError(
                f"fipo_decay_rate is {self.fipo_decay_rate}; it divides, so it must be positive"
            )
        if not 0 <= self.fipo_clip_range <= 1:
            raise ConfigError(f"fipo_clip_range is {self.fipo_clip_range}; it must be in [0, 1]")
        if self.fipo_safety_threshold is not None and self.fipo_safety_threshold <= 0:
            raise ConfigError(f"fipo_safety_threshold is {self.fipo_safety_threshold}; it must be positive")


def influence(
    log_ratio: Tensor, ratio: Tensor, advantages: Tensor, row_of: Tensor, n_rows: int, settings: FIPOSettings
) -> tuple[Tensor, MetricSums]:
    """Weight of each token, f_t = clip(exp(F_t)) with F_t = sum over k >= t of gamma^(k - t) log ratio_k and
    gamma = 2^(-1 / fipo_decay_rate).

    Args:
        log_ratio: float [N], log pi - log pi_old of each token.
        ratio: float [N], as the surrogate sees it; a token over `delta` takes no part in the sums.
        advantages: float [N].
        row_of: int64 [N].
        n_rows: rows in the micro-batch.
        settings: see above.

    Returns:
        float [N] without gradient, and `fipo/future_kl_mean`, `fipo/influence_weight_mean` and
        `fipo/safety_keep_ratio` over tokens.
    """
    moved, ratio = bounded(log_ratio.detach()), ratio.detach()
    if settings.delta is not None:
        moved = torch.where(ratio > settings.delta, 0.0, moved)
    future = discounted_to_go(moved, row_of, n_rows, 2.0 ** (-1.0 / settings.fipo_decay_rate))
    weight = clamped_exp(future)
    if settings.fipo_clip_range:
        low = 1.0 if settings.fipo_clip_high_only else 1.0 - settings.fipo_clip_range
        weight = weight.clamp(low, 1.0 + settings.fipo_clip_range)
    safe = torch.ones_like(row_of, dtype=torch.bool)
    if settings.fipo_safety_threshold is not None:
        safe = ~((advantages < 0) & (ratio > settings.fipo_safety_threshold))
        weight = torch.where(safe, weight, weight.clamp(*SAFE))
    stats = {
        "fipo/future_kl_mean": mean_of(future),
        "fipo/influence_weight_mean": mean_of(weight),
        "fipo/safety_keep_ratio": mean_of(safe),
    }
    return weight.to(log_ratio.dtype), MetricSums(stats)


def fipo_loss(inputs: LossInputs) -> LossOutput:
    """`policy_loss` with the clipped surrogate, each token of it weighted by its influence.

    Where the policy is the one that sampled, every influence is 1 and this is DAPO's loss.
    """
    settings: FIPOSettings = inputs.settings

    def surrogate(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
        assert inputs.advantages is not None
        token_loss, clips = clipped_by_settings(ratio, inputs)
        old = inputs.columns.get("old_logprobs", inputs.logprobs.detach())
        weight, measured = influence(
            inputs.logprobs - old, ratio, inputs.advantages, inputs.row_of, inputs.n_rows, settings
        )
        return token_loss * weight, clips.merge(measured)

    return policy_loss(inputs, surrogate)


FIPO = register_loss(
    Loss(
        "fipo",
        FIPOSettings,
        fipo_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser="tokens",
        summary="is dapo with more weight on tokens before what is reinforced",
        paper="arXiv 2603.19835 (FIPO)",
        in_words=clip_in_words,
    )
)
