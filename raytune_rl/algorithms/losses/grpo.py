"""GRPO's loss: the clipped surrogate, and the ways in which it is averaged (GRPO, BNPO, Dr. GRPO, DAPO).

Source: Shao et al. 2024 (DeepSeekMath), eq. 3; asymmetric clipping from Yu et al. 2025 (DAPO), eq. 10; the
upper cap `delta` for negative advantages from INTELLECT-2 (2025), section 3.4. Semantics as in ms-swift and
TRL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import MetricSums, Stat, max_of, mean_of, min_of, row_means
from raytune_rl.algorithms.policy_loss import PolicySettings, policy_columns, policy_loss, policy_rows
from raytune_rl.algorithms.registry import Loss, LossInputs, LossOutput, register_loss
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from raytune_rl.algorithms.metrics import MetricSums


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(PolicySettings):
    """Hyper-parameters of the clipped policy loss.

    Attributes:
        epsilon: lower clip range; the ratio is clipped at 1 - epsilon.
        epsilon_high: upper clip range; None means the same as epsilon.
        delta: upper cap on the ratio of the unclipped branch (it bounds the loss where the advantage is
            negative).
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(
                f"epsilon is {self.epsilon}; the ratio is clipped at 1 - epsilon, so it must be in [0, 1]"
            )
        if self.epsilon_high is not None and self.epsilon_high < 0:
            raise ConfigError(f"epsilon_high is {self.epsilon_high}; it must not be negative")
        if self.delta is not None and self.delta <= 0:
            raise ConfigError(f"delta is {self.delta}; it caps the ratio from above, so it must be positive")


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    row_of: Tensor,
    n_rows: int,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    by_row: bool = False,
) -> tuple[Tensor, MetricSums]:
    """l = -min(min(rho, delta) * A, clip(rho, 1 - epsilon, 1 + epsilon_high) * A), per token.

    Args:
        ratio: float [N] with gradient (`ratio.importance_ratio`).
        advantages: float [N], one a token (index a per-row array by `row_of`).
        row_of: int64 [N]; only the metrics look at rows.
        n_rows: rows in the micro-batch.
        epsilon, epsilon_high, delta: see `GRPOSettings`.
        by_row: The ratio is one a row: count rows, not tokens, in the means.

    Returns:
        token_loss [N], and the clip ratios: `*_mean` over all tokens (or rows) of the step; `low_min` and
        `high_max` are extremes over completions (ms-swift takes them over ranks, which depends on the number
        of ranks). As there, a ratio counts as clipped after the cap by delta, and only on the side where the
        clip binds for its advantage.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    clipped = ratio.clamp(1 - epsilon, 1 + high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    token_loss = -torch.minimum(ratio * advantages, clipped * advantages)

    is_low = ((ratio < 1 - epsilon) & (advantages < 0)).double()
    is_high = ((ratio > 1 + high) & (advantages > 0)).double()
    low_rows, high_rows = row_means(is_low, row_of, n_rows), row_means(is_high, row_of, n_rows)
    stats: dict[str, Stat] = {
        "clip_ratio/low_mean": mean_of(low_rows if by_row else is_low),
        "clip_ratio/low_min": min_of(low_rows),
        "clip_ratio/high_mean": mean_of(high_rows if by_row else is_high),
        "clip_ratio/high_max": max_of(high_rows),
        "clip_ratio/region_mean": mean_of(low_rows + high_rows if by_row else is_low + is_high),
    }
    return token_loss, MetricSums(stats)


def clipped_by_settings(ratio: Tensor, inputs: LossInputs) -> tuple[Tensor, MetricSums]:
    """`clipped_surrogate` as the `GRPOSettings` of the inputs have it."""
    settings: GRPOSettings = inputs.settings
    assert inputs.advantages is not None
    return clipped_surrogate(
        ratio,
        inputs.advantages,
        inputs.row_of,
        inputs.n_rows,
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        delta=settings.delta,
        by_row=settings.importance_sampling_level != "token",
    )


def grpo_loss(inputs: LossInputs) -> LossOutput:
    """`policy_loss` with the clipped surrogate; PPO's policy loss too, given its advantages and beta 0."""
    return policy_loss(inputs, clipped_by_settings)


def clip_in_words(settings: GRPOSettings) -> str:
    """The clip range, for the plan."""
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    return f"clip {1 - settings.epsilon:g} to {1 + high:g}"


def clipped(name: str, normaliser: str, summary: str, paper: str) -> Loss:
    """The clipped loss under a name, averaged in one of the ways of `aggregation`."""
    return Loss(
        name,
        GRPOSettings,
        grpo_loss,
        policy_columns,
        needs_advantages=True,
        required_rows=policy_rows,
        normaliser=normaliser,
        in_words=clip_in_words,
        summary=summary,
        paper=paper,
    )


GRPO = register_loss(
    clipped("grpo", "rows", "averages over each completion first", "Shao et al. 2024 (DeepSeekMath)")
)
DR_GRPO = register_loss(
    clipped(
        "dr_grpo",
        "constant",
        "divides by completions * --max_completion_length",
        "Liu et al. 2025 (Dr. GRPO)",
    )
)
DAPO = register_loss(
    clipped("dapo", "tokens", "averages over all tokens of the step", "Yu et al. 2025 (DAPO)")
)
BNPO = register_loss(
    clipped("bnpo", "tokens", "averages over all tokens of the step, as dapo", "ms-swift, TRL")
)
"""As ms-swift and TRL have it, the token mean of each *local micro-batch*. That mean changes with the
micro-batch size and the number of ranks, so it has no meaning of its own; here the "batch" is the whole
optimizer step, which makes it equal to dapo. With one micro-batch a step on one rank it is theirs exactly."""
