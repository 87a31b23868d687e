"""Groups of real actors that lose members: work is done again where it may be, and not for ever."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.errors import DataError, StaleWeightsError, WorkerDiedError
from raytune_rl.runtime.cluster import reserve
from raytune_rl.runtime.group import ATTEMPTS, WorkerGroup
from raytune_rl.runtime.placement import GroupSpec
from raytune_rl.runtime.wait import fetch_all, settle

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180), pytest.mark.usefixtures("running")]


class Worker:
    """Stateless but for what it is set up with."""

    PROBED = True

    def __init__(self, rank: int) -> None:
        self._rank, self._factor = rank, 0

    def progress(self) -> int:
        return 0

    def pid(self) -> int:
        return os.getpid()

    def load(self, factor: int | None) -> None:
        if factor is None:
            raise DataError("nothing is published")
        self._factor = factor

    def times(self, number: int) -> tuple[str, dict[str, int]]:
        if not self._factor:
            raise StaleWeightsError("nothing is loaded")
        return f"rank {self._rank}", {"product": self._factor * number}

    def hang(self, unless: str) -> str:
        if unless and Path(unless).exists():
            return "answers"
        if unless:
            Path(unless).touch()
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)  # another thread may take the signal a moment later
        return "woken up"

    def die(self, unless: str) -> str:
        if unless and Path(unless).exists():
            return "lives"
        if unless:
            Path(unless).touch()
        os._exit(3)


class Started:
    """A group of two, and the losses it spoke of."""

    def __init__(self, slots: Any, factor: int | None = 7) -> None:
        self.losses: list[tuple[str, str]] = []
        spec = GroupSpec("rollout", 2, cpus=0.1)
        self.group = WorkerGroup(spec, slots, Worker, lambda rank: {"rank": rank}, {}, 60.0)
        self.group.call("load", 7)
        self.group.replace_lost(60.0, lambda *losses: self.losses.append(losses), {"load": (factor,)})

    def lose(self, rank: int) -> None:
        pid = fetch_all([self.group.submit(rank, "pid")])[0]
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)


@pytest.fixture(scope="module")
def slots(running: None) -> Iterator[Any]:
    with reserve([GroupSpec("rollout", 2, cpus=0.1)], 60.0) as reserved:
        yield reserved["rollout"]


@pytest.fixture
def started(slots: Any) -> Iterator[Started]:
    made = Started(slots)
    yield made
    made.group.shutdown()


def test_every_call_of_a_lost_worker_is_answered_by_one_new_one(started: Started) -> None:
    group = started.group
    started.lose(1)
    asked = [group.submit(rank, "times", number, returns=2) for number in (2, 3) for rank in (0, 1)]
    done, words = settle(asked)
    assert words == ["rank 0", "rank 1"] * 2
    assert done[0] is asked[0], "who lives is not asked again"
    products = [one.ref[1] for one in done]
    import ray

    assert ray.get(products, timeout=30) == [{"product": 7 * n} for n in (2, 2, 3, 3)]
    assert len(started.losses) == 1
    name, sentence = started.losses[0]
    assert name == "rollout"
    assert sentence.startswith("rollout[1] died during 'times': ")
    assert "\n" not in sentence
    assert [word for word, _ in group.call("times", 5)] == ["rank 0", "rank 1"], "and stays as the others"


def test_a_loss_in_the_middle_of_the_work(started: Started, tmp_path: Path) -> None:
    assert started.group.map("die", [__file__, str(tmp_path / "once")]) == ["lives", "lives"]
    assert len(started.losses) == 1


def test_work_that_always_loses_its_worker_ends(started: Started) -> None:
    # It dies at once: the answer to its set-up may be lost with it.
    lost = rf"rollout\[0\] died during '(die|load)'[\s\S]*{ATTEMPTS} times"
    with pytest.raises(WorkerDiedError, match=lost):
        started.group.map("die", ["", __file__])
    assert len(started.losses) == ATTEMPTS - 1


def test_a_worker_that_hangs_is_ended_and_replaced(started: Started, tmp_path: Path) -> None:
    """It is stopped as a whole, and so cannot end by itself either."""
    (pid, _), group = started.group.call("pid"), started.group
    asked = [
        group.submit(rank, "hang", path, timeout_s=3.0)
        for rank, path in ((0, tmp_path / "once"), (1, __file__))
    ]
    assert fetch_all(asked) == ["answers", "answers"]
    ((name, sentence),) = started.losses
    assert (name, sentence.partition(" It is")[0]) == (
        "rollout",
        "rollout[0] did not finish 'hang' within 3 s.",
    )
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the hanging process is still there"
        time.sleep(0.1)


def test_one_that_gives_no_sign_of_life_is_replaced_long_before_its_deadline(
    started: Started, tmp_path: Path
) -> None:
    started.group.replace_hung(4.0)
    assert started.group.map("hang", [str(tmp_path / "once"), __file__]) == ["answers", "answers"]
    ((_, sentence),) = started.losses
    assert re.match(
        r"rollout\[0\] gives no sign of life for \d+ s: it hangs, during 'hang'\. It is", sentence
    )
    assert started.group.call("pid"), "and the new one is left alone"


def test_why_a_new_worker_cannot_be_set_up_is_said(slots: Any) -> None:
    made = Started(slots, factor=None)
    made.lose(0)
    with pytest.raises(DataError, match="nothing is published"):
        made.group.call("times", 2)
    made.group.shutdown()


def test_without_leave_a_loss_is_the_end(slots: Any) -> None:
    spec = GroupSpec("policy", 1, cpus=0.1)
    group = WorkerGroup(spec, slots, Worker, lambda rank: {"rank": rank}, {}, 60.0)
    with pytest.raises(WorkerDiedError, match=r"policy\[[01]\] died during 'die'"):
        group.map("die", [""] * len(slots))
    group.shutdown()
