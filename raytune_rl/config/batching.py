"""How rows become optimizer steps: the arithmetic of ms-swift, as pure functions.

In GRPO every batch size counts *completions*. With P policy workers, B completions per worker and
accumulation step (`per_device_train_batch_size`), A accumulation steps and G completions per prompt:

    completions per optimizer step  P * B * A
    generation batch                P * B * steps_per_generation, a whole number of groups of G

A generation batch is trained on `num_iterations` times. Prompts that do not fill a generation batch at the
end of an epoch are not used in that epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from raytune_rl.config import offers
from raytune_rl.errors import ConfigError


class Sizes(Protocol):
    """The settings that say how large a batch is and how long a run; see `config.commands`."""

    @property
    def per_device_train_batch_size(self) -> int: ...

    @property
    def gradient_accumulation_steps(self) -> int | None: ...

    @property
    def num_train_epochs(self) -> float: ...

    @property
    def max_steps(self) -> int: ...


class OnlineSizes(Sizes, Protocol):
    """The same of online RL."""

    @property
    def num_generations(self) -> int: ...

    @property
    def num_iterations(self) -> int: ...

    @property
    def steps_per_generation(self) -> int | None: ...

    @property
    def generation_batch_size(self) -> int | None: ...

    @property
    def mini_batches(self) -> int: ...


SFT_ROWS_PER_STEP = 16
"""Rows that SFT accumulates up to when the user does not say."""


@dataclass(frozen=True)
class GRPOBatch:
    """The sizes of one generation and one optimizer step.

    Attributes:
        world_size: Policy workers.
        completions_per_step: Completions in one optimizer step, over all workers.
        prompts_per_step: The same in prompts; a step may hold part of a group.
        num_generations: Completions per prompt.
        steps_per_generation: Accumulation steps that one generation feeds.
        optimizer_steps_per_generation: Optimizer steps that one pass over a generation makes.
        num_iterations: Passes over a generation.
        generation_batch_size: Completions sampled at a time, over all workers.
        prompts_per_generation: Prompts sampled at a time.
    """

    world_size: int
    completions_per_step: int
    prompts_per_step: float
    num_generations: int
    steps_per_generation: int
    optimizer_steps_per_generation: int
    num_iterations: int
    generation_batch_size: int
    prompts_per_generation: int

    @property
    def on_policy(self) -> bool:
        """Whether every completion is trained on by the very weights that sampled it."""
        return self.num_iterations == 1 and self.optimizer_steps_per_generation == 1


@dataclass(frozen=True)
class GRPOSchedule:
    """A whole run.

    Attributes:
        batch: One generation and one step.
        generations_per_epoch: Generations in one pass over the prompts.
        prompts_unused_per_epoch: Prompts left over at the end of an epoch.
        steps_per_epoch: Optimizer steps in one pass over the prompts.
        total_steps: Optimizer steps of the run.
        total_generations: Generations of the run; the last one may be trained on in part.
        epochs: Passes over the prompts that the run comes to.
    """

    batch: GRPOBatch
    generations_per_epoch: int
    prompts_unused_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    total_generations: int
    epochs: float


@dataclass(frozen=True)
class SFTSchedule:
    """A whole run over prepared rows, packs or pairs. The last step of an epoch may hold fewer rows; none is
    dropped or repeated.

    Attributes:
        world_size: Policy workers.
        gradient_accumulation_steps: Accumulation steps per optimizer step.
        rows_per_step: Rows in one optimizer step, over all workers.
        steps_per_epoch: Optimizer steps in one pass over the rows.
        total_steps: Optimizer steps of the run.
        epochs: Passes over the rows that the run comes to.
    """

    world_size: int
    gradient_accumulation_steps: int
    rows_per_step: int
    steps_per_epoch: int
    total_steps: int
    epochs: float


def grpo_batch(
    *,
    world_size: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int = 1,
    num_generations: int,
    steps_per_generation: int | None = None,
    generation_batch_size: int | None = None,
    num_iterations: int = 1,
) -> GRPOBatch:
    """Works out a generation and an optimizer step.

    Raises:
        ConfigError: the numbers do not divide; the message offers the nearest ones that do.
    """
    micro = world_size * per_device_train_batch_size
    accumulation = gradient_accumulation_steps
    if generation_batch_size is not None:
        if steps_per_generation is not None:
            raise ConfigError("Give only one of --steps_per_generation and --generation_batch_size.")
        offers.check_generation_batch(generation_batch_size, micro * accumulation, num_generations)
        steps = generation_batch_size // micro
    else:
        steps = accumulation if steps_per_generation is None else steps_per_generation
    offers.check_steps(steps, accumulation, micro, num_generations)
    size = micro * steps
    if size % num_generations:
        follows = steps_per_generation is None
        raise offers.ungrouped(
            world_size, per_device_train_batch_size, steps, accumulation, num_generations, follows
        )
    return GRPOBatch(
        world_size=world_size,
        completions_per_step=micro * accumulation,
        prompts_per_step=micro * accumulation / num_generations,
        num_generations=num_generations,
        steps_per_generation=steps,
        optimizer_steps_per_generation=steps // accumulation,
        num_iterations=num_iterations,
        generation_batch_size=size,
        prompts_per_generation=size // num_generations,
    )


def grpo_schedule(
    batch: GRPOBatch, n_prompts: int, num_train_epochs: float = 1.0, max_steps: int = -1
) -> GRPOSchedule:
    """Works out the length of a run.

    Raises:
        ConfigError: there are fewer prompts than one generation takes.
    """
    per_generation = batch.optimizer_steps_per_generation * batch.num_iterations
    generations = n_prompts // batch.prompts_per_generation
    if generations == 0:
        raise ConfigError(
            f"The data has {n_prompts} prompts, but one generation takes {batch.prompts_per_generation} "
            f"({batch.generation_batch_size} completions / --num_generations {batch.num_generations}). Give "
            "more data, "
            "or lower --per_device_train_batch_size, --gradient_accumulation_steps, --steps_per_generation "
            "or "
            "--generation_batch_size."
        )
    steps_per_epoch = generations * per_generation
    total = _total_steps(steps_per_epoch, num_train_epochs, max_steps)
    return GRPOSchedule(
        batch=batch,
        generations_per_epoch=generations,
        prompts_unused_per_epoch=n_prompts % batch.prompts_per_generation,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        total_generations=math.ceil(Fraction(total, per_generation)),
        epochs=total / steps_per_epoch,
    )


def sft_accumulation(per_device_train_batch_size: int, world_size: int) -> int:
    """Accumulation steps when the user does not say: as many as make 16 rows a step."""
    return math.ceil(SFT_ROWS_PER_STEP / (per_device_train_batch_size * world_size))


def sft_schedule(
    *,
    world_size: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int | None,
    n_rows: int,
    num_train_epochs: float = 1.0,
    max_steps: int = -1,
) -> SFTSchedule:
    """Works out an optimizer step and the length of a run.

    Raises:
        ConfigError: there are no rows.
    """
    if n_rows < 1:
        raise ConfigError("--dataset has no row to train on.")
    accumulation = gradient_accumulation_steps or sft_accumulation(per_device_train_batch_size, world_size)
    rows = world_size * per_device_train_batch_size * accumulation
    steps_per_epoch = math.ceil(n_rows / rows)
    total = _total_steps(steps_per_epoch, num_train_epochs, max_steps)
    return SFTSchedule(
        world_size=world_size,
        gradient_accumulation_steps=accumulation,
        rows_per_step=rows,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        epochs=total / steps_per_epoch,
    )


def steps_left(total_steps: int, steps_per_epoch: int, size: int, units: int, epoch: int, taken: int) -> int:
    """Steps that a run still does that goes on at a position in the data, so that every unit of an epoch is
    trained on once, whatever the size of the steps before was.

    Args:
        total_steps: Of a whole run with steps of the present size.
        steps_per_epoch: Of such a run.
        size: Rows (or pairs, or packs) of a step.
        units: Rows (or pairs, or packs) of an epoch, as far as they are trained on.
        epoch: Number of the present epoch, from 0.
        taken: What has been trained on of it.
    """
    wanted = min((total_steps - epoch * steps_per_epoch) * size, units)  # of the present epoch
    return math.ceil(max(wanted - taken, 0) / size) + max(total_steps - (epoch + 1) * steps_per_epoch, 0)


def grpo_batch_of(config: OnlineSizes, world_size: int) -> GRPOBatch:
    """`grpo_batch` with a config's numbers."""
    accumulation, steps = config.gradient_accumulation_steps or 1, config.steps_per_generation
    if steps is None and config.generation_batch_size is None:
        steps = accumulation * config.mini_batches if config.mini_batches > 1 else None
    return grpo_batch(
        world_size=world_size,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=accumulation,
        num_generations=config.num_generations,
        steps_per_generation=steps,
        generation_batch_size=config.generation_batch_size,
        num_iterations=config.num_iterations,
    )


def grpo_schedule_of(config: OnlineSizes, world_size: int, n_prompts: int) -> GRPOSchedule:
    """`grpo_schedule` with a config's numbers."""
    batch = grpo_batch_of(config, world_size)
    return grpo_schedule(batch, n_prompts, config.num_train_epochs, config.max_steps)


def sft_schedule_of(config: Sizes, world_size: int, n_rows: int) -> SFTSchedule:
    """`sft_schedule` with a config's numbers. Of preferences the rows are pairs."""
    return sft_schedule(
        world_size=world_size,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        n_rows=n_rows,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
    )


def _total_steps(steps_per_epoch: int, epochs: float, max_steps: int) -> int:
    if max_steps > 0:
        return max_steps
    # Exact: 1.1 epochs of 10 steps are 11, but ceil(1.1 * 10) is 12 in floating point.
    return math.ceil(Fraction(repr(float(epochs))) * steps_per_epoch)
