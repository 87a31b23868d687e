"""A DeepSpeed world as one object: N ranks that train one model, whatever it learns.

Policy, critic and reward-model trainer are such worlds; what each can do beside training lies in objects that
hold one (`groups.trainer.PolicyGroup`, `groups.critic.CriticGroup`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.metrics import MetricSums, merge_all
from raytune_rl.algorithms.registry import get_loss
from raytune_rl.data.microbatch import Schedule
from raytune_rl.data.prefix_plan import Budget, plan_step
from raytune_rl.groups.keeper import LOSSES, Keeper
from raytune_rl.groups.restarts import RecoveryRules
from raytune_rl.protocol.model import Settled
from raytune_rl.protocol.rows import RowBatch, RowPointer, TrainBatch
from raytune_rl.protocol.train import StepReport, TrainerFacts, TrainerSpec, TrainResult
from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import Pending, fetch_all, settle

T = TypeVar("T")

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

    def snapshot_steps(self) -> int | None:
        """Steps from the start, or the checkpoint it was restored from, to its newest snapshot; None: it has
        none."""
        ...

    def write_snapshot(self, directory: Path, steps: int) -> None:
        """Writes that snapshot as a checkpoint's optimizer state, whatever became of who trains it."""
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
    finished: Callable[[], list[TrainResult]]
    planned: Mapping[str, float]

    def finish(self) -> StepReport:
        results = self.finished()
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
        rules: How the loss of a rank is treated; None: it ends the run.

    Attributes:
        weight_index: By rank, the buckets that it publishes; empty where nobody pulls them.
    """

    def __init__(
        self,
        group: WorkerGroup,
        spec: TrainerSpec,
        max_tokens: int,
        start_timeout_s: float,
        rules: RecoveryRules | None = None,
    ) -> None:
        self.group, self.spec, self.max_tokens = group, spec, max_tokens
        self.settled = Settled(spec.model.layout)
        self._together = 2 if get_loss(spec.loss).rows == "pairs" else 1
        self.weight_index: list[tuple[tuple[TensorEntry, ...], ...]] = []
        self._start_timeout_s = start_timeout_s
        self.keeper: Keeper | None = None
        if rules is not None:
            self.keeper = Keeper(group, rules, self._join, self._step, start_timeout_s)
        # Begun at once, to load while others start; a loss that shows itself here is seen to in `ready`.
        self._joining: list[list[Pending]] = []
        self._facts: TrainerFacts | None = None
        with suppress(*LOSSES if rules is not None else ()):
            self._joining.append(self._begin_joining())

    def _begin_joining(self) -> list[Pending]:
        limit_s = self._start_timeout_s
        host, port = fetch_all([self.group.submit(0, "open_store", limit_s, timeout_s=limit_s)])[0]
        what = "joining and loading the model"
        return [
            self.group.submit(rank, "join", host, port, limit_s, what=what, timeout_s=limit_s)
            for rank in range(len(self.group))
        ]

    def _join(self) -> TrainerFacts:
        self._joining.append(self._begin_joining())
        return self._joined()

    def _joined(self) -> TrainerFacts:
        facts: list[TrainerFacts] = fetch_all(self._joining[-1])
        if self.spec.publish_mode is not None:  # each rank plans here what it will publish
            self.weight_index = self.group.call("weight_index", what="planning the publications")
        return facts[0]

    def ready(self) -> TrainerFacts:
        """Waits until every rank has loaded; returns what rank 0 tells."""
        if self._facts is None:
            self._facts = self.run("starting", lambda: self._joined() if self._joining else self._join())
            self.settled = Settled(self._facts.layout, sharing=self._facts.sharing)
        return self._facts

    def run(self, what: str, work: Callable[[], T]) -> T:
        """Does work of the ranks. Where a rank is lost meanwhile, all become what they were, and it is done
        again."""
        return work() if self.keeper is None else self.keeper.run(what, work)

    def keep(self) -> None:
        """Takes a snapshot of the present state where one is due. Returns at once: the ranks do it when they
        have nothing else to do."""
        if self.keeper is not None:
            self.keeper.snapshots.begin_if_due()

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
        begun = [self._begin_step(batch, schedule, step)]
        began = time.monotonic()

        def once() -> list[TrainResult]:
            return self._counted(begun.pop() if begun else self._begin_step(batch, schedule, step))

        def finished() -> list[TrainResult]:
            results = self.run(f"training step {step + 1}", once)
            if self.keeper is not None:
                self.keeper.stepped(batch, step, began)
                if self.spec.publish_mode is None:  # else there is time for it after the publication
                    self.keep()
            return results

        known = batch.prefixes is not None and self.settled.sharing != "false"
        return _Running(finished, {TOKENS_SAVED: float(schedule.saved_tokens)} if known else {})

    def _begin_step(self, batch: TrainBatch, schedule: Schedule, step: int) -> list[Pending]:
        shares = [rank_share(schedule, rank, batch) for rank in range(len(self))]
        return [
            self.group.submit(rank, "train_step", share.batch, step, what=f"training step {step + 1}")
            for rank, share in enumerate(shares)
        ]

    def _counted(self, calls: list[Pending]) -> list[TrainResult]:
        """Waits for a step while its micro-batches are counted."""
        if self.keeper is None:
            return fetch_all(calls)
        self.keeper.probe.counting(True)
        try:
            return fetch_all(calls)
        finally:
            self.keeper.probe.counting(False)

    def _step(self, batch: TrainBatch, step: int) -> list[TrainResult]:
        return self._counted(self._begin_step(batch, self._plan(batch), step))

    def train(self, batch: TrainBatch, step: int) -> StepReport:
        """One optimizer step; arguments as in `start_step`."""
        return self.start_step(batch, step).finish()

    def evaluate(self, batch: TrainBatch) -> MetricSums:
        """The loss on rows without training on them."""
        shares = [share.batch for share in self.shares(batch)]
        return merge_all(
            self.run("evaluating", lambda: self.group.map("evaluate", shares, what="evaluating"))
        )

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
        return self.run(
            what or method,
            lambda: fetch_all(
                [
                    self.group.submit(rank, method, share.batch, *args, what=what)
                    for rank, share in enumerate(shares)
                ]
            ),
        )

    def columns(self, method: str, shares: Sequence[Share], *args: Any) -> tuple[list[RowPointer], list[Any]]:
        """Asks every rank for a column that stays where it is, and something to be told.

        Returns:
            Where each row's column lies, and the answers in the order of ranks.
        """
        pending, answers = self.run(
            method,
            lambda: settle(
                [self.group.submit(r, method, s.batch, *args, returns=2) for r, s in enumerate(shares)]
            ),
        )
        pointers: dict[int, RowPointer] = {}
        for call, share in zip(pending, shares, strict=True):
            pointers |= {row: RowPointer(call.ref[1], number) for number, row in enumerate(share.rows)}
        return [pointers[row] for row in range(len(pointers))], answers

    def offload(self, weights: bool, optimizer: bool) -> None:
        """Moves the ranks' weights and optimizer state to the CPU."""
        self._all("offload", weights, optimizer, what="offloading")

    def reload(self) -> None:
        """Brings them back."""
        self._all("reload", what="reloading")

    def save(self, directory: Path, only_model: bool) -> None:
        """Writes the model, and the optimizer's state unless only the model is wanted."""
        self._all("save_model", str(directory), what="saving the model")
        if not only_model:
            self._all("save_optimizer", str(directory / "optimizer"), what="saving the optimizer")

    def load(self, directory: Path) -> None:
        """Restores weights and optimizer state of a checkpoint."""
        self._all("load_checkpoint", str(directory / "optimizer"), what="restoring the checkpoint")
        if self.keeper is not None:
            self.keeper.restored(directory)

    def snapshot_steps(self) -> int | None:
        """Steps from the start, or the checkpoint it was restored from, to its newest snapshot; None: it has
        none."""
        snapshot = None if self.keeper is None else self.keeper.newest()
        return None if snapshot is None else snapshot.steps

    def write_snapshot(self, directory: Path, steps: int) -> None:
        """Writes that snapshot as a checkpoint's optimizer state, whatever became of the ranks."""
        assert self.keeper is not None
        self.keeper.write(directory / "optimizer", steps)

    def _all(self, method: str, *args: Any, what: str) -> list[Any]:
        return self.run(what, lambda: self.group.call(method, *args, what=what))


def rank_share(schedule: Schedule, rank: int, batch: TrainBatch) -> Share:
    """The rows of one rank."""
    own_rows = [row for micro in schedule.ranks[rank] for row in micro]
    local = {row: number for number, row in enumerate(own_rows)}
    micro_batches = [tuple(local[row] for row in micro) for micro in schedule.ranks[rank]]
    return Share(batch.part(own_rows).message(micro_batches, shares=schedule.shares), own_rows)
