"""Groups are scored while others are sampled; work in the background ends, and fails, by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from raytune_rl.algorithms.experience import Experience
from raytune_rl.errors import RaytuneError
from raytune_rl.pipelines.group_flow import Aside, GroupFlow, Scored, in_background
from raytune_rl.protocol.rewards import RewardTable
from raytune_rl.protocol.tickets import Failed
from raytune_rl.protocol.trajectory import EpisodeRequest, Trajectory
from tests.pipelines.fakes import FakeFleet, Stage, prompt_set


def flow_of(script: Any, gate: threading.Event | None = None) -> tuple[GroupFlow, list[list[int]]]:
    """With rewards that wait for a gate; and the groups of each reward call."""
    calls: list[list[int]] = []

    def score(batch: list[Trajectory], prompts: Any) -> Experience:
        calls.append([t.group for t in batch])
        if gate is not None:
            assert gate.wait(30)
        values = np.array([[float(t.group)] for t in batch])
        return Experience(batch, RewardTable(("A",), ("a",), values, ()), values[:, 0])

    stage = Stage()
    fleet = FakeFleet(stage, script)
    fleet.loaded[0] = 0
    return GroupFlow(fleet, score, 30.0, Aside()), calls


def requests(rows: Sequence[int]) -> list[EpisodeRequest]:
    return [EpisodeRequest(row, row, (1, 2)) for row in rows]


def drained(flow: GroupFlow, count: int) -> list[Any]:
    ended: list[Any] = []
    until = time.monotonic() + 30
    while len(ended) < count and time.monotonic() < until:
        ended += flow.pump(0.01)
    return ended


def test_a_reward_call_holds_all_whole_groups_that_are_there() -> None:
    gate = threading.Event()
    flow, calls = flow_of(lambda row, seeds: row, gate)
    tickets = flow.ask(requests([1, 2, 3, 4]), prompt_set(9), together=True)
    while flow.sampling:
        assert flow.pump(0.01) == [], "nothing has rewards while the first call runs"
    assert calls == [[1, 1]], "asked as soon as the first was there"
    gate.set()
    ended = drained(flow, 4)
    assert calls[1:] == [[2, 2, 3, 3, 4, 4]], "all that had come meanwhile"
    assert [one.ticket for one in ended] == tickets
    for one, row in zip(ended, (1, 2, 3, 4), strict=True):
        assert isinstance(one, Scored)
        assert one.group.groups == [row]
        assert one.group.rewards.tolist() == [row, row]
    assert flow.idle


def test_failures_pass_by_the_rewards() -> None:
    flow, calls = flow_of(lambda row, seeds: -1.0 if row == 2 else 1.0)
    flow.ask(requests([1, 2]), prompt_set(9))
    ended = drained(flow, 2)
    assert sorted(type(one).__name__ for one in ended) == ["Failed", "Scored"]
    assert next(one for one in ended if isinstance(one, Failed)).reason.startswith("prompt 2")
    assert calls == [[1, 1]]


def test_an_error_of_the_rewards_reaches_who_waits() -> None:
    def score(batch: list[Trajectory], prompts: Any) -> Experience:
        raise RaytuneError("no reward")

    fleet = FakeFleet(Stage())
    flow = GroupFlow(fleet, score, 30.0, Aside())
    flow.ask(requests([1]), prompt_set(9))
    with pytest.raises(RaytuneError, match="no reward"):
        drained(flow, 1)


def test_work_in_the_background_ends_with_the_block_and_its_error_is_raised() -> None:
    seen = threading.Event()
    with in_background(lambda timeout_s: seen.set()):
        assert seen.wait(30)
    assert not any(thread.name == "rollout" for thread in threading.enumerate())

    def fails(timeout_s: float) -> None:
        raise RaytuneError("the fleet is gone")

    with pytest.raises(RaytuneError, match="the fleet is gone"), in_background(fails):
        time.sleep(0.01)
    with pytest.raises(ValueError, match="mine"), in_background(fails):
        raise ValueError("mine goes first")
