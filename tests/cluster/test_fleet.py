"""A fleet of real engines: the same digits each time, also after one of them hung."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raytune_rl.groups.fleet import RolloutFleet
from raytune_rl.groups.fleet_start import start_fleet
from raytune_rl.protocol.columns import Ragged
from raytune_rl.protocol.data import Account, PromptSet
from raytune_rl.protocol.rollout import EngineSpec, Sampling
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.runtime.cluster import reserve
from raytune_rl.runtime.fleet_health import Limits
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.workers.rollout import RolloutWorker, rollout_env
from tests.cluster.conftest import Tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
ROWS = 6


@pytest.fixture(scope="module")
def prompts(cluster: None) -> PromptSet:
    rows = [list(range(5, 15 + 3 * i)) for i in range(ROWS)]
    columns = ray.put({"prompt": Ragged.from_rows(rows, np.int32)})
    lengths = np.array([len(row) for row in rows])
    return PromptSet(columns, None, None, lengths, Account((), {}, None, (), None, ()))


class Started:
    """Two engines that serve the model's own weights, and what was said about losses."""

    def __init__(self, tiny: Tiny, stack: ExitStack) -> None:
        self.losses: list[str] = []
        spec = GroupSpec("rollout", 2, cpus=1)
        slots = stack.enter_context(reserve([spec], 60.0))["rollout"]
        engine = EngineSpec(
            str(tiny.tied), "float32", 128, None, 60.0, kv_cache_bytes=64 * 2**20, enforce_eager=True
        )
        env = rollout_env(1, 1, on_gpu=False)
        self.workers = WorkerGroup(spec, slots, RolloutWorker, lambda _: {"spec": engine}, env, 120.0)
        stack.callback(self.workers.shutdown)
        self.workers.call("ping")
        thread = start_fleet(self.workers, Limits(hang_s=6, silent_s=4), self.losses.append, stack)
        self.fleet = RolloutFleet(
            self.workers, thread, Sampling(0.9, 100, disallowed_token_ids=(2,)), 42, timeout_s=120.0
        )


@pytest.fixture(scope="module")
def started(cluster: None, tiny: Tiny) -> Iterator[Started]:
    with ExitStack() as stack:
        yield Started(tiny, stack)


def digits(trajectories: list[Trajectory]) -> list[tuple[Any, ...]]:
    """Everything that was sampled, and its numbers."""
    read = ray.get([t.data.ref for t in trajectories], timeout=60)
    columns = [(c, t.data.row) for c, t in zip(read, trajectories, strict=True)]
    return [
        (t.prompt, t.group, t.episode.sample, c["tokens"][row].tobytes(), c["logprobs"][row].tobytes())
        for t, (c, row) in zip(trajectories, columns, strict=True)
    ]


def test_a_hung_engine_costs_nothing_but_time(started: Started, prompts: PromptSet) -> None:
    """Its prompts are answered by the other at once, and it serves again, anew."""
    fleet = started.fleet
    first = digits(fleet.generate(prompts, range(ROWS), 3, 0, 0))
    assert [one[:3] for one in first] == [(row, row, s) for row in range(ROWS) for s in range(3)]
    assert digits(fleet.generate(prompts, range(ROWS), 3, 0, 0)) == first
    pid = started.workers.call("ping")[1]["pid"]
    os.kill(pid, signal.SIGSTOP)
    disturbed = digits(fleet.generate(prompts, range(ROWS), 3, 0, 0))
    assert [one[:4] for one in disturbed] == [one[:4] for one in first]
    (sentence,) = started.losses
    assert sentence.startswith("rollout[1] hangs: its process has not answered for")
    while Path(f"/proc/{pid}").exists():  # Ray ends it a moment later
        time.sleep(0.05)
    assert started.workers.call("ping")[1]["pid"] != pid
    while fleet.load().members < 2:
        time.sleep(0.05)
    assert digits(fleet.generate(prompts, range(ROWS), 3, 0, 0)) == first
    load = fleet.load()
    assert (load.members, load.running, load.waiting) == (2, 0, 0)


def test_prompts_that_come_one_by_one_are_answered_as_they_end(started: Started, prompts: PromptSet) -> None:
    """More than the engines take at once; and what is cancelled ends, too."""
    fleet = started.fleet
    requests = fleet.requests([i % ROWS for i in range(40)], 2, 1)
    tickets = [fleet.submit(one, prompts) for one in requests]
    fleet.cancel(tickets[-1])
    ended = {outcome.ticket: type(outcome).__name__ for outcome in fleet.each(120.0)}
    assert sorted(ended) == tickets
    assert list(ended.values()).count("Finished") >= 39
    assert list(fleet.completed(1.0)) == []
