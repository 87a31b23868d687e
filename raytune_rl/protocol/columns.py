"""Ragged columns: rows of unequal length as one flat array and offsets, never padded.

This is the only shape in which tokens travel between actors: numpy arrays lie in Ray's object store outside
the pickle, so that a reader maps them instead of copying them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray


@dataclass(frozen=True)
class Ragged:
    """`n` rows of unequal length.

    Attributes:
        values: All rows, one after the other, shape `[total]`.
        offsets: int64, shape `[n + 1]`; row `i` is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: NDArray
    offsets: NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence | NDArray], dtype: DTypeLike) -> Ragged:
        """Concatenates rows; `dtype` also gives an empty column its type."""
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray:
        """Row `row` as a view, without a copy. Negative rows are refused: offsets would wrap silently."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a ragged column of {len(self)} rows")
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Row lengths, int64 `[n]`."""
        return np.diff(self.offsets)

    def take(self, rows: Sequence[int]) -> Ragged:
        """A new column holding the given rows, in the given order."""
        return Ragged.from_rows([self[row] for row in rows], self.values.dtype)


Columns = dict[str, "Ragged | NDArray | list"]
