"""Everything that learns from a step, side by side: the policy alone, or policy and critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from raytune_rl.data.media_table import ROW_COLUMN
from raytune_rl.groups.world import Trainable
from raytune_rl.protocol.rows import TrainBatch
from raytune_rl.protocol.train import StepReport


@dataclass(frozen=True)
class Learner:
    """One model that learns, and what of a step it takes.

    Attributes:
        model: It.
        takes: Columns that it alone gets; None: all that no other learner takes. All get the media.
        scalars: Names of the row scalars it gets; None: all.
        weight: Of its loss.
        folder: Of a checkpoint; empty: the checkpoint's own.
        metric_names: Name of a metric as the model gives it -> as the log has it.
    """

    model: Trainable
    takes: frozenset[str] | None = None
    scalars: frozenset[str] | None = None
    weight: float = 1.0
    folder: str = ""
    metric_names: Mapping[str, str] = field(default_factory=dict)

    def batch(self, step: TrainBatch, taken: frozenset[str]) -> TrainBatch:
        """Its part of a step; `taken` are all columns that one learner alone gets."""
        columns = step.columns.keys() - taken if self.takes is None else self.takes | {ROW_COLUMN}
        scalars = {n: v for n, v in step.scalars.items() if self.scalars is None or n in self.scalars}
        own_batch = replace(step.keep(columns), scalars=scalars)
        return (
            own_batch if self.weight == 1 else own_batch.with_scalars(weight=scalars["weight"] * self.weight)
        )

    def report(self, step: StepReport) -> StepReport:
        """Its step under the log's names, its loss without its weight."""
        metrics = {self.metric_names.get(name, name): value for name, value in step.metrics.items()}
        if self.weight != 1:
            metrics[self.metric_names.get("loss", "loss")] /= self.weight
        return StepReport(metrics, step.tokens, step.memory_gib)


class Learners:
    """All of them as one.

    Args:
        learners: The policy last: where two have a metric of one name, its own counts.
        in_turn: One after the other, where they share GPUs that cannot hold the activations of all.
    """

    def __init__(self, learners: Sequence[Learner], in_turn: bool = False) -> None:
        self._learners, self._in_turn = learners, in_turn
        self._taken = frozenset(name for learner in learners for name in learner.takes or ())

    def train(self, batch: TrainBatch, step: int) -> StepReport:
        """One optimizer step of all."""
        reports = []
        for together in [[one] for one in self._learners] if self._in_turn else [self._learners]:
            running = [one.model.start_step(one.batch(batch, self._taken), step) for one in together]
            reports += [one.report(begun.finish()) for one, begun in zip(together, running, strict=True)]
        metrics: dict[str, float] = {}
        for report in reports:
            metrics |= report.metrics
        if len(reports) > 1:
            metrics["loss/policy_avg"] = reports[-1].metrics["loss"]
        return StepReport(metrics, sum(r.tokens for r in reports), max(r.memory_gib for r in reports))

    def offload(self, weights: bool, optimizer: bool) -> None:
        """Moves weights and optimizer states of all to the CPU."""
        for one in self._learners:
            one.model.offload(weights, optimizer)

    def reload(self) -> None:
        """Brings them back."""
        for one in self._learners:
            one.model.reload()

    def save(self, directory: Path, only_model: bool) -> None:
        """Writes all; the policy first, into the checkpoint itself."""
        for one in reversed(self._learners):
            one.model.save(directory / one.folder, only_model)

    def snapshot_steps(self) -> int | None:
        """As of a world; None where their newest snapshots are not of one step."""
        steps = {one.model.snapshot_steps() for one in self._learners}
        return steps.pop() if len(steps) == 1 else None

    def write_snapshot(self, directory: Path, steps: int) -> None:
        """Writes the snapshots of all."""
        for one in self._learners:
            one.model.write_snapshot(directory / one.folder, steps)

    def load(self, directory: Path) -> None:
        """Restores all."""
        for one in reversed(self._learners):
            one.model.load(directory / one.folder)
