"""The batch arithmetic, against laying the batches out one by one."""

import itertools
import math
import random
import re
from fractions import Fraction

import pytest

from raytune_rl.config import RLHFConfig
from raytune_rl.config.batching import (
    GRPOBatch,
    grpo_batch,
    grpo_batch_of,
    grpo_schedule,
    grpo_schedule_of,
    sft_schedule,
)
from raytune_rl.errors import ConfigError


def chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def lays_out(world: int, size: int, accumulation: int, group: int, steps: int) -> list[list] | None:
    """The optimizer steps of one generation made by hand, or None where something is left over."""
    micro_batches = [[None] * size for _ in range(world * steps)]
    completions = list(itertools.chain.from_iterable(micro_batches))
    rounds = chunks(micro_batches, world)
    optimizer_steps = chunks(rounds, accumulation)
    if any(len(step) != accumulation for step in optimizer_steps):
        return None
    if any(len(members) != group for members in chunks(completions, group)):
        return None
    return optimizer_steps


GRID = list(itertools.product((1, 2, 3, 8), (1, 2, 5), (1, 2, 3), (2, 3, 4, 8), (None, 1, 2, 3, 4, 6)))


@pytest.mark.parametrize("how", ["steps_per_generation", "generation_batch_size"])
def test_a_generation_is_accepted_exactly_when_it_can_be_laid_out(how: str) -> None:
    accepted = 0
    for world, size, accumulation, group, steps in GRID:
        by_hand = lays_out(world, size, accumulation, group, steps or accumulation)
        given = steps
        if how == "generation_batch_size" and steps is not None:
            given = steps * world * size
        numbers = {
            "world_size": world,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "num_generations": group,
        }
        if by_hand is None:
            with pytest.raises(ConfigError):
                grpo_batch(**numbers, **{how: given})
            continue
        accepted += 1
        batch = grpo_batch(**numbers, **{how: given})
        per_step = sum(len(micro) for round_ in by_hand[0] for micro in round_)
        assert batch.optimizer_steps_per_generation == len(by_hand)
        assert batch.completions_per_step == per_step
        assert batch.generation_batch_size == per_step * len(by_hand)
        assert batch.prompts_per_generation * group == batch.generation_batch_size
        assert Fraction(batch.completions_per_step, group) == Fraction(
            batch.prompts_per_step
        ).limit_denominator(99)
        assert batch.on_policy == (len(by_hand) == 1)
    assert accepted > 50


def test_every_value_offered_in_an_error_works() -> None:
    tried = 0
    for world, size, accumulation, group, steps in GRID:
        numbers = {
            "world_size": world,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "num_generations": group,
            "steps_per_generation": steps,
        }
        try:
            grpo_batch(**numbers)
            continue
        except ConfigError as error:
            message = str(error)
        if "Change one of these to: " in message:
            offers = re.findall(r"--(\w+) ([\d or]+)", message.split("Change one of these to: ")[1])
        else:
            offers = re.findall(r"--(steps_per_generation) .*that works: ([\d or]+)\.", message)
        assert offers, message
        for name, values in offers:
            for value in values.split(" or "):
                grpo_batch(**(numbers | {name: int(value)}))
                tried += 1
    assert tried > 200


def test_generation_batch_size_offers_work() -> None:
    for given in (1, 5, 7, 12, 20, 33):
        try:
            grpo_batch(
                world_size=2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                num_generations=4,
                generation_batch_size=given,
            )
        except ConfigError as error:
            for value in re.search(r"that works: ([\d or]+)\.", str(error)).group(1).split(" or "):
                batch = grpo_batch(
                    world_size=2,
                    per_device_train_batch_size=2,
                    gradient_accumulation_steps=2,
                    num_generations=4,
                    generation_batch_size=int(value),
                )
                assert batch.generation_batch_size == int(value)
        else:
            pytest.fail(f"{given} should not divide")


