"""Waiting for real actors: every failure has a name, and says who and at what."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from raytune_rl.errors import (
    DataError,
    DeadlineExceededError,
    RewardError,
    WorkerDiedError,
    WorkerFailedError,
)
from raytune_rl.runtime.wait import Pending, acknowledge, fetch, fetch_all

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120), pytest.mark.usefixtures("running")]
LONG = 600.0


class Worker:
    """Does what it is told, be it bad."""

    def __init__(self, error: Exception | None = None) -> None:
        if error is not None:
            raise error

    def answer(self, value: Any) -> Any:
        return value

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "awake"

    def die(self) -> None:
        os._exit(3)

    def fail(self, error: Exception) -> None:
        raise error

    def wait_in_vain(self) -> None:
        never = ray.remote(lambda: time.sleep(60)).options(num_cpus=0).remote()
        try:
            ray.get(never, timeout=0.1)
        finally:
            ray.cancel(never, force=True)

    def pair(self, value: Any) -> tuple[str, Any]:
        return "done", value


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    started = []

    def start(*args: Any) -> Any:
        started.append(ray.remote(Worker).options(num_cpus=0).remote(*args))
        return started[-1]

    yield start
    for actor in started:
        ray.kill(actor)


def pending(ref: Any, timeout_s: float = LONG, who: str = "rollout[1]", what: str = "sampling") -> Pending:
    return Pending(ref, who, what, timeout_s)


def test_an_answer(start: Callable[..., Any]) -> None:
    actor = start()
    assert fetch(pending(actor.answer.remote(7))) == 7
    assert fetch_all([pending(actor.answer.remote(n)) for n in range(3)]) == [0, 1, 2]
    assert fetch_all([]) == []


def test_a_deadline_says_who_what_and_how_long(start: Callable[..., Any]) -> None:
    actor = start()
    fetch(pending(actor.answer.remote(1)))
    with pytest.raises(DeadlineExceededError, match=r"rollout\[1\] did not finish 'sampling' within 0 s"):
        fetch(pending(actor.sleep.remote(LONG), timeout_s=0.2))


def test_a_deadline_of_several_names_all_that_are_owed(start: Callable[..., Any]) -> None:
    quick, slow = start(), start()
    owed = [
        pending(quick.answer.remote(1), who="policy[0]"),
        pending(slow.sleep.remote(LONG), timeout_s=3, who="policy[1]", what="training step 5"),
        pending(slow.sleep.remote(LONG), who="policy[2]", what="training step 6"),
    ]
    fetch(owed[0])
    with pytest.raises(DeadlineExceededError) as caught:
        fetch_all(owed)
    said = str(caught.value)
    assert "policy[1] (training step 5), policy[2] (training step 6)" in said
    assert "policy[0]" not in said
    assert "--step_timeout" in said


def test_a_process_that_ends_has_died(start: Callable[..., Any]) -> None:
    actor = start()
    with pytest.raises(WorkerDiedError, match=r"rollout\[1\] died during 'sampling'"):
        fetch(pending(actor.die.remote()))
    with pytest.raises(WorkerDiedError):  # and stays dead
        fetch(pending(actor.answer.remote(1)))


def test_a_task_whose_process_ends_has_died() -> None:
    def die() -> None:
        os._exit(3)

    ref = ray.remote(die).options(num_cpus=0, max_retries=0).remote()
    with pytest.raises(WorkerDiedError, match="the data task was lost during 'reading'"):
        fetch(pending(ref, who="the data task", what="reading"))


def test_what_a_call_raises_arrives_with_its_text(start: Callable[..., Any]) -> None:
    with pytest.raises(WorkerFailedError) as caught:
        fetch(pending(start().fail.remote(ZeroDivisionError("at the 5th row"))))
    said = str(caught.value)
    assert said.startswith("rollout[1] failed during 'sampling':")
    assert "ZeroDivisionError: at the 5th row" in said
    assert "\x1b[" not in said, "no colours in a message"


def test_an_error_for_the_user_keeps_its_name(start: Callable[..., Any]) -> None:
    with pytest.raises(DataError) as caught:
        fetch(pending(start().fail.remote(DataError("a.jsonl:3: no messages"))))
    assert str(caught.value) == "a.jsonl:3: no messages"


def test_a_constructor_that_raises_is_no_death(start: Callable[..., Any]) -> None:
    with pytest.raises(RewardError) as caught:
        fetch(pending(start(RewardError("plugin.py has no reward 'x'")).answer.remote(1)))
    assert str(caught.value) == "plugin.py has no reward 'x'"
    with pytest.raises(WorkerFailedError, match="OSError: no such library"):
        fetch(pending(start(OSError("no such library")).answer.remote(1)))


def test_a_workers_own_time_out_is_not_ours(start: Callable[..., Any]) -> None:
    """It arrives as Ray's GetTimeoutError too, but nobody waited in vain here."""
    with pytest.raises(WorkerFailedError, match="GetTimeoutError"):
        fetch(pending(start().wait_in_vain.remote()))


def test_the_first_failure_to_arrive_is_raised_whoever_is_first_in_the_list(
    start: Callable[..., Any],
) -> None:
    """Rank 0 hangs in a collective because rank 1 failed: what rank 1 says is the useful error."""
    hangs, fails = start(), start()
    calls = [
        pending(hangs.sleep.remote(LONG), who="policy[0]"),
        pending(fails.fail.remote(ValueError("shape")), who="policy[1]"),
    ]
    with pytest.raises(WorkerFailedError, match=r"policy\[1\][\s\S]*ValueError: shape"):
        fetch_all(calls)


def test_acknowledging_leaves_the_arrays_where_they_are(start: Callable[..., Any]) -> None:
    refs = start().pair.options(num_returns=2).remote([1, 2])
    assert acknowledge([pending(refs)]) == ["done"]
    assert ray.get(refs[1], timeout=30) == [1, 2]
