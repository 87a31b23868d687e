"""The covariance of a token's log-prob with its advantage, and an order of tokens by it.

Source: Cui et al. 2025, "The entropy mechanism of reinforcement learning for reasoning language models"
(arXiv 2505.22617): Cov(y) = (log pi(y) - mean log pi) (A(y) - mean A), the means over all tokens of the step.
Where it is large, learning makes the policy surer of itself.

Which tokens are chosen is an order statistic of the whole step, found as that of `entropy` is: ranks count,
the driver adds, and no token moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from raytune_rl.protocol.train import TokenOrder


def step_means(sums: ArrayLike, advantages: ArrayLike, lengths: ArrayLike) -> tuple[float, float]:
    """The means of log-prob and advantage over the tokens of a step.

    Args:
        sums: Log-probs summed over each row, float64 `[n]`.
        advantages: Of each row, float64 `[n]`.
        lengths: Trained tokens, int `[n]`; rows without any do not count.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    used, total = tokens > 0, max(float(tokens.sum()), 1.0)
    logprob = float(np.asarray(sums, dtype=np.float64)[used].sum()) / total
    return logprob, float(np.asarray(advantages, dtype=np.float64) @ tokens) / total


def token_keys(logprobs: ArrayLike, advantage: float, row: int, order: TokenOrder) -> NDArray[np.float32]:
    """A number for each token of a row; tokens come in the order of these, and infinite ones never.

    Without bounds the largest covariance comes first. Within bounds tokens come at random, by a hash of step,
    row and place, so whatever rank holds the row.

    Args:
        logprobs: float `[tokens]`.
        advantage: Of the row.
        row: Its number in the step.
        order: What is ordered, and how.
    """
    known = np.asarray(logprobs, dtype=np.float64)
    covariance = (known - order.mean_logprob) * (advantage - order.mean_advantage)
    if order.bounds is None:
        return (-covariance).astype(np.float32)
    low, high = order.bounds
    drawn = np.random.default_rng((order.seed, order.step, row)).random(len(known), dtype=np.float32)
    return np.where((covariance > low) & (covariance < high), drawn, np.float32(np.inf)).astype(np.float32)
