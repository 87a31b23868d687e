"""Where a run is in its data, counted in what was trained on: it means the same whatever a step's size is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raytune_rl.config.batching import GRPOSchedule, SFTSchedule, steps_left
from raytune_rl.data.sampler import BatchPlan
from raytune_rl.pipelines.resume_point import ResumePoint

POSITION = ("data_epoch", "data_taken", "data_per_step")
"""Under these names a checkpoint keeps a position."""


@dataclass(frozen=True)
class Position:
    """A place in the data.

    Attributes:
        epoch: Passes over the data before the present one; of a stream, windows before it.
        taken: Units (rows, pairs or packs) of the present one that were trained on.
    """

    epoch: int
    taken: int

    @classmethod
    def of(cls, state: Mapping[str, Any], size: int, units: int) -> Position:
        """The place of a checkpoint, the data's begin if `state` is empty.

        Args:
            state: trainer_state.json. One that counts steps alone was made with steps of the present size.
            size: Units of a step.
            units: Units of an epoch.
        """
        if "data_epoch" in state:
            return cls(int(state["data_epoch"]), int(state["data_taken"]))
        if "window" in state:
            return cls(int(state["window"]), int(state["batches_of_window"]) * size)
        epoch, steps = divmod(int(state.get("global_step", 0)), -(-units // size))
        return cls(epoch, steps * size)

    def state(self, size: int) -> dict[str, int]:
        """What a checkpoint keeps; `size` is what a step takes."""
        return dict(zip(POSITION, (self.epoch, self.taken, size), strict=True))


class PromptDraw:
    """The prompts of one generation after another; an epoch's last ones, too few for a generation, are left
    out of it.

    Args:
        plan: The order, and how many prompts a generation takes.
        state: trainer_state.json of the checkpoint, or empty. One that counts generations alone was made
            with generations of the present size.
    """

    def __init__(self, plan: BatchPlan, state: Mapping[str, Any]) -> None:
        self._plan = plan
        epoch, within = divmod(int(state.get("generation", 0)), plan.batches_per_epoch)
        at = Position(epoch, within * plan.batch_size)
        self._at = Position.of(state, plan.batch_size, plan.n) if "data_epoch" in state else at

    def next(self) -> list[int]:
        """The prompts of the next generation."""
        at, size = self._at, self._plan.batch_size
        if at.taken + size > self._plan.n:
            at = Position(at.epoch + 1, 0)
        self._at = Position(at.epoch, at.taken + size)
        return self._plan.part(at.epoch, at.taken, at.taken + size).tolist()

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return self._at.state(self._plan.batch_size)


def generations_go_on(
    schedule: GRPOSchedule, prompts: int, resume_point: ResumePoint, max_steps: int
) -> tuple[GRPOSchedule, list[str]]:
    """As `goes_on`, of generations over `prompts` prompts."""
    batch, state = schedule.batch, resume_point.state
    size, before = batch.prompts_per_generation, state.get("data_per_step")
    if before is None or before == size:
        return schedule, []
    at, each = Position.of(state, size, prompts), schedule.generations_per_epoch
    told = (
        f"a generation takes {size} prompts now and took {before} before: the run goes on behind those that "
    )
    told += f"were trained on, {at.taken:,} of {prompts:,} of epoch {at.epoch + 1}"
    if max_steps > 0:
        return schedule, [f"{told}; --max_steps {max_steps} counts the steps of either size"]
    wanted = schedule.total_generations - at.epoch * each  # in the present epoch, by the present size
    # What was asked ahead (--async_generate) was drawn, and is still to be trained on.
    here = (prompts if wanted >= each else wanted * size) - at.taken + int(state.get("ahead", 0))
    left = max(here, 0) // size + max(wanted - each, 0)
    total = resume_point.step + left * batch.optimizer_steps_per_generation * batch.num_iterations
    told += f", and has {total:,} steps in all; the learning rate follows that number"
    generations = int(state.get("generation", 0)) + left
    return replace(schedule, total_steps=total, total_generations=generations), [told]


def goes_on(
    schedule: SFTSchedule, position: Position, units: int, resume_point: ResumePoint, max_steps: int
) -> tuple[SFTSchedule, list[str]]:
    """The schedule of a run that may go on with steps of another size than before, and what is said of it.

    Args:
        schedule: Of a whole run with steps of the present size.
        position: Where it goes on.
        units: Units of an epoch.
        resume_point: The checkpoint, if there is one.
        max_steps: The user's own number of steps, if above 0: it counts steps of either size.
    """
    size, before = schedule.rows_per_step, resume_point.state.get("data_per_step")
    if before is None or before == size:
        return schedule, []
    told = f"a step takes {size} rows now and took {before} before: the run goes on behind those that were "
    told += f"trained on, {position.taken:,} of {units:,} of epoch {position.epoch + 1}"
    if max_steps > 0:
        return schedule, [f"{told}; --max_steps {max_steps} counts the steps of either size"]
    left = steps_left(
        schedule.total_steps, schedule.steps_per_epoch, size, units, position.epoch, position.taken
    )
    total = resume_point.step + left
    told += f", and has {total:,} steps in all; the learning rate follows that number"
    return replace(schedule, total_steps=total), [told]
