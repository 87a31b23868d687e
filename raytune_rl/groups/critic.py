"""The critic as the pipelines see it: a world that learns to predict returns, and what it makes of a
generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raytune_rl.algorithms.metrics import merge_all
from raytune_rl.algorithms.moments import Moments, merge_moments
from raytune_rl.data.media_table import ROW_COLUMN
from raytune_rl.groups.world import Share, TrainerWorld
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import EstimateFacts, Estimates, EstimateSettings


class CriticGroup:
    """The critic's ranks.

    Args:
        world: Them as one.
    """

    def __init__(self, world: TrainerWorld) -> None:
        self.world = world

    def values(self, batch: TrainBatch) -> list[RowPointer]:
        """The value of every token under the present weights: where each row's {"values"} lies."""
        rows_batch = batch.keep({ROW_COLUMN}).without_scalars()
        return self.world.columns("values", self.world.shares(rows_batch))[0]

    def estimate(
        self, batch: TrainBatch, scores: ArrayLike, settings: EstimateSettings, *, whiten_rewards: bool
    ) -> Estimates:
        """Advantages and returns; the token arrays stay with the workers.

        Args:
            batch: Rows with the columns "old_logprobs" and, if KL has a price, "ref_logprobs"; and the rows'
                media.
            scores: float64 `[n]`, of whole completions; NaN where there is none.
            settings: Constants.
            whiten_rewards: Whether the tokens' rewards are brought to a spread of 1.
        """
        world = self.world
        values = self.values(batch)
        scored = batch.with_columns(values=values).with_scalars(score=scores)
        shares = world.shares(scored)
        rewards: Moments | None = None
        if whiten_rewards:
            rewards = merge_moments(world.ask("reward_moments", shares, settings))
        raw, answers = world.columns("estimate", shares, settings, rewards)
        facts: list[EstimateFacts] = answers
        moments = merge_moments(fact.advantages for fact in facts)
        whole = world.shares(scored.keep(()).with_columns(advantages=raw))
        white, parts = world.columns("whiten", whole, moments)
        returns, errors = (merge_moments(getattr(f, n) for f in facts) for n in ("returns", "errors"))
        explained = 1 - (errors.std / returns.std) ** 2 if returns.std > 0 else 0.0
        metrics = {
            **merge_all(fact.metrics for fact in facts).result(),
            "critic/explained_variance": explained,
            "critic/returns": returns.mean,
        }
        columns = {"advantages": white, "returns": raw, "old_values": values}
        return Estimates(columns, _by_row(whole, parts, len(batch)), metrics)


def _by_row(shares: Sequence[Share], answers: Sequence[Any], count: int) -> Any:
    """One number a row, from the answers of all ranks; float64 `[count]`."""
    numbers = np.empty(count)
    for share, answer in zip(shares, answers, strict=True):
        numbers[share.rows] = answer
    return numbers
