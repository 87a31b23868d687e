"""Rows of a batch, read from the object store by the worker that they were sent to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.data import TEACHER_PROMPT
from raytune_rl.protocol.rows import NOWHERE, PROMPT_TOKENS, Prefixes, RowBatch


class ReadRows:
    """A batch whose objects have been read: rows as views on the object store's memory."""

    def __init__(self, batch: RowBatch, objects: Sequence[Columns]) -> None:
        self._batch = batch
        self._objects = objects

    @property
    def prefixes(self) -> Prefixes | None:
        """By which rows share what they begin with; None where each is laid out whole."""
        return self._batch.prefixes

    def has(self, name: str) -> bool:
        """Whether the rows' own objects have the column. A batch without rows has none."""
        return any(name in self._objects[source] for source, _ in self._batch.places[""])

    def own(self, name: str, row: int) -> NDArray:
        """One row of a float column of the rows' own, one value a loss token; NaN where its object has no
        such column."""
        if name in self.source(row)[0]:
            return self.column(name, row)
        return np.full(np.count_nonzero(self.column("loss_mask", row)), np.nan, dtype=np.float32)

    def has_extra(self, name: str) -> bool:
        """Whether the batch says where each row's extra column `name` lies."""
        return name in self._batch.places

    def source(self, row: int, extra: str = "") -> tuple[Columns, int]:
        """The object that a row lies in, and its number there; `extra` as in `column`."""
        source, at = self._batch.places[extra][row]
        return self._objects[source], int(at)

    def column(self, name: str, row: int, extra: str = "") -> NDArray:
        """One row of a ragged column, a view.

        Args:
            name: Column of the object.
            row: Row of the batch.
            extra: Name of the extra column whose object to look in; empty for the row's own object.
        """
        columns, at = self.source(row, extra)
        ragged = columns[name]
        if not isinstance(ragged, Ragged):
            raise TypeError(f"column {name!r} is not ragged")
        return ragged[at]

    def laid_out(self, row: int) -> tuple[NDArray, NDArray]:
        """Tokens and loss mask of a row; where a teacher is asked something else, that in the place of the
        row's first tokens, as many as the scalar `PROMPT_TOKENS` says."""
        tokens, mask = self.column("tokens", row), self.column("loss_mask", row)
        if not self.has_extra(TEACHER_PROMPT):
            return tokens, mask
        asked, start = self.extra(TEACHER_PROMPT, row), int(self._batch.scalars[PROMPT_TOKENS][row])
        return (
            np.concatenate([asked, tokens[start:]]),
            np.concatenate([np.zeros(len(asked), dtype=np.bool_), mask[start:]]),
        )

    def extra(self, name: str, row: int) -> NDArray:
        """One row of the extra column `name`, a view; zeros for a row that has none. In its object it goes by
        that name, or by the name without "old_" or "ref_": the log-probs that a worker gives do not know
        whose they will be.
        """
        if self._batch.places[name][row][0] == NOWHERE:
            return np.zeros(np.count_nonzero(self.column("loss_mask", row)), dtype=np.float32)
        columns, _ = self.source(row, name)
        return self.column(name if name in columns else name.split("_", 1)[-1], row, extra=name)
