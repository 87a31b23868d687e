"""Places that are asked for one by one while a run goes on, and nodes that are going to leave.

Each is a placement group of its own: one that finds no room waits, and Ray's autoscaler counts it among what
is missing and brings a node for it. Given back, it lets the autoscaler take that node away again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from raytune_rl.errors import PlacementError
from raytune_rl.runtime.cluster import describe
from raytune_rl.runtime.health import health
from raytune_rl.runtime.placement import GroupSpec, Node, Slot, placement_message

POLL_S = 0.2
"""Seconds from one look whether places are there to the next."""


@dataclass(frozen=True)
class Place:
    """A place that was asked for, for one worker."""

    reservation: Any

    @classmethod
    def ask(cls, spec: GroupSpec) -> Place:
        """Asks for a place for one worker of a group. Returns at once."""
        return cls(placement_group([spec.demand()], strategy="PACK"))

    def slot(self) -> Slot | None:
        """The place, once there is one; None while it waits for room."""
        entry = placement_group_table(self.reservation)
        if entry.get("state") != "CREATED":
            return None
        (node_id,) = entry["bundles_to_node_id"].values()
        address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}.get(node_id, "")
        return Slot(self.reservation, 0, Node(address, node_id))

    def give_back(self) -> None:
        """Nobody needs it any more, whether it was there yet or not. A worker on it is ended with it."""
        if not health().head_lost:
            remove_placement_group(self.reservation)


@contextmanager
def places_for(spec: GroupSpec, timeout_s: float) -> Iterator[list[Slot]]:
    """Places for the workers of a group, each its own, and gives them back at the end. A cluster that grows
    may bring nodes for them.

    Raises:
        PlacementError: They were not there within `timeout_s` seconds.
    """
    places = [Place.ask(spec) for _ in range(spec.workers)]
    try:
        slots = [place.slot() for place in places]
        deadline = time.monotonic() + timeout_s
        while None in slots:
            if time.monotonic() > deadline:
                raise PlacementError(
                    f"no room within {timeout_s:.0f} s (--start_timeout), and no autoscaler made any: "
                    + placement_message(None, [spec], describe().nodes)
                )
            time.sleep(POLL_S)
            slots = [slot or place.slot() for slot, place in zip(slots, places, strict=True)]
        yield [slot for slot in slots if slot is not None]
    finally:
        for place in places:
            place.give_back()


def leaving_nodes() -> frozenset[str]:
    """Ids of the nodes that were announced to leave: drained by an autoscaler, by an operator, or by Ray
    itself at a SIGTERM, as a pod gets it that Kubernetes evicts or a machine whose spot time is up. Ray
    places nothing on them any more, and ends them when nothing runs there, or at their deadline.
    """
    return frozenset(ray._private.state.state.get_draining_nodes())


def alive_nodes() -> frozenset[str]:
    """Ids of the nodes that are there."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
