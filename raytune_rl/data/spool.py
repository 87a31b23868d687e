"""Items that wait on disk, and a choice of them: memory holds a few bytes an item, not the items."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Spool(Sequence[T]):
    """A list that only grows, in a temporary file without a name.

    Nobody but this process can reach the file, so what is read back is what it wrote itself; and it is gone
    with the process, however that ends. It lies where `tempfile` puts such files (`TMPDIR`).
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._file = tempfile.TemporaryFile(prefix="raytune_rl_")  # noqa: SIM115 (lives as long as the list)
        self._ends = array("q", [0])
        self._flushed = 0
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        """Adds an item."""
        self._ends.append(self._ends[-1] + self._file.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL)))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Chosen(self, np.arange(len(self))[index])
        number = range(len(self))[index]
        start, end = self._ends[number], self._ends[number + 1]
        if end > self._flushed:
            self._file.flush()
            self._flushed = self._ends[-1]
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))


class Chosen(Sequence[T], Generic[T]):
    """Items of another sequence, by number: some of them, or some more than once, in an order of their own.

    Attributes:
        items: The sequence.
        numbers: Which of its items, int64 `[n]`.
    """

    def __init__(self, items: Sequence[T], numbers: NDArray[np.int64]) -> None:
        self.items = items
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Chosen[T]: ...
    def __getitem__(self, index: int | slice) -> T | Chosen[T]:
        if isinstance(index, slice):
            return Chosen(self.items, self.numbers[index])
        return self.items[int(self.numbers[index])]
