"""Errors of the batch arithmetic, each with the nearest numbers that work."""

from __future__ import annotations

import math
from collections.abc import Callable

from raytune_rl.errors import ConfigError


def near(value: int, works: Callable[[int], bool], reach: int = 4096) -> str:
    """The nearest working values below and above a value, in words."""
    below = next((n for n in range(value - 1, 0, -1) if works(n)), None)
    above = next((n for n in range(value + 1, value + reach + 1) if works(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None) or "none near it"


def check_generation_batch(given: int, per_step: int, group: int) -> None:
    """A generation batch must be made of whole optimizer steps and of whole groups.

    Raises:
        ConfigError: it is not.
    """
    wanted = []
    if given % per_step:
        wanted.append(
            f"optimizer steps of {per_step} completions (policy workers * --per_device_train_batch_size * "
            "--gradient_accumulation_steps)"
        )
    if given % group:
        wanted.append(f"groups of --num_generations {group}")
    if wanted:
        offer = near(given, lambda n: n % math.lcm(per_step, group) == 0)
        raise ConfigError(
            f"--generation_batch_size {given} is not a whole number of {' and of '.join(wanted)}. "
            f"Nearest that works: {offer}."
        )


def check_steps(steps: int, accumulation: int, micro: int, group: int) -> None:
    """A generation must feed whole optimizer steps.

    Raises:
        ConfigError: it does not.
    """
    if steps % accumulation:
        offer = near(steps, lambda n: n % accumulation == 0 and (micro * n) % group == 0)
        raise ConfigError(
            f"--steps_per_generation {steps} is not a multiple of --gradient_accumulation_steps "
            f"{accumulation}: "
            f"an optimizer step would be made of parts of several generations. Nearest that works: {offer}. "
            "Left out, one generation feeds one optimizer step."
        )


def ungrouped(
    world: int, batch: int, steps: int, accumulation: int, group: int, follows: bool
) -> ConfigError:
    """A generation is not a whole number of groups.

    Args:
        world: Policy workers.
        batch: Completions per worker and accumulation step.
        steps: Accumulation steps per generation.
        accumulation: Accumulation steps per optimizer step.
        group: Completions per prompt.
        follows: Whether `steps` is not given by the user and so follows `accumulation`.
    """
    size = world * batch * steps
    ways = [
        f"--per_device_train_batch_size {near(batch, lambda n: (world * n * steps) % group == 0)}",
        f"--num_generations {near(group, lambda n: n > 1 and size % n == 0)}",
    ]
    if follows:
        offer = near(steps, lambda n: (world * batch * n) % group == 0)
        ways.append(f"--gradient_accumulation_steps {offer}")
    offer = near(steps, lambda n: n % accumulation == 0 and (world * batch * n) % group == 0)
    ways.append(f"--steps_per_generation {offer}")
    return ConfigError(
        f"One generation is {size} completions ({world} policy workers * --per_device_train_batch_size "
        f"{batch} * "
        f"{steps} accumulation steps), which is not a whole number of groups of --num_generations {group}. "
        f"Change one of these to: {'; '.join(w for w in ways if 'none near' not in w)}."
    )
