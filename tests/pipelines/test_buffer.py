"""The buffer between sampling and training, by random schedules of who finishes when."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raytune_rl.errors import RaytuneError
from raytune_rl.pipelines.buffer import Asked, ExperienceBuffer

Buffer = ExperienceBuffer[tuple[int, int]]
"""Its groups here: prompt and version of the oldest token."""


class Schedule:
    """A run whose groups finish in random order, some of which are left out."""

    def __init__(self, seed: int, k: int, size: int, generations: int, left_out: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.k, self.size, self.generations, self.left_out = k, size, generations, left_out
        self.buffer: Buffer = ExperienceBuffer(size, k, generations)
        self.prompt = 0
        self.version = 0
        self.flying: dict[int, Asked] = {}
        self.trained: list[list[tuple[int, int]]] = []
        self.dropped: list[int] = []
        self.most = 0

    def ask(self) -> None:
        for _ in range(self.buffer.admit(self.version)):
            asked = self.buffer.ask(self.prompt, (self.prompt,), self.version)
            self.flying[asked.number] = asked
            self.prompt += 1
        self.most = max(self.most, len(self.buffer))

    def finish_one(self) -> None:
        number = int(self.rng.choice(list(self.flying)))
        asked = self.flying.pop(number)
        if self.rng.random() < self.left_out:
            assert self.buffer.leave_out(number) == asked
            self.dropped.append(asked.row)
            self.ask()
            return
        oldest = int(self.rng.integers(asked.version, self.version + 1))  # it may have begun later
        self.buffer.put(number, oldest, (asked.row, oldest))

    def generation(self) -> None:
        self.ask()
        for _ in range(self.rng.integers(0, len(self.flying) + 1)):
            if self.flying:
                self.finish_one()
        while not self.buffer.complete:
            assert self.buffer.waits_for()
            self.finish_one()
        self.trained.append(self.buffer.take(self.version))
        for _ in range(self.rng.integers(0, len(self.flying) + 1)):  # while it is trained on
            if self.flying:
                self.finish_one()
        self.version += 1

    def run(self) -> Schedule:
        while self.version < self.generations:
            self.generation()
        return self


SEEDS = range(20)


@pytest.mark.parametrize("k", [0, 1, 2, 5])
@pytest.mark.parametrize("left_out", [0.0, 0.3])
def test_nothing_is_too_old_lost_or_trained_on_twice(k: int, left_out: float) -> None:
    for seed in SEEDS:
        played = Schedule(seed, k, size=3, generations=12, left_out=left_out).run()
        for version, groups in enumerate(played.trained):
            assert all(0 <= version - oldest <= k for _, oldest in groups)
            assert len(groups) == 3
        rows = [row for groups in played.trained for row, _ in groups]
        assert sorted(rows + played.dropped) == list(range(played.prompt)), "each prompt has one end"
        assert len(rows) == 36
        assert played.most <= played.buffer.most == 3 * (k + 1)
        assert len(played.buffer) == 0, "nothing is asked that nobody would train on"


@pytest.mark.parametrize("k", [0, 1, 3])
def test_what_is_trained_on_does_not_depend_on_who_is_fastest(k: int) -> None:
    for seed in SEEDS:
        played = Schedule(seed, k, size=2, generations=6).run()
        rows = [[row for row, _ in groups] for groups in played.trained]
        assert rows == [[2 * g, 2 * g + 1] for g in range(6)], "the order of the synchronous loop"


def test_without_staleness_it_is_the_synchronous_loop() -> None:
    buffer: Buffer = ExperienceBuffer(4, 0, 3)
    assert [buffer.admit(version) for version in (0, 1, 2, 3)] == [4, 8, 12, 12]
    for version in range(3):
        asked = [buffer.ask(row, (), version) for row in range(buffer.admit(version))]
        assert len(asked) == 4
        assert buffer.admit(version) == 0
        for one in reversed(asked):
            assert not buffer.complete, "it waits for all"
            buffer.put(one.number, version, (one.row, version))
        assert buffer.take(version) == [(row, version) for row in range(4)]
        assert buffer.admit(version) == 0, "nothing is asked while the policy trains"


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_generation_waits_only_for_those_that_would_be_too_old_for_the_next(k: int) -> None:
    for seed in SEEDS:
        played = Schedule(seed, k, size=3, generations=10)
        while played.version < 10:
            played.ask()
            if k <= played.version:
                assert all(played.version - one.version == k for one in played.buffer.waits_for())
            played.generation()


def test_what_is_too_old_is_refused() -> None:
    buffer: Buffer = ExperienceBuffer(1, 1, 9)
    buffer.put(buffer.ask(0, (), 0).number, 0, (0, 0))
    with pytest.raises(RaytuneError, match=r"version 0 came up .* version 2, more than --max_staleness 1"):
        buffer.take(2)
    with pytest.raises(RaytuneError, match="came twice"):
        buffer.put(0, 0, (0, 0))


def test_no_more_is_asked_than_may_be() -> None:
    buffer: Buffer = ExperienceBuffer(1, 1, 9)
    buffer.ask(0, (), 0)
    buffer.ask(1, (), 0)
    with pytest.raises(RaytuneError, match="2 groups are in flight or wait"):
        buffer.ask(2, (), 0)
    assert buffer.ready == 0


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_resumed_buffer_goes_on_with_the_same_groups(k: int) -> None:
    for seed in SEEDS:
        played = Schedule(seed, k, size=3, generations=8)
        for _ in range(4):
            played.generation()
        state = json.loads(json.dumps(played.buffer.state_dict()))
        there = {asked.number: group for asked, group in played.buffer.finished()}
        flying = [asked.number for asked in played.buffer.in_flight()]
        resumed: Buffer = ExperienceBuffer(3, k, 8, first=4)
        resumed.load_state_dict(state, there, version=4)
        assert [asked.number for asked in resumed.in_flight()] == flying
        assert {asked.version for asked in resumed.in_flight()} <= {4}
        assert {asked.number: group for asked, group in resumed.finished()} == there
        played.buffer = resumed
        played.flying = {asked.number: asked for asked in resumed.in_flight()}
        played.run()
        rows = [row for groups in played.trained for row, _ in groups]
        assert rows == list(range(24)), "0 lost, 0 doubled, in order"


def test_a_smaller_bound_on_resume_asks_again_for_what_would_be_too_old() -> None:
    buffer: Buffer = ExperienceBuffer(1, 2, 9)
    for row in range(3):
        buffer.put(buffer.ask(row, (row,), 0).number, 0, (row, 0))
    there = {asked.number: group for asked, group in buffer.finished()}
    resumed: Buffer = ExperienceBuffer(1, 1, 9)
    resumed.load_state_dict(buffer.state_dict(), there, version=0)
    assert [asked.number for asked in resumed.in_flight()] == [2]
    assert resumed.ready == 2
    assert resumed.admit(0) == 0, "one more than may be is there already"
