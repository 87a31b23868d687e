"""The run's models as a credit may ask them, each answer under its phase of the step's clock."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raytune_rl.groups.critic import CriticGroup
from raytune_rl.groups.trainer import PolicyGroup
from raytune_rl.protocol.rows import TrainBatch
from raytune_rl.protocol.train import Estimates, EstimateSettings
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
