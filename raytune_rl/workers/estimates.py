"""PPO's advantages and returns, from columns that lie in the object store: rows need no model for them.

A worker does this for its share of the rows. Whitening wants the mean and spread of the whole step, so it
comes in two calls, between which the driver merges three numbers a worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raytune_rl.data.read_rows import ReadRows
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.train import EstimateFacts, EstimateSettings

if TYPE_CHECKING:
    from torch import Tensor

    from raytune_rl.algorithms.moments import Moments


def reward_moments(rows: ReadRows, scores: NDArray[np.float64], settings: EstimateSettings) -> Moments:
    """Moments of the rewards of all tokens whose rows have a score.

    Args:
        rows: With the extra columns "old_logprobs" and, if `kl_coef` is over 0, "ref_logprobs".
        scores: float64 `[n]`, of whole completions; NaN where there is none.
        settings: Of the estimate.
    """
    from raytune_rl.algorithms.moments import Moments

    share = _Share(rows, scores, settings)
    return Moments.of(share.rewards[share.scored])


def estimate(
    rows: ReadRows,
    scores: NDArray[np.float64],
    settings: EstimateSettings,
    rewards: Moments | None = None,
) -> tuple[EstimateFacts, Columns]:
    """Advantages, not whitened, and returns.

    Args:
        rows: As in `reward_moments`, and with the extra column "values".
        scores, settings: As there.
        rewards: Of the whole step, if rewards are to be whitened.

    Returns:
        The facts, and {"advantages", "returns"} as Ragged float32 in the order of the rows. Rows without a
        score teach nothing: their advantages are 0 and their returns the values as they are.
    """
    from raytune_rl.algorithms.gae import gae
    from raytune_rl.algorithms.metrics import MetricSums, mean_of, row_sums
    from raytune_rl.algorithms.moments import Moments, whiten

    share = _Share(rows, scores, settings)
    values, scored = share.column("values"), share.scored
    given = share.rewards if rewards is None else whiten(share.rewards, rewards, shift_mean=False)
    estimates = gae(given, values, share.row_of, share.n, gamma=settings.gamma, lam=settings.lam)
    whole = share.row_scored
    kl = row_sums(share.log_ratio, share.row_of, share.n)[whole]
    surprise = row_sums(-share.old, share.row_of, share.n)[whole]
    known = share.scores[whole]
    metrics = MetricSums(
        {
            "kl": mean_of(share.log_ratio[scored]),
            "objective/kl": mean_of(kl),
            "objective/entropy": mean_of(surprise),
            "objective/non_score_reward": mean_of(-settings.kl_coef * kl),
            "objective/rlhf_reward": mean_of(known - settings.kl_coef * kl),
            "objective/scores": mean_of(known),
        }
    )
    facts = EstimateFacts(
        Moments.of(estimates.advantages[scored]),
        Moments.of(estimates.returns[scored]),
        Moments.of((estimates.returns - values)[scored]),
        metrics.host(),
    )
    return facts, {
        "advantages": share.ragged(estimates.advantages.where(scored, 0.0)),
        "returns": share.ragged(estimates.returns.where(scored, values)),
    }


def whitened(
    rows: ReadRows, scores: NDArray[np.float64], advantages: Moments
) -> tuple[NDArray[np.float64], Columns]:
    """Advantages with mean 0 and spread 1 over the whole step.

    Args:
        rows: With the extra column "advantages".
        scores: As in `reward_moments`.
        advantages: Of the whole step.

    Returns:
        Mean of each row's, float64 `[n]`, and {"advantages"} as Ragged float32; 0 in rows without a score.
    """
    from raytune_rl.algorithms.moments import whiten
    from raytune_rl.algorithms.rows import mean_rows

    share = _Share(rows, scores)
    column = whiten(share.column("advantages"), advantages).where(share.scored, 0.0)
    means = mean_rows(column, share.row_of, share.n).numpy()
    return means, {"advantages": share.ragged(column)}


class _Share:
    """Rows as flat float64 tensors over their tokens."""

    def __init__(
        self, rows: ReadRows, scores: NDArray[np.float64], settings: EstimateSettings | None = None
    ) -> None:
        import torch

        from raytune_rl.algorithms.gae import token_rewards

        self._rows, self.n = rows, len(scores)
        name = "advantages" if settings is None else "old_logprobs"
        self._lengths = [len(rows.extra(name, row)) for row in range(self.n)]
        self.row_of = torch.repeat_interleave(
            torch.arange(self.n), torch.tensor(self._lengths, dtype=torch.long)
        )
        self.row_scored = torch.from_numpy(np.isfinite(scores))
        self.scored = self.row_scored[self.row_of]
        if settings is None:
            return
        self.scores = torch.from_numpy(scores)
        self.old = self.column("old_logprobs")
        ref = self.column("ref_logprobs") if settings.kl_coef else self.old
        self.log_ratio = self.old - ref
        known = torch.where(self.row_scored, self.scores, 0.0)
        self.rewards = token_rewards(known, self.old, ref, self.row_of, self.n, kl_coef=settings.kl_coef)

    def column(self, name: str) -> Tensor:
        import torch

        rows = [self._rows.extra(name, row) for row in range(self.n)]
        return torch.from_numpy(np.concatenate([*rows, np.empty(0, np.float32)]).astype(np.float64))

    def ragged(self, flat: Tensor) -> Ragged:
        values = flat.numpy().astype(np.float32)
        return Ragged(values, np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64))
