"""The run's models as a credit or a loss may ask them, each answer under its phase of the step's clock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raytune_rl.groups.critic import CriticGroup
from raytune_rl.groups.trainer import PolicyGroup
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import Estimates, EstimateSettings, RowLogprobs, TokenOrder
from raytune_rl.tracking.timer import StepTimer


class RunModels:
    """See `algorithms.credit.base.Models`.

    Args:
        policy: The policy.
        critic: The critic, if some credit needs one.
        timer: The step's clock.
    """

    def __init__(self, policy: PolicyGroup, critic: CriticGroup | None, timer: StepTimer) -> None:
        self._policy, self._critic, self._timer = policy, critic, timer

    def row_kl(self, batch: TrainBatch, estimator: str) -> NDArray[np.float64]:
        """KL to the reference of each row; the policy is asked for its log-probs where the batch has none."""
        with self._timer.phase("train"):
            if "old_logprobs" not in batch.columns:
                batch = batch.with_columns(old_logprobs=self._policy.logprobs(batch).columns)
            return self._policy.row_kl(batch, estimator)

    def token_baseline(
        self, batch: TrainBatch, rewards: NDArray[np.float64], groups: Sequence[int]
    ) -> tuple[list[RowPointer], NDArray[np.float64]]:
        """Advantages against the optimal token baseline."""
        with self._timer.phase("train"):
            return self._policy.token_baseline(batch, rewards, groups)

    def estimate(
        self,
        batch: TrainBatch,
        scores: NDArray[np.float64],
        settings: EstimateSettings,
        *,
        whiten_rewards: bool,
    ) -> Estimates:
        """The critic's advantages and returns."""
        assert self._critic is not None, "a credit that asks a critic says so in `needs`"
        with self._timer.phase("critic"):
            return self._critic.estimate(batch, scores, settings, whiten_rewards=whiten_rewards)


class RunStep:
    """See `algorithms.before_step.StepModels`: one optimizer step.

    Args:
        policy: The policy, under the weights that the step starts from.
        rows: The step's rows, with what shows their media.
        old: Where each row's log-probs under the policy that sampled lie; None on the first step after it.
        advantages: Of each row, float64 `[n]`.
        lengths: Trained tokens of each row, int `[n]`.
    """

    def __init__(
        self,
        policy: PolicyGroup,
        rows: TrainBatch,
        old: Sequence[RowPointer] | None,
        advantages: NDArray[np.float64],
        lengths: NDArray[np.int64],
    ) -> None:
        self._policy, self._rows, self._old = policy, rows, old
        self._advantages, self._lengths = advantages, lengths
        self._scored: RowLogprobs | None = None

    def _now(self) -> RowLogprobs:
        if self._scored is None:
            self._scored = self._policy.logprobs(self._rows)
        return self._scored

    def log_ratios(self) -> NDArray[np.float64]:
        """log pi - log pi_old, summed over each row: k1 of the one to the other."""
        if self._old is None:
            return np.zeros(len(self._rows))
        columns = {"old_logprobs": self._now().columns, "ref_logprobs": self._old}
        return self._policy.row_kl(self._rows.with_columns(**columns), "k1")

    def logprobs(self) -> NDArray[np.float64]:
        """log pi, summed over each row."""
        return self._now().sums

    def first_tokens(self, order: TokenOrder, count: int) -> list[RowPointer]:
        """Which tokens are the first in an order."""
        marked = self._rows.with_columns(start_logprobs=self._now().columns).with_scalars(
            advantage=self._advantages, counted=self._lengths > 0
        )
        return self._policy.first_tokens(marked, order, count)
