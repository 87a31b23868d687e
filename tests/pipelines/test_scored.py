"""Reference log-probs of rows, a part at a time."""

from __future__ import annotations

import numpy as np
import pytest

from raytune_rl.pipelines import scored
from raytune_rl.pipelines.scored import ScoredSet
from raytune_rl.protocol.data import Account, TokenSet
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import RowLogprobs


def test_rows_are_scored_in_parts_and_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored, "ROWS_OF_A_CALL", 2)
    lengths = np.arange(10, 20)
    rows = TokenSet("store", lengths, lengths, Account((), {}, None, (), None, ()))
    calls: list[list[int]] = []

    def score(batch: TrainBatch) -> RowLogprobs:
        numbers = [pointer.row for pointer in batch.rows]
        assert (batch.lengths - 10).tolist() == numbers
        calls.append(numbers)
        places = [RowPointer(f"call {len(calls)}", at) for at in range(len(numbers))]
        return RowLogprobs(places, -np.array(numbers, dtype=np.float64))

    said: list[str] = []
    found = ScoredSet.by(score, rows, [1, 2, 4, 7, 8], 1, said.append)
    assert calls == [[1, 2], [4, 7], [8]]
    assert {row: (place.ref, place.row) for row, place in found.columns.items()} == {
        1: ("call 1", 0),
        2: ("call 1", 1),
        4: ("call 2", 0),
        7: ("call 2", 1),
        8: ("call 3", 0),
    }
    assert found.sums[[1, 2, 4, 7, 8]].tolist() == [-1, -2, -4, -7, -8]
    assert np.isnan(found.sums[[0, 3, 5, 6, 9]]).all()
    assert said[-1] == "reference: 5 of 5 rows"
    said.clear()
    ScoredSet.by(score, rows, [3], 1, said.append)
    assert said == []
