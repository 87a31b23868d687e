"""PPO's own mathematics: rewards per token, generalised advantage estimation, the critic's loss.

Source: Schulman et al. 2017 (PPO); Schulman et al. 2016 (GAE), eq. 16; the KL in the reward, Ziegler
et al. 2019; value clipping as in the paper's implementation and TRL's. The policy's loss is "grpo"
with beta 0 and these advantages, one a token; rows are weighted as in dapo: PPO takes the mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_rl.algorithms.lazy import np, torch
from raytune_rl.algorithms.metrics import row_counts
from raytune_rl.algorithms.rows import discounted_to_go

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """Advantages and returns by the critic's estimates, float64 [N] without gradient.

    Attributes:
        advantages: not whitened (`moments.whiten`, over the whole step).
        returns: advantages plus values: what the critic is to predict.
    """

    advantages: Tensor
    returns: Tensor


def token_rewards(
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    row_of: Tensor,
    n_rows: int,
    *,
    kl_coef: float = 0.05,
) -> Tensor:
    """-kl_coef * (log pi_old - log pi_ref) at each token, plus the score at the row's last; float64 [N].

    Args:
        scores: float [n_rows], the reward of the whole completion. That of a row without tokens has no place.
        old_logprobs, ref_logprobs: float [N].
        row_of: int64 [N].
        n_rows: rows.
        kl_coef: price of a nat.
    """
    rewards = -kl_coef * (old_logprobs.detach().double() - ref_logprobs.double())
    counts = row_counts(row_of, n_rows)
    used = counts > 0
    last = counts.cumsum(0)[used] - 1
    return rewards.index_add(0, last, scores.detach().double()[used])


def missing_eos(
    scores: NDArray[np.float64], finished: NDArray[np.bool_], penalty: float | None
) -> NDArray[np.float64]:
    """Scores less a penalty for completions that never came to an end; float64 [n_rows], NaN stays NaN."""
    return scores if penalty is None else np.where(finished, scores, scores - penalty)


def gae(
    rewards: Tensor, values: Tensor, row_of: Tensor, n_rows: int, *, gamma: float = 1.0, lam: float = 0.95
) -> Estimate:
    """Generalised advantage estimation within each row; the value after the last token is 0.

    A_t = sum_l (gamma * lam)^l delta_(t + l) with delta_t = r_t + gamma * V_(t + 1) - V_t.

    Args:
        rewards: float [N] (`token_rewards`).
        values: float [N], the critic's before the step.
        row_of: int64 [N].
        n_rows: rows.
        gamma: discount of rewards.
        lam: 1: Monte Carlo, unbiased; 0: one step, least variance.
    """
    reward, value = rewards.detach().double(), values.detach().double()
    following = torch.cat([value[1:], value.new_zeros(1)])[: len(value)]
    ends = torch.ones_like(row_of, dtype=torch.bool)
    ends[:-1] = row_of[1:] != row_of[:-1]
    delta = reward + gamma * torch.where(ends, 0.0, following) - value
    advantages = discounted_to_go(delta, row_of, n_rows, gamma * lam)
    return Estimate(advantages, advantages + value)
