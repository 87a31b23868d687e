"""GRPO's token loss: a clipped importance ratio times the advantage, plus beta times the KL to a reference.

Source: Shao et al. 2024 (DeepSeekMath), eq. 3; asymmetric clipping from Yu et al. 2025 (DAPO), eq. 10; the
    upper cap
`delta` for negative advantages from INTELLECT-2 (2025), section 3.4. Semantics as in ms-swift and TRL.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raytune_rl.algorithms.kl import k3
from raytune_rl.algorithms.metrics import (
    MetricSums,
    Stat,
    max_of,
    mean_of,
    min_of,
    row_means,
)
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.errors import ConfigError

# exp(20) = 4.9e8: far beyond any clip range, and still finite in float32 when multiplied by an advantage.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class GRPOSettings:
    """Hyper-parameters of the clipped policy loss.

    Attributes:
        epsilon: lower clip range; the ratio is clipped at 1 - epsilon.
        epsilon_high: upper clip range; None means the same as epsilon.
        delta: upper cap on the ratio of the unclipped branch (it bounds the loss where the advantage is
            negative).
        beta: weight of the k3 KL to the reference; 0 means no reference at all.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.04

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(
                f"epsilon is {self.epsilon}; the ratio is clipped at 1 - epsilon, so it must be in [0, 1]"
            )
        if self.epsilon_high is not None and self.epsilon_high < 0:
            raise ConfigError(f"epsilon_high is {self.epsilon_high}; it must not be negative")
        if self.delta is not None and self.delta <= 0:
            raise ConfigError(f"delta is {self.delta}; it caps the ratio from above, so it must be positive")
        if self.beta < 0:
            raise ConfigError(f"beta is {self.beta}; it must not be negative")

    @property
    def high(self) -> float:
        """The upper clip range in effect."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    row_of: Tensor,
    n_rows: int,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> tuple[Tensor, MetricSums]:
    """l = -min(min(rho, delta) * A, clip(rho, 1 - epsilon, 1 + epsilon_high) * A), per token.

    rho = exp(logprobs - old_logprobs), its logarithm clamped to +-20 so that an extreme token gives a large
    but finite loss (and, beyond the clamp, no gradient) instead of inf * 0. A NaN log-prob is not an extreme
    value but a defect: it stays NaN and is seen.

    Args:
        logprobs: float [N] with gradient.
        old_logprobs: float [N] of the policy that the step started from; None means on-policy: rho is 1 and
            the gradient that of -A * logprobs.
        advantages: float [N], one a token (index a per-row array by `row_of`).
        row_of: int64 [N]; only the metrics look at rows.
        n_rows: rows in the micro-batch.
        epsilon, epsilon_high, delta: see `GRPOSettings`.

    Returns:
        token_loss [N], and the clip ratios: `*_mean` over all tokens of the step; `low_min` and `high_max`
        are extremes over completions (ms-swift takes them over ranks, which depends on the number of ranks).
        As there, a ratio counts as clipped after the cap by delta, and only on the side where the clip binds
        for its advantage.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    token_loss = -torch.minimum(ratio * advantages, clipped * advantages)

    is_low = ((ratio < 1 - epsilon) & (advantages < 0)).double()
    is_high = ((ratio > 1 + high) & (advantages > 0)).double()
    stats: dict[str, Stat] = {
        "clip_ratio/low_mean": mean_of(is_low),
        "clip_ratio/low_min": min_of(row_means(is_low, row_of, n_rows)),
        "clip_ratio/high_mean": mean_of(is_high),
        "clip_ratio/high_max": max_of(row_means(is_high, row_of, n_rows)),
        "clip_ratio/region_mean": mean_of(is_low + is_high),
    }
    return token_loss, MetricSums(stats)


def grpo_loss(inputs: LossInputs) -> LossOutput:
    """Clipped policy loss plus beta * k3 to the reference; metrics `clip_ratio/*`, `kl` and `entropy/*`.

    `entropy/max` and `entropy/min` are over completions of their mean, and `entropy/mean` is the mean over
    completions, as in ms-swift.
    """
    settings: GRPOSettings = inputs.settings
    if inputs.advantages is None:
        raise ConfigError("loss 'grpo' needs advantages")
    token_loss, metrics = clipped_policy_loss(
        inputs.logprobs,
        inputs.columns.get("old_logprobs"),
        inputs.advantages,
        inputs.row_of,
        inputs.n_rows,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        delta=settings.delta,
    )
    stats: dict[str, Stat] = {}
    if settings.beta > 0:
        kl = k3(inputs.logprobs, inputs.columns["ref_logprobs"])
        token_loss = token_loss + settings.beta * kl
        stats["kl"] = mean_of(kl)
    if inputs.entropy is not None:
        per_row = row_means(inputs.entropy, inputs.row_of, inputs.n_rows)
        stats["entropy/mean"] = mean_of(per_row)
        stats["entropy/max"] = max_of(per_row)
        stats["entropy/min"] = min_of(per_row)
    return LossOutput(token_loss, metrics.merge(MetricSums(stats)))


def _columns(settings: GRPOSettings) -> tuple[str, ...]:
    return ("ref_logprobs",) if settings.beta > 0 else ()


GRPO = register_loss(Loss("grpo", GRPOSettings, grpo_loss, _columns, needs_advantages=True))
