"""Corrections for the gap between the engine that sampled and the policy that trains.

Source: truncated importance sampling (TIS), Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training"; masked importance sampling (MIS), Liu et al. 2025, "When speed kills stability";
IcePop's two-sided mask, Ant Ling team 2025; off-policy sequence masking, DeepSeek-V3.2 (2025).
Modes and names as in ms-swift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import MetricSums, ess_of, mean_of, row_counts, row_sums
from raytune_rl.algorithms.mismatch import PREFIX
from raytune_rl.algorithms.rows import bounded, clamped_exp
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
MODES: tuple[Mode, ...] = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class RolloutCorrection:
    """How to weigh tokens by w = pi_old / pi_rollout.

    Attributes:
        mode: truncate brings w into the bounds, mask sets it to 0 outside of them; token takes w of each
            token, sequence the geometric mean over the row for all of its tokens (the product would punish
            length).
        threshold: upper bound of w.
        floor: lower bound of w, or None. With token_mask and both bounds this is IcePop.
    """

    mode: Mode
    threshold: float = 2.0
    floor: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                f"rollout_importance_sampling_mode is '{self.mode}'; it must be one of {', '.join(MODES)}"
            )
        if self.threshold <= 0:
            raise ConfigError(
                f"rollout_importance_sampling_threshold is {self.threshold}; a ratio is positive, and so "
                "must be its upper bound"
            )
        if self.floor is not None and not 0 <= self.floor < self.threshold:
            raise ConfigError(
                f"rollout_importance_sampling_min is {self.floor}; it must be at least 0 and below the upper "
                f"bound {self.threshold}"
            )


def correction_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, row_of: Tensor, n_rows: int, correction: RolloutCorrection
) -> tuple[Tensor, MetricSums]:
    """Weights for the token losses, without gradient.

    A token to which the engine gave no finite log-prob cannot be compared: its ratio counts as 1, and it
    stays out of its row's mean (`mismatch` counts such tokens).

    Args:
        old_logprobs: float [N], of the trainer, under the weights that sampled.
        rollout_logprobs: float [N], of the engine.
        row_of: int64 [N].
        n_rows: rows in the micro-batch.
        correction: what to do.

    Returns:
        Weights [N] in the dtype of `old_logprobs`, and as in ms-swift `is_weight_mean`, `ess` (over tokens)
        and `clipped_frac`, the share of tokens, or of rows in the sequence modes, whose ratio was out of
        bounds.
    """
    scored = torch.isfinite(rollout_logprobs)
    gap = bounded(torch.where(scored, old_logprobs.detach().double() - rollout_logprobs.double(), 0.0))
    by_row = correction.mode.startswith("sequence")
    if by_row:
        counts = row_counts(row_of[scored], n_rows)
        gap = row_sums(gap, row_of, n_rows) / counts.clamp(min=1)
    ratio = clamped_exp(gap)
    out = ratio > correction.threshold
    if correction.floor is not None:
        out = out | (ratio < correction.floor)
    if correction.mode.endswith("truncate"):
        weight = ratio.clamp(correction.floor, correction.threshold)
    else:
        weight = torch.where(out, 0.0, ratio)
    spread = weight[row_of] if by_row else weight
    used = row_counts(row_of, n_rows) > 0
    stats = {
        "is_weight_mean": mean_of(spread),
        "ess": ess_of(spread),
        "clipped_frac": mean_of(out[used] if by_row else out),
    }
    metrics = MetricSums({PREFIX + name: stat for name, stat in stats.items()})
    return spread.to(old_logprobs.dtype), metrics


def off_policy_keep(
    logprobs: Tensor,
    sampled_logprobs: Tensor,
    advantages: Tensor,
    row_of: Tensor,
    n_rows: int,
    delta: float,
) -> tuple[Tensor, MetricSums]:
    """Which rows stay: not those with a negative advantage from which the policy has moved too far.

    A row is left out if its advantage is negative and the mean over its tokens of sampled - present log-prob
    is over `delta`. It still counts in the normaliser, which is fixed before the forward pass.

    Args:
        logprobs: float [N], of the policy now; any gradient is ignored.
        sampled_logprobs: float [N], of the policy that sampled: the engine's. Tokens without a finite value
            do not count.
        advantages: float [N].
        row_of: int64 [N].
        n_rows: rows in the micro-batch.
        delta: nats a token.

    Returns:
        bool [N], and `off_policy_masked`, the share of rows left out.
    """
    scored = torch.isfinite(sampled_logprobs)
    drift = bounded(torch.where(scored, sampled_logprobs.double() - logprobs.detach().double(), 0.0))
    mean_drift = row_sums(drift, row_of, n_rows) / row_counts(row_of[scored], n_rows).clamp(min=1)
    mean_advantage = row_sums(advantages, row_of, n_rows)  # its sign is what counts
    drop = (mean_drift > delta) & (mean_advantage < 0)
    used = row_counts(row_of, n_rows) > 0
    return ~drop[row_of], MetricSums({"off_policy_masked": mean_of(drop[used])})
