"""A data task whose process is lost is done again, and not for ever."""

from __future__ import annotations

import pytest

from raytune_rl.errors import DataError, WorkerDiedError
from raytune_rl.prepare.sets import again_if_lost
from raytune_rl.runtime.group import ATTEMPTS


def losing(times: int, error: type[Exception] = WorkerDiedError):  # type: ignore[no-untyped-def]
    left = [times]

    def work() -> str:
        if left[0]:
            left[0] -= 1
            raise error("the data task was lost during 'reading': killed.\nA trace of Ray's.")
        return "rows"

    return work


def test_it_is_done_again_and_said() -> None:
    said: list[str] = []
    assert again_if_lost(losing(ATTEMPTS - 1), said.append) == "rows"
    assert said == ["the data task was lost during 'reading': killed. It is done again."] * (ATTEMPTS - 1)


def test_one_that_is_lost_each_time_ends_the_run() -> None:
    with pytest.raises(WorkerDiedError):
        again_if_lost(losing(ATTEMPTS), lambda _: None)


def test_an_error_of_the_data_is_no_loss() -> None:
    said: list[str] = []
    with pytest.raises(DataError):
        again_if_lost(losing(1, DataError), said.append)
    assert said == []
