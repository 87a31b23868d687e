"""How far the trainer's log-probs are from the rollout engine's on the very same tokens.

With equal weights both must agree up to arithmetic (1e-4 in fp32); a gap means a half-synced engine or a lost
layer, so these numbers are computed on every step. Names as in ms-swift (`rollout_correction/*`), signs as
there: delta = log pi_train - log pi_rollout, and the tokens were sampled by the rollout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import torch
from raytune_rl.algorithms.metrics import (
    MetricSums,
    Stat,
    max_of,
    mean_of,
    min_of,
    row_counts,
    row_sums,
    total_of,
)

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "rollout_correction/"
# exp(20) is beyond any ratio that means something; past it chi2 would only say "inf".
MAX_LOG = 20.0


def rollout_mismatch(
    train_logprobs: Tensor, rollout_logprobs: Tensor, row_of: Tensor, n_rows: int
) -> MetricSums:
    """Gap between trainer and rollout, as mergeable sums.

    Token means (E_t): `kl` = E[-delta] (k1 of KL(rollout || train)), `k3_kl` = E[e^delta - delta - 1],
    `chi2_token` = E[e^(2 delta)] - 1, `logp_abs_diff_mean` = E|delta|; `logp_abs_diff_max` is the largest
    |delta|. Row means (E_s, with the row's mean log-probs): `training_ppl`, `rollout_ppl` (perplexities),
    `training_log_ppl`, `rollout_log_ppl`, `log_ppl_diff` = E[log ppl_train - log ppl_rollout],
    `log_ppl_abs_diff`, `log_ppl_diff_max`, `log_ppl_diff_min`, `ppl_ratio` = E[ppl_train / ppl_rollout],
    `chi2_seq` = E[e^(2 mean_t delta)] - 1. Exponents are clamped to +-20. Tokens to which the engine gave no
    finite log-prob cannot be compared: they are left out and counted in `unscored_tokens`. A trainer log-prob
    that is not finite is a defect and stays visible.

    Args:
        train_logprobs: float [N], of the trainer under the sampling temperature, any gradient is ignored.
        rollout_logprobs: float [N], of the engine, as sampled.
        row_of: int64 [N].
        n_rows: rows in the micro-batch.
    """
    scored = torch.isfinite(rollout_logprobs)
    train = train_logprobs.detach().double()[scored]
    rollout = rollout_logprobs.detach().double()[scored]
    rows = row_of[scored]
    delta = train - rollout
    safe = delta.clamp(-MAX_LOG, MAX_LOG)

    counts = row_counts(rows, n_rows)
    used = counts > 0
    train_row = row_sums(train, rows, n_rows)[used] / counts[used]
    rollout_row = row_sums(rollout, rows, n_rows)[used] / counts[used]
    log_ppl_diff = rollout_row - train_row

    stats: dict[str, Stat] = {
        "kl": mean_of(-delta),
        "k3_kl": mean_of(safe.exp() - safe - 1),
        "chi2_token": mean_of((2 * safe).exp() - 1),
        "logp_abs_diff_mean": mean_of(delta.abs()),
        "logp_abs_diff_max": max_of(delta.abs()),
        "training_ppl": mean_of((-train_row).clamp(max=MAX_LOG).exp()),
        "rollout_ppl": mean_of((-rollout_row).clamp(max=MAX_LOG).exp()),
        "training_log_ppl": mean_of(-train_row),
        "rollout_log_ppl": mean_of(-rollout_row),
        "log_ppl_diff": mean_of(log_ppl_diff),
        "log_ppl_abs_diff": mean_of(log_ppl_diff.abs()),
        "log_ppl_diff_max": max_of(log_ppl_diff),
        "log_ppl_diff_min": min_of(log_ppl_diff),
        "ppl_ratio": mean_of(log_ppl_diff.clamp(-MAX_LOG, MAX_LOG).exp()),
        "chi2_seq": mean_of((-2 * log_ppl_diff.clamp(-MAX_LOG, MAX_LOG)).exp() - 1),
        "unscored_tokens": total_of(~scored),
    }
    return MetricSums({PREFIX + name: stat for name, stat in stats.items()})
