"""A DeepSpeed world as one object: N ranks that train one model, whatever it learns.

Policy, critic and reward-model trainer are such worlds; what each can do beside training lies in objects that
hold one (`groups.trainer.PolicyGroup`, `groups.critic.CriticGroup`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.metrics import MetricSums, merge_all
from raytune_rl.algorithms.registry import get_loss
from raytune_rl.data.microbatch import Schedule
from raytune_rl.data.prefix_plan import Budget, plan_step
from raytune_rl.protocol.model import Settled
from raytune_rl.protocol.rows import RowBatch, RowPointer, TrainBatch
from raytune_rl.protocol.train import StepReport, TrainerFacts, TrainerSpec, TrainResult
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import Pending, acknowledge, fetch, fetch_all

TOKENS_SAVED = "prefix_sharing/tokens_saved"
"""Name of the metric: tokens of a step's rows that were not computed, as other rows begin with them too."""


class StepInFlight(Protocol):
    """An optimizer step that was begun."""

    def finish(self) -> StepReport:
        """Waits for it."""
        ...


class Trainable(Protocol):
    """A model that learns, step by step, and can be kept."""

    def start_step(self, batch: TrainBatch, step: int) -> StepInFlight:
        """Begins optimizer step `step` (from 0) on a batch."""
        ...

    def offload(self, weights: bool, optimizer: bool) -> None:
        """Moves weights and optimizer state to the CPU."""
        ...

    def reload(self) -> None:
        """Brings them back."""
        ...

    def save(self, directory: Path, only_model: bool) -> None:
        """Writes the model, and the optimizer's state unless only the model is wanted."""
        ...

    def load(self, directory: Path) -> None:
        """Restores weights and optimizer state of a checkpoint."""
        ...


@dataclass(frozen=True)
class Share:
    """One rank's share of a batch.

    Attributes:
        batch: Its rows, numbered anew, in micro-batches.
        rows: Their numbers in the whole batch.
    """

    batch: RowBatch
    rows: list[int]


@dataclass(frozen=True)
class _Running:
    calls: Sequence[Pending]
    planned: Mapping[str, float]

    def finish(self) -> StepReport:
        results: list[TrainResult] = fetch_all(list(self.calls))
        metrics = merge_all(r.metrics for r in results).result()
        metrics |= {
            **self.planned,
            "grad_norm": results[0].grad_norm,
            "learning_rate": results[0].learning_rate,
        }
        return StepReport(metrics, sum(r.tokens for r in results), max(r.memory_gib for r in results))


