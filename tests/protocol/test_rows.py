"""A batch by reference: parts, further columns, the message to a worker; and that nothing is ever changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from raytune_rl.protocol.rows import RowPointer, TrainBatch


def column(ref: str, *rows: int) -> list[RowPointer]:
    return [RowPointer(ref, row) for row in rows]


def batch() -> TrainBatch:
    """Three rows, of two objects, with one column and one scalar."""
    return TrainBatch(
        [*column("a", 4), *column("b", 0, 1)],
        np.array([10, 20, 30]),
        {"ref_logprobs": column("r", 7, 8, 9)},
        {"weight": np.array([0.25, 0.5, 0.75])},
    )


def shown(of: TrainBatch) -> tuple[Any, ...]:
    """Everything in it, as values that can be compared."""
    return (
        list(of.rows),
        of.lengths.tolist(),
        {name: list(pointers) for name, pointers in of.columns.items()},
        {name: values.tolist() for name, values in of.scalars.items()},
    )


@pytest.mark.parametrize("rows", [slice(1, 3), [1, 2], np.array([1, 2])], ids=["slice", "list", "array"])
def test_a_part_has_its_rows_of_everything(rows: Any) -> None:
    part = batch().part(rows)
    assert shown(part) == (
        column("b", 0, 1),
        [20, 30],
        {"ref_logprobs": column("r", 8, 9)},
        {"weight": [0.5, 0.75]},
    )
    assert len(part) == 2
    assert part.lengths.dtype == np.int64


def test_a_part_keeps_the_order_that_is_asked_for_and_may_repeat() -> None:
    part = batch().part([2, 0, 2])
    assert part.lengths.tolist() == [30, 10, 30]
    assert part.columns["ref_logprobs"] == column("r", 9, 7, 9)
    assert part.scalars["weight"].tolist() == [0.75, 0.25, 0.75]


def test_a_part_without_rows_is_a_batch() -> None:
    empty = batch().part([])
    assert (len(empty), shown(empty)[2:]) == (0, ({"ref_logprobs": []}, {"weight": []}))
    assert empty.message([()]).places[""].shape == (0, 2)


def test_a_part_of_a_part_is_a_part() -> None:
    assert shown(batch().part([2, 1, 0]).part(slice(0, 2))) == shown(batch().part([2, 1]))


def test_columns_and_scalars_are_added_or_replaced() -> None:
    more = batch().with_columns(advantages=column("x", 0, 1, 2), ref_logprobs=column("s", 1, 2, 3))
    assert more.columns == {"ref_logprobs": column("s", 1, 2, 3), "advantages": column("x", 0, 1, 2)}
    told = batch().with_scalars(weight=[1, 2, 3], label=[True, False, True])
    assert {name: values.tolist() for name, values in told.scalars.items()} == {
        "weight": [1.0, 2.0, 3.0],
        "label": [1.0, 0.0, 1.0],
    }
    assert {values.dtype for values in told.scalars.values()} == {np.dtype(np.float64)}


def test_columns_are_kept_or_dropped_by_name() -> None:
    two = batch().with_columns(advantages=column("x", 0, 1, 2))
    assert two.keep({"advantages", "never heard of"}).columns.keys() == {"advantages"}
    assert two.drop("advantages", "never heard of").columns.keys() == {"ref_logprobs"}
    assert two.keep(()).columns == {}
    assert two.keep(()).scalars.keys() == {"weight"}, "scalars stay"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: batch().with_columns(advantages=column("x", 0, 1)),
            "'advantages' has 2 rows for a batch of 3",
        ),
        (lambda: batch().with_scalars(weight=[1.0]), "'weight' has 1 rows for a batch of 3"),
        (lambda: TrainBatch(column("a", 0), np.array([1, 2])), "'lengths' has 2 rows for a batch of 1"),
    ],
)
def test_another_number_of_rows_is_refused(made: Callable[[], TrainBatch], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()


def test_the_message_names_each_object_once() -> None:
    """A worker finds every row again from the places that it is told."""
    sent = batch().with_columns(old_values=column("b", 5, 6, 7)).message([[2, 0], [1], []])
    assert sorted(sent.refs) == ["a", "b", "r"]
    assert sent.micro_batches == ((2, 0), (1,), ())
    assert len(sent) == 3
    found = {
        name: [RowPointer(sent.refs[index], int(row)) for index, row in places]
        for name, places in sent.places.items()
    }
    assert found == {
        "": [*column("a", 4), *column("b", 0, 1)],
        "ref_logprobs": column("r", 7, 8, 9),
        "old_values": column("b", 5, 6, 7),
    }
    assert {places.dtype for places in sent.places.values()} == {np.dtype(np.int32)}
    assert sent.scalars["weight"].tolist() == [0.25, 0.5, 0.75]


def test_nothing_changes_what_it_was_given() -> None:
    given = batch()
    before = shown(given)
    part = given.part(slice(0, 2))
    part.scalars["weight"][:] = -1
    part.lengths[:] = -1
    given.with_columns(ref_logprobs=column("x", 0, 1, 2)).with_scalars(weight=[9, 9, 9])
    given.keep(()).drop("ref_logprobs")
    given.message([[0, 1, 2]])
    assert shown(given) == before
    with pytest.raises(FrozenInstanceError):
        given.rows = []  # type: ignore[misc]