def walk(batch: GRPOBatch, n_prompts: int, epochs: Fraction) -> tuple[int, int, int]:
    """Steps, generations, and prompts unused in an epoch, by walking through the run."""
    whole = chunks(list(range(n_prompts)), batch.prompts_per_generation)
    used = [c for c in whole if len(c) == batch.prompts_per_generation]
    per_generation = batch.num_iterations * batch.optimizer_steps_per_generation
    end = epochs * len(used) * per_generation
    steps = generations = 0
    for _ in itertools.count():
        for _chunk in used:
            generations += 1
            for _step in range(per_generation):
                steps += 1
                if steps >= end:
                    return steps, generations, n_prompts - sum(len(c) for c in used)
    raise AssertionError


def test_length_of_a_run() -> None:
    draw = random.Random(0)
    for _ in range(300):
        batch = grpo_batch(
            world_size=draw.choice((1, 2, 4)),
            per_device_train_batch_size=draw.choice((1, 2, 4)),
            gradient_accumulation_steps=(accumulation := draw.choice((1, 2))),
            num_generations=2,
            steps_per_generation=accumulation * draw.choice((2, 4)),
            num_iterations=draw.choice((1, 2, 3)),
        )
        n_prompts = batch.prompts_per_generation + draw.randrange(60)
        epochs = draw.choice((1.0, 2.0, 0.5, 1.1, 0.3, 3.0))
        schedule = grpo_schedule(batch, n_prompts, epochs)
        steps, generations, unused = walk(batch, n_prompts, Fraction(str(epochs)))
        assert schedule.total_steps == steps
        assert schedule.total_generations == generations
        assert schedule.prompts_unused_per_epoch == unused
        assert math.isclose(schedule.epochs * schedule.steps_per_epoch, steps)


def test_max_steps_goes_before_epochs() -> None:
    batch = grpo_batch(world_size=1, per_device_train_batch_size=4, num_generations=4)
    schedule = grpo_schedule(batch, n_prompts=10, num_train_epochs=1, max_steps=25)
    assert schedule.total_steps == 25
    assert schedule.total_generations == 25
    assert schedule.epochs == 2.5


def test_too_few_prompts_for_one_generation() -> None:
    batch = grpo_batch(world_size=8, per_device_train_batch_size=2, num_generations=4)
    with pytest.raises(ConfigError, match="3 prompts, but one generation takes 4"):
        grpo_schedule(batch, n_prompts=3)


def test_both_ways_of_giving_a_generation_are_refused() -> None:
    with pytest.raises(ConfigError, match="only one"):
        grpo_batch(
            world_size=1,
            per_device_train_batch_size=4,
            num_generations=4,
            steps_per_generation=1,
            generation_batch_size=4,
        )


def test_config_and_numbers_agree() -> None:
    config = RLHFConfig(
        model="m", dataset="d", reward_funcs="accuracy", per_device_train_batch_size=4, num_generations=8,
        gradient_accumulation_steps=2, generation_batch_size=64, num_iterations=2, num_train_epochs=2,
    )  # fmt: skip
    batch = grpo_batch_of(config, world_size=4)
    assert (batch.steps_per_generation, batch.optimizer_steps_per_generation) == (4, 2)
    assert batch.prompts_per_step == 4.0
    assert not batch.on_policy
    # 17 prompts: 2 generations of 8, twice, each for 2 iterations of 2 steps.
    assert grpo_schedule_of(config, 4, n_prompts=17).total_steps == 2 * 2 * 2 * 2


def test_sft_rows_and_steps() -> None:
    for world, size, accumulation, rows in itertools.product(
        (1, 2, 8), (1, 3, 16), (None, 1, 4), (1, 16, 100)
    ):
        schedule = sft_schedule(
            world_size=world,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            n_rows=rows,
            num_train_epochs=2,
        )
        assert len(chunks(list(range(rows)), schedule.rows_per_step)) == schedule.steps_per_epoch
        assert schedule.total_steps == 2 * schedule.steps_per_epoch
        assert schedule.rows_per_step == world * size * schedule.gradient_accumulation_steps
        if accumulation is None:
            assert schedule.rows_per_step >= 16
            assert world * size * (schedule.gradient_accumulation_steps - 1) < 16
        else:
            assert schedule.gradient_accumulation_steps == accumulation


def test_sft_without_rows() -> None:
    with pytest.raises(ConfigError, match="no row"):
        sft_schedule(world_size=1, per_device_train_batch_size=1, gradient_accumulation_steps=1, n_rows=0)
