"""How a fleet is started over rollout workers, and how long its engines may stand still."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack

from raytune_rl.config import RLHFConfig
from raytune_rl.groups.fleet_thread import FleetThread
from raytune_rl.groups.members import RolloutCrew
from raytune_rl.runtime.fleet_health import Limits
from raytune_rl.runtime.group import WorkerGroup

CPU_HANG_S = 300.0
"""Without a step, on a CPU, where thousands of prompt tokens are one step, which takes minutes with a large
model. On a GPU a step takes seconds at most."""


def hang_limits(config: RLHFConfig, on_gpu: bool) -> Limits:
    """The limits of an engine's health. Its process answers whatever the engine is at, so silence has no more
    time than `--hang_timeout` on a CPU either.
    """
    silent_s = config.hang_timeout or math.inf
    still_s = silent_s if on_gpu or config.is_set("hang_timeout") else max(silent_s, CPU_HANG_S)
    return Limits(config.start_timeout, config.step_timeout, still_s, silent_s)


def start_fleet(
    workers: WorkerGroup, limits: Limits, lost: Callable[[str], None], stack: ExitStack
) -> FleetThread:
    """Starts the thread that dispatches to workers.

    Args:
        workers: Started already, or being started.
        limits: Of their health.
        lost: Told a sentence when one is lost and started anew.
        stack: Ends the thread.
    """
    fleet = FleetThread(RolloutCrew(workers), limits, lost, max(workers.timeout_s, limits.start_s))
    stack.callback(fleet.close)
    return fleet
