"""A world of real processes that only add up numbers loses ranks, and is what it was."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_rl.errors import RestartsUsedUpError, SnapshotMissingError, WorkerFailedError
from raytune_rl.groups.keeper import Keeper
from raytune_rl.groups.restarts import RecoveryRules, RestartBudget
from raytune_rl.protocol.faults import Fault
from raytune_rl.protocol.rows import TrainBatch
from raytune_rl.protocol.train import SnapshotPart
from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.runtime.cluster import reserve
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.runtime.wait import fetch_all
from tests.runtime.conftest import running

__all__ = ["running"]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240), pytest.mark.usefixtures("running")]


class Rank:
    """Its state is a sum; peers of a lost one fail first, as in a collective."""

    PROBED = True

    def __init__(self) -> None:
        self._sum, self._count = 0, 0

    def progress(self) -> int:
        return self._count

    def pid(self) -> int:
        return os.getpid()

    def train(self, step: int, peers: list[int]) -> int:
        for _ in range(5):
            time.sleep(0.02)
            self._count += 1
            if not all(Path(f"/proc/{pid}").exists() for pid in peers):
                raise RuntimeError("Connection closed by peer")
        self._sum += 10**step
        return self._sum

    def fail(self) -> None:
        raise ValueError("a defect")

    def snapshot(self) -> tuple[SnapshotPart, list[np.ndarray]]:
        part = SnapshotPart((TensorEntry("sum", "int64", (1,)),), {}, 0.0)
        return part, [np.array([self._sum]).view(np.uint8)]

    def put_back(self, part: SnapshotPart, arrays: list[np.ndarray]) -> None:
        self._sum = int(arrays[0].view(np.int64)[0])


class World:
    """Two such ranks behind a keeper, and what is told of their losses."""

    def __init__(self, slots: Any, every: int | None = 1, most: int = 10) -> None:
        self.faults: list[Fault] = []
        self.said: list[str] = []
        self.copied: list[tuple[str, int]] = []
        self.group = WorkerGroup(GroupSpec("policy", 2, cpus=0.1), slots, Rank, lambda _: {}, {}, 60.0)
        rules = RecoveryRules(
            RestartBudget(most), 4.0, every, 1e9, self.faults.append, self.said.append, self._copied
        )
        self.keeper = Keeper(self.group, rules, lambda: self.group.call("pid"), self._train, 60.0)
        self.group.call("pid")

    def _copied(self, refs: Any, name: str) -> None:
        self.copied.append((name, len(refs)))

    def _train(self, batch: TrainBatch, step: int) -> list[int]:
        return fetch_all([self.group.submit(rank, "train", step, []) for rank in range(2)])

    def step(self, step: int, strike: tuple[int, int] | None = None) -> list[int]:
        """One step; `strike` is a rank and its signal."""

        def once() -> list[int]:
            nonlocal strike
            pids = self.group.call("pid")
            calls = [self.group.submit(rank, "train", step, pids) for rank in range(2)]
            if strike is not None:
                os.kill(pids[strike[0]], strike[1])
                strike = None
            return fetch_all(calls)

        sums = self.keeper.run(f"training step {step}", once)
        batch = TrainBatch([], np.zeros(0, dtype=np.int64))
        self.keeper.stepped(batch, step, time.monotonic())
        self.keeper.snapshots.begin_if_due()
        return sums


@pytest.fixture(scope="module")
def slots(running: None) -> Iterator[Any]:
    with reserve([GroupSpec("policy", 2, cpus=0.1)], 60.0) as reserved:
        yield reserved["policy"]


@pytest.fixture
def make(slots: Any) -> Iterator[Any]:
    worlds: list[World] = []

    def one(**settings: Any) -> World:
        worlds.append(World(slots, **settings))
        return worlds[-1]

    yield one
    for world in worlds:
        world.group.shutdown()


def test_a_killed_rank_takes_all_back_to_the_snapshot_and_the_step_is_done_again(make: Any) -> None:
    world = make()
    assert world.step(0) == [1, 1]
    assert world.step(1) == [11, 11]
    before = world.group.call("pid")
    assert world.step(2, (1, signal.SIGKILL)) == [111, 111]
    assert world.step(3) == [1111, 1111]
    after = world.group.call("pid")
    assert not set(before) & set(after), "all are others"
    (fault,) = world.faults
    assert (fault.who, fault.phase) == ("policy[1]", "training step 2")
    assert fault.recovered_s is not None
    assert "policy[1] died during '" in world.said[0]
    assert (
        "All 2 policy rank(s) start anew from the newest snapshot, and the work is done again"
        in world.said[0]
    )


def test_steps_since_the_snapshot_are_repeated_whatever_the_work_was(make: Any) -> None:
    world = make(every=3)
    for step in range(5):
        world.step(step)
    world.keeper.snapshots.settle()
    os.kill(world.group.call("pid")[0], signal.SIGKILL)
    sums = world.keeper.run("scoring", lambda: [one[1] for one in world.group.call("snapshot")])
    assert [int(one[0].view(np.int64)[0]) for one in sums] == [11111, 11111]
    assert [fault.repeated for fault in world.faults] == ["2 optimizer steps"]


def test_a_stopped_rank_is_named_and_taken_for_dead(make: Any) -> None:
    world = make()
    world.step(0)
    assert world.step(1, (0, signal.SIGSTOP)) == [11, 11]
    (fault,) = world.faults
    assert fault.who == "policy[0]"
    assert "gives no sign of life" in fault.loss


def test_a_defect_is_no_loss(make: Any) -> None:
    world = make()
    with pytest.raises(WorkerFailedError, match="a defect"):
        world.keeper.run("failing", lambda: world.group.call("fail"))
    assert world.faults == []


def test_budgets_end_it_with_the_way_to_go_on(make: Any) -> None:
    world = make(most=1)
    world.step(0, (1, signal.SIGKILL))
    with pytest.raises(RestartsUsedUpError, match="--resume_from_checkpoint auto"):
        world.step(1, (1, signal.SIGKILL))


def test_without_snapshots_a_loss_is_named_for_who_begins_the_run_again(make: Any) -> None:
    world = make(every=0)
    world.step(0)
    with pytest.raises(SnapshotMissingError, match="--snapshot_steps"):
        world.step(1, (0, signal.SIGKILL))
