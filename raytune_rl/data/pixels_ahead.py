"""Pixels made before they are asked for, in threads, while the model works on the micro-batch before.

Decoding and scaling are C code that leaves the interpreter to others, so threads are enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from raytune_rl.data.media_table import Medium

T = TypeVar("T")
Key = tuple[str, ...]

ROWS_AHEAD = 8
"""Rows whose pixels may wait for their turn: pixels are large."""


def key_of(row: Sequence[Medium]) -> Key:
    """The key of the pixels of a row's media."""
    return tuple(f"{medium.modality}:{medium.key}" for medium in row)


class PixelsAhead(Generic[T]):
    """Makes things of rows, in the order in which they will be wanted.

    Args:
        make: Of one row.
        threads: That do it; with 0 everything is made when it is wanted.
        rows: Most rows that are made or being made, and not taken yet.
    """

    def __init__(self, make: Callable[[Sequence[Medium]], T], threads: int, rows: int = ROWS_AHEAD) -> None:
        self._make = make
        self._limit = rows
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pixels") if threads else None
        self._coming: deque[tuple[Key, Sequence[Medium]]] = deque()
        self._pending: dict[Key, Future[T]] = {}

    def expect(self, rows: Iterable[Sequence[Medium]]) -> None:
        """Rows that will be taken next, in this order; others that were expected are forgotten."""
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()
        self._coming = deque({key_of(row): row for row in rows}.items())
        self._start()

    def take(self, row: Sequence[Medium]) -> T:
        """The result of `make` for a row, or its error.

        A row that was not expected, or not begun, is made here and now.
        """
        found = self._pending.pop(key_of(row), None)
        self._start()
        return self._make(row) if found is None else found.result()

    def _start(self) -> None:
        while self._pool is not None and self._coming and len(self._pending) < self._limit:
            key, row = self._coming.popleft()
            self._pending[key] = self._pool.submit(self._make, row)
