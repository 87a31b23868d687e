"""Policy and critic as one trainer: they learn from the same rows side by side and are saved together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raytune_rl.algorithms.metrics import merge_all
from raytune_rl.algorithms.moments import Moments, merge_moments
from raytune_rl.data.media_table import ROW_COLUMN
from raytune_rl.groups.trainer import PolicyGroup, rank_batch
from raytune_rl.protocol.rows import RowBatch, RowPointer
from raytune_rl.protocol.train import (
    EstimateFacts,
    Estimates,
    EstimateSettings,
    PolicyFacts,
    PolicySpec,
    StepReport,
)
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import Pending, acknowledge, fetch_all

CRITIC = "critic"
"""Folder of the critic in a checkpoint; Transformers loads it as a sequence classifier of one label."""
CRITICS_COLUMNS = ("old_values", "returns")


class Critic(PolicyGroup):
    """The ranks that learn to predict returns."""

    def __init__(self, group: WorkerGroup, spec: PolicySpec, max_tokens: int, start_timeout_s: float) -> None:
        super().__init__(group, spec, max_tokens, start_timeout_s)

    def values(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        late: Mapping[str, Sequence[RowPointer]] | None = None,
    ) -> list[RowPointer]:
        """The value of every token under the present weights: where each row's {"values"} lies; `late` has
        the rows' media, if there are any."""
        return self._columns("values", self._shares(rows, lengths, {}, late or {}), len(rows))[0]

    def estimate(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        scores: ArrayLike,
        late: Mapping[str, Sequence[RowPointer]],
        settings: EstimateSettings,
        *,
        whiten_rewards: bool,
    ) -> Estimates:
        """Advantages and returns; the token arrays stay with the workers.

        Args:
            rows: Where each row lies.
            lengths: Tokens of each.
            scores: float64 `[n]`, of whole completions; NaN where there is none.
            late: "old_logprobs" and, if KL has a price, "ref_logprobs"; and the rows' media.
            settings: Constants.
            whiten_rewards: Whether the tokens' rewards are brought to a spread of 1.
        """
        known = {"score": np.asarray(scores, dtype=np.float64)}
        media = {name: late[name] for name in (ROW_COLUMN,) if name in late}
        held = {**late, "values": self.values(rows, lengths, media)}
        shares = self._shares(rows, lengths, known, held)
        rewards: Moments | None = None
        if whiten_rewards:
            rewards = merge_moments(self._ask("reward_moments", shares, settings))
        raw, told = self._columns("estimate", shares, len(rows), settings, rewards)
        facts: list[EstimateFacts] = told
        moments = merge_moments(fact.advantages for fact in facts)
        whole = self._shares(rows, lengths, known, {"advantages": raw})
        white, parts = self._columns("whiten", whole, len(rows), moments)
        means = np.empty(len(rows))
        for (_, mine), part in zip(whole, parts, strict=True):
            means[mine] = part
        returns, errors = (merge_moments(getattr(f, n) for f in facts) for n in ("returns", "errors"))
        explained = 1 - (errors.std / returns.std) ** 2 if returns.std > 0 else 0.0
        metrics = {
            **merge_all(fact.metrics for fact in facts).result(),
            "critic/explained_variance": explained,
            "critic/returns": returns.mean,
        }
        columns = {"advantages": white, "returns": raw, "old_values": held["values"]}
        return Estimates({name: list(column) for name, column in columns.items()}, means, metrics)

    def _shares(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        scalars: Mapping[str, ArrayLike],
        late: Mapping[str, Sequence[RowPointer]],
    ) -> list[tuple[RowBatch, list[int]]]:
        schedule = self._schedule(lengths)
        return [rank_batch(schedule, rank, rows, scalars, late) for rank in range(self.world_size)]

    def _ask(self, method: str, shares: Sequence[tuple[RowBatch, list[int]]], *args: Any) -> list[Any]:
        return fetch_all([self._group.submit(r, method, b, *args) for r, (b, _) in enumerate(shares)])

    def _columns(
        self, method: str, shares: Sequence[tuple[RowBatch, list[int]]], count: int, *args: Any
    ) -> tuple[list[RowPointer], list[Any]]:
        """Asks every rank for something to be told and a column that stays where it is."""
        pending = [self._group.submit(r, method, b, *args, returns=2) for r, (b, _) in enumerate(shares)]
        told = acknowledge(pending)
        found: dict[int, RowPointer] = {}
        for asked, (_, mine) in zip(pending, shares, strict=True):
            found |= {row: RowPointer(asked.ref[1], number) for number, row in enumerate(mine)}
        return [found[row] for row in range(count)], told


class ActorCritic(PolicyGroup):
    """A policy group that has a critic.

    Args:
        group, spec, max_tokens, start_timeout_s: Of the policy.
        critic: The critic.
        vf_coef: Weight of its loss.
    """

    def __init__(
        self,
        group: WorkerGroup,
        spec: PolicySpec,
        max_tokens: int,
        start_timeout_s: float,
        critic: Critic,
        vf_coef: float,
    ) -> None:
        super().__init__(group, spec, max_tokens, start_timeout_s)
        self.critic = critic
        self._vf_coef = vf_coef

    def ready(self) -> PolicyFacts:
        """Waits until every rank of both has loaded; returns what the policy's rank 0 tells."""
        facts = super().ready()
        notices = tuple(f"critic: {notice}" for notice in self.critic.ready().notices)
        return PolicyFacts(facts.trainable, facts.total, facts.dtype, facts.layout, facts.notices + notices)

    def train(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        scalars: Mapping[str, ArrayLike],
        late: Mapping[str, Sequence[RowPointer]],
        step: int,
    ) -> StepReport:
        """One optimizer step of both, side by side."""
        theirs = {name: late[name] for name in (*CRITICS_COLUMNS, ROW_COLUMN) if name in late}
        ours = {name: column for name, column in late.items() if name not in CRITICS_COLUMNS}
        weight = {"weight": np.asarray(scalars["weight"]) * self._vf_coef}
        running: list[Pending] = self.critic.start_step(rows, lengths, weight, theirs, step)
        policy = super().train(rows, lengths, scalars, ours, step)
        critic = self.critic.finish_step(running)
        names = {"loss": "loss/value_avg", "grad_norm": "critic/grad_norm", "value": "critic/value",
                 "learning_rate": "critic/learning_rate"}  # fmt: skip
        metrics = {names.get(name, name): value for name, value in critic.metrics.items()}
        metrics["loss/value_avg"] /= self._vf_coef
        return StepReport(
            {**metrics, **policy.metrics, "loss/policy_avg": policy.metrics["loss"]},
            policy.tokens + critic.tokens,
            max(policy.memory_gib, critic.memory_gib),
        )

    def offload(self, weights: bool, optimizer: bool) -> None:
        """Moves weights and optimizer states of both to the CPU."""
        super().offload(weights, optimizer)
        self.critic.offload(weights, optimizer)

    def reload(self) -> None:
        """Brings them back."""
        super().reload()
        self.critic.reload()

    def save(self, directory: Path, only_model: bool) -> None:
        """Writes both."""
        super().save(directory, only_model)
        self.critic.save(directory / CRITIC, only_model)

    def load(self, directory: Path) -> None:
        """Restores both."""
        super().load(directory)
        self.critic.load(directory / CRITIC)
