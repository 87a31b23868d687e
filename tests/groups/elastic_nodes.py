"""A program: a fleet's size follows its work on a Ray cluster with a real autoscaler; prints as JSON what
came of it.

The engines are actors that do nothing: what is tried here is places, nodes and who is on them. In a process
of its own, as the cluster asks for no token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import ray

from raytune_rl.groups.elastic import Cluster, Elastic
from raytune_rl.groups.scaling import Bounds, Demand, Patience, ScalingPolicy
from raytune_rl.runtime.cluster import session
from raytune_rl.runtime.group import end, start_worker
from raytune_rl.runtime.placement import GroupSpec, Slot
from raytune_rl.runtime.places import Place, alive_nodes, leaving_nodes
from tests.runtime.autoscaling import autoscaling_cluster

SPEC = GroupSpec("rollout", 1, cpus=1.0)


class Idle:
    """An engine that does nothing."""

    def where(self) -> str:
        return ray.get_runtime_context().get_node_id()


class Crew:
    """Engines that have work or not, as the program says."""

    def __init__(self) -> None:
        self.actors: dict[int, Any] = {}
        self.dismissed: list[int] = []
        self.busy: set[int] = set()
        self.waiting = 0
        self.started = 0

    def demand(self, now: float) -> Demand:
        return Demand(len(self.busy), 4 * len(self.busy), self.waiting, 10.0)

    def start_member(self, slot: Slot, now: float) -> int:
        self.actors[self.started] = start_worker(Idle, SPEC, slot, {}, {})
        self.started += 1
        return self.started - 1

    def idle_members(self) -> list[int]:
        return [number for number in self.actors if number not in self.busy]

    def dismiss(self, member: int, now: float) -> None:
        end(self.actors.pop(member))
        self.busy.discard(member)
        self.dismissed.append(member)

    def nodes(self) -> list[str]:
        return ray.get([actor.where.remote() for actor in self.actors.values()], timeout=60)


def drain(node_id: str, within_s: float) -> None:
    """Announces that a node is going to leave, as for a machine whose spot time is up."""
    gcs = ray._private.worker.global_worker.gcs_client
    deadline_ms = int((time.time() + within_s) * 1000)
    accepted, why = gcs.drain_node(node_id, 2, "its spot time is up", deadline_ms)  # 2: preemption
    assert accepted, why


def main() -> None:
    told: dict[str, Any] = {}
    with autoscaling_cluster({"CPU": 1}, {"CPU": 1}, most=2) as address, session(address):
        crew, said = Crew(), []
        policy = ScalingPolicy(Bounds(1, 3), Patience(waiting_s=1.0, idle_s=3.0))
        elastic = Elastic(crew, policy, Cluster(lambda: Place.ask(SPEC), leaving_nodes), said.append)

        def until(done: Callable[[], bool], what: str) -> None:
            deadline = time.monotonic() + 60
            while not done():
                assert time.monotonic() < deadline, f"{what}: {elastic.told()}, {ray.nodes()}"
                elastic.look(time.monotonic())
                for number in crew.actors:
                    elastic.served(number, time.monotonic())
                time.sleep(0.1)

        until(lambda: len(crew.actors) == 1, "the least")
        told["at_the_start"] = [len(set(crew.nodes())), len(alive_nodes())]
        crew.busy, crew.waiting = {0}, 100
        until(lambda: len(crew.actors) == 3, "more")
        crew.busy, crew.waiting = {0, 1, 2}, 0
        told["grown"] = [len(set(crew.nodes())), len(alive_nodes())]

        leaving = dict(zip(crew.actors, crew.nodes(), strict=True))[1]
        drain(leaving, within_s=60)
        crew.waiting = 100  # what it had waits for others
        until(lambda: 3 in crew.actors, "another for the one whose node leaves")
        crew.busy.add(3)
        crew.waiting = 0
        told["drained"] = list(crew.dismissed)
        told["elsewhere"] = leaving not in crew.nodes()
        until(lambda: leaving not in alive_nodes(), "the node leaves")

        crew.busy = {0}
        until(lambda: len(crew.actors) == 1, "fewer")
        until(lambda: len(alive_nodes()) == 1, "nodes are taken away")
        told["shrunk"] = [len(set(crew.nodes())), len(alive_nodes())]
        told["counts"], told["said"] = elastic.told(), said
        elastic.end()
    print("TOLD " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