class TrainerWorld:
    """N ranks that act as one.

    Args:
        group: The started workers.
        spec: What they were given.
        max_tokens: Token budget of a micro-batch.
        start_timeout_s: Deadline for joining and loading.
    """

    def __init__(
        self, group: WorkerGroup, spec: TrainerSpec, max_tokens: int, start_timeout_s: float
    ) -> None:
        self.group, self.spec, self.max_tokens = group, spec, max_tokens
        self.settled = Settled(spec.model.layout)
        self._together = 2 if get_loss(spec.loss).rows == "pairs" else 1
        host, port = fetch(group.submit(0, "open_store", start_timeout_s, timeout_s=start_timeout_s))
        self._joining = [
            group.submit(
                rank,
                "join",
                host,
                port,
                start_timeout_s,
                what="joining and loading the model",
                timeout_s=start_timeout_s,
            )
            for rank in range(len(group))
        ]

    def ready(self) -> TrainerFacts:
        """Waits until every rank has loaded; returns what rank 0 tells."""
        facts: TrainerFacts = fetch_all(self._joining)[0]
        self.settled = Settled(facts.layout, sharing=facts.sharing)
        return facts

    def __len__(self) -> int:
        """Number of ranks."""
        return len(self.group)

    def start_step(self, batch: TrainBatch, step: int) -> StepInFlight:
        """Begins an optimizer step.

        Args:
            batch: Its rows; the scalars "weight" and "row_weight" carry the global normaliser.
            step: Number of the step, from 0.
        """
        schedule = self._plan(batch)
        shares = [rank_share(schedule, rank, batch) for rank in range(len(self))]
        calls = [
            self.group.submit(rank, "train_step", share.batch, step, what=f"training step {step + 1}")
            for rank, share in enumerate(shares)
        ]
        known = batch.prefixes is not None and self.settled.sharing != "false"
        return _Running(calls, {TOKENS_SAVED: float(schedule.saved_tokens)} if known else {})

    def train(self, batch: TrainBatch, step: int) -> StepReport:
        """One optimizer step; arguments as in `start_step`."""
        return self.start_step(batch, step).finish()

    def evaluate(self, batch: TrainBatch) -> MetricSums:
        """The loss on rows without training on them."""
        shares = [share.batch for share in self.shares(batch)]
        return merge_all(self.group.map("evaluate", shares, what="evaluating"))

    def shares(self, batch: TrainBatch, lengths: NDArray[np.int64] | None = None) -> list[Share]:
        """A batch cut into micro-batches for every rank.

        Args:
            batch: The rows.
            lengths: What the work is balanced by, int `[n]`; None: tokens.
        """
        schedule = self._plan(batch, lengths)
        return [rank_share(schedule, rank, batch) for rank in range(len(self.group))]

    def _plan(self, batch: TrainBatch, lengths: NDArray[np.int64] | None = None) -> Schedule:
        """The micro-batches of every rank; arguments as in `shares`."""
        budget = Budget.of(self.settled, len(self.group), self.max_tokens, self._together)
        if lengths is not None:
            return plan_step(lengths, None, budget)
        return plan_step(batch.lengths, batch.prefixes, budget)

    def ask(self, method: str, shares: Sequence[Share], *args: Any, what: str | None = None) -> list[Any]:
        """Asks every rank about its share; the answers in the order of ranks."""
        return fetch_all(
            [
                self.group.submit(rank, method, share.batch, *args, what=what)
                for rank, share in enumerate(shares)
            ]
        )

    def columns(self, method: str, shares: Sequence[Share], *args: Any) -> tuple[list[RowPointer], list[Any]]:
        """Asks every rank for a column that stays where it is, and something to be told.

        Returns:
            Where each row's column lies, and the answers in the order of ranks.
        """
        pending = [self.group.submit(r, method, s.batch, *args, returns=2) for r, s in enumerate(shares)]
        answers = acknowledge(pending)
        pointers: dict[int, RowPointer] = {}
        for call, share in zip(pending, shares, strict=True):
            pointers |= {row: RowPointer(call.ref[1], number) for number, row in enumerate(share.rows)}
        return [pointers[row] for row in range(len(pointers))], answers

    def offload(self, weights: bool, optimizer: bool) -> None:
        """Moves the ranks' weights and optimizer state to the CPU."""
        self.group.call("offload", weights, optimizer, what="offloading")

    def reload(self) -> None:
        """Brings them back."""
        self.group.call("reload", what="reloading")

    def save(self, directory: Path, only_model: bool) -> None:
        """Writes the model, and the optimizer's state unless only the model is wanted."""
        self.group.call("save_model", str(directory), what="saving the model")
        if not only_model:
            self.group.call("save_optimizer", str(directory / "optimizer"), what="saving the optimizer")

    def load(self, directory: Path) -> None:
        """Restores weights and optimizer state of a checkpoint."""
        self.group.call("load_checkpoint", str(directory / "optimizer"), what="restoring the checkpoint")


def rank_share(schedule: Schedule, rank: int, batch: TrainBatch) -> Share:
    """The rows of one rank."""
    own_rows = [row for micro in schedule.ranks[rank] for row in micro]
    local = {row: number for number, row in enumerate(own_rows)}
    micro_batches = [tuple(local[row] for row in micro) for micro in schedule.ranks[rank]]
    return Share(batch.part(own_rows).message(micro_batches, shares=schedule.shares), own_rows)
