"""Budgets of restarts on a clock of the test's own, and what a world can be made again from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_rl.errors import RestartsUsedUpError
from raytune_rl.groups.restarts import ATTEMPTS, LONGEST_PAUSE_S, QUIET_S, RestartBudget
from raytune_rl.groups.snapshots import History, Snapshots
from raytune_rl.protocol.faults import Fault
from raytune_rl.protocol.rows import TrainBatch
from raytune_rl.protocol.train import SnapshotPart
from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.runtime.wait import Pending


def fault(phase: str = "training step 5", who: str = "policy[1]") -> Fault:
    return Fault(36_000.0, "policy", who, phase, f"{who} died during '{phase}'.")


def test_pauses_grow_with_losses_in_a_row_and_start_again_after_a_quiet_time() -> None:
    now = [0.0]
    budget = RestartBudget(100, lambda: now[0])
    assert [budget.spend(fault(), 1) for _ in range(4)] == [0, 1, 2, 4]
    for _ in range(10):
        pause = budget.spend(fault(), 1)
    assert pause == LONGEST_PAUSE_S
    now[0] += QUIET_S + 1
    assert [budget.spend(fault(), 1) for _ in range(2)] == [0, 1]


def test_the_end_says_when_who_at_what_and_how_to_go_on() -> None:
    budget = RestartBudget(2)
    budget.spend(fault("starting"), 1)
    budget.spend(fault(who="critic[0]"), 1)
    with pytest.raises(RestartsUsedUpError) as ended:
        budget.spend(fault("saving the model"), 1)
    assert str(ended.value).splitlines() == [
        "policy[1] died during 'saving the model'; it is not started anew, as all 2 restarts "
        "(--max_restarts) are used up.",
        "  10:00:00 UTC: policy[1] at 'starting'",
        "  10:00:00 UTC: critic[0] at 'training step 5'",
        "  10:00:00 UTC: policy[1] at 'saving the model'",
        "The same command with --resume_from_checkpoint auto goes on from the newest checkpoint; a higher "
        "--max_restarts allows more.",
    ]


def test_work_that_loses_its_workers_each_time_ends_the_run_before_the_budget() -> None:
    budget = RestartBudget(50)
    for attempt in range(1, ATTEMPTS + 1):
        budget.spend(fault(), attempt)
    with pytest.raises(RestartsUsedUpError, match="4 times at the same work, 'training step 5'"):
        budget.spend(fault(), ATTEMPTS + 1)


def test_without_restarts_the_first_loss_is_the_end() -> None:
    with pytest.raises(RestartsUsedUpError, match="all 0 restarts"):
        RestartBudget(0).spend(fault(), 1)


class Ranks:
    """Two ranks that give a snapshot of a hundred bytes each when the test lets them."""

    def __init__(self, every: int | None, seconds: float = 0.0, most: int = 10**9) -> None:
        self.asked = 0
        self.whole = False
        self.kept = True
        self.seconds = seconds
        self.history = History()
        self.snapshots = Snapshots(self.history, self.ask, self.ready, every, lambda size: size <= most)

    def ask(self) -> list[Pending]:
        self.asked += 1
        return [Pending([f"part {rank}", f"bytes {self.asked}.{rank}"], "policy", "", 1.0) for rank in (0, 1)]

    def ready(self, calls: Any) -> list[SnapshotPart] | None:
        entry = TensorEntry("0.master", "float32", (25,))
        if not self.whole:
            return None
        return [SnapshotPart((entry,), {}, self.seconds)] * 2 if self.kept else []

    def step(self, number: int, seconds: float = 1.0) -> None:
        self.history.stepped(TrainBatch([], np.zeros(0, dtype=np.int64)), number)
        self.snapshots.stepped(seconds)
        self.snapshots.begin_if_due()


def steps(history: History) -> list[int]:
    return [step for _, step in history.since]


def test_the_old_snapshot_stays_until_the_new_one_is_whole() -> None:
    ranks = Ranks(every=1)
    ranks.step(0)
    ranks.step(1)
    assert ranks.asked == 1, "one at a time"
    assert (ranks.history.snapshot, steps(ranks.history)) == (None, [0, 1])
    ranks.whole = True
    ranks.snapshots.settle()
    ranks.whole = False
    first = ranks.history.snapshot
    assert first is not None
    assert (first.steps, first.nbytes, first.refs) == (1, 200, ("bytes 1.0", "bytes 1.1"))
    assert steps(ranks.history) == [1], "what came after it is still to be done again"
    ranks.step(2)
    assert ranks.history.snapshot is first
    ranks.snapshots.drop()
    ranks.whole = True
    ranks.snapshots.settle()
    assert ranks.history.snapshot is first, "what was owed by ranks that are gone never comes"


def test_every_so_many_steps_and_none_at_all() -> None:
    some, none = Ranks(every=3), Ranks(every=0)
    for ranks in (some, none):
        ranks.whole = True
        for number in range(7):
            ranks.step(number)
        ranks.snapshots.settle()
    assert (some.asked, some.history.snapshot and some.history.snapshot.steps) == (2, 6)
    assert steps(some.history) == [6]
    assert none.asked == 0


def test_left_alone_they_take_five_percent_of_the_steps() -> None:
    ranks = Ranks(every=None, seconds=0.39)
    ranks.whole = True
    for number in range(41):
        ranks.step(number, seconds=1.0)
    assert ranks.snapshots.interval == 8
    assert ranks.asked == 6


def test_one_too_large_for_the_store_is_given_up_unless_it_is_asked_for() -> None:
    alone, asked = Ranks(every=None, most=199), Ranks(every=1, most=199)
    for ranks in (alone, asked):
        ranks.whole = True
        for number in range(3):
            ranks.step(number)
        ranks.snapshots.settle()
    assert (alone.asked, alone.snapshots.on, alone.history.snapshot) == (1, False, None)
    assert asked.history.snapshot is not None


def test_a_store_without_room_gets_back_what_snapshots_take_unless_they_are_asked_for() -> None:
    alone, asked = Ranks(every=None), Ranks(every=1)
    for ranks in (alone, asked):
        ranks.whole = True
        ranks.step(0)
        ranks.step(1)
        ranks.kept = False
        ranks.step(2)
        ranks.snapshots.settle()
    assert (alone.snapshots.on, alone.history.snapshot, steps(alone.history)) == (False, None, [])
    assert asked.history.snapshot is not None
    assert (asked.history.snapshot.steps, steps(asked.history)) == (1, [1, 2])
    asked.kept = True
    asked.step(3)
    asked.snapshots.settle()
    assert asked.history.snapshot.steps == 4


def test_a_checkpoint_that_is_loaded_is_where_the_world_begins() -> None:
    ranks = Ranks(every=1)
    ranks.whole = True
    ranks.step(0)
    ranks.history.restored(Path("checkpoint-4"))
    assert (ranks.history.snapshot, steps(ranks.history)) == (None, [])
    assert ranks.history.checkpoint == Path("checkpoint-4")


def test_after_a_resume_the_first_step_is_kept_at_once_as_its_checkpoint_may_be_removed() -> None:
    ranks = Ranks(every=50)
    ranks.whole = True
    ranks.history.restored(Path("checkpoint-4"))
    for number in range(3):
        ranks.step(number)
    ranks.snapshots.settle()
    assert ranks.history.snapshot is not None
    assert (ranks.asked, ranks.history.snapshot.steps, steps(ranks.history)) == (1, 1, [1, 2])
