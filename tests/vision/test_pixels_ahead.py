"""Pixels are made before they are asked for: the same ones, in time, and not too many."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from raytune_rl.data.media_table import Medium, StoredFile
from raytune_rl.data.pixels_ahead import PixelsAhead

DEADLINE_S = 20.0


def rows(count: int) -> list[list[Medium]]:
    return [[Medium("image", (StoredFile(number, data=b""),))] for number in range(count)]


def test_what_is_expected_is_made_in_another_thread_and_within_the_limit() -> None:
    made: list[int] = []
    enough = threading.Event()
    here = threading.get_ident()
    elsewhere: list[bool] = []

    def make(row: Sequence[Medium]) -> int:
        elsewhere.append(threading.get_ident() != here)
        made.append(row[0].files[0].digest)
        if len(made) == 3:
            enough.set()
        return row[0].files[0].digest * 10

    ahead = PixelsAhead(make, threads=1, rows=3)
    wanted = rows(6)
    ahead.expect(wanted)
    assert enough.wait(DEADLINE_S)
    assert made == [0, 1, 2], "before anything was taken, and no more than three wait"
    assert [ahead.take(row) for row in wanted] == [0, 10, 20, 30, 40, 50]
    assert made == [0, 1, 2, 3, 4, 5]
    assert all(elsewhere)


def test_without_threads_or_expectation_it_is_made_at_once() -> None:
    here = threading.get_ident()
    for ahead in (
        PixelsAhead(lambda row: threading.get_ident(), threads=0),
        PixelsAhead(lambda row: threading.get_ident(), threads=2),
    ):
        assert ahead.take(rows(1)[0]) == here


def test_a_row_that_was_forgotten_is_still_right() -> None:
    ahead = PixelsAhead(lambda row: row[0].files[0].digest, threads=1, rows=2)
    first, second, *_ = rows(4)
    ahead.expect([first, second])
    ahead.expect([second])
    assert (ahead.take(first), ahead.take(second), ahead.take(second)) == (0, 1, 1)


def test_an_error_comes_where_the_row_is_taken() -> None:
    def make(row: Sequence[Medium]) -> int:
        raise ValueError("broken picture")

    ahead = PixelsAhead(make, threads=1)
    ahead.expect(rows(1))
    with pytest.raises(ValueError, match="broken picture"):
        ahead.take(rows(1)[0])
