"""How a fleet is started over rollout workers, and how long its engines may stand still."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from raytune_rl.config import RLHFConfig
from raytune_rl.groups.elastic import Cluster, Elastic
from raytune_rl.groups.fleet_core import FleetCore
from raytune_rl.groups.fleet_thread import FleetThread
from raytune_rl.groups.members import RolloutCrew
from raytune_rl.groups.scaling import Bounds, Patience, ScalingPolicy
from raytune_rl.runtime.copies import Copies
from raytune_rl.runtime.fleet_health import Limits
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec, Slot
from raytune_rl.runtime.places import Place, leaving_nodes

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


@dataclass(frozen=True)
class Growth:
    """How engines come and go.

    Attributes:
        spec: Of one of them.
        bounds: Of their number.
        patience: Before it changes.
        slots: The places of those that are there at the start, each of its own.
        say: Takes sentences for the user.
    """

    spec: GroupSpec
    bounds: Bounds
    patience: Patience
    slots: Sequence[Slot]
    say: Callable[[str], None]

    def elastic(self, fleet: FleetCore) -> Elastic:
        """What keeps a fleet's size."""
        policy = ScalingPolicy(self.bounds, self.patience)
        cluster = Cluster(lambda: Place.ask(self.spec), leaving_nodes)
        elastic = Elastic(fleet, policy, cluster, self.say)
        for number, slot in enumerate(self.slots):
            elastic.adopt(number, Place(slot.placement_group), slot.node.node_id)
        return elastic


def start_fleet(
    workers: WorkerGroup,
    limits: Limits,
    lost: Callable[[str], None],
    stack: ExitStack,
    growth: Growth | None = None,
) -> FleetThread:
    """Starts the thread that dispatches to workers.

    Args:
        workers: Started already, or being started.
        limits: Of their health.
        lost: Told a sentence when one is lost and started anew.
        stack: Ends the thread.
        growth: How they come and go; None: they stay.
    """
    timeout_s = max(workers.timeout_s, limits.start_s)
    if growth is None:
        fleet = FleetThread(RolloutCrew(workers), limits, lost, timeout_s)
    else:
        copies = Copies()
        stack.callback(copies.end)
        crew = RolloutCrew(workers, copies.keep)
        fleet = FleetThread(crew, limits, lost, timeout_s, growth.elastic)
    stack.callback(fleet.close)
    return fleet
