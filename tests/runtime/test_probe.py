"""Hangs are told from slowness by answers and counts, on a clock of the test's own."""

from __future__ import annotations

import pytest

from raytune_rl.errors import WorkerHungError
from raytune_rl.runtime.probe import PATIENCE, SHARE, ProgressProbe


class Ranks:
    """Two ranks that answer, or do not, on a clock that only the test moves."""

    def __init__(self, limit_s: float = 10.0) -> None:
        self.now = 0.0
        self.silent: set[int] = set()
        self.counts = [0, 0]
        self.probe = ProgressProbe(
            2, lambda rank: rank, self.answer, lambda rank: f"policy[{rank}]", limit_s, lambda: self.now
        )

    def answer(self, rank: int) -> int | None:
        return None if rank in self.silent else self.counts[rank]

    def wait(self, seconds: float, counted_every: float | None = None) -> None:
        end, next_count = self.now + seconds, self.now + (counted_every or 0)
        while self.now < end:
            self.now += 1
            if counted_every and self.now >= next_count:
                self.counts[0] += 1
                next_count += counted_every
            self.probe.look()


def test_a_rank_that_answers_no_more_is_named_after_the_limit() -> None:
    ranks = Ranks()
    ranks.wait(5)
    ranks.silent.add(1)
    ranks.wait(9)
    with pytest.raises(WorkerHungError, match=r"^policy\[1\] gives no sign of life for 1\d s"):
        ranks.wait(4)


def test_one_that_never_answered_is_starting_and_left_to_its_deadline() -> None:
    ranks = Ranks()
    ranks.silent = {0, 1}
    ranks.wait(500)


def test_one_that_has_worked_but_was_never_looked_at_is_judged_too() -> None:
    ranks = Ranks()
    ranks.probe.started()
    ranks.silent = {0}
    with pytest.raises(WorkerHungError, match=r"^policy\[0\] gives no sign of life"):
        ranks.wait(20)


def test_slow_work_that_gets_on_is_never_a_hang() -> None:
    ranks = Ranks()
    ranks.probe.counting(True)
    ranks.wait(400, counted_every=7)
    ranks.wait(PATIENCE * 7 - 30)
    ranks.wait(1000, counted_every=20)
    ranks.probe.counting(False)
    ranks.wait(10_000)


def test_a_collective_that_never_returns_is_told_by_the_pauses_before() -> None:
    ranks = Ranks()
    ranks.probe.counting(True)
    ranks.wait(400, counted_every=2)
    with pytest.raises(WorkerHungError, match=r"policy\[0\] to policy\[1\] answer, but none .* got on"):
        ranks.wait(max(SHARE * 10, PATIENCE * 2) + 5)


def test_before_the_first_count_nothing_says_how_long_a_pause_may_be() -> None:
    ranks = Ranks()
    ranks.probe.counting(True)
    ranks.wait(5000)


def test_a_driver_that_was_stopped_itself_blames_nobody() -> None:
    ranks = Ranks()
    ranks.wait(5)
    ranks.silent.add(0)
    ranks.wait(2)
    ranks.now += 1000
    ranks.probe.look()
    ranks.silent.clear()
    ranks.wait(100)


def test_new_workers_are_looked_at_afresh_and_zero_asks_nobody() -> None:
    ranks = Ranks()
    ranks.wait(5)
    ranks.silent = {0, 1}
    ranks.probe.forget()
    ranks.wait(100)
    unasked = Ranks(limit_s=0)
    unasked.wait(5)
    unasked.silent = {0, 1}
    unasked.wait(100)
