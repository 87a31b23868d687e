"""Estimators of KL(policy || other) from the log-probs of tokens that the policy sampled.

Source: J. Schulman, "Approximating KL Divergence" (2020). With r = other / policy and x ~ policy:
k1 = -log r (unbiased, noisy), k2 = (log r)^2 / 2 (biased, low variance), k3 = r - 1 - log r (unbiased, never
negative).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# ms-swift's bounds. A single token with a log-difference of 20 would otherwise weigh e^20 in the batch's
# mean.
MAX_LOG_DIFF = 20.0
MAX_K3 = 10.0


def k1(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """log pi - log other, per token."""
    return logprobs - other_logprobs


def k2(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """(log pi - log other)^2 / 2, per token; its gradient in expectation is that of the true KL.

    The difference is clamped to +-20 as in `k3`: its square shall fit float32.
    """
    return 0.5 * (logprobs - other_logprobs).clamp(-MAX_LOG_DIFF, MAX_LOG_DIFF) ** 2


def k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log other - log pi, per token.

    Clamped as ms-swift does: d to +-20 and the value to at most 10 (the lower bound -10 never binds, k3 is
    not negative). Where a clamp binds the gradient is zero, and the expectation is no longer exactly the KL.
    """
    diff = (other_logprobs - logprobs).clamp(-MAX_LOG_DIFF, MAX_LOG_DIFF)
    return (diff.exp() - diff - 1.0).clamp(max=MAX_K3)
