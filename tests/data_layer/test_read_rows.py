"""Rows of a batch that do not all have the same columns."""

from __future__ import annotations

import numpy as np

from raytune_rl.data.read_rows import ReadRows
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.rows import ABSENT, RowPointer, TrainBatch


def test_a_row_without_a_column_has_zeros_and_one_that_nobody_sampled_has_no_number() -> None:
    def tokens(*lengths: int) -> Columns:
        masks = [np.arange(n) >= n - 2 for n in lengths]
        return {
            "tokens": Ragged.from_rows([np.arange(n) for n in lengths], np.int32),
            "loss_mask": Ragged.from_rows(masks, np.bool_),
        }

    sampled = {**tokens(4, 5), "logprobs": Ragged.from_rows([[-1, -2], [-3, -4]], np.float32)}
    store = {
        "sampled": sampled,
        "data": tokens(3),
        "later": {"logprobs": Ragged.from_rows([[-5, -6]], np.float32)},
    }
    places = [RowPointer("sampled", 1), RowPointer("data", 0)]
    batch = TrainBatch(places, np.array([5, 3]), {"ref_logprobs": [RowPointer("later", 0), ABSENT]})
    message = batch.message([[0, 1]])
    assert set(message.refs) == {"sampled", "data", "later"}
    rows = ReadRows(message, [store[ref] for ref in message.refs])
    assert [rows.extra("ref_logprobs", row).tolist() for row in (0, 1)] == [[-5, -6], [0, 0]]
    assert rows.own("logprobs", 0).tolist() == [-3, -4]
    assert np.isnan(rows.own("logprobs", 1)).tolist() == [True, True]
