"""A program: a rollout fleet on a Ray cluster whose nodes come and go; prints as JSON what came of it.

The workers' engine is scripted: what is tried here is that no prompt is lost, whatever happens to nodes. In a
process of its own, as a cluster of several logical nodes cannot share one with other tests.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from raytune_rl.groups.fleet import RolloutFleet
from raytune_rl.groups.fleet_start import Growth, start_fleet
from raytune_rl.groups.scaling import Bounds, Patience
from raytune_rl.protocol.data import Account, PromptSet
from raytune_rl.protocol.rollout import Sampling
from raytune_rl.protocol.tickets import EngineProgress, Finished, WeightUpdate
from raytune_rl.protocol.trajectory import EpisodeFacts, EpisodeRequest
from raytune_rl.runtime.cluster import session
from raytune_rl.runtime.fleet_health import Limits
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.runtime.places import alive_nodes, leaving_nodes, places_for

SPEC = GroupSpec("rollout", 1, cpus=1.0)
LARGE = 10**6
"""Bytes of an answer: so large that Ray keeps it in the worker's node, not in its reply."""


class ScriptedWorker:
    """A rollout worker whose engine needs a tenth of a second for anything, two prompts at a time."""

    CALLS_AT_ONCE = 100

    def __init__(self) -> None:
        self._version: int | None = None
        self._steps = self._received = 0
        self._free = asyncio.Semaphore(2)

    async def ping(self) -> dict[str, Any]:
        return {"version": self._version, "max_num_seqs": 2}

    async def load_weights(self, version: int | None, in_flight: str) -> WeightUpdate:
        self._version = 0 if version is None else version
        return WeightUpdate(self._version, 0.1)

    async def progress(self) -> EngineProgress:
        return EngineProgress(self._steps, True, 0.1, self._received, 10**6, self._version)

    async def run_group(self, prompts: Any, request: EpisodeRequest, *_: Any) -> tuple[Any, ...]:
        self._received += 1
        async with self._free:
            await asyncio.sleep(0.1)
        self._steps += 1
        facts = EpisodeFacts(request.prompt_id, 0, 0, 3, 5, "stop", self._version or 0)
        node = ray.get_runtime_context().get_node_id()
        return [facts], np.full(LARGE, request.row % 200, np.uint8), [node], []


class Scene:
    """The fleet and what came of prompts."""

    def __init__(self, fleet: RolloutFleet) -> None:
        self.fleet = fleet
        self.asked = 0
        self.ended: Counter[int] = Counter()
        self.kept: list[Finished] = []
        self.row_of: dict[int, int] = {}

    def ask(self, count: int) -> None:
        prompts = PromptSet(None, None, None, np.full(10**5, 3), Account((), {}, None, (), None, ()))
        for _ in range(count):
            request = EpisodeRequest(self.asked, self.asked, (0,))
            self.row_of[self.fleet.submit(request, prompts).number] = self.asked
            self.asked += 1

    def until(self, done: Callable[[], bool], what: str, keep_busy: bool = True) -> None:
        """Goes on asking, and takes what is finished."""
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, f"{what}: {self.fleet.load()}"
            if keep_busy and self.fleet.load().waiting < 60:
                self.ask(60)
            self.take(0.2)

    def take(self, seconds: float) -> None:
        for outcome in self.fleet.completed(seconds):
            self.ended[outcome.ticket.number] += 1
            assert isinstance(outcome, Finished), outcome
            self.kept.append(outcome)
            self.kept[:-30] = []

    def places(self) -> set[str]:
        """Nodes of what was finished last."""
        texts = [ray.get(one.trajectories[0].text.ref, timeout=30)[0] for one in self.kept[-10:]]
        return set(texts)


def main() -> None:
    told: dict[str, Any] = {}
    small: dict[str, Any] = {"object_store_memory": 10**8, "include_dashboard": False}
    cluster = Cluster()
    for _ in range(3):
        cluster.add_node(num_cpus=1, **small)
    losses: list[str] = []
    said: list[str] = []
    with session(cluster.address), ExitStack() as stack:
        slots = stack.enter_context(places_for(SPEC, 60))
        workers = WorkerGroup(SPEC, slots, ScriptedWorker, lambda _: {}, timeout_s=120)
        stack.callback(workers.shutdown)
        growth = Growth(SPEC, Bounds(1, 3), Patience(waiting_s=0.5, idle_s=4.0), slots, said.append)
        limits = Limits(start_s=60, pull_s=60, hang_s=60, silent_s=60, probe_every_s=0.5)
        thread = start_fleet(workers, limits, losses.append, stack, growth)
        fleet = RolloutFleet(workers, thread, Sampling(1.0, 10), 0, timeout_s=60)
        fleet.pull(0)
        scene = Scene(fleet)
        told["at_the_start"] = fleet.load().members
        scene.until(lambda: fleet.load().members == 3, "growing")

        scene.until(lambda: len(scene.places()) == 3, "everybody works")
        here = ray.get_runtime_context().get_node_id()
        victim = next(n for n in cluster.list_all_nodes() if n.node_id in scene.places() - {here})
        finished = scene.kept[-10:]
        lost_node = victim.node_id
        scene.take(1.0)  # copies are made meanwhile
        cluster.remove_node(victim, allow_graceful=False)
        scene.until(lambda: fleet.load().lost == 1, "the lost node is noticed")
        rows = [scene.row_of[one.ticket.number] % 200 for one in finished]
        read = [ray.get(one.trajectories[0].data.ref, timeout=30) for one in finished]
        told["arrays_outlive_their_node"] = [int(a[0]) for a in read] == rows and lost_node in {
            ray.get(one.trajectories[0].text.ref, timeout=30)[0] for one in finished
        }

        del finished, read  # a node that is to leave stays, up to its deadline, while its objects are held

        cluster.add_node(num_cpus=1, **small)
        scene.until(lambda: fleet.load().members == 3, "another on the new node")
        leaving = next(iter(scene.places() - {here, lost_node}))
        gcs = ray._private.worker.global_worker.gcs_client
        deadline_ms = int((time.time() + 60) * 1000)
        accepted, why = gcs.drain_node(leaving, 2, "its spot time is up", deadline_ms)
        assert accepted, why
        assert leaving in leaving_nodes()
        scene.until(lambda: fleet.load().left == 1, "the drained node is cleared")
        told["losses_by_draining"] = len(losses) - 1
        scene.until(lambda: leaving not in alive_nodes(), "the drained node goes")

        scene.until(lambda: fleet.load().running + fleet.load().waiting == 0, "the end", keep_busy=False)
        scene.take(1.0)
        scene.until(lambda: fleet.load().members == 1, "shrinking", keep_busy=False)
        load = fleet.load()
        told["counts"] = [load.joined, load.left, load.lost]
        told["each_once"] = sorted(scene.ended.values()) == [1] * scene.asked
        told["prompts"], told["said"] = scene.asked, [*losses, *said]
    print("TOLD " + json.dumps(told), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
