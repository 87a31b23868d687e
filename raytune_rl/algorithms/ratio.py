"""The importance ratio between the policy and the one that sampled, per token or per row.

Source: token level, Shao et al. 2024 (DeepSeekMath), eq. 3; sequence level, Zheng et al. 2025 (GSPO), eq. 7,
and GSPO-token of the same paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from raytune_rl.algorithms.rows import bounded, clamped_exp, mean_rows

if TYPE_CHECKING:
    from torch import Tensor

Level = Literal["token", "sequence", "sequence_token"]
LEVELS: tuple[Level, ...] = ("token", "sequence", "sequence_token")


def importance_ratio(
    logprobs: Tensor, old_logprobs: Tensor | None, row_of: Tensor, n_rows: int, level: Level = "token"
) -> Tensor:
    """pi / pi_old of every token, with gradient, float [N].

    * token: rho_t = exp(logprobs - old_logprobs).
    * sequence: s = exp(mean over the row of the log ratios), the same for all tokens of a row; the gradient
      reaches every token, each with 1 / length of the row's.
    * sequence_token: the value of s, and the gradient of s * rho_t: s where the policy moves, token by token.
      With equal advantages within a row its gradient is that of "sequence".

    Logarithms are clamped to +-20 (the mean, where there is one), so an extreme ratio is large but finite
    and, beyond the clamp, without gradient. A NaN log-prob is a defect and stays NaN.

    Args:
        logprobs: float [N] with gradient.
        old_logprobs: float [N], or None for on-policy: the ratio is 1 and its gradient that of logprobs.
        row_of: int64 [N].
        n_rows: rows in the micro-batch.
        level: see above.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    delta = logprobs - old
    if level == "token":
        return clamped_exp(delta)
    per_row = clamped_exp(mean_rows(bounded(delta), row_of, n_rows))
    spread = per_row[row_of].to(logprobs.dtype)
    if level == "sequence":
        return spread
    return spread.detach() * (logprobs - logprobs.detach()).exp()
